/* SPDX-License-Identifier: Apache-2.0 */
/*
 * psync.c - the engine that works everywhere: a few threads, each with one blocking preadv or
 * pwritev at a time.  The simplest engine there is, and the one to copy for a new one.
 *
 * One mutex (a leaf) guards two lists: operations to do, in order, and operations done.  Threads
 * take from the one and append to the other; they sleep on `work` while there is nothing, the
 * caller of reap on `done`.  An operation belongs to who took it off a list.  At most `depth` are
 * between submit and reap, so no list needs a bound of its own.
 */
#include "io/io.h"

#include <stdlib.h>
#include <unistd.h>

struct psync {
    int64_t nthreads; /* the option */
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    struct ucmi_io_list todo, ended;
    unsigned depth, in_flight;
    unsigned idle; /* threads that wait for work */
    bool reaping, woken, stop;
    unsigned started;
    pthread_t *threads;
};

static void perform(struct ucm_io *op)
{
    ssize_t res;
    do {
        switch (op->op) {
        case UCM_IO_READV: res = preadv(op->fd, op->iov, (int)op->niov, op->off); break;
        case UCM_IO_WRITEV: res = pwritev(op->fd, op->iov, (int)op->niov, op->off); break;
        case UCM_IO_SYNC: res = fdatasync(op->fd); break;
        default: res = -1, errno = EINVAL; break;
        }
    } while (!ucmi_io_moved(op, res < 0 ? -errno : res));
}

static void *run(void *arg)
{
    struct psync *p = arg;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (!p->todo.head && !p->stop) {
            p->idle++;
            pthread_cond_wait(&p->work, &p->lock);
        }
        if (!p->todo.head)
            break;
        struct ucm_io *op = ucmi_io_pop(&p->todo);
        pthread_mutex_unlock(&p->lock);
        perform(op);
        pthread_mutex_lock(&p->lock);
        ucmi_io_push(&p->ended, op);
        if (p->reaping) {
            p->reaping = false;
            pthread_cond_signal(&p->done);
        }
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

static void psync_close(void *io)
{
    struct psync *p = io;
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->lock);
    for (unsigned i = 0; i < p->started; i++)
        pthread_join(p->threads[i], NULL);
    pthread_cond_destroy(&p->done);
    pthread_cond_destroy(&p->work);
    pthread_mutex_destroy(&p->lock);
    free(p->threads);
}

static int psync_open(void *io, unsigned depth, char *why, size_t why_len)
{
    struct psync *p = io;
    unsigned want = (unsigned)MIN(p->nthreads, depth); /* more would never have anything to do */
    p->threads = calloc(want, sizeof *p->threads);
    if (!p->threads)
        return ucmi_fail(why, why_len, -ENOMEM, "%s", ucm_strerror(-ENOMEM));
    p->depth = depth;
    pthread_mutex_init(&p->lock, NULL);
    ucmi_cond_init(&p->work);
    ucmi_cond_init(&p->done);
    for (; p->started < want; p->started++) {
        int err = ucmi_thread_start(&p->threads[p->started], "ucm-psync", run, p);
        if (err) {
            ucmi_fail(why, why_len, err, "thread %u of %u (posix_data_trans_concurrency): %s",
                      p->started + 1, want, ucm_strerror(err));
            psync_close(p);
            return err;
        }
    }
    return 0;
}

static int psync_submit(void *io, struct ucm_io **v, unsigned n)
{
    struct psync *p = io;
    pthread_mutex_lock(&p->lock);
    n = MIN(n, p->depth - p->in_flight);
    p->in_flight += n;
    for (unsigned i = 0; i < n; i++) {
        ucmi_io_begin(v[i]);
        ucmi_io_push(&p->todo, v[i]);
    }
    for (unsigned wake = MIN(n, p->idle); wake > 0; wake--, p->idle--)
        pthread_cond_signal(&p->work);
    pthread_mutex_unlock(&p->lock);
    return (int)n;
}

static int psync_reap(void *io, struct ucm_io **v, unsigned max, int timeout_ms)
{
    struct psync *p = io;
    uint64_t deadline = timeout_ms < 0 ? UINT64_MAX : ucmi_now_ns() + timeout_ms * 1000000ull;
    unsigned n = 0;

    pthread_mutex_lock(&p->lock);
    int late = timeout_ms == 0;
    while (!p->ended.head && !p->woken && !late) {
        p->reaping = true;
        late = ucmi_cond_wait(&p->done, &p->lock, deadline);
    }
    p->reaping = p->woken = false;
    while (n < max && p->ended.head)
        v[n++] = ucmi_io_pop(&p->ended);
    p->in_flight -= n;
    pthread_mutex_unlock(&p->lock);
    return (int)n;
}

static void psync_wake(void *io)
{
    struct psync *p = io;
    pthread_mutex_lock(&p->lock);
    p->woken = true;
    pthread_cond_signal(&p->done);
    pthread_mutex_unlock(&p->lock);
}

static const struct ucm_option options[] = {
    {"posix_data_trans_concurrency", UCM_T_INT, offsetof(struct psync, nthreads), "4", "1", "128",
     "threads of the psync engine, each with one read or write at a time"},
    {NULL},
};

const struct ucm_io_ops ucmi_io_psync = {
    .p = {.kind = "io",
          .name = "psync",
          .help = "threads with blocking reads and writes; works everywhere",
          .options = options,
          .size = sizeof(struct psync)},
    .open = psync_open,
    .close = psync_close,
    .submit = psync_submit,
    .reap = psync_reap,
    .wake = psync_wake,
};

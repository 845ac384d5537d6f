/* SPDX-License-Identifier: Apache-2.0 */
/*
 * aio.c - Linux AIO (libaio): asynchronous for O_DIRECT only; other reads and writes are done
 * within submit.  For kernels and containers without io_uring.
 *
 * submit and reap are called by one thread at a time and own everything but the wake eventfd.
 * Completions raise `done_fd`; reap sleeps in poll on both.  What the kernel has no room for
 * (EAGAIN) is given back to the caller, or, when it is the rest of a short transfer, kept on
 * `again` until a completion has made room.
 */
#include "io/io.h"

#include <libaio.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct aio {
    io_context_t ctx;
    int fd; /* eventfd: completions and wakes raise it, reap sleeps on it */
    _Atomic bool woken;
    unsigned depth;
    unsigned in_kernel;
    struct iocb *iocbs, **batch; /* depth of each */
    unsigned *free, nfree;       /* stack of iocbs that no operation between submit and reap has */
    struct io_event *events;
    struct ucmi_io_list again; /* to be submitted again */
    struct ucmi_io_list ended; /* without an event: refused by the kernel, or done on the spot */
};

static void aio_close(void *io)
{
    struct aio *a = io;
    if (a->ctx)
        io_destroy(a->ctx);
    if (a->fd >= 0)
        close(a->fd);
    free(a->iocbs);
    free(a->free);
    free(a->batch);
    free(a->events);
}

static int aio_open(void *io, unsigned depth, char *why, size_t why_len)
{
    struct aio *a = io;
    a->depth = depth;
    a->iocbs = calloc(depth, sizeof *a->iocbs);
    a->free = calloc(depth, sizeof *a->free);
    a->batch = calloc(depth, sizeof *a->batch);
    a->events = calloc(depth, sizeof *a->events);
    a->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int err = a->fd < 0 ? -errno : 0;
    if (!a->iocbs || !a->free || !a->batch || !a->events)
        err = -ENOMEM;
    if (!err)
        err = io_setup((int)depth, &a->ctx);
    if (err) {
        ucmi_fail(why, why_len, err, "%s%s", ucm_strerror(err),
                  err == -EAGAIN ? " (fs.aio-max-nr is used up)" : "");
        aio_close(a);
        return err;
    }
    for (unsigned i = 0; i < depth; i++)
        a->free[a->nfree++] = i;
    return 0;
}

static struct iocb *prepare(struct aio *a, struct ucm_io *op)
{
    struct iocb *cb = &a->iocbs[ucmi_io_track(op)->slot];
    switch (op->op) {
    case UCM_IO_READV: io_prep_preadv(cb, op->fd, op->iov, (int)op->niov, op->off); break;
    case UCM_IO_WRITEV: io_prep_pwritev(cb, op->fd, op->iov, (int)op->niov, op->off); break;
    default: io_prep_fdsync(cb, op->fd); break;
    }
    cb->data = op;
    io_set_eventfd(cb, a->fd);
    return cb;
}

/* The kernel refuses the operation: a file of the wrong kind, a bad descriptor, or an fdatasync
 * that it can only do at once. */
static void refuse(struct aio *a, struct ucm_io *op, int err)
{
    if (op->op == UCM_IO_SYNC && err == -EINVAL)
        err = fdatasync(op->fd) < 0 ? -errno : 0;
    ucmi_io_moved(op, err);
    ucmi_io_push(&a->ended, op);
}

/* Gives operations to the kernel; returns how many were taken, from the front.  With nothing of
 * ours in the kernel nothing will make room, so there being no room is then an error of the
 * operation. */
static unsigned feed(struct aio *a, struct ucm_io **v, unsigned n)
{
    unsigned at = 0;
    for (unsigned i = 0; i < n; i++)
        a->batch[i] = prepare(a, v[i]);
    while (at < n) {
        int r = io_submit(a->ctx, n - at, a->batch + at);
        if (r > 0) {
            at += (unsigned)r;
            a->in_kernel += (unsigned)r;
        } else if (r == -EAGAIN && a->in_kernel > 0) {
            break;
        } else if (r != -EINTR) {
            refuse(a, v[at++], r);
        }
    }
    return at;
}

static int aio_submit(void *io, struct ucm_io **v, unsigned n)
{
    struct aio *a = io;
    n = MIN(n, a->nfree);
    for (unsigned i = 0; i < n; i++) {
        ucmi_io_begin(v[i]);
        ucmi_io_track(v[i])->slot = a->free[--a->nfree];
    }
    unsigned taken = feed(a, v, n);
    for (unsigned i = n; i > taken; i--)
        a->free[a->nfree++] = ucmi_io_track(v[i - 1])->slot;
    return (int)taken;
}

static void hand_out(struct aio *a, struct ucm_io *op, struct ucm_io **v, unsigned *n)
{
    a->free[a->nfree++] = ucmi_io_track(op)->slot;
    v[(*n)++] = op;
}

static void resubmit(struct aio *a)
{
    for (struct ucm_io *op; (op = ucmi_io_pop(&a->again)) != NULL;)
        if (feed(a, &op, 1) == 0) {
            ucmi_io_push(&a->again, op);
            break;
        }
}

/* Takes what has ended.  libaio looks into the ring itself, so there is no system call when it is
 * empty, and never one that blocks. */
static unsigned collect(struct aio *a, struct ucm_io **v, unsigned max)
{
    static struct timespec at_once;
    unsigned n = 0;
    int got = io_getevents(a->ctx, 0, (long)MIN(max, a->depth), a->events, &at_once);
    for (int i = 0; i < got; i++) {
        struct ucm_io *op = a->events[i].data;
        a->in_kernel--;
        if (ucmi_io_moved(op, (ssize_t)a->events[i].res))
            hand_out(a, op, v, &n);
        else
            ucmi_io_push(&a->again, op);
    }
    resubmit(a);
    while (n < max && a->ended.head)
        hand_out(a, ucmi_io_pop(&a->ended), v, &n);
    return n;
}

/* Sleeps until something raises fd; returns false when it is too late. */
static bool await(struct aio *a, uint64_t deadline)
{
    struct timespec ts, *limit = NULL;
    if (deadline != UINT64_MAX) {
        uint64_t now = ucmi_now_ns();
        if (now >= deadline)
            return false;
        ts = (struct timespec){.tv_sec = (time_t)((deadline - now) / 1000000000u),
                               .tv_nsec = (long)((deadline - now) % 1000000000u)};
        limit = &ts;
    }
    struct pollfd p = {.fd = a->fd, .events = POLLIN};
    eventfd_t count;
    if (ppoll(&p, 1, limit, NULL) > 0)
        eventfd_read(a->fd, &count);
    return true;
}

static int aio_reap(void *io, struct ucm_io **v, unsigned max, int timeout_ms)
{
    struct aio *a = io;
    uint64_t deadline = timeout_ms < 0 ? UINT64_MAX : ucmi_now_ns() + timeout_ms * 1000000ull;
    for (bool in_time = true;; in_time = await(a, deadline)) {
        unsigned n = collect(a, v, max);
        if (atomic_exchange(&a->woken, false) || n > 0 || !in_time)
            return (int)n;
    }
}

/* Only the first of several wakes pays for a system call. */
static void aio_wake(void *io)
{
    struct aio *a = io;
    if (!atomic_exchange(&a->woken, true))
        eventfd_write(a->fd, 1);
}

const struct ucm_io_ops ucmi_io_aio = {
    .p = {.kind = "io",
          .name = "aio",
          .help = "Linux AIO; asynchronous with io_direct only",
          .size = sizeof(struct aio)},
    .open = aio_open,
    .close = aio_close,
    .submit = aio_submit,
    .reap = aio_reap,
    .wake = aio_wake,
};

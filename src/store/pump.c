/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pump: the one thread of a Posix tier.  It takes xfers from callers, starts their slices as
 * I/O becomes free, hears of completions, and does everything that changes lanes and index in
 * between.
 *
 * It sleeps in the engine's reap, without a time limit when nothing waits, so an idle tier never
 * wakes up.  `asleep` is set before the queue is looked at for the last time: who pushes later sees
 * it and wakes the engine, and a wake is remembered until the next reap.
 *
 * Loads go first; when both wait, a quarter of the I/O is the dumps', so neither starves.
 *
 * Storage that hangs holds the pump, or all of its I/O: `busy_ns` says since when nothing has come
 * back, and callers pass such a backend by (ucmi_posix_usable) until something does.  A pump that
 * cannot end when its store is closed is left alone: it keeps what its I/O needs, the store with
 * it, and frees all that should the I/O end.
 */
#include "store/posix.h"

#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>

enum { BATCH = 64, MAX_PIECES = 1024, REAP_AGAIN_NS = 1000000, GRACE_NS = 1000000000 };

/* ---- jobs ---- */

static const char *direction(const struct ucmi_job *job)
{
    return job->dump ? "Cache2Backend" : "Backend2Cache";
}

void ucmi_part_done(struct ucmi_part *part, enum ucm_stage stage, int err)
{
    struct ucmi_job *job = part->job;
    uint32_t left = --job->left;

    job->x->done(job->x, part->s, stage, err);
    if (left)
        return;
    if (ucmi_log_on(UCM_DEBUG))
        ucmi_log(UCM_DEBUG, NULL,
                 "Posix task(%" PRIu64 ",%s,%" PRIu32 ",%" PRIu64 ") finished, cost %.3fms.",
                 job->id, direction(job), job->n, job->bytes,
                 (double)(ucmi_now_ns() - job->start_ns) / 1e6);
    free(job);
}

void ucmi_part_end(struct ucmi_part *part, int err)
{
    bool dump = part->job->dump; /* part is gone with its last done */
    ucmi_part_done(part, UCM_RELEASED, err);
    if (dump)
        ucmi_part_done(part, UCM_STORED, err);
}

/* All of it has started or ended: it waits no more. */
static void leaves_queue(struct ucmi_posix *p)
{
    atomic_fetch_sub(&p->waiting, 1);
}

static void fail_rest(struct ucmi_job *job, int err)
{
    leaves_queue(job->p);
    for (uint32_t n = job->n - job->started; n; n--)
        ucmi_part_end(&job->parts[job->started++], err);
}

static void fail_list(struct ucmi_job_list *list, uint64_t before_ns, int err)
{
    struct ucmi_job *job;
    while ((job = STAILQ_FIRST(list)) && job->deadline_ns <= before_ns) {
        STAILQ_REMOVE_HEAD(list, next);
        fail_rest(job, err);
    }
}

static void event_came(void *arg, int err)
{
    struct ucmi_job *job = arg;
    struct ucmi_posix *p = job->p;

    job->event_err = err;
    job->ready_next = atomic_load(&p->ready);
    while (!atomic_compare_exchange_weak(&p->ready, &job->ready_next, job))
        ;
    ucmi_pump_wake(p); /* the pump frees its stream before it ends, and that waits for us */
}

/* The first of a list is the next whose time is up; mostly that is the order in which they come. */
static void queue_job(struct ucmi_posix *p, struct ucmi_job *job)
{
    struct ucmi_job_list *list = job->dump ? &p->dumps : &p->loads;
    struct ucmi_job **at = &STAILQ_FIRST(list), *before = NULL;

    if (!STAILQ_EMPTY(list)) /* glibc has no STAILQ_LAST */
        before = CONTAINER_OF(list->stqh_last, struct ucmi_job, next.stqe_next);
    if (before && before->deadline_ns > job->deadline_ns)
        for (before = NULL; (*at)->deadline_ns <= job->deadline_ns; at = &STAILQ_NEXT(before, next))
            before = *at;
    if (before)
        STAILQ_INSERT_AFTER(list, before, job, next);
    else
        STAILQ_INSERT_HEAD(list, job, next);
}

static void await_event(struct ucmi_posix *p, struct ucmi_job *job)
{
    const struct ucm_dev_ops *dev = p->geo->dev;
    void *state = p->geo->dev_state;
    int err = dev ? 0 : -ENODEV;

    if (!err && !p->stream)
        err = dev->stream_new(state, &p->stream);
    if (!err)
        err = dev->after(state, p->stream, job->x->after);
    if (err < 0) {
        fail_rest(job, err);
        return;
    }
    p->events++;
    err = dev->then(state, p->stream, event_came, job);
    if (err < 0) {
        p->events--;
        fail_rest(job, err);
    }
}

static void take_jobs(struct ucmi_posix *p)
{
    void *v[BATCH];
    size_t n;

    while ((n = ucmi_queue_pop(&p->queue, v, BATCH, 0)) > 0)
        for (size_t i = 0; i < n; i++) {
            struct ucmi_job *job = v[i];
            if (ucmi_log_on(UCM_DEBUG))
                ucmi_log(UCM_DEBUG, NULL,
                         "Posix task(%" PRIu64 ",%s,%" PRIu32 ",%" PRIu64 ") dispatching.", job->id,
                         direction(job), job->n, job->bytes);
            if (job->x->after)
                await_event(p, job);
            else
                queue_job(p, job);
        }
    struct ucmi_job *ready = atomic_exchange(&p->ready, NULL);
    while (ready) {
        struct ucmi_job *next = ready->ready_next;
        p->events--;
        if (ready->event_err)
            fail_rest(ready, ready->event_err); /* nothing of it can start */
        else
            queue_job(p, ready);
        ready = next;
    }
}

/* ---- starting slices ---- */

static bool dumps_blocked(const struct ucmi_posix *p)
{
    return STAILQ_EMPTY(&p->dumps) || p->retry_ns;
}

/* Is there work that is not waiting for anything? */
static bool can_start(const struct ucmi_posix *p)
{
    return !STAILQ_EMPTY(&p->idle) && (!STAILQ_EMPTY(&p->loads) || !dumps_blocked(p));
}

static void start_load(struct ucmi_posix *p)
{
    struct ucmi_job *job = STAILQ_FIRST(&p->loads);
    struct ucmi_part *part = &job->parts[job->started++];
    if (job->started == job->n) { /* before: the job may be gone after */
        STAILQ_REMOVE_HEAD(&p->loads, next);
        leaves_queue(p);
    }
    ucmi_load_start(p, part);
}

static void start_dump(struct ucmi_posix *p)
{
    struct ucmi_job *job = STAILQ_FIRST(&p->dumps);
    struct ucmi_part *part = &job->parts[job->started++];
    bool last = job->started == job->n;
    if (last)
        STAILQ_REMOVE_HEAD(&p->dumps, next);
    if (ucmi_dump_start(p, part) != -EAGAIN) {
        if (last)
            leaves_queue(p); /* the job may be gone */
        return;
    }
    job->started--;
    if (last)
        STAILQ_INSERT_HEAD(&p->dumps, job, next);
    if (!p->retry_ns)
        p->retry_ns = UINT64_MAX; /* until a slot comes free */
}

static void start_again(struct ucmi_posix *p)
{
    struct ucmi_part_list again = STAILQ_HEAD_INITIALIZER(again);
    struct ucmi_part *part;
    STAILQ_CONCAT(&again, &p->again);
    while ((part = STAILQ_FIRST(&again))) {
        STAILQ_REMOVE_HEAD(&again, next);
        if (STAILQ_EMPTY(&p->idle) && ucmi_now_ns() < part->job->deadline_ns)
            STAILQ_INSERT_TAIL(&p->again, part, next);
        else
            ucmi_load_start(p, part); /* which may put it back */
    }
}

static void start_slices(struct ucmi_posix *p)
{
    start_again(p);
    unsigned depth = (unsigned)p->o->io_depth, for_loads = depth - depth / 4;

    while (!STAILQ_EMPTY(&p->idle)) {
        if (!STAILQ_EMPTY(&p->loads) && (dumps_blocked(p) || p->loads_out < for_loads))
            start_load(p);
        else if (!dumps_blocked(p))
            start_dump(p);
        else
            break;
    }
}

/* ---- I/O ---- */

void ucmi_pump_send(struct ucmi_posix *p, struct ucmi_sent *s)
{
    s->io.arg = s;
    STAILQ_INSERT_TAIL(&p->to_send, s, next);
}

/* All that waits goes to the engine in few calls: with io_uring one system call a batch. */
static void flush(struct ucmi_posix *p)
{
    while (!STAILQ_EMPTY(&p->to_send)) {
        struct ucm_io *v[BATCH];
        unsigned n = 0;
        struct ucmi_sent *s;
        STAILQ_FOREACH(s, &p->to_send, next)
        {
            if (n == BATCH)
                break;
            v[n++] = &s->io;
        }
        int took = p->io.ops->submit(p->io.state, v, n);
        if (took == 0)
            return; /* full: the next reap makes room */
        for (int i = 0; i < MAX(took, 1); i++) {
            s = STAILQ_FIRST(&p->to_send);
            STAILQ_REMOVE_HEAD(&p->to_send, next);
            if (took > 0) {
                p->sent++;
            } else {
                s->io.res = took;
                STAILQ_INSERT_TAIL(&p->stash, s, next);
            }
        }
    }
}

static int reap(struct ucmi_posix *p, int timeout_ms)
{
    struct ucm_io *v[BATCH];
    int n = p->io.ops->reap(p->io.state, v, BATCH, timeout_ms);
    if (n < 0) { /* the kernel is short of memory: nothing is lost, but asking at once is no use */
        static struct ucmi_log_gate gate;
        ucmi_log_gated(&gate, 60, UCM_WARN, p->object, "waiting for I/O: %s", ucm_strerror(n));
        nanosleep(&(struct timespec){.tv_nsec = REAP_AGAIN_NS}, NULL);
    }
    for (int i = 0; i < n; i++)
        STAILQ_INSERT_TAIL(&p->stash, (struct ucmi_sent *)v[i]->arg, next);
    p->sent -= (unsigned)MAX(n, 0);
    if (n > 0 || !p->sent)
        atomic_store(&p->busy_ns, p->sent ? ucmi_now_ns() : 0);
    return n;
}

static void hear(struct ucmi_posix *p)
{
    struct ucmi_sent *s;
    while ((s = STAILQ_FIRST(&p->stash))) {
        STAILQ_REMOVE_HEAD(&p->stash, next);
        s->done(p, s);
    }
}

struct waited {
    struct ucmi_sent sent;
    bool over;
};

static void waited_done(struct ucmi_posix *p, struct ucmi_sent *s)
{
    CONTAINER_OF(s, struct waited, sent)->over = true;
}

/* One operation from start to end.  Completions of others met on the way stay in the stash. */
static ssize_t wait_for(struct ucmi_posix *p, struct waited *w)
{
    w->sent.done = waited_done;
    ucmi_pump_send(p, &w->sent);
    for (;;) {
        struct ucmi_sent *s;
        flush(p);
        STAILQ_FOREACH(s, &p->stash, next)
        if (s == &w->sent) {
            STAILQ_REMOVE(&p->stash, s, ucmi_sent, next);
            return w->sent.io.res;
        }
        reap(p, -1);
    }
}

int ucmi_pump_write(struct ucmi_posix *p, int fd, const void *buf, size_t len, off_t off)
{
    struct iovec iov = {(void *)buf, len};
    struct waited w = {
        .sent.io = {.op = UCM_IO_WRITEV, .fd = fd, .off = off, .iov = &iov, .niov = 1}};
    ssize_t n = wait_for(p, &w);
    return n < 0 ? (int)n : (size_t)n == len ? 0 : -EIO;
}

ssize_t ucmi_pump_read(struct ucmi_posix *p, int fd, void *buf, size_t len, off_t off)
{
    struct iovec iov = {buf, len};
    struct waited w = {
        .sent.io = {.op = UCM_IO_READV, .fd = fd, .off = off, .iov = &iov, .niov = 1}};
    return wait_for(p, &w);
}

int ucmi_pump_sync(struct ucmi_posix *p, int fd)
{
    struct waited w = {.sent.io = {.op = UCM_IO_SYNC, .fd = fd}};
    ssize_t n = wait_for(p, &w);
    return n < 0 ? (int)n : 0;
}

/* ---- moves ---- */

static int more_pieces(struct iovec **v, size_t *cap, size_t n)
{
    if (n <= *cap)
        return 0;
    struct iovec *more = realloc(*v, n * sizeof *more);
    if (!more)
        return -ENOMEM;
    *v = more;
    *cap = n;
    return 0;
}

struct ucmi_move *ucmi_move_new(struct ucmi_posix *p, struct ucmi_part *part)
{
    struct ucmi_move *m = STAILQ_FIRST(&p->idle);
    STAILQ_REMOVE_HEAD(&p->idle, next);
    m->part = part;
    m->block = NULL;
    m->lane = NULL;
    m->niov = m->at = 0;
    m->err = 0;
    m->pending = 0;
    m->dump = part->job->dump;
    *(m->dump ? &p->dumps_out : &p->loads_out) += 1;
    return m;
}

int ucmi_move_pieces(struct ucmi_posix *p, struct ucmi_move *m)
{
    const struct ucm_xfer *x = m->part->job->x;
    size_t max = m->cap ? m->cap - 1 : 0, n = ucm_slice_pieces(x, m->part->s, m->iov + 1, max);
    if (n > max) {
        if (more_pieces(&m->iov, &m->cap, n + 1) < 0)
            return -ENOMEM;
        ucm_slice_pieces(x, m->part->s, m->iov + 1, n);
    }
    m->niov = n + 1;
    return 0;
}

void ucmi_move_free(struct ucmi_posix *p, struct ucmi_move *m)
{
    *(m->dump ? &p->dumps_out : &p->loads_out) -= 1;
    STAILQ_INSERT_HEAD(&p->idle, m, next);
}

static bool fits_direct(const struct ucmi_posix *p, const struct iovec *iov, size_t n, off_t off)
{
    if (!p->dio_off || (uint64_t)off % p->dio_off)
        return false;
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++) {
        if ((uintptr_t)iov[i].iov_base % p->dio_mem || iov[i].iov_len % p->dio_mem)
            return false;
        bytes += iov[i].iov_len;
    }
    return bytes % p->dio_off == 0;
}

bool ucmi_move_step(struct ucmi_posix *p, struct ucmi_move *m, enum ucm_io_op op)
{
    if (m->at == m->niov || m->err)
        return false;
    const struct iovec *iov = m->iov + m->at;
    unsigned n = (unsigned)MIN(m->niov - m->at, (size_t)MAX_PIECES);
    int fd = ucmi_seg_fd(p, m->lane, m->place / m->lane->slots, fits_direct(p, iov, n, m->off));
    if (fd < 0) {
        m->err = fd;
        return false;
    }
    m->want = ucmi_iov_len(iov, n);
    m->data.io = (struct ucm_io){.op = op, .fd = fd, .off = m->off, .iov = iov, .niov = n};
    m->at += n;
    m->off += (off_t)m->want;
    m->pending++;
    ucmi_pump_send(p, &m->data);
    return true;
}

void ucmi_move_header(struct ucmi_posix *p, struct ucmi_move *m, enum ucm_io_op op, off_t slot)
{
    m->page_iov = (struct iovec){m->page, UCMI_PAGE};
    int fd =
        ucmi_seg_fd(p, m->lane, m->place / m->lane->slots, fits_direct(p, &m->page_iov, 1, slot));
    if (fd < 0) {
        m->err = fd;
        return;
    }
    m->head.io = (struct ucm_io){.op = op, .fd = fd, .off = slot, .iov = &m->page_iov, .niov = 1};
    m->pending++;
    ucmi_pump_send(p, &m->head);
}

/* A piece may hold many shards and a shard lie in many pieces. */
int ucmi_shard_sums(struct ucmi_posix *p, const struct ucmi_slot_header *h,
                    const struct ucmi_move *m, uint32_t nshards, uint64_t *sums)
{
    const struct iovec *iov = m->iov + 1;
    size_t size = p->geo->shard_size, at = 0, skip = 0;
    if (more_pieces(&p->scratch, &p->cap_scratch, m->niov - 1) < 0)
        return -ENOMEM;
    for (uint32_t i = 0; i < nshards; i++) {
        size_t left = size;
        unsigned n = 0;
        while (left) {
            size_t len = MIN(iov[at].iov_len - skip, left);
            if (len)
                p->scratch[n++] = (struct iovec){(char *)iov[at].iov_base + skip, len};
            left -= len;
            skip += len;
            if (skip == iov[at].iov_len) {
                at++;
                skip = 0;
            }
        }
        sums[i] = ucmi_shard_sum(&p->seal, h, m->shard + i, p->scratch, n);
    }
    return 0;
}

/* ---- the thread ---- */

void ucmi_pump_wake(struct ucmi_posix *p)
{
    if (atomic_exchange(&p->asleep, false))
        p->io.ops->wake(p->io.state);
}

void ucmi_news_ask(struct ucmi_posix *p)
{
    pthread_mutex_lock(&p->news_lock);
    p->news_asked++;
    pthread_mutex_unlock(&p->news_lock);
}

static void answer_news(struct ucmi_posix *p)
{
    pthread_mutex_lock(&p->news_lock);
    uint64_t asked = p->news_asked;
    bool wanted = asked != p->news_done;
    pthread_mutex_unlock(&p->news_lock);
    if (!wanted)
        return;
    ucmi_lanes_refresh(p);
    pthread_mutex_lock(&p->news_lock);
    p->news_done = asked;
    p->news_late = false;
    pthread_cond_broadcast(&p->news_read);
    pthread_mutex_unlock(&p->news_lock);
}

static void tend_lanes(struct ucmi_posix *p)
{
    /* First: a lane that is taken may have something to write at once. */
    if (p->wants_lane && STAILQ_EMPTY(&p->loads) && !p->loads_out) {
        struct ucmi_lane *lane;
        p->wants_lane = false;
        if (!p->nown)
            ucmi_own_any(p, &lane); /* if there is none to be had, nobody is told */
    }
    ucmi_asked_serve(p);
    ucmi_ear_open(p);
    ucmi_commit_touch_seen(p);
    for (unsigned i = p->nown; i-- > 0;)
        if (p->own[i]->own->lost)
            ucmi_own_drain(p, p->own[i]);
        else
            ucmi_commit_kick(p, p->own[i]);
    ucmi_bound_yield(p);
}

static bool commits_idle(const struct ucmi_posix *p)
{
    for (unsigned i = 0; i < p->nown; i++)
        if (p->own[i]->own->stage != UCMI_COMMIT_IDLE || p->own[i]->own->pending.n)
            return false;
    return true;
}

static bool nothing_moves(const struct ucmi_posix *p)
{
    return STAILQ_EMPTY(&p->loads) && STAILQ_EMPTY(&p->dumps) && STAILQ_EMPTY(&p->to_send) &&
           STAILQ_EMPTY(&p->stash) && !p->sent && commits_idle(p);
}

/* Dumps have until deadline_ns; loads end now. */
static bool close_down(struct ucmi_posix *p, uint64_t deadline_ns)
{
    fail_list(&p->loads, UINT64_MAX, -ECANCELED);
    if (ucmi_now_ns() >= deadline_ns)
        fail_list(&p->dumps, UINT64_MAX, -ECANCELED);
    if (!nothing_moves(p) || p->events)
        return false;
    ucmi_blocks_abandon(p, true);
    return TAILQ_EMPTY(&p->blocks);
}

static int sleep_ms(struct ucmi_posix *p, uint64_t closing_ns)
{
    uint64_t now = ucmi_now_ns(), until = MIN(ucmi_blocks_deadline(p), ucmi_own_beat(p));
    until = MIN(until, ucmi_segs_let_go(p));

    if (!STAILQ_EMPTY(&p->again))
        until = MIN(until, STAILQ_FIRST(&p->again)->job->deadline_ns);
    if (!STAILQ_EMPTY(&p->loads))
        until = MIN(until, STAILQ_FIRST(&p->loads)->deadline_ns);
    if (!STAILQ_EMPTY(&p->dumps))
        until = MIN(until, STAILQ_FIRST(&p->dumps)->deadline_ns);
    if (p->retry_ns)
        until = MIN(until, p->retry_ns);
    if (closing_ns > now) /* later only what is in flight is waited for */
        until = MIN(until, closing_ns);
    /* Tending the lanes may have freed what dumps waited for. */
    if (!STAILQ_EMPTY(&p->stash) || can_start(p) || until <= now)
        return 0;
    return until == UINT64_MAX ? -1 : (int)MIN((until - now) / 1000000 + 1, (uint64_t)INT_MAX);
}

static void run(struct ucmi_posix *p)
{
    uint64_t closing_ns = 0;

    for (;;) {
        if (!atomic_load(&p->busy_ns))
            atomic_store(&p->busy_ns, ucmi_now_ns());
        atomic_store(&p->asleep, true);
        bool closing = atomic_load(&p->closing); /* first: then no job comes after those taken */
        take_jobs(p);
        answer_news(p);
        uint64_t now = ucmi_now_ns();
        fail_list(&p->loads, now, -ETIMEDOUT);
        fail_list(&p->dumps, now, -ETIMEDOUT);
        ucmi_blocks_abandon(p, false);
        if (p->retry_ns && p->retry_ns <= now)
            p->retry_ns = 0;
        start_slices(p);
        tend_lanes(p);
        flush(p);
        if (closing) {
            if (!closing_ns)
                closing_ns = now + p->geo->timeout_ms * UINT64_C(1000000);
            if (close_down(p, closing_ns))
                return;
        }
        if (!p->sent)
            atomic_store(&p->busy_ns, 0);
        /* A wake since the top may have ended a wait within: then there is something to take. */
        reap(p, atomic_load(&p->asleep) ? sleep_ms(p, closing_ns) : 0);
        atomic_store(&p->asleep, false);
        hear(p);
    }
}

/* Beside others a backend that cannot be used is tried again: it may be mounted some day. */
static int begin(struct ucmi_posix *p)
{
    const uint64_t pause_ns = (uint64_t)p->o->stall_ms * UINT64_C(1000000);
    for (;;) {
        int err = ucmi_posix_begin(p);
        pthread_mutex_lock(&p->news_lock);
        bool again = p->tried && !err;
        p->tried = true;
        p->begin_err = err;
        pthread_cond_broadcast(&p->news_read);
        uint64_t until = ucmi_now_ns() + pause_ns;
        atomic_store(&p->busy_ns, 0);
        while (err && !atomic_load(&p->closing) &&
               !ucmi_cond_wait(&p->news_read, &p->news_lock, until))
            ;
        pthread_mutex_unlock(&p->news_lock);
        if (again)
            ucmi_log(UCM_WARN, p->object, "can be used again");
        if (!err || atomic_load(&p->closing))
            return err;
        atomic_store(&p->busy_ns, ucmi_now_ns());
    }
}

static void *pump_main(void *arg)
{
    struct ucmi_posix *p = arg;
    if (begin(p) == 0)
        run(p);
    if (p->stream)
        p->geo->dev->stream_free(p->geo->dev_state, p->stream);
    pthread_mutex_lock(&p->news_lock);
    p->over = true;
    bool alone = p->left_alone;
    pthread_cond_broadcast(&p->news_read);
    pthread_mutex_unlock(&p->news_lock);
    if (alone)
        ucmi_posix_free(p);
    return NULL;
}

int ucmi_pump_start(struct ucmi_posix *p)
{
    atomic_store(&p->busy_ns, ucmi_now_ns());
    return ucmi_thread_start(&p->thread, "ucm-posix", pump_main, p);
}

void ucmi_pump_stop(struct ucmi_posix *p)
{
    p->stop_ns = ucmi_now_ns() + p->geo->timeout_ms * UINT64_C(1000000);
    pthread_mutex_lock(&p->news_lock);
    atomic_store(&p->closing, true);
    pthread_cond_broadcast(&p->news_read);
    pthread_mutex_unlock(&p->news_lock);
    ucmi_pump_wake(p);
}

/* One that still gets something done, on a busy machine, is given the time. */
static bool gets_nowhere(const struct ucmi_posix *p)
{
    uint64_t since = MAX(atomic_load(&p->busy_ns), p->stop_ns);
    return ucmi_now_ns() > since + GRACE_NS;
}

bool ucmi_pump_join(struct ucmi_posix *p)
{
    pthread_t thread = p->thread;
    uint64_t until = p->stop_ns;
    pthread_mutex_lock(&p->news_lock);
    for (; !p->over && !gets_nowhere(p); until = ucmi_now_ns() + GRACE_NS)
        ucmi_cond_wait(&p->news_read, &p->news_lock, until);
    bool ended = p->over;
    p->left_alone = !ended;
    pthread_mutex_unlock(&p->news_lock);
    if (ended)
        pthread_join(thread, NULL);
    else
        pthread_detach(thread);
    return ended;
}

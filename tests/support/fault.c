/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine of fault.h: a struct ucm_io_ops around a real one.
 *
 * An operation that is to be spoilt ends here, without the real engine, where that is possible
 * (failures, torn and flipped writes: done with plain system calls, from an aligned copy, so that
 * O_DIRECT does not mind).  Else it goes to the real engine with a tag, and is spoilt when it comes
 * back (flipped reads, delays, reordering).  What hangs is not even begun.
 *
 * Threads: an engine's own state is that of the one thread that submits and reaps.  Plans and
 * counts are the process's, under one lock (a leaf).
 */
#include "fault.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "io/io.h"
#include "support.h"

enum { MAX_HELD = 512, GRAIN = 4096 };

struct tag { /* an operation that is spoilt when it has been done, or held back */
    struct ucm_io *op;
    enum fault_way way;
    uint64_t seed, due_ns; /* due_ns: of one that is back and may be told then */
    uint64_t round;        /* of fault_release, when it began to hang */
    int err;
    bool back;
};
struct engine {
    struct ucmi_io real;
    struct engine *next;
    unsigned number;
    unsigned inside; /* in the real engine */
    struct tag tags[MAX_HELD];
    unsigned ntags;
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t released, changed; /* changed: hanging, closed */
    struct fault_plan plans[FAULT_MAX_PLANS];
    uint64_t met[FAULT_MAX_PLANS], used[FAULT_MAX_PLANS];
    unsigned nplans;
    uint64_t seed, round;
    uint64_t seen[FAULT_NKINDS], done[FAULT_NWAYS][FAULT_NKINDS];
    unsigned hanging, opened, closed;
    struct engine *engines;
    _Atomic unsigned kinds; /* of all plans: nothing to lock for others */
    _Atomic(fault_watch_fn *) watch;
} fault = {.lock = PTHREAD_MUTEX_INITIALIZER,
           .released = PTHREAD_COND_INITIALIZER,
           .changed = PTHREAD_COND_INITIALIZER};

ssize_t __real_pread64(int fd, void *p, size_t len, off_t off);
ssize_t __wrap_pread64(int fd, void *p, size_t len, off_t off);

/* ---- plans ---- */

static void wake_all(void) /* lock held */
{
    fault.round++;
    pthread_cond_broadcast(&fault.released);
    for (struct engine *e = fault.engines; e; e = e->next)
        e->real.ops->wake(e->real.state);
}

void fault_plan(const struct fault_plan *v, unsigned n, uint64_t seed)
{
    unsigned kinds = 0;
    if (n > FAULT_MAX_PLANS)
        ts_die("fault: %u plans", n);
    pthread_mutex_lock(&fault.lock);
    for (unsigned i = 0; i < n; i++) {
        fault.plans[i] = v[i];
        fault.met[i] = fault.used[i] = 0;
        kinds |= v[i].kinds;
    }
    fault.nplans = n;
    fault.seed = seed;
    memset(fault.seen, 0, sizeof fault.seen);
    atomic_store(&fault.kinds, kinds);
    wake_all();
    pthread_mutex_unlock(&fault.lock);
}

void fault_release(void)
{
    pthread_mutex_lock(&fault.lock);
    wake_all();
    pthread_mutex_unlock(&fault.lock);
}

static bool due(const struct fault_plan *plan, unsigned i, unsigned kind, unsigned engine)
{
    if (!(plan->kinds & 1u << kind) || (plan->engine && plan->engine != engine))
        return false;
    fault.met[i]++;
    if (plan->times && fault.used[i] == plan->times)
        return false;
    if (plan->at)
        return fault.met[i] == plan->at;
    return plan->one_in && ts_below(&fault.seed, plan->one_in) == 0;
}

/* Whether this operation is spoilt, and how.  engine 0: it goes through none. */
static bool strike(enum fault_kind kind, unsigned engine, struct fault_plan *how, uint64_t *seed)
{
    bool hit = false;
    if (!(atomic_load(&fault.kinds) & 1u << kind))
        return false;
    pthread_mutex_lock(&fault.lock);
    fault.seen[kind]++;
    for (unsigned i = 0; i < fault.nplans; i++) {
        if (!due(&fault.plans[i], i, kind, engine) || hit)
            continue;
        fault.used[i]++;
        *how = fault.plans[i];
        how->err = how->err ? how->err : -EIO;
        *seed = ts_random(&fault.seed);
        fault.done[how->way][kind]++;
        hit = true;
    }
    pthread_mutex_unlock(&fault.lock);
    return hit;
}

uint64_t fault_seen(unsigned kinds)
{
    uint64_t n = 0;
    pthread_mutex_lock(&fault.lock);
    for (unsigned k = 0; k < FAULT_NKINDS; k++)
        n += kinds & 1u << k ? fault.seen[k] : 0;
    pthread_mutex_unlock(&fault.lock);
    return n;
}

uint64_t fault_done(enum fault_way way, enum fault_kind kind)
{
    pthread_mutex_lock(&fault.lock);
    uint64_t n = fault.done[way][kind];
    pthread_mutex_unlock(&fault.lock);
    return n;
}

uint64_t fault_done_all(void)
{
    uint64_t n = 0;
    for (unsigned w = 0; w < FAULT_NWAYS; w++)
        for (unsigned k = 0; k < FAULT_NKINDS; k++)
            n += fault_done(w, k);
    return n;
}

static unsigned read_count(const unsigned *count)
{
    pthread_mutex_lock(&fault.lock);
    unsigned n = *count;
    pthread_mutex_unlock(&fault.lock);
    return n;
}

static void await_count(const unsigned *count, unsigned n)
{
    pthread_mutex_lock(&fault.lock);
    while (*count < n)
        pthread_cond_wait(&fault.changed, &fault.lock);
    pthread_mutex_unlock(&fault.lock);
}

unsigned fault_hanging(void)
{
    return read_count(&fault.hanging);
}

void fault_await_hanging(unsigned n)
{
    await_count(&fault.hanging, n);
}

unsigned fault_opened(void)
{
    return read_count(&fault.opened);
}

unsigned fault_closed(void)
{
    return read_count(&fault.closed);
}

void fault_await_closed(unsigned n)
{
    await_count(&fault.closed, n);
}

const char *fault_kind_name(enum fault_kind kind)
{
    static const char *const names[] = {
#define X(id, name) name,
        FAULT_KINDS(X)
#undef X
    };
    return names[kind];
}

const char *fault_way_name(enum fault_way way)
{
    static const char *const names[] = {
#define X(id, name) name,
        FAULT_WAYS(X)
#undef X
    };
    return names[way];
}

/* ---- watching ---- */

void fault_watch(fault_watch_fn *fn)
{
    atomic_store(&fault.watch, fn);
}

static void tell(bool ended, const struct ucm_io *io, const struct ucm_file *file, long res)
{
    fault_watch_fn *fn = atomic_load(&fault.watch);
    if (fn)
        fn(&(struct fault_event){.ended = ended, .io = io, .file = file, .res = res});
}

/* ---- operations that end here ---- */

static const enum fault_kind kind_of_io[] = {
    [UCM_IO_READV] = FAULT_AT_READ,
    [UCM_IO_WRITEV] = FAULT_AT_WRITE,
    [UCM_IO_SYNC] = FAULT_AT_SYNC,
};

/* Writes the first len bytes, with bit `flip` turned over (UINT64_MAX: none). */
static void write_copy(const struct ucm_io *op, size_t len, uint64_t flip)
{
    size_t all = ucmi_iov_len(op->iov, op->niov), at = 0;
    uint8_t *copy = aligned_alloc(GRAIN, ROUND_UP(MAX(all, 1u), (size_t)GRAIN));
    if (!copy)
        ts_die("fault: no memory");
    for (unsigned i = 0; i < op->niov; at += op->iov[i++].iov_len)
        memcpy(copy + at, op->iov[i].iov_base, op->iov[i].iov_len);
    if (flip != UINT64_MAX)
        copy[flip / 8] ^= (uint8_t)(1u << flip % 8);
    for (size_t done = 0; done < len;) {
        ssize_t n = pwrite(op->fd, copy + done, len - done, op->off + (off_t)done);
        if (n <= 0)
            break; /* a real failure: as good as one of ours */
        done += (size_t)n;
    }
    free(copy);
}

/* All of it, as the real engine would. */
static ssize_t perform(const struct ucm_io *op)
{
    ssize_t n = op->op == UCM_IO_READV    ? preadv(op->fd, op->iov, (int)op->niov, op->off)
                : op->op == UCM_IO_WRITEV ? pwritev(op->fd, op->iov, (int)op->niov, op->off)
                                          : fdatasync(op->fd);
    return n < 0 ? -errno : n;
}

/* A part: whole sectors, less than all; of a file opened with O_DIRECT whole pages. */
static size_t part_of(const struct ucm_io *op, uint64_t seed)
{
    size_t all = ucmi_iov_len(op->iov, op->niov);
    size_t grain = seed & 1 ? 512 : GRAIN;
    int flags = fcntl(op->fd, F_GETFL);
    if (flags >= 0 && flags & O_DIRECT)
        grain = GRAIN;
    return all / grain ? seed / 2 % (all / grain) * grain : 0;
}

/* Reads a part, the rest of the memory is `fill` (-1: as it was). */
static void read_part(const struct ucm_io *op, size_t len, int fill)
{
    size_t at = 0;
    for (unsigned i = 0; i < op->niov; at += op->iov[i++].iov_len) {
        size_t want = at < len ? MIN(op->iov[i].iov_len, len - at) : 0;
        if (want && __real_pread64(op->fd, op->iov[i].iov_base, want, op->off + (off_t)at) < 0)
            want = 0; /* O_DIRECT and odd pieces */
        if (fill >= 0)
            memset((char *)op->iov[i].iov_base + want, fill, op->iov[i].iov_len - want);
    }
}

/* True: it has ended, op->res says how.  Else the real engine is to do it. */
static bool end_here(struct ucm_io *op, const struct fault_plan *how, uint64_t seed)
{
    size_t all = op->op == UCM_IO_SYNC ? 0 : ucmi_iov_len(op->iov, op->niov);
    size_t part = all ? part_of(op, seed) : 0;
    switch (how->way) {
    case FAULT_WAY_FAIL: op->res = how->err; return true;
    case FAULT_WAY_LOST: op->res = (ssize_t)all; return true;
    case FAULT_WAY_FLIP:
        if (op->op == UCM_IO_READV)
            return false;
        if (op->op == UCM_IO_WRITEV)
            write_copy(op, all, seed % (8 * all));
        op->res = (ssize_t)all;
        return true;
    case FAULT_WAY_HALF:
    case FAULT_WAY_SHORT:
    case FAULT_WAY_TORN:
        if (op->op == UCM_IO_WRITEV)
            write_copy(op, part, UINT64_MAX);
        else if (op->op == UCM_IO_READV)
            read_part(op, part, how->way == FAULT_WAY_TORN ? 0 : -1);
        op->res = how->way == FAULT_WAY_HALF || op->op == UCM_IO_SYNC ? how->err
                  : how->way == FAULT_WAY_SHORT                       ? (ssize_t)part
                                                                      : (ssize_t)all;
        return true;
    default: return false;
    }
}

/* ---- the engine ---- */

static void hangs(int more)
{
    pthread_mutex_lock(&fault.lock);
    fault.hanging += (unsigned)more;
    pthread_cond_broadcast(&fault.changed);
    pthread_mutex_unlock(&fault.lock);
}

static uint64_t this_round(void)
{
    pthread_mutex_lock(&fault.lock);
    uint64_t round = fault.round;
    pthread_mutex_unlock(&fault.lock);
    return round;
}

static int pass_on(struct engine *e, struct ucm_io *op)
{
    tell(false, op, NULL, 0);
    int took = e->real.ops->submit(e->real.state, &op, 1);
    if (took > 0)
        e->inside++;
    else
        tell(true, op, NULL, -ECANCELED); /* it comes again */
    return took;
}

static int engine_submit(void *state, struct ucm_io **v, unsigned n)
{
    struct engine *e = state;
    for (unsigned i = 0; i < n; i++) {
        struct fault_plan how;
        uint64_t seed = 0;
        if (e->ntags == MAX_HELD)
            return (int)i;
        bool hit = strike(kind_of_io[v[i]->op], e->number, &how, &seed);
        bool ended = hit && end_here(v[i], &how, seed);
        struct tag tag = {.op = v[i], .seed = seed};
        if (hit) {
            tag.way = how.way;
            tag.err = how.err;
            tag.back = ended;
            if (how.way == FAULT_WAY_DELAY)
                tag.due_ns = ucmi_now_ns() + seed % (how.delay_us + 1u) * 1000;
        }
        if (hit && how.way == FAULT_WAY_HANG) {
            tag.round = this_round();
            hangs(1);
        } else if (!ended) {
            int took = pass_on(e, v[i]);
            if (took <= 0)
                return i ? (int)i : took;
        }
        if (hit)
            e->tags[e->ntags++] = tag;
    }
    return (int)n;
}

static void flip_in_memory(const struct ucm_io *op, uint64_t seed)
{
    size_t at = seed / 8 % (size_t)op->res;
    for (unsigned i = 0; i < op->niov; at -= op->iov[i++].iov_len)
        if (at < op->iov[i].iov_len) {
            ((uint8_t *)op->iov[i].iov_base)[at] ^= (uint8_t)(1u << seed % 8);
            return;
        }
}

/* One that the real engine has done: told now, or later. */
static bool came_back(struct engine *e, struct ucm_io *op)
{
    e->inside--;
    tell(true, op, NULL, op->res);
    for (unsigned i = 0; i < e->ntags; i++) {
        struct tag *t = &e->tags[i];
        if (t->op != op)
            continue;
        if (t->way == FAULT_WAY_FLIP && op->res > 0)
            flip_in_memory(op, t->seed);
        if (t->way == FAULT_WAY_LATE)
            op->res = t->err;
        t->back = true;
        if (t->way == FAULT_WAY_DELAY || t->way == FAULT_WAY_REORDER)
            return false;
        *t = e->tags[--e->ntags];
        return true;
    }
    return true;
}

/* What is here and may be told.  Reordered ones wait as long as another may come before them. */
static unsigned collect(struct engine *e, struct ucm_io **v, unsigned max, bool others)
{
    uint64_t now = ucmi_now_ns(), round = this_round();
    unsigned n = 0;
    for (unsigned i = e->ntags; i-- > 0 && n < max;) { /* the last first: another order */
        struct tag *t = &e->tags[i];
        bool hung = t->way == FAULT_WAY_HANG;
        if (hung && t->round != round) {
            hangs(-1);
            tell(false, t->op, NULL, 0);
            t->op->res = perform(t->op);
            tell(true, t->op, NULL, t->op->res);
        } else if (hung || !t->back || t->due_ns > now ||
                   (t->way == FAULT_WAY_REORDER && !others && !n && e->inside)) {
            continue;
        }
        v[n++] = t->op;
        *t = e->tags[--e->ntags];
    }
    return n;
}

static int until_due(const struct engine *e, int timeout_ms)
{
    uint64_t now = ucmi_now_ns();
    for (unsigned i = 0; i < e->ntags; i++) {
        const struct tag *t = &e->tags[i];
        if (!t->back || !t->due_ns)
            continue;
        int ms = t->due_ns <= now ? 0 : (int)((t->due_ns - now) / 1000000 + 1);
        timeout_ms = timeout_ms < 0 ? ms : MIN(timeout_ms, ms);
    }
    return timeout_ms;
}

static int engine_reap(void *state, struct ucm_io **v, unsigned max, int timeout_ms)
{
    struct engine *e = state;
    unsigned n = collect(e, v, max, false);
    if (n)
        return (int)n;
    int got = e->real.ops->reap(e->real.state, v, max, until_due(e, timeout_ms));
    if (got < 0)
        return got;
    for (int i = 0; i < got; i++)
        if (came_back(e, v[i]))
            v[n++] = v[i];
    return (int)(n + collect(e, v + n, max - n, n > 0));
}

static void engine_wake(void *state)
{
    struct engine *e = state;
    e->real.ops->wake(e->real.state);
}

static void engine_close(void *state)
{
    struct engine *e = state;
    pthread_mutex_lock(&fault.lock);
    for (struct engine **at = &fault.engines; *at; at = &(*at)->next)
        if (*at == e) {
            *at = e->next;
            break;
        }
    pthread_mutex_unlock(&fault.lock);
    ucmi_io_close(&e->real);
    pthread_mutex_lock(&fault.lock);
    fault.closed++;
    pthread_cond_broadcast(&fault.changed);
    pthread_mutex_unlock(&fault.lock);
}

/* ---- names and sizes ---- */

static const enum fault_kind kind_of_file[] = {
    [UCM_FILE_OPEN] = FAULT_AT_OPEN,         [UCM_FILE_CLOSE] = FAULT_AT_CLOSE,
    [UCM_FILE_ALLOCATE] = FAULT_AT_ALLOCATE, [UCM_FILE_TRUNCATE] = FAULT_AT_TRUNCATE,
    [UCM_FILE_SYNC] = FAULT_AT_FSYNC,        [UCM_FILE_RENAME] = FAULT_AT_RENAME,
    [UCM_FILE_UNLINK] = FAULT_AT_UNLINK,     [UCM_FILE_MKDIR] = FAULT_AT_MKDIR,
};

static int do_file(struct engine *e, const struct ucm_file *f)
{
    tell(false, NULL, f, 0);
    int res = ucmi_io_file(&e->real, f);
    tell(true, NULL, f, res);
    return res;
}

/* Those who wait for this lock are callers of the store, so none of them may hold it up. */
static void hang_here(void)
{
    pthread_mutex_lock(&fault.lock);
    uint64_t round = fault.round;
    fault.hanging++;
    pthread_cond_broadcast(&fault.changed);
    while (fault.round == round)
        pthread_cond_wait(&fault.released, &fault.lock);
    fault.hanging--;
    pthread_mutex_unlock(&fault.lock);
}

static int engine_file(void *state, const struct ucm_file *f)
{
    struct engine *e = state;
    struct fault_plan how;
    uint64_t seed;
    if (!strike(kind_of_file[f->op], e->number, &how, &seed))
        return do_file(e, f);
    if (how.way == FAULT_WAY_DELAY)
        usleep(seed % (how.delay_us + 1u));
    if (how.way == FAULT_WAY_HANG)
        hang_here();
    if (how.way == FAULT_WAY_DELAY || how.way == FAULT_WAY_HANG || how.way == FAULT_WAY_REORDER)
        return do_file(e, f);
    if (how.way == FAULT_WAY_HALF && f->op == UCM_FILE_ALLOCATE) {
        struct ucm_file part = *f;
        part.len /= 2;
        do_file(e, &part);
    }
    if (how.way == FAULT_WAY_LATE ||
        f->op == UCM_FILE_CLOSE) { /* a descriptor is gone in any case */
        int fd = do_file(e, f);
        if (f->op == UCM_FILE_OPEN && fd >= 0)
            close(fd);
    }
    return how.err;
}

/* How the store reads journals. */
ssize_t __wrap_pread64(int fd, void *p, size_t len, off_t off)
{
    struct fault_plan how;
    uint64_t seed;
    if (!strike(FAULT_AT_PREAD, 0, &how, &seed))
        return __real_pread64(fd, p, len, off);
    if (how.way == FAULT_WAY_DELAY)
        usleep(seed % (how.delay_us + 1u));
    if (how.way == FAULT_WAY_HANG)
        hang_here();
    ssize_t n = __real_pread64(fd, p, len, off);
    switch (how.way) {
    case FAULT_WAY_FAIL:
    case FAULT_WAY_HALF:
    case FAULT_WAY_LATE: errno = -how.err; return -1;
    case FAULT_WAY_SHORT: return n > 0 ? (ssize_t)(seed % (uint64_t)n) : n;
    case FAULT_WAY_LOST: memset(p, 0, n > 0 ? (size_t)n : 0); return n;
    case FAULT_WAY_TORN:
        if (n > 0)
            memset((char *)p + seed % (uint64_t)n, 0, (size_t)n - seed % (uint64_t)n);
        return n;
    case FAULT_WAY_FLIP:
        if (n > 0)
            ((uint8_t *)p)[seed / 8 % (uint64_t)n] ^= (uint8_t)(1u << seed % 8);
        return n;
    default: return n;
    }
}

static const struct ucm_io_ops engine_ops = {
    .p = {.kind = "io", .name = "fault", .size = sizeof(struct engine)},
    .close = engine_close,
    .submit = engine_submit,
    .reap = engine_reap,
    .wake = engine_wake,
    .file = engine_file,
};

int __real_ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                        char *why, size_t why_len);
int __wrap_ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                        char *why, size_t why_len);

int __wrap_ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                        char *why, size_t why_len)
{
    struct engine *e = calloc(1, sizeof *e);
    if (!e)
        return ucmi_fail(why, why_len, -ENOMEM, "%s", ucm_strerror(-ENOMEM));
    int err = __real_ucmi_io_open(&e->real, name, depth, conf, why, why_len);
    if (err < 0) {
        free(e);
        return err;
    }
    pthread_mutex_lock(&fault.lock);
    e->number = ++fault.opened;
    e->next = fault.engines;
    fault.engines = e;
    pthread_mutex_unlock(&fault.lock);
    *io = (struct ucmi_io){.ops = &engine_ops, .state = e};
    return 0;
}

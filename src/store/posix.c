/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One backend of the Posix tier: blocks in a directory, in lanes of segments
 * (docs/architecture.md).
 *
 * This file is what callers run: opening, closing, lookups, submitting.  The directory itself is
 * only touched by the pump, so storage that hangs holds nobody for longer than a deadline, not even
 * who opens it.  A lookup is a probe of the index in RAM under a read lock.  Only for keys it did
 * not find does it ask what others have published since: the pump reads the ends of their journals
 * while the caller waits, lookup_timeout_ms at most.  Where nobody has written lately, a miss costs
 * an fstat of each journal and of the namespace's directory, and no more.
 */
#include "store/posix.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

enum {
    PROBE_STEP = 1024,
    FIRST_PIECES = 64,
    BLOCKS_UNBOUND = 1 << 17 /* where only the disk bounds them: as many are remembered as if so */
};

/* ---- opening ---- */

static int check_directory(struct ucmi_posix *p)
{
    const char *path = p->path;
    struct stat st;
    if (stat(path, &st) < 0)
        return ucmi_fail(p->why, sizeof p->why, -errno,
                         "storage_backends: %s: %s; make the directory, or give another", path,
                         ucmi_file_error(errno));
    if (!S_ISDIR(st.st_mode))
        return ucmi_fail(p->why, sizeof p->why, -ENOTDIR,
                         "storage_backends: %s is not a directory; give one", path);
    return 0;
}

static int fail_open(struct ucmi_posix *p, int err, const char *what)
{
    return ucmi_fail(p->why, sizeof p->why, err,
                     "storage_backends: %s: cannot %s: %s; give a directory this process may write",
                     p->path, what, ucmi_file_error(err));
}

/* Which file system it is decides how journals are written. */
static void look_at_disk(struct ucmi_posix *p)
{
    enum { NFS_MAGIC = 0x6969 };
    struct statfs fs;
    struct rlimit files;

    bool known = statfs(p->path, &fs) == 0;
    p->network = known && fs.f_type == NFS_MAGIC;
    atomic_store(&p->weight, known ? (uint64_t)fs.f_blocks * (uint64_t)fs.f_frsize : 0);
    /* Others must find what we have written, and we what they have: NFS takes O_DIRECT of any
     * alignment. */
    p->dio_known = p->network;
    p->dio_mem = p->network ? 1 : UCMI_PAGE;
    p->dio_off = p->network ? 1 : p->o->io_direct ? UCMI_PAGE : 0;
    p->max_open_segs = 256;
    p->max_lanes = 128;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0)
        return;
    p->max_open_segs = (unsigned)MIN(MAX(files.rlim_cur / 4, (rlim_t)64), (rlim_t)16384);
    p->max_lanes = (unsigned)MIN(MAX(files.rlim_cur / 8, (rlim_t)64), (rlim_t)UCMI_MAX_LANES);
}

/* The capacity is shared out evenly. */
static int set_sizes(struct ucmi_posix *p, unsigned among)
{
    struct ucm_tier *t = p->t;
    uint64_t seg = (uint64_t)p->o->segment_mb << 20;

    p->slot_size = ucmi_slot_size(p->geo->block_size);
    p->capacity = (uint64_t)(p->o->capacity_gb * (double)(1u << 30)) / among;
    if (p->o->capacity_gb > 0) {
        uint64_t least = ucmi_bound_least(p);
        if (p->capacity < least)
            return ucmi_fail(t->why, sizeof t->why, -EINVAL,
                             "posix_capacity_gb: %g cannot hold one block of %" PRIu64
                             " bytes; give at least %.6f",
                             p->o->capacity_gb, p->geo->block_size,
                             (double)least * among / (double)(1u << 30) + 1e-6); /* rounded up */
        seg = MIN(seg, p->capacity / 8);
    }
    p->seg_slots = (uint32_t)MAX(seg / p->slot_size, 1u);
    return 0;
}

static void read_boot_id(char *text, size_t size)
{
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, size - 1);
    if (fd >= 0)
        close(fd);
    text[MAX(n, 0)] = '\0';
    text[strcspn(text, "\n")] = '\0';
}

static int init_moves(struct ucmi_posix *p)
{
    STAILQ_INIT(&p->loads);
    STAILQ_INIT(&p->dumps);
    STAILQ_INIT(&p->again);
    STAILQ_INIT(&p->to_send);
    STAILQ_INIT(&p->stash);
    STAILQ_INIT(&p->idle);
    TAILQ_INIT(&p->blocks);
    p->read_buf = aligned_alloc(UCMI_PAGE, UCMI_READ_BUF);
    p->moves = calloc((size_t)p->o->io_depth, sizeof *p->moves);
    if (!p->read_buf || !p->moves)
        return -ENOMEM;
    for (int64_t i = 0; i < p->o->io_depth; i++) {
        struct ucmi_move *m = &p->moves[i];
        m->page = aligned_alloc(UCMI_PAGE, sizeof *m->page);
        m->iov = malloc((1 + FIRST_PIECES) * sizeof *m->iov);
        m->cap = 1 + FIRST_PIECES;
        if (!m->page || !m->iov)
            return -ENOMEM;
        STAILQ_INSERT_TAIL(&p->idle, m, next);
    }
    return 0;
}

static int init_shared(struct ucmi_posix *p)
{
    pthread_rwlockattr_t attr;
    int err = ucmi_queue_init(&p->queue, (size_t)p->o->queue_depth);
    if (!err)
        err = ucmi_policy_open(&p->policy, &p->span,
                               p->capacity ? p->capacity / p->slot_size : BLOCKS_UNBOUND);
    if (!err)
        err = ucmi_index_init(&p->index);
    if (err < 0)
        return err;
    pthread_rwlockattr_init(&attr);
    /* The pump must get its turn however many look up. */
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&p->lock, &attr);
    pthread_rwlockattr_destroy(&attr);
    pthread_mutex_init(&p->news_lock, NULL);
    ucmi_cond_init(&p->news_read);
    return 0;
}

static void tear_down(struct ucmi_posix *p)
{
    /* Not the pump's: a busy kernel may take a second for it, and that is no storage that hangs. */
    ucmi_ear_close(p);
    if (p->io.ops) {
        ucmi_lanes_close(p);
        ucmi_file_close(p, p->ns_fd);
        ucmi_file_close(p, p->root_fd);
        ucmi_io_close(&p->io);
    }
    ucmi_seal_close(&p->seal);
    for (int64_t i = 0; p->moves && i < p->o->io_depth; i++) {
        free(p->moves[i].page);
        free(p->moves[i].iov);
    }
    free(p->moves);
    free(p->read_buf);
    free(p->asked);
    free(p->scratch);
    if (p->index.v) {
        pthread_cond_destroy(&p->news_read);
        pthread_mutex_destroy(&p->news_lock);
        pthread_rwlock_destroy(&p->lock);
    }
    ucmi_index_destroy(&p->index);
    ucmi_policy_close(&p->policy);
    if (p->queue.ring)
        ucmi_queue_destroy(&p->queue);
}

static int open_engine(struct ucmi_posix *p)
{
    static const char *const names[] = {"auto", "psync", "aio", "io_uring"};
    /* A load of some shards is two reads; the journals of our lanes go on besides. */
    unsigned depth = 2 * (unsigned)p->o->io_depth + 4;
    return ucmi_io_open(&p->io, names[p->o->engine], depth, p->geo->conf, p->t->why,
                        sizeof p->t->why);
}

/* The directories.  On a read-only file system what is there can be loaded; on a full one it can,
 * and there may be room later. */
static int open_dirs(struct ucmi_posix *p)
{
    int err = ucmi_ns_open(p, true);
    if (err == -ENOSPC || err == -EDQUOT)
        return 0;
    if (!err && faccessat(p->ns_fd, ".", W_OK, AT_EACCESS) < 0)
        err = -errno;
    if (err == -EROFS || (err == -EACCES && p->root_fd >= 0)) {
        p->read_only = true;
        ucmi_log(UCM_WARN, p->object, "is read-only: blocks can be loaded, dumps are dropped");
        if (p->ns_fd < 0)
            ucmi_ns_open(p, false); /* what is not there holds nothing */
        return 0;
    }
    if (err == -ENOTDIR)
        return ucmi_fail(p->why, sizeof p->why, err,
                         "storage_backends: %s: ucm in it, or a folder in that, is no directory; "
                         "remove it (links below a backend are not followed)",
                         p->path);
    return err < 0 ? fail_open(p, err, "make its folder ucm in it") : 0;
}

int ucmi_posix_begin(struct ucmi_posix *p)
{
    int err = check_directory(p);
    if (!err)
        err = open_dirs(p);
    if (err)
        return err;
    look_at_disk(p);
    ucmi_lanes_refresh(p);
    atomic_store(&p->begun, true);
    return 0;
}

/* Until the pump has begun, or failed to, or storage has had its time. */
static int await_begin(struct ucmi_posix *p)
{
    struct ucm_tier *t = p->t;
    uint64_t until = ucmi_now_ns() + (uint64_t)p->o->stall_ms * UINT64_C(1000000);
    pthread_mutex_lock(&p->news_lock);
    while (!p->tried && !ucmi_cond_wait(&p->news_read, &p->news_lock, until))
        ;
    int err = p->tried ? p->begin_err : -ETIMEDOUT;
    if (p->tried && err)
        memcpy(t->why, p->why, sizeof t->why);
    pthread_mutex_unlock(&p->news_lock);
    if (err == -ETIMEDOUT)
        ucmi_fail(t->why, sizeof t->why, err,
                  "storage_backends: %s: has not answered within %" PRId64 " ms (posix_stall_ms)",
                  p->path, p->o->stall_ms);
    return err;
}

static int make(struct ucm_tier *t, const struct ucmi_posix_options *o, const char *path,
                unsigned among, struct ucmi_posix **p_p)
{
    struct ucmi_posix *p = calloc(1, sizeof *p);
    if (!p)
        return -ENOMEM;
    p->o = o;
    p->t = t;
    p->geo = t->geo;
    p->path = path;
    p->alone = among == 1;
    p->seed = ucmi_hash64(path, strlen(path), 0);
    p->ns_fd = p->root_fd = -1;
    p->let_go_ns = UINT64_MAX;
    p->ear = p->ear_ns = -1;
    snprintf(p->object, sizeof p->object, "Posix %s", path);
    ucmi_hex(t->geo->ns, sizeof t->geo->ns, p->ns_name);
    gethostname(p->host, sizeof p->host - 1);
    read_boot_id(p->boot, sizeof p->boot);
    ucmi_store_hold(p->geo);
    int err = set_sizes(p, among);
    if (!err)
        err = ucmi_seal_open(&p->seal, ucmi_store_key(p->geo));
    if (!err)
        err = init_shared(p);
    if (!err)
        err = init_moves(p);
    if (!err)
        err = open_engine(p);
    if (err)
        ucmi_posix_free(p);
    else
        *p_p = p;
    return err;
}

int ucmi_posix_visit(struct ucm_tier *t, const struct ucmi_posix_options *o, const char *path,
                     struct ucmi_posix **p_p)
{
    struct ucmi_posix *p;
    int err = make(t, o, path, 1, &p);
    if (err)
        return err;
    err = ucmi_ns_open(p, false);
    if (err < 0) {
        ucmi_posix_free(p);
        return err;
    }
    look_at_disk(p);
    *p_p = p;
    return 0;
}

/* Storage that is away, as a mount says whose server does not answer, and not a wrong option. */
static bool is_away(int err)
{
    static const int away[] = {ETIMEDOUT, EIO,          ESTALE,   ENOTCONN,
                               EHOSTDOWN, EHOSTUNREACH, ENETDOWN, ENETUNREACH};
    for (size_t i = 0; i < ARRAY_LEN(away); i++)
        if (err == -away[i])
            return true;
    return false;
}

int ucmi_posix_open(struct ucm_tier *t, const struct ucmi_posix_options *o, const char *path,
                    unsigned among, struct ucmi_posix **p_p)
{
    struct ucmi_posix *p;
    int err = make(t, o, path, among, &p);
    if (err)
        return err;
    err = ucmi_pump_start(p);
    if (err) {
        ucmi_posix_free(p);
        return err;
    }
    err = await_begin(p);
    p->away = is_away(err);
    if (err && p->alone && !p->away) {
        ucmi_pump_stop(p);
        p->stop_ns = ucmi_now_ns(); /* it has had its time */
        ucmi_posix_close_end(p);
        return err;
    }
    if (err)
        ucmi_log(UCM_ERROR, p->object, "cannot be used now, and is tried again: %s", t->why);
    *p_p = p;
    return 0;
}

void ucmi_posix_free(struct ucmi_posix *p)
{
    const struct ucm_geometry *geo = p->geo;
    tear_down(p);
    free(p);
    ucmi_store_release(geo);
}

void ucmi_posix_close_end(struct ucmi_posix *p)
{
    char object[sizeof p->object];
    memcpy(object, p->object, sizeof object);
    if (ucmi_pump_join(p))
        ucmi_posix_free(p);
    else
        ucmi_log(UCM_WARN, object,
                 "does not answer: closed without it; the memory of what is under way is kept");
}

/* ---- storage that fails, or hangs ---- */

void ucmi_posix_gauge(struct ucmi_posix *p, enum ucmi_counter which, int64_t value)
{
    int64_t before = atomic_exchange(&p->gauges[which == UCMI_DISK_BYTES], value);
    ucmi_count(p->t->counters, which, value - before);
}

/* Where there are others a backend is given a rest after some failures, each twice as long as the
 * last. */
void ucmi_posix_judge(struct ucmi_posix *p, int err)
{
    enum { PATIENCE = 3, LONGEST = 6 };
    if (err == -ECANCELED || err == -ETIMEDOUT)
        return;
    p->failures = err ? p->failures + 1 : 0;
    if (p->failures < PATIENCE || p->alone)
        return;
    unsigned times = MIN(p->failures - PATIENCE, (unsigned)LONGEST);
    atomic_store(&p->rest_until_ns, ucmi_now_ns() + (UINT64_C(1000000000) << times));
    static struct ucmi_log_gate gate;
    ucmi_log_gated(&gate, 60, UCM_WARN, p->object, "dumps go elsewhere for %u s: %s", 1u << times,
                   ucm_strerror(err));
}

static bool stalled(struct ucmi_posix *p)
{
    uint64_t since = atomic_load_explicit(&p->busy_ns, memory_order_relaxed);
    bool is = since && ucmi_now_ns() > since + (uint64_t)p->o->stall_ms * UINT64_C(1000000);
    if (is == atomic_load_explicit(&p->stalled, memory_order_relaxed) ||
        atomic_exchange(&p->stalled, is) == is)
        return is;
    ucmi_count(p->t->counters, UCMI_DISK_STALLED, is ? 1 : -1);
    if (is)
        ucmi_log(UCM_WARN, p->object,
                 "has answered nothing for %" PRId64
                 " ms (posix_stall_ms): passed by until it does",
                 p->o->stall_ms);
    else
        ucmi_log(UCM_WARN, p->object, "answers again");
    return is;
}

bool ucmi_posix_usable(struct ucmi_posix *p)
{
    return atomic_load_explicit(&p->begun, memory_order_acquire) && !stalled(p);
}

/* ---- looking up ---- */

size_t ucmi_posix_probe(struct ucmi_posix *p, const ucm_key *keys, size_t n, uint32_t rank,
                        uint8_t level, uint8_t *found, enum ucm_use use)
{
    struct timespec now;
    size_t missed = 0;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    uint32_t t = (uint32_t)now.tv_sec;
    const uint32_t seen[] = {
        [UCM_WILL_LOAD] = t,
        [UCM_HAS_LOADED] = t - UCMI_LEASE_S, /* the lease is over */
        [UCM_LOOKS_ONLY] = 0,
    };
    for (size_t i = 0; i < n; i += PROBE_STEP) {
        if (use != UCM_HAS_LOADED)
            pthread_rwlock_rdlock(&p->lock);
        else if (pthread_rwlock_tryrdlock(&p->lock))
            return missed + n - i; /* a hint, and not worth waiting for the pump */
        missed += ucmi_index_probe(&p->index, keys + i, MIN(n - i, (size_t)PROBE_STEP),
                                   (uint16_t)rank, seen[use], level, found + i);
        pthread_rwlock_unlock(&p->lock);
    }
    return missed;
}

static bool maybe_news(struct ucmi_posix *p)
{
    pthread_rwlock_rdlock(&p->lock);
    bool news = ucmi_news_possible(p);
    pthread_rwlock_unlock(&p->lock);
    return news;
}

/* Callers that come while the pump reads wait for its next reading; one reading serves them all.
 * Where one has waited in vain, nobody waits until the pump has read again. */
bool ucmi_posix_ask(struct ucmi_posix *p, uint64_t *ticket)
{
    if (!maybe_news(p))
        return false;
    pthread_mutex_lock(&p->news_lock);
    *ticket = ++p->news_asked;
    bool late = p->news_late;
    pthread_mutex_unlock(&p->news_lock);
    ucmi_pump_wake(p);
    return !late;
}

void ucmi_posix_await(struct ucmi_posix *p, uint64_t ticket, uint64_t until_ns)
{
    bool late = false;
    pthread_mutex_lock(&p->news_lock);
    while (p->news_done < ticket && !late)
        late = ucmi_cond_wait(&p->news_read, &p->news_lock, until_ns) != 0;
    p->news_late |= p->news_done < ticket;
    pthread_mutex_unlock(&p->news_lock);
}

ssize_t ucmi_posix_removed(struct ucmi_posix *p, ucm_key *keys, size_t n, uint64_t *lost)
{
    uint64_t ticket;
    if (ucmi_posix_usable(p))
        ucmi_posix_ask(p, &ticket); /* the answer is for the next call */
    pthread_rwlock_wrlock(&p->lock);
    ssize_t told = ucmi_index_gone(&p->index, keys, n, lost);
    pthread_rwlock_unlock(&p->lock);
    return told;
}

/* ---- submitting ---- */

void ucmi_posix_claim(struct ucmi_posix *p, const struct ucm_xfer *x, uint8_t none, uint8_t mine,
                      uint8_t *which)
{
    pthread_rwlock_rdlock(&p->lock);
    for (uint32_t i = 0; i < x->n; i++)
        if (which[i] == none && ucmi_index_find(&p->index, &x->v[i].key, (uint16_t)p->geo->rank, 0))
            which[i] = mine;
    pthread_rwlock_unlock(&p->lock);
}

/* The pump empties the queue into lists of its own: the bound is on both together. */
int ucmi_job_new(struct ucmi_posix *p, struct ucm_xfer *x, uint32_t n, struct ucmi_job **job_p)
{
    if (atomic_load_explicit(&p->closing, memory_order_relaxed))
        return -ESHUTDOWN;
    if (!ucmi_posix_usable(p))
        return -EIO;
    struct ucmi_job *job = NULL;
    int err = atomic_fetch_add(&p->waiting, 1) < p->o->queue_depth ? 0 : -EAGAIN;
    if (!err && !(job = malloc(sizeof *job + n * sizeof job->parts[0])))
        err = -ENOMEM;
    if (err < 0) {
        atomic_fetch_sub(&p->waiting, 1);
        return err;
    }
    *job = (struct ucmi_job){
        .p = p,
        .x = x,
        .id = x->id,
        .deadline_ns = x->deadline_ns,
        .start_ns = ucmi_now_ns(),
        .dump = x->dump,
    };
    *job_p = job;
    return 0;
}

void ucmi_job_cancel(struct ucmi_job *job)
{
    atomic_fetch_sub(&job->p->waiting, 1);
    free(job);
}

void ucmi_job_add(struct ucmi_job *job, struct ucm_slice *s)
{
    job->parts[job->n++] = (struct ucmi_part){.job = job, .s = s};
    job->left += job->dump ? 2 : 1;
    job->bytes += s->nshards * job->p->geo->shard_size;
}

void ucmi_job_submit(struct ucmi_job *job)
{
    struct ucmi_posix *p = job->p;
    ucmi_queue_push(&p->queue, job); /* has room for all that may wait */
    ucmi_pump_wake(p);
}

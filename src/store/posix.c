/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Posix tier: blocks in a directory, in lanes of segments (docs/architecture.md).
 *
 * This file is what callers run: opening, closing, lookups, submitting.  A lookup is a probe of the
 * index in RAM under a read lock.  Only for keys it did not find does it ask what others have
 * published since: the pump reads the ends of their journals while the caller waits,
 * lookup_timeout_ms at most.  Where nobody has written lately, a miss costs an fstat of each
 * journal and of the namespace's directory, and no more.
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

enum { PROBE_STEP = 1024, FIRST_PIECES = 64 };

#define AT(field) offsetof(struct ucmi_posix, field)
static const struct ucm_option options[] = {
    {"storage_backends", UCM_T_STR, AT(backends), "", NULL, NULL,
     "the directory blocks are kept in (local disk, NFS, ...); it must exist"},
    {"io_direct", UCM_T_BOOL, AT(io_direct), "false", NULL, NULL,
     "bypass the page cache where memory and file system allow"},
    {"posix_io_engine", UCM_T_CHOICE, AT(engine), "auto", "auto|psync|aio|io_uring", NULL,
     "how files are read and written; auto: io_uring where it works, else psync"},
    {"posix_capacity_gb", UCM_T_FLOAT, AT(capacity_gb), "0", "0", "1e9",
     "the most the directory may hold, in GiB, over all processes and namespaces; 0: no bound"},
    {"posix_segment_mb", UCM_T_INT, AT(segment_mb), "256", "1", "65536",
     "size of a segment file in MiB; at most an eighth of the capacity is used"},
    {"posix_sync", UCM_T_CHOICE, AT(sync), "none", "none|data|full", NULL,
     "what is synced before a block counts as stored: nothing (a crash of the node may cost "
     "blocks, "
     "never make them wrong), the data, or data and journal"},
    {"waiting_queue_depth", UCM_T_INT, AT(queue_depth), "8192", "1", "1048576",
     "how many loads and dumps may wait; more are refused"},
    {"posix_io_depth", UCM_T_INT, AT(io_depth), "32", "1", "128",
     "how many blocks are read or written at a time"},
    {"posix_stall_ms", UCM_T_INT, AT(stall_ms), "5000", "1", "3600000",
     "storage that has answered nothing for so long, with work to do, is passed by (lookups miss, "
     "loads and dumps fail at once) until it answers"},
    {NULL},
};
#undef AT

/* ---- opening ---- */

static int check_backend(struct ucm_tier *t, const char *path)
{
    struct stat st;
    if (!*path)
        return ucmi_fail(t->why, sizeof t->why, -EINVAL,
                         "storage_backends: not set; give the directory to keep blocks in");
    if (strchr(path, ':'))
        return ucmi_fail(t->why, sizeof t->why, -EINVAL,
                         "storage_backends: several backends are not supported yet: give one "
                         "directory (\"%s\")",
                         path);
    if (stat(path, &st) < 0)
        return ucmi_fail(t->why, sizeof t->why, -errno,
                         "storage_backends: %s: %s; make the directory, or give another", path,
                         ucmi_file_error(errno));
    if (!S_ISDIR(st.st_mode))
        return ucmi_fail(t->why, sizeof t->why, -ENOTDIR,
                         "storage_backends: %s is not a directory; give one", path);
    return 0;
}

static int fail_open(struct ucm_tier *t, int err, const char *what)
{
    const struct ucmi_posix *p = t->priv;
    return ucmi_fail(t->why, sizeof t->why, err,
                     "storage_backends: %s: cannot %s: %s; give a directory this process may write",
                     p->backends, what, ucmi_file_error(err));
}

/* Which file system it is decides how journals are written. */
static void look_at_disk(struct ucmi_posix *p)
{
    enum { NFS_MAGIC = 0x6969 };
    struct statfs fs;
    struct rlimit files;

    p->network = fstatfs(p->root_fd, &fs) == 0 && fs.f_type == NFS_MAGIC;
    p->dio_mem = UCMI_PAGE;
    p->dio_off = p->io_direct ? UCMI_PAGE : 0;
    p->max_open_segs = 256;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0)
        p->max_open_segs = (unsigned)MIN(MAX(files.rlim_cur / 4, (rlim_t)64), (rlim_t)16384);
}

static int set_sizes(struct ucm_tier *t)
{
    struct ucmi_posix *p = t->priv;
    uint64_t seg = (uint64_t)p->segment_mb << 20;

    p->slot_size = ucmi_slot_size(p->geo->block_size);
    p->capacity = (uint64_t)(p->capacity_gb * (double)(1u << 30));
    if (p->capacity_gb > 0) {
        uint64_t least = ucmi_room_least(p);
        if (p->capacity < least)
            return ucmi_fail(t->why, sizeof t->why, -EINVAL,
                             "posix_capacity_gb: %g cannot hold one block of %" PRIu64
                             " bytes; give at least %.6f",
                             p->capacity_gb, p->geo->block_size,
                             (double)least / (double)(1u << 30) + 1e-6); /* rounded up */
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
    STAILQ_INIT(&p->to_send);
    STAILQ_INIT(&p->stash);
    STAILQ_INIT(&p->idle);
    TAILQ_INIT(&p->blocks);
    p->read_buf = aligned_alloc(UCMI_PAGE, UCMI_READ_BUF);
    p->moves = calloc((size_t)p->io_depth, sizeof *p->moves);
    if (!p->read_buf || !p->moves)
        return -ENOMEM;
    for (int64_t i = 0; i < p->io_depth; i++) {
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
    int err = ucmi_queue_init(&p->queue, (size_t)p->queue_depth);
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
    if (p->io.ops) {
        ucmi_lanes_close(p);
        ucmi_file_close(p, p->ns_fd);
        ucmi_file_close(p, p->root_fd);
        ucmi_io_close(&p->io);
    }
    for (int64_t i = 0; p->moves && i < p->io_depth; i++) {
        free(p->moves[i].page);
        free(p->moves[i].iov);
    }
    free(p->moves);
    free(p->read_buf);
    free(p->scratch);
    if (p->index.v) {
        pthread_cond_destroy(&p->news_read);
        pthread_mutex_destroy(&p->news_lock);
        pthread_rwlock_destroy(&p->lock);
    }
    ucmi_index_destroy(&p->index);
    if (p->queue.ring)
        ucmi_queue_destroy(&p->queue);
}

static int open_engine(struct ucm_tier *t)
{
    static const char *const names[] = {"auto", "psync", "aio", "io_uring"};
    struct ucmi_posix *p = t->priv;
    /* A load of some shards is two reads; the journals of our lanes go on besides. */
    unsigned depth = 2 * (unsigned)p->io_depth + 4;
    return ucmi_io_open(&p->io, names[p->engine], depth, p->geo->conf, t->why, sizeof t->why);
}

/* The directories.  On a read-only file system what is there can be loaded; on a full one it can,
 * and there may be room later. */
static int open_dirs(struct ucm_tier *t)
{
    struct ucmi_posix *p = t->priv;
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
    return err < 0 ? fail_open(t, err, "make its folder ucm in it") : 0;
}

static int posix_open(struct ucm_tier *t)
{
    struct ucmi_posix *p = t->priv;
    int err = check_backend(t, p->backends);

    p->t = t;
    p->geo = t->geo;
    p->ns_fd = p->root_fd = -1;
    snprintf(p->object, sizeof p->object, "Posix %s", p->backends);
    ucmi_hex(t->geo->ns, sizeof t->geo->ns, p->ns_name);
    gethostname(p->host, sizeof p->host - 1);
    read_boot_id(p->boot, sizeof p->boot);
    if (!err)
        err = set_sizes(t);
    if (!err)
        err = init_shared(p);
    if (!err)
        err = init_moves(p);
    if (!err)
        err = open_engine(t);
    if (!err)
        err = open_dirs(t);
    if (!err) {
        look_at_disk(p);
        ucmi_lanes_refresh(p);
        err = ucmi_pump_start(p);
    }
    if (err)
        tear_down(p);
    return err;
}

void ucmi_posix_free(struct ucmi_posix *p)
{
    const struct ucm_geometry *geo = p->geo;
    tear_down(p);
    ucmi_store_release(geo); /* *p is gone with the store */
}

static void posix_close(struct ucm_tier *t)
{
    struct ucmi_posix *p = t->priv;
    char object[sizeof p->object];

    memcpy(object, p->object, sizeof object);
    ucmi_store_hold(p->geo);
    if (ucmi_pump_stop(p))
        ucmi_posix_free(p);
    else
        ucmi_log(UCM_WARN, object,
                 "does not answer: closed without it; the memory of what is under way is kept");
}

/* ---- storage that hangs ---- */

static bool stalled(struct ucmi_posix *p)
{
    uint64_t since = atomic_load_explicit(&p->busy_ns, memory_order_relaxed);
    bool is = since && ucmi_now_ns() > since + (uint64_t)p->stall_ms * UINT64_C(1000000);
    if (is == atomic_load_explicit(&p->stalled, memory_order_relaxed) ||
        atomic_exchange(&p->stalled, is) == is)
        return is;
    ucmi_gauge(p->t->counters, UCMI_DISK_STALLED, is);
    if (is)
        ucmi_log(UCM_WARN, p->object,
                 "has answered nothing for %" PRId64
                 " ms (posix_stall_ms): passed by until it does",
                 p->stall_ms);
    else
        ucmi_log(UCM_WARN, p->object, "answers again");
    return is;
}

/* ---- looking up ---- */

static size_t probe(struct ucmi_posix *p, const ucm_key *keys, size_t n, uint32_t rank,
                    uint8_t level, uint8_t *found)
{
    struct timespec now;
    size_t missed = 0;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    for (size_t i = 0; i < n; i += PROBE_STEP) {
        pthread_rwlock_rdlock(&p->lock);
        missed += ucmi_index_probe(&p->index, keys + i, MIN(n - i, (size_t)PROBE_STEP),
                                   (uint16_t)rank, (uint32_t)now.tv_sec, level, found + i);
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
static void read_news(struct ucmi_posix *p, uint64_t until)
{
    pthread_mutex_lock(&p->news_lock);
    uint64_t mine = ++p->news_asked;
    bool late = p->news_late;
    pthread_mutex_unlock(&p->news_lock);
    ucmi_pump_wake(p);
    if (late)
        return;
    pthread_mutex_lock(&p->news_lock);
    while (p->news_done < mine && !late)
        late = ucmi_cond_wait(&p->news_read, &p->news_lock, until) != 0;
    p->news_late |= p->news_done < mine;
    pthread_mutex_unlock(&p->news_lock);
}

static void posix_lookup(struct ucm_tier *t, const ucm_key *keys, size_t n, uint32_t rank,
                         uint8_t level, uint8_t *found, struct ucm_lookup *call)
{
    struct ucmi_posix *p = t->priv;
    if (stalled(p) || !probe(p, keys, n, rank, level, found) || call->up_to_date)
        return;
    call->up_to_date = 1;
    if (!maybe_news(p))
        return;
    read_news(p, ucmi_now_ns() + p->geo->lookup_timeout_ms * UINT64_C(1000000));
    probe(p, keys, n, rank, level, found);
}

/* ---- submitting ---- */

static int posix_submit(struct ucm_tier *t, struct ucm_xfer *x)
{
    struct ucmi_posix *p = t->priv;
    if (atomic_load_explicit(&p->closing, memory_order_relaxed))
        return -ESHUTDOWN;
    if (!x->n)
        return 0;
    if (stalled(p))
        return -EIO;
    /* The pump empties the queue into lists of its own: the bound is on both together. */
    struct ucmi_job *job = NULL;
    int err = atomic_fetch_add(&p->waiting, 1) < p->queue_depth ? 0 : -EAGAIN;
    if (!err && !(job = malloc(sizeof *job + x->n * sizeof job->parts[0])))
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
        .n = x->n,
        .left = x->dump ? 2 * x->n : x->n,
        .dump = x->dump,
    };
    for (uint32_t i = 0; i < x->n; i++) {
        job->parts[i] = (struct ucmi_part){.job = job, .s = &x->v[i]};
        job->bytes += x->v[i].nshards * p->geo->shard_size;
    }
    ucmi_queue_push(&p->queue, job); /* has room for all that may wait */
    ucmi_pump_wake(p);
    return 0;
}

const struct ucm_tier_ops ucmi_tier_posix = {
    .p =
        {
            .kind = "tier",
            .name = "Posix",
            .help = "blocks in a directory: local disk, NFS or another shared file system",
            .options = options,
            .size = sizeof(struct ucmi_posix),
        },
    .needs_host = 1,
    .open = posix_open,
    .close = posix_close,
    .lookup = posix_lookup,
    .submit = posix_submit,
};

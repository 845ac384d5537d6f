/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Posix tier over its backends, most often one: which of them a block goes to, and which it is
 * in.
 *
 * A block goes to the backend that weighted rendezvous hashing of its key puts first among those
 * that can be used (source: Thaler and Ravishankar, "Using name-based mappings to increase hit
 * rates", 1998; the weighted form is Schindelhauer and Schomaker's, 2005), so that all processes
 * agree without a word, and a backend that goes or comes moves no other's blocks.  Weights are the
 * sizes of the file systems.  It may be in another, for backends fail and come back: so lookups and
 * loads ask the indices of all.
 *
 * An xfer is split into a job a backend.  The jobs share the xfer, and each calls done for its own
 * slices.  Everything here is run by callers, and has no lock of its own.
 */
#include "store/posix.h"

#include <math.h>
#include <stdlib.h>

#define AT(field) offsetof(struct ucmi_backends, o.field)
static const struct ucm_option options[] = {
    {"storage_backends", UCM_T_STR, AT(backends), "", NULL, NULL,
     "the directory blocks are kept in (local disk, NFS, ...), which must exist; several, joined "
     "by "
     "\":\", share the blocks"},
    {"io_direct", UCM_T_BOOL, AT(io_direct), "false", NULL, NULL,
     "bypass the page cache where memory and file system allow; on NFS always"},
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

/* ---- opening and closing ---- */

static void backends_close(struct ucm_tier *t)
{
    struct ucmi_backends *b = t->priv;
    for (unsigned i = 0; i < b->n; i++)
        ucmi_pump_stop(b->v[i]);
    for (unsigned i = 0; i < b->n; i++)
        ucmi_posix_close_end(b->v[i]);
}

/* Cuts b->o.backends, "a:b", in place; what follows the last is empty. */
static int cut_paths(struct ucm_tier *t, char *text, const char **paths, unsigned *n_p)
{
    unsigned n = 0;
    if (!*text)
        return ucmi_fail(t->why, sizeof t->why, -EINVAL,
                         "storage_backends: not set; give the directory to keep blocks in");
    for (char *path; (path = strsep(&text, ":"));) {
        if (!*path || n == UCMI_MAX_BACKENDS)
            return ucmi_fail(t->why, sizeof t->why, -EINVAL,
                             *path ? "storage_backends: more than %d directories; give fewer"
                                   : "storage_backends: an empty name among the directories that "
                                     "\":\" joins (at most %d); leave it out",
                             UCMI_MAX_BACKENDS);
        for (unsigned i = 0; i < n; i++)
            if (strcmp(paths[i], path) == 0)
                return ucmi_fail(t->why, sizeof t->why, -EINVAL,
                                 "storage_backends: %s is named twice; name it once", path);
        paths[n++] = path;
    }
    *n_p = n;
    return 0;
}

/* Storage that is away for now does not keep an engine from starting; a wrong option does. */
static bool any_hope(const struct ucmi_backends *b)
{
    for (unsigned i = 0; i < b->n; i++)
        if (ucmi_posix_usable(b->v[i]) || b->v[i]->away)
            return true;
    return false;
}

static int backends_open(struct ucm_tier *t)
{
    struct ucmi_backends *b = t->priv;
    const char *paths[UCMI_MAX_BACKENDS];
    unsigned n = 0;
    int err = cut_paths(t, (char *)b->o.backends, paths, &n);

    for (; !err && b->n < n; b->n += !err)
        err = ucmi_posix_open(t, &b->o, paths[b->n], n, &b->v[b->n]);
    if (!err && !any_hope(b))
        err = -EIO; /* t->why is that of the last */
    if (err)
        backends_close(t);
    return err;
}

/* ---- where a block goes ---- */

static double score(const struct ucmi_posix *p, const ucm_key *key)
{
    uint64_t h = ucmi_hash64(key->b, sizeof key->b, p->seed);
    double u = ((double)(h >> 11) + 0.5) / 9007199254740992.0; /* 2^53: within (0, 1) */
    uint64_t weight = atomic_load_explicit(&p->weight, memory_order_relaxed);
    return -(double)MAX(weight, 1u) / log(u);
}

static bool takes_dumps(struct ucmi_posix *p, uint64_t now)
{
    return !atomic_load_explicit(&p->read_only, memory_order_relaxed) &&
           atomic_load_explicit(&p->rest_until_ns, memory_order_relaxed) <= now;
}

/* The first by rank among those that will do; where none will, one that can at least say why. */
static uint8_t choose(const struct ucmi_backends *b, const bool *able, const ucm_key *key)
{
    double best = -1;
    unsigned which = 0;
    for (unsigned i = 0; i < b->n; i++) {
        double s = able[i] ? score(b->v[i], key) : 0;
        if (s > best) {
            best = s;
            which = i;
        }
    }
    return (uint8_t)which;
}

/* Of a dump too: where a block is already it is not written again. */
static void assign(struct ucmi_backends *b, const struct ucm_xfer *x, uint8_t *which)
{
    bool able[UCMI_MAX_BACKENDS];
    uint64_t now = ucmi_now_ns();
    memset(which, UINT8_MAX, x->n);
    for (unsigned i = 0; i < b->n; i++) {
        able[i] = ucmi_posix_usable(b->v[i]);
        if (able[i])
            ucmi_posix_claim(b->v[i], x, UINT8_MAX, (uint8_t)i, which);
        able[i] = able[i] && (!x->dump || takes_dumps(b->v[i], now));
    }
    for (uint32_t i = 0; i < x->n; i++)
        if (which[i] == UINT8_MAX)
            which[i] = choose(b, able, &x->v[i].key);
}

/* ---- calls ---- */

/* All or nothing: no job is submitted before there is room for each. */
static int split(struct ucmi_backends *b, struct ucm_xfer *x, const uint8_t *which)
{
    struct ucmi_job *jobs[UCMI_MAX_BACKENDS] = {NULL};
    uint32_t count[UCMI_MAX_BACKENDS] = {0};
    int err = 0;

    for (uint32_t i = 0; i < x->n; i++)
        count[which[i]]++;
    for (unsigned i = 0; i < b->n && !err; i++)
        if (count[i])
            err = ucmi_job_new(b->v[i], x, count[i], &jobs[i]);
    for (uint32_t i = 0; i < x->n && !err; i++)
        ucmi_job_add(jobs[which[i]], &x->v[i]);
    for (unsigned i = 0; i < b->n; i++) /* with the last of them x may be gone */
        if (jobs[i] && err)
            ucmi_job_cancel(jobs[i]);
        else if (jobs[i])
            ucmi_job_submit(jobs[i]);
    return err;
}

static int backends_submit(struct ucm_tier *t, struct ucm_xfer *x)
{
    struct ucmi_backends *b = t->priv;
    uint8_t few[256], *which = few;
    if (!x->n)
        return 0;
    if (x->n > sizeof few && !(which = malloc(x->n)))
        return -ENOMEM;
    if (b->n == 1)
        memset(which, 0, x->n);
    else
        assign(b, x, which);
    int err = split(b, x, which);
    if (which != few)
        free(which);
    return err;
}

static size_t probe_all(struct ucmi_backends *b, const bool *usable, const ucm_key *keys, size_t n,
                        uint32_t rank, uint8_t level, uint8_t *found, const struct ucm_lookup *call)
{
    size_t missing = n;
    for (unsigned i = 0; i < b->n && missing; i++)
        if (usable[i])
            missing = ucmi_posix_probe(b->v[i], keys, n, rank, level, found, call->use);
    return missing;
}

static void backends_lookup(struct ucm_tier *t, const ucm_key *keys, size_t n, uint32_t rank,
                            uint8_t level, uint8_t *found, struct ucm_lookup *call)
{
    struct ucmi_backends *b = t->priv;
    uint64_t ticket[UCMI_MAX_BACKENDS], until;
    bool usable[UCMI_MAX_BACKENDS], any = false;

    for (unsigned i = 0; i < b->n; i++)
        usable[i] = ucmi_posix_usable(b->v[i]);
    if (!probe_all(b, usable, keys, n, rank, level, found, call) || call->up_to_date)
        return;
    call->up_to_date = 1;
    for (unsigned i = 0; i < b->n; i++)
        any |= usable[i] = usable[i] && ucmi_posix_ask(b->v[i], &ticket[i]);
    if (!any)
        return;
    until = ucmi_now_ns() + t->geo->lookup_timeout_ms * UINT64_C(1000000);
    for (unsigned i = 0; i < b->n; i++)
        if (usable[i])
            ucmi_posix_await(b->v[i], ticket[i], until);
    probe_all(b, usable, keys, n, rank, level, found, call);
}

/* Of these keys those that cannot be found any more: what is gone from one backend may lie in
 * another, where it was stored while that one hung. */
static size_t not_found(struct ucm_tier *t, ucm_key *keys, size_t n)
{
    enum { STEP = 256 };
    struct ucmi_backends *b = t->priv;
    const struct ucm_lookup call = {.use = UCM_LOOKS_ONLY};
    bool all[UCMI_MAX_BACKENDS];
    size_t kept = 0;
    memset(all, true, sizeof all);
    for (size_t i = 0; i < n; i += STEP) {
        uint8_t whole[STEP], found[STEP];
        size_t step = MIN(n - i, (size_t)STEP);
        memset(whole, 1, step);
        for (uint32_t rank = 0; rank < t->geo->ranks; rank++) {
            memset(found, 0, step);
            probe_all(b, all, keys + i, step, rank, 1, found, &call);
            for (size_t k = 0; k < step; k++)
                whole[k] &= found[k];
        }
        for (size_t k = 0; k < step; k++)
            if (!whole[k])
                keys[kept++] = keys[i + k];
    }
    return kept;
}

static ssize_t backends_removed(struct ucm_tier *t, ucm_key *keys, size_t n, uint64_t *lost)
{
    struct ucmi_backends *b = t->priv;
    size_t told, kept;
    do { /* until there is one to tell, or nothing more */
        told = 0;
        for (unsigned i = 0; i < b->n; i++) {
            ssize_t more = ucmi_posix_removed(b->v[i], keys + told, n - told, lost);
            if (more < 0 && !told && !*lost)
                return more;
            told += (size_t)MAX(more, 0); /* one without memory begins later */
        }
        kept = b->n > 1 ? not_found(t, keys, told) : told;
    } while (told && !kept);
    return (ssize_t)kept;
}

const struct ucm_tier_ops ucmi_tier_posix = {
    .p =
        {
            .kind = "tier",
            .name = "Posix",
            .help = "blocks in a directory: local disk, NFS or another shared file system",
            .options = options,
            .size = sizeof(struct ucmi_backends),
        },
    .needs_host = 1,
    .open = backends_open,
    .close = backends_close,
    .lookup = backends_lookup,
    .submit = backends_submit,
    .removed = backends_removed,
};

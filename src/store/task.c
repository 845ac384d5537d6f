/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tasks: one load or dump, from the call of the API down to the first tier and back.
 *
 * A task is one allocation: itself, its xfer's slices, a copy of the block numbers and the
 * counters. Slices are group-major: slice g * n + i is group g of entry i.  done() comes from any
 * thread and counts down without a lock; the lock is taken only when a group or a stage is
 * complete, to wake who waits.  Two references keep the task: the caller's (ucm_task_free) and the
 * tiers' (the last done).
 */
#include "store/store.h"

#include <limits.h>
#include <stdlib.h>

struct entry {
    _Atomic int err;       /* the first error of its slices */
    _Atomic uint32_t left; /* slices that have not reached their last stage */
};
struct group {
    _Atomic int err;
    _Atomic uint32_t left; /* slices not RELEASED */
};
struct stage {
    _Atomic uint32_t left; /* slices that have not reached it */
    _Atomic int err;
    _Atomic bool reached; /* set with the lock held */
    uint64_t at_ns;       /* when; written before `reached` is set */
    ucm_done_fn *fn;
    void *arg;
};
struct ucm_task {
    struct ucm_xfer x;
    struct ucm_counters *counters;
    size_t shard_size;
    _Atomic int refs;
    size_t n;                           /* entries */
    unsigned shard, nshards, per_group; /* of a batch; per_group 0: explicit addresses */
    uint64_t begun_ns;
    struct stage stage[2];
    enum ucm_stage last; /* a load is over when RELEASED, a dump when STORED */
    struct entry *entries;
    struct group *groups;
    pthread_mutex_t lock;
    pthread_cond_t change;
};

static void unref(ucm_task *t)
{
    if (atomic_fetch_sub_explicit(&t->refs, 1, memory_order_acq_rel) == 1) {
        pthread_cond_destroy(&t->change);
        pthread_mutex_destroy(&t->lock);
        ucm_map_free((ucm_map *)t->x.map);
        free(t);
    }
}

static void keep_first(_Atomic int *slot, int err)
{
    int none = 0;
    if (err)
        atomic_compare_exchange_strong(slot, &none, err);
}

static void account(ucm_task *t, const struct ucm_slice *s, int err)
{
    int64_t bytes = (int64_t)s->nshards * (int64_t)t->shard_size;

    if (err)
        ucmi_count(t->counters, t->x.dump ? UCMI_DUMP_DROPPED : UCMI_LOAD_FAILED, 1);
    else
        ucmi_count(t->counters, t->x.dump ? UCMI_DUMP_BYTES : UCMI_LOAD_BYTES, bytes);
}

static void reach(ucm_task *t, struct stage *st)
{
    pthread_mutex_lock(&t->lock);
    st->at_ns = ucmi_now_ns();
    atomic_store(&st->reached, true);
    ucm_done_fn *fn = st->fn;
    void *arg = st->arg;
    pthread_cond_broadcast(&t->change);
    pthread_mutex_unlock(&t->lock);
    if (fn)
        fn(arg, atomic_load(&st->err));
}

static void slice_done(struct ucm_xfer *x, struct ucm_slice *s, enum ucm_stage stage, int err)
{
    ucm_task *t = CONTAINER_OF(x, ucm_task, x);
    size_t i = (size_t)(s - x->v);
    struct entry *e = &t->entries[i % t->n];
    struct group *g = &t->groups[i / t->n];
    struct stage *st = &t->stage[stage];
    bool last = stage == t->last;

    keep_first(&e->err, err);
    keep_first(&st->err, err);
    if (last) {
        account(t, s, err);
        atomic_fetch_sub(&e->left, 1);
    }
    if (stage == UCM_RELEASED) {
        keep_first(&g->err, err);
        if (atomic_fetch_sub(&g->left, 1) == 1 && t->per_group && t->per_group < t->nshards) {
            pthread_mutex_lock(&t->lock);
            pthread_cond_broadcast(&t->change);
            pthread_mutex_unlock(&t->lock);
        }
    }
    if (atomic_fetch_sub(&st->left, 1) == 1) {
        reach(t, st);
        if (last)
            unref(t);
    }
}

/* One allocation for all parts; the biggest alignment first. */
static ucm_task *task_new(ucm_store *s, bool dump, size_t n, size_t ngroups, size_t nblocks)
{
    size_t slices = n * ngroups;
    size_t size = sizeof(ucm_task) + slices * sizeof(struct ucm_slice) + n * sizeof(struct entry) +
                  ngroups * sizeof(struct group) + nblocks * sizeof(uint32_t);
    ucm_task *t = calloc(1, size);
    if (!t)
        return NULL;
    t->x.v = (struct ucm_slice *)(t + 1);
    t->entries = (struct entry *)(t->x.v + slices);
    t->groups = (struct group *)(t->entries + n);
    t->x.dump = dump;
    t->x.n = (uint32_t)slices;
    t->x.done = slice_done;
    t->counters = &s->counters;
    t->shard_size = s->geo.shard_size;
    t->n = n;
    t->last = dump ? UCM_STORED : UCM_RELEASED;
    t->begun_ns = ucmi_now_ns();
    atomic_init(&t->refs, 2);
    for (size_t i = 0; i < n; i++)
        atomic_init(&t->entries[i].left, (uint32_t)ngroups);
    for (size_t g = 0; g < ngroups; g++)
        atomic_init(&t->groups[g].left, (uint32_t)n);
    for (int i = 0; i < 2; i++)
        atomic_init(&t->stage[i].left, (uint32_t)slices);
    pthread_mutex_init(&t->lock, NULL);
    ucmi_cond_init(&t->change);
    return t;
}

static int submit(ucm_store *s, ucm_task *t, ucm_task **task_p)
{
    int64_t slices = t->x.n;
    enum ucmi_counter counter = t->x.dump ? UCMI_DUMP_BLOCKS : UCMI_LOAD_BLOCKS;

    if (!slices) { /* nothing to do is done at once */
        t->stage[0].reached = t->stage[1].reached = true;
        t->stage[0].at_ns = t->stage[1].at_ns = t->begun_ns;
        unref(t);
        *task_p = t;
        return 0;
    }
    int err = ucmi_store_submit(s, &t->x);
    if (err < 0) {
        unref(t);
        unref(t);
        return err;
    }
    ucmi_count(&s->counters, counter, slices);
    *task_p = t;
    return 0;
}

static uint64_t deadline_of(int timeout_ms)
{
    return timeout_ms < 0 ? UINT64_MAX : ucmi_now_ns() + (uint64_t)timeout_ms * 1000000;
}

static int run_batch(ucm_store *s, ucm_map *m, const struct ucm_batch *b, bool dump,
                     ucm_task **task_p)
{
    if (!s || !m || m->store != s || !b || !task_p || (b->n && (!b->keys || !b->blocks)))
        return -EINVAL;
    unsigned nshards = b->nshards ? b->nshards : s->geo.nshards - MIN(b->shard, s->geo.nshards);
    if (!nshards || b->shard >= s->geo.nshards || nshards > s->geo.nshards - b->shard)
        return -EINVAL;
    unsigned per_group = b->group && !dump ? MIN(b->group, nshards) : nshards;
    size_t ngroups = (nshards + per_group - 1) / per_group, nblocks = b->n * m->blocks_per_key;
    if (b->n > UINT32_MAX / ngroups || b->n > UINT32_MAX / m->blocks_per_key)
        return -EINVAL;
    ucm_task *t = task_new(s, dump, b->n, ngroups, nblocks);
    if (!t)
        return -ENOMEM;
    uint32_t *blocks = (uint32_t *)(t->groups + ngroups);
    for (size_t i = 0; i < nblocks; i++) {
        blocks[i] = b->blocks[i];
        if (blocks[i] >= m->nblocks) { /* of the copy: the caller's may change */
            unref(t);
            unref(t);
            return -EINVAL;
        }
    }
    ucmi_map_ref(m);
    t->x.map = m;
    t->x.after = b->after;
    t->x.deadline_ns = b->timeout_ms ? deadline_of((int)MIN(b->timeout_ms, (unsigned)INT_MAX)) : 0;
    t->shard = b->shard;
    t->nshards = nshards;
    t->per_group = per_group;
    for (size_t g = 0; g < ngroups; g++) {
        uint32_t from = (uint32_t)g * per_group;
        for (size_t i = 0; i < b->n; i++)
            t->x.v[g * b->n + i] = (struct ucm_slice){
                .key = b->keys[i],
                .depth = b->depths ? b->depths[i] : (uint32_t)i,
                .shard = b->shard + from,
                .nshards = MIN(per_group, nshards - from),
                .at.blocks = blocks + i * m->blocks_per_key,
            };
    }
    return submit(s, t, task_p);
}

static bool sg_is_right(const ucm_store *s, const struct ucm_sg *sg)
{
    if (sg->shard >= s->geo.nshards || !sg->nshards || sg->nshards > s->geo.nshards - sg->shard)
        return false;
    if (!sg->iov || !sg->niov)
        return false;
    uint64_t want = sg->nshards * s->geo.shard_size, sum = 0;
    for (unsigned i = 0; i < sg->niov; i++) {
        if (sg->iov[i].iov_len > want - sum || (sg->iov[i].iov_len && !sg->iov[i].iov_base))
            return false;
        sum += sg->iov[i].iov_len;
    }
    return sum == want;
}

static int run_sg(ucm_store *s, bool dump, const struct ucm_sg *v, size_t n, void *after,
                  ucm_task **task_p)
{
    if (!s || !task_p || n > UINT32_MAX || (n && !v))
        return -EINVAL;
    for (size_t i = 0; i < n; i++)
        if (!sg_is_right(s, &v[i]))
            return -EINVAL;
    ucm_task *t = task_new(s, dump, n, 1, 0);
    if (!t)
        return -ENOMEM;
    t->x.after = after;
    for (size_t i = 0; i < n; i++)
        t->x.v[i] = (struct ucm_slice){
            .key = v[i].key,
            .depth = v[i].depth,
            .shard = v[i].shard,
            .nshards = v[i].nshards,
            .niov = v[i].niov,
            .at.iov = v[i].iov,
        };
    return submit(s, t, task_p);
}

int ucm_load(ucm_store *s, ucm_map *m, const struct ucm_batch *b, ucm_task **task_p)
{
    return run_batch(s, m, b, false, task_p);
}

int ucm_dump(ucm_store *s, ucm_map *m, const struct ucm_batch *b, ucm_task **task_p)
{
    return run_batch(s, m, b, true, task_p);
}

int ucm_load_sg(ucm_store *s, const struct ucm_sg *v, size_t n, void *after, ucm_task **task_p)
{
    return run_sg(s, false, v, n, after, task_p);
}

int ucm_dump_sg(ucm_store *s, const struct ucm_sg *v, size_t n, void *after, ucm_task **task_p)
{
    return run_sg(s, true, v, n, after, task_p);
}

static struct stage *stage_of(const ucm_task *t, enum ucm_stage stage)
{
    return (struct stage *)&t->stage[MIN(stage, t->last)];
}

int ucm_task_wait(ucm_task *t, enum ucm_stage stage, int timeout_ms)
{
    if (!t || (unsigned)stage > UCM_STORED)
        return -EINVAL;
    struct stage *st = stage_of(t, stage);
    uint64_t deadline = deadline_of(timeout_ms);
    int late = 0;

    if (!atomic_load(&st->reached)) {
        pthread_mutex_lock(&t->lock);
        while (!atomic_load(&st->reached) && !late)
            late = ucmi_cond_wait(&t->change, &t->lock, deadline);
        pthread_mutex_unlock(&t->lock);
    }
    return atomic_load(&st->reached) ? atomic_load(&st->err) : -ETIMEDOUT;
}

int ucm_task_wait_shard(ucm_task *t, unsigned shard, int timeout_ms)
{
    if (!t || (t->per_group && (shard < t->shard || shard - t->shard >= t->nshards)))
        return -EINVAL;
    if (!t->per_group || !t->n)
        return ucm_task_wait(t, UCM_RELEASED, timeout_ms);
    struct group *g = &t->groups[(shard - t->shard) / t->per_group];
    struct stage *st = &t->stage[UCM_RELEASED];
    uint64_t deadline = deadline_of(timeout_ms);
    int late = 0;

    pthread_mutex_lock(&t->lock);
    while (atomic_load(&g->left) && !st->reached && !late)
        late = ucmi_cond_wait(&t->change, &t->lock, deadline);
    pthread_mutex_unlock(&t->lock);
    return atomic_load(&g->left) ? -ETIMEDOUT : atomic_load(&g->err);
}

int ucm_task_done(const ucm_task *t, enum ucm_stage stage)
{
    return t && (unsigned)stage <= UCM_STORED && atomic_load(&stage_of(t, stage)->reached);
}

int64_t ucm_task_ns(const ucm_task *t, enum ucm_stage stage)
{
    if (!ucm_task_done(t, stage))
        return -EINPROGRESS;
    return (int64_t)(stage_of(t, stage)->at_ns - t->begun_ns);
}

int ucm_task_status(const ucm_task *t, size_t i)
{
    if (!t || i >= t->n)
        return -EINVAL;
    return atomic_load(&t->entries[i].left) ? -EINPROGRESS : atomic_load(&t->entries[i].err);
}

int ucm_task_notify(ucm_task *t, enum ucm_stage stage, ucm_done_fn *fn, void *arg)
{
    if (!t || !fn || (unsigned)stage > UCM_STORED)
        return -EINVAL;
    struct stage *st = stage_of(t, stage);
    pthread_mutex_lock(&t->lock);
    bool reached = st->reached;
    if (!reached) {
        st->fn = fn;
        st->arg = arg;
    }
    pthread_mutex_unlock(&t->lock);
    if (reached)
        fn(arg, atomic_load(&st->err));
    return 0;
}

void ucm_task_cancel(ucm_task *t)
{
    if (t)
        __atomic_store_n(&t->x.cancel, 1, __ATOMIC_RELAXED);
}

void ucm_task_free(ucm_task *t)
{
    if (!t)
        return;
    if (!t->x.dump)
        ucm_task_cancel(t);
    unref(t);
}

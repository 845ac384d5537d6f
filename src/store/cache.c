/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache.c - the Cache tier: blocks in DRAM, shared by all processes of a node.  Options, opening
 * and closing, the way in for xfers, lookups.  How it works is in cache.h.
 *
 * Submit, lookup and prefetch come from any thread and take no lock but a mover's inbox.  Closing
 * first ends the loads, then finishes the dumps under way, those of processes that were killed
 * included: who leaves a pool last takes it along.
 */
#include "store/cache.h"

#include <inttypes.h>
#include <stdlib.h>

enum {
    QUARANTINE_MS = 30000, /* the I/O of a killed process has long ended by then, one hopes */
    GRACE_NS = 1000000000, /* a mover that still hears of something is given so long, at most */
};

struct options { /* the tier's private state; what outlives a close that cannot wait is apart */
    double capacity_gb;
    int shared;
    const char *dir;
    int64_t jobs_max, slices_max;
    struct cache *c;
};

#define AT(field) offsetof(struct options, field)
static const struct ucm_option options[] = {
    {"cache_buffer_capacity_gb", UCM_T_FLOAT, AT(capacity_gb), "0", "0", "1048576",
     "GiB of DRAM for blocks, for all processes of the node together; 0: a quarter of the memory "
     "that is available, at most half of what is free in cache_dir"},
    {"share_buffer_enable", UCM_T_BOOL, AT(shared), "true", NULL, NULL,
     "one pool for all processes of this user and namespace; false: each process its own"},
    {"cache_dir", UCM_T_STR, AT(dir), "/dev/shm", NULL, NULL,
     "directory of the shared pool's file; it has to be in memory (tmpfs)"},
    {"waiting_queue_depth", UCM_T_INT, AT(jobs_max), "8192", "1", "1048576",
     "how many loads and dumps may wait; more are refused"},
    {"running_queue_depth", UCM_T_INT, AT(slices_max), "524288", "1", "16777216",
     "slices of loads and dumps that may be under way; further ones are refused"},
    {NULL},
};
#undef AT

/* ---- opening and closing ---- */

static int open_pool(struct ucm_tier *t, struct cache *c)
{
    const struct options *o = t->priv;
    const struct ucm_geometry *geo = t->geo;
    struct ucmi_pool_spec spec = {
        .dir = o->shared ? o->dir : NULL,
        .bytes = (uint64_t)(o->capacity_gb * (double)(1 << 30)),
        .block_size = geo->block_size,
        .shard_size = geo->shard_size,
        .dev = geo->dev,
        .dev_state = geo->dev_state,
        .quarantine_ms = QUARANTINE_MS,
        .counters = t->counters,
    };
    memcpy(spec.ns, geo->ns, sizeof spec.ns);
    int err = ucmi_pool_open(&spec, &c->pool, t->why, sizeof t->why);
    if (err < 0)
        return err;
    struct ucmi_pool_layout *l = &c->pool->layout;
    ucmi_gauge(t->counters, UCMI_CACHE_SLOTS, l->nslots);
    c->blocks = calloc(l->nslots, sizeof *c->blocks);
    c->torn = calloc(TORN_MAX, sizeof *c->torn);
    if (!c->blocks || !c->torn)
        return -ENOMEM;
    return 0;
}

static int start_mover(struct cache *c, struct mover *m, bool out)
{
    const struct ucm_geometry *geo = c->geo;
    int err = ucmi_mover_init(m, c, out);
    if (!err && (err = geo->dev->stream_new(geo->dev_state, &m->stream)) < 0)
        ucmi_fail(c->t->why, sizeof c->t->why, err, "device %s: no stream: %s", geo->dev->p.name,
                  ucm_strerror(err));
    if (err)
        return err;
    atomic_fetch_add(&c->keepers, 1);
    atomic_fetch_add(&c->movers, 1);
    err = ucmi_thread_start(&m->thread, out ? "ucm-out" : "ucm-in", ucmi_mover_main, m);
    m->started = !err;
    if (err) {
        atomic_fetch_sub(&c->movers, 1);
        atomic_fetch_sub(&c->keepers, 1);
    }
    return err;
}

/* With mover.lock held: it waits for the device, though its time is up, and in vain. */
static bool is_stuck(const struct mover *m, uint64_t due_ns, uint64_t grace_ns)
{
    uint64_t since = MAX(atomic_load(&m->heard_ns), due_ns);
    bool at_it = m->at_device || (m->sleeping && m->nflights); /* else only the processor is late */
    return at_it && ucmi_now_ns() > since + grace_ns;
}

/* One that cannot end is left alone: it keeps the cache, whose memory the device may still use, and
 * the store, and lets them go should the device answer.  Asleep or in the device it is not in the
 * tier below, which it does not call from then on. */
static void stop_mover(struct cache *c, struct mover *m, int closing)
{
    pthread_mutex_lock(&c->lock);
    c->closing = closing;
    pthread_mutex_unlock(&c->lock);
    if (!m->started)
        return;
    ucmi_mover_kick(m);
    uint64_t grace_ns = MIN(c->timeout_ns, (uint64_t)GRACE_NS);
    uint64_t due_ns = MAX(c->close_ns, ucmi_now_ns()), until = due_ns + grace_ns;
    pthread_mutex_lock(&m->lock);
    for (; !m->over && !is_stuck(m, due_ns, grace_ns); until = ucmi_now_ns() + grace_ns)
        ucmi_cond_wait(&m->more, &m->lock, until);
    bool alone = !m->over;
    if (alone)
        ucmi_store_hold(c->geo);
    atomic_store(&m->left_alone, alone);
    pthread_mutex_unlock(&m->lock);
    if (!alone) {
        pthread_join(m->thread, NULL);
        return;
    }
    pthread_detach(m->thread);
    ucmi_log(UCM_ERROR, "Cache",
             "device %s: %s has not ended %" PRIu64
             " ms after the store was closed; the memory it may use is kept until it has",
             c->geo->dev->p.name, m->out ? "a dump" : "a load", c->timeout_ns / 1000000);
}

static void free_cache(struct cache *c)
{
    struct mover *movers[] = {&c->in, &c->out};
    struct link none;
    list_init(&none);
    for (size_t i = 0; i < ARRAY_LEN(movers); i++)
        for (struct event *e = movers[i]->events, *next; e; e = next) { /* came after the end */
            next = e->next;
            ucmi_child_unref(CONTAINER_OF(e, struct child_slice, e)->child);
        }
    for (uint32_t slot = 0; c->blocks && slot < c->pool->layout.nslots; slot++)
        if (c->blocks[slot])
            ucmi_block_end(c, c->blocks[slot], -ESHUTDOWN, &none);
    ucmi_mover_destroy(&c->in);
    ucmi_mover_destroy(&c->out);
    ucmi_pool_close(c->pool);
    free(c->blocks);
    free(c->torn);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

/* The last one knows that the movers have ended, and that the tier below has nothing of ours. */
void ucmi_cache_let_go(struct cache *c)
{
    if (atomic_fetch_sub(&c->keepers, 1) == 1)
        free_cache(c);
}

static void shut(struct cache *c)
{
    struct mover *movers[] = {&c->in, &c->out};
    size_t lent = 0;

    c->close_ns = ucmi_now_ns() + c->timeout_ns;
    stop_mover(c, &c->in, 1);
    ucmi_ask_stop(c);
    if (c->pool)
        ucmi_pool_sweep(c->pool);
    pthread_mutex_lock(&c->lock);
    c->orphan_at = 0;
    pthread_mutex_unlock(&c->lock);
    stop_mover(c, &c->out, 2);
    for (size_t i = 0; i < ARRAY_LEN(movers); i++) {
        struct mover *m = movers[i];
        if (!m->started)
            continue;
        pthread_mutex_lock(&m->lock);
        lent += m->lent;
        pthread_mutex_unlock(&m->lock);
    }
    if (lent)
        ucmi_log(UCM_ERROR, "Cache",
                 "%zu blocks are still being read or written below, %" PRIu64
                 " ms after the store was closed; the pool's memory is kept until that has ended",
                 lent, c->timeout_ns / 1000000);
    ucmi_cache_let_go(c);
}

static void cache_close(struct ucm_tier *t)
{
    shut(((struct options *)t->priv)->c);
}

static int cache_open(struct ucm_tier *t)
{
    struct options *o = t->priv;
    struct cache *c = calloc(1, sizeof *c);
    if (!c)
        return -ENOMEM;
    o->c = c;
    c->t = t;
    c->geo = t->geo;
    c->counters = t->counters;
    c->jobs_max = o->jobs_max;
    c->slices_max = o->slices_max;
    c->timeout_ns = t->geo->timeout_ms * UINT64_C(1000000);
    atomic_init(&c->keepers, 1);
    pthread_mutex_init(&c->lock, NULL);
    list_init(&c->making);
    list_init(&c->dirty);
    int err = open_pool(t, c);
    if (!err)
        err = ucmi_ask_start(c);
    if (!err)
        err = start_mover(c, &c->in, false);
    if (!err)
        err = start_mover(c, &c->out, true);
    if (err)
        shut(c);
    return err;
}

/* ---- calls ---- */

static struct job *job_new(struct mover *m, struct ucm_xfer *x)
{
    struct job *j = calloc(1, sizeof *j + x->n * sizeof j->parts[0]);
    if (!j)
        return NULL;
    j->m = m;
    j->x = x;
    j->n = x->n;
    j->id = x->id;
    j->deadline_ns = x->deadline_ns;
    atomic_init(&j->left, x->n);
    for (uint32_t i = 0; i < x->n; i++) {
        struct part *p = &j->parts[i];
        list_init(&p->link);
        p->job = j;
        p->slot = UCMI_POOL_NONE;
    }
    return j;
}

static void log_job(struct cache *c, struct job *j)
{
    if (!ucmi_log_on(UCM_DEBUG) || j->fetch_only)
        return;
    j->start_ns = ucmi_now_ns();
    for (uint32_t i = 0; i < j->n; i++)
        j->bytes += j->x->v[i].nshards * c->geo->shard_size;
    ucmi_log(UCM_DEBUG, NULL, "Cache task(%" PRIu64 ",%s,%" PRIu32 ",%" PRIu64 ") dispatching.",
             j->id, j->m->out ? "DUMP" : "LOAD", j->n, j->bytes);
}

static int hand_over(struct cache *c, struct ucm_xfer *x, bool fetch_only)
{
    struct mover *m = x->dump ? &c->out : &c->in;
    int64_t n = x->n;
    if (!n)
        return 0;
    /* One that is larger than the bound by itself is taken when there is no other. */
    int64_t before = atomic_fetch_add(&c->slices, n), jobs = atomic_fetch_add(&m->njobs, 1);
    int err = (before && before + n > c->slices_max) || jobs >= c->jobs_max ? -EAGAIN : 0;
    struct job *j = err ? NULL : job_new(m, x);
    if (j) {
        j->fetch_only = fetch_only;
        log_job(c, j);
        err = ucmi_mover_hand(m, j);
    } else if (!err) {
        err = -ENOMEM;
    }
    if (err) {
        free(j);
        atomic_fetch_sub(&c->slices, n);
        atomic_fetch_sub(&m->njobs, 1);
    }
    return err;
}

static int cache_submit(struct ucm_tier *t, struct ucm_xfer *x)
{
    return hand_over(((struct options *)t->priv)->c, x, false);
}

/* ---- prefetch: a load of ours that ends in the pool ---- */

struct prefetch {
    struct ucm_xfer x;
    _Atomic uint32_t left;
    struct ucm_slice v[];
};

static void prefetch_done(struct ucm_xfer *x, struct ucm_slice *s, enum ucm_stage stage, int err)
{
    struct prefetch *f = CONTAINER_OF(x, struct prefetch, x);
    if (atomic_fetch_sub(&f->left, 1) == 1)
        free(f);
}

/* What is in the pool already is leased; of the rest, where the tier below says that it has it, as
 * much as a quarter of the pool is fetched, so that a hint cannot empty it. */
static void cache_prefetch(struct ucm_tier *t, const ucm_key *keys, size_t n)
{
    struct cache *c = ((struct options *)t->priv)->c;
    n = MIN(n, (size_t)c->pool->layout.nslots / 4);
    struct prefetch *f = n ? calloc(1, sizeof *f + n * (sizeof f->v[0] + 1)) : NULL;
    if (!f)
        return;
    uint8_t *found = (uint8_t *)&f->v[n];
    ucmi_pool_lookup(c->pool, keys, n, c->geo->rank, 1, found, true);
    for (size_t i = 0; i < n; i++)
        if (!found[i])
            f->v[f->x.n++] = (struct ucm_slice){
                .key = keys[i], .depth = (uint32_t)i, .nshards = c->geo->nshards};
    f->x.v = f->v;
    f->x.done = prefetch_done;
    f->x.deadline_ns = ucmi_now_ns() + c->timeout_ns;
    atomic_init(&f->left, f->x.n);
    if (!f->x.n || hand_over(c, &f->x, true) < 0)
        free(f);
}

static void cache_lookup(struct ucm_tier *t, const ucm_key *keys, size_t n, uint32_t rank,
                         uint8_t level, uint8_t *found, struct ucm_lookup *call)
{
    struct cache *c = ((struct options *)t->priv)->c;
    if (ucmi_pool_lookup(c->pool, keys, n, rank, level, found, call->use == UCM_WILL_LOAD))
        t->next->ops->lookup(t->next, keys, n, rank, (uint8_t)(level + 1), found, call);
    ucmi_gauge(c->counters, UCMI_CACHE_READY, atomic_load(&c->pool->head->ready));
}

const struct ucm_tier_ops ucmi_tier_cache = {
    .p = {.kind = "tier",
          .name = "Cache",
          .help = "blocks in DRAM, one pool for all processes of the node",
          .options = options,
          .size = sizeof(struct options)},
    .needs_next = 1,
    .open = cache_open,
    .close = cache_close,
    .lookup = cache_lookup,
    .submit = cache_submit,
    .prefetch = cache_prefetch,
};

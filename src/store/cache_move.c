/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache_move.c - the two movers.  Each is a thread that sleeps until someone hands it a job or
 * something it started has ended, and then goes round:
 *
 *     take what was handed over; handle what has ended; look at the parts that can go on
 *                                                                         (with cache.lock)
 *     tell senders; submit to the tier below; queue copies                (without)
 *
 * A round is bounded (PASS_PARTS, FLIGHT_BYTES), so that a large job neither holds the lock for
 * long nor keeps the first of its layers waiting for the last.  A mover looks at a clock only for
 * what nobody will tell it: deadlines, and, while parts wait for something that only another
 * process can change, a tick every TICK_MS; while there are partial blocks, whether another process
 * waits for one, every WANTED_MS.
 *
 * A device that hangs holds a mover asleep or in a call of it.  When the store is closed such a
 * mover is left alone (cache.c): it does not call the tier below any more, and lets everything go
 * when its last flight has landed.
 *
 * mover.lock guards what others hand over and is a leaf; who posts signals with the lock held, so a
 * mover that has taken the last event may go away at once.
 */
#include "store/cache.h"

#include <inttypes.h>
#include <stdlib.h>

enum {
    ROOM_PER_TICK = 32,
    SWEEP_MS = 100,
    WANTED_MS = 50,
    LOAD_SHARE = 8, /* an eighth of the slots is not for dumps */
};

/* ---- handing over ---- */

int ucmi_mover_init(struct mover *m, struct cache *c, bool out)
{
    m->c = c;
    m->out = out;
    m->events_end = &m->events;
    m->deadline_ns = UINT64_MAX;
    pthread_mutex_init(&m->lock, NULL);
    ucmi_cond_init(&m->more);
    struct link *lists[] = {&m->inbox, &m->jobs, &m->todo, &m->room, &m->foreign, &m->unsent};
    for (size_t i = 0; i < ARRAY_LEN(lists); i++)
        list_init(lists[i]);
    m->freed = calloc(c->pool->layout.nsets, sizeof *m->freed);
    return m->freed ? 0 : -ENOMEM;
}

void ucmi_mover_destroy(struct mover *m)
{
    if (!m->c)
        return;
    ucmi_copy_end(m);
    pthread_cond_destroy(&m->more);
    pthread_mutex_destroy(&m->lock);
    free(m->pieces);
    free(m->freed);
}

/* With mover.lock held. */
static void wake(struct mover *m)
{
    if (m->sleeping) {
        m->sleeping = false;
        pthread_cond_broadcast(&m->more); /* who closes may wait for its end */
    }
}

int ucmi_mover_hand(struct mover *m, struct job *j)
{
    int err = -ESHUTDOWN;
    pthread_mutex_lock(&m->lock);
    if (!m->gone) {
        list_add(&m->inbox, &j->link);
        wake(m);
        err = 0;
    }
    pthread_mutex_unlock(&m->lock);
    return err;
}

/* With mover.lock held. */
static void append(struct mover *m, struct event *e)
{
    e->next = NULL;
    *m->events_end = e;
    m->events_end = &e->next;
    wake(m);
}

void ucmi_mover_post(struct mover *m, struct event *e)
{
    pthread_mutex_lock(&m->lock);
    append(m, e);
    pthread_mutex_unlock(&m->lock);
}

void ucmi_mover_lend(struct mover *m, size_t slices)
{
    pthread_mutex_lock(&m->lock);
    m->lent += slices;
    pthread_mutex_unlock(&m->lock);
}

void ucmi_mover_return(struct mover *m, struct event *e)
{
    struct cache *c = m->c;
    pthread_mutex_lock(&m->lock);
    append(m, e);
    bool last = --m->lent == 0 && m->orphaned;
    pthread_mutex_unlock(&m->lock);
    if (last)
        ucmi_cache_let_go(c);
}

void ucmi_mover_kick(struct mover *m)
{
    pthread_mutex_lock(&m->lock);
    m->kicked = true;
    wake(m);
    pthread_mutex_unlock(&m->lock);
}

/* Sleeps until there is something or wake_ns; takes all of it. */
static struct event *take(struct mover *m, struct link *jobs, uint64_t wake_ns)
{
    pthread_mutex_lock(&m->lock);
    while (list_empty(&m->inbox) && !m->events && !m->kicked && wake_ns) {
        m->sleeping = true;
        int late = ucmi_cond_wait(&m->more, &m->lock, wake_ns);
        m->sleeping = false;
        if (late)
            break;
    }
    struct event *events = m->events;
    m->events = NULL;
    m->events_end = &m->events;
    m->kicked = false;
    list_splice(jobs, &m->inbox);
    pthread_mutex_unlock(&m->lock);
    return events;
}

/* ---- parts ---- */

void ucmi_part_over(struct part *p, int err, struct link *fin)
{
    bool lost = p->state < PART_RELEASED && p->job->m->out && err;
    if (p->state < PART_RELEASED)
        p->job->m->moving--;
    p->state = PART_OVER;
    p->err = err;
    list_add(fin, &p->link);
    if (lost)
        ucmi_dump_lost(p->job->m->c, p, fin);
}

void ucmi_part_wait(struct part *p, struct link *list, enum part_state state)
{
    p->state = state;
    list_add(list, &p->link);
}

void ucmi_part_todo(struct part *p)
{
    list_del(&p->link);
    ucmi_part_wait(p, &p->job->m->todo, PART_TODO);
    ucmi_mover_kick(p->job->m);
}

void ucmi_part_no_slot(struct mover *m, struct part *p, bool foreign)
{
    if (!p->late)
        ucmi_count(m->c->counters, UCMI_CACHE_WAITED, 1);
    p->late = true;
    if (foreign)
        ucmi_part_wait(p, &m->foreign, PART_FOREIGN);
    else
        ucmi_part_wait(p, &m->room, PART_ROOM);
}

/* A partial block that loads left behind and nobody uses. */
static bool is_idle(const struct block *b)
{
    return !b->users && !b->whole && !b->dirty && list_empty(&b->stored);
}

/* Such a one makes room for one that is wanted now. */
static bool drop_idle(struct cache *c, const struct ucm_slice *s, struct link *fin)
{
    uint32_t sets[2];
    ucmi_pool_sets(c->pool, &s->key, c->geo->rank, sets);
    for (unsigned i = 0; i < 2; i++) {
        uint32_t first = ucmi_pool_set_first(c->pool, sets[i]);
        for (uint32_t k = 0; k < ucmi_pool_set_size(c->pool, sets[i]); k++) {
            struct block *b = c->blocks[first + k];
            if (b && is_idle(b)) {
                ucmi_block_end(c, b, 0, fin);
                return true;
            }
        }
    }
    return false;
}

/* Dumps, of all processes together, leave some slots to the loads, however slowly the tier below
 * takes what they bring.  The slot is counted as ours before it is asked for: of two processes that
 * ask for the last one, one at least sees the other. */
static bool may_claim(const struct mover *m)
{
    const struct cache *c = m->c;
    uint32_t nslots = ucmi_pool_grown(c->pool);
    uint32_t share = nslots > 1 ? MAX(nslots / LOAD_SHARE, 1) : 0;
    return !m->out || ucmi_pool_busy(c->pool, c->nblocks + 1) <= nslots - share;
}

static enum ucmi_pool_got get(struct mover *m, const struct ucmi_pool_want *want,
                              enum ucmi_pool_take take, uint32_t *slot)
{
    return ucmi_pool_get(m->c->pool, want, may_claim(m) ? take : UCMI_POOL_LOOK, slot);
}

enum ucmi_pool_got ucmi_part_get(struct mover *m, struct part *p, struct pass *pass,
                                 enum ucmi_pool_take take, uint32_t *slot)
{
    struct cache *c = m->c;
    const struct ucm_slice *s = part_slice(p);
    struct ucmi_pool_want want = {.key = s->key, .rank = c->geo->rank, .depth = s->depth};
    enum ucmi_pool_got got = get(m, &want, take, slot);

    if (got == UCMI_POOL_FULL && take == UCMI_POOL_EVICT && drop_idle(c, s, &pass->fin))
        got = get(m, &want, take, slot);
    if ((got == UCMI_POOL_FULL || got == UCMI_POOL_BUSY) && pass->now_ns >= c->sweep_ns) {
        c->sweep_ns = pass->now_ns + SWEEP_MS * UINT64_C(1000000);
        if (ucmi_pool_sweep(c->pool))
            got = get(m, &want, take, slot);
        if (atomic_exchange(&c->pool->orphans, false)) {
            c->orphan_at = 0;
            ucmi_mover_kick(&c->out);
        }
    }
    if (m->out && got != UCMI_POOL_CLAIMED)
        ucmi_pool_busy(c->pool, c->nblocks);
    return got;
}

/* A slot can be taken again: as many of those who wait for its set look again. */
void ucmi_cache_freed(struct cache *c, uint32_t slot)
{
    uint32_t set = ucmi_pool_set_of(c->pool, slot);
    struct mover *movers[] = {&c->in, &c->out};
    for (size_t i = 0; i < ARRAY_LEN(movers); i++) {
        struct mover *m = movers[i];
        if (list_empty(&m->room) || m->freed[set] == UINT8_MAX)
            continue;
        m->freed[set]++;
        m->freed_sum++;
        m->freed_any++;
        ucmi_mover_kick(m);
    }
}

/* Whether one of the slots that were freed is for this part.  A dump may also have been kept from
 * its set by the loads' share, which any slot gives back. */
static bool is_for(struct mover *m, const struct part *p)
{
    uint32_t sets[2];
    ucmi_pool_sets(m->c->pool, &part_slice(p)->key, m->c->geo->rank, sets);
    uint8_t *freed = &m->freed[m->freed[sets[0]] ? sets[0] : sets[1]];
    if (*freed) {
        --*freed;
        m->freed_sum--;
        return true;
    }
    if (!m->out || !m->freed_any)
        return false;
    m->freed_any--;
    return true;
}

static void look_for_room(struct mover *m)
{
    struct link found;
    list_init(&found);
    for (struct link *l = m->room.next, *next; l != &m->room && m->freed_sum; l = next) {
        next = l->next;
        struct part *p = LIST_ITEM(l, struct part, link);
        if (!is_for(m, p))
            continue;
        list_del(l);
        ucmi_part_wait(p, &found, PART_TODO);
    }
    if (m->freed_sum)
        memset(m->freed, 0, m->c->pool->layout.nsets);
    m->freed_sum = m->freed_any = 0;
    list_splice(&m->todo, &found);
}

/* ---- time ---- */

/* Ends the parts of a job that wait; with `all` those too that wait for something under way, or for
 * their turn at a device that has stopped. */
static void end_waiting(struct cache *c, struct job *j, int err, bool all, struct link *fin)
{
    for (uint32_t i = 0; i < j->n; i++) {
        struct part *p = &j->parts[i];
        struct block *b = p->block;
        bool waits = p->state == PART_ROOM || p->state == PART_FOREIGN || p->state == PART_ASK;
        bool under_way =
            p->state == PART_SHARDS || p->state == PART_STORING || p->state == PART_TODO;
        if (!waits && !(all && under_way))
            continue;
        list_del(&p->link);
        p->block = NULL;
        ucmi_part_over(p, err, fin);
        if (b)
            ucmi_block_unref(c, b, fin);
    }
}

static bool canceled(const struct job *j)
{
    return __atomic_load_n(&j->x->cancel, __ATOMIC_RELAXED);
}

static void watch_deadlines(struct mover *m, struct pass *pass)
{
    struct cache *c = m->c;
    bool closed = c->closing && pass->now_ns >= c->close_ns;
    if (pass->now_ns < m->deadline_ns && !closed)
        return;
    m->deadline_ns = UINT64_MAX;
    for (struct link *l = m->jobs.next; l != &m->jobs; l = l->next) {
        struct job *j = LIST_ITEM(l, struct job, link);
        if (j->deadline_ns <= pass->now_ns || closed) {
            if (!j->given_up)
                end_waiting(c, j, -ETIMEDOUT, true, &pass->fin);
            j->given_up = true;
        } else {
            m->deadline_ns = MIN(m->deadline_ns, j->deadline_ns);
        }
    }
}

static bool needs_tick(const struct mover *m)
{
    return !list_empty(&m->room) || !list_empty(&m->foreign) || !list_empty(&m->unsent);
}

/* What another process may have changed, or the sender (cancel). */
static void tick(struct mover *m, struct pass *pass)
{
    m->tick_ns = pass->now_ns + TICK_MS * UINT64_C(1000000);
    m->resend = true;
    for (struct link *l = m->jobs.next; l != &m->jobs; l = l->next) {
        struct job *j = LIST_ITEM(l, struct job, link);
        if (canceled(j))
            end_waiting(m->c, j, -ECANCELED, false, &pass->fin);
    }
    struct link *lists[] = {&m->foreign, &m->room};
    for (size_t i = 0; i < ARRAY_LEN(lists); i++)
        for (unsigned k = 0; k < ROOM_PER_TICK && !list_empty(lists[i]); k++)
            ucmi_part_wait(LIST_ITEM(list_take(lists[i]), struct part, link), &m->todo, PART_TODO);
}

/* Blocks whose missing shards nobody has brought for timeout_ms are given up; at the end all are.
 */
static void abandon(struct cache *c, struct pass *pass)
{
    bool last = c->closing == 2 && !c->out.moving;
    while (!list_empty(&c->making)) {
        struct block *b = LIST_ITEM(c->making.next, struct block, link);
        if (!last && b->touched_ns + c->timeout_ns > pass->now_ns)
            return;
        if (!b->users) {
            ucmi_block_end(c, b, last ? -ESHUTDOWN : -ETIMEDOUT, &pass->fin);
            continue;
        }
        if (b->touched_ns == pass->now_ns)
            return; /* once round: all that are left are in use */
        b->touched_ns = pass->now_ns;
        list_del(&b->link);
        list_add(&c->making, &b->link);
    }
}

/* Another process waits for a block that we fill: if it is one of those, nobody would ever bring
 * the rest here, and that process can fill it itself. */
static void make_way(struct cache *c, struct pass *pass)
{
    if (list_empty(&c->making) || !ucmi_pool_wanted(c->pool))
        return;
    for (struct link *l = c->making.next, *next; l != &c->making; l = next) {
        next = l->next;
        if (is_idle(LIST_ITEM(l, struct block, link)))
            ucmi_block_end(c, LIST_ITEM(l, struct block, link), 0, &pass->fin);
    }
}

static void shut_down(struct mover *m, struct pass *pass)
{
    struct cache *c = m->c;
    for (struct link *l = m->jobs.next; !m->out && l != &m->jobs; l = l->next)
        end_waiting(c, LIST_ITEM(l, struct job, link), -ESHUTDOWN, false, &pass->fin);
    if (pass->now_ns < c->close_ns)
        return;
    c->orphan_at = c->pool->layout.nslots;
    for (struct link *l; m->out && (l = list_take(&c->dirty));) {
        struct block *b = LIST_ITEM(l, struct block, link);
        ucmi_block_written(c, b, -ETIMEDOUT, &pass->fin);
        ucmi_block_unref(c, b, &pass->fin);
    }
}

static bool can_copy(const struct mover *m)
{
    return m->nflights < FLIGHTS_MAX;
}

static uint64_t next_wake(const struct mover *m, uint64_t now_ns)
{
    const struct cache *c = m->c;
    if ((!list_empty(&m->todo) && can_copy(m)) ||
        (m->out && !list_empty(&c->dirty) && list_empty(&m->unsent)) ||
        (m->out && ucmi_dump_orphans(m)))
        return 0;
    uint64_t wake_ns = m->deadline_ns;
    if (needs_tick(m))
        wake_ns = MIN(wake_ns, m->tick_ns);
    if (!list_empty(&c->making))
        wake_ns =
            MIN(wake_ns, LIST_ITEM(c->making.next, struct block, link)->touched_ns + c->timeout_ns);
    if (!list_empty(&c->making) && !m->out)
        wake_ns = MIN(wake_ns, now_ns + WANTED_MS * UINT64_C(1000000));
    if (c->closing && now_ns < c->close_ns)
        wake_ns = MIN(wake_ns, c->close_ns);
    return wake_ns;
}

/* ---- a round ---- */

static void accept_jobs(struct mover *m, struct link *jobs)
{
    for (struct link *l; (l = list_take(jobs));) {
        struct job *j = LIST_ITEM(l, struct job, link);
        list_add(&m->jobs, l);
        m->deadline_ns = MIN(m->deadline_ns, j->deadline_ns);
        m->moving += j->n;
        for (uint32_t i = 0; i < j->n; i++)
            list_add(&m->todo, &j->parts[i].link);
    }
}

/* Why a part is not to go on, or 0.  A dump that has begun goes on. */
static int stopped(const struct mover *m, const struct part *p, uint64_t now_ns)
{
    if (p->err || (m->out && p->block))
        return 0;
    if (canceled(p->job))
        return -ECANCELED;
    if (p->job->deadline_ns <= now_ns || p->job->given_up)
        return -ETIMEDOUT;
    return m->c->closing && !m->out ? -ESHUTDOWN : 0;
}

static void place(struct mover *m, struct pass *pass)
{
    for (unsigned i = 0; i < PASS_PARTS && pass->bytes < FLIGHT_BYTES && can_copy(m); i++) {
        struct link *l = list_take(&m->todo);
        if (!l)
            break;
        struct part *p = LIST_ITEM(l, struct part, link);
        struct block *b = p->block;
        int err = stopped(m, p, pass->now_ns);
        if (err) {
            p->block = NULL;
            ucmi_part_over(p, err, &pass->fin);
            if (b)
                ucmi_block_unref(m->c, b, &pass->fin);
        } else if (m->out) {
            ucmi_dump_place(m, p, pass);
        } else {
            ucmi_load_place(m, p, pass);
        }
    }
    if (m->out)
        ucmi_dump_write(m, pass);
    else
        ucmi_ask_next(m->c);
}

static void job_over(struct job *j)
{
    struct mover *m = j->m;
    struct cache *c = m->c;
    pthread_mutex_lock(&c->lock);
    list_del(&j->link);
    pthread_mutex_unlock(&c->lock);
    if (j->start_ns)
        ucmi_log(UCM_DEBUG, NULL,
                 "Cache task(%" PRIu64 ",%s,%" PRIu32 ",%" PRIu64 ") finished, cost %.3fms.", j->id,
                 m->out ? "DUMP" : "LOAD", j->n, j->bytes,
                 (double)(ucmi_now_ns() - j->start_ns) * 1e-6);
    atomic_fetch_sub(&c->slices, j->n);
    atomic_fetch_sub(&m->njobs, 1);
    free(j);
}

/* A block that is always found in DRAM must not look cold to the tier below, which would evict it:
 * it is looked up there as well, in what that tier knows without waiting. */
static void used(struct cache *c, const struct ucm_slice *s)
{
    struct ucm_tier *next = c->t->next;
    struct ucm_lookup call = {.up_to_date = 1, .use = UCM_HAS_LOADED};
    uint8_t found = 0;
    next->ops->lookup(next, &s->key, 1, c->geo->rank, 1, &found, &call);
}

/* Without the lock: the parts in fin are nobody else's.  The books are closed before the sender
 * hears of the end, so that it finds the room that it has given back. */
static void tell(struct cache *c, struct link *fin)
{
    for (struct link *l; (l = list_take(fin));) {
        struct part *p = LIST_ITEM(l, struct part, link);
        struct job *j = p->job;
        struct ucm_xfer *x = j->x;
        struct ucm_slice *s = part_slice(p);
        bool dump = j->m->out, told = p->told;
        int err = p->err;
        if (p->state == PART_RELEASED) {
            p->told = true;
            x->done(x, s, UCM_RELEASED, 0);
            pthread_mutex_lock(&c->lock);
            ucmi_dump_join(c, p, fin);
            pthread_mutex_unlock(&c->lock);
            continue;
        }
        if (!dump && !err && s->shard == 0 && !atomic_load(&j->m->left_alone))
            used(c, s);
        if (atomic_fetch_sub(&j->left, 1) == 1)
            job_over(j);
        if (!told)
            x->done(x, s, UCM_RELEASED, err);
        if (dump)
            x->done(x, s, UCM_STORED, err);
    }
}

/* ---- the thread ---- */

static bool finished(struct mover *m, struct pass *pass)
{
    struct cache *c = m->c;
    if (c->closing < (m->out ? 2 : 1) || !list_empty(&m->jobs) || m->nflights)
        return false;
    if (m->out && (!list_empty(&c->dirty) || c->orphan_at < c->pool->layout.nslots))
        return false;
    if (!m->out && c->ask.under_way) /* lookup_timeout_ms at most */
        return false;
    if (m->nchildren && pass->now_ns < c->close_ns)
        return false;
    pthread_mutex_lock(&m->lock);
    m->gone = list_empty(&m->inbox) && !m->events;
    pthread_mutex_unlock(&m->lock);
    return m->gone;
}

static void fail_unsent(struct mover *m, int err)
{
    for (struct link *l; (l = list_take(&m->unsent));)
        ucmi_child_fail(LIST_ITEM(l, struct child, link), err);
}

/* The part of a round that needs the lock. */
static bool look(struct mover *m, struct event *events, struct link *jobs, struct pass *pass)
{
    struct cache *c = m->c;
    pthread_mutex_lock(&c->lock);
    accept_jobs(m, jobs);
    for (struct event *e = events, *next; e; e = next) {
        next = e->next;
        e->handle(m, e, &pass->fin);
    }
    watch_deadlines(m, pass);
    if (needs_tick(m) && pass->now_ns >= m->tick_ns)
        tick(m, pass);
    if (m->freed_sum)
        look_for_room(m);
    if (c->closing) /* first: when all is given up nothing more goes to the tier below */
        shut_down(m, pass);
    place(m, pass);
    abandon(c, pass);
    make_way(c, pass);
    ucmi_gauge(c->counters, UCMI_CACHE_READY, atomic_load(&c->pool->head->ready));
    bool over = c->closing && pass->now_ns >= c->close_ns;
    pthread_mutex_unlock(&c->lock);
    return over;
}

static void at_device(struct mover *m, bool on)
{
    pthread_mutex_lock(&m->lock);
    m->at_device = on;
    pthread_mutex_unlock(&m->lock);
}

/* The device hears no more of this mover, and after the last one nothing of the pool. */
static void leave(struct mover *m)
{
    struct cache *c = m->c;
    const struct ucm_geometry *geo = c->geo;
    at_device(m, true);
    ucmi_copy_end(m);
    if (atomic_fetch_sub(&c->movers, 1) == 1)
        ucmi_pool_grow_stop(c->pool);
    pthread_mutex_lock(&m->lock);
    m->at_device = false;
    m->over = true;
    bool alone = atomic_load(&m->left_alone), orphaned = m->lent > 0;
    m->orphaned = orphaned;
    pthread_cond_broadcast(&m->more);
    pthread_mutex_unlock(&m->lock);
    if (!orphaned)
        ucmi_cache_let_go(c);
    if (alone)
        ucmi_store_release(geo);
}

void *ucmi_mover_main(void *arg)
{
    struct mover *m = arg;
    struct cache *c = m->c;
    uint64_t wake_ns = m->out ? 0 : UINT64_MAX; /* others may have left something to write */
    for (bool end = false; !end;) {
        struct link jobs;
        struct pass pass;
        list_init(&jobs);
        list_init(&pass.fin);
        list_init(&pass.copies);
        list_init(&pass.children);
        pass.bytes = 0;
        struct event *events = take(m, &jobs, wake_ns);
        pass.now_ns = ucmi_now_ns();
        if (events)
            atomic_store(&m->heard_ns, pass.now_ns);
        bool over = look(m, events, &jobs, &pass);
        tell(c, &pass.fin);
        if (over) /* nobody would send them again */
            fail_unsent(m, -ETIMEDOUT);
        if (m->resend && !list_empty(&m->unsent))
            ucmi_child_resend(m);
        m->resend = false;
        for (struct link *l; (l = list_take(&pass.children));)
            ucmi_child_send(m, LIST_ITEM(l, struct child, link));
        if (!list_empty(&pass.copies)) {
            at_device(m, true);
            ucmi_copy_launch(m, &pass);
            at_device(m, false);
            tell(c, &pass.fin);
        }
        pthread_mutex_lock(&c->lock);
        end = finished(m, &pass);
        wake_ns = next_wake(m, pass.now_ns);
        pthread_mutex_unlock(&c->lock);
    }
    leave(m);
    return NULL;
}

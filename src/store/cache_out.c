/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache_out.c - dumps: from the engine into the pool, and from there to the tier below.
 *
 * The engine's memory is RELEASED as soon as its copy has ended.  A block that is whole is READY
 * for all processes at once, and is written down in one piece, straight out of its slot, which
 * stays pinned until the tier below says STORED.  A block that is in the pool already is written
 * down all the same: the tier below knows best whether it has it.  A block that a process left
 * READY and not STORED, because it was killed or its disk failed, is written down by whoever comes
 * next, when there is nothing else to write.  Runs on the out mover, except ucmi_dump_join and
 * ucmi_dump_queue; all with cache.lock held.
 */
#include "store/cache.h"

#include <stdlib.h>

enum {
    ORPHAN_LOOKS = 1024, /* slots looked at with the lock held once */
    TORN_WAYS = 16,      /* places for a key among the torn */
};

/* A block that is READY: the pin that comes with it is the struct block's from now on. */
static struct block *adopt(struct cache *c, const struct ucm_slice *s, uint32_t slot,
                           uint64_t now_ns)
{
    struct block *b = c->blocks[slot];
    if (!b)
        b = ucmi_block_new(c, s, slot, true, now_ns);
    else
        ucmi_pool_unpin(c->pool, slot); /* it has one */
    if (!b)
        ucmi_pool_unpin(c->pool, slot);
    return b;
}

/* ---- dumps by layers ----
 *
 * The slices of a block may come one by one, and its block may go between two of them: it was READY
 * already when the first came and was evicted for another, or a slice failed.  Those that come then
 * would claim a slot and wait for shards that nobody brings again.  So it is remembered for a while
 * which shards had come, and the rest ends at once, until a shard comes that had come before: that
 * is another dump.
 */

/* Where the key is; if it is not there, the place of the one that is forgotten for it. */
static struct torn *torn_at(struct cache *c, const ucm_key *key)
{
    struct torn *set = &c->torn[ucmi_hash64(key->b, sizeof key->b, 0) % TORN_MAX & -TORN_WAYS];
    struct torn *oldest = set;
    for (unsigned i = 0; i < TORN_WAYS; i++) {
        if (ucmi_key_eq(&set[i].key, key))
            return &set[i];
        if (set[i].until_ns < oldest->until_ns)
            oldest = &set[i];
    }
    return oldest;
}

static void remember(struct cache *c, const ucm_key *key, const uint64_t *seen)
{
    struct torn *t = torn_at(c, key);
    t->key = *key;
    t->until_ns = ucmi_now_ns() + c->timeout_ns;
    memcpy(t->seen, seen, sizeof t->seen);
}

void ucmi_dump_torn(struct cache *c, const struct block *b)
{
    uint32_t n = c->geo->nshards;
    if (ucmi_block_any(b->seen, 0, n) && !ucmi_block_has(b->seen, 0, n))
        remember(c, &b->key, b->seen);
}

static struct torn *find_torn(struct cache *c, const struct ucm_slice *s, uint64_t now_ns)
{
    struct torn *t = torn_at(c, &s->key);
    if (!ucmi_key_eq(&t->key, &s->key) || t->until_ns <= now_ns)
        return NULL;
    if (!ucmi_block_any(t->seen, s->shard, s->shard + s->nshards))
        return t;
    t->until_ns = 0;
    return NULL;
}

/* Another slice of a torn dump. */
static void add_torn(struct cache *c, struct torn *t, const struct ucm_slice *s)
{
    ucmi_block_set(t->seen, s->shard, s->shard + s->nshards);
    if (ucmi_block_has(t->seen, 0, c->geo->nshards))
        t->until_ns = 0;
}

/* The block goes on where the former one ended; false: it lacks what was brought then. */
static bool mend(struct block *b, struct torn *t)
{
    for (uint32_t i = 0; i < SHARD_WORDS; i++)
        if (t->seen[i] & ~b->ready[i])
            return false;
    for (uint32_t i = 0; i < SHARD_WORDS; i++)
        b->seen[i] |= t->seen[i];
    t->until_ns = 0;
    return true;
}

void ucmi_dump_lost(struct cache *c, struct part *p, struct link *fin)
{
    const struct ucm_slice *s = part_slice(p);
    struct ucmi_pool_want want = {.key = s->key, .rank = c->geo->rank};
    uint64_t seen[SHARD_WORDS] = {0};
    uint32_t slot;
    if (s->nshards == c->geo->nshards)
        return;
    switch (ucmi_pool_get(c->pool, &want, UCMI_POOL_LOOK, &slot)) {
    case UCMI_POOL_READY: /* it is there without us */
        ucmi_pool_unpin(c->pool, slot);
        ucmi_cache_freed(c, slot);
        return;
    case UCMI_POOL_MINE:
        ucmi_block_set(c->blocks[slot]->seen, s->shard, s->shard + s->nshards);
        c->blocks[slot]->failed = true;
        c->blocks[slot]->users++; /* so that it ends if nobody else uses it */
        ucmi_block_unref(c, c->blocks[slot], fin);
        return;
    default: break;
    }
    struct torn *t = find_torn(c, s, ucmi_now_ns());
    ucmi_block_set(seen, s->shard, s->shard + s->nshards);
    if (t)
        add_torn(c, t, s);
    else
        remember(c, &s->key, seen);
}

/* Gives the part its block; false if it has to wait or has failed. */
static bool find_block(struct mover *m, struct part *p, struct pass *pass)
{
    struct cache *c = m->c;
    const struct ucm_slice *s = part_slice(p);
    uint32_t slot;
    struct torn *t = find_torn(c, s, pass->now_ns);
    enum ucmi_pool_got got = ucmi_part_get(m, p, pass, t ? UCMI_POOL_LOOK : UCMI_POOL_EVICT, &slot);

    if (t && ((got == UCMI_POOL_MINE && !mend(c->blocks[slot], t)) || got == UCMI_POOL_FULL)) {
        ucmi_part_over(p, -ENOSPC, &pass->fin);
        return false;
    }
    switch (got) {
    case UCMI_POOL_READY:
        p->block = adopt(c, s, slot, pass->now_ns);
        if (t && p->block)
            mend(p->block, t);
        break;
    case UCMI_POOL_CLAIMED:
        p->block = ucmi_block_new(c, s, slot, false, pass->now_ns);
        if (!p->block) {
            ucmi_pool_drop(c->pool, slot);
            ucmi_pool_busy(c->pool, c->nblocks);
        }
        break;
    case UCMI_POOL_MINE: p->block = c->blocks[slot]; break;
    case UCMI_POOL_BUSY:
    case UCMI_POOL_FULL: ucmi_part_no_slot(m, p, got == UCMI_POOL_BUSY); return false;
    }
    if (!p->block) {
        ucmi_part_over(p, -ENOMEM, &pass->fin);
        return false;
    }
    p->block->users++;
    return true;
}

/* Copies the first run of shards that are missing, and comes back here for the next one. */
void ucmi_dump_place(struct mover *m, struct part *p, struct pass *pass)
{
    struct cache *c = m->c;
    const struct ucm_slice *s = part_slice(p);
    uint32_t end = s->shard + s->nshards;

    if (!p->block && !find_block(m, p, pass))
        return;
    struct block *b = p->block;
    if (p->job->given_up && !ucmi_block_has(b->ready, s->shard, end)) {
        p->block = NULL;
        ucmi_part_over(p, -ETIMEDOUT, &pass->fin);
        ucmi_block_unref(c, b, &pass->fin);
    } else if (ucmi_block_gap(b, s->shard, end, &p->from, &p->to)) {
        ucmi_block_begin(c, b, p->from, p->to, pass->now_ns);
        b->failed = false;
        p->state = PART_COPY;
        list_add(&pass->copies, &p->link);
        pass->bytes += (p->to - p->from) * c->geo->shard_size;
    } else if (ucmi_block_any(b->busy, s->shard, end)) {
        ucmi_part_wait(p, &b->waiters, PART_SHARDS);
    } else {
        m->moving--;
        ucmi_block_set(b->seen, s->shard, end);
        p->state = PART_RELEASED;
        list_add(&pass->fin, &p->link);
    }
}

void ucmi_dump_copied(struct cache *c, struct part *p, int err, struct link *fin)
{
    struct block *b = p->block;
    if (!err)
        b->dirty = true;
    ucmi_block_done(c, b, p->from, p->to, err, fin);
    if (!err) {
        ucmi_part_todo(p);
        return;
    }
    p->block = NULL;
    ucmi_part_over(p, err, fin);
    ucmi_block_unref(c, b, fin);
}

void ucmi_dump_queue(struct cache *c, struct block *b)
{
    b->below = BELOW_QUEUED;
    b->users++;
    list_add(&c->dirty, &b->link);
    ucmi_mover_kick(&c->out);
}

/* The sender knows that its memory is free; now the part waits until its block is stored. */
void ucmi_dump_join(struct cache *c, struct part *p, struct link *fin)
{
    struct block *b = p->block;
    p->block = NULL;
    if (b->whole && b->below == BELOW_UNKNOWN)
        ucmi_dump_queue(c, b);
    if (b->below == BELOW_KNOWN)
        ucmi_part_over(p, b->below_err, fin);
    else if (p->job->given_up)
        ucmi_part_over(p, -ETIMEDOUT, fin);
    else
        ucmi_part_wait(p, &b->stored, PART_STORING);
    ucmi_block_unref(c, b, fin);
}

/* ---- writing down ---- */

bool ucmi_dump_orphans(const struct mover *m)
{
    const struct cache *c = m->c;
    uint32_t nslots = c->pool->layout.nslots, most = MAX(MIN(nslots / 8, ORPHANS_MAX), 1);
    return c->orphan_at < nslots && c->norphans < most && list_empty(&c->dirty) &&
           list_empty(&m->unsent);
}

/* What a process that is gone was to write down, if that is such a slot.  It stays to be evicted
 * until then: it is worth no more than others. */
static void adopt_orphan(struct mover *m, struct pass *pass, uint32_t slot)
{
    struct cache *c = m->c;
    struct ucmi_pool_want what;
    if (!ucmi_pool_adopt(c->pool, slot, c->geo->rank, &what))
        return;
    struct ucm_slice s = {.key = what.key, .depth = what.depth};
    struct block *b = c->blocks[slot] ? NULL : ucmi_block_new(c, &s, slot, true, pass->now_ns);
    if (!b) { /* a dump has it: it is written down anyway */
        ucmi_pool_unpin(c->pool, slot);
        return;
    }
    b->below = BELOW_WRITING;
    b->orphan = true;
    c->norphans++;
    b->users++;
    if (!ucmi_child_add(m, pass, b, 0, c->geo->nshards, pass->now_ns + c->timeout_ns))
        ucmi_block_written(c, b, -ENOMEM, &pass->fin);
    ucmi_block_unref(c, b, &pass->fin);
}

/* Hands the blocks that are whole to the tier below, many at once; then, if it has room for more,
 * some of those that others left. */
void ucmi_dump_write(struct mover *m, struct pass *pass)
{
    struct cache *c = m->c;
    for (unsigned i = 0; i < ORPHAN_LOOKS && ucmi_dump_orphans(m); i++)
        adopt_orphan(m, pass, c->orphan_at++);
    for (unsigned i = 0; i < PASS_PARTS && list_empty(&m->unsent); i++) {
        struct link *l = list_take(&c->dirty);
        if (!l)
            return;
        struct block *b = LIST_ITEM(l, struct block, link);
        b->below = BELOW_WRITING;
        if (!ucmi_child_add(m, pass, b, 0, c->geo->nshards, pass->now_ns + c->timeout_ns))
            ucmi_block_written(c, b, -ENOMEM, &pass->fin);
        ucmi_block_unref(c, b, &pass->fin);
    }
}

void ucmi_dump_written(struct mover *m, struct event *e, struct link *fin)
{
    struct child_slice *cs = CONTAINER_OF(e, struct child_slice, e);
    if (!cs->err)
        ucmi_pool_stored(m->c->pool, cs->block->slot);
    if (!cs->err && cs->block->orphan)
        ucmi_count(m->c->counters, UCMI_CACHE_ADOPTED, 1);
    ucmi_block_written(m->c, cs->block, cs->err, fin);
    ucmi_block_unref(m->c, cs->block, fin);
    ucmi_child_unref(cs->child);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache_in.c - loads: from the pool to the engine, by way of the tier below where the pool does not
 * have the block.
 *
 * A load reads from below exactly the shards it needs and that nobody is bringing already, so a
 * load in groups streams layer by layer, and two loads of a block share one read.  All here runs on
 * the in mover with cache.lock held.
 */
#include "store/cache.h"

#include <stdlib.h>

static void copy(struct part *p, struct pass *pass)
{
    const struct ucm_slice *s = part_slice(p);
    p->from = s->shard;
    p->to = s->shard + s->nshards;
    p->state = PART_COPY;
    if (p->job->fetch_only) { /* that was all */
        ucmi_load_copied(p->job->m->c, p, 0, &pass->fin);
        return;
    }
    list_add(&pass->copies, &p->link);
    pass->bytes += s->nshards * p->job->m->c->geo->shard_size;
}

/* Gives the part its block; false if it has to wait, is on its way already, or has failed. */
static bool find_block(struct mover *m, struct part *p, struct pass *pass)
{
    struct cache *c = m->c;
    uint32_t slot;
    enum ucmi_pool_take take = p->known             ? UCMI_POOL_EVICT
                               : p->job->fetch_only ? UCMI_POOL_LOOK
                                                    : UCMI_POOL_FREE;
    enum ucmi_pool_got got = ucmi_part_get(m, p, pass, take, &slot);

    switch (got) {
    case UCMI_POOL_READY:
        ucmi_count(c->counters, UCMI_CACHE_HITS, 1);
        p->slot = slot;
        copy(p, pass);
        return false;
    case UCMI_POOL_CLAIMED:
        p->block = ucmi_block_new(c, part_slice(p), slot, false, pass->now_ns);
        if (!p->block) {
            ucmi_pool_drop(c->pool, slot);
            ucmi_part_over(p, -ENOMEM, &pass->fin);
            return false;
        }
        break;
    case UCMI_POOL_MINE: p->block = c->blocks[slot]; break;
    case UCMI_POOL_FULL:
        if (!p->known) {
            ucmi_part_wait(p, &c->unasked, PART_ASK);
            return false;
        } /* fall through */
    case UCMI_POOL_BUSY: ucmi_part_no_slot(m, p, got == UCMI_POOL_BUSY); return false;
    }
    p->block->users++;
    return true;
}

static void give_up(struct cache *c, struct part *p, int err, struct link *fin)
{
    struct block *b = p->block;
    p->block = NULL;
    ucmi_part_over(p, err, fin);
    ucmi_block_unref(c, b, fin);
}

void ucmi_load_place(struct mover *m, struct part *p, struct pass *pass)
{
    struct cache *c = m->c;
    const struct ucm_slice *s = part_slice(p);
    uint32_t end = s->shard + s->nshards, from, to;
    bool first = !p->block;

    if (first && !find_block(m, p, pass))
        return;
    struct block *b = p->block;
    if (p->err) {
        give_up(c, p, p->err, &pass->fin);
        return;
    }
    if (ucmi_block_has(b->ready, s->shard, end)) {
        if (first)
            ucmi_count(c->counters, UCMI_CACHE_HITS, 1);
        copy(p, pass);
        return;
    }
    while (ucmi_block_gap(b, s->shard, end, &from, &to)) {
        if (!ucmi_child_add(m, pass, b, from, to, p->job->deadline_ns)) {
            give_up(c, p, -ENOMEM, &pass->fin);
            return;
        }
        ucmi_block_begin(c, b, from, to, pass->now_ns);
        ucmi_count(c->counters, UCMI_CACHE_FILLS, 1);
    }
    ucmi_part_wait(p, &b->waiters, PART_SHARDS);
}

void ucmi_load_copied(struct cache *c, struct part *p, int err, struct link *fin)
{
    struct block *b = p->block;
    p->block = NULL;
    ucmi_part_over(p, err, fin);
    if (b) {
        ucmi_block_unref(c, b, fin);
    } else {
        ucmi_pool_unpin(c->pool, p->slot);
        ucmi_cache_freed(c, p->slot);
    }
}

/* A read from the tier below has ended; now, and not before, may its slot be given back. */
void ucmi_load_read(struct mover *m, struct event *e, struct link *fin)
{
    struct child_slice *cs = CONTAINER_OF(e, struct child_slice, e);
    struct child *ch = cs->child;
    struct block *b = cs->block;
    const struct ucm_slice *s = &ch->v[cs - ch->part];

    ucmi_block_done(m->c, b, s->shard, s->shard + s->nshards, cs->err, fin);
    if (cs->err && !b->dirty)
        b->failed = true;
    ucmi_block_unref(m->c, b, fin);
    ucmi_child_unref(ch);
}

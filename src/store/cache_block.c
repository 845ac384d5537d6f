/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache_block.c - blocks that this process fills or writes down, and the xfers to the tier below
 * that do it.
 *
 * Each shard of a block is missing, busy (a copy or a read into it is under way) or ready.  Only
 * who found a shard missing may make it busy, so that no two writers ever meet in a slot; and a
 * block lives as long as it has users, so that its slot is never given back while something may
 * still write into it or read from it, whatever became of the parts that wanted it.
 *
 * Both movers come here, with cache.lock held; only ucmi_child_send and ucmi_child_fail are called
 * without it.
 */
#include "store/cache.h"

#include <stdlib.h>

/* ---- bits ---- */

static uint64_t bits_of(uint32_t word, uint32_t from, uint32_t to)
{
    uint32_t lo = MAX(from, word * 64), hi = MIN(to, word * 64 + 64);
    return lo < hi ? UINT64_MAX >> (64 - (hi - lo)) << lo % 64 : 0;
}

bool ucmi_block_has(const uint64_t *bits, uint32_t from, uint32_t to)
{
    for (uint32_t i = from / 64; i * 64 < to; i++) {
        uint64_t mask = bits_of(i, from, to);
        if ((bits[i] & mask) != mask)
            return false;
    }
    return true;
}

bool ucmi_block_any(const uint64_t *bits, uint32_t from, uint32_t to)
{
    for (uint32_t i = from / 64; i * 64 < to; i++)
        if (bits[i] & bits_of(i, from, to))
            return true;
    return false;
}

void ucmi_block_set(uint64_t *bits, uint32_t from, uint32_t to)
{
    for (uint32_t i = from / 64; i * 64 < to; i++)
        bits[i] |= bits_of(i, from, to);
}

static bool missing(const struct block *b, uint32_t shard)
{
    return !((b->ready[shard / 64] | b->busy[shard / 64]) >> shard % 64 & 1);
}

bool ucmi_block_gap(const struct block *b, uint32_t from, uint32_t to, uint32_t *gap_from,
                    uint32_t *gap_to)
{
    while (from < to && !missing(b, from))
        from++;
    if (from == to)
        return false;
    *gap_from = from;
    while (from < to && missing(b, from))
        from++;
    *gap_to = from;
    return true;
}

/* ---- blocks ---- */

struct block *ucmi_block_new(struct cache *c, const struct ucm_slice *s, uint32_t slot, bool whole,
                             uint64_t now_ns)
{
    struct block *b = calloc(1, sizeof *b);
    if (!b)
        return NULL;
    list_init(&b->link);
    list_init(&b->waiters);
    list_init(&b->stored);
    b->key = s->key;
    b->depth = s->depth;
    b->slot = slot;
    b->whole = whole;
    b->touched_ns = now_ns;
    c->blocks[slot] = b;
    ucmi_pool_busy(c->pool, ++c->nblocks);
    if (whole) {
        b->nready = c->geo->nshards;
        ucmi_block_set(b->ready, 0, c->geo->nshards);
    } else {
        list_add(&c->making, &b->link);
    }
    return b;
}

void ucmi_block_begin(struct cache *c, struct block *b, uint32_t from, uint32_t to, uint64_t now_ns)
{
    ucmi_block_set(b->busy, from, to);
    b->touched_ns = now_ns;
    list_del(&b->link);
    list_add(&c->making, &b->link);
}

/* Those who wait for shards that are no longer on their way look again.  Whose time was up when the
 * read was given up is not known here: who has some left sends for them himself. */
static void wake(struct block *b, uint32_t from, uint32_t to, int err)
{
    uint64_t now_ns = err == -ETIMEDOUT ? ucmi_now_ns() : UINT64_MAX;
    for (struct link *l = b->waiters.next, *next; l != &b->waiters; l = next) {
        next = l->next;
        struct part *p = LIST_ITEM(l, struct part, link);
        const struct ucm_slice *s = part_slice(p);
        uint32_t end = s->shard + s->nshards;
        if (s->shard >= to || end <= from)
            continue;
        if (err && !p->job->x->dump &&
            p->job->deadline_ns <= now_ns) /* a dump brings them itself */
            p->err = err;
        if (p->err || !ucmi_block_any(b->busy, s->shard, end))
            ucmi_part_todo(p);
    }
}

static void make_whole(struct cache *c, struct block *b)
{
    list_del(&b->link);
    if (b->dirty)
        ucmi_pool_unstored(c->pool, b->slot);
    ucmi_pool_publish(c->pool, b->slot);
    b->whole = true;
    b->below = BELOW_KNOWN;
    if (b->dirty)
        ucmi_dump_queue(c, b);
}

/* The way of these shards has ended: they are there, or err says why not. */
void ucmi_block_done(struct cache *c, struct block *b, uint32_t from, uint32_t to, int err,
                     struct link *fin)
{
    for (uint32_t i = from / 64; i * 64 < to; i++) {
        b->busy[i] &= ~bits_of(i, from, to);
        if (!err)
            b->ready[i] |= bits_of(i, from, to);
    }
    if (!err)
        b->nready += to - from;
    if (b->nready == c->geo->nshards) {
        make_whole(c, b);
        if (b->below == BELOW_KNOWN)
            ucmi_block_written(c, b, 0, fin);
    }
    wake(b, from, to, err);
}

/* What the tier below made of the block: those who wait for STORED learn it. */
void ucmi_block_written(struct cache *c, struct block *b, int err, struct link *fin)
{
    b->below = BELOW_KNOWN;
    b->below_err = err;
    for (struct link *l; (l = list_take(&b->stored));)
        ucmi_part_over(LIST_ITEM(l, struct part, link), err, fin);
}

/* Nobody uses the block: its slot is READY for all, or free again. */
void ucmi_block_end(struct cache *c, struct block *b, int err, struct link *fin)
{
    ucmi_dump_torn(c, b);
    ucmi_block_written(c, b, err, fin);
    list_del(&b->link);
    c->blocks[b->slot] = NULL;
    ucmi_pool_busy(c->pool, --c->nblocks);
    c->norphans -= b->orphan;
    if (b->whole)
        ucmi_pool_unpin(c->pool, b->slot);
    else
        ucmi_pool_drop(c->pool, b->slot);
    ucmi_cache_freed(c, b->slot);
    free(b);
}

void ucmi_block_unref(struct cache *c, struct block *b, struct link *fin)
{
    if (--b->users)
        return;
    if (b->whole)
        ucmi_block_end(c, b, b->below_err, fin);
    else if (b->nready == 0 || b->failed)
        ucmi_block_end(c, b, -EIO, fin);
}

/* ---- children ---- */

/* From any thread, also from within submit. */
static void child_done(struct ucm_xfer *x, struct ucm_slice *s, enum ucm_stage stage, int err)
{
    struct child *ch = CONTAINER_OF(x, struct child, x);
    struct child_slice *cs = &ch->part[s - ch->v];
    if (x->dump && stage == UCM_RELEASED)
        return; /* the slot stays pinned until the block is stored */
    cs->err = err;
    ucmi_mover_return(ch->m, &cs->e);
}

static struct child *child_new(struct mover *m, uint64_t deadline_ns)
{
    struct child *ch = malloc(sizeof *ch);
    if (!ch)
        return NULL;
    ch->x = (struct ucm_xfer){
        .dump = m->out,
        .deadline_ns = deadline_ns,
        .v = ch->v,
        .done = child_done,
    };
    ch->m = m;
    ch->left = 0;
    m->nchildren++;
    return ch;
}

/* One more run of shards between a slot and the tier below; the block gets a user.  NULL: no
 * memory. */
struct child_slice *ucmi_child_add(struct mover *m, struct pass *pass, struct block *b,
                                   uint32_t from, uint32_t to, uint64_t deadline_ns)
{
    struct cache *c = m->c;
    struct child *ch =
        list_empty(&pass->children) ? NULL : LIST_ITEM(pass->children.prev, struct child, link);
    if (!ch || ch->x.n == CHILD_MAX || ch->x.deadline_ns != deadline_ns) {
        ch = child_new(m, deadline_ns);
        if (!ch)
            return NULL;
        list_add(&pass->children, &ch->link);
    }
    uint64_t shard = c->geo->shard_size;
    struct child_slice *cs = &ch->part[ch->x.n];
    cs->child = ch;
    cs->block = b;
    cs->e.handle = m->out ? ucmi_dump_written : ucmi_load_read;
    cs->iov =
        (struct iovec){ucmi_pool_memory(c->pool, b->slot) + from * shard, (to - from) * shard};
    ch->v[ch->x.n] = (struct ucm_slice){
        .key = b->key,
        .depth = b->depth,
        .shard = from,
        .nshards = to - from,
        .niov = 1,
        .at.iov = &cs->iov,
    };
    ch->x.n++;
    ch->left++;
    b->users++;
    return cs;
}

/* All slices of a child that the tier below has not taken end with err. */
void ucmi_child_fail(struct child *ch, int err)
{
    struct mover *m = ch->m;
    for (uint32_t i = 0, n = ch->x.n; i < n; i++) {
        ch->part[i].err = err;
        ucmi_mover_post(m, &ch->part[i].e);
    }
}

/* False: the tier below has no room now. */
static bool submit(struct mover *m, struct child *ch)
{
    struct ucm_tier *next = m->c->t->next;
    uint32_t n = ch->x.n; /* it may be gone when submit returns */
    ucmi_mover_lend(m, n);
    int err = next->ops->submit(next, &ch->x);
    if (!err)
        return true;
    ucmi_mover_lend(m, -(size_t)n);
    if (err != -EAGAIN)
        ucmi_child_fail(ch, err);
    return err != -EAGAIN;
}

void ucmi_child_send(struct mover *m, struct child *ch)
{
    if (!list_empty(&m->unsent) || !submit(m, ch))
        list_add(&m->unsent, &ch->link);
}

/* Tries again what the tier below had no room for, in order. */
void ucmi_child_resend(struct mover *m)
{
    uint64_t now = ucmi_now_ns();
    for (struct link *l; (l = list_take(&m->unsent));) {
        struct child *ch = LIST_ITEM(l, struct child, link);
        if (now > ch->x.deadline_ns) {
            ucmi_child_fail(ch, -ETIMEDOUT);
        } else if (!submit(m, ch)) {
            list_add(m->unsent.next, l); /* before the first: it is the first again */
            return;
        }
    }
}

void ucmi_child_unref(struct child *ch)
{
    struct mover *m = ch->m;
    m->resend = true; /* the tier below may have room again */
    if (--ch->left)
        return;
    m->nchildren--;
    free(ch);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Maps: where an engine keeps its blocks.  Pure address arithmetic; a map does not change after it
 * is made, so any thread may use it.  Tasks keep the map they work on: freeing it while a task is
 * under way is safe (the memory it names is another matter).
 */
#include "store/store.h"

#include <stdlib.h>

int ucm_map_new(ucm_store *s, const struct ucm_map_desc *d, ucm_map **map_p)
{
    if (!s || !d || !map_p || !d->segs || !d->nsegs || !d->blocks_per_key)
        return -EINVAL;
    if (d->nshards != s->geo.nshards || d->nsegs > 4096 || d->blocks_per_key > 4096)
        return -EINVAL;
    for (unsigned sh = 0; sh < d->nshards; sh++) {
        uint64_t sum = 0;
        for (unsigned i = 0; i < d->nsegs; i++) {
            const struct ucm_seg *seg = &d->segs[sh * d->nsegs + i];
            if (seg->len > s->geo.shard_size || (seg->len && !seg->base))
                return -EINVAL;
            sum += (uint64_t)seg->len * d->blocks_per_key;
        }
        if (sum != s->geo.shard_size)
            return -EINVAL;
    }
    size_t nsegs = (size_t)d->nshards * d->nsegs;
    ucm_map *m = malloc(sizeof *m + nsegs * sizeof m->segs[0]);
    if (!m)
        return -ENOMEM;
    m->store = s;
    atomic_init(&m->refs, 1);
    m->nshards = d->nshards;
    m->nsegs = d->nsegs;
    m->blocks_per_key = d->blocks_per_key;
    m->nblocks = d->nblocks;
    memcpy(m->segs, d->segs, nsegs * sizeof m->segs[0]);
    *map_p = m;
    return 0;
}

void ucmi_map_ref(ucm_map *m)
{
    atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
}

void ucm_map_free(ucm_map *m)
{
    if (m && atomic_fetch_sub_explicit(&m->refs, 1, memory_order_acq_rel) == 1)
        free(m);
}

/* Segments that lie among one another are of one allocation.  Two that only adjoin may be of two,
 * which happen to be neighbours, and no device copies from one into the next. */
static bool are_mixed(const ucm_map *m, const struct ucm_seg *a, const struct ucm_seg *b)
{
    const char *p = a->base, *q = b->base;
    size_t last = m->nblocks ? m->nblocks - 1 : 0;
    return p < q + last * b->stride + b->len && q < p + last * a->stride + a->len;
}

/* Neighbours in memory become one piece: an engine whose layer is one run of bytes per block costs
 * one piece per shard, one whose blocks are contiguous over all layers one piece per block. */
size_t ucm_slice_pieces(const struct ucm_xfer *x, const struct ucm_slice *s, struct iovec *iov,
                        size_t max)
{
    if (s->niov) {
        for (size_t i = 0; i < s->niov && i < max; i++)
            iov[i] = s->at.iov[i];
        return s->niov;
    }
    const ucm_map *m = x->map;
    const struct ucm_seg *before = NULL;
    size_t n = 0;
    char *end = NULL;
    for (uint32_t sh = s->shard; sh < s->shard + s->nshards; sh++) {
        const struct ucm_seg *segs = &m->segs[(size_t)sh * m->nsegs];
        for (unsigned b = 0; b < m->blocks_per_key; b++) {
            for (const struct ucm_seg *seg = segs; seg < segs + m->nsegs; seg++) {
                if (seg->len == 0)
                    continue;
                char *p = (char *)seg->base + (size_t)s->at.blocks[b] * seg->stride;
                if (p != end || (before != seg && !are_mixed(m, before, seg))) {
                    if (n < max)
                        iov[n] = (struct iovec){p, 0};
                    n++;
                }
                if (n <= max)
                    iov[n - 1].iov_len += seg->len;
                end = p + seg->len;
                before = seg;
            }
        }
    }
    return n;
}

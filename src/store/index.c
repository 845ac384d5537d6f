/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index of blocks: linear probing over 32-byte entries, at most two thirds full, with deletion
 * by shifting back, so that there are no tombstones and a miss ends at the first empty entry.  A
 * batch of keys is probed with the cache lines of the next ones already on their way: that is what
 * makes ten million lookups a second, the table being far larger than any cache.
 */
#include "store/index.h"

#include <stdlib.h>
#include <sys/mman.h>

enum { MIN_BITS = 10, AHEAD = 16, HUGE_PAGE = 2 << 20 };

static size_t home(const struct ucmi_index *ix, const ucm_key *key, uint16_t rank)
{
    return ucmi_key_word(key, rank) >> (64 - ix->bits);
}

void ucmi_index_prefetch(const struct ucmi_index *ix, const ucm_key *key, uint16_t rank)
{
    const struct ucmi_entry *at = &ix->v[home(ix, key, rank)];
    __builtin_prefetch(at);
    __builtin_prefetch(at + 2);
}

static size_t table_bytes(unsigned bits)
{
    return ROUND_UP(sizeof(struct ucmi_entry) << bits, (size_t)UCMI_PAGE);
}

/* Zeroed pages straight from the system: a table is empty without being written. */
static struct ucmi_entry *table_new(unsigned bits)
{
    size_t len = table_bytes(bits);
    void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    if (len >= HUGE_PAGE)
        madvise(p, len, MADV_HUGEPAGE); /* a wish: without it probes miss the TLB as well */
    return p;
}

int ucmi_index_init(struct ucmi_index *ix)
{
    *ix = (struct ucmi_index){.v = table_new(MIN_BITS), .bits = MIN_BITS};
    return ix->v ? 0 : -ENOMEM;
}

void ucmi_index_destroy(struct ucmi_index *ix)
{
    if (ix->v)
        munmap(ix->v, table_bytes(ix->bits));
    free(ix->gone);
    *ix = (struct ucmi_index){0};
}

static bool same_block(const struct ucmi_entry *e, const ucm_key *key, uint16_t rank)
{
    return ucmi_key_eq(&e->key, key) && e->rank == rank;
}

static void copy_entry(struct ucmi_entry *to, const struct ucmi_entry *from)
{
    to->key = from->key;
    to->place = from->place;
    to->header_sum = from->header_sum;
    atomic_store_explicit(&to->seen, atomic_load_explicit(&from->seen, memory_order_relaxed),
                          memory_order_relaxed);
    to->lane = from->lane;
    to->rank = from->rank;
}

static void add(struct ucmi_index *ix, const struct ucmi_entry *e)
{
    size_t mask = ((size_t)1 << ix->bits) - 1, i = home(ix, &e->key, e->rank);
    while (ix->v[i].lane)
        i = (i + 1) & mask;
    copy_entry(&ix->v[i], e);
    ix->count++;
}

int ucmi_index_reserve(struct ucmi_index *ix, size_t n)
{
    struct ucmi_index bigger = {.bits = ix->bits, .gone = ix->gone};
    while (n * 3 > (size_t)2 << bigger.bits)
        bigger.bits++;
    if (bigger.bits == ix->bits)
        return 0;
    bigger.v = table_new(bigger.bits);
    if (!bigger.v)
        return -ENOMEM;
    for (size_t i = 0; i < (size_t)1 << ix->bits; i++)
        if (ix->v[i].lane)
            add(&bigger, &ix->v[i]);
    munmap(ix->v, table_bytes(ix->bits));
    *ix = bigger;
    return 0;
}

int ucmi_index_put(struct ucmi_index *ix, const struct ucmi_entry *e)
{
    struct ucmi_entry *there = ucmi_index_find(ix, &e->key, e->rank, e->lane);
    if (there) {
        copy_entry(there, e);
        return 1;
    }
    int err = ucmi_index_reserve(ix, ix->count + 1);
    if (!err)
        add(ix, e);
    return err;
}

struct ucmi_entry *ucmi_index_find(const struct ucmi_index *ix, const ucm_key *key, uint16_t rank,
                                   uint16_t lane)
{
    size_t mask = ((size_t)1 << ix->bits) - 1;
    for (size_t i = home(ix, key, rank); ix->v[i].lane; i = (i + 1) & mask)
        if (same_block(&ix->v[i], key, rank) && (!lane || ix->v[i].lane == lane))
            return &ix->v[i];
    return NULL;
}

static void take_out(struct ucmi_index *ix, struct ucmi_entry *e)
{
    size_t mask = ((size_t)1 << ix->bits) - 1, hole = (size_t)(e - ix->v);
    for (size_t i = (hole + 1) & mask; ix->v[i].lane; i = (i + 1) & mask) {
        /* An entry may move back into the hole unless its home lies behind the hole. */
        size_t h = home(ix, &ix->v[i].key, ix->v[i].rank);
        if (((i - h) & mask) >= ((i - hole) & mask)) {
            copy_entry(&ix->v[hole], &ix->v[i]);
            hole = i;
        }
    }
    ix->v[hole].lane = 0;
    ix->count--;
}

void ucmi_index_remove(struct ucmi_index *ix, struct ucmi_entry *e)
{
    struct ucmi_gone *g = ix->gone;
    if (g && g->n == UCMI_GONE) {
        g->lost++;
    } else if (g) {
        uint32_t at = (g->first + g->n++) % UCMI_GONE;
        g->v[at].key = e->key;
        g->v[at].rank = e->rank;
    }
    take_out(ix, e);
}

/* Mostly its journal is read anew at once, so what was in it is not named: it may be there again.
 */
size_t ucmi_index_drop_lane(struct ucmi_index *ix, uint16_t lane)
{
    size_t before = ix->count;
    for (size_t i = 0; i < (size_t)1 << ix->bits; i++)
        while (ix->v[i].lane == lane)
            take_out(ix, &ix->v[i]);
    if (ix->gone)
        ix->gone->lost += before - ix->count;
    return before - ix->count;
}

ssize_t ucmi_index_gone(struct ucmi_index *ix, ucm_key *keys, size_t n, uint64_t *lost)
{
    struct ucmi_gone *g = ix->gone;
    size_t told = 0;
    if (!g) {
        ix->gone = calloc(1, sizeof *g);
        return ix->gone ? 0 : -ENOMEM;
    }
    for (; g->n && told < n; g->n--, g->first = (g->first + 1) % UCMI_GONE)
        if (!ucmi_index_find(ix, &g->v[g->first].key, g->v[g->first].rank, 0))
            keys[told++] = g->v[g->first].key;
    *lost += g->lost;
    g->lost = 0;
    return (ssize_t)told;
}

static bool probe(const struct ucmi_index *ix, size_t i, const ucm_key *key, uint16_t rank,
                  uint32_t now)
{
    size_t mask = ((size_t)1 << ix->bits) - 1;
    for (; ix->v[i].lane; i = (i + 1) & mask) {
        struct ucmi_entry *e = &ix->v[i];
        if (!same_block(e, key, rank))
            continue;
        /* Written only when it grows: lookups of many threads share the line else, and who has
         * loaded a block does not end the lease of who is going to.  Or when it cannot be: that is
         * later than the lease of who looks up now. */
        uint32_t seen = atomic_load_explicit(&e->seen, memory_order_relaxed);
        if (seen < now || (now && seen > now + 2 * UCMI_LEASE_S))
            atomic_store_explicit(&e->seen, now, memory_order_relaxed);
        return true;
    }
    return false;
}

size_t ucmi_index_probe(const struct ucmi_index *ix, const ucm_key *keys, size_t n, uint16_t rank,
                        uint32_t now, uint8_t level, uint8_t *found)
{
    size_t at[AHEAD], missed = 0;
    for (size_t i = 0; i < n + AHEAD; i++) {
        size_t done = i - AHEAD; /* what was prefetched AHEAD steps ago */
        if (i >= AHEAD && !found[done]) {
            if (probe(ix, at[done % AHEAD], &keys[done], rank, now))
                found[done] = level;
            else
                missed++;
        }
        if (i < n) {
            at[i % AHEAD] = home(ix, &keys[i], rank);
            __builtin_prefetch(&ix->v[at[i % AHEAD]]);
        }
    }
    return missed;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * index.h - which lanes hold which blocks: open addressing over (key, rank) in RAM.
 *
 * The same block may lie in several lanes: each has an entry of its own.  The caller locks: changes
 * alone, ucmi_index_probe and ucmi_index_find together with each other.
 */
#ifndef UCMI_INDEX_H
#define UCMI_INDEX_H

#include "base/base.h"

struct ucmi_entry {
    ucm_key key;
    uint32_t place; /* segment * slots + slot of its lane */
    uint32_t header_sum;
    _Atomic uint32_t seen; /* second of the last lookup that found it; set by probes */
    uint16_t lane;         /* 0: an empty entry */
    uint16_t rank;
};
_Static_assert(sizeof(struct ucmi_entry) == 32, "two entries a cache line");

/* A block that a lookup has found is not evicted for so long.  Who was seen later than now was seen
 * by a clock that has been set back since: that says nothing. */
enum { UCMI_LEASE_S = 10 };
static inline bool ucmi_lease_lasts(uint32_t seen, uint32_t now)
{
    return seen <= now + UCMI_LEASE_S && now < seen + UCMI_LEASE_S;
}

enum { UCMI_GONE = 1 << 16 };
struct ucmi_gone { /* what has been taken out and not been told; a ring */
    uint64_t lost; /* besides */
    uint32_t first, n;
    struct {
        ucm_key key;
        uint16_t rank;
    } v[UCMI_GONE];
};
struct ucmi_index {
    struct ucmi_entry *v;
    unsigned bits;
    size_t count;
    struct ucmi_gone *gone; /* NULL: nobody has asked */
};

int ucmi_index_init(struct ucmi_index *ix);
void ucmi_index_destroy(struct ucmi_index *ix);
/* Room for n entries at once, instead of by doubling.  -ENOMEM. */
int ucmi_index_reserve(struct ucmi_index *ix, size_t n);
/* 0: the entry was added; 1: it has overwritten that of the same key, rank and lane.  -ENOMEM. */
int ucmi_index_put(struct ucmi_index *ix, const struct ucmi_entry *e);
/* The first entry of key and rank, of any lane (lane 0) or of this one; NULL: none. */
struct ucmi_entry *ucmi_index_find(const struct ucmi_index *ix, const ucm_key *key, uint16_t rank,
                                   uint16_t lane);
/* Begins to fetch from memory where that entry is or would be: finding it soon costs no wait. */
void ucmi_index_prefetch(const struct ucmi_index *ix, const ucm_key *key, uint16_t rank);
/* Takes out an entry that ucmi_index_find returned; others move. */
void ucmi_index_remove(struct ucmi_index *ix, struct ucmi_entry *e);
/* Takes out all entries of a lane; returns how many. */
size_t ucmi_index_drop_lane(struct ucmi_index *ix, uint16_t lane);
/* The keys of up to n entries that were taken out since, are in no lane now, and have not been told
 * yet; adds how many cannot be told to *lost.  The first call has them kept.  -ENOMEM. */
ssize_t ucmi_index_gone(struct ucmi_index *ix, ucm_key *keys, size_t n, uint64_t *lost);
/* Sets found[i] to level for each key there; skips those whose found[i] is not 0.  now: seconds,
 * for `seen`; 0: leaves it.  Returns how many remain 0. */
size_t ucmi_index_probe(const struct ucmi_index *ix, const ucm_key *keys, size_t n, uint16_t rank,
                        uint32_t now, uint8_t level, uint8_t *found);

#endif

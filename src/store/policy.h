/* SPDX-License-Identifier: Apache-2.0 */
/*
 * policy.h - what is kept when there is no room for all: one rule for DRAM and disk.
 *
 * The block with the lowest score goes first.  The score is the tick of the last use, and two spans
 * later for a block that has been used again.  The span is learnt: how long a block takes, in the
 * mean, from its first use to the second.  So where blocks go long before they could be wanted
 * again, those known to be wanted stay, and where all that will come back have room, it is LRU.
 * Within a tick tails go before heads: a block is of no use without those before it.
 *
 * When a block goes, that it was there is kept in a ghost of eight bytes, until six times as many
 * blocks have gone as the tier has: one that comes back by then has been used again.
 *
 * All that is dumped is taken in, for what is STORED can be loaded: a block used only once is the
 * first to go, not one that never came.
 *
 * bench/replay plays real requests to this rule and to others; bench/README.md has the figures.
 *
 * Threads: any, without a lock.  What two that meet make of a ghost or of the span is advice that
 * is lost, no more.  The span may lie in shared memory; whatever is found there will do.
 */
#ifndef UCMI_POLICY_H
#define UCMI_POLICY_H

#include "base/base.h"

struct ucmi_policy {
    _Atomic uint64_t *span;   /* the mean in ticks << 28 | of how many, up to 4095 */
    _Atomic uint64_t *ghosts; /* last use << 40 | number << 16 | part of the hash << 1 | again */
    uint32_t lines, reach;    /* of ghosts; a ghost counts until so many more blocks went */
    _Atomic uint32_t gone;    /* how many went */
};

/* For a tier of so many blocks.  -ENOMEM. */
int ucmi_policy_open(struct ucmi_policy *p, _Atomic uint64_t *span, uint64_t nblocks);
void ucmi_policy_close(struct ucmi_policy *p);

/* A block comes in: has it been used before? */
bool ucmi_policy_enter(const struct ucmi_policy *p, uint64_t hash, uint32_t now);
/* It is used: has it been used before, now that it is?  What happens within a tick is one use. */
bool ucmi_policy_again(const struct ucmi_policy *p, bool again, uint32_t last, uint32_t now);
/* It goes. */
void ucmi_policy_leave(struct ucmi_policy *p, uint64_t hash, bool again, uint32_t last);
/* In ticks. */
uint32_t ucmi_policy_span(const struct ucmi_policy *p);

/* The lowest goes first. */
static inline uint64_t ucmi_policy_score(uint32_t span, bool again, uint32_t last, uint32_t depth)
{
    uint64_t tick = last + (again ? 2 * (uint64_t)span : 0);
    return MIN(tick, (uint64_t)UINT32_MAX) << 32 | (UINT32_MAX - depth);
}

#endif

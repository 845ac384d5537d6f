/* SPDX-License-Identifier: Apache-2.0 */
/*
 * policy.c - ghosts, and the span between the first use of a block and the second.
 *
 * A ghost lies in the line that its hash names, the latest first.  There are twice as many places
 * as ghosts that count, so that hardly a line overflows: chains with holes would be worth little.
 */
#include "store/policy.h"

#include <stdlib.h>

enum {
    COUNT_BITS = 12, /* of the span's word */
    COUNT_MAX = (1 << COUNT_BITS) - 1,
    FRACTION_BITS = 16,
    LINE = 16,
    REACH = 6, /* ghosts that count, times the blocks of the tier */
    MIN_LINES = 32,
    MAX_LINES = 1 << 18, /* 32 MiB, of which what is written costs memory */
    TAG_BITS = 15,       /* of the hash, in a ghost */
    NUMBER_BITS = 24,
    TICK_BITS = 24
};
#define MASK(bits) ((UINT64_C(1) << (bits)) - 1)

int ucmi_policy_open(struct ucmi_policy *p, _Atomic uint64_t *span, uint64_t nblocks)
{
    uint64_t lines = MIN(nblocks, (uint64_t)MAX_LINES * LINE) * 2 * REACH / LINE;
    p->lines = (uint32_t)MIN(MAX(lines, (uint64_t)MIN_LINES), (uint64_t)MAX_LINES);
    p->reach = (uint32_t)MIN(nblocks * REACH, (uint64_t)MAX_LINES * LINE / 2);
    p->span = span;
    p->ghosts = calloc((size_t)p->lines * LINE, sizeof *p->ghosts);
    return p->ghosts ? 0 : -ENOMEM;
}

void ucmi_policy_close(struct ucmi_policy *p)
{
    free((void *)p->ghosts);
    p->ghosts = NULL;
}

uint32_t ucmi_policy_span(const struct ucmi_policy *p)
{
    return (uint32_t)(atomic_load_explicit(p->span, memory_order_relaxed) >>
                      (COUNT_BITS + FRACTION_BITS));
}

/* The mean of all there were, then of the last few thousand: it follows a change of habits. */
static void learn(const struct ucmi_policy *p, uint32_t interval)
{
    uint64_t word = atomic_load_explicit(p->span, memory_order_relaxed);
    int64_t mean = (int64_t)(word >> COUNT_BITS), n = word & COUNT_MAX;
    n = MIN(n + 1, (int64_t)COUNT_MAX);
    mean += (((int64_t)interval << FRACTION_BITS) - mean) / n;
    atomic_store_explicit(p->span, (uint64_t)mean << COUNT_BITS | (uint64_t)n,
                          memory_order_relaxed);
}

bool ucmi_policy_again(const struct ucmi_policy *p, bool again, uint32_t last, uint32_t now)
{
    if (now <= last)
        return again;
    if (!again)
        learn(p, now - last);
    return true;
}

/* ---- ghosts ---- */

static _Atomic uint64_t *line_of(const struct ucmi_policy *p, uint64_t hash)
{
    return p->ghosts + ((hash >> 32) * p->lines >> 32) * LINE;
}

static bool same(uint64_t ghost, uint64_t hash)
{
    return ghost && (ghost >> 1 & MASK(TAG_BITS)) == (hash & MASK(TAG_BITS));
}

bool ucmi_policy_enter(const struct ucmi_policy *p, uint64_t hash, uint32_t now)
{
    _Atomic uint64_t *line = line_of(p, hash);
    uint32_t gone = atomic_load_explicit(&p->gone, memory_order_relaxed);
    for (unsigned i = 0; i < LINE; i++) {
        uint64_t ghost = atomic_load_explicit(&line[i], memory_order_relaxed);
        if (!same(ghost, hash))
            continue;
        if (((gone - (ghost >> 16)) & MASK(NUMBER_BITS)) >= p->reach)
            return false;
        uint32_t ago = (uint32_t)((now - (ghost >> 40)) & MASK(TICK_BITS));
        if (ago > MASK(TICK_BITS) / 2) /* it was leased until later than now */
            ago = 0;
        return ucmi_policy_again(p, ghost & 1, now - ago, now);
    }
    return false;
}

void ucmi_policy_leave(struct ucmi_policy *p, uint64_t hash, bool again, uint32_t last)
{
    _Atomic uint64_t *line = line_of(p, hash);
    uint64_t number = atomic_fetch_add_explicit(&p->gone, 1, memory_order_relaxed) + 1;
    uint64_t ghost = (uint64_t)last << 40 | (number & MASK(NUMBER_BITS)) << 16 |
                     (hash & MASK(TAG_BITS)) << 1 | again;
    for (unsigned i = 0; ghost && i < LINE; i++) {
        ghost = atomic_exchange_explicit(&line[i], ghost, memory_order_relaxed);
        if (same(ghost, hash))
            return; /* what was known of it before */
    }
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.c - the slots of the pool: finding a block, claiming and evicting, pins, lookups, and what
 * becomes of the slots of a dead process.  The protocol is in pool.h.
 *
 * Works on shared memory with atomics only; every access is sequentially consistent where two
 * processes cross (word against holders, tag against tag), which costs nothing for loads on x86 and
 * little on ARM.  The process's own pin counts are under pool.lock, a leaf.
 */
#include "store/pool.h"

#include <stdlib.h>

enum {
    TICK_SHIFT = 30,   /* a tick is 2^30 ns, a second: blocks used together get the same one */
    LEASE_TICKS = 10,  /* from a lookup to the load it announces */
    TRIES = 8,         /* claims that meet another claim to the same block */
    EVICT_TRIES = 128, /* victims that turn out to be in use */
    AHEAD = 32,        /* keys of a lookup whose lines are fetched together */
    NOBODY = 0xff,     /* an owner that is no process */
};

struct where { /* of a block */
    uint32_t sets[2], nsets;
    uint16_t tag;
    uint64_t key[2];
    uint32_t rank;
};

static uint64_t make_word(uint64_t generation, unsigned owner, enum ucmi_slot_state state)
{
    return generation << 16 | (uint64_t)owner << 8 | (uint64_t)state;
}

static enum ucmi_slot_state state_of(uint64_t word)
{
    return (enum ucmi_slot_state)(word & 0xff);
}

static unsigned owner_of(uint64_t word)
{
    return (unsigned)(word >> 8 & 0xff);
}

static uint32_t tick_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint32_t)(((uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec) >> TICK_SHIFT);
}

static struct where locate(const struct ucmi_pool *p, const ucm_key *key, uint32_t rank)
{
    uint64_t h = ucmi_hash64(key->b, sizeof key->b, rank), nsets = p->layout.nsets;
    struct where w = {
        .sets = {(uint32_t)((h >> 32) * nsets >> 32), (uint32_t)((h & UINT32_MAX) * nsets >> 32)},
        .nsets = nsets > 1 ? 2 : 1,
        .tag = (uint16_t)(h * 0x9e3779b97f4a7c15u >> 48),
        .rank = rank,
    };
    if (w.sets[0] == w.sets[1] && nsets > 1)
        w.sets[1] = w.sets[1] + 1 < nsets ? w.sets[1] + 1 : 0;
    w.tag += !w.tag; /* 0 means that the slot is free */
    memcpy(w.key, key->b, sizeof w.key);
    return w;
}

void ucmi_pool_sets(const struct ucmi_pool *p, const ucm_key *key, uint32_t rank, uint32_t sets[2])
{
    struct where w = locate(p, key, rank);
    sets[0] = w.sets[0];
    sets[1] = w.sets[1];
}

/* ---- tags: four to a word, compared together ---- */

/* The slots of a set with this tag, as bits. */
static uint32_t match(const struct ucmi_pool *p, uint32_t set, uint16_t tag)
{
    const uint64_t low = 0x7fff7fff7fff7fffu;
    uint64_t want = tag * UINT64_C(0x0001000100010001);
    uint32_t bits = 0;
    for (unsigned i = 0; i < UCMI_POOL_WAYS / 4; i++) {
        uint64_t x = atomic_load(&p->tags[set * (UCMI_POOL_WAYS / 4) + i]) ^ want;
        uint64_t zero = ~(((x & low) + low) | x | low) >> 15; /* 1 in each 16 bits that are equal */
        bits |= (uint32_t)((zero | zero >> 15 | zero >> 30 | zero >> 45) & 0xf) << (4 * i);
    }
    uint32_t size = ucmi_pool_set_size(p, set);
    return size < UCMI_POOL_WAYS ? bits & ((1u << size) - 1) : bits;
}

static void set_tag(struct ucmi_pool *p, uint32_t slot, uint16_t tag)
{
    uint32_t set = ucmi_pool_set_of(p, slot), way = slot - ucmi_pool_set_first(p, set);
    _Atomic uint64_t *at = &p->tags[set * (UCMI_POOL_WAYS / 4) + way / 4];
    unsigned shift = way % 4 * 16;
    uint64_t old = atomic_load(at);
    while (!atomic_compare_exchange_weak(
        at, &old, (old & ~((uint64_t)UINT16_MAX << shift)) | (uint64_t)tag << shift))
        ;
}

/* ---- one slot ---- */

static void pin(struct ucmi_pool *p, uint32_t slot)
{
    pthread_mutex_lock(&p->lock);
    if (p->pins[slot]++ == 0)
        atomic_fetch_or(&p->metas[slot].holders, ucmi_pool_bit(p));
    pthread_mutex_unlock(&p->lock);
}

void ucmi_pool_unpin(struct ucmi_pool *p, uint32_t slot)
{
    pthread_mutex_lock(&p->lock);
    if (--p->pins[slot] == 0)
        atomic_fetch_and(&p->metas[slot].holders, ~ucmi_pool_bit(p));
    pthread_mutex_unlock(&p->lock);
}

/* Pins the slot if its word is still the one at which it was found READY. */
static bool pin_ready(struct ucmi_pool *p, uint32_t slot, uint64_t word)
{
    pin(p, slot);
    if (atomic_load(&p->metas[slot].word) == word)
        return true;
    ucmi_pool_unpin(p, slot);
    return false;
}

/* The slot is CLAIMED by us; nothing of the old block may be found in it any more. */
static void make_free(struct ucmi_pool *p, uint32_t slot, uint64_t generation)
{
    set_tag(p, slot, 0); /* first: once FREE, the tag is the next owner's */
    atomic_store(&p->metas[slot].word, make_word(generation, 0, UCMI_SLOT_FREE));
}

/* Whether the slot holds the block; *word_p is the word at which that was true. */
static bool holds(const struct ucmi_pool *p, uint32_t slot, const struct where *w, uint64_t *word_p)
{
    const struct ucmi_pool_meta *m = &p->metas[slot];
    for (;;) {
        uint64_t word = atomic_load(&m->word);
        enum ucmi_slot_state state = state_of(word);
        if (state != UCMI_SLOT_READY && state != UCMI_SLOT_FILLING && state != UCMI_SLOT_EVICTING)
            return false;
        bool same = atomic_load_explicit(&m->key[0], memory_order_acquire) == w->key[0] &&
                    atomic_load_explicit(&m->key[1], memory_order_acquire) == w->key[1] &&
                    atomic_load_explicit(&m->rank, memory_order_acquire) == w->rank;
        if (atomic_load(&m->word) != word)
            continue; /* it changed hands while its key was read */
        *word_p = word;
        return same;
    }
}

/* The slot that holds the block, other than `except`, or none. */
static uint32_t find(const struct ucmi_pool *p, const struct where *w, uint32_t except,
                     uint64_t *word_p)
{
    for (uint32_t i = 0; i < w->nsets; i++) {
        uint32_t first = ucmi_pool_set_first(p, w->sets[i]);
        for (uint32_t bits = match(p, w->sets[i], w->tag); bits; bits &= bits - 1) {
            uint32_t slot = first + (uint32_t)__builtin_ctz(bits);
            if (slot != except && holds(p, slot, w, word_p))
                return slot;
        }
    }
    return UCMI_POOL_NONE;
}

/* ---- policy ---- */

static uint64_t hash_of(const uint64_t key[2], uint32_t rank)
{
    ucm_key k;
    memcpy(k.b, key, sizeof k.b);
    return ucmi_key_word(&k, rank);
}

static uint64_t score_of(const struct ucmi_pool_meta *m, uint32_t span)
{
    return ucmi_policy_score(span, atomic_load_explicit(&m->again, memory_order_relaxed) != 0,
                             atomic_load_explicit(&m->tick, memory_order_relaxed),
                             atomic_load_explicit(&m->depth, memory_order_relaxed));
}

static void count_use(struct ucmi_pool *p, struct ucmi_pool_meta *m, uint32_t now)
{
    bool again = atomic_load_explicit(&m->again, memory_order_relaxed);
    uint32_t tick = atomic_load_explicit(&m->tick, memory_order_relaxed);
    if (!again && ucmi_policy_again(&p->policy, false, tick, now)) /* the line is shared */
        atomic_store_explicit(&m->again, 1, memory_order_relaxed);
}

/* The block of a slot that is ours by now, and was its until now. */
static void remember(struct ucmi_pool *p, struct ucmi_pool_meta *m)
{
    uint64_t key[2] = {atomic_load(&m->key[0]), atomic_load(&m->key[1])};
    ucmi_policy_leave(&p->policy, hash_of(key, atomic_load(&m->rank)), atomic_load(&m->again),
                      atomic_load(&m->tick));
}

/* ---- claiming ---- */

uint32_t ucmi_pool_grown(const struct ucmi_pool *p)
{
    return atomic_load_explicit(&p->head->grown, memory_order_acquire);
}

static bool claim_free(struct ucmi_pool *p, uint32_t slot)
{
    struct ucmi_pool_meta *m = &p->metas[slot];
    uint64_t word = atomic_load(&m->word), generation = (word >> 16) + 1;
    if (ucmi_pool_place(p, slot) >= ucmi_pool_grown(p) || state_of(word) != UCMI_SLOT_FREE ||
        !atomic_compare_exchange_strong(&m->word, &word,
                                        make_word(generation, p->me, UCMI_SLOT_CLAIMED)))
        return false;
    if (!atomic_load(&m->holders))
        return true;
    /* Someone who found the former block here has not let go yet. */
    make_free(p, slot, generation);
    return false;
}

/* Takes a slot that nobody uses, from the set that has more of them: that is what fills a pool to
 * the brim before the first block must go. */
static uint32_t take_free(struct ucmi_pool *p, const struct where *w)
{
    uint32_t bits[2] = {match(p, w->sets[0], 0), 0};
    if (w->nsets > 1)
        bits[1] = match(p, w->sets[1], 0);
    unsigned more = __builtin_popcount(bits[1]) > __builtin_popcount(bits[0]);
    for (unsigned i = 0; i < 2; i++, more ^= 1) {
        uint32_t first = ucmi_pool_set_first(p, w->sets[more]);
        for (uint32_t b = bits[more]; b; b &= b - 1)
            if (claim_free(p, first + (uint32_t)__builtin_ctz(b)))
                return first + (uint32_t)__builtin_ctz(b);
    }
    return UCMI_POOL_NONE;
}

/* Of the READY slots that nobody holds the one that the policy wants kept least. */
static uint32_t coldest(const struct ucmi_pool *p, const struct where *w, uint64_t *word_p)
{
    uint32_t best = UCMI_POOL_NONE, span = ucmi_policy_span(&p->policy);
    uint64_t best_score = 0;
    for (uint32_t i = 0; i < w->nsets; i++) {
        uint32_t first = ucmi_pool_set_first(p, w->sets[i]);
        for (uint32_t k = 0; k < ucmi_pool_set_size(p, w->sets[i]); k++) {
            const struct ucmi_pool_meta *m = &p->metas[first + k];
            uint64_t word = atomic_load_explicit(&m->word, memory_order_relaxed);
            if (state_of(word) != UCMI_SLOT_READY ||
                atomic_load_explicit(&m->holders, memory_order_relaxed))
                continue;
            uint64_t score = score_of(m, span);
            if (best == UCMI_POOL_NONE || score < best_score) {
                best = first + k;
                best_score = score;
                *word_p = word;
            }
        }
    }
    return best;
}

static uint32_t take_coldest(struct ucmi_pool *p, const struct where *w)
{
    uint64_t word;
    for (unsigned tries = 0; tries < EVICT_TRIES; tries++) {
        uint32_t slot = coldest(p, w, &word);
        if (slot == UCMI_POOL_NONE)
            return slot;
        struct ucmi_pool_meta *m = &p->metas[slot];
        uint64_t was = word, generation = word >> 16;
        if (!atomic_compare_exchange_strong(&m->word, &word,
                                            make_word(generation, p->me, UCMI_SLOT_EVICTING)))
            continue;
        if (atomic_load(&m->holders)) { /* pinned meanwhile: it stays */
            atomic_store(&m->word, was);
            continue;
        }
        remember(p, m);
        atomic_store(&m->word, make_word(generation + 1, p->me, UCMI_SLOT_CLAIMED));
        atomic_fetch_sub(&p->head->ready, 1);
        ucmi_count(p->counters, UCMI_CACHE_EVICTED, 1);
        return slot;
    }
    return UCMI_POOL_NONE;
}

/* CLAIMED -> FILLING: from here on others see who fills the block. */
static void announce(struct ucmi_pool *p, uint32_t slot, const struct where *w, uint32_t depth)
{
    struct ucmi_pool_meta *m = &p->metas[slot];
    uint64_t generation = atomic_load(&m->word) >> 16;
    uint32_t now = tick_now();
    bool again = ucmi_policy_enter(&p->policy, hash_of(w->key, w->rank), now);
    atomic_store_explicit(&m->key[0], w->key[0], memory_order_release);
    atomic_store_explicit(&m->key[1], w->key[1], memory_order_release);
    atomic_store_explicit(&m->rank, w->rank, memory_order_release);
    atomic_store_explicit(&m->depth, depth, memory_order_relaxed);
    atomic_store_explicit(&m->tick, now, memory_order_relaxed);
    atomic_store_explicit(&m->again, again, memory_order_relaxed);
    set_tag(p, slot, w->tag);
    atomic_store(&m->word, make_word(generation, p->me, UCMI_SLOT_FILLING));
}

enum ucmi_pool_got ucmi_pool_get(struct ucmi_pool *p, const struct ucmi_pool_want *want,
                                 enum ucmi_pool_take take, uint32_t *slot_p)
{
    struct where w = locate(p, &want->key, want->rank);
    uint64_t word;
    for (unsigned tries = 0; tries < TRIES; tries++) {
        uint32_t slot = find(p, &w, UCMI_POOL_NONE, &word);
        if (slot != UCMI_POOL_NONE) {
            *slot_p = slot;
            if (state_of(word) == UCMI_SLOT_FILLING && owner_of(word) == p->me)
                return UCMI_POOL_MINE;
            if (state_of(word) == UCMI_SLOT_FILLING) {
                atomic_fetch_or(&p->head->wanted, UINT64_C(1) << (owner_of(word) & 63));
                return UCMI_POOL_BUSY;
            }
            if (state_of(word) == UCMI_SLOT_EVICTING || !pin_ready(p, slot, word))
                continue; /* a moment in the life of a slot */
            count_use(p, &p->metas[slot], tick_now());
            atomic_store_explicit(&p->metas[slot].tick, tick_now(), memory_order_relaxed);
            return UCMI_POOL_READY;
        }
        slot = take == UCMI_POOL_LOOK ? UCMI_POOL_NONE : take_free(p, &w);
        if (slot == UCMI_POOL_NONE && take == UCMI_POOL_EVICT)
            slot = take_coldest(p, &w);
        if (slot == UCMI_POOL_NONE)
            return UCMI_POOL_FULL;
        announce(p, slot, &w, want->depth);
        if (find(p, &w, slot, &word) == UCMI_POOL_NONE) {
            *slot_p = slot;
            return UCMI_POOL_CLAIMED;
        }
        ucmi_pool_drop(p, slot); /* two at once: both see it, at least one gives up */
    }
    return UCMI_POOL_BUSY;
}

void ucmi_pool_publish(struct ucmi_pool *p, uint32_t slot)
{
    struct ucmi_pool_meta *m = &p->metas[slot];
    pin(p, slot);
    atomic_fetch_add(&p->head->ready, 1);
    atomic_store(&m->word, make_word(atomic_load(&m->word) >> 16, p->me, UCMI_SLOT_READY));
}

void ucmi_pool_drop(struct ucmi_pool *p, uint32_t slot)
{
    struct ucmi_pool_meta *m = &p->metas[slot];
    uint64_t generation = atomic_load(&m->word) >> 16;
    atomic_store(&m->word, make_word(generation, p->me, UCMI_SLOT_CLAIMED));
    make_free(p, slot, generation);
}

bool ucmi_pool_wanted(struct ucmi_pool *p)
{
    uint64_t bit = ucmi_pool_bit(p);
    return (atomic_load(&p->head->wanted) & bit) && atomic_fetch_and(&p->head->wanted, ~bit) & bit;
}

uint32_t ucmi_pool_busy(struct ucmi_pool *p, uint32_t ours)
{
    uint32_t all = 0;
    atomic_store(&p->head->busy[p->me], ours);
    for (unsigned i = 0; i < UCMI_POOL_MEMBERS; i++)
        all += atomic_load(&p->head->busy[i]);
    return all;
}

/* ---- blocks that are READY and not STORED ---- */

void ucmi_pool_unstored(struct ucmi_pool *p, uint32_t slot)
{
    struct ucmi_pool_meta *m = &p->metas[slot];
    atomic_store(&m->unstored, make_word(atomic_load(&m->word) >> 16, p->me, UCMI_SLOT_READY));
}

void ucmi_pool_stored(struct ucmi_pool *p, uint32_t slot)
{
    atomic_store(&p->metas[slot].unstored, 0);
}

bool ucmi_pool_adopt(struct ucmi_pool *p, uint32_t slot, uint32_t rank, struct ucmi_pool_want *what)
{
    struct ucmi_pool_meta *m = &p->metas[slot];
    uint64_t word = atomic_load(&m->word), generation = word >> 16;
    uint64_t mark = make_word(generation, NOBODY, UCMI_SLOT_READY);
    if (state_of(word) != UCMI_SLOT_READY || atomic_load(&m->unstored) != mark ||
        atomic_load(&m->rank) != rank || !pin_ready(p, slot, word))
        return false;
    if (!atomic_compare_exchange_strong(&m->unstored, &mark,
                                        make_word(generation, p->me, UCMI_SLOT_READY))) {
        ucmi_pool_unpin(p, slot);
        return false;
    }
    uint64_t key[2] = {atomic_load(&m->key[0]), atomic_load(&m->key[1])};
    memcpy(what->key.b, key, sizeof key);
    what->rank = rank;
    what->depth = atomic_load(&m->depth);
    return true;
}

void ucmi_pool_disown(struct ucmi_pool *p, uint32_t slot, uint64_t gone)
{
    struct ucmi_pool_meta *m = &p->metas[slot];
    uint64_t mark = atomic_load(&m->unstored);
    if (!mark || mark >> 16 != atomic_load(&m->word) >> 16 || owner_of(mark) == NOBODY ||
        !(gone >> (owner_of(mark) & 63) & 1))
        return;
    if (atomic_compare_exchange_strong(&m->unstored, &mark,
                                       make_word(mark >> 16, NOBODY, UCMI_SLOT_READY)))
        atomic_store(&p->orphans, true);
}

/* ---- lookups ---- */

static void lease(struct ucmi_pool *p, struct ucmi_pool_meta *m, uint32_t until)
{
    count_use(p, m, until - LEASE_TICKS);
    /* Written once a tick at most: lookups come in swarms, and the line is shared. */
    if (atomic_load_explicit(&m->tick, memory_order_relaxed) < until)
        atomic_store_explicit(&m->tick, until, memory_order_relaxed);
}

static size_t lookup_some(struct ucmi_pool *p, const struct where *w, size_t n, uint8_t level,
                          uint8_t **found, bool leases)
{
    uint32_t until = tick_now() + LEASE_TICKS, hint[AHEAD];
    uint64_t word;
    size_t missed = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = match(p, w[i].sets[0], w[i].tag), set = w[i].sets[0];
        if (!bits && w[i].nsets > 1) {
            set = w[i].sets[1];
            bits = match(p, set, w[i].tag);
        }
        hint[i] = bits;
        if (bits)
            __builtin_prefetch(
                &p->metas[ucmi_pool_set_first(p, set) + (uint32_t)__builtin_ctz(bits)]);
    }
    for (size_t i = 0; i < n; i++) {
        uint32_t slot = hint[i] ? find(p, &w[i], UCMI_POOL_NONE, &word) : UCMI_POOL_NONE;
        if (slot != UCMI_POOL_NONE && state_of(word) == UCMI_SLOT_READY) {
            *found[i] = level;
            if (leases)
                lease(p, &p->metas[slot], until);
        } else {
            missed++;
        }
    }
    return missed;
}

size_t ucmi_pool_lookup(struct ucmi_pool *p, const ucm_key *keys, size_t n, uint32_t rank,
                        uint8_t level, uint8_t *found, bool leases)
{
    struct where w[AHEAD];
    uint8_t *at[AHEAD];
    size_t missed = 0;
    for (size_t i = 0; i < n;) {
        size_t k = 0;
        for (; i < n && k < AHEAD; i++) {
            if (found[i])
                continue;
            w[k] = locate(p, &keys[i], rank);
            __builtin_prefetch(&p->tags[w[k].sets[0] * (UCMI_POOL_WAYS / 4)]);
            __builtin_prefetch(&p->tags[w[k].sets[1] * (UCMI_POOL_WAYS / 4)]);
            at[k++] = &found[i];
        }
        missed += lookup_some(p, w, k, level, at, leases);
    }
    return missed;
}

/* ---- after a death; called while nobody can take a dead one's index ---- */

unsigned ucmi_pool_reclaim(struct ucmi_pool *p, uint32_t slot, uint64_t dead)
{
    struct ucmi_pool_meta *m = &p->metas[slot];
    uint64_t word = atomic_load(&m->word), generation = word >> 16;
    unsigned changed = 0;
    ucmi_pool_disown(p, slot, dead);
    if (atomic_load(&m->holders) & dead) {
        atomic_fetch_and(&m->holders, ~dead);
        changed = 1;
    }
    if (!(dead >> (owner_of(word) & 63) & 1))
        return changed;
    switch (state_of(word)) {
    case UCMI_SLOT_CLAIMED: /* nothing had been written into it */
        make_free(p, slot, generation);
        return 1;
    case UCMI_SLOT_EVICTING: /* nor here: the block is still whole */
        atomic_store(&m->word, make_word(generation, owner_of(word), UCMI_SLOT_READY));
        return 1;
    case UCMI_SLOT_FILLING: /* a device or a disk may still be writing into it */
        atomic_store(&m->since_ns, ucmi_now_ns());
        atomic_fetch_add(&p->head->quarantined, 1);
        atomic_store(&m->word, make_word(generation, 0, UCMI_SLOT_QUARANTINE));
        return 1;
    default: return changed;
    }
}

void ucmi_pool_recount(struct ucmi_pool *p)
{
    int64_t ready = 0;
    for (uint32_t slot = 0; slot < p->layout.nslots; slot++)
        ready += state_of(atomic_load(&p->metas[slot].word)) == UCMI_SLOT_READY;
    atomic_store(&p->head->ready, ready);
}

unsigned ucmi_pool_parole(struct ucmi_pool *p, uint32_t slot, uint64_t now_ns)
{
    struct ucmi_pool_meta *m = &p->metas[slot];
    uint64_t word = atomic_load(&m->word);
    if (state_of(word) != UCMI_SLOT_QUARANTINE || atomic_load(&m->holders) ||
        !ucmi_pool_renew(p, slot, now_ns >= atomic_load(&m->since_ns) + p->quarantine_ns))
        return 0;
    if (!atomic_compare_exchange_strong(&m->word, &word,
                                        make_word((word >> 16) + 1, p->me, UCMI_SLOT_CLAIMED)))
        return 0;
    make_free(p, slot, (word >> 16) + 1);
    atomic_fetch_sub(&p->head->quarantined, 1);
    return 1;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Least loaded, but a prompt goes where its beginning has been before: by rendezvous hashing, so
 * that an instance that comes or goes moves only its own share of the prompts, among those whose
 * load is not far above the mean.  One loved prefix therefore spreads over as many instances as it
 * keeps busy. Functions of their arguments alone; tests/proxy/test_balance.c.
 */
#include "proxy/balance.h"

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* FNV-1a; mix() spreads it. */
uint64_t balance_hash(uint64_t hash, const void *data, size_t len)
{
    const unsigned char *p = data;

    if (!hash)
        hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < len; i++)
        hash = (hash ^ p[i]) * 0x100000001b3u;
    return hash;
}

static int is_in(const struct seat *s, const struct seat *const *list, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        if (list[i] == s)
            return 1;
    return 0;
}

int balance_choose(const struct seat *const *seats, unsigned n, const struct seat *const *tried,
                   unsigned ntried, uint64_t key, uint64_t slack, unsigned turn)
{
    enum seat_state state = SEAT_SHUT; /* the best there is */
    uint64_t sum = 0, count = 0, best_score = 0;
    int best = -1;

    for (unsigned i = 0; i < n; i++) {
        if (is_in(seats[i], tried, ntried) || seats[i]->state > state)
            continue;
        if (seats[i]->state < state)
            sum = count = 0;
        state = seats[i]->state;
        sum += seats[i]->tokens;
        count++;
    }
    if (state == SEAT_SHUT)
        return -1;
    uint64_t most = sum / count + sum / count / 4 + slack;
    for (unsigned j = 0; j < n; j++) {
        unsigned i = (j + turn) % n;
        const struct seat *s = seats[i];
        if (s->state != state || is_in(s, tried, ntried) || (key && s->tokens > most))
            continue;
        uint64_t score = key ? mix(key ^ mix(s->id)) : ~s->tokens;
        if (best < 0 || score > best_score) {
            best = (int)i;
            best_score = score;
        }
    }
    return best;
}

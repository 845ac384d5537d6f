/* SPDX-License-Identifier: Apache-2.0 */
/*
 * replay - what share of the blocks of real requests a store of a given size would have had.
 *
 *     replay [-c] [-h] [-s BLOCKS]... [-p POLICY] [TRACE]...
 *
 * -c also counts what was written, -h takes the later half of the requests only.
 *
 * A trace has one JSON object a line, as Mooncake publishes them: {"timestamp": milliseconds,
 * "hash_ids": [a number for each block, the same for the same prefix]}; .xz is read through xz.
 *
 * A request looks up all its blocks, hits those before the first that is missing, and dumps the
 * rest when it has been computed, which is at once.  Nothing else is a hit.  All policies see the
 * same, and the clock is the trace's.
 *
 * The candidates are lists, one class of them a request's tail first, so that heads outlive it.
 * The rules of the tiers work as the tiers do: the disk's by a scan for a batch of victims, the
 * pool's in two sets of up to 32 slots; both by src/store/policy.h itself.
 */
#include "store/policy.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { NONE = UINT32_MAX, WAYS = 32, LEASE_MS = 10000, MAX_SIZES = 16, MAX_TRACES = 8 };

/* ---- traces ---- */

struct request {
    uint32_t at_ms, n, first; /* ids[first], and on */
};
struct trace {
    struct request *requests;
    size_t nrequests;
    uint32_t *ids, nids, nblocks; /* blocks are numbers below nblocks */
};

static void *grow(void *v, size_t n, size_t size)
{
    if (n && (n & (n - 1))) /* there is room up to the next power of two */
        return v;
    v = realloc(v, (n ? 2 * n : 1) * size);
    if (!v) {
        perror("replay");
        exit(1);
    }
    return v;
}

static bool parse(struct trace *t, char *line)
{
    char *at = strstr(line, "\"timestamp\":"), *ids = strstr(line, "\"hash_ids\":");
    if (!at || !ids || !(ids = strchr(ids, '[')))
        return false;
    struct request r = {.at_ms = (uint32_t)strtoul(at + 12, NULL, 10), .first = t->nids};
    for (char *end; *ids != ']'; ids = end) {
        unsigned long id = strtoul(ids + 1, &end, 10);
        if (end == ids + 1 || id >= NONE)
            return r.n == 0 && *end == ']';
        t->ids = grow(t->ids, t->nids, sizeof *t->ids);
        t->ids[t->nids++] = (uint32_t)id;
        t->nblocks = MAX(t->nblocks, (uint32_t)id + 1);
        r.n++;
    }
    t->requests = grow(t->requests, t->nrequests, sizeof *t->requests);
    t->requests[t->nrequests++] = r;
    return true;
}

static struct trace read_trace(const char *path)
{
    struct trace t = {0};
    int fds[2];
    size_t cap = 0, len = strlen(path), number = 0;
    char *line = NULL;
    FILE *f = NULL;

    if (len > 3 && strcmp(path + len - 3, ".xz") == 0 && access(path, R_OK) == 0 &&
        pipe(fds) == 0) {
        if (fork() == 0) {
            dup2(fds[1], 1);
            close(fds[0]);
            close(fds[1]);
            execlp("xz", "xz", "-dc", "--", path, (char *)NULL);
            perror("replay: xz");
            _exit(1);
        }
        close(fds[1]);
        f = fdopen(fds[0], "r");
    } else {
        f = fopen(path, "r");
    }
    while (f && getline(&line, &cap, f) > 0)
        if (++number && !parse(&t, line)) {
            fprintf(stderr, "replay: %s: line %zu is no request\n", path, number);
            exit(1);
        }
    if (!t.nids) {
        fprintf(stderr, "replay: %s: no requests could be read\n", path);
        exit(1);
    }
    free(line);
    fclose(f);
    return t;
}

/* ---- a store ---- */

struct block {
    uint32_t list; /* which it is in; 0: none.  Lists from GHOST on hold no blocks */
    uint32_t prev, next;
    uint32_t last, depth, slot, next_use;
    uint32_t clock; /* how many blocks had been new when it was last used */
    uint32_t apart; /* and how many were from the use before to that */
    uint8_t uses;
    bool known, again;
};
struct list {
    uint32_t first, last, n; /* the coldest is the last */
};
enum { GHOST = 4, LISTS = 8 };
struct store {
    const struct policy *policy;
    const struct trace *trace;
    struct block *b;
    uint32_t cap, used, now_ms, request, clock;
    uint32_t *slots; /* block of each, or NONE */
    struct list lists[LISTS];
    uint64_t hits, asked, writes;
    double target;   /* ARC: blocks of list 1 */
    double distance; /* admission: new blocks between two uses, in the mean */
    uint32_t hand;
    uint32_t *victims, nvictims, next_victim;
    uint32_t *victim_ticks;
    struct ucmi_policy rule;
    _Atomic uint64_t span;
};
struct policy {
    const char *name, *what;
    void (*open)(struct store *s);
    void (*hit)(struct store *s, uint32_t id);
    void (*put)(struct store *s, uint32_t id);
};

static bool has(const struct store *s, uint32_t id)
{
    return s->b[id].list && s->b[id].list < GHOST;
}

static void unlink_block(struct store *s, uint32_t id)
{
    struct block *b = &s->b[id];
    struct list *l = &s->lists[b->list];
    *(b->prev == NONE ? &l->first : &s->b[b->prev].next) = b->next;
    *(b->next == NONE ? &l->last : &s->b[b->next].prev) = b->prev;
    s->used -= b->list < GHOST;
    l->n--;
    b->list = 0;
}

static void push(struct store *s, unsigned list, uint32_t id)
{
    struct block *b = &s->b[id];
    struct list *l = &s->lists[list];
    if (b->list)
        unlink_block(s, id);
    b->list = list;
    b->prev = NONE;
    b->next = l->first;
    *(l->first == NONE ? &l->last : &s->b[l->first].prev) = id;
    l->first = id;
    l->n++;
    s->used += list < GHOST;
}

/* ---- LRU ---- */

static void lru_hit(struct store *s, uint32_t id)
{
    push(s, 1, id);
}

static void lru_put(struct store *s, uint32_t id)
{
    if (s->used == s->cap)
        unlink_block(s, s->lists[1].last);
    push(s, 1, id);
}

/* ---- ARC, as published: T1 T2 are lists 1 2, B1 B2 are GHOST + 1 and 2 ---- */

static void arc_replace(struct store *s, bool in_b2)
{
    uint32_t t1 = s->lists[1].n;
    unsigned from = t1 && (t1 > s->target || (in_b2 && t1 == (uint32_t)s->target)) ? 1 : 2;
    if (!s->lists[from].n)
        from = 3 - from;
    push(s, GHOST + from, s->lists[from].last);
}

static void arc_hit(struct store *s, uint32_t id)
{
    push(s, 2, id);
}

static void arc_put(struct store *s, uint32_t id)
{
    struct list *t1 = &s->lists[1], *b1 = &s->lists[GHOST + 1], *b2 = &s->lists[GHOST + 2];
    unsigned list = s->b[id].list;
    double r = list == GHOST + 1 ? (double)b2->n / b1->n : list ? (double)b1->n / b2->n : 0;
    if (list == GHOST + 1)
        s->target = MIN(s->target + MAX(r, 1), s->cap);
    else if (list)
        s->target = MAX(s->target - MAX(r, 1), 0);
    if (list) {
        if (s->used == s->cap)
            arc_replace(s, list == GHOST + 2);
        push(s, 2, id);
        return;
    }
    if (t1->n + b1->n == s->cap) {
        if (t1->n < s->cap)
            unlink_block(s, b1->last);
        else
            unlink_block(s, t1->last);
    } else if (s->used + b1->n + b2->n >= 2 * s->cap) {
        unlink_block(s, b2->last);
    }
    if (s->used == s->cap)
        arc_replace(s, false);
    push(s, 1, id);
}

/* ---- admission by the second touch, within four times the store; always, or under pressure: while
 * few blocks live to see one ---- */

static bool known(const struct store *s, uint32_t id)
{
    return s->used < s->cap || (s->b[id].known && s->b[id].apart < 4 * (uint64_t)s->cap);
}

static bool admitted(const struct store *s, uint32_t id)
{
    return known(s, id) || s->distance < s->cap;
}

static void lru_known(struct store *s, uint32_t id)
{
    if (known(s, id))
        lru_put(s, id);
}

static void lru_admit(struct store *s, uint32_t id)
{
    if (admitted(s, id))
        lru_put(s, id);
}

static void arc_admit(struct store *s, uint32_t id)
{
    if (admitted(s, id))
        arc_put(s, id);
}

/* ---- S3-FIFO: small, main and ghosts are 1, 2 and GHOST; SIEVE ---- */

static void count_hit(struct store *s, uint32_t id)
{
    s->b[id].uses = (uint8_t)MIN(s->b[id].uses + 1, 3);
}

static void s3_evict(struct store *s)
{
    uint32_t small = s->cap / 10, id;
    while (s->used == s->cap && s->lists[1].n > small) {
        id = s->lists[1].last;
        push(s, s->b[id].uses ? 2 : GHOST, id);
        s->b[id].uses = 0;
        if (s->lists[GHOST].n > s->cap)
            unlink_block(s, s->lists[GHOST].last);
    }
    while (s->used == s->cap && (id = s->lists[2].last) != NONE) {
        if (s->b[id].uses) {
            s->b[id].uses--;
            push(s, 2, id);
        } else {
            unlink_block(s, id);
        }
    }
}

static void s3_put(struct store *s, uint32_t id)
{
    if (s->used == s->cap)
        s3_evict(s);
    push(s, s->b[id].list == GHOST ? 2 : 1, id);
    s->b[id].uses = 0;
}

static void sieve_put(struct store *s, uint32_t id)
{
    uint32_t hand = s->hand;
    while (s->used == s->cap) {
        if (hand == NONE)
            hand = s->lists[1].last;
        uint32_t older = s->b[hand].prev;
        if (!s->b[hand].uses)
            unlink_block(s, hand);
        else
            s->b[hand].uses = 0;
        hand = older;
    }
    s->hand = hand;
    push(s, 1, id);
    s->b[id].uses = 0;
}

/* ---- the tiers' rules ---- */

static uint32_t place(struct store *s, uint32_t slot, uint32_t id)
{
    s->b[id].list = 1;
    s->b[id].slot = slot;
    s->slots[slot] = id;
    s->used++;
    return slot;
}

static uint64_t hash_of(uint32_t id)
{
    return ucmi_hash64(&id, sizeof id, 0);
}

static uint32_t disk_tick(const struct store *s)
{
    return (s->now_ms / 1000 >> 4) + 1;
}

static uint32_t pool_tick(const struct store *s)
{
    return (uint32_t)(((uint64_t)s->now_ms * 1000000 >> 30) + 1);
}

static bool ruled(const struct store *s)
{
    return s->rule.ghosts != NULL;
}

static uint64_t score_of(const struct store *s, const struct block *b)
{
    return ucmi_policy_score(ruled(s) ? ucmi_policy_span(&s->rule) : 0, b->again, b->last,
                             b->depth);
}

static void rule_open(struct store *s)
{
    if (ucmi_policy_open(&s->rule, &s->span, s->cap) < 0)
        exit(1);
}

static void again(struct store *s, uint32_t id, uint32_t now, uint32_t last)
{
    struct block *b = &s->b[id];
    if (ruled(s))
        b->again = ucmi_policy_again(&s->rule, b->again, b->last, now);
    b->last = MAX(b->last, last);
}

static void enter(struct store *s, uint32_t id, uint32_t now)
{
    if (ruled(s))
        s->b[id].again = ucmi_policy_enter(&s->rule, hash_of(id), now);
    s->b[id].last = now;
}

static void leave(struct store *s, uint32_t id)
{
    if (ruled(s))
        ucmi_policy_leave(&s->rule, hash_of(id), s->b[id].again, s->b[id].last);
    s->slots[s->b[id].slot] = NONE;
    s->b[id].list = 0;
    s->used--;
}

static void disk_hit(struct store *s, uint32_t id)
{
    again(s, id, disk_tick(s), disk_tick(s));
}

struct scored {
    uint64_t score;
    uint32_t id;
};

static int by_score(const void *a, const void *b)
{
    const struct scored *x = a, *y = b;
    return (x->score > y->score) - (x->score < y->score);
}

/* As room.c: the coldest 64th of all, found together, checked again when their turn comes. */
static void disk_scan(struct store *s)
{
    uint32_t n = 0, most = MAX(s->cap / 64, 16u);
    uint64_t bound = UINT64_MAX;
    struct scored *v = calloc(2 * most, sizeof *v);
    for (uint32_t slot = 0; slot < s->cap; slot++) {
        const struct block *b = &s->b[s->slots[slot]];
        uint64_t score = score_of(s, b);
        if (score >= bound)
            continue;
        v[n++] = (struct scored){score, s->slots[slot]};
        if (n == 2 * most) { /* the better half stays */
            qsort(v, n, sizeof *v, by_score);
            n = most;
            bound = v[n - 1].score;
        }
    }
    qsort(v, n, sizeof *v, by_score);
    s->nvictims = MIN(n, most);
    s->next_victim = 0;
    for (uint32_t i = 0; i < s->nvictims; i++) {
        s->victims[i] = v[i].id;
        s->victim_ticks[i] = s->b[v[i].id].last;
    }
    free(v);
}

static void disk_put(struct store *s, uint32_t id)
{
    uint32_t slot = s->used;
    while (s->used == s->cap) {
        if (s->next_victim == s->nvictims)
            disk_scan(s);
        uint32_t i = s->next_victim++, victim = s->victims[i];
        if (!has(s, victim) || s->b[victim].last != s->victim_ticks[i])
            continue;
        slot = s->b[victim].slot;
        leave(s, victim);
    }
    enter(s, id, disk_tick(s));
    place(s, slot, id);
}

/* A lookup leases what it finds. */
static void pool_hit(struct store *s, uint32_t id)
{
    again(s, id, pool_tick(s), pool_tick(s) + LEASE_MS / 1000);
}

static void pool_put(struct store *s, uint32_t id)
{
    uint64_t h = hash_of(id) * 0x9e3779b97f4a7c15u, nsets = (s->cap + WAYS - 1) / WAYS;
    uint32_t sets[2] = {(uint32_t)((h >> 32) * nsets >> 32),
                        (uint32_t)((h & UINT32_MAX) * nsets >> 32)};
    uint32_t spare[2] = {0}, slot[2] = {NONE, NONE}, coldest = NONE;
    for (unsigned i = 0; i < 2; i++) {
        uint32_t from = (uint32_t)(sets[i] * (uint64_t)s->cap / nsets);
        uint32_t to = (uint32_t)((sets[i] + 1) * (uint64_t)s->cap / nsets);
        for (uint32_t k = from; k < to; k++) {
            uint32_t other = s->slots[k];
            if (other == NONE) {
                spare[i]++;
                slot[i] = k;
            } else if (coldest == NONE || score_of(s, &s->b[other]) < score_of(s, &s->b[coldest])) {
                coldest = other;
            }
        }
    }
    uint32_t to = slot[spare[1] > spare[0]];
    if (to == NONE) {
        to = s->b[coldest].slot;
        leave(s, coldest);
    }
    enter(s, id, pool_tick(s));
    place(s, to, id);
}

/* ---- the offline optimum: who is wanted last goes first, and does not come in at all ---- */

static bool later(const struct store *s, uint32_t a, uint32_t b)
{
    const struct block *x = &s->b[a], *y = &s->b[b];
    return x->next_use != y->next_use ? x->next_use > y->next_use : x->depth > y->depth;
}

static void heap_set(struct store *s, uint32_t i, uint32_t id)
{
    s->slots[i] = id;
    s->b[id].slot = i;
}

static void opt_fix(struct store *s, uint32_t i)
{
    uint32_t id = s->slots[i];
    for (; i && later(s, id, s->slots[(i - 1) / 2]); i = (i - 1) / 2)
        heap_set(s, i, s->slots[(i - 1) / 2]);
    for (uint32_t c; (c = 2 * i + 1) < s->used; i = c) {
        if (c + 1 < s->used && later(s, s->slots[c + 1], s->slots[c]))
            c++;
        if (!later(s, s->slots[c], id))
            break;
        heap_set(s, i, s->slots[c]);
    }
    heap_set(s, i, id);
}

static void opt_hit(struct store *s, uint32_t id)
{
    opt_fix(s, s->b[id].slot);
}

static void opt_put(struct store *s, uint32_t id)
{
    if (s->b[id].next_use == NONE)
        return;
    if (s->used < s->cap) {
        place(s, s->used, id);
    } else if (later(s, s->slots[0], id)) {
        s->b[s->slots[0]].list = 0;
        s->used--;
        place(s, 0, id);
    } else {
        return;
    }
    opt_fix(s, s->b[id].slot);
}

/* ---- replaying ---- */

static const struct policy policies[] = {
    {"lru", "LRU", NULL, lru_hit, lru_put},
    {"arc", "ARC", NULL, arc_hit, arc_put},
    {"known", "second touch always, LRU", NULL, lru_hit, lru_known},
    {"lru2", "second touch, LRU", NULL, lru_hit, lru_admit},
    {"arc2", "second touch, ARC", NULL, arc_hit, arc_admit},
    {"s3fifo", "S3-FIFO", NULL, count_hit, s3_put},
    {"sieve", "SIEVE", NULL, count_hit, sieve_put},
    {"disklru", "disk, plain LRU", NULL, disk_hit, disk_put},
    {"poollru", "DRAM, plain LRU", NULL, pool_hit, pool_put},
    {"disk", "disk, our rule", rule_open, disk_hit, disk_put},
    {"pool", "DRAM, our rule", rule_open, pool_hit, pool_put},
    {"opt", "offline optimum", NULL, opt_hit, opt_put},
};

/* next_of[i]: the request that wants ids[i] next. */
static uint32_t *next_uses(const struct trace *t)
{
    uint32_t *next_of = calloc(t->nids, sizeof *next_of), *seen = malloc(t->nblocks * sizeof *seen);
    memset(seen, 0xff, t->nblocks * sizeof *seen);
    for (size_t r = t->nrequests; r-- > 0;) {
        const struct request *q = &t->requests[r];
        for (uint32_t i = 0; i < q->n; i++) {
            next_of[q->first + i] = seen[t->ids[q->first + i]];
            seen[t->ids[q->first + i]] = (uint32_t)r;
        }
    }
    free(seen);
    return next_of;
}

/* What no policy decides: where the block is, how far apart its uses are. */
static void note(struct store *s, uint32_t id, uint32_t depth, uint32_t next_use)
{
    struct block *b = &s->b[id];
    b->depth = depth;
    b->next_use = next_use;
    b->apart = s->clock - b->clock;
    if (b->known)
        s->distance += (b->apart - s->distance) / 4096;
    else
        s->clock++;
    b->clock = s->clock;
}

static void replay(struct store *s, const uint32_t *next_of, size_t from)
{
    const struct trace *t = s->trace;
    for (size_t r = 0; r < t->nrequests; r++) {
        const struct request *q = &t->requests[r];
        const uint32_t *ids = t->ids + q->first;
        uint32_t hits = 0;
        s->now_ms = q->at_ms;
        while (hits < q->n && has(s, ids[hits]))
            hits++;
        if (r >= from) {
            s->hits += hits;
            s->asked += q->n;
        }
        for (uint32_t i = 0; i < q->n; i++)
            note(s, ids[i], i, next_of[q->first + i]);
        /* A lookup touches all it finds, also behind a gap. */
        for (uint32_t i = q->n; i-- > 0;)
            if (has(s, ids[i]))
                s->policy->hit(s, ids[i]);
        for (uint32_t i = q->n; i-- > 0;) {
            if (!has(s, ids[i])) {
                s->policy->put(s, ids[i]);
                s->writes += has(s, ids[i]);
            }
            s->b[ids[i]].known = true;
        }
    }
}

static struct store run(const struct policy *policy, const struct trace *t, uint32_t cap,
                        const uint32_t *next_of, size_t from)
{
    struct store s = {.policy = policy, .trace = t, .cap = cap, .hand = NONE};
    s.b = calloc(t->nblocks, sizeof *s.b);
    s.slots = malloc(cap * sizeof *s.slots);
    s.victims = malloc((cap / 64 + 16) * sizeof *s.victims);
    s.victim_ticks = malloc((cap / 64 + 16) * sizeof *s.victim_ticks);
    memset(s.slots, 0xff, cap * sizeof *s.slots);
    for (unsigned i = 0; i < LISTS; i++)
        s.lists[i] = (struct list){NONE, NONE, 0};
    if (policy->open)
        policy->open(&s);
    replay(&s, next_of, from);
    free(s.b);
    free(s.slots);
    free(s.victims);
    free(s.victim_ticks);
    ucmi_policy_close(&s.rule);
    return s;
}

static void report(const char *path, const uint32_t *sizes, size_t nsizes, const char *only,
                   bool with_writes, bool half)
{
    struct trace t = read_trace(path);
    uint32_t *next_of = next_uses(&t);
    printf("\n%s: %zu requests, %u blocks\n\n| hits of a hundred blocks |", path, t.nrequests,
           t.nids);
    for (size_t i = 0; i < nsizes; i++)
        printf(" %u |", sizes[i]);
    printf("\n|---|");
    for (size_t i = 0; i < nsizes; i++)
        printf("---|");
    for (size_t p = 0; p < sizeof policies / sizeof *policies; p++) {
        if (only && strcmp(only, policies[p].name) != 0)
            continue;
        printf("\n| %s |", policies[p].what);
        for (size_t i = 0; i < nsizes; i++) {
            struct store s = run(&policies[p], &t, sizes[i], next_of, half ? t.nrequests / 2 : 0);
            printf(" %.2f", 100.0 * (double)s.hits / (double)s.asked);
            printf(with_writes ? " (%.0fk) |" : " |", (double)s.writes / 1000);
            fflush(stdout);
        }
    }
    printf("\n");
    free(next_of);
    free(t.ids);
    free(t.requests);
}

int main(int argc, char **argv)
{
    static const char *const usual[] = {"../shared/traces/mooncake_conversation.jsonl.xz",
                                        "../shared/traces/mooncake_synthetic.jsonl.xz"};
    uint32_t sizes[MAX_SIZES] = {2000, 5000, 10000, 20000, 50000, 100000};
    size_t nsizes = 0;
    const char *only = NULL;
    bool with_writes = false, half = false;

    for (int c; (c = getopt(argc, argv, "chs:p:")) != -1;) {
        if (c == 'c')
            with_writes = true;
        else if (c == 'h')
            half = true;
        else if (c == 'p')
            only = optarg;
        else if (c == 's' && nsizes < MAX_SIZES && atoi(optarg) >= WAYS)
            sizes[nsizes++] = (uint32_t)atoi(optarg);
        else
            return fprintf(stderr,
                           "usage: replay [-c] [-h] [-s BLOCKS]... [-p POLICY] [TRACE]...\n"),
                   2;
    }
    nsizes = nsizes ? nsizes : 6;
    if (optind == argc)
        for (size_t i = 0; i < 2; i++)
            report(usual[i], sizes, nsizes, only, with_writes, half);
    for (int i = optind; i < argc; i++)
        report(argv[i], sizes, nsizes, only, with_writes, half);
    return 0;
}

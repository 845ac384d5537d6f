/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model: random dumps, loads, lookups, evictions, restarts and kills by several processes on one
 * directory, held against a dictionary of what was stored.
 *
 *     model [--seconds S] [--seed N] [--pipeline P] [--capacity-mb M] [--processes N]
 *
 * Always: no byte that is loaded is wrong, and no block is found that nobody dumped.  With a
 * capacity (small: evictions), the segments on disk never exceed it.  Without one, a block whose
 * dump said STORED before a question was asked is found by every process, loads, and is still there
 * at the end. Without --pipeline and --capacity-mb all four combinations share the time.
 *
 * One thread: it starts agents, keeps each busy with one line at a time, and judges the answers.
 */
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>

#include "support.h"

enum { MAX_WORKERS = 8, MAX_RANGE = 12, KEYS = 600, SMALL_KEYS = 3000 };

enum verb { DUMP, LAYERS, PART, LOAD, GROUPS, LOOKUP, PREFIX, REOPEN, VERBS };
static const struct {
    const char *name;
    unsigned weight;
} verbs[VERBS] = {
    [DUMP] = {"dump", 25},     [LAYERS] = {"layers", 10}, [PART] = {"part", 0},
    [LOAD] = {"load", 20},     [GROUPS] = {"load", 8},    [LOOKUP] = {"lookup", 20},
    [PREFIX] = {"prefix", 10}, [REOPEN] = {"reopen", 3},
};

struct worker {
    struct ts_agent agent;
    bool busy;
    enum verb verb;
    unsigned from, n;
    bool stored[MAX_RANGE]; /* when the question was asked */
    bool shared[MAX_RANGE]; /* somebody else dumped it too */
    char asked[128];
    uint64_t kill_us; /* 0: not to be killed */
};
struct model {
    uint64_t seed, rnd;
    const char *pipeline, *dir;
    unsigned capacity_mb, processes, nkeys;
    struct ts_opts opts;
    struct worker w[MAX_WORKERS];
    bool tried[SMALL_KEYS], stored[SMALL_KEYS];
    unsigned long ops, kills, hits, misses, refused, late, dumped;
};

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static _Noreturn void wrong(struct model *m, struct worker *w, const char *reply, const char *what)
{
    ts_die("WRONG: %s\n  process %u asked \"%s\", answered \"%s\", at operation %lu\n"
           "  again: --seed %llu --pipeline '%s' --capacity-mb %u --processes %u",
           what, (unsigned)(w - m->w), w->asked, reply ? reply : "(gone)", m->ops,
           (unsigned long long)m->seed, m->pipeline, m->capacity_mb, m->processes);
}

static void start_worker(struct model *m, struct worker *w)
{
    ts_agent_start(&w->agent, NULL, &m->opts);
    snprintf(w->asked, sizeof w->asked, "open");
    w->busy = true;
    w->verb = REOPEN;
    w->kill_us = 0;
}

/* ---- questions ---- */

static void ask(struct model *m, struct worker *w)
{
    unsigned die = 0;
    for (unsigned v = 0; v < VERBS; v++)
        die += verbs[v].weight;
    die = (unsigned)ts_below(&m->rnd, die);
    for (w->verb = 0; die >= verbs[w->verb].weight; w->verb++)
        die -= verbs[w->verb].weight;
    w->n = 1 + (unsigned)ts_below(&m->rnd, MAX_RANGE);
    w->from = (unsigned)ts_below(&m->rnd, m->nkeys - w->n);
    unsigned extra = 0;
    w->kill_us = 0;
    if (!ts_below(&m->rnd, 40)) { /* killed in a while, whatever it does then */
        w->kill_us = now_us() + ts_below(&m->rnd, 1u << ts_below(&m->rnd, 14)) + 1;
        if (!ts_below(&m->rnd, 3)) { /* with a block of which it has brought one shard */
            w->verb = PART;
            extra = (unsigned)ts_below(&m->rnd, 16);
        }
    }
    if (w->verb == LAYERS || w->verb == GROUPS)
        extra = 1 + (unsigned)ts_below(&m->rnd, w->verb == LAYERS ? 1000 : 16);
    for (unsigned i = 0; i < w->n; i++) {
        w->stored[i] = m->stored[w->from + i];
        w->shared[i] = m->tried[w->from + i];
        if (w->verb == DUMP || w->verb == LAYERS)
            m->tried[w->from + i] = true;
    }
    if (w->verb == REOPEN)
        snprintf(w->asked, sizeof w->asked, "reopen");
    else
        snprintf(w->asked, sizeof w->asked, "%s %u %u %u", verbs[w->verb].name, w->from, w->n,
                 extra);
    ts_agent_send(&w->agent, "%s", w->asked);
    w->busy = true;
}

/* ---- answers ---- */

/* A dump by layers whose block was there for the first of them and evicted for the rest cannot
 * become whole.  Without a pool it waits for what does not come, and all that is asked is that it
 * ends; a pool says at once that there was no room. */
static bool is_torn(const struct model *m, const struct worker *w, unsigned i, bool cache)
{
    if (w->verb != LAYERS || !strstr(m->pipeline, "Cache") != !cache)
        return false;
    return cache || (w->shared[i] && m->capacity_mb);
}

static void judge_letters(struct model *m, struct worker *w, const char *reply)
{
    bool dump = w->verb == DUMP || w->verb == LAYERS;

    if (strlen(reply) != w->n)
        wrong(m, w, reply, "not an answer");
    for (unsigned i = 0; i < w->n; i++) {
        unsigned key = w->from + i;
        switch (reply[i]) {
        case '.':
            if (!m->tried[key])
                wrong(m, w, reply, "a block that nobody dumped");
            if (dump)
                m->stored[key] = true;
            dump ? m->dumped++ : m->hits++;
            break;
        case 't':
            if (!is_torn(m, w, i, false))
                wrong(m, w, reply, "not done in time");
            m->late++;
            break;
        case 'a': /* a full queue is no failure, nor is a dump that finds no room */
        case 'f':
            if (reply[i] == 'f' && (!dump || !m->capacity_mb) && !is_torn(m, w, i, true))
                wrong(m, w, reply, "no room where there is no bound");
            m->refused++;
            break;
        case '-':
            if (dump)
                wrong(m, w, reply, "a dump says absent");
            if (w->stored[i] && !m->capacity_mb)
                wrong(m, w, reply, "a stored block was lost");
            m->misses++;
            break;
        default: wrong(m, w, reply, "wrong bytes, or an error nothing here can cause");
        }
    }
}

static void judge_lookup(struct model *m, struct worker *w, const char *reply)
{
    if (strlen(reply) != w->n)
        wrong(m, w, reply, "not an answer");
    for (unsigned i = 0; i < w->n; i++) {
        if (reply[i] != '0' && !m->tried[w->from + i])
            wrong(m, w, reply, "found a block that nobody dumped");
        if (reply[i] == '0' && w->stored[i] && !m->capacity_mb)
            wrong(m, w, reply, "a stored block is not found");
    }
}

static void judge_prefix(struct model *m, struct worker *w, const char *reply)
{
    unsigned hits = (unsigned)atoi(reply), sure = 0;

    while (sure < w->n && w->stored[sure] && !m->capacity_mb)
        sure++;
    if (hits > w->n || hits < sure)
        wrong(m, w, reply, "a prefix that is too long, or shorter than what is stored");
    for (unsigned i = 0; i < hits; i++)
        if (!m->tried[w->from + i])
            wrong(m, w, reply, "a prefix with a block that nobody dumped");
}

static void check_capacity(struct model *m)
{
    uint64_t bytes = ts_du(m->dir, "seg-");
    if (m->capacity_mb && bytes > (uint64_t)m->capacity_mb << 20)
        ts_die("WRONG: %llu bytes of segments, above %u MiB, at operation %lu (seed %llu)",
               (unsigned long long)bytes, m->capacity_mb, m->ops, (unsigned long long)m->seed);
}

static void judge(struct model *m, struct worker *w, const char *reply)
{
    w->busy = false;
    m->ops++;
    if (!reply)
        wrong(m, w, reply, "a process ended by itself");
    switch (w->verb) {
    case LOOKUP: judge_lookup(m, w, reply); break;
    case PREFIX: judge_prefix(m, w, reply); break;
    case REOPEN:
        if (strcmp(reply, "open"))
            wrong(m, w, reply, "a store that does not open");
        break;
    case PART: break; /* it may even be whole by now: others dump the same blocks */
    default: judge_letters(m, w, reply);
    }
    if (m->ops % 64 == 0)
        check_capacity(m);
}

/* ---- the run ---- */

/* Waits for an answer or the time of a kill; hangs are found by the time since a question. */
static void wait_for_any(struct model *m)
{
    struct pollfd p[MAX_WORKERS];
    uint64_t now = now_us(), until = now + 1000000;

    for (unsigned i = 0; i < m->processes; i++) {
        struct worker *w = &m->w[i];
        p[i] = (struct pollfd){.fd = w->agent.out, .events = POLLIN};
        if (w->kill_us && w->kill_us < until)
            until = w->kill_us > now ? w->kill_us : now;
        if (ts_now_ms() > w->agent.sent_ms + TS_WAIT_MS)
            wrong(m, w, "", "a process hangs");
    }
    struct timespec t = {(time_t)((until - now) / 1000000), (long)((until - now) % 1000000) * 1000};
    ppoll(p, m->processes, &t, NULL);
    for (unsigned i = 0; i < m->processes; i++) {
        struct worker *w = &m->w[i];
        bool late = true;
        const char *reply = NULL;
        if (w->kill_us && now_us() >= w->kill_us) {
            ts_agent_kill(&w->agent, SIGKILL);
            m->kills++;
            start_worker(m, w);
            continue;
        }
        if (p[i].revents)
            reply = ts_agent_reply_within(&w->agent, 0, &late);
        if (!late)
            judge(m, w, reply);
    }
}

/* A fresh process, when all others are gone, sees what the dictionary says. */
static void check_all(struct model *m)
{
    struct worker *w = &m->w[0];

    start_worker(m, w);
    judge(m, w, ts_agent_reply(&w->agent));
    for (w->from = 0; w->from + MAX_RANGE <= m->nkeys; w->from += w->n) {
        w->n = MAX_RANGE;
        memcpy(w->stored, m->stored + w->from, sizeof w->stored);
        w->verb = LOOKUP;
        snprintf(w->asked, sizeof w->asked, "lookup %u %u", w->from, w->n);
        judge(m, w, ts_agent_ask(&w->agent, "%s", w->asked));
        w->verb = LOAD;
        snprintf(w->asked, sizeof w->asked, "load %u %u", w->from, w->n);
        judge(m, w, ts_agent_ask(&w->agent, "%s", w->asked));
    }
    if (ts_agent_stop(&w->agent))
        wrong(m, w, "", "a process that did not end well");
}

static void run(struct model *m, double seconds)
{
    uint64_t until = ts_now_ms() + (uint64_t)(seconds * 1000);

    m->rnd = m->seed;
    m->dir = ts_dir();
    m->nkeys = m->capacity_mb ? SMALL_KEYS : KEYS;
    m->opts = ts_opts_for(m->pipeline, m->dir);
    ts_opt(&m->opts, "timeout_ms", "5000");
    ts_opt(&m->opts, "@entries", "%d", MAX_RANGE);
    ts_opt(&m->opts, "cache_buffer_capacity_gb", "0.0078125");
    if (m->seed / 4 % 2)
        ts_opt_key(&m->opts, m->dir);
    if (m->capacity_mb)
        ts_opt(&m->opts, "posix_capacity_gb", "%.9f", m->capacity_mb / 1024.0);
    for (unsigned i = 0; i < m->processes; i++)
        start_worker(m, &m->w[i]);
    while (ts_now_ms() < until) {
        for (unsigned i = 0; i < m->processes; i++)
            if (!m->w[i].busy && !m->w[i].kill_us)
                ask(m, &m->w[i]);
        wait_for_any(m);
    }
    for (unsigned i = 0; i < m->processes; i++) {
        struct worker *w = &m->w[i];
        if (w->busy)
            judge(m, w, ts_agent_reply(&w->agent));
        if (ts_agent_stop(&w->agent))
            wrong(m, w, "", "a process that did not end well");
    }
    check_capacity(m);
    check_all(m);
    ts_remove(m->dir);
    printf(
        "%-11s %4u MiB, %u processes: %lu operations, %lu kills; blocks: %lu dumped, %lu loaded, "
        "%lu absent, %lu refused, %lu late\n",
        m->pipeline, m->capacity_mb, m->processes, m->ops, m->kills, m->dumped, m->hits, m->misses,
        m->refused, m->late);
    fflush(stdout);
}

static const struct option long_options[] = {
    {"seconds", required_argument, NULL, 't'},
    {"seed", required_argument, NULL, 's'},
    {"pipeline", required_argument, NULL, 'p'},
    {"capacity-mb", required_argument, NULL, 'c'},
    {"processes", required_argument, NULL, 'n'},
    {"help", no_argument, NULL, 'h'},
    {NULL},
};

int main(int argc, char **argv)
{
    static struct model m;
    const char *pipeline = NULL;
    double seconds = ts_seconds(20);
    int capacity = -1, c;
    unsigned processes = 0;
    uint64_t seed = 0;

    while ((c = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
        switch (c) {
        case 't': seconds = atof(optarg); break;
        case 's': seed = strtoull(optarg, NULL, 0); break;
        case 'p': pipeline = optarg; break;
        case 'c': capacity = atoi(optarg); break;
        case 'n': processes = (unsigned)atoi(optarg); break;
        default:
            printf("model [--seconds S] [--seed N] [--pipeline P] [--capacity-mb M] "
                   "[--processes N]\n");
            return c == 'h' ? 0 : 2;
        }
    }
    if (processes > MAX_WORKERS)
        ts_die("--processes: %u; give %d at most", processes, MAX_WORKERS);
    if (!seed)
        seed = ts_seed();
    for (unsigned i = 0; i < 4; i++) {
        m = (struct model){.seed = seed + i, .pipeline = i & 1 ? "Cache|Posix" : "Posix"};
        m.capacity_mb = i & 2 ? 32 : 0;
        m.processes = processes ? processes : 2 + (unsigned)((seed + i) % 3);
        if (pipeline)
            m.pipeline = pipeline;
        if (capacity >= 0)
            m.capacity_mb = (unsigned)capacity;
        if (pipeline && capacity >= 0) {
            run(&m, seconds);
            break;
        }
        run(&m, seconds / 4);
    }
    return 0;
}

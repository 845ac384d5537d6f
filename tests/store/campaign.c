/* SPDX-License-Identifier: Apache-2.0 */
/*
 * campaign: kill -9 again and again, one store for all of it.
 *
 *     campaign [--kills N] [--blocks N] [--seed N]
 *
 * A store of so many small blocks is made once.  Then a process dumps, loads, looks up and, each
 * second time two, evicts in it, until it is killed at any instant, also while it opens.  A fresh
 * process opens what is left, and is timed until one lookup has found every block that was STORED.
 * It loads all that the dead one had reported STORED, and some of the others.
 *
 *     wrong  a block that came back with other bytes, failed its check, or was never dumped
 *     lost   a STORED block that is gone, where nothing was to be evicted; where it was, what is
 *            missing from a full store, two segments aside
 *
 * Prints how long the reopenings took and, last, the counts as JSON; the exit status is 1 unless
 * both are 0.  What a process says before it dies is in memory that it shares with this one, which
 * opens no store and has no threads, so that all the others can be its forks.
 */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "support.h"

enum {
    BLOCK = 4096,
    SLOT = 2 * BLOCK,   /* with its header */
    ENTRIES = 64,       /* of one task, at most */
    LIFE_BLOCKS = 4096, /* dumped in one life, at most */
    SAMPLES = 4,
    SEGMENT_MB = 4,
};
enum state { UNKNOWN, TRIED, STORED };
enum time { OPEN, KNOWN, CPU, NTIMES };
static const char *const times[NTIMES] = {"open", "open, and all that is STORED found",
                                          "the processor's part of it"};

static struct shared {
    _Atomic uint64_t next; /* keys from here on were never dumped */
    _Atomic uint8_t *state;
    uint64_t wrong, lost, evicted, lanes, bad;
    double ms[NTIMES];
} * all;

struct life {
    uint64_t first; /* of the keys that are new in it */
    uint64_t dice, number;
    bool bounded;
    struct ts_opts opts, after; /* of the process, and of the one that comes after it */
};
static const char *const pipelines[] = {"Posix", "Cache|Posix"};
static const char *const engines[] = {"psync", "aio", "io_uring"};
static uint64_t seed, blocks = 5000, kills = 24;
static const char *dir;

static double now_ms(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void *share(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        ts_die("%zu bytes of memory: %m", size);
    return p;
}

static struct ts_opts options_of(uint64_t number, unsigned pipeline, bool bounded)
{
    struct ts_opts o = ts_opts_for(pipelines[pipeline], dir);
    ts_opt(&o, "namespace", "campaign %d", (int)getpid());
    ts_opt(&o, "block_size", "%d", BLOCK);
    ts_opt(&o, "@entries", "%d", ENTRIES);
    ts_opt(&o, "posix_segment_mb", "%d", SEGMENT_MB);
    ts_opt(&o, "posix_io_engine", "%s", engines[number % TS_LEN(engines)]);
    if (bounded)
        ts_opt(&o, "posix_capacity_gb", "%.9f", (double)blocks * SLOT / (1u << 30));
    return o;
}

static void open_rig(struct ts_rig *rig, const struct ts_opts *o)
{
    if (ts_rig_open(rig, o))
        ts_die("the store does not open: %s", rig->why);
}

/* ---- the one that is killed ---- */

static void dump(struct ts_rig *rig, uint64_t from, size_t n)
{
    uint64_t next = atomic_load(&all->next);
    for (uint64_t i = from; i < from + n; i++)
        if (atomic_load(&all->state[i]) == UNKNOWN)
            atomic_store(&all->state[i], TRIED);
    if (from + n > next)
        atomic_store(&all->next, from + n);
    const char *letters = ts_rig_dump(rig, from, n);
    for (size_t i = 0; i < n; i++)
        if (letters[i] == '.')
            atomic_store(&all->state[from + i], STORED);
}

/* Says when it has done enough, and goes on. */
static _Noreturn void live(struct life *l, int begun)
{
    struct ts_rig rig;
    size_t dumped = 0;
    open_rig(&rig, &l->opts);
    for (uint64_t end = ts_below(&l->dice, 1u << ts_below(&l->dice, 8)), i = 0;; i++) {
        if (i == end && write(begun, "", 1) != 1)
            ts_die("pipe: %m");
        size_t n = 1 + (size_t)ts_below(&l->dice, ENTRIES);
        uint64_t next = atomic_load(&all->next), from = ts_below(&l->dice, next - ENTRIES);
        uint64_t what = ts_below(&l->dice, 8);
        if (what == 0) {
            ts_rig_lookup(&rig, from, n);
        } else if (what < 3 || dumped + n > LIFE_BLOCKS) {
            ts_rig_load(&rig, from, n);
        } else { /* mostly what is new; the rest may be there or may have been evicted */
            dump(&rig, what < 7 ? next : from, n);
            dumped += n;
        }
    }
}

/* ---- the one that comes after it ---- */

/* What a store has at least that has filled its bound: the journal, counted twice, takes three in
 * a hundred of it; one segment may be going and one coming. */
static uint64_t full(void)
{
    return blocks * 9 / 10 - 2 * (SEGMENT_MB << 20) / SLOT;
}

static void complain(uint64_t *count, const struct life *l, uint64_t no, const char *what)
{
    ++*count;
    fprintf(stderr, "# kill %llu, a life %s a bound: %llu %s (--seed %llu)\n",
            (unsigned long long)l->number, l->bounded ? "with" : "without", (unsigned long long)no,
            what, (unsigned long long)seed);
}

/* How long it takes until all that is STORED is known; what is not found is no longer. */
static void reopen(struct ts_rig *rig, const struct life *l)
{
    uint64_t next = atomic_load(&all->next), n = 0, gone = 0;
    uint64_t *no = malloc(next * sizeof *no);
    ucm_key *keys = malloc(next * sizeof *keys);
    uint8_t *found = calloc(next, 1);
    if (!no || !keys || !found)
        ts_die("no memory");
    for (uint64_t i = 0; i < next; i++)
        if (atomic_load(&all->state[i]) == STORED) {
            keys[n] = ts_key(i);
            no[n++] = i;
        }
    double start = now_ms(CLOCK_MONOTONIC), cpu = now_ms(CLOCK_PROCESS_CPUTIME_ID);
    open_rig(rig, &l->after);
    all->ms[OPEN] = now_ms(CLOCK_MONOTONIC) - start;
    ucm_lookup(rig->store, keys, n, found);
    all->ms[KNOWN] = now_ms(CLOCK_MONOTONIC) - start;
    all->ms[CPU] = now_ms(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    for (uint64_t i = 0; i < n; i++) {
        if (found[i])
            continue;
        atomic_store(&all->state[no[i]], TRIED);
        gone++;
        if (!l->bounded)
            complain(&all->lost, l, no[i], "was STORED and is not found");
    }
    if (l->bounded && n - gone < full())
        complain(&all->lost, l, full() - (n - gone), "blocks are missing from a full store");
    all->evicted += l->bounded ? gone : 0;
    free(no);
    free(keys);
    free(found);
}

static void load_and_judge(struct ts_rig *rig, const struct life *l, uint64_t from, size_t n)
{
    const char *letters = ts_rig_load(rig, from, n);
    for (size_t i = 0; i < n; i++) {
        enum state state = (enum state)atomic_load(&all->state[from + i]);
        if (letters[i] == '.' ? state == UNKNOWN : letters[i] != '-')
            complain(&all->wrong, l, from + i, "came back wrong");
        else if (letters[i] == '-' && state == STORED)
            complain(&all->lost, l, from + i, "is found and cannot be loaded");
    }
}

static void look_after(struct life *l)
{
    struct ts_rig rig;
    reopen(&rig, l);
    uint64_t next = atomic_load(&all->next);
    for (uint64_t from = l->first; from < next; from += ENTRIES)
        load_and_judge(&rig, l, from, next - from < ENTRIES ? (size_t)(next - from) : ENTRIES);
    for (unsigned i = 0; i < SAMPLES; i++)
        load_and_judge(&rig, l, ts_below(&l->dice, next - ENTRIES), ENTRIES);
    load_and_judge(&rig, l, next, ENTRIES); /* never dumped */
    ts_rig_close(&rig);
}

/* ---- the campaign ---- */

static void populate(struct life *l)
{
    struct ts_rig rig;
    open_rig(&rig, &l->opts);
    while (atomic_load(&all->next) < blocks)
        dump(&rig, atomic_load(&all->next), ENTRIES);
    ts_rig_close(&rig);
}

static void in_a_child(struct life *l, void (*fn)(struct life *))
{
    int status;
    pid_t pid = fork();
    if (!pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        fn(l);
        _exit(0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
        ts_die("a process that was to end well did not (--seed %llu)", (unsigned long long)seed);
}

/* One in four while it opens, the others when they have worked for a while. */
static void live_and_die(struct life *l)
{
    int begun[2], status;
    char byte;
    if (pipe(begun))
        ts_die("pipe: %m");
    pid_t pid = fork();
    if (!pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        live(l, begun[1]);
    }
    close(begun[1]);
    bool early = ts_below(&l->dice, 4) == 0;
    if (pid < 0 || (!early && read(begun[0], &byte, 1) != 1))
        ts_die("no process to kill");
    struct timespec t = {.tv_nsec = (long)ts_below(&l->dice, 1u << ts_below(&l->dice, 14)) * 1000};
    nanosleep(&t, NULL); /* the moment is the point: any will do */
    kill(pid, SIGKILL);
    if (waitpid(pid, &status, 0) != pid || !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        ts_die("a process ended by itself (--seed %llu)", (unsigned long long)seed);
    close(begun[0]);
}

static void count_lane(void *arg, const struct ucm_lane_info *lane)
{
    all->lanes++;
    all->bad += lane->bad + (lane->error != 0);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_times(double *ms[TS_LEN(pipelines)][NTIMES], const size_t n[TS_LEN(pipelines)])
{
    char what[64];
    printf("%-50s%7s%8s%8s%8s%8s\n", "ms to", "times", "least", "median", "p99", "most");
    for (unsigned p = 0; p < TS_LEN(pipelines); p++)
        for (unsigned t = 0; t < NTIMES && n[p]; t++) {
            double *v = ms[p][t];
            qsort(v, n[p], sizeof *v, by_value);
            snprintf(what, sizeof what, "%s: %s", pipelines[p], times[t]);
            printf("%-50s%7zu%8.1f%8.1f%8.1f%8.1f\n", what, n[p], v[0], v[n[p] / 2],
                   v[n[p] * 99 / 100], v[n[p] - 1]);
        }
}

static void read_args(int argc, char **argv)
{
    static const struct option longs[] = {{"kills", required_argument, NULL, 'k'},
                                          {"blocks", required_argument, NULL, 'b'},
                                          {"seed", required_argument, NULL, 's'},
                                          {"help", no_argument, NULL, 'h'},
                                          {NULL}};
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) >= 0;) {
        uint64_t value = optarg ? strtoull(optarg, NULL, 0) : 0;
        if (c == 'k' && value)
            kills = value;
        else if (c == 'b' && value >= LIFE_BLOCKS)
            blocks = value;
        else if (c == 's')
            seed = value;
        else
            printf("usage: campaign [--kills N] [--blocks N] [--seed N]\n"), exit(c != 'h');
    }
}

int main(int argc, char **argv)
{
    double *ms[TS_LEN(pipelines)][NTIMES];
    size_t n[TS_LEN(pipelines)] = {0};
    read_args(argc, argv);
    seed = seed ? seed : ts_seed();
    dir = ts_dir();
    all = share(sizeof *all);
    all->state = share(blocks + kills * LIFE_BLOCKS + 2 * ENTRIES);
    for (unsigned i = 0; i < TS_LEN(pipelines) * NTIMES; i++)
        ms[i / NTIMES][i % NTIMES] = share((kills + 1) * sizeof(double));
    struct life l = {.dice = seed, .opts = options_of(0, 0, false)};
    in_a_child(&l, populate);
    for (uint64_t i = 0; i < kills; i++) {
        unsigned p = i % TS_LEN(pipelines), after = p;
        l.first = atomic_load(&all->next);
        l.number = i;
        l.bounded = i / 2 % 2;
        if (l.bounded) /* what has been evicted from storage may be in DRAM, for now */
            after = 0;
        l.opts = options_of(i, p, l.bounded);
        l.after = options_of(i, after, false);
        live_and_die(&l);
        in_a_child(&l, look_after);
        ts_random(&l.dice);
        for (unsigned t = 0; t < NTIMES; t++)
            ms[after][t][n[after]] = all->ms[t];
        n[after]++;
    }
    ucm_inspect(dir, &(struct ucm_inspect){.flags = UCM_INSPECT_VERIFY, .lane = count_lane});
    all->wrong += all->bad;
    print_times(ms, n);
    printf("{\"kills\":%llu,\"blocks\":%llu,\"dumped\":%llu,\"evicted\":%llu,\"lanes\":%llu,"
           "\"wrong\":%llu,\"lost\":%llu}\n",
           (unsigned long long)kills, (unsigned long long)blocks,
           (unsigned long long)atomic_load(&all->next), (unsigned long long)all->evicted,
           (unsigned long long)all->lanes, (unsigned long long)all->wrong,
           (unsigned long long)all->lost);
    return all->wrong || all->lost;
}

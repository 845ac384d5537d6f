/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lookups: keys per second and the time of a call, for keys that are stored and keys that are not,
 * and how long a store takes from opening to its first exact answer.  Idle: what a store costs when
 * nobody asks it anything.
 */
#include "bench.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { POPULATE = 4096, MAX_CALLS = 200000, IDLE_S = 2, SETTLE_S = 1, IDLE_ROOM = 64 << 20 };
static const double lookup_s = 0.25;              /* of calls for one figure */
static const uint64_t absent = UINT64_C(1) << 40; /* keys from here on are never stored */

static const struct column lookup_columns[] = {
    {"blocks", "blocks", COLUMN_COUNT, 8},
    {"keys", "keys", COLUMN_COUNT, 6},
    {"hit_mkeys_per_s", "hit M/s", COLUMN_NUMBER, 8, 2},
    {"hit_p50_us", "p50 us", COLUMN_NUMBER, 8, 2},
    {"hit_p99_us", "p99 us", COLUMN_NUMBER, 8, 2},
    {"miss_mkeys_per_s", "miss M/s", COLUMN_NUMBER, 8, 2},
    {"miss_p50_us", "p50 us", COLUMN_NUMBER, 8, 2},
    {"miss_p99_us", "p99 us", COLUMN_NUMBER, 8, 2},
};

struct rate {
    double mkeys, p50, p99;
};

/* Calls ucm_lookup with n keys in a row, from another place each time, until time is up. */
static int lookup_rate(ucm_store *store, uint64_t from, uint64_t blocks, uint64_t n, size_t want,
                       struct rate *rate)
{
    size_t calls = 0;
    ucm_key *keys = calloc(n, sizeof *keys);
    uint8_t *found = malloc(n);
    double *us = calloc(MAX_CALLS, sizeof *us), busy = 0;
    int err = keys && found && us ? 0 : cannot("out of memory");

    while (!err && busy < lookup_s && calls < MAX_CALLS) {
        uint64_t first = calls * 7919 % (blocks - n + 1);
        for (uint64_t i = 0; i < n; i++)
            keys[i] = bench_key(from + first + i);
        double start = now_s();
        ssize_t hits = ucm_lookup(store, keys, n, found);
        double took = now_s() - start;
        if (hits < 0 || (size_t)hits != want)
            err = cannot("bench: a lookup found %zd keys of %zu", hits, want);
        busy += took;
        us[calls++] = took * 1e6;
    }
    if (!err)
        *rate = (struct rate){.mkeys = (double)(n * calls) / busy / 1e6,
                              .p50 = percentile(us, calls, 50),
                              .p99 = percentile(us, calls, 99)};
    free(us);
    free(found);
    free(keys);
    return err;
}

void lookup_table(struct bench *b)
{
    report_table(&b->report, "lookup", lookup_columns, COUNT_OF(lookup_columns));
}

int lookup_rows(struct bench *b, ucm_store *store, uint64_t blocks)
{
    for (unsigned i = 0; i < b->keys.n; i++) {
        uint64_t n = b->keys.v[i];
        struct rate hit, miss;
        if (n > blocks)
            continue;
        if (lookup_rate(store, 0, blocks, n, n, &hit) ||
            lookup_rate(store, absent, blocks, n, 0, &miss))
            return TOOL_CANNOT;
        report_row(&b->report, (union cell[]){{.num = (double)blocks},
                                              {.num = (double)n},
                                              {.num = hit.mkeys},
                                              {.num = hit.p50},
                                              {.num = hit.p99},
                                              {.num = miss.mkeys},
                                              {.num = miss.p50},
                                              {.num = miss.p99}});
    }
    return 0;
}

/* Stores keys 0 .. blocks - 1; all of a batch come from the same few blocks of memory. */
static int populate(const struct bench *b, ucm_store *store, uint64_t blocks)
{
    struct arena a = {0};
    ucm_map *map = NULL;
    ucm_key keys[POPULATE];
    uint32_t numbers[POPULATE];
    int err = arena_new(&a, LOOKUP_BLOCK, 1, POPULATE);

    if (!err && !(err = bench_map(store, &a, &map)))
        arena_fill(&a);
    for (uint64_t i = 0; i < blocks && !err; i += POPULATE) {
        struct ucm_batch batch = {.keys = keys, .blocks = numbers, .n = POPULATE};
        ucm_task *task;
        if (batch.n > blocks - i)
            batch.n = blocks - i;
        for (uint32_t k = 0; k < batch.n; k++) {
            keys[k] = bench_key(i + k);
            numbers[k] = k;
        }
        err = ucm_dump(store, map, &batch, &task);
        if (!err) {
            err = ucm_task_wait(task, UCM_STORED, BENCH_WAIT_MS);
            ucm_task_free(task);
        }
        if (err)
            cannot("bench: storing blocks to look up: %s", ucm_strerror(err));
    }
    ucm_map_free(map);
    arena_free(&a);
    return err;
}

int open_and_ask(const struct bench *b, uint64_t blocks, ucm_store **store_p, struct start *st)
{
    ucm_key key = bench_key(blocks - 1);
    uint8_t found;
    double start = now_s();
    int err = bench_store(b, NULL, LOOKUP_BLOCK, blocks * LOOKUP_BLOCK, store_p);

    if (err)
        return err;
    st->blocks = (double)blocks;
    st->open_ms = (now_s() - start) * 1e3;
    start = now_s();
    ssize_t hits = ucm_lookup(*store_p, &key, 1, &found);
    st->first_ms = (now_s() - start) * 1e3;
    if (hits == 1)
        return 0;
    ucm_store_close(*store_p);
    return cannot("bench: a store opened anew does not find the last of %llu blocks",
                  (unsigned long long)blocks);
}

static int lookup_count(struct bench *b, uint64_t blocks, struct start *st)
{
    struct bench one = *b; /* blocks of one page, one shard */
    ucm_store *store;

    one.shards = 1;
    bench_empty_scratch(b);
    int err = bench_store(&one, NULL, LOOKUP_BLOCK, blocks * LOOKUP_BLOCK, &store);
    if (err)
        return err;
    err = populate(&one, store, blocks);
    if (strstr(b->pipeline, "Posix")) {
        ucm_store_close(store);
        err = err ? err : open_and_ask(&one, blocks, &store, st);
        if (err)
            return err;
    }
    err = err ? err : lookup_rows(b, store, blocks);
    ucm_store_close(store);
    return err;
}

static const struct column start_columns[] = {
    {"blocks", "blocks", COLUMN_COUNT, 8},
    {"open_ms", "open ms", COLUMN_NUMBER, 8, 2},
    {"first_lookup_ms", "first lookup ms", COLUMN_NUMBER, 15, 2},
};

void start_rows(struct bench *b, const struct start *st, unsigned n)
{
    report_table(&b->report, "restart", start_columns, COUNT_OF(start_columns));
    for (unsigned i = 0; i < n; i++)
        report_row(
            &b->report,
            (union cell[]){{.num = st[i].blocks}, {.num = st[i].open_ms}, {.num = st[i].first_ms}});
    report_table_end(&b->report);
}

int bench_lookup(struct bench *b)
{
    struct start st[COUNT_OF(b->counts.v)];
    int err = 0;

    lookup_table(b);
    for (unsigned i = 0; i < b->counts.n && !err; i++) {
        st[i] = (struct start){.blocks = NAN, .open_ms = NAN, .first_ms = NAN};
        err = lookup_count(b, b->counts.v[i], &st[i]);
    }
    report_table_end(&b->report);
    if (!err)
        start_rows(b, st, b->counts.n);
    return err;
}

/* ---- idle ---- */

struct idle {
    unsigned threads;
    double switches; /* voluntary: how often a thread woke and went to sleep again */
};

static double switches_of(const char *tid)
{
    char path[64], line[128];
    double n = 0;

    snprintf(path, sizeof path, "/proc/self/task/%.20s/status", tid);
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "voluntary_ctxt_switches:", 24))
            n = strtod(line + 24, NULL);
    if (f)
        fclose(f);
    return n;
}

/* All threads but the one that asks. */
static struct idle look_at_threads(void)
{
    struct idle idle = {0};
    DIR *dir = opendir("/proc/self/task");

    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (e->d_name[0] == '.' || atoi(e->d_name) == (int)getpid())
            continue;
        idle.threads++;
        idle.switches += switches_of(e->d_name);
    }
    if (dir)
        closedir(dir);
    return idle;
}

static const struct column idle_columns[] = {
    {"pipeline", "idle", COLUMN_TEXT, -12},
    {"threads", "threads", COLUMN_COUNT, 8},
    {"switches_per_s", "switches/s", COLUMN_NUMBER, 10, 1},
    {"cpu_ms_per_s", "CPU ms/s", COLUMN_NUMBER, 8, 2},
    {"open_ms", "open ms", COLUMN_NUMBER, 8, 2},
};

static int idle_row(struct bench *b, const char *pipeline)
{
    struct timing t;
    ucm_store *store;

    bench_empty_scratch(b);
    double start = now_s();
    int err = bench_store(b, pipeline, b->blocks.v[0], IDLE_ROOM, &store);
    double open_ms = (now_s() - start) * 1e3;
    if (err)
        return err;
    struct arena a = {0};
    if (!(err = arena_new(&a, b->blocks.v[0], b->shards, 16))) { /* so that it has worked once */
        arena_fill(&a);
        err = move_blocks(b, store, &a, 1, NULL, &t);
    }
    if (!err) {
        nanosleep(&(struct timespec){.tv_sec = SETTLE_S}, NULL); /* the pool gets its pages */
        struct idle before = look_at_threads();
        timing_start(&t);
        nanosleep(&(struct timespec){.tv_sec = IDLE_S}, NULL);
        timing_stop(&t);
        struct idle after = look_at_threads();
        report_row(&b->report,
                   (union cell[]){{.text = pipeline},
                                  {.num = after.threads},
                                  {.num = (after.switches - before.switches) / t.seconds},
                                  {.num = t.cpu * 1e3 / t.seconds},
                                  {.num = open_ms}});
    }
    arena_free(&a);
    ucm_store_close(store);
    return err;
}

int bench_idle(struct bench *b)
{
    report_table(&b->report, "idle", idle_columns, COUNT_OF(idle_columns));
    int err = idle_row(b, "Posix");
    err = err ? err : idle_row(b, "Cache|Posix");
    report_table_end(&b->report);
    return err;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bench.h - what the files of `ucm bench` share.  Every measurement goes through ucm.h; blocks
 * carry a pattern made from their number, so that a wrong byte never counts as speed.
 */
#ifndef UCM_BENCH_H
#define UCM_BENCH_H

#include <limits.h>

#include "tool.h"

enum { MAX_REPEAT = 15, BENCH_WAIT_MS = 600000 };

struct bench {
    /* options */
    const char *dir, *pipeline, *engine, *ops;
    struct list blocks, keys, counts;
    struct texts set;
    uint64_t shards, total, depth, repeat, task;
    int direct, fio, json;
    /* state */
    struct report report;
    char scratch[PATH_MAX - 64];
    int fio_there;
};
/* Memory that holds n blocks as an engine would: shard after shard, in each the blocks. */
struct arena {
    char *base;
    uint64_t block, shard, n;
};
struct timing {
    double seconds, cpu;
};
struct yardstick {    /* what fio or memcpy did with the same bytes */
    double gbps, cpu; /* CPU seconds per GB; NAN: it did not run */
};

/* ucm_bench.c: opening what the options say */
/* pipeline NULL: that of the options.  room: bytes the DRAM tier is to hold. */
int bench_store(const struct bench *b, const char *pipeline, uint64_t block, uint64_t room,
                ucm_store **store_p);
int bench_map(ucm_store *store, const struct arena *a, ucm_map **map_p);
/* Removes what is below the scratch directory / sends it to disk and out of the page cache. */
void bench_empty_scratch(const struct bench *b);
void bench_drop_cache(const struct bench *b);

/* ucm_bench_data.c: memory, patterns, time */
int arena_new(struct arena *a, uint64_t block, uint64_t shards, uint64_t n);
void arena_free(struct arena *a);
void arena_fill(struct arena *a);
void arena_spoil(struct arena *a);
/* How many blocks do not hold their pattern. */
uint64_t arena_wrong(const struct arena *a);
ucm_key bench_key(uint64_t i);
/* 0 .. n - 1 in a random order that is the same each time; NULL: out of memory. */
uint32_t *shuffled(uint64_t n);
double now_s(void);
void timing_start(struct timing *t);
void timing_stop(struct timing *t);
double median(double *v, unsigned n);
/* p in 0 .. 100 of n samples, which are sorted. */
double percentile(double *v, size_t n, double p);

/* ucm_bench_move.c */
/* Dumps or loads the arena's blocks in this order (NULL: in turn), several tasks under way at a
 * time. */
int move_blocks(const struct bench *b, ucm_store *store, const struct arena *a, int dump,
                const uint32_t *order, struct timing *t);
int bench_disk(struct bench *b, int dump, int load);
int bench_hot(struct bench *b);
int bench_latency(struct bench *b);

/* ucm_bench_lookup.c */
enum { LOOKUP_BLOCK = 4096 }; /* size of the blocks that are looked up */
struct start {
    double blocks, open_ms, first_ms;
};
int bench_lookup(struct bench *b);
/* Opens a store over what another left, and asks for the last of its keys: the answer is exact, so
 * by then the store knows all there is. */
int open_and_ask(const struct bench *b, uint64_t blocks, ucm_store **store_p, struct start *st);
/* The rows of one store that has keys 0 .. blocks - 1. */
void lookup_table(struct bench *b);
int lookup_rows(struct bench *b, ucm_store *store, uint64_t blocks);
void start_rows(struct bench *b, const struct start *st, unsigned n);
int bench_idle(struct bench *b);

/* ucm_bench_fio.c */
int fio_find(void);
/* fio writes (or reads at random) a file of this size in the scratch directory. */
struct yardstick fio_write(const struct bench *b, uint64_t block, uint64_t total);
struct yardstick fio_read(const struct bench *b, uint64_t block, uint64_t total);

#endif

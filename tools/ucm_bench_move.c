/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dumps and loads: GB/s and CPU seconds per GB against fio (storage) or memcpy (DRAM), and the
 * latency of one block.  Every load is checked byte by byte, outside the time that is measured.
 */
#include "bench.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { IN_FLIGHT = 4, MAX_BATCH = 1024, SAMPLES = 512 };

/* ---- many blocks: tasks of --task bytes, a few under way at a time ---- */

struct window {
    ucm_task *v[IN_FLIGHT];
    unsigned first, n;
    uint64_t failed;
    int err; /* the first error of a block */
};

static void wait_oldest(struct window *w)
{
    ucm_task *task = w->v[w->first];
    int err = ucm_task_wait(task, UCM_STORED, BENCH_WAIT_MS);

    if (err) {
        w->failed++;
        w->err = w->err ? w->err : err;
    }
    ucm_task_free(task);
    w->first = (w->first + 1) % IN_FLIGHT;
    w->n--;
}

static int send_batch(ucm_store *store, ucm_map *map, const struct ucm_batch *batch, int dump,
                      struct window *w)
{
    if (w->n == IN_FLIGHT)
        wait_oldest(w);
    for (;;) {
        ucm_task **place = &w->v[(w->first + w->n) % IN_FLIGHT];
        int err = dump ? ucm_dump(store, map, batch, place) : ucm_load(store, map, batch, place);
        if (!err)
            w->n++;
        if (err != -EAGAIN || !w->n)
            return err;
        wait_oldest(w);
    }
}

int move_blocks(const struct bench *b, ucm_store *store, const struct arena *a, int dump,
                const uint32_t *order, struct timing *t)
{
    uint64_t per = b->task / a->block;
    struct window w = {0};
    ucm_key keys[MAX_BATCH];
    uint32_t blocks[MAX_BATCH];
    ucm_map *map;
    int err = bench_map(store, a, &map);

    if (err)
        return err;
    per = per < 1 ? 1 : per > MAX_BATCH ? MAX_BATCH : per;
    timing_start(t);
    for (uint64_t i = 0; i < a->n && !err; i += per) {
        struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = a->n - i};
        if (batch.n > per)
            batch.n = per;
        for (size_t k = 0; k < batch.n; k++) {
            blocks[k] = order ? order[i + k] : (uint32_t)(i + k);
            keys[k] = bench_key(blocks[k]);
        }
        err = send_batch(store, map, &batch, dump, &w);
    }
    while (w.n)
        wait_oldest(&w);
    timing_stop(t);
    ucm_map_free(map);
    if (err)
        return cannot("bench: %s: %s", dump ? "dump" : "load", ucm_strerror(err));
    if (w.failed)
        return cannot("bench: blocks could not be %s: %s", dump ? "stored" : "loaded",
                      ucm_strerror(w.err));
    return 0;
}

/* Loads in this order and compares every byte. */
static int load_checked(const struct bench *b, ucm_store *store, struct arena *a,
                        const uint32_t *order, struct timing *t)
{
    arena_spoil(a);
    int err = move_blocks(b, store, a, 0, order, t);
    uint64_t wrong = err ? 0 : arena_wrong(a);

    if (wrong)
        return cannot("bench: %llu loaded blocks of %llu bytes hold wrong data",
                      (unsigned long long)wrong, (unsigned long long)a->block);
    return err;
}

/* ---- storage, against fio ---- */

struct samples {
    double gbps[MAX_REPEAT], cpu[MAX_REPEAT], other[MAX_REPEAT], other_cpu[MAX_REPEAT];
    double ratio[MAX_REPEAT];
    unsigned n;
};

static void add_sample(struct samples *s, const struct arena *a, const struct timing *t,
                       struct yardstick other)
{
    double gb = (double)(a->block * a->n) / 1e9;

    s->gbps[s->n] = gb / t->seconds;
    s->cpu[s->n] = t->cpu / gb;
    s->other[s->n] = other.gbps;
    s->other_cpu[s->n] = other.cpu;
    s->ratio[s->n] = gb / t->seconds / other.gbps;
    s->n++;
}

static const struct column disk_columns[] = {
    {"op", "op", COLUMN_TEXT, -5},
    {"block", "block", COLUMN_SIZE, 8},
    {"gbps", "GB/s", COLUMN_NUMBER, 7, 2},
    {"cpu_s_per_gb", "CPU s/GB", COLUMN_NUMBER, 8, 3},
    {"fio_gbps", "fio GB/s", COLUMN_NUMBER, 8, 2},
    {"fio_ratio", "ratio", COLUMN_NUMBER, 6, 2},
    {"fio_cpu_s_per_gb", "fio CPU", COLUMN_NUMBER, 8, 3},
};

static void move_row(struct bench *b, const char *op, uint64_t block, struct samples *s)
{
    report_row(&b->report, (union cell[]){{.text = op},
                                          {.num = (double)block},
                                          {.num = median(s->gbps, s->n)},
                                          {.num = median(s->cpu, s->n)},
                                          {.num = median(s->other, s->n)},
                                          {.num = median(s->ratio, s->n)},
                                          {.num = median(s->other_cpu, s->n)}});
}

/* fio writes, we dump, fio reads, we load in a store opened anew: each pair is moments apart. */
static int disk_round(struct bench *b, struct arena *a, const uint32_t *order,
                      struct samples *dumps, struct samples *loads)
{
    uint64_t total = a->block * a->n;
    ucm_store *store;
    struct timing t;

    bench_empty_scratch(b);
    struct yardstick fio = fio_write(b, a->block, total);
    int err = bench_store(b, NULL, a->block, total, &store);
    if (err)
        return err;
    arena_fill(a);
    err = move_blocks(b, store, a, 1, NULL, &t);
    ucm_store_close(store);
    if (err)
        return err;
    add_sample(dumps, a, &t, fio);
    if (!loads)
        return 0;
    bench_drop_cache(b);
    fio = fio_read(b, a->block, total);
    if ((err = bench_store(b, NULL, a->block, total, &store)))
        return err;
    err = load_checked(b, store, a, order, &t);
    ucm_store_close(store);
    if (!err)
        add_sample(loads, a, &t, fio);
    return err;
}

static int disk_cell(struct bench *b, uint64_t block, int dump, int load)
{
    struct arena a = {0};
    struct samples dumps = {0}, loads = {0};
    int err = arena_new(&a, block, b->shards, b->total / block ? b->total / block : 1);
    uint32_t *order = err ? NULL : shuffled(a.n);

    if (!err && !order)
        err = cannot("out of memory");
    for (uint64_t i = 0; i < b->repeat && !err; i++)
        err = disk_round(b, &a, order, &dumps, load ? &loads : NULL);
    if (!err && dump)
        move_row(b, "dump", block, &dumps);
    if (!err && load)
        move_row(b, "load", block, &loads);
    free(order);
    arena_free(&a);
    return err;
}

int bench_disk(struct bench *b, int dump, int load)
{
    int err = 0;

    report_table(&b->report, "storage", disk_columns, COUNT_OF(disk_columns));
    for (unsigned i = 0; i < b->blocks.n && !err; i++)
        err = disk_cell(b, b->blocks.v[i], dump, load);
    report_table_end(&b->report);
    return err;
}

/* ---- DRAM, against memcpy ---- */

static const struct column hot_columns[] = {
    {"op", "op", COLUMN_TEXT, -5},
    {"block", "block", COLUMN_SIZE, 8},
    {"gbps", "GB/s", COLUMN_NUMBER, 7, 2},
    {"cpu_s_per_gb", "CPU s/GB", COLUMN_NUMBER, 8, 3},
    {"memcpy_gbps", "memcpy", COLUMN_NUMBER, 8, 2},
    {"memcpy_ratio", "ratio", COLUMN_NUMBER, 6, 2},
    {"memcpy_cpu_s_per_gb", NULL, COLUMN_NUMBER, 0, 3},
};

/* One thread copies the same bytes, block by block in the same order. */
static struct yardstick memcpy_all(struct arena *to, const struct arena *from,
                                   const uint32_t *order)
{
    double gb = (double)(to->block * to->n) / 1e9;
    struct timing t;

    timing_start(&t);
    for (uint64_t i = 0; i < to->n; i++)
        memcpy(to->base + order[i] * to->block, from->base + order[i] * to->block, to->block);
    timing_stop(&t);
    return (struct yardstick){.gbps = gb / t.seconds, .cpu = t.cpu / gb};
}

static const char *with_cache(const struct bench *b)
{
    return strcasestr(b->pipeline, "Cache") ? b->pipeline : "Cache|Posix";
}

static int hot_cell(struct bench *b, uint64_t block)
{
    struct arena a = {0}, other = {0};
    uint64_t n = b->total / block ? b->total / block : 1;
    uint32_t *order = shuffled(n);
    ucm_store *store = NULL;
    struct samples loads = {0};
    struct timing t;
    int err = order ? 0 : cannot("out of memory");

    bench_empty_scratch(b);
    if (!err && !(err = arena_new(&a, block, b->shards, n)))
        err = arena_new(&other, block, b->shards, n);
    if (!err)
        err = bench_store(b, with_cache(b), block, block * n, &store);
    if (!err) {
        arena_fill(&a);
        arena_spoil(&other);
        err = move_blocks(b, store, &a, 1, NULL, &t);
    }
    for (uint64_t i = 0; i < b->repeat && !err; i++) {
        struct yardstick copy = memcpy_all(&a, &other, order);
        if (!(err = load_checked(b, store, &a, order, &t)))
            add_sample(&loads, &a, &t, copy);
    }
    ucm_store_close(store);
    if (!err)
        move_row(b, "hot", block, &loads);
    arena_free(&other);
    arena_free(&a);
    free(order);
    return err;
}

int bench_hot(struct bench *b)
{
    int err = 0;

    report_table(&b->report, "dram", hot_columns, COUNT_OF(hot_columns));
    for (unsigned i = 0; i < b->blocks.n && !err; i++)
        err = hot_cell(b, b->blocks.v[i]);
    report_table_end(&b->report);
    return err;
}

/* ---- one block at a time ---- */

static const struct column latency_columns[] = {
    {"op", "op", COLUMN_TEXT, -10},
    {"block", "block", COLUMN_SIZE, 8},
    {"p50_us", "p50 us", COLUMN_NUMBER, 9, 1},
    {"p99_us", "p99 us", COLUMN_NUMBER, 9, 1},
    {"memcpy_us", "memcpy us", COLUMN_NUMBER, 9, 1},
};
static const uint64_t latency_blocks[] = {4096, 65536, 1048576};

static int one_at_a_time(ucm_store *store, const struct arena *a, int dump, enum ucm_stage stage,
                         double *us)
{
    ucm_map *map;
    int err = bench_map(store, a, &map);

    for (uint32_t i = 0; i < a->n && !err; i++) {
        ucm_key key = bench_key(i);
        struct ucm_batch batch = {.keys = &key, .blocks = &i, .n = 1};
        ucm_task *task;
        double start = now_s();
        err = dump ? ucm_dump(store, map, &batch, &task) : ucm_load(store, map, &batch, &task);
        if (err)
            break;
        err = ucm_task_wait(task, stage, BENCH_WAIT_MS);
        us[i] = (now_s() - start) * 1e6;
        if (!err)
            err = ucm_task_wait(task, UCM_STORED, BENCH_WAIT_MS);
        ucm_task_free(task);
    }
    ucm_map_free(map);
    return err ? cannot("bench: one block: %s", ucm_strerror(err)) : 0;
}

static void latency_row(struct bench *b, const char *op, const struct arena *a, double *us,
                        double copy)
{
    report_row(&b->report, (union cell[]){{.text = op},
                                          {.num = (double)a->block},
                                          {.num = percentile(us, a->n, 50)},
                                          {.num = percentile(us, a->n, 99)},
                                          {.num = copy}});
}

static double memcpy_us(struct arena *a)
{
    double us[SAMPLES];
    char *to = malloc(a->block);

    if (!to)
        return NAN;
    memset(to, 0, a->block);
    for (uint64_t i = 0; i < a->n; i++) {
        double start = now_s();
        memcpy(to, a->base + i * a->block, a->block);
        __asm__ volatile(""
                         :
                         : "r"(to)
                         : "memory"); /* nobody reads it, copied it is all the same */
        us[i] = (now_s() - start) * 1e6;
    }
    free(to);
    return median(us, (unsigned)a->n);
}

/* Dumps and loads SAMPLES blocks, each by itself: hot in a stack with DRAM, where a dump counts
 * when the memory is free again; cold straight from storage, where it counts when others can load
 * it. */
static int latency_of(struct bench *b, struct arena *a, int hot)
{
    const char *pipeline = hot ? with_cache(b) : "Posix";
    double us[SAMPLES], copy = hot ? memcpy_us(a) : NAN;
    uint64_t room = 2 * a->block * a->n;
    ucm_store *store;

    bench_empty_scratch(b);
    int err = bench_store(b, pipeline, a->block, room, &store);
    if (err)
        return err;
    arena_fill(a);
    err = one_at_a_time(store, a, 1, hot ? UCM_RELEASED : UCM_STORED, us);
    if (!err)
        latency_row(b, hot ? "dump, hot" : "dump, cold", a, us, copy);
    if (!hot) { /* by a store that has the blocks only in storage */
        ucm_store_close(store);
        bench_drop_cache(b);
        store = NULL;
        err = err ? err : bench_store(b, pipeline, a->block, room, &store);
    }
    arena_spoil(a);
    if (!err)
        err = one_at_a_time(store, a, 0, UCM_RELEASED, us);
    ucm_store_close(store);
    if (!err && arena_wrong(a))
        err = cannot("bench: a loaded block holds wrong data");
    if (!err)
        latency_row(b, hot ? "load, hot" : "load, cold", a, us, copy);
    return err;
}

int bench_latency(struct bench *b)
{
    int err = 0;

    report_table(&b->report, "latency", latency_columns, COUNT_OF(latency_columns));
    for (unsigned i = 0; i < COUNT_OF(latency_blocks) && !err; i++) {
        struct arena a = {0};
        err = arena_new(&a, latency_blocks[i], 1, SAMPLES);
        for (int hot = 0; hot < 2 && !err; hot++)
            err = latency_of(b, &a, hot);
        arena_free(&a);
    }
    report_table_end(&b->report);
    return err;
}

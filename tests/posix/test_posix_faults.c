/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Operations on the disk are spoilt, one in a life: reads, writes, syncs, reads of journals, and
 * every change of a name or a size (fault.h).  Whatever happens, each slice ends, nothing wrong is
 * ever loaded, and the next life of the store finds only what is right and can store again.
 *
 *     UCM_TEST_EVERY=1   each of them in each way, under each engine; else under the engine, and
 *                        beginning with the operation, that the seed says, by the steps below
 *     UCM_TEST_SEED=N    that seed
 */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "fault.h"
#include "store/posix.h"
#include "support.h"

/* ---- a life of a store ---- */

enum { BLOCKS = 40, SHARDS = 4, STEP = 5 };

static const struct shape shape = {4096, SHARDS, 2};
static const char *const engines[] = {"psync", "aio", "io_uring"};
static const char *engine;
static uint64_t seed;

static const char *options(const char *more)
{
    static char text[256]; /* some twenty slots: segments are made, blocks evicted */
    snprintf(text, sizeof text, "posix_capacity_gb=0.0009 posix_sync=full posix_io_engine=%s%s",
             engine, more);
    return text;
}

static void try_dump(ucm_store *store, struct memory *m, uint64_t first)
{
    for (size_t i = 0; i < m->n; i++)
        paint(m, i, first + i);
    /* Half of them in two parts. */
    if (first / STEP % 2) {
        free(move(store, m, true, first, 0, 0).status);
        return;
    }
    ucm_key keys[STEP];
    uint32_t blocks[STEP];
    ucm_task *tasks[2];
    for (uint32_t i = 0; i < STEP; i++) {
        keys[i] = key_of(first + i);
        blocks[i] = i;
    }
    for (unsigned part = 0; part < 2; part++) {
        struct ucm_batch batch = {.keys = keys,
                                  .blocks = blocks,
                                  .n = STEP,
                                  .shard = part * SHARDS / 2,
                                  .nshards = SHARDS / 2};
        assert_int_equal(ucm_dump(store, m->map, &batch, &tasks[part]), 0);
    }
    for (unsigned part = 0; part < 2; part++) {
        ucm_task_wait(tasks[part], UCM_RELEASED, 30000);
        assert_int_equal(ucm_task_done(tasks[part], UCM_RELEASED), 1);
        ucm_task_wait(tasks[part], UCM_STORED, 30000);
        assert_int_equal(ucm_task_done(tasks[part], UCM_STORED), 1);
        ucm_task_free(tasks[part]);
    }
}

/* What comes back without an error is right; returns how many do. */
static size_t try_load(ucm_store *store, struct memory *m, uint64_t first, unsigned shard,
                       unsigned nshards)
{
    size_t right = 0;
    smear(m);
    struct outcome out = move(store, m, false, first, shard, nshards);
    for (size_t i = 0; i < m->n; i++)
        if (out.status[i] == 0) {
            assert_true(shards_painted(m, i, first + i, shard, nshards));
            right++;
        }
    free(out.status);
    return right;
}

static void live(const char *dir)
{
    ucm_store *store;
    struct memory m;
    char text[512];
    /* Of a block that lost a shard the others wait in vain for so long. */
    if (try_open(dir, &shape, options(" timeout_ms=200"), &store, text, sizeof text) < 0)
        return; /* said why */
    const struct ucmi_backends *tier = store->tiers[0].priv;
    if (tier->v[0]->away) { /* said so, and takes nothing */
        ucm_store_close(store);
        return;
    }
    memory_new(&m, store, &shape, STEP);
    for (uint64_t i = 0; i < BLOCKS; i += STEP) {
        try_dump(store, &m, i);
        try_load(store, &m, i, 0, SHARDS);
        try_load(store, &m, i, 1, 2);
    }
    memory_free(&m);
    ucm_store_close(store);
}

static void count_bad(void *arg, const struct ucm_lane_info *lane)
{
    *(uint64_t *)arg += lane->bad;
}

/* honest: whoever asked for an operation was told how it ended, so all that is published is right.
 */
static void afterwards(const char *dir, bool honest)
{
    ucm_store *store = open_store(dir, &shape, options(""));
    struct memory m;
    uint64_t bad = 0;
    struct ucm_inspect how = {.flags = UCM_INSPECT_VERIFY, .arg = &bad, .lane = count_bad};
    assert_int_equal(ucm_inspect(dir, &how), 0);
    if (honest)
        assert_int_equal(bad, 0);
    memory_new(&m, store, &shape, 1);
    dump_all(store, &m, 1000); /* first: what lookups find is leased and makes no room */
    load_all(store, &m, 1000);
    memory_free(&m);
    memory_new(&m, store, &shape, STEP);
    for (uint64_t i = 0; i < BLOCKS; i += STEP) {
        size_t found = count_found(store, i, STEP), right = try_load(store, &m, i, 0, SHARDS);
        if (honest)
            assert_int_equal(right, found);
    }
    memory_free(&m);
    ucm_store_close(store);
}

/* Every step-th operation of these kinds until a life has no more. */
static void under_one_engine(const char *dir, const struct fault_plan *way, unsigned step,
                             bool honest)
{
    char path[512];
    uint64_t at = 1 + seed % step;
    bool met = true;
    snprintf(path, sizeof path, "%s/ucm", dir);
    for (; met; at += step) {
        struct fault_plan plan = *way;
        plan.at = at;
        if (getenv("UCMT_TRACE"))
            print_message("# %s, %s, operation %llu\n", engine, fault_way_name(plan.way),
                          (unsigned long long)at);
        fault_plan(&plan, 1, at);
        live(dir);
        met = fault_seen(plan.kinds) >= at;
        fault_plan(NULL, 0, 0);
        afterwards(dir, honest);
        remove_tree(path);
    }
    print_message("# %s: every %u of %llu operations\n", engine, step,
                  (unsigned long long)at - step);
    assert_true(at > 100); /* a life has many operations */
}

static void each_in_turn(const char *dir, const struct fault_plan *way, unsigned step, bool honest)
{
    unsigned n = ts_every() ? TS_LEN(engines) : 1;
    for (unsigned i = 0; i < n; i++) {
        engine = engines[(seed + i) % TS_LEN(engines)];
        under_one_engine(dir, way, ts_every() ? 1 : step, honest);
    }
}

#define EACH(name, honest, step, ...)                                                              \
    static void name(void **state)                                                                 \
    {                                                                                              \
        each_in_turn(*state, &(struct fault_plan){__VA_ARGS__}, step, honest);                     \
    }

EACH(each_operation_fails, true, 1, .kinds = FAULT_ALL, .way = FAULT_WAY_FAIL, .err = -EIO)
EACH(each_finds_the_disk_full, true, 5, .kinds = FAULT_ALL, .way = FAULT_WAY_FAIL, .err = -ENOSPC)
EACH(each_finds_the_quota_used, true, 13, .kinds = FAULT_ALL, .way = FAULT_WAY_FAIL, .err = -EDQUOT)
EACH(each_fails_half_done, true, 7, .kinds = FAULT_ALL, .way = FAULT_WAY_HALF)
EACH(each_fails_when_done, true, 7, .kinds = FAULT_ALL, .way = FAULT_WAY_LATE)
EACH(each_ends_short, true, 7, .kinds = FAULT_ALL, .way = FAULT_WAY_SHORT)
EACH(each_flips_a_bit, false, 5, .kinds = FAULT_BATCH | FAULT_PREAD, .way = FAULT_WAY_FLIP)
EACH(each_is_torn, false, 5, .kinds = FAULT_BATCH | FAULT_PREAD, .way = FAULT_WAY_TORN)
EACH(each_is_lost, false, 5, .kinds = FAULT_BATCH, .way = FAULT_WAY_LOST)

/* The operations in any order and at any pace: nobody may notice. */
static void order_and_pace_do_not_matter(void **state)
{
    static const struct fault_plan plans[] = {
        {.kinds = FAULT_BATCH, .way = FAULT_WAY_REORDER, .one_in = 2},
        {.kinds = FAULT_BATCH, .way = FAULT_WAY_DELAY, .one_in = 8, .delay_us = 3000},
    };
    for (unsigned i = 0; i < 3; i++) {
        ucm_store *store;
        struct memory m;
        char one[64];
        snprintf(one, sizeof one, "posix_io_engine=%s", engines[i]);
        fault_plan(plans, 2, 1 + i);
        store = open_store(*state, &shape, one);
        memory_new(&m, store, &shape, 4 * STEP);
        for (uint64_t k = 0; k < 4; k++) {
            dump_all(store, &m, 100 * i + 4 * STEP * k);
            load_all(store, &m, 100 * i + 4 * STEP * k);
        }
        memory_free(&m);
        ucm_store_close(store);
        fault_plan(NULL, 0, 0);
    }
}

/* In memory: there are thousands of syncs. */
static int make_fast_dir(void **state)
{
    setenv("UCMT_DIR", "/dev/shm", 0);
    return make_dir(state);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_fast_dir, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(each_operation_fails),
        TEST(each_finds_the_disk_full),
        TEST(each_finds_the_quota_used),
        TEST(each_fails_half_done),
        TEST(each_fails_when_done),
        TEST(each_ends_short),
        TEST(each_flips_a_bit),
        TEST(each_is_torn),
        TEST(each_is_lost),
        TEST(order_and_pace_do_not_matter),
    };
    seed = ts_seed();
    cmocka_set_test_filter(getenv("UCM_TEST_FILTER"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}

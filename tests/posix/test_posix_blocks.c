/* SPDX-License-Identifier: Apache-2.0 */
/* Blocks go down and come back: whole and in parts, in every shape, by every engine. */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>

static void whole_blocks_come_back(void **state)
{
    const struct shape shape = {4096, 4, 0};
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 20);
    assert_int_equal(count_found(store, 0, 20), 0);
    dump_all(store, &m, 0);
    assert_int_equal(count_found(store, 0, 21), 20);
    load_all(store, &m, 0);
    assert_int_equal((int)metric(store, "disk_writes_total"), 20);
    assert_int_equal((int)metric(store, "disk_reads_total"), 20);
    assert_int_equal((int)metric(store, "disk_blocks"), 20);
    memory_free(&m);
    ucm_store_close(store);
}

static void what_is_absent_is_not_loaded(void **state)
{
    const struct shape shape = {4096, 4, 0};
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 0);
    smear(&m);
    struct outcome out = move(store, &m, false, 2, 0, 0);
    assert_int_equal(out.released, -ENOENT);
    for (int i = 0; i < 4; i++)
        assert_int_equal(out.status[i], i < 2 ? 0 : -ENOENT);
    assert_true(painted(&m, 0, 2) && painted(&m, 1, 3));
    free(out.status);
    memory_free(&m);
    ucm_store_close(store);
}

/* Every shape by every engine, around the page cache and through it. */
static void every_shape_by_every_engine(void **state)
{
    static const struct shape shapes[] = {
        {1, 1, 0},    {1, 480, 0},  {513, 3, 0},    {513, 3, 3},   {4096, 1, 0},
        {4096, 2, 2}, {5000, 7, 5}, {8192, 480, 0}, {8192, 32, 2}, {16384, 480, 4},
    };
    static const char *const engines[] = {"psync", "aio", "io_uring"};
    for (size_t e = 0; e < ARRAY_LEN(engines); e++)
        for (size_t i = 0; i < 2 * ARRAY_LEN(shapes); i++) {
            const struct shape *shape = &shapes[i / 2];
            char options[128];
            struct memory m;
            snprintf(options, sizeof options,
                     "namespace=%zu-%zu posix_io_engine=%s io_direct=%zu posix_segment_mb=16", e, i,
                     engines[e], i % 2);
            ucm_store *store = open_store(*state, shape, options);
            memory_new(&m, store, shape, 3);
            dump_all(store, &m, 0);
            load_all(store, &m, 0);
            memory_free(&m);
            ucm_store_close(store);
        }
}

static void parts_of_a_block_can_be_loaded(void **state)
{
    const struct shape shape = {1000, 9, 2};
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 5);
    dump_all(store, &m, 0);
    for (unsigned from = 0; from < 9; from++)
        for (unsigned n = 1; from + n <= 9; n++) {
            smear(&m);
            struct outcome out = move(store, &m, false, 0, from, n);
            assert_int_equal(out.released, 0);
            for (size_t i = 0; i < 5; i++)
                assert_true(shards_painted(&m, i, i, from, n));
            free(out.status);
        }
    memory_free(&m);
    ucm_store_close(store);
}

struct pending {
    ucm_task *task;
    ucm_key key;
    uint32_t block;
};

static void start(struct pending *w, ucm_store *store, struct memory *m, size_t block, uint64_t key,
                  unsigned shard, unsigned nshards)
{
    w->key = key_of(key);
    w->block = (uint32_t)block;
    struct ucm_batch batch = {
        .keys = &w->key, .blocks = &w->block, .n = 1, .shard = shard, .nshards = nshards};
    assert_int_equal(ucm_dump(store, m->map, &batch, &w->task), 0);
}

/* The pattern that breaks others: a task for each layer, in any order, of many blocks at a time. */
static void shards_come_in_any_order(void **state)
{
    enum { BLOCKS = 4, SHARDS = 16, ROUNDS = 50 };
    const struct shape shape = {2048, SHARDS, 2};
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    uint64_t random = 12345;
    memory_new(&m, store, &shape, BLOCKS);
    for (uint64_t round = 0; round < ROUNDS; round++) {
        struct pending w[BLOCKS * SHARDS];
        unsigned order[BLOCKS * SHARDS];
        for (unsigned i = 0; i < BLOCKS * SHARDS; i++)
            order[i] = i;
        for (unsigned i = BLOCKS * SHARDS; i-- > 1;) {
            random = random * 6364136223846793005u + 1;
            unsigned other = (unsigned)(random >> 33) % (i + 1), t = order[i];
            order[i] = order[other];
            order[other] = t;
        }
        for (size_t b = 0; b < BLOCKS; b++)
            paint(&m, b, BLOCKS * round + b);
        for (unsigned i = 0; i < BLOCKS * SHARDS; i++) {
            unsigned b = order[i] % BLOCKS, shard = order[i] / BLOCKS;
            /* Before the last shard of all is on its way, at least one block is not complete. */
            if (i == BLOCKS * SHARDS - 1)
                assert_true(count_found(store, BLOCKS * round, BLOCKS) < BLOCKS);
            start(&w[i], store, &m, b, BLOCKS * round + b, shard, 1);
        }
        for (unsigned i = 0; i < BLOCKS * SHARDS; i++) {
            assert_int_equal(ucm_task_wait(w[i].task, UCM_STORED, 60000), 0);
            ucm_task_free(w[i].task);
        }
        assert_int_equal(count_found(store, BLOCKS * round, BLOCKS), BLOCKS);
        load_all(store, &m, BLOCKS * round);
    }
    assert_int_equal((int)metric(store, "disk_writes_total"), BLOCKS * ROUNDS);
    memory_free(&m);
    ucm_store_close(store);
}

/* RELEASED with its own write, STORED only with the block. */
static void a_part_is_released_before_the_block_is_stored(void **state)
{
    const struct shape shape = {4096, 2, 0};
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    struct pending a, b;
    memory_new(&m, store, &shape, 1);
    paint(&m, 0, 7);
    start(&a, store, &m, 0, 7, 1, 1);
    assert_int_equal(ucm_task_wait(a.task, UCM_RELEASED, 60000), 0);
    assert_int_equal(ucm_task_done(a.task, UCM_STORED), 0);
    assert_int_equal(count_found(store, 7, 1), 0);
    start(&b, store, &m, 0, 7, 0, 1);
    assert_int_equal(ucm_task_wait(b.task, UCM_STORED, 60000), 0);
    assert_int_equal(ucm_task_wait(a.task, UCM_STORED, 60000), 0);
    ucm_task_free(a.task);
    ucm_task_free(b.task);
    load_all(store, &m, 7);
    memory_free(&m);
    ucm_store_close(store);
}

/* The engine computed it twice, with other bits: the block must be of one make, or its checksums
 * would not fit. */
static void a_shard_that_comes_twice_is_written_once(void **state)
{
    const struct shape shape = {4096, 4, 0};
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    struct pending w[4];
    memory_new(&m, store, &shape, 2);
    paint(&m, 0, 1);
    paint(&m, 1, 2); /* what comes second */
    start(&w[0], store, &m, 0, 1, 1, 1);
    start(&w[1], store, &m, 1, 1, 1, 1);
    assert_int_equal(ucm_task_wait(w[1].task, UCM_RELEASED, 60000), 0);
    start(&w[2], store, &m, 0, 1, 0, 1);
    start(&w[3], store, &m, 0, 1, 0, 4); /* two shards of it are there, two are not */
    for (int i = 0; i < 4; i++) {
        assert_int_equal(ucm_task_wait(w[i].task, UCM_STORED, 60000), 0);
        ucm_task_free(w[i].task);
    }
    smear(&m);
    struct outcome out = move(store, &m, false, 1, 0, 0);
    assert_int_equal(out.status[0], 0);
    assert_true(painted(&m, 0, 1));
    free(out.status);
    memory_free(&m);
    ucm_store_close(store);
}

static void a_block_in_flight_twice_is_written_once(void **state)
{
    const struct shape shape = {65536, 4, 0};
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    struct pending w[8];
    memory_new(&m, store, &shape, 1);
    paint(&m, 0, 3);
    for (int i = 0; i < 8; i++)
        start(&w[i], store, &m, 0, 3, 0, 0);
    for (int i = 0; i < 8; i++) {
        assert_int_equal(ucm_task_wait(w[i].task, UCM_STORED, 60000), 0);
        ucm_task_free(w[i].task);
    }
    assert_int_equal((int)metric(store, "disk_writes_total"), 1);
    dump_all(store, &m, 3);
    assert_int_equal((int)metric(store, "disk_writes_total"), 1);
    assert_true(metric(store, "disk_present_total") >= 1);
    memory_free(&m);
    ucm_store_close(store);
}

/* A block whose other shards never come gives its slot back, and its slices end. */
static void an_open_block_is_given_up_in_time(void **state)
{
    const struct shape shape = {4096, 2, 0};
    ucm_store *store = open_store(*state, &shape, "timeout_ms=100");
    struct memory m;
    struct pending w;
    memory_new(&m, store, &shape, 1);
    paint(&m, 0, 1);
    start(&w, store, &m, 0, 1, 0, 1);
    assert_int_equal(ucm_task_wait(w.task, UCM_RELEASED, 60000), 0);
    assert_int_equal(ucm_task_wait(w.task, UCM_STORED, 60000), -ETIMEDOUT);
    ucm_task_free(w.task);
    assert_int_equal(count_found(store, 1, 1), 0);
    dump_all(store, &m, 1); /* afresh */
    load_all(store, &m, 1);
    memory_free(&m);
    ucm_store_close(store);
}

static void every_sync_policy_stores(void **state)
{
    static const char *const policies[] = {"none", "data", "full"};
    const struct shape shape = {4096, 3, 0};
    for (size_t i = 0; i < ARRAY_LEN(policies); i++) {
        char options[64];
        struct memory m;
        /* Small segments: a commit has several of them to sync. */
        snprintf(options, sizeof options, "namespace=%zu posix_sync=%s posix_segment_mb=1", i,
                 policies[i]);
        ucm_store *store = open_store(*state, &shape, options);
        memory_new(&m, store, &shape, 200);
        dump_all(store, &m, 0);
        load_all(store, &m, 0);
        memory_free(&m);
        ucm_store_close(store);
    }
}

/* Dumps that were taken are finished by closing; what can never be finished is given up. */
static void closing_finishes_dumps(void **state)
{
    enum { BLOCKS = 200 };
    const struct shape shape = {65536, 2, 0};
    ucm_store *store = open_store(*state, &shape, "posix_io_depth=1");
    struct memory m;
    struct pending w[BLOCKS];
    memory_new(&m, store, &shape, BLOCKS);
    for (uint64_t i = 0; i < BLOCKS; i++)
        paint(&m, i, i);
    for (uint64_t i = 0; i < BLOCKS; i++) /* of the last one half */
        start(&w[i], store, &m, i, i, 0, i == BLOCKS - 1 ? 1 : 0);
    for (int i = 0; i < BLOCKS - 1; i++)
        ucm_task_free(w[i].task); /* lets the dump go on */
    ucm_task *half = w[BLOCKS - 1].task;
    ucm_store_close(store);
    assert_int_equal(ucm_task_wait(half, UCM_STORED, 0), -ECANCELED);
    ucm_task_free(half);
    memory_free(&m);
    store = open_store(*state, &shape, NULL);
    memory_new(&m, store, &shape, BLOCKS - 1);
    assert_int_equal(count_found(store, 0, BLOCKS), BLOCKS - 1);
    load_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
}

static void a_full_queue_refuses(void **state)
{
    const struct shape shape = {1 << 20, 1, 0};
    ucm_store *store = open_store(*state, &shape, "waiting_queue_depth=1 posix_io_depth=1");
    struct memory m;
    struct pending w[64];
    size_t taken = 0, refused = 0;
    memory_new(&m, store, &shape, 1);
    for (uint64_t i = 0; i < ARRAY_LEN(w); i++) {
        w[taken].key = key_of(i);
        w[taken].block = 0;
        struct ucm_batch batch = {.keys = &w[taken].key, .blocks = &w[taken].block, .n = 1};
        int err = ucm_dump(store, m.map, &batch, &w[taken].task);
        if (err == 0)
            taken++;
        else
            assert_int_equal(err, -EAGAIN);
        refused += err != 0;
    }
    for (size_t i = 0; i < taken; i++) {
        assert_int_equal(ucm_task_wait(w[i].task, UCM_STORED, 60000), 0);
        ucm_task_free(w[i].task);
    }
    assert_int_equal((int)metric(store, "tasks_refused_total"), refused);
    assert_int_equal((int)metric(store, "disk_writes_total"), taken);
    memory_free(&m);
    ucm_store_close(store);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(whole_blocks_come_back),
        TEST(what_is_absent_is_not_loaded),
        TEST(every_shape_by_every_engine),
        TEST(parts_of_a_block_can_be_loaded),
        TEST(shards_come_in_any_order),
        TEST(a_part_is_released_before_the_block_is_stored),
        TEST(a_shard_that_comes_twice_is_written_once),
        TEST(a_block_in_flight_twice_is_written_once),
        TEST(an_open_block_is_given_up_in_time),
        TEST(every_sync_policy_stores),
        TEST(closing_finishes_dumps),
        TEST(a_full_queue_refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

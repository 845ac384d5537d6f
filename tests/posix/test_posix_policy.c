/* SPDX-License-Identifier: Apache-2.0 */
/* The disk follows store/policy.h.  The clock is ours: a tick of the disk is 16 seconds. */
#include "harness.h"

#include <stdlib.h>
#include <time.h>

static const struct shape shape = {4096, 1, 0};
static const char options[] = "posix_capacity_gb=0.0015";
static _Atomic time_t ahead;

int __wrap_clock_gettime(clockid_t clock, struct timespec *t);
int __real_clock_gettime(clockid_t clock, struct timespec *t);
int __wrap_clock_gettime(clockid_t clock, struct timespec *t)
{
    int err = __real_clock_gettime(clock, t);
    if (!err && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        t->tv_sec += atomic_load(&ahead);
    return err;
}

time_t __wrap_time(time_t *t);
time_t __real_time(time_t *t);
time_t __wrap_time(time_t *t)
{
    time_t now = __real_time(NULL) + atomic_load(&ahead);
    if (t)
        *t = now;
    return now;
}

static void wait_ticks(unsigned n)
{
    atomic_fetch_add(&ahead, 16 * (time_t)n);
}

/* Dumps or loads one block. */
static void one(ucm_store *store, bool dump, uint64_t i)
{
    struct memory m;
    memory_new(&m, store, &shape, 1);
    (dump ? dump_all : load_all)(store, &m, i);
    memory_free(&m);
}

/* Dumps blocks that nobody knows until n more have gone. */
static void push_out(ucm_store *store, unsigned n)
{
    static uint64_t next = 1000000;
    double gone = metric(store, "disk_evicted_total");
    struct memory m;
    memory_new(&m, store, &shape, 1);
    while (metric(store, "disk_evicted_total") < gone + n)
        dump_all(store, &m, next++);
    memory_free(&m);
}

static void fill(ucm_store *store)
{
    push_out(store, 1);
}

static double blocks(ucm_store *store)
{
    return metric(store, "disk_blocks");
}

static void what_was_used_again_outlives_what_was_not(void **state)
{
    ucm_store *store = open_store(*state, &shape, options);
    one(store, true, 1);
    wait_ticks(20);
    one(store, false, 1); /* from now on the span is 20 ticks */
    wait_ticks(10);
    one(store, true, 2); /* later than 1, but used once */
    wait_ticks(1);
    fill(store);
    push_out(store, (unsigned)blocks(store) / 2);
    assert_int_equal(count_found(store, 2, 1), 0);
    assert_int_equal(count_found(store, 1, 1), 1);
    wait_ticks(2 * 20 + 10); /* what comes now is worth more */
    push_out(store, 2 * (unsigned)blocks(store));
    wait_ticks(2 * 20 + 10);
    push_out(store, 2 * (unsigned)blocks(store));
    assert_int_equal(count_found(store, 1, 1), 0);
    ucm_store_close(store);
}

/* A lookup alone is a use, for another process may load. */
static void a_lookup_is_a_use(void **state)
{
    ucm_store *store = open_store(*state, &shape, options);
    one(store, true, 1);
    one(store, true, 2);
    wait_ticks(20);
    one(store, false, 2);
    assert_int_equal(count_found(store, 1, 1), 1);
    wait_ticks(10);
    one(store, true, 3);
    wait_ticks(1);
    fill(store);
    push_out(store, (unsigned)blocks(store) / 2);
    assert_int_equal(count_found(store, 3, 1), 0);
    assert_int_equal(count_found(store, 1, 2), 2);
    ucm_store_close(store);
}

/* Who only watches does not change what goes. */
static void a_peek_is_none(void **state)
{
    ucm_store *store = open_store(*state, &shape, options);
    ucm_key first = key_of(1), absent = key_of(5);
    uint8_t found = 0;
    one(store, true, 1);
    one(store, true, 2);
    wait_ticks(20);
    one(store, false, 2);
    assert_int_equal(ucm_peek(store, &first, 1, &found), 1);
    assert_int_equal(found, 1);
    assert_int_equal(ucm_peek(store, &absent, 1, &found), 0);
    assert_int_equal(found, 0);
    wait_ticks(1);
    fill(store);
    push_out(store, (unsigned)blocks(store) / 2);
    assert_int_equal(ucm_peek(store, &first, 1, &found), 0);
    assert_int_equal(count_found(store, 2, 1), 1);
    ucm_store_close(store);
}

/* The tier above asks the disk for nothing, and keeps it informed. */
static void what_is_loaded_from_dram_is_used(void **state)
{
    enum { HALF = 16 }; /* more than go at a time */
    ucm_store *store = open_store(*state, &shape,
                                  "posix_capacity_gb=0.0015 store_pipeline=Cache|Posix "
                                  "cache_buffer_capacity_gb=0.01");
    for (uint64_t i = 0; i < 2 * HALF; i++)
        one(store, true, i);
    wait_ticks(20);
    double hits = metric(store, "cache_hits_total");
    for (uint64_t i = 0; i < HALF; i++)
        one(store, false, i);
    assert_int_equal(metric(store, "cache_hits_total"), hits + HALF);
    wait_ticks(1);
    fill(store);
    ucm_store_close(store); /* and the DRAM with it */
    store = open_store(*state, &shape, options);
    assert_int_equal(count_found(store, 0, HALF), HALF);
    assert_true(count_found(store, HALF, HALF) < HALF);
    ucm_store_close(store);
}

/* The owner of a block hears that others have used it, when they next do something. */
static void used_by_another(const char *dir, const char *how, bool load)
{
    enum { HALF = 16 };
    ucm_store *store = open_store(dir, &shape, how), *other = open_store(dir, &shape, how);
    for (uint64_t i = 0; i < 2 * HALF; i++)
        one(store, true, i);
    one(other, true, 500); /* it has a lane */
    wait_ticks(20);
    double reads = metric(other, "disk_reads_total");
    for (uint64_t i = 0; i < HALF; i++)
        if (load)
            one(other, false, i);
        else
            assert_int_equal(count_found(other, i, 1), 1);
    assert_int_equal(metric(other, "disk_reads_total"), reads); /* of that it would have heard */
    wait_ticks(1);
    one(other, true, 501);
    one(other, true, 502);
    fill(store);
    push_out(store, HALF / 2);
    ucm_store_close(other);
    ucm_store_close(store); /* and the DRAM with it */
    store = open_store(dir, &shape, options);
    assert_int_equal(count_found(store, 0, HALF), HALF);
    assert_true(count_found(store, HALF, HALF) < HALF);
    ucm_store_close(store);
}

static void a_lookup_by_another_is_a_use(void **state)
{
    used_by_another(*state, options, false);
}

static void what_another_loads_from_dram_is_used(void **state)
{
    used_by_another(*state,
                    "posix_capacity_gb=0.0015 store_pipeline=Cache|Posix "
                    "cache_buffer_capacity_gb=0.01",
                    true);
}

/* Nor does it keep for ten seconds what has been loaded: a disk of which all blocks were is not
 * full. */
static void what_is_loaded_from_dram_can_go(void **state)
{
    ucm_store *store = open_store(*state, &shape,
                                  "posix_capacity_gb=0.0015 store_pipeline=Cache|Posix "
                                  "cache_buffer_capacity_gb=0.01");
    struct memory many;
    uint64_t n = 0;
    do
        one(store, true, n++);
    while (metric(store, "disk_evicted_total") == 0);
    for (uint64_t i = 0; i < n; i++)
        one(store, false, i);
    memory_new(&many, store, &shape, 64);
    dump_all(store, &many, 1000);
    memory_free(&many);
    ucm_store_close(store);
}

static void who_comes_back_has_been_used_again(void **state)
{
    ucm_store *store = open_store(*state, &shape, options);
    one(store, true, 1);
    wait_ticks(1);
    fill(store);
    push_out(store, (unsigned)blocks(store) / 2);
    assert_int_equal(count_found(store, 1, 1), 0);
    wait_ticks(20);
    one(store, true, 1); /* it is known, and the span is 21 ticks */
    wait_ticks(1);
    one(store, true, 2);
    wait_ticks(1);
    push_out(store, (unsigned)blocks(store));
    assert_int_equal(count_found(store, 2, 1), 0);
    assert_int_equal(count_found(store, 1, 1), 1);
    /* So it is to who takes over: the journal says it. */
    ucm_store_close(store);
    store = open_store(*state, &shape, options);
    one(store, true, 3);
    wait_ticks(20);
    one(store, false, 3); /* the span has to be learnt again */
    one(store, true, 4);
    wait_ticks(1);
    push_out(store, (unsigned)blocks(store));
    assert_int_equal(count_found(store, 4, 1), 0);
    assert_int_equal(count_found(store, 1, 1), 1);
    ucm_store_close(store);
}

/* What was not used since a moment goes, the rest stays, in a lane of a living process or of none.
 * Of a use only a living owner knows surely. */
static void what_was_not_used_since_is_removed(void **state)
{
    for (unsigned alive = 0; alive < 2; alive++) {
        uint64_t first = 10 * alive;
        struct ucm_manage how = {.op = UCM_MANAGE_RM, .timeout_ms = 60000};
        struct ucm_manage_total t;
        ucm_store *store = open_store(*state, &shape, options);
        for (uint64_t i = 0; i < 4; i++) {
            one(store, true, first + i);
            wait_ticks(20);
        }
        if (alive)
            one(store, false, first);
        else
            ucm_store_close(store);
        wait_ticks(20);
        how.before = time(NULL) - 50 * 16; /* they are 100, 80, 60 and 40 ticks old */
        assert_int_equal(ucm_manage(*state, &how, &t), 0);
        if (!alive)
            store = open_store(*state, &shape, options);
        assert_int_equal(t.done, alive ? 2 : 3);
        assert_int_equal(count_found(store, first, 1), alive);
        assert_int_equal(count_found(store, first + 1, 2), 0);
        assert_int_equal(count_found(store, first + 3, 1), 1);
        how.before = 0; /* the next round begins with none */
        assert_int_equal(ucm_manage(*state, &how, &t), 0);
        ucm_store_close(store);
    }
}

/* All of them have just been found, by a clock that is then set back by an hour. */
static void a_clock_set_back_keeps_no_block(void **state)
{
    ucm_store *store = open_store(*state, &shape, options);
    uint64_t n = 0;
    double gone = 0;
    for (; gone == 0; gone = metric(store, "disk_evicted_total"))
        one(store, true, n++);
    for (unsigned room = (unsigned)gone - 1; room; room--)
        one(store, true, n++);
    assert_true(metric(store, "disk_evicted_total") == gone);
    assert_int_equal(count_found(store, 0, n), (size_t)blocks(store));
    atomic_fetch_sub(&ahead, 3600);
    one(store, true, n);
    assert_true(metric(store, "disk_evicted_total") > gone);
    ucm_store_close(store);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_was_used_again_outlives_what_was_not),
        TEST(a_lookup_is_a_use),
        TEST(a_peek_is_none),
        TEST(what_is_loaded_from_dram_is_used),
        TEST(what_is_loaded_from_dram_can_go),
        TEST(a_lookup_by_another_is_a_use),
        TEST(what_another_loads_from_dram_is_used),
        TEST(who_comes_back_has_been_used_again),
        TEST(what_was_not_used_since_is_removed),
        TEST(a_clock_set_back_keeps_no_block),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

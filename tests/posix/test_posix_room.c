/* SPDX-License-Identifier: Apache-2.0 */
/* Capacity: never above, whoever dumps; the coldest go first, tails before heads. */
#include "peer.h"

#include <stdio.h>
#include <stdlib.h>

#include "store/format.h"

static const struct shape shape = {4096, 2, 0};

#define GIB (1024.0 * 1024 * 1024)

static void too_small_a_bound_is_refused(void **state)
{
    ucm_store *store;
    char text[512];
    assert_int_equal(try_open(*state, &shape, "posix_capacity_gb=0.00001", &store, text, 512),
                     -EINVAL);
    assert_non_null(strstr(text, "posix_capacity_gb"));
    assert_non_null(strstr(text, "at least"));
}

/* What the error named as the least works. */
static void the_smallest_bound_holds_a_block(void **state)
{
    ucm_store *store;
    struct memory m;
    char text[512], options[128];
    assert_int_equal(try_open(*state, &shape, "posix_capacity_gb=0.00001", &store, text, 512),
                     -EINVAL);
    snprintf(options, sizeof options, "posix_capacity_gb=%s", strstr(text, "at least ") + 9);
    store = open_store(*state, &shape, options);
    memory_new(&m, store, &shape, 1);
    for (uint64_t i = 0; i < 5; i++) {
        dump_all(store, &m, i);
        load_all(store, &m, i);
    }
    assert_true((double)disk_usage(*state) <= strtod(strchr(options, '=') + 1, NULL) * GIB);
    memory_free(&m);
    ucm_store_close(store);
}

/* Three processes and two namespaces dump as fast as they can into a bound; it is looked at all the
 * while. */
static void the_bound_holds_at_every_instant(void **state)
{
    const char *options = "posix_capacity_gb=0.02 posix_segment_mb=1";
    struct peer peers[3] = {
        peer_start(*state, &shape, options), peer_start(*state, &shape, options),
        peer_start(*state, &shape, "namespace=other posix_capacity_gb=0.02 posix_segment_mb=1")};
    peers_keep_to(peers, 3, *state, 0.02);
}

static uint32_t tick_now(void)
{
    return ucmi_tick((uint64_t)time(NULL));
}

/* The index of whoever looks up leases what it finds; so it is another store that looks. */
static void tails_go_first(void **state)
{
    enum { CHAIN = 60 };
    char options[64];
    uint32_t began;
    int round = 0;
    do { /* again should the clock tick in between */
        began = tick_now();
        snprintf(options, sizeof options, "posix_capacity_gb=0.0015 namespace=%d", round++);
        ucm_store *store = open_store(*state, &shape, options);
        ucm_store *watcher = open_store(*state, &shape, options);
        struct memory m, one;
        memory_new(&m, store, &shape, CHAIN);
        memory_new(&one, store, &shape, 1);
        dump_all(store, &m, 0); /* depths 0 .. 59 */
        for (uint64_t i = CHAIN; metric(store, "disk_evicted_total") < CHAIN / 2; i++)
            dump_all(store, &one, i); /* depth 0 */
        size_t head = 0, left = count_found(watcher, 0, CHAIN);
        while (count_found(watcher, head, 1))
            head++;
        if (tick_now() == began) {
            assert_true(left > 0 && left < CHAIN);
            assert_int_equal(head, left); /* what is left is a prefix */
        }
        memory_free(&one);
        memory_free(&m);
        ucm_store_close(watcher);
        ucm_store_close(store);
    } while (tick_now() != began);
}

static void what_a_lookup_found_stays_for_a_while(void **state)
{
    const char *options = "posix_capacity_gb=0.0015";
    ucm_store *store = open_store(*state, &shape, options);
    struct memory m;
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 0);
    uint64_t began = ucmi_now_ns();
    assert_int_equal(count_found(store, 0, 2), 2); /* 0 and 1 are leased, 2 and 3 not */
    for (uint64_t i = 4; metric(store, "disk_evicted_total") < 300; i += 4)
        dump_all(store, &m, i);
    smear(&m);
    struct outcome out = move(store, &m, false, 0, 0, 0);
    if (ucmi_now_ns() - began < 9 * UINT64_C(1000000000)) { /* else the lease is over */
        assert_true(out.status[0] == 0 && painted(&m, 0, 0));
        assert_true(out.status[1] == 0 && painted(&m, 1, 1));
    }
    assert_int_equal(out.status[2], -ENOENT);
    assert_int_equal(out.status[3], -ENOENT);
    free(out.status);
    memory_free(&m);
    ucm_store_close(store);
}

static void a_store_full_of_leases_drops_dumps(void **state)
{
    ucm_store *store = open_store(*state, &shape, "posix_capacity_gb=0.0015");
    struct memory m;
    uint64_t n = 0;
    memory_new(&m, store, &shape, 1);
    struct outcome out = {0};
    for (; out.stored == 0; n++) {
        paint(&m, 0, n);
        out = move(store, &m, true, n, 0, 0);
        free(out.status);
        count_found(store, 0, n + 1); /* leases all */
    }
    assert_int_equal(out.stored, -ENOSPC);
    assert_true(n > 20);
    assert_true(metric(store, "disk_full_total") >= 1);
    assert_int_equal((int)metric(store, "disk_evicted_total"), 0);
    assert_int_equal(count_found(store, 0, n), n - 1);
    memory_free(&m);
    ucm_store_close(store);
}

static void a_smaller_bound_is_met_at_the_next_start(void **state)
{
    const double small = 0.003;
    ucm_store *store = open_store(*state, &shape, "posix_capacity_gb=0.01");
    struct memory m;
    memory_new(&m, store, &shape, 500);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    assert_true((double)disk_usage(*state) > small * GIB);
    store = open_store(*state, &shape, "posix_capacity_gb=0.003");
    memory_new(&m, store, &shape, 1);
    dump_all(store, &m, 10000);
    assert_true((double)disk_usage(*state) <= small * GIB);
    size_t left = count_found(store, 0, 500);
    assert_true(left > 50 && left < 500);
    for (uint64_t i = 0; i < 500; i++) { /* found is loadable, also among the survivors */
        struct outcome out = move(store, &m, false, i, 0, 0);
        assert_true(out.status[0] == -ENOENT || painted(&m, 0, i));
        left -= out.status[0] == 0;
        free(out.status);
    }
    assert_int_equal(left, 0);
    memory_free(&m);
    ucm_store_close(store);
}

static void fill(const char *dir, const char *options, uint64_t first)
{
    ucm_store *store = open_store(dir, &shape, options);
    struct memory m;
    memory_new(&m, store, &shape, 16);
    while (metric(store, "disk_evicted_total") < 16) {
        dump_all(store, &m, first);
        first += 16;
    }
    memory_free(&m);
    ucm_store_close(store);
}

static void a_namespace_nobody_uses_makes_room(void **state)
{
    fill(*state, "namespace=old posix_capacity_gb=0.003", 0);
    ucm_store *store = open_store(*state, &shape, "namespace=new posix_capacity_gb=0.003");
    struct memory m;
    memory_new(&m, store, &shape, 16);
    dump_all(store, &m, 0);
    load_all(store, &m, 0);
    assert_int_equal(count_lanes(*state), 1);
    memory_free(&m);
    ucm_store_close(store);
}

static void a_lane_somebody_lives_in_is_not_taken_for_room(void **state)
{
    struct peer peer = peer_start(*state, &shape, "namespace=old posix_capacity_gb=0.003");
    for (uint64_t i = 0; i < 100; i++)
        assert_int_equal(peer_do(&peer, PEER_DUMP, 10 * i, 10), 0);
    ucm_store *store = open_store(*state, &shape, "namespace=new posix_capacity_gb=0.003");
    struct memory m;
    memory_new(&m, store, &shape, 4);
    struct outcome out = move(store, &m, true, 0, 0, 0);
    assert_int_equal(out.stored, -ENOSPC);
    free(out.status);
    assert_int_equal(peer_do(&peer, PEER_LOAD, 990, 10), 10);
    memory_free(&m);
    ucm_store_close(store);
    peer_end(&peer);
}

/* The other rank's process is gone for good: its slots serve who is left, but not its blocks. */
static void dead_lanes_of_other_ranks_make_room(void **state)
{
    fill(*state, "ranks=2 rank=1 posix_capacity_gb=0.003", 0);
    ucm_store *store = open_store(*state, &shape, "ranks=2 rank=0 posix_capacity_gb=0.003");
    struct memory m;
    memory_new(&m, store, &shape, 16);
    dump_all(store, &m, 100000);
    load_all(store, &m, 100000);
    assert_true(metric(store, "disk_lanes_adopted_total") >= 1);
    assert_true((double)disk_usage(*state) <= 0.003 * GIB);
    memory_free(&m);
    ucm_store_close(store);
}

/* A process that has it all gives room to one that has none, also of another namespace; all the
 * while the bound holds. */
static void gives_room(const char *dir, bool idle)
{
    const double bound = 0.02;
    const char *options = "posix_capacity_gb=0.02 posix_segment_mb=1";
    struct memory m, n;
    ucm_store *has = open_store(dir, &shape, options);
    memory_new(&m, has, &shape, 100);
    for (uint64_t i = 0; i < 20; i++)
        dump_all(has, &m, 100 * i);
    assert_true(metric(has, "disk_evicted_total") > 0);
    uint64_t next = 2000;
    ucm_store *needs =
        open_store(dir, &shape, "posix_capacity_gb=0.02 posix_segment_mb=1 namespace=other");
    memory_new(&n, needs, &shape, 10);
    while (metric(needs, "disk_blocks") < 10) { /* at most some seconds */
        struct outcome out = move(needs, &n, true, 5000, 0, 0);
        free(out.status);
        for (size_t i = 0; !idle && i < m.n; i++) /* it is at work, and evicts */
            paint(&m, i, next + i);
        out = idle ? (struct outcome){0} : move(has, &m, true, next, 0, 0);
        free(out.status);
        next += idle ? 0 : m.n;
        assert_true((double)disk_usage(dir) <= bound * GIB);
    }
    memory_free(&n);
    ucm_store_close(needs);
    assert_true(count_found(has, 0, next) > 0); /* it keeps most */
    memory_free(&m);
    ucm_store_close(has);
}

static void room_goes_to_who_has_none(void **state)
{
    gives_room(*state, false);
}
static void who_is_idle_gives_room_too(void **state)
{
    gives_room(*state, true);
}

/* Down and up again: what was given up can be had again at once. */
static void a_larger_bound_is_used_at_the_next_start(void **state)
{
    static const char *const bounds[] = {"posix_capacity_gb=0.0156 posix_segment_mb=1",
                                         "posix_capacity_gb=0.00195 posix_segment_mb=1",
                                         "posix_capacity_gb=0.0156 posix_segment_mb=1"};
    for (uint64_t i = 0; i < ARRAY_LEN(bounds); i++) {
        ucm_store *store = open_store(*state, &shape, bounds[i]);
        struct memory m;
        memory_new(&m, store, &shape, 64);
        for (uint64_t k = 0; k < 4; k++)
            dump_all(store, &m, 1000 * i + 64 * k);
        memory_free(&m);
        ucm_store_close(store);
    }
}

/* Segments made without a bound are larger than the whole of it: smaller ones take their place. */
static void a_bound_smaller_than_a_segment_is_used(void **state)
{
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=4");
    struct memory m;
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    store = open_store(*state, &shape, "posix_capacity_gb=0.002");
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 10);
    load_all(store, &m, 10);
    assert_true((double)disk_usage(*state) <= 0.002 * GIB);
    assert_int_equal(count_lanes(*state), 1);
    memory_free(&m);
    ucm_store_close(store);
}

/* Marks which of the n first blocks are told to be gone, each once. */
static void hear(ucm_store *store, bool *gone, uint64_t n)
{
    ucm_key keys[7];
    uint64_t lost;
    for (ssize_t told; (told = ucm_removed(store, keys, 7, &lost)) > 0;)
        for (ssize_t k = 0; k < told; k++) {
            uint64_t i = 0;
            while (i < n && memcmp(&keys[k], &(ucm_key[]){key_of(i)}, sizeof keys[k]))
                i++;
            assert_true(i < n && !gone[i]);
            gone[i] = true;
        }
    assert_int_equal(lost, 0);
}

/* What was dumped and not told to be gone is there, for the owner and for who follows it. */
static void what_is_evicted_is_told(void **state)
{
    enum { BLOCKS = 2000, STEP = 10 };
    const char *options = "posix_capacity_gb=0.003"; /* some 300 blocks */
    ucm_store *store = open_store(*state, &shape, options);
    ucm_store *other = open_store(*state, &shape, options);
    bool gone[BLOCKS] = {false}, heard[BLOCKS] = {false};
    struct memory m;
    memory_new(&m, store, &shape, STEP);
    hear(store, gone, 0);
    hear(other, heard, 0);
    for (uint64_t i = 0; i < BLOCKS; i += STEP) {
        dump_all(store, &m, i);
        count_found(other, BLOCKS, 1); /* a miss has the journals read */
        hear(store, gone, i + STEP);
        hear(other, heard, i + STEP);
    }
    count_found(other, BLOCKS, 1);
    hear(store, gone, BLOCKS);
    hear(other, heard, BLOCKS);
    assert_true(metric(store, "disk_compacted_total") >= 1);
    assert_true(metric(store, "disk_evicted_total") > BLOCKS / 2);
    for (uint64_t i = 0; i < BLOCKS; i++) {
        assert_int_equal(count_found(store, i, 1), !gone[i]);
        assert_int_equal(heard[i], gone[i]);
    }
    memory_free(&m);
    ucm_store_close(other);
    ucm_store_close(store);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(int argc, char **argv)
{
    if (argc > 1)
        return peer_main(argc, argv);
    const struct CMUnitTest tests[] = {
        TEST(too_small_a_bound_is_refused),
        TEST(the_smallest_bound_holds_a_block),
        TEST(the_bound_holds_at_every_instant),
        TEST(tails_go_first),
        TEST(what_is_evicted_is_told),
        TEST(what_a_lookup_found_stays_for_a_while),
        TEST(a_store_full_of_leases_drops_dumps),
        TEST(a_smaller_bound_is_met_at_the_next_start),
        TEST(a_namespace_nobody_uses_makes_room),
        TEST(a_lane_somebody_lives_in_is_not_taken_for_room),
        TEST(dead_lanes_of_other_ranks_make_room),
        TEST(room_goes_to_who_has_none),
        TEST(who_is_idle_gives_room_too),
        TEST(a_larger_bound_is_used_at_the_next_start),
        TEST(a_bound_smaller_than_a_segment_is_used),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

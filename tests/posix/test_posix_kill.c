/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process that dumps, evicts and compacts is killed at any instant.  Whatever is found afterwards
 * is whole and right, and the next one goes on where it stopped.
 */
#include "peer.h"

#include <stdio.h>
#include <stdlib.h>

enum { ROUNDS = 20, KEYS = 2000 };

static const struct shape shape = {8192, 4, 0};

static void count_bad(void *arg, const struct ucm_lane_info *lane)
{
    *(uint64_t *)arg += lane->bad + lane->error;
}

/* Everything the index has is loaded and compared. */
static uint64_t check_all(ucm_store *store, struct memory *one, uint64_t first)
{
    uint64_t right = 0;
    for (uint64_t i = 0; i < KEYS; i++) {
        if (!count_found(store, first + i, 1))
            continue;
        struct outcome out = move(store, one, false, first + i, 0, 0);
        assert_int_equal(out.status[0], 0);
        assert_true(painted(one, 0, first + i));
        free(out.status);
        right++;
    }
    return right;
}

static void killed_at_any_instant(void **state)
{
    const char *options = "posix_capacity_gb=0.01 posix_segment_mb=1";
    const char *seed = getenv("UCM_TEST_SEED");
    uint64_t random = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL), total = 0;
    print_message("# seed %llu\n", (unsigned long long)random);
    for (uint64_t round = 0; round < ROUNDS; round++) {
        struct peer peer = peer_start(*state, &shape, options);
        ucm_store *store = open_store(*state, &shape, options);
        struct memory one;
        memory_new(&one, store, &shape, 1);
        uint64_t first = KEYS * round, bad = 0;
        assert_int_equal(peer_do(&peer, PEER_CHURN, first, 7), 0);
        /* As long as some lookups take, each a reading of its journal. */
        random = random * 6364136223846793005u + 1442695040888963407u;
        for (uint64_t n = (random >> 33) % 1000; n; n--)
            assert_int_equal(count_found(store, UINT64_MAX, 1), 0);
        peer_kill(&peer);
        struct ucm_inspect how = {.flags = UCM_INSPECT_VERIFY, .arg = &bad, .lane = count_bad};
        assert_int_equal(ucm_inspect(*state, &how), 0);
        assert_int_equal(bad, 0);
        /* Takes the lane over; first, for what lookups find is leased and makes no room. */
        dump_all(store, &one, first + KEYS - 1);
        load_all(store, &one, first + KEYS - 1);
        total += check_all(store, &one, first);
        memory_free(&one);
        ucm_store_close(store);
    }
    assert_true(total > ROUNDS);
    assert_int_equal(count_lanes(*state), 1);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(int argc, char **argv)
{
    if (argc > 1)
        return peer_main(argc, argv);
    const struct CMUnitTest tests[] = {
        TEST(killed_at_any_instant),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* The rule of what goes first, by itself; that the tiers follow it is in tests/cache/test_pool.c
 * and tests/posix/test_posix_policy.c. */
#include "store/policy.h"

#include "../test.h"

static struct ucmi_policy policy;
static _Atomic uint64_t span;

static int open_policy(void **state)
{
    span = 0;
    return ucmi_policy_open(&policy, &span, 100);
}

static int close_policy(void **state)
{
    ucmi_policy_close(&policy);
    return 0;
}

static uint64_t hash(uint64_t i)
{
    return ucmi_hash64(&i, sizeof i, 0);
}

static void the_longest_unused_goes_first_and_tails_before_heads(void **state)
{
    uint64_t score = ucmi_policy_score(10, false, 100, 5);
    assert_true(ucmi_policy_score(10, false, 99, 0) < score);
    assert_true(ucmi_policy_score(10, false, 100, 6) < score);
    assert_true(ucmi_policy_score(10, false, 101, UINT32_MAX) > score);
}

static void what_was_used_again_stays_two_spans_longer(void **state)
{
    uint64_t score = ucmi_policy_score(10, true, 100, 5);
    assert_true(ucmi_policy_score(10, false, 120, 4) > score);
    assert_int_equal(ucmi_policy_score(10, false, 120, 5), score);
    assert_true(ucmi_policy_score(10, false, 119, 4) < score);
    assert_true(ucmi_policy_score(10, true, 99, 5) < score);
    assert_int_equal(ucmi_policy_score(0, true, 100, 5), ucmi_policy_score(0, false, 100, 5));
    /* The end of the clock is no step back to its beginning. */
    assert_true(ucmi_policy_score(UINT32_MAX, true, UINT32_MAX, 5) > score);
}

static void the_span_is_the_mean_from_the_first_use_to_the_second(void **state)
{
    assert_int_equal(ucmi_policy_span(&policy), 0);
    assert_true(ucmi_policy_again(&policy, false, 100, 130));
    assert_int_equal(ucmi_policy_span(&policy), 30);
    assert_true(ucmi_policy_again(&policy, false, 100, 110));
    assert_int_equal(ucmi_policy_span(&policy), 20);
    assert_true(ucmi_policy_again(&policy, true, 100, 5000)); /* its third use, or a later one */
    assert_int_equal(ucmi_policy_span(&policy), 20);
    for (int i = 0; i < 100000; i++)
        ucmi_policy_again(&policy, false, 0, 1000); /* habits change */
    assert_in_range(ucmi_policy_span(&policy), 990, 1000);
    for (int i = 0; i < 100000; i++)
        ucmi_policy_again(&policy, false, 0, UINT32_MAX);
    assert_in_range(ucmi_policy_span(&policy), UINT32_MAX / 100 * 99, UINT32_MAX);
}

static void uses_within_a_tick_are_one(void **state)
{
    assert_false(ucmi_policy_again(&policy, false, 100, 100));
    assert_false(ucmi_policy_again(&policy, false, 110, 100)); /* leased into the future */
    assert_true(ucmi_policy_again(&policy, true, 100, 100));
    assert_int_equal(ucmi_policy_span(&policy), 0);
}

static void who_comes_back_is_known(void **state)
{
    assert_false(ucmi_policy_enter(&policy, hash(1), 100));
    ucmi_policy_leave(&policy, hash(1), false, 100);
    assert_false(ucmi_policy_enter(&policy, hash(2), 140));
    assert_true(ucmi_policy_enter(&policy, hash(1), 140));
    assert_int_equal(ucmi_policy_span(&policy), 40);
    ucmi_policy_leave(&policy, hash(1), true, 200);
    assert_true(ucmi_policy_enter(&policy, hash(1), 200)); /* in the same tick: it was known */
    ucmi_policy_leave(&policy, hash(3), false, 210);
    assert_false(ucmi_policy_enter(&policy, hash(3), 205)); /* leased into the future: one use */
    assert_int_equal(ucmi_policy_span(&policy), 40);
}

/* All that count are found, or nearly: a chain with holes would be worth little. */
static void six_times_the_blocks_are_remembered(void **state)
{
    enum { BLOCKS = 100, GONE = 10000 };
    unsigned known = 0, mistaken = 0;
    for (uint32_t i = 0; i < GONE; i++)
        ucmi_policy_leave(&policy, hash(i), false, i);
    for (uint32_t i = 0; i < GONE - 6 * BLOCKS; i++)
        mistaken += ucmi_policy_enter(&policy, hash(i), GONE);
    for (uint32_t i = GONE - 6 * BLOCKS; i < GONE; i++)
        known += ucmi_policy_enter(&policy, hash(i), GONE);
    assert_in_range(known, 6 * BLOCKS * 98 / 100, 6 * BLOCKS);
    assert_in_range(mistaken, 0, GONE / 1000);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, open_policy, close_policy)
    const struct CMUnitTest tests[] = {
        TEST(the_longest_unused_goes_first_and_tails_before_heads),
        TEST(what_was_used_again_stays_two_spans_longer),
        TEST(the_span_is_the_mean_from_the_first_use_to_the_second),
        TEST(uses_within_a_tick_are_one),
        TEST(who_comes_back_is_known),
        TEST(six_times_the_blocks_are_remembered),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

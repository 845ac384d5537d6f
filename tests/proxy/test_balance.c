/* SPDX-License-Identifier: Apache-2.0 */
/* Who gets a request. */
#include "../test.h"

#include <stdio.h>
#include <string.h>

#include "proxy/balance.h"

enum { N = 8, KEYS = 4000, SLACK = 1000 };

static struct seat seats[N];
static const struct seat *all[N];

static int reset(void **state)
{
    memset(seats, 0, sizeof seats);
    for (unsigned i = 0; i < N; i++) {
        char name[16];
        snprintf(name, sizeof name, "10.0.0.%u:80", i);
        seats[i].id = balance_hash(0, name, strlen(name));
        all[i] = &seats[i];
    }
    return 0;
}

static uint64_t key_of(unsigned i)
{
    return balance_hash(0, &i, sizeof i) | 1;
}

static int choose(uint64_t key, unsigned turn)
{
    return balance_choose(all, N, NULL, 0, key, SLACK, turn);
}

static void the_least_loaded_gets_it(void **state)
{
    for (unsigned i = 0; i < N; i++)
        seats[i].tokens = 100 - i;
    for (unsigned turn = 0; turn < 2 * N; turn++)
        assert_int_equal(choose(0, turn), N - 1);
}

static void equals_take_turns(void **state)
{
    for (unsigned turn = 0; turn < 2 * N; turn++)
        assert_int_equal(choose(0, turn), turn % N);
}

static void a_key_has_its_seat_whatever_the_turn(void **state)
{
    unsigned got[N] = {0};

    for (unsigned k = 0; k < KEYS; k++) {
        int at = choose(key_of(k), k);
        assert_int_equal(choose(key_of(k), k + 3), at);
        got[at]++;
    }
    for (unsigned i = 0; i < N; i++) /* 500 on average, 21 standard deviation */
        assert_in_range(got[i], KEYS / N - 110, KEYS / N + 110);
}

/* Rendezvous: only the keys of the seat that went are moved. */
static void a_seat_that_goes_moves_its_own_keys_only(void **state)
{
    for (unsigned k = 0; k < KEYS; k++) {
        int before = choose(key_of(k), 0);
        seats[3].state = SEAT_SHUT;
        int after = choose(key_of(k), 0);
        seats[3].state = SEAT_UP;
        assert_int_not_equal(after, 3);
        if (before != 3)
            assert_int_equal(after, before);
    }
}

static void a_loved_key_overflows(void **state)
{
    uint64_t key = key_of(1);
    int first = choose(key, 0);

    for (unsigned i = 0; i < 400; i++)
        seats[choose(key, i)].tokens += 100;
    uint64_t most = 0;
    unsigned busy = 0;
    for (unsigned i = 0; i < N; i++) {
        most = seats[i].tokens > most ? seats[i].tokens : most;
        busy += seats[i].tokens > 0;
    }
    assert_int_equal(seats[first].tokens, most);
    assert_in_range(most, 5000, 5000 + 5000 / 4 + SLACK + 100); /* the mean is 5000 */
    assert_in_range(busy, 6, N);                                /* no more than it keeps busy */
    for (unsigned i = 0; i < N; i++)
        seats[i].tokens = 0;
    assert_int_equal(choose(key, 5), first); /* and comes back */
}

static void those_down_are_taken_when_no_other_is_left(void **state)
{
    const struct seat *tried[N];

    for (unsigned i = 0; i < N; i++)
        seats[i].state = i == 2 || i == 5 ? SEAT_UP : SEAT_DOWN;
    seats[7].state = SEAT_SHUT;
    seats[2].tokens = seats[5].tokens = 1 << 20;
    for (unsigned i = 0; i < N; i++) {
        int at = balance_choose(all, N, tried, i, i % 2 ? key_of(i) : 0, SLACK, i);
        if (i < 2)
            assert_true(at == 2 || at == 5);
        if (i == N - 1) {
            assert_int_equal(at, -1); /* 7 is never taken */
            break;
        }
        tried[i] = all[at];
        for (unsigned j = 0; j < i; j++)
            assert_ptr_not_equal(tried[j], tried[i]);
    }
    assert_int_equal(balance_choose(all, 0, NULL, 0, 1, SLACK, 0), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(the_least_loaded_gets_it, reset),
        cmocka_unit_test_setup(equals_take_turns, reset),
        cmocka_unit_test_setup(a_key_has_its_seat_whatever_the_turn, reset),
        cmocka_unit_test_setup(a_seat_that_goes_moves_its_own_keys_only, reset),
        cmocka_unit_test_setup(a_loved_key_overflows, reset),
        cmocka_unit_test_setup(those_down_are_taken_when_no_other_is_left, reset),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* The index against a model: a plain array that is searched from end to end. */
#include "store/index.h"

#include <stdio.h>
#include <stdlib.h>

#include "../test.h"

enum { KEYS = 300, RANKS = 2, LANES = 4, OPS = 60000 };

struct model {
    bool there[KEYS][RANKS][LANES];
    uint32_t place[KEYS][RANKS][LANES];
    size_t count;
};

static uint64_t seed;

static uint32_t below(uint32_t n)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % n;
}

/* Few different words: many keys share a home, so that runs are long and wrap. */
static ucm_key key_of(uint32_t i)
{
    ucm_key key = {{0}};
    memcpy(key.b, &i, sizeof i);
    uint32_t word = i % 7;
    memcpy(key.b + 4, &word, sizeof word);
    return key;
}

static void check(const struct ucmi_index *ix, const struct model *m, uint32_t k)
{
    ucm_key key = key_of(k);
    for (uint16_t r = 0; r < RANKS; r++) {
        bool any = false;
        for (uint16_t l = 0; l < LANES; l++) {
            const struct ucmi_entry *e = ucmi_index_find(ix, &key, r, (uint16_t)(l + 1));
            assert_int_equal(e != NULL, m->there[k][r][l]);
            any |= m->there[k][r][l];
            if (e)
                assert_int_equal(e->place, m->place[k][r][l]);
        }
        assert_int_equal(ucmi_index_find(ix, &key, r, 0) != NULL, any);
        uint8_t found = 0;
        assert_int_equal(ucmi_index_probe(ix, &key, 1, r, 1, 3, &found), !any);
        assert_int_equal(found, any ? 3 : 0);
    }
}

static void drop_lane(struct ucmi_index *ix, struct model *m, uint16_t lane)
{
    size_t n = 0;
    for (uint32_t k = 0; k < KEYS; k++)
        for (unsigned r = 0; r < RANKS; r++) {
            n += m->there[k][r][lane];
            m->there[k][r][lane] = false;
        }
    m->count -= n;
    assert_int_equal(ucmi_index_drop_lane(ix, (uint16_t)(lane + 1)), n);
}

static void does_what_the_model_does(void **state)
{
    struct ucmi_index ix;
    struct model *m = calloc(1, sizeof *m);
    seed = (uint64_t)time(NULL);
    print_message("# seed %llu\n", (unsigned long long)seed);
    assert_int_equal(ucmi_index_init(&ix), 0);
    for (int i = 0; i < OPS; i++) {
        uint32_t k = below(KEYS), op = below(1000);
        uint16_t r = (uint16_t)below(RANKS), l = (uint16_t)below(LANES);
        struct ucmi_entry e = {
            .key = key_of(k), .place = (uint32_t)i, .lane = (uint16_t)(l + 1), .rank = r};
        bool *there = &m->there[k][r][l];
        if (op < 550) {
            assert_int_equal(ucmi_index_put(&ix, &e), *there);
            m->count += !*there;
            *there = true;
            m->place[k][r][l] = (uint32_t)i;
        } else if (op < 999) {
            struct ucmi_entry *at = ucmi_index_find(&ix, &e.key, r, e.lane);
            assert_int_equal(at != NULL, *there);
            if (at)
                ucmi_index_remove(&ix, at);
            m->count -= *there;
            *there = false;
        } else {
            drop_lane(&ix, m, l);
        }
        assert_int_equal(ix.count, m->count);
        check(&ix, m, k);
        check(&ix, m, below(KEYS));
    }
    ucmi_index_destroy(&ix);
    free(m);
}

static void grows_and_keeps_all(void **state)
{
    enum { N = 200000 };
    struct ucmi_index ix;
    uint8_t *found = calloc(1, 2 * N);
    ucm_key *keys = calloc(2 * N, sizeof *keys);
    assert_int_equal(ucmi_index_init(&ix), 0);
    for (uint64_t i = 0; i < 2 * N; i++) {
        ucmi_hash128(&i, sizeof i, keys[i].b);
        struct ucmi_entry e = {.key = keys[i], .place = (uint32_t)i, .lane = 1};
        if (i % 2)
            assert_int_equal(ucmi_index_put(&ix, &e), 0);
    }
    found[1] = 7; /* not asked for */
    assert_int_equal(ucmi_index_probe(&ix, keys, 2 * N, 0, 5, 1, found), N);
    for (size_t i = 2; i < 2 * N; i++)
        assert_int_equal(found[i], i % 2);
    assert_int_equal(found[1], 7);
    const struct ucmi_entry *seen = ucmi_index_find(&ix, &keys[3], 0, 1);
    assert_int_equal(seen->seen, 5);
    assert_int_equal(ucmi_index_find(&ix, &keys[1], 0, 1)->seen, 0);
    ucmi_index_destroy(&ix);
    free(keys);
    free(found);
}

static void room_that_was_made_is_enough(void **state)
{
    enum { N = 100000 };
    struct ucmi_index ix;
    struct ucmi_entry e = {.lane = 1};
    assert_int_equal(ucmi_index_init(&ix), 0);
    for (uint64_t i = 0; i < 100; i++) {
        ucmi_hash128(&i, sizeof i, e.key.b);
        assert_int_equal(ucmi_index_put(&ix, &e), 0);
    }
    assert_int_equal(ucmi_index_reserve(&ix, N), 0);
    assert_int_equal(ucmi_index_reserve(&ix, 10), 0); /* never less */
    const struct ucmi_entry *v = ix.v;
    for (uint64_t i = 0; i < N; i++) {
        ucmi_hash128(&i, sizeof i, e.key.b);
        ucmi_index_prefetch(&ix, &e.key, 0);
        assert_int_equal(ucmi_index_put(&ix, &e), i < 100);
    }
    assert_ptr_equal(ix.v, v);
    assert_int_equal(ix.count, N);
    ucmi_index_destroy(&ix);
}

static struct ucmi_entry entry_of(uint64_t i, uint16_t lane)
{
    struct ucmi_entry e = {.lane = lane};
    ucmi_hash128(&i, sizeof i, e.key.b);
    return e;
}

static void put(struct ucmi_index *ix, uint64_t i, uint16_t lane)
{
    struct ucmi_entry e = entry_of(i, lane);
    assert_int_equal(ucmi_index_put(ix, &e), 0);
}

static void take(struct ucmi_index *ix, uint64_t i, uint16_t lane)
{
    struct ucmi_entry e = entry_of(i, lane);
    ucmi_index_remove(ix, ucmi_index_find(ix, &e.key, 0, lane));
}

static bool is(const ucm_key *key, uint64_t i)
{
    struct ucmi_entry e = entry_of(i, 1);
    return ucmi_key_eq(key, &e.key);
}

static void what_is_gone_is_told_once(void **state)
{
    struct ucmi_index ix;
    ucm_key gone[100];
    uint64_t lost = 0;
    assert_int_equal(ucmi_index_init(&ix), 0);
    for (uint64_t i = 0; i < 10; i++)
        put(&ix, i, 1);
    take(&ix, 0, 1); /* before anybody asked */
    assert_int_equal(ucmi_index_gone(&ix, gone, 100, &lost), 0);
    for (uint64_t i = 1; i < 6; i++)
        take(&ix, i, 1);
    put(&ix, 2, 1); /* is back */
    put(&ix, 7, 2);
    take(&ix, 7, 1); /* is still in another lane */
    for (uint64_t i = 10; i < 2000; i++)
        put(&ix, i, 1); /* the table grows */
    assert_int_equal(ucmi_index_gone(&ix, gone, 3, &lost), 3);
    assert_int_equal(ucmi_index_gone(&ix, gone + 3, 97, &lost), 1);
    static const uint64_t told[] = {1, 3, 4, 5};
    for (size_t i = 0; i < 4; i++)
        assert_true(is(&gone[i], told[i]));
    assert_int_equal(lost, 0);
    assert_int_equal(ucmi_index_gone(&ix, gone, 100, &lost), 0);
    ucmi_index_destroy(&ix);
}

static void what_cannot_be_told_is_counted(void **state)
{
    enum { MORE = 7, STEP = 1000 };
    struct ucmi_index ix;
    ucm_key gone[STEP];
    uint64_t lost = 0;
    size_t told = 0;
    assert_int_equal(ucmi_index_init(&ix), 0);
    assert_int_equal(ucmi_index_gone(&ix, gone, STEP, &lost), 0);
    for (uint64_t i = 0; i < UCMI_GONE + MORE; i++) {
        put(&ix, i, 1);
        take(&ix, i, 1);
    }
    for (ssize_t n; (n = ucmi_index_gone(&ix, gone, STEP, &lost)) > 0; told += (size_t)n)
        assert_true(is(&gone[0], told));
    assert_int_equal(told, UCMI_GONE);
    assert_int_equal(lost, MORE);
    for (uint64_t i = 0; i < 20; i++)
        put(&ix, i, (uint16_t)(i % 2 + 1));
    ucmi_index_drop_lane(&ix, 1); /* to be read anew, perhaps */
    assert_int_equal(ucmi_index_gone(&ix, gone, STEP, &lost), 0);
    assert_int_equal(lost, MORE + 10);
    ucmi_index_destroy(&ix);
}

static uint32_t seen_when_found(struct ucmi_index *ix, uint32_t now)
{
    ucm_key key = key_of(1);
    uint8_t found = 0;
    ucmi_index_probe(ix, &key, 1, 0, now, 1, &found);
    assert_int_equal(found, 1);
    return ucmi_index_find(ix, &key, 0, 1)->seen;
}

static void who_was_seen_later_than_now_was_not(void **state)
{
    struct ucmi_index ix;
    assert_int_equal(ucmi_index_init(&ix), 0);
    ucmi_index_put(&ix, &(struct ucmi_entry){.key = key_of(1), .lane = 1});
    assert_int_equal(seen_when_found(&ix, 1000), 1000);
    assert_int_equal(seen_when_found(&ix, 1000 - UCMI_LEASE_S), 1000); /* its lease goes on */
    assert_int_equal(seen_when_found(&ix, 0), 1000);                   /* a look is no use */
    assert_int_equal(seen_when_found(&ix, 400), 400);                  /* the clock was set back */
    assert_true(ucmi_lease_lasts(1000, 1000 + UCMI_LEASE_S - 1));
    assert_true(ucmi_lease_lasts(1000, 999));
    assert_false(ucmi_lease_lasts(1000, 1000 + UCMI_LEASE_S));
    assert_false(ucmi_lease_lasts(1000, 400));
    ucmi_index_destroy(&ix);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(does_what_the_model_does),
        cmocka_unit_test(grows_and_keeps_all),
        cmocka_unit_test(room_that_was_made_is_enough),
        cmocka_unit_test(what_is_gone_is_told_once),
        cmocka_unit_test(what_cannot_be_told_is_counted),
        cmocka_unit_test(who_was_seen_later_than_now_was_not),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

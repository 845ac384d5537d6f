/* SPDX-License-Identifier: Apache-2.0 */
/* The pool as one process sees it: what is in it, what goes first, how it is made, joined, left. */
#include "harness.h"

#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static struct ucmi_pool *pool_of(const char *dir, uint8_t ns, uint32_t nslots)
{
    struct ucmi_pool_spec spec = pool_spec(dir, ns, nslots);
    return pool_open(&spec);
}

static enum ucmi_pool_got get(struct ucmi_pool *p, uint64_t i, uint32_t depth, uint32_t *slot)
{
    struct ucmi_pool_want want = {.key = key_of(i), .depth = depth};
    return ucmi_pool_get(p, &want, UCMI_POOL_EVICT, slot);
}

/* Puts key i in; its bytes are its number. */
static uint32_t put(struct ucmi_pool *p, uint64_t i, uint32_t depth)
{
    uint32_t slot;
    assert_int_equal(get(p, i, depth, &slot), UCMI_POOL_CLAIMED);
    memcpy(ucmi_pool_memory(p, slot), &i, sizeof i);
    ucmi_pool_publish(p, slot);
    ucmi_pool_unpin(p, slot);
    return slot;
}

/* ---- against a model ---- */

enum { KEYS = 300, NOBODY = -1 };
struct model {
    enum { ABSENT, FILLING, READY } state[KEYS];
    uint32_t slot[KEYS];
    int pins[KEYS];
    int *holder; /* per slot: the key, or NOBODY */
};

/* Whether one of the slots that key i may lie in is free, or can be had by eviction. */
static bool has_room(const struct ucmi_pool *p, const struct model *m, int i, bool *free_p)
{
    ucm_key key = key_of((uint64_t)i);
    uint32_t sets[2];
    bool room = false;
    *free_p = false;
    ucmi_pool_sets(p, &key, 0, sets);
    for (int k = 0; k < 2; k++)
        for (uint32_t w = 0; w < ucmi_pool_set_size(p, sets[k]); w++) {
            int holder = m->holder[ucmi_pool_set_first(p, sets[k]) + w];
            *free_p |= holder == NOBODY;
            room |= holder == NOBODY || (m->state[holder] == READY && !m->pins[holder]);
        }
    return room;
}

static void model_claimed(struct ucmi_pool *p, struct model *m, int i, uint32_t slot, bool was_free)
{
    int victim = m->holder[slot];
    assert_int_equal(m->state[i], ABSENT);
    if (victim != NOBODY) {
        assert_false(was_free); /* nothing goes while there is room */
        assert_int_equal(m->state[victim], READY);
        assert_int_equal(m->pins[victim], 0);
        m->state[victim] = ABSENT;
    }
    m->holder[slot] = i;
    m->slot[i] = slot;
    m->state[i] = FILLING;
    memcpy(ucmi_pool_memory(p, slot), &i, sizeof i);
}

static void model_get(struct ucmi_pool *p, struct model *m, int i)
{
    uint32_t slot;
    bool was_free, room = has_room(p, m, i, &was_free);
    int bytes;
    switch (get(p, (uint64_t)i, 0, &slot)) {
    case UCMI_POOL_READY:
        assert_int_equal(m->state[i], READY);
        assert_int_equal(slot, m->slot[i]);
        memcpy(&bytes, ucmi_pool_memory(p, slot), sizeof bytes);
        assert_int_equal(bytes, i);
        m->pins[i]++;
        break;
    case UCMI_POOL_CLAIMED: model_claimed(p, m, i, slot, was_free); break;
    case UCMI_POOL_MINE:
        assert_int_equal(m->state[i], FILLING);
        assert_int_equal(slot, m->slot[i]);
        break;
    case UCMI_POOL_FULL:
        assert_int_equal(m->state[i], ABSENT);
        assert_false(room);
        break;
    case UCMI_POOL_BUSY: fail_msg("nobody else is here");
    }
}

static void model_step(struct ucmi_pool *p, struct model *m, unsigned what, int i)
{
    if (what < 5) {
        model_get(p, m, i);
    } else if (what < 7 && m->state[i] == FILLING) {
        ucmi_pool_publish(p, m->slot[i]);
        m->state[i] = READY;
        m->pins[i] = 1;
    } else if (what == 7 && m->state[i] == FILLING) {
        ucmi_pool_drop(p, m->slot[i]);
        m->state[i] = ABSENT;
        m->holder[m->slot[i]] = NOBODY;
    } else if (m->pins[i]) {
        ucmi_pool_unpin(p, m->slot[i]);
        m->pins[i]--;
    }
    assert_int_equal(pool_found(p, (uint64_t)i), m->state[i] == READY);
}

static void agrees_with_a_model(void **state)
{
    static const uint32_t sizes[] = {1, 2, 5, 31, 32, 33, 63, 65, 100, 1000};
    for (size_t k = 0; k < ARRAY_LEN(sizes); k++) {
        struct ucmi_pool *p = pool_of(k % 2 ? *state : NULL, 1, sizes[k]);
        struct model m = {.holder = malloc(sizes[k] * sizeof(int))};
        uint64_t random = k + 1;
        assert_int_equal(p->layout.nslots, sizes[k]);
        for (uint32_t i = 0; i < sizes[k]; i++)
            m.holder[i] = NOBODY;
        for (unsigned n = 0; n < 20000; n++) {
            random = random * UINT64_C(6364136223846793005) + 1442695040888963407;
            model_step(p, &m, (unsigned)(random >> 33) % 10, (int)(random >> 40) % KEYS);
        }
        int64_t ready = 0;
        for (int i = 0; i < KEYS; i++)
            ready += m.state[i] == READY;
        assert_int_equal(atomic_load(&p->head->ready), ready);
        free(m.holder);
        ucmi_pool_close(p);
    }
}

/* ---- placing and replacing ---- */

static void fills_before_it_evicts(void **state)
{
    enum { SLOTS = 4096 };
    struct ucmi_pool *p = pool_of(NULL, 1, SLOTS);
    uint64_t n = 0;
    int64_t before = atomic_load(&pool_counters.v[UCMI_CACHE_EVICTED]);
    while (atomic_load(&pool_counters.v[UCMI_CACHE_EVICTED]) == before)
        put(p, n++, 0);
    assert_true(n > SLOTS * 95 / 100);
    ucmi_pool_close(p);
}

static void sets_share_the_slots(void **state)
{
    for (uint32_t n = 1; n < 300; n++) {
        struct ucmi_pool *p = pool_of(NULL, 1, n);
        uint32_t next = 0;
        for (uint32_t set = 0; set < p->layout.nsets; set++) {
            uint32_t size = ucmi_pool_set_size(p, set);
            assert_int_equal(ucmi_pool_set_first(p, set), next);
            assert_in_range(size, 1, UCMI_POOL_WAYS);
            for (uint32_t k = 0; k < size; k++)
                assert_int_equal(ucmi_pool_set_of(p, next + k), set);
            next += size;
        }
        assert_int_equal(next, n);
        ucmi_pool_close(p);
    }
}

static void coldest_goes_first_tails_before_heads(void **state)
{
    struct ucmi_pool *p = pool_of(NULL, 1, 4);
    for (uint64_t i = 0; i < 4; i++)
        atomic_store(&p->metas[put(p, i, (uint32_t)i)].tick, i == 1 ? 90 : 100);
    put(p, 10, 0);
    assert_false(pool_found(p, 1)); /* used longest ago */
    assert_true(pool_found(p, 0));
    for (uint32_t i = 0; i < 4; i++)
        atomic_store(&p->metas[i].tick, 100);
    put(p, 11, 0);
    assert_false(pool_found(p, 3)); /* used together with the others, but last in its chain */
    assert_true(pool_found(p, 2));
    ucmi_pool_close(p);
}

static void set_last_use(struct ucmi_pool *p, uint32_t tick)
{
    for (uint32_t i = 0; i < p->layout.nslots; i++)
        atomic_store(&p->metas[i].tick, tick);
}

static void what_was_used_again_outlives_what_was_not(void **state)
{
    struct ucmi_pool *p = pool_of(NULL, 1, 4);
    uint32_t slot[4];
    for (uint64_t i = 0; i < 4; i++)
        slot[i] = put(p, i, (uint32_t)i);
    set_last_use(p, 1);
    assert_true(pool_found(p, 3));                             /* a lookup is a use */
    assert_int_equal(get(p, 2, 2, &slot[2]), UCMI_POOL_READY); /* so is getting it */
    ucmi_pool_unpin(p, slot[2]);
    for (int i = 0; i < 4; i++)
        assert_int_equal(atomic_load(&p->metas[slot[i]].again), i >= 2);
    set_last_use(p, 100);
    atomic_store(&p->metas[slot[2]].tick, 81);
    atomic_store(&p->metas[slot[3]].tick, 79);
    atomic_store(&p->head->span, (uint64_t)10 << 28 | 1); /* ticks, whatever the clock said */
    put(p, 10, 0);
    assert_false(pool_found(p, 3));              /* two spans are over */
    atomic_store(&p->metas[slot[3]].tick, 1000); /* where 10 is now */
    put(p, 11, 0);
    assert_false(pool_found(p, 1));
    atomic_store(&p->metas[slot[1]].tick, 1000);
    put(p, 12, 0);
    assert_false(pool_found(p, 0));
    atomic_store(&p->metas[slot[0]].tick, 1000);
    put(p, 13, 0);
    assert_false(pool_found(p, 2)); /* after those that were used later, but once */
    ucmi_pool_close(p);
}

static void what_is_only_looked_at_is_not_used(void **state)
{
    struct ucmi_pool *p = pool_of(NULL, 1, 4);
    uint32_t slot = put(p, 1, 0);
    ucm_key key = key_of(1);
    uint8_t level = 0;
    set_last_use(p, 1);
    assert_int_equal(ucmi_pool_lookup(p, &key, 1, 0, 1, &level, false), 0);
    assert_int_equal(atomic_load(&p->metas[slot].tick), 1);
    assert_int_equal(atomic_load(&p->metas[slot].again), 0);
    ucmi_pool_close(p);
}

static void who_comes_back_has_been_used_again(void **state)
{
    struct ucmi_pool *p = pool_of(NULL, 1, 4);
    for (uint64_t i = 0; i < 5; i++) {
        uint32_t slot = put(p, i, 0);
        assert_int_equal(atomic_load(&p->metas[slot].again), 0);
        atomic_fetch_sub(&p->metas[slot].tick, 5 - (uint32_t)i);
    }
    uint32_t slot = put(p, 0, 0); /* evicted by 4 */
    assert_int_equal(atomic_load(&p->metas[slot].again), 1);
    ucmi_pool_close(p);
}

static void uses_are_counted_once_a_tick(void **state)
{
    struct ucmi_pool *p = pool_of(NULL, 1, 4);
    uint32_t slot = put(p, 1, 0);
    for (int i = 0; i < 3; i++) { /* leased into the future: also if a tick ends meanwhile */
        atomic_store(&p->metas[slot].tick, UINT32_MAX - 1);
        assert_true(pool_found(p, 1));
    }
    assert_int_equal(atomic_load(&p->metas[slot].again), 0);
    ucmi_pool_close(p);
}

static void lookup_and_use_keep_a_block(void **state)
{
    struct ucmi_pool *p = pool_of(NULL, 1, 4);
    uint32_t slot;
    for (uint64_t i = 0; i < 4; i++)
        put(p, i, (uint32_t)i);
    assert_true(pool_found(p, 3)); /* the tail would go first, but is leased now */
    put(p, 10, 100);
    assert_true(pool_found(p, 3));
    assert_false(pool_found(p, 2)); /* which leases nothing: it was the coldest and is gone */
    assert_int_equal(get(p, 0, 0, &slot), UCMI_POOL_READY); /* pinned: cannot go at all */
    for (uint64_t i = 20; i < 40; i++)
        put(p, i, 0);
    assert_true(pool_found(p, 0));
    ucmi_pool_unpin(p, slot);
    ucmi_pool_close(p);
}

static void ranks_are_told_apart(void **state)
{
    struct ucmi_pool *p = pool_of(NULL, 1, 64);
    struct ucmi_pool_want want = {.key = key_of(1), .rank = 3};
    uint32_t slot;
    uint8_t level = 0;
    put(p, 1, 0);
    assert_int_equal(ucmi_pool_lookup(p, &want.key, 1, 3, 1, &level, true), 1);
    assert_int_equal(ucmi_pool_get(p, &want, UCMI_POOL_LOOK, &slot),
                     UCMI_POOL_FULL); /* may not claim */
    assert_int_equal(ucmi_pool_get(p, &want, UCMI_POOL_EVICT, &slot), UCMI_POOL_CLAIMED);
    ucmi_pool_drop(p, slot);
    ucmi_pool_close(p);
}

static void lookup_skips_what_is_found(void **state)
{
    enum { N = 100 };
    struct ucmi_pool *p = pool_of(NULL, 1, 256);
    ucm_key keys[N];
    uint8_t level[N];
    for (uint64_t i = 0; i < N; i++) {
        keys[i] = key_of(i);
        level[i] = i % 3 ? 0 : 9;
        if (i % 2)
            put(p, i, 0);
    }
    size_t missed = ucmi_pool_lookup(p, keys, N, 0, 1, level, true), zero = 0;
    for (size_t i = 0; i < N; i++) {
        assert_int_equal(level[i], i % 3 == 0 ? 9 : i % 2);
        zero += !level[i];
    }
    assert_int_equal(missed, zero);
    ucmi_pool_close(p);
}

/* ---- the file ---- */

static void file_is_ours_alone_and_goes_with_the_last(void **state)
{
    struct ucmi_pool *a = pool_of(*state, 1, 8), *b = pool_of(*state, 1, 8);
    struct stat st;
    assert_int_equal(stat(a->path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_not_equal(a->me, b->me);
    put(a, 5, 0);
    assert_true(pool_found(b, 5));
    ucmi_pool_close(a);
    assert_int_equal(count_files(*state), 1);
    assert_true(pool_found(b, 5));
    ucmi_pool_close(b);
    assert_int_equal(count_files(*state), 0);
}

/* No touch can fail later.  And nobody waits for the allocation of a pool: this one has more than
 * is allocated at once, and is used beyond that while a thread goes on. */
static void space_is_allocated_before_it_is_used(void **state)
{
    enum { SLOTS = 65536 };
    struct ucmi_pool *p = pool_of(*state, 1, SLOTS);
    uint32_t slot;
    for (uint64_t i = 0; i < SLOTS; i++)
        if (get(p, i, 0, &slot) == UCMI_POOL_CLAIMED) {
            assert_in_range(ucmi_pool_place(p, slot), 0, ucmi_pool_grown(p) - 1);
            ucmi_pool_publish(p, slot);
            ucmi_pool_unpin(p, slot);
        }
    uint32_t grown;
    do {
        grown = ucmi_pool_grown(p);
        struct stat st;
        assert_int_equal(fstat(p->fd, &st), 0);
        assert_int_equal(st.st_size, p->layout.size);
        assert_true((uint64_t)st.st_blocks * 512 >= p->layout.data_at + grown * p->layout.pitch);
        usleep(1000);
    } while (grown < SLOTS);
    ucmi_pool_close(p);
}

/* A device that registers memory is shown what has been allocated, each slot once, and by the time
 * of its first use; and takes it back. */
static struct {
    pthread_mutex_t lock;
    struct ucmi_pool *pool; /* NULL: not known yet */
    size_t bytes, early;
} shown = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int show(void *d, void *p, size_t len)
{
    pthread_mutex_lock(&shown.lock);
    struct ucmi_pool *pool = shown.pool;
    shown.bytes += len;
    if (pool &&
        (uint64_t)((char *)p + len - pool->data) > ucmi_pool_grown(pool) * pool->layout.pitch)
        shown.early++;
    pthread_mutex_unlock(&shown.lock);
    return 0;
}

static void hide(void *d, void *p, size_t len)
{
    shown.bytes -= len;
}

static void what_has_grown_is_registered(void **state)
{
    static const struct ucm_dev_ops dev = {.p = {.name = "test"}, .pin = show, .unpin = hide};
    enum { SLOTS = 65536 };
    struct ucmi_pool_spec spec = pool_spec(*state, 1, SLOTS);
    uint32_t slot;
    spec.dev = &dev;
    pthread_mutex_lock(&shown.lock); /* nothing is registered before its pool is known */
    struct ucmi_pool *p = pool_open(&spec);
    shown.pool = p;
    pthread_mutex_unlock(&shown.lock);
    for (uint64_t i = 0; i < SLOTS; i++)
        if (get(p, i, 0, &slot) == UCMI_POOL_CLAIMED) {
            ucmi_pool_touch(p, slot);
            assert_int_not_equal(p->steps[ucmi_pool_place(p, slot) / p->step], 0);
            ucmi_pool_drop(p, slot);
        }
    for (bool all = false; !all; usleep(1000)) {
        pthread_mutex_lock(&shown.lock);
        all = shown.bytes >= SLOTS * p->layout.pitch;
        pthread_mutex_unlock(&shown.lock);
    }
    assert_int_equal(shown.bytes, SLOTS * p->layout.pitch);
    assert_int_equal(shown.early, 0);
    ucmi_pool_close(p);
    assert_int_equal(shown.bytes, 0);
}

static void namespaces_do_not_meet(void **state)
{
    struct ucmi_pool *a = pool_of(*state, 1, 8), *b = pool_of(*state, 2, 8);
    assert_int_equal(count_files(*state), 2); /* making one leaves the living alone */
    put(a, 5, 0);
    assert_false(pool_found(b, 5));
    ucmi_pool_close(a);
    ucmi_pool_close(b);
}

/* Whoever cannot share works by himself, and leaves what is there alone. */
static void check_private(const char *dir)
{
    struct ucmi_pool *p = pool_of(dir, 1, 8);
    assert_int_equal(p->fd, -1);
    put(p, 5, 0);
    assert_true(pool_found(p, 5));
    ucmi_pool_close(p);
    assert_int_equal(count_files(dir), 1);
}

static void foreign_geometry_is_not_joined(void **state)
{
    struct ucmi_pool *a = pool_of(*state, 1, 8);
    a->head->layout.version++;
    check_private(*state);
    a->head->layout.version--;
    a->head->layout.pitch *= 2;
    check_private(*state);
    a->head->layout.pitch /= 2;
    atomic_fetch_xor(&a->head->magic, 1); /* looks unfinished, but someone lives in it */
    check_private(*state);
    atomic_fetch_xor(&a->head->magic, 1);
    put(a, 1, 0);
    assert_int_equal(ftruncate(a->fd, (off_t)a->layout.size + 1), 0);
    check_private(*state);
    ucmi_pool_close(a);
}

static void open_file_of_others_is_not_used(void **state)
{
    struct ucmi_pool *a = pool_of(*state, 1, 8);
    assert_int_equal(fchmod(a->fd, 0644), 0);
    check_private(*state);
    ucmi_pool_close(a);
}

static void members_are_64(void **state)
{
    struct ucmi_pool *p[UCMI_POOL_MEMBERS];
    uint64_t seen = 0;
    for (int i = 0; i < UCMI_POOL_MEMBERS; i++) {
        p[i] = pool_of(*state, 1, 8);
        assert_true(p[i]->fd >= 0);
        seen |= ucmi_pool_bit(p[i]);
    }
    assert_true(seen == UINT64_MAX);
    check_private(*state);
    ucmi_pool_close(p[17]);
    p[17] = pool_of(*state, 1, 8);
    assert_int_equal(p[17]->me, 17);
    for (int i = 0; i < UCMI_POOL_MEMBERS; i++)
        ucmi_pool_close(p[i]);
    assert_int_equal(count_files(*state), 0);
}

static void size_errors_name_key_value_and_remedy(void **state)
{
    struct ucmi_pool_spec spec = {
        .dir = *state,
        .block_size = 4096,
        .shard_size = 4096,
        .counters = &pool_counters,
    };
    struct ucmi_pool *p = NULL;
    char why[512];
    spec.bytes = UINT64_C(1) << 50;
    assert_int_equal(ucmi_pool_open(&spec, &p, why, sizeof why), -ENOSPC);
    assert_non_null(strstr(why, "cache_buffer_capacity_gb: 1.05e+06"));
    assert_non_null(strstr(why, "available"));
    spec.bytes = 4096;
    assert_int_equal(ucmi_pool_open(&spec, &p, why, sizeof why), -ENOSPC);
    assert_non_null(strstr(why, "no block of 4096 bytes"));
    spec.dir = "/nonexistent/directory";
    spec.bytes = 1 << 20;
    assert_int_equal(ucmi_pool_open(&spec, &p, why, sizeof why), -ENOENT);
    assert_non_null(strstr(why, "cache_dir: /nonexistent/directory: No such file"));
    assert_null(p);
    assert_int_equal(count_files(*state), 0);
}

static void fits_the_machine_by_default(void **state)
{
    struct ucmi_pool_spec spec = {
        .block_size = 1 << 20, .shard_size = 1 << 20, .counters = &pool_counters};
    struct ucmi_pool *p = NULL;
    char why[512] = "";
    long pages = sysconf(_SC_PHYS_PAGES);
    assert_int_equal(ucmi_pool_open(&spec, &p, why, sizeof why), 0);
    assert_in_range(p->layout.size, 1 << 20, (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE) / 4);
    ucmi_pool_close(p);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)
    const struct CMUnitTest tests[] = {
        TEST(agrees_with_a_model),
        TEST(fills_before_it_evicts),
        TEST(sets_share_the_slots),
        TEST(coldest_goes_first_tails_before_heads),
        TEST(what_was_used_again_outlives_what_was_not),
        TEST(what_is_only_looked_at_is_not_used),
        TEST(who_comes_back_has_been_used_again),
        TEST(uses_are_counted_once_a_tick),
        TEST(lookup_and_use_keep_a_block),
        TEST(ranks_are_told_apart),
        TEST(lookup_skips_what_is_found),
        TEST(file_is_ours_alone_and_goes_with_the_last),
        TEST(space_is_allocated_before_it_is_used),
        TEST(what_has_grown_is_registered),
        TEST(namespaces_do_not_meet),
        TEST(foreign_geometry_is_not_joined),
        TEST(open_file_of_others_is_not_used),
        TEST(members_are_64),
        TEST(size_errors_name_key_value_and_remedy),
        TEST(fits_the_machine_by_default),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

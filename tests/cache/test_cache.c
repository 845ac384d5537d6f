/* SPDX-License-Identifier: Apache-2.0 */
/* The Cache tier when all goes well: dumps and loads in every shape, sharing, streaming, order. */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>

#include "dev/dev.h"
#include "store/pool.h"

extern const struct ucm_tier_ops ucmi_tier_cache;

static const struct shape plain = {.nshards = 4, .shard_size = 1024, .nslots = 64};

static void what_was_dumped_is_loaded(void **state)
{
    struct stack s;
    stack_open(&s, *state, &plain, NULL);
    assert_int_equal(count_ready(&s, 0, 20), 0);
    assert_int_equal(run_move(&s, true, 0, 20), 0);
    assert_int_equal(count_ready(&s, 0, 30), 20);
    for (uint64_t i = 0; i < 20; i++) {
        ucm_key key = key_of(i);
        assert_true(below_has(&s.below, &key));
    }
    assert_int_equal(run_move(&s, false, 0, 20), 0);
    assert_int_equal(s.below.reads, 0); /* it all came from DRAM */
    assert_int_equal(counter(&s, UCMI_CACHE_HITS), 20);
    assert_int_equal(counter(&s, UCMI_CACHE_FILLS), 0);
    assert_int_equal(counter(&s, UCMI_CACHE_SLOTS), 64);
    assert_int_equal(counter(&s, UCMI_CACHE_READY), 20);
    stack_close(&s);
    assert_int_equal(count_files(*state), 0);
}

static void a_miss_is_read_from_below_and_kept(void **state)
{
    struct stack s;
    stack_open(&s, *state, &plain, NULL);
    for (uint64_t i = 0; i < 10; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    assert_int_equal(run_move(&s, false, 0, 10), 0);
    assert_int_equal(s.below.reads, 10);
    assert_int_equal(s.below.submits, 1); /* in one batch */
    assert_int_equal(count_ready(&s, 0, 10), 10);
    assert_int_equal(run_move(&s, false, 0, 10), 0);
    assert_int_equal(s.below.reads, 10);
    assert_int_equal(s.below.writes, 0); /* where it came from it need not go */
    stack_close(&s);
}

static void lookup_asks_below_for_the_rest(void **state)
{
    struct stack s;
    stack_open(&s, *state, &plain, NULL);
    ucm_key keys[4] = {key_of(0), key_of(1), key_of(2), key_of(3)};
    uint8_t found[4] = {0, 0, 0, 9};
    assert_int_equal(run_move(&s, true, 0, 1), 0);
    below_put(&s.below, &keys[1]);
    ucmi_tier_cache.lookup(&s.cache, keys, 4, 0, 1, found, &(struct ucm_lookup){0});
    assert_int_equal(found[0], 1);
    assert_int_equal(found[1], 2);
    assert_int_equal(found[2], 0);
    assert_int_equal(found[3], 9);
    stack_close(&s);
}

/* Group-major slices of a load arrive shard by shard, each read from below by itself. */
static void groups_stream(void **state)
{
    struct stack s;
    struct move m;
    stack_open(&s, *state, &plain, NULL);
    s.below.hold = true;
    for (uint64_t i = 0; i < 3; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    move_new(&m, &s, false, 0, 3, 0, 4, 1);
    assert_int_equal(move_submit(&m), 0);
    below_wait_held(&s.below, 12);
    for (uint32_t i = 0; i < 12; i++) { /* in the order of the layers */
        assert_int_equal(s.below.held[i].s->shard, i / 3);
        assert_int_equal(s.below.held[i].s->nshards, 1);
    }
    assert_int_equal(count_ready(&s, 0, 3), 0);
    below_release_all(&s.below, 0);
    assert_int_equal(move_wait(&m, UCM_RELEASED), 0);
    for (size_t i = 0; i < 12; i++)
        assert_true(move_right(&m, i));
    assert_int_equal(count_ready(&s, 0, 3), 3); /* all shards are there: a hit for everyone */
    move_free(&m);
    stack_close(&s);
}

static void two_loads_share_a_read(void **state)
{
    struct stack s;
    struct move a, b;
    stack_open(&s, *state, &plain, NULL);
    s.below.hold = true;
    below_put(&s.below, (ucm_key[]){key_of(0)});
    move_new(&a, &s, false, 0, 1, 0, 4, 0);
    move_new(&b, &s, false, 0, 1, 1, 2, 0);
    assert_int_equal(move_submit(&a), 0);
    below_wait_held(&s.below, 1);
    assert_int_equal(move_submit(&b), 0);
    below_release_all(&s.below, 0);
    assert_int_equal(move_wait(&a, UCM_RELEASED), 0);
    assert_int_equal(move_wait(&b, UCM_RELEASED), 0);
    assert_true(move_right(&a, 0));
    assert_true(move_right(&b, 0));
    assert_int_equal(s.below.reads, 1);
    move_free(&a);
    move_free(&b);
    stack_close(&s);
}

/* A load of some shards leaves a partial block: others read only what is missing. */
static void what_is_there_is_not_read_again(void **state)
{
    struct stack s;
    stack_open(&s, *state, &plain, NULL);
    below_put(&s.below, (ucm_key[]){key_of(0)});
    assert_int_equal(run_shards(&s, false, 0, 1, 1, 2), 0);
    assert_int_equal(count_ready(&s, 0, 1), 0);
    assert_int_equal(run_shards(&s, false, 0, 1, 2, 1), 0);
    assert_int_equal(s.below.reads, 1);
    assert_int_equal(run_move(&s, false, 0, 1), 0); /* 0 and 3 */
    assert_int_equal(s.below.reads, 3);
    assert_int_equal(count_ready(&s, 0, 1), 1);
    stack_close(&s);
}

/* A partial block that nobody uses makes room; a full pool does not wait for it to time out. */
static void partial_blocks_give_way(void **state)
{
    struct stack s;
    struct shape one = plain;
    one.nslots = 1;
    stack_open(&s, *state, &one, NULL);
    below_put(&s.below, (ucm_key[]){key_of(0)});
    below_put(&s.below, (ucm_key[]){key_of(1)});
    assert_int_equal(run_shards(&s, false, 0, 1, 0, 1), 0);
    assert_int_equal(run_move(&s, false, 1, 1), 0);
    assert_int_equal(run_shards(&s, false, 0, 1, 0, 1), 0);
    assert_int_equal(run_move(&s, true, 2, 1), 0);
    stack_close(&s);
}

/* Nor does another process that wants such a block wait until the first has lost patience: that
 * makes way, and reads what it needs again later. */
static void partial_blocks_are_left_to_others(void **state)
{
    struct stack a, b;
    struct shape patient = plain;
    patient.timeout_ms = 100 * PATIENCE_MS;
    stack_open(&a, *state, &patient, NULL);
    stack_open(&b, *state, &plain, NULL);
    below_put(&a.below, (ucm_key[]){key_of(0)});
    below_put(&b.below, (ucm_key[]){key_of(0)});
    assert_int_equal(run_shards(&a, false, 0, 1, 0, 1), 0);
    assert_int_equal(run_move(&b, false, 0, 1), 0);
    assert_int_equal(count_ready(&a, 0, 1), 1);
    assert_int_equal(run_move(&a, false, 0, 1), 0);
    assert_int_equal(a.below.reads, 1);
    stack_close(&b);
    stack_close(&a);
}

/* What is being dumped can be loaded shard by shard before the block is whole. */
static void a_block_being_dumped_serves_loads(void **state)
{
    struct stack s;
    struct move m;
    stack_open(&s, *state, &plain, NULL);
    move_new(&m, &s, true, 0, 1, 0, 2, 0);
    assert_int_equal(move_submit(&m), 0);
    assert_int_equal(move_wait(&m, UCM_RELEASED), 0);
    assert_int_equal(count_ready(&s, 0, 1), 0);
    assert_int_equal(run_shards(&s, false, 0, 1, 0, 2), 0);
    assert_int_equal(run_shards(&s, false, 0, 1, 1, 2), -ENOENT);
    assert_false(move_reached(&m, UCM_STORED));
    assert_int_equal(run_shards(&s, true, 0, 1, 2, 2), 0);
    assert_int_equal(move_wait(&m, UCM_STORED), 0);
    assert_true(below_has(&s.below, (ucm_key[]){key_of(0)}));
    assert_int_equal(run_move(&s, false, 0, 1), 0);
    move_free(&m);
    stack_close(&s);
}

static void dumping_again_is_harmless(void **state)
{
    struct stack s;
    struct move m;
    stack_open(&s, *state, &plain, NULL);
    assert_int_equal(run_move(&s, true, 0, 5), 0);
    assert_int_equal(run_move(&s, true, 0, 5), 0);
    move_new(&m, &s, true, 5, 1, 0, 2, 0);
    assert_int_equal(move_submit(&m), 0);
    assert_int_equal(move_wait(&m, UCM_RELEASED), 0);
    assert_int_equal(run_shards(&s, true, 5, 1, 0, 4), 0); /* 0 and 1 a second time */
    assert_int_equal(move_wait(&m, UCM_STORED), 0);
    move_free(&m);
    for (uint64_t i = 0; i < 6; i++)
        assert_true(below_has(&s.below, (ucm_key[]){key_of(i)}));
    assert_int_equal(run_move(&s, false, 0, 6), 0);
    stack_close(&s);
}

/* A block that is in DRAM but no longer below is written down again when it is dumped again. */
static void what_below_lost_is_written_again(void **state)
{
    struct stack s;
    stack_open(&s, *state, &plain, NULL);
    assert_int_equal(run_move(&s, true, 0, 1), 0);
    free(s.below.stored[0].bytes);
    s.below.nstored = 0;
    assert_int_equal(run_move(&s, true, 0, 1), 0);
    assert_true(below_has(&s.below, (ucm_key[]){key_of(0)}));
    stack_close(&s);
}

/* A prefetch brings blocks into the pool; the load that follows shares its read or finds them. */
static void prefetched_blocks_are_there(void **state)
{
    struct stack s;
    ucm_key keys[6];
    stack_open(&s, *state, &plain, NULL);
    s.below.hold = true;
    for (uint64_t i = 0; i < 5; i++) {
        keys[i] = key_of(i);
        below_put(&s.below, &keys[i]);
    }
    keys[5] = key_of(99); /* nobody has it: it is not asked for */
    ucmi_tier_cache.prefetch(&s.cache, keys, 6);
    below_wait_held(&s.below, 5);
    below_release_all(&s.below, 0);
    s.below.hold = false;
    assert_int_equal(run_move(&s, false, 0, 5), 0);
    assert_int_equal(s.below.reads, 5);
    ucmi_tier_cache.prefetch(&s.cache, keys, 5); /* nothing to do */
    assert_int_equal(run_move(&s, false, 0, 5), 0);
    assert_int_equal(s.below.reads, 5);
    ucm_key many[64];
    for (uint64_t i = 0; i < 64; i++) {
        many[i] = key_of(1000 + i);
        below_put(&s.below, &many[i]);
    }
    s.below.hold = true;
    ucmi_tier_cache.prefetch(&s.cache, many, 64); /* a hint does not empty the pool */
    below_wait_held(&s.below, 16);
    below_release_all(&s.below, 0);
    s.below.hold = false;
    assert_int_equal(run_move(&s, false, 0, 5), 0);
    assert_int_equal(s.below.reads, 5 + 16);
    stack_close(&s);
}

/* A block that nobody has costs the pool none, whoever asks for it. */
static void an_absent_block_evicts_nothing(void **state)
{
    enum { SLOTS = 8 };
    struct stack s;
    struct shape small = plain;
    ucm_key keys[SLOTS];
    small.nslots = SLOTS;
    stack_open(&s, *state, &small, NULL);
    assert_int_equal(run_move(&s, true, 0, SLOTS), 0);
    for (uint64_t i = 0; i < SLOTS; i++)
        keys[i] = key_of(50 + i);
    ucmi_tier_cache.prefetch(&s.cache, keys, SLOTS);
    assert_int_equal(run_move(&s, false, 100, 20), -ENOENT);
    assert_int_equal(run_move(&s, false, 0, SLOTS), 0);
    assert_int_equal(s.below.reads, 0);
    assert_int_equal(counter(&s, UCMI_CACHE_EVICTED), 0);
    below_put(&s.below, (ucm_key[]){key_of(100)});
    assert_int_equal(run_move(&s, false, 100, 1), 0); /* one that is there does */
    assert_int_equal(counter(&s, UCMI_CACHE_EVICTED), 1);
    stack_close(&s);
}

/* ---- more than fits ---- */

static void stream_through(const char *dir, unsigned nslots, size_t n)
{
    struct stack s;
    struct shape small = plain;
    small.nslots = nslots;
    stack_open(&s, dir, &small, NULL);
    s.below.shuffle = true;
    assert_int_equal(run_move(&s, true, 0, n), 0);
    assert_int_equal(below_count(&s.below), n);
    for (uint64_t i = 0; i < n; i++)
        assert_true(below_has(&s.below, (ucm_key[]){key_of(i)}));
    assert_int_equal(run_move(&s, false, 0, n), 0);
    assert_in_range(count_ready(&s, 0, n), 1, nslots);
    assert_true(counter(&s, UCMI_CACHE_EVICTED) >= (int64_t)(n - nslots));
    stack_close(&s);
}

static void a_task_larger_than_the_pool_streams_through(void **state)
{
    stream_through(*state, 1, 20);
    stream_through(*state, 3, 30);
    stream_through(*state, 33, 330);
    stream_through(*state, 100, 1000);
}

/* Loads and dumps of the same few blocks from all sides, through a pool that is too small. */
static void traffic_in_both_directions(void **state)
{
    enum { N = 24, ROUNDS = 12 };
    struct stack s;
    struct shape small = plain;
    struct move m[2 * ROUNDS];
    small.nslots = 9;
    stack_open(&s, *state, &small, NULL);
    s.below.shuffle = true;
    for (uint64_t i = 0; i < N; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    for (size_t i = 0; i < ARRAY_LEN(m); i++) {
        move_new(&m[i], &s, i % 2, i % 5, N - i % 5, 0, 4, i % 2 ? 0 : i % 3);
        assert_int_equal(move_submit(&m[i]), 0);
    }
    for (size_t i = 0; i < ARRAY_LEN(m); i++) {
        assert_int_equal(move_wait(&m[i], UCM_RELEASED), 0);
        for (size_t k = 0; !m[i].x.dump && k < m[i].x.n; k++)
            assert_true(move_right(&m[i], k));
        if (m[i].x.dump)
            assert_int_equal(move_wait(&m[i], UCM_STORED), 0);
        move_free(&m[i]);
    }
    stack_close(&s);
}

/* ---- layer by layer: what breaks those who publish on the last layer's index ---- */

static void layers_in_any_order(void **state)
{
    enum { LAYERS = 16, ROUNDS = 1000 };
    struct stack s;
    struct shape shape = {.nshards = LAYERS, .shard_size = 64, .nslots = 128};
    uint64_t random = 1;
    stack_open(&s, *state, &shape, NULL);
    s.below.shuffle = true;
    for (uint64_t round = 0; round < ROUNDS; round++) {
        struct move m[LAYERS];
        unsigned order[LAYERS];
        size_t n = 1 + round % 4;
        for (unsigned i = 0; i < LAYERS; i++) {
            random = random * UINT64_C(6364136223846793005) + 1442695040888963407;
            unsigned k = (unsigned)(random >> 33) % (i + 1);
            order[i] = order[k];
            order[k] = i;
        }
        for (unsigned i = 0; i < LAYERS; i++) {
            move_new(&m[i], &s, true, round * 4, n, order[i], 1, 0);
            assert_int_equal(move_submit(&m[i]), 0);
        }
        for (unsigned i = 0; i < LAYERS; i++) {
            assert_int_equal(move_wait(&m[i], UCM_STORED), 0);
            move_free(&m[i]);
        }
        for (uint64_t i = 0; i < n; i++)
            assert_true(below_has(&s.below, (ucm_key[]){key_of(round * 4 + i)}));
        assert_int_equal(run_move(&s, false, round * 4, n), 0);
        free(s.below.stored[0].bytes); /* the dictionary stays small */
        for (size_t i = 1; i < s.below.nstored; i++)
            free(s.below.stored[i].bytes);
        s.below.nstored = 0;
    }
    stack_close(&s);
}

/* ---- processes that share: a stack each ---- */

static void blocks_of_one_are_hits_for_the_other(void **state)
{
    struct stack a, b;
    stack_open(&a, *state, &plain, NULL);
    stack_open(&b, *state, &plain, NULL);
    assert_int_equal(run_move(&a, true, 0, 10), 0);
    assert_int_equal(count_ready(&b, 0, 10), 10);
    assert_int_equal(run_move(&b, false, 0, 10), 0);
    assert_int_equal(b.below.reads, 0);
    stack_close(&a);
    assert_int_equal(run_move(&b, false, 0, 10), 0);
    stack_close(&b);
    assert_int_equal(count_files(*state), 0);
}

/* However many processes dump to a disk that takes nothing, some of the slots are for loads. */
static void dumps_of_all_leave_a_share_to_loads(void **state)
{
    static const unsigned sizes[] = {2, 4, 8, 20};
    for (size_t k = 0; k < ARRAY_LEN(sizes); k++) {
        struct stack a, b;
        struct move most, more, known;
        struct shape shape = plain;
        shape.nslots = sizes[k];
        unsigned n = sizes[k] - MAX(sizes[k] / 8, 1);
        stack_open(&a, *state, &shape, NULL);
        stack_open(&b, *state, &shape, NULL);
        assert_int_equal(a.counters.v[UCMI_CACHE_SLOTS], sizes[k]);
        assert_int_equal(run_move(&a, true, 50, 1), 0);
        a.below.hold = b.below.hold = true;
        move_new(&most, &a, true, 0, n, 0, 4, 0);
        move_new(&more, &b, true, 60, 1, 0, 4, 0);
        move_new(&known, &b, true, 50, 1, 0, 4, 0);
        assert_int_equal(move_submit(&most), 0);
        below_wait_held(&a.below, n);
        assert_int_equal(move_submit(&more), 0);
        assert_int_equal(move_submit(&known), 0);
        assert_int_equal(move_wait(&known, UCM_RELEASED), 0); /* so the other was looked at */
        below_wait_held(&b.below, 1);
        b.below.hold = false;
        below_release_all(&b.below, 0);
        assert_int_equal(move_wait(&known, UCM_STORED), 0);
        below_put(&b.below, (ucm_key[]){key_of(70)});
        assert_int_equal(run_move(&b, false, 70, 1), 0);
        assert_false(move_reached(&more, UCM_RELEASED));
        a.below.hold = false;
        below_release_all(&a.below, 0);
        assert_int_equal(move_wait(&most, UCM_STORED), 0);
        assert_int_equal(move_wait(&more, UCM_STORED), 0);
        move_free(&most);
        move_free(&more);
        move_free(&known);
        stack_close(&a);
        stack_close(&b);
    }
}

static void private_buffers_are_not_shared(void **state)
{
    struct stack a, b;
    stack_open(&a, *state, &plain, "share_buffer_enable=false");
    stack_open(&b, *state, &plain, "share_buffer_enable=false");
    assert_int_equal(count_files(*state), 0);
    assert_int_equal(run_move(&a, true, 0, 10), 0);
    assert_int_equal(count_ready(&a, 0, 10), 10);
    assert_int_equal(count_ready(&b, 0, 10), 0);
    stack_close(&a);
    stack_close(&b);
}

/* A block that another process is filling is waited for: until it is there, or until it is not to
 * be, and then the one who waited fills it. */
static void a_block_in_the_making_is_waited_for(void **state)
{
    for (int finish = 0; finish < 2; finish++) {
        struct stack a, b;
        struct move first, other;
        stack_open(&a, *state, &plain, NULL);
        stack_open(&b, *state, &plain, NULL);
        move_new(&first, &a, true, 0, 1, 0, 3, 0);
        move_new(&other, &b, true, 0, 1, 0, 4, 0);
        assert_int_equal(move_submit(&first), 0);
        assert_int_equal(move_wait(&first, UCM_RELEASED), 0);
        assert_int_equal(move_submit(&other), 0);
        assert_int_equal(run_move(&b, true, 1, 3), 0); /* others pass it by */
        assert_false(move_reached(&other, UCM_RELEASED));
        if (finish) {
            assert_int_equal(run_shards(&a, true, 0, 1, 3, 1), 0);
            assert_int_equal(move_wait(&first, UCM_STORED), 0);
        } else {
            stack_close(&a);
            assert_int_equal(move_wait(&first, UCM_STORED), -ESHUTDOWN);
        }
        assert_int_equal(move_wait(&other, UCM_RELEASED), 0);
        assert_int_equal(move_wait(&other, UCM_STORED), 0);
        assert_true(below_has(&b.below, (ucm_key[]){key_of(0)}));
        assert_int_equal(run_move(&b, false, 0, 1), 0);
        move_free(&first);
        move_free(&other);
        if (finish)
            stack_close(&a);
        stack_close(&b);
    }
}

/* ---- a device that takes its time ---- */

static void an_asynchronous_device_is_waited_for(void **state)
{
    struct stack s;
    struct shape shape = plain;
    shape.device = "sim";
    stack_open(&s, *state, &shape, "sim_delay_us=300 sim_need_pin=true");
    for (uint64_t i = 0; i < 20; i++) {
        assert_int_equal(run_move(&s, true, 4 * i, 4), 0);
        for (uint64_t k = 0; k < 4; k++)
            assert_true(below_has(&s.below, (ucm_key[]){key_of(4 * i + k)}));
        assert_int_equal(run_move(&s, false, 4 * i, 4), 0);
    }
    stack_close(&s);
}

/* Nothing is copied before the engine's event: the memory is right only when it fires. */
static void events_are_waited_for(void **state)
{
    struct stack s;
    struct shape shape = plain;
    struct move m;
    shape.device = "sim";
    for (int dump = 1; dump >= 0; dump--) {
        struct ucmi_sim_event *event = ucmi_sim_event_new();
        stack_open(&s, *state, &shape, NULL);
        if (!dump)
            assert_int_equal(run_move(&s, true, 0, 3), 0);
        move_new(&m, &s, dump, 0, 3, 0, 4, 0);
        m.x.after = event;
        char *right = malloc(3 * 4096);
        memcpy(right, m.memory, 3 * 4096);
        memset(m.memory, 0xaa, 3 * 4096);
        assert_int_equal(move_submit(&m), 0);
        if (!dump) /* an earlier copy would be seen here */
            assert_int_equal(run_move(&s, true, 100, 20), 0);
        for (size_t i = 0; i < 3 * 4096; i++)
            assert_int_equal((uint8_t)m.memory[i], 0xaa);
        memcpy(m.memory, right, 3 * 4096);
        ucmi_sim_event_fire(event);
        assert_int_equal(move_wait(&m, UCM_RELEASED), 0);
        if (dump)
            assert_int_equal(move_wait(&m, UCM_STORED), 0);
        for (uint64_t i = 0; i < 3; i++)
            assert_true(dump ? below_has(&s.below, (ucm_key[]){key_of(i)}) : move_right(&m, i));
        free(right);
        move_free(&m);
        stack_close(&s);
        ucmi_sim_event_free(event);
    }
}

/* ---- through the API ---- */

static char lines[8192];

static void keep_line(void *arg, enum ucm_level level, const char *line)
{
    strncat(lines, line, sizeof lines - strlen(lines) - 2);
    strcat(lines, "\n");
}

static void works_as_cache_over_empty(void **state)
{
    enum { N = 8, SIZE = 4096 };
    ucm_conf *conf;
    ucm_store *store;
    ucm_map *map;
    ucm_task *task;
    ucm_key keys[N];
    uint32_t blocks[N];
    char *memory = malloc(N * SIZE);
    struct ucm_seg segs[2] = {{memory, SIZE, SIZE / 2}, {memory + SIZE / 2, SIZE, SIZE / 2}};
    struct ucm_map_desc desc = {segs, 2, 1, 1, N};
    struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = N, .group = 1};
    static const char *const options[][2] = {{"store_pipeline", "Cache|Empty"},
                                             {"cache_dir", NULL},
                                             {"cache_buffer_capacity_gb", "0.001"},
                                             {"block_size", "4096"},
                                             {"shard_size", "2048"}};

    lines[0] = '\0';
    assert_int_equal(ucm_conf_new(&conf), 0);
    for (size_t i = 0; i < ARRAY_LEN(options); i++)
        assert_int_equal(ucm_conf_set(conf, options[i][0], options[i][1] ? options[i][1] : *state),
                         0);
    assert_int_equal(ucm_store_open(conf, &store), 0);
    assert_int_equal(ucm_map_new(store, &desc, &map), 0);
    for (uint32_t i = 0; i < N; i++) {
        keys[i] = key_of(i);
        blocks[i] = i;
        for (unsigned k = 0; k < 2; k++)
            paint(memory + i * SIZE + k * SIZE / 2, SIZE / 2, &keys[i], k);
    }
    ucm_log_to(keep_line, NULL, UCM_DEBUG);
    assert_int_equal(ucm_dump(store, map, &batch, &task), 0);
    assert_int_equal(ucm_task_wait(task, UCM_STORED, PATIENCE_MS), 0);
    ucm_task_free(task);
    assert_int_equal(ucm_lookup_prefix(store, keys, N), N);
    memset(memory, 0, N * SIZE);
    assert_int_equal(ucm_load(store, map, &batch, &task), 0);
    assert_int_equal(ucm_task_wait_shard(task, 1, PATIENCE_MS), 0);
    assert_int_equal(ucm_task_wait(task, UCM_RELEASED, PATIENCE_MS), 0);
    for (uint32_t i = 0; i < N; i++)
        for (unsigned k = 0; k < 2; k++)
            assert_true(painted(memory + i * SIZE + k * SIZE / 2, SIZE / 2, &keys[i], k));
    ucm_task_free(task);
    ucm_map_free(map);
    ucm_store_close(store);
    ucm_log_to(NULL, NULL, UCM_ERROR);
    assert_non_null(strstr(lines, "Cache task(1,DUMP,8,32768) dispatching."));
    assert_non_null(strstr(lines, "Cache task(1,DUMP,8,32768) finished, cost "));
    assert_non_null(strstr(lines, "Cache task(2,LOAD,16,32768) dispatching."));
    assert_non_null(strstr(lines, "Cache task(2,LOAD,16,32768) finished, cost "));
    ucm_conf_free(conf);
    free(memory);
}

static void open_errors_reach_the_user(void **state)
{
    ucm_conf *conf;
    ucm_store *store = NULL;
    assert_int_equal(ucm_conf_new(&conf), 0);
    assert_int_equal(ucm_conf_set(conf, "store_pipeline", "Cache|Empty"), 0);
    assert_int_equal(ucm_conf_set(conf, "block_size", "4096"), 0);
    assert_int_equal(ucm_conf_set(conf, "cache_dir", *state), 0);
    assert_int_equal(ucm_conf_set(conf, "cache_buffer_capacity_gb", "1000000"), 0);
    assert_int_equal(ucm_store_open(conf, &store), -ENOSPC);
    assert_non_null(strstr(ucm_conf_error(conf), "cache_buffer_capacity_gb: 1e+06"));
    assert_null(store);
    assert_true(ucm_conf_set(conf, "cache_buffer_capacity_gb", "-1") < 0);
    ucm_conf_free(conf);
    assert_int_equal(count_files(*state), 0);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)
    const struct CMUnitTest tests[] = {
        TEST(what_was_dumped_is_loaded),
        TEST(a_miss_is_read_from_below_and_kept),
        TEST(lookup_asks_below_for_the_rest),
        TEST(groups_stream),
        TEST(two_loads_share_a_read),
        TEST(what_is_there_is_not_read_again),
        TEST(partial_blocks_give_way),
        TEST(partial_blocks_are_left_to_others),
        TEST(a_block_being_dumped_serves_loads),
        TEST(dumping_again_is_harmless),
        TEST(what_below_lost_is_written_again),
        TEST(prefetched_blocks_are_there),
        TEST(an_absent_block_evicts_nothing),
        TEST(a_task_larger_than_the_pool_streams_through),
        TEST(traffic_in_both_directions),
        TEST(layers_in_any_order),
        TEST(blocks_of_one_are_hits_for_the_other),
        TEST(dumps_of_all_leave_a_share_to_loads),
        TEST(private_buffers_are_not_shared),
        TEST(a_block_in_the_making_is_waited_for),
        TEST(an_asynchronous_device_is_waited_for),
        TEST(events_are_waited_for),
        TEST(works_as_cache_over_empty),
        TEST(open_errors_reach_the_user),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

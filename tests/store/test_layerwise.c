/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Blocks that arrive layer by layer: 16 shards of 16 KiB, one task a layer, one to four blocks a
 * task, in order and not, from two threads at once.  Each block is afterwards whole and right, or
 * absent.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "support.h"

enum { SHARDS = 16, SHARD = 16384, PER_TASK = 4, THREADS = 2 };

static struct ts_opts layer_opts(const struct ts_stack *stack)
{
    struct ts_opts o = ts_opts_of(stack);
    ts_opt(&o, "block_size", "%d", SHARDS * SHARD);
    ts_opt(&o, "shard_size", "%d", SHARD);
    ts_opt(&o, "@entries", "%d", PER_TASK);
    if (stack->persists)
        ts_opt(&o, "posix_segment_mb", "32");
    if (strstr(stack->pipeline, "Cache"))
        ts_opt(&o, "cache_buffer_capacity_gb", "0.03125");
    return o;
}

static unsigned rounds(void)
{
    const char *given = getenv("UCM_TEST_ROUNDS");
    return given && *given ? (unsigned)atoi(given) : 1000;
}

struct worker {
    struct ts_rig *rig;
    struct ts_mem mem;
    pthread_t thread;
    pthread_barrier_t *together;
    unsigned no, from, to;
    int how;
    bool evicts; /* a pool alone: a tail may go for another's head at once */
    unsigned loaded, absent;
    uint64_t rnd;
    char wrong[256]; /* asserts are the main thread's */
};

enum { APART, SAME_BLOCKS, HALF_EACH };

/* One task for each layer of the thread's share of them, all under way at once. */
static void dump_share(struct worker *w, uint64_t from, size_t n, char *text)
{
    ucm_key keys[PER_TASK];
    uint32_t blocks[PER_TASK];
    ucm_task *tasks[SHARDS] = {NULL};
    int errs[SHARDS] = {0};

    for (size_t i = 0; i < n; i++) {
        keys[i] = ts_key(from + i);
        ts_mem_blocks(&w->mem, i, &blocks[i]);
        ts_mem_fill(&w->mem, i, &keys[i]);
    }
    for (unsigned s = w->no; s < SHARDS; s += THREADS) {
        struct ucm_batch b = {keys, blocks, NULL, n, s, 1, 0, NULL};
        errs[s] = ucm_dump(w->rig->store, w->mem.map, &b, &tasks[s]);
    }
    memset(text, '.', n);
    text[n] = 0;
    for (unsigned s = w->no; s < SHARDS; s += THREADS) {
        if (!errs[s])
            ucm_task_wait(tasks[s], UCM_STORED, TS_WAIT_MS);
        if (!errs[s] && !ucm_task_done(tasks[s], UCM_STORED))
            ts_die("a dump of one layer hangs");
        for (size_t i = 0; i < n; i++) {
            int err = errs[s] ? errs[s] : ucm_task_status(tasks[s], i);
            if (err)
                text[i] = ts_letter(err);
        }
        if (!errs[s])
            ucm_task_free(tasks[s]);
    }
}

static void one_round(struct worker *w, unsigned round)
{
    size_t n = 1 + round % PER_TASK;
    uint64_t from = (uint64_t)round * PER_TASK + (w->how == APART ? w->no * UINT64_C(1000000) : 0);
    struct ts_op dump = {.dump = true, .from = from, .n = n, .layers = 1};
    struct ts_op load = {.from = from, .n = n, .group = round % 3 ? 0 : 4};
    char text[PER_TASK + 1];

    if (round % 2)
        dump.layers = 2 + ts_below(&w->rnd, 1u << 20);
    if (w->how != APART)
        pthread_barrier_wait(w->together);
    if (w->how == HALF_EACH)
        dump_share(w, from, n, text);
    else
        ts_run(w->rig->store, &w->mem, &dump, text);
    if (strcmp(text, ts_all('.', n)) && !*w->wrong)
        snprintf(w->wrong, sizeof w->wrong, "round %u: dump of %zu: %s", round, n, text);
    ts_run(w->rig->store, &w->mem, &load, text);
    if (strspn(text, w->evicts ? ".-" : ".") != n && !*w->wrong)
        snprintf(w->wrong, sizeof w->wrong, "round %u: load of %zu: %s", round, n, text);
    for (size_t i = 0; i < n; i++)
        text[i] == '.' ? w->loaded++ : w->absent++;
}

static void *work(void *arg)
{
    struct worker *w = arg;
    for (unsigned round = w->from; round < w->to; round++)
        one_round(w, round);
    return NULL;
}

static void run_workers(void **state, int how, unsigned count)
{
    struct ts_opts o = layer_opts(*state);
    struct ts_shape shape = ts_plain(SHARD);
    struct ts_rig rig;
    struct worker w[THREADS] = {0};
    pthread_barrier_t together;
    uint64_t seed = ts_seed();

    if (ts_rig_open(&rig, &o))
        fail_msg("%s", rig.why);
    pthread_barrier_init(&together, NULL, THREADS);
    for (unsigned i = 0; i < THREADS; i++) {
        w[i] = (struct worker){
            .rig = &rig, .together = &together, .no = i, .to = count, .how = how, .rnd = seed + i};
        w[i].evicts = !((const struct ts_stack *)*state)->persists;
        assert_int_equal(ts_mem_new(&w[i].mem, rig.store, SHARD, SHARDS, &shape, PER_TASK), 0);
    }
    for (unsigned i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&w[i].thread, NULL, work, &w[i]), 0);
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(w[i].thread, NULL);
        ts_mem_free(&w[i].mem);
    }
    pthread_barrier_destroy(&together);
    ts_rig_close(&rig);
    for (unsigned i = 0; i < THREADS; i++) {
        if (*w[i].wrong)
            fail_msg("thread %u: %s", i, w[i].wrong);
        assert_true(w[i].absent < w[i].loaded / 2);
    }
}

static void test_threads_apart(void **state)
{
    run_workers(state, APART, rounds() / THREADS);
}

static void test_threads_on_the_same_blocks(void **state)
{
    run_workers(state, SAME_BLOCKS, rounds() / 4);
}

static void test_each_thread_brings_half_the_layers(void **state)
{
    run_workers(state, HALF_EACH, rounds() / 4);
}

/* 15 of 16 layers are no block, for as long as one waits; all 16 are. */
static void test_a_layer_missing(void **state)
{
    struct ts_opts o = layer_opts(*state);
    struct ts_rig r;

    ts_opt(&o, "timeout_ms", "1000");
    assert_int_equal(ts_rig_open(&r, &o), 0);
    struct ts_op op = {.dump = true, .from = 7, .n = 2, .shard = 0, .nshards = SHARDS - 1};
    ts_run(r.store, &r.mem, &op, r.text);
    assert_null(strchr(r.text, '.')); /* STORED was never true of it */
    assert_string_equal(ts_rig_lookup(&r, 7, 2), "00");
    assert_string_equal(ts_rig_dump(&r, 7, 2), "..");
    assert_string_equal(ts_rig_load(&r, 7, 2), "..");
    ts_rig_close(&r);
    if (((const struct ts_stack *)*state)->persists) {
        assert_int_equal(ts_rig_open(&r, &o), 0);
        assert_string_equal(ts_rig_load(&r, 7, 2), "..");
        ts_rig_close(&r);
    }
}

/* A process that goes away with 15 of 16 layers leaves no block, nor what the next one stumbles
 * over. */
static void test_killed_before_the_last_layer(void **state)
{
    struct ts_opts o = layer_opts(*state);
    struct ts_agent a, b;

    ts_opt(&o, "timeout_ms", "2000");
    ts_agent_start(&b, NULL, &o);
    assert_string_equal(ts_agent_reply(&b), "open");
    for (unsigned i = 0; i < 5; i++) {
        ts_agent_start(&a, NULL, &o);
        assert_string_equal(ts_agent_reply(&a), "open");
        assert_string_equal(ts_agent_ask(&a, "dump %u 2", 1000 + i * 2), "..");
        assert_string_equal(ts_agent_ask(&a, "part %u 2 %u", i * 2, i * 3), "..");
        ts_agent_kill(&a, SIGKILL);
        assert_string_equal(ts_agent_ask(&b, "lookup %u 2", i * 2), "00");
        assert_string_equal(ts_agent_ask(&b, "layers %u 2 %u", i * 2, i), "..");
        assert_string_equal(ts_agent_ask(&b, "load %u 2", i * 2), "..");
    }
    assert_string_equal(ts_agent_ask(&b, "load 1000 4"), "....");
    assert_int_equal(ts_agent_stop(&b), 0);
}

int main(void)
{
    static const struct ts_case cases[] = {
        {"threads apart", test_threads_apart, .needs_keep = true},
        {"threads on the same blocks", test_threads_on_the_same_blocks, .needs_keep = true},
        {"each thread brings half", test_each_thread_brings_half_the_layers, .needs_keep = true},
        {"a layer missing", test_a_layer_missing, .needs_keep = true},
        {"killed before the last layer", test_killed_before_the_last_layer, .needs_persist = true},
    };
    return ts_run_cases("layerwise", cases, TS_LEN(cases));
}

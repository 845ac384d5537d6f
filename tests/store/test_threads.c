/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One store, eight threads: dumps, loads, lookups, cancels and frees of the same keys at once, and
 * a close with work under way.  What ThreadSanitizer is run on.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "support.h"

enum { THREADS = 8, SHARDS = 16, SHARD = 4096, ENTRIES = 6, KEYS = 120 };

struct worker {
    struct ts_rig *rig;
    struct ts_mem mem;
    pthread_t thread;
    uint64_t rnd, until;
    _Atomic bool *tried; /* KEYS of them: somebody began to dump it */
    char wrong[256];
};

static void check_letters(struct worker *w, const struct ts_op *op, const char *text)
{
    for (size_t i = 0; i < op->n; i++) {
        bool ok = text[i] == '.' || text[i] == 'a' || (op->dump ? text[i] == 'f' : text[i] == '-');
        if (!op->dump && text[i] == '.' && !atomic_load(&w->tried[op->from + i]))
            ok = false;
        if (!ok && !*w->wrong)
            snprintf(w->wrong, sizeof w->wrong, "%s of %zu from %llu: %s",
                     op->dump ? "dump" : "load", op->n, (unsigned long long)op->from, text);
    }
}

/* A task whose outcome nobody asks for: it is canceled, and freed when the memory is ours again. */
static void begin_and_drop(struct worker *w, const struct ts_op *op)
{
    ucm_key keys[ENTRIES];
    uint32_t blocks[ENTRIES];
    struct ucm_batch b = {.keys = keys, .blocks = blocks, .n = op->n};
    ucm_task *task;

    for (size_t i = 0; i < op->n; i++) {
        keys[i] = ts_key(op->from + i);
        ts_mem_blocks(&w->mem, i, &blocks[i]);
        if (op->dump)
            ts_mem_fill(&w->mem, i, &keys[i]);
    }
    if (op->dump ? ucm_dump(w->rig->store, w->mem.map, &b, &task)
                 : ucm_load(w->rig->store, w->mem.map, &b, &task))
        return;
    if (ts_below(&w->rnd, 2))
        ucm_task_cancel(task);
    ucm_task_wait(task, UCM_RELEASED, TS_WAIT_MS);
    if (!ucm_task_done(task, UCM_RELEASED))
        ts_die("a task hangs");
    ucm_task_free(task);
}

static void look(struct worker *w, uint64_t from, size_t n)
{
    char found[ENTRIES + 1];
    ucm_key keys[ENTRIES];

    for (size_t i = 0; i < n; i++)
        keys[i] = ts_key(from + i);
    ssize_t hits = ucm_lookup_prefix(w->rig->store, keys, n);
    ts_lookup(w->rig->store, from, n, found);
    for (size_t i = 0; i < n; i++)
        if ((found[i] != '0' || (ssize_t)i < hits) && !atomic_load(&w->tried[from + i]) &&
            !*w->wrong)
            snprintf(w->wrong, sizeof w->wrong, "found a key nobody dumped: %s", found);
    ucm_prefetch(w->rig->store, keys, n);
}

static void *work(void *arg)
{
    struct worker *w = arg;
    char text[ENTRIES + 1];

    while (ts_now_ms() < w->until && !*w->wrong) {
        struct ts_op op = {.n = 1 + ts_below(&w->rnd, ENTRIES)};
        unsigned what = (unsigned)ts_below(&w->rnd, 10);
        op.from = ts_below(&w->rnd, KEYS - op.n);
        op.dump = what < 4;
        op.layers = what == 3 ? 1 + ts_below(&w->rnd, 100) : 0;
        op.group = what == 5 ? 1 + (unsigned)ts_below(&w->rnd, SHARDS) : 0;
        for (size_t i = 0; op.dump && i < op.n; i++)
            atomic_store(&w->tried[op.from + i], true);
        if (what == 0 || what == 6) {
            begin_and_drop(w, &op);
        } else if (what < 8) {
            ts_run(w->rig->store, &w->mem, &op, text);
            check_letters(w, &op, text);
        } else {
            look(w, op.from, op.n);
        }
    }
    return NULL;
}

static void run_threads(void **state, bool small)
{
    const struct ts_stack *stack = *state;
    struct ts_opts o = ts_opts_of(stack);
    struct ts_shape shape = ts_plain(SHARD);
    static _Atomic bool tried[KEYS];
    static struct worker w[THREADS];
    struct ts_rig rig;
    uint64_t seed = ts_seed(), until;

    if (small && stack->persists)
        ts_opt(&o, "posix_capacity_gb", "%.9f", 3.0 / 1024); /* 45 of 120 blocks */
    if (ts_rig_open(&rig, &o))
        fail_msg("%s", rig.why);
    until = ts_now_ms() + (uint64_t)(ts_seconds(12) * 1000 / 6);
    for (unsigned i = 0; i < KEYS; i++)
        atomic_init(&tried[i], false);
    for (unsigned i = 0; i < THREADS; i++) {
        w[i] = (struct worker){.rig = &rig, .rnd = seed + i, .until = until, .tried = tried};
        assert_int_equal(ts_mem_new(&w[i].mem, rig.store, SHARD, SHARDS, &shape, ENTRIES), 0);
        assert_int_equal(pthread_create(&w[i].thread, NULL, work, &w[i]), 0);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(w[i].thread, NULL);
        ts_mem_free(&w[i].mem);
    }
    ts_rig_close(&rig);
    for (unsigned i = 0; i < THREADS; i++)
        if (*w[i].wrong)
            fail_msg("thread %u: %s", i, w[i].wrong);
}

static void test_threads(void **state)
{
    run_threads(state, false);
}

static void test_threads_and_evictions(void **state)
{
    run_threads(state, true);
}

/* Loads end canceled or done, dumps are finished; nothing hangs and nothing is used after it is
 * gone (that is for the sanitizers to see). */
static void test_close_with_work_under_way(void **state)
{
    const struct ts_stack *stack = *state;
    struct ts_opts o = ts_opts_of(stack);

    ts_opt(&o, "@entries", "%d", 32);
    for (unsigned round = 0; round < 10; round++) {
        struct ts_rig r;
        ucm_key keys[32];
        uint32_t blocks[32];
        assert_int_equal(ts_rig_open(&r, &o), 0);
        for (uint32_t i = 0; i < 32; i++) {
            keys[i] = ts_key(round * 32 + i);
            ts_mem_blocks(&r.mem, i, &blocks[i]);
            ts_mem_fill(&r.mem, i, &keys[i]);
        }
        for (unsigned i = 0; i < 8; i++) { /* dumps of half the memory, loads into the other */
            struct ucm_batch b = {.n = 16};
            ucm_task *task;
            b.keys = keys;
            b.blocks = i % 2 ? blocks + 16 : blocks;
            int err = i % 2 ? ucm_load(r.store, r.mem.map, &b, &task)
                            : ucm_dump(r.store, r.mem.map, &b, &task);
            assert_true(!err || err == -EAGAIN);
            ucm_task_free(err ? NULL : task);
        }
        ts_rig_close(&r);
        if (stack->persists) {
            assert_int_equal(ts_rig_open(&r, &o), 0);
            assert_string_equal(ts_rig_load(&r, round * 32, 16), ts_all('.', 16));
            ts_rig_close(&r);
        }
    }
}

int main(void)
{
    static const struct ts_case cases[] = {
        {"threads", test_threads, .needs_keep = true},
        {"threads and evictions", test_threads_and_evictions, .needs_keep = true},
        {"close with work under way", test_close_with_work_under_way},
    };
    return ts_run_cases("threads", cases, TS_LEN(cases));
}

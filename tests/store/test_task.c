/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a task promises: stages, notification exactly once, status per entry, groups in order, waits
 * with an end, cancel and free at any time.
 */
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "dev/dev.h" /* the simulated device's event: the only way to hold a task for sure */
#include "support.h"

enum { SHARDS = 16, SHARD = 4096, N = 8 };

static struct ts_rig rig_of(void **state)
{
    struct ts_opts o = ts_opts_of(*state);
    return ts_rig_sure(&o);
}

/* ---- tasks ---- */

struct once {
    pthread_mutex_t lock;
    pthread_cond_t change;
    int calls, err;
};
#define ONCE                                                                                       \
    (struct once)                                                                                  \
    {                                                                                              \
        PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 1                                  \
    }

static void note(void *arg, int err)
{
    struct once *o = arg;
    pthread_mutex_lock(&o->lock);
    o->calls++;
    o->err = err;
    pthread_cond_signal(&o->change);
    pthread_mutex_unlock(&o->lock);
}

static void await_once(struct once *o)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += TS_WAIT_MS / 1000;
    pthread_mutex_lock(&o->lock);
    int late = 0;
    while (!o->calls && !late)
        late = pthread_cond_timedwait(&o->change, &o->lock, &until);
    pthread_mutex_unlock(&o->lock);
    assert_int_equal(late, 0);
}

enum what { LOAD, DUMP, DUMP_UNFILLED };

static ucm_task *begin(struct ts_rig *r, enum what what, uint64_t from, size_t n, void *after)
{
    ucm_key keys[TS_MAX_ENTRIES];
    uint32_t blocks[TS_MAX_ENTRIES];
    struct ucm_batch b = {.keys = keys, .blocks = blocks, .n = n, .after = after};
    ucm_task *task = NULL;

    for (size_t i = 0; i < n; i++) {
        keys[i] = ts_key(from + i);
        ts_mem_blocks(&r->mem, i, &blocks[i]);
        if (what == DUMP)
            ts_mem_fill(&r->mem, i, &keys[i]);
    }
    int err = what == LOAD ? ucm_load(r->store, r->mem.map, &b, &task)
                           : ucm_dump(r->store, r->mem.map, &b, &task);
    assert_int_equal(err, 0);
    memset(keys, 0x77, sizeof keys); /* ucm.h: used only during the call */
    memset(blocks, 0x77, sizeof blocks);
    return task;
}

static void test_nothing_is_done_at_once(void **state)
{
    struct ts_rig r = rig_of(state);
    struct ucm_batch b = {0};

    for (int dump = 0; dump < 2; dump++) {
        struct once o = ONCE;
        ucm_task *t;
        assert_int_equal(
            dump ? ucm_dump(r.store, r.mem.map, &b, &t) : ucm_load(r.store, r.mem.map, &b, &t), 0);
        assert_int_equal(ucm_task_done(t, UCM_RELEASED), 1);
        assert_int_equal(ucm_task_done(t, UCM_STORED), 1);
        assert_int_equal(ucm_task_wait(t, UCM_STORED, 0), 0);
        assert_int_equal(ucm_task_wait_shard(t, 0, 0), 0);
        assert_int_equal(ucm_task_status(t, 0), -EINVAL);
        assert_int_equal(ucm_task_notify(t, UCM_STORED, note, &o), 0);
        assert_int_equal(o.calls, 1);
        assert_int_equal(o.err, 0);
        ucm_task_free(t);
    }
    ts_rig_close(&r);
}

static void test_task_arguments(void **state)
{
    struct ts_rig r = rig_of(state);
    ucm_task *t = begin(&r, DUMP, 0, N, NULL);
    struct once o = ONCE;

    assert_int_equal(ucm_task_wait(t, (enum ucm_stage)7, 0), -EINVAL);
    assert_int_equal(ucm_task_done(t, (enum ucm_stage)7), 0);
    assert_int_equal(ucm_task_ns(t, (enum ucm_stage)7), -EINPROGRESS);
    assert_int_equal(ucm_task_notify(t, (enum ucm_stage)7, note, &o), -EINVAL);
    assert_int_equal(ucm_task_notify(t, UCM_STORED, NULL, NULL), -EINVAL);
    assert_int_equal(ucm_task_status(t, N), -EINVAL);
    assert_int_equal(ucm_task_status(t, SIZE_MAX), -EINVAL);
    assert_int_equal(ucm_task_wait(t, UCM_STORED, TS_WAIT_MS), 0);
    assert_int_equal(ucm_task_done(t, UCM_RELEASED), 1); /* STORED includes it */
    assert_int_equal(ucm_task_wait_shard(t, SHARDS, 0), -EINVAL);
    assert_int_equal(ucm_task_wait_shard(t, UINT_MAX, 0), -EINVAL);
    ucm_task_free(t);
    assert_int_equal(o.calls, 0);
    ts_rig_close(&r);
}

static void test_notified_once_a_stage(void **state)
{
    struct ts_rig r = rig_of(state);

    for (int round = 0; round < 50; round++) {
        struct once released = ONCE, stored = ONCE, late = ONCE;
        ucm_task *t = begin(&r, DUMP, (uint64_t)round * N, N, NULL);
        assert_int_equal(ucm_task_notify(t, UCM_RELEASED, note, &released), 0);
        assert_int_equal(ucm_task_notify(t, UCM_STORED, note, &stored), 0);
        await_once(&stored);
        await_once(&released);
        assert_int_equal(ucm_task_wait(t, UCM_STORED, TS_WAIT_MS), 0);
        assert_int_equal(ucm_task_notify(t, UCM_STORED, note, &late), 0); /* at once */
        assert_int_equal(late.calls, 1);
        ucm_task_free(t);
        assert_int_equal(released.calls + stored.calls, 2);
        assert_int_equal(released.err, 0);
        assert_int_equal(stored.err, 0);
    }
    ts_rig_close(&r);
}

static void test_a_miss_is_notified_with_its_error(void **state)
{
    struct ts_rig r = rig_of(state);
    struct once o = ONCE;
    ucm_task *t = begin(&r, LOAD, 1000, N, NULL);

    assert_int_equal(ucm_task_notify(t, UCM_RELEASED, note, &o), 0);
    await_once(&o);
    assert_int_equal(o.err, -ENOENT);
    assert_int_equal(ucm_task_wait(t, UCM_RELEASED, TS_WAIT_MS), -ENOENT);
    for (size_t i = 0; i < N; i++)
        assert_int_equal(ucm_task_status(t, i), -ENOENT);
    ucm_task_free(t);
    assert_int_equal(o.calls, 1);
    ts_rig_close(&r);
}

static void test_status_is_per_entry(void **state)
{
    struct ts_rig r = rig_of(state);

    assert_string_equal(ts_rig_dump(&r, 2, 3), "...");
    assert_string_equal(ts_rig_dump(&r, 6, 1), ".");
    assert_string_equal(ts_rig_load(&r, 0, N), "--...-.-");
    assert_int_equal(ts_metric(r.store, "load_failed_total"), 4);
    assert_int_equal(ts_metric(r.store, "load_bytes_total"), 4 * SHARDS * SHARD);
    ts_rig_close(&r);
}

static void test_the_same_key_twice_in_a_batch(void **state)
{
    struct ts_rig r = rig_of(state);
    ucm_key keys[6];
    uint32_t blocks[6];
    struct ucm_batch b = {.keys = keys, .blocks = blocks, .n = 6};

    for (int round = 0; round < 20; round++) {
        for (int dump = 1; dump >= 0; dump--) {
            ucm_task *t;
            ts_mem_wipe(&r.mem);
            for (size_t i = 0; i < 6; i++) {
                keys[i] = ts_key((uint64_t)round * 2 + i % 2);
                ts_mem_blocks(&r.mem, i, &blocks[i]);
                if (dump)
                    ts_mem_fill(&r.mem, i, &keys[i]);
            }
            assert_int_equal(dump ? ucm_dump(r.store, r.mem.map, &b, &t)
                                  : ucm_load(r.store, r.mem.map, &b, &t),
                             0);
            assert_int_equal(ucm_task_wait(t, UCM_STORED, TS_WAIT_MS), 0);
            for (size_t i = 0; i < 6; i++) {
                assert_int_equal(ucm_task_status(t, i), 0);
                assert_true(ts_mem_right(&r.mem, i, &keys[i], 0, SHARDS));
            }
            ucm_task_free(t);
        }
    }
    ts_rig_close(&r);
}

static void test_groups_come_in_order(void **state)
{
    static const unsigned groups[] = {0, 1, 3, 5, SHARDS - 1, SHARDS, 1000};
    struct ts_rig r = rig_of(state);

    ts_rig_dump(&r, 0, N);
    for (size_t g = 0; g < TS_LEN(groups); g++) {
        for (unsigned first = 0; first < SHARDS; first += 7) {
            ucm_key keys[N];
            uint32_t blocks[N];
            struct ucm_batch b = {keys, blocks, NULL, N, first, 0, groups[g], NULL};
            ucm_task *t;
            ts_mem_wipe(&r.mem);
            for (size_t i = 0; i < N; i++) {
                keys[i] = ts_key(i);
                ts_mem_blocks(&r.mem, i, &blocks[i]);
            }
            assert_int_equal(ucm_load(r.store, r.mem.map, &b, &t), 0);
            for (unsigned s = first; s < SHARDS; s++) {
                assert_int_equal(ucm_task_wait_shard(t, s, TS_WAIT_MS), 0);
                for (size_t i = 0; i < N; i++)
                    assert_true(ts_mem_right(&r.mem, i, &keys[i], s, 1));
            }
            if (first)
                assert_int_equal(ucm_task_wait_shard(t, first - 1, 0), -EINVAL);
            assert_int_equal(ucm_task_wait(t, UCM_RELEASED, TS_WAIT_MS), 0);
            ucm_task_free(t);
        }
    }
    ts_rig_close(&r);
}

static void test_a_missing_block_does_not_hold_wait_shard(void **state)
{
    struct ts_rig r = rig_of(state);
    ucm_task *t = begin(&r, LOAD, 5000, N, NULL);

    for (unsigned s = 0; s < SHARDS; s++)
        assert_int_equal(ucm_task_wait_shard(t, s, TS_WAIT_MS), -ENOENT);
    ucm_task_free(t);
    ts_rig_close(&r);
}

static void test_cancel_ends_a_task(void **state)
{
    struct ts_rig r = rig_of(state);
    const struct ts_stack *stack = *state;

    for (int round = 0; round < 30; round++) {
        uint64_t from = (uint64_t)round * N;
        ucm_task *t = begin(&r, round % 2 ? DUMP : LOAD, from, N, NULL);
        ucm_task_cancel(t);
        ucm_task_cancel(t);
        int err = ucm_task_wait(t, UCM_STORED, TS_WAIT_MS);
        assert_true(err == 0 || err == -ECANCELED || err == -ENOENT);
        assert_int_equal(ucm_task_done(t, UCM_STORED), 1);
        for (size_t i = 0; i < N; i++) {
            int st = ucm_task_status(t, i);
            assert_true(st == 0 || st == -ECANCELED || (st == -ENOENT && round % 2 == 0));
        }
        ucm_task_free(t);
        if (!stack->keeps || round % 2 == 0)
            continue;
        const char *text = ts_rig_load(&r, from, N); /* whole and right, or absent */
        assert_int_equal(strspn(text, ".-"), N);
    }
    ts_rig_close(&r);
}

static void test_a_dump_outlives_its_task(void **state)
{
    enum { MANY = 96 }; /* more than are under way at a time */
    struct ts_opts o = ts_opts_of(*state);
    ts_opt(&o, "@entries", "%d", MANY);
    struct ts_rig r = ts_rig_sure(&o), other = ts_rig_sure(&o); /* keeps a pool alive */

    ucm_task_free(begin(&r, DUMP, 0, MANY, NULL));
    ts_rig_close(&r); /* finishes the dump */
    assert_string_equal(ts_rig_load(&other, 0, MANY), ts_all('.', MANY));
    ts_rig_close(&other);
}

static void test_a_load_may_be_freed_under_way(void **state)
{
    struct ts_rig r = rig_of(state);

    ts_rig_dump(&r, 0, N);
    for (int round = 0; round < 30; round++)
        ucm_task_free(begin(&r, LOAD, 0, N, NULL));
    ts_rig_close(&r); /* the memory goes last */
}

/* A queue that is full says so at once; what it took is done, what it refused is not. */
static void test_a_full_queue_refuses(void **state)
{
    enum { MANY = 64 };
    struct ts_opts o = ts_opts_of(*state);
    ucm_task *tasks[MANY] = {NULL};
    size_t refused = 0;

    ts_opt(&o, "waiting_queue_depth", "1");
    ts_opt(&o, "@entries", "%d", MANY);
    struct ts_rig r = ts_rig_sure(&o);
    for (uint32_t i = 0; i < MANY; i++) {
        ucm_key key = ts_key(i);
        uint32_t block;
        ts_mem_blocks(&r.mem, i, &block);
        ts_mem_fill(&r.mem, i, &key);
        struct ucm_batch b = {.keys = &key, .blocks = &block, .n = 1};
        int err = ucm_dump(r.store, r.mem.map, &b, &tasks[i]);
        assert_true(err == 0 || err == -EAGAIN);
        refused += err != 0;
    }
    assert_true(refused < MANY);
    for (size_t i = 0; i < MANY; i++)
        assert_int_equal(tasks[i] ? ucm_task_wait(tasks[i], UCM_STORED, TS_WAIT_MS) : 0, 0);
    assert_int_equal(ts_metric(r.store, "tasks_refused_total"), refused);
    ts_rig_load(&r, 0, MANY);
    for (size_t i = 0; i < MANY; i++) {
        assert_int_equal(r.text[i], tasks[i] ? '.' : '-');
        ucm_task_free(tasks[i]);
    }
    assert_string_equal(ts_rig_dump(&r, 0, MANY), ts_all('.', MANY)); /* one task */
    ts_rig_close(&r);
}

/* The simulated device holds a dump for as long as the test likes. */
static struct ts_rig sim_rig(void **state)
{
    struct ts_opts o = ts_opts_of(*state);
    ts_opt(&o, "device", "sim");
    return ts_rig_sure(&o);
}

static void test_waits_end_in_time(void **state)
{
    struct ts_rig r = sim_rig(state);
    struct ucmi_sim_event *event = ucmi_sim_event_new();
    struct once o = ONCE;
    ucm_task *t = begin(&r, DUMP, 0, N, event);

    assert_int_equal(ucm_task_notify(t, UCM_STORED, note, &o), 0);
    assert_int_equal(ucm_task_wait(t, UCM_RELEASED, 0), -ETIMEDOUT);
    assert_int_equal(ucm_task_wait(t, UCM_STORED, 5), -ETIMEDOUT);
    assert_int_equal(ucm_task_wait_shard(t, 0, 5), -ETIMEDOUT);
    assert_int_equal(ucm_task_done(t, UCM_RELEASED), 0);
    assert_int_equal(ucm_task_done(t, UCM_STORED), 0);
    assert_int_equal(ucm_task_ns(t, UCM_RELEASED), -EINPROGRESS);
    for (size_t i = 0; i < N; i++)
        assert_int_equal(ucm_task_status(t, i), -EINPROGRESS);
    assert_int_equal(o.calls, 0);
    ucmi_sim_event_fire(event);
    assert_int_equal(ucm_task_wait(t, UCM_STORED, -1), 0);
    assert_true(ucm_task_ns(t, UCM_RELEASED) > 0);
    assert_true(ucm_task_ns(t, UCM_STORED) >= ucm_task_ns(t, UCM_RELEASED));
    await_once(&o);
    ucm_task_free(t);
    ucmi_sim_event_free(event);
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
}

/* What the engine computes after the call, and before the event, is what must be stored. */
static void test_a_dump_waits_for_its_event(void **state)
{
    struct ts_rig r = sim_rig(state);
    struct ucmi_sim_event *event = ucmi_sim_event_new();
    ucm_task *t;

    ts_mem_wipe(&r.mem);
    t = begin(&r, DUMP_UNFILLED, 0, N, event);
    assert_int_equal(ucm_task_wait(t, UCM_RELEASED, 20), -ETIMEDOUT);
    for (size_t i = 0; i < N; i++) {
        ucm_key key = ts_key(i);
        ts_mem_fill(&r.mem, i, &key);
    }
    assert_string_equal(ts_rig_lookup(&r, 0, N) + N, ""); /* whatever it finds, it does not hang */
    ucmi_sim_event_fire(event);
    assert_int_equal(ucm_task_wait(t, UCM_STORED, TS_WAIT_MS), 0);
    ucm_task_free(t);
    ucmi_sim_event_free(event);
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
}

static void test_a_queue_held_by_the_device_refuses(void **state)
{
    struct ts_opts o = ts_opts_of(*state);
    struct ucmi_sim_event *event = ucmi_sim_event_new();

    ts_opt(&o, "device", "sim");
    ts_opt(&o, "waiting_queue_depth", "1");
    struct ts_rig r = ts_rig_sure(&o);
    ucm_task *t = begin(&r, DUMP, 0, N, event), *none = NULL;
    ucm_key key = ts_key(99);
    uint32_t block = 0;
    struct ucm_batch b = {.keys = &key, .blocks = &block, .n = 1};

    assert_int_equal(ucm_dump(r.store, r.mem.map, &b, &none), -EAGAIN);
    assert_null(none);
    ucmi_sim_event_fire(event);
    assert_int_equal(ucm_task_wait(t, UCM_STORED, TS_WAIT_MS), 0);
    ucm_task_free(t);
    ucmi_sim_event_free(event);
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
}

static void test_cancel_while_the_device_is_busy(void **state)
{
    struct ts_rig r = sim_rig(state);
    struct ucmi_sim_event *event = ucmi_sim_event_new();
    ucm_task *t = begin(&r, DUMP, 0, N, event);

    ucm_task_cancel(t);
    ucmi_sim_event_fire(event);
    ucm_task_wait(t, UCM_STORED, TS_WAIT_MS);
    assert_int_equal(ucm_task_done(t, UCM_STORED), 1);
    ucm_task_free(t);
    ucmi_sim_event_free(event);
    const char *text = ts_rig_load(&r, 0, N);
    assert_int_equal(strspn(text, ".-"), N);
    ts_rig_close(&r);
}

int main(void)
{
    static const struct ts_case cases[] = {
        {"nothing is done at once", test_nothing_is_done_at_once},
        {"task arguments", test_task_arguments},
        {"notified once a stage", test_notified_once_a_stage},
        {"a miss is notified with its error", test_a_miss_is_notified_with_its_error},
        {"status is per entry", test_status_is_per_entry, .needs_keep = true},
        {"the same key twice", test_the_same_key_twice_in_a_batch, .needs_keep = true},
        {"groups come in order", test_groups_come_in_order, .needs_keep = true},
        {"wait_shard on misses", test_a_missing_block_does_not_hold_wait_shard},
        {"cancel ends a task", test_cancel_ends_a_task},
        {"a dump outlives its task", test_a_dump_outlives_its_task, .needs_keep = true},
        {"a load may be freed", test_a_load_may_be_freed_under_way},
        {"a full queue refuses", test_a_full_queue_refuses, .needs_keep = true},
        {"a queue held by the device", test_a_queue_held_by_the_device_refuses,
         .needs_cache = true},
        {"waits end in time", test_waits_end_in_time, .needs_cache = true},
        {"a dump waits for its event", test_a_dump_waits_for_its_event, .needs_cache = true},
        {"cancel while busy", test_cancel_while_the_device_is_busy, .needs_cache = true},
    };
    return ts_run_cases("task", cases, TS_LEN(cases));
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whole stacks over each device: what only a device that works on its own can get wrong.  Copies
 * that come late, or never; events; memory that is given back too early; a device that fails.
 *
 * A fake ends the program when it sees something that no program may do (../fake/fake.h), so a test
 * that only goes on to its end has shown much.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "opencl.h"
#include "support.h"

enum {
    N = 8,
    COPIES = N * 16
}; /* of a task, in the shape that stacks have unless a test says so */
#define FREE_STREAM "StreamDestroy|StreamDestroy_v2|DestroyStream"
#define WAIT_EVENT  "StreamWaitEvent"

struct stack {
    const char *pipeline, *engine;
};
static const struct stack stacks[] = {
    {"Cache|Posix", "psync"},
    {"Cache|Posix", "aio"},
    {"Cache|Posix", "io_uring"},
    {"Cache|Empty", NULL},
};

struct scene { /* what a test is given */
    const struct ts_device *device;
    const struct fake *fake; /* or NULL */
    const struct stack *stack;
    struct ts_opts o;
};

static struct scene scene_of(void **state, const char *dir)
{
    struct scene s = *(const struct scene *)*state;
    s.o = ts_opts_for(s.stack->pipeline, dir);
    ts_opt(&s.o, "device", "%s", s.device->name);
    ts_opt(&s.o, "device_id", "%d", s.device->id);
    if (s.stack->engine)
        ts_opt(&s.o, "posix_io_engine", "%s", s.stack->engine);
    if (s.fake) {
        s.fake->fake_reset();
        s.fake->fake_strict(1);
    }
    return s;
}

/* As it was before; and nothing of the vendor's library was kept. */
static void end_scene(struct scene *s)
{
    if (!s->fake)
        return;
    s->fake->fake_strict(0);
    assert_int_equal(s->fake->fake_leaks(), 0);
}

/* N keys from that one on, in the memory of the entries from `at` on. */
static ucm_task *begin(struct ts_rig *r, bool dump, uint64_t from, size_t at, void *after)
{
    ucm_key keys[N];
    uint32_t blocks[N];
    ucm_task *task = NULL;
    struct ucm_batch b = {.keys = keys, .blocks = blocks, .n = N, .after = after};
    for (size_t i = 0; i < N; i++) {
        keys[i] = ts_key(from + i);
        ts_mem_blocks(&r->mem, at + i, &blocks[i]);
    }
    int err = dump ? ucm_dump(r->store, r->mem.map, &b, &task)
                   : ucm_load(r->store, r->mem.map, &b, &task);
    if (err)
        fail_msg("not taken: %d", err);
    return task;
}

static void finish(ucm_task *task, char *text)
{
    ucm_task_wait(task, UCM_STORED, TS_WAIT_MS);
    if (!ucm_task_done(task, UCM_STORED))
        ts_die("a task hangs");
    for (size_t i = 0; i < N; i++)
        text[i] = ts_letter(ucm_task_status(task, i));
    text[N] = 0;
    ucm_task_free(task);
}

static void fill(struct ts_rig *r, uint64_t from)
{
    for (size_t i = 0; i < N; i++) {
        ucm_key key = ts_key(from + i);
        ts_mem_fill(&r->mem, i, &key);
    }
}

/* ---- */

static void what_goes_in_comes_out(void **state)
{
    const char *dir = ts_dir();
    struct scene s = scene_of(state, dir);
    struct ts_rig r = ts_rig_sure(&s.o);
    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
    if (s.stack->engine) {
        r = ts_rig_sure(&s.o);
        assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
        ts_rig_close(&r);
    }
    if (s.fake) {
        assert_true(s.fake->fake_count("copies") > 0);
        assert_int_equal(s.fake->fake_count("unregistered"), 0);
    }
    end_scene(&s);
}

/* The engine is still writing its blocks when it asks for their dump. */
static void a_dump_waits_for_the_engine(void **state)
{
    struct scene s = scene_of(state, ts_dir());
    struct ts_rig r = ts_rig_sure(&s.o);
    void *event = ts_event_new(s.device);
    char text[N + 1];
    ts_mem_wipe(&r.mem);
    ucm_task *task = begin(&r, true, 0, 0, event);
    ts_event_await(s.device, event, 1, COPIES);
    assert_int_equal(ucm_task_done(task, UCM_RELEASED), 0);
    fill(&r, 0);
    ts_event_fire(s.device, event);
    finish(task, text);
    ts_event_free(s.device, event);
    assert_string_equal(text, ts_all('.', N));
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
    end_scene(&s);
}

/* Or still reads what was in the memory that a load is to fill. */
static void a_load_waits_for_the_engine(void **state)
{
    struct scene s = scene_of(state, ts_dir());
    struct ts_rig r = ts_rig_sure(&s.o);
    void *event = ts_event_new(s.device);
    char text[N + 1];
    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    fill(&r, 100); /* other content */
    unsigned long before = s.fake ? s.fake->fake_count("copies") : 0;
    ucm_task *task = begin(&r, false, 0, 0, event);
    ts_event_await(s.device, event, 1, before + COPIES);
    for (size_t i = 0; i < N; i++) {
        ucm_key key = ts_key(100 + i);
        assert_true(ts_mem_right(&r.mem, i, &key, 0, r.mem.nshards));
    }
    ts_event_fire(s.device, event);
    finish(task, text);
    ts_event_free(s.device, event);
    assert_string_equal(text, ts_all('.', N));
    for (size_t i = 0; i < N; i++) {
        ucm_key key = ts_key(i);
        assert_true(ts_mem_right(&r.mem, i, &key, 0, r.mem.nshards));
    }
    ts_rig_close(&r);
    end_scene(&s);
}

/* Tasks that are canceled and given up while their copies are queued: slots and memory are not used
 * for anything else before those have ended. */
static void canceled_under_way(void **state)
{
    struct scene s = scene_of(state, ts_dir());
    struct ts_rig r = ts_rig_sure(&s.o);
    void *event = ts_event_new(s.device);
    char text[2][N + 1];
    ucm_task *tasks[2];
    assert_string_equal(ts_rig_dump(&r, 50, N), ts_all('.', N));
    unsigned long before = s.fake ? s.fake->fake_count("copies") : 0;
    fill(&r, 0);
    tasks[0] = begin(&r, true, 0, 0, event);
    ts_event_await(s.device, event, 1, before + COPIES);
    ucm_task_cancel(tasks[0]);
    tasks[1] = begin(&r, false, 50, N, event);
    ts_event_await(s.device, event, 2, before + 2 * COPIES);
    ucm_task_cancel(tasks[1]);
    ts_event_fire(s.device, event);
    for (int i = 0; i < 2; i++) {
        finish(tasks[i], text[i]);
        assert_int_equal(strspn(text[i], ".c"), N);
    }
    ts_event_free(s.device, event);
    assert_string_equal(ts_rig_load(&r, 50, N), ts_all('.', N));
    ts_rig_close(&r);
    end_scene(&s);
}

static void *close_rig(void *arg)
{
    ucm_store_close(((struct ts_rig *)arg)->store);
    return NULL;
}

/* A dump that nobody waits for, its copies not begun. */
static void closed_with_work_under_way(void **state)
{
    struct scene s = scene_of(state, ts_dir());
    struct ts_rig r = ts_rig_sure(&s.o);
    void *event = ts_event_new(s.device);
    pthread_t closer;
    fill(&r, 0);
    ucm_task *task = begin(&r, true, 0, 0, event);
    ts_event_await(s.device, event, 1, COPIES);
    ucm_task_free(task);
    ucm_map_free(r.mem.map);
    r.mem.map = NULL;
    assert_int_equal(pthread_create(&closer, NULL, close_rig, &r), 0);
    if (s.fake)
        s.fake->fake_await(FREE_STREAM, 1); /* that of loads, which end at once */
    ts_event_fire(s.device, event);
    pthread_join(closer, NULL);
    r.store = NULL;
    ts_rig_close(&r);
    ts_event_free(s.device, event);
    if (s.stack->engine) { /* and it was finished */
        r = ts_rig_sure(&s.o);
        assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
        ts_rig_close(&r);
    }
    end_scene(&s);
}

/* A close that is not over by then hangs. */
static void close_in_time(struct ts_rig *r)
{
    ucm_map_free(r->mem.map);
    r->mem.map = NULL;
    alarm(TS_WAIT_MS / 1000);
    ucm_store_close(r->store);
    alarm(0);
    r->store = NULL;
}

/* All that a close has left to the device has been given back. */
static void await_nothing_left(const struct scene *s, const char *pools)
{
    char paths[1][TS_PATH];
    while (pools && ts_files(pools, "ucm-", paths, 1))
        usleep(1000);
    while (s->fake && s->fake->fake_count("left"))
        usleep(1000);
}

/* Copies that never end, and never fail: the store is closed, and they keep what they may touch.
 * Others who share the pool use all the rest of it.  In the end the device goes on. */
static void closed_while_the_device_hangs(void **state)
{
    enum { AGAIN = 30 };
    const char *dir = ts_dir();
    char pools[] = "/dev/shm/ucmt-dev-XXXXXX", text[2][N + 1];
    struct scene s = scene_of(state, dir);
    struct ts_rig r, other;
    void *event = ts_event_new(s.device);
    ucm_task *tasks[2];
    assert_non_null(mkdtemp(pools));
    ts_opt(&s.o, "cache_dir", "%s", pools);
    other = ts_rig_sure(&s.o);
    assert_string_equal(ts_rig_dump(&other, 50, N), ts_all('.', N));
    ts_opt(&s.o, "timeout_ms", "500");
    r = ts_rig_sure(&s.o);
    unsigned long before = s.fake ? s.fake->fake_count("copies") : 0;
    fill(&r, 0);
    tasks[0] = begin(&r, true, 0, 0, event);
    tasks[1] = begin(&r, false, 50, N, event);
    ts_event_await(s.device, event, 2, before + 2 * COPIES);
    close_in_time(&r);
    for (int i = 0; i < 2; i++)
        assert_int_equal(ucm_task_done(tasks[i], UCM_RELEASED), 0);
    for (uint64_t i = 1; i <= AGAIN; i++) {
        assert_string_equal(ts_rig_dump(&other, 1000 * i, N), ts_all('.', N));
        assert_string_equal(ts_rig_load(&other, 1000 * i, N), ts_all('.', N));
    }
    ts_event_fire(s.device, event);
    for (int i = 0; i < 2; i++)
        finish(tasks[i], text[i]);
    assert_string_equal(text[0], ts_all('t', N)); /* too late to be stored */
    assert_string_equal(text[1], ts_all('.', N));
    for (size_t i = 0; i < N; i++) {
        ucm_key key = ts_key(50 + i);
        assert_true(ts_mem_right(&r.mem, N + i, &key, 0, r.mem.nshards));
    }
    assert_string_equal(ts_rig_load(&other, 1000 * AGAIN, N), ts_all('.', N));
    ts_rig_close(&other);
    await_nothing_left(&s, pools);
    ts_event_free(s.device, event);
    ts_rig_close(&r);
    ts_remove(pools);
    end_scene(&s);
}

enum { THREADS = 8, TURNS = 6 };
struct worker {
    pthread_t thread;
    const struct ts_opts *o;
    struct ts_rig rig; /* the store is shared, the memory is not */
    uint64_t from;
    bool right;
};

static void *work(void *arg)
{
    struct worker *w = arg;
    w->right = true;
    for (int i = 0; i < TURNS && w->right; i++) {
        w->right = !strcmp(ts_rig_dump(&w->rig, w->from + i, N), ts_all('.', N)) &&
                   !strcmp(ts_rig_load(&w->rig, w->from + i, N), ts_all('.', N));
    }
    return NULL;
}

static void eight_threads(void **state)
{
    struct scene s = scene_of(state, ts_dir());
    struct ts_rig r = ts_rig_sure(&s.o);
    struct worker w[THREADS];
    for (int i = 0; i < THREADS; i++) {
        w[i] = (struct worker){.from = (uint64_t)i * 100, .rig = {.store = r.store}};
        assert_int_equal(
            ts_mem_new(&w[i].rig.mem, r.store, r.mem.shard_size, r.mem.nshards, &r.mem.shape, N),
            0);
        assert_int_equal(pthread_create(&w[i].thread, NULL, work, &w[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(w[i].thread, NULL);
        assert_true(w[i].right);
    }
    for (int i = 0; i < THREADS; i++)
        ts_mem_free(&w[i].rig.mem);
    ts_rig_close(&r);
    end_scene(&s);
}

/* ---- of vendors ---- */

/* A pool is registered as it grows: all of it in the end, none of it before it is there, and by
 * each who shares it. */
static void a_pool_is_registered_as_it_grows(void **state)
{
    struct scene s = scene_of(state, NULL);
    struct ts_rig r[2];
    ts_opt(&s.o, "block_size", "1048576");
    ts_opt(&s.o, "shard_size", "1048576");
    ts_opt(&s.o, "cache_buffer_capacity_gb", "0.25");
    ts_opt(&s.o, "@entries", "%d", N);
    for (int i = 0; i < 2; i++)
        r[i] = ts_rig_sure(&s.o);
    size_t all = (size_t)ts_metric(r[0].store, "cache_slots") << 20;
    assert_string_equal(ts_rig_dump(&r[0], 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_load(&r[1], 0, N), ts_all('.', N));
    while (s.fake->fake_count("registered") < 2 * all)
        usleep(1000);
    assert_int_equal(s.fake->fake_count("registered"), 2 * all);
    assert_int_equal(s.fake->fake_count("unregistered"), 0);
    for (int i = 0; i < 2; i++)
        ts_rig_close(&r[i]);
    end_scene(&s);
}

/* Blocks that adjoin in the engine's memory, in slots that adjoin: two of those were registered
 * apart, and no copy may go from one to the other. */
static void copies_end_where_slots_do(void **state)
{
    enum { BLOCKS = 24, SIZE = 1 << 20 };
    struct scene s = scene_of(state, NULL);
    ucm_key keys[BLOCKS];
    uint32_t blocks[BLOCKS];
    ucm_task *task;
    ts_opt(&s.o, "block_size", "%d", SIZE);
    ts_opt(&s.o, "shard_size", "%d", SIZE);
    ts_opt(&s.o, "cache_buffer_capacity_gb", "0.03125"); /* one set: slots are given out in order */
    ts_opt(&s.o, "@entries", "%d", BLOCKS);
    ts_opt(&s.o, "@pad", "0");
    struct ts_rig r = ts_rig_sure(&s.o);
    for (size_t i = 0; i < BLOCKS; i++) { /* the rig's blocks go backwards */
        keys[i] = ts_key(BLOCKS - 1 - i);
        ts_mem_blocks(&r.mem, BLOCKS - 1 - i, &blocks[i]);
        ts_mem_fill(&r.mem, BLOCKS - 1 - i, &keys[i]);
    }
    struct ucm_batch b = {.keys = keys, .blocks = blocks, .n = BLOCKS};
    assert_int_equal(ucm_dump(r.store, r.mem.map, &b, &task), 0);
    assert_int_equal(ucm_task_wait(task, UCM_STORED, TS_WAIT_MS), 0);
    ucm_task_free(task);
    assert_int_equal(s.fake->fake_count("copies"), BLOCKS);
    assert_string_equal(ts_rig_load(&r, 0, BLOCKS), ts_all('.', BLOCKS));
    ts_rig_close(&r);
    end_scene(&s);
}

/* What the vendor's library is called for: docs/devices.md has the figures. */
static void calls_of_a_hundred_blocks(void **state)
{
    enum { BLOCKS = 100, LAYERS = 64, SEGMENTS = 2 };
    struct scene s = scene_of(state, NULL);
    unsigned long calls[2];
    ts_opt(&s.o, "shard_size", "%d", SEGMENTS * 1024);
    ts_opt(&s.o, "block_size", "%d", LAYERS * SEGMENTS * 1024);
    ts_opt(&s.o, "cache_buffer_capacity_gb", "0.03125");
    ts_opt(&s.o, "@entries", "%d", BLOCKS);
    ts_opt(&s.o, "@nsegs", "%d", SEGMENTS);
    struct ts_rig r = ts_rig_sure(&s.o);
    while (s.fake->fake_count("registered") < (size_t)ts_metric(r.store, "cache_slots") << 17)
        usleep(1000);
    for (int dump = 1; dump >= 0; dump--) {
        s.fake->fake_reset();
        ts_run(r.store, &r.mem, &(struct ts_op){.dump = dump, .n = BLOCKS}, r.text);
        assert_string_equal(r.text, ts_all('.', BLOCKS));
        assert_int_equal(s.fake->fake_count("copies"), BLOCKS * LAYERS * SEGMENTS);
        calls[dump] = s.fake->fake_calls(NULL);
    }
    print_message("# %s: %lu calls for a dump of %d copies, %lu for a load\n", s.device->name,
                  calls[1], BLOCKS * LAYERS * SEGMENTS, calls[0]);
    bool batches = strcmp(getenv("UCM_TEST_GENERATION"), "old") && !s.device->one_by_one;
    for (int dump = 0; dump <= 1; dump++)
        assert_in_range(calls[dump] - (batches ? 0 : BLOCKS * LAYERS * SEGMENTS), 1, BLOCKS);
    ts_rig_close(&r);
    end_scene(&s);
}

/* One call of the vendor's fails, each in turn: at worst a dump is lost or a load misses. */
static void each_call_may_fail(void **state)
{
    struct scene s = scene_of(state, ts_dir());
    unsigned failed = 0;
    struct ts_rig r;
    unsigned long nth, calls = 1;
    for (nth = 1; nth <= calls; nth++) { /* while opening, too */
        s.fake->fake_reset();
        s.fake->fake_fail(NULL, nth, 999);
        if (ts_rig_open(&r, &s.o)) {
            failed++;
            calls++;
            assert_true(nth < 100);
            TS_ASSERT_WORDS(r.why, "device");
            continue;
        }
        calls = s.fake->fake_calls(NULL);
        ts_rig_close(&r);
    }
    assert_true(failed >= 1);
    s.fake->fake_fail(NULL, 0, 0);
    r = ts_rig_sure(&s.o);
    for (nth = 1, calls = 1, failed = 0; nth <= calls; nth += 1 + nth / 16) {
        s.fake->fake_reset();
        s.fake->fake_fail(NULL, nth, 999);
        ts_rig_dump(&r, nth * N, N);
        assert_int_equal(strspn(r.text, ".i"), N);
        failed += strchr(r.text, 'i') != NULL;
        ts_rig_load(&r, nth * N, N);
        assert_int_equal(strspn(r.text, ".i-"), N);
        failed += strchr(r.text, 'i') != NULL;
        calls = s.fake->fake_calls(NULL);
        s.fake->fake_fail(NULL, 0, 0);
        assert_string_equal(ts_rig_dump(&r, nth * N, N), ts_all('.', N));
        assert_string_equal(ts_rig_load(&r, nth * N, N), ts_all('.', N));
    }
    assert_true(failed > 3);
    ts_rig_close(&r);
    end_scene(&s);
}

/* Calls of one kind do not come back: the store is closed all the same, and when they do all is
 * given back. */
static void each_call_may_hang(void **state)
{
    struct scene s = scene_of(state, NULL);
    const char *name;
    unsigned hung = 0;
    char text[2][N + 1];
    ts_opt(&s.o, "timeout_ms", "100");
    ts_opt(&s.o, "share_buffer_enable", "false");
    struct ts_rig r = ts_rig_sure(&s.o);
    ts_rig_dump(&r, 0, N);
    ts_rig_close(&r);
    for (unsigned i = 0; (name = s.fake->fake_called(i)); i++) {
        ucm_task *tasks[2];
        if (strstr(name, "PrimaryCtxRelease")) /* the last thing of all, and who closes does it */
            continue;
        r = ts_rig_sure(&s.o);
        ts_rig_dump(&r, 50, N);
        s.fake->fake_reset();
        s.fake->fake_hang(name);
        fill(&r, 0);
        tasks[0] = begin(&r, true, 0, 0, NULL);
        tasks[1] = begin(&r, false, 50, N, NULL);
        close_in_time(&r);
        hung += s.fake->fake_calls(name) > 0;
        s.fake->fake_hang(NULL);
        for (int k = 0; k < 2; k++)
            finish(tasks[k], text[k]);
        await_nothing_left(&s, NULL);
        ts_rig_close(&r);
    }
    assert_true(hung >= 9);
    end_scene(&s);
}

/* The device cannot wait for the event, once or more: what was to wait for it is not copied. */
static void a_wait_for_the_engine_that_fails(void **state)
{
    struct scene s = scene_of(state, NULL);
    ts_opt(&s.o, "block_size", "%d", 2 << 20); /* a task is two flights */
    ts_opt(&s.o, "shard_size", "%d", 1 << 20);
    ts_opt(&s.o, "cache_buffer_capacity_gb", "0.0625");
    struct ts_rig r = ts_rig_sure(&s.o);
    for (unsigned fails = 1; fails <= 2; fails++) {
        void *event = ts_event_new(s.device);
        char text[N + 1];
        ts_mem_wipe(&r.mem);
        s.fake->fake_reset();
        s.fake->fake_fail(NULL, 0, 0);
        for (unsigned i = 0; i < fails; i++)
            s.fake->fake_fail(WAIT_EVENT, 1, 999);
        ucm_task *task = begin(&r, true, 100 * fails, 0, event);
        while (s.fake->fake_calls(WAIT_EVENT) < 2 && !s.fake->fake_count("copies"))
            usleep(1000);
        ts_event_await(s.device, event, 1, fails == 1);
        fill(&r, 100 * fails);
        ts_event_fire(s.device, event);
        finish(task, text);
        ts_event_free(s.device, event);
        size_t failed = strspn(text, "i");
        assert_true(failed > 0 && (failed == N) == (fails == 2));
        assert_string_equal(text + failed, ts_all('.', N - failed));
        ts_rig_load(&r, 100 * fails, N);
        assert_int_equal(strspn(r.text, "-"), failed);
        assert_string_equal(r.text + failed, ts_all('.', N - failed));
    }
    ts_rig_close(&r);
    end_scene(&s);
}

/* Two layers in memory of their own, one of which happens to begin where the other ends. */
static void neighbours_by_chance(void **state)
{
    enum { LEN = 2048, LAYER = 2 * LEN };
    struct scene s = scene_of(state, NULL);
    uint32_t blocks[2] = {0, 1};
    ucm_key keys[2] = {ts_key(1), ts_key(2)};
    ucm_map *map;
    ucm_task *task;
    ts_opt(&s.o, "shard_size", "%d", LAYER);
    ts_opt(&s.o, "block_size", "%d", 2 * LAYER);
    struct ts_rig r = ts_rig_sure(&s.o);
    struct ts_bytes memory = ts_bytes_new(s.device, 2 * LAYER);
    uint8_t *second = memory.at + LAYER;
    s.fake->fake_cut(second);
    struct ucm_seg segs[2] = {{memory.at, LEN, LEN}, {second, LEN, LEN}};
    struct iovec iov[2] = {{memory.at, LAYER}, {second, LAYER}};
    struct ucm_sg sg = {.key = keys[1], .nshards = 2, .niov = 2, .iov = iov};
    struct ucm_batch b = {.keys = keys, .blocks = blocks, .n = 1};
    assert_int_equal(ucm_map_new(r.store, &(struct ucm_map_desc){segs, 2, 1, 2, 2}, &map), 0);
    for (int dump = 1; dump >= 0; dump--)
        for (int explicit = 0; explicit <= 1; explicit ++) {
            for (unsigned i = 0; dump && i < 2; i++)
                ts_fill(&keys[explicit], i, 0, memory.view + i * LAYER, LAYER);
            s.fake->fake_reset();
            int err = explicit ? (dump ? ucm_dump_sg : ucm_load_sg)(r.store, &sg, 1, NULL, &task)
                               : (dump ? ucm_dump : ucm_load)(r.store, map, &b, &task);
            assert_int_equal(err, 0);
            assert_int_equal(ucm_task_wait(task, UCM_STORED, TS_WAIT_MS), 0);
            ucm_task_free(task);
            assert_int_equal(s.fake->fake_count("copies"), 2); /* and a layer's blocks are one */
            for (unsigned i = 0; i < 2; i++)
                assert_int_equal(ts_check(&keys[explicit], i, 0, memory.view + i * LAYER, LAYER),
                                 LAYER);
            memset(memory.view, 0, 2 * LAYER);
        }
    ucm_map_free(map);
    ts_rig_close(&r);
    s.fake->fake_mfree(second);
    ts_bytes_free(s.device, &memory);
    end_scene(&s);
}

/* And with it all that was queued. */
static void the_device_is_lost(void **state)
{
    struct scene s = scene_of(state, ts_dir());
    struct ts_rig r = ts_rig_sure(&s.o);
    char text[2][N + 1];
    ucm_task *tasks[2];
    assert_string_equal(ts_rig_dump(&r, 50, N), ts_all('.', N));
    unsigned long before = s.fake->fake_count("copies");
    fill(&r, 0);
    s.fake->fake_hold(1);
    tasks[0] = begin(&r, true, 0, 0, NULL);
    tasks[1] = begin(&r, false, 50, N, NULL);
    s.fake->fake_settle(before + 1);
    s.fake->fake_break(700);
    for (int i = 0; i < 2; i++) {
        finish(tasks[i], text[i]);
        assert_string_equal(text[i], ts_all('i', N));
    }
    ts_rig_dump(&r, 200, N);
    assert_string_equal(r.text, ts_all('i', N));
    s.fake->fake_hold(0);
    s.fake->fake_break(0);
    assert_string_equal(ts_rig_load(&r, 50, N), ts_all('.', N));
    ts_rig_close(&r);
    end_scene(&s);
}

/* ---- */

struct test {
    const char *name;
    void (*fn)(void **state);
    enum { ALL, EVENTS, FEW, VENDOR, ONCE, ONE } needs;
};
#define CASE(fn, needs)                                                                            \
    {                                                                                              \
#fn, fn, needs                                                                             \
    }
static const struct test cases[] = {
    CASE(what_goes_in_comes_out, ALL),
    CASE(eight_threads, ALL),
    CASE(a_dump_waits_for_the_engine, EVENTS),
    CASE(a_load_waits_for_the_engine, EVENTS),
    CASE(canceled_under_way, EVENTS),
    CASE(closed_with_work_under_way, EVENTS),
    CASE(closed_while_the_device_hangs, FEW),
    CASE(each_call_may_hang, ONE),
    CASE(a_wait_for_the_engine_that_fails, ONCE),
    CASE(neighbours_by_chance, ONCE),
    CASE(a_pool_is_registered_as_it_grows, ONCE),
    CASE(copies_end_where_slots_do, ONCE),
    CASE(calls_of_a_hundred_blocks, ONCE),
    CASE(each_call_may_fail, VENDOR),
    CASE(the_device_is_lost, VENDOR),
};

/* The others differ from one of these by a prefix. */
static bool stands_for_others(const char *device)
{
    static const char *const names[] = {"sim", "cuda", "ascend", "musa"};
    size_t i = 0;
    while (i < TS_LEN(names) && strcmp(names[i], device))
        i++;
    return i < TS_LEN(names);
}

static bool fits(const struct test *t, const struct scene *s)
{
    const char *engine = s->stack->engine;
    bool all = getenv("UCM_TEST_ALL");
    switch (t->needs) {
    case ALL: return true;
    case EVENTS: return s->device->events;
    case FEW: /* takes long, and has to see what is queued; all of it for `make test-devices` */
        return s->device->events && !s->device->engine &&
               (engine ? !strcmp(engine, "io_uring") : all) &&
               (all || stands_for_others(s->device->name));
    case VENDOR: return s->fake;
    case ONCE: return s->fake && !engine;                                    /* with one stack */
    case ONE: return s->fake && !engine && !strcmp(s->device->name, "cuda"); /* and one device */
    }
    return false;
}

int main(void)
{
    static struct CMUnitTest tests[TS_LEN(cases) * TS_LEN(stacks) * 16];
    static struct scene scenes[TS_LEN(stacks) * 16];
    size_t n = 0, nscenes = 0;
    opencl_add();
    for (size_t d = 0; d < ts_ndevices; d++)
        for (size_t k = 0; k < TS_LEN(stacks); k++) {
            struct scene *s = &scenes[nscenes++];
            *s = (struct scene){
                .device = &ts_devices[d], .fake = ts_fake(&ts_devices[d]), .stack = &stacks[k]};
            for (size_t i = 0; i < TS_LEN(cases); i++) {
                char *name;
                if (!fits(&cases[i], s))
                    continue;
                if (asprintf(&name, "%s %s %s: %s", s->device->name, s->stack->pipeline,
                             s->stack->engine ? s->stack->engine : "-", cases[i].name) < 0)
                    return 1;
                tests[n++] = (struct CMUnitTest){name, cases[i].fn, NULL, NULL, s};
            }
        }
    cmocka_set_test_filter(getenv("UCM_TEST_FILTER"));
    return _cmocka_run_group_tests("stacks", tests, n, NULL, NULL);
}

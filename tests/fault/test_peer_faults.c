/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The faults that others of our kind show (docs/reliability.md has the list), a test for each,
 * named after it.  Most are shown at length elsewhere; here each is in its shortest form, so that
 * the list can be read, and run, as a whole.
 */
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "fault.h"
#include "support.h"

enum { MANY = 32 };
static const char *const engines[] = {"psync", "aio", "io_uring"};
static const char *const pipelines[] = {"Posix", "Cache|Posix"};

static struct ts_opts options(const char *pipeline, const char *dir)
{
    struct ts_opts o = ts_opts_for(pipeline, dir);
    if (strstr(pipeline, "Cache"))
        ts_opt(&o, "cache_dir", "%s", ts_dir());
    return o;
}

/* What lies on disk, whatever a pool may hold. */
static const char *from_disk(const struct ts_opts *o, uint64_t from, size_t n)
{
    static struct ts_rig r;
    struct ts_opts disk = *o;
    ts_opt(&disk, "store_pipeline", "Posix");
    r = ts_rig_sure(&disk);
    ts_rig_load(&r, from, n);
    ts_rig_close(&r);
    return r.text;
}

static void sixteen_shards_in_one_task(void **state)
{
    for (unsigned i = 0; i < 2 * TS_LEN(engines); i++) {
        struct ts_opts o = options(pipelines[i % 2], ts_dir());
        ts_opt(&o, "posix_io_engine", "%s", engines[i / 2]);
        struct ts_rig r = ts_rig_sure(&o); /* 16 shards of 4 KiB */
        for (unsigned k = 0; k < 6; k++)
            assert_string_equal(ts_rig_dump(&r, k * MANY, MANY), ts_all('.', MANY));
        ts_rig_close(&r);
        for (unsigned k = 0; k < 6; k++)
            assert_string_equal(from_disk(&o, k * MANY, MANY), ts_all('.', MANY));
    }
}

static void one_task_per_layer(void **state)
{
    for (unsigned i = 0; i < 2; i++) {
        struct ts_opts o = options(pipelines[i], ts_dir());
        struct ts_rig r = ts_rig_sure(&o);
        for (unsigned k = 0; k < 60; k++) { /* in order, then in any */
            struct ts_op op = {.dump = true, .from = 4 * k, .n = 1 + k % 4, .layers = 1 + k / 20};
            ts_run(r.store, &r.mem, &op, r.text);
            assert_string_equal(r.text, ts_all('.', op.n));
            assert_string_equal(from_disk(&o, op.from, op.n), ts_all('.', op.n));
        }
        ts_rig_close(&r);
    }
}

static void one_bit_flipped_on_disk(void **state)
{
    for (unsigned i = 0; i < TS_LEN(engines); i++) {
        char path[1][TS_PATH];
        const char *dir = ts_dir();
        struct ts_opts o = options("Posix", dir);
        ts_opt(&o, "posix_io_engine", "%s", engines[i]);
        struct ts_rig r = ts_rig_sure(&o);
        assert_string_equal(ts_rig_dump(&r, 0, 4), "....");
        assert_int_equal(ts_files(dir, "seg-", path, 1), 1);
        ts_flip(path[0], 4096 + 5 * 4096 + 77); /* a shard of the first block */
        ts_rig_load(&r, 0, 4);
        assert_int_equal(strspn(r.text, ".!"), 4);
        assert_non_null(strchr(r.text, '!'));
        ts_rig_close(&r);
    }
}

static void a_truncated_file(void **state)
{
    for (unsigned i = 0; i < TS_LEN(engines); i++) {
        char path[1][TS_PATH];
        const char *dir = ts_dir();
        struct ts_opts o = options("Posix", dir);
        ts_opt(&o, "posix_io_engine", "%s", engines[i]);
        struct ts_rig r = ts_rig_sure(&o);
        assert_string_equal(ts_rig_dump(&r, 0, 1), ".");
        assert_int_equal(ts_files(dir, "seg-", path, 1), 1);
        ts_truncate(path[0], 4096 + 10 * 4096);
        assert_string_equal(ts_rig_load(&r, 0, 1), "!");
        assert_string_equal(ts_rig_lookup(&r, 0, 1), "0");
        ts_rig_close(&r);
    }
}

/* No room for a further segment, or for all of a block: it is half written when the disk is full.
 */
static void full_disk(struct ts_opts *o, const struct fault_plan *full)
{
    char told[MANY + 1];
    struct ts_rig r = ts_rig_sure(o);
    assert_string_equal(ts_rig_dump(&r, 1000, 4), "....");
    fault_plan(full, 1, 1);
    strcpy(told, ts_rig_dump(&r, 0, MANY));
    bool evicted = ts_metric(r.store, "disk_evicted_total") > 0; /* to make room, as it may */
    ts_rig_close(&r);
    fault_plan(NULL, 0, 0);
    if (!evicted)
        assert_non_null(strpbrk(told, "fi"));
    assert_int_equal(strspn(told, ".fi"), MANY);
    ts_opt(o, "store_pipeline", "Posix");
    r = ts_rig_sure(o);
    for (unsigned k = 0; k < MANY; k++) { /* what is said to be there is there */
        bool there = ts_rig_lookup(&r, k, 1)[0] == '1';
        if (!evicted)
            assert_true(there == (told[k] == '.'));
        if (there)
            assert_string_equal(ts_rig_load(&r, k, 1), ".");
    }
    ts_rig_close(&r);
}

static void a_full_disk(void **state)
{
    static const struct fault_plan full[] = {
        {.kinds = FAULT_ALLOCATE, .err = -ENOSPC, .one_in = 1},
        {.kinds = FAULT_WRITE, .way = FAULT_WAY_HALF, .err = -ENOSPC, .one_in = 3, .times = 4},
    };
    for (unsigned i = 0; i < 4 * TS_LEN(engines); i++) {
        struct ts_opts o = options(pipelines[i % 2], ts_dir());
        ts_opt(&o, "posix_io_engine", "%s", engines[i / 4]);
        ts_opt(&o, "posix_segment_mb", "%u", i / 2 % 2 ? 4 : 1);
        full_disk(&o, &full[i / 2 % 2]);
    }
}

/* Killed while its blocks are on the way to the disk; the next one has the same pool. */
static void killed_in_mid_dump_with_the_same_shared_memory(void **state)
{
    for (unsigned i = 0; i < 20; i++) {
        struct ts_opts o = options("Cache|Posix", ts_dir());
        struct ts_agent a;
        bool late;
        ts_agent_sure(&a, &o);
        ts_agent_send(&a, "dump 0 %u", MANY);
        ts_agent_reply_within(&a, (int)i / 2, &late);
        ts_agent_kill(&a, SIGKILL);
        struct ts_rig r = ts_rig_sure(&o);
        assert_string_equal(ts_rig_dump(&r, 0, MANY), ts_all('.', MANY));
        ts_rig_close(&r);
        assert_string_equal(from_disk(&o, 0, MANY), ts_all('.', MANY));
    }
}

static void a_failed_load_does_not_make_a_block_present(void **state)
{
    for (unsigned i = 0; i < 2; i++) {
        struct ts_opts o = options(pipelines[i], ts_dir());
        struct ts_rig r = ts_rig_sure(&o);
        assert_string_equal(ts_rig_load(&r, 7, 2), "--");
        assert_string_equal(ts_rig_lookup(&r, 7, 2), "00");
        assert_string_equal(ts_rig_dump(&r, 9, 1), ".");
        ts_rig_close(&r);
        if (i)
            ts_opt(&o, "cache_dir", "%s", ts_dir());
        r = ts_rig_sure(&o);
        fault_plan(&(struct fault_plan){.kinds = FAULT_READ, .one_in = 1}, 1, 1);
        assert_string_equal(ts_rig_load(&r, 9, 1), "i");
        fault_plan(NULL, 0, 0);
        assert_string_equal(ts_rig_lookup(&r, 9, 1), "0"); /* a disk does not come back */
        ts_rig_close(&r);
    }
}

static void a_task_larger_than_the_buffer(void **state)
{
    enum { LARGE = 256 };
    struct ts_opts o = options("Cache|Posix", ts_dir());
    ts_opt(&o, "@entries", "%d", LARGE);
    struct ts_rig r = ts_rig_sure(&o);
    assert_true(ts_metric(r.store, "cache_slots") < LARGE);
    assert_string_equal(ts_rig_dump(&r, 0, LARGE), ts_all('.', LARGE));
    assert_string_equal(ts_rig_load(&r, 0, LARGE), ts_all('.', LARGE));
    ts_rig_close(&r);
}

static void block_0_missing_and_an_exact_lookup(void **state)
{
    for (unsigned i = 0; i < 2; i++) {
        struct ts_opts o = options(pipelines[i], ts_dir());
        struct ts_rig r = ts_rig_sure(&o);
        assert_string_equal(ts_rig_dump(&r, 1, 7), ts_all('.', 7));
        assert_string_equal(ts_rig_lookup(&r, 0, 8), "01111111");
        ts_rig_close(&r);
    }
}

static void a_directory_removed_and_made_again(void **state)
{
    for (unsigned i = 0; i < 2; i++) {
        const char *dir = ts_dir();
        struct ts_opts o = options(pipelines[i], dir);
        ts_opt(&o, "timeout_ms", "2000");
        struct ts_rig r = ts_rig_sure(&o);
        assert_string_equal(ts_rig_dump(&r, 0, 4), "....");
        ts_remove(dir);
        assert_int_equal(mkdir(dir, 0777), 0);
        /* The first dump may be what finds out. */
        uint64_t from = 100, until = ts_now_ms() + TS_WAIT_MS;
        while (strcmp(ts_rig_dump(&r, from, 4), "....") && ts_now_ms() < until)
            from += 4;
        assert_string_equal(r.text, "....");
        ts_rig_close(&r);
        assert_string_equal(from_disk(&o, from, 4), "....");
    }
}

static void a_read_only_mount(void **state)
{
    const char *dir = ts_dir();
    int err = ts_mount(dir, "size=16m");
    if (err)
        TS_SKIP("cannot mount a tmpfs: %s", strerror(err));
    for (unsigned i = 0; i < 2; i++) {
        struct ts_opts o = options(pipelines[i], dir);
        ts_opt(&o, "namespace", "mount %u", i);
        struct ts_rig r = ts_rig_sure(&o);
        assert_string_equal(ts_rig_dump(&r, 0, 4), "....");
        ts_rig_close(&r);
        assert_int_equal(ts_remount(dir, "ro"), 0);
        if (i)
            ts_opt(&o, "cache_dir", "%s", ts_dir());
        r = ts_rig_sure(&o);
        assert_string_equal(ts_rig_lookup(&r, 0, 4), i ? "2222" : "1111");
        assert_string_equal(ts_rig_load(&r, 0, 4), "....");
        assert_null(strchr(ts_rig_dump(&r, 50, 4), '.')); /* dropped, and said so */
        ts_rig_close(&r);
        assert_int_equal(ts_remount(dir, "rw,size=16m"), 0);
    }
    ts_umount(dir);
}

static void a_tensor_smaller_than_a_shard(void **state)
{
    for (unsigned i = 0; i < 2; i++) {
        struct ts_opts o = options(pipelines[i], ts_dir());
        static uint8_t memory[16 * 4096];
        struct ucm_seg segs[16];
        struct ts_rig r = ts_rig_sure(&o);
        ucm_map *map = NULL;
        for (unsigned s = 0; s < 16; s++)
            segs[s] = (struct ucm_seg){memory + s * 4096, sizeof memory, s == 5 ? 1024 : 4096};
        struct ucm_map_desc desc = {
            .segs = segs, .nshards = 16, .nsegs = 1, .blocks_per_key = 1, .nblocks = 1};
        assert_int_equal(ucm_map_new(r.store, &desc, &map), -EINVAL);
        struct iovec iov = {memory, 1024};
        struct ucm_sg sg = {.key = ts_key(1), .nshards = 1, .niov = 1, .iov = &iov};
        ucm_task *task = NULL;
        assert_int_equal(ucm_load_sg(r.store, &sg, 1, NULL, &task), -EINVAL);
        assert_int_equal(ucm_dump_sg(r.store, &sg, 1, NULL, &task), -EINVAL);
        ts_rig_close(&r);
    }
}

static void a_capacity_over_two_stores(void **state)
{
    enum { BOUND = 8 << 20 };
    const char *dir = ts_dir();
    struct ts_opts o = options("Posix", dir);
    ts_opt(&o, "posix_capacity_gb", "0.0078125"); /* 8 MiB, for 2 times 20 MiB */
    struct ts_opts other = o;
    ts_opt(&other, "namespace", "another");
    struct ts_rig r[2] = {ts_rig_sure(&o), ts_rig_sure(&other)};
    for (unsigned k = 0; k < 20; k++) {
        ts_rig_dump(&r[k % 2], k * MANY, MANY);
        assert_true(ts_du(dir, "") <= BOUND);
    }
    ts_rig_close(&r[0]);
    ts_rig_close(&r[1]);
    assert_true(ts_du(dir, "") > BOUND / 2); /* and what is allowed is used */
}

static void signals_end_the_program(void **state)
{
    static const int ends[] = {SIGINT, SIGTERM, SIGSEGV};
    for (unsigned i = 0; i < TS_LEN(ends); i++) {
        struct ts_opts o = options("Cache|Posix", ts_dir());
        struct ts_agent a;
        ts_agent_sure(&a, &o);
        assert_string_equal(ts_agent_ask(&a, "dump 0 4"), "....");
        int status = ts_agent_kill(&a, ends[i]);
        /* A sanitizer takes SIGSEGV for a finding of its own: it exits or aborts. */
        bool found = ends[i] == SIGSEGV &&
                     (WIFSIGNALED(status) ? WTERMSIG(status) == SIGABRT : WEXITSTATUS(status) != 0);
        assert_true(found || (WIFSIGNALED(status) && WTERMSIG(status) == ends[i]));
    }
}

#define TEST(name) cmocka_unit_test(name)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(sixteen_shards_in_one_task),
        TEST(one_task_per_layer),
        TEST(one_bit_flipped_on_disk),
        TEST(a_truncated_file),
        TEST(a_full_disk),
        TEST(killed_in_mid_dump_with_the_same_shared_memory),
        TEST(a_failed_load_does_not_make_a_block_present),
        TEST(a_task_larger_than_the_buffer),
        TEST(block_0_missing_and_an_exact_lookup),
        TEST(a_directory_removed_and_made_again),
        TEST(a_read_only_mount),
        TEST(a_tensor_smaller_than_a_shard),
        TEST(a_capacity_over_two_stores),
        TEST(signals_end_the_program),
    };
    setenv("TMPDIR", "/dev/shm", 0);
    cmocka_set_test_filter(getenv("UCM_TEST_FILTER"));
    return cmocka_run_group_tests_name("peer faults", tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The directory under the store: missing, no directory, not ours to write, read-only, full, out of
 * inodes, removed in between, shared by processes that start at once, bounded.  A wrong
 * configuration is told at once, with the key, the path and what to do; bad luck costs hits and
 * nothing else.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "support.h"

enum { N = 12, NOBODY = 65534 };

static struct ts_opts opts_at(void **state, const char *dir)
{
    return ts_opts_for(((const struct ts_stack *)*state)->pipeline, dir);
}

/* ---- wrong configuration ---- */

static void test_a_missing_directory(void **state)
{
    char path[TS_PATH];
    snprintf(path, sizeof path, "%s/not/there", ts_dir());
    struct ts_opts o = opts_at(state, path);
    struct ts_rig r;

    assert_int_equal(ts_rig_open(&r, &o), -ENOENT);
    TS_ASSERT_WORDS(r.why, "storage_backends", path, "make the directory");
    assert_int_equal(access(path, F_OK), -1);
}

static void test_not_a_directory(void **state)
{
    char path[TS_PATH];
    snprintf(path, sizeof path, "%s/file", ts_dir());
    ts_write_at(path, 0, "?", 1);
    struct ts_opts o = opts_at(state, path);
    struct ts_rig r;

    assert_int_equal(ts_rig_open(&r, &o), -ENOTDIR);
    TS_ASSERT_WORDS(r.why, "storage_backends", path, "directory");
}

static void test_a_path_with_blanks(void **state)
{
    char path[TS_PATH];
    snprintf(path, sizeof path, "%s/kv cache, 100%% \xc3\xa4", ts_dir());
    assert_int_equal(mkdir(path, 0700), 0);
    struct ts_opts o = opts_at(state, path);
    struct ts_rig r = ts_rig_sure(&o);

    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
    assert_true(ts_du(path, "seg-") > 0);
    r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
}

/* Both are used as one. */
static void test_two_directories(void **state)
{
    char paths[TS_PATH];
    snprintf(paths, sizeof paths, "%s:%s", ts_dir(), ts_dir());
    struct ts_opts o = opts_at(state, paths);
    struct ts_rig r = ts_rig_sure(&o);

    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
}

/* ---- not ours to write ---- */

static void fill(const struct ts_opts *o)
{
    struct ts_rig r = ts_rig_sure(o);
    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
}

/* What can be read is served; what cannot be written is dropped, and said. */
static void expect_read_only(struct ts_agent *a)
{
    const char *text;

    assert_string_equal(ts_agent_ask(a, "prefix 0 %d", N), "12");
    assert_string_equal(ts_agent_ask(a, "load 0 %d", N), ts_all('.', N));
    text = ts_agent_ask(a, "dump 100 %d", N);
    assert_int_equal(strlen(text), N);
    assert_null(strpbrk(text, ".WGp"));
    assert_string_equal(ts_agent_ask(a, "load 0 %d", N), ts_all('.', N));
    assert_int_equal(ts_agent_stop(a), 0);
}

static void test_a_directory_of_another_user(void **state)
{
    if (getuid())
        TS_SKIP("needs root, to become another user");
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir), theirs;
    struct ts_agent a;

    fill(&o);
    ts_chmod_all(dir, 0555, 0444);
    theirs = o;
    ts_opt(&theirs, "@uid", "%d", NOBODY);
    ts_agent_sure(&a, &theirs);
    expect_read_only(&a);
    ts_chmod_all(dir, 0755, 0644);
}

static void test_a_read_only_mount(void **state)
{
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);
    struct ts_agent a;

    if (ts_mount(dir, "size=16m"))
        TS_SKIP("may not mount a tmpfs");
    fill(&o);
    assert_int_equal(ts_remount(dir, "ro"), 0);
    ts_agent_sure(&a, &o);
    expect_read_only(&a);
    assert_int_equal(ts_remount(dir, "size=16m"), 0);
    ts_agent_sure(&a, &o); /* and writable again it works */
    assert_string_equal(ts_agent_ask(&a, "dump 100 %d", N), ts_all('.', N));
    assert_int_equal(ts_agent_stop(&a), 0);
    ts_umount(dir);
}

static void test_an_empty_read_only_mount(void **state)
{
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);
    struct ts_agent a;

    if (ts_mount(dir, "size=1m"))
        TS_SKIP("may not mount a tmpfs");
    assert_int_equal(ts_remount(dir, "ro"), 0);
    ts_agent_sure(&a, &o);
    assert_string_equal(ts_agent_ask(&a, "load 0 2"), "--");
    assert_null(strpbrk(ts_agent_ask(&a, "dump 0 2"), ".p"));
    assert_int_equal(ts_agent_stop(&a), 0);
    ts_umount(dir);
}

static void test_it_turns_read_only_while_it_runs(void **state)
{
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);
    struct ts_agent a;

    if (ts_mount(dir, "size=16m"))
        TS_SKIP("may not mount a tmpfs");
    ts_agent_sure(&a, &o);
    assert_string_equal(ts_agent_ask(&a, "dump 0 %d", N), ts_all('.', N));
    if (!ts_remount(dir, "ro")) /* refused while files are open for writing: then nothing to see */
        assert_string_equal(ts_agent_ask(&a, "load 0 %d", N), ts_all('.', N));
    assert_int_equal(ts_remount(dir, "size=16m"), 0);
    assert_string_equal(ts_agent_ask(&a, "dump 100 %d", N), ts_all('.', N));
    assert_int_equal(ts_agent_stop(&a), 0);
    ts_umount(dir);
}

/* ---- full ---- */

static void test_a_full_filesystem(void **state)
{
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);

    if (ts_mount(dir, "size=8m"))
        TS_SKIP("may not mount a tmpfs");
    struct ts_rig r = ts_rig_sure(&o);
    for (unsigned i = 0; i < 20; i++) { /* twice what there is room for */
        ts_rig_dump(&r, i * N, N);
        if (strspn(r.text, ".f") != N)
            fail_msg("dump %u: %s", i, r.text);
        ts_rig_load(&r, i * N, N);
        if (strspn(r.text, ".-") != N)
            fail_msg("load %u: %s", i, r.text);
    }
    for (unsigned i = 0; i < 20; i++) {
        ts_rig_load(&r, i * N, N);
        assert_int_equal(strspn(r.text, ".-"), N);
    }
    assert_true(ts_metric(r.store, "disk_writes_total") >= 60);
    ts_rig_close(&r);
    r = ts_rig_sure(&o);
    size_t kept = 0;
    for (unsigned i = 0; i < 20; i++) {
        ts_rig_load(&r, i * N, N);
        for (size_t k = 0; k < N; k++)
            kept += r.text[k] == '.';
    }
    assert_true(kept >= 60); /* of the 100 that fit */
    ts_rig_close(&r);
    ts_umount(dir);
}

/* Room comes back: what was full takes blocks again without a restart. */
static void test_full_for_a_while(void **state)
{
    char ballast[TS_PATH];
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);
    static uint8_t bytes[1 << 20];

    if (ts_mount(dir, "size=8m"))
        TS_SKIP("may not mount a tmpfs");
    snprintf(ballast, sizeof ballast, "%s/ballast", dir);
    for (off_t at = 0; at < 7900 << 10; at += sizeof bytes / 16)
        ts_write_at(ballast, at, bytes, sizeof bytes / 16);
    struct ts_rig r = ts_rig_sure(&o);
    ts_rig_dump(&r, 0, N);
    assert_non_null(strchr(r.text, 'f'));
    assert_null(strpbrk(r.text, "WGp"));
    ts_rig_load(&r, 0, N);
    assert_null(strpbrk(r.text, "WGp!"));
    unlink(ballast);
    for (uint64_t until = ts_now_ms() + TS_WAIT_MS; strchr(ts_rig_dump(&r, 100, N), 'f');)
        assert_true(ts_now_ms() < until); /* it asks again within a second */
    assert_string_equal(r.text, ts_all('.', N));
    assert_string_equal(ts_rig_load(&r, 100, N), ts_all('.', N));
    ts_rig_close(&r);
    ts_umount(dir);
}

static void test_no_inodes(void **state)
{
    for (unsigned inodes = 1; inodes < 10; inodes++) {
        const char *dir = ts_dir();
        struct ts_opts o = opts_at(state, dir);
        char options[64];
        struct ts_agent a;

        snprintf(options, sizeof options, "size=8m,nr_inodes=%u", inodes);
        if (ts_mount(dir, options))
            TS_SKIP("may not mount a tmpfs");
        ts_agent_start(&a, NULL, &o);
        const char *text = ts_agent_reply(&a);
        if (!strcmp(text, "open")) { /* it may also say that it cannot */
            text = ts_agent_ask(&a, "dump 0 %d", N);
            assert_null(strpbrk(text, "WGp"));
            text = ts_agent_ask(&a, "load 0 %d", N);
            assert_int_equal(strspn(text, ".-"), N);
        } else {
            TS_ASSERT_WORDS(text, "error", dir);
        }
        assert_int_equal(ts_agent_stop(&a), 0);
        ts_umount(dir);
    }
}

/* ---- removed ---- */

static void test_removed_while_it_runs(void **state)
{
    char sub[TS_PATH];
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);
    struct ts_rig r = ts_rig_sure(&o);

    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    snprintf(sub, sizeof sub, "%s/ucm", dir);
    ts_remove(sub);
    for (unsigned i = 0; i < 10; i++) { /* nothing hangs, nothing is wrong */
        ts_rig_dump(&r, 100 + i * N, N);
        assert_null(strpbrk(r.text, "WGp"));
        ts_rig_load(&r, 100 + i * N, N);
        assert_null(strpbrk(r.text, "WGp!"));
    }
    ts_rig_close(&r);
    r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('-', N));
    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
    r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
}

/* One that has nothing yet when the directory goes, and comes back, uses the new one. */
static void test_removed_before_the_first_dump(void **state)
{
    char sub[TS_PATH];
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);
    struct ts_rig r = ts_rig_sure(&o);

    snprintf(sub, sizeof sub, "%s/ucm", dir);
    ts_remove(sub);
    ts_rig_dump(&r, 0, N);
    assert_null(strpbrk(r.text, "WGp"));
    ts_rig_load(&r, 0, N);
    assert_null(strpbrk(r.text, "WGp!"));
    ts_rig_close(&r);
    r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_dump(&r, 50, N), ts_all('.', N));
    assert_string_equal(ts_rig_load(&r, 50, N), ts_all('.', N));
    ts_rig_close(&r);
}

/* ---- several processes ---- */

static void test_two_start_at_once(void **state)
{
    for (unsigned round = 0; round < 50; round++) {
        const char *dir = ts_dir();
        struct ts_opts o = opts_at(state, dir);
        struct ts_agent a, b;

        ts_agent_start(&a, NULL, &o);
        ts_agent_start(&b, NULL, &o);
        ts_agent_send(&a, "dump 0 4");
        ts_agent_send(&b, "dump 4 4");
        assert_string_equal(ts_agent_reply(&a), "open");
        assert_string_equal(ts_agent_reply(&b), "open");
        assert_string_equal(ts_agent_reply(&a), "....");
        assert_string_equal(ts_agent_reply(&b), "....");
        assert_string_equal(ts_agent_ask(&a, "prefix 0 9"), "8");
        assert_string_equal(ts_agent_ask(&b, "prefix 0 9"), "8");
        assert_string_equal(ts_agent_ask(&a, "load 0 8"), "........");
        assert_string_equal(ts_agent_ask(&b, "load 0 8"), "........");
        assert_int_equal(ts_agent_stop(&a), 0);
        assert_int_equal(ts_agent_stop(&b), 0);
        ts_remove(dir);
    }
}

/* What one has just published, the other finds at once: a lookup in between found nothing. */
static void test_published_is_found(void **state)
{
    struct ts_opts o = opts_at(state, ts_dir());
    struct ts_agent a, b;

    ts_agent_sure(&a, &o);
    ts_agent_sure(&b, &o);
    for (unsigned i = 0; i < 40; i++) {
        assert_string_equal(ts_agent_ask(&b, "prefix %u 3", i * 3), "0");
        assert_string_equal(ts_agent_ask(&a, "dump %u 3", i * 3), "...");
        assert_string_equal(ts_agent_ask(&b, "prefix %u 3", i * 3), "3");
        assert_string_equal(ts_agent_ask(&b, "load %u 3", i * 3), "...");
    }
    assert_int_equal(ts_agent_stop(&a), 0);
    assert_string_equal(ts_agent_ask(&b, "load 0 %d", N), ts_all('.', N));
    assert_int_equal(ts_agent_stop(&b), 0);
}

static void test_restarts_leave_no_garbage(void **state)
{
    struct ts_opts o = opts_at(state, ts_dir());
    const char *dir = strchr(strstr(o.text, "storage_backends="), '=') + 1;
    char path[TS_PATH];
    struct ts_agent a;

    snprintf(path, sizeof path, "%.*s", (int)strcspn(dir, "\n"), dir);
    for (unsigned i = 0; i < 20; i++) {
        ts_agent_sure(&a, &o);
        assert_string_equal(ts_agent_ask(&a, "dump %u 2", i), "..");
        assert_string_equal(ts_agent_ask(&a, "load 0 %u", i + 2), ts_all('.', i + 2));
        if (i % 2)
            ts_agent_kill(&a, SIGKILL);
        else
            assert_int_equal(ts_agent_stop(&a), 0);
    }
    static char paths[64][TS_PATH];
    assert_int_equal(ts_files(path, "journal", paths, TS_LEN(paths)), 1); /* one lane, adopted */
    assert_true(ts_du(path, "seg-") <= 2 << 20); /* 21 blocks, 15 a segment */
}

/* ---- capacity ---- */

struct watch {
    const char *dir;
    _Atomic bool stop;
    uint64_t most;
    unsigned samples;
};

static void *watch_du(void *arg)
{
    struct watch *w = arg;
    do {
        uint64_t bytes = ts_du(w->dir, "seg-");
        w->most = bytes > w->most ? bytes : w->most;
        w->samples++;
    } while (!atomic_load(&w->stop));
    return NULL;
}

/* Sampled all the while, by as many processes as will: never above. */
static void capacity_kept(void **state, unsigned processes, unsigned mb)
{
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);
    struct watch w = {.dir = dir};
    struct ts_agent a[3];
    pthread_t thread;
    unsigned dumped = 0;

    ts_opt(&o, "posix_capacity_gb", "%.9f", mb / 1024.0);
    for (unsigned p = 0; p < processes; p++)
        ts_agent_sure(&a[p], &o);
    assert_int_equal(pthread_create(&thread, NULL, watch_du, &w), 0);
    for (unsigned i = 0; i < 30; i++) {
        for (unsigned p = 0; p < processes; p++)
            ts_agent_send(&a[p], "dump %u 10", (i * processes + p) * 10);
        for (unsigned p = 0; p < processes; p++) {
            const char *text = ts_agent_reply(&a[p]);
            assert_non_null(text);
            assert_int_equal(strspn(text, ".f"), 10);
            dumped += strspn(text, ".");
        }
    }
    atomic_store(&w.stop, true);
    pthread_join(thread, NULL);
    assert_true(w.samples > 3);
    assert_true(w.most <= (uint64_t)mb << 20);
    assert_true(w.most >= (uint64_t)(mb - 1) << 20); /* and it is used */
    assert_true(dumped >= 200 * (processes > 1 ? 1 : processes));
    for (unsigned p = 0; p < processes; p++)
        assert_int_equal(ts_agent_stop(&a[p]), 0);
    assert_true(ts_du(dir, "seg-") <= (uint64_t)mb << 20);
}

static void test_capacity_of_one(void **state)
{
    capacity_kept(state, 1, 4);
}

static void test_capacity_of_three(void **state)
{
    capacity_kept(state, 3, 7);
}

static void test_a_smaller_capacity_at_restart(void **state)
{
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);
    struct ts_rig r = ts_rig_sure(&o);

    for (unsigned i = 0; i < 10; i++)
        assert_string_equal(ts_rig_dump(&r, i * N, N), ts_all('.', N));
    ts_rig_close(&r);
    assert_true(ts_du(dir, "seg-") > 7 << 20);
    ts_opt(&o, "posix_capacity_gb", "%.9f", 3.0 / 1024);
    r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_dump(&r, 1000, N), ts_all('.', N));
    assert_true(ts_du(dir, "seg-") <= 3 << 20);
    assert_string_equal(ts_rig_load(&r, 1000, N), ts_all('.', N));
    size_t kept = 0;
    for (unsigned i = 0; i < 10; i++) {
        ts_rig_load(&r, i * N, N);
        assert_int_equal(strspn(r.text, ".-"), N);
        for (size_t k = 0; k < N; k++)
            kept += r.text[k] == '.';
    }
    assert_true(kept >= 15); /* shrunk, not emptied */
    ts_rig_close(&r);
}

/* Segments are made smaller to fit; what cannot hold one block is refused at once. */
static void test_a_capacity_of_one_block(void **state)
{
    struct ts_opts o = opts_at(state, ts_dir());
    struct ts_rig r;

    ts_opt(&o, "posix_capacity_gb", "0.0001"); /* 107 kB */
    assert_int_equal(ts_rig_open(&r, &o), -EINVAL);
    TS_ASSERT_WORDS(r.why, "posix_capacity_gb", "0.0001", "65536", "give at least");
    ts_opt(&o, "posix_capacity_gb", "0.0004"); /* 430 kB */
    r = ts_rig_sure(&o);
    for (unsigned i = 0; i < 5; i++) {
        assert_string_equal(ts_rig_dump(&r, i, 1), ".");
        assert_string_equal(ts_rig_load(&r, i, 1), ".");
    }
    ts_rig_close(&r);
}

/* What is used stays, what is not goes: the tails of chains before their heads. */
static void test_eviction_takes_tails_first(void **state)
{
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);

    ts_opt(&o, "store_pipeline", "Posix");
    ts_opt(&o, "posix_capacity_gb", "%.9f", 2.0 / 1024); /* 30 blocks */
    struct ts_rig r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_dump(&r, 0, 24), ts_all('.', 24)); /* one chain, depths 0 to 23 */
    assert_string_equal(ts_rig_dump(&r, 100, 10), ts_all('.', 10));
    ts_rig_load(&r, 0, 24);
    size_t head = strspn(r.text, ".");
    assert_true(head >= 10 && head < 24);
    assert_int_equal(strspn(r.text + head, "-"), 24 - head); /* cut at the end, not holed */
    ts_rig_close(&r);
}

/* What a lookup has found is there for the load that follows, whatever is dumped in between. */
static void test_a_lookup_holds_what_it_found(void **state)
{
    enum { FOUND = 12 };
    const struct ts_stack *stack = *state;
    struct ts_opts o = ts_opts_for(stack->pipeline, stack->persists ? ts_dir() : NULL);

    if (stack->persists)
        ts_opt(&o, "posix_capacity_gb", "%.9f", 4.0 / 1024); /* about 56 blocks */
    struct ts_rig r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_dump(&r, 0, FOUND), ts_all('.', FOUND));
    assert_int_equal(strcspn(ts_rig_lookup(&r, 0, FOUND), "0"), FOUND);
    for (unsigned i = 1; i < 12; i++) {
        ts_rig_dump(&r, i * 100, 20);
        assert_int_equal(strspn(r.text, ".f"), 20);
    }
    assert_string_equal(ts_rig_load(&r, 0, FOUND), ts_all('.', FOUND));
    ts_rig_close(&r);
}

/* The bound is on the directory: what a namespace that nobody uses has left makes room. */
static void test_an_abandoned_namespace_makes_room(void **state)
{
    const char *dir = ts_dir();
    struct ts_opts o = opts_at(state, dir);
    ts_opt(&o, "posix_capacity_gb", "%.9f", 4.0 / 1024);
    struct ts_rig r = ts_rig_sure(&o);

    for (unsigned i = 0; i < 8; i++)
        ts_rig_dump(&r, i * N, N);
    ts_rig_close(&r);
    assert_true(ts_du(dir, "seg-") > 3 << 20);
    ts_opt(&o, "namespace", "the next model");
    r = ts_rig_sure(&o);
    for (unsigned i = 0; i < 4; i++)
        assert_string_equal(ts_rig_dump(&r, i * N, N), ts_all('.', N));
    assert_true(ts_du(dir, "seg-") <= 4 << 20);
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
}

int main(void)
{
    static const struct ts_case cases[] = {
        {"a missing directory", test_a_missing_directory, .needs_persist = true},
        {"not a directory", test_not_a_directory, .needs_persist = true},
        {"a path with blanks", test_a_path_with_blanks, .needs_persist = true},
        {"two directories", test_two_directories, .needs_persist = true},
        {"another user's directory", test_a_directory_of_another_user, .needs_persist = true},
        {"a read-only mount", test_a_read_only_mount, .needs_persist = true},
        {"an empty read-only mount", test_an_empty_read_only_mount, .needs_persist = true},
        {"it turns read-only", test_it_turns_read_only_while_it_runs, .needs_persist = true},
        {"a full filesystem", test_a_full_filesystem, .needs_persist = true},
        {"full for a while", test_full_for_a_while, .needs_persist = true},
        {"no inodes", test_no_inodes, .needs_persist = true},
        {"removed while it runs", test_removed_while_it_runs, .needs_persist = true},
        {"removed before a dump", test_removed_before_the_first_dump, .needs_persist = true},
        {"two start at once", test_two_start_at_once, .needs_persist = true},
        {"published is found", test_published_is_found, .needs_persist = true},
        {"restarts leave no garbage", test_restarts_leave_no_garbage, .needs_persist = true},
        {"capacity of one", test_capacity_of_one, .needs_persist = true},
        {"capacity of three", test_capacity_of_three, .needs_persist = true},
        {"a smaller capacity", test_a_smaller_capacity_at_restart, .needs_persist = true},
        {"a capacity of one block", test_a_capacity_of_one_block, .needs_persist = true},
        {"a lookup holds", test_a_lookup_holds_what_it_found, .needs_keep = true},
        {"an abandoned namespace", test_an_abandoned_namespace_makes_room, .needs_persist = true},
        {"tails go first", test_eviction_takes_tails_first, .needs_persist = true},
    };
    return ts_run_cases("backend", cases, TS_LEN(cases));
}

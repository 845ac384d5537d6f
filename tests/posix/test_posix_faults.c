/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Each operation on the disk fails once, for all of them in turn: reads, writes, syncs, and every
 * change of a name or a size.  Whatever fails, each slice ends, nothing wrong is ever loaded, and
 * the next life of the store finds only what is right and can store again.
 *
 * This program is linked with its own ucmi_io_open around the real one: the engine it returns
 * counts, and spoils operation number `fault.at`.
 */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "io/io.h"

enum kind { FAILS, FAILS_HALF_DONE, ENDS_SHORT };

static struct {
    _Atomic uint64_t at, n; /* spoil number `at`; so many there have been */
    int err;
    enum kind kind;
} fault;

struct spoiler {
    struct ucmi_io real;
    struct ucm_io *spoiled[64];
    unsigned nspoiled;
};

static bool hit(void)
{
    return atomic_fetch_add(&fault.n, 1) + 1 == atomic_load(&fault.at);
}

/* Ends the operation without the engine: done by half, or not at all. */
static void spoil(struct ucm_io *io)
{
    size_t half = io->op == UCM_IO_SYNC ? 0 : ucmi_iov_len(io->iov, io->niov) / 2, done = 0;
    for (unsigned i = 0; i < io->niov && fault.kind != FAILS && done < half; i++) {
        size_t len = io->iov[i].iov_len < half - done ? io->iov[i].iov_len : half - done;
        ssize_t n = io->op == UCM_IO_WRITEV
                        ? pwrite(io->fd, io->iov[i].iov_base, len, io->off + (off_t)done)
                        : pread(io->fd, io->iov[i].iov_base, len, io->off + (off_t)done);
        if (n < (ssize_t)len)
            break; /* O_DIRECT does not like odd halves */
        done += len;
    }
    io->res = fault.kind == ENDS_SHORT && io->op != UCM_IO_SYNC ? (ssize_t)done : fault.err;
}

static int spoiler_submit(void *state, struct ucm_io **v, unsigned n)
{
    struct spoiler *s = state;
    for (unsigned i = 0; i < n; i++) {
        if (s->nspoiled < 64 && hit()) {
            spoil(v[i]);
            s->spoiled[s->nspoiled++] = v[i];
            continue;
        }
        int took = s->real.ops->submit(s->real.state, &v[i], 1);
        if (took <= 0)
            return i ? (int)i : took;
    }
    return (int)n;
}

static int spoiler_reap(void *state, struct ucm_io **v, unsigned max, int timeout_ms)
{
    struct spoiler *s = state;
    unsigned n = s->nspoiled < max ? s->nspoiled : max;
    if (!n)
        return s->real.ops->reap(s->real.state, v, max, timeout_ms);
    memcpy(v, s->spoiled, n * sizeof *v);
    s->nspoiled -= n;
    return (int)n;
}

static void spoiler_wake(void *state)
{
    struct spoiler *s = state;
    s->real.ops->wake(s->real.state);
}

static int spoiler_file(void *state, const struct ucm_file *f)
{
    struct spoiler *s = state;
    if (f->op != UCM_FILE_CLOSE && hit())
        return fault.err;
    return ucmi_io_file(&s->real, f);
}

static void spoiler_close(void *state)
{
    struct spoiler *s = state;
    ucmi_io_close(&s->real);
}

static const struct ucm_io_ops spoiler_ops = {
    .p = {.kind = "io", .name = "spoiler", .size = sizeof(struct spoiler)},
    .close = spoiler_close,
    .submit = spoiler_submit,
    .reap = spoiler_reap,
    .wake = spoiler_wake,
    .file = spoiler_file,
};

int __real_ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                        char *why, size_t why_len);
int __wrap_ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                        char *why, size_t why_len);

int __wrap_ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                        char *why, size_t why_len)
{
    struct spoiler *s = calloc(1, sizeof *s);
    int err = __real_ucmi_io_open(&s->real, name, depth, conf, why, why_len);
    if (err < 0)
        free(s);
    else
        *io = (struct ucmi_io){.ops = &spoiler_ops, .state = s};
    return err;
}

/* ---- a life of a store ---- */

enum { BLOCKS = 40, SHARDS = 4, STEP = 5 };

static const struct shape shape = {4096, SHARDS, 2};
/* Some twenty slots: segments are made, blocks evicted. */
#define OPTIONS "posix_capacity_gb=0.0009 posix_sync=full"

static void try_dump(ucm_store *store, struct memory *m, uint64_t first)
{
    for (size_t i = 0; i < m->n; i++)
        paint(m, i, first + i);
    /* Half of them in two parts. */
    if (first / STEP % 2) {
        free(move(store, m, true, first, 0, 0).status);
        return;
    }
    ucm_key keys[STEP];
    uint32_t blocks[STEP];
    ucm_task *tasks[2];
    for (uint32_t i = 0; i < STEP; i++) {
        keys[i] = key_of(first + i);
        blocks[i] = i;
    }
    for (unsigned part = 0; part < 2; part++) {
        struct ucm_batch batch = {.keys = keys,
                                  .blocks = blocks,
                                  .n = STEP,
                                  .shard = part * SHARDS / 2,
                                  .nshards = SHARDS / 2};
        assert_int_equal(ucm_dump(store, m->map, &batch, &tasks[part]), 0);
    }
    for (unsigned part = 0; part < 2; part++) {
        ucm_task_wait(tasks[part], UCM_RELEASED, 30000);
        assert_int_equal(ucm_task_done(tasks[part], UCM_RELEASED), 1);
        ucm_task_wait(tasks[part], UCM_STORED, 30000);
        assert_int_equal(ucm_task_done(tasks[part], UCM_STORED), 1);
        ucm_task_free(tasks[part]);
    }
}

/* What comes back without an error is right; returns how many do. */
static size_t try_load(ucm_store *store, struct memory *m, uint64_t first, unsigned shard,
                       unsigned nshards)
{
    size_t right = 0;
    smear(m);
    struct outcome out = move(store, m, false, first, shard, nshards);
    for (size_t i = 0; i < m->n; i++)
        if (out.status[i] == 0) {
            assert_true(shards_painted(m, i, first + i, shard, nshards));
            right++;
        }
    free(out.status);
    return right;
}

static void live(const char *dir)
{
    ucm_store *store;
    struct memory m;
    char text[512];
    /* Of a block that lost a shard the others wait in vain for so long. */
    if (try_open(dir, &shape, OPTIONS " timeout_ms=200", &store, text, sizeof text) < 0)
        return; /* said why */
    memory_new(&m, store, &shape, STEP);
    for (uint64_t i = 0; i < BLOCKS; i += STEP) {
        try_dump(store, &m, i);
        try_load(store, &m, i, 0, SHARDS);
        try_load(store, &m, i, 1, 2);
    }
    memory_free(&m);
    ucm_store_close(store);
}

static void count_bad(void *arg, const struct ucm_lane_info *lane)
{
    *(uint64_t *)arg += lane->bad;
}

static void afterwards(const char *dir)
{
    ucm_store *store = open_store(dir, &shape, OPTIONS);
    struct memory m;
    uint64_t bad = 0;
    struct ucm_inspect how = {.flags = UCM_INSPECT_VERIFY, .arg = &bad, .lane = count_bad};
    assert_int_equal(ucm_inspect(dir, &how), 0);
    assert_int_equal(bad, 0);
    memory_new(&m, store, &shape, 1);
    dump_all(store, &m, 1000); /* first: what lookups find is leased and makes no room */
    load_all(store, &m, 1000);
    memory_free(&m);
    memory_new(&m, store, &shape, STEP);
    for (uint64_t i = 0; i < BLOCKS; i += STEP) {
        size_t found = count_found(store, i, STEP);
        assert_int_equal(try_load(store, &m, i, 0, SHARDS), found);
    }
    memory_free(&m);
    ucm_store_close(store);
}

static void each_operation_fails_once(void **state)
{
    static const struct {
        enum kind kind;
        int err;
    } ways[] = {{FAILS, -EIO}, {FAILS, -ENOSPC}, {FAILS_HALF_DONE, -EIO}, {ENDS_SHORT, -EIO}};
    const char *dir = *state;
    char path[512];
    snprintf(path, sizeof path, "%s/ucm", dir);
    for (size_t w = 0; w < ARRAY_LEN(ways); w++) {
        fault.kind = ways[w].kind;
        fault.err = ways[w].err;
        uint64_t at = 1;
        for (;; at += w ? 3 + w : 1) { /* the rarer ways not for each */
            atomic_store(&fault.n, 0);
            atomic_store(&fault.at, at);
            if (getenv("UCMT_TRACE"))
                print_message("# way %zu, operation %llu\n", w, (unsigned long long)at);
            live(dir);
            uint64_t n = atomic_load(&fault.n);
            atomic_store(&fault.at, UINT64_MAX);
            if (n < at)
                break;
            afterwards(dir);
            remove_tree(path);
        }
        assert_true(at > 100); /* a life has many operations */
    }
}

/* In memory: there are thousands of syncs. */
static int make_fast_dir(void **state)
{
    setenv("UCMT_DIR", "/dev/shm", 0);
    return make_dir(state);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_fast_dir, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(each_operation_fails_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

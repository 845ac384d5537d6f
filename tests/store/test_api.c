/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contract of ucm.h, call by call: what is refused and how it is said, what a task promises.
 * The same over every stack; test_roundtrip.c looks at the bytes.
 */
#include <errno.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "support.h"

enum { SHARDS = 16, SHARD = 4096, N = 8 };

static struct ts_rig rig_of(void **state)
{
    struct ts_opts o = ts_opts_of(*state);
    return ts_rig_sure(&o);
}

/* ---- without a stack ---- */

static void test_null_is_accepted(void **state)
{
    ucm_conf_free(NULL);
    ucm_store_close(NULL);
    ucm_map_free(NULL);
    ucm_task_free(NULL);
    ucm_task_cancel(NULL);
    ucm_prefetch(NULL, NULL, 3);
    assert_int_equal(ucm_task_done(NULL, UCM_STORED), 0);
}

static void test_null_is_refused(void **state)
{
    ucm_conf *conf;
    ucm_store *store = NULL;

    assert_int_equal(ucm_conf_new(NULL), -EINVAL);
    assert_int_equal(ucm_store_open(NULL, &store), -EINVAL);
    assert_int_equal(ucm_conf_new(&conf), 0);
    assert_int_equal(ucm_store_open(conf, NULL), -EINVAL);
    assert_int_equal(ucm_conf_set(conf, NULL, "1"), -EINVAL);
    assert_int_equal(ucm_conf_set(conf, "rank", NULL), -EINVAL);
    assert_int_equal(ucm_conf_set(NULL, "rank", "1"), -EINVAL);
    assert_int_equal(ucm_task_wait(NULL, UCM_STORED, 0), -EINVAL);
    assert_int_equal(ucm_task_wait_shard(NULL, 0, 0), -EINVAL);
    assert_int_equal(ucm_task_status(NULL, 0), -EINVAL);
    assert_int_equal(ucm_lookup(NULL, NULL, 0, NULL), -EINVAL);
    assert_int_equal(ucm_lookup_prefix(NULL, NULL, 0), -EINVAL);
    assert_int_equal(ucm_removed(NULL, NULL, 0, &(uint64_t){0}), -EINVAL);
    assert_null(store);
    ucm_conf_free(conf);
}

static void test_every_error_has_words(void **state)
{
#define X(name, text)                                                                              \
    assert_string_equal(ucm_strerror(name), text);                                                 \
    assert_string_equal(ucm_strerror(-name), text);
    UCM_ERRORS(X)
#undef X
    assert_string_equal(ucm_strerror(-EACCES), strerror(EACCES));
    assert_string_equal(ucm_version(), UCM_VERSION);
}

/* What is set wrongly on top of a working rig, the error, and the words a user must find. */
struct wrong {
    const char *key, *value;
    int err;
    const char *words[5];
};
static const struct wrong wrongs[] = {
    {"block_size", "0", -EINVAL, {"block_size", "0", "give"}},
    {"shard_size", "3000", -EINVAL, {"shard_size", "3000", "65536", "480"}},
    {"shard_size", "64", -EINVAL, {"shard_size", "64", "65536", "at most 480"}},
    {"rank", "1", -EINVAL, {"rank", "1", "below ranks"}},
    {"rank", "-1", -EINVAL, {"rank", "-1", "0"}},
    {"ranks", "0", -EINVAL, {"ranks", "0", "1"}},
    {"ranks", "two", -EINVAL, {"ranks", "two"}},
    {"block_sise", "4096", -EINVAL, {"block_sise", "block_size"}},
    {"store_pipeline", "Cash|Posix", -EINVAL, {"store_pipeline", "Cash", "Cache"}},
    {"store_pipeline", "", -EINVAL, {"store_pipeline", "Cache", "Posix"}},
    {"store_pipeline", "Fake||Empty", -EINVAL, {"store_pipeline", "Fake||Empty", "Posix"}},
    {"store_pipeline", "Fake|", -EINVAL, {"store_pipeline", "Fake|", "Posix"}},
    {"store_pipeline", "Cache", -EINVAL, {"store_pipeline", "Cache|Empty"}},
    {"store_pipeline", "Posix|Cache", -EINVAL, {"store_pipeline", "Posix|Cache", "Empty"}},
    {"store_pipeline", "Fake|Fake|Fake|Fake|Fake", -EINVAL, {"store_pipeline", "4 tiers"}},
    {"device", "abacus", -ENODEV, {"device", "abacus", "host"}},
};

static void test_wrong_options_are_explained(void **state)
{
    for (size_t i = 0; i < TS_LEN(wrongs); i++) {
        struct ts_opts o = ts_opts_for("Fake", NULL);
        struct ts_rig r;
        ts_opt(&o, wrongs[i].key, "%s", wrongs[i].value);
        int err = ts_rig_open(&r, &o);
        if (err != wrongs[i].err)
            fail_msg("%s=%s: %d, not %d", wrongs[i].key, wrongs[i].value, err, wrongs[i].err);
        ts_assert_words(r.why, wrongs[i].words);
        assert_null(r.store);
    }
}

static void test_storage_needs_a_directory(void **state)
{
    struct ts_opts o = ts_opts_for("Posix", "");
    struct ts_rig r;

    assert_int_equal(ts_rig_open(&r, &o), -EINVAL);
    TS_ASSERT_WORDS(r.why, "storage_backends", "directory");
}

static void test_a_device_out_of_reach_needs_a_cache(void **state)
{
    struct ts_opts o = ts_opts_for("Posix", ts_dir());
    struct ts_rig r;

    ts_opt(&o, "device", "sim");
    assert_int_equal(ts_rig_open(&r, &o), -EINVAL);
    TS_ASSERT_WORDS(r.why, "store_pipeline", "Posix", "sim", "Cache|Posix");
}

static void test_a_failed_open_writes_nothing(void **state)
{
    ucm_store *store = (ucm_store *)0x5a5a;
    ucm_conf *conf;

    assert_int_equal(ucm_conf_new(&conf), 0);
    assert_int_equal(ucm_conf_set(conf, "store_pipeline", "Nothing"), 0);
    assert_int_equal(ucm_conf_set(conf, "block_size", "4096"), 0);
    assert_int_equal(ucm_store_open(conf, &store), -EINVAL);
    assert_ptr_equal(store, (ucm_store *)0x5a5a);
    /* and the conf is as good as before */
    assert_int_equal(ucm_conf_set(conf, "store_pipeline", "Empty"), 0);
    assert_int_equal(ucm_store_open(conf, &store), 0);
    ucm_store_close(store);
    ucm_conf_free(conf);
}

/* ---- opening ---- */

static void test_conf_may_go(void **state)
{
    struct ts_rig r = rig_of(state);
    const struct ts_stack *stack = *state;

    ucm_conf_free(r.conf);
    r.conf = NULL;
    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_lookup(&r, 0, N), ts_all(stack->knows ? '1' : '0', N));
    ts_rig_close(&r);
}

static void test_two_stores_share(void **state)
{
    struct ts_opts o = ts_opts_of(*state);
    struct ts_rig a = ts_rig_sure(&o), b = ts_rig_sure(&o);

    assert_string_equal(ts_rig_dump(&a, 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_load(&b, 0, N), ts_all('.', N));
    ts_rig_close(&a);
    assert_string_equal(ts_rig_load(&b, 0, N), ts_all('.', N));
    ts_rig_close(&b);
}

static void test_namespaces_do_not_share(void **state)
{
    struct ts_opts o = ts_opts_of(*state), other = o, cut = o;
    ts_opt(&other, "namespace", "another model");
    ts_opt(&cut, "shard_size", "8192");
    struct ts_rig a = ts_rig_sure(&o), b = ts_rig_sure(&other), c = ts_rig_sure(&cut);

    assert_string_equal(ts_rig_dump(&a, 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_lookup(&b, 0, N), ts_all('0', N));
    assert_string_equal(ts_rig_load(&b, 0, N), ts_all('-', N));
    assert_string_equal(ts_rig_load(&c, 0, N), ts_all('-', N));
    ts_rig_close(&a);
    ts_rig_close(&b);
    ts_rig_close(&c);
}

static void test_a_hit_needs_every_rank(void **state)
{
    struct ts_opts o = ts_opts_of(*state), o1;
    ts_opt(&o, "ranks", "2");
    o1 = o;
    ts_opt(&o1, "rank", "1");
    struct ts_rig a = ts_rig_sure(&o), b = ts_rig_sure(&o1);

    assert_string_equal(ts_rig_dump(&a, 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_lookup(&a, 0, N), ts_all('0', N));
    assert_string_equal(ts_rig_load(&b, 0, N), ts_all('-', N)); /* not rank 0's bytes */
    assert_string_equal(ts_rig_dump(&b, 0, N / 2), ts_all('.', N / 2));
    ts_rig_lookup(&a, 0, N);
    for (size_t i = 0; i < N; i++)
        assert_int_equal(a.text[i] != '0', i < N / 2);
    ucm_key keys[N];
    for (size_t i = 0; i < N; i++)
        keys[i] = ts_key(i);
    assert_int_equal(ucm_lookup_prefix(b.store, keys, N), N / 2);
    ts_rig_close(&a);
    ts_rig_close(&b);
}

/* ---- lookups ---- */

static void test_lookup_arguments(void **state)
{
    struct ts_rig r = rig_of(state);
    ucm_key key = ts_key(0);
    uint8_t found;

    assert_int_equal(ucm_lookup(r.store, NULL, 0, NULL), 0);
    assert_int_equal(ucm_lookup_prefix(r.store, NULL, 0), 0);
    assert_int_equal(ucm_lookup(r.store, NULL, 1, &found), -EINVAL);
    assert_int_equal(ucm_lookup(r.store, &key, 1, NULL), -EINVAL);
    assert_int_equal(ucm_lookup_prefix(r.store, NULL, 1), -EINVAL);
    assert_int_equal(ucm_lookup(r.store, &key, SIZE_MAX, &found), -EINVAL);
    assert_int_equal(ucm_lookup_prefix(r.store, &key, SIZE_MAX), -EINVAL);
    ucm_prefetch(r.store, NULL, 1);
    ucm_prefetch(r.store, &key, 0);
    ucm_prefetch(r.store, &key, 1);
    assert_int_equal(ucm_lookup(r.store, &key, 1, &found), 0);
    ts_rig_close(&r);
}

static void test_lookup_is_exact(void **state)
{
    struct ts_rig r = rig_of(state);
    ucm_key keys[600];

    assert_string_equal(ts_rig_dump(&r, 1, 7), ts_all('.', 7));
    assert_string_equal(ts_rig_lookup(&r, 0, 9), "011111110");
    for (size_t i = 0; i < 600; i++)
        keys[i] = ts_key(i);
    assert_int_equal(ucm_lookup_prefix(r.store, keys, 8), 0); /* block 0 is missing */
    assert_int_equal(ucm_lookup_prefix(r.store, keys + 1, 599), 7);
    for (size_t i = 0; i < 600; i++) /* more than any step */
        keys[i] = ts_key(1 + i % 7);
    assert_int_equal(ucm_lookup_prefix(r.store, keys, 600), 600);
    keys[511] = ts_key(99);
    assert_int_equal(ucm_lookup_prefix(r.store, keys, 600), 511);
    ts_rig_close(&r);
}

/* ---- maps ---- */

static void test_map_arguments(void **state)
{
    struct ts_rig r = rig_of(state);
    static uint8_t mem[SHARD];
    struct ucm_seg segs[SHARDS * 2], was[SHARDS * 2];
    ucm_map *map = (ucm_map *)0x5a5a;
    struct ucm_map_desc good = {segs, SHARDS, 2, 1, 1}, d = good;

    for (unsigned i = 0; i < SHARDS * 2; i++)
        segs[i] = (struct ucm_seg){mem, SHARD, SHARD / 2};
    memcpy(was, segs, sizeof was);
#define REFUSED(change)                                                                            \
    do {                                                                                           \
        change;                                                                                    \
        assert_int_equal(ucm_map_new(r.store, &d, &map), -EINVAL);                                 \
        d = good;                                                                                  \
        memcpy(segs, was, sizeof was);                                                             \
    } while (0)
    assert_int_equal(ucm_map_new(NULL, &d, &map), -EINVAL);
    assert_int_equal(ucm_map_new(r.store, NULL, &map), -EINVAL);
    assert_int_equal(ucm_map_new(r.store, &d, NULL), -EINVAL);
    REFUSED(d.segs = NULL);
    REFUSED(d.nshards = 0);
    REFUSED(d.nshards = SHARDS - 1);
    REFUSED(d.nshards = SHARDS + 1);
    REFUSED(d.nsegs = 0);
    REFUSED(d.nsegs = UINT_MAX);
    REFUSED(d.blocks_per_key = 0);
    REFUSED(d.blocks_per_key = 2); /* then a shard has twice the bytes */
    REFUSED(d.blocks_per_key = UINT_MAX);
    REFUSED(segs[5].len--);
    REFUSED(segs[5].len++);
    REFUSED(segs[SHARDS * 2 - 1].len = 0);
    REFUSED(segs[0].len = SIZE_MAX);
    REFUSED(segs[0].len = SIZE_MAX; segs[1].len = SHARD + 1); /* adds up when it wraps */
    REFUSED(segs[3].base = NULL);
#undef REFUSED
    assert_ptr_equal(map, (ucm_map *)0x5a5a);
    segs[0] = (struct ucm_seg){NULL, 0, 0}; /* a segment left out */
    segs[1].len = SHARD;
    assert_int_equal(ucm_map_new(r.store, &d, &map), 0);
    ucm_map_free(map);
    ts_rig_close(&r);
}

/* ---- loads and dumps: what is refused ---- */

static void test_batch_arguments(void **state)
{
    struct ts_rig r = rig_of(state), other = rig_of(state);
    ucm_key keys[2] = {ts_key(0), ts_key(1)};
    uint32_t blocks[2] = {0, 1};
    ucm_task *task = (ucm_task *)0x5a5a;
    struct ucm_batch good = {.keys = keys, .blocks = blocks, .n = 2}, b = good;

#define REFUSED(change)                                                                            \
    do {                                                                                           \
        change;                                                                                    \
        assert_int_equal(ucm_dump(r.store, r.mem.map, &b, &task), -EINVAL);                        \
        assert_int_equal(ucm_load(r.store, r.mem.map, &b, &task), -EINVAL);                        \
        b = good;                                                                                  \
        blocks[1] = 1;                                                                             \
    } while (0)
    assert_int_equal(ucm_dump(NULL, r.mem.map, &b, &task), -EINVAL);
    assert_int_equal(ucm_dump(r.store, NULL, &b, &task), -EINVAL);
    assert_int_equal(ucm_dump(r.store, r.mem.map, NULL, &task), -EINVAL);
    assert_int_equal(ucm_dump(r.store, r.mem.map, &b, NULL), -EINVAL);
    assert_int_equal(ucm_load(NULL, r.mem.map, &b, &task), -EINVAL);
    assert_int_equal(ucm_load(r.store, NULL, &b, &task), -EINVAL);
    assert_int_equal(ucm_load(r.store, r.mem.map, NULL, &task), -EINVAL);
    assert_int_equal(ucm_load(r.store, r.mem.map, &b, NULL), -EINVAL);
    assert_int_equal(ucm_dump(r.store, other.mem.map, &b, &task), -EINVAL);
    REFUSED(b.keys = NULL);
    REFUSED(b.blocks = NULL);
    REFUSED(blocks[1] = r.mem.nblocks);
    REFUSED(blocks[1] = UINT32_MAX);
    REFUSED(b.shard = SHARDS);
    REFUSED(b.shard = UINT_MAX);
    REFUSED(b.nshards = SHARDS + 1);
    REFUSED(b.nshards = UINT_MAX);
    REFUSED((b.shard = 1, b.nshards = SHARDS));
    REFUSED((b.shard = 1, b.nshards = UINT_MAX));
    REFUSED(b.n = SIZE_MAX);
#undef REFUSED
    assert_ptr_equal(task, (ucm_task *)0x5a5a);
    assert_string_equal(ts_rig_lookup(&r, 0, 2), "00");
    ts_rig_close(&r);
    ts_rig_close(&other);
}

static void test_sg_arguments(void **state)
{
    struct ts_rig r = rig_of(state);
    static uint8_t mem[2 * SHARD + 1];
    struct iovec iov[3] = {{mem, SHARD}, {mem + SHARD, SHARD}, {mem, SIZE_MAX}};
    struct ucm_sg good = {.key = ts_key(0), .shard = 3, .nshards = 2, .niov = 2, .iov = iov};
    struct ucm_sg sg = good;
    ucm_task *task = (ucm_task *)0x5a5a;

#define REFUSED(change)                                                                            \
    do {                                                                                           \
        change;                                                                                    \
        assert_int_equal(ucm_dump_sg(r.store, &sg, 1, NULL, &task), -EINVAL);                      \
        assert_int_equal(ucm_load_sg(r.store, &sg, 1, NULL, &task), -EINVAL);                      \
        sg = good;                                                                                 \
        iov[1] = (struct iovec){mem + SHARD, SHARD};                                               \
    } while (0)
    assert_int_equal(ucm_dump_sg(NULL, &sg, 1, NULL, &task), -EINVAL);
    assert_int_equal(ucm_dump_sg(r.store, NULL, 1, NULL, &task), -EINVAL);
    assert_int_equal(ucm_dump_sg(r.store, &sg, 1, NULL, NULL), -EINVAL);
    REFUSED(sg.nshards = 0);
    REFUSED(sg.nshards = 1);
    REFUSED(sg.nshards = 3);
    REFUSED(sg.nshards = UINT32_MAX);
    REFUSED(sg.shard = SHARDS - 1);
    REFUSED(sg.shard = SHARDS);
    REFUSED(sg.shard = UINT32_MAX);
    REFUSED(sg.niov = 0);
    REFUSED(sg.niov = 1);
    REFUSED(sg.niov = 3);
    REFUSED(sg.iov = NULL);
    REFUSED(iov[1].iov_len--);
    REFUSED(iov[1].iov_len++);
    REFUSED(iov[1].iov_base = NULL);
#undef REFUSED
    assert_ptr_equal(task, (ucm_task *)0x5a5a);
    assert_int_equal(ucm_load_sg(r.store, NULL, 0, NULL, &task), 0);
    assert_int_equal(ucm_task_wait(task, UCM_STORED, 0), 0);
    ucm_task_free(task);
    ts_rig_close(&r);
}

/* ---- metrics ---- */

static void see_metric(void *arg, const struct ucm_metric_info *m)
{
    size_t *n = arg;
    assert_true(m->name[0] && m->help[0]);
    assert_true(!strcmp(m->kind, "counter") || !strcmp(m->kind, "gauge"));
    (*n)++;
}

static void test_metrics_count(void **state)
{
    struct ts_rig r = rig_of(state);
    size_t n = 0;

    ucm_metrics(NULL, see_metric, &n);
    ucm_metrics(r.store, NULL, NULL);
    assert_int_equal(n, 0);
    ucm_metrics(r.store, see_metric, &n);
    assert_true(n > 10);
    ts_rig_dump(&r, 0, N);
    ts_rig_lookup(&r, 0, 2 * N);
    assert_int_equal(ts_metric(r.store, "dump_blocks_total"), N);
    assert_int_equal(ts_metric(r.store, "dump_bytes_total"), N * SHARDS * SHARD);
    assert_int_equal(ts_metric(r.store, "lookup_keys_total"), 2 * N);
    assert_int_equal(ts_metric(r.store, "lookup_hits_total"),
                     ((const struct ts_stack *)*state)->knows ? N : 0);
    ts_rig_close(&r);
}

int main(void)
{
    static const struct ts_case cases[] = {
        {"null is accepted", test_null_is_accepted, .alone = true},
        {"null is refused", test_null_is_refused, .alone = true},
        {"every error has words", test_every_error_has_words, .alone = true},
        {"wrong options are explained", test_wrong_options_are_explained, .alone = true},
        {"storage needs a directory", test_storage_needs_a_directory, .alone = true},
        {"a device out of reach needs a cache", test_a_device_out_of_reach_needs_a_cache,
         .alone = true},
        {"a failed open writes nothing", test_a_failed_open_writes_nothing, .alone = true},
        {"conf may go", test_conf_may_go},
        {"two stores share", test_two_stores_share, .needs_keep = true},
        {"namespaces do not share", test_namespaces_do_not_share, .needs_keep = true},
        {"a hit needs every rank", test_a_hit_needs_every_rank, .needs_keep = true},
        {"lookup arguments", test_lookup_arguments},
        {"lookup is exact", test_lookup_is_exact, .needs_keep = true},
        {"map arguments", test_map_arguments},
        {"batch arguments", test_batch_arguments},
        {"sg arguments", test_sg_arguments},
        {"metrics count", test_metrics_count},
    };
    return ts_run_cases("api", cases, TS_LEN(cases));
}

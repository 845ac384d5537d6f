/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What goes in comes out: every stack, engine, device (of vendors three, by fakes) and io_direct,
 * with random sizes (odd ones too), random maps (several segments, some of no length, several
 * engine blocks a key, guard bytes between) and another map for the way back, whole batches, one
 * task a layer, runs of shards, explicit addresses, and restarts in between.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "support.h"

enum { MAX_BLOCK = 1 << 20, MAX_N = 24 };

struct row {
    const char *pipeline, *engine, *device;
    bool direct;
};
static const struct row rows[] = {
    {"Posix", "psync", "host", false},
    {"Posix", "psync", "host", true},
    {"Posix", "aio", "host", false},
    {"Posix", "aio", "host", true},
    {"Posix", "io_uring", "host", false},
    {"Posix", "io_uring", "host", true},
    {"Cache|Posix", "psync", "host", false},
    {"Cache|Posix", "psync", "host", true},
    {"Cache|Posix", "psync", "sim", false},
    {"Cache|Posix", "psync", "sim", true},
    {"Cache|Posix", "aio", "host", false},
    {"Cache|Posix", "aio", "host", true},
    {"Cache|Posix", "aio", "sim", false},
    {"Cache|Posix", "aio", "sim", true},
    {"Cache|Posix", "io_uring", "host", false},
    {"Cache|Posix", "io_uring", "host", true},
    {"Cache|Posix", "io_uring", "sim", false},
    {"Cache|Posix", "io_uring", "sim", true},
    {"Cache|Empty", NULL, "host", false},
    {"Cache|Empty", NULL, "sim", false},
    {"Cache|Posix", "io_uring", "cuda", true},
    {"Cache|Posix", "psync", "ascend", false},
    {"Cache|Posix", "aio", "musa", true},
    {"Cache|Empty", NULL, "cuda", false},
    {"Cache|Empty", NULL, "ascend", false},
};

struct trial {
    uint64_t *rnd;
    const struct row *row;
    size_t shard_size, n;
    unsigned nshards;
    uint64_t from;
    struct ts_opts o;
    ucm_store *store;
    struct ts_mem mem;
    char log[512]; /* what was done, for a failure */
};

static void say(struct trial *t, const char *fmt, ...)
{
    size_t len = strlen(t->log);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(t->log + len, sizeof t->log - len, fmt, ap);
    va_end(ap);
}

static void choose_sizes(struct trial *t)
{
    static const size_t sizes[] = {1, 2, 7, 64, 513, 1000, 4095, 4096, 4097, 8192, 16384, 65536};
    static const unsigned counts[] = {1, 2, 3, 7, 16, 32, 61, 480};
    uint64_t *rnd = t->rnd;

    t->shard_size =
        ts_below(rnd, 4) ? sizes[ts_below(rnd, TS_LEN(sizes))] : 1 + ts_below(rnd, 40000);
    do
        t->nshards = counts[ts_below(rnd, TS_LEN(counts))];
    while (t->nshards * t->shard_size > MAX_BLOCK);
    t->n = 1 + ts_below(rnd, MAX_N);
    say(t, "%u shards of %zu, %zu keys;", t->nshards, t->shard_size, t->n);
}

/* Any shape whose segments add up to the shard. */
static struct ts_shape choose_shape(struct trial *t)
{
    uint64_t *rnd = t->rnd;
    struct ts_shape sh = {.nsegs = 1 + (unsigned)ts_below(rnd, 4), .blocks_per_key = 1};

    for (unsigned k = (unsigned)ts_below(rnd, 9); k > 1; k--)
        if (t->shard_size % k == 0) {
            sh.blocks_per_key = k;
            break;
        }
    size_t left = t->shard_size / sh.blocks_per_key;
    for (unsigned i = 0; i + 1 < sh.nsegs; i++) {
        sh.len[i] = ts_below(rnd, 3) ? ts_below(rnd, left + 1) : 0;
        left -= sh.len[i];
    }
    sh.len[sh.nsegs - 1] = left;
    sh.pad = ts_below(rnd, 2) ? ts_below(rnd, 100) : 0;
    sh.skew = ts_below(rnd, 2) ? ts_below(rnd, 600) : 0;
    sh.joined = ts_below(rnd, 2);
    say(t, " %u segments x %u blocks%s pad %zu skew %zu:", sh.nsegs, sh.blocks_per_key,
        sh.joined ? " joined" : "", sh.pad, sh.skew);
    return sh;
}

static void open_store(struct trial *t)
{
    ucm_conf *conf;
    char why[512];
    char *line, *rest = NULL, text[sizeof t->o.text];

    assert_int_equal(ucm_conf_new(&conf), 0);
    strcpy(text, t->o.text);
    for (line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char *value = strchr(line, '=');
        *value++ = 0;
        if (ucm_conf_set(conf, line, value))
            fail_msg("%s", ucm_conf_error(conf));
    }
    int err = ucm_store_open(conf, &t->store);
    snprintf(why, sizeof why, "%s", ucm_conf_error(conf));
    ucm_conf_free(conf);
    if (err)
        fail_msg("%s: %s", t->log, why);
}

static void new_memory(struct trial *t)
{
    struct ts_shape shape = choose_shape(t);
    shape.device = t->row->device;
    int err = ts_mem_new(&t->mem, t->store, t->shard_size, t->nshards, &shape, t->n);
    if (err)
        fail_msg("%s: ucm_map_new: %d", t->log, err);
}

/* The same with explicit addresses: the shards of each entry cut into pieces at random. */
static void run_sg(struct trial *t, bool dump, unsigned shard, unsigned nshards, char *text)
{
    enum { PIECES = 20 };
    size_t bytes = nshards * t->shard_size;
    const struct ts_device *device = ts_device(t->row->device);
    struct ts_bytes mem = ts_bytes_new(device, t->n * bytes);
    struct iovec *iov = calloc(t->n * PIECES, sizeof *iov);
    struct ucm_sg *v = calloc(t->n, sizeof *v);
    ucm_task *task;

    assert_true(iov && v);
    for (size_t i = 0; i < t->n; i++) {
        uint8_t *at = mem.at + i * bytes, *view = mem.view + i * bytes;
        ucm_key key = ts_key(t->from + i);
        unsigned k = 0;
        for (unsigned s = 0; dump && s < nshards; s++)
            ts_fill(&key, shard + s, 0, view + s * t->shard_size, t->shard_size);
        for (size_t left = bytes; left; k++) {
            size_t len = k == PIECES - 1 ? left : ts_below(t->rnd, left + 1);
            iov[i * PIECES + k] = (struct iovec){len ? at : NULL, len};
            at += len;
            left -= len;
        }
        v[i] = (struct ucm_sg){key, (uint32_t)i, shard, nshards, k, &iov[i * PIECES]};
    }
    int err = dump ? ucm_dump_sg(t->store, v, t->n, NULL, &task)
                   : ucm_load_sg(t->store, v, t->n, NULL, &task);
    assert_int_equal(err, 0);
    ucm_task_wait(task, UCM_STORED, TS_WAIT_MS);
    assert_int_equal(ucm_task_done(task, UCM_STORED), 1);
    for (size_t i = 0; i < t->n; i++) {
        text[i] = ts_letter(ucm_task_status(task, i));
        for (unsigned s = 0; text[i] == '.' && s < nshards; s++)
            if (ts_check(&v[i].key, shard + s, 0, mem.view + i * bytes + s * t->shard_size,
                         t->shard_size) != t->shard_size)
                text[i] = 'W';
    }
    text[t->n] = 0;
    ucm_task_free(task);
    ts_bytes_free(device, &mem);
    free(iov);
    free(v);
}

static void expect(struct trial *t, const char *text, char c)
{
    if (strcmp(text, ts_all(c, t->n)))
        fail_msg("%s %s: %s not %s", t->row->pipeline, t->log, text, ts_all(c, t->n));
}

static void dump_somehow(struct trial *t)
{
    struct ts_op op = {.dump = true, .from = t->from, .n = t->n};
    char text[MAX_N + 1];

    switch (ts_below(t->rnd, 3)) {
    case 0:
        say(t, " dump");
        ts_run(t->store, &t->mem, &op, text);
        break;
    case 1:
        say(t, " dump by layers");
        op.layers = 1 + ts_below(t->rnd, 1000);
        ts_run(t->store, &t->mem, &op, text);
        break;
    default: say(t, " dump_sg"); run_sg(t, true, 0, t->nshards, text);
    }
    expect(t, text, '.');
}

static void load_somehow(struct trial *t)
{
    struct ts_op op = {.from = t->from, .n = t->n};
    char text[MAX_N + 1];

    op.shard = ts_below(t->rnd, 2) ? 0 : (unsigned)ts_below(t->rnd, t->nshards);
    op.nshards = op.shard ? 1 + (unsigned)ts_below(t->rnd, t->nshards - op.shard) : t->nshards;
    op.group = ts_below(t->rnd, 2) ? 0 : 1 + (unsigned)ts_below(t->rnd, t->nshards);
    say(t, " load %u+%u by %u", op.shard, op.nshards, op.group);
    if (ts_below(t->rnd, 3))
        ts_run(t->store, &t->mem, &op, text);
    else
        run_sg(t, false, op.shard, op.nshards, text);
    expect(t, text, '.');
}

static void look_around(struct trial *t, bool all_fast)
{
    ucm_key keys[MAX_N + 2];
    char text[MAX_N + 3];

    ts_lookup(t->store, t->from - 1, t->n + 2, text);
    if (text[0] != '0' || text[t->n + 1] != '0' || strcspn(text + 1, "0") != t->n)
        fail_msg("%s: lookup finds %s of %zu", t->log, text, t->n);
    if (all_fast && strspn(text + 1, "1") != t->n)
        fail_msg("%s: lookup finds %s, not all in the first tier", t->log, text);
    for (size_t i = 0; i < t->n + 2; i++)
        keys[i] = ts_key(t->from + i);
    assert_int_equal(ucm_lookup_prefix(t->store, keys, t->n + 2), t->n);
    keys[0] = ts_key(t->from - 1);
    assert_int_equal(ucm_lookup_prefix(t->store, keys, t->n + 2), 0);
}

static void close_store(struct trial *t)
{
    ts_mem_free(&t->mem);
    ucm_store_close(t->store);
}

static void one_trial(const struct row *row, uint64_t *rnd)
{
    static const char *const syncs[] = {"none", "data", "full"};
    struct trial t = {.rnd = rnd, .row = row, .from = 1 + ts_below(rnd, 1u << 30)};
    bool posix = strstr(row->pipeline, "Posix"), cache = strstr(row->pipeline, "Cache");
    const char *dir = posix ? ts_dir() : NULL;

    choose_sizes(&t);
    t.o = ts_opts_for(row->pipeline, dir);
    ts_opt(&t.o, "block_size", "%zu", t.nshards * t.shard_size);
    ts_opt(&t.o, "shard_size", "%zu", t.shard_size);
    ts_opt(&t.o, "device", "%s", row->device);
    ts_opt(&t.o, "device_id", "%d", ts_device(row->device)->id);
    if (posix) {
        ts_opt(&t.o, "posix_io_engine", "%s", row->engine);
        ts_opt(&t.o, "io_direct", "%s", row->direct ? "true" : "false");
        ts_opt(&t.o, "posix_segment_mb", "4");
        if (!ts_below(rnd, 4))
            ts_opt_key(&t.o, dir);
        ts_opt(&t.o, "posix_sync", "%s", syncs[ts_below(rnd, 8) % TS_LEN(syncs)]);
    }
    if (cache) { /* room for what is dumped, were it all in two sets */
        ts_opt(&t.o, "cache_buffer_capacity_gb", "%.9f",
               64.0 * ((double)(t.nshards * t.shard_size) + 8192) / (1 << 30));
        ts_opt(&t.o, "share_buffer_enable", "%s", ts_below(rnd, 4) ? "true" : "false");
    }
    open_store(&t);
    new_memory(&t);
    dump_somehow(&t);
    look_around(&t, true);
    load_somehow(&t);
    close_store(&t);
    if (posix) {
        say(&t, " restart");
        open_store(&t);
        new_memory(&t);
        look_around(&t, !cache);
        load_somehow(&t);
        load_somehow(&t);
        dump_somehow(&t); /* once more: it is there already */
        load_somehow(&t);
        close_store(&t);
        ts_remove(dir);
    }
}

static void test_row(void **state)
{
    uint64_t seed = ts_seed(), rnd = seed;
    uint64_t until = ts_now_ms() + (uint64_t)(ts_seconds(16) * 1000 / TS_LEN(rows));

    do
        one_trial(*state, &rnd);
    while (ts_now_ms() < until);
}

/* ---- more than the pool can hold ---- */

enum { LONG = 256 }; /* 16 MiB through 8 MiB */

static void test_a_request_longer_than_the_pool(void **state)
{
    struct ts_opts o = ts_opts_for("Cache|Posix", ts_dir());
    struct ts_rig r;

    ts_opt(&o, "@entries", "%d", LONG);
    assert_int_equal(ts_rig_open(&r, &o), 0);
    assert_true(ts_metric(r.store, "cache_slots") < LONG);
    assert_string_equal(ts_rig_dump(&r, 0, LONG), ts_all('.', LONG));
    assert_string_equal(ts_rig_load(&r, 0, LONG), ts_all('.', LONG));
    ts_run(r.store, &r.mem, &(struct ts_op){.from = 0, .n = LONG, .group = 3}, r.text);
    assert_string_equal(r.text, ts_all('.', LONG));
    ts_rig_close(&r);
    assert_int_equal(ts_rig_open(&r, &o), 0);
    assert_string_equal(ts_rig_load(&r, 0, LONG), ts_all('.', LONG));
    ts_rig_close(&r);
}

static void test_a_request_longer_than_a_pool_alone(void **state)
{
    struct ts_opts o = ts_opts_for("Cache|Empty", NULL);
    struct ts_rig r;
    char found[LONG + 1];

    ts_opt(&o, "@entries", "%d", LONG);
    assert_int_equal(ts_rig_open(&r, &o), 0);
    ts_rig_dump(&r, 0, LONG);
    assert_int_equal(strspn(r.text, ".f"),
                     LONG); /* kept for a while, or refused: said either way */
    ts_lookup(r.store, 0, LONG, found);
    size_t kept = 0;
    for (size_t i = 0; i < LONG; i++) {
        if (found[i] == '0')
            continue;
        assert_string_equal(ts_rig_load(&r, i, 1), ".");
        kept++;
    }
    assert_true(kept > 0 && kept <= (size_t)ts_metric(r.store, "cache_slots"));
    ts_rig_close(&r);
}

int main(void)
{
    struct CMUnitTest tests[TS_LEN(rows) + 2];
    char names[TS_LEN(rows)][64];
    size_t n = 0;

    for (; n < TS_LEN(rows); n++) {
        snprintf(names[n], sizeof names[n], "%s %s %s%s", rows[n].pipeline,
                 rows[n].engine ? rows[n].engine : "-", rows[n].device,
                 rows[n].direct ? " direct" : "");
        tests[n] = (struct CMUnitTest){names[n], test_row, NULL, NULL, (void *)&rows[n]};
    }
    tests[n++] = (struct CMUnitTest)cmocka_unit_test(test_a_request_longer_than_the_pool);
    tests[n++] = (struct CMUnitTest)cmocka_unit_test(test_a_request_longer_than_a_pool_alone);
    cmocka_set_test_filter(getenv("UCM_TEST_FILTER"));
    return _cmocka_run_group_tests("roundtrip", tests, n, NULL, NULL);
}

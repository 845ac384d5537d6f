/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Each allocation of a life of a store fails once, for all of them in turn (alloc.h): reading the
 * options, opening, dumping, looking up, loading, closing, inspecting, repairing.  What cannot be
 * done is an error or a miss; nothing wrong is loaded, nothing is kept, and the next life works.
 *
 * What the program itself needs lies in static memory: its own allocations would fail as well.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "alloc.h"
#include "support.h"

enum { BLOCKS = 12, SHARDS = 4, SHARD = 4096, BLOCK = SHARDS * SHARD };

static uint8_t memory[BLOCKS * BLOCK] __attribute__((aligned(4096)));

struct scene {
    const char *pipeline, *engine;
    const char *capacity; /* with too little of it blocks are evicted */
    unsigned rounds;      /* each dumps BLOCKS others */
};
static const struct scene scenes[] = {
    {"Posix", "psync", "0", 1},        {"Posix", "aio", "0", 1},
    {"Posix", "io_uring", "0.001", 4}, {"Cache|Posix", "io_uring", "0.001", 3},
    {"Cache|Empty", "auto", "0", 2},
};

struct life {
    const struct scene *scene;
    const char *dir, *yaml;
    bool sound;     /* no allocation is to fail */
    unsigned right; /* blocks that came back */
    char why[512];  /* the store could not be opened */
};

/* ---- a life ---- */

static int set_options(ucm_conf *conf, const struct life *l)
{
    const char *const pairs[][2] = {
        {"store_pipeline", l->scene->pipeline},
        {"storage_backends", l->dir},
        {"namespace", "memory"},
        {"block_size", "16384"},
        {"shard_size", "4096"},
        {"posix_io_engine", l->scene->engine},
        {"posix_capacity_gb", l->scene->capacity},
        {"posix_segment_mb", "1"},
        {"cache_buffer_capacity_gb", "0.001"},
        /* So long shards wait for others that could not be dumped. */
        {"timeout_ms", l->sound ? "30000" : "50"},
    };
    int err = ucm_conf_load(conf, l->yaml);
    for (size_t i = 0; i < TS_LEN(pairs) && !err; i++)
        err = ucm_conf_set(conf, pairs[i][0], pairs[i][1]);
    return err;
}

static void fill(unsigned first)
{
    for (unsigned i = 0; i < BLOCKS; i++) {
        ucm_key key = ts_key(first + i);
        for (unsigned s = 0; s < SHARDS; s++)
            ts_fill(&key, s, 0, memory + i * BLOCK + s * SHARD, SHARD);
    }
}

static bool is_right(unsigned no, unsigned at)
{
    ucm_key key = ts_key(no);
    for (unsigned s = 0; s < SHARDS; s++)
        if (ts_check(&key, s, 0, memory + at * BLOCK + s * SHARD, SHARD) != SHARD)
            return false;
    return true;
}

static void wait_for(ucm_task *task, enum ucm_stage stage)
{
    ucm_task_wait(task, stage, TS_WAIT_MS);
    if (!ucm_task_done(task, stage))
        ts_die("a task hangs");
}

static void move_blocks(struct life *l, ucm_store *store, ucm_map *map, unsigned first)
{
    ucm_key keys[BLOCKS];
    uint32_t blocks[BLOCKS];
    uint8_t found[BLOCKS];
    ucm_task *task[2] = {NULL};
    struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = BLOCKS};

    for (unsigned i = 0; i < BLOCKS; i++) {
        keys[i] = ts_key(first + i);
        blocks[i] = i;
    }
    fill(first);
    batch.nshards = SHARDS / 2; /* in two parts, the other way round */
    for (unsigned part = 2; part-- > 0;) {
        batch.shard = part * SHARDS / 2;
        if (ucm_dump(store, map, &batch, &task[part]) < 0)
            task[part] = NULL;
    }
    for (unsigned part = 0; part < 2; part++)
        if (task[part])
            wait_for(task[part], UCM_STORED);
    for (unsigned part = 0; part < 2; part++)
        ucm_task_free(task[part]);
    if (!first) /* what is found is leased, and makes no room for those to come */
        ucm_lookup(store, keys, BLOCKS, found);
    memset(memory, 0xa5, sizeof memory);
    batch.shard = batch.nshards = 0;
    if (ucm_load(store, map, &batch, &task[0]) < 0)
        return;
    wait_for(task[0], UCM_RELEASED);
    for (unsigned i = 0; i < BLOCKS; i++)
        if (ucm_task_status(task[0], i) == 0) {
            if (!is_right(first + i, i))
                ts_die("block %u came back wrong", first + i);
            l->right++;
        }
    ucm_task_free(task[0]);
}

static void see_block(void *arg, const struct ucm_lane_info *lane, const struct ucm_block_info *b)
{
    if (b->err == -EBADMSG)
        ts_die("a block on disk is bad");
}

static void see_option(void *arg, const struct ucm_option_info *info)
{
}

static void live(struct life *l)
{
    struct ucm_seg segs[SHARDS];
    ucm_conf *conf = NULL;
    ucm_store *store = NULL;
    ucm_map *map = NULL;

    if (ucm_conf_new(&conf) < 0)
        return;
    if (set_options(conf, l) == 0 && ucm_store_open(conf, &store) == 0) {
        for (unsigned s = 0; s < SHARDS; s++)
            segs[s] = (struct ucm_seg){memory + s * SHARD, BLOCK, SHARD};
        struct ucm_map_desc desc = {
            .segs = segs, .nshards = SHARDS, .nsegs = 1, .blocks_per_key = 1, .nblocks = BLOCKS};
        if (ucm_map_new(store, &desc, &map) == 0)
            for (unsigned i = 0; i < l->scene->rounds; i++)
                move_blocks(l, store, map, i * BLOCKS);
    }
    snprintf(l->why, sizeof l->why, "%s", ucm_conf_error(conf));
    ucm_map_free(map);
    ucm_store_close(store);
    ucm_options(conf, see_option, NULL);
    ucm_conf_free(conf);
    struct ucm_inspect how = {.flags = UCM_INSPECT_VERIFY, .block = see_block};
    ucm_inspect(l->dir, &how);
    if (strcmp(l->scene->engine, "psync") != 0) /* what follows is the same for all of them */
        return;
    struct ucm_manage repair = {.op = UCM_MANAGE_REPAIR, .timeout_ms = 1000};
    struct ucm_manage_total total;
    ucm_manage(l->dir, &repair, &total);
}

/* ---- all of them ---- */

static void test_each_allocation_fails(void **state)
{
    struct life l = {.scene = *state, .dir = ts_dir()};
    char yaml[TS_PATH], below[TS_PATH];
    static const char text[] = "ucm_connectors:\n  - ucm_connector_name: \"UcmPipelineStore\"\n"
                               "    ucm_connector_config:\n"
                               "      \"store_pipeline\": \"Cache|Posix\" # and more\n"
                               "      namespace: 'some text'\n";
    snprintf(yaml, sizeof yaml, "%s/config.yaml", ts_dir());
    snprintf(below, sizeof below, "%s/ucm", l.dir);
    ts_write_at(yaml, 0, text, sizeof text - 1);
    l.yaml = yaml;
    l.sound = true;
    live(&l); /* what is made once a process is made now */
    ts_remove(below);
    if (l.right < BLOCKS)
        fail_msg("%u blocks came back: %s", l.right, l.why);
    int64_t kept = alloc_live();
    /* With too little room a block may have to go before it is loaded. */
    unsigned fds = alloc_fds(), sound = l.scene->capacity[1] ? l.right / 2 : l.right;
    uint64_t n = 1;
    for (bool met = true; met; n++) {
        l.sound = false;
        alloc_fail_at(n);
        live(&l);
        met = alloc_seen() >= n;
        alloc_fail_at(0);
        if (alloc_live() != kept)
            fail_msg("allocation %llu failed: %lld are kept", (unsigned long long)n,
                     (long long)(alloc_live() - kept));
        if (alloc_fds() != fds)
            fail_msg("allocation %llu failed: %d descriptors are kept", (unsigned long long)n,
                     (int)(alloc_fds() - fds));
        l.sound = true;
        l.right = 0;
        live(&l);
        if (l.right < sound)
            fail_msg("allocation %llu failed: the next life loads %u blocks of %u. %s",
                     (unsigned long long)n, l.right, sound, l.why);
        ts_remove(below);
    }
    print_message("# %s: %llu allocations\n", l.scene->pipeline, (unsigned long long)n - 2);
    assert_true(n > 50);
}

int main(void)
{
    struct CMUnitTest tests[TS_LEN(scenes)];
    char names[TS_LEN(scenes)][64];
    setenv("TMPDIR", "/dev/shm", 0);
    for (size_t i = 0; i < TS_LEN(scenes); i++) {
        snprintf(names[i], sizeof names[i], "%s %s", scenes[i].pipeline, scenes[i].engine);
        tests[i] = (struct CMUnitTest){.name = names[i],
                                       .test_func = test_each_allocation_fails,
                                       .initial_state = (void *)&scenes[i]};
    }
    cmocka_set_test_filter(getenv("UCM_TEST_FILTER"));
    return cmocka_run_group_tests_name("memory", tests, NULL, NULL);
}

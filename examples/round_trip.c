/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A store from C: blocks go from an "engine's" memory into a directory and come back.
 *
 *     cc round_trip.c -o round_trip $(pkg-config --cflags --libs ucm) && ./round_trip /mnt/kv
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucm.h>

enum { LAYERS = 4, BLOCKS = 8, SHARD = 64 << 10, USED = 3 };

/* [layer][block]: where the engine keeps the KV cache of its blocks. */
static char engine[LAYERS][BLOCKS][SHARD];

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    return 1;
}

static int set(ucm_conf *conf, const char *backend)
{
    const char *const options[][2] = {{"store_pipeline", "Posix"},
                                      {"storage_backends", backend},
                                      {"namespace", "an example"}, /* what else decides the bytes */
                                      {"block_size", "262144"},
                                      {"shard_size", "65536"}};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        if (ucm_conf_set(conf, options[i][0], options[i][1]))
            return -1;
    return 0;
}

static int round_trip(ucm_store *store)
{
    struct ucm_seg segs[LAYERS];
    for (int i = 0; i < LAYERS; i++)
        segs[i] = (struct ucm_seg){.base = engine[i], .stride = SHARD, .len = SHARD};
    const struct ucm_map_desc desc = {
        .segs = segs, .nshards = LAYERS, .nsegs = 1, .blocks_per_key = 1, .nblocks = BLOCKS};
    ucm_map *map;
    int err = ucm_map_new(store, &desc, &map);
    if (err)
        return fail("map", ucm_strerror(err));

    /* Keys are 16 bytes that name a block and all before it: an engine's own hashes. */
    const ucm_key keys[USED] = {{"block 0"}, {"block 0 1"}, {"block 0 1 2"}};
    const uint32_t from[USED] = {5, 2, 7}, to[USED] = {0, 1, 3};
    ucm_task *task = NULL;
    err = ucm_dump(store, map, &(struct ucm_batch){.keys = keys, .blocks = from, .n = USED}, &task);
    if (!err)
        err = ucm_task_wait(task, UCM_STORED, 30000); /* RELEASED: the memory may be used again */
    ucm_task_free(task);
    if (err) {
        ucm_map_free(map);
        return fail("dump", ucm_strerror(err));
    }

    ssize_t hits = ucm_lookup_prefix(store, keys, USED);
    printf("%zd of %d blocks can be loaded, by any process that opens this directory\n", hits,
           USED);
    task = NULL;
    err = ucm_load(store, map, &(struct ucm_batch){.keys = keys, .blocks = to, .n = USED}, &task);
    if (!err)
        err = ucm_task_wait(task, UCM_RELEASED, 30000); /* ucm_task_status() says which failed */
    ucm_task_free(task);
    ucm_map_free(map);
    if (err)
        return fail("load", ucm_strerror(err));
    for (int layer = 0; layer < LAYERS; layer++)
        for (int i = 0; i < USED; i++)
            if (memcmp(engine[layer][from[i]], engine[layer][to[i]], SHARD))
                return fail("load", "other bytes than were stored");
    printf("they came back as they were\n");
    return hits == USED ? 0 : 1;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return fail("usage", "round_trip DIRECTORY");
    for (size_t i = 0; i < sizeof engine; i++)
        ((char *)engine)[i] = (char)(i * 2654435761u >> 13);
    ucm_conf *conf = NULL;
    ucm_store *store = NULL;
    int err = ucm_conf_new(&conf);
    if (err)
        return fail("options", ucm_strerror(err));
    if (set(conf, argv[1]) || ucm_store_open(conf, &store))
        err = fail("store", ucm_conf_error(conf)); /* names the option, the value and the remedy */
    else
        err = round_trip(store);
    ucm_store_close(store);
    ucm_conf_free(conf);
    return err;
}

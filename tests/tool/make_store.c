/* SPDX-License-Identifier: Apache-2.0 */
/*
 * make_store DIR BLOCKS: stores that many blocks of 64 KiB below DIR, for the tests of the tool.
 * The key of block i begins with i in two bytes, its depth is i.  Takes options from the
 * environment.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ucm.h"

enum { BLOCK = 65536, SHARDS = 4 };

static int dump(ucm_store *store, size_t n)
{
    ucm_key *keys = calloc(n, sizeof *keys);
    uint32_t *blocks = calloc(n, sizeof *blocks);
    char *memory = aligned_alloc(4096, n * BLOCK);
    struct ucm_seg segs[SHARDS];
    struct ucm_map_desc desc = {
        .segs = segs, .nshards = SHARDS, .nsegs = 1, .blocks_per_key = 1, .nblocks = (uint32_t)n};
    ucm_map *map = NULL;
    ucm_task *task;

    for (unsigned s = 0; s < SHARDS; s++)
        segs[s] = (struct ucm_seg){memory + s * BLOCK / SHARDS, BLOCK, BLOCK / SHARDS};
    for (size_t i = 0; i < n; i++) {
        keys[i].b[0] = (uint8_t)(i >> 8);
        keys[i].b[1] = (uint8_t)i;
        blocks[i] = (uint32_t)i;
        memset(memory + i * BLOCK, 'a' + (int)(i % 26), BLOCK);
    }
    struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = n};
    int err = ucm_map_new(store, &desc, &map);
    if (!err && !(err = ucm_dump(store, map, &batch, &task))) {
        err = ucm_task_wait(task, UCM_STORED, 60000);
        ucm_task_free(task);
    }
    ucm_map_free(map);
    free(memory);
    free(blocks);
    free(keys);
    return err;
}

int main(int argc, char **argv)
{
    ucm_conf *conf;
    ucm_store *store;

    if (argc != 3 || ucm_conf_new(&conf))
        return 2;
    ucm_conf_set(conf, "store_pipeline", "Posix");
    ucm_conf_set(conf, "storage_backends", argv[1]);
    ucm_conf_set(conf, "namespace", "tests of the tool");
    ucm_conf_set(conf, "block_size", "65536");
    ucm_conf_set(conf, "shard_size", "16384");
    int err = ucm_conf_env(conf);
    if (!err)
        err = ucm_store_open(conf, &store);
    if (err) {
        fprintf(stderr, "make_store: %s\n", ucm_conf_error(conf));
    } else {
        err = dump(store, (size_t)atoi(argv[2]));
        ucm_store_close(store);
    }
    ucm_conf_free(conf);
    if (err)
        fprintf(stderr, "make_store: %s\n", ucm_strerror(err));
    return err ? 1 : 0;
}

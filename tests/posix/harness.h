/* SPDX-License-Identifier: Apache-2.0 */
/*
 * harness.h - what the tests of the Posix tier share: a directory of its own for each test, stores
 * opened on it through ucm.h, and blocks whose bytes follow from key and shard, so that a wrong
 * byte shows whoever wrote it.
 */
#ifndef UCMT_HARNESS_H
#define UCMT_HARNESS_H

#include <stdbool.h>

#include "base/base.h"

#include "../test.h"

struct shape {
    size_t shard_size;
    unsigned nshards, pieces; /* of memory for each shard; 0: one for the block */
};

struct memory { /* an engine's: n blocks of one shape */
    struct shape shape;
    size_t n, block_size;
    uint8_t *base;
    ucm_map *map;
};

struct outcome {
    int released, stored; /* of the wait */
    int *status;          /* of each block; free it */
};

/* cmocka fixtures: *state becomes the path of an empty directory. */
int make_dir(void **state);
int remove_dir(void **state);
void remove_tree(const char *path);

/* Opens "Posix" on dir; options: "name=value name=value", or NULL.  Aborts the test on failure. */
ucm_store *open_store(const char *dir, const struct shape *shape, const char *options);
/* The same, with the error and its text instead. */
int try_open(const char *dir, const struct shape *shape, const char *options, ucm_store **store_p,
             char *text, size_t len);

ucm_key key_of(uint64_t i);
double metric(ucm_store *store, const char *name);

void memory_new(struct memory *m, ucm_store *store, const struct shape *shape, size_t n);
void memory_free(struct memory *m);
/* Fills block at of memory with the bytes of key i; checks them. */
void paint(struct memory *m, size_t at, uint64_t i);
bool painted(const struct memory *m, size_t at, uint64_t i);
bool shards_painted(const struct memory *m, size_t at, uint64_t i, unsigned shard, unsigned n);
void smear(struct memory *m); /* other bytes everywhere */

/* Moves keys first .. first + m->n - 1, or some shards of them, and waits for the last stage. */
struct outcome move(ucm_store *store, struct memory *m, bool dump, uint64_t first, unsigned shard,
                    unsigned nshards);
/* The same for all shards; every block must be right. */
void dump_all(ucm_store *store, struct memory *m, uint64_t first);
void load_all(ucm_store *store, struct memory *m, uint64_t first);
/* How many of the keys first .. first + n - 1 are found. */
size_t count_found(ucm_store *store, uint64_t first, size_t n);

/* Paths of the only lane below dir, and of files in it. */
void lane_path(const char *dir, const char *file, char *path, size_t len);
unsigned count_lanes(const char *dir);
uint64_t disk_usage(const char *dir); /* as du counts */

#endif

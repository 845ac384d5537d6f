/* SPDX-License-Identifier: Apache-2.0 */
#include "harness.h"

#include <ftw.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- directories ---- */

int make_dir(void **state)
{
    const char *tmp = getenv("UCMT_DIR");
    char *path;
    if (asprintf(&path, "%s/ucm-posix-XXXXXX", tmp ? tmp : "/tmp") < 0 || !mkdtemp(path))
        return -1;
    *state = path;
    return 0;
}

static int unlink_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    return remove(path);
}

void remove_tree(const char *path)
{
    nftw(path, unlink_one, 16, FTW_DEPTH | FTW_PHYS);
}

int remove_dir(void **state)
{
    remove_tree(*state);
    free(*state);
    return 0;
}

/* ---- stores ---- */

int try_open(const char *dir, const struct shape *shape, const char *options, ucm_store **store_p,
             char *text, size_t len)
{
    ucm_conf *conf;
    char number[32], *given = options ? strdup(options) : NULL, *rest = given, *pair;
    assert_int_equal(ucm_conf_new(&conf), 0);
    assert_int_equal(ucm_conf_set(conf, "store_pipeline", "Posix"), 0);
    assert_int_equal(ucm_conf_set(conf, "storage_backends", dir), 0);
    snprintf(number, sizeof number, "%zu", shape->shard_size);
    assert_int_equal(ucm_conf_set(conf, "shard_size", number), 0);
    snprintf(number, sizeof number, "%zu", shape->shard_size * shape->nshards);
    assert_int_equal(ucm_conf_set(conf, "block_size", number), 0);
    /* What a busy machine is late with is not what is tested, unless the test says so. */
    assert_int_equal(ucm_conf_set(conf, "lookup_timeout_ms", "60000"), 0);
    assert_int_equal(ucm_conf_set(conf, "posix_stall_ms", "60000"), 0);
    assert_int_equal(ucm_conf_env(conf), 0);
    while ((pair = strsep(&rest, " "))) {
        char *value = strchr(pair, '=');
        if (!value)
            continue;
        *value++ = '\0';
        if (ucm_conf_set(conf, pair, value) < 0)
            fail_msg("%s", ucm_conf_error(conf));
    }
    int err = ucm_store_open(conf, store_p);
    snprintf(text, len, "%s", err ? ucm_conf_error(conf) : "");
    ucm_conf_free(conf);
    free(given);
    return err;
}

ucm_store *open_store(const char *dir, const struct shape *shape, const char *options)
{
    ucm_store *store = NULL;
    char text[512];
    if (try_open(dir, shape, options, &store, text, sizeof text) < 0)
        fail_msg("%s", text);
    return store;
}

ucm_key key_of(uint64_t i)
{
    ucm_key key;
    ucmi_hash128(&i, sizeof i, key.b);
    return key;
}

struct wanted {
    const char *name;
    double value;
};

static void pick(void *arg, const struct ucm_metric_info *info)
{
    struct wanted *w = arg;
    if (strcmp(info->name, w->name) == 0)
        w->value = info->value;
}

double metric(ucm_store *store, const char *name)
{
    struct wanted w = {name, -1};
    ucm_metrics(store, pick, &w);
    assert_true(w.value >= 0); /* else there is no such counter */
    return w.value;
}

/* ---- memory ---- */

void memory_new(struct memory *m, ucm_store *store, const struct shape *shape, size_t n)
{
    unsigned pieces = shape->pieces ? shape->pieces : 1;
    size_t part = shape->shard_size / pieces;
    *m = (struct memory){.shape = *shape, .n = n, .block_size = shape->shard_size * shape->nshards};
    m->base = aligned_alloc(4096, ROUND_UP(n * m->block_size, 4096));
    assert_non_null(m->base);
    struct ucm_seg *segs = calloc((size_t)shape->nshards * pieces, sizeof *segs);
    /* With pieces, the blocks of each are together, as in the tensors of an engine. */
    for (unsigned i = 0; i < shape->nshards * pieces; i++)
        segs[i] = shape->pieces ? (struct ucm_seg){m->base + i * n * part, part, part}
                                : (struct ucm_seg){m->base + i * part, m->block_size, part};
    struct ucm_map_desc desc = {.segs = segs,
                                .nshards = shape->nshards,
                                .nsegs = pieces,
                                .blocks_per_key = 1,
                                .nblocks = (uint32_t)n};
    assert_int_equal(ucm_map_new(store, &desc, &m->map), 0);
    free(segs);
    smear(m);
}

void memory_free(struct memory *m)
{
    ucm_map_free(m->map);
    free(m->base);
}

static uint8_t byte_of(uint64_t key, size_t at)
{
    uint64_t w = (key + 1) * 0x9e3779b97f4a7c15u ^ (at >> 3) * 0xff51afd7ed558ccdu;
    return (uint8_t)(w >> (at & 7) * 8 ^ w >> 29);
}

static uint8_t *byte_at(const struct memory *m, size_t at, size_t off)
{
    if (!m->shape.pieces)
        return m->base + at * m->block_size + off;
    size_t part = m->shape.shard_size / m->shape.pieces;
    return m->base + off / part * m->n * part + at * part + off % part;
}

void paint(struct memory *m, size_t at, uint64_t i)
{
    for (size_t off = 0; off < m->block_size; off++)
        *byte_at(m, at, off) = byte_of(i, off);
}

bool shards_painted(const struct memory *m, size_t at, uint64_t i, unsigned shard, unsigned n)
{
    size_t size = m->shape.shard_size;
    for (size_t off = shard * size; off < (shard + n) * size; off++)
        if (*byte_at(m, at, off) != byte_of(i, off))
            return false;
    return true;
}

bool painted(const struct memory *m, size_t at, uint64_t i)
{
    return shards_painted(m, at, i, 0, m->shape.nshards);
}

void smear(struct memory *m)
{
    memset(m->base, 0xa5, m->n * m->block_size);
}

/* ---- moving ---- */

struct outcome move(ucm_store *store, struct memory *m, bool dump, uint64_t first, unsigned shard,
                    unsigned nshards)
{
    ucm_key *keys = malloc(m->n * sizeof *keys);
    uint32_t *blocks = malloc(m->n * sizeof *blocks);
    struct outcome out = {.status = malloc(m->n * sizeof *out.status)};
    ucm_task *task = NULL;
    for (size_t i = 0; i < m->n; i++) {
        keys[i] = key_of(first + i);
        blocks[i] = (uint32_t)i;
    }
    struct ucm_batch batch = {
        .keys = keys, .blocks = blocks, .n = m->n, .shard = shard, .nshards = nshards};
    assert_int_equal((dump ? ucm_dump : ucm_load)(store, m->map, &batch, &task), 0);
    out.released = ucm_task_wait(task, UCM_RELEASED, 60000);
    out.stored = ucm_task_wait(task, UCM_STORED, 60000);
    for (size_t i = 0; i < m->n; i++)
        out.status[i] = ucm_task_status(task, i);
    ucm_task_free(task);
    free(keys);
    free(blocks);
    return out;
}

void dump_all(ucm_store *store, struct memory *m, uint64_t first)
{
    for (size_t i = 0; i < m->n; i++)
        paint(m, i, first + i);
    struct outcome out = move(store, m, true, first, 0, 0);
    assert_int_equal(out.stored, 0);
    free(out.status);
}

void load_all(ucm_store *store, struct memory *m, uint64_t first)
{
    smear(m);
    struct outcome out = move(store, m, false, first, 0, 0);
    assert_int_equal(out.released, 0);
    for (size_t i = 0; i < m->n; i++)
        assert_true(painted(m, i, first + i));
    free(out.status);
}

size_t count_found(ucm_store *store, uint64_t first, size_t n)
{
    ucm_key *keys = malloc(n * sizeof *keys);
    uint8_t *found = malloc(n);
    for (size_t i = 0; i < n; i++)
        keys[i] = key_of(first + i);
    ssize_t hits = ucm_lookup(store, keys, n, found);
    assert_true(hits >= 0);
    free(keys);
    free(found);
    return (size_t)hits;
}

/* ---- on disk ---- */

void lane_path(const char *dir, const char *file, char *path, size_t len)
{
    char pattern[512];
    glob_t g;
    snprintf(pattern, sizeof pattern, "%s/ucm/*/r*-*", dir);
    assert_int_equal(glob(pattern, 0, NULL, &g), 0);
    assert_int_equal(g.gl_pathc, 1);
    snprintf(path, len, "%s/%s", g.gl_pathv[0], file);
    globfree(&g);
}

unsigned count_lanes(const char *dir)
{
    char pattern[512];
    glob_t g;
    snprintf(pattern, sizeof pattern, "%s/ucm/*/r*-*", dir);
    unsigned n = glob(pattern, 0, NULL, &g) == 0 ? (unsigned)g.gl_pathc : 0;
    globfree(&g);
    return n;
}

static uint64_t usage; /* nftw passes no argument */

static int add_usage(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    usage += (uint64_t)st->st_blocks * 512;
    return 0;
}

uint64_t disk_usage(const char *dir)
{
    usage = 0;
    nftw(dir, add_usage, 16, FTW_PHYS);
    return usage;
}

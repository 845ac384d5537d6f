/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ucm bench: the options, the scratch directory, and the measurements in turn.
 *
 * All of it is an outsider's view: a conf made from the options, a store opened with it, the calls
 * of the API.  What is stored is removed at the end; an interrupted run leaves DIR/ucm-bench-*.
 */
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define AT(field) offsetof(struct bench, field)
static const struct opt bench_opts[] = {
    {"dir", OPT_TEXT, AT(dir), "DIR", ".",
     "where to store: a scratch directory is made in it and removed at the end"},
    {"ops", OPT_TEXT, AT(ops), "OP[,OP..]", "dump,load,hot,lookup,latency,idle",
     "what to measure; hot is a load from DRAM"},
    {"pipeline", OPT_TEXT, AT(pipeline), "TIERS", "Posix",
     "the stack of tiers; ops that need DRAM put Cache on top of Posix"},
    {"block", OPT_SIZES, AT(blocks), "SIZE[,SIZE..]", "64K,256K,1M,4M,16M", "block sizes"},
    {"shards", OPT_COUNT, AT(shards), "N", "1",
     "shards of a block: its pieces in memory, one a layer"},
    {"total", OPT_SIZE, AT(total), "SIZE", "1G", "bytes moved for each figure"},
    {"task", OPT_SIZE, AT(task), "SIZE", "32M", "bytes of a task; four are under way at a time"},
    {"depth", OPT_COUNT, AT(depth), "N", "32", "operations in flight, of ucm and of fio"},
    {"direct", OPT_SWITCH, AT(direct), NULL, "yes", "O_DIRECT, for ucm and for fio"},
    {"engine", OPT_TEXT, AT(engine), "NAME", "auto", "auto, psync, aio or io_uring"},
    {"set", OPT_TEXTS, AT(set), "KEY=VALUE", NULL,
     "any option of `ucm help options`; may be repeated"},
    {"repeat", OPT_COUNT, AT(repeat), "N", "3", "rounds for each figure, which is their median"},
    {"keys", OPT_COUNTS, AT(keys), "N[,N..]", "1,128,1024,8192", "lookup: keys in a call"},
    {"count", OPT_COUNTS, AT(counts), "N[,N..]", "1k,100k", "lookup: blocks that are stored"},
    {"fio", OPT_SWITCH, AT(fio), NULL, "yes", "run fio beside it, if it is in PATH"},
    {"json", OPT_FLAG, AT(json), NULL, NULL, "one JSON object"},
    {NULL},
};
#undef AT

/* ---- the scratch directory ---- */

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *at)
{
    if (at->level)
        remove(path);
    return 0;
}

void bench_empty_scratch(const struct bench *b)
{
    nftw(b->scratch, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static int drop_one(const char *path, const struct stat *st, int kind, struct FTW *at)
{
    int fd = kind == FTW_F ? open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC) : -1;

    if (fd >= 0) {
        fdatasync(fd);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
    return 0;
}

/* Direct reads pass the page cache by; the others must not find anything there. */
void bench_drop_cache(const struct bench *b)
{
    if (!b->direct)
        nftw(b->scratch, drop_one, 16, FTW_PHYS);
}

/* ---- stores and maps ---- */

static int set_number(ucm_conf *conf, const char *key, const char *fmt, double value)
{
    char text[48];

    snprintf(text, sizeof text, fmt, value);
    return ucm_conf_set(conf, key, text);
}

static int set_given(ucm_conf *conf, const char *pair)
{
    char key[64];
    const char *eq = strchr(pair, '=');

    if (!eq || (size_t)(eq - pair) >= sizeof key)
        return cannot("bench: --set %s: not KEY=VALUE", pair);
    snprintf(key, sizeof key, "%.*s", (int)(eq - pair), pair);
    int err = ucm_conf_set(conf, key, eq + 1);
    return err ? cannot("bench: --set %s: %s", pair, ucm_conf_error(conf)) : 0;
}

int bench_store(const struct bench *b, const char *pipeline, uint64_t block, uint64_t room,
                ucm_store **store_p)
{
    const char *tiers = pipeline ? pipeline : b->pipeline;
    ucm_conf *conf;
    int err = ucm_conf_new(&conf);

    if (err)
        return cannot("bench: %s", ucm_strerror(err));
    err = ucm_conf_set(conf, "store_pipeline", tiers);
    err = err ? err : ucm_conf_set(conf, "storage_backends", b->scratch);
    err = err ? err : ucm_conf_set(conf, "namespace", "ucm bench");
    err = err ? err : set_number(conf, "block_size", "%.0f", (double)block);
    err = err ? err : set_number(conf, "shard_size", "%.0f", (double)(block / b->shards));
    err = err ? err : ucm_conf_set(conf, "io_direct", b->direct ? "true" : "false");
    err = err ? err : ucm_conf_set(conf, "posix_io_engine", b->engine);
    err = err ? err : set_number(conf, "posix_io_depth", "%.0f", (double)b->depth);
    if (!err && strcasestr(tiers, "Cache")) /* a quarter more than is dumped: nothing is evicted */
        err = set_number(conf, "cache_buffer_capacity_gb", "%.6f",
                         (1.25 * (double)room + 64e6) / (1 << 30));
    if (err)
        cannot("bench: %s", ucm_conf_error(conf));
    for (unsigned i = 0; i < b->set.n && !err; i++)
        err = set_given(conf, b->set.v[i]);
    if (!err && (err = ucm_store_open(conf, store_p)))
        cannot("bench: %s", ucm_conf_error(conf));
    ucm_conf_free(conf);
    return err;
}

int bench_map(ucm_store *store, const struct arena *a, ucm_map **map_p)
{
    unsigned nshards = (unsigned)(a->block / a->shard);
    struct ucm_seg *segs = calloc(nshards, sizeof *segs);

    if (!segs)
        return cannot("out of memory");
    for (unsigned s = 0; s < nshards; s++)
        segs[s] = (struct ucm_seg){
            .base = a->base + s * a->shard * a->n, .stride = a->shard, .len = a->shard};
    struct ucm_map_desc desc = {.segs = segs,
                                .nshards = nshards,
                                .nsegs = 1,
                                .blocks_per_key = 1,
                                .nblocks = (uint32_t)a->n};
    int err = ucm_map_new(store, &desc, map_p);
    free(segs);
    return err ? cannot("bench: map: %s", ucm_strerror(err)) : 0;
}

/* ---- the measurements in turn ---- */

enum { OP_DUMP = 1, OP_LOAD = 2, OP_HOT = 4, OP_LOOKUP = 8, OP_LATENCY = 16, OP_IDLE = 32 };
static const char *const op_names[] = {"dump", "load", "hot", "lookup", "latency", "idle"};

static int parse_ops(const char *text, unsigned *ops)
{
    for (*ops = 0; *text;) {
        size_t len = strcspn(text, ","), i = 0;
        while (i < COUNT_OF(op_names) &&
               (strlen(op_names[i]) != len || strncmp(op_names[i], text, len)))
            i++;
        if (i == COUNT_OF(op_names))
            return cannot(
                "bench: --ops: no op \"%.*s\"; there are dump, load, hot, lookup, latency "
                "and idle",
                (int)len, text);
        *ops |= 1u << i;
        text += len + (text[len] == ',');
    }
    return 0;
}

static int check_options(const struct bench *b)
{
    if (!b->shards || !b->repeat || b->repeat > MAX_REPEAT || !b->depth)
        return cannot("bench: --shards and --depth start at 1, --repeat is 1 to %d", MAX_REPEAT);
    for (unsigned i = 0; i < b->blocks.n; i++)
        if (b->blocks.v[i] / b->shards < 8 || b->blocks.v[i] % (8 * b->shards))
            return cannot("bench: --block %llu: not %llu shards of whole 8-byte words",
                          (unsigned long long)b->blocks.v[i], (unsigned long long)b->shards);
    for (unsigned i = 0; i < b->keys.n; i++)
        if (!b->keys.v[i])
            return cannot("bench: --keys 0: nothing to look up");
    return 0;
}

static void cpu_model(char *text, size_t len)
{
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "re");

    snprintf(text, len, "unknown");
    while (f && fgets(line, sizeof line, f)) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) || !colon)
            continue;
        snprintf(text, len, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
        break;
    }
    if (f)
        fclose(f);
}

static void say_where(struct bench *b)
{
    struct utsname un;
    char text[256], date[32];
    double load[1] = {NAN};
    time_t now = time(NULL);
    struct tm tm;

    uname(&un);
    cpu_model(text, sizeof text);
    strftime(date, sizeof date, "%Y-%m-%d %H:%M UTC", gmtime_r(&now, &tm));
    getloadavg(load, 1);
    report_text(&b->report, "version", ucm_version());
    report_text(&b->report, "date", date);
    report_text(&b->report, "cpu", text);
    report_number(&b->report, "cpus", COLUMN_COUNT, (double)sysconf(_SC_NPROCESSORS_ONLN));
    report_text(&b->report, "kernel", un.release);
    report_number(&b->report, "load", COLUMN_NUMBER, load[0]);
    report_text(&b->report, "pipeline", b->pipeline);
    report_text(&b->report, "engine", b->engine);
    report_number(&b->report, "depth", COLUMN_COUNT, (double)b->depth);
    report_text(&b->report, "direct", b->direct ? "yes" : "no");
    report_number(&b->report, "shards", COLUMN_COUNT, (double)b->shards);
    report_number(&b->report, "total", COLUMN_SIZE, (double)b->total);
    report_number(&b->report, "repeat", COLUMN_COUNT, (double)b->repeat);
}

static int run_ops(struct bench *b, unsigned ops)
{
    int err = 0;

    if (ops & (OP_DUMP | OP_LOAD))
        err = bench_disk(b, ops & OP_DUMP, ops & OP_LOAD);
    if (!err && ops & OP_HOT)
        err = bench_hot(b);
    if (!err && ops & OP_LATENCY)
        err = bench_latency(b);
    if (!err && ops & OP_LOOKUP)
        err = bench_lookup(b);
    if (!err && ops & OP_IDLE)
        err = bench_idle(b);
    return err;
}

static int run_bench(void *state, unsigned n, char **operands)
{
    struct bench *b = state;
    unsigned ops;

    if (parse_ops(b->ops, &ops) || check_options(b))
        return TOOL_CANNOT;
    if (snprintf(b->scratch, sizeof b->scratch, "%s/ucm-bench-XXXXXX", b->dir) >=
        (int)sizeof b->scratch)
        return cannot("bench: --dir: name too long");
    if (!mkdtemp(b->scratch))
        return cannot("bench: --dir %s: %m", b->dir);
    b->fio_there = b->fio && fio_find();
    report_open(&b->report, stdout, b->json);
    say_where(b);
    int err = run_ops(b, ops);
    report_close(&b->report);
    bench_empty_scratch(b);
    rmdir(b->scratch);
    return err ? TOOL_CANNOT : TOOL_GOOD;
}

const struct verb verb_bench = {
    .name = "bench",
    .operands = "",
    .help = "measure load, dump and lookup through the API",
    .about =
        "Measures this machine: blocks are dumped into a scratch directory, loaded back and "
        "checked byte by byte, and looked up, all through the public API. With fio in PATH, fio "
        "moves the same bytes in the same sizes at the same depth next to each cell; loads from "
        "DRAM are compared with memcpy. Figures are medians. An interrupted run leaves "
        "DIR/ucm-bench-*.",
    .opts = bench_opts,
    .size = sizeof(struct bench),
    .run = run_bench,
};

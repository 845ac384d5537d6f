/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stress: store after store, each in weather of its own, for as long as one likes.
 *
 * A life is a fresh directory and a stack of tiers over any of the engines.  Blocks are dumped,
 * whole or by layers, looked up and loaded, by one store or two, while storage or memory fails
 * (fault.h, alloc.h) or, in crash weather, while all is recorded (crash.h).  Then the weather
 * clears: what had been stored is loaded by the next store, new blocks are dumped, and all is given
 * back.
 *
 *     wrong          a load that ended well with other bytes than were dumped
 *     over_capacity  samples of the directory above posix_capacity_gb
 *     leaked         memory, descriptors, segment files and slots of DRAM that are nobody's
 *     lost           blocks reported stored that are gone, in weather that cannot touch them; new
 *                    blocks that cannot be dumped in clear weather; tasks refused for no reason
 *
 * Prints a table of what was done to it and, last, these counts as JSON; the exit status is 1
 * unless all four are 0.  A life depends only on its number, the seed and the machine's pace.
 */
#include <errno.h>
#include <ftw.h>
#include <getopt.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "alloc.h"
#include "crash.h"
#include "fault.h"
#include "slots.h"
#include "store/store.h"
#include "support.h"

enum {
    SHARDS = 4,
    SHARD = 4096,
    BLOCK = SHARDS * SHARD,
    ENTRIES = 48,
    MAX_BLOCKS = 1200,
    ROUNDS = 120,
    FRESH = 1000000,   /* numbers of blocks dumped in clear weather */
    ROUGH_MS = 40,     /* timeout_ms where the weather is rough */
    SETTLE_MS = 10000, /* storage that hung has come back, and what was waiting for it is over */
    MAX_FATES = 1024,
    CRASHES = 10
};

/* ---- weather ---- */

enum weather { CALM, WRITES_FAIL, ALL_FAILS, SILENT, HANGS, NO_MEMORY, CRASH, NWEATHERS };
static const char *const weather_names[] = {"calm",  "writes fail", "all fails", "silent",
                                            "hangs", "no memory",   "crash"};
enum {
    CHANGES = FAULT_WRITE | FAULT_SYNC | FAULT_ALLOCATE | FAULT_TRUNCATE | FAULT_FSYNC |
              FAULT_RENAME | FAULT_UNLINK | FAULT_MKDIR
};

/* What was stored must stay: nobody reads or writes it wrongly. */
static bool is_safe(enum weather w)
{
    return w == CALM || w == WRITES_FAIL || w == NO_MEMORY || w == CRASH;
}

/* Nothing is waited for for long. */
static bool is_rough(enum weather w)
{
    return w != CALM && w != CRASH;
}

static unsigned failures(struct fault_plan *v, unsigned kinds, unsigned one_in, uint64_t *dice)
{
    static const enum fault_way ways[] = {FAULT_WAY_FAIL, FAULT_WAY_HALF, FAULT_WAY_LATE,
                                          FAULT_WAY_SHORT};
    /* The first three make nobody evict. */
    static const int errs[] = {-EIO, -ENOMEM, -ESTALE, -ENOSPC, -EDQUOT};
    unsigned nerrs = kinds == CHANGES ? 3 : TS_LEN(errs);
    for (unsigned i = 0; i < TS_LEN(ways); i++)
        v[i] = (struct fault_plan){.kinds = kinds,
                                   .way = ways[i],
                                   .err = errs[ts_below(dice, nerrs)],
                                   .one_in = one_in * (1 + (unsigned)ts_below(dice, 4))};
    return TS_LEN(ways);
}

static void make_weather(enum weather w, uint64_t *dice)
{
    struct fault_plan v[FAULT_MAX_PLANS];
    unsigned n = 0, often = 4 + (unsigned)ts_below(dice, 40);

    if (w == WRITES_FAIL)
        n += failures(v, CHANGES, often, dice);
    if (w == ALL_FAILS)
        n += failures(v, FAULT_ALL, often, dice);
    if (w == HANGS)
        v[n++] = (struct fault_plan){.kinds = ts_below(dice, 2) ? FAULT_BATCH : FAULT_ALL,
                                     .way = FAULT_WAY_HANG,
                                     .one_in = 20 + (unsigned)ts_below(dice, 200)};
    for (unsigned i = 0; w == SILENT && i < 3; i++) {
        static const enum fault_way ways[] = {FAULT_WAY_FLIP, FAULT_WAY_TORN, FAULT_WAY_LOST};
        unsigned kinds = FAULT_READ | FAULT_WRITE | (ways[i] == FAULT_WAY_LOST ? 0 : FAULT_PREAD);
        v[n++] = (struct fault_plan){.kinds = kinds, .way = ways[i], .one_in = often};
    }
    v[n++] = (struct fault_plan){
        .kinds = FAULT_BATCH, .way = FAULT_WAY_DELAY, .one_in = 30, .delay_us = 1500};
    v[n++] = (struct fault_plan){.kinds = FAULT_BATCH, .way = FAULT_WAY_REORDER, .one_in = 1};
    if (is_rough(w)) /* the pump stays in a call until all that waits for it has given up */
        v[n++] = (struct fault_plan){.kinds = FAULT_FILES | FAULT_PREAD,
                                     .way = FAULT_WAY_DELAY,
                                     .one_in = 200,
                                     .delay_us = 4000 * ROUGH_MS};
    fault_plan(v, n, ts_random(dice));
    if (w == NO_MEMORY)
        alloc_fail_one_in(10 + (unsigned)ts_below(dice, 300), ts_random(dice));
}

static void clear_weather(void)
{
    fault_plan(NULL, 0, 0);
    alloc_fail_one_in(0, 0);
}

/* ---- counts ---- */

static uint64_t wrong, over_capacity, leaked, lost, crashes, lives[2][NWEATHERS], blocks_right,
    slots_had;
static uint64_t seed, this_life;
static bool verbose;

static void complain(uint64_t *count, uint64_t n, const char *fmt, ...)
{
    va_list ap;
    if (!n)
        return;
    *count += n;
    printf("# life %llu: ", (unsigned long long)this_life);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    printf("   (again: --seed %llu --life %llu)\n", (unsigned long long)seed,
           (unsigned long long)this_life);
    fflush(stdout);
}

/* ---- directories, by number, each empty when asked for ---- */

enum { DIR_STORE, DIR_POOL, DIR_POOL2, DIR_CRASH, NDIRS };
static char dirs[NDIRS][TS_PATH];

static const char *empty_dir(unsigned i)
{
    ts_remove(dirs[i]);
    if (mkdir(dirs[i], 0777))
        ts_die("%s: %m", dirs[i]);
    return dirs[i];
}

/* ---- what hangs is let go soon, also where a caller of the store hangs in it ---- */

static void *let_go(void *arg)
{
    for (;;) {
        usleep(5000);
        if (fault_hanging())
            fault_release();
    }
    return NULL;
}

/* ---- the directory's size, again and again ---- */

static struct {
    pthread_t thread;
    char dir[TS_PATH];
    uint64_t bound, worst, above;
    _Atomic bool stop;
} sampler;
static _Thread_local uint64_t sum;

static int add_file(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    if (type != FTW_NS)
        sum += (uint64_t)st->st_blocks * 512;
    return 0;
}

static void *sample(void *arg)
{
    unsigned in_turn = 0;
    while (!atomic_load(&sampler.stop)) {
        sum = 0;
        nftw(sampler.dir, add_file, 16, FTW_PHYS);
        sampler.worst = sum > sampler.worst ? sum : sampler.worst;
        /* What is removed and made while we look may be seen twice; not thrice in turn. */
        in_turn = sum > sampler.bound ? in_turn + 1 : 0;
        sampler.above += in_turn == 3;
        usleep(1000);
    }
    return NULL;
}

static void sampler_start(const char *dir, uint64_t bound)
{
    snprintf(sampler.dir, sizeof sampler.dir, "%s", dir);
    sampler.bound = bound;
    sampler.worst = sampler.above = 0;
    atomic_store(&sampler.stop, false);
    if (bound && pthread_create(&sampler.thread, NULL, sample, NULL))
        ts_die("no thread");
}

static void sampler_stop(void)
{
    atomic_store(&sampler.stop, true);
    if (!sampler.bound)
        return;
    pthread_join(sampler.thread, NULL);
    complain(&over_capacity, sampler.above, "%llu bytes on disk, %llu allowed",
             (unsigned long long)sampler.worst, (unsigned long long)sampler.bound);
}

/* ---- a store and an engine's memory, without an allocation of our own ---- */

struct play {
    ucm_store *store;
    ucm_map *map;
    uint8_t *memory;
    char why[512];
};
static uint8_t memories[2][ENTRIES * BLOCK] __attribute__((aligned(4096)));

static void play_close(struct play *p)
{
    ucm_map_free(p->map);
    ucm_store_close(p->store);
    p->map = NULL;
    p->store = NULL;
}

static int play_open(struct play *p, const struct ts_opts *o, unsigned which)
{
    struct ucm_seg segs[SHARDS];
    char line[1024];
    ucm_conf *conf = NULL;
    *p = (struct play){.memory = memories[which]};
    int err = ucm_conf_new(&conf);
    for (const char *at = o->text; *at && !err; at += *at == '\n') {
        size_t len = strcspn(at, "\n");
        snprintf(line, sizeof line, "%.*s", (int)len, at);
        at += len;
        char *value = strchr(line, '=');
        *value++ = 0;
        err = ucm_conf_set(conf, line, value);
    }
    if (!err)
        err = ucm_store_open(conf, &p->store);
    snprintf(p->why, sizeof p->why, "%s", conf ? ucm_conf_error(conf) : "");
    for (unsigned s = 0; s < SHARDS; s++)
        segs[s] = (struct ucm_seg){p->memory + s * SHARD, BLOCK, SHARD};
    struct ucm_map_desc desc = {
        .segs = segs, .nshards = SHARDS, .nsegs = 1, .blocks_per_key = 1, .nblocks = ENTRIES};
    if (!err)
        err = ucm_map_new(p->store, &desc, &p->map);
    if (err)
        play_close(p);
    ucm_conf_free(conf);
    return err;
}

static void wait_for(ucm_task *task, enum ucm_stage stage)
{
    ucm_task_wait(task, stage, TS_WAIT_MS);
    if (!ucm_task_done(task, stage))
        ts_die("life %llu: a task hangs (--seed %llu)", (unsigned long long)this_life,
               (unsigned long long)seed);
}

static bool content(struct play *p, unsigned at, uint64_t no, bool check)
{
    ucm_key key = ts_key(no);
    for (unsigned s = 0; s < SHARDS; s++) {
        uint8_t *bytes = p->memory + at * BLOCK + s * SHARD;
        if (!check)
            ts_fill(&key, s, 0, bytes, SHARD);
        else if (ts_check(&key, s, 0, bytes, SHARD) != SHARD)
            return false;
    }
    return true;
}

/* Moves blocks no[0 .. n); parts > 1: in so many tasks.  status: of each, the first error. */
static void move(struct play *p, bool dump, const uint64_t *no, unsigned n, unsigned parts,
                 int *status)
{
    ucm_key keys[ENTRIES];
    uint32_t blocks[ENTRIES];
    ucm_task *task[SHARDS] = {NULL};
    struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = n, .nshards = SHARDS / parts};

    if (!dump)
        memset(p->memory, 0xa5, ENTRIES * BLOCK);
    for (unsigned i = 0; i < n; i++) {
        keys[i] = ts_key(no[i]);
        blocks[i] = i;
        status[i] = 0;
        if (dump)
            content(p, i, no[i], false);
    }
    for (unsigned k = 0; k < parts; k++) {
        batch.shard = (parts - 1 - k) * batch.nshards;
        int err = (dump ? ucm_dump : ucm_load)(p->store, p->map, &batch, &task[k]);
        for (unsigned i = 0; err && i < n; i++)
            status[i] = err;
        if (err)
            task[k] = NULL;
    }
    for (unsigned k = 0; k < parts; k++) {
        if (!task[k])
            continue;
        wait_for(task[k], UCM_STORED);
        for (unsigned i = 0; i < n; i++)
            if (!status[i])
                status[i] = ucm_task_status(task[k], i);
    }
    for (unsigned k = 0; k < parts; k++)
        ucm_task_free(task[k]);
    for (unsigned i = 0; i < n && !dump; i++)
        if (!status[i] && !content(p, i, no[i], true))
            complain(&wrong, 1, "block %llu came back wrong", (unsigned long long)no[i]);
        else
            blocks_right += !status[i];
}

/* ---- a life ---- */

struct life {
    enum weather weather;
    bool cache, safe;
    struct ts_opts opts;
    const char *dir;
    uint64_t bound;
    bool stored[MAX_BLOCKS];
    unsigned n; /* block numbers in use */
    uint64_t dice;
};

static void make_options(struct life *l)
{
    static const char *const engines[] = {"psync", "aio", "io_uring"};
    static const char *const syncs[] = {"none", "data", "full"};
    uint64_t *d = &l->dice;
    bool tight = ts_below(d, 2);
    double gb = tight ? 0.004 + (double)ts_below(d, 30) * 0.0001 : 0;

    l->opts = ts_opts_for(l->cache ? "Cache|Posix" : "Posix", l->dir);
    l->bound = (uint64_t)(gb * (1u << 30));
    ts_opt(&l->opts, "namespace", "stress");
    ts_opt(&l->opts, "block_size", "%d", BLOCK);
    ts_opt(&l->opts, "shard_size", "%d", SHARD);
    ts_opt(&l->opts, "posix_io_engine", "%s", engines[ts_below(d, 3)]);
    ts_opt(&l->opts, "posix_sync", "%s", syncs[ts_below(d, 3)]);
    ts_opt(&l->opts, "io_direct", "%s", ts_below(d, 4) ? "false" : "true");
    ts_opt(&l->opts, "posix_capacity_gb", "%.6f", gb);
    if (l->cache) {
        ts_opt(&l->opts, "cache_buffer_capacity_gb", "0.002");
        ts_opt(&l->opts, "cache_dir", "%s", empty_dir(DIR_POOL));
    }
}

/* False: nothing could be stored. */
static bool one_round(struct life *l, struct play *p)
{
    bool any = false;
    uint64_t no[ENTRIES];
    int status[ENTRIES];
    unsigned n = 1 + (unsigned)ts_below(&l->dice, ENTRIES);
    bool dump = !l->n || (l->n + n < MAX_BLOCKS && ts_below(&l->dice, 3) == 0);

    for (unsigned i = 0; i < n; i++) /* mostly new ones; of a prompt at its end */
        no[i] = dump ? l->n + i : ts_below(&l->dice, l->n);
    if (dump)
        l->n += n;
    move(p, dump, no, n, ts_below(&l->dice, 3) ? 1 : 2, status);
    for (unsigned i = 0; i < n; i++) {
        l->stored[no[i]] |= dump && !status[i];
        any |= !dump || !status[i];
        if (dump && !status[i] && l->weather == CRASH)
            crash_note(no[i]);
    }
    if (ts_below(&l->dice, 8) == 0) {
        ucm_key key = ts_key(no[0]);
        uint8_t found;
        ucm_lookup(p->store, &key, 1, &found);
    }
    return any;
}

/* A member of the store's pool that does nothing, so that the pool outlives the storm.  NULL: bad
 * weather, in which it would have one to itself. */
static struct ucmi_pool *join_pool(const ucm_store *store)
{
    static struct ucm_counters counters;
    struct ucmi_pool_spec spec = {
        .dir = dirs[DIR_POOL], .block_size = BLOCK, .shard_size = SHARD, .counters = &counters};
    struct ucmi_pool *pool = NULL;
    char why[256];
    memcpy(spec.ns, store->geo.ns, sizeof spec.ns);
    if (!ucmi_pool_open(&spec, &pool, why, sizeof why) && pool->fd < 0) {
        ucmi_pool_close(pool);
        pool = NULL;
    }
    return pool;
}

/* A store that was closed over hanging storage holds its slots until that comes back. */
static void check_slots(struct ucmi_pool *pool)
{
    uint64_t until = ts_now_ms() + SETTLE_MS;
    size_t kept;
    while ((kept = ts_slots_kept(pool)) && ts_now_ms() < until)
        usleep(1000);
    complain(&leaked, kept, "%zu slots of DRAM are kept", kept);
    slots_had += pool->layout.nslots;
    ucmi_pool_close(pool);
}

/* Opening may fail too: in bad weather it is tried again.  Until some round the last to leave
 * removes the pool. */
static void storm(struct life *l)
{
    struct play p[2] = {{NULL}};
    unsigned n = l->weather == CRASH ? 1 : 1 + (unsigned)ts_below(&l->dice, 2);
    unsigned rounds = l->weather == CRASH ? ROUNDS / 3 : ROUNDS;
    unsigned joins = l->cache ? (unsigned)ts_below(&l->dice, rounds / 2) : rounds;
    struct ucmi_pool *pool = NULL;
    struct ts_opts o = l->opts;
    ts_opt(&o, "timeout_ms", "%d", is_rough(l->weather) ? ROUGH_MS : 30000);

    if (l->weather == CRASH)
        crash_record(l->dir);
    make_weather(l->weather, &l->dice);
    for (unsigned i = 0; i < rounds; i++) {
        struct play *at = &p[ts_below(&l->dice, n)];
        if (!at->store && play_open(at, &o, at == p ? 0 : 1) < 0)
            continue;
        if (!pool && i >= joins)
            pool = join_pool(at->store);
        /* Closed and opened again in the middle of it, and where a store would now pause. */
        if (!one_round(l, at) || ts_below(&l->dice, 40) == 0)
            play_close(at);
    }
    for (unsigned i = 0; i < n; i++)
        play_close(&p[i]);
    clear_weather();
    if (pool)
        check_slots(pool);
}

/* ---- afterwards ---- */

static void check_stored(struct life *l, struct play *p)
{
    uint64_t no[ENTRIES], gone = 0;
    int status[ENTRIES];
    for (unsigned from = 0, n; from < l->n; from += n) {
        n = l->n - from < ENTRIES ? l->n - from : ENTRIES;
        for (unsigned i = 0; i < n; i++)
            no[i] = from + i;
        move(p, false, no, n, 1, status);
        for (unsigned i = 0; i < n; i++)
            gone += l->stored[from + i] && status[i];
    }
    if (l->safe && !l->bound)
        complain(&lost, gone, "%llu blocks were stored and are gone, weather: %s",
                 (unsigned long long)gone, weather_names[l->weather]);
}

static unsigned dump_fresh(struct play *p, unsigned k, int *why)
{
    uint64_t no[ENTRIES];
    int status[ENTRIES];
    unsigned bad = 0;
    for (unsigned i = 0; i < ENTRIES; i++)
        no[i] = FRESH + k * ENTRIES + i;
    move(p, true, no, ENTRIES, 1, status);
    for (unsigned i = 0; i < ENTRIES; i++)
        if (status[i]) {
            bad++;
            *why = status[i];
        }
    return bad;
}

/* A full store that begins with lanes without a slot refuses blocks at first, and pauses for a
 * second (room.c, widen): so it is asked again.  It should not be needed. */
static void check_dumps(struct play *p)
{
    int why = 0;
    for (unsigned k = 0; k < 4; k++) {
        unsigned bad = dump_fresh(p, k, &why);
        for (unsigned tries = 0; bad && why == -ENOSPC && tries < 4; tries++) {
            usleep(tries * 1000000);
            bad = dump_fresh(p, k, &why);
        }
        complain(&lost, bad, "%u new blocks cannot be dumped in clear weather: %s", bad,
                 ucm_strerror(why));
    }
}

struct listing {
    uint64_t segments;
};

static void see_lane(void *arg, const struct ucm_lane_info *lane)
{
    struct listing *all = arg;
    all->segments += lane->segments;
}

/* Segment files that no lane knows. */
static void check_files(struct life *l)
{
    static char paths[1024][TS_PATH];
    struct listing all = {0};
    struct ucm_inspect how = {.arg = &all, .lane = see_lane};
    ucm_inspect(l->dir, &how);
    size_t files = ts_files(l->dir, "seg-", paths, TS_LEN(paths));
    complain(&leaked, files > all.segments ? files - all.segments : 0,
             "%zu segment files, %llu of lanes", files, (unsigned long long)all.segments);
}

static void aftermath(struct life *l)
{
    struct play p;
    struct ts_opts o = l->opts;
    if (l->cache) /* what is on disk is asked for, not what DRAM may still hold */
        ts_opt(&o, "cache_dir", "%s", empty_dir(DIR_POOL2));
    if (play_open(&p, &o, 0) < 0) {
        complain(&lost, 1, "the store does not open in clear weather: %s", p.why);
        return;
    }
    check_stored(l, &p);
    check_dumps(&p);
    play_close(&p);
    check_files(l);
}

static void check_fates(struct play *p, const struct crash_fate *fates, size_t n,
                        struct crash_case c, bool sure)
{
    uint64_t no[ENTRIES];
    int status[ENTRIES];
    for (size_t from = 0, k; from < n; from += k) {
        k = n - from < ENTRIES ? n - from : ENTRIES;
        for (size_t i = 0; i < k; i++)
            no[i] = fates[from + i].no;
        move(p, false, no, (unsigned)k, 1, status);
        for (size_t i = 0; i < k; i++) {
            const struct crash_fate *f = &fates[from + i];
            bool must = sure && f->stored < c.at && f->deleted >= c.at;
            complain(&lost, must && status[i], "crash %u/%u: block %llu was stored and is lost: %s",
                     c.at, c.variant, (unsigned long long)f->no, ucm_strerror(status[i]));
        }
    }
}

static void crash_cases(struct life *l)
{
    static struct crash_fate fates[MAX_FATES];
    struct crash_log log;
    crash_record_end(&log);
    size_t n = crash_fates(&log, fates, MAX_FATES);
    bool full = strstr(l->opts.text, "posix_sync=full");
    struct ts_opts o = l->opts;
    for (unsigned k = 0; k < CRASHES; k++) {
        struct crash_case c = {.at = 1 + (uint32_t)ts_below(&l->dice, log.now),
                               .variant = (uint32_t)ts_below(&l->dice, 12)};
        struct play p;
        const char *dir = empty_dir(DIR_CRASH);
        crash_build(&log, c, seed, dir);
        ts_opt(&o, "storage_backends", "%s", dir);
        ts_opt(&o, "store_pipeline", "Posix");
        crashes++;
        if (play_open(&p, &o, 0) < 0) {
            complain(&lost, 1, "crash %u/%u: the store does not open: %s", c.at, c.variant, p.why);
            continue;
        }
        check_fates(&p, fates, n, c, full || c.variant < CRASH_KILLS);
        check_dumps(&p);
        play_close(&p);
    }
    crash_log_free(&log);
}

/* A store that was closed over hanging storage gives its memory back when that comes back. */
static void settle(int64_t had)
{
    uint64_t until = ts_now_ms() + SETTLE_MS;
    while (alloc_live() > had && ts_now_ms() < until)
        usleep(1000);
}

static void live_once(uint64_t number)
{
    static struct life l;
    uint64_t dice = seed + number * 0x9e3779b97f4a7c15u;
    this_life = number;
    l = (struct life){.dir = empty_dir(DIR_STORE), .weather = (enum weather)(number % NWEATHERS)};
    l.dice = ts_random(&dice);
    l.cache = number / NWEATHERS % 2;
    l.safe = is_safe(l.weather);
    make_options(&l);
    if (verbose)
        printf("# life %llu: %s\n%s", (unsigned long long)number, weather_names[l.weather],
               l.opts.text);
    lives[l.cache][l.weather]++;
    int64_t had = alloc_live();
    unsigned fds = alloc_fds();
    sampler_start(l.dir, l.bound);
    storm(&l);
    if (l.weather == CRASH)
        crash_cases(&l);
    settle(had);
    aftermath(&l);
    sampler_stop();
    int64_t kept = alloc_live() - had;
    unsigned more = alloc_fds() - fds;
    complain(&leaked, kept > 0 ? (uint64_t)kept : 0, "%lld allocations are kept, weather: %s",
             (long long)kept, weather_names[l.weather]);
    complain(&leaked, (int)more > 0 ? more : 0, "%u descriptors are kept, weather: %s", more,
             weather_names[l.weather]);
}

/* What is made once a process is made now, and is no leak. */
static void warm_up(void)
{
    for (unsigned i = 0; i < 6; i++) {
        static struct life l;
        struct play p;
        l = (struct life){.dir = empty_dir(DIR_STORE), .cache = true, .dice = i};
        make_options(&l);
        if (play_open(&p, &l.opts, 0) < 0)
            ts_die("%s", p.why);
        check_dumps(&p);
        play_close(&p);
    }
}

/* ---- the whole of it ---- */

static uint64_t faults(void)
{
    return fault_done_all() + alloc_failed() + crashes;
}

static void print_table(double seconds)
{
    printf("\n%-16s", "operations");
    for (unsigned k = 0; k < FAULT_NKINDS; k++)
        printf("%9s", fault_kind_name(k));
    for (unsigned w = 0; w < FAULT_NWAYS; w++) {
        printf("\n%-16s", fault_way_name(w));
        for (unsigned k = 0; k < FAULT_NKINDS; k++)
            printf("%9llu", (unsigned long long)fault_done(w, k));
    }
    printf("\n%-16s%9llu\n%-16s%9llu\n\n%-16s", "no memory", (unsigned long long)alloc_failed(),
           "crashes", (unsigned long long)crashes, "lives");
    for (unsigned w = 0; w < NWEATHERS; w++)
        printf("%12s", weather_names[w]);
    for (unsigned cache = 0; cache < 2; cache++) {
        printf("\n%-16s", cache ? "Cache|Posix" : "Posix");
        for (unsigned w = 0; w < NWEATHERS; w++)
            printf("%12llu", (unsigned long long)lives[cache][w]);
    }
    printf("\n\n%llu blocks came back right, and %llu slots of DRAM, in %.0f s\n",
           (unsigned long long)blocks_right, (unsigned long long)slots_had, seconds);
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {{"seconds", required_argument, NULL, 't'},
                                          {"seed", required_argument, NULL, 's'},
                                          {"life", required_argument, NULL, 'l'},
                                          {"help", no_argument, NULL, 'h'},
                                          {NULL}};
    double seconds = ts_seconds(20);
    uint64_t only = UINT64_MAX, begin = ts_now_ms(), n = 0;
    pthread_t thread;

    setenv("TMPDIR", "/dev/shm", 0);
    seed = begin * 2654435761u + (uint64_t)getpid();
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) >= 0;) {
        if (c == 't')
            seconds = atof(optarg);
        else if (c == 's')
            seed = strtoull(optarg, NULL, 0);
        else if (c == 'l')
            only = strtoull(optarg, NULL, 0);
        else
            return printf("usage: stress [--seconds N] [--seed N] [--life N]\n"), c != 'h';
    }
    printf("# --seed %llu\n", (unsigned long long)seed);
    const char *base = ts_dir();
    for (unsigned i = 0; i < NDIRS; i++)
        snprintf(dirs[i], sizeof dirs[i], "%.4000s/%u", base, i);
    if (pthread_create(&thread, NULL, let_go, NULL))
        ts_die("no thread");
    verbose = only != UINT64_MAX;
    warm_up();
    if (verbose)
        live_once(only);
    for (n = 0; !verbose && ts_now_ms() - begin < (uint64_t)(1000 * seconds); n++)
        live_once(n);
    print_table((double)(ts_now_ms() - begin) / 1000);
    printf(
        "{\"faults\":%llu,\"wrong\":%llu,\"over_capacity\":%llu,\"leaked\":%llu,\"lost\":%llu}\n",
        (unsigned long long)faults(), (unsigned long long)wrong, (unsigned long long)over_capacity,
        (unsigned long long)leaked, (unsigned long long)lost);
    return wrong || over_capacity || leaked || lost;
}

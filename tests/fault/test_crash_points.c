/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The crash explorer.  Runs of a store are recorded (crash.h), and of each run many crashes are
 * made up: at some moments of it or at each, killed or by a power cut.  The store is opened on what
 * is left.  Then every block that comes back is right; every block that had been reported stored
 * comes back, after a kill always, after a power cut where posix_sync is full; new blocks can be
 * dumped and are there after the next start.
 *
 *     UCM_TEST_SECONDS=N      for so long, all scenes together (default 20), at moments spread
 *                             evenly over each run; where they begin follows from the seed
 *     UCM_TEST_EVERY=1        at every moment, in every way, however long it takes
 *     UCM_TEST_SEED=N         other crashes by chance
 *     UCM_CRASH_LOG=FILE UCM_CRASH_CASE=AT/VARIANT   just the one that a failure named
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "crash.h"
#include "fault.h"
#include "support.h"

enum {
    BATCH = 32,
    NEW = 1000000,
    MAX_FATES = 4096,
    WAYS = 8 /* variants of a crash: the fixed ones, and three by chance */
};

static uint64_t seed;
static double seconds_each;

struct scene {
    const char *name, *sync, *capacity, *engine;
    unsigned before, during,
        step;    /* blocks dumped before the recording and in it, so many at once */
    bool layers; /* each shard by a task of its own */
    bool direct;
};
static const struct scene scenes[] = {
    {"first dumps", "full", "0", "io_uring", 0, 24, 3},
    {"first dumps, psync", "full", "0", "psync", 0, 24, 3},
    {"in parts", "full", "0", "aio", 0, 16, 4, .layers = true},
    {"after a restart", "full", "0", "io_uring", 20, 20, 5},
    {"evictions", "full", "0.0009", "io_uring", 60, 60, 3},
    {"compaction", "full", "0.0009", "psync", 540, 90, 5},
    {"compaction, no sync", "none", "0.0009", "io_uring", 540, 90, 5},
    {"data synced", "data", "0.0009", "aio", 10, 60, 3},
    {"O_DIRECT", "full", "0", "io_uring", 10, 20, 4, .direct = true},
};

static struct ts_opts options(const struct scene *s, const char *dir)
{
    struct ts_opts o = ts_opts_for("Posix", dir);
    ts_opt(&o, "namespace", "crash");
    ts_opt(&o, "block_size", "8192");
    ts_opt(&o, "posix_capacity_gb", "%s", s->capacity);
    ts_opt(&o, "posix_sync", "%s", s->sync);
    ts_opt(&o, "posix_io_engine", "%s", s->engine);
    ts_opt(&o, "io_direct", "%s", s->direct ? "true" : "false");
    return o;
}

/* ---- a run ---- */

static void run(const struct scene *s, const char *dir, struct crash_log *log)
{
    struct ts_opts o = options(s, dir);
    struct ts_rig r = ts_rig_sure(&o);
    unsigned no = 0;
    for (; no < s->before; no += s->step)
        assert_string_equal(ts_rig_dump(&r, no, s->step), ts_all('.', s->step));
    ts_rig_close(&r);
    r = ts_rig_sure(&o);
    bool *had = calloc(s->before + s->step, sizeof *had);
    for (unsigned i = 0; i < s->before; i += s->step) {
        const char *text = ts_rig_load(&r, i, s->step);
        for (unsigned k = 0; k < s->step; k++)
            had[i + k] = text[k] == '.';
    }
    ts_rig_close(&r);
    crash_record(dir);
    for (unsigned i = 0; i < s->before; i++)
        if (had[i])
            crash_note(i);
    free(had);
    r = ts_rig_sure(&o);
    for (; no < s->before + s->during; no += s->step) {
        struct ts_op op = {
            .dump = true, .from = no, .n = s->step, .layers = s->layers ? 1 + no : 0};
        ts_run(r.store, &r.mem, &op, r.text);
        assert_string_equal(r.text, ts_all('.', s->step));
        for (unsigned k = 0; k < s->step; k++)
            crash_note(no + k);
    }
    ts_rig_close(&r);
    crash_record_end(log);
}

/* ---- after the crash ---- */

struct verdict {
    char text[512];
    size_t right, lost;
};

static bool wrong(struct verdict *v, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(v->text, sizeof v->text, fmt, ap);
    va_end(ap);
    return false;
}

/* Loads, and asks for nothing before: what a lookup finds is leased and makes no room. */
static bool check_blocks(struct ts_rig *r, const struct crash_fate *fates, size_t n,
                         struct crash_case c, bool sure, struct verdict *v)
{
    for (size_t i = 0, k; i < n; i += k) {
        for (k = 1; k < BATCH && i + k < n && fates[i + k].no == fates[i].no + k;)
            k++;
        const char *text = ts_rig_load(r, fates[i].no, k);
        for (size_t j = 0; j < k; j++) {
            const struct crash_fate *f = &fates[i + j];
            bool must = sure && f->stored < c.at && f->deleted >= c.at;
            if (text[j] == 'W' || text[j] == 'G')
                return wrong(v, "block %llu came back wrong", (unsigned long long)f->no);
            if (must && text[j] != '.')
                return wrong(v, "block %llu was stored and is lost (%c)", (unsigned long long)f->no,
                             text[j]);
            v->right += text[j] == '.';
        }
    }
    return true;
}

static bool check(const struct scene *s, const char *dir, const struct crash_fate *fates, size_t n,
                  struct crash_case c, struct verdict *v)
{
    struct ts_opts o = options(s, dir);
    struct ts_rig r;
    bool sure = c.variant < CRASH_KILLS || !strcmp(s->sync, "full");
    ts_opt(&o, "posix_io_engine", "psync");
    ts_opt(&o, "posix_data_trans_concurrency", "1");
    if (ts_rig_open(&r, &o))
        return wrong(v, "the store does not open: %s", r.why);
    bool ok = check_blocks(&r, fates, n, c, sure, v);
    for (unsigned i = 0; ok && i < 2; i++)
        if (strspn(ts_rig_dump(&r, NEW + 4 * i, 4), ".") != 4 ||
            strspn(ts_rig_load(&r, NEW + 4 * i, 4), ".") != 4)
            ok = wrong(v, "new blocks: %s", r.text);
    ts_rig_close(&r);
    if (!ok)
        return false;
    if (ts_rig_open(&r, &o))
        return wrong(v, "the store does not open again: %s", r.why);
    if (strspn(ts_rig_load(&r, NEW + 4, 4), ".") != 4)
        ok = wrong(v, "blocks dumped after the crash are gone at the next start: %s", r.text);
    if (ok && strspn(ts_rig_lookup(&r, NEW + 4, 4), "1") != 4)
        ok = wrong(v, "blocks dumped after the crash are not found: %s", r.text);
    ts_rig_close(&r);
    return ok;
}

/* ---- which crashes ---- */

static bool coprime(size_t a, size_t b)
{
    while (b) {
        size_t rest = a % b;
        a = b;
        b = rest;
    }
    return a == 1;
}

/* Each number below `points` once in `points` calls with 0, 1, ..., and the first few of them far
 * apart: steps of the golden ratio, from where the seed says. */
static size_t spread(size_t i, size_t points)
{
    size_t step = (size_t)((double)points * 0.618) + 1;
    while (!coprime(step, points))
        step++;
    return (seed + i * step) % points;
}

/* The case of number i: in a pass over all moments each is met once. */
static struct crash_case case_of(size_t i, size_t points, uint64_t *dice)
{
    size_t pass = i / points;
    struct crash_case c = {.at = 1 + (uint32_t)spread(i % points, points)};
    c.variant = (uint32_t)(ts_every() ? pass : ts_below(dice, WAYS + pass));
    return c;
}

static bool one_case(const struct scene *s, const struct crash_log *log,
                     const struct crash_fate *fates, size_t n, struct crash_case c,
                     struct verdict *v)
{
    const char *dir = ts_dir();
    crash_build(log, c, seed, dir);
    bool ok = check(s, dir, fates, n, c, v);
    ts_remove(dir);
    return ok;
}

static void explore(const struct scene *s, const struct crash_log *log)
{
    static struct crash_fate fates[MAX_FATES];
    size_t n = crash_fates(log, fates, MAX_FATES), points = log->now, cases = 0;
    uint64_t until = ts_now_ms() + (uint64_t)(seconds_each * 1000);
    struct verdict v = {""};
    bool ok = true;
    uint64_t dice = seed;
    for (; ok && (ts_every() ? cases < WAYS * points : ts_now_ms() < until); cases++) {
        struct crash_case c = case_of(cases, points, &dice);
        ok = one_case(s, log, fates, n, c, &v);
        if (ok)
            continue;
        const char *tmp = getenv("TMPDIR");
        char path[TS_PATH];
        snprintf(path, sizeof path, "%s/ucm-crash-%llu.log", tmp && *tmp ? tmp : "/tmp",
                 (unsigned long long)seed);
        crash_log_save(log, path);
        print_message("# %s: %s\n# again: UCM_TEST_SEED=%llu UCM_TEST_FILTER='%s' "
                      "UCM_CRASH_LOG=%s UCM_CRASH_CASE=%u/%u %s\n",
                      s->name, v.text, (unsigned long long)seed, s->name, path, c.at, c.variant,
                      program_invocation_name);
    }
    print_message("# %s: %zu crashes at %zu of %zu moments, %zu blocks came back\n", s->name, cases,
                  cases < points ? cases : points, points, v.right);
    if (!ok)
        fail_msg("%s", v.text);
}

static void test_scene(void **state)
{
    const struct scene *s = *state;
    const char *file = getenv("UCM_CRASH_LOG"), *one = getenv("UCM_CRASH_CASE");
    struct crash_log log;
    struct crash_case c;
    if (file && one && sscanf(one, "%u/%u", &c.at, &c.variant) == 2) {
        static struct crash_fate fates[MAX_FATES];
        struct verdict v = {""};
        crash_log_load(&log, file);
        size_t n = crash_fates(&log, fates, MAX_FATES);
        if (!one_case(s, &log, fates, n, c, &v))
            fail_msg("%s", v.text);
    } else {
        const char *dir = ts_dir();
        run(s, dir, &log);
        ts_remove(dir);
        explore(s, &log);
    }
    crash_log_free(&log);
}

int main(void)
{
    struct CMUnitTest tests[TS_LEN(scenes)];
    setenv("TMPDIR", "/dev/shm", 0); /* there are many syncs */
    seed = ts_seed();
    seconds_each = ts_seconds(20) / TS_LEN(scenes);
    for (size_t i = 0; i < TS_LEN(scenes); i++)
        tests[i] = (struct CMUnitTest){
            .name = scenes[i].name, .test_func = test_scene, .initial_state = (void *)&scenes[i]};
    cmocka_set_test_filter(getenv("UCM_TEST_FILTER"));
    return cmocka_run_group_tests_name("crash points", tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kill -9 at every system call that changes the disk, of a dump, its publication, an eviction, a
 * compaction, an adoption and a start with less capacity; and at random instants.  Afterwards every
 * block is whole and right or absent, what was STORED is there, and dumping goes on.
 *
 * strace counts the calls of one undisturbed run, then kills one run before each of them.  With
 * more calls than the time allows every k-th is taken, from a random one on (UCM_TEST_SECONDS takes
 * more).
 */
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "support.h"

/* Calls that change what is on disk, or who owns it. */
#define CALLS                                                                                      \
    "pwrite64,pwritev,pwritev2,write,writev,fallocate,ftruncate,rename,renameat,renameat2,unlink," \
    "unlinkat,mkdir,mkdirat,link,linkat,fsync,fdatasync,fcntl,copy_file_range"

enum { MAX_POINTS = 4096, OLD = 0, NEW = 1000, BATCH = 5, NBATCHES = 4 };

struct point {
    char call[24];
    unsigned nth; /* of that call, in one thread */
};

/* What is on disk before, what the one who will be killed does, what must hold after. */
struct scene {
    const char *name;
    void (*prepare)(struct ts_opts *o);
    const char *const *lines; /* what it is told, NULL-terminated */
    bool evicts;              /* then old blocks may go */
    unsigned old;             /* blocks from OLD on were stored before */
    const char *call;         /* a call that it must make, or it is another scene */
};

static void ask_ok(struct ts_agent *a, const char *line)
{
    const char *text = ts_agent_ask(a, "%s", line);
    if (strspn(text, ".") != strlen(text))
        fail_msg("%s: %s", line, text);
}

/* ---- the scenes ---- */

static void prepare_nothing(struct ts_opts *o)
{
}

static void prepare_blocks(struct ts_opts *o)
{
    struct ts_agent a;
    ts_agent_sure(&a, o);
    ask_ok(&a, "dump 0 10");
    ask_ok(&a, "dump 10 10");
    assert_int_equal(ts_agent_stop(&a), 0);
}

static void prepare_dead_owner(struct ts_opts *o)
{
    struct ts_agent a;
    ts_agent_sure(&a, o);
    ask_ok(&a, "dump 0 20");
    ts_agent_send(&a, "dump 500 20");
    ts_agent_kill(&a, SIGKILL);
}

static void prepare_full(struct ts_opts *o)
{
    struct ts_agent a;
    ts_opt(o, "posix_capacity_gb", "%.9f", 2.0 / 1024); /* 24 blocks */
    ts_agent_sure(&a, o);
    ask_ok(&a, "dump 0 20");
    ts_agent_ask(&a, "dump 500 20");
    assert_int_equal(ts_agent_stop(&a), 0);
}

static int records(struct ts_agent *a)
{
    return atoi(ts_agent_ask(a, "metric disk_writes_total")) +
           atoi(ts_agent_ask(a, "metric disk_evicted_total"));
}

/* A journal just short of being rewritten: blocks have come and gone. */
static void prepare_long_journal(struct ts_opts *o)
{
    struct ts_agent a;
    ts_opt(o, "posix_capacity_gb", "%.9f", 2.0 / 1024);
    ts_agent_sure(&a, o);
    ask_ok(&a, "dump 0 20");
    for (unsigned i = 0; !atoi(ts_agent_ask(&a, "metric disk_compacted_total")); i++) {
        if (i == 400)
            fail_msg("no compaction after %u dumps", i);
        ts_agent_ask(&a, "dump %u 10", 2000 + i * 10);
    }
    int first = records(&a); /* as many, less what those below add, lead up to the next one */
    for (unsigned i = 0; records(&a) < 2 * first - 300; i++)
        ts_agent_ask(&a, "dump %u 10", 8000 + i * 10);
    assert_int_equal(ts_agent_stop(&a), 0);
}

static void prepare_too_much(struct ts_opts *o)
{
    struct ts_agent a;
    ts_agent_sure(&a, o);
    for (unsigned i = 0; i < 60; i += 20)
        ts_agent_ask(&a, "dump %u 20", i);
    assert_int_equal(ts_agent_stop(&a), 0);
    ts_opt(o, "posix_capacity_gb", "%.9f", 2.0 / 1024);
}

static const char *const few_dumps[] = {"dump 1000 5", "dump 1005 5", "layers 1010 5 7",
                                        "dump 1015 5", NULL};
static const char *const many_dumps[] = {"dump 1000 5",  "dump 1005 5",  "layers 1010 5 7",
                                         "dump 1015 5",  "dump 3000 10", "dump 3010 10",
                                         "dump 3020 10", "dump 3030 10", "dump 3040 10",
                                         "dump 3050 10", "dump 3060 10", "dump 3070 10",
                                         "dump 3080 10", "dump 3090 10", "dump 3100 10",
                                         "dump 3110 10", "dump 3120 10", NULL};

static const struct scene scenes[] = {
    {"first dumps", prepare_nothing, few_dumps, false, 0, "fallocate"},
    {"dumps beside others", prepare_blocks, few_dumps, false, 20, "fallocate"},
    {"adoption of a dead lane", prepare_dead_owner, few_dumps, false, 20, "fcntl"},
    {"eviction", prepare_full, few_dumps, true, 20, "pwrite"},
    {"compaction", prepare_long_journal, many_dumps, true, 20, "rename"},
    {"a smaller capacity", prepare_too_much, few_dumps, true, 60, "unlink"},
};

/* ---- a killed run and what it leaves ---- */

/* Tells it all its lines at once and reads what it answers until it is gone.  *answered: how many
 * of the batches of five new blocks were acknowledged as STORED. */
static bool run_lines(struct ts_agent *a, const struct scene *s, unsigned *answered)
{
    const char *text = ts_agent_reply(a);
    size_t n = 0;

    *answered = 0;
    for (; text && s->lines[n]; n++)
        ts_agent_send(a, "%s", s->lines[n]);
    for (size_t i = 0; i < n && (text = ts_agent_reply(a)); i++) {
        if (strspn(text, ".af") != strlen(text))
            fail_msg("%s: %s: %s", s->name, s->lines[i], text);
        if (i < NBATCHES && !strcmp(text, "....."))
            *answered |= 1u << i;
    }
    return text;
}

static void check_after(const struct scene *s, const struct ts_opts *o, unsigned answered,
                        const char *when)
{
    struct ts_agent a;
    const char *text;

    ts_agent_sure(&a, o);
    for (unsigned i = 0; i < s->old; i += 10) {
        text = ts_agent_ask(&a, "load %u 10", OLD + i);
        if (strspn(text, s->evicts ? ".-" : ".") != 10)
            fail_msg("%s, killed %s: old blocks from %u: %s", s->name, when, i, text);
    }
    for (unsigned b = 0; b < NBATCHES; b++) {
        bool sure = (answered >> b & 1) && !s->evicts;
        text = ts_agent_ask(&a, "load %u %u", NEW + b * BATCH, BATCH);
        if (strspn(text, sure ? "." : ".-") != BATCH)
            fail_msg("%s, killed %s: new batch %u (%s): %s", s->name, when, b,
                     sure ? "STORED" : "not yet", text);
    }
    for (unsigned b = 0; b < NBATCHES; b++) {
        ask_ok(&a, b % 2 ? "dump 1005 5" : "dump 1000 5");
        text = ts_agent_ask(&a, "load %u %u", NEW + b % 2 * BATCH, BATCH);
        if (strcmp(text, "....."))
            fail_msg("%s, killed %s: dumped again and loaded: %s", s->name, when, text);
    }
    assert_int_equal(ts_agent_stop(&a), 0);
}

/* What a scene begins with is made once, and copied for each run. */
static struct ts_opts make_template(void **state, const struct scene *s, const char *engine,
                                    const char *dir)
{
    struct ts_opts o = ts_opts_for(((const struct ts_stack *)*state)->pipeline, dir);
    ts_opt(&o, "posix_io_engine", "%s", engine);
    s->prepare(&o);
    return o;
}

static const char *copy_template(struct ts_opts *o, const char *from)
{
    char command[2 * TS_PATH];
    const char *dir = ts_dir();

    snprintf(command, sizeof command, "cp -a '%s/.' '%s'", from, dir);
    assert_int_equal(system(command), 0);
    ts_opt(o, "storage_backends", "%s", dir);
    return dir;
}

static void kill_at(const struct scene *s, struct ts_opts o, const char *from,
                    const struct point *p)
{
    char inject[128], when[64];
    const char *dir = copy_template(&o, from);
    const char *const strace[] = {
        "strace", "-f",         "-qq", "-o",   "/dev/null", "-E", "ASAN_OPTIONS=detect_leaks=0",
        "-e",     "trace=none", "-e",  inject, NULL};
    struct ts_agent a;
    unsigned answered;

    snprintf(inject, sizeof inject, "inject=%s:signal=SIGKILL:when=%u", p->call, p->nth);
    snprintf(when, sizeof when, "at %s %u", p->call, p->nth);
    ts_agent_start(&a, strace, &o);
    if (run_lines(&a, s, &answered))
        ts_agent_stop(&a); /* this time it made fewer calls, and may be killed while it closes */
    else
        ts_agent_kill(&a, SIGKILL);
    check_after(s, &o, answered, when);
    ts_remove(dir);
}

/* ---- the points to kill at ---- */

static int compare_lines(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Each line of the trace is "pid call(..."; the nth of a call in its thread is a point. */
static size_t read_points(const char *path, struct point *points)
{
    char *lines[MAX_POINTS], line[512], was[64] = "";
    size_t n = 0, used = 0, nth = 0;
    FILE *f = fopen(path, "r");

    assert_non_null(f);
    while (fgets(line, sizeof line, f) && n < MAX_POINTS) {
        char pid[16], call[24], bracket;
        if (sscanf(line, "%15[0-9] %23[a-z0-9_]%c", pid, call, &bracket) != 3 || bracket != '(')
            continue;
        if (asprintf(&lines[n++], "%s %s", call, pid) < 0)
            ts_die("no memory");
    }
    fclose(f);
    qsort(lines, n, sizeof *lines, compare_lines);
    for (size_t i = 0; i < n; i++) {
        struct point p = {.nth = 0};
        nth = strcmp(lines[i], was) ? 1 : nth + 1;
        snprintf(was, sizeof was, "%s", lines[i]);
        sscanf(lines[i], "%23s", p.call);
        p.nth = (unsigned)nth;
        bool known = false;
        for (size_t k = 0; k < used && !known; k++)
            known = !strcmp(points[k].call, p.call) && points[k].nth == p.nth;
        if (!known)
            points[used++] = p;
        free(lines[i]);
    }
    return used;
}

static size_t find_points(const struct scene *s, struct ts_opts o, const char *from,
                          struct point *points)
{
    char trace[TS_PATH];
    const char *dir = copy_template(&o, from);
    snprintf(trace, sizeof trace, "%s/trace", ts_dir());
    const char *const strace[] = {
        "strace", "-f",           "-qq", "-o", trace, "-E", "ASAN_OPTIONS=detect_leaks=0",
        "-e",     "trace=" CALLS, NULL};
    struct ts_agent a;
    unsigned answered;

    ts_agent_start(&a, strace, &o);
    assert_true(run_lines(&a, s, &answered));
    assert_int_equal(ts_agent_stop(&a), 0);
    size_t n = read_points(trace, points), made = 0;
    for (size_t i = 0; i < n; i++)
        made += strstr(points[i].call, s->call) != NULL;
    if (!made)
        fail_msg("%s: no %s among %zu calls", s->name, s->call, n);
    ts_remove(dir);
    return n;
}

static bool strace_works(void)
{
    return !system(
        "strace -qq -o /dev/null -e trace=none -e inject=write:signal=SIGKILL:when=99 true "
        ">/dev/null 2>&1");
}

static size_t common_divisor(size_t a, size_t b)
{
    return b ? common_divisor(b, a % b) : a;
}

static void test_killed_at_each_call(void **state, const struct scene *s)
{
    static struct point points[MAX_POINTS];
    uint64_t rnd = ts_seed();

    if (!strace_works())
        TS_SKIP("strace is missing or may not trace; the random kills below remain");
    const char *from = ts_dir();
    struct ts_opts o = make_template(state, s, "psync", from); /* whose calls can be seen */
    size_t n = find_points(s, o, from, points);
    /* steps of a golden part of n visit them evenly, however few there is time for */
    size_t at = ts_below(&rnd, n), step = n * 618 / 1000 + 1, done = 0;
    while (common_divisor(step, n) > 1)
        step++;
    uint64_t until = ts_now_ms() + (uint64_t)(ts_seconds(40) * 1000 / (2 * TS_LEN(scenes)));
    for (; done < n && (done < 5 || ts_now_ms() < until); done++, at = (at + step) % n)
        kill_at(s, o, from, &points[at]);
    print_message("# %s: killed at %zu of %zu calls\n", s->name, done, n);
    ts_remove(from);
}

#define SCENE_TEST(i)                                                                              \
    static void test_scene_##i(void **state)                                                       \
    {                                                                                              \
        test_killed_at_each_call(state, &scenes[i]);                                               \
    }
SCENE_TEST(0)
SCENE_TEST(1)
SCENE_TEST(2)
SCENE_TEST(3)
SCENE_TEST(4)
SCENE_TEST(5)

/* ---- at random ---- */

static void sleep_us(uint64_t us)
{
    struct timespec t = {(time_t)(us / 1000000), (long)(us % 1000000) * 1000};
    nanosleep(&t, NULL); /* the time of the kill is what is tried out */
}

static void random_kills(void **state, const char *engine, const struct scene *s, unsigned rounds)
{
    uint64_t rnd = ts_seed();
    const char *from = ts_dir();
    struct ts_opts o = make_template(state, s, engine, from);

    for (unsigned i = 0; i < rounds; i++) {
        const char *dir = copy_template(&o, from);
        struct ts_agent a;
        unsigned answered = 0;

        ts_agent_sure(&a, &o);
        for (size_t k = 0; s->lines[k]; k++)
            ts_agent_send(&a, "%s", s->lines[k]);
        sleep_us(ts_below(&rnd, 1u << (5 + i % 12)));
        kill(a.pid, SIGKILL);
        const char *text;
        for (unsigned b = 0; (text = ts_agent_reply(&a)); b++)
            if (b < NBATCHES && !strcmp(text, "....."))
                answered |= 1u << b;
        ts_agent_kill(&a, SIGKILL);
        check_after(s, &o, answered, "at random");
        ts_remove(dir);
    }
    ts_remove(from);
}

static void test_random_kills(void **state)
{
    static const char *const engines[] = {"psync", "aio", "io_uring"};
    for (size_t e = 0; e < TS_LEN(engines); e++)
        for (size_t s = 0; s < TS_LEN(scenes); s++)
            random_kills(state, engines[e], &scenes[s], 6);
}

int main(void)
{
    static const struct ts_case cases[] = {
        {"killed in first dumps", test_scene_0, .needs_persist = true},
        {"killed in dumps beside others", test_scene_1, .needs_persist = true},
        {"killed in adoption", test_scene_2, .needs_persist = true},
        {"killed in eviction", test_scene_3, .needs_persist = true},
        {"killed in compaction", test_scene_4, .needs_persist = true},
        {"killed in shrinking", test_scene_5, .needs_persist = true},
        {"killed at random", test_random_kills, .needs_persist = true},
    };
    return ts_run_cases("crash", cases, TS_LEN(cases));
}

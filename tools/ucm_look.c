/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ls, stat and verify: what a storage backend holds.  All three walk it with ucm_inspect, in a
 * child (ucm_patience.c), which only reads, so engines may be running.  What verify finds bad it
 * drops with --repair, by ucm_manage.
 */
#include "tool.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

enum { SHORT_NS = 12 }; /* hex digits of a namespace that a table shows */

struct bad {
    char ns[40], lane[40];
    uint32_t segment, slot;
    ucm_key key;
};
struct look {
    int json, blocks, repair; /* options */
    const char *key_file;
    uint64_t timeout_s;
    ucm_conf *conf;
    struct report report;
    struct ucm_lane_info *lanes; /* with strings of its own */
    size_t nlanes, locked;       /* locked: of them, with a key that was not given */
    int failed;                  /* out of memory within a callback */
    uint64_t seen, bad, unread;  /* blocks; unread: of the bad ones */
    struct bad *v;               /* with repair */
    size_t nv;
    struct ucm_manage_total repaired;
    int on_tty;
    time_t shown;
};
#define AT(field)   offsetof(struct look, field)
#define NEXT_ANSWER "seconds to wait for the next answer of the storage"
static const struct opt stat_opts[] = {
    {"timeout-s", OPT_COUNT, AT(timeout_s), "COUNT", "5", NEXT_ANSWER},
    KEY_OPTION(AT(key_file)),
    {"json", OPT_FLAG, AT(json), NULL, NULL, "one JSON object"},
    {NULL},
};
static const struct opt ls_opts[] = {
    {"blocks", OPT_FLAG, AT(blocks), NULL, NULL, "list the blocks as well"},
    {"timeout-s", OPT_COUNT, AT(timeout_s), "COUNT", "5", NEXT_ANSWER},
    KEY_OPTION(AT(key_file)),
    {"json", OPT_FLAG, AT(json), NULL, NULL, "one JSON object"},
    {NULL},
};
static const struct opt verify_opts[] = {
    {"repair", OPT_FLAG, AT(repair), NULL, NULL, "drop what is bad, also from lanes in use"},
    {"timeout-s", OPT_COUNT, AT(timeout_s), "COUNT", "30",
     NEXT_ANSWER "; with --repair, also for owners of lanes when none of them answers"},
    KEY_OPTION(AT(key_file)),
    {"json", OPT_FLAG, AT(json), NULL, NULL, "one JSON object"},
    {NULL},
};
#undef AT

static void free_lanes(struct look *l)
{
    ucm_conf_free(l->conf);
    for (size_t i = 0; i < l->nlanes; i++) {
        free((char *)l->lanes[i].ns);
        free((char *)l->lanes[i].ns_text);
        free((char *)l->lanes[i].lane);
        free((char *)l->lanes[i].host);
    }
    free(l->lanes);
    l->lanes = NULL;
    l->nlanes = 0;
}

/* Line ends and other control characters would break a table. */
static char *copy_line(const char *s)
{
    char *copy = strdup(s ? s : "");
    size_t len = 0;

    for (char *p = copy; p && *p; p++) {
        if ((unsigned char)*p < 0x20)
            *p = ' ';
        if (*p != ' ')
            len = (size_t)(p - copy) + 1;
    }
    if (copy)
        copy[len] = '\0';
    return copy;
}

static void keep_lane(void *arg, const struct ucm_lane_info *lane)
{
    struct look *l = arg;
    struct ucm_lane_info *v = reallocarray(l->lanes, l->nlanes + 1, sizeof *v);

    if (!v) {
        l->failed = 1;
        return;
    }
    l->lanes = v;
    v += l->nlanes++;
    *v = *lane;
    l->locked += lane->locked != 0;
    v->ns = copy_line(lane->ns);
    v->ns_text = copy_line(lane->ns_text);
    v->lane = copy_line(lane->lane);
    v->host = copy_line(lane->host);
    if (!v->ns || !v->ns_text || !v->lane || !v->host)
        l->failed = 1;
}

static void hex_key(const ucm_key *key, char text[33])
{
    for (size_t i = 0; i < sizeof key->b; i++)
        snprintf(text + 2 * i, 3, "%02x", key->b[i]);
}

int check_backend(const char *dir)
{
    struct stat st;
    char path[PATH_MAX];

    if (stat(dir, &st) < 0)
        return cannot("%s: %m", dir);
    if (!S_ISDIR(st.st_mode))
        return cannot("%s: not a directory; give the one that storage_backends names", dir);
    if (snprintf(path, sizeof path, "%s/ucm", dir) >= (int)sizeof path)
        return cannot("%s: name too long", dir);
    int err = lstat(path, &st) < 0 ? errno : 0;
    if (err == ENOENT)
        return cannot("%s: not a storage backend of ucm: there is no %s in it", dir, path);
    if (!err && !S_ISDIR(st.st_mode))
        return cannot("%s: not a directory; links below a backend are not followed", path);
    return TOOL_GOOD;
}

int conf_with_key(const char *file, ucm_conf **conf_p)
{
    if (ucm_conf_new(conf_p))
        return cannot("out of memory");
    file = file ? file : getenv("UCM_INTEGRITY_KEY_FILE");
    return file && ucm_conf_set(*conf_p, "integrity_key_file", file)
               ? cannot("%s", ucm_conf_error(*conf_p))
               : TOOL_GOOD;
}

static int walk(struct look *l, const char *dir, unsigned flags,
                void (*block)(void *, const struct ucm_lane_info *, const struct ucm_block_info *))
{
    int status = conf_with_key(l->key_file, &l->conf);
    struct ucm_inspect how = {.flags = flags,
                              .conf = l->conf,
                              .arg = l,
                              .lane = keep_lane,
                              .block = block,
                              .answered = storage_answered};
    int err = status ? 0 : ucm_inspect(dir, &how);

    if (err < 0)
        return cannot("%s", ucm_conf_error(l->conf));
    if (l->failed)
        return cannot("out of memory");
    if (l->locked)
        fprintf(stderr,
                "ucm: %zu lanes are sealed with a key that was not given, and what is in them "
                "cannot be told; give --integrity-key-file\n",
                l->locked);
    return status;
}

static const char *short_ns(const struct look *l, const char *ns, char buf[SHORT_NS + 1])
{
    if (l->json)
        return ns;
    snprintf(buf, SHORT_NS + 1, "%s", ns);
    return buf;
}

/* ---- ls ---- */

static void list_block(void *arg, const struct ucm_lane_info *lane, const struct ucm_block_info *b)
{
    struct look *l = arg;
    char ns[SHORT_NS + 1], key[33], pinned[32] = "";
    time_t until = (time_t)b->pinned;
    struct tm tm;

    hex_key(&b->key, key);
    if (until && localtime_r(&until, &tm))
        strftime(pinned, sizeof pinned, "%F %T", &tm);
    report_row(&l->report, (union cell[]){{.text = short_ns(l, lane->ns, ns)},
                                          {.text = lane->lane},
                                          {.text = key},
                                          {.num = b->segment},
                                          {.num = b->slot},
                                          {.num = b->depth},
                                          {.num = (double)b->used},
                                          {.text = pinned},
                                          {.num = (double)b->pinned}});
}

static const struct column block_columns[] = {
    {"namespace", "namespace", COLUMN_TEXT, -SHORT_NS},
    {"lane", "lane", COLUMN_TEXT, -24},
    {"key", "key", COLUMN_TEXT, -32},
    {"segment", "segment", COLUMN_COUNT, 7},
    {"slot", "slot", COLUMN_COUNT, 8},
    {"depth", "depth", COLUMN_COUNT, 6},
    {"used", NULL, COLUMN_COUNT, 0},
    {"pinned_until", "pinned until", COLUMN_TEXT, 0},
    {"pinned", NULL, COLUMN_COUNT, 0},
};
static const struct column lane_columns[] = {
    {"namespace", "namespace", COLUMN_TEXT, -SHORT_NS},
    {"lane", "lane", COLUMN_TEXT, -24},
    {"rank", "rank", COLUMN_COUNT, 4},
    {"ranks", "of", COLUMN_COUNT, 4},
    {"state", "state", COLUMN_TEXT, -5},
    {"block_size", "block", COLUMN_SIZE, 8},
    {"blocks", "blocks", COLUMN_COUNT, 8},
    {"slots", "slots", COLUMN_COUNT, 8},
    {"bytes", "bytes", COLUMN_SIZE, 8},
    {"host", "owner", COLUMN_TEXT, 0},
    {"pid", NULL, COLUMN_COUNT},
    {"segments", NULL, COLUMN_COUNT},
    {"records", NULL, COLUMN_COUNT},
    {"epoch", NULL, COLUMN_COUNT},
    {"generation", NULL, COLUMN_COUNT},
    {"unreadable", NULL, COLUMN_COUNT},
    {"locked", NULL, COLUMN_COUNT},
};

static void list_lane(struct look *l, const struct ucm_lane_info *v)
{
    char ns[SHORT_NS + 1], owner[128];

    snprintf(owner, sizeof owner, "%s pid %d", v->host, v->pid);
    report_row(&l->report, (union cell[]){{.text = short_ns(l, v->ns, ns)},
                                          {.text = v->lane},
                                          {.num = v->rank},
                                          {.num = v->ranks},
                                          {.text = v->live ? "live" : "dead"},
                                          {.num = (double)v->block_size},
                                          {.num = v->locked ? NAN : (double)v->blocks},
                                          {.num = (double)v->slots},
                                          {.num = (double)v->bytes},
                                          {.text = l->json ? v->host : owner},
                                          {.num = v->pid},
                                          {.num = (double)v->segments},
                                          {.num = (double)v->records},
                                          {.num = (double)v->epoch},
                                          {.num = (double)v->generation},
                                          {.num = (double)v->error},
                                          {.num = v->locked}});
}

static int show_ls(void *state, const char *dir)
{
    struct look *l = state;
    int status = check_backend(dir);

    if (status)
        return status;
    report_open(&l->report, stdout, l->json);
    report_text(&l->report, "backend", dir);
    if (l->blocks)
        report_table(&l->report, "blocks", block_columns, COUNT_OF(block_columns));
    status = walk(l, dir, 0, l->blocks ? list_block : NULL);
    storage_done();
    if (l->blocks)
        report_table_end(&l->report);
    if (!status) {
        report_table(&l->report, "lanes", lane_columns, COUNT_OF(lane_columns));
        for (size_t i = 0; i < l->nlanes; i++)
            list_lane(l, &l->lanes[i]);
        report_table_end(&l->report);
    }
    report_close(&l->report);
    free_lanes(l);
    return status;
}

/* ---- stat ---- */

static const struct column ns_columns[] = {
    {"namespace", "namespace", COLUMN_TEXT, -SHORT_NS},
    {"ranks", "ranks", COLUMN_COUNT, 5},
    {"lanes", "lanes", COLUMN_COUNT, 5},
    {"live", "live", COLUMN_COUNT, 4},
    {"block_size", "block", COLUMN_SIZE, 9},
    {"shard_size", "shard", COLUMN_SIZE, 9},
    {"blocks", "blocks", COLUMN_COUNT, 9},
    {"slots", "slots", COLUMN_COUNT, 9},
    {"bytes", "bytes", COLUMN_SIZE, 9},
    {"text", "what it is", COLUMN_TEXT, 0},
};

/* Adds b's figures to a, which keeps its own names; live and pid become counts: lanes, live ones.
 */
static void add_lane(struct ucm_lane_info *a, const struct ucm_lane_info *b)
{
    a->live += b->live != 0;
    a->pid++;
    a->segments += b->segments;
    a->slots += b->slots;
    a->blocks += b->blocks;
    a->bytes += b->bytes;
    a->bad += b->bad;
    a->error += b->error;
}

static void sum_of_namespace(struct look *l, size_t first, struct ucm_lane_info *sum)
{
    const struct ucm_lane_info *f = &l->lanes[first];

    *sum = (struct ucm_lane_info){.ns = f->ns,
                                  .ns_text = f->ns_text,
                                  .ranks = f->ranks,
                                  .block_size = f->block_size,
                                  .shard_size = f->shard_size};
    for (size_t i = first; i < l->nlanes; i++)
        if (!strcmp(l->lanes[i].ns, f->ns))
            add_lane(sum, &l->lanes[i]);
}

static int seen_before(const struct look *l, size_t i)
{
    for (size_t k = 0; k < i; k++)
        if (!strcmp(l->lanes[k].ns, l->lanes[i].ns))
            return 1;
    return 0;
}

/* Those who keep no mountinfo say nothing of it. */
static void stat_mount(struct report *r, const char *dir)
{
    struct mount_facts m = {.type = ""};
    struct stat st;
    FILE *f = fopen("/proc/self/mountinfo", "re");

    if (f && stat(dir, &st) == 0)
        mount_look(f, st.st_dev, &m);
    if (f)
        fclose(f);
    report_text(r, "fs_type", m.type);
    if (*m.options || r->json)
        report_text(r, "fs_options", m.options);
    if (*m.warning || r->json)
        report_text(r, "fs_warning", m.warning);
}

static void stat_totals(struct look *l, const char *dir)
{
    struct report *r = &l->report;
    struct ucm_lane_info sum = {0};
    struct statvfs fs;
    unsigned spaces = 0;

    for (size_t i = 0; i < l->nlanes; i++) {
        add_lane(&sum, &l->lanes[i]);
        spaces += !seen_before(l, i);
    }
    report_text(r, "backend", dir);
    report_number(r, "namespaces", COLUMN_COUNT, spaces);
    report_number(r, "lanes", COLUMN_COUNT, sum.pid);
    report_number(r, "live", COLUMN_COUNT, sum.live);
    report_number(r, "segments", COLUMN_COUNT, (double)sum.segments);
    report_number(r, "slots", COLUMN_COUNT, (double)sum.slots);
    report_number(r, "blocks", COLUMN_COUNT, (double)sum.blocks);
    report_number(r, "bytes", COLUMN_SIZE, (double)sum.bytes);
    report_number(r, "unreadable", COLUMN_COUNT, (double)sum.error);
    if (l->locked || r->json)
        report_number(r, "locked", COLUMN_COUNT, (double)l->locked);
    stat_mount(r, dir);
    if (statvfs(dir, &fs) == 0) {
        report_number(r, "fs_free", COLUMN_SIZE, (double)fs.f_bavail * (double)fs.f_frsize);
        report_number(r, "fs_size", COLUMN_SIZE, (double)fs.f_blocks * (double)fs.f_frsize);
    }
}

static int show_stat(void *state, const char *dir)
{
    struct look *l = state;
    int status = check_backend(dir);

    if (!status)
        status = walk(l, dir, 0, NULL);
    if (!status) {
        report_open(&l->report, stdout, l->json);
        stat_totals(l, dir);
        storage_done();
        report_table(&l->report, "by_namespace", ns_columns, COUNT_OF(ns_columns));
        for (size_t i = 0; i < l->nlanes; i++) {
            struct ucm_lane_info v;
            char ns[SHORT_NS + 1];
            if (seen_before(l, i))
                continue;
            sum_of_namespace(l, i, &v);
            report_row(&l->report, (union cell[]){{.text = short_ns(l, v.ns, ns)},
                                                  {.num = v.ranks},
                                                  {.num = v.pid},
                                                  {.num = v.live},
                                                  {.num = (double)v.block_size},
                                                  {.num = (double)v.shard_size},
                                                  {.num = (double)v.blocks},
                                                  {.num = (double)v.slots},
                                                  {.num = (double)v.bytes},
                                                  {.text = v.ns_text}});
        }
        report_table_end(&l->report);
        report_close(&l->report);
    }
    free_lanes(l);
    return status;
}

/* ---- verify ---- */

static const struct column bad_columns[] = {
    {"namespace", "namespace", COLUMN_TEXT, -SHORT_NS},
    {"lane", "lane", COLUMN_TEXT, -24},
    {"key", "key", COLUMN_TEXT, -32},
    {"segment", "segment", COLUMN_COUNT, 7},
    {"slot", "slot", COLUMN_COUNT, 8},
    {"error", "error", COLUMN_TEXT, 0},
};

/* At most once a second, and only to a person. */
static void show_progress(struct look *l)
{
    time_t now = time(NULL);

    if (l->on_tty && now != l->shown) {
        l->shown = now;
        fprintf(stderr, "\rucm verify: %llu blocks, %llu bad", (unsigned long long)l->seen,
                (unsigned long long)l->bad);
    }
}

static void keep_bad(struct look *l, const struct ucm_lane_info *lane,
                     const struct ucm_block_info *b)
{
    struct bad *v = l->nv & (l->nv - 1) ? l->v : reallocarray(l->v, 2 * l->nv + 1, sizeof *v);

    if (!v) {
        l->failed = 1;
        return;
    }
    l->v = v;
    v += l->nv++;
    *v = (struct bad){.segment = b->segment, .slot = b->slot, .key = b->key};
    snprintf(v->ns, sizeof v->ns, "%s", lane->ns);
    snprintf(v->lane, sizeof v->lane, "%s", lane->lane);
}

static int by_place(const void *a, const void *b)
{
    const struct bad *x = a, *y = b;
    int order = strcmp(x->ns, y->ns);

    if (!order)
        order = strcmp(x->lane, y->lane);
    if (!order)
        order = (x->segment > y->segment) - (x->segment < y->segment);
    return order ? order : (x->slot > y->slot) - (x->slot < y->slot);
}

static int was_bad(void *arg, const char *ns, const char *lane, const struct ucm_block_info *b)
{
    const struct look *l = arg;
    struct bad one = {.segment = b->segment, .slot = b->slot};

    snprintf(one.ns, sizeof one.ns, "%s", ns);
    snprintf(one.lane, sizeof one.lane, "%s", lane);
    const struct bad *at = l->nv ? bsearch(&one, l->v, l->nv, sizeof one, by_place) : NULL;
    return at && !memcmp(&at->key, &b->key, sizeof b->key);
}

static int repair(struct look *l, const char *dir)
{
    struct ucm_manage how = {.op = UCM_MANAGE_REPAIR,
                             .conf = l->conf,
                             .timeout_ms =
                                 l->timeout_s > 1000000 ? 1000000000 : (int)l->timeout_s * 1000,
                             .arg = l,
                             .want = was_bad};

    if (l->nv)
        qsort(l->v, l->nv, sizeof *l->v, by_place);
    int err = ucm_manage(dir, &how, &l->repaired);
    return err < 0 ? cannot("cannot be repaired: %s", ucm_conf_error(l->conf)) : TOOL_GOOD;
}

static void verify_block(void *arg, const struct ucm_lane_info *lane,
                         const struct ucm_block_info *b)
{
    struct look *l = arg;
    char ns[SHORT_NS + 1], key[33];

    l->seen++;
    show_progress(l);
    if (!b->err)
        return;
    l->unread += b->err != -EBADMSG;
    if (l->repair && b->err == -EBADMSG)
        keep_bad(l, lane, b);
    if (!l->bad++ && !l->json)
        report_table(&l->report, "bad_blocks", bad_columns, COUNT_OF(bad_columns));
    hex_key(&b->key, key);
    report_row(&l->report, (union cell[]){{.text = short_ns(l, lane->ns, ns)},
                                          {.text = lane->lane},
                                          {.text = key},
                                          {.num = b->segment},
                                          {.num = b->slot},
                                          {.text = b->err == -EBADMSG ? "failed its check"
                                                                      : ucm_strerror(b->err)}});
}

static void verify_summary(struct look *l, uint64_t unreadable, double bytes, double seconds)
{
    struct report *r = &l->report;

    if (l->json) {
        report_number(r, "blocks", COLUMN_COUNT, (double)l->seen);
        report_number(r, "bad", COLUMN_COUNT, (double)l->bad);
        report_number(r, "unreadable", COLUMN_COUNT, (double)unreadable);
        report_number(r, "locked", COLUMN_COUNT, (double)l->locked);
        report_number(r, "seconds", COLUMN_NUMBER, seconds);
        if (l->repair) {
            report_number(r, "dropped", COLUMN_COUNT, (double)l->repaired.done);
            report_number(r, "left", COLUMN_COUNT, (double)(l->repaired.left + l->unread));
            report_number(r, "lanes_left", COLUMN_COUNT, (double)l->repaired.unreadable);
        }
        return;
    }
    char size[16];
    fprintf(r->out, "%s%llu blocks (%s) in %zu lanes read in %.1f s: %llu bad", l->bad ? "\n" : "",
            (unsigned long long)l->seen, human_size(bytes, size, sizeof size), l->nlanes, seconds,
            (unsigned long long)l->bad);
    if (unreadable)
        fprintf(r->out, ", %llu files could not be read", (unsigned long long)unreadable);
    if (l->repair)
        fprintf(r->out, "; %llu dropped, %llu left", (unsigned long long)l->repaired.done,
                (unsigned long long)(l->repaired.left + l->unread));
    if (l->repaired.unreadable)
        fprintf(r->out, ", %llu lanes cannot be repaired",
                (unsigned long long)l->repaired.unreadable);
    fputc('\n', r->out);
}

static int show_verify(void *state, const char *dir)
{
    struct look *l = state;
    struct timespec from, to;
    int status = check_backend(dir);

    if (status)
        return status;
    l->on_tty = isatty(STDERR_FILENO);
    report_open(&l->report, stdout, l->json);
    if (l->json)
        report_table(&l->report, "bad_blocks", bad_columns, COUNT_OF(bad_columns));
    clock_gettime(CLOCK_MONOTONIC, &from);
    status = walk(l, dir, UCM_INSPECT_VERIFY, verify_block);
    storage_done(); /* a repair waits for owners, and has a time for that */
    clock_gettime(CLOCK_MONOTONIC, &to);
    if (l->shown)
        fputs("\r\033[K", stderr);
    report_table_end(&l->report);
    uint64_t unreadable = 0;
    for (size_t i = 0; i < l->nlanes; i++)
        unreadable += l->lanes[i].error;
    if (!status && l->repair && (l->bad || unreadable))
        status = repair(l, dir);
    if (!status) {
        double bytes = 0;
        for (size_t i = 0; i < l->nlanes; i++) {
            bytes += (double)l->lanes[i].blocks * (double)l->lanes[i].block_size;
        }
        verify_summary(l, unreadable, bytes,
                       (double)(to.tv_sec - from.tv_sec) +
                           (double)(to.tv_nsec - from.tv_nsec) / 1e9);
        uint64_t left =
            l->repair ? l->repaired.left + l->repaired.unreadable + l->unread : l->bad + unreadable;
        status = left || l->locked ? TOOL_BAD : TOOL_GOOD;
    }
    free(l->v);
    report_close(&l->report);
    free_lanes(l);
    return status;
}

/* ---- */

static int ask(void *state, const char *dir, int (*run)(void *state, const char *dir))
{
    const struct look *l = state;
    return ask_storage(&(struct asking){dir, l->timeout_s, run, state});
}

static int run_ls(void *state, unsigned n, char **operands)
{
    return ask(state, operands[0], show_ls);
}

static int run_stat(void *state, unsigned n, char **operands)
{
    return ask(state, operands[0], show_stat);
}

static int run_verify(void *state, unsigned n, char **operands)
{
    return ask(state, operands[0], show_verify);
}

const struct verb verb_ls = {
    .name = "ls",
    .operands = "DIR",
    .help = "list the lanes (and blocks) of a storage backend",
    .about =
        "Lists what a storage backend holds: every lane of every namespace, who owns it, how many "
        "blocks and bytes. When the storage does not answer, it says so and ends with 2. Reads "
        "only; "
        "engines may be running.",
    .opts = ls_opts,
    .size = sizeof(struct look),
    .min_operands = 1,
    .max_operands = 1,
    .run = run_ls,
};
const struct verb verb_stat = {
    .name = "stat",
    .operands = "DIR",
    .help = "totals of a storage backend, by namespace",
    .about =
        "Adds up a storage backend: namespaces and what each is for, lanes, blocks, bytes, and the "
        "room left on the filesystem. Says which filesystem that is, how it is mounted if it is "
        "NFS, and what of that is not good for a backend. When the storage does not answer, it "
        "says so and ends with 2. Reads only; engines may be running.",
    .opts = stat_opts,
    .size = sizeof(struct look),
    .min_operands = 1,
    .max_operands = 1,
    .run = run_stat,
};
const struct verb verb_verify = {
    .name = "verify",
    .operands = "DIR",
    .help = "read and check every block of a storage backend, and drop what is bad",
    .about =
        "Reads every block and checks length, header, identity and checksums. Prints each bad one. "
        "Changes nothing without --repair: an engine that meets a bad block drops it by itself. "
        "With it bad blocks are dropped, those of lanes in use by their owners, who see for "
        "themselves; and a journal that nobody can read is replaced, or its lane removed. Exit "
        "status: 0 all good, or is now, 1 bad blocks, unreadable files (with --repair: are left) "
        "or lanes whose key was not given, 2 could not run, or the storage does not answer.",
    .opts = verify_opts,
    .size = sizeof(struct look),
    .min_operands = 1,
    .max_operands = 1,
    .run = run_verify,
};

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rm, pin, unpin and gc: change what storage backends hold, while engines run.  All four are one
 * call of ucm_manage for each directory; the words of each are here.
 */
#include "tool.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct change {
    int json, all; /* options */
    const char *ns, *key, *key_file, *older_than, *pin_for, *capacity_gb;
    uint64_t timeout_s;
    struct ucm_manage how;
    struct report report;
    const char *backend;
    int rows;
    struct ucm_manage_total total;
};
#define AT(field) offsetof(struct change, field)
#define WHICH                                                                                      \
    {"namespace", OPT_TEXT,                                                                        \
     AT(ns),      "NS",                                                                            \
     NULL,        "of this namespace: its first 8 digits or more (see `ucm stat`), or its text"},  \
        {"key", OPT_TEXT, AT(key), "HEX", NULL, "whose key begins with these hex digits"},         \
    {                                                                                              \
        "all", OPT_FLAG, AT(all), NULL, NULL, "all there are"                                      \
    }
#define COMMON                                                                                     \
    {"timeout-s", OPT_COUNT, AT(timeout_s),                                                        \
     "COUNT",     "30",      "seconds to wait for owners of lanes when none of them answers"},     \
        KEY_OPTION(AT(key_file)), {"json", OPT_FLAG, AT(json), NULL, NULL, "one JSON object"},     \
    {                                                                                              \
        NULL                                                                                       \
    }
static const struct opt rm_opts[] = {
    WHICH,
    {"older-than", OPT_TEXT, AT(older_than), "TIME", NULL,
     "not used for so long: 90s, 15m, 12h, 7d or 2w"},
    COMMON,
};
static const struct opt pin_opts[] = {
    WHICH,
    {"for", OPT_TEXT, AT(pin_for), "TIME", NULL, "how long: 90s, 15m, 12h, 7d or 2w"},
    COMMON,
};
static const struct opt unpin_opts[] = {WHICH, COMMON};
static const struct opt gc_opts[] = {
    {"capacity-gb", OPT_TEXT, AT(capacity_gb), "GB", NULL,
     "what each directory may hold at most, in GiB, as posix_capacity_gb counts it"},
    COMMON,
};
#undef AT

/* ---- words into numbers ---- */

static int parse_time(const char *verb, const char *option, const char *text, int64_t *seconds)
{
    static const char units[] = "smhdw";
    static const int64_t scale[] = {1, 60, 3600, 86400, 604800};
    char *end;

    long long n = isdigit((unsigned char)*text) ? strtoll(text, &end, 10) : 0;
    const char *unit = n > 0 && n < 1000000000 && *end ? strchr(units, *end) : NULL;
    if (!unit || end[1])
        return cannot("%s: --%s %s: not a TIME; give a number and s, m, h, d or w, as in 12h", verb,
                      option, text);
    *seconds = n * scale[unit - units];
    return TOOL_GOOD;
}

static int parse_which(struct change *c, const char *verb)
{
    if (c->key &&
        (strlen(c->key) > 32 || strspn(c->key, "0123456789abcdefABCDEF") != strlen(c->key)))
        return cannot("%s: --key %s: not at most 32 hex digits, as `ucm ls --blocks` prints them",
                      verb, c->key);
    if (!c->all && !c->ns && !c->key && !c->older_than)
        return cannot("%s: which blocks? Say so, or --all; see `ucm help %s`", verb, verb);
    if (c->all && (c->ns || c->key || c->older_than))
        return cannot("%s: --all and a choice exclude each other; leave one out", verb);
    if (c->ns && !*c->ns)
        return cannot("%s: --namespace \"\": none is called so; see `ucm stat`", verb);
    c->how.ns = c->ns;
    c->how.key = c->key;
    return TOOL_GOOD;
}

/* ---- what came of it ---- */

static const struct column columns[] = {
    {"backend", NULL, COLUMN_TEXT, 0},         {"namespace", "namespace", COLUMN_TEXT, -12},
    {"lane", "lane", COLUMN_TEXT, -24},        {"state", "state", COLUMN_TEXT, -5},
    {"chosen", "chosen", COLUMN_COUNT, 8},     {"done", "done", COLUMN_COUNT, 8},
    {"kept", "kept", COLUMN_COUNT, 8},         {"left", "left", COLUMN_COUNT, 8},
    {"segments", "segments", COLUMN_COUNT, 8}, {"error", "error", COLUMN_TEXT, 0},
};

static const char *words_for(const struct ucm_manage_info *info)
{
    switch (-info->err) {
    case 0: return "";
    case ETIMEDOUT: return "its owner does not answer; try again when it does something";
    case ENOTSUP: return "of another format: use the ucm that made it";
    case ENOKEY: return "sealed with a key that was not given: --integrity-key-file";
    default: return strerror(-info->err);
    }
}

static void show_lane(void *arg, const struct ucm_manage_info *v)
{
    struct change *c = arg;
    char ns[13];

    snprintf(ns, sizeof ns, "%s", v->ns);
    if (!c->rows++ && !c->json)
        report_table(&c->report, "lanes", columns, COUNT_OF(columns));
    report_row(&c->report, (union cell[]){{.text = c->backend},
                                          {.text = c->json ? v->ns : ns},
                                          {.text = v->lane},
                                          {.text = v->live ? "live" : "dead"},
                                          {.num = (double)v->chosen},
                                          {.num = (double)v->done},
                                          {.num = (double)v->kept},
                                          {.num = (double)v->left},
                                          {.num = (double)v->segments},
                                          {.text = words_for(v)}});
}

static void add_total(struct ucm_manage_total *sum, const struct ucm_manage_total *t)
{
    sum->namespaces += t->namespaces;
    sum->lanes += t->lanes;
    sum->chosen += t->chosen;
    sum->done += t->done;
    sum->kept += t->kept;
    sum->left += t->left;
    sum->segments += t->segments;
    sum->unreadable += t->unreadable;
    sum->bytes += t->bytes;
}

static void show_total(struct change *c, const char *did)
{
    const struct ucm_manage_total *t = &c->total;
    struct report *r = &c->report;
    char size[16];

    if (c->json) {
        report_number(r, "chosen", COLUMN_COUNT, (double)t->chosen);
        report_number(r, "done", COLUMN_COUNT, (double)t->done);
        report_number(r, "kept", COLUMN_COUNT, (double)t->kept);
        report_number(r, "left", COLUMN_COUNT, (double)t->left);
        report_number(r, "segments", COLUMN_COUNT, (double)t->segments);
        report_number(r, "unreadable", COLUMN_COUNT, (double)t->unreadable);
        if (c->how.op == UCM_MANAGE_GC)
            report_number(r, "bytes", COLUMN_SIZE, (double)t->bytes);
        return;
    }
    fprintf(r->out, "%s%llu blocks %s", c->rows ? "\n" : "", (unsigned long long)t->done, did);
    if (t->kept)
        fprintf(r->out, ", %llu used since, or gone", (unsigned long long)t->kept);
    if (t->segments)
        fprintf(r->out, ", %llu segments given back", (unsigned long long)t->segments);
    if (t->left)
        fprintf(r->out, ", %llu LEFT", (unsigned long long)t->left);
    if (t->unreadable)
        fprintf(r->out, ", %llu lanes could not be read", (unsigned long long)t->unreadable);
    if (c->how.op == UCM_MANAGE_GC)
        fprintf(r->out, ": %s now", human_size((double)t->bytes, size, sizeof size));
    fputc('\n', r->out);
}

static int run(struct change *c, const char *did, unsigned n, char **dirs)
{
    int status = TOOL_GOOD;

    c->how.timeout_ms = (int)(c->timeout_s > 1000000 ? 1000000000 : c->timeout_s * 1000);
    c->how.arg = c;
    c->how.lane = show_lane;
    for (unsigned i = 0; i < n && !status; i++)
        status = check_backend(dirs[i]);
    if (!status)
        status = conf_with_key(c->key_file, &c->how.conf);
    if (status)
        return status;
    report_open(&c->report, stdout, c->json);
    if (c->json)
        report_table(&c->report, "lanes", columns, COUNT_OF(columns));
    for (unsigned i = 0; i < n; i++) {
        struct ucm_manage_total t;
        c->backend = dirs[i];
        int err = ucm_manage(dirs[i], &c->how, &t);
        if (err < 0) {
            status = cannot("%s", ucm_conf_error(c->how.conf));
            continue;
        }
        add_total(&c->total, &t);
        if ((t.left || t.unreadable || (c->how.op == UCM_MANAGE_GC && t.bytes > c->how.capacity)) &&
            !status)
            status = TOOL_BAD;
    }
    report_table_end(&c->report);
    show_total(c, did);
    report_close(&c->report);
    ucm_conf_free(c->how.conf);
    if (c->ns && !c->total.namespaces && status != TOOL_CANNOT)
        return cannot(
            "--namespace %s: there is none that begins so or is called so; see `ucm stat`", c->ns);
    return status;
}

/* ---- the verbs ---- */

static int run_rm(void *state, unsigned n, char **dirs)
{
    struct change *c = state;
    int64_t seconds = 0;
    int status = parse_which(c, "rm");

    if (!status && c->older_than)
        status = parse_time("rm", "older-than", c->older_than, &seconds);
    if (status)
        return status;
    c->how.op = UCM_MANAGE_RM;
    if (seconds)
        c->how.before = time(NULL) - seconds > 0 ? time(NULL) - seconds : 1;
    return run(c, "dropped", n, dirs);
}

static int run_pin(void *state, unsigned n, char **dirs)
{
    struct change *c = state;
    int64_t seconds = 0;
    int status = parse_which(c, "pin");

    if (!status && !c->pin_for)
        status = cannot("pin: for how long? Give --for, as in --for 12h");
    if (!status)
        status = parse_time("pin", "for", c->pin_for, &seconds);
    if (!status && seconds > 100 * INT64_C(366 * 86400))
        status = cannot("pin: --for %s: more than a hundred years; give less", c->pin_for);
    if (status)
        return status;
    c->how.op = UCM_MANAGE_PIN;
    c->how.until = time(NULL) + seconds;
    return run(c, "pinned", n, dirs);
}

static int run_unpin(void *state, unsigned n, char **dirs)
{
    struct change *c = state;
    int status = parse_which(c, "unpin");

    c->how.op = UCM_MANAGE_UNPIN;
    return status ? status : run(c, "unpinned", n, dirs);
}

static int run_gc(void *state, unsigned n, char **dirs)
{
    struct change *c = state;
    char *end = NULL;

    if (!c->capacity_gb)
        return cannot("gc: to what size? Give --capacity-gb, as in --capacity-gb 100");
    double gb = strtod(c->capacity_gb, &end);
    if (end == c->capacity_gb || *end || !(gb >= 0 && gb <= 1e9))
        return cannot("gc: --capacity-gb %s: not a number of GiB from 0 to 1e9", c->capacity_gb);
    c->how.op = UCM_MANAGE_GC;
    c->how.capacity = (uint64_t)(gb * (double)(1u << 30));
    int status = run(c, "dropped", n, dirs);
    if (status == TOOL_BAD && !c->json)
        fputs("What is left is pinned, or its owner did not answer, or is no segment.\n", stdout);
    return status;
}

#define SAFE                                                                                       \
    "Engines may be running: what is in lanes that nobody owns is changed at once, the owners of " \
    "the others are asked. Exit status: 0 all done, 1 something is left, 2 could not run."
#define VERB(word, words, what)                                                                    \
    const struct verb verb_##word = {                                                              \
        .name = #word,                                                                             \
        .operands = "DIR...",                                                                      \
        .help = words,                                                                             \
        .about = what " " SAFE,                                                                    \
        .opts = word##_opts,                                                                       \
        .size = sizeof(struct change),                                                             \
        .min_operands = 1,                                                                         \
        .max_operands = 16,                                                                        \
        .run = run_##word,                                                                         \
    }
VERB(
    rm, "drop blocks of storage backends",
    "Drops the blocks that fit all that is given. What an engine has in its DRAM stays there "
    "until it goes by itself. A lane of which nothing is left, and which nobody owns, is removed.");
VERB(pin, "keep blocks of storage backends from being evicted, for a time",
     "Blocks that are pinned are not evicted to make room for others. A capacity that does not "
     "hold them, `ucm rm` and damage end a pin.");
VERB(unpin, "end pins", "Ends the pins of the blocks that fit all that is given.");
VERB(gc, "shrink storage backends to a size now",
     "Gives up segments until what is left fits: first those of namespaces nobody uses, then those "
     "of lanes nobody owns, then owners are asked for some of theirs; within each the coldest "
     "first. Segments with a pinned block stay. An engine may grow again up to its own "
     "posix_capacity_gb.");

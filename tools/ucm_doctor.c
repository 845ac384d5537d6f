/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ucm doctor: what of the things that ucm can use is there, and why not the rest.
 */
#include "tool.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_DIRECT = 8 };

struct doctor {
    int json;
    struct report report;
    struct direct { /* a second table, of what the first one's visit has told */
        const char *device;
        int there;
        char by[256];
    } direct[MAX_DIRECT];
    unsigned ndirect;
};

static const struct opt opts[] = {
    {"json", OPT_FLAG, offsetof(struct doctor, json), NULL, NULL, "one JSON object"},
    {NULL},
};

static const struct column columns[] = {
    {"device", "device", COLUMN_TEXT, -8},
    {"count", "found", COLUMN_COUNT, 5},
    {"help", NULL, COLUMN_TEXT, 0},
    {"by", "by what, or why not", COLUMN_TEXT, 0},
};

static const struct column direct_columns[] = {
    {"device", "storage straight to", COLUMN_TEXT, -19},
    {"there", "found", COLUMN_COUNT, 5},
    {"by", "by what, or why not", COLUMN_TEXT, 0},
};

static void show(void *arg, const struct ucm_device_info *d)
{
    struct doctor *s = arg;
    report_row(&s->report, (union cell[]){
                               {.text = d->name},
                               {.num = d->count},
                               {.text = d->help},
                               {.text = d->text},
                           });
    if (!d->direct || s->ndirect == MAX_DIRECT)
        return;
    struct direct *more = &s->direct[s->ndirect++];
    more->device = d->name;
    more->there = d->is_direct;
    snprintf(more->by, sizeof more->by, "%s", d->direct);
}

static void show_direct(struct doctor *s)
{
    report_table(&s->report, "direct", direct_columns, COUNT_OF(direct_columns));
    for (const struct direct *d = s->direct; d < s->direct + s->ndirect; d++)
        report_row(&s->report,
                   (union cell[]){{.text = d->device}, {.num = d->there}, {.text = d->by}});
    report_table_end(&s->report);
}

static int run_doctor(void *state, unsigned n, char **operands)
{
    struct doctor *s = state;
    if (strcmp(operands[0], "devices"))
        return cannot("no examination of \"%s\"; there is `ucm doctor devices`", operands[0]);
    setenv("CUFILE_LOGFILE_PATH", "/dev/null", 0); /* else libcufile leaves a log where we are */
    report_open(&s->report, stdout, s->json);
    report_table(&s->report, "devices", columns, COUNT_OF(columns));
    ucm_devices(show, s);
    report_table_end(&s->report);
    show_direct(s);
    report_close(&s->report);
    return TOOL_GOOD;
}

const struct verb verb_doctor = {
    .name = "doctor",
    .operands = "devices",
    .help = "which devices can be used here, and why not the others",
    .about = "`ucm doctor devices` looks for the library of each vendor, as a store does, and asks "
             "it for its devices; then whether storage and the memory of those could exchange data "
             "without "
             "the host's.  Run it where the engine runs: in the same container, with the "
             "same environment.",
    .opts = opts,
    .size = sizeof(struct doctor),
    .min_operands = 1,
    .max_operands = 1,
    .run = run_doctor,
};

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ucm doctor: what of the things that ucm can use is there, and why not the rest.
 */
#include "tool.h"

#include <string.h>

struct doctor {
    int json;
    struct report report;
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

static void show(void *arg, const struct ucm_device_info *d)
{
    struct doctor *s = arg;
    report_row(&s->report, (union cell[]){
                               {.text = d->name},
                               {.num = d->count},
                               {.text = d->help},
                               {.text = d->text},
                           });
}

static int run_doctor(void *state, unsigned n, char **operands)
{
    struct doctor *s = state;
    if (strcmp(operands[0], "devices"))
        return cannot("no examination of \"%s\"; there is `ucm doctor devices`", operands[0]);
    report_open(&s->report, stdout, s->json);
    report_table(&s->report, "devices", columns, COUNT_OF(columns));
    ucm_devices(show, s);
    report_table_end(&s->report);
    report_close(&s->report);
    return TOOL_GOOD;
}

const struct verb verb_doctor = {
    .name = "doctor",
    .operands = "devices",
    .help = "which devices can be used here, and why not the others",
    .about = "`ucm doctor devices` looks for the library of each vendor, as a store does, and asks "
             "it for its devices.  Run it where the engine runs: in the same container, with the "
             "same environment.",
    .opts = opts,
    .size = sizeof(struct doctor),
    .min_operands = 1,
    .max_operands = 1,
    .run = run_doctor,
};

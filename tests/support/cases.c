/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The same cmocka tests over several stacks, and what tests assert and skip with.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "support.h"

const struct ts_stack ts_stacks[] = {
    {"Empty", false, false, false},     {"Fake", true, false, false},
    {"Posix", true, true, true},        {"Cache|Posix", true, true, true},
    {"Cache|Empty", true, true, false},
};
const size_t ts_nstacks = TS_LEN(ts_stacks);

struct ts_opts ts_opts_of(const struct ts_stack *stack)
{
    return ts_opts_for(stack->pipeline, stack->persists ? ts_dir() : NULL);
}

static bool fits(const struct ts_case *c, const struct ts_stack *s)
{
    if (c->alone || !s)
        return c->alone && !s;
    return (!c->needs_keep || s->keeps) && (!c->needs_persist || s->persists) &&
           (!c->needs_cache || strstr(s->pipeline, "Cache"));
}

int ts_run_cases(const char *group, const struct ts_case *cases, size_t n)
{
    struct CMUnitTest *tests = calloc(n * (ts_nstacks + 1), sizeof *tests);
    size_t used = 0;

    if (!tests)
        ts_die("no memory");
    for (size_t k = 0; k <= ts_nstacks; k++) {
        const struct ts_stack *stack = k ? &ts_stacks[k - 1] : NULL;
        for (size_t i = 0; i < n; i++) {
            char *name;
            if (!fits(&cases[i], stack))
                continue;
            if (asprintf(&name, "%s%s%s", stack ? stack->pipeline : "", stack ? ": " : "",
                         cases[i].name) < 0)
                ts_die("no memory");
            tests[used++] = (struct CMUnitTest){
                .name = name,
                .test_func = cases[i].fn,
                .initial_state = (void *)stack,
            };
        }
    }
    cmocka_set_test_filter(getenv("UCM_TEST_FILTER"));
    int failed = _cmocka_run_group_tests(group, tests, used, NULL, NULL);
    for (size_t i = 0; i < used; i++)
        free((void *)tests[i].name);
    free(tests);
    return failed;
}

struct ts_rig ts_rig_sure(const struct ts_opts *o)
{
    struct ts_rig r;
    if (ts_rig_open(&r, o))
        fail_msg("%s", r.why);
    return r;
}

void ts_agent_sure(struct ts_agent *a, const struct ts_opts *o)
{
    ts_agent_start(a, NULL, o);
    assert_string_equal(ts_agent_reply(a), "open");
}

void ts_assert_words(const char *text, const char *const *words)
{
    for (; *words; words++)
        if (!strstr(text, *words))
            fail_msg("\"%s\" does not say \"%s\"", text, *words);
}

void ts_say_skipped(const char *fmt, ...)
{
    char why[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(why, sizeof why, fmt, ap);
    va_end(ap);
    print_message("# skipped: %s\n", why);
}

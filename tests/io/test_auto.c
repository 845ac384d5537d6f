/* SPDX-License-Identifier: Apache-2.0 */
/*
 * io.c: which engine is chosen, and what is said about it.  Each test is a child, because a kernel
 * that refuses io_uring stays so for the process, and a line is logged once a process.
 */
#include "io/io.h"

#include "io_test.h"

static char logged[1024];
static int lines;

static void keep_line(void *arg, enum ucm_level level, const char *line)
{
    lines++;
    snprintf(logged, sizeof logged, "%s", line);
}

static const char *wrong(const char *what, const char *text)
{
    static char out[500];
    snprintf(out, sizeof out, "%s: %.300s", what, text);
    return out;
}

static const char *refused_by_seccomp(void)
{
    bool in_build = ucmi_io_uring.submit != NULL;
    struct ucmi_io io = {0};
    char why[512] = "";
    if (deny_syscall(SYS_io_uring_setup, EPERM) < 0)
        return "skip: no seccomp here";
    ucm_log_to(keep_line, NULL, UCM_INFO);

    if (ucmi_io_open(&io, "auto", 8, NULL, why, sizeof why) != 0)
        return wrong("auto does not fall back", why);
    if (io.ops != &ucmi_io_psync)
        return wrong("auto chose", io.ops->p.name);
    struct ucm_io op = {.op = UCM_IO_SYNC, .fd = -1}, *v = &op;
    if (io.ops->submit(io.state, &v, 1) != 1 || io.ops->reap(io.state, &v, 1, -1) != 1)
        return "what auto chose does not work";
    ucmi_io_close(&io);
    if (!strstr(logged, in_build ? "io_uring refused: Operation not permitted"
                                 : "io_uring refused: not in this build") ||
        !strstr(logged, "using psync with 4 threads"))
        return wrong("the log does not say why", logged);
    if (ucmi_io_open(&io, "auto", 8, NULL, why, sizeof why) != 0 || lines != 1)
        return wrong("not said once", logged);
    ucmi_io_close(&io);
    return NULL;
}

static const char *named_and_refused(void)
{
    bool in_build = ucmi_io_uring.submit != NULL;
    struct ucmi_io io = {.state = &io};
    char why[512] = "";
    if (deny_syscall(SYS_io_uring_setup, ENOSYS) < 0)
        return "skip: no seccomp here";
    int err = ucmi_io_open(&io, "io_uring", 8, NULL, why, sizeof why);
    if (in_build && (err != -ENOSYS || !strstr(why, "Function not implemented")))
        return wrong("the reason is missing", why);
    if (err >= 0 || io.ops || io.state != &io)
        return "an engine asked for by name was replaced";
    if (!strstr(why, "posix_io_engine io_uring") || !strstr(why, "give auto or psync"))
        return wrong("key, value or remedy is missing", why);
    return NULL;
}

static const char *chosen_and_said(void)
{
    struct ucmi_io io;
    char why[512] = "";
    ucm_log_to(keep_line, NULL, UCM_INFO);
    bool works = ucmi_io_open(&io, "io_uring", 8, NULL, why, sizeof why) == 0;
    if (!works)
        return wrong("skip: no io_uring here", why);
    ucmi_io_close(&io);
    if (ucmi_io_open(&io, "auto", 8, NULL, why, sizeof why) != 0 || io.ops != &ucmi_io_uring)
        return wrong("auto leaves a working io_uring aside", why);
    ucmi_io_close(&io);
    return lines == 1 && strstr(logged, "using io_uring") ? NULL : wrong("not said", logged);
}

static const char *no_such_engine(void)
{
    struct ucmi_io io = {0};
    char why[512] = "";
    if (ucmi_io_open(&io, "libaio", 8, NULL, why, sizeof why) != -EINVAL)
        return "a name nobody knows is taken";
    if (!strstr(why, "posix_io_engine libaio") || !strstr(why, "auto, io_uring, aio or psync"))
        return wrong("key, value or remedy is missing", why);
    if (ucmi_io_open(&io, "psync", 0, NULL, why, sizeof why) != -EINVAL)
        return "a depth of 0 is taken";
    ucmi_io_close(&io); /* of one that is not open */
    return NULL;
}

static void auto_falls_back_and_says_why_once(void **state)
{
    in_child(refused_by_seccomp);
}

static void a_named_engine_is_refused_with_reason_and_remedy(void **state)
{
    in_child(named_and_refused);
}

static void auto_takes_io_uring_where_it_works(void **state)
{
    in_child(chosen_and_said);
}

static void unknown_names_are_errors(void **state)
{
    in_child(no_such_engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(auto_falls_back_and_says_why_once),
        cmocka_unit_test(a_named_engine_is_refused_with_reason_and_remedy),
        cmocka_unit_test(auto_takes_io_uring_where_it_works),
        cmocka_unit_test(unknown_names_are_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

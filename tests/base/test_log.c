/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The log.  What it reads from the environment it reads once a process, so each case runs in a
 * child of its own, whose standard error is a file the parent reads.
 */
#include "base/base.h"

#include <dirent.h>
#include <fcntl.h>
#include <regex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../test.h"

static char dir[64];        /* where a case works; empty when it begins */
static char output[200000]; /* what the child wrote to standard error */

static int make_dir(void **state)
{
    snprintf(dir, sizeof dir, "/tmp/ucm-log-XXXXXX");
    return mkdtemp(dir) && chdir(dir) == 0 ? 0 : -1;
}

static int remove_dir(void **state)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    return chdir("/") == 0 && system(command) == 0 ? 0 : -1;
}

/* Runs body in a child with these variables (NULL-terminated pairs); it must end with status 0. */
static void child(void (*body)(void), const char *const *env)
{
    char path[] = "/tmp/ucm-err-XXXXXX";
    int fd = mkstemp(path), status;
    assert_true(fd >= 0 && unlink(path) == 0);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        dup2(fd, STDERR_FILENO);
        unsetenv("UC_LOGGER_LEVEL");
        for (; env && *env; env += 2)
            setenv(env[0], env[1], 1);
        body();
        exit(0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    ssize_t n = pread(fd, output, sizeof output - 1, 0);
    close(fd);
    assert_true(n >= 0);
    output[n] = '\0';
    if (status != 0)
        print_message("%s", output);
    assert_int_equal(status, 0);
}

/* In a child, where cmocka's own asserts would not be heard. */
#define MUST(x)                                                                                    \
    do {                                                                                           \
        if (!(x)) {                                                                                \
            fprintf(stderr, "line %d: %s\n", __LINE__, #x);                                        \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static int count(const char *text, const char *part)
{
    int n = 0;
    for (const char *p = text; (p = strstr(p, part)); p += strlen(part))
        n++;
    return n;
}

static void matches(const char *text, const char *pattern)
{
    regex_t re;
    assert_int_equal(regcomp(&re, pattern, REG_EXTENDED | REG_NOSUB), 0);
    int err = regexec(&re, text, 0, NULL, 0);
    regfree(&re);
    if (err)
        print_message("%s does not match %s\n", text, pattern);
    assert_int_equal(err, 0);
}

/* ---- what a line looks like ---- */

static void say_one_of_each(void)
{
    errno = ENOSPC;
    ucmi_log(UCM_ERROR, "Posix /mnt/kv", "%d blocks", 1);
    ucmi_log(UCM_WARN, "Cache", "warned");
    ucmi_log(UCM_INFO, NULL, "Cache task(%d,LOAD,2,3) dispatching.", 1);
    ucmi_log(UCM_DEBUG, "Cache", "details");
    MUST(errno == ENOSPC);
    MUST(ucmi_log_on(UCM_INFO));
}

static void a_line_has_time_level_object_text_and_who(void **state)
{
    child(say_one_of_each, NULL);
    matches(output, "^\\[20[0-9]{2}-[0-9]{2}-[0-9]{2} [0-9:]{8}\\.[0-9]{6}\\]\\[UC\\]\\[E\\] "
                    "Posix /mnt/kv: 1 blocks \\[[0-9]+,[0-9]+\\]\n");
    matches(output, "\\[UC\\]\\[W\\] Cache: warned \\[");
    matches(output, "\\[UC\\]\\[I\\] Cache task\\(1,LOAD,2,3\\) dispatching\\. \\[");
    assert_null(strstr(output, "details")); /* the level is info unless asked */
    assert_int_equal(count(output, "\n"), 3);
}

static void the_environment_sets_the_level(void **state)
{
    child(say_one_of_each, (const char *[]){"UC_LOGGER_LEVEL", "DEBUG", NULL});
    matches(output, "\\[UC\\]\\[D\\] Cache: details \\[");
    child(say_one_of_each, (const char *[]){"UCM_LOG_LEVEL", "debug", NULL});
    matches(output, "\\[UC\\]\\[D\\] Cache: details \\[");
    child(say_one_of_each, (const char *[]){"UC_LOGGER_LEVEL", "chatty", NULL});
    matches(output, "UC_LOGGER_LEVEL: \"chatty\" is not error, warn, info or debug; using info");
    assert_int_equal(count(output, "\n"), 4);
}

static void say_only_errors(void)
{
    ucmi_log(UCM_WARN, "Cache", "warned");
    MUST(!ucmi_log_on(UCM_WARN));
    ucmi_log(UCM_ERROR, "Cache", "failed");
}

static void a_lower_level_is_silent(void **state)
{
    child(say_only_errors, (const char *[]){"UC_LOGGER_LEVEL", "error", NULL});
    assert_int_equal(count(output, "\n"), 1);
    assert_int_equal(count(output, "failed"), 1);
}

static void say_what_does_not_fit(void)
{
    static char text[10000];
    memset(text, 'x', sizeof text - 1);
    ucmi_log(UCM_INFO, "Cache", "a path with\na newline \x1b[2J and more");
    ucmi_log(UCM_INFO, "Cache", "%s", text);
    ucmi_log(UCM_INFO, text, "%s", text);
}

static void a_line_stays_one_line_of_bounded_length(void **state)
{
    child(say_what_does_not_fit, NULL);
    assert_int_equal(count(output, "\n"), 3);
    assert_non_null(strstr(output, "a path with?a newline ?[2J and more ["));
    assert_in_range(strlen(output), 2 * 3000, 3 * 4096);
}

/* ---- the sink ---- */

struct kept {
    int n;
    enum ucm_level level;
    char line[256];
};

static void keep(void *arg, enum ucm_level level, const char *line)
{
    struct kept *kept = arg;
    kept->n++;
    kept->level = level;
    snprintf(kept->line, sizeof kept->line, "%s", line);
}

static void use_a_sink(void)
{
    struct kept kept = {0};
    ucm_log_to(keep, &kept, UCM_DEBUG);
    ucmi_log(UCM_DEBUG, NULL, "Posix task(1,Backend2Cache,2,3) dispatching.");
    MUST(kept.n == 1 && kept.level == UCM_DEBUG);
    MUST(strcmp(kept.line, "Posix task(1,Backend2Cache,2,3) dispatching.") == 0);
    ucm_log_to(keep, &kept, UCM_ERROR);
    ucmi_log(UCM_WARN, "Cache", "not asked for");
    MUST(kept.n == 1);
    ucmi_log(UCM_ERROR, "Cache", "bad");
    MUST(kept.n == 2 && strcmp(kept.line, "Cache: bad") == 0);
    ucm_log_to(NULL, NULL, UCM_INFO);
    ucmi_log(UCM_INFO, "Cache", "to standard error again");
    MUST(kept.n == 2);
}

static void a_sink_gets_the_text_alone_and_nothing_else_does(void **state)
{
    child(use_a_sink, NULL);
    assert_int_equal(count(output, "\n"), 1);
    assert_non_null(strstr(output, "Cache: to standard error again ["));
}

struct slow {
    _Atomic bool entered, left;
};

static void dawdle(void *arg, enum ucm_level level, const char *line)
{
    struct slow *slow = arg;
    atomic_store(&slow->entered, true);
    for (int i = 0; i < 20000; i++)
        sched_yield();
    atomic_store(&slow->left, true);
}

static void *log_once(void *arg)
{
    ucmi_log(UCM_INFO, "Cache", "slow");
    return NULL;
}

static void replace_a_running_sink(void)
{
    struct slow slow = {0};
    pthread_t thread;
    ucm_log_to(dawdle, &slow, UCM_INFO);
    MUST(ucmi_thread_start(&thread, "logger", log_once, NULL) == 0);
    while (!atomic_load(&slow.entered))
        sched_yield();
    ucm_log_to(NULL, NULL, UCM_INFO);
    MUST(atomic_load(&slow.left)); /* its arg may go now */
    pthread_join(thread, NULL);
}

static void a_replaced_sink_is_no_longer_running(void **state)
{
    child(replace_a_running_sink, NULL);
}

struct meeting {
    pthread_barrier_t both;
};

static void meet(void *arg, enum ucm_level level, const char *line)
{
    struct meeting *m = arg;
    pthread_barrier_wait(&m->both); /* passes only with two lines in the sink at once */
}

static void log_twice_at_once(void)
{
    struct meeting m;
    pthread_t thread;
    alarm(30);
    pthread_barrier_init(&m.both, NULL, 2);
    ucm_log_to(meet, &m, UCM_INFO);
    MUST(ucmi_thread_start(&thread, "logger", log_once, NULL) == 0);
    ucmi_log(UCM_INFO, "Cache", "the other one");
    pthread_join(thread, NULL);
    ucm_log_to(NULL, NULL, UCM_INFO);
    pthread_barrier_destroy(&m.both);
}

static void lines_do_not_wait_for_each_others_sink(void **state)
{
    child(log_twice_at_once, NULL);
}

/* ---- standard error that nobody reads ---- */

static void fill_a_pipe(void)
{
    static char drain[1 << 20];
    int fds[2];
    MUST(pipe(fds) == 0 && dup2(fds[1], STDERR_FILENO) >= 0);
    MUST(fcntl(fds[1], F_SETFL, O_NONBLOCK) == 0);
    while (write(fds[1], drain, 4096) > 0)
        ;
    MUST(fcntl(fds[1], F_SETFL, 0) == 0);
    for (int i = 0; i < 3; i++)
        ucmi_log(UCM_INFO, "Cache", "lost");
    MUST(read(fds[0], drain, sizeof drain) > 0);
    ucmi_log(UCM_INFO, "Cache", "heard");
    ssize_t n = read(fds[0], drain, sizeof drain - 1);
    MUST(n > 0);
    drain[n] = '\0';
    MUST(strstr(drain, "3 log lines were lost\n") && strstr(drain, "Cache: heard"));
    MUST(!strstr(drain, "Cache: lost"));
    close(fds[0]);
    ucmi_log(UCM_INFO, "Cache", "into a broken pipe"); /* no SIGPIPE */
    close(STDERR_FILENO);
    ucmi_log(UCM_INFO, "Cache", "into nothing");
}

static void a_stuck_reader_costs_lines_not_time(void **state)
{
    child(fill_a_pipe, NULL);
}

/* ---- the file ---- */

static void nothing_is_written_to_the_working_directory(void **state)
{
    child(say_one_of_each, NULL);
    DIR *d = opendir(".");
    assert_non_null(d);
    int entries = 0;
    while (readdir(d))
        entries++;
    closedir(d);
    assert_int_equal(entries, 2);
}

enum { LINES = 40000 };

static void write_many(void)
{
    struct kept kept = {0};
    ucm_log_to(keep, &kept, UCM_INFO);
    for (int i = 0; i < LINES; i++)
        ucmi_log(UCM_INFO, "Cache", "line %06d and some words to make it longer than it was", i);
    MUST(kept.n == LINES);
    char name[32], path[128];
    snprintf(name, sizeof name, "%d", (int)getpid());
    MUST(rename(name, "done") < 0); /* below UCM_LOG_PATH, not here */
    snprintf(path, sizeof path, "a/b/%s", name);
    MUST(rename(path, "done") == 0);
}

static void files_rotate_by_size_and_only_so_many_are_kept(void **state)
{
    child(write_many, (const char *[]){"UCM_LOG_PATH", "a/b", "UCM_LOG_MAX_SIZE", "1",
                                       "UCM_LOG_MAX_FILES", "3", NULL});
    assert_string_equal(output, "");
    static const char *const names[] = {"done/ucm.log", "done/ucm.log.1", "done/ucm.log.2"};
    int next = LINES;
    for (size_t i = 0; i < ARRAY_LEN(names); i++) { /* the newest file first */
        int first = -1, last = -1, n = 0;
        char line[512];
        struct stat st;
        FILE *f = fopen(names[i], "r");
        assert_non_null(f);
        assert_int_equal(fstat(fileno(f), &st), 0);
        assert_in_range(st.st_size, 1, 1 << 20);
        for (; fgets(line, sizeof line, f); n++) {
            assert_non_null(strstr(line, "[UC][I] Cache: line "));
            last = atoi(strstr(line, "line ") + 5);
            if (n == 0)
                first = last;
        }
        fclose(f);
        assert_int_equal(last, next - 1); /* nothing missing between two files, or within one */
        assert_int_equal(n, last - first + 1);
        next = first;
    }
    assert_true(next > 0); /* the oldest went */
    assert_int_equal(access("done/ucm.log.3", F_OK), -1);
}

static void one_file_is_kept_when_one_is_asked_for(void **state)
{
    child(write_many, (const char *[]){"UCM_LOG_PATH", "a/b/", "UCM_LOG_MAX_SIZE", "1",
                                       "UCM_LOG_MAX_FILES", "1", NULL});
    struct stat st;
    assert_int_equal(stat("done/ucm.log", &st), 0);
    assert_in_range(st.st_size, 1, 1 << 20);
    assert_int_equal(access("done/ucm.log.1", F_OK), -1);
}

static void a_file_that_cannot_be_written_is_said_once(void **state)
{
    child(say_one_of_each, (const char *[]){"UCM_LOG_PATH", "/proc/no/such", NULL});
    assert_int_equal(count(output, "UCM_LOG_PATH: cannot write /proc/no/such/"), 1);
    assert_int_equal(count(output, "\n"), 4);
}

static void bad_numbers_are_said_and_the_defaults_taken(void **state)
{
    child(say_one_of_each, (const char *[]){"UCM_LOG_PATH", "x", "UCM_LOG_MAX_SIZE", "0",
                                            "UCM_LOG_MAX_FILES", "many", NULL});
    assert_non_null(strstr(output, "UCM_LOG_MAX_SIZE: \"0\" is not a number from 1 to "));
    assert_non_null(strstr(output, "UCM_LOG_MAX_FILES: \"many\" is not a number from 1 to 1000; "
                                   "using 10"));
}

static void fork_after_a_line(void)
{
    int status;
    ucmi_log(UCM_INFO, "Cache", "parent");
    pid_t pid = fork();
    MUST(pid >= 0);
    if (pid == 0) {
        ucmi_log(UCM_INFO, "Cache", "child");
        exit(0);
    }
    MUST(waitpid(pid, &status, 0) == pid && status == 0);
    char path[64];
    struct stat st;
    snprintf(path, sizeof path, "x/%d/ucm.log", (int)pid);
    MUST(stat(path, &st) == 0 && st.st_size > 0);
}

static void a_forked_child_has_its_own_file(void **state)
{
    child(fork_after_a_line, (const char *[]){"UCM_LOG_PATH", "x", NULL});
}

/* ---- the gate ---- */

static void log_through_a_gate(void)
{
    struct ucmi_log_gate gate = {0};
    struct kept kept = {0};
    ucm_log_to(keep, &kept, UCM_INFO);
    for (int i = 0; i < 5; i++)
        ucmi_log_gated(&gate, 3600, UCM_WARN, "Posix", "slow disk");
    MUST(kept.n == 1 && strcmp(kept.line, "Posix: slow disk") == 0);
    ucmi_log_gated(&gate, 3600, UCM_DEBUG, "Posix", "not counted, as it would not be said");
    atomic_store(&gate.next_ns, 0); /* an hour later */
    ucmi_log_gated(&gate, 3600, UCM_WARN, "Posix", "slow disk");
    MUST(kept.n == 2 && strcmp(kept.line, "Posix: slow disk (and 4 more like it)") == 0);
    atomic_store(&gate.next_ns, 0);
    ucmi_log_gated(&gate, 3600, UCM_WARN, "Posix", "slow disk");
    MUST(kept.n == 3 && strcmp(kept.line, "Posix: slow disk") == 0);
}

static void a_gate_lets_one_line_through_and_counts_the_rest(void **state)
{
    child(log_through_a_gate, NULL);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(a_line_has_time_level_object_text_and_who),
        CASE(the_environment_sets_the_level),
        CASE(a_lower_level_is_silent),
        CASE(a_line_stays_one_line_of_bounded_length),
        CASE(a_sink_gets_the_text_alone_and_nothing_else_does),
        CASE(a_replaced_sink_is_no_longer_running),
        CASE(lines_do_not_wait_for_each_others_sink),
        CASE(a_stuck_reader_costs_lines_not_time),
        CASE(nothing_is_written_to_the_working_directory),
        CASE(files_rotate_by_size_and_only_so_many_are_kept),
        CASE(one_file_is_kept_when_one_is_asked_for),
        CASE(a_file_that_cannot_be_written_is_said_once),
        CASE(bad_numbers_are_said_and_the_defaults_taken),
        CASE(a_forked_child_has_its_own_file),
        CASE(a_gate_lets_one_line_through_and_counts_the_rest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

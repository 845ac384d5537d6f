/* SPDX-License-Identifier: Apache-2.0 */
/* Errors, hex, threads and condition variables. */
#include "base/base.h"

#include <limits.h>
#include <signal.h>
#include <stdio.h>

#include "../test.h"

static void strerror_speaks_ucms_words_for_the_closed_list(void **state)
{
    static const struct {
        int err;
        const char *text;
    } list[] = {
#define X(name, text) {name, text},
        UCM_ERRORS(X)
#undef X
    };
    for (size_t i = 0; i < ARRAY_LEN(list); i++) {
        assert_string_equal(ucm_strerror(list[i].err), list[i].text);
        assert_string_equal(ucm_strerror(-list[i].err), list[i].text);
    }
    assert_string_equal(ucm_strerror(-ENOENT), "no such block");
    assert_string_equal(ucm_strerror(-EROFS), "the storage can only be read");
    assert_string_equal(ucm_strerror(-EBUSY), "in use by another process");
    assert_string_equal(ucm_strerror(-ENOTDIR), "not a directory");
    assert_string_equal(ucm_strerror(-EACCES), "Permission denied");
    assert_string_equal(ucm_strerror(0), "success");
    assert_string_equal(ucm_strerror(INT_MIN), "unknown error");
    assert_string_equal(ucm_strerror(-100000), "unknown error");
}

static void errors_of_files_are_the_systems(void **state)
{
    assert_string_equal(ucmi_file_error(-ENOENT), "No such file or directory");
    assert_string_equal(ucmi_file_error(ENOSPC), "No space left on device");
    assert_string_equal(ucmi_file_error(INT_MIN), "unknown error");
    assert_string_equal(ucmi_file_error(-100000), "unknown error");
}

static void fail_writes_the_reason_and_returns_the_error(void **state)
{
    char why[8] = "before";
    assert_int_equal(ucmi_fail(why, sizeof why, -ENOSPC, "%s is full", "/mnt/kv"), -ENOSPC);
    assert_string_equal(why, "/mnt/kv");
    assert_int_equal(ucmi_fail(NULL, 0, -EIO, "%s", "nobody listens"), -EIO);
    assert_int_equal(ucmi_fail(why, 0, -EIO, "%s", "no room"), -EIO);
    assert_string_equal(why, "/mnt/kv");
}

static void hex_spells_every_byte(void **state)
{
    const uint8_t bytes[] = {0x00, 0x0f, 0xa5, 0xff};
    char text[9];
    ucmi_hex(bytes, sizeof bytes, text);
    assert_string_equal(text, "000fa5ff");
    ucmi_hex(bytes, 0, text);
    assert_string_equal(text, "");
}

static void scrubbed_text_is_printable_utf8(void **state)
{
    static const struct {
        const char *given, *scrubbed;
    } cases[] = {
        {"", ""},
        {"plain ~", "plain ~"},
        {"a\nb\x1b[2J\x7f", "a?b?[2J?"},
        {"\xc3\xbc \xe2\x82\xac \xf0\x9f\x98\x80", "\xc3\xbc \xe2\x82\xac \xf0\x9f\x98\x80"},
        {"cut \xe2\x82", "cut ??"},
        {"\xc2\x9b\x32J", "??2J"},           /* a control character beyond ASCII */
        {"\xc0\xaf \xe0\x80\xaf", "?? ???"}, /* overlong */
        {"\xed\xa0\x80", "???"},             /* a surrogate */
        {"\xf4\x90\x80\x80 \xff", "???? ?"}, /* beyond Unicode */
        {"\xf0\x80\x80\x80 \x80", "???? ?"},
        {"\xc3\xc3\xbc", "?\xc3\xbc"},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        char text[64];
        snprintf(text, sizeof text, "%s", cases[i].given);
        ucmi_scrub(text);
        assert_string_equal(text, cases[i].scrubbed);
    }
}

struct seen {
    sigset_t mask;
    pthread_mutex_t lock;
    pthread_cond_t named;
    bool go;
    char name[32];
};

static void *look_around(void *arg)
{
    struct seen *seen = arg;
    pthread_sigmask(SIG_SETMASK, NULL, &seen->mask);
    pthread_mutex_lock(&seen->lock); /* the name is given after the start */
    while (!seen->go)
        ucmi_cond_wait(&seen->named, &seen->lock, UINT64_MAX);
    pthread_mutex_unlock(&seen->lock);
    pthread_getname_np(pthread_self(), seen->name, sizeof seen->name);
    return seen;
}

static void threads_leave_signals_to_the_host_but_not_faults(void **state)
{
    struct seen seen = {.lock = PTHREAD_MUTEX_INITIALIZER};
    sigset_t before, after;
    pthread_t thread;
    void *result;
    ucmi_cond_init(&seen.named);
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    assert_int_equal(ucmi_thread_start(&thread, "a name too long for it", look_around, &seen), 0);
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    pthread_mutex_lock(&seen.lock);
    seen.go = true;
    pthread_cond_signal(&seen.named);
    pthread_mutex_unlock(&seen.lock);
    pthread_join(thread, &result);

    assert_ptr_equal(result, &seen);
    assert_string_equal(seen.name, "a name too long");
    static const int blocked[] = {SIGINT, SIGTERM, SIGCHLD, SIGUSR1, SIGPIPE, SIGALRM, SIGHUP};
    for (size_t i = 0; i < ARRAY_LEN(blocked); i++) {
        assert_true(sigismember(&seen.mask, blocked[i]));
        assert_int_equal(sigismember(&before, blocked[i]), sigismember(&after, blocked[i]));
    }
    assert_false(sigismember(&seen.mask, SIGSEGV));
    assert_false(sigismember(&seen.mask, SIGBUS));
    pthread_cond_destroy(&seen.named);
}

static void a_wait_ends_at_its_deadline(void **state)
{
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond;
    ucmi_cond_init(&cond);
    pthread_mutex_lock(&lock);
    uint64_t until = ucmi_now_ns() + 20 * 1000000;
    int err;
    do
        err = ucmi_cond_wait(&cond, &lock, until);
    while (err == 0);
    assert_int_equal(err, ETIMEDOUT);
    assert_true(ucmi_now_ns() >= until);
    assert_int_equal(ucmi_cond_wait(&cond, &lock, 1), ETIMEDOUT);
    pthread_mutex_unlock(&lock);
    pthread_cond_destroy(&cond);
}

struct seen_metrics {
    int n;
    double bytes, gauge;
};

static void see_metric(void *arg, const struct ucm_metric_info *m)
{
    struct seen_metrics *seen = arg;
    size_t len = strlen(m->name);
    bool total = len > 6 && strcmp(m->name + len - 6, "_total") == 0;
    assert_true(strcmp(m->kind, total ? "counter" : "gauge") == 0);
    assert_true(m->help[0] != '\0');
    seen->n++;
    if (strcmp(m->name, "load_bytes_total") == 0)
        seen->bytes = m->value;
    else if (strcmp(m->name, "cache_slots") == 0)
        seen->gauge = m->value;
    else
        assert_true(m->value == 0);
}

static void counters_are_all_shown_with_their_values(void **state)
{
    struct ucm_counters c = {0};
    struct seen_metrics seen = {0};
    ucmi_count(&c, UCMI_LOAD_BYTES, 40);
    ucmi_count(&c, UCMI_LOAD_BYTES, 2);
    ucmi_gauge(&c, UCMI_CACHE_SLOTS, 9);
    ucmi_gauge(&c, UCMI_CACHE_SLOTS, 7);
    ucmi_counters_visit(&c, see_metric, &seen);
    assert_int_equal(seen.n, UCMI_COUNTER_MAX);
    assert_true(seen.bytes == 42 && seen.gauge == 7);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(strerror_speaks_ucms_words_for_the_closed_list),
        cmocka_unit_test(errors_of_files_are_the_systems),
        cmocka_unit_test(fail_writes_the_reason_and_returns_the_error),
        cmocka_unit_test(hex_spells_every_byte),
        cmocka_unit_test(scrubbed_text_is_printable_utf8),
        cmocka_unit_test(threads_leave_signals_to_the_host_but_not_faults),
        cmocka_unit_test(a_wait_ends_at_its_deadline),
        cmocka_unit_test(counters_are_all_shown_with_their_values),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

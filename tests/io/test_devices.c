/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contract of struct ucm_dev_ops, one suite over every device that is always there, and what
 * only the simulated one promises.
 */
#include "dev/dev.h"

#include <semaphore.h>

#include "io_test.h"

static const struct ucm_dev_ops *const devices[] = {&ucmi_dev_host, &ucmi_dev_sim};
static const struct ucm_plugin *const plugins[] = {&ucmi_dev_host.p, &ucmi_dev_sim.p, NULL};

struct dev {
    const struct ucm_dev_ops *ops;
    void *state, *stream;
};

/* options: "key=value", or NULL */
static struct dev open_dev(const struct ucm_dev_ops *ops, const char *key, const char *value)
{
    struct dev d = {.ops = ops};
    char why[256] = "";
    ucm_conf *conf;
    assert_int_equal(ucmi_conf_new(plugins, &conf), 0);
    if (key)
        assert_int_equal(ucm_conf_set(conf, key, value), 0);
    assert_int_equal(ucmi_plugin_new(&ops->p, conf, &d.state), 0);
    ucm_conf_free(conf);
    assert_int_equal(ops->open(d.state, 0, why, sizeof why), 0);
    assert_int_equal(ops->stream_new(d.state, &d.stream), 0);
    return d;
}

static void close_dev(struct dev *d)
{
    d->ops->stream_free(d->state, d->stream);
    d->ops->close(d->state);
    ucmi_plugin_free(&d->ops->p, d->state);
}

static int setup(void **state)
{
    static struct dev d;
    d = open_dev(*state, NULL, NULL);
    *state = &d;
    return 0;
}

static int teardown(void **state)
{
    close_dev(*state);
    return 0;
}

/* What a then() reports: how often, the last error, and a semaphore to await it by. */
struct report {
    sem_t sem;
    _Atomic int calls;
    int err;
};

static void reported(void *arg, int err)
{
    struct report *r = arg;
    r->err = err;
    atomic_fetch_add(&r->calls, 1);
    sem_post(&r->sem);
}

static int ended(struct dev *d, void *stream)
{
    struct report r = {.calls = 0};
    sem_init(&r.sem, 0, 0);
    assert_int_equal(d->ops->then(d->state, stream, reported, &r), 0);
    sem_wait(&r.sem);
    assert_int_equal(r.calls, 1);
    sem_destroy(&r.sem);
    return r.err;
}

/* ---- every device ---- */

static void pieces_go_both_ways(void **state)
{
    struct dev *d = *state;
    enum { N = 64, LEN = 1000 };
    unsigned char *memory = aligned(N * LEN), *host = aligned(N * LEN);
    struct ucm_copy v[N];
    fill_pattern(memory, N * LEN, 0);
    memset(host, 0, N * LEN);
    /* The first half adjoins on both sides, in the second the order on the device is turned round.
     */
    for (size_t i = 0; i < N; i++)
        v[i] = (struct ucm_copy){memory + (i < N / 2 ? i : N + N / 2 - 1 - i) * LEN, host + i * LEN,
                                 LEN};
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, v, N), 0);
    assert_int_equal(ended(d, d->stream), 0);
    for (size_t i = 0; i < N; i++)
        assert_memory_equal(v[i].host, v[i].dev, LEN);
    assert_true(has_pattern(host, N / 2 * LEN, 0));
    assert_true(has_pattern(host + N / 2 * LEN, LEN, (N - 1) * LEN));

    memset(memory, 0, N * LEN);
    assert_int_equal(d->ops->copy(d->state, d->stream, 0, v, N), 0);
    assert_int_equal(ended(d, d->stream), 0);
    assert_true(has_pattern(memory, N * LEN, 0));
    free(memory);
    free(host);
}

/* Neighbours on one side only must not be joined. */
static void gaps_are_left_alone(void **state)
{
    struct dev *d = *state;
    unsigned char memory[300], host[300];
    fill_pattern(memory, sizeof memory, 0);
    memset(host, 0xee, sizeof host);
    struct ucm_copy v[3] = {
        {memory, host, 50}, {memory + 50, host + 100, 50}, {memory + 200, host + 150, 50}};
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, v, 3), 0);
    assert_int_equal(ended(d, d->stream), 0);
    assert_true(has_pattern(host, 50, 0));
    assert_true(has_pattern(host + 100, 50, 50));
    assert_true(has_pattern(host + 150, 50, 200));
    for (int i = 50; i < 100; i++)
        assert_int_equal(host[i], 0xee);
    for (int i = 200; i < 300; i++)
        assert_int_equal(host[i], 0xee);
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, v, 0), 0);
    assert_int_equal(ended(d, d->stream), 0);
}

static void a_stream_keeps_its_order(void **state)
{
    struct dev *d = *state;
    enum { N = 2000 };
    static uint32_t memory[N + 1];
    uint32_t host = 0;
    for (uint32_t i = 0; i < N; i++)
        memory[i] = i + 1;
    for (uint32_t i = 0; i < N; i++) { /* memory[i] -> host -> memory[N]: only the last remains */
        struct ucm_copy up = {&memory[i], &host, 4}, down = {&memory[N], &host, 4};
        assert_int_equal(d->ops->copy(d->state, d->stream, 1, &up, 1), 0);
        assert_int_equal(d->ops->copy(d->state, d->stream, 0, &down, 1), 0);
    }
    assert_int_equal(ended(d, d->stream), 0);
    assert_int_equal(memory[N], N);
}

static void then_comes_once_each_in_order(void **state)
{
    struct dev *d = *state;
    enum { N = 500 };
    static struct report r[N];
    for (int i = 0; i < N; i++) {
        r[i] = (struct report){.calls = 0};
        sem_init(&r[i].sem, 0, 0);
        assert_int_equal(d->ops->then(d->state, d->stream, reported, &r[i]), 0);
    }
    sem_wait(&r[N - 1].sem);
    for (int i = 0; i < N; i++) {
        assert_int_equal(r[i].calls, 1);
        assert_int_equal(r[i].err, 0);
        sem_destroy(&r[i].sem);
    }
}

static void freeing_a_stream_waits_for_what_is_queued(void **state)
{
    struct dev *d = *state;
    struct report r = {.calls = 0};
    unsigned char memory[64] = {0}, host[64];
    void *stream;
    sem_init(&r.sem, 0, 0);
    fill_pattern(host, sizeof host, 0);
    assert_int_equal(d->ops->stream_new(d->state, &stream), 0);
    struct ucm_copy v = {memory, host, sizeof host};
    for (int i = 0; i < 100; i++)
        assert_int_equal(d->ops->copy(d->state, stream, 0, &v, 1), 0);
    assert_int_equal(d->ops->then(d->state, stream, reported, &r), 0);
    d->ops->stream_free(d->state, stream);
    assert_int_equal(r.calls, 1);
    assert_true(has_pattern(memory, sizeof memory, 0));
    sem_destroy(&r.sem);
}

/* ---- the simulated one ---- */

static void nothing_moves_before_the_event(void **state)
{
    struct dev *d = *state;
    unsigned char memory[64], host[64] = {0};
    struct ucmi_sim_event *event = ucmi_sim_event_new();
    struct ucm_copy v = {memory, host, sizeof host};
    struct report r = {.calls = 0};
    void *other;
    sem_init(&r.sem, 0, 0);
    assert_int_equal(d->ops->stream_new(d->state, &other), 0);

    memset(memory, 0x11, sizeof memory); /* what the engine has not written yet */
    assert_int_equal(d->ops->after(d->state, d->stream, event), 0);
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, &v, 1), 0);
    assert_int_equal(d->ops->then(d->state, d->stream, reported, &r), 0);
    v = (struct ucm_copy){0}; /* the vector was used during the call only */

    assert_int_equal(ended(d, other), 0); /* another stream goes on meanwhile */
    assert_int_equal(r.calls, 0);
    assert_int_equal(host[0], 0);
    fill_pattern(memory, sizeof memory, 0);
    ucmi_sim_event_fire(event);
    ucmi_sim_event_free(event); /* the stream has its own hold on it */
    sem_wait(&r.sem);
    assert_true(has_pattern(host, sizeof host, 0));
    d->ops->stream_free(d->state, other);
    sem_destroy(&r.sem);
}

static void an_event_already_fired_holds_nothing(void **state)
{
    struct dev *d = *state;
    struct ucmi_sim_event *event = ucmi_sim_event_new();
    ucmi_sim_event_fire(event);
    assert_int_equal(d->ops->after(d->state, d->stream, event), 0);
    assert_int_equal(d->ops->after(d->state, d->stream, event), 0);
    assert_int_equal(ended(d, d->stream), 0);
    ucmi_sim_event_free(event);
    ucmi_sim_event_free(NULL);
}

static void every_nth_copy_fails_and_moves_nothing(void **state)
{
    struct dev d = open_dev(&ucmi_dev_sim, "sim_fail_every", "3");
    unsigned char memory[4] = {1, 2, 3, 4}, host[4] = {0};
    for (int i = 0; i < 3; i++) {
        struct ucm_copy v = {&memory[i], &host[i], 1};
        assert_int_equal(d.ops->copy(d.state, d.stream, 1, &v, 1), 0);
    }
    assert_int_equal(ended(&d, d.stream), -EIO);
    assert_int_equal(host[0], 1);
    assert_int_equal(host[1], 2);
    assert_int_equal(host[2], 0);
    struct ucm_copy v = {&memory[3], &host[3], 1}; /* an error is reported once */
    assert_int_equal(d.ops->copy(d.state, d.stream, 1, &v, 1), 0);
    assert_int_equal(ended(&d, d.stream), 0);
    assert_int_equal(host[3], 4);
    close_dev(&d);
}

static void unpinned_memory_is_refused_where_asked(void **state)
{
    struct dev d = open_dev(&ucmi_dev_sim, "sim_need_pin", "true");
    unsigned char memory[64] = {7}, host[128] = {0};
    struct ucm_copy v = {memory, host + 32, 64};
    assert_int_equal(d.ops->copy(d.state, d.stream, 1, &v, 1), -EINVAL);
    assert_int_equal(d.ops->pin(d.state, host, 64), 0);
    assert_int_equal(d.ops->copy(d.state, d.stream, 1, &v, 1), -EINVAL); /* half of it */
    v.host = host;
    assert_int_equal(d.ops->copy(d.state, d.stream, 1, &v, 1), 0);
    assert_int_equal(ended(&d, d.stream), 0);
    assert_int_equal(host[0], 7);
    d.ops->unpin(d.state, host, 64);
    assert_int_equal(d.ops->copy(d.state, d.stream, 1, &v, 1), -EINVAL);
    assert_int_equal(d.ops->pin(d.state, host, 64), 0); /* left pinned: close takes it */
    close_dev(&d);
}

static void a_delay_defers_the_bytes(void **state)
{
    struct dev d = open_dev(&ucmi_dev_sim, "sim_delay_us", "20000");
    unsigned char memory[8] = {1}, host[8] = {0};
    struct ucm_copy v = {memory, host, 8};
    uint64_t before = ucmi_now_ns();
    assert_int_equal(d.ops->copy(d.state, d.stream, 1, &v, 1), 0);
    assert_int_equal(ended(&d, d.stream), 0);
    assert_true(ucmi_now_ns() - before >= 20 * 1000000u);
    assert_int_equal(host[0], 1);
    close_dev(&d);
}

static void a_queue_has_a_bound(void **state)
{
    struct dev *d = *state;
    struct ucmi_sim_event *event = ucmi_sim_event_new();
    int err, queued = 0;
    assert_int_equal(d->ops->after(d->state, d->stream, event), 0);
    while ((err = d->ops->copy(d->state, d->stream, 1, NULL, 0)) == 0)
        assert_true(queued++ < 1 << 20);
    assert_int_equal(err, -EAGAIN);
    ucmi_sim_event_fire(event);
    ucmi_sim_event_free(event);
}

static void the_host_reaches_what_it_says(void **state)
{
    assert_true(ucmi_dev_host.host_access);
    assert_false(ucmi_dev_sim.host_access);
    assert_null(ucmi_dev_host.pin);
    assert_null(ucmi_dev_host.unpin);
}

static const struct CMUnitTest suite[] = {
    cmocka_unit_test(pieces_go_both_ways),
    cmocka_unit_test(gaps_are_left_alone),
    cmocka_unit_test(a_stream_keeps_its_order),
    cmocka_unit_test(then_comes_once_each_in_order),
    cmocka_unit_test(freeing_a_stream_waits_for_what_is_queued),
};
static const struct CMUnitTest simulated[] = {
    cmocka_unit_test(nothing_moves_before_the_event),
    cmocka_unit_test(an_event_already_fired_holds_nothing),
    cmocka_unit_test(every_nth_copy_fails_and_moves_nothing),
    cmocka_unit_test(unpinned_memory_is_refused_where_asked),
    cmocka_unit_test(a_delay_defers_the_bytes),
    cmocka_unit_test(a_queue_has_a_bound),
    cmocka_unit_test(the_host_reaches_what_it_says),
};

int main(void)
{
    static struct CMUnitTest tests[ARRAY_LEN(devices) * ARRAY_LEN(suite) + ARRAY_LEN(simulated)];
    static char names[ARRAY_LEN(tests)][80];
    size_t n = 0;
    for (size_t i = 0; i < ARRAY_LEN(devices) * ARRAY_LEN(suite); i++, n++) {
        const struct ucm_dev_ops *ops = devices[i / ARRAY_LEN(suite)];
        tests[n] = suite[i % ARRAY_LEN(suite)];
        tests[n].initial_state = (void *)ops;
        snprintf(names[n], sizeof names[n], "%s: %s", ops->p.name, tests[n].name);
    }
    for (size_t i = 0; i < ARRAY_LEN(simulated); i++, n++) {
        tests[n] = simulated[i];
        tests[n].initial_state = (void *)&ucmi_dev_sim;
        snprintf(names[n], sizeof names[n], "sim: %s", tests[n].name);
    }
    for (size_t i = 0; i < n; i++) {
        tests[i].name = names[i];
        tests[i].setup_func = setup;
        tests[i].teardown_func = teardown;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}

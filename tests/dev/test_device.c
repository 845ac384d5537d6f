/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contract of struct ucm_dev_ops, one suite over every device of support/device.c; what only
 * those of vendors are asked for; and what only the simulated one promises.
 */
#include "dev/vendor.h"

#include <semaphore.h>

#include "../io/io_test.h"
#include "opencl.h"
#include "store/store.h"
#include "support.h"

struct dev {
    const struct ts_device *test;
    const struct fake *fake; /* or NULL */
    const struct ucm_dev_ops *ops;
    void *state, *stream;
};

/* options: "key=value", or NULL */
static int open_state(struct dev *d, const char *key, const char *value, char *why, size_t why_len)
{
    ucm_conf *conf;
    d->ops = ucmi_find_dev(d->test->name);
    d->fake = ts_fake(d->test);
    assert_int_equal(ucm_conf_new(&conf), 0);
    if (key)
        assert_int_equal(ucm_conf_set(conf, key, value), 0);
    assert_int_equal(ucmi_plugin_new(&d->ops->p, conf, &d->state), 0);
    ucm_conf_free(conf);
    int err = d->ops->open(d->state, d->test->id, why, why_len);
    if (err)
        ucmi_plugin_free(&d->ops->p, d->state);
    return err;
}

static struct dev open_dev(const struct ts_device *test, const char *key, const char *value)
{
    struct dev d = {.test = test};
    char why[256] = "";
    if (open_state(&d, key, value, why, sizeof why))
        fail_msg("%s: %s", test->name, why);
    assert_int_equal(d.ops->stream_new(d.state, &d.stream), 0);
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
    if (d.fake)
        d.fake->fake_reset();
    *state = &d;
    return 0;
}

static int teardown(void **state)
{
    struct dev *d = *state;
    close_dev(d);
    if (d->fake)
        assert_int_equal(d->fake->fake_leaks(), 0);
    return 0;
}

/* So many bytes of the device, with a pattern in them. */
static struct ts_bytes bytes_new(struct dev *d, size_t len)
{
    struct ts_bytes b = ts_bytes_new(d->test, len);
    fill_pattern(b.view, len, 0);
    return b;
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
    struct ts_bytes memory = bytes_new(d, N * LEN);
    unsigned char *host = aligned(N * LEN);
    struct ucm_copy v[N];
    memset(host, 0, N * LEN);
    /* The first half adjoins on both sides, in the second the order on the device is turned round.
     */
    for (size_t i = 0; i < N; i++)
        v[i] = (struct ucm_copy){memory.at + (i < N / 2 ? i : N + N / 2 - 1 - i) * LEN,
                                 host + i * LEN, LEN};
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, v, N), 0);
    assert_int_equal(ended(d, d->stream), 0);
    for (size_t i = 0; i < N; i++)
        assert_true(has_pattern(v[i].host, LEN, (uint64_t)((uint8_t *)v[i].dev - memory.at)));

    memset(memory.view, 0, N * LEN);
    assert_int_equal(d->ops->copy(d->state, d->stream, 0, v, N), 0);
    assert_int_equal(ended(d, d->stream), 0);
    assert_true(has_pattern(memory.view, N * LEN, 0));
    ts_bytes_free(d->test, &memory);
    free(host);
}

static void gaps_are_left_alone(void **state)
{
    struct dev *d = *state;
    struct ts_bytes memory = bytes_new(d, 300);
    unsigned char host[300];
    memset(host, 0xee, sizeof host);
    struct ucm_copy v[3] = {
        {memory.at, host, 50}, {memory.at + 50, host + 100, 50}, {memory.at + 200, host + 150, 50}};
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
    ts_bytes_free(d->test, &memory);
}

static void a_stream_keeps_its_order(void **state)
{
    struct dev *d = *state;
    enum { N = 2000 };
    struct ts_bytes memory = ts_bytes_new(d->test, (N + 1) * 4);
    uint32_t host = 0, number;
    for (uint32_t i = 0; i < N; i++) {
        number = i + 1;
        memcpy(memory.view + 4 * i, &number, 4);
    }
    for (uint32_t i = 0; i < N; i++) { /* i -> host -> N: only the last remains */
        struct ucm_copy up = {memory.at + 4 * i, &host, 4}, down = {memory.at + 4 * N, &host, 4};
        assert_int_equal(d->ops->copy(d->state, d->stream, 1, &up, 1), 0);
        assert_int_equal(d->ops->copy(d->state, d->stream, 0, &down, 1), 0);
    }
    assert_int_equal(ended(d, d->stream), 0);
    memcpy(&number, memory.view + 4 * N, 4);
    assert_int_equal(number, N);
    ts_bytes_free(d->test, &memory);
}

/* More than any call of a vendor's takes at once. */
static void a_long_vector(void **state)
{
    struct dev *d = *state;
    enum { N = 5000 };
    struct ts_bytes memory = bytes_new(d, 2 * N);
    static struct ucm_copy v[N];
    static unsigned char host[N];
    memset(host, 0, N);
    for (size_t i = 0; i < N; i++) /* every other byte */
        v[i] = (struct ucm_copy){memory.at + 2 * i, host + i, 1};
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, v, N), 0);
    assert_int_equal(ended(d, d->stream), 0);
    for (size_t i = 0; i < N; i++)
        assert_true(has_pattern(&host[i], 1, 2 * i));
    ts_bytes_free(d->test, &memory);
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
    struct ts_bytes memory = ts_bytes_new(d->test, 64);
    unsigned char host[64];
    void *stream;
    sem_init(&r.sem, 0, 0);
    fill_pattern(host, sizeof host, 0);
    assert_int_equal(d->ops->stream_new(d->state, &stream), 0);
    struct ucm_copy v = {memory.at, host, sizeof host};
    for (int i = 0; i < 100; i++)
        assert_int_equal(d->ops->copy(d->state, stream, 0, &v, 1), 0);
    assert_int_equal(d->ops->then(d->state, stream, reported, &r), 0);
    assert_int_equal(d->ops->copy(d->state, stream, 0, &v, 1), 0); /* nobody asked when it ends */
    d->ops->stream_free(d->state, stream);
    assert_int_equal(r.calls, 1);
    assert_true(has_pattern(memory.view, sizeof host, 0));
    ts_bytes_free(d->test, &memory);
    sem_destroy(&r.sem);
}

enum { THREADS = 8 };
struct worker {
    struct dev *d;
    pthread_t thread;
    bool right;
};

static void *work(void *arg)
{
    struct worker *w = arg;
    struct dev *d = w->d;
    enum { LEN = 4096, TURNS = 50 };
    struct ts_bytes memory = bytes_new(d, LEN);
    unsigned char *host = aligned(LEN);
    void *stream;
    w->right = d->ops->stream_new(d->state, &stream) == 0;
    for (int i = 0; i < TURNS && w->right; i++) {
        struct ucm_copy v[2] = {{memory.at, host + LEN / 2, LEN / 2},
                                {memory.at + LEN / 2, host, LEN / 2}};
        w->right = d->ops->copy(d->state, stream, 1, v, 2) == 0 && ended(d, stream) == 0 &&
                   has_pattern(host + LEN / 2, LEN / 2, 0) && has_pattern(host, LEN / 2, LEN / 2);
        memset(memory.view, 0, LEN);
        w->right = w->right && d->ops->copy(d->state, stream, 0, v, 2) == 0 &&
                   ended(d, stream) == 0 && has_pattern(memory.view, LEN, 0);
    }
    d->ops->stream_free(d->state, stream);
    ts_bytes_free(d->test, &memory);
    free(host);
    return NULL;
}

/* Threads that the vendor's library has never seen. */
static void each_thread_has_its_stream(void **state)
{
    struct worker w[THREADS];
    for (int i = 0; i < THREADS; i++) {
        w[i] = (struct worker){.d = *state};
        assert_int_equal(pthread_create(&w[i].thread, NULL, work, &w[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(w[i].thread, NULL);
        assert_true(w[i].right);
    }
}

/* ---- those whose engine hands over events ---- */

static void nothing_moves_before_the_event(void **state)
{
    struct dev *d = *state;
    struct ts_bytes memory = ts_bytes_new(d->test, 64);
    unsigned char host[64] = {0};
    void *event = ts_event_new(d->test), *other;
    struct ucm_copy v = {memory.at, host, sizeof host};
    struct report r = {.calls = 0};
    sem_init(&r.sem, 0, 0);
    assert_int_equal(d->ops->stream_new(d->state, &other), 0);

    memset(memory.view, 0x11, sizeof host); /* what the engine has not written yet */
    assert_int_equal(d->ops->after(d->state, d->stream, event), 0);
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, &v, 1), 0);
    assert_int_equal(d->ops->then(d->state, d->stream, reported, &r), 0);
    v = (struct ucm_copy){0}; /* the vector was used during the call only */

    assert_int_equal(ended(d, other), 0); /* another stream goes on meanwhile */
    if (d->fake)
        d->fake->fake_settle(1);
    assert_int_equal(r.calls, 0);
    assert_int_equal(host[0], 0);
    fill_pattern(memory.view, sizeof host, 0);
    ts_event_fire(d->test, event);
    sem_wait(&r.sem);
    ts_event_free(d->test, event);
    assert_true(has_pattern(host, sizeof host, 0));
    d->ops->stream_free(d->state, other);
    ts_bytes_free(d->test, &memory);
    sem_destroy(&r.sem);
}

static void an_event_that_has_come_holds_nothing(void **state)
{
    struct dev *d = *state;
    void *event = ts_event_new(d->test);
    ts_event_fire(d->test, event);
    assert_int_equal(d->ops->after(d->state, d->stream, event), 0);
    assert_int_equal(d->ops->after(d->state, d->stream, event), 0);
    assert_int_equal(ended(d, d->stream), 0);
    ts_event_free(d->test, event);
}

/* ---- those of vendors ---- */

/* The engine's thread finds what it had set; where none cannot be set, ours in its place. */
static bool keeps(const struct dev *d, int had)
{
    return d->fake->fake_context_is(had) || (had < 0 && d->fake->fake_context_is(d->test->id));
}

static void the_caller_keeps_its_context(void **state)
{
    struct dev *d = *state;
    char *p = aligned(8192);
    static const int had[] = {0, 1, -1};
    for (size_t i = 0; i < ARRAY_LEN(had); i++) {
        struct dev other = {.test = d->test};
        void *stream;
        d->fake->fake_context(had[i]);
        assert_int_equal(open_state(&other, NULL, NULL, NULL, 0), 0);
        assert_true(keeps(d, had[i]));
        assert_int_equal(other.ops->pin(other.state, p, 8192), 0);
        assert_true(keeps(d, had[i]));
        assert_int_equal(other.ops->stream_new(other.state, &stream), 0);
        assert_true(keeps(d, had[i]));
        other.ops->stream_free(other.state, stream);
        other.ops->unpin(other.state, p, 8192);
        other.ops->close(other.state);
        assert_true(keeps(d, had[i]));
        ucmi_plugin_free(&other.ops->p, other.state);
    }
    free(p);
}

static void memory_is_registered_and_given_back(void **state)
{
    struct dev *d = *state;
    struct ts_bytes memory = bytes_new(d, 4096);
    char *p = aligned(8192);
    struct ucm_copy v = {memory.at, p, 4096};
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, &v, 1), 0);
    assert_int_equal(ended(d, d->stream), 0);
    assert_int_equal(d->fake->fake_count("unregistered"), 1);
    assert_int_equal(d->ops->pin(d->state, p, 8192), 0);
    assert_int_not_equal(d->ops->pin(d->state, p + 4096, 4096), 0); /* twice */
    assert_int_equal(d->fake->fake_count("registered"), 8192);
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, &v, 1), 0);
    assert_int_equal(ended(d, d->stream), 0);
    assert_int_equal(d->fake->fake_count("unregistered"), 1);
    d->ops->unpin(d->state, p, 8192);
    assert_int_equal(d->fake->fake_count("registered"), 0);
    ts_bytes_free(d->test, &memory);
    free(p);
}

#define SYNC_STREAM "StreamSynchronize|SynchronizeStream"
#define SYNC_EVENT  "EventSynchronize|SynchronizeEvent"

static void *free_stream(void *arg)
{
    struct dev *d = arg;
    d->ops->stream_free(d->state, d->stream);
    return NULL;
}

/* A stream that is freed with a copy queued, of which nobody asked when it ends. */
static void no_stream_ends_before_its_work(void **state)
{
    struct dev *d = *state, freed = *d;
    struct ts_bytes memory = bytes_new(d, 64);
    unsigned char host[64];
    struct ucm_copy v = {memory.at, host, sizeof host};
    pthread_t thread;
    assert_int_equal(d->ops->stream_new(d->state, &freed.stream), 0);
    assert_int_equal(ended(d, freed.stream), 0); /* its own thread has called what it does */
    d->fake->fake_hold(1);
    assert_int_equal(d->ops->copy(d->state, freed.stream, 1, &v, 1), 0);
    unsigned long before = d->fake->fake_calls(SYNC_STREAM);
    assert_int_equal(pthread_create(&thread, NULL, free_stream, &freed), 0);
    d->fake->fake_await(SYNC_STREAM, before + 1);
    d->fake->fake_hold(0);
    pthread_join(thread, NULL);
    assert_true(has_pattern(host, sizeof host, 0));
    ts_bytes_free(d->test, &memory);
}

/* The wait for the event fails, and the first for the stream: its copies may still come, and nobody
 * is told before they have. */
static void a_wait_that_fails_is_made_again(void **state)
{
    struct dev *d = *state;
    struct ts_bytes memory = bytes_new(d, 64);
    unsigned char host[64];
    struct ucm_copy v = {memory.at, host, sizeof host};
    struct report r = {.calls = 0};
    sem_init(&r.sem, 0, 0);
    assert_int_equal(ended(d, d->stream), 0);
    d->fake->fake_hold(1);
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, &v, 1), 0);
    d->fake->fake_fail(NULL, 0, 0);
    d->fake->fake_fail(SYNC_EVENT, 1, 999);
    d->fake->fake_fail(SYNC_STREAM, 1, 999);
    d->fake->fake_reset();
    assert_int_equal(d->ops->then(d->state, d->stream, reported, &r), 0);
    while (d->fake->fake_calls(SYNC_STREAM) < 2 && !r.calls)
        usleep(1000);
    int early = r.calls;
    d->fake->fake_hold(0);
    sem_wait(&r.sem);
    assert_int_equal(early, 0);
    assert_int_equal(r.err, -EIO);
    assert_true(has_pattern(host, sizeof host, 0));
    ts_bytes_free(d->test, &memory);
    sem_destroy(&r.sem);
}

enum { SCENE_COPIES = 3 };

/* Everything that a device is for, with its nth call failing: 0, or the first error met.  What was
 * promised is kept all the same. */
static int scene(const struct ts_device *test, unsigned long nth, bool *reached)
{
    struct dev d = {.test = test};
    struct ts_bytes memory = ts_bytes_new(test, 4096);
    char *p = aligned(4096);
    struct report r = {.calls = 0};
    void *stream, *event = ts_event_new(test);
    const struct fake *fake = ts_fake(test);
    int err, first;
    ts_event_fire(test, event);
    sem_init(&r.sem, 0, 0);
    fake->fake_reset();
    fake->fake_fail(NULL, nth, 999);
    first = open_state(&d, NULL, NULL, NULL, 0);
    if (!first) {
        bool pinned = (err = d.ops->pin(d.state, p, 4096)) == 0;
        first = err;
        err = d.ops->stream_new(d.state, &stream);
        first = first ? first : err;
        if (!err) {
            err = d.ops->after(d.state, stream, event);
            first = first ? first : err;
            for (int i = 0; i < SCENE_COPIES; i++) {
                struct ucm_copy v[2] = {{memory.at, p, 8}, {memory.at + 100, p + 100, 8}};
                err = d.ops->copy(d.state, stream, 1, v, 2);
                first = first ? first : err;
            }
            err = d.ops->then(d.state, stream, reported, &r);
            if (!err) {
                sem_wait(&r.sem);
                err = r.err;
            }
            first = first ? first : err;
            d.ops->stream_free(d.state, stream);
        }
        if (pinned)
            d.ops->unpin(d.state, p, 4096);
        d.ops->close(d.state);
        ucmi_plugin_free(&d.ops->p, d.state);
    }
    *reached = fake->fake_calls(NULL) >= nth;
    fake->fake_fail(NULL, 0, 0);
    ts_event_free(test, event);
    ts_bytes_free(test, &memory);
    free(p);
    sem_destroy(&r.sem);
    return first;
}

/* Each call fails once.  Nothing hangs, nobody is told twice, what could be given back is. */
static void each_call_may_fail(void **state)
{
    struct dev *d = *state;
    unsigned failed = 0;
    bool reached = true;
    unsigned long nth;
    for (nth = 1; reached; nth++)
        failed += scene(d->test, nth, &reached) != 0;
    assert_true(nth > 20);
    assert_true(failed >= 5); /* not those that give something back, or have another way round */
    bool again;
    assert_int_equal(scene(d->test, 0, &again), 0);
}

/* The device goes with copies under way: who waits for them is told. */
static void a_device_that_is_lost_says_so(void **state)
{
    struct dev *d = *state;
    struct ts_bytes memory = bytes_new(d, 64);
    unsigned char host[64];
    struct ucm_copy v = {memory.at, host, sizeof host};
    struct report r = {.calls = 0};
    sem_init(&r.sem, 0, 0);
    d->fake->fake_hold(1);
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, &v, 1), 0);
    assert_int_equal(d->ops->then(d->state, d->stream, reported, &r), 0);
    d->fake->fake_break(700);
    sem_wait(&r.sem);
    assert_int_equal(r.err, -EIO);
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, &v, 1), -EIO);
    assert_int_equal(d->ops->after(d->state, d->stream, host), -EIO);
    assert_int_equal(d->ops->then(d->state, d->stream, reported, &r), -EIO);
    void *stream;
    assert_int_equal(d->ops->stream_new(d->state, &stream), -EIO);
    assert_int_equal(r.calls, 1);
    d->fake->fake_hold(0);
    d->fake->fake_break(0);
    assert_int_equal(ended(d, d->stream), 0);
    ts_bytes_free(d->test, &memory);
    sem_destroy(&r.sem);
}

/* Of all errors these are told apart; ACL has numbers of its own. */
static void errors_keep_their_meaning(void **state)
{
    struct dev *d = *state;
    static const struct {
        int code, acl, err;
    } cases[] = {{1, 100000, -EINVAL},
                 {2, 207001, -ENOMEM},
                 {2, 200000, -ENOMEM},
                 {101, 107001, -ENODEV},
                 {999, 999, -EIO}};
    char *p = aligned(4096);
    bool acl = !strcmp(d->test->name, "ascend");
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        d->fake->fake_fail(NULL, 0, 0);
        d->fake->fake_fail("HostRegisterV2", 1, 207000);
        d->fake->fake_fail("HostRegister|HostRegister_v2", 1, acl ? cases[i].acl : cases[i].code);
        assert_int_equal(d->ops->pin(d->state, p, 4096), cases[i].err);
    }
    d->fake->fake_fail(NULL, 0, 0);
    free(p);
}

/* 128 copies that adjoin nowhere: whether they were few calls, and not one each. */
static bool is_one_call(struct dev *d, unsigned char *host, struct ts_bytes *memory)
{
    enum { N = 128 };
    struct ucm_copy v[N];
    for (size_t i = 0; i < N; i++)
        v[i] = (struct ucm_copy){memory->at + 2 * i * 64, host + i * 64, 64};
    memset(host, 0, N * 64);
    d->fake->fake_reset();
    assert_int_equal(d->ops->copy(d->state, d->stream, 1, v, N), 0);
    assert_int_equal(ended(d, d->stream), 0);
    assert_int_equal(d->fake->fake_count("copies"), N);
    for (size_t i = 0; i < N; i++)
        assert_true(has_pattern(host + i * 64, 64, 2 * i * 64));
    return d->fake->fake_calls(NULL) <= 8;
}

/* One call for all pieces, where the library has such a call; also where it refuses memory that is
 * not registered, and one by one does not. */
static void a_vector_is_one_call(void **state)
{
    struct dev *d = *state;
    struct ts_bytes memory = bytes_new(d, 16384);
    unsigned char *host = aligned(8192);
    bool batches = strcmp(getenv("UCM_TEST_GENERATION"), "old") && !d->test->one_by_one;
    is_one_call(d, host, &memory);
    assert_int_equal(d->ops->pin(d->state, host, 8192), 0);
    assert_int_equal(is_one_call(d, host, &memory), batches);
    d->ops->unpin(d->state, host, 8192);
    ts_bytes_free(d->test, &memory);
    free(host);
}

static void a_device_that_is_not_there(void **state)
{
    struct dev *d = *state;
    struct dev none = {.test = d->test, .ops = d->ops};
    char why[256] = "";
    assert_int_equal(ucmi_plugin_new(&d->ops->p, NULL, &none.state), 0);
    assert_int_equal(d->ops->open(none.state, 17, why, sizeof why), -ENODEV);
    TS_ASSERT_WORDS(why, "device_id", "17", d->test->library);
    ucmi_plugin_free(&d->ops->p, none.state);
    assert_int_equal(d->ops->probe(why, sizeof why), 2);
    TS_ASSERT_WORDS(why, d->test->library);
}

/* ---- NVIDIA's, Huawei's ---- */

static void count_one(void *arg, int err)
{
    ++*(unsigned *)arg;
}

/* What is awaited on a stream that stands still: a bound, and nothing lost. */
static void waits_have_a_bound(void **state)
{
    struct dev *d = *state;
    unsigned called = 0, taken = 0;
    int err;
    d->fake->fake_hold(1);
    while ((err = d->ops->then(d->state, d->stream, count_one, &called)) == 0)
        assert_true(taken++ < 1 << 16);
    assert_int_equal(err, -EAGAIN);
    d->fake->fake_hold(0);
    d->ops->stream_free(d->state, d->stream);
    assert_int_equal(called, taken);
    assert_int_equal(d->ops->stream_new(d->state, &d->stream), 0);
}

#define BATCH "MemcpyBatchAsync|MemcpyBatchAsync_v2|MemcpyBatchAsyncV2"

/* The library only has the function: it is asked once. */
static void batches_that_are_not_done(void **state)
{
    struct dev *d = *state;
    struct ts_bytes memory = bytes_new(d, 16384);
    unsigned char *host = aligned(8192);
    bool batches = strcmp(getenv("UCM_TEST_GENERATION"), "old") != 0;
    assert_int_equal(d->ops->pin(d->state, host, 8192), 0);
    d->fake->fake_fail(NULL, 0, 0);
    d->fake->fake_fail(BATCH, 1, strcmp(d->test->name, "cuda") ? 207000 : 801);
    assert_false(is_one_call(d, host, &memory));
    assert_int_equal(d->fake->fake_calls(BATCH), batches);
    assert_false(is_one_call(d, host, &memory));
    assert_int_equal(d->fake->fake_calls(BATCH), 0);
    d->fake->fake_fail(NULL, 0, 0);
    d->ops->unpin(d->state, host, 8192);
    ts_bytes_free(d->test, &memory);
    free(host);
}

/* A batch names registered memory as the device does, which here is not as the host does. */
static void addresses_of_its_own_go_one_by_one(void **state)
{
    struct dev *d = *state, other = *d;
    struct ts_bytes memory = bytes_new(d, 16384);
    unsigned char *host = aligned(8192);
    d->fake->fake_alias(1);
    other = open_dev(d->test, NULL, NULL);
    assert_int_equal(other.ops->pin(other.state, host, 8192), 0);
    assert_false(is_one_call(&other, host, &memory));
    other.ops->unpin(other.state, host, 8192);
    close_dev(&other);
    d->fake->fake_alias(0);
    ts_bytes_free(d->test, &memory);
    free(host);
}

/* The library has the newer function, but the device does not do it. */
static void registered_the_older_way(void **state)
{
    struct dev *d = *state;
    unsigned char *host = aligned(8192);
    d->fake->fake_fail(NULL, 0, 0);
    d->fake->fake_fail("aclrtHostRegisterV2", 1, 207000);
    assert_int_equal(d->ops->pin(d->state, host, 8192), 0);
    d->fake->fake_fail(NULL, 0, 0);
    assert_int_equal(d->fake->fake_count("registered"), 8192);
    d->ops->unpin(d->state, host, 8192);
    free(host);
}

/* ---- libraries that are of no use ---- */

static int a_stub(struct ucmi_gpu *g, int *n_p)
{
    return 34;
}
static int no_device(struct ucmi_gpu *g, int *n_p)
{
    *n_p = 0;
    return 0;
}
static const char *text_of_stub(struct ucmi_gpu *g, int code)
{
    return code == 34 ? "a stub" : NULL;
}

static void what_is_wrong_with_a_library_is_told(void **state)
{
    static const struct ucmi_symbol none[] = {{NULL}};
    static const struct ucmi_code codes[] = {{34, -ENODEV}, {0, 0}};
    static const struct ucmi_symbol lacks[] = {
        UCMI_MAY_HAVE(struct ucmi_gpu, call.stream_free, "Perhaps"),
        UCMI_NEEDS(struct ucmi_gpu, call.stream_sync, "Never"),
        {NULL}};
    static const struct ucmi_vendor vendors[] = {
        {.libraries = {"libucm-none.so.1"}, .symbols = none, .count = no_device},
        {.libraries = {"libc.so.6"}, .symbols = lacks, .count = no_device},
        {.libraries = {"libc.so.6"},
         .symbols = none,
         .count = a_stub,
         .codes = codes,
         .text = text_of_stub},
        {.libraries = {"libc.so.6"}, .symbols = none, .count = a_stub, .codes = codes},
        {.libraries = {"libucm-none.so.1", "libc.so.6"}, .symbols = none, .count = no_device}};
    static const char *const words[] = {
        "libucm-none.so.1: cannot open", "libc.so.6 has no noNever: it is too old",
        "libc.so.6: error 34, a stub", "libc.so.6: error 34, no such device",
        "libc.so.6 finds no device"};
    for (size_t i = 0; i < ARRAY_LEN(vendors); i++) {
        struct ucmi_vendor v = vendors[i];
        char why[256] = "";
        v.prefix = "no";
        v.size = sizeof(struct ucmi_gpu);
        assert_int_equal(ucmi_gpu_probe(&v, why, sizeof why), -ENODEV);
        TS_ASSERT_WORDS(why, words[i]);
    }
}

/* ---- the simulated one ---- */

static void every_nth_copy_fails_and_moves_nothing(void **state)
{
    struct dev d = open_dev(ts_device("sim"), "sim_fail_every", "3");
    unsigned char memory[4] = {1, 2, 3, 4}, host[4] = {0};
    for (int i = 0; i < 4; i++) { /* the last one only comes after one that fails */
        struct ucm_copy v = {&memory[i], &host[i], 1};
        assert_int_equal(d.ops->copy(d.state, d.stream, 1, &v, 1), 0);
    }
    assert_int_equal(ended(&d, d.stream), -EIO);
    assert_int_equal(host[0], 1);
    assert_int_equal(host[1], 2);
    assert_int_equal(host[2], 0);
    assert_int_equal(host[3], 0);
    struct ucm_copy v = {&memory[3], &host[3], 1}; /* an error is reported once */
    assert_int_equal(d.ops->copy(d.state, d.stream, 1, &v, 1), 0);
    assert_int_equal(ended(&d, d.stream), 0);
    assert_int_equal(host[3], 4);
    close_dev(&d);
}

static void unpinned_memory_is_refused_where_asked(void **state)
{
    struct dev d = open_dev(ts_device("sim"), "sim_need_pin", "true");
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
    struct dev d = open_dev(ts_device("sim"), "sim_delay_us", "20000");
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

#define CASE(fn)                                                                                   \
    {                                                                                              \
#fn, fn                                                                                    \
    }
struct test {
    const char *name;
    void (*fn)(void **state);
};
static const struct test all[] = {
    CASE(pieces_go_both_ways),           CASE(gaps_are_left_alone),
    CASE(a_stream_keeps_its_order),      CASE(a_long_vector),
    CASE(then_comes_once_each_in_order), CASE(freeing_a_stream_waits_for_what_is_queued),
    CASE(each_thread_has_its_stream),    {NULL},
};
static const struct test with_events[] = {
    CASE(nothing_moves_before_the_event),
    CASE(an_event_that_has_come_holds_nothing),
    {NULL},
};
static const struct test of_vendors[] = {
    CASE(the_caller_keeps_its_context),    CASE(memory_is_registered_and_given_back),
    CASE(no_stream_ends_before_its_work),  CASE(each_call_may_fail),
    CASE(a_wait_that_fails_is_made_again), CASE(a_device_that_is_lost_says_so),
    CASE(errors_keep_their_meaning),       CASE(a_vector_is_one_call),
    CASE(a_device_that_is_not_there),      {NULL},
};
static const struct test of_cuda[] = {
    CASE(addresses_of_its_own_go_one_by_one),
    CASE(batches_that_are_not_done),
    CASE(waits_have_a_bound),
    {NULL},
};
static const struct test of_ascend[] = {
    CASE(registered_the_older_way),
    CASE(batches_that_are_not_done),
    {NULL},
};
static const struct test simulated[] = {
    CASE(every_nth_copy_fails_and_moves_nothing),
    CASE(unpinned_memory_is_refused_where_asked),
    CASE(a_delay_defers_the_bytes),
    CASE(a_queue_has_a_bound),
    CASE(the_host_reaches_what_it_says),
    CASE(what_is_wrong_with_a_library_is_told),
    {NULL},
};

static struct CMUnitTest tests[256];
static size_t ntests;

static void add(const struct ts_device *d, const struct test *some)
{
    for (; some->name; some++) {
        char *name;
        assert_true(asprintf(&name, "%s: %s", d->name, some->name) > 0);
        assert_true(ntests < ARRAY_LEN(tests));
        tests[ntests++] = (struct CMUnitTest){name, some->fn, setup, teardown, (void *)d};
    }
}

int main(void)
{
    opencl_add();
    for (size_t i = 0; i < ts_ndevices; i++) {
        const struct ts_device *d = &ts_devices[i];
        add(d, all);
        if (d->events)
            add(d, with_events);
        if (d->library)
            add(d, of_vendors);
    }
    add(ts_device("cuda"), of_cuda);
    add(ts_device("ascend"), of_ascend);
    add(ts_device("sim"), simulated);
    cmocka_set_test_filter(getenv("UCM_TEST_FILTER"));
    return _cmocka_run_group_tests("devices", tests, ntests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* The queue: its bound, its order, and a popper that sleeps when there is nothing. */
#include "base/base.h"

#include <sys/resource.h>

#include "../test.h"

static void *item(uintptr_t i)
{
    return (void *)i;
}

static void a_full_queue_refuses(void **state)
{
    struct ucmi_queue q;
    void *out[4];
    assert_int_equal(ucmi_queue_init(&q, 0), -EINVAL);
    assert_int_equal(ucmi_queue_init(&q, 3), 0);
    for (uintptr_t i = 1; i <= 3; i++)
        assert_int_equal(ucmi_queue_push(&q, item(i)), 0);
    assert_int_equal(ucmi_queue_push(&q, item(4)), -EAGAIN);
    assert_int_equal(ucmi_queue_pop(&q, out, 1, 0), 1);
    assert_ptr_equal(out[0], item(1));
    assert_int_equal(ucmi_queue_push(&q, item(4)), 0);
    assert_int_equal(ucmi_queue_push(&q, item(5)), -EAGAIN);
    assert_int_equal(ucmi_queue_pop(&q, out, 4, 0), 3);
    for (uintptr_t i = 0; i < 3; i++)
        assert_ptr_equal(out[i], item(i + 2));
    assert_int_equal(ucmi_queue_pop(&q, out, 4, 0), 0);
    ucmi_queue_destroy(&q);
}

static void order_holds_around_the_ring(void **state)
{
    struct ucmi_queue q;
    uintptr_t in = 0, expected = 0;
    assert_int_equal(ucmi_queue_init(&q, 5), 0);
    for (int round = 0; round < 100; round++) {
        void *out[5];
        for (int i = 0; i < 1 + round % 5; i++)
            if (ucmi_queue_push(&q, item(in)) == 0)
                in++;
        size_t n = ucmi_queue_pop(&q, out, 1 + (size_t)round % 3, 0);
        for (size_t i = 0; i < n; i++)
            assert_ptr_equal(out[i], item(expected++));
    }
    assert_true(expected > 100);
    ucmi_queue_destroy(&q);
}

static void a_kick_ends_one_pop_now_or_later(void **state)
{
    struct ucmi_queue q;
    void *out[2];
    assert_int_equal(ucmi_queue_init(&q, 2), 0);
    ucmi_queue_kick(&q);
    ucmi_queue_kick(&q);
    assert_int_equal(ucmi_queue_pop(&q, out, 2, UINT64_MAX), 0); /* would wait for ever */
    uint64_t until = ucmi_now_ns() + 5 * 1000000;
    assert_int_equal(ucmi_queue_pop(&q, out, 2, until), 0);
    assert_true(ucmi_now_ns() >= until); /* the kick was spent */
    ucmi_queue_kick(&q);
    assert_int_equal(ucmi_queue_push(&q, item(1)), 0);
    assert_int_equal(ucmi_queue_pop(&q, out, 2, UINT64_MAX), 1);
    ucmi_queue_destroy(&q);
}

static void *pop_one(void *arg)
{
    void *out = NULL;
    return ucmi_queue_pop(arg, &out, 1, UINT64_MAX) == 1 ? out : NULL;
}

static void wait_until_it_sleeps(struct ucmi_queue *q)
{
    bool sleeping;
    do {
        sched_yield();
        pthread_mutex_lock(&q->lock);
        sleeping = q->sleeping;
        pthread_mutex_unlock(&q->lock);
    } while (!sleeping);
}

static void a_sleeping_popper_wakes_for_a_push_and_for_a_kick(void **state)
{
    struct ucmi_queue q;
    assert_int_equal(ucmi_queue_init(&q, 2), 0);
    for (int kick = 0; kick < 2; kick++) {
        pthread_t thread;
        void *got;
        assert_int_equal(ucmi_thread_start(&thread, "popper", pop_one, &q), 0);
        wait_until_it_sleeps(&q);
        if (kick)
            ucmi_queue_kick(&q);
        else
            assert_int_equal(ucmi_queue_push(&q, item(7)), 0);
        pthread_join(thread, &got);
        assert_ptr_equal(got, kick ? NULL : item(7));
    }
    ucmi_queue_destroy(&q);
}

static void a_popper_without_work_stays_asleep(void **state)
{
    struct ucmi_queue q;
    struct rusage before, after;
    void *out;
    assert_int_equal(ucmi_queue_init(&q, 2), 0);
    uint64_t until = ucmi_now_ns() + 100 * 1000000;
    getrusage(RUSAGE_THREAD, &before);
    assert_int_equal(ucmi_queue_pop(&q, &out, 1, until), 0);
    getrusage(RUSAGE_THREAD, &after);
    assert_true(ucmi_now_ns() >= until);
    assert_in_range(after.ru_nvcsw - before.ru_nvcsw, 0, 4);
    ucmi_queue_destroy(&q);
}

enum { PUSHERS = 4, EACH = 5000 };
struct pusher {
    struct ucmi_queue *q;
    uintptr_t id;
};

static void *push_many(void *arg)
{
    const struct pusher *p = arg;
    for (uintptr_t i = 0; i < EACH; i++)
        while (ucmi_queue_push(p->q, item(p->id * EACH + i)) == -EAGAIN)
            sched_yield();
    return NULL;
}

static void many_pushers_lose_nothing_and_keep_their_order(void **state)
{
    struct ucmi_queue q;
    struct pusher pushers[PUSHERS];
    pthread_t threads[PUSHERS];
    uintptr_t next[PUSHERS] = {0};
    assert_int_equal(ucmi_queue_init(&q, 64), 0);
    for (uintptr_t i = 0; i < PUSHERS; i++) {
        pushers[i] = (struct pusher){&q, i};
        assert_int_equal(ucmi_thread_start(&threads[i], "pusher", push_many, &pushers[i]), 0);
    }
    for (size_t got = 0; got < PUSHERS * EACH;) {
        void *out[16];
        size_t n = ucmi_queue_pop(&q, out, ARRAY_LEN(out), UINT64_MAX);
        for (size_t i = 0; i < n; i++) {
            uintptr_t v = (uintptr_t)out[i];
            assert_int_equal(v % EACH, next[v / EACH]++);
        }
        got += n;
    }
    for (int i = 0; i < PUSHERS; i++)
        pthread_join(threads[i], NULL);
    ucmi_queue_destroy(&q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_full_queue_refuses),
        cmocka_unit_test(order_holds_around_the_ring),
        cmocka_unit_test(a_kick_ends_one_pop_now_or_later),
        cmocka_unit_test(a_sleeping_popper_wakes_for_a_push_and_for_a_kick),
        cmocka_unit_test(a_popper_without_work_stays_asleep),
        cmocka_unit_test(many_pushers_lose_nothing_and_keep_their_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

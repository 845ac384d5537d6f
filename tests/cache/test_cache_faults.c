/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Cache tier when things go wrong: below, on the device, in time, and when it is closed.  No
 * slice ends twice or never (every move checks that), no byte is wrong, no slot is lost.
 */
#include "harness.h"

#include <stdlib.h>
#include <unistd.h>

#include "dev/dev.h"
#include "store/pool.h"

enum { SLOTS = 8, SHORT_MS = 1500 }; /* long enough for a busy machine to begin within it */
static const struct shape patient = {.nshards = 4, .shard_size = 1024, .nslots = SLOTS};
static const struct shape hasty = {
    .nshards = 4, .shard_size = 1024, .nslots = SLOTS, .timeout_ms = SHORT_MS};

/* All slots can be used: none was lost, none is held. */
static void check_slots(struct stack *s, uint64_t first)
{
    pthread_mutex_lock(&s->below.lock); /* something may still be on its way down */
    s->below.hold = false;
    pthread_mutex_unlock(&s->below.lock);
    assert_int_equal(run_move(s, true, first, 3 * SLOTS), 0);
    for (uint64_t i = 0; i < 3 * SLOTS; i++)
        assert_true(below_has(&s->below, (ucm_key[]){key_of(first + i)}));
    assert_int_equal(run_move(s, false, first, 3 * SLOTS), 0);
    count_ready(s, first, 1);
    assert_int_equal(counter(s, UCMI_CACHE_READY), SLOTS);
}

/* ---- the tier below fails ---- */

static void absent_blocks_fail_alone(void **state)
{
    struct stack s;
    struct move m;
    stack_open(&s, *state, &patient, NULL);
    s.below.shuffle = true;
    for (uint64_t i = 0; i < 20; i += 2)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    move_new(&m, &s, false, 0, 20, 0, 4, 1);
    assert_int_equal(move_submit(&m), 0);
    assert_int_equal(move_wait(&m, UCM_RELEASED), -ENOENT);
    for (size_t i = 0; i < m.x.n; i++) {
        assert_int_equal(m.err[UCM_RELEASED][i], i % 20 % 2 ? -ENOENT : 0);
        assert_int_equal(move_right(&m, i), i % 20 % 2 == 0);
    }
    move_free(&m);
    for (uint64_t i = 1; i < 20; i += 2)
        assert_int_equal(count_ready(&s, i, 1), 0);
    check_slots(&s, 100);
    stack_close(&s);
}

/* One shard of a block cannot be read: those who need it fail, the others do not. */
static void a_bad_shard_fails_those_who_need_it(void **state)
{
    struct stack s;
    struct move m, whole;
    stack_open(&s, *state, &patient, NULL);
    assert_int_equal(run_move(&s, true, 50, 1), 0);
    s.below.hold = true;
    below_put(&s.below, (ucm_key[]){key_of(0)});
    move_new(&m, &s, false, 0, 1, 0, 4, 1);
    move_new(&whole, &s, false, 0, 1, 0, 4, 0);
    assert_int_equal(move_submit(&m), 0);
    below_wait_held(&s.below, 4);
    assert_int_equal(move_submit(&whole), 0);
    assert_int_equal(run_move(&s, false, 50, 1), 0); /* after it: it waits for the same reads */
    below_release(&s.below, 2, -EBADMSG);
    below_release_all(&s.below, 0);
    assert_int_equal(move_wait(&m, UCM_RELEASED), -EBADMSG);
    for (size_t i = 0; i < 4; i++)
        assert_int_equal(m.err[UCM_RELEASED][i], i == 2 ? -EBADMSG : 0);
    assert_int_equal(move_wait(&whole, UCM_RELEASED), -EBADMSG);
    move_free(&m);
    move_free(&whole);
    s.below.hold = false;
    assert_int_equal(run_move(&s, true, 0, 1), 0); /* the block can come all the same */
    check_slots(&s, 100);
    stack_close(&s);
}

/* A dump that met a read of its block does not depend on it. */
static void a_dump_survives_a_failed_read(void **state)
{
    struct stack s;
    struct move load, dump;
    stack_open(&s, *state, &patient, NULL);
    s.below.hold = true;
    move_new(&load, &s, false, 0, 1, 0, 4, 0);
    move_new(&dump, &s, true, 0, 1, 0, 4, 0);
    assert_int_equal(move_submit(&load), 0);
    below_wait_held(&s.below, 1);
    assert_int_equal(move_submit(&dump), 0);
    below_release(&s.below, 0, -EIO);
    assert_int_equal(move_wait(&load, UCM_RELEASED), -EIO);
    assert_int_equal(move_wait(&dump, UCM_RELEASED), 0);
    below_wait_held(&s.below, 1);
    below_release_all(&s.below, 0);
    assert_int_equal(move_wait(&dump, UCM_STORED), 0);
    assert_true(below_has(&s.below, (ucm_key[]){key_of(0)}));
    assert_int_equal(run_move(&s, false, 0, 1), 0);
    move_free(&load);
    move_free(&dump);
    check_slots(&s, 100);
    stack_close(&s);
}

static void a_failed_write_is_told_and_the_block_stays(void **state)
{
    struct stack s;
    struct move m;
    stack_open(&s, *state, &patient, NULL);
    s.below.fail_with = -ENOSPC;
    move_new(&m, &s, true, 0, 5, 0, 4, 0);
    assert_int_equal(move_submit(&m), 0);
    assert_int_equal(move_wait(&m, UCM_RELEASED), 0);
    assert_int_equal(move_wait(&m, UCM_STORED), -ENOSPC);
    for (size_t i = 0; i < 5; i++)
        assert_int_equal(m.err[UCM_STORED][i], -ENOSPC);
    assert_int_equal(count_ready(&s, 0, 5), 5);
    assert_int_equal(run_move(&s, false, 0, 5), 0);
    s.below.fail_with = 0;
    assert_int_equal(run_move(&s, true, 0, 5), 0); /* and is written when it is dumped again */
    assert_true(below_has(&s.below, (ucm_key[]){key_of(4)}));
    move_free(&m);
    check_slots(&s, 100);
    stack_close(&s);
}

static void a_full_queue_below_is_tried_again(void **state)
{
    struct stack s;
    stack_open(&s, *state, &patient, NULL);
    s.below.refuse = 4;
    assert_int_equal(run_move(&s, true, 0, 20), 0);
    assert_int_equal(s.below.refused, 4);
    s.below.refuse = 3;
    assert_int_equal(run_move(&s, false, 0, 20), 0);
    assert_int_equal(s.below.refused, 7);
    stack_close(&s);
}

static void a_queue_below_that_stays_full_is_given_up(void **state)
{
    struct stack s;
    stack_open(&s, *state, &hasty, NULL);
    s.below.refuse = 1 << 30;
    assert_int_equal(run_move(&s, true, 0, 1), -ETIMEDOUT);
    assert_int_equal(run_move(&s, false, 50, 1), -ETIMEDOUT);
    assert_int_equal(count_ready(&s, 0, 1), 1);
    s.below.refuse = 0;
    s.geo.timeout_ms = PATIENCE_MS;
    check_slots(&s, 100);
    stack_close(&s);
}

/* ---- time ---- */

/* The read hangs, the load's time is up, and then the read comes back and writes: into a slot that
 * is still its own, and not a byte of it into the engine's memory. */
static void a_slot_is_kept_while_a_read_hangs(void **state)
{
    struct stack s;
    struct move m;
    stack_open(&s, *state, &hasty, NULL);
    s.below.hold = true;
    for (uint64_t i = 0; i < 4; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    move_new(&m, &s, false, 0, 4, 0, 4, 0);
    assert_int_equal(move_submit(&m), 0);
    below_wait_held(&s.below, 4);
    assert_int_equal(move_wait(&m, UCM_RELEASED), -ETIMEDOUT);

    s.geo.timeout_ms = PATIENCE_MS;
    s.below.hold = false;
    assert_int_equal(run_move(&s, true, 100, 20), 0); /* all the other slots, several times */
    size_t kept = count_ready(&s, 100, 20);
    assert_int_equal(kept, SLOTS - 4);
    assert_int_equal(count_ready(&s, 0, 4), 0);
    below_release(&s.below, 0, -EIO); /* spoils its memory */
    below_release_all(&s.below, 0);   /* writes into it */
    assert_int_equal(run_move(&s, false, 100, 20), 0);
    for (size_t i = 0; i < 4 * 4096; i++)
        assert_int_equal(m.memory[i], 0x55);
    move_free(&m);
    check_slots(&s, 200);
    stack_close(&s);
}

static void a_dump_is_stored_late_or_timed_out(void **state)
{
    struct stack s;
    struct move m;
    stack_open(&s, *state, &hasty, NULL);
    s.below.hold = true;
    move_new(&m, &s, true, 0, 4, 0, 4, 0);
    assert_int_equal(move_submit(&m), 0);
    assert_int_equal(move_wait(&m, UCM_RELEASED), 0);
    assert_int_equal(move_wait(&m, UCM_STORED), -ETIMEDOUT);
    below_wait_held(&s.below, 4);
    s.geo.timeout_ms = PATIENCE_MS;
    s.below.hold = false;
    assert_int_equal(run_move(&s, true, 100, 20), 0); /* not through the slots being written */
    below_release_all(&s.below, 0);
    for (uint64_t i = 0; i < 4; i++)
        assert_true(below_has(&s.below, (ucm_key[]){key_of(i)}));
    move_free(&m);
    check_slots(&s, 200);
    stack_close(&s);
}

static void without_a_slot_a_slice_ends_in_time(void **state)
{
    struct stack s;
    struct move first, load, dump;
    stack_open(&s, *state, &hasty, NULL);
    s.below.hold = true;
    for (uint64_t i = 0; i < SLOTS; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    for (uint64_t i = 50; i < 54; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    move_new(&first, &s, false, 0, SLOTS, 0, 4, 0);
    move_new(&load, &s, false, 50, 4, 0, 4, 0);
    move_new(&dump, &s, true, 60, 4, 0, 4, 0);
    assert_int_equal(move_submit(&first), 0);
    below_wait_held(&s.below, SLOTS);
    assert_int_equal(move_submit(&load), 0);
    assert_int_equal(move_submit(&dump), 0);
    assert_int_equal(move_wait(&load, UCM_RELEASED), -ETIMEDOUT);
    assert_int_equal(move_wait(&dump, UCM_RELEASED), -ETIMEDOUT);
    assert_int_equal(move_wait(&dump, UCM_STORED), -ETIMEDOUT);
    assert_int_equal(move_wait(&first, UCM_RELEASED), -ETIMEDOUT);
    assert_true(counter(&s, UCMI_CACHE_WAITED) >= 8);
    below_release_all(&s.below, 0);
    s.geo.timeout_ms = PATIENCE_MS;
    move_free(&first);
    move_free(&load);
    move_free(&dump);
    check_slots(&s, 200);
    stack_close(&s);
}

/* Of two loads that share a read, the one with less time is given up, and not the other. */
static void a_shared_read_is_not_given_up_for_both(void **state)
{
    struct stack s;
    struct move brief, patient_one;
    stack_open(&s, *state, &hasty, NULL);
    s.below.hold = true;
    below_put(&s.below, (ucm_key[]){key_of(0)});
    move_new(&brief, &s, false, 0, 1, 0, 4, 0);
    move_new(&patient_one, &s, false, 0, 1, 0, 4, 0);
    assert_int_equal(move_submit(&brief), 0);
    below_wait_held(&s.below, 1);
    s.geo.timeout_ms = PATIENCE_MS;
    assert_int_equal(move_submit(&patient_one), 0);
    assert_int_equal(move_wait(&brief, UCM_RELEASED), -ETIMEDOUT);
    below_release(&s.below, 0, -ETIMEDOUT);
    below_wait_held(&s.below, 1);
    s.below.hold = false;
    below_release_all(&s.below, 0);
    assert_int_equal(move_wait(&patient_one, UCM_RELEASED), 0);
    assert_true(move_right(&patient_one, 0));
    move_free(&brief);
    move_free(&patient_one);
    check_slots(&s, 100);
    stack_close(&s);
}

/* A lookup below that hangs holds up those who need its answer, for their time, and nobody else. */
static void a_lookup_that_hangs_is_not_waited_for(void **state)
{
    struct stack s;
    stack_open(&s, *state, &patient, NULL);
    assert_int_equal(run_move(&s, true, 0, SLOTS), 0);
    s.below.deaf = true;
    s.geo.timeout_ms = SHORT_MS;
    assert_int_equal(run_move(&s, false, 50, 2 * SLOTS), -ETIMEDOUT);
    s.geo.timeout_ms = PATIENCE_MS;
    assert_int_equal(run_move(&s, false, 0, SLOTS), 0);
    below_hear(&s.below);
    assert_int_equal(run_move(&s, false, 50, 1), -ENOENT);
    check_slots(&s, 100);
    stack_close(&s);
}

static void *hear_late(void *below)
{
    usleep(400000);
    below_hear(below);
    return NULL;
}

static void count_line(void *lines, enum ucm_level level, const char *line)
{
    ++*(unsigned *)lines;
}

/* A lookup below that takes longer than closing may is no device that hangs: it is waited for. */
static void a_late_lookup_is_no_device_that_hangs(void **state)
{
    const struct shape brief = {
        .nshards = 4, .shard_size = 1024, .nslots = SLOTS, .timeout_ms = 100};
    struct stack s;
    struct move m;
    pthread_t thread;
    unsigned lines = 0;
    stack_open(&s, *state, &brief, NULL);
    s.geo.timeout_ms = PATIENCE_MS;
    assert_int_equal(run_move(&s, true, 0, SLOTS), 0);
    s.below.deaf = true;
    move_new(&m, &s, false, 50, 1, 0, 4, 0);
    assert_int_equal(move_submit(&m), 0);
    pthread_mutex_lock(&s.below.lock);
    while (!s.below.asked)
        ucmi_cond_wait(&s.below.change, &s.below.lock, UINT64_MAX);
    pthread_mutex_unlock(&s.below.lock);
    ucm_log_to(count_line, &lines, UCM_WARN);
    assert_int_equal(ucmi_thread_start(&thread, "late", hear_late, &s.below), 0);
    stack_close_cache(&s);
    pthread_join(thread, NULL);
    ucm_log_to(NULL, NULL, UCM_ERROR);
    assert_int_equal(lines, 0);
    assert_int_equal(move_wait(&m, UCM_RELEASED), -ESHUTDOWN);
    move_free(&m);
    stack_close(&s);
}

/* A block whose last shard never comes is given up; it is a hit for nobody, and its slot comes
 * back. */
static void an_unfinished_block_is_given_up(void **state)
{
    struct stack s;
    struct move m;
    stack_open(&s, *state, &hasty, NULL);
    move_new(&m, &s, true, 0, SLOTS - 1, 0, 3, 0); /* one is left for loads */
    assert_int_equal(move_submit(&m), 0);
    assert_int_equal(move_wait(&m, UCM_RELEASED), 0);
    assert_int_equal(move_wait(&m, UCM_STORED), -ETIMEDOUT);
    assert_int_equal(below_count(&s.below), 0);
    assert_int_equal(count_ready(&s, 0, SLOTS - 1), 0);
    s.geo.timeout_ms = PATIENCE_MS;
    assert_int_equal(run_move(&s, true, 100, 20), 0); /* as soon as they are idle that long */
    move_free(&m);
    check_slots(&s, 200);
    stack_close(&s);
}

/* Waits until no more than `left` slices have yet to reach the stage. */
static void wait_left(struct move *m, enum ucm_stage stage, uint32_t left)
{
    uint64_t end = ucmi_now_ns() + PATIENCE_MS * UINT64_C(1000000);
    pthread_mutex_lock(&m->lock);
    while (m->left[stage] > left && !ucmi_cond_wait(&m->change, &m->lock, end))
        ;
    bool there = m->left[stage] <= left;
    pthread_mutex_unlock(&m->lock);
    assert_true(there);
}

/* The copy of a dump ends after its deadline, and the shard that is still missing is on its way to
 * another, by a read that hangs: the dump does not wait for that. */
static void a_late_copy_does_not_wait_for_a_read(void **state)
{
    struct stack s;
    struct shape shape = patient;
    struct move load, dump;
    struct ucmi_sim_event *event = ucmi_sim_event_new();
    shape.device = "sim";
    stack_open(&s, *state, &shape, NULL);
    s.below.hold = true;
    below_put(&s.below, (ucm_key[]){key_of(0)});
    move_new(&load, &s, false, 0, 1, 3, 1, 0);
    assert_int_equal(move_submit(&load), 0);
    below_wait_held(&s.below, 1);
    move_new(&dump, &s, true, 0, 2, 0, 4, 0);
    dump.x.v[1].key = key_of(0); /* of the second slice nothing is copied: it tells the time */
    dump.x.v[1].shard = 3;
    dump.x.v[1].nshards = 1;
    dump.x.after = event;
    s.geo.timeout_ms = SHORT_MS;
    assert_int_equal(move_submit(&dump), 0);
    wait_left(&dump, UCM_RELEASED, 1);
    assert_int_equal(dump.err[UCM_RELEASED][1], -ETIMEDOUT);
    ucmi_sim_event_fire(event);
    assert_int_equal(move_wait(&dump, UCM_RELEASED), -ETIMEDOUT);
    assert_int_equal(move_wait(&dump, UCM_STORED), -ETIMEDOUT);
    s.below.hold = false;
    below_release_all(&s.below, 0);
    assert_int_equal(move_wait(&load, UCM_RELEASED), 0);
    assert_true(move_right(&load, 0));
    s.geo.timeout_ms = PATIENCE_MS;
    move_free(&load);
    move_free(&dump);
    check_slots(&s, 100);
    stack_close(&s);
    ucmi_sim_event_free(event);
}

/* The device hangs, and holds as many copies as it may: those whose copy has not begun end in time.
 */
static void a_device_that_hangs_holds_what_it_has_and_no_more(void **state)
{
    enum { MOST = 32 * 256, N = MOST + 100 }; /* what FLIGHTS_MAX of PASS_PARTS can hold */
    struct stack s;
    struct shape shape = patient;
    struct move m;
    struct ucmi_sim_event *event = ucmi_sim_event_new();
    shape.device = "sim";
    stack_open(&s, *state, &shape, NULL);
    assert_int_equal(run_move(&s, true, 0, 1), 0);
    move_new(&m, &s, false, 0, N, 0, 1, 0);
    for (size_t i = 0; i < N; i++)
        m.x.v[i].key = key_of(0);
    m.x.after = event;
    s.geo.timeout_ms = SHORT_MS;
    assert_int_equal(move_submit(&m), 0);
    wait_left(&m, UCM_RELEASED, MOST);
    ucmi_sim_event_fire(event);
    assert_int_equal(move_wait(&m, UCM_RELEASED), -ETIMEDOUT);
    for (size_t i = 0; i < N; i++)
        assert_true(m.err[UCM_RELEASED][i] ? m.err[UCM_RELEASED][i] == -ETIMEDOUT
                                           : move_right(&m, i));
    s.geo.timeout_ms = PATIENCE_MS;
    move_free(&m);
    check_slots(&s, 100);
    stack_close(&s);
    ucmi_sim_event_free(event);
}

/* ---- cancel ---- */

static void what_has_not_started_is_canceled(void **state)
{
    struct stack s;
    struct move first, load, dump;
    stack_open(&s, *state, &patient, NULL);
    s.below.hold = true;
    for (uint64_t i = 0; i < SLOTS; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    for (uint64_t i = 50; i < 54; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    move_new(&first, &s, false, 0, SLOTS, 0, 4, 0);
    move_new(&load, &s, false, 50, 4, 0, 4, 0);
    move_new(&dump, &s, true, 60, 4, 0, 4, 0);
    assert_int_equal(move_submit(&first), 0);
    below_wait_held(&s.below, SLOTS);
    assert_int_equal(move_submit(&load), 0);
    assert_int_equal(move_submit(&dump), 0);
    __atomic_store_n(&first.x.cancel, 1, __ATOMIC_RELAXED); /* under way: ends as it may */
    __atomic_store_n(&load.x.cancel, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&dump.x.cancel, 1, __ATOMIC_RELAXED);
    assert_int_equal(move_wait(&load, UCM_RELEASED), -ECANCELED);
    assert_int_equal(move_wait(&dump, UCM_RELEASED), -ECANCELED);
    assert_int_equal(move_wait(&dump, UCM_STORED), -ECANCELED);
    assert_false(move_reached(&first, UCM_RELEASED));
    below_release_all(&s.below, 0);
    int err = move_wait(&first, UCM_RELEASED);
    assert_true(err == 0 || err == -ECANCELED);
    move_free(&first);
    move_free(&load);
    move_free(&dump);
    check_slots(&s, 200);
    stack_close(&s);
}

/* ---- the device ---- */

static void failed_copies_fail_their_slices(void **state)
{
    struct stack s;
    struct shape shape = patient;
    unsigned failed = 0;
    shape.device = "sim";
    stack_open(&s, *state, &shape, "sim_fail_every=5");
    for (uint64_t i = 0; i < 60; i++) {
        int err = run_move(&s, true, i, 1); /* one copy each */
        assert_true(err == 0 || err == -EIO);
        assert_int_equal(below_has(&s.below, (ucm_key[]){key_of(i)}), err == 0);
        assert_int_equal(count_ready(&s, i, 1), err == 0);
        failed += err != 0;
        err = run_move(&s, false, i, 1); /* never wrong bytes: run_move checks */
        assert_true(err == 0 || err == -EIO || err == -ENOENT);
    }
    assert_in_range(failed, 1, 59);
    stack_close(&s);
}

/* A device that cannot say when copies have ended, or has no more streams: what was on its way
 * fails, the rest does not. */
static int deaf_then(void *d, void *stream, void (*fn)(void *arg, int err), void *arg)
{
    return -EIO;
}

static int no_stream(void *d, void **stream_p)
{
    return -ENOMEM;
}

static void a_stream_that_fails_is_replaced(void **state)
{
    struct stack s;
    stack_open(&s, *state, &patient, NULL);
    const struct ucm_dev_ops *host = s.geo.dev;
    struct ucm_dev_ops deaf = *host, gone = *host;
    deaf.then = deaf_then;
    gone.then = deaf_then;
    gone.stream_new = no_stream;
    assert_int_equal(run_move(&s, true, 0, 1), 0);
    for (int dump = 0; dump < 2; dump++) {
        s.geo.dev = &deaf;
        assert_int_equal(run_move(&s, dump, dump, 1), -EIO);
        s.geo.dev = host;
        assert_int_equal(run_move(&s, dump, dump, 1), 0);
    }
    s.geo.dev = &gone;
    assert_int_equal(run_move(&s, false, 0, 1), -EIO);
    assert_int_equal(run_move(&s, false, 0, 1), -ENOMEM); /* and none of it hangs */
    s.geo.dev = host;
    assert_int_equal(run_move(&s, true, 2, 1), 0);  /* the other one has its own */
    assert_int_equal(run_move(&s, false, 0, 1), 0); /* and this one has a new one */
    stack_close(&s);
}

/* More pieces than are handed to the device at once, and a dump that starts in the middle of them:
 * each byte goes to its place. */
static void pieces_of_any_size_are_copied(void **state)
{
    enum { PIECES = 2048, SIZE = 4096 / PIECES };
    struct stack s;
    struct move m, second;
    struct iovec iov[PIECES];
    stack_open(&s, *state, &patient, NULL);
    move_new(&second, &s, true, 0, 1, 1, 1, 0);
    assert_int_equal(move_submit(&second), 0);
    assert_int_equal(move_wait(&second, UCM_RELEASED), 0);
    for (int dump = 1; dump >= 0; dump--) {
        move_new(&m, &s, dump, 0, 1, 0, 4, 0);
        for (size_t i = 0; i < PIECES; i++)
            iov[i] = (struct iovec){m.memory + i * SIZE, SIZE};
        m.x.v[0].at.iov = iov;
        m.x.v[0].niov = PIECES;
        assert_int_equal(move_submit(&m), 0);
        assert_int_equal(move_wait(&m, dump ? UCM_STORED : UCM_RELEASED), 0);
        assert_true(dump ? below_has(&s.below, (ucm_key[]){key_of(0)}) : move_right(&m, 0));
        move_free(&m);
    }
    move_free(&second);
    stack_close(&s);
}

/* ---- dumps by layers that cannot become whole ---- */

/* The block is there for the first slice and evicted before the second: what is left of the dump
 * ends at once, evicts nothing, and the next dump of the block is as good as any. */
static void a_dump_that_straddles_an_eviction_ends(void **state)
{
    struct stack s;
    struct shape one = patient;
    struct move m[4];
    one.nslots = 1;
    stack_open(&s, *state, &one, NULL);
    assert_int_equal(run_move(&s, true, 0, 1), 0);
    assert_int_equal(run_shards(&s, true, 0, 1, 0, 1), 0);
    assert_int_equal(run_shards(&s, true, 0, 1, 2, 1), 0); /* still the same block */
    assert_int_equal(run_move(&s, true, 1, 1), 0);
    assert_int_equal(run_shards(&s, true, 0, 1, 3, 1), -ENOSPC);
    assert_int_equal(count_ready(&s, 1, 1), 1);
    for (unsigned i = 0; i < 2;
         i++) { /* one that begins before the former has ended, and one after */
        for (unsigned k = 0; k < 4; k++) {
            move_new(&m[k], &s, true, 0, 1, k, 1, 0);
            assert_int_equal(move_submit(&m[k]), 0);
        }
        for (unsigned k = 0; k < 4; k++) {
            assert_int_equal(move_wait(&m[k], UCM_STORED), 0);
            move_free(&m[k]);
        }
        assert_int_equal(run_move(&s, true, 2, 1), 0);
    }
    stack_close(&s);
}

/* A slice fails after others were RELEASED: those end at once, and another process that waits for
 * the block takes over. */
static void a_dump_that_lost_a_slice_ends(void **state)
{
    for (int how = 0; how < 2; how++) {
        struct stack a, b;
        struct move first, second, other;
        stack_open(&a, *state, &patient, NULL);
        stack_open(&b, *state, &patient, NULL);
        const struct ucm_dev_ops *host = a.geo.dev;
        struct ucm_dev_ops deaf = *host;
        deaf.then = deaf_then;
        move_new(&first, &a, true, 0, 1, 0, 2, 0);
        move_new(&second, &a, true, 0, 1, 2, 1, 0);
        move_new(&other, &b, true, 0, 1, 0, 4, 0);
        assert_int_equal(move_submit(&first), 0);
        assert_int_equal(move_wait(&first, UCM_RELEASED), 0);
        assert_int_equal(move_submit(&other), 0);
        if (how == 0)
            a.geo.dev = &deaf;
        else
            second.x.cancel = 1;
        assert_int_equal(move_submit(&second), 0);
        assert_int_equal(move_wait(&second, UCM_RELEASED), how ? -ECANCELED : -EIO);
        assert_int_equal(move_wait(&first, UCM_STORED), -EIO);
        a.geo.dev = host;
        assert_int_equal(move_wait(&other, UCM_STORED), 0);
        assert_int_equal(run_shards(&a, true, 0, 1, 3, 1), 0); /* the other's */
        move_free(&first);
        move_free(&second);
        move_free(&other);
        stack_close(&a);
        stack_close(&b);
    }
}

/* The rest of a dump of which one slice failed claims nothing either. */
static void a_dump_that_never_began_well_ends(void **state)
{
    struct stack s;
    struct move m;
    stack_open(&s, *state, &patient, NULL);
    move_new(&m, &s, true, 0, 1, 0, 1, 0);
    m.x.cancel = 1;
    assert_int_equal(move_submit(&m), 0);
    assert_int_equal(move_wait(&m, UCM_STORED), -ECANCELED);
    assert_int_equal(run_shards(&s, true, 0, 1, 1, 2), -ENOSPC);
    assert_int_equal(run_shards(&s, true, 0, 1, 3, 1), -ENOSPC);
    assert_int_equal(run_move(&s, true, 0, 1), 0);
    move_free(&m);
    check_slots(&s, 100);
    stack_close(&s);
}

/* ---- bounds ---- */

static void queues_are_bounded(void **state)
{
    struct stack s;
    struct move a, b, c;
    stack_open(&s, *state, &patient, "waiting_queue_depth=2 running_queue_depth=5");
    s.below.hold = true;
    for (uint64_t i = 0; i < 10; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    move_new(&a, &s, false, 0, 2, 0, 4, 0);
    move_new(&b, &s, false, 2, 4, 0, 4, 0);
    move_new(&c, &s, false, 6, 1, 0, 4, 0);
    assert_int_equal(move_submit(&a), 0);
    assert_int_equal(move_submit(&b), -EAGAIN); /* 2 + 4 slices are too many */
    assert_int_equal(move_submit(&c), 0);
    c.x.n = 1;
    struct move d;
    move_new(&d, &s, false, 7, 1, 0, 4, 0);
    assert_int_equal(move_submit(&d), -EAGAIN); /* two loads are under way */
    below_wait_held(&s.below, 3);
    below_release_all(&s.below, 0);
    assert_int_equal(move_wait(&a, UCM_RELEASED), 0);
    assert_int_equal(move_wait(&c, UCM_RELEASED), 0);
    s.below.hold = false;
    assert_int_equal(run_move(&s, false, 0, 9), 0); /* larger than the bound, but alone */
    move_free(&a);
    move_free(&b);
    move_free(&c);
    move_free(&d);
    stack_close(&s);
}

/* ---- closing ---- */

static void close_finishes_the_dumps(void **state)
{
    struct stack s;
    struct move m;
    stack_open(&s, *state, &patient, NULL);
    s.below.shuffle = true;
    move_new(&m, &s, true, 0, 50, 0, 4, 0);
    assert_int_equal(move_submit(&m), 0);
    stack_close_cache(&s);
    assert_true(move_reached(&m, UCM_RELEASED));
    assert_true(move_reached(&m, UCM_STORED));
    assert_int_equal(move_wait(&m, UCM_STORED), 0);
    for (uint64_t i = 0; i < 50; i++)
        assert_true(below_has(&s.below, (ucm_key[]){key_of(i)}));
    assert_int_equal(count_files(*state), 0);
    move_free(&m);
    stack_close(&s);
}

struct release {
    struct below *below;
    struct move *after; /* is over */
};

static void *release_after(void *arg)
{
    struct release *r = arg;
    move_wait(r->after, UCM_RELEASED);
    below_release_all(r->below, 0);
    return NULL;
}

/* Loads under way end as they may, those that wait are ended, partial blocks are given up. */
static void close_ends_the_rest(void **state)
{
    struct stack s;
    struct move first, waiting, partial;
    struct release r = {&s.below, &waiting};
    pthread_t thread;
    stack_open(&s, *state, &patient, NULL);
    s.below.hold = true;
    for (uint64_t i = 0; i < SLOTS; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    for (uint64_t i = 50; i < 54; i++)
        below_put(&s.below, (ucm_key[]){key_of(i)});
    move_new(&partial, &s, true, 90, 1, 0, 1, 0);
    assert_int_equal(move_submit(&partial), 0);
    assert_int_equal(move_wait(&partial, UCM_RELEASED), 0);
    move_new(&first, &s, false, 0, SLOTS - 1, 0, 4, 0);
    move_new(&waiting, &s, false, 50, 4, 0, 4, 0);
    assert_int_equal(move_submit(&first), 0);
    below_wait_held(&s.below, SLOTS - 1);
    assert_int_equal(move_submit(&waiting), 0);
    assert_int_equal(ucmi_thread_start(&thread, "release", release_after, &r), 0);
    stack_close_cache(&s);
    pthread_join(thread, NULL);
    assert_true(move_reached(&first, UCM_RELEASED));
    assert_true(move_reached(&partial, UCM_STORED));
    assert_int_equal(move_wait(&waiting, UCM_RELEASED), -ESHUTDOWN);
    assert_int_equal(move_wait(&partial, UCM_STORED), -ESHUTDOWN);
    int err = move_wait(&first, UCM_RELEASED);
    assert_true(err == 0 || err == -ESHUTDOWN);
    assert_int_equal(count_files(*state), 0);
    move_free(&first);
    move_free(&waiting);
    move_free(&partial);
    stack_close(&s);
}

/* The tier below does not end: close does all the same, and the memory stays for as long as it
 * takes. */
static void close_does_not_wait_for_ever(void **state)
{
    struct stack s;
    struct move load, dump;
    stack_open(&s, *state, &hasty, NULL);
    s.below.hold = true;
    below_put(&s.below, (ucm_key[]){key_of(0)});
    move_new(&load, &s, false, 0, 1, 0, 4, 1);
    move_new(&dump, &s, true, 1, 2, 0, 4, 0);
    s.geo.timeout_ms = PATIENCE_MS;
    assert_int_equal(move_submit(&load), 0);
    assert_int_equal(move_submit(&dump), 0);
    below_wait_held(&s.below, 6);
    stack_close_cache(&s);
    assert_int_equal(move_wait(&load, UCM_RELEASED), -ETIMEDOUT);
    assert_int_equal(move_wait(&dump, UCM_RELEASED), 0);
    assert_int_equal(move_wait(&dump, UCM_STORED), -ETIMEDOUT);
    assert_int_equal(count_files(*state), 1);
    below_release_all(&s.below, 0);
    assert_int_equal(count_files(*state), 0); /* the last one to end has cleaned up */
    for (size_t i = 0; i < 4096; i++)
        assert_int_equal(load.memory[i], 0x55);
    move_free(&load);
    move_free(&dump);
    stack_close(&s);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)
    const struct CMUnitTest tests[] = {
        TEST(absent_blocks_fail_alone),
        TEST(a_bad_shard_fails_those_who_need_it),
        TEST(a_dump_survives_a_failed_read),
        TEST(a_failed_write_is_told_and_the_block_stays),
        TEST(a_full_queue_below_is_tried_again),
        TEST(a_queue_below_that_stays_full_is_given_up),
        TEST(a_slot_is_kept_while_a_read_hangs),
        TEST(a_dump_is_stored_late_or_timed_out),
        TEST(without_a_slot_a_slice_ends_in_time),
        TEST(a_shared_read_is_not_given_up_for_both),
        TEST(a_lookup_that_hangs_is_not_waited_for),
        TEST(a_late_lookup_is_no_device_that_hangs),
        TEST(an_unfinished_block_is_given_up),
        TEST(a_late_copy_does_not_wait_for_a_read),
        TEST(a_device_that_hangs_holds_what_it_has_and_no_more),
        TEST(what_has_not_started_is_canceled),
        TEST(failed_copies_fail_their_slices),
        TEST(a_stream_that_fails_is_replaced),
        TEST(pieces_of_any_size_are_copied),
        TEST(a_dump_that_straddles_an_eviction_ends),
        TEST(a_dump_that_lost_a_slice_ends),
        TEST(a_dump_that_never_began_well_ends),
        TEST(queues_are_bounded),
        TEST(close_finishes_the_dumps),
        TEST(close_ends_the_rest),
        TEST(close_does_not_wait_for_ever),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

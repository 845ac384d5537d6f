/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Processes that work on one pool and are killed in the middle of it, wherever they are.  The
 * others go on, never see a wrong byte (run_move checks every one), and find everything put back in
 * order.
 */
#include "harness.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "store/pool.h"

enum { KILLS = 20, KEYS = 40, MOST = 5, SLOTS = 128 };
static const struct shape shape = {.nshards = 4, .shard_size = 4096, .nslots = SLOTS};

struct victim {
    pid_t pid;
    int go[2], done[2];
};

static void work(struct stack *s, uint64_t *random)
{
    *random = *random * UINT64_C(6364136223846793005) + 1442695040888963407;
    size_t n = 1 + (*random >> 33) % MOST;
    uint64_t first = (*random >> 40) % (KEYS - n);
    assert_int_equal(run_move(s, *random >> 63, first, n), 0);
}

static void begin(struct stack *s, const char *dir)
{
    stack_open(s, dir, &shape, NULL);
    s->below.shuffle = true;
    for (uint64_t i = 0; i < KEYS; i++)
        below_put(&s->below, (ucm_key[]){key_of(i)});
}

/* Works until it is killed, and says after each move that it is done. */
static void live(struct victim *v, const char *dir)
{
    struct stack s;
    uint64_t random = (uint64_t)getpid();
    char byte = 0;
    setenv("CMOCKA_TEST_ABORT", "1", 1);
    if (read(v->go[0], &byte, 1) != 1)
        _exit(1);
    begin(&s, dir);
    for (;;) {
        work(&s, &random);
        if (write(v->done[1], &byte, 1) != 1)
            _exit(1);
    }
}

/* All that the dead held is free, ready or in quarantine. */
static void check_order(const char *dir)
{
    struct ucm_counters counters = {0};
    struct ucmi_pool_spec spec = {
        .dir = dir,
        .block_size = shape.nshards * shape.shard_size,
        .shard_size = shape.shard_size,
        .quarantine_ms = 30000,
        .counters = &counters,
    };
    struct ucmi_pool *p = NULL;
    assert_int_equal(ucmi_pool_open(&spec, &p, NULL, 0), 0);
    assert_true(p->fd >= 0);
    for (uint32_t i = 0; i < p->layout.nslots; i++) {
        unsigned state = atomic_load(&p->metas[i].word) & 0xff;
        assert_true(state == UCMI_SLOT_FREE || state == UCMI_SLOT_READY ||
                    state == UCMI_SLOT_QUARANTINE);
        assert_int_equal(atomic_load(&p->metas[i].holders), 0);
    }
    ucmi_pool_close(p);
}

static void the_living_go_on(void **state)
{
    struct victim v[KILLS];
    struct stack s;
    uint64_t random = 7;
    char byte = 0;
    int status;
    for (int i = 0; i < KILLS; i++) { /* all before the first thread is started */
        assert_int_equal(pipe(v[i].go) | pipe(v[i].done), 0);
        v[i].pid = fork();
        if (v[i].pid == 0)
            live(&v[i], *state);
        close(v[i].go[0]);
        close(v[i].done[1]);
    }
    begin(&s, *state);
    for (int i = 0; i < KILLS; i++) {
        assert_int_equal(write(v[i].go[1], &byte, 1), 1);
        for (int k = 0; k < 2 + i * 4; k++) {
            assert_int_equal(read(v[i].done[0], &byte, 1), 1);
            work(&s, &random);
        }
        assert_int_equal(kill(v[i].pid, SIGKILL), 0);
        work(&s, &random);
        assert_int_equal(waitpid(v[i].pid, &status, 0), v[i].pid);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        close(v[i].go[1]);
        close(v[i].done[0]);
    }
    assert_int_equal(run_move(&s, false, 0, KEYS), 0);
    check_order(*state);
    assert_int_equal(run_move(&s, true, 0, KEYS), 0);
    assert_int_equal(count_ready(&s, 0, KEYS), KEYS);
    stack_close(&s);
    assert_int_equal(count_files(*state), 0);
}

/* ---- what a killed process had not written down ---- */

enum { LOST = 12 };

/* Dumps over a disk that takes nothing, and is killed when its blocks are RELEASED. */
static pid_t dump_and_wait(const char *dir, int go[2], int done[2])
{
    struct stack s;
    struct move m;
    char byte = 0;
    assert_int_equal(pipe(go) | pipe(done), 0);
    pid_t pid = fork();
    if (pid)
        return pid;
    setenv("CMOCKA_TEST_ABORT", "1", 1);
    if (read(go[0], &byte, 1) != 1)
        _exit(1);
    stack_open(&s, dir, &shape, NULL);
    s.below.hold = true;
    move_new(&m, &s, true, 0, LOST, 0, 4, 0);
    assert_int_equal(move_submit(&m), 0);
    assert_int_equal(move_wait(&m, UCM_RELEASED), 0);
    below_wait_held(&s.below, LOST);
    if (write(done[1], &byte, 1) != 1)
        _exit(1);
    for (;;)
        pause();
}

static void kill_when_released(pid_t pid, int go[2], int done[2])
{
    char byte = 0;
    int status;
    assert_int_equal(write(go[1], &byte, 1), 1);
    assert_int_equal(read(done[0], &byte, 1), 1);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    for (int i = 0; i < 2; i++) {
        close(go[i]);
        close(done[i]);
    }
}

static void check_all_stored(struct stack *s)
{
    for (uint64_t i = 0; i < LOST; i++)
        assert_true(below_has(&s->below, (ucm_key[]){key_of(i)}));
}

static void successors_write_down_what_was_left(void **state)
{
    struct stack a, b;
    int go[2], done[2];
    pid_t pid = dump_and_wait(*state, go, done);
    kill_when_released(pid, go, done);
    stack_open(&a, *state, &shape, NULL);
    stack_open(&b, *state, &shape, NULL);
    assert_int_equal(run_move(&b, false, 0, LOST), 0);
    stack_close_cache(&a);
    stack_close_cache(&b);
    for (uint64_t i = 0; i < LOST; i++) { /* each by one of them */
        ucm_key key = key_of(i);
        assert_int_equal(below_has(&a.below, &key) + below_has(&b.below, &key), 1);
    }
    assert_int_equal(a.below.writes + b.below.writes, LOST);
    assert_int_equal(counter(&a, UCMI_CACHE_ADOPTED) + counter(&b, UCMI_CACHE_ADOPTED), LOST);
    stack_close(&a);
    stack_close(&b);
    assert_int_equal(count_files(*state), 0);
}

/* The last one out takes along what a process left that nobody has missed. */
static void a_survivor_writes_it_down_when_it_leaves(void **state)
{
    struct stack s;
    int go[2], done[2];
    pid_t pid = dump_and_wait(*state, go, done);
    stack_open(&s, *state, &shape, NULL);
    kill_when_released(pid, go, done);
    stack_close_cache(&s);
    check_all_stored(&s);
    stack_close(&s);
    assert_int_equal(count_files(*state), 0);
}

/* A disk that takes nothing of what was left holds no more than a few slots, and nobody up. */
static void what_was_left_holds_nobody_up(void **state)
{
    enum { AT_A_TIME = 8 };
    struct stack s;
    struct move m;
    struct shape slow = shape;
    int go[2], done[2];
    pid_t pid = dump_and_wait(*state, go, done);
    kill_when_released(pid, go, done);
    slow.hold = true;
    stack_open(&s, *state, &slow, NULL);
    below_wait_held(&s.below, AT_A_TIME);
    assert_int_equal(run_move(&s, false, 0, LOST), 0);
    move_new(&m, &s, true, 100, 1, 0, 4, 0);
    assert_int_equal(move_submit(&m), 0);
    below_wait_held(&s.below, AT_A_TIME + 1);
    below_release(&s.below, AT_A_TIME, 0); /* before any of them */
    assert_int_equal(move_wait(&m, UCM_STORED), 0);
    s.below.hold = false;
    below_release_all(&s.below, 0);
    below_wait_stored(&s.below, LOST + 1);
    check_all_stored(&s);
    move_free(&m);
    stack_close(&s);
    assert_int_equal(count_files(*state), 0);
}

/* What could not be written down is left to those who stay, and to those who come. */
static void what_failed_is_tried_by_the_next(void **state)
{
    struct stack a, b;
    stack_open(&a, *state, &shape, NULL);
    a.below.fail_with = -ENOSPC;
    assert_int_equal(run_move(&a, true, 0, LOST), -ENOSPC);
    stack_open(&b, *state, &shape, NULL);
    assert_int_equal(run_move(&b, true, 100, 1),
                     0); /* it has looked for what was left: nothing yet */
    stack_close(&a);
    assert_int_equal(b.below.writes, 1);
    stack_open(&a, *state, &shape, NULL);
    below_wait_stored(&a.below, LOST); /* nobody asked for it */
    check_all_stored(&a);
    stack_close(&a);
    stack_close(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(successors_write_down_what_was_left, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_survivor_writes_it_down_when_it_leaves, make_dir,
                                        remove_dir),
        cmocka_unit_test_setup_teardown(what_was_left_holds_nobody_up, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(what_failed_is_tried_by_the_next, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(the_living_go_on, make_dir, remove_dir),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

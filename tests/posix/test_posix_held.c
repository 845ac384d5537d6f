/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Storage that takes its time, or never answers: what is held up is only what it holds.
 */
#include "peer.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fault.h"
#include "store/posix.h"

static const struct shape shape = {4096, 2, 0};

/* From now on these hang, of that engine or of all (0); what hung goes on. */
static void hang(unsigned kinds, unsigned engine)
{
    struct fault_plan plan = {.kinds = kinds, .way = FAULT_WAY_HANG, .one_in = 1, .engine = engine};
    fault_plan(&plan, 1, 1);
}

static void nothing_hangs(void)
{
    fault_plan(NULL, 0, 0);
}

static struct ucmi_posix *backend_of(const ucm_store *store)
{
    return ((const struct ucmi_backends *)store->tiers[0].priv)->v[0];
}

/* ---- tasks that are held up ---- */

enum { N = 8 };
static ucm_key keys[N];
static uint32_t blocks[N];

static ucm_task *submit(ucm_store *store, struct memory *m, bool dump, uint64_t first)
{
    ucm_task *task = NULL;
    for (uint32_t i = 0; i < m->n; i++) {
        keys[i] = key_of(first + i);
        blocks[i] = i;
        if (dump)
            paint(m, i, first + i);
    }
    struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = m->n};
    assert_int_equal((dump ? ucm_dump : ucm_load)(store, m->map, &batch, &task), 0);
    return task;
}

/* A load is under way from the lane of a process that dies, and the lane becomes ours under it. */
static void a_lane_adopted_under_a_load(void **state)
{
    struct peer peer = peer_start(*state, &shape, NULL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, N), 0);
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m, other;
    memory_new(&m, store, &shape, N);
    memory_new(&other, store, &shape, N);
    assert_int_equal(count_found(store, 0, N), N);
    hang(FAULT_READ, 0);
    ucm_task *load = submit(store, &m, false, 0);
    fault_await_hanging(N);
    peer_kill(&peer);
    dump_all(store, &other, 100);
    assert_int_equal((int)metric(store, "disk_lanes_adopted_total"), 1);
    nothing_hangs();
    assert_int_equal(ucm_task_wait(load, UCM_RELEASED, 60000), 0);
    for (uint64_t i = 0; i < N; i++)
        assert_true(painted(&m, i, i));
    ucm_task_free(load);
    load_all(store, &m, 0);
    load_all(store, &m, 100);
    memory_free(&other);
    memory_free(&m);
    ucm_store_close(store);
}

/* The same, but what is read is damaged: a block of ours that has the slot by now stays. */
static void damage_found_after_an_adoption(void **state)
{
    struct peer peer = peer_start(*state, &shape, NULL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 1), 0);
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    char path[512];
    memory_new(&m, store, &shape, 1);
    assert_int_equal(count_found(store, 0, 1), 1);
    lane_path(*state, "seg-000000", path, sizeof path);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pwrite(fd, "?", 1, 4096 + 17), 1);
    close(fd);
    hang(FAULT_READ, 0);
    ucm_task *load = submit(store, &m, false, 0);
    fault_await_hanging(1);
    peer_kill(&peer);
    struct memory other;
    memory_new(&other, store, &shape, 1);
    dump_all(store, &other, 100);
    assert_int_equal((int)metric(store, "disk_lanes_adopted_total"), 1);
    nothing_hangs();
    assert_int_equal(ucm_task_wait(load, UCM_RELEASED, 60000), -EBADMSG);
    ucm_task_free(load);
    assert_int_equal(count_found(store, 0, 1), 0); /* ours to drop by now */
    load_all(store, &other, 100);
    memory_free(&other);
    memory_free(&m);
    ucm_store_close(store);
}

/* A lane is lost while blocks of it are read, and other loads of it follow without a pause: it is
 * let go all the same, and taken again. */
static void a_lost_lane_is_let_go_under_loads(void **state)
{
    enum { FIRST = 6, DEPTH = 8 };
    ucm_store *store = open_store(*state, &shape, "posix_io_depth=8");
    struct memory m, first, second, one;
    memory_new(&m, store, &shape, N);
    memory_new(&first, store, &shape, FIRST);
    memory_new(&second, store, &shape, FIRST);
    memory_new(&one, store, &shape, 1);
    dump_all(store, &m, 0);
    paint(&one, 0, 100);
    struct fault_plan plans[] = {
        {.kinds = FAULT_READ, .way = FAULT_WAY_HANG, .one_in = 1},
        {.kinds = FAULT_WRITE, .at = 2}}; /* the journal's, after a block's */
    fault_plan(plans, 2, 1);
    ucm_task *loads[2] = {submit(store, &first, false, 0)};
    fault_await_hanging(FIRST);
    struct outcome out = move(store, &one, true, 100, 0, 0);
    assert_int_not_equal(out.stored, 0);
    free(out.status);
    loads[1] = submit(store, &second, false, 0); /* two of them begin at once */
    fault_await_hanging(DEPTH);
    fault_release();
    fault_await_hanging(FIRST - 2);
    assert_int_equal(ucm_task_wait(loads[0], UCM_RELEASED, 60000), 0);
    do {
        out = move(store, &one, true, 100, 0, 0);
        free(out.status);
    } while (out.stored);
    assert_int_equal(ucm_task_done(loads[1], UCM_RELEASED), 0);
    assert_int_equal(count_lanes(*state), 1);
    nothing_hangs();
    assert_int_equal(ucm_task_wait(loads[1], UCM_RELEASED, 60000), 0);
    for (uint64_t i = 0; i < FIRST; i++)
        assert_true(painted(&first, i, i) && painted(&second, i, i));
    for (unsigned i = 0; i < 2; i++)
        ucm_task_free(loads[i]);
    load_all(store, &m, 0);
    load_all(store, &one, 100);
    memory_free(&one);
    memory_free(&second);
    memory_free(&first);
    memory_free(&m);
    ucm_store_close(store);
}

/* What is damaged in a lane that was lost, and cannot be let go yet, is read once and then a miss.
 */
static void damage_in_a_lost_lane_is_a_miss(void **state)
{
    enum { BAD = N - 1, SLOT = 4096 + 2 * 4096 };
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m, held, one;
    char path[512];
    memory_new(&m, store, &shape, N);
    memory_new(&held, store, &shape, 1);
    memory_new(&one, store, &shape, 1);
    dump_all(store, &m, 0);
    lane_path(*state, "seg-000000", path, sizeof path);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pwrite(fd, "?", 1, BAD * SLOT + 4096 + 17), 1);
    close(fd);
    struct fault_plan plans[] = {
        {.kinds = FAULT_READ, .way = FAULT_WAY_HANG, .at = 1},
        {.kinds = FAULT_WRITE, .at = 2}}; /* the journal's, after a block's */
    fault_plan(plans, 2, 1);
    ucm_task *load = submit(store, &held, false, 0);
    fault_await_hanging(1);
    paint(&one, 0, 100);
    struct outcome out = move(store, &one, true, 100, 0, 0);
    assert_int_not_equal(out.stored, 0);
    free(out.status);
    out = move(store, &one, false, BAD, 0, 0);
    assert_int_equal(out.released, -ENOENT);
    free(out.status);
    assert_int_equal(fault_seen(FAULT_READ), 2);
    const struct ucmi_posix *p = backend_of(store);
    assert_int_equal(p->own[0]->own->leaving, 0); /* it is not ours to change */
    nothing_hangs();
    assert_int_equal(ucm_task_wait(load, UCM_RELEASED, 60000), 0);
    ucm_task_free(load);
    memory_free(&one);
    memory_free(&held);
    memory_free(&m);
    ucm_store_close(store);
}

/* What a segment that is given up holds need not be written down for its room to be there. */
static void a_segment_is_given_up_without_room_for_records(void **state)
{
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=1");
    struct memory m;
    memory_new(&m, store, &shape, N);
    for (uint64_t i = 0; i < 30; i++)
        dump_all(store, &m, i * N);
    memory_free(&m);
    ucm_store_close(store);
    uint64_t before = disk_usage(*state);
    store = open_store(*state, &shape, "posix_capacity_gb=0.0015 posix_segment_mb=1");
    memory_new(&m, store, &shape, 1);
    paint(&m, 0, 1000);
    struct fault_plan full = {.kinds = FAULT_WRITE,
                              .at = 3, /* after those that take the lane */
                              .err = -ENOSPC};
    fault_plan(&full, 1, 1);
    struct outcome out = move(store, &m, true, 1000, 0, 0);
    free(out.status);
    assert_true(fault_seen(FAULT_WRITE) >= 3);
    assert_true(disk_usage(*state) + (1 << 19) < before);
    nothing_hangs();
    do {
        out = move(store, &m, true, 1000, 0, 0);
        free(out.status);
    } while (out.stored);
    assert_true((double)disk_usage(*state) <= 0.0015 * (1 << 30));
    load_all(store, &m, 1000);
    memory_free(&m);
    ucm_store_close(store);
}

/* One I/O that never comes back does not keep a store from being closed; when it does come back at
 * last, all is freed (which the sanitizers' builds see). */
static void closing_does_not_wait_for_ever(void **state)
{
    ucm_store *store = open_store(*state, &shape, "timeout_ms=200");
    struct memory m;
    memory_new(&m, store, &shape, 1);
    hang(FAULT_WRITE, 0);
    ucm_task *dump = submit(store, &m, true, 0);
    fault_await_hanging(1);
    unsigned before = fault_closed();
    ucm_store_close(store);
    assert_int_equal(fault_closed(), before); /* not all of it, then */
    assert_int_equal(ucm_task_done(dump, UCM_RELEASED), 0);
    nothing_hangs(); /* kept, with what the I/O needs */
    assert_int_equal(ucm_task_wait(dump, UCM_STORED, 60000), 0);
    ucm_task_free(dump);
    memory_free(&m);
    fault_await_closed(before + 1);
}

/* What is handed over while the pump is in a call that outlasts the store's closing ends all the
 * same, as soon as the pump comes out of it. */
static void what_came_before_the_closing_ends(void **state)
{
    ucm_store *store = open_store(*state, &shape, "timeout_ms=200 posix_stall_ms=60000");
    ucm_store *other = open_store(*state, &shape, NULL);
    struct memory theirs, m;
    memory_new(&theirs, other, &shape, 1);
    memory_new(&m, store, &shape, 1);
    dump_all(other, &theirs, 0); /* a lane: there is something to look at */
    memory_free(&theirs);
    ucm_store_close(other);
    hang(FAULT_FILES, 0);
    ucm_task *absent = submit(store, &m, false, 50);
    fault_await_hanging(1);
    ucm_task *dump = submit(store, &m, true, 0);
    unsigned before = fault_closed();
    ucm_store_close(store);
    assert_int_equal(fault_closed(), before);
    nothing_hangs();
    fault_await_closed(before + 1);
    assert_true(ucm_task_done(absent, UCM_RELEASED));
    assert_true(ucm_task_done(dump, UCM_STORED));
    ucm_task_free(absent);
    ucm_task_free(dump);
    memory_free(&m);
}

/* Closing an inotify instance takes so long, as it does where the kernel is busy. */
static _Atomic unsigned inotify_close_us;
int __real_close(int fd);
int __wrap_close(int fd);
int __wrap_close(int fd)
{
    char path[64], what[64] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (inotify_close_us && readlink(path, what, sizeof what - 1) > 0 && strstr(what, "inotify"))
        usleep(inotify_close_us);
    return __real_close(fd);
}

/* That is not storage that hangs: the store is closed, and its lane anybody's, when it says so. */
static void a_busy_kernel_is_no_storage_that_hangs(void **state)
{
    ucm_store *store = open_store(*state, &shape, "timeout_ms=200");
    struct memory m;
    memory_new(&m, store, &shape, 1);
    dump_all(store, &m, 0);
    memory_free(&m);
    unsigned before = fault_closed();
    inotify_close_us = 1500000; /* longer than what hangs is waited for */
    ucm_store_close(store);
    inotify_close_us = 0;
    assert_int_equal(fault_closed(), before + 1);
}

static void await_stall(ucm_store *store, bool stalled)
{
    const struct ucmi_posix *p = backend_of(store);
    do
        count_found(store, 60, 1); /* callers find out */
    while (atomic_load(&p->stalled) != stalled);
    assert_int_equal((int)metric(store, "disk_stalled"), stalled);
}

/* Nothing comes back for posix_stall_ms: lookups miss, loads and dumps are refused at once.  When
 * something does the tier is used again. */
static void storage_that_hangs_is_passed_by(void **state)
{
    ucm_store *store = open_store(*state, &shape, "posix_stall_ms=1000");
    struct memory m;
    memory_new(&m, store, &shape, 1);
    dump_all(store, &m, 0);
    hang(FAULT_READ, 0);
    ucm_task *load = submit(store, &m, false, 0), *refused = NULL;
    await_stall(store, true);
    assert_int_equal(count_found(store, 0, 1), 0); /* what it has is of no use now */
    struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = 1};
    assert_int_equal(ucm_load(store, m.map, &batch, &refused), -EIO);
    assert_int_equal(ucm_dump(store, m.map, &batch, &refused), -EIO);
    nothing_hangs();
    assert_int_equal(ucm_task_wait(load, UCM_RELEASED, 60000), 0);
    ucm_task_free(load);
    await_stall(store, false);
    load_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
}

/* A load that is in more of a hurry than the one before it is given up at its own time. */
static void a_load_is_given_up_when_its_batch_says(void **state)
{
    ucm_store *store = open_store(*state, &shape, "posix_io_depth=1");
    struct memory m;
    memory_new(&m, store, &shape, N);
    dump_all(store, &m, 0);
    hang(FAULT_READ, 0);
    ucm_task *patient = submit(store, &m, false, 0), *hasty = NULL;
    struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = N, .timeout_ms = 10};
    fault_await_hanging(1);
    assert_int_equal(ucm_load(store, m.map, &batch, &hasty), 0);
    assert_int_equal(ucm_task_wait(hasty, UCM_RELEASED, 20000), -ETIMEDOUT);
    assert_true(ucm_task_done(hasty, UCM_RELEASED));
    assert_false(ucm_task_done(patient, UCM_RELEASED));
    nothing_hangs();
    assert_int_equal(ucm_task_wait(patient, UCM_RELEASED, 60000), 0);
    ucm_task_free(hasty);
    ucm_task_free(patient);
    load_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
}

/* The server of the only backend is away when the store is opened: misses until it is back. */
static void storage_that_hangs_at_the_start_is_used_when_it_answers(void **state)
{
    hang(FAULT_FILES, 0);
    ucm_store *store = open_store(*state, &shape, "posix_stall_ms=1000");
    struct memory m;
    memory_new(&m, store, &shape, N);
    ucm_task *refused = NULL;
    uint32_t block = 0;
    ucm_key key = key_of(0);
    struct ucm_batch batch = {.keys = &key, .blocks = &block, .n = 1};
    assert_int_equal(count_found(store, 0, N), 0);
    assert_int_equal(ucm_dump(store, m.map, &batch, &refused), -EIO);
    nothing_hangs();
    while (!ucmi_posix_usable((struct ucmi_posix *)backend_of(store)))
        ;
    dump_all(store, &m, 0);
    load_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
}

/* A call that hangs holds the whole pump: one lookup waits for its news in vain, and no other. */
static void only_one_waits_for_a_pump_that_hangs(void **state)
{
    ucm_store *store = open_store(*state, &shape, "lookup_timeout_ms=500");
    const struct ucmi_posix *p = backend_of(store);
    struct peer peer = peer_start(*state, &shape, NULL); /* so that there may be news */
    struct memory m;
    memory_new(&m, store, &shape, 1);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 1), 0);
    assert_int_equal(count_found(store, 0, 1), 1);
    hang(FAULT_FILES, 0);
    ucm_task *dump = submit(store, &m, true, 50); /* makes a lane */
    fault_await_hanging(1);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 1, 1), 0);
    assert_int_equal(count_found(store, 1, 1), 0);
    assert_true(p->news_late);
    assert_int_equal(count_found(store, 0, 2), 1);
    nothing_hangs();
    assert_int_equal(ucm_task_wait(dump, UCM_STORED, 60000), 0);
    ucm_task_free(dump);
    while (count_found(store, 0, 2) < 2)
        ;
    assert_false(p->news_late);
    peer_end(&peer);
    memory_free(&m);
    ucm_store_close(store);
}

/* One of two hangs: what is in the other is loaded, and all dumps go there. */
static void one_backend_hangs_and_the_other_serves(void **state)
{
    char a[256], b[256], both[512];
    snprintf(a, sizeof a, "%s/a", (char *)*state);
    snprintf(b, sizeof b, "%s/b", (char *)*state);
    snprintf(both, sizeof both, "%s:%s", a, b);
    mkdir(a, 0700);
    mkdir(b, 0700);
    unsigned first = fault_opened() + 1;
    ucm_store *store = open_store(both, &shape, "posix_stall_ms=1000");
    const struct ucmi_backends *tier = store->tiers[0].priv;
    struct memory m, some;
    memory_new(&m, store, &shape, N);
    memory_new(&some, store, &shape, 100);
    dump_all(store, &some, 0);
    hang(FAULT_READ | FAULT_WRITE, first);
    ucm_task *load = submit(store, &m, false, 0); /* some of them are in a */
    fault_await_hanging(1);
    do
        count_found(store, 1000, 1);
    while (!atomic_load(&tier->v[0]->stalled));
    assert_int_equal((int)metric(store, "disk_stalled"), 1);
    size_t there = count_found(store, 0, 100);
    assert_in_range(there, 20, 80);
    struct outcome out = move(store, &some, false, 0, 0, 0);
    for (uint64_t i = 0; i < 100; i++)
        there -= out.status[i] == 0 && painted(&some, i, i);
    assert_int_equal(there, 0);
    free(out.status);
    dump_all(store, &some, 200);
    load_all(store, &some, 200);
    nothing_hangs();
    assert_int_equal(ucm_task_wait(load, UCM_RELEASED, 60000), 0);
    ucm_task_free(load);
    while (count_found(store, 0, 100) < 100)
        ;
    load_all(store, &some, 0);
    memory_free(&some);
    memory_free(&m);
    ucm_store_close(store);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(int argc, char **argv)
{
    if (argc > 1)
        return peer_main(argc, argv);
    const struct CMUnitTest tests[] = {
        TEST(a_lane_adopted_under_a_load),
        TEST(damage_found_after_an_adoption),
        TEST(a_lost_lane_is_let_go_under_loads),
        TEST(damage_in_a_lost_lane_is_a_miss),
        TEST(a_segment_is_given_up_without_room_for_records),
        TEST(closing_does_not_wait_for_ever),
        TEST(what_came_before_the_closing_ends),
        TEST(a_busy_kernel_is_no_storage_that_hangs),
        TEST(storage_that_hangs_is_passed_by),
        TEST(storage_that_hangs_at_the_start_is_used_when_it_answers),
        TEST(a_load_is_given_up_when_its_batch_says),
        TEST(only_one_waits_for_a_pump_that_hangs),
        TEST(one_backend_hangs_and_the_other_serves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

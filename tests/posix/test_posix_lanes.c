/* SPDX-License-Identifier: Apache-2.0 */
/* Lanes: who may write one, who takes one over, and that everybody sees what is in it. */
#include "peer.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/posix.h"

static const struct shape shape = {4096, 2, 0};

static void looking_up_takes_no_lane(void **state)
{
    ucm_store *store = open_store(*state, &shape, NULL);
    assert_int_equal(count_found(store, 0, 100), 0);
    ucm_store_close(store);
    assert_int_equal(count_lanes(*state), 0);
}

static void two_processes_see_each_others_blocks(void **state)
{
    struct peer peer = peer_start(*state, &shape, NULL);
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 10);
    for (uint64_t i = 0; i < 50; i++) {
        dump_all(store, &m, 20 * i);
        assert_int_equal(peer_do(&peer, PEER_FOUND, 20 * i, 10), 10);
        assert_int_equal(peer_do(&peer, PEER_LOAD, 20 * i, 10), 10);
        assert_int_equal(peer_do(&peer, PEER_DUMP, 20 * i + 10, 10), 0);
        load_all(store, &m, 20 * i + 10); /* without a lookup first */
        assert_int_equal(count_found(store, 0, 20 * (i + 1)), 20 * (i + 1));
    }
    assert_int_equal(count_lanes(*state), 2);
    peer_end(&peer);
    memory_free(&m);
    ucm_store_close(store);
}

static void a_dead_lane_is_taken_over(void **state)
{
    struct peer peer = peer_start(*state, &shape, NULL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 30), 0);
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 30);
    peer_kill(&peer);
    assert_int_equal(count_found(store, 0, 30), 30);
    assert_int_equal((int)metric(store, "disk_lanes_adopted_total"),
                     0); /* not before it is needed */
    dump_all(store, &m, 30);
    assert_int_equal((int)metric(store, "disk_lanes_adopted_total"), 1);
    load_all(store, &m, 0);
    load_all(store, &m, 30);
    assert_int_equal(count_lanes(*state), 1);
    memory_free(&m);
    ucm_store_close(store);
}

/* Four at once, four times: as many lanes as there have been processes at a time, no block lost. */
static void processes_that_start_at_once_get_a_lane_each(void **state)
{
    struct peer peers[4];
    for (uint64_t round = 0; round < 4; round++) {
        for (int i = 0; i < 4; i++)
            peers[i] = peer_start(*state, &shape, NULL);
        for (uint64_t i = 0; i < 4; i++)
            peer_ask(&peers[i], PEER_DUMP, 100 * round + 10 * i, 10);
        for (int i = 0; i < 4; i++)
            assert_int_equal(peer_answer(&peers[i]), 0);
        for (int i = 0; i < 4; i++)
            for (uint64_t r = 0; r <= round; r++)
                assert_int_equal(peer_do(&peers[i], PEER_LOAD, 100 * r, 40), 40);
        assert_int_equal(count_lanes(*state), 4);
        for (int i = 0; i < 4; i++)
            peer_kill(&peers[i]);
    }
}

/* The lane's journal is rewritten again and again, while another store follows it step by step. */
static void followers_follow_through_compactions(void **state)
{
    const char *options = "posix_capacity_gb=0.003"; /* some 300 blocks */
    ucm_store *store = open_store(*state, &shape, options);
    ucm_store *close_by = open_store(*state, &shape, options), *far = NULL;
    struct memory m;
    memory_new(&m, store, &shape, 1);
    for (uint64_t i = 0; i < 6000; i++) {
        dump_all(store, &m, i);
        assert_int_equal(count_found(close_by, i, 1), 1);
        if (i % 2500 == 0) { /* looks once in many generations */
            if (!far)
                far = open_store(*state, &shape, options);
            assert_int_equal(count_found(far, i, 1), 1);
        }
    }
    assert_true(metric(store, "disk_compacted_total") >= 3);
    size_t there = count_found(store, 0, 6000);
    assert_true(there > 100 && there < 1000);
    assert_int_equal(count_found(close_by, 0, 6000), there);
    assert_int_equal((int)metric(close_by, "disk_blocks"), there);
    count_found(far, 6000, 1); /* what it had is told from what it missed: a miss has it read */
    assert_int_equal(count_found(far, 0, 6000), there);
    assert_int_equal((int)metric(far, "disk_blocks"), there);
    ucm_store_close(far);
    ucm_store_close(close_by);
    memory_free(&m);
    ucm_store_close(store);
    store = open_store(*state, &shape, options);
    assert_int_equal(count_found(store, 0, 6000), there);
    ucm_store_close(store);
}

static void keep_most(void *arg, const struct ucm_lane_info *lane)
{
    enum { COMMIT = 128 }; /* records that were on their way when it was time */
    assert_true(lane->records <= 2 * lane->blocks + UCMI_COMPACT_SLACK + COMMIT);
    *(uint64_t *)arg = MAX(*(uint64_t *)arg, lane->records);
}

/* Who opens a store reads all of its journals: they are no longer than what is in them asks for. */
static void a_journal_is_at_most_twice_what_it_says(void **state)
{
    ucm_store *store = open_store(*state, &shape, "posix_capacity_gb=0.02"); /* some 1500 blocks */
    uint64_t most = 0, compacted = 0;
    struct memory m;
    memory_new(&m, store, &shape, 20);
    for (uint64_t i = 0; compacted < 2; i += 20) {
        dump_all(store, &m, i);
        compacted = (uint64_t)metric(store, "disk_compacted_total");
        assert_int_equal(
            ucm_inspect(*state, &(struct ucm_inspect){.arg = &most, .lane = keep_most}), 0);
    }
    assert_true(most > 3000); /* compacted when it is time, not all the time */
    memory_free(&m);
    ucm_store_close(store);
}

/* ---- changes made behind the stores' backs ---- */

static int open_journal(const char *dir, struct ucmi_journal_header *h)
{
    char path[512];
    lane_path(dir, "journal", path, sizeof path);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(ucmi_journal_header_read(fd, h), 0);
    return fd;
}

static void close_journal(int fd, struct ucmi_journal_header *h)
{
    ucmi_journal_header_seal(h);
    assert_int_equal(pwrite(fd, h, sizeof *h, 0), sizeof *h);
    close(fd);
}

static void keep_last(void *arg, const struct ucmi_record *r)
{
    *(struct ucmi_record *)arg = *r;
}

/* The owner died between MOVED and the rename: the file ends with MOVED and is still the journal.
 */
static void moved_without_a_rename_is_no_end(void **state)
{
    ucm_store *store = open_store(*state, &shape, NULL);
    ucm_store *follower = open_store(*state, &shape, NULL),
              *late = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 10);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    assert_int_equal(count_found(follower, 0, 10), 10);
    assert_int_equal(count_found(late, 0, 10), 10);

    struct ucmi_journal_header h;
    struct ucmi_record last;
    bool moved = false;
    void *buf = aligned_alloc(UCMI_PAGE, UCMI_PAGE);
    int fd = open_journal(*state, &h);
    struct ucmi_jpos pos = ucmi_jpos_first(&h);
    assert_int_equal(
        ucmi_journal_read(&ucmi_plain, fd, buf, UCMI_PAGE, &pos, &moved, keep_last, &last), 0);
    last.op = UCMI_MOVED;
    last.seq++;
    ucmi_record_seal(&ucmi_plain, &last);
    assert_int_equal(pwrite(fd, &last, sizeof last, (off_t)pos.off), sizeof last);
    close(fd);
    free(buf);
    assert_int_equal(count_found(follower, 0, 11), 10);

    for (uint64_t round = 1; round < 3; round++) { /* what comes behind MOVED is replayed as well */
        store = open_store(*state, &shape, NULL);
        memory_new(&m, store, &shape, 10);
        dump_all(store, &m, 10 * round);
        assert_int_equal(count_found(follower, 0, 10 * (round + 1)), 10 * (round + 1));
        for (uint64_t i = 0; i <= round; i++)
            load_all(store, &m, 10 * i);
        memory_free(&m);
        ucm_store_close(store);
    }
    assert_int_equal(count_lanes(*state), 1);
    assert_int_equal(count_found(late, 0, 30), 30); /* at once */
    ucm_store_close(late);
    ucm_store_close(follower);
}

/* Dumps until one is stored: after it has lost a lane, a store waits a moment before the next. */
static void dump_until_stored(ucm_store *store, struct memory *m, uint64_t first)
{
    for (;;) {
        for (size_t i = 0; i < m->n; i++)
            paint(m, i, first + i);
        struct outcome out = move(store, m, true, first, 0, 0);
        free(out.status);
        if (!out.stored)
            return;
    }
}

static void who_finds_a_higher_epoch_lets_go(void **state)
{
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 0);
    struct ucmi_journal_header h;
    int fd = open_journal(*state, &h);
    h.epoch++;
    h.owner++;
    close_journal(fd, &h);
    struct outcome out = move(store, &m, true, 4, 0, 0);
    assert_true(out.stored < 0);
    free(out.status);
    assert_int_equal((int)metric(store, "disk_lanes_lost_total"), 1);
    dump_until_stored(store, &m, 8);
    load_all(store, &m, 0);
    load_all(store, &m, 8);
    memory_free(&m);
    ucm_store_close(store);
}

static void a_removed_directory_costs_its_blocks_only(void **state)
{
    char path[512];
    ucm_store *store = open_store(*state, &shape, NULL), *other = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 0);
    assert_int_equal(count_found(other, 0, 4), 4);
    snprintf(path, sizeof path, "%s/ucm", (char *)*state);
    remove_tree(path);
    assert_int_equal(count_found(other, 9, 1), 0); /* a miss is what makes it look */
    assert_int_equal(count_found(other, 0, 4), 0);
    dump_until_stored(store, &m, 4);
    load_all(store, &m, 4);
    assert_int_equal(count_found(other, 4, 4), 4);
    assert_int_equal(count_lanes(*state), 1);
    memory_free(&m);
    ucm_store_close(other);
    ucm_store_close(store);
}

static void a_damaged_journal_header_costs_the_lane_only(void **state)
{
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    struct ucmi_journal_header h;
    int fd = open_journal(*state, &h);
    h.generation ^= 1;
    assert_int_equal(pwrite(fd, &h, sizeof h, 0), sizeof h);
    close(fd);
    store = open_store(*state, &shape, NULL);
    memory_new(&m, store, &shape, 4);
    assert_int_equal(count_found(store, 0, 4), 0);
    dump_all(store, &m, 0);
    load_all(store, &m, 0);
    assert_int_equal(count_lanes(*state), 1);
    memory_free(&m);
    ucm_store_close(store);
}

static void a_lane_of_another_format_is_left_alone(void **state)
{
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    struct ucmi_journal_header h, after;
    int fd = open_journal(*state, &h);
    h.format++;
    assert_int_equal(pwrite(fd, &h, sizeof h, 0), sizeof h);
    store = open_store(*state, &shape, NULL);
    memory_new(&m, store, &shape, 4);
    assert_int_equal(count_found(store, 0, 4), 0);
    dump_all(store, &m, 0);
    load_all(store, &m, 0);
    assert_int_equal(count_lanes(*state), 2);
    assert_int_equal(pread(fd, &after, sizeof after, 0), sizeof after);
    assert_memory_equal(&h, &after, sizeof h);
    close(fd);
    memory_free(&m);
    ucm_store_close(store);
}

static void grow_old(const char *path)
{
    struct timespec long_ago[2] = {{.tv_sec = time(NULL) - 61}, {.tv_sec = time(NULL) - 61}};
    assert_int_equal(utimensat(AT_FDCWD, path, long_ago, 0), 0);
}

/* Its lock may be one that this node cannot see. */
static void a_lane_of_another_host_is_taken_when_it_is_silent(void **state)
{
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    struct ucmi_journal_header h;
    int fd = open_journal(*state, &h);
    snprintf(h.boot, sizeof h.boot, "another"); /* of the same name: containers often are */
    close_journal(fd, &h);

    store = open_store(*state, &shape, NULL);
    memory_new(&m, store, &shape, 4);
    char path[512];
    lane_path(*state, "journal", path, sizeof path);
    dump_all(store, &m, 4);
    assert_int_equal((int)metric(store, "disk_lanes_adopted_total"), 0);
    assert_int_equal(count_found(store, 0, 8), 8);
    ucm_store *second = open_store(*state, &shape, NULL);
    grow_old(path);
    memory_free(&m);
    memory_new(&m, second, &shape, 4);
    dump_all(second, &m, 8);
    assert_int_equal((int)metric(second, "disk_lanes_adopted_total"), 1);
    assert_int_equal(count_lanes(*state), 2);
    memory_free(&m);
    ucm_store_close(second);
    ucm_store_close(store);
}

/* Where all is still, callers look at times of change only, and ask nobody; until one changes. */
static void news_from_a_still_lane_is_noticed(void **state)
{
    char path[512];
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    lane_path(*state, "journal", path, sizeof path);
    grow_old(path);
    lane_path(*state, "..", path, sizeof path);
    grow_old(path);

    ucm_store *reader = open_store(*state, &shape, NULL);
    const struct ucmi_posix *p = ((struct ucmi_backends *)reader->tiers[0].priv)->v[0];
    assert_int_equal(count_found(reader, 4, 1), 0);
    uint64_t asked = p->news_asked;
    assert_int_equal(count_found(reader, 4, 1), 0);
    assert_int_equal(count_found(reader, 0, 5), 4);
    assert_int_equal(p->news_asked, asked);

    store = open_store(*state, &shape, NULL);
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 4); /* in the same lane */
    assert_int_equal(count_found(reader, 0, 8), 8);
    ucm_store *third = open_store(*state, &shape, NULL);
    memory_free(&m);
    memory_new(&m, third, &shape, 4);
    dump_all(third, &m, 8); /* in a new one */
    assert_int_equal(count_lanes(*state), 2);
    assert_int_equal(count_found(reader, 0, 12), 12);
    memory_free(&m);
    ucm_store_close(third);
    ucm_store_close(store);
    ucm_store_close(reader);
}

/* Who only dumps hears nothing of what others evict: what it takes to be there may be gone. */
static void a_block_that_others_evicted_is_stored_again(void **state)
{
    const char *options = "posix_capacity_gb=0.0015"; /* some 100 blocks */
    ucm_store *store = open_store(*state, &shape, options);
    ucm_store *other = open_store(*state, &shape, options), *third;
    struct memory m, n;
    memory_new(&m, store, &shape, 4);
    memory_new(&n, other, &shape, 4);
    dump_all(store, &m, 0);
    load_all(other, &n, 0); /* has read of them */
    for (uint64_t i = 4; i < 400; i += 4)
        dump_all(store, &m, i);
    memory_free(&m);
    ucm_store_close(store); /* room for the other */
    for (size_t i = 0; i < 4; i++)
        paint(&n, i, i);
    free(move(other, &n, true, 0, 0, 0).status);
    third = open_store(*state, &shape, options);
    assert_int_equal(count_found(third, 0, 4), 4);
    ucm_store_close(third);
    memory_free(&n);
    ucm_store_close(other);
}

/* Without a descriptor to spare the directory cannot be read, which says nothing about what is in
 * it. */
static void running_out_of_descriptors_forgets_nothing(void **state)
{
    char path[512];
    struct rlimit before, none = {.rlim_cur = 0};
    ucm_store *store = open_store(*state, &shape, NULL), *reader = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, 4);
    dump_all(store, &m, 0);
    assert_int_equal(count_found(reader, 0, 4), 4);
    lane_path(*state, "../stranger", path, sizeof path);
    assert_int_equal(mkdir(path, 0700), 0); /* so that it is read again */
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    none.rlim_max = before.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    count_found(reader, 4, 1); /* a miss has it read */
    size_t found = count_found(reader, 0, 4);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(found, 4);
    ucm_store *second = open_store(*state, &shape, NULL);
    memory_free(&m);
    memory_new(&m, second, &shape, 4);
    dump_all(second, &m, 4); /* in a new lane */
    assert_int_equal(count_found(reader, 0, 8), 8);
    memory_free(&m);
    ucm_store_close(second);
    ucm_store_close(reader);
    ucm_store_close(store);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(int argc, char **argv)
{
    if (argc > 1)
        return peer_main(argc, argv);
    const struct CMUnitTest tests[] = {
        TEST(looking_up_takes_no_lane),
        TEST(two_processes_see_each_others_blocks),
        TEST(a_dead_lane_is_taken_over),
        TEST(processes_that_start_at_once_get_a_lane_each),
        TEST(followers_follow_through_compactions),
        TEST(a_journal_is_at_most_twice_what_it_says),
        TEST(moved_without_a_rename_is_no_end),
        TEST(who_finds_a_higher_epoch_lets_go),
        TEST(a_removed_directory_costs_its_blocks_only),
        TEST(a_damaged_journal_header_costs_the_lane_only),
        TEST(a_lane_of_another_format_is_left_alone),
        TEST(a_lane_of_another_host_is_taken_when_it_is_silent),
        TEST(news_from_a_still_lane_is_noticed),
        TEST(a_block_that_others_evicted_is_stored_again),
        TEST(running_out_of_descriptors_forgets_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

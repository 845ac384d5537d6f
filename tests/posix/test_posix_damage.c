/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Damage on disk: whatever is done to a slot, its block is a miss, is counted and dropped, and can
 * be stored again; the others are not touched.  Each kind is met twice: in a lane that belongs to
 * nobody and in one of our own.
 */
#include "harness.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/format.h"

enum { BLOCKS = 6, SHARDS = 3, SHARD = 4096, SLOT = UCMI_PAGE + SHARDS * SHARD };

static const struct shape shape = {SHARD, SHARDS, 0};

static int open_segment(const char *dir)
{
    char path[512];
    lane_path(dir, "seg-000000", path, sizeof path);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_true(fd >= 0);
    return fd;
}

static void flip(int fd, off_t at)
{
    uint8_t byte;
    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= 0x10;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
}

static void copy_slot(int fd, unsigned from, unsigned to)
{
    uint8_t buf[SLOT];
    assert_int_equal(pread(fd, buf, SLOT, from * SLOT), SLOT);
    assert_int_equal(pwrite(fd, buf, SLOT, to * SLOT), SLOT);
}

/* Of six blocks in slots 0 to 5 (keys 0 to 5), damages block 2; others are named in `also`. */
static void flip_header_key(int fd)
{
    flip(fd, 2 * SLOT + offsetof(struct ucmi_slot_header, key));
}
static void flip_header_sum(int fd)
{
    flip(fd, 2 * SLOT + offsetof(struct ucmi_slot_header, sum));
}
static void flip_header_magic(int fd)
{
    flip(fd, 2 * SLOT);
}
static void flip_shard_0(int fd)
{
    flip(fd, 2 * SLOT + UCMI_PAGE);
}
static void flip_shard_1(int fd)
{
    flip(fd, 2 * SLOT + UCMI_PAGE + SHARD + 77);
}
static void flip_last_byte(int fd)
{
    flip(fd, 3 * SLOT - 1);
}
static void zero_slot(int fd)
{
    uint8_t zeros[SLOT] = {0};
    assert_int_equal(pwrite(fd, zeros, SLOT, 2 * SLOT), SLOT);
}
static void another_block_lies_there(int fd)
{
    copy_slot(fd, 1, 2); /* whole and valid, but not the one */
}
/* The same key, valid, of another namespace or rank or make: the record knows which header it was.
 */
static void another_make_lies_there(int fd)
{
    struct ucmi_slot_header h;
    assert_int_equal(pread(fd, &h, sizeof h, 2 * SLOT), sizeof h);
    h.depth += 1;
    ucmi_slot_header_seal(&ucmi_plain, &h);
    assert_int_equal(pwrite(fd, &h, sizeof h, 2 * SLOT), sizeof h);
}

static const struct kind {
    const char *name;
    void (*damage)(int fd);
    int foreign, own; /* status in a lane of nobody's, of ours */
} kinds[] = {
    {"flip_header_key", flip_header_key, -EBADMSG, -EBADMSG},
    {"flip_header_sum", flip_header_sum, -EBADMSG, -EBADMSG},
    {"flip_header_magic", flip_header_magic, -EBADMSG, -EBADMSG},
    {"flip_shard_0", flip_shard_0, -EBADMSG, -EBADMSG},
    {"flip_shard_1", flip_shard_1, -EBADMSG, -EBADMSG},
    {"flip_last_byte", flip_last_byte, -EBADMSG, -EBADMSG},
    {"zero_slot", zero_slot, -EBADMSG, -EBADMSG},
    {"another_block", another_block_lies_there, -ENOENT, -EBADMSG},
    {"another_make", another_make_lies_there, -ENOENT, -EBADMSG},
};

/* Damages block 2 of a store that has the lane (own) or does not, and sees what comes of it. */
static void meet(const char *dir, const struct kind *kind, bool own, const char *more)
{
    char options[128];
    snprintf(options, sizeof options, "posix_segment_mb=1 %s", more);
    ucm_store *store = open_store(dir, &shape, options);
    struct memory m;
    memory_new(&m, store, &shape, BLOCKS);
    dump_all(store, &m, 0);
    if (!own) {
        memory_free(&m);
        ucm_store_close(store);
        store = open_store(dir, &shape, options);
        memory_new(&m, store, &shape, BLOCKS);
    }
    int fd = open_segment(dir);
    kind->damage(fd);
    close(fd);
    smear(&m);
    assert_int_equal(count_found(store, 0, BLOCKS), BLOCKS); /* nobody has read it yet */
    struct outcome out = move(store, &m, false, 0, 0, 0);
    int expected = own ? kind->own : kind->foreign;
    for (uint64_t i = 0; i < BLOCKS; i++) {
        if (out.status[i] != (i == 2 ? expected : 0))
            fail_msg("%s, %s: block %d ends with %d", kind->name, own ? "ours" : "nobody's", (int)i,
                     out.status[i]);
        if (i != 2)
            assert_true(painted(&m, i, i));
    }
    free(out.status);
    assert_int_equal((int)metric(store, "disk_bad_total"), expected == -EBADMSG);
    assert_int_equal((int)metric(store, "disk_stale_total"), expected == -ENOENT);
    assert_int_equal(count_found(store, 0, BLOCKS), BLOCKS - 1); /* dropped */
    dump_all(store, &m, 0);
    load_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    store = open_store(dir, &shape, options);
    memory_new(&m, store, &shape, BLOCKS);
    load_all(store, &m, 0); /* for good */
    memory_free(&m);
    ucm_store_close(store);
}

static void damage_is_a_miss(void **state)
{
    for (size_t i = 0; i < ARRAY_LEN(kinds); i++)
        for (int own = 0; own < 2; own++)
            for (int direct = 0; direct < 2; direct++) {
                char path[512], options[64];
                snprintf(path, sizeof path, "%s/ucm", (char *)*state);
                remove_tree(path);
                snprintf(options, sizeof options, "io_direct=%d", direct);
                meet(*state, &kinds[i], own, options);
            }
}

/* Parts of a block are checked by themselves: damage elsewhere in it does not matter to them. */
static void only_what_is_read_is_checked(void **state)
{
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, BLOCKS);
    dump_all(store, &m, 0);
    int fd = open_segment(*state);
    flip_shard_1(fd);
    close(fd);
    for (unsigned shard = 0; shard < SHARDS; shard += 2) {
        struct outcome out = move(store, &m, false, 0, shard, 1);
        assert_int_equal(out.released, 0);
        assert_true(shards_painted(&m, 2, 2, shard, 1));
        free(out.status);
    }
    struct outcome out = move(store, &m, false, 0, 1, 1);
    for (int i = 0; i < BLOCKS; i++)
        assert_int_equal(out.status[i], i == 2 ? -EBADMSG : 0);
    free(out.status);
    memory_free(&m);
    ucm_store_close(store);
}

static void swapped_slots_are_misses(void **state)
{
    for (int own = 0; own < 2; own++) {
        char path[512];
        snprintf(path, sizeof path, "%s/ucm", (char *)*state);
        remove_tree(path);
        ucm_store *store = open_store(*state, &shape, NULL);
        struct memory m;
        memory_new(&m, store, &shape, BLOCKS);
        dump_all(store, &m, 0);
        if (!own) {
            memory_free(&m);
            ucm_store_close(store);
            store = open_store(*state, &shape, NULL);
            memory_new(&m, store, &shape, BLOCKS);
        }
        int fd = open_segment(*state);
        copy_slot(fd, 4, 5);
        copy_slot(fd, 3, 4);
        copy_slot(fd, 5, 3);
        close(fd);
        struct outcome out = move(store, &m, false, 0, 0, 0);
        for (uint64_t i = 0; i < BLOCKS; i++) {
            assert_int_equal(out.status[i], i < 3 ? 0 : own ? -EBADMSG : -ENOENT);
            assert_true(i >= 3 || painted(&m, i, i));
        }
        free(out.status);
        assert_int_equal(count_found(store, 0, BLOCKS), 3);
        memory_free(&m);
        ucm_store_close(store);
    }
}

static void a_truncated_segment_costs_what_is_cut_off(void **state)
{
    for (int own = 0; own < 2; own++) {
        char path[512];
        snprintf(path, sizeof path, "%s/ucm", (char *)*state);
        remove_tree(path);
        ucm_store *store = open_store(*state, &shape, NULL);
        struct memory m;
        memory_new(&m, store, &shape, BLOCKS);
        dump_all(store, &m, 0);
        if (!own) {
            memory_free(&m);
            ucm_store_close(store);
            store = open_store(*state, &shape, NULL);
            memory_new(&m, store, &shape, BLOCKS);
        }
        int fd = open_segment(*state);
        assert_int_equal(ftruncate(fd, 4 * SLOT - 1), 0); /* a byte of block 3, and the rest */
        close(fd);
        struct outcome out = move(store, &m, false, 0, 0, 0);
        for (uint64_t i = 0; i < BLOCKS; i++) {
            assert_int_equal(out.status[i], i < 3 ? 0 : -EBADMSG);
            assert_true(i >= 3 || painted(&m, i, i));
        }
        free(out.status);
        assert_int_equal(count_found(store, 0, BLOCKS), 3);
        dump_all(store, &m, 0);
        load_all(store, &m, 0);
        memory_free(&m);
        ucm_store_close(store);
    }
}

static void a_removed_segment_costs_its_blocks(void **state)
{
    char path[512];
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, BLOCKS);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    lane_path(*state, "seg-000000", path, sizeof path);
    assert_int_equal(unlink(path), 0);
    store = open_store(*state, &shape, NULL);
    memory_new(&m, store, &shape, BLOCKS);
    struct outcome out = move(store, &m, false, 0, 0, 0);
    for (int i = 0; i < BLOCKS; i++)
        assert_int_equal(out.status[i], -ENOENT);
    free(out.status);
    assert_int_equal(count_found(store, 0, BLOCKS), 0);
    dump_all(store, &m, 0);
    load_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
}

/* A record names a slot that has been given to another block since: what a reader of another node
 * meets when it is a little behind. */
static void a_reader_that_is_behind_meets_a_miss(void **state)
{
    const char *options = "posix_capacity_gb=0.0015";
    ucm_store *owner = open_store(*state, &shape, options);
    ucm_store *reader = open_store(*state, &shape, options);
    struct memory m, one;
    memory_new(&m, reader, &shape, BLOCKS);
    memory_new(&one, owner, &shape, 1);
    for (uint64_t i = 0; i < BLOCKS; i++)
        dump_all(owner, &one, i);
    assert_int_equal(count_found(reader, 0, BLOCKS), BLOCKS); /* has read this far */
    uint64_t next = 100;
    while (metric(owner, "disk_evicted_total") < 200)
        dump_all(owner, &one, next++);
    struct outcome out = move(reader, &m, false, 0, 0, 0);
    for (uint64_t i = 0; i < BLOCKS; i++)
        assert_true(out.status[i] == 0 ? painted(&m, i, i) : out.status[i] == -ENOENT);
    assert_true(metric(reader, "disk_stale_total") > 0);
    assert_int_equal((int)metric(reader, "disk_bad_total"), 0);
    free(out.status);
    memory_free(&one);
    memory_free(&m);
    ucm_store_close(reader);
    ucm_store_close(owner);
}

/* It gets its length back within the bound only, whatever its header says that is. */
static void a_truncated_segment_does_not_break_the_bound(void **state)
{
    static struct ucmi_journal_header h __attribute__((aligned(UCMI_PAGE)));
    char path[512];
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=1");
    struct memory m;
    memory_new(&m, store, &shape, BLOCKS);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    lane_path(*state, "journal", path, sizeof path);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pread(fd, &h, sizeof h, 0), sizeof h);
    h.slots = (16 << 20) / SLOT; /* of the segment that is there, 1 MiB long */
    ucmi_journal_header_seal(&h);
    assert_int_equal(pwrite(fd, &h, sizeof h, 0), sizeof h);
    close(fd);
    store = open_store(*state, &shape, "posix_segment_mb=1 posix_capacity_gb=0.004");
    memory_new(&m, store, &shape, BLOCKS);
    free(move(store, &m, true, 100, 0, 0).status); /* takes the lane; there may be no room in it */
    assert_int_equal((int)metric(store, "disk_lanes_adopted_total"), 1);
    assert_int_equal((int)metric(store, "disk_evicted_total"), 0); /* made long, and given up */
    assert_true(disk_usage(*state) <= 4 << 20);
    memory_free(&m);
    ucm_store_close(store);
}

static void count_blocks(void *arg, const struct ucm_lane_info *lane)
{
    *(uint64_t *)arg = lane->blocks;
}

/* A load takes a lane to tell of what it used.  What was found damaged in it before is on record
 * then, without anything more to do. */
static void what_is_dropped_with_a_lane_taken_is_written_at_once(void **state)
{
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    memory_new(&m, store, &shape, BLOCKS);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    int fd = open_segment(*state);
    flip_shard_1(fd);
    close(fd);
    store = open_store(*state, &shape, NULL);
    memory_new(&m, store, &shape, BLOCKS);
    struct outcome out = move(store, &m, false, 0, 0, 0);
    assert_int_equal(out.status[2], -EBADMSG);
    free(out.status);
    uint64_t blocks = BLOCKS, until = ucmi_now_ns() + UINT64_C(60000000000);
    struct ucm_inspect how = {.arg = &blocks, .lane = count_blocks};
    while (blocks != BLOCKS - 1 && ucmi_now_ns() < until) {
        usleep(1000);
        assert_int_equal(ucm_inspect(*state, &how), 0);
    }
    assert_int_equal(blocks, BLOCKS - 1);
    memory_free(&m);
    ucm_store_close(store);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(damage_is_a_miss),
        TEST(only_what_is_read_is_checked),
        TEST(swapped_slots_are_misses),
        TEST(a_truncated_segment_costs_what_is_cut_off),
        TEST(a_truncated_segment_does_not_break_the_bound),
        TEST(a_removed_segment_costs_its_blocks),
        TEST(what_is_dropped_with_a_lane_taken_is_written_at_once),
        TEST(a_reader_that_is_behind_meets_a_miss),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

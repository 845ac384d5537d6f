/* SPDX-License-Identifier: Apache-2.0 */
/* ucm_inspect tells what is there, and with VERIFY what is wrong with it. */
#include "harness.h"

#include "../support/alloc.h"
#include "store/journal.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct shape shape = {4096, 3, 0};
enum { SLOT = 4 * 4096 };

struct seen {
    unsigned lanes, blocks, bad;
    struct ucm_lane_info last;
    char text[256];
    uint32_t bad_slot;
    bool keys[64];
};

static void see_lane(void *arg, const struct ucm_lane_info *lane)
{
    struct seen *s = arg;
    s->lanes++;
    s->last = *lane;
    snprintf(s->text, sizeof s->text, "%s", lane->ns_text);
}

static void see_block(void *arg, const struct ucm_lane_info *lane, const struct ucm_block_info *b)
{
    struct seen *s = arg;
    s->blocks++;
    for (uint64_t i = 0; i < ARRAY_LEN(s->keys); i++) {
        ucm_key key = key_of(i);
        if (ucmi_key_eq(&key, &b->key)) {
            assert_false(s->keys[i]); /* each once */
            s->keys[i] = true;
            assert_int_equal(b->depth, i);
        }
    }
    if (b->err) {
        s->bad++;
        s->bad_slot = b->slot;
        assert_int_equal(b->err, -EBADMSG);
    }
}

static struct seen inspect(const char *dir, unsigned flags)
{
    struct seen s = {0};
    struct ucm_inspect how = {.flags = flags, .arg = &s, .lane = see_lane, .block = see_block};
    assert_int_equal(ucm_inspect(dir, &how), 0);
    return s;
}

static void tells_what_is_there(void **state)
{
    const char *options = "ranks=3 rank=2 posix_segment_mb=1";
    char text[512];
    snprintf(text, sizeof text, "%s namespace=a\"b\\c\td", options);
    ucm_store *store = open_store(*state, &shape, text);
    struct memory m;
    memory_new(&m, store, &shape, 20);
    dump_all(store, &m, 0);
    struct seen s = inspect(*state, UCM_INSPECT_VERIFY);
    assert_int_equal(s.last.live, 1);
    assert_int_equal(s.last.pid, getpid());
    memory_free(&m);
    ucm_store_close(store);
    s = inspect(*state, UCM_INSPECT_VERIFY);
    assert_int_equal(s.lanes, 1);
    assert_int_equal(s.blocks, 20);
    assert_int_equal(s.last.blocks, 20);
    assert_int_equal(s.last.live, 0);
    assert_int_equal(s.last.rank, 2);
    assert_int_equal(s.last.ranks, 3);
    assert_int_equal(s.last.block_size, 3 * 4096);
    assert_int_equal(s.last.shard_size, 4096);
    assert_int_equal(s.last.segments, 1);
    assert_int_equal(s.last.slots, (1 << 20) / SLOT);
    assert_int_equal(s.last.records, 21); /* EPOCH and 20 PUT */
    assert_int_equal(s.last.bad + s.last.error, 0);
    assert_true(s.last.bytes >= 1 << 20);
    assert_string_equal(s.text, "a\"b\\c\td");
    for (int i = 0; i < 20; i++)
        assert_true(s.keys[i]);
}

static void names_the_block_that_is_bad(void **state)
{
    char path[512];
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=1");
    struct memory m;
    memory_new(&m, store, &shape, 10);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    lane_path(*state, "seg-000000", path, sizeof path);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pwrite(fd, "?", 1, 7 * SLOT + 9000), 1);
    close(fd);
    assert_int_equal(inspect(*state, 0).bad, 0); /* not asked to look */
    struct seen s = inspect(*state, UCM_INSPECT_VERIFY);
    assert_int_equal(s.bad, 1);
    assert_int_equal(s.bad_slot, 7);
    assert_int_equal(s.last.bad, 1);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(inspect(*state, UCM_INSPECT_VERIFY).bad, 10);
}

static void an_unreadable_lane_is_counted(void **state)
{
    char path[512];
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=1");
    struct memory m;
    memory_new(&m, store, &shape, 1);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    lane_path(*state, "journal", path, sizeof path);
    assert_int_equal(truncate(path, 100), 0);
    struct seen s = inspect(*state, 0);
    assert_int_equal(s.lanes, 1);
    assert_int_equal(s.blocks, 0);
    assert_int_equal(s.last.error, 1);
}

/* Whoever wrote it: it is shown as far as it goes. */
static void a_description_may_end_anywhere(void **state)
{
    static const struct {
        const char *json, *text;
    } cases[] = {
        {"{\"namespace\": \"ab\\u1", "abu1"}, {"{\"namespace\": \"ab\\u00", "abu00"},
        {"{\"namespace\": \"ab\\", "ab"},     {"{\"namespace\": \"ab\\u0009c\"", "ab\tc"},
        {"{\"namespace\": \"", ""},           {"", ""},
    };
    char path[512];
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=1");
    struct memory m;
    memory_new(&m, store, &shape, 1);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    lane_path(*state, "../namespace.json", path, sizeof path);
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        FILE *f = fopen(path, "w");
        fputs(cases[i].json, f);
        fclose(f);
        assert_string_equal(inspect(*state, 0).text, cases[i].text);
    }
}

/* 2^31 slots by 256 records: all of a table that could hold them was made once. */
static void slots_that_are_only_named_cost_nothing(void **state)
{
    static struct ucmi_journal_header h __attribute__((aligned(UCMI_PAGE)));
    static uint8_t page[5 * UCMI_PAGE];
    struct ucmi_record v[257] = {{.op = UCMI_EPOCH, .epoch = 1}};
    struct ucmi_jtail tail = {.pos = {.off = UCMI_PAGE, .seq = 1}, .page = calloc(1, UCMI_PAGE)};
    char path[512];
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=1");
    struct memory m;
    memory_new(&m, store, &shape, 1);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    lane_path(*state, "seg-000000", path, sizeof path);
    assert_int_equal(unlink(path), 0);
    lane_path(*state, "journal", path, sizeof path);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(ucmi_journal_header_read(fd, &h), 0);
    h.nshards = 1;
    h.block_size = h.shard_size = 1;
    h.slot_size = 2 * UCMI_PAGE;
    h.slots = 1 << 23;
    ucmi_journal_header_seal(&h);
    for (uint32_t i = 0; i < 256; i++)
        v[1 + i] = (struct ucmi_record){
            .op = UCMI_PUT, .key = key_of(i), .segment = i, .slot = h.slots - 1, .depth = i};
    ucmi_jtail_lay(&ucmi_plain, &tail, v, 257, page);
    assert_int_equal(pwrite(fd, &h, sizeof h, 0), sizeof h);
    assert_int_equal(pwrite(fd, page, sizeof page, UCMI_PAGE), sizeof page);
    close(fd);
    free(tail.page);
    alloc_fail_at(0);
    struct seen s = inspect(*state, UCM_INSPECT_VERIFY);
    assert_int_equal(s.blocks, 256);
    assert_int_equal(s.last.bad, 256);
    assert_true(alloc_bytes() < 4 << 20);
    struct ucm_manage how = {.op = UCM_MANAGE_REPAIR};
    struct ucm_manage_total total;
    alloc_fail_at(0);
    assert_int_equal(ucm_manage(*state, &how, &total), 0);
    assert_int_equal(total.done, 256);
    assert_true(alloc_bytes() < 64 << 20);
}

static void a_wrong_directory_is_an_error(void **state)
{
    struct ucm_inspect how = {0};
    char path[512];
    assert_int_equal(ucm_inspect(*state, &how), -ENOENT); /* no ucm in it */
    snprintf(path, sizeof path, "%s/missing", (char *)*state);
    assert_int_equal(ucm_inspect(path, &how), -ENOENT);
    assert_int_equal(ucm_inspect(NULL, &how), -EINVAL);
    assert_int_equal(ucm_inspect(path, NULL), -EINVAL);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(tells_what_is_there),
        TEST(names_the_block_that_is_bad),
        TEST(an_unreadable_lane_is_counted),
        TEST(a_description_may_end_anywhere),
        TEST(slots_that_are_only_named_cost_nothing),
        TEST(a_wrong_directory_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

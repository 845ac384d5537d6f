/* SPDX-License-Identifier: Apache-2.0 */
/* What is believed of a journal, and what is not. */
#include "store/lane.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../test.h"

enum { PAGES = 16, PER_PAGE = UCMI_PAGE / sizeof(struct ucmi_record) };

struct journal { /* a writer, and the file it writes */
    struct ucmi_jtail tail;
    uint8_t *file;
};

static void journal_new(struct journal *j)
{
    j->file = aligned_alloc(UCMI_PAGE, PAGES * UCMI_PAGE);
    memset(j->file, 0, PAGES * UCMI_PAGE);
    j->tail =
        (struct ucmi_jtail){.pos = {.off = UCMI_PAGE, .seq = 1}, .page = calloc(1, UCMI_PAGE)};
}

static void journal_free(struct journal *j)
{
    free(j->tail.page);
    free(j->file);
}

/* Appends n records of this op; the depth of each is its seq. */
static void append(struct journal *j, enum ucmi_op op, uint32_t epoch, size_t n)
{
    struct ucmi_record v[PER_PAGE * 4];
    uint8_t buf[5 * UCMI_PAGE];
    off_t off;
    size_t span = ucmi_jtail_span(&j->tail, n, &off);
    assert_true(n <= PER_PAGE * 4 && span <= sizeof buf);
    assert_int_equal(off % UCMI_PAGE, 0);
    assert_int_equal(span % UCMI_PAGE, 0);
    for (size_t i = 0; i < n; i++)
        v[i] = (struct ucmi_record){
            .op = op, .epoch = epoch, .depth = (uint32_t)(j->tail.pos.seq + i)};
    ucmi_jtail_lay(&ucmi_plain, &j->tail, v, n, buf);
    memcpy(j->file + off, buf, span);
    ucmi_jtail_advance(&j->tail, n, buf);
}

struct seen {
    uint64_t n, last;
};

static void note(void *arg, const struct ucmi_record *r)
{
    struct seen *s = arg;
    assert_true(r->op == UCMI_EPOCH || r->depth == r->seq);
    s->n++;
    s->last = r->seq;
}

static uint64_t count(const uint8_t *file, struct ucmi_jpos *pos)
{
    struct seen s = {0};
    bool moved = false;
    ucmi_journal_parse(&ucmi_plain, file + pos->off, PAGES * UCMI_PAGE - pos->off, pos, &moved,
                       note, &s);
    return s.n;
}

static const struct ucmi_jpos first = {.off = UCMI_PAGE, .seq = 1};

static void what_is_appended_is_read(void **state)
{
    struct journal j;
    struct ucmi_jpos pos = first;
    uint64_t n = 1;
    journal_new(&j);
    append(&j, UCMI_EPOCH, 1, 1);
    assert_int_equal(count(j.file, &pos), 1);
    /* Batches that end within, at and behind the end of a page; a reader that follows each. */
    for (size_t batch = 1; n + batch < (PAGES - 1) * PER_PAGE && batch < 3 * PER_PAGE; batch += 7) {
        append(&j, UCMI_PUT, 0, batch);
        n += batch;
        assert_int_equal(count(j.file, &pos), batch);
        assert_int_equal(pos.seq, n + 1);
        struct ucmi_jpos fresh = first;
        assert_int_equal(count(j.file, &fresh), n);
    }
    assert_true(n > 4 * PER_PAGE);
    journal_free(&j);
}

/* The last write is cut short at every byte: of it, the records before the cut count and no more.
 */
static void a_torn_tail_is_not_believed(void **state)
{
    struct journal j;
    uint8_t *before = malloc(PAGES * UCMI_PAGE), *torn = malloc(PAGES * UCMI_PAGE);
    journal_new(&j);
    append(&j, UCMI_EPOCH, 1, 1);
    append(&j, UCMI_PUT, 0, PER_PAGE - 5);
    memcpy(before, j.file, PAGES * UCMI_PAGE);
    uint64_t had = PER_PAGE - 4, from = j.tail.pos.off, more = 9;
    append(&j, UCMI_PUT, 0, more); /* over the end of the page */
    for (size_t cut = UCMI_PAGE; cut <= j.tail.pos.off; cut++) {
        struct ucmi_jpos pos = first;
        memcpy(torn, before, PAGES * UCMI_PAGE);
        memcpy(torn, j.file, cut);
        /* Whole although cut: its last bytes happen to be the zeros that were there. */
        uint64_t whole = 0;
        while (whole < more && !memcmp(torn + from + 64 * whole, j.file + from + 64 * whole, 64))
            whole++;
        assert_true(whole <= (cut < from ? 0 : (cut - from) / 64 + 1));
        assert_int_equal(count(torn, &pos), had + whole);
    }
    free(torn);
    free(before);
    journal_free(&j);
}

/* The first page of a write is lost and the second arrives: whoever takes the lane then writes over
 * the hole, and what lies behind it must stay dead though its sequence fits. */
static void leavings_of_an_earlier_owner_stay_dead(void **state)
{
    struct journal dead, heir;
    journal_new(&dead);
    append(&dead, UCMI_EPOCH, 1, 1);
    append(&dead, UCMI_PUT, 0, 10);
    struct journal at_crash = dead;
    at_crash.file = malloc(PAGES * UCMI_PAGE);
    memcpy(at_crash.file, dead.file, 2 * UCMI_PAGE); /* page 1 as it was */
    uint8_t page[UCMI_PAGE];
    memcpy(page, dead.tail.page, UCMI_PAGE);
    struct ucmi_jpos tail = dead.tail.pos;
    append(&dead, UCMI_PUT, 0, 2 * PER_PAGE);
    memcpy(at_crash.file + 2 * UCMI_PAGE, dead.file + 2 * UCMI_PAGE, (PAGES - 2) * UCMI_PAGE);

    struct ucmi_jpos pos = first;
    assert_int_equal(count(at_crash.file, &pos), 11);
    journal_new(&heir);
    memcpy(heir.file, at_crash.file, PAGES * UCMI_PAGE);
    heir.tail.pos = tail;
    memcpy(heir.tail.page, page, UCMI_PAGE);
    append(&heir, UCMI_EPOCH, 2, 1);
    uint64_t n = 12;
    for (; heir.tail.pos.off < 4 * UCMI_PAGE; n++) {
        struct ucmi_jpos fresh = first;
        assert_int_equal(count(heir.file, &fresh), n);
        append(&heir, UCMI_PUT, 0, 1);
    }
    free(at_crash.file);
    journal_free(&dead);
    journal_free(&heir);
}

static void only_an_epoch_record_changes_the_epoch(void **state)
{
    struct ucmi_jpos pos = {.off = UCMI_PAGE, .seq = 5, .epoch = 3};
    struct ucmi_record r = {.op = UCMI_PUT, .seq = 5, .epoch = 3};
    ucmi_record_seal(&ucmi_plain, &r);
    assert_true(ucmi_jpos_follows(&ucmi_plain, &pos, &r));
    r.epoch = 4;
    ucmi_record_seal(&ucmi_plain, &r);
    assert_false(ucmi_jpos_follows(&ucmi_plain, &pos, &r));
    r.op = UCMI_EPOCH;
    ucmi_record_seal(&ucmi_plain, &r);
    assert_true(ucmi_jpos_follows(&ucmi_plain, &pos, &r));
    r.epoch = 3;
    ucmi_record_seal(&ucmi_plain, &r);
    assert_false(ucmi_jpos_follows(&ucmi_plain, &pos, &r)); /* the same again is not a new owner */
    r.epoch = 4;
    r.seq = 6;
    ucmi_record_seal(&ucmi_plain, &r);
    assert_false(ucmi_jpos_follows(&ucmi_plain, &pos, &r));
}

static void moved_ends_the_file_for_now(void **state)
{
    struct journal j;
    struct seen s = {0};
    struct ucmi_jpos pos = first;
    bool moved = false;
    journal_new(&j);
    append(&j, UCMI_EPOCH, 1, 1);
    append(&j, UCMI_PUT, 0, 3);
    append(&j, UCMI_MOVED, 0, 1);
    append(&j, UCMI_PUT, 0, 2); /* the rename failed, the owner went on */
    ucmi_journal_parse(&ucmi_plain, j.file + pos.off, 2 * UCMI_PAGE, &pos, &moved, note, &s);
    assert_true(moved);
    assert_int_equal(s.n, 4);
    assert_int_equal(count(j.file, &pos), 2);
    journal_free(&j);
}

static void files_are_read_in_any_steps(void **state)
{
    struct journal j;
    journal_new(&j);
    append(&j, UCMI_EPOCH, 1, 1);
    for (int i = 0; i < 10; i++)
        append(&j, UCMI_PUT, 0, 50);
    int fd = memfd_create("journal", MFD_CLOEXEC);
    assert_int_equal(write(fd, j.file, PAGES * UCMI_PAGE), PAGES * UCMI_PAGE);
    for (size_t size = UCMI_PAGE; size <= 16 * UCMI_PAGE; size *= 2) {
        void *buf = aligned_alloc(UCMI_PAGE, size);
        struct ucmi_jpos pos = first;
        struct seen s = {0};
        bool moved = false;
        assert_int_equal(ucmi_journal_read(&ucmi_plain, fd, buf, size, &pos, &moved, note, &s), 0);
        assert_int_equal(s.n, 501);
        assert_int_equal(s.last, 501);
        free(buf);
    }
    /* The file ends in the middle of a record. */
    assert_int_equal(ftruncate(fd, (off_t)j.tail.pos.off - 10), 0);
    void *buf = aligned_alloc(UCMI_PAGE, UCMI_PAGE);
    struct ucmi_jpos pos = first;
    struct seen s = {0};
    bool moved = false;
    assert_int_equal(ucmi_journal_read(&ucmi_plain, fd, buf, UCMI_PAGE, &pos, &moved, note, &s), 0);
    assert_int_equal(s.n, 500);
    free(buf);
    close(fd);
    journal_free(&j);
}

static void the_room_of_a_journal_tells_its_slots(void **state)
{
    for (uint64_t slots = 0; slots < 1000000; slots = slots * 3 + 1)
        assert_int_equal(ucmi_journal_slots(ucmi_journal_room(slots)), slots);
    assert_int_equal(ucmi_journal_slots(0), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_appended_is_read),
        cmocka_unit_test(a_torn_tail_is_not_believed),
        cmocka_unit_test(leavings_of_an_earlier_owner_stay_dead),
        cmocka_unit_test(only_an_epoch_record_changes_the_epoch),
        cmocka_unit_test(moved_ends_the_file_for_now),
        cmocka_unit_test(files_are_read_in_any_steps),
        cmocka_unit_test(the_room_of_a_journal_tells_its_slots),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

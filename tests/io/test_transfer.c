/* SPDX-License-Identifier: Apache-2.0 */
/* transfer.c: a simulated system call that moves what it likes; whatever it does, no byte is moved
 * twice, skipped, or counted that was not moved. */
#include "io/io.h"

#include "io_test.h"

enum { FILE_LEN = 4096 };

static unsigned char file[FILE_LEN];

/* What preadv and pwritev would do at op, but at most `most` bytes of it. */
static ssize_t move(const struct ucm_io *op, size_t most)
{
    size_t moved = 0;
    for (unsigned i = 0; i < op->niov && moved < most; i++) {
        size_t at = (size_t)op->off + moved;
        size_t n = MIN(MIN(op->iov[i].iov_len, most - moved), at < FILE_LEN ? FILE_LEN - at : 0);
        if (op->op == UCM_IO_READV)
            memcpy(op->iov[i].iov_base, file + at, n);
        else
            memcpy(file + at, op->iov[i].iov_base, n);
        moved += n;
    }
    return (ssize_t)moved;
}

static void any_way_to_fall_short_moves_each_byte_once(void **state)
{
    unsigned seed = 1;
    for (int round = 0; round < 2000; round++) {
        unsigned char buf[FILE_LEN], kept[FILE_LEN];
        struct iovec iov[9], given[9];
        unsigned n = 1 + (unsigned)rand_r(&seed) % 9;
        size_t at = 0, off = (size_t)rand_r(&seed) % 1000;
        for (unsigned i = 0; i < n; i++) {
            iov[i] = (struct iovec){buf + at, (size_t)rand_r(&seed) % 300}; /* some are empty */
            at += iov[i].iov_len;
        }
        memcpy(given, iov, sizeof iov);
        bool read = rand_r(&seed) % 2;
        fill_pattern(read ? file : buf, FILE_LEN, (uint64_t)round);
        memset(read ? buf : file, 0, FILE_LEN);
        memcpy(kept, buf, sizeof kept);

        struct ucm_io op = {
            .op = read ? UCM_IO_READV : UCM_IO_WRITEV, .off = (off_t)off, .iov = iov, .niov = n};
        ucmi_io_begin(&op);
        for (int calls = 0;; calls++) {
            assert_true(calls <= FILE_LEN);
            ssize_t res = rand_r(&seed) % 8 ? move(&op, 1 + (size_t)rand_r(&seed) % 400) : -EINTR;
            if (ucmi_io_moved(&op, res))
                break;
        }
        assert_int_equal(op.res, at);
        assert_memory_equal(read ? buf : file + off, read ? file + off : kept, at);
        assert_ptr_equal(op.iov, iov);
        assert_int_equal(op.niov, n);
        assert_int_equal(op.off, off);
        assert_memory_equal(iov, given, sizeof iov);
    }
}

static struct ucm_io begun(enum ucm_io_op kind, const struct iovec *iov)
{
    struct ucm_io op = {.op = kind, .off = 0, .iov = iov, .niov = 2};
    ucmi_io_begin(&op);
    return op;
}

static void the_end_of_the_file_ends_a_read_with_its_count(void **state)
{
    unsigned char buf[2048];
    const struct iovec iov[2] = {{buf, 1024}, {buf + 1024, 1024}};
    struct ucm_io op = begun(UCM_IO_READV, iov);
    assert_false(ucmi_io_moved(&op, 700));
    assert_true(ucmi_io_moved(&op, 0));
    assert_int_equal(op.res, 700);

    op = begun(UCM_IO_READV, iov);
    assert_true(ucmi_io_moved(&op, 0));
    assert_int_equal(op.res, 0);
}

static void a_direct_read_refused_off_a_sector_has_met_the_end(void **state)
{
    unsigned char buf[2048];
    const struct iovec iov[2] = {{buf, 1024}, {buf + 1024, 1024}};
    struct ucm_io op = begun(UCM_IO_READV, iov);
    assert_false(ucmi_io_moved(&op, 1100));
    assert_true(ucmi_io_moved(&op, -EINVAL));
    assert_int_equal(op.res, 1100);

    op = begun(UCM_IO_READV, iov); /* on a sector boundary it is what it says */
    assert_false(ucmi_io_moved(&op, 1024));
    assert_true(ucmi_io_moved(&op, -EINVAL));
    assert_int_equal(op.res, -EINVAL);

    op = begun(UCM_IO_WRITEV, iov);
    assert_false(ucmi_io_moved(&op, 1100));
    assert_true(ucmi_io_moved(&op, -EINVAL));
    assert_int_equal(op.res, -EINVAL);
}

static void an_error_after_a_part_is_an_error(void **state)
{
    unsigned char buf[2048] = {0};
    const struct iovec iov[2] = {{buf, 1024}, {buf + 1024, 1024}};
    struct ucm_io op = begun(UCM_IO_WRITEV, iov);
    assert_false(ucmi_io_moved(&op, 1025));
    assert_true(ucmi_io_moved(&op, -ENOSPC));
    assert_int_equal(op.res, -ENOSPC);
    assert_ptr_equal(op.iov, iov);
    assert_int_equal(op.niov, 2);
}

static void a_write_that_moves_nothing_does_not_go_on_for_ever(void **state)
{
    unsigned char buf[2048] = {0};
    const struct iovec iov[2] = {{buf, 1024}, {buf + 1024, 1024}};
    struct ucm_io op = begun(UCM_IO_WRITEV, iov);
    assert_true(ucmi_io_moved(&op, 0));
    assert_int_equal(op.res, -EIO);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_way_to_fall_short_moves_each_byte_once),
        cmocka_unit_test(the_end_of_the_file_ends_a_read_with_its_count),
        cmocka_unit_test(a_direct_read_refused_off_a_sector_has_met_the_end),
        cmocka_unit_test(an_error_after_a_part_is_an_error),
        cmocka_unit_test(a_write_that_moves_nothing_does_not_go_on_for_ever),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

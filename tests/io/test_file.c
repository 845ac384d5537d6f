/* SPDX-License-Identifier: Apache-2.0 */
/* file.c: what the system calls promise, and the room that ALLOCATE promises on top. */
#include "io/io.h"

#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>

#include "io_test.h"

enum { MIB = 1 << 20 };

static char dir[32];
static int dir_fd;

static int new_dir(void **state)
{
    strcpy(dir, "/tmp/ucm-file-XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return dir_fd < 0 ? -1 : 0;
}

static int remove_dir(void **state) /* fails when a test has left something */
{
    close(dir_fd);
    return rmdir(dir);
}

static int file_op(struct ucm_file f)
{
    return ucmi_file_plain(&f);
}

static int open_new(const char *name)
{
    return file_op((struct ucm_file){.op = UCM_FILE_OPEN,
                                     .dirfd = dir_fd,
                                     .path = name,
                                     .flags = O_RDWR | O_CREAT | O_EXCL,
                                     .mode = 0600});
}

static void names_are_made_changed_and_removed(void **state)
{
    int fd = open_new("a");
    assert_true(fd >= 0);
    assert_int_equal(open_new("a"), -EEXIST);
    assert_int_equal(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    assert_int_equal(file_op((struct ucm_file){.op = UCM_FILE_SYNC, .fd = fd}), 0);
    assert_int_equal(file_op((struct ucm_file){.op = UCM_FILE_CLOSE, .fd = fd}), 0);
    assert_int_equal(file_op((struct ucm_file){.op = UCM_FILE_CLOSE, .fd = fd}), -EBADF);

    struct ucm_file rename_it = {.op = UCM_FILE_RENAME, .dirfd = dir_fd, .path = "a", .path2 = "b"};
    assert_int_equal(file_op(rename_it), 0);
    assert_int_equal(file_op(rename_it), -ENOENT);
    assert_int_equal(faccessat(dir_fd, "b", F_OK, 0), 0);

    struct ucm_file make = {.op = UCM_FILE_MKDIR, .dirfd = dir_fd, .path = "d", .mode = 0700};
    assert_int_equal(file_op(make), 0);
    assert_int_equal(file_op(make), -EEXIST);

    struct ucm_file gone = {.op = UCM_FILE_UNLINK, .dirfd = dir_fd, .path = "b"};
    assert_int_equal(file_op(gone), 0);
    assert_int_equal(file_op(gone), -ENOENT);
    gone.path = "d";
    assert_int_equal(file_op(gone), -EISDIR);
    gone.flags = AT_REMOVEDIR;
    assert_int_equal(file_op(gone), 0);
    assert_int_equal(file_op((struct ucm_file){.op = (enum ucm_file_op)99}), -EINVAL);
}

/* 1.5 MiB plus a byte: the fallback ends within a piece.  Returns what went wrong. */
static const char *allocates(void)
{
    struct stat st;
    unsigned char head[100], zero[4096] = {0}, tail[4096];
    int fd = scratch_file(0);
    off_t len = 3 * MIB / 2 + 1;
    fill_pattern(head, sizeof head, 0);
    if (fd < 0 || pwrite(fd, head, sizeof head, 0) != sizeof head)
        return "no scratch file";
    if (file_op((struct ucm_file){.op = UCM_FILE_ALLOCATE, .fd = fd, .len = len}) != 0)
        return "ALLOCATE failed";
    fsync(fd); /* blocks of what was written are counted once they are placed */
    if (fstat(fd, &st) < 0 || st.st_size != len)
        return "the size is wrong";
    if (st.st_blocks * 512 < len)
        return "there are not blocks for all of it";
    if (pread(fd, head, sizeof head, 0) != sizeof head || !has_pattern(head, sizeof head, 0))
        return "what was in the file has changed";
    if (pread(fd, tail, sizeof tail, len - 4096) != 4096 || memcmp(tail, zero, 4096) != 0)
        return "the new room is not zeros";
    if (file_op((struct ucm_file){.op = UCM_FILE_ALLOCATE, .fd = fd, .len = MIB}) != 0 ||
        fstat(fd, &st) < 0 || st.st_size != len)
        return "less than there is changed the size";
    if (file_op((struct ucm_file){.op = UCM_FILE_TRUNCATE, .fd = fd, .len = 10}) != 0 ||
        fstat(fd, &st) < 0 || st.st_size != 10)
        return "TRUNCATE did not";
    return close(fd) == 0 ? NULL : "close failed";
}

static const char *allocates_without_fallocate(void)
{
    return deny_syscall(SYS_fallocate, EOPNOTSUPP) < 0 ? "skip: no seccomp here" : allocates();
}

static void allocate_makes_room_for_real(void **state)
{
    const char *wrong = allocates();
    assert_string_equal(wrong ? wrong : "", "");
}

static void allocate_makes_room_where_the_file_system_cannot(void **state)
{
    in_child(allocates_without_fallocate);
}

/* A tmpfs of 1 MiB of our own. */
static const char *fills_up(void)
{
    struct stat st;
    if (unshare(CLONE_NEWNS) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("tmpfs", dir, "tmpfs", 0, "size=1m") < 0)
        return "skip: mounting a tmpfs is not permitted here";
    int fs = open(dir, O_RDONLY | O_DIRECTORY);
    int fd = openat(fs, "f", O_RDWR | O_CREAT, 0600);
    if (fd < 0 || pwrite(fd, "0123456789", 10, 0) != 10)
        return "cannot write a file";
    int err = file_op((struct ucm_file){.op = UCM_FILE_ALLOCATE, .fd = fd, .len = 2 * MIB});
    if (err != -ENOSPC)
        return "ALLOCATE of too much does not say ENOSPC";
    if (fstat(fd, &st) < 0 || st.st_size != 10 || st.st_blocks * 512 > 4096)
        return "a failed ALLOCATE keeps room";
    return NULL;
}

static const char *fills_up_without_fallocate(void)
{
    return deny_syscall(SYS_fallocate, EOPNOTSUPP) < 0 ? "skip: no seccomp here" : fills_up();
}

static void a_full_disk_passes_and_keeps_nothing(void **state)
{
    in_child(fills_up);
}

static void a_full_disk_passes_in_the_fallback_too(void **state)
{
    in_child(fills_up_without_fallocate);
}

static const char *meets_the_limit(void)
{
    struct stat st;
    struct rlimit limit = {MIB, MIB};
    int fd = scratch_file(0);
    signal(SIGXFSZ, SIG_IGN);
    if (fd < 0 || setrlimit(RLIMIT_FSIZE, &limit) < 0)
        return "cannot limit the size of files";
    if (file_op((struct ucm_file){.op = UCM_FILE_ALLOCATE, .fd = fd, .len = 2 * MIB}) != -EFBIG)
        return "ALLOCATE beyond the limit does not say EFBIG";
    return fstat(fd, &st) < 0 || st.st_size != 0 || st.st_blocks != 0 ? "it keeps room" : NULL;
}

static void a_limit_passes_unchanged(void **state)
{
    in_child(meets_the_limit);
}

static int spoiled(void *io, const struct ucm_file *f)
{
    return f->op == UCM_FILE_SYNC ? -EDQUOT : ucmi_file_plain(f);
}

static void an_engine_with_files_of_its_own_is_asked(void **state)
{
    struct ucm_io_ops wrapping = {.file = spoiled}, plain = {0};
    struct ucmi_io io = {.ops = &wrapping};
    int fd = scratch_file(0);
    struct ucm_file f = {.op = UCM_FILE_SYNC, .fd = fd};
    assert_int_equal(ucmi_io_file(&io, &f), -EDQUOT);
    io.ops = &plain;
    assert_int_equal(ucmi_io_file(&io, &f), 0);
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(names_are_made_changed_and_removed, new_dir, remove_dir),
        cmocka_unit_test(allocate_makes_room_for_real),
        cmocka_unit_test(allocate_makes_room_where_the_file_system_cannot),
        cmocka_unit_test_setup_teardown(a_full_disk_passes_and_keeps_nothing, new_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_full_disk_passes_in_the_fallback_too, new_dir,
                                        remove_dir),
        cmocka_unit_test(a_limit_passes_unchanged),
        cmocka_unit_test(an_engine_with_files_of_its_own_is_asked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

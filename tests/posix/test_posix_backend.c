/* SPDX-License-Identifier: Apache-2.0 */
/* Directories that are not what they should be: a clear error, or a miss, never a failure. */
#include "peer.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct shape shape = {4096, 2, 0};

static void refused(const char *dir, int err, const char *path, const char *remedy)
{
    ucm_store *store;
    char text[512];
    assert_int_equal(try_open(dir, &shape, NULL, &store, text, sizeof text), err);
    assert_non_null(strstr(text, "storage_backends"));
    assert_non_null(strstr(text, path));
    assert_non_null(strstr(text, remedy));
}

static void what_is_no_directory_is_refused(void **state)
{
    char path[512];
    snprintf(path, sizeof path, "%s/missing", (char *)*state);
    refused(path, -ENOENT, path, "make the directory");
    snprintf(path, sizeof path, "%s/file", (char *)*state);
    close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    refused(path, -ENOTDIR, path, "not a directory");
    refused("", -EINVAL, "not set", "give the directory");
    snprintf(path, sizeof path, "%s:/tmp", (char *)*state);
    refused(path, -EINVAL, path, "give one directory");
}

/* As somebody without any rights: root may write everywhere. */
static void a_directory_that_may_not_be_written_is_refused(void **state)
{
    if (geteuid() == 0)
        assert_int_equal(seteuid(65534), 0);
    else
        assert_int_equal(chmod(*state, 0500), 0);
    ucm_store *store;
    char text[512];
    int err = try_open(*state, &shape, NULL, &store, text, sizeof text);
    if (geteuid() == 65534)
        assert_int_equal(seteuid(0), 0);
    chmod(*state, 0700);
    assert_int_equal(err, -EACCES);
    assert_non_null(strstr(text, *state));
    assert_non_null(strstr(text, "may write"));
}

/* In a mount namespace of its own, so that nothing is left behind. */
static bool mount_small(const char *dir, const char *size)
{
    if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("tmpfs", dir, "tmpfs", 0, size) < 0) {
        print_message("# no tmpfs can be mounted here: %s\n", strerror(errno));
        return false;
    }
    return true;
}

static void from_a_read_only_directory_blocks_are_loaded(void **state)
{
    if (!mount_small(*state, "size=16m"))
        skip();
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=1");
    struct memory m;
    memory_new(&m, store, &shape, 10);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    assert_int_equal(mount(NULL, *state, NULL, MS_REMOUNT | MS_RDONLY, NULL), 0);
    store = open_store(*state, &shape, "posix_segment_mb=1");
    memory_new(&m, store, &shape, 10);
    load_all(store, &m, 0);
    struct outcome out = move(store, &m, true, 5, 0, 0);
    for (int i = 0; i < 10; i++) /* those that are there need no writing */
        assert_int_equal(out.status[i], -EROFS);
    free(out.status);
    assert_int_equal(count_found(store, 0, 20), 10);
    memory_free(&m);
    ucm_store_close(store);
    umount2(*state, MNT_DETACH);
}

static void in_an_empty_read_only_directory_all_is_absent(void **state)
{
    if (!mount_small(*state, "size=1m") ||
        mount(NULL, *state, NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0)
        skip();
    ucm_store *store = open_store(*state, &shape, NULL);
    assert_int_equal(count_found(store, 0, 20), 0);
    ucm_store_close(store);
    umount2(*state, MNT_DETACH);
}

/* A disk without room costs hits.  When others fill it up, what we have goes on serving; when they
 * make room, it is used. */
static void a_full_disk_costs_hits_only(void **state)
{
    if (!mount_small(*state, "size=8m"))
        skip();
    char ballast[512];
    snprintf(ballast, sizeof ballast, "%s/ballast", (char *)*state);
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=1");
    struct memory m;
    memory_new(&m, store, &shape, 20);
    dump_all(store, &m, 0);
    int fd = open(ballast, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    assert_int_equal(posix_fallocate(fd, 0, 5 << 20), 0);
    /* Twice what fits: the coldest make room. */
    for (uint64_t i = 1; i < 60; i++)
        dump_all(store, &m, 20 * i);
    load_all(store, &m, 20 * 59);
    assert_true(metric(store, "disk_evicted_total") > 0);
    assert_int_equal((int)metric(store, "disk_lanes_lost_total"), 0);
    memory_free(&m);
    ucm_store_close(store);
    close(fd);
    umount2(*state, MNT_DETACH);
}

static void on_a_disk_full_from_the_start_dumps_are_dropped(void **state)
{
    if (!mount_small(*state, "size=2m"))
        skip();
    char ballast[512];
    snprintf(ballast, sizeof ballast, "%s/ballast", (char *)*state);
    int fd = open(ballast, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    char zeros[4096] = {0};
    while (write(fd, zeros, sizeof zeros) > 0)
        ;
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=1");
    struct memory m;
    memory_new(&m, store, &shape, 20);
    struct outcome out = move(store, &m, true, 0, 0, 0);
    for (int i = 0; i < 20; i++)
        assert_int_equal(out.status[i], -ENOSPC);
    free(out.status);
    assert_int_equal(count_found(store, 0, 20), 0);
    assert_int_equal(ftruncate(fd, 0), 0); /* others made room */
    do {
        out = move(store, &m, true, 0, 0, 0);
        free(out.status);
    } while (out.stored);
    memory_free(&m);
    ucm_store_close(store);
    close(fd);
    umount2(*state, MNT_DETACH);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(int argc, char **argv)
{
    if (argc > 1)
        return peer_main(argc, argv);
    const struct CMUnitTest tests[] = {
        TEST(what_is_no_directory_is_refused),
        TEST(a_directory_that_may_not_be_written_is_refused),
        TEST(from_a_read_only_directory_blocks_are_loaded),
        TEST(in_an_empty_read_only_directory_all_is_absent),
        TEST(a_full_disk_costs_hits_only),
        TEST(on_a_disk_full_from_the_start_dumps_are_dropped),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

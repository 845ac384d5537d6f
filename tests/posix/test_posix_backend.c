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

#include "alloc.h"
#include "store/posix.h"

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
    snprintf(path, sizeof path, "%s::/tmp", (char *)*state);
    refused(path, -EINVAL, "", "empty name");
    snprintf(path, sizeof path, "/tmp:%s:/tmp", (char *)*state);
    refused(path, -EINVAL, "/tmp is named twice", "once");
    snprintf(path, sizeof path, "%s/no:%s/none", (char *)*state, (char *)*state);
    refused(path, -EIO, *state, "make the directory");
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
        return; /* said why */
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
        return; /* said why */
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
        return; /* said why */
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
    assert_int_equal(ftruncate(fd, 0), 0);
    for (uint64_t i = 60; disk_usage(*state) < 5 << 20; i++) { /* more than there was room for */
        assert_true(i < 100000);
        dump_all(store, &m, 20 * i);
    }
    memory_free(&m);
    ucm_store_close(store);
    close(fd);
    umount2(*state, MNT_DETACH);
}

static void on_a_disk_full_from_the_start_dumps_are_dropped(void **state)
{
    if (!mount_small(*state, "size=2m"))
        return; /* said why */
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
    assert_int_equal(count_lanes(*state), 0); /* nothing half made is left */
    assert_int_equal(ftruncate(fd, 0), 0);    /* others made room */
    do {
        out = move(store, &m, true, 0, 0, 0);
        free(out.status);
    } while (out.stored);
    memory_free(&m);
    ucm_store_close(store);
    close(fd);
    umount2(*state, MNT_DETACH);
}

/* ---- several backends ---- */

enum { MANY = 40 };

static void sub_dir(const char *dir, const char *name, bool make, char *path)
{
    snprintf(path, 512, "%s/%s", dir, name);
    if (make)
        assert_int_equal(mkdir(path, 0700), 0);
}

static void path_several(const char *dir, const char *names, char paths[2048])
{
    size_t len = 0;
    for (const char *n = names; *n; n++)
        len += (size_t)snprintf(paths + len, 2048 - len, "%s%s/%c", n == names ? "" : ":", dir, *n);
}

static ucm_store *open_several(const char *dir, const char *names, const char *options)
{
    char paths[2048];
    path_several(dir, names, paths);
    return open_store(paths, &shape, options);
}

static uint64_t bytes_in(const char *dir, const char *name)
{
    char path[512];
    sub_dir(dir, name, false, path);
    return disk_usage(path);
}

/* Each gets a part, whatever the order they are named in; each block is in one only. */
static void several_backends_share_the_blocks(void **state)
{
    char path[512];
    for (const char *name = "abc"; *name; name++)
        sub_dir(*state, (const char[]){*name, 0}, true, path);
    ucm_store *store = open_several(*state, "abc", "posix_segment_mb=1"), *other;
    struct memory m;
    memory_new(&m, store, &shape, MANY);
    dump_all(store, &m, 0);
    assert_int_equal((int)metric(store, "disk_blocks"), MANY);
    for (const char *name = "abc"; *name; name++) {
        ucm_store *one = open_several(*state, (const char[]){*name, 0}, NULL);
        size_t has = count_found(one, 0, MANY);
        assert_in_range(has, 3, MANY - 3);
        ucm_store_close(one);
    }
    other = open_several(*state, "cab", "posix_segment_mb=1");
    assert_int_equal(count_found(other, 0, 2 * MANY), MANY);
    dump_all(store, &m, MANY);
    assert_int_equal(count_found(other, 0, 2 * MANY), 2 * MANY); /* news of all */
    memory_free(&m);
    memory_new(&m, other, &shape, MANY);
    load_all(other, &m, 0);
    load_all(other, &m, MANY);
    dump_all(other, &m, 0); /* all there: from then on as well */
    assert_int_equal((int)metric(other, "disk_present_total"), MANY);
    memory_free(&m);
    ucm_store_close(other);
    ucm_store_close(store);
}

/* Two that have the same blocks. */
static ucm_store *open_twins(const char *dir, char path[2][512])
{
    for (unsigned i = 0; i < 2; i++) {
        const char name[] = {"ab"[i], 0};
        sub_dir(dir, name, true, path[i]);
        ucm_store *one = open_several(dir, name, NULL);
        struct memory m;
        memory_new(&m, one, &shape, MANY);
        dump_all(one, &m, 0);
        memory_free(&m);
        ucm_store_close(one);
    }
    return open_several(dir, "ab", NULL);
}

static unsigned count_removed(ucm_store *store)
{
    ucm_key keys[8];
    uint64_t lost = 0;
    unsigned n = 0;
    count_found(store, MANY, 1); /* a miss has the journals read */
    for (ssize_t told; (told = ucm_removed(store, keys, 8, &lost)) > 0;)
        n += (unsigned)told;
    assert_int_equal(lost, 0);
    return n;
}

static int not_the_last(void *arg, const char *ns, const char *lane,
                        const struct ucm_block_info *info)
{
    ucm_key last = key_of(MANY - 1);
    return !ucmi_key_eq(&last, &info->key);
}

static void remove_all_but_the_last(const char *path)
{
    struct ucm_manage how = {.op = UCM_MANAGE_RM, .want = not_the_last, .timeout_ms = 30000};
    struct ucm_manage_total total;
    assert_int_equal(ucm_manage(path, &how, &total), 0);
    assert_int_equal(total.done, MANY - 1);
}

/* Blocks that two of them have, as when one hung for a while, are gone when both have lost them. */
static void what_another_backend_has_is_not_gone(void **state)
{
    char path[2][512];
    ucm_store *store = open_twins(*state, path);
    assert_int_equal(count_removed(store), 0); /* from now on they are kept */
    for (unsigned i = 0; i < 2; i++) {
        remove_all_but_the_last(path[i]);
        assert_int_equal(count_removed(store), i ? MANY - 1 : 0);
        assert_int_equal(count_found(store, 0, MANY), i ? 1 : MANY);
    }
    ucm_store_close(store);
}

/* Nor when there is no memory to keep what goes from there. */
static void what_another_backend_has_is_not_gone_without_memory(void **state)
{
    char path[2][512];
    ucm_store *store = open_twins(*state, path);
    const struct ucmi_backends *tier = store->tiers[0].priv;
    ucm_key keys[MANY];
    uint64_t lost = 0;
    assert_int_equal(ucmi_posix_removed(tier->v[0], keys, MANY, &lost), 0); /* kept, of a alone */
    remove_all_but_the_last(path[0]);
    count_found(store, MANY, 1);
    alloc_fail_one_in(1, 1);
    assert_int_equal(ucm_removed(store, keys, MANY, &lost), -ENOMEM);
    alloc_fail_one_in(0, 0);
    assert_int_equal(count_removed(store), 0);
    remove_all_but_the_last(path[1]);
    assert_int_equal(count_removed(store), MANY - 1);
    ucm_store_close(store);
}

/* The capacity is one for all of them together. */
static void several_backends_share_the_capacity(void **state)
{
    char path[512], paths[2048];
    const double bound = 0.004;
    sub_dir(*state, "a", true, path);
    sub_dir(*state, "b", true, path);
    path_several(*state, "ab", paths);
    struct peer peers[2] = {peer_start(paths, &shape, "posix_capacity_gb=0.004"),
                            peer_start(paths, &shape, "posix_capacity_gb=0.004")};
    peers_keep_to(peers, 2, *state, bound);
    ucm_store *store = open_several(*state, "ab", "posix_capacity_gb=0.004");
    struct memory m;
    memory_new(&m, store, &shape, MANY);
    for (uint64_t i = 0; i < 40; i++)
        dump_all(store, &m, i * MANY);
    memory_free(&m);
    memory_new(&m, store, &shape, 4);
    load_all(store, &m, 39 * MANY); /* heads of chains stay */
    assert_true(metric(store, "disk_evicted_total") > 0);
    assert_in_range(disk_usage(*state), 1 << 20, (uint64_t)(bound * (1 << 30)));
    assert_true(bytes_in(*state, "a") > 500000 && bytes_in(*state, "b") > 500000);
    memory_free(&m);
    ucm_store_close(store);
}

/* One is not there at first, one goes away: the others are a working cache, and both are used when
 * they come back. */
static void losing_a_backend_costs_its_blocks_only(void **state)
{
    char a[512], b[512], away[512];
    sub_dir(*state, "a", true, a);
    sub_dir(*state, "b", false, b);
    sub_dir(*state, "away", false, away);
    ucm_store *store = open_several(*state, "ab", "posix_segment_mb=1 posix_stall_ms=2000");
    struct memory m;
    memory_new(&m, store, &shape, MANY);
    dump_all(store, &m, 0);
    load_all(store, &m, 0);
    sub_dir(*state, "b", true, b);
    for (uint64_t i = 1; count_lanes(b) == 0; i++) { /* it is found by itself */
        assert_true(i < 100000);
        struct outcome out = move(store, &m, true, i * MANY, 0, 0);
        free(out.status);
    }
    load_all(store, &m, 0);
    ucm_store_close(store);
    memory_free(&m);

    assert_int_equal(rename(a, away), 0);
    store = open_several(*state, "ab", "posix_segment_mb=1 posix_stall_ms=2000");
    memory_new(&m, store, &shape, MANY);
    assert_int_equal(count_found(store, 0, MANY), 0); /* those were in a */
    dump_all(store, &m, 5);
    load_all(store, &m, 5);
    assert_int_equal(rename(away, a), 0);
    while (count_found(store, 0, MANY) < MANY)
        ;
    load_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
}

/* One is read-only: what it holds is loaded, and dumps go to the other. */
static void dumps_go_where_they_can_be_written(void **state)
{
    char a[512], b[512];
    sub_dir(*state, "a", true, a);
    sub_dir(*state, "b", true, b);
    if (!mount_small(a, "size=16m") || !mount_small(b, "size=16m"))
        return; /* said why */
    ucm_store *store = open_several(*state, "ab", "posix_segment_mb=1");
    struct memory m;
    memory_new(&m, store, &shape, MANY);
    dump_all(store, &m, 0);
    assert_true(count_lanes(b) == 1);
    ucm_store_close(store);
    memory_free(&m);
    assert_int_equal(mount(NULL, b, NULL, MS_REMOUNT | MS_RDONLY, NULL), 0);
    store = open_several(*state, "ab", "posix_segment_mb=1");
    memory_new(&m, store, &shape, MANY);
    load_all(store, &m, 0);
    dump_all(store, &m, MANY); /* to a, all of them */
    load_all(store, &m, MANY);
    memory_free(&m);
    ucm_store_close(store);
    umount2(b, MNT_DETACH);
    umount2(a, MNT_DETACH);
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
        TEST(several_backends_share_the_blocks),
        TEST(what_another_backend_has_is_not_gone),
        TEST(what_another_backend_has_is_not_gone_without_memory),
        TEST(several_backends_share_the_capacity),
        TEST(losing_a_backend_costs_its_blocks_only),
        TEST(dumps_go_where_they_can_be_written),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

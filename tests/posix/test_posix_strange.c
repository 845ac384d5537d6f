/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What others may put into a backend in place of our files: links that lead out of it, FIFOs,
 * directories.  Nothing outside is read, written or removed, nothing hangs, and what is whole is
 * still found.
 */
#include "harness.h"

#include <fcntl.h>
#include <ftw.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/posix.h"

enum { BLOCKS = 6 };
static const struct shape shape = {4096, 2, 0};

/* The paths of our files below a backend, each made a stranger in turn. */
static const struct kind {
    const char *pattern;
    int open;         /* what opening the store comes to */
    unsigned there;   /* blocks of the ones there are that can be loaded */
    unsigned visible; /* blocks that ucm_inspect sees, with those that are dumped then */
    bool dumps;       /* new blocks are stored */
} kinds[] = {
    {"ucm", -ENOTDIR, 0, 0, false},
    {"ucm/????????????????????????????????", -ENOTDIR, 0, 0, false},
    {"ucm/lock", 0, BLOCKS, 2 * BLOCKS, true}, /* in slots that are there */
    {"ucm/*/namespace.json", 0, BLOCKS, 2 * BLOCKS, true},
    {"ucm/*/r*", 0, 0, BLOCKS, true},
    {"ucm/*/r*/lock", 0, BLOCKS, 2 * BLOCKS, true}, /* in a lane of their own */
    {"ucm/*/r*/journal", 0, 0, BLOCKS, true},
    {"ucm/*/r*/journal.new", 0, BLOCKS, 2 * BLOCKS, true},
    {"ucm/*/r*/seg-000000", 0, 0, BLOCKS, true},
};

/* ---- what is outside ---- */

static uint64_t digest; /* nftw passes no argument */

static int add_to_digest(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    char buf[65536];
    uint64_t meta[] = {st->st_ino, st->st_mode, (uint64_t)st->st_size, (uint64_t)st->st_mtim.tv_sec,
                       (uint64_t)st->st_mtim.tv_nsec};
    digest += ucmi_hash64(path, strlen(path), ucmi_hash64(meta, sizeof meta, 0));
    int fd = S_ISREG(st->st_mode) ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    for (ssize_t n; fd >= 0 && (n = read(fd, buf, sizeof buf)) > 0;)
        digest = ucmi_hash64(buf, (size_t)n, digest);
    if (fd >= 0)
        close(fd);
    return 0;
}

static uint64_t digest_of(const char *dir)
{
    digest = 0;
    nftw(dir, add_to_digest, 16, FTW_PHYS);
    return digest;
}

/* ---- strangers ---- */

static void as_link(const char *path, const char *outside)
{
    assert_int_equal(symlink(outside, path), 0);
}
static void as_fifo(const char *path, const char *outside)
{
    assert_int_equal(mkfifo(path, 0600), 0);
}
static void as_directory(const char *path, const char *outside)
{
    assert_int_equal(mkdir(path, 0700), 0);
}

/* The path below dir that the pattern names; journal.new is one that is not there otherwise. */
static void path_of(const char *dir, const char *pattern, char *path, size_t len)
{
    char all[512];
    glob_t g;
    bool new = strstr(pattern, "journal.new") != NULL;
    snprintf(all, sizeof all, "%s/%s", dir, pattern);
    if (new)
        all[strlen(all) - strlen(".new")] = '\0';
    assert_int_equal(glob(all, 0, NULL, &g), 0);
    assert_int_equal(g.gl_pathc, 1);
    snprintf(path, len, "%s%s", g.gl_pathv[0], new ? ".new" : "");
    globfree(&g);
}

static void fill(const char *dir, const char *options, uint64_t first)
{
    ucm_store *store = open_store(dir, &shape, options);
    struct memory m;
    memory_new(&m, store, &shape, BLOCKS);
    dump_all(store, &m, first);
    memory_free(&m);
    ucm_store_close(store);
}

static unsigned count_right(ucm_store *store, uint64_t first)
{
    struct memory m;
    unsigned right = 0;
    memory_new(&m, store, &shape, BLOCKS);
    struct outcome out = move(store, &m, false, first, 0, 0);
    for (uint64_t i = 0; i < BLOCKS; i++) {
        if (out.status[i])
            continue;
        assert_true(painted(&m, i, first + i));
        right++;
    }
    free(out.status);
    memory_free(&m);
    return right;
}

static bool dump_some(ucm_store *store, uint64_t first)
{
    struct memory m;
    memory_new(&m, store, &shape, BLOCKS);
    for (uint64_t i = 0; i < BLOCKS; i++)
        paint(&m, i, first + i);
    struct outcome out = move(store, &m, true, first, 0, 0);
    free(out.status);
    memory_free(&m);
    return out.stored == 0;
}

static void count_block(void *arg, const struct ucm_lane_info *lane, const struct ucm_block_info *b)
{
    *(unsigned *)arg += b->err == 0;
}

static void meet(const char *dir, const struct kind *kind, const char *options)
{
    char why[512];
    ucm_store *store = NULL;
    int err = try_open(dir, &shape, options, &store, why, sizeof why);
    if (err != kind->open)
        fail_msg("%s: opens with %d: %s", kind->pattern, err, why);
    if (err) {
        assert_non_null(strstr(why, "not followed"));
        return;
    }
    unsigned there = count_right(store, 0);
    bool dumps = dump_some(store, 100);
    unsigned again = count_right(store, 100);
    ucm_store_close(store);
    unsigned visible = 0;
    struct ucm_inspect how = {.flags = UCM_INSPECT_VERIFY, .arg = &visible, .block = count_block};
    assert_int_equal(ucm_inspect(dir, &how), 0);
    if (there != kind->there || dumps != kind->dumps || again != (dumps ? BLOCKS : 0) ||
        visible != kind->visible)
        fail_msg("%s: %u of the blocks there, new ones %d, %u; %u visible", kind->pattern, there,
                 dumps, again, visible);
}

/* A store with blocks 0 to BLOCKS - 1 in dir/in; dir/out is a copy of it, which a follower would
 * find all he expects in. */
static void try_all(const char *dir, void (*as)(const char *path, const char *outside),
                    const char *more)
{
    char in[256], out[256], path[512], target[512], options[128], command[1024];
    snprintf(in, sizeof in, "%s/in", dir);
    snprintf(out, sizeof out, "%s/out", dir);
    snprintf(options, sizeof options, "posix_segment_mb=1 posix_capacity_gb=0.1 %s", more);
    for (size_t i = 0; i < ARRAY_LEN(kinds); i++) {
        assert_int_equal(mkdir(in, 0700), 0);
        fill(in, options, 0);
        snprintf(command, sizeof command, "cp -a %s %s", in, out);
        assert_int_equal(system(command), 0);
        path_of(in, kinds[i].pattern, path, sizeof path);
        path_of(out, kinds[i].pattern, target, sizeof target);
        remove_tree(path);
        if (strstr(path, "journal.new")) { /* and what would be compacted into it */
            int fd = open(target, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
            assert_int_equal(write(fd, "outside", 7), 7);
            close(fd);
        }
        as(path, target);
        uint64_t before = digest_of(out);
        meet(in, &kinds[i], options);
        if (digest_of(out) != before)
            fail_msg("%s: what it led to was changed", kinds[i].pattern);
        remove_tree(in);
        remove_tree(out);
    }
}

static void links_are_not_followed(void **state)
{
    try_all(*state, as_link, "");
    try_all(*state, as_link, "io_direct=1");
}

static void fifos_are_not_waited_for(void **state)
{
    try_all(*state, as_fifo, "");
    try_all(*state, as_fifo, "io_direct=1");
}

static void the_path_the_user_gave_may_be_a_link(void **state)
{
    char real[256], link[256];
    snprintf(real, sizeof real, "%s/real", (char *)*state);
    snprintf(link, sizeof link, "%s/link", (char *)*state);
    assert_int_equal(mkdir(real, 0700), 0);
    assert_int_equal(symlink("real", link), 0);
    fill(link, NULL, 0);
    ucm_store *store = open_store(real, &shape, NULL);
    assert_int_equal(count_right(store, 0), BLOCKS);
    ucm_store_close(store);
    unsigned visible = 0;
    struct ucm_inspect how = {.arg = &visible, .block = count_block};
    assert_int_equal(ucm_inspect(link, &how), 0);
    assert_int_equal(visible, BLOCKS);
}

/* Each journal is written anew under a name of its own: what has that name, a link out of the
 * backend or one more name of a file outside, is not what is written. */
static void a_new_journal_is_a_new_file(void **state)
{
    char outside[256], path[512], text[16] = "";
    snprintf(outside, sizeof outside, "%s/outside", (char *)*state);
    for (int hard = 0; hard < 2; hard++) {
        fill(*state, NULL, 0);
        int fd = open(outside, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        assert_int_equal(write(fd, "outside", 7), 7);
        lane_path(*state, "journal.new", path, sizeof path);
        assert_int_equal(hard ? link(outside, path) : symlink(outside, path), 0);
        lane_path(*state, "journal", path, sizeof path);
        assert_int_equal(truncate(path, 100), 0); /* so that a new one is made */
        fill(*state, NULL, 100);
        assert_int_equal(pread(fd, text, sizeof text, 0), 7);
        assert_string_equal(text, "outside");
        close(fd);
        assert_int_equal(count_lanes(*state), 1); /* taken over */
        assert_int_equal(unlink(outside), 0);
        snprintf(path, sizeof path, "%s/ucm", (char *)*state);
        remove_tree(path);
    }
}

/* A FIFO cannot be opened for O_DIRECT.  Over NFS, where all files are, that must not be taken for
 * what the file system can. */
static void a_fifo_says_nothing_about_direct_io(void **state)
{
    static struct ucmi_posix p = {.io.ops = &ucmi_io_psync};
    int dir = open(*state, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_int_equal(mkfifoat(dir, "fifo", 0600), 0);
    assert_int_equal(ucmi_file_open(&p, dir, "fifo", O_RDWR | O_DIRECT), -ELOOP);
    assert_int_equal(ucmi_file_open(&p, dir, "none", O_RDWR | O_DIRECT), -ENOENT);
    close(dir);
}

/* Engines treat O_NONBLOCK as a wish: it is not left on what is opened. */
static void what_is_opened_is_as_asked_for(void **state)
{
    static struct ucmi_posix p = {.io.ops = &ucmi_io_psync};
    int dir = open(*state, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int fd = ucmi_file_open(&p, dir, "file", O_RDWR | O_CREAT | O_DSYNC);
    assert_true(fd >= 0);
    int flags = fcntl(fd, F_GETFL);
    assert_int_equal(flags & O_NONBLOCK, 0);
    assert_int_equal(flags & O_DSYNC, O_DSYNC);
    assert_int_equal(flags & O_ACCMODE, O_RDWR);
    assert_int_equal(fcntl(fd, F_GETFD), FD_CLOEXEC);
    close(fd);
    close(dir);
}

/* A header changed in place, or a new one, may not give places another meaning under a load. */
static void segments_keep_their_size_under_a_load(void **state)
{
    static struct ucmi_posix p;
    static struct ucmi_journal_header h;
    struct ucm_geometry geo = {.ranks = 1, .nshards = 2, .shard_size = 4096, .block_size = 8192};
    struct ucmi_lane lane = {.slots = 10, .ios = 1};
    p.geo = &geo;
    h.ranks = 1;
    h.shard_size = 4096;
    h.block_size = 8192;
    h.slots = 10;
    assert_int_equal(ucmi_lane_takes(&p, &lane, &h), 0);
    h.slots = 11;
    assert_int_equal(ucmi_lane_takes(&p, &lane, &h), -EBUSY);
    lane.ios = 0;
    assert_int_equal(ucmi_lane_takes(&p, &lane, &h), 0);
    h.ns[0] = 1;
    assert_int_equal(ucmi_lane_takes(&p, &lane, &h), -ENOTSUP);
}

/* Room is made by removing a dead lane of another namespace: its files, no others. */
static void only_our_files_are_removed(void **state)
{
    static const char *const alien[] = {"notes.txt", "seg-1", "seg-000000.bak", "journal.old"};
    char lane[512], path[600], outside[256];
    snprintf(outside, sizeof outside, "%s/outside", (char *)*state);
    fill(*state, "posix_segment_mb=1 namespace=old", 0);
    int fd = open(outside, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_int_equal(write(fd, "outside", 7), 7);
    close(fd);
    lane_path(*state, "", lane, sizeof lane);
    for (size_t i = 0; i < ARRAY_LEN(alien); i++) {
        snprintf(path, sizeof path, "%s%s", lane, alien[i]);
        close(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    }
    snprintf(path, sizeof path, "%sseg-000007", lane);
    assert_int_equal(symlink(outside, path), 0);
    ucm_store *store = open_store(*state, &shape, "posix_segment_mb=1 posix_capacity_gb=0.0015");
    struct memory m;
    memory_new(&m, store, &shape, BLOCKS);
    dump_all(store, &m, 0); /* does not fit beside the other */
    memory_free(&m);
    ucm_store_close(store);
    snprintf(path, sizeof path, "%sseg-000000", lane);
    assert_int_equal(access(path, F_OK), -1);
    snprintf(path, sizeof path, "%slock", lane);
    assert_int_equal(access(path, F_OK), -1); /* it is no lane any more */
    for (size_t i = 0; i < ARRAY_LEN(alien); i++) {
        snprintf(path, sizeof path, "%s%s", lane, alien[i]);
        if (access(path, F_OK) < 0)
            fail_msg("%s was removed", path);
    }
    struct stat st;
    assert_int_equal(stat(outside, &st), 0);
    assert_int_equal(st.st_size, 7);
}

/* Where nobody can be kept from counting at the same time, nobody can say what fits. */
static void without_a_lock_nothing_grows(void **state)
{
    char path[512];
    fill(*state, NULL, 0);
    snprintf(path, sizeof path, "%s/ucm/lock", (char *)*state);
    for (int fifo = 0; fifo < 2; fifo++) {
        assert_int_equal(unlink(path), 0);
        if (fifo)
            as_fifo(path, NULL);
        else
            as_link(path, "namespace.json");
        ucm_store *store = open_store(*state, &shape, "namespace=another");
        assert_false(dump_some(store, 0));
        ucm_store_close(store);
    }
    assert_int_equal(count_lanes(*state), 1);
}

static void directories_in_the_place_of_files(void **state)
{
    static const char *const names[] = {"seg-000000", "journal", "journal.new", "lock"};
    char path[512];
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        fill(*state, NULL, 0);
        lane_path(*state, names[i], path, sizeof path);
        remove(path);
        as_directory(path, NULL);
        ucm_store *store = open_store(*state, &shape, NULL);
        count_right(store, 0);
        assert_true(dump_some(store, 100));
        assert_int_equal(count_right(store, 100), BLOCKS);
        ucm_store_close(store);
        unsigned visible = 0;
        struct ucm_inspect how = {
            .flags = UCM_INSPECT_VERIFY, .arg = &visible, .block = count_block};
        assert_int_equal(ucm_inspect(*state, &how), 0);
        assert_true(visible >= BLOCKS);
        assert_int_equal(access(path, F_OK), 0);
        snprintf(path, sizeof path, "%s/ucm", (char *)*state);
        remove_tree(path);
    }
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(links_are_not_followed),
        TEST(fifos_are_not_waited_for),
        TEST(without_a_lock_nothing_grows),
        TEST(directories_in_the_place_of_files),
        TEST(the_path_the_user_gave_may_be_a_link),
        TEST(a_new_journal_is_a_new_file),
        TEST(a_fifo_says_nothing_about_direct_io),
        TEST(what_is_opened_is_as_asked_for),
        TEST(segments_keep_their_size_under_a_load),
        TEST(only_our_files_are_removed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

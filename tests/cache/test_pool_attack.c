/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pool under attack: processes killed wherever they are while they join, fill, evict and leave,
 * stopped for long, and a filesystem with no room.  Who lives goes on, and no slot is lost for
 * good.
 */
#include "harness.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "slots.h"
#include "support.h"

enum { SLOTS = 8, KEYS = 40, KILLS = 60 };
/* A block is loaded, or dumped if it is not there; false: it cannot be had now. */
static bool use(struct ucmi_pool *p, uint64_t i)
{
    uint32_t slot;
    enum ucmi_pool_got got = pool_get(p, i, &slot);
    if (got != UCMI_POOL_READY && got != UCMI_POOL_CLAIMED)
        return false;
    if (got == UCMI_POOL_CLAIMED) {
        pool_paint(p, slot, i);
        ucmi_pool_publish(p, slot);
    }
    if (!pool_painted(p, slot, i))
        abort();
    ucmi_pool_unpin(p, slot);
    return true;
}

/* All slots can be had by who is alone, and nothing is held. */
static void check_all_slots(struct ucmi_pool *p)
{
    assert_int_equal(ts_slots_kept(p), 0);
    assert_int_equal(atomic_load(&p->head->ready), 0);
    assert_int_equal(atomic_load(&p->head->quarantined), 0);
}

static pid_t start(const char *dir)
{
    pid_t pid = fork();
    if (pid)
        return pid;
    for (uint64_t n = (uint64_t)getpid();; n += 7) {
        struct ucmi_pool *p = pool_in(dir, 0, SLOTS);
        for (uint64_t k = 0; k < 20; k++)
            use(p, (n + k * k) % KEYS);
        ucmi_pool_close(p);
    }
}

/* Killed at any instruction: of making, joining, filling, evicting or leaving. */
static void killed_anywhere(void **state)
{
    uint64_t random = 1;
    for (int i = 0; i < KILLS; i++) {
        pid_t pid[2] = {start(*state), start(*state)};
        random = random * UINT64_C(6364136223846793005) + 1442695040888963407;
        struct timespec t = {.tv_nsec = (long)(random >> 33) % 4000000};
        nanosleep(&t, NULL); /* the moment is the point: any will do */
        for (int k = 0; k < 2; k++) {
            int status;
            assert_int_equal(kill(pid[k], SIGKILL), 0);
            assert_int_equal(waitpid(pid[k], &status, 0), pid[k]);
            assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        }
        struct ucmi_pool *p = pool_in(*state, 0, SLOTS);
        for (uint64_t k = 0; k < KEYS; k++)
            assert_true(use(p, k) || use(p, k));
        check_all_slots(p);
        if (i % 2)
            ucmi_pool_close(p);
        else /* not in order either */
            close(p->fd), p->fd = -1, ucmi_pool_close(p);
    }
    struct ucmi_pool *p = pool_in(*state, 0, SLOTS);
    ucmi_pool_close(p);
    assert_int_equal(count_files(*state), 0);
}

/* One that is stopped is alive: what it holds stays its own, for as long as that takes (the clock
 * of the quarantine stands at 0 here), and the others use the rest. */
static void stopped_for_long(void **state)
{
    int ready[2], done[2], status;
    char byte = 0;
    assert_int_equal(pipe(ready) | pipe(done), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct ucmi_pool *p = pool_in(*state, 0, SLOTS);
        uint32_t slot, pinned;
        if (!use(p, 1) || pool_get(p, 1, &pinned) != UCMI_POOL_READY ||
            pool_get(p, 2, &slot) != UCMI_POOL_CLAIMED || write(ready[1], &byte, 1) != 1)
            abort();
        raise(SIGSTOP);
        if (!pool_painted(p, pinned, 1))
            abort();
        ucmi_pool_unpin(p, pinned);
        pool_paint(p, slot, 2);
        ucmi_pool_publish(p, slot);
        ucmi_pool_unpin(p, slot);
        if (write(ready[1], &byte, 1) != 1 || read(done[0], &byte, 1) != 1)
            abort();
        ucmi_pool_close(p);
        _exit(0);
    }
    struct ucmi_pool *p = pool_in(*state, 0, SLOTS);
    uint32_t slot;
    assert_int_equal(read(ready[0], &byte, 1), 1);
    assert_int_equal(waitpid(pid, &status, WUNTRACED), pid);
    assert_true(WIFSTOPPED(status));
    for (uint64_t i = 10; i < 10 + KEYS; i++) {
        assert_true(use(p, i));
        ucmi_pool_sweep(p);
    }
    assert_int_equal(pool_get(p, 2, &slot), UCMI_POOL_BUSY);
    struct ucmi_pool *q = pool_in(*state, 0, SLOTS); /* and one can join and leave */
    ucmi_pool_close(q);
    assert_int_equal(kill(pid, SIGCONT), 0);
    assert_int_equal(read(ready[0], &byte, 1), 1);
    assert_true(use(p, 2));
    assert_int_equal(write(done[1], &byte, 1), 1);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    check_all_slots(p);
    ucmi_pool_close(p);
    assert_int_equal(count_files(*state), 0);
}

/* One is stopped while it has the gate: nobody waits for it, and what the dead left is taken back
 * when it is gone. */
static void stopped_at_the_gate(void **state)
{
    struct ucmi_pool *p = pool_in(*state, 0, SLOTS);
    uint32_t slot;
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        struct ucmi_pool *own = pool_in(*state, 0, SLOTS);
        struct flock gate = {.l_type = F_WRLCK, .l_start = UCMI_POOL_MEMBERS, .l_len = 1};
        if (pool_get(own, 1, &slot) != UCMI_POOL_CLAIMED || fcntl(own->fd, F_OFD_SETLK, &gate))
            abort();
        raise(SIGSTOP);
        abort();
    }
    assert_int_equal(waitpid(pid, &status, WUNTRACED), pid);
    assert_true(WIFSTOPPED(status));
    for (uint64_t i = 10; i < 10 + KEYS; i++)
        assert_true(use(p, i));
    assert_int_equal(ucmi_pool_sweep(p), 0);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    check_all_slots(p);
    ucmi_pool_close(p);
    assert_int_equal(count_files(*state), 0);
}

/* ---- what the dead have sent for ---- */

/* Its slot can be used again at once, and nothing that comes late gets into it.  A pipe holds on to
 * the pages as a read that is under way does: what it shows is what such a read writes to. */
static void what_comes_late_goes_nowhere(void **state)
{
    struct ucmi_pool_spec spec = pool_spec(*state, 0, SLOTS);
    spec.quarantine_ms = 1000000000; /* there is no need to wait */
    struct ucmi_pool *p = pool_open(&spec);
    int ready[2], late[2], status;
    uint32_t slot;
    assert_int_equal(pipe(ready) | pipe(late), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct ucmi_pool *own = pool_in(*state, 0, SLOTS);
        if (pool_get(own, 1, &slot) != UCMI_POOL_CLAIMED)
            abort();
        pool_paint(own, slot, 99);
        if (write(ready[1], &slot, sizeof slot) != sizeof slot)
            abort();
        for (;;)
            pause();
    }
    assert_int_equal(read(ready[0], &slot, sizeof slot), sizeof slot);
    struct iovec page = {ucmi_pool_memory(p, slot), UCMI_PAGE};
    assert_int_equal(vmsplice(late[1], &page, 1, 0), UCMI_PAGE);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    check_all_slots(p);
    for (uint64_t i = 0; i < SLOTS; i++)
        assert_true(use(p, 10 + i));
    assert_int_equal(pool_state(p, slot), UCMI_SLOT_READY);
    uint64_t seen[UCMI_PAGE / sizeof(uint64_t)];
    assert_int_equal(read(late[0], seen, sizeof seen), sizeof seen);
    for (size_t k = 0; k < TS_LEN(seen); k++)
        assert_int_equal(seen[k], 99); /* another page than the one in use now */
    ucmi_pool_close(p);
}

/* ---- others ---- */

/* Another size of blocks or of shards, the same name: never the same memory. */
static void another_geometry(void **state)
{
    struct ucmi_pool *p = pool_in(*state, 0, SLOTS);
    struct ucmi_pool_spec spec[2] = {pool_spec(*state, 0, SLOTS), pool_spec(*state, 0, SLOTS)};
    for (uint64_t i = 0; i < SLOTS; i++)
        pool_put(p, i);
    spec[0].block_size *= 2;
    spec[1].shard_size /= 4;
    for (int k = 0; k < 2; k++) {
        struct ucmi_pool *q = pool_open(&spec[k]);
        assert_int_equal(q->fd, -1);
        assert_false(pool_found(q, 1));
        pool_put(q, 1);
        ucmi_pool_close(q);
    }
    for (uint64_t i = 0; i < SLOTS; i++)
        assert_true(pool_right(p, i));
    ucmi_pool_close(p);
    assert_int_equal(count_files(*state), 0);
}

/* More or less memory than the pool was made with: it is joined as it is. */
static void another_capacity(void **state)
{
    struct ucmi_pool *p = pool_in(*state, 0, SLOTS);
    pool_put(p, 1);
    for (uint32_t nslots = 1; nslots <= 16 * SLOTS; nslots *= 4) {
        struct ucmi_pool *q = pool_in(*state, 0, nslots);
        assert_int_equal(q->layout.nslots, SLOTS);
        assert_int_equal(q->layout.size, p->layout.size);
        assert_true(pool_right(q, 1));
        for (uint64_t i = 10; i < 10 + KEYS; i++)
            assert_true(use(q, i) && use(p, i) && use(q, 1));
        ucmi_pool_close(q);
    }
    assert_true(pool_right(p, 1));
    ucmi_pool_close(p);
    assert_int_equal(count_files(*state), 0);
}

enum { NOBODY = 65534 };

static void become_nobody(void)
{
    if (setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY))
        abort();
}

/* Our pool is not another user's, who has one of the same namespace beside it and cannot open
 * ours, kill it or be found in it. */
static void live_beside(const char *dir, const char *theirs)
{
    become_nobody();
    struct ucmi_pool *p = pool_in(dir, 0, SLOTS);
    if (pool_found(p, 1) || access(theirs, R_OK) == 0 || open(theirs, O_RDWR) >= 0 ||
        unlink(theirs) == 0)
        abort();
    for (uint64_t i = 0; i < KEYS; i++)
        if (!use(p, i + 100))
            abort();
    ucmi_pool_close(p);
}

static void in_a_child(void (*fn)(const char *dir, const char *path), const char *dir,
                       const char *path)
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        fn(dir, path);
        raise(SIGKILL); /* ThreadSanitizer would ask an exit for the threads of the parent */
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static void another_user(void **state)
{
    if (geteuid())
        TS_SKIP("only root can become another user");
    assert_int_equal(chmod(*state, 01777), 0);
    struct ucmi_pool *p = pool_in(*state, 0, SLOTS);
    pool_put(p, 1);
    in_a_child(live_beside, *state, p->path);
    assert_false(pool_found(p, 100));
    assert_true(pool_right(p, 1));
    assert_int_equal(count_files(*state), 1);
    ucmi_pool_close(p);
    assert_int_equal(count_files(*state), 0);
}

static void plant_file(const char *dir, const char *path)
{
    become_nobody();
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
    if (fd < 0 || fchmod(fd, 0666))
        abort();
}

static void plant_link(const char *dir, const char *path)
{
    become_nobody();
    if (symlink("/dev/zero", path))
        abort();
}

static void plant_fifo(const char *dir, const char *path)
{
    become_nobody();
    if (mkfifo(path, 0666))
        abort();
}

static void plant_directory(const char *dir, const char *path)
{
    become_nobody();
    if (mkdir(path, 0777))
        abort();
}

/* Whatever somebody puts where our pool would be: it is not used, and keeps nobody from working. */
static void the_name_is_taken(void **state)
{
    static void (*const plants[])(const char *, const char *) = {plant_file, plant_link, plant_fifo,
                                                                 plant_directory};
    if (geteuid())
        TS_SKIP("only root can become another user");
    assert_int_equal(chmod(*state, 01777), 0);
    struct ucmi_pool *p = pool_in(*state, 0, SLOTS);
    char *path = strdup(p->path);
    ucmi_pool_close(p);
    struct ucmi_pool_spec spec = pool_spec(*state, 0, SLOTS);
    for (size_t i = 0; i < TS_LEN(plants); i++) {
        in_a_child(plants[i], *state, path);
        p = pool_open(&spec);
        assert_int_equal(p->fd, -1);
        pool_put(p, 1);
        ucmi_pool_close(p);
        assert_int_equal(remove(path), 0);
    }
    p = pool_in(*state, 0, SLOTS);
    ucmi_pool_close(p);
    free(path);
}

/* ---- a filesystem with no room ---- */

static bool put_line(const char *path, const char *line)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool right = fd >= 0 && write(fd, line, strlen(line)) == (ssize_t)strlen(line);
    if (fd >= 0)
        close(fd);
    return right;
}

static int try_pool(const char *dir, uint32_t nslots, struct ucmi_pool **p, char *why)
{
    struct ucmi_pool_spec spec = pool_spec(dir, 0, nslots);
    return ucmi_pool_open(&spec, p, why, 512);
}

/* 0: as it must be; 77: this system gives us no tmpfs of our own. */
static int live_in_a_tiny_one(const char *dir)
{
    char why[512] = "", user[64], group[64], big[4096];
    struct ucmi_pool *p = NULL, *q = NULL;
    snprintf(user, sizeof user, "0 %u 1", (unsigned)geteuid());
    snprintf(group, sizeof group, "0 %u 1", (unsigned)getegid());
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0 || !put_line("/proc/self/uid_map", user) ||
        !put_line("/proc/self/setgroups", "deny") || !put_line("/proc/self/gid_map", group) ||
        mount("ucm-tiny", dir, "tmpfs", 0, "size=128k") < 0)
        return 77;
    if (try_pool(dir, 64, &p, why) != -ENOSPC || !strstr(why, "cache_buffer_capacity_gb") ||
        count_files(dir))
        return 1;
    if (try_pool(dir, SLOTS, &p, why) < 0 || p->fd < 0)
        return 2;
    snprintf(big, sizeof big, "%s/others", dir); /* fill what is left */
    int fd = open(big, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    memset(big, 1, sizeof big);
    while (write(fd, big, sizeof big) > 0)
        ;
    close(fd);
    for (uint64_t i = 0; i < KEYS; i++) /* the space is ours already: no SIGBUS */
        if (!use(p, i))
            return 3;
    if (try_pool(dir, SLOTS, &q, why) < 0 || q->fd < 0) /* joining takes none */
        return 4;
    ucmi_pool_close(q);
    ucmi_pool_close(p);
    if (try_pool(dir, SLOTS * 4, &p, why) != -ENOSPC || count_files(dir) != 1)
        return 5;
    return 0;
}

static void no_room_in_the_filesystem(void **state)
{
    int status;
    pid_t pid = fork();
    if (pid == 0)
        _exit(live_in_a_tiny_one(*state));
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        TS_SKIP("no user namespaces for us (a sanitizer's thread is enough): no tmpfs of our own");
    assert_int_equal(status, 0);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)
    const struct CMUnitTest tests[] = {
        TEST(killed_anywhere),
        TEST(stopped_for_long),
        TEST(stopped_at_the_gate),
        TEST(what_comes_late_goes_nowhere),
        TEST(another_geometry),
        TEST(another_capacity),
        TEST(another_user),
        TEST(the_name_is_taken),
        TEST(no_room_in_the_filesystem),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

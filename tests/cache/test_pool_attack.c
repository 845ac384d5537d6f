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
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "store/pool.h"

enum { SLOTS = 8, KEYS = 40, KILLS = 60 };
static struct ucm_counters counters;

static int open_pool(const char *dir, uint32_t nslots, struct ucmi_pool **p, char *why)
{
    struct ucmi_pool_spec spec = {
        .dir = dir,
        .bytes = ucmi_pool_bytes(nslots, 4096),
        .block_size = 4096,
        .shard_size = 4096,
        .counters = &counters,
    };
    return ucmi_pool_open(&spec, p, why, 512);
}

static struct ucmi_pool *pool_in(const char *dir)
{
    char why[512] = "";
    struct ucmi_pool *p = NULL;
    if (open_pool(dir, SLOTS, &p, why) < 0 || p->fd < 0) {
        fprintf(stderr, "no pool: %s\n", why);
        abort();
    }
    return p;
}

static enum ucmi_pool_got get(struct ucmi_pool *p, uint64_t i, uint32_t *slot)
{
    struct ucmi_pool_want want = {.key = key_of(i)};
    return ucmi_pool_get(p, &want, UCMI_POOL_EVICT, slot);
}

/* A block's bytes are its number; false: it cannot be had now. */
static bool use(struct ucmi_pool *p, uint64_t i)
{
    uint32_t slot;
    enum ucmi_pool_got got = get(p, i, &slot);
    if (got != UCMI_POOL_READY && got != UCMI_POOL_CLAIMED)
        return false;
    uint64_t *bytes = (uint64_t *)ucmi_pool_memory(p, slot);
    if (got == UCMI_POOL_CLAIMED) {
        for (size_t k = 0; k < 512; k++)
            bytes[k] = i;
        ucmi_pool_publish(p, slot);
    }
    for (size_t k = 0; k < 512; k++)
        if (bytes[k] != i)
            abort();
    ucmi_pool_unpin(p, slot);
    return true;
}

/* All slots can be had by who is alone, and nothing is held. */
static void check_all_slots(struct ucmi_pool *p)
{
    uint32_t slots[SLOTS];
    ucmi_pool_sweep(p);
    ucmi_pool_sweep(p); /* what the first put into quarantine */
    for (uint64_t i = 0; i < SLOTS; i++) {
        assert_int_equal(atomic_load(&p->metas[i].holders), 0);
        assert_int_equal(get(p, 1000 + i, &slots[i]), UCMI_POOL_CLAIMED);
    }
    for (uint64_t i = 0; i < SLOTS; i++)
        ucmi_pool_drop(p, slots[i]);
    assert_int_equal(atomic_load(&p->head->ready), 0);
    assert_int_equal(atomic_load(&p->head->quarantined), 0);
}

static pid_t start(const char *dir)
{
    pid_t pid = fork();
    if (pid)
        return pid;
    for (uint64_t n = (uint64_t)getpid();; n += 7) {
        struct ucmi_pool *p = pool_in(dir);
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
        struct ucmi_pool *p = pool_in(*state);
        for (uint64_t k = 0; k < KEYS; k++)
            assert_true(use(p, k) || use(p, k));
        check_all_slots(p);
        if (i % 2)
            ucmi_pool_close(p);
        else /* not in order either */
            close(p->fd), p->fd = -1, ucmi_pool_close(p);
    }
    struct ucmi_pool *p = pool_in(*state);
    ucmi_pool_close(p);
    assert_int_equal(count_files(*state), 0);
}

/* One that is stopped is alive: what it holds stays its own, for as long as that takes, and the
 * others use the rest. */
static void stopped_for_long(void **state)
{
    int ready[2], done[2], status;
    char byte = 0;
    assert_int_equal(pipe(ready) | pipe(done), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct ucmi_pool *p = pool_in(*state);
        uint32_t slot, pinned;
        if (!use(p, 1) || get(p, 1, &pinned) != UCMI_POOL_READY ||
            get(p, 2, &slot) != UCMI_POOL_CLAIMED || write(ready[1], &byte, 1) != 1)
            abort();
        raise(SIGSTOP);
        if (*(uint64_t *)ucmi_pool_memory(p, pinned) != 1)
            abort();
        ucmi_pool_unpin(p, pinned);
        for (size_t k = 0; k < 512; k++)
            ((uint64_t *)ucmi_pool_memory(p, slot))[k] = 2;
        ucmi_pool_publish(p, slot);
        ucmi_pool_unpin(p, slot);
        if (write(ready[1], &byte, 1) != 1 || read(done[0], &byte, 1) != 1)
            abort();
        ucmi_pool_close(p);
        _exit(0);
    }
    struct ucmi_pool *p = pool_in(*state);
    uint32_t slot;
    assert_int_equal(read(ready[0], &byte, 1), 1);
    assert_int_equal(waitpid(pid, &status, WUNTRACED), pid);
    assert_true(WIFSTOPPED(status));
    for (uint64_t i = 10; i < 10 + KEYS; i++) {
        assert_true(use(p, i));
        ucmi_pool_sweep(p);
    }
    assert_int_equal(get(p, 2, &slot), UCMI_POOL_BUSY);
    struct ucmi_pool *q = pool_in(*state); /* and one can join and leave */
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

/* ---- a filesystem with no room ---- */

static bool put_line(const char *path, const char *line)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool right = fd >= 0 && write(fd, line, strlen(line)) == (ssize_t)strlen(line);
    if (fd >= 0)
        close(fd);
    return right;
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
    if (open_pool(dir, 64, &p, why) != -ENOSPC || !strstr(why, "cache_buffer_capacity_gb") ||
        count_files(dir))
        return 1;
    if (open_pool(dir, SLOTS, &p, why) < 0 || p->fd < 0)
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
    if (open_pool(dir, SLOTS, &q, why) < 0 || q->fd < 0) /* joining takes none */
        return 4;
    ucmi_pool_close(q);
    ucmi_pool_close(p);
    if (open_pool(dir, SLOTS * 4, &p, why) != -ENOSPC || count_files(dir) != 1)
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
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        print_message("# skipped: no user namespaces here: no tmpfs of our own can be mounted\n");
        return;
    }
    assert_int_equal(status, 0);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)
    const struct CMUnitTest tests[] = {
        TEST(killed_anywhere),
        TEST(stopped_for_long),
        TEST(no_room_in_the_filesystem),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

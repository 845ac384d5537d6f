/* SPDX-License-Identifier: Apache-2.0 */
/*
 * io_test.h - what the tests of engines, files and devices share: scratch files, patterns, and a
 * kernel that refuses a system call.
 */
#ifndef UCMT_IO_TEST_H
#define UCMT_IO_TEST_H

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../test.h"

/* A nameless file that is gone with its descriptor; -1 where the file system refuses the flags. */
static inline int scratch_file(int flags)
{
    const char *dir = getenv("TMPDIR");
    return open(dir ? dir : "/var/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC | flags, 0600);
}

/* The byte at an offset of a file, different in neighbouring pages and sectors. */
static inline unsigned char pattern(uint64_t at)
{
    return (unsigned char)((at * 0x9e3779b97f4a7c15u) >> 56);
}

static inline void fill_pattern(void *p, size_t len, uint64_t at)
{
    for (size_t i = 0; i < len; i++)
        ((unsigned char *)p)[i] = pattern(at + i);
}

static inline int has_pattern(const void *p, size_t len, uint64_t at)
{
    for (size_t i = 0; i < len; i++)
        if (((const unsigned char *)p)[i] != pattern(at + i))
            return 0;
    return 1;
}

static inline void *aligned(size_t len)
{
    void *p = aligned_alloc(4096, (len + 4095) / 4096 * 4096);
    assert_non_null(p);
    return p;
}

/* From now on this process and its children get -err from that system call; 0 if it could be had.
 */
static inline int deny_syscall(unsigned nr, unsigned err)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | err),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog prog = {.len = sizeof code / sizeof code[0], .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -errno;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog) < 0 ? -errno : 0;
}

/* Runs fn in a child of its own, so that what it does to the process ends with it.  fn returns
 * NULL, or what went wrong, or one beginning with "skip:". */
static inline void in_child(const char *(*fn)(void))
{
    char text[512] = "";
    int fds[2], status;
    assert_int_equal(pipe(fds), 0);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        const char *wrong = fn();
        if (wrong && write(fds[1], wrong, strlen(wrong)) < 0)
            _exit(2);
        _exit(wrong != NULL);
    }
    close(fds[1]);
    ssize_t n = read(fds[0], text, sizeof text - 1);
    close(fds[0]);
    assert_true(n >= 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (strncmp(text, "skip:", 5) == 0) {
        print_message("# %s\n", text); /* cmocka 1.1 reports a skip() as a failure to TAP */
        return;
    }
    if (status != 0)
        fail_msg("child: status %#x: %s", status, text);
}

#endif

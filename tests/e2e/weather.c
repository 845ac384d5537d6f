/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The weather that a real engine's storage has, for tests: loaded before libc (LD_PRELOAD), it
 * makes reads, writes and new directories of this process take longer, or hang, as the file named
 * by UCM_TEST_WEATHER says: three int32, in ms, -1: until it says otherwise.  With the I/O engine
 * psync.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READS, WRITES, MKDIRS, KINDS };

/* Not before the first call: a fork of the process is told its weather by its environment. */
static const volatile int32_t *weather(void)
{
    static const volatile int32_t calm[KINDS], *now;
    const char *path = getenv("UCM_TEST_WEATHER");
    if (now || !path)
        return now ? now : calm;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    void *map = mmap(NULL, sizeof calm, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        abort();
    close(fd);
    return now = map;
}

static void outlast(int kind)
{
    const volatile int32_t *ms = weather() + kind;
    for (int32_t past = 0; *ms < 0 || past < *ms; past++)
        usleep(1000);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t preadv64(int fd, const struct iovec *iov, int n, off64_t off)
{
    outlast(READS);
    return NEXT(preadv64)(fd, iov, n, off);
}

ssize_t pwritev64(int fd, const struct iovec *iov, int n, off64_t off)
{
    outlast(WRITES);
    return NEXT(pwritev64)(fd, iov, n, off);
}

int mkdirat(int at, const char *path, mode_t mode)
{
    outlast(MKDIRS);
    return NEXT(mkdirat)(at, path, mode);
}

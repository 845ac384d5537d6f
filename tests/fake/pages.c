/* SPDX-License-Identifier: Apache-2.0 */
/* pages.c - whether memory of the host is there. */
#include "core.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 4096, CACHESTAT = 451 };

/* What a driver does to memory that it registers is to use it: of a file all of it must have been
 * allocated.  A kernel too old to be asked (before 6.5) is believed. */
bool core_is_there(const char *p, size_t len)
{
    struct {
        uint64_t off, len;
    } range;
    struct {
        uint64_t cached, dirty, writeback, evicted, recently;
    } pages;
    char line[4352], path[4096];
    unsigned long from, to, off;
    bool there = true;
    FILE *maps = fopen("/proc/self/maps", "re");
    while (maps && fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx %*s %lx %*s %*s %4095s", &from, &to, &off, path) != 4 ||
            path[0] != '/' || to <= (uintptr_t)p || from >= (uintptr_t)p + len)
            continue;
        const char *first = (uintptr_t)p > from ? p : (char *)from;
        const char *end = (uintptr_t)p + len < to ? p + len : (char *)to;
        range.off = off + ((uintptr_t)first - from);
        range.len = (uint64_t)(end - first);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && syscall(CACHESTAT, fd, &range, &pages, 0) == 0)
            there = there && (pages.cached + pages.evicted) * PAGE >= range.len;
        if (fd >= 0)
            close(fd);
    }
    if (maps)
        fclose(maps);
    return there;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The world a test lives in: time, chance, directories that go away with the process, files to
 * damage, small filesystems to fill.  One thread.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "support.h"

static char root[TS_PATH / 4];
static pid_t root_owner;
static unsigned dirs;
static struct dir { /* names stay valid until the end */
    struct dir *next;
    char path[TS_PATH / 4 + 16];
} * all_dirs;

void ts_die(const char *fmt, ...)
{
    va_list ap;

    fflush(stdout);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    abort();
}

uint64_t ts_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

double ts_seconds(double def)
{
    const char *given = getenv("UCM_TEST_SECONDS");
    return given && *given ? atof(given) : def;
}

bool ts_every(void)
{
    return getenv("UCM_TEST_EVERY") != NULL;
}

uint64_t ts_seed(void)
{
    const char *given = getenv("UCM_TEST_SEED");
    uint64_t seed =
        given && *given ? strtoull(given, NULL, 0) : ts_now_ms() * 2654435761u + (uint64_t)getpid();
    printf("# UCM_TEST_SEED=%llu\n", (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

uint64_t ts_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* ---- directories ---- */

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    if (type == FTW_DNR && !chmod(path, 0700)) /* a test took its rights away */
        ts_remove(path);
    remove(path); /* what stays, stays: the rest can still go */
    return 0;
}

void ts_remove(const char *path)
{
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

static void unmount_below(const char *path)
{
    char line[2 * TS_PATH], dir[TS_PATH];
    FILE *f = fopen("/proc/self/mounts", "r");

    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "%*s %4095s", dir) == 1 && !strncmp(dir, path, strlen(path)))
            umount2(dir, MNT_DETACH);
    if (f)
        fclose(f);
}

static void remove_root(void)
{
    if (root_owner != getpid())
        return;
    unmount_below(root);
    ts_remove(root);
}

const char *ts_dir(void)
{
    struct dir *d = malloc(sizeof *d);

    if (!d)
        ts_die("no memory");
    if (root_owner != getpid()) {
        const char *tmp = getenv("TMPDIR");
        snprintf(root, sizeof root, "%s/ucm-test-XXXXXX", tmp && *tmp ? tmp : "/tmp");
        if (!mkdtemp(root) || chmod(root, 0755))
            ts_die("%s: %m", root);
        root_owner = getpid();
        if (getenv("UCM_TEST_KEEP"))
            printf("# kept: %s\n", root);
        else
            atexit(remove_root);
    }
    snprintf(d->path, sizeof d->path, "%s/%u", root, dirs++);
    if (mkdir(d->path, 0777) || chmod(d->path, 0777))
        ts_die("%s: %m", d->path);
    d->next = all_dirs;
    all_dirs = d;
    return d->path;
}

static int compare_paths(const void *a, const void *b)
{
    return strcmp(a, b);
}

static size_t find(const char *dir, const char *prefix, char (*paths)[TS_PATH], size_t n,
                   size_t max)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    char path[TS_PATH];
    struct stat st;

    while (d && (e = readdir(d))) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        if (snprintf(path, sizeof path, "%s/%s", dir, e->d_name) >= (int)sizeof path ||
            lstat(path, &st))
            continue;
        if (S_ISDIR(st.st_mode))
            n = find(path, prefix, paths, n, max);
        else if (S_ISREG(st.st_mode) && !strncmp(e->d_name, prefix, strlen(prefix)) && n < max)
            strcpy(paths[n++], path);
    }
    if (d)
        closedir(d);
    return n;
}

size_t ts_files(const char *dir, const char *prefix, char (*paths)[TS_PATH], size_t max)
{
    size_t n = find(dir, prefix, paths, 0, max);
    qsort(paths, n, sizeof paths[0], compare_paths);
    return n;
}

uint64_t ts_du(const char *dir, const char *prefix)
{
    enum { MAX = 256 };
    char(*paths)[TS_PATH] = malloc(MAX * sizeof *paths);
    size_t n = paths ? find(dir, prefix, paths, 0, MAX) : 0;
    uint64_t sum = 0;
    struct stat st;

    if (!paths || n == MAX)
        ts_die("%s: more than %d files", dir, MAX);
    for (size_t i = 0; i < n; i++)
        if (!lstat(paths[i], &st))
            sum += (uint64_t)st.st_blocks * 512;
    free(paths);
    return sum;
}

/* ---- files ---- */

static int open_or_die(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC, 0600);
    if (fd < 0)
        ts_die("%s: %m", path);
    return fd;
}

int64_t ts_file_size(const char *path)
{
    struct stat st;
    return stat(path, &st) ? -1 : st.st_size;
}

void ts_read_at(const char *path, off_t off, void *p, size_t len)
{
    int fd = open_or_die(path, O_RDONLY);
    if (pread(fd, p, len, off) != (ssize_t)len)
        ts_die("%s: cannot read %zu bytes at %lld", path, len, (long long)off);
    close(fd);
}

void ts_write_at(const char *path, off_t off, const void *p, size_t len)
{
    int fd = open_or_die(path, O_WRONLY | O_CREAT);
    if (pwrite(fd, p, len, off) != (ssize_t)len)
        ts_die("%s: cannot write %zu bytes at %lld", path, len, (long long)off);
    close(fd);
}

void ts_flip(const char *path, off_t off)
{
    uint8_t byte;
    ts_read_at(path, off, &byte, 1);
    byte ^= 1u << (off % 8);
    ts_write_at(path, off, &byte, 1);
}

void ts_truncate(const char *path, off_t size)
{
    if (truncate(path, size))
        ts_die("%s: %m", path);
}

void ts_copy_file(const char *from, const char *to)
{
    int64_t size = ts_file_size(from);
    char *all = malloc((size_t)size + 1);
    if (!all)
        ts_die("%s: no memory for %lld bytes", from, (long long)size);
    ts_read_at(from, 0, all, (size_t)size);
    close(open_or_die(to, O_WRONLY | O_CREAT | O_TRUNC));
    ts_write_at(to, 0, all, (size_t)size);
    free(all);
}

static mode_t dir_mode, file_mode;

static int chmod_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    return type == FTW_SL ? 0 : chmod(path, S_ISDIR(st->st_mode) ? dir_mode : file_mode);
}

void ts_chmod_all(const char *dir, mode_t of_dirs, mode_t of_files)
{
    dir_mode = of_dirs;
    file_mode = of_files;
    if (nftw(dir, chmod_one, 16, FTW_DEPTH | FTW_PHYS))
        ts_die("%s: cannot change its rights", dir);
}

/* ---- small filesystems ---- */

int ts_mount(const char *dir, const char *options)
{
    return mount("ucm-test", dir, "tmpfs", 0, options) ? errno : 0;
}

int ts_remount(const char *dir, const char *options)
{
    bool ro = !strcmp(options, "ro");
    return mount("ucm-test", dir, "tmpfs", MS_REMOUNT | (ro ? MS_RDONLY : 0), ro ? "" : options)
               ? errno
               : 0;
}

void ts_umount(const char *dir)
{
    umount2(dir, MNT_DETACH);
}

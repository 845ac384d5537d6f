/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fio beside our own figures: the same bytes, block size, depth and kind of I/O, in the same
 * directory, moments apart.  A write is sequential into a fresh file, as dumps into a fresh lane
 * are; a read is in random order, each block once, as the loads are.
 */
#include "bench.h"

#include <errno.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* Terse output, version 3: fields by ';', numbered from 0. */
enum {
    FIO_ERROR = 4,
    FIO_READ_KIB = 5,
    FIO_WRITE_KIB = 46,
    FIO_MS_AFTER = 3, /* the time, behind the bytes */
    FIO_USER = 87,    /* per cent of a processor */
    FIO_SYSTEM = 88,
    FIO_ARGS = 24
};
static const struct yardstick no_result = {.gbps = NAN, .cpu = NAN};

int fio_find(void)
{
    const char *path = getenv("PATH");
    char file[PATH_MAX];

    while (path && *path) {
        size_t len = strcspn(path, ":");
        snprintf(file, sizeof file, "%.*s/fio", (int)len, path);
        if (access(file, X_OK) == 0)
            return 1;
        path += len + (path[len] == ':');
    }
    return 0;
}

static double field(const char *line, unsigned n)
{
    for (; n && line; n--) {
        line = strchr(line, ';');
        line = line ? line + 1 : NULL;
    }
    return line ? strtod(line, NULL) : NAN;
}

/* The last line that fio printed which looks like a result (it may warn before). */
static struct yardstick parse_terse(char *text, unsigned kib_field)
{
    struct yardstick result = no_result;

    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        if (strncmp(line, "3;fio", 5) || field(line, FIO_ERROR) != 0)
            continue;
        double gb = field(line, kib_field) * 1024 / 1e9;
        double s = field(line, kib_field + FIO_MS_AFTER) / 1e3;
        double busy = (field(line, FIO_USER) + field(line, FIO_SYSTEM)) / 100;
        if (gb > 0 && s > 0)
            result = (struct yardstick){.gbps = gb / s, .cpu = busy * s / gb};
    }
    return result;
}

static struct yardstick run_and_parse(char **argv, unsigned kib_field)
{
    int pipes[2], status;
    pid_t pid;
    posix_spawn_file_actions_t actions;
    char text[16384];
    size_t len = 0;

    if (pipe(pipes) < 0)
        return no_result;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, pipes[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, pipes[0]);
    int err = posix_spawnp(&pid, "fio", &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(pipes[1]);
    for (ssize_t n; !err && len < sizeof text - 1;) {
        n = read(pipes[0], text + len, sizeof text - 1 - len);
        if (n <= 0)
            break;
        len += (size_t)n;
    }
    close(pipes[0]);
    text[len] = '\0';
    if (err || waitpid(pid, &status, 0) < 0 || !WIFEXITED(status) || WEXITSTATUS(status))
        return no_result;
    return parse_terse(text, kib_field);
}

static const char *fio_engine(const struct bench *b)
{
    if (!strcmp(b->engine, "aio"))
        return "libaio";
    return strcmp(b->engine, "psync") ? "io_uring" : "psync";
}

/* psync has no depth: there as many threads share the file, as our own psync engine does. */
static struct yardstick run_fio(const struct bench *b, const char *rw, uint64_t block,
                                uint64_t total)
{
    int threads = !strcmp(b->engine, "psync") ? (int)b->depth : 1;
    char args[FIO_ARGS][PATH_MAX];
    char *argv[FIO_ARGS + 1];
    unsigned n = 0;
#define ADD(...) snprintf(args[n++], sizeof args[0], __VA_ARGS__)

    ADD("fio");
    ADD("--name=ucm");
    ADD("--output-format=terse");
    ADD("--terse-version=3");
    ADD("--filename=%s/fio", b->scratch);
    ADD("--rw=%s", rw);
    ADD("--bs=%llu", (unsigned long long)block);
    ADD("--size=%llu", (unsigned long long)(total / (unsigned)threads / block * block));
    ADD("--offset_increment=%llu", (unsigned long long)(total / (unsigned)threads / block * block));
    ADD("--direct=%d", b->direct);
    ADD("--ioengine=%s", fio_engine(b));
    ADD("--iodepth=%llu", (unsigned long long)b->depth);
    ADD("--numjobs=%d", threads);
    ADD("--thread");
    ADD("--group_reporting");
#undef ADD
    for (unsigned i = 0; i < n; i++)
        argv[i] = args[i];
    argv[n] = NULL;
    return run_and_parse(argv, *rw == 'w' ? FIO_WRITE_KIB : FIO_READ_KIB);
}

struct yardstick fio_write(const struct bench *b, uint64_t block, uint64_t total)
{
    return b->fio_there ? run_fio(b, "write", block, total) : no_result;
}

struct yardstick fio_read(const struct bench *b, uint64_t block, uint64_t total)
{
    return b->fio_there ? run_fio(b, "randread", block, total) : no_result;
}

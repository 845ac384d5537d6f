/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a crash may have left (crash.h): from a log and a case to a directory.  One thread.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crash.h"
#include "store/format.h"
#include "support.h"

enum { SECTOR = 512, PAGE = 4096 };

struct image { /* a file as it comes out */
    uint8_t *p;
    uint64_t size, cap;
};

static void grow(struct image *f, uint64_t size)
{
    if (size > f->cap) {
        f->p = realloc(f->p, size);
        if (!f->p)
            ts_die("crash: no memory");
        memset(f->p + f->cap, 0, size - f->cap);
        f->cap = size;
    }
    f->size = MAX(f->size, size);
}

static void resize(struct image *f, const struct crash_op *op)
{
    grow(f, op->off);
    if (!op->len)
        return;
    memset(f->p + op->off, 0, f->cap - op->off);
    f->size = op->off;
}

/* ---- writes ---- */

static void write_part(struct image *f, const struct crash_op *op, uint64_t from, uint64_t to)
{
    if (from >= to)
        return;
    grow(f, op->off + to);
    memcpy(f->p + op->off + from, op->data + from, to - from);
}

/* None, all, a first part, or any of its sectors or pages. */
static void write_any(struct image *f, const struct crash_op *op, uint64_t *seed)
{
    uint64_t grain = ts_below(seed, 2) ? SECTOR : PAGE;
    uint64_t parts = (op->len + grain - 1) / grain, first = ts_below(seed, parts + 1) * grain;
    switch (ts_below(seed, 4)) {
    case 0: return;
    case 1: write_part(f, op, 0, op->len); return;
    case 2: write_part(f, op, 0, MIN(first, op->len)); return;
    default:
        for (uint64_t i = 0; i < parts; i++)
            if (ts_below(seed, 2))
                write_part(f, op, i * grain, MIN((i + 1) * grain, op->len));
    }
}

static void write_as(struct image *f, const struct crash_op *op, struct crash_case c,
                     uint64_t *seed)
{
    bool ended = op->end < c.at, synced = op->durable < c.at;
    bool sure = c.variant < CRASH_KILLS ? ended : synced;
    if (sure || c.variant == 1 || c.variant == 4)
        write_part(f, op, 0, op->len);
    else if (c.variant == 2 || c.variant >= CRASH_FIXED)
        write_any(f, op, seed);
}

/* ---- names ---- */

/* How much of the log counts for names and sizes. */
static size_t changes(const struct crash_log *log, struct crash_case c, uint64_t *seed)
{
    size_t begun = 0, ended = 0, forced = 0;
    for (size_t i = 0; i < log->n && log->v[i].begin < c.at; i++) {
        const struct crash_op *op = &log->v[i];
        bool sync = op->kind == CRASH_SYNC || op->kind == CRASH_FSYNC;
        begun = i + 1;
        if (op->kind >= CRASH_MKDIR && op->kind <= CRASH_UNLINK && op->end < c.at)
            ended = i + 1;
        if (op->end == 0)
            forced = i + 1; /* was there before */
        if (sync && op->end < c.at)
            forced = MAX(forced, op->forced);
    }
    switch (c.variant) {
    case 0: return ended;
    case 1: return begun;
    case 2: return ts_below(seed, 2) ? begun : ended;
    case 3: return forced;
    case 4: return begun;
    default: return forced + ts_below(seed, begun - forced + 1);
    }
}

struct names {
    struct {
        const char *path;
        int32_t file; /* -1: a directory */
    } v[256];
    unsigned n;
};

static void unname(struct names *names, const char *path)
{
    for (unsigned i = 0; i < names->n; i++)
        if (!strcmp(names->v[i].path, path)) {
            memmove(&names->v[i], &names->v[i + 1], (names->n - i - 1) * sizeof names->v[0]);
            names->n--;
            return;
        }
}

static void rename_to(struct names *names, const char *path, int32_t file)
{
    unname(names, path);
    if (names->n == TS_LEN(names->v))
        ts_die("crash: too many files");
    names->v[names->n].path = path;
    names->v[names->n++].file = file;
}

static void apply_name(struct names *names, const struct crash_op *op)
{
    if (op->kind == CRASH_MKDIR || op->kind == CRASH_CREATE)
        rename_to(names, op->path, op->file);
    if (op->kind == CRASH_UNLINK || op->kind == CRASH_RENAME)
        unname(names, op->path);
    if (op->kind == CRASH_RENAME)
        rename_to(names, op->path2, op->file);
}

static void put(const char *root, const char *rel, const struct image *f)
{
    char path[TS_PATH];
    snprintf(path, sizeof path, "%s/%s", root, rel);
    if (!f) {
        if (mkdir(path, 0777))
            ts_die("%s: %m", path);
        return;
    }
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
    if (fd < 0 || (f->size && pwrite(fd, f->p, f->size, 0) != (ssize_t)f->size))
        ts_die("%s: %m", path);
    close(fd);
}

void crash_build(const struct crash_log *log, struct crash_case c, uint64_t seed, const char *root)
{
    struct image *files = calloc((size_t)log->files + 1, sizeof *files);
    struct names names = {.n = 0};
    uint64_t dice = seed ^ (uint64_t)c.at << 20 ^ (uint64_t)c.variant * 0x9e3779b97f4a7c15u;
    size_t counted = changes(log, c, &dice);

    if (!files)
        ts_die("crash: no memory");
    for (size_t i = 0; i < log->n && log->v[i].begin < c.at; i++) {
        const struct crash_op *op = &log->v[i];
        if (op->kind == CRASH_WRITE && op->data)
            write_as(&files[op->file], op, c, &dice);
        if (i < counted && op->kind == CRASH_SIZE)
            resize(&files[op->file], op);
        if (i < counted)
            apply_name(&names, op);
    }
    for (unsigned i = 0; i < names.n; i++) /* directories come before what is in them */
        put(root, names.v[i].path, names.v[i].file < 0 ? NULL : &files[names.v[i].file]);
    for (int32_t i = 0; i < log->files; i++)
        free(files[i].p);
    free(files);
}

/* ---- what must be there ---- */

static bool is_journal(const struct crash_log *log, int32_t file)
{
    for (size_t i = 0; i < log->n; i++)
        if (log->v[i].kind == CRASH_CREATE && log->v[i].file == file)
            return strstr(log->v[i].path, "/journal");
    return false;
}

static void find_dels(const struct crash_op *op, struct crash_fate *v, const ucm_key *keys,
                      size_t n)
{
    struct ucmi_record r;
    for (uint64_t off = 0; off + sizeof r <= op->len; off += sizeof r) {
        memcpy(&r, op->data + off, sizeof r);
        if (r.op != UCMI_DEL || !ucmi_record_check(&ucmi_plain, &r))
            continue;
        for (size_t k = 0; k < n; k++) /* it is written again with each page it lies in */
            if (!memcmp(&keys[k], &r.key, sizeof r.key))
                v[k].deleted = MIN(v[k].deleted, op->begin);
    }
}

size_t crash_fates(const struct crash_log *log, struct crash_fate *v, size_t max)
{
    size_t n = 0;
    for (size_t i = 0; i < log->n && n < max; i++)
        if (log->v[i].kind == CRASH_STORED)
            v[n++] = (struct crash_fate){log->v[i].off, log->v[i].begin, CRASH_NEVER};
    ucm_key *keys = malloc((n + 1) * sizeof *keys);
    bool *journal = calloc((size_t)log->files + 1, 1);
    if (!keys || !journal)
        ts_die("crash: no memory");
    for (size_t k = 0; k < n; k++)
        keys[k] = ts_key(v[k].no);
    for (int32_t i = 0; i < log->files; i++)
        journal[i] = is_journal(log, i);
    for (size_t i = 0; i < log->n; i++) {
        const struct crash_op *op = &log->v[i];
        if (op->kind == CRASH_WRITE && op->begin && op->off >= PAGE && journal[op->file])
            find_dels(op, v, keys, n);
    }
    free(journal);
    free(keys);
    return n;
}

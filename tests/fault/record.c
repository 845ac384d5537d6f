/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Recording (crash.h): what the watched engine is about to do and has done becomes a log.
 *
 * Files are numbered when they are made, so renaming one does not lose it.  One lock around all of
 * it; the engine's users wait for it, which changes their pace and nothing else.
 */
#include "crash.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fault.h"
#include "support.h"

enum { MAX_FD = 1 << 16, MAX_NAMES = 256, MAX_FLYING = 512 };

static struct {
    pthread_mutex_t lock;
    char root[TS_PATH];
    struct crash_log log;
    int32_t file_of[MAX_FD]; /* + 1; 0: none of ours */
    struct {
        char path[160];
        int32_t file;
    } names[MAX_NAMES];
    unsigned nnames;
    struct {
        const struct ucm_io *io;
        size_t op;
    } flying[MAX_FLYING];
    unsigned nflying;
    size_t changing[2]; /* ops of the change of a name or size that is under way */
    unsigned nchanging;
} rec = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- the log ---- */

static struct crash_op *add(struct crash_log *log, enum crash_kind kind, int32_t file)
{
    if (log->n == log->cap) {
        log->cap = log->cap ? 2 * log->cap : 1024;
        log->v = realloc(log->v, log->cap * sizeof *log->v);
        if (!log->v)
            ts_die("crash: no memory for %zu operations", log->cap);
    }
    struct crash_op *op = &log->v[log->n++];
    *op = (struct crash_op){
        .kind = kind, .file = file, .begin = log->now, .end = CRASH_NEVER, .durable = CRASH_NEVER};
    return op;
}

void crash_log_free(struct crash_log *log)
{
    for (size_t i = 0; i < log->n; i++)
        free(log->v[i].data);
    free(log->v);
    *log = (struct crash_log){0};
}

void crash_log_save(const struct crash_log *log, const char *path)
{
    FILE *f = fopen(path, "w");
    bool ok = f && fwrite(log, sizeof *log, 1, f) == 1;
    for (size_t i = 0; ok && i < log->n; i++)
        ok = fwrite(&log->v[i], sizeof log->v[i], 1, f) == 1 &&
             (!log->v[i].data || fwrite(log->v[i].data, log->v[i].len, 1, f) == 1);
    if (!ok || fclose(f))
        ts_die("%s: %m", path);
}

void crash_log_load(struct crash_log *log, const char *path)
{
    FILE *f = fopen(path, "r");
    bool ok = f && fread(log, sizeof *log, 1, f) == 1;
    log->v = ok ? calloc(log->n, sizeof *log->v) : NULL;
    ok = log->v;
    for (size_t i = 0; ok && i < log->n; i++) {
        struct crash_op *op = &log->v[i];
        ok = fread(op, sizeof *op, 1, f) == 1;
        if (ok && op->data)
            ok = (op->data = malloc(op->len)) && fread(op->data, op->len, 1, f) == 1;
    }
    if (!ok)
        ts_die("%s: is no recording", path);
    fclose(f);
}

/* ---- names ---- */

/* Below root; false: elsewhere. */
static bool path_at(int dirfd, const char *path, char out[160])
{
    char link[64], dir[TS_PATH] = "";
    size_t len = strlen(rec.root);
    if (dirfd >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
        ssize_t n = readlink(link, dir, sizeof dir - 1);
        dir[n < 0 ? 0 : n] = 0;
    }
    if (dirfd < 0 || strncmp(dir, rec.root, len) != 0 || (dir[len] && dir[len] != '/'))
        return false;
    const char *rel = dir + len + (dir[len] == '/');
    return snprintf(out, 160, "%s%s%s", rel, *rel && *path ? "/" : "", path) < 160;
}

static int32_t named(const char *path)
{
    for (unsigned i = 0; i < rec.nnames; i++)
        if (!strcmp(rec.names[i].path, path))
            return rec.names[i].file;
    return -1;
}

static void forget(const char *path)
{
    for (unsigned i = 0; i < rec.nnames; i++)
        if (!strcmp(rec.names[i].path, path))
            rec.names[i] = rec.names[--rec.nnames];
}

static void name(const char *path, int32_t file)
{
    forget(path);
    if (rec.nnames == MAX_NAMES)
        ts_die("crash: more than %d files", MAX_NAMES);
    strcpy(rec.names[rec.nnames].path, path);
    rec.names[rec.nnames++].file = file;
}

/* ---- reads, writes and syncs of the batch ---- */

static void io_begins(const struct ucm_io *io)
{
    int32_t file = rec.file_of[io->fd] - 1;
    if (io->op == UCM_IO_READV || file < 0)
        return;
    struct crash_op *op = add(&rec.log, io->op == UCM_IO_SYNC ? CRASH_SYNC : CRASH_WRITE, file);
    op->off = (uint64_t)io->off;
    for (unsigned i = 0; io->op == UCM_IO_WRITEV && i < io->niov; i++)
        op->len += io->iov[i].iov_len;
    op->data = op->len ? malloc(op->len) : NULL;
    size_t at = 0;
    for (unsigned i = 0; op->data && i < io->niov; at += io->iov[i++].iov_len)
        memcpy(op->data + at, io->iov[i].iov_base, io->iov[i].iov_len);
    if (rec.nflying == MAX_FLYING)
        ts_die("crash: more than %d operations in flight", MAX_FLYING);
    rec.flying[rec.nflying].io = io;
    rec.flying[rec.nflying++].op = rec.log.n - 1;
}

static void io_ends(const struct ucm_io *io, long res)
{
    for (unsigned i = 0; i < rec.nflying; i++) {
        if (rec.flying[i].io != io)
            continue;
        struct crash_op *op = &rec.log.v[rec.flying[i].op];
        rec.flying[i] = rec.flying[--rec.nflying];
        op->end = rec.log.now;
        if (res < 0)
            op->kind = CRASH_NOTHING;
        return;
    }
}

/* ---- changes of names and sizes ---- */

static struct crash_op *change(enum crash_kind kind, int32_t file, const char *path)
{
    struct crash_op *op = add(&rec.log, kind, file);
    snprintf(op->path, sizeof op->path, "%s", path);
    rec.changing[rec.nchanging++] = rec.log.n - 1;
    return op;
}

static void file_begins(const struct ucm_file *f)
{
    char path[160] = "", path2[160] = "";
    int32_t file = f->fd >= 0 ? rec.file_of[f->fd] - 1 : -1;
    bool sized = f->op == UCM_FILE_ALLOCATE || f->op == UCM_FILE_TRUNCATE;
    rec.nchanging = 0;
    if (sized && file >= 0) {
        struct crash_op *op = change(CRASH_SIZE, file, "");
        op->off = (uint64_t)f->len;
        op->len = f->op == UCM_FILE_TRUNCATE;
    }
    if (f->op == UCM_FILE_SYNC && (file >= 0 || path_at(f->fd, "", path)))
        change(CRASH_FSYNC, file, path);
    if (sized || f->op == UCM_FILE_SYNC || f->op == UCM_FILE_CLOSE ||
        !path_at(f->dirfd, f->path, path))
        return;
    file = named(path);
    if (f->op == UCM_FILE_MKDIR)
        change(CRASH_MKDIR, -1, path);
    if (f->op == UCM_FILE_UNLINK)
        change(CRASH_UNLINK, file, path);
    if (f->op == UCM_FILE_RENAME && path_at(f->dirfd, f->path2, path2))
        strcpy(change(CRASH_RENAME, file, path)->path2, path2);
    if (f->op != UCM_FILE_OPEN)
        return;
    if (f->flags & O_CREAT && file < 0)
        change(CRASH_CREATE, rec.log.files++, path);
    else if (f->flags & O_TRUNC && file >= 0)
        change(CRASH_SIZE, file, path)->len = 1;
}

static void file_ends(const struct ucm_file *f, long res)
{
    char path[160];
    for (unsigned i = 0; i < rec.nchanging; i++) {
        struct crash_op *op = &rec.log.v[rec.changing[i]];
        op->end = rec.log.now;
        if (res < 0)
            op->kind = CRASH_NOTHING;
        if (op->kind == CRASH_CREATE)
            name(op->path, op->file);
        if (op->kind == CRASH_UNLINK || op->kind == CRASH_RENAME)
            forget(op->path);
        if (op->kind == CRASH_RENAME)
            name(op->path2, op->file);
    }
    rec.nchanging = 0;
    if (f->op == UCM_FILE_OPEN && res >= 0 && res < MAX_FD)
        rec.file_of[res] = path_at(f->dirfd, f->path, path) ? named(path) + 1 : 0;
    if (f->op == UCM_FILE_CLOSE && f->fd >= 0)
        rec.file_of[f->fd] = 0;
}

static void watch(const struct fault_event *e)
{
    pthread_mutex_lock(&rec.lock);
    rec.log.now++;
    if (e->io && !e->ended)
        io_begins(e->io);
    else if (e->io)
        io_ends(e->io, e->res);
    else if (!e->ended)
        file_begins(e->file);
    else
        file_ends(e->file, e->res);
    pthread_mutex_unlock(&rec.lock);
}

/* ---- beginning and end ---- */

static void take_file(const char *path, const char *rel, uint64_t size)
{
    int32_t file = rec.log.files++;
    struct crash_op *op = add(&rec.log, CRASH_CREATE, file);
    snprintf(op->path, sizeof op->path, "%s", rel);
    name(rel, file);
    op = add(&rec.log, CRASH_WRITE, file);
    op->len = size;
    op->data = size ? malloc(size) : NULL;
    if (size)
        ts_read_at(path, 0, op->data, size);
}

static void take_tree(const char *dir, const char *rel)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    while (d && (e = readdir(d))) {
        char path[TS_PATH], below[160];
        struct stat st;
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        if (snprintf(path, sizeof path, "%s/%s", dir, e->d_name) >= (int)sizeof path ||
            snprintf(below, sizeof below, "%s%s%s", rel, *rel ? "/" : "", e->d_name) >=
                (int)sizeof below ||
            lstat(path, &st))
            ts_die("crash: %s/%s: cannot be taken", dir, e->d_name);
        if (S_ISDIR(st.st_mode)) {
            strcpy(add(&rec.log, CRASH_MKDIR, -1)->path, below);
            take_tree(path, below);
        } else {
            take_file(path, below, (uint64_t)st.st_size);
        }
    }
    if (d)
        closedir(d);
}

void crash_record(const char *root)
{
    rec.log = (struct crash_log){0};
    rec.nnames = rec.nflying = rec.nchanging = 0;
    memset(rec.file_of, 0, sizeof rec.file_of);
    if (!realpath(root, rec.root))
        ts_die("%s: %m", root);
    take_tree(rec.root, "");
    for (size_t i = 0; i < rec.log.n; i++) {
        rec.log.v[i].end = 0;
        rec.log.v[i].durable = 0;
    }
    fault_watch(watch);
}

void crash_note(uint64_t no)
{
    pthread_mutex_lock(&rec.lock);
    struct crash_op *op = add(&rec.log, CRASH_STORED, -1);
    op->off = no;
    op->end = op->begin;
    pthread_mutex_unlock(&rec.lock);
}

static bool is_change(const struct crash_op *op)
{
    return op->kind >= CRASH_MKDIR && op->kind <= CRASH_UNLINK;
}

/* In the directory dir itself. */
static bool lies_in(const char *path, const char *dir)
{
    size_t len = strlen(dir);
    if (strncmp(path, dir, len) != 0 || (len && path[len] != '/'))
        return false;
    return !strchr(path + len + (len > 0), '/');
}

/* Is this change made sure of by that sync, which began after it had ended? */
static bool covers(const struct crash_op *s, const struct crash_op *c)
{
    if (s->file < 0)
        return lies_in(c->path, s->path) || (c->kind == CRASH_RENAME && lies_in(c->path2, s->path));
    return c->file == s->file &&
           (c->kind == CRASH_CREATE || c->kind == CRASH_SIZE || s->kind == CRASH_FSYNC);
}

void crash_record_end(struct crash_log *log)
{
    fault_watch(NULL);
    *log = rec.log;
    rec.log = (struct crash_log){0};
    log->now++;
    for (size_t i = 0; i < log->n; i++) {
        struct crash_op *s = &log->v[i];
        if (s->kind != CRASH_SYNC && s->kind != CRASH_FSYNC)
            continue;
        for (size_t k = 0; k < i; k++) {
            struct crash_op *op = &log->v[k];
            if (op->end == CRASH_NEVER || op->end > s->begin)
                continue;
            if (is_change(op) && covers(s, op))
                s->forced = (uint32_t)k + 1;
            if (op->kind == CRASH_WRITE && op->file == s->file && s->end < op->durable)
                op->durable = s->end;
        }
    }
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crash.h - what a run did to its directory, and what a crash may have left of it.
 *
 * A recording takes every write with its bytes, every change of a name or a size and every sync,
 * each with the time it began and the time it ended; times count those moments.  From it the
 * directory can be built as a crash at any time may have left it:
 *
 *     killed      what had ended is there; of what was under way none, all, or any part
 *     power cut   what was synced is there; of all else any part, sector by sector, in any order
 *
 * Names and sizes after a power cut are those after some first part of their changes: file systems
 * with a journal (ext4, XFS, btrfs) keep that order.  At least so many changes as a sync has made
 * sure of: an fdatasync that the file is there, with its size; an fsync also what it is called, or
 * all names in a directory.
 */
#ifndef TS_CRASH_H
#define TS_CRASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ucm.h"

enum crash_kind {
    CRASH_NOTHING, /* failed, or not of the directory */
    CRASH_MKDIR,
    CRASH_CREATE,
    CRASH_SIZE, /* to off; shrinks only where len is 1 (O_TRUNC, ftruncate) */
    CRASH_RENAME,
    CRASH_UNLINK,
    CRASH_WRITE,
    CRASH_SYNC,  /* fdatasync of a file */
    CRASH_FSYNC, /* of a file, or (file -1) of the directory path */
    CRASH_STORED /* off: the number of a block that was reported stored just now */
};
#define CRASH_NEVER UINT32_MAX
struct crash_op {
    enum crash_kind kind;
    int32_t file;
    uint32_t begin, end; /* end: CRASH_NEVER when it never did */
    uint64_t off, len;
    uint32_t durable; /* of a write: the end of the first sync that covers it */
    uint32_t forced;  /* of a sync: the changes of names it makes sure of, all before this op */
    char path[160], path2[160];
    uint8_t *data;
};
struct crash_log {
    struct crash_op *v;
    size_t n, cap;
    uint32_t now;
    int32_t files;
};

/* One recording at a time; what is there already counts as synced long ago. */
void crash_record(const char *root);
void crash_note(uint64_t no);                 /* this block has just been reported stored */
void crash_record_end(struct crash_log *log); /* to be freed */
void crash_log_free(struct crash_log *log);
void crash_log_save(const struct crash_log *log, const char *path);
void crash_log_load(struct crash_log *log, const char *path);

struct crash_case {
    uint32_t at;      /* what began before has begun */
    uint32_t variant; /* 0..2: killed; from 3 on: a power cut, from 5 on by chance */
};
enum { CRASH_KILLS = 3, CRASH_FIXED = 5 };
/* Builds the directory root as the crash left it. */
void crash_build(const struct crash_log *log, struct crash_case c, uint64_t seed, const char *root);
/* Of each block that was reported stored: when, and when a record began that gives its slot away
 * (CRASH_NEVER: it was not).  Between the two it must survive.  No block may be dumped again. */
struct crash_fate {
    uint64_t no;
    uint32_t stored, deleted;
};
size_t crash_fates(const struct crash_log *log, struct crash_fate *v, size_t max);

#endif

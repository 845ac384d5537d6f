/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fault.h - storage that fails, for tests.
 *
 * A program that links fault_dep has its own ucmi_io_open around the library's (--wrap): every I/O
 * engine a store opens is real, and stands behind one that counts operations and spoils those it
 * was told to.  Nothing of it is in the library, so nobody can meet it in production.  A store is
 * opened and used as ever; posix_io_engine picks the real engine below.
 *
 * What is spoilt is told by plans, which hold for all engines of the process until they are
 * replaced.  Without plans nothing is changed and nothing held back.
 */
#ifndef TS_FAULT_H
#define TS_FAULT_H

#include <stdbool.h>
#include <stdint.h>

#include "ucm.h"

/* Kinds of operations, as bits: those of the batch, the reads of journals (plain pread), and the
 * changes of names and sizes. */
#define FAULT_KINDS(X)                                                                             \
    X(READ, "read")                                                                                \
    X(WRITE, "write")                                                                              \
    X(SYNC, "sync")                                                                                \
    X(PREAD, "pread")                                                                              \
    X(OPEN, "open")                                                                                \
    X(CLOSE, "close")                                                                              \
    X(ALLOCATE, "allocate")                                                                        \
    X(TRUNCATE, "truncate")                                                                        \
    X(FSYNC, "fsync")                                                                              \
    X(RENAME, "rename")                                                                            \
    X(UNLINK, "unlink")                                                                            \
    X(MKDIR, "mkdir")
enum fault_kind {
#define X(id, name) FAULT_AT_##id,
    FAULT_KINDS(X)
#undef X
        FAULT_NKINDS
};
enum {
#define X(id, name) FAULT_##id = 1 << FAULT_AT_##id,
    FAULT_KINDS(X)
#undef X
        FAULT_ALL = (1 << FAULT_NKINDS) - 1,
    FAULT_BATCH = FAULT_READ | FAULT_WRITE | FAULT_SYNC,
    FAULT_FILES = FAULT_ALL & ~FAULT_BATCH & ~FAULT_PREAD
};

/* What becomes of an operation.  Those that have no meaning for it (half a rename) fail it. */
#define FAULT_WAYS(X)                                                                              \
    X(FAIL, "fails")           /* not done; err */                                                 \
    X(HALF, "fails half done") /* done in part; err */                                             \
    X(LATE, "fails when done") /* done; err */                                                     \
    X(SHORT, "ends short")     /* done in part; that many bytes */                                 \
    X(FLIP, "flipped bit")     /* one bit is another; success */                                   \
    X(TORN, "torn")            /* done in part, the rest zeros or as it was; success */            \
    X(LOST, "lost")            /* not done; success */                                             \
    X(DELAY, "delayed")        /* done; told after 0 .. delay_us */                                \
    X(REORDER, "reordered")    /* done; told after another, where there is one */                  \
    X(HANG, "hangs")           /* nothing happens until fault_release, then it is done */
enum fault_way {
#define X(id, name) FAULT_WAY_##id,
    FAULT_WAYS(X)
#undef X
        FAULT_NWAYS
};

struct fault_plan {
    unsigned kinds;
    enum fault_way way;
    int err;         /* -EIO where 0 */
    uint64_t at;     /* the at-th operation of these kinds; 0: by chance */
    unsigned one_in; /* by chance: one in so many, 1: each */
    uint64_t times;  /* at most so many; 0: no bound */
    unsigned delay_us;
    unsigned engine; /* only the one that was the engine-th to be opened (fault_opened); 0: all */
};
enum { FAULT_MAX_PLANS = 16 };
/* Replaces the plans (n 0: none), begins to count anew, lets go of what hangs. */
void fault_plan(const struct fault_plan *v, unsigned n, uint64_t seed);
/* Lets go of what hangs; what comes later hangs again. */
void fault_release(void);
unsigned fault_hanging(void);
void fault_await_hanging(unsigned n); /* at least so many */
/* Engines since the program began. */
unsigned fault_opened(void);
unsigned fault_closed(void);
void fault_await_closed(unsigned n);
/* Operations of these kinds, as far as there are plans for them, since those were given. */
uint64_t fault_seen(unsigned kinds);
/* Operations spoilt since the program began, by way and kind. */
uint64_t fault_done(enum fault_way way, enum fault_kind kind);
uint64_t fault_done_all(void);
const char *fault_kind_name(enum fault_kind kind);
const char *fault_way_name(enum fault_way way);

/* ---- watching ----
 *
 * Each operation that the real engine carries out is told twice, from the thread of the engine's
 * user: when it is begun, and when it has ended with res.  Of a file operation io is NULL, of the
 * others file. */
struct fault_event {
    bool ended;
    const struct ucm_io *io;
    const struct ucm_file *file;
    long res;
};
typedef void fault_watch_fn(const struct fault_event *e);
void fault_watch(fault_watch_fn *fn); /* NULL: nobody */

#endif

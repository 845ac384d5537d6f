/* SPDX-License-Identifier: Apache-2.0 */
/*
 * support.h - what the black-box tests share.  Knows ucm.h and libc, so the tests show that ucm.h
 * is enough.
 *
 * A block's content is a pure function of its key and the place in it, so any process can check any
 * block.  What happened to the entries of a load, dump or lookup is a string with one letter each
 * (see ts_letter), so a test compares strings and a failure shows every entry.
 *
 * Only cases.c uses cmocka, so programs that are no tests can link the rest.
 */
#ifndef TS_SUPPORT_H
#define TS_SUPPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "device.h"
#include "ucm.h"

#define TS_LEN(a)       (sizeof(a) / sizeof((a)[0]))
#define TS_PRINTF(f, a) __attribute__((format(printf, f, a)))
#define TS_WAIT_MS      60000 /* the deadline of everything: who is later hangs */
enum { TS_MAX_SEGS = 8, TS_MAX_ENTRIES = 512, TS_PATH = 4096 };

/* ---- the world: prints what went wrong and aborts, for what no test can go on after ---- */

_Noreturn void ts_die(const char *fmt, ...) TS_PRINTF(1, 2);
uint64_t ts_now_ms(void);
/* Seconds a randomised test may take: UCM_TEST_SECONDS if given, else `def`. */
double ts_seconds(double def);
/* Whether all there is is to be tried, whatever the clock says: UCM_TEST_EVERY is set. */
bool ts_every(void);
/* A small random generator; the seed of a test is printed, or comes from UCM_TEST_SEED. */
uint64_t ts_seed(void);
uint64_t ts_random(uint64_t *state);
static inline uint64_t ts_below(uint64_t *state, uint64_t bound)
{
    return ts_random(state) % bound;
}

/* ---- files ---- */

/* A fresh directory below $TMPDIR; all of them are removed when the process exits, unless
 * UCM_TEST_KEEP is set. */
const char *ts_dir(void);
void ts_remove(const char *path);
/* Paths of the regular files below dir whose names begin with prefix, sorted; how many. */
size_t ts_files(const char *dir, const char *prefix, char (*paths)[TS_PATH], size_t max);
/* Bytes on disk of those files. */
uint64_t ts_du(const char *dir, const char *prefix);
int64_t ts_file_size(const char *path);
void ts_flip(const char *path, off_t off);
void ts_truncate(const char *path, off_t size);
void ts_write_at(const char *path, off_t off, const void *p, size_t len);
void ts_read_at(const char *path, off_t off, void *p, size_t len);
void ts_copy_file(const char *from, const char *to);
/* The rights of all directories and files below, and of dir. */
void ts_chmod_all(const char *dir, mode_t of_dirs, mode_t of_files);
/* 0, or an errno when this process may not. */
int ts_mount(const char *dir, const char *options);
int ts_remount(const char *dir, const char *options);
void ts_umount(const char *dir);

/* ---- content ---- */

ucm_key ts_key(uint64_t no);
void ts_fill(const ucm_key *key, unsigned shard, size_t off, void *p, size_t len);
/* The first byte that differs from the content, or len. */
size_t ts_check(const ucm_key *key, unsigned shard, size_t off, const void *p, size_t len);

/* ---- memory of an engine: a map and the bytes it names, with guard bytes in between ---- */

struct ts_shape {
    unsigned nsegs, blocks_per_key;
    size_t len[TS_MAX_SEGS]; /* of one engine block; their sum times blocks_per_key is a shard */
    size_t pad;              /* guard bytes after each segment of each engine block */
    size_t skew;             /* off alignment by so much */
    bool joined;             /* a whole engine block is one run of memory */
    const char *device;      /* whose memory it is; NULL: the host's */
};
struct ts_mem {
    ucm_store *store;
    ucm_map *map;
    struct ts_shape shape;
    unsigned nshards;
    size_t shard_size, entries, size;
    uint32_t nblocks;
    const struct ts_device *device;
    struct ts_bytes bytes;
    struct ucm_seg *segs;
};
/* Room for `entries` keys.  0 or what ucm_map_new said. */
int ts_mem_new(struct ts_mem *m, ucm_store *store, size_t shard_size, unsigned nshards,
               const struct ts_shape *shape, size_t entries);
void ts_mem_free(struct ts_mem *m);
/* One segment a shard, one engine block a key. */
struct ts_shape ts_plain(size_t shard_size);
void ts_mem_blocks(const struct ts_mem *m, size_t entry, uint32_t *blocks);
void ts_mem_fill(struct ts_mem *m, size_t entry, const ucm_key *key);
bool ts_mem_right(const struct ts_mem *m, size_t entry, const ucm_key *key, unsigned shard,
                  unsigned nshards);
void ts_mem_wipe(struct ts_mem *m);
bool ts_mem_guards_ok(const struct ts_mem *m);

/* ---- loads, dumps, lookups ---- */

struct ts_op {
    bool dump;
    uint64_t from; /* keys from .. from + n */
    size_t n;
    unsigned shard, nshards, group; /* as in ucm_batch */
    uint64_t layers; /* a dump: one task for each shard; 1: in order, else the seed */
    bool drop;       /* waits only for RELEASED, and lets a dump go on */
};
/* '.' right, '-' absent, '!' failed its check, 'W' wrong bytes, 'G' a guard byte was overwritten,
 * 'a' refused (queue full), 'f' no room, 't' timed out, 'c' canceled, 'd' closing, 'i' I/O error,
 * 'p' still in progress, '?' another error. */
char ts_letter(int err);
/* Carries out op with the first n entries of m, and writes n letters to text. */
void ts_run(ucm_store *store, struct ts_mem *m, const struct ts_op *op, char *text);
/* Writes '0' to '4' for each key, as ucm_lookup finds it. */
void ts_lookup(ucm_store *store, uint64_t from, size_t n, char *text);
double ts_metric(const ucm_store *store, const char *name);

/* ---- a rig: a store and memory for it, from one text of key=value lines ----
 *
 * Lines that begin with @ are the rig's own: @entries, @blocks_per_key, @pad, @skew, @joined,
 * @nsegs,
 * @uid (the agent becomes that user first).
 */
struct ts_opts {
    char text[4096];
};
/* Adds or replaces a line. */
void ts_opt(struct ts_opts *o, const char *key, const char *fmt, ...) TS_PRINTF(3, 4);
/* An integrity key, in a file in dir; nothing where the library cannot seal. */
void ts_opt_key(struct ts_opts *o, const char *dir);
/* 16 shards of 4 KiB, small segments; dir may be NULL for stacks without storage. */
struct ts_opts ts_opts_for(const char *pipeline, const char *dir);
long ts_opt_get(const struct ts_opts *o, const char *key, long def);

struct ts_rig {
    ucm_conf *conf;
    ucm_store *store;
    struct ts_mem mem;
    char text[TS_MAX_ENTRIES + 1];
    char why[1024]; /* why the last open failed */
};
int ts_rig_open(struct ts_rig *r, const struct ts_opts *o);
void ts_rig_close(struct ts_rig *r);
const char *ts_rig_dump(struct ts_rig *r, uint64_t from, size_t n);
const char *ts_rig_load(struct ts_rig *r, uint64_t from, size_t n);
const char *ts_rig_lookup(struct ts_rig *r, uint64_t from, size_t n);
/* Writes n times c: what all entries should be. */
const char *ts_all(char c, size_t n);

/* ---- another process with a rig, told what to do line by line (agent.c) ---- */

struct ts_agent {
    pid_t pid; /* 0: none */
    int in, out;
    char line[8192];
    size_t have;
    uint64_t sent_ms;
};
/* Starts one; prefix (NULL-terminated, may be NULL) is a command to run it under.  The first reply
 * is "open", or "error NUMBER text". */
void ts_agent_start(struct ts_agent *a, const char *const *prefix, const struct ts_opts *o);
void ts_agent_send(struct ts_agent *a, const char *fmt, ...) TS_PRINTF(2, 3);
/* The next line it says; NULL when it is gone.  One that is late hangs: ts_die. */
const char *ts_agent_reply(struct ts_agent *a);
/* The same within ms; *late is set, and NULL returned, when nothing came. */
const char *ts_agent_reply_within(struct ts_agent *a, int ms, bool *late);
const char *ts_agent_ask(struct ts_agent *a, const char *fmt, ...) TS_PRINTF(2, 3);
/* Ends it in order (0 expected) or by a signal; returns the wait status. */
int ts_agent_stop(struct ts_agent *a);
int ts_agent_kill(struct ts_agent *a, int sig);

/* ---- cmocka: the same tests over several stacks ---- */

struct ts_stack {
    const char *pipeline;
    bool knows;    /* lookups find what was dumped */
    bool keeps;    /* loads give it back */
    bool persists; /* also after a restart */
};
/* Empty, Fake, Posix, Cache|Posix, Cache|Empty. */
extern const struct ts_stack ts_stacks[];
extern const size_t ts_nstacks;
struct ts_opts ts_opts_of(const struct ts_stack *stack);
struct ts_case {
    const char *name;
    void (*fn)(void **state); /* *state: the struct ts_stack */
    bool alone;               /* runs once, without a stack */
    bool needs_keep, needs_persist, needs_cache;
};
/* Runs each case over each stack that has what it needs; returns how many failed.  UCM_TEST_FILTER
 * ("Posix: a*") picks some. */
int ts_run_cases(const char *group, const struct ts_case *cases, size_t n);
/* Open, or the test fails. */
struct ts_rig ts_rig_sure(const struct ts_opts *o);
void ts_agent_sure(struct ts_agent *a, const struct ts_opts *o);
/* The text must contain each of the words, a NULL-terminated list. */
void ts_assert_words(const char *text, const char *const *words);
#define TS_ASSERT_WORDS(text, ...) ts_assert_words(text, (const char *const[]){__VA_ARGS__, NULL})

/* Leaves the test that runs, and says why.  (What cmocka prints for its skip() meson takes for a
 * failure.) */
void ts_say_skipped(const char *fmt, ...) TS_PRINTF(1, 2);
#define TS_SKIP(...)                                                                               \
    do {                                                                                           \
        ts_say_skipped(__VA_ARGS__);                                                               \
        return;                                                                                    \
    } while (0)

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * base.h - what every other part stands on: errors, log, options, counters, queues, threads, hashes.
 *
 * Knows ucm.h and libc, nothing of I/O, devices or the store.  Names that cross files begin with
 * ucmi_; file-local names have no prefix.
 */
/* Columns are set by hand. */
/* clang-format off */
#ifndef UCMI_BASE_H
#define UCMI_BASE_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "ucm.h"

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ROUND_UP(x, to) (((x) + (to)-1) / (to) * (to))
#define CONTAINER_OF(p, type, member) ((type *)((char *)(p)-offsetof(type, member)))
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))

enum { UCMI_PAGE = 4096 }; /* unit of alignment on disk and in the pool, whatever the machine's page */

/* ---- time ---- */

static inline uint64_t ucmi_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- errors ---- */

/* Writes a sentence to why (its size is len; why may be NULL) and returns err: `return ucmi_fail(...)`. */
int ucmi_fail(char *why, size_t len, int err, const char *fmt, ...) PRINTF_LIKE(4, 5);
/* The text for an error met with a file or directory; ucm_strerror speaks of blocks. */
const char *ucmi_file_error(int err);

/* Puts a '?' for each byte that is no printable UTF-8: names and values come from anywhere, a text for
 * users goes to terminals and into Python. */
void ucmi_scrub(char *text);

/* ---- log: who decides logs, once, with the facts; the others return the error ---- */

/* object: a few words on what speaks ("Posix /mnt/kv", "Cache").  A line is `object: text`, or the text
 * alone where object is NULL. */
void ucmi_log(enum ucm_level level, const char *object, const char *fmt, ...) PRINTF_LIKE(3, 4);
bool ucmi_log_on(enum ucm_level level);
/* At most one line in `every_s` seconds for one place in the code; says how many it left out. */
struct ucmi_log_gate {
    _Atomic uint64_t next_ns;
    _Atomic uint32_t held;
};
void ucmi_log_gated(struct ucmi_log_gate *gate, unsigned every_s, enum ucm_level level,
                    const char *object, const char *fmt, ...) PRINTF_LIKE(5, 6);

/* ---- options and plugins ---- */

/* A conf that knows the options of these plugins (a NULL-terminated list that outlives it). */
int ucmi_conf_new(const struct ucm_plugin *const *plugins, ucm_conf **conf_p);
/* Shows every option (ucm_conf_new and ucm_options, which know all plugins, are in store/plugin.c). */
void ucmi_conf_visit(const ucm_conf *conf, ucm_option_fn *fn, void *arg);
/* Sets the text that ucm_conf_error returns; returns err. */
int ucmi_conf_fail(ucm_conf *conf, int err, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* The private state of a plugin: allocated, zeroed, options filled in from conf (NULL: defaults). */
int ucmi_plugin_new(const struct ucm_plugin *plugin, const ucm_conf *conf, void **state_p);
void ucmi_plugin_free(const struct ucm_plugin *plugin, void *state);
/* The nearest of the words (NULL-terminated list) to what was given, or NULL if none is near. */
const char *ucmi_nearest(const char *given, const char *const *words);

/* ---- counters ---- */

#define UCMI_COUNTERS(X)                                                                          \
    X(LOOKUP_KEYS, "lookup_keys_total", "counter", "keys looked up")                              \
    X(LOOKUP_HITS, "lookup_hits_total", "counter", "keys found by lookups")                       \
    X(LOAD_BLOCKS, "load_blocks_total", "counter", "block slices asked for by loads")             \
    X(LOAD_BYTES, "load_bytes_total", "counter", "bytes given to the engine")                     \
    X(LOAD_FAILED, "load_failed_total", "counter", "block slices that could not be loaded")       \
    X(DUMP_BLOCKS, "dump_blocks_total", "counter", "block slices handed to dumps")                \
    X(DUMP_BYTES, "dump_bytes_total", "counter", "bytes taken from the engine")                   \
    X(DUMP_DROPPED, "dump_dropped_total", "counter", "block slices whose dump was given up")      \
    X(TASKS_REFUSED, "tasks_refused_total", "counter", "loads and dumps refused by a full queue") \
    X(CACHE_SLOTS, "cache_slots", "gauge", "blocks the DRAM pool has room for")                   \
    X(CACHE_READY, "cache_ready", "gauge", "blocks ready in the DRAM pool")                       \
    X(CACHE_HITS, "cache_hits_total", "counter", "block slices served from DRAM")                 \
    X(CACHE_FILLS, "cache_fills_total", "counter", "block slices brought into DRAM from below")   \
    X(CACHE_EVICTED, "cache_evicted_total", "counter", "blocks evicted from DRAM")                \
    X(CACHE_RECLAIMED, "cache_reclaimed_total", "counter", "slots taken back from dead processes")\
    X(CACHE_ADOPTED, "cache_adopted_total", "counter", "blocks of processes that went written down") \
    X(CACHE_WAITED, "cache_waited_total", "counter", "block slices that waited for a free slot")  \
    X(DISK_READS, "disk_reads_total", "counter", "block reads from storage")                      \
    X(DISK_READ_BYTES, "disk_read_bytes_total", "counter", "bytes read from storage")             \
    X(DISK_WRITES, "disk_writes_total", "counter", "blocks published in storage")                 \
    X(DISK_WRITE_BYTES, "disk_write_bytes_total", "counter", "bytes written to storage")          \
    X(DISK_PRESENT, "disk_present_total", "counter", "dumped blocks that storage had already")    \
    X(DISK_BAD, "disk_bad_total", "counter", "blocks dropped because a check failed")             \
    X(DISK_STALE, "disk_stale_total", "counter", "reads that met a slot reused for another block")\
    X(DISK_ERRORS, "disk_errors_total", "counter", "reads and writes that failed")                \
    X(DISK_EVICTED, "disk_evicted_total", "counter", "blocks evicted from storage")               \
    X(DISK_FULL, "disk_full_total", "counter", "blocks dropped because storage had no room")      \
    X(DISK_LANES_ADOPTED, "disk_lanes_adopted_total", "counter", "lanes taken over")              \
    X(DISK_LANES_LOST, "disk_lanes_lost_total", "counter", "lanes another process took over")     \
    X(DISK_COMPACTED, "disk_compacted_total", "counter", "journals rewritten")                    \
    X(DISK_BLOCKS, "disk_blocks", "gauge", "blocks the index knows, all lanes")                   \
    X(DISK_BYTES, "disk_bytes", "gauge", "bytes of our own segments")                             \
    X(DISK_STALLED, "disk_stalled", "gauge", "backends that do not answer and are passed by")

enum ucmi_counter {
#define X(id, name, kind, help) UCMI_##id,
    UCMI_COUNTERS(X)
#undef X
        UCMI_COUNTER_MAX
};
struct ucm_counters {
    _Atomic int64_t v[UCMI_COUNTER_MAX];
};
static inline void ucmi_count(struct ucm_counters *c, enum ucmi_counter id, int64_t n)
{
    atomic_fetch_add_explicit(&c->v[id], n, memory_order_relaxed);
}
static inline void ucmi_gauge(struct ucm_counters *c, enum ucmi_counter id, int64_t value)
{
    atomic_store_explicit(&c->v[id], value, memory_order_relaxed);
}
void ucmi_counters_visit(const struct ucm_counters *c, ucm_metric_fn *fn, void *arg);

/* ---- queues: bounded, many pushers, one popper that sleeps when there is nothing ---- */

struct ucmi_queue {
    pthread_mutex_t lock;
    pthread_cond_t more;
    void **ring;
    size_t cap, head, count;
    bool kicked, sleeping;
};
int ucmi_queue_init(struct ucmi_queue *q, size_t cap);
void ucmi_queue_destroy(struct ucmi_queue *q); /* or one of zeros, never made */
int ucmi_queue_push(struct ucmi_queue *q, void *item); /* 0, or -EAGAIN when full */
/* Takes up to max items.  With none there it waits for a push, a kick or the deadline
 * (CLOCK_MONOTONIC ns; 0: does not wait, UINT64_MAX: no deadline) and may return 0. */
size_t ucmi_queue_pop(struct ucmi_queue *q, void **items, size_t max, uint64_t deadline_ns);
void ucmi_queue_kick(struct ucmi_queue *q); /* ends a pop now or the next one */

/* ---- threads ---- */

/* Starts a joinable thread with all signals blocked; name is cut to 15 characters. */
int ucmi_thread_start(pthread_t *thread, const char *name, void *(*fn)(void *), void *arg);
/* A mutex and a condition variable on CLOCK_MONOTONIC. */
void ucmi_cond_init(pthread_cond_t *cond);
/* Waits until deadline_ns (UINT64_MAX: for ever); returns 0 or ETIMEDOUT as pthread_cond_timedwait. */
int ucmi_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline_ns);

/* ---- hashes (XXH3) ---- */

uint64_t ucmi_hash64(const void *p, size_t len, uint64_t seed);
void ucmi_hash128(const void *p, size_t len, uint8_t out[16]);
/* The hash of bytes that lie in pieces; equal to ucmi_hash64 of them joined. */
uint64_t ucmi_hash64v(const struct iovec *iov, unsigned niov, uint64_t seed);

static inline bool ucmi_key_eq(const ucm_key *a, const ucm_key *b)
{
    return memcmp(a->b, b->b, sizeof a->b) == 0;
}
/* Keys are hashes already: eight bytes of one are as good as a hash of it. */
static inline uint64_t ucmi_key_word(const ucm_key *key, uint32_t rank)
{
    uint64_t w;
    memcpy(&w, key->b + 4, sizeof w);
    return (w ^ (uint64_t)rank * 0x9e3779b97f4a7c15u) * 0xff51afd7ed558ccdu;
}
void ucmi_hex(const uint8_t *b, size_t n, char *out); /* 2 * n + 1 characters */
uint64_t ucmi_random_word(void);

#endif

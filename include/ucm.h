/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ucm.h - a persistent, tiered store for the KV caches of LLM engines.
 *
 * An engine computes the KV cache of a prompt once.  ucm copies it out of the engine's memory block
 * by block, keeps the blocks in the node's DRAM and in a directory, and gives them back to any
 * engine that meets the same prefix.
 *
 *     block      the keyed unit: the KV cache of a run of tokens, all layers, as one rank holds it
 *     key        16 bytes naming a block: the engine's own hash of the whole prefix up to its end
 *     shard      one layer's part of a block; all shards of a block have the same size
 *     segment    one tensor's part of a shard (K or V, latent, ...)
 *     map        where an engine keeps its blocks in memory
 *     namespace  everything else that changes a block's bytes (model, dtype, layout, ...)
 *     task       one load or dump under way
 *     tier       one element of the stack, "Cache|Posix" has two
 *
 * A round trip, less the error handling:
 *
 *     ucm_conf *conf;    ucm_conf_new(&conf);
 *     ucm_conf_set(conf, "store_pipeline", "Cache|Posix");
 *     ucm_conf_set(conf, "storage_backends", "/mnt/kv");
 *     ucm_conf_set(conf, "namespace", "my-model bf16 tp1");
 *     ucm_conf_set(conf, "block_size", "2097152");
 *     ucm_conf_set(conf, "shard_size", "65536");                     // 32 layers
 *     ucm_store *store;  ucm_store_open(conf, &store);
 *     ucm_map *map;      ucm_map_new(store, &desc, &map);
 *     ucm_task *task;    ucm_dump(store, map, &batch, &task);
 *     ucm_task_wait(task, UCM_STORED, 30000);  ucm_task_free(task);
 *     ssize_t hit = ucm_lookup_prefix(store, keys, n);               // leading blocks present
 *     ucm_load(store, map, &batch, &task);
 *     ucm_task_wait(task, UCM_RELEASED, 30000);                      // and see ucm_task_status()
 *
 * Errors     A call returns 0 or a count, or a negative errno.  Those of ucm's own making are in
 *            UCM_ERRORS; errors of the operating system pass unchanged.  Outputs (the parameters
 *            named *_p) are written only on success.  A block that is absent, damaged or late is a
 *            status of that block, never a failure of the store.
 * Ownership  const arguments are copied, or used only during the call.  Memory named by a map or
 *            an iovec is borrowed until the task is UCM_RELEASED.  Whatever _new or _open makes,
 *            _free or _close ends; both accept NULL.
 * Threads    A store may be used from any thread at any time.  A conf, a map while it is being
 *            freed, and a task belong to one thread at a time.  Nothing here survives fork(): a
 *            child must not use, free or close what its parent opened.
 * Blocking   Only ucm_store_open, ucm_store_close and ucm_task_wait* block, and ucm_lookup* for as
 *            long as it takes to read what other processes have just published (lookup_timeout_ms
 *            at most).  Everything else returns at once; a full queue is -EAGAIN.
 */
/* Columns are set by hand. */
/* clang-format off */
#ifndef UCM_H
#define UCM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#ifdef __cplusplus
extern "C" {
#endif

#define UCM_API __attribute__((visibility("default")))

#define UCM_VERSION "0.1.0"

/* ======================================= Part 1: using a store ================================ */

#define UCM_ERRORS(X)                                                                             \
    X(EINVAL, "invalid argument or option")                                                       \
    X(ENOENT, "no such block")                                                                    \
    X(EBADMSG, "the block failed its check and was dropped")                                      \
    X(EAGAIN, "queue full, try again later")                                                      \
    X(ENOSPC, "no room left in this tier")                                                        \
    X(ETIMEDOUT, "not finished in time")                                                          \
    X(ECANCELED, "canceled")                                                                      \
    X(ESHUTDOWN, "the store is closing")                                                          \
    X(ENODEV, "no such device or runtime")                                                        \
    X(ENOTSUP, "not supported by this tier or device")                                            \
    X(EINPROGRESS, "not finished yet")                                                            \
    X(ENOMEM, "out of memory")                                                                    \
    X(EIO, "input/output error")                                                                  \
    X(EROFS, "the storage can only be read")                                                      \
    X(EBUSY, "in use by another process")                                                         \
    X(ENOTDIR, "not a directory")                                                                 \
    X(ENOKEY, "sealed with a key that was not given (integrity_key_file)")

typedef struct ucm_conf ucm_conf;   /* options, before a store is opened */
typedef struct ucm_store ucm_store; /* an open stack of tiers */
typedef struct ucm_map ucm_map;     /* where an engine keeps its blocks */
typedef struct ucm_task ucm_task;   /* one load or dump under way */
typedef struct {
    uint8_t b[16];
} ucm_key;

UCM_API const char *ucm_version(void);

/* The text for an error number (negative or positive) in ucm's words, or the system's.  It speaks of
 * blocks: for an error met with a file or directory (ucm_inspect, ucm_conf_load) use strerror. */
UCM_API const char *ucm_strerror(int err);

/* ---- options ----
 *
 * A conf starts with the defaults.  Values given later win over earlier ones: first the YAML file,
 * then ucm_conf_set, then the environment.  An unknown key, a value of the wrong type or out of
 * range is -EINVAL at once, and changes nothing; ucm_conf_error then names the key, the value, where
 * it came from (file and line) and the nearest key there is.
 */
UCM_API int ucm_conf_new(ucm_conf **conf_p);
UCM_API int ucm_conf_set(ucm_conf *conf, const char *key, const char *value);
/* Reads a YAML file: the nesting of examples/ucm_config_example.yaml, or plain `key: value`. */
UCM_API int ucm_conf_load(ucm_conf *conf, const char *path);
/* Takes UCM_<KEY> from the environment for every key there is. */
UCM_API int ucm_conf_env(ucm_conf *conf);
/* The value in force, as text; NULL for an unknown key.  Switches read "true" or "false", choices as
 * they are listed, whatever spelling was given.  Valid until the conf changes. */
UCM_API const char *ucm_conf_get(const ucm_conf *conf, const char *key);
/* What went wrong in the last call that failed with this conf, ucm_store_open included; "" if none. */
UCM_API const char *ucm_conf_error(const ucm_conf *conf);
UCM_API void ucm_conf_free(ucm_conf *conf);

/* Visits every option there is, with the value it has in conf (conf may be NULL: the default). */
struct ucm_option_info {
    const char *owner; /* who reads it: "store", "Cache", "Posix", "psync", "connector", ... */
    const char *name, *type, *value, *def, *range, *help;
    int obsolete;         /* accepted for the sake of old files; has no effect */
    int given;            /* the value was set by someone */
};
typedef void ucm_option_fn(void *arg, const struct ucm_option_info *info);
UCM_API void ucm_options(const ucm_conf *conf, ucm_option_fn *fn, void *arg);

/* Visits every kind of device that the option `device` can name. */
struct ucm_device_info {
    const char *name, *help;
    int count;        /* of such devices here */
    const char *text; /* the library that serves them and how; or why there is none */
    int is_direct;    /* storage and their memory could exchange data without the host's */
    const char *direct; /* by what; or what is missing; NULL: nothing of the kind is known */
};
typedef void ucm_device_fn(void *arg, const struct ucm_device_info *info);
UCM_API void ucm_devices(ucm_device_fn *fn, void *arg);

/* ---- the store ---- */

/* Opens the stack that store_pipeline spells.  conf may be freed afterwards. */
UCM_API int ucm_store_open(ucm_conf *conf, ucm_store **store_p);
/* Finishes the dumps under way (timeout_ms at most), cancels the rest.  Tasks and maps of the store
 * must have been freed.  What storage or the device has not given back by then, because it hangs, it
 * keeps: memory of a task that is not RELEASED must not be used again or freed. */
UCM_API void ucm_store_close(ucm_store *store);

/* How many leading keys can be loaded, on every rank. */
UCM_API ssize_t ucm_lookup_prefix(ucm_store *store, const ucm_key *keys, size_t n);
/* Exact, per key: found[i] is 0 where absent, else 1 + the index of the slowest tier that must be
 * asked for it (1: all ranks in the first tier).  Returns how many were found. */
UCM_API ssize_t ucm_lookup(ucm_store *store, const ucm_key *keys, size_t n, uint8_t *found);
/* The same by what is known already, for who only watches: it does not block, and does not count as a
 * use, so what is asked about again and again is not kept for that. */
UCM_API ssize_t ucm_peek(ucm_store *store, const ucm_key *keys, size_t n, uint8_t *found);
/* The keys of up to n blocks, oldest first, that are no longer in storage, by whatever process they
 * were evicted or dropped there; some more than once (for each rank, each time).  The first call begins
 * to keep them and returns 0.  *lost: how many more have gone, or may have, that are not named; what
 * the caller believes to be stored is then to be looked up again.  A block that is back is not told;
 * one that is told may be in DRAM for a while.  What other processes did is asked for by the call
 * and told by a later one.  Does not wait for storage.  -ENOTSUP: the stack keeps nothing there. */
UCM_API ssize_t ucm_removed(ucm_store *store, ucm_key *keys, size_t n, uint64_t *lost);
/* A hint that these will be loaded soon; may be ignored. */
UCM_API void ucm_prefetch(ucm_store *store, const ucm_key *keys, size_t n);

/* ---- maps ----
 *
 * Segment i of shard s of engine block b is len bytes at segs[s * nsegs + i].base + b * stride.  The
 * segments of each shard must add up to shard_size / blocks_per_key (len 0 is a segment left out).
 * A block of the store is blocks_per_key engine blocks; in the stored shard these follow one another,
 * and within each its segments: how an engine cuts its blocks does not change what is stored.
 */
struct ucm_seg {
    void *base;         /* in the memory of the store's device */
    size_t stride, len; /* bytes */
};
struct ucm_map_desc {
    const struct ucm_seg *segs;
    unsigned nshards, nsegs, blocks_per_key;
    uint32_t nblocks; /* engine blocks in this memory: the bound that block numbers are checked by */
};
UCM_API int ucm_map_new(ucm_store *store, const struct ucm_map_desc *desc, ucm_map **map_p);
UCM_API void ucm_map_free(ucm_map *map); /* tasks under way keep what they need of it */

/* ---- loads and dumps ---- */

struct ucm_batch {           /* shards [shard, shard + nshards) of keys[i] <-> engine blocks */
    const ucm_key *keys;     /* n of them */
    const uint32_t *blocks;  /* n * blocks_per_key engine block numbers */
    const uint32_t *depths;  /* n positions in the prefix chain (0 = first), or NULL: 0, 1, 2 ... */
    size_t n;
    unsigned shard, nshards; /* nshards 0: all of them */
    unsigned group;          /* load this many shards at a time, in shard order; 0: all at once */
    void *after;             /* device event to wait for first, or NULL; borrowed until RELEASED */
    unsigned timeout_ms;     /* give up sooner than the store's timeout_ms; 0: no sooner */
};
/* -EINVAL: a block number or shard out of range.  -EAGAIN: the queue is full: a dump is best dropped,
 * a load treated as a miss.  The task must be freed. */
UCM_API int ucm_load(ucm_store *store, ucm_map *map, const struct ucm_batch *batch, ucm_task **task_p);
UCM_API int ucm_dump(ucm_store *store, ucm_map *map, const struct ucm_batch *batch, ucm_task **task_p);

/* The same with explicit addresses: one entry a (block, shard range), its bytes in order. */
struct ucm_sg {
    ucm_key key;
    uint32_t depth, shard, nshards;
    unsigned niov;
    const struct iovec *iov; /* borrowed until UCM_RELEASED; adds up to nshards * shard_size */
};
UCM_API int ucm_load_sg(ucm_store *store, const struct ucm_sg *v, size_t n, void *after,
                        ucm_task **task_p);
UCM_API int ucm_dump_sg(ucm_store *store, const struct ucm_sg *v, size_t n, void *after,
                        ucm_task **task_p);

/* ---- tasks ---- */

enum ucm_stage {
    UCM_RELEASED, /* the engine's memory is no longer read or written; a load has its data */
    UCM_STORED    /* a dump: other processes can load the blocks.  A load: the same as RELEASED */
};
/* Waits for a stage of all blocks: 0, the first error met, or -ETIMEDOUT (the task goes on).
 * timeout_ms < 0 waits for ever. */
UCM_API int ucm_task_wait(ucm_task *task, enum ucm_stage stage, int timeout_ms);
/* Waits until this shard of all blocks of a load is there: 0, its first error, or -ETIMEDOUT. */
UCM_API int ucm_task_wait_shard(ucm_task *task, unsigned shard, int timeout_ms);
/* 1 when the stage is reached by all blocks, failed ones included; else 0. */
UCM_API int ucm_task_done(const ucm_task *task, enum ucm_stage stage);
/* How many nanoseconds after it was begun the stage was reached by all blocks; else -EINPROGRESS. */
UCM_API int64_t ucm_task_ns(const ucm_task *task, enum ucm_stage stage);
/* Of entry i of the batch: 0, its error, or -EINPROGRESS.  -ENOENT and -EBADMSG are misses. */
UCM_API int ucm_task_status(const ucm_task *task, size_t i);
/* Calls fn once when the stage is reached, from another thread, or at once if it is already.  fn must
 * not block and must not free the task.  One notification a stage; it comes also when the task has
 * been freed before. */
typedef void ucm_done_fn(void *arg, int err);
UCM_API int ucm_task_notify(ucm_task *task, enum ucm_stage stage, ucm_done_fn *fn, void *arg);
/* Slices that have not started end with -ECANCELED; those under way end as they may. */
UCM_API void ucm_task_cancel(ucm_task *task);
/* Never blocks: cancels a load, lets a dump go on.  Memory is borrowed until RELEASED all the same:
 * wait for that before freeing a task whose memory is to be used again. */
UCM_API void ucm_task_free(ucm_task *task);

/* ---- log and metrics ---- */

enum ucm_level { UCM_ERROR, UCM_WARN, UCM_INFO, UCM_DEBUG };
/* fn gets one line without newline, from any thread; it must not call ucm.  NULL: standard error.
 * When ucm_log_to returns the former fn is no longer running: call it without the locks that fn takes.
 * UC_LOGGER_LEVEL (error|warn|info|debug) sets the level until this is called; UCM_LOG_PATH,
 * UCM_LOG_MAX_FILES and UCM_LOG_MAX_SIZE (MiB) add a rotated file. */
typedef void ucm_log_fn(void *arg, enum ucm_level level, const char *line);
UCM_API void ucm_log_to(ucm_log_fn *fn, void *arg, enum ucm_level most);

struct ucm_metric_info {
    const char *name, *kind, *help; /* kind: "counter" or "gauge" */
    double value;
};
typedef void ucm_metric_fn(void *arg, const struct ucm_metric_info *metric);
UCM_API void ucm_metrics(const ucm_store *store, ucm_metric_fn *fn, void *arg);

/* ---- looking into a storage backend (no store needed, engines may be running) ---- */

struct ucm_lane_info {
    const char *ns, *ns_text; /* digest in hex; what namespace.json says */
    const char *lane, *host;  /* directory name; host of the last owner */
    int pid, live;            /* of the last owner; whether it holds the lane now */
    unsigned rank, ranks;
    uint64_t block_size, shard_size;
    uint64_t epoch, generation, records; /* of the journal */
    uint64_t segments, slots, blocks;
    uint64_t bytes;      /* of segments and journal on disk */
    uint64_t bad, error; /* with UCM_INSPECT_VERIFY: blocks that failed; unreadable files */
    int locked;          /* sealed with a key that was not given: its blocks cannot be told */
};
struct ucm_block_info {
    ucm_key key;
    uint32_t segment, slot, depth;
    int64_t used;   /* last use that was written down, in seconds since 1970 */
    int64_t pinned; /* until when it is not evicted; 0: it is not pinned */
    int err; /* with UCM_INSPECT_VERIFY: 0, -EBADMSG, or the error met in reading it */
};
struct ucm_inspect {
    unsigned flags;
    ucm_conf *conf; /* integrity_key_file in it opens what is sealed with that key; or NULL, no key */
    void *arg;
    void (*lane)(void *arg, const struct ucm_lane_info *lane);    /* after its blocks */
    void (*block)(void *arg, const struct ucm_lane_info *lane, const struct ucm_block_info *block);
    void (*answered)(void *arg); /* the storage has said something: told more often than the rest */
};
#define UCM_INSPECT_VERIFY 1u /* read every block and check it */
/* Visits all lanes of all namespaces below a backend directory.  Reads only.  What goes wrong is also
 * told by ucm_conf_error of conf. */
UCM_API int ucm_inspect(const char *backend, const struct ucm_inspect *how);

/* ---- changing what a storage backend holds (no store needed, engines may be running) ----
 *
 * What is in lanes that nobody owns is changed at once.  The owners of the others are asked, and
 * answer when they next do something, or at once where they run on this kernel.  A block that was
 * stored, or used, after the call began is left alone.
 */
struct ucm_manage_info;
enum ucm_manage_op {
    UCM_MANAGE_RM,     /* drop blocks */
    UCM_MANAGE_REPAIR, /* drop blocks that fail their check */
    UCM_MANAGE_PIN,    /* do not evict blocks before `until` */
    UCM_MANAGE_UNPIN,
    UCM_MANAGE_GC /* give up segments, coldest first, until `capacity` holds all; no pinned block */
};
struct ucm_manage {
    enum ucm_manage_op op;
    ucm_conf *conf; /* as in ucm_inspect; what is sealed otherwise is left alone (-ENOKEY) */
    /* which blocks: all that fit what is given */
    const char *ns;  /* digest of a namespace, or the first 8 digits at least, or its text; or NULL */
    const char *key; /* first hex digits of the key, or NULL */
    int64_t before;  /* RM: last used before that, in seconds since 1970; 0: whenever */
    int64_t until;   /* PIN: seconds since 1970 */
    uint64_t capacity; /* GC: bytes */
    int timeout_ms;    /* how long to wait for owners when none answers */
    void *arg;
    /* RM, REPAIR: is it one of these?  NULL: yes.  (info: pinned, used and err are not told.) */
    int (*want)(void *arg, const char *ns, const char *lane, const struct ucm_block_info *info);
    /* what was done in each lane that holds such blocks, or could not be read; may be NULL */
    void (*lane)(void *arg, const struct ucm_manage_info *lane);
};
struct ucm_manage_info {
    const char *ns, *lane;
    int live;            /* was owned, so its owner was asked */
    uint64_t chosen;     /* blocks that fit */
    uint64_t done, kept; /* changed; left alone: good, used since, or gone before they were pinned */
    uint64_t left;       /* not answered, or not written */
    uint64_t segments;   /* given up */
    int err;             /* why something is left, or the lane cannot be read */
};
struct ucm_manage_total {
    uint64_t namespaces, lanes, chosen, done, kept, left, segments, unreadable;
    uint64_t bytes; /* GC: what the backend holds now, as posix_capacity_gb counts */
};
/* 0: all was tried, and total_p says what came of it. */
UCM_API int ucm_manage(const char *backend, const struct ucm_manage *how,
                       struct ucm_manage_total *total_p);

/* ================= Part 2: writing a tier, a device or an I/O engine ==========================
 *
 * Each is a table of functions that begins with a struct ucm_plugin.  The core allocates, zeroes and
 * frees the private state (size bytes), and fills in the options before open is called.  To add one,
 * see HACKING.md: one file, one row in the table of src/store/plugin.c.
 */
enum ucm_type {
    UCM_T_BOOL,    /* int: 0 or 1 */
    UCM_T_INT,     /* int64_t */
    UCM_T_FLOAT,   /* double */
    UCM_T_STR,     /* const char *, owned by the core; never NULL */
    UCM_T_CHOICE,  /* int: index into `min`, which lists the words: "auto|psync|io_uring" */
    UCM_T_OBSOLETE /* accepted with a warning; help says why */
};
struct ucm_option {
    const char *name;
    enum ucm_type type;
    size_t offset;              /* in the private state */
    const char *def, *min, *max; /* as text; min and max may be NULL */
    const char *help;
};
struct ucm_plugin {
    const char *kind, *name, *help;    /* kind: "tier", "device", "io", or "options" */
    const struct ucm_option *options;  /* ends with a NULL name; may be NULL */
    size_t size;                       /* of the private state */
};

/* ---- tiers ---- */

struct ucm_slice { /* a run of shards of one block, on its way up or down */
    ucm_key key;
    uint32_t depth;          /* position in the prefix chain */
    uint32_t shard, nshards; /* the run */
    uint32_t niov;           /* 0: the memory is the map's, at blocks[0 .. blocks_per_key) */
    union {
        const struct iovec *iov;
        const uint32_t *blocks;
    } at;
    void *priv; /* the receiving tier's, from submit to the last done */
};
/* A batch of slices.  The sender owns it and keeps it until the last done().  A tier that has taken
 * it calls done() for each slice: of a load once, with UCM_RELEASED; of a dump twice, first with
 * UCM_RELEASED, then with UCM_STORED, also when it failed.  done() may come from any thread, also from
 * within submit; it does not block, and no lock may be held around it. */
struct ucm_xfer {
    int dump;             /* else a load */
    int cancel;           /* set (atomically) by the sender: do not start further slices */
    uint64_t id;          /* for the log */
    uint64_t deadline_ns; /* CLOCK_MONOTONIC; a slice not started by then ends with -ETIMEDOUT */
    uint32_t n;
    struct ucm_slice *v;
    const ucm_map *map;   /* of the slices with niov == 0 */
    void *after;          /* device event to wait for before the memory is touched */
    void (*done)(struct ucm_xfer *x, struct ucm_slice *s, enum ucm_stage stage, int err);
    void *arg;            /* the sender's */
};
/* The pieces of memory of a slice in order; returns how many there are, and writes at most max. */
UCM_API size_t ucm_slice_pieces(const struct ucm_xfer *x, const struct ucm_slice *s,
                                struct iovec *iov, size_t max);

struct ucm_dev_ops;
struct ucm_geometry { /* what all tiers of a store agree on */
    uint8_t ns[16];      /* digest of namespace text, block_size, shard_size, ranks and integrity key */
    const char *ns_text; /* in plain words */
    uint64_t block_size, shard_size;
    uint32_t nshards, rank, ranks;
    uint32_t timeout_ms, lookup_timeout_ms;
    const struct ucm_dev_ops *dev; /* the device maps live on, and its state */
    void *dev_state;
    const ucm_conf *conf; /* for tiers that open an I/O engine; valid during open only */
};
struct ucm_counters;
struct ucm_tier {
    const struct ucm_tier_ops *ops;
    struct ucm_tier *next; /* the slower tier below, or NULL */
    const struct ucm_geometry *geo;
    struct ucm_counters *counters;
    void *priv;
    char why[512]; /* open, on failure: what is wrong and what to do */
};
enum ucm_use {
    UCM_WILL_LOAD,  /* what is found is of use, and kept until it is loaded */
    UCM_HAS_LOADED, /* from a tier above: of use, and not to be kept for a load; a hint */
    UCM_LOOKS_ONLY, /* of no use */
};
struct ucm_lookup { /* one call of ucm_lookup*, which may ask for some keys and ranks at a time */
    int up_to_date; /* what others have published before the call has been read, or waited for:
                     * a lookup that finds this set does not block */
    enum ucm_use use;
};
struct ucm_tier_ops {
    struct ucm_plugin p;
    int needs_next; /* cannot be the last tier */
    int needs_host; /* as the first tier: only for devices whose memory the host can address */
    int (*open)(struct ucm_tier *t);   /* may block; the tier below is open */
    void (*close)(struct ucm_tier *t); /* ends each slice it has taken, then stops its threads */
    /* Sets found[i] to `level` for each key of that rank it or a tier below (then level + 1 ...) can
     * load; skips entries that are not 0.  call is passed on.  Any thread. */
    void (*lookup)(struct ucm_tier *t, const ucm_key *keys, size_t n, uint32_t rank, uint8_t level,
                   uint8_t *found, struct ucm_lookup *call);
    /* Never blocks.  0: taken.  Negative: nothing of it was taken.  Any thread. */
    int (*submit)(struct ucm_tier *t, struct ucm_xfer *x);
    void (*prefetch)(struct ucm_tier *t, const ucm_key *keys, size_t n); /* optional */
    /* ucm_removed, of the last tier; adds to *lost.  Optional. */
    ssize_t (*removed)(struct ucm_tier *t, ucm_key *keys, size_t n, uint64_t *lost);
};

/* ---- devices ---- */

struct ucm_copy {
    void *dev, *host;
    size_t len;
};
struct ucm_dev_ops {
    struct ucm_plugin p;
    int host_access; /* the host's loads, stores and system calls reach its memory */
    /* How many there are, and by what; or an error, and why.  Optional: one, always. */
    int (*probe)(char *text, size_t len);
    /* Does storage reach its memory without the host's?  0, and by what; or an error, and what is
     * missing.  Optional: no. */
    int (*direct)(char *text, size_t len);
    int (*open)(void *d, int ordinal, char *why, size_t why_len);
    void (*close)(void *d);
    /* Registers host memory, which is allocated by then, for fast copies; no copy reaches beyond
     * what was registered at once.  Optional, both or none. */
    int (*pin)(void *d, void *p, size_t len);
    void (*unpin)(void *d, void *p, size_t len);
    /* A stream is an ordered queue of copies.  One thread uses a stream at a time. */
    int (*stream_new)(void *d, void **stream_p);
    void (*stream_free)(void *d, void *stream); /* after what is queued has ended */
    /* Queues copies, device to host or host to device.  v is used only during the call.  A thread
     * that uses a stream keeps the device's context, or whatever its vendor calls it. */
    int (*copy)(void *d, void *stream, int to_host, const struct ucm_copy *v, size_t n);
    /* What is queued from now on waits for an event of the engine. */
    int (*after)(void *d, void *stream, void *event);
    /* Calls fn(arg, err) when all that was queued has ended: once, from any thread, also from within
     * the call; err is the first failure of those copies.  fn does not block, and has returned when
     * stream_free does. */
    int (*then)(void *d, void *stream, void (*fn)(void *arg, int err), void *arg);
};

/* ---- I/O engines ---- */

enum ucm_io_op { UCM_IO_READV, UCM_IO_WRITEV, UCM_IO_SYNC }; /* SYNC: fdatasync */
struct ucm_io {
    enum ucm_io_op op;
    int fd;
    off_t off;
    const struct iovec *iov; /* borrowed until reaped; at most 1024 */
    unsigned niov;
    int brief;   /* some pages into the page cache: an engine may do it within submit */
    ssize_t res; /* bytes moved: all of them, or fewer only at the end of the file; or -errno */
    void *arg;   /* the sender's */
    uint64_t priv[6]; /* the engine's, from submit to reap */
};
/* Changes of names and sizes, one at a time and synchronous, so that an engine that wraps another can
 * see (and spoil) everything that changes the disk. */
enum ucm_file_op {
    UCM_FILE_OPEN,     /* path relative to dirfd, flags, mode; returns the descriptor */
    UCM_FILE_CLOSE,    /* fd */
    UCM_FILE_ALLOCATE, /* fd: blocks for [0, len) for real */
    UCM_FILE_TRUNCATE, /* fd to len */
    UCM_FILE_SYNC,     /* fd, data and metadata */
    UCM_FILE_RENAME,   /* path to path2, both relative to dirfd */
    UCM_FILE_UNLINK,   /* path; flags AT_REMOVEDIR for a directory */
    UCM_FILE_MKDIR     /* path, mode */
};
struct ucm_file {
    enum ucm_file_op op;
    int dirfd, fd, flags;
    mode_t mode;
    const char *path, *path2;
    off_t len;
};
struct ucm_io_ops {
    struct ucm_plugin p;
    int (*open)(void *io, unsigned depth, char *why, size_t why_len);
    void (*close)(void *io); /* nothing is in flight */
    /* submit and reap: one thread at a time.  submit returns how many of v it took, from the front
     * (0: full, reap first), or an error if none. */
    int (*submit)(void *io, struct ucm_io **v, unsigned n);
    /* Waits for at least one completion, a wake, or timeout_ms (< 0: for ever); returns how many
     * completions it wrote to v, or an error when the engine itself has failed. */
    int (*reap)(void *io, struct ucm_io **v, unsigned max, int timeout_ms);
    void (*wake)(void *io); /* ends a reap now or the next one; any thread */
    /* Optional; NULL: the plain system call.  0 or a descriptor, or -errno. */
    int (*file)(void *io, const struct ucm_file *f);
};

#ifdef __cplusplus
}
#endif
#endif

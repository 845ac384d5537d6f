/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache.h - the Cache tier, as its files share it.
 *
 * A slice that the tier has taken is a part; the parts of an xfer are a job.  Two threads, the
 * movers, take them through: "ucm-in" loads, "ucm-out" dumps and writes down what was dumped.  A
 * block that this process is filling, or that it writes down, has a struct block; a block that is
 * only READY in the pool has none.
 *
 *     load: READY in the pool -> copy (pinned) -> done
 *           else claim a slot (asking below first, if a block has to go for it), read the run of
 * shards from below (child), copy, done dump: claim a slot, copy -> RELEASED; when the block is
 * whole: READY, and written down (child)
 *           -> STORED
 *
 * A part waits in one place at a time: mover.todo (to be looked at), mover.room (no slot to be
 * had), cache.unasked or ask.parts (does the tier below have it?), mover.foreign (another process
 * fills its block), block.waiters (shards on their way), a flight (a copy under way), block.stored
 * (a dump, until the block is written down).
 *
 *   cache.c       options, open and close, submit, lookup
 *   cache_move.c  the movers: their loop, timers, the ends of parts
 *   cache_copy.c  flights: copies between the engine and the pool
 *   cache_block.c blocks, and children: the xfers to the tier below
 *   cache_in.c    what to do with a load
 *   cache_out.c   what to do with a dump; write-behind
 *   cache_ask.c   a third thread, "ucm-ask": whether the tier below has a block
 *
 * cache.lock guards blocks, parts and the lists they are in; mover.lock, a leaf, what others hand
 * to a mover.  Neither is held around a copy, a call of the tier below, or done().
 */
#ifndef UCMI_CACHE_H
#define UCMI_CACHE_H

#include "store/pool.h"
#include "store/store.h"

enum {
    SHARD_WORDS = (UCMI_MAX_SHARDS + 63) / 64,
    TICK_MS = 2,      /* how often is looked again for what only another process can change */
    CHILD_MAX = 64,   /* slices of an xfer to the tier below */
    PASS_PARTS = 256, /* parts looked at with the lock held once */
    FLIGHT_BYTES = 8 << 20,
    FLIGHTS_MAX = 32, /* on a stream: more would only wait there */
    COPY_MAX = 1024,  /* pieces handed to the device at once */
    TORN_MAX = 1024,  /* blocks whose dump by layers is remembered as torn; a power of two */
    ASK_MAX = 256,    /* blocks that the tier below is asked for at once */
    ORPHANS_MAX = 8,  /* blocks that others left being written down at a time */
};

/* ---- lists ---- */

struct link {
    struct link *prev, *next;
};
static inline void list_init(struct link *list)
{
    list->prev = list->next = list;
}
static inline bool list_empty(const struct link *list)
{
    return list->next == list;
}
static inline void list_add(struct link *list, struct link *item) /* at the end */
{
    item->prev = list->prev;
    item->next = list;
    list->prev->next = item;
    list->prev = item;
}
static inline void list_del(struct link *item)
{
    item->prev->next = item->next;
    item->next->prev = item->prev;
    list_init(item);
}
static inline struct link *list_take(struct link *list) /* the first, or NULL */
{
    struct link *item = list->next;
    if (item == list)
        return NULL;
    list_del(item);
    return item;
}
/* Moves all of `from` to the front of `list`. */
static inline void list_splice(struct link *list, struct link *from)
{
    if (list_empty(from))
        return;
    from->prev->next = list->next;
    list->next->prev = from->prev;
    list->next = from->next;
    from->next->prev = list;
    list_init(from);
}
#define LIST_ITEM(link, type, member) CONTAINER_OF(link, type, member)

/* ---- what moves ---- */

struct cache;
struct mover;
struct block;

struct event { /* something ended; posted to the mover that handles it, with the lock held */
    struct event *next;
    void (*handle)(struct mover *m, struct event *e, struct link *fin);
};

enum part_state {
    PART_TODO,
    PART_ROOM,
    PART_FOREIGN,
    PART_ASK,
    PART_SHARDS,
    PART_COPY,
    PART_RELEASED, /* a dump's memory is free; its block is not yet asked when it will be stored */
    PART_STORING,
    PART_OVER,
};
struct part {
    struct link link;
    struct job *job;
    struct block *block; /* counted in its users, but not while STORING */
    uint32_t slot;       /* a load of a READY block: pinned by us */
    uint32_t from, to;   /* the shards being copied */
    uint32_t asked_at;   /* its place in ask */
    enum part_state state;
    int err;
    bool told;  /* RELEASED was told */
    bool late;  /* had to wait for a slot */
    bool known; /* a load: the tier below says that it has the block */
};
struct job {
    struct link link; /* in mover.jobs */
    struct mover *m;
    struct ucm_xfer *x;           /* gone after the last part is over */
    uint64_t id, bytes, start_ns; /* start_ns 0: not logged */
    uint64_t deadline_ns;
    _Atomic uint32_t left; /* parts that are not over */
    uint32_t n;
    bool fetch_only; /* a prefetch: into the pool and no further */
    bool waited_for; /* the device was told to wait for x->after */
    bool given_up;   /* its deadline has passed or it was canceled: what waits was ended */
    struct part parts[];
};
static inline struct ucm_slice *part_slice(const struct part *p)
{
    return &p->job->x->v[p - p->job->parts];
}

enum below { /* what the tier below has of a block */
             BELOW_UNKNOWN,
             BELOW_QUEUED,  /* in cache.dirty */
             BELOW_WRITING, /* in a child */
             BELOW_KNOWN,   /* written, or read from there; or that failed, see below_err */
};
struct block {
    struct link link; /* in cache.making, or cache.dirty while BELOW_QUEUED */
    struct link waiters, stored;
    ucm_key key;
    uint32_t slot, depth;
    uint32_t users; /* parts, slices of children, the dirty list */
    uint32_t nready;
    bool whole;  /* all shards are there: READY, and pinned by us */
    bool dirty;  /* some came from the engine */
    bool failed; /* some could not be read: to be dropped when nobody uses it */
    bool orphan; /* we write it down for a process that is gone; counted in cache.norphans */
    enum below below;
    int below_err;
    uint64_t touched_ns;
    uint64_t ready[SHARD_WORDS], busy[SHARD_WORDS];
    uint64_t seen[SHARD_WORDS]; /* shards that dumps have brought here, or failed to */
};
struct torn { /* a block that ended when a dump by layers had brought these shards, and not the rest
               */
    ucm_key key;
    uint64_t until_ns; /* 0: empty */
    uint64_t seen[SHARD_WORDS];
};

struct child_slice {
    struct event e;
    struct child *child;
    struct block *block;
    struct iovec iov;
    int err;
};
struct child { /* an xfer of ours to the tier below */
    struct ucm_xfer x;
    struct link link; /* in mover.unsent, or in a pass */
    struct mover *m;
    uint32_t left; /* slices whose end was not handled; the mover's own */
    struct ucm_slice v[CHILD_MAX];
    struct child_slice part[CHILD_MAX];
};

struct flight { /* copies queued together */
    struct event e;
    struct mover *m;
    struct link parts;
    int err;
};

struct mover {
    struct cache *c;
    bool out;
    bool started;
    pthread_t thread;
    void *stream;

    pthread_mutex_t lock; /* guards these, up to the cond */
    struct link inbox;    /* jobs */
    struct event *events, **events_end;
    size_t lent; /* slices that the tier below has in its hands */
    bool kicked, sleeping, gone;
    bool at_device; /* in a call of the device, which may hang */
    bool over;      /* the thread has ended, but for its last return */
    bool orphaned;  /* and before all slices came back: the last one lets the cache go */
    pthread_cond_t more;

    _Atomic bool left_alone;   /* nobody waits for its end: the tier below may be closed by now */
    _Atomic uint64_t heard_ns; /* when something it had started was last over */

    _Atomic int64_t njobs;                 /* taken and not over */
    struct link jobs, todo, room, foreign; /* cache.lock */
    size_t moving;                         /* parts not RELEASED; cache.lock */
    uint8_t *freed;                        /* per set: slots freed since room was looked at */
    uint32_t freed_sum, freed_any;

    /* the thread's own */
    struct link unsent; /* children that the tier below had no room for */
    bool resend;
    size_t nchildren, nflights;
    uint64_t deadline_ns; /* the earliest of the jobs, or earlier */
    uint64_t tick_ns;
    struct iovec *pieces;
    size_t npieces;
    struct ucm_copy copies[COPY_MAX];
    size_t ncopies;
};

struct ask { /* one question to the tier below at a time */
    struct event e;
    pthread_t thread;
    bool started, under_way; /* the latter: cache.lock */
    pthread_mutex_t lock;
    pthread_cond_t more;
    bool ready, stop;
    struct link parts; /* cache.lock */
    uint32_t n;
    ucm_key keys[ASK_MAX];
    uint8_t found[ASK_MAX];
};

struct cache {
    struct ucm_tier *t;
    const struct ucm_geometry *geo;
    struct ucm_counters *counters;
    struct ucmi_pool *pool;
    int64_t jobs_max, slices_max;
    uint64_t timeout_ns;
    _Atomic int64_t slices; /* taken and not over */
    struct mover in, out;
    struct ask ask;

    pthread_mutex_t lock;
    struct block **blocks; /* per slot, or NULL */
    struct torn *torn;     /* TORN_MAX, by key; the oldest is forgotten */
    uint32_t nblocks;      /* how many there are */
    struct link making;    /* blocks that are not whole, the longest untouched first */
    struct link dirty;     /* blocks to be written down */
    struct link unasked;   /* loads to ask the tier below about */
    uint32_t orphan_at;    /* slots from here on may have blocks that others left */
    uint32_t norphans;     /* being written down */
    uint64_t sweep_ns;     /* not before */
    _Atomic int keepers;   /* movers that are not over, or are orphaned; and who closes */
    _Atomic int movers;    /* that may use the device */
    int closing;           /* 1: no more loads; 2: dumps are done with, too */
    uint64_t close_ns;     /* then the rest is given up */
};

struct pass { /* what one look of a mover at its list has found to do, without the lock */
    uint64_t now_ns;
    struct link fin;      /* parts to tell the sender about */
    struct link copies;   /* parts to copy */
    uint64_t bytes;       /* of copies */
    struct link children; /* to submit; the last one may have room for more slices */
};

/* cache_move.c */
void *ucmi_mover_main(void *arg);
int ucmi_mover_init(struct mover *m, struct cache *c, bool out);
void ucmi_mover_destroy(struct mover *m);
int ucmi_mover_hand(struct mover *m, struct job *j); /* -ESHUTDOWN: the mover has ended */
void ucmi_mover_post(struct mover *m, struct event *e);
void ucmi_mover_kick(struct mover *m);
void ucmi_mover_lend(struct mover *m, size_t slices);
void ucmi_mover_return(struct mover *m, struct event *e); /* one that was lent, and its end */
void ucmi_cache_let_go(struct cache *c); /* of who kept it; the last one frees it */
/* With cache.lock held. */
void ucmi_part_over(struct part *p, int err, struct link *fin);
void ucmi_part_wait(struct part *p, struct link *list, enum part_state state);
void ucmi_part_todo(struct part *p);
void ucmi_cache_freed(struct cache *c, uint32_t slot);
/* The part found no slot, or another process fills its block. */
void ucmi_part_no_slot(struct mover *m, struct part *p, bool foreign);
/* The pool's answer for a part's block, after an attempt to make room if there is none. */
enum ucmi_pool_got ucmi_part_get(struct mover *m, struct part *p, struct pass *pass,
                                 enum ucmi_pool_take take, uint32_t *slot);

/* cache_ask.c */
int ucmi_ask_start(struct cache *c);
void ucmi_ask_stop(struct cache *c); /* the in mover has ended */
void ucmi_ask_next(struct cache *c); /* with cache.lock held */

/* cache_copy.c; without cache.lock: queues the copies of a pass; those that cannot be are in fin */
void ucmi_copy_launch(struct mover *m, struct pass *pass);
void ucmi_copy_end(struct mover *m); /* frees the stream, after what is queued there */

/* cache_block.c; with cache.lock held, but for sending */
struct block *ucmi_block_new(struct cache *c, const struct ucm_slice *s, uint32_t slot, bool whole,
                             uint64_t now_ns);
bool ucmi_block_has(const uint64_t *bits, uint32_t from, uint32_t to); /* all of them */
bool ucmi_block_any(const uint64_t *bits, uint32_t from, uint32_t to);
void ucmi_block_set(uint64_t *bits, uint32_t from, uint32_t to);
/* The first run of shards in [from, to) that are neither there nor on their way; false if none. */
bool ucmi_block_gap(const struct block *b, uint32_t from, uint32_t to, uint32_t *gap_from,
                    uint32_t *gap_to);
void ucmi_block_begin(struct cache *c, struct block *b, uint32_t from, uint32_t to,
                      uint64_t now_ns);
void ucmi_block_done(struct cache *c, struct block *b, uint32_t from, uint32_t to, int err,
                     struct link *fin);
void ucmi_block_unref(struct cache *c, struct block *b, struct link *fin);
void ucmi_block_end(struct cache *c, struct block *b, int err, struct link *fin);
void ucmi_block_written(struct cache *c, struct block *b, int err, struct link *fin);
struct child_slice *ucmi_child_add(struct mover *m, struct pass *pass, struct block *b,
                                   uint32_t from, uint32_t to, uint64_t deadline_ns);
void ucmi_child_send(struct mover *m, struct child *ch);
void ucmi_child_resend(struct mover *m);
void ucmi_child_fail(struct child *ch, int err);
void ucmi_child_unref(struct child *ch); /* one of its slices has been dealt with */

/* cache_in.c, cache_out.c; with cache.lock held */
void ucmi_load_place(struct mover *m, struct part *p, struct pass *pass);
void ucmi_load_copied(struct cache *c, struct part *p, int err, struct link *fin);
void ucmi_load_read(struct mover *m, struct event *e, struct link *fin);
void ucmi_dump_place(struct mover *m, struct part *p, struct pass *pass);
void ucmi_dump_copied(struct cache *c, struct part *p, int err, struct link *fin);
/* A dump's part that has failed: what it was to bring will not come. */
void ucmi_dump_lost(struct cache *c, struct part *p, struct link *fin);
/* Nobody uses the block any more: what was brought, if not all was. */
void ucmi_dump_torn(struct cache *c, const struct block *b);
void ucmi_dump_join(struct cache *c, struct part *p, struct link *fin);
void ucmi_dump_queue(struct cache *c, struct block *b); /* which is whole: to be written down */
void ucmi_dump_write(struct mover *m, struct pass *pass);
/* There may be blocks that others left, and they may be written down now. */
bool ucmi_dump_orphans(const struct mover *m);
void ucmi_dump_written(struct mover *m, struct event *e, struct link *fin);

#endif

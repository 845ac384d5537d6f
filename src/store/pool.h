/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.h - the DRAM pool: slots of whole blocks, and which block is in which.
 *
 * A pool is one piece of memory, as a rule a file that all processes of a user and namespace share:
 *
 *     header | tags: 2 bytes a slot, 32 slots a line | metas: 64 bytes a slot | slots
 *
 * The memory of slots is allocated by a thread, the same way of all sets before the next (it takes
 * a second for every few GiB, and nobody waits for it); only what is there can be claimed.
 *
 * It works like a processor's cache.  A block may lie in any slot of two sets of up to 32, chosen
 * by two hashes of (key, rank); which slot holds what is in the slot's meta, and 16 bits of the
 * hash are in its tag, so that a lookup reads two lines of tags and hardly ever a wrong meta.
 *
 * Every transition is a compare-and-swap of the meta's word {generation, owner, state}:
 *
 *     FREE       -> CLAIMED                  by whoever needs a slot; the generation goes up
 *     READY      -> EVICTING -> CLAIMED      the coldest of the two sets (policy.h), if not held
 *     CLAIMED    -> FILLING                  the key is written; others can see who fills the block
 *     FILLING    -> READY                    ucmi_pool_publish
 *     FILLING    -> CLAIMED -> FREE          ucmi_pool_drop
 *     FILLING of a dead owner -> QUARANTINE -> CLAIMED -> FREE                 ucmi_pool_sweep
 *
 * What must hold:
 *   - The bytes of a slot are written only by the owner of its word, in state FILLING, and read
 * only in FILLING by the owner or under a pin.  An owner that lives, stopped or not, keeps it.
 *   - What a dead owner has sent for may still come.  Its slot leaves QUARANTINE with new pages in
 * place of those, or, where a device knows the old ones by address, after a time.
 *   - A pin is a bit of meta.holders.  Who evicts sets EVICTING, then reads holders; who pins sets
 * its bit, then reads the word.  One of them sees the other and backs off.
 *   - Who fills a block publishes its claim (FILLING, with tag and key), then looks for another
 *     claim to the same block, and gives up its own if there is one: a block is being filled or
 *     ready in one slot at most.
 *   - A block that is READY but not STORED says who writes it down.  When that process is gone, it
 * is marked as nobody's, and one that adopts it, by a compare-and-swap of the mark, does it
 * instead.
 *   - There is no lock in this memory.  A process has an index 0..63 while it holds an OFD lock on
 *     that byte of the file: what a dead one left behind is told by asking the kernel.
 *
 * Any thread may call anything but open and close.
 */
#ifndef UCMI_POOL_H
#define UCMI_POOL_H

#include "store/policy.h"

enum {
    UCMI_POOL_WAYS = 32,    /* slots of a set, at most */
    UCMI_POOL_MEMBERS = 64, /* processes that can share a pool */
};
#define UCMI_POOL_NONE UINT32_MAX

enum ucmi_slot_state { /* the low bits of a meta's word */
                       UCMI_SLOT_FREE,
                       UCMI_SLOT_CLAIMED,
                       UCMI_SLOT_FILLING,
                       UCMI_SLOT_READY,
                       UCMI_SLOT_EVICTING,
                       UCMI_SLOT_QUARANTINE,
};

struct ucmi_pool_meta {
    _Alignas(64) _Atomic uint64_t word; /* generation << 16 | owner << 8 | state */
    _Atomic uint64_t holders;           /* a bit for each process that has pinned the slot */
    _Atomic uint64_t key[2];
    _Atomic uint32_t rank, depth;
    _Atomic uint32_t tick;     /* when it was last used; in the future: leased until then */
    _Atomic uint32_t again;    /* 1: it was used before that: policy.h */
    _Atomic uint64_t since_ns; /* QUARANTINE: from when */
    _Atomic uint64_t unstored; /* generation and owner: who is to write down the block that is READY
                                * in this generation, and has not; 0: nobody needs to */
};

struct ucmi_pool_layout { /* where everything is; the same in all processes that share a pool */
    uint8_t ns[16];
    uint64_t block_size, shard_size, pitch;
    uint64_t tags_at, metas_at, data_at, size;
    uint32_t version, meta_size, nslots, nsets;
};

struct ucmi_pool_head {
    _Atomic uint64_t magic; /* written when all the rest is in place */
    struct ucmi_pool_layout layout;
    _Atomic uint64_t members;     /* indexes that may have left something in the metas */
    _Atomic uint64_t fixed;       /* those whose device knows the pages: they stay what they are */
    _Atomic uint64_t wanted;      /* those that fill a block which another member waits for */
    _Atomic uint32_t quarantined; /* slots in QUARANTINE */
    _Atomic int64_t ready;        /* slots in READY */
    _Atomic uint32_t busy[UCMI_POOL_MEMBERS]; /* slots each member fills or writes down */
    _Atomic uint64_t span;                    /* of the policy: all members learn it together */
    _Atomic uint32_t grown;                   /* slots whose memory is allocated: ucmi_pool_place */
    _Atomic uint32_t grower; /* the member that allocates the rest; UCMI_POOL_MEMBERS: none */
};

struct ucmi_pool {
    struct ucmi_pool_head *head;
    _Atomic uint64_t *tags; /* [nsets][8], four tags each */
    struct ucmi_pool_meta *metas;
    char *data;
    struct ucmi_pool_layout layout; /* a copy: what is shared is not believed twice */
    uint32_t set_base, set_extra;   /* slots of a set; how many sets have one more */
    unsigned me;                    /* our index */
    uint64_t quarantine_ns;
    struct ucm_counters *counters;
    struct ucmi_policy policy; /* the span is all members', the ghosts are of what we evicted */

    pthread_mutex_t lock; /* guards pins; a leaf */
    uint32_t *pins;       /* ours, per slot; the first sets our bit, the last clears it */

    pthread_mutex_t sweep_lock; /* one sweep at a time in a process */
    int fd;                     /* -1: private memory */
    char *path;

    /* pool_grow.c */
    const struct ucm_dev_ops *dev; /* may be NULL */
    void *dev_state;
    uint32_t step;             /* slots that get their memory, and are registered, at a time */
    _Atomic uint64_t *touched; /* a bit per slot: its pages are in our page tables */
    _Atomic uint8_t *steps;    /* with a device that registers memory: whether it has, each */
    pthread_mutex_t pin_lock;  /* around a registration; a leaf */
    pthread_t grow, pin;
    bool growing, pinning; /* the thread was started */
    _Atomic bool stop;

    _Atomic bool orphans; /* some were marked since this was last cleared */
};

/* ---- opening: pool_shm.c ---- */

struct ucmi_pool_spec {
    const char *dir; /* NULL: private memory */
    uint64_t bytes;  /* 0: what the machine can give */
    uint8_t ns[16];
    uint64_t block_size, shard_size;
    const struct ucm_dev_ops *dev; /* the device that blocks are copied from and to, or NULL */
    void *dev_state;
    uint32_t
        quarantine_ms; /* how long the I/O of a killed process may be on its way to such pages */
    struct ucm_counters *counters;
};
/* Joins the pool of the namespace or makes it.  A pool that cannot be shared (made by another
 * version, 64 processes in it) is replaced by a private one, with a line in the log. */
int ucmi_pool_open(const struct ucmi_pool_spec *spec, struct ucmi_pool **pool_p, char *why,
                   size_t why_len);
/* Our pins and claims must be gone.  The last one out removes the file. */
void ucmi_pool_close(struct ucmi_pool *p);
/* How many bytes a pool of that many slots takes. */
uint64_t ucmi_pool_bytes(uint32_t nslots, uint64_t block_size);
/* How many slots can be claimed by now: all of them, some time after the pool was made. */
uint32_t ucmi_pool_grown(const struct ucmi_pool *p);
/* Takes back what dead processes left behind; returns how many slots were changed.  Does nothing
 * while another process sweeps, joins or leaves. */
unsigned ucmi_pool_sweep(struct ucmi_pool *p);

/* ---- slots: pool.c ---- */

struct ucmi_pool_want {
    ucm_key key;
    uint32_t rank, depth;
};
enum ucmi_pool_got {
    UCMI_POOL_READY,   /* the block is in *slot, pinned for us */
    UCMI_POOL_CLAIMED, /* *slot is ours to fill: publish or drop it */
    UCMI_POOL_MINE,    /* we are filling it, in *slot */
    UCMI_POOL_BUSY,    /* another process is filling or evicting it */
    UCMI_POOL_FULL,    /* no slot of the two sets can be taken now */
};
enum ucmi_pool_take { /* for a block that is nowhere; what may not be taken is FULL */
                      UCMI_POOL_LOOK,  /* nothing */
                      UCMI_POOL_FREE,  /* a free slot */
                      UCMI_POOL_EVICT, /* or that of another block */
};
enum ucmi_pool_got ucmi_pool_get(struct ucmi_pool *p, const struct ucmi_pool_want *want,
                                 enum ucmi_pool_take take, uint32_t *slot_p);
/* FILLING -> READY for all processes; pinned for us. */
void ucmi_pool_publish(struct ucmi_pool *p, uint32_t slot);
/* FILLING -> FREE: the block will not come. */
void ucmi_pool_drop(struct ucmi_pool *p, uint32_t slot);
void ucmi_pool_unpin(struct ucmi_pool *p, uint32_t slot);
/* Whether another process has found a block BUSY that we fill, since this was last asked. */
bool ucmi_pool_wanted(struct ucmi_pool *p);
/* Says how many slots we fill or write down; returns how many all members together do.  Two who say
 * it at once: one of them at least counts the other. */
uint32_t ucmi_pool_busy(struct ucmi_pool *p, uint32_t ours);
/* Before a block is published: we are going to write it down.  And when it is STORED, while it is
 * pinned, whoever was to do it. */
void ucmi_pool_unstored(struct ucmi_pool *p, uint32_t slot);
void ucmi_pool_stored(struct ucmi_pool *p, uint32_t slot);
/* True: the slot has a block of that rank that is not STORED, and whose writer is gone.  It is
 * pinned for us, and ours to write down; *what says what it is. */
bool ucmi_pool_adopt(struct ucmi_pool *p, uint32_t slot, uint32_t rank,
                     struct ucmi_pool_want *what);
/* Sets found[i] to level where it is 0 and the block is READY, and, if asked to, leases the block
 * for some seconds: colder ones go first.  Returns how many entries are still 0. */
size_t ucmi_pool_lookup(struct ucmi_pool *p, const ucm_key *keys, size_t n, uint32_t rank,
                        uint8_t level, uint8_t *found, bool leases);
/* Before a slot is copied to or from: its memory is registered with the device, or, where that is
 * the host, all its pages are brought into our page tables with one call, at a fraction of what a
 * fault for each of them costs. */
void ucmi_pool_touch(struct ucmi_pool *p, uint32_t slot);
/* The two sets of a block (equal if there is only one), and the slots of a set. */
void ucmi_pool_sets(const struct ucmi_pool *p, const ucm_key *key, uint32_t rank, uint32_t sets[2]);

static inline uint32_t ucmi_pool_set_first(const struct ucmi_pool *p, uint32_t set)
{
    return set * p->set_base + MIN(set, p->set_extra);
}
static inline uint32_t ucmi_pool_set_size(const struct ucmi_pool *p, uint32_t set)
{
    return p->set_base + (set < p->set_extra);
}
static inline uint32_t ucmi_pool_set_of(const struct ucmi_pool *p, uint32_t slot)
{
    uint32_t big = (p->set_base + 1) * p->set_extra; /* slots in the sets that have one more */
    return slot < big ? slot / (p->set_base + 1) : p->set_extra + (slot - big) / p->set_base;
}
/* Where a slot lies among all, in memory and in the order in which they are allocated. */
static inline uint32_t ucmi_pool_place(const struct ucmi_pool *p, uint32_t slot)
{
    uint32_t set = ucmi_pool_set_of(p, slot);
    return (slot - ucmi_pool_set_first(p, set)) * p->layout.nsets + set;
}
static inline uint64_t ucmi_pool_bit(const struct ucmi_pool *p)
{
    return UINT64_C(1) << p->me;
}
static inline char *ucmi_pool_memory(const struct ucmi_pool *p, uint32_t slot)
{
    return p->data + (size_t)ucmi_pool_place(p, slot) * p->layout.pitch;
}

/* For pool_shm.c: puts what the dead owner of a slot left into order; 1 if it was changed. */
unsigned ucmi_pool_reclaim(struct ucmi_pool *p, uint32_t slot, uint64_t dead);
/* What processes that are gone were to write down there is nobody's. */
void ucmi_pool_disown(struct ucmi_pool *p, uint32_t slot, uint64_t gone);
/* Counts the slots in READY, while nobody else is there. */
void ucmi_pool_recount(struct ucmi_pool *p);
/* A slot whose quarantine is over becomes FREE; 1 if so. */
unsigned ucmi_pool_parole(struct ucmi_pool *p, uint32_t slot, uint64_t now_ns);
/* ---- the memory of slots: pool_grow.c ---- */

int ucmi_pool_reserve(int fd, uint64_t from, uint64_t len);
int ucmi_pool_grow_init(struct ucmi_pool *p);  /* when it is mapped */
int ucmi_pool_grow_first(struct ucmi_pool *p); /* what there is at once */
void ucmi_pool_grow_start(struct ucmi_pool *p);
/* With the gate held: others are the members that live, but for us. */
void ucmi_pool_grow_if_nobody_does(struct ucmi_pool *p, uint64_t others);
void ucmi_pool_pin_start(struct ucmi_pool *p);
void ucmi_pool_grow_stop(struct ucmi_pool *p); /* and takes what was registered back */
/* For pool.c, with the gate held: new pages for a slot that nobody uses.  What is on its way into
 * the old ones ends there.  False: it has them still, or none, for lack of space; with `keep` the
 * old ones will do. */
bool ucmi_pool_renew(struct ucmi_pool *p, uint32_t slot, bool keep);

#endif

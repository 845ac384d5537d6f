/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lane.h - a directory of segments and a journal: followed by everybody, written by one.
 *
 * All of this is the pump's private state (posix.h).
 */
#ifndef UCMI_LANE_H
#define UCMI_LANE_H

#include <sys/queue.h>

#include "store/journal.h"

enum { UCMI_LANE_NAME = 40, UCMI_MAX_LANES = 0xffff };

enum ucmi_disk_state {
    UCMI_DISK_FREE,
    UCMI_DISK_OPEN,    /* being written, or its PUT record is */
    UCMI_DISK_LIVE,    /* in the index */
    UCMI_DISK_LEAVING, /* out of the index, its DEL record is being written */
    UCMI_DISK_DRAINING /* that is done, but a load still reads it */
};
struct ucmi_slot { /* of our own lanes only */
    ucm_key key;
    uint32_t tick, depth, header_sum;
    uint16_t rank : 15, pinned : 1; /* pinned: tick is when that ends */
    uint8_t state : 7;              /* enum ucmi_disk_state */
    uint8_t again : 1;              /* used before its last use: policy.h */
    uint8_t ios;                    /* moves in flight */
};
_Static_assert(sizeof(struct ucmi_slot) == 32, "32 bytes of RAM a block, beside the index");

static inline bool ucmi_slot_pinned(const struct ucmi_slot *slot, uint32_t now)
{
    return slot->pinned && slot->tick > now;
}

struct ucmi_seg {
    int fd, direct;          /* -1: not open */
    bool cut;                /* while it is taken over: the file is shorter than it should be */
    bool replaced;           /* the name is another file's: opened again when nobody reads this */
    uint32_t ios;            /* in flight: not to be closed */
    struct ucmi_slot *slots; /* own lane */
};

struct ucmi_own;
struct ucmi_lane {
    uint16_t id;
    char name[UCMI_LANE_NAME];
    int dir, journal; /* -1: not open */
    uint32_t rank, slots;
    uint64_t slot_size, generation;
    struct ucmi_jpos pos; /* followed: up to where it is in the index */
    uint64_t stamp;       /* of the journal before it was last read; 0: too young to tell */
    bool moved;           /* a MOVED record was read: look for the next file */
    bool alien;           /* not ours to read: another format or geometry */
    bool gone;            /* its directory is no more; freed when ios is 0 */
    uint32_t ios;         /* in flight */
    struct ucmi_seg *segs;
    uint32_t nsegs;
    struct ucmi_own *own; /* NULL: another's, or nobody's */
};

static inline uint64_t ucmi_lane_segment(const struct ucmi_lane *lane) /* bytes of one */
{
    return lane->slots * lane->slot_size;
}
static inline off_t ucmi_slot_off(const struct ucmi_lane *lane, uint32_t place)
{
    return (off_t)(place % lane->slots * lane->slot_size);
}

struct ucmi_posix;
struct ucmi_block;

struct ucmi_sent { /* an I/O operation and who wants to know */
    struct ucm_io io;
    void (*done)(struct ucmi_posix *p, struct ucmi_sent *s);
    STAILQ_ENTRY(ucmi_sent) next;
};
STAILQ_HEAD(ucmi_sent_list, ucmi_sent);

struct ucmi_batch { /* records, and for a PUT the block that waits for it */
    struct ucmi_record *r;
    struct ucmi_block **block;
    size_t n, cap;
};

enum {
    UCMI_COMPACT_TIMES = 2,   /* records for each live one, all of which every opening reads, */
    UCMI_COMPACT_SLACK = 1024 /* and besides */
};
/* The most a journal for so many slots grows to before it is compacted. */
static inline uint64_t ucmi_journal_room(uint64_t slots)
{
    uint64_t records = UCMI_COMPACT_TIMES * slots + 2 * UCMI_COMPACT_SLACK;
    return UCMI_PAGE + records * sizeof(struct ucmi_record);
}
/* The reverse. */
static inline uint64_t ucmi_journal_slots(uint64_t room)
{
    uint64_t records = (room - MIN(room, ucmi_journal_room(0))) / sizeof(struct ucmi_record);
    return records / UCMI_COMPACT_TIMES;
}

enum ucmi_commit_stage {
    UCMI_COMMIT_IDLE,
    UCMI_COMMIT_DATA,
    UCMI_COMMIT_RECORDS,
    UCMI_COMMIT_SYNC
};

struct ucmi_victim {
    uint64_t score; /* lowest goes first */
    uint32_t place;
    uint32_t tick; /* of its last use, when that was the score */
};

struct ucmi_own {
    struct ucmi_lane *lane;
    int lock;
    uint64_t owner;
    struct ucmi_jtail tail;
    struct ucmi_journal_header *head;    /* a page to read it into */
    uint64_t sure_ns;                    /* when it was last known to be ours */
    bool missing;                        /* a record named a segment that is not there */
    uint64_t records;                    /* in the journal of this generation */
    uint32_t total, live, open, leaving; /* slots */
    uint32_t *free;                      /* places, the next one last */
    size_t nfree, cap_free;
    struct ucmi_victim *victims; /* coldest first; checked again before they go */
    size_t nvictims, next_victim, cap_victims;
    uint64_t scan_after_ns; /* victims are not looked for before; 0: at once */
    uint32_t reads;         /* moves that hold a slot of it */
    bool lost; /* nothing new begins; let go when no slot is open or read and no record flies */
    struct ucmi_batch pending, flying;
    enum ucmi_commit_stage stage;
    uint32_t syncing; /* stage DATA: which segment */
    uint64_t compact_slack;
    struct ucmi_sent sent;
    struct iovec iov; /* of sent: the pages at buf */
    void *buf;
    size_t buf_len;
};

#endif

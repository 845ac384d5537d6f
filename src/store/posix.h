/* SPDX-License-Identifier: Apache-2.0 */
/*
 * posix.h - the Posix tier from within.
 *
 * backends.c    the tier: options, which of its backends a block is in or goes to
 * posix.c       one backend: open, close, lookup, submit: what callers run
 * pump.c        the thread that runs everything else; jobs, I/O
 * posix_load.c  slices on their way up: find, read, check
 * posix_dump.c  slices on their way down: open blocks, checksums, slots
 * commit.c      records on their way into a journal; compaction
 * files.c       names and descriptors below a backend
 * lane.c        lanes that are followed: finding them, reading their journals, their segments
 * own.c         lanes that are written: taking, replaying, letting go
 * alive.c       who lives in a lane: locks, silence, signs of life
 * room.c        slots for new blocks: growing, evicting, reclaiming
 * asked.c       what the tool asks of who owns a lane
 * bound.c       what the directory holds, and that it stays within the capacity
 *
 * Threads: callers (any) and the pump (one).  Callers touch the queue, the index under `lock`, and
 * what is guarded by `news_lock` or atomic; all else is the pump's (and, before it starts and after
 * it ends, the opening and closing thread's).  The pump alone changes the index, so it reads it
 * without the lock. Both locks are leaves.
 */
#ifndef UCMI_POSIX_H
#define UCMI_POSIX_H

#include <sys/stat.h>

#include "io/io.h"
#include "store/index.h"
#include "store/lane.h"
#include "store/policy.h"
#include "store/store.h"

enum ucmi_sync { UCMI_SYNC_NONE, UCMI_SYNC_DATA, UCMI_SYNC_FULL };
enum {
    UCMI_READ_BUF = 1 << 20,   /* journals are read in steps of this */
    UCMI_RETRY_NS = 1000000000 /* a lane that cannot be had is tried for again after that */
};

struct ucmi_job;
struct ucmi_part { /* a slice here */
    struct ucmi_job *job;
    struct ucm_slice *s;
    STAILQ_ENTRY(ucmi_part) next; /* of those that wait for a block, or a segment */
};
STAILQ_HEAD(ucmi_part_list, ucmi_part);

struct ucmi_job { /* an xfer here */
    STAILQ_ENTRY(ucmi_job) next;
    struct ucmi_job *ready_next; /* of those whose device event has come */
    struct ucmi_posix *p;
    struct ucm_xfer *x; /* gone with the last done() */
    uint64_t id, deadline_ns, start_ns, bytes;
    int event_err; /* of the device, from `ready` to the pump */
    uint32_t n, started;
    uint32_t left; /* calls of done() to come */
    bool dump;
    struct ucmi_part parts[];
};
STAILQ_HEAD(ucmi_job_list, ucmi_job);

/* A block being written: its slices may come in any order from any xfers. */
struct ucmi_block {
    LIST_ENTRY(ucmi_block) chain;
    TAILQ_ENTRY(ucmi_block) age;
    ucm_key key;
    uint32_t depth;
    struct ucmi_lane *lane;
    uint32_t place;
    uint32_t missing; /* shards nobody has brought yet */
    uint32_t ios;     /* writes in flight */
    bool header_sent, recorded;
    int err;
    uint64_t active_ns;
    uint64_t taken[(UCMI_MAX_SHARDS + 63) / 64]; /* shards somebody has brought */
    struct ucmi_part_list parts;                 /* wait for STORED */
    struct ucmi_slot_header *header;
};
LIST_HEAD(ucmi_block_list, ucmi_block);
TAILQ_HEAD(ucmi_block_age, ucmi_block);

/* A transfer between memory and a slot.  As many as posix_io_depth. */
struct ucmi_move {
    STAILQ_ENTRY(ucmi_move) next; /* of the idle ones */
    struct ucmi_sent data, head;
    unsigned pending; /* of the two */
    struct ucmi_part *part;
    struct ucmi_block *block; /* of a dump */
    struct ucmi_lane *lane;
    uint32_t place, shard, nshards, header_sum;
    bool dump, own_slot;
    struct iovec *iov;
    size_t niov, cap, at;
    off_t off;
    size_t want; /* bytes under way */
    int err;
    struct ucmi_slot_header *page;
    struct iovec page_iov;
};
STAILQ_HEAD(ucmi_move_list, ucmi_move);

/* A journal that nobody has written for a while: as long as its time of change stays, it has no
 * news. */
struct ucmi_watch {
    int fd;
    uint64_t stamp;
};
enum { UCMI_MAX_WATCHES = 32 };

enum { UCMI_BLOCK_CHAINS = 4096, UCMI_TOUCHED = 4096 };

/* Others are told what was seen of blocks in their lanes: one round through the index a tick. */
struct ucmi_telling {
    uint32_t from, to; /* what was seen in these ticks, the last one excluded */
    uint32_t most;     /* blocks to be told of in this round */
    size_t at, left;   /* entries of the index */
};

enum { UCMI_MAX_BACKENDS = 16 };

struct ucmi_posix_options { /* the table is in backends.c */
    const char *backends;
    int io_direct, engine, sync;
    double capacity_gb;
    int64_t segment_mb, queue_depth, io_depth, stall_ms;
};

/* The tier. */
struct ucmi_backends {
    struct ucmi_posix_options o;
    unsigned n;
    struct ucmi_posix *v[UCMI_MAX_BACKENDS];
};

/* One backend. */
struct ucmi_posix {
    /* constant while open */
    const struct ucmi_posix_options *o;
    const char *path;
    bool alone;    /* the only one of its tier */
    bool away;     /* when the store was opened */
    uint64_t seed; /* of its share of the keys */
    struct ucm_tier *t;
    const struct ucm_geometry *geo;
    char object[160]; /* for the log */
    char ns_name[33];
    char host[64], boot[64];
    bool network;
    uint64_t slot_size, capacity; /* bytes; capacity 0: no bound */
    uint32_t seg_slots;
    struct ucmi_io io;
    struct ucmi_seal seal;   /* the pump's */
    size_t dio_mem, dio_off; /* what O_DIRECT asks for here; dio_off 0: not used */
    bool dio_known;
    unsigned max_open_segs, max_lanes;

    /* callers and pump */
    _Atomic bool begun, read_only;
    _Atomic uint64_t weight;        /* bytes of its file system */
    _Atomic uint64_t rest_until_ns; /* dumps go elsewhere: it has failed them */
    _Atomic int64_t gauges[2];      /* what it has added to the tier's: blocks, bytes */
    struct ucmi_queue queue;
    _Atomic bool asleep, closing;
    _Atomic(struct ucmi_job *) ready; /* their event has come */
    _Atomic int64_t waiting;          /* jobs of which something has not started */
    _Atomic bool stalled;             /* said in the log */
    _Atomic uint64_t
        busy_ns; /* the pump works or waits for I/O, and nothing has come back since; 0: idle */
    pthread_rwlock_t lock;
    struct ucmi_index index;
    _Atomic uint64_t ns_stamp; /* of the namespace directory when it was last read; 0: read it */
    _Atomic int ns_fd;         /* replaced only by the pump, with lock held; -1: none */
    struct ucmi_watch watches[UCMI_MAX_WATCHES]; /* guarded by lock: see ucmi_news_possible */
    unsigned nwatches;
    bool quiet; /* the watches are of all lanes that are followed */
    pthread_mutex_t news_lock;
    pthread_cond_t news_read;
    uint64_t news_asked, news_done; /* guarded by news_lock, as are: */
    bool news_late;                 /* who asked was not answered in time, nor has been since */
    bool over, left_alone;          /* the pump has ended; nobody waits for that any more */
    bool tried;                     /* the pump has begun, or could not: */
    int begin_err;
    char why[512];

    /* the pump's */
    pthread_t thread;
    uint64_t stop_ns; /* then it is left alone */
    int root_fd;      /* <backend>/ucm */
    void *stream;
    unsigned events; /* jobs that wait for one of the device, or have not been taken since */
    struct ucmi_lane *lanes[UCMI_MAX_LANES + 1];
    unsigned nlanes; /* ids in use: 1 .. nlanes */
    struct ucmi_lane *own[64];
    unsigned nown;
    struct ucmi_job_list loads, dumps;
    struct ucmi_part_list again;   /* loads that wait for a segment to be opened again */
    unsigned loads_out, dumps_out; /* moves in flight */
    struct ucmi_move *moves;
    struct ucmi_move_list idle;
    struct ucmi_sent_list to_send, stash;
    unsigned sent; /* in the engine */
    struct ucmi_block_list chains[UCMI_BLOCK_CHAINS];
    struct ucmi_block_age blocks;
    size_t nblocks;
    void *read_buf;
    struct iovec *scratch;
    size_t cap_scratch;
    uint64_t news_ns;  /* when journals were last read */
    uint64_t retry_ns; /* when waiting dumps are tried again; 0: when something happens */
    uint64_t full_until_ns, no_lane_until_ns;
    int no_lane_err;
    uint64_t touched[UCMI_TOUCHED]; /* key word ^ tick of recent touches */
    struct ucmi_telling telling;
    unsigned open_segs;
    unsigned failures;  /* dumps in a row */
    bool shrinking;     /* the lock of the bound is held until all fits */
    bool fits;          /* all there is has been seen to fit the bound */
    uint64_t let_go_ns; /* when segments of others are closed; UINT64_MAX: none is open */
    uint64_t want_ns;   /* the last want for room that was ours, or was answered */
    uint64_t yield_ns;  /* when it is seen whether others want room */
    uint64_t shrink_ns; /* when it is looked at again */
    uint64_t beat_ns;   /* when other nodes are told that we live */
    uint64_t tell_ns;   /* when they are told what is new in our directories; 0: nothing is */
    struct ucmi_record *asked; /* of the owner of our lanes, and not done yet */
    size_t nasked;
    pthread_t ear_thread;
    int ear, ear_stop, ear_ns; /* ear: -1: none; ear_ns: the directory it hears, -1: none yet */
    bool wants_lane; /* a load had something to tell the owners of lanes, and there is no journal */
    uint64_t own_bytes;
    struct ucmi_policy policy; /* of all lanes here */
    _Atomic uint64_t span;     /* its */
};

/* ---- posix.c ---- */

/* A backend of t and its pump.  Waits posix_stall_ms at most for storage to answer.  0, or -errno
 * and t->why where it is alone and not just away; else it is tried again and again until it can be
 * used. */
int ucmi_posix_open(struct ucm_tier *t, const struct ucmi_posix_options *o, const char *path,
                    unsigned among, struct ucmi_posix **p_p);
/* The same without a pump, for a caller that does by itself what a pump does, in a namespace that
 * is there; ucmi_posix_free ends it. */
int ucmi_posix_visit(struct ucm_tier *t, const struct ucmi_posix_options *o, const char *path,
                     struct ucmi_posix **p_p);
/* What the pump does first; p->why. */
int ucmi_posix_begin(struct ucmi_posix *p);
/* After ucmi_pump_stop: in two steps, so that several close at a time. */
void ucmi_posix_close_end(struct ucmi_posix *p);
/* All of it; lets go of the store. */
void ucmi_posix_free(struct ucmi_posix *p);
/* It has begun, and answers. */
bool ucmi_posix_usable(struct ucmi_posix *p);
/* Looks the keys up in the index; how many are missing. */
size_t ucmi_posix_probe(struct ucmi_posix *p, const ucm_key *keys, size_t n, uint32_t rank,
                        uint8_t level, uint8_t *found, enum ucm_use use);
/* ucm_removed, of this backend; adds to *lost. */
ssize_t ucmi_posix_removed(struct ucmi_posix *p, ucm_key *keys, size_t n, uint64_t *lost);
/* Asks the pump to read what others have published; false: there is nothing to wait for. */
bool ucmi_posix_ask(struct ucmi_posix *p, uint64_t *ticket);
void ucmi_posix_await(struct ucmi_posix *p, uint64_t ticket, uint64_t until_ns);
/* Sets which[i] to `mine` for each slice whose block is here and whose which[i] is `none`. */
void ucmi_posix_claim(struct ucmi_posix *p, const struct ucm_xfer *x, uint8_t none, uint8_t mine,
                      uint8_t *which);
/* Room for n slices of x in a job, counted in: -EAGAIN, -ENOMEM, -EIO, or 0. */
int ucmi_job_new(struct ucmi_posix *p, struct ucm_xfer *x, uint32_t n, struct ucmi_job **job_p);
void ucmi_job_cancel(struct ucmi_job *job); /* it was not submitted after all */
void ucmi_job_add(struct ucmi_job *job, struct ucm_slice *s);
void ucmi_job_submit(struct ucmi_job *job);
/* A gauge of the tier is the sum over its backends. */
void ucmi_posix_gauge(struct ucmi_posix *p, enum ucmi_counter which, int64_t value);
/* How a dump ended here: one that fails again and again is given a rest. */
void ucmi_posix_judge(struct ucmi_posix *p, int err);

/* ---- pump.c ---- */

int ucmi_pump_start(struct ucmi_posix *p);
void ucmi_pump_stop(struct ucmi_posix *p);
/* false: some I/O is still out timeout_ms after it was told to stop; it will end by itself when
 * that comes back, if ever, and then calls ucmi_posix_free. */
bool ucmi_pump_join(struct ucmi_posix *p);
void ucmi_pump_wake(struct ucmi_posix *p);
/* The pump reads all journals when it next runs. */
void ucmi_news_ask(struct ucmi_posix *p);
void ucmi_pump_send(struct ucmi_posix *p, struct ucmi_sent *s);
/* Writes and waits; other completions are kept for later.  0 or -errno. */
int ucmi_pump_write(struct ucmi_posix *p, int fd, const void *buf, size_t len, off_t off);
/* The same for a read: bytes read, fewer than len only at the end of the file. */
ssize_t ucmi_pump_read(struct ucmi_posix *p, int fd, void *buf, size_t len, off_t off);
int ucmi_pump_sync(struct ucmi_posix *p, int fd);
void ucmi_part_done(struct ucmi_part *part, enum ucm_stage stage, int err);
/* Ends a slice that does not start: all its stages. */
void ucmi_part_end(struct ucmi_part *part, int err);
/* An idle move, of which the caller knows that there is one. */
struct ucmi_move *ucmi_move_new(struct ucmi_posix *p, struct ucmi_part *part);
/* The pieces of the slice to iov[1] and on. */
int ucmi_move_pieces(struct ucmi_posix *p, struct ucmi_move *m);
void ucmi_move_free(struct ucmi_posix *p, struct ucmi_move *m);
/* Sends the next up to 1024 pieces; false: all have been. */
bool ucmi_move_step(struct ucmi_posix *p, struct ucmi_move *m, enum ucm_io_op op);
/* Sends the header page alone. */
void ucmi_move_header(struct ucmi_posix *p, struct ucmi_move *m, enum ucm_io_op op, off_t slot);
/* The sums of the nshards shards of block h, m->shard the first, that lie in the pieces of m. */
int ucmi_shard_sums(struct ucmi_posix *p, const struct ucmi_slot_header *h,
                    const struct ucmi_move *m, uint32_t nshards, uint64_t *sums);

/* ---- posix_load.c, posix_dump.c ---- */

void ucmi_load_start(struct ucmi_posix *p, struct ucmi_part *part);
/* -EAGAIN: no room just now, try again later; else it is under way or done. */
int ucmi_dump_start(struct ucmi_posix *p, struct ucmi_part *part);
/* The record of the block is where others can read it, or err. */
void ucmi_block_stored(struct ucmi_posix *p, struct ucmi_block *b, int err);
/* The lane is lost: its blocks fail, those with a write or record under way when it has ended. */
void ucmi_blocks_fail(struct ucmi_posix *p, const struct ucmi_lane *lane, int err);
/* Gives up the blocks nobody has added to for long; with `all`, every block that waits for slices.
 */
void ucmi_blocks_abandon(struct ucmi_posix *p, bool all);
uint64_t ucmi_blocks_deadline(const struct ucmi_posix *p);

/* ---- commit.c ---- */

int ucmi_commit_add(struct ucmi_lane *lane, const struct ucmi_record *r, struct ucmi_block *block);
/* Tells the owner of the block's lane that it has been of use, by way of a journal of ours. */
void ucmi_commit_touch(struct ucmi_posix *p, const ucm_key *key);
/* The same for what lookups, and loads from a tier above, have found there since the last tick:
 * looks at some of the index at a time, and tells of so many blocks in a tick. */
void ucmi_commit_touch_seen(struct ucmi_posix *p);
void ucmi_commit_kick(struct ucmi_posix *p, struct ucmi_lane *lane);
void ucmi_batch_fail(struct ucmi_posix *p, struct ucmi_batch *b, int err);
/* Writes records at once: only when nothing flies (taking, shrinking). */
int ucmi_commit_now(struct ucmi_posix *p, struct ucmi_lane *lane, struct ucmi_record *v, size_t n);
struct ucmi_record ucmi_commit_record(const struct ucmi_slot *slot, enum ucmi_op op,
                                      const struct ucmi_lane *lane, uint32_t place);

/* Takes back what waits to be said again of the blocks in a segment, which is to go. */
void ucmi_commit_unsay(struct ucmi_lane *lane, uint32_t segment);
/* Compacts the journal when it is time, or at once.  Nothing flies. */
void ucmi_commit_tidy(struct ucmi_posix *p, struct ucmi_lane *lane, bool anyway);

/* ---- asked.c ---- */

/* A request was read: keeps it, if it is for a lane of ours.  With the index locked. */
void ucmi_asked_note(struct ucmi_posix *p, const struct ucmi_record *r);
/* Does what can be done now. */
void ucmi_asked_serve(struct ucmi_posix *p);
/* Hears of requests while idle, from the first lane of ours on. */
void ucmi_ear_open(struct ucmi_posix *p);
void ucmi_ear_close(struct ucmi_posix *p);
/* Reads and checks a LIVE block of a lane of ours: 0, -EBADMSG, or why it cannot be read. */
int ucmi_slot_check(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t place);
/* Until a tick; 0: no longer.  The caller puts it on record. */
void ucmi_slot_pin(struct ucmi_posix *p, const struct ucmi_lane *lane, struct ucmi_slot *slot,
                   uint32_t until);
/* Says on the lane's directory until when something in it is pinned; after pins have ended. */
void ucmi_pins_mark(struct ucmi_posix *p, const struct ucmi_lane *lane);
/* May the lane in this directory, which is not read, not be removed yet? */
bool ucmi_lane_pinned(int dir);

/* ---- files.c ---- */

/* A regular file, or with O_DIRECTORY a directory; -ELOOP: something else has its name. */
int ucmi_file_open(struct ucmi_posix *p, int dir, const char *path, int flags);
void ucmi_file_close(struct ucmi_posix *p, int fd);
int ucmi_file_remove(struct ucmi_posix *p, int dir, const char *name, int flags);
int ucmi_file_rename(struct ucmi_posix *p, int dir, const char *from, const char *to);
/* fstat, as it is now on the server too.  0 or -errno; any thread. */
int ucmi_file_stat(const struct ucmi_posix *p, int fd, struct stat *st);
/* What has been made or renamed in the directory by others is found from here on. */
void ucmi_dir_renew(const struct ucmi_posix *p, int dir);
/* With posix_sync full, the names in a directory. */
int ucmi_dir_sync(struct ucmi_posix *p, int dir);

/* ---- lane.c ---- */

int ucmi_ns_open(struct ucmi_posix *p, bool create);
/* Finds new lanes and reads what is new in all journals. */
void ucmi_lanes_refresh(struct ucmi_posix *p);
/* The same, unless it was done since then: false. */
bool ucmi_lanes_renew(struct ucmi_posix *p, uint64_t since_ns);
struct ucmi_lane *ucmi_lane_add(struct ucmi_posix *p, const char *name);
/* May this be the header of the lane's journal from now on?  0; -ENOTSUP: of another namespace;
 * -EBUSY: places mean something else there, and loads are under way. */
int ucmi_lane_takes(const struct ucmi_posix *p, const struct ucmi_lane *lane,
                    const struct ucmi_journal_header *h);
void ucmi_lane_follow(struct ucmi_posix *p, struct ucmi_lane *lane);
void ucmi_lane_forget(struct ucmi_posix *p, struct ucmi_lane *lane);
void ucmi_lanes_close(struct ucmi_posix *p);
/* Opens what was not; a descriptor for O_DIRECT where wanted and possible.  -errno. */
int ucmi_seg_fd(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment, bool direct);
/* A move reads or writes the slot: its segment stays open, our own slot is not given away. */
void ucmi_seg_hold(struct ucmi_move *m);
void ucmi_seg_release(struct ucmi_posix *p, struct ucmi_move *m);
/* Has the file that was read been unlinked? */
bool ucmi_seg_replaced(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t place);
/* If so, closes it, so that the one of that name now is opened; false: it is still being read. */
bool ucmi_seg_renew(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t place);
/* Could one more segment of this lane be in the file system?  Files may be holes, and headers say
 * what they like. */
bool ucmi_seg_may_be(const struct ucmi_posix *p, const struct ucmi_lane *lane);
int ucmi_seg_reserve(struct ucmi_lane *lane, uint32_t segment);
void ucmi_seg_close(struct ucmi_posix *p, struct ucmi_seg *seg);
/* Closes what others' segments are open and idle, for the space of one that is removed is only free
 * when it is closed everywhere; returns when it is to be done next. */
uint64_t ucmi_segs_let_go(struct ucmi_posix *p);
void ucmi_seg_name(char name[24], uint32_t segment);
bool ucmi_seg_number(const char *name, uint32_t *segment); /* the reverse */
void ucmi_lane_unindex(struct ucmi_posix *p, const struct ucmi_lane *lane);
bool ucmi_lane_name_ok(const char *name);
/* May another process have published what the index does not know?  Any thread, lock held. */
bool ucmi_news_possible(const struct ucmi_posix *p);
bool ucmi_ns_changed(const struct ucmi_posix *p);
void ucmi_lane_close_journal(struct ucmi_posix *p, struct ucmi_lane *lane);
/* Takes out the entry of that block, unless another has come in its place since. */
void ucmi_posix_unindex(struct ucmi_posix *p, const struct ucmi_entry *e);

/* ---- own.c ---- */

/* A lane for our blocks: ours, a dead one's, or a new one. */
int ucmi_own_any(struct ucmi_posix *p, struct ucmi_lane **lane_p);
/* A new one; -EAGAIN: other processes are at it, try again soon. */
int ucmi_own_create(struct ucmi_posix *p, struct ucmi_lane **lane_p);
/* This one, if it is dead; -EAGAIN, -EBUSY: somebody lives there, or may. */
int ucmi_own_take(struct ucmi_posix *p, struct ucmi_lane *lane);
/* An empty lane whose segments are larger than the bound now allows: a new one takes its place. */
int ucmi_own_replace(struct ucmi_posix *p, struct ucmi_lane **lane_p);
/* Takes a dead lane of the namespace, of our rank or of any. */
int ucmi_own_adopt(struct ucmi_posix *p, bool any_rank, struct ucmi_lane **lane_p);
/* Its blocks fail, nothing new begins in it.  When what is in flight has ended (drain), anybody may
 * take it. */
void ucmi_own_lose(struct ucmi_posix *p, struct ucmi_lane *lane, const char *why, int err);
void ucmi_own_drain(struct ucmi_posix *p, struct ucmi_lane *lane);
void ucmi_own_release(struct ucmi_posix *p, struct ucmi_lane *lane);
/* An OPEN slot that came to nothing, or a LEAVING one whose record is written. */
void ucmi_own_free_slot(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t place);
void ucmi_own_remove_segment(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment);
int ucmi_own_add_segment(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment);
static inline struct ucmi_slot *ucmi_own_slot(const struct ucmi_lane *lane, uint32_t place)
{
    return &lane->segs[place / lane->slots].slots[place % lane->slots];
}
/* Makes an empty journal file with room for len bytes; a descriptor or -errno. */
int ucmi_journal_create(struct ucmi_posix *p, const struct ucmi_lane *lane, const char *name,
                        uint64_t len);
/* What all journals of this namespace have in common, and who we are. */
void ucmi_head_fill(const struct ucmi_posix *p, struct ucmi_journal_header *h);

/* ---- bound.c ---- */

/* The smallest capacity in bytes that can hold a block. */
uint64_t ucmi_bound_least(const struct ucmi_posix *p);
/* The most a file of a segment's size may come to on disk. */
uint64_t ucmi_bound_charge(uint64_t size);
/* Locks the room of the backend: a descriptor whose closing unlocks it; -EAGAIN: another process is
 * at it, and dumps that wait are tried again soon. */
int ucmi_bound_lock(struct ucmi_posix *p);
/* Do `more` bytes fit?  With the lock held.  0, -ENOSPC, or why it cannot be counted. */
int ucmi_bound_check(struct ucmi_posix *p, uint64_t more);
/* Room in the file for len bytes, if they fit.  0 or -errno. */
int ucmi_bound_lengthen(struct ucmi_posix *p, int fd, uint64_t len);
/* Both, for a lane more. */
int ucmi_bound_for_lane(struct ucmi_posix *p);
/* Gives up segments, of lanes that are ours or nobody's, until all fits. */
void ucmi_bound_enforce(struct ucmi_posix *p);
/* What the directory holds, as the bound counts it. */
int ucmi_bound_used(struct ucmi_posix *p, uint64_t *bytes);
/* Drops what is in a segment of ours, and the segment.  Nothing of it is under way, nothing flies.
 */
int ucmi_bound_give_up(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment);
/* Gives up the coldest segments without a pinned block until so many are left, if that can be. */
void ucmi_bound_shrink(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segments);
/* Tells others that we find no room; lock is the descriptor of ucmi_bound_lock. */
void ucmi_bound_want(struct ucmi_posix *p, int lock);
/* Gives up a segment if another wants room and has less; looks once a second at most. */
void ucmi_bound_yield(struct ucmi_posix *p);
typedef void ucmi_entry_fn(void *arg, int dir, const char *name, const struct stat *st);
/* Calls fn for all entries of a directory but . and .. */
int ucmi_each_entry(struct ucmi_posix *p, int at, const char *path, ucmi_entry_fn *fn, void *arg);

/* ---- alive.c ---- */

/* 0: who has the lock of the lane in this directory is alone in it, as far as the journal tells;
 * -EBUSY: it does not.  Reads the journal's header into p->read_buf. */
int ucmi_lane_dead(struct ucmi_posix *p, int dir);
int ucmi_lock_try(int fd);
/* The file `lock` in the directory, locked; -EAGAIN: by somebody else. */
int ucmi_lock_open(struct ucmi_posix *p, int dir, int flags);
/* The same of a header that was read from fd.  0, -EBUSY. */
int ucmi_lane_dead_for_sure(const struct ucmi_posix *p, const struct ucmi_journal_header *h,
                            int fd);
/* A lock that nobody has, for a lane whose lock is held by the dead; -EAGAIN: it is not. */
int ucmi_lane_lock_anew(struct ucmi_posix *p, const struct ucmi_lane *lane);
/* Is it still ours?  Before each append. */
int ucmi_own_check(struct ucmi_posix *p, struct ucmi_lane *lane);
/* The same before a slot of it is used; else it is lost. */
bool ucmi_own_sure(struct ucmi_posix *p, struct ucmi_lane *lane);
/* Says that we live, and what is new, when it is time; returns when it is again. */
uint64_t ucmi_own_beat(struct ucmi_posix *p);
/* There is something new in our directories. */
void ucmi_own_tell(struct ucmi_posix *p);

/* ---- room.c ---- */

/* Removes a dead lane of another namespace, if it has not been used since tick `coldest`. */
int ucmi_room_reclaim(struct ucmi_posix *p, uint32_t coldest, bool pinned_too);
/* A dead lane whose lock is ours: all of it.  0 or -errno. */
int ucmi_room_remove(struct ucmi_posix *p, int ns, int dir, const char *name);
/* Counts what lookups have seen of the block as use of it; returns when that was, in seconds. */
uint32_t ucmi_slot_seen(struct ucmi_posix *p, const struct ucmi_lane *lane, struct ucmi_slot *slot);
/* A free slot, now OPEN.  -EAGAIN: one will come; -ENOSPC: none can; or why there is no lane. */
int ucmi_room_get(struct ucmi_posix *p, struct ucmi_lane **lane_p, uint32_t *place_p);
/* The block is bad, or its segment gone: takes it out of our lane, unless that is lost, or the slot
 * another block's by now. */
void ucmi_room_drop(struct ucmi_posix *p, struct ucmi_lane *lane, const struct ucmi_entry *e);
/* Somebody used the block in that tick: it is its last use, whatever a clock said before. */
void ucmi_room_used(struct ucmi_posix *p, struct ucmi_slot *slot, uint32_t tick);

#endif

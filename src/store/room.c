/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Room: where the slot for a new block comes from.
 *
 * In this order: a free slot of ours; a new segment, if the bound and the disk allow; a dead lane
 * of the namespace; room held by a dead lane of another namespace, if nobody has used it for longer
 * than our coldest block; our coldest blocks.
 *
 * A segment is made under the lock of the bound (bound.c), and allocated whole.  What the file
 * system may still add to a file (extents) and what a journal needs to be compacted is counted from
 * the start.
 *
 * Victims are found by one scan over the slot tables for many evictions, and checked again when
 * their turn comes: a block looked up or loaded since stays.
 */
#include "store/posix.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    EVICT_BATCH = 64,
    MIN_VICTIMS = 16,
    FOREIGN_NAMES = 64, /* of segments, taken by what is none, that are passed over */
    SMALL_LANE = 4096,  /* slots that are scanned in no time */
    SCAN_PAUSE_NS = 100000000,
    FULL_NS = 1000000000
};

/* ---- growing ---- */

/* The lowest that is free, from n on; not one whose last file is still being read. */
static uint32_t new_segment_number(const struct ucmi_lane *lane, uint32_t n)
{
    while (n < lane->nsegs && (lane->segs[n].slots || lane->segs[n].ios))
        n++;
    return n;
}

/* An append must never find the disk full: the journal's room is made with that of the slots. */
static int make_journal_room(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    uint64_t len = ucmi_journal_room(lane->own->total + lane->slots);
    struct stat st;
    if (fstat(lane->journal, &st) < 0)
        return -errno;
    if ((uint64_t)st.st_size >= len)
        return 0;
    return ucmi_io_file(&p->io, &(struct ucm_file){.op = UCM_FILE_ALLOCATE,
                                                   .fd = lane->journal,
                                                   .len = (off_t)ROUND_UP(len, UCMI_PAGE)});
}

static int make_segment(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment)
{
    char name[24];
    ucmi_seg_name(name, segment);
    if (segment < lane->nsegs) /* a descriptor of an earlier file of that name */
        ucmi_seg_close(p, &lane->segs[segment]);
    int fd = ucmi_file_open(p, lane->dir, name, O_RDWR | O_CREAT | O_EXCL);
    if (fd < 0)
        return fd;
    int err = ucmi_io_file(&p->io, &(struct ucm_file){.op = UCM_FILE_ALLOCATE,
                                                      .fd = fd,
                                                      .len = (off_t)ucmi_lane_segment(lane)});
    if (!err)
        err = make_journal_room(p, lane);
    if (!err)
        err = ucmi_dir_sync(p, lane->dir);
    if (!err)
        err = ucmi_own_add_segment(p, lane, segment);
    ucmi_file_close(p, fd);
    if (err < 0)
        ucmi_file_remove(p, lane->dir, name, 0);
    return err;
}

static int grow_locked(struct ucmi_posix *p, struct ucmi_lane *lane, int lock)
{
    uint64_t journal = ucmi_journal_room(lane->own->total + lane->slots);
    struct stat st;
    if (fstat(lane->journal, &st) < 0)
        return -errno;
    uint64_t has = MIN((uint64_t)st.st_blocks * 512, journal);
    int err = ucmi_bound_check(p, ucmi_bound_charge(ucmi_lane_segment(lane)) + 2 * (journal - has));
    if (err == -ENOSPC)
        ucmi_bound_want(p, lock);
    if (err < 0)
        return err;
    /* Something that is no segment of ours may have the name: it keeps it. */
    uint32_t n = new_segment_number(lane, 0), most = n + FOREIGN_NAMES;
    err = make_segment(p, lane, n);
    while (err == -EEXIST && n < most) {
        n = new_segment_number(lane, n + 1);
        err = make_segment(p, lane, n);
    }
    return err;
}

/* -EAGAIN: another process is at it; try again soon. */
static int grow(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    static struct ucmi_log_gate gate;
    uint64_t now = ucmi_now_ns();
    if (now < p->full_until_ns)
        return -ENOSPC;
    int lock = ucmi_bound_lock(p);
    int err = lock < 0 ? lock : grow_locked(p, lane, lock);
    if (lock >= 0)
        ucmi_file_close(p, lock);
    if (err == -ENOSPC || err == -EDQUOT) {
        p->full_until_ns = now + FULL_NS;
        ucmi_log_gated(&gate, 600, UCM_INFO, p->object,
                       "full at %" PRIu64
                       " MiB of our own; the coldest blocks make room from now on",
                       p->own_bytes >> 20);
        err = -ENOSPC;
    }
    return err;
}

/* ---- dead lanes of other namespaces ---- */

struct dead_lane {
    struct ucmi_posix *p;
    bool pinned_too;
    int ns, dir, lock; /* -1: none found */
    char name[UCMI_LANE_NAME];
    time_t used; /* last change of its journal */
};

static void dead_close(struct dead_lane *d)
{
    ucmi_file_close(d->p, d->lock);
    ucmi_file_close(d->p, d->dir);
    ucmi_file_close(d->p, d->ns);
    d->ns = d->dir = d->lock = -1;
}

/* Keeps the lock of the one that has been silent for longest. */
static void consider_lane(void *arg, int ns, const char *name, const struct stat *st)
{
    struct dead_lane *best = arg, d = {.p = best->p,
                                       .pinned_too = best->pinned_too,
                                       .ns = -1,
                                       .dir = -1,
                                       .lock = -1};
    struct stat journal;

    if (!S_ISDIR(st->st_mode) || !ucmi_lane_name_ok(name))
        return;
    d.ns = fcntl(ns, F_DUPFD_CLOEXEC, 0);
    d.dir = ucmi_file_open(d.p, ns, name, O_RDONLY | O_DIRECTORY);
    if (d.dir >= 0 && d.ns >= 0 && (d.pinned_too || !ucmi_lane_pinned(d.dir)) &&
        ucmi_lane_dead(d.p, d.dir) == 0)
        d.lock = ucmi_lock_open(d.p, d.dir, 0);
    if (d.lock >= 0 && fstatat(d.dir, "journal", &journal, AT_SYMLINK_NOFOLLOW) == 0)
        d.used = journal.st_mtim.tv_sec;
    if (d.lock >= 0 && (best->lock < 0 || d.used < best->used)) {
        memcpy(d.name, name, strlen(name) + 1);
        dead_close(best);
        *best = d;
        return;
    }
    dead_close(&d);
}

static void consider_ns(void *arg, int dir, const char *name, const struct stat *st)
{
    struct dead_lane *best = arg;
    if (S_ISDIR(st->st_mode) && strcmp(name, best->p->ns_name) != 0)
        ucmi_each_entry(best->p, dir, name, consider_lane, best);
}

/* What is not ours stays, and with it the directory.  `lock` is the last to go: while it is there,
 * nobody else comes in. */
static void remove_entry(void *arg, int dir, const char *name, const struct stat *st)
{
    uint32_t segment;
    if (strcmp(name, "journal") == 0 || strcmp(name, "journal.new") == 0 ||
        strcmp(name, "pinned") == 0 || ucmi_seg_number(name, &segment))
        ucmi_file_remove(arg, dir, name, 0);
}

int ucmi_room_remove(struct ucmi_posix *p, int ns, int dir, const char *name)
{
    ucmi_each_entry(p, dir, ".", remove_entry, p);
    ucmi_file_remove(p, dir, "lock", 0);
    int err = ucmi_file_remove(p, ns, name, AT_REMOVEDIR);
    return err == -ENOTEMPTY ? 0 : err; /* without a lock it is no lane any more */
}

/* The lane is not ours to read, so it goes whole.  coldest: tick of the block that would have to go
 * instead, UINT32_MAX for none. */
int ucmi_room_reclaim(struct ucmi_posix *p, uint32_t coldest, bool pinned_too)
{
    struct dead_lane d = {.p = p, .pinned_too = pinned_too, .ns = -1, .dir = -1, .lock = -1};
    int err = ucmi_each_entry(p, p->root_fd, ".", consider_ns, &d);
    if (!err && (d.lock < 0 || ucmi_tick((uint64_t)d.used) > coldest))
        err = -ENOENT;
    if (!err) {
        err = ucmi_room_remove(p, d.ns, d.dir, d.name);
        ucmi_log(UCM_INFO, p->object, "removed lane %s of a namespace nobody uses, to make room",
                 d.name);
    }
    dead_close(&d);
    return err;
}

/* ---- evicting ---- */

void ucmi_room_used(struct ucmi_posix *p, struct ucmi_slot *slot, uint32_t tick)
{
    if (ucmi_slot_pinned(slot, tick))
        return;
    /* Of one that was pinned nobody knows how long ago. */
    slot->again = slot->pinned || ucmi_policy_again(&p->policy, slot->again, slot->tick, tick);
    slot->tick = tick;
    slot->pinned = false;
}

static uint64_t score_of(const struct ucmi_slot *slot, uint32_t span)
{
    return ucmi_policy_score(span, slot->again, slot->tick, slot->depth);
}

/* A block that a lookup has found lately is about to be loaded; and it has been of use.  Called
 * with the index locked against callers, or where a wrong answer is put right later. */
uint32_t ucmi_slot_seen(struct ucmi_posix *p, const struct ucmi_lane *lane, struct ucmi_slot *slot)
{
    const struct ucmi_entry *e = ucmi_index_find(&p->index, &slot->key, slot->rank, lane->id);
    uint32_t seen = e ? atomic_load_explicit(&e->seen, memory_order_relaxed) : 0;
    if (ucmi_tick(seen) > slot->tick)
        ucmi_room_used(p, slot, ucmi_tick(seen));
    return seen;
}

static bool leased(struct ucmi_posix *p, const struct ucmi_lane *lane, struct ucmi_slot *slot,
                   uint32_t now)
{
    return ucmi_lease_lasts(ucmi_slot_seen(p, lane, slot), now) ||
           ucmi_slot_pinned(slot, ucmi_tick(now));
}

static void sift_down(struct ucmi_victim *v, size_t n, size_t i)
{
    for (size_t c; (c = 2 * i + 1) < n; i = c) {
        if (c + 1 < n && v[c + 1].score > v[c].score)
            c++;
        if (v[i].score >= v[c].score)
            return;
        struct ucmi_victim t = v[i];
        v[i] = v[c];
        v[c] = t;
    }
}

static int by_score(const void *a, const void *b)
{
    const struct ucmi_victim *x = a, *y = b;
    return (x->score > y->score) - (x->score < y->score);
}

/* The coldest n of the lane, coldest first: a heap of the best so far, the worst of them on top. */
static int find_victims(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t now)
{
    struct ucmi_own *own = lane->own;
    size_t max = MAX(own->total / 64, (uint32_t)MIN_VICTIMS);
    if (own->scan_after_ns && ucmi_now_ns() < own->scan_after_ns)
        return -ENOSPC;
    own->scan_after_ns = 0;
    if (max > own->cap_victims) {
        void *v = realloc(own->victims, max * sizeof *own->victims);
        if (!v)
            return -ENOMEM;
        own->victims = v;
        own->cap_victims = max;
    }
    struct ucmi_victim *v = own->victims;
    uint32_t span = ucmi_policy_span(&p->policy);
    size_t n = 0;
    for (uint32_t place = 0; place < lane->nsegs * lane->slots; place++) {
        if (!lane->segs[place / lane->slots].slots) {
            place += lane->slots - 1;
            continue;
        }
        struct ucmi_slot *slot = ucmi_own_slot(lane, place);
        if (slot->state != UCMI_DISK_LIVE || slot->ios ||
            (n == max && score_of(slot, span) >= v[0].score))
            continue;
        if (leased(p, lane, slot, now) || (n == max && score_of(slot, span) >= v[0].score))
            continue;
        struct ucmi_victim victim = {score_of(slot, span), place, slot->tick};
        if (n < max) {
            v[n++] = victim;
            for (size_t i = n / 2; n == max && i-- > 0;)
                sift_down(v, n, i);
        } else {
            v[0] = victim;
            sift_down(v, n, 0);
        }
    }
    qsort(v, n, sizeof *v, by_score);
    own->nvictims = n;
    own->next_victim = 0;
    /* Nearly all of a large lane is leased: to look again for each block that comes would cost more
     * than the blocks are worth. */
    if (n < MIN_VICTIMS && own->total > SMALL_LANE)
        own->scan_after_ns = ucmi_now_ns() + SCAN_PAUSE_NS;
    return n ? 0 : -ENOSPC;
}

/* Out of the index at once; the slot is free when the record is written. */
static bool leave(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t place)
{
    struct ucmi_own *own = lane->own;
    struct ucmi_slot *slot = ucmi_own_slot(lane, place);
    struct ucmi_record r = ucmi_commit_record(slot, UCMI_DEL, lane, place);
    if (ucmi_commit_add(lane, &r, NULL) < 0)
        return false;
    struct ucmi_entry *e = ucmi_index_find(&p->index, &slot->key, slot->rank, lane->id);
    if (e && e->place == place)
        ucmi_index_remove(&p->index, e);
    slot->state = UCMI_DISK_LEAVING;
    own->live--;
    own->leaving++;
    return true;
}

void ucmi_room_drop(struct ucmi_posix *p, struct ucmi_lane *lane, const struct ucmi_entry *e)
{
    uint32_t segment = e->place / lane->slots;
    if (lane->own->lost || segment >= lane->nsegs || !lane->segs[segment].slots)
        return;
    const struct ucmi_slot *slot = ucmi_own_slot(lane, e->place);
    if (slot->state != UCMI_DISK_LIVE || slot->header_sum != e->header_sum ||
        !ucmi_key_eq(&slot->key, &e->key))
        return;
    pthread_rwlock_wrlock(&p->lock);
    leave(p, lane, e->place);
    pthread_rwlock_unlock(&p->lock);
}

/* The lane whose next victim is the coldest of all; lanes without known victims are scanned. */
static struct ucmi_lane *coldest_lane(struct ucmi_posix *p, uint32_t now)
{
    struct ucmi_lane *best = NULL;
    uint64_t score = UINT64_MAX;
    for (unsigned i = 0; i < p->nown; i++) {
        struct ucmi_own *own = p->own[i]->own;
        if (own->lost || !own->live ||
            (own->next_victim == own->nvictims && find_victims(p, p->own[i], now) < 0))
            continue;
        if (own->victims[own->next_victim].score < score) {
            score = own->victims[own->next_victim].score;
            best = p->own[i];
        }
    }
    return best;
}

/* Takes up to n of the coldest out; how many. */
static size_t evict(struct ucmi_posix *p, size_t n)
{
    uint32_t now = (uint32_t)time(NULL);
    size_t left = n;
    struct ucmi_lane *lane;

    /* Some have been used since the scan, perhaps all of them. */
    for (size_t tries = 4 * n + 2 * MIN_VICTIMS; left && tries && (lane = coldest_lane(p, now));
         tries--) {
        struct ucmi_own *own = lane->own;
        struct ucmi_victim *v = &own->victims[own->next_victim++];
        struct ucmi_slot *slot = ucmi_own_slot(lane, v->place);
        if (slot->state != UCMI_DISK_LIVE || slot->ios || slot->tick != v->tick)
            continue;
        pthread_rwlock_wrlock(&p->lock); /* no lookup finds it between the question and the end */
        if (!leased(p, lane, slot, now) && slot->tick == v->tick && leave(p, lane, v->place)) {
            ucmi_policy_leave(&p->policy, ucmi_key_word(&slot->key, slot->rank), slot->again,
                              slot->tick);
            left--;
        }
        pthread_rwlock_unlock(&p->lock);
    }
    ucmi_count(p->t->counters, UCMI_DISK_EVICTED, (int64_t)(n - left));
    return n - left;
}

/* ---- a slot ---- */

static bool take_free(struct ucmi_posix *p, struct ucmi_lane **lane_p, uint32_t *place_p)
{
    for (unsigned i = 0; i < p->nown; i++) {
        struct ucmi_own *own = p->own[i]->own;
        if (own->lost || !own->nfree || !ucmi_own_sure(p, p->own[i]))
            continue;
        *lane_p = p->own[i];
        *place_p = own->free[--own->nfree];
        ucmi_own_slot(*lane_p, *place_p)->state = UCMI_DISK_OPEN;
        own->open++;
        return true;
    }
    return false;
}

static struct ucmi_lane *own_lane(const struct ucmi_posix *p)
{
    for (unsigned i = 0; i < p->nown; i++)
        if (!p->own[i]->own->lost)
            return p->own[i];
    return NULL;
}

static uint32_t sum_own(const struct ucmi_posix *p, size_t field)
{
    uint32_t n = 0;
    for (unsigned i = 0; i < p->nown; i++)
        if (!p->own[i]->own->lost) /* whose records will never be written */
            n += *(const uint32_t *)((const char *)p->own[i]->own + field);
    return n;
}
#define SUM_OWN(p, field) sum_own(p, offsetof(struct ucmi_own, field))

static uint32_t coldest_tick(struct ucmi_posix *p)
{
    struct ucmi_lane *lane = coldest_lane(p, (uint32_t)time(NULL));
    return lane ? lane->own->victims[lane->own->next_victim].tick : UINT32_MAX;
}

/* Where not even a lane more fits, one that is dead makes room, whosever it was. */
static int first_lane(struct ucmi_posix *p, struct ucmi_lane **lane_p)
{
    int err = ucmi_own_any(p, lane_p);
    if (err != -ENOSPC || ucmi_own_adopt(p, true, lane_p) == 0)
        return err == -ENOSPC ? 0 : err;
    if (ucmi_room_reclaim(p, UINT32_MAX, false) < 0)
        return err;
    p->no_lane_until_ns = 0;
    return ucmi_own_any(p, lane_p);
}

/* More slots of our own, without losing a block of ours. */
static int widen(struct ucmi_posix *p)
{
    struct ucmi_lane *lane = own_lane(p);
    if (ucmi_now_ns() < p->full_until_ns)
        return -ENOSPC;
    int err = lane ? 0 : first_lane(p, &lane);
    if (err < 0)
        return err;
    ucmi_bound_enforce(p);
    lane = own_lane(p); /* it may be another now, or none */
    if (!lane || lane->own->nfree)
        return lane ? 0 : -ENOSPC;
    err = ucmi_own_replace(p, &lane);
    if (!err)
        err = grow(p, lane);
    if (err != -ENOSPC)
        return err;
    ucmi_lanes_refresh(p);
    /* Another rank's only when there is nothing of ours to evict: after a restart of the engine
     * that rank may just not have come to its lane yet. */
    if (ucmi_own_adopt(p, !SUM_OWN(p, live), &lane) == 0) {
        p->full_until_ns = 0; /* there may be more of them */
        return lane->own->nfree ? 0 : -ENOSPC;
    }
    if (ucmi_room_reclaim(p, coldest_tick(p), false) < 0)
        return -ENOSPC;
    p->full_until_ns = 0;
    lane = own_lane(p);
    return lane ? grow(p, lane) : -ENOSPC;
}

int ucmi_room_get(struct ucmi_posix *p, struct ucmi_lane **lane_p, uint32_t *place_p)
{
    if (p->nown)
        ucmi_bound_enforce(p);
    if (take_free(p, lane_p, place_p))
        return 0;
    int err = widen(p);
    if (!err && take_free(p, lane_p, place_p))
        return 0;
    if (err && err != -ENOSPC)
        return err;
    size_t batch = MAX(MIN(SUM_OWN(p, total) / 16, (uint32_t)EVICT_BATCH), 1u);
    if (SUM_OWN(p, leaving) || evict(p, batch))
        return -EAGAIN; /* their records are on the way */
    return -ENOSPC;
}

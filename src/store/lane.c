/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lanes that are followed: found in the namespace's directory, their journals read into the index,
 * their segments opened for reading.  Run by the pump.
 *
 * A lane that cannot be read (not there yet, damaged, of another format) is one that holds nothing.
 * What is found out here about another's lane changes nothing on disk.
 */
#include "store/posix.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- segments ---- */

void ucmi_seg_name(char name[24], uint32_t segment)
{
    snprintf(name, 24, "seg-%06" PRIu32, segment);
}

bool ucmi_seg_number(const char *name, uint32_t *segment)
{
    char same[24];
    if (sscanf(name, "seg-%7" SCNu32, segment) != 1)
        return false;
    ucmi_seg_name(same, *segment);
    return strcmp(same, name) == 0; /* spelled as we spell it: each number once */
}

void ucmi_seg_close(struct ucmi_posix *p, struct ucmi_seg *seg)
{
    p->open_segs -= (seg->fd >= 0) + (seg->direct >= 0);
    ucmi_file_close(p, seg->fd);
    ucmi_file_close(p, seg->direct);
    seg->fd = seg->direct = -1;
}

int ucmi_seg_reserve(struct ucmi_lane *lane, uint32_t segment)
{
    if (segment < lane->nsegs)
        return 0;
    if (segment >= UCMI_MAX_SEGMENTS || segment >= UINT32_MAX / lane->slots)
        return -ENOSPC;
    struct ucmi_seg *v = realloc(lane->segs, (segment + 1) * sizeof *v);
    if (!v)
        return -ENOMEM;
    for (uint32_t i = lane->nsegs; i <= segment; i++)
        v[i] = (struct ucmi_seg){.fd = -1, .direct = -1};
    lane->segs = v;
    lane->nsegs = segment + 1;
    return 0;
}

bool ucmi_seg_may_be(const struct ucmi_posix *p, const struct ucmi_lane *lane)
{
    uint64_t disk = atomic_load(&p->weight), slots = (uint64_t)lane->own->total + lane->slots;
    return !disk || slots <= disk / lane->slot_size * 4; /* four: it may compress */
}

enum { LET_GO_NS = 2000000000 };

static void close_idle_segs(struct ucmi_posix *p, bool ours)
{
    for (unsigned i = 1; i <= p->nlanes; i++)
        for (uint32_t g = 0; p->lanes[i] && g < p->lanes[i]->nsegs; g++)
            if (!p->lanes[i]->segs[g].ios && (ours || !p->lanes[i]->own))
                ucmi_seg_close(p, &p->lanes[i]->segs[g]);
}

uint64_t ucmi_segs_let_go(struct ucmi_posix *p)
{
    if (p->let_go_ns <= ucmi_now_ns()) {
        close_idle_segs(p, false);
        p->let_go_ns = UINT64_MAX;
    }
    return p->let_go_ns;
}

/* For writing too, where that is allowed: a lane that is followed today may be ours tomorrow. */
static int open_seg(struct ucmi_posix *p, const struct ucmi_lane *lane, uint32_t segment, int flags)
{
    char name[24];
    ucmi_seg_name(name, segment);
    int fd = p->read_only ? -EROFS : ucmi_file_open(p, lane->dir, name, O_RDWR | flags);
    if (fd == -EROFS || fd == -EACCES || fd == -EPERM)
        fd = ucmi_file_open(p, lane->dir, name, O_RDONLY | flags);
    return fd;
}

/* One that was not there a while ago may be by now. */
static int open_seg_now(struct ucmi_posix *p, const struct ucmi_lane *lane, uint32_t segment,
                        int flags)
{
    int fd = open_seg(p, lane, segment, flags);
    if (fd != -ENOENT || !p->network)
        return fd;
    ucmi_dir_renew(p, lane->dir);
    return open_seg(p, lane, segment, flags);
}

/* Pages in the file, whatever smaller unit the disk would take: then no page is ever written partly
 * around the page cache and partly through it.  Memory as the file system asks. */
static void learn_alignment(struct ucmi_posix *p, int fd)
{
    struct statx stx;
    if (p->dio_known || !p->o->io_direct)
        return;
    p->dio_known = true;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) < 0 || !(stx.stx_mask & STATX_DIOALIGN))
        return; /* the kernel cannot tell: pages suit everybody */
    p->dio_mem = MAX(stx.stx_dio_mem_align, 1u);
    p->dio_off = stx.stx_dio_offset_align ? MAX(stx.stx_dio_offset_align, (uint32_t)UCMI_PAGE) : 0;
}

int ucmi_seg_fd(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment, bool direct)
{
    direct |= p->network && p->dio_off;
    if (segment < lane->nsegs) {
        const struct ucmi_seg *seg = &lane->segs[segment];
        if ((direct ? seg->direct : seg->fd) >= 0)
            return direct ? seg->direct : seg->fd;
    }
    if (p->open_segs >= p->max_open_segs)
        close_idle_segs(p, true);
    int got = open_seg_now(p, lane, segment, direct ? O_DIRECT : 0);
    if (direct && got == -EINVAL) { /* not on this file system after all */
        p->dio_off = 0;
        return ucmi_seg_fd(p, lane, segment, false);
    }
    if (got < 0)
        return got;
    int err =
        ucmi_seg_reserve(lane, segment); /* for one that is there, not for any that is named */
    if (err < 0) {
        ucmi_file_close(p, got);
        return err;
    }
    *(direct ? &lane->segs[segment].direct : &lane->segs[segment].fd) = got;
    p->open_segs++;
    if (!lane->own)
        p->let_go_ns = MIN(p->let_go_ns, ucmi_now_ns() + LET_GO_NS);
    learn_alignment(p, got);
    return got;
}

/* Callers may be looking at the descriptor: they are told to stop first. */
void ucmi_lane_close_journal(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    if (p->quiet) {
        pthread_rwlock_wrlock(&p->lock);
        p->quiet = false;
        pthread_rwlock_unlock(&p->lock);
    }
    ucmi_file_close(p, lane->journal);
    lane->journal = -1;
}

/* When a file last changed, or 0 where that cannot tell whether it has changed since: it is gone,
 * or the change is so young that another may have come in the same tick of the file system's clock,
 * or not have reached the data yet. */
enum { YOUNG_DIR_NS = 50000000, YOUNG_JOURNAL_NS = 1000000000 };
static uint64_t stamp_of(const struct ucmi_posix *p, int fd, uint64_t young_ns)
{
    struct timespec now;
    struct stat st;
    if (ucmi_file_stat(p, fd, &st) < 0 || st.st_nlink == 0)
        return 0;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t changed = (uint64_t)st.st_mtim.tv_sec * 1000000000u + (uint64_t)st.st_mtim.tv_nsec;
    uint64_t real = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    return changed + young_ns > real ? 0 : changed;
}

static void lane_free(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    for (uint32_t g = 0; g < lane->nsegs; g++) {
        ucmi_seg_close(p, &lane->segs[g]);
        free(lane->segs[g].slots);
    }
    ucmi_lane_close_journal(p, lane);
    ucmi_file_close(p, lane->dir);
    free(lane->segs);
    free(lane);
}

void ucmi_seg_hold(struct ucmi_move *m)
{
    struct ucmi_lane *lane = m->lane;
    lane->ios++;
    lane->segs[m->place / lane->slots].ios++;
    /* A lane that becomes ours under a load is read like another's to its end, and so is one that
     * was ours from now on. */
    m->own_slot = lane->own && !lane->own->lost;
    if (m->own_slot) {
        ucmi_own_slot(lane, m->place)->ios++;
        lane->own->reads++;
    }
}

void ucmi_seg_release(struct ucmi_posix *p, struct ucmi_move *m)
{
    struct ucmi_lane *lane = m->lane;
    uint32_t place = m->place;
    lane->ios--;
    lane->segs[place / lane->slots].ios--;
    if (m->own_slot) {
        struct ucmi_slot *slot = ucmi_own_slot(lane, place);
        lane->own->reads--;
        if (--slot->ios == 0 && slot->state == UCMI_DISK_DRAINING)
            ucmi_own_free_slot(p, lane, place);
    }
    if (lane->gone && !lane->ios)
        lane_free(p, lane);
}

bool ucmi_seg_replaced(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t place)
{
    struct ucmi_seg *seg = &lane->segs[place / lane->slots];
    struct stat st;
    int fd = seg->fd >= 0 ? seg->fd : seg->direct;
    if (seg->replaced || lane->own || lane->gone || fd < 0)
        return seg->replaced;
    int err = ucmi_file_stat(p, fd, &st);
    seg->replaced = err == -ESTALE || (!err && st.st_nlink == 0);
    return seg->replaced;
}

bool ucmi_seg_renew(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t place)
{
    uint32_t segment = place / lane->slots;
    struct ucmi_seg *seg = segment < lane->nsegs ? &lane->segs[segment] : NULL;
    if (!seg || !seg->replaced)
        return true;
    if (seg->ios)
        return false;
    ucmi_seg_close(p, seg);
    ucmi_dir_renew(p, lane->dir);
    seg->replaced = false;
    return true;
}

/* ---- the index ---- */

void ucmi_posix_unindex(struct ucmi_posix *p, const struct ucmi_entry *e)
{
    pthread_rwlock_wrlock(&p->lock);
    struct ucmi_entry *at = ucmi_index_find(&p->index, &e->key, e->rank, e->lane);
    if (at && at->place == e->place && at->header_sum == e->header_sum)
        ucmi_index_remove(&p->index, at);
    pthread_rwlock_unlock(&p->lock);
}

void ucmi_lane_unindex(struct ucmi_posix *p, const struct ucmi_lane *lane)
{
    pthread_rwlock_wrlock(&p->lock);
    ucmi_index_drop_lane(&p->index, lane->id);
    pthread_rwlock_unlock(&p->lock);
}

struct reading {
    struct ucmi_posix *p;
    struct ucmi_lane *lane;
    unsigned n;
    struct ucmi_record v[64]; /* wait until their places in the index have come from memory */
};

static void touched(struct ucmi_posix *p, const struct ucmi_record *r)
{
    for (unsigned i = 0; i < p->nown; i++) {
        struct ucmi_lane *lane = p->own[i];
        struct ucmi_entry *e = ucmi_index_find(&p->index, &r->key, r->rank, lane->id);
        struct ucmi_slot *slot = e ? ucmi_own_slot(lane, e->place) : NULL;
        if (slot && slot->tick < r->tick)
            ucmi_room_used(p, slot, r->tick);
    }
}

static void apply(const struct reading *rd, const struct ucmi_record *r)
{
    struct ucmi_posix *p = rd->p;
    struct ucmi_lane *lane = rd->lane;
    uint32_t place = 0;
    bool placed = ucmi_place_of(r, lane->slots, &place);
    if (r->op == UCMI_PUT && placed) {
        struct ucmi_entry e = {.key = r->key,
                               .place = place,
                               .header_sum = r->header_sum,
                               .lane = lane->id,
                               .rank = r->rank};
        ucmi_index_put(&p->index, &e); /* without memory it is a miss */
    } else if (r->op == UCMI_DEL && placed) {
        struct ucmi_entry *e = ucmi_index_find(&p->index, &r->key, r->rank, lane->id);
        if (e && e->place == place)
            ucmi_index_remove(&p->index, e);
    } else if (r->op == UCMI_TOUCH) {
        touched(p, r);
    } else if (r->op >= UCMI_FORGET) {
        ucmi_asked_note(p, r);
    }
}

/* Callers do not wait for storage: the lock is not held over a read, and not for long. */
static void apply_all(struct reading *rd)
{
    if (!rd->n)
        return;
    pthread_rwlock_wrlock(&rd->p->lock);
    for (unsigned i = 0; i < rd->n; i++)
        apply(rd, &rd->v[i]);
    pthread_rwlock_unlock(&rd->p->lock);
    rd->n = 0;
}

static void take_in(void *arg, const struct ucmi_record *r)
{
    struct reading *rd = arg;
    ucmi_index_prefetch(&rd->p->index, &r->key, r->rank);
    rd->v[rd->n++] = *r;
    if (rd->n == ARRAY_LEN(rd->v))
        apply_all(rd);
}

/* ---- journals ---- */

static bool same_namespace(const struct ucmi_posix *p, const struct ucmi_journal_header *h)
{
    return memcmp(h->ns, p->geo->ns, sizeof h->ns) == 0 && h->ranks == p->geo->ranks &&
           h->block_size == p->geo->block_size && h->shard_size == p->geo->shard_size;
}

int ucmi_lane_takes(const struct ucmi_posix *p, const struct ucmi_lane *lane,
                    const struct ucmi_journal_header *h)
{
    if (!same_namespace(p, h))
        return -ENOTSUP;
    return lane->ios && h->slots != lane->slots ? -EBUSY : 0;
}

/* Room in the index for all that may be in a lane: by what its journal takes on disk, for what
 * a file says of itself costs nothing.  Without memory it is tried again entry by entry. */
static void make_index_room(struct ucmi_posix *p, const struct stat *journal)
{
    pthread_rwlock_wrlock(&p->lock);
    ucmi_index_reserve(&p->index,
                       p->index.count + ucmi_journal_slots((uint64_t)journal->st_blocks * 512));
    pthread_rwlock_unlock(&p->lock);
}

/* Opens what is called `journal` now.  -EEXIST: that is the one we have. */
static int open_journal(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    struct ucmi_journal_header *h = p->read_buf;
    struct stat now, had;
    ucmi_dir_renew(p, lane->dir); /* the name may be another file's by now */
    int fd = ucmi_file_open(p, lane->dir, "journal", O_RDONLY | (p->network ? O_DIRECT : 0));
    if (fd < 0)
        return fd;
    int err = fstat(fd, &now) < 0 ? -errno : 0;
    if (!err && lane->journal >= 0 && fstat(lane->journal, &had) == 0 && now.st_ino == had.st_ino)
        err = -EEXIST;
    if (!err)
        err = ucmi_journal_header_read(fd, h);
    if (!err)
        err = ucmi_lane_takes(p, lane, h);
    if (err < 0) {
        ucmi_file_close(p, fd);
        return err;
    }
    bool goes_on = lane->journal >= 0 && lane->moved && h->base + 1 == lane->pos.seq &&
                   h->slots == lane->slots;
    if (lane->journal >= 0 && !goes_on)
        ucmi_lane_unindex(p, lane);
    if (!goes_on)
        make_index_room(p, &now);
    lane->pos = goes_on ? ucmi_jpos_behind(h, lane->pos.epoch) : ucmi_jpos_first(h);
    ucmi_lane_close_journal(p, lane);
    lane->journal = fd;
    lane->rank = h->rank;
    lane->slots = h->slots;
    lane->slot_size = h->slot_size;
    lane->generation = h->generation;
    lane->moved = false;
    return 0;
}

static bool unlinked(int fd)
{
    struct stat st;
    return fstat(fd, &st) < 0 || st.st_nlink == 0;
}

/* Reads one file to its end.  Where it cannot be read the lane holds nothing. */
static int read_on(struct ucmi_posix *p, struct ucmi_lane *lane, bool *moved)
{
    struct reading rd = {.p = p, .lane = lane};
    int err = 1;
    for (size_t ask = UCMI_PAGE; err > 0; ask = UCMI_READ_BUF) { /* one page tells of no news */
        err = ucmi_journal_read_some(&p->seal, lane->journal, p->read_buf, ask, &lane->pos, moved,
                                     take_in, &rd);
        apply_all(&rd);
    }
    if (err < 0) {
        ucmi_lane_unindex(p, lane);
        ucmi_lane_close_journal(p, lane);
    }
    return err;
}

void ucmi_lane_follow(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    int err = lane->journal < 0 ? open_journal(p, lane) : 0;
    bool stale = false;
    while (!err) {
        bool moved = false;
        /* Before the reading: it vouches for less. */
        lane->stamp = p->network ? 0 : stamp_of(p, lane->journal, YOUNG_JOURNAL_NS);
        err = read_on(p, lane, &moved);
        if (err == -ESTALE && !stale) { /* renamed over, on another client of the server */
            stale = true;
            err = open_journal(p, lane);
            continue;
        }
        if (err < 0)
            return; /* it may come again */
        lane->moved |= moved;
        if (moved)
            continue; /* what comes behind counts while nothing has been renamed */
        if (!lane->moved && !unlinked(lane->journal))
            return;
        err = open_journal(p, lane);
    }
    if (err == -ENOTSUP) {
        ucmi_lane_unindex(p, lane);
        lane->alien = true;
        ucmi_log(UCM_WARN, p->object, "lane %s is of another format and is left alone", lane->name);
    }
}

/* ---- the namespace's directory ---- */

struct ucmi_lane *ucmi_lane_add(struct ucmi_posix *p, const char *name)
{
    unsigned id = 1;
    while (id <= p->nlanes && p->lanes[id])
        id++;
    if (id > UCMI_MAX_LANES)
        return NULL;
    int dir = ucmi_file_open(p, p->ns_fd, name, O_RDONLY | O_DIRECTORY);
    struct ucmi_lane *lane = dir < 0 ? NULL : calloc(1, sizeof *lane);
    if (!lane) {
        ucmi_file_close(p, dir);
        return NULL;
    }
    lane->id = (uint16_t)id;
    snprintf(lane->name, sizeof lane->name, "%s", name);
    lane->dir = dir;
    lane->journal = -1;
    p->lanes[id] = lane;
    p->nlanes = MAX(p->nlanes, id);
    return lane;
}

void ucmi_lane_forget(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    ucmi_lane_unindex(p, lane);
    p->lanes[lane->id] = NULL;
    lane->gone = true;
    if (!lane->ios)
        lane_free(p, lane);
}

static struct ucmi_lane *lane_named(const struct ucmi_posix *p, const char *name)
{
    for (unsigned i = 1; i <= p->nlanes; i++)
        if (p->lanes[i] && strcmp(p->lanes[i]->name, name) == 0)
            return p->lanes[i];
    return NULL;
}

bool ucmi_lane_name_ok(const char *name)
{
    unsigned rank;
    unsigned long long random;
    int end = 0;
    return sscanf(name, "r%4u-%16llx%n", &rank, &random, &end) == 2 && !name[end] &&
           strlen(name) < UCMI_LANE_NAME;
}

/* Lanes come by mkdir and go by rmdir, so an unchanged directory has no news. */
bool ucmi_ns_changed(const struct ucmi_posix *p)
{
    uint64_t stamp = stamp_of(p, p->ns_fd, YOUNG_DIR_NS);
    return !stamp || stamp != atomic_load_explicit(&p->ns_stamp, memory_order_relaxed);
}

bool ucmi_news_possible(const struct ucmi_posix *p)
{
    if (!p->quiet || ucmi_ns_changed(p))
        return true;
    for (unsigned i = 0; i < p->nwatches; i++)
        if (stamp_of(p, p->watches[i].fd, 0) != p->watches[i].stamp)
            return true;
    return false;
}

/* False: storage is away, and each further question may take as long as it takes to give one up. */
static bool scan(struct ucmi_posix *p)
{
    static struct ucmi_log_gate gate;
    struct stat st;
    int err = p->ns_fd < 0 ? -ENOENT : ucmi_file_stat(p, p->ns_fd, &st);
    if (err && err != -ENOENT && err != -ESTALE)
        return false;
    if (err || st.st_nlink == 0)
        ucmi_ns_open(p, false);
    uint64_t stamp =
        p->ns_fd < 0 ? 0 : stamp_of(p, p->ns_fd, YOUNG_DIR_NS); /* before what it is to vouch for */
    int fd = p->ns_fd < 0 ? -ENOENT : ucmi_file_open(p, p->ns_fd, ".", O_RDONLY | O_DIRECTORY);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    bool seen[p->nlanes + 1], all = true;
    unsigned known = p->nlanes;

    if (fd >= 0 && !dir)
        ucmi_file_close(p, fd);
    memset(seen, 0, sizeof seen);
    errno = 0;
    for (struct dirent *e; dir && (e = readdir(dir)); errno = 0) {
        if (!ucmi_lane_name_ok(e->d_name))
            continue;
        struct ucmi_lane *lane = lane_named(p, e->d_name);
        if (!lane && p->nlanes >= p->max_lanes) {
            ucmi_log_gated(&gate, 600, UCM_WARN, p->object,
                           "more than %u lanes: the rest is not looked at (each takes two open "
                           "files, see ulimit -n)",
                           p->max_lanes);
            continue;
        }
        if (!lane)
            lane = ucmi_lane_add(p, e->d_name);
        all &= lane != NULL;
        if (lane && lane->id <= known)
            seen[lane->id] = true;
    }
    /* What could not be read, for want of descriptors, say, is no proof that anything is gone. */
    bool read = dir ? errno == 0 : fd == -ENOENT;
    if (dir)
        closedir(dir);
    if (!read || !all)
        stamp = 0; /* look again */
    for (unsigned i = 1; read && i <= known; i++) {
        struct ucmi_lane *lane = p->lanes[i];
        if (!lane || seen[i])
            continue;
        if (lane->own)
            ucmi_own_lose(p, lane, "its directory was removed", -ENOENT);
        else
            ucmi_lane_forget(p, lane);
    }
    atomic_store_explicit(&p->ns_stamp, stamp, memory_order_relaxed);
    return true;
}

/* Callers may ask the journals themselves from now on, if all of them have been still for long
 * enough, and their number is small.  Over a network an fstat tells what was, not what is. */
static void watch(struct ucmi_posix *p)
{
    struct ucmi_watch v[UCMI_MAX_WATCHES];
    unsigned n = 0;
    bool quiet = !p->network;
    for (unsigned i = 1; i <= p->nlanes && quiet; i++) {
        const struct ucmi_lane *lane = p->lanes[i];
        if (!lane || lane->own || lane->alien)
            continue;
        quiet = lane->journal >= 0 && lane->stamp && !lane->moved && n < UCMI_MAX_WATCHES;
        if (quiet)
            v[n++] = (struct ucmi_watch){lane->journal, lane->stamp};
    }
    if (!quiet && !p->quiet)
        return;
    pthread_rwlock_wrlock(&p->lock);
    p->quiet = quiet;
    p->nwatches = n;
    memcpy(p->watches, v, n * sizeof *v);
    pthread_rwlock_unlock(&p->lock);
}

bool ucmi_lanes_renew(struct ucmi_posix *p, uint64_t since_ns)
{
    if (p->news_ns >= since_ns)
        return false;
    ucmi_lanes_refresh(p);
    return true;
}

void ucmi_lanes_refresh(struct ucmi_posix *p)
{
    p->news_ns = ucmi_now_ns();
    if ((p->ns_fd < 0 || ucmi_ns_changed(p)) && !scan(p))
        return;
    for (unsigned i = 1; i <= p->nlanes; i++) {
        struct ucmi_lane *lane = p->lanes[i];
        if (lane && !lane->own && !lane->alien)
            ucmi_lane_follow(p, lane);
    }
    watch(p);
    ucmi_posix_gauge(p, UCMI_DISK_BLOCKS, (int64_t)p->index.count);
}

void ucmi_lanes_close(struct ucmi_posix *p)
{
    for (unsigned i = 1; i <= p->nlanes; i++) {
        struct ucmi_lane *lane = p->lanes[i];
        if (!lane)
            continue;
        if (lane->own)
            ucmi_own_release(p, lane);
        lane_free(p, lane);
    }
    p->nlanes = 0;
}

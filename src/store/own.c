/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lanes that are ours: taking one, its slots, letting go.
 *
 * Taking a lane: its journal is read to the end, into the slot table; the header gets a higher
 * epoch and our name; an EPOCH record follows.  From then on nothing that the last owner may have
 * left behind that end counts.  A journal whose header is damaged says nothing: a new one replaces
 * it.
 */
#include "store/posix.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- slots ---- */

static int free_room(struct ucmi_own *own, size_t more)
{
    if (own->nfree + more <= own->cap_free)
        return 0;
    size_t cap = MAX(own->nfree + more, 2 * own->cap_free);
    uint32_t *v = realloc(own->free, cap * sizeof *v);
    if (!v)
        return -ENOMEM;
    own->free = v;
    own->cap_free = cap;
    return 0;
}

void ucmi_own_free_slot(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t place)
{
    struct ucmi_own *own = lane->own;
    struct ucmi_slot *slot = ucmi_own_slot(lane, place);

    if (slot->state == UCMI_DISK_OPEN) {
        own->open--;
    } else if (slot->ios) {
        slot->state = UCMI_DISK_DRAINING;
        return;
    } else {
        own->leaving--;
    }
    slot->state = UCMI_DISK_FREE;
    own->free[own->nfree++] = place; /* room for all slots was made with their segment */
    p->retry_ns = 0;
}

/* The first slot of a segment is the next to be used: a lane fills from front to back. */
static void list_free(struct ucmi_lane *lane, uint32_t segment)
{
    struct ucmi_own *own = lane->own;
    for (uint32_t i = lane->slots; i-- > 0;)
        if (lane->segs[segment].slots[i].state == UCMI_DISK_FREE)
            own->free[own->nfree++] = segment * lane->slots + i;
}

static int make_slots(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment)
{
    struct ucmi_own *own = lane->own;
    int err = ucmi_seg_may_be(p, lane) ? ucmi_seg_reserve(lane, segment) : -ENOSPC;
    if (err < 0)
        return err;
    struct ucmi_seg *seg = &lane->segs[segment];
    if (free_room(own, (size_t)own->total + lane->slots - own->nfree) < 0)
        return -ENOMEM;
    seg->slots = calloc(lane->slots, sizeof *seg->slots);
    if (!seg->slots)
        return -ENOMEM;
    own->total += lane->slots;
    return 0;
}

int ucmi_own_add_segment(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment)
{
    int err = make_slots(p, lane, segment);
    if (err < 0)
        return err;
    list_free(lane, segment);
    p->own_bytes += ucmi_lane_segment(lane);
    ucmi_posix_gauge(p, UCMI_DISK_BYTES, (int64_t)p->own_bytes);
    return 0;
}

static void forget_segment(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment)
{
    struct ucmi_own *own = lane->own;
    own->nvictims = own->next_victim = 0; /* some of them may have lain in it */
    own->total -= lane->slots;
    free(lane->segs[segment].slots);
    lane->segs[segment].slots = NULL;
    ucmi_seg_close(p, &lane->segs[segment]);
}

void ucmi_own_remove_segment(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment)
{
    struct ucmi_own *own = lane->own;
    size_t kept = 0;

    for (size_t i = 0; i < own->nfree; i++)
        if (own->free[i] / lane->slots != segment)
            own->free[kept++] = own->free[i];
    own->nfree = kept;
    forget_segment(p, lane, segment);
    p->own_bytes -= ucmi_lane_segment(lane);
    ucmi_posix_gauge(p, UCMI_DISK_BYTES, (int64_t)p->own_bytes);
}

/* ---- the journal's header ---- */

void ucmi_head_fill(const struct ucmi_posix *p, struct ucmi_journal_header *h)
{
    const struct ucm_geometry *geo = p->geo;
    *h = (struct ucmi_journal_header){
        .rank = geo->rank,
        .ranks = geo->ranks,
        .nshards = geo->nshards,
        .block_size = geo->block_size,
        .shard_size = geo->shard_size,
        .slot_size = p->slot_size,
        .slots = p->seg_slots,
        .pid = (uint64_t)getpid(),
    };
    memcpy(h->ns, geo->ns, sizeof h->ns);
    memcpy(h->host, p->host, sizeof h->host);
    memcpy(h->boot, p->boot, sizeof h->boot);
}

int ucmi_journal_create(struct ucmi_posix *p, const struct ucmi_lane *lane, const char *name,
                        uint64_t len)
{
    int flags = O_RDWR | O_CREAT | O_EXCL | (p->network ? O_DIRECT | O_DSYNC : 0);
    ucmi_file_remove(p, lane->dir, name, 0); /* unfinished; its name may be another file's too */
    int fd = ucmi_file_open(p, lane->dir, name, flags);
    if (fd < 0)
        return fd;
    struct ucm_file f = {.op = UCM_FILE_ALLOCATE, .fd = fd, .len = ROUND_UP((off_t)len, UCMI_PAGE)};
    int err = ucmi_io_file(&p->io, &f);
    if (err < 0) {
        ucmi_file_close(p, fd);
        return err;
    }
    return fd;
}

/* A journal that says nothing yet, in place of none or of a damaged one. */
static int new_journal(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    struct ucmi_journal_header *h = p->read_buf;
    ucmi_head_fill(p, h);
    h->generation = 1;
    h->epoch = 0; /* taking the lane raises it */
    ucmi_journal_header_seal(h);
    int fd = ucmi_journal_create(p, lane, "journal.new", 2 * UCMI_PAGE);
    if (fd < 0)
        return fd;
    int err = ucmi_pump_write(p, fd, h, sizeof *h, 0);
    ucmi_file_close(p, fd);
    if (!err)
        err = ucmi_file_rename(p, lane->dir, "journal.new", "journal");
    return err;
}

/* ---- taking ---- */

static void replay_record(void *arg, const struct ucmi_record *r)
{
    struct ucmi_lane *lane = arg;
    struct ucmi_seg *seg = r->segment < lane->nsegs ? &lane->segs[r->segment] : NULL;
    struct ucmi_own *own = lane->own;

    own->records++;
    bool placed = seg && seg->slots && r->slot < lane->slots;
    own->missing |= r->op == UCMI_PUT && !placed; /* its segment is not there */
    if (!placed)
        return;
    struct ucmi_slot *slot = &seg->slots[r->slot];
    if (r->op == UCMI_PUT) {
        own->live += slot->state == UCMI_DISK_FREE;
        *slot = (struct ucmi_slot){.key = r->key,
                                   .tick = r->tick,
                                   .depth = r->depth,
                                   .header_sum = r->header_sum,
                                   .rank = r->rank & 0x7fff,
                                   .pinned = (r->flags & UCMI_PINNED) != 0,
                                   .again = (r->flags & UCMI_AGAIN) != 0,
                                   .state = UCMI_DISK_LIVE};
    } else if (r->op == UCMI_DEL && slot->state == UCMI_DISK_LIVE &&
               ucmi_key_eq(&slot->key, &r->key)) {
        own->live--;
        slot->state = UCMI_DISK_FREE;
    }
}

/* Descriptors opened while the lane was another's may be of a file that is no more.  False: they
 * are in use. */
static bool close_earlier(struct ucmi_posix *p, struct ucmi_seg *seg, const struct stat *st)
{
    struct stat had;
    int fd = seg->fd >= 0 ? seg->fd : seg->direct;
    if (fd < 0 || (fstat(fd, &had) == 0 && had.st_ino == st->st_ino))
        return true;
    if (!seg->ios)
        ucmi_seg_close(p, seg);
    return !seg->ios;
}

/* Makes slot tables for the segments that are there. */
static int find_segments(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    int fd = ucmi_file_open(p, lane->dir, ".", O_RDONLY | O_DIRECTORY);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    int err = fd < 0 ? fd : dir ? 0 : -ENOMEM;

    if (fd >= 0 && !dir)
        ucmi_file_close(p, fd);
    for (struct dirent *e; !err && (e = readdir(dir));) {
        struct stat st;
        uint32_t segment;
        if (!ucmi_seg_number(e->d_name, &segment) ||
            fstatat(lane->dir, e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISREG(st.st_mode))
            continue;
        if (segment < lane->nsegs && !close_earlier(p, &lane->segs[segment], &st))
            continue; /* a load still reads an earlier file of that name */
        err = make_slots(p, lane, segment);
        if (err == -ENOSPC) /* it cannot be one of the lane */
            err = 0;
        else if (!err)
            lane->segs[segment].cut = (uint64_t)st.st_size != ucmi_lane_segment(lane);
    }
    if (dir)
        closedir(dir);
    return err;
}

/* Reads the whole journal into the slot tables. */
static int replay(struct ucmi_posix *p, struct ucmi_lane *lane, const struct ucmi_journal_header *h)
{
    struct ucmi_own *own = lane->own;
    struct ucmi_jpos pos = ucmi_jpos_first(h);
    uint64_t seq = 0;

    for (bool moved = true; moved && pos.seq != seq;) { /* MOVED without a rename: it goes on */
        seq = pos.seq;
        moved = false;
        int err = ucmi_journal_read(&p->seal, lane->journal, p->read_buf, UCMI_READ_BUF, &pos,
                                    &moved, replay_record, lane);
        if (err < 0)
            return err;
    }
    own->tail.pos = pos;
    size_t skip = pos.off % UCMI_PAGE;
    ssize_t n = skip ? pread(lane->journal, own->tail.page, UCMI_PAGE, (off_t)(pos.off - skip)) : 0;
    return n < 0 ? -errno : 0;
}

/* A segment that is too short and holds nothing was being made when its maker died: it goes.  One
 * that holds blocks was cut by somebody: it gets its length back if that fits the bound, and its
 * blocks their check. */
static int mend_segment(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment)
{
    struct ucmi_seg *seg = &lane->segs[segment];
    uint32_t live = 0;
    seg->cut = false;
    for (uint32_t i = 0; i < lane->slots; i++)
        live += seg->slots[i].state == UCMI_DISK_LIVE;
    int fd = live ? ucmi_seg_fd(p, lane, segment, false) : -ENOENT;
    int err = fd < 0 ? fd : ucmi_bound_lengthen(p, fd, ucmi_lane_segment(lane));
    if (!err || err == -EAGAIN) /* somebody else is counting: the lane is tried again */
        return err;
    lane->own->live -= live;
    lane->own->missing |= live != 0;
    char name[24];
    ucmi_seg_name(name, segment);
    ucmi_file_remove(p, lane->dir, name, 0);
    forget_segment(p, lane, segment);
    return 0;
}

static int write_head(struct ucmi_posix *p, struct ucmi_lane *lane, struct ucmi_journal_header *h)
{
    struct ucmi_own *own = lane->own;
    struct ucmi_record r = {.op = UCMI_EPOCH};

    own->sure_ns = ucmi_now_ns();
    r.epoch = MAX(h->epoch, own->tail.pos.epoch) + 1;
    if (r.epoch >= UCMI_MAX_EPOCH) /* nobody would believe what follows */
        return -EOVERFLOW;
    h->epoch = r.epoch;
    h->owner = own->owner;
    h->pid = (uint64_t)getpid();
    memcpy(h->host, p->host, sizeof h->host);
    memcpy(h->boot, p->boot, sizeof h->boot);
    ucmi_journal_header_seal(h);
    int err = ucmi_pump_write(p, lane->journal, h, sizeof *h, 0);
    return err < 0 ? err : ucmi_commit_now(p, lane, &r, 1);
}

/* Index and slot tables say the same from here on.  Normally the index has followed the journal to
 * the end that the tables were made from; then what is live and not in the index was found damaged
 * while the lane was another's, and is dropped by those who may: us. */
static void settle(struct ucmi_posix *p, struct ucmi_lane *lane, bool followed)
{
    struct ucmi_own *own = lane->own;
    if (!followed) {
        pthread_rwlock_wrlock(&p->lock);
        ucmi_index_drop_lane(&p->index, lane->id);
    }
    for (uint32_t place = 0; place < lane->nsegs * lane->slots; place++) {
        if (!lane->segs[place / lane->slots].slots) {
            place += lane->slots - 1;
            continue;
        }
        struct ucmi_slot *slot = ucmi_own_slot(lane, place);
        if (slot->state != UCMI_DISK_LIVE)
            continue;
        struct ucmi_entry e = {.key = slot->key,
                               .place = place,
                               .header_sum = slot->header_sum,
                               .lane = lane->id,
                               .rank = slot->rank};
        if (!followed) {
            ucmi_index_put(&p->index, &e);
        } else if (!ucmi_index_find(&p->index, &slot->key, slot->rank, lane->id)) {
            struct ucmi_record r = ucmi_commit_record(slot, UCMI_DEL, lane, place);
            if (ucmi_commit_add(lane, &r, NULL) < 0)
                continue; /* it is found damaged again some day */
            slot->state = UCMI_DISK_LEAVING;
            own->live--;
            own->leaving++;
        }
    }
    if (!followed)
        pthread_rwlock_unlock(&p->lock);
    for (uint32_t g = lane->nsegs; g-- > 0;)
        if (lane->segs[g].slots) {
            list_free(lane, g);
            p->own_bytes += ucmi_lane_segment(lane);
        }
    ucmi_posix_gauge(p, UCMI_DISK_BYTES, (int64_t)p->own_bytes);
}

/* The journal, ours to write: -EBADMSG and -ENOENT when there is none that says anything. */
static int open_journal(struct ucmi_posix *p, struct ucmi_lane *lane, struct ucmi_journal_header *h)
{
    int flags = O_RDWR | (p->network ? O_DIRECT | O_DSYNC : 0);
    int fd = ucmi_file_open(p, lane->dir, "journal", flags);
    if (fd < 0)
        return fd;
    int err = ucmi_journal_header_read(fd, h);
    if (!err)
        err = ucmi_lane_takes(p, lane, h);
    if (!err)
        err = ucmi_lane_dead_for_sure(p, h, fd);
    if (err < 0) {
        ucmi_file_close(p, fd);
        return err;
    }
    ucmi_lane_close_journal(p, lane);
    lane->journal = fd;
    lane->rank = h->rank;
    lane->slots = h->slots;
    lane->slot_size = h->slot_size;
    lane->generation = h->generation;
    return 0;
}

static int fill(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    struct ucmi_own *own = lane->own;
    ucmi_lane_follow(p, lane);
    uint64_t followed = lane->journal < 0 ? 0 : lane->pos.seq;
    uint32_t slots = lane->slots;
    int err = open_journal(p, lane, own->head);
    if (err == -ENOENT || err == -EBADMSG) {
        err = new_journal(p, lane);
        if (!err)
            err = open_journal(p, lane, own->head);
        followed = 0;
    }
    if (!err)
        err = find_segments(p, lane);
    if (!err)
        err = replay(p, lane, own->head);
    for (uint32_t g = 0; !err && g < lane->nsegs; g++)
        if (lane->segs[g].cut)
            err = mend_segment(p, lane, g);
    if (err < 0)
        return err;
    bool same = followed == own->tail.pos.seq && slots == lane->slots && !own->missing;
    err = write_head(p, lane, own->head);
    if (!err)
        settle(p, lane, same);
    return err;
}

static void own_free(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    struct ucmi_own *own = lane->own;
    for (uint32_t g = 0; g < lane->nsegs; g++) {
        free(lane->segs[g].slots);
        lane->segs[g].slots = NULL;
    }
    /* Followed again, it is read from its beginning. */
    ucmi_lane_close_journal(p, lane);
    lane->own = NULL;
    ucmi_file_close(p, own->lock);
    free(own->free);
    free(own->victims);
    free(own->pending.r);
    free(own->pending.block);
    free(own->flying.r);
    free(own->flying.block);
    free(own->tail.page);
    free(own->head);
    free(own->buf);
    free(own);
}

static int own_new(struct ucmi_posix *p, struct ucmi_lane *lane, int lock)
{
    struct ucmi_own *own = calloc(1, sizeof *own);
    if (!own)
        return -ENOMEM;
    own->lane = lane;
    own->lock = lock;
    own->owner = ucmi_random_word();
    own->compact_slack = UCMI_COMPACT_SLACK;
    own->tail.page = aligned_alloc(UCMI_PAGE, UCMI_PAGE);
    own->head = aligned_alloc(UCMI_PAGE, sizeof *own->head);
    lane->own = own;
    return own->tail.page && own->head ? 0 : -ENOMEM;
}

int ucmi_own_take(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    struct stat st;
    if (p->nown == ARRAY_LEN(p->own))
        return -EAGAIN;
    /* First: on NFS even to open the lock of one who lives, or has just died, takes its time. */
    int err = p->network ? ucmi_lane_dead(p, lane->dir) : 0;
    if (err < 0)
        return err;
    int lock = ucmi_lock_open(p, lane->dir, O_CREAT);
    if (lock == -EAGAIN)
        lock = ucmi_lane_lock_anew(p, lane);
    if (lock < 0)
        return lock;
    if (ucmi_file_stat(p, lock, &st) < 0 || st.st_nlink == 0) { /* it was removed while we came */
        ucmi_file_close(p, lock);
        return -ENOENT;
    }
    err = own_new(p, lane, lock);
    if (err < 0) {
        if (lane->own)
            own_free(p, lane);
        else
            ucmi_file_close(p, lock);
        return err;
    }
    err = fill(p, lane);
    if (err < 0) {
        own_free(p, lane);
        ucmi_lane_unindex(p, lane); /* followed again, it is read from its beginning */
        return err;
    }
    p->own[p->nown++] = lane;
    ucmi_own_tell(p);
    return 0;
}

static unsigned rank_of(const struct ucmi_lane *lane)
{
    return lane->journal >= 0 ? lane->rank : (unsigned)strtoul(lane->name + 1, NULL, 10);
}

/* Removes a lane that is ours, or could not be made whole: on a full disk there would soon be
 * thousands. */
static void unmake(struct ucmi_posix *p, struct ucmi_lane *lane, const char *name)
{
    static const char *const files[] = {"journal.new", "journal", "lock"};
    if (lane && lane->own)
        ucmi_own_release(p, lane);
    for (size_t i = 0; lane && i < ARRAY_LEN(files); i++)
        ucmi_file_remove(p, lane->dir, files[i], 0);
    ucmi_file_remove(p, p->ns_fd, name, AT_REMOVEDIR);
    if (lane)
        ucmi_lane_forget(p, lane);
}

int ucmi_own_adopt(struct ucmi_posix *p, bool any_rank, struct ucmi_lane **lane_p)
{
    for (unsigned i = 1; i <= p->nlanes; i++) {
        struct ucmi_lane *lane = p->lanes[i];
        if (!lane || lane->own || lane->alien || (!any_rank && rank_of(lane) != p->geo->rank))
            continue;
        int err = ucmi_own_take(p, lane);
        if (err < 0)
            continue;                           /* lived in, or not to be had: there are others */
        if (p->nown > 1 && !lane->own->total) { /* no slots: its journal would only take room */
            char name[UCMI_LANE_NAME];
            memcpy(name, lane->name, sizeof name);
            unmake(p, lane, name);
            continue;
        }
        ucmi_count(p->t->counters, UCMI_DISK_LANES_ADOPTED, 1);
        ucmi_log(UCM_INFO, p->object, "took over lane %s: %" PRIu32 " blocks in %" PRIu32 " slots",
                 lane->name, lane->own->live, lane->own->total);
        *lane_p = lane;
        return 0;
    }
    return -ENOENT;
}

static int create_locked(struct ucmi_posix *p, struct ucmi_lane **lane_p)
{
    char name[UCMI_LANE_NAME];
    for (int tries = 0; tries < 16; tries++) {
        snprintf(name, sizeof name, "r%" PRIu32 "-%016" PRIx64, p->geo->rank, ucmi_random_word());
        int err = ucmi_io_file(
            &p->io, &(struct ucm_file){
                        .op = UCM_FILE_MKDIR, .dirfd = p->ns_fd, .path = name, .mode = 0777});
        if (err == -EEXIST)
            continue;
        if (err < 0)
            return err;
        struct ucmi_lane *lane = ucmi_lane_add(p, name);
        err = lane ? ucmi_own_take(p, lane) : -ENOMEM;
        if (err == -EAGAIN || err == -EBUSY)
            continue; /* somebody in search of a lane was quicker */
        if (!err)
            err = ucmi_dir_sync(p, lane->dir);
        if (!err)
            err = ucmi_dir_sync(p, p->ns_fd);
        if (err < 0)
            unmake(p, lane, name);
        else
            *lane_p = lane;
        return err;
    }
    return -EBUSY;
}

int ucmi_own_create(struct ucmi_posix *p, struct ucmi_lane **lane_p)
{
    int lock = ucmi_bound_for_lane(p);
    int err = lock < 0 ? lock : create_locked(p, lane_p);
    if (lock >= 0)
        ucmi_file_close(p, lock);
    return err;
}

int ucmi_own_replace(struct ucmi_posix *p, struct ucmi_lane **lane_p)
{
    struct ucmi_lane *lane = *lane_p;
    char name[UCMI_LANE_NAME];
    if (lane->own->total || lane->slots <= p->seg_slots || lane->own->stage != UCMI_COMMIT_IDLE ||
        lane->ios)
        return 0;
    memcpy(name, lane->name, sizeof name);
    unmake(p, lane, name);
    return ucmi_own_create(p, lane_p);
}

int ucmi_own_any(struct ucmi_posix *p, struct ucmi_lane **lane_p)
{
    static struct ucmi_log_gate gate;
    uint64_t now = ucmi_now_ns();
    if (now < p->no_lane_until_ns)
        return p->no_lane_err;
    ucmi_lanes_refresh(p);
    int err = ucmi_ns_open(p, true);
    if (!err)
        err = ucmi_own_adopt(p, false, lane_p);
    if (err == -ENOENT && p->ns_fd >= 0)
        err = ucmi_own_create(p, lane_p);
    if (err < 0 && err != -EAGAIN) { /* else somebody else just makes room for his own */
        p->no_lane_until_ns = now + UCMI_RETRY_NS;
        p->no_lane_err = err;
        ucmi_log_gated(&gate, 60, UCM_WARN, p->object, "nothing can be stored: no lane: %s",
                       ucmi_file_error(err));
    }
    return err;
}

/* ---- letting go ---- */

void ucmi_own_release(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    for (unsigned i = 0; i < p->nown; i++)
        if (p->own[i] == lane)
            p->own[i] = p->own[--p->nown];
    p->own_bytes -= lane->own->total * lane->slot_size;
    ucmi_posix_gauge(p, UCMI_DISK_BYTES, (int64_t)p->own_bytes);
    own_free(p, lane);
}

void ucmi_own_lose(struct ucmi_posix *p, struct ucmi_lane *lane, const char *why, int err)
{
    static struct ucmi_log_gate gate;
    struct ucmi_own *own = lane->own;

    if (own->lost)
        return;
    own->lost = true;
    p->no_lane_until_ns = ucmi_now_ns() + UCMI_RETRY_NS;
    p->no_lane_err = -EIO;
    ucmi_count(p->t->counters, UCMI_DISK_LANES_LOST, 1);
    ucmi_log_gated(&gate, 10, UCM_WARN, p->object, "let go of lane %s: %s (%s)", lane->name, why,
                   ucmi_file_error(err));
    ucmi_batch_fail(p, &own->pending, -EIO);
    ucmi_blocks_fail(p, lane, -EIO);
}

void ucmi_own_drain(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    const struct ucmi_own *own = lane->own;
    if (own->stage != UCMI_COMMIT_IDLE || own->open || own->reads)
        return;
    ucmi_own_release(p, lane);
    ucmi_lane_unindex(p, lane); /* followed again, it is read from its beginning */
    atomic_store(&p->ns_stamp, 0);
    p->retry_ns = 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bound: what the directory holds, and that it stays within the capacity.
 *
 * Everything below <backend>/ucm is counted under the lock of <backend>/ucm/lock before anything is
 * made that takes room, so the bound is exact over all processes and namespaces.  A start with a
 * smaller capacity gives up segments until all fits.
 *
 * A process that finds no room, and has less than others, says so by that same file's length and
 * time; who has more gives up its coldest segment.  So room goes from lanes that have to lanes that
 * need, one segment a second and process.  Who is idle is woken by it (asked.c), or, on another
 * node, looks when it shows that it lives (alive.c).
 */
#include "store/posix.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    LOCK_RETRY_NS = 2000000,
    SHRINK_PAUSE_NS = 50000000,
    WANT_S = 20,              /* a want is good for so long: an idle owner on NFS wakes up in it */
    YIELD_NS = 1000000000,    /* and looked for so often */
    REGROW_NS = 3000000000ll, /* who gave up a segment does not take it back at once */
};

/* ---- what is used ---- */

/* The most a file of a segment's size may come to on disk. */
uint64_t ucmi_bound_charge(uint64_t size)
{
    return size + size / 256 + 2 * UCMI_PAGE;
}

static uint64_t file_charge(const char *name, const struct stat *st)
{
    uint64_t disk = (uint64_t)st->st_blocks * 512;
    if (strncmp(name, "seg-", 4) == 0)
        return MAX(disk, ucmi_bound_charge((uint64_t)st->st_size));
    return strcmp(name, "journal") == 0 ? 2 * disk : disk; /* twice, while it is compacted */
}

/* One slot, its journal, and the directories and small files around them. */
uint64_t ucmi_bound_least(const struct ucmi_posix *p)
{
    return ucmi_bound_charge(p->slot_size) + 2 * ucmi_journal_room(1) + 16 * UCMI_PAGE;
}

int ucmi_each_entry(struct ucmi_posix *p, int at, const char *path, ucmi_entry_fn *fn, void *arg)
{
    int fd = ucmi_file_open(p, at, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir) {
        ucmi_file_close(p, fd);
        return fd < 0 ? fd : -ENOMEM;
    }
    ucmi_dir_renew(p, fd);
    errno = 0;
    for (struct dirent *e; (e = readdir(dir)); errno = 0) {
        struct stat st;
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 ||
            fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        fn(arg, fd, e->d_name, &st);
    }
    int err = -errno;
    closedir(dir);
    return err;
}

struct walk {
    struct ucmi_posix *p;
    uint64_t bytes;
    int err; /* something could not be counted */
};

static void add_file(void *arg, int dir, const char *name, const struct stat *st)
{
    struct walk *w = arg;
    w->bytes += file_charge(name, st);
    int err = S_ISDIR(st->st_mode) ? ucmi_each_entry(w->p, dir, name, add_file, w) : 0;
    if (err && err != -ENOENT && err != -EACCES) /* gone since, or another user's own business */
        w->err = err;
}

int ucmi_bound_used(struct ucmi_posix *p, uint64_t *bytes)
{
    struct walk w = {.p = p};
    int err = ucmi_each_entry(p, p->root_fd, ".", add_file, &w);
    if (!err)
        err = w.err;
    if (!err)
        *bytes = w.bytes + UCMI_PAGE;
    return err;
}

/* The lock under which room is counted and taken; closing the descriptor gives it back. */
static int lock_root(struct ucmi_posix *p)
{
    return ucmi_lock_open(p, p->root_fd, O_CREAT);
}

/* The same for what a dump waits for: it is tried again soon if another process is at it. */
int ucmi_bound_lock(struct ucmi_posix *p)
{
    int lock = lock_root(p);
    if (lock == -EAGAIN)
        p->retry_ns = ucmi_now_ns() + LOCK_RETRY_NS;
    return lock;
}

/* Do `more` bytes fit?  With the lock held. */
int ucmi_bound_check(struct ucmi_posix *p, uint64_t more)
{
    uint64_t used = 0;
    int err = p->capacity ? ucmi_bound_used(p, &used) : 0;
    return err < 0 ? err : p->capacity && used + more > p->capacity ? -ENOSPC : 0;
}

int ucmi_bound_for_lane(struct ucmi_posix *p)
{
    enum { LANE_PAGES = 1 + 2 * 2 + 1 }; /* its directory, its journal twice, and one to be safe */
    int lock = ucmi_bound_lock(p);
    int err = lock < 0 ? lock : ucmi_bound_check(p, LANE_PAGES * UCMI_PAGE);
    if (err == -ENOSPC)
        ucmi_bound_want(p, lock);
    if (err < 0 && lock >= 0)
        ucmi_file_close(p, lock);
    return err < 0 ? err : lock;
}

int ucmi_bound_lengthen(struct ucmi_posix *p, int fd, uint64_t len)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    uint64_t has = MIN((uint64_t)st.st_size, len);
    bool locks = p->capacity && !p->shrinking; /* else we hold it already */
    int lock = locks ? lock_root(p) : 0;
    int err = lock < 0 ? lock : ucmi_bound_check(p, ucmi_bound_charge(len - has));
    struct ucm_file f = {.op = UCM_FILE_ALLOCATE, .fd = fd, .len = (off_t)len};
    if (!err)
        err = ucmi_io_file(&p->io, &f);
    if (locks)
        ucmi_file_close(p, lock);
    return err;
}

/* ---- a smaller bound than the last owner had ---- */

/* Nothing under way in it, nothing pinned in it now, and the tick of its last use is the lowest. */
static bool coldest_segment(const struct ucmi_lane *lane, uint32_t now, uint32_t *segment,
                            uint32_t *tick)
{
    bool any = false;
    for (uint32_t g = 0; g < lane->nsegs; g++) {
        const struct ucmi_seg *seg = &lane->segs[g];
        uint32_t last = 0;
        bool busy = !seg->slots || seg->ios;
        for (uint32_t i = 0; !busy && i < lane->slots; i++) {
            const struct ucmi_slot *slot = &seg->slots[i];
            busy = slot->state != UCMI_DISK_FREE && slot->state != UCMI_DISK_LIVE;
            if (slot->state != UCMI_DISK_LIVE)
                continue;
            last = MAX(last, slot->tick);
            busy = ucmi_slot_pinned(slot, now);
        }
        if (!busy && (!any || last <= *tick)) {
            *segment = g;
            *tick = last;
            any = true;
        }
    }
    return any;
}

int ucmi_bound_give_up(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segment)
{
    struct ucmi_seg *seg = &lane->segs[segment];
    struct ucmi_record *v = malloc(lane->slots * sizeof *v);
    char name[24];
    size_t n = 0;

    if (!v)
        return -ENOMEM;
    int err = ucmi_own_check(p, lane);
    if (err < 0) {
        free(v);
        ucmi_own_lose(p, lane, "another process has taken it", err);
        return err;
    }
    ucmi_commit_unsay(lane, segment);
    pthread_rwlock_wrlock(&p->lock);
    for (uint32_t i = 0; i < lane->slots; i++) {
        struct ucmi_slot *slot = &seg->slots[i];
        if (slot->state != UCMI_DISK_LIVE)
            continue;
        struct ucmi_entry *e = ucmi_index_find(&p->index, &slot->key, slot->rank, lane->id);
        v[n++] = ucmi_commit_record(slot, UCMI_DEL, lane, segment * lane->slots + i);
        if (e && e->place == segment * lane->slots + i)
            ucmi_index_remove(&p->index, e);
        slot->state = UCMI_DISK_FREE;
        lane->own->live--;
    }
    pthread_rwlock_unlock(&p->lock);
    ucmi_own_remove_segment(p, lane, segment);
    ucmi_count(p->t->counters, UCMI_DISK_EVICTED, (int64_t)n);
    ucmi_seg_name(name, segment);
    err = n ? ucmi_commit_now(p, lane, v, n) : 0;
    bool full = err == -ENOSPC || err == -EDQUOT; /* the file gives back room for the records */
    int removed = !err || full ? ucmi_file_remove(p, lane->dir, name, 0) : 0;
    if (full)
        err = ucmi_commit_now(p, lane, v, n);
    free(v);
    if (err < 0) /* what the journal says now is for who reads it anew */
        ucmi_own_lose(p, lane, "its journal could not be written", err);
    else
        ucmi_commit_tidy(p, lane, false);
    return err < 0 ? err : removed;
}

enum { PINNED_TOO = UINT32_MAX }; /* as if all pins had ended */

static int give_up_one(struct ucmi_posix *p, uint32_t now)
{
    for (unsigned i = 0; i < p->nown; i++) {
        struct ucmi_lane *lane = p->own[i];
        uint32_t segment = 0, tick = 0;
        if (!lane->own->lost && lane->own->stage == UCMI_COMMIT_IDLE &&
            coldest_segment(lane, now, &segment, &tick))
            return ucmi_bound_give_up(p, lane, segment);
    }
    return -ESRCH;
}

/* Pinned blocks go last: the bound is the bound. */
static int shrink_step(struct ucmi_posix *p)
{
    struct ucmi_lane *lane;
    int err = give_up_one(p, ucmi_tick((uint64_t)time(NULL)));
    if (err == -ESRCH)
        err = ucmi_own_adopt(p, true, &lane);
    if (err == -ENOENT)
        err = ucmi_room_reclaim(p, UINT32_MAX, false);
    if (err == -ENOENT)
        err = give_up_one(p, PINNED_TOO);
    return err == -ESRCH ? ucmi_room_reclaim(p, UINT32_MAX, true) : err;
}

void ucmi_bound_shrink(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t segments)
{
    uint32_t now = ucmi_tick((uint64_t)time(NULL)), has = 0, segment, tick;
    for (uint32_t g = 0; g < lane->nsegs; g++)
        has += lane->segs[g].slots != NULL;
    for (; has > segments && lane->own->stage == UCMI_COMMIT_IDLE &&
           coldest_segment(lane, now, &segment, &tick);
         has--) {
        if (ucmi_bound_give_up(p, lane, segment) < 0)
            return;
        if (lane->own->total) /* else there is nothing to evict from */
            p->full_until_ns = ucmi_now_ns() + REGROW_NS;
    }
}

/* Again and again, until all fits: somebody else may be counting, a segment be read just now. */
void ucmi_bound_enforce(struct ucmi_posix *p)
{
    uint64_t now = ucmi_now_ns();
    if (!p->capacity || p->fits || now < p->shrink_ns)
        return;
    p->shrink_ns = now + SHRINK_PAUSE_NS;
    int lock = lock_root(p);
    if (lock < 0)
        return;
    p->shrinking = true;
    int err = ucmi_bound_check(p, 0);
    while (err == -ENOSPC && (err = shrink_step(p)) == 0)
        err = ucmi_bound_check(p, 0);
    p->shrinking = false;
    p->fits = err == 0;
    ucmi_file_close(p, lock);
}

/* ---- room for those who have none ---- */

/* The length of <backend>/ucm/lock says how much the one who wants has (0: nobody ever did), its
 * time of change when that was: so nobody need open it to know. */
enum { WANT_UNIT = 65536 };

static uint64_t want_time(const struct statx *st)
{
    return (uint64_t)st->stx_mtime.tv_sec * 1000000000u + st->stx_mtime.tv_nsec;
}

void ucmi_bound_want(struct ucmi_posix *p, int lock)
{
    struct statx st;
    const struct ucm_file length = {
        .op = UCM_FILE_TRUNCATE, .fd = lock, .len = (off_t)(p->own_bytes / WANT_UNIT + 1)};
    if (ucmi_io_file(&p->io, &length) == 0 && statx(lock, "", AT_EMPTY_PATH, STATX_MTIME, &st) == 0)
        p->want_ns = want_time(&st); /* our own */
}

/* Somebody wants room, not long ago, and would have no more than we when it has a segment of ours.
 * Each time is answered once: who still wants says so again. */
static bool wanted(struct ucmi_posix *p, uint64_t segment)
{
    const int flags = AT_SYMLINK_NOFOLLOW | (p->network ? AT_STATX_FORCE_SYNC : 0);
    struct statx st;
    if (statx(p->root_fd, "lock", flags, STATX_MTIME | STATX_SIZE, &st) < 0 || !st.stx_size ||
        want_time(&st) == p->want_ns)
        return false;
    int64_t age = (int64_t)time(NULL) - st.stx_mtime.tv_sec;
    uint64_t has = (st.stx_size - 1) * WANT_UNIT;
    if (age < -WANT_S || age > WANT_S || has + 2 * segment > p->own_bytes)
        return false;
    p->want_ns = want_time(&st);
    return true;
}

void ucmi_bound_yield(struct ucmi_posix *p)
{
    uint64_t now = ucmi_now_ns();
    if (!p->capacity || !p->nown || now < p->yield_ns)
        return;
    struct ucmi_lane *lane = NULL; /* one that can give */
    uint32_t segment = 0, tick;
    for (unsigned i = 0; i < p->nown && !lane; i++)
        if (!p->own[i]->own->lost && p->own[i]->own->stage == UCMI_COMMIT_IDLE)
            lane = p->own[i];
    if (!lane)
        return; /* records fly: after them */
    p->yield_ns = now + YIELD_NS;
    if (wanted(p, ucmi_lane_segment(lane)) &&
        coldest_segment(lane, ucmi_tick((uint64_t)time(NULL)), &segment, &tick) &&
        ucmi_bound_give_up(p, lane, segment) == 0)
        p->full_until_ns = now + REGROW_NS;
}

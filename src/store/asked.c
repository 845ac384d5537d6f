/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What others ask of the owner of a lane: the verbs of the tool (manage.c), while engines run.
 *
 * Who wants a block of a living lane dropped or pinned writes that into a journal of its own, as a
 * user of a block does with TOUCH; its owner reads it like any news, does it, and answers in the
 * lane's journal: with a DEL, or with the PUT of the block once more.  A request names one block as
 * it was published in one place, and when it is no longer wanted, so one that is read late, twice,
 * or by the wrong process does no harm.
 *
 * An owner with nothing to do reads no journals.  So it has an ear: a thread asleep on an inotify
 * of the namespace's directory, which hears when the times of a lane's directory are set, and of
 * the file that says who wants room.  One on another node of a network file system sees that the
 * namespace's directory has changed when it next shows that it lives (alive.c).  Where there is no
 * ear to be had (their number is limited) an idle owner does not hear; who asks waits for so long
 * as it cares to, and says so.
 */
#include "store/posix.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    MOST_ASKED = 4096,
    MOST_ANSWERS = UCMI_COMPACT_SLACK / 4 /* in a commit */
};

/* ---- pins ---- */

/* The file `pinned` in a lane's directory is as young as its last pin is long: so who removes dead
 * lanes whole need not read them. */
static void write_mark(struct ucmi_posix *p, const struct ucmi_lane *lane, uint32_t tick)
{
    struct timespec until = {.tv_sec = (time_t)tick << UCMI_TICK_SHIFT};
    struct timespec times[2] = {until, until};
    int fd = ucmi_file_open(p, lane->dir, "pinned", O_WRONLY | O_CREAT);
    if (fd >= 0)
        futimens(fd, times);
    ucmi_file_close(p, fd);
}

bool ucmi_lane_pinned(int dir)
{
    struct stat st;
    return fstatat(dir, "pinned", &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_mtim.tv_sec > time(NULL);
}

/* Before the record: a pin that is on record is never without its mark. */
static void mark_longer(struct ucmi_posix *p, const struct ucmi_lane *lane, uint32_t tick)
{
    struct stat st;
    if (fstatat(lane->dir, "pinned", &st, AT_SYMLINK_NOFOLLOW) < 0 ||
        ucmi_tick((uint64_t)st.st_mtim.tv_sec) < tick)
        write_mark(p, lane, tick);
}

void ucmi_pins_mark(struct ucmi_posix *p, const struct ucmi_lane *lane)
{
    uint32_t last = 0;
    for (uint32_t g = 0; g < lane->nsegs; g++)
        for (uint32_t i = 0; lane->segs[g].slots && i < lane->slots; i++) {
            const struct ucmi_slot *slot = &lane->segs[g].slots[i];
            if (slot->state == UCMI_DISK_LIVE && slot->pinned)
                last = MAX(last, slot->tick);
        }
    if (last)
        write_mark(p, lane, last);
    else
        ucmi_file_remove(p, lane->dir, "pinned", 0);
}

void ucmi_slot_pin(struct ucmi_posix *p, const struct ucmi_lane *lane, struct ucmi_slot *slot,
                   uint32_t until)
{
    if (until)
        mark_longer(p, lane, until);
    slot->pinned = until != 0;
    slot->tick = until ? until : ucmi_tick((uint64_t)time(NULL));
}

/* ---- answering ---- */

int ucmi_slot_check(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t place)
{
    const struct ucmi_slot *slot = ucmi_own_slot(lane, place);
    const struct ucmi_record put = ucmi_commit_record(slot, UCMI_PUT, lane, place);
    const size_t len = UCMI_PAGE + p->geo->block_size;
    struct ucmi_journal_header *head = p->read_buf;
    void *buf = aligned_alloc(UCMI_PAGE, ROUND_UP(len, (size_t)UCMI_PAGE));
    int fd = buf ? ucmi_seg_fd(p, lane, place / lane->slots, false) : -ENOMEM;
    ssize_t n = fd < 0 ? fd : ucmi_pump_read(p, fd, buf, len, ucmi_slot_off(lane, place));
    ucmi_head_fill(p, head);
    int err = n < 0             ? (int)n
              : (size_t)n < len ? -EBADMSG
                                : ucmi_block_check(&p->seal, buf, head, &put);
    free(buf);
    return err == -ENOENT || err == -ELOOP || err == -EISDIR ? -EBADMSG : err; /* no segment */
}

static struct ucmi_lane *lane_asked(const struct ucmi_posix *p, uint32_t hash)
{
    for (unsigned i = 0; i < p->nown; i++)
        if (!p->own[i]->own->lost && ucmi_lane_hash(p->own[i]->name) == hash)
            return p->own[i];
    return NULL;
}

void ucmi_asked_note(struct ucmi_posix *p, const struct ucmi_record *r)
{
    if (r->depth < ucmi_tick((uint64_t)time(NULL)) || p->nasked == MOST_ASKED ||
        !lane_asked(p, r->lane))
        return;
    if (!p->asked && !(p->asked = malloc(MOST_ASKED * sizeof *p->asked)))
        return;
    p->asked[p->nasked++] = *r;
}

/* In the slot is what is asked about: does what is wanted; false: the block stays. */
static bool forget(struct ucmi_posix *p, struct ucmi_lane *lane, uint32_t place,
                   const struct ucmi_record *r)
{
    const struct ucmi_slot *slot = ucmi_own_slot(lane, place);
    const struct ucmi_entry e = {
        .key = slot->key, .place = place, .header_sum = slot->header_sum, .rank = slot->rank};
    if (slot->tick >= r->tick ||
        (r->flags & UCMI_IF_BAD && ucmi_slot_check(p, lane, place) != -EBADMSG))
        return false;
    ucmi_room_drop(p, lane, &e);
    return slot->state != UCMI_DISK_LIVE;
}

static void answer(struct ucmi_posix *p, struct ucmi_lane *lane, const struct ucmi_record *r)
{
    uint32_t place;
    if (!ucmi_place_of(r, lane->slots, &place) || r->segment >= lane->nsegs ||
        !lane->segs[r->segment].slots)
        return;
    struct ucmi_slot *slot = ucmi_own_slot(lane, place);
    if (slot->state != UCMI_DISK_LIVE || slot->rank != r->rank ||
        slot->header_sum != r->header_sum || !ucmi_key_eq(&slot->key, &r->key))
        return;
    ucmi_slot_seen(p, lane, slot);
    if (r->op == UCMI_FORGET && forget(p, lane, place, r))
        return;
    if (r->op == UCMI_PIN)
        ucmi_slot_pin(p, lane, slot, r->tick);
    struct ucmi_record put = ucmi_commit_record(slot, UCMI_PUT, lane, place);
    ucmi_commit_add(lane, &put, NULL);
}

void ucmi_asked_serve(struct ucmi_posix *p)
{
    struct ucmi_lane *unpinned = NULL;
    size_t i = 0;

    for (; i < p->nasked; i++) {
        const struct ucmi_record *r = &p->asked[i];
        struct ucmi_lane *lane = lane_asked(p, r->lane);
        if (!lane)
            continue;
        if (lane->own->pending.n >= MOST_ANSWERS) /* the rest when these are written */
            break;
        if (r->op == UCMI_SHRINK)
            ucmi_bound_shrink(p, lane, r->segment);
        else
            answer(p, lane, r);
        if (r->op == UCMI_PIN && !r->tick)
            unpinned = lane;
    }
    p->nasked -= i;
    if (p->nasked && i)
        memmove(p->asked, p->asked + i, p->nasked * sizeof *p->asked);
    if (unpinned)
        ucmi_pins_mark(p, unpinned);
}

/* ---- hearing ---- */

static void *hear(void *arg)
{
    struct ucmi_posix *p = arg;
    struct pollfd v[2] = {{.fd = p->ear, .events = POLLIN}, {.fd = p->ear_stop, .events = POLLIN}};
    _Alignas(struct inotify_event) char events[4096];

    for (;;) {
        if (poll(v, ARRAY_LEN(v), -1) < 0 && errno != EINTR)
            return NULL;
        if (v[1].revents)
            return NULL;
        ssize_t n = v[0].revents ? read(p->ear, events, sizeof events) : 0;
        bool news = false;
        for (ssize_t at = 0; at < n;) {
            const struct inotify_event *e = (const void *)(events + at);
            news |= (e->mask & IN_MODIFY) == 0; /* else somebody wants room, no more */
            at += (ssize_t)(sizeof *e + e->len);
        }
        if (news)
            ucmi_news_ask(p);
        if (n > 0)
            ucmi_pump_wake(p);
    }
}

static int open_ear(struct ucmi_posix *p)
{
    p->ear = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    p->ear_stop = eventfd(0, EFD_CLOEXEC);
    int err = p->ear < 0 || p->ear_stop < 0 ? -errno
                                            : ucmi_thread_start(&p->ear_thread, "ucm-ear", hear, p);
    if (!err)
        return 0;
    if (p->ear >= 0)
        close(p->ear);
    if (p->ear_stop >= 0)
        close(p->ear_stop);
    p->ear = -1;
    return err;
}

void ucmi_ear_open(struct ucmi_posix *p)
{
    char path[64];
    if (!p->nown || p->ear_ns == p->ns_fd)
        return;
    if (p->ear < 0 && p->ear_ns < 0) {
        int err = open_ear(p);
        if (err)
            ucmi_log(UCM_INFO, p->object,
                     "does not hear of `ucm rm`, `pin` and the like while it is idle: %s",
                     ucmi_file_error(err));
    }
    p->ear_ns = p->ns_fd;
    snprintf(path, sizeof path, "/proc/self/fd/%d", (int)p->ns_fd);
    if (p->ear >= 0)
        inotify_add_watch(p->ear, path, IN_ATTRIB);
    snprintf(path, sizeof path, "/proc/self/fd/%d/lock", p->root_fd);
    if (p->ear >= 0 && p->capacity)
        inotify_add_watch(p->ear, path, IN_MODIFY | IN_DONT_FOLLOW);
}

void ucmi_ear_close(struct ucmi_posix *p)
{
    if (p->ear < 0)
        return;
    eventfd_write(p->ear_stop, 1);
    pthread_join(p->ear_thread, NULL);
    close(p->ear);
    close(p->ear_stop);
    p->ear = -1;
}

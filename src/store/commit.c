/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Records on their way into the journal of a lane we own.
 *
 * What is added while a commit flies goes with the next one, so the busier the lane the more
 * records share a write.  A commit is: sync the segments (posix_sync data, full), write the
 * records, sync the journal (full), and only then tell who waits.  One flies at a time, so records
 * are in order.
 *
 * The last thing before records are written is to ask whether the lane is still ours.  A journal
 * write that fails leaves us not knowing what is in the file.  So the lane is let go: who takes it
 * next, most likely we, reads what is there.
 *
 * Compaction: `journal.new` begins with a summary of all live slots, MOVED ends the old file, the
 * rename makes the new one the journal.  A reader who has read up to MOVED knows all that the
 * summary says and goes on behind it.
 */
#include "store/posix.h"

#include <inttypes.h>
#include <stdlib.h>

enum {
    MAX_TOUCHES = UCMI_COMPACT_SLACK / 4, /* in a commit */
    SEEN_STEP = 4096                      /* entries of the index */
};

/* ---- adding ---- */

static int batch_room(struct ucmi_batch *b)
{
    if (b->n < b->cap)
        return 0;
    size_t cap = b->cap ? 2 * b->cap : 64;
    struct ucmi_record *r = realloc(b->r, cap * sizeof *r);
    if (r)
        b->r = r;
    struct ucmi_block **block = realloc(b->block, cap * sizeof *block);
    if (block)
        b->block = block;
    if (!r || !block)
        return -ENOMEM;
    b->cap = cap;
    return 0;
}

int ucmi_commit_add(struct ucmi_lane *lane, const struct ucmi_record *r, struct ucmi_block *block)
{
    struct ucmi_batch *b = &lane->own->pending;
    int err = batch_room(b);
    if (err < 0)
        return err;
    b->r[b->n] = *r;
    b->block[b->n++] = block;
    return 0;
}

void ucmi_commit_unsay(struct ucmi_lane *lane, uint32_t segment)
{
    struct ucmi_batch *b = &lane->own->pending;
    size_t kept = 0;
    for (size_t i = 0; i < b->n; i++) {
        if (b->r[i].op == UCMI_PUT && !b->block[i] && b->r[i].segment == segment)
            continue;
        b->r[kept] = b->r[i];
        b->block[kept++] = b->block[i];
    }
    b->n = kept;
}

/* Once a tick; and it is only advice: it never makes a journal longer than its room. */
static bool touch(struct ucmi_posix *p, const ucm_key *key, uint16_t rank, uint32_t tick)
{
    uint64_t word = ucmi_key_word(key, rank) ^ tick;
    uint64_t *told = &p->touched[ucmi_key_word(key, rank) % UCMI_TOUCHED];
    if (*told == word)
        return true;
    p->wants_lane = !p->nown && !p->read_only;
    if (!p->nown || p->own[0]->own->lost || p->own[0]->own->pending.n >= MAX_TOUCHES)
        return false;
    *told = word;
    struct ucmi_record r = {.op = UCMI_TOUCH, .rank = rank, .key = *key, .tick = tick};
    return ucmi_commit_add(p->own[0], &r, NULL) == 0;
}

void ucmi_commit_touch(struct ucmi_posix *p, const ucm_key *key)
{
    touch(p, key, (uint16_t)p->geo->rank, ucmi_tick((uint64_t)time(NULL)));
}

void ucmi_commit_touch_seen(struct ucmi_posix *p)
{
    struct ucmi_telling *t = &p->telling;
    uint32_t now = ucmi_tick((uint64_t)time(NULL));
    size_t size = (size_t)1 << p->index.bits;
    if (!p->nown) /* to look up takes no lane */
        return;
    if (!t->left && t->to != now) {
        t->from = (t->to ? t->to : now) - 1; /* what is loaded is dated back a little */
        t->to = now;
        t->left = size;
        t->most = UCMI_TOUCHED;
    }
    for (size_t n = MIN(t->left, (size_t)SEEN_STEP); n; n--, t->left--, t->at++) {
        const struct ucmi_entry *e = &p->index.v[t->at % size];
        uint32_t tick = ucmi_tick(atomic_load_explicit(&e->seen, memory_order_relaxed));
        if (!e->lane || p->lanes[e->lane]->own || tick < t->from || tick >= t->to)
            continue;
        if (!touch(p, &e->key, e->rank, tick))
            return; /* no room: from here on the next time */
        if (--t->most == 0) {
            t->left = 0; /* from here on in the next tick */
            return;
        }
    }
}

void ucmi_batch_fail(struct ucmi_posix *p, struct ucmi_batch *b, int err)
{
    for (size_t i = 0; i < b->n; i++)
        if (b->block[i])
            ucmi_block_stored(p, b->block[i], err);
    b->n = 0;
}

static uint8_t put_flags(const struct ucmi_slot *slot)
{
    return (uint8_t)((slot->pinned ? UCMI_PINNED : 0) | (slot->again ? UCMI_AGAIN : 0));
}

struct ucmi_record ucmi_commit_record(const struct ucmi_slot *slot, enum ucmi_op op,
                                      const struct ucmi_lane *lane, uint32_t place)
{
    return (struct ucmi_record){
        .op = op,
        .flags = op == UCMI_PUT ? put_flags(slot) : 0,
        .rank = slot->rank,
        .key = slot->key,
        .segment = place / lane->slots,
        .slot = place % lane->slots,
        .depth = slot->depth,
        .tick = slot->tick,
        .header_sum = slot->header_sum,
    };
}

/* ---- the end of a commit ---- */

static uint32_t place_of(const struct ucmi_lane *lane, const struct ucmi_record *r)
{
    return r->segment * lane->slots + r->slot;
}

/* Callers see all blocks of a commit at once. */
static void publish(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    struct ucmi_own *own = lane->own;
    pthread_rwlock_wrlock(&p->lock);
    for (size_t i = 0; i < own->flying.n; i++) {
        const struct ucmi_record *r = &own->flying.r[i];
        if (r->op != UCMI_PUT || !own->flying.block[i]) /* else said again: nothing new */
            continue;
        struct ucmi_entry entry = {.key = r->key,
                                   .place = place_of(lane, r),
                                   .header_sum = r->header_sum,
                                   .lane = lane->id,
                                   .rank = r->rank};
        /* Without memory for the entry the block is there for others, and for us after a restart.
         */
        ucmi_index_put(&p->index, &entry);
        ucmi_own_slot(lane, entry.place)->state = UCMI_DISK_LIVE;
        own->open--;
        own->live++;
    }
    pthread_rwlock_unlock(&p->lock);
    ucmi_posix_gauge(p, UCMI_DISK_BLOCKS, (int64_t)p->index.count);
}

static void over(struct ucmi_posix *p, struct ucmi_lane *lane, int err)
{
    struct ucmi_own *own = lane->own;
    struct ucmi_batch *b = &own->flying;

    own->stage = UCMI_COMMIT_IDLE;
    if (err || own->lost) {
        ucmi_own_lose(p, lane,
                      err == -EOWNERDEAD ? "another process has taken it"
                                         : "its journal could not be written",
                      err);
        ucmi_batch_fail(p, b, err && err != -EOWNERDEAD ? err : -EIO);
        return;
    }
    own->records += b->n;
    publish(p, lane);
    for (size_t i = 0; i < b->n; i++)
        if (b->r[i].op == UCMI_DEL)
            ucmi_own_free_slot(p, lane, place_of(lane, &b->r[i]));
        else if (b->block[i])
            ucmi_block_stored(p, b->block[i], 0);
    b->n = 0;
    ucmi_commit_tidy(p, lane, false);
}

/* ---- its stages ---- */

static void send(struct ucmi_posix *p, struct ucmi_own *own, struct ucm_io io,
                 void (*done)(struct ucmi_posix *p, struct ucmi_sent *s))
{
    own->sent.io = io;
    own->sent.done = done;
    ucmi_pump_send(p, &own->sent);
}

static void journal_synced(struct ucmi_posix *p, struct ucmi_sent *s)
{
    struct ucmi_own *own = CONTAINER_OF(s, struct ucmi_own, sent);
    over(p, own->lane, s->io.res < 0 ? (int)s->io.res : 0);
}

static void records_written(struct ucmi_posix *p, struct ucmi_sent *s)
{
    struct ucmi_own *own = CONTAINER_OF(s, struct ucmi_own, sent);
    if (s->io.res < 0 || (size_t)s->io.res < own->iov.iov_len) {
        over(p, own->lane, s->io.res < 0 ? (int)s->io.res : -EIO);
        return;
    }
    ucmi_jtail_advance(&own->tail, own->flying.n, own->buf);
    if (p->o->sync != UCMI_SYNC_FULL) {
        over(p, own->lane, 0);
        return;
    }
    own->stage = UCMI_COMMIT_SYNC;
    send(p, own, (struct ucm_io){.op = UCM_IO_SYNC, .fd = own->lane->journal}, journal_synced);
}

/* Lays n records into own->buf, own->iov; returns where they go, or -ENOMEM. */
static off_t lay(const struct ucmi_seal *seal, struct ucmi_own *own, struct ucmi_record *v,
                 size_t n)
{
    off_t off;
    size_t span = ucmi_jtail_span(&own->tail, n, &off);
    if (span > own->buf_len) {
        void *buf = aligned_alloc(UCMI_PAGE, span);
        if (!buf)
            return -ENOMEM;
        free(own->buf);
        own->buf = buf;
        own->buf_len = span;
    }
    ucmi_jtail_lay(seal, &own->tail, v, n, own->buf);
    own->iov = (struct iovec){own->buf, span};
    return off;
}

static void write_records(struct ucmi_posix *p, struct ucmi_own *own)
{
    int err = ucmi_own_check(p, own->lane);
    off_t off = err < 0 ? err : lay(&p->seal, own, own->flying.r, own->flying.n);
    own->stage = UCMI_COMMIT_RECORDS;
    if (off < 0)
        over(p, own->lane, (int)off);
    else
        send(p, own,
             (struct ucm_io){.op = UCM_IO_WRITEV,
                             .fd = own->lane->journal,
                             .off = off,
                             .iov = &own->iov,
                             .niov = 1,
                             .brief = !p->network},
             records_written);
}

/* The lowest segment from `from` on that a block of this commit lies in. */
static bool next_segment(const struct ucmi_own *own, uint32_t from, uint32_t *segment)
{
    bool any = false;
    for (size_t i = 0; i < own->flying.n; i++) {
        const struct ucmi_record *r = &own->flying.r[i];
        if (r->op == UCMI_PUT && r->segment >= from && (!any || r->segment < *segment)) {
            *segment = r->segment;
            any = true;
        }
    }
    return any;
}

static void data_synced(struct ucmi_posix *p, struct ucmi_sent *s);

static void sync_data(struct ucmi_posix *p, struct ucmi_own *own, uint32_t from)
{
    uint32_t segment = 0;
    if (p->o->sync == UCMI_SYNC_NONE || !next_segment(own, from, &segment)) {
        write_records(p, own);
        return;
    }
    own->stage = UCMI_COMMIT_DATA;
    own->syncing = segment;
    int fd = ucmi_seg_fd(p, own->lane, segment, false);
    if (fd < 0) {
        over(p, own->lane, fd);
        return;
    }
    own->lane->segs[segment].ios++;
    send(p, own, (struct ucm_io){.op = UCM_IO_SYNC, .fd = fd}, data_synced);
}

static void data_synced(struct ucmi_posix *p, struct ucmi_sent *s)
{
    struct ucmi_own *own = CONTAINER_OF(s, struct ucmi_own, sent);
    own->lane->segs[own->syncing].ios--;
    if (s->io.res < 0)
        over(p, own->lane, (int)s->io.res);
    else
        sync_data(p, own, own->syncing + 1);
}

void ucmi_commit_kick(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    struct ucmi_own *own = lane->own;
    if (own->lost || own->stage != UCMI_COMMIT_IDLE || !own->pending.n)
        return;
    struct ucmi_batch b = own->flying;
    own->flying = own->pending;
    own->pending = b;
    sync_data(p, own, 0);
}

int ucmi_commit_now(struct ucmi_posix *p, struct ucmi_lane *lane, struct ucmi_record *v, size_t n)
{
    struct ucmi_own *own = lane->own;
    off_t off = lay(&p->seal, own, v, n);
    int err =
        off < 0 ? (int)off : ucmi_pump_write(p, lane->journal, own->buf, own->iov.iov_len, off);
    if (!err && p->o->sync == UCMI_SYNC_FULL)
        err = ucmi_pump_sync(p, lane->journal);
    if (err < 0)
        return err;
    ucmi_jtail_advance(&own->tail, n, own->buf);
    own->records += n;
    return 0;
}

/* ---- compaction ---- */

struct summary {
    int fd;
    struct ucmi_jtail *tail;
    struct ucmi_record *v;
    size_t n;
    void *pages;
};
enum { SUMMARY_STEP = UCMI_READ_BUF / 2 / sizeof(struct ucmi_record) - 64 };

static int summary_write(struct ucmi_posix *p, struct summary *s)
{
    off_t off;
    size_t span = ucmi_jtail_span(s->tail, s->n, &off);
    ucmi_jtail_lay(&p->seal, s->tail, s->v, s->n, s->pages);
    int err = ucmi_pump_write(p, s->fd, s->pages, span, off);
    ucmi_jtail_advance(s->tail, s->n, s->pages);
    s->n = 0;
    return err;
}

static int summary_records(struct ucmi_posix *p, const struct ucmi_lane *lane, struct summary *s)
{
    int err = 0;
    s->v[s->n++] = (struct ucmi_record){.op = UCMI_EPOCH, .epoch = lane->own->tail.pos.epoch};
    for (uint32_t g = 0; g < lane->nsegs; g++)
        for (uint32_t i = 0; lane->segs[g].slots && i < lane->slots; i++) {
            const struct ucmi_slot *slot = &lane->segs[g].slots[i];
            if (slot->state != UCMI_DISK_LIVE)
                continue;
            s->v[s->n++] = ucmi_commit_record(slot, UCMI_PUT, lane, g * lane->slots + i);
            if (s->n == SUMMARY_STEP && (err = summary_write(p, s)) < 0)
                return err;
        }
    return s->n ? summary_write(p, s) : 0;
}

/* Writes a journal of the next generation that says what this one says. */
static int write_summary(struct ucmi_posix *p, const struct ucmi_lane *lane, int fd,
                         struct ucmi_jtail *tail)
{
    const struct ucmi_own *own = lane->own;
    struct summary s = {
        .fd = fd, .tail = tail, .v = p->read_buf, .pages = (char *)p->read_buf + UCMI_READ_BUF / 2};
    uint64_t base = own->tail.pos.seq; /* of MOVED, which is still to be written */

    tail->pos = (struct ucmi_jpos){.off = UCMI_PAGE, .seq = base + 1};
    int err = summary_records(p, lane, &s);
    if (err < 0)
        return err;
    struct ucmi_journal_header *h = p->read_buf;
    ucmi_head_fill(p, h);
    h->rank = lane->rank;
    h->slots = lane->slots;
    h->epoch = own->tail.pos.epoch;
    h->owner = own->owner;
    h->generation = lane->generation + 1;
    h->base = base;
    h->summary = tail->pos.seq - base - 1;
    ucmi_journal_header_seal(h);
    err = ucmi_pump_write(p, fd, h, sizeof *h, 0);
    if (!err && p->o->sync != UCMI_SYNC_NONE)
        err = ucmi_pump_sync(p, fd);
    return err;
}

/* The new file is complete before MOVED sends anybody there, and MOVED is written before the name
 * changes, so who follows the old file always finds out.  Where it is not known whether MOVED, or
 * the new name, got there, the lane is let go. */
static int move_journal(struct ucmi_posix *p, struct ucmi_lane *lane, int fd,
                        struct ucmi_jtail *tail)
{
    struct ucmi_own *own = lane->own;
    int err = write_summary(p, lane, fd, tail);
    if (!err)
        err = ucmi_own_check(p, lane);
    if (err < 0)
        return err;
    struct ucmi_record moved = {.op = UCMI_MOVED};
    err = ucmi_commit_now(p, lane, &moved, 1);
    if (!err)
        err = ucmi_file_rename(p, lane->dir, "journal.new", "journal");
    if (!err)
        err = ucmi_dir_sync(p, lane->dir);
    if (err < 0) {
        ucmi_own_lose(p, lane, "its journal could not be moved", err);
        return err;
    }
    ucmi_own_tell(p);
    ucmi_file_close(p, lane->journal);
    lane->journal = fd;
    lane->generation++;
    own->records = (tail->pos.off - UCMI_PAGE) / sizeof moved;
    uint8_t *page = own->tail.page;
    own->tail = *tail;
    tail->page = page;
    return 0;
}

static void compact(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    static struct ucmi_log_gate gate;
    struct ucmi_own *own = lane->own;
    struct ucmi_jtail tail = {.page = aligned_alloc(UCMI_PAGE, UCMI_PAGE)};
    uint64_t before = own->records;
    int fd = -ENOMEM, err;

    if (tail.page)
        fd = ucmi_journal_create(p, lane, "journal.new", ucmi_journal_room(own->total));
    err = fd < 0 ? fd : move_journal(p, lane, fd, &tail);
    free(tail.page);
    if (!err) {
        own->compact_slack = UCMI_COMPACT_SLACK;
        ucmi_count(p->t->counters, UCMI_DISK_COMPACTED, 1);
        ucmi_log(UCM_DEBUG, p->object, "journal of %s: %" PRIu64 " records became %" PRIu64,
                 lane->name, before, own->records);
        return;
    }
    if (fd >= 0)
        ucmi_file_close(p, fd);
    ucmi_log_gated(&gate, 60, UCM_WARN, p->object, "journal of %s: cannot be compacted: %s",
                   lane->name, ucmi_file_error(err));
    /* It may grow a little longer before the next attempt, but not beyond its room. */
    own->compact_slack += UCMI_COMPACT_SLACK / 4;
    if (own->compact_slack >= 2 * UCMI_COMPACT_SLACK)
        ucmi_own_lose(p, lane, "its journal is full", err);
}

void ucmi_commit_tidy(struct ucmi_posix *p, struct ucmi_lane *lane, bool anyway)
{
    const struct ucmi_own *own = lane->own;
    if (anyway || own->records > UCMI_COMPACT_TIMES * (uint64_t)own->live + own->compact_slack)
        compact(p, lane);
}

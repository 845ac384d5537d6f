/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loads: from the index to a slot to the engine's memory, and every byte checked on the way.
 *
 * What must hold: a slice ends with 0 only when the header read is the one that was published (sum
 * and identity) and every shard read has the checksum that the header tells.  Anything else is a
 * miss.
 *
 * A slot of another's lane may have been given to another block since its record was read: then the
 * header names that other block, the entry is dropped as stale, and the block is looked for
 * elsewhere.  Our own slots cannot change under a load (ucmi_seg_hold), so there it is damage.  A
 * lane that becomes ours, or ceases to be, under a load is read like another's to its end.
 */
#include "store/posix.h"

/* Says nothing about the block: it may well be read the next time. */
static bool passing(const struct ucmi_posix *p, int err)
{
    if (err == -EIO)
        return p->network; /* a server may be away for a while, a disk does not come back */
    return err == -ENOMEM || err == -EMFILE || err == -ENFILE || err == -EAGAIN || err == -EINTR ||
           err == -ETIMEDOUT || err == -ECANCELED;
}

/* ---- after the read ---- */

static void touch(struct ucmi_posix *p, const struct ucmi_move *m)
{
    if (m->own_slot)
        ucmi_room_used(p, ucmi_own_slot(m->lane, m->place), ucmi_tick((uint64_t)time(NULL)));
    else
        ucmi_commit_touch(p, &m->part->s->key);
}

/* Is this the header of the block, as published?  0; -ENOENT: another's; -EBADMSG. */
static int check_header(const struct ucmi_posix *p, const struct ucmi_move *m)
{
    const struct ucmi_slot_header *h = m->page;
    const struct ucm_geometry *geo = p->geo;
    int err = ucmi_slot_header_check(&p->seal, h);
    if (err)
        return -EBADMSG;
    bool ours = memcmp(h->ns, geo->ns, sizeof h->ns) == 0 && h->rank == geo->rank &&
                ucmi_key_eq(&h->key, &m->part->s->key) && (uint32_t)h->sum == m->header_sum;
    if (!ours)
        return m->own_slot ? -EBADMSG : -ENOENT;
    return h->nshards == geo->nshards && h->shard_size == geo->shard_size ? 0 : -EBADMSG;
}

static int check_shards(struct ucmi_posix *p, const struct ucmi_move *m)
{
    uint64_t sums[UCMI_MAX_SHARDS];
    int err = ucmi_shard_sums(p, m->page, m, m->nshards, sums);
    if (err < 0)
        return err;
    size_t len = m->nshards * sizeof *sums;
    return memcmp(sums, m->page->shard_sum + m->shard, len) ? -EBADMSG : 0;
}

/* The block is not where the index says: nobody shall be sent there again. */
static void drop(struct ucmi_posix *p, struct ucmi_lane *lane, const struct ucmi_entry *e)
{
    if (lane->own)
        ucmi_room_drop(p, lane, e);
    ucmi_posix_unindex(p, e);
}

static struct ucmi_entry entry_of(const struct ucmi_posix *p, const struct ucmi_move *m)
{
    return (struct ucmi_entry){.key = m->part->s->key,
                               .place = m->place,
                               .header_sum = m->header_sum,
                               .lane = m->lane->id,
                               .rank = (uint16_t)p->geo->rank};
}

static void log_bad(struct ucmi_posix *p, const struct ucmi_move *m)
{
    static struct ucmi_log_gate gate;
    char key[33], seg[24];
    ucmi_hex(m->part->s->key.b, 16, key);
    ucmi_seg_name(seg, m->place / m->lane->slots);
    ucmi_log_gated(&gate, 10, UCM_WARN, p->object,
                   "block %s failed its check and was dropped (%s/%s, slot %u)", key, m->lane->name,
                   seg, m->place % m->lane->slots);
}

/* Has the owner given the slot to another block while it was read?  Then its DEL record was in the
 * journal before the first byte was overwritten. */
static bool overtaken(struct ucmi_posix *p, const struct ucmi_move *m)
{
    if (m->own_slot)
        return false;
    if (m->lane->own && m->lane->own->lost)
        return true; /* whoever has it now may have; what we know of it is from before */
    ucmi_lanes_refresh(p);
    const struct ucmi_entry *e =
        ucmi_index_find(&p->index, &m->part->s->key, (uint16_t)p->geo->rank, m->lane->id);
    return !e || e->place != m->place || e->header_sum != m->header_sum;
}

static void finish(struct ucmi_posix *p, struct ucmi_move *m)
{
    struct ucmi_part *part = m->part;
    struct ucmi_lane *lane = m->lane;
    struct ucm_counters *c = p->t->counters;
    const struct ucmi_entry e = entry_of(p, m);
    int err = m->err;

    if (!err)
        err = check_header(p, m);
    if (!err)
        err = check_shards(p, m);
    if (err == -EBADMSG && overtaken(p, m))
        err = -ENOENT;
    ucmi_count(c, UCMI_DISK_READS, 1);
    bool other = err == -ENOENT || err == -ESTALE || err == -EBADMSG;
    bool replaced = other && ucmi_seg_replaced(p, lane, m->place);
    if (!err) {
        ucmi_count(c, UCMI_DISK_READ_BYTES, (int64_t)(m->nshards * p->geo->shard_size));
        touch(p, m);
    } else if (replaced || (other && err != -EBADMSG)) {
        ucmi_count(c, UCMI_DISK_STALE, 1);
        if (!replaced)
            drop(p, lane, &e);
        err = -ENOENT;
    } else if (err == -EBADMSG) {
        ucmi_count(c, UCMI_DISK_BAD, 1);
        log_bad(p, m);
        drop(p, lane, &e);
    } else {
        ucmi_count(c, UCMI_DISK_ERRORS, 1);
        if (!passing(p, err))
            drop(p, lane, &e);
    }
    ucmi_seg_release(p, m); /* the lane may go with it */
    ucmi_move_free(p, m);
    if (err == -ENOENT)
        ucmi_load_start(p, part); /* it may be elsewhere too */
    else
        ucmi_part_done(part, UCM_RELEASED, err);
}

static void heard(struct ucmi_posix *p, struct ucmi_move *m, const struct ucm_io *io, size_t want)
{
    if (io->res < 0)
        m->err = (int)io->res;
    else if ((size_t)io->res < want && !m->err)
        m->err = -EBADMSG; /* the segment has been cut short */
    m->pending--;
}

static void header_read(struct ucmi_posix *p, struct ucmi_sent *s)
{
    struct ucmi_move *m = CONTAINER_OF(s, struct ucmi_move, head);
    heard(p, m, &s->io, UCMI_PAGE);
    if (!m->pending)
        finish(p, m);
}

static void data_read(struct ucmi_posix *p, struct ucmi_sent *s)
{
    struct ucmi_move *m = CONTAINER_OF(s, struct ucmi_move, data);
    heard(p, m, &s->io, m->want);
    if (!ucmi_move_step(p, m, UCM_IO_READV) && !m->pending)
        finish(p, m);
}

/* ---- before the read ---- */

static int may_start(const struct ucmi_posix *p, const struct ucmi_job *job)
{
    if (__atomic_load_n(&job->x->cancel, __ATOMIC_RELAXED) || atomic_load(&p->closing))
        return -ECANCELED;
    return ucmi_now_ns() >= job->deadline_ns ? -ETIMEDOUT : 0;
}

/* Where the block is, its segment open; -ENOENT; -EINPROGRESS: when its segment is.  Who asked for
 * the load may have seen a record that this process has not read yet. */
static int find(struct ucmi_posix *p, const struct ucmi_part *part, struct ucmi_entry *e)
{
    const ucm_key *key = &part->s->key;
    uint16_t rank = (uint16_t)p->geo->rank;

    for (;;) {
        struct ucmi_entry *at = ucmi_index_find(&p->index, key, rank, 0);
        if (!at) {
            if (!ucmi_lanes_renew(p, part->job->start_ns))
                return -ENOENT;
            continue;
        }
        *e = (struct ucmi_entry){.key = *key,
                                 .place = at->place,
                                 .header_sum = at->header_sum,
                                 .lane = at->lane,
                                 .rank = rank};
        struct ucmi_lane *lane = p->lanes[at->lane];
        if (!ucmi_seg_renew(p, lane, at->place))
            return -EINPROGRESS;
        int fd = ucmi_seg_fd(p, lane, at->place / lane->slots, false);
        if (fd >= 0 || passing(p, fd))
            return MIN(fd, 0);
        if (fd != -ENOENT && fd != -ESTALE)
            ucmi_count(p->t->counters, UCMI_DISK_ERRORS, 1);
        drop(p, lane, e); /* the segment is no more, or not for us */
    }
}

void ucmi_load_start(struct ucmi_posix *p, struct ucmi_part *part)
{
    const struct ucm_slice *s = part->s;
    struct ucmi_entry e = {0};
    struct ucmi_move *m = NULL;
    int err = may_start(p, part->job);

    if (!err)
        err = find(p, part, &e);
    if (err == -EINPROGRESS) {
        STAILQ_INSERT_TAIL(&p->again, part, next);
        return;
    }
    if (!err) {
        m = ucmi_move_new(p, part);
        err = ucmi_move_pieces(p, m);
    }
    if (err) {
        if (m)
            ucmi_move_free(p, m);
        ucmi_part_done(part, UCM_RELEASED, err);
        return;
    }
    m->lane = p->lanes[e.lane];
    m->place = e.place;
    m->header_sum = e.header_sum;
    m->shard = s->shard;
    m->nshards = s->nshards;
    m->data.done = data_read;
    m->head.done = header_read;
    m->iov[0] = (struct iovec){m->page, UCMI_PAGE};
    ucmi_seg_hold(m);
    off_t slot = ucmi_slot_off(m->lane, m->place);
    m->off = slot;
    if (s->shard) { /* the header by itself */
        m->at = 1;
        m->off = slot + UCMI_PAGE + (off_t)(s->shard * p->geo->shard_size);
        ucmi_move_header(p, m, UCM_IO_READV, slot);
    }
    if (!ucmi_move_step(p, m, UCM_IO_READV) && !m->pending)
        finish(p, m);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dumps: slices become blocks in slots.
 *
 * A whole block in one slice is one write of header and shards.  Else the shards come in any order
 * from any xfers, and the block stays open, with its slot, until the last has been written; then
 * the header is; then, in either case, the record (commit.c).  Nothing is published because of
 * which shard came last.
 *
 * What must hold: the checksum in the header is of the bytes that lie in the slot, so a shard is
 * written once: of a shard that comes twice the first one stays, for an engine that computes a
 * block again need not compute the same bits.  RELEASED comes when a slice's own write has ended,
 * STORED when the record has been written, or when the block has been given up and no write is
 * under way.
 */
#include "store/posix.h"

#include <stdlib.h>

static struct ucmi_block_list *chain_of(struct ucmi_posix *p, const ucm_key *key)
{
    return &p->chains[ucmi_key_word(key, 0) % UCMI_BLOCK_CHAINS];
}

static struct ucmi_block *block_find(struct ucmi_posix *p, const ucm_key *key)
{
    struct ucmi_block *b;
    LIST_FOREACH(b, chain_of(p, key), chain)
    if (ucmi_key_eq(&b->key, key))
        return b;
    return NULL;
}

static int block_new(struct ucmi_posix *p, const struct ucm_slice *s, struct ucmi_block **b_p)
{
    struct ucmi_block *b = calloc(1, sizeof *b);
    struct ucmi_slot_header *h = aligned_alloc(UCMI_PAGE, sizeof *h);
    int err = b && h ? ucmi_room_get(p, &b->lane, &b->place) : -ENOMEM;
    if (err < 0) {
        free(h);
        free(b);
        return err;
    }
    *h = (struct ucmi_slot_header){
        .nshards = p->geo->nshards,
        .shard_size = p->geo->shard_size,
        .key = s->key,
        .rank = p->geo->rank,
        .depth = s->depth,
    };
    memcpy(h->ns, p->geo->ns, sizeof h->ns);
    b->header = h;
    b->key = s->key;
    b->depth = s->depth;
    b->missing = p->geo->nshards;
    STAILQ_INIT(&b->parts);
    LIST_INSERT_HEAD(chain_of(p, &b->key), b, chain);
    TAILQ_INSERT_TAIL(&p->blocks, b, age);
    *b_p = b;
    return 0;
}

static void block_active(struct ucmi_posix *p, struct ucmi_block *b)
{
    b->active_ns = ucmi_now_ns();
    TAILQ_REMOVE(&p->blocks, b, age);
    TAILQ_INSERT_TAIL(&p->blocks, b, age);
}

void ucmi_block_stored(struct ucmi_posix *p, struct ucmi_block *b, int err)
{
    struct ucmi_part *part;

    LIST_REMOVE(b, chain);
    TAILQ_REMOVE(&p->blocks, b, age);
    ucmi_posix_judge(p, err);
    if (err) {
        enum ucmi_counter why =
            err == -ENOSPC || err == -EDQUOT ? UCMI_DISK_FULL : UCMI_DISK_ERRORS;
        if (err != -ECANCELED && err != -ETIMEDOUT)
            ucmi_count(p->t->counters, why, 1);
        ucmi_own_free_slot(p, b->lane, b->place);
    } else {
        ucmi_count(p->t->counters, UCMI_DISK_WRITES, 1);
        ucmi_count(p->t->counters, UCMI_DISK_WRITE_BYTES, (int64_t)p->geo->block_size);
    }
    while ((part = STAILQ_FIRST(&b->parts))) {
        STAILQ_REMOVE_HEAD(&b->parts, next);
        ucmi_part_done(part, UCM_STORED, err);
    }
    free(b->header);
    free(b);
}

/* ---- which shards are still to be brought ---- */

static bool is_taken(const struct ucmi_block *b, uint32_t shard)
{
    return b->taken[shard / 64] >> (shard % 64) & 1;
}

/* The first run of shards in [*from, end) that nobody has brought; false: none. */
static bool untaken(const struct ucmi_block *b, uint32_t *from, uint32_t end, uint32_t *n)
{
    while (*from < end && is_taken(b, *from))
        ++*from;
    for (*n = 0; *from + *n < end && !is_taken(b, *from + *n);)
        ++*n;
    return *n > 0;
}

static void take(struct ucmi_block *b, uint32_t from, uint32_t n)
{
    for (uint32_t i = from; i < from + n; i++)
        b->taken[i / 64] |= UINT64_C(1) << (i % 64);
    b->missing -= n;
}

/* Cuts pieces to the len bytes behind the first skip. */
static size_t trim(struct iovec *iov, size_t n, size_t skip, size_t len)
{
    size_t kept = 0;
    for (size_t i = 0; i < n && len; i++) {
        size_t off = MIN(skip, iov[i].iov_len), take_len = MIN(iov[i].iov_len - off, len);
        skip -= off;
        len -= take_len;
        if (take_len)
            iov[kept++] = (struct iovec){(char *)iov[i].iov_base + off, take_len};
    }
    return kept;
}

/* ---- writing ---- */

static void written(struct ucmi_posix *p, struct ucmi_sent *s);
static void header_written(struct ucmi_posix *p, struct ucmi_sent *s);

static void block_over(struct ucmi_posix *p, struct ucmi_block *b)
{
    if (b->err || b->lane->own->lost) {
        ucmi_block_stored(p, b, b->err ? b->err : -EIO);
        return;
    }
    struct ucmi_slot *slot = ucmi_own_slot(b->lane, b->place);
    uint32_t now = ucmi_tick((uint64_t)time(NULL));
    *slot = (struct ucmi_slot){
        .key = b->key,
        .tick = now,
        .depth = b->depth,
        .header_sum = (uint32_t)b->header->sum,
        .rank = (uint16_t)p->geo->rank,
        .again = ucmi_policy_enter(&p->policy, ucmi_key_word(&b->key, p->geo->rank), now),
        .state = UCMI_DISK_OPEN,
    };
    struct ucmi_record r = ucmi_commit_record(slot, UCMI_PUT, b->lane, b->place);
    int err = ucmi_commit_add(b->lane, &r, b);
    if (err < 0)
        ucmi_block_stored(p, b, err);
    else
        b->recorded = true;
}

static void write_ended(struct ucmi_posix *p, struct ucmi_move *m)
{
    struct ucmi_block *b = m->block;

    ucmi_seg_release(p, m);
    b->ios--;
    if (m->err && !b->err)
        b->err = m->err;
    block_active(p, b);
}

/* With the move that wrote the last shard, if all are there. */
static void go_on(struct ucmi_posix *p, struct ucmi_move *m)
{
    struct ucmi_block *b = m->block;

    if (!b->ios && !b->missing && !b->err && !b->header_sent) {
        b->header_sent = true;
        b->ios++;
        ucmi_slot_header_seal(&p->seal, b->header);
        memcpy(m->page, b->header, sizeof *m->page);
        m->err = 0;
        m->head.done = header_written;
        ucmi_seg_hold(m);
        ucmi_move_header(p, m, UCM_IO_WRITEV, ucmi_slot_off(m->lane, m->place));
        if (m->pending)
            return;
        write_ended(p, m);
    }
    ucmi_move_free(p, m);
    /* A failed block ends with its last write, a whole one with its record; an open one waits. */
    if (!b->ios && !b->recorded && (b->err || !b->missing))
        block_over(p, b);
}

static int outcome(const struct ucm_io *io, size_t want)
{
    if (io->res == -ESTALE) /* somebody has removed the segment, on another client of the server */
        return -EIO;
    return io->res < 0 ? (int)io->res : (size_t)io->res < want ? -EIO : 0;
}

static void header_written(struct ucmi_posix *p, struct ucmi_sent *s)
{
    struct ucmi_move *m = CONTAINER_OF(s, struct ucmi_move, head);
    m->pending--;
    m->err = outcome(&s->io, UCMI_PAGE);
    write_ended(p, m);
    go_on(p, m);
}

/* Writes the first run of the slice that is still to be brought; false: none is. */
static bool bring(struct ucmi_posix *p, struct ucmi_move *m)
{
    struct ucmi_block *b = m->block;
    const struct ucm_slice *s = m->part->s;
    uint32_t nshards = p->geo->nshards, n;
    size_t size = p->geo->shard_size;

    m->shard = s->shard;
    if (b->err || !untaken(b, &m->shard, s->shard + s->nshards, &n))
        return false;
    bool whole = n == nshards;
    off_t slot = ucmi_slot_off(m->lane, m->place);
    m->err = ucmi_move_pieces(p, m);
    m->at = 1;
    m->off = slot + UCMI_PAGE + (off_t)(m->shard * size);
    if (!m->err)
        m->niov = 1 + trim(m->iov + 1, m->niov - 1, (m->shard - s->shard) * size, n * size);
    if (!m->err)
        m->err = ucmi_shard_sums(p, b->header, m, n, b->header->shard_sum + m->shard);
    take(b, m->shard, n);
    if (whole) {
        b->header_sent = true;
        ucmi_slot_header_seal(&p->seal, b->header);
        m->iov[0] = (struct iovec){b->header, UCMI_PAGE};
        m->at = 0;
        m->off = slot;
    }
    b->ios++;
    ucmi_seg_hold(m);
    block_active(p, b);
    if (!ucmi_move_step(p, m, UCM_IO_WRITEV))
        write_ended(p, m); /* it could not even be sent: m->err says why */
    return true;
}

/* Brings what is left of the slice; when nothing is, the slice is RELEASED. */
static void bring_all(struct ucmi_posix *p, struct ucmi_move *m)
{
    struct ucmi_part *part = m->part;

    while (bring(p, m))
        if (m->pending)
            return;
    STAILQ_INSERT_TAIL(&m->block->parts, part, next);
    ucmi_part_done(part, UCM_RELEASED, m->block->err);
    go_on(p, m);
}

static void written(struct ucmi_posix *p, struct ucmi_sent *s)
{
    struct ucmi_move *m = CONTAINER_OF(s, struct ucmi_move, data);
    m->pending--;
    m->err = outcome(&s->io, m->want);
    if (ucmi_move_step(p, m, UCM_IO_WRITEV))
        return;
    write_ended(p, m);
    bring_all(p, m);
}

/* ---- starting ---- */

static int may_start(const struct ucmi_posix *p, const struct ucmi_job *job)
{
    if (__atomic_load_n(&job->x->cancel, __ATOMIC_RELAXED))
        return -ECANCELED;
    if (ucmi_now_ns() >= job->deadline_ns)
        return -ETIMEDOUT;
    return p->read_only ? -EROFS : 0;
}

/* Dumped again it has been of use, and is leased: it must not make room for the next of the dump.
 */
static bool already_there(struct ucmi_posix *p, const struct ucmi_part *part)
{
    const ucm_key *key = &part->s->key;
    uint16_t rank = (uint16_t)p->geo->rank;
    struct ucmi_entry *e = ucmi_index_find(&p->index, key, rank, 0);
    /* Another may have evicted it, and who dumps never looks anything up. */
    if (e && !p->lanes[e->lane]->own && ucmi_lanes_renew(p, part->job->start_ns))
        e = ucmi_index_find(&p->index, key, rank, 0);
    if (!e)
        return false;
    atomic_store_explicit(&e->seen, (uint32_t)time(NULL), memory_order_relaxed);
    if (!p->lanes[e->lane]->own)
        ucmi_commit_touch(p, key);
    return true;
}

int ucmi_dump_start(struct ucmi_posix *p, struct ucmi_part *part)
{
    const struct ucm_slice *s = part->s;
    struct ucmi_block *b = NULL;
    int err = may_start(p, part->job);

    if (!err && !(b = block_find(p, &s->key))) {
        if (already_there(p, part)) {
            ucmi_count(p->t->counters, UCMI_DISK_PRESENT, 1);
            ucmi_part_end(part, 0);
            return 0;
        }
        err = block_new(p, s, &b);
        if (err == -EAGAIN)
            return err;
        if (err == -ENOSPC)
            ucmi_count(p->t->counters, UCMI_DISK_FULL, 1);
        if (err)
            ucmi_posix_judge(p, err);
    }
    if (err) {
        ucmi_part_end(part, err);
        return 0;
    }
    struct ucmi_move *m = ucmi_move_new(p, part);
    m->data.done = written;
    m->block = b;
    m->lane = b->lane;
    m->place = b->place;
    bring_all(p, m);
    return 0;
}

/* ---- giving up ---- */

uint64_t ucmi_blocks_deadline(const struct ucmi_posix *p)
{
    const struct ucmi_block *b = TAILQ_FIRST(&p->blocks);
    return b ? b->active_ns + p->geo->timeout_ms * UINT64_C(1000000) : UINT64_MAX;
}

void ucmi_blocks_abandon(struct ucmi_posix *p, bool all)
{
    struct ucmi_block *b;
    while ((b = TAILQ_FIRST(&p->blocks)) && (all || ucmi_blocks_deadline(p) <= ucmi_now_ns())) {
        if (!b->ios && !b->recorded)
            ucmi_block_stored(p, b, all ? -ECANCELED : -ETIMEDOUT);
        else if (all)
            return;
        else
            block_active(p, b); /* slow, but under way */
    }
}

void ucmi_blocks_fail(struct ucmi_posix *p, const struct ucmi_lane *lane, int err)
{
    struct ucmi_block *b = TAILQ_FIRST(&p->blocks), *next;
    for (; b; b = next) {
        next = TAILQ_NEXT(b, age);
        if (b->lane != lane)
            continue;
        if (!b->err)
            b->err = err;
        if (!b->ios && !b->recorded)
            ucmi_block_stored(p, b, err);
    }
}

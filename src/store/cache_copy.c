/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache_copy.c - flights: the copies between the engine's memory and the pool that a mover queues
 * together on its stream, and their landing.
 *
 * Copies are queued by the mover's own thread, without cache.lock.  A flight ends when the device
 * says so, from any thread, and lands in the mover as an event.  Whatever fails, each part of it
 * lands exactly once, and not before the device has let go of its memory.
 */
#include "store/cache.h"

#include <stdlib.h>

static void land(struct mover *m, struct link *parts, int err, struct link *fin)
{
    for (struct link *l; (l = list_take(parts));) {
        struct part *p = LIST_ITEM(l, struct part, link);
        if (m->out)
            ucmi_dump_copied(m->c, p, err, fin);
        else
            ucmi_load_copied(m->c, p, err, fin);
    }
}

static void flight_landed(struct mover *m, struct event *e, struct link *fin)
{
    struct flight *f = CONTAINER_OF(e, struct flight, e);
    land(m, &f->parts, f->err, fin);
    m->nflights--;
    free(f);
}

static void flight_then(void *arg, int err)
{
    struct flight *f = arg;
    if (!f->err)
        f->err = err;
    ucmi_mover_post(f->m, &f->e);
}

static int flush_copies(struct mover *m)
{
    const struct ucm_geometry *geo = m->c->geo;
    size_t n = m->ncopies;
    m->ncopies = 0;
    return n ? geo->dev->copy(geo->dev_state, m->stream, m->out, m->copies, n) : 0;
}

/* The pieces of a slice, in mover.pieces. */
static ssize_t get_pieces(struct mover *m, const struct ucm_xfer *x, const struct ucm_slice *s)
{
    size_t n = ucm_slice_pieces(x, s, m->pieces, m->npieces);
    if (n <= m->npieces)
        return (ssize_t)n;
    struct iovec *more = realloc(m->pieces, n * sizeof *more);
    if (!more)
        return -ENOMEM;
    m->pieces = more;
    m->npieces = n;
    return (ssize_t)ucm_slice_pieces(x, s, m->pieces, m->npieces);
}

/* Queues the copies of a part's run of shards. */
static int add_copies(struct mover *m, struct part *p)
{
    const struct ucm_geometry *geo = m->c->geo;
    struct job *j = p->job;
    const struct ucm_slice *s = part_slice(p);
    int err = 0;
    if (j->x->after && !j->waited_for) {
        err = flush_copies(m); /* those before do not wait for this event */
        if (!err)
            err = geo->dev->after(geo->dev_state, m->stream, j->x->after);
        j->waited_for = !err;
    }
    ssize_t n = err ? err : get_pieces(m, j->x, s);
    size_t skip = (p->from - s->shard) * geo->shard_size,
           left = (p->to - p->from) * geo->shard_size;
    uint32_t slot = p->block ? p->block->slot : p->slot;
    char *host = ucmi_pool_memory(m->c->pool, slot) + p->from * geo->shard_size;
    ucmi_pool_touch(m->c->pool, slot);
    for (ssize_t i = 0; i < n && left && !err; i++) {
        size_t len = m->pieces[i].iov_len;
        if (len <= skip) {
            skip -= len;
            continue;
        }
        len = MIN(len - skip, left);
        m->copies[m->ncopies++] =
            (struct ucm_copy){(char *)m->pieces[i].iov_base + skip, host, len};
        if (m->ncopies == COPY_MAX)
            err = flush_copies(m);
        skip = 0;
        host += len;
        left -= len;
    }
    return n < 0 ? (int)n : err;
}

void ucmi_copy_end(struct mover *m)
{
    if (m->stream)
        m->c->geo->dev->stream_free(m->c->geo->dev_state, m->stream);
    m->stream = NULL;
}

static int need_stream(struct mover *m)
{
    const struct ucm_geometry *geo = m->c->geo;
    return m->stream ? 0 : geo->dev->stream_new(geo->dev_state, &m->stream);
}

static void copies_failed(struct mover *m, struct pass *pass)
{
    pthread_mutex_lock(&m->c->lock);
    land(m, &pass->copies, -ENOMEM, &pass->fin);
    pthread_mutex_unlock(&m->c->lock);
}

void ucmi_copy_launch(struct mover *m, struct pass *pass)
{
    const struct ucm_geometry *geo = m->c->geo;
    struct flight *f = malloc(sizeof *f);
    if (!f) {
        copies_failed(m, pass);
        return;
    }
    f->e.handle = flight_landed;
    f->m = m;
    f->err = need_stream(m);
    list_init(&f->parts);
    list_splice(&f->parts, &pass->copies);
    m->nflights++;
    for (struct link *l = f->parts.next; l != &f->parts && !f->err; l = l->next)
        f->err = add_copies(m, LIST_ITEM(l, struct part, link));
    int err = flush_copies(m);
    if (!f->err)
        f->err = err;
    err = m->stream ? geo->dev->then(geo->dev_state, m->stream, flight_then, f) : f->err;
    if (err < 0) { /* the device could not say when the copies have ended, but waits for them */
        ucmi_copy_end(m);
        flight_then(f, err);
    }
}

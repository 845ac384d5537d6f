/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two tiers without storage.  Empty takes every dump and has nothing: "Cache|Empty" keeps blocks in
 * DRAM only.  Fake remembers which keys were dumped, to learn what a workload would hit; it has no
 * data, so a load from it is a miss.
 *
 * Neither has threads: slices are done before submit returns.
 */
#include "store/store.h"

#include <stdlib.h>

static void finish_all(struct ucm_xfer *x)
{
    uint32_t n = x->n; /* x may be gone after the last done */
    bool dump = x->dump;

    for (uint32_t i = 0; i < n; i++) {
        struct ucm_slice *s = &x->v[i];
        if (dump) {
            x->done(x, s, UCM_RELEASED, 0);
            x->done(x, s, UCM_STORED, 0);
        } else {
            x->done(x, s, UCM_RELEASED, -ENOENT);
        }
    }
}

/* ---- Empty ---- */

static int empty_open(struct ucm_tier *t)
{
    return 0;
}

static void empty_close(struct ucm_tier *t)
{
}

static void empty_lookup(struct ucm_tier *t, const ucm_key *keys, size_t n, uint32_t rank,
                         uint8_t level, uint8_t *found, struct ucm_lookup *call)
{
}

static int empty_submit(struct ucm_tier *t, struct ucm_xfer *x)
{
    finish_all(x);
    return 0;
}

const struct ucm_tier_ops ucmi_tier_empty = {
    .p = {.kind = "tier", .name = "Empty", .help = "takes every dump and keeps nothing", .size = 1},
    .open = empty_open,
    .close = empty_close,
    .lookup = empty_lookup,
    .submit = empty_submit,
};

/* ---- Fake: the last buffer_number keys, as a ring with a hash index over it ---- */

struct fake {
    int64_t capacity; /* option */
    pthread_mutex_t lock;
    struct {
        ucm_key key;
        uint32_t rank;
        uint32_t next; /* in its bucket: 1 + place in the ring; 0 ends */
    } * ring;
    uint32_t *buckets; /* 1 + place in the ring */
    uint32_t mask, head, used;
};

static const struct ucm_option fake_options[] = {
    {"buffer_number", UCM_T_INT, offsetof(struct fake, capacity), "1048576", "1", "268435456",
     "how many keys Fake remembers; the oldest go first"},
    {NULL},
};

static int fake_open(struct ucm_tier *t)
{
    struct fake *f = t->priv;

    for (f->mask = 1; f->mask < f->capacity; f->mask = f->mask * 2 + 1)
        ;
    f->ring = calloc((size_t)f->capacity, sizeof *f->ring);
    f->buckets = calloc((size_t)f->mask + 1, sizeof *f->buckets);
    if (!f->ring || !f->buckets) {
        free(f->ring);
        free(f->buckets);
        return ucmi_fail(t->why, sizeof t->why, -ENOMEM,
                         "buffer_number: %lld keys do not fit into memory", (long long)f->capacity);
    }
    pthread_mutex_init(&f->lock, NULL);
    return 0;
}

static void fake_close(struct ucm_tier *t)
{
    struct fake *f = t->priv;
    pthread_mutex_destroy(&f->lock);
    free(f->ring);
    free(f->buckets);
}

/* Where the link to a key is: a bucket or a ring entry's next; it holds 0 if the key is not there.
 */
static uint32_t *fake_find(struct fake *f, const ucm_key *key, uint32_t rank)
{
    uint32_t *link = &f->buckets[ucmi_key_word(key, rank) & f->mask];
    while (*link && !(f->ring[*link - 1].rank == rank && ucmi_key_eq(&f->ring[*link - 1].key, key)))
        link = &f->ring[*link - 1].next;
    return link;
}

static void fake_remember(struct fake *f, const ucm_key *key, uint32_t rank)
{
    if (*fake_find(f, key, rank))
        return;
    uint32_t place = f->head;
    if (f->used == f->capacity) { /* the oldest makes room */
        uint32_t *link = fake_find(f, &f->ring[place].key, f->ring[place].rank);
        *link = f->ring[place].next;
    } else {
        f->used++;
    }
    f->ring[place].key = *key;
    f->ring[place].rank = rank;
    f->ring[place].next = 0;
    *fake_find(f, key, rank) = place + 1;
    f->head = (uint32_t)((place + 1) % f->capacity);
}

static void fake_lookup(struct ucm_tier *t, const ucm_key *keys, size_t n, uint32_t rank,
                        uint8_t level, uint8_t *found, struct ucm_lookup *call)
{
    struct fake *f = t->priv;
    pthread_mutex_lock(&f->lock);
    for (size_t i = 0; i < n; i++)
        if (!found[i] && *fake_find(f, &keys[i], rank))
            found[i] = level;
    pthread_mutex_unlock(&f->lock);
}

static int fake_submit(struct ucm_tier *t, struct ucm_xfer *x)
{
    struct fake *f = t->priv;
    pthread_mutex_lock(&f->lock);
    for (uint32_t i = 0; x->dump && i < x->n; i++)
        fake_remember(f, &x->v[i].key, t->geo->rank);
    pthread_mutex_unlock(&f->lock);
    finish_all(x);
    return 0;
}

const struct ucm_tier_ops ucmi_tier_fake = {
    .p = {.kind = "tier",
          .name = "Fake",
          .help = "remembers keys, keeps no data: what would a workload hit?",
          .options = fake_options,
          .size = sizeof(struct fake)},
    .open = fake_open,
    .close = fake_close,
    .lookup = fake_lookup,
    .submit = fake_submit,
};

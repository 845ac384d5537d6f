/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shrinking a backend to a capacity: segments go, coldest first.  First those of namespaces in
 * which nobody lives, then those of lanes nobody owns; owners are asked for the rest, and choose by
 * themselves which of theirs are the coldest.  A segment with a pinned block stays.
 */
#include "store/manage.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

enum standing { NAMESPACE_DEAD, LANE_DEAD, OWNED };
struct candidate {
    struct ucmi_space *sp;
    struct ucmi_seen *sn;
    uint32_t segment, last;
    enum standing standing;
};
struct gc {
    struct ucmi_manager *m;
    struct candidate *v;
    size_t n, cap;
    struct candidate next; /* in finding: whose directory is read */
};

/* false: something in it is pinned. */
static bool last_use_of(const struct ucmi_space *sp, const struct ucmi_table *t, uint32_t segment,
                        uint32_t *last)
{
    const uint32_t now = ucmi_tick((uint64_t)time(NULL));
    for (size_t i = ucmi_table_from(t, segment, 0); i < t->n && t->v[i].segment == segment; i++) {
        if (t->v[i].flags & UCMI_PINNED && t->v[i].tick > now)
            return false;
        *last = MAX(*last, ucmi_last_use(sp, &t->v[i]));
    }
    return true;
}

static void find_segment(void *arg, int dir, const char *name)
{
    struct gc *g = arg;
    struct candidate c = g->next;
    if (!ucmi_seg_number(name, &c.segment) || !last_use_of(c.sp, &c.sn->table, c.segment, &c.last))
        return;
    if (g->n == g->cap) {
        size_t cap = g->cap ? 2 * g->cap : 64;
        struct candidate *v = realloc(g->v, cap * sizeof *v);
        if (!v) {
            g->m->failed = true;
            return;
        }
        g->v = v;
        g->cap = cap;
    }
    g->v[g->n++] = c;
}

static int colder(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->standing != y->standing)
        return (x->standing > y->standing) - (x->standing < y->standing);
    return (x->last > y->last) - (x->last < y->last);
}

static int find_candidates(struct gc *g)
{
    for (size_t i = 0; i < g->m->nspaces; i++) {
        struct ucmi_space *sp = &g->m->spaces[i];
        bool lived_in = false;
        for (size_t k = 0; k < sp->nlanes; k++)
            lived_in |= sp->lanes[k].live;
        for (size_t k = 0; k < sp->nlanes; k++) {
            struct ucmi_seen *sn = &sp->lanes[k];
            if (sn->err == -ENOTSUP || sn->err == -ENOKEY) { /* not ours to judge, nor to ask for */
                sn->info.err = sn->err;
                continue;
            }
            g->next = (struct candidate){.sp = sp, .sn = sn};
            g->next.standing = sn->live ? OWNED : lived_in ? LANE_DEAD : NAMESPACE_DEAD;
            ucmi_each_name(sn->dir, ".", find_segment, g);
        }
    }
    if (g->m->failed)
        return -ENOMEM;
    if (g->n)
        qsort(g->v, g->n, sizeof *g->v, colder);
    return 0;
}

/* Any will do: it is the same root. */
static int count_bytes(struct ucmi_manager *m)
{
    int err = -ENODATA;
    for (size_t i = 0; err < 0 && i < m->nspaces; i++)
        if ((err = ucmi_space_open(m, &m->spaces[i])) == 0)
            err = ucmi_bound_used(m->spaces[i].p, &m->total.bytes);
    return err;
}

static bool over(const struct ucmi_manager *m)
{
    return m->total.bytes > m->how->capacity;
}

static void give_up(struct ucmi_manager *m, const struct candidate *c)
{
    struct ucmi_seen *sn = c->sn;
    int err = ucmi_seen_take(m, c->sp, sn);
    if (err == -EAGAIN || err == -EBUSY) { /* lived in again */
        sn->live = true;
        return;
    }
    uint32_t had = err ? 0 : sn->lane->own->live;
    if (!err && c->segment < sn->lane->nsegs && sn->lane->segs[c->segment].slots)
        err = ucmi_bound_give_up(c->sp->p, sn->lane, c->segment);
    if (!err) {
        sn->info.segments++;
        sn->info.done += had - sn->lane->own->live;
        sn->info.chosen = sn->info.done;
    }
    sn->info.err = err;
    if (sn->lane)
        ucmi_seen_drop(c->sp, sn, true);
}

/* The owners of the coldest segments, each for as many as are its. */
static int ask_owners(struct gc *g, size_t from)
{
    struct ucmi_manager *m = g->m;
    uint64_t to_go = m->total.bytes - m->how->capacity;
    for (size_t i = from; i < g->n && to_go; i++) {
        struct ucmi_seen *sn = g->v[i].sn;
        const uint64_t bytes = ucmi_bound_charge(sn->table.slots * g->v[i].sp->head->slot_size);
        if (!sn->live)
            continue;
        sn->info.segments++;
        to_go -= MIN(bytes, to_go);
    }
    for (size_t i = 0; i < m->nspaces; i++) {
        struct ucmi_space *sp = &m->spaces[i];
        struct ucmi_requests q = {0};
        for (size_t k = 0; k < sp->nlanes; k++) {
            struct ucmi_seen *sn = &sp->lanes[k];
            if (!sn->live || !sn->info.segments)
                continue;
            sn->segments = ucmi_count_segments(sn->dir);
            struct ucmi_record r = {
                .op = UCMI_SHRINK,
                .segment = (uint32_t)(sn->segments - MIN(sn->info.segments, sn->segments)),
                .lane = ucmi_lane_hash(sn->name)};
            if (ucmi_ask_add(&q, sn, &r, 0) < 0)
                m->failed = true;
        }
        ucmi_ask_all(m, sp, &q);
        free(q.v);
        for (size_t k = 0; k < sp->nlanes; k++) {
            struct ucmi_seen *sn = &sp->lanes[k];
            uint64_t left = ucmi_count_segments(sn->dir);
            if (sn->live && sn->info.segments)
                sn->info.segments = sn->segments - MIN(left, sn->segments);
        }
    }
    return m->failed ? -ENOMEM : 0;
}

int ucmi_manage_gc(struct ucmi_manager *m)
{
    struct gc g = {.m = m};
    int err = count_bytes(m);
    size_t i = 0;
    if (err == -ENODATA) /* nothing here, or nothing that can be read */
        return 0;
    if (!err && over(m))
        err = find_candidates(&g);
    for (; !err && over(m) && i < g.n && g.v[i].standing != OWNED; i++) {
        give_up(m, &g.v[i]);
        err = count_bytes(m);
    }
    if (!err && over(m))
        err = ask_owners(&g, 0);
    if (!err)
        err = count_bytes(m);
    free(g.v);
    return err;
}

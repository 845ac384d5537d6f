/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ucm_manage: drops and pins blocks, and gives up segments, while engines run.
 *
 * A lane is first read without a part in it.  Only where there is something to do its lock is
 * tried: whoever has that may write, so a lane that nobody owns is taken over as any process takes
 * one over, changed, and let go.  Who owns another is asked (manage_ask.c).
 *
 * What must hold: nothing is dropped that was not chosen, and that it fits is judged again by who
 * drops it, at that moment.  A process killed anywhere in here leaves a lane without an owner, as
 * any process does, and requests that are soon no longer wanted.
 */
#include "store/manage.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- reading ---- */

static void note_touch(void *arg, const struct ucmi_record *r)
{
    struct ucmi_space *sp = arg;
    struct ucmi_entry e = {.key = r->key, .place = r->tick, .lane = 1, .rank = r->rank};
    const struct ucmi_entry *had;
    if (r->op != UCMI_TOUCH)
        return;
    had = ucmi_index_find(&sp->touches, &r->key, r->rank, 1);
    if (!had || had->place < r->tick)
        ucmi_index_put(&sp->touches, &e);
}

uint32_t ucmi_last_use(const struct ucmi_space *sp, const struct ucmi_record *put)
{
    const struct ucmi_entry *e = ucmi_index_find(&sp->touches, &put->key, put->rank, 1);
    return e ? MAX(e->place, put->tick) : put->tick;
}

int ucmi_seen_read(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn)
{
    struct ucmi_journal_header *head = aligned_alloc(UCMI_PAGE, sizeof *head);
    if (!head)
        return -ENOMEM;
    sn->table.also = note_touch;
    sn->table.arg = sp;
    sn->table.ns = sp->name;
    sn->table.given = &m->seal;
    sn->err = ucmi_table_read(&sn->table, sn->dir, head, m->buf, UCMI_READ_BUF);
    if ((!sn->err || sn->err == -ENOKEY) && !sp->known) {
        memcpy(sp->head, head, sizeof *head);
        sp->known = true;
    }
    free(head);
    return sn->err;
}

static void count_segment(void *arg, int dir, const char *name)
{
    uint32_t segment;
    *(uint64_t *)arg += ucmi_seg_number(name, &segment);
}

uint64_t ucmi_count_segments(int dir)
{
    uint64_t n = 0;
    ucmi_each_name(dir, ".", count_segment, &n);
    return n;
}

struct finding {
    struct ucmi_manager *m;
    struct ucmi_space *sp;
};

static void find_lane(void *arg, int ns, const char *name)
{
    struct finding *f = arg;
    struct ucmi_space *sp = f->sp;
    if (!ucmi_lane_name_ok(name))
        return;
    int dir = openat(ns, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (dir < 0)
        return;
    struct ucmi_seen *v = realloc(sp->lanes, (sp->nlanes + 1) * sizeof *v);
    if (!v) {
        f->m->failed = true;
        close(dir);
        return;
    }
    sp->lanes = v;
    v += sp->nlanes++;
    *v = (struct ucmi_seen){.dir = dir, .live = ucmi_lane_is_held(dir)};
    snprintf(v->name, sizeof v->name, "%s", name);
    v->segments = ucmi_count_segments(dir);
    ucmi_seen_read(f->m, sp, v);
}

static bool ns_fits(const struct ucmi_manager *m, const char *name, int dir)
{
    const char *ns = m->how->ns;
    char text[8192];
    if (!ns || (strlen(ns) >= 8 && strncmp(name, ns, strlen(ns)) == 0))
        return true;
    ucmi_ns_text(dir, text, sizeof text);
    return strcmp(text, ns) == 0;
}

static void find_space(void *arg, int root, const char *name)
{
    struct ucmi_manager *m = arg;
    struct ucmi_space sp = {.dir = -1};
    if (strlen(name) != 32 || strspn(name, "0123456789abcdef") != 32)
        return;
    sp.dir = openat(root, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (sp.dir < 0)
        return;
    struct ucmi_space *v = NULL;
    if (ns_fits(m, name, sp.dir)) {
        v = realloc(m->spaces, (m->nspaces + 1) * sizeof *v);
        m->failed |= !v;
    }
    if (!v) {
        close(sp.dir);
        return;
    }
    memcpy(sp.name, name, sizeof sp.name);
    sp.head = aligned_alloc(UCMI_PAGE, sizeof *sp.head);
    m->failed |= !sp.head || ucmi_index_init(&sp.touches) < 0;
    m->spaces = v;
    v[m->nspaces++] = sp;
    struct finding f = {m, &v[m->nspaces - 1]};
    if (!m->failed)
        ucmi_each_name(sp.dir, ".", find_lane, &f);
}

/* ---- which blocks ---- */

static bool key_fits(const char *prefix, const ucm_key *key)
{
    char hex[33];
    ucmi_hex(key->b, sizeof key->b, hex);
    return !prefix || strncasecmp(hex, prefix, strlen(prefix)) == 0;
}

bool ucmi_wanted(const struct ucmi_manager *m, const struct ucmi_space *sp,
                 const struct ucmi_seen *sn, const struct ucmi_record *put)
{
    const struct ucm_manage *how = m->how;
    struct ucm_block_info info = {
        .key = put->key, .segment = put->segment, .slot = put->slot, .depth = put->depth};
    if (!key_fits(how->key, &put->key) ||
        (how->op == UCM_MANAGE_RM && ucmi_last_use(sp, put) >= m->limit) ||
        (how->op == UCM_MANAGE_UNPIN && !(put->flags & UCMI_PINNED)))
        return false;
    return !how->want || how->want(how->arg, sp->name, sn->name, &info);
}

static uint64_t count_wanted(const struct ucmi_manager *m, const struct ucmi_space *sp,
                             const struct ucmi_seen *sn)
{
    uint64_t n = 0;
    for (size_t i = 0; i < sn->table.n; i++)
        n += ucmi_wanted(m, sp, sn, &sn->table.v[i]);
    return n;
}

/* ---- taking a lane ---- */

int ucmi_space_open(struct ucmi_manager *m, struct ucmi_space *sp)
{
    const struct ucmi_journal_header *h = sp->head;
    if (sp->p)
        return 0;
    if (!sp->known)
        return -ENODATA; /* no lane here tells what its blocks are like */
    struct ucm_store *s = calloc(1, sizeof *s);
    if (!s)
        return -ENOMEM;
    atomic_init(&s->refs, 1);
    s->geo = (struct ucm_geometry){.block_size = h->block_size,
                                   .shard_size = h->shard_size,
                                   .nshards = h->nshards,
                                   .rank = h->rank,
                                   .ranks = h->ranks,
                                   .timeout_ms = 30000,
                                   .conf = m->conf};
    memcpy(s->geo.ns, h->ns, sizeof s->geo.ns);
    if (ucmi_seal_of(&m->seal, h->ns) == &m->seal)
        s->key = m->key;
    s->tiers[0] = (struct ucm_tier){.geo = &s->geo, .counters = &s->counters};
    int err = ucmi_posix_visit(&s->tiers[0], &m->options, m->backend, &sp->p);
    if (!err && strcmp(sp->p->ns_name, sp->name) != 0) { /* a journal put there by somebody */
        ucmi_posix_free(sp->p);
        sp->p = NULL;
        err = -EBADMSG;
    }
    if (err < 0) {
        ucmi_store_release(&s->geo);
        return err;
    }
    sp->p->seg_slots = h->slots;
    sp->store = s;
    return 0;
}

int ucmi_seen_take(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn)
{
    int err = sn->lane ? 0 : ucmi_space_open(m, sp);
    if (sn->lane || err < 0)
        return err;
    struct ucmi_lane *lane = ucmi_lane_add(sp->p, sn->name);
    if (!lane)
        return -ENOMEM;
    err = ucmi_own_take(sp->p, lane);
    if (err < 0) {
        ucmi_lane_forget(sp->p, lane);
        return err;
    }
    lane->own->pending.n = 0; /* what the taking found damaged is not our business */
    sn->lane = lane;
    return 0;
}

void ucmi_seen_drop(struct ucmi_space *sp, struct ucmi_seen *sn, bool empty_too)
{
    struct ucmi_posix *p = sp->p;
    struct ucmi_lane *lane = sn->lane;
    bool remove = empty_too && !lane->own->total && !lane->own->lost;
    sn->lane = NULL;
    if (remove)
        ucmi_room_remove(p, p->ns_fd, lane->dir, lane->name);
    ucmi_own_release(p, lane);
    ucmi_lane_forget(p, lane);
    if (remove) /* on NFS what was open is gone only now */
        ucmi_file_remove(p, p->ns_fd, sn->name, AT_REMOVEDIR);
}

/* ---- lanes that are ours ---- */

struct change { /* records on their way */
    struct ucmi_record v[UCMI_MANAGE_BATCH];
    size_t n;
};

static int write_out(struct ucmi_space *sp, struct ucmi_seen *sn, struct change *c)
{
    struct ucmi_lane *lane = sn->lane;
    int err = c->n ? ucmi_own_check(sp->p, lane) : 0;
    if (!err && c->n)
        err = ucmi_commit_now(sp->p, lane, c->v, c->n);
    if (err < 0) {
        sn->info.left += c->n;
        return err;
    }
    sn->info.done += c->n;
    c->n = 0;
    ucmi_commit_tidy(sp->p, lane, false);
    return lane->own->lost ? -EIO : 0;
}

/* Decides about a slot again, and lays down what is to be said of it. */
static void change_slot(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn,
                        uint32_t place, struct change *c)
{
    const struct ucm_manage *how = m->how;
    struct ucmi_posix *p = sp->p;
    struct ucmi_lane *lane = sn->lane;
    struct ucmi_slot *slot = ucmi_own_slot(lane, place);
    const struct ucmi_record put = ucmi_commit_record(slot, UCMI_PUT, lane, place);

    if (slot->state != UCMI_DISK_LIVE || !ucmi_wanted(m, sp, sn, &put))
        return;
    sn->info.chosen++;
    if (how->op == UCM_MANAGE_PIN || how->op == UCM_MANAGE_UNPIN) {
        ucmi_slot_pin(p, lane, slot, how->op == UCM_MANAGE_PIN ? m->pin : 0);
        c->v[c->n++] = ucmi_commit_record(slot, UCMI_PUT, lane, place);
    } else if (how->op == UCM_MANAGE_REPAIR && ucmi_slot_check(p, lane, place) != -EBADMSG) {
        sn->info.kept++;
    } else {
        struct ucmi_entry *e = ucmi_index_find(&p->index, &slot->key, slot->rank, lane->id);
        if (e && e->place == place)
            ucmi_index_remove(&p->index, e);
        slot->state = UCMI_DISK_FREE;
        lane->own->live--;
        c->v[c->n++] = ucmi_commit_record(slot, UCMI_DEL, lane, place);
    }
}

static bool holds_nothing(const struct ucmi_lane *lane, uint32_t segment)
{
    const struct ucmi_slot *slots = lane->segs[segment].slots;
    for (uint32_t i = 0; slots && i < lane->slots; i++)
        if (slots[i].state != UCMI_DISK_FREE)
            return false;
    return slots != NULL;
}

/* Nobody fills it: what holds nothing any more goes back to the file system. */
static int give_back(struct ucmi_space *sp, struct ucmi_seen *sn)
{
    int err = 0;
    for (uint32_t g = 0; !err && g < sn->lane->nsegs; g++)
        if (holds_nothing(sn->lane, g)) {
            err = ucmi_bound_give_up(sp->p, sn->lane, g);
            sn->info.segments += !err;
        }
    return err;
}

int ucmi_manage_own(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn)
{
    struct ucmi_lane *lane = sn->lane;
    struct change *c = calloc(1, sizeof *c);
    int err = c ? 0 : -ENOMEM;

    sn->info.chosen = sn->info.done + sn->info.kept;
    for (uint32_t place = 0; !err && place < lane->nsegs * lane->slots; place++) {
        if (lane->segs[place / lane->slots].slots)
            change_slot(m, sp, sn, place, c);
        if (c->n == UCMI_MANAGE_BATCH)
            err = write_out(sp, sn, c);
    }
    if (!err)
        err = write_out(sp, sn, c);
    free(c);
    if (err)
        return err;
    if (m->how->op == UCM_MANAGE_UNPIN)
        ucmi_pins_mark(sp->p, lane);
    if (m->how->op == UCM_MANAGE_REPAIR && lane->own->missing) { /* not even a slot is there */
        ucmi_commit_tidy(sp->p, lane, true);
        uint64_t handled = sn->info.done + sn->info.kept;
        uint64_t before = count_wanted(m, sp, sn);
        sn->info.chosen = MAX(before, handled);
        sn->info.done = sn->info.chosen - sn->info.kept;
    }
    return m->how->op == UCM_MANAGE_RM ? give_back(sp, sn) : 0;
}

/* ---- lanes that nobody can read ---- */

static void unlink_ours(void *arg, int dir, const char *name)
{
    uint32_t segment;
    if (strncmp(name, "journal", 7) == 0 || strcmp(name, "pinned") == 0 ||
        ucmi_seg_number(name, &segment))
        unlinkat(dir, name, 0);
}

/* Nor does another lane tell what its blocks were like, so it could not even be taken over: what
 * nobody owns and nobody can ever read goes. */
static int remove_unreadable(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn)
{
    int lock =
        openat(sn->dir, "lock", O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666);
    int err = lock < 0 ? -errno : ucmi_lock_try(lock);
    if (!err && ucmi_seen_read(m, sp, sn) == -EBADMSG) { /* still, now that nobody writes it */
        ucmi_each_name(sn->dir, ".", unlink_ours, NULL);
        unlinkat(sn->dir, "lock", 0);
        unlinkat(sp->dir, sn->name, AT_REMOVEDIR); /* what is not ours in it stays */
    }
    if (lock >= 0)
        close(lock);
    return err;
}

/* ---- all of it ---- */

static void serve_lane(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn,
                       struct ucmi_requests *q)
{
    bool unreadable = sn->err && sn->err != -ENOENT;
    uint64_t chosen = unreadable ? 0 : count_wanted(m, sp, sn);
    if (!chosen && !(unreadable && m->how->op == UCM_MANAGE_REPAIR && sn->err == -EBADMSG)) {
        sn->info.err = unreadable ? sn->err : 0;
        return;
    }
    int err = ucmi_seen_take(m, sp, sn);
    if (err == -ENODATA && !sp->known)
        err = remove_unreadable(m, sp, sn);
    sn->live = err == -EAGAIN || err == -EBUSY;
    if (sn->live && !unreadable) {
        ucmi_ask_for(m, sp, sn, q);
        return;
    }
    sn->info.chosen = chosen;
    if (sn->lane) {
        err = ucmi_manage_own(m, sp, sn);
        ucmi_seen_drop(sp, sn, m->how->op == UCM_MANAGE_RM);
    }
    sn->info.err = err;
    sn->info.left = sn->info.chosen - sn->info.done - sn->info.kept;
}

static void serve(struct ucmi_manager *m, struct ucmi_space *sp)
{
    struct ucmi_requests q = {0};
    for (size_t i = 0; i < sp->nlanes; i++)
        serve_lane(m, sp, &sp->lanes[i], &q);
    ucmi_ask_all(m, sp, &q);
    free(q.v);
}

static void sum_up(struct ucmi_manager *m)
{
    struct ucm_manage_total *t = &m->total;
    for (size_t i = 0; i < m->nspaces; i++) {
        t->namespaces++;
        for (size_t k = 0; k < m->spaces[i].nlanes; k++) {
            struct ucmi_seen *sn = &m->spaces[i].lanes[k];
            struct ucm_manage_info *info = &sn->info;
            info->ns = m->spaces[i].name;
            info->lane = sn->name;
            info->live = sn->live;
            t->lanes++;
            t->chosen += info->chosen;
            t->done += info->done;
            t->kept += info->kept;
            t->left += info->left;
            t->segments += info->segments;
            t->unreadable += info->err != 0 && !info->chosen;
            if (m->how->lane && (info->chosen || info->segments || info->err))
                m->how->lane(m->how->arg, info);
        }
    }
}

static void free_space(struct ucmi_space *sp)
{
    for (size_t i = 0; i < sp->nlanes; i++) {
        if (sp->lanes[i].lane)
            ucmi_seen_drop(sp, &sp->lanes[i], false);
        ucmi_table_free(&sp->lanes[i].table);
        close(sp->lanes[i].dir);
    }
    ucmi_ask_end(sp);
    if (sp->p) {
        ucmi_posix_free(sp->p);
        ucmi_store_release(&sp->store->geo);
    }
    ucmi_index_destroy(&sp->touches);
    free(sp->lanes);
    free(sp->head);
    close(sp->dir);
}

static bool sensible(const struct ucm_manage *how)
{
    const char *hex = "0123456789abcdefABCDEF";
    if (how->op > UCM_MANAGE_GC || how->before < 0 || how->timeout_ms < 0 || (how->ns && !*how->ns))
        return false;
    if (how->key && (strlen(how->key) > 32 || strspn(how->key, hex) != strlen(how->key)))
        return false;
    return how->op != UCM_MANAGE_PIN || (how->until > time(NULL) && how->until >> 36 == 0);
}

static int manage(void *arg, const char *backend)
{
    struct ucmi_manager *m = arg;
    int at = open(backend, O_RDONLY | O_DIRECTORY | O_CLOEXEC), err = at < 0 ? -errno : 0;
    if (!err)
        err = ucmi_seal_open(&m->seal, &m->key);
    if (!err)
        err = m->buf ? ucm_conf_new(&m->conf) : -ENOMEM;
    if (!err)
        err = ucmi_each_name(at, "ucm", find_space, m);
    if (!err && m->failed)
        err = -ENOMEM;
    if (!err && m->how->op == UCM_MANAGE_GC)
        err = ucmi_manage_gc(m);
    else
        for (size_t i = 0; !err && i < m->nspaces; i++)
            serve(m, &m->spaces[i]);
    if (!err)
        sum_up(m);
    for (size_t i = 0; i < m->nspaces; i++)
        free_space(&m->spaces[i]);
    free(m->spaces);
    ucm_conf_free(m->conf);
    ucmi_seal_close(&m->seal);
    if (at >= 0)
        close(at);
    return err;
}

int ucm_manage(const char *backend, const struct ucm_manage *how, struct ucm_manage_total *total_p)
{
    if (!backend || !how || !total_p || !sensible(how))
        return -EINVAL;
    struct ucmi_manager m = {
        .how = how,
        .backend = backend,
        .options = {.engine = 1,
                    .sync = UCMI_SYNC_FULL,
                    .segment_mb = 256,
                    .queue_depth = 1,
                    .io_depth = 1,
                    .stall_ms = 5000},
        .buf = aligned_alloc(UCMI_PAGE, UCMI_READ_BUF),
        .pin = ucmi_tick((uint64_t)how->until + (1 << UCMI_TICK_SHIFT) - 1), /* so long at least */
        .limit =
            how->op == UCM_MANAGE_RM && how->before ? ucmi_tick((uint64_t)how->before) : UINT32_MAX,
    };
    int err = ucmi_with_key(backend, how->conf, &m.key, manage, &m);
    if (!err)
        *total_p = m.total;
    free(m.buf);
    return err;
}

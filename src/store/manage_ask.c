/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lanes that somebody owns: what is wanted is written into a journal of ours (asked.c says how it
 * is read), and the answers are found in theirs.
 *
 * A batch at a time, so that an owner's next commit stays as short as any.  An owner that ends
 * meanwhile leaves a lane that is ours to change.  One that does not answer for as long as the
 * caller cares to wait is not asked again.
 */
#include "store/manage.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

enum { POLL_MIN_NS = 2000000, POLL_MAX_NS = 100000000 };
#define AGAIN_NS UINT64_C(1000000000) /* asked again: it may have been busy */

int ucmi_ask_add(struct ucmi_requests *q, struct ucmi_seen *sn, const struct ucmi_record *r,
                 uint64_t seq)
{
    if (q->n == q->cap) {
        size_t cap = q->cap ? 2 * q->cap : UCMI_MANAGE_BATCH;
        struct ucmi_request *v = realloc(q->v, cap * sizeof *v);
        if (!v)
            return -ENOMEM;
        q->v = v;
        q->cap = cap;
    }
    q->v[q->n++] = (struct ucmi_request){.seen = sn, .r = *r, .seq = seq};
    return 0;
}

void ucmi_ask_for(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn,
                  struct ucmi_requests *q)
{
    const enum ucm_manage_op op = m->how->op;
    bool pin = op == UCM_MANAGE_PIN || op == UCM_MANAGE_UNPIN;

    for (size_t i = 0; i < sn->table.n; i++) {
        const struct ucmi_record *put = &sn->table.v[i];
        if (!ucmi_wanted(m, sp, sn, put))
            continue;
        struct ucmi_record r = {.op = pin ? UCMI_PIN : UCMI_FORGET,
                                .flags = op == UCM_MANAGE_REPAIR ? UCMI_IF_BAD : 0,
                                .rank = put->rank,
                                .key = put->key,
                                .segment = put->segment,
                                .slot = put->slot,
                                .header_sum = put->header_sum,
                                .lane = ucmi_lane_hash(sn->name)};
        r.tick = op == UCM_MANAGE_PIN ? m->pin : op == UCM_MANAGE_UNPIN ? 0 : m->limit;
        sn->info.chosen++;
        if (ucmi_ask_add(q, sn, &r, put->seq) < 0) {
            sn->info.left++;
            sn->info.err = -ENOMEM;
        }
    }
}

/* ---- writing ---- */

static int open_mine(struct ucmi_manager *m, struct ucmi_space *sp)
{
    int err = sp->mine ? 0 : ucmi_space_open(m, sp);
    for (uint64_t until = ucmi_now_ns() + AGAIN_NS; !err && !sp->mine;) {
        err = ucmi_own_create(sp->p, &sp->mine);
        if (err != -EAGAIN || ucmi_now_ns() > until)
            break;
        nanosleep(&(struct timespec){.tv_nsec = POLL_MIN_NS}, NULL);
        err = 0;
    }
    return err;
}

void ucmi_ask_end(struct ucmi_space *sp)
{
    char name[UCMI_LANE_NAME];
    struct ucmi_lane *lane = sp->mine;
    if (!lane)
        return;
    memcpy(name, lane->name, sizeof name);
    ucmi_room_remove(sp->p, sp->p->ns_fd, lane->dir, name);
    ucmi_own_release(sp->p, lane);
    ucmi_lane_forget(sp->p, lane);
    ucmi_file_remove(sp->p, sp->p->ns_fd, name, AT_REMOVEDIR); /* NFS: not before all is closed */
    sp->mine = NULL;
}

static int send_batch(struct ucmi_manager *m, struct ucmi_space *sp, const struct ucmi_request *v,
                      size_t n)
{
    struct ucmi_record *r = malloc(n * sizeof *r);
    uint32_t until = ucmi_tick((uint64_t)time(NULL) + (uint64_t)m->how->timeout_ms / 1000) + 1;
    size_t some = 0;
    int err = r ? open_mine(m, sp) : -ENOMEM;

    for (size_t i = 0; !err && i < n; i++)
        if (!v[i].over) {
            r[some] = v[i].r;
            r[some++].depth = until;
        }
    if (!err && some)
        err = ucmi_own_check(sp->p, sp->mine);
    if (!err && some)
        err = ucmi_commit_now(sp->p, sp->mine, r, some);
    free(r);
    if (err < 0)
        return err;
    ucmi_commit_tidy(sp->p, sp->mine, false);
    futimens(sp->mine->dir, NULL); /* the ears hear this */
    futimens(sp->p->ns_fd, NULL);  /* and on other nodes this is seen */
    return sp->mine->own->lost ? -EIO : 0;
}

/* ---- answers ---- */

static void end_request(struct ucmi_request *q, uint64_t *count)
{
    q->over = true;
    ++*count;
}

static void judge(struct ucmi_request *q)
{
    struct ucmi_seen *sn = q->seen;
    const struct ucmi_record *r = &q->r;
    if (q->over)
        return;
    if (r->op == UCMI_SHRINK) {
        if (ucmi_count_segments(sn->dir) <= r->segment)
            q->over = true;
        return;
    }
    const struct ucmi_record *at = ucmi_table_at(&sn->table, r->segment, r->slot);
    bool same = at && at->rank == r->rank && at->header_sum == r->header_sum &&
                ucmi_key_eq(&at->key, &r->key);
    bool pinned = same && at->flags & UCMI_PINNED;
    if (r->op == UCMI_FORGET) {
        if (!same)
            end_request(q, &sn->info.done);
        else if (at->seq > MAX(q->seq, sn->table.told))
            end_request(q, &sn->info.kept);
    } else if (!same) {
        end_request(q, &sn->info.kept);
    } else if (r->tick ? pinned && at->tick == r->tick : !pinned) {
        end_request(q, &sn->info.done);
    }
}

/* Its owner has ended: it can be changed at once, or another process has it now. */
static void try_directly(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn)
{
    if (m->how->op == UCM_MANAGE_GC || ucmi_lane_is_held(sn->dir) || ucmi_seen_take(m, sp, sn) < 0)
        return;
    int err = ucmi_manage_own(m, sp, sn);
    sn->info.err = err;
    ucmi_seen_drop(sp, sn, m->how->op == UCM_MANAGE_RM);
    sn->over = true;
}

/* How many requests of the batch are open, after a look at the lanes they are for. */
static size_t look(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_request *v, size_t n)
{
    struct ucmi_seen *last = NULL; /* requests for one lane follow one another */
    size_t open = 0;
    for (size_t i = 0; i < n; i++) {
        struct ucmi_seen *sn = v[i].seen;
        if (sn != last && !sn->over && !sn->deaf) {
            try_directly(m, sp, sn);
            if (!sn->over && ucmi_seen_read(m, sp, sn) == -ENOENT)
                ucmi_table_free(&sn->table); /* it has been removed, with all that was in it */
        }
        last = sn;
        v[i].over |= sn->over || sn->deaf;
        judge(&v[i]);
        open += !v[i].over;
    }
    return open;
}

static void give_up_on(struct ucmi_request *v, size_t n, int err)
{
    for (size_t i = 0; i < n; i++)
        if (!v[i].over) {
            v[i].over = v[i].seen->deaf = true;
            v[i].seen->info.err = err;
        }
}

static void ask_batch(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_request *v,
                      size_t n)
{
    uint64_t patience = (uint64_t)m->how->timeout_ms * UINT64_C(1000000), pause = POLL_MIN_NS;
    uint64_t until = ucmi_now_ns() + patience, again = 0;
    size_t open = look(m, sp, v, n), now_open = open;

    for (; now_open; now_open = look(m, sp, v, n)) {
        uint64_t now = ucmi_now_ns();
        if (now_open < open)
            until = now + patience;
        open = now_open;
        int err = now > until ? -ETIMEDOUT : now >= again ? send_batch(m, sp, v, n) : 0;
        if (err < 0) {
            give_up_on(v, n, err);
            return;
        }
        if (now >= again)
            again = now + AGAIN_NS;
        nanosleep(&(struct timespec){.tv_nsec = (long)pause}, NULL);
        pause = MIN(2 * pause, (uint64_t)POLL_MAX_NS);
    }
}

void ucmi_ask_all(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_requests *q)
{
    for (size_t i = 0; i < q->n; i += UCMI_MANAGE_BATCH)
        ask_batch(m, sp, q->v + i, MIN(q->n - i, (size_t)UCMI_MANAGE_BATCH));
    for (size_t i = 0; i < q->n; i++) {
        struct ucm_manage_info *info = &q->v[i].seen->info;
        info->left = info->chosen - MIN(info->done + info->kept, info->chosen);
    }
    ucmi_ask_end(sp);
}

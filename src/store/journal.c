/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Journals: what counts when one is read, and how records are laid into pages.
 *
 * Appends rewrite the page the tail is in, so that every write is whole aligned pages (what
 * O_DIRECT needs) and a reader never sees the bytes of an earlier record change.
 */
#include "store/journal.h"

#include <unistd.h>

bool ucmi_jpos_follows(const struct ucmi_seal *s, const struct ucmi_jpos *pos,
                       const struct ucmi_record *r)
{
    if (r->seq != pos->seq || !ucmi_record_check(s, r))
        return false;
    return r->op == UCMI_EPOCH ? r->epoch > pos->epoch && r->epoch < UCMI_MAX_EPOCH
                               : r->epoch == pos->epoch;
}

size_t ucmi_journal_parse(const struct ucmi_seal *s, const void *buf, size_t len,
                          struct ucmi_jpos *pos, bool *moved, ucmi_record_fn *fn, void *arg)
{
    struct ucmi_record r;
    size_t at = 0;

    for (; len - at >= sizeof r; at += sizeof r) {
        memcpy(&r, (const char *)buf + at, sizeof r);
        if (!ucmi_jpos_follows(s, pos, &r))
            break;
        pos->seq++;
        pos->off += sizeof r;
        pos->epoch = r.epoch;
        if (r.op == UCMI_MOVED) {
            *moved = true;
            return at + sizeof r;
        }
        fn(arg, &r);
    }
    return at;
}

static ssize_t read_at(int fd, void *buf, size_t len, off_t off)
{
    ssize_t n;
    do
        n = pread(fd, buf, len, off);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

int ucmi_journal_read_some(const struct ucmi_seal *s, int fd, void *buf, size_t size,
                           struct ucmi_jpos *pos, bool *moved, ucmi_record_fn *fn, void *arg)
{
    size_t skip = pos->off % UCMI_PAGE;
    ssize_t n = read_at(fd, buf, size, (off_t)(pos->off - skip));
    if (n < 0)
        return (int)n;
    if ((size_t)n <= skip)
        return 0;
    size_t fresh = (size_t)n - skip;
    return ucmi_journal_parse(s, (char *)buf + skip, fresh, pos, moved, fn, arg) == fresh &&
           !*moved;
}

int ucmi_journal_read(const struct ucmi_seal *s, int fd, void *buf, size_t size,
                      struct ucmi_jpos *pos, bool *moved, ucmi_record_fn *fn, void *arg)
{
    /* Most of the time there is nothing new: one page tells, and only then is more asked for. */
    int more = ucmi_journal_read_some(s, fd, buf, UCMI_PAGE, pos, moved, fn, arg);
    while (more > 0)
        more = ucmi_journal_read_some(s, fd, buf, size, pos, moved, fn, arg);
    return more;
}

int ucmi_journal_header_read(int fd, struct ucmi_journal_header *h)
{
    ssize_t n = read_at(fd, h, sizeof *h, 0);
    if (n < 0)
        return (int)n;
    return (size_t)n < sizeof *h ? -EBADMSG : ucmi_journal_header_check(h);
}

size_t ucmi_jtail_span(const struct ucmi_jtail *t, size_t n, off_t *off)
{
    size_t skip = t->pos.off % UCMI_PAGE;
    *off = (off_t)(t->pos.off - skip);
    return ROUND_UP(skip + n * sizeof(struct ucmi_record), (size_t)UCMI_PAGE);
}

void ucmi_jtail_lay(const struct ucmi_seal *s, const struct ucmi_jtail *t, struct ucmi_record *v,
                    size_t n, void *buf)
{
    off_t off;
    size_t span = ucmi_jtail_span(t, n, &off), skip = t->pos.off % UCMI_PAGE;
    uint32_t epoch = t->pos.epoch;

    for (size_t i = 0; i < n; i++) {
        v[i].seq = t->pos.seq + i;
        v[i].epoch = v[i].op == UCMI_EPOCH ? v[i].epoch : epoch;
        epoch = v[i].epoch;
        ucmi_record_seal(s, &v[i]);
    }
    memcpy(buf, t->page, skip);
    memcpy((char *)buf + skip, v, n * sizeof *v);
    size_t used = skip + n * sizeof *v;
    memset((char *)buf + used, 0, span - used);
}

void ucmi_jtail_advance(struct ucmi_jtail *t, size_t n, const void *buf)
{
    off_t off;
    size_t span = ucmi_jtail_span(t, n, &off), skip = t->pos.off % UCMI_PAGE;
    struct ucmi_record last;

    memcpy(&last, (const char *)buf + skip + (n - 1) * sizeof last, sizeof last);
    t->pos.off += n * sizeof last;
    t->pos.seq += n;
    t->pos.epoch = last.epoch;
    if (t->pos.off % UCMI_PAGE) /* else the next record begins a page of its own */
        memcpy(t->page, (const char *)buf + span - UCMI_PAGE, UCMI_PAGE);
}

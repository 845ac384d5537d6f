/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A lane's journal read into a table of its slots, and read on.
 *
 * The file is opened anew each time, so that a network file system says what is in it now.  Where
 * the journal has been compacted since, the old file is read to its end first, and who has read it
 * up to MOVED goes on behind the new one's summary; else all is read anew.
 */
#include "store/table.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static struct ucmi_live *segment_of(struct ucmi_table *t, uint32_t segment)
{
    if (segment >= t->nsegs) {
        struct ucmi_live **v = realloc(t->segs, (segment + 1) * sizeof *v);
        if (!v)
            return NULL;
        memset(v + t->nsegs, 0, (segment + 1 - t->nsegs) * sizeof *v);
        t->segs = v;
        t->nsegs = segment + 1;
    }
    if (!t->segs[segment])
        t->segs[segment] = calloc(t->slots, sizeof *t->segs[segment]);
    return t->segs[segment];
}

static void note(void *arg, const struct ucmi_record *r)
{
    struct ucmi_table *t = arg;
    uint32_t place;
    t->records++;
    if (r->op != UCMI_PUT && r->op != UCMI_DEL) {
        if (t->also)
            t->also(t->arg, r);
        return;
    }
    if (!ucmi_place_of(r, t->slots, &place))
        return;
    struct ucmi_live *seg = segment_of(t, r->segment);
    if (!seg) {
        t->failed = true;
        return;
    }
    struct ucmi_live *at = &seg[r->slot];
    if (r->op == UCMI_PUT)
        *at = (struct ucmi_live){.put = *r, .there = true};
    else if (ucmi_key_eq(&at->put.key, &r->key))
        at->there = false;
}

static void forget_all(struct ucmi_table *t)
{
    for (uint32_t g = 0; g < t->nsegs; g++)
        free(t->segs[g]);
    free(t->segs);
    t->segs = NULL;
    t->nsegs = 0;
    t->records = 0;
}

static int read_on(struct ucmi_table *t, void *buf, size_t size)
{
    int err = 0;
    for (bool moved = true; !err && moved;) { /* behind MOVED it goes on if the rename failed */
        moved = false;
        err = ucmi_journal_read(t->fd, buf, size, &t->pos, &moved, note, t);
        t->records += moved;
        t->moved |= moved;
    }
    return err ? err : t->failed ? -ENOMEM : 0;
}

static bool same_file(int a, int b)
{
    struct stat x, y;
    return fstat(a, &x) == 0 && fstat(b, &y) == 0 && x.st_ino == y.st_ino && x.st_dev == y.st_dev;
}

/* fd is of another file than the one read before, if any. */
static int change_file(struct ucmi_table *t, int fd, struct ucmi_journal_header *head, void *buf,
                       size_t size)
{
    int had = t->fd, err = had ? read_on(t, buf, size) : 0;
    if (!err)
        err = ucmi_journal_header_read(fd, head);
    if (err < 0)
        return err;
    if (had && t->moved && head->base + 1 == t->pos.seq && head->slots == t->slots) {
        t->pos = ucmi_jpos_behind(head, t->pos.epoch);
    } else {
        forget_all(t);
        t->slots = head->slots;
        t->pos = ucmi_jpos_first(head);
        t->told = head->base + head->summary;
    }
    t->moved = false;
    return 0;
}

int ucmi_table_read(struct ucmi_table *t, int dir, struct ucmi_journal_header *head, void *buf,
                    size_t size)
{
    int fd = ucmi_open_below(dir, "journal"), err = 0;
    if (fd < 0)
        return fd;
    if (!t->fd || !same_file(t->fd, fd))
        err = change_file(t, fd, head, buf, size);
    else
        err = ucmi_journal_header_read(fd, head);
    if (err < 0) {
        close(fd);
        return err;
    }
    if (t->fd)
        close(t->fd);
    t->fd = fd;
    return read_on(t, buf, size);
}

const struct ucmi_live *ucmi_table_at(const struct ucmi_table *t, uint32_t segment, uint32_t slot)
{
    if (segment >= t->nsegs || !t->segs[segment] || slot >= t->slots ||
        !t->segs[segment][slot].there)
        return NULL;
    return &t->segs[segment][slot];
}

void ucmi_table_free(struct ucmi_table *t)
{
    forget_all(t);
    if (t->fd)
        close(t->fd);
    *t = (struct ucmi_table){0};
}

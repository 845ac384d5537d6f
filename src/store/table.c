/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A lane's journal read into a table of its slots, and read on.  Its size is that of what the file
 * really says: a header and records that name more slots than there can be cost nothing.
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

static int by_place(const struct ucmi_record *a, const struct ucmi_record *b)
{
    if (a->segment != b->segment)
        return a->segment < b->segment ? -1 : 1;
    return (a->slot > b->slot) - (a->slot < b->slot);
}

static int by_place_and_time(const void *a, const void *b)
{
    const struct ucmi_record *x = a, *y = b;
    int order = by_place(x, y);
    return order ? order : (x->seq > y->seq) - (x->seq < y->seq);
}

/* Keeps of all that was said of a slot what holds now. */
static void fold(struct ucmi_table *t)
{
    size_t kept = 0;
    if (t->n)
        qsort(t->v, t->n, sizeof *t->v, by_place_and_time);
    for (size_t i = 0; i < t->n; i++) {
        const struct ucmi_record *r = &t->v[i];
        const bool had = kept && by_place(&t->v[kept - 1], r) == 0;
        if (r->op == UCMI_PUT) {
            kept += !had;
            t->v[kept - 1] = *r;
        } else if (had && ucmi_key_eq(&t->v[kept - 1].key, &r->key)) {
            kept--;
        }
    }
    t->n = kept;
}

/* When it is full it is folded; what is still more than half full then is doubled, so that neither
 * is done often. */
static int make_room(struct ucmi_table *t)
{
    if (t->n < t->cap)
        return 0;
    fold(t);
    if (t->n < t->cap / 2)
        return 0;
    size_t cap = t->cap ? 2 * t->cap : 64;
    struct ucmi_record *v = realloc(t->v, cap * sizeof *v);
    if (!v)
        return -ENOMEM;
    t->v = v;
    t->cap = cap;
    return 0;
}

static void note(void *arg, const struct ucmi_record *r)
{
    struct ucmi_table *t = arg;
    uint32_t place;
    t->records++;
    if (r->op != UCMI_PUT && r->op != UCMI_DEL) {
        if (t->also)
            t->also(t->arg, r);
    } else if (ucmi_place_of(r, t->slots, &place)) {
        if (make_room(t) < 0)
            t->failed = true;
        else
            t->v[t->n++] = *r;
    }
}

static void forget_all(struct ucmi_table *t)
{
    free(t->v);
    t->v = NULL;
    t->n = t->cap = 0;
    t->records = 0;
}

static int read_on(struct ucmi_table *t, void *buf, size_t size)
{
    int err = 0;
    for (bool moved = true; !err && moved;) { /* behind MOVED it goes on if the rename failed */
        moved = false;
        err = ucmi_journal_read(t->seal, t->fd, buf, size, &t->pos, &moved, note, t);
        t->records += moved;
        t->moved |= moved;
    }
    fold(t);
    return err ? err : t->failed ? -ENOMEM : 0;
}

static bool same_file(int a, int b)
{
    struct stat x, y;
    return fstat(a, &x) == 0 && fstat(b, &y) == 0 && x.st_ino == y.st_ino && x.st_dev == y.st_dev;
}

/* By its directory's name, which is that of all that may be in it. */
static int choose_seal(struct ucmi_table *t, const struct ucmi_journal_header *head)
{
    char ns[2 * sizeof head->ns + 1];
    ucmi_hex(head->ns, sizeof head->ns, ns);
    if (strcmp(ns, t->ns) != 0)
        return -ENOTSUP;
    t->seal = ucmi_seal_of(t->given, head->ns);
    return t->seal ? 0 : -ENOKEY;
}

/* fd is of another file than the one read before, if any. */
static int change_file(struct ucmi_table *t, int fd, struct ucmi_journal_header *head, void *buf,
                       size_t size)
{
    int had = t->fd, err = had ? read_on(t, buf, size) : 0;
    if (!err)
        err = ucmi_journal_header_read(fd, head);
    if (!err)
        err = choose_seal(t, head);
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

size_t ucmi_table_from(const struct ucmi_table *t, uint32_t segment, uint32_t slot)
{
    const struct ucmi_record place = {.segment = segment, .slot = slot};
    size_t low = 0, high = t->n;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        if (by_place(&t->v[mid], &place) < 0)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

const struct ucmi_record *ucmi_table_at(const struct ucmi_table *t, uint32_t segment, uint32_t slot)
{
    size_t i = ucmi_table_from(t, segment, slot);
    return i < t->n && t->v[i].segment == segment && t->v[i].slot == slot ? &t->v[i] : NULL;
}

void ucmi_table_free(struct ucmi_table *t)
{
    forget_all(t);
    if (t->fd)
        close(t->fd);
    *t = (struct ucmi_table){.ns = t->ns, .given = t->given, .also = t->also, .arg = t->arg};
}

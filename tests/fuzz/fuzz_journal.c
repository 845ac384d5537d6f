/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as a journal behind its header page.  As they are, nearly nothing of them counts;
 * sealed by us they stand for what a broken writer may have sealed.  What is read is in sequence,
 * of an epoch that never falls, and the same whether it is read at once, in steps or from a file;
 * what follows the end does not matter.
 */
#include "store/journal.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define MUST(x) ((x) ? (void)0 : abort())
enum { MAX = 1 << 16, RECORD = sizeof(struct ucmi_record) };

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct seen {
    uint64_t n, hash;
    struct ucmi_record last;
};

static int fd;
static uint8_t *file, *buf; /* MAX, and a page for reading */
static const struct ucmi_jpos first = {.off = UCMI_PAGE, .seq = 1};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    fd = memfd_create("journal", MFD_CLOEXEC);
    file = aligned_alloc(UCMI_PAGE, MAX + UCMI_PAGE);
    buf = aligned_alloc(UCMI_PAGE, UCMI_PAGE);
    MUST(fd >= 0 && file && buf);
    return 0;
}

static void note(void *arg, const struct ucmi_record *r)
{
    struct seen *s = arg;
    MUST(ucmi_record_check(&ucmi_plain, r));
    MUST(r->seq == s->last.seq + 1 || s->n == 0);
    MUST(r->epoch >= s->last.epoch);
    MUST(r->epoch == s->last.epoch || r->op == UCMI_EPOCH);
    s->n++;
    s->hash = ucmi_hash64(r, sizeof *r, s->hash);
    s->last = *r;
}

/* To the end or to MOVED. */
static struct seen parse(const uint8_t *p, size_t size, struct ucmi_jpos *pos)
{
    struct seen s = {0};
    bool moved = false;
    size_t used = ucmi_journal_parse(&ucmi_plain, p, size, pos, &moved, note, &s);
    MUST(used <= size && used % RECORD == 0);
    MUST(used / RECORD == s.n + moved);
    MUST(pos->off == first.off + used && pos->seq == first.seq + used / RECORD);
    return s;
}

static void check(const uint8_t *data, size_t size)
{
    struct ucmi_jpos pos = first, stepped = first, read = first;
    struct seen all = parse(data, size, &pos), s = {0};
    bool moved = false;

    for (size_t end = 0; end <= size && !moved; end += 48) { /* a file that grows in odd steps */
        size_t from = stepped.off - first.off;
        ucmi_journal_parse(&ucmi_plain, data + from, end > from ? end - from : 0, &stepped, &moved,
                           note, &s);
    }
    if (!moved)
        ucmi_journal_parse(&ucmi_plain, data + stepped.off - first.off,
                           size - (stepped.off - first.off), &stepped, &moved, note, &s);
    MUST(s.n == all.n && s.hash == all.hash && stepped.off == pos.off);

    MUST(pwrite(fd, data, size, UCMI_PAGE) == (ssize_t)size && !ftruncate(fd, UCMI_PAGE + size));
    s = (struct seen){0};
    moved = false;
    MUST(ucmi_journal_read(&ucmi_plain, fd, buf, UCMI_PAGE, &read, &moved, note, &s) == 0);
    MUST(s.n == all.n && s.hash == all.hash && read.off == pos.off);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct ucmi_record r;
    uint64_t seq = first.seq;

    size = size < MAX ? size : MAX;
    memcpy(file, data, size);
    check(file, size);
    /* Sealed, and most of the time in sequence, which no luck would bring about. */
    for (size_t at = 0; at + RECORD <= size; at += RECORD) {
        memcpy(&r, file + at, RECORD);
        if (r.lane % 8)
            r.seq = seq++;
        r.op = (uint8_t)(r.op % 10);
        r.epoch %= 4;
        ucmi_record_seal(&ucmi_plain, &r);
        memcpy(file + at, &r, RECORD);
    }
    check(file, size);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * journal.h - reading a journal to its end and on, and laying out what is appended to it.
 *
 * Pure functions over bytes, but for ucmi_journal_read.  What is read is believed record by record:
 * a record counts when its own sum is right, its seq is the next one, and its epoch is that of the
 * record before (an EPOCH record's is higher).  The first that does not count is the end, for now:
 * whatever lies behind it is a torn append or the leavings of an owner who lost the lane.
 */
#ifndef UCMI_JOURNAL_H
#define UCMI_JOURNAL_H

#include "store/format.h"

struct ucmi_jpos {
    uint64_t off; /* in the file, of the next record */
    uint64_t seq; /* of the next record */
    uint32_t epoch;
};

/* Where the reader of a new file begins: before the summary. */
static inline struct ucmi_jpos ucmi_jpos_first(const struct ucmi_journal_header *h)
{
    return (struct ucmi_jpos){.off = UCMI_PAGE, .seq = h->base + 1};
}
/* Where a reader goes on who has read the file before up to its MOVED record. */
static inline struct ucmi_jpos ucmi_jpos_behind(const struct ucmi_journal_header *h, uint32_t epoch)
{
    return (struct ucmi_jpos){.off = UCMI_PAGE + h->summary * sizeof(struct ucmi_record),
                              .seq = h->base + h->summary + 1,
                              .epoch = epoch};
}

bool ucmi_jpos_follows(const struct ucmi_seal *s, const struct ucmi_jpos *pos,
                       const struct ucmi_record *r);

/* fn gets each record once, in order. */
typedef void ucmi_record_fn(void *arg, const struct ucmi_record *r);
/* Reads records from buf, which holds the file from pos->off on; returns how many bytes counted and
 * moves pos behind them.  Stops behind a MOVED record and sets *moved. */
size_t ucmi_journal_parse(const struct ucmi_seal *s, const void *buf, size_t len,
                          struct ucmi_jpos *pos, bool *moved, ucmi_record_fn *fn, void *arg);
/* The same from a file, to its end; buf is page-aligned, its size a multiple of the page.  Whole
 * aligned pages are read, so that fd may be O_DIRECT.  0, or -errno of a read. */
int ucmi_journal_read(const struct ucmi_seal *s, int fd, void *buf, size_t size,
                      struct ucmi_jpos *pos, bool *moved, ucmi_record_fn *fn, void *arg);
/* One read of it; 1: there may be more. */
int ucmi_journal_read_some(const struct ucmi_seal *s, int fd, void *buf, size_t size,
                           struct ucmi_jpos *pos, bool *moved, ucmi_record_fn *fn, void *arg);
/* Reads and checks page 0. 0, -errno, or as ucmi_journal_header_check.  h is page-aligned. */
int ucmi_journal_header_read(int fd, struct ucmi_journal_header *h);

/* The tail of a journal that its owner appends to. */
struct ucmi_jtail {
    struct ucmi_jpos pos;
    uint8_t *page; /* what the page at pos.off holds before pos.off; one page */
};
/* Bytes of the pages that n more records make to be written, and where they begin. */
size_t ucmi_jtail_span(const struct ucmi_jtail *t, size_t n, off_t *off);
/* Gives n records their seq, epoch and sum, and lays them into buf (ucmi_jtail_span bytes). */
void ucmi_jtail_lay(const struct ucmi_seal *s, const struct ucmi_jtail *t, struct ucmi_record *v,
                    size_t n, void *buf);
/* They have been written from buf: moves on behind them. */
void ucmi_jtail_advance(struct ucmi_jtail *t, size_t n, const void *buf);

#endif

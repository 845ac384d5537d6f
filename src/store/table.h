/* SPDX-License-Identifier: Apache-2.0 */
/*
 * table.h - what lies where in a lane, read from its journal by one who has no part in it: for
 * ucm_inspect and ucm_manage.  One thread.
 */
#ifndef UCMI_TABLE_H
#define UCMI_TABLE_H

#include "store/journal.h"

struct ucmi_table {
    struct ucmi_record *v; /* the last PUT of each block that is there, by segment and slot */
    size_t n, cap;
    uint32_t slots; /* in a segment */
    uint64_t records;
    uint64_t told;  /* what came up to this seq repeats what was before: it answers nothing */
    bool failed;    /* out of memory */
    const char *ns; /* the name of its namespace's directory */
    const struct ucmi_seal *given, *seal; /* what the caller has; what its sums are made by */
    int fd;                               /* of the journal; 0: not read yet */
    bool moved;
    struct ucmi_jpos pos;
    ucmi_record_fn *also; /* gets the records of no place, or NULL */
    void *arg;
};

/* Reads the journal in the directory, or what has come since the last time, into t, of which at
 * first only ns and given are set; its header to head (page-aligned).  buf: page-aligned, size a
 * multiple of the page.  0, or -errno: then t holds what could be read.  -ENOKEY: nothing but head,
 * it is sealed with a key that was not given. */
int ucmi_table_read(struct ucmi_table *t, int dir, struct ucmi_journal_header *head, void *buf,
                    size_t size);
/* The first in or behind that slot: an index into v, n at the end. */
size_t ucmi_table_from(const struct ucmi_table *t, uint32_t segment, uint32_t slot);
/* NULL: nothing is there. */
const struct ucmi_record *ucmi_table_at(const struct ucmi_table *t, uint32_t segment,
                                        uint32_t slot);
void ucmi_table_free(struct ucmi_table *t);

/* ---- inspect.c ---- */

/* To be read.  Below the backend anybody may have put anything: links are not followed, FIFOs and
 * devices not waited for.  A descriptor or -errno; -ELOOP: no regular file. */
int ucmi_open_below(int dir, const char *name);

/* Calls fn with the key that conf names, if any; what goes wrong is told in conf, if there is one.
 */
int ucmi_with_key(const char *backend, ucm_conf *conf, struct ucmi_key *key,
                  int (*fn)(void *arg, const char *backend), void *arg);
/* Calls fn for each entry of a directory that begins with no dot. */
int ucmi_each_name(int at, const char *path, void (*fn)(void *arg, int dir, const char *name),
                   void *arg);
/* Whether a process of this kernel holds the lock of the lane in this directory. */
bool ucmi_lane_is_held(int dir);
/* The text of "namespace" in namespace.json; "" for none. */
void ucmi_ns_text(int ns, char *text, size_t size);

#endif

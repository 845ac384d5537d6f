/* SPDX-License-Identifier: Apache-2.0 */
/*
 * io.h - choosing and calling an I/O engine, and what the engines share.  The engines themselves
 * are tables (struct ucm_io_ops in ucm.h): psync.c, aio.c, uring.c.
 */
#ifndef UCMI_IO_H
#define UCMI_IO_H

#include "base/base.h"

extern const struct ucm_io_ops ucmi_io_psync, ucmi_io_aio, ucmi_io_uring;

struct ucmi_io {
    const struct ucm_io_ops *ops;
    void *state;
};
/* Opens engine `name` ("psync", "aio", "io_uring"), or with "auto" the best that works here; says
 * which and why, once a process.  depth: the most operations in flight. */
int ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                 char *why, size_t why_len);
void ucmi_io_close(struct ucmi_io *io);
/* ops->file, or the plain system call where the engine has none. */
int ucmi_io_file(const struct ucmi_io *io, const struct ucm_file *f);
int ucmi_file_plain(const struct ucm_file *f);

/* ---- for engines: transfers that fall short ---- */

/* What an engine keeps in op->priv while the operation is in its hands. */
struct __attribute__((may_alias)) ucmi_io_track {
    const struct iovec *iov; /* as the sender gave them: the operation is given back unchanged */
    off_t off;
    size_t left;         /* bytes still to be moved; the total is in op->res meanwhile */
    struct iovec *rest;  /* the pieces left after a short transfer; NULL before the first */
    struct ucm_io *next; /* free for the engine's own lists */
    unsigned niov;
    unsigned slot; /* the engine's own */
};
_Static_assert(sizeof(struct ucmi_io_track) <= sizeof((struct ucm_io){0}.priv), "fits priv");
static inline struct ucmi_io_track *ucmi_io_track(struct ucm_io *op)
{
    return (struct ucmi_io_track *)op->priv;
}

/* Operations in the order they came, linked through their tracks. */
struct ucmi_io_list {
    struct ucm_io *head, *last;
};
static inline void ucmi_io_push(struct ucmi_io_list *l, struct ucm_io *op)
{
    ucmi_io_track(op)->next = NULL;
    if (l->head)
        ucmi_io_track(l->last)->next = op;
    else
        l->head = op;
    l->last = op;
}
static inline struct ucm_io *ucmi_io_pop(struct ucmi_io_list *l) /* NULL when empty */
{
    struct ucm_io *op = l->head;
    if (op)
        l->head = ucmi_io_track(op)->next;
    return op;
}

/* When an operation comes in, and when what it waits for is over. */
void ucmi_io_begin(struct ucm_io *op);
/* What the system call for op->iov at op->off returned: bytes, or -errno.  True: the operation has
 * ended, op->res is set.  False: op now says what is left, issue it again. */
bool ucmi_io_moved(struct ucm_io *op, ssize_t res);
size_t ucmi_iov_len(const struct iovec *iov, unsigned niov);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transfer.c - what every engine does when the system moved fewer bytes than asked: go on from
 * there until all is moved, the file ends, or an error comes.  An operation is only ever reported
 * whole, cut by the end of the file, or failed; a short transfer is never passed off as a success.
 *
 * The state of an operation lies in its priv (struct ucmi_io_track) and belongs to whichever thread
 * has the operation in hand; nothing here is shared.
 */
#include "io/io.h"

#include <stdlib.h>

enum { SECTOR = 512 };

size_t ucmi_iov_len(const struct iovec *iov, unsigned niov)
{
    size_t len = 0;
    for (unsigned i = 0; i < niov; i++)
        len += iov[i].iov_len;
    return len;
}

void ucmi_io_begin(struct ucm_io *op)
{
    struct ucmi_io_track *t = ucmi_io_track(op);
    *t = (struct ucmi_io_track){.iov = op->iov, .off = op->off, .niov = op->niov};
    if (op->op != UCM_IO_SYNC)
        t->left = ucmi_iov_len(op->iov, op->niov);
    op->res = (ssize_t)t->left;
}

static bool finish(struct ucm_io *op, ssize_t res)
{
    struct ucmi_io_track *t = ucmi_io_track(op);
    free(t->rest);
    op->iov = t->iov;
    op->niov = t->niov;
    op->off = t->off;
    op->res = res;
    return true;
}

/* Makes op->iov what is left after `done` more bytes, in a copy: the sender's vector is const. */
static int cut_pieces(struct ucm_io *op, size_t done)
{
    struct ucmi_io_track *t = ucmi_io_track(op);
    unsigned whole = 0;
    while (done >= op->iov[whole].iov_len)
        done -= op->iov[whole++].iov_len;

    if (!t->rest) {
        size_t n = op->niov - whole;
        t->rest = malloc(n * sizeof *t->rest);
        if (!t->rest)
            return -ENOMEM;
        memcpy(t->rest, op->iov + whole, n * sizeof *t->rest);
        op->iov = t->rest;
    } else {
        op->iov += whole;
    }
    op->niov -= whole;
    struct iovec *first = t->rest + (op->iov - t->rest);
    first->iov_base = (char *)first->iov_base + done;
    first->iov_len -= done;
    return 0;
}

bool ucmi_io_moved(struct ucm_io *op, ssize_t res)
{
    struct ucmi_io_track *t = ucmi_io_track(op);
    ssize_t moved = op->res - (ssize_t)t->left;

    if (res == -EINTR)
        return false;
    /* A direct read stops off a sector boundary only at the end of the file, and some file systems
     * refuse to be asked again from there. */
    if (res == -EINVAL && op->op == UCM_IO_READV && moved % SECTOR != 0)
        return finish(op, moved);
    if (res < 0 || op->op == UCM_IO_SYNC)
        return finish(op, res);
    if ((size_t)res >= t->left)
        return finish(op, op->res);
    if (res == 0) /* a write that moves nothing and gives no reason would go on for ever */
        return finish(op, op->op == UCM_IO_READV ? moved : -EIO);

    t->left -= (size_t)res;
    op->off += res;
    int err = cut_pieces(op, (size_t)res);
    return err ? finish(op, err) : false;
}

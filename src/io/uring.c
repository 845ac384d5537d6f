/* SPDX-License-Identifier: Apache-2.0 */
/*
 * uring.c - io_uring: one system call for a batch of operations, one to wait for what has ended,
 * none to collect what has ended already, and no threads of ours.
 *
 * submit and reap are called by one thread at a time and own the ring; the only thing others touch
 * is `woken` and the eventfd behind wake.  A read of that eventfd is always in flight while reap
 * waits.  In flight are at most `depth` operations and that read, the completion queue has room for
 * all of them, so it cannot overflow.
 *
 * A buffered write goes to a thread of the kernel's on most file systems, which costs more than the
 * write: one that is said to be brief is done on the spot.
 *
 * What is put into the submission queue but not yet seen by the kernel (the rest of a short
 * transfer, the next read of the eventfd) goes along with the next system call.
 */
#include "io/io.h"

#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { CQES = 64 };

struct uring {
    struct io_uring ring;
    int wake_fd;
    uint64_t wake_count; /* where the read of wake_fd goes */
    bool armed;          /* that read is in flight */
    bool unsent;         /* entries the kernel has not seen */
    _Atomic bool woken;
    unsigned depth, in_flight;
    struct ucmi_io_list ended; /* done on the spot */
};

static const unsigned char needed[] = {IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC,
                                       IORING_OP_READ};

static int probe(struct io_uring *ring, char *why, size_t why_len)
{
    if (!(ring->features & IORING_FEAT_EXT_ARG) || !(ring->features & IORING_FEAT_NODROP))
        return ucmi_fail(why, why_len, -ENOTSUP,
                         "this kernel's io_uring is too old, 5.11 is needed");
    struct io_uring_probe *p = io_uring_get_probe_ring(ring);
    if (!p)
        return ucmi_fail(why, why_len, -ENOTSUP, "its operations cannot be asked for");
    int err = 0;
    for (size_t i = 0; i < ARRAY_LEN(needed) && !err; i++)
        if (!io_uring_opcode_supported(p, needed[i]))
            err = ucmi_fail(why, why_len, -ENOTSUP, "operation %u is missing", needed[i]);
    io_uring_free_probe(p);
    return err;
}

/* COOP_TASKRUN (5.19): a completion does not interrupt the thread that submitted.  DEFER_TASKRUN
 * costs the same CPU per byte within what can be measured, and would tie the ring to one thread. */
static int make_ring(struct io_uring *ring, unsigned entries)
{
    int err =
        io_uring_queue_init(entries, ring, IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG);
    return err == -EINVAL ? io_uring_queue_init(entries, ring, 0) : err;
}

static int uring_open(void *io, unsigned depth, char *why, size_t why_len)
{
    struct uring *u = io;
    int err = make_ring(&u->ring, depth + 1); /* and the read of wake_fd */
    if (err)
        return ucmi_fail(why, why_len, err, "%s%s", ucm_strerror(err),
                         err == -EPERM ? " (a seccomp filter, or kernel.io_uring_disabled)" : "");
    err = probe(&u->ring, why, why_len);
    if (!err) {
        u->wake_fd = eventfd(0, EFD_CLOEXEC);
        if (u->wake_fd < 0)
            err = ucmi_fail(why, why_len, -errno, "eventfd: %s", ucm_strerror(errno));
    }
    if (err) {
        io_uring_queue_exit(&u->ring);
        return err;
    }
    u->depth = depth;
    return 0;
}

/* There always is a free entry: the queue has one for each operation in flight and for the wake. */
static void issue(struct uring *u, struct ucm_io *op)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);
    /* -1 would mean the file's own position; what comes before it is refused as in preadv. */
    uint64_t off = (uint64_t)(op->off == -1 ? -2 : op->off);
    switch (op->op) {
    case UCM_IO_READV: io_uring_prep_readv(sqe, op->fd, op->iov, op->niov, off); break;
    case UCM_IO_WRITEV: io_uring_prep_writev(sqe, op->fd, op->iov, op->niov, off); break;
    default: io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC); break;
    }
    io_uring_sqe_set_data(sqe, op);
    u->unsent = true;
}

static void arm(struct uring *u)
{
    if (u->armed)
        return;
    struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);
    io_uring_prep_read(sqe, u->wake_fd, &u->wake_count, sizeof u->wake_count, 0);
    io_uring_sqe_set_data(sqe, NULL);
    u->armed = u->unsent = true;
}

/* What the kernel does not take now (it is short of memory) stays in the queue for the next call.
 */
static void flush(struct uring *u)
{
    if (u->unsent && io_uring_submit(&u->ring) >= 0)
        u->unsent = io_uring_sq_ready(&u->ring) > 0;
}

static void write_now(struct uring *u, struct ucm_io *op)
{
    ssize_t res;
    do
        res = pwritev(op->fd, op->iov, (int)op->niov, op->off);
    while (!ucmi_io_moved(op, res < 0 ? -errno : res));
    ucmi_io_push(&u->ended, op);
}

static int uring_submit(void *io, struct ucm_io **v, unsigned n)
{
    struct uring *u = io;
    n = MIN(n, u->depth - u->in_flight);
    for (unsigned i = 0; i < n; i++) {
        ucmi_io_begin(v[i]);
        if (v[i]->brief && v[i]->op == UCM_IO_WRITEV)
            write_now(u, v[i]);
        else
            issue(u, v[i]);
    }
    u->in_flight += n;
    flush(u);
    return (int)n;
}

/* Takes what has ended, without a system call where there is no need for one. */
static unsigned collect(struct uring *u, struct ucm_io **v, unsigned max)
{
    struct io_uring_cqe *cqes[CQES];
    unsigned n = 0, got;
    while (n < max && u->ended.head)
        v[n++] = ucmi_io_pop(&u->ended);
    do {
        got = io_uring_peek_batch_cqe(&u->ring, cqes, MIN(max - n, CQES));
        for (unsigned i = 0; i < got; i++) {
            struct ucm_io *op = io_uring_cqe_get_data(cqes[i]);
            if (!op)
                u->armed = false;
            else if (ucmi_io_moved(op, cqes[i]->res))
                v[n++] = op;
            else
                issue(u, op);
        }
        io_uring_cq_advance(&u->ring, got);
    } while (got > 0 && n < max);
    u->in_flight -= n;
    return n;
}

static int await(struct uring *u, uint64_t deadline)
{
    struct __kernel_timespec ts, *limit = NULL;
    struct io_uring_cqe *cqe;
    if (deadline != UINT64_MAX) {
        uint64_t now = ucmi_now_ns(), left = deadline > now ? deadline - now : 0;
        ts = (struct __kernel_timespec){.tv_sec = (int64_t)(left / 1000000000u),
                                        .tv_nsec = (int64_t)(left % 1000000000u)};
        limit = &ts;
    }
    arm(u);
    int err = io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, limit, NULL);
    u->unsent = io_uring_sq_ready(&u->ring) > 0;
    return err == -EINTR ? 0 : MIN(err, 0);
}

static int uring_reap(void *io, struct ucm_io **v, unsigned max, int timeout_ms)
{
    struct uring *u = io;
    uint64_t deadline = timeout_ms < 0 ? UINT64_MAX : ucmi_now_ns() + timeout_ms * 1000000ull;
    int err = timeout_ms == 0 ? -ETIME : 0;
    for (;;) {
        unsigned n = collect(u, v, max);
        if (n > 0) {
            flush(u);
            atomic_exchange(&u->woken, false);
            return (int)n;
        }
        if (atomic_exchange(&u->woken, false) || err)
            break;
        err = await(u, deadline);
    }
    flush(u);
    return err == -ETIME ? 0 : err;
}

/* Only the first of several wakes pays for a system call. */
static void uring_wake(void *io)
{
    struct uring *u = io;
    if (!atomic_exchange(&u->woken, true))
        eventfd_write(u->wake_fd, 1);
}

/* The kernel must not write wake_count once that is freed. */
static void uring_close(void *io)
{
    struct uring *u = io;
    struct ucm_io *none[1];
    eventfd_write(u->wake_fd, 1);
    while (u->armed) {
        collect(u, none, 1);
        if (u->armed && await(u, UINT64_MAX) < 0)
            break;
    }
    io_uring_queue_exit(&u->ring);
    close(u->wake_fd);
}

const struct ucm_io_ops ucmi_io_uring = {
    .p = {.kind = "io",
          .name = "io_uring",
          .help = "io_uring: a batch in one system call, no threads",
          .size = sizeof(struct uring)},
    .open = uring_open,
    .close = uring_close,
    .submit = uring_submit,
    .reap = uring_reap,
    .wake = uring_wake,
};

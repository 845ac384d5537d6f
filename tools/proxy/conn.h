/* SPDX-License-Identifier: Apache-2.0 */
/* conn.h - a TCP connection that never blocks: bytes in, bytes out, and a deadline on each. */
#ifndef PROXY_CONN_H
#define PROXY_CONN_H

#include <sys/socket.h>
#include <sys/uio.h>

#include <event2/buffer.h>
#include <event2/event.h>

#include "proxy/bytes.h"

enum { CONN_HIGH = 1 << 20, CONN_LOW = 256 << 10, LOST_S = 30 };

/* In each of these the connection may be freed. */
struct conn_ops {
    void (*readable)(void *arg);      /* there is more in `in`; what is left there is kept */
    void (*drained)(void *arg);       /* `out` has fallen to CONN_LOW, or to nothing */
    void (*gone)(void *arg, int why); /* 0: its end; -ETIMEDOUT; another -errno */
};
struct conn {
    int fd, connecting, error;
    unsigned stall_s; /* so long may a write stand still; at first, connecting */
    struct event *rd, *wr, *quiet;
    unsigned silence_s;
    double heard; /* when something came last */
    struct bytes in;
    char *kept; /* what `in` is of between readable() and readable() */
    struct evbuffer *out;
    const struct conn_ops *ops;
    void *arg;
};

/* What a listener's connections inherit.  A peer whose machine has gone says nothing, for ever: it
 * is taken for lost when it has acknowledged nothing, or read nothing, for so long. */
void conn_options(int fd, unsigned lost_s);
/* Takes the descriptor over, which must not block. */
struct conn *conn_new(struct event_base *base, int fd, unsigned stall_s, const struct conn_ops *ops,
                      void *arg);
/* Begins to connect; NULL when that fails at once. */
struct conn *conn_connect(struct event_base *base, const struct sockaddr *addr, socklen_t len,
                          unsigned stall_s, const struct conn_ops *ops, void *arg);
void conn_free(struct conn *c);
/* Reads; a silence of so many seconds ends it, 0: never. */
void conn_read(struct conn *c, unsigned silence_s);
void conn_pause(struct conn *c);
/* Writes what is in `out`; what is wrong with it comes through `gone`, later. */
void conn_flush(struct conn *c);
/* Writes this after it; only what does not go at once is copied. */
void conn_write(struct conn *c, struct iovec *v, int n);

#endif

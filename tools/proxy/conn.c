/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connections.  Not bufferevents: those register for every write that could be done at once (four
 * system calls a chunk more), and tell an end of the stream only together with what they have not
 * read yet.
 */
#include "proxy/conn.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <unistd.h>

static void on_read(evutil_socket_t fd, short what, void *arg)
{
    static char buf[64 << 10]; /* what is kept is as long as what came, not as what might have */
    struct conn *c = arg;

    if (what & EV_TIMEOUT) {
        c->ops->gone(c->arg, -ETIMEDOUT);
        return;
    }
    ssize_t n = read(fd, buf, sizeof buf);
    if (n > 0) {
        evbuffer_add(c->in, buf, (size_t)n);
        c->ops->readable(c->arg);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
        c->ops->gone(c->arg, n ? -errno : 0);
    }
}

static int finish_connecting(struct conn *c)
{
    socklen_t len = sizeof c->error;

    if (getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &c->error, &len) < 0)
        c->error = errno;
    if (!c->error)
        c->connecting = 0;
    return c->error;
}

static void on_write(evutil_socket_t fd, short what, void *arg)
{
    struct conn *c = arg;

    if (what & EV_TIMEOUT) {
        c->ops->gone(c->arg, -ETIMEDOUT);
        return;
    }
    if (!c->error && c->connecting)
        finish_connecting(c);
    if (!c->error && evbuffer_get_length(c->out) && evbuffer_write(c->out, fd) < 0 &&
        errno != EAGAIN && errno != EINTR)
        c->error = errno;
    if (c->error) {
        c->ops->gone(c->arg, -c->error);
        return;
    }
    size_t left = evbuffer_get_length(c->out);
    if (!left)
        event_del(c->wr);
    if (left <= CONN_LOW)
        c->ops->drained(c->arg);
}

/* A peer whose machine has gone says nothing, for ever: half a minute is enough. */
static void set_options(int fd)
{
    static const struct {
        int level, name, value;
    } options[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},   {SOL_SOCKET, SO_KEEPALIVE, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, 15}, {IPPROTO_TCP, TCP_KEEPINTVL, 5},
        {IPPROTO_TCP, TCP_KEEPCNT, 3},   {IPPROTO_TCP, TCP_USER_TIMEOUT, 30000},
    };
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        setsockopt(fd, options[i].level, options[i].name, &options[i].value,
                   sizeof options[i].value);
}

struct conn *conn_new(struct event_base *base, int fd, unsigned stall_s, const struct conn_ops *ops,
                      void *arg)
{
    struct conn *c = calloc(1, sizeof *c);

    if (!c)
        abort();
    evutil_make_socket_nonblocking(fd);
    set_options(fd);
    *c = (struct conn){.fd = fd, .stall_s = stall_s, .ops = ops, .arg = arg};
    c->in = evbuffer_new();
    c->out = evbuffer_new();
    c->rd = event_new(base, fd, EV_READ | EV_PERSIST, on_read, c);
    c->wr = event_new(base, fd, EV_WRITE | EV_PERSIST, on_write, c);
    if (!c->in || !c->out || !c->rd || !c->wr)
        abort();
    return c;
}

static void await_write(struct conn *c)
{
    struct timeval tv = {.tv_sec = c->stall_s};

    if (!event_pending(c->wr, EV_WRITE, NULL))
        event_add(c->wr, &tv);
}

struct conn *conn_connect(struct event_base *base, const struct sockaddr *addr, socklen_t len,
                          unsigned stall_s, const struct conn_ops *ops, void *arg)
{
    int fd = socket(addr->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return NULL;
    if (connect(fd, addr, len) < 0 && errno != EINPROGRESS) {
        int err = errno;
        close(fd);
        errno = err;
        return NULL;
    }
    struct conn *c = conn_new(base, fd, stall_s, ops, arg);
    c->connecting = 1;
    await_write(c);
    return c;
}

void conn_free(struct conn *c)
{
    event_free(c->rd);
    event_free(c->wr);
    evbuffer_free(c->in);
    evbuffer_free(c->out);
    close(c->fd);
    free(c);
}

void conn_read(struct conn *c, unsigned silence_s)
{
    struct timeval tv = {.tv_sec = silence_s};

    if (!silence_s)
        event_remove_timer(c->rd);
    event_add(c->rd, silence_s ? &tv : NULL);
}

void conn_pause(struct conn *c)
{
    event_del(c->rd);
}

void conn_flush(struct conn *c)
{
    if (c->connecting || event_pending(c->wr, EV_WRITE, NULL))
        return; /* on_write goes on with it */
    if (evbuffer_get_length(c->out) && evbuffer_write(c->out, c->fd) < 0 && errno != EAGAIN &&
        errno != EINTR)
        c->error = errno;
    if (c->error)
        event_active(c->wr, EV_WRITE, 0);
    else if (evbuffer_get_length(c->out))
        await_write(c);
}

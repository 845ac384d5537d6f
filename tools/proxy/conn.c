/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connections.  What comes lies in one buffer for all while its owner is told; what is not taken
 * then gets memory of its own, and so does what cannot be sent at once.
 *
 * Not bufferevents: those register for every write that could be done at once (four system calls a
 * chunk more), and tell an end of the stream only together with what they have not read yet.
 */
#include "proxy/conn.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static struct conn *reading; /* who is told that there is more; NULL when that has freed it */

static double clock_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* `in` and more after it, in memory of its own, as long as it. */
static void keep(struct conn *c, const char *more, size_t n)
{
    char *all = malloc(c->in.len + n);

    if (!all)
        abort();
    memcpy(all, c->in.at, c->in.len);
    memcpy(all + c->in.len, more, n);
    free(c->kept);
    c->kept = all;
    c->in = (struct bytes){all, c->in.len + n};
}

static void on_read(evutil_socket_t fd, short what, void *arg)
{
    static char buf[64 << 10];
    struct conn *c = arg;
    int fresh = !c->in.len;

    ssize_t n = recv(fd, buf, sizeof buf, 0); /* read() has further to go */
    if (n <= 0) {
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            c->error = errno;
        if (n == 0 || c->error)
            c->ops->gone(c->arg, -c->error);
        return;
    }
    c->heard = clock_s();
    if (fresh)
        c->in = (struct bytes){buf, (size_t)n};
    else
        keep(c, buf, (size_t)n);
    reading = c;
    c->ops->readable(c->arg);
    if (!reading)
        return;
    if (!c->in.len) {
        free(c->kept);
        c->kept = NULL;
    } else if (fresh) {
        keep(c, "", 0);
    }
}

/* Each read only notes when it was; here one looks how long ago. */
static void on_quiet(evutil_socket_t fd, short what, void *arg)
{
    struct conn *c = arg;
    double left = c->heard + c->silence_s - clock_s();
    struct timeval tv = {.tv_sec = (time_t)left};

    if (left <= 0) {
        c->ops->gone(c->arg, -ETIMEDOUT);
        return;
    }
    tv.tv_usec = (suseconds_t)((left - (double)tv.tv_sec) * 1e6);
    event_add(c->quiet, &tv);
}

static void await_write(struct conn *c)
{
    struct timeval tv = {.tv_sec = c->stall_s};
    event_add(c->wr, &tv);
}

static void finish_connecting(struct conn *c)
{
    socklen_t len = sizeof c->error;

    if (getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &c->error, &len) < 0)
        c->error = errno;
    if (c->error)
        return;
    c->connecting = 0;
    await_write(c); /* not the time to connect any more */
}

/* A timer that fires is no proof: it may be we who were late, over a prompt of megabytes. */
static int can_write(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLOUT};
    return poll(&p, 1, 0) > 0;
}

static void on_write(evutil_socket_t fd, short what, void *arg)
{
    struct conn *c = arg;

    if ((what & EV_TIMEOUT) && !can_write(fd)) {
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

void conn_options(int fd, unsigned lost_s)
{
    const struct {
        int level, name, value;
    } options[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},
        {SOL_SOCKET, SO_KEEPALIVE, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, 15},
        {IPPROTO_TCP, TCP_KEEPINTVL, 5},
        {IPPROTO_TCP, TCP_USER_TIMEOUT, (int)(lost_s < 1000000 ? lost_s : 1000000) * 1000},
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
    *c = (struct conn){.fd = fd, .stall_s = stall_s, .ops = ops, .arg = arg};
    c->out = evbuffer_new();
    c->rd = event_new(base, fd, EV_READ | EV_PERSIST, on_read, c);
    c->wr = event_new(base, fd, EV_WRITE | EV_PERSIST, on_write, c);
    c->quiet = evtimer_new(base, on_quiet, c);
    if (!c->out || !c->rd || !c->wr || !c->quiet)
        abort();
    return c;
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
    conn_options(fd, LOST_S);
    struct conn *c = conn_new(base, fd, stall_s, ops, arg);
    c->connecting = 1;
    await_write(c);
    return c;
}

void conn_free(struct conn *c)
{
    if (reading == c)
        reading = NULL;
    event_free(c->rd);
    event_free(c->wr);
    event_free(c->quiet);
    evbuffer_free(c->out);
    close(c->fd);
    free(c->kept);
    free(c);
}

void conn_read(struct conn *c, unsigned silence_s)
{
    struct timeval tv = {.tv_sec = silence_s};

    c->silence_s = silence_s;
    c->heard = clock_s();
    event_add(c->rd, NULL);
    if (silence_s)
        event_add(c->quiet, &tv);
    else
        event_del(c->quiet);
}

void conn_pause(struct conn *c)
{
    event_del(c->rd);
    event_del(c->quiet);
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

/* Few bytes are sent as one piece: the kernel takes longer to read a list than we to copy them. */
static ssize_t send_pieces(int fd, struct iovec *v, int n)
{
    static char flat[2048];
    struct msghdr all = {.msg_iov = v, .msg_iovlen = (size_t)n};
    size_t len = 0;

    for (int i = 0; i < n; i++) {
        if (v[i].iov_len > sizeof flat - len)
            return sendmsg(fd, &all, MSG_NOSIGNAL);
        memcpy(flat + len, v[i].iov_base, v[i].iov_len);
        len += v[i].iov_len;
    }
    return send(fd, flat, len, MSG_NOSIGNAL);
}

void conn_write(struct conn *c, struct iovec *v, int n)
{
    ssize_t done = -1;

    if (!c->connecting && !evbuffer_get_length(c->out))
        done = send_pieces(c->fd, v, n);
    size_t skip = done > 0 ? (size_t)done : 0; /* what is wrong, flushing the rest will see too */
    for (int i = 0; i < n; i++) {
        size_t sent = skip < v[i].iov_len ? skip : v[i].iov_len;
        skip -= sent;
        if (sent < v[i].iov_len)
            evbuffer_add(c->out, (char *)v[i].iov_base + sent, v[i].iov_len - sent);
    }
    if (evbuffer_get_length(c->out))
        conn_flush(c);
}

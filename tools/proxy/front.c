/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Clients.  A request must be there as a whole within --client-seconds, head and body within their
 * limits; while its job works, reading goes on so that a client that leaves is noticed.  An answer
 * that the client does not read stops the instance's, and ends the connection after
 * --client-seconds.  When there are
 * --max-connections, those that come wait in the kernel's queue.
 */
#include "proxy/proxy.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#include <event2/listener.h>

enum { MAX_LISTENERS = 8, LINGER_S = 2, MAX_AHEAD = 64 << 10 };
enum state {
    HEAD,
    BODY,
    WORKING,  /* the answer is on its way */
    CLOSING,  /* it ends when all is written ... */
    CUTTING,  /* ... at once */
    LINGERING /* ... when the client has read it: an early close would take it away */
};
struct client {
    struct conn *conn;
    enum state state;
    struct http_head head;
    struct http_body framing;
    struct evbuffer *body;
    struct job *job;
    struct event *timer;
    int local, keep, chunked, processing;
    TAILQ_ENTRY(client) link;
};
static TAILQ_HEAD(, client) clients = TAILQ_HEAD_INITIALIZER(clients);
static struct evconnlistener *listeners[MAX_LISTENERS];
static unsigned nlisteners, nclients;
static struct event *resume;

static void client_process(struct client *c);

unsigned front_clients(void)
{
    return nclients;
}

int client_is_local(const struct client *c)
{
    return c->local;
}

static void client_free(struct client *c)
{
    if (c->job)
        job_cancel(c->job);
    TAILQ_REMOVE(&clients, c, link);
    if (nclients-- == proxy.set.max_connections)
        for (unsigned i = 0; i < nlisteners; i++)
            evconnlistener_enable(listeners[i]);
    http_head_free(&c->head);
    evbuffer_free(c->body);
    event_free(c->timer);
    conn_free(c->conn);
    free(c);
    if (proxy.closing && !nclients)
        event_base_loopbreak(proxy.base);
}

static void set_timer(struct client *c, uint64_t seconds)
{
    struct timeval tv = {.tv_sec = (time_t)seconds};
    event_add(c->timer, &tv);
}

/* ---- answers ---- */

/* Flushes and comes back through `drained`, never from here: callers go on using the client. */
static void end_connection(struct client *c, enum state state)
{
    c->state = state;
    event_del(c->timer);
    conn_flush(c->conn);
    if (!evbuffer_get_length(c->conn->out))
        event_active(c->conn->wr, EV_WRITE, 0);
}

static void answered(struct client *c)
{
    c->job = NULL;
    if (!c->keep || proxy.closing) {
        end_connection(c, CLOSING);
        return;
    }
    conn_flush(c->conn);
    http_head_free(&c->head);
    evbuffer_drain(c->body, evbuffer_get_length(c->body));
    c->state = HEAD;
    set_timer(c, proxy.set.client_s);
    conn_read(c->conn, 0);
    if (!c->processing)
        client_process(c);
}

static void put_status(struct client *c, int status)
{
    proxy.answers[status]++;
    evbuffer_add_printf(c->conn->out, "HTTP/1.1 %d %s\r\n", status, http_reason(status));
}

static void put_end_of_head(struct client *c)
{
    evbuffer_add_printf(c->conn->out, "Connection: %s\r\n\r\n",
                        c->keep && !proxy.closing ? "keep-alive" : "close");
}

void client_reply(struct client *c, int status, const char *type, const char *text)
{
    int is_head = c->head.method && !strcmp(c->head.method, "HEAD");

    put_status(c, status);
    evbuffer_add_printf(c->conn->out, "Content-Type: %s\r\nContent-Length: %zu\r\n", type,
                        strlen(text));
    put_end_of_head(c);
    if (!is_head)
        evbuffer_add(c->conn->out, text, strlen(text));
    answered(c);
}

void client_error(struct client *c, int status, const char *fmt, ...)
{
    char text[600];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    json_t *o =
        json_pack("{s:{s:s,s:s,s:i}}", "error", "message", text, "type",
                  status < 500 ? "invalid_request_error" : "upstream_error", "code", status);
    char *body = json_dumps(o, 0);
    say(status < 500 ? 'I' : 'W', "answered %d: %s", status, text);
    client_reply(c, status, "application/json", body ? body : "{}");
    free(body);
    json_decref(o);
}

/* Refuses what is not a request; where the next one would begin nobody knows. */
static void client_refuse(struct client *c, int status, const char *why)
{
    count(refused_requests);
    c->keep = 0;
    client_error(c, status, "%s", why);
}

void client_begin(struct client *c, const struct http_head *h, const char *request_id)
{
    struct evbuffer *out = c->conn->out;
    const char *length = http_field(h, "content-length");

    put_status(c, h->status);
    for (unsigned i = 0; i < h->nfields; i++)
        if (!http_is_hop_by_hop(h, h->fields[i].name))
            evbuffer_add_printf(out, "%s: %s\r\n", h->fields[i].name, h->fields[i].value);
    if (!http_field(h, "x-request-id"))
        evbuffer_add_printf(out, "X-Request-Id: %s\r\n", request_id);
    c->chunked = h->framing >= HTTP_CHUNKED && c->head.minor;
    if (c->chunked)
        evbuffer_add_printf(out, "Transfer-Encoding: chunked\r\n");
    else if (h->framing >= HTTP_CHUNKED)
        c->keep = 0;
    else if (length && h->status != 204)
        evbuffer_add_printf(out, "Content-Length: %s\r\n", length);
    put_end_of_head(c);
}

void client_more(struct client *c, const char *data, size_t len)
{
    char size[HTTP_SIZE_LINE];
    struct iovec v[] = {{size, 0}, {(char *)data, len}, {"\r\n", 2}};

    if (c->chunked)
        v[0].iov_len = http_put_size(size, len);
    conn_write(c->conn, c->chunked ? v : &v[1], c->chunked ? 3 : 1);
    if (evbuffer_get_length(c->conn->out) > CONN_HIGH)
        job_pause(c->job, 1);
}

void client_end(struct client *c)
{
    if (c->chunked)
        evbuffer_add(c->conn->out, "0\r\n\r\n", 5);
    answered(c);
}

void client_cut(struct client *c, const char *last_words)
{
    struct linger reset = {.l_onoff = 1};

    c->job = NULL;
    if (c->chunked && last_words)
        evbuffer_add_printf(c->conn->out, "%zx\r\n%s\r\n", strlen(last_words), last_words);
    if (!c->chunked && !c->head.minor) /* its end would look like the answer's */
        setsockopt(c->conn->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    end_connection(c, CUTTING);
}

/* ---- requests ---- */

static int take_head(struct client *c)
{
    char *text;
    size_t len;
    int rc = http_take_head(&c->conn->in, proxy.set.max_header, &text, &len);

    if (rc == 0)
        return 0;
    c->chunked = 0;
    if (rc < 0) {
        client_refuse(c, 431, "the head is too long");
        return 0;
    }
    int status = http_parse_request(&c->head, text, len);
    if (status) {
        client_refuse(c, status, "the head is not HTTP/1.1 as it should be");
        return 0;
    }
    c->keep = c->head.keep;
    const char *expect = http_field(&c->head, "expect");
    if (c->head.framing == HTTP_LENGTH && c->head.length > proxy.set.max_body) {
        client_refuse(c, 413, "the body is too long");
        return 0;
    }
    if (expect && !strcasecmp(expect, "100-continue") && c->head.framing != HTTP_EMPTY) {
        evbuffer_add_printf(c->conn->out, "HTTP/1.1 100 Continue\r\n\r\n");
        conn_flush(c->conn);
    }
    http_body_init(&c->framing, &c->head);
    c->state = BODY;
    return 1;
}

static void keep_body(void *arg, const char *data, size_t len)
{
    evbuffer_add(arg, data, len);
}

static int take_body(struct client *c)
{
    int rc = http_body_take(&c->framing, &c->conn->in, keep_body, c->body);

    if (evbuffer_get_length(c->body) > proxy.set.max_body)
        client_refuse(c, 413, "the body is too long");
    else if (rc < 0)
        client_refuse(c, 400, "the body is not in chunks as it should be");
    else if (rc > 0)
        return 1;
    return 0;
}

static void client_process(struct client *c)
{
    c->processing = 1;
    while (c->state == HEAD || c->state == BODY) {
        if (c->state == HEAD && !take_head(c))
            break;
        if (!take_body(c))
            break;
        c->state = WORKING;
        event_del(c->timer);
        count(requests);
        if (admin_serve(c, &c->head, c->body))
            continue;
        c->job = job_new(c, &c->head, c->body);
        job_start(c->job);
    }
    c->processing = 0;
}

/* ---- the connection ---- */

static void client_readable(void *arg)
{
    struct client *c = arg;
    struct bytes *in = &c->conn->in;

    if (c->state >= CLOSING)
        bytes_take(in, in->len);
    else if (c->state != WORKING)
        client_process(c);
    else if (in->len > MAX_AHEAD)
        conn_pause(c->conn);
}

static void client_drained(void *arg)
{
    struct client *c = arg;

    if (c->job)
        job_pause(c->job, 0);
    if (evbuffer_get_length(c->conn->out) || c->state < CLOSING)
        return;
    if (c->state == CUTTING) {
        client_free(c);
        return;
    }
    if (c->state == CLOSING) {
        c->state = LINGERING;
        shutdown(c->conn->fd, SHUT_WR);
        conn_read(c->conn, 0);
        set_timer(c, LINGER_S);
    }
}

static void client_gone(void *arg, int why)
{
    client_free(arg);
}

static void on_timer(evutil_socket_t fd, short what, void *arg)
{
    struct client *c = arg;

    if (c->state == BODY || (c->state == HEAD && c->conn->in.len))
        client_refuse(c, 408, "the request took too long to come");
    else
        client_free(c);
}

static const struct conn_ops client_ops = {client_readable, client_drained, client_gone};

static int is_local(const struct sockaddr *a)
{
    const struct sockaddr_in *v4 = (const struct sockaddr_in *)a;
    const struct in6_addr *v6 = &((const struct sockaddr_in6 *)a)->sin6_addr;

    if (a->sa_family == AF_INET)
        return ntohl(v4->sin_addr.s_addr) >> 24 == 127;
    return IN6_IS_ADDR_LOOPBACK(v6) || (IN6_IS_ADDR_V4MAPPED(v6) && v6->s6_addr[12] == 127);
}

static void on_accept(struct evconnlistener *l, evutil_socket_t fd, struct sockaddr *peer, int len,
                      void *arg)
{
    struct client *c = calloc(1, sizeof *c);

    if (!c)
        abort();
    c->local = is_local(peer);
    c->conn = conn_new(proxy.base, fd, (unsigned)proxy.set.client_s, &client_ops, c);
    c->body = evbuffer_new();
    c->timer = evtimer_new(proxy.base, on_timer, c);
    if (!c->body || !c->timer)
        abort();
    TAILQ_INSERT_TAIL(&clients, c, link);
    if (++nclients >= proxy.set.max_connections)
        for (unsigned i = 0; i < nlisteners; i++)
            evconnlistener_disable(listeners[i]);
    set_timer(c, proxy.set.client_s);
    conn_read(c->conn, 0);
}

static void on_resume(evutil_socket_t fd, short what, void *arg)
{
    for (unsigned i = 0; i < nlisteners; i++)
        if (nclients < proxy.set.max_connections)
            evconnlistener_enable(listeners[i]);
}

/* No descriptors left, say: not asked again at once, for it would be the same. */
static void on_accept_error(struct evconnlistener *l, void *arg)
{
    struct timeval tv = {.tv_usec = 100000};

    say('W', "cannot accept a connection: %s", strerror(errno));
    for (unsigned i = 0; i < nlisteners; i++)
        evconnlistener_disable(listeners[i]);
    event_add(resume, &tv);
}

static unsigned bound_port(struct evconnlistener *l)
{
    struct sockaddr_storage a;
    socklen_t len = sizeof a;

    getsockname(evconnlistener_get_fd(l), (struct sockaddr *)&a, &len);
    return ntohs(a.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&a)->sin6_port
                                         : ((struct sockaddr_in *)&a)->sin_port);
}

/* Is it in the list a second time?  Two lines of /etc/hosts are enough. */
static int repeats(const struct addrinfo *all, const struct addrinfo *a)
{
    for (; all != a; all = all->ai_next)
        if (all->ai_addrlen == a->ai_addrlen && !memcmp(all->ai_addr, a->ai_addr, a->ai_addrlen))
            return 1;
    return 0;
}

int front_listen(const char *host, const char *port)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *all;
    unsigned flags = LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC | LEV_OPT_REUSEABLE;
    int rc = getaddrinfo(host, port, &hints, &all), err = 0;

    if (rc)
        return cannot("--host %s --port %s: %s", host, port, gai_strerror(rc));
    resume = evtimer_new(proxy.base, on_resume, NULL);
    for (struct addrinfo *a = all; a && nlisteners < MAX_LISTENERS; a = a->ai_next) {
        if (repeats(all, a))
            continue;
        struct evconnlistener *l = evconnlistener_new_bind(proxy.base, on_accept, NULL, flags, 1024,
                                                           a->ai_addr, (int)a->ai_addrlen);
        if (!l) {
            err = errno;
            if (err == EADDRINUSE) /* some clients would get to somebody else, by the same name */
                break;
            continue;
        }
        conn_options(evconnlistener_get_fd(l), (unsigned)proxy.set.client_s);
        evconnlistener_set_error_cb(l, on_accept_error);
        listeners[nlisteners++] = l;
        say('I', "listening on http://%s:%u", host, bound_port(l));
        if (!strcmp(port, "0"))
            break; /* the next would get another one */
    }
    freeaddrinfo(all);
    return nlisteners && err != EADDRINUSE
               ? 0
               : cannot("--host %s --port %s: %s", host, port, strerror(err));
}

void front_close(void)
{
    struct client *c, *next;

    for (unsigned i = 0; i < nlisteners; i++)
        evconnlistener_free(listeners[i]);
    nlisteners = 0;
    proxy.closing = 1;
    for (c = TAILQ_FIRST(&clients); c; c = next) {
        next = TAILQ_NEXT(c, link);
        if (c->state == HEAD)
            client_free(c);
    }
    if (!nclients)
        event_base_loopbreak(proxy.base);
}

void front_end(void)
{
    while (!TAILQ_EMPTY(&clients))
        client_free(TAILQ_FIRST(&clients));
    event_free(resume);
}

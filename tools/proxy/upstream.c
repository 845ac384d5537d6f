/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Instances, and calls to them: one HTTP exchange each, over a connection kept from before where
 * there is one.  An instance that refuses, or fails three times in a row, is down until a health
 * check gets through; every call has a deadline on connecting, on each write and on each silence.
 */
#include "proxy/proxy.h"

#include <errno.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STRIKES = 3, IDLE_S = 4 /* uvicorn closes after 5 */, PROBE_S = 5 };

struct idle {
    struct conn *conn;
    struct instance *at;
    TAILQ_ENTRY(idle) link;
};
struct call {
    struct instance *at;
    struct conn *conn;
    struct evbuffer *head, *body; /* of the request */
    struct http_head answer;
    struct http_body framing;
    int has_answer, flags, reused, paused;
    unsigned first, addr, tries; /* of its addresses */
    unsigned timeout_s;
    struct event *later; /* when it failed before it began */
    enum outcome outcome;
    const struct call_ops *ops;
    void *arg;
};
static const struct conn_ops idle_ops, call_conn_ops;

const char *outcome_text(enum outcome outcome)
{
    static const char *const texts[] = {"no error",
                                        "it refused the connection",
                                        "it closed the connection",
                                        "its answer is no HTTP",
                                        "it was silent for too long",
                                        "GET /health answers an error",
                                        "its answer is empty"};
    return texts[outcome];
}

/* ---- idle connections ---- */

static void idle_drop(struct idle *e)
{
    TAILQ_REMOVE(&e->at->idle, e, link);
    conn_free(e->conn);
    free(e);
}

static void idle_readable(void *arg)
{
    idle_drop(arg); /* nobody has asked it anything */
}

static void idle_gone(void *arg, int why)
{
    idle_drop(arg);
}

static void idle_drained(void *arg)
{
}

static const struct conn_ops idle_ops = {idle_readable, idle_drained, idle_gone};

/* There are never more than were in use at a time in the last seconds. */
static void idle_keep(struct instance *i, struct conn *conn)
{
    struct idle *e = i->removed ? NULL : malloc(sizeof *e);

    if (!e) {
        conn_free(conn);
        return;
    }
    *e = (struct idle){.conn = conn, .at = i};
    conn->ops = &idle_ops;
    conn->arg = e;
    TAILQ_INSERT_HEAD(&i->idle, e, link);
    conn_read(conn, IDLE_S);
}

static struct conn *idle_take(struct instance *i)
{
    struct idle *e = TAILQ_FIRST(&i->idle);

    if (!e)
        return NULL;
    struct conn *conn = e->conn;
    TAILQ_REMOVE(&i->idle, e, link);
    free(e);
    return conn;
}

/* ---- the state of an instance ---- */

static void instance_free_if_unused(struct instance *i)
{
    if (!i->removed || i->users)
        return;
    while (!TAILQ_EMPTY(&i->idle))
        idle_drop(TAILQ_FIRST(&i->idle));
    if (i->timer)
        event_free(i->timer);
    if (i->bootstrap) {
        i->bootstrap->removed = 1;
        instance_free_if_unused(i->bootstrap);
    }
    free(i);
}

static void instance_ok(struct instance *i)
{
    i->strikes = 0;
    if (i->seat.state != SEAT_DOWN)
        return;
    i->seat.state = SEAT_UP;
    say('I', "%s is up again", i->name);
}

static void instance_failed(struct instance *i, enum outcome outcome)
{
    i->failures++;
    if (++i->strikes < STRIKES && outcome != CALL_REFUSED)
        return;
    if (i->seat.state != SEAT_UP ||
        i->role == ROLES) /* a bootstrap server has no choice beside it */
        return;
    i->seat.state = SEAT_DOWN;
    say('W', "%s is down: %s; it gets requests again when GET /health gets through", i->name,
        outcome_text(outcome));
}

void instance_hold(struct instance *i, uint64_t tokens)
{
    i->users++;
    i->jobs++;
    i->seat.tokens += tokens;
}

void instance_release(struct instance *i, uint64_t tokens)
{
    i->seat.tokens -= tokens;
    i->jobs--;
    i->users--;
    instance_free_if_unused(i);
}

/* ---- calls ---- */

static void call_drop_conn(struct call *c)
{
    if (c->conn)
        conn_free(c->conn);
    c->conn = NULL;
}

static void call_free(struct call *c)
{
    struct instance *i = c->at;

    call_drop_conn(c);
    if (c->later)
        event_free(c->later);
    http_head_free(&c->answer);
    free(c);
    i->users--;
    instance_free_if_unused(i);
}

void call_cancel(struct call *c)
{
    call_free(c);
}

static void call_finish(struct call *c, enum outcome outcome)
{
    const struct call_ops *ops = c->ops;
    void *arg = c->arg;

    if (outcome == CALL_OK)
        instance_ok(c->at);
    else
        instance_failed(c->at, outcome);
    call_free(c);
    ops->done(arg, outcome);
}

static void on_later(evutil_socket_t fd, short what, void *arg)
{
    struct call *c = arg;
    call_finish(c, c->outcome);
}

static void call_send(struct call *c)
{
    struct evbuffer_iovec v;

    if (evbuffer_peek(c->head, -1, NULL, &v, 1) == 1)
        evbuffer_add(c->conn->out, v.iov_base, v.iov_len);
    if (c->body)
        evbuffer_add_buffer_reference(c->conn->out, c->body);
    c->conn->stall_s = c->timeout_s;
    conn_read(c->conn, c->timeout_s);
    conn_flush(c->conn);
}

/* Connects to the next address of the instance; 0, or no more of them. */
static int call_connect(struct call *c)
{
    struct instance *i = c->at;

    while (c->tries < i->naddrs) {
        c->addr = (c->first + c->tries++) % i->naddrs;
        c->conn = conn_connect(proxy.base, (struct sockaddr *)&i->addrs[c->addr], i->lens[c->addr],
                               (unsigned)proxy.set.connect_s, &call_conn_ops, c);
        if (!c->conn)
            continue;
        call_send(c);
        return 0;
    }
    return -1;
}

struct call *call_start(struct instance *i, struct evbuffer *head, struct evbuffer *body, int flags,
                        unsigned timeout_s, const struct call_ops *ops, void *arg)
{
    struct timeval at_once = {0};
    struct call *c = calloc(1, sizeof *c);

    if (!c)
        abort();
    *c = (struct call){.at = i,
                       .head = head,
                       .body = body,
                       .flags = flags,
                       .timeout_s = timeout_s,
                       .ops = ops,
                       .arg = arg,
                       .first = i->good,
                       .addr = i->good};
    i->users++;
    i->calls++;
    evbuffer_pullup(head, -1);
    c->conn = flags & CALL_ONCE ? NULL : idle_take(i);
    if (c->conn) {
        c->reused = 1;
        c->conn->ops = &call_conn_ops;
        c->conn->arg = c;
        call_send(c);
    } else if (call_connect(c) < 0) {
        c->outcome = CALL_REFUSED;
        c->later = evtimer_new(proxy.base, on_later, c);
        event_add(c->later, &at_once);
    }
    return c;
}

void call_pause(struct call *c, int pause)
{
    if (!c->conn || c->paused == pause)
        return;
    c->paused = pause;
    if (pause)
        conn_pause(c->conn);
    else
        conn_read(c->conn, c->timeout_s);
}

static void call_complete(struct call *c)
{
    if (c->answer.keep && !c->conn->in.len && !evbuffer_get_length(c->conn->out) &&
        c->framing.framing != HTTP_TO_END && !(c->flags & CALL_ONCE)) {
        idle_keep(c->at, c->conn);
        c->conn = NULL;
    }
    call_finish(c, CALL_OK);
}

/* Takes the answer's head: 1 taken, 0 not there yet, -1 the call is no more. */
static int call_take_head(struct call *c)
{
    char *text;
    size_t len;
    int rc = http_take_head(&c->conn->in, proxy.set.max_header, &text, &len);

    if (rc == 0)
        return 0;
    if (rc < 0 || http_parse_response(&c->answer, text, len, c->flags & CALL_HEAD) < 0) {
        call_finish(c, CALL_GARBLED);
        return -1;
    }
    if (c->answer.status < 200) { /* 100 Continue and the like */
        http_head_free(&c->answer);
        return call_take_head(c);
    }
    c->has_answer = 1;
    c->at->good = c->addr;
    http_body_init(&c->framing, &c->answer);
    return c->ops->head(c->arg, &c->answer) ? -1 : 1;
}

static void call_readable(void *arg)
{
    struct call *c = arg;

    if (!c->has_answer && call_take_head(c) <= 0)
        return;
    int rc = http_body_take(&c->framing, &c->conn->in, c->ops->body, c->arg);
    if (rc < 0)
        call_finish(c, CALL_GARBLED);
    else if (rc > 0)
        call_complete(c);
}

static void call_drained(void *arg)
{
    /* From here on its silence counts, not the time it took to send. */
    struct call *c = arg;
    if (!c->paused)
        conn_read(c->conn, c->timeout_s);
}

static void call_gone(void *arg, int why)
{
    struct call *c = arg;
    int connecting = c->conn->connecting, timeout = why == -ETIMEDOUT && !c->conn->error;

    if (why == 0 && c->has_answer && c->framing.framing == HTTP_TO_END) {
        call_finish(c, CALL_OK);
        return;
    }
    call_drop_conn(c);
    if (connecting && call_connect(c) == 0)
        return;
    if (c->reused && !c->has_answer && !timeout) {
        c->reused = 0;
        count(stale);
        if (call_connect(c) == 0)
            return;
        connecting = 1;
    }
    call_finish(c, connecting ? CALL_REFUSED : timeout ? CALL_TIMEOUT : CALL_BROKEN);
}

static const struct conn_ops call_conn_ops = {call_readable, call_drained, call_gone};

/* ---- health ---- */

static int probe_head(void *arg, struct http_head *h)
{
    struct instance *i = arg;

    if (h->status < 500)
        return 0;
    call_cancel(i->probe);
    i->probe = NULL;
    instance_failed(i, CALL_UNWELL);
    return 1;
}

static void probe_body(void *arg, const char *data, size_t len)
{
}

static void probe_done(void *arg, enum outcome outcome)
{
    struct instance *i = arg;
    i->probe = NULL;
}

static void on_probe(evutil_socket_t fd, short what, void *arg)
{
    static const struct call_ops ops = {probe_head, probe_body, probe_done};
    static struct evbuffer *head;
    struct instance *i = arg;

    if (i->probe)
        return; /* it has a deadline of its own */
    if (!head) {
        head = evbuffer_new();
        evbuffer_add_printf(head, "GET /health HTTP/1.1\r\nHost: instance\r\n\r\n");
    }
    i->probe = call_start(i, head, NULL, 0, PROBE_S, &ops, i);
}

/* ---- the list ---- */

static int resolve(struct instance *i, const char *host, const char *port, int lookup, char *why,
                   size_t size)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = lookup ? 0 : AI_NUMERICHOST},
                    *all;
    char *end;
    unsigned long number = strtoul(port, &end, 10);

    if (!number || number > 65535 || *end) {
        snprintf(why, size, "%s: not a port", port);
        return -1;
    }
    int rc = getaddrinfo(host, port, &hints, &all);
    if (rc) {
        snprintf(why, size, "%s: %s%s", host, gai_strerror(rc),
                 lookup ? "" : "; names are looked up at the start only: give an address");
        return -1;
    }
    for (int v4 = 1; v4 >= 0; v4--) /* servers on "localhost" are mostly on 127.0.0.1 */
        for (struct addrinfo *a = all; a && i->naddrs < 4; a = a->ai_next)
            if ((a->ai_family == AF_INET) == v4) {
                memcpy(&i->addrs[i->naddrs], a->ai_addr, a->ai_addrlen);
                i->lens[i->naddrs++] = a->ai_addrlen;
            }
    freeaddrinfo(all);
    return 0;
}

static struct instance *instance_new(enum role role, const char *host, const char *port, int lookup,
                                     char *why, size_t size)
{
    struct instance *i = calloc(1, sizeof *i);

    if (!i)
        abort();
    i->role = role;
    TAILQ_INIT(&i->idle);
    snprintf(i->name, sizeof i->name, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
    i->seat.id = balance_hash(0, i->name, strlen(i->name));
    if (resolve(i, host, port, lookup || !strcmp(host, "localhost"), why, size) == 0)
        return i;
    free(i);
    return NULL;
}

struct instance *instance_find(enum role role, const char *name)
{
    for (unsigned n = 0; n < proxy.pools[role].n; n++)
        if (!strcmp(proxy.pools[role].v[n]->name, name))
            return proxy.pools[role].v[n];
    return NULL;
}

struct instance *instance_add(enum role role, const char *host, const char *port,
                              const char *bootstrap_port, int lookup, char *why, size_t size)
{
    struct pool *p = &proxy.pools[role];
    struct timeval every = {.tv_sec = (time_t)proxy.set.health_s};

    if (p->n == COUNT_OF(p->v)) {
        snprintf(why, size, "there are %u already", p->n);
        return NULL;
    }
    struct instance *i = instance_new(role, host, port, lookup, why, size);
    if (!i)
        return NULL;
    if (instance_find(role, i->name)) {
        snprintf(why, size, "%s is there already", i->name);
        free(i);
        return NULL;
    }
    if (bootstrap_port &&
        !(i->bootstrap = instance_new(ROLES, host, bootstrap_port, lookup, why, size))) {
        free(i);
        return NULL;
    }
    i->timer = event_new(proxy.base, -1, EV_PERSIST, on_probe, i);
    if (!i->timer)
        abort();
    event_add(i->timer, &every);
    p->v[p->n++] = i;
    return i;
}

void instance_remove(struct instance *i)
{
    struct pool *p = &proxy.pools[i->role];

    for (unsigned n = 0; n < p->n; n++)
        if (p->v[n] == i)
            memmove(&p->v[n], &p->v[n + 1], (--p->n - n) * sizeof *p->v);
    i->seat.state = SEAT_SHUT;
    i->removed = 1;
    if (i->timer)
        event_del(i->timer);
    i->users++; /* while its probe goes */
    if (i->probe)
        call_cancel(i->probe);
    i->probe = NULL;
    i->users--;
    instance_free_if_unused(i);
}

void instances_close(void)
{
    for (int r = 0; r < ROLES; r++)
        while (proxy.pools[r].n)
            instance_remove(proxy.pools[r].v[0]);
}

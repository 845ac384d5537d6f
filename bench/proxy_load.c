/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The two ends of a proxy, for bench/proxy: engines that do nothing, and clients that count.
 *
 *   proxy_load engines      says the ports of a prefiller and a decoder; ends with stdin
 *   proxy_load clients PORT ask N REQUESTS SPREAD_MS
 *   proxy_load clients PORT stream N CHUNKS SPREAD_MS
 *
 * A prompt with "stream":true gets max_tokens events, one every 20 ms; all else gets a short
 * answer.  N clients begin one after the other within SPREAD_MS.  One thread with an event loop,
 * over the proxy's own connections and HTTP.
 */
#include "proxy/conn.h"
#include "proxy/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include <event2/listener.h>

enum { PACE_MS = 20, PATIENCE_S = 120, PROMPT = 1024, MAX_HEAD = 64 << 10 };
static const char event[] = "data: {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"choices\":[{"
                            "\"index\":0,\"text\":\" word\"}]}\n\n";
static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                             "Content-Length: 32\r\n\r\n{\"choices\":[{\"text\":\"a word\"}]}\n";
static struct event_base *base;

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static struct timeval after_ms(unsigned ms)
{
    return (struct timeval){.tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000};
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* One side of an exchange of a connection: its head, then its body. */
struct message {
    int has_head;
    struct http_head head;
    struct http_body body;
};

/* Takes what is there of it: 1 complete, 0 there is more to come. */
static int take(struct message *m, struct conn *c, int is_answer, http_take *body, void *arg)
{
    char *text;
    size_t len;

    if (!m->has_head) {
        int rc = http_take_head(&c->in, MAX_HEAD, &text, &len);
        if (rc == 0)
            return 0;
        if (rc < 0 || (is_answer ? http_parse_response(&m->head, text, len, 0)
                                 : http_parse_request(&m->head, text, len)))
            return -EPROTO;
        http_body_init(&m->body, &m->head);
        m->has_head = 1;
    }
    return http_body_take(&m->body, &c->in, body, arg);
}

static void message_free(struct message *m)
{
    http_head_free(&m->head);
    m->has_head = 0;
}

/* ---- engines ---- */

struct engine {
    struct conn *conn;
    struct message request;
    struct evbuffer *body;
    unsigned left; /* events to be sent */
    struct event *pace;
};

static void engine_end(struct engine *e)
{
    message_free(&e->request);
    evbuffer_free(e->body);
    event_free(e->pace);
    conn_free(e->conn);
    free(e);
}

static void keep(void *arg, const char *data, size_t len)
{
    evbuffer_add(arg, data, len);
}

static void on_pace(evutil_socket_t fd, short what, void *arg)
{
    struct engine *e = arg;
    struct timeval pace = after_ms(PACE_MS);

    evbuffer_add_printf(e->conn->out, "%zx\r\n%s\r\n%s", sizeof event - 1, event,
                        --e->left ? "" : "0\r\n\r\n");
    if (e->left)
        event_add(e->pace, &pace);
    conn_flush(e->conn);
}

/* What comes after a name in JSON. */
static const char *value(const char *json, const char *name)
{
    const char *at = strstr(json, name);
    return at ? at + strlen(name) + strspn(at + strlen(name), ": ") : "";
}

static void engine_readable(void *arg)
{
    struct engine *e = arg;
    int rc;

    while ((rc = take(&e->request, e->conn, 0, keep, e->body)) > 0) {
        evbuffer_add(e->body, "", 1);
        const char *json = (const char *)evbuffer_pullup(e->body, -1);
        e->left =
            *value(json, "\"stream\"") == 't' ? (unsigned)atoi(value(json, "\"max_tokens\"")) : 0;
        evbuffer_drain(e->body, evbuffer_get_length(e->body));
        message_free(&e->request);
        if (e->left) {
            evbuffer_add_printf(e->conn->out, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream"
                                              "\r\nTransfer-Encoding: chunked\r\n\r\n");
            on_pace(-1, 0, e);
        } else {
            evbuffer_add(e->conn->out, answer, sizeof answer - 1);
            conn_flush(e->conn);
        }
    }
    if (rc < 0)
        engine_end(e);
}

static void engine_gone(void *arg, int why)
{
    engine_end(arg);
}

static void drained(void *arg)
{
}

static void on_accept(struct evconnlistener *l, evutil_socket_t fd, struct sockaddr *a, int len,
                      void *arg)
{
    static const struct conn_ops ops = {engine_readable, drained, engine_gone};
    struct engine *e = calloc(1, sizeof *e);

    if (!e)
        die("engine");
    e->conn = conn_new(base, fd, PATIENCE_S, &ops, e);
    e->body = evbuffer_new();
    e->pace = evtimer_new(base, on_pace, e);
    conn_read(e->conn, 0);
}

static void on_stdin(evutil_socket_t fd, short what, void *arg)
{
    event_base_loopbreak(base);
}

static void engines(void)
{
    for (int i = 0; i < 2; i++) {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t len = sizeof a;
        struct evconnlistener *l = evconnlistener_new_bind(
            base, on_accept, NULL, LEV_OPT_CLOSE_ON_EXEC, 4096, (struct sockaddr *)&a, sizeof a);
        if (!l || getsockname(evconnlistener_get_fd(l), (struct sockaddr *)&a, &len))
            die("listen");
        conn_options(evconnlistener_get_fd(l), PATIENCE_S);
        printf("%u\n", ntohs(a.sin_port));
    }
    fflush(stdout);
    event_add(event_new(base, 0, EV_READ, on_stdin, NULL), NULL);
    event_base_dispatch(base);
}

/* ---- clients ---- */

static struct {
    struct sockaddr_in to;
    char request[PROMPT + 512];
    unsigned live, failed;
    uint64_t left; /* requests to be made, by whoever is free */
    uint64_t bytes, answers;
    double *first; /* seconds to the first byte of the body, of each answer */
} all;

struct client {
    struct conn *conn;
    struct message answer;
    struct event *start;
    double began;
    int first;
};

static void client_end(struct client *c, int failed)
{
    all.failed += (unsigned)failed;
    message_free(&c->answer);
    if (c->conn)
        conn_free(c->conn);
    event_free(c->start);
    free(c);
    if (!--all.live)
        event_base_loopbreak(base);
}

static void client_ask(struct client *c)
{
    all.left--;
    c->first = 1;
    c->began = now_s();
    evbuffer_add(c->conn->out, all.request, strlen(all.request));
    conn_flush(c->conn);
}

static void count_body(void *arg, const char *data, size_t len)
{
    struct client *c = arg;

    all.bytes += len;
    if (c->first)
        all.first[all.answers++] = now_s() - c->began;
    c->first = 0;
}

static void client_readable(void *arg)
{
    struct client *c = arg;
    int rc = take(&c->answer, c->conn, 1, count_body, c);

    if (rc == 0)
        return;
    int good = rc > 0 && c->answer.head.status == 200 && !c->first, keeps = c->answer.head.keep;
    message_free(&c->answer);
    if (!good || !all.left || !keeps)
        client_end(c, !good);
    else
        client_ask(c);
}

static void client_gone(void *arg, int why)
{
    client_end(arg, 1);
}

static void on_start(evutil_socket_t fd, short what, void *arg)
{
    static const struct conn_ops ops = {client_readable, drained, client_gone};
    struct client *c = arg;

    if (!all.left) {
        client_end(c, 0);
        return;
    }
    c->conn = conn_connect(base, (struct sockaddr *)&all.to, sizeof all.to, PATIENCE_S, &ops, c);
    if (!c->conn)
        die("connect");
    client_ask(c);
    conn_read(c->conn, PATIENCE_S);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void clients(unsigned port, int streams, unsigned n, uint64_t count, unsigned spread_ms)
{
    uint64_t requests = streams ? n : count;
    char body[PROMPT + 256], prompt[PROMPT + 1];

    memset(prompt, 'x', PROMPT);
    prompt[PROMPT] = '\0';
    snprintf(body, sizeof body,
             "{\"model\":\"m\",\"max_tokens\":%u,\"stream\":%s,\"prompt\":\"%s\"}",
             streams ? (unsigned)count : 20, streams ? "true" : "false", prompt);
    snprintf(all.request, sizeof all.request,
             "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
             "Content-Length: %zu\r\n\r\n%s",
             strlen(body), body);
    all.to = (struct sockaddr_in){.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    all.live = n;
    all.left = requests;
    all.first = calloc(requests, sizeof *all.first);
    double began = now_s();
    for (unsigned i = 0; i < n; i++) {
        struct client *c = calloc(1, sizeof *c);
        struct timeval at = after_ms(spread_ms * i / n);
        if (!c || !all.first)
            die("client");
        c->start = evtimer_new(base, on_start, c);
        event_add(c->start, &at);
    }
    event_base_dispatch(base);
    qsort(all.first, all.answers, sizeof *all.first, ascending);
    printf("{\"seconds\": %.6f, \"answers\": %llu, \"failed\": %u, \"bytes\": %llu, "
           "\"p50\": %.6f, \"p99\": %.6f}\n",
           now_s() - began, (unsigned long long)all.answers, all.failed,
           (unsigned long long)all.bytes, all.first[all.answers / 2],
           all.first[all.answers * 99 / 100]);
}

int main(int argc, char **argv)
{
    struct rlimit files;

    signal(SIGPIPE, SIG_IGN);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    base = event_base_new();
    if (argc == 2 && !strcmp(argv[1], "engines"))
        engines();
    else if (argc == 7 && !strcmp(argv[1], "clients"))
        clients((unsigned)atoi(argv[2]), !strcmp(argv[3], "stream"), (unsigned)atoi(argv[4]),
                (uint64_t)atoll(argv[5]), (unsigned)atoi(argv[6]));
    else
        return fputs("usage: see the top of proxy_load.c\n", stderr), 2;
    return 0;
}

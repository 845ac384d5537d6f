/* SPDX-License-Identifier: Apache-2.0 */
/*
 * proxy.h - what the parts of ucm-proxy share.  One process, one thread, one event loop: nothing is
 * locked, and nothing may block.
 *
 *   front.c     clients: requests in, answers out
 *   job.c       one request's way: prefill, decode
 *   admin.c     /healthcheck, /metrics, /instances
 *   prompt.c    what is read in a body, and changed
 *   upstream.c  instances, and calls to them
 *   balance.c   who gets it
 *   conn.c      connections
 *   http.c      heads and bodies
 */
#ifndef PROXY_PROXY_H
#define PROXY_PROXY_H

#include <stdio.h>
#include <sys/queue.h>
#include <sys/socket.h>

#include <jansson.h>

#include "proxy/balance.h"
#include "proxy/conn.h"
#include "proxy/http.h"
#include "tool.h"

/* ---- settings (main.c) ---- */

struct settings {
    const char *host, *port, *transfer, *log_level, *retry_delay;
    uint64_t block_tokens, affinity_tokens, max_retries, max_connections, max_header, max_body;
    uint64_t client_s, timeout_s, connect_s, health_s, drain_s, ignored;
    int pd, remote_instances;
    struct texts prefiller_hosts, prefiller_ports, bootstrap_ports, decoder_hosts, decoder_ports,
        worker_hosts, worker_ports;
};
#define DEFAULT_BOOTSTRAP "8998" /* vLLM's */
enum transfer {
    TRANSFER_PARAMS,   /* what the prefiller answers in kv_transfer_params goes to the decoder */
    TRANSFER_MOONCAKE, /* we name the transfer, and ask the prefiller's bootstrap server who it is
                        */
    TRANSFER_NONE      /* through the store alone */
};

/* ---- counters: a row is a metric ---- */

#define PROXY_COUNTERS(X)                                                                          \
    X(requests, "requests taken from clients")                                                     \
    X(refused_requests, "requests refused for their form, size or slowness")                       \
    X(cancelled, "requests whose client left before the end of the answer")                        \
    X(prefills, "prefill hops begun")                                                              \
    X(prefills_failed, "requests whose prefill hop failed everywhere: the decoder computed them")  \
    X(prefills_skipped,                                                                            \
      "requests sent to a decoder at once: their prompt is shorter than a block")                  \
    X(retries, "requests tried again on another instance")                                         \
    X(broken_streams, "answers cut because the instance failed in the middle")                     \
    X(failed, "requests that ended in an error of the proxy's own")                                \
    X(stale, "requests sent again because the instance had just closed an idle connection")
enum counter {
#define X(name, help) COUNT_##name,
    PROXY_COUNTERS(X)
#undef X
        COUNTERS
};
#define count(name) (proxy.counters[COUNT_##name]++)

struct histogram {
    uint64_t buckets[12], n;
    double sum;
};

enum role { PREFILL, DECODE, WORKER, ROLES };
struct pool {
    struct instance *v[256];
    unsigned n, turn;
};
struct proxy {
    struct event_base *base;
    struct settings set;
    enum transfer transfer;
    const char *api_key; /* OPENAI_API_KEY, for clients without a key of their own */
    struct pool pools[ROLES];
    uint64_t counters[COUNTERS], answers[600];
    struct histogram first_byte, prefill;
    unsigned jobs;
    int closing;
};
extern struct proxy proxy;

double now_s(void);
/* level: 'D', 'I', 'W' or 'E' */
void say(char level, const char *fmt, ...) PRINTF_LIKE(2, 3);

/* ---- instances and calls to them (upstream.c) ---- */

TAILQ_HEAD(idle_list, idle);
struct instance {
    struct seat seat;
    enum role role;
    char name[300]; /* host:port */
    struct sockaddr_storage addrs[4];
    socklen_t lens[4];
    unsigned naddrs, good; /* the one that answered last */
    unsigned jobs;         /* in flight */
    unsigned users;        /* calls and leases that point here */
    unsigned strikes;      /* failures in a row */
    int removed;
    uint64_t calls, failures;
    struct idle_list idle;
    struct event *timer; /* of health checks */
    struct call *probe;
    struct instance *bootstrap; /* of a prefiller, for mooncake */
};
/* Adds one; with `lookup` names are looked up, which blocks.  NULL: `why` says why not. */
struct instance *instance_add(enum role role, const char *host, const char *port,
                              const char *bootstrap_port, int lookup, char *why, size_t size);
struct instance *instance_find(enum role role, const char *name);
/* Takes it off the list; it lives until its last user has gone. */
void instance_remove(struct instance *i);
void instance_hold(struct instance *i, uint64_t tokens);
void instance_release(struct instance *i, uint64_t tokens);
void instances_close(void);

enum outcome {
    CALL_OK,
    CALL_REFUSED,
    CALL_BROKEN,
    CALL_GARBLED,
    CALL_TIMEOUT,
    CALL_UNWELL,
    CALL_EMPTY
};
struct call_ops {
    /* May take the head over (h->text = NULL); returns whether it has cancelled the call. */
    int (*head)(void *arg, struct http_head *h);
    http_take *body;                               /* must leave the call as it is */
    void (*done)(void *arg, enum outcome outcome); /* once; the call is no more */
};
enum {
    CALL_HEAD = 1, /* the answer has no body */
    CALL_ONCE = 2  /* sent once, so over no connection that may have ended meanwhile */
};
/* Sends head and body (NULL: none), which stay the caller's and must stay as they are until there
 * is something of the answer's body. */
struct call *call_start(struct instance *i, struct evbuffer *head, struct evbuffer *body, int flags,
                        unsigned timeout_s, const struct call_ops *ops, void *arg);
void call_cancel(struct call *c);
void call_pause(struct call *c, int pause);
const char *outcome_text(enum outcome outcome);

/* ---- a request's way (job.c) ---- */

struct client;
struct job;
/* One request of the client; head and body are the client's, and stay until the job has ended,
 * which it says by client_end, client_error or client_cut; the body is emptied when nobody needs
 * it. */
struct job *job_new(struct client *client, const struct http_head *head, struct evbuffer *body);
void job_start(struct job *job);
/* The client is gone. */
void job_cancel(struct job *job);
void job_pause(struct job *job, int pause);

/* ---- what is in a body (prompt.c) ---- */

struct prompt {
    json_t *json;            /* of a body that was understood; owned */
    uint64_t tokens, output; /* about how many: of the prompt, of the answer */
    uint64_t key;            /* of its first blocks, never 0 */
    int chat, stream;
};
/* Whether it is a request to generate from; its length and beginning. */
int prompt_read(struct prompt *p, const char *target, struct evbuffer *body, uint64_t block_tokens);
void prompt_free(struct prompt *p);
/* The same request for one token, with these transfer parameters (taken over; may be NULL). */
struct evbuffer *prompt_for_prefill(const struct prompt *p, json_t *params);
struct evbuffer *prompt_for_decode(const struct prompt *p, json_t *params);

/* ---- clients (front.c) ---- */

int front_listen(const char *host, const char *port);
void front_close(void); /* no new ones; the loop ends with the last client */
void front_end(void);   /* those that are left are cut */
unsigned front_clients(void);
int client_is_local(const struct client *c);
/* A whole answer. */
void client_reply(struct client *c, int status, const char *type, const char *text);
void client_error(struct client *c, int status, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* The answer of an instance, as it comes. */
void client_begin(struct client *c, const struct http_head *h, const char *request_id);
void client_more(struct client *c, const char *data, size_t len);
void client_end(struct client *c);
/* Ends the connection such that the client can tell that something is missing. */
void client_cut(struct client *c, const char *last_words);

/* ---- the proxy's own pages (admin.c) ---- */

/* Answers, unless the target is not one of them. */
int admin_serve(struct client *c, const struct http_head *h, struct evbuffer *body);
void histogram_add(struct histogram *h, double seconds);

#endif

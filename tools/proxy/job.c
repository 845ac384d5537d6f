/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One request's way: to a prefiller, which computes the prompt and one token, then to a decoder,
 * whose answer goes to the client as it comes; or to a worker (or, what is not for generating, a
 * decoder) alone.
 *
 * What fails is tried on another instance as long as the client has seen nothing of an answer, but
 * not after a silence of --timeout-seconds, nor when it might change something twice.  Prefilling
 * saves time and is not needed: when it fails everywhere the decoder computes the prompt itself,
 * and what is wrong with the request it says itself.
 */
#include "proxy/proxy.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { MAX_TRIED = 16, MAX_HOP_ANSWER = 64 << 20 };
enum step { QUERY, PREFILLING, ANSWERING };

struct job {
    struct client *client;
    const struct http_head *request; /* the client's; stays until the answer has ended */
    struct evbuffer *body;           /* also the client's */
    struct prompt prompt;
    int generates; /* the prompt was understood */
    int once;      /* who has been sent it may have done it, and nobody else is asked */
    enum step step;
    enum role role; /* of the instances asked in this step */
    struct instance *at;
    uint64_t held; /* tokens in flight there */
    struct call *call;
    struct evbuffer *head_out, *body_out; /* what is being sent */
    struct evbuffer *answer;              /* of QUERY and PREFILLING */
    int status;                           /* of the answer */
    struct http_head reply;               /* of a decoder, until something of its body is there */
    int begun, sse; /* the client has seen something; it is a stream of events */
    const struct seat *tried[MAX_TRIED];
    unsigned ntried;
    char request_id[128], transfer_id[48];
    json_t *params, *remote; /* for the decoder: from P; P's engine id */
    double began, step_began;
};
static const struct call_ops hop_ops, answer_ops;
static void job_step(struct job *j);

static void make_id(char *out, size_t size, const char *before)
{
    unsigned char b[16];

    evutil_secure_rng_get_bytes(b, sizeof b);
    int n = snprintf(out, size, "%s", before);
    for (size_t i = 0; i < sizeof b; i++)
        n += snprintf(out + n, size - (size_t)n, "%02x", b[i]);
}

static void job_leave(struct job *j)
{
    if (j->at)
        instance_release(j->at, j->held);
    j->at = NULL;
    if (j->head_out)
        evbuffer_free(j->head_out);
    if (j->body_out)
        evbuffer_free(j->body_out);
    j->head_out = j->body_out = NULL;
    evbuffer_drain(j->answer, evbuffer_get_length(j->answer));
    http_head_free(&j->reply);
}

static void job_free(struct job *j)
{
    if (j->call)
        call_cancel(j->call);
    job_leave(j);
    prompt_free(&j->prompt);
    json_decref(j->params);
    json_decref(j->remote);
    evbuffer_free(j->answer);
    proxy.jobs--;
    free(j);
}

void job_cancel(struct job *j)
{
    count(cancelled);
    job_free(j);
}

void job_pause(struct job *j, int pause)
{
    if (j->call)
        call_pause(j->call, pause);
}

/* ---- what is sent ---- */

/* The client's fields but for those of the connection, and ours. */
static struct evbuffer *request_head(struct job *j, const struct instance *to, const char *method,
                                     const char *target, const struct evbuffer *body)
{
    struct evbuffer *out = evbuffer_new();
    int prefilling = j->step != ANSWERING, has_key = 0;

    if (!out)
        abort();
    evbuffer_add_printf(out, "%s %s HTTP/1.1\r\nHost: %s\r\nX-Request-Id: %s\r\n", method, target,
                        to->name, j->request_id);
    for (unsigned i = 0; i < j->request->nfields; i++) {
        const struct http_field *f = &j->request->fields[i];
        has_key |= !strcasecmp(f->name, "authorization");
        if (http_is_hop_by_hop(j->request, f->name) || !strcasecmp(f->name, "host") ||
            !strcasecmp(f->name, "x-request-id") ||
            (prefilling && !strcasecmp(f->name, "accept-encoding")))
            continue; /* what a prefiller answers we read ourselves */
        evbuffer_add_printf(out, "%s: %s\r\n", f->name, f->value);
    }
    if (!has_key && proxy.api_key)
        evbuffer_add_printf(out, "Authorization: Bearer %s\r\n", proxy.api_key);
    if (body)
        evbuffer_add_printf(out, "Content-Length: %zu\r\n", evbuffer_get_length(body));
    evbuffer_add(out, "\r\n", 2);
    return out;
}

static json_t *params_for_prefill(const struct job *j)
{
    if (proxy.transfer == TRANSFER_PARAMS)
        return json_pack("{s:b,s:b,s:n,s:n,s:n,s:n}", "do_remote_decode", 1, "do_remote_prefill", 0,
                         "remote_engine_id", "remote_block_ids", "remote_host", "remote_port");
    if (proxy.transfer == TRANSFER_MOONCAKE)
        return json_pack("{s:b,s:b,s:s}", "do_remote_decode", 1, "do_remote_prefill", 0,
                         "transfer_id", j->transfer_id);
    return NULL;
}

static json_t *params_for_decode(const struct job *j, const struct instance *bootstrap)
{
    char addr[sizeof bootstrap->name + 8];

    snprintf(addr, sizeof addr, "http://%s", bootstrap->name);
    return json_pack("{s:b,s:b,s:O,s:s,s:s}", "do_remote_prefill", 1, "do_remote_decode", 0,
                     "remote_engine_id", j->remote, "remote_bootstrap_addr", addr, "transfer_id",
                     j->transfer_id);
}

/* ---- steps ---- */

static void send_step(struct job *j)
{
    const struct http_head *r = j->request;
    struct instance *to = j->at;
    const char *method = r->method, *target = r->target;
    struct evbuffer *body = j->body;
    const struct call_ops *ops = &hop_ops;

    switch (j->step) {
    case QUERY:
        to = j->at->bootstrap;
        method = "GET";
        target = "/query";
        body = NULL;
        break;
    case PREFILLING:
        count(prefills);
        body = j->body_out = prompt_for_prefill(&j->prompt, params_for_prefill(j));
        break;
    case ANSWERING:
        if (j->params || (proxy.set.pd && json_object_get(j->prompt.json, "kv_transfer_params")))
            body = j->body_out = prompt_for_decode(&j->prompt, json_incref(j->params));
        else if (r->framing == HTTP_EMPTY)
            body = NULL;
        ops = &answer_ops;
        break;
    }
    j->head_out = request_head(j, to, method, target, body);
    int once = j->once || (j->step == ANSWERING && j->params); /* a transfer is for one of them */
    int flags = (strcmp(method, "HEAD") ? 0 : CALL_HEAD) | (once ? CALL_ONCE : 0);
    j->call = call_start(to, j->head_out, body, flags, (unsigned)proxy.set.timeout_s, ops, j);
}

/* Takes the best instance of the role that was not tried; 0 or -1. */
static int choose(struct job *j)
{
    struct pool *pool = &proxy.pools[j->role];
    const struct seat *seats[COUNT_OF(pool->v)];
    int prefill = j->role == PREFILL;

    for (unsigned i = 0; i < pool->n; i++)
        seats[i] = &pool->v[i]->seat;
    /* A prompt shorter than a block leaves nothing behind that could be found again. */
    uint64_t key = j->prompt.tokens < proxy.set.block_tokens ? 0 : j->prompt.key;
    if (j->ntried == MAX_TRIED || j->ntried > proxy.set.max_retries)
        return -1;
    int best = balance_choose(seats, pool->n, j->tried, j->ntried, key, proxy.set.affinity_tokens,
                              pool->turn++);
    if (best < 0 || (prefill && seats[best]->state == SEAT_DOWN))
        return -1; /* a decoder can do without; nobody waits for a prefiller that is not there */
    j->at = pool->v[best];
    j->tried[j->ntried++] = seats[best];
    j->held = 1 + j->prompt.tokens + (prefill ? 0 : j->prompt.output);
    instance_hold(j->at, j->held);
    return 0;
}

static void enter(struct job *j, enum step step, enum role role)
{
    j->step = step;
    j->role = role;
    j->ntried = 0;
    j->step_began = now_s();
}

/* The end without an answer of an instance. */
static void job_fail(struct job *j, int status, const char *why)
{
    struct client *client = j->client;
    char text[400];

    snprintf(text, sizeof text, "%s%s%s", j->at ? j->at->name : "", j->at ? ": " : "", why);
    count(failed);
    job_free(j);
    client_error(client, status, "%s", text);
}

static void job_step(struct job *j)
{
    job_leave(j);
    if (choose(j) == 0) {
        if (j->ntried > 1)
            count(retries);
        send_step(j);
        return;
    }
    if (j->step == ANSWERING) {
        job_fail(j, 503, "there is no instance that takes requests");
        return;
    }
    count(prefills_failed);
    enter(j, ANSWERING, DECODE);
    job_step(j);
}

static int can_retry(const struct job *j, enum outcome outcome)
{
    const struct pool *pool = &proxy.pools[j->role];
    unsigned left = 0;

    if (outcome == CALL_TIMEOUT || (j->once && outcome != CALL_REFUSED))
        return 0;
    for (unsigned i = 0; i < pool->n; i++) {
        int was = pool->v[i]->seat.state == SEAT_SHUT;
        for (unsigned t = 0; t < j->ntried; t++)
            was |= j->tried[t] == &pool->v[i]->seat;
        left += !was;
    }
    return left && j->ntried <= proxy.set.max_retries && j->ntried < MAX_TRIED;
}

/* ---- prefill and query: their answers are for us ---- */

static int hop_head(void *arg, struct http_head *h)
{
    struct job *j = arg;
    j->status = h->status;
    return 0;
}

static void hop_body(void *arg, const char *data, size_t len)
{
    struct job *j = arg;

    if (evbuffer_get_length(j->answer) <= MAX_HOP_ANSWER) /* what is cut there will not parse */
        evbuffer_add(j->answer, data, len);
}

static json_t *hop_json(struct job *j)
{
    return json_loadb((const char *)evbuffer_pullup(j->answer, -1), evbuffer_get_length(j->answer),
                      0, NULL);
}

/* {"0": {"engine_id": "..."}}: of the first data-parallel rank. */
static int query_done(struct job *j)
{
    json_t *o = hop_json(j), *id = json_object_get(json_object_get(o, "0"), "engine_id");

    json_decref(j->remote);
    j->remote = json_is_string(id) ? json_incref(id) : NULL;
    json_decref(o);
    return j->remote ? 0 : -1;
}

static void prefill_done(struct job *j)
{
    json_t *o = NULL;

    histogram_add(&proxy.prefill, now_s() - j->step_began);
    if (proxy.transfer == TRANSFER_MOONCAKE) {
        j->params = params_for_decode(j, j->at->bootstrap);
    } else if (proxy.transfer == TRANSFER_PARAMS && (o = hop_json(j))) {
        json_t *params = json_object_get(o, "kv_transfer_params");
        j->params = json_object_size(params) ? json_incref(params) : NULL;
        json_decref(o);
    }
    enter(j, ANSWERING, DECODE);
    job_step(j);
}

static void hop_done(void *arg, enum outcome outcome)
{
    struct job *j = arg;
    int good = outcome == CALL_OK && j->status == 200;

    j->call = NULL;
    if (good && j->step == PREFILLING) {
        prefill_done(j);
        return;
    }
    if (good && j->step == QUERY && query_done(j) == 0) {
        /* The same instance goes on to prefill. */
        evbuffer_free(j->head_out);
        j->step = PREFILLING;
        evbuffer_drain(j->answer, evbuffer_get_length(j->answer));
        send_step(j);
        return;
    }
    say('W', "prefill at %s: %s %d", j->at->name, outcome_text(outcome), j->status);
    if (outcome == CALL_TIMEOUT || (outcome == CALL_OK && j->status < 500 && j->step == PREFILLING))
        j->ntried = MAX_TRIED; /* another would do no better, or too late */
    if (j->step == PREFILLING && proxy.transfer == TRANSFER_MOONCAKE)
        j->step = QUERY;
    j->status = 0;
    job_step(j);
}

static const struct call_ops hop_ops = {hop_head, hop_body, hop_done};

/* ---- the answer ---- */

/* Busy or broken, and another may not be. */
static int worth_another(int status)
{
    return status == 502 || status == 503;
}

/* What the prefiller held for it may have been fetched: the next one computes the prompt. */
static void forget_transfer(struct job *j)
{
    json_decref(j->params);
    j->params = NULL;
}

static int answer_head(void *arg, struct http_head *h)
{
    struct job *j = arg;

    if (worth_another(h->status) && can_retry(j, CALL_OK)) {
        say('W', "%s answers %d: another is tried", j->at->name, h->status);
        call_cancel(j->call);
        j->call = NULL;
        forget_transfer(j);
        job_step(j);
        return 1;
    }
    j->status = h->status;
    const char *type = http_field(h, "content-type");
    j->sse = type && !strncasecmp(type, "text/event-stream", 17);
    /* Held back until something of the body is there: so long another may still be tried. */
    j->reply = *h;
    h->text = NULL;
    return 0;
}

static void begin(struct job *j)
{
    if (j->begun)
        return;
    j->begun = 1;
    /* Nobody else will be asked: an answer may take long, and a prompt be large. */
    prompt_free(&j->prompt);
    evbuffer_drain(j->body, evbuffer_get_length(j->body));
    if (j->body_out)
        evbuffer_drain(j->body_out, evbuffer_get_length(j->body_out));
    histogram_add(&proxy.first_byte, now_s() - j->began);
    client_begin(j->client, &j->reply, j->request_id);
}

static void answer_body(void *arg, const char *data, size_t len)
{
    struct job *j = arg;

    begin(j);
    client_more(j->client, data, len);
}

/* The answer ends in the middle, and the client must see it. */
static void break_off(struct job *j, enum outcome outcome)
{
    struct client *client = j->client;
    int sse = j->sse;
    char why[400], last[512];

    snprintf(why, sizeof why, "%s: %s in the middle of the answer", j->at->name,
             outcome_text(outcome));
    snprintf(last, sizeof last,
             "\n\ndata: {\"error\": {\"message\": \"%s\", \"type\": \"upstream_error\", "
             "\"code\": 502}}\n\n",
             why);
    say('W', "%s", why);
    count(broken_streams);
    job_free(j);
    client_cut(client, sse ? last : NULL);
}

static void answer_done(void *arg, enum outcome outcome)
{
    struct job *j = arg;
    struct client *client = j->client;

    j->call = NULL;
    if (outcome == CALL_OK && !j->begun && j->status == 200 && j->generates)
        outcome = CALL_EMPTY; /* no answer to a prompt */
    if (outcome == CALL_OK) {
        begin(j);
        job_free(j);
        client_end(client);
    } else if (j->begun) {
        break_off(j, outcome);
    } else if (can_retry(j, outcome)) {
        say('W', "%s: %s: another is tried", j->at->name, outcome_text(outcome));
        if (outcome != CALL_REFUSED)
            forget_transfer(j);
        job_step(j);
    } else {
        int status = outcome == CALL_TIMEOUT ? 504 : outcome == CALL_REFUSED ? 503 : 502;
        job_fail(j, status, outcome_text(outcome));
    }
}

static const struct call_ops answer_ops = {answer_head, answer_body, answer_done};

/* ---- the beginning ---- */

static int only_reads(const char *method)
{
    static const char *const methods[] = {"GET", "HEAD", "OPTIONS"};

    for (size_t i = 0; i < COUNT_OF(methods); i++)
        if (!strcmp(method, methods[i]))
            return 1;
    return 0;
}

struct job *job_new(struct client *client, const struct http_head *head, struct evbuffer *body)
{
    struct job *j = calloc(1, sizeof *j);
    const char *id = http_field(head, "x-request-id");

    if (!j)
        abort();
    *j = (struct job){.client = client,
                      .request = head,
                      .body = body,
                      .answer = evbuffer_new(),
                      .began = now_s()};
    proxy.jobs++;
    if (id && *id && strlen(id) < sizeof j->request_id)
        snprintf(j->request_id, sizeof j->request_id, "%s", id);
    else
        make_id(j->request_id, sizeof j->request_id, "");
    if (proxy.transfer == TRANSFER_MOONCAKE)
        make_id(j->transfer_id, sizeof j->transfer_id, "xfer-");
    j->generates = !strcmp(head->method, "POST") &&
                   prompt_read(&j->prompt, head->target, body, proxy.set.block_tokens);
    j->once = !j->generates && !only_reads(head->method);
    enter(j, ANSWERING, proxy.set.pd ? DECODE : WORKER);
    if (proxy.set.pd && j->generates) {
        if (j->prompt.tokens >= proxy.set.block_tokens)
            enter(j, proxy.transfer == TRANSFER_MOONCAKE ? QUERY : PREFILLING, PREFILL);
        else
            count(prefills_skipped);
    }
    return j;
}

void job_start(struct job *j)
{
    job_step(j);
}

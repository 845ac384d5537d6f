/* SPDX-License-Identifier: Apache-2.0 */
/* The proxy's own pages: /healthcheck, /metrics and /instances.  A row is a page. */
#include "proxy/proxy.h"

#include <stdlib.h>
#include <string.h>

static const char *const role_names[ROLES] = {"prefill", "decode", "worker"};
static const char *const state_names[] = {"up", "down", "drained"};
static const double bounds[] = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30};

void histogram_add(struct histogram *h, double seconds)
{
    for (unsigned i = 0; i < COUNT_OF(bounds); i++)
        h->buckets[i] += seconds <= bounds[i];
    h->n++;
    h->sum += seconds;
}

static void reply_json(struct client *c, int status, json_t *o)
{
    char *text = json_dumps(o, JSON_COMPACT);

    json_decref(o);
    client_reply(c, status, "application/json", text ? text : "{}");
    free(text);
}

/* ---- /healthcheck ---- */

static int can_serve(void)
{
    const struct pool *p = &proxy.pools[proxy.set.pd ? DECODE : WORKER];

    for (unsigned i = 0; i < p->n; i++)
        if (p->v[i]->seat.state == SEAT_UP)
            return 1;
    return 0;
}

static void get_healthcheck(struct client *c, struct evbuffer *body)
{
    int good = can_serve();
    json_t *o = json_pack("{s:s,s:s}", "status", good ? "ok" : "no instance is up", "mode",
                          proxy.set.pd ? "pd-disaggregation" : "pd-mixed");
    if (proxy.set.pd) {
        json_object_set_new(o, "prefill_instances", json_integer(proxy.pools[PREFILL].n));
        json_object_set_new(o, "decode_instances", json_integer(proxy.pools[DECODE].n));
    } else {
        json_object_set_new(o, "worker_instances", json_integer(proxy.pools[WORKER].n));
    }
    json_object_set_new(o, "request_num", json_integer(proxy.jobs));
    reply_json(c, good ? 200 : 503, o);
}

/* ---- /metrics ---- */

static void put_help(struct evbuffer *out, const char *name, const char *type, const char *help)
{
    evbuffer_add_printf(out, "# HELP ucm_proxy_%s %s\n# TYPE ucm_proxy_%s %s\n", name, help, name,
                        type);
}

static void put_histogram(struct evbuffer *out, const char *name, const struct histogram *h,
                          const char *help)
{
    put_help(out, name, "histogram", help);
    for (unsigned i = 0; i < COUNT_OF(bounds); i++)
        evbuffer_add_printf(out, "ucm_proxy_%s_bucket{le=\"%g\"} %ju\n", name, bounds[i],
                            (uintmax_t)h->buckets[i]);
    evbuffer_add_printf(out,
                        "ucm_proxy_%s_bucket{le=\"+Inf\"} %ju\nucm_proxy_%s_sum %.6f\n"
                        "ucm_proxy_%s_count %ju\n",
                        name, (uintmax_t)h->n, name, h->sum, name, (uintmax_t)h->n);
}

static uintmax_t is_up(const struct instance *i)
{
    return i->seat.state == SEAT_UP;
}
static uintmax_t jobs_of(const struct instance *i)
{
    return i->jobs;
}
static uintmax_t tokens_of(const struct instance *i)
{
    return i->seat.tokens;
}
static uintmax_t calls_of(const struct instance *i)
{
    return i->calls;
}
static uintmax_t failures_of(const struct instance *i)
{
    return i->failures;
}

static void put_instances(struct evbuffer *out)
{
    static const struct {
        const char *name, *type, *help;
        uintmax_t (*value)(const struct instance *i);
    } rows[] = {
        {"instance_up", "gauge", "whether the instance gets requests", is_up},
        {"instance_requests", "gauge", "requests in flight there", jobs_of},
        {"instance_tokens", "gauge", "tokens in flight there, estimated", tokens_of},
        {"instance_calls_total", "counter", "calls begun, health checks among them", calls_of},
        {"instance_failures_total", "counter", "calls and health checks that failed", failures_of},
    };
    for (unsigned row = 0; row < COUNT_OF(rows); row++) {
        put_help(out, rows[row].name, rows[row].type, rows[row].help);
        for (unsigned r = 0; r < ROLES; r++)
            for (unsigned n = 0; n < proxy.pools[r].n; n++)
                evbuffer_add_printf(out, "ucm_proxy_%s{role=\"%s\",instance=\"%s\"} %ju\n",
                                    rows[row].name, role_names[r], proxy.pools[r].v[n]->name,
                                    rows[row].value(proxy.pools[r].v[n]));
    }
}

static void get_metrics(struct client *c, struct evbuffer *body)
{
    static const char *const names[] = {
#define X(name, help) #name "_total", help,
        PROXY_COUNTERS(X)
#undef X
    };
    struct evbuffer *out = evbuffer_new();

    for (unsigned i = 0; i < COUNTERS; i++) {
        put_help(out, names[2 * i], "counter", names[2 * i + 1]);
        evbuffer_add_printf(out, "ucm_proxy_%s %ju\n", names[2 * i], (uintmax_t)proxy.counters[i]);
    }
    put_help(out, "answers_total", "counter", "answers to clients by status");
    for (unsigned i = 0; i < COUNT_OF(proxy.answers); i++)
        if (proxy.answers[i])
            evbuffer_add_printf(out, "ucm_proxy_answers_total{code=\"%u\"} %ju\n", i,
                                (uintmax_t)proxy.answers[i]);
    put_help(out, "requests_in_flight", "gauge", "requests that wait for an answer or its end");
    evbuffer_add_printf(out, "ucm_proxy_requests_in_flight %u\n", proxy.jobs);
    put_help(out, "connections", "gauge", "connections of clients");
    evbuffer_add_printf(out, "ucm_proxy_connections %u\n", front_clients());
    put_histogram(out, "prefill_seconds", &proxy.prefill, "time of the prefill hop");
    put_histogram(out, "first_byte_seconds", &proxy.first_byte,
                  "from the whole request to the first byte of its answer");
    put_instances(out);
    evbuffer_add(out, "", 1);
    client_reply(c, 200, "text/plain; version=0.0.4; charset=utf-8",
                 (const char *)evbuffer_pullup(out, -1));
    evbuffer_free(out);
}

/* ---- /instances ---- */

static void get_instances(struct client *c, struct evbuffer *body)
{
    json_t *list = json_array();

    for (unsigned r = 0; r < ROLES; r++)
        for (unsigned n = 0; n < proxy.pools[r].n; n++) {
            const struct instance *i = proxy.pools[r].v[n];
            json_array_append_new(
                list, json_pack("{s:s,s:s,s:s,s:I,s:I}", "type", role_names[r], "instance", i->name,
                                "state", state_names[i->seat.state], "requests",
                                (json_int_t)i->jobs, "tokens", (json_int_t)i->seat.tokens));
        }
    reply_json(c, 200, json_pack("{s:o}", "instances", list));
}

/* Each of these: NULL, or `why`, which says what is wrong. */
static const char *add_one(enum role role, const char *name, char *why, size_t size)
{
    struct instance *i = instance_find(role, name);
    char host[256];
    const char *colon = strrchr(name, ':');
    int brackets = *name == '[' && colon && colon[-1] == ']';

    if (i) { /* drained before: it gets requests again */
        if (i->seat.state == SEAT_SHUT)
            i->seat.state = SEAT_UP;
        return NULL;
    }
    if (!colon || colon == name || colon - name > 250) {
        snprintf(why, size, "%.100s: not HOST:PORT", name);
        return why;
    }
    snprintf(host, sizeof host, "%.*s", (int)(colon - name) - 2 * brackets, name + brackets);
    int mooncake = role == PREFILL && proxy.transfer == TRANSFER_MOONCAKE;
    return instance_add(role, host, colon + 1, mooncake ? DEFAULT_BOOTSTRAP : NULL, 0, why, size)
               ? NULL
               : why;
}

static const char *drain_one(enum role role, const char *name, char *why, size_t size)
{
    struct instance *i = instance_find(role, name);

    if (!i) {
        snprintf(why, size, "%.100s: no such instance", name);
        return why;
    }
    i->seat.state = SEAT_SHUT;
    return NULL;
}

static const char *remove_one(enum role role, const char *name, char *why, size_t size)
{
    if (drain_one(role, name, why, size))
        return why;
    instance_remove(instance_find(role, name));
    return NULL;
}

static json_t *names_of(enum role role)
{
    json_t *list = json_array();

    for (unsigned n = 0; n < proxy.pools[role].n; n++)
        json_array_append_new(list, json_string(proxy.pools[role].v[n]->name));
    return list;
}

/* {"type": "prefill", "instances": "h:p" or ["h:p", ...]} */
static void change(struct client *c, struct evbuffer *body, const char *done,
                   const char *(*one)(enum role role, const char *name, char *why, size_t size))
{
    json_t *o =
        json_loadb((const char *)evbuffer_pullup(body, -1), evbuffer_get_length(body), 0, NULL);
    const char *type = json_string_value(json_object_get(o, "type")), *wrong = NULL;
    json_t *given = json_object_get(o, "instances"), *list, *name;
    unsigned role = 0;
    size_t i;
    char why[400];

    while (role < ROLES && (!type || strcmp(type, role_names[role])))
        role++;
    list = json_is_string(given) ? json_pack("[O]", given) : json_incref(given);
    if (role == ROLES || !json_array_size(list))
        wrong = "give {\"type\": \"prefill\", \"decode\" or \"worker\", \"instances\": "
                "[\"HOST:PORT\"]}";
    else if ((role == WORKER) == proxy.set.pd)
        wrong = proxy.set.pd ? "here are prefillers and decoders, no workers"
                             : "here are workers, no prefillers and decoders";
    json_array_foreach(list, i, name) if (!wrong) wrong =
        json_is_string(name) ? one(role, json_string_value(name), why, sizeof why)
                             : "an instance is written \"HOST:PORT\"";
    json_decref(list);
    json_decref(o);
    if (wrong) {
        client_error(c, 400, "%s", wrong);
        return;
    }
    reply_json(c, 200,
               json_pack("{s:s,s:o,s:o,s:o}", "message", done, "current_prefill_instances",
                         names_of(PREFILL), "current_decode_instances", names_of(DECODE),
                         "current_worker_instances", names_of(WORKER)));
}

static void post_add(struct client *c, struct evbuffer *body)
{
    change(c, body, "added", add_one);
}
static void post_drain(struct client *c, struct evbuffer *body)
{
    change(c, body, "drained: no new requests", drain_one);
}
static void post_remove(struct client *c, struct evbuffer *body)
{
    change(c, body, "removed: requests there end as they would", remove_one);
}

int admin_serve(struct client *c, const struct http_head *h, struct evbuffer *body)
{
    static const struct {
        const char *target, *method;
        int guarded; /* for this machine only, unless --remote-instances */
        void (*serve)(struct client *c, struct evbuffer *body);
    } pages[] = {
        {"/healthcheck", "GET", 0, get_healthcheck}, {"/metrics", "GET", 0, get_metrics},
        {"/instances", "GET", 1, get_instances},     {"/instances/add", "POST", 1, post_add},
        {"/instances/drain", "POST", 1, post_drain}, {"/instances/remove", "POST", 1, post_remove},
    };
    size_t len = strcspn(h->target, "?");

    for (unsigned i = 0; i < COUNT_OF(pages); i++) {
        if (strncmp(h->target, pages[i].target, len) || pages[i].target[len])
            continue;
        if (strcmp(h->method, pages[i].method))
            client_error(c, 405, "%s takes %s", pages[i].target, pages[i].method);
        else if (pages[i].guarded && !client_is_local(c) && !proxy.set.remote_instances)
            client_error(c, 403, "%s is for this machine, unless --remote-instances",
                         pages[i].target);
        else
            pages[i].serve(c, body);
        return 1;
    }
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ucm-proxy - one address for many engines: prefill here, decode there, or whole requests to equal
 * workers.  Options, the start and the end; proxy.h says who does what.
 */
#include "proxy/proxy.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <time.h>

struct proxy proxy;

#define AT(field) offsetof(struct settings, field)
static const char ignored[] = "accepted, without effect; of vllm-ascend's example proxy";
static const struct opt options[] = {
    {"pd-disaggregation", OPT_FLAG, AT(pd), NULL, NULL,
     "prefillers and decoders; so it is too when any of them is named and no worker"},
    {"host", OPT_TEXT, AT(host), "HOST", "localhost", "where to listen"},
    {"port", OPT_TEXT, AT(port), "PORT", "8000", "where to listen; 0: a free one, which is logged"},
    {"prefiller-hosts", OPT_WORDS, AT(prefiller_hosts), "HOST...", NULL, "(default localhost)"},
    {"prefiller-ports", OPT_WORDS, AT(prefiller_ports), "PORT...", NULL, "(default 8100)"},
    {"decoder-hosts", OPT_WORDS, AT(decoder_hosts), "HOST...", NULL, "(default localhost)"},
    {"decoder-ports", OPT_WORDS, AT(decoder_ports), "PORT...", NULL, "(default 8200)"},
    {"worker-hosts", OPT_WORDS, AT(worker_hosts), "HOST...", NULL,
     "engines that do both (default localhost)"},
    {"worker-ports", OPT_WORDS, AT(worker_ports), "PORT...", NULL, "(default 8100)"},
    {"work-hosts", OPT_WORDS, AT(worker_hosts), "HOST...", NULL, "the same as --worker-hosts"},
    {"work-ports", OPT_WORDS, AT(worker_ports), "PORT...", NULL, "the same as --worker-ports"},
    {"transfer", OPT_TEXT, AT(transfer), "HOW", "params",
     "params: what a prefiller answers in kv_transfer_params goes to the decoder (NIXL, "
     "vllm-ascend's "
     "Mooncake; without it, through the store); mooncake: as vLLM's MooncakeConnector wants it; "
     "none: "
     "through the store alone"},
    {"prefiller-bootstrap-ports", OPT_WORDS, AT(bootstrap_ports), "PORT...", NULL,
     "VLLM_MOONCAKE_BOOTSTRAP_PORT of each prefiller, with --transfer mooncake "
     "(default " DEFAULT_BOOTSTRAP ")"},
    {"block-tokens", OPT_COUNT, AT(block_tokens), "N", "128",
     "tokens of a block of the store; shorter prompts go to a decoder at once"},
    {"affinity-tokens", OPT_COUNT, AT(affinity_tokens), "N", "16k",
     "a prompt goes where its beginning was before, unless that has so many tokens in flight above "
     "a "
     "quarter more than the mean"},
    {"max-retries", OPT_COUNT, AT(max_retries), "N", "3", "other instances tried when one fails"},
    {"timeout-seconds", OPT_COUNT, AT(timeout_s), "N", "600", "longest silence of an instance"},
    {"connect-seconds", OPT_COUNT, AT(connect_s), "N", "5", "longest time to connect to one"},
    {"health-seconds", OPT_COUNT, AT(health_s), "N", "5",
     "time between GET /health to each instance"},
    {"client-seconds", OPT_COUNT, AT(client_s), "N", "60",
     "a request must have come by then, and a client that reads nothing for so long is left"},
    {"drain-seconds", OPT_COUNT, AT(drain_s), "N", "30",
     "after SIGTERM, what is under way may end for so long"},
    {"max-connections", OPT_COUNT, AT(max_connections), "N", "4096", "of clients; others wait"},
    {"max-header-bytes", OPT_SIZE, AT(max_header), "SIZE", "64K", "of a head"},
    {"max-body-bytes", OPT_SIZE, AT(max_body), "SIZE", "64M", "of a request"},
    {"remote-instances", OPT_FLAG, AT(remote_instances), NULL, NULL,
     "let other machines use /instances too: whoever may, reads every prompt"},
    {"log-level", OPT_TEXT, AT(log_level), "LEVEL", "info", "debug, info, warning or error"},
    {"retry-delay", OPT_TEXT, AT(retry_delay), "S", NULL, ignored},
    {"max-waiting-retries", OPT_COUNT, AT(ignored), "N", NULL, ignored},
    {"waiting-retry-interval", OPT_TEXT, AT(retry_delay), "S", NULL, ignored},
    {"workers", OPT_COUNT, AT(ignored), "N", NULL, ignored},
    {NULL},
};
static const struct verb verb_proxy = {
    .name = "ucm-proxy",
    .operands = "",
    .about =
        "Takes OpenAI requests and has each prompt computed by a prefiller and answered by a "
        "decoder (or both by a worker), the least loaded or the one that knows its beginning. "
        "GET /healthcheck, /metrics and /instances are its own, everything else goes to an engine. "
        "OPENAI_API_KEY, when set, is the key of clients that bring none.",
    .opts = options,
    .size = sizeof(struct settings),
};

double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static const char levels[] = "DIWE";

void say(char level, const char *fmt, ...)
{
    const char *least = strchr(levels, *proxy.set.log_level & ~0x20);
    char when[32], text[1024];
    struct tm tm;
    time_t t = time(NULL);
    va_list ap;

    if (least && strchr(levels, level) < least)
        return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    for (char *p = text; *p; p++)
        if ((unsigned char)*p < ' ') /* a line is a line, whatever a client sent */
            *p = '?';
    strftime(when, sizeof when, "%F %T", localtime_r(&t, &tm));
    fprintf(stderr, "%s %c ucm-proxy: %s\n", when, level, text);
}

/* ---- who there is ---- */

static const struct group {
    enum role role;
    const char *name, *port; /* the default port */
    size_t hosts, ports;
} groups[ROLES] = {
    {PREFILL, "prefiller", "8100", AT(prefiller_hosts), AT(prefiller_ports)},
    {DECODE, "decoder", "8200", AT(decoder_hosts), AT(decoder_ports)},
    {WORKER, "worker", "8100", AT(worker_hosts), AT(worker_ports)},
};

static struct texts *texts_at(size_t offset)
{
    return (struct texts *)((char *)&proxy.set + offset);
}

static int is_given(enum role role)
{
    return texts_at(groups[role].hosts)->n || texts_at(groups[role].ports)->n;
}

static int add_group(const struct group *g)
{
    struct texts *hosts = texts_at(g->hosts), *ports = texts_at(g->ports);
    struct texts *bootstrap = &proxy.set.bootstrap_ports;
    int mooncake = g->role == PREFILL && proxy.transfer == TRANSFER_MOONCAKE;
    char why[400];

    if (!hosts->n)
        hosts->v[hosts->n++] = "localhost";
    if (!ports->n)
        ports->v[ports->n++] = g->port;
    if (hosts->n != ports->n)
        return cannot("Number of %s hosts must match number of %s ports: %u hosts, %u ports",
                      g->name, g->name, hosts->n, ports->n);
    if (mooncake && bootstrap->n && bootstrap->n != hosts->n)
        return cannot(
            "Number of prefiller hosts must match number of prefiller bootstrap ports: %u "
            "hosts, %u ports",
            hosts->n, bootstrap->n);
    for (unsigned i = 0; i < hosts->n; i++) {
        const char *port = !mooncake ? NULL : bootstrap->n ? bootstrap->v[i] : DEFAULT_BOOTSTRAP;
        if (!instance_add(g->role, hosts->v[i], ports->v[i], port, 1, why, sizeof why))
            return cannot("--%s-hosts: %s", g->name, why);
    }
    return 0;
}

static int add_instances(void)
{
    struct settings *s = &proxy.set;
    int named = is_given(PREFILL) || is_given(DECODE);

    if (is_given(WORKER) && (s->pd || named))
        return cannot("name workers, or prefillers and decoders, not both");
    if (named && !s->pd)
        say('W', "prefillers or decoders are named: --pd-disaggregation is meant");
    s->pd |= named;
    if (!s->pd) {
        if (add_group(&groups[WORKER]))
            return TOOL_CANNOT;
        say('I', "[Mixed Mode] Initialized %u PD-mixed workers.", proxy.pools[WORKER].n);
        return 0;
    }
    if (add_group(&groups[PREFILL]) || add_group(&groups[DECODE]))
        return TOOL_CANNOT;
    say('I', "[PD Mode] Initialized %u prefillers and %u decoders.", proxy.pools[PREFILL].n,
        proxy.pools[DECODE].n);
    return 0;
}

/* A client's request takes three descriptors: its own, one where it is, one kept where it was. */
static void bound_by_files(uint64_t *connections)
{
    enum { OURS = 32 };
    struct rlimit files;

    if (getrlimit(RLIMIT_NOFILE, &files) < 0)
        return;
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_max >= OURS + 3 * *connections)
        return;
    *connections = files.rlim_max > OURS + 3 ? (files.rlim_max - OURS) / 3 : 1;
    say('W', "--max-connections %ju: more are too many for %ju open files (ulimit -n)",
        (uintmax_t)*connections, (uintmax_t)files.rlim_max);
}

static int read_settings(void)
{
    static const char *const ways[] = {"params", "mooncake", "none"};
    struct settings *s = &proxy.set;
    unsigned way = 0;

    while (way < COUNT_OF(ways) && strcmp(ways[way], s->transfer))
        way++;
    if (way == COUNT_OF(ways))
        return cannot("--transfer %s: not params, mooncake or none", s->transfer);
    proxy.transfer = (enum transfer)way;
    if (!strchr(levels, *s->log_level & ~0x20))
        return cannot("--log-level %s: not debug, info, warning or error", s->log_level);
    uint64_t *const positive[] = {&s->timeout_s,   &s->connect_s,  &s->health_s,
                                  &s->client_s,    &s->max_header, &s->max_connections,
                                  &s->block_tokens};
    for (size_t i = 0; i < COUNT_OF(positive); i++)
        if (!*positive[i] || *positive[i] > 1u << 30)
            return cannot("seconds, sizes and counts are from 1 to 1G");
    bound_by_files(&s->max_connections);
    proxy.api_key = getenv("OPENAI_API_KEY");
    return 0;
}

/* ---- the end ---- */

static void on_drained(evutil_socket_t fd, short what, void *arg)
{
    event_base_loopbreak(proxy.base);
}

/* The first waits for what is under way; the second does not. */
static void on_signal(evutil_socket_t fd, short what, void *arg)
{
    struct timeval tv = {.tv_sec = (time_t)proxy.set.drain_s};

    if (proxy.closing) {
        event_base_loopbreak(proxy.base);
        return;
    }
    say('I', "ending; %u requests are under way", proxy.jobs);
    front_close();
    event_base_once(proxy.base, -1, EV_TIMEOUT, on_drained, NULL, &tv);
}

static void make_base(void)
{
    struct event_config *config = event_config_new();

    event_config_set_flag(config, EVENT_BASE_FLAG_EPOLL_USE_CHANGELIST);
    proxy.base = event_base_new_with_config(config);
    event_config_free(config);
    if (!proxy.base)
        abort();
    signal(SIGPIPE, SIG_IGN);
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--version")) {
        printf("ucm-proxy %s\n", ucm_version());
        return TOOL_GOOD;
    }
    int first = opts_parse(&verb_proxy, &proxy.set, argc, argv);

    if (first == 0)
        opts_help(&verb_proxy, stdout);
    if (first <= 0)
        return first ? TOOL_CANNOT : TOOL_GOOD;
    make_base();
    if (read_settings() || add_instances() || front_listen(proxy.set.host, proxy.set.port))
        return TOOL_CANNOT;
    struct event *term = evsignal_new(proxy.base, SIGTERM, on_signal, NULL);
    struct event *intr = evsignal_new(proxy.base, SIGINT, on_signal, NULL);
    event_add(term, NULL);
    event_add(intr, NULL);
    event_base_dispatch(proxy.base);
    front_end();
    instances_close();
    event_free(term);
    event_free(intr);
    event_base_free(proxy.base);
    return TOOL_GOOD;
}

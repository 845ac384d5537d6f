/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The store: opens the stack of tiers that store_pipeline spells, and the calls of the API that go
 * straight to it (lookups, metrics, the way in for tasks).
 *
 * A store has no threads and no locks of its own.  Tiers are opened from the slowest up, so that
 * each finds the one below ready, and closed from the fastest down, so that each can still flush
 * into the one below.
 */
#include "store/store.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

#define AT(field) offsetof(struct ucmi_store_options, field)
static const struct ucm_option options[] = {
    {"store_pipeline", UCM_T_STR, AT(pipeline), "Cache|Posix", NULL, NULL,
     "the stack of tiers, fastest first: Cache, Posix, Empty, Fake, joined by |"},
    {"namespace", UCM_T_STR, AT(ns), "default", NULL, NULL,
     "in plain words, everything besides the key that changes a block's bytes; stores share blocks "
     "only when it is equal (the engine connectors make it)"},
    {"integrity_key_file", UCM_T_STR, AT(key_file), "", NULL, NULL,
     "file of 32 random bytes or more that only its owner may use: blocks are sealed with it, and "
     "only who can read it can make blocks that are delivered (SECURITY.md); empty: checksums, "
     "which find damage only"},
    {"block_size", UCM_T_INT, AT(block_size), "0", "0", "1073741824",
     "bytes of a block as one rank holds it, all layers (the engine connectors give it)"},
    {"shard_size", UCM_T_INT, AT(shard_size), "0", "0", "1073741824",
     "bytes of one layer's part of a block; divides block_size; 0: the whole block"},
    {"rank", UCM_T_INT, AT(rank), "0", "0", "4095", "which rank's part of each block this is"},
    {"ranks", UCM_T_INT, AT(ranks), "1", "1", "4096",
     "how many ranks hold a part of each block; a lookup hits when all parts can be loaded"},
    {"timeout_ms", UCM_T_INT, AT(timeout_ms), "30000", "1", "3600000",
     "the longest a load or dump may take before it is given up"},
    {"lookup_timeout_ms", UCM_T_INT, AT(lookup_timeout_ms), "1000", "1", "3600000",
     "the longest a lookup waits to read what other processes have just published"},
    {"device", UCM_T_STR, AT(device), "auto", NULL, NULL,
     "where the engine's memory is: host, cuda, ascend, musa, maca, hip, cudart, sim (for tests), "
     "or auto: what the engine says, "
     "else host"},
    {"device_id", UCM_T_INT, AT(device_id), "0", "0", "1023", "which of the node's devices"},
    {"use_gdr", UCM_T_BOOL, AT(use_gdr), "false", NULL, NULL,
     "let storage and device memory exchange data without the host's memory (GPUDirect Storage, "
     "GPUDirect RDMA): not served; true: a warning says what of it is there and what is missing, "
     "and all data goes by way of the host's memory, where it is checked"},
    {NULL},
};
#undef AT

const struct ucm_plugin ucmi_store_plugin = {
    .kind = "options",
    .name = "store",
    .help = "what all tiers agree on",
    .options = options,
    .size = sizeof(struct ucmi_store_options),
};

static int set_geometry(ucm_store *s, ucm_conf *conf)
{
    const struct ucmi_store_options *o = s->options;
    uint64_t block = (uint64_t)o->block_size;
    uint64_t shard = (uint64_t)(o->shard_size ? o->shard_size : o->block_size);

    if (block == 0)
        return ucmi_conf_fail(conf, -EINVAL, "block_size: 0; give the bytes of one block");
    if (block % shard || block / shard > UCMI_MAX_SHARDS)
        return ucmi_conf_fail(conf, -EINVAL,
                              "shard_size: %" PRIu64 " does not divide block_size %" PRIu64
                              " into at most %d shards",
                              shard, block, UCMI_MAX_SHARDS);
    if (o->rank >= o->ranks)
        return ucmi_conf_fail(conf, -EINVAL,
                              "rank: %" PRId64 "; give one below ranks, which is %" PRId64, o->rank,
                              o->ranks);
    s->geo = (struct ucm_geometry){
        .ns_text = o->ns,
        .block_size = block,
        .shard_size = shard,
        .nshards = (uint32_t)(block / shard),
        .rank = (uint32_t)o->rank,
        .ranks = (uint32_t)o->ranks,
        .timeout_ms = (uint32_t)o->timeout_ms,
        .lookup_timeout_ms = (uint32_t)o->lookup_timeout_ms,
        .conf = conf,
    };
    return 0;
}

/* What is sealed with a key, and what is not, and what is with another, never meet, in any tier.
 * The key's id is to be seen in the digest, so that the tool knows what it takes. */
static int set_namespace(ucm_store *s, ucm_conf *conf)
{
    const struct ucmi_store_options *o = s->options;
    char *text, id[2 * sizeof s->key.id + 1];
    int err = ucmi_key_read(o->key_file, &s->key, conf);
    if (err < 0)
        return err;
    ucmi_hex(s->key.id, sizeof s->key.id, id);
    int len = asprintf(&text, "%s\n%" PRIu64 "\n%" PRIu64 "\n%" PRId64 "\n%s\n", o->ns,
                       s->geo.block_size, s->geo.shard_size, o->ranks, id);
    if (len < 0)
        return ucmi_conf_fail(conf, -ENOMEM, "out of memory");
    ucmi_hash128(text, (size_t)len, s->geo.ns);
    free(text);
    memcpy(s->geo.ns + sizeof s->geo.ns - UCMI_KEY_ID, s->key.id, UCMI_KEY_ID);
    return 0;
}

static int open_device(ucm_store *s, ucm_conf *conf)
{
    const char *name = strcmp(s->options->device, "auto") ? s->options->device : "host";
    const struct ucm_dev_ops *dev = ucmi_find_dev(name);
    char why[256] = "";

    if (!dev)
        return ucmi_conf_fail(conf, -ENODEV,
                              "device: no device is called \"%s\"; give host, auto, or one that "
                              "`ucm doctor devices` lists",
                              name);
    int err = ucmi_plugin_new(&dev->p, conf, &s->geo.dev_state);
    if (err < 0)
        return ucmi_conf_fail(conf, err, "device: %s", ucm_strerror(err));
    err = dev->open(s->geo.dev_state, (int)s->options->device_id, why, sizeof why);
    if (err < 0) {
        ucmi_plugin_free(&dev->p, s->geo.dev_state);
        return ucmi_conf_fail(conf, err, "device: %s: %s; see `ucm doctor devices`", name,
                              *why ? why : ucm_strerror(err));
    }
    s->geo.dev = dev;
    return 0;
}

/* Asked for, and not to be had: it would only be faster, so that is said and not refused. */
static void say_direct(const ucm_store *s)
{
    const struct ucm_dev_ops *dev = s->geo.dev;
    char text[256] = "nothing of the kind is known for this device";
    if (!s->options->use_gdr)
        return;
    bool there = dev->direct && dev->direct(text, sizeof text) == 0;
    ucmi_log(UCM_WARN, "store",
             "use_gdr: device %s: %s%s; all data goes by way of the host's memory (no GPUDirect "
             "Storage or RDMA)",
             dev->p.name, text, there ? ": there, but blocks are checked on the host" : "");
}

/* Finds the tiers that the pipeline names; the text is "Cache|Posix", blanks around names allowed.
 */
static int spell_pipeline(ucm_store *s, ucm_conf *conf)
{
    const char *text = s->options->pipeline;

    for (const char *p = text;; p++) {
        char name[32];
        size_t len = strcspn(p, "|"), from = strspn(p, " "), to = len;
        while (to > from && p[to - 1] == ' ')
            to--;
        snprintf(name, sizeof name, "%.*s", (int)(to > from ? to - from : 0), p + from);
        const struct ucm_tier_ops *ops = ucmi_find_tier(name);
        if (!ops)
            return ucmi_conf_fail(
                conf, -EINVAL,
                "store_pipeline: \"%s\" has no tier \"%s\"; there are Cache, Posix, "
                "Empty and Fake",
                text, name);
        if (s->ntiers == UCMI_MAX_TIERS)
            return ucmi_conf_fail(conf, -EINVAL, "store_pipeline: \"%s\" has more than %d tiers",
                                  text, UCMI_MAX_TIERS);
        s->tiers[s->ntiers++] = (struct ucm_tier){
            .ops = ops,
            .geo = &s->geo,
            .counters = &s->counters,
        };
        p += len;
        if (!*p)
            break;
    }
    const struct ucm_tier_ops *last = s->tiers[s->ntiers - 1].ops;
    if (last->needs_next)
        return ucmi_conf_fail(
            conf, -EINVAL,
            "store_pipeline: \"%s\" ends with %s, which needs a tier below: "
            "\"%s|Posix\" keeps blocks in a directory, \"%s|Empty\" in memory only",
            text, last->p.name, last->p.name, last->p.name);
    if (s->tiers[0].ops->needs_host && !s->geo.dev->host_access)
        return ucmi_conf_fail(
            conf, -EINVAL,
            "store_pipeline: \"%s\": %s cannot reach the memory of device %s; put "
            "Cache before it: \"Cache|%s\"",
            text, s->tiers[0].ops->p.name, s->geo.dev->p.name, text);
    return 0;
}

static void close_tiers(ucm_store *s)
{
    for (unsigned i = s->ntiers - s->nopen; i < s->ntiers; i++) {
        struct ucm_tier *t = &s->tiers[i];
        t->ops->close(t);
    }
}

static int open_tiers(ucm_store *s, ucm_conf *conf)
{
    for (unsigned i = s->ntiers; i-- > 0;) {
        struct ucm_tier *t = &s->tiers[i];
        t->next = i + 1 < s->ntiers ? t + 1 : NULL;
        int err = ucmi_plugin_new(&t->ops->p, conf, &t->priv);
        if (err < 0)
            return ucmi_conf_fail(conf, err, "%s: %s", t->ops->p.name, ucm_strerror(err));
        err = t->ops->open(t);
        if (err < 0)
            return ucmi_conf_fail(conf, err, "%s", *t->why ? t->why : ucm_strerror(err));
        s->nopen++;
    }
    return 0;
}

int ucm_store_open(ucm_conf *conf, ucm_store **store_p)
{
    if (!conf || !store_p)
        return -EINVAL;
    ucm_store *s = calloc(1, sizeof *s);
    if (!s)
        return ucmi_conf_fail(conf, -ENOMEM, "out of memory");
    atomic_init(&s->refs, 1);
    void *o = NULL;
    int err = ucmi_plugin_new(&ucmi_store_plugin, conf, &o);
    s->options = o;
    if (err < 0)
        err = ucmi_conf_fail(conf, err, "out of memory");
    if (!err)
        err = set_geometry(s, conf);
    if (!err)
        err = set_namespace(s, conf);
    if (!err)
        err = open_device(s, conf);
    if (!err)
        err = spell_pipeline(s, conf);
    if (!err)
        err = open_tiers(s, conf);
    s->geo.conf = NULL;
    if (!err)
        say_direct(s);
    if (err) {
        ucm_store_close(s);
        return err;
    }
    *store_p = s;
    return 0;
}

static ucm_store *store_of(const struct ucm_geometry *geo)
{
    return CONTAINER_OF(geo, ucm_store, geo);
}

const struct ucmi_key *ucmi_store_key(const struct ucm_geometry *geo)
{
    return &store_of(geo)->key;
}

void ucmi_store_hold(const struct ucm_geometry *geo)
{
    atomic_fetch_add(&store_of(geo)->refs, 1);
}

void ucmi_store_release(const struct ucm_geometry *geo)
{
    ucm_store *s = store_of(geo);
    if (atomic_fetch_sub(&s->refs, 1) > 1)
        return;
    for (unsigned i = 0; i < s->ntiers; i++)
        if (s->tiers[i].priv)
            ucmi_plugin_free(&s->tiers[i].ops->p, s->tiers[i].priv);
    if (s->geo.dev) {
        s->geo.dev->close(s->geo.dev_state);
        ucmi_plugin_free(&s->geo.dev->p, s->geo.dev_state);
    }
    if (s->options)
        ucmi_plugin_free(&ucmi_store_plugin, s->options);
    ucmi_key_wipe(&s->key);
    free(s);
}

void ucm_store_close(ucm_store *s)
{
    if (!s)
        return;
    atomic_store(&s->closing, true);
    close_tiers(s);
    ucmi_store_release(&s->geo);
}

int ucmi_store_submit(ucm_store *s, struct ucm_xfer *x)
{
    if (atomic_load_explicit(&s->closing, memory_order_relaxed))
        return -ESHUTDOWN;
    x->id = atomic_fetch_add_explicit(&s->next_task, 1, memory_order_relaxed) + 1;
    uint64_t latest = ucmi_now_ns() + s->geo.timeout_ms * UINT64_C(1000000);
    x->deadline_ns = x->deadline_ns ? MIN(x->deadline_ns, latest) : latest;
    int err = s->tiers[0].ops->submit(&s->tiers[0], x);
    if (err < 0)
        ucmi_count(&s->counters, UCMI_TASKS_REFUSED, 1);
    return err;
}

enum { LOOKUP_STEP = 256 }; /* keys at a time: what a prefix lookup may look up in vain */

/* One rank's lookup after the other; what one rank misses is not asked of the next.  found[i] ends
 * as the slowest tier that any rank needs. */
static void lookup_step(ucm_store *s, const ucm_key *keys, size_t n, uint8_t *found,
                        struct ucm_lookup *call)
{
    struct ucm_tier *t = &s->tiers[0];
    uint8_t one[LOOKUP_STEP];

    memset(found, 0, n);
    t->ops->lookup(t, keys, n, 0, 1, found, call);
    for (uint32_t rank = 1; rank < s->geo.ranks; rank++) {
        for (size_t i = 0; i < n; i++)
            one[i] = found[i] ? 0 : UINT8_MAX; /* not 0: skipped */
        t->ops->lookup(t, keys, n, rank, 1, one, call);
        for (size_t i = 0; i < n; i++)
            if (found[i])
                found[i] = one[i] ? MAX(found[i], one[i]) : 0;
    }
}

static ssize_t look_up(ucm_store *s, const ucm_key *keys, size_t n, uint8_t *found,
                       struct ucm_lookup call)
{
    if (!s || n > SSIZE_MAX || (n && (!keys || !found)))
        return -EINVAL;
    size_t hits = 0;
    for (size_t i = 0; i < n; i += LOOKUP_STEP) {
        size_t step = MIN(n - i, (size_t)LOOKUP_STEP);
        lookup_step(s, keys + i, step, found + i, &call);
        for (size_t k = i; k < i + step; k++)
            hits += found[k] != 0;
    }
    return (ssize_t)hits;
}

ssize_t ucm_peek(ucm_store *s, const ucm_key *keys, size_t n, uint8_t *found)
{
    return look_up(s, keys, n, found, (struct ucm_lookup){.up_to_date = 1, .use = UCM_LOOKS_ONLY});
}

ssize_t ucm_lookup(ucm_store *s, const ucm_key *keys, size_t n, uint8_t *found)
{
    ssize_t hits = look_up(s, keys, n, found, (struct ucm_lookup){0});
    if (hits < 0)
        return hits;
    ucmi_count(&s->counters, UCMI_LOOKUP_KEYS, (int64_t)n);
    ucmi_count(&s->counters, UCMI_LOOKUP_HITS, hits);
    return hits;
}

ssize_t ucm_lookup_prefix(ucm_store *s, const ucm_key *keys, size_t n)
{
    if (!s || n > SSIZE_MAX || (n && !keys))
        return -EINVAL;
    struct ucm_lookup call = {0};
    uint8_t found[LOOKUP_STEP];
    size_t hits = 0;
    for (size_t step = LOOKUP_STEP; hits < n && step == LOOKUP_STEP;) {
        size_t asked = MIN(n - hits, step);
        lookup_step(s, keys + hits, asked, found, &call);
        for (step = 0; step < asked && found[step]; step++)
            ;
        hits += step;
    }
    ucmi_count(&s->counters, UCMI_LOOKUP_KEYS, (int64_t)n);
    ucmi_count(&s->counters, UCMI_LOOKUP_HITS, (int64_t)hits);
    return (ssize_t)hits;
}

ssize_t ucm_removed(ucm_store *s, ucm_key *keys, size_t n, uint64_t *lost)
{
    if (!s || n > SSIZE_MAX || (n && !keys) || !lost)
        return -EINVAL;
    struct ucm_tier *t = &s->tiers[s->ntiers - 1];
    *lost = 0;
    return t->ops->removed ? t->ops->removed(t, keys, n, lost) : -ENOTSUP;
}

void ucm_prefetch(ucm_store *s, const ucm_key *keys, size_t n)
{
    if (s && keys && n && s->tiers[0].ops->prefetch)
        s->tiers[0].ops->prefetch(&s->tiers[0], keys, n);
}

void ucm_metrics(const ucm_store *s, ucm_metric_fn *fn, void *arg)
{
    if (s && fn)
        ucmi_counters_visit(&s->counters, fn, arg);
}

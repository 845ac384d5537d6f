/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loads, dumps and lookups whose outcome is a string of letters, and the rig that bundles a store
 * with memory for it.  Every wait has a deadline: a task that does not end is a hang, and ends the
 * test program, because its memory can never be given back.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "support.h"

char ts_letter(int err)
{
    switch (err) {
    case 0: return '.';
    case -ENOENT: return '-';
    case -EBADMSG: return '!';
    case -EAGAIN: return 'a';
    case -ENOSPC: return 'f';
    case -ETIMEDOUT: return 't';
    case -ECANCELED: return 'c';
    case -ESHUTDOWN: return 'd';
    case -EIO: return 'i';
    case -EINPROGRESS: return 'p';
    case -ESTALE: return 's';
    default: return '?';
    }
}

static void await(ucm_task *task, enum ucm_stage stage, const char *what)
{
    ucm_task_wait(task, stage, TS_WAIT_MS);
    if (!ucm_task_done(task, stage))
        ts_die("a %s hangs: not over after %d ms", what, TS_WAIT_MS);
}

static ucm_task *start(ucm_store *store, struct ts_mem *m, const struct ts_op *op, int *err_p)
{
    unsigned per_key = m->shape.blocks_per_key;
    ucm_key *keys = malloc((op->n + 1) * sizeof *keys);
    uint32_t *blocks = malloc((op->n * per_key + 1) * sizeof *blocks);
    ucm_task *task = NULL;

    if (!keys || !blocks)
        ts_die("no memory");
    for (size_t i = 0; i < op->n; i++) {
        keys[i] = ts_key(op->from + i);
        ts_mem_blocks(m, i, blocks + i * per_key);
    }
    struct ucm_batch b = {
        .keys = keys,
        .blocks = blocks,
        .n = op->n,
        .shard = op->shard,
        .nshards = op->nshards,
        .group = op->group,
    };
    *err_p = op->dump ? ucm_dump(store, m->map, &b, &task) : ucm_load(store, m->map, &b, &task);
    free(keys); /* ucm.h: used only during the call */
    free(blocks);
    return task;
}

/* The worst of the letters of one entry: an error stays, '.' gives way. */
static void merge(char *text, const ucm_task *task, int err, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char c = ts_letter(err ? err : ucm_task_status(task, i));
        if (text[i] == '.')
            text[i] = c;
    }
}

static void dump_layers(ucm_store *store, struct ts_mem *m, const struct ts_op *op, char *text)
{
    unsigned order[512];
    ucm_task *tasks[512];
    int errs[512];
    uint64_t seed = op->layers;

    for (unsigned s = 0; s < m->nshards; s++)
        order[s] = s;
    for (unsigned s = m->nshards; seed > 1 && s-- > 1;) {
        unsigned other = (unsigned)ts_below(&seed, s + 1), was = order[s];
        order[s] = order[other];
        order[other] = was;
    }
    for (unsigned s = 0; s < m->nshards; s++) {
        struct ts_op one = {
            .dump = true, .from = op->from, .n = op->n, .shard = order[s], .nshards = 1};
        tasks[s] = start(store, m, &one, &errs[s]);
    }
    for (unsigned s = 0; s < m->nshards; s++) {
        if (!errs[s])
            await(tasks[s], UCM_STORED, "dump of one layer");
        merge(text, tasks[s], errs[s], op->n);
        ucm_task_free(errs[s] ? NULL : tasks[s]);
    }
}

void ts_run(ucm_store *store, struct ts_mem *m, const struct ts_op *op, char *text)
{
    unsigned nshards = op->nshards ? op->nshards : m->nshards - op->shard;

    if (op->n > m->entries)
        ts_die("%zu keys in a rig for %zu", op->n, m->entries);
    memset(text, '.', op->n);
    text[op->n] = 0;
    if (!op->dump)
        ts_mem_wipe(m);
    for (size_t i = 0; op->dump && i < op->n; i++) {
        ucm_key key = ts_key(op->from + i);
        ts_mem_fill(m, i, &key);
    }
    if (op->dump && op->layers) {
        dump_layers(store, m, op, text);
    } else {
        int err;
        ucm_task *task = start(store, m, op, &err);
        if (!err)
            await(task, op->drop ? UCM_RELEASED : UCM_STORED, op->dump ? "dump" : "load");
        if (err || !op->drop)
            merge(text, task, err, op->n);
        ucm_task_free(err ? NULL : task);
    }
    for (size_t i = 0; i < op->n; i++) { /* a dump must leave the memory as it was */
        ucm_key key = ts_key(op->from + i);
        if (text[i] == '.' && !ts_mem_right(m, i, &key, op->shard, nshards))
            text[i] = 'W';
    }
    if (!ts_mem_guards_ok(m))
        memset(text, 'G', op->n);
}

void ts_lookup(ucm_store *store, uint64_t from, size_t n, char *text)
{
    ucm_key *keys = malloc((n + 1) * sizeof *keys);
    uint8_t *found = malloc(n + 1);

    if (!keys || !found)
        ts_die("no memory");
    for (size_t i = 0; i < n; i++)
        keys[i] = ts_key(from + i);
    memset(found, 0xee, n + 1);
    ssize_t hits = ucm_lookup(store, keys, n, found);
    if (found[n] != 0xee)
        ts_die("ucm_lookup wrote behind found[%zu]", n);
    for (size_t i = 0; i < n; i++) {
        text[i] = hits < 0 ? '?' : (char)('0' + found[i]);
        hits -= found[i] != 0;
    }
    text[n] = 0;
    if (hits > 0)
        ts_die("ucm_lookup counted %zd hits too many", hits);
    free(keys);
    free(found);
}

struct want {
    const char *name;
    double value;
    bool found;
};

static void match(void *arg, const struct ucm_metric_info *metric)
{
    struct want *w = arg;
    if (!strcmp(metric->name, w->name)) {
        w->value = metric->value;
        w->found = true;
    }
}

double ts_metric(const ucm_store *store, const char *name)
{
    struct want w = {.name = name};
    ucm_metrics(store, match, &w);
    if (!w.found)
        ts_die("there is no metric %s", name);
    return w.value;
}

/* ---- options ---- */

static char *find_opt(const struct ts_opts *o, const char *key)
{
    size_t len = strlen(key);
    for (const char *p = o->text; *p; p += strcspn(p, "\n"), p += *p == '\n')
        if (!strncmp(p, key, len) && p[len] == '=')
            return (char *)p;
    return NULL;
}

void ts_opt(struct ts_opts *o, const char *key, const char *fmt, ...)
{
    char value[2048], *was = find_opt(o, key);
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(value, sizeof value, fmt, ap);
    va_end(ap);
    if (was) {
        char *next = was + strcspn(was, "\n") + 1;
        memmove(was, next, strlen(next) + 1);
    }
    size_t len = strlen(o->text);
    if ((size_t)snprintf(o->text + len, sizeof o->text - len, "%s=%s\n", key, value) >=
        sizeof o->text - len)
        ts_die("the options of a rig are too long");
}

void ts_opt_key(struct ts_opts *o, const char *dir)
{
    char path[512];
    if (!TS_CAN_SEAL)
        return;
    snprintf(path, sizeof path, "%s/key", dir);
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, "thirty-two bytes, none of random", 32) != 32)
        ts_die("%s cannot be written", path);
    close(fd);
    ts_opt(o, "integrity_key_file", "%s", path);
}

long ts_opt_get(const struct ts_opts *o, const char *key, long def)
{
    const char *p = find_opt(o, key);
    return p ? strtol(p + strlen(key) + 1, NULL, 0) : def;
}

struct ts_opts ts_opts_for(const char *pipeline, const char *dir)
{
    struct ts_opts o = {""};

    ts_opt(&o, "store_pipeline", "%s", pipeline);
    ts_opt(&o, "namespace", "test %d", (int)getpid());
    ts_opt(&o, "block_size", "%d", 16 * 4096);
    ts_opt(&o, "shard_size", "4096");
    if (dir)
        ts_opt(&o, "storage_backends", "%s", dir);
    if (strstr(pipeline, "Posix")) {
        ts_opt(&o, "posix_segment_mb", "1");
        /* What a busy machine is late with is not what is tested, unless the test says so. */
        ts_opt(&o, "lookup_timeout_ms", "60000");
        ts_opt(&o, "posix_stall_ms", "60000");
    }
    if (strstr(pipeline, "Cache"))
        ts_opt(&o, "cache_buffer_capacity_gb", "0.0078125"); /* 8 MiB */
    return o;
}

/* ---- the rig ---- */

static int set_all(ucm_conf *conf, const struct ts_opts *o)
{
    char line[2048];
    int err = 0;

    for (const char *p = o->text; *p && !err; p += *p == '\n') {
        size_t len = strcspn(p, "\n");
        snprintf(line, sizeof line, "%.*s", (int)len, p);
        p += len;
        char *value = strchr(line, '=');
        *value++ = 0;
        if (line[0] != '@')
            err = ucm_conf_set(conf, line, value);
    }
    return err;
}

static const char *device_of(const struct ts_opts *o)
{
    const char *at = find_opt(o, "device");
    for (size_t i = 0; at && i < ts_ndevices; i++) {
        size_t len = strlen(ts_devices[i].name);
        if (!strncmp(at + 7, ts_devices[i].name, len) && at[7 + len] == '\n')
            return ts_devices[i].name;
    }
    return NULL;
}

static struct ts_shape shape_of(const struct ts_opts *o, size_t shard_size)
{
    struct ts_shape sh = ts_plain(shard_size);

    sh.blocks_per_key = (unsigned)ts_opt_get(o, "@blocks_per_key", 1);
    sh.nsegs = (unsigned)ts_opt_get(o, "@nsegs", 1);
    sh.pad = (size_t)ts_opt_get(o, "@pad", 64);
    sh.skew = (size_t)ts_opt_get(o, "@skew", 0);
    sh.joined = ts_opt_get(o, "@joined", 0);
    sh.device = device_of(o);
    size_t left = shard_size / sh.blocks_per_key;
    for (unsigned i = 0; i < sh.nsegs; i++) { /* the last takes what is left over */
        sh.len[i] = i + 1 < sh.nsegs ? left / 3 : left;
        left -= sh.len[i];
    }
    return sh;
}

int ts_rig_open(struct ts_rig *r, const struct ts_opts *o)
{
    size_t block = (size_t)ts_opt_get(o, "block_size", 0);
    size_t shard = (size_t)ts_opt_get(o, "shard_size", (long)block);
    struct ts_shape shape = shape_of(o, shard);

    *r = (struct ts_rig){0};
    int err = ucm_conf_new(&r->conf);
    if (err)
        ts_die("ucm_conf_new: %d", err);
    err = set_all(r->conf, o);
    if (!err)
        err = ucm_store_open(r->conf, &r->store);
    snprintf(r->why, sizeof r->why, "%s", ucm_conf_error(r->conf));
    if (!err)
        err = ts_mem_new(&r->mem, r->store, shard, (unsigned)(block / shard), &shape,
                         (size_t)ts_opt_get(o, "@entries", 32));
    if (err)
        ts_rig_close(r);
    return err;
}

void ts_rig_close(struct ts_rig *r)
{
    ucm_map_free(r->mem.map);
    r->mem.map = NULL;
    ucm_store_close(r->store); /* dumps under way still read the memory */
    ts_mem_free(&r->mem);
    ucm_conf_free(r->conf);
    r->store = NULL;
    r->conf = NULL;
}

const char *ts_rig_dump(struct ts_rig *r, uint64_t from, size_t n)
{
    ts_run(r->store, &r->mem, &(struct ts_op){.dump = true, .from = from, .n = n}, r->text);
    return r->text;
}

const char *ts_rig_load(struct ts_rig *r, uint64_t from, size_t n)
{
    ts_run(r->store, &r->mem, &(struct ts_op){.from = from, .n = n}, r->text);
    return r->text;
}

const char *ts_rig_lookup(struct ts_rig *r, uint64_t from, size_t n)
{
    ts_lookup(r->store, from, n, r->text);
    return r->text;
}

const char *ts_all(char c, size_t n)
{
    static _Thread_local char text[TS_MAX_ENTRIES + 1];
    memset(text, c, n);
    text[n] = 0;
    return text;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gpu: what it costs to copy blocks between the host's memory and a device's, through the table
 * that ucm uses (struct ucm_dev_ops): piece by piece, and in batches as the Cache tier hands them
 * over, each beside one large copy of the same bytes in the same round.
 *
 * An engine keeps layers apart, so piece p of block b is at (p * blocks + b) * piece of the
 * device's memory; a block's slot on the host is one run.  All is copied there and back and
 * compared, before anything is timed.
 *
 * One thread; up to FLIGHTS flights are under way, as on a stream of the Cache tier.
 */
#include "dev/vendor.h"

#include <dlfcn.h>
#include <inttypes.h>
#include <semaphore.h>
#include <stdlib.h>

#include "store/store.h"

#include "../tools/bench.h"

enum { FLIGHT = 8 << 20, FLIGHTS = 32, AT_ONCE = 1024 };

struct gpu {
    /* options */
    const char *device, *json;
    struct list blocks, pieces;
    uint64_t id, total, repeat;
    /* state */
    const struct ucm_dev_ops *ops;
    void *state, *stream;
    struct ucmi_gpu *vendor; /* NULL: its memory is the host's */
    char *memory;            /* `total` bytes of the device's */
    struct arena host;
    struct ucm_copy *copies; /* of all blocks, one after the other */
    size_t block, ncopies;
    sem_t flights;
    _Atomic int err;
    FILE *out;
    struct report reports[2];
    unsigned nreports;
};

static const struct opt opts[] = {
    {"device", OPT_TEXT, offsetof(struct gpu, device), "NAME", "cuda",
     "as the option `device` has it"},
    {"device-id", OPT_COUNT, offsetof(struct gpu, id), "N", "0", "which of them"},
    {"block", OPT_SIZES, offsetof(struct gpu, blocks), "SIZES", "64K,256K,1M,4M,16M",
     "sizes of a block"},
    {"pieces", OPT_COUNTS, offsetof(struct gpu, pieces), "COUNTS", "16,32,64,128",
     "pieces of a block: layers, times tensors of a layer"},
    {"total", OPT_SIZE, offsetof(struct gpu, total), "SIZE", "512M", "bytes copied in a round"},
    {"repeat", OPT_COUNT, offsetof(struct gpu, repeat), "N", "5", "rounds; medians are printed"},
    {"json", OPT_TEXT, offsetof(struct gpu, json), "FILE", "", "writes the same there as JSON"},
    {NULL},
};

/* ---- the device ---- */

/* What a vendor's library calls its allocator, after its prefix; Ascend's asks for a policy too. */
static const struct {
    const char *alloc, *free;
    bool policy;
} allocators[] = {
    {"MemAlloc_v2", "MemFree_v2", false}, {"Malloc", "Free", false}, {"rtMalloc", "rtFree", true}};

static void *function(const struct ucmi_gpu *g, const char *name)
{
    char whole[64];
    snprintf(whole, sizeof whole, "%s%s", g->vendor->prefix, name);
    return dlsym(g->library, whole);
}

static int vendor_memory(struct gpu *b)
{
    struct ucmi_gpu *g = b->vendor;
    int code = g->vendor->use(g, g->context);
    for (size_t i = 0; i < ARRAY_LEN(allocators) && !code; i++) {
        void *fn = function(g, allocators[i].alloc), *p = NULL;
        if (!fn)
            continue;
        code = allocators[i].policy ? ((int (*)(void **, size_t, int))fn)(&p, b->total, 0)
                                    : ((int (*)(void **, size_t))fn)(&p, b->total);
        b->memory = p;
        return code ? cannot("%s: error %d for %" PRIu64 " bytes; give a smaller --total",
                             allocators[i].alloc, code, b->total)
                    : 0;
    }
    return cannot("%s: no memory to be had: error %d", b->device, code);
}

static void free_memory(struct gpu *b)
{
    if (!b->vendor) {
        free(b->memory);
        return;
    }
    for (size_t i = 0; i < ARRAY_LEN(allocators) && b->memory; i++) {
        void *fn = function(b->vendor, allocators[i].free);
        if (fn) {
            ((int (*)(void *))fn)(b->memory);
            return;
        }
    }
}

static int open_device(struct gpu *b)
{
    char why[256] = "";
    b->ops = ucmi_find_dev(b->device);
    if (!b->ops)
        return cannot("no device is called %s; see `ucm doctor devices`", b->device);
    int err = ucmi_plugin_new(&b->ops->p, NULL, &b->state);
    if (!err && (err = b->ops->open(b->state, (int)b->id, why, sizeof why))) {
        ucmi_plugin_free(&b->ops->p, b->state);
        b->state = NULL;
    }
    if (err)
        return cannot("%s: %s", b->device, *why ? why : ucm_strerror(err));
    b->vendor = b->ops->probe ? b->state : NULL;
    err = b->ops->stream_new(b->state, &b->stream);
    if (err)
        cannot("%s: a stream: %s", b->device, ucm_strerror(err));
    else if (b->vendor)
        err = vendor_memory(b);
    else if (!(b->memory = malloc(b->total)))
        err = cannot("no memory for %" PRIu64 " bytes", b->total);
    return err;
}

static void close_device(struct gpu *b)
{
    if (b->stream) {
        free_memory(b);
        b->ops->stream_free(b->state, b->stream);
    }
    b->ops->close(b->state);
    ucmi_plugin_free(&b->ops->p, b->state);
}

/* ---- copying ---- */

static void landed(void *arg, int err)
{
    struct gpu *b = arg;
    if (err)
        atomic_store(&b->err, err);
    sem_post(&b->flights);
}

static void await(struct gpu *b, unsigned flights)
{
    while (flights--)
        while (sem_wait(&b->flights))
            ;
}

/* Copies v in flights, `at_once` pieces a call; how many calls it took. */
static size_t copy(struct gpu *b, int to_host, const struct ucm_copy *v, size_t n, size_t at_once)
{
    size_t calls = 0;
    while (n && !b->err) {
        size_t bytes = 0, flight = 0;
        await(b, 1);
        while (flight < n && bytes < FLIGHT)
            bytes += v[flight++].len;
        int err = 0;
        for (size_t i = 0; i < flight && !err; i += at_once, calls++)
            err = b->ops->copy(b->state, b->stream, to_host, v + i, MIN(flight - i, at_once));
        if (err)
            atomic_store(&b->err, err); /* what was queued before it ends all the same */
        if ((err = b->ops->then(b->state, b->stream, landed, b)))
            landed(b, err);
        v += flight;
        n -= flight;
    }
    await(b, FLIGHTS);
    for (unsigned i = 0; i < FLIGHTS; i++)
        sem_post(&b->flights);
    return calls;
}

/* The pieces of all blocks of that size. */
static int lay_out(struct gpu *b, uint64_t block, uint64_t pieces)
{
    size_t n = b->total / block, len = block / pieces;
    b->copies = realloc(b->copies, n * pieces * sizeof *b->copies);
    if (!b->copies)
        return cannot("no memory for %zu pieces", (size_t)(n * pieces));
    b->ncopies = n * pieces;
    for (size_t i = 0; i < n; i++)
        for (size_t p = 0; p < pieces; p++)
            b->copies[i * pieces + p] = (struct ucm_copy){b->memory + (p * n + i) * len,
                                                          b->host.base + i * block + p * len, len};
    return 0;
}

/* There one way and back the other, so that neither undoes what the other does wrong. */
static int check(struct gpu *b)
{
    static const size_t ways[][2] = {{1, AT_ONCE}, {AT_ONCE, 1}};
    for (size_t i = 0; i < ARRAY_LEN(ways); i++) {
        arena_fill(&b->host);
        copy(b, 0, b->copies, b->ncopies, ways[i][0]);
        arena_spoil(&b->host);
        copy(b, 1, b->copies, b->ncopies, ways[i][1]);
        uint64_t wrong = b->err ? 0 : arena_wrong(&b->host);
        if (b->err || wrong)
            return cannot("%s: %s", b->device,
                          wrong ? "wrong bytes came back" : ucm_strerror(b->err));
    }
    return 0;
}

/* ---- the report ---- */

static const struct column columns[] = {
    {"block", "block", COLUMN_SIZE, 8},
    {"pieces", "pieces", COLUMN_COUNT, 6},
    {"direction", "to", COLUMN_TEXT, -6},
    {"way", "copies", COLUMN_TEXT, -10},
    {"gb_per_s", "GB/s", COLUMN_NUMBER, 8, 2},
    {"of_contiguous", "of one copy", COLUMN_NUMBER, 11, 2},
    {"calls_per_block", "calls/block", COLUMN_NUMBER, 11, 2},
    {"cpu_us_per_block", "CPU us/block", COLUMN_NUMBER, 12, 1},
};

#define EACH_REPORT(b, r)                                                                          \
    for (struct report *r = (b)->reports; r < (b)->reports + (b)->nreports; r++)

static int measure(struct gpu *b, uint64_t block, uint64_t pieces, int to_host)
{
    static const struct {
        const char *name;
        size_t at_once;
    } ways[] = {{"one by one", 1}, {"batches", AT_ONCE}};
    const struct ucm_copy whole = {b->memory, b->host.base, b->total / block * block};
    double gbps[2][MAX_REPEAT], share[2][MAX_REPEAT], cpu[2][MAX_REPEAT];
    size_t calls[2] = {0};
    for (unsigned r = 0; r < b->repeat; r++) {
        struct timing t;
        timing_start(&t);
        copy(b, to_host, &whole, 1, 1);
        timing_stop(&t);
        double best = (double)whole.len / t.seconds;
        for (size_t w = 0; w < ARRAY_LEN(ways); w++) {
            timing_start(&t);
            calls[w] = copy(b, to_host, b->copies, b->ncopies, ways[w].at_once);
            timing_stop(&t);
            gbps[w][r] = (double)whole.len / t.seconds / 1e9;
            share[w][r] = gbps[w][r] * 1e9 / best;
            cpu[w][r] = t.cpu * 1e6 * (double)block / (double)whole.len;
        }
        if (b->err)
            return cannot("%s: %s", b->device, ucm_strerror(b->err));
    }
    unsigned n = (unsigned)b->repeat;
    for (size_t w = 0; w < ARRAY_LEN(ways); w++)
        EACH_REPORT(b, report)
    report_row(report, (union cell[]){
                           {.num = (double)block},
                           {.num = (double)pieces},
                           {.text = to_host ? "host" : "device"},
                           {.text = ways[w].name},
                           {.num = median(gbps[w], n)},
                           {.num = median(share[w], n)},
                           {.num = (double)(calls[w] * block) / (double)whole.len},
                           {.num = median(cpu[w], n)},
                       });
    return 0;
}

static int all_shapes(struct gpu *b)
{
    int err = 0;
    for (unsigned i = 0; i < b->blocks.n && !err; i++) {
        uint64_t block = b->blocks.v[i];
        if (block > b->total)
            continue;
        if (arena_new(&b->host, block, 1, b->total / block))
            return TOOL_CANNOT;
        size_t len = block * b->host.n;
        bool pinned = b->ops->pin && b->ops->pin(b->state, b->host.base, len) == 0;
        for (unsigned k = 0; k < b->pieces.n && !err; k++) {
            if (block % b->pieces.v[k])
                continue;
            err = lay_out(b, block, b->pieces.v[k]);
            err = err ? err : check(b);
            for (int to_host = 0; to_host < 2 && !err; to_host++)
                err = measure(b, block, b->pieces.v[k], to_host);
        }
        if (pinned)
            b->ops->unpin(b->state, b->host.base, len);
        arena_free(&b->host);
    }
    return err;
}

static int run(struct gpu *b)
{
    char text[256] = "the host's memory";
    if (!b->total || !b->repeat || b->repeat > MAX_REPEAT)
        return cannot("--total of a byte at least, --repeat of 1 to %d", MAX_REPEAT);
    FILE *json = *b->json ? fopen(b->json, "w") : NULL;
    if (*b->json && !json)
        return cannot("%s: %m", b->json);
    sem_init(&b->flights, 0, FLIGHTS);
    int err = open_device(b);
    if (!err) {
        if (b->ops->probe)
            b->ops->probe(text, sizeof text);
        report_open(&b->reports[b->nreports++], stdout, 0);
        if (json)
            report_open(&b->reports[b->nreports++], json, 1);
        EACH_REPORT(b, r)
        {
            report_text(r, "device", b->device);
            report_text(r, "by", text);
            report_number(r, "total", COLUMN_SIZE, (double)b->total);
            report_table(r, "copies", columns, COUNT_OF(columns));
        }
        err = all_shapes(b);
        EACH_REPORT(b, r)
        {
            report_table_end(r);
            report_close(r);
        }
    }
    if (b->state)
        close_device(b);
    sem_destroy(&b->flights);
    free(b->copies);
    if (json)
        fclose(json);
    return err ? TOOL_CANNOT : TOOL_GOOD;
}

static const struct verb verb = {
    .name = "ucm-bench-gpu",
    .operands = "",
    .help = "copies between the host's memory and a device's",
    .about =
        "Both ways, piece by piece and in batches, beside one large copy of the same bytes.  The "
        "host's memory is registered with the device, as the DRAM pool is.",
    .opts = opts,
    .size = sizeof(struct gpu),
};

int main(int argc, char **argv)
{
    struct gpu b = {0};
    int at = opts_parse(&verb, &b, argc, argv);
    ucm_log_to(NULL, NULL, UCM_WARN);
    if (at == 0)
        opts_help(&verb, stdout);
    return at < 0 ? TOOL_CANNOT : at == 0 ? TOOL_GOOD : run(&b);
}

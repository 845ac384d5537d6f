/* SPDX-License-Identifier: Apache-2.0 */
/*
 * restart DIR BLOCKS [--json]: what a restart costs when storage holds that many blocks, and
 * lookups over them.
 *
 * To store a million blocks takes minutes and gigabytes, and neither a restart nor a lookup reads
 * them. So one block is stored through the API, and then the journal of its lane is written anew
 * with as many records as were asked for, over segments that are holes.  From there on all is
 * measured through the API as `ucm bench` does it.
 */
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "store/lane.h"

#include "../tools/bench.h"

enum { RECORDS = 4096 }; /* written at a time; fills pages */

static int store_one(const struct bench *b)
{
    struct arena a = {0};
    ucm_store *store;
    struct timing t;
    int err = arena_new(&a, LOOKUP_BLOCK, 1, 1);

    if (!err && !(err = bench_store(b, NULL, LOOKUP_BLOCK, LOOKUP_BLOCK, &store))) {
        arena_fill(&a);
        err = move_blocks(b, store, &a, 1, NULL, &t);
        ucm_store_close(store);
    }
    arena_free(&a);
    return err;
}

static int make_segments(int lane, const struct ucmi_journal_header *h, uint64_t blocks)
{
    for (uint64_t i = 0; i * h->slots < blocks; i++) {
        char name[32];
        snprintf(name, sizeof name, "seg-%06" PRIu64, i);
        int fd = openat(lane, name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || ftruncate(fd, (off_t)(h->slots * h->slot_size)) < 0)
            return cannot("%s: %m", name);
        close(fd);
    }
    return 0;
}

/* Record i of the journal: the owner begins, then block after block. */
static struct ucmi_record record(const struct ucmi_journal_header *h, uint64_t i)
{
    struct ucmi_record r = {.seq = i + 1,
                            .epoch = h->epoch,
                            .op = i ? UCMI_PUT : UCMI_EPOCH,
                            .rank = (uint16_t)h->rank};

    if (i) {
        r.key = bench_key(i - 1);
        r.segment = (uint32_t)((i - 1) / h->slots);
        r.slot = (uint32_t)((i - 1) % h->slots);
        r.tick = ucmi_tick((uint64_t)time(NULL));
    }
    ucmi_record_seal(&ucmi_plain, &r);
    return r;
}

static int write_records(int fd, const struct ucmi_journal_header *h, uint64_t n)
{
    struct ucmi_record *v = calloc(RECORDS, sizeof *v);
    int err = v ? 0 : -ENOMEM;

    for (uint64_t i = 0; i < n && !err; i += RECORDS) {
        for (uint64_t k = 0; k < RECORDS; k++)
            v[k] = i + k < n ? record(h, i + k) : (struct ucmi_record){0};
        off_t off = UCMI_PAGE + (off_t)(i * sizeof *v);
        if (pwrite(fd, v, RECORDS * sizeof *v, off) != RECORDS * sizeof *v)
            err = -errno;
    }
    free(v);
    return err;
}

static int rewrite_journal(const char *path, uint64_t blocks)
{
    struct ucmi_journal_header *h = aligned_alloc(UCMI_PAGE, sizeof *h);
    char *dir = strndup(path, strlen(path) - strlen("/journal"));
    int lane = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int fd = openat(lane, "journal", O_RDWR | O_CLOEXEC);
    int err = h && fd >= 0 ? ucmi_journal_header_read(fd, h) : -errno;

    if (!err && !(err = make_segments(lane, h, blocks))) {
        h->base = h->summary = 0;
        ucmi_journal_header_seal(h);
        err = pwrite(fd, h, sizeof *h, 0) == (ssize_t)sizeof *h ? 0 : -errno;
        if (!err) /* as its owner would have */
            err = -posix_fallocate(fd, 0, (off_t)ucmi_journal_room(blocks));
        err = err ? err : write_records(fd, h, blocks + 1);
    }
    close(fd);
    close(lane);
    free(dir);
    free(h);
    return err < 0 ? cannot("%s: %s", path, strerror(-err)) : err;
}

static int make_lane(const struct bench *b, uint64_t blocks)
{
    char pattern[PATH_MAX];
    glob_t found = {0};
    int err = store_one(b);

    if (err)
        return err;
    snprintf(pattern, sizeof pattern, "%s/ucm/*/*/journal", b->scratch);
    if (glob(pattern, 0, NULL, &found) || found.gl_pathc != 1)
        err = cannot("%s: not one journal", pattern);
    else
        err = rewrite_journal(found.gl_pathv[0], blocks);
    globfree(&found);
    return err;
}

int main(int argc, char **argv)
{
    struct bench b = {.pipeline = "Posix",
                      .engine = "auto",
                      .depth = 32,
                      .direct = 1,
                      .shards = 1,
                      .task = 1 << 20,
                      .keys = {.v = {1, 128, 1024, 8192}, .n = 4}};
    struct start st;
    ucm_store *store;

    ucm_log_to(NULL, NULL, UCM_WARN);
    if (argc < 3 || argc > 4)
        return cannot("usage: restart DIR BLOCKS [--json]");
    uint64_t blocks = strtoull(argv[2], NULL, 10);
    snprintf(b.scratch, sizeof b.scratch, "%s/ucm-bench-XXXXXX", argv[1]);
    if (!blocks || !mkdtemp(b.scratch))
        return cannot("%s: %m", argv[1]);
    int err = make_lane(&b, blocks);
    err = err ? err : open_and_ask(&b, blocks, &store, &st);
    if (!err) {
        report_open(&b.report, stdout, argc == 4);
        start_rows(&b, &st, 1);
        lookup_table(&b);
        err = lookup_rows(&b, store, blocks);
        report_table_end(&b.report);
        report_close(&b.report);
        ucm_store_close(store);
    }
    bench_empty_scratch(&b);
    rmdir(b.scratch);
    return err ? TOOL_CANNOT : TOOL_GOOD;
}

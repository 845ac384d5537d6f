/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A whole backend by a bad neighbour.  A real lane is changed as the input says, with all checksums
 * made right again, so that what the readers rely on is only what they check themselves.  Then a
 * store is opened on it: nothing may crash, hang or take memory out of proportion, a block that is
 * loaded has the bytes of its key, and what is STORED when nobody interferes any more is there for
 * the next store.
 *
 * The bytes of shards are never changed together with their checksums: who can do that can plant
 * blocks (SECURITY.md).
 */
#include "../posix/harness.h"

#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "store/journal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MUST(x) ((x) ? (void)0 : must(#x, __LINE__))
static void must(const char *what, int line)
{
    fprintf(stderr, "fuzz_lane.c:%d: not so: %s\n", line, what);
    abort();
}

enum { BLOCKS = 6, SLOT = 3 * UCMI_PAGE, MAX_RECORDS = 512, SEG = 1 << 20, NEW = 1000 };
static const struct shape shape = {UCMI_PAGE, 2, 0};
static const char options[] = "posix_segment_mb=1 posix_capacity_gb=0.01 posix_io_engine=psync";

/* ---- memory ---- */

/* What the slot tables of a file system full of our blocks would take. */
static size_t most_memory = SIZE_MAX;

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__real_aligned_alloc(size_t align, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_aligned_alloc(size_t align, size_t n);
void *__wrap_malloc(size_t n)
{
    MUST(n <= most_memory);
    return __real_malloc(n);
}
void *__wrap_calloc(size_t n, size_t size)
{
    MUST(!size || n <= most_memory / size);
    return __real_calloc(n, size);
}
void *__wrap_realloc(void *p, size_t n)
{
    MUST(n <= most_memory);
    return __real_realloc(p, n);
}
void *__wrap_aligned_alloc(size_t align, size_t n)
{
    MUST(n <= MAX(most_memory, ucmi_slot_size(UCMI_MAX_BLOCK))); /* a block to be verified */
    return __real_aligned_alloc(align, n);
}

/* ---- the lane as it was made ---- */

struct lane {
    union {
        struct ucmi_journal_header h;
        uint8_t bytes[UCMI_PAGE];
    } head;
    struct ucmi_record r[MAX_RECORDS];
    size_t n;
    struct ucmi_slot_header slot[BLOCKS];
    off_t journal_len, seg_len; /* 0: as long as they are */
    bool raw_seq;
};
static struct lane real;
static uint8_t shards[BLOCKS][SLOT - UCMI_PAGE];
static char top[128], ns[64], name[64];

static void clean(void)
{
    remove_tree(top);
}

static void keep(void *arg, const struct ucmi_record *r)
{
    MUST(real.n < MAX_RECORDS);
    real.r[real.n++] = *r;
}

static void read_real(void)
{
    static uint8_t buf[UCMI_PAGE] __attribute__((aligned(UCMI_PAGE)));
    char path[512];
    bool moved = false;
    lane_path(top, "journal", path, sizeof path);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    MUST(ucmi_journal_header_read(fd, &real.head.h) == 0);
    struct ucmi_jpos pos = ucmi_jpos_first(&real.head.h);
    MUST(ucmi_journal_read(&ucmi_plain, fd, buf, sizeof buf, &pos, &moved, keep, NULL) == 0);
    close(fd);
    lane_path(top, "seg-000000", path, sizeof path);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    for (int i = 0; i < BLOCKS; i++) {
        MUST(pread(fd, &real.slot[i], UCMI_PAGE, i * SLOT) == UCMI_PAGE);
        MUST(pread(fd, shards[i], sizeof shards[i], i * SLOT + UCMI_PAGE) == sizeof shards[i]);
    }
    close(fd);
    MUST(sscanf(path + strlen(top), "/ucm/%63[^/]/%63[^/]/", ns, name) == 2);
}

static void make_real(void)
{
    const char *tmp = getenv("UCMT_DIR");
    struct statvfs fs;
    struct memory m;
    if (!tmp)
        tmp = access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm"; /* small, and fast */
    snprintf(top, sizeof top, "%s/ucm-fuzz-XXXXXX", tmp);
    MUST(mkdtemp(top) && statvfs(top, &fs) == 0);
    atexit(clean);
    ucm_store *store = open_store(top, &shape, options);
    memory_new(&m, store, &shape, BLOCKS);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    read_real();
    size_t slots = (size_t)fs.f_blocks * fs.f_frsize / SLOT;
    most_memory = MAX(slots * 64, (size_t)16 << 20);
}

/* ---- the input as a source of choices ---- */

struct input {
    const uint8_t *p;
    size_t left;
};

static uint32_t pick(struct input *in, uint32_t below)
{
    uint32_t v = 0;
    for (uint32_t max = 1; max < below && in->left; max <<= 8, in->left--)
        v = v << 8 | *in->p++;
    return below ? v % below : 0;
}

static uint64_t number(struct input *in)
{
    static const uint64_t likely[] = {
        0,
        1,
        2,
        64,
        85,
        255,
        4095,
        4096,
        8192,
        12288,
        65535,
        65536,
        99999,
        (1 << 20) - 1,
        1 << 20,
        INT32_MAX,
        (uint64_t)INT32_MAX + 1,
        UINT32_MAX - 1,
        UINT32_MAX,
        UINT64_C(1) << 32,
        UINT64_C(1) << 40,
        INT64_MAX,
        (uint64_t)INT64_MAX + 1,
        UINT64_MAX - 1,
        UINT64_MAX,
    };
    uint32_t which = pick(in, 2 * ARRAY_LEN(likely));
    if (which < ARRAY_LEN(likely))
        return likely[which];
    return pick(in, 256) % (which + 1);
}

/* ---- changing it ---- */

static void change_head(struct lane *l, struct input *in)
{
    struct ucmi_journal_header *h = &l->head.h;
    uint64_t v = number(in);
    switch (pick(in, 18)) {
    case 0: h->rank = (uint32_t)v; break;
    case 1: h->ranks = (uint32_t)v; break;
    case 2: h->nshards = (uint32_t)v; break;
    case 3: h->block_size = v; break;
    case 4: h->shard_size = v; break;
    case 5: h->slot_size = v; break;
    case 6:
    case 7: h->slots = (uint32_t)v; break;
    case 8:
    case 9: h->epoch = (uint32_t)v; break;
    case 10: h->owner = v; break;
    case 11: h->generation = v; break;
    case 12: h->base = v; break;
    case 13: h->summary = v; break;
    case 14: memset(h->host, 'x', sizeof h->host); break;
    case 15: h->boot[0] ^= 1; break;
    case 16: h->ns[v % sizeof h->ns] ^= 1; break;
    default: /* another geometry, in itself consistent */
        h->nshards = (uint32_t)(v % 600);
        h->block_size = h->nshards * h->shard_size;
        h->slot_size = ucmi_slot_size(h->block_size);
    }
}

static void insert(struct lane *l, size_t at, const struct ucmi_record *r, size_t times)
{
    times = MIN(times, MAX_RECORDS - l->n);
    memmove(l->r + at + times, l->r + at, (l->n - at) * sizeof *r);
    for (size_t i = 0; i < times; i++)
        l->r[at + i] = *r;
    l->n += times;
}

static void change_record(struct lane *l, struct input *in)
{
    size_t at = pick(in, (uint32_t)l->n);
    struct ucmi_record *r = &l->r[at], copy = *r;
    uint64_t v = number(in);
    switch (pick(in, 14)) {
    case 0: r->seq = v; break;
    case 1: r->epoch = (uint32_t)v; break;
    case 2: r->op = (uint8_t)v; break;
    case 3: r->rank = (uint16_t)v; break;
    case 4: r->key = key_of(v % BLOCKS); break;
    case 5: r->segment = (uint32_t)v; break;
    case 6: r->slot = (uint32_t)v; break;
    case 7: r->depth = r->tick = (uint32_t)v; break;
    case 8: r->header_sum = (uint32_t)v; break;
    case 9:
        copy.op = UCMI_EPOCH;
        copy.epoch = (uint32_t)v;
        insert(l, at, &copy, 1);
        for (at++; at < l->n; at++)
            l->r[at].epoch = copy.epoch;
        break;
    case 10:
        copy.op = UCMI_MOVED;
        insert(l, at, &copy, 1 + v % 200);
        break;
    case 11:
        copy.op = (uint8_t)(UCMI_PUT + v % 3);
        insert(l, pick(in, (uint32_t)l->n), &copy, 1);
        break;
    case 12: insert(l, pick(in, (uint32_t)l->n), &copy, 1); break;
    default: l->raw_seq = v & 1;
    }
}

static void change_slot(struct lane *l, struct input *in)
{
    uint32_t at = pick(in, BLOCKS);
    struct ucmi_slot_header *h = &l->slot[at];
    uint64_t v = number(in);
    switch (pick(in, 10)) {
    case 0: h->nshards = (uint32_t)v; break;
    case 1: h->shard_size = v; break;
    case 2: h->rank = (uint32_t)v; break;
    case 3: h->depth = (uint32_t)v; break;
    case 4: h->ns[v % sizeof h->ns] ^= 1; break;
    case 5: h->key = key_of(NEW + v); break;
    case 6: h->shard_sum[v % UCMI_MAX_SHARDS] ^= 1; break;
    case 7: h->zero[v % sizeof h->zero] ^= 1; break;
    case 8: *h = l->slot[v % BLOCKS]; break;
    default: memset(h, (int)v, sizeof *h);
    }
    ucmi_slot_header_seal(&ucmi_plain, h);
    for (size_t i = 0; i < l->n && pick(in, 2); i++) /* and the records say so */
        if (l->r[i].op == UCMI_PUT && l->r[i].slot == at)
            l->r[i].header_sum = (uint32_t)h->sum;
}

static void change(struct lane *l, struct input *in)
{
    *l = real;
    for (uint32_t n = 1 + pick(in, 6); n && in->left; n--)
        switch (pick(in, 8)) {
        case 0:
        case 1: change_head(l, in); break;
        case 2:
        case 3:
        case 4: change_record(l, in); break;
        case 5: change_slot(l, in); break;
        case 6: l->journal_len = (off_t)(number(in) % (UINT64_C(1) << 31)); break;
        default: l->seg_len = (off_t)(number(in) % (UINT64_C(1) << 37));
        }
}

/* ---- writing it ---- */

static void write_file(int dir, const char *file, const void *p, size_t len, off_t total)
{
    int fd = openat(dir, file, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return; /* something else has that name */
    MUST(pwrite(fd, p, len, 0) == (ssize_t)len);
    if (total)
        MUST(ftruncate(fd, total) == 0 || errno == EFBIG || errno == EINVAL);
    close(fd);
}

static void write_journal(const struct lane *l, int dir, const char *file)
{
    static uint8_t buf[UCMI_PAGE + sizeof l->r];
    struct ucmi_journal_header h = l->head.h;
    ucmi_journal_header_seal(&h);
    memset(buf, 0, sizeof buf);
    memcpy(buf, &h, sizeof h);
    for (size_t i = 0; i < l->n; i++) {
        struct ucmi_record r = l->r[i];
        r.seq = l->raw_seq ? r.seq : h.base + 1 + i;
        ucmi_record_seal(&ucmi_plain, &r);
        memcpy(buf + UCMI_PAGE + i * sizeof r, &r, sizeof r);
    }
    write_file(dir, file, buf, UCMI_PAGE + l->n * sizeof l->r[0], l->journal_len);
}

static void write_lane(const struct lane *l, int at, const char *as)
{
    MUST(mkdirat(at, as, 0700) == 0 || errno == EEXIST);
    int dir = openat(at, as, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    write_journal(l, dir, "journal");
    write_file(dir, "lock", "", 0, 0);
    int fd = openat(dir, "seg-000000", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    for (int i = 0; i < BLOCKS; i++) {
        struct iovec iov[] = {{(void *)&l->slot[i], UCMI_PAGE}, {shards[i], sizeof shards[i]}};
        MUST(pwritev(fd, iov, 2, i * SLOT) == SLOT);
    }
    MUST(ftruncate(fd, l->seg_len ? l->seg_len : SEG / SLOT * SLOT) == 0 || errno == EFBIG);
    close(fd);
    close(dir);
}

static const char *const lanes[] = {"r0-0000000000000001", "r9999-ffffffffffffffff", "r+1-0x1",
                                    "r0-1", "r1-00000000000000000000001"};
static const char *const files[] = {"seg-000001",     "seg-000063", "seg-000064",  "seg-065535",
                                    "seg-065536",     "seg-999999", "seg-1048575", "seg-1",
                                    "seg-4294967295", "seg-+00002", "seg-000000x", "journal.new"};

static void write_strangers(const struct lane *l, struct input *in, int at, int dir)
{
    for (uint32_t n = pick(in, 4); n; n--)
        write_file(dir, files[pick(in, ARRAY_LEN(files))], "x", 1,
                   (off_t)(number(in) % (UINT64_C(1) << 37)));
    if (pick(in, 4) == 1)
        write_lane(l, at, lanes[pick(in, ARRAY_LEN(lanes))]);
    if (pick(in, 4) == 1) {
        static char text[16384];
        size_t len = (size_t)snprintf(text, sizeof text, "{\"namespace\": \"");
        size_t more = MIN(in->left, sizeof text - len);
        memcpy(text + len, in->p, more);
        write_file(at, "namespace.json", text, len + more, pick(in, 2) ? 16383 : 0);
    }
}

/* ---- what readers make of it ---- */

static void load(ucm_store *store, struct memory *m, uint64_t first, bool sure)
{
    smear(m);
    struct outcome out = move(store, m, false, first, 0, 0);
    for (uint64_t i = 0; i < m->n; i++) {
        MUST(!sure || out.status[i] == 0);
        MUST(out.status[i] || painted(m, i, first + i));
    }
    free(out.status);
}

static bool dump(ucm_store *store, struct memory *m, uint64_t first)
{
    for (uint64_t i = 0; i < m->n; i++)
        paint(m, i, first + i);
    struct outcome out = move(store, m, true, first, 0, 0);
    free(out.status);
    return out.stored == 0;
}

static void see_block(void *arg, const struct ucm_lane_info *lane, const struct ucm_block_info *b)
{
    MUST(strlen(lane->ns_text) < 16384);
    MUST(lane->host && lane->block_size);
}

static void inspect(const char *dir)
{
    struct ucm_inspect how = {.flags = UCM_INSPECT_VERIFY, .block = see_block};
    MUST(ucm_inspect(dir, &how) == 0);
}

static void use(const char *dir, struct input *in, struct lane *l, int lane_dir)
{
    ucm_store *store = NULL;
    struct memory m;
    char why[512];
    inspect(dir);
    MUST(try_open(dir, &shape, options, &store, why, sizeof why) == 0);
    memory_new(&m, store, &shape, BLOCKS);
    count_found(store, 0, BLOCKS);
    load(store, &m, 0, false);
    uint32_t changes = pick(in, 3);
    for (uint32_t n = changes; n; n--) { /* changed under the eyes of a reader */
        change(l, in);
        bool moved = pick(in, 2);
        write_journal(l, lane_dir, moved ? "journal.new" : "journal");
        if (moved)
            renameat(lane_dir, "journal.new", lane_dir, "journal");
        count_found(store, 0, BLOCKS);
        load(store, &m, 0, false);
    }
    /* The lane may be the reader's own by now.  A record of it that was changed in place is the end
     * of the journal for who reads it next, and hides what was STORED behind it: that could only be
     * told by reading the whole journal again before each append (seed 13344656970969769317). */
    bool stored = dump(store, &m, NEW) && !changes;
    load(store, &m, NEW, stored);
    load(store, &m, 0, false);
    memory_free(&m);
    ucm_store_close(store);
    inspect(dir);
    MUST(try_open(dir, &shape, options, &store, why, sizeof why) == 0);
    memory_new(&m, store, &shape, BLOCKS);
    load(store, &m, NEW, stored);
    load(store, &m, 0, false);
    memory_free(&m);
    ucm_store_close(store);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct lane l;
    struct input in = {data, size};
    char dir[256], path[512];

    if (!*top)
        make_real();
    snprintf(dir, sizeof dir, "%s/x", top);
    snprintf(path, sizeof path, "%s/ucm/%s", dir, ns);
    MUST(mkdir(dir, 0700) == 0);
    snprintf(path, sizeof path, "%s/ucm", dir);
    MUST(mkdir(path, 0700) == 0);
    snprintf(path, sizeof path, "%s/ucm/%s", dir, ns);
    MUST(mkdir(path, 0700) == 0);
    int at = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    change(&l, &in);
    write_lane(&l, at, name);
    int lane_dir = openat(at, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    write_strangers(&l, &in, at, lane_dir);
    use(dir, &in, &l, lane_dir);
    close(lane_dir);
    close(at);
    remove_tree(dir);
    return 0;
}

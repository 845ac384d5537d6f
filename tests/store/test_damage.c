/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A backend that is not as it was left: bits flipped in each region of a slot, slots swapped and
 * stale, segments cut, exchanged and gone, journals cut at each record and filled with garbage,
 * strange files. A damaged block is a miss, a whole one is right, nothing crashes, and the store
 * goes on storing.
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "support.h"

enum {
    N = 12,
    SHARDS = 16,
    SHARD = 4096,
    PAGE = 4096,
    SLOT = PAGE + SHARDS * SHARD,
    MAX_FILES = 16
};

/* Dumps keys 0 .. N - 1 into a fresh directory. */
static struct ts_opts fresh(void **state, const char **dir_p)
{
    const struct ts_stack *stack = *state;

    *dir_p = ts_dir();
    struct ts_opts o = ts_opts_for(stack->pipeline, *dir_p);
    struct ts_rig r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
    return o;
}

/* Loads all; `all` says of each key whether it has to be there ('.'), to be a miss ('x'), or may
 * be either ('?').  Then all of it is dumped and loaded again, by the same store and by the next.
 */
static void check(const struct ts_opts *o, const char *dir, const char *all)
{
    struct ts_rig r = ts_rig_sure(o);
    char must[N + 1];

    strcpy(must, all); /* ts_all's, perhaps, which is used again */
    ts_rig_load(&r, 0, N);
    for (size_t i = 0; i < N; i++) {
        bool right = r.text[i] == '.', miss = strchr("-!i?", r.text[i]);
        if ((must[i] == '.' && !right) || (must[i] == 'x' && !miss) || !(right || miss))
            fail_msg("loaded %s, must be %s", r.text, must);
    }
    ts_lookup(r.store, 0, N, r.text);
    for (size_t i = 0; i < N; i++)
        if (must[i] != '?' && (r.text[i] == '0') != (must[i] == 'x'))
            fail_msg("found %s, must be %s", r.text, must);
    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    if (strchr(must, '?')) {
        assert_int_equal(strspn(ts_rig_load(&r, 0, N), ".-"), N);
        assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    }
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_dump(&r, 500, N), ts_all('.', N));
    ts_rig_close(&r);
    r = ts_rig_sure(o);
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_load(&r, 500, N), ts_all('.', N));
    ts_rig_close(&r);
    ts_remove(dir);
}

struct place {
    char path[TS_PATH];
    off_t off;
};

/* Where the slot of a key is, found by the key in its header. */
static struct place find_slot(const char *dir, uint64_t no)
{
    static char paths[MAX_FILES][TS_PATH];
    size_t n = ts_files(dir, "seg-", paths, MAX_FILES);
    ucm_key key = ts_key(no);
    struct place p;
    uint8_t page[PAGE];

    for (size_t i = 0; i < n; i++) {
        for (p.off = 0; p.off + PAGE <= ts_file_size(paths[i]); p.off += PAGE) {
            ts_read_at(paths[i], p.off, page, PAGE);
            if (memmem(page, 256, key.b, sizeof key.b)) {
                strcpy(p.path, paths[i]);
                return p;
            }
        }
    }
    ts_die("no slot in %s has key %llu", dir, (unsigned long long)no);
}

static void only_file(const char *dir, const char *prefix, char path[TS_PATH])
{
    static char paths[MAX_FILES][TS_PATH];
    assert_int_equal(ts_files(dir, prefix, paths, MAX_FILES), 1);
    strcpy(path, paths[0]);
}

/* ---- slots ---- */

/* Flips one byte in every other block, at the offsets from list[*next] on, as many as there are. */
static void flip_pass(void **state, const off_t *list, size_t count, size_t *next)
{
    char must[N + 1];
    const char *dir;
    struct ts_opts o = fresh(state, &dir);

    strcpy(must, ts_all('.', N));
    for (size_t i = 0; i < N && *next < count; i += 2, (*next)++) {
        struct place p = find_slot(dir, i);
        ts_flip(p.path, p.off + list[*next]);
        must[i] = 'x';
    }
    check(&o, dir, must);
}

static void test_a_flip_in_the_header(void **state)
{
    static const off_t offsets[] = {0,  7,  8,  12,  16,  23,  24,  39,   40,   55,   56,   60,  64,
                                    71, 72, 80, 184, 191, 192, 200, 2048, 3904, 4087, 4088, 4095};
    for (size_t next = 0; next < TS_LEN(offsets);)
        flip_pass(state, offsets, TS_LEN(offsets), &next);
}

static void test_a_flip_in_each_shard(void **state)
{
    off_t offsets[SHARDS * 3];
    for (off_t s = 0; s < SHARDS; s++) {
        offsets[s * 3] = PAGE + s * SHARD;
        offsets[s * 3 + 1] = PAGE + s * SHARD + 1777;
        offsets[s * 3 + 2] = PAGE + s * SHARD + SHARD - 1;
    }
    for (size_t next = 0; next < TS_LEN(offsets);)
        flip_pass(state, offsets, TS_LEN(offsets), &next);
}

static void test_a_flip_harms_only_its_shard(void **state)
{
    const char *dir;
    struct ts_opts o = fresh(state, &dir);
    struct place p = find_slot(dir, 3);
    struct ts_op before = {.from = 3, .n = 1, .shard = 0, .nshards = 9};
    struct ts_op behind = {.from = 3, .n = 1, .shard = 10, .nshards = 6};
    struct ts_op at = {.from = 3, .n = 1, .shard = 8, .nshards = 4};
    struct ts_opts posix = o;

    ts_opt(&posix, "store_pipeline", "Posix"); /* Cache reads whole blocks */
    ts_flip(p.path, p.off + PAGE + 9 * SHARD + 5);
    struct ts_rig r = ts_rig_sure(&posix);
    ts_run(r.store, &r.mem, &before, r.text);
    assert_string_equal(r.text, ".");
    ts_run(r.store, &r.mem, &behind, r.text);
    assert_string_equal(r.text, ".");
    ts_run(r.store, &r.mem, &at, r.text);
    assert_string_equal(r.text, "!");
    assert_true(ts_metric(r.store, "disk_bad_total") >= 1);
    ts_rig_close(&r);
    check(&o, dir, "...x........");
}

static void test_damage_while_it_runs(void **state)
{
    const char *dir;
    struct ts_opts o = fresh(state, &dir), posix = o;
    ts_opt(&posix, "store_pipeline", "Posix");
    struct ts_rig r = ts_rig_sure(&posix);

    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    struct place p = find_slot(dir, 4), q = find_slot(dir, 7);
    ts_flip(p.path, p.off + PAGE + 100);
    ts_flip(q.path, q.off + 20);
    assert_string_equal(ts_rig_load(&r, 0, N), "....!..!....");
    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
    check(&o, dir, ts_all('.', N));
}

static void copy_bytes(const struct place *from, off_t skip, size_t len, uint8_t *buf)
{
    ts_read_at(from->path, from->off + skip, buf, len);
}

/* Exchanges len bytes from skip on of two slots. */
static void swap(const char *dir, uint64_t a, uint64_t b, off_t skip, size_t len)
{
    static uint8_t one[SLOT], two[SLOT];
    struct place p = find_slot(dir, a), q = find_slot(dir, b);

    copy_bytes(&p, skip, len, one);
    copy_bytes(&q, skip, len, two);
    ts_write_at(p.path, p.off + skip, two, len);
    ts_write_at(q.path, q.off + skip, one, len);
}

static void test_swapped_slots(void **state)
{
    const char *dir;
    struct ts_opts o = fresh(state, &dir);

    swap(dir, 1, 2, 0, SLOT);                       /* whole */
    swap(dir, 4, 5, PAGE, SLOT - PAGE);             /* the data alone */
    swap(dir, 7, 8, 0, PAGE);                       /* the headers alone */
    swap(dir, 10, 11, PAGE + 3 * SHARD, 2 * SHARD); /* some shards */
    check(&o, dir, ".xx.xx.xx.xx");
}

static void test_shards_swapped_within_a_block(void **state)
{
    static uint8_t one[SHARD], two[SHARD];
    const char *dir;
    struct ts_opts o = fresh(state, &dir);
    struct place p = find_slot(dir, 6);

    copy_bytes(&p, PAGE + 2 * SHARD, SHARD, one);
    copy_bytes(&p, PAGE + 12 * SHARD, SHARD, two);
    ts_write_at(p.path, p.off + PAGE + 2 * SHARD, two, SHARD);
    ts_write_at(p.path, p.off + PAGE + 12 * SHARD, one, SHARD);
    check(&o, dir, "......x.....");
}

static void test_zeroed_slots(void **state)
{
    static const uint8_t zeros[SLOT];
    const char *dir;
    struct ts_opts o = fresh(state, &dir);
    struct place p = find_slot(dir, 0), q = find_slot(dir, 5), s = find_slot(dir, 9);

    ts_write_at(p.path, p.off, zeros, SLOT);
    ts_write_at(q.path, q.off, zeros, PAGE);
    ts_write_at(s.path, s.off + PAGE, zeros, SLOT - PAGE);
    check(&o, dir, "x....x...x..");
}

/* ---- stale segments and journals ---- */

static void rewrite(const struct ts_opts *o, uint64_t from, unsigned blocks)
{
    struct ts_rig r = ts_rig_sure(o);
    for (unsigned i = 0; i < blocks; i += N)
        ts_rig_dump(&r, from + i, N);
    ts_rig_close(&r);
}

/* Everything there may be right or absent; a store with an older segment must not take one for the
 * other. */
static void check_keys(const struct ts_opts *o, uint64_t from, unsigned blocks)
{
    struct ts_rig r = ts_rig_sure(o);
    for (unsigned i = 0; i < blocks; i += N) {
        ts_rig_load(&r, from + i, N);
        if (strspn(r.text, ".-!") != N)
            fail_msg("keys from %llu: %s", (unsigned long long)from + i, r.text);
    }
    ts_rig_close(&r);
}

/* All files of one kind as they were before their slots were used again. */
static void stale(void **state, const char *prefix)
{
    static char paths[MAX_FILES][TS_PATH];
    char copy[TS_PATH];
    const char *dir = ts_dir(), *aside = ts_dir();
    struct ts_opts o = ts_opts_for(((const struct ts_stack *)*state)->pipeline, dir);

    ts_opt(&o, "posix_capacity_gb", "%.9f", 2.0 / 1024); /* about 24 blocks */
    rewrite(&o, 0, N);
    size_t n = ts_files(dir, prefix, paths, MAX_FILES);
    assert_in_range(n, 1, MAX_FILES - 1);
    for (size_t i = 0; i < n; i++) {
        snprintf(copy, sizeof copy, "%s/%zu", aside, i);
        ts_copy_file(paths[i], copy);
    }
    rewrite(&o, 1000, 8 * N);
    for (size_t i = 0; i < n; i++) {
        snprintf(copy, sizeof copy, "%s/%zu", aside, i);
        ts_copy_file(copy, paths[i]);
    }
    check_keys(&o, 0, N);
    check_keys(&o, 1000, 8 * N);
    rewrite(&o, 2000, N);
    struct ts_rig r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_load(&r, 2000, N), ts_all('.', N));
    ts_rig_close(&r);
}

static void test_an_older_segment(void **state)
{
    stale(state, "seg-");
}

static void test_an_older_journal(void **state)
{
    stale(state, "journal");
}

/* ---- segments ---- */

static void test_a_cut_segment(void **state)
{
    static const off_t sizes[] = {
        0, 1, 4095, PAGE, PAGE + 100, SLOT, SLOT + PAGE + 1, 5 * SLOT + 77};
    for (size_t i = 0; i < TS_LEN(sizes); i++) {
        char path[TS_PATH];
        const char *dir;
        struct ts_opts o = fresh(state, &dir);
        only_file(dir, "seg-", path);
        ts_truncate(path, sizes[i]);
        check(&o, dir, ts_all('?', N));
    }
}

static void test_a_segment_cut_while_it_runs(void **state)
{
    char path[TS_PATH];
    const char *dir;
    struct ts_opts o = fresh(state, &dir);
    ts_opt(&o, "store_pipeline", "Posix");
    struct ts_rig r = ts_rig_sure(&o);

    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    only_file(dir, "seg-", path);
    ts_truncate(path, 0);
    ts_rig_load(&r, 0, N);
    assert_null(strpbrk(r.text, ".WG"));
    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
}

static void test_a_segment_gone(void **state)
{
    char path[TS_PATH];
    const char *dir;
    struct ts_opts o = fresh(state, &dir);

    only_file(dir, "seg-", path);
    assert_int_equal(unlink(path), 0);
    check(&o, dir, ts_all('x', N));
    o = fresh(state, &dir);
    only_file(dir, "seg-", path);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkdir(path, 0700), 0); /* and something else in its place */
    check(&o, dir, ts_all('x', N));
}

/* The segment of another namespace, same sizes, same keys: other bytes, as far as anyone knows. */
static void test_a_foreign_segment(void **state)
{
    char path[TS_PATH], foreign[TS_PATH];
    const char *dir, *other_dir;
    struct ts_opts o = fresh(state, &dir), other = fresh(state, &other_dir);

    ts_remove(other_dir);
    assert_int_equal(mkdir(other_dir, 0700), 0);
    ts_opt(&other, "namespace", "another");
    rewrite(&other, 0, N);
    only_file(dir, "seg-", path);
    only_file(other_dir, "seg-", foreign);
    ts_copy_file(foreign, path);
    check(&o, dir, ts_all('x', N));
}

/* ---- journals ---- */

enum { RECORD = 64, PUT = 1 };

/* What the records in [PAGE, end) of a journal have published, of keys 0 .. N - 1. */
static void published(const char *path, off_t end, char must[N + 1])
{
    strcpy(must, ts_all('x', N));
    for (off_t off = PAGE; off + RECORD <= end && off + RECORD <= ts_file_size(path);
         off += RECORD) {
        uint8_t r[RECORD]; /* seq, epoch, op at 12, rank, key at 16, ... */
        ts_read_at(path, off, r, sizeof r);
        for (size_t i = 0; r[12] == PUT && i < N; i++) {
            ucm_key key = ts_key(i);
            if (!memcmp(r + 16, key.b, sizeof key.b))
                must[i] = '.';
        }
    }
}

static void test_a_journal_cut_at_each_record(void **state)
{
    char was[N + 1] = "", must[N + 1];
    for (unsigned records = 0; records <= N + 2; records++) {
        for (int odd = 0; odd < 2; odd++) {
            char path[TS_PATH];
            const char *dir;
            struct ts_opts o = fresh(state, &dir);
            only_file(dir, "journal", path);
            ts_truncate(path, PAGE + (off_t)records * RECORD + odd * 33);
            published(path, PAGE + (off_t)records * RECORD, must);
            check(&o, dir, must);
            strcpy(was, must);
        }
    }
    assert_string_equal(was, ts_all('.', N));
}

static void test_a_journal_cut_within_its_header(void **state)
{
    static const off_t sizes[] = {0, 1, 64, 4095};
    for (size_t i = 0; i < TS_LEN(sizes); i++) {
        char path[TS_PATH];
        const char *dir;
        struct ts_opts o = fresh(state, &dir);
        only_file(dir, "journal", path);
        ts_truncate(path, sizes[i]);
        check(&o, dir, ts_all('?', N));
    }
}

/* A key that nobody dumped, but that a flipped bit makes out of one of them, must not be found. */
static void expect_not_invented(const struct ts_opts *o, const uint8_t *record)
{
    struct ts_rig r = ts_rig_sure(o);
    ucm_key key;
    uint8_t found;

    memcpy(key.b, record + 16, sizeof key.b);
    assert_int_equal(ucm_lookup(r.store, &key, 1, &found), 0);
    ts_rig_close(&r);
}

/* One record that does not check ends the journal there: what came before is believed, and no more.
 */
static void test_a_flip_in_a_record(void **state)
{
    static const off_t fields[] = {0, 8, 12, 14, 16, 30, 32, 36, 40, 44, 48, 56, 63};

    for (unsigned i = 0; i < TS_LEN(fields); i++) {
        off_t at = PAGE + (off_t)(i % (N + 1)) * RECORD;
        uint8_t record[RECORD];
        char path[TS_PATH], must[N + 1];
        const char *dir;
        struct ts_opts o = fresh(state, &dir);
        only_file(dir, "journal", path);
        published(path, at, must);
        ts_flip(path, at + fields[i]);
        ts_read_at(path, at, record, sizeof record);
        if (fields[i] == 16 || fields[i] == 30)
            expect_not_invented(&o, record);
        check(&o, dir, must);
    }
}

static void test_garbage_in_a_journal(void **state)
{
    static const struct {
        off_t off;
        size_t len;
    } at[] = {{0, PAGE}, {0, 64}, {4000, 96}, {PAGE, PAGE}, {PAGE + 200, 64}, {PAGE + 1024, 8192}};
    uint64_t rnd = ts_seed();

    for (size_t i = 0; i < TS_LEN(at); i++) {
        uint8_t garbage[8192];
        char path[TS_PATH];
        const char *dir;
        struct ts_opts o = fresh(state, &dir);
        for (size_t k = 0; k < sizeof garbage; k++)
            garbage[k] = (uint8_t)ts_random(&rnd);
        only_file(dir, "journal", path);
        ts_write_at(path, at[i].off, garbage, at[i].len);
        check(&o, dir, ts_all('?', N));
    }
}

static void test_a_journal_gone(void **state)
{
    char path[TS_PATH];
    const char *dir;
    struct ts_opts o = fresh(state, &dir);

    only_file(dir, "journal", path);
    assert_int_equal(unlink(path), 0);
    check(&o, dir, ts_all('?', N));
    o = fresh(state, &dir);
    only_file(dir, "journal", path);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkdir(path, 0700), 0);
    check(&o, dir, ts_all('?', N));
}

/* ---- around them ---- */

static void test_the_names_of_a_namespace_gone(void **state)
{
    char path[TS_PATH];
    const char *dir;
    struct ts_opts o = fresh(state, &dir);

    only_file(dir, "namespace.json", path);
    assert_int_equal(unlink(path), 0);
    check(&o, dir, ts_all('.', N));
    o = fresh(state, &dir);
    only_file(dir, "namespace.json", path);
    ts_truncate(path, 3);
    check(&o, dir, ts_all('.', N));
}

static void test_the_locks_gone(void **state)
{
    static char paths[MAX_FILES][TS_PATH];
    const char *dir;
    struct ts_opts o = fresh(state, &dir);
    size_t n = ts_files(dir, "lock", paths, MAX_FILES);

    assert_true(n >= 1);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(unlink(paths[i]), 0);
    check(&o, dir, ts_all('.', N));
}

static void parent_of(char path[TS_PATH])
{
    *strrchr(path, '/') = 0;
}

static void litter(const char *dir)
{
    char path[TS_PATH + 320], name[200];

    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = 0;
    snprintf(path, sizeof path, "%s/seg-000001.tmp", dir);
    ts_write_at(path, 0, "?", 1);
    snprintf(path, sizeof path, "%s/.hidden", dir);
    ts_write_at(path, 0, "?", 1);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_int_equal(mkdir(path, 0700), 0);
    snprintf(path, sizeof path, "%s/loop", dir);
    assert_int_equal(symlink("loop", path), 0);
    snprintf(path, sizeof path, "%s/up", dir);
    assert_int_equal(symlink("..", path), 0);
    snprintf(path, sizeof path, "%s/empty", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    snprintf(path, sizeof path, "%s/piped", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    snprintf(path, sizeof path, "%s/piped/journal", dir); /* whose open would wait for a writer */
    assert_int_equal(mkfifo(path, 0600), 0);
    snprintf(path, sizeof path, "%s/piped/lock", dir);
    assert_int_equal(mkfifo(path, 0600), 0);
}

static void test_foreign_files(void **state)
{
    char path[TS_PATH];
    const char *dir;
    struct ts_opts o = fresh(state, &dir);

    only_file(dir, "journal", path);
    parent_of(path); /* the lane */
    litter(path);
    parent_of(path); /* the namespace */
    litter(path);
    parent_of(path); /* <backend>/ucm */
    litter(path);
    litter(dir);
    check(&o, dir, ts_all('.', N));
}

static void test_a_copied_lane(void **state)
{
    static char paths[MAX_FILES][TS_PATH];
    char lane[TS_PATH], copy[TS_PATH + 8], to[2 * TS_PATH];
    const char *dir;
    struct ts_opts o = fresh(state, &dir);

    only_file(dir, "journal", lane);
    parent_of(lane);
    size_t n = ts_files(lane, "", paths, MAX_FILES);
    snprintf(copy, sizeof copy, "%s-copy", lane);
    assert_int_equal(mkdir(copy, 0777), 0);
    for (size_t i = 0; i < n; i++) {
        snprintf(to, sizeof to, "%s%s", copy, paths[i] + strlen(lane));
        ts_copy_file(paths[i], to);
    }
    check(&o, dir, ts_all('.', N));
}

int main(void)
{
    static const struct ts_case cases[] = {
        {"a flip in the header", test_a_flip_in_the_header, .needs_persist = true},
        {"a flip in each shard", test_a_flip_in_each_shard, .needs_persist = true},
        {"a flip harms its shard", test_a_flip_harms_only_its_shard, .needs_persist = true},
        {"damage while it runs", test_damage_while_it_runs, .needs_persist = true},
        {"swapped slots", test_swapped_slots, .needs_persist = true},
        {"swapped shards", test_shards_swapped_within_a_block, .needs_persist = true},
        {"zeroed slots", test_zeroed_slots, .needs_persist = true},
        {"an older segment", test_an_older_segment, .needs_persist = true},
        {"an older journal", test_an_older_journal, .needs_persist = true},
        {"a cut segment", test_a_cut_segment, .needs_persist = true},
        {"a segment cut while it runs", test_a_segment_cut_while_it_runs, .needs_persist = true},
        {"a segment gone", test_a_segment_gone, .needs_persist = true},
        {"a foreign segment", test_a_foreign_segment, .needs_persist = true},
        {"a journal cut at each record", test_a_journal_cut_at_each_record, .needs_persist = true},
        {"a journal cut in its header", test_a_journal_cut_within_its_header,
         .needs_persist = true},
        {"a flip in a record", test_a_flip_in_a_record, .needs_persist = true},
        {"garbage in a journal", test_garbage_in_a_journal, .needs_persist = true},
        {"a journal gone", test_a_journal_gone, .needs_persist = true},
        {"namespace.json gone", test_the_names_of_a_namespace_gone, .needs_persist = true},
        {"the locks gone", test_the_locks_gone, .needs_persist = true},
        {"foreign files", test_foreign_files, .needs_persist = true},
        {"a copied lane", test_a_copied_lane, .needs_persist = true},
    };
    return ts_run_cases("damage", cases, TS_LEN(cases));
}

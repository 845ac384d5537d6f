/* SPDX-License-Identifier: Apache-2.0 */
/*
 * integrity_key_file: who cannot read the key can put nothing in a backend that is delivered, nor
 * change or move what is there; stores with different keys never meet; the tool touches nothing
 * whose key it has not.
 */
#include "harness.h"

#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/journal.h"

enum { SHARD = 5000, SHARDS = 3, SLOT = 5 * UCMI_PAGE, BLOCKS = 4 };
static const struct shape shape = {SHARD, SHARDS, 0};

/* ---- keys ---- */

static void write_key(const char *dir, const char *name, unsigned first, size_t n)
{
    char path[256];
    uint8_t bytes[8192];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    for (size_t i = 0; i < n; i++)
        bytes[i] = (uint8_t)(first + i);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_int_equal(write(fd, bytes, n), n);
    close(fd);
}

static void conf_with(const char *dir, const char *name, ucm_conf **conf_p)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_int_equal(ucm_conf_new(conf_p), 0);
    assert_int_equal(ucm_conf_set(*conf_p, "integrity_key_file", path), 0);
}

static void read_key(const char *dir, const char *name, struct ucmi_key *key)
{
    char path[256];
    ucm_conf *conf;
    conf_with(dir, name, &conf);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_int_equal(ucmi_key_read(path, key, conf), 0);
    ucm_conf_free(conf);
}

static int make_keys(void **state)
{
    if (make_dir(state))
        return -1;
    write_key(*state, "a", 0, 32);
    write_key(*state, "b", 1, 32);
    return 0;
}

/* Key "" is none. */
static ucm_store *open_with(const char *dir, const char *key)
{
    char options[512] = "posix_segment_mb=1";
    if (*key)
        snprintf(options, sizeof options, "posix_segment_mb=1 integrity_key_file=%s/%s", dir, key);
    return open_store(dir, &shape, options);
}

static void store_blocks(const char *dir, const char *key, uint64_t first)
{
    struct memory m;
    ucm_store *store = open_with(dir, key);
    memory_new(&m, store, &shape, BLOCKS);
    dump_all(store, &m, first);
    memory_free(&m);
    ucm_store_close(store);
}

/* The same bytes by `openssl mac`: POLY1305 of the data under HMAC-SHA256 of the file and
 * "ucm integrity: poly1305", then SIPHASH (size 8) of what it is and that. */
static void sums_are_what_they_were(void **state)
{
    static uint8_t data[10000];
    struct ucmi_what what = {.kind = UCMI_OF_SHARD, .rank = 7, .shard = 8};
    struct ucmi_key key;
    struct ucmi_seal s;
    read_key(*state, "a", &key);
    assert_int_equal(ucmi_seal_open(&s, &key), 0);
    memset(what.ns, 5, sizeof what.ns);
    memset(&what.key, 6, sizeof what.key);
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(i % 251);
    const struct iovec whole = {data, sizeof data};
    const struct iovec pieces[] = {{data, 1}, {data + 1, 4999}, {data + 5000, 5000}};
    assert_int_equal(s.sum(&s, &what, &whole, 1), 0x394a171faf82eccau);
    assert_int_equal(s.sum(&s, &what, pieces, 3), 0x394a171faf82eccau);
    assert_memory_equal(key.id, "\x53\x2c\x73\x13", UCMI_KEY_ID);
    ucmi_seal_close(&s);
}

/* ---- files that are no key ---- */

static void no_key_is_taken_from(const char *dir, const char *name, const char *because)
{
    char options[512], path[256], why[512];
    ucm_store *store = NULL;
    ucm_conf *conf;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    snprintf(options, sizeof options, "integrity_key_file=%s", path);
    assert_true(try_open(dir, &shape, options, &store, why, sizeof why) < 0);
    assert_non_null(strstr(why, "integrity_key_file: "));
    assert_non_null(strstr(why, path));
    assert_non_null(strstr(why, because));
    conf_with(dir, name, &conf);
    struct ucm_inspect look = {.conf = conf};
    assert_true(ucm_inspect(dir, &look) < 0);
    assert_string_equal(ucm_conf_error(conf), why);
    struct ucm_manage change = {.op = UCM_MANAGE_RM, .conf = conf};
    struct ucm_manage_total total;
    assert_true(ucm_manage(dir, &change, &total) < 0);
    assert_string_equal(ucm_conf_error(conf), why);
    ucm_conf_free(conf);
}

static void what_is_no_key_is_refused(void **state)
{
    char path[256];
    store_blocks(*state, "", 0);
    no_key_is_taken_from(*state, "missing", "No such file or directory; give a file");
    no_key_is_taken_from(*state, "ucm", "is no regular file; give one");
    snprintf(path, sizeof path, "%s/fifo", (char *)*state);
    assert_int_equal(mkfifo(path, 0600), 0);
    no_key_is_taken_from(*state, "fifo", "is no regular file; give one");
    write_key(*state, "empty", 0, 0);
    no_key_is_taken_from(*state, "empty", "is too short; give 32 bytes at least");
    write_key(*state, "short", 0, 31);
    no_key_is_taken_from(*state, "short", "is too short; give 32 bytes at least");
    write_key(*state, "long", 0, 4097);
    no_key_is_taken_from(*state, "long", "is too long; give at most 4096 bytes");
    static const mode_t open_to_others[] = {0644, 0640, 0602, 0610};
    snprintf(path, sizeof path, "%s/a", (char *)*state);
    for (size_t i = 0; i < ARRAY_LEN(open_to_others); i++) {
        assert_int_equal(chmod(path, open_to_others[i]), 0);
        no_key_is_taken_from(*state, "a", "others than its owner may use it; chmod 600 it");
    }
    assert_int_equal(chmod(path, 0400), 0);
    store_blocks(*state, "a", 0);
    write_key(*state, "longest", 0, 4096);
    store_blocks(*state, "longest", 0);
}

/* ---- keys that never meet ---- */

static void stores_of_different_keys_never_meet(void **state)
{
    static const char *const keys[] = {"", "a", "b"};
    struct memory m;
    for (uint64_t i = 0; i < ARRAY_LEN(keys); i++)
        store_blocks(*state, keys[i], 100 * i);
    assert_int_equal(count_lanes(*state), ARRAY_LEN(keys));
    for (uint64_t i = 0; i < ARRAY_LEN(keys); i++) {
        ucm_store *store = open_with(*state, keys[i]);
        for (uint64_t k = 0; k < ARRAY_LEN(keys); k++)
            assert_int_equal(count_found(store, 100 * k, BLOCKS), i == k ? BLOCKS : 0);
        memory_new(&m, store, &shape, BLOCKS);
        load_all(store, &m, 100 * i);
        memory_free(&m);
        ucm_store_close(store);
    }
}

/* A planted block that a store without the key has loaded must not be another's hit. */
static void nor_do_their_pools(void **state)
{
    static const char *const keys[] = {"", "a", "b"};
    struct memory m;
    ucm_store *store[ARRAY_LEN(keys)];
    for (uint64_t i = 0; i < ARRAY_LEN(keys); i++) {
        char options[512];
        int n = snprintf(options, sizeof options,
                         "store_pipeline=Cache|Empty cache_buffer_capacity_gb=0.001 cache_dir=%s",
                         (char *)*state);
        if (*keys[i])
            snprintf(options + n, sizeof options - (size_t)n, " integrity_key_file=%s/%s",
                     (char *)*state, keys[i]);
        store[i] = open_store(*state, &shape, options);
        memory_new(&m, store[i], &shape, BLOCKS);
        dump_all(store[i], &m, 100 * i);
        memory_free(&m);
    }
    for (uint64_t i = 0; i < ARRAY_LEN(keys); i++)
        for (uint64_t k = 0; k < ARRAY_LEN(keys); k++)
            assert_int_equal(count_found(store[i], 100 * k, BLOCKS), i == k ? BLOCKS : 0);
    for (uint64_t i = 0; i < ARRAY_LEN(keys); i++)
        ucm_store_close(store[i]);
}

/* ---- what a stranger may try ---- */

struct files { /* of the only lane */
    int journal, segment;
    uint8_t slot[SLOT];
    struct ucmi_record r[1 + BLOCKS];
};

static void open_files(const char *dir, struct files *f)
{
    char path[512];
    lane_path(dir, "journal", path, sizeof path);
    f->journal = open(path, O_RDWR | O_CLOEXEC);
    lane_path(dir, "seg-000000", path, sizeof path);
    f->segment = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pread(f->journal, f->r, sizeof f->r, UCMI_PAGE), sizeof f->r);
    assert_int_equal(pread(f->segment, f->slot, SLOT, 0), SLOT);
}

static void write_files(struct files *f)
{
    assert_int_equal(pwrite(f->journal, f->r, sizeof f->r, UCMI_PAGE), sizeof f->r);
    assert_int_equal(pwrite(f->segment, f->slot, SLOT, 0), SLOT);
    close(f->journal);
    close(f->segment);
}

static struct ucmi_slot_header *header_of(struct files *f)
{
    return (struct ucmi_slot_header *)f->slot;
}

/* Block 0 with other bytes, sealed by somebody; its record is made right with the real key, which
 * is more than a stranger can do. */
static void plant(struct files *f, const struct ucmi_seal *by, const struct ucmi_seal *real)
{
    struct ucmi_slot_header *h = header_of(f);
    struct iovec shard = {f->slot + UCMI_PAGE, SHARD};
    f->slot[UCMI_PAGE + 10] ^= 1;
    for (uint32_t i = 0; i < SHARDS; i++, shard.iov_base = (char *)shard.iov_base + SHARD)
        h->shard_sum[i] = ucmi_shard_sum(by, h, i, &shard, 1);
    ucmi_slot_header_seal(by, h);
    f->r[1].header_sum = (uint32_t)h->sum;
    ucmi_record_seal(real, &f->r[1]);
}

static void plant_plain(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b)
{
    plant(f, &ucmi_plain, real);
}
static void plant_other(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b)
{
    plant(f, b, real);
}
static void plant_right(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b)
{
    plant(f, real, real);
}
/* A header that is right, and shards that fit it by a checksum without a key. */
static void plant_shard(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b)
{
    struct ucmi_slot_header *h = header_of(f);
    struct iovec shard = {f->slot + UCMI_PAGE, SHARD};
    f->slot[UCMI_PAGE + 10] ^= 1;
    h->shard_sum[0] = ucmi_shard_sum(&ucmi_plain, h, 0, &shard, 1);
    ucmi_slot_header_seal(real, h);
    f->r[1].header_sum = (uint32_t)h->sum;
    ucmi_record_seal(real, &f->r[1]);
}
static void flip_data(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b)
{
    f->slot[UCMI_PAGE + 2 * SHARD + 1] ^= 0x10;
}
static void flip_header(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b)
{
    header_of(f)->depth ^= 1;
}
static void alter_lengths(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b)
{
    header_of(f)->nshards = 1;
    header_of(f)->shard_size = SHARDS * SHARD;
}
static void alter_lengths_and_seal(struct files *f, const struct ucmi_seal *real,
                                   const struct ucmi_seal *b)
{
    alter_lengths(f, real, b);
    ucmi_slot_header_seal(&ucmi_plain, header_of(f));
    f->r[1].header_sum = (uint32_t)header_of(f)->sum;
    ucmi_record_seal(real, &f->r[1]);
}
/* Block 1 where block 0 is looked for: a record that names it, and the header itself. */
static void move_block(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b)
{
    assert_int_equal(pread(f->segment, f->slot, SLOT, SLOT), SLOT);
    f->r[1].header_sum = (uint32_t)header_of(f)->sum;
    ucmi_record_seal(real, &f->r[1]);
}
static void move_and_rename(struct files *f, const struct ucmi_seal *real,
                            const struct ucmi_seal *b)
{
    move_block(f, real, b);
    header_of(f)->key = key_of(0);
}
static void record_plain(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b)
{
    ucmi_record_seal(&ucmi_plain, &f->r[1]);
}
static void record_other(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b)
{
    ucmi_record_seal(b, &f->r[1]);
}

static const struct attempt {
    const char *name;
    void (*on)(struct files *f, const struct ucmi_seal *real, const struct ucmi_seal *b);
    size_t found;
    int status;      /* of the load; 0: with other bytes than were stored */
    const char *why; /* the counter that tells; NULL: nothing has come so far */
} attempts[] = {
    {"the right key", plant_right, BLOCKS, 0, NULL},
    {"without a key", plant_plain, BLOCKS, -EBADMSG, "disk_bad_total"},
    {"by another key", plant_other, BLOCKS, -EBADMSG, "disk_bad_total"},
    {"a shard without a key", plant_shard, BLOCKS, -EBADMSG, "disk_bad_total"},
    {"a bit of the data", flip_data, BLOCKS, -EBADMSG, "disk_bad_total"},
    {"a bit of the header", flip_header, BLOCKS, -EBADMSG, "disk_bad_total"},
    {"other lengths", alter_lengths, BLOCKS, -EBADMSG, "disk_bad_total"},
    {"other lengths, sealed", alter_lengths_and_seal, BLOCKS, -EBADMSG, "disk_bad_total"},
    {"another block's slot", move_block, BLOCKS, -ENOENT, "disk_stale_total"},
    {"another block's, renamed", move_and_rename, BLOCKS, -EBADMSG, "disk_bad_total"},
    {"a record without a key", record_plain, 0, -ENOENT, NULL},
    {"a record by another key", record_other, 0, -ENOENT, NULL},
};

static void try(const char *dir, const struct attempt *a, const struct ucmi_seal *real,
                const struct ucmi_seal *other)
{
    static struct files f;
    struct memory m;
    char lanes[256];
    store_blocks(dir, "a", 0);
    open_files(dir, &f);
    a->on(&f, real, other);
    write_files(&f);
    ucm_store *store = open_with(dir, "a");
    assert_int_equal(count_found(store, 0, BLOCKS), a->found);
    memory_new(&m, store, &shape, 1);
    smear(&m);
    struct outcome out = move(store, &m, false, 0, 0, 0);
    if (out.status[0] != a->status)
        fail_msg("%s: %d", a->name, out.status[0]);
    assert_false(!out.status[0] && painted(&m, 0, 0));
    free(out.status);
    if (a->why && metric(store, a->why) != 1)
        fail_msg("%s: %s is %g", a->name, a->why, metric(store, a->why));
    memory_free(&m);
    ucm_store_close(store);
    snprintf(lanes, sizeof lanes, "%s/ucm", dir);
    remove_tree(lanes);
}

static void nobody_without_the_key_plants_or_alters_blocks(void **state)
{
    struct ucmi_key key, other_key;
    struct ucmi_seal real, other;
    read_key(*state, "a", &key);
    read_key(*state, "b", &other_key);
    assert_int_equal(ucmi_seal_open(&real, &key), 0);
    assert_int_equal(ucmi_seal_open(&other, &other_key), 0);
    for (size_t i = 0; i < ARRAY_LEN(attempts); i++)
        try(*state, &attempts[i], &real, &other);
    ucmi_seal_close(&real);
    ucmi_seal_close(&other);
}

/* Nor by a header whose checksums of shards were copied from where they are right. */
static void a_shard_is_sealed_for_its_place(void **state)
{
    uint8_t data[100] = {0};
    const struct iovec iov = {data, sizeof data};
    struct ucmi_slot_header h = {.rank = 1}, v[4] = {h, h, h, h};
    struct ucmi_key key;
    struct ucmi_seal s;
    read_key(*state, "a", &key);
    assert_int_equal(ucmi_seal_open(&s, &key), 0);
    v[1].ns[15] ^= 1;
    v[2].key.b[0] ^= 1;
    v[3].rank = 2;
    for (size_t i = 0; i < ARRAY_LEN(v); i++)
        for (uint32_t shard = !i; shard < 2; shard++)
            assert_true(ucmi_shard_sum(&s, &h, 0, &iov, 1) !=
                        ucmi_shard_sum(&s, &v[i], shard, &iov, 1));
    ucmi_seal_close(&s);
}

/* ---- the tool ---- */

struct seen {
    unsigned lanes, locked, blocks, bad, error;
};
static void see_lane(void *arg, const struct ucm_lane_info *lane)
{
    struct seen *s = arg;
    s->lanes++;
    s->locked += lane->locked != 0;
    s->blocks += (unsigned)lane->blocks;
    s->bad += (unsigned)lane->bad;
    s->error += (unsigned)lane->error;
    if (!lane->error)
        assert_int_equal(lane->block_size, SHARD * SHARDS); /* who lives there is no secret */
}

static struct seen inspect(const char *dir, const char *key)
{
    struct seen s = {0};
    ucm_conf *conf = NULL;
    if (*key)
        conf_with(dir, key, &conf);
    struct ucm_inspect how = {
        .flags = UCM_INSPECT_VERIFY, .conf = conf, .arg = &s, .lane = see_lane};
    assert_int_equal(ucm_inspect(dir, &how), 0);
    ucm_conf_free(conf);
    return s;
}

static struct ucm_manage_total manage(const char *dir, const char *key, struct ucm_manage how)
{
    struct ucm_manage_total total;
    if (*key)
        conf_with(dir, key, &how.conf);
    assert_int_equal(ucm_manage(dir, &how, &total), 0);
    ucm_conf_free(how.conf);
    return total;
}

static void a_lane_is_locked(void *arg, const struct ucm_manage_info *lane)
{
    assert_int_equal(lane->err, -ENOKEY);
    ++*(unsigned *)arg;
}

static void the_tool_needs_the_key(void **state)
{
    static const char *const keys[] = {"", "b"};
    store_blocks(*state, "a", 0);
    struct seen s = inspect(*state, "a");
    assert_int_equal(s.locked + s.bad + s.error, 0);
    assert_int_equal(s.blocks, BLOCKS);
    for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
        unsigned told = 0;
        s = inspect(*state, keys[i]);
        assert_int_equal(s.lanes, 1);
        assert_int_equal(s.locked, 1);
        assert_int_equal(s.blocks + s.bad + s.error, 0);
        struct ucm_manage how = {.arg = &told, .lane = a_lane_is_locked};
        static const enum ucm_manage_op ops[] = {UCM_MANAGE_RM, UCM_MANAGE_REPAIR, UCM_MANAGE_GC};
        for (size_t k = 0; k < ARRAY_LEN(ops); k++) {
            how.op = ops[k];
            assert_int_equal(manage(*state, keys[i], how).done, 0);
        }
        assert_int_equal(told, ARRAY_LEN(ops));
        assert_int_equal(inspect(*state, "a").blocks, BLOCKS);
    }
    struct ucm_manage rm = {.op = UCM_MANAGE_RM};
    assert_int_equal(manage(*state, "a", rm).done, BLOCKS);
    assert_int_equal(inspect(*state, "a").lanes, 0);
}

/* Who owns a lane is asked in a journal that is sealed as well. */
static void an_owner_answers_who_has_the_key(void **state)
{
    struct memory m;
    ucm_store *store = open_with(*state, "a");
    memory_new(&m, store, &shape, BLOCKS);
    dump_all(store, &m, 0);
    struct ucm_manage rm = {.op = UCM_MANAGE_RM, .timeout_ms = 30000};
    assert_int_equal(manage(*state, "b", rm).done, 0);
    assert_int_equal(count_found(store, 0, BLOCKS), BLOCKS);
    assert_int_equal(manage(*state, "a", rm).done, BLOCKS);
    assert_int_equal(count_found(store, 0, BLOCKS), 0);
    memory_free(&m);
    ucm_store_close(store);
}

static void the_tool_finds_what_a_stranger_has_planted(void **state)
{
    static struct files f;
    struct ucmi_key key;
    struct ucmi_seal real;
    read_key(*state, "a", &key);
    assert_int_equal(ucmi_seal_open(&real, &key), 0);
    store_blocks(*state, "a", 0);
    open_files(*state, &f);
    plant(&f, &ucmi_plain, &real);
    write_files(&f);
    ucmi_seal_close(&real);
    assert_int_equal(inspect(*state, "a").bad, 1);
    struct ucm_manage repair = {.op = UCM_MANAGE_REPAIR};
    assert_int_equal(manage(*state, "a", repair).done, 1);
    struct seen s = inspect(*state, "a");
    assert_int_equal(s.blocks, BLOCKS - 1);
    assert_int_equal(s.bad, 0);
}

/* A lane that is right without a key, in a namespace that has one. */
static void a_lane_of_another_namespace_is_none(void **state)
{
    char from[512], to[600];
    store_blocks(*state, "", 0);
    lane_path(*state, "", from, sizeof from);
    from[strlen(from) - 1] = '\0';
    snprintf(to, sizeof to, "%s/aside", (char *)*state);
    assert_int_equal(rename(from, to), 0);
    store_blocks(*state, "a", 100);
    lane_path(*state, "", from, sizeof from);
    strcpy(strstr(from, "/r0-"), "/r0-0000000000000001");
    assert_int_equal(rename(to, from), 0);
    struct seen s = inspect(*state, "a");
    assert_int_equal(s.lanes, 2);
    assert_int_equal(s.blocks, BLOCKS);
    assert_int_equal(s.error, 1);
    ucm_store *store = open_with(*state, "a");
    assert_int_equal(count_found(store, 0, BLOCKS), 0);
    assert_int_equal(count_found(store, 100, BLOCKS), BLOCKS);
    ucm_store_close(store);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_keys, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(sums_are_what_they_were),
        TEST(what_is_no_key_is_refused),
        TEST(stores_of_different_keys_never_meet),
        TEST(nor_do_their_pools),
        TEST(nobody_without_the_key_plants_or_alters_blocks),
        TEST(a_shard_is_sealed_for_its_place),
        TEST(the_tool_needs_the_key),
        TEST(an_owner_answers_who_has_the_key),
        TEST(the_tool_finds_what_a_stranger_has_planted),
        TEST(a_lane_of_another_namespace_is_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

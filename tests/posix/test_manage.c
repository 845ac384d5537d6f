/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ucm_manage: what it drops, pins and gives up, in lanes with and without an owner; and that nobody
 * loses anything else, whoever dies meanwhile.
 */
#include "peer.h"

#include <fcntl.h>
#include <glob.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "store/table.h"

static const struct shape shape = {4096, 2, 0};
enum { LONG_MS = 60000, SLOT = 3 * 4096 };
#define SMALL "posix_capacity_gb=0.003 posix_segment_mb=1" /* some 200 blocks */

static struct ucm_manage_total manage(const char *dir, struct ucm_manage how)
{
    struct ucm_manage_total t;
    if (!how.timeout_ms)
        how.timeout_ms = LONG_MS;
    assert_int_equal(ucm_manage(dir, &how, &t), 0);
    assert_int_equal(t.chosen, t.done + t.kept + t.left);
    return t;
}

static struct ucm_manage_total pin(const char *dir, const char *key)
{
    return manage(
        dir, (struct ucm_manage){.op = UCM_MANAGE_PIN, .key = key, .until = time(NULL) + 3600});
}

static const char *hex_of(uint64_t i, char hex[33])
{
    ucm_key key = key_of(i);
    ucmi_hex(key.b, sizeof key.b, hex);
    return hex;
}

/* Is its key one of 0 .. *arg - 1? */
static int low(void *arg, const char *ns, const char *lane, const struct ucm_block_info *info)
{
    for (uint64_t i = 0; i < *(uint64_t *)arg; i++) {
        ucm_key key = key_of(i);
        if (ucmi_key_eq(&key, &info->key))
            return 1;
    }
    return 0;
}

static void churn(ucm_store *store, struct memory *one, uint64_t first, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        dump_all(store, one, first + i);
}

static void verify_all(const char *dir)
{
    struct ucm_manage_total t = manage(dir, (struct ucm_manage){.op = UCM_MANAGE_REPAIR});
    assert_int_equal(t.done + t.left + t.unreadable, 0);
}

/* ---- lanes without an owner ---- */

static void blocks_of_a_dead_lane_are_dropped(void **state)
{
    char hex[33];
    struct peer peer = peer_start(*state, &shape, SMALL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 30), 0);
    peer_kill(&peer);
    uint64_t before = disk_usage(*state), seven = 7;
    struct ucm_manage_total t =
        manage(*state, (struct ucm_manage){.op = UCM_MANAGE_RM, .key = hex_of(9, hex)});
    assert_int_equal(t.done, 1);
    t = manage(*state, (struct ucm_manage){.op = UCM_MANAGE_RM, .want = low, .arg = &seven});
    assert_int_equal(t.done, 7);
    assert_int_equal(t.segments, 0);
    ucm_store *store = open_store(*state, &shape, SMALL);
    assert_int_equal(count_found(store, 0, 7), 0);
    assert_int_equal(count_found(store, 0, 30), 22);
    struct memory m;
    memory_new(&m, store, &shape, 20);
    load_all(store, &m, 10);
    memory_free(&m);
    ucm_store_close(store);
    assert_true(disk_usage(*state) <= before);
    /* All of it: the lane goes too. */
    t = manage(*state, (struct ucm_manage){.op = UCM_MANAGE_RM, .before = time(NULL) + 100});
    assert_int_equal(t.done, 22);
    assert_int_equal(count_lanes(*state), 0);
    assert_true(disk_usage(*state) < before / 2);
}

static void what_was_used_since_stays(void **state)
{
    struct peer peer = peer_start(*state, &shape, SMALL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 5), 0);
    int64_t hour_ago = time(NULL) - 3600;
    struct ucm_manage how = {.op = UCM_MANAGE_RM, .before = hour_ago};
    assert_int_equal(manage(*state, how).chosen, 0);
    peer_kill(&peer);
    assert_int_equal(manage(*state, how).chosen, 0);
}

/* ---- lanes with an owner ---- */

static void an_idle_owner_answers(void **state)
{
    char hex[33];
    struct peer peer = peer_start(*state, &shape, SMALL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 30), 0);
    struct ucm_manage_total t =
        manage(*state, (struct ucm_manage){.op = UCM_MANAGE_RM, .key = hex_of(9, hex)});
    assert_int_equal(t.done, 1);
    assert_int_equal(peer_do(&peer, PEER_FOUND, 9, 1), 0);
    assert_int_equal(peer_do(&peer, PEER_LOAD, 0, 30), 29);
    uint64_t ten = 10;
    t = manage(*state, (struct ucm_manage){.op = UCM_MANAGE_RM, .want = low, .arg = &ten});
    assert_int_equal(t.done, 9);
    assert_int_equal(peer_do(&peer, PEER_LOAD, 0, 30), 20);
    assert_int_equal(count_lanes(*state), 1); /* ours has gone */
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 10), 0);
    assert_int_equal(peer_do(&peer, PEER_LOAD, 0, 30), 30);
    peer_end(&peer);
    verify_all(*state);
}

/* More than a batch; the owner works all the while. */
static void a_busy_owner_answers_for_many(void **state)
{
    struct peer peer = peer_start(*state, &shape, "posix_segment_mb=8");
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 700), 0);
    ucm_store *store = open_store(*state, &shape, NULL);
    peer_ask(&peer, PEER_CHURN, 100000, 3);
    assert_int_equal(peer_answer(&peer), 0);
    uint64_t n = 600;
    struct ucm_manage_total t =
        manage(*state, (struct ucm_manage){.op = UCM_MANAGE_RM, .want = low, .arg = &n});
    assert_int_equal(t.done, 600);
    assert_int_equal(count_found(store, UINT64_MAX, 1), 0); /* reads the news */
    assert_int_equal(count_found(store, 0, 600), 0);
    assert_int_equal(count_found(store, 600, 100), 100);
    peer_kill(&peer);
    ucm_store_close(store);
    verify_all(*state);
}

static void who_does_not_answer_is_told_of(void **state)
{
    struct peer peer = peer_start(*state, &shape, SMALL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 5), 0);
    kill(peer.pid, SIGSTOP);
    struct ucm_manage_total t =
        manage(*state, (struct ucm_manage){.op = UCM_MANAGE_UNPIN, .timeout_ms = 50});
    assert_int_equal(t.chosen, 0); /* nothing is pinned */
    t = manage(*state, (struct ucm_manage){
                           .op = UCM_MANAGE_PIN, .until = time(NULL) + 100, .timeout_ms = 50});
    assert_int_equal(t.left, 5);
    assert_int_equal(count_lanes(*state), 1);
    kill(peer.pid, SIGCONT);
    assert_int_equal(peer_do(&peer, PEER_LOAD, 0, 5), 5);
    peer_end(&peer);
}

/* ---- repair ---- */

static void damage(const char *dir, unsigned slot)
{
    char path[512];
    lane_path(dir, "seg-000000", path, sizeof path);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pwrite(fd, "?", 1, slot * SLOT + 9000), 1);
    close(fd);
}

static void repair_drops_what_is_bad_and_nothing_else(void **state)
{
    struct peer peer = peer_start(*state, &shape, SMALL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 20), 0);
    damage(*state, 7);
    for (int alive = 1; alive >= 0; alive--) {
        struct ucm_manage_total t = manage(*state, (struct ucm_manage){.op = UCM_MANAGE_REPAIR});
        assert_int_equal(t.done, 1);
        assert_int_equal(t.kept, alive ? 19 : 18);
        verify_all(*state);
        if (alive) {
            assert_int_equal(peer_do(&peer, PEER_LOAD, 0, 20), 19);
            peer_kill(&peer);
        }
        damage(*state, 8 + (unsigned)alive);
    }
}

static void a_segment_that_is_gone_is_repaired(void **state)
{
    char path[512];
    struct peer peer = peer_start(*state, &shape, SMALL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 20), 0);
    peer_kill(&peer);
    lane_path(*state, "seg-000000", path, sizeof path);
    assert_int_equal(unlink(path), 0);
    struct ucm_manage_total t = manage(*state, (struct ucm_manage){.op = UCM_MANAGE_REPAIR});
    assert_int_equal(t.done + t.kept, 20);
    assert_true(t.done > 0);
    verify_all(*state);
}

/* ---- pins ---- */

static void pinned_blocks_outlive_all_others(void **state)
{
    ucm_store *store = open_store(*state, &shape, SMALL);
    struct memory one, ten;
    uint64_t n = 10;
    memory_new(&one, store, &shape, 1);
    memory_new(&ten, store, &shape, 10);
    dump_all(store, &ten, 0);
    struct ucm_manage how = {
        .op = UCM_MANAGE_PIN, .want = low, .arg = &n, .until = time(NULL) + 3600};
    assert_int_equal(manage(*state, how).done, 10);
    churn(store, &one, 1000, 500);
    assert_true(metric(store, "disk_evicted_total") > 100);
    load_all(store, &ten, 0);
    churn(store, &one, 2000, 2000); /* the journal is compacted */
    assert_true(metric(store, "disk_compacted_total") >= 1);
    memory_free(&ten);
    memory_free(&one);
    ucm_store_close(store);
    store = open_store(*state, &shape, SMALL); /* and are after a restart */
    memory_new(&one, store, &shape, 1);
    memory_new(&ten, store, &shape, 10);
    churn(store, &one, 4000, 500);
    load_all(store, &ten, 0);
    how.op = UCM_MANAGE_UNPIN;
    assert_int_equal(manage(*state, how).done, 10);
    assert_int_equal(manage(*state, how).chosen, 0);
    memory_free(&ten);
    memory_free(&one);
    ucm_store_close(store);
}

static void without_a_pin_they_go(void **state)
{
    ucm_store *store = open_store(*state, &shape, SMALL);
    struct memory one;
    memory_new(&one, store, &shape, 1);
    churn(store, &one, 0, 10);
    assert_int_equal(pin(*state, NULL).done, 10);
    assert_int_equal(manage(*state, (struct ucm_manage){.op = UCM_MANAGE_UNPIN}).done, 10);
    churn(store, &one, 1000, 1000);
    assert_int_equal(count_found(store, 0, 10), 0);
    memory_free(&one);
    ucm_store_close(store);
}

static void where_all_is_pinned_a_dump_is_dropped(void **state)
{
    ucm_store *store = open_store(*state, &shape, SMALL);
    struct memory one;
    uint64_t n = 0;
    memory_new(&one, store, &shape, 1);
    for (; !metric(store, "disk_evicted_total"); n++)
        dump_all(store, &one, n);
    for (int err = 0; !err; n++) { /* what is free is filled, and pinned */
        pin(*state, NULL);
        struct outcome out = move(store, &one, true, n, 0, 0);
        err = out.stored;
        assert_true(err == 0 || err == -ENOSPC);
        free(out.status);
        assert_true(n < 1000);
    }
    double evicted = metric(store, "disk_evicted_total");
    size_t there = count_found(store, 0, n);
    struct outcome out = move(store, &one, true, n, 0, 0);
    assert_int_equal(out.stored, -ENOSPC);
    free(out.status);
    assert_int_equal(count_found(store, 0, n), there);
    assert_int_equal((int)metric(store, "disk_evicted_total"), (int)evicted);
    memory_free(&one);
    ucm_store_close(store);
}

static void a_pinned_dead_lane_of_another_namespace_stays(void **state)
{
    const char *other = "posix_capacity_gb=0.003 posix_segment_mb=1 namespace=other";
    char path[512];
    struct peer peer = peer_start(*state, &shape, SMALL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 30), 0);
    peer_kill(&peer);
    assert_int_equal(pin(*state, NULL).done, 30);
    lane_path(*state, "journal", path, sizeof path); /* as if nobody had used it for long */
    const struct timespec old[2] = {{.tv_sec = 1000000}, {.tv_sec = 1000000}};
    assert_int_equal(utimensat(AT_FDCWD, path, old, 0), 0);
    lane_path(*state, "pinned", path, sizeof path);
    ucm_store *store = open_store(*state, &shape, other);
    struct memory one;
    memory_new(&one, store, &shape, 1);
    churn(store, &one, 0, 600);
    ucm_store *first = open_store(*state, &shape, SMALL);
    assert_int_equal(count_found(first, 0, 30), 30);
    ucm_store_close(first);
    assert_int_equal(utimensat(AT_FDCWD, path, old, 0), 0); /* as if the pins had ended */
    for (uint64_t i = 1000; count_lanes(*state) > 1; i++) {
        dump_all(store, &one, i); /* looks for room about once a second */
        assert_true(i < 10000000);
    }
    memory_free(&one);
    ucm_store_close(store);
}

/* ---- giving up segments ---- */

static void gc_takes_the_dead_first(void **state)
{
    const char *options = "posix_segment_mb=1 namespace=%s";
    char text[128];
    struct peer peer;
    for (int i = 0; i < 2; i++) {
        snprintf(text, sizeof text, options, i ? "two" : "one");
        peer = peer_start(*state, &shape, text);
        assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 300), 0);
        if (!i)
            peer_kill(&peer);
    }
    struct peer dead = peer_start(*state, &shape, text);
    assert_int_equal(peer_do(&dead, PEER_DUMP, 1000, 300), 0);
    peer_kill(&dead);
    uint64_t all = disk_usage(*state);
    struct ucm_manage how = {.op = UCM_MANAGE_GC, .capacity = all * 3 / 4};
    struct ucm_manage_total t = manage(*state, how);
    assert_true(t.bytes <= how.capacity && disk_usage(*state) <= how.capacity);
    assert_int_equal(peer_do(&peer, PEER_LOAD, 0, 300), 300);
    ucm_store *store = open_store(*state, &shape, text);
    assert_int_equal(count_found(store, 1000, 300), 300);
    ucm_store_close(store);
    how.capacity = all / 2;
    t = manage(*state, how);
    assert_true(t.bytes <= how.capacity);
    assert_int_equal(peer_do(&peer, PEER_LOAD, 0, 300), 300); /* its owner lives */
    store = open_store(*state, &shape, text);
    assert_true(count_found(store, 1000, 300) < 300);
    ucm_store_close(store);
    how.capacity = 2500000;
    t = manage(*state, how);
    assert_true(t.bytes <= how.capacity);
    int64_t left = peer_do(&peer, PEER_LOAD, 0, 300);
    assert_true(left > 0 && left < 300);
    peer_end(&peer);
    how.capacity = 0;
    t = manage(*state, how);
    assert_int_equal(count_lanes(*state), 0);
}

static void gc_leaves_what_is_pinned(void **state)
{
    struct peer peer = peer_start(*state, &shape, "posix_segment_mb=1");
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 300), 0);
    char hex[33];
    assert_int_equal(pin(*state, hex_of(5, hex)).done, 1);
    struct ucm_manage how = {.op = UCM_MANAGE_GC, .timeout_ms = 50};
    assert_true(manage(*state, how).bytes > 0);
    assert_int_equal(peer_do(&peer, PEER_LOAD, 5, 1), 1);
    peer_kill(&peer);
    manage(*state, how);
    struct peer next = peer_start(*state, &shape, "posix_segment_mb=1");
    assert_int_equal(peer_do(&next, PEER_LOAD, 5, 1), 1);
    assert_true(peer_do(&next, PEER_FOUND, 0, 300) < 300);
    peer_end(&next);
}

/* ---- requests ---- */

/* A lane like one that a killed tool left behind, with these requests in it. */
static void leave_requests(const char *dir, const struct ucmi_journal_header *like,
                           const struct ucmi_record *r, unsigned n, unsigned number)
{
    char pattern[512], path[600];
    glob_t g;
    struct ucmi_journal_header *h = aligned_alloc(UCMI_PAGE, sizeof *h);
    struct ucmi_record v[3] = {{.op = UCMI_EPOCH, .epoch = 1}, r[0], r[n - 1]};
    struct ucmi_jtail tail = {.pos = {.off = UCMI_PAGE, .seq = 1}, .page = calloc(1, UCMI_PAGE)};
    void *page = calloc(1, UCMI_PAGE);
    memcpy(h, like, sizeof *h);
    h->base = h->summary = h->owner = 0;
    h->generation = h->epoch = 1;
    ucmi_journal_header_seal(h);
    ucmi_jtail_lay(&ucmi_plain, &tail, v, 1 + n, page);
    snprintf(pattern, sizeof pattern, "%s/ucm/????????*", dir);
    assert_int_equal(glob(pattern, 0, NULL, &g), 0);
    snprintf(path, sizeof path, "%s/r0-%016x", g.gl_pathv[0], number);
    globfree(&g);
    assert_int_equal(mkdir(path, 0777), 0);
    snprintf(path + strlen(path), 20, "/journal");
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    assert_int_equal(pwrite(fd, h, sizeof *h, 0), sizeof *h);
    assert_int_equal(pwrite(fd, page, UCMI_PAGE, UCMI_PAGE), UCMI_PAGE);
    close(fd);
    free(page);
    free(tail.page);
    free(h);
}

/* What a request must say right to be done, each wrong by itself. */
static void a_request_for_something_else_does_nothing(void **state)
{
    static char buf[1 << 16] __attribute__((aligned(4096)));
    static struct ucmi_journal_header head __attribute__((aligned(4096)));
    char path[512], ns[33];
    struct ucmi_table t = {.ns = ns, .given = &ucmi_plain};
    ucm_store *store = open_store(*state, &shape, SMALL);
    struct memory m;
    memory_new(&m, store, &shape, 1);
    dump_all(store, &m, 0);
    dump_all(store, &m, 1);
    lane_path(*state, "", path, sizeof path);
    assert_int_equal(sscanf(path + strlen(*state), "/ucm/%32[^/]", ns), 1);
    int dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_int_equal(ucmi_table_read(&t, dir, &head, buf, sizeof buf), 0);
    path[strlen(path) - 1] = '\0';
    struct ucmi_record put = *ucmi_table_at(&t, 0, 1), r = put;
    uint32_t now = ucmi_tick((uint64_t)time(NULL));
    r.op = UCMI_FORGET;
    r.lane = ucmi_lane_hash(strrchr(path, '/') + 1);
    r.tick = UINT32_MAX;
    r.depth = now + 100;
    struct ucmi_record wrong[] = {r, r, r, r, r, r, r};
    wrong[0].depth = now - 1;      /* no longer wanted */
    wrong[1].lane ^= 2;            /* another's lane */
    wrong[2].header_sum ^= 1;      /* another block's data */
    wrong[3].key.b[0] ^= 1;        /* another block */
    wrong[4].slot++;               /* another place */
    wrong[5].tick = put.tick;      /* used since */
    wrong[6].flags |= UCMI_IF_BAD; /* it is good */
    for (unsigned i = 0; i < ARRAY_LEN(wrong); i++) {
        leave_requests(*state, &head, &wrong[i], 1, 10 + i);
        assert_int_equal(count_found(store, 99, 1), 0); /* reads the news */
        assert_int_equal(count_found(store, 98, 1), 0); /* when that has been done */
        assert_int_equal(count_found(store, 1, 1), 1);
    }
    /* A segment with a pinned block is not given up. */
    struct ucmi_record shrink = {.op = UCMI_SHRINK, .lane = r.lane, .depth = r.depth};
    struct ucmi_record pins[2] = {r, shrink};
    pins[0].op = UCMI_PIN;
    pins[0].tick = now + 100;
    leave_requests(*state, &head, pins, 2, 96);
    assert_int_equal(count_found(store, 99, 1), 0);
    assert_int_equal(count_found(store, 98, 1), 0);
    assert_int_equal(count_found(store, 1, 1), 1);
    pins[0].tick = 0;
    leave_requests(*state, &head, pins, 1, 97);
    assert_int_equal(count_found(store, 99, 1), 0);
    assert_int_equal(count_found(store, 98, 1), 0);
    /* Said again and given up at a time: what is said last is that it is gone. */
    const struct ucmi_record both[2] = {wrong[5], shrink};
    leave_requests(*state, &head, both, 2, 98);
    while (count_found(store, 1, 1))
        assert_int_equal(count_found(store, 99, 1), 0);
    dump_all(store, &m, 2); /* behind it in the journal */
    assert_int_equal(ucmi_table_read(&t, dir, &head, buf, sizeof buf), 0);
    assert_null(ucmi_table_at(&t, 0, 1));
    dump_all(store, &m, 1);
    leave_requests(*state, &head, &r, 1, 99); /* all right */
    while (count_found(store, 1, 1))
        assert_int_equal(count_found(store, 99, 1), 0);
    close(dir);
    ucmi_table_free(&t);
    memory_free(&m);
    ucm_store_close(store);
}

/* ---- killed in the middle ---- */

static void killed_anywhere(void **state)
{
    enum { ROUNDS = 12, N = 150, LITTLE = 1 << 16 }; /* a lane of requests */
    struct peer peer = peer_start(*state, &shape, SMALL);
    for (int round = 0; round < ROUNDS; round++) {
        assert_int_equal(peer_do(&peer, PEER_DUMP, 0, N), 0);
        uint64_t half = N / 2;
        struct ucm_manage how = {
            .op = round % 3 == 2 ? UCM_MANAGE_PIN : UCM_MANAGE_RM,
            .want = low,
            .arg = &half,
            .until = time(NULL) + 100,
            .timeout_ms = LONG_MS,
        };
        pid_t pid = fork();
        if (pid == 0) {
            struct ucm_manage_total t;
            ucm_manage(*state, &how, &t);
            _exit(0);
        }
        /* As long as some lookups of the owner take, each a reading of journals. */
        for (int n = round * 2; n; n--)
            peer_do(&peer, PEER_FOUND, 99999, 1);
        kill(pid, SIGKILL);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        assert_true(disk_usage(*state) <= (uint64_t)(0.003 * (1 << 30)) + LITTLE);
        int64_t found = peer_do(&peer, PEER_FOUND, N / 2, N / 2);
        assert_int_equal(found, N / 2); /* the innocent */
        assert_int_equal(peer_do(&peer, PEER_LOAD, N / 2, N / 2), N / 2);
        assert_true(peer_do(&peer, PEER_LOAD, 0, N) >= N / 2);
        manage(*state, (struct ucm_manage){.op = UCM_MANAGE_UNPIN});
        how.op = UCM_MANAGE_RM;
        assert_int_equal(manage(*state, how).left, 0);
        assert_int_equal(peer_do(&peer, PEER_FOUND, 0, N / 2), 0);
    }
    peer_end(&peer);
    verify_all(*state);
    /* What the killed left goes like any dead lane. */
    manage(*state, (struct ucm_manage){.op = UCM_MANAGE_RM});
    manage(*state, (struct ucm_manage){.op = UCM_MANAGE_GC});
    ucm_store *store = open_store(*state, &shape, SMALL);
    struct memory m;
    memory_new(&m, store, &shape, 10);
    dump_all(store, &m, 0);
    load_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
}

static void what_makes_no_sense_is_refused(void **state)
{
    struct ucm_manage_total t;
    struct ucm_manage bad[] = {
        {.op = UCM_MANAGE_PIN},
        {.op = UCM_MANAGE_PIN, .until = time(NULL) - 1},
        {.op = UCM_MANAGE_RM, .key = "xyz"},
        {.op = UCM_MANAGE_RM, .ns = ""},
        {.op = (enum ucm_manage_op)77},
    };
    for (size_t i = 0; i < ARRAY_LEN(bad); i++)
        assert_int_equal(ucm_manage(*state, &bad[i], &t), -EINVAL);
    struct ucm_manage how = {.op = UCM_MANAGE_RM};
    assert_int_equal(ucm_manage(*state, &how, &t), -ENOENT); /* no ucm in it */
    assert_int_equal(ucm_manage(NULL, &how, &t), -EINVAL);
    ucm_store *store = open_store(*state, &shape, "namespace=a");
    struct memory m;
    memory_new(&m, store, &shape, 3);
    dump_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
    how.ns = "b";
    assert_int_equal(manage(*state, how).namespaces, 0);
    how.ns = "a";
    assert_int_equal(manage(*state, how).done, 3);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(int argc, char **argv)
{
    if (argc > 1)
        return peer_main(argc, argv);
    const struct CMUnitTest tests[] = {
        TEST(blocks_of_a_dead_lane_are_dropped),
        TEST(what_was_used_since_stays),
        TEST(an_idle_owner_answers),
        TEST(a_busy_owner_answers_for_many),
        TEST(who_does_not_answer_is_told_of),
        TEST(repair_drops_what_is_bad_and_nothing_else),
        TEST(a_segment_that_is_gone_is_repaired),
        TEST(pinned_blocks_outlive_all_others),
        TEST(without_a_pin_they_go),
        TEST(where_all_is_pinned_a_dump_is_dropped),
        TEST(a_pinned_dead_lane_of_another_namespace_stays),
        TEST(gc_takes_the_dead_first),
        TEST(gc_leaves_what_is_pinned),
        TEST(a_request_for_something_else_does_nothing),
        TEST(killed_anywhere),
        TEST(what_makes_no_sense_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

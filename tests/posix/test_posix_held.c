/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Storage that takes its time, or never answers: what is held up is only what it holds.
 *
 * This program is linked with its own ucmi_io_open around the real one: reads and writes of blocks
 * that the gate lets in stay there until it opens.
 */
#include "peer.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/io.h"
#include "store/posix.h"

static const struct shape shape = {4096, 2, 0};

/* ---- the gate ---- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t change;
    bool shut_reads, shut_writes, shut_files;
    unsigned engine; /* the only one it is for, in the order they were opened; 0: all */
    unsigned opened;
    unsigned held; /* operations, and calls that change a name, that are in it now */
} gate = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, false, false, 0, 0, 0};

struct gated {
    struct ucmi_io real;
    struct ucm_io *kept[256];
    unsigned nkept, number;
};

static void set_gate(bool reads, bool writes, bool files)
{
    pthread_mutex_lock(&gate.lock);
    gate.shut_reads = reads;
    gate.shut_writes = writes;
    gate.shut_files = files;
    pthread_cond_broadcast(&gate.change);
    pthread_mutex_unlock(&gate.lock);
}

static void await_held(unsigned n)
{
    pthread_mutex_lock(&gate.lock);
    while (gate.held < n)
        pthread_cond_wait(&gate.change, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
}

static bool is_shut(const struct gated *g, const struct ucm_io *io)
{
    if (gate.engine && gate.engine != g->number)
        return false;
    return io->op == UCM_IO_READV ? gate.shut_reads : io->op == UCM_IO_WRITEV && gate.shut_writes;
}

static int gated_submit(void *state, struct ucm_io **v, unsigned n)
{
    struct gated *g = state;
    for (unsigned i = 0; i < n; i++) {
        pthread_mutex_lock(&gate.lock);
        bool shut = is_shut(g, v[i]);
        if (shut) {
            g->kept[g->nkept++] = v[i];
            gate.held++;
            pthread_cond_broadcast(&gate.change);
        }
        pthread_mutex_unlock(&gate.lock);
        int took = shut ? 1 : g->real.ops->submit(g->real.state, &v[i], 1);
        if (took <= 0)
            return i ? (int)i : took;
    }
    return (int)n;
}

/* What was kept goes on when the gate is open; opening it is followed by a wake. */
static int gated_reap(void *state, struct ucm_io **v, unsigned max, int timeout_ms)
{
    struct gated *g = state;
    pthread_mutex_lock(&gate.lock);
    unsigned n = g->nkept && !is_shut(g, g->kept[0]) ? g->nkept : 0;
    gate.held -= n;
    pthread_mutex_unlock(&gate.lock);
    if (n) {
        struct ucm_io *kept[256];
        memcpy(kept, g->kept, n * sizeof(struct ucm_io *));
        g->nkept = 0;
        for (unsigned i = 0; i < n; i++)
            assert_int_equal(g->real.ops->submit(g->real.state, &kept[i], 1), 1);
    }
    return g->real.ops->reap(g->real.state, v, max, timeout_ms);
}

static void gated_wake(void *state)
{
    struct gated *g = state;
    g->real.ops->wake(g->real.state);
}

static int gated_file(void *state, const struct ucm_file *f)
{
    struct gated *g = state;
    pthread_mutex_lock(&gate.lock);
    gate.held++;
    pthread_cond_broadcast(&gate.change);
    while (gate.shut_files)
        pthread_cond_wait(&gate.change, &gate.lock);
    gate.held--;
    pthread_mutex_unlock(&gate.lock);
    return ucmi_io_file(&g->real, f);
}

static _Atomic int closed; /* engines */

static void gated_close(void *state)
{
    struct gated *g = state;
    ucmi_io_close(&g->real);
    pthread_mutex_lock(&gate.lock);
    closed++;
    pthread_cond_broadcast(&gate.change);
    pthread_mutex_unlock(&gate.lock);
}

static const struct ucm_io_ops gated_ops = {
    .p = {.kind = "io", .name = "gated", .size = sizeof(struct gated)},
    .close = gated_close,
    .submit = gated_submit,
    .reap = gated_reap,
    .wake = gated_wake,
    .file = gated_file,
};

int __real_ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                        char *why, size_t why_len);
int __wrap_ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                        char *why, size_t why_len);

int __wrap_ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                        char *why, size_t why_len)
{
    struct gated *g = calloc(1, sizeof *g);
    int err = __real_ucmi_io_open(&g->real, name, depth, conf, why, why_len);
    if (err < 0)
        free(g);
    else
        *io = (struct ucmi_io){.ops = &gated_ops, .state = g};
    g = err < 0 ? NULL : g;
    if (g)
        g->number = ++gate.opened;
    return err;
}

static struct ucmi_posix *backend_of(const ucm_store *store)
{
    return ((const struct ucmi_backends *)store->tiers[0].priv)->v[0];
}

/* ---- tasks that are held up ---- */

enum { N = 8 };
static ucm_key keys[N];
static uint32_t blocks[N];

static ucm_task *submit(ucm_store *store, struct memory *m, bool dump, uint64_t first)
{
    ucm_task *task = NULL;
    for (uint32_t i = 0; i < m->n; i++) {
        keys[i] = key_of(first + i);
        blocks[i] = i;
        if (dump)
            paint(m, i, first + i);
    }
    struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = m->n};
    assert_int_equal((dump ? ucm_dump : ucm_load)(store, m->map, &batch, &task), 0);
    return task;
}

/* The pump is in its engine's reap or about to be: either way a wake lets it look again. */
static void open_gate(const ucm_store *store)
{
    const struct ucmi_posix *p = backend_of(store);
    set_gate(false, false, false);
    p->io.ops->wake(p->io.state);
}

/* A load is under way from the lane of a process that dies, and the lane becomes ours under it. */
static void a_lane_adopted_under_a_load(void **state)
{
    struct peer peer = peer_start(*state, &shape, NULL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, N), 0);
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m, other;
    memory_new(&m, store, &shape, N);
    memory_new(&other, store, &shape, N);
    assert_int_equal(count_found(store, 0, N), N);
    set_gate(true, false, false);
    ucm_task *load = submit(store, &m, false, 0);
    await_held(N);
    peer_kill(&peer);
    dump_all(store, &other, 100);
    assert_int_equal((int)metric(store, "disk_lanes_adopted_total"), 1);
    open_gate(store);
    assert_int_equal(ucm_task_wait(load, UCM_RELEASED, 60000), 0);
    for (uint64_t i = 0; i < N; i++)
        assert_true(painted(&m, i, i));
    ucm_task_free(load);
    load_all(store, &m, 0);
    load_all(store, &m, 100);
    memory_free(&other);
    memory_free(&m);
    ucm_store_close(store);
}

/* The same, but what is read is damaged: a block of ours that has the slot by now stays. */
static void damage_found_after_an_adoption(void **state)
{
    struct peer peer = peer_start(*state, &shape, NULL);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 1), 0);
    ucm_store *store = open_store(*state, &shape, NULL);
    struct memory m;
    char path[512];
    memory_new(&m, store, &shape, 1);
    assert_int_equal(count_found(store, 0, 1), 1);
    lane_path(*state, "seg-000000", path, sizeof path);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pwrite(fd, "?", 1, 4096 + 17), 1);
    close(fd);
    set_gate(true, false, false);
    ucm_task *load = submit(store, &m, false, 0);
    await_held(1);
    peer_kill(&peer);
    struct memory other;
    memory_new(&other, store, &shape, 1);
    dump_all(store, &other, 100);
    assert_int_equal((int)metric(store, "disk_lanes_adopted_total"), 1);
    open_gate(store);
    assert_int_equal(ucm_task_wait(load, UCM_RELEASED, 60000), -EBADMSG);
    ucm_task_free(load);
    assert_int_equal(count_found(store, 0, 1), 0); /* ours to drop by now */
    load_all(store, &other, 100);
    memory_free(&other);
    memory_free(&m);
    ucm_store_close(store);
}

static void await_closed(int n)
{
    pthread_mutex_lock(&gate.lock);
    while (closed < n)
        pthread_cond_wait(&gate.change, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
}

/* One I/O that never comes back does not keep a store from being closed; when it does come back at
 * last, all is freed (which the sanitizers' builds see). */
static void closing_does_not_wait_for_ever(void **state)
{
    ucm_store *store = open_store(*state, &shape, "timeout_ms=200");
    struct memory m;
    memory_new(&m, store, &shape, 1);
    set_gate(false, true, false);
    ucm_task *dump = submit(store, &m, true, 0);
    await_held(1);
    int before = closed;
    ucm_store_close(store);
    assert_int_equal(closed, before); /* not all of it, then */
    assert_int_equal(ucm_task_done(dump, UCM_RELEASED), 0);
    open_gate(store); /* kept, with what the I/O needs */
    assert_int_equal(ucm_task_wait(dump, UCM_STORED, 60000), 0);
    ucm_task_free(dump);
    memory_free(&m);
    await_closed(before + 1);
}

static void await_stall(ucm_store *store, bool stalled)
{
    const struct ucmi_posix *p = backend_of(store);
    do
        count_found(store, 60, 1); /* callers find out */
    while (atomic_load(&p->stalled) != stalled);
    assert_int_equal((int)metric(store, "disk_stalled"), stalled);
}

/* Nothing comes back for posix_stall_ms: lookups miss, loads and dumps are refused at once.  When
 * something does the tier is used again. */
static void storage_that_hangs_is_passed_by(void **state)
{
    ucm_store *store = open_store(*state, &shape, "posix_stall_ms=100");
    struct memory m;
    memory_new(&m, store, &shape, 1);
    dump_all(store, &m, 0);
    set_gate(true, false, false);
    ucm_task *load = submit(store, &m, false, 0), *refused = NULL;
    await_stall(store, true);
    assert_int_equal(count_found(store, 0, 1), 0); /* what it has is of no use now */
    struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = 1};
    assert_int_equal(ucm_load(store, m.map, &batch, &refused), -EIO);
    assert_int_equal(ucm_dump(store, m.map, &batch, &refused), -EIO);
    open_gate(store);
    assert_int_equal(ucm_task_wait(load, UCM_RELEASED, 60000), 0);
    ucm_task_free(load);
    await_stall(store, false);
    load_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
}

/* A load that is in more of a hurry than the one before it is given up at its own time. */
static void a_load_is_given_up_when_its_batch_says(void **state)
{
    ucm_store *store = open_store(*state, &shape, "posix_io_depth=1");
    struct memory m;
    memory_new(&m, store, &shape, N);
    dump_all(store, &m, 0);
    set_gate(true, false, false);
    ucm_task *patient = submit(store, &m, false, 0), *hasty = NULL;
    struct ucm_batch batch = {.keys = keys, .blocks = blocks, .n = N, .timeout_ms = 10};
    await_held(1);
    assert_int_equal(ucm_load(store, m.map, &batch, &hasty), 0);
    assert_int_equal(ucm_task_wait(hasty, UCM_RELEASED, 20000), -ETIMEDOUT);
    assert_true(ucm_task_done(hasty, UCM_RELEASED));
    assert_false(ucm_task_done(patient, UCM_RELEASED));
    open_gate(store);
    assert_int_equal(ucm_task_wait(patient, UCM_RELEASED, 60000), 0);
    ucm_task_free(hasty);
    ucm_task_free(patient);
    load_all(store, &m, 0);
    memory_free(&m);
    ucm_store_close(store);
}

/* A call that hangs holds the whole pump: one lookup waits for its news in vain, and no other. */
static void only_one_waits_for_a_pump_that_hangs(void **state)
{
    ucm_store *store = open_store(*state, &shape, "lookup_timeout_ms=50");
    const struct ucmi_posix *p = backend_of(store);
    struct peer peer = peer_start(*state, &shape, NULL); /* so that there may be news */
    struct memory m;
    memory_new(&m, store, &shape, 1);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 0, 1), 0);
    assert_int_equal(count_found(store, 0, 1), 1);
    set_gate(false, false, true);
    ucm_task *dump = submit(store, &m, true, 50); /* makes a lane */
    await_held(1);
    assert_int_equal(peer_do(&peer, PEER_DUMP, 1, 1), 0);
    assert_int_equal(count_found(store, 1, 1), 0);
    assert_true(p->news_late);
    assert_int_equal(count_found(store, 0, 2), 1);
    set_gate(false, false, false);
    assert_int_equal(ucm_task_wait(dump, UCM_STORED, 60000), 0);
    ucm_task_free(dump);
    while (count_found(store, 0, 2) < 2)
        ;
    assert_false(p->news_late);
    peer_end(&peer);
    memory_free(&m);
    ucm_store_close(store);
}

/* One of two hangs: what is in the other is loaded, and all dumps go there. */
static void one_backend_hangs_and_the_other_serves(void **state)
{
    char a[256], b[256], both[512];
    snprintf(a, sizeof a, "%s/a", (char *)*state);
    snprintf(b, sizeof b, "%s/b", (char *)*state);
    snprintf(both, sizeof both, "%s:%s", a, b);
    mkdir(a, 0700);
    mkdir(b, 0700);
    gate.opened = 0;
    ucm_store *store = open_store(both, &shape, "posix_stall_ms=100");
    const struct ucmi_backends *tier = store->tiers[0].priv;
    struct memory m, some;
    memory_new(&m, store, &shape, N);
    memory_new(&some, store, &shape, 100);
    dump_all(store, &some, 0);
    gate.engine = 1;
    set_gate(true, true, false);
    ucm_task *load = submit(store, &m, false, 0); /* some of them are in a */
    await_held(1);
    do
        count_found(store, 1000, 1);
    while (!atomic_load(&tier->v[0]->stalled));
    assert_int_equal((int)metric(store, "disk_stalled"), 1);
    size_t there = count_found(store, 0, 100);
    assert_in_range(there, 20, 80);
    struct outcome out = move(store, &some, false, 0, 0, 0);
    for (uint64_t i = 0; i < 100; i++)
        there -= out.status[i] == 0 && painted(&some, i, i);
    assert_int_equal(there, 0);
    free(out.status);
    dump_all(store, &some, 200);
    load_all(store, &some, 200);
    set_gate(false, false, false);
    tier->v[0]->io.ops->wake(tier->v[0]->io.state);
    assert_int_equal(ucm_task_wait(load, UCM_RELEASED, 60000), 0);
    ucm_task_free(load);
    while (count_found(store, 0, 100) < 100)
        ;
    load_all(store, &some, 0);
    gate.engine = 0;
    memory_free(&some);
    memory_free(&m);
    ucm_store_close(store);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(int argc, char **argv)
{
    if (argc > 1)
        return peer_main(argc, argv);
    const struct CMUnitTest tests[] = {
        TEST(a_lane_adopted_under_a_load),
        TEST(damage_found_after_an_adoption),
        TEST(closing_does_not_wait_for_ever),
        TEST(storage_that_hangs_is_passed_by),
        TEST(a_load_is_given_up_when_its_batch_says),
        TEST(only_one_waits_for_a_pump_that_hangs),
        TEST(one_backend_hangs_and_the_other_serves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

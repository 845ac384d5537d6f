/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contract of struct ucm_io_ops, one suite over every engine.  An engine that does not work
 * here is skipped with its reason.  No test waits by the clock: a promise to wake up that is broken
 * shows as a test that does not end.
 */
#include "io/io.h"

#include <semaphore.h>
#include <sys/resource.h>

#include "io_test.h"

enum { DEPTH = 16, MAX_OPS = 512, KIB = 1024, MIB = 1024 * KIB };

static const char *const engines[] = {"psync", "aio", "io_uring"};

static int open_engine(void **state)
{
    static struct ucmi_io io;
    const char *name = *state;
    *state = &io;
    return ucmi_io_open(&io, name, DEPTH, NULL, NULL, 0);
}

static int close_engine(void **state)
{
    ucmi_io_close(*state);
    return 0;
}

/* Gives all n operations to the engine and takes them back; each must come back once. */
static void run_all(struct ucmi_io *io, struct ucm_io *ops, unsigned n)
{
    struct ucm_io *v[MAX_OPS], *back[MAX_OPS];
    unsigned given = 0, ended = 0;
    assert_true(n <= MAX_OPS);
    for (unsigned i = 0; i < n; i++) {
        v[i] = &ops[i];
        ops[i].arg = NULL;
    }
    while (ended < n) {
        int r = given < n ? io->ops->submit(io->state, v + given, n - given) : 0;
        assert_in_range(r, 0, DEPTH - (given - ended));
        given += (unsigned)r;
        r = io->ops->reap(io->state, back, MAX_OPS, -1);
        assert_in_range(r, 1, given - ended);
        for (int i = 0; i < r; i++) {
            assert_null(back[i]->arg);
            back[i]->arg = back[i];
        }
        ended += (unsigned)r;
    }
}

static ssize_t run_one(struct ucmi_io *io, struct ucm_io op)
{
    run_all(io, &op, 1);
    return op.res;
}

/* ---- data ---- */

/* Cuts buf into n pieces of odd sizes. */
static void cut(struct iovec *iov, unsigned n, unsigned char *buf, size_t len, unsigned *seed)
{
    for (unsigned i = 0; i < n; i++) {
        size_t some = (size_t)rand_r(seed) % (2 * len / n + 1);
        size_t part = i + 1 == n ? len : MIN(len, some);
        iov[i] = (struct iovec){buf, part};
        buf += part;
        len -= part;
    }
}

static void pieces_of_odd_sizes_at_odd_places(void **state)
{
    struct ucmi_io *io = *state;
    enum { N = 300, PIECES = 7, LONGEST = 9000 };
    static struct iovec iov[N][PIECES];
    struct ucm_io ops[N];
    unsigned char *buf = aligned(N * LONGEST);
    size_t at[N + 1] = {3};
    unsigned seed = 7;
    int fd = scratch_file(0);

    for (int write = 1; write >= 0; write--) {
        for (unsigned i = 0; i < N; i++) {
            size_t len = write ? 1 + (size_t)rand_r(&seed) % LONGEST : at[i + 1] - at[i];
            at[i + 1] = at[i] + len;
            cut(iov[i], PIECES, buf + at[i], len, &seed);
            ops[i] = (struct ucm_io){.op = write ? UCM_IO_WRITEV : UCM_IO_READV,
                                     .fd = fd,
                                     .off = (off_t)at[i],
                                     .iov = iov[i],
                                     .niov = PIECES,
                                     .brief = i % 3 == 0};
        }
        if (write)
            fill_pattern(buf, at[N], 0);
        else
            memset(buf, 0, at[N]);
        run_all(io, ops, N);
        for (unsigned i = 0; i < N; i++)
            assert_int_equal(ops[i].res, at[i + 1] - at[i]);
    }
    assert_true(has_pattern(buf + at[0], at[N] - at[0], at[0]));
    free(buf);
    close(fd);
}

static void direct_blocks_and_the_ragged_end(void **state)
{
    struct ucmi_io *io = *state;
    enum { N = 64, LEN = 16 * KIB };
    struct iovec iov[N];
    struct ucm_io ops[N];
    unsigned char *buf = aligned(N * LEN);
    int fd = scratch_file(O_DIRECT);
    if (fd < 0) {
        print_message("# skip: no O_DIRECT here\n");
        free(buf);
        return;
    }
    for (int write = 1; write >= 0; write--) {
        for (unsigned i = 0; i < N; i++) {
            iov[i] = (struct iovec){buf + i * LEN, LEN};
            ops[i] = (struct ucm_io){.op = write ? UCM_IO_WRITEV : UCM_IO_READV,
                                     .fd = fd,
                                     .off = (off_t)i * LEN,
                                     .iov = &iov[i],
                                     .niov = 1};
        }
        if (write)
            fill_pattern(buf, N * LEN, 0);
        else
            memset(buf, 0, N * LEN);
        run_all(io, ops, N);
        for (unsigned i = 0; i < N; i++)
            assert_int_equal(ops[i].res, LEN);
    }
    assert_true(has_pattern(buf, N * LEN, 0));

    assert_int_equal(ftruncate(fd, LEN + 700), 0);
    struct iovec two[2] = {{buf, LEN}, {buf + LEN, LEN}};
    struct ucm_io op = {.op = UCM_IO_READV, .fd = fd, .iov = two, .niov = 2};
    assert_int_equal(run_one(io, op), LEN + 700);
    assert_true(has_pattern(buf, LEN + 700, 0));
    op.off = 512; /* memory off by one */
    two[0].iov_base = buf + 1;
    op.niov = 1;
    assert_int_equal(run_one(io, op), -EINVAL);
    free(buf);
    close(fd);
}

static void the_end_of_the_file_gives_what_there_is(void **state)
{
    struct ucmi_io *io = *state;
    unsigned char buf[3000];
    struct iovec iov[2] = {{buf, 1000}, {buf + 1000, 2000}};
    int fd = scratch_file(0);
    fill_pattern(buf, sizeof buf, 0);
    assert_int_equal(write(fd, buf, 2500), 2500);
    memset(buf, 0, sizeof buf);

    struct ucm_io op = {.op = UCM_IO_READV, .fd = fd, .iov = iov, .niov = 2};
    assert_int_equal(run_one(io, op), 2500);
    assert_true(has_pattern(buf, 2500, 0));
    op.off = 2500;
    assert_int_equal(run_one(io, op), 0);
    op.off = 1 << 30;
    assert_int_equal(run_one(io, op), 0);
    op.niov = 0;
    assert_int_equal(run_one(io, op), 0);
    close(fd);
}

/* The kernel moves 2 GiB less a page in one call at most: the only short transfer there is on
 * demand, and the one that a whole segment in one operation would meet. */
static void more_than_one_system_call_can_move(void **state)
{
    struct ucmi_io *io = *state;
    enum { N = 520, LEN = 4 * MIB };
    static struct iovec iov[N];
    off_t tail = (off_t)(N - 1) * LEN;
    unsigned char *same = aligned(LEN), *last = aligned(LEN);
    int fd = scratch_file(O_DIRECT); /* holes are not worth caching */
    if (fd < 0)
        fd = scratch_file(0);
    for (unsigned i = 0; i < N; i++)
        iov[i] = (struct iovec){i + 1 < N ? same : last, LEN};
    fill_pattern(last, LEN, 0);
    assert_int_equal(pwrite(fd, last, LEN, tail), LEN);
    memset(last, 0, LEN);

    struct ucm_io op = {.op = UCM_IO_READV, .fd = fd, .iov = iov, .niov = N};
    assert_int_equal(run_one(io, op), tail + LEN);
    assert_true(has_pattern(last, LEN, 0));
    free(same);
    free(last);
    close(fd);
}

static void an_operation_comes_back_as_it_was_sent(void **state)
{
    struct ucmi_io *io = *state;
    unsigned char buf[100];
    int mark, fd = scratch_file(0);
    assert_int_equal(write(fd, "0123456789", 10), 10);
    struct iovec iov[2] = {{buf, 4}, {buf + 4, 96}};
    struct ucm_io op = {
        .op = UCM_IO_READV, .fd = fd, .off = 2, .iov = iov, .niov = 2, .arg = &mark};
    struct ucm_io *v = &op, *back = NULL;
    for (int i = 0; i < 3; i++) { /* so it can be sent again */
        assert_int_equal(io->ops->submit(io->state, &v, 1), 1);
        assert_int_equal(io->ops->reap(io->state, &back, 1, -1), 1);
        assert_ptr_equal(back, &op);
        assert_ptr_equal(op.arg, &mark);
        assert_ptr_equal(op.iov, iov);
        assert_int_equal(op.niov, 2);
        assert_int_equal(op.off, 2);
        assert_int_equal(op.res, 8);
    }
    close(fd);
}

static void sync_syncs(void **state)
{
    struct ucmi_io *io = *state;
    int fd = scratch_file(0), pipe_fds[2];
    assert_int_equal(write(fd, "x", 1), 1);
    assert_int_equal(pipe(pipe_fds), 0);
    assert_int_equal(run_one(io, (struct ucm_io){.op = UCM_IO_SYNC, .fd = fd}), 0);
    assert_int_equal(run_one(io, (struct ucm_io){.op = UCM_IO_SYNC, .fd = pipe_fds[0]}), -EINVAL);
    close(fd);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
}

/* ---- errors ---- */

static void errors_pass_and_spoil_nothing_else(void **state)
{
    struct ucmi_io *io = *state;
    unsigned char buf[2][64];
    int fd = scratch_file(0), dir = open("/", O_RDONLY), read_only = open("/dev/null", O_RDONLY);
    fill_pattern(buf[0], sizeof buf[0], 0);
    assert_int_equal(write(fd, buf[0], sizeof buf[0]), sizeof buf[0]);
    struct iovec iov[2] = {{buf[0], sizeof buf[0]}, {buf[1], sizeof buf[1]}};
    struct ucm_io ops[] = {
        {.op = UCM_IO_READV, .fd = fd, .iov = &iov[0], .niov = 1},
        {.op = UCM_IO_READV, .fd = -1, .iov = &iov[1], .niov = 1},
        {.op = UCM_IO_READV, .fd = dir, .iov = &iov[1], .niov = 1},
        {.op = UCM_IO_WRITEV, .fd = read_only, .iov = &iov[1], .niov = 1},
        {.op = UCM_IO_SYNC, .fd = -1},
        {.op = UCM_IO_READV, .fd = fd, .off = -1, .iov = &iov[1], .niov = 1},
        {.op = UCM_IO_READV, .fd = fd, .iov = &iov[1], .niov = 1},
    };
    memset(buf, 0, sizeof buf);
    run_all(io, ops, ARRAY_LEN(ops));
    assert_int_equal(ops[0].res, sizeof buf[0]);
    assert_int_equal(ops[1].res, -EBADF);
    /* aio calls a directory -EINVAL: it has no read at all that could be asynchronous */
    assert_true(ops[2].res == -EISDIR || ops[2].res == -EINVAL);
    assert_int_equal(ops[3].res, -EBADF);
    assert_int_equal(ops[4].res, -EBADF);
    assert_int_equal(ops[5].res, -EINVAL);
    assert_int_equal(ops[6].res, sizeof buf[1]);
    assert_true(has_pattern(buf[0], sizeof buf[0], 0) && has_pattern(buf[1], sizeof buf[1], 0));
    close(fd);
    close(dir);
    close(read_only);
}

static const char *full_engine;
static const char *write_across_the_limit(void)
{
    struct rlimit limit = {64 * KIB, 64 * KIB};
    static unsigned char buf[32 * KIB];
    struct iovec iov[2] = {{buf, sizeof buf}, {buf, sizeof buf}};
    struct ucmi_io io;
    int fd = scratch_file(0);
    struct ucm_io op = {.op = UCM_IO_WRITEV, .fd = fd, .off = 32 * KIB, .iov = iov, .niov = 2};
    struct ucm_io *v = &op;
    signal(SIGXFSZ, SIG_IGN);
    if (setrlimit(RLIMIT_FSIZE, &limit) < 0)
        return "skip: no limit on the size of files here";
    if (ucmi_io_open(&io, full_engine, 4, NULL, NULL, 0) < 0)
        return "cannot open the engine again";
    if (io.ops->submit(io.state, &v, 1) != 1 || io.ops->reap(io.state, &v, 1, -1) != 1)
        return "it does not come back";
    ucmi_io_close(&io);
    return op.res == -EFBIG ? NULL : "half a write is passed off as something else than EFBIG";
}

static void half_a_write_is_an_error(void **state)
{
    struct ucmi_io *io = *state;
    full_engine = io->ops->p.name;
    ucmi_io_close(io); /* a process that forks should have one thread */
    in_child(write_across_the_limit);
}

/* ---- bounds, waiting, waking ---- */

static void depth_is_the_bound_and_nothing_is_lost(void **state)
{
    struct ucmi_io *io = *state;
    struct ucm_io ops[2 * DEPTH], *v[2 * DEPTH], *back[2 * DEPTH];
    unsigned char buf[2 * DEPTH];
    struct iovec iov[2 * DEPTH];
    int fd = scratch_file(0);
    assert_int_equal(ftruncate(fd, 4096), 0);
    for (unsigned i = 0; i < 2 * DEPTH; i++) {
        iov[i] = (struct iovec){&buf[i], 1};
        ops[i] = (struct ucm_io){.op = UCM_IO_READV, .fd = fd, .iov = &iov[i], .niov = 1};
        v[i] = &ops[i];
    }
    assert_int_equal(io->ops->submit(io->state, v, 2 * DEPTH), DEPTH);
    assert_int_equal(io->ops->submit(io->state, v + DEPTH, DEPTH), 0);
    int got = io->ops->reap(io->state, back, 3, -1);
    assert_in_range(got, 1, 3);
    assert_int_equal(io->ops->submit(io->state, v + DEPTH, DEPTH), got);
    for (int ended = got; ended < DEPTH + got;) {
        int r = io->ops->reap(io->state, back, 2 * DEPTH, -1);
        assert_in_range(r, 1, DEPTH + got - ended);
        ended += r;
    }
    for (int i = 0; i < DEPTH + got; i++)
        assert_int_equal(ops[i].res, 1);
    assert_int_equal(io->ops->reap(io->state, back, 2 * DEPTH, 0), 0);
    close(fd);
}

static void reap_gives_up_in_time(void **state)
{
    struct ucmi_io *io = *state;
    struct ucm_io *back;
    assert_int_equal(io->ops->reap(io->state, &back, 1, 0), 0);
    uint64_t before = ucmi_now_ns();
    assert_int_equal(io->ops->reap(io->state, &back, 1, 20), 0);
    assert_true(ucmi_now_ns() - before >= 20 * 1000000u);
}

static void a_wake_before_a_reap_ends_it(void **state)
{
    struct ucmi_io *io = *state;
    struct ucm_io *back;
    for (int i = 0; i < 100; i++) {
        io->ops->wake(io->state);
        io->ops->wake(io->state);
        assert_int_equal(io->ops->reap(io->state, &back, 1, -1), 0);
    }
    uint64_t before = ucmi_now_ns(); /* and only that one */
    assert_int_equal(io->ops->reap(io->state, &back, 1, 10), 0);
    assert_true(ucmi_now_ns() - before >= 10 * 1000000u);
    io->ops->wake(io->state); /* one that nobody waits for; then comes close */
}

struct waker {
    struct ucmi_io *io;
    _Atomic int asked;
    sem_t seen;
};

static void *wake_and_wait(void *arg)
{
    struct waker *w = arg;
    for (int i = 0; i < 5000; i++) {
        atomic_fetch_add(&w->asked, 1);
        w->io->ops->wake(w->io->state);
        sem_wait(&w->seen);
    }
    return NULL;
}

static void no_wake_from_another_thread_is_lost(void **state)
{
    struct waker w = {.io = *state};
    struct ucm_io *back;
    pthread_t thread;
    sem_init(&w.seen, 0, 0);
    assert_int_equal(ucmi_thread_start(&thread, "waker", wake_and_wait, &w), 0);
    for (int seen = 0; seen < 5000; seen++) {
        while (atomic_load(&w.asked) == seen)
            assert_int_equal(w.io->ops->reap(w.io->state, &back, 1, -1), 0);
        sem_post(&w.seen);
    }
    pthread_join(thread, NULL);
    sem_destroy(&w.seen);
}

static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Of all threads: one that polls shows in the switches, one that spins in the time. */
static void idle_costs_nothing(void **state)
{
    struct ucmi_io *io = *state;
    struct rusage before, after;
    struct ucm_io *back;
    assert_int_equal(run_one(io, (struct ucm_io){.op = UCM_IO_SYNC, .fd = -1}), -EBADF);
    io->ops->reap(io->state, &back, 1, 1); /* threads that were just at work have lain down */
    getrusage(RUSAGE_SELF, &before);
    uint64_t cpu = cpu_ns();
    assert_int_equal(io->ops->reap(io->state, &back, 1, 300), 0);
    cpu = cpu_ns() - cpu;
    getrusage(RUSAGE_SELF, &after);
    assert_in_range(after.ru_nvcsw - before.ru_nvcsw, 0, 30);
    assert_in_range(cpu, 0, 100 * 1000000u);
}

/* ---- many ---- */

static void ten_thousand_in_any_order_each_once(void **state)
{
    struct ucmi_io *io = *state;
    enum { TOTAL = 10000, FILE_LEN = 4 * MIB };
    static struct ucm_io ops[DEPTH];
    static unsigned char buf[DEPTH][8 * KIB];
    struct iovec iov[DEPTH];
    struct ucm_io *idle[DEPTH], *back[DEPTH];
    unsigned nidle = DEPTH, started = 0, ended = 0, seed = 11;
    unsigned char *all = aligned(FILE_LEN);
    int fd = scratch_file(0);
    fill_pattern(all, FILE_LEN, 0);
    assert_int_equal(write(fd, all, FILE_LEN), FILE_LEN);
    free(all);
    for (unsigned i = 0; i < DEPTH; i++)
        idle[i] = &ops[i];

    while (ended < TOTAL) {
        unsigned some = 1 + (unsigned)rand_r(&seed) % DEPTH;
        unsigned n = MIN(MIN(nidle, TOTAL - started), some);
        for (unsigned i = 0; i < n; i++) {
            struct ucm_io *op = idle[nidle - 1 - i];
            size_t at = (size_t)(op - ops);
            iov[at] = (struct iovec){buf[at], 1 + (size_t)rand_r(&seed) % sizeof buf[at]};
            off_t off = rand_r(&seed) % (FILE_LEN - 8 * KIB);
            bool write = rand_r(&seed) % 2;
            fill_pattern(buf[at], write ? iov[at].iov_len : 0, (uint64_t)off);
            *op = (struct ucm_io){.op = write ? UCM_IO_WRITEV : UCM_IO_READV,
                                  .fd = fd,
                                  .off = off,
                                  .iov = &iov[at],
                                  .niov = 1,
                                  .arg = &ops};
            back[i] = op;
        }
        assert_int_equal(n ? io->ops->submit(io->state, back, n) : 0, n);
        started += n;
        nidle -= n;
        int r = io->ops->reap(io->state, back, 1 + (unsigned)rand_r(&seed) % DEPTH,
                              nidle < DEPTH ? -1 : 0);
        assert_in_range(r, nidle < DEPTH ? 1 : 0, DEPTH - nidle);
        for (int i = 0; i < r; i++) {
            size_t at = (size_t)(back[i] - ops);
            assert_ptr_equal(back[i]->arg, &ops);
            back[i]->arg = NULL;
            assert_int_equal(back[i]->res, iov[at].iov_len);
            assert_true(has_pattern(buf[at], iov[at].iov_len, (uint64_t)back[i]->off));
            idle[nidle++] = back[i];
        }
        ended += (unsigned)r;
    }
    assert_int_equal(started, TOTAL);
    assert_int_equal(io->ops->reap(io->state, back, DEPTH, 0), 0);
    close(fd);
}

struct user {
    struct ucmi_io *io;
    ssize_t res;
};

static void *use_engine(void *arg)
{
    struct user *u = arg;
    struct ucm_io op = {.op = UCM_IO_SYNC, .fd = -1}, *v = &op;
    u->res = 0;
    if (u->io->ops->submit(u->io->state, &v, 1) == 1 &&
        u->io->ops->reap(u->io->state, &v, 1, -1) == 1)
        u->res = op.res;
    u->io->ops->reap(u->io->state, &v, 1, 1); /* goes to sleep once more before the thread ends */
    return NULL;
}

/* A store opens its engine in the caller's thread and uses it in another, that ends first. */
static void one_thread_after_another(void **state)
{
    struct user u = {.io = *state};
    use_engine(&u);
    assert_int_equal(u.res, -EBADF);
    for (int i = 0; i < 3; i++) {
        struct ucm_io *back;
        pthread_t thread;
        assert_int_equal(ucmi_thread_start(&thread, "user", use_engine, &u), 0);
        pthread_join(thread, NULL);
        assert_int_equal(u.res, -EBADF);
        u.io->ops->wake(u.io->state);
        assert_int_equal(u.io->ops->reap(u.io->state, &back, 1, -1), 0);
    }
    use_engine(&u);
    assert_int_equal(u.res, -EBADF);
}

static const struct CMUnitTest suite[] = {
    cmocka_unit_test(pieces_of_odd_sizes_at_odd_places),
    cmocka_unit_test(direct_blocks_and_the_ragged_end),
    cmocka_unit_test(the_end_of_the_file_gives_what_there_is),
    cmocka_unit_test(more_than_one_system_call_can_move),
    cmocka_unit_test(an_operation_comes_back_as_it_was_sent),
    cmocka_unit_test(sync_syncs),
    cmocka_unit_test(errors_pass_and_spoil_nothing_else),
    cmocka_unit_test(half_a_write_is_an_error),
    cmocka_unit_test(depth_is_the_bound_and_nothing_is_lost),
    cmocka_unit_test(reap_gives_up_in_time),
    cmocka_unit_test(a_wake_before_a_reap_ends_it),
    cmocka_unit_test(no_wake_from_another_thread_is_lost),
    cmocka_unit_test(idle_costs_nothing),
    cmocka_unit_test(ten_thousand_in_any_order_each_once),
    cmocka_unit_test(one_thread_after_another),
};

/* An engine that does not work here is left out, with the reason. */
static bool works(const char *name)
{
    struct ucmi_io io;
    char why[256];
    int err = ucmi_io_open(&io, name, DEPTH, NULL, why, sizeof why);
    if (err)
        print_message("# skip: %s\n", why);
    else
        ucmi_io_close(&io);
    return err == 0;
}

int main(void)
{
    static struct CMUnitTest tests[ARRAY_LEN(engines) * ARRAY_LEN(suite)];
    static char names[ARRAY_LEN(tests)][80];
    size_t n = 0;
    for (size_t e = 0; e < ARRAY_LEN(engines); e++)
        for (size_t i = 0; i < ARRAY_LEN(suite) && (i > 0 || works(engines[e])); i++, n++) {
            snprintf(names[n], sizeof names[n], "%s: %s", engines[e], suite[i].name);
            tests[n] = (struct CMUnitTest){names[n], suite[i].test_func, open_engine, close_engine,
                                           (void *)engines[e]};
        }
    return _cmocka_run_group_tests("engines", tests, n, NULL, NULL);
}

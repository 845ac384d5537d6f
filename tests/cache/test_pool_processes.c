/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pool between processes: races of threads and processes for the same few slots, and what
 * killed processes leave behind.
 */
#include "harness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef __SANITIZE_THREAD__
enum { SLOWER = 10 };
#else
enum { SLOWER = 1 };
#endif

/* ---- races ---- */

/* All but a few slots of a set are pinned, so that every claim is an eviction of those few, found
 * by a look at the whole set; and so few keys that all meet there. */
enum {
    RACE_KEYS = 6,
    RACE_SLOTS = 32,
    PINNED_SLOTS = 29,
    RACE_ROUNDS = 200000 / SLOWER,
    RACE_THREADS = 2
};

/* A slot's first word is its key, the second whoever writes: two writers in a slot, or one that
 * writes while a reader has it pinned, show. */
static void fill(struct ucmi_pool *p, uint32_t slot, uint64_t key, uint64_t who)
{
    _Atomic uint64_t *w = (void *)ucmi_pool_memory(p, slot);
    atomic_store(&w[0], UINT64_MAX);
    atomic_store(&w[1], who);
    for (int i = 0; i < 20; i++)
        if (atomic_load(&w[1]) != who || atomic_load(&w[0]) != UINT64_MAX)
            abort(); /* another writer */
    atomic_store(&w[0], key);
}

/* The bytes of a pinned slot stay, and so does its generation: whoever claims a slot raises it. */
static void read_pinned(struct ucmi_pool *p, uint32_t slot, uint64_t key)
{
    _Atomic uint64_t *w = (void *)ucmi_pool_memory(p, slot), *word = &p->metas[slot].word;
    uint64_t generation = atomic_load(word) >> 16;
    for (int i = 0; i < 30; i++)
        if (atomic_load(&w[0]) != key || atomic_load(word) >> 16 != generation)
            abort();
}

static bool is_key(const struct ucmi_pool_meta *m, uint64_t i)
{
    ucm_key key = key_of(i);
    uint64_t w[2];
    memcpy(w, key.b, sizeof w);
    return atomic_load(&m->key[0]) == w[0] && atomic_load(&m->key[1]) == w[1];
}

/* While a block is READY and pinned in one slot, it is READY in no other. */
static void check_only(struct ucmi_pool *p, uint32_t slot, uint64_t key)
{
    for (uint32_t i = 0; i < p->layout.nslots; i++) {
        struct ucmi_pool_meta *m = &p->metas[i];
        uint64_t word = atomic_load(&m->word);
        if (i != slot && (word & 0xff) == UCMI_SLOT_READY && is_key(m, key) &&
            atomic_load(&m->word) == word)
            abort();
    }
}

static void *racer(void *arg)
{
    struct ucmi_pool *p = arg;
    uint64_t random = (uint64_t)(uintptr_t)&random ^ (uint64_t)getpid() << 32;
    uint64_t who = random | 1;
    for (int n = 0; n < RACE_ROUNDS; n++) {
        random = random * UINT64_C(6364136223846793005) + 1442695040888963407;
        uint64_t key = (random >> 33) % RACE_KEYS;
        uint32_t slot;
        enum ucmi_pool_got got = pool_get(p, key, &slot);
        if (got == UCMI_POOL_READY) {
            read_pinned(p, slot, key);
            check_only(p, slot, key);
            ucmi_pool_unpin(p, slot);
        } else if (got == UCMI_POOL_CLAIMED) {
            fill(p, slot, key, who);
            if ((random >> 20) % 4) {
                ucmi_pool_publish(p, slot);
                read_pinned(p, slot, key);
                ucmi_pool_unpin(p, slot);
            } else {
                ucmi_pool_drop(p, slot);
            }
        }
    }
    return NULL;
}

static void pin_most(struct ucmi_pool *p, uint32_t slots[PINNED_SLOTS])
{
    for (uint64_t i = 0; i < PINNED_SLOTS; i++) {
        assert_int_equal(pool_get(p, 1000 + i, &slots[i]), UCMI_POOL_CLAIMED);
        ucmi_pool_publish(p, slots[i]);
    }
}

static void unpin_most(struct ucmi_pool *p, const uint32_t slots[PINNED_SLOTS])
{
    for (uint64_t i = 0; i < PINNED_SLOTS; i++) {
        assert_true(pool_found(p, 1000 + i));
        ucmi_pool_unpin(p, slots[i]);
    }
}

static void race(struct ucmi_pool *p)
{
    pthread_t t[RACE_THREADS];
    for (int i = 0; i < RACE_THREADS; i++)
        if (ucmi_thread_start(&t[i], "racer", racer, p) < 0)
            abort();
    for (int i = 0; i < RACE_THREADS; i++)
        pthread_join(t[i], NULL);
}

/* Nothing is held or half done; no block is there twice. */
static void check_quiet(struct ucmi_pool *p)
{
    uint64_t seen = 0;
    int64_t ready = 0;
    for (uint32_t i = 0; i < p->layout.nslots; i++) {
        struct ucmi_pool_meta *m = &p->metas[i];
        enum ucmi_slot_state state = pool_state(p, i);
        assert_true(state == UCMI_SLOT_FREE || state == UCMI_SLOT_READY);
        assert_int_equal(atomic_load(&m->holders), 0);
        if (state == UCMI_SLOT_FREE)
            continue;
        ready++;
        for (uint64_t k = 0; k < RACE_KEYS; k++) {
            if (!is_key(m, k))
                continue;
            assert_false(seen >> k & 1);
            seen |= UINT64_C(1) << k;
        }
    }
    assert_int_equal(atomic_load(&p->head->ready), ready);
}

static void threads_race_in_one_pool(void **state)
{
    struct ucmi_pool *p = pool_in(NULL, 1, RACE_SLOTS);
    uint32_t slots[PINNED_SLOTS];
    pin_most(p, slots);
    race(p);
    unpin_most(p, slots);
    check_quiet(p);
    ucmi_pool_close(p);
}

/* The two sides of a pin by themselves, as close together as they get: one thread evicts and fills
 * a slot as fast as it can, the other pins that slot as ucmi_pool_get does, bit first, then the
 * word. */
struct crossing {
    struct ucmi_pool *p;
    uint32_t slot;
    _Atomic bool stop;
    _Atomic unsigned pinned;
};

static void *pinner(void *arg)
{
    struct crossing *x = arg;
    struct ucmi_pool_meta *m = &x->p->metas[x->slot];
    const uint64_t bit = UINT64_C(1) << 63;
    while (!atomic_load(&x->stop)) {
        atomic_fetch_or(&m->holders, bit);
        uint64_t word = atomic_load(&m->word);
        if ((word & 0xff) == UCMI_SLOT_READY) {
            x->pinned++;
            for (int i = 0; i < 50; i++)
                if (atomic_load(&m->word) >> 16 != word >> 16)
                    abort(); /* claimed while it was pinned */
        }
        atomic_fetch_and(&m->holders, ~bit);
    }
    return NULL;
}

static void pinning_and_evicting_cross(void **state)
{
    struct ucmi_pool *p = pool_in(NULL, 1, UCMI_POOL_WAYS);
    struct crossing x = {.p = p};
    pthread_t thread;
    uint32_t slot;
    uint64_t claimed = 0;
    for (uint64_t i = 1; i < UCMI_POOL_WAYS; i++) {
        assert_int_equal(pool_get(p, 1000 + i, &slot), UCMI_POOL_CLAIMED);
        ucmi_pool_publish(p, slot); /* and it stays pinned: one slot is left */
    }
    pool_put(p, 0);
    assert_int_equal(pool_get(p, 0, &x.slot), UCMI_POOL_READY);
    ucmi_pool_unpin(p, x.slot);
    assert_int_equal(ucmi_thread_start(&thread, "pinner", pinner, &x), 0);
    for (uint64_t i = 1; i < 300000 / SLOWER || !claimed || !atomic_load(&x.pinned); i++) {
        if (pool_get(p, i, &slot) != UCMI_POOL_CLAIMED)
            continue; /* it was pinned */
        assert_int_equal(slot, x.slot);
        ucmi_pool_publish(p, slot);
        ucmi_pool_unpin(p, slot);
        claimed++;
    }
    atomic_store(&x.stop, true);
    pthread_join(thread, NULL);
    ucmi_pool_close(p);
}

static void processes_race_in_one_pool(void **state)
{
    enum { N = 2 };
    pid_t pid[N];
    int go[2], status;
    char byte = 0;
    assert_int_equal(pipe(go), 0);
    for (int i = 0; i < N; i++) {
        pid[i] = fork();
        if (pid[i] == 0) {
            close(go[1]);
            if (read(go[0], &byte, 1) < 0)
                abort();
            struct ucmi_pool *p = pool_in(*state, 1, RACE_SLOTS);
            race(p);
            ucmi_pool_close(p);
            _exit(0);
        }
    }
    struct ucmi_pool *p = pool_in(*state, 1, RACE_SLOTS);
    uint32_t slots[PINNED_SLOTS];
    pin_most(p, slots);
    close(go[0]);
    close(go[1]); /* go */
    for (int i = 0; i < N; i++) {
        assert_int_equal(waitpid(pid[i], &status, 0), pid[i]);
        assert_int_equal(status, 0);
    }
    unpin_most(p, slots);
    check_quiet(p);
    ucmi_pool_close(p);
    assert_int_equal(count_files(*state), 0);
}

/* While one lives in a pool, its file keeps its name: others find it. */
static void check_name(const struct ucmi_pool *p)
{
    struct stat a, b;
    if (fstat(p->fd, &a) || stat(p->path, &b) || a.st_ino != b.st_ino)
        abort();
}

/* Processes that come and go: each finds a pool that works, and none is left at the end. */
static void opening_and_closing_race(void **state)
{
    enum { N = 4, ROUNDS = 500 / SLOWER };
    pid_t pid[N];
    int status;
    for (int i = 0; i < N; i++) {
        pid[i] = fork();
        if (pid[i] == 0) {
            for (uint64_t k = 0; k < ROUNDS; k++) {
                struct ucmi_pool *p = pool_in(*state, 1, 40);
                uint32_t slot;
                check_name(p);
                uint64_t key = (uint64_t)i * ROUNDS + k, bytes;
                if (pool_get(p, key, &slot) != UCMI_POOL_CLAIMED)
                    abort();
                memcpy(ucmi_pool_memory(p, slot), &key, sizeof key);
                ucmi_pool_publish(p, slot);
                memcpy(&bytes, ucmi_pool_memory(p, slot), sizeof bytes);
                if (bytes != key || !pool_found(p, key))
                    abort();
                ucmi_pool_unpin(p, slot);
                check_name(p);
                ucmi_pool_close(p);
            }
            _exit(0);
        }
    }
    for (int i = 0; i < N; i++) {
        assert_int_equal(waitpid(pid[i], &status, 0), pid[i]);
        assert_int_equal(status, 0);
    }
    assert_int_equal(count_files(*state), 0);
}

/* ---- deaths ---- */

typedef void life_fn(struct ucmi_pool *p);

/* A process that opens the pool, lives that life, and is killed at its end. */
static void live_and_die(const char *dir, uint8_t ns, uint32_t nslots, life_fn *life)
{
    int ready[2], status;
    char byte = 1;
    assert_int_equal(pipe(ready), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct ucmi_pool *p = pool_in(dir, ns, nslots);
        life(p);
        if (write(ready[1], &byte, 1) != 1)
            abort();
        for (;;)
            pause();
    }
    close(ready[1]);
    assert_int_equal(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status));
}

enum { PINNED = 1, FILLED = 2, DROPPED = 3, OURS = 4, CLAIMED = 5, EVICTED = 6, WHOLE = 7 };

static void die_in_the_middle(struct ucmi_pool *p)
{
    uint32_t slot;
    if (pool_get(p, PINNED, &slot) != UCMI_POOL_READY ||
        pool_get(p, FILLED, &slot) != UCMI_POOL_CLAIMED)
        abort();
    memset(ucmi_pool_memory(p, slot), 0xff, 4096); /* and more may be on its way */
    pool_put(p, WHOLE);
    if (pool_get(p, WHOLE, &slot) != UCMI_POOL_READY)
        abort();
    /* Killed between two instructions of a claim, and of an eviction. */
    if (pool_get(p, CLAIMED, &slot) != UCMI_POOL_CLAIMED)
        abort();
    atomic_fetch_xor(&p->metas[slot].word, UCMI_SLOT_FILLING ^ UCMI_SLOT_CLAIMED);
    if (pool_get(p, EVICTED, &slot) != UCMI_POOL_READY)
        abort();
    uint64_t word = atomic_load(&p->metas[slot].word);
    atomic_store(&p->metas[slot].word,
                 (word & ~UINT64_C(0xffff)) | (uint64_t)p->me << 8 | UCMI_SLOT_EVICTING);
    ucmi_pool_unpin(p, slot);
}

static uint64_t all_holders(struct ucmi_pool *p)
{
    uint64_t holders = 0;
    for (uint32_t i = 0; i < p->layout.nslots; i++)
        holders |= atomic_load(&p->metas[i].holders);
    return holders;
}

static int takes(void *d, void *p, size_t len)
{
    return 0;
}
static void gives(void *d, void *p, size_t len)
{
}
static const struct ucm_dev_ops registers = {.pin = takes, .unpin = gives};

static void survivors_take_back_what_was_held(void **state)
{
    struct ucmi_pool_spec spec = pool_spec(*state, 1, 16);
    spec.dev = &registers; /* it knows the pages, so that only time tells when they are quiet */
    spec.quarantine_ms = 1000000000;
    struct ucmi_pool *p = pool_open(&spec);
    uint32_t ours, slot;
    pool_put(p, PINNED);
    pool_put(p, EVICTED);
    assert_int_equal(pool_get(p, OURS, &ours), UCMI_POOL_CLAIMED); /* must not be touched */
    int64_t before = atomic_load(&pool_counters.v[UCMI_CACHE_RECLAIMED]);
    live_and_die(*state, 1, 16, die_in_the_middle);

    /* Before anyone has looked: nothing of it is served, nothing blocks. */
    assert_false(pool_found(p, FILLED));
    assert_true(pool_found(p, WHOLE));
    assert_int_equal(pool_get(p, FILLED, &slot), UCMI_POOL_BUSY);
    assert_int_equal(ucmi_pool_sweep(p), 5);
    assert_int_equal(atomic_load(&pool_counters.v[UCMI_CACHE_RECLAIMED]) - before, 5);
    assert_int_equal(all_holders(p), 0);
    assert_int_equal(pool_count(p, UCMI_SLOT_QUARANTINE), 1); /* its last I/O may be on its way */
    assert_int_equal(pool_count(p, UCMI_SLOT_CLAIMED), 0);
    assert_int_equal(pool_count(p, UCMI_SLOT_EVICTING), 0);
    assert_int_equal(pool_count(p, UCMI_SLOT_READY), 3);
    assert_true(pool_found(p, EVICTED));
    assert_true(pool_right(p, PINNED));
    assert_true(pool_right(p, WHOLE));
    assert_int_equal(pool_state(p, ours), UCMI_SLOT_FILLING);

    /* The block can be filled again at once, in another slot; the old one comes back in time. */
    pool_put(p, FILLED);
    for (uint64_t i = 100; i < 200; i++)
        pool_put(p, i); /* none of which goes into the slot in quarantine */
    assert_int_equal(pool_count(p, UCMI_SLOT_QUARANTINE), 1);
    assert_int_equal(ucmi_pool_sweep(p), 0);
    p->quarantine_ns = 0;
    assert_int_equal(ucmi_pool_sweep(p), 1);
    assert_int_equal(pool_count(p, UCMI_SLOT_QUARANTINE), 0);
    assert_int_equal(pool_count(p, UCMI_SLOT_FREE), 1);
    assert_int_equal(atomic_load(&p->head->quarantined), 0);
    ucmi_pool_drop(p, ours);
    ucmi_pool_close(p);
    assert_int_equal(count_files(*state), 0);
}

static void stop_growing(struct ucmi_pool *p)
{
    atomic_store(&p->stop, true);
    pthread_join(p->grow, NULL);
}

/* The process that allocates a pool's memory is killed: one that lives does the rest. */
static void memory_is_allocated_by_whoever_lives(void **state)
{
    enum { SLOTS = 65536 };
    live_and_die(*state, 1, SLOTS, stop_growing);
    struct ucmi_pool *joined = pool_in(*state, 1, SLOTS);
    while (ucmi_pool_grown(joined) < SLOTS)
        usleep(1000);
    ucmi_pool_close(joined);
}

/* The same when the others were there before, and none joins. */
static void a_sweep_goes_on_with_the_allocation(void **state)
{
    enum { SLOTS = 65536 };
    int go[2];
    char byte = 1;
    assert_int_equal(pipe(go), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct ucmi_pool *p = pool_in(*state, 1, SLOTS);
        stop_growing(p);
        if (write(go[1], &byte, 1) != 1)
            abort();
        for (;;)
            pause();
    }
    assert_int_equal(read(go[0], &byte, 1), 1);
    struct ucmi_pool *p = pool_in(*state, 1, SLOTS);
    uint32_t grown = ucmi_pool_grown(p);
    ucmi_pool_sweep(p);
    assert_false(p->growing); /* the other lives */
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    ucmi_pool_sweep(p);
    assert_int_equal(p->growing, grown < SLOTS);
    while (ucmi_pool_grown(p) < SLOTS)
        usleep(1000);
    ucmi_pool_close(p);
    close(go[0]);
    close(go[1]);
}

/* Who takes over a dead process's index does not inherit its pins. */
static void an_index_is_cleaned_before_it_is_used_again(void **state)
{
    struct ucmi_pool *p = pool_in(*state, 1, 16);
    pool_put(p, PINNED);
    pool_put(p, EVICTED);
    live_and_die(*state, 1, 16, die_in_the_middle);
    assert_int_not_equal(all_holders(p), 0);
    struct ucmi_pool *q = pool_in(*state, 1, 16);
    assert_int_equal(q->me, 1);
    assert_int_equal(all_holders(p), 0);
    assert_int_equal(pool_count(p, UCMI_SLOT_FILLING), 0);
    ucmi_pool_close(q);
    ucmi_pool_close(p);
}

/* Pins of the dead must not fill the pool for ever: who finds no slot sweeps, and has one. */
static void pin_all(struct ucmi_pool *p)
{
    uint32_t slot;
    for (uint64_t i = 0; i < 8; i++)
        if (pool_get(p, i, &slot) != UCMI_POOL_READY)
            abort();
}

static void pins_of_the_dead_do_not_last(void **state)
{
    struct ucmi_pool *p = pool_in(*state, 1, 8);
    uint32_t slot;
    for (uint64_t i = 0; i < 8; i++)
        pool_put(p, i);
    live_and_die(*state, 1, 8, pin_all);
    assert_int_equal(pool_get(p, 100, &slot), UCMI_POOL_FULL);
    assert_int_equal(ucmi_pool_sweep(p), 8);
    assert_int_equal(pool_get(p, 100, &slot), UCMI_POOL_CLAIMED);
    ucmi_pool_drop(p, slot);
    ucmi_pool_close(p);
}

static void leave_one(struct ucmi_pool *p)
{
    pool_put(p, WHOLE);
}

static void a_killed_pool_is_found_again(void **state)
{
    live_and_die(*state, 1, 16, leave_one);
    assert_int_equal(count_files(*state), 1);
    struct ucmi_pool *p = pool_in(*state, 1, 99); /* keeps its size */
    assert_int_equal(p->layout.nslots, 16);
    assert_int_equal(p->me, 0);
    assert_true(pool_found(p, WHOLE));
    assert_true(pool_right(p, WHOLE));
    ucmi_pool_close(p);
    assert_int_equal(count_files(*state), 0);
}

/* What the dead were to write down is adopted by one of the others, again and again until it is
 * STORED; what was STORED is not. */
enum { UNSTORED = 20, STORED = 21 };

static void leave_unstored(struct ucmi_pool *p)
{
    uint32_t slot;
    for (uint64_t i = UNSTORED; i <= STORED; i++) {
        if (pool_get(p, i, &slot) != UCMI_POOL_CLAIMED)
            abort();
        ucmi_pool_unstored(p, slot);
        ucmi_pool_publish(p, slot);
        if (i == STORED)
            ucmi_pool_stored(p, slot);
        ucmi_pool_unpin(p, slot);
    }
}

static unsigned adopt_all(struct ucmi_pool *p, uint32_t rank, uint32_t *slot_p)
{
    struct ucmi_pool_want what;
    unsigned n = 0;
    for (uint32_t slot = 0; slot < p->layout.nslots; slot++)
        if (ucmi_pool_adopt(p, slot, rank, &what)) {
            ucm_key key = key_of(UNSTORED);
            assert_true(ucmi_key_eq(&what.key, &key));
            *slot_p = slot;
            n++;
        }
    return n;
}

static void adopt_and_die(struct ucmi_pool *p)
{
    uint32_t slot;
    ucmi_pool_sweep(p);
    if (adopt_all(p, 0, &slot) != 1)
        abort();
}

static void what_was_not_stored_is_adopted_by_one(void **state)
{
    struct ucmi_pool *a = pool_in(*state, 1, 16), *b;
    uint32_t slot;
    live_and_die(*state, 1, 16, leave_unstored);
    assert_int_equal(adopt_all(a, 0, &slot), 0); /* not yet known to be dead */
    b = pool_in(*state, 1, 16);
    assert_int_equal(adopt_all(b, 1, &slot), 0); /* another rank's */
    assert_int_equal(adopt_all(b, 0, &slot), 1);
    assert_int_equal(adopt_all(a, 0, &slot), 0);
    ucmi_pool_unpin(b, slot);
    ucmi_pool_close(b); /* it could not: the mark outlives it */
    live_and_die(*state, 1, 16, adopt_and_die);
    ucmi_pool_sweep(a);
    assert_true(atomic_load(&a->orphans));
    assert_int_equal(adopt_all(a, 0, &slot), 1);
    ucmi_pool_stored(a, slot);
    ucmi_pool_unpin(a, slot);
    b = pool_in(*state, 1, 16);
    ucmi_pool_close(a);
    assert_int_equal(adopt_all(b, 0, &slot), 0);
    for (uint64_t i = 100; i < 200; i++)
        pool_put(b, i); /* a mark does not keep a block, nor is it the next block's */
    assert_false(pool_found(b, UNSTORED));
    ucmi_pool_close(b);
}

static void another_namespace_removes_the_dead_and_spares_the_living(void **state)
{
    struct ucmi_pool *living = pool_in(*state, 1, 16);
    pool_put(living, 1);
    live_and_die(*state, 2, 16, leave_one);
    assert_int_equal(count_files(*state), 2);
    struct ucmi_pool *p = pool_in(*state, 3, 16);
    assert_int_equal(count_files(*state), 2); /* 1 and 3 */
    assert_int_equal(access(living->path, F_OK), 0);
    assert_true(pool_found(living, 1));
    ucmi_pool_close(p);
    ucmi_pool_close(living);
}

/* A maker killed before it was done: whoever comes next makes the pool. */
static void die_making(struct ucmi_pool *p)
{
    atomic_store(&p->head->magic, 0);
}

static void an_unfinished_file_is_made_anew(void **state)
{
    live_and_die(*state, 1, 16, die_making);
    struct ucmi_pool *p = pool_in(*state, 1, 20);
    assert_int_equal(p->layout.nslots, 20);
    pool_put(p, 1);
    ucmi_pool_close(p);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)
    const struct CMUnitTest tests[] = {
        TEST(threads_race_in_one_pool),
        TEST(pinning_and_evicting_cross),
        TEST(processes_race_in_one_pool),
        TEST(opening_and_closing_race),
        TEST(survivors_take_back_what_was_held),
        TEST(memory_is_allocated_by_whoever_lives),
        TEST(a_sweep_goes_on_with_the_allocation),
        TEST(an_index_is_cleaned_before_it_is_used_again),
        TEST(pins_of_the_dead_do_not_last),
        TEST(a_killed_pool_is_found_again),
        TEST(what_was_not_stored_is_adopted_by_one),
        TEST(another_namespace_removes_the_dead_and_spares_the_living),
        TEST(an_unfinished_file_is_made_anew),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

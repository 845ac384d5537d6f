/* SPDX-License-Identifier: Apache-2.0 */
/*
 * harness.h - what the tests of the Cache tier share: a directory in memory for each test, the tier
 * opened by itself over a tier that does what the test tells it, and blocks whose bytes follow from
 * key and place, so that a wrong byte shows.
 */
#ifndef UCMT_CACHE_HARNESS_H
#define UCMT_CACHE_HARNESS_H

#include <stdbool.h>

#include "store/pool.h"
#include "store/store.h"

#include "../test.h"

enum { PATIENCE_MS = 30000 }; /* a test that waits longer has failed */

/* cmocka fixtures: *state becomes the path of an empty directory in memory. */
int make_dir(void **state);
int remove_dir(void **state);
unsigned count_files(const char *dir);

ucm_key key_of(uint64_t i);
/* The bytes of shard `shard` of key i. */
void paint(void *p, size_t len, const ucm_key *key, unsigned shard);
bool painted(const void *p, size_t len, const ucm_key *key, unsigned shard);

/* ---- a pool by itself ---- */

extern struct ucm_counters pool_counters;
/* Blocks of 4 KiB in one shard, no quarantine. */
struct ucmi_pool_spec pool_spec(const char *dir, uint8_t ns, uint32_t nslots);
/* Opens it, or fails the test, or ends the process where no test runs in it. */
struct ucmi_pool *pool_open(const struct ucmi_pool_spec *spec);
/* The same, of pool_spec, and shared if there is a directory. */
struct ucmi_pool *pool_in(const char *dir, uint8_t ns, uint32_t nslots);
enum ucmi_pool_got pool_get(struct ucmi_pool *p, uint64_t i, uint32_t *slot);
bool pool_found(struct ucmi_pool *p, uint64_t i);
/* Fills a slot with its key's number, or sees whether it is. */
void pool_paint(struct ucmi_pool *p, uint32_t slot, uint64_t i);
bool pool_painted(const struct ucmi_pool *p, uint32_t slot, uint64_t i);
/* Dumps key i, which was not there; loads it, which was, and looks at it. */
void pool_put(struct ucmi_pool *p, uint64_t i);
bool pool_right(struct ucmi_pool *p, uint64_t i);
/* How many slots are in that state. */
unsigned pool_count(const struct ucmi_pool *p, enum ucmi_slot_state state);
enum ucmi_slot_state pool_state(const struct ucmi_pool *p, uint32_t slot);

/* ---- the tier below: a dictionary that can be slow, full and wrong ---- */

struct held { /* a slice that the tier below has taken and not ended */
    struct ucm_xfer *x;
    struct ucm_slice *s;
};
struct below {
    struct ucm_tier tier;
    size_t shard_size;
    unsigned nshards;
    pthread_mutex_t lock;
    pthread_cond_t change;
    bool hold;     /* slices wait for below_release; else they end within submit ... */
    bool shuffle;  /* ... or later, on a thread, in an order of its own */
    bool deaf;     /* lookups do not answer */
    bool asked;    /* one has come that was not answered */
    int refuse;    /* that many submits are refused with -EAGAIN */
    int fail_with; /* all slices end so */
    unsigned submits, reads, writes, refused;
    struct held *held;
    size_t nheld, cap_held;
    struct stored {
        ucm_key key;
        char *bytes;
    } * stored;
    size_t nstored, cap_stored;
    pthread_t thread;
    bool started, stop;
};
/* Ends held slice i (in order of arrival) or all there are; err 0: as the dictionary says. */
void below_release(struct below *b, size_t i, int err);
void below_release_all(struct below *b, int err);
void below_wait_held(struct below *b, size_t n);   /* until at least n are held */
void below_wait_stored(struct below *b, size_t n); /* until it has at least n blocks */
void below_hear(struct below *b);                  /* lookups answer again */
void below_put(struct below *b, const ucm_key *key);
bool below_has(struct below *b, const ucm_key *key); /* with the right bytes */
size_t below_count(struct below *b);

/* ---- a Cache tier over it ---- */

struct stack {
    struct ucm_geometry geo;
    struct ucm_counters counters;
    struct ucm_tier cache;
    struct below below;
    ucm_conf *conf;
};
struct shape {
    unsigned nshards;
    size_t shard_size;
    unsigned nslots;
    unsigned timeout_ms;
    const char *device; /* NULL: host */
    bool hold;          /* below.hold from the first moment */
};
/* options: "name=value name=value" or NULL. */
void stack_open(struct stack *s, const char *dir, const struct shape *shape, const char *options);
void stack_close_cache(struct stack *s); /* the tier alone */
void stack_close(struct stack *s);
int64_t counter(const struct stack *s, enum ucmi_counter id);
/* How many of the keys first .. first + n - 1 the pool has. */
size_t count_ready(struct stack *s, uint64_t first, size_t n);

/* ---- xfers ---- */

struct move {
    struct ucm_xfer x;
    struct stack *stack;
    pthread_mutex_t lock;
    pthread_cond_t change;
    uint32_t left[2];
    int *err[2]; /* per slice and stage; 1: not there yet */
    bool wrong;  /* a stage came twice or in the wrong order */
    struct iovec *iov;
    char *memory;
};
/* n slices: shards [shard, shard + nshards) of keys first ..., group-major in groups of `group` (0:
 * one slice for each key).  A dump's memory is painted, a load's smeared. */
void move_new(struct move *m, struct stack *s, bool dump, uint64_t first, size_t n, unsigned shard,
              unsigned nshards, unsigned group);
int move_submit(struct move *m);
/* Waits until all slices have reached the stage; the first error among them, or 0. */
int move_wait(struct move *m, enum ucm_stage stage);
bool move_reached(struct move *m, enum ucm_stage stage);
/* Whether slice i has the right bytes. */
bool move_right(const struct move *m, size_t i);
void move_free(struct move *m);
/* All of it: submits, waits for the last stage, checks the bytes of a load; the first error. */
int run_move(struct stack *s, bool dump, uint64_t first, size_t n);
int run_shards(struct stack *s, bool dump, uint64_t first, size_t n, unsigned shard,
               unsigned nshards);

#endif

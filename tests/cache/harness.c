/* SPDX-License-Identifier: Apache-2.0 */
#include "harness.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "dev/dev.h"

extern const struct ucm_tier_ops ucmi_tier_cache;

static uint64_t patience(void)
{
    return ucmi_now_ns() + PATIENCE_MS * UINT64_C(1000000);
}

/* ---- directories ---- */

int make_dir(void **state)
{
    char *path;
    if (asprintf(&path, "%s/ucmt-cache-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm") < 0)
        return -1;
    *state = path;
    return mkdtemp(path) ? 0 : -1;
}

static unsigned each_file(const char *dir, bool remove_it)
{
    unsigned n = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (e->d_name[0] == '.')
            continue;
        n++;
        if (remove_it)
            unlinkat(dirfd(d), e->d_name, 0);
    }
    if (d)
        closedir(d);
    return n;
}

unsigned count_files(const char *dir)
{
    return each_file(dir, false);
}

int remove_dir(void **state)
{
    each_file(*state, true);
    int err = rmdir(*state);
    free(*state);
    return err;
}

/* ---- blocks ---- */

ucm_key key_of(uint64_t i)
{
    ucm_key key;
    uint64_t w[2] = {ucmi_hash64(&i, sizeof i, 1), ucmi_hash64(&i, sizeof i, 2)};
    memcpy(key.b, w, sizeof key.b);
    return key;
}

static uint64_t word_of(const ucm_key *key, unsigned shard, size_t i)
{
    uint64_t w;
    memcpy(&w, key->b, sizeof w);
    return (w + shard * UINT64_C(0x9e3779b97f4a7c15)) ^ i * UINT64_C(0xff51afd7ed558ccd);
}

void paint(void *p, size_t len, const ucm_key *key, unsigned shard)
{
    uint64_t *w = p;
    for (size_t i = 0; i < len / sizeof *w; i++)
        w[i] = word_of(key, shard, i);
}

bool painted(const void *p, size_t len, const ucm_key *key, unsigned shard)
{
    const uint64_t *w = p;
    for (size_t i = 0; i < len / sizeof *w; i++)
        if (w[i] != word_of(key, shard, i))
            return false;
    return true;
}

/* ---- a pool by itself ---- */

struct ucm_counters pool_counters;

struct ucmi_pool_spec pool_spec(const char *dir, uint8_t ns, uint32_t nslots)
{
    return (struct ucmi_pool_spec){
        .dir = dir,
        .bytes = ucmi_pool_bytes(nslots, UCMI_PAGE),
        .ns = {ns},
        .block_size = UCMI_PAGE,
        .shard_size = UCMI_PAGE,
        .counters = &pool_counters,
    };
}

struct ucmi_pool *pool_open(const struct ucmi_pool_spec *spec)
{
    char why[512] = "";
    struct ucmi_pool *p = NULL;
    if (ucmi_pool_open(spec, &p, why, sizeof why) < 0) {
        fprintf(stderr, "no pool: %s\n", why);
        abort();
    }
    return p;
}

struct ucmi_pool *pool_in(const char *dir, uint8_t ns, uint32_t nslots)
{
    struct ucmi_pool_spec spec = pool_spec(dir, ns, nslots);
    struct ucmi_pool *p = pool_open(&spec);
    if (dir && p->fd < 0)
        abort();
    return p;
}

enum ucmi_pool_got pool_get(struct ucmi_pool *p, uint64_t i, uint32_t *slot)
{
    struct ucmi_pool_want want = {.key = key_of(i)};
    return ucmi_pool_get(p, &want, UCMI_POOL_EVICT, slot);
}

bool pool_found(struct ucmi_pool *p, uint64_t i)
{
    ucm_key key = key_of(i);
    uint8_t level = 0;
    return !ucmi_pool_lookup(p, &key, 1, 0, 1, &level, true);
}

void pool_paint(struct ucmi_pool *p, uint32_t slot, uint64_t i)
{
    uint64_t *bytes = (uint64_t *)ucmi_pool_memory(p, slot);
    for (size_t k = 0; k < p->layout.block_size / sizeof *bytes; k++)
        bytes[k] = i;
}

bool pool_painted(const struct ucmi_pool *p, uint32_t slot, uint64_t i)
{
    const uint64_t *bytes = (const uint64_t *)ucmi_pool_memory(p, slot);
    for (size_t k = 0; k < p->layout.block_size / sizeof *bytes; k++)
        if (bytes[k] != i)
            return false;
    return true;
}

void pool_put(struct ucmi_pool *p, uint64_t i)
{
    uint32_t slot;
    if (pool_get(p, i, &slot) != UCMI_POOL_CLAIMED)
        abort();
    pool_paint(p, slot, i);
    ucmi_pool_publish(p, slot);
    ucmi_pool_unpin(p, slot);
}

bool pool_right(struct ucmi_pool *p, uint64_t i)
{
    uint32_t slot;
    if (pool_get(p, i, &slot) != UCMI_POOL_READY)
        abort();
    bool right = pool_painted(p, slot, i);
    ucmi_pool_unpin(p, slot);
    return right;
}

enum ucmi_slot_state pool_state(const struct ucmi_pool *p, uint32_t slot)
{
    return (enum ucmi_slot_state)(atomic_load(&p->metas[slot].word) & 0xff);
}

unsigned pool_count(const struct ucmi_pool *p, enum ucmi_slot_state state)
{
    unsigned n = 0;
    for (uint32_t i = 0; i < p->layout.nslots; i++)
        n += pool_state(p, i) == state;
    return n;
}

/* ---- the tier below ---- */

static struct stored *stored_find(struct below *b, const ucm_key *key)
{
    for (size_t i = 0; i < b->nstored; i++)
        if (ucmi_key_eq(&b->stored[i].key, key))
            return &b->stored[i];
    return NULL;
}

static struct stored *stored_add(struct below *b, const ucm_key *key)
{
    struct stored *at = stored_find(b, key);
    if (at)
        return at;
    if (b->nstored == b->cap_stored) {
        b->cap_stored = b->cap_stored ? 2 * b->cap_stored : 64;
        b->stored = realloc(b->stored, b->cap_stored * sizeof *b->stored);
    }
    at = &b->stored[b->nstored++];
    *at = (struct stored){.key = *key, .bytes = calloc(b->nshards, b->shard_size)};
    return at;
}

/* What a disk would do; the slice's memory is touched here and nowhere else. */
static int perform(struct below *b, const struct held *h)
{
    size_t at = h->s->shard * b->shard_size, len = h->s->nshards * b->shard_size;
    struct iovec iov;
    assert_int_equal(ucm_slice_pieces(h->x, h->s, &iov, 1), 1);
    assert_int_equal(iov.iov_len, len);
    pthread_mutex_lock(&b->lock);
    struct stored *st = h->x->dump ? stored_add(b, &h->s->key) : stored_find(b, &h->s->key);
    if (st && h->x->dump)
        memcpy(st->bytes + at, iov.iov_base, len);
    else if (st)
        memcpy(iov.iov_base, st->bytes + at, len);
    pthread_cond_broadcast(&b->change);
    pthread_mutex_unlock(&b->lock);
    return st ? 0 : -ENOENT;
}

static void finish(struct below *b, struct held h, int err)
{
    if (!err)
        err = perform(b, &h);
    else if (!h.x->dump) { /* a read that fails has spoilt the memory all the same */
        struct iovec iov;
        ucm_slice_pieces(h.x, h.s, &iov, 1);
        memset(iov.iov_base, 0xee, iov.iov_len);
    }
    struct ucm_xfer *x = h.x;
    bool dump = x->dump;
    x->done(x, h.s, UCM_RELEASED, dump ? 0 : err); /* of a dump that says nothing yet */
    if (dump)
        x->done(x, h.s, UCM_STORED, err);
}

static void hold(struct below *b, struct held h)
{
    if (b->nheld == b->cap_held) {
        b->cap_held = b->cap_held ? 2 * b->cap_held : 64;
        b->held = realloc(b->held, b->cap_held * sizeof *b->held);
    }
    b->held[b->nheld++] = h;
}

static bool unhold(struct below *b, size_t i, struct held *h)
{
    pthread_mutex_lock(&b->lock);
    bool there = i < b->nheld;
    if (there) {
        *h = b->held[i];
        memmove(&b->held[i], &b->held[i + 1], (--b->nheld - i) * sizeof *h);
    }
    pthread_mutex_unlock(&b->lock);
    return there;
}

void below_release(struct below *b, size_t i, int err)
{
    struct held h;
    assert_true(unhold(b, i, &h));
    finish(b, h, err);
}

void below_release_all(struct below *b, int err)
{
    struct held h;
    while (unhold(b, 0, &h))
        finish(b, h, err);
}

void below_wait_held(struct below *b, size_t n)
{
    uint64_t end = patience();
    pthread_mutex_lock(&b->lock);
    while (b->nheld < n && !ucmi_cond_wait(&b->change, &b->lock, end))
        ;
    bool there = b->nheld >= n;
    pthread_mutex_unlock(&b->lock);
    assert_true(there);
}

void below_wait_stored(struct below *b, size_t n)
{
    uint64_t end = patience();
    pthread_mutex_lock(&b->lock);
    while (b->nstored < n && !ucmi_cond_wait(&b->change, &b->lock, end))
        ;
    bool there = b->nstored >= n;
    pthread_mutex_unlock(&b->lock);
    assert_true(there);
}

/* Ends held slices from anywhere in the list. */
static void *shuffler(void *arg)
{
    struct below *b = arg;
    uint64_t random = 1;
    pthread_mutex_lock(&b->lock);
    for (;;) {
        while (!(b->nheld && b->shuffle) && !b->stop)
            ucmi_cond_wait(&b->change, &b->lock, UINT64_MAX);
        if (b->stop)
            break;
        random = random * UINT64_C(6364136223846793005) + 1442695040888963407;
        size_t i = (size_t)(random >> 33) % b->nheld;
        int err = b->fail_with;
        struct held h = b->held[i];
        b->held[i] = b->held[--b->nheld];
        pthread_mutex_unlock(&b->lock);
        finish(b, h, err);
        pthread_mutex_lock(&b->lock);
    }
    pthread_mutex_unlock(&b->lock);
    return NULL;
}

static int below_submit(struct ucm_tier *t, struct ucm_xfer *x)
{
    struct below *b = CONTAINER_OF(t, struct below, tier);
    uint32_t n = x->n;
    pthread_mutex_lock(&b->lock);
    b->submits++;
    if (b->refuse > 0) {
        b->refuse--;
        b->refused++;
        pthread_cond_broadcast(&b->change);
        pthread_mutex_unlock(&b->lock);
        return -EAGAIN;
    }
    if (x->dump)
        b->writes += n;
    else
        b->reads += n;
    bool keep = b->hold || b->shuffle;
    for (uint32_t i = 0; keep && i < n; i++)
        hold(b, (struct held){x, &x->v[i]});
    int err = b->fail_with;
    pthread_cond_broadcast(&b->change);
    pthread_mutex_unlock(&b->lock);
    for (uint32_t i = 0; !keep && i < n; i++)
        finish(b, (struct held){x, &x->v[i]}, err);
    return 0;
}

static void below_lookup(struct ucm_tier *t, const ucm_key *keys, size_t n, uint32_t rank,
                         uint8_t level, uint8_t *found, struct ucm_lookup *call)
{
    struct below *b = CONTAINER_OF(t, struct below, tier);
    pthread_mutex_lock(&b->lock);
    b->asked |= b->deaf && !call->up_to_date;
    pthread_cond_broadcast(&b->change);
    while (b->deaf && !call->up_to_date)
        ucmi_cond_wait(&b->change, &b->lock, UINT64_MAX);
    for (size_t i = 0; i < n; i++)
        if (!found[i] && stored_find(b, &keys[i]))
            found[i] = level;
    pthread_mutex_unlock(&b->lock);
}

static const struct ucm_tier_ops below_ops = {
    .p = {.kind = "tier", .name = "Below"},
    .lookup = below_lookup,
    .submit = below_submit,
};

void below_hear(struct below *b)
{
    pthread_mutex_lock(&b->lock);
    b->deaf = false;
    pthread_cond_broadcast(&b->change);
    pthread_mutex_unlock(&b->lock);
}

void below_put(struct below *b, const ucm_key *key)
{
    pthread_mutex_lock(&b->lock);
    struct stored *st = stored_add(b, key);
    for (unsigned i = 0; i < b->nshards; i++)
        paint(st->bytes + i * b->shard_size, b->shard_size, key, i);
    pthread_mutex_unlock(&b->lock);
}

bool below_has(struct below *b, const ucm_key *key)
{
    pthread_mutex_lock(&b->lock);
    struct stored *st = stored_find(b, key);
    bool right = st;
    for (unsigned i = 0; right && i < b->nshards; i++)
        right = painted(st->bytes + i * b->shard_size, b->shard_size, key, i);
    pthread_mutex_unlock(&b->lock);
    return right;
}

size_t below_count(struct below *b)
{
    pthread_mutex_lock(&b->lock);
    size_t n = b->nstored;
    pthread_mutex_unlock(&b->lock);
    return n;
}

/* ---- stacks ---- */

static void set_options(ucm_conf *conf, const char *options)
{
    char *given = strdup(options), *rest = given, *pair;
    while ((pair = strsep(&rest, " "))) {
        char *value = strchr(pair, '=');
        *value++ = '\0';
        if (ucm_conf_set(conf, pair, value) < 0)
            fail_msg("%s", ucm_conf_error(conf));
    }
    free(given);
}

void stack_open(struct stack *s, const char *dir, const struct shape *shape, const char *options)
{
    char capacity[64];
    memset(s, 0, sizeof *s);
    size_t block = shape->nshards * shape->shard_size;
    assert_int_equal(ucm_conf_new(&s->conf), 0);
    snprintf(capacity, sizeof capacity, "%.12f",
             (double)(ucmi_pool_bytes(shape->nslots, block) + 1024) / (1 << 30)); /* it is cut */
    assert_int_equal(ucm_conf_set(s->conf, "cache_buffer_capacity_gb", capacity), 0);
    assert_int_equal(ucm_conf_set(s->conf, "cache_dir", dir), 0);
    if (options)
        set_options(s->conf, options);
    const struct ucm_dev_ops *dev = ucmi_find_dev(shape->device ? shape->device : "host");
    s->geo = (struct ucm_geometry){
        .ns_text = "test",
        .block_size = block,
        .shard_size = shape->shard_size,
        .nshards = shape->nshards,
        .ranks = 1,
        .timeout_ms = shape->timeout_ms ? shape->timeout_ms : PATIENCE_MS,
        .lookup_timeout_ms = 1000,
        .dev = dev,
        .conf = s->conf,
    };
    assert_int_equal(ucmi_plugin_new(&dev->p, s->conf, &s->geo.dev_state), 0);
    assert_int_equal(dev->open(s->geo.dev_state, 0, NULL, 0), 0);

    struct below *b = &s->below;
    pthread_mutex_init(&b->lock, NULL);
    ucmi_cond_init(&b->change);
    b->shard_size = shape->shard_size;
    b->nshards = shape->nshards;
    b->hold = shape->hold;
    b->tier = (struct ucm_tier){.ops = &below_ops, .geo = &s->geo, .counters = &s->counters};
    assert_int_equal(ucmi_thread_start(&b->thread, "below", shuffler, b), 0);

    s->cache = (struct ucm_tier){
        .ops = &ucmi_tier_cache,
        .next = &b->tier,
        .geo = &s->geo,
        .counters = &s->counters,
    };
    assert_int_equal(ucmi_plugin_new(&ucmi_tier_cache.p, s->conf, &s->cache.priv), 0);
    if (ucmi_tier_cache.open(&s->cache) < 0)
        fail_msg("%s", s->cache.why);
}

void stack_close_cache(struct stack *s)
{
    ucmi_tier_cache.close(&s->cache);
    ucmi_plugin_free(&ucmi_tier_cache.p, s->cache.priv);
    s->cache.priv = NULL;
}

void stack_close(struct stack *s)
{
    struct below *b = &s->below;
    if (s->cache.priv)
        stack_close_cache(s);
    pthread_mutex_lock(&b->lock);
    b->stop = true;
    pthread_cond_broadcast(&b->change);
    pthread_mutex_unlock(&b->lock);
    pthread_join(b->thread, NULL);
    s->geo.dev->close(s->geo.dev_state);
    ucmi_plugin_free(&s->geo.dev->p, s->geo.dev_state);
    for (size_t i = 0; i < b->nstored; i++)
        free(b->stored[i].bytes);
    free(b->stored);
    free(b->held);
    ucm_conf_free(s->conf);
}

int64_t counter(const struct stack *s, enum ucmi_counter id)
{
    return atomic_load(&s->counters.v[id]);
}

size_t count_ready(struct stack *s, uint64_t first, size_t n)
{
    size_t ready = 0;
    for (size_t i = 0; i < n; i++) {
        ucm_key key = key_of(first + i);
        uint8_t found = 0;
        ucmi_tier_cache.lookup(&s->cache, &key, 1, 0, 1, &found, &(struct ucm_lookup){0});
        ready += found == 1;
    }
    return ready;
}

/* ---- xfers ---- */

static void move_done(struct ucm_xfer *x, struct ucm_slice *s, enum ucm_stage stage, int err)
{
    struct move *m = CONTAINER_OF(x, struct move, x);
    size_t i = (size_t)(s - x->v);
    pthread_mutex_lock(&m->lock);
    if (m->err[stage][i] != 1 || (stage == UCM_STORED && m->err[UCM_RELEASED][i] == 1))
        m->wrong = true;
    m->err[stage][i] = err;
    m->left[stage]--;
    pthread_cond_broadcast(&m->change);
    pthread_mutex_unlock(&m->lock);
}

void move_new(struct move *m, struct stack *s, bool dump, uint64_t first, size_t n, unsigned shard,
              unsigned nshards, unsigned group)
{
    size_t size = s->geo.shard_size;
    unsigned per = group ? group : nshards, ngroups = (nshards + per - 1) / per;
    *m = (struct move){.stack = s};
    pthread_mutex_init(&m->lock, NULL);
    ucmi_cond_init(&m->change);
    m->x = (struct ucm_xfer){
        .dump = dump,
        .n = (uint32_t)(n * ngroups),
        .v = calloc(n * ngroups, sizeof *m->x.v),
        .done = move_done,
    };
    m->memory = malloc(n * nshards * size);
    m->iov = calloc(m->x.n, sizeof *m->iov);
    for (int stage = 0; stage < 2; stage++) {
        m->left[stage] = m->x.n;
        m->err[stage] = malloc(m->x.n * sizeof(int));
        for (size_t i = 0; i < m->x.n; i++)
            m->err[stage][i] = 1;
    }
    memset(m->memory, 0x55, n * nshards * size);
    for (unsigned g = 0; g < ngroups; g++)
        for (size_t i = 0; i < n; i++) {
            size_t at = g * n + i;
            unsigned count = MIN(per, nshards - g * per);
            m->iov[at] = (struct iovec){m->memory + (i * nshards + g * per) * size, count * size};
            m->x.v[at] = (struct ucm_slice){
                .key = key_of(first + i),
                .depth = (uint32_t)i,
                .shard = shard + g * per,
                .nshards = count,
                .niov = 1,
                .at.iov = &m->iov[at],
            };
            for (unsigned k = 0; dump && k < count; k++)
                paint((char *)m->iov[at].iov_base + k * size, size, &m->x.v[at].key,
                      shard + g * per + k);
        }
}

int move_submit(struct move *m)
{
    m->x.deadline_ns = ucmi_now_ns() + m->stack->geo.timeout_ms * UINT64_C(1000000);
    return ucmi_tier_cache.submit(&m->stack->cache, &m->x);
}

int move_wait(struct move *m, enum ucm_stage stage)
{
    uint64_t end = patience();
    int err = 0;
    pthread_mutex_lock(&m->lock);
    while (m->left[stage] && !ucmi_cond_wait(&m->change, &m->lock, end))
        ;
    bool there = !m->left[stage], wrong = m->wrong;
    for (size_t i = 0; i < m->x.n && !err; i++)
        err = m->err[stage][i];
    pthread_mutex_unlock(&m->lock);
    assert_true(there);
    assert_false(wrong);
    return err;
}

bool move_reached(struct move *m, enum ucm_stage stage)
{
    pthread_mutex_lock(&m->lock);
    bool there = !m->left[stage];
    pthread_mutex_unlock(&m->lock);
    return there;
}

bool move_right(const struct move *m, size_t i)
{
    const struct ucm_slice *s = &m->x.v[i];
    size_t size = m->stack->geo.shard_size;
    for (unsigned k = 0; k < s->nshards; k++)
        if (!painted((const char *)m->iov[i].iov_base + k * size, size, &s->key, s->shard + k))
            return false;
    return true;
}

void move_free(struct move *m)
{
    free(m->x.v);
    free(m->iov);
    free(m->memory);
    free(m->err[0]);
    free(m->err[1]);
    pthread_cond_destroy(&m->change);
    pthread_mutex_destroy(&m->lock);
}

int run_shards(struct stack *s, bool dump, uint64_t first, size_t n, unsigned shard,
               unsigned nshards)
{
    struct move m;
    move_new(&m, s, dump, first, n, shard, nshards, 0);
    assert_int_equal(move_submit(&m), 0);
    int err = move_wait(&m, UCM_RELEASED);
    int stored = dump ? move_wait(&m, UCM_STORED) : 0;
    err = err ? err : stored;
    for (size_t i = 0; !dump && !err && i < n; i++)
        assert_true(move_right(&m, i));
    move_free(&m);
    return err;
}

int run_move(struct stack *s, bool dump, uint64_t first, size_t n)
{
    return run_shards(s, dump, first, n, 0, s->geo.nshards);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the measurements stand on: memory with a pattern, keys, an order, clocks, medians.
 */
#include "bench.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>

int arena_new(struct arena *a, uint64_t block, uint64_t shards, uint64_t n)
{
    void *p = mmap(NULL, block * n, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

    if (p == MAP_FAILED) {
        char size[16];
        return cannot("bench: %s of memory for the blocks: %m; give a smaller --total",
                      human_size((double)block * (double)n, size, sizeof size));
    }
    *a = (struct arena){.base = p, .block = block, .shard = block / shards, .n = n};
    return 0;
}

void arena_free(struct arena *a)
{
    if (a->base)
        munmap(a->base, a->block * a->n);
    a->base = NULL;
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

ucm_key bench_key(uint64_t i)
{
    uint64_t words[2] = {mix(i), mix(~i)};
    ucm_key key;

    memcpy(key.b, words, sizeof key.b);
    return key;
}

/* The words of one shard of a block: all differ from one another, from shard to shard and block to
 * block. */
static uint64_t *shard_words(const struct arena *a, uint64_t i, uint64_t shard, uint64_t *first)
{
    *first = mix(i << 16 | shard);
    return (uint64_t *)(a->base + shard * a->shard * a->n + i * a->shard);
}

void arena_fill(struct arena *a)
{
    for (uint64_t i = 0; i < a->n; i++) {
        for (uint64_t s = 0; s < a->block / a->shard; s++) {
            uint64_t first, *w = shard_words(a, i, s, &first);
            for (uint64_t k = 0; k < a->shard / sizeof *w; k++)
                w[k] = first + k * 0x9e3779b97f4a7c15u;
        }
    }
}

void arena_spoil(struct arena *a)
{
    memset(a->base, 0xa5, a->block * a->n);
}

uint64_t arena_wrong(const struct arena *a)
{
    uint64_t wrong = 0;

    for (uint64_t i = 0; i < a->n; i++) {
        uint64_t differs = 0;
        for (uint64_t s = 0; s < a->block / a->shard; s++) {
            uint64_t first, *w = shard_words(a, i, s, &first);
            for (uint64_t k = 0; k < a->shard / sizeof *w; k++)
                differs |= w[k] ^ (first + k * 0x9e3779b97f4a7c15u);
        }
        wrong += differs != 0;
    }
    return wrong;
}

uint32_t *shuffled(uint64_t n)
{
    uint32_t *v = calloc(n, sizeof *v);

    if (!v)
        return NULL;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t k = mix(i) % (i + 1);
        v[i] = v[k];
        v[k] = (uint32_t)i;
    }
    return v;
}

double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* CPU time of all threads of this process: the store's are among them. */
static double cpu_s(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

void timing_start(struct timing *t)
{
    t->cpu = cpu_s();
    t->seconds = now_s();
}

void timing_stop(struct timing *t)
{
    t->seconds = now_s() - t->seconds;
    t->cpu = cpu_s() - t->cpu;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double percentile(double *v, size_t n, double p)
{
    if (!n)
        return NAN;
    qsort(v, n, sizeof *v, by_value);
    return v[(size_t)(p / 100 * (double)(n - 1) + 0.5)];
}

double median(double *v, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        if (isnan(v[i]))
            return NAN;
    return percentile(v, n, 50);
}

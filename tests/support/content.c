/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The content of blocks, and the memory of an engine that holds them.  No state; a ts_mem belongs
 * to one thread at a time.
 */
#include <stdlib.h>
#include <string.h>

#include "support.h"

enum { GUARD = 0xa5, REGION_ALIGN = 4096 };

ucm_key ts_key(uint64_t no)
{
    uint64_t state = no * 2 + 1, words[2] = {ts_random(&state), ts_random(&state)};
    ucm_key key;
    memcpy(key.b, words, sizeof key.b);
    return key;
}

/* Calls for the content of [off, off + len), some words at a time: a sanitizer looks at each
 * access. Writes it to `to`, or compares it with `with`; returns the first byte that differs, or
 * len. */
static size_t walk(const ucm_key *key, unsigned shard, size_t off, uint8_t *to, const uint8_t *with,
                   size_t len)
{
    uint64_t k[2], words[64];
    memcpy(k, key->b, sizeof k);
    uint64_t base = (k[0] ^ (k[1] * 3)) + (shard + 1) * UINT64_C(0xd6e8feb86659fd93);

    for (size_t at = 0; at < len;) {
        size_t index = (off + at) / 8, in = (off + at) % 8;
        size_t n = sizeof words - in < len - at ? sizeof words - in : len - at;
        const uint8_t *content = (const uint8_t *)words + in;
        for (size_t i = 0; i * 8 < in + n; i++) {
            uint64_t state = base + (index + i) * UINT64_C(0xff51afd7ed558ccd);
            words[i] = ts_random(&state);
        }
        if (to)
            memcpy(to + at, content, n);
        else if (memcmp(with + at, content, n))
            for (size_t i = 0;; i++)
                if (with[at + i] != content[i])
                    return at + i;
        at += n;
    }
    return len;
}

void ts_fill(const ucm_key *key, unsigned shard, size_t off, void *p, size_t len)
{
    walk(key, shard, off, p, NULL, len);
}

size_t ts_check(const ucm_key *key, unsigned shard, size_t off, const void *p, size_t len)
{
    return walk(key, shard, off, NULL, p, len);
}

/* ---- engine memory ---- */

struct ts_shape ts_plain(size_t shard_size)
{
    return (struct ts_shape){.nsegs = 1, .blocks_per_key = 1, .len = {shard_size}, .pad = 64};
}

static size_t lay_out(struct ts_mem *m)
{
    const struct ts_shape *sh = &m->shape;
    size_t at = sh->skew, stride = 0;

    for (unsigned i = 0; i < sh->nsegs; i++)
        stride += sh->len[i] + sh->pad;
    for (unsigned s = 0; s < m->nshards; s++) {
        for (unsigned i = 0; i < sh->nsegs; i++) {
            struct ucm_seg *seg = &m->segs[s * sh->nsegs + i];
            *seg = (struct ucm_seg){m->bytes.at + at, sh->len[i] + sh->pad, sh->len[i]};
            if (sh->joined) {
                seg->stride = stride * m->nshards;
                at += sh->len[i] + sh->pad;
            } else {
                at += m->nblocks * seg->stride;
                at = (at + REGION_ALIGN - 1) / REGION_ALIGN * REGION_ALIGN + sh->skew;
            }
        }
    }
    return sh->joined ? sh->skew + m->nblocks * stride * m->nshards : at;
}

int ts_mem_new(struct ts_mem *m, ucm_store *store, size_t shard_size, unsigned nshards,
               const struct ts_shape *shape, size_t entries)
{
    *m = (struct ts_mem){
        .store = store,
        .shape = *shape,
        .nshards = nshards,
        .shard_size = shard_size,
        .entries = entries,
        .nblocks = (uint32_t)entries * shape->blocks_per_key,
        .device = ts_device(shape->device ? shape->device : "host"),
        .segs = calloc((size_t)nshards * shape->nsegs, sizeof *m->segs),
    };
    if (!m->segs)
        ts_die("no memory");
    m->size = lay_out(m); /* a first time, to learn the size */
    m->bytes = ts_bytes_new(m->device, m->size);
    lay_out(m);
    ts_mem_wipe(m);
    struct ucm_map_desc d = {m->segs, nshards, shape->nsegs, shape->blocks_per_key, m->nblocks};
    int err = ucm_map_new(store, &d, &m->map);
    if (err)
        ts_mem_free(m);
    return err;
}

void ts_mem_free(struct ts_mem *m)
{
    ucm_map_free(m->map);
    if (m->device)
        ts_bytes_free(m->device, &m->bytes);
    free(m->segs);
    *m = (struct ts_mem){0};
}

/* Backwards, so that neighbours among the keys are not neighbours in memory in the same order. */
void ts_mem_blocks(const struct ts_mem *m, size_t entry, uint32_t *blocks)
{
    unsigned per_key = m->shape.blocks_per_key;
    for (unsigned b = 0; b < per_key; b++)
        blocks[b] = m->nblocks - 1 - (uint32_t)(entry * per_key + b);
}

/* Where the test reaches what the map says. */
static uint8_t *reach(const struct ts_mem *m, const struct ucm_seg *seg, uint32_t block)
{
    return m->bytes.view + ((uint8_t *)seg->base - m->bytes.at) + block * seg->stride;
}

/* Fills (right == NULL) or checks the shards of an entry.  The bytes of a stored shard, as ucm.h
 * has it: engine block after engine block, and within each segment after segment. */
static void visit(const struct ts_mem *m, size_t entry, const ucm_key *key, unsigned shard,
                  unsigned nshards, bool *right)
{
    const struct ts_shape *sh = &m->shape;
    uint32_t blocks[4096];

    ts_mem_blocks(m, entry, blocks);
    for (unsigned s = shard; s < shard + nshards; s++) {
        size_t off = 0;
        for (unsigned b = 0; b < sh->blocks_per_key; b++) {
            for (unsigned i = 0; i < sh->nsegs; i++) {
                const struct ucm_seg *seg = &m->segs[s * sh->nsegs + i];
                uint8_t *p = reach(m, seg, blocks[b]);
                if (!right)
                    ts_fill(key, s, off, p, seg->len);
                else if (ts_check(key, s, off, p, seg->len) != seg->len)
                    *right = false;
                off += seg->len;
            }
        }
    }
}

void ts_mem_fill(struct ts_mem *m, size_t entry, const ucm_key *key)
{
    visit(m, entry, key, 0, m->nshards, NULL);
}

bool ts_mem_right(const struct ts_mem *m, size_t entry, const ucm_key *key, unsigned shard,
                  unsigned nshards)
{
    bool right = true;
    visit(m, entry, key, shard, nshards, &right);
    return right;
}

void ts_mem_wipe(struct ts_mem *m)
{
    memset(m->bytes.view, GUARD, m->size);
}

bool ts_mem_guards_ok(const struct ts_mem *m)
{
    const struct ts_shape *sh = &m->shape;

    for (unsigned s = 0; s < m->nshards * sh->nsegs; s++) {
        const struct ucm_seg *seg = &m->segs[s];
        for (uint32_t b = 0; b < m->nblocks; b++) {
            const uint8_t *p = reach(m, seg, b) + seg->len;
            for (size_t i = 0; i < sh->pad; i++)
                if (p[i] != GUARD)
                    return false;
        }
    }
    return true;
}

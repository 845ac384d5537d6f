/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sealing and checking of what lies on disk.  Nothing here trusts a byte before its checksum, and a
 * structure that checks is still only what somebody once wrote there: identity is the caller's to
 * compare.
 */
#include "store/format.h"

enum { JOURNAL_SEED = 0x10a1 }; /* as those of ucmi_kind: no other kind passes for it */

static uint64_t slot_sum(const struct ucmi_seal *s, const struct ucmi_slot_header *h)
{
    static const struct ucmi_what what = {.kind = UCMI_OF_SLOT};
    return ucmi_sum(s, &what, h, offsetof(struct ucmi_slot_header, sum));
}

static uint64_t journal_sum(const struct ucmi_journal_header *h)
{
    return ucmi_hash64(h, offsetof(struct ucmi_journal_header, sum), JOURNAL_SEED);
}

static uint64_t record_sum(const struct ucmi_seal *s, const struct ucmi_record *r)
{
    static const struct ucmi_what what = {.kind = UCMI_OF_RECORD};
    return ucmi_sum(s, &what, r, offsetof(struct ucmi_record, sum));
}

uint64_t ucmi_shard_sum(const struct ucmi_seal *s, const struct ucmi_slot_header *h, uint32_t shard,
                        const struct iovec *iov, unsigned niov)
{
    struct ucmi_what what = {.kind = UCMI_OF_SHARD, .key = h->key, .rank = h->rank, .shard = shard};
    memcpy(what.ns, h->ns, sizeof what.ns);
    return s->sum(s, &what, iov, niov);
}

void ucmi_slot_header_seal(const struct ucmi_seal *s, struct ucmi_slot_header *h)
{
    h->magic = UCMI_SLOT_MAGIC;
    h->format = UCMI_FORMAT;
    h->sum = slot_sum(s, h);
}

void ucmi_journal_header_seal(struct ucmi_journal_header *h)
{
    h->magic = UCMI_JOURNAL_MAGIC;
    h->format = UCMI_FORMAT;
    h->sum = journal_sum(h);
}

void ucmi_record_seal(const struct ucmi_seal *s, struct ucmi_record *r)
{
    r->sum = record_sum(s, r);
}

int ucmi_slot_header_check(const struct ucmi_seal *s, const struct ucmi_slot_header *h)
{
    if (h->magic != UCMI_SLOT_MAGIC)
        return -EBADMSG;
    if (h->format != UCMI_FORMAT) /* before the sum: another format may keep it elsewhere */
        return -ENOTSUP;
    if (h->sum != slot_sum(s, h) || h->nshards == 0 || h->nshards > UCMI_MAX_SHARDS ||
        h->shard_size == 0)
        return -EBADMSG;
    return 0;
}

int ucmi_journal_header_check(const struct ucmi_journal_header *h)
{
    if (h->magic != UCMI_JOURNAL_MAGIC)
        return -EBADMSG;
    if (h->format != UCMI_FORMAT)
        return -ENOTSUP;
    if (h->sum != journal_sum(h) || h->block_size > UCMI_MAX_BLOCK || h->ranks == 0 ||
        h->ranks > UCMI_MAX_RANKS || h->rank >= h->ranks || h->nshards == 0 ||
        h->nshards > UCMI_MAX_SHARDS || h->shard_size == 0 ||
        h->block_size / h->nshards != h->shard_size || h->block_size % h->nshards != 0 ||
        h->slot_size != ucmi_slot_size(h->block_size))
        return -EBADMSG;
    if (h->slots == 0 || h->slots > ((uint64_t)UCMI_MAX_SEGMENT_MB << 20) / h->slot_size ||
        h->epoch >= UCMI_MAX_EPOCH || h->base > INT64_MAX || h->summary > UINT64_C(1) << 33)
        return -EBADMSG; /* no arithmetic with these overflows */
    for (size_t i = 0; i < sizeof h->zero; i++)
        if (h->zero[i])
            return -EBADMSG;
    if (memchr(h->host, 0, sizeof h->host) == NULL || memchr(h->boot, 0, sizeof h->boot) == NULL)
        return -EBADMSG;
    return 0;
}

bool ucmi_record_check(const struct ucmi_seal *s, const struct ucmi_record *r)
{
    return r->op >= UCMI_PUT && r->op <= UCMI_SHRINK && r->sum == record_sum(s, r);
}

int ucmi_block_check(const struct ucmi_seal *s, const void *at,
                     const struct ucmi_journal_header *head, const struct ucmi_record *put)
{
    const struct ucmi_slot_header *h = at;
    if (ucmi_slot_header_check(s, h) < 0 || memcmp(h->ns, head->ns, sizeof h->ns) != 0 ||
        h->rank != put->rank || !ucmi_key_eq(&h->key, &put->key) ||
        (uint32_t)h->sum != put->header_sum || h->nshards != head->nshards ||
        h->shard_size != head->shard_size)
        return -EBADMSG;
    for (uint32_t i = 0; i < h->nshards; i++) {
        struct iovec shard = {(char *)at + UCMI_PAGE + i * h->shard_size, h->shard_size};
        if (ucmi_shard_sum(s, h, i, &shard, 1) != h->shard_sum[i])
            return -EBADMSG;
    }
    return 0;
}

uint32_t ucmi_lane_hash(const char *name)
{
    return (uint32_t)ucmi_hash64(name, strlen(name), UCMI_OF_RECORD) | 1;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * format.h - what lies on disk: slot headers, journal headers, journal records.  Pure functions.
 *
 * These structs are the bytes, little-endian, without padding; tests/posix/test_format.c holds them
 * to golden bytes.  A change of any of them needs a new UCMI_FORMAT.  Sums are made by the store's
 * seal (seal.h), but for that of a journal's header, which is always plain: who has no key, or
 * another, must still see who lives there.
 *
 *     segment   slots of one size: a header page, then the block's shards packed in layer order,
 * then zeros up to the next page journal   a header page, then records; what is behind the last
 * record does not check
 */
#ifndef UCMI_FORMAT_H
#define UCMI_FORMAT_H

#include "store/seal.h"
#include "store/store.h"

enum { UCMI_FORMAT = 2 };
#define UCMI_SLOT_MAGIC    0x31544f4c534d4355u /* "UCMSLOT1" */
#define UCMI_JOURNAL_MAGIC 0x314e524a534d4355u /* "UCMSJRN1" */

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the formats are written as they lie");

struct ucmi_slot_header {
    uint64_t magic;
    uint32_t format, nshards;
    uint64_t shard_size;
    uint8_t ns[16];
    ucm_key key;
    uint32_t rank, depth;
    uint64_t shard_sum[UCMI_MAX_SHARDS]; /* of each shard, 0 from nshards on */
    uint8_t zero[184];
    uint64_t sum; /* of all before it */
};
_Static_assert(sizeof(struct ucmi_slot_header) == UCMI_PAGE, "a slot header is one page");

enum ucmi_op {
    UCMI_PUT = 1, /* the block lies in this slot */
    UCMI_DEL,     /* it does no more */
    UCMI_TOUCH,   /* someone used it, wherever it lies; segment and slot are 0 */
    UCMI_EPOCH, /* a new owner begins; the only record whose epoch is higher than the last one's */
    UCMI_MOVED, /* the journal goes on in a file of the next generation */
    /* Asked of the owner of another lane, who answers with a DEL or a PUT of that block: */
    UCMI_FORGET, /* drop it, if it was last used before `tick` */
    UCMI_PIN,    /* keep it until `tick`; 0: no longer */
    UCMI_SHRINK  /* of no block: have at most `segment` segments */
};
enum {
    UCMI_PINNED = 1, /* of a PUT: not to be evicted before `tick` */
    UCMI_IF_BAD = 2, /* of a FORGET: if it fails its check */
    UCMI_AGAIN = 4   /* of a PUT: it was used before its last use */
};
struct ucmi_record {
    uint64_t seq; /* of the first record of a lane 1, then one more each, over all generations */
    uint32_t epoch;
    uint8_t op, flags;
    uint16_t rank;
    ucm_key key;
    uint32_t segment, slot;
    uint32_t depth;      /* of what is asked: the tick when that is no longer wanted */
    uint32_t tick;       /* last use: seconds since 1970 >> UCMI_TICK_SHIFT */
    uint32_t header_sum; /* low half of the slot header's sum: which header was published */
    uint32_t lane;       /* of what is asked: which lane, ucmi_lane_hash of its name */
    uint64_t sum;        /* of all before it */
};
_Static_assert(sizeof(struct ucmi_record) == 64, "64 records fill a page");
enum {
    UCMI_TICK_SHIFT = 4,
    /* More is nonsense that somebody has put there, and tables are made by it: */
    UCMI_MAX_SEGMENTS = 1 << 16, /* of a lane */
    UCMI_MAX_BLOCK = 1 << 30,    /* bytes, as the option says */
    UCMI_MAX_SEGMENT_MB = 1 << 16
};
#define UCMI_MAX_EPOCH (UINT32_C(1) << 31) /* each is lower, so there is always a next one */

struct ucmi_journal_header {
    uint64_t magic;
    uint32_t format;
    uint32_t rank, ranks, nshards;
    uint64_t block_size, shard_size;
    uint8_t ns[16];
    uint64_t slot_size;
    uint32_t slots; /* in a segment */
    uint32_t epoch; /* raised by who adopts the lane */
    uint64_t owner; /* a random number of the present or last owner */
    uint64_t generation;
    uint64_t base;    /* seq before the first record in this file */
    uint64_t summary; /* that many records repeat what came before: their reader knew it all */
    uint64_t pid;
    char host[64], boot[64]; /* NUL-terminated */
    /* Of all before it.  All that counts lies in one sector: the header is written in place, and
     * what a power cut or a failed write leaves is the old one or the new one. */
    uint64_t sum;
    uint8_t zero[3848];
};
_Static_assert(sizeof(struct ucmi_journal_header) == UCMI_PAGE, "a journal header is one page");

/* Fill in magic, format and sum. */
void ucmi_slot_header_seal(const struct ucmi_seal *s, struct ucmi_slot_header *h);
void ucmi_journal_header_seal(struct ucmi_journal_header *h);
void ucmi_record_seal(const struct ucmi_seal *s, struct ucmi_record *r);
/* The sum of a shard of this block, which lies in pieces. */
uint64_t ucmi_shard_sum(const struct ucmi_seal *s, const struct ucmi_slot_header *h, uint32_t shard,
                        const struct iovec *iov, unsigned niov);

/* 0; -EBADMSG: not one, or damaged; -ENOTSUP: of another format. */
int ucmi_slot_header_check(const struct ucmi_seal *s, const struct ucmi_slot_header *h);
int ucmi_journal_header_check(const struct ucmi_journal_header *h);
bool ucmi_record_check(const struct ucmi_seal *s, const struct ucmi_record *r);

/* Is this the block that was published: identity, header and all bytes?  at: the slot; head: of the
 * journal that tells of it.  0 or -EBADMSG. */
int ucmi_block_check(const struct ucmi_seal *s, const void *at,
                     const struct ucmi_journal_header *head, const struct ucmi_record *put);
uint32_t ucmi_lane_hash(const char *name); /* not 0 */

/* Whether segment and slot can be: place is then segment * slots + slot, in 32 bits. */
static inline bool ucmi_place_of(const struct ucmi_record *r, uint32_t slots, uint32_t *place)
{
    if (r->slot >= slots || r->segment >= UCMI_MAX_SEGMENTS || r->segment >= UINT32_MAX / slots)
        return false;
    *place = r->segment * slots + r->slot;
    return true;
}
/* Bytes of a slot, header included, on disk. */
static inline uint64_t ucmi_slot_size(uint64_t block_size)
{
    return UCMI_PAGE + ROUND_UP(block_size, UCMI_PAGE);
}
static inline uint32_t ucmi_tick(uint64_t seconds)
{
    return (uint32_t)(seconds >> UCMI_TICK_SHIFT);
}

#endif

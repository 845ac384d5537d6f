/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any page as the header of a slot and of a journal.  What passes is within the bounds that its
 * readers rely on, and does not pass with any one bit changed.
 */
#include "store/format.h"

#include <stdlib.h>

#define MUST(x) ((x) ? (void)0 : abort())

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static bool slot_ok(const void *page)
{
    const struct ucmi_slot_header *h = page;
    if (ucmi_slot_header_check(&ucmi_plain, h) < 0)
        return false;
    MUST(h->nshards > 0 && h->nshards <= UCMI_MAX_SHARDS && h->shard_size > 0);
    return true;
}

static bool journal_ok(const void *page)
{
    const struct ucmi_journal_header *h = page;
    if (ucmi_journal_header_check(h) < 0)
        return false;
    MUST(h->slots > 0 && h->rank < h->ranks && h->ranks <= UCMI_MAX_RANKS);
    MUST(h->nshards > 0 && h->nshards <= UCMI_MAX_SHARDS);
    MUST(h->shard_size * h->nshards == h->block_size);
    MUST(h->slot_size > h->block_size && h->slot_size % UCMI_PAGE == 0);
    MUST(strlen(h->host) < sizeof h->host && strlen(h->boot) < sizeof h->boot);
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static union {
        uint8_t bytes[UCMI_PAGE];
        struct ucmi_slot_header slot;
        struct ucmi_journal_header journal;
    } page;
    uint32_t bit = 0;

    memset(&page, 0, sizeof page);
    memcpy(&page, data, size < sizeof page ? size : sizeof page);
    if (size >= sizeof bit)
        memcpy(&bit, data + size - sizeof bit, sizeof bit);
    bit %= 8 * sizeof page;
    slot_ok(&page);
    journal_ok(&page);

    ucmi_slot_header_seal(&ucmi_plain, &page.slot);
    slot_ok(&page);
    page.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
    MUST(!slot_ok(&page));
    page.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);

    if (page.journal.nshards && page.journal.nshards <= UCMI_MAX_SHARDS) { /* often right */
        page.journal.shard_size %= 1u << 30;
        page.journal.block_size = page.journal.shard_size * page.journal.nshards;
        page.journal.slot_size = ucmi_slot_size(page.journal.block_size);
    }
    ucmi_journal_header_seal(&page.journal);
    if (journal_ok(&page)) {
        page.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        MUST(!journal_ok(&page));
    }
    return 0;
}

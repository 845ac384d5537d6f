/* SPDX-License-Identifier: Apache-2.0 */
/* The bytes on disk: golden, so that no build ever reads another's files differently. */
#include "store/format.h"

#include <stdlib.h>

#include "../test.h"

static void record_is_these_bytes(void **state)
{
    struct ucmi_record r = {.seq = 0x0102030405060708,
                            .epoch = 0x11121314,
                            .op = UCMI_PUT,
                            .rank = 0x2122,
                            .segment = 0x31323334,
                            .slot = 0x41424344,
                            .depth = 0x51525354,
                            .tick = 0x61626364,
                            .header_sum = 0x71727374};
    for (uint8_t i = 0; i < 16; i++)
        r.key.b[i] = (uint8_t)(0xa0 + i);
    ucmi_record_seal(&ucmi_plain, &r);
    char hex[129];
    ucmi_hex((const uint8_t *)&r, sizeof r, hex);
    assert_string_equal(hex, "0807060504030201"
                             "14131211"
                             "01002221"
                             "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf"
                             "34333231"
                             "44434241"
                             "54535251"
                             "64636261"
                             "74737271"
                             "00000000"
                             "ec4170635b72ff68");
}

static struct ucmi_slot_header slot_header(void)
{
    struct ucmi_slot_header h = {.nshards = 3, .shard_size = 513, .rank = 5, .depth = 7};
    for (uint8_t i = 0; i < 16; i++) {
        h.ns[i] = (uint8_t)(0x10 + i);
        h.key.b[i] = (uint8_t)(0xa0 + i);
    }
    for (unsigned i = 0; i < 3; i++)
        h.shard_sum[i] = 0x0101010101010101u * (i + 1);
    ucmi_slot_header_seal(&ucmi_plain, &h);
    return h;
}

static void slot_header_is_these_bytes(void **state)
{
    struct ucmi_slot_header h = slot_header();
    char hex[2 * 96 + 1];
    ucmi_hex((const uint8_t *)&h, 96, hex);
    assert_string_equal(hex, "55434d534c4f5431"
                             "02000000"
                             "03000000"
                             "0102000000000000"
                             "101112131415161718191a1b1c1d1e1f"
                             "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf"
                             "05000000"
                             "07000000"
                             "0101010101010101"
                             "0202020202020202"
                             "0303030303030303"
                             "0000000000000000");
    ucmi_hex((const uint8_t *)&h + 4088, 8, hex);
    assert_string_equal(hex, "3df8893cadf13d66");
    assert_int_equal(ucmi_slot_header_check(&ucmi_plain, &h), 0);
}

static struct ucmi_journal_header journal_header(void)
{
    struct ucmi_journal_header h = {.rank = 1,
                                    .ranks = 2,
                                    .nshards = 3,
                                    .block_size = 1539,
                                    .shard_size = 513,
                                    .slot_size = 8192,
                                    .slots = 9,
                                    .epoch = 10,
                                    .owner = 11,
                                    .generation = 12,
                                    .base = 13,
                                    .summary = 14,
                                    .pid = 15,
                                    .host = "host",
                                    .boot = "boot"};
    for (uint8_t i = 0; i < 16; i++)
        h.ns[i] = (uint8_t)(0x10 + i);
    ucmi_journal_header_seal(&h);
    return h;
}

static void journal_header_is_these_bytes(void **state)
{
    struct ucmi_journal_header h = journal_header();
    char hex[2 * 120 + 1];
    ucmi_hex((const uint8_t *)&h, 120, hex);
    assert_string_equal(hex, "55434d534a524e31"
                             "02000000"
                             "01000000"
                             "02000000"
                             "03000000"
                             "0306000000000000"
                             "0102000000000000"
                             "101112131415161718191a1b1c1d1e1f"
                             "0020000000000000"
                             "09000000"
                             "0a000000"
                             "0b00000000000000"
                             "0c00000000000000"
                             "0d00000000000000"
                             "0e00000000000000"
                             "0f00000000000000"
                             "686f737400000000");
    ucmi_hex((const uint8_t *)&h + 240, 8, hex); /* in the first sector, with all that counts */
    assert_string_equal(hex, "c1bcc06cfd47cccc");
    assert_int_equal(ucmi_journal_header_check(&h), 0);
}

/* Each bit of each structure is covered by its sum. */
static void no_flipped_bit_passes(void **state)
{
    struct ucmi_slot_header s = slot_header();
    struct ucmi_journal_header j = journal_header();
    struct ucmi_record r = {.op = UCMI_DEL, .seq = 1};
    ucmi_record_seal(&ucmi_plain, &r);
    assert_true(ucmi_record_check(&ucmi_plain, &r));
    for (size_t bit = 0; bit < 8 * sizeof r; bit++) {
        ((uint8_t *)&r)[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_false(ucmi_record_check(&ucmi_plain, &r));
        ((uint8_t *)&r)[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    for (size_t bit = 0; bit < 8 * sizeof s; bit++) {
        uint8_t mask = (uint8_t)(1 << bit % 8);
        ((uint8_t *)&s)[bit / 8] ^= mask;
        ((uint8_t *)&j)[bit / 8] ^= mask;
        assert_true(ucmi_slot_header_check(&ucmi_plain, &s) < 0);
        assert_true(ucmi_journal_header_check(&j) < 0);
        ((uint8_t *)&s)[bit / 8] ^= mask;
        ((uint8_t *)&j)[bit / 8] ^= mask;
    }
}

/* What another format looks like is not for this one to judge. */
static void another_format_is_told_from_damage(void **state)
{
    struct ucmi_slot_header s = slot_header();
    struct ucmi_journal_header j = journal_header();
    s.format = j.format = UCMI_FORMAT + 1;
    assert_int_equal(ucmi_slot_header_check(&ucmi_plain, &s), -ENOTSUP);
    assert_int_equal(ucmi_journal_header_check(&j), -ENOTSUP);
}

/* A checksum does not make nonsense right. */
static void sealed_nonsense_is_refused(void **state)
{
    struct ucmi_slot_header s = slot_header();
    s.nshards = UCMI_MAX_SHARDS + 1;
    ucmi_slot_header_seal(&ucmi_plain, &s);
    assert_int_equal(ucmi_slot_header_check(&ucmi_plain, &s), -EBADMSG);
    for (int i = 0; i < 13; i++) {
        struct ucmi_journal_header j = journal_header();
        switch (i) {
        case 0: j.slots = 0; break;
        case 1: j.rank = j.ranks; break;
        case 2: j.slot_size += UCMI_PAGE; break;
        case 3: j.nshards = 0; break;
        case 4: j.shard_size++; break;
        case 5: memset(j.host, 'x', sizeof j.host); break;
        case 6: memset(j.boot, 'x', sizeof j.boot); break;
        case 7: j.slots = UINT32_MAX; break; /* tables are made by it */
        case 8: j.epoch = UCMI_MAX_EPOCH; break;
        case 9: j.base = UINT64_MAX; break;
        case 10: j.summary = UINT64_MAX / sizeof(struct ucmi_record); break;
        case 11: /* a page more than a multiple of 2^64 */
            j.nshards = 1;
            j.block_size = j.shard_size = UINT64_MAX - 10;
            j.slot_size = ucmi_slot_size(j.block_size);
            break;
        case 12: /* larger than any block */
            j.nshards = 1;
            j.block_size = j.shard_size = 2 * (uint64_t)UCMI_MAX_BLOCK;
            j.slot_size = ucmi_slot_size(j.block_size);
            break;
        }
        ucmi_journal_header_seal(&j);
        assert_int_equal(ucmi_journal_header_check(&j), -EBADMSG);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(record_is_these_bytes),
        cmocka_unit_test(slot_header_is_these_bytes),
        cmocka_unit_test(journal_header_is_these_bytes),
        cmocka_unit_test(no_flipped_bit_passes),
        cmocka_unit_test(another_format_is_told_from_damage),
        cmocka_unit_test(sealed_nonsense_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

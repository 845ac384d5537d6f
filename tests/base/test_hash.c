/* SPDX-License-Identifier: Apache-2.0 */
/* The hashes: what is on disk was made with them, so they may never change. */
#include "base/base.h"

#include <stdlib.h>

#include "../test.h"

enum { LEN = 70000 };

static uint8_t *noise(void)
{
    uint8_t *p = malloc(LEN);
    uint32_t x = 12345;
    assert_non_null(p);
    for (size_t i = 0; i < LEN; i++) {
        x = x * 1664525u + 1013904223u;
        p[i] = (uint8_t)(x >> 24);
    }
    return p;
}

static void hashes_are_xxh3_to_the_bit(void **state)
{
    char hex[33];
    uint8_t h[16];
    assert_true(ucmi_hash64("", 0, 0) == 0x2d06800538d394c2u);
    assert_true(ucmi_hash64("abc", 3, 0) == 0x78af5f94892f3950u);
    ucmi_hash128("", 0, h);
    ucmi_hex(h, 16, hex);
    assert_string_equal(hex, "99aa06d3014798d86001c324468d497f");
    ucmi_hash128("abc", 3, h);
    ucmi_hex(h, 16, hex);
    assert_string_equal(hex, "06b05ab6733a618578af5f94892f3950");
    uint8_t *p = noise();
    assert_true(ucmi_hash64(p, 240, 1) == 0x34dd45dd25ffeeeau);
    assert_true(ucmi_hash64(p, LEN, 0) == 0x60da3e47c8cf1d22u);
    free(p);
}

static void the_seed_and_each_byte_matter(void **state)
{
    uint8_t *p = noise();
    uint64_t h = ucmi_hash64(p, LEN, 0);
    assert_true(ucmi_hash64(p, LEN, 1) != h);
    assert_true(ucmi_hash64(p, LEN - 1, 0) != h);
    static const size_t places[] = {0, 1, 4095, 4096, LEN / 2, LEN - 1};
    for (size_t i = 0; i < ARRAY_LEN(places); i++) {
        p[places[i]] ^= 1;
        assert_true(ucmi_hash64(p, LEN, 0) != h);
        p[places[i]] ^= 1;
    }
    free(p);
}

static void pieces_hash_as_if_joined(void **state)
{
    uint8_t *p = noise();
    uint32_t x = 99;
    for (int round = 0; round < 400; round++) {
        struct iovec iov[9];
        unsigned n = 0;
        size_t at = 0, len = round < 100 ? (size_t)round : 1 + x % LEN;
        while (n < 8 && at < len) {
            x = x * 1664525u + 1013904223u;
            size_t part = (x >> 8) % (len - at + 1); /* nothing at all among them */
            iov[n++] = (struct iovec){p + at, part};
            at += part;
        }
        iov[n++] = (struct iovec){p + at, len - at};
        assert_true(ucmi_hash64v(iov, n, (uint64_t)round) == ucmi_hash64(p, len, (uint64_t)round));
    }
    struct iovec whole = {p, LEN};
    assert_true(ucmi_hash64v(&whole, 1, 5) == ucmi_hash64(p, LEN, 5));
    assert_true(ucmi_hash64v(NULL, 0, 5) == ucmi_hash64(p, 0, 5));
    free(p);
}

static void key_words_tell_ranks_apart(void **state)
{
    ucm_key a = {{1, 2, 3, 4, 5, 6, 7, 8, 9}}, b = a;
    assert_true(ucmi_key_eq(&a, &b));
    assert_true(ucmi_key_word(&a, 0) != ucmi_key_word(&a, 1));
    b.b[15] = 1;
    assert_false(ucmi_key_eq(&a, &b));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hashes_are_xxh3_to_the_bit),
        cmocka_unit_test(the_seed_and_each_byte_matter),
        cmocka_unit_test(pieces_hash_as_if_joined),
        cmocka_unit_test(key_words_tell_ranks_apart),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

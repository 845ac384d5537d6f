/* SPDX-License-Identifier: Apache-2.0 */
/* fuzz_http.c for a second or so, with changes to good heads and bodies.  usage: test_http
 * CORPUS_FILE... */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { ROUNDS = 4000, MAX = 1000 };

static uint64_t state = 7;

static unsigned below(unsigned n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(state >> 33) % n;
}

static size_t spoil(uint8_t *data, size_t size)
{
    static const char *const bits[] = {"\r\n", "\r\n\r\n", ":", " ",   "0",
                                       "f",    "\t",       ";", "1.0", ","};

    for (unsigned n = below(5); n; n--) {
        unsigned at = below((unsigned)size), what = below(12);
        const char *bit = what < 10 ? bits[what] : "";
        size_t len = strlen(bit);
        if (what >= 10) {
            data[at] = (uint8_t)below(256);
        } else if (size + len <= MAX) {
            memmove(data + at + len, data + at, size - at);
            memcpy(data + at, bit, len);
            size += len;
        }
        if (below(3) == 0 && size > 1) {
            at = below((unsigned)size);
            memmove(data + at, data + at + 1, --size - at);
        }
    }
    return size;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        uint8_t good[MAX], data[MAX];
        FILE *f = fopen(argv[i], "rb");
        size_t n = f ? fread(good, 1, sizeof good, f) : 0;
        if (!n)
            return 1;
        fclose(f);
        LLVMFuzzerTestOneInput(good, n);
        for (int round = 0; round < ROUNDS; round++) {
            memcpy(data, good, n);
            LLVMFuzzerTestOneInput(data, spoil(data, n));
        }
    }
    return argc < 2;
}

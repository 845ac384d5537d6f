/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_lane.c over random inputs: test_lane [SEED].  For 6 s, or UCM_TEST_SECONDS; the seed of what
 * fails is the last line before it.
 */
#include <stdio.h>
#include <stdlib.h>

#include "../support/support.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void run(uint64_t seed)
{
    static uint8_t data[512];
    uint64_t state = seed;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)ts_random(&state);
    fprintf(stderr, "# test_lane %llu\n", (unsigned long long)seed);
    LLVMFuzzerTestOneInput(data, 16 + ts_below(&state, sizeof data - 15));
}

int main(int argc, char **argv)
{
    uint64_t end = ts_now_ms() + (uint64_t)(1000 * ts_seconds(6));
    if (argc > 1) {
        run(strtoull(argv[1], NULL, 10));
        return 0;
    }
    for (uint64_t seed = ts_seed(); ts_now_ms() < end;)
        run(ts_random(&seed));
    return 0;
}

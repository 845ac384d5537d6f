/* SPDX-License-Identifier: Apache-2.0 */
/*
 * seal KEY_FILE: how fast checksums are, without a key and with that one, on one core, by the
 * processor's time.  The bytes come from memory, as those of blocks do.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "store/format.h"

enum { ARENA = 64 << 20, ROUNDS = 5 };

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* The best of some rounds: other work on the machine only ever makes one slower. */
static double seconds_for_one(const struct ucmi_seal *s, const uint8_t *arena, size_t size)
{
    const struct ucmi_what what = {.kind = UCMI_OF_SHARD};
    double best = INFINITY;
    uint64_t sums = 0;
    size_t n = MIN(ARENA / size, (size_t)1 << 17);
    for (int round = 0; round < ROUNDS; round++) {
        double from = cpu_seconds();
        for (size_t i = 0; i < n; i++)
            sums += ucmi_sum(s, &what, arena + i * size, size);
        best = fmin(best, (cpu_seconds() - from) / (double)n);
    }
    return sums == 1 ? 0 : best; /* so that they are computed */
}

int main(int argc, char **argv)
{
    static const size_t sizes[] = {56, 4088, 16 << 10, 64 << 10, 256 << 10, 1 << 20};
    uint8_t *arena = malloc(ARENA);
    struct ucmi_key key;
    struct ucmi_seal keyed;
    ucm_conf *conf;
    if (argc != 2 || !arena || ucm_conf_new(&conf) < 0)
        return 2;
    if (ucmi_key_read(argv[1], &key, conf) < 0) {
        fprintf(stderr, "seal: %s\n", ucm_conf_error(conf));
        return 1;
    }
    if (ucmi_seal_open(&keyed, &key) < 0)
        return 1;
    memset(arena, 1, ARENA);
    printf("%8s %12s %8s %12s %8s\n", "bytes", "XXH3 GB/s", "ns", "keyed GB/s", "ns");
    for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
        double plain = seconds_for_one(&ucmi_plain, arena, sizes[i]);
        double with = seconds_for_one(&keyed, arena, sizes[i]);
        printf("%8zu %12.2f %8.0f %12.2f %8.0f\n", sizes[i], (double)sizes[i] / plain / 1e9,
               plain * 1e9, (double)sizes[i] / with / 1e9, with * 1e9);
    }
    ucmi_seal_close(&keyed);
    ucm_conf_free(conf);
    free(arena);
    return 0;
}

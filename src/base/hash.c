/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hash.c - XXH3 over one piece or several.  What is stored on disk depends on these being XXH3-64
 * and XXH3-128 to the bit, so that a reader of another build, or of another machine, agrees; XXH3
 * is defined on bytes, the same on either byte order.  No state, any thread.
 */
#include "base/base.h"

#define XXH_STATIC_LINKING_ONLY /* for the size of the streaming state */
#include <xxhash.h>

#include "ucm_config.h"
#if UCM_HAVE_XXH_DISPATCH
/* The same names and values, by AVX2 or AVX-512 where the processor has them: twice as fast. */
#include <xxh_x86dispatch.h>
#endif

uint64_t ucmi_hash64(const void *p, size_t len, uint64_t seed)
{
    return XXH3_64bits_withSeed(p, len, seed);
}

void ucmi_hash128(const void *p, size_t len, uint8_t out[16])
{
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(p, len));
    memcpy(out, canonical.digest, 16);
}

/* By itself, for its state would be made room for in every call. */
__attribute__((noinline)) static uint64_t hash_pieces(const struct iovec *iov, unsigned niov,
                                                      uint64_t seed)
{
    XXH3_state_t state;
    XXH3_INITSTATE(&state);
    XXH3_64bits_reset_withSeed(&state, seed);
    for (unsigned i = 0; i < niov; i++)
        XXH3_64bits_update(&state, iov[i].iov_base, iov[i].iov_len);
    return XXH3_64bits_digest(&state);
}

uint64_t ucmi_hash64v(const struct iovec *iov, unsigned niov, uint64_t seed)
{
    return niov == 1 ? ucmi_hash64(iov[0].iov_base, iov[0].iov_len, seed)
                     : hash_pieces(iov, niov, seed);
}

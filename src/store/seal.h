/* SPDX-License-Identifier: Apache-2.0 */
/*
 * seal.h - the checksums on disk: XXH3-64, or with integrity_key_file a MAC of the same length.
 *
 * Without a key a checksum finds damage.  With one, who cannot read the key can make none that
 * checks.  It is SipHash-2-4 of what the bytes are and of their Poly1305, an almost universal hash
 * under a key of its own: hash, then a pseudorandom function (Wegman and Carter; Shoup, "On fast
 * and provably secure message authentication based on universal hashing", 1996).  So nothing has to
 * be unique, and a try at forging succeeds with 2^-64, for messages of up to 1 GiB; that two of 2^40
 * headers collide in Poly1305, which might tell of its key, has 2^-16.  Both functions are
 * libcrypto's, chosen by speed: bench/README.md.
 */
#ifndef UCMI_SEAL_H
#define UCMI_SEAL_H

#include "base/base.h"

/* What is sealed.  Kinds are the seeds of XXH3, so that one can never pass for another; the rest
 * only counts with a key, and names a shard. */
enum ucmi_kind { UCMI_OF_SHARD = 0, UCMI_OF_SLOT = 0x510f, UCMI_OF_RECORD = 0x4ec0 };
struct ucmi_what {
    uint64_t kind;
    uint8_t ns[16];
    ucm_key key;
    uint32_t rank, shard;
};
_Static_assert(sizeof(struct ucmi_what) == 48, "goes into sums as it lies");

struct ucmi_key {
    bool given;
    uint8_t id[16]; /* tells keys from one another; no secret */
    uint8_t hash[32], prf[16];
};
enum { UCMI_KEY_ID = 4 }; /* bytes of the id that end a namespace; 0: no key */

/* Reads integrity_key_file; "" gives none.  0, or -errno and why in conf. */
int ucmi_key_read(const char *path, struct ucmi_key *key, ucm_conf *conf);
void ucmi_key_wipe(struct ucmi_key *key);

/* What sums are made by.  One thread at a time. */
struct ucmi_seal {
    uint64_t (*sum)(const struct ucmi_seal *s, const struct ucmi_what *what,
                    const struct iovec *iov, unsigned niov);
    const struct ucmi_key *key;
    void *hash, *prf; /* of libcrypto */
};
extern const struct ucmi_seal ucmi_plain; /* any thread */

/* key outlives the seal.  0 or -ENOMEM; then, too, it may be closed. */
int ucmi_seal_open(struct ucmi_seal *s, const struct ucmi_key *key);
void ucmi_seal_close(struct ucmi_seal *s);
/* What the namespace's sums are made by: the plain one, or the one given; NULL: by another key. */
const struct ucmi_seal *ucmi_seal_of(const struct ucmi_seal *given, const uint8_t ns[16]);

static inline uint64_t ucmi_sum(const struct ucmi_seal *s, const struct ucmi_what *what,
                                const void *p, size_t len)
{
    return s->sum(s, what, &(struct iovec){(void *)p, len}, 1);
}

#endif

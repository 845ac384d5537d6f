/* SPDX-License-Identifier: Apache-2.0 */
/* bytes.h - bytes that came and were not taken yet: who takes some moves `at`. */
#ifndef PROXY_BYTES_H
#define PROXY_BYTES_H

#include <stddef.h>

struct bytes {
    char *at;
    size_t len;
};
static inline void bytes_take(struct bytes *b, size_t n)
{
    b->at += n;
    b->len -= n;
}

#endif

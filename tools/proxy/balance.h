/* SPDX-License-Identifier: Apache-2.0 */
/* balance.h - which of several instances gets a request. */
#ifndef PROXY_BALANCE_H
#define PROXY_BALANCE_H

#include <stddef.h>
#include <stdint.h>

enum seat_state {
    SEAT_UP,
    SEAT_DOWN, /* failed of late: taken only when no other is left */
    SEAT_SHUT  /* drained or removed: never taken */
};
struct seat {
    uint64_t id;     /* a hash of its name: the same in every proxy and after a restart */
    uint64_t tokens; /* in flight there */
    enum seat_state state;
};

uint64_t balance_hash(uint64_t hash, const void *data, size_t len);
/* Of n seats, without those tried already, the place of the one to take, or -1.  `key` names the
 * prompt's beginning (0: none); `slack`: so many tokens above the mean may a seat have that is
 * taken for its key; `turn` settles ties. */
int balance_choose(const struct seat *const *seats, unsigned n, const struct seat *const *tried,
                   unsigned ntried, uint64_t key, uint64_t slack, unsigned turn);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * peer.h - another process with a store of its own on the same directory: this program again, told
 * what to do through a pipe.
 */
#ifndef UCMT_PEER_H
#define UCMT_PEER_H

#include "harness.h"

struct peer {
    pid_t pid;
    int to, from;
};
enum peer_verb {
    PEER_OPEN,
    PEER_DUMP,  /* keys first .. first + n - 1; the first error */
    PEER_FOUND, /* how many of them a lookup finds */
    PEER_LOAD,  /* how many of them come back right; -EBADMSG when one comes back wrong */
    PEER_CHURN, /* dumps from first on, n at a time, until it is killed; answers at once */
    PEER_CLOSE
};

/* First thing in main: `if (argc > 1) return peer_main(argc, argv);`. */
int peer_main(int argc, char **argv);
struct peer peer_start(const char *dir, const struct shape *shape, const char *options);
int64_t peer_do(struct peer *peer, enum peer_verb verb, uint64_t first, uint64_t n);
/* The same in two halves, for several peers at a time. */
void peer_ask(struct peer *peer, enum peer_verb verb, uint64_t first, uint64_t n);
int64_t peer_answer(struct peer *peer);
void peer_kill(struct peer *peer); /* -9 */
void peer_end(struct peer *peer);  /* closes its store */
/* All of them dump as fast as they can, and are killed; meanwhile there are never more than so many
 * GiB below dir, looked at again and again, also when it is full. */
void peers_keep_to(struct peer *peers, unsigned n, const char *dir, double bound_gb);

#endif

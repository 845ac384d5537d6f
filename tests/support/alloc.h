/* SPDX-License-Identifier: Apache-2.0 */
/*
 * alloc.h - memory that runs out, for tests.
 *
 * A program that links alloc_dep has its own malloc and the like around libc's (--wrap), for the
 * library and for itself: each can be made to fail, by number or by chance, and what has not been
 * given back can be counted.  mmap, open_memstream, opendir and pthread_create count as allocations
 * too.  What libc or another library allocates for itself does not.
 */
#ifndef TS_ALLOC_H
#define TS_ALLOC_H

#include <stdint.h>

/* The at-th allocation from now on fails, once; 0: none.  Counts anew. */
void alloc_fail_at(uint64_t at);
/* Each fails by chance, one in so many; 0: none. */
void alloc_fail_one_in(unsigned one_in, uint64_t seed);
uint64_t alloc_seen(void);   /* since alloc_fail_at */
uint64_t alloc_bytes(void);  /* asked for since then */
uint64_t alloc_failed(void); /* since the program began */
int64_t alloc_live(void);    /* not given back */
unsigned alloc_fds(void);    /* open descriptors of the process */

#endif

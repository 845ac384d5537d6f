/* SPDX-License-Identifier: Apache-2.0 */
/*
 * slots.h - whether a pool has got all its slots back (store/pool.h).
 */
#ifndef TS_SLOTS_H
#define TS_SLOTS_H

#include "store/pool.h"

/* How many slots cannot be had, or are held, though nobody uses the pool any more.  What the dead
 * left is taken back first; of the blocks none remains. */
size_t ts_slots_kept(struct ucmi_pool *p);

#endif

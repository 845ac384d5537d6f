/* SPDX-License-Identifier: Apache-2.0 */
#include "slots.h"

#include <stdlib.h>

#include "support.h"

enum { TRIES = 64, NO = 7000000 }; /* keys a slot, until each set has been asked often enough */

size_t ts_slots_kept(struct ucmi_pool *p)
{
    size_t all = p->layout.nslots, had = 0, held = 0;
    uint32_t *slots = malloc(all * sizeof *slots);
    if (!slots)
        ts_die("no memory");
    ucmi_pool_sweep(p);
    ucmi_pool_sweep(p); /* what the first put into quarantine */
    for (size_t i = 0; i < all; i++)
        held += atomic_load(&p->metas[i].holders) != 0;
    for (size_t i = 0; had < all && i < TRIES * all; i++) {
        struct ucmi_pool_want want = {.key = ts_key(NO + i)};
        had += ucmi_pool_get(p, &want, UCMI_POOL_EVICT, &slots[had]) == UCMI_POOL_CLAIMED;
    }
    for (size_t i = 0; i < had; i++)
        ucmi_pool_drop(p, slots[i]);
    free(slots);
    return MAX(held, all - had);
}

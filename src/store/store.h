/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store.h - what the files of src/store share: the store itself, its tasks and maps, and the table
 * of everything that can be plugged in.
 */
#ifndef UCMI_STORE_H
#define UCMI_STORE_H

#include "base/base.h"
#include "store/seal.h"

enum {
    UCMI_MAX_TIERS = 4,
    UCMI_MAX_SHARDS = 480, /* what a slot header has room to check */
    UCMI_MAX_RANKS = 4096
};

/* plugin.c: every plugin there is, NULL-terminated; the finders ignore case and return NULL. */
extern const struct ucm_plugin *const ucmi_plugins[];
const struct ucm_tier_ops *ucmi_find_tier(const char *name);
const struct ucm_dev_ops *ucmi_find_dev(const char *name);

struct ucmi_store_options { /* the table is in store.c */
    const char *pipeline, *ns, *device, *key_file;
    int64_t block_size, shard_size, rank, ranks, timeout_ms, lookup_timeout_ms, device_id;
    int use_gdr;
};
extern const struct ucm_plugin ucmi_store_plugin;

struct ucm_store {
    struct ucm_geometry geo;
    struct ucmi_key key; /* integrity_key_file */
    struct ucm_counters counters;
    struct ucm_tier tiers[UCMI_MAX_TIERS]; /* [0] is the fastest */
    unsigned ntiers;                       /* how many are spelled */
    unsigned nopen;                        /* of them, from the last up, are open */
    struct ucmi_store_options *options;    /* owns the strings that geo points to */
    _Atomic uint64_t next_task;
    _Atomic bool closing;
    _Atomic int refs; /* its owner's, and one of each tier that could not end when it was closed */
};

struct ucm_map {
    ucm_store *store;
    _Atomic int refs; /* the caller's and one for each task on it */
    unsigned nshards, nsegs, blocks_per_key;
    uint32_t nblocks;
    struct ucm_seg segs[]; /* [nshards][nsegs] */
};

/* A tier that cannot end, because storage or a device does not give back what it was lent, keeps
 * its store. */
void ucmi_store_hold(const struct ucm_geometry *geo);
void ucmi_store_release(const struct ucm_geometry *geo);

const struct ucmi_key *ucmi_store_key(const struct ucm_geometry *geo);

void ucmi_map_ref(ucm_map *map);

/* Checks and counts an xfer in, hands it to the first tier. */
int ucmi_store_submit(ucm_store *store, struct ucm_xfer *x);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * manage.h - ucm_manage from within.
 *
 * manage.c       which namespaces, lanes and blocks; lanes that nobody owns
 * manage_ask.c   lanes with an owner, who is asked
 * manage_gc.c    segments, over all namespaces
 *
 * One thread, the caller's.  Lanes are seen through tables (table.h).  Only where something is to
 * be written there is a struct ucmi_posix, without a pump: the caller does what a pump does.
 */
#ifndef UCMI_MANAGE_H
#define UCMI_MANAGE_H

#include "store/posix.h"
#include "store/table.h"

enum { UCMI_MANAGE_BATCH = UCMI_COMPACT_SLACK / 4 };

struct ucmi_seen { /* a lane */
    char name[UCMI_LANE_NAME];
    int dir, err; /* err: of reading its journal */
    bool live, deaf, over;
    uint64_t segments; /* files */
    struct ucmi_table table;
    struct ucmi_lane *lane; /* NULL, or ours */
    struct ucm_manage_info info;
};
struct ucmi_space { /* a namespace */
    char name[33];
    int dir;
    bool known; /* head is of a lane of it */
    struct ucmi_journal_header *head;
    struct ucmi_seen *lanes;
    size_t nlanes;
    struct ucmi_index touches; /* lane 1, place: tick */
    struct ucm_store *store;   /* with p */
    struct ucmi_posix *p;
    struct ucmi_lane *mine; /* where requests are written */
};
struct ucmi_manager {
    const struct ucm_manage *how;
    const char *backend;
    struct ucmi_posix_options options;
    ucm_conf *conf; /* for the engine: the defaults */
    struct ucmi_key key;
    struct ucmi_seal seal;
    struct ucmi_space *spaces;
    size_t nspaces;
    void *buf;      /* UCMI_READ_BUF */
    uint32_t limit; /* RM: what was last used before this tick */
    uint32_t pin;   /* PIN: until this tick */
    bool failed;    /* out of memory */
    struct ucm_manage_total total;
};

/* ---- manage.c ---- */

/* Reads what is new in the lane's journal. */
int ucmi_seen_read(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn);
/* The tick of the last use that anybody has written down. */
uint32_t ucmi_last_use(const struct ucmi_space *sp, const struct ucmi_record *put);
bool ucmi_wanted(const struct ucmi_manager *m, const struct ucmi_space *sp,
                 const struct ucmi_seen *sn, const struct ucmi_record *put);
/* Makes sp->p. */
int ucmi_space_open(struct ucmi_manager *m, struct ucmi_space *sp);
/* Makes the lane ours: sn->lane.  -EAGAIN, -EBUSY: somebody lives there. */
int ucmi_seen_take(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn);
/* Lets go of it; of one that holds nothing nothing is left where `empty_too`. */
void ucmi_seen_drop(struct ucmi_space *sp, struct ucmi_seen *sn, bool empty_too);
/* Does what is wanted in a lane that is ours. */
int ucmi_manage_own(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn);
uint64_t ucmi_count_segments(int dir);

/* ---- manage_ask.c ---- */

struct ucmi_request {
    struct ucmi_seen *seen;
    struct ucmi_record r;
    uint64_t seq; /* of the PUT that is asked about */
    bool over;
};
struct ucmi_requests {
    struct ucmi_request *v;
    size_t n, cap;
};
/* Asks the owner of this lane for all that is wanted in it. */
void ucmi_ask_for(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_seen *sn,
                  struct ucmi_requests *q);
int ucmi_ask_add(struct ucmi_requests *q, struct ucmi_seen *sn, const struct ucmi_record *r,
                 uint64_t seq);
/* Sends them, waits for the answers, and counts them. */
void ucmi_ask_all(struct ucmi_manager *m, struct ucmi_space *sp, struct ucmi_requests *q);
void ucmi_ask_end(struct ucmi_space *sp);

/* ---- manage_gc.c ---- */

int ucmi_manage_gc(struct ucmi_manager *m);

#endif

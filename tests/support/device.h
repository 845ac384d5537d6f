/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device.h - the devices that tests run over: one row each.  Those of vendors are served by fakes
 * of the vendors' libraries (../fake), which LD_LIBRARY_PATH finds.
 */
#ifndef TS_DEVICE_H
#define TS_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../fake/fake.h"

/* What an engine does with a device that is neither the host nor a fake's. */
struct ts_engine {
    void *(*bytes_new)(size_t len); /* the host reaches them there */
    void (*bytes_free)(void *p);
    void *(*event_new)(void);
    void (*event_fire)(void *event);
    void (*event_free)(void *event);
};
struct ts_device {
    const char *name;               /* as the option `device` has it */
    const char *library;            /* of the fake; NULL: its memory is the host's */
    int id;                         /* as the option `device_id` has it */
    bool events;                    /* the engine hands over events */
    bool one_by_one;                /* no library of its vendor copies a batch with one call */
    const struct ts_engine *engine; /* or NULL */
};
extern struct ts_device ts_devices[]; /* with room for one more than there are */
extern size_t ts_ndevices;
const struct ts_device *ts_device(const char *name);
/* The fake behind it, or NULL. */
const struct fake *ts_fake(const struct ts_device *d);
struct fake ts_fake_in(const char *library);

struct ts_bytes {
    uint8_t *at;   /* as the device knows them */
    uint8_t *view; /* where the test, in the engine's place, reaches them */
    size_t len;
};
struct ts_bytes ts_bytes_new(const struct ts_device *d, size_t len);
void ts_bytes_free(const struct ts_device *d, struct ts_bytes *b);
/* An event of the engine that comes when it is fired. */
void *ts_event_new(const struct ts_device *d);
void ts_event_fire(const struct ts_device *d, void *event);
/* Until n streams are to wait for it, and, with a fake, so many copies are queued in all, and what
 * could be done without it is done. */
void ts_event_await(const struct ts_device *d, void *event, unsigned n, unsigned long copies);
void ts_event_free(const struct ts_device *d, void *event);

#endif

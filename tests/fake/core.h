/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core.h - the device that all fakes share, as its skins (cuda.c, runtime.c, acl.c), which speak
 * like a vendor's library, see it.
 */
#ifndef FAKE_CORE_H
#define FAKE_CORE_H

#include <stdbool.h>
#include <stdint.h>

#include "fake.h"

#define EXPORT __attribute__((visibility("default")))
enum { FAKE_DEVICES = 2 };

/* Whether a thread that has set no device has the first one. */
extern const bool core_implicit;

/* Errors, in no vendor's numbers: each skin has a table of them. */
enum fake_error {
    FAKE_OK,
    FAKE_INVALID,
    FAKE_NO_CONTEXT,
    FAKE_REGISTERED,     /* host memory already is */
    FAKE_NOT_REGISTERED, /* or is not, from there on */
    FAKE_ERRORS,
};

/* Each function of a skin begins so: 0, or the number it is to fail with. */
int core_enter(const char *name);
void core_forget_calls(void);
int core_broken(void); /* what fake_break was given */
bool core_is_there(const char *p, size_t len);
void core_die(const char *fmt, ...) __attribute__((noreturn, format(printf, 1, 2)));

void core_set(int ordinal); /* < 0: no context */
int core_current(void);
void core_retain(int ordinal, int by);
void *fake_malloc(int ordinal, size_t len);
void fake_mfree(void *p);
enum fake_error core_pin(void *p, size_t len);
enum fake_error core_unpin(void *p);
bool core_is_registered(const void *p); /* from there on */
bool core_aliased(void);                /* fake_alias */
enum fake_error core_stream_new(void **stream_p);
int core_stream_sync(void *stream); /* 0, or core_broken() */
void core_stream_free(void *stream);
/* to_host < 0: as the addresses say. */
enum fake_error core_copy(void *stream, int to_host, void *to, const void *from, size_t len);
enum fake_error core_event_new(void **event_p);
void core_event_free(void *event);
enum fake_error core_event_record(void *event, void *stream);
enum fake_error core_event_wait(void *stream, void *event);
int core_event_sync(void *event);

/* What the skins are made of: a function of the vendor's, and its beginning. */
#define CALL(name, ...)                                                                            \
    EXPORT int name(__VA_ARGS__);                                                                  \
    EXPORT int name(__VA_ARGS__)
#define ENTER                                                                                      \
    do {                                                                                           \
        int code_ = core_enter(__func__);                                                          \
        if (code_)                                                                                 \
            return code_;                                                                          \
    } while (0)

#endif

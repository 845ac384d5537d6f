/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake.h - what a test tells a fake of a vendor's library, and asks of it.  The library is found
 * and called by ucm as the real one would be; a test finds these by dlsym in the same library
 * (support/device.c).
 *
 * The fake is a device at its strictest.  Its memory is where the host faults; each stream is a
 * thread; and what no program may do ends the program with a line that says what: a copy from or to
 * memory that is not there, was given back, or reaches beyond what was allocated or registered at
 * once; memory of the host that is registered before it is there; an event, stream or context used
 * after its end, or in a thread that has not set it; a batch whose source may be read before its
 * turn.  It makes no stream that waits for the engine's default one, and no event that keeps who
 * waits for it busy.  On request also: bytes of the host that
 * change between the call that queued their copy and the copy.
 */
#ifndef FAKE_H
#define FAKE_H

#include <stddef.h>

#define FAKE_CALLS(X)                                                                              \
    /* Memory of a device; where the test, in the engine's place, reaches it. */                   \
    X(void *, fake_malloc, (int ordinal, size_t len))                                              \
    X(void, fake_mfree, (void *p))                                                                 \
    X(void *, fake_view, (void *p))                                                                \
    /* From there on it was allocated by itself, and only happens to adjoin. */                    \
    X(void, fake_cut, (void *p))                                                                   \
    /* An event of the engine that has been recorded, and comes when it is fired. */               \
    X(void *, fake_event, (void))                                                                  \
    X(void, fake_fire, (void *event))                                                              \
    X(void, fake_event_end, (void *event))                                                         \
    /* Streams stand still before what is queued next, until they may go on. */                    \
    X(void, fake_hold, (int on))                                                                   \
    /* Returns when so many copies have been queued in all, and each stream has done all it can:   \
     * it is empty, held, or waits for an event. */                                                \
    X(void, fake_settle, (unsigned long copies))                                                   \
    /* The nth call from now on whose name ends with one of the words (joined by |) fails.  NULL:  \
     * the nth of all, and what was to fail before does not; nth 0: none. */                       \
    X(void, fake_fail, (const char *words, unsigned long nth, int code))                           \
    /* Such calls do not go on until this is called with NULL. */                                  \
    X(void, fake_hang, (const char *words))                                                        \
    /* All calls fail until this is called with 0; what is queued is lost. */                      \
    X(void, fake_break, (int code))                                                                \
    X(void, fake_strict, (int on))                                                                 \
    /* The device has registered memory at addresses of its own. */                                \
    X(void, fake_alias, (int on))                                                                  \
    X(void, fake_context, (int ordinal)) /* sets the thread's; < 0: none */                        \
    X(int, fake_context_is, (int ordinal))                                                         \
    /* How often such functions were called (NULL: all of them), and some more to be counted. */   \
    X(unsigned long, fake_calls, (const char *words))                                              \
    X(void, fake_await, (const char *words, unsigned long calls)) /* so many, at least */          \
    X(const char *, fake_called, (unsigned i))       /* the names, in order; NULL: no more */      \
    X(unsigned long, fake_count, (const char *what)) /* see core.c */                              \
    X(void, fake_reset, (void))                      /* counts begin again */                      \
    /* Says what was not given back; returns how many things. */                                   \
    X(int, fake_leaks, (void))

struct fake {
#define X(type, name, args) type(*name) args;
    FAKE_CALLS(X)
#undef X
};

#endif

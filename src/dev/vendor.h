/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vendor.h - what the devices of all vendors share: the vendor's library is found at run time, and
 * its calls are put into one shape.
 *
 * A device of a vendor is a struct ucmi_vendor: the names of its library and of the functions that
 * are wanted of it, and a few hooks where the vendors differ.  vendor.c makes a ucm_dev_ops of it.
 * The calls return 0 or the vendor's own error number, which only vendor.c turns into ours.
 *
 * No header of a vendor is needed to compile this: what is declared here is what their libraries
 * have exported for years, by name and type.
 */
#ifndef UCMI_VENDOR_H
#define UCMI_VENDOR_H

#include "dev/dev.h"

enum { UCMI_BATCH = 1024 }; /* copies in one call: three arrays of them are on a stack */

/* The private state of a vendor's device begins with this. */
struct ucmi_gpu {
    const struct ucmi_vendor *vendor;
    void *library;
    int ordinal;
    void *context;        /* what a thread must have set before it calls; see use */
    _Atomic bool batches; /* the library copies a whole vector with one call */
    struct {              /* the calls that are alike in all libraries */
        int (*stream_free)(void *stream);
        int (*stream_sync)(void *stream);
        int (*event_new)(void **event, unsigned flags);
        int (*event_record)(void *event, void *stream);
        int (*event_sync)(void *event);
        int (*event_free)(void *event);
        int (*unpin)(void *p);
    } call;
};

struct ucmi_symbol {
    const char *name; /* less the vendor's prefix; ends with a NULL name */
    size_t at;        /* of the function pointer in the private state */
    bool optional;    /* newer libraries have it */
};
/* Rows of a table of symbols for a state of that type. */
#define UCMI_NEEDS(type, member, name)                                                             \
    {                                                                                              \
        name, offsetof(type, member), false                                                        \
    }
#define UCMI_MAY_HAVE(type, member, name)                                                          \
    {                                                                                              \
        name, offsetof(type, member), true                                                         \
    }

struct ucmi_code {
    int code, err; /* of the vendor's errors those that are more than -EIO; ends with err 0 */
};

struct ucmi_vendor {
    const char *name;
    size_t size;              /* of the private state */
    const char *libraries[4]; /* names to try, up to NULL */
    const char *prefix;
    const struct ucmi_symbol *symbols;
    const struct ucmi_code *codes;
    unsigned event_flags; /* for event_new: no timing, and who waits for it sleeps */

    /* Also makes the library ready for use, and sets g->batches. */
    int (*count)(struct ucmi_gpu *g, int *n_p);
    /* Sets g->context to that of g->ordinal, which the engine uses as well; the thread keeps its
     * own. */
    int (*acquire)(struct ucmi_gpu *g);
    void (*release)(struct ucmi_gpu *g);
    int (*current)(struct ucmi_gpu *g, void **context_p); /* the thread's */
    int (*use)(struct ucmi_gpu *g, void *context);        /* makes it the thread's */
    int (*pin)(struct ucmi_gpu *g, void *p, size_t len);
    int (*stream_new)(struct ucmi_gpu *g, void **stream_p);
    int (*copy)(struct ucmi_gpu *g, void *stream, int to_host, const struct ucm_copy *c);
    /* As many as UCMI_BATCH; no_batch: the error with which a library says that it only has the
     * function. */
    int (*batch)(struct ucmi_gpu *g, void *stream, int to_host, const struct ucm_copy *v, size_t n);
    int no_batch;
    int (*wait)(struct ucmi_gpu *g, void *stream, void *event);
    const char *(*text)(struct ucmi_gpu *g, int code);           /* of an error, or NULL */
    void (*version)(struct ucmi_gpu *g, char *text, size_t len); /* for people; optional */
};

int ucmi_gpu_probe(const struct ucmi_vendor *vendor, char *text, size_t len);
int ucmi_gpu_open(struct ucmi_gpu *g, const struct ucmi_vendor *vendor, int ordinal, char *why,
                  size_t why_len);
void ucmi_gpu_close(void *d);
int ucmi_gpu_pin(void *d, void *p, size_t len);
void ucmi_gpu_unpin(void *d, void *p, size_t len);
int ucmi_gpu_stream_new(void *d, void **stream_p);
void ucmi_gpu_stream_free(void *d, void *stream);
int ucmi_gpu_copy(void *d, void *stream, int to_host, const struct ucm_copy *v, size_t n);
int ucmi_gpu_after(void *d, void *stream, void *event);
int ucmi_gpu_then(void *d, void *stream, void (*fn)(void *arg, int err), void *arg);

/* Defines ucmi_dev_<word>, the device of a vendor; what it alone has comes last. */
#define UCMI_VENDOR_DEVICE(word, type, vendor_, help_, ...)                                        \
    static int word##_probe(char *text, size_t len)                                                \
    {                                                                                              \
        return ucmi_gpu_probe(&(vendor_), text, len);                                              \
    }                                                                                              \
    static int word##_open(void *d, int ordinal, char *why, size_t why_len)                        \
    {                                                                                              \
        return ucmi_gpu_open(d, &(vendor_), ordinal, why, why_len);                                \
    }                                                                                              \
    const struct ucm_dev_ops ucmi_dev_##word = {                                                   \
        .p = {.kind = "device", .name = #word, .help = help_, .size = sizeof(type)},               \
        .probe = word##_probe,                                                                     \
        .open = word##_open,                                                                       \
        .close = ucmi_gpu_close,                                                                   \
        .pin = ucmi_gpu_pin,                                                                       \
        .unpin = ucmi_gpu_unpin,                                                                   \
        .stream_new = ucmi_gpu_stream_new,                                                         \
        .stream_free = ucmi_gpu_stream_free,                                                       \
        .copy = ucmi_gpu_copy,                                                                     \
        .after = ucmi_gpu_after,                                                                   \
        .then = ucmi_gpu_then,                                                                     \
        __VA_ARGS__}

#endif

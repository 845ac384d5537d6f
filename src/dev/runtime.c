/* SPDX-License-Identifier: Apache-2.0 */
/*
 * runtime.c - vendors whose runtime library is CUDA's with another prefix: Moore Threads (MUSA),
 * MetaX (MACA), AMD (HIP); and CUDA's own, for machines whose driver can only be reached by it.
 *
 * Such a library has no contexts to hand out but a device a thread, the first one by default; the
 * engine's things and ours are on it together.  A vendor is its prefix and its library's names.
 */
#include "dev/vendor.h"

enum {
    TO_DEVICE = 1, /* kinds of copies */
    TO_HOST = 2,
    STREAM_NON_BLOCKING = 1,
    EVENT_BLOCKING_SYNC = 1,
    EVENT_DISABLE_TIMING = 2,
    REGISTER_PORTABLE = 1,
};

struct runtime {
    struct ucmi_gpu g;
    int (*count)(int *n);
    int (*get_device)(int *ordinal);
    int (*set_device)(int ordinal);
    int (*pin)(void *p, size_t len, unsigned flags);
    int (*stream_new)(void **stream, unsigned flags);
    int (*wait)(void *stream, void *event, unsigned flags);
    int (*copy)(void *to, const void *from, size_t len, int kind, void *stream);
    const char *(*text)(int code);
};
#define NEEDS(member, name) UCMI_NEEDS(struct runtime, member, name)

static const struct ucmi_symbol symbols[] = {
    NEEDS(count, "GetDeviceCount"),
    NEEDS(get_device, "GetDevice"),
    NEEDS(set_device, "SetDevice"),
    NEEDS(pin, "HostRegister"),
    NEEDS(g.call.unpin, "HostUnregister"),
    NEEDS(stream_new, "StreamCreateWithFlags"),
    NEEDS(g.call.stream_sync, "StreamSynchronize"),
    NEEDS(g.call.stream_free, "StreamDestroy"),
    NEEDS(wait, "StreamWaitEvent"),
    NEEDS(g.call.event_new, "EventCreateWithFlags"),
    NEEDS(g.call.event_record, "EventRecord"),
    NEEDS(g.call.event_sync, "EventSynchronize"),
    NEEDS(g.call.event_free, "EventDestroy"),
    NEEDS(copy, "MemcpyAsync"),
    NEEDS(text, "GetErrorString"),
    {NULL},
};

static const struct ucmi_code codes[] = {
    {1, -EINVAL},   /* InvalidValue */
    {2, -ENOMEM},   /* MemoryAllocation */
    {100, -ENODEV}, /* NoDevice */
    {101, -ENODEV}, /* InvalidDevice */
    {0, 0},
};

/* A device's number in the place of a context. */
static void *context_of(int ordinal)
{
    return (void *)(intptr_t)ordinal;
}

static int runtime_count(struct ucmi_gpu *g, int *n_p)
{
    return ((struct runtime *)g)->count(n_p);
}

static int runtime_acquire(struct ucmi_gpu *g)
{
    g->context = context_of(g->ordinal);
    return 0;
}

/* What the engine uses as well is given back with the process. */
static void runtime_release(struct ucmi_gpu *g)
{
}

static int runtime_current(struct ucmi_gpu *g, void **context_p)
{
    int ordinal, code = ((struct runtime *)g)->get_device(&ordinal);
    if (!code)
        *context_p = context_of(ordinal);
    return code;
}

static int runtime_use(struct ucmi_gpu *g, void *context)
{
    return ((struct runtime *)g)->set_device((int)(intptr_t)context);
}

static int runtime_pin(struct ucmi_gpu *g, void *p, size_t len)
{
    return ((struct runtime *)g)->pin(p, len, REGISTER_PORTABLE);
}

static int runtime_stream_new(struct ucmi_gpu *g, void **stream_p)
{
    return ((struct runtime *)g)->stream_new(stream_p, STREAM_NON_BLOCKING);
}

static int runtime_wait(struct ucmi_gpu *g, void *stream, void *event)
{
    return ((struct runtime *)g)->wait(stream, event, 0);
}

static int runtime_copy(struct ucmi_gpu *g, void *stream, int to_host, const struct ucm_copy *c)
{
    struct runtime *r = (struct runtime *)g;
    return to_host ? r->copy(c->host, c->dev, c->len, TO_HOST, stream)
                   : r->copy(c->dev, c->host, c->len, TO_DEVICE, stream);
}

static const char *runtime_text(struct ucmi_gpu *g, int code)
{
    return ((struct runtime *)g)->text(code);
}

#define RUNTIME(word, prefix_, help, ...)                                                          \
    static const struct ucmi_vendor word##_vendor = {                                              \
        .name = #word,                                                                             \
        .size = sizeof(struct runtime),                                                            \
        .libraries = {__VA_ARGS__},                                                                \
        .prefix = prefix_,                                                                         \
        .symbols = symbols,                                                                        \
        .codes = codes,                                                                            \
        .event_flags = EVENT_BLOCKING_SYNC | EVENT_DISABLE_TIMING,                                 \
        .count = runtime_count,                                                                    \
        .acquire = runtime_acquire,                                                                \
        .release = runtime_release,                                                                \
        .current = runtime_current,                                                                \
        .use = runtime_use,                                                                        \
        .pin = runtime_pin,                                                                        \
        .stream_new = runtime_stream_new,                                                          \
        .copy = runtime_copy,                                                                      \
        .wait = runtime_wait,                                                                      \
        .text = runtime_text,                                                                      \
    };                                                                                             \
    UCMI_VENDOR_DEVICE(word, struct runtime, word##_vendor, help)

RUNTIME(musa, "musa", "Moore Threads GPUs", "libmusart.so");
RUNTIME(maca, "mc", "MetaX GPUs", "libmcruntime.so");
RUNTIME(hip, "hip", "AMD GPUs", "libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6");
RUNTIME(cudart, "cuda", "NVIDIA GPUs, by CUDA's runtime library", "libcudart.so", "libcudart.so.13",
        "libcudart.so.12");

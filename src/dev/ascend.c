/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ascend.c - Huawei's NPUs, by the library of CANN.  Every thread needs a context; ours is the
 * device's default one, the engine's.
 *
 * CANN can call back when a stream has come to a place, but needs a thread that asks it for such
 * reports again and again; a thread that sleeps on an event, as for all vendors here, costs less.
 * Newer generations have functions that older ones have not: batches of copies (8.5, and once more
 * with an argument less), registration that pins, streams that are quick to launch.
 */
#include "dev/vendor.h"

enum {
    ALREADY_INITIALISED = 100002,
    NOT_SUPPORTED = 207000,
    TO_DEVICE = 1, /* kinds of copies */
    TO_HOST = 2,
    REGISTER_MAPPED = 0,                /* the older call's only type */
    REGISTER_PINNED = 0x10000000 | 0x2, /* the newer one's: pinned, and mapped */
    STREAM_FAST = 1 | 2,                /* to launch, to wait for */
    EVENT_PROGRESS = 2, /* says how far a stream is; of those there are as many as one likes */
    ON_HOST = 0,
    ON_DEVICE = 1,
};

struct location { /* the other way round than CUDA's */
    uint32_t id;
    int type;
};
struct attributes {
    struct location target, source;
    uint8_t reserved[16];
};

struct ascend {
    struct ucmi_gpu g;
    int (*init)(const char *config);
    int (*count)(uint32_t *n);
    int (*set_device)(int32_t ordinal);
    int (*get_context)(void **context);
    int (*set_context)(void *context);
    int (*pin)(void *p, uint64_t len, int type, void **dev);
    int (*pin_2)(void *p, uint64_t len, uint32_t flags);
    int (*stream_new)(void **stream);
    int (*stream_new_2)(void **stream, uint32_t priority, uint32_t flags);
    int (*wait)(void *stream, void *event);
    int (*copy)(void *to, size_t room, const void *from, size_t len, int kind, void *stream);
    int (*batch)(void **to, size_t *room, void **from, size_t *len, size_t n,
                 struct attributes *attributes, size_t *first, size_t nattributes, size_t *failed,
                 void *stream);
    int (*batch_2)(void **to, size_t *room, void **from, size_t *len, size_t n,
                   struct attributes *attributes, size_t *first, size_t nattributes, void *stream);
    const char *(*text)(void);
};
#define NEEDS(member, name)    UCMI_NEEDS(struct ascend, member, name)
#define MAY_HAVE(member, name) UCMI_MAY_HAVE(struct ascend, member, name)

static const struct ucmi_symbol symbols[] = {
    NEEDS(init, "Init"),
    NEEDS(count, "rtGetDeviceCount"),
    NEEDS(set_device, "rtSetDevice"),
    NEEDS(get_context, "rtGetCurrentContext"),
    NEEDS(set_context, "rtSetCurrentContext"),
    NEEDS(pin, "rtHostRegister"),
    MAY_HAVE(pin_2, "rtHostRegisterV2"),
    NEEDS(g.call.unpin, "rtHostUnregister"),
    NEEDS(stream_new, "rtCreateStream"),
    MAY_HAVE(stream_new_2, "rtCreateStreamWithConfig"),
    NEEDS(g.call.stream_sync, "rtSynchronizeStream"),
    NEEDS(g.call.stream_free, "rtDestroyStream"),
    NEEDS(wait, "rtStreamWaitEvent"),
    NEEDS(g.call.event_new, "rtCreateEventExWithFlag"),
    NEEDS(g.call.event_record, "rtRecordEvent"),
    NEEDS(g.call.event_sync, "rtSynchronizeEvent"),
    NEEDS(g.call.event_free, "rtDestroyEvent"),
    NEEDS(copy, "rtMemcpyAsync"),
    MAY_HAVE(batch, "rtMemcpyBatchAsync"),
    MAY_HAVE(batch_2, "rtMemcpyBatchAsyncV2"),
    MAY_HAVE(text, "GetRecentErrMsg"),
    {NULL},
};

static const struct ucmi_code codes[] = {
    {100000, -EINVAL},         /* INVALID_PARAM */
    {107001, -ENODEV},         /* INVALID_DEVICEID */
    {200000, -ENOMEM},         /* BAD_ALLOC */
    {207001, -ENOMEM},         /* MEMORY_ALLOCATION */
    {NOT_SUPPORTED, -ENOTSUP}, /* FEATURE_NOT_SUPPORT */
    {0, 0},
};

static int ascend_count(struct ucmi_gpu *g, int *n_p)
{
    struct ascend *a = (struct ascend *)g;
    uint32_t n = 0;
    g->batches = a->batch || a->batch_2;
    int code = a->init(NULL);
    if (!code || code == ALREADY_INITIALISED)
        code = a->count(&n);
    *n_p = (int)n;
    return code;
}

/* A thread that has none gets an error for an answer. */
static int ascend_current(struct ucmi_gpu *g, void **context_p)
{
    if (((struct ascend *)g)->get_context(context_p))
        *context_p = NULL;
    return 0;
}

/* None cannot be set: such a thread keeps ours. */
static int ascend_use(struct ucmi_gpu *g, void *context)
{
    return context ? ((struct ascend *)g)->set_context(context) : 0;
}

static int ascend_acquire(struct ucmi_gpu *g)
{
    struct ascend *a = (struct ascend *)g;
    void *was;
    ascend_current(g, &was);
    int code = a->set_device(g->ordinal);
    if (!code)
        code = a->get_context(&g->context);
    ascend_use(g, was);
    return code;
}

/* To give a device back may end what the engine has on it; the end of the process does. */
static void ascend_release(struct ucmi_gpu *g)
{
}

static int ascend_pin(struct ucmi_gpu *g, void *p, size_t len)
{
    struct ascend *a = (struct ascend *)g;
    void *dev;
    if (a->pin_2 && !a->pin_2(p, len, REGISTER_PINNED))
        return 0;
    return a->pin(p, len, REGISTER_MAPPED, &dev); /* not all devices that have the newer pin */
}

static int ascend_stream_new(struct ucmi_gpu *g, void **stream_p)
{
    struct ascend *a = (struct ascend *)g;
    return a->stream_new_2 ? a->stream_new_2(stream_p, 0, STREAM_FAST) : a->stream_new(stream_p);
}

static int ascend_wait(struct ucmi_gpu *g, void *stream, void *event)
{
    return ((struct ascend *)g)->wait(stream, event);
}

static int ascend_copy(struct ucmi_gpu *g, void *stream, int to_host, const struct ucm_copy *c)
{
    struct ascend *a = (struct ascend *)g;
    return to_host ? a->copy(c->host, c->len, c->dev, c->len, TO_HOST, stream)
                   : a->copy(c->dev, c->len, c->host, c->len, TO_DEVICE, stream);
}

static int ascend_batch(struct ucmi_gpu *g, void *stream, int to_host, const struct ucm_copy *v,
                        size_t n)
{
    struct ascend *a = (struct ascend *)g;
    struct location host = {0, ON_HOST}, dev = {(uint32_t)g->ordinal, ON_DEVICE};
    struct attributes how = {.target = to_host ? host : dev, .source = to_host ? dev : host};
    void *to[UCMI_BATCH], *from[UCMI_BATCH];
    size_t len[UCMI_BATCH], first = 0, failed;
    for (size_t i = 0; i < n; i++) {
        to[i] = to_host ? v[i].host : v[i].dev;
        from[i] = to_host ? v[i].dev : v[i].host;
        len[i] = v[i].len;
    }
    return a->batch_2 ? a->batch_2(to, len, from, len, n, &how, &first, 1, stream)
                      : a->batch(to, len, from, len, n, &how, &first, 1, &failed, stream);
}

static const char *ascend_text(struct ucmi_gpu *g, int code)
{
    struct ascend *a = (struct ascend *)g;
    return a->text ? a->text() : NULL;
}

static const struct ucmi_vendor vendor = {
    .name = "ascend",
    .size = sizeof(struct ascend),
    .libraries = {"libascendcl.so"},
    .prefix = "acl",
    .symbols = symbols,
    .codes = codes,
    .event_flags = EVENT_PROGRESS,
    .count = ascend_count,
    .acquire = ascend_acquire,
    .release = ascend_release,
    .current = ascend_current,
    .use = ascend_use,
    .pin = ascend_pin,
    .stream_new = ascend_stream_new,
    .copy = ascend_copy,
    .batch = ascend_batch,
    .no_batch = NOT_SUPPORTED,
    .wait = ascend_wait,
    .text = ascend_text,
};
UCMI_VENDOR_DEVICE(ascend, struct ascend, vendor, "Ascend NPUs");

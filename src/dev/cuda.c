/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda.c - NVIDIA, by the driver's own library, which is on every machine that has the driver. The
 * context is the device's primary one: the engine's.
 *
 * A batch of copies is one call where the driver is new enough.  That function came with CUDA 12.8
 * and lost an argument in 13.0; the two are told apart by their exported names, for the address
 * that cuGetProcAddress gives depends on the version of the driver, and does not say which of them
 * it is.  Copies keep the stream's order, so the source is read in that order too, though nothing
 * of ours would need it: that is the contract of a stream.
 *
 * A batch takes addresses as the device knows them, and fails later, with all that is queued, where
 * registered memory has others for it than for the host (WSL 2): there is no batch then.
 */
#include "dev/vendor.h"

#include <stdio.h>

enum {
    NOT_SUPPORTED = 801,
    HOST_ADDRESSES = 91,     /* attribute: registered memory has one address for host and device */
    STREAM_NON_BLOCKING = 1, /* does not wait for the engine's default stream */
    EVENT_BLOCKING_SYNC = 1, /* who waits for it sleeps */
    EVENT_DISABLE_TIMING = 2,
    REGISTER_PORTABLE = 1,
    ACCESS_STREAM = 1,     /* a source is read when the copy's turn on the stream has come */
    OVERLAP_PREFERRED = 1, /* leave the processors to the engine */
};

struct location {
    int type, id;
};
struct attributes {
    int access;
    struct location source, target; /* hints for managed memory, which this is not */
    unsigned flags;
};

struct cuda {
    struct ucmi_gpu g;
    int (*init)(unsigned flags);
    int (*version)(int *version);
    int (*count)(int *n);
    int (*device)(int *device, int ordinal);
    int (*attribute)(int *value, int attribute, int device);
    int (*retain)(void **context, int device);
    int (*release)(int device);
    int (*get_current)(void **context);
    int (*set_current)(void *context);
    int (*pin)(void *p, size_t len, unsigned flags);
    int (*stream_new)(void **stream, unsigned flags);
    int (*wait)(void *stream, void *event, unsigned flags);
    int (*to_device)(uint64_t to, const void *from, size_t len, void *stream);
    int (*to_host)(void *to, uint64_t from, size_t len, void *stream);
    int (*batch)(uint64_t *to, uint64_t *from, size_t *len, size_t n, struct attributes *attributes,
                 size_t *first, size_t nattributes, void *stream);
    int (*batch_12)(uint64_t *to, uint64_t *from, size_t *len, size_t n,
                    struct attributes *attributes, size_t *first, size_t nattributes,
                    size_t *failed, void *stream);
    int (*text)(int code, const char **text);
    int handle; /* of the device */
};
#define NEEDS(member, name)    UCMI_NEEDS(struct cuda, member, name)
#define MAY_HAVE(member, name) UCMI_MAY_HAVE(struct cuda, member, name)

static const struct ucmi_symbol symbols[] = {
    NEEDS(init, "Init"),
    NEEDS(version, "DriverGetVersion"),
    NEEDS(count, "DeviceGetCount"),
    NEEDS(device, "DeviceGet"),
    NEEDS(attribute, "DeviceGetAttribute"),
    NEEDS(retain, "DevicePrimaryCtxRetain"),
    NEEDS(release, "DevicePrimaryCtxRelease_v2"),
    NEEDS(get_current, "CtxGetCurrent"),
    NEEDS(set_current, "CtxSetCurrent"),
    NEEDS(pin, "MemHostRegister_v2"),
    NEEDS(g.call.unpin, "MemHostUnregister"),
    NEEDS(stream_new, "StreamCreate"),
    NEEDS(g.call.stream_sync, "StreamSynchronize"),
    NEEDS(g.call.stream_free, "StreamDestroy_v2"),
    NEEDS(wait, "StreamWaitEvent"),
    NEEDS(g.call.event_new, "EventCreate"),
    NEEDS(g.call.event_record, "EventRecord"),
    NEEDS(g.call.event_sync, "EventSynchronize"),
    NEEDS(g.call.event_free, "EventDestroy_v2"),
    NEEDS(to_device, "MemcpyHtoDAsync_v2"),
    NEEDS(to_host, "MemcpyDtoHAsync_v2"),
    MAY_HAVE(batch, "MemcpyBatchAsync_v2"),
    MAY_HAVE(batch_12, "MemcpyBatchAsync"),
    NEEDS(text, "GetErrorString"),
    {NULL},
};

static const struct ucmi_code codes[] = {
    {1, -EINVAL},   /* INVALID_VALUE */
    {2, -ENOMEM},   /* OUT_OF_MEMORY */
    {34, -ENODEV},  /* STUB_LIBRARY */
    {100, -ENODEV}, /* NO_DEVICE */
    {101, -ENODEV}, /* INVALID_DEVICE */
    {NOT_SUPPORTED, -ENOTSUP},
    {0, 0},
};

static int cuda_count(struct ucmi_gpu *g, int *n_p)
{
    struct cuda *c = (struct cuda *)g;
    g->batches = c->batch || c->batch_12;
    int code = c->init(0);
    return code ? code : c->count(n_p);
}

static int cuda_acquire(struct ucmi_gpu *g)
{
    struct cuda *c = (struct cuda *)g;
    int code = c->device(&c->handle, g->ordinal), same = 0;
    if (code)
        return code;
    if (c->attribute(&same, HOST_ADDRESSES, c->handle) || !same)
        g->batches = false;
    return c->retain(&g->context, c->handle);
}

static void cuda_release(struct ucmi_gpu *g)
{
    struct cuda *c = (struct cuda *)g;
    c->release(c->handle);
}

static int cuda_current(struct ucmi_gpu *g, void **context_p)
{
    return ((struct cuda *)g)->get_current(context_p);
}

static int cuda_use(struct ucmi_gpu *g, void *context)
{
    return ((struct cuda *)g)->set_current(context);
}

static int cuda_pin(struct ucmi_gpu *g, void *p, size_t len)
{
    return ((struct cuda *)g)->pin(p, len, REGISTER_PORTABLE);
}

static int cuda_stream_new(struct ucmi_gpu *g, void **stream_p)
{
    return ((struct cuda *)g)->stream_new(stream_p, STREAM_NON_BLOCKING);
}

static int cuda_wait(struct ucmi_gpu *g, void *stream, void *event)
{
    return ((struct cuda *)g)->wait(stream, event, 0);
}

static int cuda_copy(struct ucmi_gpu *g, void *stream, int to_host, const struct ucm_copy *one)
{
    struct cuda *c = (struct cuda *)g;
    uint64_t dev = (uintptr_t)one->dev;
    return to_host ? c->to_host(one->host, dev, one->len, stream)
                   : c->to_device(dev, one->host, one->len, stream);
}

static int cuda_batch(struct ucmi_gpu *g, void *stream, int to_host, const struct ucm_copy *v,
                      size_t n)
{
    struct cuda *c = (struct cuda *)g;
    struct attributes how = {.access = ACCESS_STREAM, .flags = OVERLAP_PREFERRED};
    uint64_t to[UCMI_BATCH], from[UCMI_BATCH];
    size_t len[UCMI_BATCH], first = 0, failed;
    for (size_t i = 0; i < n; i++) {
        uint64_t dev = (uintptr_t)v[i].dev, host = (uintptr_t)v[i].host;
        to[i] = to_host ? host : dev;
        from[i] = to_host ? dev : host;
        len[i] = v[i].len;
    }
    return c->batch ? c->batch(to, from, len, n, &how, &first, 1, stream)
                    : c->batch_12(to, from, len, n, &how, &first, 1, &failed, stream);
}

static const char *cuda_text(struct ucmi_gpu *g, int code)
{
    const char *text = NULL;
    ((struct cuda *)g)->text(code, &text);
    return text;
}

static void cuda_version(struct ucmi_gpu *g, char *text, size_t len)
{
    int version = 0;
    ((struct cuda *)g)->version(&version);
    snprintf(text, len, "CUDA %d.%d", version / 1000, version % 1000 / 10);
}

static const struct ucmi_vendor vendor = {
    .name = "cuda",
    .size = sizeof(struct cuda),
    .libraries = {"libcuda.so.1"},
    .prefix = "cu",
    .symbols = symbols,
    .codes = codes,
    .event_flags = EVENT_BLOCKING_SYNC | EVENT_DISABLE_TIMING,
    .count = cuda_count,
    .acquire = cuda_acquire,
    .release = cuda_release,
    .current = cuda_current,
    .use = cuda_use,
    .pin = cuda_pin,
    .stream_new = cuda_stream_new,
    .copy = cuda_copy,
    .batch = cuda_batch,
    .no_batch = NOT_SUPPORTED,
    .wait = cuda_wait,
    .text = cuda_text,
    .version = cuda_version,
};
UCMI_VENDOR_DEVICE(cuda, struct cuda, vendor, "NVIDIA GPUs", .direct = ucmi_cufile_probe);

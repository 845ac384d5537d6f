/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A fake libcuda.so.1.  GENERATION: 0 is CUDA 12.4, without batches of copies; 1 is 12.8, whose
 * function has an argument that was dropped in 13.0; 2 is 13.0, which has both.  Of memory that is
 * not registered it takes no batch.
 */
#include "core.h"

static const int codes[FAKE_ERRORS] = {[FAKE_INVALID] = 1,
                                       [FAKE_NO_CONTEXT] = 201,
                                       [FAKE_REGISTERED] = 712,
                                       [FAKE_NOT_REGISTERED] = 713};
const bool core_implicit = false;
static char contexts[FAKE_DEVICES];
static _Atomic bool ready;
#define READY                                                                                      \
    ENTER;                                                                                         \
    if (!ready)                                                                                    \
    return 3

CALL(cuInit, unsigned flags)
{
    ENTER;
    ready = true;
    return flags ? 1 : 0;
}
CALL(cuDriverGetVersion, int *version)
{
    ENTER;
    *version = (const int[]){12040, 12080, 13000}[GENERATION];
    return 0;
}
CALL(cuDeviceGetCount, int *n)
{
    READY;
    *n = FAKE_DEVICES;
    return 0;
}
CALL(cuDeviceGet, int *device, int ordinal)
{
    READY;
    *device = ordinal + 70; /* a handle, not the ordinal */
    return ordinal < 0 || ordinal >= FAKE_DEVICES ? 101 : 0;
}
CALL(cuDeviceGetAttribute, int *value, int attribute, int device)
{
    READY;
    if (attribute != 91 || device < 70 || device >= 70 + FAKE_DEVICES)
        return 1;
    *value = !core_aliased();
    return 0;
}
CALL(cuDevicePrimaryCtxRetain, void **context, int device)
{
    READY;
    if (device < 70 || device >= 70 + FAKE_DEVICES)
        return 101;
    core_retain(device - 70, 1);
    *context = &contexts[device - 70];
    return 0;
}
CALL(cuDevicePrimaryCtxRelease_v2, int device)
{
    int code =
        core_enter(__func__); /* what gives something back says that it failed, and does it */
    if (device < 70 || device >= 70 + FAKE_DEVICES)
        return 101;
    core_retain(device - 70, -1);
    return code;
}
CALL(cuCtxGetCurrent, void **context)
{
    READY;
    *context = core_current() < 0 ? NULL : &contexts[core_current()];
    return 0;
}
CALL(cuCtxSetCurrent, void *context)
{
    READY;
    if (context && (char *)context != &contexts[0] && (char *)context != &contexts[1])
        core_die("%p is no context", context);
    core_set(context ? (int)((char *)context - contexts) : -1);
    return 0;
}
CALL(cuMemAlloc_v2, uint64_t *p, size_t len)
{
    READY;
    if (core_current() < 0)
        return 201;
    *p = (uintptr_t)fake_malloc(core_current(), len);
    return 0;
}
CALL(cuMemFree_v2, uint64_t p)
{
    fake_mfree((void *)(uintptr_t)p);
    return core_enter(__func__);
}
CALL(cuMemHostRegister_v2, void *p, size_t len, unsigned flags)
{
    READY;
    return codes[flags > 3 ? FAKE_INVALID : core_pin(p, len)];
}
CALL(cuMemHostUnregister, void *p)
{
    int code = core_enter(__func__), mine = codes[core_unpin(p)];
    return mine ? mine : code;
}
CALL(cuStreamCreate, void **stream, unsigned flags)
{
    READY;
    return codes[flags != 1 ? FAKE_INVALID : core_stream_new(stream)]; /* waits for no other */
}
CALL(cuStreamSynchronize, void *stream)
{
    READY;
    return core_stream_sync(stream);
}
CALL(cuStreamDestroy_v2, void *stream)
{
    int code = core_enter(__func__);
    core_stream_free(stream);
    return code;
}
CALL(cuStreamWaitEvent, void *stream, void *event, unsigned flags)
{
    READY;
    return codes[flags ? FAKE_INVALID : core_event_wait(stream, event)];
}
CALL(cuEventCreate, void **event, unsigned flags)
{
    READY;
    return codes[flags != 3 ? FAKE_INVALID : core_event_new(event)]; /* who waits for it sleeps */
}
CALL(cuEventRecord, void *event, void *stream)
{
    READY;
    return codes[core_event_record(event, stream)];
}
CALL(cuEventSynchronize, void *event)
{
    READY;
    return core_event_sync(event);
}
CALL(cuEventDestroy_v2, void *event)
{
    int code = core_enter(__func__);
    core_event_free(event);
    return code;
}
CALL(cuMemcpyHtoDAsync_v2, uint64_t to, const void *from, size_t len, void *stream)
{
    READY;
    return codes[core_copy(stream, 0, (void *)(uintptr_t)to, from, len)];
}
CALL(cuMemcpyDtoHAsync_v2, void *to, uint64_t from, size_t len, void *stream)
{
    READY;
    return codes[core_copy(stream, 1, to, (const void *)(uintptr_t)from, len)];
}
CALL(cuGetErrorString, int code, const char **text)
{
    *text = code == 700 ? "an illegal memory access was encountered" : "an error of the fake";
    return 0;
}

#if GENERATION > 0
struct attributes {
    int order;
    struct {
        int type, id;
    } from, to;
    unsigned flags;
};
static int batch(uint64_t *to, uint64_t *from, size_t *len, size_t n, const struct attributes *how,
                 const size_t *first, size_t nhow, void *stream)
{
    if (!n || nhow != 1 || *first != 0 || how->flags > 1 || !stream)
        return 1;
    if (how->order != 1)
        core_die("a batch whose source may be read before its turn on the stream");
    if (core_aliased())
        core_die("a batch that names registered memory by the host's address");
    for (size_t i = 0; i < n; i++)
        if (!core_is_registered((const void *)(uintptr_t)to[i]) &&
            !core_is_registered((const void *)(uintptr_t)from[i]))
            return 1;
    for (size_t i = 0; i < n; i++) {
        enum fake_error err = core_copy(stream, -1, (void *)(uintptr_t)to[i],
                                        (const void *)(uintptr_t)from[i], len[i]);
        if (err)
            return codes[err];
    }
    return 0;
}
CALL(cuMemcpyBatchAsync, uint64_t *to, uint64_t *from, size_t *len, size_t n,
     struct attributes *how, size_t *first, size_t nhow, size_t *failed, void *stream)
{
    READY;
    *failed = 0;
    return batch(to, from, len, n, how, first, nhow, stream);
}
#endif
#if GENERATION > 1
CALL(cuMemcpyBatchAsync_v2, uint64_t *to, uint64_t *from, size_t *len, size_t n,
     struct attributes *how, size_t *first, size_t nhow, void *stream)
{
    READY;
    return batch(to, from, len, n, how, first, nhow, stream);
}
#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A fake libascendcl.so.  GENERATION: 0 is without batches of copies, and registers host memory the
 * old way; 1 has both; in 2 the function for batches has an argument less.  Something else in the
 * process has made the library ready before.
 */
#include "core.h"

const bool core_implicit = false;
static const int codes[FAKE_ERRORS] = {[FAKE_INVALID] = 100000,
                                       [FAKE_NO_CONTEXT] = 107002,
                                       [FAKE_REGISTERED] = 507899,
                                       [FAKE_NOT_REGISTERED] = 507899};
static char contexts[FAKE_DEVICES];

CALL(aclInit, const char *config)
{
    ENTER;
    return config ? 100000 : 100002;
}
CALL(aclrtGetDeviceCount, uint32_t *n)
{
    ENTER;
    *n = FAKE_DEVICES;
    return 0;
}
CALL(aclrtSetDevice, int32_t ordinal)
{
    ENTER;
    if (ordinal < 0 || ordinal >= FAKE_DEVICES)
        return 107001;
    core_set(ordinal);
    return 0;
}
CALL(aclrtGetCurrentContext, void **context)
{
    ENTER;
    if (core_current() < 0)
        return 107002;
    *context = &contexts[core_current()];
    return 0;
}
CALL(aclrtSetCurrentContext, void *context)
{
    ENTER;
    if ((char *)context != &contexts[0] && (char *)context != &contexts[1])
        core_die("%p is no context", context);
    core_set((int)((char *)context - contexts));
    return 0;
}
CALL(aclrtMalloc, void **p, size_t len, int policy)
{
    ENTER;
    *p = core_current() < 0 || policy ? NULL : fake_malloc(core_current(), len);
    return codes[*p ? FAKE_OK : FAKE_NO_CONTEXT];
}
CALL(aclrtFree, void *p)
{
    fake_mfree(p);
    return core_enter(__func__);
}
#if GENERATION > 0
CALL(aclrtHostRegisterV2, void *p, uint64_t len, uint32_t flags)
{
    ENTER;
    return codes[flags != 0x10000002 ? FAKE_INVALID : core_pin(p, len)];
}
#endif
CALL(aclrtHostRegister, void *p, uint64_t len, int type, void **dev)
{
    ENTER;
    *dev = p;
    return codes[type ? FAKE_INVALID : core_pin(p, len)];
}
CALL(aclrtHostUnregister, void *p)
{
    int code = core_enter(__func__), mine = codes[core_unpin(p)];
    return mine ? mine : code;
}
CALL(aclrtCreateStream, void **stream)
{
    ENTER;
    return codes[core_stream_new(stream)];
}
#if GENERATION > 0
CALL(aclrtCreateStreamWithConfig, void **stream, uint32_t priority, uint32_t flags)
{
    ENTER;
    return codes[priority || flags > 3 ? FAKE_INVALID : core_stream_new(stream)];
}
#endif
CALL(aclrtSynchronizeStream, void *stream)
{
    ENTER;
    return core_stream_sync(stream);
}
CALL(aclrtDestroyStream, void *stream)
{
    int code = core_enter(__func__);
    core_stream_free(stream);
    return code;
}
CALL(aclrtStreamWaitEvent, void *stream, void *event)
{
    ENTER;
    return codes[core_event_wait(stream, event)];
}
CALL(aclrtCreateEventExWithFlag, void **event, uint32_t flag)
{
    ENTER;
    return codes[flag != 2 ? FAKE_INVALID : core_event_new(event)]; /* others are few, or timed */
}
CALL(aclrtRecordEvent, void *event, void *stream)
{
    ENTER;
    return codes[core_event_record(event, stream)];
}
CALL(aclrtSynchronizeEvent, void *event)
{
    ENTER;
    return core_current() < 0 ? 107002 : core_event_sync(event);
}
CALL(aclrtDestroyEvent, void *event)
{
    int code = core_enter(__func__);
    core_event_free(event);
    return code;
}
CALL(aclrtMemcpyAsync, void *to, size_t room, const void *from, size_t len, int kind, void *stream)
{
    ENTER;
    return codes[room < len || kind < 1 || kind > 2 ? FAKE_INVALID
                                                    : core_copy(stream, kind == 2, to, from, len)];
}

#if GENERATION > 0
struct location {
    uint32_t id;
    int type;
};
struct attributes {
    struct location to, from;
    uint8_t reserved[16];
};
static int batch(void **to, size_t *room, void **from, size_t *len, size_t n,
                 struct attributes *how, size_t *first, size_t nhow, void *stream)
{
    const struct location *dev = how->to.type ? &how->to : &how->from,
                          *host = how->to.type ? &how->from : &how->to;
    if (!n || nhow != 1 || *first != 0 || dev->type != 1 || host->type != 0 ||
        dev->id != (uint32_t)core_current())
        return 100000;
    for (size_t i = 0; i < n; i++) {
        int err = room[i] < len[i]
                      ? FAKE_INVALID
                      : (int)core_copy(stream, how->to.type == 0, to[i], from[i], len[i]);
        if (err)
            return codes[err];
    }
    return 0;
}
CALL(aclrtMemcpyBatchAsync, void **to, size_t *room, void **from, size_t *len, size_t n,
     struct attributes *how, size_t *first, size_t nhow, size_t *failed, void *stream)
{
    ENTER;
    *failed = 0;
    return batch(to, room, from, len, n, how, first, nhow, stream);
}
#endif
#if GENERATION > 1
CALL(aclrtMemcpyBatchAsyncV2, void **to, size_t *room, void **from, size_t *len, size_t n,
     struct attributes *how, size_t *first, size_t nhow, void *stream)
{
    ENTER;
    return batch(to, room, from, len, n, how, first, nhow, stream);
}
#endif
EXPORT const char *aclGetRecentErrMsg(void);
EXPORT const char *aclGetRecentErrMsg(void)
{
    return "an error of the fake";
}

/* SPDX-License-Identifier: Apache-2.0 */
/* A fake of a runtime library like CUDA's, whose functions begin with PREFIX; all generations are
 * the same. */
#include "core.h"

#define PASTE(a, b)  a##b
#define PASTE2(a, b) PASTE(a, b)
#define NAME(name)   PASTE2(PREFIX, name)

const bool core_implicit = true;
static const int codes[FAKE_ERRORS] = {[FAKE_INVALID] = 1,
                                       [FAKE_NO_CONTEXT] = 201,
                                       [FAKE_REGISTERED] = 712,
                                       [FAKE_NOT_REGISTERED] = 713};

CALL(NAME(GetDeviceCount), int *n)
{
    ENTER;
    *n = FAKE_DEVICES;
    return 0;
}
CALL(NAME(GetDevice), int *ordinal)
{
    ENTER;
    *ordinal = core_current();
    return 0;
}
CALL(NAME(SetDevice), int ordinal)
{
    ENTER;
    if (ordinal < 0 || ordinal >= FAKE_DEVICES)
        return 101;
    core_set(ordinal);
    return 0;
}
CALL(NAME(Malloc), void **p, size_t len)
{
    ENTER;
    *p = fake_malloc(core_current(), len);
    return 0;
}
CALL(NAME(Free), void *p)
{
    fake_mfree(p);
    return core_enter(__func__);
}
CALL(NAME(HostRegister), void *p, size_t len, unsigned flags)
{
    ENTER;
    return codes[flags > 3 ? FAKE_INVALID : core_pin(p, len)];
}
CALL(NAME(HostUnregister), void *p)
{
    int code = core_enter(__func__), mine = codes[core_unpin(p)];
    return mine ? mine : code;
}
CALL(NAME(StreamCreateWithFlags), void **stream, unsigned flags)
{
    ENTER;
    return codes[flags != 1 ? FAKE_INVALID : core_stream_new(stream)]; /* waits for no other */
}
CALL(NAME(StreamSynchronize), void *stream)
{
    ENTER;
    return core_stream_sync(stream);
}
CALL(NAME(StreamDestroy), void *stream)
{
    int code = core_enter(__func__);
    core_stream_free(stream);
    return code;
}
CALL(NAME(StreamWaitEvent), void *stream, void *event, unsigned flags)
{
    ENTER;
    return codes[flags ? FAKE_INVALID : core_event_wait(stream, event)];
}
CALL(NAME(EventCreateWithFlags), void **event, unsigned flags)
{
    ENTER;
    return codes[flags != 3 ? FAKE_INVALID : core_event_new(event)]; /* who waits for it sleeps */
}
CALL(NAME(EventRecord), void *event, void *stream)
{
    ENTER;
    return codes[core_event_record(event, stream)];
}
CALL(NAME(EventSynchronize), void *event)
{
    ENTER;
    return core_event_sync(event);
}
CALL(NAME(EventDestroy), void *event)
{
    int code = core_enter(__func__);
    core_event_free(event);
    return code;
}
CALL(NAME(MemcpyAsync), void *to, const void *from, size_t len, int kind, void *stream)
{
    ENTER;
    return codes[kind < 1 || kind > 2 ? FAKE_INVALID : core_copy(stream, kind == 2, to, from, len)];
}

EXPORT const char *NAME(GetErrorString)(int code);
EXPORT const char *NAME(GetErrorString)(int code)
{
    return "an error of the fake";
}

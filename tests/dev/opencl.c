/* SPDX-License-Identifier: Apache-2.0 */
/*
 * opencl.c - a device over a runtime that is not of our making: OpenCL, of which PoCL is one that
 * works on the processor, with threads of its own.  What the table of a device means, and what the
 * stacks over it ask for, is so tried by another's reading of streams, events and completion than
 * that of the fakes.
 *
 * Memory is shared virtual memory, so an address is an address.  A stream is a queue in order. That
 * all queued commands have ended, which clFinish waits for, does not say that all callbacks have
 * returned, so those are counted.
 *
 * One context for the process: the engine's.
 */
#include "opencl.h"

#include <dlfcn.h>
#include <stdlib.h>

#include "dev/dev.h"
#include "store/store.h"
#include "support.h"

enum { COMPLETE = 0, NOT_BLOCKING = 0, READ_WRITE = 1, FINE_GRAIN = 1 << 10 };

/* All that is used of the library; cl_int, cl_uint and cl_bool are 32 bits, bit fields 64. */
#define CALLS(X)                                                                                   \
    X(int, clGetPlatformIDs, (uint32_t n, void **platforms, uint32_t *found))                      \
    X(int, clGetDeviceIDs,                                                                         \
      (void *platform, uint64_t type, uint32_t n, void **devices, uint32_t *found))                \
    X(void *, clCreateContext,                                                                     \
      (const intptr_t *how, uint32_t n, void *const *devices, void *notify, void *arg, int *err))  \
    X(void *, clCreateCommandQueueWithProperties,                                                  \
      (void *context, void *device, const uint64_t *how, int *err))                                \
    X(int, clReleaseCommandQueue, (void *queue))                                                   \
    X(void *, clSVMAlloc, (void *context, uint64_t flags, size_t len, uint32_t align))             \
    X(void, clSVMFree, (void *context, void *p))                                                   \
    X(int, clEnqueueSVMMemcpy,                                                                     \
      (void *queue, uint32_t blocking, void *to, const void *from, size_t len, uint32_t n,         \
       void *const *events, void **event))                                                         \
    X(int, clEnqueueBarrierWithWaitList,                                                           \
      (void *queue, uint32_t n, void *const *events, void **event))                                \
    X(int, clEnqueueMarkerWithWaitList,                                                            \
      (void *queue, uint32_t n, void *const *events, void **event))                                \
    X(int, clSetEventCallback,                                                                     \
      (void *event, int status, void (*fn)(void *event, int status, void *arg), void *arg))        \
    X(void *, clCreateUserEvent, (void *context, int *err))                                        \
    X(int, clSetUserEventStatus, (void *event, int status))                                        \
    X(int, clReleaseEvent, (void *event))                                                          \
    X(int, clFlush, (void *queue))                                                                 \
    X(int, clFinish, (void *queue))

static struct {
#define X(type, name, args) type(*name) args;
    CALLS(X)
#undef X
    void *device, *context;
} cl;

static void start(void)
{
    void *library = dlopen("libOpenCL.so.1", RTLD_NOW | RTLD_LOCAL), *platform;
    int err = 0;
    if (!library)
        ts_die("%s", dlerror());
#define X(type, name, args)                                                                        \
    if (!(cl.name = (type(*) args)dlsym(library, #name)))                                          \
        ts_die("%s", dlerror());
    CALLS(X)
#undef X
    if (cl.clGetPlatformIDs(1, &platform, NULL) ||
        cl.clGetDeviceIDs(platform, 0xffffffff, 1, &cl.device, NULL))
        ts_die("libOpenCL.so.1 finds no device; install pocl-opencl-icd");
    cl.context = cl.clCreateContext(NULL, 1, &cl.device, NULL, NULL, &err);
    if (err)
        ts_die("no OpenCL context: %d", err);
}

/* ---- the device ---- */

struct stream {
    void *queue;
    pthread_mutex_t lock; /* guards: */
    unsigned awaited;     /* callbacks that have not returned */
    pthread_cond_t none;
};
struct wait {
    struct stream *s;
    void (*fn)(void *arg, int err);
    void *arg;
};

static int of(int code)
{
    return code < 0 ? -EIO : 0;
}

static int opencl_open(void *d, int ordinal, char *why, size_t why_len)
{
    return 0;
}

static void opencl_close(void *d)
{
}

static int opencl_stream_new(void *d, void **stream_p)
{
    struct stream *s = calloc(1, sizeof *s);
    int code = 0;
    if (!s)
        return -ENOMEM;
    s->queue = cl.clCreateCommandQueueWithProperties(cl.context, cl.device, NULL, &code);
    if (code) {
        free(s);
        return of(code);
    }
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->none, NULL);
    *stream_p = s;
    return 0;
}

static void opencl_stream_free(void *d, void *stream)
{
    struct stream *s = stream;
    cl.clFinish(s->queue);
    pthread_mutex_lock(&s->lock);
    while (s->awaited)
        pthread_cond_wait(&s->none, &s->lock);
    pthread_mutex_unlock(&s->lock);
    cl.clReleaseCommandQueue(s->queue);
    pthread_cond_destroy(&s->none);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static int opencl_copy(void *d, void *stream, int to_host, const struct ucm_copy *v, size_t n)
{
    struct stream *s = stream;
    int code = 0;
    for (size_t i = 0; i < n && !code; i++)
        code = cl.clEnqueueSVMMemcpy(s->queue, NOT_BLOCKING, to_host ? v[i].host : v[i].dev,
                                     to_host ? v[i].dev : v[i].host, v[i].len, 0, NULL, NULL);
    cl.clFlush(s->queue);
    return of(code);
}

static int opencl_after(void *d, void *stream, void *event)
{
    return of(cl.clEnqueueBarrierWithWaitList(((struct stream *)stream)->queue, 1, &event, NULL));
}

static void returned(struct stream *s)
{
    pthread_mutex_lock(&s->lock);
    if (--s->awaited == 0)
        pthread_cond_signal(&s->none);
    pthread_mutex_unlock(&s->lock);
}

static void came(void *event, int status, void *arg)
{
    struct wait *w = arg;
    cl.clReleaseEvent(event);
    w->fn(w->arg, of(status));
    returned(w->s);
    free(w);
}

static int opencl_then(void *d, void *stream, void (*fn)(void *arg, int err), void *arg)
{
    struct stream *s = stream;
    struct wait *w = malloc(sizeof *w);
    void *event;
    if (!w)
        return -ENOMEM;
    *w = (struct wait){s, fn, arg};
    int code = cl.clEnqueueMarkerWithWaitList(s->queue, 0, NULL, &event);
    if (code) {
        free(w);
        return of(code);
    }
    pthread_mutex_lock(&s->lock);
    s->awaited++;
    pthread_mutex_unlock(&s->lock);
    code = cl.clSetEventCallback(event, COMPLETE, came, w);
    if (code)
        ts_die("clSetEventCallback: %d", code);
    cl.clFlush(s->queue);
    return 0;
}

static const struct ucm_dev_ops opencl = {
    .p = {.kind = "device", .name = "opencl", .help = "tests", .size = 1},
    .open = opencl_open,
    .close = opencl_close,
    .stream_new = opencl_stream_new,
    .stream_free = opencl_stream_free,
    .copy = opencl_copy,
    .after = opencl_after,
    .then = opencl_then,
};

/* The table of devices knows nothing of it: the program's own ucmi_find_dev (--wrap) does. */
const struct ucm_dev_ops *__real_ucmi_find_dev(const char *name);
const struct ucm_dev_ops *__wrap_ucmi_find_dev(const char *name);
const struct ucm_dev_ops *__wrap_ucmi_find_dev(const char *name)
{
    return strcmp(name, opencl.p.name) ? __real_ucmi_find_dev(name) : &opencl;
}

/* ---- the engine ---- */

static void *bytes_new(size_t len)
{
    return cl.clSVMAlloc(cl.context, READ_WRITE | FINE_GRAIN, len, 0);
}

static void bytes_free(void *p)
{
    cl.clSVMFree(cl.context, p);
}

static void *event_new(void)
{
    int err = 0;
    return cl.clCreateUserEvent(cl.context, &err);
}

static void event_fire(void *event)
{
    cl.clSetUserEventStatus(event, COMPLETE);
}

static void event_free(void *event)
{
    cl.clReleaseEvent(event);
}

void opencl_add(void)
{
    static const struct ts_engine engine = {bytes_new, bytes_free, event_new, event_fire,
                                            event_free};
    if (!getenv("UCM_TEST_ALL"))
        return;
    start();
    ts_devices[ts_ndevices++] =
        (struct ts_device){.name = "opencl", .events = true, .engine = &engine};
}

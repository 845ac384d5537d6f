/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vendor.c - a device of a vendor: finding its library, the thread's context, errors, and being
 * told when copies have ended.
 *
 * A stream has a thread that sleeps in the vendor's library until the next event of ours has come:
 * nothing polls, and unlike a callback on the stream it hears of everything, also that the device
 * has failed.  What is awaited comes to it by a queue; there are no other locks.
 *
 * A context belongs to a thread.  Who opens a device, registers memory or makes a stream is the
 * engine's thread, and finds its own context again; streams are used by threads of ucm, which keep
 * the device's.
 *
 * A library stays loaded: what it has started ends with the process.
 */
#include "dev/vendor.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_WAITS = 1 << 12 }; /* on a stream */

struct wait {
    void *event;
    void (*fn)(void *arg, int err);
    void *arg;
};
struct stream {
    struct ucmi_gpu *g;
    void *handle;
    pthread_t thread;
    struct ucmi_queue waits, spare; /* spare: such as have an event, for the next time */
    _Atomic bool stop;
};

/* ---- errors ---- */

static int errno_of(const struct ucmi_gpu *g, int code)
{
    for (const struct ucmi_code *c = g->vendor->codes; code && c->err; c++)
        if (c->code == code)
            return c->err;
    return code ? -EIO : 0;
}

static const char *text_of(struct ucmi_gpu *g, int code)
{
    const char *text = g->vendor->text ? g->vendor->text(g, code) : NULL;
    return text ? text : ucm_strerror(errno_of(g, code)); /* CUDA's stub has none */
}

/* Of all that may go wrong when the device fails one line says what. */
static int result(struct ucmi_gpu *g, int code, const char *doing)
{
    static struct ucmi_log_gate gate;
    if (code)
        ucmi_log_gated(&gate, 10, UCM_WARN, g->vendor->name, "%s: error %d, %s", doing, code,
                       text_of(g, code));
    return errno_of(g, code);
}

/* ---- the library ---- */

static int bind(struct ucmi_gpu *g, const char *file, char *why, size_t why_len)
{
    const struct ucmi_vendor *v = g->vendor;
    char name[96];
    for (const struct ucmi_symbol *s = v->symbols; s->name; s++) {
        snprintf(name, sizeof name, "%s%s", v->prefix, s->name);
        void *fn = dlsym(g->library, name);
        if (!fn && !s->optional)
            return ucmi_fail(why, why_len, -ENODEV,
                             "%s has no %s: it is too old, or not what its "
                             "name says",
                             file, name);
        memcpy((char *)g + s->at, &fn, sizeof fn);
    }
    return 0;
}

/* Finds the library and its devices; *file_p: what it is called.  One that the process has already,
 * by whatever name, goes first: a second copy would not know the engine's events. */
static int find(struct ucmi_gpu *g, const char **file_p, int *n_p, char *why, size_t why_len)
{
    const struct ucmi_vendor *v = g->vendor;
    const int how[] = {RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD, RTLD_NOW | RTLD_LOCAL};
    for (size_t i = 0; i < ARRAY_LEN(how); i++)
        for (const char *const *file = v->libraries; *file && !g->library; file++) {
            *file_p = *file;
            g->library = dlopen(*file, how[i]);
        }
    if (!g->library)
        return ucmi_fail(why, why_len, -ENODEV, "%s", dlerror());
    int err = bind(g, *file_p, why, why_len);
    if (err)
        return err;
    int code = v->count(g, n_p);
    if (code)
        return ucmi_fail(why, why_len, -ENODEV, "%s: error %d, %s", *file_p, code,
                         text_of(g, code));
    if (*n_p < 1)
        return ucmi_fail(why, why_len, -ENODEV, "%s finds no device", *file_p);
    return 0;
}

int ucmi_gpu_probe(const struct ucmi_vendor *v, char *text, size_t len)
{
    struct ucmi_gpu *g = calloc(1, v->size);
    char more[128] = "";
    const char *file;
    int n = 0;
    if (!g)
        return -ENOMEM;
    g->vendor = v;
    int err = find(g, &file, &n, text, len);
    if (!err) {
        if (v->version)
            v->version(g, more, sizeof more);
        snprintf(text, len, "%s%s%s, copies %s", file, *more ? ", " : "", more,
                 g->batches ? "in batches" : "one by one");
    }
    free(g);
    return err ? err : n;
}

/* ---- contexts ---- */

/* From here to leave the thread has the device's context. */
static int enter(struct ucmi_gpu *g, void **was)
{
    int code = g->vendor->current(g, was);
    if (!code && *was == g->context)
        return 0;
    if (code)
        *was = g->context; /* which it had, if any, is not to be known */
    return g->vendor->use(g, g->context);
}

static void leave(struct ucmi_gpu *g, void *was)
{
    if (was != g->context)
        g->vendor->use(g, was);
}

/* In a thread of ours: it stays so. */
static int enter_and_stay(struct ucmi_gpu *g)
{
    void *was;
    return enter(g, &was);
}

int ucmi_gpu_open(struct ucmi_gpu *g, const struct ucmi_vendor *v, int ordinal, char *why,
                  size_t why_len)
{
    const char *file;
    int n = 0;
    g->vendor = v;
    g->ordinal = ordinal;
    int err = find(g, &file, &n, why, why_len);
    if (err)
        return err;
    if (ordinal >= n)
        return ucmi_fail(why, why_len, -ENODEV, "device_id: %d; %s finds %d, counted from 0",
                         ordinal, file, n);
    int code = v->acquire(g);
    if (code)
        return ucmi_fail(why, why_len, errno_of(g, code), "%s: device %d: error %d, %s", file,
                         ordinal, code, text_of(g, code));
    return 0;
}

void ucmi_gpu_close(void *d)
{
    struct ucmi_gpu *g = d;
    g->vendor->release(g);
}

/* ---- registered memory ---- */

int ucmi_gpu_pin(void *d, void *p, size_t len)
{
    struct ucmi_gpu *g = d;
    void *was;
    int code = enter(g, &was);
    if (!code) {
        code = g->vendor->pin(g, p, len);
        leave(g, was);
    }
    return result(g, code, "registering host memory");
}

void ucmi_gpu_unpin(void *d, void *p, size_t len)
{
    struct ucmi_gpu *g = d;
    void *was;
    enter(g, &was);
    int code = g->call.unpin(p);
    leave(g, was);
    result(g, code, "giving registered host memory back");
}

/* ---- what has ended ---- */

static void free_wait(struct wait *w, struct ucmi_gpu *g)
{
    if (w->event)
        g->call.event_free(w->event);
    free(w);
}

static void put_back(struct stream *s, struct wait *w)
{
    if (w && ucmi_queue_push(&s->spare, w))
        free_wait(w, s->g);
}

/* Nothing of the stream moves any more when this returns: its work is done, or the device says more
 * than once that it has failed, and does nothing. */
static int drain(struct stream *s)
{
    int code = s->g->call.stream_sync(s->handle);
    return code ? s->g->call.stream_sync(s->handle) : 0;
}

static int await(struct stream *s, void *event)
{
    int code = s->g->call.event_sync(event);
    if (code)
        drain(s);
    return code;
}

static void *watch(void *arg)
{
    struct stream *s = arg;
    void *item;
    size_t n;
    int lost = enter_and_stay(s->g);
    while ((n = ucmi_queue_pop(&s->waits, &item, 1, s->stop ? 0 : UINT64_MAX)) || !s->stop) {
        struct wait *w = item;
        if (!n)
            continue;
        if (lost)
            lost = enter_and_stay(s->g);
        w->fn(w->arg, result(s->g, await(s, w->event), "waiting for copies"));
        put_back(s, w);
    }
    return NULL;
}

/* One that has been used before, or a new one. */
static int get_wait(struct stream *s, struct wait **wait_p)
{
    void *item;
    struct wait *w = ucmi_queue_pop(&s->spare, &item, 1, 0) ? item : calloc(1, sizeof *w);
    *wait_p = w;
    if (!w)
        return -ENOMEM;
    return w->event ? 0
                    : result(s->g, s->g->call.event_new(&w->event, s->g->vendor->event_flags),
                             "making an event");
}

int ucmi_gpu_then(void *d, void *stream, void (*fn)(void *arg, int err), void *arg)
{
    struct ucmi_gpu *g = d;
    struct stream *s = stream;
    struct wait *w = NULL;
    int err = result(g, enter_and_stay(g), "setting the context");
    if (!err)
        err = get_wait(s, &w);
    if (!err)
        err = result(g, g->call.event_record(w->event, s->handle), "recording an event");
    if (!err) {
        w->fn = fn;
        w->arg = arg;
        err = ucmi_queue_push(&s->waits, w);
    }
    if (err)
        put_back(s, w);
    return err;
}

/* ---- streams ---- */

static void end_stream(struct stream *s)
{
    void *item;
    while (s->spare.ring && ucmi_queue_pop(&s->spare, &item, 1, 0))
        free_wait(item, s->g);
    if (s->handle)
        s->g->call.stream_free(s->handle);
    ucmi_queue_destroy(&s->waits);
    ucmi_queue_destroy(&s->spare);
    free(s);
}

int ucmi_gpu_stream_new(void *d, void **stream_p)
{
    struct ucmi_gpu *g = d;
    struct stream *s = calloc(1, sizeof *s);
    void *was;
    if (!s)
        return -ENOMEM;
    s->g = g;
    int err = ucmi_queue_init(&s->waits, MAX_WAITS);
    if (!err)
        err = ucmi_queue_init(&s->spare, MAX_WAITS);
    if (!err)
        err = result(g, enter(g, &was), "setting the context");
    if (err) {
        end_stream(s);
        return err;
    }
    err = result(g, g->vendor->stream_new(g, &s->handle), "making a stream");
    if (!err)
        err = ucmi_thread_start(&s->thread, "ucm-watch", watch, s);
    if (err)
        end_stream(s);
    else
        *stream_p = s;
    leave(g, was);
    return err;
}

void ucmi_gpu_stream_free(void *d, void *stream)
{
    struct ucmi_gpu *g = d;
    struct stream *s = stream;
    void *was = g->context;
    if (!s)
        return;
    s->stop = true;
    ucmi_queue_kick(&s->waits);
    pthread_join(s->thread, NULL);
    enter(g, &was);
    result(g, drain(s), "waiting for a stream");
    end_stream(s);
    leave(g, was);
}

/* ---- copies ---- */

/* What is refused together may be taken one by one, as host memory that is not registered is by
 * some.  To queue a copy a second time does no harm. */
static int copy_some(struct ucmi_gpu *g, void *stream, int to_host, const struct ucm_copy *v,
                     size_t n)
{
    const struct ucmi_vendor *vendor = g->vendor;
    int code = 0;
    if (n > 1 && atomic_load(&g->batches)) {
        int refused = vendor->batch(g, stream, to_host, v, n);
        if (!refused)
            return 0;
        if (refused == vendor->no_batch)
            atomic_store(&g->batches, false);
    }
    for (size_t i = 0; i < n && !code; i++)
        code = vendor->copy(g, stream, to_host, &v[i]);
    return code;
}

int ucmi_gpu_copy(void *d, void *stream, int to_host, const struct ucm_copy *v, size_t n)
{
    struct ucmi_gpu *g = d;
    struct stream *s = stream;
    int code = n ? enter_and_stay(g) : 0;
    for (size_t i = 0; i < n && !code; i += UCMI_BATCH)
        code = copy_some(g, s->handle, to_host, v + i, MIN(n - i, (size_t)UCMI_BATCH));
    return result(g, code, to_host ? "copying to the host" : "copying to the device");
}

int ucmi_gpu_after(void *d, void *stream, void *event)
{
    struct ucmi_gpu *g = d;
    int code = enter_and_stay(g);
    if (!code)
        code = g->vendor->wait(g, ((struct stream *)stream)->handle, event);
    return result(g, code, "waiting for the engine's event");
}

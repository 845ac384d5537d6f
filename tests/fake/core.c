/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core.c - the device behind the fakes (fake.h).  One lock and one condition for everything: what
 * happens in which order is then the test's choice alone.  Streams do their copies with it held.
 *
 * Nothing is freed before the end: a handle that has ended is known as such, and not mistaken for
 * its successor.
 */
#include "core.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { EVENT = 0x6576656e, STREAM = 0x73747265, ENDED = 0x64656164 };
enum { FRESH = 0xdb, FREED = 0xfe, PAGE = 4096 };

struct range {
    struct range *next;
    char *p, *view; /* view: of device memory */
    size_t len;
    int ordinal;
    bool live;
};
struct event {
    unsigned magic;
    struct event *next;
    unsigned long recorded, done; /* how often; the last that has come */
    bool engine;
};
struct op {
    struct op *next;
    enum { COPY, RECORD, WAIT } kind;
    struct event *event;
    unsigned long turn; /* of the event */
    char *to, *from;    /* where the bytes are for the host */
    char *host;
    size_t len;
    uint64_t sum; /* of the host's bytes when it was queued; strict */
};
struct stream {
    unsigned magic;
    struct stream *next;
    int ordinal;
    pthread_t thread;
    struct op *head, **tail;
    bool busy, stop;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct range *memory, *registered;
static struct event *events;
static struct stream *streams;
static bool held, strict, aliased;
static int broken, retained[FAKE_DEVICES];
static unsigned long copies, bytes, unregistered, pinned;
static _Thread_local int current = -1;

void core_die(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fputs("fake device: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputs("\n", stderr);
    va_end(ap);
    abort();
}

static void *get(size_t len)
{
    void *p = calloc(1, len);
    if (!p)
        core_die("no memory");
    return p;
}

static uint64_t sum_of(const char *p, size_t len)
{
    uint64_t sum = 14695981039346656037u, word;
    for (size_t n; len; p += n, len -= n) { /* by words: a sanitizer looks at each access */
        n = len < sizeof word ? 1 : sizeof word;
        word = (unsigned char)*p;
        if (n > 1)
            memcpy(&word, p, sizeof word);
        sum = (sum ^ word) * 1099511628211u;
    }
    return sum;
}

static bool overlap(const struct range *r, const char *p, size_t len)
{
    return r->live && p < r->p + r->len && r->p < p + len;
}

static bool within(const struct range *r, const char *p, size_t len)
{
    return r->live && p >= r->p && p + len <= r->p + r->len;
}

static struct range *find(struct range *list, const char *p, size_t len)
{
    while (list && !overlap(list, p, len))
        list = list->next;
    return list;
}

int core_broken(void)
{
    pthread_mutex_lock(&lock);
    int code = broken;
    pthread_mutex_unlock(&lock);
    return code;
}

/* ---- contexts ---- */

void core_set(int ordinal)
{
    current = ordinal;
}

int core_current(void)
{
    return current < 0 && core_implicit ? 0 : current;
}

void core_retain(int ordinal, int by)
{
    pthread_mutex_lock(&lock);
    retained[ordinal] += by;
    if (retained[ordinal] < 0)
        core_die("context %d was released more often than retained", ordinal);
    pthread_mutex_unlock(&lock);
}

/* ---- memory ---- */

EXPORT void *fake_malloc(int ordinal, size_t len)
{
    struct range *r = get(sizeof *r);
    size_t size = (len + PAGE - 1) / PAGE * PAGE;
    *r = (struct range){.len = len, .ordinal = ordinal, .live = true};
    r->p = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    r->view = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (r->p == MAP_FAILED || r->view == MAP_FAILED)
        core_die("no memory");
    memset(r->view, FRESH, size);
    pthread_mutex_lock(&lock);
    r->next = memory;
    memory = r;
    pthread_mutex_unlock(&lock);
    return r->p;
}

EXPORT void fake_cut(void *p)
{
    struct range *other = get(sizeof *other);
    pthread_mutex_lock(&lock);
    struct range *r = find(memory, p, 1);
    if (!r)
        core_die("%p is no memory of the device", p);
    size_t at = (size_t)((char *)p - r->p);
    *other = (struct range){.next = memory,
                            .p = p,
                            .view = r->view + at,
                            .len = r->len - at,
                            .ordinal = r->ordinal,
                            .live = true};
    r->len = at;
    memory = other;
    pthread_mutex_unlock(&lock);
}

static bool queued(const struct range *r, bool device)
{
    for (struct stream *s = streams; s; s = s->next)
        for (struct op *o = s->magic == STREAM ? s->head : NULL; o; o = o->next) {
            const char *p = device ? (o->host == o->to ? o->from : o->to) : o->host;
            if (o->kind == COPY && p < r->p + r->len && r->p < p + o->len)
                return true;
        }
    return false;
}

EXPORT void fake_mfree(void *p)
{
    pthread_mutex_lock(&lock);
    struct range *r = find(memory, p, 1);
    if (!r || r->p != p)
        core_die("%p is no memory of the device", p);
    struct range seen = {.p = r->view, .len = r->len};
    if (queued(&seen, true))
        core_die("the engine's memory was freed while a copy of it is queued");
    memset(r->view, FREED, r->len);
    r->live = false;
    pthread_mutex_unlock(&lock);
}

EXPORT void *fake_view(void *p)
{
    pthread_mutex_lock(&lock);
    struct range *r = find(memory, p, 1);
    if (!r)
        core_die("%p is no memory of the device", p);
    void *view = r->view + ((char *)p - r->p);
    pthread_mutex_unlock(&lock);
    return view;
}

enum fake_error core_pin(void *p, size_t len)
{
    if (core_current() < 0)
        return FAKE_NO_CONTEXT;
    if (!p || !len || (uintptr_t)p % PAGE)
        return FAKE_INVALID;
    if (!core_is_there(p, len))
        core_die("memory was registered that has not been allocated");
    pthread_mutex_lock(&lock);
    bool taken = find(registered, p, len);
    if (find(memory, p, len))
        core_die("device memory was registered as the host's");
    if (!taken) {
        struct range *r = get(sizeof *r);
        *r = (struct range){.next = registered, .p = p, .len = len, .live = true};
        registered = r;
        pinned += len;
    }
    pthread_mutex_unlock(&lock);
    return taken ? FAKE_REGISTERED : FAKE_OK;
}

enum fake_error core_unpin(void *p)
{
    if (core_current() < 0)
        return FAKE_NO_CONTEXT;
    pthread_mutex_lock(&lock);
    struct range *r = find(registered, p, 1);
    bool found = r && r->p == p;
    if (found && queued(r, false))
        core_die("host memory was unregistered while a copy of it is queued");
    if (found) {
        r->live = false;
        pinned -= r->len;
    }
    pthread_mutex_unlock(&lock);
    return found ? FAKE_OK : FAKE_NOT_REGISTERED;
}

bool core_is_registered(const void *p)
{
    pthread_mutex_lock(&lock);
    bool found = find(registered, p, 1);
    pthread_mutex_unlock(&lock);
    return found;
}

bool core_aliased(void)
{
    return aliased;
}

/* ---- streams ---- */

static bool blocked(const struct op *o)
{
    return held || (o->kind == WAIT && o->event->done < o->turn);
}

static void perform(struct stream *s, struct op *o)
{
    switch (o->kind) {
    case COPY:
        if (strict && sum_of(o->host, o->len) != o->sum)
            core_die("bytes of the host changed while their copy was queued");
        memcpy(o->to, o->from, o->len);
        break;
    case RECORD:
        if (o->event->done < o->turn)
            o->event->done = o->turn;
        break;
    case WAIT: break;
    }
}

static void *run(void *arg)
{
    struct stream *s = arg;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!s->stop && (!s->head || blocked(s->head)))
            pthread_cond_wait(&changed, &lock);
        struct op *o = s->head;
        if (!o)
            break;
        if (s->stop && blocked(o))
            core_die("a stream was destroyed before its work was done");
        perform(s, o);
        s->head = o->next;
        if (!s->head)
            s->tail = &s->head;
        free(o);
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

static struct stream *stream_of(void *p)
{
    struct stream *s = p;
    if (!s || s->magic != STREAM)
        core_die("%p is no stream, or was destroyed", p);
    return s;
}

enum fake_error core_stream_new(void **stream_p)
{
    if (core_current() < 0)
        return FAKE_NO_CONTEXT;
    struct stream *s = get(sizeof *s);
    s->magic = STREAM;
    s->ordinal = core_current();
    s->tail = &s->head;
    if (pthread_create(&s->thread, NULL, run, s))
        core_die("no thread");
    pthread_mutex_lock(&lock);
    s->next = streams;
    streams = s;
    pthread_mutex_unlock(&lock);
    *stream_p = s;
    return FAKE_OK;
}

int core_stream_sync(void *p)
{
    pthread_mutex_lock(&lock);
    struct stream *s = stream_of(p);
    while (s->head && !broken)
        pthread_cond_wait(&changed, &lock);
    int code = broken;
    pthread_mutex_unlock(&lock);
    return code;
}

void core_stream_free(void *p)
{
    pthread_mutex_lock(&lock);
    struct stream *s = stream_of(p);
    s->stop = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    pthread_join(s->thread, NULL);
    pthread_mutex_lock(&lock);
    s->magic = ENDED;
    pthread_mutex_unlock(&lock);
}

static enum fake_error enqueue(struct stream *s, const struct op *op)
{
    if (core_current() != s->ordinal)
        core_die("device %d is not set in the thread that uses its stream, but %d", s->ordinal,
                 core_current());
    if (broken) /* by now: the call had begun */
        return FAKE_OK;
    struct op *o = get(sizeof *o);
    *o = *op;
    *s->tail = o;
    s->tail = &o->next;
    pthread_cond_broadcast(&changed);
    return FAKE_OK;
}

enum fake_error core_copy(void *stream, int to_host, void *to, const void *from, size_t len)
{
    if (core_current() < 0)
        return FAKE_NO_CONTEXT;
    pthread_mutex_lock(&lock);
    struct stream *s = stream_of(stream);
    if (to_host < 0)
        to_host = find(memory, from, len) != NULL;
    char *dev = to_host ? (char *)from : to, *host = to_host ? to : (char *)from;
    struct range *m = find(memory, dev, len), *r = find(registered, host, len);
    if (!len || !m || !within(m, dev, len))
        core_die("%p + %zu is not in the device's memory", (void *)dev, len);
    if (m->ordinal != s->ordinal)
        core_die("memory of device %d on a stream of device %d", m->ordinal, s->ordinal);
    if (find(memory, host, len))
        core_die("%p is not the host's", (void *)host);
    if (r && !within(r, host, len))
        core_die("%p + %zu reaches beyond what was registered at once", (void *)host, len);
    char *view = m->view + (dev - m->p);
    struct op o = {.kind = COPY, .host = host, .len = len};
    o.to = to_host ? host : view;
    o.from = to_host ? view : host;
    o.sum = strict ? sum_of(host, len) : 0;
    unregistered += !r;
    copies++;
    bytes += len;
    enum fake_error err = enqueue(s, &o);
    pthread_mutex_unlock(&lock);
    return err;
}

/* ---- events ---- */

static struct event *event_of(void *p)
{
    struct event *e = p;
    if (!e || e->magic != EVENT)
        core_die("%p is no event, or was destroyed", p);
    return e;
}

static struct event *event_new(bool engine)
{
    struct event *e = get(sizeof *e);
    *e = (struct event){.magic = EVENT, .engine = engine, .recorded = engine};
    pthread_mutex_lock(&lock);
    e->next = events;
    events = e;
    pthread_mutex_unlock(&lock);
    return e;
}

enum fake_error core_event_new(void **event_p)
{
    if (core_current() < 0)
        return FAKE_NO_CONTEXT;
    *event_p = event_new(false);
    return FAKE_OK;
}

void core_event_free(void *p)
{
    pthread_mutex_lock(&lock);
    event_of(p)->magic = ENDED;
    pthread_mutex_unlock(&lock);
}

enum fake_error core_event_record(void *event, void *stream)
{
    if (core_current() < 0)
        return FAKE_NO_CONTEXT;
    pthread_mutex_lock(&lock);
    struct event *e = event_of(event);
    struct op o = {.kind = RECORD, .event = e, .turn = ++e->recorded};
    enum fake_error err = enqueue(stream_of(stream), &o);
    pthread_mutex_unlock(&lock);
    return err;
}

/* Of an event that is recorded again later, only what was recorded by now is waited for. */
enum fake_error core_event_wait(void *stream, void *event)
{
    if (core_current() < 0)
        return FAKE_NO_CONTEXT;
    pthread_mutex_lock(&lock);
    struct event *e = event_of(event);
    struct op o = {.kind = WAIT, .event = e, .turn = e->recorded};
    enum fake_error err = enqueue(stream_of(stream), &o);
    pthread_mutex_unlock(&lock);
    return err;
}

int core_event_sync(void *event)
{
    pthread_mutex_lock(&lock);
    struct event *e = event_of(event);
    unsigned long turn = e->recorded;
    while (e->done < turn && !broken)
        pthread_cond_wait(&changed, &lock);
    int code = broken;
    pthread_mutex_unlock(&lock);
    return code;
}

/* ---- the test's ---- */

EXPORT void *fake_event(void)
{
    return event_new(true);
}

EXPORT void fake_fire(void *event)
{
    pthread_mutex_lock(&lock);
    struct event *e = event_of(event);
    e->done = e->recorded;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

EXPORT void fake_event_end(void *event)
{
    core_event_free(event);
}

EXPORT void fake_hold(int on)
{
    pthread_mutex_lock(&lock);
    held = on;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static bool settled(void)
{
    for (struct stream *s = streams; s; s = s->next)
        if (s->magic == STREAM && s->head && !blocked(s->head))
            return false;
    return true;
}

EXPORT void fake_settle(unsigned long want)
{
    pthread_mutex_lock(&lock);
    while (copies < want || !settled())
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

EXPORT void fake_alias(int on)
{
    aliased = on;
}

EXPORT void fake_break(int code)
{
    pthread_mutex_lock(&lock);
    broken = code;
    for (struct stream *s = streams; code && s; s = s->next) {
        for (struct op *o = s->head, *next; s->magic == STREAM && o; o = next) {
            next = o->next;
            free(o);
        }
        s->head = NULL;
        s->tail = &s->head;
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

EXPORT void fake_strict(int on)
{
    pthread_mutex_lock(&lock);
    strict = on;
    pthread_mutex_unlock(&lock);
}

EXPORT void fake_context(int ordinal)
{
    core_set(ordinal);
}

EXPORT int fake_context_is(int ordinal)
{
    return core_current() == ordinal || (core_implicit && ordinal < 0 && core_current() == 0);
}

/* What was not given back; how many things.  With the lock held. */
static unsigned long left(bool say)
{
    unsigned long n[4] = {0}, sum = 0;
    static const char *const what[] = {"streams", "events", "registrations", "contexts"};
    for (struct stream *s = streams; s; s = s->next)
        n[0] += s->magic == STREAM;
    for (struct event *e = events; e; e = e->next)
        n[1] += e->magic == EVENT && !e->engine;
    for (struct range *r = registered; r; r = r->next)
        n[2] += r->live;
    for (int i = 0; i < FAKE_DEVICES; i++)
        n[3] += (unsigned long)retained[i];
    for (int i = 0; i < 4; i++) {
        sum += n[i];
        if (say && n[i])
            fprintf(stderr, "fake device: %lu %s left\n", n[i], what[i]);
    }
    return sum;
}

EXPORT unsigned long fake_count(const char *what)
{
    pthread_mutex_lock(&lock);
    const struct {
        const char *what;
        unsigned long n;
    } counts[] = {{"copies", copies},
                  {"bytes", bytes},
                  {"unregistered", unregistered},
                  {"registered", pinned},
                  {"left", left(false)}};
    pthread_mutex_unlock(&lock);
    for (unsigned i = 0; i < sizeof counts / sizeof *counts; i++)
        if (!strcmp(counts[i].what, what))
            return counts[i].n;
    core_die("%s is not counted", what);
}

EXPORT void fake_reset(void)
{
    core_forget_calls();
    pthread_mutex_lock(&lock);
    copies = bytes = unregistered = 0;
    pthread_mutex_unlock(&lock);
}

EXPORT int fake_leaks(void)
{
    pthread_mutex_lock(&lock);
    int n = (int)left(true);
    pthread_mutex_unlock(&lock);
    return n;
}

__attribute__((destructor)) static void last(void)
{
    if (fake_leaks())
        _exit(86);
}

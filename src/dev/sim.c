/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sim.c - a device for tests: plain memory that behaves as an accelerator's does at its worst.
 * Copies are moved by the stream's own thread, some time after the call, so whoever forgets to wait
 * for an event, reuses a buffer early or looks too soon sees wrong data, on any machine.  On
 * request it also fails every Nth copy and insists on pinned host memory.
 *
 * A stream is one thread and one queue of items.  The pinned ranges have a mutex, a leaf.
 */
#include "dev/dev.h"

#include <stdlib.h>

enum {
    MAX_QUEUED = 1 << 14,      /* items on a stream */
    EVENT_PATIENCE_MS = 60000, /* an event nobody fires fails what waits for it */
};

struct pinned {
    struct pinned *next;
    char *p;
    size_t len;
};

struct sim {
    int64_t delay_us, fail_every; /* options */
    int need_pin;
    _Atomic uint64_t copies;
    pthread_mutex_t lock; /* guards pinned */
    struct pinned *pinned;
};

struct ucmi_sim_event {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool fired;
    unsigned queued;       /* how often something is to wait for it */
    _Atomic unsigned refs; /* the test's, and one for each stream that waits */
};

struct item {
    enum { COPY, AFTER, THEN } kind;
    int err; /* COPY: fails with this instead of moving anything */
    int to_host;
    struct ucmi_sim_event *event;
    void (*fn)(void *arg, int err);
    void *arg;
    size_t n;
    struct ucm_copy v[];
};

struct stream {
    struct sim *sim;
    pthread_t thread;
    struct ucmi_queue items;
    _Atomic bool stop;
    int err; /* the first since the last THEN; the thread's own */
};

/* ---- events ---- */

struct ucmi_sim_event *ucmi_sim_event_new(void)
{
    struct ucmi_sim_event *event = calloc(1, sizeof *event);
    if (!event)
        return NULL;
    pthread_mutex_init(&event->lock, NULL);
    ucmi_cond_init(&event->cond);
    event->refs = 1;
    return event;
}

void ucmi_sim_event_fire(struct ucmi_sim_event *event)
{
    pthread_mutex_lock(&event->lock);
    event->fired = true;
    pthread_cond_broadcast(&event->cond);
    pthread_mutex_unlock(&event->lock);
}

void ucmi_sim_event_await(struct ucmi_sim_event *event, unsigned n)
{
    pthread_mutex_lock(&event->lock);
    while (event->queued < n)
        pthread_cond_wait(&event->cond, &event->lock);
    pthread_mutex_unlock(&event->lock);
}

void ucmi_sim_event_free(struct ucmi_sim_event *event)
{
    if (!event || atomic_fetch_sub(&event->refs, 1) != 1)
        return;
    pthread_cond_destroy(&event->cond);
    pthread_mutex_destroy(&event->lock);
    free(event);
}

static int event_wait(struct ucmi_sim_event *event)
{
    uint64_t deadline = ucmi_now_ns() + EVENT_PATIENCE_MS * 1000000ull;
    int err = 0;
    pthread_mutex_lock(&event->lock);
    while (!event->fired && !err)
        err = ucmi_cond_wait(&event->cond, &event->lock, deadline);
    pthread_mutex_unlock(&event->lock);
    return err ? -ETIMEDOUT : 0;
}

/* ---- streams ---- */

static void copy_now(const struct sim *sim, const struct item *item)
{
    struct timespec t = {.tv_sec = sim->delay_us / 1000000,
                         .tv_nsec = sim->delay_us % 1000000 * 1000};
    if (sim->delay_us > 0)
        clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL);
    for (size_t i = 0; i < item->n; i++) {
        const struct ucm_copy *c = &item->v[i];
        if (item->to_host)
            memcpy(c->host, c->dev, c->len);
        else
            memcpy(c->dev, c->host, c->len);
    }
}

static void perform(struct stream *s, struct item *item)
{
    int err = item->err;
    switch (item->kind) {
    case COPY:
        if (!err && !s->err) /* as on a real device, nothing moves after a failure */
            copy_now(s->sim, item);
        break;
    case AFTER:
        err = event_wait(item->event);
        ucmi_sim_event_free(item->event);
        break;
    case THEN:
        err = s->err;
        s->err = 0;
        item->fn(item->arg, err);
        return;
    }
    if (!s->err)
        s->err = err;
}

static void *run(void *arg)
{
    struct stream *s = arg;
    void *item;
    size_t n;
    while ((n = ucmi_queue_pop(&s->items, &item, 1, s->stop ? 0 : UINT64_MAX)) || !s->stop)
        if (n) {
            perform(s, item);
            free(item);
        }
    return NULL;
}

static int sim_stream_new(void *d, void **stream_p)
{
    struct stream *s = calloc(1, sizeof *s);
    if (!s)
        return -ENOMEM;
    s->sim = d;
    int err = ucmi_queue_init(&s->items, MAX_QUEUED);
    if (!err)
        err = ucmi_thread_start(&s->thread, "ucm-sim", run, s);
    if (err) {
        ucmi_queue_destroy(&s->items);
        free(s);
        return err;
    }
    *stream_p = s;
    return 0;
}

static void sim_stream_free(void *d, void *stream)
{
    struct stream *s = stream;
    if (!s)
        return;
    s->stop = true;
    ucmi_queue_kick(&s->items);
    pthread_join(s->thread, NULL);
    ucmi_queue_destroy(&s->items);
    free(s);
}

/* ---- the device ---- */

static int sim_open(void *d, int ordinal, char *why, size_t why_len)
{
    struct sim *sim = d;
    pthread_mutex_init(&sim->lock, NULL);
    return 0;
}

static void sim_close(void *d)
{
    struct sim *sim = d;
    for (struct pinned *r = sim->pinned, *next; r; r = next) {
        next = r->next;
        free(r);
    }
    pthread_mutex_destroy(&sim->lock);
}

static int sim_pin(void *d, void *p, size_t len)
{
    struct sim *sim = d;
    struct pinned *r = malloc(sizeof *r);
    if (!r)
        return -ENOMEM;
    *r = (struct pinned){.p = p, .len = len};
    pthread_mutex_lock(&sim->lock);
    r->next = sim->pinned;
    sim->pinned = r;
    pthread_mutex_unlock(&sim->lock);
    return 0;
}

static void sim_unpin(void *d, void *p, size_t len)
{
    struct sim *sim = d;
    struct pinned *gone = NULL;
    pthread_mutex_lock(&sim->lock);
    for (struct pinned **r = &sim->pinned; *r; r = &(*r)->next)
        if ((*r)->p == p && (*r)->len == len) {
            gone = *r;
            *r = gone->next;
            break;
        }
    pthread_mutex_unlock(&sim->lock);
    if (!gone)
        ucmi_log(UCM_ERROR, "sim", "unpin of %zu bytes that are not pinned", len);
    free(gone);
}

static bool is_pinned(struct sim *sim, const struct ucm_copy *c)
{
    bool found = false;
    pthread_mutex_lock(&sim->lock);
    for (struct pinned *r = sim->pinned; r && !found; r = r->next)
        found = (char *)c->host >= r->p && (char *)c->host + c->len <= r->p + r->len;
    pthread_mutex_unlock(&sim->lock);
    return found;
}

static int sim_copy(void *d, void *stream, int to_host, const struct ucm_copy *v, size_t n)
{
    struct sim *sim = d;
    for (size_t i = 0; sim->need_pin && i < n; i++)
        if (!is_pinned(sim, &v[i]))
            return -EINVAL;

    struct item *item = malloc(sizeof *item + n * sizeof *v);
    if (!item)
        return -ENOMEM;
    *item = (struct item){.kind = COPY, .to_host = to_host, .n = n};
    if (n > 0)
        memcpy(item->v, v, n * sizeof *v);
    uint64_t nth = atomic_fetch_add(&sim->copies, 1) + 1;
    if (sim->fail_every > 0 && nth % (uint64_t)sim->fail_every == 0)
        item->err = -EIO;
    int err = ucmi_queue_push(&((struct stream *)stream)->items, item);
    if (err)
        free(item);
    return err;
}

static int sim_after(void *d, void *stream, void *event)
{
    struct ucmi_sim_event *e = event;
    struct item *item = calloc(1, sizeof *item);
    if (!item)
        return -ENOMEM;
    *item = (struct item){.kind = AFTER, .event = e};
    atomic_fetch_add(&e->refs, 1);
    pthread_mutex_lock(&e->lock);
    int err = ucmi_queue_push(&((struct stream *)stream)->items, item);
    e->queued += !err;
    pthread_cond_broadcast(&e->cond);
    pthread_mutex_unlock(&e->lock);
    if (err) {
        ucmi_sim_event_free(e);
        free(item);
    }
    return err;
}

static int sim_then(void *d, void *stream, void (*fn)(void *arg, int err), void *arg)
{
    struct item *item = calloc(1, sizeof *item);
    if (!item)
        return -ENOMEM;
    *item = (struct item){.kind = THEN, .fn = fn, .arg = arg};
    int err = ucmi_queue_push(&((struct stream *)stream)->items, item);
    if (err)
        free(item);
    return err;
}

static const struct ucm_option options[] = {
    {"sim_delay_us", UCM_T_INT, offsetof(struct sim, delay_us), "0", "0", "1000000",
     "the simulated device (for tests) takes this long for a copy"},
    {"sim_fail_every", UCM_T_INT, offsetof(struct sim, fail_every), "0", "0", NULL,
     "the simulated device (for tests) fails every Nth copy; 0: none"},
    {"sim_need_pin", UCM_T_BOOL, offsetof(struct sim, need_pin), "false", NULL, NULL,
     "the simulated device (for tests) refuses host memory that is not pinned"},
    {NULL},
};

const struct ucm_dev_ops ucmi_dev_sim = {
    .p = {.kind = "device",
          .name = "sim",
          .help = "a simulated asynchronous device, for tests",
          .options = options,
          .size = sizeof(struct sim)},
    .open = sim_open,
    .close = sim_close,
    .pin = sim_pin,
    .unpin = sim_unpin,
    .stream_new = sim_stream_new,
    .stream_free = sim_stream_free,
    .copy = sim_copy,
    .after = sim_after,
    .then = sim_then,
};

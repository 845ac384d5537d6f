/* SPDX-License-Identifier: Apache-2.0 */
#include "device.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dev/dev.h"
#include "support.h"

/* A vendor's device is the second one, so that who forgets to say which finds another. */
struct ts_device ts_devices[] = {
    {"host", NULL, 0, false},
    {"sim", NULL, 0, true},
    {"cuda", "libcuda.so.1", 1, true},
    {"ascend", "libascendcl.so", 1, true},
    {"musa", "libmusart.so", 1, true, true},
    {"maca", "libmcruntime.so", 1, true, true},
    {"hip", "libamdhip64.so", 1, true, true},
    {"cudart", "libcudart.so", 1, true, true},
    {NULL}, /* room for one that only some tests have */
};
size_t ts_ndevices = TS_LEN(ts_devices) - 1;

static struct fake fakes[TS_LEN(ts_devices)];
static pthread_once_t once = PTHREAD_ONCE_INIT;

struct fake ts_fake_in(const char *file)
{
    struct fake fake;
    void *library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        ts_die("%s", dlerror());
#define X(type, name, args)                                                                        \
    if (!(fake.name = (type(*) args)dlsym(library, #name)))                                        \
        ts_die("%s is no fake: %s", file, dlerror());
    FAKE_CALLS(X)
#undef X
    return fake;
}

static void bind_all(void)
{
    for (size_t i = 0; i < ts_ndevices; i++)
        if (ts_devices[i].library)
            fakes[i] = ts_fake_in(ts_devices[i].library);
}

const struct ts_device *ts_device(const char *name)
{
    for (size_t i = 0; i < ts_ndevices; i++)
        if (!strcmp(ts_devices[i].name, name))
            return &ts_devices[i];
    ts_die("no device is called %s", name);
}

const struct fake *ts_fake(const struct ts_device *d)
{
    if (!d->library)
        return NULL;
    pthread_once(&once, bind_all);
    return &fakes[d - ts_devices];
}

struct ts_bytes ts_bytes_new(const struct ts_device *d, size_t len)
{
    const struct fake *fake = ts_fake(d);
    struct ts_bytes b = {.len = len};
    if (fake) {
        b.at = fake->fake_malloc(d->id, len);
        b.view = fake->fake_view(b.at);
        return b;
    }
    if (d->engine) {
        b.at = b.view = d->engine->bytes_new(len);
        return b;
    }
    b.at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b.at == MAP_FAILED)
        ts_die("no memory for %zu bytes", len);
    b.view = b.at;
    return b;
}

void ts_bytes_free(const struct ts_device *d, struct ts_bytes *b)
{
    const struct fake *fake = ts_fake(d);
    if (b->at && fake)
        fake->fake_mfree(b->at);
    else if (b->at && d->engine)
        d->engine->bytes_free(b->at);
    else if (b->at)
        munmap(b->at, b->len);
    *b = (struct ts_bytes){0};
}

void *ts_event_new(const struct ts_device *d)
{
    const struct fake *fake = ts_fake(d);
    return fake        ? fake->fake_event()
           : d->engine ? d->engine->event_new()
                       : (void *)ucmi_sim_event_new();
}

void ts_event_fire(const struct ts_device *d, void *event)
{
    const struct fake *fake = ts_fake(d);
    if (fake)
        fake->fake_fire(event);
    else if (d->engine)
        d->engine->event_fire(event);
    else
        ucmi_sim_event_fire(event);
}

void ts_event_await(const struct ts_device *d, void *event, unsigned n, unsigned long copies)
{
    const struct fake *fake = ts_fake(d);
    if (fake)
        fake->fake_settle(copies);
    else if (d->engine)
        usleep(1000); /* it cannot be asked: a test fails more seldom, not wrongly */
    else
        ucmi_sim_event_await(event, n);
}

void ts_event_free(const struct ts_device *d, void *event)
{
    const struct fake *fake = ts_fake(d);
    if (fake)
        fake->fake_event_end(event);
    else if (d->engine)
        d->engine->event_free(event);
    else
        ucmi_sim_event_free(event);
}

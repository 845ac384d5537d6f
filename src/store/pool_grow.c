/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool_grow.c - how the slots of a pool get their memory: allocated, brought into the page tables,
 * registered with the device.
 *
 * All three go in the order of the slots in memory, a step of whole slots at a time; a slot can be
 * claimed when its step is allocated, so touching it cannot fail later, however full the filesystem
 * gets.  One member of the pool allocates, in a thread; when it is gone, who joins or sweeps goes
 * on where it stopped.
 *
 * To register pages is to allocate them, and takes as long, so each process registers, in a thread
 * of its own, what has been allocated.  It sleeps until there is more.  Who needs a slot before its
 * turn has come registers its step itself.  A step is registered at once, and no copy is of two
 * slots, so none reaches from what was registered at one time to what was at another.
 */
#include "store/pool.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum {
    NICE = 10,
    STEPS_MAX = 4096,     /* of a large pool: a device has to find its way among them */
    TOUCH_MIN = 64 << 10, /* below that a call costs more than it saves */
    GROWTH_MS = 100,      /* how often a thread that waits for more looks whether it is to end */
    GROWTH_WAITS = 100,   /* and for how long; what comes later is registered when it is used */
};
enum { LOOSE, PINNED, REFUSED }; /* a step, with the device */
static const uint64_t GROW_STEP = 16 << 20, GROW_FIRST = 64 << 20;
static const char SPEAKER[] = "Cache";

int ucmi_pool_grow_init(struct ucmi_pool *p)
{
    const struct ucmi_pool_layout *l = &p->layout;
    p->step = (uint32_t)MAX(MAX(GROW_STEP / l->pitch, 1), l->nslots / STEPS_MAX);
    p->touched = calloc(l->nslots / 64 + 1, sizeof *p->touched);
    p->steps = calloc(l->nslots / p->step + 1, sizeof *p->steps);
    return p->touched && p->steps ? 0 : -ENOMEM;
}

/* ---- allocating ---- */

int ucmi_pool_reserve(int fd, uint64_t from, uint64_t len)
{
    int err;
    do
        err = -posix_fallocate(fd, (off_t)from, (off_t)len);
    while (err == -EINTR);
    return err;
}

static void tell_who_waits(struct ucmi_pool *p)
{
    syscall(SYS_futex, &p->head->grown, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Allocates the memory of the slots up to that place. */
static int allocate(struct ucmi_pool *p, uint32_t end)
{
    uint32_t grown = ucmi_pool_grown(p);
    int err = ucmi_pool_reserve(p->fd, p->layout.data_at + grown * p->layout.pitch,
                                (end - grown) * p->layout.pitch);
    if (!err) {
        atomic_store_explicit(&p->head->grown, end, memory_order_release);
        tell_who_waits(p);
    }
    return err;
}

int ucmi_pool_grow_first(struct ucmi_pool *p)
{
    uint64_t first = MAX(GROW_FIRST / p->layout.pitch, 1);
    return allocate(p, (uint32_t)MIN(ROUND_UP(first, p->step), p->layout.nslots));
}

static void *grow_main(void *arg)
{
    struct ucmi_pool *p = arg;
    const struct ucmi_pool_layout *l = &p->layout;
    setpriority(PRIO_PROCESS, 0, NICE); /* this thread alone: the engine starts at the same time */
    madvise(p->head, l->data_at, MADV_POPULATE_WRITE);
    for (uint32_t at = 0, end; at < l->nslots && !atomic_load(&p->stop); at = end) {
        end = at + MIN(p->step, l->nslots - at);
        int err = end > ucmi_pool_grown(p) ? allocate(p, end) : 0;
        if (err) {
            ucmi_log(UCM_WARN, SPEAKER,
                     "%s: memory for %u of %u blocks allocated, the pool stays so large: %s",
                     p->path, ucmi_pool_grown(p), l->nslots, ucmi_file_error(err));
            atomic_store(&p->head->grower, UCMI_POOL_MEMBERS); /* a later member tries again */
            break;
        }
        /* An old kernel knows no such advice: the first touch of each page pays. */
        madvise(p->data + at * l->pitch, (end - at) * l->pitch, MADV_POPULATE_WRITE);
    }
    return NULL;
}

void ucmi_pool_grow_start(struct ucmi_pool *p)
{
    atomic_store(&p->head->grower, p->me);
    p->growing = ucmi_thread_start(&p->grow, "ucm-grow", grow_main, p) == 0;
}

void ucmi_pool_grow_if_nobody_does(struct ucmi_pool *p, uint64_t others)
{
    uint32_t grower = atomic_load(&p->head->grower);
    if (!p->growing && ucmi_pool_grown(p) < p->layout.nslots &&
        (grower >= UCMI_POOL_MEMBERS || !(others >> grower & 1)))
        ucmi_pool_grow_start(p);
}

/* ---- registering ---- */

static char *step_memory(const struct ucmi_pool *p, uint32_t step, size_t *len_p)
{
    uint32_t first = step * p->step;
    *len_p = MIN(p->step, p->layout.nslots - first) * p->layout.pitch;
    return p->data + first * p->layout.pitch;
}

static void pin_step(struct ucmi_pool *p, uint32_t step)
{
    static struct ucmi_log_gate gate;
    size_t len;
    if (atomic_load_explicit(&p->steps[step], memory_order_acquire) != LOOSE)
        return;
    char *memory = step_memory(p, step, &len);
    pthread_mutex_lock(&p->pin_lock);
    if (atomic_load(&p->steps[step]) == LOOSE) {
        int err = p->dev->pin(p->dev_state, memory, len);
        atomic_store_explicit(&p->steps[step], err ? REFUSED : PINNED, memory_order_release);
        if (err)
            ucmi_log_gated(&gate, 60, UCM_WARN, SPEAKER,
                           "device %s cannot register %zu bytes of the pool: %s; copies there are "
                           "slow or fail: raise the limit of locked memory (ulimit -l) or give a "
                           "smaller cache_buffer_capacity_gb",
                           p->dev->p.name, len, ucm_strerror(err));
    }
    pthread_mutex_unlock(&p->pin_lock);
}

/* Whether the slots up to that place have memory by now, or soon. */
static bool await_growth(struct ucmi_pool *p, uint32_t end)
{
    struct timespec patience = {.tv_nsec = GROWTH_MS * 1000000};
    uint32_t seen = 0;
    for (unsigned waits = 0; waits < GROWTH_WAITS && !atomic_load(&p->stop); waits++) {
        uint32_t grown = ucmi_pool_grown(p);
        if (grown >= end)
            return true;
        if (grown != seen)
            waits = 0;
        seen = grown;
        syscall(SYS_futex, &p->head->grown, FUTEX_WAIT, seen, &patience, NULL, 0);
    }
    return false;
}

static void *pin_main(void *arg)
{
    struct ucmi_pool *p = arg;
    for (uint32_t at = 0; at < p->layout.nslots; at += MIN(p->step, p->layout.nslots - at)) {
        if (!await_growth(p, MIN(at + p->step, p->layout.nslots)))
            break;
        pin_step(p, at / p->step);
    }
    return NULL;
}

void ucmi_pool_pin_start(struct ucmi_pool *p)
{
    if (p->dev && p->dev->pin)
        p->pinning = ucmi_thread_start(&p->pin, "ucm-pin", pin_main, p) == 0;
}

void ucmi_pool_touch(struct ucmi_pool *p, uint32_t slot)
{
    if (p->dev && p->dev->pin) {
        pin_step(p, ucmi_pool_place(p, slot) / p->step);
        return;
    }
    uint64_t bit = UINT64_C(1) << slot % 64;
    _Atomic uint64_t *word = &p->touched[slot / 64];
    if (p->layout.pitch < TOUCH_MIN || (atomic_load_explicit(word, memory_order_relaxed) & bit) ||
        (atomic_fetch_or_explicit(word, bit, memory_order_relaxed) & bit))
        return;
    madvise(ucmi_pool_memory(p, slot), p->layout.pitch, MADV_POPULATE_WRITE);
}

/* ---- the end ---- */

void ucmi_pool_grow_stop(struct ucmi_pool *p)
{
    atomic_store(&p->stop, true);
    if (p->pinning) {
        tell_who_waits(p);
        pthread_join(p->pin, NULL);
    }
    if (p->growing)
        pthread_join(p->grow, NULL);
    p->growing = p->pinning = false;
    for (uint32_t step = 0; p->steps && step * p->step < p->layout.nslots; step++) {
        size_t len;
        char *memory = step_memory(p, step, &len);
        if (atomic_load(&p->steps[step]) == PINNED)
            p->dev->unpin(p->dev_state, memory, len);
    }
    free(p->steps);
    free(p->touched);
    p->steps = NULL;
    p->touched = NULL;
    atomic_store(&p->stop, false); /* a pool that cannot be shared is tried as a private one */
}

/* On tmpfs to punch a hole takes pages out of the file, whoever holds on to them; a huge page that
 * is held stays, and shows as data.  Space that others take meanwhile is asked for again. */
bool ucmi_pool_renew(struct ucmi_pool *p, uint32_t slot, bool keep)
{
    off_t at = ucmi_pool_memory(p, slot) - (char *)p->head, len = (off_t)p->layout.pitch, data;
    bool fresh = !atomic_load(&p->head->fixed) &&
                 fallocate(p->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, len) == 0 &&
                 ((data = lseek(p->fd, at, SEEK_DATA)) >= at + len || (data < 0 && errno == ENXIO));
    return (fresh || keep) && ucmi_pool_reserve(p->fd, (uint64_t)at, (uint64_t)len) == 0;
}

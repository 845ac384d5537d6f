/* SPDX-License-Identifier: Apache-2.0 */
/*
 * queue.c - a bounded ring between many pushers and one popper.  One mutex guards it all, held for
 * a few instructions; the popper sleeps on a condition variable, and is signalled only when it
 * does, so that pushing to a busy popper makes no system call.  Items come out in the order they
 * went in.
 */
#include "base/base.h"

#include <stdlib.h>

int ucmi_queue_init(struct ucmi_queue *q, size_t cap)
{
    if (cap == 0)
        return -EINVAL;
    void **ring = calloc(cap, sizeof *ring);
    if (!ring)
        return -ENOMEM;
    *q = (struct ucmi_queue){.ring = ring, .cap = cap};
    pthread_mutex_init(&q->lock, NULL);
    ucmi_cond_init(&q->more);
    return 0;
}

void ucmi_queue_destroy(struct ucmi_queue *q)
{
    if (!q->ring)
        return;
    pthread_cond_destroy(&q->more);
    pthread_mutex_destroy(&q->lock);
    free(q->ring);
    q->ring = NULL;
}

/* Called with the lock; signals under it, so that the popper may destroy the queue once it has the
 * last item without the pusher touching it afterwards. */
static void wake(struct ucmi_queue *q)
{
    if (q->sleeping) {
        q->sleeping = false;
        pthread_cond_signal(&q->more);
    }
}

int ucmi_queue_push(struct ucmi_queue *q, void *item)
{
    int err = -EAGAIN;
    pthread_mutex_lock(&q->lock);
    if (q->count < q->cap) {
        size_t at = q->head + q->count;
        q->ring[at < q->cap ? at : at - q->cap] = item;
        q->count++;
        wake(q);
        err = 0;
    }
    pthread_mutex_unlock(&q->lock);
    return err;
}

void ucmi_queue_kick(struct ucmi_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->kicked = true;
    wake(q);
    pthread_mutex_unlock(&q->lock);
}

size_t ucmi_queue_pop(struct ucmi_queue *q, void **items, size_t max, uint64_t deadline_ns)
{
    pthread_mutex_lock(&q->lock);
    while (q->count == 0 && !q->kicked && deadline_ns != 0) {
        q->sleeping = true;
        int err = ucmi_cond_wait(&q->more, &q->lock, deadline_ns);
        q->sleeping = false;
        if (err)
            break;
    }
    q->kicked = false;
    size_t n = MIN(q->count, max);
    for (size_t i = 0; i < n; i++) {
        items[i] = q->ring[q->head];
        q->head = q->head + 1 < q->cap ? q->head + 1 : 0;
    }
    q->count -= n;
    pthread_mutex_unlock(&q->lock);
    return n;
}

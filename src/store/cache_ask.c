/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache_ask.c - asking the tier below whether it has a block, before another has to go for it: the
 * load of a key that nobody has must not cost the pool a block.
 *
 * A lookup may take lookup_timeout_ms, so it is neither the in mover's nor the engine's to wait
 * for: a thread of its own, "ucm-ask", makes them, a batch at a time, and posts the answers to the
 * in mover.  Parts that wait to be asked for are in cache.unasked, those asked for now in
 * ask.parts; both end in time whatever the lookup does.
 *
 * ask.lock, a leaf, guards ready and stop.  keys, found and n are the thread's from ready to the
 * post, else the in mover's.
 */
#include "store/cache.h"

static void answered(struct mover *m, struct event *e, struct link *fin)
{
    struct ask *a = CONTAINER_OF(e, struct ask, e);
    a->under_way = false;
    for (struct link *l; (l = list_take(&a->parts));) {
        struct part *p = LIST_ITEM(l, struct part, link);
        p->known = a->found[p->asked_at];
        if (p->known)
            ucmi_part_todo(p);
        else
            ucmi_part_over(p, -ENOENT, fin);
    }
}

static void *ask_main(void *arg)
{
    struct cache *c = arg;
    struct ask *a = &c->ask;
    struct ucm_tier *next = c->t->next;
    pthread_mutex_lock(&a->lock);
    for (;;) {
        while (!a->ready && !a->stop)
            ucmi_cond_wait(&a->more, &a->lock, UINT64_MAX);
        if (!a->ready)
            break;
        a->ready = false;
        pthread_mutex_unlock(&a->lock);
        memset(a->found, 0, a->n);
        struct ucm_lookup call = {0};
        next->ops->lookup(next, a->keys, a->n, c->geo->rank, 1, a->found, &call);
        ucmi_mover_post(&c->in, &a->e);
        pthread_mutex_lock(&a->lock);
    }
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

int ucmi_ask_start(struct cache *c)
{
    struct ask *a = &c->ask;
    a->e.handle = answered;
    list_init(&a->parts);
    list_init(&c->unasked);
    pthread_mutex_init(&a->lock, NULL);
    ucmi_cond_init(&a->more);
    int err = ucmi_thread_start(&a->thread, "ucm-ask", ask_main, c);
    a->started = !err;
    return err;
}

void ucmi_ask_stop(struct cache *c)
{
    struct ask *a = &c->ask;
    if (!a->started)
        return;
    pthread_mutex_lock(&a->lock);
    a->stop = true;
    pthread_cond_signal(&a->more);
    pthread_mutex_unlock(&a->lock);
    pthread_join(a->thread, NULL);
    pthread_cond_destroy(&a->more);
    pthread_mutex_destroy(&a->lock);
}

/* With cache.lock held, on the in mover: the next batch, if there is none under way. */
void ucmi_ask_next(struct cache *c)
{
    struct ask *a = &c->ask;
    if (a->under_way || list_empty(&c->unasked))
        return;
    struct link *l;
    for (a->n = 0; a->n < ASK_MAX && (l = list_take(&c->unasked)); a->n++) {
        struct part *p = LIST_ITEM(l, struct part, link);
        list_add(&a->parts, l);
        p->asked_at = a->n;
        a->keys[a->n] = part_slice(p)->key;
    }
    a->under_way = true;
    pthread_mutex_lock(&a->lock);
    a->ready = true;
    pthread_cond_signal(&a->more);
    pthread_mutex_unlock(&a->lock);
}

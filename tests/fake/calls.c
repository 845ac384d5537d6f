/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calls.c - each call of a fake's functions passes here: it is counted, and fails or hangs if the
 * test wants it to.
 */
#include "core.h"

#include <pthread.h>
#include <string.h>

enum { MAX_CALLS = 64, FAILURES = 4 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static const char *hanging;
static struct {
    const char *words;
    unsigned long nth;
    int code;
} failing[FAILURES];
static struct {
    const char *name;
    unsigned long n;
} calls[MAX_CALLS];

/* Whether the name ends with one of the words: vendors turn theirs round. */
static bool is_one_of(const char *name, const char *words)
{
    for (size_t len; *words; words += len + (words[len] == '|')) {
        len = strcspn(words, "|");
        size_t n = strlen(name);
        if (n >= len && !strncmp(name + n - len, words, len))
            return true;
    }
    return false;
}

int core_enter(const char *name)
{
    pthread_mutex_lock(&lock);
    unsigned i = 0;
    while (i < MAX_CALLS && calls[i].name && strcmp(calls[i].name, name))
        i++;
    if (i == MAX_CALLS)
        core_die("too many functions");
    calls[i].name = name;
    calls[i].n++;
    pthread_cond_broadcast(&changed);
    while (hanging && is_one_of(name, hanging))
        pthread_cond_wait(&changed, &lock);
    int code = core_broken();
    for (i = 0; i < FAILURES; i++)
        if (!code && failing[i].nth && (!failing[i].words || is_one_of(name, failing[i].words)) &&
            --failing[i].nth == 0)
            code = failing[i].code;
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT void fake_fail(const char *words, unsigned long nth, int code)
{
    pthread_mutex_lock(&lock);
    unsigned i = 0;
    if (!words)
        memset(failing, 0, sizeof failing);
    while (failing[i].nth)
        if (++i == FAILURES)
            core_die("too many failures");
    failing[i].words = words;
    failing[i].nth = nth;
    failing[i].code = code;
    pthread_mutex_unlock(&lock);
}

EXPORT void fake_hang(const char *words)
{
    pthread_mutex_lock(&lock);
    hanging = words;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static unsigned long count_calls(const char *words)
{
    unsigned long n = 0;
    for (unsigned i = 0; i < MAX_CALLS && calls[i].name; i++)
        if (!words || is_one_of(calls[i].name, words))
            n += calls[i].n;
    return n;
}

EXPORT unsigned long fake_calls(const char *words)
{
    pthread_mutex_lock(&lock);
    unsigned long n = count_calls(words);
    pthread_mutex_unlock(&lock);
    return n;
}

EXPORT void fake_await(const char *words, unsigned long n)
{
    pthread_mutex_lock(&lock);
    while (count_calls(words) < n)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

EXPORT const char *fake_called(unsigned i)
{
    pthread_mutex_lock(&lock);
    const char *name = i < MAX_CALLS ? calls[i].name : NULL;
    pthread_mutex_unlock(&lock);
    return name;
}

void core_forget_calls(void)
{
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < MAX_CALLS; i++)
        calls[i].n = 0;
    pthread_mutex_unlock(&lock);
}

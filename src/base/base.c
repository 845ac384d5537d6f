/* SPDX-License-Identifier: Apache-2.0 */
/*
 * base.c - errors, hex, chance, threads and condition variables: the few things every part needs
 * and libc spells at length.  Keeps no state; every function may be called from any thread.
 */
#include "base/base.h"

#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/random.h>
#include <unistd.h>

const char *ucm_version(void)
{
    return UCM_VERSION;
}

const char *ucm_strerror(int err)
{
    if (err == 0)
        return "success";
    if (err == INT_MIN)
        return ucmi_file_error(err);
    switch (err < 0 ? -err : err) {
#define X(name, text)                                                                              \
    case name: return text;
        UCM_ERRORS(X)
#undef X
    default: return ucmi_file_error(err);
    }
}

const char *ucmi_file_error(int err)
{
    const char *system = err == INT_MIN ? NULL : strerrordesc_np(err < 0 ? -err : err);
    return system ? system : "unknown error";
}

int ucmi_fail(char *why, size_t len, int err, const char *fmt, ...)
{
    if (why && len > 0) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(why, len, fmt, ap);
        va_end(ap);
    }
    return err;
}

void ucmi_hex(const uint8_t *b, size_t n, char *out)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < n; i++) {
        out[2 * i] = digits[b[i] >> 4];
        out[2 * i + 1] = digits[b[i] & 15];
    }
    out[2 * n] = '\0';
}

uint64_t ucmi_random_word(void)
{
    uint64_t v;
    if (getrandom(&v, sizeof v, 0) != sizeof v)
        v = ucmi_now_ns() ^ (uint64_t)getpid() << 40; /* only has to be rarely the same */
    return v;
}

/* How many bytes the character at p takes, or 0 when they are no UTF-8 or a control character. */
static size_t printable(const unsigned char *p)
{
    /* What may follow a first byte differs for a few of them: no overlong forms, no surrogates. */
    unsigned char low = 0x80, high = 0xbf;
    size_t n = *p < 0x80 ? 1 : *p < 0xe0 ? 2 : *p < 0xf0 ? 3 : 4;
    if (n == 1)
        return *p >= ' ' && *p != 0x7f;
    if (*p < 0xc2 || *p > 0xf4)
        return 0;
    if (*p == 0xc2 || *p == 0xe0) /* C2 80 to C2 9F are control characters too */
        low = 0xa0;
    else if (*p == 0xf0)
        low = 0x90;
    else if (*p == 0xed)
        high = 0x9f;
    else if (*p == 0xf4)
        high = 0x8f;
    for (size_t i = 1; i < n; i++, low = 0x80, high = 0xbf)
        if (p[i] < low || p[i] > high)
            return 0;
    return n;
}

void ucmi_scrub(char *text)
{
    for (size_t n; *text; text += n) {
        n = printable((const unsigned char *)text);
        if (n == 0) {
            *text = '?';
            n = 1;
        }
    }
}

int ucmi_thread_start(pthread_t *thread, const char *name, void *(*fn)(void *), void *arg)
{
    /* Signals belong to the host program's threads.  Faults are left open: blocked, they would kill
     * the process without the host's crash reporter (faulthandler, a sanitizer) having its say. */
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT};
    sigset_t block, old;
    sigfillset(&block);
    for (size_t i = 0; i < ARRAY_LEN(faults); i++)
        sigdelset(&block, faults[i]);
    int err = pthread_sigmask(SIG_BLOCK, &block, &old);
    if (err)
        return -err;
    pthread_t started;
    err = pthread_create(&started, NULL, fn, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (err)
        return -err;
    char cut[16];
    snprintf(cut, sizeof cut, "%s", name);
    pthread_setname_np(started, cut);
    *thread = started;
    return 0;
}

void ucmi_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
}

int ucmi_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline_ns)
{
    if (deadline_ns == UINT64_MAX)
        return pthread_cond_wait(cond, lock);
    struct timespec t = {.tv_sec = (time_t)(deadline_ns / 1000000000u),
                         .tv_nsec = (long)(deadline_ns % 1000000000u)};
    return pthread_cond_timedwait(cond, lock, &t);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Any thread. */
#include "alloc.h"

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static _Atomic uint64_t at, seen, bytes, failed, dice;
static _Atomic unsigned chance;
static _Atomic int64_t live;

void alloc_fail_at(uint64_t n)
{
    atomic_store(&seen, 0);
    atomic_store(&bytes, 0);
    atomic_store(&at, n);
}

void alloc_fail_one_in(unsigned one_in, uint64_t seed)
{
    atomic_store(&dice, seed);
    atomic_store(&chance, one_in);
}

uint64_t alloc_seen(void)
{
    return atomic_load(&seen);
}

uint64_t alloc_bytes(void)
{
    return atomic_load(&bytes);
}

uint64_t alloc_failed(void)
{
    return atomic_load(&failed);
}

int64_t alloc_live(void)
{
    return atomic_load(&live);
}

static bool refuse(size_t size)
{
    atomic_fetch_add(&bytes, size);
    unsigned one_in = atomic_load_explicit(&chance, memory_order_relaxed);
    bool hit = atomic_fetch_add(&seen, 1) + 1 == atomic_load(&at);
    if (one_in && !hit) {
        uint64_t z = atomic_fetch_add(&dice, 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        hit = (z ^ (z >> 31)) % one_in == 0;
    }
    if (hit) {
        atomic_fetch_add(&failed, 1);
        errno = ENOMEM;
    }
    return hit;
}

static void *given(void *p)
{
    if (p)
        atomic_fetch_add(&live, 1);
    return p;
}

#define WRAP(type, name, params, args, size)                                                       \
    type __real_##name params;                                                                     \
    type __wrap_##name params;                                                                     \
    type __wrap_##name params                                                                      \
    {                                                                                              \
        return refuse(size) ? NULL : given(__real_##name args);                                    \
    }
WRAP(void *, malloc, (size_t n), (n), n)
WRAP(void *, calloc, (size_t n, size_t size), (n, size), n *size)
WRAP(void *, aligned_alloc, (size_t align, size_t n), (align, n), n)
WRAP(char *, strdup, (const char *s), (s), strlen(s))
WRAP(char *, strndup, (const char *s, size_t n), (s, n), n)
WRAP(FILE *, open_memstream, (char **p, size_t *n), (p, n), 0) /* the text, not the stream */
WRAP(DIR *, opendir, (const char *path), (path), 0)
WRAP(DIR *, fdopendir, (int fd), (fd), 0)

void *__real_realloc(void *p, size_t n);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_realloc(void *p, size_t n)
{
    if (refuse(n))
        return NULL;
    void *q = __real_realloc(p, n);
    return p ? q : given(q);
}

int __real_posix_memalign(void **p, size_t align, size_t n);
int __wrap_posix_memalign(void **p, size_t align, size_t n);
int __wrap_posix_memalign(void **p, size_t align, size_t n)
{
    if (refuse(n))
        return ENOMEM;
    int err = __real_posix_memalign(p, align, n);
    if (!err)
        given(*p);
    return err;
}

int __wrap_asprintf(char **p, const char *fmt, ...);
int __wrap_asprintf(char **p, const char *fmt, ...)
{
    va_list ap;
    if (refuse(0))
        return -1;
    va_start(ap, fmt);
    int n = vasprintf(p, fmt, ap);
    va_end(ap);
    if (n >= 0)
        given(*p);
    return n;
}

void __real_free(void *p);
void __wrap_free(void *p);
void __wrap_free(void *p)
{
    if (p)
        atomic_fetch_sub(&live, 1);
    __real_free(p);
}

int __real_closedir(DIR *d);
int __wrap_closedir(DIR *d);
int __wrap_closedir(DIR *d)
{
    atomic_fetch_sub(&live, 1);
    return __real_closedir(d);
}

void *__real_mmap64(void *p, size_t n, int prot, int flags, int fd, off_t off);
void *__wrap_mmap64(void *p, size_t n, int prot, int flags, int fd, off_t off);
void *__wrap_mmap64(void *p, size_t n, int prot, int flags, int fd, off_t off)
{
    void *q = refuse(n) ? MAP_FAILED : __real_mmap64(p, n, prot, flags, fd, off);
    if (q != MAP_FAILED)
        given(q);
    return q;
}

int __real_munmap(void *p, size_t n);
int __wrap_munmap(void *p, size_t n);
int __wrap_munmap(void *p, size_t n)
{
    atomic_fetch_sub(&live, 1);
    return __real_munmap(p, n);
}

int __real_pthread_create(pthread_t *t, const pthread_attr_t *attr, void *(*fn)(void *), void *arg);
int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *attr, void *(*fn)(void *), void *arg);
int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *attr, void *(*fn)(void *), void *arg)
{
    return refuse(0) ? EAGAIN : __real_pthread_create(t, attr, fn, arg);
}

unsigned alloc_fds(void)
{
    DIR *d = __real_opendir("/proc/self/fd");
    unsigned n = 0;
    while (d && readdir(d))
        n++;
    if (d)
        __real_closedir(d);
    return n;
}

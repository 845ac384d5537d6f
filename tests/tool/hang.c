/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Preloaded: storage that does not answer.  Whoever opens what is called UCM_TEST_HANGS stays there
 * whatever is sent to it but SIGKILL, or for UCM_TEST_MS.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

__attribute__((visibility("default"))) int openat64(int dir, const char *name, int flags, ...);

int openat64(int dir, const char *name, int flags, ...)
{
    const char *hangs = getenv("UCM_TEST_HANGS"), *ms = getenv("UCM_TEST_MS");
    int (*real)(int, const char *, int, ...) =
        (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64");
    sigset_t all, before;

    if (hangs && strcmp(name, hangs) == 0) {
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, &before);
        poll(NULL, 0, ms ? atoi(ms) : -1);
        sigprocmask(SIG_SETMASK, &before, NULL);
    }
    return real(dir, name, flags);
}

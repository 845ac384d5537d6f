/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Storage that does not answer (an NFS server that is away, a file system that is frozen) holds
 * whoever asks it, in the kernel, where even SIGKILL may not end it.  So a child asks, and the
 * process that was started, which has not touched the storage, listens to it for so long and no
 * longer.
 */
#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static int heart = -1; /* the child's end of the pipe */

void storage_answered(void)
{
    if (heart >= 0)
        (void)!write(heart, "", 1); /* a pipe that is full has said it */
}

void storage_done(void)
{
    if (heart >= 0)
        close(heart);
    heart = -1;
}

static int be_child(struct asking *a, int fd)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    heart = fd;
    int status = a->run(a->state, a->dir);
    return fflush(stdout) || ferror(stdout) ? cannot("standard output: %m") : status;
}

/* Whether it has ended, with its storage or with all it had to do. */
static bool listen(const struct asking *a, int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    uint64_t ms = a->seconds < INT_MAX / 1000 ? a->seconds * 1000 : INT_MAX;
    char beats[4096];
    for (;;) {
        int n = TEMP_FAILURE_RETRY(poll(&p, 1, (int)ms));
        if (n <= 0)
            return false;
        if (TEMP_FAILURE_RETRY(read(fd, beats, sizeof beats)) == 0)
            return true;
    }
}

int ask_storage(struct asking *a)
{
    int ends[2], status;
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
        return cannot("%m");
    fflush(stdout);
    pid_t child = fork();
    if (child < 0)
        return cannot("%m");
    if (child == 0) {
        close(ends[0]);
        _exit(be_child(a, ends[1]));
    }
    close(ends[1]);
    if (!listen(a, ends[0])) {
        kill(child, SIGKILL); /* not waited for: that may take until the storage is back */
        return cannot(
            "%s: the storage does not answer, for %llu seconds; engines compute meanwhile "
            "what they would load. Is its server up, its disk healthy, the file system frozen?",
            a->dir, (unsigned long long)a->seconds);
    }
    close(ends[0]);
    if (TEMP_FAILURE_RETRY(waitpid(child, &status, 0)) < 0 || !WIFEXITED(status))
        return cannot("%s: whoever looked at it was killed", a->dir);
    return WEXITSTATUS(status);
}

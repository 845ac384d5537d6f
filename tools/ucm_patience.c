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

void storage_answered(void *arg)
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

static int be_child(struct asking *a, int beats, int out)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    heart = beats;
    if (dup2(out, STDOUT_FILENO) < 0)
        return cannot("%m");
    int status = a->run(a->state, a->dir);
    return fflush(stdout) || ferror(stdout) ? cannot("standard output: %m") : status;
}

/* Whether there was something before the end; what is to be shown is. */
static bool hear(int fd, bool show)
{
    char text[65536];
    ssize_t n = TEMP_FAILURE_RETRY(read(fd, text, sizeof text));
    if (show && n > 0) {
        fwrite(text, 1, (size_t)n, stdout);
        fflush(stdout);
    }
    return n > 0;
}

/* Whether it has ended.  What it prints is printed here: a reader who takes his time, as a pager
 * does, holds this process, and the storage is not blamed. */
static bool listen(const struct asking *a, int beats, int out)
{
    struct pollfd p[] = {{.fd = beats, .events = POLLIN}, {.fd = out, .events = POLLIN}};
    int ms = a->seconds < INT_MAX / 1000 ? (int)a->seconds * 1000 : INT_MAX;
    while (p[1].fd >= 0) {
        if (TEMP_FAILURE_RETRY(poll(p, COUNT_OF(p), p[0].fd < 0 ? -1 : ms)) <= 0)
            return false;
        for (unsigned i = 0; i < COUNT_OF(p); i++)
            if (p[i].revents && !hear(p[i].fd, p[i].fd == out))
                p[i].fd = -1;
    }
    return true;
}

int ask_storage(struct asking *a)
{
    int beats[2], out[2], status;
    if (pipe2(beats, O_CLOEXEC | O_NONBLOCK) < 0 || pipe2(out, O_CLOEXEC) < 0)
        return cannot("%m");
    fflush(stdout);
    pid_t child = fork();
    if (child < 0)
        return cannot("%m");
    if (child == 0) {
        close(beats[0]);
        close(out[0]);
        _exit(be_child(a, beats[1], out[1]));
    }
    close(beats[1]);
    close(out[1]);
    if (!listen(a, beats[0], out[0])) {
        kill(child, SIGKILL); /* not waited for: that may take until the storage is back */
        return cannot(
            "%s: the storage does not answer, for %llu seconds; engines compute meanwhile "
            "what they would load. Is its server up, its disk healthy, the file system frozen?",
            a->dir, (unsigned long long)a->seconds);
    }
    if (TEMP_FAILURE_RETRY(waitpid(child, &status, 0)) < 0 || !WIFEXITED(status))
        return cannot("%s: whoever looked at it was killed", a->dir);
    return WEXITSTATUS(status);
}

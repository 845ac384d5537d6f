/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Agents seen from the test: starting, asking, killing.  Started by exec, so it does not matter
 * which threads the test has.  One thread at a time uses an agent.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support.h"

extern char **environ;

static void spawn_with_pipes(struct ts_agent *a, char *const *argv)
{
    int in[2], out[2];
    posix_spawn_file_actions_t fa;

    if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC))
        ts_die("pipe: %m");
    posix_spawn_file_actions_init(&fa);
    posix_spawn_file_actions_adddup2(&fa, in[0], 0);
    posix_spawn_file_actions_adddup2(&fa, out[1], 1);
    int err = posix_spawnp(&a->pid, argv[0], &fa, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&fa);
    close(in[0]);
    close(out[1]);
    if (err)
        ts_die("%s: %s", argv[0], strerror(err));
    a->in = in[1];
    a->out = out[0];
}

void ts_agent_start(struct ts_agent *a, const char *const *prefix, const struct ts_opts *o)
{
    char *argv[32];
    size_t n = 0;

    for (; prefix && *prefix && n < TS_LEN(argv) - 3; prefix++)
        argv[n++] = (char *)*prefix;
    argv[n++] = (char *)TS_AGENT;
    argv[n++] = (char *)o->text;
    argv[n] = NULL;
    *a = (struct ts_agent){.sent_ms = ts_now_ms()};
    signal(SIGPIPE, SIG_IGN); /* an agent that was killed is an answer, not our end */
    spawn_with_pipes(a, argv);
}

void ts_agent_send(struct ts_agent *a, const char *fmt, ...)
{
    char line[256];
    va_list ap;

    va_start(ap, fmt);
    int len = vsnprintf(line, sizeof line - 1, fmt, ap);
    va_end(ap);
    line[len++] = '\n';
    a->sent_ms = ts_now_ms();
    if (write(a->in, line, (size_t)len) != len && errno != EPIPE)
        ts_die("agent %d: %m", (int)a->pid);
}

static const char *take_line(struct ts_agent *a)
{
    static _Thread_local char line[sizeof a->line];
    char *end = memchr(a->line, '\n', a->have);

    if (!end)
        return NULL;
    size_t len = (size_t)(end - a->line);
    memcpy(line, a->line, len);
    line[len] = 0;
    a->have -= len + 1;
    memmove(a->line, end + 1, a->have);
    return line;
}

const char *ts_agent_reply_within(struct ts_agent *a, int ms, bool *late)
{
    uint64_t until = ts_now_ms() + (uint64_t)ms;
    const char *line;

    *late = false;
    while (!(line = take_line(a))) {
        struct pollfd p = {.fd = a->out, .events = POLLIN};
        uint64_t now = ts_now_ms();
        int ready = poll(&p, 1, now < until ? (int)(until - now) : 0);
        if (ready == 0) {
            *late = true;
            return NULL;
        }
        if (a->have == sizeof a->line)
            ts_die("agent %d: its line is too long", (int)a->pid);
        ssize_t n = ready < 0 ? -1 : read(a->out, a->line + a->have, sizeof a->line - a->have);
        if (n == 0)
            return NULL;
        if (n > 0)
            a->have += (size_t)n;
        else if (errno != EINTR)
            ts_die("agent %d: %m", (int)a->pid);
    }
    return line;
}

const char *ts_agent_reply(struct ts_agent *a)
{
    bool late;
    const char *line = ts_agent_reply_within(a, TS_WAIT_MS, &late);
    if (late)
        ts_die("agent %d hangs: no answer in %d ms", (int)a->pid, TS_WAIT_MS);
    return line;
}

const char *ts_agent_ask(struct ts_agent *a, const char *fmt, ...)
{
    char line[256];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    ts_agent_send(a, "%s", line);
    const char *reply = ts_agent_reply(a);
    return reply ? reply : "(gone)";
}

/* Reads until it is gone, so that a process that does not end is a hang and not a wait for ever. */
static int reap(struct ts_agent *a)
{
    int status = 0;

    while (ts_agent_reply(a) && a->pid)
        ;
    if (a->pid && waitpid(a->pid, &status, 0) != a->pid)
        ts_die("agent %d: %m", (int)a->pid);
    close(a->in);
    close(a->out);
    a->pid = 0;
    return status;
}

int ts_agent_stop(struct ts_agent *a)
{
    if (!a->pid)
        return 0;
    ts_agent_send(a, "quit");
    return reap(a);
}

int ts_agent_kill(struct ts_agent *a, int sig)
{
    if (!a->pid)
        return 0;
    kill(a->pid, sig);
    return reap(a);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "peer.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

struct command {
    uint64_t verb, first, n;
};

/* ---- within the peer ---- */

static int64_t load(ucm_store *store, const struct shape *shape, uint64_t first, uint64_t n)
{
    struct memory m;
    int64_t right = 0;
    memory_new(&m, store, shape, n);
    struct outcome out = move(store, &m, false, first, 0, 0);
    for (uint64_t i = 0; i < n && right >= 0; i++)
        if (out.status[i] == 0)
            right = painted(&m, i, first + i) ? right + 1 : -EBADMSG;
    free(out.status);
    memory_free(&m);
    return right;
}

static int64_t dump(ucm_store *store, const struct shape *shape, uint64_t first, uint64_t n)
{
    struct memory m;
    memory_new(&m, store, shape, n);
    for (uint64_t i = 0; i < n; i++)
        paint(&m, i, first + i);
    struct outcome out = move(store, &m, true, first, 0, 0);
    free(out.status);
    memory_free(&m);
    return out.stored;
}

static void answer(int64_t value)
{
    if (write(STDOUT_FILENO, &value, sizeof value) != sizeof value)
        _exit(1);
}

int peer_main(int argc, char **argv)
{
    struct shape shape = {strtoul(argv[2], NULL, 10), (unsigned)strtoul(argv[3], NULL, 10), 0};
    ucm_store *store = NULL;
    struct command c;
    while (read(STDIN_FILENO, &c, sizeof c) == sizeof c) {
        switch (c.verb) {
        case PEER_OPEN:
            store = open_store(argv[1], &shape, argv[4]);
            answer(0);
            break;
        case PEER_DUMP: answer(dump(store, &shape, c.first, c.n)); break;
        case PEER_FOUND: answer((int64_t)count_found(store, c.first, c.n)); break;
        case PEER_LOAD: answer(load(store, &shape, c.first, c.n)); break;
        case PEER_CHURN:
            answer(0);
            for (uint64_t i = c.first;; i += c.n)
                dump(store, &shape, i, c.n);
        case PEER_CLOSE:
            ucm_store_close(store);
            answer(0);
            return 0;
        }
    }
    _exit(1); /* whoever started us is gone */
}

/* ---- from outside ---- */

struct peer peer_start(const char *dir, const struct shape *shape, const char *options)
{
    int to[2], from[2];
    char size[32], n[32];
    assert_int_equal(pipe2(to, O_CLOEXEC), 0);
    assert_int_equal(pipe2(from, O_CLOEXEC), 0);
    snprintf(size, sizeof size, "%zu", shape->shard_size);
    snprintf(n, sizeof n, "%u", shape->nshards);
    struct peer peer = {.pid = fork(), .to = to[1], .from = from[0]};
    assert_true(peer.pid >= 0);
    if (peer.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that fails leaves nobody behind */
        dup2(to[0], STDIN_FILENO);
        dup2(from[1], STDOUT_FILENO);
        execl("/proc/self/exe", "peer", dir, size, n, options ? options : "", (char *)NULL);
        _exit(127);
    }
    close(to[0]);
    close(from[1]);
    assert_int_equal(peer_do(&peer, PEER_OPEN, 0, 0), 0);
    return peer;
}

void peer_ask(struct peer *peer, enum peer_verb verb, uint64_t first, uint64_t n)
{
    struct command c = {verb, first, n};
    assert_int_equal(write(peer->to, &c, sizeof c), sizeof c);
}

int64_t peer_answer(struct peer *peer)
{
    int64_t value = 0;
    assert_int_equal(read(peer->from, &value, sizeof value), sizeof value); /* else it died */
    return value;
}

int64_t peer_do(struct peer *peer, enum peer_verb verb, uint64_t first, uint64_t n)
{
    peer_ask(peer, verb, first, n);
    return peer_answer(peer);
}

static void reap(struct peer *peer)
{
    int status;
    close(peer->to);
    close(peer->from);
    assert_int_equal(waitpid(peer->pid, &status, 0), peer->pid);
}

void peer_kill(struct peer *peer)
{
    kill(peer->pid, SIGKILL);
    reap(peer);
}

void peer_end(struct peer *peer)
{
    assert_int_equal(peer_do(peer, PEER_CLOSE, 0, 0), 0);
    reap(peer);
}

static void hold(const struct peer *peers, unsigned n, int signal)
{
    for (unsigned i = 0; i < n; i++)
        assert_int_equal(kill(peers[i].pid, signal), 0);
    for (unsigned i = 0; i < n; i++)
        assert_int_equal(waitpid(peers[i].pid, NULL, WUNTRACED | WCONTINUED), peers[i].pid);
}

void peers_keep_to(struct peer *peers, unsigned n, const char *dir, double bound_gb)
{
    enum { SAMPLES = 150 };
    double now = 0, bound = bound_gb * (1 << 30);
    for (unsigned i = 0; i < n; i++)
        assert_int_equal(peer_do(&peers[i], PEER_CHURN, 1000000 * i, 16), 0);
    for (int i = 0; i < SAMPLES || now < 0.5 * bound; i++) {
        hold(peers, n, SIGSTOP); /* or a segment would be counted where it was and where it is */
        now = (double)disk_usage(dir);
        hold(peers, n, SIGCONT);
        assert_true(now <= bound);
    }
    for (unsigned i = 0; i < n; i++)
        peer_kill(&peers[i]);
}

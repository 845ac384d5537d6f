/* SPDX-License-Identifier: Apache-2.0 */
/*
 * agent: a process with a rig that does what it is told, a line each on standard input, and answers
 * each with a line on standard output.  Tests use it where a process must be another one: to be
 * killed, traced, of another user, or simply fresh.  One thread; ends with its standard input.
 *
 *     dump FROM N         load FROM N [GROUP]     lookup FROM N      the letters of ts_run
 *     layers FROM N SEED  one task a layer        prefix FROM N      a number
 *     part FROM N SHARD   a dump of one shard that is waited for only until RELEASED
 *     metric NAME         a number
 *     reopen              "open" or an error      quit               "bye"
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "support.h"

static struct ts_rig rig;

static void open_rig(const struct ts_opts *o)
{
    int err = ts_rig_open(&rig, o);
    if (err)
        printf("error %d %s\n", err, rig.why);
    else
        printf("open\n");
}

static long prefix(uint64_t from, size_t n)
{
    ucm_key keys[TS_MAX_ENTRIES];
    for (size_t i = 0; i < n; i++)
        keys[i] = ts_key(from + i);
    return (long)ucm_lookup_prefix(rig.store, keys, n);
}

static bool obey(const char *line, const struct ts_opts *o)
{
    char verb[32] = "", name[64] = "";
    unsigned long long from = 0, n = 0, extra = 0;

    sscanf(line, "%31s %llu %llu %llu", verb, &from, &n, &extra);
    sscanf(line, "%*s %63s", name);
    if (n > TS_MAX_ENTRIES)
        ts_die("agent: too many keys: %s", line);
    struct ts_op op = {.from = from, .n = (size_t)n};
    if (!strcmp(verb, "dump") || !strcmp(verb, "layers") || !strcmp(verb, "part")) {
        op.dump = true;
        op.layers = *verb == 'l' ? extra : 0;
        op.shard = *verb == 'p' ? (unsigned)extra : 0;
        op.nshards = op.drop = *verb == 'p';
        ts_run(rig.store, &rig.mem, &op, rig.text);
    } else if (!strcmp(verb, "load")) {
        op.group = (unsigned)extra;
        ts_run(rig.store, &rig.mem, &op, rig.text);
    } else if (!strcmp(verb, "lookup")) {
        ts_lookup(rig.store, op.from, op.n, rig.text);
    } else if (!strcmp(verb, "prefix")) {
        snprintf(rig.text, sizeof rig.text, "%ld", prefix(op.from, op.n));
    } else if (!strcmp(verb, "metric")) {
        snprintf(rig.text, sizeof rig.text, "%.0f", ts_metric(rig.store, name));
    } else if (!strcmp(verb, "reopen")) {
        ts_rig_close(&rig);
        open_rig(o);
        return rig.store;
    } else if (!strcmp(verb, "quit")) {
        return false;
    } else {
        ts_die("agent: what is \"%s\"?", line);
    }
    printf("%s\n", rig.text);
    return true;
}

int main(int argc, char **argv)
{
    static struct ts_opts o;
    char line[256];

    if (argc != 2)
        ts_die("agent: give the options of its rig as one argument");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    snprintf(o.text, sizeof o.text, "%s", argv[1]);
    long uid = ts_opt_get(&o, "@uid", 0);
    if (uid && (setresgid(uid, uid, uid) || setresuid(uid, uid, uid)))
        ts_die("agent: cannot become user %ld: %s", uid, strerror(errno));
    open_rig(&o);
    bool more = rig.store;
    while (more && fgets(line, sizeof line, stdin))
        more = obey(line, &o);
    ts_rig_close(&rig);
    printf("bye\n");
    return 0;
}

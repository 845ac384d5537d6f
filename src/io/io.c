/* SPDX-License-Identifier: Apache-2.0 */
/*
 * io.c - which engine.  "auto" opens io_uring for real, because only that tells: containers refuse
 * it by seccomp, administrators by kernel.io_uring_disabled, old kernels by not having it.  An
 * engine asked for by name is opened or refused with the reason, never replaced.
 */
#include "io/io.h"

#include <stdio.h>
#include <strings.h>

#include "ucm_config.h"

#if !UCM_HAVE_URING || !UCM_HAVE_AIO
static int absent_open(void *io, unsigned depth, char *why, size_t why_len)
{
    return ucmi_fail(why, why_len, -ENOTSUP, "not in this build, its library was missing");
}
#endif
#if !UCM_HAVE_URING
const struct ucm_io_ops ucmi_io_uring = {
    .p = {.kind = "io", .name = "io_uring", .help = "not in this build"},
    .open = absent_open,
};
#endif
#if !UCM_HAVE_AIO
const struct ucm_io_ops ucmi_io_aio = {
    .p = {.kind = "io", .name = "aio", .help = "not in this build"},
    .open = absent_open,
};
#endif

static const struct ucm_io_ops *const engines[] = {&ucmi_io_uring, &ucmi_io_aio, &ucmi_io_psync};

static int open_engine(struct ucmi_io *io, const struct ucm_io_ops *ops, unsigned depth,
                       const ucm_conf *conf, char *why, size_t why_len)
{
    void *state;
    int err = ucmi_plugin_new(&ops->p, conf, &state);
    if (err)
        return ucmi_fail(why, why_len, err, "%s", ucm_strerror(err));
    if (why_len > 0)
        why[0] = '\0';
    err = ops->open(state, depth, why, why_len);
    if (err) {
        ucmi_plugin_free(&ops->p, state);
        return err;
    }
    *io = (struct ucmi_io){.ops = ops, .state = state};
    return 0;
}

/* One line a process, however many stores are opened. */
static void say(enum ucm_level level, const char *text)
{
    static atomic_flag said = ATOMIC_FLAG_INIT;
    if (!atomic_flag_test_and_set(&said))
        ucmi_log(level, "io", "%s", text);
}

static int open_auto(struct ucmi_io *io, unsigned depth, const ucm_conf *conf, char *why,
                     size_t why_len)
{
    char refused[160], line[320];
    if (open_engine(io, &ucmi_io_uring, depth, conf, refused, sizeof refused) == 0) {
        say(UCM_INFO, "using io_uring");
        return 0;
    }
    int err = open_engine(io, &ucmi_io_psync, depth, conf, why, why_len);
    if (err)
        return err;
    const struct ucm_option *threads = &ucmi_io_psync.p.options[0];
    const char *n = conf ? ucm_conf_get(conf, threads->name) : NULL;
    snprintf(line, sizeof line, "io_uring refused: %s; using psync with %s threads", refused,
             n ? n : threads->def);
    say(UCM_WARN, line);
    return 0;
}

int ucmi_io_open(struct ucmi_io *io, const char *name, unsigned depth, const ucm_conf *conf,
                 char *why, size_t why_len)
{
    char reason[256];
    int err = -EINVAL;

    if (depth == 0)
        return ucmi_fail(why, why_len, -EINVAL, "an I/O engine needs a depth of at least 1");
    if (strcasecmp(name, "auto") == 0) {
        err = open_auto(io, depth, conf, reason, sizeof reason);
        return err ? ucmi_fail(why, why_len, err, "posix_io_engine auto: %s", reason) : 0;
    }
    for (size_t i = 0; i < ARRAY_LEN(engines); i++) {
        if (strcasecmp(name, engines[i]->p.name) != 0)
            continue;
        err = open_engine(io, engines[i], depth, conf, reason, sizeof reason);
        return err ? ucmi_fail(why, why_len, err,
                               "posix_io_engine %s does not work here: %s; give auto or psync",
                               engines[i]->p.name, reason)
                   : 0;
    }
    return ucmi_fail(why, why_len, err,
                     "posix_io_engine %s is not known; give auto, io_uring, aio or psync", name);
}

void ucmi_io_close(struct ucmi_io *io)
{
    if (!io->ops)
        return;
    io->ops->close(io->state);
    ucmi_plugin_free(&io->ops->p, io->state);
    *io = (struct ucmi_io){0};
}

int ucmi_io_file(const struct ucmi_io *io, const struct ucm_file *f)
{
    return io->ops->file ? io->ops->file(io->state, f) : ucmi_file_plain(f);
}

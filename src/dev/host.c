/* SPDX-License-Identifier: Apache-2.0 */
/*
 * host.c - the device of engines that run on the CPU: its memory is the host's, so a copy is a
 * memcpy on the calling thread, over when the call returns, and there is nothing to wait for.
 *
 * No state, no threads; a stream is only a handle.
 */
#include "dev/dev.h"

struct host {
    char stream; /* streams are told apart by nobody: all are this address */
};

static int host_open(void *d, int ordinal, char *why, size_t why_len)
{
    return 0;
}

static void host_close(void *d)
{
}

static int host_stream_new(void *d, void **stream_p)
{
    *stream_p = &((struct host *)d)->stream;
    return 0;
}

static void host_stream_free(void *d, void *stream)
{
}

static int host_copy(void *d, void *stream, int to_host, const struct ucm_copy *v, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (to_host)
            memcpy(v[i].host, v[i].dev, v[i].len);
        else
            memcpy(v[i].dev, v[i].host, v[i].len);
    return 0;
}

/* An engine on the CPU has written its memory before it calls. */
static int host_after(void *d, void *stream, void *event)
{
    return 0;
}

static int host_then(void *d, void *stream, void (*fn)(void *arg, int err), void *arg)
{
    fn(arg, 0);
    return 0;
}

const struct ucm_dev_ops ucmi_dev_host = {
    .p = {.kind = "device",
          .name = "host",
          .help = "engines on the CPU: plain memory",
          .size = sizeof(struct host)},
    .host_access = 1,
    .open = host_open,
    .close = host_close,
    .stream_new = host_stream_new,
    .stream_free = host_stream_free,
    .copy = host_copy,
    .after = host_after,
    .then = host_then,
};

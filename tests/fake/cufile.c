/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A fake libcufile.so.0, of which only what tells whether it is of use.  GENERATION: 0 is on a
 * machine where it would go by way of the host's memory; 1 has nvidia-fs; 2 has P2PDMA instead.
 * What is left open is a context that leaks.  As the real one does, it leaves a log behind.
 */
#include "core.h"

#include <stdio.h>
#include <stdlib.h>

const bool core_implicit = true;
static long opened;

struct error {
    int code, cuda;
};
struct properties {
    struct {
        unsigned major, minor;
        size_t poll, most;
        unsigned reaches, control;
    } driver;
    unsigned rest[6];
};

#define CUFILE(name, ...)                                                                          \
    EXPORT struct error name(__VA_ARGS__);                                                         \
    EXPORT struct error name(__VA_ARGS__)

EXPORT long cuFileUseCount(void);
EXPORT long cuFileUseCount(void)
{
    return opened;
}
CUFILE(cuFileDriverOpen, void)
{
    int code = core_enter(__func__);
    const char *path = getenv("CUFILE_LOGFILE_PATH");
    FILE *log = fopen(path ? path : "cufile.log", "a");
    if (log)
        fclose(log);
    if (!code && opened++ == 0)
        core_retain(0, 1);
    return (struct error){code, code == 5011 ? 100 : 0};
}
CUFILE(cuFileDriverGetProperties, struct properties *p)
{
    enum { NFS = 1 << 2, NVME = 1 << 4, P2PDMA = 1 << 11 };
    *p = (const struct properties[]){{.driver.control = 2},
                                     {.driver = {2, 24, .reaches = NFS | NVME}},
                                     {.driver.reaches = P2PDMA}}[GENERATION];
    return (struct error){opened ? core_enter(__func__) : 5001, 0};
}
/* Ends it for everybody. */
CUFILE(cuFileDriverClose_v2, void)
{
    int code = core_enter(__func__);
    if (!opened)
        core_die("the driver was closed, and is not open");
    opened = 0;
    core_retain(0, -1);
    return (struct error){code, 0};
}

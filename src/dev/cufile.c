/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cufile.c - GPUDirect Storage: whether it is here, and what of it is missing where not.  NVIDIA's
 * libcufile tells, by opening its driver: a library alone moves nothing, and one without a kernel
 * that can serves by way of the host's memory and says so nowhere but here.
 *
 * No block goes that way: every byte is checked, and checks are made on the host (docs/devices.md).
 *
 * A driver that somebody in the process has opened already is left open.  Any thread.
 */
#include "dev/dev.h"

#include <dlfcn.h>
#include <stdio.h>

static const char file[] = "libcufile.so.0";

struct error {
    int code, cuda; /* cuda: of libcuda, where it was at fault */
};
struct properties {
    struct {
        unsigned major, minor; /* of nvidia-fs, the kernel's module; 0: it is not loaded */
        size_t poll, most;
        unsigned reaches; /* bits: see reached */
        unsigned control;
    } driver;
    unsigned rest[6], newer[26];
};
struct cufile {
    long (*use_count)(void);
    struct error (*open)(void);
    struct error (*properties)(struct properties *p);
    struct error (*close)(void);
};

/* What the library exports has no text for its numbers. */
static const struct {
    int code;
    const char *text;
} errors[] = {
    {5001, "the kernel's module nvidia-fs is not loaded"},
    {5004, "nvidia-fs is of another version"},
    {5005, "the version of nvidia-fs cannot be read"},
    {5007, "not on this platform"},
    {5009, "not with this GPU"},
    {5010, "nvidia-fs has failed"},
    {5011, "the CUDA driver has failed"},
    {5025, "nvidia-fs may not be opened"},
    {5029, "no GPU"},
    {5033, "neither the CUDA driver nor nvidia-fs could be set up"},
};

static const char *text_of(int code)
{
    for (size_t i = 0; i < ARRAY_LEN(errors); i++)
        if (errors[i].code == code)
            return errors[i].text;
    return "its log says why (CUFILE_LOGFILE_PATH, else cufile.log)";
}

static int bind(void *library, struct cufile *c, char *text, size_t len)
{
    const struct {
        const char *name;
        void *at;
    } wanted[] = {{"cuFileUseCount", &c->use_count},
                  {"cuFileDriverOpen", &c->open},
                  {"cuFileDriverGetProperties", &c->properties},
                  {"cuFileDriverClose_v2", &c->close}};
    for (size_t i = 0; i < ARRAY_LEN(wanted); i++) {
        void *fn = dlsym(library, wanted[i].name);
        if (!fn)
            return ucmi_fail(text, len, -ENODEV, "%s has no %s: it is too old", file,
                             wanted[i].name);
        memcpy(wanted[i].at, &fn, sizeof fn);
    }
    return 0;
}

/* What it reaches without the host's memory, in words. */
static int reached(const struct properties *p, char *text, size_t len)
{
    static const char *const kinds[] = {
        "Lustre",    "WekaFS", "NFS",    "GPFS", "NVMe",           "NVMe-oF", "SCSI",
        "ScaleFlux", "NVMesh", "BeeGFS", NULL,   "NVMe by P2PDMA", "ScateFS"};
    int n = snprintf(text, len, "%s", file), known = 0;
    if (p->driver.major)
        n += snprintf(text + n, len - (size_t)n, ", nvidia-fs %u.%u", p->driver.major,
                      p->driver.minor);
    for (size_t i = 0; i < ARRAY_LEN(kinds); i++)
        if (kinds[i] && p->driver.reaches >> i & 1 && (size_t)n < len)
            n += snprintf(text + n, len - (size_t)n, "%s %s", known++ ? "," : ":", kinds[i]);
    return known ? 0
                 : ucmi_fail(text, len, -ENOTSUP,
                             "%s works by way of the host's memory here (compat mode): %s", file,
                             p->driver.major ? "nvidia-fs knows none of the storage there is"
                                             : "nvidia-fs is not loaded, nor does the kernel have "
                                               "P2PDMA for NVMe");
}

static int failed(struct error e, char *text, size_t len)
{
    char cuda[32] = "";
    if (e.cuda)
        snprintf(cuda, sizeof cuda, ", CUDA error %d", e.cuda);
    return ucmi_fail(text, len, -ENODEV, "%s: error %d%s: %s", file, e.code, cuda, text_of(e.code));
}

int ucmi_cufile_probe(char *text, size_t len)
{
    struct cufile c;
    struct properties p = {0};
    void *library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return ucmi_fail(text, len, -ENODEV, "%s", dlerror());
    int err = bind(library, &c, text, len);
    if (err)
        return err;
    bool ours = c.use_count() <= 0;
    struct error e = c.open();
    if (e.code)
        return failed(e, text, len);
    e = c.properties(&p);
    err = e.code ? failed(e, text, len) : reached(&p, text, len);
    if (ours)
        c.close();
    return err;
}

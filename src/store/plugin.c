/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The table of everything that can be plugged in.  A new tier, device or I/O engine is one row
 * here; its options are known to every conf from then on.
 */
#include "store/store.h"

#include <strings.h>

#include "dev/dev.h"
#include "io/io.h"

extern const struct ucm_tier_ops ucmi_tier_cache, ucmi_tier_empty, ucmi_tier_fake, ucmi_tier_posix;
extern const struct ucm_plugin ucmi_connector_options, ucmi_obsolete_options;

static const struct ucm_tier_ops *const tiers[] = {
    &ucmi_tier_cache,
    &ucmi_tier_empty,
    &ucmi_tier_fake,
    &ucmi_tier_posix,
};
static const struct ucm_dev_ops *const devices[] = {
    &ucmi_dev_host, &ucmi_dev_cuda, &ucmi_dev_ascend, &ucmi_dev_musa,
    &ucmi_dev_maca, &ucmi_dev_hip,  &ucmi_dev_cudart, &ucmi_dev_sim,
};

/* Those that have options, or may have. */
const struct ucm_plugin *const ucmi_plugins[] = {
    &ucmi_connector_options, &ucmi_store_plugin, &ucmi_tier_cache.p,     &ucmi_tier_empty.p,
    &ucmi_tier_fake.p,       &ucmi_tier_posix.p, &ucmi_io_psync.p,       &ucmi_io_aio.p,
    &ucmi_io_uring.p,        &ucmi_dev_sim.p,    &ucmi_obsolete_options, NULL,
};

const struct ucm_tier_ops *ucmi_find_tier(const char *name)
{
    for (size_t i = 0; i < ARRAY_LEN(tiers); i++)
        if (!strcasecmp(tiers[i]->p.name, name))
            return tiers[i];
    return NULL;
}

const struct ucm_dev_ops *ucmi_find_dev(const char *name)
{
    for (size_t i = 0; i < ARRAY_LEN(devices); i++)
        if (!strcasecmp(devices[i]->p.name, name))
            return devices[i];
    return NULL;
}

void ucm_devices(ucm_device_fn *fn, void *arg)
{
    for (size_t i = 0; i < ARRAY_LEN(devices); i++) {
        const struct ucm_dev_ops *dev = devices[i];
        char text[256] = "always there", direct[256];
        int n = dev->probe ? dev->probe(text, sizeof text) : 1;
        bool there = dev->direct && dev->direct(direct, sizeof direct) == 0;
        fn(arg, &(struct ucm_device_info){.name = dev->p.name,
                                          .help = dev->p.help,
                                          .count = MAX(n, 0),
                                          .text = text,
                                          .is_direct = there,
                                          .direct = dev->direct ? direct : NULL});
    }
}

int ucm_conf_new(ucm_conf **conf_p)
{
    return ucmi_conf_new(ucmi_plugins, conf_p);
}

/* The values of conf, or with NULL those of a conf nobody has touched: the defaults. */
void ucm_options(const ucm_conf *conf, ucm_option_fn *fn, void *arg)
{
    ucm_conf *defaults = NULL;
    if (!conf && ucm_conf_new(&defaults) < 0)
        return;
    ucmi_conf_visit(conf ? conf : defaults, fn, arg);
    ucm_conf_free(defaults);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dev.h - the devices there are, and what only tests need of the simulated one.
 */
#ifndef UCMI_DEV_H
#define UCMI_DEV_H

#include "base/base.h"

extern const struct ucm_dev_ops ucmi_dev_host, ucmi_dev_cuda, ucmi_dev_ascend, ucmi_dev_musa,
    ucmi_dev_maca, ucmi_dev_hip, ucmi_dev_cudart, ucmi_dev_sim;

/* Does GPUDirect Storage serve this machine?  As ucm_dev_ops.direct. */
int ucmi_cufile_probe(char *text, size_t len);

/* sim: an event that the test fires; a copy queued after it must not move a byte before. */
struct ucmi_sim_event;
struct ucmi_sim_event *ucmi_sim_event_new(void);
void ucmi_sim_event_fire(struct ucmi_sim_event *event);
void ucmi_sim_event_await(struct ucmi_sim_event *event, unsigned n); /* n are to wait for it */
void ucmi_sim_event_free(struct ucmi_sim_event *event);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * counters.c - shows the counters of a store.  They are counted with relaxed atomics, so the
 * visitor sees each one whole but not all of them at one instant.
 */
#include "base/base.h"

void ucmi_counters_visit(const struct ucm_counters *c, ucm_metric_fn *fn, void *arg)
{
    static const struct ucm_metric_info table[UCMI_COUNTER_MAX] = {
#define X(id, label, sort, text) [UCMI_##id] = {.name = label, .kind = sort, .help = text},
        UCMI_COUNTERS(X)
#undef X
    };
    for (int i = 0; i < UCMI_COUNTER_MAX; i++) {
        struct ucm_metric_info info = table[i];
        info.value = (double)atomic_load_explicit(&c->v[i], memory_order_relaxed);
        fn(arg, &info);
    }
}

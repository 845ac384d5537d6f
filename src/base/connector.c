/* SPDX-License-Identifier: Apache-2.0 */
/*
 * connector.c - options that no part of the core reads: those of the engine connectors, which take
 * them through ucm_conf_get, and those that files written for older systems may carry.  Constant
 * tables.
 */
#include "base/base.h"

static const struct ucm_option connector_options[] = {
    {"ucm_connector_name", UCM_T_STR, 0, "UcmPipelineStore", NULL, NULL,
     "the store class, UcmPipelineStore or UcmNfsStore: the same stack under both names, as "
     "store_pipeline spells it"},
    {"ucm_connector_module_path", UCM_T_STR, 0, "", NULL, NULL,
     "Python module that defines ucm_connector_name, when it is not one of ucm's own (the vLLM "
     "connector refuses that)"},
    {"enable_event_sync", UCM_T_BOOL, 0, "true", NULL, NULL,
     "loads and dumps wait for the engine's stream on the device, by an event; false: the engine's "
     "thread waits for it before it hands them over (on the CPU there is nothing to wait for)"},
    {"use_layerwise", UCM_T_BOOL, 0, "true", NULL, NULL,
     "true: a load streams layer by layer into the step that computes on it, and each layer waits "
     "for its own part; false: the request waits aside until all of its blocks are there, and "
     "others are computed"},
    {"hit_ratio", UCM_T_FLOAT, 0, "1", "0", "1",
     "at most this part of a prompt is served from the store (1: no limit); to measure what hits "
     "are worth"},
    {"use_lite", UCM_T_BOOL, 0, "false", NULL, NULL,
     "true: nothing is stored or loaded; a memory of keys (the tier Fake, buffer_number of them) "
     "stands in for store_pipeline, and the log gives the external hit rate of each request and in "
     "all"},
    {"enable_record_traces", UCM_T_BOOL, 0, "false", NULL, NULL,
     "write one JSON line a request: when it came, its lengths, its blocks' hashes; "
     "`python -m ucm.traces` makes traces in Mooncake's format of them"},
    {"record_traces_dir", UCM_T_STR, 0, "", NULL, NULL,
     "directory of these files, which UCM_LOG_MAX_FILES (10) and UCM_LOG_MAX_SIZE (5, in MiB) "
     "bound; empty: UCM_LOG_PATH, or else ~/.local/state/ucm"},
    {"persist_token_threshold", UCM_T_INT, 0, "0", "0", NULL,
     "requests with fewer tokens are neither loaded nor stored"},
    {"save_generated", UCM_T_BOOL, 0, "true", NULL, NULL,
     "what the engine generates is stored like prompts, so that the next turn of a conversation "
     "finds the answer to the last; false: prompts only (always so with speculative decoding, "
     "whose "
     "guesses may be rejected)"},
    {"load_tokens_threshold", UCM_T_INT, 0, "0", "0", NULL,
     "hits of fewer tokens are computed instead of loaded"},
    {"load_timeout_ms", UCM_T_INT, 0, "0", "0", "3600000",
     "a load that takes longer is given up, and its tokens are computed; 0: twice as long as "
     "computing them takes, by what this engine has computed so far, and 2 s at least"},
    {"metrics_config_path", UCM_T_STR, 0, "", NULL, NULL,
     "YAML file that names the metrics that vLLM's /metrics shows, as "
     "examples/metrics/metrics_configs.yaml does; empty: none of ucm's"},
    {"chunk_tokens", UCM_T_INT, 0, "0", "0", "65536",
     "tokens in a block of the store, a multiple of the engine's block size; 0: the engine's block "
     "size, raised to 128"},
    {"model_id", UCM_T_STR, 0, "", NULL, NULL,
     "name of the model: engines with the same one share blocks, whatever path, configuration or "
     "weights theirs has; empty: the model's configuration and revision, with samples of its "
     "weights if it is a directory (at whatever path), else with its name"},
    {NULL},
};

const struct ucm_plugin ucmi_connector_options = {
    .kind = "options",
    .name = "connector",
    .help = "read by the engine connectors",
    .options = connector_options,
};

#define GONE(name, why)                                                                            \
    {                                                                                              \
        name, UCM_T_OBSOLETE, 0, "", NULL, NULL, why                                               \
    }
#define GC_WHY                                                                                     \
    "there is no collector to tune: posix_capacity_gb alone is kept, exactly, by evicting the "    \
    "coldest blocks"
#define THREADS_WHY                                                                                \
    "lookups, opens and renames need no threads: blocks lie in few, long-lived files that an "     \
    "index in memory knows"

static const struct ucm_option obsolete_options[] = {
    GONE("posix_gc_enable", GC_WHY),
    GONE("posix_gc_trigger_threshold_ratio", GC_WHY),
    GONE("posix_gc_recycle_percent", GC_WHY),
    GONE("posix_gc_concurrency", GC_WHY),
    GONE("posix_gc_check_interval_sec", GC_WHY),
    GONE("posix_gc_shard_sample_ratio", GC_WHY),
    GONE("posix_gc_max_recycle_count_per_shard", GC_WHY),
    GONE("posix_gc_task_timeout_ms", GC_WHY),
    GONE("posix_gc_precise_mode", GC_WHY),
    GONE("posix_gc_candidate_extra_percent", GC_WHY),
    GONE("posix_lookup_concurrency", THREADS_WHY),
    GONE("posix_open_concurrency", THREADS_WHY),
    GONE("posix_commit_concurrency", THREADS_WHY),
    GONE("data_dir_shard_bytes", "blocks lie in segment files, not in one file each to be spread"),
    GONE("shard_data_dir", "blocks lie in segment files, not in one file each to be spread"),
    GONE("cpu_affinity_cores", "threads stay on the cores that the engine's process is given; use "
                               "taskset or the engine's own binding"),
    GONE("load_only_first_rank", "ranks of a node share one copy of a block in the DRAM pool"),
    GONE("local_rank_size", "ranks of a node find the DRAM pool they share by themselves"),
    GONE("unique_id", "the namespace decides which processes share the DRAM pool"),
    GONE("tensor_size", "the connector says where tensors lie when it registers them"),
    GONE("tensor_size_list", "the connector says where tensors lie when it registers them"),
    GONE("stream_number", "one stream in each direction, fed with batches, keeps a device busy"),
    GONE("use_scatter_gather", "copies are always gathered"),
    GONE("wa_dump_block_wise", "blocks are always stored whole"),
    GONE("cache_stream_number", "there is one stream in each direction, with batched copies"),
    GONE("enable_metrics", "metrics are always counted"),
    {NULL},
};

const struct ucm_plugin ucmi_obsolete_options = {
    .kind = "options",
    .name = "obsolete",
    .help = "accepted for the sake of old files; no effect",
    .options = obsolete_options,
};

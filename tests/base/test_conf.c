/* SPDX-License-Identifier: Apache-2.0 */
/* Options: each type, each way to give a value, each way to get it wrong. */
#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "../test.h"

extern const struct ucm_plugin ucmi_connector_options, ucmi_obsolete_options;

struct state {
    int flag, mode, gdr;
    int64_t count, any;
    double ratio, size;
    const char *text, *backends;
};
#define AT(field) offsetof(struct state, field)
static const struct ucm_option options[] = {
    {"io_direct", UCM_T_BOOL, AT(flag), "false", NULL, NULL, "a switch"},
    {"posix_io_engine", UCM_T_CHOICE, AT(mode), "auto", "auto|psync|io_uring", NULL, "one of them"},
    {"segment_mib", UCM_T_INT, AT(count), "7", "1", "100", "a number"},
    {"any_number", UCM_T_INT, AT(any), "-1", NULL, NULL, "a number without bounds"},
    {"share", UCM_T_FLOAT, AT(ratio), "0.5", "0", "1", "a part"},
    {"cache_buffer_capacity_gb", UCM_T_FLOAT, AT(size), "0", "0", NULL, "a size"},
    {"store_pipeline", UCM_T_STR, AT(text), "Cache|Posix", NULL, NULL, "a text"},
    {"storage_backends", UCM_T_STR, AT(backends), "", NULL, NULL, "directories"},
    {"use_gdr", UCM_T_BOOL, AT(gdr), "false", NULL, NULL, "a plan"},
    {"posix_gc_enable", UCM_T_OBSOLETE, 0, "", NULL, NULL, "nothing to collect"},
    {NULL},
};
static const struct ucm_option shared_options[] = {
    {"segment_mib", UCM_T_INT, 0, "7", "1", "100", "read by another too"},
    {NULL},
};
static const struct ucm_plugin plugin = {"options", "Posix", "", options, sizeof(struct state)};
static const struct ucm_plugin other = {"options", "Cache", "", shared_options, sizeof(int64_t)};
static const struct ucm_plugin *const plugins[] = {&plugin, &other, &ucmi_connector_options, NULL};

static char path[64];

static struct {
    int n;
    char line[512];
} logged;

static void keep_line(void *arg, enum ucm_level level, const char *line)
{
    logged.n++;
    snprintf(logged.line, sizeof logged.line, "%s", line);
}

static int make_conf(void **state)
{
    snprintf(path, sizeof path, "/tmp/ucm-conf-XXXXXX");
    int fd = mkstemp(path);
    logged.n = 0;
    ucm_log_to(keep_line, NULL, UCM_WARN);
    return fd < 0 || close(fd) < 0 || ucmi_conf_new(plugins, (ucm_conf **)state) < 0 ? -1 : 0;
}

static int free_conf(void **state)
{
    ucm_conf_free(*state);
    ucm_log_to(NULL, NULL, UCM_ERROR);
    return unlink(path);
}

static void write_file(const char *text)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0 && fclose(f) == 0);
}

/* The error says all that is in expected, where @ stands for the path of the file. */
static void error_is(const ucm_conf *conf, const char *expected)
{
    char text[1024] = "";
    for (const char *p = expected; *p; p++) {
        size_t at = strlen(text);
        snprintf(text + at, sizeof text - at, *p == '@' ? "%s" : "%.1s", *p == '@' ? path : p);
    }
    assert_string_equal(ucm_conf_error(conf), text);
}

/* ---- values ---- */

static void each_type_is_shown_in_one_spelling(void **state)
{
    static const struct {
        const char *key, *given, *shown;
    } cases[] = {
        {"io_direct", "true", "true"},
        {"io_direct", "NO", "false"},
        {"io_direct", "On", "true"},
        {"io_direct", "0", "false"},
        {"posix_io_engine", "PSYNC", "psync"},
        {"posix_io_engine", "io_uring", "io_uring"},
        {"segment_mib", "+042", "42"},
        {"segment_mib", "1", "1"},
        {"segment_mib", "100", "100"},
        {"any_number", "-9223372036854775808", "-9223372036854775808"},
        {"share", "1e-3", "1e-3"},
        {"share", ".25", ".25"},
        {"cache_buffer_capacity_gb", "1e6", "1e6"},
        {"store_pipeline", "", ""},
        {"store_pipeline", "Posix", "Posix"},
        {"posix_gc_enable", "whatever", "whatever"},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        assert_int_equal(ucm_conf_set(*state, cases[i].key, cases[i].given), 0);
        assert_string_equal(ucm_conf_get(*state, cases[i].key), cases[i].shown);
        char *shown = strdup(cases[i].shown);
        assert_int_equal(ucm_conf_set(*state, cases[i].key, shown), 0);
        assert_string_equal(ucm_conf_get(*state, cases[i].key), shown);
        free(shown);
    }
    assert_null(ucm_conf_get(*state, "no_such_key"));
    assert_string_equal(ucm_conf_error(*state), "");
}

static void a_wrong_value_is_named_with_its_origin_and_remedy(void **state)
{
    static const struct {
        const char *key, *value, *error;
    } cases[] = {
        {"io_direct", "maybe",
         "io_direct: \"maybe\" is neither true nor false (given by the caller); give true or "
         "false"},
        {"posix_io_engine", "aio",
         "posix_io_engine: \"aio\" is none of the choices (given by the caller); give one of "
         "auto|psync|io_uring"},
        {"posix_io_engine", "auto|psync",
         "posix_io_engine: \"auto|psync\" is none of the choices (given by the caller); give one "
         "of "
         "auto|psync|io_uring"},
        {"segment_mib", "4 MiB",
         "segment_mib: \"4 MiB\" is not a whole number (given by the caller); give a whole number "
         "from 1 to 100"},
        {"segment_mib", "",
         "segment_mib: \"\" is not a whole number (given by the caller); give a whole number from "
         "1 "
         "to 100"},
        {"segment_mib", "0",
         "segment_mib: \"0\" is out of range (given by the caller); give a whole number from 1 to "
         "100"},
        {"segment_mib", "101",
         "segment_mib: \"101\" is out of range (given by the caller); give a whole number from 1 "
         "to "
         "100"},
        {"any_number", "9223372036854775808",
         "any_number: \"9223372036854775808\" is not a whole number (given by the caller); give a "
         "whole number"},
        {"share", "1.01",
         "share: \"1.01\" is out of range (given by the caller); give a number from 0 to 1"},
        {"share", "-1e-9",
         "share: \"-1e-9\" is out of range (given by the caller); give a number from 0 to 1"},
        {"share", "nan",
         "share: \"nan\" is not a number (given by the caller); give a number from 0 to 1"},
        {"share", "0x1",
         "share: \"0x1\" is not a number (given by the caller); give a number from 0 to 1"},
        {"share", "1e999",
         "share: \"1e999\" is not a number (given by the caller); give a number from 0 to 1"},
        {"cache_buffer_capacity_gb", "lots",
         "cache_buffer_capacity_gb: \"lots\" is not a number (given by the caller); give a number, "
         "0 "
         "or more"},
        {"posix_io_engin", "psync",
         "posix_io_engin: no such option (given by the caller); did you mean posix_io_engine?"},
        {"Share", "1", "Share: no such option (given by the caller); did you mean share?"},
        {"teapot", "1",
         "teapot: no such option (given by the caller); `ucm help options` lists all there are"},
        {"bad\nkey\x1b[2J", "1",
         "bad?key?[2J: no such option (given by the caller); `ucm help options` lists all there "
         "are"},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        assert_int_equal(ucm_conf_set(*state, cases[i].key, cases[i].value), -EINVAL);
        assert_string_equal(ucm_conf_error(*state), cases[i].error);
    }
    assert_string_equal(ucm_conf_get(*state, "segment_mib"), "7");
    assert_string_equal(ucm_conf_get(*state, "io_direct"), "false");
}

static void nothing_at_all_is_refused(void **state)
{
    assert_int_equal(ucm_conf_set(*state, "segment_mib", NULL), -EINVAL);
    assert_string_equal(ucm_conf_error(*state),
                        "segment_mib: no value (given by the caller); give one");
    assert_int_equal(ucm_conf_set(*state, NULL, "1"), -EINVAL);
    assert_int_equal(ucm_conf_set(NULL, "segment_mib", "1"), -EINVAL);
    assert_int_equal(ucm_conf_load(*state, NULL), -EINVAL);
    assert_int_equal(ucm_conf_load(NULL, path), -EINVAL);
    assert_int_equal(ucm_conf_env(NULL), -EINVAL);
    assert_int_equal(ucmi_conf_new(plugins, NULL), -EINVAL);
}

static void a_long_value_is_cut_in_the_error(void **state)
{
    static char text[5000];
    memset(text, 'z', sizeof text - 1);
    assert_int_equal(ucm_conf_set(*state, "segment_mib", text), -EINVAL);
    assert_non_null(
        strstr(ucm_conf_error(*state), "zzz\" is not a whole number (given by the caller"));
    assert_int_equal(ucm_conf_set(*state, text, "1"), -EINVAL);
    assert_non_null(strstr(ucm_conf_error(*state), "zzz: no such option (given by the caller)"));
}

static void the_nearest_word_is_found_and_only_a_near_one(void **state)
{
    static const char *const words[] = {"posix_io_engine", "posix_capacity_gb", "device",
                                        "device_id",       "use_lite",          NULL};
    assert_string_equal(ucmi_nearest("posix_io_engin", words), "posix_io_engine");
    assert_string_equal(ucmi_nearest("posix-io-engine", words), "posix_io_engine");
    assert_string_equal(ucmi_nearest("POSIX_IO_ENGINE", words), "posix_io_engine");
    assert_string_equal(ucmi_nearest("devcie", words), "device"); /* a swap is one mistake */
    assert_string_equal(ucmi_nearest("device_di", words), "device_id");
    assert_string_equal(ucmi_nearest("capacity_gb", words), "posix_capacity_gb");
    assert_string_equal(ucmi_nearest("uselite", words), "use_lite");
    assert_null(ucmi_nearest("debug", words));
    assert_null(ucmi_nearest("", words));
    assert_null(ucmi_nearest("teapot", words));
    assert_null(ucmi_nearest(
        "a_word_longer_than_any_key_there_is_or_will_ever_be_in_any_table_here", words));
}

/* ---- files ---- */

static void the_file_of_the_guide_sets_what_it_says(void **state)
{
    write_file("ucm_connectors:\n"
               "  - ucm_connector_name: \"UcmPipelineStore\"\n"
               "    ucm_connector_config:\n"
               "      store_pipeline: \"Cache|Posix\"\n"
               "      storage_backends: \"/mnt/test\"\n"
               "      io_direct: true\n"
               "      # cache_buffer_capacity_gb: 256\n"
               "      use_gdr: false\n"
               "enable_event_sync: true\n"
               "use_layerwise: false\n"
               "enable_record_traces: false\n"
               "use_lite: false\n"
               "persist_token_threshold: 0\n");
    assert_int_equal(ucm_conf_load(*state, path), 0);
    assert_string_equal(ucm_conf_get(*state, "storage_backends"), "/mnt/test");
    assert_string_equal(ucm_conf_get(*state, "io_direct"), "true");
    assert_string_equal(ucm_conf_get(*state, "use_layerwise"), "false");
    assert_string_equal(ucm_conf_get(*state, "ucm_connector_name"), "UcmPipelineStore");
    assert_string_equal(ucm_conf_get(*state, "cache_buffer_capacity_gb"), "0");
    assert_string_equal(ucm_conf_error(*state), "");
}

static void a_list_of_backends_and_null_values(void **state)
{
    assert_int_equal(ucm_conf_set(*state, "segment_mib", "9"), 0);
    write_file("storage_backends: [/a, /b]\nsegment_mib: ~\nposix_gc_enable: [1, 2]\n");
    assert_int_equal(ucm_conf_load(*state, path), 0);
    assert_string_equal(ucm_conf_get(*state, "storage_backends"), "/a:/b");
    assert_string_equal(ucm_conf_get(*state, "segment_mib"), "7");
}

static void a_bad_file_is_named_with_its_line_and_changes_nothing(void **state)
{
    static const struct {
        const char *file, *error;
    } cases[] = {
        {"io_direct: true\n\nposix_io_engin: aio\n",
         "posix_io_engin: no such option (@:3); did you mean posix_io_engine?"},
        {"io_direct: true\nsegment_mib: lots\n",
         "segment_mib: \"lots\" is not a whole number (@:2); give a whole number from 1 to 100"},
        {"io_direct: true\nsegment_mib: 3\nshare: 1\nsegment_mib: 4\n",
         "segment_mib: given twice (@:2 and @:4); keep one"},
        {"io_direct: true\nshare: {a: 1}\n",
         "share: a mapping is no value for it (@:2); give one value"},
        {"io_direct: true\nstore_pipeline: [Cache, Posix]\n",
         "store_pipeline: a list is no value for it (@:2); give one value"},
        {"io_direct: true\nucm_sparse_config:\n  GSA: {}\n",
         "ucm_sparse_config: no such option (@:2); `ucm help options` lists all there are"},
        {"io_direct: true\nsegment_mib 3\n",
         "@:3: not well-formed YAML: could not find expected ':' while scanning a simple key"},
        {"io_direct: true\nsegment_mib: *x\n",
         "@:2: anchors and aliases (\"x\") are not supported; write the value out"},
        {"", "@:1: the file is empty; give `option: value` lines"},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        write_file(cases[i].file);
        assert_int_equal(ucm_conf_load(*state, path), -EINVAL);
        error_is(*state, cases[i].error);
        assert_string_equal(ucm_conf_get(*state, "io_direct"), "false");
    }
}

static void a_file_that_cannot_be_read_is_said_to_be_so(void **state)
{
    assert_int_equal(ucm_conf_load(*state, "/no/such/file.yaml"), -ENOENT);
    assert_string_equal(ucm_conf_error(*state),
                        "/no/such/file.yaml: cannot be read: No such file or "
                        "directory; check the path");
    assert_int_equal(ucm_conf_load(*state, "/tmp"), -EINVAL);
    assert_string_equal(ucm_conf_error(*state),
                        "/tmp: is not a file; give the path of a YAML file");
    assert_int_equal(ucm_conf_load(*state, "/dev/zero"), -EINVAL);
    assert_int_equal(truncate(path, (1 << 20) + 1), 0);
    assert_int_equal(ucm_conf_load(*state, path), -EINVAL);
    error_is(*state, "@: is larger than 1024 KiB; is it a configuration?");
}

/* ---- the environment ---- */

static void the_environment_wins_over_file_and_caller(void **state)
{
    write_file("segment_mib: 3\nshare: 0.1\nstore_pipeline: Posix\n");
    setenv("UCM_SEGMENT_MIB", "5", 1);
    setenv("UCM_CONFIG_FILE", "/not/an/option", 1);
    assert_int_equal(ucm_conf_load(*state, path), 0);
    assert_int_equal(ucm_conf_set(*state, "segment_mib", "4"), 0);
    assert_int_equal(ucm_conf_set(*state, "share", "0.2"), 0);
    assert_int_equal(ucm_conf_env(*state), 0);
    unsetenv("UCM_SEGMENT_MIB");
    unsetenv("UCM_CONFIG_FILE");
    assert_string_equal(ucm_conf_get(*state, "segment_mib"), "5");
    assert_string_equal(ucm_conf_get(*state, "share"), "0.2");
    assert_string_equal(ucm_conf_get(*state, "store_pipeline"), "Posix");
    assert_int_equal(logged.n, 0);
}

static void a_bad_variable_is_named_and_changes_nothing(void **state)
{
    setenv("UCM_IO_DIRECT", "true", 1);
    setenv("UCM_CACHE_BUFFER_CAPACITY_GB", "lots", 1);
    assert_int_equal(ucm_conf_env(*state), -EINVAL);
    unsetenv("UCM_IO_DIRECT");
    unsetenv("UCM_CACHE_BUFFER_CAPACITY_GB");
    error_is(*state, "cache_buffer_capacity_gb: \"lots\" is not a number (set by "
                     "UCM_CACHE_BUFFER_CAPACITY_GB); give a number, 0 or more");
    assert_string_equal(ucm_conf_get(*state, "io_direct"), "false");
}

static void a_variable_that_is_almost_an_option_is_warned_of(void **state)
{
    setenv("UCM_SEGMENT_MBI", "5", 1);
    setenv("UCM_TEAPOT", "other software's", 1);
    setenv("UCM_LOG_SHARE", "the logger's", 1);
    assert_int_equal(ucm_conf_env(*state), 0);
    unsetenv("UCM_SEGMENT_MBI");
    unsetenv("UCM_TEAPOT");
    unsetenv("UCM_LOG_SHARE");
    assert_int_equal(logged.n, 1);
    assert_string_equal(logged.line,
                        "options: UCM_SEGMENT_MBI in the environment is no option; did "
                        "you mean UCM_SEGMENT_MIB?");
    assert_string_equal(ucm_conf_get(*state, "segment_mib"), "7");
}

static void an_obsolete_option_is_accepted_with_one_warning(void **state)
{
    write_file("posix_gc_enable: true\n");
    assert_int_equal(ucm_conf_load(*state, path), 0);
    assert_int_equal(ucm_conf_load(*state, path), 0);
    assert_int_equal(ucm_conf_set(*state, "posix_gc_enable", "false"), 0);
    assert_int_equal(logged.n, 1);
    char expected[256];
    snprintf(expected, sizeof expected,
             "options: posix_gc_enable: has no effect any more (%s:1): nothing to collect", path);
    assert_string_equal(logged.line, expected);
}

/* ---- tables and plugins ---- */

struct shown {
    int n, given;
    struct ucm_option_info last;
    const char *name;
};

static void show(void *arg, const struct ucm_option_info *info)
{
    struct shown *shown = arg;
    shown->n++;
    shown->given += info->given;
    assert_non_null(info->help);
    if (strcmp(info->name, shown->name) == 0)
        shown->last = *info;
}

static void a_visit_shows_all_there_is_to_know(void **state)
{
    struct shown shown = {.name = "segment_mib"};
    assert_int_equal(ucm_conf_set(*state, "segment_mib", "9"), 0);
    ucmi_conf_visit(*state, show, &shown);
    assert_string_equal(shown.last.owner, "Posix, Cache"); /* one key, two readers, one row */
    assert_string_equal(shown.last.type, "int");
    assert_string_equal(shown.last.value, "9");
    assert_string_equal(shown.last.def, "7");
    assert_string_equal(shown.last.range, "1..100");
    assert_string_equal(shown.last.help, "a number");
    assert_int_equal(shown.last.obsolete, 0);
    assert_int_equal(shown.last.given, 1);
    assert_int_equal(shown.given, 1);

    static const struct {
        const char *name, *type, *range;
        int obsolete;
    } rows[] = {{"io_direct", "bool", "true|false", 0},
                {"posix_io_engine", "choice", "auto|psync|io_uring", 0},
                {"any_number", "int", "", 0},
                {"cache_buffer_capacity_gb", "float", "0..", 0},
                {"store_pipeline", "text", "", 0},
                {"posix_gc_enable", "obsolete", "", 1}};
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        shown.name = rows[i].name;
        ucmi_conf_visit(*state, show, &shown);
        assert_string_equal(shown.last.type, rows[i].type);
        assert_string_equal(shown.last.range, rows[i].range);
        assert_int_equal(shown.last.obsolete, rows[i].obsolete);
        assert_int_equal(shown.last.given, 0);
    }
}

static void a_plugin_gets_its_options_as_c_values(void **state)
{
    struct state *s;
    assert_int_equal(ucm_conf_set(*state, "io_direct", "yes"), 0);
    assert_int_equal(ucm_conf_set(*state, "posix_io_engine", "IO_URING"), 0);
    assert_int_equal(ucm_conf_set(*state, "segment_mib", "64"), 0);
    assert_int_equal(ucm_conf_set(*state, "share", "0.75"), 0);
    assert_int_equal(ucm_conf_set(*state, "storage_backends", "/a:/b"), 0);
    assert_int_equal(ucmi_plugin_new(&plugin, *state, (void **)&s), 0);
    assert_int_equal(ucm_conf_set(*state, "storage_backends", "/gone"), 0);
    assert_int_equal(s->flag, 1);
    assert_int_equal(s->mode, 2);
    assert_int_equal(s->count, 64);
    assert_int_equal(s->any, -1);
    assert_true(s->ratio == 0.75 && s->size == 0);
    assert_string_equal(s->text, "Cache|Posix");
    assert_string_equal(s->backends, "/a:/b"); /* a copy of its own */
    ucmi_plugin_free(&plugin, s);
    ucmi_plugin_free(&plugin, NULL);

    assert_int_equal(ucmi_plugin_new(&plugin, NULL, (void **)&s), 0);
    assert_int_equal(s->count, 7);
    assert_string_equal(s->backends, "");
    ucmi_plugin_free(&plugin, s);

    void *nothing; /* no state: the options are read by their names */
    assert_int_equal(ucmi_plugin_new(&ucmi_connector_options, *state, &nothing), 0);
    ucmi_plugin_free(&ucmi_connector_options, nothing);
}

static void a_table_that_contradicts_itself_or_another_is_refused(void **state)
{
    static const struct ucm_option wider[] = {
        {"segment_mib", UCM_T_INT, 0, "7", "1", "200", "another range"}, {NULL}};
    static const struct ucm_option low[] = {
        {"low", UCM_T_INT, 0, "0", "1", NULL, "a default out of its own range"}, {NULL}};
    static const struct ucm_option none[] = {{"none", UCM_T_STR, 0, NULL, NULL, NULL, "no default"},
                                             {NULL}};
    static const struct {
        const struct ucm_option *table;
        const char *said;
    } cases[] = {{wider, "options: segment_mib: Posix and bad do not agree on it"},
                 {low, "options: low of bad: its default \"0\" is out of range"},
                 {none, "options: none of bad: its default \"\" is missing"}};
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        const struct ucm_plugin bad = {"options", "bad", "", cases[i].table, 0};
        const struct ucm_plugin *const list[] = {&plugin, &bad, NULL};
        ucm_conf *conf = NULL;
        assert_int_equal(ucmi_conf_new(list, &conf), -EINVAL);
        assert_null(conf);
        assert_string_equal(logged.line, cases[i].said);
    }
    ucm_conf_free(NULL);
}

static void the_tables_of_the_connector_and_of_old_files_are_sound(void **state)
{
    static const struct ucm_plugin *const list[] = {&ucmi_connector_options, &ucmi_obsolete_options,
                                                    NULL};
    ucm_conf *conf;
    assert_int_equal(ucmi_conf_new(list, &conf), 0);
    assert_string_equal(ucm_conf_get(conf, "ucm_connector_name"), "UcmPipelineStore");
    assert_string_equal(ucm_conf_get(conf, "enable_event_sync"), "true");
    assert_string_equal(ucm_conf_get(conf, "use_layerwise"), "true");
    for (const struct ucm_option *o = ucmi_obsolete_options.options; o->name; o++) {
        logged.n = 0;
        assert_int_equal(ucm_conf_set(conf, o->name, "1"), 0);
        assert_int_equal(logged.n, 1);
        assert_non_null(strstr(logged.line, o->help));
    }
    ucm_conf_free(conf);
}

struct everything {
    ucm_conf *conf;
    int n;
};

static void explain(void *arg, const struct ucm_option_info *info)
{
    struct everything *all = arg;
    all->n++;
    assert_in_range(strlen(info->help), 10, 300);
    assert_in_range(strlen(info->name), 3, 59); /* what ucmi_nearest and UCM_<KEY> have room for */
    assert_int_equal(strspn(info->name, "abcdefghijklmnopqrstuvwxyz0123456789_"),
                     strlen(info->name));
    assert_true(info->owner[0] && info->type[0] && !info->given);
    assert_string_equal(info->value, info->def);
    char *value = strdup(info->value); /* a default is spelled as its value would be shown */
    assert_int_equal(ucm_conf_set(all->conf, info->name, value), 0);
    assert_string_equal(ucm_conf_get(all->conf, info->name), value);
    free(value);
}

static void each_option_there_is_can_be_explained_and_set(void **state)
{
    ucm_conf *conf;
    assert_int_equal(ucm_conf_new(&conf), 0); /* no default is out of its range, no two disagree */
    struct everything all = {.conf = conf};
    ucm_options(NULL, explain, &all);
    assert_true(all.n > 40);
    ucm_conf_free(conf);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, make_conf, free_conf)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(each_type_is_shown_in_one_spelling),
        CASE(a_wrong_value_is_named_with_its_origin_and_remedy),
        CASE(nothing_at_all_is_refused),
        CASE(a_long_value_is_cut_in_the_error),
        CASE(the_nearest_word_is_found_and_only_a_near_one),
        CASE(the_file_of_the_guide_sets_what_it_says),
        CASE(a_list_of_backends_and_null_values),
        CASE(a_bad_file_is_named_with_its_line_and_changes_nothing),
        CASE(a_file_that_cannot_be_read_is_said_to_be_so),
        CASE(the_environment_wins_over_file_and_caller),
        CASE(a_bad_variable_is_named_and_changes_nothing),
        CASE(a_variable_that_is_almost_an_option_is_warned_of),
        CASE(an_obsolete_option_is_accepted_with_one_warning),
        CASE(a_visit_shows_all_there_is_to_know),
        CASE(a_plugin_gets_its_options_as_c_values),
        CASE(a_table_that_contradicts_itself_or_another_is_refused),
        CASE(the_tables_of_the_connector_and_of_old_files_are_sound),
        CASE(each_option_there_is_can_be_explained_and_set),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as options: as lines of key=value, and as a file.  A call that fails says why in one
 * printable line and changes nothing; what was accepted can be shown, and set again from what was
 * shown, giving the same values, and fills the state of the plugins.
 */
#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define MUST(x) ((x) ? (void)0 : abort())

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

extern const struct ucm_plugin ucmi_connector_options, ucmi_obsolete_options;

struct state {
    int flag, mode;
    int64_t count, any;
    double ratio;
    const char *text;
};
#define AT(field) offsetof(struct state, field)
static const struct ucm_option options[] = {
    {"flag", UCM_T_BOOL, AT(flag), "false", NULL, NULL, ""},
    {"mode", UCM_T_CHOICE, AT(mode), "a", "a|bc|d", NULL, ""},
    {"count", UCM_T_INT, AT(count), "7", "-5", "100", ""},
    {"any", UCM_T_INT, AT(any), "0", NULL, NULL, ""},
    {"ratio", UCM_T_FLOAT, AT(ratio), "0.5", "-1e3", "1e3", ""},
    {"storage_backends", UCM_T_STR, AT(text), "", NULL, NULL, ""},
    {NULL},
};
static const struct ucm_plugin plugin = {"options", "fuzz", "", options, sizeof(struct state)};
static const struct ucm_plugin *const plugins[] = {&plugin, &ucmi_connector_options,
                                                   &ucmi_obsolete_options, NULL};

static void ignore(void *arg, enum ucm_level level, const char *line)
{
    for (; *line; line++)
        MUST((unsigned char)*line >= ' ');
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    ucm_log_to(ignore, NULL, UCM_DEBUG);
    return 0;
}

static void set_again(void *arg, const struct ucm_option_info *info)
{
    if (info->given)
        MUST(ucm_conf_set(arg, info->name, info->value) == 0);
}

static void compare(void *arg, const struct ucm_option_info *info)
{
    const char *other = ucm_conf_get(arg, info->name);
    MUST(other && strcmp(other, info->value) == 0);
}

static void check(const ucm_conf *conf)
{
    ucm_conf *copy;
    struct state *a, *b;
    MUST(ucmi_conf_new(plugins, &copy) == 0);
    ucmi_conf_visit(conf, set_again, copy);
    ucmi_conf_visit(conf, compare, copy);
    MUST(ucmi_plugin_new(&plugin, conf, (void **)&a) == 0);
    MUST(ucmi_plugin_new(&plugin, copy, (void **)&b) == 0);
    MUST(a->flag == b->flag && a->mode == b->mode && a->count == b->count && a->any == b->any);
    MUST(a->ratio == b->ratio && strcmp(a->text, b->text) == 0);
    MUST(a->count >= -5 && a->count <= 100 && a->mode >= 0 && a->mode < 3);
    MUST(a->ratio >= -1e3 && a->ratio <= 1e3);
    ucmi_plugin_free(&plugin, a);
    ucmi_plugin_free(&plugin, b);
    ucm_conf_free(copy);
}

/* There is one, and there is nothing in it to scrub. */
static void check_error(const ucm_conf *conf)
{
    char *why = strdup(ucm_conf_error(conf));
    MUST(why && *why);
    ucmi_scrub(why);
    MUST(strcmp(why, ucm_conf_error(conf)) == 0);
    free(why);
}

static void set_lines(ucm_conf *conf, char *text)
{
    char *save = NULL;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char *value = strchr(line, '=');
        if (!value)
            continue;
        *value++ = '\0';
        const char *old = ucm_conf_get(conf, line);
        char *before = old ? strdup(old) : NULL;
        if (ucm_conf_set(conf, line, value) != 0) {
            const char *now = ucm_conf_get(conf, line);
            check_error(conf);
            MUST(before ? now && strcmp(now, before) == 0 : !now);
        }
        free(before);
    }
}

static void load(ucm_conf *conf, const uint8_t *data, size_t size)
{
    char path[64];
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    MUST(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ucm_conf *before;
    MUST(ucmi_conf_new(plugins, &before) == 0);
    ucmi_conf_visit(conf, set_again, before);
    if (ucm_conf_load(conf, path) != 0) {
        check_error(conf);
        ucmi_conf_visit(conf, compare, before);
    }
    ucm_conf_free(before);
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ucm_conf *conf;
    char *text = malloc(size + 1);
    MUST(text && ucmi_conf_new(plugins, &conf) == 0);
    memcpy(text, data, size);
    text[size] = '\0';
    set_lines(conf, text);
    check(conf);
    load(conf, data, size);
    check(conf);
    free(text);
    ucm_conf_free(conf);
    return 0;
}

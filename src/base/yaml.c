/* SPDX-License-Identifier: Apache-2.0 */
/*
 * yaml.c - reads the part of YAML that configuration files use into a flat list of pairs.
 *
 * The nesting is that of examples/ucm_config_example.yaml: ucm_connectors holds one mapping, whose
 * ucm_connector_config holds the options of the store; all of these, and the top-level keys, are
 * one space of names.  What a reader might take for something else than it is (anchors, aliases,
 * tags, a second document) is refused.  Works on the parser's events, a line at a time, without
 * recursion into what it does not know, so that no input can exhaust the stack.
 */
#include "base/conf.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <yaml.h>

enum { CONNECTORS_MAX = 1 };

enum level { TOP, CONNECTOR, CONFIG };

struct reader {
    yaml_parser_t parser;
    yaml_event_t event; /* the last one read */
    const char *name, *text;
    size_t len;
    ucmi_yaml_fn *fn;
    void *arg;
    char *why;
    size_t why_len;
    unsigned connectors_line, config_line; /* where these were met; 0: not yet */
    bool named;                            /* ucm_connector_name was met */
};

static unsigned line_of(const struct reader *r)
{
    return (unsigned)r->event.start_mark.line + 1;
}

static int refuse(struct reader *r, unsigned line, const char *fmt, ...) PRINTF_LIKE(3, 4);
static int refuse(struct reader *r, unsigned line, const char *fmt, ...)
{
    char reason[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(reason, sizeof reason, fmt, ap);
    va_end(ap);
    return ucmi_fail(r->why, r->why_len, -EINVAL, "%s:%u: %s", r->name, line, reason);
}

static int syntax_error(struct reader *r)
{
    const yaml_parser_t *p = &r->parser;
    if (p->error == YAML_MEMORY_ERROR)
        return ucmi_fail(r->why, r->why_len, -ENOMEM, "%s: out of memory", r->name);
    size_t line = p->problem_mark.line;
    if (p->error == YAML_READER_ERROR) { /* it reads ahead and has no mark, only an offset */
        line = 0;
        for (size_t i = 0; i < p->problem_offset && i < r->len; i++)
            line += r->text[i] == '\n';
    }
    return refuse(r, (unsigned)line + 1, "not well-formed YAML: %s%s%s",
                  p->problem ? p->problem : "unknown problem", p->context ? " " : "",
                  p->context ? p->context : "");
}

/* Reads the next event, and refuses what no configuration needs. */
static int next(struct reader *r)
{
    yaml_event_delete(&r->event);
    memset(&r->event, 0, sizeof r->event);
    if (!yaml_parser_parse(&r->parser, &r->event))
        return syntax_error(r);
    const yaml_char_t *anchor = NULL, *tag = NULL;
    if (r->event.type == YAML_ALIAS_EVENT) {
        anchor = r->event.data.alias.anchor;
    } else if (r->event.type == YAML_SCALAR_EVENT) {
        anchor = r->event.data.scalar.anchor;
        tag = r->event.data.scalar.tag;
    } else if (r->event.type == YAML_SEQUENCE_START_EVENT) {
        anchor = r->event.data.sequence_start.anchor;
        tag = r->event.data.sequence_start.tag;
    } else if (r->event.type == YAML_MAPPING_START_EVENT) {
        anchor = r->event.data.mapping_start.anchor;
        tag = r->event.data.mapping_start.tag;
    }
    if (anchor)
        return refuse(r, line_of(r),
                      "anchors and aliases (\"%.40s\") are not supported; write the "
                      "value out",
                      (const char *)anchor);
    if (tag)
        return refuse(r, line_of(r), "tags (\"%.40s\") are not supported; write the plain value",
                      (const char *)tag);
    return 0;
}

/* The text of the scalar at hand, or NULL with err set. */
static char *take_scalar(struct reader *r, int *err)
{
    const char *text = (const char *)r->event.data.scalar.value;
    size_t len = r->event.data.scalar.length;
    if (memchr(text, '\0', len)) {
        *err = refuse(r, line_of(r), "a text holds a zero byte");
        return NULL;
    }
    char *copy = strndup(text, len);
    *err = copy ? 0 : -ENOMEM;
    return copy;
}

static bool scalar_is_null(const struct reader *r)
{
    static const char *const words[] = {"", "~", "null", "Null", "NULL"};
    if (r->event.data.scalar.style != YAML_PLAIN_SCALAR_STYLE)
        return false;
    for (size_t i = 0; i < ARRAY_LEN(words); i++)
        if (strcmp((const char *)r->event.data.scalar.value, words[i]) == 0)
            return true;
    return false;
}

/* A sequence has begun: its scalars joined by ':'. */
static int read_list(struct reader *r, const char *key, char **joined_p)
{
    char *joined = NULL;
    size_t used = 0;
    int err;
    while (!(err = next(r)) && r->event.type == YAML_SCALAR_EVENT) {
        const char *item = (const char *)r->event.data.scalar.value;
        size_t len = r->event.data.scalar.length;
        if (len == 0 || scalar_is_null(r) || memchr(item, '\0', len) || memchr(item, ':', len)) {
            err =
                refuse(r, line_of(r),
                       "%.64s: \"%.80s\" cannot be an item of a list: items are joined by ':', so "
                       "they hold none, and none is empty",
                       key, item);
            break;
        }
        char *more = realloc(joined, used + len + 2);
        if (!more) {
            err = -ENOMEM;
            break;
        }
        joined = more;
        if (used > 0)
            joined[used++] = ':';
        memcpy(joined + used, item, len + 1);
        used += len;
    }
    if (!err && r->event.type != YAML_SEQUENCE_END_EVENT)
        err = refuse(r, line_of(r), "%.64s: a list may hold plain values only", key);
    if (!err && !joined && !(joined = strdup("")))
        err = -ENOMEM;
    if (err)
        free(joined);
    else
        *joined_p = joined;
    return err;
}

static int read_value(struct reader *r, const char *key, unsigned line)
{
    struct ucmi_yaml_pair pair = {.key = key, .kind = UCMI_YAML_MAP, .line = line};
    char *value = NULL;
    int err = next(r);
    if (err)
        return err;
    if (r->event.type == YAML_SCALAR_EVENT) {
        pair.kind = scalar_is_null(r) ? UCMI_YAML_NULL : UCMI_YAML_TEXT;
        if (pair.kind == UCMI_YAML_TEXT)
            value = take_scalar(r, &err);
    } else if (r->event.type == YAML_SEQUENCE_START_EVENT) {
        pair.kind = UCMI_YAML_LIST;
        err = read_list(r, key, &value);
    }
    pair.value = value;
    if (!err)
        err = r->fn(r->arg, &pair);
    free(value);
    /* fn has no use for a mapping either; were it to take one, its inside would be read as keys. */
    if (!err && pair.kind == UCMI_YAML_MAP)
        err = refuse(r, line, "%.64s: a mapping is not expected here", key);
    return err;
}

static int read_mapping(struct reader *r, enum level level);

/* A mapping, or nothing at all (`key:` alone), must follow. */
static int read_config(struct reader *r, unsigned line)
{
    if (r->config_line)
        return refuse(r, line, "ucm_connector_config: given twice (line %u and line %u); keep one",
                      r->config_line, line);
    r->config_line = line;
    int err = next(r);
    if (err || (r->event.type == YAML_SCALAR_EVENT && scalar_is_null(r)))
        return err;
    if (r->event.type != YAML_MAPPING_START_EVENT)
        return refuse(r, line, "ucm_connector_config: must be a mapping of `option: value`");
    return read_mapping(r, CONFIG);
}

static int read_connectors(struct reader *r, unsigned line)
{
    if (r->connectors_line)
        return refuse(r, line, "ucm_connectors: given twice (line %u and line %u); keep one",
                      r->connectors_line, line);
    r->connectors_line = line;
    unsigned n = 0;
    int err = next(r);
    if (err)
        return err;
    if (r->event.type != YAML_SEQUENCE_START_EVENT)
        return refuse(r, line,
                      "ucm_connectors: must be a list of one connector, begun by `- "
                      "ucm_connector_name: ...`");
    while (!(err = next(r)) && r->event.type != YAML_SEQUENCE_END_EVENT) {
        if (r->event.type != YAML_MAPPING_START_EVENT)
            return refuse(r, line_of(r),
                          "ucm_connectors: a connector is a mapping, begun by `- "
                          "ucm_connector_name: ...`");
        if (n++ == CONNECTORS_MAX)
            return refuse(r, line_of(r),
                          "ucm_connectors: a second connector; give exactly one (a "
                          "stack of tiers is spelled by store_pipeline)");
        if ((err = read_mapping(r, CONNECTOR)))
            return err;
    }
    if (!err && n == 0)
        err = refuse(r, line, "ucm_connectors: the list is empty; give one connector");
    if (!err && !r->named)
        err = refuse(r, line,
                     "ucm_connectors: ucm_connector_name is missing; give `- "
                     "ucm_connector_name: UcmPipelineStore`");
    return err;
}

/* One key of a mapping and what belongs to it. */
static int read_pair(struct reader *r, enum level level, const char *key, unsigned line)
{
    bool is_name = strcmp(key, "ucm_connector_name") == 0;
    if (level == TOP && strcmp(key, "ucm_connectors") == 0)
        return read_connectors(r, line);
    if (level == CONNECTOR && strcmp(key, "ucm_connector_config") == 0)
        return read_config(r, line);
    if (level == CONNECTOR && !is_name && strcmp(key, "ucm_connector_module_path") != 0)
        return refuse(r, line, "%.64s: not expected here; options go below ucm_connector_config",
                      key);
    if (level == CONNECTOR && is_name)
        r->named = true;
    return read_value(r, key, line);
}

/* A mapping has begun: reads to its end.  Recurs by level only, so three deep at most. */
static int read_mapping(struct reader *r, enum level level)
{
    int err;
    while (!(err = next(r)) && r->event.type != YAML_MAPPING_END_EVENT) {
        if (r->event.type != YAML_SCALAR_EVENT)
            return refuse(r, line_of(r), "a key must be a plain word");
        unsigned line = line_of(r);
        char *key = take_scalar(r, &err);
        if (key)
            err = read_pair(r, level, key, line);
        free(key);
        if (err)
            return err;
    }
    return err;
}

static int read_stream(struct reader *r)
{
    int err = next(r); /* STREAM-START */
    if (!err)
        err = next(r);
    if (err)
        return err;
    if (r->event.type != YAML_DOCUMENT_START_EVENT)
        return refuse(r, line_of(r), "the file is empty; give `option: value` lines");
    if ((err = next(r)))
        return err;
    if (r->event.type != YAML_MAPPING_START_EVENT)
        return refuse(r, line_of(r), "not a mapping; give `option: value` lines");
    if ((err = read_mapping(r, TOP)) || (err = next(r)) || (err = next(r)))
        return err;
    if (r->event.type != YAML_STREAM_END_EVENT)
        return refuse(r, line_of(r), "a second document; keep one");
    return 0;
}

int ucmi_yaml_pairs(const char *name, const char *text, size_t len, ucmi_yaml_fn *fn, void *arg,
                    char *why, size_t why_len)
{
    struct reader r = {.name = name,
                       .text = text,
                       .len = len,
                       .fn = fn,
                       .arg = arg,
                       .why = why,
                       .why_len = why_len};
    if (!yaml_parser_initialize(&r.parser))
        return ucmi_fail(why, why_len, -ENOMEM, "%s: out of memory", name);
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)text, len);
    int err = read_stream(&r);
    yaml_event_delete(&r.event);
    yaml_parser_delete(&r.parser);
    return err;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as a YAML file.  Whatever they are, the reader takes them or says why not; and what it
 * took, written out as plainly as YAML can be written, reads the same again.
 */
#include "base/conf.h"

#include <stdio.h>
#include <stdlib.h>

#define MUST(x) ((x) ? (void)0 : abort())

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct text {
    char *p;
    size_t len;
};

static void put(struct text *t, const char *p, size_t len)
{
    t->p = realloc(t->p, t->len + len + 1);
    MUST(t->p);
    memcpy(t->p + t->len, p, len);
    t->len += len;
    t->p[t->len] = '\0';
}

/* In double quotes, all but letters, digits and the like by their code. */
static void put_quoted(struct text *t, const char *s)
{
    put(t, "\"", 1);
    for (const unsigned char *p = (const unsigned char *)s; *p;) {
        unsigned extra = *p < 0x80 ? 0 : *p < 0xe0 ? 1 : *p < 0xf0 ? 2 : 3;
        uint32_t c = extra ? *p & (0x3fu >> extra) : *p;
        char code[16];
        p++;
        for (; extra; extra--, p++) {
            MUST((*p & 0xc0) == 0x80); /* what the reader gives is UTF-8 */
            c = c << 6 | (*p & 0x3f);
        }
        if (c > ' ' && c < 0x7f && c != '"' && c != '\\')
            snprintf(code, sizeof code, "%c", (int)c);
        else
            snprintf(code, sizeof code, "\\U%08X", c);
        put(t, code, strlen(code));
    }
    put(t, "\"", 1);
}

struct seen {
    struct text list;  /* the pairs, for comparing */
    struct text plain; /* the same as YAML */
    size_t n;
};

static int see(void *arg, const struct ucmi_yaml_pair *pair)
{
    struct seen *s = arg;
    MUST(pair->key && pair->line > 0);
    MUST((pair->value != NULL) == (pair->kind == UCMI_YAML_TEXT || pair->kind == UCMI_YAML_LIST));
    if (s->n++ == 0) {
        const char *head = "ucm_connectors:\n- ucm_connector_name: n\n  ucm_connector_config:\n";
        put(&s->plain, head, strlen(head));
    }
    put(&s->plain, "    ? ", 6);
    put_quoted(&s->plain, pair->key);
    put(&s->plain, "\n    : ", 7);
    if (pair->value)
        put_quoted(&s->plain, pair->value);
    put(&s->plain, "\n", 1);
    put(&s->list, pair->key, strlen(pair->key) + 1);
    put(&s->list, pair->value ? pair->value : "\x01null",
        pair->value ? strlen(pair->value) + 1 : 6);
    return 0;
}

static int see_all_but_the_first(void *arg, const struct ucmi_yaml_pair *pair)
{
    struct seen *s = arg;
    return s->n++ ? see(s, pair) : 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct seen first = {0}, again = {0};
    char why[256] = "";
    int err = ucmi_yaml_pairs("f", (const char *)data, size, see, &first, why, sizeof why);
    MUST((err == 0) == (why[0] == '\0'));
    MUST(err == 0 || (err == -EINVAL && strncmp(why, "f:", 2) == 0));
    if (err == 0 && first.n > 0) {
        err = ucmi_yaml_pairs("f", first.plain.p, first.plain.len, see_all_but_the_first, &again,
                              why, sizeof why);
        MUST(err == 0);
        MUST(first.list.len == again.list.len &&
             memcmp(first.list.p, again.list.p, first.list.len) == 0);
    }
    free(first.list.p);
    free(first.plain.p);
    free(again.list.p);
    free(again.plain.p);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * conf.h - what conf.c is made of: the types of options (option.c) and the YAML reader (yaml.c).
 */
#ifndef UCMI_CONF_H
#define UCMI_CONF_H

#include "base/base.h"

/* ---- option.c: one option and a text ---- */

struct ucmi_value {
    union {
        int word; /* BOOL, CHOICE */
        int64_t i;
        double f;
    } as;
    char canon[32];   /* INT: the one way to spell it */
    const char *text; /* the spelling to keep: canon, a word of the table, or what was given */
};
/* Reads text as a value of o.  On -EINVAL *wrong says what is wrong: "is not a number". */
int ucmi_option_parse(const struct ucm_option *o, const char *text, struct ucmi_value *v,
                      const char **wrong);
/* "give a number from 0 to 5", and "0..5" for lists. */
void ucmi_option_remedy(const struct ucm_option *o, char *out, size_t len);
void ucmi_option_range(const struct ucm_option *o, char *out, size_t len);
const char *ucmi_option_type(const struct ucm_option *o);
/* Puts the value where o->offset says; a STR is copied.  0 or -ENOMEM. */
int ucmi_option_store(const struct ucm_option *o, const char *text, void *state);
/* Two rows for one key agree in all that a user can see. */
bool ucmi_option_same(const struct ucm_option *a, const struct ucm_option *b);

/* ---- yaml.c: a file as a list of pairs ---- */

enum ucmi_yaml_kind { UCMI_YAML_TEXT, UCMI_YAML_NULL, UCMI_YAML_LIST, UCMI_YAML_MAP };
struct ucmi_yaml_pair {
    const char *key, *value; /* value of a LIST: its items joined by ':'; of NULL and MAP: NULL */
    enum ucmi_yaml_kind kind;
    unsigned line; /* of the key */
};
typedef int ucmi_yaml_fn(void *arg, const struct ucmi_yaml_pair *pair);
/* Visits the pairs of a YAML text in order, those below ucm_connectors[0] and its
 * ucm_connector_config among them.  Stops at the first error: its own is -EINVAL with the line and
 * the reason in why; fn's is returned as it is, with why untouched.  name is what why calls the
 * text. */
int ucmi_yaml_pairs(const char *name, const char *text, size_t len, ucmi_yaml_fn *fn, void *arg,
                    char *why, size_t why_len);

#endif

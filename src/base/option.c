/* SPDX-License-Identifier: Apache-2.0 */
/*
 * option.c - the types of options: reading a text as one, saying what would have been right, and
 * putting it into the private state of a plugin.  Numbers are read as C spells them whatever the
 * locale of the host program.  Pure functions over constant tables: no state, any thread.
 */
#include "base/conf.h"

#include <inttypes.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <strings.h>

static bool read_int(const char *text, int64_t *out)
{
    const char *digits = text + (*text == '-' || *text == '+');
    if (!*digits || digits[strspn(digits, "0123456789")] != '\0')
        return false;
    errno = 0;
    int64_t v = strtoll(text, NULL, 10);
    if (errno)
        return false;
    *out = v;
    return true;
}

static bool read_float(const char *text, double *out)
{
    if (!*text || text[strspn(text, "0123456789+-.eE")] != '\0')
        return false;
    locale_t c = newlocale(LC_NUMERIC_MASK, "C", (locale_t)0);
    if (!c)
        return false;
    char *end;
    double v = strtod_l(text, &end, c);
    freelocale(c);
    if (*end != '\0' || !isfinite(v))
        return false;
    *out = v;
    return true;
}

static int parse_bool(const char *text, struct ucmi_value *v, const char **wrong)
{
    static const char *const words[2][4] = {{"false", "no", "off", "0"},
                                            {"true", "yes", "on", "1"}};
    for (int b = 0; b < 2; b++)
        for (size_t i = 0; i < ARRAY_LEN(words[b]); i++)
            if (strcasecmp(text, words[b][i]) == 0) {
                v->as.word = b;
                v->text = words[b][0];
                return 0;
            }
    *wrong = "is neither true nor false";
    return -EINVAL;
}

static int parse_int(const struct ucm_option *o, const char *text, struct ucmi_value *v,
                     const char **wrong)
{
    int64_t low = INT64_MIN, high = INT64_MAX, n;
    *wrong = "is not a whole number";
    if (!read_int(text, &n))
        return -EINVAL;
    if ((o->min && !read_int(o->min, &low)) || (o->max && !read_int(o->max, &high)))
        return -EINVAL;
    *wrong = "is out of range";
    if (n < low || n > high)
        return -EINVAL;
    v->as.i = n;
    snprintf(v->canon, sizeof v->canon, "%" PRId64, n);
    v->text = v->canon;
    return 0;
}

static int parse_float(const struct ucm_option *o, const char *text, struct ucmi_value *v,
                       const char **wrong)
{
    double low = -HUGE_VAL, high = HUGE_VAL, x;
    *wrong = "is not a number";
    if (!read_float(text, &x))
        return -EINVAL;
    if ((o->min && !read_float(o->min, &low)) || (o->max && !read_float(o->max, &high)))
        return -EINVAL;
    *wrong = "is out of range";
    if (x < low || x > high)
        return -EINVAL;
    v->as.f = x;
    return 0;
}

static int parse_choice(const struct ucm_option *o, const char *text, struct ucmi_value *v,
                        const char **wrong)
{
    size_t len = strlen(text);
    int index = 0;
    for (const char *w = o->min; w && *w; index++) {
        size_t n = strcspn(w, "|");
        if (n == len && strncasecmp(w, text, n) == 0 && n < sizeof v->canon) {
            v->as.word = index;
            memcpy(v->canon, w, n);
            v->canon[n] = '\0';
            v->text = v->canon;
            return 0;
        }
        w += n + (w[n] == '|');
    }
    *wrong = "is none of the choices";
    return -EINVAL;
}

int ucmi_option_parse(const struct ucm_option *o, const char *text, struct ucmi_value *v,
                      const char **wrong)
{
    v->text = text;
    switch (o->type) {
    case UCM_T_BOOL: return parse_bool(text, v, wrong);
    case UCM_T_INT: return parse_int(o, text, v, wrong);
    case UCM_T_FLOAT: return parse_float(o, text, v, wrong);
    case UCM_T_CHOICE: return parse_choice(o, text, v, wrong);
    case UCM_T_STR:
    case UCM_T_OBSOLETE: return 0;
    }
    *wrong = "has no type";
    return -EINVAL;
}

void ucmi_option_remedy(const struct ucm_option *o, char *out, size_t len)
{
    const char *noun = o->type == UCM_T_INT ? "a whole number" : "a number";
    switch (o->type) {
    case UCM_T_BOOL: snprintf(out, len, "give true or false"); return;
    case UCM_T_CHOICE: snprintf(out, len, "give one of %s", o->min); return;
    case UCM_T_STR:
    case UCM_T_OBSOLETE: snprintf(out, len, "give a text"); return;
    default: break;
    }
    if (o->min && o->max)
        snprintf(out, len, "give %s from %s to %s", noun, o->min, o->max);
    else if (o->min)
        snprintf(out, len, "give %s, %s or more", noun, o->min);
    else if (o->max)
        snprintf(out, len, "give %s, %s or less", noun, o->max);
    else
        snprintf(out, len, "give %s", noun);
}

void ucmi_option_range(const struct ucm_option *o, char *out, size_t len)
{
    bool number = o->type == UCM_T_INT || o->type == UCM_T_FLOAT;
    if (o->type == UCM_T_BOOL)
        snprintf(out, len, "true|false");
    else if (o->type == UCM_T_CHOICE)
        snprintf(out, len, "%s", o->min);
    else if (number && (o->min || o->max))
        snprintf(out, len, "%s..%s", o->min ? o->min : "", o->max ? o->max : "");
    else
        snprintf(out, len, "%s", "");
}

const char *ucmi_option_type(const struct ucm_option *o)
{
    static const char *const names[] = {
        [UCM_T_BOOL] = "bool", [UCM_T_INT] = "int",       [UCM_T_FLOAT] = "float",
        [UCM_T_STR] = "text",  [UCM_T_CHOICE] = "choice", [UCM_T_OBSOLETE] = "obsolete"};
    return names[o->type];
}

int ucmi_option_store(const struct ucm_option *o, const char *text, void *state)
{
    char *at = (char *)state + o->offset;
    struct ucmi_value v;
    const char *wrong;
    if (o->type == UCM_T_OBSOLETE)
        return 0;
    int err = ucmi_option_parse(o, text, &v, &wrong);
    if (err)
        return err;
    if (o->type == UCM_T_INT) {
        memcpy(at, &v.as.i, sizeof v.as.i);
    } else if (o->type == UCM_T_FLOAT) {
        memcpy(at, &v.as.f, sizeof v.as.f);
    } else if (o->type == UCM_T_STR) {
        char *copy = strdup(text);
        if (!copy)
            return -ENOMEM;
        memcpy(at, &copy, sizeof copy);
    } else {
        memcpy(at, &v.as.word, sizeof v.as.word);
    }
    return 0;
}

static bool same_text(const char *a, const char *b)
{
    return a == b || (a && b && strcmp(a, b) == 0);
}

bool ucmi_option_same(const struct ucm_option *a, const struct ucm_option *b)
{
    return a->type == b->type && same_text(a->def, b->def) && same_text(a->min, b->min) &&
           same_text(a->max, b->max);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Options of the verbs: rows in, values out.  getopt_long reads the words, the rows say what they
 * mean and what help prints, so that the two cannot differ.  A value that does not parse is an
 * error naming the option, the value and what it should look like.
 */
#include "tool.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_OPTS = 48, HELP_COLUMN = 26, LAST_COLUMN = 100 };

int cannot(const char *fmt, ...)
{
    va_list ap;

    fflush(stdout);
    fprintf(stderr, "%s: ", program_invocation_short_name);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    return TOOL_CANNOT;
}

/* Edits (insert, delete, replace) from one word to the other, at most `most` + 1. */
static unsigned word_distance(const char *a, const char *b, unsigned most)
{
    size_t na = strlen(a), nb = strlen(b);
    unsigned row[64];

    if (nb >= COUNT_OF(row) || na > nb + most || nb > na + most)
        return most + 1;
    for (unsigned j = 0; j <= nb; j++)
        row[j] = j;
    for (size_t i = 1; i <= na; i++) {
        unsigned corner = row[0]++;
        for (size_t j = 1; j <= nb; j++) {
            unsigned replaced = corner + (a[i - 1] != b[j - 1]);
            unsigned best = row[j] < row[j - 1] ? row[j] + 1 : row[j - 1] + 1;
            corner = row[j];
            row[j] = replaced < best ? replaced : best;
        }
    }
    return row[nb];
}

const char *nearest_word(const char *given, const char *const *words, size_t n)
{
    const char *best = NULL;
    unsigned least = 3; /* more than two slips is another word */

    for (size_t i = 0; i < n; i++) {
        unsigned d = word_distance(given, words[i], least);
        if (d < least) {
            least = d;
            best = words[i];
        }
    }
    return best;
}

/* One number with an optional k, M, G (or K, KiB, ...); end is where it stops.  0, or -1. */
static int parse_scaled(const char *text, uint64_t unit, uint64_t *value, char **end)
{
    static const char letters[] = "kmgt";

    if (!isdigit((unsigned char)*text))
        return -1;
    errno = 0;
    unsigned long long n = strtoull(text, end, 10);
    if (errno)
        return -1;
    const char *letter = **end ? strchr(letters, tolower((unsigned char)**end)) : NULL;
    if (letter) {
        for (const char *p = letters; p <= letter; p++)
            if (__builtin_mul_overflow(n, unit, &n))
                return -1;
        (*end)++;
        if (unit == 1024 && !strncmp(*end, "iB", 2))
            *end += 2;
    }
    *value = n;
    return 0;
}

static int parse_list(const char *text, uint64_t unit, struct list *list)
{
    list->n = 0;
    for (char *end; list->n < COUNT_OF(list->v); text = end + 1) {
        if (parse_scaled(text, unit, &list->v[list->n++], &end) < 0)
            return -1;
        if (!*end)
            return 0;
        if (*end != ',')
            return -1;
    }
    return -1;
}

static int parse_value(const struct opt *o, const char *text, void *field)
{
    uint64_t unit = o->type == OPT_SIZE || o->type == OPT_SIZES ? 1024 : 1000;
    struct texts *texts = field;
    char *end;

    switch (o->type) {
    case OPT_FLAG:
    case OPT_SWITCH: *(int *)field = strcmp(text, "no") != 0; return 0;
    case OPT_COUNT:
    case OPT_SIZE: return parse_scaled(text, unit, field, &end) < 0 || *end ? -1 : 0;
    case OPT_COUNTS:
    case OPT_SIZES: return parse_list(text, unit, field);
    case OPT_TEXT: *(const char **)field = text; return 0;
    case OPT_TEXTS:
    case OPT_WORDS:
        if (texts->n == COUNT_OF(texts->v))
            return -1;
        texts->v[texts->n++] = text;
        return 0;
    }
    return -1;
}

/* Long options for getopt: row i has value 1000 + i, its --no- form 2000 + i. */
enum { VAL_ROW = 1000, VAL_NO = 2000 };
struct longs {
    struct option v[2 * MAX_OPTS + 2];
    char no[MAX_OPTS][32];
    const char *names[MAX_OPTS];
    unsigned n, rows;
};

static void make_longs(const struct opt *opts, struct longs *l)
{
    memset(l, 0, sizeof *l);
    for (const struct opt *o = opts; o && o->name && l->rows < MAX_OPTS; o++, l->rows++) {
        int has_arg = o->type != OPT_FLAG && o->type != OPT_SWITCH;
        l->names[l->rows] = o->name;
        l->v[l->n++] = (struct option){o->name, has_arg, NULL, VAL_ROW + (int)l->rows};
        if (o->type == OPT_SWITCH) {
            snprintf(l->no[l->rows], sizeof l->no[0], "no-%s", o->name);
            l->v[l->n++] = (struct option){l->no[l->rows], 0, NULL, VAL_NO + (int)l->rows};
        }
    }
    l->v[l->n++] = (struct option){"help", 0, NULL, 'h'};
}

static int is_program(const struct verb *verb)
{
    return !strncmp(verb->name, "ucm-", 4);
}

/* Says what is wrong with the words of a verb; returns -1. */
static int PRINTF_LIKE(2, 3) wrong(const struct verb *verb, const char *fmt, ...)
{
    char text[400];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (is_program(verb))
        cannot("%s", text);
    else
        cannot("%s: %s", verb->name, text);
    return -1;
}

static int complain(const struct verb *verb, const struct longs *l, int c, const char *word)
{
    char bare[32], help[64];
    const char *from = word + strspn(word, "-"), *near;

    snprintf(bare, sizeof bare, "%.*s", (int)strcspn(from, "="), from);
    snprintf(help, sizeof help, is_program(verb) ? "%s --help" : "ucm help %s", verb->name);
    if (c == ':')
        return wrong(verb, "%s needs a value; see `%s`", word, help);
    if ((near = nearest_word(bare, l->names, l->rows)))
        return wrong(verb, "no option %s; did you mean --%s?", word, near);
    return wrong(verb, "no option %s; see `%s`", word, help);
}

/* The words that follow, up to the next option. */
static int more_words(int argc, char **argv, struct texts *texts)
{
    for (; optind < argc && argv[optind][0] != '-'; optind++) {
        if (texts->n == COUNT_OF(texts->v))
            return -1;
        texts->v[texts->n++] = argv[optind];
    }
    return 0;
}

int opts_parse(const struct verb *verb, void *state, int argc, char **argv)
{
    struct longs l;
    const struct opt *rows = verb->opts;

    make_longs(rows, &l);
    memset(state, 0, verb->size);
    for (unsigned i = 0; i < l.rows; i++)
        if (rows[i].def)
            parse_value(&rows[i], rows[i].def, (char *)state + rows[i].offset);
    opterr = 0;
    for (;;) {
        int c = getopt_long(argc, argv, ":h", l.v, NULL);
        if (c == -1)
            break;
        if (c == 'h')
            return 0;
        if (c < VAL_ROW)
            return complain(verb, &l, c, argv[optind - 1]);
        const struct opt *o = &rows[c >= VAL_NO ? c - VAL_NO : c - VAL_ROW];
        const char *text = c >= VAL_NO ? "no" : optarg ? optarg : "yes";
        void *field = (char *)state + o->offset;
        if (parse_value(o, text, field) < 0 ||
            (o->type == OPT_WORDS && more_words(argc, argv, field) < 0))
            return wrong(verb, "--%s %s: not %s %s", o->name, text,
                         strchr("AEIOU", o->arg[0]) ? "an" : "a", o->arg);
    }
    unsigned given = (unsigned)(argc - optind);
    if (given < verb->min_operands || given > verb->max_operands) {
        return wrong(verb, "%s; usage: %s%s [options] %s",
                     given < verb->min_operands ? "something is missing" : "too many words",
                     is_program(verb) ? "" : "ucm ", verb->name, verb->operands);
    }
    return optind;
}

void print_wrapped(FILE *out, const char *text, int column, int indent)
{
    while (*text) {
        size_t room = (size_t)(LAST_COLUMN - column), len = strcspn(text, "\n");
        if (len > room) {
            len = room;
            while (len && text[len] != ' ')
                len--;
            if (!len)
                len = strcspn(text, " \n");
        }
        fprintf(out, "%.*s\n", (int)len, text);
        text += len + (text[len] != '\0');
        column = indent;
        if (*text)
            fprintf(out, "%*s", indent, "");
    }
}

void opts_help(const struct verb *verb, FILE *out)
{
    fprintf(out, "usage: %s%s%s%s%s\n\n", is_program(verb) ? "" : "ucm ", verb->name,
            verb->opts ? " [options]" : "", *verb->operands ? " " : "", verb->operands);
    print_wrapped(out, verb->about, 0, 0);
    if (verb->opts)
        fputs("\nOptions:\n", out);
    for (const struct opt *o = verb->opts; o && o->name; o++) {
        char left[80], text[512];
        snprintf(left, sizeof left, "  --%s%s%s%s", o->type == OPT_SWITCH ? "[no-]" : "", o->name,
                 o->arg ? " " : "", o->arg ? o->arg : "");
        int column = fprintf(out, "%-*s", HELP_COLUMN - 1, left) + 1;
        fputc(' ', out);
        if (column > HELP_COLUMN)
            fprintf(out, "\n%*s", column = HELP_COLUMN, "");
        int bare = !o->def || !*o->def || o->type == OPT_FLAG;
        snprintf(text, sizeof text, bare ? "%s" : "%s (default %s)", o->help, o->def);
        print_wrapped(out, text, column, HELP_COLUMN);
    }
}

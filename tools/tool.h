/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tool.h - what the verbs of the program ucm share: rows for verbs and options, and the report they
 * write, as a table for people or as one JSON object.
 *
 * The tool is an outsider: it knows ucm.h and libc.  What it lacks, the API lacks.
 */
#ifndef UCM_TOOL_H
#define UCM_TOOL_H

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "ucm.h"

#define COUNT_OF(a)       (sizeof(a) / sizeof((a)[0]))
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))

/* Exit statuses of every verb. */
enum { TOOL_GOOD = 0, TOOL_BAD = 1, TOOL_CANNOT = 2 };

/* ---- options: a row says how a value is read, where it goes and what help prints ---- */

enum opt_type {
    OPT_FLAG,   /* int: --name */
    OPT_SWITCH, /* int: --name or --no-name */
    OPT_COUNT,  /* uint64_t: 1k is 1000 */
    OPT_SIZE,   /* uint64_t: 1K is 1024 */
    OPT_COUNTS, /* struct list, by commas */
    OPT_SIZES,  /* struct list, by commas */
    OPT_TEXT,   /* const char * */
    OPT_TEXTS,  /* struct texts: may be given again */
    OPT_WORDS   /* struct texts: one word or more, up to the next option */
};
struct list {
    uint64_t v[32];
    unsigned n;
};
struct texts {
    const char *v[256];
    unsigned n;
};
struct opt {
    const char *name;
    enum opt_type type;
    size_t offset;         /* in the verb's state */
    const char *arg, *def; /* what help calls the value; the default as text, or NULL */
    const char *help;
};
struct verb {
    const char *name, *operands, *help; /* a name "ucm-...": a program by itself */
    const char *about;                  /* what `ucm help VERB` says besides the options */
    const struct opt *opts;             /* ends with a NULL name */
    size_t size;                        /* of the state that the rows fill in */
    unsigned min_operands, max_operands;
    int (*run)(void *state, unsigned n, char **operands); /* returns an exit status */
};
/* Fills state from the defaults and argv.  Returns the place of the first operand in argv (which is
 * permuted), 0 when --help was given, or -1 after saying what is wrong. */
int opts_parse(const struct verb *verb, void *state, int argc, char **argv);
void opts_help(const struct verb *verb, FILE *out);
/* The nearest of n words to what was given, or NULL if none is near. */
const char *nearest_word(const char *given, const char *const *words, size_t n);
/* Prints text in lines of at most 100 columns, all but the first indented. */
void print_wrapped(FILE *out, const char *text, int column, int indent);

/* Says on standard error what cannot be done; returns TOOL_CANNOT. */
int cannot(const char *fmt, ...) PRINTF_LIKE(1, 2);

/* ---- reports: the same facts and tables for people and, with --json, for programs ---- */

enum column_kind { COLUMN_TEXT, COLUMN_SIZE, COLUMN_COUNT, COLUMN_NUMBER };
struct column {
    const char *key, *head; /* in JSON; in the table, NULL: not there */
    enum column_kind kind;
    int width;    /* < 0: left */
    int decimals; /* of COLUMN_NUMBER in the table */
};
union cell {
    const char *text;
    double num; /* NAN: unknown, "-" or null */
};
struct report {
    FILE *out;
    int json, depth, members; /* of the JSON object or array that is open */
    const struct column *columns;
    unsigned ncolumns;
};
void report_open(struct report *r, FILE *out, int json);
void report_text(struct report *r, const char *key, const char *text);
void report_number(struct report *r, const char *key, enum column_kind kind, double value);
void report_table(struct report *r, const char *key, const struct column *columns, unsigned n);
void report_row(struct report *r, const union cell *cells);
void report_table_end(struct report *r);
void report_close(struct report *r);
/* "64 KiB"; buf of at least 16 bytes is returned. */
char *human_size(double bytes, char *buf, size_t len);

/* ---- what a directory is mounted from ---- */

struct mount_facts {
    char type[32];     /* of the file system */
    char options[256]; /* of NFS: those that matter */
    char warning[512]; /* what is not good, or "" */
};
/* Finds the device in the text of /proc/self/mountinfo; returns whether it is there. */
int mount_look(FILE *mountinfo, dev_t dev, struct mount_facts *m);

/* Says what is wrong with a directory that is no storage backend (ucm_look.c). */
int check_backend(const char *dir);
/* A conf with the key of an integrity_key_file, or NULL: the environment's (ucm_look.c). */
int conf_with_key(const char *file, ucm_conf **conf_p);
#define KEY_OPTION(field)                                                                          \
    {                                                                                              \
        "integrity-key-file", OPT_TEXT, field, "FILE", NULL,                                       \
            "what is sealed with this key as well (or with that of UCM_INTEGRITY_KEY_FILE)"        \
    }

/* ---- storage that may not answer (ucm_patience.c) ---- */

struct asking {
    const char *dir;
    uint64_t seconds;                         /* to wait for its next answer */
    int (*run)(void *state, const char *dir); /* in a child; returns an exit status */
    void *state;
};
int ask_storage(struct asking *a);
/* Called by run: there was an answer (as ucm_inspect tells it); there will be no more questions. */
void storage_answered(void *arg);
void storage_done(void);

extern const struct verb verb_bench, verb_doctor, verb_gc, verb_ls, verb_pin, verb_rm, verb_stat,
    verb_unpin, verb_verify;

#endif

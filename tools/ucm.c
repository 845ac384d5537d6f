/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ucm - one program with verbs.  A verb is one row here and one function; its options are rows too
 * (ucm_opts.c), so help is never out of date.
 *
 * Exit status of every verb: 0 good, 1 it ran and found something bad, 2 it could not run.
 */
#include "tool.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int run_help(void *state, unsigned n, char **operands);

struct help_state {
    int markdown;
};
static const struct opt help_opts[] = {
    {"markdown", OPT_FLAG, offsetof(struct help_state, markdown), NULL, NULL,
     "with `options`: as docs/options.md has it"},
    {NULL},
};

static const struct verb verb_help = {
    .name = "help",
    .operands = "[VERB|options]",
    .help = "explain a verb, or list every option there is",
    .about =
        "`ucm help` lists the verbs, `ucm help VERB` explains one, `ucm help options` shows every "
        "option of the configuration, grouped by the part that reads it.",
    .opts = help_opts,
    .size = sizeof(struct help_state),
    .max_operands = 1,
    .run = run_help,
};

static const struct verb verb_plan = {
    .name = "plan",
    .operands = "[options]",
    .help = "how many engines and what storage a load needs",
    .about =
        "A model of them answers, which is the Python module ucm.plan: `ucm plan --help` lists "
        "its options, docs/planning.md explains it.",
};
static const struct verb *const verbs[] = {
    &verb_bench, &verb_ls, &verb_stat,   &verb_verify, &verb_rm,   &verb_pin,
    &verb_unpin, &verb_gc, &verb_doctor, &verb_plan,   &verb_help,
};

static const struct verb *find_verb(const char *name)
{
    for (size_t i = 0; i < COUNT_OF(verbs); i++)
        if (!strcmp(verbs[i]->name, name))
            return verbs[i];
    return NULL;
}

static int no_such_verb(const char *name)
{
    const char *names[COUNT_OF(verbs)];

    for (size_t i = 0; i < COUNT_OF(verbs); i++)
        names[i] = verbs[i]->name;
    const char *near = nearest_word(name, names, COUNT_OF(verbs));
    if (near)
        return cannot("no verb \"%s\"; did you mean `ucm %s`?", name, near);
    return cannot("no verb \"%s\"; see `ucm help`", name);
}

static void overview(FILE *out)
{
    fputs("usage: ucm VERB [options] ...\n\n", out);
    for (size_t i = 0; i < COUNT_OF(verbs); i++)
        fprintf(out, "  %-8s %s\n", verbs[i]->name, verbs[i]->help);
    fputs("\n`ucm help VERB` explains one; `ucm --version` says which this is.\n"
          "Exit status: 0 good, 1 something bad was found, 2 could not run.\n",
          out);
}

/* ---- help options ---- */

struct shown {
    char owner[32]; /* whose options were shown last */
    int markdown;
};

/* A cell of a markdown table; an unmasked bar would end it. */
static void print_cell(const char *text)
{
    fputs(" ", stdout);
    for (const char *p = text && *text ? text : "-"; *p; p++)
        printf("%s%c", *p == '|' ? "\\" : "", *p);
    fputs(" |", stdout);
}

static void show_heading(struct shown *s, const struct ucm_option_info *o)
{
    snprintf(s->owner, sizeof s->owner, "%s", o->owner);
    if (!s->markdown)
        printf("\n%s%s\n", o->owner, o->obsolete ? " (accepted, without effect)" : "");
    else if (o->obsolete)
        printf("\n## Accepted, without effect\n\n| option | why |\n|---|---|\n");
    else
        printf("\n## %s\n\n| option | type | default | range | what it does |\n"
               "|---|---|---|---|---|\n",
               o->owner);
}

static void show_option(void *arg, const struct ucm_option_info *o)
{
    struct shown *s = arg;
    int ranged = o->range && *o->range;

    if (strcmp(s->owner, o->owner))
        show_heading(s, o);
    if (s->markdown) {
        printf("| `%s` |", o->name);
        if (!o->obsolete) {
            print_cell(o->type);
            print_cell(o->def);
            print_cell(o->range);
        }
        print_cell(o->help);
        puts("");
        return;
    }
    printf("  %s", o->name);
    if (!o->obsolete)
        printf("  (%s, default %s%s%s)", o->type, o->def && *o->def ? o->def : "none",
               ranged ? ", " : "", ranged ? o->range : "");
    fputs("\n      ", stdout);
    print_wrapped(stdout, o->help, 6, 6);
}

static int help_options(int markdown)
{
    struct shown s = {.markdown = markdown};

    if (markdown)
        puts("# Options\n\n"
             "Written by `ucm help options --markdown` from the tables the code reads; do not "
             "edit.\n"
             "Each can be given in the YAML file, by `key=value`, or in the environment as\n"
             "`UCM_` and the name in capitals (the last wins). `-`: none.");
    else
        puts("Each can be given in the YAML file, or in the environment as UCM_ and the name in "
             "capitals.");
    ucm_options(NULL, show_option, &s);
    return TOOL_GOOD;
}

static int run_help(void *state, unsigned n, char **operands)
{
    const struct help_state *h = state;

    if (!n) {
        overview(stdout);
        return TOOL_GOOD;
    }
    if (!strcmp(operands[0], "options"))
        return help_options(h->markdown);
    const struct verb *v = find_verb(operands[0]);
    if (!v)
        return no_such_verb(operands[0]);
    opts_help(v, stdout);
    return TOOL_GOOD;
}

/* ---- plan ---- */

static const char plan_program[] =
    "import sys\n"
    "try:\n"
    "    from ucm.plan import main\n"
    "except ImportError as e:\n"
    "    print(f'ucm: plan needs the Python package ucm, which {sys.executable} has not ({e}); '\n"
    "          'pip install . in its tree', file=sys.stderr)\n"
    "    sys.exit(2)\n"
    "sys.exit(main())\n";

/* By the Python beside this program, where pip has put both, or else that of PATH. */
static int run_plan(int argc, char **argv)
{
    char beside[4096];
    ssize_t n = readlink("/proc/self/exe", beside, sizeof beside - sizeof "python3");
    char *slash = n > 0 ? memrchr(beside, '/', (size_t)n) : NULL;
    char **words = calloc((size_t)argc + 4, sizeof *words);

    if (!words)
        return cannot("out of memory");
    words[0] = "python3";
    if (slash) {
        strcpy(slash + 1, "python3");
        if (access(beside, X_OK) == 0)
            words[0] = beside;
    }
    words[1] = "-Pc"; /* nothing from the directory one stands in */
    words[2] = (char *)plan_program;
    for (int i = 0; i < argc; i++)
        words[3 + i] = argv[i];
    execvp(words[0], words);
    free(words);
    return cannot("plan needs Python: python3: %m");
}

static int run_verb(const struct verb *v, int argc, char **argv)
{
    void *state = calloc(1, v->size);
    if (!state)
        return cannot("out of memory");
    int status = TOOL_CANNOT, first = opts_parse(v, state, argc, argv);
    if (first == 0) {
        opts_help(v, stdout);
        status = TOOL_GOOD;
    } else if (first > 0) {
        status = v->run(state, (unsigned)(argc - first), argv + first);
    }
    free(state);
    if (fflush(stdout) || ferror(stdout))
        return cannot("standard output: %m");
    return status;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        overview(stderr);
        return TOOL_CANNOT;
    }
    if (!getenv("UC_LOGGER_LEVEL")) /* what a library says in passing is noise here */
        ucm_log_to(NULL, NULL, UCM_WARN);
    const char *word = argv[1];
    if (!strcmp(word, "--version")) {
        printf("ucm %s\n", ucm_version());
        return TOOL_GOOD;
    }
    if (!strcmp(word, "--help") || !strcmp(word, "-h"))
        word = "help";
    const struct verb *v = find_verb(word);
    if (v == &verb_plan)
        return run_plan(argc - 2, argv + 2);
    return v ? run_verb(v, argc - 1, argv + 1) : no_such_verb(word);
}

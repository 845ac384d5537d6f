/* SPDX-License-Identifier: Apache-2.0 */
/*
 * conf.c - the options of a set of plugins and the values someone gave them.
 *
 * The option tables of the plugins are the only source: what is not in a table does not exist, what
 * a table says is what is checked, shown and documented.  A call stages its changes first and
 * commits them only when all are right, so one that fails changes nothing.  A conf belongs to one
 * thread at a time; several may read it.
 */
#include "base/conf.h"

#include <ctype.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_MAX = 1 << 20, WORD_MAX = 64, SHOWN_MAX = 80 };

struct entry {
    const struct ucm_option *opt;
    char *owner; /* names of the plugins that read it: "Cache, Posix" */
    char *text;  /* NULL: the default */
    char *range;
    bool warned; /* that it has no effect */
};
struct ucm_conf {
    struct entry *v;
    size_t n;
    const char **words; /* the keys, for ucmi_nearest */
    char why[1024];
};

/* ---- changes: checked one by one, then made together ---- */

struct change {
    struct entry *e;
    char *text; /* NULL: back to the default */
    char *origin;
};
struct batch {
    ucm_conf *conf;
    const char *path; /* of the file being read */
    struct change *v;
    size_t n, cap;
};

static void batch_drop(struct batch *b)
{
    for (size_t i = 0; i < b->n; i++) {
        free(b->v[i].text);
        free(b->v[i].origin);
    }
    free(b->v);
}

/* Said once: a key is no use for anything. */
static void warn_idle(struct entry *e, const char *origin)
{
    const struct ucm_option *o = e->opt;
    if (e->warned || !e->text || o->type != UCM_T_OBSOLETE)
        return;
    ucmi_log(UCM_WARN, "options", "%s: has no effect any more (%s): %s", o->name, origin, o->help);
    e->warned = true;
}

static void batch_commit(struct batch *b)
{
    for (size_t i = 0; i < b->n; i++) {
        struct entry *e = b->v[i].e;
        free(e->text);
        e->text = b->v[i].text;
        b->v[i].text = NULL;
        warn_idle(e, b->v[i].origin);
    }
    batch_drop(b);
}

int ucmi_conf_fail(ucm_conf *conf, int err, const char *fmt, ...)
{
    if (!conf)
        return err;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(conf->why, sizeof conf->why, fmt, ap);
    va_end(ap);
    ucmi_scrub(conf->why);
    return err;
}

static struct entry *find(const ucm_conf *conf, const char *key)
{
    for (size_t i = 0; i < conf->n; i++)
        if (strcmp(conf->v[i].opt->name, key) == 0)
            return &conf->v[i];
    return NULL;
}

static int unknown(ucm_conf *conf, const char *key, const char *origin)
{
    const char *near = ucmi_nearest(key, conf->words);
    return ucmi_conf_fail(conf, -EINVAL, "%.*s: no such option (%s); %s%s%s", SHOWN_MAX, key,
                          origin, near ? "did you mean " : "`ucm help options` lists all there are",
                          near ? near : "", near ? "?" : "");
}

/* Checks one change and adds it.  value NULL: the default.  origin: "example.yaml:7", "set by ..."
 */
static int batch_add(struct batch *b, const char *key, const char *value, const char *origin)
{
    ucm_conf *conf = b->conf;
    struct entry *e = find(conf, key);
    if (!e)
        return unknown(conf, key, origin);
    for (size_t i = 0; i < b->n; i++)
        if (b->v[i].e == e)
            return ucmi_conf_fail(conf, -EINVAL, "%s: given twice (%s and %s); keep one", key,
                                  b->v[i].origin, origin);
    struct ucmi_value v = {0};
    const char *wrong;
    if (value && ucmi_option_parse(e->opt, value, &v, &wrong) < 0) {
        char remedy[256];
        ucmi_option_remedy(e->opt, remedy, sizeof remedy);
        return ucmi_conf_fail(conf, -EINVAL, "%s: \"%.*s\" %s (%s); %s", key, SHOWN_MAX, value,
                              wrong, origin, remedy);
    }
    if (b->n == b->cap) {
        size_t cap = b->cap ? 2 * b->cap : 16;
        struct change *more = realloc(b->v, cap * sizeof *more);
        if (!more)
            return ucmi_conf_fail(conf, -ENOMEM, "%s: out of memory (%s)", key, origin);
        b->v = more;
        b->cap = cap;
    }
    struct change c = {.e = e, .text = value ? strdup(v.text) : NULL, .origin = strdup(origin)};
    b->v[b->n++] = c;
    if ((value && !c.text) || !c.origin)
        return ucmi_conf_fail(conf, -ENOMEM, "%s: out of memory (%s)", key, origin);
    return 0;
}

static int batch_end(struct batch *b, int err)
{
    if (err)
        batch_drop(b);
    else
        batch_commit(b);
    return err;
}

/* ---- making one ---- */

/* A table that does not agree with itself or another is a mistake of a programmer: said in the log.
 */
static int add_option(ucm_conf *conf, const struct ucm_plugin *p, const struct ucm_option *o)
{
    struct ucmi_value v;
    const char *wrong = "";
    char range[256];
    struct entry *e = find(conf, o->name);
    if (e) {
        char *owner = NULL;
        if (!ucmi_option_same(e->opt, o)) {
            ucmi_log(UCM_ERROR, "options", "%s: %s and %s do not agree on it", o->name, e->owner,
                     p->name);
            return -EINVAL;
        }
        if (asprintf(&owner, "%s, %s", e->owner, p->name) < 0)
            return -ENOMEM;
        free(e->owner);
        e->owner = owner;
        return 0;
    }
    if (!o->def || ucmi_option_parse(o, o->def, &v, &wrong) < 0) {
        ucmi_log(UCM_ERROR, "options", "%s of %s: its default \"%s\" %s", o->name, p->name,
                 o->def ? o->def : "", o->def ? wrong : "is missing");
        return -EINVAL;
    }
    ucmi_option_range(o, range, sizeof range);
    e = &conf->v[conf->n];
    *e = (struct entry){.opt = o, .owner = strdup(p->name), .range = strdup(range)};
    conf->words[conf->n++] = o->name;
    return e->owner && e->range ? 0 : -ENOMEM;
}

int ucmi_conf_new(const struct ucm_plugin *const *plugins, ucm_conf **conf_p)
{
    size_t n = 0;
    if (!conf_p)
        return -EINVAL;
    for (const struct ucm_plugin *const *p = plugins; *p; p++)
        for (const struct ucm_option *o = (*p)->options; o && o->name; o++)
            n++;
    ucm_conf *conf = calloc(1, sizeof *conf);
    if (!conf)
        return -ENOMEM;
    conf->v = calloc(n + 1, sizeof *conf->v);
    conf->words = calloc(n + 1, sizeof *conf->words);
    int err = conf->v && conf->words ? 0 : -ENOMEM;
    for (const struct ucm_plugin *const *p = plugins; *p && !err; p++)
        for (const struct ucm_option *o = (*p)->options; o && o->name && !err; o++)
            err = add_option(conf, *p, o);
    if (err)
        ucm_conf_free(conf);
    else
        *conf_p = conf;
    return err;
}

void ucm_conf_free(ucm_conf *conf)
{
    if (!conf)
        return;
    for (size_t i = 0; i < conf->n; i++) {
        free(conf->v[i].owner);
        free(conf->v[i].text);
        free(conf->v[i].range);
    }
    free(conf->v);
    free(conf->words);
    free(conf);
}

/* ---- reading it ---- */

static const char *value_of(const struct entry *e)
{
    return e->text ? e->text : e->opt->def;
}

const char *ucm_conf_get(const ucm_conf *conf, const char *key)
{
    const struct entry *e = find(conf, key);
    return e ? value_of(e) : NULL;
}

const char *ucm_conf_error(const ucm_conf *conf)
{
    return conf->why;
}

void ucmi_conf_visit(const ucm_conf *conf, ucm_option_fn *fn, void *arg)
{
    for (size_t i = 0; i < conf->n; i++) {
        const struct entry *e = &conf->v[i];
        const struct ucm_option_info info = {
            .owner = e->owner,
            .name = e->opt->name,
            .type = ucmi_option_type(e->opt),
            .value = value_of(e),
            .def = e->opt->def,
            .range = e->range,
            .help = e->opt->help ? e->opt->help : "",
            .obsolete = e->opt->type == UCM_T_OBSOLETE,
            .given = e->text != NULL,
        };
        fn(arg, &info);
    }
}

/* ---- giving values: one, a file, the environment ---- */

int ucm_conf_set(ucm_conf *conf, const char *key, const char *value)
{
    if (!conf)
        return -EINVAL;
    if (!key || !value)
        return ucmi_conf_fail(conf, -EINVAL, "%s: no value (given by the caller); give one",
                              key ? key : "an option without a name");
    struct batch b = {.conf = conf};
    return batch_end(&b, batch_add(&b, key, value, "given by the caller"));
}

static int add_pair(void *arg, const struct ucmi_yaml_pair *pair)
{
    struct batch *b = arg;
    char origin[512];
    snprintf(origin, sizeof origin, "%.480s:%u", b->path, pair->line);
    const struct entry *e = find(b->conf, pair->key);
    if (e && pair->kind == UCMI_YAML_MAP)
        return ucmi_conf_fail(b->conf, -EINVAL,
                              "%s: a mapping is no value for it (%s); give one value", pair->key,
                              origin);
    /* Of the options, only the backends are several things; old files hold lists that mean nothing.
     */
    if (e && pair->kind == UCMI_YAML_LIST && e->opt->type != UCM_T_OBSOLETE &&
        strcmp(pair->key, "storage_backends") != 0)
        return ucmi_conf_fail(b->conf, -EINVAL,
                              "%s: a list is no value for it (%s); give one value", pair->key,
                              origin);
    return batch_add(b, pair->key, pair->value, origin);
}

static int read_file(ucm_conf *conf, const char *path, char **text_p, size_t *len_p)
{
    char *text = NULL;
    size_t len = 0;
    struct stat st;
    int err = 0;
    /* Not blocking: a path may name a pipe nobody writes to. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) < 0) {
        err = -errno;
        ucmi_conf_fail(conf, err, "%s: cannot be read: %s; check the path", path,
                       strerrordesc_np(-err));
    } else if (!S_ISREG(st.st_mode)) {
        err =
            ucmi_conf_fail(conf, -EINVAL, "%s: is not a file; give the path of a YAML file", path);
    } else if (st.st_size > FILE_MAX) {
        err = ucmi_conf_fail(conf, -EINVAL, "%s: is larger than %d KiB; is it a configuration?",
                             path, FILE_MAX >> 10);
    } else if (!(text = malloc(FILE_MAX))) {
        err = ucmi_conf_fail(conf, -ENOMEM, "%s: out of memory", path);
    }
    while (!err && len < FILE_MAX) {
        ssize_t n = read(fd, text + len, FILE_MAX - len);
        if (n < 0 && errno != EINTR) {
            err = -errno;
            ucmi_conf_fail(conf, err, "%s: cannot be read: %s", path, strerrordesc_np(-err));
        } else if (n == 0) {
            break;
        } else if (n > 0) {
            len += (size_t)n;
        }
    }
    if (fd >= 0)
        close(fd);
    if (err) {
        free(text);
        return err;
    }
    *text_p = text;
    *len_p = len;
    return 0;
}

int ucm_conf_load(ucm_conf *conf, const char *path)
{
    if (!conf || !path)
        return ucmi_conf_fail(conf, -EINVAL,
                              "no path (given by the caller); give that of a YAML file");
    char *text, why[sizeof conf->why] = "";
    size_t len;
    int err = read_file(conf, path, &text, &len);
    if (err)
        return err;
    struct batch b = {.conf = conf, .path = path};
    err = ucmi_yaml_pairs(path, text, len, add_pair, &b, why, sizeof why);
    if (err && why[0])
        ucmi_conf_fail(conf, err, "%s", why);
    free(text);
    return batch_end(&b, err);
}

/* The other case of the first len letters, and a final zero; to: toupper or tolower. */
static void recase(char *out, const char *in, size_t len, int (*to)(int))
{
    size_t i = 0;
    for (; i < len && in[i]; i++)
        out[i] = (char)to((unsigned char)in[i]);
    out[i] = '\0';
}

/* UCM_ variables that are no option: other programs have such, but one that is almost an option is
 * said to be none. */
static void warn_of_strangers(ucm_conf *conf)
{
    for (char **p = environ; p && *p; p++) {
        char key[WORD_MAX], better[WORD_MAX];
        size_t len = strcspn(*p, "=");
        if (strncmp(*p, "UCM_", 4) != 0 || strncmp(*p, "UCM_LOG_", 8) == 0 ||
            strncmp(*p, "UCM_CONFIG_FILE=", 16) == 0 || len - 4 >= sizeof key)
            continue;
        recase(key, *p + 4, len - 4, tolower);
        const char *near = find(conf, key) ? NULL : ucmi_nearest(key, conf->words);
        if (!near)
            continue;
        recase(better, near, sizeof better - 1, toupper);
        ucmi_log(UCM_WARN, "options", "%.*s in the environment is no option; did you mean UCM_%s?",
                 (int)len, *p, better);
    }
}

int ucm_conf_env(ucm_conf *conf)
{
    if (!conf)
        return -EINVAL;
    struct batch b = {.conf = conf};
    int err = 0;
    for (size_t i = 0; i < conf->n && !err; i++) {
        const char *name = conf->v[i].opt->name;
        char variable[WORD_MAX + 4] = "UCM_", origin[WORD_MAX + 16];
        recase(variable + 4, name, WORD_MAX - 1, toupper);
        snprintf(origin, sizeof origin, "set by %s", variable);
        const char *value = getenv(variable);
        if (value)
            err = batch_add(&b, name, value, origin);
    }
    if (!err)
        warn_of_strangers(conf);
    return batch_end(&b, err);
}

/* ---- plugins ---- */

int ucmi_plugin_new(const struct ucm_plugin *plugin, const ucm_conf *conf, void **state_p)
{
    void *state = calloc(1, MAX(plugin->size, 1));
    int err = state ? 0 : -ENOMEM;
    for (const struct ucm_option *o = plugin->options; o && o->name && plugin->size && !err; o++) {
        const char *text = conf ? ucm_conf_get(conf, o->name) : NULL;
        err = ucmi_option_store(o, text ? text : o->def, state);
    }
    if (err)
        ucmi_plugin_free(plugin, state);
    else
        *state_p = state;
    return err;
}

void ucmi_plugin_free(const struct ucm_plugin *plugin, void *state)
{
    if (!state)
        return;
    for (const struct ucm_option *o = plugin->options; o && o->name && plugin->size; o++) {
        if (o->type != UCM_T_STR)
            continue;
        char *text;
        memcpy(&text, (char *)state + o->offset, sizeof text);
        free(text);
    }
    free(state);
}

/* ---- the nearest word ---- */

static char fold(char c)
{
    return c == '-' ? '_' : (char)tolower((unsigned char)c);
}

/* Letters to add, drop, change, or swap with their neighbour, to make b of a; both shorter than
 * WORD_MAX. */
static unsigned distance(const char *a, const char *b)
{
    unsigned rows[3][WORD_MAX + 1];
    unsigned *before = rows[0], *last = rows[1], *now = rows[2];
    size_t n = strlen(b);
    for (size_t j = 0; j <= n; j++)
        last[j] = (unsigned)j;
    for (size_t i = 1; a[i - 1]; i++) {
        now[0] = (unsigned)i;
        for (size_t j = 1; j <= n; j++) {
            bool same = fold(a[i - 1]) == fold(b[j - 1]);
            now[j] = MIN(MIN(last[j] + 1, now[j - 1] + 1), last[j - 1] + !same);
            if (i > 1 && j > 1 && fold(a[i - 1]) == fold(b[j - 2]) &&
                fold(a[i - 2]) == fold(b[j - 1]))
                now[j] = MIN(now[j], before[j - 2] + 1);
        }
        unsigned *spare = before;
        before = last;
        last = now;
        now = spare;
    }
    return last[n];
}

const char *ucmi_nearest(const char *given, const char *const *words)
{
    size_t len = strlen(given);
    if (len < 3 || len >= WORD_MAX)
        return NULL;
    unsigned best = MAX((unsigned)len / 4, 1) + 1; /* a quarter of the letters may differ */
    const char *nearest = NULL, *part = NULL;
    for (; *words; words++) {
        if (strlen(*words) >= WORD_MAX)
            continue;
        unsigned d = distance(given, *words);
        if (d < best) {
            best = d;
            nearest = *words;
        }
        if (len >= 6 && !part && strcasestr(*words, given)) /* "capacity_gb" */
            part = *words;
    }
    return nearest ? nearest : part;
}

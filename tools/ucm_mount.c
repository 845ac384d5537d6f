/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a directory is mounted from, and what of that is not good for a storage backend: the kernel
 * tells in mountinfo (man 5 proc).
 */
#include "tool.h"

#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>

/* The word of a list by commas that is `name`, or begins with it where that ends in '='. */
static const char *find_word(const char *list, const char *name)
{
    size_t len = strlen(name);
    int prefix = len && name[len - 1] == '=';

    for (const char *p = list; *p; p += strcspn(p, ","), p += *p == ',')
        if (!strncmp(p, name, len) && (prefix || p[len] == ',' || !p[len]))
            return p;
    return NULL;
}

static void keep_words(struct mount_facts *m, const char *options)
{
    static const char *const words[] = {"vers=",       "hard", "soft",  "softerr",     "nolock",
                                        "local_lock=", "noac", "nocto", "lookupcache="};
    size_t len = 0;

    for (size_t i = 0; i < COUNT_OF(words); i++) {
        const char *p = find_word(options, words[i]);
        if (p && len < sizeof m->options)
            len += (size_t)snprintf(m->options + len, sizeof m->options - len, "%s%.*s",
                                    len ? "," : "", (int)strcspn(p, ","), p);
    }
}

static int is_any(const char *type, const char *const *types, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!strncmp(type, types[i], strlen(types[i])))
            return 1;
    return 0;
}

/* What others have stored is then found when caches expire, for nothing here knows how to ask. */
static const char *judge_type(const char *type)
{
    static const char *const cached[] = {"fuse.", "cifs", "smb3", "9p", "afs"};
    return is_any(type, cached, COUNT_OF(cached)) ? "this file system may answer from a cache of "
                                                    "this node: use it from one node only, "
                                                    "or expect the blocks of others late"
                                                  : NULL;
}

static const char *judge_locks(const char *options)
{
    const char *local = find_word(options, "local_lock=");
    if (!find_word(options, "nolock") && (!local || !strncmp(local, "local_lock=none", 15) ||
                                          !strncmp(local, "local_lock=flock", 16)))
        return NULL;
    return "locks are local to this node (nolock, local_lock): a lane whose owner is silent for a "
           "minute is taken though it lives, and costs it the blocks on their way; mount with "
           "locks";
}

static void judge(struct mount_facts *m, const char *mount_options, const char *options)
{
    int nfs = !strncmp(m->type, "nfs", 3);
    const char *bad[] = {
        judge_type(m->type),
        nfs ? judge_locks(options) : NULL,
        nfs && find_word(options, "vers=2") ? "NFS v2 is not tested; mount with vers=4.2" : NULL,
        find_word(mount_options, "ro") || find_word(options, "ro")
            ? "read-only: blocks can be loaded, dumps are dropped"
            : NULL,
    };
    size_t len = 0;

    if (nfs)
        keep_words(m, options);
    for (size_t i = 0; i < COUNT_OF(bad); i++)
        if (bad[i] && len < sizeof m->warning)
            len += (size_t)snprintf(m->warning + len, sizeof m->warning - len, "%s%s",
                                    len ? "; " : "", bad[i]);
}

int mount_look(FILE *mountinfo, dev_t dev, struct mount_facts *m)
{
    char *line = NULL;
    size_t size = 0;
    int found = 0;

    memset(m, 0, sizeof *m);
    while (!found && getline(&line, &size, mountinfo) > 0) {
        unsigned major, minor;
        char mount_options[1024], options[2048];
        const char *rest = strstr(line, " - ");
        found = rest &&
                sscanf(line, "%*u %*u %u:%u %*s %*s %1023s", &major, &minor, mount_options) == 3 &&
                makedev(major, minor) == dev &&
                sscanf(rest, " - %31s %*s %2047s", m->type, options) == 2;
        if (found)
            judge(m, mount_options, options);
    }
    free(line);
    return found;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The directories above the lanes, <backend>/ucm/<namespace>, and namespace.json, which says in
 * plain words what the digest in the directory's name stands for.  Nothing but people and `ucm ls`
 * reads it.
 */
#include "store/posix.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static void put_json(FILE *f, const char *s)
{
    putc('"', f);
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\')
            fprintf(f, "\\%c", c);
        else if (c < 0x20)
            fprintf(f, "\\u%04x", c);
        else
            putc(c, f);
    }
    putc('"', f);
}

static char *describe(const struct ucm_geometry *geo, size_t *len)
{
    char *text = NULL;
    FILE *f = open_memstream(&text, len);
    if (!f)
        return NULL;
    fprintf(f, "{\n  \"format\": %d,\n  \"namespace\": ", UCMI_FORMAT);
    put_json(f, geo->ns_text ? geo->ns_text : "");
    fprintf(f,
            ",\n  \"block_size\": %" PRIu64 ",\n  \"shard_size\": %" PRIu64
            ",\n  \"ranks\": %" PRIu32 "\n}\n",
            geo->block_size, geo->shard_size, geo->ranks);
    if (fclose(f) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

/* All processes of a namespace would write the same, so it does not matter who is first, nor
 * whether a thread of another host takes the same name for it. */
static int write_json(struct ucmi_posix *p, int ns)
{
    struct stat st;
    size_t len;
    if (fstatat(ns, "namespace.json", &st, AT_SYMLINK_NOFOLLOW) == 0)
        return 0;
    char temp[64], *text = describe(p->geo, &len);
    if (!text)
        return -ENOMEM;
    snprintf(temp, sizeof temp, ".namespace.%d.%d", (int)getpid(), (int)gettid());
    ucmi_file_remove(p, ns, temp, 0); /* what a process that was killed has left */
    int fd = ucmi_file_open(p, ns, temp, O_WRONLY | O_CREAT | O_EXCL);
    int err = fd < 0 ? fd : ucmi_pump_write(p, fd, text, len, 0);
    ucmi_file_close(p, fd);
    free(text);
    if (!err)
        err = ucmi_file_rename(p, ns, temp, "namespace.json");
    if (fd >= 0 && err)
        ucmi_file_remove(p, ns, temp, 0);
    if (err == -EEXIST) /* that thread writes it just now */
        return 0;
    return err == -ENOENT && fstatat(ns, "namespace.json", &st, AT_SYMLINK_NOFOLLOW) == 0 ? 0 : err;
}

static int open_dir(struct ucmi_posix *p, int at, const char *name, bool create)
{
    int err = 0;
    ucmi_dir_renew(p, at);
    if (create)
        err = ucmi_io_file(
            &p->io,
            &(struct ucm_file){.op = UCM_FILE_MKDIR, .dirfd = at, .path = name, .mode = 0777});
    if (create && !err)
        err = ucmi_dir_sync(p, at);
    int fd = ucmi_file_open(p, at, name, O_RDONLY | O_DIRECTORY);
    return fd == -ENOENT && err < 0 && err != -EEXIST ? err : fd;
}

static bool there(const struct ucmi_posix *p, int fd)
{
    struct stat st;
    return fd >= 0 && ucmi_file_stat(p, fd, &st) == 0 && st.st_nlink > 0;
}

static int open_root(struct ucmi_posix *p, bool create)
{
    if (there(p, p->root_fd))
        return 0;
    int at = ucmi_file_open(p, AT_FDCWD, p->path, O_RDONLY | O_DIRECTORY);
    int fd = at < 0 ? at : open_dir(p, at, "ucm", create);
    ucmi_file_close(p, at);
    if (fd < 0)
        return fd;
    ucmi_file_close(p, p->root_fd);
    p->root_fd = fd;
    return 0;
}

int ucmi_ns_open(struct ucmi_posix *p, bool create)
{
    int err = open_root(p, create);
    int fd = err < 0              ? err
             : there(p, p->ns_fd) ? p->ns_fd
                                  : open_dir(p, p->root_fd, p->ns_name, create);
    if (fd < 0)
        return fd;
    if (create)
        err = write_json(p, fd);
    int old = p->ns_fd;
    if (fd == old)
        return err;
    pthread_rwlock_wrlock(&p->lock); /* lookups look at it */
    p->ns_fd = fd;
    pthread_rwlock_unlock(&p->lock);
    ucmi_file_close(p, old);
    atomic_store(&p->ns_stamp, 0);
    return err;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Files and directories below a backend: what is opened there, and what network file systems have
 * to be told.  Run by the pump, but for ucmi_file_stat.
 */
#include "store/posix.h"

#include <fcntl.h>
#include <unistd.h>

void ucmi_file_close(struct ucmi_posix *p, int fd)
{
    if (fd >= 0)
        ucmi_io_file(&p->io, &(struct ucm_file){.op = UCM_FILE_CLOSE, .fd = fd});
}

int ucmi_file_remove(struct ucmi_posix *p, int dir, const char *name, int flags)
{
    return ucmi_io_file(
        &p->io,
        &(struct ucm_file){.op = UCM_FILE_UNLINK, .dirfd = dir, .path = name, .flags = flags});
}

int ucmi_file_rename(struct ucmi_posix *p, int dir, const char *from, const char *to)
{
    return ucmi_io_file(
        &p->io, &(struct ucm_file){.op = UCM_FILE_RENAME, .dirfd = dir, .path = from, .path2 = to});
}

/* Others may write to the directory, and put anything there.  Only the path the user gave is
 * followed through links; no FIFO or device is waited for; what is no regular file is not there to
 * be read or written. */
static int open_regular(struct ucmi_posix *p, struct ucm_file *f)
{
    const int flags = f->flags;
    struct stat st;
    f->flags |= O_NONBLOCK;
    int fd = ucmi_io_file(&p->io, f);
    /* A FIFO cannot be opened for O_DIRECT: that says nothing about the file system. */
    if (fd == -EINVAL && fstatat(f->dirfd, f->path, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
        !S_ISREG(st.st_mode))
        return -ELOOP;
    if (fd < 0)
        return fd;
    int err = fstat(fd, &st) < 0 ? -errno : S_ISREG(st.st_mode) ? 0 : -ELOOP;
    /* Engines take O_NONBLOCK for a wish not to wait for the disk. */
    if (!err && fcntl(fd, F_SETFL, flags) < 0)
        err = -errno;
    if (err < 0)
        ucmi_file_close(p, fd);
    return err < 0 ? err : fd;
}

int ucmi_file_open(struct ucmi_posix *p, int dir, const char *path, int flags)
{
    static struct ucmi_log_gate gate;
    struct ucm_file f = {.op = UCM_FILE_OPEN,
                         .dirfd = dir,
                         .path = path,
                         .flags = flags | O_CLOEXEC | O_NOCTTY,
                         .mode = 0666};
    if (dir != AT_FDCWD)
        f.flags |= O_NOFOLLOW;
    if (flags & O_DIRECTORY)
        return ucmi_io_file(&p->io, &f);
    int fd = open_regular(p, &f);
    if (fd == -ELOOP)
        ucmi_log_gated(&gate, 60, UCM_WARN, p->object,
                       "%s somewhere in it is a link or no regular file: left alone", path);
    return fd;
}

/* A network file system answers from what it knew some seconds ago, unless it is told not to.
 * Asking for a directory like that also makes it doubt the names it has looked up there, those that
 * were not there among them. */
int ucmi_file_stat(const struct ucmi_posix *p, int fd, struct stat *st)
{
    struct statx now;
    if (p->network && statx(fd, "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_MTIME, &now) < 0)
        return -errno;
    return fstat(fd, st) < 0 ? -errno : 0;
}

void ucmi_dir_renew(const struct ucmi_posix *p, int dir)
{
    struct stat st;
    if (p->network)
        ucmi_file_stat(p, dir, &st); /* if it is gone, who uses it will find out */
}

int ucmi_dir_sync(struct ucmi_posix *p, int dir)
{
    return p->o->sync == UCMI_SYNC_FULL
               ? ucmi_io_file(&p->io, &(struct ucm_file){.op = UCM_FILE_SYNC, .fd = dir})
               : 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * file.c - the plain system calls behind struct ucm_file: changes of names and sizes.  They block,
 * are rare (one in a segment of blocks), and keep no state; any thread.
 */
#include "io/io.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILL = 1 << 20 };

/* For file systems without fallocate: appends zeros up to len.  What the file has already was
 * written by somebody, if only by us here, and is left as it is. */
static int fill(int fd, off_t size, off_t len)
{
    void *zeros;
    if (posix_memalign(&zeros, UCMI_PAGE, FILL))
        return -ENOMEM;
    memset(zeros, 0, FILL);
    int err = 0;
    while (size < len && !err) {
        ssize_t n = TEMP_FAILURE_RETRY(pwrite(fd, zeros, (size_t)MIN(len - size, FILL), size));
        if (n > 0)
            size += n;
        else
            err = n < 0 ? -errno : -EIO;
    }
    free(zeros);
    return err;
}

static int allocate(int fd, off_t len)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    int err = TEMP_FAILURE_RETRY(fallocate(fd, 0, 0, len)) < 0 ? -errno : 0;
    if (err == -EOPNOTSUPP || err == -ENOSYS)
        err = fill(fd, st.st_size, len);
    /* A part of the room would be lost to everybody; the first error is the one that counts. */
    if (err && TEMP_FAILURE_RETRY(ftruncate(fd, st.st_size)) < 0)
        ucmi_log(UCM_WARN, "io", "could not give back the room of a failed allocation: %s",
                 ucmi_file_error(-errno));
    return err;
}

int ucmi_file_plain(const struct ucm_file *f)
{
    int r;
    switch (f->op) {
    case UCM_FILE_OPEN:
        r = TEMP_FAILURE_RETRY(openat(f->dirfd, f->path, f->flags | O_CLOEXEC, f->mode));
        break;
    case UCM_FILE_CLOSE:
        r = close(f->fd);
        if (r < 0 && errno == EINTR) /* Linux has closed it all the same */
            r = 0;
        break;
    case UCM_FILE_ALLOCATE: return allocate(f->fd, f->len);
    case UCM_FILE_TRUNCATE: r = TEMP_FAILURE_RETRY(ftruncate(f->fd, f->len)); break;
    case UCM_FILE_SYNC: r = TEMP_FAILURE_RETRY(fsync(f->fd)); break;
    case UCM_FILE_RENAME: r = renameat(f->dirfd, f->path, f->dirfd, f->path2); break;
    case UCM_FILE_UNLINK: r = unlinkat(f->dirfd, f->path, f->flags); break;
    case UCM_FILE_MKDIR: r = mkdirat(f->dirfd, f->path, f->mode); break;
    default: return -EINVAL;
    }
    return r < 0 ? -errno : r;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who lives in a lane: locks, silence, signs of life.  Run by the pump.
 *
 * Whoever holds the lock on `lock` may write.  The lock dies with its process.  On network file
 * systems it may be local to a node, so a lane of another boot of another machine is taken only
 * when its journal has not changed for a minute (an owner there that has nothing to write changes
 * its time now and then), and every owner checks before it appends that the header still names it:
 * the one that took the lane last wins, the other lets go.
 */
#include "store/posix.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { SILENT_S = 60, LOCKED_SILENT_S = 600, BEAT_S = 15, TELL_NS = 100000000 };

int ucmi_lock_try(int fd)
{
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(fd, F_OFD_SETLK, &l) == 0)
        return 0;
    return errno == EACCES ? -EAGAIN : -errno;
}

/* For writing alone: whom an NFS v4 server lets read, it also lends the file (a delegation), and
 * when that node dies, who opens it next waits until the lease is over. */
int ucmi_lock_open(struct ucmi_posix *p, int dir, int flags)
{
    int fd = ucmi_file_open(p, dir, "lock", O_WRONLY | flags);
    int err = fd < 0 ? fd : ucmi_lock_try(fd);
    if (err < 0)
        ucmi_file_close(p, fd);
    return err < 0 ? err : fd;
}

/* ---- others ---- */

/* One kernel, so one table of locks.  Containers on several nodes may well share a host name. */
static bool same_kernel(const struct ucmi_posix *p, const struct ucmi_journal_header *h)
{
    return *p->boot ? strcmp(h->boot, p->boot) == 0 : strcmp(h->host, p->host) == 0;
}

/* Who else could still be writing?  The lock is ours, but may be good for this node only. */
static int silent_for(const struct ucmi_posix *p, int fd, int seconds)
{
    struct stat st;
    int err = ucmi_file_stat(p, fd, &st);
    if (err < 0)
        return err;
    return time(NULL) - st.st_mtim.tv_sec >= seconds ? 0 : -EBUSY;
}

int ucmi_lane_dead_for_sure(const struct ucmi_posix *p, const struct ucmi_journal_header *h, int fd)
{
    return same_kernel(p, h) ? 0 : silent_for(p, fd, SILENT_S);
}

int ucmi_lane_dead(struct ucmi_posix *p, int dir)
{
    struct ucmi_journal_header *h = p->read_buf;
    int fd = ucmi_file_open(p, dir, "journal", O_RDONLY);
    int err = fd < 0 ? fd : ucmi_journal_header_read(fd, h);
    if (!err)
        err = ucmi_lane_dead_for_sure(p, h, fd);
    ucmi_file_close(p, fd);
    return err == -ENOENT || err == -EBADMSG ? 0 : err;
}

/* A server of NFS v3 keeps the locks of a client that is gone until that client is up again.  So of
 * a lane that has been silent for very long the file is replaced: nobody has a lock on the new one.
 * Who comes second finds the journal's header just written.  -EAGAIN: it has not been. */
int ucmi_lane_lock_anew(struct ucmi_posix *p, const struct ucmi_lane *lane)
{
    struct ucmi_journal_header *h = p->read_buf;
    int fd = p->network ? ucmi_file_open(p, lane->dir, "journal", O_RDONLY | O_DIRECT) : -EAGAIN;
    if (fd < 0)
        return -EAGAIN;
    int err = ucmi_journal_header_read(fd, h);
    if (!err)
        err = same_kernel(p, h) ? -EAGAIN : silent_for(p, fd, LOCKED_SILENT_S);
    ucmi_file_close(p, fd);
    if (err < 0)
        return -EAGAIN;
    ucmi_log(UCM_INFO, p->object, "lane %s has a lock and no life: it gets a new lock", lane->name);
    ucmi_file_remove(p, lane->dir, "lock", 0);
    return ucmi_lock_open(p, lane->dir, O_CREAT | O_EXCL);
}

/* ---- ourselves ---- */

int ucmi_own_check(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    struct ucmi_own *own = lane->own;
    struct ucmi_journal_header *h = own->head;
    struct stat st;
    int err = ucmi_file_stat(p, lane->journal, &st);
    if (!err && st.st_nlink == 0)
        err = -ENOENT;
    if (err < 0)
        return err;
    err = ucmi_journal_header_read(lane->journal, h);
    if (err < 0)
        return err;
    if (h->owner != own->owner || h->epoch != own->tail.pos.epoch)
        return -EOWNERDEAD;
    own->sure_ns = ucmi_now_ns();
    return 0;
}

/* Who has said nothing for long, stopped perhaps, may have been taken for dead: asks before a block
 * is written where another's may lie by now. */
bool ucmi_own_sure(struct ucmi_posix *p, struct ucmi_lane *lane)
{
    if (!p->network || ucmi_now_ns() < lane->own->sure_ns + BEAT_S * UINT64_C(1000000000))
        return true;
    int err = ucmi_own_check(p, lane);
    if (err < 0)
        ucmi_own_lose(p, lane, "another process has taken it", err);
    return !err;
}

/* A server tells clients that a directory has changed by its time of change, which goes in ticks:
 * who looked at it between two changes of one tick would never hear of the second.  So there is one
 * more change, a little later. */
void ucmi_own_tell(struct ucmi_posix *p)
{
    if (p->network)
        p->tell_ns = ucmi_now_ns() + TELL_NS;
}

/* Tells other nodes, which may not see our locks, that somebody lives here, and what is new. */
uint64_t ucmi_own_beat(struct ucmi_posix *p)
{
    uint64_t now = ucmi_now_ns();
    if (!p->network || !p->nown)
        return UINT64_MAX;
    if (p->tell_ns && now >= p->tell_ns) {
        futimens(p->ns_fd, NULL); /* not ours to change: then its maker does */
        for (unsigned i = 0; i < p->nown; i++)
            futimens(p->own[i]->dir, NULL);
        p->tell_ns = 0;
    }
    if (now >= p->beat_ns) {
        for (unsigned i = 0; i < p->nown; i++)
            futimens(p->own[i]->journal, NULL); /* where it fails the next append will tell */
        p->beat_ns = now + BEAT_S * UINT64_C(1000000000);
        if (ucmi_ns_changed(p))
            ucmi_news_ask(p);
        return now; /* somebody may want something of us */
    }
    return p->tell_ns ? MIN(p->beat_ns, p->tell_ns) : p->beat_ns;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ucm_inspect: what a storage backend holds, read from the journals, with each block read and
 * checked on request.  Needs no store and changes nothing; engines may be running.
 *
 * Of a live lane it sees one moment or another.  A block that seems damaged is looked for once more
 * in the journal before it is called so: its slot may have gone to another in the meantime.
 */
#include "store/lane.h"
#include "store/table.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum { READ_BUF = 1 << 20 };

struct inspection {
    const struct ucm_inspect *how;
    struct ucm_lane_info info;
    int dir;
    void *buf; /* READ_BUF */
    struct ucmi_journal_header *head;
    struct ucmi_key key;
    struct ucmi_seal seal;
    uint8_t *block; /* header and block of this lane; NULL: none was read */
    struct ucmi_table table;
};

int ucmi_open_below(int dir, const char *name)
{
    struct stat st;
    int fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    int err = fd < 0 || fstat(fd, &st) < 0 ? -errno : S_ISREG(st.st_mode) ? 0 : -ELOOP;
    if (err && fd >= 0)
        close(fd);
    return err ? err : fd;
}

static void answered(const struct inspection *in)
{
    if (in->how->answered)
        in->how->answered(in->how->arg);
}

static int open_dir(int at, const char *name)
{
    int fd = openat(at, name, O_RDONLY | O_NOFOLLOW | O_DIRECTORY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

static int read_journal(struct inspection *in, struct ucmi_table *t)
{
    *t = (struct ucmi_table){.ns = in->info.ns, .given = &in->seal};
    int err = ucmi_table_read(t, in->dir, in->head, in->buf, READ_BUF);
    answered(in);
    return err;
}

/* ---- blocks ---- */

/* For the first block that can be there at all: the file is long enough. */
static int find_room(struct inspection *in, int fd, uint64_t end)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    if ((uint64_t)st.st_size < end)
        return -EBADMSG;
    if (!in->block)
        in->block = aligned_alloc(UCMI_PAGE, in->head->slot_size);
    return in->block ? 0 : -ENOMEM;
}

static int verify(struct inspection *in, const struct ucmi_record *put)
{
    char name[24];
    snprintf(name, sizeof name, "seg-%06u", (unsigned)put->segment);
    int fd = ucmi_open_below(in->dir, name);
    if (fd < 0)
        return fd == -ENOENT || fd == -ELOOP || fd == -EISDIR ? -EBADMSG : fd;
    size_t want = UCMI_PAGE + in->head->block_size, got = 0;
    int err = find_room(in, fd, put->slot * in->head->slot_size + want);
    ssize_t n = 1;
    while (!err && got < want && n > 0) {
        off_t off = (off_t)(put->slot * in->head->slot_size + got);
        n = TEMP_FAILURE_RETRY(pread(fd, in->block + got, want - got, off));
        got += n > 0 ? (size_t)n : 0;
    }
    if (!err)
        err = n < 0        ? -errno
              : got < want ? -EBADMSG
                           : ucmi_block_check(in->table.seal, in->block, in->head, put);
    close(fd);
    return err;
}

static bool still_there(struct inspection *in, const struct ucmi_record *put)
{
    struct ucmi_journal_header had = *in->head; /* what is read now may be of another make */
    struct ucmi_table now;
    const struct ucmi_record *at = NULL;
    if (read_journal(in, &now) == 0)
        at = ucmi_table_at(&now, put->segment, put->slot);
    bool same = at && ucmi_key_eq(&at->key, &put->key) && at->header_sum == put->header_sum;
    ucmi_table_free(&now);
    *in->head = had;
    return same;
}

static void visit_block(struct inspection *in, const struct ucmi_record *put)
{
    int64_t used = (int64_t)put->tick << UCMI_TICK_SHIFT;
    struct ucm_block_info info = {.key = put->key,
                                  .segment = put->segment,
                                  .slot = put->slot,
                                  .depth = put->depth,
                                  .used = used};
    if (put->flags & UCMI_PINNED && used > time(NULL))
        info.pinned = used;
    if (in->how->flags & UCM_INSPECT_VERIFY) {
        info.err = verify(in, put);
        answered(in);
        if (info.err == -EBADMSG && in->info.live && !still_there(in, put))
            return;
        in->info.bad += info.err == -EBADMSG;
        in->info.error += info.err && info.err != -EBADMSG;
    }
    in->info.blocks++;
    if (in->how->block)
        in->how->block(in->how->arg, &in->info, &info);
}

/* ---- lanes ---- */

bool ucmi_lane_is_held(int dir)
{
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = ucmi_open_below(dir, "lock");
    bool held = fd >= 0 && fcntl(fd, F_OFD_GETLK, &l) == 0 && l.l_type != F_UNLCK;
    if (fd >= 0)
        close(fd);
    return held;
}

int ucmi_each_name(int at, const char *path, void (*fn)(void *arg, int dir, const char *name),
                   void *arg)
{
    int fd = open_dir(at, path);
    if (fd < 0)
        return fd;
    DIR *dir = fdopendir(fd);
    if (!dir) {
        close(fd);
        return -ENOMEM;
    }
    for (struct dirent *e; (e = readdir(dir));)
        if (e->d_name[0] != '.')
            fn(arg, fd, e->d_name);
    closedir(dir);
    return 0;
}

static void count_file(void *arg, int dir, const char *name)
{
    struct inspection *in = arg;
    bool segment = strncmp(name, "seg-", 4) == 0;
    struct stat st;
    answered(in);
    if ((!segment && strncmp(name, "journal", 7) != 0) ||
        fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISREG(st.st_mode))
        return;
    in->info.bytes += (uint64_t)st.st_blocks * 512;
    in->info.segments += segment;
}

static void fill_info(struct inspection *in)
{
    const struct ucmi_journal_header *h = in->head;
    struct ucm_lane_info *info = &in->info;
    info->host = h->host;
    info->pid = (int)h->pid;
    info->rank = h->rank;
    info->ranks = h->ranks;
    info->block_size = h->block_size;
    info->shard_size = h->shard_size;
    info->epoch = h->epoch;
    info->generation = h->generation;
    info->records = in->table.records;
    info->slots = info->segments * h->slots;
}

static void visit_lane(void *arg, int ns, const char *name)
{
    struct inspection *in = arg;
    struct ucm_lane_info *info = &in->info;

    if (name[0] != 'r' || !isdigit((unsigned char)name[1]))
        return; /* namespace.json */
    in->dir = open_dir(ns, name);
    if (in->dir < 0)
        return;
    *info =
        (struct ucm_lane_info){.ns = info->ns, .ns_text = info->ns_text, .lane = name, .host = ""};
    info->live = ucmi_lane_is_held(in->dir);
    ucmi_each_name(in->dir, ".", count_file, in);
    int err = read_journal(in, &in->table);
    info->locked = err == -ENOKEY;
    if (!err || info->locked)
        fill_info(in);
    for (size_t i = 0; !err && i < in->table.n; i++)
        visit_block(in, &in->table.v[i]);
    info->error += err && !info->locked;
    if (in->how->lane)
        in->how->lane(in->how->arg, info);
    ucmi_table_free(&in->table);
    free(in->block);
    in->block = NULL;
    close(in->dir);
}

/* ---- namespaces ---- */

/* As namespace.c writes it. */
void ucmi_ns_text(int ns, char *text, size_t size)
{
    static const char mark[] = "\"namespace\": \"";
    char json[16384];
    int fd = ucmi_open_below(ns, "namespace.json");
    ssize_t len = fd < 0 ? 0 : read(fd, json, sizeof json - 1);
    if (fd >= 0)
        close(fd);
    json[MAX(len, 0)] = '\0';
    const char *p = strstr(json, mark);
    size_t n = 0;
    for (p = p ? p + strlen(mark) : ""; *p && *p != '"' && n + 1 < size; p++) {
        unsigned code;
        int end = 0;
        if (*p != '\\') {
            text[n++] = *p;
        } else if (p[1] == 'u' && sscanf(p + 2, "%4x%n", &code, &end) == 1 && end == 4) {
            text[n++] = (char)code;
            p += 5;
        } else if (p[1]) {
            text[n++] = *++p;
        }
    }
    text[n] = '\0';
}

static void visit_ns(void *arg, int root, const char *name)
{
    struct inspection *in = arg;
    char text[8192];
    if (strlen(name) != 32 || strspn(name, "0123456789abcdef") != 32)
        return;
    int ns = open_dir(root, name);
    if (ns < 0)
        return;
    ucmi_ns_text(ns, text, sizeof text);
    in->info.ns = name;
    in->info.ns_text = text;
    ucmi_each_name(ns, ".", visit_lane, in);
    close(ns);
}

static int inspect(void *arg, const char *backend)
{
    struct inspection *in = arg;
    int at = open(backend, O_RDONLY | O_DIRECTORY | O_CLOEXEC), err = at < 0 ? -errno : 0;
    in->buf = aligned_alloc(UCMI_PAGE, READ_BUF);
    in->head = aligned_alloc(UCMI_PAGE, sizeof *in->head);
    if (!err)
        err = in->buf && in->head ? ucmi_seal_open(&in->seal, &in->key) : -ENOMEM;
    if (!err)
        err = ucmi_each_name(at, "ucm", visit_ns, in);
    if (at >= 0)
        close(at);
    ucmi_seal_close(&in->seal);
    free(in->buf);
    free(in->head);
    return err;
}

int ucmi_with_key(const char *backend, ucm_conf *conf, struct ucmi_key *key,
                  int (*fn)(void *arg, const char *backend), void *arg)
{
    int err = conf ? ucmi_key_read(ucm_conf_get(conf, "integrity_key_file"), key, conf) : 0;
    if (err < 0)
        return err;
    err = fn(arg, backend);
    ucmi_key_wipe(key);
    return err < 0 && conf ? ucmi_conf_fail(conf, err, "%s: %s", backend, ucmi_file_error(err))
                           : err;
}

int ucm_inspect(const char *backend, const struct ucm_inspect *how)
{
    if (!backend || !how)
        return -EINVAL;
    struct inspection in = {.how = how};
    return ucmi_with_key(backend, how->conf, &in.key, inspect, &in);
}

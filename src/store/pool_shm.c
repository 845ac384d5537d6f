/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool_shm.c - where a pool's memory comes from: a file shared by the processes of one user and
 * namespace, or private memory; who may make, join and remove the file, and when.
 *
 * The file is its own lock.  Bytes 0..63 are the members' indexes, each locked (OFD, so that it
 * dies with the process whatever happens) for as long as the member lives; byte 64 is the gate. Who
 * makes, joins, leaves or sweeps the pool holds the gate, so none of these meets another:
 *
 *   - a file without a magic word is one whose maker has not finished; whoever has the gate then
 *     finds a dead maker's file and makes it anew;
 *   - who got the gate checks that the file still has its name, since the last member out removes
 *     it with the gate held, and starts over if it has not;
 *   - an index that is not locked while one holds the gate stays so, and what its dead owner left
 * in the metas can be cleaned without a race.
 *
 * Nobody waits for the gate without an end.  How the slots get their memory is in pool_grow.c.
 */
#include "store/pool.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum {
    VERSION = 7,
    GATE = UCMI_POOL_MEMBERS,
    GATE_STEP_MS = 2,
    JOIN_MS = 60000,
    LEAVE_MS = 1000,
};
static const uint64_t MAGIC = 0x314c4f4f504d4355; /* "UCMPOOL1" */
static const uint64_t HUGE_PAGE = 2 << 20;
static const char SPEAKER[] = "Cache";

/* ---- layout ---- */

static struct ucmi_pool_layout lay_out(const struct ucmi_pool_spec *spec, uint32_t nslots)
{
    uint32_t nsets = (nslots + UCMI_POOL_WAYS - 1) / UCMI_POOL_WAYS;
    struct ucmi_pool_layout l = {
        .block_size = spec->block_size,
        .shard_size = spec->shard_size,
        .pitch = ROUND_UP(spec->block_size, (uint64_t)UCMI_PAGE),
        .tags_at = UCMI_PAGE,
        .version = VERSION,
        .meta_size = sizeof(struct ucmi_pool_meta),
        .nslots = nslots,
        .nsets = nsets,
    };
    memcpy(l.ns, spec->ns, sizeof l.ns);
    l.metas_at = l.tags_at + (uint64_t)nsets * UCMI_POOL_WAYS * sizeof(uint16_t);
    uint64_t end = l.metas_at + (uint64_t)nslots * sizeof(struct ucmi_pool_meta);
    l.data_at = ROUND_UP(end, nslots * l.pitch < 32 * HUGE_PAGE ? UCMI_PAGE : HUGE_PAGE);
    l.size = l.data_at + nslots * l.pitch;
    return l;
}

uint64_t ucmi_pool_bytes(uint32_t nslots, uint64_t block_size)
{
    struct ucmi_pool_spec spec = {.block_size = block_size};
    return lay_out(&spec, nslots).size;
}

/* As many slots as fit into that many bytes; 0 if none does. */
static uint32_t slots_in(const struct ucmi_pool_spec *spec, uint64_t bytes)
{
    uint64_t slot = ROUND_UP(spec->block_size, (uint64_t)UCMI_PAGE) + sizeof(struct ucmi_pool_meta);
    uint64_t n = MIN(bytes / slot, (uint64_t)UINT32_MAX / UCMI_POOL_WAYS * UCMI_POOL_WAYS);
    while (n && lay_out(spec, (uint32_t)n).size > bytes)
        n--;
    return (uint32_t)n;
}

/* ---- how large ---- */

static uint64_t read_number(const char *path, const char *after)
{
    char text[4096];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return UINT64_MAX;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[MAX(n, 0)] = '\0';
    const char *at = after ? strstr(text, after) : text;
    uint64_t value;
    if (!at || sscanf(at + (after ? strlen(after) : 0), "%" SCNu64, &value) != 1)
        return UINT64_MAX;
    return value;
}

/* What this process may still use: of the machine, and of the container it may be in. */
static uint64_t memory_available(void)
{
    uint64_t kib = read_number("/proc/meminfo", "MemAvailable:");
    uint64_t all = kib == UINT64_MAX ? 0 : kib * 1024;
    uint64_t v2 = read_number("/sys/fs/cgroup/memory.max", NULL);
    uint64_t v1 = read_number("/sys/fs/cgroup/memory/memory.limit_in_bytes", NULL);
    return MIN(all, MIN(v1, v2));
}

static uint64_t space_available(const char *dir)
{
    struct statvfs fs;
    if (statvfs(dir, &fs) < 0)
        return 0;
    return (uint64_t)fs.f_bavail * fs.f_frsize;
}

/* What the pools in a directory are still going to allocate there. */
static uint64_t space_promised(const char *dir)
{
    uint64_t bytes = 0;
    struct stat st;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));)
        if (!strncmp(e->d_name, "ucm-", 4) &&
            fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(st.st_mode))
            bytes += (uint64_t)MAX(st.st_size - st.st_blocks * 512, 0);
    if (d)
        closedir(d);
    return bytes;
}

static double gib(uint64_t bytes)
{
    return (double)bytes / (double)(1 << 30);
}

/* How many slots the pool gets, or why it cannot be had. */
static int choose_size(const struct ucmi_pool_spec *spec, uint32_t *nslots_p, char *why,
                       size_t why_len)
{
    uint64_t promised = spec->dir ? space_promised(spec->dir) : 0, bytes = spec->bytes;
    uint64_t memory = memory_available(),
             space = spec->dir ? space_available(spec->dir) : UINT64_MAX;
    memory -= MIN(memory, promised);
    space -= MIN(space, promised);
    if (!bytes)
        bytes = MIN(memory / 4, space / 2);
    else if (bytes > memory)
        return ucmi_fail(why, why_len, -ENOSPC,
                         "cache_buffer_capacity_gb: %.3g is more than the %.3g GiB of memory that "
                         "are available; give less, or 0 for what the machine can give",
                         gib(bytes), gib(memory));
    else if (bytes > space)
        return ucmi_fail(why, why_len, -ENOSPC,
                         "cache_buffer_capacity_gb: %.3g is more than the %.3g GiB that are free "
                         "in %s; give less, make that filesystem larger (a container's /dev/shm: "
                         "--shm-size), or set share_buffer_enable: false",
                         gib(bytes), gib(space), spec->dir);
    *nslots_p = slots_in(spec, bytes);
    if (!*nslots_p)
        return ucmi_fail(why, why_len, -ENOSPC,
                         "cache_buffer_capacity_gb: %.3g GiB (%s) hold no block of %" PRIu64
                         " bytes; give at least %.3g",
                         gib(bytes), spec->bytes ? "as given" : "what the machine can give",
                         spec->block_size, gib(ucmi_pool_bytes(1, spec->block_size)));
    ucmi_log(UCM_INFO, SPEAKER, "a pool of %" PRIu32 " blocks, %.3g GiB (%s), in %s", *nslots_p,
             gib(bytes), spec->bytes ? "cache_buffer_capacity_gb" : "fitted to the machine",
             spec->dir ? spec->dir : "private memory");
    return 0;
}

/* ---- locks on bytes of the file ---- */

static int lock_byte(int fd, short type, unsigned byte)
{
    struct flock l = {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    return fcntl(fd, F_OFD_SETLK, &l) < 0 ? -errno : 0;
}

static bool byte_taken(int fd, unsigned byte)
{
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    return fcntl(fd, F_OFD_GETLK, &l) < 0 || l.l_type != F_UNLCK;
}

/* The members that live, other than who asks (through fd). */
static uint64_t others_alive(int fd)
{
    uint64_t alive = 0;
    for (unsigned i = 0; i < UCMI_POOL_MEMBERS; i++)
        if (byte_taken(fd, i))
            alive |= UINT64_C(1) << i;
    return alive;
}

static void nap(void)
{
    struct timespec t = {.tv_nsec = GATE_STEP_MS * 1000000};
    nanosleep(&t, NULL);
}

/* Whether the open file is still the one that has the name. */
static bool has_name(int fd, const char *path)
{
    struct stat a, b;
    return fstat(fd, &a) == 0 && fstatat(AT_FDCWD, path, &b, AT_SYMLINK_NOFOLLOW) == 0 &&
           a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

/* ---- mapping ---- */

static void take_layout(struct ucmi_pool *p, void *memory, const struct ucmi_pool_layout *l)
{
    p->head = memory;
    p->layout = *l;
    p->tags = (void *)((char *)memory + l->tags_at);
    p->metas = (void *)((char *)memory + l->metas_at);
    p->data = (char *)memory + l->data_at;
    p->set_base = l->nslots / l->nsets;
    p->set_extra = l->nslots % l->nsets;
}

static int map(struct ucmi_pool *p, const struct ucmi_pool_layout *l)
{
    int flags = p->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    p->pins = calloc(l->nslots, sizeof *p->pins);
    if (!p->pins)
        return -ENOMEM;
    void *memory = mmap(NULL, l->size, PROT_READ | PROT_WRITE, flags, p->fd, 0);
    if (memory == MAP_FAILED)
        return -errno;
    /* All three are wishes: huge pages, no copy for forked children, no KV data in core dumps. */
    madvise(memory, l->size, MADV_HUGEPAGE);
    madvise(memory, l->size, MADV_DONTFORK);
    madvise(memory, l->size, MADV_DONTDUMP);
    take_layout(p, memory, l);
    int err = ucmi_pool_grow_init(p);
    return err ? err : ucmi_policy_open(&p->policy, &p->head->span, l->nslots);
}

/* ---- private memory ---- */

static int open_private(struct ucmi_pool *p, const struct ucmi_pool_spec *spec, char *why,
                        size_t why_len)
{
    struct ucmi_pool_spec mine = *spec;
    uint32_t nslots;
    mine.dir = NULL;
    int err = choose_size(&mine, &nslots, why, why_len);
    if (err)
        return err;
    struct ucmi_pool_layout l = lay_out(&mine, nslots);
    err = map(p, &l);
    if (err)
        return ucmi_fail(why, why_len, err, "cache_buffer_capacity_gb: %.3g GiB of memory: %s",
                         gib(l.size), ucmi_file_error(err));
    p->head->layout = l;
    atomic_store(&p->head->grown, nslots); /* such memory is there when it is touched */
    ucmi_pool_grow_start(p);
    return 0;
}

/* ---- a shared file ---- */

/* Removes the pools of this user that no process lives in, other than ours. */
static void remove_dead_pools(const struct ucmi_pool *p, const char *dir)
{
    char prefix[32];
    int len = snprintf(prefix, sizeof prefix, "ucm-%u-", (unsigned)geteuid());
    const char *own = strrchr(p->path, '/') + 1;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        char path[4096];
        if (strncmp(e->d_name, prefix, (size_t)len) || !strcmp(e->d_name, own) ||
            snprintf(path, sizeof path, "%s/%s", dir, e->d_name) >= (int)sizeof path)
            continue;
        int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
        struct stat st;
        if (fd < 0)
            continue;
        if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_uid == geteuid() &&
            lock_byte(fd, F_WRLCK, GATE) == 0 && !others_alive(fd) && has_name(fd, path) &&
            unlink(path) == 0)
            ucmi_log(UCM_INFO, SPEAKER, "removed %s, whose last process was killed", path);
        close(fd);
    }
    if (d)
        closedir(d);
}

/* A device of ours is going to know the pages by address. */
static bool takes_addresses(const struct ucmi_pool_spec *spec)
{
    return spec->dev && spec->dev->pin;
}

/* Allocates and fills in the file; the gate is ours. */
static int make(struct ucmi_pool *p, const struct ucmi_pool_spec *spec, char *why, size_t why_len)
{
    uint32_t nslots;
    if (others_alive(p->fd)) {
        ucmi_log(UCM_WARN, SPEAKER,
                 "%s is damaged and in use; this process keeps its blocks to itself", p->path);
        return -ENOTSUP;
    }
    remove_dead_pools(p, spec->dir);
    int err = ftruncate(p->fd, 0) < 0 ? -errno : 0;
    if (!err)
        err = choose_size(spec, &nslots, why, why_len);
    if (err)
        return err;
    struct ucmi_pool_layout l = lay_out(spec, nslots);
    err = ucmi_pool_reserve(p->fd, 0, l.data_at);
    if (!err && ftruncate(p->fd, (off_t)l.size) < 0)
        err = -errno;
    if (!err)
        err = map(p, &l);
    if (!err)
        err = ucmi_pool_grow_first(p);
    if (err)
        return ucmi_fail(why, why_len, err, "cache_buffer_capacity_gb: %.3g GiB in %s: %s",
                         gib(l.size), spec->dir, ucmi_file_error(err));
    p->head->layout = l;
    p->me = 0;
    err = lock_byte(p->fd, F_WRLCK, 0);
    if (err)
        return err;
    atomic_store(&p->head->members, 1);
    atomic_store(&p->head->fixed, takes_addresses(spec));
    atomic_store(&p->head->magic, MAGIC);
    ucmi_pool_grow_if_nobody_does(p, 0);
    return 0;
}

/* Whether a header read from the file describes a pool that we can share. */
static bool fits(int fd, const struct ucmi_pool_layout *l, const struct ucmi_pool_spec *spec)
{
    struct stat st;
    if (l->version != VERSION || !l->nslots || fstat(fd, &st) < 0)
        return false;
    struct ucmi_pool_layout want = lay_out(spec, l->nslots);
    return memcmp(l, &want, sizeof want) == 0 && (uint64_t)st.st_size == l->size;
}

static unsigned sweep(struct ucmi_pool *p, uint64_t dead);

/* Takes an index in a pool that is there; the gate is ours.  -ENOTSUP: it cannot be shared. */
static int join(struct ucmi_pool *p, const struct ucmi_pool_spec *spec,
                const struct ucmi_pool_layout *l)
{
    if (!fits(p->fd, l, spec)) {
        ucmi_log(UCM_WARN, SPEAKER,
                 "%s was made by another version of ucm or is damaged; this process keeps its "
                 "blocks to itself (remove the file when nothing uses it)",
                 p->path);
        return -ENOTSUP;
    }
    uint64_t alive = others_alive(p->fd);
    if (alive == UINT64_MAX) {
        ucmi_log(UCM_WARN, SPEAKER,
                 "%s: %d processes share it already; this one keeps its blocks to itself", p->path,
                 UCMI_POOL_MEMBERS);
        return -ENOTSUP;
    }
    int err = map(p, l);
    if (err)
        return err;
    p->me = (unsigned)__builtin_ctzll(~alive);
    err = lock_byte(p->fd, F_WRLCK, p->me);
    if (err)
        return err;
    /* Cleaned before it is used: the index may have been a dead process's. */
    sweep(p, atomic_fetch_or(&p->head->members, ucmi_pool_bit(p)) & ~alive);
    if (!alive) /* who is killed between two instructions may have miscounted */
        ucmi_pool_recount(p);
    ucmi_pool_grow_if_nobody_does(p, alive);
    if (takes_addresses(spec))
        atomic_fetch_or(&p->head->fixed, ucmi_pool_bit(p));
    ucmi_log(UCM_INFO, SPEAKER, "joined %s: %" PRIu32 " blocks, %.3g GiB, %" PRId64 " ready%s",
             p->path, l->nslots, gib(l->size), atomic_load(&p->head->ready),
             spec->bytes && slots_in(spec, spec->bytes) != l->nslots
                 ? "; it keeps its size, whatever cache_buffer_capacity_gb says now"
                 : "");
    return 0;
}

/* With the gate held and the name checked. */
static int make_or_join(struct ucmi_pool *p, const struct ucmi_pool_spec *spec, char *why,
                        size_t why_len)
{
    struct ucmi_pool_head head;
    ssize_t n = pread(p->fd, &head, sizeof head, 0);
    if (n == (ssize_t)sizeof head && atomic_load(&head.magic) == MAGIC)
        return join(p, spec, &head.layout);
    int err = make(p, spec, why, why_len);
    if (err && err != -ENOTSUP)
        unlink(p->path);
    return err;
}

static void warn_if_on_disk(const struct ucmi_pool *p, const char *dir)
{
    enum { TMPFS = 0x01021994, RAMFS = 0x858458f6, HUGETLBFS = 0x958458f6 };
    struct statfs fs;
    if (fstatfs(p->fd, &fs) < 0)
        return;
    uint32_t type = (uint32_t)fs.f_type;
    if (type != TMPFS && type != (uint32_t)RAMFS && type != (uint32_t)HUGETLBFS)
        ucmi_log(UCM_WARN, SPEAKER,
                 "cache_dir: %s is not in memory, so the pool is as slow as that disk, and wears "
                 "it; give a directory on a tmpfs, as /dev/shm is",
                 dir);
}

/* Of another user, of all users, or no file at all: the name is taken, and nothing of it is ours.
 */
static int taken(const struct ucmi_pool *p)
{
    ucmi_log(UCM_WARN, SPEAKER,
             "%s is not a file of this user alone; this process keeps its blocks to itself",
             p->path);
    return -ENOTSUP;
}

static int open_file(struct ucmi_pool *p, const struct ucmi_pool_spec *spec, char *why,
                     size_t why_len)
{
    struct stat st;
    p->fd = open(p->path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
    int err = p->fd < 0 ? -errno : 0;
    bool refused = err == -EACCES || err == -EISDIR || err == -ELOOP || err == -ENXIO;
    if (refused && fstatat(AT_FDCWD, p->path, &st, AT_SYMLINK_NOFOLLOW) == 0)
        return taken(p);
    if (err)
        return ucmi_fail(why, why_len, err,
                         "cache_dir: %s: %s; give a directory in memory that this user can write "
                         "to, or set share_buffer_enable: false",
                         spec->dir, strerrordesc_np(-err));
    warn_if_on_disk(p, spec->dir);
    if (fstat(p->fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_uid == geteuid() &&
        !(st.st_mode & 077))
        return 0;
    return taken(p);
}

static int open_shared(struct ucmi_pool *p, const struct ucmi_pool_spec *spec, char *why,
                       size_t why_len)
{
    uint64_t end = ucmi_now_ns() + JOIN_MS * UINT64_C(1000000);
    char ns[2 * sizeof spec->ns + 1];
    ucmi_hex(spec->ns, sizeof spec->ns, ns);
    if (asprintf(&p->path, "%s/ucm-%u-%s", spec->dir, (unsigned)geteuid(), ns) < 0) {
        p->path = NULL;
        return -ENOMEM;
    }
    for (;;) {
        int err = open_file(p, spec, why, why_len);
        if (err)
            return err;
        if (lock_byte(p->fd, F_WRLCK, GATE) == 0 && has_name(p->fd, p->path)) {
            err = make_or_join(p, spec, why, why_len);
            lock_byte(p->fd, F_UNLCK, GATE);
            return err;
        }
        close(p->fd);
        p->fd = -1;
        if (ucmi_now_ns() > end) {
            ucmi_log(UCM_WARN, SPEAKER,
                     "%s: another process has been making it for %d s; this one keeps its blocks "
                     "to itself",
                     p->path, JOIN_MS / 1000);
            return -ENOTSUP;
        }
        nap();
    }
}

/* ---- sweeping, opening, closing ---- */

/* With the gate held: these indexes belong to nobody who lives. */
static unsigned sweep(struct ucmi_pool *p, uint64_t dead)
{
    uint64_t now = ucmi_now_ns();
    unsigned changed = 0;
    if (!dead && !atomic_load(&p->head->quarantined))
        return 0;
    atomic_fetch_and(&p->head->fixed, ~dead);
    for (uint32_t slot = 0; slot < p->layout.nslots; slot++) {
        if (dead)
            changed += ucmi_pool_reclaim(p, slot, dead);
        changed += ucmi_pool_parole(p, slot, now);
    }
    for (uint64_t left = dead; left; left &= left - 1)
        atomic_store(&p->head->busy[__builtin_ctzll(left)], 0);
    atomic_fetch_and(&p->head->members, ~dead | ucmi_pool_bit(p));
    ucmi_count(p->counters, UCMI_CACHE_RECLAIMED, changed);
    return changed;
}

unsigned ucmi_pool_sweep(struct ucmi_pool *p)
{
    unsigned changed = 0;
    if (p->fd < 0)
        return 0;
    pthread_mutex_lock(&p->sweep_lock);
    if (lock_byte(p->fd, F_WRLCK, GATE) == 0) {
        uint64_t others = others_alive(p->fd);
        changed = sweep(p, atomic_load(&p->head->members) & ~(others | ucmi_pool_bit(p)));
        ucmi_pool_grow_if_nobody_does(p, others);
        lock_byte(p->fd, F_UNLCK, GATE);
    }
    pthread_mutex_unlock(&p->sweep_lock);
    return changed;
}

/* Gives up file and memory, whatever there is of them; the locks go with the descriptor. */
static void detach(struct ucmi_pool *p)
{
    ucmi_pool_grow_stop(p);
    if (p->head)
        munmap(p->head, p->layout.size);
    if (p->fd >= 0)
        close(p->fd);
    ucmi_policy_close(&p->policy);
    free(p->pins);
    p->head = NULL;
    p->pins = NULL;
    p->fd = -1;
}

int ucmi_pool_open(const struct ucmi_pool_spec *spec, struct ucmi_pool **pool_p, char *why,
                   size_t why_len)
{
    struct ucmi_pool *p = calloc(1, sizeof *p);
    if (!p)
        return -ENOMEM;
    p->fd = -1;
    p->counters = spec->counters;
    p->dev = spec->dev;
    p->dev_state = spec->dev_state;
    p->quarantine_ns = spec->quarantine_ms * UINT64_C(1000000);
    pthread_mutex_init(&p->lock, NULL);
    pthread_mutex_init(&p->sweep_lock, NULL);
    pthread_mutex_init(&p->pin_lock, NULL);
    int err = spec->dir ? open_shared(p, spec, why, why_len) : -ENOTSUP;
    if (err == -ENOTSUP) {
        detach(p);
        err = open_private(p, spec, why, why_len);
    }
    if (err) {
        detach(p);
        ucmi_pool_close(p);
        return err;
    }
    ucmi_pool_pin_start(p);
    *pool_p = p;
    return 0;
}

static bool take_gate(int fd, unsigned ms)
{
    for (unsigned i = 0; i < ms / GATE_STEP_MS; i++, nap())
        if (lock_byte(fd, F_WRLCK, GATE) == 0)
            return true;
    return false;
}

/* Who finds no other member alive removes the file; the gate keeps everyone from joining meanwhile.
 * What we could not write down is left to the others. */
static void leave(struct ucmi_pool *p)
{
    if (!take_gate(p->fd, LEAVE_MS))
        return; /* our lock goes all the same; the file is left to the next who comes */
    atomic_store(&p->head->busy[p->me], 0);
    atomic_fetch_and(&p->head->members, ~ucmi_pool_bit(p));
    atomic_fetch_and(&p->head->fixed, ~ucmi_pool_bit(p));
    if (others_alive(p->fd))
        for (uint32_t slot = 0; slot < p->layout.nslots; slot++)
            ucmi_pool_disown(p, slot, ucmi_pool_bit(p));
    else if (has_name(p->fd, p->path))
        unlink(p->path);
    lock_byte(p->fd, F_UNLCK, p->me);
    lock_byte(p->fd, F_UNLCK, GATE);
}

void ucmi_pool_close(struct ucmi_pool *p)
{
    if (!p)
        return;
    ucmi_pool_grow_stop(p);
    if (p->fd >= 0)
        leave(p);
    detach(p);
    pthread_mutex_destroy(&p->pin_lock);
    pthread_mutex_destroy(&p->sweep_lock);
    pthread_mutex_destroy(&p->lock);
    free(p->path);
    free(p);
}

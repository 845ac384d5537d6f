/* SPDX-License-Identifier: Apache-2.0 */
/*
 * log.c - one line for one event: to the sink of the host program or to standard error, and to a
 * rotated file when UCM_LOG_PATH asks for one.
 *
 * Any thread may log.  The sink is called under a read lock, so lines do not wait for each other (a
 * sink that takes Python's interpreter lock would else deadlock with a thread that holds it and
 * logs), and when ucm_log_to returns the old sink is no longer running.  The file has a mutex that
 * is waited for a moment only.  Whatever goes wrong here, the caller goes on: a line that cannot be
 * written soon is counted, and the next one that can be written says how many are missing.
 */
#include "base/base.h"

#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    TEXT_MAX = 3072,   /* with the frame below PIPE_BUF: a write to a pipe is whole or not at all */
    FRAME_MAX = 128,   /* time, level, pid and tid */
    PATIENCE_MS = 100, /* how long a line waits for a slow reader of standard error, or the file */
    DEFAULT_FILES = 10,   /* files kept, the current one included */
    DEFAULT_SIZE_MIB = 5, /* size at which a file is rotated */
};

static struct {
    pthread_once_t once;
    pthread_rwlock_t lock; /* guards fn and arg */
    ucm_log_fn *fn;
    void *arg;
    _Atomic int most;
    _Atomic uint32_t lost; /* lines standard error did not take */
} sink = {.once = PTHREAD_ONCE_INIT, .lock = PTHREAD_RWLOCK_INITIALIZER};

static struct {
    pthread_mutex_t lock; /* guards all but the flags */
    const char *root;     /* UCM_LOG_PATH */
    char path[512];       /* of the current file */
    pid_t pid;            /* the process the path was made for */
    int fd;               /* -1: not open */
    uint64_t size, max_size;
    unsigned max_files;
    _Atomic bool wanted; /* UCM_LOG_PATH is set and can be written */
    _Atomic bool stuck;  /* a writer hangs in the file system: do not queue up behind it */
} file = {.lock = PTHREAD_MUTEX_INITIALIZER, .fd = -1};

static void write_stderr(const char *line, size_t len);

static void complain(const char *fmt, ...) PRINTF_LIKE(1, 2);
static void complain(const char *fmt, ...)
{
    char line[1024];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(line, sizeof line - 1, fmt, ap);
    va_end(ap);
    n = MIN(n, (int)sizeof line - 2);
    line[n++] = '\n';
    write_stderr(line, (size_t)n);
}

static int level_from(const char *name)
{
    static const struct {
        const char *word;
        int level;
    } words[] = {{"error", UCM_ERROR},
                 {"warn", UCM_WARN},
                 {"warning", UCM_WARN},
                 {"info", UCM_INFO},
                 {"debug", UCM_DEBUG}};
    for (size_t i = 0; i < ARRAY_LEN(words); i++)
        if (strcasecmp(name, words[i].word) == 0)
            return words[i].level;
    return -1;
}

static unsigned number_from(const char *variable, unsigned def, unsigned max)
{
    const char *text = getenv(variable);
    if (!text)
        return def;
    char *end;
    errno = 0;
    long v = strtol(text, &end, 10);
    if (errno == 0 && end != text && *end == '\0' && v >= 1 && v <= (long)max)
        return (unsigned)v;
    complain("[UC][W] %s: \"%.40s\" is not a number from 1 to %u; using %u", variable, text, max,
             def);
    return def;
}

static void init(void)
{
    int saved = errno;
    const char *name = getenv("UC_LOGGER_LEVEL");
    const char *variable = "UC_LOGGER_LEVEL";
    if (!name || !*name)
        name = getenv(variable = "UCM_LOG_LEVEL");
    int level = UCM_INFO;
    if (name && *name && (level = level_from(name)) < 0) {
        complain("[UC][W] %s: \"%.40s\" is not error, warn, info or debug; using info", variable,
                 name);
        level = UCM_INFO;
    }
    atomic_store(&sink.most, level);
    const char *root = getenv("UCM_LOG_PATH");
    if (root && *root) {
        file.root = root;
        atomic_store(&file.wanted, true);
        file.max_files = number_from("UCM_LOG_MAX_FILES", DEFAULT_FILES, 1000);
        file.max_size = (uint64_t)number_from("UCM_LOG_MAX_SIZE", DEFAULT_SIZE_MIB, 1 << 20) << 20;
    }
    errno = saved;
}

void ucm_log_to(ucm_log_fn *fn, void *arg, enum ucm_level most)
{
    pthread_once(&sink.once, init);
    pthread_rwlock_wrlock(&sink.lock);
    sink.fn = fn;
    sink.arg = arg;
    atomic_store(&sink.most, (int)most);
    pthread_rwlock_unlock(&sink.lock);
}

bool ucmi_log_on(enum ucm_level level)
{
    pthread_once(&sink.once, init);
    return (int)level <= atomic_load_explicit(&sink.most, memory_order_relaxed);
}

/* ---- standard error ---- */

static bool stderr_takes_a_line(void)
{
    struct pollfd p = {.fd = STDERR_FILENO, .events = POLLOUT};
    /* Once lines have been lost there is nobody to wait for. */
    int ms = atomic_load_explicit(&sink.lost, memory_order_relaxed) ? 0 : PATIENCE_MS;
    /* POLLERR: nobody reads any more, and writing would raise SIGPIPE in the host's thread. */
    return poll(&p, 1, ms) == 1 && (p.revents & POLLOUT) && !(p.revents & POLLERR);
}

static void write_stderr(const char *line, size_t len)
{
    if (!stderr_takes_a_line()) {
        atomic_fetch_add_explicit(&sink.lost, 1, memory_order_relaxed);
        return;
    }
    uint32_t lost = atomic_exchange_explicit(&sink.lost, 0, memory_order_relaxed);
    if (lost) {
        char note[64];
        int n = snprintf(note, sizeof note, "[UC][W] %u log lines were lost\n", lost);
        if (write(STDERR_FILENO, note, (size_t)n) < 0)
            return;
    }
    ssize_t n;
    do
        n = write(STDERR_FILENO, line, len);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        atomic_fetch_add_explicit(&sink.lost, 1, memory_order_relaxed);
}

/* ---- the file ---- */

static int make_dirs(char *path)
{
    for (char *p = path + 1; *p; p++) {
        if (*p != '/')
            continue;
        *p = '\0';
        int err = mkdir(path, 0777) < 0 && errno != EEXIST ? -errno : 0;
        *p = '/';
        if (err)
            return err;
    }
    return 0;
}

/* Opens the file of this process; a failure is said once and ends the writing of a file. */
static int file_open(int flags)
{
    pid_t pid = getpid();
    int n = snprintf(file.path, sizeof file.path, "%s/%d/ucm.log", file.root, (int)pid);
    int err = n < (int)sizeof file.path ? make_dirs(file.path) : -ENAMETOOLONG;
    if (!err) {
        file.fd = open(file.path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | flags, 0640);
        err = file.fd < 0 ? -errno : 0;
    }
    if (err) {
        complain("[UC][W] UCM_LOG_PATH: cannot write %s: %s; no log file is written", file.path,
                 strerrordesc_np(-err));
        atomic_store(&file.wanted, false);
        return err;
    }
    struct stat st;
    file.size = fstat(file.fd, &st) == 0 ? (uint64_t)st.st_size : 0;
    file.pid = pid;
    return 0;
}

static void file_close(void)
{
    if (file.fd >= 0)
        close(file.fd);
    file.fd = -1;
}

/* ucm.log becomes ucm.log.1, that one ucm.log.2 and so on; the oldest is overwritten. */
static int file_rotate(void)
{
    char from[sizeof file.path + 16], to[sizeof file.path + 16];
    file_close();
    for (unsigned i = file.max_files - 1; i >= 1; i--) {
        snprintf(to, sizeof to, "%s.%u", file.path, i);
        if (i > 1)
            snprintf(from, sizeof from, "%s.%u", file.path, i - 1);
        else
            snprintf(from, sizeof from, "%s", file.path);
        rename(from, to);
    }
    return file_open(O_TRUNC);
}

static bool file_lock(void)
{
    if (pthread_mutex_trylock(&file.lock) == 0)
        return true;
    if (atomic_load(&file.stuck))
        return false;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += PATIENCE_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    if (pthread_mutex_clocklock(&file.lock, CLOCK_MONOTONIC, &until) == 0)
        return true;
    atomic_store(&file.stuck, true);
    return false;
}

static void write_file(const char *line, size_t len)
{
    if (!file_lock())
        return;
    atomic_store(&file.stuck, false);
    if (!atomic_load(&file.wanted)) /* no longer */
        goto out;
    if (file.pid != getpid()) /* a child of fork writes a file of its own */
        file_close();
    if (file.fd < 0 && file_open(0) < 0)
        goto out;
    if (file.size > 0 && file.size + len > file.max_size && file_rotate() < 0)
        goto out;
    ssize_t n = write(file.fd, line, len);
    if (n > 0)
        file.size += (uint64_t)n;
out:
    pthread_mutex_unlock(&file.lock);
}

/* ---- a line ---- */

static size_t frame(char *out, size_t size, enum ucm_level level, const char *text)
{
    struct timespec now;
    struct tm tm;
    char stamp[32];
    clock_gettime(CLOCK_REALTIME, &now);
    localtime_r(&now.tv_sec, &tm);
    strftime(stamp, sizeof stamp, "%Y-%m-%d %H:%M:%S", &tm);
    int n = snprintf(out, size, "[%s.%06ld][UC][%c] %s [%d,%d]\n", stamp, now.tv_nsec / 1000,
                     "EWID"[level], text, (int)getpid(), (int)gettid());
    return (size_t)MIN(n, (int)size - 1);
}

static void emit(enum ucm_level level, char *text)
{
    ucmi_scrub(text); /* a line stays one line, whatever a file name may hold */
    pthread_rwlock_rdlock(&sink.lock);
    ucm_log_fn *fn = sink.fn;
    if (fn)
        fn(sink.arg, level, text);
    pthread_rwlock_unlock(&sink.lock);
    bool to_file = atomic_load_explicit(&file.wanted, memory_order_relaxed);
    if (fn && !to_file)
        return;
    char line[TEXT_MAX + FRAME_MAX];
    size_t len = frame(line, sizeof line, level, text);
    if (!fn)
        write_stderr(line, len);
    if (to_file)
        write_file(line, len);
}

static void log_va(enum ucm_level level, const char *object, const char *tail, const char *fmt,
                   va_list ap)
{
    int saved = errno;
    char text[TEXT_MAX];
    size_t room = sizeof text - strlen(tail);
    int n = object && *object ? snprintf(text, room, "%s: ", object) : 0;
    size_t at = MIN((size_t)n, room - 1);
    n = vsnprintf(text + at, room - at, fmt, ap);
    at += MIN((size_t)MAX(n, 0), room - at - 1);
    memcpy(text + at, tail, strlen(tail) + 1);
    emit(level, text);
    errno = saved;
}

void ucmi_log(enum ucm_level level, const char *object, const char *fmt, ...)
{
    if (!ucmi_log_on(level))
        return;
    va_list ap;
    va_start(ap, fmt);
    log_va(level, object, "", fmt, ap);
    va_end(ap);
}

void ucmi_log_gated(struct ucmi_log_gate *gate, unsigned every_s, enum ucm_level level,
                    const char *object, const char *fmt, ...)
{
    if (!ucmi_log_on(level))
        return;
    uint64_t now = ucmi_now_ns();
    uint64_t next = atomic_load_explicit(&gate->next_ns, memory_order_relaxed);
    if (now < next ||
        !atomic_compare_exchange_strong(&gate->next_ns, &next, now + every_s * 1000000000ull)) {
        atomic_fetch_add_explicit(&gate->held, 1, memory_order_relaxed);
        return;
    }
    char tail[48] = "";
    uint32_t held = atomic_exchange_explicit(&gate->held, 0, memory_order_relaxed);
    if (held)
        snprintf(tail, sizeof tail, " (and %u more like it)", held);
    va_list ap;
    va_start(ap, fmt);
    log_va(level, object, tail, fmt, ap);
    va_end(ap);
}

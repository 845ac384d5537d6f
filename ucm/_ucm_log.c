/* SPDX-License-Identifier: Apache-2.0 */
/*
 * _ucm_log.c - log lines of the core on their way to Python.
 *
 * The sink runs on any thread of the core, so it must wait neither for the GIL (its holder may be
 * waiting for that very thread) nor for a slow log handler, and must run no Python code (a garbage
 * collection there could close a store from one of its own threads).  It puts the line into a
 * bounded ring; a Python thread (ucm/_log.py) sleeps in log_take() without the GIL and hands the
 * lines on. Lines that find the ring full are counted, and the count is said with the next one
 * taken.
 *
 * One ring for the process, as there is one sink in the core; `lock` guards it and is a leaf.
 */
#include <pthread.h>

#include "_ucm.h"

enum { RING = 1024 };

static struct {
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct entry {
        enum ucm_level level;
        char *line;
    } ring[RING];
    size_t head, count, lost;
    bool open;
} sink = {.lock = PTHREAD_MUTEX_INITIALIZER, .more = PTHREAD_COND_INITIALIZER};

static void put(void *arg, enum ucm_level level, const char *line)
{
    char *copy = strdup(line);
    pthread_mutex_lock(&sink.lock);
    if (copy && sink.open && sink.count < RING) {
        sink.ring[(sink.head + sink.count++) % RING] = (struct entry){level, copy};
        copy = NULL;
        pthread_cond_signal(&sink.more);
    } else if (sink.open) {
        sink.lost++;
    }
    pthread_mutex_unlock(&sink.lock);
    free(copy);
}

static PyObject *log_open(PyObject *module, PyObject *arg)
{
    long level = PyLong_AsLong(arg);
    if (level == -1 && PyErr_Occurred())
        return NULL;
    if (level < UCM_ERROR || level > UCM_DEBUG)
        return PyErr_Format(PyExc_ValueError, "level: %ld is not in [0, 3]", level);
    pthread_mutex_lock(&sink.lock);
    sink.open = true;
    pthread_mutex_unlock(&sink.lock);
    ucm_log_to(put, NULL, (enum ucm_level)level);
    Py_RETURN_NONE;
}

static PyObject *log_default(PyObject *module, PyObject *arg)
{
    long level = PyLong_AsLong(arg);
    if (level == -1 && PyErr_Occurred())
        return NULL;
    if (level < UCM_ERROR || level > UCM_DEBUG)
        return PyErr_Format(PyExc_ValueError, "level: %ld is not in [0, 3]", level);
    ucm_log_to(NULL, NULL, (enum ucm_level)level);
    Py_RETURN_NONE;
}

static PyObject *log_close(PyObject *module, PyObject *unused)
{
    pthread_mutex_lock(&sink.lock);
    sink.open = false;
    pthread_cond_broadcast(&sink.more);
    pthread_mutex_unlock(&sink.lock);
    Py_RETURN_NONE;
}

/* In a child of fork(): the threads that may have held the lock or slept here do not exist. */
static PyObject *log_reset(PyObject *module, PyObject *unused)
{
    pthread_mutex_init(&sink.lock, NULL);
    pthread_cond_init(&sink.more, NULL);
    sink.head = sink.count = sink.lost = 0;
    Py_RETURN_NONE;
}

static PyObject *log_take(PyObject *module, PyObject *unused)
{
    struct entry taken[64];
    size_t n = 0, lost;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&sink.lock);
    while (sink.open && !sink.count)
        pthread_cond_wait(&sink.more, &sink.lock);
    for (; sink.count && n < sizeof taken / sizeof *taken; n++, sink.count--) {
        taken[n] = sink.ring[sink.head];
        sink.head = (sink.head + 1) % RING;
    }
    lost = sink.lost;
    sink.lost = 0;
    pthread_mutex_unlock(&sink.lock);
    Py_END_ALLOW_THREADS

    PyObject *list = PyList_New(0);
    for (size_t i = 0; i < n; i++) {
        PyObject *item =
            Py_BuildValue("(iN)", (int)taken[i].level,
                          PyUnicode_DecodeUTF8(taken[i].line, strlen(taken[i].line), "replace"));
        if (!list || !item || PyList_Append(list, item))
            Py_CLEAR(list);
        Py_XDECREF(item);
        free(taken[i].line);
    }
    return list ? Py_BuildValue("(Nn)", list, (Py_ssize_t)lost) : NULL;
}

static PyObject *log_hook(PyObject *module, PyObject *fn)
{
    struct ext_state *state = PyModule_GetState(module);
    PyObject *old = state->log_start;
    state->log_start = fn == Py_None ? NULL : Py_NewRef(fn);
    Py_XDECREF(old);
    Py_RETURN_NONE;
}

int ext_log_begin(struct ext_state *state)
{
    PyObject *fn = state->log_start;
    if (!fn)
        return 0;
    state->log_start = NULL;
    PyObject *r = PyObject_CallNoArgs(fn);
    Py_DECREF(fn);
    Py_XDECREF(r);
    return r ? 0 : -1;
}

PyMethodDef ext_log_methods[] = {
    {"log_open", log_open, METH_O, "log_open(level): lines up to this level go to log_take()"},
    {"log_default", log_default, METH_O, "log_default(level): lines go to standard error"},
    {"log_close", log_close, METH_NOARGS,
     "log_close(): further lines are dropped; log_take() returns"},
    {"log_reset", log_reset, METH_NOARGS, "log_reset(): for a child of fork()"},
    {"log_take", log_take, METH_NOARGS,
     "log_take() -> ([(level, line), ...], lost): waits for lines; none: the log is closed"},
    {"log_hook", log_hook, METH_O,
     "log_hook(fn): fn() is called once, when the core is first used"},
    {0},
};

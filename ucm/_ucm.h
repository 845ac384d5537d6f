/* SPDX-License-Identifier: Apache-2.0 */
/*
 * _ucm.h - what the files of the extension share.  Limited API of Python 3.11; of the core it sees
 * only ucm.h.
 */
#ifndef UCM_EXT_H
#define UCM_EXT_H

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ucm.h"

#define METHOD(fn)   ((PyCFunction)(void (*)(void))(fn))
#define KEYWORDS(fn) METHOD(fn), METH_VARARGS | METH_KEYWORDS

struct ext_state { /* of the module */
    PyTypeObject *conf, *store, *map, *task;
    PyObject *log_start;  /* called when the core is first used; NULL: nobody wants to know */
    struct Store *stores; /* open ones, for close_all() */
};

/* All types are final, so the module of an object's type is ours. */
static inline struct ext_state *ext_state_of(PyObject *self)
{
    return PyType_GetModuleState(Py_TYPE(self));
}

/* Set an exception and return NULL. */
PyObject *ext_os_error(int err, const char *text); /* OSError(errno, text); text NULL: strerror */

/* The UTF-8 of a str (as long as that lives), or NULL and an exception. */
const char *ext_text(PyObject *o, const char *name);
/* A contiguous buffer; name is the argument's, for the exception.  Release the view after use. */
int ext_buffer(PyObject *o, const char *name, Py_buffer *view);
int ext_buffer_uint(PyObject *o, const char *name, Py_ssize_t itemsize, Py_buffer *view);
int ext_buffer_keys(PyObject *o, Py_buffer *view, size_t *n_p);
/* An integer argument within [0, UINT32_MAX]. */
int ext_u32(const char *name, long long value, uint32_t *out);

/* Tells Python that the core is about to be used. */
int ext_log_begin(struct ext_state *state);
extern PyMethodDef ext_log_methods[];

extern PyType_Spec ext_conf_spec, ext_store_spec, ext_map_spec, ext_task_spec;

/* The ucm_conf of a Conf (borrowed), or NULL and an exception. */
ucm_conf *ext_conf_borrow(PyObject *conf);
void ext_conf_return(PyObject *conf);

/* ---- stores, and what hangs on them ----
 *
 * Closing a store must first end all that uses it.  Under the GIL `closed` is set, so that no new
 * call begins, and loads are canceled, so that waits for them end.  Then, without the GIL and with
 * the write side of `life`, so that no call is inside: tasks and maps are freed, the store is
 * closed. Every call that uses the core without the GIL holds the read side and looks at `closed`
 * again; calls that keep the GIL need only look at `closed`.  The lists are changed under the GIL.
 */
typedef struct Task Task;
typedef struct Map Map;
typedef struct Store {
    PyObject_HEAD
    struct Store *next, **link; /* of the open ones */
    ucm_store *store;
    pthread_rwlock_t life;
    _Atomic bool closed;
    pid_t pid; /* who opened it: a child of fork() must not touch it */
    Task *tasks;
    Map *maps;
    unsigned long long block_size, shard_size;
} Store;
struct Map {
    PyObject_HEAD
    Store *store;
    Map *next, **link;
    ucm_map *map;
    unsigned blocks_per_key, users; /* calls under way without the GIL */
    bool freed;                     /* for good when there are no users */
};
struct Task {
    PyObject_HEAD
    Store *store;
    Task *next, **link;
    ucm_task *task; /* NULL while it is being submitted */
    size_t n;
    bool dump;
};
#define LINK(list, item)                                                                           \
    do {                                                                                           \
        (item)->link = &(list);                                                                    \
        (item)->next = (list);                                                                     \
        if ((item)->next)                                                                          \
            (item)->next->link = &(item)->next;                                                    \
        (list) = (item);                                                                           \
    } while (0)
#define UNLINK(item)                                                                               \
    do {                                                                                           \
        if ((item)->next)                                                                          \
            (item)->next->link = (item)->link;                                                     \
        if ((item)->link)                                                                          \
            *(item)->link = (item)->next;                                                          \
        (item)->next = NULL;                                                                       \
        (item)->link = NULL;                                                                       \
    } while (0)

/* Whether a Store can be used; else an exception. */
bool ext_store_usable(const Store *s);
/* Sets the exception for an error of a call; returns NULL. */
PyObject *ext_store_error(const Store *s, int err);
/* Around a call of the core, without the GIL: false when the store has been closed meanwhile. */
bool ext_store_enter(Store *s);
void ext_store_leave(Store *s);

/* Around a call that uses the map without the GIL. */
void ext_map_hold(Map *m);
void ext_map_release(Map *m);

PyObject *ext_close_all(PyObject *module, PyObject *unused);
PyObject *ext_load(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *ext_dump(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *ext_load_sg(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *ext_dump_sg(PyObject *self, PyObject *args, PyObject *kwargs);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * _ucm_task.c - loads and dumps, and the type Task.
 *
 * Keys and numbers are copied by the core during the call, and the core keeps the map.  The iovecs
 * of a call with explicit addresses are freed by the notification that they are RELEASED, so a Task
 * may go before that.  The memory of the engine is the engine's to keep.
 */
#include <time.h>
#include <unistd.h>

#include "_ucm.h"

enum {
    SIGNALS_MS = 500, /* how long a wait may keep Ctrl-C from Python */
    MAX_LENS = 65536  /* pieces of one entry */
};

/* ---- submitting ---- */

/* A Task that is on the store's list but not yet submitted.  Reading the arguments may have run
 * Python code, which may have closed the store: looked at here, with nothing in between. */
static Task *new_task(Store *s, bool dump, size_t n)
{
    if (!ext_store_usable(s))
        return NULL;
    PyTypeObject *type = ext_state_of((PyObject *)s)->task;
    allocfunc alloc = PyType_GetSlot(type, Py_tp_alloc);
    Task *t = (Task *)alloc(type, 0);
    if (!t)
        return NULL;
    t->store = (Store *)Py_NewRef((PyObject *)s);
    t->n = n;
    t->dump = dump;
    LINK(s->tasks, t);
    return t;
}

static PyObject *submitted(Task *t, int err)
{
    if (!err)
        return (PyObject *)t;
    ext_store_error(t->store, err);
    Py_DECREF((PyObject *)t);
    return NULL;
}

struct batch_args {
    Map *map;
    PyObject *keys, *blocks, *depths;
    long long shard, nshards, group, timeout_ms;
    unsigned long long after;
};

static bool map_usable(const Store *s, const Map *m)
{
    if (m->store != s)
        PyErr_SetString(PyExc_ValueError, "map: belongs to another store");
    else if (m->freed)
        PyErr_SetString(PyExc_ValueError, "map: freed");
    else
        return true;
    return false;
}

static int check_count(const char *name, const Py_buffer *view, size_t want, const char *why)
{
    size_t have = (size_t)(view->len / view->itemsize);
    if (have == want)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: %zu items, %zu are needed (%s)", name, have, want, why);
    return -1;
}

/* The core says -EINVAL for a block number out of its map or a shard that is not there. */
static PyObject *refuse_batch(Task *t)
{
    Py_DECREF((PyObject *)t);
    PyErr_SetString(PyExc_ValueError, "blocks, shard, nshards: a block number is beyond the map's "
                                      "nblocks, or there are no such shards");
    return NULL;
}

static PyObject *submit_batch(Store *s, Map *map, const struct ucm_batch *b, bool dump)
{
    int err = -ESHUTDOWN;
    Task *t = map_usable(s, map) ? new_task(s, dump, b->n) : NULL;
    if (!t)
        return NULL;
    ext_map_hold(map);
    Py_BEGIN_ALLOW_THREADS
    if (ext_store_enter(s)) {
        err = dump ? ucm_dump(s->store, map->map, b, &t->task)
                   : ucm_load(s->store, map->map, b, &t->task);
        ext_store_leave(s);
    }
    Py_END_ALLOW_THREADS
    ext_map_release(map);
    return err == -EINVAL ? refuse_batch(t) : submitted(t, err);
}

static PyObject *run_batch(Store *s, const struct batch_args *a, bool dump)
{
    struct ucm_batch b = {.after = (void *)(uintptr_t)a->after};
    Py_buffer keys, blocks, depths = {0};
    PyObject *result = NULL;
    if (!ext_store_usable(s) || ext_u32("shard", a->shard, &b.shard) ||
        ext_u32("nshards", a->nshards, &b.nshards) || ext_u32("group", a->group, &b.group) ||
        ext_u32("timeout_ms", a->timeout_ms, &b.timeout_ms) ||
        ext_buffer_keys(a->keys, &keys, &b.n))
        return NULL;
    if (ext_buffer_uint(a->blocks, "blocks", 4, &blocks))
        goto keys;
    if (a->depths != Py_None && ext_buffer_uint(a->depths, "depths", 4, &depths))
        goto blocks;
    if (check_count("blocks", &blocks, b.n * a->map->blocks_per_key,
                    "blocks_per_key for each key") ||
        (depths.obj && check_count("depths", &depths, b.n, "one for each key")))
        goto depths;
    b.keys = keys.buf;
    b.blocks = blocks.buf;
    b.depths = depths.buf;
    result = submit_batch(s, a->map, &b, dump);
depths:
    if (depths.obj)
        PyBuffer_Release(&depths);
blocks:
    PyBuffer_Release(&blocks);
keys:
    PyBuffer_Release(&keys);
    return result;
}

PyObject *ext_load(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map",     "keys",  "blocks", "depths",     "shard",
                            "nshards", "group", "after",  "timeout_ms", NULL};
    struct batch_args a = {.depths = Py_None};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OO|OLLLKL:load", names,
                                     ext_state_of(self)->map, &a.map, &a.keys, &a.blocks, &a.depths,
                                     &a.shard, &a.nshards, &a.group, &a.after, &a.timeout_ms))
        return NULL;
    return run_batch((Store *)self, &a, false);
}

PyObject *ext_dump(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map", "keys", "blocks", "depths", "shard", "nshards", "after", NULL};
    struct batch_args a = {.depths = Py_None};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OO|OLLK:dump", names, ext_state_of(self)->map,
                                     &a.map, &a.keys, &a.blocks, &a.depths, &a.shard, &a.nshards,
                                     &a.after))
        return NULL;
    return run_batch((Store *)self, &a, true);
}

/* ---- explicit addresses ---- */

struct sg_args {
    PyObject *keys, *shards, *addrs, *lens, *depths;
    unsigned long long after;
    uint32_t nshards;
    size_t n;
};

/* The entries, and in *iov_p their iovecs; NULL and an exception when the parts do not fit. */
static struct ucm_sg *make_sg(const Store *s, const Py_buffer v[5], size_t n, uint32_t nshards,
                              struct iovec **iov_p)
{
    const uint32_t *shards = v[1].buf, *depths = v[4].buf;
    const uint64_t *addrs = v[2].buf, *lens = v[3].buf;
    size_t k = (size_t)v[3].len / sizeof *lens;
    uint64_t sum = 0;
    if (k > MAX_LENS) {
        PyErr_Format(PyExc_ValueError, "lens: %zu items, at most %d are possible", k, MAX_LENS);
        return NULL;
    }
    if (check_count("shards", &v[1], n, "one for each key") ||
        check_count("addrs", &v[2], n * k, "one for each key and length") ||
        (depths && check_count("depths", &v[4], n, "one for each key")))
        return NULL;
    for (size_t i = 0; i < k; i++)
        sum += lens[i];
    if (sum != nshards * s->shard_size || !nshards) {
        PyErr_Format(PyExc_ValueError,
                     "lens: %llu bytes in all, %u shards of %llu bytes are needed",
                     (unsigned long long)sum, nshards, s->shard_size);
        return NULL;
    }
    struct ucm_sg *sg = calloc(n + 1, sizeof *sg);
    struct iovec *iov = calloc(n * k + 1, sizeof *iov);
    if (!sg || !iov) {
        free(sg);
        free(iov);
        PyErr_NoMemory();
        return NULL;
    }
    for (size_t i = 0; i < n; i++) {
        sg[i] = (struct ucm_sg){.key = ((const ucm_key *)v[0].buf)[i],
                                .depth = depths ? depths[i] : 0,
                                .shard = shards[i],
                                .nshards = nshards,
                                .niov = (unsigned)k,
                                .iov = iov + i * k};
        for (size_t p = 0; p < k; p++)
            iov[i * k + p] = (struct iovec){(void *)(uintptr_t)addrs[i * k + p], lens[p]};
    }
    *iov_p = iov;
    return sg;
}

static void free_iov(void *iov, int err)
{
    free(iov);
}

/* Takes iov over, whatever comes of it. */
static PyObject *submit_sg(Store *s, const struct ucm_sg *sg, struct iovec *iov,
                           const struct sg_args *a, bool dump)
{
    void *after = (void *)(uintptr_t)a->after;
    int err = -ESHUTDOWN;
    Task *t = new_task(s, dump, a->n);
    if (!t) {
        free(iov);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    if (ext_store_enter(s)) {
        err = dump ? ucm_dump_sg(s->store, sg, a->n, after, &t->task)
                   : ucm_load_sg(s->store, sg, a->n, after, &t->task);
        if (!err)
            ucm_task_notify(t->task, UCM_RELEASED, free_iov, iov);
        ext_store_leave(s);
    }
    Py_END_ALLOW_THREADS
    if (err)
        free(iov);
    if (err != -EINVAL)
        return submitted(t, err);
    Py_DECREF((PyObject *)t);
    PyErr_SetString(PyExc_ValueError,
                    "shards, addrs: an entry has no such shards, or an address is 0");
    return NULL;
}

static PyObject *run_sg(PyObject *self, PyObject *args, PyObject *kwargs, bool dump)
{
    static char *names[] = {"keys", "shards", "nshards", "addrs", "lens", "after", "depths", NULL};
    Store *s = (Store *)self;
    struct sg_args a = {.depths = Py_None};
    long long nshards;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, dump ? "OOLOO|KO:dump_sg" : "OOLOO|KO:load_sg",
                                     names, &a.keys, &a.shards, &nshards, &a.addrs, &a.lens,
                                     &a.after, &a.depths) ||
        ext_u32("nshards", nshards, &a.nshards) || !ext_store_usable(s))
        return NULL;
    Py_buffer v[5] = {{0}};
    struct ucm_sg *sg = NULL;
    struct iovec *iov = NULL;
    PyObject *result = NULL;
    if (!ext_buffer_keys(a.keys, &v[0], &a.n) && !ext_buffer_uint(a.shards, "shards", 4, &v[1]) &&
        !ext_buffer_uint(a.addrs, "addrs", 8, &v[2]) &&
        !ext_buffer_uint(a.lens, "lens", 8, &v[3]) &&
        (a.depths == Py_None || !ext_buffer_uint(a.depths, "depths", 4, &v[4])) &&
        (sg = make_sg(s, v, a.n, a.nshards, &iov)))
        result = submit_sg(s, sg, iov, &a, dump);
    free(sg);
    for (size_t i = 0; i < sizeof v / sizeof *v; i++)
        if (v[i].obj)
            PyBuffer_Release(&v[i]);
    return result;
}

PyObject *ext_load_sg(PyObject *self, PyObject *args, PyObject *kwargs)
{
    return run_sg(self, args, kwargs, false);
}

PyObject *ext_dump_sg(PyObject *self, PyObject *args, PyObject *kwargs)
{
    return run_sg(self, args, kwargs, true);
}

/* ---- Task ---- */

static bool task_usable(const Task *t)
{
    return ext_store_usable(t->store);
}

static int parse_stage(const char *text, enum ucm_stage *stage)
{
    if (strcmp(text, "released") == 0)
        *stage = UCM_RELEASED;
    else if (strcmp(text, "stored") == 0)
        *stage = UCM_STORED;
    else {
        PyErr_Format(PyExc_ValueError, "stage: \"%s\" is neither released nor stored", text);
        return -1;
    }
    return 0;
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* One stretch of a wait.  shard < 0: for the stage. */
static int wait_some(Task *t, enum ucm_stage stage, long long shard, int ms)
{
    int err = -ESHUTDOWN;
    Py_BEGIN_ALLOW_THREADS
    if (ext_store_enter(t->store)) {
        err = shard < 0 ? ucm_task_wait(t->task, stage, ms)
                        : ucm_task_wait_shard(t->task, (unsigned)shard, ms);
        ext_store_leave(t->store);
    }
    Py_END_ALLOW_THREADS
    return err;
}

/* Waits in stretches, so that signals reach Python.  -ETIMEDOUT may also be how a block ended: then
 * it comes before the stretch is over. */
static PyObject *wait_all(Task *t, enum ucm_stage stage, long long shard, int timeout_ms)
{
    int64_t end = timeout_ms < 0 ? INT64_MAX : now_ms() + timeout_ms;
    for (;;) {
        if (!task_usable(t))
            return NULL;
        int64_t begin = now_ms(), left = end > begin ? end - begin : 0;
        int ms = left < SIGNALS_MS ? (int)left : SIGNALS_MS;
        int err = wait_some(t, stage, shard, ms);
        if (err != -ETIMEDOUT || left <= SIGNALS_MS || now_ms() < begin + ms) {
            if (!err)
                Py_RETURN_NONE;
            return ext_store_error(t->store, err);
        }
        if (PyErr_CheckSignals())
            return NULL;
    }
}

static PyObject *task_wait(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"stage", "timeout_ms", NULL};
    const char *text = "released";
    int timeout_ms = -1;
    enum ucm_stage stage;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|si:wait", names, &text, &timeout_ms) ||
        parse_stage(text, &stage))
        return NULL;
    return wait_all((Task *)self, stage, -1, timeout_ms);
}

static PyObject *task_wait_shard(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"shard", "timeout_ms", NULL};
    long long value;
    uint32_t shard;
    int timeout_ms = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L|i:wait_shard", names, &value, &timeout_ms) ||
        ext_u32("shard", value, &shard))
        return NULL;
    return wait_all((Task *)self, UCM_RELEASED, shard, timeout_ms);
}

/* The one argument of done and elapsed: 0, or -1 with an exception. */
static int read_stage(Task *t, PyObject *args, PyObject *kwargs, enum ucm_stage *stage_p)
{
    static char *names[] = {"stage", NULL};
    const char *text = "released";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|s", names, &text) ||
        parse_stage(text, stage_p) || !task_usable(t))
        return -1;
    return 0;
}

static PyObject *task_done(PyObject *self, PyObject *args, PyObject *kwargs)
{
    Task *t = (Task *)self;
    enum ucm_stage stage;
    if (read_stage(t, args, kwargs, &stage))
        return NULL;
    return PyBool_FromLong(ucm_task_done(t->task, stage));
}

static PyObject *task_elapsed(PyObject *self, PyObject *args, PyObject *kwargs)
{
    Task *t = (Task *)self;
    enum ucm_stage stage;
    if (read_stage(t, args, kwargs, &stage))
        return NULL;
    int64_t ns = ucm_task_ns(t->task, stage);
    if (ns < 0)
        Py_RETURN_NONE;
    return PyFloat_FromDouble((double)ns / 1e9);
}

static PyObject *task_status(PyObject *self, PyObject *arg)
{
    Task *t = (Task *)self;
    Py_ssize_t i = PyNumber_AsSsize_t(arg, PyExc_IndexError);
    if (PyErr_Occurred() || !task_usable(t))
        return NULL;
    if (i < 0 || (size_t)i >= t->n)
        return PyErr_Format(PyExc_IndexError, "status: there is no entry %zd of %zu", i, t->n);
    return PyLong_FromLong(ucm_task_status(t->task, (size_t)i));
}

static PyObject *task_failed(PyObject *self, PyObject *unused)
{
    Task *t = (Task *)self;
    PyObject *list = task_usable(t) ? PyList_New(0) : NULL;
    for (size_t i = 0; list && i < t->n; i++) {
        int err = ucm_task_status(t->task, i);
        if (!err || err == -EINPROGRESS)
            continue;
        PyObject *index = PyLong_FromSize_t(i);
        if (!index || PyList_Append(list, index))
            Py_CLEAR(list);
        Py_XDECREF(index);
    }
    return list;
}

static PyObject *task_cancel(PyObject *self, PyObject *unused)
{
    Task *t = (Task *)self;
    if (!task_usable(t))
        return NULL;
    ucm_task_cancel(t->task);
    Py_RETURN_NONE;
}

static Py_ssize_t task_length(PyObject *self)
{
    Task *t = (Task *)self;
    return task_usable(t) ? (Py_ssize_t)t->n : -1;
}

static void task_dealloc(PyObject *self)
{
    Task *t = (Task *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (t->store->pid == getpid()) {
        UNLINK(t);
        ucm_task_free(t->task);
    }
    Py_DECREF((PyObject *)t->store);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyMethodDef task_methods[] = {
    {"wait", KEYWORDS(task_wait),
     "wait(stage='released', timeout_ms=-1): until all blocks have reached it; OSError with the "
     "first "
     "error met, TimeoutError when it took longer (the task goes on)"},
    {"wait_shard", KEYWORDS(task_wait_shard),
     "wait_shard(shard, timeout_ms=-1): until this shard of all blocks of a load is there"},
    {"done", KEYWORDS(task_done),
     "done(stage='released') -> bool: reached by all, failed ones included"},
    {"elapsed", KEYWORDS(task_elapsed),
     "elapsed(stage='released') -> seconds from the start until it was reached, or None"},
    {"status", task_status, METH_O, "status(i) -> int: 0, a negative errno, or -EINPROGRESS"},
    {"failed", task_failed, METH_NOARGS,
     "failed() -> list of the entries that ended with an error"},
    {"cancel", task_cancel, METH_NOARGS, "cancel(): what has not started ends with ECANCELED"},
    {0},
};

static PyType_Slot task_slots[] = {
    {Py_tp_doc,
     (void *)"One load or dump under way.  len() is the number of its entries.\n\n"
             "A Task that is dropped cancels a load and lets a dump go on; the engine's memory "
             "is in use until RELEASED all the same."},
    {Py_tp_dealloc, task_dealloc},
    {Py_tp_methods, task_methods},
    {Py_sq_length, task_length},
    {0},
};

PyType_Spec ext_task_spec = {"ucm.Task", sizeof(Task), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, task_slots};

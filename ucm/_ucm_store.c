/* SPDX-License-Identifier: Apache-2.0 */
/*
 * _ucm_store.c - the types Store and Map: opening and closing, lookups, metrics, where blocks lie.
 *
 * What closing must take care of is said in _ucm.h.
 */
#include <unistd.h>

#include "_ucm.h"

/* ---- the life of a store ---- */

bool ext_store_usable(const Store *s)
{
    if (s->pid != getpid())
        PyErr_SetString(PyExc_ValueError,
                        "Store: opened by another process; a store does not survive fork()");
    else if (s->closed)
        PyErr_SetString(PyExc_ValueError, "Store: closed");
    else
        return true;
    return false;
}

PyObject *ext_store_error(const Store *s, int err)
{
    if (err == -ESHUTDOWN && !ext_store_usable(s)) /* closed while the call was on its way */
        return NULL;
    return ext_os_error(err, NULL);
}

bool ext_store_enter(Store *s)
{
    pthread_rwlock_rdlock(&s->life);
    if (!s->closed)
        return true;
    pthread_rwlock_unlock(&s->life);
    return false;
}

void ext_store_leave(Store *s)
{
    pthread_rwlock_unlock(&s->life);
}

/* Without the GIL.  When it returns the engine's memory is no longer touched, but by storage that
 * has hung for longer than timeout_ms while it read into it. */
static void destroy(Store *s)
{
    pthread_rwlock_wrlock(&s->life);
    for (Task *t = s->tasks; t; t = t->next) {
        ucm_task_free(t->task);
        t->task = NULL;
    }
    for (Map *m = s->maps; m; m = m->next) {
        ucm_map_free(m->map);
        m->map = NULL;
    }
    ucm_store_close(s->store);
    s->store = NULL;
    pthread_rwlock_unlock(&s->life);
}

static void store_end(Store *s)
{
    if (s->pid != getpid())
        return;
    if (s->closed) { /* by another thread, perhaps only just: gone when this returns */
        Py_BEGIN_ALLOW_THREADS
        pthread_rwlock_rdlock(&s->life);
        pthread_rwlock_unlock(&s->life);
        Py_END_ALLOW_THREADS
        return;
    }
    s->closed = true;
    UNLINK(s);
    for (Task *t = s->tasks; t; t = t->next) {
        Py_INCREF((PyObject *)t); /* on the list until the store is gone */
        if (!t->dump && t->task)
            ucm_task_cancel(t->task);
    }
    for (Map *m = s->maps; m; m = m->next)
        Py_INCREF((PyObject *)m);
    Py_BEGIN_ALLOW_THREADS
    destroy(s);
    Py_END_ALLOW_THREADS
    for (Task *t; (t = s->tasks);) {
        UNLINK(t);
        Py_DECREF((PyObject *)t);
    }
    for (Map *m; (m = s->maps);) {
        UNLINK(m);
        Py_DECREF((PyObject *)m);
    }
}

/* For the end of the interpreter: while modules are torn down the engine's memory goes, in any
 * order, and by then nobody may be reading or writing it any more. */
PyObject *ext_close_all(PyObject *module, PyObject *unused)
{
    struct ext_state *state = PyModule_GetState(module);
    for (Store *s; (s = state->stores);) {
        Py_INCREF((PyObject *)s);
        UNLINK(s);
        store_end(s);
        Py_DECREF((PyObject *)s);
    }
    Py_RETURN_NONE;
}

static void read_geometry(Store *s, const ucm_conf *conf)
{
    const char *block = ucm_conf_get(conf, "block_size"), *shard = ucm_conf_get(conf, "shard_size");
    s->block_size = block ? strtoull(block, NULL, 10) : 0;
    s->shard_size = shard ? strtoull(shard, NULL, 10) : 0;
    if (!s->shard_size)
        s->shard_size = s->block_size;
}

static int store_begin(Store *s, PyObject *conf_object)
{
    ucm_conf *conf = ext_conf_borrow(conf_object);
    if (!conf)
        return -1;
    int err;
    Py_BEGIN_ALLOW_THREADS
    err = ucm_store_open(conf, &s->store);
    Py_END_ALLOW_THREADS
    if (err) {
        ext_os_error(err, ucm_conf_error(conf));
    } else {
        read_geometry(s, conf);
        s->closed = false;
    }
    ext_conf_return(conf_object);
    return err ? -1 : 0;
}

static PyObject *store_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"conf", NULL};
    struct ext_state *state = PyType_GetModuleState(type);
    PyObject *conf;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Store", names, &conf) || ext_log_begin(state))
        return NULL;
    if (Py_IS_TYPE(conf, state->conf)) {
        Py_INCREF(conf);
    } else if (PyDict_Check(conf)) {
        conf = PyObject_CallFunctionObjArgs((PyObject *)state->conf, conf, NULL);
        if (!conf)
            return NULL;
    } else {
        return PyErr_Format(PyExc_TypeError, "conf: a Conf or a dict is needed, not %R",
                            Py_TYPE(conf));
    }
    allocfunc alloc = PyType_GetSlot(type, Py_tp_alloc);
    Store *s = (Store *)alloc(type, 0);
    if (s) {
        pthread_rwlock_init(&s->life, NULL);
        s->closed = true;
        s->pid = getpid();
        if (store_begin(s, conf))
            Py_CLEAR(s);
        else
            LINK(state->stores, s);
    }
    Py_DECREF(conf);
    return (PyObject *)s;
}

static void store_dealloc(PyObject *self)
{
    Store *s = (Store *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject *error_type, *error, *trace;
    PyErr_Fetch(&error_type, &error, &trace);
    UNLINK(s);
    store_end(s);
    PyErr_Restore(error_type, error, trace);
    if (s->pid == getpid())
        pthread_rwlock_destroy(&s->life);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *store_close(PyObject *self, PyObject *unused)
{
    store_end((Store *)self);
    Py_RETURN_NONE;
}

static PyObject *store_enter(PyObject *self, PyObject *unused)
{
    return ext_store_usable((Store *)self) ? Py_NewRef(self) : NULL;
}

static PyObject *store_exit(PyObject *self, PyObject *unused)
{
    return store_close(self, NULL);
}

/* ---- lookups ---- */

typedef ssize_t look_up(ucm_store *store, const ucm_key *keys, size_t n, uint8_t *found);

static PyObject *by(look_up *how, PyObject *self, PyObject *keys)
{
    Store *s = (Store *)self;
    Py_buffer view;
    size_t n;
    if (!ext_store_usable(s) || ext_buffer_keys(keys, &view, &n))
        return NULL;
    ssize_t rc = -ESHUTDOWN;
    PyObject *found = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n);
    if (found) {
        uint8_t *out = (uint8_t *)PyBytes_AsString(found);
        Py_BEGIN_ALLOW_THREADS
        if (ext_store_enter(s)) {
            rc = how(s->store, view.buf, n, out);
            ext_store_leave(s);
        }
        Py_END_ALLOW_THREADS
        if (rc < 0) {
            Py_CLEAR(found);
            ext_store_error(s, (int)rc);
        }
    }
    PyBuffer_Release(&view);
    return found;
}

static PyObject *store_lookup(PyObject *self, PyObject *keys)
{
    return by(ucm_lookup, self, keys);
}

static PyObject *store_peek(PyObject *self, PyObject *keys)
{
    return by(ucm_peek, self, keys);
}

static PyObject *store_lookup_prefix(PyObject *self, PyObject *keys)
{
    Store *s = (Store *)self;
    Py_buffer view;
    size_t n;
    if (!ext_store_usable(s) || ext_buffer_keys(keys, &view, &n))
        return NULL;
    ssize_t rc = -ESHUTDOWN;
    Py_BEGIN_ALLOW_THREADS
    if (ext_store_enter(s)) {
        rc = ucm_lookup_prefix(s->store, view.buf, n);
        ext_store_leave(s);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return rc < 0 ? ext_store_error(s, (int)rc) : PyLong_FromSsize_t(rc);
}

static PyObject *store_prefetch(PyObject *self, PyObject *keys)
{
    Store *s = (Store *)self;
    Py_buffer view;
    size_t n;
    if (!ext_store_usable(s) || ext_buffer_keys(keys, &view, &n))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (ext_store_enter(s)) {
        ucm_prefetch(s->store, view.buf, n);
        ext_store_leave(s);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *store_removed(PyObject *self, PyObject *unused)
{
    Store *s = (Store *)self;
    ucm_key keys[1024];
    uint64_t lost = 0;
    if (!ext_store_usable(s))
        return NULL;
    ssize_t rc = -ESHUTDOWN;
    Py_BEGIN_ALLOW_THREADS
    if (ext_store_enter(s)) {
        rc = ucm_removed(s->store, keys, sizeof keys / sizeof *keys, &lost);
        ext_store_leave(s);
    }
    Py_END_ALLOW_THREADS
    if (rc < 0)
        return ext_store_error(s, (int)rc);
    return Py_BuildValue(
        "NK", PyBytes_FromStringAndSize((const char *)keys, rc * (Py_ssize_t)sizeof *keys),
        (unsigned long long)lost);
}

/* ---- metrics, geometry ---- */

static void add_metric(void *arg, const struct ucm_metric_info *m)
{
    PyObject **dict = arg;
    PyObject *value = *dict ? PyFloat_FromDouble(m->value) : NULL;
    if (*dict && (!value || PyDict_SetItemString(*dict, m->name, value)))
        Py_CLEAR(*dict);
    Py_XDECREF(value);
}

static PyObject *store_metrics(PyObject *self, PyObject *unused)
{
    Store *s = (Store *)self;
    if (!ext_store_usable(s))
        return NULL;
    PyObject *dict = PyDict_New();
    if (dict)
        ucm_metrics(s->store, add_metric, &dict);
    return dict;
}

static PyObject *get_block_size(PyObject *self, void *unused)
{
    return PyLong_FromUnsignedLongLong(((Store *)self)->block_size);
}

static PyObject *get_shard_size(PyObject *self, void *unused)
{
    return PyLong_FromUnsignedLongLong(((Store *)self)->shard_size);
}

static PyObject *get_nshards(PyObject *self, void *unused)
{
    return PyLong_FromUnsignedLongLong(((Store *)self)->block_size / ((Store *)self)->shard_size);
}

static PyObject *get_closed(PyObject *self, void *unused)
{
    return PyBool_FromLong(((Store *)self)->closed);
}

/* ---- maps ---- */

static int read_segment(PyObject *o, size_t shard, size_t i, struct ucm_seg *seg)
{
    size_t v[3];
    PyObject *t = PySequence_Check(o) && PySequence_Size(o) == 3 ? PySequence_Tuple(o) : NULL;
    for (int k = 0; t && k < 3; k++) {
        PyObject *number = PyNumber_Index(PyTuple_GetItem(t, k));
        v[k] = number ? PyLong_AsSize_t(number) : 0;
        Py_XDECREF(number);
        if (PyErr_Occurred())
            Py_CLEAR(t);
    }
    if (!t) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError,
                     "segments[%zu][%zu]: (address, stride, length) in bytes is needed, not %R",
                     shard, i, o);
        return -1;
    }
    Py_DECREF(t);
    *seg = (struct ucm_seg){(void *)v[0], v[1], v[2]};
    return 0;
}

/* Reads one shard's segments into segs, which has room for nsegs. */
static int read_shard(PyObject *o, size_t shard, size_t nsegs, struct ucm_seg *segs)
{
    if (!o || !PySequence_Check(o) || PySequence_Size(o) != (Py_ssize_t)nsegs) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "segments[%zu]: not a sequence of %zu segments as the first",
                     shard, nsegs);
        return -1;
    }
    for (size_t i = 0; i < nsegs; i++) {
        PyObject *item = PySequence_GetItem(o, (Py_ssize_t)i);
        int rc = item ? read_segment(item, shard, i, &segs[i]) : -1;
        Py_XDECREF(item);
        if (rc)
            return -1;
    }
    return 0;
}

static struct ucm_seg *read_segments(PyObject *o, unsigned *nshards_p, unsigned *nsegs_p)
{
    Py_ssize_t nshards = PySequence_Check(o) ? PySequence_Size(o) : -1;
    PyObject *first = nshards > 0 ? PySequence_GetItem(o, 0) : NULL;
    Py_ssize_t nsegs = first && PySequence_Check(first) ? PySequence_Size(first) : -1;
    Py_XDECREF(first);
    if (nsegs < 1 || nshards > 65536 || nsegs > 65536) {
        PyErr_Clear();
        PyErr_SetString(PyExc_ValueError,
                        "segments: a sequence over shards of sequences of (address, "
                        "stride, length) is needed");
        return NULL;
    }
    struct ucm_seg *segs = calloc((size_t)nshards * (size_t)nsegs, sizeof *segs);
    if (!segs)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; segs && i < nshards; i++) {
        PyObject *shard = PySequence_GetItem(o, i);
        if (read_shard(shard, (size_t)i, (size_t)nsegs, &segs[i * nsegs])) {
            free(segs);
            segs = NULL;
        }
        Py_XDECREF(shard);
    }
    *nshards_p = (unsigned)nshards;
    *nsegs_p = (unsigned)nsegs;
    return segs;
}

/* ucm_map_new says only that something is wrong; here is what. */
static PyObject *refuse_map(const Store *s, const struct ucm_map_desc *d)
{
    unsigned long long nshards = s->block_size / s->shard_size;
    if (d->nshards != nshards)
        return PyErr_Format(PyExc_ValueError, "segments: %u shards, the store has %llu", d->nshards,
                            nshards);
    for (unsigned sh = 0; sh < d->nshards; sh++) {
        unsigned long long sum = 0;
        for (unsigned i = 0; i < d->nsegs; i++)
            sum += (unsigned long long)d->segs[sh * d->nsegs + i].len * d->blocks_per_key;
        if (sum != s->shard_size)
            return PyErr_Format(PyExc_ValueError,
                                "segments[%u]: %llu bytes over %u blocks per key, a shard has %llu",
                                sh, sum, d->blocks_per_key, s->shard_size);
    }
    return PyErr_Format(PyExc_ValueError,
                        "map: %u segments a shard and %u blocks per key are not "
                        "possible, or a segment has no address",
                        d->nsegs, d->blocks_per_key);
}

static PyObject *new_map(Store *s, const struct ucm_map_desc *d)
{
    PyTypeObject *type = ext_state_of((PyObject *)s)->map;
    allocfunc alloc = PyType_GetSlot(type, Py_tp_alloc);
    Map *m = (Map *)alloc(type, 0);
    if (!m)
        return NULL;
    m->store = (Store *)Py_NewRef((PyObject *)s);
    m->blocks_per_key = d->blocks_per_key;
    int err = ucm_map_new(s->store, d, &m->map);
    if (!err) {
        LINK(s->maps, m);
        return (PyObject *)m;
    }
    Py_DECREF((PyObject *)m);
    return err == -EINVAL ? refuse_map(s, d) : ext_os_error(err, NULL);
}

static PyObject *store_map(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"segments", "blocks_per_key", "nblocks", NULL};
    Store *s = (Store *)self;
    PyObject *segments;
    long long per_key, nblocks;
    struct ucm_map_desc d;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OLL:map", names, &segments, &per_key,
                                     &nblocks) ||
        ext_u32("blocks_per_key", per_key, &d.blocks_per_key) ||
        ext_u32("nblocks", nblocks, &d.nblocks))
        return NULL;
    struct ucm_seg *segs = read_segments(segments, &d.nshards, &d.nsegs);
    if (!segs)
        return NULL;
    d.segs = segs;
    PyObject *m = ext_store_usable(s) ? new_map(s, &d) : NULL;
    free(segs);
    return m;
}

static void drop_map(Map *m)
{
    if (!m->freed || m->users || !m->link || m->store->closed || m->store->pid != getpid())
        return;
    UNLINK(m);
    ucm_map_free(m->map);
    m->map = NULL;
}

void ext_map_hold(Map *m)
{
    m->users++;
}

void ext_map_release(Map *m)
{
    m->users--;
    drop_map(m);
}

static PyObject *map_free(PyObject *self, PyObject *unused)
{
    Map *m = (Map *)self;
    m->freed = true;
    drop_map(m);
    Py_RETURN_NONE;
}

static void map_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(map_free(self, NULL));
    Py_XDECREF((PyObject *)((Map *)self)->store);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* ---- the types ---- */

static PyMethodDef store_methods[] = {
    {"close", store_close, METH_NOARGS,
     "close(): finishes the dumps under way (timeout_ms at most), cancels the rest; Tasks and Maps "
     "of "
     "the store cannot be used afterwards"},
    {"__enter__", store_enter, METH_NOARGS, NULL},
    {"__exit__", store_exit, METH_VARARGS, NULL},
    {"lookup", store_lookup, METH_O,
     "lookup(keys) -> bytes: one for each 16-byte key, 0 where absent, else 1 + the index of the "
     "slowest tier that must be asked"},
    {"peek", store_peek, METH_O,
     "peek(keys) -> bytes: as lookup, by what is known already; does not count as a use"},
    {"lookup_prefix", store_lookup_prefix, METH_O,
     "lookup_prefix(keys) -> int: how many leading keys can be loaded, on every rank"},
    {"removed", store_removed, METH_NOARGS,
     "removed() -> (keys, lost): up to 1024 keys, 16 bytes each, of blocks that are no longer in "
     "storage;\n"
     "lost: how many more have gone, or may have, without a name.  The first call begins to keep "
     "them"},
    {"prefetch", store_prefetch, METH_O, "prefetch(keys): a hint that these will be loaded soon"},
    {"map", KEYWORDS(store_map),
     "map(segments, blocks_per_key, nblocks) -> Map: where the engine keeps its blocks;\n"
     "segments[shard][i] = (address, stride, length)"},
    {"load", KEYWORDS(ext_load),
     "load(map, keys, blocks, depths=None, shard=0, nshards=0, group=0, after=0, timeout_ms=0) "
     "-> Task"},
    {"dump", KEYWORDS(ext_dump),
     "dump(map, keys, blocks, depths=None, shard=0, nshards=0, after=0) -> Task"},
    {"load_sg", KEYWORDS(ext_load_sg),
     "load_sg(keys, shards, nshards, addrs, lens, after=0, depths=None) -> Task:\n"
     "entry i is nshards shards from shards[i] on, at addrs[i * k ...], of lens[0 ... k) bytes "
     "each"},
    {"dump_sg", KEYWORDS(ext_dump_sg),
     "dump_sg(keys, shards, nshards, addrs, lens, after=0, depths=None) -> Task"},
    {"metrics", store_metrics, METH_NOARGS, "metrics() -> dict of float"},
    {0},
};

static PyGetSetDef store_getset[] = {
    {"block_size", get_block_size, NULL, "bytes of a block", NULL},
    {"shard_size", get_shard_size, NULL, "bytes of a shard", NULL},
    {"nshards", get_nshards, NULL, "shards of a block", NULL},
    {"closed", get_closed, NULL, "whether close() was called", NULL},
    {0},
};

static PyType_Slot store_slots[] = {
    {Py_tp_doc,
     (void *)"Store(conf): opens the stack of tiers that conf, a Conf or a dict, describes."},
    {Py_tp_new, store_new},
    {Py_tp_dealloc, store_dealloc},
    {Py_tp_methods, store_methods},
    {Py_tp_getset, store_getset},
    {0},
};

PyType_Spec ext_store_spec = {"ucm.Store", sizeof(Store), 0, Py_TPFLAGS_DEFAULT, store_slots};

static PyMethodDef map_methods[] = {
    {"free", map_free, METH_NOARGS, "free(): tasks under way keep what they need of it"},
    {0},
};

static PyType_Slot map_slots[] = {
    {Py_tp_doc, (void *)"Where an engine keeps its blocks; made by Store.map()."},
    {Py_tp_dealloc, map_dealloc},
    {Py_tp_methods, map_methods},
    {0},
};

PyType_Spec ext_map_spec = {"ucm.Map", sizeof(Map), 0,
                            Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, map_slots};

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * _ucm.c - the module ucm._ucm: its functions, and what all its types need of Python.
 *
 * The types are in _ucm_conf.c and _ucm_store.c, the way of log lines in _ucm_log.c.  Every call
 * that can block or take long runs without the GIL, and nothing of the core ever waits for the GIL.
 */
#include "_ucm.h"

PyObject *ext_os_error(int err, const char *text)
{
    int number = err < 0 ? -err : err;
    PyObject *e = PyObject_CallFunction(PyExc_OSError, "is", number,
                                        text && *text ? text : ucm_strerror(number));
    if (e) {
        PyErr_SetObject((PyObject *)Py_TYPE(e), e);
        Py_DECREF(e);
    }
    return NULL;
}

const char *ext_text(PyObject *o, const char *name)
{
    Py_ssize_t len;
    const char *text = PyUnicode_AsUTF8AndSize(o, &len);
    if (text && strlen(text) != (size_t)len) {
        PyErr_Format(PyExc_ValueError, "%s: %R holds a zero character", name, o);
        return NULL;
    }
    return text;
}

int ext_buffer(PyObject *o, const char *name, Py_buffer *view)
{
    if (!PyObject_CheckBuffer(o)) {
        PyErr_Format(PyExc_TypeError, "%s: a contiguous buffer is needed, not %R", name,
                     Py_TYPE(o));
        return -1;
    }
    if (PyObject_GetBuffer(o, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)) {
        if (PyErr_ExceptionMatches(PyExc_BufferError) || PyErr_ExceptionMatches(PyExc_ValueError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s: the buffer is not contiguous", name);
        }
        return -1;
    }
    return 0;
}

static bool is_native_uint(const char *format)
{
    if (!format)
        return false;
    if (*format == '@' || *format == '=' || (PY_LITTLE_ENDIAN && *format == '<'))
        format++;
    return *format && strchr("ILQN", *format) && !format[1];
}

int ext_buffer_uint(PyObject *o, const char *name, Py_ssize_t itemsize, Py_buffer *view)
{
    if (ext_buffer(o, name, view))
        return -1;
    if (view->itemsize == itemsize && is_native_uint(view->format))
        return 0;
    PyErr_Format(PyExc_TypeError,
                 "%s: uint%zd items are needed, the buffer has format '%s' (%zd bytes)", name,
                 itemsize * 8, view->format ? view->format : "B", view->itemsize);
    PyBuffer_Release(view);
    return -1;
}

int ext_buffer_keys(PyObject *o, Py_buffer *view, size_t *n_p)
{
    if (ext_buffer(o, "keys", view))
        return -1;
    if (view->len % sizeof(ucm_key)) {
        PyErr_Format(PyExc_ValueError, "keys: %zd bytes is not a multiple of %zu", view->len,
                     sizeof(ucm_key));
        PyBuffer_Release(view);
        return -1;
    }
    *n_p = view->len / sizeof(ucm_key);
    return 0;
}

int ext_u32(const char *name, long long value, uint32_t *out)
{
    if (value < 0 || value > UINT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: %lld is out of range", name, value);
        return -1;
    }
    *out = (uint32_t)value;
    return 0;
}

static PyObject *version(PyObject *module, PyObject *unused)
{
    return PyUnicode_FromString(ucm_version());
}

static PyObject *error_text(PyObject *module, PyObject *arg)
{
    int err = (int)PyLong_AsLong(arg);
    if (err == -1 && PyErr_Occurred())
        return NULL;
    return PyUnicode_FromString(ucm_strerror(err));
}

/* ---- inspect ---- */

struct inspection {
    PyThreadState *thread; /* saved while the core works */
    PyObject *lanes;
    bool failed; /* an exception is set; no more Python */
};

static void visit_lane(void *arg, const struct ucm_lane_info *l)
{
    struct inspection *in = arg;
    if (in->failed)
        return;
    PyEval_RestoreThread(in->thread);
    typedef unsigned long long u64;
    PyObject *lane = Py_BuildValue(
        "{s:s, s:z, s:s, s:z, s:i, s:O, s:I, s:I, s:K, s:K, s:K, s:K, s:K, s:K, s:K, s:K, s:K, "
        "s:K, s:K, s:O}",
        "namespace", l->ns, "namespace_text", l->ns_text, "lane", l->lane, "host", l->host, "pid",
        l->pid, "live", l->live ? Py_True : Py_False, "rank", l->rank, "ranks", l->ranks,
        "block_size", (u64)l->block_size, "shard_size", (u64)l->shard_size, "epoch", (u64)l->epoch,
        "generation", (u64)l->generation, "records", (u64)l->records, "segments", (u64)l->segments,
        "slots", (u64)l->slots, "blocks", (u64)l->blocks, "bytes", (u64)l->bytes, "bad",
        (u64)l->bad, "error", (u64)l->error, "locked", l->locked ? Py_True : Py_False);
    if (!lane || PyList_Append(in->lanes, lane))
        in->failed = true;
    Py_XDECREF(lane);
    in->thread = PyEval_SaveThread();
}

PyDoc_STRVAR(inspect_doc,
             "inspect(backend, verify=False, conf) -> list of dicts\n\n"
             "The lanes of all namespaces below a storage backend; engines may be running.\n"
             "verify reads every block and counts the bad ones.  What is sealed with another key\n"
             "than the integrity_key_file of conf, a Conf, is `locked`.");

static PyObject *inspect(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"backend", "verify", "conf", NULL};
    struct ext_state *state = PyModule_GetState(module);
    PyObject *path, *conf = NULL;
    int verify = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|pO!:inspect", names, PyUnicode_FSConverter,
                                     &path, &verify, state->conf, &conf))
        return NULL;
    struct inspection in = {.lanes = PyList_New(0)};
    struct ucm_inspect how = {
        .flags = verify ? UCM_INSPECT_VERIFY : 0, .arg = &in, .lane = visit_lane};
    if (!in.lanes || ext_log_begin(state) || (conf && !(how.conf = ext_conf_borrow(conf)))) {
        Py_XDECREF(in.lanes);
        Py_DECREF(path);
        return NULL;
    }
    const char *dir = PyBytes_AsString(path);
    in.thread = PyEval_SaveThread();
    int err = ucm_inspect(dir, &how);
    PyEval_RestoreThread(in.thread);
    if (!in.failed && err < 0 && conf) {
        ext_os_error(err, ucm_conf_error(how.conf));
    } else if (!in.failed && err < 0) {
        errno = -err; /* of the directory: not in ucm's words, which are about blocks */
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, dir);
    }
    if (conf)
        ext_conf_return(conf);
    Py_DECREF(path);
    if (in.failed || err < 0)
        Py_CLEAR(in.lanes);
    return in.lanes;
}

/* ---- the module ---- */

static PyMethodDef methods[] = {
    {"version", version, METH_NOARGS, "version() -> str"},
    {"strerror", error_text, METH_O, "strerror(err) -> str: the error in ucm's words"},
    {"inspect", KEYWORDS(inspect), inspect_doc},
    {"close_all", ext_close_all, METH_NOARGS, "close_all(): closes every open store"},
    {0},
};

static int exec(PyObject *module)
{
    struct ext_state *s = PyModule_GetState(module);
    struct {
        PyTypeObject **type;
        PyType_Spec *spec;
    } types[] = {{&s->conf, &ext_conf_spec},
                 {&s->store, &ext_store_spec},
                 {&s->map, &ext_map_spec},
                 {&s->task, &ext_task_spec}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        *types[i].type = (PyTypeObject *)PyType_FromModuleAndSpec(module, types[i].spec, NULL);
        if (!*types[i].type || PyModule_AddType(module, *types[i].type))
            return -1;
    }
    if (PyModule_AddFunctions(module, ext_log_methods))
        return -1;
    return PyModule_AddIntConstant(module, "KEY_SIZE", sizeof(ucm_key));
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    struct ext_state *s = PyModule_GetState(module);
    Py_VISIT(s->conf);
    Py_VISIT(s->store);
    Py_VISIT(s->map);
    Py_VISIT(s->task);
    Py_VISIT(s->log_start);
    return 0;
}

static int clear(PyObject *module)
{
    struct ext_state *s = PyModule_GetState(module);
    Py_CLEAR(s->conf);
    Py_CLEAR(s->store);
    Py_CLEAR(s->map);
    Py_CLEAR(s->task);
    Py_CLEAR(s->log_start);
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, exec}, {0}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ucm._ucm",
    .m_doc = "The C core of ucm: Conf, Store, Map, Task.",
    .m_size = sizeof(struct ext_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__ucm(void);

PyMODINIT_FUNC PyInit__ucm(void)
{
    return PyModuleDef_Init(&definition);
}

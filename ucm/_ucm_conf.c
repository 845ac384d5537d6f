/* SPDX-License-Identifier: Apache-2.0 */
/*
 * _ucm_conf.c - the type Conf: options, before a store is opened.
 *
 * A ucm_conf belongs to one thread at a time.  `busy`, guarded by the GIL, is set while a call
 * works on it without the GIL; a second thread gets an exception.
 */
#include "_ucm.h"

typedef struct {
    PyObject_HEAD
    ucm_conf *conf;
    bool busy;
} Conf;

ucm_conf *ext_conf_borrow(PyObject *self)
{
    Conf *c = (Conf *)self;
    if (c->busy) {
        PyErr_SetString(PyExc_ValueError, "Conf: in use by another thread");
        return NULL;
    }
    c->busy = true;
    return c->conf;
}

void ext_conf_return(PyObject *self)
{
    ((Conf *)self)->busy = false;
}

/* The text of a value, as a new str. */
static PyObject *value_text(const char *key, PyObject *value)
{
    if (PyBool_Check(value))
        return PyUnicode_FromString(value == Py_True ? "true" : "false");
    if (PyUnicode_Check(value))
        return Py_NewRef(value);
    if (PyLong_Check(value) || PyFloat_Check(value))
        return PyObject_Repr(value);
    return PyErr_Format(PyExc_TypeError, "%s: %R is not a bool, int, float or str", key, value);
}

static int set_one(PyObject *self, PyObject *key, PyObject *value)
{
    if (!PyUnicode_Check(key)) {
        PyErr_Format(PyExc_TypeError, "option names are str, not %R", key);
        return -1;
    }
    const char *name = ext_text(key, "key");
    PyObject *text = name ? value_text(name, value) : NULL;
    const char *s = text ? ext_text(text, name) : NULL;
    ucm_conf *conf = s ? ext_conf_borrow(self) : NULL;
    int rc = -1;
    if (conf) {
        int err = ucm_conf_set(conf, name, s);
        if (err)
            ext_os_error(err, ucm_conf_error(conf));
        else
            rc = 0;
        ext_conf_return(self);
    }
    Py_XDECREF(text);
    return rc;
}

static int set_all(PyObject *self, PyObject *values)
{
    if (!PyDict_Check(values)) {
        PyErr_Format(PyExc_TypeError, "Conf: a dict is needed, not %R", Py_TYPE(values));
        return -1;
    }
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Next(values, &i, &key, &value);)
        if (set_one(self, key, value))
            return -1;
    return 0;
}

static PyObject *conf_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"values", NULL};
    PyObject *values = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:Conf", names, &values))
        return NULL;
    if (ext_log_begin(PyType_GetModuleState(type)))
        return NULL;
    allocfunc alloc = PyType_GetSlot(type, Py_tp_alloc);
    Conf *self = (Conf *)alloc(type, 0);
    if (!self)
        return NULL;
    int err = ucm_conf_new(&self->conf);
    if (err)
        ext_os_error(err, NULL);
    if (err || (values != Py_None && set_all((PyObject *)self, values))) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void conf_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    ucm_conf_free(((Conf *)self)->conf);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *conf_set(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"key", "value", NULL};
    PyObject *key, *value;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:set", names, &key, &value) ||
        set_one(self, key, value))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *conf_load(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"path", NULL};
    PyObject *path;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&:load", names, PyUnicode_FSConverter, &path))
        return NULL;
    ucm_conf *conf = ext_conf_borrow(self);
    int err = 0;
    if (conf) {
        const char *name = PyBytes_AsString(path);
        Py_BEGIN_ALLOW_THREADS
        err = ucm_conf_load(conf, name);
        Py_END_ALLOW_THREADS
        if (err)
            ext_os_error(err, ucm_conf_error(conf));
        ext_conf_return(self);
    }
    Py_DECREF(path);
    if (!conf || err)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *conf_env(PyObject *self, PyObject *unused)
{
    ucm_conf *conf = ext_conf_borrow(self);
    if (!conf)
        return NULL;
    int err = ucm_conf_env(conf);
    if (err)
        ext_os_error(err, ucm_conf_error(conf));
    ext_conf_return(self);
    if (err)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *conf_get(PyObject *self, PyObject *key)
{
    const char *name = ext_text(key, "key");
    ucm_conf *conf = name ? ext_conf_borrow(self) : NULL;
    if (!conf)
        return NULL;
    const char *value = ucm_conf_get(conf, name);
    PyObject *text = value ? PyUnicode_FromString(value) : NULL;
    if (!value)
        PyErr_SetObject(PyExc_KeyError, key);
    ext_conf_return(self);
    return text;
}

static void add_option(void *arg, const struct ucm_option_info *o)
{
    PyObject **list = arg;
    if (!*list)
        return;
    PyObject *item = Py_BuildValue(
        "{szszszszszszszsOsO}", "owner", o->owner, "name", o->name, "type", o->type, "value",
        o->value, "default", o->def, "range", o->range, "help", o->help,
        "obsolete", o->obsolete ? Py_True : Py_False, "given", o->given ? Py_True : Py_False);
    if (!item || PyList_Append(*list, item))
        Py_CLEAR(*list);
    Py_XDECREF(item);
}

static PyObject *conf_options(PyObject *self, PyObject *unused)
{
    ucm_conf *conf = ext_conf_borrow(self);
    PyObject *list = conf ? PyList_New(0) : NULL;
    if (list)
        ucm_options(conf, add_option, &list);
    if (conf)
        ext_conf_return(self);
    return list;
}

static PyMethodDef conf_methods[] = {
    {"set", KEYWORDS(conf_set), "set(key, value): bool, int, float or str"},
    {"load", KEYWORDS(conf_load), "load(path): reads a YAML file"},
    {"env", conf_env, METH_NOARGS, "env(): takes UCM_<KEY> from the environment for every key"},
    {"get", conf_get, METH_O, "get(key) -> str: the value in force; KeyError for an unknown key"},
    {"options", conf_options, METH_NOARGS, "options() -> list of dicts: every option there is"},
    {0},
};

static PyType_Slot conf_slots[] = {
    {Py_tp_doc, (void *)"Conf(values=None): the options of a store, checked as they are set.\n\n"
                        "An unknown key or a bad value is OSError(EINVAL) that names it."},
    {Py_tp_new, conf_new},
    {Py_tp_dealloc, conf_dealloc},
    {Py_tp_methods, conf_methods},
    {0},
};

PyType_Spec ext_conf_spec = {"ucm.Conf", sizeof(Conf), 0, Py_TPFLAGS_DEFAULT, conf_slots};

/* Python's face of attention in place: the type Prefix, which keeps the buffers that its blocks lie in. No algorithm here. */
#include "module.h"

#include <stdatomic.h>
#include <string.h>

#include "attend.h"

/* A buffer, and the segment that its blocks belong to. */
typedef struct held {
    struct held *before;
    uint32_t segment;
    Py_buffer view;
} held;

typedef struct {
    PyObject_HEAD
    am_prefix prefix;
    held *last;
    atomic_int users; /* calls that read it; -1 while it is changed */
} prefix_object;

/* ---- who may use it */

static int begin_reading(prefix_object *self)
{
    int users = atomic_load(&self->users);
    while (users >= 0)
        if (atomic_compare_exchange_weak(&self->users, &users, users + 1))
            return 0;
    PyErr_SetString(PyExc_ValueError, "another thread is changing this prefix");
    return -1;
}

static void end_reading(prefix_object *self)
{
    atomic_fetch_sub(&self->users, 1);
}

static int begin_change(prefix_object *self)
{
    int nobody = 0;
    if (atomic_compare_exchange_strong(&self->users, &nobody, -1))
        return 0;
    PyErr_SetString(PyExc_ValueError, "another thread is using this prefix");
    return -1;
}

static void end_change(prefix_object *self)
{
    atomic_store(&self->users, 0);
}

static PyObject *fail(prefix_object *self, int result)
{
    switch (result) {
    case AM_PREFIX_SHAPES:
        PyErr_SetString(PyExc_ValueError, "the page has another dtype, or layers of other shapes, than the prefix");
        return NULL;
    case AM_PREFIX_RANGE:
        PyErr_SetString(PyExc_ValueError, "there are no such tokens: first is a multiple of the block inside of the page, "
                                          "count at least 1 and no more than what follows");
        return NULL;
    case AM_PREFIX_CODEC:
        PyErr_SetString(PyExc_ValueError, "a block is in a lossless codec, which can't be attended to in place: decode it");
        return NULL;
    default:
        return am_module_fail(PyType_GetModule(Py_TYPE((PyObject *)self)), result, NULL);
    }
}

/* ---- making and unmaking */

static void release_from(prefix_object *self, uint32_t segment)
{
    while (self->last && self->last->segment >= segment) {
        held *gone = self->last;
        self->last = gone->before;
        PyBuffer_Release(&gone->view);
        PyMem_Free(gone);
    }
}

static void prefix_dealloc(PyObject *object)
{
    prefix_object *self = (prefix_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    release_from(self, 0);
    am_prefix_destroy(&self->prefix);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *prefix_new(PyTypeObject *type, PyObject *args, PyObject *named)
{
    uint32_t dtype;
    PyObject *layers;
    if (named && PyDict_Size(named))
        return PyErr_SetString(PyExc_TypeError, "Prefix takes no arguments by name"), NULL;
    if (!PyArg_ParseTuple(args, "O&O:Prefix", am_module_u32, &dtype, &layers))
        return NULL;
    Py_ssize_t count = PySequence_Size(layers);
    if (count < 0)
        return NULL;
    PyObject *module = PyType_GetModule(type);
    if (count < 1 || count > (Py_ssize_t)AM_MAX_LAYERS)
        return am_module_fail(module, AM_LAYERS, NULL);
    am_layer *shapes = PyMem_Calloc((size_t)count, sizeof *shapes);
    if (!shapes)
        return PyErr_NoMemory();
    PyObject *object = NULL;
    if (!am_module_layers(layers, shapes, count)) {
        allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
        object = allocate(type, 0);
        prefix_object *self = (prefix_object *)object;
        int result = object ? am_prefix_init(&self->prefix, dtype, (uint32_t)count, shapes) : AM_OK;
        if (result == AM_SHAPE) {
            PyErr_Format(PyExc_ValueError, "attention in place takes 1 to %u heads and 1 to %u dimensions",
                         AM_MAX_HEADS, AM_ATTEND_DIM);
            Py_CLEAR(object);
        } else if (result != AM_OK) {
            am_module_fail(module, result, NULL);
            Py_CLEAR(object);
        }
    }
    PyMem_Free(shapes);
    return object;
}

/* ---- what it consists of */

static held *hold(prefix_object *self, PyObject *data)
{
    held *kept = PyMem_Malloc(sizeof *kept);
    if (!kept)
        return PyErr_NoMemory(), NULL;
    kept->before = self->last;
    kept->segment = self->prefix.segments - 1;
    if (PyObject_GetBuffer(data, &kept->view, PyBUF_SIMPLE)) {
        PyMem_Free(kept);
        return NULL;
    }
    return kept;
}

/* Keeps the buffer, or lets go of it where nothing was appended. */
static PyObject *appended(prefix_object *self, held *kept, int result)
{
    if (result == AM_OK) {
        self->last = kept;
        return Py_NewRef(Py_None);
    }
    PyBuffer_Release(&kept->view);
    PyMem_Free(kept);
    return fail(self, result);
}

static PyObject *append_page(PyObject *object, PyObject *args)
{
    prefix_object *self = (prefix_object *)object;
    PyObject *data, *none = NULL;
    Py_ssize_t first = 0, count = -1;
    if (!PyArg_ParseTuple(args, "O|nn:append_page", &data, &first, &count) || begin_change(self))
        return NULL;
    held *kept = hold(self, data);
    if (kept) {
        int result;
        Py_BEGIN_ALLOW_THREADS
        result = am_prefix_append_page(&self->prefix, kept->view.buf, (uint64_t)kept->view.len, first, count);
        Py_END_ALLOW_THREADS
        none = appended(self, kept, result);
    }
    end_change(self);
    return none;
}

static PyObject *append_encoded(PyObject *object, PyObject *args)
{
    prefix_object *self = (prefix_object *)object;
    PyObject *body, *none = NULL;
    Py_buffer table;
    uint32_t grid;
    Py_ssize_t first = 0, count = -1;
    if (!PyArg_ParseTuple(args, "O&y*O|nn:append_encoded", am_module_u32, &grid, &table, &body, &first, &count))
        return NULL;
    am_extent *entries = PyMem_Malloc((size_t)table.len + 1); /* a copy: the caller's bytes need not be aligned */
    if (!entries)
        PyErr_NoMemory();
    else if (!begin_change(self)) {
        memcpy(entries, table.buf, (size_t)table.len);
        held *kept = hold(self, body);
        if (kept) {
            uint64_t count_of_entries = (uint64_t)table.len % sizeof *entries ? 0 : (uint64_t)table.len / sizeof *entries;
            int result;
            Py_BEGIN_ALLOW_THREADS
            result = am_prefix_append_encoded(&self->prefix, grid, entries, count_of_entries, kept->view.buf,
                                              (uint64_t)kept->view.len, first, count);
            Py_END_ALLOW_THREADS
            none = appended(self, kept, result);
        }
        end_change(self);
    }
    PyMem_Free(entries);
    PyBuffer_Release(&table);
    return none;
}

static PyObject *begin_segment(PyObject *object, PyObject *args)
{
    prefix_object *self = (prefix_object *)object;
    Py_buffer cosine, sine;
    PyObject *none = NULL;
    if (!PyArg_ParseTuple(args, "y*y*:begin_segment", &cosine, &sine))
        return NULL;
    if (cosine.len != sine.len || cosine.len % 4 || cosine.len / 4 > (Py_ssize_t)AM_ATTEND_DIM)
        PyErr_SetString(PyExc_ValueError, "cosine and sine are float32, one of each per pair of channels");
    else if (!begin_change(self)) {
        float angles[2][AM_ATTEND_DIM]; /* the caller's bytes need not be aligned */
        memcpy(angles[0], cosine.buf, (size_t)cosine.len);
        memcpy(angles[1], sine.buf, (size_t)sine.len);
        int result = am_prefix_begin_segment(&self->prefix, (uint32_t)(cosine.len / 4), angles[0], angles[1]);
        if (result == AM_PREFIX_SHAPES)
            PyErr_Format(PyExc_ValueError, "%zd pairs are more channels than a key has", cosine.len / 4);
        else
            none = result == AM_OK ? Py_NewRef(Py_None) : fail(self, result);
        end_change(self);
    }
    PyBuffer_Release(&cosine);
    PyBuffer_Release(&sine);
    return none;
}

static PyObject *truncate_segments(PyObject *object, PyObject *args)
{
    prefix_object *self = (prefix_object *)object;
    uint32_t count;
    if (!PyArg_ParseTuple(args, "O&:truncate_segments", am_module_u32, &count) || begin_change(self))
        return NULL;
    PyObject *none = NULL;
    if (am_prefix_truncate(&self->prefix, count) == AM_OK) {
        release_from(self, count);
        none = Py_NewRef(Py_None);
    } else
        PyErr_Format(PyExc_ValueError, "%u segments can't be kept: there are %u, and the first one stays",
                     (unsigned)count, (unsigned)self->prefix.segments);
    end_change(self);
    return none;
}

static PyObject *get_tokens(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(((prefix_object *)object)->prefix.tokens);
}

static PyObject *get_bytes(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(((prefix_object *)object)->prefix.bytes);
}

/* ---- attention */

enum { QUERY, KEY, VALUE, TAIL_KEYS, TAIL_VALUES, OUT, TENSORS };

static const char *const names[TENSORS] = {"query", "key", "value", "tail_keys", "tail_values", "out"};

/* Raises unless the tensor is [a, b, c] of the dtype (-1: any), contiguous in its last `tight` axes. */
static int wrong_shape(const Py_buffer *view, int which, Py_ssize_t item, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, int tight)
{
    Py_ssize_t step = item;
    int wrong = view->ndim != 3 || view->itemsize != item;
    if (!wrong) {
        wrong = (a >= 0 && view->shape[0] != a) || (b >= 0 && view->shape[1] != b) || view->shape[2] != c;
        for (int axis = 2; axis > 2 - tight && !wrong; axis--) {
            wrong = view->shape[axis] > 1 && view->strides[axis] != step;
            step *= view->shape[axis];
        }
    }
    if (wrong)
        PyErr_Format(PyExc_ValueError,
                     "%s must be [%zd, %zd, %zd] (-1: any) of %zd-byte values, contiguous in its last %d axes", names[which],
                     a, b, c, item, tight);
    return wrong;
}

static void copy_behind(const Py_buffer *from, const Py_buffer *tail, Py_ssize_t length)
{
    size_t width = (size_t)(from->shape[2] * from->itemsize);
    for (Py_ssize_t head = 0; head < from->shape[0]; head++)
        for (Py_ssize_t t = 0; t < from->shape[1]; t++)
            memcpy((uint8_t *)tail->buf + head * tail->strides[0] + (length + t) * tail->strides[1],
                   (const uint8_t *)from->buf + head * from->strides[0] + t * from->strides[1], width);
}

/* Raises unless `seen` is a u32 for each query, at least 1. */
static int wrong_seen(const Py_buffer *seen, Py_ssize_t queries)
{
    int wrong = seen->len != 4 * queries;
    for (Py_ssize_t i = 0; i < queries && !wrong; i++) {
        uint32_t count;
        memcpy(&count, (const uint8_t *)seen->buf + 4 * i, 4);
        wrong = count < 1;
    }
    if (wrong)
        PyErr_SetString(PyExc_ValueError, "seen has a u32 for each query: of the segments it sees the first so many, 1 at least");
    return wrong;
}

static PyObject *attend_views(prefix_object *self, Py_buffer *views, const Py_buffer *seen, Py_ssize_t layer,
                              Py_ssize_t length, double scale, Py_ssize_t window, Py_ssize_t threads)
{
    const am_prefix *prefix = &self->prefix;
    if (layer < 0 || layer >= (Py_ssize_t)prefix->layers)
        return PyErr_Format(PyExc_ValueError, "there is no layer %zd of %u", layer, (unsigned)prefix->layers);
    if (threads < 1 || window < 0)
        return PyErr_Format(PyExc_ValueError, "threads (%zd) is at least 1, window (%zd) 0 or more", threads, window);
    if (window && prefix->segments > 1)
        return PyErr_Format(PyExc_ValueError, "a window has no meaning over %u segments", (unsigned)prefix->segments);
    am_layer shape = prefix->shapes[layer];
    Py_ssize_t item = am_item(prefix->dtype), kv = shape.kv_heads, key_dim = shape.key_dim, value_dim = shape.value_dim;
    if (wrong_shape(&views[QUERY], QUERY, item, -1, -1, key_dim, 1))
        return NULL;
    Py_ssize_t heads = views[QUERY].shape[0], queries = views[QUERY].shape[1], capacity = -1;
    if (heads < kv || heads % kv || queries < 1 || heads > INT32_MAX / 2 / queries)
        return PyErr_Format(PyExc_ValueError, "query is [%zd, %zd, ..]: heads must be a multiple of %zd, tokens at least 1",
                            heads, queries, kv);
    if (wrong_shape(&views[KEY], KEY, item, kv, queries, key_dim, 1) ||
        wrong_shape(&views[VALUE], VALUE, item, kv, queries, value_dim, 1) ||
        wrong_shape(&views[TAIL_KEYS], TAIL_KEYS, item, kv, -1, key_dim, 2))
        return NULL;
    capacity = views[TAIL_KEYS].shape[1];
    if (wrong_shape(&views[TAIL_VALUES], TAIL_VALUES, item, kv, capacity, value_dim, 2) ||
        wrong_shape(&views[OUT], OUT, item, queries, heads, value_dim, 3))
        return NULL;
    if (length < 0 || length > capacity - queries)
        return PyErr_Format(PyExc_ValueError, "a tail of %zd tokens has no room for %zd behind %zd", capacity, queries,
                            length);
    if (seen && wrong_seen(seen, queries))
        return NULL;
    if ((uint64_t)(length + queries) / AM_BLOCK > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "a tail of %zd tokens is too long", length);
    am_attend call = {
        .prefix = prefix, .layer = (uint32_t)layer, .heads = (uint32_t)heads, .queries = (uint32_t)queries,
        .seen = seen ? seen->buf : NULL,
        .query = views[QUERY].buf, .query_head = views[QUERY].strides[0], .query_token = views[QUERY].strides[1],
        .tail_keys = views[TAIL_KEYS].buf, .tail_key_head = views[TAIL_KEYS].strides[0],
        .tail_values = views[TAIL_VALUES].buf, .tail_value_head = views[TAIL_VALUES].strides[0],
        .tail = (uint64_t)(length + queries), .window = (uint64_t)window, .out = views[OUT].buf, .scale = (float)scale,
    };
    int failed;
    Py_BEGIN_ALLOW_THREADS
    copy_behind(&views[KEY], &views[TAIL_KEYS], length);
    copy_behind(&views[VALUE], &views[TAIL_VALUES], length);
    failed = am_attend_run(&call, threads < INT32_MAX ? (uint32_t)threads : INT32_MAX);
    Py_END_ALLOW_THREADS
    return failed ? PyErr_NoMemory() : Py_NewRef(Py_None);
}

static PyObject *attend(PyObject *object, PyObject *args)
{
    prefix_object *self = (prefix_object *)object;
    PyObject *tensors[TENSORS], *none = NULL, *limits = Py_None;
    Py_ssize_t layer, length, window, threads;
    double scale;
    if (!PyArg_ParseTuple(args, "nOOOOOnOdnn|O:attend", &layer, &tensors[QUERY], &tensors[KEY], &tensors[VALUE],
                          &tensors[TAIL_KEYS], &tensors[TAIL_VALUES], &length, &tensors[OUT], &scale, &window, &threads, &limits))
        return NULL;
    if (begin_reading(self))
        return NULL;
    Py_buffer views[TENSORS], seen;
    int taken = 0, limited = limits != Py_None;
    if (limited && PyObject_GetBuffer(limits, &seen, PyBUF_SIMPLE)) {
        end_reading(self);
        return NULL;
    }
    while (taken < TENSORS &&
           !PyObject_GetBuffer(tensors[taken], &views[taken], PyBUF_STRIDES | (taken >= TAIL_KEYS ? PyBUF_WRITABLE : 0)))
        taken++;
    if (taken == TENSORS)
        none = attend_views(self, views, limited ? &seen : NULL, layer, length, scale, window, threads);
    while (taken)
        PyBuffer_Release(&views[--taken]);
    if (limited)
        PyBuffer_Release(&seen);
    end_reading(self);
    return none;
}

/* ---- the type */

static PyMethodDef methods[] = {
    {"append_page", append_page, METH_VARARGS,
     "append_page(data, first=0, count=-1, /): tokens of a page file's bytes, kept where they are, at the end."},
    {"append_encoded", append_encoded, METH_VARARGS,
     "append_encoded(grid, table, body, first=0, count=-1, /): the same of what page_encode returned."},
    {"begin_segment", begin_segment, METH_VARARGS,
     "begin_segment(cosine, sine, /): queries are turned by these angles for what is appended from now on."},
    {"truncate_segments", truncate_segments, METH_VARARGS,
     "truncate_segments(count, /): keep the first count segments and let go of the others' buffers."},
    {"attend", attend, METH_VARARGS,
     "attend(layer, query, key, value, tail_keys, tail_values, length, out, scale, window, threads, seen=None, /): "
     "softmax(scale * q k^T) v of new tokens over the prefix and the tail, into out."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"tokens", get_tokens, NULL, "Positions in all segments.", NULL},
    {"bytes", get_bytes, NULL, "Bytes of the blocks that attention reads, of all layers.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Prefix(dtype, layers, /): KV states that queries attend to where they lie, in segments of blocks of pages."},
    {Py_tp_new, prefix_new},
    {Py_tp_dealloc, prefix_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "agentmem._native.Prefix",
    .basicsize = sizeof(prefix_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

int am_module_add_prefix(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);
    int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed;
}

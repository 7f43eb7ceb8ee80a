/* Python's face of page files and codecs: buffers in, GIL released, results turned into errors. No algorithm lives here. */
#include "module.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "page.h"

/* ---- the tensors of a call: 2 * layers buffers ---- */

typedef struct {
    Py_ssize_t layers;
    Py_buffer *views; /* K and V of layer 0, K and V of layer 1, ... */
    Py_ssize_t held;
    am_rows *keys, *values;
} tensors;

static void tensors_destroy(tensors *all)
{
    for (Py_ssize_t i = 0; i < all->held; i++)
        PyBuffer_Release(&all->views[i]);
    PyMem_Free(all->views);
    PyMem_Free(all->keys);
    PyMem_Free(all->values);
}

static int take_view(tensors *all, PyObject *sequence, Py_ssize_t layer, const char *name, int flags)
{
    PyObject *item = PySequence_GetItem(sequence, layer);
    if (!item)
        return -1;
    Py_buffer *view = &all->views[all->held];
    int failed = PyObject_GetBuffer(item, view, flags);
    Py_DECREF(item);
    if (failed)
        return -1;
    all->held++;
    if (view->ndim != 3) {
        PyErr_Format(PyExc_ValueError, "%s[%zd] must have the shape [kv_heads, positions, head_dim], not %d axes", name,
                     layer, view->ndim);
        return -1;
    }
    if ((view->shape[2] > 1 && view->strides[2] != view->itemsize) ||
        (view->shape[1] > 1 && view->strides[1] != view->itemsize * view->shape[2])) {
        PyErr_Format(PyExc_ValueError, "%s[%zd] must be contiguous in its positions and dimensions", name, layer);
        return -1;
    }
    return 0;
}

/* Takes the buffers of both sequences. On failure nothing is held. */
static int tensors_init(tensors *all, PyObject *keys, PyObject *values, int flags)
{
    memset(all, 0, sizeof *all);
    all->layers = PySequence_Size(keys);
    Py_ssize_t others = all->layers < 0 ? -1 : PySequence_Size(values);
    if (all->layers < 0 || others < 0)
        return -1;
    if (all->layers != others || all->layers < 1 || all->layers > (Py_ssize_t)AM_MAX_LAYERS) {
        PyErr_Format(PyExc_ValueError, "%zd keys and %zd values: there must be one of each per layer, 1 to %u layers",
                     all->layers, others, AM_MAX_LAYERS);
        return -1;
    }
    all->views = PyMem_Calloc((size_t)all->layers * 2, sizeof *all->views);
    all->keys = PyMem_Calloc((size_t)all->layers, sizeof *all->keys);
    all->values = PyMem_Calloc((size_t)all->layers, sizeof *all->values);
    if (!all->views || !all->keys || !all->values) {
        PyErr_NoMemory();
        goto failed;
    }
    for (Py_ssize_t i = 0; i < all->layers; i++)
        if (take_view(all, keys, i, "keys", flags) || take_view(all, values, i, "values", flags))
            goto failed;
    return 0;
failed:
    tensors_destroy(all);
    return -1;
}

/* Points the rows of `layer` at position `at`; raises unless its tensors have these dimensions and hold `grid` positions
 * from there on. */
static int tensors_fit(tensors *all, Py_ssize_t layer, am_layer shape, uint32_t item, Py_ssize_t at, uint32_t grid)
{
    for (int side = 0; side < 2; side++) {
        const Py_buffer *view = &all->views[2 * layer + side];
        uint32_t dim = side ? shape.value_dim : shape.key_dim;
        if (view->itemsize != (Py_ssize_t)item || view->shape[0] != (Py_ssize_t)shape.kv_heads ||
            view->shape[2] != (Py_ssize_t)dim || at < 0 || at > view->shape[1] - (Py_ssize_t)grid) {
            PyErr_Format(PyExc_ValueError,
                         "%s[%zd] is [%zd, %zd, %zd] of %zd-byte values: [%u, >= %zu, %u] of %u-byte values needed",
                         side ? "values" : "keys", layer, view->shape[0], view->shape[1], view->shape[2],
                         view->itemsize, (unsigned)shape.kv_heads, (at < 0 ? 0 : (size_t)at) + grid, (unsigned)dim,
                         (unsigned)item);
            return -1;
        }
        if ((uintptr_t)view->buf % item || (shape.kv_heads > 1 && view->strides[0] % (Py_ssize_t)item)) {
            PyErr_Format(PyExc_ValueError, "%s[%zd] must be aligned to its values", side ? "values" : "keys", layer);
            return -1;
        }
        am_rows *rows = side ? &all->values[layer] : &all->keys[layer];
        rows->heads = shape.kv_heads;
        rows->dim = dim;
        rows->head_stride = view->strides[0];
        rows->data = (uint8_t *)view->buf + at * view->shape[2] * view->itemsize;
    }
    return 0;
}

/* Raises if a tensor lies in the bytes that are read. */
static int tensors_apart(const tensors *all, const Py_buffer *data)
{
    uintptr_t start = (uintptr_t)data->buf, end = start + (size_t)data->len;
    for (Py_ssize_t i = 0; i < all->held; i++) {
        const Py_buffer *view = &all->views[i];
        Py_ssize_t last = (view->shape[0] - 1) * view->strides[0];
        uintptr_t low = (uintptr_t)view->buf + (uintptr_t)(last < 0 ? last : 0);
        uintptr_t high = (uintptr_t)view->buf + (uintptr_t)(last < 0 ? 0 : last) +
                         (uintptr_t)(view->shape[1] * view->shape[2] * view->itemsize);
        if (low < end && start < high) {
            PyErr_SetString(PyExc_ValueError, "a page can't be read into its own bytes");
            return -1;
        }
    }
    return 0;
}

/* ---- pages ---- */

int am_module_layers(PyObject *sequence, am_layer *shapes, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        if (!item)
            return -1;
        am_layer *to = &shapes[i];
        int read = PyTuple_Check(item) && PyArg_ParseTuple(item, "O&O&O&", am_module_u32, &to->kv_heads, am_module_u32,
                                                           &to->key_dim, am_module_u32, &to->value_dim);
        Py_DECREF(item);
        if (!read) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_TypeError, "a layer is a tuple (kv_heads, key_dim, value_dim)");
            return -1;
        }
    }
    return 0;
}

static PyObject *page_size(PyObject *module, PyObject *args)
{
    uint32_t dtype, grid;
    PyObject *layers;
    if (!PyArg_ParseTuple(args, "O&O&O!:page_size", am_module_u32, &dtype, am_module_u32, &grid, &PyTuple_Type, &layers))
        return NULL;
    Py_ssize_t count = PyTuple_Size(layers);
    if (count > (Py_ssize_t)AM_MAX_LAYERS)
        return am_module_fail(module, AM_LAYERS, NULL);
    am_layer *shapes = PyMem_Calloc((size_t)count + 1, sizeof *shapes);
    if (!shapes)
        return PyErr_NoMemory();
    PyObject *size = NULL;
    if (!am_module_layers(layers, shapes, count)) {
        int result;
        uint64_t length = am_page_size(dtype, grid, (uint32_t)count, shapes, &result);
        size = length ? PyLong_FromUnsignedLongLong(length) : am_module_fail(module, result, NULL);
    }
    PyMem_Free(shapes);
    return size;
}

/* The shapes of these tensors, whose positions `at` .. `at + grid` they must hold; NULL with an error. */
static am_layer *shapes_of(PyObject *module, tensors *all, uint32_t dtype, uint32_t grid, Py_ssize_t at)
{
    if (!am_item(dtype))
        return am_module_fail(module, AM_DTYPE, NULL), NULL;
    am_layer *shapes = PyMem_Calloc((size_t)all->layers, sizeof *shapes);
    if (!shapes)
        return PyErr_NoMemory(), NULL;
    for (Py_ssize_t i = 0; i < all->layers; i++) {
        const Py_ssize_t *k = all->views[2 * i].shape, *v = all->views[2 * i + 1].shape;
        if (k[0] > (Py_ssize_t)AM_MAX_HEADS || k[2] > (Py_ssize_t)AM_MAX_DIM || v[2] > (Py_ssize_t)AM_MAX_DIM) {
            am_module_fail(module, AM_SHAPE, NULL);
            goto failed;
        }
        shapes[i] = (am_layer){(uint32_t)k[0], (uint32_t)k[2], (uint32_t)v[2]};
        if (tensors_fit(all, i, shapes[i], am_item(dtype), at, grid))
            goto failed;
    }
    return shapes;
failed:
    PyMem_Free(shapes);
    return NULL;
}

/* The four byte strings of a header. */
typedef struct {
    Py_buffer identity, key, parent, tokens;
} names;

static void names_release(names *all)
{
    PyBuffer_Release(&all->identity);
    PyBuffer_Release(&all->key);
    PyBuffer_Release(&all->parent);
    PyBuffer_Release(&all->tokens);
}

static int names_wrong(const names *all, uint32_t grid)
{
    if (all->identity.len == 32 && all->key.len == 32 && all->parent.len == 32 &&
        all->tokens.len == (Py_ssize_t)grid * 4)
        return 0;
    PyErr_SetString(PyExc_ValueError, "identity, key and parent are 32 bytes each, tokens are grid int32 values");
    return -1;
}

static am_page_head head_of(const names *all, uint32_t dtype, uint32_t grid, uint32_t number, Py_ssize_t layers,
                            const am_layer *shapes)
{
    am_page_head head = {
        .dtype = dtype, .grid = grid, .number = number, .layers = (uint32_t)layers, .shapes = shapes,
        .identity = all->identity.buf, .key = all->key.buf, .parent = all->parent.buf, .tokens = all->tokens.buf,
    };
    return head;
}

static PyObject *page_write(PyObject *module, PyObject *args)
{
    int fd;
    uint32_t dtype, grid, number;
    names named;
    PyObject *keys, *values, *written = NULL;
    Py_ssize_t at;
    if (!PyArg_ParseTuple(args, "iO&O&O&y*y*y*y*OOn:page_write", &fd, am_module_u32, &dtype, am_module_u32, &grid,
                          am_module_u32, &number, &named.identity, &named.key, &named.parent, &named.tokens, &keys, &values,
                          &at))
        return NULL;
    tensors all;
    if (names_wrong(&named, grid) || tensors_init(&all, keys, values, PyBUF_STRIDES))
        goto release;
    am_layer *shapes = shapes_of(module, &all, dtype, grid, at);
    if (shapes) {
        am_page_head head = head_of(&named, dtype, grid, number, all.layers, shapes);
        uint64_t length = 0;
        int result, saved;
        Py_BEGIN_ALLOW_THREADS
        result = am_page_write(fd, &head, all.keys, all.values, &length);
        saved = errno;
        Py_END_ALLOW_THREADS
        errno = saved;
        written = result == AM_OK ? PyLong_FromUnsignedLongLong(length) : am_module_fail(module, result, NULL);
    }
    PyMem_Free(shapes);
    tensors_destroy(&all);
release:
    names_release(&named);
    return written;
}

static PyObject *page_encode(PyObject *module, PyObject *args)
{
    uint32_t dtype, codec, grid;
    PyObject *keys, *values, *encoded = NULL, *body = NULL, *table = NULL;
    Py_ssize_t at;
    int writeback;
    if (!PyArg_ParseTuple(args, "O&O&O&OOnp:page_encode", am_module_u32, &dtype, am_module_u32, &codec, am_module_u32, &grid,
                          &keys, &values, &at, &writeback))
        return NULL;
    if (codec >= AM_CODECS)
        return am_module_fail(module, AM_CODEC, NULL);
    tensors all;
    if (tensors_init(&all, keys, values, PyBUF_STRIDES | (writeback ? PyBUF_WRITABLE : 0)))
        return NULL;
    am_layer *shapes = shapes_of(module, &all, dtype, grid, at);
    if (!shapes)
        goto destroy;
    int result;
    uint64_t most = am_page_size(dtype, grid, (uint32_t)all.layers, shapes, &result);
    if (!most) {
        am_module_fail(module, result, NULL);
        goto destroy;
    }
    uint32_t extents = am_page_extents(grid, (uint32_t)all.layers, shapes);
    body = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)most);
    table = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(extents * sizeof(am_extent)));
    if (!body || !table)
        goto destroy;
    am_page_head head = {.dtype = dtype, .grid = grid, .layers = (uint32_t)all.layers, .shapes = shapes};
    uint8_t *out = (uint8_t *)PyByteArray_AsString(body);
    am_module_huge(out, (size_t)most);
    am_extent *entries = (am_extent *)(void *)PyBytes_AsString(table);
    uint64_t length;
    Py_BEGIN_ALLOW_THREADS
    length = am_page_encode(&head, codec, all.keys, all.values, writeback, out, entries);
    Py_END_ALLOW_THREADS
    if (!PyByteArray_Resize(body, (Py_ssize_t)length))
        encoded = Py_BuildValue("(OO)", table, body);
destroy:
    Py_XDECREF(body);
    Py_XDECREF(table);
    PyMem_Free(shapes);
    tensors_destroy(&all);
    return encoded;
}

static PyObject *page_write_encoded(PyObject *module, PyObject *args)
{
    int fd;
    uint32_t dtype, grid, number;
    names named;
    Py_buffer table, body;
    PyObject *layers, *written = NULL;
    if (!PyArg_ParseTuple(args, "iO&O&O&y*y*y*y*O!y*y*:page_write_encoded", &fd, am_module_u32, &dtype, am_module_u32, &grid,
                          am_module_u32, &number, &named.identity, &named.key, &named.parent, &named.tokens, &PyTuple_Type,
                          &layers, &table, &body))
        return NULL;
    am_layer *shapes = NULL;
    am_extent *entries = NULL;
    Py_ssize_t count = PyTuple_Size(layers);
    if (names_wrong(&named, grid))
        goto release;
    if (count > (Py_ssize_t)AM_MAX_LAYERS) {
        am_module_fail(module, AM_LAYERS, NULL);
        goto release;
    }
    shapes = PyMem_Calloc((size_t)count + 1, sizeof *shapes);
    entries = PyMem_Malloc((size_t)table.len + 1); /* a copy: the caller's bytes need not be aligned */
    if (!shapes || !entries) {
        PyErr_NoMemory();
        goto release;
    }
    if (am_module_layers(layers, shapes, count))
        goto release;
    int result, saved;
    if (!am_page_size(dtype, grid, (uint32_t)count, shapes, &result)) {
        am_module_fail(module, result, NULL);
        goto release;
    }
    if ((uint64_t)table.len != (uint64_t)am_page_extents(grid, (uint32_t)count, shapes) * sizeof *entries) {
        am_module_fail(module, AM_EXTENT, NULL);
        goto release;
    }
    memcpy(entries, table.buf, (size_t)table.len);
    am_page_head head = head_of(&named, dtype, grid, number, count, shapes);
    uint64_t length = 0;
    Py_BEGIN_ALLOW_THREADS
    result = am_page_write_encoded(fd, &head, entries, body.buf, (uint64_t)body.len, &length);
    saved = errno;
    Py_END_ALLOW_THREADS
    errno = saved;
    written = result == AM_OK ? PyLong_FromUnsignedLongLong(length) : am_module_fail(module, result, NULL);
release:
    PyMem_Free(shapes);
    PyMem_Free(entries);
    PyBuffer_Release(&table);
    PyBuffer_Release(&body);
    names_release(&named);
    return written;
}

/* Sets the error of an extent: which layer, head and block it is. UINT32_MAX is none. */
static PyObject *fail_extent(PyObject *module, const am_page *page, int result, uint32_t extent)
{
    if (extent == UINT32_MAX)
        return am_module_fail(module, result, NULL);
    char detail[160];
    uint32_t blocks = page->grid / page->block, left = extent, layer = 0;
    while (layer + 1 < page->layers && left >= am_page_layer(page, layer).kv_heads * blocks)
        left -= am_page_layer(page, layer++).kv_heads * blocks;
    snprintf(detail, sizeof detail, "%s (layer %u, head %u, block %u)", am_rule_text(result), (unsigned)layer,
             (unsigned)(left / blocks), (unsigned)(left % blocks));
    return am_module_fail(module, result, detail);
}

static PyObject *page_parse(PyObject *module, PyObject *args)
{
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "y*:page_parse", &data))
        return NULL;
    am_page page;
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = am_page_open(&page, data.buf, (uint64_t)data.len);
    Py_END_ALLOW_THREADS
    PyObject *parsed = NULL, *layers = NULL;
    if (result != AM_OK) {
        am_module_fail(module, result, NULL);
        goto release;
    }
    layers = PyTuple_New((Py_ssize_t)page.layers);
    for (uint32_t i = 0; layers && i < page.layers; i++) {
        am_layer shape = am_page_layer(&page, i);
        PyObject *entry = Py_BuildValue("(III)", (unsigned)shape.kv_heads, (unsigned)shape.key_dim,
                                        (unsigned)shape.value_dim);
        if (!entry || PyTuple_SetItem(layers, (Py_ssize_t)i, entry))
            Py_CLEAR(layers);
    }
    if (layers)
        parsed = Py_BuildValue("(IIIy#y#y#y#O)", (unsigned)page.dtype, (unsigned)page.grid, (unsigned)page.number,
                               page.identity, (Py_ssize_t)32, page.key, (Py_ssize_t)32, page.parent, (Py_ssize_t)32,
                               page.tokens, (Py_ssize_t)page.grid * 4, layers);
    Py_XDECREF(layers);
release:
    PyBuffer_Release(&data);
    return parsed;
}

static PyObject *page_verify(PyObject *module, PyObject *args)
{
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "y*:page_verify", &data))
        return NULL;
    am_page page;
    int result;
    uint32_t bad = UINT32_MAX;
    Py_BEGIN_ALLOW_THREADS
    result = am_page_open(&page, data.buf, (uint64_t)data.len);
    if (result == AM_OK)
        result = am_page_verify(&page, &bad);
    Py_END_ALLOW_THREADS
    PyObject *none = NULL;
    if (result == AM_OK)
        none = Py_NewRef(Py_None);
    else
        fail_extent(module, &page, result, bad);
    PyBuffer_Release(&data);
    return none;
}

static PyObject *page_read(PyObject *module, PyObject *args)
{
    Py_buffer data;
    PyObject *keys, *values;
    Py_ssize_t at;
    int check = 1;
    uint32_t first = 0;
    if (!PyArg_ParseTuple(args, "y*OOn|pO&:page_read", &data, &keys, &values, &at, &check, am_module_u32, &first))
        return NULL;
    PyObject *none = NULL;
    am_page page;
    tensors all;
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = am_page_open(&page, data.buf, (uint64_t)data.len);
    Py_END_ALLOW_THREADS
    if (result != AM_OK) {
        am_module_fail(module, result, NULL);
        goto release;
    }
    if (tensors_init(&all, keys, values, PyBUF_STRIDES | PyBUF_WRITABLE))
        goto release;
    if (first >= page.layers || all.layers > (Py_ssize_t)(page.layers - first)) {
        PyErr_Format(PyExc_ValueError, "the page has %u layers, room for %zd from layer %u on was given",
                     (unsigned)page.layers, all.layers, (unsigned)first);
        goto destroy;
    }
    for (Py_ssize_t i = 0; i < all.layers; i++)
        if (tensors_fit(&all, i, am_page_layer(&page, first + (uint32_t)i), page.item, at, page.grid))
            goto destroy;
    if (tensors_apart(&all, &data))
        goto destroy;
    uint32_t bad = UINT32_MAX;
    Py_BEGIN_ALLOW_THREADS
    result = am_page_read(&page, first, (uint32_t)all.layers, all.keys, all.values, check, &bad);
    Py_END_ALLOW_THREADS
    none = result == AM_OK ? Py_NewRef(Py_None) : fail_extent(module, &page, result, bad);
destroy:
    tensors_destroy(&all);
release:
    PyBuffer_Release(&data);
    return none;
}

PyMethodDef am_module_pages[] = {
    {"page_size", page_size, METH_VARARGS, "page_size(dtype, grid, layers, /): length in bytes of such a page file."},
    {"page_write", page_write, METH_VARARGS,
     "page_write(fd, dtype, grid, number, identity, key, parent, tokens, keys, values, at, /): write a whole page file."},
    {"page_encode", page_encode, METH_VARARGS,
     "page_encode(dtype, codec, grid, keys, values, at, writeback, /): (table, body) of a page in a codec."},
    {"page_write_encoded", page_write_encoded, METH_VARARGS,
     "page_write_encoded(fd, dtype, grid, number, identity, key, parent, tokens, layers, table, body, /): its file."},
    {"page_parse", page_parse, METH_VARARGS,
     "page_parse(data, /): (dtype, grid, number, identity, key, parent, tokens, layers) of a page file."},
    {"page_verify", page_verify, METH_VARARGS, "page_verify(data, /): check every checksum of a page file."},
    {"page_read", page_read, METH_VARARGS,
     "page_read(data, keys, values, at, check=True, first=0, /): decode layers out of a page file, from layer first on."},
    {NULL, NULL, 0, NULL},
};

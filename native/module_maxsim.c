/* Python's face of late interaction over compressed token vectors. No algorithm here. */
#include "module.h"

#include <math.h>

#include "maxsim.h"

static PyObject *fail(int result, int64_t start, uint64_t length, const am_tokens *tokens, uint32_t dimensions)
{
    long long at = start;
    unsigned long long bytes = length;
    switch (result) {
    case AM_TOKENS_START:
        return PyErr_Format(PyExc_ValueError, "no passage's codes at %lld: there are %llu bytes", at, bytes);
    case AM_TOKENS_OTHER:
        return PyErr_Format(PyExc_ValueError, "the codes at %lld have version %u.%u, known is 1.0", at,
                            tokens->version & 255, tokens->version >> 8);
    case AM_TOKENS_SHAPE:
        return PyErr_Format(PyExc_ValueError, "the codes at %lld claim %lu tokens of %u dimensions", at,
                            (unsigned long)tokens->count, tokens->dimensions);
    case AM_TOKENS_SHORT:
        return PyErr_Format(PyExc_ValueError, "the codes at %lld need %llu bytes, there are %llu", at,
                            (unsigned long long)tokens->size, bytes - (unsigned long long)start);
    case AM_TOKENS_QUERY:
        return PyErr_Format(PyExc_ValueError, "the codes at %lld have %u dimensions, the query %u", at,
                            tokens->dimensions, dimensions);
    default:
        return PyErr_NoMemory();
    }
}

static int is_array(const Py_buffer *view, int dimensions, Py_ssize_t item)
{
    return view->ndim == dimensions && view->itemsize == item && (uintptr_t)view->buf % (size_t)item == 0;
}

static int are_finite(const Py_buffer *view)
{
    const float *numbers = view->buf;
    for (Py_ssize_t at = 0; at < view->len / 4; at++)
        if (!isfinite(numbers[at]))
            return 0;
    return 1;
}

static PyObject *tokens_encode(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[3], *none = NULL;
    Py_buffer views[3]; /* rows, scales, codes */
    if (!PyArg_ParseTuple(args, "OOO:tokens_encode", &objects[0], &objects[1], &objects[2]))
        return NULL;
    int held = 0;
    for (; held < 3; held++)
        if (PyObject_GetBuffer(objects[held], &views[held], held ? PyBUF_ND | PyBUF_WRITABLE : PyBUF_ND))
            goto release;
    const Py_buffer *rows = &views[0], *scales = &views[1], *codes = &views[2];
    if (!is_array(rows, 2, 4) || rows->shape[1] < 1 || rows->shape[1] > (Py_ssize_t)AM_TOKENS_DIMENSIONS) {
        PyErr_SetString(PyExc_ValueError, "token vectors are float32 [tokens, 1..4096]");
        goto release;
    }
    if (!is_array(scales, 1, 2) || scales->shape[0] != rows->shape[0] || !is_array(codes, 2, 1) ||
        codes->shape[0] != rows->shape[0] || codes->shape[1] != (Py_ssize_t)am_tokens_row((uint32_t)rows->shape[1])) {
        PyErr_SetString(PyExc_ValueError, "scales are uint16 [tokens], codes uint8 [tokens, bytes of a row]");
        goto release;
    }
    if (!are_finite(rows)) {
        PyErr_SetString(PyExc_ValueError, "a token vector has a NaN or an infinity");
        goto release;
    }
    Py_BEGIN_ALLOW_THREADS
    am_tokens_encode(rows->buf, (size_t)rows->shape[0], (uint32_t)rows->shape[1], scales->buf, codes->buf);
    Py_END_ALLOW_THREADS
    none = Py_NewRef(Py_None);
release:
    while (held-- > 0)
        PyBuffer_Release(&views[held]);
    return none;
}

static PyObject *maxsim(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[4], *none = NULL;
    Py_buffer views[4]; /* query, data, starts, out */
    if (!PyArg_ParseTuple(args, "OOOO:maxsim", &objects[0], &objects[1], &objects[2], &objects[3]))
        return NULL;
    int held = 0;
    for (; held < 4; held++)
        if (PyObject_GetBuffer(objects[held], &views[held], held == 3 ? PyBUF_ND | PyBUF_WRITABLE : PyBUF_ND))
            goto release;
    const Py_buffer *query = &views[0], *data = &views[1], *starts = &views[2], *out = &views[3];
    if (!is_array(query, 2, 4) || query->shape[0] < 1 || query->shape[0] > (Py_ssize_t)AM_MAXSIM_QUERIES ||
        query->shape[1] < 1 || query->shape[1] > (Py_ssize_t)AM_TOKENS_DIMENSIONS) {
        PyErr_SetString(PyExc_ValueError, "a query is float32 [1..256, 1..4096]");
        goto release;
    }
    if (!is_array(starts, 1, 8) || !is_array(out, 2, 4) || out->shape[0] != starts->shape[0] ||
        out->shape[1] != query->shape[0]) {
        PyErr_SetString(PyExc_ValueError, "starts are int64 [passages], the result is float32 [passages, queries]");
        goto release;
    }
    if (!are_finite(query)) {
        PyErr_SetString(PyExc_ValueError, "a query token has a NaN or an infinity");
        goto release;
    }
    uint32_t queries = (uint32_t)query->shape[0], dimensions = (uint32_t)query->shape[1];
    size_t failed = 0;
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = am_maxsim(query->buf, queries, dimensions, data->buf, (uint64_t)data->len, starts->buf,
                       (size_t)starts->shape[0], out->buf, &failed);
    Py_END_ALLOW_THREADS
    if (result) {
        int64_t start = starts->shape[0] ? ((const int64_t *)starts->buf)[failed] : 0;
        am_tokens tokens = {0};
        if (result != AM_TOKENS_MEMORY)
            am_tokens_parse(data->buf, (uint64_t)data->len, start, &tokens);
        fail(result, start, (uint64_t)data->len, &tokens, dimensions);
    } else
        none = Py_NewRef(Py_None);
release:
    while (held-- > 0)
        PyBuffer_Release(&views[held]);
    return none;
}

PyMethodDef am_module_maxsim[] = {
    {"tokens_encode", tokens_encode, METH_VARARGS,
     "tokens_encode(rows, scales, codes, /): token vectors in 2 bits a number, into scales and codes."},
    {"maxsim", maxsim, METH_VARARGS,
     "maxsim(query, data, starts, out, /): best product of each query token with a token of each passage, into out."},
    {NULL, NULL, 0, NULL},
};

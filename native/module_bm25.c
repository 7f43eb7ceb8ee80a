/* Python's face of bm25.c: buffers in, their kinds and lengths checked, the GIL released for long work. */
#include "module.h"

#include <stdlib.h>
#include <string.h>

#include "bm25.h"

enum { FIELDS = 5, MOST = 13 };

/* Buffers taken so far, so that one place gives them all back. */
typedef struct {
    Py_buffer held[MOST];
    int count;
} buffers;

static void release(buffers *taken)
{
    while (taken->count)
        PyBuffer_Release(&taken->held[--taken->count]);
}

/* The data of a contiguous one-dimensional buffer of items of this size and kind ('i' integer, 'f' float, '?' bool);
 * *length is set, or checked where it is not -1. NULL with an error. */
static void *take(buffers *taken, PyObject *object, char kind, Py_ssize_t size, int writable, Py_ssize_t *length)
{
    Py_buffer *buffer = &taken->held[taken->count];
    if (PyObject_GetBuffer(object, buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)))
        return NULL;
    taken->count++;
    const char *kinds = kind == 'i' ? "ilq" : kind == 'f' ? "fd" : "?";
    const char *format = buffer->format ? buffer->format : "B";
    if (buffer->ndim != 1 || buffer->itemsize != size || strlen(format) != 1 || !strchr(kinds, format[0])) {
        PyErr_Format(PyExc_ValueError, "a one-dimensional array of %s of %zd bytes is wanted",
                     kind == 'i' ? "integers" : kind == 'f' ? "floats" : "bools", size);
        return NULL;
    }
    if (*length >= 0 && buffer->shape[0] != *length) {
        PyErr_Format(PyExc_ValueError, "an array has %zd items, %zd are wanted", buffer->shape[0], *length);
        return NULL;
    }
    *length = buffer->shape[0];
    return buffer->len ? buffer->buf : "";
}

/* The rows of (allowed, length, previous, next, document); 0, or -1 with an error. */
static int take_rows(buffers *taken, PyObject *const fields[FIELDS], am_bm25_rows *rows)
{
    Py_ssize_t count = -1;
    rows->allowed = take(taken, fields[0], '?', 1, 0, &count);
    const int32_t **numbers[] = {&rows->length, &rows->previous, &rows->next, &rows->document};
    for (int i = 1; i < FIELDS && taken->count && !PyErr_Occurred(); i++)
        *numbers[i - 1] = take(taken, fields[i], 'i', 4, 0, &count);
    rows->count = (size_t)(count < 0 ? 0 : count);
    if (!PyErr_Occurred() && count > INT32_MAX)
        PyErr_SetString(PyExc_ValueError, "there are more rows than places");
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *lengths(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *fields[FIELDS], *filled;
    if (!PyArg_ParseTuple(args, "(OOOOO)O:bm25_lengths", &fields[0], &fields[1], &fields[2], &fields[3], &fields[4],
                          &filled))
        return NULL;
    buffers taken = {.count = 0};
    am_bm25_rows rows;
    Py_ssize_t documents = -1;
    int64_t *sessions = NULL;
    if (!take_rows(&taken, fields, &rows))
        sessions = take(&taken, filled, 'i', 8, 1, &documents);
    PyObject *result = NULL;
    if (sessions) {
        am_bm25_totals totals;
        rows.documents = (size_t)documents;
        Py_BEGIN_ALLOW_THREADS
        am_bm25_lengths(&rows, sessions, &totals);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("(LLLL)", (long long)totals.rows, (long long)totals.words,
                               (long long)totals.window_words, (long long)totals.documents);
    }
    release(&taken);
    return result;
}

/* A list of (row, window, document) per term. */
static PyObject *rarity_list(const am_bm25_rarity *rarities, Py_ssize_t terms)
{
    PyObject *list = PyList_New(terms);
    for (Py_ssize_t t = 0; list && t < terms; t++) {
        PyObject *three = Py_BuildValue("(ddd)", rarities[t].row, rarities[t].window, rarities[t].document);
        if (!three || PyList_SetItem(list, t, three))
            Py_CLEAR(list);
    }
    return list;
}

static int check_starts(const int64_t *starts, Py_ssize_t terms, Py_ssize_t postings)
{
    int good = starts[0] >= 0 && starts[terms] <= postings;
    for (Py_ssize_t t = 0; good && t < terms; t++)
        good = starts[t] <= starts[t + 1];
    if (!good)
        PyErr_SetString(PyExc_ValueError, "the terms' starts are not in order or leave their postings");
    return good ? 0 : -1;
}

static PyObject *scores(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *terms[3], *fields[FIELDS], *filled, *out[3];
    long long totals[4];
    if (!PyArg_ParseTuple(args, "(OOO)(OOOOO)(O(LLLL))(OOO):bm25_scores", &terms[0], &terms[1], &terms[2], &fields[0],
                          &fields[1], &fields[2], &fields[3], &fields[4], &filled, &totals[0], &totals[1], &totals[2],
                          &totals[3], &out[0], &out[1], &out[2]))
        return NULL;
    buffers taken = {.count = 0};
    am_bm25_rows rows;
    PyObject *result = NULL;
    am_bm25_rarity *rarities = NULL;
    if (take_rows(&taken, fields, &rows))
        goto done;
    Py_ssize_t count = (Py_ssize_t)rows.count, documents = -1, ends = -1, postings = -1;
    const int64_t *starts = take(&taken, terms[0], 'i', 8, 0, &ends);
    const int32_t *places = starts ? take(&taken, terms[1], 'i', 4, 0, &postings) : NULL;
    const int32_t *times = places ? take(&taken, terms[2], 'i', 4, 0, &postings) : NULL;
    const int64_t *sessions = times ? take(&taken, filled, 'i', 8, 0, &documents) : NULL;
    float *turn = sessions ? take(&taken, out[0], 'f', 4, 1, &count) : NULL;
    float *window = turn ? take(&taken, out[1], 'f', 4, 1, &count) : NULL;
    float *session = window ? take(&taken, out[2], 'f', 4, 1, &documents) : NULL;
    if (!session)
        goto done;
    if (ends < 1) {
        PyErr_SetString(PyExc_ValueError, "the terms' starts lack their end");
        goto done;
    }
    if (check_starts(starts, ends - 1, postings))
        goto done;
    rarities = malloc((size_t)ends * sizeof *rarities);
    if (!rarities) {
        PyErr_NoMemory();
        goto done;
    }
    rows.documents = (size_t)documents;
    const am_bm25_totals sums = {totals[0], totals[1], totals[2], totals[3]};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = am_bm25_scores(&rows, sessions, &sums, (size_t)(ends - 1), starts, places, times, turn, window, session,
                            rarities);
    Py_END_ALLOW_THREADS
    result = failed ? PyErr_NoMemory() : rarity_list(rarities, ends - 1);
done:
    free(rarities);
    release(&taken);
    return result;
}

PyMethodDef am_module_bm25[] = {
    {"bm25_lengths", lengths, METH_VARARGS, NULL},
    {"bm25_scores", scores, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

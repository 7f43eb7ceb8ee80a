/* What the parts of the Python face share. */
#ifndef AM_MODULE_H
#define AM_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "page.h"

typedef struct {
    PyObject *page_error;
} am_module_state;

/* Sets the exception of a result of page.h, with `detail` instead of the rule's own words if given; returns NULL. */
PyObject *am_module_fail(PyObject *module, int result, const char *detail);

/* For "O&" of PyArg_ParseTuple: a uint32_t, or ValueError. (The format "I" takes the low bits of what is too large.) */
int am_module_u32(PyObject *object, void *target);

/* Advice that fresh memory comes in huge pages: filling it in small ones is several times as slow as copying. */
void am_module_huge(void *data, size_t length);

/* The (kv_heads, key_dim, value_dim) of `count` layers, or -1 with an error. */
int am_module_layers(PyObject *sequence, am_layer *shapes, Py_ssize_t count);

int am_module_add_prefix(PyObject *module); /* module_attend.c */

/* Of module_pages.c, module_maxsim.c and module_bm25.c; each ends with a NULL entry. */
extern PyMethodDef am_module_pages[], am_module_maxsim[], am_module_bm25[];

#endif

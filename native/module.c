/* Python's face of the native code, but for pages (module_pages.c). No algorithm lives here.
 *
 * The same functions, with the same bytes and the same errors, are in agentmem/_pure/; agentmem/_native.pyi has the
 * types. Stable ABI of 3.11.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* syscall, sync_file_range */
#endif
#include "module.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#if defined(__linux__)
#include <sys/syscall.h>
#if !defined(SYS_cachestat)
#define SYS_cachestat 451 /* the same number on every architecture */
#endif
#endif
#include <unistd.h>

#include "copy.h"
#include "cpu.h"
#include "crc32c.h"
#include "page.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

PyObject *am_module_fail(PyObject *module, int result, const char *detail)
{
    if (result == AM_SYSTEM)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (result == AM_MEMORY)
        return PyErr_NoMemory();
    am_module_state *state = PyModule_GetState(module);
    PyObject *arguments = Py_BuildValue("(ss)", am_rule(result), detail ? detail : am_rule_text(result));
    if (arguments) {
        PyErr_SetObject(state->page_error, arguments);
        Py_DECREF(arguments);
    }
    return NULL;
}

int am_module_u32(PyObject *object, void *target)
{
    unsigned long long value = PyLong_AsUnsignedLongLong(object);
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_OverflowError))
        return 0;
    if (PyErr_Occurred() || value > UINT32_MAX) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%R is no number from 0 to 2**32 - 1", object);
        return 0;
    }
    *(uint32_t *)target = (uint32_t)value;
    return 1;
}

/* ---- CRC32C ---- */

static PyObject *crc32c(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer data;
    uint32_t crc = 0;
    if (!PyArg_ParseTuple(args, "y*|O&:crc32c", &data, am_module_u32, &crc))
        return NULL;
    if (data.len < 4096)
        crc = am_crc32c(crc, data.buf, (size_t)data.len);
    else {
        Py_BEGIN_ALLOW_THREADS
        crc = am_crc32c(crc, data.buf, (size_t)data.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(crc);
}

static PyObject *cpu_level(PyObject *module, PyObject *ignored)
{
    (void)module, (void)ignored;
    return PyUnicode_FromString(am_cpu_name(am_cpu_level()));
}

static PyObject *cpu_levels(PyObject *module, PyObject *ignored)
{
    (void)module, (void)ignored;
    PyObject *names = PyList_New(0);
    for (int level = AM_LEVELS - 1; names && level >= 0; level--) {
        if (!am_cpu_usable(level))
            continue;
        PyObject *name = PyUnicode_FromString(am_cpu_name(level));
        if (!name || PyList_Append(names, name))
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    PyObject *tuple = names ? PyList_AsTuple(names) : NULL;
    Py_XDECREF(names);
    return tuple;
}

static PyObject *set_cpu_level(PyObject *module, PyObject *args)
{
    (void)module;
    const char *name;
    if (!PyArg_ParseTuple(args, "s:set_cpu_level", &name))
        return NULL;
    if (am_cpu_force(name))
        return PyErr_Format(PyExc_ValueError, "this CPU has no level %s: see cpu_levels()", name);
    Py_RETURN_NONE;
}

/* ---- single blocks: for tests and measurements of the codecs ---- */

/* The block of two buffers [rows, key_dim] and [rows, value_dim]; -1 with an error. */
static int block_of_buffers(uint32_t dtype, const Py_buffer *key, const Py_buffer *value, am_block *block)
{
    if (!am_item(dtype) || key->ndim != 2 || value->ndim != 2 || key->itemsize != (Py_ssize_t)am_item(dtype) ||
        value->itemsize != key->itemsize || key->shape[0] != value->shape[0] || key->shape[0] < 1 ||
        key->shape[0] > (Py_ssize_t)AM_CODEC_MAX_ROWS || key->shape[1] < 1 || value->shape[1] < 1 ||
        key->shape[1] > (Py_ssize_t)AM_CODEC_MAX_DIM || value->shape[1] > (Py_ssize_t)AM_CODEC_MAX_DIM ||
        (uintptr_t)key->buf % am_item(dtype) || (uintptr_t)value->buf % am_item(dtype)) {
        PyErr_SetString(PyExc_ValueError,
                        "a block is K [1..64, 1..1024] and V [as many, 1..1024] of the dtype's values, aligned");
        return -1;
    }
    *block = (am_block){dtype, (uint32_t)key->shape[0], (uint32_t)key->shape[1], (uint32_t)value->shape[1]};
    return 0;
}

static PyObject *block_encode(PyObject *module, PyObject *args)
{
    (void)module;
    uint32_t codec, dtype;
    PyObject *key_object, *value_object, *encoded = NULL;
    Py_buffer key, value;
    if (!PyArg_ParseTuple(args, "O&O&OO:block_encode", am_module_u32, &codec, am_module_u32, &dtype, &key_object,
                          &value_object))
        return NULL;
    if (PyObject_GetBuffer(key_object, &key, PyBUF_ND))
        return NULL;
    if (PyObject_GetBuffer(value_object, &value, PyBUF_ND)) {
        PyBuffer_Release(&key);
        return NULL;
    }
    am_block block;
    if (!block_of_buffers(dtype, &key, &value, &block)) {
        if (!am_codec_takes(codec, block))
            encoded = Py_NewRef(Py_None);
        else {
            uint8_t *room = PyMem_Malloc(am_codec_size(codec, block));
            uint64_t size = room ? am_codec_encode(codec, block, key.buf, value.buf, room) : 0;
            encoded = !room  ? PyErr_NoMemory()
                      : size ? PyBytes_FromStringAndSize((const char *)room, (Py_ssize_t)size)
                             : Py_NewRef(Py_None);
            PyMem_Free(room);
        }
    }
    PyBuffer_Release(&key);
    PyBuffer_Release(&value);
    return encoded;
}

static PyObject *block_decode(PyObject *module, PyObject *args)
{
    uint32_t codec, dtype;
    PyObject *key_object, *value_object, *none = NULL;
    Py_buffer data, key, value;
    if (!PyArg_ParseTuple(args, "O&O&y*OO:block_decode", am_module_u32, &codec, am_module_u32, &dtype, &data, &key_object,
                          &value_object))
        return NULL;
    if (PyObject_GetBuffer(key_object, &key, PyBUF_ND | PyBUF_WRITABLE))
        goto data_only;
    if (PyObject_GetBuffer(value_object, &value, PyBUF_ND | PyBUF_WRITABLE))
        goto key_too;
    am_block block;
    if (!block_of_buffers(dtype, &key, &value, &block)) {
        if (!am_codec_takes(codec, block) ||
            am_codec_decode(codec, block, data.buf, (uint64_t)data.len, key.buf, value.buf))
            am_module_fail(module, AM_ENCODING, NULL);
        else
            none = Py_NewRef(Py_None);
        am_copy_done();
    }
    PyBuffer_Release(&value);
key_too:
    PyBuffer_Release(&key);
data_only:
    PyBuffer_Release(&data);
    return none;
}

/* ---- memory ---- */

/* madvise over the whole system pages that `data` touches (outwards) or holds (inwards); errno of a failure, or 0. */
static int advise(const void *data, size_t length, int advice, int outwards)
{
#if defined(__linux__)
    uintptr_t mask = (uintptr_t)sysconf(_SC_PAGESIZE) - 1, start = (uintptr_t)data, end = start + length;
    start = outwards ? start & ~mask : (start + mask) & ~mask;
    end = outwards ? end : end & ~mask;
    return end > start && madvise((void *)start, end - start, advice) ? errno : 0;
#else
    (void)data, (void)length, (void)advice, (void)outwards;
    return 0;
#endif
}

/* Whether all `length` bytes of a file lie in the page cache: then touching a mapping of it is neither slow nor a signal.
 * cachestat (Linux 6.5) looks at whole folios, which is ten times as fast as mincore or as mapping all of it. */
static int resident(int fd, uint64_t length)
{
#if defined(__linux__) && defined(SYS_cachestat)
    struct {
        uint64_t offset, length;
    } range = {0, length};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } pages;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    return fd >= 0 && !syscall(SYS_cachestat, fd, &range, &pages, 0) && pages.cached >= (length + page - 1) / page;
#else
    (void)fd, (void)length;
    return 0;
#endif
}

void am_module_huge(void *data, size_t length)
{
#if defined(__linux__)
    advise(data, length, MADV_HUGEPAGE, 0);
#else
    (void)data, (void)length;
#endif
}

static PyObject *prefault(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer data;
    int fd = -1;
    if (!PyArg_ParseTuple(args, "y*|i:prefault", &data, &fd))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = resident(fd, (uint64_t)data.len) ? 0 : advise(data.buf, (size_t)data.len, MADV_POPULATE_READ, 1);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    /* EINVAL: a kernel that doesn't know the advice; then the pages come in one by one, as everywhere else. */
    if (failed && failed != EINVAL) {
        errno = failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyObject *reserve(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "w*:reserve", &data))
        return NULL;
    /* Only advice: where it can't be had, memory comes in small pages, as everywhere else. Not populated here: the first
     * touch does that a little sooner (measured), and memory that is never used is never taken. */
    am_module_huge(data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    Py_RETURN_NONE;
}

static PyObject *write_behind(PyObject *module, PyObject *args)
{
    (void)module;
    int fd;
    if (!PyArg_ParseTuple(args, "i:write_behind", &fd))
        return NULL;
#if defined(__linux__)
    Py_BEGIN_ALLOW_THREADS
    /* Only a hint: what does not reach the disk is told by the sync that follows. */
    (void)sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE);
    Py_END_ALLOW_THREADS
#endif
    Py_RETURN_NONE;
}

/* ---- the module ---- */

static PyMethodDef methods[] = {
    {"crc32c", crc32c, METH_VARARGS, "crc32c(data, value=0, /): CRC32C of data, appended to data with checksum value."},
    {"cpu_level", cpu_level, METH_NOARGS, "cpu_level(): name of the instruction set in use."},
    {"cpu_levels", cpu_levels, METH_NOARGS, "cpu_levels(): names that set_cpu_level takes on this CPU, fastest first."},
    {"set_cpu_level", set_cpu_level, METH_VARARGS, "set_cpu_level(name, /): use this one from now on, in all threads."},
    {"block_encode", block_encode, METH_VARARGS, "block_encode(codec, dtype, key, value, /): bytes, None if not taken."},
    {"block_decode", block_decode, METH_VARARGS, "block_decode(codec, dtype, data, key, value, /): into key and value."},
    {"prefault", prefault, METH_VARARGS,
     "prefault(data, fd=-1, /): bring a mapping of the file fd into memory; OSError where it can't be read."},
    {"write_behind", write_behind, METH_VARARGS, "write_behind(fd, /): begin to bring the file to the disk."},
    {"reserve", reserve, METH_VARARGS, "reserve(data, /): let a fresh buffer get its memory in huge pages."},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    const char *level = getenv("AGENTMEM_CPU_LEVEL");
    if (level && *level && am_cpu_force(level)) {
        PyErr_Format(PyExc_ImportError, "AGENTMEM_CPU_LEVEL is %s, which this CPU does not have", level);
        return -1;
    }
    am_module_state *state = PyModule_GetState(module);
    state->page_error = PyErr_NewExceptionWithDoc(
        "agentmem._native.PageError", "A page file or a layout breaks the rule args[0]; args[1] says it in words.",
        PyExc_ValueError, NULL);
    if (!state->page_error)
        return -1;
    if (PyModule_AddFunctions(module, am_module_pages) || PyModule_AddFunctions(module, am_module_maxsim) ||
        PyModule_AddFunctions(module, am_module_bm25) || am_module_add_prefix(module))
        return -1;
    return PyModule_AddObjectRef(module, "PageError", state->page_error);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    am_module_state *state = PyModule_GetState(module);
    if (state)
        Py_VISIT(state->page_error);
    return 0;
}

static int module_clear(PyObject *module)
{
    am_module_state *state = PyModule_GetState(module);
    if (state)
        Py_CLEAR(state->page_error);
    return 0;
}

/* What 3.12 and 3.13 added to the slots is unknown to the limited API of 3.11 and refused by 3.11 itself, so the table is
 * chosen at run time. Both claims hold: the only state shared between interpreters or threads is the checksum's tables
 * (filled once) and the chosen instruction set (atomic). */
#define MULTIPLE_INTERPRETERS 3
#define PER_INTERPRETER_GIL ((void *)2)
#define GIL 4
#define GIL_NOT_USED ((void *)1)

static PyModuleDef_Slot slots_3_11[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static PyModuleDef_Slot slots_3_12[] = {
    {Py_mod_exec, module_exec}, {MULTIPLE_INTERPRETERS, PER_INTERPRETER_GIL}, {0, NULL}};
static PyModuleDef_Slot slots_3_13[] = {
    {Py_mod_exec, module_exec}, {MULTIPLE_INTERPRETERS, PER_INTERPRETER_GIL}, {GIL, GIL_NOT_USED}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "agentmem._native",
    .m_doc = "Page files and checksums in C.",
    .m_size = sizeof(am_module_state),
    .m_methods = methods,
    .m_slots = slots_3_11,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__native(void)
{
    if (Py_Version >= 0x030D0000)
        definition.m_slots = slots_3_13;
    else if (Py_Version >= 0x030C0000)
        definition.m_slots = slots_3_12;
    return PyModuleDef_Init(&definition);
}

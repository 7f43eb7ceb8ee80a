/* Writing and encoding pages: see page.h for the contract of each function and README.md for the bytes. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* fallocate, pwritev */
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "copy.h"
#include "crc32c.h"
#include "layout.h"

#ifndef IOV_MAX
#define IOV_MAX 1024
#endif

/* ---- writing ---- */

/* Pieces of memory on their way to consecutive bytes of a file. */
typedef struct {
    int fd, count;
    uint64_t offset;
    struct iovec pieces[IOV_MAX];
} gather;

static void gather_init(gather *out, int fd)
{
    out->fd = fd;
    out->count = 0;
    out->offset = 0;
}

static int gather_flush(gather *out)
{
    struct iovec *piece = out->pieces;
    while (out->count) {
        ssize_t done = pwritev(out->fd, piece, out->count, (off_t)out->offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0) {
            if (done == 0)
                errno = EIO;
            return AM_SYSTEM;
        }
        out->offset += (uint64_t)done;
        for (; out->count && (size_t)done >= piece->iov_len; piece++, out->count--)
            done -= (ssize_t)piece->iov_len;
        if (out->count) {
            piece->iov_base = (uint8_t *)piece->iov_base + done;
            piece->iov_len -= (size_t)done;
        }
    }
    return AM_OK;
}

static int gather_add(gather *out, const void *data, size_t length)
{
    if (!length)
        return AM_OK;
    out->pieces[out->count++] = (struct iovec){(void *)(uintptr_t)data, length};
    return out->count == IOV_MAX ? gather_flush(out) : AM_OK;
}

/* Asks for the file's blocks at once: a full disk shows before anything is written, and the page cache is then filled in
 * large pieces, which makes writing about 1.6 times as fast and mapping 3 times (measured on ext4). */
static int reserve(int fd, uint64_t length)
{
#if defined(__linux__)
    if (fallocate(fd, 0, 0, (off_t)length) && (errno == ENOSPC || errno == EDQUOT || errno == EFBIG || errno == EIO))
        return AM_SYSTEM;
#else
    (void)fd, (void)length;
#endif
    return AM_OK;
}

static void fill_header(uint8_t *header, const am_page_head *head, uint64_t first, uint64_t extents, uint64_t length)
{
    memcpy(header, AM_PAGE_MAGIC, 8);
    store32(header + 8, AM_PAGE_VERSION);
    store32(header + 16, (uint32_t)first);
    store32(header + 20, head->dtype);
    store64(header + 24, length);
    store32(header + 32, head->grid);
    store32(header + 36, block_of(head->grid));
    store32(header + 40, head->number);
    store32(header + 44, head->layers);
    store32(header + 48, (uint32_t)extents);
    memcpy(header + 64, head->identity, 32);
    memcpy(header + 96, head->key, 32);
    memcpy(header + 128, head->parent, 32);
    memcpy(header + AM_PAGE_FIXED, head->tokens, 4ull * head->grid);
    uint8_t *entry = header + AM_PAGE_FIXED + 4ull * head->grid;
    for (uint32_t i = 0; i < head->layers; i++, entry += LAYER_ENTRY) {
        store32(entry, head->shapes[i].kv_heads);
        store32(entry + 4, head->shapes[i].key_dim);
        store32(entry + 8, head->shapes[i].value_dim);
    }
}

static void fill_entry(uint8_t *entry, uint64_t offset, am_extent extent)
{
    store64(entry, offset);
    store64(entry + 8, extent.size);
    store32(entry + 16, extent.crc);
    store32(entry + 20, extent.codec);
}

/* The header of a page with room for its table of extents, which begins at *entry; NULL without memory. */
static uint8_t *new_header(const am_page_head *head, uint64_t first, uint64_t extents, uint64_t length, uint8_t **entry)
{
    uint8_t *header = calloc(1, first);
    if (header) {
        fill_header(header, head, first, extents, length);
        *entry = header + AM_PAGE_FIXED + 4ull * head->grid + (uint64_t)LAYER_ENTRY * head->layers;
    }
    return header;
}

int am_page_write(int fd, const am_page_head *head, const am_rows *keys, const am_rows *values, uint64_t *written)
{
    static const uint8_t zeros[AM_ALIGN];
    int result;
    uint64_t length = am_page_size(head->dtype, head->grid, head->layers, head->shapes, &result);
    if (!length)
        return result;
    uint32_t item = am_item(head->dtype), block = block_of(head->grid);
    uint64_t first, extents;
    am_measure(head->grid, head->dtype, head->layers, head->shapes, &first, &extents);
    uint8_t *entry = NULL, *header = new_header(head, first, extents, length, &entry);
    gather *out = malloc(sizeof *out);
    if (!header || !out) {
        free(header);
        free(out);
        return AM_MEMORY;
    }
    uint64_t offset = first;
    for (uint32_t i = 0; i < head->layers; i++) {
        am_layer shape = head->shapes[i];
        size_t key_width = (size_t)shape.key_dim * item, value_width = (size_t)shape.value_dim * item;
        uint64_t size = am_block_bytes(block_shape(head->dtype, head->grid, shape));
        for (uint32_t h = 0; h < shape.kv_heads; h++)
            for (uint32_t at = 0; at < head->grid; at += block, entry += EXTENT_ENTRY, offset += aligned(size)) {
                uint32_t crc = am_crc32c(0, block_at(&keys[i], h, at, key_width), block * key_width);
                crc = am_crc32c(crc, block_at(&values[i], h, at, value_width), block * value_width);
                am_extent extent = {size, crc, AM_RAW};
                fill_entry(entry, offset, extent);
            }
    }
    store32(header + 12, am_crc32c(0, header + 16, first - 16));

    /* From the first byte to the last in as few calls as can be: the page cache then gets large folios, which are three
     * times as fast to map (measured: 0.09 ms for 6 MB, against 0.29 ms after writes of 256 KB). */
    gather_init(out, fd);
    result = reserve(fd, length);
    if (result == AM_OK)
        result = gather_add(out, header, first);
    for (uint32_t i = 0; result == AM_OK && i < head->layers; i++) {
        am_layer shape = head->shapes[i];
        size_t key_width = (size_t)shape.key_dim * item, value_width = (size_t)shape.value_dim * item;
        uint64_t size = am_block_bytes(block_shape(head->dtype, head->grid, shape));
        for (uint32_t h = 0; result == AM_OK && h < shape.kv_heads; h++)
            for (uint32_t at = 0; result == AM_OK && at < head->grid; at += block) {
                result = gather_add(out, block_at(&keys[i], h, at, key_width), block * key_width);
                if (result == AM_OK)
                    result = gather_add(out, block_at(&values[i], h, at, value_width), block * value_width);
                if (result == AM_OK)
                    result = gather_add(out, zeros, aligned(size) - size);
            }
    }
    if (result == AM_OK)
        result = gather_flush(out);
    int saved = errno;
    free(header);
    free(out);
    errno = saved;
    *written = length;
    return result;
}

/* ---- encoding ---- */

uint64_t am_page_encode(const am_page_head *head, uint32_t codec, const am_rows *keys, const am_rows *values, int writeback,
                        uint8_t *body, am_extent *table)
{
    uint32_t item = am_item(head->dtype), rows = block_of(head->grid);
    uint8_t *out = body;
    for (uint32_t i = 0; i < head->layers; i++) {
        am_layer shape = head->shapes[i];
        am_block block = block_shape(head->dtype, head->grid, shape);
        size_t key_width = (size_t)shape.key_dim * item, value_width = (size_t)shape.value_dim * item;
        int takes = am_codec_takes(codec, block);
        for (uint32_t h = 0; h < shape.kv_heads; h++)
            for (uint32_t at = 0; at < head->grid; at += rows, table++) {
                uint8_t *key = block_at(&keys[i], h, at, key_width), *value = block_at(&values[i], h, at, value_width);
                table->codec = codec;
                table->size = takes ? am_codec_encode(codec, block, key, value, out) : 0;
                if (!table->size) {
                    table->codec = AM_RAW;
                    table->size = am_codec_encode(AM_RAW, block, key, value, out);
                } else if (writeback)
                    am_codec_decode(codec, block, out, table->size, key, value);
                table->crc = am_crc32c(0, out, table->size);
                uint64_t room = aligned(table->size);
                memset(out + table->size, 0, room - table->size);
                out += room;
            }
    }
    am_copy_done(); /* what was decoded may have gone past the caches */
    return (uint64_t)(out - body);
}

int am_page_write_encoded(int fd, const am_page_head *head, const am_extent *table, const uint8_t *body, uint64_t length,
                          uint64_t *written)
{
    int result;
    if (!am_page_size(head->dtype, head->grid, head->layers, head->shapes, &result))
        return result;
    uint64_t first, extents, offset = 0;
    am_measure(head->grid, head->dtype, head->layers, head->shapes, &first, &extents);
    uint8_t *entry = NULL, *header = new_header(head, first, extents, first + length, &entry);
    gather *out = malloc(sizeof *out);
    if (!header || !out) {
        free(header);
        free(out);
        return AM_MEMORY;
    }
    for (uint32_t i = 0; result == AM_OK && i < head->layers; i++) {
        am_block block = block_shape(head->dtype, head->grid, head->shapes[i]);
        uint32_t here = am_page_extents(head->grid, 1, &head->shapes[i]);
        for (uint32_t j = 0; result == AM_OK && j < here; j++, table++, entry += EXTENT_ENTRY) {
            if (table->codec >= AM_CODECS)
                result = AM_CODEC;
            else if (!am_good_size(table->codec, block, table->size) || table->size > length - offset)
                result = AM_EXTENT;
            fill_entry(entry, first + offset, *table);
            offset = aligned(offset + table->size);
            if (offset > length)
                result = AM_EXTENT;
        }
    }
    if (result == AM_OK && offset != length)
        result = AM_EXTENT;
    if (result == AM_OK)
        result = reserve(fd, first + length);
    store32(header + 12, am_crc32c(0, header + 16, first - 16));
    gather_init(out, fd);
    if (result == AM_OK)
        result = gather_add(out, header, first);
    if (result == AM_OK)
        result = gather_add(out, body, length);
    if (result == AM_OK)
        result = gather_flush(out);
    int saved = errno;
    free(header);
    free(out);
    errno = saved;
    *written = first + length;
    return result;
}

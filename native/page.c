/* Reading and writing page files: see page.h for the contract of each function and README.md for the bytes. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* fallocate, pwritev */
#endif
#include "page.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "crc32c.h"

#define LAYER_ENTRY 16u
#define EXTENT_ENTRY 24u

#ifndef IOV_MAX
#define IOV_MAX 1024
#endif

static uint32_t load32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t load64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static void store32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, sizeof value);
}

static void store64(uint8_t *at, uint64_t value)
{
    memcpy(at, &value, sizeof value);
}

static uint64_t aligned(uint64_t offset)
{
    return (offset + AM_ALIGN - 1) / AM_ALIGN * AM_ALIGN;
}

static int all_zero(const uint8_t *at, uint64_t length)
{
    for (uint64_t i = 0; i < length; i++)
        if (at[i])
            return 0;
    return 1;
}

static const struct {
    const char *name, *text;
} rules[AM_RULES] = {
    [AM_OK] = {"ok", "nothing is wrong"},
    [AM_SHORT] = {"short", "the file is shorter than a header"},
    [AM_MAGIC] = {"magic", "the file is not a page file"},
    [AM_VERSION] = {"version", "the file has another format version"},
    [AM_HEADER_LENGTH] = {"header length", "the header's length is out of bounds"},
    [AM_LENGTH] = {"length", "the file is not as long as its header says"},
    [AM_HEADER_CHECKSUM] = {"header checksum", "the header fails its checksum"},
    [AM_RESERVED] = {"reserved", "a reserved field is not zero"},
    [AM_DTYPE] = {"dtype", "the data type is unknown"},
    [AM_GRID] = {"grid", "the grid or block is out of bounds"},
    [AM_LAYERS] = {"layers", "the number of layers is out of bounds"},
    [AM_SHAPE] = {"shape", "a layer's heads or dimensions are out of bounds"},
    [AM_CODEC] = {"codec", "an extent's codec is unknown"},
    [AM_EXTENT] = {"extent", "an extent does not lie where the layout puts it"},
    [AM_PADDING] = {"padding", "padding is not zero"},
    [AM_CHECKSUM] = {"checksum", "an extent fails its checksum"},
    [AM_ENCODING] = {"encoding", "an extent is not an encoding of its codec"},
    [AM_MEMORY] = {"memory", "out of memory"},
    [AM_SYSTEM] = {"system", "a system call failed"},
};

const char *am_rule(int result)
{
    return result >= 0 && result < AM_RULES ? rules[result].name : "unknown";
}

const char *am_rule_text(int result)
{
    return result >= 0 && result < AM_RULES ? rules[result].text : "unknown result";
}

uint32_t am_item(uint32_t dtype)
{
    return dtype == AM_F32 ? 4 : dtype == AM_F16 || dtype == AM_BF16 ? 2 : 0;
}

/* ---- layout ---- */

static uint32_t block_of(uint32_t grid)
{
    return grid < AM_BLOCK ? grid : AM_BLOCK;
}

static int good_grid(uint32_t grid)
{
    return grid >= 1 && grid <= AM_MAX_GRID && (grid <= AM_BLOCK || grid % AM_BLOCK == 0);
}

static int good_shape(am_layer shape)
{
    return shape.kv_heads >= 1 && shape.kv_heads <= AM_MAX_HEADS && shape.key_dim >= 1 && shape.key_dim <= AM_MAX_DIM &&
           shape.value_dim >= 1 && shape.value_dim <= AM_MAX_DIM;
}

static am_block block_shape(uint32_t dtype, uint32_t grid, am_layer shape)
{
    am_block block = {dtype, block_of(grid), shape.key_dim, shape.value_dim};
    return block;
}

static uint64_t header_length(uint32_t grid, uint32_t layers, uint64_t extents)
{
    return aligned(AM_PAGE_FIXED + 4ull * grid + LAYER_ENTRY * (uint64_t)layers + EXTENT_ENTRY * extents);
}

/* The header's length and the file's for a layout whose shapes are all good; the bounds keep both far below 2^64. */
static uint64_t measure(uint32_t grid, uint32_t dtype, uint32_t layers, const am_layer *shapes, uint32_t codec,
                        uint64_t *header, uint64_t *extents)
{
    uint32_t block = block_of(grid);
    uint64_t count = 0, payload = 0;
    for (uint32_t i = 0; i < layers; i++) {
        uint64_t here = (uint64_t)shapes[i].kv_heads * (grid / block);
        count += here;
        am_block each = block_shape(dtype, grid, shapes[i]);
        int taken = am_codec_fixed(codec) && am_codec_takes(codec, each);
        payload += here * aligned(taken ? am_codec_size(codec, each) : am_block_bytes(each));
    }
    *extents = count;
    *header = header_length(grid, layers, count);
    return *header + payload;
}

uint64_t am_page_size(uint32_t dtype, uint32_t grid, uint32_t layers, const am_layer *shapes, uint32_t codec, int *result)
{
    uint64_t header, extents;
    *result = !am_item(dtype) ? AM_DTYPE
              : !good_grid(grid) ? AM_GRID
              : layers < 1 || layers > AM_MAX_LAYERS ? AM_LAYERS
              : codec >= AM_CODECS ? AM_CODEC
                                                     : AM_OK;
    for (uint32_t i = 0; *result == AM_OK && i < layers; i++)
        if (!good_shape(shapes[i]))
            *result = AM_SHAPE;
    if (*result != AM_OK)
        return 0;
    uint64_t length = measure(grid, dtype, layers, shapes, codec, &header, &extents);
    if (header > UINT32_MAX) {
        *result = AM_HEADER_LENGTH;
        return 0;
    }
    return length;
}

am_layer am_page_layer(const am_page *page, uint32_t layer)
{
    const uint8_t *entry = page->layer_table + (size_t)LAYER_ENTRY * layer;
    am_layer shape = {load32(entry), load32(entry + 4), load32(entry + 8)};
    return shape;
}

/* ---- reading ---- */

/* Whether an extent of this codec can have this size. */
static int good_size(uint32_t codec, am_block block, uint64_t size)
{
    if (!am_codec_takes(codec, block))
        return 0;
    uint64_t most = am_codec_size(codec, block);
    return am_codec_fixed(codec) ? size == most : size >= 1 && size <= most;
}

int am_page_open(am_page *page, const void *bytes, uint64_t length)
{
    const uint8_t *data = bytes;
    if (length < AM_PAGE_FIXED)
        return AM_SHORT;
    if (memcmp(data, AM_PAGE_MAGIC, 8) != 0)
        return AM_MAGIC;
    if (load32(data + 8) != AM_PAGE_VERSION)
        return AM_VERSION;
    uint64_t first = load32(data + 16);
    if (first < AM_PAGE_FIXED || first % AM_ALIGN || first > length)
        return AM_HEADER_LENGTH;
    if (load64(data + 24) != length)
        return AM_LENGTH;
    if (am_crc32c(0, data + 16, first - 16) != load32(data + 12))
        return AM_HEADER_CHECKSUM;

    /* From here on the header is what its writer meant, who may still be hostile: nothing below trusts it more. */
    page->data = data;
    page->length = length;
    page->first = first;
    page->dtype = load32(data + 20);
    page->item = am_item(page->dtype);
    page->grid = load32(data + 32);
    page->block = load32(data + 36);
    page->number = load32(data + 40);
    page->layers = load32(data + 44);
    page->extents = load32(data + 48);
    page->identity = data + 64;
    page->key = data + 96;
    page->parent = data + 128;
    page->tokens = data + AM_PAGE_FIXED;
    if (!all_zero(data + 52, 12))
        return AM_RESERVED;
    if (!page->item)
        return AM_DTYPE;
    if (!good_grid(page->grid) || page->block != block_of(page->grid))
        return AM_GRID;
    if (page->layers < 1 || page->layers > AM_MAX_LAYERS)
        return AM_LAYERS;
    uint64_t layers_at = AM_PAGE_FIXED + 4ull * page->grid;
    uint64_t extents_at = layers_at + (uint64_t)LAYER_ENTRY * page->layers;
    if (extents_at > first)
        return AM_HEADER_LENGTH;
    page->layer_table = data + layers_at;
    page->extent_table = data + extents_at;

    uint64_t extents = 0;
    uint32_t blocks = page->grid / page->block;
    for (uint32_t i = 0; i < page->layers; i++) {
        am_layer shape = am_page_layer(page, i);
        if (!good_shape(shape))
            return AM_SHAPE;
        if (load32(page->layer_table + (size_t)LAYER_ENTRY * i + 12))
            return AM_RESERVED;
        extents += (uint64_t)shape.kv_heads * blocks;
    }
    if (extents != page->extents || first != header_length(page->grid, page->layers, extents))
        return AM_HEADER_LENGTH;
    const uint8_t *entry = page->extent_table;
    uint64_t offset = first;
    for (uint32_t i = 0; i < page->layers; i++) {
        am_layer shape = am_page_layer(page, i);
        am_block block = block_shape(page->dtype, page->grid, shape);
        for (uint32_t j = 0; j < shape.kv_heads * blocks; j++, entry += EXTENT_ENTRY) {
            uint32_t codec = load32(entry + 20);
            if (codec >= AM_CODECS)
                return AM_CODEC;
            uint64_t size = load64(entry + 8);
            if (load64(entry) != offset || !good_size(codec, block, size) || size > length - offset)
                return AM_EXTENT;
            offset = aligned(offset + size);
            if (offset > length)
                return AM_EXTENT;
        }
    }
    if (offset != length)
        return AM_LENGTH;
    return all_zero(entry, (uint64_t)(data + first - entry)) ? AM_OK : AM_PADDING;
}

/* Zeros behind an extent, up to the next one. */
static int good_padding(const am_page *page, const uint8_t *entry)
{
    uint64_t end = load64(entry) + load64(entry + 8);
    return all_zero(page->data + end, aligned(end) - end);
}

static int check_extent(const am_page *page, const uint8_t *entry)
{
    if (am_crc32c(0, page->data + load64(entry), load64(entry + 8)) != load32(entry + 16))
        return AM_CHECKSUM;
    return good_padding(page, entry) ? AM_OK : AM_PADDING;
}

int am_page_verify(const am_page *page, uint32_t *bad)
{
    for (uint32_t i = 0; i < page->extents; i++) {
        int result = check_extent(page, page->extent_table + (size_t)EXTENT_ENTRY * i);
        if (result != AM_OK) {
            *bad = i;
            return result;
        }
    }
    return AM_OK;
}

/* Where a block of one head begins in a tensor. */
static uint8_t *block_at(const am_rows *rows, uint32_t head, uint32_t position, size_t width)
{
    return rows->data + (ptrdiff_t)head * rows->head_stride + (size_t)position * width;
}

/* Copies a raw extent. Its checksum is computed on the way at no cost, so it is always checked. */
static int read_raw(const am_page *page, const uint8_t *entry, uint8_t *key, size_t key_bytes, uint8_t *value)
{
    const uint8_t *extent = page->data + load64(entry);
    uint32_t crc = am_crc32c_copy(0, key, extent, key_bytes);
    if (am_crc32c_copy(crc, value, extent + key_bytes, load64(entry + 8) - key_bytes) != load32(entry + 16))
        return AM_CHECKSUM;
    return good_padding(page, entry) ? AM_OK : AM_PADDING;
}

int am_page_read(const am_page *page, uint32_t from, uint32_t count, const am_rows *keys, const am_rows *values, int check,
                 uint32_t *bad)
{
    uint32_t index = 0, blocks = page->grid / page->block;
    for (uint32_t i = 0; i < from; i++)
        index += am_page_layer(page, i).kv_heads * blocks;
    const uint8_t *entry = page->extent_table + (size_t)EXTENT_ENTRY * index;
    for (uint32_t i = 0; i < count; i++) {
        am_layer shape = am_page_layer(page, from + i);
        am_block block = block_shape(page->dtype, page->grid, shape);
        size_t key_width = (size_t)shape.key_dim * page->item, value_width = (size_t)shape.value_dim * page->item;
        for (uint32_t head = 0; head < shape.kv_heads; head++)
            for (uint32_t at = 0; at < page->grid; at += page->block, entry += EXTENT_ENTRY, index++) {
                uint8_t *key = block_at(&keys[i], head, at, key_width);
                uint8_t *value = block_at(&values[i], head, at, value_width);
                uint32_t codec = load32(entry + 20);
                int result = AM_OK;
                if (codec == AM_RAW)
                    result = read_raw(page, entry, key, page->block * key_width, value);
                else {
                    if (check)
                        result = check_extent(page, entry);
                    if (result == AM_OK &&
                        am_codec_decode(codec, block, page->data + load64(entry), load64(entry + 8), key, value))
                        result = AM_ENCODING;
                }
                if (result != AM_OK) {
                    *bad = index;
                    return result;
                }
            }
    }
    return AM_OK;
}

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
    uint64_t length = am_page_size(head->dtype, head->grid, head->layers, head->shapes, AM_RAW, &result);
    if (!length)
        return result;
    uint32_t item = am_item(head->dtype), block = block_of(head->grid);
    uint64_t first, extents;
    measure(head->grid, head->dtype, head->layers, head->shapes, AM_RAW, &first, &extents);
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

uint32_t am_page_extents(uint32_t grid, uint32_t layers, const am_layer *shapes)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < layers; i++)
        count += shapes[i].kv_heads * (grid / block_of(grid));
    return count;
}

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
    return (uint64_t)(out - body);
}

int am_page_write_encoded(int fd, const am_page_head *head, const am_extent *table, const uint8_t *body, uint64_t length,
                          uint64_t *written)
{
    int result;
    if (!am_page_size(head->dtype, head->grid, head->layers, head->shapes, AM_RAW, &result))
        return result;
    uint64_t first, extents, offset = 0;
    measure(head->grid, head->dtype, head->layers, head->shapes, AM_RAW, &first, &extents);
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
            else if (!good_size(table->codec, block, table->size) || table->size > length - offset)
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

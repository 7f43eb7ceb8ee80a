/* Reading page files: see page.h for the contract of each function and README.md for the bytes. */
#include "page.h"

#include <string.h>

#include "copy.h"
#include "crc32c.h"
#include "layout.h"

#define SMALL 32768u /* bytes of a decoded block that stay in the first-level cache: 64 tokens at 128 dimensions of bf16 */

static int all_zero(const uint8_t *at, uint64_t length)
{
    for (uint64_t i = 0; i < length; i++)
        if (at[i])
            return 0;
    return 1;
}

am_layer am_page_layer(const am_page *page, uint32_t layer)
{
    const uint8_t *entry = page->layer_table + (size_t)LAYER_ENTRY * layer;
    am_layer shape = {load32(entry), load32(entry + 4), load32(entry + 8)};
    return shape;
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
    if (!am_good_grid(page->grid) || page->block != block_of(page->grid))
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
        if (!am_good_shape(shape))
            return AM_SHAPE;
        if (load32(page->layer_table + (size_t)LAYER_ENTRY * i + 12))
            return AM_RESERVED;
        extents += (uint64_t)shape.kv_heads * blocks;
    }
    if (extents != page->extents || first != am_header_length(page->grid, page->layers, extents))
        return AM_HEADER_LENGTH;
    const uint8_t *entry = page->extent_table, *end = entry + EXTENT_ENTRY * extents;
    uint64_t offset = first;
    for (uint32_t i = 0; i < page->layers; i++) {
        am_layer shape = am_page_layer(page, i);
        am_block block = block_shape(page->dtype, page->grid, shape);
        for (uint32_t j = 0; j < shape.kv_heads * blocks; j++, entry += EXTENT_ENTRY) {
            if (entry == end)
                return AM_HEADER_LENGTH; /* only if the layer table was changed since it was counted */
            uint32_t codec = load32(entry + 20);
            if (codec >= AM_CODECS)
                return AM_CODEC;
            uint64_t size = load64(entry + 8);
            if (load64(entry) != offset || !am_good_size(codec, block, size) || size > length - offset)
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

/* An entry of the table, read once. */
typedef struct {
    const uint8_t *data;
    uint64_t size, room; /* room: with the padding behind it */
    uint32_t crc, codec;
} extent;

/* What am_page_open found good is looked at again, since it may have changed: 0 if it lies outside of the page. */
static int extent_at(const am_page *page, uint32_t index, extent *found)
{
    if (index >= page->extents)
        return 0;
    const uint8_t *entry = page->extent_table + (size_t)EXTENT_ENTRY * index;
    uint64_t offset = load64(entry);
    found->size = load64(entry + 8);
    found->crc = load32(entry + 16);
    found->codec = load32(entry + 20);
    if (offset > page->length || found->size > page->length - offset)
        return 0;
    found->data = page->data + offset;
    found->room = aligned(found->size);
    return found->room <= page->length - offset;
}

static int good_padding(const extent *at)
{
    return all_zero(at->data + at->size, at->room - at->size);
}

static int check_extent(const extent *at)
{
    if (am_crc32c(0, at->data, at->size) != at->crc)
        return AM_CHECKSUM;
    return good_padding(at) ? AM_OK : AM_PADDING;
}

int am_page_verify(const am_page *page, uint32_t *bad)
{
    for (uint32_t i = 0; i < page->extents; i++) {
        extent at;
        int result = extent_at(page, i, &at) ? check_extent(&at) : AM_EXTENT;
        if (result != AM_OK) {
            *bad = i;
            return result;
        }
    }
    return AM_OK;
}

/* Copies a raw extent. Its checksum is computed on the way at no cost, so it is always checked. */
static int read_raw(const extent *at, uint8_t *key, size_t key_bytes, uint8_t *value)
{
    uint32_t crc = am_crc32c_copy(0, key, at->data, key_bytes);
    if (am_crc32c_copy(crc, value, at->data + key_bytes, at->size - key_bytes) != at->crc)
        return AM_CHECKSUM;
    return good_padding(at) ? AM_OK : AM_PADDING;
}

/* Fetches an extent while the one before it is decoded. A prefetch can't fault, so nothing is bounded here but the time;
 * by extent_at, the loop came out at two thirds of the speed (gcc 12). */
static void ahead(const am_page *page, uint32_t index)
{
    if (index >= page->extents)
        return;
    const uint8_t *entry = page->extent_table + (size_t)EXTENT_ENTRY * index;
    uintptr_t at = (uintptr_t)page->data + (uintptr_t)load64(entry);
    for (uint64_t i = 0, size = load64(entry + 8); i < size && i < SMALL; i += 64)
        __builtin_prefetch((const void *)(at + i), 0, 3);
}

/* Decodes an extent by way of a buffer in the first-level cache, so that what is decoded goes to memory past the caches. */
static int read_coded(uint32_t codec, am_block block, const uint8_t *in, uint64_t size, uint8_t *key, size_t key_bytes,
                      uint8_t *value)
{
    uint8_t decoded[SMALL] __attribute__((aligned(64)));
    size_t bytes = am_block_bytes(block);
    if (codec > AM_DENSE || bytes > SMALL || key_bytes % 64)
        return am_codec_decode(codec, block, in, size, key, value);
    if (am_codec_decode(codec, block, in, size, decoded, decoded + key_bytes))
        return -1;
    am_copy_stream(key, decoded, key_bytes);
    am_copy_stream(value, decoded + key_bytes, bytes - key_bytes);
    return 0;
}

static int read_extent(const am_page *page, uint32_t index, am_block block, int check, uint8_t *key, uint8_t *value)
{
    extent at;
    size_t key_bytes = (size_t)block.rows * block.key_dim * page->item;
    if (!extent_at(page, index, &at) || !am_good_size(at.codec, block, at.size))
        return AM_EXTENT;
    if (at.codec == AM_RAW)
        return read_raw(&at, key, key_bytes, value);
    ahead(page, index + 1);
    /* Decoded first: that hides the way from memory, and the checksum then finds the bytes in the cache. */
    int wrong = read_coded(at.codec, block, at.data, at.size, key, key_bytes, value);
    int result = check ? check_extent(&at) : AM_OK;
    return result == AM_OK && wrong ? AM_ENCODING : result;
}

int am_page_read(const am_page *page, uint32_t from, uint32_t count, const am_rows *keys, const am_rows *values, int check,
                 uint32_t *bad)
{
    uint32_t index = 0, blocks = page->grid / page->block;
    int result = AM_OK;
    for (uint32_t i = 0; i < from; i++)
        index += am_page_layer(page, i).kv_heads * blocks;
    for (uint32_t i = 0; result == AM_OK && i < count; i++) {
        am_layer shape = am_page_layer(page, from + i);
        am_block block = block_shape(page->dtype, page->grid, shape);
        size_t key_width = (size_t)shape.key_dim * page->item, value_width = (size_t)shape.value_dim * page->item;
        if (shape.kv_heads != keys[i].heads || shape.kv_heads != values[i].heads || shape.key_dim != keys[i].dim ||
            shape.value_dim != values[i].dim)
            result = AM_SHAPE;
        for (uint32_t head = 0; result == AM_OK && head < shape.kv_heads; head++)
            for (uint32_t at = 0; result == AM_OK && at < page->grid; at += page->block, index++)
                result = read_extent(page, index, block, check, block_at(&keys[i], head, at, key_width),
                                     block_at(&values[i], head, at, value_width));
    }
    if (result != AM_OK && result != AM_SHAPE)
        *bad = index - 1;
    am_copy_done();
    return result;
}

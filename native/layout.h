/* What reading and writing a page share: the words of the file, and where things lie. Internal to native/. */
#ifndef AM_LAYOUT_H
#define AM_LAYOUT_H

#include <string.h>

#include "page.h"

#define LAYER_ENTRY 16u
#define EXTENT_ENTRY 24u

static inline uint32_t load32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint64_t load64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline void store32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, sizeof value);
}

static inline void store64(uint8_t *at, uint64_t value)
{
    memcpy(at, &value, sizeof value);
}

static inline uint64_t aligned(uint64_t offset)
{
    return (offset + AM_ALIGN - 1) / AM_ALIGN * AM_ALIGN;
}

static inline uint32_t block_of(uint32_t grid)
{
    return grid < AM_BLOCK ? grid : AM_BLOCK;
}

static inline am_block block_shape(uint32_t dtype, uint32_t grid, am_layer shape)
{
    am_block block = {dtype, block_of(grid), shape.key_dim, shape.value_dim};
    return block;
}

/* Where a block of one head begins in a tensor. */
static inline uint8_t *block_at(const am_rows *rows, uint32_t head, uint32_t position, size_t width)
{
    return rows->data + (ptrdiff_t)head * rows->head_stride + (size_t)position * width;
}

int am_good_grid(uint32_t grid);
int am_good_shape(am_layer shape);

/* Whether an extent of this codec can have this size. */
int am_good_size(uint32_t codec, am_block block, uint64_t size);

/* Length of the header of a page, extent table and padding included. */
uint64_t am_header_length(uint32_t grid, uint32_t layers, uint64_t extents);

/* The header's length and the file's for a layout whose shapes are all good (am_page_size says more); the bounds keep both
 * far below 2^64. */
uint64_t am_measure(uint32_t grid, uint32_t dtype, uint32_t layers, const am_layer *shapes, uint64_t *header,
                    uint64_t *extents);

#endif

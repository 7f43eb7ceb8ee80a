/* Where things are in a quantised block, as README.md draws it: for the codecs, and for attention over its bytes. */
#ifndef AM_QUANTIZED_H
#define AM_QUANTIZED_H

#include "floats.h"

typedef struct {
    uint32_t key4, value4;             /* whether in 4 bits */
    uint32_t key_dims, key_tiles;      /* padded channels; tiles of 16 bytes a channel */
    uint32_t value_dims, value_tiles;  /* padded channels; tiles of 4 tokens */
    uint32_t key_groups, value_groups; /* scales per channel; per token */
    uint64_t values, key_scales, key_minima, value_scales, value_minima, size; /* offsets; K codes are at 0 */
} am_quantized;

/* Parts of a size that cover a count. */
AM_INLINE uint32_t parts(uint32_t count, uint32_t size)
{
    return (count + size - 1) / size;
}

AM_INLINE am_quantized am_quantized_layout(uint32_t codec, am_block block)
{
    am_quantized at;
    at.key4 = codec == AM_INT4;
    at.value4 = codec != AM_INT8;
    at.key_dims = parts(block.key_dim, 4) * 4;
    at.key_tiles = parts(block.rows, at.key4 ? 32 : 16);
    at.value_dims = parts(block.value_dim, at.value4 ? 32 : 16) * (at.value4 ? 32 : 16);
    at.value_tiles = parts(block.rows, 4);
    at.key_groups = at.key4 ? at.key_tiles : 1;
    at.value_groups = at.value4 ? parts(block.value_dim, PANEL) : 1;
    at.values = (uint64_t)at.key_tiles * at.key_dims * 16;
    at.key_scales = at.values + (uint64_t)at.value_tiles * at.value_dims * (at.value4 ? 2 : 4);
    at.key_minima = at.key_scales + 2ull * at.key_groups * block.key_dim;
    at.value_scales = at.key_minima + 2ull * at.key_groups * block.key_dim;
    at.value_minima = at.value_scales + 2ull * at.value_groups * block.rows;
    at.size = at.value_minima + (at.value4 ? 2ull * at.value_groups * block.rows : 0);
    return at;
}

/* Decodes the usual blocks where the CPU has AVX-512 and bf16 instructions (quantized_avx512.c); 0 where it does not. */
int am_quantized_decode_avx512(am_quantized at, am_block block, const uint8_t *in, void *key, void *value);

#endif

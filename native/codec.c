/* The codecs by their numbers: see codec.h. The work is done in lossless.c and quantized.c. */
#include "codec.h"

#include <string.h>

static uint32_t item_of(uint32_t dtype)
{
    return dtype == AM_F32 ? 4 : dtype == AM_F16 || dtype == AM_BF16 ? 2 : 0;
}

static int is_lossless(uint32_t codec)
{
    return codec == AM_LOSSLESS || codec == AM_DENSE;
}

uint64_t am_block_bytes(am_block block)
{
    return (uint64_t)block.rows * ((uint64_t)block.key_dim + block.value_dim) * item_of(block.dtype);
}

int am_codec_takes(uint32_t codec, am_block block)
{
    if (codec == AM_RAW)
        return 1;
    if (codec >= AM_CODECS || !block.rows || block.rows > AM_CODEC_MAX_ROWS || !block.key_dim || !block.value_dim ||
        block.key_dim > AM_CODEC_MAX_DIM || block.value_dim > AM_CODEC_MAX_DIM || !item_of(block.dtype))
        return 0;
    if (is_lossless(codec) && block.dtype == AM_F16)
        return 0;
    return am_codec_size(codec, block) < am_block_bytes(block); /* padding makes tiny blocks larger */
}

int am_codec_fixed(uint32_t codec)
{
    return !is_lossless(codec);
}

uint64_t am_codec_size(uint32_t codec, am_block block)
{
    if (codec == AM_RAW)
        return am_block_bytes(block);
    return is_lossless(codec) ? am_lossless_size(codec, block) : am_quantized_size(codec, block);
}

uint64_t am_codec_encode(uint32_t codec, am_block block, const void *key, const void *value, uint8_t *out)
{
    if (codec == AM_RAW) {
        size_t row = (size_t)block.rows * item_of(block.dtype);
        memcpy(out, key, row * block.key_dim);
        memcpy(out + row * block.key_dim, value, row * block.value_dim);
        return am_block_bytes(block);
    }
    return is_lossless(codec) ? am_lossless_encode(codec, block, key, value, out)
                              : am_quantized_encode(codec, block, key, value, out);
}

int am_codec_decode(uint32_t codec, am_block block, const uint8_t *in, uint64_t size, void *key, void *value)
{
    if (codec == AM_RAW) {
        size_t row = (size_t)block.rows * item_of(block.dtype);
        if (size != am_block_bytes(block))
            return -1;
        memcpy(key, in, row * block.key_dim);
        memcpy(value, in + row * block.key_dim, row * block.value_dim);
        return 0;
    }
    return is_lossless(codec) ? am_lossless_decode(codec, block, in, size, key, value)
                              : am_quantized_decode(codec, block, in, size, key, value);
}

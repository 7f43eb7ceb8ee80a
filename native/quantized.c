/* Quantised codecs: K per channel, V per token, in 8 or 4 bits, laid out for attention in place. README.md draws them.
 *
 * One text for all instruction sets, compiled once per level. Codes are rounded by adding a constant, one rounded step
 * like all others here, so that every level and the numpy twin agree bit for bit.
 */
#include "codec.h"
#include "cpu.h"
#include "floats.h"
#include "quantized.h"

uint64_t am_quantized_size(uint32_t codec, am_block block)
{
    return am_quantized_layout(codec, block).size;
}

AM_INLINE float inverse_of(float scale)
{
    return float_of(pick(scale > 0.0f, bits_of(1.0f / scale), 0));
}

/* rint((value - minimum) * inverse), of which the low byte counts. It can't leave the range of the codes: the minimum
 * was rounded down, the scale up, and what the operations round is far less than half a step. */
AM_INLINE uint32_t code_of(float value, float minimum, float inverse)
{
    return bits_of((value - minimum) * inverse + 0x1.8p23f);
}

AM_INLINE uint32_t width_of(uint32_t dim, uint32_t first)
{
    return dim - first < PANEL ? dim - first : PANEL;
}

/* ---- Keys: scales per channel, codes [tile][dim / 4][16 tokens][4 channels] */

/* A tile of 16 tokens, of each one word of 4 channels after the other, from rows to columns or back. */
AM_INLINE void transpose(const uint8_t *from, size_t from_stride, uint32_t rows, uint8_t *to, size_t to_stride,
                         uint32_t columns)
{
    if (rows == 16 && columns == 16) { /* known counts are unrolled into shuffles */
        for (uint32_t row = 0; row < 16; row++)
            for (uint32_t c = 0; c < 16; c++)
                *(word_bits *)(to + c * to_stride + row * 4) = *(const word_bits *)(from + row * from_stride + c * 4);
        return;
    }
    for (uint32_t row = 0; row < rows; row++)
        for (uint32_t c = 0; c < columns; c++)
            *(word_bits *)(to + c * to_stride + row * 4) = *(const word_bits *)(from + row * from_stride + c * 4);
}

/* 64 scales at once, from the least and greatest value of each group: f16 as stored, floats as decoding will see them.
 * Returns -1 if a value is no number or beyond f16. */
AM_INLINE int scales_of(const int32_t *least, const int32_t *most, float codes, uint16_t *scale16, uint16_t *minimum16,
                        float *inverse, float *minimum)
{
    uint32_t outside = 0;
    for (uint32_t i = 0; i < PANEL; i++)
        outside |= (uint32_t)(least[i] < ordered(-LARGEST)) | (uint32_t)(most[i] > ordered(LARGEST));
    if (outside)
        return -1;
    for (uint32_t i = 0; i < PANEL; i++) {
        minimum16[i] = to_f16_directed(unordered(least[i]), unordered(least[i]) < 0.0f);
        minimum[i] = from_f16(minimum16[i]);
        scale16[i] = to_f16_directed((unordered(most[i]) - minimum[i]) / codes, 1);
        inverse[i] = inverse_of(from_f16(scale16[i]));
    }
    return 0;
}

AM_INLINE int encode_keys(uint32_t four, am_quantized at, am_block block, const void *key, uint8_t *out)
{
    panel_row panel[AM_CODEC_MAX_ROWS], minimum, inverse;
    uint16_t scale16[PANEL], minimum16[PANEL];
    uint8_t codes[16 * PANEL];
    for (uint32_t first = 0; first < block.key_dim; first += PANEL) {
        uint32_t width = width_of(block.key_dim, first), quads = parts(width, 4);
        for (uint32_t row = 0; row < block.rows; row++)
            load_row(block.dtype, key, (size_t)row * block.key_dim + first, width, panel[row]);
        for (uint32_t tile = 0; tile < at.key_tiles; tile++) {
            uint32_t start = tile * (four ? 32 : 16), end = start + (four ? 32 : 16);
            if (tile == 0 || four) { /* 8 bits: one scale for all rows, 4 bits: one per tile */
                uint32_t stop = four && end < block.rows ? end : block.rows;
                int32_t least[PANEL], most[PANEL];
                for (uint32_t c = 0; c < PANEL; c++)
                    least[c] = most[c] = ordered(panel[start][c]);
                for (uint32_t row = start + 1; row < stop; row++)
                    for (uint32_t c = 0; c < PANEL; c++) {
                        int32_t order = ordered(panel[row][c]);
                        least[c] = order < least[c] ? order : least[c];
                        most[c] = order > most[c] ? order : most[c];
                    }
                if (scales_of(least, most, four ? 15.0f : 255.0f, scale16, minimum16, inverse, minimum))
                    return -1;
                size_t group = ((size_t)tile * block.key_dim + first) * 2;
                memcpy(out + at.key_scales + group, scale16, width * 2);
                memcpy(out + at.key_minima + group, minimum16, width * 2);
            }
            for (uint32_t row = block.rows; row < end; row++)
                memcpy(panel[row], minimum, sizeof minimum); /* code 0 */
            for (uint32_t t = 0; t < 16; t++) {
                const float *low = panel[start + t], *high = panel[start + (four ? 16 : 0) + t];
                if (four)
                    for (uint32_t c = 0; c < PANEL; c++)
                        codes[t * PANEL + c] = (uint8_t)(code_of(low[c], minimum[c], inverse[c]) |
                                                code_of(high[c], minimum[c], inverse[c]) << 4);
                else
                    for (uint32_t c = 0; c < PANEL; c++)
                        codes[t * PANEL + c] = (uint8_t)code_of(low[c], minimum[c], inverse[c]);
            }
            uint8_t *to = out + ((size_t)tile * at.key_dims + first) * 16;
            transpose(codes, PANEL, 16, to, 64, quads);
        }
    }
    return 0;
}

AM_INLINE void decode_keys(uint32_t four, am_quantized at, am_block block, const uint8_t *in, void *key)
{
    panel_row scale, minimum, row;
    uint8_t codes[16 * PANEL] = {0};
    for (uint32_t first = 0; first < block.key_dim; first += PANEL) {
        uint32_t width = width_of(block.key_dim, first), quads = parts(width, 4);
        for (uint32_t tile = 0; tile < at.key_tiles; tile++) {
            if (tile == 0 || four) {
                size_t group = ((size_t)tile * block.key_dim + first) * 2;
                load_row(AM_F16, in + at.key_scales + group, 0, width, scale);
                load_row(AM_F16, in + at.key_minima + group, 0, width, minimum);
            }
            const uint8_t *from = in + ((size_t)tile * at.key_dims + first) * 16;
            transpose(from, 64, quads, codes, PANEL, 16);
            for (uint32_t half = 0; half <= four; half++)
                for (uint32_t t = 0; t < 16; t++) {
                    uint32_t token = tile * (four ? 32 : 16) + half * 16 + t;
                    if (token >= block.rows)
                        break;
                    if (four)
                        for (uint32_t c = 0; c < PANEL; c++)
                            row[c] = (float)(codes[t * PANEL + c] >> half * 4 & 15) * scale[c] + minimum[c];
                    else
                        for (uint32_t c = 0; c < PANEL; c++)
                            row[c] = (float)codes[t * PANEL + c] * scale[c] + minimum[c];
                    store_row(block.dtype, row, width, key, (size_t)token * block.key_dim + first);
                }
        }
    }
}

/* ---- Values: scales per token, codes [dim / 16 or 32][token / 4][16 channels][4 tokens] */

/* 16 words of 4 tokens each: no byte changes its lane. */
AM_INLINE void value_words(uint32_t four, panel_row *panel, uint32_t channel, const float *minimum,
                           const float *inverse, uint8_t *out)
{
    uint32_t words[16] = {0};
    for (uint32_t t = 0; t < 4; t++) {
        const float *low = panel[t] + channel, *high = low + 16;
        for (uint32_t c = 0; c < 16; c++) {
            uint32_t code = code_of(low[c], minimum[t], inverse[t]) & (four ? 15u : 255u);
            if (four)
                code |= (code_of(high[c], minimum[t], inverse[t]) & 15u) << 4;
            words[c] |= code << 8 * t;
        }
    }
    memcpy(out, words, 64);
}

/* One token of 16 such words. Unrolled too early, the loops would not become vectors. */
AM_INLINE void value_row(uint32_t four, const word_bits *words, uint32_t t, float scale, float minimum, float *row)
{
    if (four)
#pragma GCC unroll 1
        for (uint32_t c = 0; c < 16; c++) {
            row[c] = (float)(int32_t)(words[c] >> 8 * t & 15u) * scale + minimum;
            row[16 + c] = (float)(int32_t)(words[c] >> (8 * t + 4) & 15u) * scale + minimum;
        }
    else
#pragma GCC unroll 1
        for (uint32_t c = 0; c < 16; c++)
            row[c] = (float)((int32_t)(words[c] << (24 - 8 * t)) >> 24) * scale;
}

AM_INLINE void load_panel(am_block block, const void *value, uint32_t first, panel_row *panel)
{
    uint32_t width = width_of(block.value_dim, first);
    for (uint32_t row = 0; row < block.rows; row++)
        load_row(block.dtype, value, (size_t)row * block.value_dim + first, width, panel[row]);
}

/* In 8 bits a token has one scale for all channels, so these are looked at twice. */
AM_INLINE int value8_scales(am_block block, const void *value, panel_row *panel, uint16_t *scale16, float *inverse)
{
    uint32_t largest[PANEL] = {0}, outside = 0;
    for (uint32_t first = 0; first < block.value_dim; first += PANEL) {
        load_panel(block, value, first, panel);
        for (uint32_t row = 0; row < block.rows; row++) {
            uint32_t most = 0;
            for (uint32_t c = 0; c < PANEL; c++) {
                uint32_t magnitude = bits_of(panel[row][c]) & 0x7FFFFFFFu;
                most = magnitude > most ? magnitude : most;
            }
            largest[row] = most > largest[row] ? most : largest[row];
        }
    }
    for (uint32_t t = 0; t < PANEL; t++)
        outside |= largest[t] > bits_of(LARGEST);
    if (outside)
        return -1;
    for (uint32_t t = 0; t < PANEL; t++) {
        scale16[t] = to_f16_directed(float_of(largest[t]) / 127.0f, 1);
        inverse[t] = inverse_of(from_f16(scale16[t]));
    }
    return 0;
}

AM_INLINE int value4_scales(uint32_t rows, uint32_t width, panel_row *panel, uint16_t *scale16, uint16_t *minimum16,
                            float *inverse, float *minimum)
{
    int32_t least[PANEL] = {0}, most[PANEL] = {0};
    for (uint32_t row = 0; row < rows; row++) {
        int32_t low = INT32_MAX, high = INT32_MIN;
        for (uint32_t c = width; c < PANEL; c++)
            panel[row][c] = panel[row][0];
        for (uint32_t c = 0; c < PANEL; c++) {
            int32_t order = ordered(panel[row][c]);
            low = order < low ? order : low;
            high = order > high ? order : high;
        }
        least[row] = low;
        most[row] = high;
    }
    if (scales_of(least, most, 15.0f, scale16, minimum16, inverse, minimum))
        return -1;
    for (uint32_t row = 0; row < rows; row++)
        for (uint32_t c = width; c < PANEL; c++)
            panel[row][c] = minimum[row]; /* code 0 */
    return 0;
}

AM_INLINE int encode_values(uint32_t four, am_quantized at, am_block block, const void *value, uint8_t *out)
{
    panel_row panel[AM_CODEC_MAX_ROWS], minimum = {0}, inverse;
    uint16_t scale16[PANEL], minimum16[PANEL];
    if (!four) {
        if (value8_scales(block, value, panel, scale16, inverse))
            return -1;
        memcpy(out + at.value_scales, scale16, block.rows * 2);
    }
    for (uint32_t row = block.rows; row < at.value_tiles * 4; row++)
        memset(panel[row], 0, sizeof panel[row]);
    for (uint32_t first = 0; first < block.value_dim; first += PANEL) {
        uint32_t width = width_of(block.value_dim, first);
        if (four || block.value_dim > PANEL)
            load_panel(block, value, first, panel);
        if (four) {
            size_t group = (size_t)first / PANEL * block.rows * 2;
            if (value4_scales(block.rows, width, panel, scale16, minimum16, inverse, minimum))
                return -1;
            memcpy(out + at.value_scales + group, scale16, block.rows * 2);
            memcpy(out + at.value_minima + group, minimum16, block.rows * 2);
        }
        for (uint32_t channel = 0; channel < width; channel += four ? 32 : 16)
            for (uint32_t tile = 0; tile < at.value_tiles; tile++) {
                uint32_t strip = (first + channel) / (four ? 32 : 16);
                value_words(four, panel + tile * 4, channel, minimum + tile * 4, inverse + tile * 4,
                            out + at.values + ((size_t)strip * at.value_tiles + tile) * 64);
            }
    }
    return 0;
}

AM_INLINE void decode_values(uint32_t four, am_quantized at, am_block block, const uint8_t *in, void *value)
{
    panel_row rows[4] = {{0}}, scale, minimum = {0};
    uint32_t step = four ? 32 : 16;
    for (uint32_t first = 0; first < block.value_dim; first += PANEL) {
        uint32_t width = width_of(block.value_dim, first);
        if (first == 0 || four) {
            size_t group = (size_t)first / PANEL * block.rows * 2;
            load_row(AM_F16, in + at.value_scales + group, 0, block.rows, scale);
            if (four)
                load_row(AM_F16, in + at.value_minima + group, 0, block.rows, minimum);
        }
        for (uint32_t tile = 0; tile < at.value_tiles; tile++) {
            const float *s = scale + tile * 4, *m = minimum + tile * 4;
            for (uint32_t channel = 0; channel < width; channel += step) {
                uint32_t strip = (first + channel) / step;
                const uint8_t *words = in + at.values + ((size_t)strip * at.value_tiles + tile) * 64;
                for (uint32_t t = 0; t < 4; t++)
                    value_row(four, (const word_bits *)words, t, s[t], m[t], rows[t] + channel);
            }
            for (uint32_t t = 0; t < 4 && tile * 4 + t < block.rows; t++)
                store_row(block.dtype, rows[t], width, value, ((size_t)tile * 4 + t) * block.value_dim + first);
        }
    }
}

/* ---- One of each per level */

typedef struct {
    int (*encode)(am_quantized at, am_block block, const void *key, const void *value, uint8_t *out);
    void (*decode)(am_quantized at, am_block block, const uint8_t *in, void *key, void *value);
} kernels;

#define KERNELS(level, target)                                                                                         \
    target static int encode_##level(am_quantized at, am_block block, const void *key, const void *value, uint8_t *out)\
    {                                                                                                                  \
        if (at.key4 ? encode_keys(1, at, block, key, out) : encode_keys(0, at, block, key, out))                       \
            return -1;                                                                                                 \
        return at.value4 ? encode_values(1, at, block, value, out) : encode_values(0, at, block, value, out);          \
    }                                                                                                                  \
    target static void decode_##level(am_quantized at, am_block block, const uint8_t *in, void *key, void *value)      \
    {                                                                                                                  \
        at.key4 ? decode_keys(1, at, block, in, key) : decode_keys(0, at, block, in, key);                             \
        at.value4 ? decode_values(1, at, block, in, value) : decode_values(0, at, block, in, value);                   \
    }

KERNELS(scalar, )
#if defined(__x86_64__)
KERNELS(avx2, AM_TARGET_AVX2)
KERNELS(avx512, AM_TARGET_AVX512)
#endif

static kernels chosen(void)
{
    switch (am_cpu_level()) {
#if defined(__x86_64__)
    case AM_AVX512:
        return (kernels){encode_avx512, decode_avx512};
    case AM_AVX2:
        return (kernels){encode_avx2, decode_avx2};
#endif
    default: /* on ARM the compiler uses NEON unasked */
        return (kernels){encode_scalar, decode_scalar};
    }
}

uint64_t am_quantized_encode(uint32_t codec, am_block block, const void *key, const void *value, uint8_t *out)
{
    am_quantized at = am_quantized_layout(codec, block);
    size_t values = (size_t)block.rows * block.value_dim * (block.dtype == AM_F32 ? 4 : 2);
    for (size_t i = 0; i < values; i += 64)
        __builtin_prefetch((const uint8_t *)value + i); /* while the keys are done; a sixth of the time on cold data */
    return chosen().encode(at, block, key, value, out) ? 0 : at.size;
}

int am_quantized_decode(uint32_t codec, am_block block, const uint8_t *in, uint64_t size, void *key, void *value)
{
    am_quantized at = am_quantized_layout(codec, block);
    uint32_t wrong = size != at.size;
    /* Encoding makes no scale that isn't finite; with one, what a NaN becomes would be up to the processor. */
    for (uint64_t i = at.key_scales; !wrong && i < at.size; i += 2)
        wrong = (*(const half_bits *)(in + i) & 0x7C00u) == 0x7C00u;
    if (wrong)
        return -1;
    if (!am_quantized_decode_avx512(at, block, in, key, value))
        chosen().decode(at, block, in, key, value);
    return 0;
}

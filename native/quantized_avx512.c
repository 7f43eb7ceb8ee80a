/* Decoding of the usual quantised blocks with AVX-512 and its bf16 instructions: 64 tokens, whole panels of 64 channels,
 * bf16 out. The same bits as quantized.c, which does all other blocks, in a third of its time.
 *
 * vcvtne2ps2bf16 rounds to nearest even but takes subnormals for zero. There are none: scales and minima are f16, so every
 * decoded value is a multiple of 2^-24.
 */
#include "cpu.h"
#include "quantized.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define TARGET                                                                                                         \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt,sse4.2")))
#define INLINE TARGET __attribute__((always_inline)) static inline

/* 64 values, in order, as bf16 to `to`, which is a multiple of 64. */
INLINE void store64(uint16_t *to, __m512 a, __m512 b, __m512 c, __m512 d)
{
    _mm512_stream_si512((__m512i *)(void *)to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    _mm512_stream_si512((__m512i *)(void *)(to + 32), (__m512i)_mm512_cvtne2ps_pbh(d, c));
}

INLINE __m512 halves(const uint8_t *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)at));
}

/* A tile of codes, [16 quads of channels][16 tokens][4 channels], to [16 tokens][64 channels]: 16 x 16 words transposed. */
INLINE void transpose(const uint8_t *from, __m512i *rows)
{
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++)
        a[i] = _mm512_loadu_si512(from + 64 * i);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    /* a[4 g + k] has, in its 128-bit lane l, the words of token 4 l + k from quads 4 g to 4 g + 3. */
    for (int k = 0; k < 4; k++) {
        __m512i low = _mm512_shuffle_i32x4(a[k], a[4 + k], 0x44), high = _mm512_shuffle_i32x4(a[k], a[4 + k], 0xEE);
        __m512i low2 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0x44);
        __m512i high2 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0xEE);
        rows[k] = _mm512_shuffle_i32x4(low, low2, 0x88);
        rows[4 + k] = _mm512_shuffle_i32x4(low, low2, 0xDD);
        rows[8 + k] = _mm512_shuffle_i32x4(high, high2, 0x88);
        rows[12 + k] = _mm512_shuffle_i32x4(high, high2, 0xDD);
    }
}

/* 16 of 64 codes as floats: code * scale + minimum, in two roundings. */
#define PART(codes, part)                                                                                              \
    _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32((codes), (part)))),  \
                                scale[part]),                                                                          \
                  minimum[part])

TARGET static void decode_keys(int four, am_quantized at, am_block block, const uint8_t *in, uint16_t *key)
{
    __m512i rows[16], nibble = _mm512_set1_epi8(15);
    __m512 scale[4] = {{0}}, minimum[4] = {{0}};
    for (uint32_t first = 0; first < block.key_dim; first += 64)
        for (uint32_t tile = 0; tile < at.key_tiles; tile++) {
            if (tile == 0 || four)
                for (int i = 0; i < 4; i++) {
                    size_t group = ((size_t)(four ? tile : 0) * block.key_dim + first + 16 * (uint32_t)i) * 2;
                    scale[i] = halves(in + at.key_scales + group);
                    minimum[i] = halves(in + at.key_minima + group);
                }
            transpose(in + ((size_t)tile * at.key_dims + first) * 16, rows);
            uint16_t *to = key + (size_t)tile * (four ? 32 : 16) * block.key_dim + first;
            for (int t = 0; t < 16; t++, to += block.key_dim) {
                __m512i codes = four ? _mm512_and_si512(rows[t], nibble) : rows[t];
                store64(to, PART(codes, 0), PART(codes, 1), PART(codes, 2), PART(codes, 3));
            }
            for (int t = 0; four && t < 16; t++, to += block.key_dim) {
                __m512i codes = _mm512_and_si512(_mm512_srli_epi16(rows[t], 4), nibble);
                store64(to, PART(codes, 0), PART(codes, 1), PART(codes, 2), PART(codes, 3));
            }
        }
}

TARGET static void decode_values8(am_quantized at, am_block block, const uint8_t *in, uint16_t *value)
{
    for (uint32_t first = 0; first < block.value_dim; first += 64)
        for (uint32_t tile = 0; tile < at.value_tiles; tile++) {
            __m512i words[4];
            for (uint32_t i = 0; i < 4; i++)
                words[i] = _mm512_loadu_si512(in + at.values + ((size_t)(first / 16 + i) * at.value_tiles + tile) * 64);
            for (uint32_t t = 0; t < 4; t++) {
                __m512 scale = _mm512_set1_ps(
                    _cvtsh_ss(*(const half_bits *)(const void *)(in + at.value_scales + (tile * 4 + t) * 2)));
                __m512 row[4];
                for (int i = 0; i < 4; i++) {
                    __m512i code = _mm512_srai_epi32(_mm512_sllv_epi32(words[i], _mm512_set1_epi32(24 - 8 * (int)t)), 24);
                    row[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(code), scale);
                }
                store64(value + (size_t)(tile * 4 + t) * block.value_dim + first, row[0], row[1], row[2], row[3]);
            }
        }
}

TARGET static void decode_values4(am_quantized at, am_block block, const uint8_t *in, uint16_t *value)
{
    __m512i nibble = _mm512_set1_epi32(15);
    for (uint32_t first = 0; first < block.value_dim; first += 64)
        for (uint32_t tile = 0; tile < at.value_tiles; tile++) {
            __m512i words[2];
            for (uint32_t i = 0; i < 2; i++)
                words[i] = _mm512_loadu_si512(in + at.values + ((size_t)(first / 32 + i) * at.value_tiles + tile) * 64);
            for (uint32_t t = 0; t < 4; t++) {
                size_t group = ((size_t)first / 64 * block.rows + tile * 4 + t) * 2;
                __m512 scale = _mm512_set1_ps(_cvtsh_ss(*(const half_bits *)(const void *)(in + at.value_scales + group)));
                __m512 minimum = _mm512_set1_ps(_cvtsh_ss(*(const half_bits *)(const void *)(in + at.value_minima + group)));
                __m512 row[4];
                for (int i = 0; i < 4; i++) {
                    __m512i shift = _mm512_set1_epi32(8 * (int)t + (i & 1 ? 4 : 0));
                    __m512i code = _mm512_and_si512(_mm512_srlv_epi32(words[i / 2], shift), nibble);
                    row[i] = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(code), scale), minimum);
                }
                store64(value + (size_t)(tile * 4 + t) * block.value_dim + first, row[0], row[1], row[2], row[3]);
            }
        }
}

int am_quantized_decode_avx512(am_quantized at, am_block block, const uint8_t *in, void *key, void *value)
{
    if (am_cpu_level() != AM_AVX512 || !__builtin_cpu_supports("avx512bf16") || block.dtype != AM_BF16 ||
        block.rows != 64 || block.key_dim % 64 || block.value_dim % 64 || (uintptr_t)key % 64 || (uintptr_t)value % 64)
        return 0;
    decode_keys(at.key4 != 0, at, block, in, key);
    if (at.value4)
        decode_values4(at, block, in, value);
    else
        decode_values8(at, block, in, value);
    return 1;
}
#else
int am_quantized_decode_avx512(am_quantized at, am_block block, const uint8_t *in, void *key, void *value)
{
    (void)at, (void)block, (void)in, (void)key, (void)value;
    return 0;
}
#endif

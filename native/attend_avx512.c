/* Attention over spans of blocks for AVX-512 with VNNI: codes of 16 bits are two bytes, two dpbusd per 64 products. */
#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET AM_TARGET_AVX512
#define INLINE TARGET __attribute__((always_inline)) static inline
#define PIECES 1
#define KERNEL am_span_avx512
#include "attend_lanes.h"

INLINE v16 maximum(v16 a, v16 b)
{
    return (v16){{(floats)_mm512_max_ps((__m512)a.part[0], (__m512)b.part[0])}};
}

INLINE float first_lane(v16 a)
{
    return _mm512_cvtss_f32((__m512)a.part[0]);
}

INLINE float lanes_sum(v16 a)
{
    __m512 x = (__m512)a.part[0];
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

INLINE float lanes_max(v16 a)
{
    __m512 x = (__m512)a.part[0];
    __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

INLINE v16 halves(uint32_t dtype, __m512i words)
{
    return (v16){{dtype == AM_BF16 ? (floats)_mm512_slli_epi32(words, 16)
                                   : (floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(words))}};
}

INLINE v16 low_halves(uint32_t dtype, v16 a)
{
    return halves(dtype, (__m512i)a.part[0]);
}

INLINE v16 high_halves(uint32_t dtype, v16 a)
{
    return halves(dtype, _mm512_srli_epi32((__m512i)a.part[0], 16));
}

INLINE v16 sixteen(uint32_t dtype, const uint8_t *from)
{
    if (dtype == AM_F32)
        return load(from);
    __m256i values = _mm256_loadu_si256((const __m256i *)(const void *)from);
    return (v16){{dtype == AM_F16 ? (floats)_mm512_cvtph_ps(values)
                                  : (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)}};
}

INLINE void transpose(v16 rows[16])
{
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++)
        a[i] = (__m512i)rows[i].part[0];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    /* a[4 g + k] has, in its 128-bit lane l, column 4 l + k of rows 4 g to 4 g + 3. */
    for (int k = 0; k < 4; k++) {
        __m512i low = _mm512_shuffle_i32x4(a[k], a[4 + k], 0x44), high = _mm512_shuffle_i32x4(a[k], a[4 + k], 0xEE);
        __m512i low2 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0x44);
        __m512i high2 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0xEE);
        rows[k].part[0] = (floats)_mm512_shuffle_i32x4(low, low2, 0x88);
        rows[4 + k].part[0] = (floats)_mm512_shuffle_i32x4(low, low2, 0xDD);
        rows[8 + k].part[0] = (floats)_mm512_shuffle_i32x4(high, high2, 0x88);
        rows[12 + k].part[0] = (floats)_mm512_shuffle_i32x4(high, high2, 0xDD);
    }
}

/* High bytes in codes[0], low bytes in codes[1]. The low one of a query is signed, so the high one takes its carry. */
INLINE void store_codes(uint32_t codes[2][64], uint32_t at, v16 values, int key)
{
    __m512i code = (__m512i)values.part[0];
    __m512i high = _mm512_srli_epi32(key ? _mm512_add_epi32(code, _mm512_set1_epi32(128)) : code, 8);
    _mm_storeu_si128((__m128i *)(void *)(codes[0] + at / 4), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i *)(void *)(codes[1] + at / 4), _mm512_cvtepi32_epi8(code));
}

INLINE __m512i product(int key, __m512i sum, __m512i bytes, __m512i codes)
{
    return key ? _mm512_dpbusd_epi32(sum, bytes, codes) : _mm512_dpbusd_epi32(sum, codes, bytes);
}

INLINE void dot_pair(uint32_t rows, uint32_t four, int key, const uint8_t *a, const uint8_t *b, uint32_t count,
                     uint32_t codes[4][2][64], int32_t sums[4][32], ptrdiff_t ahead)
{
    __m512i high[4][2], low[4][2];
    const __m512i nibble = _mm512_set1_epi8(15);
    for (uint32_t r = 0; r < rows; r++)
        high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
    for (uint32_t k = 0; k < count; k++) {
        __m512i first = _mm512_loadu_si512(a + 64 * k), second;
        if (four) {
            second = _mm512_and_si512(_mm512_srli_epi16(first, 4), nibble);
            first = _mm512_and_si512(first, nibble);
        } else
            second = _mm512_loadu_si512(b + 64 * k);
        if (ahead) {
            __builtin_prefetch(a + ahead + 64 * k);
            if (!four)
                __builtin_prefetch(b + ahead + 64 * k);
        }
#pragma GCC unroll 4
        for (uint32_t r = 0; r < rows; r++) {
            __m512i code = _mm512_set1_epi32((int32_t)codes[r][0][k]);
            high[r][0] = product(key, high[r][0], first, code);
            high[r][1] = product(key, high[r][1], second, code);
            code = _mm512_set1_epi32((int32_t)codes[r][1][k]);
            low[r][0] = product(key, low[r][0], first, code);
            low[r][1] = product(key, low[r][1], second, code);
        }
    }
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t half = 0; half < 2; half++)
            _mm512_storeu_si512(&sums[r][16 * half], _mm512_add_epi32(_mm512_slli_epi32(high[r][half], 8), low[r][half]));
}

#include "attend_kernel.h"
#else
typedef int no_avx512;
#endif

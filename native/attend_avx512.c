/* Attention over spans of blocks for AVX-512 with VNNI: codes of 16 bits are two bytes, two dpbusd per 64 products. */
#include "attend.h"
#include "cpu.h"
#include "floats.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET AM_TARGET_AVX512
#define INLINE TARGET __attribute__((always_inline)) static inline
#define KERNEL am_span_avx512

INLINE v16 maximum(v16 a, v16 b)
{
    return (v16)_mm512_max_ps((__m512)a, (__m512)b);
}

INLINE float lanes_sum(v16 all)
{
    __m512 x = (__m512)all;
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

INLINE float lanes_max(v16 all)
{
    __m512 x = (__m512)all;
    __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

/* High bytes in codes[0], low bytes in codes[1]. The low one of a query is signed, so the high one takes its carry. */
INLINE void store_codes(uint32_t codes[2][64], uint32_t at, i16 values, int key)
{
    __m512i code = (__m512i)values, high = _mm512_srai_epi32(key ? _mm512_add_epi32(code, _mm512_set1_epi32(128)) : code, 8);
    _mm_storeu_si128((__m128i *)(void *)(codes[0] + at / 4), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i *)(void *)(codes[1] + at / 4), _mm512_cvtepi32_epi8(code));
}

INLINE __m512i product(int key, __m512i sum, __m512i bytes, __m512i codes)
{
    return key ? _mm512_dpbusd_epi32(sum, bytes, codes) : _mm512_dpbusd_epi32(sum, codes, bytes);
}

INLINE void dot_pair(uint32_t rows, uint32_t four, int key, const uint8_t *a, const uint8_t *b, uint32_t count,
                     uint32_t codes[4][2][64], int32_t sums[4][32])
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

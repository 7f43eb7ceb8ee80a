/* Attention over spans of blocks for AVX2: bytes become 16 bits, codes are 16 bits, and madd adds products in pairs. */
#include "attend.h"
#include "cpu.h"
#include "floats.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET AM_TARGET_AVX2
#define INLINE TARGET __attribute__((always_inline)) static inline
#define KERNEL am_span_avx2

typedef union {
    v16 all;
    __m256 half[2];
    __m256i whole[2];
} halves;

INLINE v16 maximum(v16 a, v16 b)
{
    halves x = {.all = a}, y = {.all = b};
    x.half[0] = _mm256_max_ps(x.half[0], y.half[0]);
    x.half[1] = _mm256_max_ps(x.half[1], y.half[1]);
    return x.all;
}

INLINE float lanes_sum(v16 all)
{
    halves x = {.all = all};
    __m256 half = _mm256_add_ps(x.half[0], x.half[1]);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

INLINE float lanes_max(v16 all)
{
    halves x = {.all = all};
    __m256 half = _mm256_max_ps(x.half[0], x.half[1]);
    __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

/* Of each four codes, 0 and 2 in a word of codes[0], 1 and 3 in a word of codes[1]. */
INLINE void store_codes(uint32_t codes[2][64], uint32_t at, i16 values, int key)
{
    (void)key;
    halves x = {.all = (v16)values};
    __m256i pairs = _mm256_packs_epi32(_mm256_shuffle_epi32(x.whole[0], 0xD8), _mm256_shuffle_epi32(x.whole[1], 0xD8));
    pairs = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
    _mm_storeu_si128((__m128i *)(void *)(codes[0] + at / 4), _mm256_castsi256_si128(pairs));
    _mm_storeu_si128((__m128i *)(void *)(codes[1] + at / 4), _mm256_extracti128_si256(pairs, 1));
}

/* One tile of the pair. */
INLINE void dot_tile(uint32_t rows, uint32_t four, int key, uint32_t upper, const uint8_t *tile, uint32_t count,
                     uint32_t codes[4][2][64], int32_t sums[4][32])
{
    __m256i sum[4][2];
    const __m256i byte = _mm256_set1_epi16(255), nibble = _mm256_set1_epi8(15);
    for (uint32_t r = 0; r < rows; r++)
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (uint32_t k = 0; k < count; k++) {
        __m256i even[2], odd[2];
        for (uint32_t half = 0; half < 2; half++) {
            __m256i bytes = _mm256_loadu_si256((const __m256i *)(const void *)(tile + 64 * k + 32 * half));
            if (four)
                bytes = _mm256_and_si256(upper ? _mm256_srli_epi16(bytes, 4) : bytes, nibble);
            if (four || key) {
                even[half] = _mm256_and_si256(bytes, byte);
                odd[half] = _mm256_srli_epi16(bytes, 8);
            } else {
                even[half] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
                odd[half] = _mm256_srai_epi16(bytes, 8);
            }
        }
#pragma GCC unroll 4
        for (uint32_t r = 0; r < rows; r++) {
            __m256i first = _mm256_set1_epi32((int32_t)codes[r][0][k]), second = _mm256_set1_epi32((int32_t)codes[r][1][k]);
            for (uint32_t half = 0; half < 2; half++)
                sum[r][half] = _mm256_add_epi32(sum[r][half], _mm256_add_epi32(_mm256_madd_epi16(even[half], first),
                                                                               _mm256_madd_epi16(odd[half], second)));
        }
    }
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t half = 0; half < 2; half++)
            _mm256_storeu_si256((__m256i *)(void *)&sums[r][16 * upper + 8 * half], sum[r][half]);
}

INLINE void dot_pair(uint32_t rows, uint32_t four, int key, const uint8_t *a, const uint8_t *b, uint32_t count,
                     uint32_t codes[4][2][64], int32_t sums[4][32])
{
    dot_tile(rows, four, key, 0, a, count, codes, sums);
    dot_tile(rows, four, key, 1, four ? a : b, count, codes, sums);
}

#include "attend_kernel.h"
#else
typedef int no_avx2;
#endif

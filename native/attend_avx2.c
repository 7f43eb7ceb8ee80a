/* Attention over spans of blocks for AVX2: bytes become 16 bits, codes are 16 bits, and madd adds products in pairs. */
#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET AM_TARGET_AVX2
#define INLINE TARGET __attribute__((always_inline)) static inline
#define PIECES 2
#define KERNEL am_span_avx2
#include "attend_lanes.h"

INLINE v16 maximum(v16 a, v16 b)
{
#define PART(i) (floats)_mm256_max_ps((__m256)a.part[i], (__m256)b.part[i])
    return EACH(PART);
#undef PART
}

INLINE float first_lane(v16 a)
{
    return _mm256_cvtss_f32((__m256)a.part[0]);
}

INLINE float lanes_sum(v16 a)
{
    __m256 half = _mm256_add_ps((__m256)a.part[0], (__m256)a.part[1]);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

INLINE float lanes_max(v16 a)
{
    __m256 half = _mm256_max_ps((__m256)a.part[0], (__m256)a.part[1]);
    __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

INLINE floats half_floats(uint32_t dtype, __m256i words)
{
    if (dtype == AM_BF16)
        return (floats)_mm256_slli_epi32(words, 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    return (floats)_mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

INLINE v16 low_halves(uint32_t dtype, v16 a)
{
#define PART(i) half_floats(dtype, _mm256_and_si256((__m256i)a.part[i], _mm256_set1_epi32(0xFFFF)))
    return EACH(PART);
#undef PART
}

INLINE v16 high_halves(uint32_t dtype, v16 a)
{
#define PART(i) half_floats(dtype, _mm256_srli_epi32((__m256i)a.part[i], 16))
    return EACH(PART);
#undef PART
}

INLINE floats eight(uint32_t dtype, const uint8_t *from)
{
    __m128i values = _mm_loadu_si128((const __m128i *)(const void *)from);
    return dtype == AM_F16 ? (floats)_mm256_cvtph_ps(values) : (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16);
}

INLINE v16 sixteen(uint32_t dtype, const uint8_t *from)
{
#define PART(i) eight(dtype, from + 16 * i)
    return dtype == AM_F32 ? load(from) : EACH(PART);
#undef PART
}

/* 8 x 8 words: piece `half` of the rows, to piece `to_half` of the columns. */
INLINE void transpose8(const v16 *rows, uint32_t half, v16 *to, uint32_t to_half)
{
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i++)
        a[i] = (__m256i)rows[i].part[half];
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int k = 0; k < 4; k++) {
        to[k].part[to_half] = (floats)_mm256_permute2x128_si256(a[k], a[4 + k], 0x20);
        to[4 + k].part[to_half] = (floats)_mm256_permute2x128_si256(a[k], a[4 + k], 0x31);
    }
}

INLINE void transpose(v16 rows[16])
{
    v16 columns[16];
    for (uint32_t half = 0; half < 2; half++) {
        transpose8(rows, half, columns + 8 * half, 0);
        transpose8(rows + 8, half, columns + 8 * half, 1);
    }
    memcpy(rows, columns, sizeof columns);
}

/* Of each four codes, 0 and 2 in a word of codes[0], 1 and 3 in a word of codes[1]. */
INLINE void store_codes(uint32_t codes[2][64], uint32_t at, v16 values, int key)
{
    (void)key;
    /* The codes are the low 16 bits, of which packing takes no other. */
#define LOW(i) _mm256_srai_epi32(_mm256_slli_epi32(_mm256_shuffle_epi32((__m256i)values.part[i], 0xD8), 16), 16)
    __m256i pairs = _mm256_packs_epi32(LOW(0), LOW(1));
#undef LOW
    pairs = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
    _mm_storeu_si128((__m128i *)(void *)(codes[0] + at / 4), _mm256_castsi256_si128(pairs));
    _mm_storeu_si128((__m128i *)(void *)(codes[1] + at / 4), _mm256_extracti128_si256(pairs, 1));
}

/* One tile of the pair. */
INLINE void dot_tile(uint32_t rows, uint32_t four, int key, uint32_t upper, const uint8_t *tile, uint32_t count,
                     uint32_t codes[4][2][64], int32_t sums[4][32], ptrdiff_t ahead)
{
    __m256i sum[4][2];
    const __m256i byte = _mm256_set1_epi16(255), nibble = _mm256_set1_epi8(15);
    for (uint32_t r = 0; r < rows; r++)
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (uint32_t k = 0; k < count; k++) {
        __m256i even[2], odd[2];
        if (ahead)
            __builtin_prefetch(tile + ahead + 64 * k);
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
                     uint32_t codes[4][2][64], int32_t sums[4][32], ptrdiff_t ahead)
{
    dot_tile(rows, four, key, 0, a, count, codes, sums, ahead);
    dot_tile(rows, four, key, 1, four ? a : b, count, codes, sums, four ? 0 : ahead);
}

#include "attend_kernel.h"
#else
typedef int no_avx2;
#endif

/* AVX2 and AVX-512 kernels of the fast lossless codec: see lossless.h. */
#include "cpu.h"
#include "lossless.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* Every block of a page follows the one before: fetching so far ahead brings in the next block's planes. */
#define AHEAD 4096

AM_TARGET_AVX2 unsigned am_largest_avx2(const uint16_t *values, size_t count)
{
    __m256i most = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 16 <= count; i += 16)
        most = _mm256_max_epu16(most, _mm256_and_si256(_mm256_loadu_si256((const void *)(values + i)),
                                                       _mm256_set1_epi16(0x7f80)));
    uint16_t lanes[16];
    _mm256_storeu_si256((void *)lanes, most);
    unsigned largest = am_largest_scalar(lanes, 16), last = am_largest_scalar(values + i, count - i);
    return largest > last ? largest : last;
}

/* Codes of 16 values. */
AM_TARGET_AVX2 static inline __m256i codes_avx2(__m256i values, __m256i top)
{
    __m256i exponents = _mm256_and_si256(_mm256_srli_epi16(values, 7), _mm256_set1_epi16(255));
    __m256i codes = _mm256_min_epu16(_mm256_sub_epi16(top, exponents), _mm256_set1_epi16(AM_ZERO));
    __m256i outside = _mm256_cmpeq_epi16(codes, _mm256_set1_epi16(AM_ZERO));
    __m256i zero = _mm256_cmpeq_epi16(exponents, _mm256_setzero_si256());
    return _mm256_sub_epi16(codes, _mm256_andnot_si256(zero, outside)); /* AM_ESCAPE is AM_ZERO + 1 */
}

/* Signs and mantissas of 32 values. */
AM_TARGET_AVX2 static inline __m256i rests_avx2(__m256i first, __m256i second)
{
    const __m256i sign = _mm256_set1_epi16(0x80), mantissa = _mm256_set1_epi16(0x7f);
    first = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(first, 8), sign), _mm256_and_si256(first, mantissa));
    second = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(second, 8), sign), _mm256_and_si256(second, mantissa));
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xd8);
}

AM_TARGET_AVX2 int am_pack_avx2(const uint16_t *low, const uint16_t *high, size_t pairs, unsigned top,
                                uint8_t *codes, uint8_t *rest_low, uint8_t *rest_high, am_escapes_out *escapes)
{
    const __m256i tops = _mm256_set1_epi16((short)top), escape = _mm256_set1_epi8(AM_ESCAPE);
    size_t i = 0;
    for (; i + 32 <= pairs; i += 32) {
        __m256i a = _mm256_loadu_si256((const void *)(low + i)), b = _mm256_loadu_si256((const void *)(low + i + 16));
        __m256i c = _mm256_loadu_si256((const void *)(high + i)), d = _mm256_loadu_si256((const void *)(high + i + 16));
        _mm256_storeu_si256((void *)(rest_low + i), rests_avx2(a, b));
        _mm256_storeu_si256((void *)(rest_high + i), rests_avx2(c, d));
        a = _mm256_permute4x64_epi64(_mm256_packus_epi16(codes_avx2(a, tops), codes_avx2(b, tops)), 0xd8);
        c = _mm256_permute4x64_epi64(_mm256_packus_epi16(codes_avx2(c, tops), codes_avx2(d, tops)), 0xd8);
        _mm256_storeu_si256((void *)(codes + i), _mm256_or_si256(a, _mm256_slli_epi16(c, 4)));
        uint32_t first = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, escape));
        uint32_t second = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(c, escape));
        if ((first | second) && am_escapes_put(first, second, low + i, high + i, escapes))
            return -1;
    }
    return am_pack_scalar(low + i, high + i, pairs - i, top, codes + i, rest_low + i, rest_high + i, escapes);
}

/* Stores 32 values; `codes` and `rest` have their 8-byte groups in the order 0 2 1 3. */
AM_TARGET_AVX2 static inline void join_avx2(__m256i codes, __m256i rest, __m256i top, uint16_t *values)
{
    const __m256i sign = _mm256_set1_epi8((char)0x80);
    __m256i zero = _mm256_cmpeq_epi8(codes, _mm256_set1_epi8(AM_ZERO));
    __m256i exponents = _mm256_andnot_si256(zero, _mm256_sub_epi8(top, codes));
    __m256i upper = _mm256_and_si256(_mm256_srli_epi16(exponents, 1), _mm256_set1_epi8(0x7f));
    __m256i lower = _mm256_and_si256(_mm256_slli_epi16(exponents, 7), sign);
    upper = _mm256_or_si256(upper, _mm256_and_si256(rest, sign));
    lower = _mm256_or_si256(lower, _mm256_andnot_si256(sign, rest));
    _mm256_storeu_si256((void *)values, _mm256_unpacklo_epi8(lower, upper));
    _mm256_storeu_si256((void *)(values + 16), _mm256_unpackhi_epi8(lower, upper));
}

AM_TARGET_AVX2 int am_unpack_avx2(const uint8_t *codes, const uint8_t *rest_low, const uint8_t *rest_high,
                                  size_t pairs, unsigned top, uint16_t *low, uint16_t *high, am_escapes_in *escapes)
{
    const __m256i tops = _mm256_set1_epi8((char)top), escape = _mm256_set1_epi8(AM_ESCAPE);
    __m256i least = _mm256_set1_epi8((char)escapes->least);
    size_t i = 0;
    for (; i + 32 <= pairs; i += 32) {
        _mm_prefetch((const char *)((uintptr_t)(codes + i) + AHEAD), _MM_HINT_T0);
        _mm_prefetch((const char *)((uintptr_t)(rest_low + i) + AHEAD), _MM_HINT_T0);
        _mm_prefetch((const char *)((uintptr_t)(rest_high + i) + AHEAD), _MM_HINT_T0);
        __m256i both = _mm256_permute4x64_epi64(_mm256_loadu_si256((const void *)(codes + i)), 0xd8);
        __m256i a = _mm256_permute4x64_epi64(_mm256_loadu_si256((const void *)(rest_low + i)), 0xd8);
        __m256i b = _mm256_permute4x64_epi64(_mm256_loadu_si256((const void *)(rest_high + i)), 0xd8);
        __m256i first = _mm256_and_si256(both, escape), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), escape);
        join_avx2(first, a, tops, low + i);
        join_avx2(second, b, tops, high + i);
        least = _mm256_min_epu8(least, _mm256_min_epu8(first, second));
        __m256i marks_low = _mm256_cmpeq_epi8(first, escape), marks_high = _mm256_cmpeq_epi8(second, escape);
        if (!_mm256_testz_si256(_mm256_or_si256(marks_low, marks_high), _mm256_set1_epi8(-1))) {
            marks_low = _mm256_permute4x64_epi64(marks_low, 0xd8);
            marks_high = _mm256_permute4x64_epi64(marks_high, 0xd8);
            uint32_t in_low = (uint32_t)_mm256_movemask_epi8(marks_low);
            uint32_t in_high = (uint32_t)_mm256_movemask_epi8(marks_high);
            if (am_escapes_take(in_low, in_high, top, low + i, high + i, escapes))
                return -1;
        }
    }
    uint8_t lanes[32];
    _mm256_storeu_si256((void *)lanes, least);
    for (int lane = 0; lane < 32; lane++)
        escapes->least = lanes[lane] < escapes->least ? lanes[lane] : escapes->least;
    return am_unpack_scalar(codes + i, rest_low + i, rest_high + i, pairs - i, top, low + i, high + i, escapes);
}

AM_TARGET_AVX2 void am_join_avx2(const uint8_t *low, const uint16_t *high, size_t count, uint8_t *words)
{
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        _mm_prefetch((const char *)((uintptr_t)(low + 2 * i) + AHEAD), _MM_HINT_T0);
        __m256i lower = _mm256_permute4x64_epi64(_mm256_loadu_si256((const void *)(low + 2 * i)), 0xd8);
        __m256i upper = _mm256_permute4x64_epi64(_mm256_loadu_si256((const void *)(high + i)), 0xd8);
        _mm256_storeu_si256((void *)(words + 4 * i), _mm256_unpacklo_epi16(lower, upper));
        _mm256_storeu_si256((void *)(words + 4 * i + 32), _mm256_unpackhi_epi16(lower, upper));
    }
    am_join_scalar(low + 2 * i, high + i, count - i, words + 4 * i);
}

AM_TARGET_AVX512 static inline __m512i rests_avx512(__m512i values)
{
    /* (values >> 8 & 0x80) | (values & 0x7f) */
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x80), _mm512_srli_epi16(values, 8),
                                     _mm512_and_si512(values, _mm512_set1_epi16(0x7f)), 0xea);
}

AM_TARGET_AVX512 static inline __m512i codes_avx512(__m512i values, __m512i top)
{
    __m512i exponents = _mm512_and_si512(_mm512_srli_epi16(values, 7), _mm512_set1_epi16(255));
    __m512i codes = _mm512_min_epu16(_mm512_sub_epi16(top, exponents), _mm512_set1_epi16(AM_ZERO));
    __mmask32 outside = _mm512_cmpeq_epi16_mask(codes, _mm512_set1_epi16(AM_ZERO));
    return _mm512_mask_mov_epi16(codes, _mm512_mask_test_epi16_mask(outside, exponents, exponents),
                                 _mm512_set1_epi16(AM_ESCAPE));
}

AM_TARGET_AVX512 int am_pack_avx512(const uint16_t *low, const uint16_t *high, size_t pairs, unsigned top,
                                    uint8_t *codes, uint8_t *rest_low, uint8_t *rest_high, am_escapes_out *escapes)
{
    const __m512i tops = _mm512_set1_epi16((short)top), escape = _mm512_set1_epi16(AM_ESCAPE);
    size_t i = 0;
    for (; i + 32 <= pairs; i += 32) {
        __m512i a = _mm512_loadu_si512(low + i), b = _mm512_loadu_si512(high + i);
        _mm256_storeu_si256((void *)(rest_low + i), _mm512_cvtepi16_epi8(rests_avx512(a)));
        _mm256_storeu_si256((void *)(rest_high + i), _mm512_cvtepi16_epi8(rests_avx512(b)));
        a = codes_avx512(a, tops);
        b = codes_avx512(b, tops);
        _mm256_storeu_si256((void *)(codes + i),
                            _mm512_cvtepi16_epi8(_mm512_or_si512(a, _mm512_slli_epi16(b, 4))));
        __mmask32 first = _mm512_cmpeq_epi16_mask(a, escape), second = _mm512_cmpeq_epi16_mask(b, escape);
        if ((first | second) && am_escapes_put(first, second, low + i, high + i, escapes))
            return -1;
    }
    return am_pack_scalar(low + i, high + i, pairs - i, top, codes + i, rest_low + i, rest_high + i, escapes);
}

/* Stores 64 values; `codes` and `rest` have their 8-byte groups in the order 0 4 1 5 2 6 3 7. */
AM_TARGET_AVX512 static inline void join_avx512(__m512i codes, __m512i rest, __m512i top, uint16_t *values)
{
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512i exponents =
        _mm512_maskz_sub_epi8(_mm512_cmpneq_epi8_mask(codes, _mm512_set1_epi8(AM_ZERO)), top, codes);
    /* sign ? rest : exponents shifted, and the other way round */
    __m512i upper = _mm512_ternarylogic_epi32(sign, rest, _mm512_srli_epi16(exponents, 1), 0xca);
    __m512i lower = _mm512_ternarylogic_epi32(sign, _mm512_slli_epi16(exponents, 7), rest, 0xca);
    _mm512_storeu_si512(values, _mm512_unpacklo_epi8(lower, upper));
    _mm512_storeu_si512(values + 32, _mm512_unpackhi_epi8(lower, upper));
}

AM_TARGET_AVX512 int am_unpack_avx512(const uint8_t *codes, const uint8_t *rest_low, const uint8_t *rest_high,
                                      size_t pairs, unsigned top, uint16_t *low, uint16_t *high,
                                      am_escapes_in *escapes)
{
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i tops = _mm512_set1_epi8((char)top), escape = _mm512_set1_epi8(AM_ESCAPE);
    __m512i least = _mm512_set1_epi8((char)escapes->least);
    size_t i = 0;
    for (; i + 64 <= pairs; i += 64) {
        _mm_prefetch((const char *)((uintptr_t)(codes + i) + AHEAD), _MM_HINT_T0);
        _mm_prefetch((const char *)((uintptr_t)(rest_low + i) + AHEAD), _MM_HINT_T0);
        _mm_prefetch((const char *)((uintptr_t)(rest_high + i) + AHEAD), _MM_HINT_T0);
        __m512i both = _mm512_loadu_si512(codes + i);
        __m512i first = _mm512_and_si512(both, escape), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), escape);
        join_avx512(_mm512_permutexvar_epi64(order, first),
                    _mm512_permutexvar_epi64(order, _mm512_loadu_si512(rest_low + i)), tops, low + i);
        join_avx512(_mm512_permutexvar_epi64(order, second),
                    _mm512_permutexvar_epi64(order, _mm512_loadu_si512(rest_high + i)), tops, high + i);
        least = _mm512_min_epu8(least, _mm512_min_epu8(first, second));
        __mmask64 marks_low = _mm512_cmpeq_epi8_mask(first, escape);
        __mmask64 marks_high = _mm512_cmpeq_epi8_mask(second, escape);
        if ((marks_low | marks_high) && am_escapes_take(marks_low, marks_high, top, low + i, high + i, escapes))
            return -1;
    }
    uint8_t lanes[64];
    _mm512_storeu_si512(lanes, least);
    for (int lane = 0; lane < 64; lane++)
        escapes->least = lanes[lane] < escapes->least ? lanes[lane] : escapes->least;
    return am_unpack_avx2(codes + i, rest_low + i, rest_high + i, pairs - i, top, low + i, high + i, escapes);
}

#endif

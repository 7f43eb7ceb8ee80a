/* AVX2 and AVX-512 kernels of late interaction: see maxsim.h. Query tokens are in lanes, so that nothing is added across a
 * register for a single product: four bytes of codes, for all lanes alike, are multiplied with four numbers of each query.
 */
#include "cpu.h"
#include "maxsim.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

static inline int word(const uint8_t *at)
{
    int value;
    memcpy(&value, at, 4);
    return value;
}

/* ---- AVX2: 8 query tokens. Products of pairs are at most 2 * 15 * 127, so 8 of them fit 16 bits. ---- */

AM_TARGET_AVX2 void am_maxsim_avx2(const am_tokens *passage, const am_tile *tile, float *best)
{
    enum { TOKENS = 4 };
    const __m256i low4 = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const __m256i first = _mm256_loadu_si256((const void *)tile->first);
    __m256 most = _mm256_set1_ps(-__builtin_inff());
    for (uint32_t token = 0; token < passage->count; token += TOKENS) {
        const uint8_t *codes[TOKENS];
        float scales[TOKENS];
        __m256i sums[TOKENS];
        for (uint32_t i = 0; i < TOKENS; i++) { /* behind the last one the last one again: it changes no maximum */
            uint32_t at = token + i < passage->count ? token + i : passage->count - 1;
            codes[i] = passage->codes + (size_t)at * passage->half;
            scales[i] = am_tokens_scale(passage, at);
            sums[i] = first;
        }
        const __m256i *numbers = (const void *)tile->numbers;
        for (uint32_t at = 0; at < passage->half; at += 16, numbers += 8)
            for (uint32_t i = 0; i < TOKENS; i++) {
                __m256i pairs = _mm256_setzero_si256();
                for (uint32_t quad = 0; quad < 4; quad++) {
                    __m256i both = _mm256_set1_epi32(word(codes[i] + at + 4 * quad));
                    __m256i low = _mm256_and_si256(both, low4);
                    __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low4);
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(low, numbers[2 * quad]));
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(high, numbers[2 * quad + 1]));
                }
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
            }
        for (uint32_t i = 0; i < TOKENS; i++)
            most = _mm256_max_ps(most, _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i]), _mm256_set1_ps(scales[i])));
    }
    _mm256_storeu_ps(best, most);
}

/* ---- AVX-512: 16, 8 or 4 query tokens ---- */

#define INLINE AM_TARGET_AVX512 __attribute__((always_inline)) static inline

/* The sums of up to 8 tokens from `token` on, into `most`. Upper codes are multiplied where they stand, 16 times as large.
 * With 8 queries the lanes 8 to 15 have the upper codes; with 4, of each pair of lanes one has the other four bytes. */
INLINE __m512 several(const am_tokens *passage, const am_tile *tile, uint32_t token, uint32_t kind, uint32_t count,
                      __m512 most)
{
    const __m512i low4 = _mm512_set1_epi8(15), high4 = _mm512_set1_epi8((char)0xF0);
    const __m512i split = _mm512_inserti64x4(low4, _mm512_castsi512_si256(high4), 1);
    const uint8_t *codes[8];
    __m512i sums[8], highs[8];
    __m512i first = kind == 4 ? _mm512_zextsi256_si512(_mm256_cvtepu32_epi64(_mm_loadu_si128((const void *)tile->first)))
                              : _mm512_loadu_si512(tile->first);
    for (uint32_t i = 0; i < count; i++) { /* behind the last one the last one again: it changes no maximum */
        uint32_t at = token + i < passage->count ? token + i : passage->count - 1;
        codes[i] = passage->codes + (size_t)at * passage->half;
        sums[i] = first;
        highs[i] = _mm512_setzero_si512();
    }
    const int8_t *numbers = tile->numbers;
    if (kind == 4)
        for (uint32_t at = 0; at < passage->half; at += 8, numbers += 64) {
            __m512i query = _mm512_load_si512(numbers);
            for (uint32_t i = 0; i < count; i++) {
                long long both;
                memcpy(&both, codes[i] + at, 8);
                sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_and_si512(_mm512_set1_epi64(both), split), query);
            }
        }
    else if (kind == 8)
        for (uint32_t at = 0; at < passage->half; at += 4, numbers += 64) {
            __m512i query = _mm512_load_si512(numbers);
            for (uint32_t i = 0; i < count; i++)
                sums[i] = _mm512_dpbusd_epi32(
                    sums[i], _mm512_and_si512(_mm512_set1_epi32(word(codes[i] + at)), split), query);
        }
    else
        for (uint32_t at = 0; at < passage->half; at += 4, numbers += 128) {
            __m512i low = _mm512_load_si512(numbers), high = _mm512_load_si512(numbers + 64);
            for (uint32_t i = 0; i < count; i++) {
                __m512i both = _mm512_set1_epi32(word(codes[i] + at));
                sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_and_si512(both, low4), low);
                highs[i] = _mm512_dpbusd_epi32(highs[i], _mm512_and_si512(both, high4), high);
            }
        }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = token + i < passage->count ? token + i : passage->count - 1;
        __m512i sum = sums[i];
        if (kind == 16)
            sum = _mm512_add_epi32(sum, _mm512_srai_epi32(highs[i], 4));
        else {
            __m256i half = _mm256_srai_epi32(_mm512_extracti64x4_epi64(sum, 1), 4);
            if (kind == 4) { /* both lanes of a pair are sixteenfold together, not one by one */
                half = _mm512_extracti64x4_epi64(sum, 1);
                half = _mm256_srai_epi32(_mm256_add_epi32(half, _mm256_shuffle_epi32(half, 0xB1)), 4);
                __m256i low = _mm512_castsi512_si256(sum);
                low = _mm256_add_epi32(low, _mm256_shuffle_epi32(low, 0xB1));
                half = _mm256_add_epi32(half, low);
                half = _mm256_zextsi128_si256(_mm256_cvtepi64_epi32(half));
                sum = _mm512_zextsi256_si512(half);
            } else
                sum = _mm512_zextsi256_si512(_mm256_add_epi32(half, _mm512_castsi512_si256(sum)));
        }
        __m512 scale = _mm512_set1_ps(am_tokens_scale(passage, at));
        most = _mm512_max_ps(most, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
    }
    return most;
}

INLINE __m512 all(const am_tokens *passage, const am_tile *tile, uint32_t kind)
{
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    uint32_t token = 0;
    for (; token + 4 < passage->count; token += 8)
        most = several(passage, tile, token, kind, 8, most);
    if (token < passage->count)
        most = several(passage, tile, token, kind, 4, most);
    return most;
}

AM_TARGET_AVX512 void am_maxsim_avx512(const am_tokens *passage, const am_tile *tile, float *best)
{
    __m512 most = tile->kind == 4   ? all(passage, tile, 4)
                  : tile->kind == 8 ? all(passage, tile, 8)
                                    : all(passage, tile, 16);
    _mm512_storeu_ps(best, most);
}
#endif

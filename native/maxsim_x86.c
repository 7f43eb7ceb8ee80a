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

/* ---- AVX2: 8 query tokens. A sum of two products is at most 2 * 3 * 127, so 16 of them fit 16 bits. ---- */

AM_TARGET_AVX2 void am_maxsim_avx2(const am_tokens *passage, const am_tile *tile, float *best)
{
    enum { TOKENS = 4 };
    const __m256i low2 = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    const __m256i first = _mm256_loadu_si256((const void *)tile->first);
    __m256 most = _mm256_set1_ps(-__builtin_inff());
    for (uint32_t token = 0; token < passage->count; token += TOKENS) {
        const uint8_t *codes[TOKENS];
        float scales[TOKENS];
        __m256i sums[TOKENS];
        for (uint32_t i = 0; i < TOKENS; i++) { /* behind the last one the last one again: it changes no maximum */
            uint32_t at = token + i < passage->count ? token + i : passage->count - 1;
            codes[i] = passage->codes + (size_t)at * passage->row;
            scales[i] = am_tokens_scale(passage, at);
            sums[i] = _mm256_setzero_si256();
        }
        const __m256i *numbers = (const void *)tile->numbers;
        for (uint32_t at = 0; at < passage->row; at += 16, numbers += 16)
            for (uint32_t i = 0; i < TOKENS; i++) {
                __m256i pairs = _mm256_setzero_si256();
                for (uint32_t quad = 0; quad < 4; quad++) {
                    __m256i four = _mm256_set1_epi32(word(codes[i] + at + 4 * quad));
                    const __m256i *query = numbers + 4 * quad;
#define QUARTER(part) _mm256_and_si256(_mm256_srli_epi16(four, 2 * (part)), low2)
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(QUARTER(0), query[0]));
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(QUARTER(1), query[1]));
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(QUARTER(2), query[2]));
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(QUARTER(3), query[3]));
#undef QUARTER
                }
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
            }
        for (uint32_t i = 0; i < TOKENS; i++) {
            __m256i sum = _mm256_add_epi32(_mm256_add_epi32(sums[i], sums[i]), first);
            most = _mm256_max_ps(most, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scales[i])));
        }
    }
    _mm256_storeu_ps(best, most);
}

/* ---- AVX-512: 16, 8 or 4 query tokens. Codes are multiplied where they stand in their byte, 1, 4, 16 or 64 times as
 * large; 4 quarters of a token's channels are in 4 registers, in 2 with two quarters in their halves, or all in one. ---- */

#define INLINE AM_TARGET_AVX512 __attribute__((always_inline)) static inline

/* The best of `most` and of `count` tokens from `token` on. */
INLINE __m512 several(const am_tokens *passage, const am_tile *tile, uint32_t token, uint32_t kind, uint32_t count,
                      __m512 most)
{
    const uint32_t registers = kind / 4;
    const uint8_t *codes[8];
    __m512i sums[8][4], masks[4], shifts[4];
    for (uint32_t i = 0; i < registers; i++) {
        /* The first quarter of this register, and the steps to those of its other lanes. */
        __m512i part = _mm512_set1_epi32((int)(i * 4 / registers));
        if (kind == 8)
            part = _mm512_add_epi32(part, _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0));
        if (kind == 4)
            part = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        shifts[i] = _mm512_slli_epi32(part, 1);
        masks[i] = _mm512_sllv_epi32(_mm512_set1_epi32(0x03030303), shifts[i]);
    }
    for (uint32_t i = 0; i < count; i++) { /* behind the last one the last one again: it changes no maximum */
        uint32_t at = token + i < passage->count ? token + i : passage->count - 1;
        codes[i] = passage->codes + (size_t)at * passage->row;
        for (uint32_t part = 0; part < registers; part++)
            sums[i][part] = _mm512_setzero_si512();
    }
    const int8_t *numbers = tile->numbers;
    for (uint32_t at = 0; at < passage->row; at += 4, numbers += 64 * registers)
        for (uint32_t i = 0; i < count; i++) {
            __m512i four = _mm512_set1_epi32(word(codes[i] + at));
            for (uint32_t part = 0; part < registers; part++)
                sums[i][part] = _mm512_dpbusd_epi32(sums[i][part], _mm512_and_si512(four, masks[part]),
                                                    _mm512_load_si512(numbers + 64 * part));
        }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = token + i < passage->count ? token + i : passage->count - 1;
        __m512i sum = _mm512_srav_epi32(sums[i][0], shifts[0]);
        for (uint32_t part = 1; part < registers; part++)
            sum = _mm512_add_epi32(sum, _mm512_srav_epi32(sums[i][part], shifts[part]));
        if (kind <= 8)
            sum = _mm512_add_epi32(sum, _mm512_shuffle_i64x2(sum, sum, 0x4E)); /* the other half */
        if (kind == 4)
            sum = _mm512_add_epi32(sum, _mm512_shuffle_i64x2(sum, sum, 0xB1)); /* the other quarter */
        sum = _mm512_add_epi32(_mm512_add_epi32(sum, sum), _mm512_loadu_si512(tile->first));
        __m512 scale = _mm512_set1_ps(am_tokens_scale(passage, at));
        most = _mm512_max_ps(most, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
    }
    return most;
}

INLINE __m512 all(const am_tokens *passage, const am_tile *tile, uint32_t kind)
{
    const uint32_t step = kind == 16 ? 4 : 8; /* tokens whose sums fit the registers */
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    uint32_t token = 0;
    for (; token + step / 2 < passage->count; token += step)
        most = several(passage, tile, token, kind, step, most);
    if (token < passage->count)
        most = several(passage, tile, token, kind, step / 2, most);
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

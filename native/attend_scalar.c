/* Attention over spans of blocks in plain C: the reference of the other levels, and what runs where there is none.
 *
 * A level defines: store_codes, which puts 16 codes from column `at` on where its dot_pair will read them (`key`: of a
 * query, signed; else of weights, 0 to 32767); dot_pair, which multiplies two tiles of `count` rows of 64 bytes by them.
 */
#define TARGET
#define INLINE AM_INLINE
#define KERNEL am_span_scalar
#include "attend.h"
#include "floats.h"

typedef int32_t codes16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int16_t __attribute__((may_alias)) code;

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

AM_INLINE void store_codes(uint32_t codes[2][64], uint32_t at, codes16 values, int key)
{
    (void)key;
    for (uint32_t i = 0; i < 16; i++)
        ((code *)codes[0])[at + i] = (code)values[i];
}

/* sums[r][16 * half + i] = of tile `half`, over its rows: bytes 4 i to 4 i + 3 times codes 4 row to 4 row + 3. `four`: both
 * tiles lie in `a`, in low and high nibbles. `key`: bytes are unsigned, as nibbles always are. */
AM_INLINE void dot_pair(uint32_t rows, uint32_t four, int key, const uint8_t *a, const uint8_t *b, uint32_t count,
                        uint32_t codes[4][2][64], int32_t sums[4][32])
{
    for (uint32_t r = 0; r < rows; r++) {
        memset(sums[r], 0, sizeof sums[r]);
        for (uint32_t k = 0; k < count; k++) {
            const code *four_codes = (const code *)codes[r][0] + 4 * k;
            for (uint32_t i = 0; i < 64; i++) {
                uint8_t first = a[64 * k + i], second = b[64 * k + i];
                int32_t low = four ? first & 15 : key ? first : (int8_t)first;
                int32_t high = four ? first >> 4 : key ? second : (int8_t)second;
                sums[r][i / 4] += low * four_codes[i % 4];
                sums[r][16 + i / 4] += high * four_codes[i % 4];
            }
        }
    }
}

#include "attend_kernel.h"

/* Attention over spans of blocks in plain C: the reference of the other levels, and what runs where there is none.
 *
 * A level defines TARGET, INLINE, KERNEL and these functions. maximum: a > b ? a : b of each lane. lanes_max, lanes_sum:
 * upper half on lower half, until one is left. store_codes: puts 16 codes from column `at` on where dot_pair will read
 * them (`key`: of a query, signed; else of weights, 0 to 32767). dot_pair: multiplies two tiles by them.
 */
#define TARGET
#define INLINE AM_INLINE
#define KERNEL am_span_scalar
#include "attend.h"
#include "floats.h"

typedef int16_t __attribute__((may_alias)) code;

INLINE v16 maximum(v16 a, v16 b)
{
    i16 more = (i16)(a > b);
    return (v16)((more & (i16)a) | (~more & (i16)b));
}

INLINE float lanes_sum(v16 all)
{
    float lane[16];
    memcpy(lane, &all, sizeof lane);
    for (uint32_t half = 8; half; half /= 2)
        for (uint32_t i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

INLINE float lanes_max(v16 all)
{
    float lane[16];
    memcpy(lane, &all, sizeof lane);
    for (uint32_t half = 8; half; half /= 2)
        for (uint32_t i = 0; i < half; i++)
            lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}

INLINE void store_codes(uint32_t codes[2][64], uint32_t at, i16 values, int key)
{
    (void)key;
    for (uint32_t i = 0; i < 16; i++)
        ((code *)codes[0])[at + i] = (code)values[i];
}

/* sums[r][16 * half + i] = of tile `half`, over its `count` rows of 64 bytes: bytes 4 i to 4 i + 3 times codes 4 row to
 * 4 row + 3 of r. `four`: both tiles lie in `a`, in low and high nibbles. `key`: bytes are unsigned, as nibbles are. */
INLINE void dot_pair(uint32_t rows, uint32_t four, int key, const uint8_t *a, const uint8_t *b, uint32_t count,
                     uint32_t codes[4][2][64], int32_t sums[4][32])
{
    for (uint32_t r = 0; r < rows; r++) {
        memset(sums[r], 0, sizeof sums[r]);
        for (uint32_t k = 0; k < count; k++) {
            const code *quad = (const code *)codes[r][0] + 4 * k;
            for (uint32_t i = 0; i < 64; i++) {
                uint8_t first = a[64 * k + i], second = b[64 * k + i];
                int32_t low = four ? first & 15 : key ? first : (int8_t)first;
                int32_t high = four ? first >> 4 : key ? second : (int8_t)second;
                sums[r][i / 4] += low * quad[i % 4];
                sums[r][16 + i / 4] += high * quad[i % 4];
            }
        }
    }
}

#include "attend_kernel.h"

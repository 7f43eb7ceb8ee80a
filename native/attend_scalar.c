/* Attention over spans of blocks in plain C: the reference of the other levels, and what runs where there is none.
 *
 * A level defines TARGET, INLINE, PIECES, KERNEL and these functions. maximum: a > b ? a : b of each lane. lanes_max, lanes_sum:
 * upper half on lower half, until one is left. sixteen: values as floats; low_halves, high_halves: those of 16 words.
 * transpose: 16 x 16 words. store_codes: puts 16 codes, the low bits of `values`, from column `at` on where dot_pair reads
 * them (`key`: of a query, signed; else of weights, 0 to 32767). dot_pair: multiplies two tiles by them.
 */
#define TARGET
#define INLINE AM_INLINE
#define PIECES 4
#define KERNEL am_span_scalar
#include "attend_lanes.h"

typedef int16_t __attribute__((may_alias)) code;

INLINE v16 maximum(v16 a, v16 b)
{
#define MORE(i) (ints)(a.part[i] > b.part[i])
#define PART(i) (floats)((MORE(i) & (ints)a.part[i]) | (~MORE(i) & (ints)b.part[i]))
    return EACH(PART);
#undef PART
#undef MORE
}

INLINE float first_lane(v16 a)
{
    return a.part[0][0];
}

INLINE float lanes_sum(v16 a)
{
    floats four = (a.part[0] + a.part[2]) + (a.part[1] + a.part[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

INLINE float lanes_max(v16 a)
{
    float lane[16];
    memcpy(lane, &a, sizeof lane);
    for (uint32_t half = 8; half; half /= 2)
        for (uint32_t i = 0; i < half; i++)
            lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}

INLINE floats floats_of_f16(ints words)
{
    ints magnitude = words & 0x7FFF, small = (ints)(magnitude < 0x400), beyond = (ints)(magnitude >= 0x7C00);
    ints subnormal = (ints)(__builtin_convertvector(magnitude, floats) * 0x1p-24f);
    ints normal = (magnitude << 13) + ((112 << 23) & ~beyond) + ((224 << 23) & beyond);
    return (floats)((small & subnormal) | (~small & normal) | (words & 0x8000) << 16);
}

INLINE v16 low_halves(uint32_t dtype, v16 a)
{
    if (dtype == AM_BF16) {
#define PART(i) (floats)((ints)a.part[i] << 16)
        return EACH(PART);
#undef PART
    }
#define PART(i) floats_of_f16((ints)a.part[i])
    return EACH(PART);
#undef PART
}

INLINE v16 high_halves(uint32_t dtype, v16 a)
{
    if (dtype == AM_BF16) {
#define PART(i) (floats)((ints)a.part[i] & (int32_t)0xFFFF0000)
        return EACH(PART);
#undef PART
    }
#define PART(i) floats_of_f16((ints)a.part[i] >> 16)
    return EACH(PART);
#undef PART
}

INLINE v16 sixteen(uint32_t dtype, const uint8_t *from)
{
    if (dtype == AM_F32)
        return load(from);
    uint32_t words[16];
    for (uint32_t i = 0; i < 16; i++)
        words[i] = ((const half_bits *)from)[i];
    return low_halves(dtype, load(words));
}

INLINE void transpose(v16 rows[16])
{
    uint32_t from[16][16], to[16][16];
    memcpy(from, rows, sizeof from);
    for (uint32_t i = 0; i < 16; i++)
        for (uint32_t j = 0; j < 16; j++)
            to[j][i] = from[i][j];
    memcpy(rows, to, sizeof to);
}

INLINE void store_codes(uint32_t codes[2][64], uint32_t at, v16 values, int key)
{
    (void)key;
    uint32_t bits[16];
    memcpy(bits, &values, sizeof bits);
    for (uint32_t i = 0; i < 16; i++)
        ((code *)codes[0])[at + i] = (code)bits[i];
}

/* sums[r][16 * half + i] = of tile `half`, over its `count` rows of 64 bytes: bytes 4 i to 4 i + 3 times codes 4 row to
 * 4 row + 3 of r. `four`: both tiles lie in `a`, in low and high nibbles. `key`: bytes are unsigned, as nibbles are.
 * `ahead`: what lies that far from `a` and `b` is needed next, if not 0. */
INLINE void dot_pair(uint32_t rows, uint32_t four, int key, const uint8_t *a, const uint8_t *b, uint32_t count,
                     uint32_t codes[4][2][64], int32_t sums[4][32], ptrdiff_t ahead)
{
    for (uint32_t half = 0; half < 2; half++)
        for (uint32_t piece = 0; piece < PIECES; piece++) {
            ints sum[4] = {{0}, {0}, {0}, {0}};
            const uint8_t *from = (four || !half ? a : b) + 16 * piece;
            for (uint32_t k = 0; k < count; k++, from += 64) {
                ints words = (ints)*(const loose_ints *)(const void *)from, byte[4];
                if (ahead && piece == 0)
                    __builtin_prefetch(from + ahead);
                if (four)
                    words = (half ? words >> 4 : words) & 0x0F0F0F0F;
                for (int j = 0; j < 4; j++)
                    byte[j] = four || key ? (ints)(words >> 8 * j & 255) : (ints)(words << (24 - 8 * j) >> 24);
                for (uint32_t r = 0; r < rows; r++) {
                    const code *quad = (const code *)codes[r][0] + 4 * k;
                    sum[r] += (byte[0] * quad[0] + byte[1] * quad[1]) + (byte[2] * quad[2] + byte[3] * quad[3]);
                }
            }
            for (uint32_t r = 0; r < rows; r++)
                *(ints *)(void *)&sums[r][16 * half + 4 * piece] = sum[r];
        }
}

#include "attend_kernel.h"

/* Attention over spans of blocks for NEON: bytes become 16 bits, codes are 16 bits, and each of four products is added to a
 * sum of 32 bits. Only what every ARM CPU of 64 bits has; no fused multiply-add, whose bits would differ.
 */
#include "attend.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define TARGET
#define INLINE AM_INLINE
#define PIECES 4
#define KERNEL am_span_neon
#include "attend_lanes.h"

typedef int16_t __attribute__((may_alias)) code;

/* Not vmaxq: with a NaN or two zeros it gives another number than a > b ? a : b. */
INLINE float32x4_t more(float32x4_t a, float32x4_t b)
{
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}

INLINE v16 maximum(v16 a, v16 b)
{
#define PART(i) (floats)more((float32x4_t)a.part[i], (float32x4_t)b.part[i])
    return EACH(PART);
#undef PART
}

INLINE float first_lane(v16 a)
{
    return a.part[0][0];
}

INLINE float lanes_sum(v16 a)
{
    float32x4_t four = (float32x4_t)((a.part[0] + a.part[2]) + (a.part[1] + a.part[3]));
    return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}

INLINE float lanes_max(v16 a)
{
    float32x4_t four = more(more((float32x4_t)a.part[0], (float32x4_t)a.part[2]),
                            more((float32x4_t)a.part[1], (float32x4_t)a.part[3]));
    four = more(four, vextq_f32(four, four, 2));
    return vgetq_lane_f32(more(four, vextq_f32(four, four, 1)), 0);
}

INLINE floats half_floats(uint32_t dtype, uint16x4_t halves)
{
    return dtype == AM_BF16 ? (floats)vshll_n_u16(halves, 16) : (floats)vcvt_f32_f16(vreinterpret_f16_u16(halves));
}

INLINE v16 low_halves(uint32_t dtype, v16 a)
{
#define PART(i) half_floats(dtype, vmovn_u32((uint32x4_t)a.part[i]))
    return EACH(PART);
#undef PART
}

INLINE v16 high_halves(uint32_t dtype, v16 a)
{
#define PART(i) half_floats(dtype, vshrn_n_u32((uint32x4_t)a.part[i], 16))
    return EACH(PART);
#undef PART
}

INLINE v16 sixteen(uint32_t dtype, const uint8_t *from)
{
#define PART(i) half_floats(dtype, vreinterpret_u16_u8(vld1_u8(from + 8 * i)))
    return dtype == AM_F32 ? load(from) : EACH(PART);
#undef PART
}

/* By squares of 4 x 4. */
INLINE void transpose(v16 rows[16])
{
    v16 columns[16];
    for (uint32_t across = 0; across < 4; across++)
        for (uint32_t down = 0; down < 4; down++) {
            uint32x4_t a = (uint32x4_t)rows[4 * down].part[across], b = (uint32x4_t)rows[4 * down + 1].part[across];
            uint32x4_t c = (uint32x4_t)rows[4 * down + 2].part[across], d = (uint32x4_t)rows[4 * down + 3].part[across];
            uint64x2_t even = (uint64x2_t)vtrn1q_u32(a, b), even2 = (uint64x2_t)vtrn1q_u32(c, d);
            uint64x2_t odd = (uint64x2_t)vtrn2q_u32(a, b), odd2 = (uint64x2_t)vtrn2q_u32(c, d);
            columns[4 * across].part[down] = (floats)vtrn1q_u64(even, even2);
            columns[4 * across + 1].part[down] = (floats)vtrn1q_u64(odd, odd2);
            columns[4 * across + 2].part[down] = (floats)vtrn2q_u64(even, even2);
            columns[4 * across + 3].part[down] = (floats)vtrn2q_u64(odd, odd2);
        }
    memcpy(rows, columns, sizeof columns);
}

INLINE void store_codes(uint32_t codes[2][64], uint32_t at, v16 values, int key)
{
    (void)key;
    code *to = (code *)codes[0] + at;
    for (int i = 0; i < 4; i++)
        vst1_s16(to + 4 * i, vmovn_s32((int32x4_t)values.part[i]));
}

/* Bytes 0, 1, 2 and 3 of eight words, as 16 bits. */
INLINE void bytes_of(const uint8_t *words, uint32_t four, int key, uint32_t upper, int16x8_t byte[4])
{
    uint16x8_t a = vreinterpretq_u16_u8(vld1q_u8(words)), b = vreinterpretq_u16_u8(vld1q_u8(words + 16));
    uint16x8_t pair[2] = {vuzp1q_u16(a, b), vuzp2q_u16(a, b)};
    for (uint32_t i = 0; i < 2; i++) {
        if (four) {
            const uint16x8_t nibble = vdupq_n_u16(15);
            byte[2 * i] = (int16x8_t)vandq_u16(upper ? vshrq_n_u16(pair[i], 4) : pair[i], nibble);
            byte[2 * i + 1] = (int16x8_t)(upper ? vshrq_n_u16(pair[i], 12) : vandq_u16(vshrq_n_u16(pair[i], 8), nibble));
        } else if (key) {
            byte[2 * i] = (int16x8_t)vandq_u16(pair[i], vdupq_n_u16(255));
            byte[2 * i + 1] = (int16x8_t)vshrq_n_u16(pair[i], 8);
        } else {
            byte[2 * i] = vshrq_n_s16((int16x8_t)vshlq_n_u16(pair[i], 8), 8);
            byte[2 * i + 1] = vshrq_n_s16((int16x8_t)pair[i], 8);
        }
    }
}

/* One tile of the pair. */
INLINE void dot_tile(uint32_t rows, uint32_t four, int key, uint32_t upper, const uint8_t *tile, uint32_t count,
                     uint32_t codes[4][2][64], int32_t sums[4][32], ptrdiff_t ahead)
{
    int32x4_t sum[4][4];
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < 4; i++)
            sum[r][i] = vdupq_n_s32(0);
    for (uint32_t k = 0; k < count; k++) {
        if (ahead)
            __builtin_prefetch(tile + ahead + 64 * k);
#pragma GCC unroll 2
        for (uint32_t half = 0; half < 2; half++) {
            int16x8_t byte[4];
            bytes_of(tile + 64 * k + 32 * half, four, key, upper, byte);
#pragma GCC unroll 4
            for (uint32_t r = 0; r < rows; r++) {
                int16x4_t quad = vld1_s16((const code *)codes[r][0] + 4 * k);
                int32x4_t low = sum[r][2 * half], high = sum[r][2 * half + 1];
#define ADD(j)                                                                                                         \
    low = vmlal_lane_s16(low, vget_low_s16(byte[j]), quad, j);                                                         \
    high = vmlal_high_lane_s16(high, byte[j], quad, j)
                ADD(0);
                ADD(1);
                ADD(2);
                ADD(3);
#undef ADD
                sum[r][2 * half] = low;
                sum[r][2 * half + 1] = high;
            }
        }
    }
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < 4; i++)
            vst1q_s32(&sums[r][16 * upper + 4 * i], sum[r][i]);
}

INLINE void dot_pair(uint32_t rows, uint32_t four, int key, const uint8_t *a, const uint8_t *b, uint32_t count,
                     uint32_t codes[4][2][64], int32_t sums[4][32], ptrdiff_t ahead)
{
    dot_tile(rows, four, key, 0, a, count, codes, sums, ahead);
    dot_tile(rows, four, key, 1, four ? a : b, count, codes, sums, four ? 0 : ahead);
}

#include "attend_kernel.h"
#endif

/* NEON kernels of the fast lossless codec: see lossless.h. */
#include "lossless.h"

#if defined(__aarch64__)
#include <arm_neon.h>

unsigned am_largest_neon(const uint16_t *values, size_t count)
{
    uint16x8_t most = vdupq_n_u16(0);
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        most = vmaxq_u16(most, vandq_u16(vld1q_u16(values + i), vdupq_n_u16(0x7f80)));
    unsigned largest = am_exponent(vmaxvq_u16(most)), last = am_largest_scalar(values + i, count - i);
    return largest > last ? largest : last;
}

static inline uint8x8_t codes_neon(uint16x8_t values, unsigned top)
{
    uint16x8_t exponents = vandq_u16(vshrq_n_u16(values, 7), vdupq_n_u16(255));
    uint16x8_t codes = vminq_u16(vsubq_u16(vdupq_n_u16((uint16_t)top), exponents), vdupq_n_u16(AM_ZERO));
    uint16x8_t outside = vceqq_u16(codes, vdupq_n_u16(AM_ZERO));
    return vmovn_u16(vsubq_u16(codes, vbicq_u16(outside, vceqzq_u16(exponents)))); /* AM_ESCAPE is AM_ZERO + 1 */
}

static inline uint8x8_t rests_neon(uint16x8_t values)
{
    return vbsl_u8(vdup_n_u8(0x80), vshrn_n_u16(values, 8), vmovn_u16(values));
}

int am_pack_neon(const uint16_t *low, const uint16_t *high, size_t pairs, unsigned top, uint8_t *codes,
                 uint8_t *rest_low, uint8_t *rest_high, am_escapes_out *escapes)
{
    size_t i = 0;
    for (; i + 8 <= pairs; i += 8) {
        uint16x8_t a = vld1q_u16(low + i), b = vld1q_u16(high + i);
        vst1_u8(rest_low + i, rests_neon(a));
        vst1_u8(rest_high + i, rests_neon(b));
        uint8x8_t first = codes_neon(a, top), second = codes_neon(b, top);
        vst1_u8(codes + i, vorr_u8(first, vshl_n_u8(second, 4)));
        if (vmaxv_u8(vmax_u8(first, second)) == AM_ESCAPE)
            for (size_t j = i; j < i + 8; j++)
                if (((codes[j] & 15) == AM_ESCAPE && am_escape_put(escapes, low[j])) ||
                    (codes[j] >> 4 == AM_ESCAPE && am_escape_put(escapes, high[j])))
                    return -1;
    }
    return am_pack_scalar(low + i, high + i, pairs - i, top, codes + i, rest_low + i, rest_high + i, escapes);
}

static inline void join_neon(uint8x8_t codes, uint8x8_t rest, unsigned top, uint16_t *values)
{
    uint8x8_t zero = vceq_u8(codes, vdup_n_u8(AM_ZERO));
    uint16x8_t exponents = vshlq_n_u16(vmovl_u8(vbic_u8(vsub_u8(vdup_n_u8((uint8_t)top), codes), zero)), 7);
    uint16x8_t spread = vorrq_u16(vshll_n_u8(rest, 8), vmovl_u8(rest));
    vst1q_u16(values, vbslq_u16(vdupq_n_u16(0x7f80), exponents, spread));
}

int am_unpack_neon(const uint8_t *codes, const uint8_t *rest_low, const uint8_t *rest_high, size_t pairs,
                   unsigned top, uint16_t *low, uint16_t *high, am_escapes_in *escapes)
{
    uint8x8_t least = vdup_n_u8((uint8_t)escapes->least);
    size_t i = 0;
    for (; i + 8 <= pairs; i += 8) {
        uint8x8_t both = vld1_u8(codes + i), first = vand_u8(both, vdup_n_u8(15)), second = vshr_n_u8(both, 4);
        join_neon(first, vld1_u8(rest_low + i), top, low + i);
        join_neon(second, vld1_u8(rest_high + i), top, high + i);
        least = vmin_u8(least, vmin_u8(first, second));
        if (vmaxv_u8(vmax_u8(first, second)) == AM_ESCAPE)
            for (size_t j = i; j < i + 8; j++)
                if (((codes[j] & 15) == AM_ESCAPE && am_escape_take(escapes, top, &low[j])) ||
                    (codes[j] >> 4 == AM_ESCAPE && am_escape_take(escapes, top, &high[j])))
                    return -1;
    }
    escapes->least = vminv_u8(least);
    return am_unpack_scalar(codes + i, rest_low + i, rest_high + i, pairs - i, top, low + i, high + i, escapes);
}

#endif

/* NEON kernel of late interaction: see maxsim.h. A tile is its query tokens, one behind the other. */
#include "maxsim.h"

#if defined(__aarch64__)
#include <arm_neon.h>

void am_maxsim_neon(const am_tokens *passage, const am_tile *tile, float *best)
{
    uint32_t half = passage->half;
    for (uint32_t i = 0; i < tile->queries; i++)
        best[i] = -__builtin_inff();
    for (uint32_t token = 0; token < passage->count; token++) {
        const uint8_t *codes = passage->codes + (size_t)token * half;
        float scale = am_tokens_scale(passage, token);
        for (uint32_t i = 0; i < tile->queries; i++) {
            const int8_t *low = tile->numbers + (size_t)i * 2 * half, *high = low + half;
            int32x4_t sums = vdupq_n_s32(0);
            for (uint32_t at = 0; at < half; at += 16) { /* four products of at most 15 * 127 fit 16 bits */
                uint8x16_t both = vld1q_u8(codes + at);
                int8x16_t lower = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
                int8x16_t upper = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
                int8x16_t first = vld1q_s8(low + at), second = vld1q_s8(high + at);
                int16x8_t pairs = vmull_s8(vget_low_s8(lower), vget_low_s8(first));
                pairs = vmlal_high_s8(pairs, lower, first);
                pairs = vmlal_s8(pairs, vget_low_s8(upper), vget_low_s8(second));
                pairs = vmlal_high_s8(pairs, upper, second);
                sums = vpadalq_s16(sums, pairs);
            }
            float score = (float)(vaddvq_s32(sums) + tile->first[i]) * scale;
            best[i] = score > best[i] ? score : best[i];
        }
    }
}
#endif

/* NEON kernel of late interaction: see maxsim.h. A tile is its query tokens, one behind the other. */
#include "maxsim.h"

#if defined(__aarch64__)
#include <arm_neon.h>

void am_maxsim_neon(const am_tokens *passage, const am_tile *tile, float *best)
{
    uint32_t row = passage->row;
    for (uint32_t i = 0; i < tile->queries; i++)
        best[i] = -__builtin_inff();
    for (uint32_t token = 0; token < passage->count; token++) {
        const uint8_t *codes = passage->codes + (size_t)token * row;
        float scale = am_tokens_scale(passage, token);
        for (uint32_t i = 0; i < tile->queries; i++) {
            const int8_t *numbers = tile->numbers + (size_t)i * 4 * row;
            int32x4_t sums = vdupq_n_s32(0);
            for (uint32_t at = 0; at < row; at += 16) { /* eight products of at most 3 * 127 fit 16 bits */
                uint8x16_t four = vld1q_u8(codes + at);
                int16x8_t pairs = vdupq_n_s16(0);
                for (uint32_t part = 0; part < 4; part++) {
                    int8x16_t code = vreinterpretq_s8_u8(vandq_u8(four, vdupq_n_u8(3)));
                    int8x16_t number = vld1q_s8(numbers + part * row + at);
                    pairs = vmlal_s8(pairs, vget_low_s8(code), vget_low_s8(number));
                    pairs = vmlal_high_s8(pairs, code, number);
                    four = vshrq_n_u8(four, 2);
                }
                sums = vpadalq_s16(sums, pairs);
            }
            float score = (float)(2 * vaddvq_s32(sums) + tile->first[i]) * scale;
            best[i] = score > best[i] ? score : best[i];
        }
    }
}
#endif

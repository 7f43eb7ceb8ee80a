/* Floats in the three dtypes by integers and single rounded operations: the same bits on every instruction set (compile
 * with -ffp-contract=off), in loops over 64 that the compiler turns into vectors of the level it compiles for.
 */
#ifndef AM_FLOATS_H
#define AM_FLOATS_H

#include "codec.h"

#include <string.h>

#define AM_INLINE static inline __attribute__((always_inline))
#define PANEL 64u        /* channels at a time */
#define LARGEST 65504.0f /* of f16 */

/* Values and scales lie where the caller and the format put them. */
typedef uint16_t __attribute__((aligned(1), may_alias)) half_bits;
typedef uint32_t __attribute__((aligned(1), may_alias)) word_bits;

typedef float panel_row[PANEL] __attribute__((aligned(64)));

AM_INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

AM_INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* By masks: of a conditional expression on floats the compiler makes branches, and of those no vectors. */
AM_INLINE uint32_t pick(uint32_t condition, uint32_t yes, uint32_t no)
{
    uint32_t mask = 0u - condition;
    return (yes & mask) | (no & ~mask);
}

/* Exact; an infinity or NaN becomes a number beyond LARGEST. */
AM_INLINE float from_f16(uint16_t half)
{
    uint32_t magnitude = half & 0x7FFFu;
    float subnormal = (float)(int32_t)magnitude * 0x1p-24f;
    float normal = float_of((magnitude << 13) + (112u << 23));
    return float_of(pick(magnitude < 0x400u, bits_of(subnormal), bits_of(normal)) | (uint32_t)(half & 0x8000u) << 16);
}

/* To nearest, ties to even. Only for what decoding makes: finite, and LARGEST where rounding a scale up went beyond. */
AM_INLINE uint16_t to_f16(float value)
{
    uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f); /* 0.5 has the step of these: 2^-24 */
    uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    uint32_t half = pick(magnitude < 0x38800000u, subnormal, normal);
    return (uint16_t)(pick(half < 0x7C00u, half, 0x7BFFu) | (bits >> 16 & 0x8000u));
}

/* Rounded away from zero or towards it: up or down, for one who knows the sign. Only for magnitudes up to LARGEST. */
AM_INLINE uint16_t to_f16_directed(float value, uint32_t away)
{
    uint32_t bits = bits_of(value + 0.0f); /* 0 instead of -0 */
    uint32_t magnitude = bits & 0x7FFFFFFFu, small = magnitude < 0x38800000u;
    float steps = float_of(pick(small, magnitude, 0)) * 0x1p24f;
    uint32_t subnormal = (uint32_t)(int32_t)steps, normal = (magnitude - (112u << 23)) >> 13;
    uint32_t inexact = pick(small, (float)(int32_t)subnormal != steps, (magnitude & 0x1FFFu) != 0);
    return (uint16_t)((pick(small, subnormal, normal) + (inexact & away)) | (bits >> 16 & 0x8000u));
}

/* Signed order of the integers is the order of the floats, with NaN outside of the infinities. */
AM_INLINE int32_t ordered(float value)
{
    int32_t bits = (int32_t)bits_of(value);
    return bits ^ (int32_t)((uint32_t)(bits >> 31) >> 1);
}

AM_INLINE float unordered(int32_t bits)
{
    return float_of((uint32_t)(bits ^ (int32_t)((uint32_t)(bits >> 31) >> 1)));
}

#if defined(__x86_64__)
#include <emmintrin.h>
#define STREAMS 1 /* past the caches (copy.h): part of every x86-64 */
#else
#define STREAMS 0
#endif

/* ---- Rows of values: up to 64 channels, always computed as 64 */

AM_INLINE void load_row(uint32_t dtype, const void *source, size_t at, uint32_t count, float *row)
{
    uint8_t padded[PANEL * 4];
    size_t item = dtype == AM_F32 ? 4 : 2;
    const uint8_t *from = (const uint8_t *)source + at * item;
    if (count < PANEL) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, from, count * item);
        from = padded;
    }
    if (dtype == AM_BF16)
        for (uint32_t c = 0; c < PANEL; c++)
            row[c] = float_of((uint32_t)((const half_bits *)from)[c] << 16);
    else if (dtype == AM_F16)
        for (uint32_t c = 0; c < PANEL; c++)
            row[c] = from_f16(((const half_bits *)from)[c]);
    else
        memcpy(row, from, PANEL * 4);
}

AM_INLINE void store_row(uint32_t dtype, const float *row, uint32_t count, void *target, size_t at)
{
    uint8_t padded[PANEL * 4] __attribute__((aligned(64)));
    size_t item = dtype == AM_F32 ? 4 : 2;
    uint8_t *whole = (uint8_t *)target + at * item, *to = padded;
    if (dtype == AM_BF16)
        for (uint32_t c = 0; c < PANEL; c++)
            ((half_bits *)to)[c] = (uint16_t)((bits_of(row[c]) + 0x7FFFu + (bits_of(row[c]) >> 16 & 1u)) >> 16);
    else if (dtype == AM_F16)
        for (uint32_t c = 0; c < PANEL; c++)
            ((half_bits *)to)[c] = to_f16(row[c]);
    else
        memcpy(to, row, PANEL * 4);
    if (count < PANEL || !STREAMS || (uintptr_t)whole % 16)
        memcpy(whole, padded, count * item);
#if STREAMS
    else
        for (uint32_t i = 0; i < PANEL * item; i += 16)
            _mm_stream_si128((__m128i *)(void *)(whole + i), *(const __m128i *)(const void *)(padded + i));
#endif
}

#endif

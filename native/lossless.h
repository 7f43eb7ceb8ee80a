/* Inside of the lossless codecs: both work on values of 16 bits, bf16 or the high halves of f32.
 *
 * A part is K or V of a block. Its values in halves: pair i of a part of n values is value i and value (n + 1) / 2 + i.
 */
#ifndef AM_LOSSLESS_H
#define AM_LOSSLESS_H

#include <stddef.h>
#include <stdint.h>

#include "codec.h"

/* Codes: 0 to 13 say how far the exponent is below the top; */
#define AM_ZERO 14u       /* exponent 0: zeros, as padding has, and subnormals */
#define AM_ESCAPE 15u     /* any other, which stands with the escapes */
#define AM_LOWEST_TOP 14u /* so that codes 0 to 13 mean exponents above 0 */

typedef struct {
    uint8_t *next, *end; /* the room for escapes */
} am_escapes_out;

typedef struct {
    const uint8_t *next, *end;
    unsigned above; /* whether one of them was above the top */
    unsigned least; /* the least code that was seen */
} am_escapes_in;

/* Packs pairs: the codes of one go into one byte, value i of `low` in bits 0 to 3; sign and mantissa of each into a
 * byte of its own. -1 when there is no room for the escapes. */
typedef int am_pack_kernel(const uint16_t *low, const uint16_t *high, size_t pairs, unsigned top, uint8_t *codes,
                           uint8_t *rest_low, uint8_t *rest_high, am_escapes_out *escapes);
/* The reverse. -1 when escapes are missing or have a code of their own. */
typedef int am_unpack_kernel(const uint8_t *codes, const uint8_t *rest_low, const uint8_t *rest_high, size_t pairs,
                             unsigned top, uint16_t *low, uint16_t *high, am_escapes_in *escapes);
/* The largest exponent. */
typedef unsigned am_largest_kernel(const uint16_t *values, size_t count);
/* Words of 32 bits from their halves. The high ones may be the last 2 * count bytes of the words. */
typedef void am_join_kernel(const uint8_t *low, const uint16_t *high, size_t count, uint8_t *words);

am_pack_kernel am_pack_scalar, am_pack_avx2, am_pack_avx512, am_pack_neon;
am_unpack_kernel am_unpack_scalar, am_unpack_avx2, am_unpack_avx512, am_unpack_neon;
am_largest_kernel am_largest_scalar, am_largest_avx2, am_largest_neon;
am_join_kernel am_join_scalar, am_join_avx2;

static inline unsigned am_exponent(uint16_t value)
{
    return value >> 7 & 255;
}

static inline int am_escape_put(am_escapes_out *escapes, uint16_t value)
{
    if (escapes->next == escapes->end)
        return -1;
    *escapes->next++ = (uint8_t)am_exponent(value);
    return 0;
}

/* Puts the next escape into the exponent of `value`. */
static inline int am_escape_take(am_escapes_in *escapes, unsigned top, uint16_t *value)
{
    if (escapes->next == escapes->end)
        return -1;
    unsigned wanted = *escapes->next++;
    if (!wanted || (wanted <= top && wanted + AM_ZERO > top))
        return -1; /* has a code of its own */
    escapes->above |= wanted > top;
    *value = (uint16_t)((*value & 0x807fu) | wanted << 7);
    return 0;
}

/* The same for a group of up to 64 pairs, given which of them are escaped. */
static inline int am_escapes_put(uint64_t marks_low, uint64_t marks_high, const uint16_t *low, const uint16_t *high,
                                 am_escapes_out *escapes)
{
    for (uint64_t marks = marks_low | marks_high; marks; marks &= marks - 1) {
        int at = __builtin_ctzll(marks);
        if ((marks_low >> at & 1 && am_escape_put(escapes, low[at])) ||
            (marks_high >> at & 1 && am_escape_put(escapes, high[at])))
            return -1;
    }
    return 0;
}

static inline int am_escapes_take(uint64_t marks_low, uint64_t marks_high, unsigned top, uint16_t *low, uint16_t *high,
                                  am_escapes_in *escapes)
{
    for (uint64_t marks = marks_low | marks_high; marks; marks &= marks - 1) {
        int at = __builtin_ctzll(marks);
        if ((marks_low >> at & 1 && am_escape_take(escapes, top, &low[at])) ||
            (marks_high >> at & 1 && am_escape_take(escapes, top, &high[at])))
            return -1;
    }
    return 0;
}

#endif

/* Inside of the dense codec: signs and exponents by 32 interleaved rANS coders, mantissas in 7 bits.
 *
 * Works on values of 16 bits, bf16 or the high halves of f32. README.md draws the bytes.
 */
#ifndef AM_DENSE_H
#define AM_DENSE_H

#include <stddef.h>
#include <stdint.h>

#define AM_DENSE_LANES 32u
#define AM_DENSE_CLASSES 8u
#define AM_DENSE_SYMBOLS 32u
#define AM_DENSE_BITS 10u                     /* frequencies add up to 1 << AM_DENSE_BITS */
#define AM_DENSE_SLOTS (1u << AM_DENSE_BITS)
#define AM_DENSE_LEAST (1u << 15)             /* a coder's state lies in [LEAST, LEAST << 16) */
#define AM_DENSE_SLACK (AM_DENSE_LANES - 1u)  /* a step may begin at any channel and reads 32 of them */

/* A slot of a class, for the decoder: bits 0-9 the symbol's frequency, 10-19 the slot's place within the symbol, 20 set
 * for an escape, 23-31 what the symbol adds to bits 7-15 of the channel's base: minus the drop of the exponent, and the
 * sign. One addition makes the upper bits of the value. */
extern uint32_t am_dense_slots[AM_DENSE_CLASSES * AM_DENSE_SLOTS];
#define AM_DENSE_ESCAPE (1u << 20)
#define AM_DENSE_UPPER 0xff800000u
#define AM_DENSE_CLASS 0x1c00u /* of a channel: bits 10-12, as they stand in an index of the slots */

/* A symbol of a class, for the encoder: bits 0-9 its frequency, 10-20 a bias, from 21 a shift; and a reciprocal. The
 * next state is state + bias + ((state * reciprocal >> 32) >> shift) * (SLOTS - frequency). */
extern uint32_t am_dense_codes[AM_DENSE_CLASSES * AM_DENSE_SYMBOLS];
extern uint32_t am_dense_reciprocals[AM_DENSE_CLASSES * AM_DENSE_SYMBOLS];

/* Byte i of an entry: how many bits below bit i are set in its index, where that bit is set itself. */
extern uint64_t am_dense_spread[256];

/* What decoding a part keeps from step to step. A step is 32 values, one of each coder. */
typedef struct {
    uint32_t states[AM_DENSE_LANES];
    const uint8_t *words, *escapes; /* words are read upwards, escapes downwards, until they meet */
    /* Per channel, repeated to dim + AM_DENSE_SLACK: bits 16-31 its base, sign and exponent as in a value; bits 10-12
     * its class. */
    const uint32_t *channels;
    uint32_t dim, at; /* the channel the next step begins at */
} am_dense_reader;

typedef struct {
    uint32_t states[AM_DENSE_LANES];
    uint8_t *words; /* written downwards */
    const uint8_t *front; /* not below this */
} am_dense_writer;

/* Decodes up to `steps` steps into `values`, which hold the mantissas, and returns how many: those for which all words
 * are surely there. SIZE_MAX for an escape that is missing or could have been a symbol. */
typedef size_t am_dense_read_kernel(am_dense_reader *reader, uint16_t *values, size_t steps);
/* Encodes `steps` steps, the last one first: `codes` has class * 32 + symbol of every value. Returns how many are left
 * when the room does not surely suffice for one more. */
typedef size_t am_dense_write_kernel(am_dense_writer *writer, const uint8_t *codes, size_t steps);

am_dense_read_kernel am_dense_read_avx2, am_dense_read_avx512;
am_dense_write_kernel am_dense_write_avx512;

/* Puts the next escape into the exponent of `value`, whose channel has its base in `channel`. */
static inline int am_dense_escape(am_dense_reader *reader, uint32_t channel, uint16_t *value)
{
    if (reader->escapes == reader->words)
        return -1;
    unsigned wanted = *--reader->escapes, base = channel >> 23 & 255;
    if (!base || (wanted <= base && wanted + 15 > base))
        return -1; /* has a symbol */
    *value = (uint16_t)((*value & 0x807fu) | wanted << 7);
    return 0;
}

/* Bytes an encoding may take at most. */
uint64_t am_dense_size(uint64_t keys, uint64_t values);
/* As the functions of codec.h, on the parts of a block of 16-bit values. */
size_t am_dense_encode(const uint16_t *parts[2], uint32_t rows, const uint32_t dims[2], uint8_t *out);
int am_dense_decode(const uint8_t *in, size_t size, uint32_t rows, const uint32_t dims[2], uint16_t *parts[2]);

#endif

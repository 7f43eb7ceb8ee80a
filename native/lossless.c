/* The lossless codecs of codec.h: the parts of a block, and the fast codec, whose exponents are codes of 4 bits
 * relative to the largest of the part. The dense codec is in dense.c.
 *
 * A bf16 value is the high half of an f32, so an f32 block is its low halves as they are and its high halves coded as
 * bf16. Exponents of one head's K or V lie within a few octaves while signs and mantissas look random (M. Hershcovitch
 * et al., "ZipNN", 2024, of weights), so only exponents are coded.
 */
#include "lossless.h"

#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "dense.h"

static inline unsigned code_of(uint16_t value, unsigned top)
{
    unsigned code = top - am_exponent(value); /* wraps above the top */
    return code < AM_ZERO ? code : am_exponent(value) ? AM_ESCAPE : AM_ZERO;
}

static inline uint8_t rest_of(uint16_t value)
{
    return (uint8_t)((value >> 8 & 0x80) | (value & 0x7f));
}

static inline uint16_t joined(uint8_t rest, unsigned code, unsigned top)
{
    unsigned exponent = code == AM_ZERO ? 0 : (top - code) & 255;
    return (uint16_t)((rest & 0x80u) << 8 | exponent << 7 | (rest & 0x7fu));
}

int am_pack_scalar(const uint16_t *low, const uint16_t *high, size_t pairs, unsigned top, uint8_t *codes,
                   uint8_t *rest_low, uint8_t *rest_high, am_escapes_out *escapes)
{
    for (size_t i = 0; i < pairs; i++) {
        unsigned first = code_of(low[i], top), second = code_of(high[i], top);
        codes[i] = (uint8_t)(first | second << 4);
        rest_low[i] = rest_of(low[i]);
        rest_high[i] = rest_of(high[i]);
        if (first == AM_ESCAPE && am_escape_put(escapes, low[i]))
            return -1;
        if (second == AM_ESCAPE && am_escape_put(escapes, high[i]))
            return -1;
    }
    return 0;
}

int am_unpack_scalar(const uint8_t *codes, const uint8_t *rest_low, const uint8_t *rest_high, size_t pairs,
                     unsigned top, uint16_t *low, uint16_t *high, am_escapes_in *escapes)
{
    unsigned least = escapes->least;
    for (size_t i = 0; i < pairs; i++) {
        unsigned first = codes[i] & 15, second = codes[i] >> 4;
        low[i] = joined(rest_low[i], first, top);
        high[i] = joined(rest_high[i], second, top);
        least = first < least ? first : least;
        least = second < least ? second : least;
        if (first == AM_ESCAPE && am_escape_take(escapes, top, &low[i]))
            return -1;
        if (second == AM_ESCAPE && am_escape_take(escapes, top, &high[i]))
            return -1;
    }
    escapes->least = least;
    return 0;
}

unsigned am_largest_scalar(const uint16_t *values, size_t count)
{
    unsigned largest = 0;
    for (size_t i = 0; i < count; i++)
        largest = am_exponent(values[i]) > largest ? am_exponent(values[i]) : largest;
    return largest;
}

void am_join_scalar(const uint8_t *low, const uint16_t *high, size_t count, uint8_t *words)
{
    enum { STEP = 256 }; /* what is read lies ahead of what is written */
    for (size_t i = 0; i < count; i += STEP) {
        size_t step = count - i < STEP ? count - i : STEP;
        uint16_t lower[STEP], upper[STEP];
        uint32_t whole[STEP];
        memcpy(lower, low + 2 * i, 2 * step);
        memcpy(upper, high + i, 2 * step);
        for (size_t j = 0; j < step; j++)
            whole[j] = (uint32_t)upper[j] << 16 | lower[j];
        memcpy(words + 4 * i, whole, 4 * step);
    }
}

typedef struct {
    am_largest_kernel *largest;
    am_pack_kernel *pack;
    am_unpack_kernel *unpack;
    am_join_kernel *join;
} kernels;

static const kernels table[AM_LEVELS] = {
    [AM_SCALAR] = {am_largest_scalar, am_pack_scalar, am_unpack_scalar, am_join_scalar},
    [AM_SSE42] = {am_largest_scalar, am_pack_scalar, am_unpack_scalar, am_join_scalar},
#if defined(__x86_64__)
    [AM_AVX2] = {am_largest_avx2, am_pack_avx2, am_unpack_avx2, am_join_avx2},
    [AM_AVX512] = {am_largest_avx2, am_pack_avx512, am_unpack_avx512, am_join_avx2},
#elif defined(__aarch64__)
    [AM_NEON] = {am_largest_neon, am_pack_neon, am_unpack_neon, am_join_scalar},
#endif
};

/* ---- the fast codec, on values of 16 bits ---- */

/* At most one value in 16: then the exponent of a value takes less than 5 bits. */
static size_t most_escapes(size_t values)
{
    return values / 16;
}

/* The top of a part whose largest exponent makes too many escapes: the window of 14 exponents that holds most values,
 * the lowest of equals. Exponent 0 has a code of its own. */
static unsigned best_top(const uint16_t *values, size_t count)
{
    uint32_t counts[256] = {0}, held = 0;
    for (size_t i = 0; i < count; i++)
        counts[am_exponent(values[i])]++;
    for (unsigned i = 1; i <= AM_LOWEST_TOP; i++)
        held += counts[i];
    unsigned best = AM_LOWEST_TOP;
    for (uint32_t top = AM_LOWEST_TOP + 1, most = held; top < 256; top++) {
        held += counts[top] - counts[top - AM_ZERO];
        if (held > most) {
            most = held;
            best = top;
        }
    }
    return best;
}

/* Encodes one part under `top`: -1 where that makes too many escapes. */
static int pack_part(const kernels *use, const uint16_t *values, size_t count, unsigned top, uint8_t *rest,
                     uint8_t *codes, am_escapes_out *escapes)
{
    size_t half = (count + 1) / 2, pairs = count / 2, room = most_escapes(count);
    am_escapes_out own = {escapes->next, escapes->next + room};
    if (use->pack(values, values + half, pairs, top, codes, rest, rest + half, &own))
        return -1;
    if (pairs < half) { /* the value in the middle has no partner */
        uint16_t none = (uint16_t)(top << 7);
        uint8_t ignored;
        if (am_pack_scalar(values + pairs, &none, 1, top, codes + pairs, rest + pairs, &ignored, &own))
            return -1;
    }
    escapes->next = own.next;
    return 0;
}

static int unpack_part(const kernels *use, const uint8_t *rest, const uint8_t *codes, size_t count, unsigned top,
                       am_escapes_in *escapes, uint16_t *values)
{
    size_t half = (count + 1) / 2, pairs = count / 2;
    const uint8_t *before = escapes->next;
    escapes->above = 0;
    escapes->least = AM_ESCAPE;
    if (top < AM_LOWEST_TOP || use->unpack(codes, rest, rest + half, pairs, top, values, values + half, escapes))
        return -1;
    if (pairs < half) {
        static const uint8_t none = 0;
        uint16_t ignored;
        unsigned least = escapes->least;
        if (codes[pairs] >> 4 || am_unpack_scalar(codes + pairs, rest + pairs, &none, 1, top, values + pairs, &ignored,
                                                  escapes))
            return -1;
        escapes->least = least < (codes[pairs] & 15u) ? least : codes[pairs] & 15u;
    }
    /* Only the top that the encoder takes is allowed, so that equal values have one encoding. */
    size_t taken = (size_t)(escapes->next - before);
    if (taken > most_escapes(count) || (escapes->least && top > AM_LOWEST_TOP))
        return -1;
    if (!escapes->above)
        return 0;
    unsigned largest = use->largest(values, count); /* above the top */
    size_t below = 0;
    for (size_t i = 0; i < count; i++)
        below += am_exponent(values[i]) && am_exponent(values[i]) + AM_ZERO <= largest;
    return below > most_escapes(count) && best_top(values, count) == top ? 0 : -1;
}

/* Bytes of the planes and the tops. */
static size_t fast_fixed(size_t keys, size_t values)
{
    return keys + values + (keys + 1) / 2 + (values + 1) / 2 + 2;
}

static size_t fast_encode(const uint16_t *parts[2], const size_t counts[2], uint8_t *out)
{
    const kernels *use = &table[am_cpu_level()];
    uint8_t *rest = out, *codes = out + counts[0] + counts[1];
    uint8_t *tops = out + fast_fixed(counts[0], counts[1]) - 2;
    am_escapes_out escapes = {tops + 2, NULL};
    for (int part = 0; part < 2; part++) {
        unsigned top = use->largest(parts[part], counts[part]);
        top = top < AM_LOWEST_TOP ? AM_LOWEST_TOP : top;
        if (pack_part(use, parts[part], counts[part], top, rest, codes, &escapes)) {
            top = best_top(parts[part], counts[part]);
            if (pack_part(use, parts[part], counts[part], top, rest, codes, &escapes))
                return 0;
        }
        tops[part] = (uint8_t)top;
        rest += counts[part];
        codes += (counts[part] + 1) / 2;
    }
    return (size_t)(escapes.next - out);
}

static int fast_decode(const uint8_t *in, size_t size, const size_t counts[2], uint16_t *parts[2])
{
    const kernels *use = &table[am_cpu_level()];
    size_t fixed = fast_fixed(counts[0], counts[1]);
    if (size < fixed)
        return -1;
    const uint8_t *rest = in, *codes = in + counts[0] + counts[1], *tops = in + fixed - 2;
    am_escapes_in escapes = {in + fixed, in + size, 0, 0};
    for (int part = 0; part < 2; part++) {
        if (unpack_part(use, rest, codes, counts[part], tops[part], &escapes, parts[part]))
            return -1;
        rest += counts[part];
        codes += (counts[part] + 1) / 2;
    }
    return escapes.next == escapes.end ? 0 : -1;
}

/* ---- f32: low halves, then high halves ---- */

static void split(const uint8_t *restrict words, size_t count, uint8_t *restrict low, uint16_t *restrict high)
{
    for (size_t i = 0; i < count; i++) {
        uint32_t word;
        memcpy(&word, words + 4 * i, 4);
        uint16_t lower = (uint16_t)word;
        memcpy(low + 2 * i, &lower, 2);
        high[i] = (uint16_t)(word >> 16);
    }
}

/* ---- the contract of codec.h ---- */

uint64_t am_lossless_size(uint32_t codec, am_block block)
{
    uint64_t keys = (uint64_t)block.rows * block.key_dim, values = (uint64_t)block.rows * block.value_dim;
    uint64_t halves = block.dtype == AM_F32 ? 2 * (keys + values) : 0;
    if (codec == AM_DENSE)
        return halves + am_dense_size(keys, values);
    return halves + fast_fixed(keys, values) + most_escapes(keys) + most_escapes(values);
}

uint64_t am_lossless_encode(uint32_t codec, am_block block, const void *key, const void *value, uint8_t *out)
{
    size_t counts[2] = {(size_t)block.rows * block.key_dim, (size_t)block.rows * block.value_dim}, halves = 0, size;
    uint16_t *high = NULL; /* not on the stack: a thread's may be 128 KB */
    const uint16_t *parts[2] = {key, value};
    if (block.dtype == AM_F32) {
        halves = 2 * (counts[0] + counts[1]);
        high = malloc(halves);
        if (!high)
            return 0;
        split(key, counts[0], out, high);
        split(value, counts[1], out + 2 * counts[0], high + counts[0]);
        parts[0] = high;
        parts[1] = high + counts[0];
    }
    if (codec == AM_DENSE)
        size = am_dense_encode(parts, block.rows, (const uint32_t[2]){block.key_dim, block.value_dim}, out + halves);
    else
        size = fast_encode(parts, counts, out + halves);
    free(high);
    return size && halves + size < am_block_bytes(block) ? halves + size : 0;
}

int am_lossless_decode(uint32_t codec, am_block block, const uint8_t *in, uint64_t size, void *key, void *value)
{
    size_t counts[2] = {(size_t)block.rows * block.key_dim, (size_t)block.rows * block.value_dim}, halves = 0;
    uint16_t *parts[2] = {key, value};
    if (size >= am_block_bytes(block))
        return -1;
    if (block.dtype == AM_F32) {
        halves = 2 * (counts[0] + counts[1]);
        if (size < halves)
            return -1;
        parts[0] += counts[0];
        parts[1] += counts[1];
    }
    if (codec == AM_DENSE ? am_dense_decode(in + halves, size - halves, block.rows,
                                            (const uint32_t[2]){block.key_dim, block.value_dim}, parts)
                          : fast_decode(in + halves, size - halves, counts, parts))
        return -1;
    if (halves) {
        am_join_kernel *join = table[am_cpu_level()].join;
        join(in, parts[0], counts[0], key);
        join(in + 2 * counts[0], parts[1], counts[1], value);
    }
    return 0;
}

/* CRC32C kernels: see crc32c.h.
 *
 * The hardware instruction takes 8 bytes, with a latency of 3 cycles and a throughput of 1: three independent streams
 * keep it busy. Their registers are joined by "advance over n zero bytes", which is linear over GF(2) and so is four
 * table look-ups (the method of M. Adler's crc32c.c and of V. Gopal et al., "Fast CRC computation for iSCSI polynomial
 * using CRC32 instruction", Intel 2011). Data that is not in a cache is fetched one round ahead, which doubles the speed.
 *
 * With AVX-512, 256 bytes at a time are folded by carry-less multiplication (V. Gopal et al., "Fast CRC computation for
 * generic polynomials using PCLMULQDQ instruction", Intel 2009), two to three times as fast again.
 */
#include "crc32c.h"

#include <pthread.h>
#include <string.h>

#include "copy.h"
#include "cpu.h"

#define POLYNOMIAL 0x82f63b78u /* reflected */

/* Bytes per stream, whole cache lines. 3 * LONG is just below 8 KiB, the K or V of a block of 64 tokens at 64 dimensions
 * in 16 bits. */
#define LONG 2688u
#define SHORT 256u

static uint32_t slices[8][256];      /* slices[k][b]: byte b followed by k zero bytes */
static uint32_t after_long[4][256];  /* byte k of a register, advanced over LONG zero bytes */
static uint32_t after_short[4][256]; /* the same for SHORT */

static uint64_t load64(const uint8_t *at)
{
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

static inline uint32_t advance(const uint32_t tables[4][256], uint32_t crc)
{
    return tables[0][crc & 255] ^ tables[1][crc >> 8 & 255] ^ tables[2][crc >> 16 & 255] ^ tables[3][crc >> 24];
}

/* Sets tables[k][b] = register (b << 8k) after `zeros` zero bytes. */
static void fill_advance(uint32_t tables[4][256], size_t zeros)
{
    uint32_t images[32]; /* of the 32 single bits */
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = 1u << bit;
        for (size_t i = 0; i < zeros; i++)
            crc = slices[0][crc & 255] ^ (crc >> 8);
        images[bit] = crc;
    }
    for (int k = 0; k < 4; k++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t crc = 0;
            for (int bit = 0; bit < 8; bit++)
                if (byte >> bit & 1)
                    crc ^= images[8 * k + bit];
            tables[k][byte] = crc;
        }
}

/* ---- kernels: register in, register out (no inversion) ---- */

static uint32_t update_table(uint32_t crc, const uint8_t *data, size_t length)
{
    for (; length >= 8; data += 8, length -= 8) {
        uint64_t word = load64(data) ^ crc; /* little-endian hosts only, as page.h requires */
        crc = slices[7][word & 255] ^ slices[6][word >> 8 & 255] ^ slices[5][word >> 16 & 255] ^
              slices[4][word >> 24 & 255] ^ slices[3][word >> 32 & 255] ^ slices[2][word >> 40 & 255] ^
              slices[1][word >> 48 & 255] ^ slices[0][word >> 56];
    }
    for (; length; data++, length--)
        crc = slices[0][(crc ^ *data) & 255] ^ (crc >> 8);
    return crc;
}

#if defined(__x86_64__)
#include <nmmintrin.h>
#define HARDWARE AM_SSE42
#define TARGET AM_TARGET_SSE42
#define STEP8(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define STEP1(crc, byte) _mm_crc32_u8((crc), (byte))
#elif defined(__aarch64__)
#include <arm_acle.h>
#define HARDWARE AM_NEON
#if defined(__clang__)
#define TARGET __attribute__((target("crc")))
#else
#define TARGET __attribute__((target("+crc")))
#endif
#define STEP8(crc, word) __crc32cd((crc), (word))
#define STEP1(crc, byte) __crc32cb((crc), (byte))
#endif

#ifdef HARDWARE
TARGET static uint32_t update_hardware(uint32_t crc, const uint8_t *data, size_t length)
{
#define THREE_STREAMS(STRIDE, TABLES)                                                                                  \
    while (length >= 3 * STRIDE) {                                                                                     \
        uint32_t second = 0, third = 0;                                                                                \
        for (size_t i = 0; i < STRIDE; i += 8) {                                                                       \
            crc = STEP8(crc, load64(data + i));                                                                        \
            second = STEP8(second, load64(data + STRIDE + i));                                                         \
            third = STEP8(third, load64(data + 2 * STRIDE + i));                                                       \
            if (i % 64 == 0) { /* the next round's lines: three streams defeat the hardware's own prefetch */          \
                __builtin_prefetch(data + 3 * STRIDE + 3 * i);                                                         \
                __builtin_prefetch(data + 3 * STRIDE + 3 * i + 64);                                                    \
                __builtin_prefetch(data + 3 * STRIDE + 3 * i + 128);                                                   \
            }                                                                                                          \
        }                                                                                                              \
        crc = advance(TABLES, crc) ^ second;                                                                           \
        crc = advance(TABLES, crc) ^ third;                                                                            \
        data += 3 * STRIDE;                                                                                            \
        length -= 3 * STRIDE;                                                                                          \
    }
    THREE_STREAMS(LONG, after_long)
    THREE_STREAMS(SHORT, after_short)
#undef THREE_STREAMS
    for (; length >= 8; data += 8, length -= 8)
        crc = STEP8(crc, load64(data));
    for (; length; data++, length--)
        crc = STEP1(crc, *data);
    return crc;
}
#endif

#if defined(__x86_64__)
#define LINE(crc, from, to)                                                                                            \
    do {                                                                                                               \
        for (int word = 0; word < 64; word += 8)                                                                       \
            (crc) = STEP8((crc), load64((from) + word));                                                               \
        am_stream_line((to), (from));                                                                                  \
    } while (0)

/* Checksum and copy in one pass over the source, past the caches (copy.h). `to` is a multiple of 64. */
__attribute__((target("avx2,sse4.2"))) static uint32_t copy_avx2(uint32_t crc, uint8_t *to, const uint8_t *from,
                                                                 size_t length)
{
    for (; length >= 3 * LONG; from += 3 * LONG, to += 3 * LONG, length -= 3 * LONG) {
        uint32_t second = 0, third = 0;
        for (size_t i = 0; i < LONG; i += 64) {
            LINE(crc, from + i, to + i);
            LINE(second, from + LONG + i, to + LONG + i);
            LINE(third, from + 2 * LONG + i, to + 2 * LONG + i);
            __builtin_prefetch(from + 3 * LONG + 3 * i);
            __builtin_prefetch(from + 3 * LONG + 3 * i + 64);
            __builtin_prefetch(from + 3 * LONG + 3 * i + 128);
        }
        crc = advance(after_long, crc) ^ second;
        crc = advance(after_long, crc) ^ third;
    }
    for (; length >= 64; from += 64, to += 64, length -= 64)
        LINE(crc, from, to);
    memcpy(to, from, length);
    return update_hardware(crc, from, length);
}
#endif

/* ---- folding, AVX-512 ---- */

#if defined(__x86_64__)
#define FOLDED 256u /* bytes of a round: four registers of 64 */

/* What a 128-bit piece is multiplied by to move it over 2048, 512 and 128 bits of the message; set once. */
static uint64_t folds[3][2];

/* x^n modulo the polynomial, as a factor of reflected operands: its 32 bits one place up. */
static uint64_t factor(unsigned int n)
{
    uint32_t value = 0x80000000u; /* x^0, reflected */
    for (; n; n--)
        value = (value >> 1) ^ (value & 1 ? POLYNOMIAL : 0);
    return (uint64_t)value << 1;
}

static void fill_folds(void)
{
    static const unsigned int bits[3] = {2048, 512, 128};
    for (int i = 0; i < 3; i++) {
        folds[i][0] = factor(bits[i] + 32);
        folds[i][1] = factor(bits[i] - 32);
    }
}

/* `value` moved over the distance of `by`, plus what stands there. */
AM_TARGET_AVX512 static inline __m512i folded(__m512i value, __m512i by, __m512i there)
{
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, by, 0x00),
                                     _mm512_clmulepi64_epi128(value, by, 0x11), there, 0x96);
}

/* Checksum of whole rounds, copied to `to` past the caches where that is not NULL (then it is a multiple of 64). */
AM_TARGET_AVX512 static inline uint32_t fold_rounds(uint32_t crc, uint8_t *to, const uint8_t *from, size_t rounds)
{
    __m512i far = _mm512_broadcast_i64x2(_mm_loadu_si128((const __m128i *)(const void *)folds[0]));
    __m512i near = _mm512_broadcast_i64x2(_mm_loadu_si128((const __m128i *)(const void *)folds[1]));
    __m512i held[4];
    for (size_t round = 0; round < rounds; round++, from += FOLDED) {
        for (int i = 0; i < 4; i++) {
            __m512i line = _mm512_loadu_si512(from + 64 * i);
            if (to)
                _mm512_stream_si512((__m512i *)(void *)(to + 64 * i), line);
            if (round)
                held[i] = folded(held[i], far, line);
            else
                held[i] = i ? line : _mm512_xor_si512(line, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
            _mm_prefetch((const char *)from + 64 * i + 2048, _MM_HINT_T0);
        }
        to = to ? to + FOLDED : NULL;
    }
    __m512i all = folded(folded(folded(held[0], near, held[1]), near, held[2]), near, held[3]);
    uint64_t words[8];
    _mm512_storeu_si512(words, all);
    crc = 0;
    for (int i = 0; i < 8; i++) /* what is left is 64 bytes with the same checksum */
        crc = STEP8(crc, words[i]);
    return crc;
}

AM_TARGET_AVX512 static uint32_t update_folding(uint32_t crc, const uint8_t *data, size_t length)
{
    size_t rounds = length / FOLDED;
    if (rounds)
        crc = fold_rounds(crc, NULL, data, rounds);
    return update_hardware(crc, data + rounds * FOLDED, length - rounds * FOLDED);
}

AM_TARGET_AVX512 static uint32_t copy_folding(uint32_t crc, uint8_t *to, const uint8_t *from, size_t length)
{
    size_t rounds = length / FOLDED, done = rounds * FOLDED;
    if (rounds)
        crc = fold_rounds(crc, to, from, rounds);
    return copy_avx2(crc, to + done, from + done, length - done);
}
#endif

/* ---- dispatch ---- */

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void prepare(void)
{
    for (int byte = 0; byte < 256; byte++) {
        uint32_t crc = (uint32_t)byte;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
        slices[0][byte] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int byte = 0; byte < 256; byte++)
            slices[k][byte] = slices[0][slices[k - 1][byte] & 255] ^ (slices[k - 1][byte] >> 8);
    fill_advance(after_long, LONG);
    fill_advance(after_short, SHORT);
#if defined(__x86_64__)
    fill_folds();
#endif
}

uint32_t am_crc32c(uint32_t value, const void *data, size_t length)
{
    pthread_once(&once, prepare);
#if defined(__x86_64__)
    if (am_cpu_level() == AM_AVX512)
        return ~update_folding(~value, data, length);
#endif
#ifdef HARDWARE
    if (am_cpu_level() >= HARDWARE)
        return ~update_hardware(~value, data, length);
#endif
    return ~update_table(~value, data, length);
}

uint32_t am_crc32c_copy(uint32_t value, void *to, const void *from, size_t length)
{
    pthread_once(&once, prepare);
#if defined(__x86_64__)
    if (am_cpu_level() == AM_AVX512 && (uintptr_t)to % 64 == 0)
        return ~copy_folding(~value, to, from, length);
    if (am_cpu_level() == AM_AVX2 && (uintptr_t)to % 64 == 0)
        return ~copy_avx2(~value, to, from, length);
#endif
    memcpy(to, from, length);
    return am_crc32c(value, to, length);
}

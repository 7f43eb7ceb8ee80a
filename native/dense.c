/* The dense lossless codec: signs and exponents entropy-coded by range asymmetric numeral systems, mantissas in 7 bits.
 *
 * rANS after J. Duda, "Asymmetric numeral systems", 2014; interleaved, renormalised by 16 bits, divided by reciprocals
 * as in F. Giesen, "Interleaved entropy coders", 2014. A channel of K or V keeps its scale and often its sign over a
 * block: its symbols are relative to its own largest exponent and usual sign, and it picks one of 8 fixed
 * distributions, so that no table has to be stored.
 */
#include "dense.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "codec.h"
#include "cpu.h"
#include "lossless.h"

uint32_t am_dense_slots[AM_DENSE_CLASSES * AM_DENSE_SLOTS];
uint32_t am_dense_codes[AM_DENSE_CLASSES * AM_DENSE_SYMBOLS];
uint32_t am_dense_reciprocals[AM_DENSE_CLASSES * AM_DENSE_SYMBOLS];
uint64_t am_dense_spread[256];
static int16_t prices[AM_DENSE_CLASSES][AM_DENSE_SYMBOLS]; /* in 1/64 bit */

/* Symbol 2 * drop + sign: how far the exponent is below the channel's base, 15 an escape; whether the sign is the
 * rarer one. Found by k-means over channels, with the cost in bits as the distance: three parts of keys, three of
 * values of SmolLM2-135M over English text, two of normal and Laplace variables. Part of the format: never changed. */
static const uint16_t frequencies[AM_DENSE_CLASSES][AM_DENSE_SYMBOLS] = {
    {585, 1, 355, 1, 45, 1, 10, 1, 2, 1, 1, 1, 1, 1, 1, 1,
     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    {127, 79, 202, 143, 127, 97, 65, 54, 33, 28, 16, 14, 8, 7, 4, 3,
     2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    {195, 6, 338, 33, 176, 48, 73, 38, 32, 23, 15, 12, 7, 6, 3, 3,
     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    {137, 1, 630, 1, 177, 2, 35, 3, 10, 3, 3, 2, 1, 1, 1, 1,
     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    {37, 28, 162, 127, 164, 130, 100, 79, 52, 42, 27, 22, 13, 11, 6, 5,
     3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    {51, 5, 216, 47, 210, 91, 117, 75, 56, 46, 27, 24, 13, 12, 6, 6,
     3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    {44, 1, 324, 6, 324, 21, 129, 29, 49, 22, 20, 14, 9, 7, 4, 4,
     2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    {17, 11, 85, 54, 170, 109, 145, 102, 88, 66, 46, 37, 24, 19, 12, 10,
     6, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
};

/* floor(64 * log2(x)) for x >= 1. */
static int log2_of(uint32_t x)
{
    int whole = 31 - __builtin_clz(x), result = whole;
    uint64_t mantissa = (uint64_t)x << (31 - whole);
    for (int bit = 0; bit < 6; bit++) {
        mantissa = mantissa * mantissa >> 31;
        result = result * 2 + (int)(mantissa >> 32);
        mantissa >>= mantissa >> 32;
    }
    return result;
}

static void prepare(void)
{
    for (uint32_t class = 0; class < AM_DENSE_CLASSES; class++)
        for (uint32_t symbol = 0, first = 0; symbol < AM_DENSE_SYMBOLS; symbol++) {
            uint32_t frequency = frequencies[class][symbol], shift = 0, code = class * AM_DENSE_SYMBOLS + symbol;
            uint32_t upper = ((symbol & 1) << 8) ^ ((0u - symbol / 2) & 511);
            for (uint32_t place = 0; place < frequency; place++)
                am_dense_slots[class * AM_DENSE_SLOTS + first + place] =
                    upper << 23 | (symbol / 2 == AM_ESCAPE ? AM_DENSE_ESCAPE : 0) | place << 10 | frequency;
            while (1u << shift < frequency)
                shift++;
            /* Division by reciprocals, exact for states below 2^31 (R. Alverson, "Integer division using reciprocals",
             * 1991). The one of 1 does not fit: 2^32 - 1 gives state - 1, and the bias makes up for it. */
            int one = frequency == 1;
            uint32_t bias = first + (one ? AM_DENSE_SLOTS - 1 : 0);
            am_dense_codes[code] = (one ? 0 : shift - 1) << 21 | bias << 10 | frequency;
            am_dense_reciprocals[code] =
                one ? UINT32_MAX : (uint32_t)((((uint64_t)1 << (31 + shift)) + frequency - 1) / frequency);
            prices[class][symbol] = (int16_t)(64 * (int)AM_DENSE_BITS - log2_of(frequency));
            first += frequency;
        }
    for (uint32_t mask = 0; mask < 256; mask++)
        for (uint32_t lane = 0, next = 0; lane < 8; lane++)
            am_dense_spread[mask] |= (uint64_t)(mask >> lane & 1 ? next++ : 0) << 8 * lane;
}

/* Of what is plain loops, which compilers turn into vector code, each level has a copy. */
#define ALWAYS_INLINE inline __attribute__((always_inline))

static pthread_once_t once = PTHREAD_ONCE_INIT;

/* ---- mantissas: 8 runs of values, the last in the upper bits of the other seven ---- */

static size_t run_of(size_t count)
{
    return (count + 7) / 8;
}

static size_t mantissa_bytes(size_t count)
{
    return 7 * run_of(count);
}

static ALWAYS_INLINE void mantissas_put(const uint16_t *values, size_t count, uint8_t *out)
{
    size_t run = run_of(count), first = 7 * run < count ? 7 * run : count;
    for (size_t i = 0; i < first; i++)
        out[i] = values[i] & 0x7f;
    memset(out + first, 0, 7 * run - first);
    for (size_t bit = 0; bit < 7; bit++)
        for (size_t i = 0; i < count - first; i++)
            out[bit * run + i] |= (uint8_t)((values[first + i] >> bit & 1) << 7);
}

static ALWAYS_INLINE int mantissas_take(const uint8_t *in, size_t count, uint16_t *values)
{
    size_t run = run_of(count), first = 7 * run < count ? 7 * run : count;
    for (size_t i = 0; i < first; i++)
        values[i] = in[i] & 0x7f;
    for (size_t i = 0; i < count - first; i++) {
        unsigned last = 0;
        for (size_t bit = 0; bit < 7; bit++)
            last |= (unsigned)(in[bit * run + i] >> 7) << bit;
        values[first + i] = (uint16_t)last;
    }
    /* What holds no value is zero. */
    unsigned unused = 0;
    for (size_t i = first; i < 7 * run; i++)
        unused |= in[i];
    for (size_t bit = 0; bit < 7 && count < 8 * run; bit++)
        for (size_t i = count - first; i < run; i++)
            unused |= bit * run + i < first ? in[bit * run + i] & 0x80u : 0;
    return unused ? -1 : 0;
}

/* ---- coders ---- */

static size_t read_none(am_dense_reader *reader, uint16_t *values, size_t steps)
{
    (void)reader, (void)values, (void)steps;
    return 0;
}

static int read_scalar(am_dense_reader *reader, uint16_t *values, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        size_t lane = i % AM_DENSE_LANES;
        if (i && !lane)
            reader->at = (reader->at + AM_DENSE_LANES) % reader->dim;
        uint32_t channel = reader->channels[reader->at + lane], state = reader->states[lane];
        uint32_t slot = am_dense_slots[(state & (AM_DENSE_SLOTS - 1)) | (channel & AM_DENSE_CLASS)];
        values[i] |= (uint16_t)((((slot & AM_DENSE_UPPER) + channel) >> 16) & 0xff80u);
        state = (slot & 1023) * (state >> AM_DENSE_BITS) + (slot >> 10 & 1023);
        size_t left = (size_t)(reader->escapes - reader->words);
        unsigned small = state < AM_DENSE_LEAST; /* not a branch: nothing could predict it */
        if (left >= 2) {
            uint32_t word = (uint32_t)reader->words[0] | (uint32_t)reader->words[1] << 8;
            state = state << 16 * small | (word & (0u - small));
            reader->words += 2 * small;
        } else if (small)
            return -1;
        reader->states[lane] = state;
        if (slot & AM_DENSE_ESCAPE && am_dense_escape(reader, channel, &values[i]))
            return -1;
    }
    return 0;
}

static size_t write_none(am_dense_writer *writer, const uint8_t *codes, size_t steps)
{
    (void)writer, (void)codes;
    return steps;
}

static int write_scalar(am_dense_writer *writer, const uint8_t *codes, size_t count)
{
    while (count--) {
        uint32_t *state = &writer->states[count % AM_DENSE_LANES], code = am_dense_codes[codes[count]];
        unsigned large = *state >= (code & 1023) << 21;
        if (writer->words - writer->front < 2)
            return -1; /* there is more room than an encoding may take */
        writer->words[-2] = (uint8_t)*state; /* not a branch either: the next word overwrites what does not count */
        writer->words[-1] = (uint8_t)(*state >> 8);
        writer->words -= 2 * large;
        *state >>= 16 * large;
        uint32_t whole = (uint32_t)((uint64_t)*state * am_dense_reciprocals[codes[count]] >> 32) >> (code >> 21);
        *state += (code >> 10 & 2047) + whole * (AM_DENSE_SLOTS - (code & 1023));
    }
    return 0;
}

/* ---- channels: their bases, usual signs and classes ---- */

#define NULL_CHANNEL 15u /* instead of how far the base is below the top: the channel has exponent 0 alone */
#define LOWEST_TOP 29u   /* so that no symbol of any other channel goes below exponent 0 */

/* The top whose 15 exponents hold most channels' largest, the lowest of equals: outliers don't spoil other channels. */
static unsigned best_top(const uint16_t *largest, size_t dim)
{
    uint16_t counts[256] = {0};
    uint32_t held = 0;
    for (size_t i = 0; i < dim; i++)
        counts[largest[i]]++;
    for (unsigned i = LOWEST_TOP + 1 - NULL_CHANNEL; i <= LOWEST_TOP; i++)
        held += counts[i];
    unsigned best = LOWEST_TOP;
    for (uint32_t top = LOWEST_TOP + 1, most = held; top < 256; top++) {
        held += counts[top];
        held -= counts[top - NULL_CHANNEL];
        if (held > most) {
            most = held;
            best = top;
        }
    }
    return best;
}

/* Finds the symbols of one part: class * 32 + symbol to `codes`, a byte per channel to `channels`, the part's largest
 * exponent to `top`. -1 when there is no room for the escapes, which go downwards from `*escapes`. */
static ALWAYS_INLINE int analyse(const uint16_t *restrict values, size_t rows, size_t dim, uint8_t *restrict codes,
                                 uint8_t *restrict channels, uint8_t *top, uint8_t **escapes, const uint8_t *front)
{
    enum { GROUP = 64 };
    uint16_t base[AM_CODEC_MAX_DIM], negative[AM_CODEC_MAX_DIM];
    memset(base, 0, dim * sizeof *base);
    memset(negative, 0, dim * sizeof *negative);
    for (size_t row = 0; row < rows; row++) {
        const uint16_t *restrict from = values + row * dim;
        for (size_t i = 0; i < dim; i++) {
            int16_t here = (int16_t)(from[i] >> 7 & 255), most = (int16_t)base[i];
            base[i] = (uint16_t)(here > most ? here : most);
        }
        for (size_t i = 0; i < dim; i++)
            negative[i] = (uint16_t)(negative[i] + (from[i] >> 15));
    }
    unsigned most = best_top(base, dim);
    *top = (uint8_t)most;
    for (size_t i = 0; i < dim; i++) {
        unsigned own = base[i] < most ? base[i] : most;
        base[i] = (uint16_t)(!own || most - own < NULL_CHANNEL ? own : most - NULL_CHANNEL + 1);
        negative[i] = 2u * negative[i] > rows;
    }
    for (size_t row = 0; row < rows; row++) {
        const uint16_t *restrict from = values + row * dim;
        uint8_t *restrict to = codes + row * dim;
        unsigned escaped = 0;
        for (size_t i = 0; i < dim; i++) {
            int16_t drop = (int16_t)(base[i] - (from[i] >> 7 & 255));
            drop = drop < 0 || drop > (int16_t)AM_ESCAPE ? (int16_t)AM_ESCAPE : drop;
            to[i] = (uint8_t)(2 * drop | ((from[i] >> 15) ^ negative[i]));
        }
        for (size_t i = 0; i < dim; i++)
            escaped |= to[i] / 2 == AM_ESCAPE;
        for (size_t i = 0; escaped && i < dim; i++)
            if (to[i] / 2 == AM_ESCAPE) {
                if (*escapes == front)
                    return -1;
                *--*escapes = (uint8_t)am_exponent(from[i]);
            }
    }
    for (size_t begin = 0; begin < dim; begin += GROUP) {
        size_t width = dim - begin < GROUP ? dim - begin : GROUP;
        int16_t counts[GROUP][AM_DENSE_SYMBOLS] = {0};
        uint8_t classes[GROUP];
        for (size_t row = 0; row < rows; row++) {
            const uint8_t *from = codes + row * dim + begin;
            for (size_t i = 0; i < width; i++)
                counts[i][from[i]]++;
        }
        for (size_t i = 0; i < width; i++) {
            int32_t least = INT32_MAX;
            for (uint32_t class = 0; class < AM_DENSE_CLASSES; class++) {
                int32_t price = 0;
                for (uint32_t symbol = 0; symbol < AM_DENSE_SYMBOLS; symbol++)
                    price += counts[i][symbol] * prices[class][symbol];
                if (price < least) {
                    least = price;
                    classes[i] = (uint8_t)class;
                }
            }
            unsigned drop = base[begin + i] ? most - base[begin + i] : NULL_CHANNEL;
            channels[begin + i] = (uint8_t)((unsigned)negative[begin + i] << 7 | (unsigned)classes[i] << 4 | drop);
        }
        for (size_t row = 0; row < rows; row++) {
            uint8_t *restrict to = codes + row * dim + begin;
            for (size_t i = 0; i < width; i++)
                to[i] |= (uint8_t)(classes[i] << 5);
        }
    }
    return 0;
}

/* The reader's table of channels, see am_dense_reader. Returns how many of them have exponent 0 alone. */
static uint32_t open_channels(const uint8_t *bytes, uint32_t dim, unsigned top, uint32_t *channels)
{
    uint32_t null = 0;
    for (uint32_t i = 0; i < dim; i++) {
        uint32_t byte = bytes[i], below = byte & 15, base = below == NULL_CHANNEL ? 0 : top - below;
        null += below == NULL_CHANNEL;
        channels[i] = (byte & 0x80) << 24 | base << 23 | (byte & 0x70) << 6;
    }
    for (uint32_t i = 0; i < AM_DENSE_SLACK; i++)
        channels[dim + i] = channels[i];
    return null;
}

/* Whether those channels have: a symbol that goes below 0 comes out far above. */
static int null_everywhere(const uint16_t *values, uint32_t rows, uint32_t dim, const uint32_t *channels)
{
    unsigned wrong = 0;
    for (uint32_t row = 0; row < rows; row++)
        for (uint32_t i = 0; i < dim; i++)
            wrong |= channels[i] >> 23 & 255 ? 0 : am_exponent(values[row * dim + i]);
    return !wrong;
}

/* ---- by level ---- */

#define LEVEL(TARGET, NAME)                                                                                           \
    TARGET static int analyse_##NAME(const uint16_t *values, size_t rows, size_t dim, uint8_t *codes,                 \
                                     uint8_t *channels, uint8_t *top, uint8_t **escapes, const uint8_t *front)        \
    {                                                                                                                 \
        return analyse(values, rows, dim, codes, channels, top, escapes, front);                                      \
    }                                                                                                                 \
    TARGET static void put_##NAME(const uint16_t *values, size_t count, uint8_t *out)                                 \
    {                                                                                                                 \
        mantissas_put(values, count, out);                                                                            \
    }                                                                                                                 \
    TARGET static int take_##NAME(const uint8_t *in, size_t count, uint16_t *values)                                  \
    {                                                                                                                 \
        return mantissas_take(in, count, values);                                                                     \
    }

LEVEL(, scalar)
#if defined(__x86_64__)
LEVEL(AM_TARGET_AVX2, avx2)
LEVEL(AM_TARGET_AVX512, avx512)
#endif

typedef struct {
    int (*analyse)(const uint16_t *, size_t, size_t, uint8_t *, uint8_t *, uint8_t *, uint8_t **, const uint8_t *);
    void (*put)(const uint16_t *, size_t, uint8_t *);
    int (*take)(const uint8_t *, size_t, uint16_t *);
    am_dense_read_kernel *read;
    am_dense_write_kernel *write;
} kernels;

static const kernels table[AM_LEVELS] = {
    [AM_SCALAR] = {analyse_scalar, put_scalar, take_scalar, read_none, write_none},
    [AM_SSE42] = {analyse_scalar, put_scalar, take_scalar, read_none, write_none},
#if defined(__x86_64__)
    [AM_AVX2] = {analyse_avx2, put_avx2, take_avx2, am_dense_read_avx2, write_none},
    [AM_AVX512] = {analyse_avx512, put_avx512, take_avx512, am_dense_read_avx512, am_dense_write_avx512},
#endif
    [AM_NEON] = {analyse_scalar, put_scalar, take_scalar, read_none, write_none},
};

/* ---- the contract ---- */

uint64_t am_dense_size(uint64_t keys, uint64_t values)
{
    return 2 * (keys + values) - 1;
}

/* The most that an encoding takes: it gains at least 64 bytes, which is also what the coders may look ahead. */
static size_t most_bytes(size_t keys, size_t values)
{
    return am_dense_size(keys, values) < 64 ? 0 : am_dense_size(keys, values) - 64;
}

/* Bytes before the words. */
static size_t fixed_bytes(uint32_t rows, const uint32_t dims[2])
{
    return mantissa_bytes((size_t)rows * dims[0]) + mantissa_bytes((size_t)rows * dims[1]) + 4 * AM_DENSE_LANES + 2 +
           dims[0] + dims[1];
}

/* As am_dense_encode, with room for the symbols of both parts. */
static size_t encode_parts(const kernels *use, const uint16_t *parts[2], uint32_t rows, const uint32_t dims[2],
                           uint8_t *codes[2], uint8_t *out)
{
    size_t counts[2] = {(size_t)rows * dims[0], (size_t)rows * dims[1]};
    size_t fixed = fixed_bytes(rows, dims), most = most_bytes(counts[0], counts[1]);
    uint8_t *front = out + fixed, *end = out + most + 64, *escapes = end;
    uint8_t *tops = front - dims[0] - dims[1] - 2, *states = tops - 4 * AM_DENSE_LANES;
    if (use->analyse(parts[0], rows, dims[0], codes[0], tops + 2, tops, &escapes, front) ||
        use->analyse(parts[1], rows, dims[1], codes[1], tops + 2 + dims[0], tops + 1, &escapes, front))
        return 0;
    am_dense_writer writer = {.words = escapes, .front = front};
    for (uint32_t lane = 0; lane < AM_DENSE_LANES; lane++)
        writer.states[lane] = AM_DENSE_LEAST;
    for (int part = 1; part >= 0; part--) {
        size_t steps = counts[part] / AM_DENSE_LANES, whole = steps * AM_DENSE_LANES;
        if (write_scalar(&writer, codes[part] + whole, counts[part] - whole))
            return 0;
        steps = use->write(&writer, codes[part], steps);
        if (write_scalar(&writer, codes[part], steps * AM_DENSE_LANES))
            return 0;
    }
    size_t size = fixed + (size_t)(end - writer.words);
    if (size > most)
        return 0;
    use->put(parts[0], counts[0], out);
    use->put(parts[1], counts[1], out + mantissa_bytes(counts[0]));
    memcpy(states, writer.states, 4 * AM_DENSE_LANES);
    memmove(front, writer.words, (size_t)(end - writer.words));
    return size;
}

size_t am_dense_encode(const uint16_t *parts[2], uint32_t rows, const uint32_t dims[2], uint8_t *out)
{
    pthread_once(&once, prepare);
    const kernels *use = &table[am_cpu_level()];
    size_t counts[2] = {(size_t)rows * dims[0], (size_t)rows * dims[1]};
    size_t fixed = fixed_bytes(rows, dims), most = most_bytes(counts[0], counts[1]);
    if (fixed > most)
        return 0;
    uint8_t *codes[2] = {malloc(counts[0] + counts[1])}; /* not on the stack: a thread's may be 128 KB */
    if (!codes[0])
        return 0;
    codes[1] = codes[0] + counts[0];
    size_t size = encode_parts(use, parts, rows, dims, codes, out);
    free(codes[0]);
    return size;
}

int am_dense_decode(const uint8_t *in, size_t size, uint32_t rows, const uint32_t dims[2], uint16_t *parts[2])
{
    pthread_once(&once, prepare);
    const kernels *use = &table[am_cpu_level()];
    size_t counts[2] = {(size_t)rows * dims[0], (size_t)rows * dims[1]};
    size_t fixed = fixed_bytes(rows, dims);
    if (size < fixed || size > most_bytes(counts[0], counts[1]))
        return -1;
    uint32_t channels[AM_CODEC_MAX_DIM + AM_DENSE_SLACK];
    const uint8_t *mantissas = in, *tops = in + fixed - dims[0] - dims[1] - 2, *bytes = tops + 2;
    am_dense_reader reader = {.words = in + fixed, .escapes = in + size, .channels = channels};
    memcpy(reader.states, tops - 4 * AM_DENSE_LANES, 4 * AM_DENSE_LANES);
    uint32_t wrong = 0;
    for (uint32_t lane = 0; lane < AM_DENSE_LANES; lane++)
        wrong |= reader.states[lane] < AM_DENSE_LEAST || reader.states[lane] >= AM_DENSE_LEAST << 16;
    if (wrong)
        return -1;
    for (int part = 0; part < 2; part++) {
        if (tops[part] < LOWEST_TOP || use->take(mantissas, counts[part], parts[part]))
            return -1;
        uint32_t null = open_channels(bytes, dims[part], tops[part], channels);
        reader.dim = dims[part];
        reader.at = 0;
        size_t done = use->read(&reader, parts[part], counts[part] / AM_DENSE_LANES);
        if (done == SIZE_MAX || read_scalar(&reader, parts[part] + done * AM_DENSE_LANES,
                                            counts[part] - done * AM_DENSE_LANES))
            return -1;
        if (null && !null_everywhere(parts[part], rows, dims[part], channels))
            return -1;
        mantissas += mantissa_bytes(counts[part]);
        bytes += dims[part];
    }
    for (uint32_t lane = 0; lane < AM_DENSE_LANES; lane++)
        wrong |= reader.states[lane] != AM_DENSE_LEAST;
    return wrong || reader.words != reader.escapes ? -1 : 0;
}

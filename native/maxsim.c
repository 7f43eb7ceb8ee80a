/* Token vectors in 2 bits a number, and scores of passages by them: see maxsim.h. Parsing, encoding, plain C. */
#include "maxsim.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

int am_tokens_parse(const uint8_t *data, uint64_t length, int64_t start, am_tokens *tokens)
{
    memset(tokens, 0, sizeof *tokens);
    if (start < 0 || length < AM_TOKENS_HEADER || (uint64_t)start > length - AM_TOKENS_HEADER)
        return AM_TOKENS_START;
    data += start;
    length -= (uint64_t)start;
    tokens->version = data[0] | (uint32_t)data[1] << 8;
    tokens->dimensions = data[2] | (uint32_t)data[3] << 8;
    tokens->count = data[4] | (uint32_t)data[5] << 8 | (uint32_t)data[6] << 16 | (uint32_t)data[7] << 24;
    if (tokens->version != AM_TOKENS_VERSION)
        return AM_TOKENS_OTHER;
    if (tokens->dimensions < 1 || tokens->dimensions > AM_TOKENS_DIMENSIONS || tokens->count > AM_TOKENS_COUNT)
        return AM_TOKENS_SHAPE;
    tokens->row = am_tokens_row(tokens->dimensions);
    tokens->size = AM_TOKENS_HEADER + (uint64_t)tokens->count * (2 + tokens->row);
    tokens->scales = data + AM_TOKENS_HEADER;
    tokens->codes = tokens->scales + 2 * (size_t)tokens->count;
    return tokens->size > length ? AM_TOKENS_SHORT : AM_TOKENS_OK;
}

/* ---- rotation: README.md says why and how ---- */

#define WIDEST AM_TOKENS_DIMENSIONS

/* Whether number `at` of a round of `width` numbers changes its sign. */
static inline int flips(uint32_t at)
{
    uint32_t bits = (at + 1) * 0x9E3779B1u;
    bits ^= bits >> 15;
    bits *= 0x85EBCA77u;
    bits ^= bits >> 13;
    return (int)(bits & 1);
}

/* Fills signs[2 * width] with 1 and -1. */
static void make_signs(uint32_t width, float *signs)
{
    for (uint32_t at = 0; at < 2 * width; at++)
        signs[at] = flips(at) ? -1.0f : 1.0f;
}

static inline void hadamard(float *block)
{
    for (uint32_t step = 1; step < 64; step *= 2)
        for (uint32_t at = 0; at < 64; at += 2 * step)
            for (uint32_t i = at; i < at + step; i++) {
                float first = block[i], second = block[i + step];
                block[i] = first + second;
                block[i + step] = first - second;
            }
}

static inline float cut(float number, float most)
{
    return number > most ? most : number < -most ? -most : number;
}

/* Turns `dimensions` finite numbers into `width` (a multiple of 64) in `out`, finite too. */
static void rotate(const float *in, uint32_t dimensions, uint32_t width, const float *signs, float *out)
{
    float turned[WIDEST];
    for (uint32_t at = 0; at < dimensions; at++)
        turned[at] = cut(in[at], 1e30f) * signs[at];
    for (uint32_t at = dimensions; at < width; at++)
        turned[at] = 0;
    for (uint32_t block = 0; block < width; block += 64)
        hadamard(turned + block);
    for (uint32_t block = 0, blocks = width / 64; block < blocks; block++)
        for (uint32_t i = 0; i < 64; i++)
            out[i * blocks + block] = turned[block * 64 + i];
    for (uint32_t at = 0; at < width; at++)
        out[at] *= signs[width + at];
    for (uint32_t block = 0; block < width; block += 64)
        hadamard(out + block);
    for (uint32_t at = 0; at < width; at++)
        out[at] *= 1.0f / 64;
}

/* ---- encoding: whole numbers after the rotation, so that every machine writes the same bytes ---- */

static uint16_t encode(const float *row, uint32_t dimensions, const float *signs, uint8_t *codes)
{
    uint32_t quarter = am_tokens_row(dimensions), width = 4 * quarter;
    float turned[WIDEST];
    int32_t whole[WIDEST];
    rotate(row, dimensions, width, signs, turned);
    int64_t power = 0, product = 0;
    for (uint32_t at = 0; at < width; at++) {
        whole[at] = (int32_t)rintf(cut(turned[at], 4) * 65536); /* so that nothing below leaves 64 bits */
        power += (int64_t)whole[at] * whole[at];
    }
    memset(codes, 0, quarter);
    for (uint32_t part = 0; part < 4; part++)
        for (uint32_t at = 0; at < quarter; at++) {
            int64_t number = whole[part * quarter + at];
            /* The step is 0.9956 times the root mean square (1015 / 1024 is its square). */
            int outer = number * number * 1024 * width > 1015 * power, below = number < 0;
            product += (below ? -number : number) * (outer ? 3 : 1);
            codes[at] |= (uint8_t)((below ? 1 - outer : 2 + outer) << 2 * part);
        }
    int64_t scale = (8 * power + product) / (product ? 2 * product : 1);
    return (uint16_t)(scale > 65535 ? 65535 : scale);
}

void am_tokens_encode(const float *rows, size_t count, uint32_t dimensions, uint16_t *scales, uint8_t *codes)
{
    float signs[2 * WIDEST];
    make_signs(4 * am_tokens_row(dimensions), signs);
    for (size_t token = 0; token < count; token++, rows += dimensions, codes += am_tokens_row(dimensions))
        scales[token] = encode(rows, dimensions, signs, codes);
}

/* ---- plain C: a tile is its query tokens, one behind the other. As 16 bits, in which every compiler finds the products
 * of pairs; four tokens share the widening of a query token. ---- */

static int32_t dot(const int16_t *codes, const int16_t *numbers, uint32_t width)
{
    int32_t sum = 0;
    for (uint32_t at = 0; at < width; at++)
        sum += codes[at] * numbers[at];
    return sum;
}

static void scalar(const am_tokens *passage, const am_tile *tile, float *best)
{
    enum { TOKENS = 4 };
    uint32_t row = passage->row, width = 4 * row;
    int16_t codes[TOKENS][WIDEST], numbers[WIDEST];
    for (uint32_t i = 0; i < tile->queries; i++)
        best[i] = -INFINITY;
    for (uint32_t token = 0; token < passage->count; token += TOKENS) {
        uint32_t left = passage->count - token, some = left < TOKENS ? left : TOKENS;
        for (uint32_t t = 0; t < some; t++) {
            const uint8_t *packed = passage->codes + (size_t)(token + t) * row;
            for (uint32_t part = 0; part < 4; part++)
                for (uint32_t at = 0; at < row; at++)
                    codes[t][part * row + at] = packed[at] >> 2 * part & 3;
        }
        for (uint32_t i = 0; i < tile->queries; i++) {
            for (uint32_t at = 0; at < width; at++)
                numbers[at] = tile->numbers[(size_t)i * width + at];
            for (uint32_t t = 0; t < some; t++) {
                float score = (float)(2 * dot(codes[t], numbers, width) + tile->first[i]) * am_tokens_scale(passage, token + t);
                best[i] = score > best[i] ? score : best[i];
            }
        }
    }
}

/* ---- levels ---- */

static am_maxsim_kernel *const kernels[AM_LEVELS] = {
    [AM_SCALAR] = scalar,
    [AM_SSE42] = scalar,
#if defined(__x86_64__)
    [AM_AVX2] = am_maxsim_avx2,
    [AM_AVX512] = am_maxsim_avx512,
#endif
#if defined(__aarch64__)
    [AM_NEON] = am_maxsim_neon,
#endif
};

/* How many of `left` query tokens the next tile takes at most. */
static uint32_t kind_of_tile(int level, uint32_t left)
{
    if (level == AM_AVX512) /* 12 as 8 and 4 are three quarters of the work of 16 */
        return left > 12 ? 16 : left > 4 ? 8 : 4;
    return level == AM_AVX2 ? 8 : AM_TILE;
}

/* Puts the numbers of query token `query` where the level's kernel reads them in a tile: with lanes for query tokens, each
 * four numbers stand as [4 channels of a quarter][quarter][query]. */
static void place(int level, const am_tile *tile, uint32_t row, uint32_t query, const int8_t *numbers)
{
    if (level != AM_AVX512 && level != AM_AVX2) {
        memcpy(tile->numbers + (size_t)query * 4 * row, numbers, 4 * (size_t)row);
        return;
    }
    int8_t *to = tile->numbers + 4 * query;
    for (uint32_t at = 0; at < row; at += 4)
        for (uint32_t quarter = 0; quarter < 4; quarter++, to += 4 * tile->kind)
            memcpy(to, numbers + quarter * row + at, 4);
}

/* A rotated query token as whole numbers up to 127; returns what one of them times a unit of the scales is. */
static float whole(const float *turned, uint32_t width, int8_t *to)
{
    float largest = 0;
    for (uint32_t at = 0; at < width; at++)
        largest = fabsf(turned[at]) > largest ? fabsf(turned[at]) : largest;
    float inverse = largest > 0 ? 127.0f / (largest > 1e-30f ? largest : 1e-30f) : 0;
    for (uint32_t at = 0; at < width; at++) {
        float number = rintf(turned[at] * inverse);
        to[at] = (int8_t)(number > 127 ? 127 : number < -127 ? -127 : number);
    }
    return largest * (float)(0x1p-18 / 127);
}

/* Asks for what is likely the next passage; any start is allowed. */
static void fetch(const uint8_t *data, uint64_t length, int64_t start)
{
    enum { BYTES = 4096 };
    if (start < 0 || (uint64_t)start >= length)
        return;
    uint64_t left = length - (uint64_t)start, some = left < BYTES ? left : BYTES;
    for (uint64_t at = 0; at < some; at += 64)
        __builtin_prefetch(data + start + at);
}

int am_maxsim(const float *query, uint32_t queries, uint32_t dimensions, const uint8_t *data, uint64_t length,
              const int64_t *starts, size_t count, float *out, size_t *failed)
{
    int level = am_cpu_level(); /* asked once: another thread may change it */
    uint32_t row = am_tokens_row(dimensions), width = 4 * row, made = 0;
    am_tile tiles[AM_MAXSIM_QUERIES / 4];
    float units[AM_MAXSIM_QUERIES], signs[2 * WIDEST], turned[WIDEST];
    int8_t numbers[WIDEST], *memory = calloc((size_t)width * (queries + AM_TILE) + 63, 1);
    *failed = 0;
    if (!memory)
        return AM_TOKENS_MEMORY;
    int8_t *next = (int8_t *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    make_signs(width, signs);
    for (uint32_t done = 0; done < queries; made++) {
        am_tile *tile = &tiles[made];
        memset(tile, 0, sizeof *tile);
        tile->kind = kind_of_tile(level, queries - done);
        tile->queries = queries - done < tile->kind ? queries - done : tile->kind;
        tile->numbers = next;
        next += (size_t)width * tile->kind;
        for (uint32_t i = 0; i < tile->queries; i++, done++) {
            rotate(query + (size_t)done * dimensions, dimensions, width, signs, turned);
            units[done] = whole(turned, width, numbers);
            for (uint32_t at = 0; at < width; at++)
                tile->first[i] -= 3 * numbers[at];
            place(level, tile, row, i, numbers);
        }
    }
    int result = AM_TOKENS_OK;
    for (size_t passage = 0; passage < count; passage++, out += queries) {
        am_tokens tokens;
        *failed = passage;
        result = am_tokens_parse(data, length, starts[passage], &tokens);
        if (!result && tokens.dimensions != dimensions)
            result = AM_TOKENS_QUERY;
        if (result)
            break;
        if (passage + 1 < count) /* somewhere else: fetched while this one is scored */
            fetch(data, length, starts[passage + 1]);
        float best[AM_TILE];
        for (uint32_t tile = 0, done = 0; tile < made; tile++) {
            if (tokens.count)
                kernels[level](&tokens, &tiles[tile], best);
            for (uint32_t i = 0; i < tiles[tile].queries; i++, done++)
                out[done] = tokens.count ? best[i] * units[done] + 0.0f : 0.0f; /* + 0: there is one zero */
        }
    }
    free(memory);
    return result;
}

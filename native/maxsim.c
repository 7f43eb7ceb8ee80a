/* Scores of passages by their compressed token vectors: see maxsim.h. Parsing, the query's whole numbers, plain C. */
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
    tokens->half = (tokens->dimensions + 63) / 64 * 32;
    tokens->size = AM_TOKENS_HEADER + (uint64_t)tokens->count * (2 + tokens->half);
    tokens->scales = data + AM_TOKENS_HEADER;
    tokens->codes = tokens->scales + 2 * (size_t)tokens->count;
    return tokens->size > length ? AM_TOKENS_SHORT : AM_TOKENS_OK;
}

/* ---- plain C: a tile is its query tokens, one behind the other ---- */

static void scalar(const am_tokens *passage, const am_tile *tile, float *best)
{
    uint32_t half = passage->half;
    for (uint32_t i = 0; i < tile->queries; i++)
        best[i] = -INFINITY;
    for (uint32_t token = 0; token < passage->count; token++) {
        const uint8_t *codes = passage->codes + (size_t)token * half;
        float scale = am_tokens_scale(passage, token);
        for (uint32_t i = 0; i < tile->queries; i++) {
            const int8_t *low = tile->numbers + (size_t)i * 2 * half, *high = low + half;
            int32_t sum = tile->first[i];
            for (uint32_t at = 0; at < half; at++)
                sum += (codes[at] & 15) * low[at] + (codes[at] >> 4) * high[at];
            float score = (float)sum * scale;
            best[i] = score > best[i] ? score : best[i];
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

/* Where the number of a query token for a channel stands in a tile. */
static size_t place(int level, uint32_t kind, uint32_t half, uint32_t query, uint32_t channel)
{
    uint32_t high = channel >= half, quad = channel % half / 4, rest = channel % 4;
    if (level == AM_AVX512 && kind == 4) /* [8 channels][half][query][4 of them, other 4] */
        return (size_t)quad / 2 * 64 + high * 32 + query * 8 + quad % 2 * 4 + rest;
    if (level == AM_AVX512 && kind == 8) /* [4 channels][half][query] */
        return (size_t)quad * 64 + high * 32 + query * 4 + rest;
    if (level == AM_AVX512 || level == AM_AVX2) /* [4 channels][half][query], of 16 or 8 queries */
        return ((size_t)quad * 2 + high) * 4 * kind + query * 4 + rest;
    return (size_t)query * 2 * half + channel;
}

/* A query token as whole numbers up to 127; returns what one of them times a unit of the scales is. */
static float whole(const float *query, uint32_t dimensions, int8_t *to)
{
    float largest = 0;
    for (uint32_t at = 0; at < dimensions; at++)
        largest = fabsf(query[at]) > largest ? fabsf(query[at]) : largest;
    float inverse = largest > 0 ? 127.0f / (largest > 1e-30f ? largest : 1e-30f) : 0;
    for (uint32_t at = 0; at < dimensions; at++) {
        float number = rintf(query[at] * inverse);
        to[at] = (int8_t)(number > 127 ? 127 : number < -127 ? -127 : number);
    }
    return largest * (float)(0x1p-18 / 127);
}

int am_maxsim(const float *query, uint32_t queries, uint32_t dimensions, const uint8_t *data, uint64_t length,
              const int64_t *starts, size_t count, float *out, size_t *failed)
{
    int level = am_cpu_level(); /* asked once: another thread may change it */
    uint32_t half = (dimensions + 63) / 64 * 32;
    am_tile tiles[AM_MAXSIM_QUERIES / 4];
    float units[AM_MAXSIM_QUERIES];
    int8_t numbers[AM_TOKENS_DIMENSIONS];
    size_t room = 2 * (size_t)half * (queries + AM_TILE) + 63;
    int8_t *memory = calloc(room, 1);
    *failed = 0;
    if (!memory)
        return AM_TOKENS_MEMORY;
    int8_t *next = (int8_t *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    uint32_t made = 0;
    for (uint32_t done = 0; done < queries; made++) {
        am_tile *tile = &tiles[made];
        memset(tile, 0, sizeof *tile);
        tile->kind = kind_of_tile(level, queries - done);
        tile->queries = queries - done < tile->kind ? queries - done : tile->kind;
        tile->numbers = next;
        next += 2 * (size_t)half * tile->kind;
        for (uint32_t i = 0; i < tile->queries; i++, done++) {
            units[done] = whole(query + (size_t)done * dimensions, dimensions, numbers);
            for (uint32_t at = 0; at < dimensions; at++) {
                tile->numbers[place(level, tile->kind, half, i, at)] = numbers[at];
                tile->first[i] -= 8 * numbers[at];
            }
        }
    }
    int result = AM_TOKENS_OK;
    for (size_t passage = 0; passage < count && !result; passage++, out += queries) {
        am_tokens tokens;
        *failed = passage;
        result = am_tokens_parse(data, length, starts[passage], &tokens);
        if (!result && tokens.dimensions != dimensions)
            result = AM_TOKENS_QUERY;
        if (result)
            break;
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

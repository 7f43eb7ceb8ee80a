/* Fuzz target for token vectors: any bytes are refused or scored, any floats encoded; every instruction set agrees. The first
 * six bytes choose level, query tokens, dimensions and start. scripts/fuzz runs it.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "maxsim.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void *room(uint64_t size)
{
    void *memory = malloc(size ? size : 1); /* of exactly this size: one byte past it is an error */
    if (!memory)
        abort();
    return memory;
}

static int score(int level, const float *query, uint32_t queries, uint32_t dimensions, const uint8_t *bytes, uint64_t length,
                 const int64_t *starts, size_t count, float *out)
{
    for (; level > 0 && !am_cpu_usable(level); level--)
        ;
    am_cpu_force(am_cpu_name(level));
    size_t failed;
    return am_maxsim(query, queries, dimensions, bytes, length, starts, count, out, &failed);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 6)
        return 0;
    int level = data[0] % AM_LEVELS;
    uint32_t queries = 1 + data[1] % 40, dimensions = 1 + (data[2] | data[3] << 8) % 400;
    int64_t starts[2] = {0, (int64_t)(int8_t)data[4]};
    size_t count = 1 + (data[5] & 1), length = size - 6;
    uint8_t *bytes = room(length);
    memcpy(bytes, data + 6, length);
    float *query = room(4ull * queries * dimensions);
    for (uint32_t i = 0; i < queries * dimensions; i++) { /* the input over and over; only finite floats are allowed */
        uint8_t word[4];
        for (int k = 0; k < 4; k++)
            word[k] = length ? bytes[(4ull * i + (uint32_t)k) % length] : 0;
        memcpy(query + i, word, 4);
        query[i] = isfinite(query[i]) ? query[i] : 1;
    }
    if (data[5] & 2 && length >= AM_TOKENS_HEADER) { /* a header that fits, so that what lies behind it is reached */
        uint32_t tokens = (uint32_t)((length - AM_TOKENS_HEADER) / (2 + am_tokens_row(dimensions)));
        uint8_t header[AM_TOKENS_HEADER] = {AM_TOKENS_VERSION, 0, (uint8_t)dimensions, (uint8_t)(dimensions >> 8),
                                            (uint8_t)tokens,   (uint8_t)(tokens >> 8), 0, 0};
        memcpy(bytes, header, sizeof header);
    }
    float *out = room(4ull * count * queries), *scalar = room(4ull * count * queries);
    int result = score(level, query, queries, dimensions, bytes, length, starts, count, out);
    if (score(AM_SCALAR, query, queries, dimensions, bytes, length, starts, count, scalar) != result ||
        (!result && memcmp(out, scalar, 4 * count * queries)))
        abort();

    /* What is encoded is parsed and scored; a token is at least as near to itself as codes of 2 bits can say. */
    uint32_t row = am_tokens_row(dimensions);
    uint8_t *encoded = room(AM_TOKENS_HEADER + (uint64_t)queries * (2 + row));
    uint16_t *scales = room(2ull * queries);
    uint8_t header[AM_TOKENS_HEADER] = {AM_TOKENS_VERSION, 0, (uint8_t)dimensions, (uint8_t)(dimensions >> 8), (uint8_t)queries};
    memcpy(encoded, header, sizeof header);
    am_tokens_encode(query, queries, dimensions, scales, encoded + AM_TOKENS_HEADER + 2ull * queries);
    memcpy(encoded + AM_TOKENS_HEADER, scales, 2ull * queries);
    int64_t start = 0;
    float *again = room(4ull * queries);
    if (score(level, query, queries, dimensions, encoded, AM_TOKENS_HEADER + (uint64_t)queries * (2 + row), &start, 1, again))
        abort();
    for (uint32_t i = 0; i < queries; i++)
        if (!isfinite(again[i]))
            abort();
    free(bytes);
    free(query);
    free(out);
    free(scalar);
    free(encoded);
    free(scales);
    free(again);
    return 0;
}

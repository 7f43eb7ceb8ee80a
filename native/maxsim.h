/* Late interaction over compressed token vectors, where they lie: for each query token the best product with a token of
 * each passage. README.md draws the bytes. agentmem/_pure/late.py is the same in numpy, bit for bit.
 */
#ifndef AM_MAXSIM_H
#define AM_MAXSIM_H

#include <stddef.h>
#include <stdint.h>

#define AM_TOKENS_HEADER 8u
#define AM_TOKENS_VERSION 1u
#define AM_TOKENS_DIMENSIONS 4096u /* at most */
#define AM_TOKENS_COUNT 65536u
#define AM_MAXSIM_QUERIES 256u
#define AM_TOKENS_UNIT 0x1p-18f    /* a scale is a whole number of these: no bytes are a NaN */

/* A passage that was looked at: all of it lies within its buffer. */
typedef struct {
    uint32_t version, dimensions, count; /* version: two bytes, the upper one 0 */
    uint32_t row;                        /* bytes of a token's codes */
    uint64_t size;                       /* of all */
    const uint8_t *scales, *codes;
} am_tokens;

/* What can be wrong, in the order it is looked for. */
enum { AM_TOKENS_OK, AM_TOKENS_START, AM_TOKENS_OTHER, AM_TOKENS_SHAPE, AM_TOKENS_SHORT, AM_TOKENS_QUERY, AM_TOKENS_MEMORY };

int am_tokens_parse(const uint8_t *data, uint64_t length, int64_t start, am_tokens *tokens);

/* Bytes of the codes of a token of so many dimensions: four numbers in each. */
static inline uint32_t am_tokens_row(uint32_t dimensions)
{
    return (dimensions + 63) / 64 * 16;
}

/* Of `count` token vectors of finite floats, one behind the other, the scales and the codes. */
void am_tokens_encode(const float *rows, size_t count, uint32_t dimensions, uint16_t *scales, uint8_t *codes);

/* Into out [count][queries] the scores of `queries` tokens (1 to 256) of `dimensions` finite floats (1 to 4096), for the
 * passages that begin at `starts` in `data`. On failure `out` may hold anything and *failed says which passage. */
int am_maxsim(const float *query, uint32_t queries, uint32_t dimensions, const uint8_t *data, uint64_t length,
              const int64_t *starts, size_t count, float *out, size_t *failed);

/* ---- between the files of the kernel ---- */

#define AM_TILE 16u /* query tokens at most that are multiplied with a token at once */

/* Some query tokens in the order that a level's kernel reads them. */
typedef struct {
    uint32_t kind, queries; /* kind: the most tokens it could hold, maxsim.c chooses it */
    int32_t first[AM_TILE]; /* -3 times the sum of its numbers: code c stands for 2 c - 3 */
    int8_t *numbers;        /* 4 * row * kind bytes */
} am_tile;

/* best[i]: largest of dot(query i, token) * scale over the passage's tokens (at least one), for whole numbers. */
typedef void am_maxsim_kernel(const am_tokens *passage, const am_tile *tile, float *best);

am_maxsim_kernel am_maxsim_avx2, am_maxsim_avx512, am_maxsim_neon;

static inline float am_tokens_scale(const am_tokens *passage, uint32_t token)
{
    return (float)(passage->scales[2 * token] | passage->scales[2 * token + 1] << 8);
}

#endif

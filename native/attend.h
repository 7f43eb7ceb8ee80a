/* Attention of queries over KV states that lie in blocks of pages, where they lie, and over a tail of plain values.
 *
 * Compiles without Python. A prefix knows where blocks are and holds none of them: their bytes belong to the caller and
 * must stay. README.md ("Attention in place") says what is computed; the result is a function of the inputs alone, not of
 * the instruction set nor of the number of threads.
 */
#ifndef AM_ATTEND_H
#define AM_ATTEND_H

#include "page.h"

#define AM_ATTEND_DIM 256u /* a head of more dimensions is not attended to in place: sums would leave 32 bits */

/* A block of one head: its bytes and its codec (raw, int8, k8v4 or int4). */
typedef struct {
    const uint8_t *data;
    uint32_t codec;
} am_place;

/* What a block is in all layers: the rows that it was encoded with, of which the first `used` count, from position `first`
 * on, in `segment`. */
typedef struct {
    uint64_t first;
    uint32_t rows, used, segment;
} am_piece;

/* A segment's queries are turned by these angles first: rotate-half rotary embedding over 2 * pairs channels. */
typedef struct {
    float *cosine, *sine;
    uint32_t pairs, pieces; /* pieces: how many lie before it */
    uint64_t tokens, bytes; /* before it */
} am_segment;

typedef struct {
    uint32_t dtype, layers, segments, pieces, room;
    am_layer *shapes;
    am_segment *segment;
    am_piece *piece;
    am_place **places; /* of a layer: [piece * kv_heads + head] */
    uint64_t tokens, bytes;
} am_prefix;

/* Shapes with heads up to AM_MAX_HEADS and dimensions up to AM_ATTEND_DIM; AM_OK, AM_DTYPE, AM_LAYERS, AM_SHAPE or
 * AM_MEMORY. After any result am_prefix_destroy is right. */
int am_prefix_init(am_prefix *prefix, uint32_t dtype, uint32_t layers, const am_layer *shapes);
void am_prefix_destroy(am_prefix *prefix);

enum { AM_PREFIX_SHAPES = AM_RULES, AM_PREFIX_RANGE, AM_PREFIX_CODEC }; /* more results: see module_attend.c */

/* Appends tokens first .. first + count (count < 0: to the end) of a page, or of what am_page_encode wrote. On failure
 * nothing is changed. Beside the rules of page.h: other shapes, no such tokens, a codec that can't be attended to.
 * Checksums are not looked at. */
int am_prefix_append_page(am_prefix *prefix, const void *data, uint64_t length, int64_t first, int64_t count);
int am_prefix_append_encoded(am_prefix *prefix, uint32_t grid, const am_extent *table, uint64_t entries,
                             const uint8_t *body, uint64_t length, int64_t first, int64_t count);
int am_prefix_begin_segment(am_prefix *prefix, uint32_t pairs, const float *cosine, const float *sine);
int am_prefix_truncate(am_prefix *prefix, uint32_t segments);

/* One call: `queries` new tokens of `heads` query heads. Strides in bytes. The tail holds `tail` tokens, the new ones at
 * its end. `out` is [queries, heads, value_dim] without gaps. window 0: none. */
typedef struct {
    const am_prefix *prefix;
    uint32_t layer, heads, queries;
    const uint8_t *query, *tail_keys, *tail_values;
    const uint8_t *seen; /* u32 x queries: of the segments each query sees the first so many; NULL: all */
    ptrdiff_t query_head, query_token, tail_key_head, tail_value_head;
    uint64_t tail, window;
    uint8_t *out;
    float scale;
} am_attend;

/* With up to `threads` threads. 0, or -1 where there is no memory. */
int am_attend_run(const am_attend *call, uint32_t threads);

/* ---- Between attend.c and the kernels (attend_kernel.h) */

/* Some rows (query heads of one KV head, token by token) over some blocks: those of the prefix, then those of the tail. */
typedef struct {
    const am_attend *call;
    uint32_t head, row, rows, block, blocks;
    float *partial; /* of each row AM_PARTIAL(value_dim) floats: unnormalised output, 16 for sums, largest score, free */
    float *scratch; /* AM_SCRATCH(key_dim, value_dim) floats */
} am_span;

#define AM_GROUP 64u /* rows of a span at most */
#define AM_WIDE(dim) (((dim) + 31u) / 32u * 32u)
#define AM_PARTIAL(value_dim) (AM_WIDE(value_dim) + 32u)
#define AM_SUMS(value_dim) AM_WIDE(value_dim)
#define AM_LARGEST(value_dim) (AM_WIDE(value_dim) + 16u)
#define AM_SCRATCH(key_dim, value_dim)                                                                                 \
    ((AM_GROUP + AM_BLOCK + 4u) * AM_WIDE(key_dim) + (AM_BLOCK + 8u) * AM_WIDE(value_dim) + 16u * AM_BLOCK)
#define AM_LOWEST (-0x1.fffffep127f) /* a score that nothing is below */

typedef void am_span_kernel(const am_span *span);
am_span_kernel am_span_scalar;
#if defined(__x86_64__)
am_span_kernel am_span_avx2, am_span_avx512;
#elif defined(__aarch64__)
am_span_kernel am_span_neon;
#endif

#endif

/* Attention of a span of rows over blocks: the float parts, one text for all instruction sets, in vectors of 16 lanes.
 *
 * A file that includes this defines the rest (attend_scalar.c says what). Sums have one order: within a lane as the loop
 * runs, across lanes as lanes_sum folds them. No fused multiply-add.
 */
#include "quantized.h"

#define TINY 0x1p-100f /* below it a magnitude counts as none, so that no step of the way is subnormal */
#define KEY_CODES 32639.0f   /* largest code of a query: high byte 127, low byte -128 to 127 */
#define VALUE_CODES 32767.0f /* of a weight: high byte 0 to 127, low byte 0 to 255 */
#define MAGIC 0x1.8p23f      /* added to a small number, it leaves the nearest integer in the low bits */

/* 2 to the power of each, for numbers up to 0; 0 below -126.5. A NaN stays one. Relative error 2e-7. */
INLINE v16 power(v16 x)
{
    x = maximum(all(-127.0f), x);
    v16 rounded = add(x, all(MAGIC)), part = subtract(x, subtract(rounded, all(MAGIC)));
    v16 sum = all(0x1.5bba14p-10f);
    sum = add(multiply(sum, part), all(0x1.3cea88p-7f));
    sum = add(multiply(sum, part), all(0x1.c6b752p-5f));
    sum = add(multiply(sum, part), all(0x1.ebf9bcp-3f));
    sum = add(multiply(sum, part), all(0x1.62e42ap-1f));
    sum = add(multiply(sum, part), all(1.0f));
    return scale_by_power(sum, rounded);
}

/* ---- Values as floats */

INLINE float value_at(uint32_t dtype, const uint8_t *at)
{
    if (dtype == AM_F32)
        return float_of(*(const word_bits *)at);
    uint32_t half = *(const half_bits *)at;
    if (dtype == AM_BF16)
        return float_of(half << 16);
    if ((half & 0x7C00u) == 0x7C00u) /* an infinity or no number: codecs have none, raw blocks may */
        return float_of((half & 0x8000u) << 16 | 0x7F800000u | (half & 0x3FFu) << 13);
    return from_f16((uint16_t)half);
}

INLINE void floats_from(uint32_t dtype, const uint8_t *from, uint32_t count, uint32_t wide, float *to)
{
    size_t item = dtype == AM_F32 ? 4 : 2;
    uint32_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(to + i, sixteen(dtype, from + i * item));
    for (; i < count; i++)
        to[i] = value_at(dtype, from + i * item);
    for (; i < wide; i++)
        to[i] = 0.0f;
}

/* ---- A span */

/* What is at hand while a span is done. */
typedef struct {
    const am_span *span;
    const am_attend *call;
    uint32_t group, key_dim, value_dim, key_wide, value_wide, stride; /* group: query heads of a KV head */
    float *queries;                   /* [AM_GROUP][key_wide]: scaled, turned for the segment */
    float *key_panel, *value_panel;   /* K [key_dim][64], V [64][value_wide] of a raw block */
    float *key_scale, *key_minimum;   /* of a coded block: [2][key_wide] each */
    float *value_scale, *value_minimum; /* [4][64] each */
} state;

/* Up to four rows of a block. */
typedef struct {
    uint32_t rows, row; /* row: of the span */
    uint32_t low[4], high[4]; /* tokens of the block that each sees */
    v16 scores[4][4];
    float decay[4];
} four_rows;

typedef struct {
    uint64_t first;
    uint32_t rows, used, segment; /* of the tail: 0, which every query sees */
    const uint8_t *keys, *values;
    uint32_t codec;
    ptrdiff_t ahead; /* from this block to the one that is needed next, or 0 */
} block_view;

INLINE float *row_partial(const state *s, uint32_t row)
{
    return s->span->partial + (size_t)row * s->stride;
}

/* The span's queries as floats: times scale and log2 e, then turned. */
INLINE void turn_queries(const state *s, const am_segment *segment)
{
    const am_attend *call = s->call;
    float factor = call->scale * 0x1.715476p+0f;
    uint32_t pairs = segment ? segment->pairs : 0;
    for (uint32_t r = 0; r < s->span->rows; r++) {
        uint32_t row = s->span->row + r;
        const uint8_t *from = call->query + (ptrdiff_t)(s->span->head * s->group + row % s->group) * call->query_head +
                              (ptrdiff_t)(row / s->group) * call->query_token;
        float *to = s->queries + (size_t)r * s->key_wide;
        floats_from(call->prefix->dtype, from, s->key_dim, s->key_wide, to);
        for (uint32_t c = 0; c < s->key_wide; c += LANES)
            store(to + c, multiply(load(to + c), all(factor)));
        for (uint32_t i = 0; i < pairs; i++) {
            float a = to[i], b = to[i + pairs];
            to[i] = a * segment->cosine[i] + b * segment->sine[i];
            to[i + pairs] = b * segment->cosine[i] - a * segment->sine[i];
        }
    }
}

/* Whether few enough rows read a raw block's values that a panel of floats does not pay. */
INLINE uint32_t values_direct(const state *s)
{
    return s->span->rows <= 4 && s->value_dim % 32 == 0;
}

/* Which tokens of the block a row of the span sees. */
INLINE void visible(const state *s, const block_view *block, uint32_t row, uint32_t *low, uint32_t *high)
{
    const am_attend *call = s->call;
    uint64_t own = call->prefix->tokens + call->tail - call->queries + (s->span->row + row) / s->group;
    *low = 0;
    *high = block->used;
    if (call->seen && ((const word_bits *)call->seen)[(s->span->row + row) / s->group] <= block->segment)
        *high = 0;
    if (own + 1 < block->first + block->used)
        *high = own < block->first ? 0 : (uint32_t)(own + 1 - block->first);
    if (call->window && own + 1 > call->window && own + 1 - call->window > block->first) {
        uint64_t behind = own + 1 - call->window - block->first;
        *low = behind < block->used ? (uint32_t)behind : block->used;
    }
}

/* From scores to weights, with the running maximum: [64] weights, 0 for what a row doesn't see. */
INLINE void weigh(const state *s, const block_view *block, four_rows *four, uint32_t r)
{
    float *partial = row_partial(s, four->row + r);
    float *largest = partial + AM_LARGEST(s->value_dim), *sums = partial + AM_SUMS(s->value_dim);
    int32_t low = (int32_t)four->low[r], high = (int32_t)four->high[r];
    uint32_t tiles = parts(block->used, LANES), masked = low > 0 || (uint32_t)high < tiles * LANES;
    v16 scores[4] = {all(AM_LOWEST), all(AM_LOWEST), all(AM_LOWEST), all(AM_LOWEST)};
    for (uint32_t t = 0; t < tiles; t++) {
        scores[t] = four->scores[r][t];
        if (masked)
            scores[t] = between(low - (int32_t)(t * LANES), high - (int32_t)(t * LANES), scores[t], all(AM_LOWEST));
    }
    v16 most = maximum(maximum(scores[0], scores[1]), maximum(scores[2], scores[3]));
    float before = *largest, now = lanes_max(maximum(most, all(before)));
    v16 decay = power(all(before - now));
    v16 sum = multiply(load(sums), decay);
    for (uint32_t t = 0; t < 4; t++) {
        v16 weight = power(subtract(scores[t], all(now)));
        if (masked)
            weight = between(low - (int32_t)(t * LANES), high - (int32_t)(t * LANES), weight, all(0.0f));
        four->scores[r][t] = weight;
        sum = add(sum, weight);
    }
    store(sums, sum);
    *largest = now;
    four->decay[r] = first_lane(decay);
}

/* ---- Coded blocks */

/* Codes of each row's query, the step of a code, and the product with the minima. */
INLINE void code_queries(const state *s, const four_rows *four, const float *scale, const float *minimum,
                         uint32_t codes[4][2][64], float *step, float *bias)
{
    for (uint32_t r = 0; r < four->rows; r++) {
        const float *query = s->queries + (size_t)(four->row + r) * s->key_wide;
        v16 most = all(0.0f), sum = all(0.0f);
        for (uint32_t c = 0; c < s->key_wide; c += LANES) {
            v16 value = load(query + c);
            most = maximum(magnitude(multiply(value, load(scale + c))), most);
            sum = add(sum, multiply(value, load(minimum + c)));
        }
        float largest = lanes_max(most), inverse = largest >= TINY ? KEY_CODES / largest : 0.0f;
        step[r] = largest >= TINY ? largest / KEY_CODES : 0.0f;
        bias[r] = lanes_sum(sum);
        for (uint32_t c = 0; c < s->key_wide; c += LANES) {
            v16 scaled = multiply(load(query + c), load(scale + c));
            store_codes(codes[r], c, add(multiply(scaled, all(inverse)), all(MAGIC)), 1);
        }
    }
}

INLINE void coded_scores(const state *s, const block_view *block, am_quantized at, four_rows *four, uint32_t rows)
{
    uint32_t codes[4][2][64] __attribute__((aligned(64)));
    int32_t sums[4][32] __attribute__((aligned(64)));
    float step[4], bias[4];
    uint32_t quads = at.key_dims / 4, last = at.key_tiles - 1;
    for (uint32_t pair = 0; pair * 32 < block->used; pair++) {
        const uint8_t *tile = block->keys + (size_t)at.key_dims * 16 * pair * (at.key4 ? 1 : 2);
        if (pair == 0 || at.key4)
            code_queries(s, four, s->key_scale + pair * s->key_wide, s->key_minimum + pair * s->key_wide, codes, step,
                         bias);
        dot_pair(rows, at.key4, 1, tile, at.key4 || pair * 2 == last ? tile : tile + (size_t)at.key_dims * 16, quads,
                 codes, sums, block->ahead);
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t half = 0; half < 2; half++)
                four->scores[r][2 * pair + half] =
                    add(multiply(from_integers(&sums[r][half * 16]), all(step[r])), all(bias[r]));
    }
}

INLINE void coded_values(const state *s, const block_view *block, am_quantized at, four_rows *four, uint32_t rows)
{
    uint32_t codes[4][2][64] __attribute__((aligned(64)));
    int32_t sums[4][32] __attribute__((aligned(64)));
    float step[4] = {0}, offset[4] = {0};
    uint32_t tiles = parts(block->used, 4), wide = parts(block->used, LANES);
    uint32_t strips = at.value_dims / (at.value4 ? 32 : 16);
    for (uint32_t c = 0; c < s->value_dim; c += 32) {
        if (c == 0 || (at.value4 && c % PANEL == 0))
            for (uint32_t r = 0; r < rows; r++) {
                const float *scale = s->value_scale + c, *minimum = s->value_minimum + c; /* 64 of each per 64 channels */
                v16 most = all(0.0f), sum = all(0.0f);
                for (uint32_t t = 0; t < wide; t++) {
                    most = maximum(multiply(four->scores[r][t], load(scale + t * LANES)), most);
                    if (at.value4)
                        sum = add(sum, multiply(four->scores[r][t], load(minimum + t * LANES)));
                }
                float largest = lanes_max(most), inverse = largest >= TINY ? VALUE_CODES / largest : 0.0f;
                step[r] = largest >= TINY ? largest / VALUE_CODES : 0.0f;
                offset[r] = at.value4 ? lanes_sum(sum) : 0.0f;
                for (uint32_t t = 0; t < wide; t++) {
                    v16 scaled = multiply(four->scores[r][t], load(scale + t * LANES));
                    store_codes(codes[r], t * LANES, add(multiply(scaled, all(inverse)), all(MAGIC)), 0);
                }
            }
        uint32_t strip = c / (at.value4 ? 32 : 16);
        const uint8_t *words = block->values + (size_t)strip * at.value_tiles * 64;
        dot_pair(rows, at.value4, 0, words, at.value4 || strip + 1 == strips ? words : words + (size_t)at.value_tiles * 64,
                 tiles, codes, sums, block->ahead);
        for (uint32_t r = 0; r < rows; r++) {
            float *to = row_partial(s, four->row + r) + c;
            for (uint32_t half = 0; half < 2; half++) {
                v16 part = multiply(from_integers(&sums[r][half * 16]), all(step[r]));
                if (at.value4)
                    part = add(part, all(offset[r]));
                store(to + half * 16, add(multiply(load(to + half * 16), all(four->decay[r])), part));
            }
        }
    }
}

INLINE void load_scales(const state *s, const block_view *block, am_quantized at)
{
    for (uint32_t g = 0; g < at.key_groups; g++) {
        size_t group = (size_t)g * s->key_dim * 2;
        floats_from(AM_F16, block->keys + at.key_scales + group, s->key_dim, s->key_wide, s->key_scale + g * s->key_wide);
        floats_from(AM_F16, block->keys + at.key_minima + group, s->key_dim, s->key_wide, s->key_minimum + g * s->key_wide);
    }
    for (uint32_t g = 0; g < at.value_groups; g++) {
        size_t group = (size_t)g * block->rows * 2;
        floats_from(AM_F16, block->keys + at.value_scales + group, block->rows, AM_BLOCK, s->value_scale + g * AM_BLOCK);
        if (at.value4)
            floats_from(AM_F16, block->keys + at.value_minima + group, block->rows, AM_BLOCK, s->value_minimum + g * AM_BLOCK);
    }
}

/* ---- Raw blocks */

/* Channels `first` on of 16 tokens, from rows to columns: 32 channels of 16 bits or 16 of 32. Behind the last token the last
 * one is read again: what comes of it is not used. */
INLINE void key_columns(const state *s, const block_view *block, uint32_t token, uint32_t first)
{
    uint32_t dtype = s->call->prefix->dtype;
    size_t item = dtype == AM_F32 ? 4 : 2, stride = s->key_dim * item;
    const uint8_t *from = block->keys + (token * (size_t)s->key_dim + first) * item;
    v16 words[16];
    if (token + LANES <= block->used)
        for (uint32_t t = 0; t < LANES; t++)
            words[t] = load(from + t * stride);
    else
        for (uint32_t t = 0; t < LANES; t++)
            words[t] = load(from + (token + t < block->used ? t : block->used - 1 - token) * stride);
    if (block->ahead)
        for (uint32_t t = 0; t < LANES; t++)
            __builtin_prefetch(from + t * stride + block->ahead);
    transpose(words);
    float *to = s->key_panel + (size_t)first * AM_BLOCK + token;
    if (dtype == AM_F32)
        for (uint32_t c = 0; c < LANES; c++)
            store(to + c * AM_BLOCK, words[c]);
    else
        for (uint32_t c = 0; c < LANES; c++) {
            store(to + 2 * c * AM_BLOCK, low_halves(dtype, words[c]));
            store(to + (2 * c + 1) * AM_BLOCK, high_halves(dtype, words[c]));
        }
}

INLINE void load_keys(const state *s, const block_view *block)
{
    uint32_t dtype = s->call->prefix->dtype, step = dtype == AM_F32 ? 16 : 32;
    size_t item = dtype == AM_F32 ? 4 : 2;
    for (uint32_t t = 0; t < block->used; t += LANES) {
        if (s->key_dim >= step)
            for (uint32_t c = 0; c < s->key_dim; c += step) /* the last columns may overlap those before */
                key_columns(s, block, t, c + step <= s->key_dim ? c : s->key_dim - step);
        else
            for (uint32_t c = 0; c < s->key_dim; c++)
                for (uint32_t i = 0; i < LANES; i++)
                    s->key_panel[c * AM_BLOCK + t + i] =
                        t + i < block->used ? value_at(dtype, block->keys + ((size_t)(t + i) * s->key_dim + c) * item) : 0.0f;
    }
}

INLINE void raw_scores(const state *s, const block_view *block, four_rows *four, uint32_t rows)
{
    const float *query = s->queries + (size_t)four->row * s->key_wide;
    for (uint32_t t = 0; t < block->used; t += 2 * LANES) { /* of the panel, what lies behind the last tile is not used */
        v16 first[4], second[4];
        for (uint32_t r = 0; r < rows; r++)
            first[r] = second[r] = all(0.0f);
        for (uint32_t c = 0; c < s->key_dim; c++) {
            const float *panel = s->key_panel + c * AM_BLOCK + t;
            v16 a = load(panel), b = load(panel + LANES);
#pragma GCC unroll 4
            for (uint32_t r = 0; r < rows; r++) {
                v16 channel = all(query[r * s->key_wide + c]);
                first[r] = add(first[r], multiply(a, channel));
                second[r] = add(second[r], multiply(b, channel));
            }
        }
        for (uint32_t r = 0; r < rows; r++) {
            four->scores[r][t / LANES] = first[r];
            four->scores[r][t / LANES + 1] = second[r];
        }
    }
}

/* `direct`: values come as they are stored (whole vectors of 16), else from the panel. */
INLINE void raw_values(const state *s, const block_view *block, four_rows *four, uint32_t rows, uint32_t direct)
{
    float weights[4][64];
    uint32_t dtype = s->call->prefix->dtype;
    size_t item = dtype == AM_F32 ? 4 : 2;
    memcpy(weights, four->scores, sizeof weights);
    for (uint32_t c = 0; c < s->value_dim; c += 2 * LANES) {
        v16 first[4], second[4];
        for (uint32_t r = 0; r < rows; r++)
            first[r] = second[r] = all(0.0f);
        for (uint32_t t = 0; t < block->used; t++) {
            const uint8_t *from = block->values + ((size_t)t * s->value_dim + c) * item;
            const float *panel = s->value_panel + t * s->value_wide + c;
            v16 a = direct ? sixteen(dtype, from) : load(panel);
            v16 b = direct ? sixteen(dtype, from + LANES * item) : load(panel + LANES);
            if (direct && block->ahead) {
                __builtin_prefetch(from + block->ahead);
                if (dtype == AM_F32)
                    __builtin_prefetch(from + 64 + block->ahead);
            }
#pragma GCC unroll 4
            for (uint32_t r = 0; r < rows; r++) {
                v16 weight = all(weights[r][t]);
                first[r] = add(first[r], multiply(a, weight));
                second[r] = add(second[r], multiply(b, weight));
            }
        }
        for (uint32_t r = 0; r < rows; r++) {
            float *to = row_partial(s, four->row + r) + c;
            v16 decay = all(four->decay[r]);
            store(to, add(multiply(load(to), decay), first[r]));
            store(to + LANES, add(multiply(load(to + LANES), decay), second[r]));
        }
    }
}

/* ---- */

INLINE void some_rows(const state *s, const block_view *block, am_quantized at, four_rows *four, uint32_t rows)
{
    uint32_t raw = block->codec == AM_RAW;
    if (raw)
        raw_scores(s, block, four, rows);
    else
        coded_scores(s, block, at, four, rows);
    for (uint32_t r = 0; r < rows; r++)
        weigh(s, block, four, r);
    if (raw)
        raw_values(s, block, four, rows, values_direct(s));
    else
        coded_values(s, block, at, four, rows);
}

INLINE void one_block(const state *s, const block_view *block)
{
    am_quantized at = {0};
    four_rows four;
    const am_prefix *prefix = s->call->prefix;
    uint32_t low, high, loaded = 0;
    for (uint32_t row = 0; row < s->span->rows;) {
        four.rows = 0;
        four.row = row;
        while (row < s->span->rows && four.rows < 4) {
            visible(s, block, row, &low, &high);
            if (low >= high && four.rows)
                break;
            row++;
            if (low >= high) {
                four.row = row;
                continue;
            }
            four.low[four.rows] = low;
            four.high[four.rows++] = high;
        }
        if (!four.rows)
            continue;
        if (!loaded) {
            loaded = 1;
            if (block->codec == AM_RAW) {
                load_keys(s, block);
                for (uint32_t t = 0; !values_direct(s) && t < block->used; t++)
                    floats_from(prefix->dtype, block->values + (size_t)t * s->value_dim * (prefix->dtype == AM_F32 ? 4 : 2),
                                s->value_dim, s->value_wide, s->value_panel + t * s->value_wide);
            } else {
                am_block shape = {prefix->dtype, block->rows, s->key_dim, s->value_dim};
                at = am_quantized_layout(block->codec, shape);
                load_scales(s, block, at);
                for (uint64_t i = at.key_scales; block->ahead && i < at.size + 64; i += 64)
                    __builtin_prefetch(block->keys + block->ahead + i);
            }
        }
        block_view view = *block;
        if (block->codec != AM_RAW)
            view.values = block->keys + at.values;
        if (loaded++ > 1)
            view.ahead = 0;
        switch (four.rows) {
        case 1:
            some_rows(s, &view, at, &four, 1);
            break;
        case 2:
            some_rows(s, &view, at, &four, 2);
            break;
        case 3:
            some_rows(s, &view, at, &four, 3);
            break;
        default:
            some_rows(s, &view, at, &four, 4);
        }
    }
}

TARGET void KERNEL(const am_span *span)
{
    const am_attend *call = span->call;
    const am_prefix *prefix = call->prefix;
    am_layer shape = prefix->shapes[call->layer];
    size_t item = am_item(prefix->dtype);
    state s = {.span = span, .call = call, .group = call->heads / shape.kv_heads, .key_dim = shape.key_dim,
               .value_dim = shape.value_dim, .key_wide = AM_WIDE(shape.key_dim), .value_wide = AM_WIDE(shape.value_dim),
               .stride = AM_PARTIAL(shape.value_dim)};
    s.queries = span->scratch;
    s.key_panel = s.queries + AM_GROUP * s.key_wide;
    s.key_scale = s.key_panel + AM_BLOCK * s.key_wide;
    s.key_minimum = s.key_scale + 2 * s.key_wide;
    s.value_panel = s.key_minimum + 2 * s.key_wide;
    s.value_scale = s.value_panel + AM_BLOCK * s.value_wide;
    s.value_minimum = s.value_scale + 4 * AM_BLOCK;
    for (uint32_t r = 0; r < span->rows; r++) {
        float *partial = row_partial(&s, r);
        memset(partial, 0, s.stride * sizeof *partial);
        partial[AM_LARGEST(s.value_dim)] = AM_LOWEST;
    }
    uint32_t segment = UINT32_MAX;
    for (uint32_t b = span->block; b < span->block + span->blocks; b++) {
        block_view block;
        uint32_t of;
        if (b < prefix->pieces) {
            const am_piece *piece = &prefix->piece[b];
            const am_place *place = &prefix->places[call->layer][(size_t)b * shape.kv_heads + span->head];
            block = (block_view){.first = piece->first, .segment = piece->segment, .rows = piece->rows, .used = piece->used, .codec = place->codec,
                                 .keys = place->data,
                                 .values = place->data + (size_t)piece->rows * shape.key_dim * item};
            if (b + 1 < prefix->pieces)
                block.ahead = (ptrdiff_t)((uintptr_t)place[shape.kv_heads].data - (uintptr_t)place->data);
            of = piece->segment;
        } else {
            uint64_t from = (uint64_t)(b - prefix->pieces) * AM_BLOCK;
            block = (block_view){.first = prefix->tokens + from, .rows = AM_BLOCK, .codec = AM_RAW,
                                 .used = call->tail - from < AM_BLOCK ? (uint32_t)(call->tail - from) : AM_BLOCK,
                                 .keys = call->tail_keys + (ptrdiff_t)span->head * call->tail_key_head +
                                         from * shape.key_dim * item,
                                 .values = call->tail_values + (ptrdiff_t)span->head * call->tail_value_head +
                                           from * shape.value_dim * item};
            of = 0;
        }
        if (of != segment) {
            turn_queries(&s, &prefix->segment[of]);
            segment = of;
        }
        one_block(&s, &block);
    }
    for (uint32_t r = 0; r < span->rows; r++) {
        float *sums = row_partial(&s, r) + AM_SUMS(s.value_dim);
        *sums = lanes_sum(load(sums));
    }
}

/* Prefixes, and the work of one attention call: parts of it for threads, and how their results come together. attend.h. */
#include "attend.h"

#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "floats.h"
#include "layout.h"
#include "quantized.h"
#include "threads.h"

#define SPAN 16u  /* blocks that a part has where there are few rows */
#define PARTS 16u /* that many parts by heads and rows are enough for all threads: then no part is cut by blocks */

/* ---- Prefixes */

int am_prefix_init(am_prefix *prefix, uint32_t dtype, uint32_t layers, const am_layer *shapes)
{
    memset(prefix, 0, sizeof *prefix);
    if (!am_item(dtype))
        return AM_DTYPE;
    if (layers < 1 || layers > AM_MAX_LAYERS)
        return AM_LAYERS;
    for (uint32_t i = 0; i < layers; i++)
        if (!am_good_shape(shapes[i]) || shapes[i].key_dim > AM_ATTEND_DIM || shapes[i].value_dim > AM_ATTEND_DIM)
            return AM_SHAPE;
    prefix->dtype = dtype;
    prefix->layers = layers;
    prefix->shapes = malloc(layers * sizeof *prefix->shapes);
    prefix->places = calloc(layers, sizeof *prefix->places);
    prefix->segment = calloc(1, sizeof *prefix->segment);
    if (!prefix->shapes || !prefix->places || !prefix->segment)
        return AM_MEMORY;
    memcpy(prefix->shapes, shapes, layers * sizeof *prefix->shapes);
    prefix->segments = 1;
    return AM_OK;
}

static void free_segments(am_prefix *prefix, uint32_t from)
{
    for (uint32_t i = from; i < prefix->segments; i++)
        free(prefix->segment[i].cosine); /* the sines lie behind */
}

void am_prefix_destroy(am_prefix *prefix)
{
    free_segments(prefix, 0);
    for (uint32_t i = 0; prefix->places && i < prefix->layers; i++)
        free(prefix->places[i]);
    free(prefix->places);
    free(prefix->piece);
    free(prefix->segment);
    free(prefix->shapes);
    memset(prefix, 0, sizeof *prefix);
}

int am_prefix_begin_segment(am_prefix *prefix, uint32_t pairs, const float *cosine, const float *sine)
{
    for (uint32_t i = 0; i < prefix->layers; i++)
        if (2ull * pairs > prefix->shapes[i].key_dim)
            return AM_PREFIX_SHAPES;
    am_segment *segments = realloc(prefix->segment, (prefix->segments + 1ull) * sizeof *segments);
    if (!segments)
        return AM_MEMORY;
    prefix->segment = segments;
    float *angles = malloc((2ull * pairs + 1) * sizeof *angles);
    if (!angles)
        return AM_MEMORY;
    memcpy(angles, cosine, pairs * sizeof *angles);
    memcpy(angles + pairs, sine, pairs * sizeof *angles);
    segments[prefix->segments++] = (am_segment){angles, angles + pairs, pairs, prefix->pieces, prefix->tokens, prefix->bytes};
    return AM_OK;
}

int am_prefix_truncate(am_prefix *prefix, uint32_t segments)
{
    if (segments < 1 || segments > prefix->segments)
        return AM_PREFIX_RANGE;
    if (segments < prefix->segments) {
        const am_segment *next = &prefix->segment[segments];
        prefix->pieces = next->pieces;
        prefix->tokens = next->tokens;
        prefix->bytes = next->bytes;
        free_segments(prefix, segments);
        prefix->segments = segments;
    }
    return AM_OK;
}

/* Room for `more` pieces in all arrays. */
static int grow(am_prefix *prefix, uint64_t more)
{
    uint64_t needed = prefix->pieces + more, room = prefix->room * 2ull;
    if (needed <= prefix->room)
        return AM_OK;
    room = room > needed ? room : needed;
    if (room > UINT32_MAX / 2)
        return AM_MEMORY;
    am_piece *piece = realloc(prefix->piece, room * sizeof *piece);
    if (!piece)
        return AM_MEMORY;
    prefix->piece = piece;
    for (uint32_t i = 0; i < prefix->layers; i++) {
        am_place *places = realloc(prefix->places[i], room * prefix->shapes[i].kv_heads * sizeof *places);
        if (!places)
            return AM_MEMORY;
        prefix->places[i] = places;
    }
    prefix->room = (uint32_t)room;
    return AM_OK;
}

static int attendable(uint32_t codec)
{
    return codec == AM_RAW || (codec >= AM_INT8 && codec <= AM_INT4);
}

/* Encoding makes no scale or minimum that isn't finite, which would make every result a NaN, and no scale below 0, with
 * which the codes of weights would leave their range. */
static int good_scales(uint32_t codec, am_block block, const uint8_t *data)
{
    if (codec == AM_RAW)
        return 1;
    am_quantized at = am_quantized_layout(codec, block);
    uint32_t wrong = 0;
    for (uint64_t i = at.key_scales; i < at.size; i += 2) {
        uint32_t minimum = (i >= at.key_minima && i < at.value_scales) || i >= at.value_minima;
        uint32_t half = *(const half_bits *)(data + i);
        wrong |= (half & 0x7C00u) == 0x7C00u || (half & 0x8000u && !minimum);
    }
    return !wrong;
}

/* Extent `index` of a source: its codec, or an error. */
typedef struct {
    const uint8_t *data, *entries; /* entries: of a page's table, or NULL */
    const am_extent *table;
    uint64_t length, offset; /* offset: of the next extent of a body */
} source;

static int next_extent(source *from, uint32_t index, am_block block, am_place *place)
{
    uint64_t offset = from->offset, size;
    uint32_t codec;
    if (from->entries) {
        const uint8_t *entry = from->entries + (size_t)EXTENT_ENTRY * index;
        offset = load64(entry);
        size = load64(entry + 8);
        codec = load32(entry + 20);
    } else {
        size = from->table[index].size;
        codec = from->table[index].codec;
    }
    if (codec >= AM_CODECS)
        return AM_CODEC;
    if (!am_good_size(codec, block, size) || offset > from->length || size > from->length - offset)
        return AM_EXTENT;
    from->offset = aligned(offset + size);
    *place = (am_place){from->data + offset, codec};
    return AM_OK;
}

/* The extents of blocks first .. first + blocks of a page of `grid` tokens become pieces, the last one cut to `last`. */
static int append(am_prefix *prefix, uint32_t grid, source *from, uint32_t first, uint32_t blocks, uint32_t last)
{
    uint32_t rows = block_of(grid), all = grid / rows, index = 0;
    uint64_t bytes = 0;
    int result = grow(prefix, blocks);
    for (uint32_t layer = 0; result == AM_OK && layer < prefix->layers; layer++) {
        am_layer shape = prefix->shapes[layer];
        am_block block = block_shape(prefix->dtype, grid, shape);
        for (uint32_t head = 0; head < shape.kv_heads; head++)
            for (uint32_t b = 0; b < all; b++, index++) {
                am_place place;
                result = next_extent(from, index, block, &place);
                if (result != AM_OK)
                    return result;
                if (b < first || b >= first + blocks)
                    continue;
                if (!attendable(place.codec))
                    return AM_PREFIX_CODEC;
                if (!good_scales(place.codec, block, place.data))
                    return AM_ENCODING;
                bytes += place.codec == AM_RAW ? am_block_bytes(block) : am_codec_size(place.codec, block);
                prefix->places[layer][(size_t)(prefix->pieces + b - first) * shape.kv_heads + head] = place;
            }
    }
    if (result != AM_OK)
        return result;
    for (uint32_t b = 0; b < blocks; b++) {
        uint32_t used = b + 1 == blocks ? last : rows;
        prefix->piece[prefix->pieces++] = (am_piece){prefix->tokens, rows, used, prefix->segments - 1};
        prefix->tokens += used;
    }
    prefix->bytes += bytes;
    return AM_OK;
}

static int append_range(am_prefix *prefix, uint32_t grid, source *from, int64_t first, int64_t count)
{
    int64_t rows = block_of(grid);
    if (first < 0 || first >= grid || first % rows)
        return AM_PREFIX_RANGE;
    if (count < 0)
        count = grid - first;
    if (count < 1 || count > grid - first)
        return AM_PREFIX_RANGE;
    int64_t blocks = (count + rows - 1) / rows;
    return append(prefix, grid, from, (uint32_t)(first / rows), (uint32_t)blocks, (uint32_t)(count - (blocks - 1) * rows));
}

int am_prefix_append_page(am_prefix *prefix, const void *data, uint64_t length, int64_t first, int64_t count)
{
    am_page page;
    int result = am_page_open(&page, data, length);
    if (result != AM_OK)
        return result;
    if (page.dtype != prefix->dtype || page.layers != prefix->layers)
        return AM_PREFIX_SHAPES;
    for (uint32_t i = 0; i < page.layers; i++) {
        am_layer shape = am_page_layer(&page, i), own = prefix->shapes[i];
        if (shape.kv_heads != own.kv_heads || shape.key_dim != own.key_dim || shape.value_dim != own.value_dim)
            return AM_PREFIX_SHAPES;
    }
    /* The table may change from now on: next_extent bounds what it reads, and the number of entries was of these shapes. */
    if (am_page_extents(page.grid, prefix->layers, prefix->shapes) != page.extents)
        return AM_EXTENT;
    source from = {.data = data, .entries = page.extent_table, .length = length};
    return append_range(prefix, page.grid, &from, first, count);
}

int am_prefix_append_encoded(am_prefix *prefix, uint32_t grid, const am_extent *table, uint64_t entries,
                             const uint8_t *body, uint64_t length, int64_t first, int64_t count)
{
    int result;
    if (!am_page_size(prefix->dtype, grid, prefix->layers, prefix->shapes, &result))
        return result;
    if (entries != am_page_extents(grid, prefix->layers, prefix->shapes))
        return AM_EXTENT;
    source from = {.data = body, .table = table, .length = length};
    return append_range(prefix, grid, &from, first, count);
}

/* ---- A call */

static am_span_kernel *chosen(void)
{
    switch (am_cpu_level()) {
#if defined(__x86_64__)
    case AM_AVX512:
        return am_span_avx512;
    case AM_AVX2:
        return am_span_avx2;
#elif defined(__aarch64__)
    case AM_NEON:
        return am_span_neon;
#endif
    default:
        return am_span_scalar;
    }
}

/* How the call is cut: by the shape alone, so that no bit depends on the threads. */
typedef struct {
    const am_attend *call;
    am_span_kernel *kernel;
    uint32_t rows, groups, blocks, spans, units; /* per KV head: rows in groups, blocks in spans */
    size_t stride, scratch;
    float *partials, *scratches;
} work;

static void do_unit(void *context, uint32_t unit, uint32_t thread)
{
    const work *all = context;
    uint32_t span = unit % all->spans, group = unit / all->spans % all->groups, head = unit / all->spans / all->groups;
    uint32_t row = group * AM_GROUP, block = all->spans == 1 ? 0 : span * SPAN;
    am_span part = {
        .call = all->call, .head = head, .row = row, .block = block,
        .rows = all->rows - row < AM_GROUP ? all->rows - row : AM_GROUP,
        .blocks = all->spans == 1 || all->blocks - block < SPAN ? all->blocks - block : SPAN,
        .scratch = all->scratches + all->scratch * thread,
        .partial = all->partials + (((size_t)head * all->spans + span) * all->rows + row) * all->stride,
    };
    all->kernel(&part);
}

/* As power() of the kernels. */
static float power_of(float x)
{
    x = -127.0f > x ? -127.0f : x;
    float rounded = x + 0x1.8p23f, part = x - (rounded - 0x1.8p23f);
    float sum = 0x1.5bba14p-10f;
    sum = sum * part + 0x1.3cea88p-7f;
    sum = sum * part + 0x1.c6b752p-5f;
    sum = sum * part + 0x1.ebf9bcp-3f;
    sum = sum * part + 0x1.62e42ap-1f;
    sum = sum * part + 1.0f;
    return sum * float_of((bits_of(rounded) - 0x4B400000u + 127u) << 23);
}

static void store(uint32_t dtype, float value, uint8_t *to)
{
    uint32_t bits = bits_of(value), not_a_number = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    uint16_t half;
    if (dtype == AM_F32) {
        bits = not_a_number ? 0x7FC00000u : bits; /* which of them comes of a sum depends on the processor */
        memcpy(to, &bits, 4);
        return;
    }
    if (dtype == AM_BF16)
        half = not_a_number ? 0x7FC0u : (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
    else
        half = not_a_number ? 0x7E00u : to_f16(value);
    memcpy(to, &half, 2);
}

/* The spans of a row, brought together in their order. */
static void finish_row(const work *all, uint32_t head, uint32_t row)
{
    const am_attend *call = all->call;
    am_layer shape = call->prefix->shapes[call->layer];
    uint32_t dim = shape.value_dim, group = call->heads / shape.kv_heads, item = am_item(call->prefix->dtype);
    const float *partial = all->partials + ((size_t)head * all->spans * all->rows + row) * all->stride;
    size_t next = all->rows * all->stride;
    float most = AM_LOWEST, sum = 0.0f, out[AM_ATTEND_DIM] = {0};
    for (uint32_t s = 0; s < all->spans; s++)
        most = partial[s * next + AM_LARGEST(dim)] > most ? partial[s * next + AM_LARGEST(dim)] : most;
    for (uint32_t s = 0; s < all->spans; s++) {
        const float *from = partial + s * next;
        float weight = power_of(from[AM_LARGEST(dim)] - most);
        sum += from[AM_SUMS(dim)] * weight;
        for (uint32_t c = 0; c < dim; c++)
            out[c] += from[c] * weight;
    }
    float inverse = 1.0f / sum;
    uint8_t *to = call->out + (((size_t)(row / group) * call->heads + head * group + row % group) * dim) * item;
    for (uint32_t c = 0; c < dim; c++)
        store(call->prefix->dtype, out[c] * inverse, to + (size_t)c * item);
}

int am_attend_run(const am_attend *call, uint32_t threads)
{
    am_layer shape = call->prefix->shapes[call->layer];
    work all = {.call = call, .kernel = chosen(), .rows = call->queries * (call->heads / shape.kv_heads)};
    all.groups = parts(all.rows, AM_GROUP);
    all.blocks = call->prefix->pieces + (uint32_t)((call->tail + AM_BLOCK - 1) / AM_BLOCK);
    all.spans = all.groups * shape.kv_heads >= PARTS ? 1 : parts(all.blocks, SPAN);
    all.units = shape.kv_heads * all.groups * all.spans;
    all.stride = AM_PARTIAL(shape.value_dim);
    all.scratch = AM_SCRATCH(shape.key_dim, shape.value_dim);
    threads = threads < all.units ? threads : all.units;
    threads = am_threads_ready(threads);
    all.partials = malloc(((size_t)shape.kv_heads * all.spans * all.rows * all.stride + threads * all.scratch) *
                          sizeof *all.partials);
    if (!all.partials)
        return -1;
    all.scratches = all.partials + (size_t)shape.kv_heads * all.spans * all.rows * all.stride;
    am_threads_run(do_unit, &all, all.units, threads);
    for (uint32_t head = 0; head < shape.kv_heads; head++)
        for (uint32_t row = 0; row < all.rows; row++)
            finish_row(&all, head, row);
    free(all.partials);
    return 0;
}

/* Fuzz target for attention in place: any table and body are refused or attended to, with the same bits at every
 * instruction set. The first 16 bytes choose the shape. scripts/fuzz runs it.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "attend.h"
#include "cpu.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const uint32_t dims[] = {1, 3, 4, 16, 17, 32, 37, 64, 65, 80, 96, 128}, grids[] = {1, 7, 16, 33, 63, 64, 128, 192};

static uint8_t *room(uint64_t size)
{
    uint8_t *memory = malloc(size ? size : 1); /* of exactly this size: one byte past it is an error */
    if (!memory)
        abort();
    return memory;
}

static uint8_t *filled(uint64_t length, const uint8_t *data, size_t size)
{
    uint8_t *memory = room(length);
    for (uint64_t i = 0; i < length; i++)
        memory[i] = size ? data[i % size] : 0;
    return memory;
}

static void attend(am_attend *call, uint64_t bytes, const char *level, uint32_t threads, uint8_t *out)
{
    if (am_cpu_force(level))
        return;
    memset(out, 0, bytes);
    call->out = out;
    if (am_attend_run(call, threads))
        abort();
}

/* Numbers that are none may differ in their bits. */
static int differ(uint32_t dtype, const uint8_t *a, const uint8_t *b, uint64_t bytes)
{
    static const uint32_t exponents[] = {0, 0x7F800000u, 0x7C00u, 0x7F80u};
    uint32_t item = am_item(dtype), sign = dtype == AM_F32 ? 0x80000000u : 0x8000u;
    for (uint64_t i = 0; i < bytes; i += item) {
        uint32_t x = 0, y = 0;
        memcpy(&x, a + i, item);
        memcpy(&y, b + i, item);
        if (x != y && ((x & ~sign) <= exponents[dtype] || (y & ~sign) <= exponents[dtype]))
            return 1;
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 16)
        return 0;
    uint32_t dtype = 1 + data[0] % 3, grid = grids[data[1] % 8], group = 1 + data[2] % 5, queries = 1 + data[3] % 9;
    am_layer shape = {1 + data[4] % 3, dims[data[5] % 12], dims[data[6] % 12]};
    uint32_t item = am_item(dtype), codec = data[7] % AM_CODECS, length = data[8], window = data[9] % 4 ? 0 : data[10];
    int64_t first = data[11] % 4 ? 0 : 64, count = data[12] % 4 ? -1 : data[12];
    am_prefix prefix;
    if (am_prefix_init(&prefix, dtype, 1, &shape) != AM_OK)
        abort();
    int result;
    uint64_t most = am_page_size(dtype, grid, 1, &shape, &result);
    uint32_t extents = am_page_extents(grid, 1, &shape);
    am_extent *table = malloc(extents * sizeof *table);
    if (!table)
        abort();
    am_block block = {dtype, grid < AM_BLOCK ? grid : AM_BLOCK, shape.key_dim, shape.value_dim};
    for (uint32_t i = 0; i < extents; i++) {
        uint32_t used = am_codec_takes(codec, block) ? codec : AM_RAW;
        table[i] = (am_extent){used == AM_RAW ? am_block_bytes(block) : am_codec_size(used, block), 0, used};
    }
    if (data[13] % 8 == 0) /* a table that says anything */
        memcpy((uint8_t *)table + (data[14] * 16u) % (extents * sizeof *table), data, 16);
    uint64_t bytes = data[13] % 8 == 1 ? size : most;
    uint8_t *body = filled(bytes, data + 16, size - 16);
    for (uint64_t i = 1; data[15] % 4 && i < bytes; i += 2)
        body[i] &= 0x3F; /* f16 numbers that are finite and not below 0: good scales, so that the block is taken */
    if (am_prefix_append_encoded(&prefix, grid, table, extents, body, bytes, first, count) == AM_OK) {
        uint32_t heads = shape.kv_heads * group, tail = length + queries;
        uint64_t key_bytes = (uint64_t)tail * shape.key_dim * item, value_bytes = (uint64_t)tail * shape.value_dim * item;
        uint64_t out_bytes = (uint64_t)queries * heads * shape.value_dim * item;
        uint8_t *query = filled((uint64_t)heads * queries * shape.key_dim * item, data + size / 2, size - size / 2);
        uint8_t *keys = filled(shape.kv_heads * key_bytes, data + 16, size - 16);
        uint8_t *values = filled(shape.kv_heads * value_bytes, data + 15, size - 15);
        uint8_t *one = room(out_bytes), *other = room(out_bytes);
        am_attend call = {
            .prefix = &prefix, .heads = heads, .queries = queries, .query = query, .tail_keys = keys, .tail_values = values,
            .query_head = (ptrdiff_t)(queries * shape.key_dim * item), .query_token = (ptrdiff_t)(shape.key_dim * item),
            .tail_key_head = (ptrdiff_t)key_bytes, .tail_value_head = (ptrdiff_t)value_bytes, .tail = tail,
            .window = window, .scale = 0.125f,
        };
        static const char *const levels[] = {"avx2", "avx512", "neon"};
        attend(&call, out_bytes, "scalar", 1, one);
        for (uint32_t i = 0; i < 3; i++)
            if (!am_cpu_force(levels[i])) {
                attend(&call, out_bytes, levels[i], 1 + i, other);
                if (differ(dtype, one, other, out_bytes))
                    abort();
            }
        free(query);
        free(keys);
        free(values);
        free(one);
        free(other);
    }
    am_prefix_destroy(&prefix);
    free(table);
    free(body);
    return 0;
}

/* The rules of the page format and the arithmetic of its layout: see page.h and layout.h. */
#include "layout.h"

static const struct {
    const char *name, *text;
} rules[AM_RULES] = {
    [AM_OK] = {"ok", "nothing is wrong"},
    [AM_SHORT] = {"short", "the file is shorter than a header"},
    [AM_MAGIC] = {"magic", "the file is not a page file"},
    [AM_VERSION] = {"version", "the file has another format version"},
    [AM_HEADER_LENGTH] = {"header length", "the header's length is out of bounds"},
    [AM_LENGTH] = {"length", "the file is not as long as its header says"},
    [AM_HEADER_CHECKSUM] = {"header checksum", "the header fails its checksum"},
    [AM_RESERVED] = {"reserved", "a reserved field is not zero"},
    [AM_DTYPE] = {"dtype", "the data type is unknown"},
    [AM_GRID] = {"grid", "the grid or block is out of bounds"},
    [AM_LAYERS] = {"layers", "the number of layers is out of bounds"},
    [AM_SHAPE] = {"shape", "a layer's heads or dimensions are out of bounds"},
    [AM_CODEC] = {"codec", "an extent's codec is unknown"},
    [AM_EXTENT] = {"extent", "an extent does not lie where the layout puts it"},
    [AM_PADDING] = {"padding", "padding is not zero"},
    [AM_CHECKSUM] = {"checksum", "an extent fails its checksum"},
    [AM_ENCODING] = {"encoding", "an extent is not an encoding of its codec"},
    [AM_MEMORY] = {"memory", "out of memory"},
    [AM_SYSTEM] = {"system", "a system call failed"},
};

const char *am_rule(int result)
{
    return result >= 0 && result < AM_RULES ? rules[result].name : "unknown";
}

const char *am_rule_text(int result)
{
    return result >= 0 && result < AM_RULES ? rules[result].text : "unknown result";
}

uint32_t am_item(uint32_t dtype)
{
    return dtype == AM_F32 ? 4 : dtype == AM_F16 || dtype == AM_BF16 ? 2 : 0;
}

/* ---- layout ---- */

int am_good_grid(uint32_t grid)
{
    return grid >= 1 && grid <= AM_MAX_GRID && (grid <= AM_BLOCK || grid % AM_BLOCK == 0);
}

int am_good_shape(am_layer shape)
{
    return shape.kv_heads >= 1 && shape.kv_heads <= AM_MAX_HEADS && shape.key_dim >= 1 && shape.key_dim <= AM_MAX_DIM &&
           shape.value_dim >= 1 && shape.value_dim <= AM_MAX_DIM;
}

uint64_t am_header_length(uint32_t grid, uint32_t layers, uint64_t extents)
{
    return aligned(AM_PAGE_FIXED + 4ull * grid + LAYER_ENTRY * (uint64_t)layers + EXTENT_ENTRY * extents);
}

/* The header's length and the file's for a layout whose shapes are all good; the bounds keep both far below 2^64. */
uint64_t am_measure(uint32_t grid, uint32_t dtype, uint32_t layers, const am_layer *shapes,
                        uint64_t *header, uint64_t *extents)
{
    uint32_t block = block_of(grid);
    uint64_t count = 0, payload = 0;
    for (uint32_t i = 0; i < layers; i++) {
        uint64_t here = (uint64_t)shapes[i].kv_heads * (grid / block);
        count += here;
        payload += here * aligned(am_block_bytes(block_shape(dtype, grid, shapes[i])));
    }
    *extents = count;
    *header = am_header_length(grid, layers, count);
    return *header + payload;
}

uint64_t am_page_size(uint32_t dtype, uint32_t grid, uint32_t layers, const am_layer *shapes, int *result)
{
    uint64_t header, extents;
    *result = !am_item(dtype) ? AM_DTYPE
              : !am_good_grid(grid) ? AM_GRID
              : layers < 1 || layers > AM_MAX_LAYERS ? AM_LAYERS
                                                     : AM_OK;
    for (uint32_t i = 0; *result == AM_OK && i < layers; i++)
        if (!am_good_shape(shapes[i]))
            *result = AM_SHAPE;
    if (*result != AM_OK)
        return 0;
    uint64_t length = am_measure(grid, dtype, layers, shapes, &header, &extents);
    if (header > UINT32_MAX) {
        *result = AM_HEADER_LENGTH;
        return 0;
    }
    return length;
}

int am_good_size(uint32_t codec, am_block block, uint64_t size)
{
    if (!am_codec_takes(codec, block))
        return 0;
    uint64_t most = am_codec_size(codec, block);
    return am_codec_fixed(codec) ? size == most : size >= 1 && size <= most;
}

uint32_t am_page_extents(uint32_t grid, uint32_t layers, const am_layer *shapes)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < layers; i++)
        count += shapes[i].kv_heads * (grid / block_of(grid));
    return count;
}

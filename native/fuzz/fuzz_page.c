/* Fuzz target for the page reader: any bytes give a result, never a crash or a read outside of them. scripts/fuzz runs it. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "crc32c.h"
#include "page.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t tensor_bytes(am_layer shape, uint32_t dim, const am_page *page)
{
    return (uint64_t)shape.kv_heads * page->grid * dim * page->item;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    am_page page;
    uint32_t bad = 0;
    /* A random input never has the right checksum: a second try with the checksum put right looks behind that check. */
    uint8_t *copy = malloc(size ? size : 1);
    if (!copy)
        return 0;
    memcpy(copy, data, size);
    for (int mended = 0; mended < 2; mended++) {
        int result = am_page_open(&page, copy, size);
        if (result == AM_HEADER_CHECKSUM && !mended) {
            uint32_t first, crc;
            memcpy(&first, copy + 16, sizeof first);
            crc = am_crc32c(0, copy + 16, first - 16);
            memcpy(copy + 12, &crc, sizeof crc);
            continue;
        }
        if (result != AM_OK)
            break;
        am_page_verify(&page, &bad);
        am_rows *rows = calloc(2ull * page.layers, sizeof *rows);
        int complete = rows != NULL;
        for (uint32_t i = 0; complete && i < page.layers; i++) {
            am_layer shape = am_page_layer(&page, i);
            uint32_t dims[2] = {shape.key_dim, shape.value_dim};
            for (int side = 0; complete && side < 2; side++) {
                am_rows *to = &rows[(side ? page.layers : 0) + i];
                to->data = malloc(tensor_bytes(shape, dims[side], &page));
                to->heads = shape.kv_heads;
                to->dim = dims[side];
                to->head_stride = (ptrdiff_t)((uint64_t)page.grid * dims[side] * page.item);
                complete = to->data != NULL;
            }
        }
        if (complete) {
            am_page_read(&page, 0, page.layers, rows, rows + page.layers, 1, &bad);
            am_page_read(&page, 0, page.layers, rows, rows + page.layers, 0, &bad);
        }
        for (uint32_t i = 0; rows && i < 2 * page.layers; i++)
            free(rows[i].data);
        free(rows);
        break;
    }
    free(copy);
    return 0;
}

/* Fuzz target for the page reader: any bytes give a result, never a crash or a read outside of them.
 *
 * With clang: clang -g -fsanitize=fuzzer,address,undefined -DLIBFUZZER -I native native/fuzz/fuzz_page.c native/page.c
 * native/crc32c.c -o fuzz_page, then ./fuzz_page corpus/. With any compiler, without -DLIBFUZZER, the program replays the
 * files it is given: that is what the tests do.
 */
#include <stdint.h>
#include <stdio.h>
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

#ifndef LIBFUZZER
int main(int count, char **names)
{
    for (int i = 1; i < count; i++) {
        FILE *file = fopen(names[i], "rb");
        if (!file) {
            perror(names[i]);
            return 1;
        }
        fseek(file, 0, SEEK_END);
        long size = ftell(file);
        rewind(file);
        uint8_t *data = malloc(size > 0 ? (size_t)size : 1); /* of exactly this size: one byte past it is an error */
        size_t got = data && size > 0 ? fread(data, 1, (size_t)size, file) : 0;
        fclose(file);
        LLVMFuzzerTestOneInput(data, got);
        free(data);
    }
    printf("%d files, no fault\n", count - 1);
    return 0;
}
#endif

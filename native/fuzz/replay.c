/* A main for fuzz targets that replays the files it is given: with any compiler, so that ordinary tests run the corpus. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

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

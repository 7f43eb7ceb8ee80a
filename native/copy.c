/* Copies past the caches: see copy.h. */
#include "copy.h"

#include <string.h>

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void copy_avx2(uint8_t *to, const uint8_t *from, size_t length)
{
    for (; length >= 64; from += 64, to += 64, length -= 64)
        am_stream_line(to, from);
    memcpy(to, from, length);
}
#endif

void am_copy_stream(void *to, const void *from, size_t length)
{
#if defined(__x86_64__)
    if (am_cpu_level() >= AM_AVX2 && (uintptr_t)to % 64 == 0) {
        copy_avx2(to, from, length);
        return;
    }
#endif
    memcpy(to, from, length);
}

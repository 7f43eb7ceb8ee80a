/* Copies past the caches: what is restored is larger than they are, and a plain store first reads the line it overwrites. */
#ifndef AM_COPY_H
#define AM_COPY_H

#include <stddef.h>
#include <stdint.h>

#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* Stores 64 bytes at `to`, a multiple of 64. am_copy_done() after the last one. */
__attribute__((target("avx2"), always_inline)) static inline void am_stream_line(uint8_t *to, const uint8_t *from)
{
    _mm256_stream_si256((__m256i *)(void *)to, _mm256_loadu_si256((const __m256i *)(const void *)from));
    _mm256_stream_si256((__m256i *)(void *)(to + 32), _mm256_loadu_si256((const __m256i *)(const void *)(from + 32)));
}
#endif

/* Lets other threads see what was stored past the caches before anything that is stored from now on. */
static inline void am_copy_done(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/* memcpy, past the caches where `to` is a multiple of 64 and the CPU can. am_copy_done() after the last one. */
void am_copy_stream(void *to, const void *from, size_t length);

#endif

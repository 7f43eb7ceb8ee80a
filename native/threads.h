/* A few sleeping threads that share the parts of a call with its caller. One pool per process, made when first needed. */
#ifndef AM_THREADS_H
#define AM_THREADS_H

#include <stdint.h>

#define AM_MAX_THREADS 64u

/* Called with the number of a part and of the thread that does it, 0 (the caller) to threads - 1. */
typedef void am_part(void *context, uint32_t part, uint32_t thread);

/* How many threads a call may count on, the caller included: at most `wanted`. Starts what is missing. */
uint32_t am_threads_ready(uint32_t wanted);

/* Does all parts, each once, in any order, by up to `threads` threads, and returns when all are done. The caller does all
 * that no other thread has begun, so it waits for nobody to wake up. If another call has the pool, the caller does all. */
void am_threads_run(am_part *part, void *context, uint32_t parts, uint32_t threads);

#endif

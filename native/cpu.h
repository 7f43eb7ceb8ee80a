/* Which instruction set the kernels use: detected once, kept in one place, can be forced by tests and users.
 *
 * Each kernel file has a table with an entry per level; a level without an entry of its own takes the one below. All files
 * are built with default flags: a function names its target itself.
 */
#ifndef AM_CPU_H
#define AM_CPU_H

#if defined(__AVX__) && !defined(AM_ALLOW_NATIVE_FLAGS)
#error "build without -mavx...: the code would not run on other machines, and the levels could not be told apart"
#endif

enum { AM_SCALAR, AM_SSE42, AM_AVX2, AM_AVX512, AM_NEON, AM_LEVELS };

#if defined(__x86_64__)
/* AM_AVX512 is what Ice Lake and Zen 4 have and later CPUs kept. */
#define AM_TARGET_SSE42 __attribute__((target("sse4.2")))
#define AM_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,sse4.2")))
#define AM_TARGET_AVX512                                                                                              \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bitalg,"         \
                          "vpclmulqdq,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,sse4.2")))
#endif

int am_cpu_level(void);              /* the level in use, one of the enum */
const char *am_cpu_name(int level);  /* "scalar", "sse4.2", "avx2", "avx512", "neon" */
int am_cpu_usable(int level);        /* whether this CPU has it */
int am_cpu_force(const char *name);  /* use this one from now on, in all threads; -1 if this CPU does not have it */

#endif

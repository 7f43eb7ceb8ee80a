/* Detection and choice of the instruction set: see cpu.h. */
#include "cpu.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

static const char *const names[AM_LEVELS] = {"scalar", "sse4.2", "avx2", "avx512", "neon"};

#if defined(__x86_64__)
/* What __builtin_cpu_supports has no name for in every compiler. A machine without lzcnt runs it as another instruction. */
static int has_f16c_and_lzcnt(void)
{
    unsigned a, b, c, d, extended;
    return __get_cpuid(1, &a, &b, &c, &d) && __get_cpuid(0x80000001, &a, &b, &extended, &d) && c & bit_F16C &&
           extended & bit_LZCNT;
}
#endif

static atomic_int chosen;
static pthread_once_t once = PTHREAD_ONCE_INIT;

const char *am_cpu_name(int level)
{
    return level >= 0 && level < AM_LEVELS ? names[level] : "unknown";
}

int am_cpu_usable(int level)
{
#if defined(__x86_64__)
    __builtin_cpu_init(); /* also asks whether the system saves the wide registers */
    switch (level) {
    case AM_SCALAR:
        return 1;
    case AM_SSE42:
        return __builtin_cpu_supports("sse4.2") != 0;
    case AM_AVX2:
        return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
               has_f16c_and_lzcnt();
    case AM_AVX512:
        return am_cpu_usable(AM_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bitalg") &&
               __builtin_cpu_supports("vpclmulqdq");
    default:
        return 0;
    }
#elif defined(__aarch64__)
    if (level == AM_SCALAR)
        return 1;
#if defined(__linux__)
    return level == AM_NEON && (getauxval(AT_HWCAP) & (1ul << 7)) != 0; /* HWCAP_CRC32; NEON itself is always there */
#elif defined(__APPLE__)
    return level == AM_NEON; /* every Apple CPU of this architecture */
#else
    return 0;
#endif
#else
    return level == AM_SCALAR;
#endif
}

static void detect(void)
{
    int level = AM_LEVELS - 1;
    while (!am_cpu_usable(level))
        level--;
    atomic_store(&chosen, level);
}

int am_cpu_level(void)
{
    pthread_once(&once, detect);
    return atomic_load_explicit(&chosen, memory_order_relaxed);
}

int am_cpu_force(const char *name)
{
    pthread_once(&once, detect);
    for (int level = 0; level < AM_LEVELS; level++)
        if (!strcmp(names[level], name) && am_cpu_usable(level)) {
            atomic_store(&chosen, level);
            return 0;
        }
    return -1;
}

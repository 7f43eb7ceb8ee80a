/* CRC32C (Castagnoli, RFC 3720 section 12.1), with the fastest kernel that this CPU has.
 *
 * Compiles without Python. The kernels are rows of a named table, so that one can ask which is in use and force one.
 */
#ifndef AM_CRC32C_H
#define AM_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* The checksum of `length` bytes appended to data whose checksum is `value` (0 for none). Thread-safe. */
uint32_t am_crc32c(uint32_t value, const void *data, size_t length);

/* Name of the kernel in use: "sse4.2", "armv8-crc" or "table". */
const char *am_crc32c_level(void);

/* Name of the `index`-th kernel that this CPU can run, fastest first; NULL past the last. */
const char *am_crc32c_usable(size_t index);

/* Use the kernel `name` from now on in the whole process (for tests); returns 0, or -1 if this CPU can't run it. */
int am_crc32c_force(const char *name);

#endif

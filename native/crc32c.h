/* CRC32C (Castagnoli polynomial, RFC 3720 appendix B.4): hardware instructions where the CPU has them, else a table.
 *
 * Compiles without Python. Safe from any number of threads.
 */
#ifndef AM_CRC32C_H
#define AM_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* CRC32C of `length` bytes appended to data whose CRC32C is `value` (0 for no data). */
uint32_t am_crc32c(uint32_t value, const void *data, size_t length);

/* The same while copying the data to `to`, which does not overlap it. am_copy_done() (copy.h) after the last one. */
uint32_t am_crc32c_copy(uint32_t value, void *to, const void *from, size_t length);

#endif

/* Codecs of page extents: one block of one KV head, K [rows, key_dim] and V [rows, value_dim], to bytes and back.
 *
 * Compiles without Python. Encoding is a function of the values alone: every level of cpu.h gives the
 * same bytes and decodes to the same bits (compile with -ffp-contract=off; tests compare). The bytes of each codec are
 * drawn in README.md.
 */
#ifndef AM_CODEC_H
#define AM_CODEC_H

#include <stddef.h>
#include <stdint.h>

enum {
    AM_RAW = 0,      /* the values as they are */
    AM_LOSSLESS = 1, /* exponents in 4 bits: bf16 to 3/4, f32 to 7/8 */
    AM_DENSE = 2,    /* exponents by rANS: smaller, slower */
    AM_INT8 = 3,     /* K and V in 8 bits */
    AM_K8V4 = 4,     /* K in 8 bits, V in 4 */
    AM_INT4 = 5,     /* K and V in 4 bits */
    AM_CODECS
};

#define AM_CODEC_MAX_ROWS 64u
#define AM_CODEC_MAX_DIM 1024u /* larger heads are stored raw */

enum { AM_F32 = 1, AM_F16 = 2, AM_BF16 = 3 }; /* dtype of compute */

/* rows 1 to 64; dims 1 to AM_CODEC_MAX_DIM. */
typedef struct {
    uint32_t dtype, rows, key_dim, value_dim;
} am_block;

/* Bytes of the block as it is. */
uint64_t am_block_bytes(am_block block);

/* Whether the codec takes such a block at all (dtype and bounds). AM_RAW takes every one. */
int am_codec_takes(uint32_t codec, am_block block);

/* Exact size of the encoding for the codecs whose size does not depend on the values; for the others an upper bound,
 * which is less than am_block_bytes(block). Only for blocks that the codec takes. */
uint64_t am_codec_size(uint32_t codec, am_block block);
int am_codec_fixed(uint32_t codec); /* whether am_codec_size is exact */

/* Encodes into `out` (room for am_codec_size bytes), returns the bytes written; 0 where the codec can't hold these values
 * (or gains nothing, or finds no memory to work in): then the block is stored raw. Unused bits are zero: equal values give equal bytes. */
uint64_t am_codec_encode(uint32_t codec, am_block block, const void *key, const void *value, uint8_t *out);

/* Decodes `size` bytes, which may be anything: 0, or -1 if they are no encoding of such a block. Never reads behind `in +
 * size` nor writes outside the destinations; after -1 these hold undefined bytes. am_copy_done() (copy.h) after the last
 * one. */
int am_codec_decode(uint32_t codec, am_block block, const uint8_t *in, uint64_t size, void *key, void *value);

/* The two families, called by codec.c: same contracts. */
uint64_t am_lossless_size(uint32_t codec, am_block block);
uint64_t am_lossless_encode(uint32_t codec, am_block block, const void *key, const void *value, uint8_t *out);
int am_lossless_decode(uint32_t codec, am_block block, const uint8_t *in, uint64_t size, void *key, void *value);
uint64_t am_quantized_size(uint32_t codec, am_block block);
uint64_t am_quantized_encode(uint32_t codec, am_block block, const void *key, const void *value, uint8_t *out);
int am_quantized_decode(uint32_t codec, am_block block, const uint8_t *in, uint64_t size, void *key, void *value);

#endif

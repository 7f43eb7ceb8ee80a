/* Page files of the activation memory, format version 1: laid out byte by byte in README.md beside this file.
 *
 * Compiles without Python and allocates nothing while it reads. No size in a file is believed before it is bounded by the
 * length of the file; every rule of the format has an error of its own.
 */
#ifndef AM_PAGE_H
#define AM_PAGE_H

#include <stddef.h>
#include <stdint.h>

#include "codec.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "page files are little-endian and are mapped as they are: big-endian hosts are not supported"
#endif

#define AM_PAGE_MAGIC "AMKVPAGE"
#define AM_PAGE_VERSION 1u
#define AM_PAGE_FIXED 160u /* bytes of the header before the token ids */
#define AM_ALIGN 64u
#define AM_BLOCK 64u /* tokens per block, or the grid where that is smaller */

/* Bounds on what a header may say; products of them stay far inside 64 bits. */
#define AM_MAX_GRID 65536u
#define AM_MAX_LAYERS 1024u
#define AM_MAX_HEADS 1024u
#define AM_MAX_DIM 65536u


/* Results. 0 is success; each other value is one broken rule (am_rule, am_rule_text). */
enum {
    AM_OK = 0,
    AM_SHORT,
    AM_MAGIC,
    AM_VERSION,
    AM_HEADER_LENGTH,
    AM_LENGTH,
    AM_HEADER_CHECKSUM,
    AM_RESERVED,
    AM_DTYPE,
    AM_GRID,
    AM_LAYERS,
    AM_SHAPE,
    AM_CODEC,
    AM_EXTENT,
    AM_PADDING,
    AM_CHECKSUM,
    AM_ENCODING,
    AM_MEMORY, /* no memory for the header */
    AM_SYSTEM, /* a system call failed: errno says why */
    AM_RULES
};

const char *am_rule(int result);      /* a short name, "header checksum" */
const char *am_rule_text(int result); /* a sentence for people */

typedef struct {
    uint32_t kv_heads, key_dim, value_dim;
} am_layer;

/* A page whose header was checked: pointers into the caller's bytes, valid as long as those. */
typedef struct {
    const uint8_t *data;
    uint64_t length;
    uint32_t dtype, item, grid, block, number, layers, extents;
    uint64_t first; /* offset of the first extent */
    const uint8_t *identity, *key, *parent, *tokens, *layer_table, *extent_table;
} am_page;

/* One tensor [heads, positions, dim] from some position on; contiguous but for its heads, whose stride is in bytes. `data`
 * and stride are multiples of the size of a value. */
typedef struct {
    uint8_t *data;
    ptrdiff_t head_stride;
    uint32_t heads, dim; /* am_page_read writes nothing outside of these, whatever the page says by then */
} am_rows;

/* What goes into a header, beside the shapes. */
typedef struct {
    uint32_t dtype, grid, number, layers;
    const am_layer *shapes;
    const uint8_t *identity, *key, *parent; /* 32 bytes each */
    const uint8_t *tokens;                  /* grid * int32 */
} am_page_head;

/* Bytes of one value of a dtype; 0 for an unknown dtype. */
uint32_t am_item(uint32_t dtype);

/* Checks all of the header (also its checksum and that every extent lies where the layout puts it). Reads no extent. */
int am_page_open(am_page *page, const void *data, uint64_t length);

am_layer am_page_layer(const am_page *page, uint32_t layer);

/* Checks the checksum of every extent and that all padding is zero; *bad is the extent that failed. */
int am_page_verify(const am_page *page, uint32_t *bad);

/* Decodes K and V of layers `from` .. `from + count` into keys[i], values[i] (room for `grid` positions each; i counts from
 * 0); AM_SHAPE if they have other shapes. The page's bytes may change meanwhile (a mapped file, a caller's buffer): then
 * the result is wrong or an error, but nothing outside of page and tensors is touched. With `check` each extent is verified on the way (raw ones always are); on AM_CHECKSUM, AM_PADDING and AM_ENCODING the destinations hold
 * undefined bytes and *bad is the extent. */
int am_page_read(const am_page *page, uint32_t from, uint32_t count, const am_rows *keys, const am_rows *values, int check,
                 uint32_t *bad);

/* Length of the page file of a layout with the raw codec, which is the most that it takes with any other; or 0 with
 * *result set to the rule that the layout breaks. */
uint64_t am_page_size(uint32_t dtype, uint32_t grid, uint32_t layers, const am_layer *shapes, int *result);

/* Writes a whole page file to `fd`, an empty file, straight from the tensors with the raw codec (never through a mapping: a
 * full disk is an error here, not a signal). *written is the file's length on success. */
int am_page_write(int fd, const am_page_head *head, const am_rows *keys, const am_rows *values, uint64_t *written);

/* An extent of an encoded page: what am_page_encode says of it, and what the file's table says beside its offset. */
typedef struct {
    uint64_t size;
    uint32_t crc, codec;
} am_extent;

/* Number of extents of a layout that am_page_size accepts. */
uint32_t am_page_extents(uint32_t grid, uint32_t layers, const am_layer *shapes);

/* Encodes a page into `body` (room for am_page_size bytes, 64-byte aligned or not), each extent followed by zeros up to a
 * multiple of 64, and `table` (am_page_extents entries); returns the bytes of the body. A block that the codec does not
 * take is stored raw. With `writeback` the decoded values replace those in the tensors: a run that goes on with them
 * computes what a restored one will. */
uint64_t am_page_encode(const am_page_head *head, uint32_t codec, const am_rows *keys, const am_rows *values, int writeback,
                        uint8_t *body, am_extent *table);

/* Writes the page file of an encoded page to `fd`, an empty file. AM_EXTENT if table and body don't fit the layout. */
int am_page_write_encoded(int fd, const am_page_head *head, const am_extent *table, const uint8_t *body, uint64_t length,
                          uint64_t *written);

#endif

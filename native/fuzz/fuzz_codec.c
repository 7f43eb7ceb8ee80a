/* Fuzz target for the codecs: any bytes decode to something or are refused, any values come back as the codec promises, and
 * every instruction set agrees. The first eight bytes choose codec, level, dtype and shape. scripts/fuzz runs it.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "codec.h"
#include "cpu.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Mostly small, for speed; rarely as large as real ones. */
static const uint32_t small[] = {1, 2, 5, 8, 15, 16, 17, 33}, large[] = {63, 64, 65, 80, 96, 127, 128, 130};

static void *room(uint64_t size)
{
    void *memory = malloc(size ? size : 1); /* of exactly this size: one byte past it is an error */
    if (!memory)
        abort();
    return memory;
}

/* Bytes of the input over and over, so that short inputs fill large blocks. */
static void fill(uint8_t *to, uint64_t length, const uint8_t *data, size_t size)
{
    for (uint64_t i = 0; i < length; i++)
        to[i] = size ? data[i % size] : 0;
}

static void use(int level)
{
    for (; level > 0 && !am_cpu_usable(level); level--)
        ;
    am_cpu_force(am_cpu_name(level));
}

/* Decodes at two levels and stops if they differ. */
static int decode(uint32_t codec, am_block block, const uint8_t *in, uint64_t size, int level, uint8_t *out)
{
    uint64_t item = block.dtype == AM_F32 ? 4 : 2, key_bytes = item * block.rows * block.key_dim;
    uint64_t bytes = am_block_bytes(block);
    uint8_t *key = room(key_bytes), *value = room(bytes - key_bytes), *again = room(bytes);
    use(level);
    int result = am_codec_decode(codec, block, in, size, key, value);
    memcpy(out, key, key_bytes);
    memcpy(out + key_bytes, value, bytes - key_bytes);
    use(AM_SCALAR);
    int scalar = am_codec_decode(codec, block, in, size, key, value);
    memcpy(again, key, key_bytes);
    memcpy(again + key_bytes, value, bytes - key_bytes);
    if (result != scalar || (!result && memcmp(out, again, bytes)))
        abort();
    free(key);
    free(value);
    free(again);
    return result;
}

/* Values: the same bytes at every level, which decode to what the codec promises. */
static void round_trip(uint32_t codec, am_block block, const uint8_t *data, size_t size, int level, uint8_t *encoded,
                       uint8_t *decoded)
{
    uint64_t most = am_codec_size(codec, block), bytes = am_block_bytes(block);
    uint64_t item = block.dtype == AM_F32 ? 4 : 2, key_bytes = item * block.rows * block.key_dim;
    uint8_t *values = room(bytes), *other = room(most), *key = room(key_bytes), *value = room(bytes - key_bytes);
    fill(values, bytes, data + 8, size - 8);
    if (data[6] & 1) /* near each other, as KV states are: else the lossless codecs would take next to none */
        for (uint64_t i = item - 1; i < bytes; i += item)
            values[i] = (uint8_t)((values[i] & 0x81) | 0x3e);
    memcpy(key, values, key_bytes);
    memcpy(value, values + key_bytes, bytes - key_bytes);
    use(level);
    uint64_t length = am_codec_encode(codec, block, key, value, encoded);
    use(AM_SCALAR);
    if (am_codec_encode(codec, block, key, value, other) != length || memcmp(encoded, other, length) || length > most)
        abort();
    if (length) {
        uint8_t *exact = room(length);
        memcpy(exact, encoded, length);
        if (decode(codec, block, exact, length, level, decoded))
            abort();
        if ((codec == AM_LOSSLESS || codec == AM_DENSE) && memcmp(decoded, values, bytes))
            abort();
        exact[data[7] % length] ^= data[6] | 1; /* one damaged byte */
        decode(codec, block, exact, length, level, decoded);
        free(exact);
    }
    free(key);
    free(value);
    free(values);
    free(other);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 8)
        return 0;
    uint32_t codec = 1 + data[0] % (AM_CODECS - 1);
    int level = data[1] % AM_LEVELS;
    const uint32_t *dims = data[6] >> 4 ? small : large;
    am_block block = {1 + data[2] % 3, 1 + data[3] % (data[6] >> 4 ? 20 : 64), dims[data[4] % 8], dims[data[5] % 8]};
    if (!am_codec_takes(codec, block))
        return 0;
    uint64_t most = am_codec_size(codec, block), bytes = am_block_bytes(block);
    uint8_t *decoded = room(bytes), *encoded = room(most);
    int kind = data[6] >> 1 & 3;
    if (kind == 0) { /* hostile bytes as they come */
        uint64_t given = size - 8 < most ? size - 8 : most;
        if (!am_codec_fixed(codec) || given == most) {
            uint8_t *hostile = room(given);
            memcpy(hostile, data + 8, given);
            decode(codec, block, hostile, given, level, decoded);
            free(hostile);
        }
    } else if (kind == 1) { /* and as many as there can be */
        fill(encoded, most, data + 8, size - 8);
        decode(codec, block, encoded, most, level, decoded);
    } else {
        round_trip(codec, block, data, size, level, encoded, decoded);
    }
    free(decoded);
    free(encoded);
    return 0;
}

/* AVX2 and AVX-512 coders of the dense lossless codec: see dense.h. */
#include "cpu.h"
#include "dense.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* Escapes of one step. */
static int take_escapes(am_dense_reader *reader, uint32_t marks, uint16_t *values)
{
    for (; marks; marks &= marks - 1) {
        int lane = __builtin_ctz(marks);
        if (am_dense_escape(reader, reader->channels[reader->at + (uint32_t)lane], &values[lane]))
            return -1;
    }
    return 0;
}

static inline void next_channels(am_dense_reader *reader, uint32_t advance)
{
    reader->at += advance;
    reader->at -= reader->at >= reader->dim ? reader->dim : 0;
}

/* One symbol of 8 coders; returns the values' upper bits, in 32-bit lanes. */
AM_TARGET_AVX2 static inline __m256i read8(__m256i *state, const uint32_t *channels, const uint8_t **words,
                                           uint32_t *marks)
{
    const __m256i low10 = _mm256_set1_epi32(1023);
    __m256i channel = _mm256_loadu_si256((const void *)channels);
    __m256i index = _mm256_or_si256(_mm256_and_si256(*state, low10),
                                    _mm256_and_si256(channel, _mm256_set1_epi32(AM_DENSE_CLASS)));
    __m256i slot = _mm256_i32gather_epi32((const int *)am_dense_slots, index, 4);
    __m256i next = _mm256_mullo_epi32(_mm256_and_si256(slot, low10), _mm256_srli_epi32(*state, AM_DENSE_BITS));
    next = _mm256_add_epi32(next, _mm256_and_si256(_mm256_srli_epi32(slot, 10), low10));
    __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(AM_DENSE_LEAST), next);
    unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(small));
    __m256i word = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)*words));
    __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)&am_dense_spread[mask]));
    word = _mm256_permutevar8x32_epi32(word, order);
    *words += 2 * (unsigned)__builtin_popcount(mask);
    *state = _mm256_blendv_epi8(next, _mm256_or_si256(_mm256_slli_epi32(next, 16), word), small);
    *marks = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_slli_epi32(slot, 11)));
    __m256i upper = _mm256_and_si256(slot, _mm256_set1_epi32((int)AM_DENSE_UPPER));
    return _mm256_srli_epi32(_mm256_and_si256(_mm256_add_epi32(upper, channel), _mm256_set1_epi32((int)AM_DENSE_UPPER)),
                             16);
}

AM_TARGET_AVX2 size_t am_dense_read_avx2(am_dense_reader *reader, uint16_t *values, size_t steps)
{
    __m256i a = _mm256_loadu_si256((const void *)reader->states);
    __m256i b = _mm256_loadu_si256((const void *)(reader->states + 8));
    __m256i c = _mm256_loadu_si256((const void *)(reader->states + 16));
    __m256i d = _mm256_loadu_si256((const void *)(reader->states + 24));
    uint32_t advance = AM_DENSE_LANES % reader->dim;
    size_t step = 0;
    for (; step < steps && reader->escapes - reader->words >= 64; step++, values += AM_DENSE_LANES) {
        const uint32_t *channels = reader->channels + reader->at;
        uint32_t marks[4];
        const uint8_t *words = reader->words;
        __m256i first = read8(&a, channels, &words, &marks[0]);
        __m256i second = read8(&b, channels + 8, &words, &marks[1]);
        __m256i third = read8(&c, channels + 16, &words, &marks[2]);
        __m256i fourth = read8(&d, channels + 24, &words, &marks[3]);
        reader->words = words;
        first = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
        third = _mm256_permute4x64_epi64(_mm256_packus_epi32(third, fourth), 0xd8);
        __m256i *at = (void *)values;
        _mm256_storeu_si256(at, _mm256_or_si256(_mm256_loadu_si256(at), first));
        _mm256_storeu_si256(at + 1, _mm256_or_si256(_mm256_loadu_si256(at + 1), third));
        uint32_t all = marks[0] | marks[1] << 8 | marks[2] << 16 | marks[3] << 24;
        if (all && take_escapes(reader, all, values))
            return SIZE_MAX;
        next_channels(reader, advance);
    }
    _mm256_storeu_si256((void *)reader->states, a);
    _mm256_storeu_si256((void *)(reader->states + 8), b);
    _mm256_storeu_si256((void *)(reader->states + 16), c);
    _mm256_storeu_si256((void *)(reader->states + 24), d);
    return step;
}

AM_TARGET_AVX512 static inline __m256i read16(__m512i *state, const uint32_t *channels, const uint8_t **words,
                                              uint32_t *marks)
{
    const __m512i low10 = _mm512_set1_epi32(1023);
    __m512i channel = _mm512_loadu_si512(channels);
    __m512i class = _mm512_and_si512(channel, _mm512_set1_epi32(AM_DENSE_CLASS));
    __m512i index = _mm512_ternarylogic_epi32(low10, *state, class, 0xca); /* low10 ? state : class */
    __m512i slot = _mm512_i32gather_epi32(index, am_dense_slots, 4);
    __m512i next = _mm512_mullo_epi32(_mm512_and_si512(slot, low10), _mm512_srli_epi32(*state, AM_DENSE_BITS));
    next = _mm512_add_epi32(next, _mm512_and_si512(_mm512_srli_epi32(slot, 10), low10));
    __mmask16 small = _mm512_cmplt_epu32_mask(next, _mm512_set1_epi32(AM_DENSE_LEAST));
    __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)*words));
    *words += 2 * (unsigned)__builtin_popcount(small);
    word = _mm512_maskz_expand_epi32(small, word);
    *state = _mm512_mask_or_epi32(next, small, _mm512_slli_epi32(next, 16), word);
    *marks = _mm512_test_epi32_mask(slot, _mm512_set1_epi32(AM_DENSE_ESCAPE));
    __m512i upper = _mm512_and_si512(slot, _mm512_set1_epi32((int)AM_DENSE_UPPER));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(upper, channel), 16));
}

AM_TARGET_AVX512 size_t am_dense_read_avx512(am_dense_reader *reader, uint16_t *values, size_t steps)
{
    const __m512i sign_exponent = _mm512_set1_epi16((short)0xff80);
    __m512i a = _mm512_loadu_si512(reader->states), b = _mm512_loadu_si512(reader->states + 16);
    uint32_t advance = AM_DENSE_LANES % reader->dim;
    size_t step = 0;
    for (; step < steps && reader->escapes - reader->words >= 64; step++, values += AM_DENSE_LANES) {
        const uint32_t *channels = reader->channels + reader->at;
        const uint8_t *words = reader->words;
        uint32_t first_marks, second_marks;
        __m256i first = read16(&a, channels, &words, &first_marks);
        __m256i second = read16(&b, channels + 16, &words, &second_marks);
        reader->words = words;
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        /* (both & sign_exponent) | values */
        _mm512_storeu_si512(values, _mm512_ternarylogic_epi32(both, sign_exponent, _mm512_loadu_si512(values), 0xea));
        uint32_t marks = first_marks | second_marks << 16;
        if (marks && take_escapes(reader, marks, values))
            return SIZE_MAX;
        next_channels(reader, advance);
    }
    _mm512_storeu_si512(reader->states, a);
    _mm512_storeu_si512(reader->states + 16, b);
    return step;
}

/* One symbol of 16 coders. */
AM_TARGET_AVX512 static inline __m512i write16(__m512i state, const uint8_t *codes, uint8_t **words)
{
    __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)codes));
    __m512i code = _mm512_i32gather_epi32(index, am_dense_codes, 4);
    __m512i reciprocal = _mm512_i32gather_epi32(index, am_dense_reciprocals, 4);
    __m512i frequency = _mm512_and_si512(code, _mm512_set1_epi32(1023));
    __mmask16 large = _mm512_cmpge_epu32_mask(state, _mm512_slli_epi32(frequency, 21));
    unsigned count = (unsigned)__builtin_popcount(large);
    *words -= 2 * count;
    _mm256_mask_storeu_epi16(*words, (__mmask16)((1u << count) - 1),
                             _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(large, state)));
    state = _mm512_mask_srli_epi32(state, large, state, 16);
    __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(state, reciprocal), 32);
    __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(state, 32), _mm512_srli_epi64(reciprocal, 32));
    __m512i whole = _mm512_srlv_epi32(_mm512_mask_blend_epi32(0xaaaa, even, odd), _mm512_srli_epi32(code, 21));
    whole = _mm512_mullo_epi32(whole, _mm512_sub_epi32(_mm512_set1_epi32(AM_DENSE_SLOTS), frequency));
    __m512i bias = _mm512_and_si512(_mm512_srli_epi32(code, 10), _mm512_set1_epi32(2047));
    return _mm512_add_epi32(_mm512_add_epi32(state, bias), whole);
}

AM_TARGET_AVX512 size_t am_dense_write_avx512(am_dense_writer *writer, const uint8_t *codes, size_t steps)
{
    __m512i a = _mm512_loadu_si512(writer->states), b = _mm512_loadu_si512(writer->states + 16);
    uint8_t *words = writer->words;
    for (; steps && words - writer->front >= 64; steps--) {
        const uint8_t *from = codes + (steps - 1) * AM_DENSE_LANES;
        b = write16(b, from + 16, &words);
        a = write16(a, from, &words);
    }
    writer->words = words;
    _mm512_storeu_si512(writer->states, a);
    _mm512_storeu_si512(writer->states + 16, b);
    return steps;
}

#endif

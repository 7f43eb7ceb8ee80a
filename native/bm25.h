/* BM25 of rows alone, with their two neighbours, and of whole sessions: the arithmetic of agentmem/_pure/bm25.py, the
 * same bits. Knows numbers only; every index that comes in is checked before it is used. */
#ifndef AM_BM25_H
#define AM_BM25_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    size_t count, documents;
    const uint8_t *allowed;         /* [count], 0 or 1 */
    const int32_t *length;          /* [count], words */
    const int32_t *previous, *next; /* [count], places of neighbours in the same session, -1 for none */
    const int32_t *document;        /* [count], below `documents` */
} am_bm25_rows;

/* Of the allowed rows: how many, their words, the words in all their windows, and documents with at least one. */
typedef struct {
    int64_t rows, words, window_words, documents;
} am_bm25_totals;

/* How rare a term is among rows, windows and documents. */
typedef struct {
    double row, window, document;
} am_bm25_rarity;

/* Fills `sessions` [documents] with the words of each document's allowed rows. */
void am_bm25_lengths(const am_bm25_rows *rows, int64_t *sessions, am_bm25_totals *totals);

/* Adds the terms' scores to `turn` and `window` [count] and `session` [documents]. Term t is in
 * places[starts[t]..starts[t + 1]) (ascending), times[] often; starts has terms + 1 entries, in order and within the
 * arrays. Returns 0, or -1 where there is no memory. */
int am_bm25_scores(const am_bm25_rows *rows, const int64_t *sessions, const am_bm25_totals *totals, size_t terms,
                   const int64_t *starts, const int32_t *places, const int32_t *times, float *turn, float *window,
                   float *session, am_bm25_rarity *rarities);

#endif

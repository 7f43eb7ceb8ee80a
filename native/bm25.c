/* BM25 over a view's rows: see bm25.h. */
#include "bm25.h"

#include <math.h>
#include <stdlib.h>

#define K1 1.2
#define B 0.75

/* Whether a place is one of an allowed row. */
static int held(const am_bm25_rows *rows, int32_t place)
{
    return (size_t)(uint32_t)place < rows->count && rows->allowed[place];
}

void am_bm25_lengths(const am_bm25_rows *rows, int64_t *sessions, am_bm25_totals *totals)
{
    am_bm25_totals sum = {0, 0, 0, 0};
    for (size_t i = 0; i < rows->documents; i++)
        sessions[i] = -1;
    for (size_t i = 0; i < rows->count; i++) {
        if (!rows->allowed[i])
            continue;
        int64_t words = rows->length[i];
        sum.rows++;
        sum.words += words;
        sum.window_words += words;
        if (held(rows, rows->previous[i]))
            sum.window_words += rows->length[rows->previous[i]];
        if (held(rows, rows->next[i]))
            sum.window_words += rows->length[rows->next[i]];
        if ((size_t)(uint32_t)rows->document[i] >= rows->documents)
            continue;
        int64_t *session = &sessions[rows->document[i]];
        if (*session < 0) {
            *session = 0;
            sum.documents++;
        }
        *session += words;
    }
    for (size_t i = 0; i < rows->documents; i++)
        if (sessions[i] < 0)
            sessions[i] = 0;
    *totals = sum;
}

static double rarity(int64_t count, size_t having)
{
    return log1p(((double)(count - (int64_t)having) + 0.5) / ((double)having + 0.5));
}

/* What a term that is `often` in a document, whose length is `size` times the usual one, adds to its score. */
static float added(float score, double rarity, double often, double size)
{
    return (float)((double)score + rarity * (often * (K1 + 1)) / (often + K1 * ((1 - B) + B * size)));
}

/* The usual length, or 0 where nothing has one. */
static double usual(int64_t words, int64_t count)
{
    return words && count ? (double)words / (double)count : 0;
}

static double size_of(int64_t words, double usual)
{
    return usual != 0 ? (double)words / usual : 1;
}

typedef struct {
    int64_t *windows, *sessions;              /* occurrences of the term; all 0 between terms */
    int32_t *touched_windows, *touched_sessions; /* which of them are not */
    size_t touched[2];
} scratch;

static void note(int64_t *counts, int32_t *touched, size_t *length, int32_t at, int32_t times)
{
    if (!counts[at])
        touched[(*length)++] = at;
    counts[at] += times;
}

static void term(const am_bm25_rows *rows, const int64_t *sessions, const am_bm25_totals *totals, size_t count,
                 const int32_t *places, const int32_t *times, float *turn, float *window, float *session,
                 am_bm25_rarity *rare, scratch *work)
{
    size_t having = 0;
    work->touched[0] = work->touched[1] = 0;
    for (size_t i = 0; i < count; i++) {
        int32_t place = places[i];
        if (!held(rows, place) || times[i] <= 0 || (size_t)(uint32_t)rows->document[place] >= rows->documents)
            continue;
        having++;
        note(work->windows, work->touched_windows, &work->touched[0], place, times[i]);
        if (held(rows, rows->previous[place]))
            note(work->windows, work->touched_windows, &work->touched[0], rows->previous[place], times[i]);
        if (held(rows, rows->next[place]))
            note(work->windows, work->touched_windows, &work->touched[0], rows->next[place], times[i]);
        note(work->sessions, work->touched_sessions, &work->touched[1], rows->document[place], times[i]);
    }
    rare->row = rarity(totals->rows, having);
    rare->window = rarity(totals->rows, work->touched[0]);
    rare->document = rarity(totals->documents, work->touched[1]);
    double mean = usual(totals->words, totals->rows);
    for (size_t i = 0; i < count; i++)
        if (held(rows, places[i]) && times[i] > 0)
            turn[places[i]] = added(turn[places[i]], rare->row, times[i], size_of(rows->length[places[i]], mean));
    mean = usual(totals->window_words, totals->rows);
    for (size_t i = 0; i < work->touched[0]; i++) {
        int32_t place = work->touched_windows[i];
        int64_t words = rows->length[place];
        if (held(rows, rows->previous[place]))
            words += rows->length[rows->previous[place]];
        if (held(rows, rows->next[place]))
            words += rows->length[rows->next[place]];
        window[place] = added(window[place], rare->window, (double)work->windows[place], size_of(words, mean));
        work->windows[place] = 0;
    }
    mean = usual(totals->words, totals->documents);
    for (size_t i = 0; i < work->touched[1]; i++) {
        int32_t at = work->touched_sessions[i];
        session[at] = added(session[at], rare->document, (double)work->sessions[at], size_of(sessions[at], mean));
        work->sessions[at] = 0;
    }
}

int am_bm25_scores(const am_bm25_rows *rows, const int64_t *sessions, const am_bm25_totals *totals, size_t terms,
                   const int64_t *starts, const int32_t *places, const int32_t *times, float *turn, float *window,
                   float *session, am_bm25_rarity *rarities)
{
    scratch work = {
        .windows = calloc(rows->count + 1, sizeof *work.windows),
        .sessions = calloc(rows->documents + 1, sizeof *work.sessions),
        .touched_windows = malloc((rows->count + 1) * sizeof *work.touched_windows),
        .touched_sessions = malloc((rows->documents + 1) * sizeof *work.touched_sessions),
    };
    int result = -1;
    if (work.windows && work.sessions && work.touched_windows && work.touched_sessions) {
        result = 0;
        for (size_t t = 0; t < terms; t++)
            term(rows, sessions, totals, (size_t)(starts[t + 1] - starts[t]), places + starts[t], times + starts[t],
                 turn, window, session, &rarities[t], &work);
    }
    free(work.windows);
    free(work.sessions);
    free(work.touched_windows);
    free(work.touched_sessions);
    return result;
}

/* Vectors of 16 floats as pieces of the level's own width, one text for all levels, which say PIECES, TARGET and INLINE.
 *
 * gcc cuts a vector wider than the registers into scalars; so it is cut here. Only plain arithmetic: what needs other
 * instructions is in the file of the level.
 */
#ifndef AM_ATTEND_LANES_H
#define AM_ATTEND_LANES_H

#include "attend.h"
#include "floats.h"

#define LANES 16u
#define WIDTH (16 / PIECES) /* lanes of a piece */

typedef float floats __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
/* As they lie in pages: at any address. */
typedef float loose_floats __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));
typedef int32_t loose_ints __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));

typedef struct {
    floats part[PIECES];
} v16;

#if PIECES == 1
#define EACH(PART) ((v16){{PART(0)}})
#elif PIECES == 2
#define EACH(PART) ((v16){{PART(0), PART(1)}})
#else
#define EACH(PART) ((v16){{PART(0), PART(1), PART(2), PART(3)}})
#endif

INLINE v16 all(float value)
{
    floats part = (floats){0} + value;
#define PART(i) part
    return EACH(PART);
#undef PART
}

INLINE v16 load(const void *from)
{
#define PART(i) (floats)((const loose_floats *)from)[i]
    return EACH(PART);
#undef PART
}

INLINE void store(void *to, v16 a)
{
    for (int i = 0; i < PIECES; i++)
        ((floats *)to)[i] = a.part[i];
}

INLINE v16 add(v16 a, v16 b)
{
#define PART(i) a.part[i] + b.part[i]
    return EACH(PART);
#undef PART
}

INLINE v16 subtract(v16 a, v16 b)
{
#define PART(i) a.part[i] - b.part[i]
    return EACH(PART);
#undef PART
}

INLINE v16 multiply(v16 a, v16 b)
{
#define PART(i) a.part[i] *b.part[i]
    return EACH(PART);
#undef PART
}

INLINE v16 magnitude(v16 a)
{
#define PART(i) (floats)((ints)a.part[i] & 0x7FFFFFFF)
    return EACH(PART);
#undef PART
}

/* 16 integers as floats. */
INLINE v16 from_integers(const int32_t *from)
{
#define PART(i) __builtin_convertvector(((const ints *)(const void *)from)[i], floats)
    return EACH(PART);
#undef PART
}

/* Lanes from `low` up to `high` of a, the others of b. */
INLINE v16 between(int32_t low, int32_t high, v16 a, v16 b)
{
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const ints *lane = (const ints *)(const void *)lanes;
#define SEEN(i) ((ints)(lane[i] >= low) & (ints)(lane[i] < high))
#define PART(i) (floats)((SEEN(i) & (ints)a.part[i]) | (~SEEN(i) & (ints)b.part[i]))
    return EACH(PART);
#undef PART
#undef SEEN
}

/* a times 2 to the power of the integer in the low bits of `rounded`, which is a small number plus MAGIC. */
INLINE v16 scale_by_power(v16 a, v16 rounded)
{
#define PART(i) a.part[i] * (floats)(((ints)rounded.part[i] - (0x4B400000 - 127)) << 23)
    return EACH(PART);
#undef PART
}

#endif

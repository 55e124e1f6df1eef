/* The sums of reduce.c, over elements start to stop, in vectors of one type of number: reduce.c includes this for double
 * and for float, with NAME, NUMBER, LANES, VECTOR, MASK and CHUNK set. NAME(load) fills as many vectors as STRIDE
 * elements take, and CHUNK elements are added up in these before NAME(widen) adds them to sums in double. What is left
 * behind the last whole STRIDE is added up in double at once.
 */
enum { NAME(vectors) = STRIDE / LANES };

/* out: sum of x squared. */
INLINE void NAME(squares)(const void *x, int64_t start, int64_t stop, int dtype, double *out) {
    doubles sums[WIDE] = {{0}};
    double rest = 0;
    int64_t i = start;
    while (i + STRIDE <= stop) {
        VECTOR some[NAME(vectors)] = {{0}}, a[NAME(vectors)];
        for (int64_t end = chunk(i, stop, CHUNK); i < end; i += STRIDE) {
            NAME(load)(x, i, dtype, a);
            for (int k = 0; k < NAME(vectors); k++) some[k] += a[k] * a[k];
        }
        NAME(widen)(some, sums);
    }
    for (; i < stop; i++) {
        double a = at(x, i, dtype);
        rest += a * a;
    }
    out[0] += total(sums) + rest;
}

/* out: sums of x squared, x times y, y squared. */
INLINE void NAME(products)(const void *x, const void *y, int64_t start, int64_t stop, int dtype, double *out) {
    doubles sums[3][WIDE] = {{{0}}};
    double rest[3] = {0};
    int64_t i = start;
    while (i + STRIDE <= stop) {
        VECTOR xx[NAME(vectors)] = {{0}}, xy[NAME(vectors)] = {{0}}, yy[NAME(vectors)] = {{0}};
        VECTOR a[NAME(vectors)], b[NAME(vectors)];
        for (int64_t end = chunk(i, stop, CHUNK); i < end; i += STRIDE) {
            NAME(load)(x, i, dtype, a);
            NAME(load)(y, i, dtype, b);
            for (int k = 0; k < NAME(vectors); k++) {
                xx[k] += a[k] * a[k];
                xy[k] += a[k] * b[k];
                yy[k] += b[k] * b[k];
            }
        }
        NAME(widen)(xx, sums[0]);
        NAME(widen)(xy, sums[1]);
        NAME(widen)(yy, sums[2]);
    }
    for (; i < stop; i++) {
        double a = at(x, i, dtype), b = at(y, i, dtype);
        rest[0] += a * a;
        rest[1] += a * b;
        rest[2] += b * b;
    }
    for (int k = 0; k < 3; k++) out[k] += total(sums[k]) + rest[k];
}

/* out: sums of (x minus y) squared, of x squared. */
INLINE void NAME(changes)(const void *x, const void *y, int64_t start, int64_t stop, int dtype, double *out) {
    doubles sums[2][WIDE] = {{{0}}};
    double rest[2] = {0};
    int64_t i = start;
    while (i + STRIDE <= stop) {
        VECTOR moved[NAME(vectors)] = {{0}}, xx[NAME(vectors)] = {{0}}, a[NAME(vectors)], b[NAME(vectors)];
        for (int64_t end = chunk(i, stop, CHUNK); i < end; i += STRIDE) {
            NAME(load)(x, i, dtype, a);
            NAME(load)(y, i, dtype, b);
            for (int k = 0; k < NAME(vectors); k++) {
                VECTOR change = a[k] - b[k];
                moved[k] += change * change;
                xx[k] += a[k] * a[k];
            }
        }
        NAME(widen)(moved, sums[0]);
        NAME(widen)(xx, sums[1]);
    }
    for (; i < stop; i++) {
        double a = at(x, i, dtype), change = a - at(y, i, dtype);
        rest[0] += change * change;
        rest[1] += a * a;
    }
    for (int k = 0; k < 2; k++) out[k] += total(sums[k]) + rest[k];
}

/* out: sum, largest entry (NaN where there is one), number of entries below the threshold. */
INLINE void NAME(nonnegative)(const void *x, int64_t start, int64_t stop, int dtype, NUMBER threshold, double *out) {
    doubles sums[WIDE] = {{0}};
    VECTOR largest[NAME(vectors)] = {{0}};
    MASK below[NAME(vectors)] = {{0}};
    double rest = 0, most = 0;
    int64_t i = start, number = 0;
    while (i + STRIDE <= stop) {
        VECTOR some[NAME(vectors)] = {{0}}, a[NAME(vectors)];
        for (int64_t end = chunk(i, stop, CHUNK); i < end; i += STRIDE) {
            NAME(load)(x, i, dtype, a);
            for (int k = 0; k < NAME(vectors); k++) {
                MASK more = a[k] > largest[k];
                some[k] += a[k];
                largest[k] = (VECTOR)((more & (MASK)a[k]) | (~more & (MASK)largest[k]));
                below[k] -= (MASK)(a[k] < threshold); /* true is -1 */
            }
        }
        NAME(widen)(some, sums);
    }
    for (; i < stop; i++) {
        double a = at(x, i, dtype);
        rest += a;
        most = larger(a, most);
        number += a < threshold;
    }
    for (int k = 0; k < NAME(vectors); k++)
        for (int j = 0; j < LANES; j++) {
            most = larger(largest[k][j], most);
            number += below[k][j];
        }
    double sum = total(sums) + rest;
    /* No comparison with a NaN is true, so that the largest would not show one; the sum does. */
    out[0] += sum;
    out[1] = larger(sum != sum ? sum : most, out[1]);
    out[2] += (double)number;
}

/* out: the numbers of this kind, of x or of x and y. */
INLINE void NAME(sums)(
    int kind, const void *x, const void *y, int64_t start, int64_t stop, int dtype, NUMBER threshold, double *out
) {
    if (kind == NONNEGATIVE) NAME(nonnegative)(x, start, stop, dtype, threshold, out);
    else if (kind == CHANGES) NAME(changes)(x, y, start, stop, dtype, out);
    else if (y) NAME(products)(x, y, start, stop, dtype, out);
    else NAME(squares)(x, start, stop, dtype, out);
}

#undef NAME
#undef NUMBER
#undef LANES
#undef VECTOR
#undef MASK
#undef CHUNK

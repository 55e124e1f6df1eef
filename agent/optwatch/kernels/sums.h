/* The sums of reduce.c, over elements start to stop, in vectors of one type of number: reduce.c includes this for double
 * and for float, with NAME, NUMBER, LANES, VECTOR and MASK set; NAME(load) fills as many vectors as STRIDE elements take.
 * What is left behind the last whole STRIDE is added up in double.
 */
enum { NAME(vectors) = STRIDE / LANES };

INLINE double NAME(total)(const VECTOR *sums) {
    VECTOR all = sums[0];
    for (int k = 1; k < NAME(vectors); k++) all += sums[k];
    double lanes[LANES];
    for (int j = 0; j < LANES; j++) lanes[j] = all[j];
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
    return lanes[0];
}

/* out: sum of x squared. */
INLINE void NAME(squares)(const void *x, int64_t start, int64_t stop, int dtype, double *out) {
    VECTOR sums[NAME(vectors)] = {{0}}, a[NAME(vectors)];
    double rest = 0;
    int64_t i = start;
    for (; i + STRIDE <= stop; i += STRIDE) {
        NAME(load)(x, i, dtype, a);
        for (int k = 0; k < NAME(vectors); k++) sums[k] += a[k] * a[k];
    }
    for (; i < stop; i++) {
        double a = at(x, i, dtype);
        rest += a * a;
    }
    out[0] += NAME(total)(sums) + rest;
}

/* out: sums of x squared, x times y, y squared. */
INLINE void NAME(products)(const void *x, const void *y, int64_t start, int64_t stop, int dtype, double *out) {
    VECTOR xx[NAME(vectors)] = {{0}}, xy[NAME(vectors)] = {{0}}, yy[NAME(vectors)] = {{0}};
    VECTOR a[NAME(vectors)], b[NAME(vectors)];
    double rest[3] = {0};
    int64_t i = start;
    for (; i + STRIDE <= stop; i += STRIDE) {
        NAME(load)(x, i, dtype, a);
        NAME(load)(y, i, dtype, b);
        for (int k = 0; k < NAME(vectors); k++) {
            xx[k] += a[k] * a[k];
            xy[k] += a[k] * b[k];
            yy[k] += b[k] * b[k];
        }
    }
    for (; i < stop; i++) {
        double a = at(x, i, dtype), b = at(y, i, dtype);
        rest[0] += a * a;
        rest[1] += a * b;
        rest[2] += b * b;
    }
    out[0] += NAME(total)(xx) + rest[0];
    out[1] += NAME(total)(xy) + rest[1];
    out[2] += NAME(total)(yy) + rest[2];
}

/* out: sums of (x minus y) squared, of x squared. */
INLINE void NAME(changes)(const void *x, const void *y, int64_t start, int64_t stop, int dtype, double *out) {
    VECTOR moved[NAME(vectors)] = {{0}}, xx[NAME(vectors)] = {{0}}, a[NAME(vectors)], b[NAME(vectors)];
    double rest[2] = {0};
    int64_t i = start;
    for (; i + STRIDE <= stop; i += STRIDE) {
        NAME(load)(x, i, dtype, a);
        NAME(load)(y, i, dtype, b);
        for (int k = 0; k < NAME(vectors); k++) {
            VECTOR change = a[k] - b[k];
            moved[k] += change * change;
            xx[k] += a[k] * a[k];
        }
    }
    for (; i < stop; i++) {
        double a = at(x, i, dtype), change = a - at(y, i, dtype);
        rest[0] += change * change;
        rest[1] += a * a;
    }
    out[0] += NAME(total)(moved) + rest[0];
    out[1] += NAME(total)(xx) + rest[1];
}

/* out: sum, largest entry (NaN where there is one), number of entries below the threshold. */
INLINE void NAME(nonnegative)(const void *x, int64_t start, int64_t stop, int dtype, NUMBER threshold, double *out) {
    VECTOR sums[NAME(vectors)] = {{0}}, largest[NAME(vectors)] = {{0}}, a[NAME(vectors)];
    MASK below[NAME(vectors)] = {{0}};
    double rest = 0, most = 0;
    int64_t i = start, number = 0;
    for (; i + STRIDE <= stop; i += STRIDE) {
        NAME(load)(x, i, dtype, a);
        for (int k = 0; k < NAME(vectors); k++) {
            MASK more = a[k] > largest[k];
            sums[k] += a[k];
            largest[k] = (VECTOR)((more & (MASK)a[k]) | (~more & (MASK)largest[k]));
            below[k] -= (MASK)(a[k] < threshold); /* true is -1 */
        }
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
    double sum = NAME(total)(sums) + rest;
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

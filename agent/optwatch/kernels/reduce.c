/* All statistics of many tensors in one pass over each, in double.
 *
 * The elements of all tensors, one after the other, are cut into spans of one length. Threads take spans one by one,
 * so a list of one large tensor and 2000 small ones is shared out evenly; and as the length does not depend on the
 * number of threads, neither does a bit of the result.
 *
 * Built without -ffast-math: what a NaN or an infinity does to a sum is part of the result.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT64, DTYPES };
enum { PRODUCTS, NONNEGATIVE, CHANGES };
/* Elements of the longest span and of the shortest, spans that a list has at least where they are longer than that, and
 * elements of a block that stays in the innermost cache. The processor begins to read ahead anew at each span. */
enum { LONGEST = 1 << 17, SHORTEST = 1 << 15, FEWEST = 64, BLOCK = 1 << 10 };
/* Bytes ahead of what is read that are asked for: the processor alone asks for too little at a time, and waits. */
enum { AHEAD = 512, LINE = 64 };
/* Vectors are written out, since compilers make poor ones of loops over bfloat16 and float16, and none of a sum, whose
 * order they keep: VECTORS sums of WIDTH lanes run side by side. */
enum { WIDTH = 8, VECTORS = 4, STRIDE = VECTORS * WIDTH };

typedef double doubles __attribute__((vector_size(WIDTH * sizeof(double))));
typedef int64_t mask __attribute__((vector_size(WIDTH * sizeof(int64_t))));
typedef float floats __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t integers __attribute__((vector_size(WIDTH * sizeof(int32_t))));
typedef uint32_t words __attribute__((vector_size(WIDTH * sizeof(uint32_t))));

#define INLINE static inline __attribute__((always_inline))

INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Element i. Every dtype of the kernel fits into a double exactly. */
INLINE double at(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT64) return ((const double *)p)[i];
    if (dtype == FLOAT32) return (double)((const float *)p)[i];
    uint32_t bits = ((const uint16_t *)p)[i];
    if (dtype == BFLOAT16) return (double)from_bits(bits << 16);
    /* float16: exponents move by 112, or by 224 for infinity and NaN; a subnormal is its mantissa times 2^-24. */
    uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    uint32_t normal = (magnitude << 13) + (112u << 23) + (magnitude >= 0x7c00u) * (112u << 23);
    float small = (float)(int32_t)magnitude * 0x1p-24f;
    uint32_t subnormal, is_subnormal = -(uint32_t)(magnitude < 0x0400u); /* all ones, for selecting without a branch */
    memcpy(&subnormal, &small, sizeof subnormal);
    return (double)from_bits((subnormal & is_subnormal) | (normal & ~is_subnormal) | sign);
}

/* As `at`, of eight float16 in the lower halves of words. */
INLINE doubles from_float16(words bits) {
    words magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    words normal = (magnitude << 13) + (112u << 23) + ((words)(magnitude >= 0x7c00u) & (112u << 23));
    words subnormal = (words)(__builtin_convertvector((integers)magnitude, floats) * 0x1p-24f);
    words is_subnormal = (words)(magnitude < 0x0400u);
    return __builtin_convertvector((floats)((subnormal & is_subnormal) | (normal & ~is_subnormal) | sign), doubles);
}

static const int64_t item_bytes[DTYPES] = {4, 2, 2, 8};

/* STRIDE elements from i on, in an order that is the same for every tensor of the dtype: of the 16-bit numbers in words
 * the lower ones come first, the upper ones behind, which takes no shuffling. */
INLINE void load(const void *p, int64_t i, int dtype, doubles *a) {
    /* Also beyond the end, where it does no harm: what follows is most often the next span's. */
    const char *ahead = (const char *)p + i * item_bytes[dtype] + AHEAD;
    for (int64_t line = 0; line < STRIDE * item_bytes[dtype]; line += LINE) __builtin_prefetch(ahead + line);
    for (int k = 0; k < VECTORS; k++) {
        if (dtype == FLOAT64) {
            memcpy(a + k, (const double *)p + i + k * WIDTH, sizeof *a);
        } else if (dtype == FLOAT32) {
            floats single;
            memcpy(&single, (const float *)p + i + k * WIDTH, sizeof single);
            a[k] = __builtin_convertvector(single, doubles);
        } else {
            words pairs;
            memcpy(&pairs, (const uint16_t *)p + i + k / 2 * 2 * WIDTH, sizeof pairs);
            if (dtype == BFLOAT16)
                a[k] = __builtin_convertvector((floats)(k % 2 ? pairs & 0xffff0000u : pairs << 16), doubles);
            else a[k] = from_float16(k % 2 ? pairs >> 16 : pairs & 0xffffu);
        }
    }
}

INLINE double total(const doubles *sums) {
    doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return ((all[0] + all[4]) + (all[1] + all[5])) + ((all[2] + all[6]) + (all[3] + all[7]));
}

/* out: sum of x squared. */
INLINE void squares(const void *x, int64_t start, int64_t stop, int dtype, double *out) {
    doubles sums[VECTORS] = {{0}}, a[VECTORS];
    double rest = 0;
    int64_t i = start;
    for (; i + STRIDE <= stop; i += STRIDE) {
        load(x, i, dtype, a);
        for (int k = 0; k < VECTORS; k++) sums[k] += a[k] * a[k];
    }
    for (; i < stop; i++) {
        double a = at(x, i, dtype);
        rest += a * a;
    }
    out[0] += total(sums) + rest;
}

/* out: sums of x squared, x times y, y squared. */
INLINE void products(const void *x, const void *y, int64_t start, int64_t stop, int dtype, double *out) {
    doubles xx[VECTORS] = {{0}}, xy[VECTORS] = {{0}}, yy[VECTORS] = {{0}}, a[VECTORS], b[VECTORS];
    double rest[3] = {0};
    int64_t i = start;
    for (; i + STRIDE <= stop; i += STRIDE) {
        load(x, i, dtype, a);
        load(y, i, dtype, b);
        for (int k = 0; k < VECTORS; k++) {
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
    out[0] += total(xx) + rest[0];
    out[1] += total(xy) + rest[1];
    out[2] += total(yy) + rest[2];
}

/* out: sums of (x minus y) squared, of x squared. */
INLINE void changes(const void *x, const void *y, int64_t start, int64_t stop, int dtype, double *out) {
    doubles moved[VECTORS] = {{0}}, xx[VECTORS] = {{0}}, a[VECTORS], b[VECTORS];
    double rest[2] = {0};
    int64_t i = start;
    for (; i + STRIDE <= stop; i += STRIDE) {
        load(x, i, dtype, a);
        load(y, i, dtype, b);
        for (int k = 0; k < VECTORS; k++) {
            doubles change = a[k] - b[k];
            moved[k] += change * change;
            xx[k] += a[k] * a[k];
        }
    }
    for (; i < stop; i++) {
        double a = at(x, i, dtype), change = a - at(y, i, dtype);
        rest[0] += change * change;
        rest[1] += a * a;
    }
    out[0] += total(moved) + rest[0];
    out[1] += total(xx) + rest[1];
}

/* Of a NaN and a number the NaN. */
INLINE double larger(double a, double b) { return a > b || a != a ? a : b; }

/* out: sum, largest entry (NaN where there is one), number of entries below the threshold. */
INLINE void nonnegative(const void *x, int64_t start, int64_t stop, int dtype, double threshold, double *out) {
    doubles sums[VECTORS] = {{0}}, largest[VECTORS] = {{0}}, a[VECTORS];
    mask below[VECTORS] = {{0}};
    double rest = 0, most = 0;
    int64_t i = start, number = 0;
    for (; i + STRIDE <= stop; i += STRIDE) {
        load(x, i, dtype, a);
        for (int k = 0; k < VECTORS; k++) {
            mask more = a[k] > largest[k];
            sums[k] += a[k];
            largest[k] = (doubles)((more & (mask)a[k]) | (~more & (mask)largest[k]));
            below[k] -= (mask)(a[k] < threshold); /* true is -1 */
        }
    }
    for (; i < stop; i++) {
        double a = at(x, i, dtype);
        rest += a;
        most = larger(a, most);
        number += a < threshold;
    }
    for (int k = 0; k < VECTORS; k++)
        for (int j = 0; j < WIDTH; j++) {
            most = larger(largest[k][j], most);
            number += below[k][j];
        }
    double sum = total(sums) + rest;
    /* No comparison with a NaN is true, so that the largest would not show one; the sum does. */
    out[0] += sum;
    out[1] = larger(sum != sum ? sum : most, out[1]);
    out[2] += (double)number;
}

/* A list of tensors that are reduced alike, and where its numbers go: as Python writes it. */
struct list {
    int64_t kind, count, rows; /* of each tensor's three numbers the first `rows` are wanted */
    double *out;               /* number k of tensor t at out[k * stride + t] */
    int64_t stride, pairs;     /* tensors of which all three numbers are wanted elsewhere, too */
    const int64_t *positions;  /* theirs in the list */
    double *pairs_out;         /* number k of the i-th of them at pairs_out[k * pairs_stride + i] */
    int64_t pairs_stride;
};

/* One call of optwatch_reduce, as its threads see it. */
struct work {
    int64_t n;
    const uint8_t *kinds;
    const uint64_t *xs, *ys;
    const uint8_t *x_dtypes, *y_dtypes;
    const double *thresholds;
    const int64_t *sizes;
    int64_t *ends;     /* of each tensor, in the elements of all */
    double (*parts)[2][3]; /* of each span, for tensors that reach into it and beyond it: its first and its last */
    double (*out)[3];
    int64_t span, spans, next;
};

#define EACH_DTYPE(CASE) CASE(FLOAT32) CASE(BFLOAT16) CASE(FLOAT16) CASE(FLOAT64)

/* Elements start to stop of a tensor, or of a pair of one dtype, straight from memory. */
static void alike(
    int kind, const void *x, const void *y, int64_t start, int64_t stop, int dtype, double threshold, double *out
) {
    switch (dtype) {
#define CASE(d) \
    case d: \
        if (kind == NONNEGATIVE) nonnegative(x, start, stop, d, threshold, out); \
        else if (kind == CHANGES) changes(x, y, start, stop, d, out); \
        else if (y) products(x, y, start, stop, d, out); \
        else squares(x, start, stop, d, out); \
        return;
        EACH_DTYPE(CASE)
#undef CASE
    }
}

/* Elements start to stop, widened into a block. */
static void widen(const void *x, int64_t start, int64_t stop, int dtype, double *block) {
    switch (dtype) {
#define CASE(d) \
    case d: \
        for (int64_t i = start; i < stop; i++) block[i - start] = at(x, i, d); \
        return;
        EACH_DTYPE(CASE)
#undef CASE
    }
}

/* Elements start to stop of one tensor. */
static void piece(const struct work *w, int64_t tensor, int64_t start, int64_t stop, double *out) {
    const void *x = (const void *)(uintptr_t)w->xs[tensor];
    const void *y = w->ys ? (const void *)(uintptr_t)w->ys[tensor] : 0;
    double threshold = w->thresholds ? w->thresholds[tensor] : -__builtin_inf();
    int kind = w->kinds[tensor];
    if (!y || w->x_dtypes[tensor] == w->y_dtypes[tensor]) {
        alike(kind, x, y, start, stop, w->x_dtypes[tensor], threshold, out);
        return;
    }
    double left[BLOCK], right[BLOCK];
    for (int64_t i = start; i < stop; i += BLOCK) {
        int64_t end = i + BLOCK < stop ? i + BLOCK : stop;
        widen(x, i, end, w->x_dtypes[tensor], left);
        widen(y, i, end, w->y_dtypes[tensor], right);
        alike(kind, left, right, 0, end - i, FLOAT64, threshold, out);
    }
}

/* The first tensor that ends behind `position`. */
static int64_t tensor_at(const struct work *w, int64_t position) {
    int64_t low = 0, high = w->n - 1;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (w->ends[middle] > position) high = middle;
        else low = middle + 1;
    }
    return low;
}

static void run(void *argument) {
    struct work *w = argument;
    int64_t all = w->ends[w->n - 1], length = w->span, span;
    while ((span = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->spans) {
        int64_t from = span * length, to = from + length < all ? from + length : all;
        for (int64_t t = tensor_at(w, from); t < w->n && w->ends[t] - w->sizes[t] < to; t++) {
            int64_t begin = w->ends[t] - w->sizes[t];
            int64_t start = begin < from ? from : begin, stop = w->ends[t] < to ? w->ends[t] : to;
            double *out = begin < from ? w->parts[span][0] : w->ends[t] > to ? w->parts[span][1] : w->out[t];
            if (start < stop) piece(w, t, start - begin, stop - begin, out);
        }
    }
}

/* Add up what the spans found of tensors that lie in several of them. */
static void fold(struct work *w) {
    for (int64_t t = 0; t < w->n; t++) {
        int64_t begin = w->ends[t] - w->sizes[t];
        if (!w->sizes[t]) continue;
        int64_t first = begin / w->span, last = (w->ends[t] - 1) / w->span;
        for (int64_t span = first; first < last && span <= last; span++) {
            const double *part = w->parts[span][begin < span * w->span ? 0 : 1];
            w->out[t][0] += part[0];
            w->out[t][1] = w->kinds[t] == NONNEGATIVE ? larger(part[1], w->out[t][1]) : w->out[t][1] + part[1];
            w->out[t][2] += part[2];
        }
    }
}

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

/* Where the numbers of each list are wanted. */
static void deliver(const struct list *lists, int64_t count, double (*found)[3]) {
    for (const struct list *l = lists; l < lists + count; found += l->count, l++) {
        for (int64_t k = 0; k < l->rows; k++)
            for (int64_t t = 0; t < l->count; t++) l->out[k * l->stride + t] = found[t][k];
        for (int64_t k = 0; k < 3; k++)
            for (int64_t i = 0; i < l->pairs; i++) l->pairs_out[k * l->pairs_stride + i] = found[l->positions[i]][k];
    }
}

/* Reduce the dense tensors of some lists in one go: n in all, those of the first list first. Three numbers of each.
 * PRODUCTS: sum x², sum xy, sum y², the last two 0 where ys is null or ys[t] is 0.
 * CHANGES: sum (x - y)², sum x², 0, every ys[t] given.
 * NONNEGATIVE: sum x, max x (0 for none), number of x < thresholds[t] (0 without thresholds).
 *
 * `parallel` is GOMP_parallel of the OpenMP runtime whose threads the caller uses anyway, or null for one thread.
 * Returns 0; 1 for a tensor without memory or of an unknown dtype, 2 where memory ran out: then nothing is written.
 */
int optwatch_reduce(
    const struct list *lists, int64_t count, const uint64_t *xs, const uint8_t *x_dtypes, const uint64_t *ys,
    const uint8_t *y_dtypes, const int64_t *sizes, const double *thresholds, int threads, parallel_function parallel
) {
    struct work w = {
        .xs = xs, .ys = ys, .x_dtypes = x_dtypes, .y_dtypes = y_dtypes, .sizes = sizes, .thresholds = thresholds,
    };
    int64_t all = 0, t = 0;
    for (const struct list *l = lists; l < lists + count; l++)
        for (w.n += l->count; t < w.n; t++) {
            int paired = ys && ys[t], unknown = x_dtypes[t] >= DTYPES || (paired && y_dtypes[t] >= DTYPES);
            int missing = sizes[t] && (!xs[t] || (l->kind == CHANGES && !paired));
            if (missing || unknown || sizes[t] < 0) return 1;
            all += sizes[t];
        }
    for (w.span = LONGEST; w.span > SHORTEST && all / w.span < FEWEST; w.span /= 2) {}
    w.spans = (all + w.span - 1) / w.span;
    int64_t *ends = w.ends = malloc((size_t)(w.n + 1) * sizeof *w.ends);
    uint8_t *kinds = malloc((size_t)w.n + 1);
    w.kinds = kinds;
    w.out = calloc((size_t)w.n + 1, sizeof *w.out);
    w.parts = calloc((size_t)w.spans + 1, sizeof *w.parts);
    int result = 2;
    if (ends && kinds && w.out && w.parts) {
        int64_t end = 0;
        for (const struct list *l = lists; l < lists + count; l++) {
            memset(kinds, (int)l->kind, (size_t)l->count);
            kinds += l->count;
        }
        for (t = 0; t < w.n; t++) ends[t] = end += sizes[t];
        int64_t useful = w.spans < threads ? w.spans : threads;
        if (parallel && useful > 1) parallel(run, &w, (unsigned)useful, 0);
        else if (w.spans) run(&w);
        fold(&w);
        deliver(lists, count, w.out);
        result = 0;
    }
    free(ends);
    free((void *)w.kinds);
    free(w.out);
    free(w.parts);
    return result;
}

/* One call of optwatch_largest, as its threads see it. */
struct search {
    const char *x;
    int64_t size, next;
    int bytes;
    uint64_t most; /* bits of the largest magnitude so far */
};

/* Magnitudes order as their bits do, infinity above all numbers and every NaN above infinity. */
#define LARGEST(WIDTH) \
    INLINE uint64_t largest_##WIDTH(const uint##WIDTH##_t *bits, int64_t size) { \
        uint##WIDTH##_t most = 0; \
        for (int64_t i = 0; i < size; i++) { \
            uint##WIDTH##_t magnitude = bits[i] & (((uint##WIDTH##_t)1 << (WIDTH - 1)) - 1); \
            most = magnitude > most ? magnitude : most; \
        } \
        return most; \
    }
LARGEST(16)
LARGEST(32)
LARGEST(64)

static void look(void *argument) {
    struct search *s = argument;
    uint64_t most = 0;
    int64_t from;
    while ((from = __atomic_fetch_add(&s->next, SHORTEST, __ATOMIC_RELAXED)) < s->size) {
        int64_t count = s->size - from < SHORTEST ? s->size - from : SHORTEST;
        const void *x = s->x + from * s->bytes;
        uint64_t found = s->bytes == 2 ? largest_16(x, count) : s->bytes == 4 ? largest_32(x, count) : largest_64(x, count);
        most = found > most ? found : most;
    }
    uint64_t known = __atomic_load_n(&s->most, __ATOMIC_RELAXED);
    while (most > known && !__atomic_compare_exchange_n(&s->most, &known, most, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

/* The largest magnitude of one dense tensor: NaN where it holds a NaN, 0 of none. -1 for one without memory. */
double optwatch_largest(uint64_t x, int64_t size, uint8_t dtype, int threads, parallel_function parallel) {
    if (dtype >= DTYPES || (size && !x)) return -1;
    struct search s = {.x = (const char *)(uintptr_t)x, .size = size, .bytes = (int)item_bytes[dtype]};
    int64_t useful = (size + SHORTEST - 1) / SHORTEST < threads ? (size + SHORTEST - 1) / SHORTEST : threads;
    if (parallel && useful > 1) parallel(look, &s, (unsigned)useful, 0);
    else look(&s);
    return at(&s.most, 0, dtype);
}

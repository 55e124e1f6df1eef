/* All statistics of many tensors in one pass over each; and copies of them. Sums are in double, those of numbers of 16
 * bits in float for a block at a time.
 *
 * The elements of all tensors, one after the other, are cut into spans of one length. Threads take spans one by one,
 * so a list of one large tensor and 2000 small ones is shared out evenly; and as the length does not depend on the
 * number of threads, neither does a bit of the result.
 *
 * Built without -ffast-math: what a NaN or an infinity does to a sum is part of the result.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT64, DTYPES };
enum { PRODUCTS, NONNEGATIVE, CHANGES, COPY };
/* Elements of the longest span and of the shortest, spans that a list has at least where they are longer than that, and
 * elements of a block that stays in the innermost cache. The processor begins to read ahead anew at each span. */
enum { LONGEST = 1 << 17, SHORTEST = 1 << 15, FEWEST = 64, BLOCK = 1 << 10 };
/* Bytes ahead of what is read that are asked for: the processor alone asks for too little at a time, and waits. */
enum { AHEAD = 512, LINE = 64 };
/* Vectors are written out, since compilers make poor ones of loops over bfloat16 and float16, and none of a sum, whose
 * order they keep. STRIDE elements are read at a time. */
enum { STRIDE = 32, WIDTH = 8, NARROW_WIDTH = 16, WIDE = STRIDE / WIDTH };
/* Elements of 16 bits that are added up in float, eight a lane, before they go into a double: a hundred millionth of
 * the sum is lost. Rounding down and up do not cancel here, as an odd number's square leaves 1 when divided by 8: with
 * 128 a lane it is twenty times as much, however many numbers there are. And elements after which it is asked whether a
 * float has held them. */
enum { NARROW_CHUNK = 8 * STRIDE, NARROW_BLOCK = 1 << 12 };

typedef double doubles __attribute__((vector_size(WIDTH * sizeof(double))));
typedef int64_t mask __attribute__((vector_size(WIDTH * sizeof(int64_t))));
typedef float half_floats __attribute__((vector_size(WIDTH * sizeof(float))));
typedef float floats __attribute__((vector_size(NARROW_WIDTH * sizeof(float))));
typedef int32_t integers __attribute__((vector_size(NARROW_WIDTH * sizeof(int32_t))));
typedef uint32_t words __attribute__((vector_size(NARROW_WIDTH * sizeof(uint32_t))));

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

/* As `at`, of float16 in the lower halves of words. */
INLINE floats from_float16(words bits) {
    words magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    words normal = (magnitude << 13) + (112u << 23) + ((words)(magnitude >= 0x7c00u) & (112u << 23));
    words subnormal = (words)(__builtin_convertvector((integers)magnitude, floats) * 0x1p-24f);
    words is_subnormal = (words)(magnitude < 0x0400u);
    return (floats)((subnormal & is_subnormal) | (normal & ~is_subnormal) | sign);
}

static const int64_t item_bytes[DTYPES] = {4, 2, 2, 8};

/* Asks for STRIDE elements AHEAD of i. Also beyond the end, where it does no harm: what follows is most often the next
 * span's. */
INLINE void ask(const void *p, int64_t i, int dtype) {
    const char *ahead = (const char *)p + i * item_bytes[dtype] + AHEAD;
    for (int64_t line = 0; line < STRIDE * item_bytes[dtype]; line += LINE) __builtin_prefetch(ahead + line);
}

/* STRIDE elements of 16 bits from i on: of the numbers in words the lower ones come first, the upper ones behind, which
 * takes no shuffling. */
INLINE void float_load(const void *p, int64_t i, int dtype, floats *a) {
    ask(p, i, dtype);
    words pairs;
    memcpy(&pairs, (const uint16_t *)p + i, sizeof pairs);
    if (dtype == BFLOAT16) {
        a[0] = (floats)(pairs << 16);
        a[1] = (floats)(pairs & 0xffff0000u);
    } else {
        a[0] = from_float16(pairs & 0xffffu);
        a[1] = from_float16(pairs >> 16);
    }
}

/* STRIDE elements from i on, in an order that is the same for every tensor of the dtype. */
INLINE void double_load(const void *p, int64_t i, int dtype, doubles *a) {
    floats both[STRIDE / NARROW_WIDTH];
    if (dtype == BFLOAT16 || dtype == FLOAT16) float_load(p, i, dtype, both);
    else ask(p, i, dtype);
    for (int k = 0; k < WIDE; k++) {
        half_floats single;
        if (dtype == FLOAT64) {
            memcpy(a + k, (const double *)p + i + k * WIDTH, sizeof *a);
            continue;
        }
        if (dtype == FLOAT32) memcpy(&single, (const float *)p + i + k * WIDTH, sizeof single);
        else memcpy(&single, (const char *)both + k * sizeof single, sizeof single);
        a[k] = __builtin_convertvector(single, doubles);
    }
}

/* Of a NaN and a number the NaN. */
INLINE double larger(double a, double b) { return a > b || a != a ? a : b; }

INLINE void double_widen(const doubles *some, doubles *sums) {
    for (int k = 0; k < WIDE; k++) sums[k] += some[k];
}

INLINE void float_widen(const floats *some, doubles *sums) {
    for (int k = 0; k < WIDE / 2; k++) {
        floats whole = some[k];
        half_floats halves[2];
        memcpy(halves, &whole, sizeof whole);
        sums[2 * k] += __builtin_convertvector(halves[0], doubles);
        sums[2 * k + 1] += __builtin_convertvector(halves[1], doubles);
    }
}

INLINE double total(const doubles *sums) {
    doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return ((all[0] + all[4]) + (all[1] + all[5])) + ((all[2] + all[6]) + (all[3] + all[7]));
}

/* Where the whole strides end of a chunk that begins at i. */
INLINE int64_t chunk(int64_t i, int64_t stop, int64_t length) {
    int64_t whole = i + (stop - i) / STRIDE * STRIDE;
    return whole - i < length ? whole : i + length;
}

#define NAME(function) double_##function
#define CHUNK INT64_MAX
#define NUMBER double
#define LANES WIDTH
#define VECTOR doubles
#define MASK mask
#include "sums.h"

#define NAME(function) float_##function
#define CHUNK NARROW_CHUNK
#define NUMBER float
#define LANES NARROW_WIDTH
#define VECTOR floats
#define MASK integers
#include "sums.h"

INLINE void copy(const void *x, void *y, int64_t start, int64_t stop, int dtype) {
    int64_t first = start * item_bytes[dtype];
    memcpy((char *)y + first, (const char *)x + first, (size_t)((stop - start) * item_bytes[dtype]));
}

/* A list of tensors that are reduced alike, the tensors that make pairs with some of them, and where its numbers go: as
 * Python writes it. */
struct list {
    int64_t kind, count;
    const uint64_t *xs;
    const int64_t *sizes;
    const uint8_t *dtypes;
    const double *thresholds;
    int64_t paired;
    const uint64_t *ys;
    const int64_t *y_sizes;
    const uint8_t *y_dtypes;
    const int64_t *positions; /* in the list, of the x of each y */
    int64_t rows;             /* of each tensor's three numbers the first `rows` are wanted */
    double *out;              /* number k of tensor t at out[k * stride + t] */
    int64_t stride;
    int64_t pairs_rows;       /* and of those of the pairs, once more */
    double *pairs_out;        /* number k of the i-th pair at pairs_out[k * pairs_stride + i] */
    int64_t pairs_stride;
};

/* A tensor, or a pair. */
struct tensor {
    const void *x, *y;
    double threshold;
    int64_t size, end; /* `end` in the elements of all */
    uint8_t kind, x_dtype, y_dtype;
};

/* One call of optwatch_reduce, as its threads see it. */
struct work {
    int64_t n;
    struct tensor *tensors;
    double (*out)[3];
    double (*parts)[2][3]; /* of each span, for tensors that reach into it and beyond it: its first and its last */
    int64_t span, spans, next;
};

#define EACH_DTYPE(CASE) CASE(FLOAT32) CASE(BFLOAT16) CASE(FLOAT16) CASE(FLOAT64)

/* Adds numbers of one part of a tensor to those of another. */
INLINE void add(int kind, const double *part, double *out) {
    out[0] += part[0];
    out[1] = kind == NONNEGATIVE ? larger(part[1], out[1]) : out[1] + part[1];
    out[2] += part[2];
}

/* Whether a sum of squares of NARROW_BLOCK numbers that was taken in float is as good as one in double: nothing has
 * overflowed, and what was too small to be added is too small to matter. */
INLINE int holds(double squares) { return squares >= 0x1p-90 && squares < __builtin_inf(); }

/* The smallest float that is not below `x`, which is not negative or infinite: no float lies between the two. */
INLINE float above(double x) {
    float nearest = (float)x;
    uint32_t bits;
    memcpy(&bits, &nearest, sizeof bits);
    return (double)nearest < x ? from_bits(bits + 1) : nearest;
}

/* Elements start to stop of 16 bits, in float and, where the range of a float does not do, once more in double. */
INLINE void narrow(
    int kind, const void *x, const void *y, int64_t start, int64_t stop, int dtype, double threshold, double *out
) {
    float limit = above(threshold);
    for (int64_t i = start; i < stop; i += NARROW_BLOCK) {
        int64_t end = i + NARROW_BLOCK < stop ? i + NARROW_BLOCK : stop;
        double part[3] = {0};
        float_sums(kind, x, y, i, end, dtype, limit, part);
        int good = kind == NONNEGATIVE ? part[0] < __builtin_inf() : holds(part[0]);
        if (kind == CHANGES) good = good && holds(part[1]);
        else if (y) good = good && holds(part[2]);
        if (!good) {
            memset(part, 0, sizeof part);
            double_sums(kind, x, y, i, end, dtype, threshold, part);
        }
        add(kind, part, out);
    }
}

/* Elements start to stop of a tensor, or of a pair of one dtype, straight from memory. */
static void alike(
    int kind, const void *x, const void *y, int64_t start, int64_t stop, int dtype, double threshold, double *out
) {
    switch (dtype) {
#define CASE(d) \
    case d: \
        if (kind == COPY) copy(x, (void *)y, start, stop, d); \
        else if (d == BFLOAT16 || d == FLOAT16) narrow(kind, x, y, start, stop, d, threshold, out); \
        else double_sums(kind, x, y, start, stop, d, threshold, out); \
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
static void piece(const struct tensor *t, int64_t start, int64_t stop, double *out) {
    if (!t->y || t->x_dtype == t->y_dtype) {
        alike(t->kind, t->x, t->y, start, stop, t->x_dtype, t->threshold, out);
        return;
    }
    double left[BLOCK], right[BLOCK];
    for (int64_t i = start; i < stop; i += BLOCK) {
        int64_t end = i + BLOCK < stop ? i + BLOCK : stop;
        widen(t->x, i, end, t->x_dtype, left);
        widen(t->y, i, end, t->y_dtype, right);
        alike(t->kind, left, right, 0, end - i, FLOAT64, t->threshold, out);
    }
}

/* The first tensor that ends behind `position`. */
static int64_t tensor_at(const struct work *w, int64_t position) {
    int64_t low = 0, high = w->n - 1;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (w->tensors[middle].end > position) high = middle;
        else low = middle + 1;
    }
    return low;
}

static void run(void *argument) {
    struct work *w = argument;
    int64_t all = w->tensors[w->n - 1].end, length = w->span, span;
    while ((span = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->spans) {
        int64_t from = span * length, to = from + length < all ? from + length : all;
        for (int64_t i = tensor_at(w, from); i < w->n && w->tensors[i].end - w->tensors[i].size < to; i++) {
            const struct tensor *t = w->tensors + i;
            int64_t begin = t->end - t->size;
            int64_t start = begin < from ? from : begin, stop = t->end < to ? t->end : to;
            double *out = begin < from ? w->parts[span][0] : t->end > to ? w->parts[span][1] : w->out[i];
            if (start < stop) piece(t, start - begin, stop - begin, out);
        }
    }
}

/* Add up what the spans found of tensors that lie in several of them. */
static void fold(struct work *w) {
    for (int64_t i = 0; i < w->n; i++) {
        const struct tensor *t = w->tensors + i;
        int64_t begin = t->end - t->size;
        if (!t->size) continue;
        int64_t first = begin / w->span, last = (t->end - 1) / w->span;
        for (int64_t span = first; first < last && span <= last; span++) {
            const double *part = w->parts[span][begin < span * w->span ? 0 : 1];
            add(t->kind, part, w->out[i]);
        }
    }
}

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

/* Where the numbers of each list are wanted. */
static void deliver(const struct list *lists, int64_t count, double (*found)[3]) {
    for (const struct list *l = lists; l < lists + count; found += l->count, l++) {
        for (int64_t k = 0; k < l->rows; k++)
            for (int64_t t = 0; t < l->count; t++) l->out[k * l->stride + t] = found[t][k];
        for (int64_t k = 0; k < l->pairs_rows; k++)
            for (int64_t i = 0; i < l->paired; i++) l->pairs_out[k * l->pairs_stride + i] = found[l->positions[i]][k];
    }
}

/* The tensors of all lists, one after the other, and how many elements these are; -1 where one cannot be read. */
static int64_t gather(const struct list *lists, int64_t count, struct tensor *tensors) {
    int64_t all = 0;
    for (const struct list *l = lists; l < lists + count; tensors += l->count, l++) {
        for (int64_t t = 0; t < l->count; t++) {
            if (l->dtypes[t] >= DTYPES || l->sizes[t] < 0 || (l->sizes[t] && !l->xs[t])) return -1;
            all += l->sizes[t];
            tensors[t] = (struct tensor){
                .x = (const void *)(uintptr_t)l->xs[t],
                .threshold = l->thresholds ? l->thresholds[t] : -__builtin_inf(),
                .size = l->sizes[t],
                .end = all,
                .kind = (uint8_t)l->kind,
                .x_dtype = l->dtypes[t],
            };
        }
        for (int64_t i = 0; i < l->paired; i++) {
            int64_t t = l->positions[i];
            if (t < 0 || t >= l->count || l->y_sizes[i] != l->sizes[t] || l->y_dtypes[i] >= DTYPES) return -1;
            if (l->kind == COPY && l->y_dtypes[i] != l->dtypes[t]) return -1;
            tensors[t].y = (const void *)(uintptr_t)l->ys[i];
            tensors[t].y_dtype = l->y_dtypes[i];
        }
        int all_paired = l->kind == CHANGES || l->kind == COPY;
        for (int64_t t = 0; all_paired && t < l->count; t++)
            if (l->sizes[t] && !tensors[t].y) return -1;
    }
    return all;
}

static pthread_key_t key;
static int usable;

static void make_key(void) { usable = !pthread_key_create(&key, free); }

/* Memory for a call of this thread, kept for its next one and freed with it: see locate.cpp for what an allocation costs
 * behind a step. Null where there is none. */
static void *scratch(size_t size) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_key);
    if (!usable) return 0;
    size_t *kept = pthread_getspecific(key); /* its size is in front of it */
    if (!kept || *kept < size) {
        free(kept);
        kept = malloc(LINE + size);
        if (kept) *kept = size;
        if (pthread_setspecific(key, kept)) {
            free(kept);
            kept = 0;
        }
    }
    return kept ? (char *)kept + LINE : 0;
}

/* Reduce the dense tensors of some lists in one go. Three numbers of each.
 * PRODUCTS: sum x², sum xy, sum y², the last two 0 of a tensor without a pair.
 * CHANGES: sum (x - y)², sum x², 0, every tensor in a pair.
 * NONNEGATIVE: sum x, max x (0 for none), number of x < its threshold (0 without thresholds).
 * COPY: no numbers; every x is copied to its y, which is of its dtype.
 *
 * `parallel` is GOMP_parallel of the OpenMP runtime whose threads the caller uses anyway, or null for one thread.
 * Returns 0; 1 for a tensor without memory or of an unknown dtype, or a pair of two sizes, 2 where memory ran out: then
 * nothing is written.
 */
int optwatch_reduce(const struct list *lists, int64_t count, int threads, parallel_function parallel) {
    struct work w = {.span = LONGEST};
    int64_t all = 0;
    for (const struct list *l = lists; l < lists + count; l++) {
        w.n += l->count;
        for (int64_t t = 0; t < l->count; t++) all += l->sizes[t] > 0 ? l->sizes[t] : 0;
    }
    if (!w.n) return 0;
    while (w.span > SHORTEST && all / w.span < FEWEST) w.span /= 2;
    w.spans = (all + w.span - 1) / w.span;
    size_t tensors = (size_t)w.n * sizeof *w.tensors, out = (size_t)w.n * sizeof *w.out;
    size_t parts = (size_t)w.spans * sizeof *w.parts;
    char *memory = scratch(tensors + out + parts);
    if (!memory) return 2;
    w.tensors = (struct tensor *)memory;
    w.out = (double(*)[3])(memory + tensors);
    w.parts = (double(*)[2][3])(memory + tensors + out);
    memset(w.out, 0, out + parts);
    if (gather(lists, count, w.tensors) < 0) return 1;
    int64_t useful = w.spans < threads ? w.spans : threads;
    if (parallel && useful > 1) parallel(run, &w, (unsigned)useful, 0);
    else if (w.spans) run(&w);
    fold(&w);
    deliver(lists, count, w.out);
    return 0;
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

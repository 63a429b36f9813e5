/* Stacks of multilayer perceptrons, y = (... act(act(x W0 + b0) W1 + b1) ...) of N independent networks, for
 * `mbrl/stacked.py`.
 *
 * Rows of a network are shared out in blocks of `each`, and a task takes a block through all layers, so that its activations
 * stay in the cache; whoever works takes the next task. What a task computes does not depend on who computes the others, and
 * that of a row not on the rows beside it. Inside, rows are padded to whole vectors.
 */
#include "vectors.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 8
#else
#define ROWS 4
#endif
#define COLS 3    /* ROWS x COLS vectors of sums stay in the registers, */
#define DEPTH 128 /* and DEPTH x COLS vectors of weights in the nearest cache */
#define LAYERS 64
#define ROOT(X) (SINGLE ? __builtin_sqrtf((float)(X)) : (REAL)__builtin_sqrt(X))

typedef struct {
    int64_t networks, rows, layers, act, shared, each, first, skip; /* shared: all have the same x; `first`: its columns */
    int64_t sizes[LAYERS + 1], wide[LAYERS], high[LAYERS]; /* wide, high: from one network's weights, biases to the next's */
    const REAL *x, *rest, *weights[LAYERS], *biases[LAYERS]; /* [N or 1, rows, first], its other columns, [in, out], [out] */
    const REAL *least, *more, *noise; /* NULL, or [N, W], [N, W] and [N, rows, W], a row each `skip`, for `drawn` */
    REAL *y;                          /* [N, rows, out], or of `drawn` [N, rows, W] */
    int64_t next, failed;
} job;

/* out [ROWS, cols vectors] = act(base + a b): a [ROWS, depth] with stride as, b [depth, cols vectors]; the base is what is in
 * `out` already where `more`, else the bias. */
INLINE void tile(const int cols, const act kind, const int more, int64_t depth, const REAL *a, int64_t as, const REAL *b,
                 const REAL *bias, REAL *out, int64_t os) {
    vec sum[ROWS][COLS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < cols; c++) sum[r][c] = load((more ? out + r * os : bias) + c * LANES);
    for (int64_t k = 0; k < depth; k++) {
        vec w[COLS];
        UNROLL for (int c = 0; c < cols; c++) w[c] = load(b + (k * cols + c) * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const vec x = all(a[r * as + k]);
            UNROLL for (int c = 0; c < cols; c++) sum[r][c] += x * w[c];
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < cols; c++) {
            const vec y = sum[r][c];
            store(out + r * os + c * LANES, kind == SILU ? y * sigmoid(y) : kind == RELU ? pick(y < 0, all(0), y) : y);
        }
}

/* Tiles below each other, of `width` columns; their weights are packed into `spare`, padded by zeros. */
INLINE void column(const int cols, const act kind, int64_t rows, int64_t depth, int64_t width, const REAL *a, int64_t as,
                   const REAL *w, int64_t ws, const REAL *bias, REAL *out, int64_t os, REAL *spare) {
    REAL *base = spare + DEPTH * COLS * LANES;
    const int64_t wide = cols * LANES;
    if (width < wide) memset(spare, 0, (size_t)((DEPTH + 1) * COLS * LANES) * sizeof(REAL));
    memcpy(base, bias, (size_t)width * sizeof(REAL));
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t n = least(DEPTH, depth - k);
        const int last = k + n == depth;
        for (int64_t i = 0; i < n; i++)
            if (width == wide)
                UNROLL for (int c = 0; c < cols; c++) store(spare + i * wide + c * LANES, load(w + (k + i) * ws + c * LANES));
            else memcpy(spare + i * wide, w + (k + i) * ws, (size_t)width * sizeof(REAL));
        for (int64_t r = 0; r < rows; r += ROWS) {
            const REAL *from = a + r * as + k;
            if (k && last) tile(cols, kind, 1, n, from, as, spare, base, out + r * os, os);
            else if (k) tile(cols, PLAIN, 1, n, from, as, spare, base, out + r * os, os);
            else if (last) tile(cols, kind, 0, n, from, as, spare, base, out + r * os, os);
            else tile(cols, PLAIN, 0, n, from, as, spare, base, out + r * os, os);
        }
    }
}

/* out [rows, width] = act(bias + a w), a and out padded. */
INLINE void product(const act kind, int64_t rows, int64_t depth, int64_t width, const REAL *a, const REAL *w,
                    const REAL *bias, REAL *out, int64_t stride, REAL *spare) {
    const int64_t vectors = up(width, LANES) / LANES;
    int cols;
    for (int64_t v = 0; v < vectors; v += cols) {
        const int64_t c = v * LANES, few = vectors - v;
        cols = few == 4 ? 2 : (int)least(few, COLS); /* one vector alone is slow */
        const int64_t wide = least(width - c, cols * LANES);
        if (cols == 3) column(3, kind, rows, depth, wide, a, stride, w + c, width, bias + c, out + c, stride, spare);
        else if (cols == 2) column(2, kind, rows, depth, wide, a, stride, w + c, width, bias + c, out + c, stride, spare);
        else column(1, kind, rows, depth, wide, a, stride, w + c, width, bias + c, out + c, stride, spare);
    }
}

/* Rows of W means and what says W variances -> mean + noise sqrt(bottom + more sigmoid(raw)), in the place of the means. */
static void drawn(int64_t rows, int64_t width, int64_t stride, const REAL *bottom, const REAL *more, const REAL *noise,
                  int64_t skip, REAL *y) {
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t n = least(LANES, width - i);
        REAL low[LANES], high[LANES], var[LANES];
        memcpy(low, bottom + i, (size_t)n * sizeof(REAL)), memset(low + n, 0, (size_t)(LANES - n) * sizeof(REAL));
        memcpy(high, more + i, (size_t)n * sizeof(REAL)), memset(high + n, 0, (size_t)(LANES - n) * sizeof(REAL));
        for (int64_t r = 0; r < rows; r++) {
            REAL *at = y + r * stride + i;
            store(var, load(low) + load(high) * sigmoid(load(at + width)));
            for (int64_t c = 0; c < n; c++) at[c] += ROOT(var[c]) * noise[r * skip + i + c];
        }
    }
}

static int64_t padded(const job *j) {
    int64_t most = 0;
    for (int64_t l = 0; l <= j->layers; l++) most = j->sizes[l] > most ? j->sizes[l] : most;
    return up(most, LANES) + LANES; /* not a power of two, whose rows would meet in the cache */
}

static int64_t blocks(const job *j) { return (j->rows + j->each - 1) / j->each; }

static void through(const job *j, int64_t network, int64_t from, REAL *own) {
    const int64_t stride = padded(j), rows = least(j->each, j->rows - from), in = j->sizes[0], width = j->sizes[j->layers];
    REAL *a = own, *b = a + up(j->each, ROWS) * stride, *spare = b + up(j->each, ROWS) * stride;
    const int64_t row = (j->shared ? 0 : network * j->rows) + from, first = j->first, rest = in - first;
    for (int64_t r = 0; r < rows; r++) {
        memcpy(a + r * stride, j->x + (row + r) * first, (size_t)first * sizeof(REAL));
        if (rest) memcpy(a + r * stride + first, j->rest + (row + r) * rest, (size_t)rest * sizeof(REAL));
    }
    memset(a + rows * stride, 0, (size_t)((up(rows, ROWS) - rows) * stride) * sizeof(REAL));
    for (int64_t l = 0; l < j->layers; l++) {
        const int64_t depth = j->sizes[l], wide = j->sizes[l + 1];
        const REAL *w = j->weights[l] + network * j->wide[l], *bias = j->biases[l] + network * j->high[l];
        const int kind = l + 1 < j->layers ? (int)j->act : PLAIN;
        if (kind == SILU) product(SILU, rows, depth, wide, a, w, bias, b, stride, spare);
        else if (kind == RELU) product(RELU, rows, depth, wide, a, w, bias, b, stride, spare);
        else product(PLAIN, rows, depth, wide, a, w, bias, b, stride, spare);
        REAL *swap = a;
        a = b, b = swap;
    }
    const int64_t half = width / 2, out = j->noise ? half : width, at = network * j->rows + from;
    if (j->noise)
        drawn(rows, half, stride, j->least + network * half, j->more + network * half, j->noise + at * j->skip, j->skip, a);
    for (int64_t r = 0; r < rows; r++) memcpy(j->y + (at + r) * out, a + r * stride, (size_t)out * sizeof(REAL));
}

/* What each of those does that work on the same job. */
static void work(void *given) {
    job *j = given;
    const int64_t room = 2 * up(j->each, ROWS) * padded(j) + (DEPTH + 1) * COLS * LANES, per = blocks(j);
    REAL *own = aligned_alloc(64, (size_t)up(room * (int64_t)sizeof(REAL), 64));
    if (!own) {
        __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t t; (t = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->networks * per;)
        through(j, t / per, t % per * j->each, own);
    free(own);
}

/* Returns 0, or 1 where there is no memory. launch: as GOMP_parallel; NULL where one thread is to do it all. */
int forward(job *j, launch_t launch, int64_t threads) {
    const int64_t tasks = j->networks * blocks(j);
    if (launch && tasks > 1) launch(work, j, (unsigned)least(threads, tasks), 0);
    else work(j);
    return (int)j->failed;
}

/* The Gaussian likelihood of stacks of multilayer perceptrons with softly bounded variances, and its gradient, for
 * `mbrl/likelihood.py`.
 *
 * The rows of a network come in parts of `each`, and a part goes through all layers and back, so that what lies between stays
 * in the cache. The gradients of the parts are added up in order. A task is a network, all parts, which add to the sums as they
 * come, or, of the last `split` networks, one part, which writes its own elsewhere for whoever ends the last; the numbers
 * are the same. Whoever works takes the next task.
 *
 * Inside, activations lie in panels of two vectors of rows, [panel, feature, row], so that all three products (z = w' a,
 * da = w dz, dw = a dz') read one operand a number at a time, wherever it lies, and the other by whole vectors.
 */
#include "vectors.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#define TALL 12
#else
#define TALL 5
#endif
#define COLS 2 /* TALL x COLS vectors of sums stay in the registers */
#define PANEL (COLS * LANES)
#define LAYERS 64

typedef struct {
    int64_t networks, rows, layers, act, shared, each, split; /* shared: all networks have the same x, y, kept */
    int64_t sizes[LAYERS + 1];
    const REAL *x, *y, *kept;       /* [N or 1, rows, in], [N or 1, rows, W], [N or 1, rows]: 1, or 0 for what does not count */
    const REAL *upper, *lower;      /* [N, W] */
    REAL *losses, *dupper, *dlower; /* [N], [N, W], [N, W] */
    const REAL *weights[LAYERS], *biases[LAYERS]; /* [N, in, out], [N, out] */
    REAL *dweights[LAYERS], *dbiases[LAYERS];
    REAL *spare;   /* [split, parts - 1, numbers of a network's loss and gradients] */
    int64_t *done; /* [split] zeros */
    int64_t next, failed;
} job;

/* Where the sums of a network are, and whether something is there already, to be added to. */
typedef struct {
    REAL *loss, *dupper, *dlower, *dweights[LAYERS], *dbiases[LAYERS];
    int more;
} sums;

/* A matrix whose element (i, k) of part q is at[i * i + k * k + q * q]. */
typedef struct {
    const REAL *at;
    int64_t i, k, q;
} operand;

/* out [tall, cols vectors] = over q and k of a(i, k, q) b(k, q), for one way ACROSS a. Never inlined: what surrounds it would
 * take registers from the sums. */
#define TILE(NAME, HIGH, WIDE, ACROSS)                                                                                       \
    static __attribute__((noinline)) void NAME(int64_t parts, int64_t depth, operand a, operand b, REAL *out) {              \
        vec sum[HIGH][WIDE] = {0};                                                                                           \
        for (int64_t q = 0; q < parts; q++) {                                                                                \
            const REAL *x = a.at + q * a.q, *w = b.at + q * b.q;                                                             \
            for (int64_t k = 0; k < depth; k++, x += a.k, w += b.k) {                                                        \
                vec v[WIDE];                                                                                                 \
                UNROLL for (int c = 0; c < WIDE; c++) v[c] = load(w + c * LANES);                                            \
                UNROLL for (int i = 0; i < HIGH; i++) {                                                                      \
                    const vec own = all(x[i * (ACROSS)]);                                                                    \
                    UNROLL for (int c = 0; c < WIDE; c++) sum[i][c] += own * v[c];                                           \
                }                                                                                                            \
            }                                                                                                                \
        }                                                                                                                    \
        UNROLL for (int i = 0; i < HIGH; i++)                                                                                \
            UNROLL for (int c = 0; c < WIDE; c++) store(out + (i * WIDE + c) * LANES, sum[i][c]);                            \
    }
#define TILES(NAME, WIDE, ACROSS)                                                                                            \
    TILE(NAME##_tall, TALL, WIDE, ACROSS)                                                                                    \
    TILE(NAME##_four, 4, WIDE, ACROSS)                                                                                       \
    TILE(NAME##_one, 1, WIDE, ACROSS)                                                                                        \
    INLINE void NAME(int64_t high, int64_t parts, int64_t depth, operand a, operand b, REAL *out) {                          \
        (high == TALL ? NAME##_tall : high == 4 ? NAME##_four : NAME##_one)(parts, depth, a, b, out);                        \
    }
TILES(next, COLS, 1)
TILES(strided, COLS, a.i)
TILES(panelwise, COLS, PANEL)
TILES(narrow, 1, PANEL)

/* The next tile of `size` rows: as tall as can be; the last one reaches back over rows that are done. */
static int64_t height(int64_t size) { return size >= TALL ? TALL : size >= 4 ? 4 : 1; }

/* Panels a [depth] -> z = bias + w' a [size], and with an activation its values and its slopes. */
INLINE void ahead(const act kind, int64_t panels, int64_t depth, int64_t size, const REAL *w, const REAL *bias, const REAL *a,
                  REAL *out, REAL *slope) {
    const int64_t high = height(size);
    REAL own[TALL * PANEL];
    for (int64_t top = 0; top < size; top += high) {
        const int64_t i = least(top, size - high);
        for (int64_t p = 0; p < panels; p++) {
            const int64_t at = (p * size + i) * PANEL;
            next(high, 1, depth, (operand){w + i, 1, size, 0}, (operand){a + p * depth * PANEL, 0, PANEL, 0}, own);
            for (int64_t r = 0; r < high; r++)
                UNROLL for (int64_t c = r * PANEL; c < (r + 1) * PANEL; c += LANES) {
                    const vec z = load(own + c) + bias[i + r];
                    if (kind == SILU) {
                        const vec s = sigmoid(z), y = z * s;
                        store(out + at + c, y);
                        store(slope + at + c, s + y * (1 - s));
                    } else if (kind == RELU) {
                        store(out + at + c, pick(z < 0, all(0), z));
                        store(slope + at + c, pick(z > 0, all(1), all(0)));
                    } else store(out + at + c, z);
                }
        }
    }
}

/* Panels dz [size] -> (w dz) slope [depth] */
static void back(int64_t panels, int64_t depth, int64_t size, const REAL *w, const REAL *dz, const REAL *slope, REAL *out) {
    const int64_t high = height(depth);
    REAL own[TALL * PANEL];
    for (int64_t top = 0; top < depth; top += high) {
        const int64_t i = least(top, depth - high);
        for (int64_t p = 0; p < panels; p++) {
            const int64_t at = (p * depth + i) * PANEL;
            strided(high, 1, size, (operand){w + i * size, size, 1, 0}, (operand){dz + p * size * PANEL, 0, PANEL, 0}, own);
            for (int64_t c = 0; c < high * PANEL; c += LANES) store(out + at + c, load(own + c) * load(slope + at + c));
        }
    }
}

/* LANES vectors of LANES numbers, turned */
INLINE void turn(const REAL *from, int64_t fs, REAL *to, int64_t ts) {
#if defined(__clang__) || !defined(__AVX512F__)
    for (int64_t i = 0; i < LANES; i++)
        for (int64_t j = 0; j < LANES; j++) to[j * ts + i] = from[i * fs + j];
#else
    vec x[BYTES / sizeof(REAL)];
    UNROLL for (int i = 0; i < LANES; i++) x[i] = load(from + i * fs);
    UNROLL for (int s = LANES / 2; s > 0; s /= 2) {
        mask low, high;
        UNROLL for (int j = 0; j < LANES; j++) low[j] = j & s ? LANES + j - s : j, high[j] = j & s ? LANES + j : j + s;
        UNROLL for (int i = 0; i < LANES; i++)
            if (!(i & s)) {
                const vec a = x[i], b = x[i + s];
                x[i] = __builtin_shuffle(a, b, low), x[i + s] = __builtin_shuffle(a, b, high);
            }
    }
    UNROLL for (int i = 0; i < LANES; i++) store(to + i * ts, x[i]);
#endif
}

/* Panels dz [size] -> turned [row, stride], and their sums over the rows. There is room for whole vectors. */
static void turned(int64_t panels, int64_t size, const REAL *dz, REAL *to, int64_t stride, int more, REAL *out) {
    for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < size; i += LANES)
            for (int64_t c = 0; c < COLS; c++)
                turn(dz + (p * size + i) * PANEL + c * LANES, PANEL, to + (p * PANEL + c * LANES) * stride + i, stride);
    for (int64_t i = 0; i < size; i += LANES) {
        vec sum = {0};
        for (int64_t r = 0; r < panels * PANEL; r++) sum += load(to + r * stride + i);
        for (int64_t j = 0; j < least(LANES, size - i); j++) out[i + j] = more ? out[i + j] + sum[j] : sum[j];
    }
}

/* out [depth, size] = a dz', panels a [depth], dz turned [row, stride] */
static void outer(int64_t panels, int64_t depth, int64_t size, const REAL *a, const REAL *dz, int64_t stride, int more,
                  REAL *out) {
    const int64_t high = height(depth);
    REAL own[TALL * PANEL];
    for (int64_t from = 0; from < size; from += PANEL) {
        const int64_t cols = size - from > LANES ? COLS : 1, wide = least(size - from, PANEL);
        for (int64_t top = 0; top < depth; top += high) {
            const int64_t i = least(top, depth - high);
            const operand x = {a + i * PANEL, PANEL, 1, depth * PANEL}, w = {dz + from, 0, stride, PANEL * stride};
            (cols == COLS ? panelwise : narrow)(high, panels, PANEL, x, w, own);
            /* a tile that reaches back adds only to what no other has added to */
            for (int64_t r = more ? top - i : 0; r < high; r++) {
                REAL *to = out + (i + r) * size + from, *new = own + r * cols * LANES;
                if (more)
                    for (int64_t c = 0; c < wide; c++) new[c] += to[c];
                memcpy(to, new, (size_t)wide * sizeof(REAL));
            }
        }
    }
}

/* log of what is positive and normal, m 2^n with m between sqrt(1/2) and sqrt(2); nan of what is not finite */
INLINE vec logarithm(vec x) {
    const int bits = SINGLE ? 23 : 52, most = SINGLE ? 5 : 11;
    const REAL half = (REAL)0.70710678118654752;
    const vec one = all(1);
    const mask down = (mask)x - (mask)all(half), n = down >> bits;
    const vec m = (vec)((mask)x - (n << bits)), s = (m - one) / (m + one), q = s * s;
    vec sum = all((REAL)(1.0 / (2 * most + 1)));
    UNROLL for (int k = most - 1; k >= 0; k--) sum = sum * q + (REAL)(1.0 / (2 * k + 1));
    return (x - x) + 2 * s * sum + __builtin_convertvector(n, vec) * (REAL)0.69314718055994531;
}

static void put(REAL *at, REAL x, int more) { *at = more ? *at + x : x; }

static REAL sum_of(vec x) {
    REAL sum = 0;
    for (int64_t j = 0; j < LANES; j++) sum += x[j];
    return sum;
}

/* Panels z [2 W], turned into the loss's slopes by them; the sums get the loss and its slopes by the bounds. */
static void head(int64_t panels, int64_t width, const REAL *y, const REAL *kept, REAL share, const REAL *upper,
                 const REAL *lower, REAL *z, const sums *out) {
    vec loss = {0};
    for (int64_t w = 0; w < width; w++) {
        const vec above = all(upper[w]), bottom = exponential(within(all(lower[w]), SINGLE ? 87 : 708));
        const vec more = exponential(within(above, SINGLE ? 87 : 708));
        vec du = {0}, dl = {0};
        for (int64_t p = 0; p < panels; p++)
            UNROLL for (int c = 0; c < COLS; c++) {
                REAL *at = z + (p * 2 * width + w) * PANEL + c * LANES, *raw = at + width * PANEL;
                const mask on = load(kept + p * PANEL + c * LANES) > 0;
                const vec d = load(at) - load(y + (p * width + w) * PANEL + c * LANES);
                const vec s = sigmoid(load(raw) - above), var = bottom + more * s, r = 1 / var, e = d * r;
                const vec dvar = share * (r - e * e);
                loss += share * pick(on, d * e + logarithm(var), all(0));
                store(at, pick(on, 2 * share * e, all(0)));
                store(raw, pick(on, dvar * more * s * (1 - s), all(0)));
                dl += pick(on, dvar * bottom, all(0));
                du += pick(on, dvar * more * s * s, all(0));
            }
        put(out->dupper + w, sum_of(du), out->more);
        put(out->dlower + w, sum_of(dl), out->more);
    }
    put(out->loss, sum_of(loss), out->more);
}

/* Rows [rows, width] -> panels, zeros after the last. */
static void panelled(int64_t panels, int64_t rows, int64_t width, const REAL *from, REAL *to) {
    for (int64_t p = 0; p < panels; p++)
        for (int64_t r = 0; r < PANEL; r++)
            for (int64_t i = 0; i < width; i++)
                to[(p * width + i) * PANEL + r] = p * PANEL + r < rows ? from[(p * PANEL + r) * width + i] : 0;
}

static int64_t parts(const job *j) { return (j->rows + j->each - 1) / j->each; }

static int64_t widest(const job *j) {
    int64_t most = 0;
    for (int64_t l = 0; l <= j->layers; l++) most = j->sizes[l] > most ? j->sizes[l] : most;
    return (up(most, LANES) / LANES | 1) * LANES; /* odd, or rows would meet in the cache */
}

/* of a task, in numbers: activations and slopes, two gradients, one turned, targets */
static int64_t room(const job *j) {
    const int64_t rows = up(j->each, PANEL), wide = widest(j);
    int64_t sum = 3 * wide + j->sizes[j->layers] + 1;
    for (int64_t l = 0; l <= j->layers; l++) sum += 2 * j->sizes[l];
    return rows * sum + LANES * PANEL;
}

/* The sums of a network, or of one of its parts, which lie together. */
static sums final(const job *j, int64_t network, int more) {
    const int64_t width = j->sizes[j->layers] / 2;
    sums s = {.loss = j->losses + network, .dupper = j->dupper + network * width, .dlower = j->dlower + network * width};
    for (int64_t l = 0; l < j->layers; l++) {
        s.dweights[l] = j->dweights[l] + network * j->sizes[l] * j->sizes[l + 1];
        s.dbiases[l] = j->dbiases[l] + network * j->sizes[l + 1];
    }
    s.more = more;
    return s;
}

static int64_t numbers(const job *j) {
    int64_t n = 1 + j->sizes[j->layers];
    for (int64_t l = 0; l < j->layers; l++) n += (j->sizes[l] + 1) * j->sizes[l + 1];
    return n;
}

static sums apart(const job *j, int64_t split, int64_t part) {
    const int64_t width = j->sizes[j->layers] / 2;
    REAL *at = j->spare + (split * (parts(j) - 1) + part - 1) * numbers(j);
    sums s = {.loss = at, .dupper = at + 1, .dlower = at + 1 + width, .more = 0};
    at += 1 + 2 * width;
    for (int64_t l = 0; l < j->layers; l++) {
        s.dweights[l] = at, s.dbiases[l] = at + j->sizes[l] * j->sizes[l + 1];
        at = s.dbiases[l] + j->sizes[l + 1];
    }
    return s;
}

static void add(int64_t n, const REAL *from, REAL *to) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

static void through(const job *j, int64_t network, int64_t part, sums out, REAL *own) {
    const int64_t from = part * j->each, rows = least(j->each, j->rows - from), panels = up(rows, PANEL) / PANEL;
    const int64_t last = j->layers, width = j->sizes[last] / 2, wide = widest(j), room = up(j->each, PANEL);
    const int64_t row = (j->shared ? 0 : network * j->rows) + from;
    REAL *a[LAYERS + 1], *slope[LAYERS + 1], *dz = own, *spare = dz + room * wide, *over = spare + room * wide;
    REAL *y = over + room * wide, *kept = y + room * width;
    own = kept + room;
    for (int64_t l = 0; l <= last; l++) {
        a[l] = own, slope[l] = own + room * j->sizes[l];
        own += 2 * room * j->sizes[l];
    }
    panelled(panels, rows, j->sizes[0], j->x + row * j->sizes[0], a[0]);
    panelled(panels, rows, width, j->y + row * width, y);
    panelled(panels, rows, 1, j->kept + row, kept);
    for (int64_t l = 0; l < last; l++) {
        const int64_t depth = j->sizes[l], size = j->sizes[l + 1];
        const REAL *w = j->weights[l] + network * depth * size, *b = j->biases[l] + network * size;
        if (l + 1 == last) ahead(PLAIN, panels, depth, size, w, b, a[l], dz, 0);
        else if (j->act == SILU) ahead(SILU, panels, depth, size, w, b, a[l], a[l + 1], slope[l + 1]);
        else ahead(RELU, panels, depth, size, w, b, a[l], a[l + 1], slope[l + 1]);
    }
    REAL count = 0;
    for (int64_t r = 0; r < j->rows; r++) count += j->kept[(j->shared ? 0 : network * j->rows) + r];
    head(panels, width, y, kept, 1 / ((count < 1 ? 1 : count) * width), j->upper + network * width, j->lower + network * width,
         dz, &out);
    for (int64_t l = last - 1; l >= 0; l--) {
        const int64_t depth = j->sizes[l], size = j->sizes[l + 1];
        turned(panels, size, dz, over, wide, out.more, out.dbiases[l]);
        outer(panels, depth, size, a[l], over, wide, out.more, out.dweights[l]);
        if (!l) break;
        back(panels, depth, size, j->weights[l] + network * depth * size, dz, slope[l], spare);
        REAL *swap = dz;
        dz = spare, spare = swap;
    }
}

/* Adds up the parts of a split network. */
static void gather(const job *j, int64_t split) {
    const sums to = final(j, j->networks - j->split + split, 1);
    for (int64_t p = 1; p < parts(j); p++) {
        const sums from = apart(j, split, p);
        const int64_t width = j->sizes[j->layers] / 2;
        add(1, from.loss, to.loss);
        add(width, from.dupper, to.dupper);
        add(width, from.dlower, to.dlower);
        for (int64_t l = 0; l < j->layers; l++) {
            add(j->sizes[l] * j->sizes[l + 1], from.dweights[l], to.dweights[l]);
            add(j->sizes[l + 1], from.dbiases[l], to.dbiases[l]);
        }
    }
}

/* What each of those does that work on the same job. */
static void work(void *given) {
    job *j = given;
    const int64_t per = parts(j), whole = j->networks - j->split;
    REAL *own = aligned_alloc(64, (size_t)up(room(j) * (int64_t)sizeof(REAL), 64));
    if (!own) {
        __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t t; (t = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < whole + j->split * per;) {
        const int64_t split = (t - whole) / per, part = (t - whole) % per;
        if (t < whole)
            for (int64_t p = 0; p < per; p++) through(j, t, p, final(j, t, p > 0), own);
        else {
            through(j, whole + split, part, part ? apart(j, split, part) : final(j, whole + split, 0), own);
            if (__atomic_add_fetch(j->done + split, 1, __ATOMIC_ACQ_REL) == per) gather(j, split);
        }
    }
    free(own);
}

/* Returns 0, or 1 where there is no memory. launch: as GOMP_parallel; NULL where one thread is to do it all. */
int gradient(job *j, launch_t launch, int64_t threads) {
    const int64_t n = j->networks - j->split + j->split * parts(j);
    if (launch && n > 1) launch(work, j, (unsigned)least(threads, n), 0);
    else work(j);
    return (int)j->failed;
}

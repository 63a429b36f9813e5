/* Teacher-forced trajectories of the shallow PLRNN and their adjoint, for `mbrl/compiled.py`:
 *
 *     u = W2 x,  c = relu(u + h2) [- relu(u), where CLIPPED],  y = A x + W1 c + drive,  x' = keep y + (1 - keep) signal
 *
 * Compiled with -DREAL=float -DINT=int32_t or -DREAL=double -DINT=int64_t, -DM=<width of the state>, -DCLIPPED=0 or 1.
 * Every array is dense: A [S, M], W1 [S, M, L], W2 [S, L, M], h2 [S, L]; start [S, B, M]; drive, signal, y [S, B, T, M];
 * keep [S, T, M]. A task is TASK rows of one seed; tasks are numbered seed by seed. What a task computes does not depend on
 * who computes the others. Both functions return 0, or 1 where there is no memory.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TASK 8 /* rows over which a task sums the gradients of the parameters */
#define ROWS 4 /* rows stepped at once: a weight is read once for all of them */
#define LANES ((int)(32 / sizeof(REAL)))
#define INLINE static inline __attribute__((always_inline))

typedef REAL vec __attribute__((vector_size(32)));
typedef INT mask __attribute__((vector_size(32)));

typedef struct {
    vec *W1, *W2, *h2; /* [M, N] [M, N] [N]; lanes past L are zero, and give zero */
} weights;

INLINE vec only(vec x, mask m) { return (vec)((mask)x & m); }

INLINE REAL total(vec x) {
    REAL sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE REAL mix(REAL keep, REAL y, REAL signal) { /* the ends are chosen: 0 * nan is nan */
    return keep == 1 ? y : keep == 0 ? signal : keep * y + (1 - keep) * signal;
}

static int make(weights *w, int64_t N) {
    const size_t size = (size_t)(2 * M + 1) * (size_t)N * sizeof(vec);
    w->W1 = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!w->W1) return 1;
    memset(w->W1, 0, size);
    w->W2 = w->W1 + M * N;
    w->h2 = w->W2 + M * N;
    return 0;
}

static void pack(weights w, int64_t N, int64_t L, const REAL *W1, const REAL *W2, const REAL *h2) {
    REAL *a = (REAL *)w.W1, *b = (REAL *)w.W2;
    for (int64_t m = 0; m < M; m++)
        for (int64_t l = 0; l < L; l++) {
            a[m * N * LANES + l] = W1[m * L + l];
            b[m * N * LANES + l] = W2[l * M + m];
        }
    memcpy(w.h2, h2, (size_t)L * sizeof(REAL));
}

static void unpack(weights w, int64_t N, int64_t L, REAL *W1, REAL *W2, REAL *h2) {
    const REAL *a = (const REAL *)w.W1, *b = (const REAL *)w.W2;
    for (int64_t m = 0; m < M; m++)
        for (int64_t l = 0; l < L; l++) {
            W1[m * L + l] = a[m * N * LANES + l];
            W2[l * M + m] = b[m * N * LANES + l];
        }
    memcpy(h2, w.h2, (size_t)L * sizeof(REAL));
}

/* R rows through time. */
INLINE void run(const int R, int64_t T, int64_t N, weights w, const REAL *A, const REAL *start, const REAL *drive,
                const REAL *signal, const REAL *keep, REAL *y) {
    REAL x[ROWS][M];
    memcpy(x, start, (size_t)R * sizeof x[0]);
    for (int64_t t = 0; t < T; t++) {
        vec acc[ROWS][M] = {0};
        for (int64_t n = 0; n < N; n++) {
            vec u[ROWS] = {0};
            for (int m = 0; m < M; m++)
                for (int r = 0; r < R; r++) u[r] += w.W2[m * N + n] * x[r][m];
            for (int r = 0; r < R; r++) {
                const vec v = u[r] + w.h2[n];
                u[r] = CLIPPED ? only(v, v > 0) - only(u[r], u[r] > 0) : only(v, v > 0);
            }
            for (int m = 0; m < M; m++)
                for (int r = 0; r < R; r++) acc[r][m] += w.W1[m * N + n] * u[r];
        }
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) {
                const int64_t i = (r * T + t) * M + m;
                y[i] = A[m] * x[r][m] + total(acc[r][m]) + drive[i];
                x[r][m] = mix(keep[t * M + m], y[i], signal[i]);
            }
    }
}

/* From the gradients g of y: lambda, those of drive; those of start; and what R rows add to those of the parameters. */
INLINE void turn(const int R, int64_t T, int64_t N, weights w, const REAL *A, const REAL *start, const REAL *signal,
                 const REAL *keep, const REAL *y, const REAL *g, REAL *lambda, REAL *gstart, REAL *gA, weights gw) {
    REAL back[ROWS][M] = {0}, x[ROWS][M], a[ROWS][M];
    for (int64_t t = T - 1; t >= 0; t--) {
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) {
                const int64_t i = (r * T + t) * M + m;
                a[r][m] = lambda[i] = g[i] + (t < T - 1 ? keep[t * M + m] * back[r][m] : 0);
                x[r][m] = t ? mix(keep[(t - 1) * M + m], y[i - M], signal[i - M]) : start[r * M + m];
                gA[m] += a[r][m] * x[r][m];
            }
        vec acc[ROWS][M] = {0};
        for (int64_t n = 0; n < N; n++) {
            vec u[ROWS] = {0}, q[ROWS] = {0}, c[ROWS], shift = {0};
            for (int m = 0; m < M; m++)
                for (int r = 0; r < R; r++) {
                    u[r] += w.W2[m * N + n] * x[r][m];
                    q[r] += w.W1[m * N + n] * a[r][m];
                }
            for (int r = 0; r < R; r++) {
                const vec v = u[r] + w.h2[n], on = only(q[r], v > 0);
                c[r] = CLIPPED ? only(v, v > 0) - only(u[r], u[r] > 0) : only(v, v > 0);
                q[r] = CLIPPED ? on - only(q[r], u[r] > 0) : on;
                shift += on;
            }
            gw.h2[n] += shift;
            for (int m = 0; m < M; m++) {
                vec first = gw.W1[m * N + n], second = gw.W2[m * N + n];
                for (int r = 0; r < R; r++) {
                    first += a[r][m] * c[r];
                    second += x[r][m] * q[r];
                    acc[r][m] += w.W2[m * N + n] * q[r];
                }
                gw.W1[m * N + n] = first;
                gw.W2[m * N + n] = second;
            }
        }
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) back[r][m] = A[m] * a[r][m] + total(acc[r][m]);
    }
    memcpy(gstart, back, (size_t)R * sizeof back[0]);
}

int forward(int64_t first, int64_t last, int64_t B, int64_t T, int64_t L, const REAL *A, const REAL *W1, const REAL *W2,
            const REAL *h2, const REAL *start, const REAL *drive, const REAL *signal, const REAL *keep, REAL *y) {
    const int64_t N = (L + LANES - 1) / LANES, each = (B + TASK - 1) / TASK;
    weights w;
    if (make(&w, N)) return 1;
    for (int64_t task = first; task < last; task++) {
        const int64_t s = task / each, end = s * B + least(B, (task % each + 1) * TASK);
        pack(w, N, L, W1 + s * M * L, W2 + s * M * L, h2 + s * L);
        for (int64_t b = s * B + task % each * TASK; b < end;) {
            const int64_t at = b * T * M;
            const REAL *k = keep + s * T * M;
            if (end - b >= ROWS) {
                run(ROWS, T, N, w, A + s * M, start + b * M, drive + at, signal + at, k, y + at);
                b += ROWS;
            } else {
                run(1, T, N, w, A + s * M, start + b * M, drive + at, signal + at, k, y + at);
                b += 1;
            }
        }
    }
    free(w.W1);
    return 0;
}

/* gA [tasks, M], gW1 [tasks, M, L], gW2 [tasks, L, M], gh2 [tasks, L] */
int backward(int64_t first, int64_t last, int64_t B, int64_t T, int64_t L, const REAL *A, const REAL *W1, const REAL *W2,
             const REAL *h2, const REAL *start, const REAL *signal, const REAL *keep, const REAL *y, const REAL *g,
             REAL *lambda, REAL *gstart, REAL *gA, REAL *gW1, REAL *gW2, REAL *gh2) {
    const int64_t N = (L + LANES - 1) / LANES, each = (B + TASK - 1) / TASK;
    weights w, gw;
    if (make(&w, N)) return 1;
    if (make(&gw, N)) {
        free(w.W1);
        return 1;
    }
    for (int64_t task = first; task < last; task++) {
        const int64_t s = task / each, end = s * B + least(B, (task % each + 1) * TASK);
        REAL *sum = gA + task * M;
        memset(sum, 0, M * sizeof(REAL));
        memset(gw.W1, 0, (size_t)(2 * M + 1) * (size_t)N * sizeof(vec));
        pack(w, N, L, W1 + s * M * L, W2 + s * M * L, h2 + s * L);
        for (int64_t b = s * B + task % each * TASK; b < end;) {
            const int64_t at = b * T * M, o = b * M;
            const REAL *a = A + s * M, *k = keep + s * T * M;
            if (end - b >= ROWS) {
                turn(ROWS, T, N, w, a, start + o, signal + at, k, y + at, g + at, lambda + at, gstart + o, sum, gw);
                b += ROWS;
            } else {
                turn(1, T, N, w, a, start + o, signal + at, k, y + at, g + at, lambda + at, gstart + o, sum, gw);
                b += 1;
            }
        }
        unpack(gw, N, L, gW1 + task * M * L, gW2 + task * M * L, gh2 + task * L);
    }
    free(w.W1);
    free(gw.W1);
    return 0;
}

/* Jacobians of the step at rows x [S, R, M]: out [S, R, M, M], rows first to last of all S * R. */
int jacobians(int64_t first, int64_t last, int64_t R, int64_t unused, int64_t L, const REAL *A, const REAL *W1,
              const REAL *W2, const REAL *h2, const REAL *x, REAL *out) {
    const int64_t N = (L + LANES - 1) / LANES;
    int64_t packed = -1;
    weights w;
    (void)unused;
    if (make(&w, N)) return 1;
    for (int64_t row = first; row < last; row++) {
        const int64_t s = row / R;
        if (s != packed) pack(w, N, L, W1 + s * M * L, W2 + s * M * L, h2 + s * L);
        packed = s;
        vec acc[M][M] = {0};
        for (int64_t n = 0; n < N; n++) {
            vec u = {0}, one = u + 1, on;
            for (int m = 0; m < M; m++) u += w.W2[m * N + n] * x[row * M + m];
            on = only(one, u + w.h2[n] > 0);
            if (CLIPPED) on -= only(one, u > 0);
            for (int m = 0; m < M; m++) {
                const vec left = w.W1[m * N + n] * on;
                for (int k = 0; k < M; k++) acc[m][k] += left * w.W2[k * N + n];
            }
        }
        for (int m = 0; m < M; m++)
            for (int k = 0; k < M; k++) out[(row * M + m) * M + k] = total(acc[m][k]) + (m == k ? A[s * M + m] : 0);
    }
    free(w.W1);
    return 0;
}

/* The squares of the largest singular values of J [R, M, M]: G = J'J squared over and over tends to the projector on its
 * leading eigenvectors, whose Rayleigh quotient is the eigenvalue; with SQUARINGS, to 1 / (2e 2^SQUARINGS) of it at most. */
#define SQUARINGS 16

int spectral(int64_t first, int64_t last, int64_t R, int64_t unused, int64_t also, const REAL *J, REAL *out) {
    (void)R, (void)unused, (void)also;
    for (int64_t row = first; row < last; row += LANES) { /* a matrix a lane */
        vec a[M][M], g[M][M], p[M][M], q[M][M], trace = {0}, above = {0};
        for (int m = 0; m < M; m++)
            for (int k = 0; k < M; k++)
                for (int i = 0; i < LANES; i++) a[m][k][i] = J[(least(row + i, last - 1) * M + m) * M + k];
        for (int m = 0; m < M; m++)
            for (int k = 0; k <= m; k++) {
                vec sum = {0};
                for (int j = 0; j < M; j++) sum += a[j][m] * a[j][k];
                g[m][k] = g[k][m] = sum;
            }
        memcpy(p, g, sizeof p);
        for (int turn = 0; turn <= SQUARINGS; turn++) {
            trace = (vec){0};
            for (int m = 0; m < M; m++) trace += p[m][m];
            const vec scale = 1 / (trace + only(trace + 1, trace == 0)); /* a zero matrix stays one */
            for (int m = 0; m < M; m++)
                for (int k = 0; k < M; k++) p[m][k] *= scale;
            if (turn == SQUARINGS) break;
            for (int m = 0; m < M; m++)
                for (int k = 0; k <= m; k++) {
                    vec sum = {0};
                    for (int j = 0; j < M; j++) sum += p[m][j] * p[j][k];
                    q[m][k] = q[k][m] = sum;
                }
            memcpy(p, q, sizeof p);
        }
        for (int m = 0; m < M; m++)
            for (int k = 0; k < M; k++) above += g[m][k] * p[k][m];
        for (int i = 0; i < LANES && row + i < last; i++) out[row + i] = above[i];
    }
    return 0;
}

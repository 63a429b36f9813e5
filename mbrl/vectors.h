/* Vectors of numbers, for the sources of this package, which are compiled with -DREAL=float -DINT=int32_t or
 * -DREAL=double -DINT=int64_t. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define BYTES 64
#elif defined(__aarch64__)
#define BYTES 16
#else
#define BYTES 32
#endif
#define LANES ((int64_t)(BYTES / sizeof(REAL)))
#define SINGLE (sizeof(REAL) == 4)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef REAL vec __attribute__((vector_size(BYTES)));
typedef REAL loose __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias)); /* anywhere in memory */
typedef INT mask __attribute__((vector_size(BYTES)));
typedef enum { PLAIN, SILU, RELU } act;
typedef void (*launch_t)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

INLINE vec load(const REAL *p) { return *(const loose *)p; }
INLINE void store(REAL *p, vec x) { *(loose *)p = x; }
INLINE vec all(REAL x) { return x - (vec){0}; }
INLINE vec pick(mask m, vec a, vec b) { return (vec)((m & (mask)a) | (~m & (mask)b)); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* exp of what neither over- nor underflows, as 2^n e^r with |r| <= log(2) / 2 */
INLINE vec exponential(vec x) {
    const double over[] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800, 479001600, 6227020800};
    const REAL whole = SINGLE ? 12582912.0 : 6755399441055744.0; /* 1.5 2^23, 1.5 2^52: what is added to it is rounded */
    const int most = SINGLE ? 7 : 13;
    const vec shifted = x * (REAL)1.4426950408889634 + whole, n = shifted - whole;
    vec r = x - n * (REAL)(SINGLE ? 0.693359375 : 0.6931471803691238), sum = all((REAL)(1 / over[most]));
    r -= n * (REAL)(SINGLE ? -2.1219444005469058e-4 : 1.9082149292705877e-10); /* log(2) in two parts */
    UNROLL for (int k = most - 1; k >= 0; k--) sum = sum * r + (REAL)(1 / over[k]);
    return (vec)((mask)sum + ((mask)shifted << (SINGLE ? 23 : 52)));
}

/* x between -far and far; nan is nan */
INLINE vec within(vec x, REAL far) {
#ifdef __AVX512F__
    if (SINGLE) return (vec)_mm512_max_ps((__m512)all(-far), _mm512_min_ps((__m512)all(far), (__m512)x));
#endif
    return pick(x > far, all(far), pick(x < -far, all(-far), x));
}

INLINE vec inverse(vec x) {
#ifdef __AVX512F__
    if (SINGLE) { /* to 14 bits, and a step of Newton's method: a division takes four times as long */
        const vec r = (vec)_mm512_rcp14_ps((__m512)x);
        return r + r * (1 - x * r);
    }
#endif
    return 1 / x;
}

/* 1 / (1 + exp(-x)); a nan's bits are no matter */
INLINE vec sigmoid(vec x) {
    const vec y = within(-x, SINGLE ? 87 : 708);
    return inverse(1 + exponential(y)) + (y - y);
}

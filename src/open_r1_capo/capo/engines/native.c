/* The inner loops of Adam's steps for a CPU: one pass over the width D per (token, id) pair, only results are written.
 *
 * Entries (token, id) come sorted by vocabulary row, so that a row's moments stay in the first cache for all its
 * tokens. Each function works on a range, and disjoint ranges may run in parallel. native.py calls them, setup.py
 * builds this file where there is a compiler, and adam.py does the same in torch where there is none.
 * The file includes itself once per precision.
 */
#ifndef REAL

#include <math.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"))) /* chosen when loaded */
#else
#define WIDEST
#endif

int64_t native_interface(void) { return 3; } /* counts changes of the arguments below; native.py asks for it */

#define REAL float
#define SQRT sqrtf
#define NAME(function) function##_float32
#include "native.c"

#undef REAL
#undef SQRT
#undef NAME
#define REAL double
#define SQRT sqrt
#define NAME(function) function##_float64
#include "native.c"

#else

/* z[e] = sum of x (P + pull x) / (sqrt(Q + push x^2) + eps) for the entries e = order[start .. stop). */
WIDEST void NAME(propose)(
    int64_t start, int64_t stop, int64_t k, int64_t d, const int64_t *order, const int32_t *row, const REAL *first,
    const REAL *second, const REAL *features, const REAL *pull, const REAL *push, const REAL *eps, REAL *z)
{
    for (int64_t s = start; s < stop; s++) {
        const int64_t e = order[s];
        const REAL *p = first + row[e] * d, *q = second + row[e] * d, *x = features + e / k * d;
        const REAL a = pull[e], b = push[e], epsilon = eps[e];
        REAL sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < d; c++)
            sum += x[c] * (p[c] + a * x[c]) / (SQRT(q[c] + b * x[c] * x[c]) + epsilon);
        z[e] = sum;
    }
}

/* P = keep1 P + (1 - beta1) g and Q = keep2 Q + (1 - beta2) g^2 for the rows start .. stop and the columns
 * left .. left + columns, where g is the sum of coefficient x over the row's entries, over its divisor. `features` holds
 * these columns alone, so that they stay in a cache while all rows are done; `g` has room for `columns` values. */
WIDEST void NAME(commit)(
    int64_t start, int64_t stop, int64_t d, int64_t left, int64_t columns, const int64_t *row, const int64_t *offsets,
    const int64_t *token, const REAL *coefficient, const REAL *features, const REAL *divisor, const REAL *keep1,
    const REAL *keep2, const REAL *add, REAL *g, REAL *first, REAL *second)
{
    for (int64_t r = start; r < stop; r++) {
        REAL *p = first + row[r] * d + left, *q = second + row[r] * d + left;
        const REAL k1 = keep1[r], k2 = keep2[r], a1 = add[0], a2 = add[1];
        for (int64_t c = 0; c < columns; c++)
            g[c] = 0;
        for (int64_t e = offsets[r]; e < offsets[r + 1]; e++) {
            const REAL *x = features + token[e] * columns, weight = coefficient[e];
#pragma omp simd
            for (int64_t c = 0; c < columns; c++)
                g[c] += weight * x[c];
        }
#pragma omp simd
        for (int64_t c = 0; c < columns; c++) {
            const REAL mean = g[c] / divisor[r];
            p[c] = k1 * p[c] + a1 * mean;
            q[c] = k2 * q[c] + a2 * mean * mean;
        }
    }
}

/* z[e] = sum of x scale1 P / (sqrt(scale2 Q) + eps) for the entries e = order[offsets[r] .. offsets[r + 1]) of the
 * rows start .. stop; `g` has room for D values. */
WIDEST void NAME(planned)(
    int64_t start, int64_t stop, int64_t k, int64_t d, const int64_t *row, const int64_t *offsets, const int64_t *order,
    const REAL *features, const REAL *scale1, const REAL *scale2, const REAL *eps, REAL *g, const REAL *first,
    const REAL *second, REAL *z)
{
    for (int64_t r = start; r < stop; r++) {
        const REAL *p = first + row[r] * d, *q = second + row[r] * d;
        const REAL s1 = scale1[r], s2 = scale2[r], epsilon = eps[0];
#pragma omp simd
        for (int64_t c = 0; c < d; c++)
            g[c] = s1 * p[c] / (SQRT(s2 * q[c]) + epsilon);
        for (int64_t s = offsets[r]; s < offsets[r + 1]; s++) {
            const REAL *x = features + order[s] / k * d;
            REAL sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < d; c++)
                sum += x[c] * g[c];
            z[order[s]] = sum;
        }
    }
}

#endif

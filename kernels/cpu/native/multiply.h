// The one matrix product: a block of rows times lanes of columns, held in registers.
//
// Each output element is one accumulator that runs over the inner dimension in order. Nothing about
// it depends on how many rows stand beside it, which is what makes linear layers and attention
// independent of batch composition, bit for bit.
#pragma once

#include "vectors.h"

namespace native {

// Rows held at once: with two vectors of columns each, 24 of 32 AVX-512 registers, or as many as a
// machine with 16 narrower ones can hold.
constexpr int kRows = NATIVE_AVX512 ? 12 : 2;

constexpr int kPanel = 2 * kLanes;  // columns multiplied at once

// acc[r][v] += sum over u of a[r][u] . b(u)[v].
// a: rows of `units` lanes, `stride` lanes apart; load(u, b): fills V vectors of columns.
template <class T, int R, int V, class Load>
INLINE void multiply(const uint32_t* a, int64_t stride, int units, Load load, Floats (&acc)[R][V]) {
    Floats sums[R][V];  // in registers; what is passed on by reference lies in memory
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) sums[r][v] = acc[r][v];
    for (int u = 0; u < units; u++) {
        Lanes b[V];
        load(u, b);
        UNROLL for (int r = 0; r < R; r++) {
            const uint32_t x = a[r * stride + u];
            UNROLL for (int v = 0; v < V; v++) sums[r][v] = dot<T>(sums[r][v], x, b[v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = sums[r][v];
}

// Sizes of row blocks that exist, so that the code stays small: 12, 8, 6, 4, 3, 2, 1.
constexpr int smaller(int rows) { return rows > 8 ? 8 : rows > 4 ? rows - 2 : rows - 1; }

// Rows [row, row + rows) in blocks of R while there are as many, then of smaller sizes.
// `start(row, acc)` gives the initial values of a row, `finish(row, acc)` takes its sums.
template <class T, int V, int R, class Load, class Start, class Finish>
INLINE void multiply_rows(int64_t row, int64_t rows, const uint32_t* a, int64_t stride, int units,
                          const Load& load, const Start& start, const Finish& finish) {
    for (; rows >= R; row += R, rows -= R) {
        Floats acc[R][V];
        for (int r = 0; r < R; r++) start(row + r, acc[r]);
        multiply<T, R, V>(a + row * stride, stride, units, load, acc);
        for (int r = 0; r < R; r++) finish(row + r, acc[r]);
    }
    if constexpr (R > 1)
        if (rows)
            multiply_rows<T, V, smaller(R)>(row, rows, a, stride, units, load, start, finish);
}

// a: `rows` rows of lanes, `stride` lanes apart.
template <class T, int V, int MaxRows = kRows, class Load, class Start, class Finish>
INLINE void multiply_all(int64_t rows, const void* a, int64_t stride, int units, const Load& load,
                         const Start& start, const Finish& finish) {
    multiply_rows<T, V, MaxRows>(0, rows, static_cast<const uint32_t*>(a), stride, units, load,
                                 start, finish);
}

}  // namespace native

// The one matrix product: a block of rows times lanes of columns, held in registers.
//
// Each output element is one accumulator that runs over the inner dimension in order. Nothing about
// it depends on how many rows stand beside it, which is what makes linear layers and attention
// independent of batch composition, bit for bit.
#pragma once

#include "vectors.h"

namespace native {

// Rows held at once: with two vectors of columns each, 24 of 32 AVX-512 registers or 12 of the 16
// that other machines have at least. Emulated tiles split their vectors, which leaves room for few.
constexpr int kRows = NATIVE_AVX512 ? 12 : kVectorBytes == 64 ? 2 : 6;

constexpr int kPanel = 2 * kLanes;  // columns multiplied at once

// acc[r][v] += sum over u of a[r][u] . b(u)[v].
// a: rows of lanes of A, `stride` lanes apart; load(u, b): fills V vectors of columns with lanes of B.
template <class A, class B, int R, int V, class Load>
INLINE void multiply(const uint32_t* a, int64_t stride, int units, Load load, Floats (&acc)[R][V]) {
    Floats sums[R][V];  // in registers; what is passed on by reference lies in memory
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) sums[r][v] = acc[r][v];
    for (int u = 0; u < units; u++) {
        Lanes b[V];
        load(u, b);
        UNROLL for (int part = 0; part < kParts<A, B>; part++) {
            Lanes columns[V];
            UNROLL for (int v = 0; v < V; v++) columns[v] = operand<A, B>(b[v], part);
            UNROLL for (int r = 0; r < R; r++) {
                const uint32_t x = a[r * stride + u * kParts<A, B> + part];
                UNROLL for (int v = 0; v < V; v++)
                    sums[r][v] = multiply_add<A>(sums[r][v], x, columns[v]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = sums[r][v];
}

// Sizes of row blocks that exist, so that the code stays small: 12, 8, 6, 4, 3, 2, 1, or 6 to 1.
constexpr int smaller(int rows) {
    return kRows <= 6 || rows <= 4 ? rows - 1 : rows > 8 ? 8 : rows - 2;
}

// Rows [row, row + rows) in `blocks` blocks of at most R. Where every size exists they are as equal
// as can be, since a small block waits for the latency of its few sums.
// `start(row, acc)` gives the initial values of a row, `finish(row, acc)` takes its sums.
template <class A, class B, int V, int R, class Load, class Start, class Finish>
INLINE void multiply_rows(int64_t row, int64_t rows, int64_t blocks, const uint32_t* a,
                          int64_t stride, int units, const Load& load, const Start& start,
                          const Finish& finish) {
    constexpr bool greedy = smaller(R) < R - 1;
    for (; rows >= R && (greedy || rows > blocks * (R - 1)); row += R, rows -= R, blocks--) {
        Floats acc[R][V];
        for (int r = 0; r < R; r++) start(row + r, acc[r]);
        multiply<A, B, R, V>(a + row * stride, stride, units, load, acc);
        for (int r = 0; r < R; r++) finish(row + r, acc[r]);
    }
    if constexpr (R > 1)
        if (rows)
            multiply_rows<A, B, V, smaller(R)>(row, rows, blocks, a, stride, units, load, start,
                                               finish);
}

constexpr int64_t row_blocks(int64_t rows, int most = kRows) { return (rows + most - 1) / most; }

// a: `rows` rows of lanes of A, `stride` lanes apart.
template <class A, class B, int V, int MaxRows = kRows, class Load, class Start, class Finish>
INLINE void multiply_all(int64_t rows, const void* a, int64_t stride, int units, const Load& load,
                         const Start& start, const Finish& finish) {
    multiply_rows<A, B, V, MaxRows>(0, rows, row_blocks(rows, MaxRows),
                                    static_cast<const uint32_t*>(a), stride, units, load, start,
                                    finish);
}

}  // namespace native

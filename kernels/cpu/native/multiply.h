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
    for (int u = 0; u < units; u++) {
        Lanes b[V];
        load(u, b);
        for (int r = 0; r < R; r++) {
            const uint32_t x = a[r * stride + u];
            for (int v = 0; v < V; v++) acc[r][v] = dot<T>(acc[r][v], x, b[v]);
        }
    }
}

// One block of exactly R <= kRows rows, found by recursion. `start(row, acc)` gives the initial
// values of a row, `finish(row, acc)` takes its sums.
template <class T, int V, int R, class Load, class Start, class Finish>
void multiply_rows(int rows, int64_t row, const uint32_t* a, int64_t stride, int units,
                   const Load& load, const Start& start, const Finish& finish) {
    if constexpr (R > 1) {
        if (rows < R)
            return multiply_rows<T, V, R - 1>(rows, row, a, stride, units, load, start, finish);
    }
    Floats acc[R][V];
    for (int r = 0; r < R; r++) start(row + r, acc[r]);
    multiply<T, R, V>(a + row * stride, stride, units, load, acc);
    for (int r = 0; r < R; r++) finish(row + r, acc[r]);
}

// Any number of rows, in blocks of nearly equal size.
template <class T, int V, int MaxRows = kRows, class Load, class Start, class Finish>
void multiply_all(int64_t rows, const void* a, int64_t stride, int units, const Load& load,
                  const Start& start, const Finish& finish) {
    const int64_t blocks = (rows + MaxRows - 1) / MaxRows;
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t begin = rows * i / blocks, end = rows * (i + 1) / blocks;
        multiply_rows<T, V, MaxRows>(int(end - begin), begin, static_cast<const uint32_t*>(a),
                                     stride, units, load, start, finish);
    }
}

}  // namespace native

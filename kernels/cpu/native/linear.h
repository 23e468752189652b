// y = x W^T + b on a packed weight, for any number of rows, each row's result its own.
//
// Packed layout: [panels][units][kPanel columns] lanes, where a unit is one lane of the inner
// dimension (two bf16 or one float) and columns past the end are zero. A thread streams its panels
// once.
//
// Arithmetic is fp32 on the values as they are, so a bf16 weight may serve fp32 rows: half the bytes
// to read, and the bits of the same weight held in fp32.
#pragma once

#include "multiply.h"
#include "team.h"

namespace native {

struct Linear {
    const uint32_t* packed;
    const void* bias;  // [columns] in the rows' type, or null
    int64_t columns;
    int64_t inner;
    bool narrow;  // the weight is bf16

    int64_t units() const { return narrow ? inner / kPack<bf16> : inner; }
    int64_t panels() const { return (columns + kPanel - 1) / kPanel; }

    // In how many pieces threads share the product with `rows` rows: none of them is long, but one
    // row streams the weight in long runs, which few pieces leave whole.
    int64_t pieces(int64_t rows, int threads) const {
        const int64_t most = threads == 1 ? 1 : 4 * threads, runs = panels() / (rows == 1 ? 4 : 1);
        return runs < 1 ? 1 : runs < most ? runs : most;
    }
};

// weight: [columns, units] lanes, row-major -> packed, zero-padded.
void pack_weight(const uint32_t* weight, uint32_t* packed, int64_t columns, int64_t units,
                 Share share);

// x: [rows, inner] -> out: [rows, columns] of T or float. With bf16 rows the weight is bf16 too.
template <class T, class Out>
void linear(const Linear& w, const T* x, Out* out, int64_t rows, Share share);

}  // namespace native

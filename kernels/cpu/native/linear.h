// y = x W^T + b on a packed weight, for any number of rows, each row's result its own.
//
// Packed layout: [panels][units][32 columns] lanes, where a unit is one lane of the inner dimension
// (two bf16 or one float) and columns past the end are zero. A thread streams its panels once.
#pragma once

#include "multiply.h"
#include "team.h"

namespace native {

struct Linear {
    const uint32_t* packed;
    const void* bias;  // [columns] in T, or null
    int64_t columns;
    int64_t units;  // lanes of the inner dimension

    int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
};

// weight: [columns, units] lanes, row-major -> packed, zero-padded.
void pack_weight(const uint32_t* weight, uint32_t* packed, int64_t columns, int64_t units,
                 Share share);

// x: [rows, units] lanes -> out: [rows, columns] of T or float.
template <class T, class Out>
void linear(const Linear& w, const T* x, Out* out, int64_t rows, Share share);

}  // namespace native

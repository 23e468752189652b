#include "linear.h"

namespace native {

void pack_weight(const uint32_t* weight, uint32_t* packed, int64_t columns, int64_t units,
                 Share share) {
    const Range range = part((columns + kPanel - 1) / kPanel, share);
    for (int64_t panel = range.begin; panel < range.end; panel++)
        for (int64_t u = 0; u < units; u++)
            for (int64_t c = 0; c < kPanel; c++) {
                const int64_t column = panel * kPanel + c;
                packed[(panel * units + u) * kPanel + c] =
                    column < columns ? weight[column * units + u] : 0;
            }
}

// Rows [begin, end) times Panels neighbouring panels. Out is T or float.
template <class T, class Out, int Panels, int MaxRows>
INLINE void linear_block(const Linear& w, const T* x, Out* out, Range rows, int64_t panel) {
    constexpr int V = 2 * Panels;
    const int64_t inner = w.units * kPack<T>, column = panel * kPanel;
    const uint32_t* weights = w.packed + panel * w.units * kPanel;
    const auto columns = [&](int u, Lanes(&b)[V]) {
        for (int p = 0; p < Panels; p++)
            UNROLL for (int h = 0; h < 2; h++)
                b[2 * p + h] = load_as<Lanes>(weights + (p * w.units + u) * kPanel + h * kLanes);
    };
    const auto zero = [](int64_t, Floats(&acc)[V]) {
        for (int v = 0; v < V; v++) acc[v] = Floats{};
    };
    const auto finish = [&](int64_t row, Floats(&acc)[V]) {
        Out* to = out + (rows.begin + row) * w.columns + column;
        for (int v = 0; v < V; v++) {
            const int count = int(w.columns - column) - v * kLanes;
            if (count <= 0) break;
            if (w.bias)
                acc[v] += load_upto(static_cast<const T*>(w.bias) + column + v * kLanes, count);
            store_upto(to + v * kLanes, acc[v], count);
        }
    };
    multiply_all<T, V, MaxRows>(rows.end - rows.begin, x + rows.begin * inner, w.units,
                                int(w.units), columns, zero, finish);
}

template <class T, class Out>
void linear(const Linear& w, const T* x, Out* out, int64_t rows, Share share) {
    const int64_t panels = w.panels();
    if (rows == 1) {  // bound by reading the weight: several panels hide the products' latency
        const Range range = part(panels, share);
        int64_t panel = range.begin;
        for (; panel + 4 <= range.end; panel += 4)
            linear_block<T, Out, 4, 1>(w, x, out, {0, 1}, panel);
        for (; panel < range.end; panel++) linear_block<T, Out, 1, 1>(w, x, out, {0, 1}, panel);
        return;
    }
    // A chunk of rows stays in the cache while the panels pass by, and is a unit of sharing.
    const int64_t chunk = 8 * kRows, chunks = (rows + chunk - 1) / chunk;
    const Range range = part(chunks * panels, share);
    for (int64_t item = range.begin; item < range.end; item++) {
        const int64_t begin = rows * (item / panels) / chunks;
        const int64_t end = rows * (item / panels + 1) / chunks;
        linear_block<T, Out, 1, kRows>(w, x, out, {begin, end}, item % panels);
    }
}

template void linear(const Linear&, const float*, float*, int64_t, Share);
template void linear(const Linear&, const bf16*, float*, int64_t, Share);
template void linear(const Linear&, const bf16*, bf16*, int64_t, Share);

}  // namespace native

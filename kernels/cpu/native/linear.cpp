#include "linear.h"

#include <algorithm>
#include <type_traits>

#include "tiles.h"

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

namespace {

// Adds the bias to a row's sums of `count` columns from `column` on, and writes them.
template <class T, class Out>
INLINE void finish_row(const Linear& w, const Floats* sums, int vectors, int64_t column, Out* row) {
    for (int v = 0; v < vectors; v++) {
        const int64_t at = column + v * kLanes;
        const int count = int(w.columns - at);
        if (count <= 0) break;
        Floats sum = sums[v];
        if (w.bias) sum += load_upto(static_cast<const T*>(w.bias) + at, count);
        store_upto(row + at, sum, count);
    }
}

// Rows [begin, end) times Panels neighbouring panels. Out is T or float.
template <class T, class Out, int Panels, int MaxRows>
INLINE void linear_block(const Linear& w, const T* x, Out* out, Range rows, int64_t panel) {
    constexpr int V = 2 * Panels;
    const uint32_t* weights = w.packed + panel * w.units * kPanel;
    const auto columns = [&](int u, Lanes(&b)[V]) {
        UNROLL for (int v = 0; v < V; v++)
            b[v] = load_as<Lanes>(weights + (v / 2 * w.units + u) * kPanel + v % 2 * kLanes);
    };
    const auto zero = [](int64_t, Floats(&acc)[V]) {
        for (int v = 0; v < V; v++) acc[v] = Floats{};
    };
    const auto finish = [&](int64_t row, Floats(&acc)[V]) {
        finish_row<T>(w, acc, V, panel * kPanel, out + (rows.begin + row) * w.columns);
    };
    multiply_all<T, V, MaxRows>(rows.end - rows.begin, x + rows.begin * w.units * kPack<T>, w.units,
                                int(w.units), columns, zero, finish);
}

#if NATIVE_TILES

// A thread's use of the tile registers in one call.
template <class Out>
class TileBlock {
  public:
    ~TileBlock() { tile_release(); }

    void operator()(const Linear& w, const bf16* x, Out* out, Range rows, int64_t panel) {
        for (int64_t row = rows.begin; row < rows.end; row += 32) {
            const int count = int(std::min(rows.end - row, int64_t(32)));
            if (count != shaped_) {
                const TileShapes shapes(std::min(count, 16), std::max(count - 16, 0));
                tile_shapes(&shapes);
                shaped_ = count;
            }
            multiply_tiles(reinterpret_cast<const uint32_t*>(x) + row * w.units, w.units, count,
                           w.units, w.packed + panel * w.units * kPanel, sums_);
            for (int r = 0; r < count; r++)
                finish_row<bf16>(w, reinterpret_cast<const Floats*>(sums_ + r * kPanel), 2,
                                 panel * kPanel, out + (row + r) * w.columns);
        }
    }

  private:
    alignas(64) float sums_[32 * kPanel];
    int shaped_ = 0;
};

#endif

}  // namespace

template <class T, class Out>
void linear(const Linear& w, const T* x, Out* out, int64_t rows, Share share) {
    const int64_t panels = w.panels();
    // A chunk of rows stays in the cache while the panels pass by, and is a unit of sharing.
    const int64_t chunk = 96, chunks = (rows + chunk - 1) / chunk;
    const Range range = part(chunks * panels, share);
    const auto rows_of = [&](int64_t item) {
        return Range{rows * (item / panels) / chunks, rows * (item / panels + 1) / chunks};
    };
#if NATIVE_TILES
    if constexpr (std::is_same_v<T, bf16>)
        if (w.units % 16 == 0 && tiles_work()) {
            TileBlock<Out> block;
            for (int64_t item = range.begin; item < range.end; item++)
                block(w, x, out, rows_of(item), item % panels);
            return;
        }
#endif
    if (rows == 1) {  // bound by reading the weight: several panels hide the products' latency
        int64_t panel = range.begin;
        for (; panel + 4 <= range.end; panel += 4)
            linear_block<T, Out, 4, 1>(w, x, out, {0, 1}, panel);
        for (; panel < range.end; panel++) linear_block<T, Out, 1, 1>(w, x, out, {0, 1}, panel);
        return;
    }
    for (int64_t item = range.begin; item < range.end; item++)
        linear_block<T, Out, 1, kRows>(w, x, out, rows_of(item), item % panels);
}

template void linear(const Linear&, const float*, float*, int64_t, Share);
template void linear(const Linear&, const bf16*, float*, int64_t, Share);
template void linear(const Linear&, const bf16*, bf16*, int64_t, Share);

}  // namespace native

#include "linear.h"

#include <algorithm>
#include <type_traits>

#include "buffer.h"
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

// `rows` rows of A times Panels neighbouring panels of B. Out is the rows' type T or float.
template <class A, class B, class T, class Out, int Panels, int MaxRows>
INLINE void linear_block(const Linear& w, const A* x, Out* out, int64_t rows, int64_t panel) {
    constexpr int V = 2 * Panels;
    constexpr int64_t unit_bytes = V * kVectorBytes;
    const int64_t units = w.units();
    const uint32_t* weights = w.packed + panel * units * kPanel;
    // The first block of rows would wait for the memory while it reads the panel, and the others
    // leave the memory idle: so all of them together fetch the next one, evenly.
    const int64_t step = unit_bytes / std::max<int64_t>(row_blocks(rows, MaxRows), 1);
    const char* ahead = reinterpret_cast<const char*>(weights) + units * unit_bytes;
    const auto columns = [&](int u, Lanes(&b)[V]) {
        if constexpr (MaxRows > 1) {
            for (int64_t line = 0; line < unit_bytes; line += 64)
                __builtin_prefetch(ahead + line, 0, 2);
            ahead += step;
        }
        UNROLL for (int v = 0; v < V; v++)
            b[v] = load_as<Lanes>(weights + (v / 2 * units + u) * kPanel + v % 2 * kLanes);
    };
    const auto zero = [](int64_t, Floats(&acc)[V]) {
        for (int v = 0; v < V; v++) acc[v] = Floats{};
    };
    const auto finish = [&](int64_t row, Floats(&acc)[V]) {
        finish_row<T>(w, acc, V, panel * kPanel, out + row * w.columns);
    };
    multiply_all<A, B, V, MaxRows>(rows, x, w.inner / kPack<A>, int(units), columns, zero, finish);
}

// The same for a range of panels.
template <class A, class B, class T, class Out>
void linear_panels(const Linear& w, const A* x, Out* out, int64_t rows, Range panels) {
    int64_t panel = panels.begin;
    if (rows == 1)  // bound by reading the weight: several panels hide the products' latency
        for (; panel + 4 <= panels.end; panel += 4)
            linear_block<A, B, T, Out, 4, 1>(w, x, out, rows, panel);
    for (; panel < panels.end; panel++)
        linear_block<A, B, T, Out, 1, kRows>(w, x, out, rows, panel);
}

// `count` values as factors: where they lie, or widened.
template <class A, class T>
const A* factors(const T* x, int64_t count) {
    if constexpr (std::is_same_v<A, T>) {
        return x;
    } else {
        static thread_local Buffer buffer;
        float* to = buffer.take<float>(count);
        copy_as(x, to, count);
        return to;
    }
}

#if NATIVE_TILES

// A thread's use of the tile registers in one call.
template <class Out>
class TileBlock {
  public:
    ~TileBlock() { tile_release(); }

    void operator()(const Linear& w, const bf16* x, Out* out, int64_t rows, int64_t panel) {
        const int64_t units = w.units();
        for (int64_t row = 0; row < rows; row += 32) {
            const int count = int(std::min(rows - row, int64_t(32)));
            if (count != shaped_) {
                const TileShapes shapes(std::min(count, 16), std::max(count - 16, 0));
                tile_shapes(&shapes);
                shaped_ = count;
            }
            multiply_tiles(reinterpret_cast<const uint32_t*>(x) + row * units, units, count, units,
                           w.packed + panel * units * kPanel, sums_);
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
    const Range items = part(chunks * panels, share);
    // Calls visit(rows, count, out, panels) for every chunk's part of the items.
    const auto each_chunk = [&](auto visit) {
        for (int64_t item = items.begin; item < items.end;) {
            const int64_t i = item / panels, begin = rows * i / chunks;
            const int64_t end = std::min((i + 1) * panels, items.end);
            visit(x + begin * w.inner, rows * (i + 1) / chunks - begin, out + begin * w.columns,
                  Range{item - i * panels, end - i * panels});
            item = end;
        }
    };
#if NATIVE_TILES
    if constexpr (std::is_same_v<T, bf16>)
        if (w.units() % 16 == 0 && tiles_work()) {
            TileBlock<Out> block;
            each_chunk([&](const T* from, int64_t count, Out* to, Range range) {
                for (int64_t panel = range.begin; panel < range.end; panel++)
                    block(w, from, to, count, panel);
            });
            return;
        }
#endif
    each_chunk([&](const T* from, int64_t count, Out* to, Range range) {
        using A = Factor<T>;
        const A* a = factors<A>(from, count * w.inner);
        if (std::is_same_v<T, bf16> || w.narrow)
            linear_panels<A, bf16, T>(w, a, to, count, range);
        else linear_panels<float, float, T>(w, (const float*)a, to, count, range);
    });
}

template void linear(const Linear&, const float*, float*, int64_t, Share);
template void linear(const Linear&, const bf16*, float*, int64_t, Share);
template void linear(const Linear&, const bf16*, bf16*, int64_t, Share);

}  // namespace native

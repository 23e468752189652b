// Keys are taken in tiles of kTile positions counted from position 0, with the online softmax of
// Milakov & Gimelshein (2018); kSplit positions at a time start from nothing and are merged in order
// (as in Flash decoding, Dao et al. 2023). Tiles and splits are laid by position alone, and a fully
// masked tile changes no bit, so a token's result depends neither on the batch, nor on the chunk it
// came in, nor on the number of threads.
#include "attention.h"

#include <algorithm>
#include <cmath>

namespace native {

namespace {

#if NATIVE_AVX512
// Transposes 16 x 16 lanes; row i of the result goes to out + i * stride.
INLINE void transpose(const uint32_t* const* rows, uint32_t* out, int64_t stride) {
    __m512i x[16], a[16], b[16];
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(rows[i]);
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int i = 0; i < 8; i++) {
        const int k = i % 4 + i / 4 * 8;
        a[k] = _mm512_shuffle_i32x4(b[k], b[k + 4], 0x88);
        a[k + 4] = _mm512_shuffle_i32x4(b[k], b[k + 4], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
    }
}
#elif NATIVE_AVX2
// Transposes 8 x 8 lanes; row i of the result goes to out + i * stride.
INLINE void transpose(const uint32_t* const* rows, uint32_t* out, int64_t stride) {
    __m256i x[8], a[8];
    for (int i = 0; i < 8; i++) x[i] = load_as<__m256i>(rows[i]);
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            x[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        store_as(out + i * stride, _mm256_permute2x128_si256(x[i], x[i + 4], 0x20));
        store_as(out + (i + 4) * stride, _mm256_permute2x128_si256(x[i], x[i + 4], 0x31));
    }
}
#else
INLINE void transpose(const uint32_t* const* rows, uint32_t* out, int64_t stride) {
    for (int u = 0; u < kLanes; u++)
        for (int i = 0; i < kLanes; i++) out[u * stride + i] = rows[i][u];
}
#endif

// kLanes keys of `units` lanes -> [units][kLanes], rows `stride` lanes apart.
INLINE void transpose_keys(const uint32_t* const* keys, int units, uint32_t* out, int64_t stride) {
    int u = 0;
    for (; u + kLanes <= units; u += kLanes) {
        const uint32_t* from[kLanes];
        for (int i = 0; i < kLanes; i++) from[i] = keys[i] + u;
        transpose(from, out + u * stride, stride);
    }
    for (; u < units; u++)
        for (int i = 0; i < kLanes; i++) out[u * stride + i] = keys[i][u];
}

// The lanes of kPanel columns of values at keys[0], as floats.
template <class T>
INLINE void value_lanes(const T* const* keys, int64_t column, int count, Lanes (&b)[2], float) {
    const T* from = keys[0] + column;
    T padded[kPanel];
    if (count < kPanel) {
        std::memset(padded, 0, sizeof(padded));
        std::memcpy(padded, from, count * sizeof(T));
        from = padded;
    }
    b[0] = bit_cast<Lanes>(load(from));
    b[1] = bit_cast<Lanes>(load(from + kLanes));
}

#if defined(__AVX512BF16__)
// Those at keys[0] and keys[1], as pairs.
INLINE void value_lanes(const bf16* const* keys, int64_t column, int count, Lanes (&b)[2], bf16) {
    bf16 padded[2][kPanel] = {};
    const bf16 *first = keys[0] + column, *second = keys[1] + column;
    if (count < kPanel) {
        std::memcpy(padded[0], first, count * sizeof(bf16));
        std::memcpy(padded[1], second, count * sizeof(bf16));
        first = padded[0], second = padded[1];
    }
    const auto pairs = [](int from) {  // words from, 32 + from, from + 1, ...
        Words order{};
        for (int i = 0; i < 32; i++) order[i] = uint16_t(from + i / 2 + i % 2 * 32);
        return (__m512i)order;
    };
    const __m512i one = _mm512_loadu_si512(first), two = _mm512_loadu_si512(second);
    b[0] = (Lanes)_mm512_permutex2var_epi16(one, pairs(0), two);
    b[1] = (Lanes)_mm512_permutex2var_epi16(one, pairs(16), two);
}
#endif

// Which positions of packed pages a unit reads from dense copies: the same for all of its queries.
struct Near {
    const int32_t* pages = nullptr;
    int64_t before = 0, from = INT64_MAX;  // all but those of [before, from)

    Near(const Pool& pool, const Batch& batch, const Unit& unit) {
        if (!pool.copies) return;
        pages = batch.copies + unit.row * batch.copies_stride;
        before = pool.format->sink;
        const int64_t position = batch.positions[unit.begin], block = pool.format->window_block;
        if (block) from = position - position % block;
    }

    bool has(int64_t position) const { return position < before || position >= from; }
};

// Where the keys and values of one tile lie: kTile vectors each, scattered over pages, or in
// `unpacked`, [2, kTile, head_dim], where those of packed pages are put.
template <class T>
struct Tile {
    const T* keys[kTile];
    const T* values[kTile];
    int count = 0;  // of visible positions; what is past them repeats the last

    Tile(const Pool& pool, int64_t head, const int32_t* pages, const Near& near, int64_t start,
         int64_t last, T* unpacked) {
        count = int(last + 1 - start < kTile ? last + 1 - start : kTile);
        int64_t page = start / pool.page_size, offset = start % pool.page_size;
        PackedPage packed{};
        int64_t opened = -1;
        for (int i = 0; i < count; i++) {
            if (near.has(start + i)) {
                keys[i] = pool.dense().at<T>(near.pages[page], 0, head, offset);
                values[i] = pool.dense().at<T>(near.pages[page], 1, head, offset);
            } else if (pool.format) {
                if (opened != page) packed = pool.page(pages[opened = page]);
                T *key = unpacked + i * pool.head_dim, *value = key + kTile * pool.head_dim;
                const PackedSlot slot = pool.packed(packed, head, offset);
                decode(slot, 0, key), decode(slot, 1, value);
                keys[i] = key, values[i] = value;
            } else {
                keys[i] = pool.at<T>(pages[page], 0, head, offset);
                values[i] = pool.at<T>(pages[page], 1, head, offset);
            }
            if (++offset == pool.page_size) offset = 0, page++;
        }
        for (int i = count; i < kTile; i++) {
            keys[i] = keys[count - 1];
            values[i] = values[count - 1];
        }
    }
};

// Asks for the vectors of the next tile, evenly during `calls` products of this one: some lines every
// so many. Where there are more products than lines, asking costs more than coming early gains.
template <class T>
class Ahead {
  public:
    Ahead(const T* const* vectors, int count, int64_t dim, int64_t calls)
        : next_(vectors), end_(vectors + count), bytes_(int(dim * sizeof(T))) {
        const int64_t lines = std::max(count * ((bytes_ + 63) / 64), 1);
        every_ = calls > lines ? int(4 * calls / lines) : 1;
        some_ = int((lines * every_ + calls - 1) / calls);
    }

    INLINE void operator()() {
        if (--wait_) return;
        wait_ = every_;
        for (int line = 0; line < some_ && next_ < end_; line++) {
            __builtin_prefetch(reinterpret_cast<const char*>(*next_) + at_, 0, 2);
            if ((at_ += 64) < bytes_) continue;
            at_ = 0, next_++;
        }
    }

  private:
    const T* const* next_;
    const T* const* end_;
    int bytes_, at_ = 0, every_, some_, wait_ = 1;
};

// One thread's workspace for a block of query rows.
template <class T>
struct Workspace {
    Factor<T>* q;        // [rows, head_dim]
    Factor<T>* weights;  // [rows, kTile], exp(score - maximum)
    float* scores;       // [rows, kTile]
    uint32_t* keys;      // [kTile / kPanel][units][kPanel]
    int64_t* positions;  // [rows]
    T* unpacked;         // [2, kTile, head_dim]
    Partial split, total;

    Workspace(const AttentionPlan& plan, int64_t units) {
        static thread_local Buffer buffer;
        const int64_t rows = plan.block_rows, panel_lanes = kTile * units;
        const int64_t tile = 2 * kTile * plan.head_dim / kPack<T>;
        const int64_t lanes =
            rows * (plan.head_dim + 2 * kTile + 2 * plan.width + 6) + panel_lanes + tile;
        uint32_t* at = buffer.take<uint32_t>(lanes + 16 * kLanes);
        const auto cut = [&at](int64_t size) {
            uint32_t* here = at;
            at += (size + kLanes - 1) / kLanes * kLanes;
            return here;
        };
        keys = cut(panel_lanes);
        unpacked = reinterpret_cast<T*>(cut(tile));
        positions = reinterpret_cast<int64_t*>(cut(2 * rows));
        scores = reinterpret_cast<float*>(cut(rows * kTile));
        weights = reinterpret_cast<Factor<T>*>(cut(rows * kTile / kPack<Factor<T>>));
        q = reinterpret_cast<Factor<T>*>(cut(rows * plan.head_dim / kPack<Factor<T>>));
        for (Partial* p : {&split, &total}) {
            p->values = reinterpret_cast<float*>(cut(rows * plan.width));
            p->maximum = reinterpret_cast<float*>(cut(rows));
            p->total = reinterpret_cast<float*>(cut(rows));
        }
    }
};

// Adds the keys of the tile at `start` to the split. `next`: the tile to be read after it, if any.
template <class T>
void attend_tile(const Workspace<T>& work, const Tile<T>& tile, const Tile<T>* next, int64_t dim,
                 int64_t start, int64_t rows, const AttentionShape& shape, int64_t width) {
    using A = Factor<T>;
    const int units = int(dim / kPack<T>);
    const int panels = (tile.count + kPanel - 1) / kPanel;
    for (int i = 0; i < panels * kPanel; i += kLanes)
        transpose_keys(reinterpret_cast<const uint32_t* const*>(tile.keys + i), units,
                       work.keys + i / kPanel * units * kPanel + i % kPanel, kPanel);

    const int64_t times = row_blocks(rows);
    const int coming = next ? next->count : 0;
    Ahead<T> keys_ahead(next ? next->keys : nullptr, coming, dim, times * panels * units);
    for (int p = 0; p < panels; p++) {
        const uint32_t* panel = work.keys + p * units * kPanel;
        const auto columns = [&](int u, Lanes(&b)[2]) {
            keys_ahead();
            b[0] = load_as<Lanes>(panel + u * kPanel);
            b[1] = load_as<Lanes>(panel + u * kPanel + kLanes);
        };
        const auto zero = [](int64_t, Floats(&acc)[2]) { acc[0] = acc[1] = Floats{}; };
        const auto finish = [&](int64_t row, Floats(&acc)[2]) {
            for (int h = 0; h < 2; h++)
                store(work.scores + row * kTile + p * kPanel + h * kLanes, acc[h] * shape.scale);
        };
        multiply_all<A, T, 2>(rows, work.q, dim / kPack<A>, units, columns, zero, finish);
    }

    const Ints lane = bit_cast<Ints>(lane_numbers());
    for (int64_t row = 0; row < rows; row++) {
        // Visible keys of this tile are those at [oldest, newest].
        const int64_t position = work.positions[row] - start;
        const int newest = int(position < kTile ? position : kTile);
        const int64_t window_start = shape.window ? position - shape.window + 1 : 0;
        const int oldest = int(window_start > 0 ? window_start : 0);
        Floats top = splat(kNothing), total{};
        for (int i = 0; i < panels * kPanel; i += kLanes) {
            float* at = work.scores + row * kTile + i;
            const Ints key = lane + i;
            const Floats score = (key <= newest) & (key >= oldest) ? load(at) : splat(-INFINITY);
            store(at, score);
            top = max(top, score);
        }
        const float before = work.split.maximum[row], tile_top = largest(top);
        const float now = before > tile_top ? before : tile_top;
        for (int i = 0; i < panels * kPanel; i += kLanes) {
            const Floats weight = exp(load(work.scores + row * kTile + i) - now);
            store(work.weights + row * kTile + i, weight);
            total += weight;
        }
        if (before != now) {
            const Floats shrink = exp(splat(before - now));
            work.split.maximum[row] = now;
            work.split.total[row] *= shrink[0];
            float* to = work.split.values + row * width;
            for (int64_t i = 0; i < width; i += kLanes) store(to + i, load(to + i) * shrink);
        }
        work.split.total[row] += sum(total);
    }

    const int steps = (tile.count + kPack<A> - 1) / kPack<A>;  // a key each, or two
    const int64_t products = times * steps * ((dim + kPanel - 1) / kPanel);
    Ahead<T> values_ahead(next ? next->values : nullptr, coming, dim, products);
    for (int64_t column = 0; column < dim; column += kPanel) {
        const auto columns = [&](int u, Lanes(&b)[2]) {
            values_ahead();
            value_lanes(tile.values + u * kPack<A>, column, int(dim - column), b, A{});
        };
        const auto start_row = [&](int64_t row, Floats(&acc)[2]) {
            for (int h = 0; h < 2; h++)
                acc[h] = load(work.split.values + row * width + column + h * kLanes);
        };
        const auto finish = [&](int64_t row, Floats(&acc)[2]) {
            for (int h = 0; h < 2; h++)
                store(work.split.values + row * width + column + h * kLanes, acc[h]);
        };
        multiply_all<A, A, 2>(rows, work.weights, kTile / kPack<A>, steps, columns, start_row,
                              finish);
    }
}

// Writes the finished softmax of a block's rows (head of group fastest) to out.
template <class T>
void finish_block(const Partial& total, const AttentionPlan& plan, const Unit& unit, int64_t head,
                  int64_t heads, const NativeFormat* format, T* out) {
    for (int64_t row = 0; row < (unit.end - unit.begin) * plan.group; row++) {
        const int64_t token = unit.begin + row / plan.group;
        const int64_t query_head = head * plan.group + row % plan.group;
        T* to = out + (token * heads + query_head) * plan.head_dim;
        float* from = total.values + row * plan.width;
        if (format) turn_back(*format, from, plan.head_dim);
        for (int64_t i = 0; i < plan.head_dim; i += kLanes)
            store_upto(to + i, load(from + i) / total.total[row], int(plan.head_dim - i));
    }
}

// The positions a unit looks at: tiles from `begin` (a multiple of kTile) to the one that holds
// `last`.
struct Reach {
    const int32_t* pages;
    Near near;
    int64_t oldest, begin, last;

    Reach(const Pool& pool, const Batch& batch, const AttentionShape& shape, const Unit& unit)
        : pages(batch.page_table + unit.row * batch.table_stride), near(pool, batch, unit) {
        oldest = shape.window ? batch.positions[unit.begin] - shape.window + 1 : 0;
        begin = std::max(unit.first_split * kSplit, std::max(oldest, int64_t(0)) / kTile * kTile);
        last = std::min((unit.last_split + 1) * kSplit - 1, batch.positions[unit.end - 1]);
    }

    template <class T>
    Tile<T> tile(const Pool& pool, int64_t head, int64_t start, T* unpacked = nullptr) const {
        return Tile<T>(pool, head, pages, near, start, last, unpacked);
    }
};

// q, out: [tokens, heads, head_dim]; upcoming: a tile likely to be read after this unit's, null for
// packed pages, which are read as they are unpacked.
template <class T>
void attend_unit(const T* q, T* out, const Pool& pool, const Batch& batch, AttentionPlan& plan,
                 const AttentionShape& shape, const Unit& unit, int64_t head,
                 const Tile<T>* upcoming) {
    const int64_t dim = plan.head_dim, rows = (unit.end - unit.begin) * plan.group;
    const Workspace<T> work(plan, dim / kPack<T>);
    for (int64_t token = unit.begin; token < unit.end; token++) {
        const int64_t row = (token - unit.begin) * plan.group;
        const T* from = q + (token * shape.heads + head * plan.group) * dim;
        if (pool.format) {
            for (int64_t g = 0; g < plan.group; g++) {
                float x[kMostDim];
                copy_as(from + g * dim, x, dim);
                turn(*pool.format, x, dim);
                copy_as(x, work.q + (row + g) * dim, dim);
            }
        } else {
            copy_as(from, work.q + row * dim, plan.group * dim);
        }
        for (int64_t g = 0; g < plan.group; g++) work.positions[row + g] = batch.positions[token];
    }
    const Reach reach(pool, batch, shape, unit);
    const Partial& split = work.split;
    const Partial total =
        unit.partial < 0 ? work.total : plan.partial(unit.partial, pool.kv_heads, head);
    total.clear(rows, plan.width);
    split.clear(rows, plan.width);
    Tile<T> tile = reach.tile<T>(pool, head, reach.begin, work.unpacked);
    for (int64_t start = reach.begin; start <= reach.last; start += kTile) {
        const int64_t after = start + kTile;
        if (pool.format) {
            attend_tile<T>(work, tile, nullptr, dim, start, rows, shape, plan.width);
            if (after <= reach.last) tile = reach.tile<T>(pool, head, after, work.unpacked);
        } else {
            const Tile<T> next = after <= reach.last ? reach.tile<T>(pool, head, after) : *upcoming;
            attend_tile(work, tile, &next, dim, start, rows, shape, plan.width);
            tile = next;
        }
        if (after % kSplit && after <= reach.last) continue;
        total.merge(split, rows, plan.width);
        split.clear(rows, plan.width);
    }
    if (unit.partial < 0) finish_block(total, plan, unit, head, shape.heads, pool.format, out);
}

}  // namespace

template <class T>
void attend(const T* q, T* out, const Pool& pool, const Batch& batch, AttentionPlan& plan,
            const AttentionShape& shape, Pieces& stage) {
    const int64_t heads = pool.kv_heads, total = plan.pieces(heads);
    // Several at a time, so that mostly a thread knows what it does next.
    const int64_t run = std::max<int64_t>(total / (16 * plan.threads), 1);
    for (Range mine; (mine = stage.take(total, run)).begin < mine.end; stage.done(mine))
        for (int64_t i = mine.begin; i < mine.end; i++) {
            const Unit& unit = plan.units[i / heads];
            if (pool.format) {
                attend_unit<T>(q, out, pool, batch, plan, shape, unit, i % heads, nullptr);
                continue;
            }
            const int64_t guess = i + 1 < mine.end ? i + 1 : stage.next();
            const int64_t j = std::min(guess, total - 1);
            const Reach reach(pool, batch, shape, plan.units[j / heads]);
            const Tile<T> upcoming = reach.tile<T>(pool, j % heads, reach.begin);
            attend_unit(q, out, pool, batch, plan, shape, unit, i % heads, &upcoming);
        }
}

template <class T>
void merge_splits(T* out, const Pool& pool, AttentionPlan& plan, int64_t heads, Share share) {
    const Range range = part(int64_t(plan.blocks.size()) * pool.kv_heads, share);
    for (int64_t i = range.begin; i < range.end; i++) {
        const Unit& block = plan.blocks[i / pool.kv_heads];
        const int64_t head = i % pool.kv_heads, rows = (block.end - block.begin) * plan.group;
        const Partial total = plan.partial(block.partial, pool.kv_heads, head);
        for (int64_t s = 1; s <= block.last_split - block.first_split; s++)
            total.merge(plan.partial(block.partial + s, pool.kv_heads, head), rows, plan.width);
        finish_block(total, plan, block, head, heads, pool.format, out);
    }
}

template void attend(const float*, float*, const Pool&, const Batch&, AttentionPlan&,
                     const AttentionShape&, Pieces&);
template void attend(const bf16*, bf16*, const Pool&, const Batch&, AttentionPlan&,
                     const AttentionShape&, Pieces&);
template void merge_splits(float*, const Pool&, AttentionPlan&, int64_t, Share);
template void merge_splits(bf16*, const Pool&, AttentionPlan&, int64_t, Share);

}  // namespace native

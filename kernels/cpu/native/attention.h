// Paged causal attention over ragged rows: how a batch is divided, and the operator's interface.
//
// A unit of work is a block of query tokens of one row against one KV head: its keys and values are
// read once for all query heads of the group and all tokens of the block.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "buffer.h"
#include "multiply.h"
#include "pointwise.h"
#include "stages.h"

namespace native {

constexpr int kTile = 64;
constexpr int kSplit = 512;
constexpr int kQueryRows = 32;     // query tokens times heads of a group in one block
constexpr float kNothing = -1e30f;  // the maximum of no scores; finite, so differences stay numbers

struct Batch {
    const int64_t* positions;     // [tokens]
    const int32_t* query_starts;  // [rows + 1]
    const int32_t* page_table;    // [rows, table_stride]
    int64_t rows, table_stride;
    const int32_t* copies;  // [rows, copies_stride], where windows are dense; null: there are none
    int64_t copies_stride;
};

// Query tokens [begin, end) of a row against key splits [first_split, last_split].
struct Unit {
    int64_t row, begin, end, first_split, last_split;
    int64_t partial;  // where its partial results go; -1: it sees all its splits and finishes alone
};

// What remains of a softmax over some of the keys, for a block of query rows.
struct Partial {
    float* maximum;  // [rows]
    float* total;    // [rows], sum of exp(score - maximum)
    float* values;   // [rows, width], sum of exp(score - maximum) * value

    void clear(int64_t rows, int64_t width) const {
        for (int64_t r = 0; r < rows; r++) maximum[r] = kNothing, total[r] = 0;
        std::memset(values, 0, rows * width * sizeof(float));
    }

    void merge(const Partial& next, int64_t rows, int64_t width) const {
        for (int64_t r = 0; r < rows; r++) {
            const float top = maximum[r] > next.maximum[r] ? maximum[r] : next.maximum[r];
            const Floats a = exp(splat(maximum[r] - top)), b = exp(splat(next.maximum[r] - top));
            maximum[r] = top;
            total[r] = total[r] * a[0] + next.total[r] * b[0];
            float *to = values + r * width, *from = next.values + r * width;
            for (int64_t i = 0; i < width; i += kLanes)
                store(to + i, load(to + i) * a + load(from + i) * b);
        }
    }
};

// The division of one batch into units; the same for all layers of equal shape and windows.
struct AttentionPlan {
    std::vector<Unit> units;
    std::vector<Unit> blocks;  // query blocks whose partial results are to be merged
    int64_t group, head_dim, width, block_rows, partials = 0;
    int64_t work = 0;  // multiply-adds, about
    int threads;
    Buffer buffer;

    AttentionPlan(const Batch& batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                  int64_t window, int64_t window_block, int threads)
        : group(heads / kv_heads), head_dim(head_dim),
          width((head_dim + kPanel - 1) / kPanel * kPanel), threads(threads) {
        const int64_t block = group < kQueryRows ? kQueryRows / group : 1;
        block_rows = block * group;
        for (int64_t row = 0; row < batch.rows; row++)
            for (int64_t t = batch.query_starts[row], end; t < batch.query_starts[row + 1]; t = end) {
                const int64_t stop = batch.query_starts[row + 1];
                end = t + block < stop ? t + block : stop;
                if (window_block)  // what one query of a unit reads dense, all do
                    end = std::min(end, t + window_block - batch.positions[t] % window_block);
                const int64_t oldest = window ? batch.positions[t] - window + 1 : 0;
                const int64_t first = (oldest > 0 ? oldest : 0) / kSplit;
                const int64_t last = batch.positions[end - 1] / kSplit;
                blocks.push_back({row, t, end, first, last, -1});
                work += (end - t) * heads * head_dim * (batch.positions[end - 1] + 1);
            }
        // Few blocks and long contexts: the splits are shared out as well.
        const bool divide = threads > 1 && int64_t(blocks.size()) * kv_heads < 2 * threads;
        for (Unit& block : blocks) {
            if (!divide || block.first_split == block.last_split) {
                units.push_back(block);
                continue;
            }
            block.partial = partials;
            for (int64_t s = block.first_split; s <= block.last_split; s++)
                units.push_back({block.row, block.begin, block.end, s, s, partials++});
        }
        std::vector<Unit> divided;
        for (const Unit& block : blocks)
            if (block.partial >= 0) divided.push_back(block);
        blocks = divided;
    }

    int64_t pieces(int64_t kv_heads) const { return int64_t(units.size()) * kv_heads; }

    int64_t partial_size() const { return block_rows * (width + 2); }

    // Room for the partial results of every head; called before the work is shared out.
    void reserve(int64_t kv_heads) {
        if (partials) buffer.take<float>(partials * kv_heads * partial_size());
    }

    Partial partial(int64_t index, int64_t kv_heads, int64_t head) {
        float* at = buffer.take<float>(0) + (index * kv_heads + head) * partial_size();
        return {at, at + block_rows, at + 2 * block_rows};
    }
};

struct AttentionShape {
    int64_t heads;
    float scale;
    int64_t window;  // 0: none
};

// One thread's part: the (unit, head) pairs that are the pieces of the stage, `plan.pieces` of them,
// until none is left. q, out: [tokens, heads, head_dim].
template <class T>
void attend(const T* q, T* out, const Pool& pool, const Batch& batch, AttentionPlan& plan,
            const AttentionShape& shape, Pieces& stage);

// After every unit is done: merges the splits that were shared out.
template <class T>
void merge_splits(T* out, const Pool& pool, AttentionPlan& plan, int64_t heads, Share share);

}  // namespace native

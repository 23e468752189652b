// A whole decoder step in one parallel region: the operators of `ops.cpp` as stages.
//
// At one row a step is a few hundred microseconds of arithmetic; sixty calls with a fork and a join
// each, and the interpreter between them, would double it.
#include <algorithm>
#include <utility>

#include "attention.h"
#include "decoder.h"
#include "linear.h"
#include "pointwise.h"
#include "stages.h"

using namespace native;

namespace {

int64_t widest(const NativeModel& model, int64_t (*size)(const NativeLayer&)) {
    int64_t most = 0;
    for (int64_t i = 0; i < model.num_layers; i++)
        most = std::max(most, size(model.layers[i]));
    return most;
}

// Where the intermediate results lie; each is a row a token.
template <class T>
struct Intermediates {
    T *residual, *normed, *delta, *qkv, *q, *attended, *gate_up, *activated;
    int64_t bytes = 0;

    Intermediates(const NativeModel& model, int64_t tokens, void* workspace) {
        const auto cut = [&](int64_t width) {
            T* at = reinterpret_cast<T*>(static_cast<char*>(workspace) + bytes);
            bytes += (tokens * width * int64_t(sizeof(T)) + 63) / 64 * 64;
            return at;
        };
        const int64_t attention = model.heads * model.head_dim;
        const auto both = [](const NativeLayer& l) { return l.gate_up.columns; };
        const auto inner = [](const NativeLayer& l) { return l.down.inner; };
        residual = cut(model.hidden);
        normed = cut(model.hidden);
        delta = cut(model.hidden);
        qkv = cut(attention + 2 * model.kv_heads * model.head_dim);
        q = cut(attention);
        attended = cut(attention);
        gate_up = cut(widest(model, both));
        activated = cut(widest(model, inner));
    }
};

// One attention plan for each kind of windows among the layers.
class Plans {
  public:
    Plans(const NativeModel& model, const Batch& batch, int threads) {
        for (int64_t i = 0; i < model.num_layers; i++) {
            const NativeLayer& layer = model.layers[i];
            if (find(layer)) continue;
            plans_.emplace_back(Key(layer), std::make_unique<AttentionPlan>(
                batch, model.heads, model.kv_heads, model.head_dim, layer.window,
                Key(layer).window_block, threads));
            plans_.back().second->reserve(model.kv_heads);
        }
    }

    AttentionPlan* find(const NativeLayer& layer) {
        for (auto& [key, plan] : plans_)
            if (key == Key(layer)) return plan.get();
        return nullptr;
    }

  private:
    struct Key {
        int64_t window, window_block;

        explicit Key(const NativeLayer& layer)
            : window(layer.window), window_block(layer.format ? layer.format->window_block : 0) {}
        bool operator==(const Key& other) const {
            return window == other.window && window_block == other.window_block;
        }
    };
    std::vector<std::pair<Key, std::unique_ptr<AttentionPlan>>> plans_;
};

template <class T>
void project(const NativeProjection& p, const T* x, T* out, int64_t rows, int threads,
             Stages::Walk& stage) {
    const Linear w{(const uint32_t*)p.packed, p.bias, p.columns, p.inner, p.type != 0};
    stage.pieces(w.pieces(rows, threads), [&](Share piece) { linear(w, x, out, rows, piece); });
}

constexpr int kStagesOfLayer = 10;  // at most; the embedding and the choice of tokens add two

template <class T>
void run(const NativeModel& model, const NativeStep& step, int threads) {
    const Intermediates<T> at(model, step.tokens, step.workspace);
    const Batch batch{step.positions, step.query_starts, step.page_table, step.rows,
                      step.table_stride, step.copies, step.copies_stride};
    const Slots slots{step.slots, step.copy_slots};
    Plans plans(model, batch, threads);
    Stages stages(threads, 2 + kStagesOfLayer * model.num_layers);
    const int64_t hidden = model.hidden, heads = model.heads, width = heads * model.head_dim;

    parallel(threads, INT64_MAX, [&](Share share) {
        Stages::Walk stage(stages, share);
        T *residual = at.residual, *normed = at.normed, *attended = at.attended;
        int64_t tokens = step.tokens;
        stage.shares([&](Share share) {
            const Range mine = part(tokens, share);
            for (int64_t t = mine.begin; t < mine.end; t++)
                std::memcpy(residual + t * hidden, (const T*)model.embedding + step.ids[t] * hidden,
                            hidden * sizeof(T));
            rms_norm(residual, (const T*)model.layers[0].input_norm, normed, tokens, hidden,
                     model.eps, share);
        });
        for (int64_t i = 0; i < model.num_layers; i++) {
            const NativeLayer& layer = model.layers[i];
            const bool last = i + 1 == model.num_layers;
            const Pool pool{layer.pool, model.kv_heads, model.page_size, model.head_dim,
                            layer.format, layer.copies};
            const Rotary rotary{layer.cos_sin, layer.rotary_half, layer.q_norm, layer.k_norm,
                                layer.qk_eps};
            const AttentionShape shape{heads, layer.scale, layer.window};
            AttentionPlan& plan = *plans.find(layer);

            project(layer.qkv, normed, at.qkv, tokens, threads, stage);
            stage.shares([&](Share share) {
                rope_append(at.qkv, at.q, pool, step.positions, slots, tokens, heads, rotary,
                            share);
            });
            stage.taking(plan.pieces(model.kv_heads), [&](Pieces& pieces) {
                attend(at.q, attended, pool, batch, plan, shape, pieces);
            });
            if (!plan.blocks.empty())
                stage.shares([&](Share share) {
                    merge_splits(attended, pool, plan, heads, share);
                });
            if (last && step.reads >= 0) {  // from here on only the wanted tokens matter
                stage.shares([&](Share share) {
                    const Range wanted = part(step.reads, share);
                    for (int64_t r = wanted.begin; r < wanted.end; r++) {
                        std::memcpy(normed + r * hidden, residual + step.read[r] * hidden,
                                    hidden * sizeof(T));
                        std::memcpy(at.q + r * width, attended + step.read[r] * width,
                                    width * sizeof(T));
                    }
                });
                std::swap(residual, normed);
                attended = at.q;
                tokens = step.reads;
            }
            project(layer.output, attended, at.delta, tokens, threads, stage);
            stage.shares([&](Share share) {
                add_rms_norm(at.delta, residual, (const T*)layer.mlp_norm, normed, tokens, hidden,
                             model.eps, share);
            });
            project(layer.gate_up, normed, at.gate_up, tokens, threads, stage);
            stage.shares([&](Share share) {
                silu_mul(at.gate_up, at.activated, tokens, layer.down.inner, share);
            });
            project(layer.down, at.activated, at.delta, tokens, threads, stage);
            const void* norm = last ? model.norm : model.layers[i + 1].input_norm;
            stage.shares([&](Share share) {
                add_rms_norm(at.delta, residual, (const T*)norm, last ? (T*)step.out : normed,
                             tokens, hidden, model.eps, share);
            });
        }
    });
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int64_t native_workspace_bytes(const NativeModel* model, int64_t tokens) {
    return Intermediates<float>(*model, tokens, nullptr).bytes;
}

void native_decoder_step(const NativeModel* model, const NativeStep* step, int threads) {
    if (model->type) run<bf16>(*model, *step, threads);
    else run<float>(*model, *step, threads);
}

}  // extern "C"
#pragma GCC visibility pop

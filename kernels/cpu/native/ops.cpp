// The C interface of single operators. Pointers are to contiguous tensors unless a stride is given;
// `type` is 0 for fp32 and 1 for bf16; `threads` is the size of the OpenMP team.
#include "attention.h"
#include "linear.h"
#include "pointwise.h"
#include "tiles.h"

using namespace native;

namespace {

template <class Work>
void with_type(int type, Work work) {
    if (type) work(bf16{});
    else work(float{});
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void native_rms_norm(int type, const void* x, const void* weight, void* out, int64_t rows,
                     int64_t hidden, float eps, int threads) {
    with_type(type, [&](auto tag) {
        using T = decltype(tag);
        parallel(threads, rows * hidden, [&](Share share) {
            rms_norm((const T*)x, (const T*)weight, (T*)out, rows, hidden, eps, share);
        });
    });
}

void native_add_rms_norm(int type, const void* x, void* residual, const void* weight, void* out,
                         int64_t rows, int64_t hidden, float eps, int threads) {
    with_type(type, [&](auto tag) {
        using T = decltype(tag);
        parallel(threads, rows * hidden, [&](Share share) {
            add_rms_norm((const T*)x, (T*)residual, (const T*)weight, (T*)out, rows, hidden, eps,
                         share);
        });
    });
}

void native_silu_mul(int type, const void* gate_up, void* out, int64_t rows, int64_t width,
                     int threads) {
    with_type(type, [&](auto tag) {
        using T = decltype(tag);
        parallel(threads, 4 * rows * width, [&](Share share) {
            silu_mul((const T*)gate_up, (T*)out, rows, width, share);
        });
    });
}

void native_rope_append(int type, const void* qkv, void* q, const NativeFormat* format,
                        void* pool, void* copies, int64_t kv_heads, int64_t page_size,
                        int64_t head_dim, const int64_t* positions, const int64_t* slots,
                        const int64_t* copy_slots, int64_t tokens, int64_t heads,
                        const float* cos_sin, int64_t half, const void* q_norm,
                        const void* k_norm, float eps, int threads) {
    const Pool kv{pool, kv_heads, page_size, head_dim, format, copies};
    const Rotary rotary{cos_sin, half, q_norm, k_norm, eps};
    with_type(type, [&](auto tag) {
        using T = decltype(tag);
        parallel(threads, 2 * tokens * (heads + 2 * kv_heads) * head_dim, [&](Share share) {
            rope_append((const T*)qkv, (T*)q, kv, positions, Slots{slots, copy_slots}, tokens,
                        heads, rotary, share);
        });
    });
}

void native_append(int type, const void* k, const void* v, int64_t k_stride, int64_t v_stride,
                   const NativeFormat* format, void* pool, void* copies, int64_t kv_heads,
                   int64_t page_size, int64_t head_dim, const int64_t* slots,
                   const int64_t* copy_slots, int64_t tokens, int threads) {
    const Pool kv{pool, kv_heads, page_size, head_dim, format, copies};
    with_type(type, [&](auto tag) {
        using T = decltype(tag);
        parallel(threads, tokens * kv_heads * head_dim, [&](Share share) {
            append((const T*)k, (const T*)v, k_stride, v_stride, kv, Slots{slots, copy_slots},
                   tokens, share);
        });
    });
}

void native_attend(int type, const void* q, void* out, const NativeFormat* format, void* pool,
                   void* copies, int64_t kv_heads, int64_t page_size, int64_t head_dim,
                   const int64_t* positions, const int32_t* query_starts,
                   const int32_t* page_table, int64_t rows, int64_t table_stride,
                   const int32_t* copies_table, int64_t copies_stride, int64_t heads, float scale,
                   int64_t window, int threads) {
    const Pool kv{pool, kv_heads, page_size, head_dim, format, copies};
    const Batch batch{positions, query_starts, page_table, rows, table_stride, copies_table,
                      copies_stride};
    const AttentionShape shape{heads, scale, window};
    const int64_t window_block = format ? format->window_block : 0;
    AttentionPlan plan(batch, heads, kv_heads, head_dim, window, window_block, threads);
    plan.reserve(kv_heads);
    Stages stages(threads, 2);
    with_type(type, [&](auto tag) {
        using T = decltype(tag);
        parallel(threads, plan.work, [&](Share share) {
            Stages::Walk stage(stages, share);
            stage.taking(plan.pieces(kv_heads), [&](Pieces& pieces) {
                attend((const T*)q, (T*)out, kv, batch, plan, shape, pieces);
            });
            if (plan.blocks.empty()) return;
            stage.shares([&](Share share) { merge_splits((T*)out, kv, plan, heads, share); });
        });
    });
}

// Whether bf16 products run on the machine's matrix tiles.
int native_has_tiles() { return tiles_work(); }

// weight: [columns, inner]; packed: room for native_packed_bytes.
int64_t native_packed_bytes(int type, int64_t columns, int64_t inner) {
    const int64_t units = inner / (type ? kPack<bf16> : kPack<float>);
    return (columns + kPanel - 1) / kPanel * kPanel * units * int64_t(sizeof(uint32_t));
}

void native_pack(int type, const void* weight, void* packed, int64_t columns, int64_t inner,
                 int threads) {
    const int64_t units = inner / (type ? kPack<bf16> : kPack<float>);
    parallel(threads, columns * inner, [&](Share share) {
        pack_weight((const uint32_t*)weight, (uint32_t*)packed, columns, units, share);
    });
}

// `type` is that of x and the bias; an fp32 x may meet a bf16 weight. out is fp32 when `wide`, else of
// the type of x.
void native_linear(int type, int weight_type, const void* packed, const void* bias, const void* x,
                   void* out, int64_t rows, int64_t columns, int64_t inner, int wide,
                   int threads) {
    with_type(type, [&](auto tag) {
        using T = decltype(tag);
        const Linear w{(const uint32_t*)packed, bias, columns, inner, weight_type != 0};
        parallel_pieces(threads, columns * inner, w.pieces(rows, threads), [&](Share piece) {
            if (wide) linear(w, (const T*)x, (float*)out, rows, piece);
            else linear(w, (const T*)x, (T*)out, rows, piece);
        });
    });
}

}  // extern "C"
#pragma GCC visibility pop

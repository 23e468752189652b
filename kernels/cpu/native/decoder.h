// The C interface of a whole decoder step.
#pragma once

#include <cstdint>

struct NativeFormat;

extern "C" {

// Mirrors of the structures in `decoder.py`. Weights are packed (see `linear.h`), biases may be null.
struct NativeProjection {
    const void* packed;
    const void* bias;
    int64_t columns;
    int64_t inner;
    int32_t type;  // of the weight
};

struct NativeLayer {
    const void* input_norm;
    NativeProjection qkv;
    const void* q_norm;
    const void* k_norm;
    NativeProjection output;
    const void* mlp_norm;
    NativeProjection gate_up;
    NativeProjection down;
    const float* cos_sin;
    int64_t rotary_half;
    int64_t window;  // 0: none
    float scale;
    float qk_eps;
    void* pool;
    void* copies;                // its dense pages of packed positions; null: no windows
    const NativeFormat* format;  // of the pool's pages; null: dense
};

struct NativeModel {
    const NativeLayer* layers;
    int64_t num_layers;
    int64_t hidden;
    int64_t heads, kv_heads, head_dim, page_size;
    const void* embedding;  // [vocabulary, hidden]
    const void* norm;
    float eps;
    int32_t type;
};

struct NativeStep {
    const int64_t* ids;
    const int64_t* positions;
    const int64_t* slots;
    const int32_t* query_starts;
    const int32_t* page_table;
    int64_t tokens, rows, table_stride;
    void* workspace;      // native_workspace_bytes
    void* out;            // [tokens, hidden], or [reads, hidden]
    const int64_t* read;  // [reads] tokens whose hidden states are wanted
    int64_t reads;        // -1: all
    // Where windows are dense, as `slots` and `page_table`; null: no layer has any.
    const int64_t* copy_slots;
    const int32_t* copies;
    int64_t copies_stride;
};

int64_t native_workspace_bytes(const NativeModel* model, int64_t tokens);
void native_decoder_step(const NativeModel* model, const NativeStep* step, int threads);
}

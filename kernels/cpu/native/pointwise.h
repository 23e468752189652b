// Norms, activation, rotary embedding and the KV append: one thread's share of each.
#pragma once

#include <cmath>

#include "packed.h"
#include "team.h"
#include "vectors.h"

namespace native {

// 1 / sqrt(mean(x^2) + eps) of n floats.
template <class T>
INLINE float inverse_rms(const T* x, int64_t n, float eps) {
    Floats total{};
    for (int64_t i = 0; i < n; i += kLanes) {
        const Floats v = load_upto(x + i, int(n - i));
        total += v * v;
    }
    return 1.0f / std::sqrt(sum(total) / float(n) + eps);
}

// out = x * inverse_rms(x) * weight, for rows of `hidden`.
template <class T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t hidden, float eps,
              Share share) {
    const Range range = part(rows, share);
    for (int64_t row = range.begin; row < range.end; row++) {
        const T* from = x + row * hidden;
        T* to = out + row * hidden;
        const float scale = inverse_rms(from, hidden, eps);
        for (int64_t i = 0; i < hidden; i += kLanes) {
            const int count = int(hidden - i);
            const Floats v = load_upto(from + i, count) * scale * load_upto(weight + i, count);
            store_upto(to + i, v, count);
        }
    }
}

// residual += x, rounded to T; out = rms_norm(residual).
template <class T>
void add_rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t hidden,
                  float eps, Share share) {
    const Range range = part(rows, share);
    for (int64_t i = range.begin * hidden; i < range.end * hidden; i += kLanes) {
        const int count = int(range.end * hidden - i);
        store_upto(residual + i, load_upto(residual + i, count) + load_upto(x + i, count), count);
    }
    rms_norm(residual + range.begin * hidden, weight, out + range.begin * hidden,
             range.end - range.begin, hidden, eps, Share{0, 1});
}

// out = silu(gate) * up; gate_up: rows of [gate | up], each `width` long.
template <class T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t width, Share share) {
    const int64_t chunk = 256, chunks = (width + chunk - 1) / chunk;
    const Range range = part(rows * chunks, share);
    for (int64_t item = range.begin; item < range.end; item++) {
        const int64_t row = item / chunks, begin = item % chunks * chunk;
        const int64_t end = begin + chunk < width ? begin + chunk : width;
        const T* gate = gate_up + row * 2 * width;
        for (int64_t i = begin; i < end; i += kLanes) {
            const int count = int(end - i);
            const Floats g = load_upto(gate + i, count), up = load_upto(gate + width + i, count);
            store_upto(out + row * width + i, g / (exp(-g) + 1.0f) * up, count);
        }
    }
}

// The KV pool of a layer: [pages, 2, kv_heads, page_size, head_dim], or [pages, page_bytes].
struct Pool {
    void* data;
    int64_t kv_heads, page_size, head_dim;
    const NativeFormat* format;  // null: dense
    void* copies;                // dense pages of packed positions; null: there are no windows

    // The vector of one slot and head; half 0: keys, 1: values.
    template <class T>
    INLINE T* at(int64_t page, int half, int64_t head, int64_t offset) const {
        return static_cast<T*>(data) +
               (((page * 2 + half) * kv_heads + head) * page_size + offset) * head_dim;
    }

    template <class T>
    INLINE T* slot(int64_t slot, int half, int64_t head) const {
        return at<T>(slot / page_size, half, head, slot % page_size);
    }

    // A negative entry is half of a page (`kernels/kv/paged.py`).
    INLINE PackedPage page(int64_t entry) const {
        uint8_t* pages = static_cast<uint8_t*>(data);
        if (entry < 0) return {pages + ~entry * (format->page_bytes / 2), true};
        return {pages + entry * format->page_bytes, format->coarse != 0};
    }

    INLINE PackedSlot packed(const PackedPage& page, int64_t head, int64_t offset) const {
        return {*format, page.at, head * page_size + offset, kv_heads * page_size, head_dim,
                page.coarse};
    }

    // The dense pages of packed positions, which hold what is packed: it is turned.
    INLINE Pool dense() const { return {copies, kv_heads, page_size, head_dim, nullptr, nullptr}; }
};

// Where tokens are written, page * page_size + offset each.
struct Slots {
    const int64_t* pages;
    const int64_t* copies;  // null: there are no windows

    // A key or value of one token and head, as floats that are changed, to packed pages.
    template <class T>
    INLINE void encode_to(const Pool& pool, int64_t token, int half, int64_t head, float* x) const {
        const int64_t slot = pages[token], size = pool.page_size;
        encode(pool.packed(pool.page(slot / size), head, slot % size), half, head, x);
        if (pool.copies)
            copy_as(x, pool.dense().slot<T>(copies[token], half, head), pool.head_dim);
    }
};

struct Rotary {
    const float* cos_sin;  // [positions, 2, rotary_dim / 2]; null: no rotary embedding
    int64_t half;          // rotary_dim / 2
    const void* q_norm;    // [head_dim] in T; null: no norm
    const void* k_norm;
    float eps;
};

// One head: norm, then rotation of the first 2 * half dimensions, dimension i with i + half.
template <class T, class To>
INLINE void rotate(const T* from, To* to, int64_t dim, const T* norm, const float* cos_sin,
                   int64_t half, float eps) {
    float x[kMostDim];
    const float scale = norm ? inverse_rms(from, dim, eps) : 1.0f;
    for (int64_t i = 0; i < dim; i += kLanes) {
        const int count = int(dim - i);
        Floats v = load_upto(from + i, count);
        if (norm) v = v * scale * load_upto(norm + i, count);
        store_upto(x + i, v, count);
    }
    for (int64_t i = 0; i < half; i += kLanes) {
        const int count = int(half - i);
        const Floats a = load_upto(x + i, count), b = load_upto(x + half + i, count);
        const Floats c = load_upto(cos_sin + i, count), s = load_upto(cos_sin + half + i, count);
        store_upto(to + i, a * c - b * s, count);
        store_upto(to + half + i, b * c + a * s, count);
    }
    for (int64_t i = 2 * half; i < dim; i += kLanes)
        store_upto(to + i, load_upto(x + i, int(dim - i)), int(dim - i));
}

// qkv: [tokens, (heads + 2 * kv_heads) * head_dim] -> q [tokens, heads, head_dim] and the pool.
template <class T>
void rope_append(const T* qkv, T* q, Pool pool, const int64_t* positions, Slots slots,
                 int64_t tokens, int64_t heads, Rotary rotary, Share share) {
    const int64_t dim = pool.head_dim, width = heads + 2 * pool.kv_heads;
    const Range range = part(tokens * width, share);
    for (int64_t item = range.begin; item < range.end; item++) {
        const int64_t token = item / width, head = item % width;
        const T* from = qkv + item * dim;
        const int64_t half = rotary.cos_sin ? rotary.half : 0;
        const float* cos_sin = rotary.cos_sin + (half ? positions[token] * 2 * half : 0);
        if (head < heads) {
            T* to = q + (token * heads + head) * dim;
            rotate(from, to, dim, static_cast<const T*>(rotary.q_norm), cos_sin, half, rotary.eps);
        } else if (pool.format) {
            float x[kMostDim];
            const bool key = head < heads + pool.kv_heads;
            if (key)
                rotate(from, x, dim, static_cast<const T*>(rotary.k_norm), cos_sin, half,
                       rotary.eps);
            else
                copy_as(from, x, dim);
            slots.encode_to<T>(pool, token, key ? 0 : 1,
                               head - heads - (key ? 0 : pool.kv_heads), x);
        } else if (head < heads + pool.kv_heads) {
            T* to = pool.slot<T>(slots.pages[token], 0, head - heads);
            rotate(from, to, dim, static_cast<const T*>(rotary.k_norm), cos_sin, half, rotary.eps);
        } else {
            T* to = pool.slot<T>(slots.pages[token], 1, head - heads - pool.kv_heads);
            std::memcpy(to, from, dim * sizeof(T));
        }
    }
}

// k, v: [tokens, kv_heads, head_dim], tokens `stride` elements apart.
template <class T>
void append(const T* k, const T* v, int64_t k_stride, int64_t v_stride, Pool pool,
            Slots slots, int64_t tokens, Share share) {
    const int64_t dim = pool.head_dim;
    const Range range = part(tokens * pool.kv_heads, share);
    for (int64_t item = range.begin; item < range.end; item++) {
        const int64_t token = item / pool.kv_heads, head = item % pool.kv_heads;
        if (pool.format) {
            float x[kMostDim];
            copy_as(k + token * k_stride + head * dim, x, dim);
            slots.encode_to<T>(pool, token, 0, head, x);
            copy_as(v + token * v_stride + head * dim, x, dim);
            slots.encode_to<T>(pool, token, 1, head, x);
            continue;
        }
        std::memcpy(pool.slot<T>(slots.pages[token], 0, head), k + token * k_stride + head * dim,
                    dim * sizeof(T));
        std::memcpy(pool.slot<T>(slots.pages[token], 1, head), v + token * v_stride + head * dim,
                    dim * sizeof(T));
    }
}

}  // namespace native

// What min-p, top-k and top-p leave of a row, and the draw from it.
#pragma once

#include <functional>

#include "draw.h"

namespace native {

using Doubles = double __attribute__((vector_size(kVectorBytes)));
using Longs = int64_t __attribute__((vector_size(kVectorBytes)));
using HalfFloats = float __attribute__((vector_size(kVectorBytes / 2)));

// exp for x <= 0, to the last bit or two of a double; exactly 1 at 0, 0 below -700.
INLINE Doubles exp(Doubles x) {
    const Doubles lowest = Doubles{} - 700, zero{};
    const Doubles clamped = x > lowest ? x : lowest;
    const Doubles magic = zero + 0x1.8p52;
    const Doubles shifted = clamped * 0x1.71547652b82fep0 + magic;
    const Doubles n = shifted - magic;
    const Doubles r = (clamped - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;
    Doubles y = zero + 1.0 / 479001600;
    constexpr double inverse_factorials[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                             1.0 / 40320,    1.0 / 5040,    1.0 / 720,
                                             1.0 / 120,      1.0 / 24,      1.0 / 6,
                                             1.0 / 2,        1.0,           1.0};
    for (double c : inverse_factorials) y = y * r + c;
    const Longs exponent = (Longs)shifted - (Longs)magic + 1023;
    y = y * (Doubles)(exponent << 52);
    return x < lowest ? zero : y;
}

// Candidates of a row in the order of their ids.
struct Candidates {
    std::vector<float> z;  // room for a row and a vector more; `count` are in use
    std::vector<int32_t> token;
    int64_t count = 0;
    std::vector<float> order;  // scratch of selections
    std::vector<int32_t> edge;

    void reset(int64_t vocab) {
        count = 0;
        if ((int64_t)z.size() < vocab + kTile) z.resize(vocab + kTile), token.resize(vocab + kTile);
    }

    // Appends the lanes where `keep` is set. May write up to kLanes entries past `count`.
    INLINE void append(Floats values, Lanes tokens, Ints keep) {
#if NATIVE_AVX512
        const __mmask16 mask = _mm512_test_epi32_mask((__m512i)keep, (__m512i)keep);
        store_as(z.data() + count, _mm512_maskz_compress_ps(mask, (__m512)values));
        store_as(token.data() + count, _mm512_maskz_compress_epi32(mask, (__m512i)tokens));
        count += __builtin_popcount(mask);
#else
        for (int i = 0; i < kLanes; i++) {  // without a branch, which would be a coin toss
            z[count] = values[i], token[count] = (int32_t)tokens[i];
            count += keep[i] != 0;
        }
#endif
    }

    // Keeps those with z >= floor.
    void filter(float floor) {
        const int64_t before = count;
        pad();
        count = 0;
        for (int64_t i = 0; i < before; i += kLanes) {
            const Floats values = load(z.data() + i);
            append(values, load_as<Lanes>(token.data() + i),
                   (values >= floor) & (values > kNothing));
        }
    }

    // Makes what follows the last candidate harmless to whole vectors.
    void pad() {
        std::fill_n(z.begin() + count, kLanes, kNothing);
        std::fill_n(token.begin() + count, kLanes, 0);
    }
};

// The k-th largest of `count` values, 1 <= k <= count; `scratch` is overwritten.
inline float kth_largest(const float* values, int64_t count, int64_t k,
                         std::vector<float>& scratch) {
    scratch.assign(values, values + count);
    std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(),
                     std::greater<float>());
    return scratch[k - 1];
}

// All tokens with z >= floor.
inline void gather(const TiledRow& row, float temperature, float floor, Candidates& found) {
    const Lanes lane = lane_numbers();
    for (int64_t t = 0; t < row.count(); t++) {
        if ((row.maxima[t] - row.top) / temperature < floor) continue;
        for (int i = 0; i < kTile; i += kLanes) {
            const Floats z = (load(row.tile(t) + i) - row.top) / temperature;
            const Ints keep = (z >= floor) & (z > kNothing);
            if (any(keep)) found.append(z, lane + (uint32_t)(t * kTile + i), keep);
        }
    }
}

// Keeps the shortest prefix, likeliest first, holding `top_p` of the candidates' mass. A histogram
// over z finds the bucket in which the prefix ends, and only that bucket is sorted.
inline void keep_nucleus(Candidates& found, double top_p) {
    constexpr int kBuckets = 256;
    constexpr float kPerNat = 8;
    const auto bucket_of = [](float z) { return (int)std::min(-z * kPerNat, kBuckets - 1.0f); };
    double parts[8][kBuckets] = {};  // one a lane, so that no addition waits for another
    found.pad();
    for (int64_t i = 0; i < found.count; i += kLanes) {
        const float* z = found.z.data() + i;
        alignas(64) int32_t bucket[kLanes];
        alignas(64) double e[kLanes];
        const Floats place = load(z) * -kPerNat, lowest = splat(kBuckets - 1);
        store_as(bucket, __builtin_convertvector(place < lowest ? place : lowest, Ints));
        for (int j = 0; j < kLanes; j += kLanes / 2)
            store_as(e + j, exp(__builtin_convertvector(load_as<HalfFloats>(z + j), Doubles)));
        for (int j = 0; j < kLanes; j++) parts[j % 8][bucket[j]] += e[j];
    }
    double mass[kBuckets] = {}, total = 0;
    for (int b = 0; b < kBuckets; b++) {
        for (const auto& part : parts) mass[b] += part[b];
        total += mass[b];
    }
    const double wanted = top_p * total;
    int last = 0;
    double before = 0;  // of the buckets above
    while (last < kBuckets - 1 && before + mass[last] < wanted) before += mass[last++];

    // A little below the bucket's lower end, so that rounding loses nothing.
    found.filter(last < kBuckets - 1 ? -(last + 1.001f) / kPerNat : kNothing);
    std::vector<int32_t>& edge = found.edge;
    edge.clear();
    for (int64_t i = 0; i < found.count; i++) {
        const int bucket = bucket_of(found.z[i]);
        if (bucket == last) edge.push_back((int32_t)i);
        if (bucket > last) found.z[i] = kNothing;
    }
    std::stable_sort(edge.begin(), edge.end(),
                     [&](int32_t a, int32_t b) { return found.z[a] > found.z[b]; });
    for (const int32_t i : edge) {
        const double z = found.z[i];
        if (before >= wanted) found.z[i] = kNothing;
        else before += exp(Doubles{} + z)[0];
    }
    // What was struck out stays in the list at -inf, which nothing draws.
}

inline int64_t draw_from(Candidates& found, const Draw& draw) {
    Winner winner;
    found.pad();
    for (int64_t i = 0; i < found.count; i += kLanes) {
        const Floats z = load(found.z.data() + i);
        if (!any(z + (kGumbelMax + kSlack) >= winner.score)) continue;
        const Lanes token = load_as<Lanes>(found.token.data() + i), place = token & 3;
        Lanes words[4];
        philox(token >> 2, draw, words);
        const Lanes word = place == 0   ? words[0]
                           : place == 1 ? words[1]
                           : place == 2 ? words[2]
                                        : words[3];
        const Floats v = uniform(word);
        const Ints reaches = z + noise_bound(v) >= winner.score;
        if (!any(reaches)) continue;
        for (int j = 0; j < kLanes; j++)
            if (reaches[j] && z[j] > kNothing) winner.offer(z[j] + gumbel(v[j]), token[j]);
    }
    return winner.token;
}

inline int64_t draw_truncated(const TiledRow& row, int64_t vocab, const Draw& draw,
                              Candidates& found) {
    float floor = draw.log_min_p;
    const bool by_k = draw.top_k < vocab;
    if (by_k && draw.top_k <= row.count()) {
        // The k-th largest tile maximum is at most the k-th largest token.
        const float kth = kth_largest(row.maxima, row.count(), draw.top_k, found.order);
        floor = std::max(floor, (kth - row.top) / draw.temperature);
    }
    found.reset(vocab);
    gather(row, draw.temperature, floor, found);
    if (by_k && draw.top_k < found.count)
        found.filter(kth_largest(found.z.data(), found.count, draw.top_k, found.order));
    if (draw.top_p < 1) keep_nucleus(found, draw.top_p);
    return draw_from(found, draw);
}

// A temperature of 0 is greedy. A row without a finite maximum gives 0.
inline int64_t choose(const TiledRow& row, int64_t vocab, const Draw& draw, Candidates& found) {
    if (!row.usable) return 0;
    if (draw.temperature == 0) return argmax(row);
    if (draw.log_min_p == kNothing && draw.top_k >= vocab && draw.top_p >= 1)
        return draw_from_all(row, draw);
    return draw_truncated(row, vocab, draw, found);
}

}  // namespace native

// Drawing a token from a logits row: kernels/sampling/reference.py in native code, token for token.
//
// Whatever decides (z, the score, the truncated set) is computed as the specification says, in the
// same order of roundings; everything before is a filter with slack. A row depends on itself alone.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace native {

constexpr int kTile = 64;  // tokens: the four words of one Philox block in each of sixteen lanes
constexpr float kGumbelMax = 22.9f;
constexpr float kSlack = 1e-3f;  // nats; far above the rounding of any filter below
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// One row's parameters, as kernels/sampling/reference.py has them.
struct Draw {
    float temperature;
    float log_min_p;  // -inf is off
    int64_t top_k;    // at least the vocabulary's size is off
    double top_p;     // at least 1 is off
    uint64_t seed;
    uint32_t choice;
    uint32_t position;
};

struct Winner {
    float score = kNothing;
    int64_t token = 0;

    INLINE void offer(float other, int64_t candidate) {
        if (other > score || (other == score && candidate < token)) score = other, token = candidate;
    }
};

// --- noise --------------------------------------------------------------------------------------

using Wide = uint64_t __attribute__((vector_size(64)));

// The 64-bit products of sixteen lanes with one factor, as high and low words.
INLINE void multiply(Lanes a, uint32_t factor, Lanes& high, Lanes& low) {
    const Wide both = bit_cast<Wide>(a), mask = Wide{} + 0xffffffffu;
#if NATIVE_AVX512
    const __m512i by = _mm512_set1_epi32((int)factor);
    const Wide even = (Wide)_mm512_mul_epu32((__m512i)both, by);
    const Wide odd = (Wide)_mm512_mul_epu32((__m512i)(both >> 32), by);
#else
    const Wide even = (both & mask) * factor, odd = (both >> 32) * factor;
#endif
    low = bit_cast<Lanes>((even & mask) | (odd << 32));
    high = bit_cast<Lanes>((even >> 32) | (odd & ~mask));
}

// Philox4x32-10 of sixteen blocks of four tokens.
INLINE void philox(Lanes block, const Draw& draw, Lanes words[4]) {
    Lanes c0 = block, c1 = Lanes{} + draw.position, c2 = Lanes{} + draw.choice, c3 = Lanes{} + 1;
    uint32_t k0 = (uint32_t)draw.seed, k1 = (uint32_t)(draw.seed >> 32);
    for (int round = 0; round < 10; round++) {
        Lanes high0, low0, high1, low1;
        multiply(c0, 0xD2511F53u, high0, low0);
        multiply(c2, 0xCD9E8D57u, high1, low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

INLINE Floats uniform(Lanes word) {
    const Floats v = (__builtin_convertvector(word, Floats) + 0.5f) * 0x1p-32f;
    const Floats highest = splat(1 - 0x1p-24f);
    return v > highest ? highest : v;
}

inline float gumbel(float v) {
    const float exponential = (float)-std::log1p(-(double)v);
    return (float)-std::log((double)exponential);
}

// -log(v) from above, by at most 0.06: the bits of a float are its logarithm, roughly. Since
// -log1p(-v) >= v, it bounds the noise.
INLINE Floats noise_bound(Floats v) {
    constexpr float ln2 = 0.69314718f;
    return 127 * ln2 + kSlack - __builtin_convertvector(bit_cast<Ints>(v), Floats) * (ln2 * 0x1p-23f);
}

INLINE bool any(Ints mask) {
#if NATIVE_AVX512
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    Wide halves = bit_cast<Wide>(mask);
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++) bits |= halves[i];
    return bits != 0;
#endif
}

// --- rows ---------------------------------------------------------------------------------------

// A row cut into tiles, and the maximum of each. The last tile is padded with -inf.
class TiledRow {
  public:
    TiledRow(const float* logits, int64_t vocab, std::vector<float>& tile_max)
        : logits_(logits), whole_(vocab / kTile), count_((vocab + kTile - 1) / kTile) {
        std::fill(tail_, tail_ + kTile, kNothing);
        std::copy(logits + whole_ * kTile, logits + vocab, tail_);
        tile_max.resize(count_);
        Ints bad{};
        for (int64_t t = 0; t < count_; t++) {
            const float* x = tile(t);
            Floats most = splat(kNothing);
            for (int i = 0; i < kTile; i += kLanes) {
                const Floats part = load(x + i);
                bad |= part != part;
                most = max(part, most);
            }
            tile_max[t] = largest(most);
        }
        maxima = tile_max.data();
        top = *std::max_element(maxima, maxima + count_);
        usable = !any(bad) && std::isfinite(top);
    }

    int64_t count() const { return count_; }
    const float* tile(int64_t t) const { return t < whole_ ? logits_ + t * kTile : tail_; }

    const float* maxima;
    float top;
    bool usable;  // the maximum is finite and nothing is NaN

  private:
    const float* logits_;
    int64_t whole_, count_;
    alignas(64) float tail_[kTile];
};

inline int64_t argmax(const TiledRow& row) {
    const int64_t t = std::find(row.maxima, row.maxima + row.count(), row.top) - row.maxima;
    const float* x = row.tile(t);
    return t * kTile + (std::find(x, x + kTile, row.top) - x);
}

// Every token may be drawn.
inline int64_t draw_from_all(const TiledRow& row, const Draw& draw) {
    // Not below the true quotient in the filters, even where 1 / temperature overflows.
    const float inverse = std::min(1 / draw.temperature, FLT_MAX);
    const Lanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Winner winner;
    const auto visit = [&](int64_t t) {
        // Rounding is monotone and the slack covers it, so no token of a skipped tile could win.
        if ((row.maxima[t] - row.top) * inverse + kGumbelMax + kSlack < winner.score) return;
        Lanes words[4];
        philox(lane + (uint32_t)(t * kLanes), draw, words);
        alignas(64) uint32_t by_token[kTile];
        for (int i = 0; i < kLanes; i++)
            for (int w = 0; w < 4; w++) by_token[4 * i + w] = words[w][i];
        const float* x = row.tile(t);
        for (int i = 0; i < kTile; i += kLanes) {
            const Floats v = uniform(load_as<Lanes>(by_token + i));
            const Floats bound = (load(x + i) - row.top) * inverse + noise_bound(v);
            const Ints reaches = bound >= winner.score;
            if (!any(reaches)) continue;
            for (int j = 0; j < kLanes; j++)
                if (reaches[j] && x[i + j] > kNothing)
                    winner.offer((x[i + j] - row.top) / draw.temperature + gumbel(v[j]),
                                 t * kTile + i + j);
        }
    };
    const int64_t first = argmax(row) / kTile;  // a good score early skips most of the rest
    visit(first);
    for (int64_t t = 0; t < row.count(); t++)
        if (t != first) visit(t);
    return winner.token;
}

// --- truncation ---------------------------------------------------------------------------------

using Doubles = double __attribute__((vector_size(64)));
using Longs = int64_t __attribute__((vector_size(64)));
using HalfFloats = float __attribute__((vector_size(32)));

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

    // Appends the lanes where `keep` is set. May write up to sixteen entries past `count`.
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
    const Lanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
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
        for (int j = 0; j < kLanes; j += 8)
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

// --- batches ------------------------------------------------------------------------------------

// logits: [rows, vocab]; draws: one a row, or null for the argmax. A row without a finite maximum
// gives 0.
inline void sample(const float* logits, const Draw* draws, int64_t* tokens, int64_t rows,
                   int64_t vocab, Share share) {
    thread_local std::vector<float> maxima;
    thread_local Candidates found;
    const Range range = part(rows, share);
    for (int64_t r = range.begin; r < range.end; r++) {
        const TiledRow row(logits + r * vocab, vocab, maxima);
        if (!row.usable) {
            tokens[r] = 0;
        } else if (draws == nullptr) {
            tokens[r] = argmax(row);
        } else if (draws[r].log_min_p == kNothing && draws[r].top_k >= vocab &&
                   draws[r].top_p >= 1) {
            tokens[r] = draw_from_all(row, draws[r]);
        } else {
            tokens[r] = draw_truncated(row, vocab, draws[r], found);
        }
    }
}

}  // namespace native

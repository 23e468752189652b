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

constexpr int kTile = 4 * kLanes;  // tokens: the four words of one Philox block in each lane
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

using Wide = uint64_t __attribute__((vector_size(kVectorBytes)));

// The 64-bit products of lanes with one factor, as high and low words.
INLINE void multiply(Lanes a, uint32_t factor, Lanes& high, Lanes& low) {
    const Wide both = bit_cast<Wide>(a), mask = Wide{} + 0xffffffffu;
#if NATIVE_AVX512
    const __m512i by = _mm512_set1_epi32((int)factor);
    const Wide even = (Wide)_mm512_mul_epu32((__m512i)both, by);
    const Wide odd = (Wide)_mm512_mul_epu32((__m512i)(both >> 32), by);
#elif NATIVE_AVX2
    const __m256i by = _mm256_set1_epi32((int)factor);
    const Wide even = (Wide)_mm256_mul_epu32((__m256i)both, by);
    const Wide odd = (Wide)_mm256_mul_epu32((__m256i)(both >> 32), by);
#else
    const Wide even = (both & mask) * factor, odd = (both >> 32) * factor;
#endif
    low = bit_cast<Lanes>((even & mask) | (odd << 32));
    high = bit_cast<Lanes>((even >> 32) | (odd & ~mask));
}

// Philox4x32-10 of kLanes blocks of four tokens.
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
#elif NATIVE_AVX2
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    Wide halves = bit_cast<Wide>(mask);
    uint64_t bits = 0;
    for (int i = 0; i < kLanes / 2; i++) bits |= halves[i];
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
    const Lanes lane = lane_numbers();
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

}  // namespace native

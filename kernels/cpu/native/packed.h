// Keys and values in few bits: `kernels/kv/paged.py` says how a page is laid out, `codec.py` how a
// vector becomes codes. Both compute the same bytes.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

extern "C" {

// Mirror of the structure in `packed.py`.
struct NativeFormat {
    int64_t page_bytes;
    int64_t starts[5];   // of the keys' high plane, the values', numbers, the low planes
    int64_t groups[2];   // of dimensions with a scale each; 0: keys, 1: values
    int32_t bits[2];
    float clip[2];       // outermost values in root mean squares; 0: by the range
    int64_t block;       // dimensions rotated together; 0: none
    const float* signs;  // [head_dim]
    const float* mean;   // [kv_heads, head_dim], subtracted from keys; null: nothing
    int32_t coarse;      // read by the high planes alone
    // What is read dense although it is packed: the first positions, and those of the reader's own
    // block of text; 0: none. See `kernels/kv/windows.py`.
    int64_t sink, window_block;
};
}

namespace native {

constexpr int kMostDim = 1024;   // of a head
constexpr int kMostGroups = 64;  // of a vector
constexpr float kLargestHalf = 65504.0f;
constexpr float kMostGrowth = 2.0f;  // see `codec.py`

INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__) && (NATIVE_AVX512 || NATIVE_AVX2)
    return _cvtsh_ss(h);
#else
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest < 0x0400) {  // a multiple of 2^-24
        const float tiny = float(rest) * 5.9604644775390625e-8f;
        return bit_cast<float>(bit_cast<uint32_t>(tiny) | sign);
    }
    return bit_cast<float>(((rest << 13) + 0x38000000u) | sign);
#endif
}

// Of a number that is no larger than 65504. Rounds to nearest, ties to even.
INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__) && (NATIVE_AVX512 || NATIVE_AVX2)
    return _cvtss_sh(x, 0);
#else
    const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000;
    const float size = std::fabs(x);
    if (size < 6.103515625e-5f)  // by adding what puts the last place where it belongs
        return uint16_t(sign | (bit_cast<uint32_t>(size + 0.5f) - bit_cast<uint32_t>(0.5f)));
    const uint32_t rest = bit_cast<uint32_t>(size) - 0x38000000u;
    return uint16_t(sign | ((rest + 0x0fff + ((rest >> 13) & 1)) >> 13));
#endif
}

// The orthonormal Walsh-Hadamard transform of each block, in place.
inline void hadamard(float* x, int64_t dim, int64_t block) {
    for (int64_t half = 1; half < block; half *= 2)
        for (int64_t i = 0; i < dim; i += 2 * half)
            for (int64_t j = i; j < i + half; j++) {
                const float low = x[j], high = x[j + half];
                x[j] = low + high, x[j + half] = low - high;
            }
    const float scale = float(1.0 / std::sqrt(double(block)));
    for (int64_t i = 0; i < dim; i++) x[i] *= scale;
}

// Of a vector, to where keys and values are stored.
INLINE void turn(const NativeFormat& format, float* x, int64_t dim) {
    if (!format.block) return;
    for (int64_t i = 0; i < dim; i++) x[i] *= format.signs[i];
    hadamard(x, dim, format.block);
}

INLINE void turn_back(const NativeFormat& format, float* x, int64_t dim) {
    if (!format.block) return;
    hadamard(x, dim, format.block);
    for (int64_t i = 0; i < dim; i++) x[i] *= format.signs[i];
}

// kLanes bytes as unsigned numbers.
INLINE Lanes load_bytes(const uint8_t* from) {
#if NATIVE_AVX512
    return (Lanes)_mm512_cvtepu8_epi32(load_as<__m128i>(from));
#elif NATIVE_AVX2
    return (Lanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
    using Bytes = uint8_t __attribute__((vector_size(kLanes)));
    return __builtin_convertvector(load_as<Bytes>(from), Lanes);
#endif
}

// The first `count` of them, the rest as zeros.
INLINE Lanes load_bytes(const uint8_t* from, int count) {
    if (count >= kLanes) return load_bytes(from);
    uint8_t padded[kLanes] = {};
    std::memcpy(padded, from, count);
    return load_bytes(padded);
}

INLINE Floats as_floats(Lanes small) {
    return __builtin_convertvector(bit_cast<Ints>(small), Floats);
}

// What an entry of a page table stands for.
struct PackedPage {
    uint8_t* at;
    bool coarse;  // to be read by the high planes alone
};

// One position of one head, in a page.
struct PackedSlot {
    const NativeFormat& format;
    uint8_t* page;
    int64_t place, positions, dim;  // head * page_size + offset; kv_heads * page_size
    bool coarse;                    // to be read by the high planes alone

    int numbers(int which) const { return 2 * int(format.groups[which]); }
    int64_t plane_bytes(int which) const {
        return format.bits[which] == 8 ? dim / 2 : dim * format.bits[which] / 8;
    }
    uint8_t* high(int which) const {
        return page + format.starts[which] + place * plane_bytes(which);
    }
    uint8_t* low(int which) const {
        return page + format.starts[3 + which] + place * plane_bytes(which);
    }
    uint16_t* number(int which) const {
        uint16_t* all = reinterpret_cast<uint16_t*>(page + format.starts[2]);
        return all + place * (numbers(0) + numbers(1)) + (which ? numbers(0) : 0);
    }
};

// The sum of squares of x: [size], in the order of `squares` in `codec.py`. The squares are rounded
// before they are added: no statement has both.
inline float sum_of_squares(const float* x, int64_t size) {
    float terms[kMostDim];
    for (int64_t i = 0; i < size; i++) terms[i] = x[i] * x[i];
    for (; size % 2 == 0; size /= 2)
        for (int64_t i = 0; i < size / 2; i++) terms[i] += terms[i + size / 2];
    float total = terms[0];
    for (int64_t i = 1; i < size; i++) total += terms[i];
    return total;
}

// By how much the numbers of a group grow, so that what is decoded is as long as x: [size].
inline float stretch(const float* x, const uint8_t* codes, int64_t size, float scale, float zero) {
    float decoded[kMostDim];
    for (int64_t i = 0; i < size; i++) decoded[i] = float(codes[i]) * scale;
    for (int64_t i = 0; i < size; i++) decoded[i] += zero;
    const float length = sum_of_squares(decoded, size);
    if (!(length > 0)) return 1.0f;
    return std::min(std::sqrt(sum_of_squares(x, size) / length), kMostGrowth);
}

INLINE void store_numbers(uint16_t* to, float scale, float zero) {
    to[0] = float_to_half(std::min(scale, kLargestHalf));
    to[1] = float_to_half(std::max(std::min(zero, kLargestHalf), -kLargestHalf));
}

// x: [dim], of head `head`, changed. which: 0 a key, 1 a value.
inline void encode(const PackedSlot& slot, int which, int64_t head, float* x) {
    const NativeFormat& format = slot.format;
    const int64_t dim = slot.dim, groups = format.groups[which], size = dim / groups;
    const int bits = format.bits[which], count = 1 << bits;
    if (which == 0 && format.mean)
        for (int64_t i = 0; i < dim; i++) x[i] -= format.mean[head * dim + i];
    turn(format, x, dim);
    uint8_t codes[kMostDim];
    uint16_t* numbers = slot.number(which);
    for (int64_t g = 0; g < groups; g++) {
        const float* from = x + g * size;
        float scale, zero;
        if (format.clip[which] > 0) {
            const float mean = sum_of_squares(from, size) * float(1.0 / double(size));
            const float rms = std::sqrt(mean);
            scale = rms * (2 * format.clip[which] / float(count - 1));
            zero = rms * -format.clip[which];
        } else {
            float lowest = from[0], highest = from[0];
            for (int64_t i = 1; i < size; i++) {
                lowest = from[i] < lowest ? from[i] : lowest;
                highest = from[i] > highest ? from[i] : highest;
            }
            scale = (highest - lowest) * (1.0f / float(count));
            zero = lowest + scale * 0.5f;
        }
        store_numbers(numbers + 2 * g, scale, zero);
        scale = half_to_float(numbers[2 * g]), zero = half_to_float(numbers[2 * g + 1]);
        const float inverse = scale > 0 ? 1.0f / scale : 0.0f, most = float(count - 1);
        for (int64_t i = 0; i < size; i++) {
            const float code = std::nearbyint((from[i] - zero) * inverse);
            codes[g * size + i] = uint8_t(int(code < 0 ? 0 : code > most ? most : code));
        }
        if (bits == 8) continue;
        const float by = stretch(from, codes + g * size, size, scale, zero);
        store_numbers(numbers + 2 * g, scale * by, zero * by);
    }
    uint8_t *high = slot.high(which), *low = slot.low(which);
    if (bits == 8) {
        for (int64_t i = 0; i < dim / 2; i++) {
            const uint8_t a = codes[i], b = codes[i + dim / 2];
            high[i] = uint8_t(a >> 4 | (b & 0xf0));
            low[i] = uint8_t((a & 15) | b << 4);
        }
        return;
    }
    const int parts = 8 / bits;
    const int64_t run = dim / parts;
    for (int64_t i = 0; i < run; i++) {
        uint8_t byte = 0;
        for (int p = 0; p < parts; p++) byte |= uint8_t(codes[p * run + i] << (p * bits));
        high[i] = byte;
    }
}

// `count` codes, the part-th of each byte of a plane at `high`, times a scale plus a zero.
template <int bits, class T>
INLINE void decode_run(const uint8_t* high, const uint8_t* low, int part, int64_t count,
                       float scale, float zero, bool coarse, T* out) {
    constexpr int plane = bits == 8 ? 4 : bits;
    const Lanes mask = Lanes{} + uint32_t((1 << plane) - 1);
    for (int64_t i = 0; i < count; i += kLanes) {
        const int some = int(count - i < kLanes ? count - i : kLanes);
        Lanes code = (load_bytes(high + i, some) >> (part * plane)) & mask;
        if constexpr (bits == 8) {
            if (coarse) {
                store_upto(out + i, as_floats(code) * (16.0f * scale) + (7.5f * scale + zero), some);
                continue;
            }
            code = code << 4 | ((load_bytes(low + i, some) >> (part * plane)) & mask);
        }
        store_upto(out + i, as_floats(code) * scale + zero, some);
    }
}

#if defined(__AVX512BF16__)
// The same for codes of four bits or two, thirty-two at a time: the few values that there are stand
// in a register, which the codes are indices of. `count` is a multiple of sixteen.
template <int bits>
INLINE void look_up_run(const uint8_t* high, int part, int64_t count, float scale, float zero,
                        bf16* out) {
    const Floats value = as_floats(lane_numbers()) * scale + zero;
    const __m512i values = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh((__m512)value));
    const __m512i mask = _mm512_set1_epi16((1 << bits) - 1);
    const auto look_up = [&](__m256i codes) {
        const __m512i words = _mm512_srli_epi16(_mm512_cvtepu8_epi16(codes), part * bits);
        return _mm512_permutexvar_epi16(_mm512_and_si512(words, mask), values);
    };
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        _mm512_storeu_si512(out + i, look_up(load_as<__m256i>(high + i)));
    if (i < count)
        store_as(out + i, _mm512_castsi512_si256(
                              look_up(_mm256_castsi128_si256(load_as<__m128i>(high + i)))));
}

// The same for codes of eight bits, whose halves meet before they are widened.
INLINE void combine_run(const uint8_t* high, const uint8_t* low, int part, int64_t count,
                        float scale, float zero, bf16* out) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m512 by = _mm512_set1_ps(scale), plus = _mm512_set1_ps(zero);
    const auto widened = [&](__m128i codes) {
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)), by, plus);
    };
    for (int64_t i = 0; i < count; i += 32) {
        const __m256i h = load_as<__m256i>(high + i), l = load_as<__m256i>(low + i);
        const __m256i codes = part
            ? _mm256_or_si256(_mm256_andnot_si256(nibble, h),
                              _mm256_and_si256(_mm256_srli_epi16(l, 4), nibble))
            : _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(h, nibble), 4),
                              _mm256_and_si256(l, nibble));
        const __m512 first = widened(_mm256_castsi256_si128(codes));
        const __m512 second = widened(_mm256_extracti128_si256(codes, 1));
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
}
#endif

template <int bits, class T>
INLINE void decode_as(const PackedSlot& slot, int which, T* out) {
    constexpr int plane = bits == 8 ? 4 : bits, parts = 8 / plane;
    const NativeFormat& format = slot.format;
    const uint8_t *high = slot.high(which), *low = bits == 8 ? slot.low(which) : nullptr;
    const uint16_t* numbers = slot.number(which);
    const int64_t run = slot.dim / parts;
    const auto decode_part = [&](int p, int64_t from, int64_t count, float scale, float zero) {
        T* to = out + p * run + from;
#if defined(__AVX512BF16__)
        if constexpr (bits < 8 && std::is_same_v<T, bf16>) {
            if (count % 16 == 0) return look_up_run<bits>(high + from, p, count, scale, zero, to);
        }
        if constexpr (bits == 8 && std::is_same_v<T, bf16>) {
            if (count % 32 == 0 && !slot.coarse)
                return combine_run(high + from, low + from, p, count, scale, zero, to);
        }
#endif
        decode_run<bits>(high + from, low + from, p, count, scale, zero, slot.coarse, to);
    };
    if (format.groups[which] == 1) {
        const float scale = half_to_float(numbers[0]), zero = half_to_float(numbers[1]);
        UNROLL for (int p = 0; p < parts; p++) decode_part(p, 0, run, scale, zero);
        return;
    }
    const int64_t size = slot.dim / format.groups[which];
    for (int p = 0; p < parts; p++) {
        const int64_t begin = p * run, end = begin + run;  // cut where the groups end
        for (int64_t g = begin / size, at = begin; at < end; g++) {
            const int64_t stop = std::min((g + 1) * size, end);
            decode_part(p, at - begin, stop - at, half_to_float(numbers[2 * g]),
                        half_to_float(numbers[2 * g + 1]));
            at = stop;
        }
    }
}

// The vector, turned, to out: [dim].
template <class T>
INLINE void decode(const PackedSlot& slot, int which, T* out) {
    switch (slot.format.bits[which]) {
        case 8: return decode_as<8>(slot, which, out);
        case 4: return decode_as<4>(slot, which, out);
        default: return decode_as<2>(slot, which, out);
    }
}

}  // namespace native

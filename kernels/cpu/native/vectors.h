// Vectors of sixteen 32-bit lanes, in the vector extension that GCC and Clang share.
//
// Everything here works on "lanes": 32 bits that hold one float or two neighbouring bf16. A dot
// product is then the same loop for both types, and `dot` below is the only place that knows the
// difference. Intrinsics appear only where a feature macro says so, each beside a portable form.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define NATIVE_AVX512 1
#else
#define NATIVE_AVX512 0
#endif

#define INLINE inline __attribute__((always_inline))
// Loops over accumulators are unrolled before anything else, or they would live in memory.
#define UNROLL _Pragma("GCC unroll 24")

namespace native {

constexpr int kLanes = 16;

using Floats = float __attribute__((vector_size(64)));
using Lanes = uint32_t __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint16_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

template <class To, class From>
INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class V>
INLINE V load_as(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}

template <class V>
INLINE void store_as(void* to, V v) {
    std::memcpy(to, &v, sizeof(v));
}

INLINE Floats splat(float x) { return x - Floats{}; }

INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }

// --- conversions: everything is computed in fp32 ------------------------------------------------

INLINE Floats load(const float* p) { return load_as<Floats>(p); }

INLINE Floats load(const bf16* p) {
    return bit_cast<Floats>(__builtin_convertvector(load_as<Halves>(p), Lanes) << 16);
}

INLINE void store(float* p, Floats v) { store_as(p, v); }

// Rounds to nearest, ties to even; a NaN stays a quiet NaN.
INLINE void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
    store_as(p, bit_cast<Halves>(_mm512_cvtneps_pbh((__m512)v)));
#else
    const Lanes bits = bit_cast<Lanes>(v);
    const Lanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Lanes quiet = (bits >> 16) | 0x40;
    store_as(p, __builtin_convertvector(v == v ? rounded : quiet, Halves));
#endif
}

// The first `count` (1 to 16) elements; the rest reads as zero and is not written.
template <class T>
INLINE Floats load_some(const T* p, int count) {
    T padded[kLanes] = {};
    std::memcpy(padded, p, count * sizeof(T));
    return load(padded);
}

template <class T>
INLINE void store_some(T* p, Floats v, int count) {
    T padded[kLanes];
    store(padded, v);
    std::memcpy(p, padded, count * sizeof(T));
}

template <class T>
INLINE Floats load_upto(const T* p, int count) {
    return count >= kLanes ? load(p) : load_some(p, count);
}

template <class T>
INLINE void store_upto(T* p, Floats v, int count) {
    if (count >= kLanes) store(p, v);
    else store_some(p, v, count);
}

// --- reductions, in one fixed order: halves upon halves -----------------------------------------

INLINE float sum(Floats v) {
#if NATIVE_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float a[kLanes];
    store_as(a, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) a[i] += a[i + width];
    return a[0];
#endif
}

INLINE float largest(Floats v) {
#if NATIVE_AVX512
    return _mm512_reduce_max_ps((__m512)v);
#else
    float a[kLanes];
    store_as(a, v);
    for (int i = 1; i < kLanes; i++) a[0] = a[i] > a[0] ? a[i] : a[0];
    return a[0];
#endif
}

// --- exp: argument reduction by ln 2 and a polynomial of degree 6 (Cephes' expf) -----------------

// Relative error below 2e-7. Exactly 1 at 0, exactly 0 below -87.3, held at e^88 above.
INLINE Floats exp(Floats x) {
    const Floats lowest = splat(-87.3f), highest = splat(88.0f);
    Floats clamped = x > highest ? highest : x;  // comparisons that let a NaN through
    clamped = clamped < lowest ? lowest : clamped;
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = clamped * 1.44269504f + magic;
    const Floats n = shifted - magic;
    const Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const Ints exponent = bit_cast<Ints>(shifted) - bit_cast<Ints>(magic) + 127;
    y = y * bit_cast<Floats>(exponent << 23);
    return x < lowest ? Floats{} : y;
}

// --- dot products on lanes ----------------------------------------------------------------------

// Elements of T in one 32-bit lane.
template <class T>
constexpr int kPack = 4 / sizeof(T);

// acc[i] += a . b[i], where a and b[i] are one float or two bf16 each.
template <class T>
INLINE Floats dot(Floats acc, uint32_t a, Lanes b);

template <>
INLINE Floats dot<float>(Floats acc, uint32_t a, Lanes b) {
    return acc + splat(bit_cast<float>(a)) * bit_cast<Floats>(b);
}

template <>
INLINE Floats dot<bf16>(Floats acc, uint32_t a, Lanes b) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    acc = acc + splat(bit_cast<float>(a << 16)) * bit_cast<Floats>(b << 16);
    return acc + splat(bit_cast<float>(a & 0xffff0000u)) * bit_cast<Floats>(b & 0xffff0000u);
#endif
}

}  // namespace native

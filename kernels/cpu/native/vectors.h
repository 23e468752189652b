// Vectors of 32-bit lanes, in the vector extension that GCC and Clang share.
//
// A vector is as wide as the machine's registers, since compilers split wider ones badly: sixteen
// lanes with AVX-512, eight with AVX2, four elsewhere. Everything here works on "lanes": 32 bits
// that hold one float or two neighbouring bf16. A dot product is then the same loop for both types,
// and `Factor`, `operand` and `multiply_add` below are the only places that know the difference.
// Intrinsics appear only where a feature macro says so, each beside a portable form.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define NATIVE_AVX512 1
#else
#define NATIVE_AVX512 0
#endif
#if defined(__AVX2__) && !NATIVE_AVX512 && !defined(NATIVE_EMULATED_TILES)
#define NATIVE_AVX2 1
#else
#define NATIVE_AVX2 0
#endif
#if NATIVE_AVX512 || NATIVE_AVX2
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
// Loops over accumulators are unrolled before anything else, or they would live in memory.
#define UNROLL _Pragma("GCC unroll 24")

namespace native {

#if NATIVE_AVX512 || defined(NATIVE_EMULATED_TILES)
constexpr int kVectorBytes = 64;
#elif NATIVE_AVX2
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

using Floats = float __attribute__((vector_size(kVectorBytes)));
using Lanes = uint32_t __attribute__((vector_size(kVectorBytes)));
using Ints = int32_t __attribute__((vector_size(kVectorBytes)));
using Words = uint16_t __attribute__((vector_size(kVectorBytes)));
using Halves = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

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

// 0, 1, 2, ...
INLINE Lanes lane_numbers() {
    Lanes lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    return lane;
}

INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }

// --- conversions: everything is computed in fp32 ------------------------------------------------

INLINE Floats load(const float* p) { return load_as<Floats>(p); }

INLINE Floats load(const bf16* p) {
#if NATIVE_AVX2
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p)), 16);
#else
    return bit_cast<Floats>(__builtin_convertvector(load_as<Halves>(p), Lanes) << 16);
#endif
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
    const Lanes halves = v == v ? rounded : quiet;
#if NATIVE_AVX2
    const __m256i pairs = _mm256_packus_epi32((__m256i)halves, (__m256i)halves);  // in each half
    store_as(p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
    store_as(p, __builtin_convertvector(halves, Halves));
#endif
#endif
}

// The first `count` (1 to kLanes) elements; the rest reads as zero and is not written.
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

// `count` values in another type, or the same.
template <class From, class To>
INLINE void copy_as(const From* from, To* to, int64_t count) {
    if constexpr (std::is_same_v<From, To>) {
        std::memcpy(to, from, count * sizeof(To));
    } else {
        for (int64_t i = 0; i < count; i += kLanes) {
            const int some = int(count - i < kLanes ? count - i : kLanes);
            store_upto(to + i, load_upto(from + i, some), some);
        }
    }
}

// --- reductions, in one fixed order: halves upon halves -----------------------------------------

template <class Combine>
INLINE float reduce(Floats v, Combine combine) {
    float a[kLanes];
    store_as(a, v);
    UNROLL for (int width = kLanes / 2; width; width /= 2)
        UNROLL for (int i = 0; i < width; i++) a[i] = combine(a[i], a[i + width]);
    return a[0];
}

INLINE float sum(Floats v) {
#if NATIVE_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    return reduce(v, [](auto a, auto b) { return a + b; });
#endif
}

INLINE float largest(Floats v) {
#if NATIVE_AVX512
    return _mm512_reduce_max_ps((__m512)v);
#else
    return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
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

// What values of T are multiplied by: bf16 where the machine multiplies pairs of them, else float.
#if defined(__AVX512BF16__)
template <class T>
using Factor = T;
#else
template <class T>
using Factor = float;
#endif

// Lanes of A that meet one lane of B.
template <class A, class B>
constexpr int kParts = kPack<B> / kPack<A>;

// The lanes of B that meet the `part`-th of those lanes of A: themselves, or the lower or upper half
// of each widened to a float, which takes one instruction.
template <class A, class B>
INLINE Lanes operand(Lanes b, int part) {
    if constexpr (kParts<A, B> == 1) return b;
    else return part ? b & 0xffff0000u : b << 16;
}

// acc[i] += a . b[i], where a and b[i] are one float or two bf16 each.
template <class A>
INLINE Floats multiply_add(Floats acc, uint32_t a, Lanes b);

template <>
INLINE Floats multiply_add<float>(Floats acc, uint32_t a, Lanes b) {
    return acc + splat(bit_cast<float>(a)) * bit_cast<Floats>(b);
}

#if defined(__AVX512BF16__)
template <>
INLINE Floats multiply_add<bf16>(Floats acc, uint32_t a, Lanes b) {
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#endif

}  // namespace native

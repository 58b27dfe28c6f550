// Vectors of 8 or 16 floats in the compiler's own vector extensions, so that one source serves every target:
// AVX2, AVX-512, plain SSE2 and NEON. The few intrinsics have an emulation.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Lanes of the widest vector to use; a wider one than the hardware's is legal and lowered to several.
#ifndef ROPEWAY_LANES
#if defined(__AVX512F__)
#define ROPEWAY_LANES 16
#else
#define ROPEWAY_LANES 8
#endif
#endif

// 1: bfloat16 operands stay in pairs for a two-term dot product; 0: they are widened to float32 first.
#ifndef ROPEWAY_PAIR_DOT
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#define ROPEWAY_PAIR_DOT 1
#else
#define ROPEWAY_PAIR_DOT 0
#endif
#endif

#if defined(__clang__)
#define ROPEWAY_UNROLL _Pragma("unroll")
#else
#define ROPEWAY_UNROLL _Pragma("GCC unroll 16")
#endif

#define ROPEWAY_INLINE inline __attribute__((always_inline))
#define ROPEWAY_INLINE_LAMBDA __attribute__((always_inline))
#define ROPEWAY_EXPORT extern "C" __attribute__((visibility("default")))

namespace ropeway {

struct bf16 {
    uint16_t bits;
};

template <int W>
struct Lanes;

template <>
struct Lanes<8> {
    typedef float F __attribute__((vector_size(32)));
    typedef int32_t I __attribute__((vector_size(32)));
    typedef uint32_t U __attribute__((vector_size(32)));
    typedef uint16_t H __attribute__((vector_size(16)));
};

template <>
struct Lanes<16> {
    typedef float F __attribute__((vector_size(64)));
    typedef int32_t I __attribute__((vector_size(64)));
    typedef uint32_t U __attribute__((vector_size(64)));
    typedef uint16_t H __attribute__((vector_size(32)));
};

template <class To, class From>
ROPEWAY_INLINE To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

template <class X>
ROPEWAY_INLINE X load_as(const void* p) {
    X x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <class X>
ROPEWAY_INLINE void store_as(void* p, X x) {
    std::memcpy(p, &x, sizeof x);
}

template <int W>
ROPEWAY_INLINE typename Lanes<W>::F splat(float x) {
    return x - typename Lanes<W>::F{};
}

// ---- load and store with conversion

ROPEWAY_INLINE float to_float(float x) { return x; }
ROPEWAY_INLINE float to_float(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

template <class T>
ROPEWAY_INLINE T from_float(float x);

template <>
ROPEWAY_INLINE float from_float<float>(float x) {
    return x;
}

// Round to nearest even; NaN stays NaN.
template <>
ROPEWAY_INLINE bf16 from_float<bf16>(float x) {
    const uint32_t u = bits_as<uint32_t>(x);
    return bf16{uint16_t(x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <int W>
ROPEWAY_INLINE typename Lanes<W>::F load(const float* p) {
    return load_as<typename Lanes<W>::F>(p);
}

template <int W>
ROPEWAY_INLINE typename Lanes<W>::F load(const bf16* p) {
    using L = Lanes<W>;
    const auto wide = __builtin_convertvector(load_as<typename L::H>(p), typename L::U);
    return bits_as<typename L::F>(typename L::U(wide << 16));
}

template <int W>
ROPEWAY_INLINE void store(float* p, typename Lanes<W>::F x) {
    store_as(p, x);
}

template <int W>
ROPEWAY_INLINE void store(bf16* p, typename Lanes<W>::F x) {
    using L = Lanes<W>;
    const auto u = bits_as<typename L::U>(x);
    const auto rounded = typename L::U((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    const auto safe = typename L::U((x != x) ? (typename L::U{} + 0x7fc0u) : rounded);
    store_as(p, __builtin_convertvector(safe, typename L::H));
}

// The value that a T would hold, for arithmetic that rounds in the middle as the reference does.
template <class T, int W>
ROPEWAY_INLINE typename Lanes<W>::F rounded(typename Lanes<W>::F x) {
    if constexpr (std::is_same_v<T, float>) {
        return x;
    } else {
        T narrow[W];
        store<W>(narrow, x);
        return load<W>(narrow);
    }
}

// ---- reductions over the lanes, always in the same order

template <int W, class Fn>
ROPEWAY_INLINE float reduce(typename Lanes<W>::F x, Fn fn) {
    float a[W];
    std::memcpy(a, &x, sizeof a);
    for (int half = W / 2; half >= 1; half /= 2) {
        ROPEWAY_UNROLL for (int i = 0; i < half; ++i) a[i] = fn(a[i], a[i + half]);
    }
    return a[0];
}

template <int W>
ROPEWAY_INLINE float sum(typename Lanes<W>::F x) {
    return reduce<W>(x, [](float a, float b) { return a + b; });
}

template <int W>
ROPEWAY_INLINE float maximum(typename Lanes<W>::F x) {
    return reduce<W>(x, [](float a, float b) { return a > b ? a : b; });
}

// a * b + c, rounded once on every processor.
template <int W>
ROPEWAY_INLINE typename Lanes<W>::F fused(typename Lanes<W>::F a, typename Lanes<W>::F b, typename Lanes<W>::F c) {
    using F = typename Lanes<W>::F;
#if defined(__AVX512F__)
    if constexpr (W == 16) return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#endif
#if defined(__FMA__)
    if constexpr (W == 8) return F(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#endif
    F y;
    for (int i = 0; i < W; ++i) y[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return y;
}

// ---- 2^x: round to an integer n, a polynomial of degree 6 on [-1/2, 1/2], n into the exponent.
// Relative error below 2e-7. Below -126 the result is 0, from 128 on infinity, and NaN stays NaN.

template <int W>
ROPEWAY_INLINE typename Lanes<W>::F exp2(typename Lanes<W>::F x) {
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const F top = x > 128.0f ? splat<W>(128.0f) : x;
    const F shifted = top + magic;
    const F f = top - (shifted - magic);
    F p = f * 1.546144457e-4f + 1.340042818e-3f;
    p = p * f + 9.618056679e-3f;
    p = p * f + 5.550327227e-2f;
    p = p * f + 2.402265092e-1f;
    p = p * f + 6.931472067e-1f;
    p = p * f + 1.0f;
    const I n = bits_as<I>(shifted) - bits_as<int32_t>(magic);
    const F y = p * bits_as<F>(I((n + 127) << 23));
    return x < -126.0f ? F{} : y;
}

constexpr float LOG2_E = 1.44269504088896341f;

// ---- dot-product steps: acc[lane] += sum over a step's terms of b[lane] * a
//
// STEP terms of the reduced dimension sit side by side in each lane of B: one float32, or two bfloat16. The other
// operand A is the same for all lanes. `widen` turns stored elements into A; a row of A takes A_BYTES per term.

// Rows of A that one pass over B can serve: 8 with the 32 registers of AVX-512, `few` with the 16 of AVX2. Shapes
// that AVX-512 computes in half vectors are rare and make do with 4, which keeps the compilation short.
constexpr int rows_for(int lanes, int few) {
    return lanes == 16 ? 8 : (ROPEWAY_LANES == 16 ? 4 : few);
}

template <int W>
struct DotF32 {
    using T = float;
    using F = typename Lanes<W>::F;
    using B = F;
    using A = float;
    static constexpr int LANES = W, STEP = 1, A_BYTES = 4;
    static constexpr int MAX_ROWS = rows_for(W, 6);
    static ROPEWAY_INLINE B load_b(const T* p) { return load_as<F>(p); }
    static ROPEWAY_INLINE A load_a(const char* row, int64_t i) { return load_as<float>(row + 4 * i); }
    static ROPEWAY_INLINE void step(F& acc, B b, A a) { acc += b * a; }
    static ROPEWAY_INLINE B first_term(B b) { return b; }
    static ROPEWAY_INLINE void store_a(char* row, int64_t i, F x) { store<W>(reinterpret_cast<float*>(row) + i, x); }
};

// bfloat16 is the upper half of a float32: widening is a shift for the first term and a mask for the second.
template <int W>
struct DotBf16Wide {
    using T = bf16;
    using F = typename Lanes<W>::F;
    using U = typename Lanes<W>::U;
    struct B {
        F first, second;
    };
    struct A {
        float first, second;
    };
    static constexpr int LANES = W, STEP = 2, A_BYTES = 4;
    static constexpr int MAX_ROWS = rows_for(W, 4);
    static ROPEWAY_INLINE B load_b(const T* p) {
        const U u = load_as<U>(p);
        return B{bits_as<F>(U(u << 16)), bits_as<F>(U(u & 0xffff0000u))};
    }
    static ROPEWAY_INLINE A load_a(const char* row, int64_t i) {
        return A{load_as<float>(row + 8 * i), load_as<float>(row + 8 * i + 4)};  // two loads: each becomes a broadcast
    }
    static ROPEWAY_INLINE void step(F& acc, B b, A a) {
        acc += b.first * a.first;
        acc += b.second * a.second;
    }
    static ROPEWAY_INLINE B first_term(B b) { return B{b.first, F{}}; }
    static ROPEWAY_INLINE void store_a(char* row, int64_t i, F x) { store<W>(reinterpret_cast<float*>(row) + i, x); }
};

// Pairs stay bfloat16 and products are summed in float32: VDPBF16PS, or the same in two multiply-adds.
template <int W>
struct DotBf16Pair {
    using T = bf16;
    using F = typename Lanes<W>::F;
    using U = typename Lanes<W>::U;
    using B = U;
    using A = uint32_t;
    static constexpr int LANES = W, STEP = 2, A_BYTES = 2, MAX_ROWS = rows_for(W, 4);
    static ROPEWAY_INLINE B load_b(const T* p) { return load_as<U>(p); }
    static ROPEWAY_INLINE A load_a(const char* row, int64_t i) { return load_as<uint32_t>(row + 4 * i); }
    static ROPEWAY_INLINE void step(F& acc, B b, A a) {
        const U y = U{} + a;
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
        if constexpr (W == 16) {
            acc = F(_mm512_dpbf16_ps(__m512(acc), bits_as<__m512bh>(b), bits_as<__m512bh>(y)));
        } else {
            acc = F(_mm256_dpbf16_ps(__m256(acc), bits_as<__m256bh>(b), bits_as<__m256bh>(y)));
        }
#else
        acc += bits_as<F>(U(b & 0xffff0000u)) * bits_as<F>(U(y & 0xffff0000u));
        acc += bits_as<F>(U(b << 16)) * bits_as<F>(U(y << 16));
#endif
    }
    static ROPEWAY_INLINE B first_term(B b) { return b & 0xffffu; }
    static ROPEWAY_INLINE void store_a(char* row, int64_t i, F x) { store<W>(reinterpret_cast<bf16*>(row) + i, x); }
};

template <class T, int W>
struct DotOf;
template <int W>
struct DotOf<float, W> {
    using type = DotF32<W>;
};
template <int W>
struct DotOf<bf16, W> {
    using type = std::conditional_t<ROPEWAY_PAIR_DOT, DotBf16Pair<W>, DotBf16Wide<W>>;
};

// Call fn with a null pointer to the element type of this number: 0 for float32, 1 for bfloat16.
template <class Fn>
int with_type(int64_t type, Fn&& fn) {
    return type == 0 ? fn(static_cast<float*>(nullptr)) : fn(static_cast<bf16*>(nullptr));
}

// Call fn with n (1 to N) as a compile-time constant.
template <int N, class Fn>
ROPEWAY_INLINE void with_constant(int n, Fn&& fn) {
    if constexpr (N == 1) {
        fn(std::integral_constant<int, 1>{});
    } else {
        if (n == N) {
            fn(std::integral_constant<int, N>{});
        } else {
            with_constant<N - 1>(n, fn);
        }
    }
}

// How many vectors of B to carry beside `rows` rows of A: enough independent sums to hide the latency of a
// multiply-add, few enough to stay in registers (16 of them, or 32 with AVX-512).
template <class D>
constexpr int vectors_for(int rows) {
    constexpr bool many = D::LANES == 16 && ROPEWAY_LANES == 16;
    if (rows == 1) return 4;
    if (many) return rows <= 4 ? 4 : 2;
    return rows == 2 ? 4 : 2;
}

}  // namespace ropeway

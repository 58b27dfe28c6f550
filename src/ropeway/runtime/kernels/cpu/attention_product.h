// The one product that attention is made of, and the elements that it reads.
//
// Both scores = queries * K and mixed = weights * V are some rows of A against a few vectors of B, over the steps of
// the reduced dimension (head_dim, or positions). Few rows read B where the cache holds it, DIRECT_ROWS at a time. More
// than WORTH_PACKING rows share a panel of it, two vectors wide, which is first widened into the first-level cache (as
// in Goto and van de Geijn 2008).
#pragma once

#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ropeway {

constexpr int DIRECT_ROWS = 4, WORTH_PACKING = 2 * DIRECT_ROWS;

// What the cache holds: element type T, STEP of them side by side, read as operand B of a dot-product step. `Packed` is
// the operand of panels, and put() stores what was read in its form.
template <int W>
struct KvF32 : DotF32<W> {
    using Packed = DotF32<W>;
    static ROPEWAY_INLINE void put(float* to, typename DotF32<W>::B x) { store<W>(to, x); }
};

template <int W>
struct KvBf16Wide : DotBf16Wide<W> {
    using Packed = DotF32<W>;
    static ROPEWAY_INLINE void put(float* to, typename DotBf16Wide<W>::B x) {
        store<W>(to, x.first);
        store<W>(to + 2 * W, x.second);
    }
};

template <int W>
struct KvBf16Pair : DotBf16Pair<W> {
    using Packed = DotBf16Pair<W>;
    static ROPEWAY_INLINE void put(bf16* to, typename DotBf16Pair<W>::B x) { store_as(to, x); }
};

template <int W>
using KvBf16 = std::conditional_t<ROPEWAY_PAIR_DOT, KvBf16Pair<W>, KvBf16Wide<W>>;

template <int W>
struct Int8Lanes;
template <>
struct Int8Lanes<8> {
    typedef int8_t V __attribute__((vector_size(8)));
};
template <>
struct Int8Lanes<16> {
    typedef int8_t V __attribute__((vector_size(16)));
};

// int8 with a scale for each token, which is applied to the scores and to the weights instead of to each element.
template <int W>
struct KvInt8 : DotF32<W> {
    using T = int8_t;
    using V = typename Int8Lanes<W>::V;
    using Packed = DotF32<W>;
    static ROPEWAY_INLINE typename Lanes<W>::F load_b(const T* p) {
        using I = typename Lanes<W>::I;
#if defined(__AVX512F__)
        if constexpr (W == 16) {
            return __builtin_convertvector(bits_as<I>(_mm512_cvtepi8_epi32(load_as<__m128i>(p))), typename Lanes<W>::F);
        }
#endif
#if defined(__AVX2__)  // one instruction, which GCC 12 does not find by itself
        if constexpr (W == 8) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
            return __builtin_convertvector(bits_as<I>(_mm256_cvtepi8_epi32(bytes)), typename Lanes<W>::F);
        }
#endif
        const auto wide = __builtin_convertvector(load_as<V>(p), I);
        return __builtin_convertvector(wide, typename Lanes<W>::F);
    }
    static ROPEWAY_INLINE void put(float* to, typename Lanes<W>::F x) { store<W>(to, x); }
};

// A stretch of B: `steps` steps, in which N vectors begin at `at`, and memory to ask for on the way, as much.
template <class T, int N>
struct Run {
    const T *at[N], *fetch[N];
    int64_t steps;
};

// Several stretches, one after another in the reduced dimension. Strides are between steps, in elements.
template <class T, int N>
struct Operand {
    const Run<T, N>* runs;
    int64_t count, stride, fetch_stride;
};

// A single row needs more vectors than two, to hide the latency of its multiply-adds.
constexpr int direct_vectors(int rows) { return rows == 1 ? 4 : 2; }

template <class D, int N>
ROPEWAY_INLINE void fetch(const Run<typename D::T, N>& run, int64_t step, int64_t stride) {
    constexpr int PER_LINE = 2 * D::LANES * D::STEP * sizeof(typename D::T) <= 64 ? 2 : 1;  // vectors
    ROPEWAY_UNROLL for (int v = 0; v < N; v += PER_LINE) __builtin_prefetch(run.fetch[v] + step * stride);
}

// out[m] = (keep ? out[m] * keep[m] : 0) + A[m] B for R rows, N vectors wide. Rows of A lie `a_row` bytes apart.
template <class D, int R, int N>
ROPEWAY_INLINE void product(const char* a, int64_t a_row, const Operand<typename D::T, N>& b, float* out,
                            int64_t out_row, const float* keep) {
    using F = typename D::F;
    constexpr int W = D::LANES;
    F acc[R][N] = {};
    if (keep) {
        ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) acc[m][v] = load<W>(out + m * out_row + v * W) * keep[m];
        }
    }
    int64_t at = 0;
    for (int64_t r = 0; r < b.count; ++r) {
        const Run<typename D::T, N> run = b.runs[r];
        for (int64_t i = 0; i < run.steps; ++i, ++at) {
            typename D::B y[N];
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) y[v] = D::load_b(run.at[v] + i * b.stride);
            fetch<D, N>(run, i, b.fetch_stride);
            ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                const typename D::A x = D::load_a(a + m * a_row, at);
                ROPEWAY_UNROLL for (int v = 0; v < N; ++v) D::step(acc[m][v], y[v], x);
            }
        }
    }
    ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
        ROPEWAY_UNROLL for (int v = 0; v < N; ++v) store<W>(out + m * out_row + v * W, acc[m][v]);
    }
}

// Widen a panel: all steps of `b`, contiguous, 2 * W * STEP elements of Packed for each.
template <class D>
__attribute__((noinline)) void pack(const Operand<typename D::T, 2>& b, typename D::Packed::T* to) {
    constexpr int W = D::LANES, STEP = D::STEP;
    for (int64_t r = 0; r < b.count; ++r) {
        const Run<typename D::T, 2> run = b.runs[r];
        for (int64_t i = 0; i < run.steps; ++i, to += 2 * W * STEP) {
            fetch<D, 2>(run, i, b.fetch_stride);
            D::put(to, D::load_b(run.at[0] + i * b.stride));
            D::put(to + W * D::Packed::STEP, D::load_b(run.at[1] + i * b.stride));
        }
    }
}

// The same product with `terms` of a packed panel, two vectors wide.
template <class P, int R>
__attribute__((noinline)) void packed_product(const char* a, int64_t a_row, const typename P::T* panel, int64_t terms,
                                              float* out, int64_t out_row, const float* keep) {
    constexpr int W = P::LANES, STEP = P::STEP;
    const Run<typename P::T, 2> run{{panel, panel + W * STEP}, {panel, panel}, (terms + STEP - 1) / STEP};
    product<P, R, 2>(a, a_row, {&run, 1, 2 * W * STEP, 0}, out, out_row, keep);
}

}  // namespace ropeway

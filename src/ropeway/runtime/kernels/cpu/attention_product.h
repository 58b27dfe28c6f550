// The one product that attention is made of, and the elements that it reads.
//
// Both scores = queries * K and mixed = weights * V are some rows of A against two vectors of B, over the steps of the
// reduced dimension (head_dim, or positions). Up to DIRECT_ROWS rows read B where the cache holds it. More rows share
// a panel of it, two vectors wide, that is first widened into the first-level cache ("packed", as in Goto and van de
// Geijn 2008).
#pragma once

#include "vec.h"

namespace ropeway {

constexpr int DIRECT_ROWS = 4;

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
        const auto wide = __builtin_convertvector(load_as<V>(p), typename Lanes<W>::I);
        return __builtin_convertvector(wide, typename Lanes<W>::F);
    }
    static ROPEWAY_INLINE void put(float* to, typename Lanes<W>::F x) { store<W>(to, x); }
};

// A stretch of B: `steps` steps from two vectors on, and memory to ask for on the way.
template <class T>
struct Run {
    const T* first;
    const T* second;
    const T* fetch;
    int64_t steps;
};

// Several stretches, one after another in the reduced dimension. Strides are between steps, in elements.
template <class T>
struct Operand {
    const Run<T>* runs;
    int64_t count, stride, fetch_stride;
};

// out[m] = (keep ? out[m] * keep[m] : 0) + A[m] B for R rows, two vectors wide. Rows of A lie `a_row` bytes apart.
template <class D, int R>
__attribute__((noinline)) void product(const char* a, int64_t a_row, Operand<typename D::T> b, float* out,
                                       int64_t out_row, const float* keep) {
    using F = typename D::F;
    constexpr int W = D::LANES, STEP = D::STEP;
    constexpr int LINE = 64 / int(sizeof(typename D::T)), WIDTH = 2 * W * STEP;  // in elements
    F acc[R][2] = {};
    if (keep) {
        ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
            ROPEWAY_UNROLL for (int v = 0; v < 2; ++v) acc[m][v] = load<W>(out + m * out_row + v * W) * keep[m];
        }
    }
    int64_t at = 0;
    for (int64_t r = 0; r < b.count; ++r) {
        const Run<typename D::T> run = b.runs[r];
        for (int64_t i = 0; i < run.steps; ++i, ++at) {
            const typename D::B y0 = D::load_b(run.first + i * b.stride), y1 = D::load_b(run.second + i * b.stride);
            ROPEWAY_UNROLL for (int e = 0; e < WIDTH; e += LINE) {
                __builtin_prefetch(run.fetch + i * b.fetch_stride + e);
            }
            ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                const typename D::A x = D::load_a(a + m * a_row, at);
                D::step(acc[m][0], y0, x);
                D::step(acc[m][1], y1, x);
            }
        }
    }
    ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
        ROPEWAY_UNROLL for (int v = 0; v < 2; ++v) store<W>(out + m * out_row + v * W, acc[m][v]);
    }
}

// Widen a panel: all steps of `b`, contiguous, 2 * W * STEP elements of Packed for each.
template <class D>
__attribute__((noinline)) void pack(Operand<typename D::T> b, typename D::Packed::T* to) {
    constexpr int W = D::LANES, PACKED_STEP = D::Packed::STEP;
    constexpr int LINE = 64 / int(sizeof(typename D::T)), WIDTH = 2 * W * D::STEP;
    for (int64_t r = 0; r < b.count; ++r) {
        const Run<typename D::T> run = b.runs[r];
        for (int64_t i = 0; i < run.steps; ++i, to += WIDTH) {
            ROPEWAY_UNROLL for (int e = 0; e < WIDTH; e += LINE) {
                __builtin_prefetch(run.fetch + i * b.fetch_stride + e);
            }
            D::put(to, D::load_b(run.first + i * b.stride));
            D::put(to + W * PACKED_STEP, D::load_b(run.second + i * b.stride));
        }
    }
}

}  // namespace ropeway

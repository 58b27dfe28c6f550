// The small operations between the matrix products: normalisation, rotary positions, the gated activation.
// Arithmetic is float32; values are rounded to the tensors' type where Hugging Face models round them.

#include "elementwise.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace ropeway {

constexpr int W = ROPEWAY_LANES;
using F = Lanes<W>::F;
using I = Lanes<W>::I;
constexpr int64_t WORTH_THREADS = 1 << 12;  // elements below which a second thread costs more than it saves

// Run fn(i, width) over [0, n): whole vectors, then single elements.
template <class Fn>
ROPEWAY_INLINE void each(int64_t n, Fn&& fn) {
    int64_t i = 0;
    for (; i + W <= n; i += W) fn(i, std::integral_constant<int, W>{});
    for (; i < n; ++i) fn(i, std::integral_constant<int, 1>{});
}

// The same code for a vector and for a single element.
template <class T, int N>
ROPEWAY_INLINE auto get(const T* p) {
    if constexpr (N == 1) {
        return to_float(*p);
    } else {
        return load<N>(p);
    }
}

template <class T, int N, class X>
ROPEWAY_INLINE void put(T* p, X x) {
    if constexpr (N == 1) {
        *p = from_float<T>(x);
    } else {
        store<N>(p, x);
    }
}

template <class T, int N, class X>
ROPEWAY_INLINE X as_stored(X x) {
    if constexpr (std::is_same_v<T, float>) {
        return x;
    } else if constexpr (N == 1) {
        return to_float(from_float<T>(x));
    } else {
        // As store() and load() would, but without narrowing.
        using L = Lanes<N>;
        const auto u = bits_as<typename L::U>(x);
        const auto near = typename L::U((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
        return (x != x) ? x : bits_as<typename L::F>(near);
    }
}

// out = x / sqrt(mean(x^2) + eps) * weight, where x is `residual` after `residual += added` if something is added.
template <class T>
ROPEWAY_INLINE void norm_row(T* residual, const T* x, const T* added, const T* weight, T* out, int64_t dim, float eps) {
    F squares[4] = {};
    float rest = 0.0f;
    each(dim, [&](int64_t i, auto n) ROPEWAY_INLINE_LAMBDA {
        constexpr int N = decltype(n)::value;
        auto y = get<T, N>(x + i);
        if (added) {
            y = as_stored<T, N>(y + get<T, N>(added + i));
            put<T, N>(residual + i, y);
        }
        if constexpr (N == 1) {
            rest += y * y;
        } else {
            squares[i / W % 4] += y * y;
        }
    });
    const float mean = (sum<W>((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest) / float(dim);
    const float factor = 1.0f / std::sqrt(mean + eps);
    each(dim, [&](int64_t i, auto n) ROPEWAY_INLINE_LAMBDA {
        constexpr int N = decltype(n)::value;
        const auto y = as_stored<T, N>(get<T, N>(x + i) * factor);
        put<T, N>(out + i, y * get<T, N>(weight + i));
    });
}

template <class T>
int rms_norm(const T* x, const T* weight, T* out, int64_t outer, int64_t inner, int64_t outer_stride,
             int64_t inner_stride, int64_t dim, double eps, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static) if (outer * inner * dim > WORTH_THREADS)
    for (int64_t r = 0; r < outer * inner; ++r) {
        const T* row = x + r / inner * outer_stride + r % inner * inner_stride;
        norm_row<T>(nullptr, row, nullptr, weight, out + r * dim, dim, float(eps));
    }
    return 0;
}

template <class T>
int add_rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t dim, double eps,
                 int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static) if (rows * dim > WORTH_THREADS)
    for (int64_t r = 0; r < rows; ++r) {
        T* to = residual + r * dim;
        norm_row<T>(to, to, x ? x + r * dim : nullptr, weight, out + r * dim, dim, float(eps));
    }
    return 0;
}

template <class T>
ROPEWAY_INLINE void rotate(T* x, const float* cosine, const float* sine, int64_t half) {
    each(half, [&](int64_t i, auto n) ROPEWAY_INLINE_LAMBDA {
        constexpr int N = decltype(n)::value;
        const auto low = get<T, N>(x + i), high = get<T, N>(x + half + i);
        const auto c = get<float, N>(cosine + i), s = get<float, N>(sine + i);
        put<T, N>(x + i, low * c - high * s);
        put<T, N>(x + half + i, high * c + low * s);
    });
}

template <class T>
int rotary(T* q, T* k, const T* q_norm, const T* k_norm, float eps, const float* cosine, const float* sine,
           const int64_t* positions, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t half,
           int64_t q_stride, int64_t k_stride, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static) if (tokens * heads * dim > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; ++t) {
        const auto rotate_heads = [&](T* x, int64_t count, const T* norm) ROPEWAY_INLINE_LAMBDA {
            for (int64_t h = 0; h < count; ++h, x += dim) {
                if (norm) norm_row<T>(nullptr, x, nullptr, norm, x, dim, eps);
                rotate(x, cosine + positions[t] * half, sine + positions[t] * half, half);
            }
        };
        rotate_heads(q + t * q_stride, heads, q_norm);
        rotate_heads(k + t * k_stride, kv_heads, k_norm);
    }
    return 0;
}

ROPEWAY_INLINE float exp_minus(float x) { return exp2<8>(splat<8>(-x * LOG2_E))[0]; }
ROPEWAY_INLINE F exp_minus(F x) { return exp2<W>(x * -LOG2_E); }

template <class T>
int silu_mul(const T* gate_up, T* out, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static) if (rows * width > WORTH_THREADS)
    for (int64_t r = 0; r < rows; ++r) {
        const T* gate = gate_up + r * 2 * width;
        each(width, [&](int64_t i, auto n) ROPEWAY_INLINE_LAMBDA {
            constexpr int N = decltype(n)::value;
            const auto g = get<T, N>(gate + i);
            const auto silu = as_stored<T, N>(g / (exp_minus(g) + 1.0f));
            put<T, N>(out + r * width + i, silu * get<T, N>(gate + width + i));
        });
    }
    return 0;
}

template <class T>
int widen(const T* x, float* out, int64_t count, int64_t threads) {
    constexpr int64_t PIECE = 1 << 12;
#pragma omp parallel for num_threads(int(threads)) schedule(static) if (count > WORTH_THREADS)
    for (int64_t begin = 0; begin < count; begin += PIECE) {
        each(std::min(PIECE, count - begin), [&](int64_t i, auto n) ROPEWAY_INLINE_LAMBDA {
            constexpr int N = decltype(n)::value;
            put<float, N>(out + begin + i, get<T, N>(x + begin + i));
        });
    }
    return 0;
}

}  // namespace ropeway

ROPEWAY_EXPORT int ropeway_rms_norm(int64_t type, const void* x, const void* weight, void* out, int64_t outer,
                                    int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t dim, double eps,
                                    int64_t threads) {
    return ropeway::with_type(type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        return ropeway::rms_norm(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(out), outer,
                                 inner, outer_stride, inner_stride, dim, eps, threads);
    });
}

ROPEWAY_EXPORT int ropeway_add_rms_norm(int64_t type, const void* x, void* residual, const void* weight, void* out,
                                        int64_t rows, int64_t dim, double eps, int64_t threads) {
    return ropeway::with_type(type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        return ropeway::add_rms_norm(static_cast<const T*>(x), static_cast<T*>(residual), static_cast<const T*>(weight),
                                     static_cast<T*>(out), rows, dim, eps, threads);
    });
}

ROPEWAY_EXPORT int ropeway_rotary(int64_t type, void* q, void* k, const void* q_norm, const void* k_norm, double eps,
                                  const float* cosine, const float* sine, const int64_t* positions, int64_t tokens,
                                  int64_t heads, int64_t kv_heads, int64_t dim, int64_t half, int64_t q_stride,
                                  int64_t k_stride, int64_t threads) {
    return ropeway::with_type(type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        return ropeway::rotary(static_cast<T*>(q), static_cast<T*>(k), static_cast<const T*>(q_norm),
                               static_cast<const T*>(k_norm), float(eps), cosine, sine, positions, tokens, heads,
                               kv_heads, dim, half, q_stride, k_stride, threads);
    });
}

ROPEWAY_EXPORT int ropeway_silu_mul(int64_t type, const void* gate_up, void* out, int64_t rows, int64_t width,
                                    int64_t threads) {
    return ropeway::with_type(type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        return ropeway::silu_mul(static_cast<const T*>(gate_up), static_cast<T*>(out), rows, width, threads);
    });
}

ROPEWAY_EXPORT int ropeway_widen(int64_t type, const void* x, float* out, int64_t count, int64_t threads) {
    return ropeway::with_type(type, [&](auto* t) {
        return ropeway::widen(static_cast<decltype(t)>(const_cast<void*>(x)), out, count, threads);
    });
}

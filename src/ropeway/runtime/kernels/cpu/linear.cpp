// y = x W^T + b with W packed once: panels of 16 output columns, in each the input dimension from first to last, one
// cache line per step. One row of x then reads W as one long stream, and many rows reuse a panel from the cache.
//
// Every element of y is one running sum over the input dimension, so that a row's result does not depend on how many
// rows come with it.

#include "linear_tiles.h"

namespace ropeway {

template <class D>
class Linear {
    using T = typename D::T;
    using F = typename D::F;
    static constexpr int W = D::LANES, STEP = D::STEP, VECTORS = PANEL / W;

    const char* const x_;  // rows of operand A
    const T* const packed_;
    const int64_t rows_, depth_, steps_, row_bytes_;
    const Output output_;

   public:
    Linear(const LinearWeight& w, const char* x, void* y, int64_t rows)
        : x_(x),
          packed_(static_cast<const T*>(w.packed)),
          rows_(rows),
          depth_(w.depth),
          steps_((w.depth + STEP - 1) / STEP),
          row_bytes_(steps_ * STEP * D::A_BYTES),
          output_{w.type, y, w.bias, w.columns, nullptr} {}

    void run(int64_t threads) {
        // Widening bfloat16 takes registers of its own.
        using Rows = std::conditional_t<W == 8 && D::MAX_ROWS == 4, Heights<4, 3, 2, 1>, HeightsFor<W>>;
        over_tiles<W>(rows_, output_.columns, depth_, threads, Rows{},
                      [this](int64_t first, const Place& place, auto r) {
                          this->template tile<decltype(r)::value>(first, place);
                      });
    }

   private:
    // R rows from `first` on against as many panels as fit.
    template <int R>
    void tile(int64_t first, const Place& place) {
        constexpr int P = panels_in_tile(W, R), N = P * VECTORS;
        const char* a = x_ + first * row_bytes_;
        const int64_t panel = steps_ * PANEL * STEP;  // elements
        const T* line = packed_ + place.panel * panel;
        Ahead<R, P> ahead(line, panel * sizeof(T), steps_, place);
        F acc[R][N] = {};
        for (int64_t i = 0; i < steps_; ++i, line += PANEL * STEP) {
            ahead.fetch(LINE);
            typename D::B w[N];
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) {
                w[v] = D::load_b(line + v / VECTORS * panel + v % VECTORS * W * STEP);
            }
            ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                const typename D::A x = D::load_a(a + m * row_bytes_, i);
                ROPEWAY_UNROLL for (int v = 0; v < N; ++v) D::step(acc[m][v], w[v], x);
            }
        }
        float out[R * N * W];
        ROPEWAY_UNROLL for (int i = 0; i < R * N; ++i) ropeway::store<W>(out + i * W, acc[i / N][i % N]);
        output_.store(out, first, R, place.panel * PANEL, N * W);
    }
};

template <class T>
void store_rows(const Output& o, const float* sums, int64_t first, int64_t rows, int64_t column, int64_t width) {
    constexpr int W = ROPEWAY_LANES;
    const auto bias = static_cast<const T*>(o.bias);
    const int64_t end = std::min(column + width, o.columns);
    for (int64_t r = 0; r < rows; ++r, sums += width) {
        T* const y = static_cast<T*>(o.y) + (first + r) * o.columns;
        const float scale = o.scales ? o.scales[first + r] : 1.0f;
        int64_t c = column;
        for (; c + W <= end; c += W) {
            const auto sum = load<W>(sums + c - column), s = splat<W>(scale);
            store<W>(y + c, bias ? fused<W>(sum, s, load<W>(bias + c)) : sum * s);
        }
        for (; c < end; ++c) {
            const float sum = sums[c - column];
            y[c] = from_float<T>(bias ? __builtin_fmaf(sum, scale, to_float(bias[c])) : sum * scale);
        }
    }
}

void Output::store(const float* sums, int64_t first, int64_t rows, int64_t column, int64_t width) const {
    if (type == 0) {
        store_rows<float>(*this, sums, first, rows, column, width);
    } else {
        store_rows<bf16>(*this, sums, first, rows, column, width);
    }
}

template <class T>
using LinearDot = typename DotOf<T, ROPEWAY_LANES>::type;

// x as operand A, which differs from how it is stored when bfloat16 is widened or a pair is incomplete.
template <class D>
const char* as_operand(const typename D::T* x, int64_t rows, int64_t depth, int64_t threads) {
    using T = typename D::T;
    constexpr bool widened = D::A_BYTES != int(sizeof(T));
    const int64_t padded = (depth + D::STEP - 1) / D::STEP * D::STEP;
    if (!widened && padded == depth) return reinterpret_cast<const char*>(x);
    char* const all = scratch(rows * padded * D::A_BYTES);
#pragma omp parallel for num_threads(int(threads)) schedule(static) if (rows * depth > (1 << 16))
    for (int64_t r = 0; r < rows; ++r) {
        using E = std::conditional_t<widened, float, T>;
        E* const to = reinterpret_cast<E*>(all + r * padded * D::A_BYTES);
        for (int64_t k = 0; k < padded; ++k) to[k] = from_float<E>(k < depth ? to_float(x[r * depth + k]) : 0.0f);
    }
    return all;
}

template <class T>
void plain_linear(const LinearWeight& w, const T* x, T* y, int64_t rows, int64_t threads) {
    using D = LinearDot<T>;
    const char* a = as_operand<D>(x, rows, w.depth, threads);
    Linear<D>(w, a, y, rows).run(threads);
}

int linear(const LinearWeight& weight, const void* x, void* y, int64_t rows, int64_t threads) {
    try {
        if (weight.format != 0) {
            linear_int(weight, x, y, rows, threads);
            return 0;
        }
        return with_type(weight.type, [&](auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            plain_linear(weight, static_cast<const T*>(x), static_cast<T*>(y), rows, threads);
            return 0;
        });
    } catch (const std::bad_alloc&) {
        return 3;
    }
}

// [columns][depth] to [panel][depth / STEP][16][STEP], zeros where the panel or the pair is incomplete.
template <class T>
int pack(const T* weight, T* packed, int64_t columns, int64_t depth, int64_t threads) {
    constexpr int STEP = LinearDot<T>::STEP;
    const int64_t steps = (depth + STEP - 1) / STEP;
#pragma omp parallel for num_threads(int(threads)) schedule(static)
    for (int64_t panel = 0; panel < panels_of(columns); ++panel) {
        T* to = packed + panel * steps * PANEL * STEP;
        for (int64_t i = 0; i < steps; ++i) {
            for (int c = 0; c < PANEL; ++c) {
                for (int s = 0; s < STEP; ++s) {
                    const int64_t column = panel * PANEL + c, k = i * STEP + s;
                    *to++ = column < columns && k < depth ? weight[column * depth + k] : T{};
                }
            }
        }
    }
    return 0;
}

// Rows of the plain weight by their ids: how a tied embedding reads its packed head.
template <class T>
int unpack(const T* packed, const int64_t* ids, T* out, int64_t count, int64_t depth, int64_t threads) {
    constexpr int STEP = LinearDot<T>::STEP;
    const int64_t steps = (depth + STEP - 1) / STEP;
#pragma omp parallel for num_threads(int(threads)) schedule(static) if (count > 4)
    for (int64_t r = 0; r < count; ++r) {
        const T* from = packed + (ids[r] / PANEL * steps * PANEL + ids[r] % PANEL) * STEP;
        for (int64_t k = 0; k < depth; ++k) out[r * depth + k] = from[k / STEP * PANEL * STEP + k % STEP];
    }
    return 0;
}

}  // namespace ropeway

// Bytes that `weight` takes once packed.
ROPEWAY_EXPORT int64_t ropeway_packed_bytes(const LinearWeight* weight) {
    if (weight->format != 0) return ropeway::packed_bytes_int(*weight);
    const int64_t step = weight->type == 0 ? 1 : 2, size = weight->type == 0 ? 4 : 2;
    return ropeway::panels_of(weight->columns) * ropeway::PANEL * ((weight->depth + step - 1) / step * step) * size;
}

// `values` (columns, depth) into `packed`. `weight` says what it will be; its own `packed` is not read.
// Format 0: plain values of `type`. 1: int8 in [-127, 127], `scales` float32 (columns). 2, 3: one byte of 0 to 15 each,
// `scales` float16 (columns, depth / group) and, in format 3, `zeros` bytes of the same shape; in format 2 it is 8.
ROPEWAY_EXPORT int ropeway_pack(const LinearWeight* weight, const void* values, const void* scales,
                                const uint8_t* zeros, void* packed, int64_t threads) {
    if (weight->format != 0) {
        ropeway::pack_int(*weight, values, scales, zeros, packed, threads);
        return 0;
    }
    return ropeway::with_type(weight->type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        return ropeway::pack(static_cast<const T*>(values), static_cast<T*>(packed), weight->columns, weight->depth,
                             threads);
    });
}

// Rows `ids` of the weight to `out` (count, depth), in `type`, times their scales if it is quantized.
ROPEWAY_EXPORT int ropeway_unpack(const LinearWeight* weight, const int64_t* ids, void* out, int64_t count,
                                  int64_t threads) {
    if (weight->format != 0) {
        ropeway::unpack_int(*weight, ids, out, count, threads);
        return 0;
    }
    return ropeway::with_type(weight->type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        return ropeway::unpack(static_cast<const T*>(weight->packed), ids, static_cast<T*>(out), count, weight->depth,
                               threads);
    });
}

// See linear.h.
ROPEWAY_EXPORT int ropeway_linear(const LinearWeight* weight, const void* x, void* y, int64_t rows, int64_t threads) {
    return ropeway::linear(*weight, x, y, rows, threads);
}

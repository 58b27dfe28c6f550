// y = x W^T + b with W packed once: panels of 16 output columns, in each the input dimension from first to last, one
// cache line per step. One row of x then reads W as one long stream, and many rows reuse a panel from the cache.
//
// Every element of y is one running sum over the input dimension, so that a row's result does not depend on how many
// rows come with it.

#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>

#include "linear.h"
#include "vec.h"

namespace ropeway {

constexpr int PANEL = 16;        // columns of a panel
constexpr int BAND = 96;         // rows of x that use a panel while it is cached, before the next panel
constexpr int64_t WORTH_THREADS = 1 << 19;  // elements of W plus a share of the sums: some ten microseconds
constexpr int64_t AHEAD = 2048;  // bytes of W asked for before they are needed

template <class D>
class Linear {
    using T = typename D::T;
    using F = typename D::F;
    static constexpr int W = D::LANES, STEP = D::STEP, VECTORS = PANEL / W;

    const char* const x_;  // rows of operand A
    const T* const packed_;
    const T* const bias_;
    T* const y_;
    const int64_t rows_, columns_, steps_, row_bytes_;

   public:
    Linear(const char* x, const T* packed, const T* bias, T* y, int64_t rows, int64_t columns, int64_t depth)
        : x_(x),
          packed_(packed),
          bias_(bias),
          y_(y),
          rows_(rows),
          columns_(columns),
          steps_((depth + STEP - 1) / STEP),
          row_bytes_(steps_ * STEP * D::A_BYTES) {}

    void run(int64_t threads) {
        const int64_t panels = (columns_ + PANEL - 1) / PANEL, bands = (rows_ + BAND - 1) / BAND;
        const int64_t several = rows_ == 1 && panels % 2 == 0 ? 2 : 1;
        const int64_t items = panels / several * bands;
        const int64_t work = columns_ * steps_ * STEP * (rows_ + 4);
        const int chunk = int(std::max<int64_t>(1, items / (threads * 8)));
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic, chunk) if (threads > 1 && work > WORTH_THREADS)
        for (int64_t i = 0; i < items; ++i) {
            const int64_t panel = i / bands * several, begin = i % bands * BAND, end = std::min(rows_, begin + BAND);
            if (several == 2) {
                tile<1, 2>(0, panel);
            } else {
                band(begin, end, panel);
            }
        }
    }

   private:
    void band(int64_t begin, int64_t end, int64_t panel) {
        const int64_t count = end - begin, groups = (count + D::MAX_ROWS - 1) / D::MAX_ROWS;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = begin + count * g / groups, rows = begin + count * (g + 1) / groups - first;
            with_constant<D::MAX_ROWS>(int(rows), [&](auto n) ROPEWAY_INLINE_LAMBDA {
                tile<decltype(n)::value, 1>(first, panel);
            });
        }
    }

    // R rows from `first` on against P panels.
    template <int R, int P>
    ROPEWAY_INLINE void tile(int64_t first, int64_t panel) {
        constexpr int N = P * VECTORS;
        const char* a = x_ + first * row_bytes_;
        const T* b = packed_ + panel * steps_ * PANEL * STEP;
        const int64_t next_panel = steps_ * PANEL * STEP;
        F acc[R][N] = {};
        for (int64_t i = 0; i < steps_; ++i) {
            typename D::B w[N];
            ROPEWAY_UNROLL for (int p = 0; p < P; ++p) {
                const T* line = b + p * next_panel + i * PANEL * STEP;
                if (R <= 2) __builtin_prefetch(line + AHEAD / sizeof(T));
                ROPEWAY_UNROLL for (int v = 0; v < VECTORS; ++v) w[p * VECTORS + v] = D::load_b(line + v * W * STEP);
            }
            ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                const typename D::A x = D::load_a(a + m * row_bytes_, i);
                ROPEWAY_UNROLL for (int v = 0; v < N; ++v) D::step(acc[m][v], w[v], x);
            }
        }
        ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) finish(first + m, panel * PANEL + v * W, acc[m][v]);
        }
    }

    ROPEWAY_INLINE void finish(int64_t row, int64_t column, F sum) {
        if (column + W <= columns_) {
            if (bias_) sum += load<W>(bias_ + column);
            store<W>(y_ + row * columns_ + column, sum);
        } else {
            finish_part(row, column, sum);
        }
    }

    // The last panel may be wider than what is left of the row.
    __attribute__((noinline)) void finish_part(int64_t row, int64_t column, const F& sum) {
        for (int64_t c = column; c < columns_; ++c) {
            y_[row * columns_ + c] = from_float<T>(sum[c - column] + (bias_ ? to_float(bias_[c]) : 0.0f));
        }
    }
};

template <class T>
using LinearDot = typename DotOf<T, ROPEWAY_LANES>::type;

// x as operand A, which differs from how it is stored when bfloat16 is widened or a pair is incomplete.
template <class D>
const char* as_operand(const typename D::T* x, int64_t rows, int64_t depth, int64_t threads) {
    using T = typename D::T;
    constexpr bool widened = D::A_BYTES != int(sizeof(T));
    const int64_t padded = (depth + D::STEP - 1) / D::STEP * D::STEP;
    if (!widened && padded == depth) return reinterpret_cast<const char*>(x);
    static thread_local std::unique_ptr<char[]> buffer;
    static thread_local int64_t size = 0;
    if (rows * padded * D::A_BYTES > size) {
        size = rows * padded * D::A_BYTES;
        buffer.reset(new char[size_t(size)]);
    }
    char* const all = buffer.get();
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
    const auto packed = static_cast<const T*>(w.packed), bias = static_cast<const T*>(w.bias);
    Linear<D>(a, packed, bias, y, rows, w.columns, w.depth).run(threads);
}

int linear(const LinearWeight& weight, const void* x, void* y, int64_t rows, int64_t threads) {
    try {
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
    for (int64_t panel = 0; panel < (columns + PANEL - 1) / PANEL; ++panel) {
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
    const int64_t step = weight->type == 0 ? 1 : 2, size = weight->type == 0 ? 4 : 2;
    const int64_t padded = (weight->columns + ropeway::PANEL - 1) / ropeway::PANEL * ropeway::PANEL;
    return padded * ((weight->depth + step - 1) / step * step) * size;
}

// Plain `values` (columns, depth) into `packed`. `weight` says what it will be; its own `packed` is not read.
ROPEWAY_EXPORT int ropeway_pack(const LinearWeight* weight, const void* values, void* packed, int64_t threads) {
    return ropeway::with_type(weight->type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        return ropeway::pack(static_cast<const T*>(values), static_cast<T*>(packed), weight->columns, weight->depth,
                             threads);
    });
}

// Rows `ids` of the plain weight to `out` (count, depth), of the weight's type.
ROPEWAY_EXPORT int ropeway_unpack(const LinearWeight* weight, const int64_t* ids, void* out, int64_t count,
                                  int64_t threads) {
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

// y = x W^T + b with W in int8 or int4 and x quantized on the way in: one scale per row, values in [-127, 127], rounded
// to nearest even. Products are summed exactly in integers, per column (int8) or per group of a column (int4), and
// meet their scales in float32, in one fixed order: every instruction set gives the same bits.
//
// W is unsigned with a zero point (128 for int8; 8 or one per group for int4), because that is what the instructions
// want; the zero point is taken off again by the sum of the quantized row. A panel has, for each group of input
// features, [line][16 columns][4 bytes], 4 features a line in int8 and 8 in int4 (the first 4 in the low nibbles), then
// the scales of the columns, then their zero points: one row of x reads all of it as one long stream.
//
// A row whose largest magnitude is below 127 * 2^-126 counts as zero. A row with a NaN or an infinity gives NaN in
// that row alone.

#include <cmath>
#include <cstdlib>

#include "linear_tiles.h"
#include "vec_int.h"

namespace ropeway {

struct Int8 {
    static constexpr int64_t DEPTH = 4;        // input features of a line
    static constexpr int64_t SCALE_BYTES = 4;  // float32
    static constexpr int OFFSET = 128;         // what is stored is value + OFFSET
    template <int W>
    static ROPEWAY_INLINE typename Lanes<W>::F load_scales(const uint8_t* p) {
        return load_as<typename Lanes<W>::F>(p);
    }
};

struct Int4 {
    static constexpr int64_t DEPTH = 8;
    static constexpr int64_t SCALE_BYTES = 2;  // float16
    static constexpr int OFFSET = 8;
    template <int W>
    static ROPEWAY_INLINE typename Lanes<W>::F load_scales(const uint8_t* p) {
        return half_to_float<W>(p);
    }
};

// Where things lie in a packed weight.
template <class Format>
struct Layout {
    int64_t groups, lines;  // lines of a group
    int64_t scales, zeros;  // where they lie in a group, or zeros = 0
    int64_t group_bytes, panel_bytes;

    explicit Layout(const LinearWeight& w)
        : groups(w.group ? w.depth / w.group : 1),
          lines((w.depth / groups + Format::DEPTH - 1) / Format::DEPTH),
          scales(lines * LINE),
          zeros(w.format == 3 ? scales + PANEL * Format::SCALE_BYTES : 0),
          group_bytes(scales + PANEL * Format::SCALE_BYTES + (zeros ? PANEL : 0)),
          panel_bytes(groups * group_bytes) {}

    int64_t depth() const { return lines * Format::DEPTH; }  // input features of a group, some of int8 for nothing
    int64_t column(int64_t c, int64_t group) const { return c / PANEL * panel_bytes + group * group_bytes; }
    int64_t line(int64_t c, int64_t k) const {
        return column(c, k / depth()) + k % depth() / Format::DEPTH * LINE + c % PANEL * 4 + k % 4;
    }
};

// x, quantized. A row's values have the Form that the dot product wants.
struct Rows {
    const char* values;   // [row][stride]
    const int32_t* sums;  // [row][group], of the values
    const float* scales;  // [row]
    int64_t stride;       // bytes
};

template <class Form, class T>
void quantize_row(const T* x, int64_t depth, int64_t padded, int64_t group, char* values, int32_t* sums, float* scale) {
    constexpr int W = ROPEWAY_LANES;
    using I = typename Lanes<W>::I;
    const int64_t whole = depth / W * W;
    I most{};
    for (int64_t k = 0; k < whole; k += W) {
        const I bits = bits_as<I>(load<W>(x + k)) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    int32_t top = 0;
    for (int i = 0; i < W; ++i) top = std::max(top, int32_t(most[i]));
    for (int64_t k = whole; k < depth; ++k) top = std::max(top, bits_as<int32_t>(to_float(x[k])) & 0x7fffffff);

    const bool finite = top < 0x7f800000;
    const float s = bits_as<float>(top) / 127.0f;
    const bool empty = !finite || s < 1.17549435e-38f;
    *scale = finite ? (empty ? 0.0f : s) : bits_as<float>(0x7fc00000);
    if (empty) {
        Form::clear(values, padded);
        std::fill(sums, sums + padded / group, 0);
        return;
    }
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    for (int64_t g = 0; g < padded / group; ++g) {
        I total{};
        const int64_t end = std::min(g * group + group, whole);
        int64_t k = g * group;
        for (; k < end; k += W) {
            const I q = bits_as<I>(load<W>(x + k) / s + magic) - bits_as<int32_t>(magic);
            total += q;
            Form::template store_values<W>(values, k, q);
        }
        int32_t sum = 0;
        for (int i = 0; i < W; ++i) sum += total[i];
        for (; k < g * group + group; ++k) {
            const int32_t q = k < depth ? bits_as<int32_t>(to_float(x[k]) / s + magic) - bits_as<int32_t>(magic) : 0;
            sum += q;
            Form::store_value(values, k, q);
        }
        sums[g] = sum;
    }
}

template <class Form, class T>
Rows quantize(const T* x, int64_t rows, int64_t depth, int64_t padded, int64_t groups, int64_t threads) {
    const int64_t stride = padded * Form::A_BYTES, group = padded / groups;
    char* const buffer = scratch(rows * (stride + groups * 4 + 4));
    char* const values = buffer + rows * (groups * 4 + 4);
    const auto sums = reinterpret_cast<int32_t*>(buffer);
    const auto scales = reinterpret_cast<float*>(buffer + rows * groups * 4);
#pragma omp parallel for num_threads(int(threads)) schedule(static) if (threads > 1 && rows * depth > (1 << 15))
    for (int64_t r = 0; r < rows; ++r) {
        quantize_row<Form>(x + r * depth, depth, padded, group, values + r * stride, sums + r * groups, scales + r);
    }
    return Rows{values, sums, scales, stride};
}

template <class Format, class D>
class IntLinear {
    static constexpr int W = D::LANES, VECTORS = PANEL / W;
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;

    const LinearWeight& w_;
    const Layout<Format> layout_;
    const Rows rows_;
    const Output output_;

   public:
    IntLinear(const LinearWeight& w, const Layout<Format>& layout, const Rows& rows, void* y)
        : w_(w), layout_(layout), rows_(rows), output_{w.type, y, w.bias, w.columns, rows.scales} {}

    void run(int64_t rows, int64_t threads) {
        over_tiles<W>(rows, w_.columns, w_.depth, threads, HeightsFor<W>{},
                      [this](int64_t first, const Place& place, auto r) {
                          this->template tile<decltype(r)::value>(first, place);
                      });
    }

   private:
    template <int R>
    void tile(int64_t first, const Place& place) {
        constexpr int P = panels_in_tile(W, R), N = P * VECTORS;
        const auto panel = static_cast<const uint8_t*>(w_.packed) + place.panel * layout_.panel_bytes;
        const char* const a = rows_.values + first * rows_.stride;
        const int32_t* const sums = rows_.sums + first * layout_.groups;
        Ahead<R, P> ahead(panel, layout_.panel_bytes, layout_.groups * layout_.lines, place);
        F total[R][N] = {};
        for (int64_t g = 0; g < layout_.groups; ++g) {
            const uint8_t* const group = panel + g * layout_.group_bytes;
            I acc[R][N] = {};
            D::template dot<R, P>(acc, group, layout_.panel_bytes, a + g * layout_.depth() * D::A_BYTES, rows_.stride,
                                  layout_.lines, ahead);
            ahead.fetch(layout_.group_bytes - layout_.scales);
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) {
                const uint8_t* const from = group + v / VECTORS * layout_.panel_bytes;
                const int lane = v % VECTORS * W;
                const F scale = Format::template load_scales<W>(from + layout_.scales + lane * Format::SCALE_BYTES);
                const I zero = layout_.zeros ? load_bytes<W>(from + layout_.zeros + lane) : I{} + Format::OFFSET;
                ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                    const I exact = acc[m][v] - zero * sums[m * layout_.groups + g];
                    total[m][v] = fused<W>(__builtin_convertvector(exact, F), scale, total[m][v]);
                }
            }
        }
        float out[R * N * W];
        ROPEWAY_UNROLL for (int i = 0; i < R * N; ++i) store<W>(out + i * W, total[i / N][i % N]);
        output_.store(out, first, R, place.panel * PANEL, N * W);
    }
};

template <class Format, class D>
void multiply(const LinearWeight& w, const void* x, void* y, int64_t rows, int64_t threads) {
    const Layout<Format> layout(w);
    with_type(w.type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const Rows quantized = quantize<typename D::Form>(static_cast<const T*>(x), rows, w.depth,
                                                          layout.groups * layout.depth(), layout.groups, threads);
        IntLinear<Format, D>(w, layout, quantized, y).run(rows, threads);
        return 0;
    });
}

void linear_int(const LinearWeight& w, const void* x, void* y, int64_t rows, int64_t threads) {
    if (w.format == 1) {
        multiply<Int8, Int8Dot<ROPEWAY_LANES>>(w, x, y, rows, threads);
    } else {
        multiply<Int4, Int4Dot<ROPEWAY_LANES>>(w, x, y, rows, threads);
    }
}

template <class Fn>
void with_format(int64_t format, Fn&& fn) {
    if (format == 1) {
        fn(Int8{});
    } else {
        fn(Int4{});
    }
}

int64_t packed_bytes_int(const LinearWeight& w) {
    int64_t bytes = 0;
    with_format(w.format, [&](auto f) { bytes = panels_of(w.columns) * Layout<decltype(f)>(w).panel_bytes; });
    return bytes;
}

// What `column` of a packed weight holds at input feature k, zero point and all.
template <class Format>
int stored(const Layout<Format>& layout, const uint8_t* packed, int64_t column, int64_t k) {
    const uint8_t byte = packed[layout.line(column, k)];
    if constexpr (Format::DEPTH == 4) return byte;
    return k % 8 < 4 ? byte & 15 : byte >> 4;
}

void pack_int(const LinearWeight& w, const void* values, const void* scales, const uint8_t* zeros, void* packed,
              int64_t threads) {
    const auto from = static_cast<const uint8_t*>(values);  // int8 + 128 is int8 with its top bit flipped
    const auto scale_bytes = static_cast<const uint8_t*>(scales);
    const auto to = static_cast<uint8_t*>(packed);
    with_format(w.format, [&](auto f) {
        using Format = decltype(f);
        const Layout<Format> layout(w);
        constexpr int64_t S = Format::SCALE_BYTES;
#pragma omp parallel for num_threads(int(threads)) schedule(static)
        for (int64_t panel = 0; panel < panels_of(w.columns); ++panel) {
            uint8_t* const start = to + panel * layout.panel_bytes;
            std::fill(start, start + layout.panel_bytes, uint8_t(0));
            const int64_t end = std::min<int64_t>(w.columns, panel * PANEL + PANEL);
            // A block of lines of each column at a time, so that what is written across columns is still in the cache.
            for (int64_t begin = 0; begin < w.depth; begin += 16 * Format::DEPTH) {
                const int64_t most = std::min<int64_t>(w.depth, begin + 16 * Format::DEPTH);
                for (int64_t c = panel * PANEL; c < end; ++c) {
                    const uint8_t* const row = from + c * w.depth;
                    for (int64_t k = begin; k < most; k += Format::DEPTH) {
                        uint8_t* const line = to + layout.line(c, k);
                        for (int64_t i = 0; i < std::min<int64_t>(4, w.depth - k); ++i) {
                            line[i] = Format::DEPTH == 4 ? row[k + i] ^ 0x80 : row[k + i] | row[k + i + 4] << 4;
                        }
                    }
                }
            }
            for (int64_t c = panel * PANEL; c < end; ++c) {
                for (int64_t g = 0; g < layout.groups; ++g) {
                    const int64_t i = c * layout.groups + g, lane = c % PANEL;
                    uint8_t* const group = to + layout.column(c, g);
                    std::copy_n(scale_bytes + i * S, S, group + layout.scales + lane * S);
                    if (zeros) group[layout.zeros + lane] = zeros[i];
                }
            }
        }
    });
}

template <class Format, class T>
void unpack_rows(const LinearWeight& w, const int64_t* ids, T* out, int64_t count, int64_t threads) {
    const Layout<Format> layout(w);
    const auto packed = static_cast<const uint8_t*>(w.packed);
#pragma omp parallel for num_threads(int(threads)) schedule(static) if (count > 4)
    for (int64_t r = 0; r < count; ++r) {
        const int64_t lane = ids[r] % PANEL, depth = w.depth / layout.groups;
        for (int64_t g = 0; g < layout.groups; ++g) {
            const uint8_t* const group = packed + layout.column(ids[r], g);
            const int zero = layout.zeros ? group[layout.zeros + lane] : Format::OFFSET;
            const int64_t eight = layout.scales + lane / 8 * 8 * Format::SCALE_BYTES;
            const auto scales = Format::template load_scales<8>(group + eight);
            for (int64_t k = g * depth; k < g * depth + depth; ++k) {
                const int value = stored(layout, packed, ids[r], k) - zero;
                out[r * w.depth + k] = from_float<T>(float(value) * scales[lane % 8]);
            }
        }
    }
}

void unpack_int(const LinearWeight& w, const int64_t* ids, void* out, int64_t count, int64_t threads) {
    with_format(w.format, [&](auto f) {
        with_type(w.type, [&](auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            unpack_rows<decltype(f)>(w, ids, static_cast<T*>(out), count, threads);
            return 0;
        });
    });
}

}  // namespace ropeway

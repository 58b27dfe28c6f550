// What the plain and the integer product share: how y is cut into tiles, and who computes them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "linear.h"
#include "vec.h"

namespace ropeway {

constexpr int PANEL = 16;                   // columns of a panel of W
constexpr int BAND = 96;                    // rows of x that use a panel while it is cached, before the next panel
constexpr int64_t AHEAD = 2048;             // bytes of W asked for before they are needed
constexpr int64_t WORTH_THREADS = 1 << 19;  // elements of W plus a share of the sums: some ten microseconds

// Panels of a packed weight: an even number, so that a tile can always take two.
inline int64_t panels_of(int64_t columns) { return (columns + 2 * PANEL - 1) / (2 * PANEL) * 2; }

// The heights that tiles come in. Few, since each is compiled; the highest is what the registers hold: 32 with
// AVX-512, else 16.
template <int... R>
using Heights = std::integer_sequence<int, R...>;
template <int W>
using HeightsFor = std::conditional_t<W == 16, Heights<12, 8, 4, 2, 1>, Heights<6, 4, 2, 1>>;

// Neighbouring panels of a tile: two of one vector each, or one of two unless a single row leaves registers for more.
constexpr int panels_in_tile(int lanes, int rows) { return lanes == PANEL || rows == 1 ? 2 : 1; }

// Call fn(first) with the height of tile, a compile-time constant, that covers `count` rows with the least work. The
// last tiles may overlap: a row that is computed twice comes out the same.
template <int... R, class Fn>
ROPEWAY_INLINE void cover(int64_t count, Heights<R...>, Fn&& fn) {
    int64_t best = 0, least = INT64_MAX;
    const auto consider = [&](int64_t height) {
        const int64_t cost = (count + height - 1) / height * (height + 2);  // 2: what a tile costs beside its rows
        if (height <= count && cost < least) best = height, least = cost;
    };
    (consider(R), ...);
    const auto with = [&](auto height) ROPEWAY_INLINE_LAMBDA {
        if (best != decltype(height)::value) return;
        const int64_t tiles = (count + best - 1) / best;
        for (int64_t i = 0; i < tiles; ++i) fn(tiles == 1 ? 0 : (count - best) * i / (tiles - 1), height);
    };
    (with(std::integral_constant<int, R>{}), ...);
}

// Call tile(first_row, panel, R) until all rows have met all panels, with R rows against panels_in_tile(W, R) panels.
// `depth` only says how much work that is.
template <int W, class Rows, class Tile>
void over_tiles(int64_t rows, int64_t columns, int64_t depth, int64_t threads, Rows heights, Tile&& tile) {
    const int64_t bands = (rows + BAND - 1) / BAND, items = panels_of(columns) / 2 * bands;
    const bool shared = threads > 1 && columns * depth * (rows + 4) > WORTH_THREADS;
    const int chunk = int(std::max<int64_t>(1, items / (threads * 8)));
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic, chunk) if (shared)
    for (int64_t i = 0; i < items; ++i) {
        const int64_t pair = i / bands * 2, begin = rows * (i % bands) / bands, end = rows * (i % bands + 1) / bands;
        for (int64_t half = 0; half < 2; ++half) {
            cover(end - begin, heights, [&](int64_t first, auto height) ROPEWAY_INLINE_LAMBDA {
                constexpr int R = decltype(height)::value;
                if (half == 0 || panels_in_tile(W, R) == 1) tile(begin + first, pair + half, height);
            });
        }
    }
}

// Where a tile's sums go: y = sums * scale + bias, where there are such.
struct Output {
    int64_t type;
    void* y;
    const void* bias;
    int64_t columns;
    const float* scales;  // of each row, or null

    // `sums` is [rows][width].
    void store(const float* sums, int64_t first, int64_t rows, int64_t column, int64_t width) const;
};

// At least `size` bytes that the calling thread keeps for its next call. Throws std::bad_alloc.
inline char* scratch(int64_t size) {
    static thread_local std::unique_ptr<char[]> buffer;
    static thread_local int64_t capacity = 0;
    if (size > capacity) {
        capacity = 0;  // should the next line throw
        buffer.reset(new char[size_t(size)]);
        capacity = size;
    }
    return buffer.get();
}

// The integer formats: see linear_int.cpp.
int64_t packed_bytes_int(const LinearWeight& weight);
void pack_int(const LinearWeight& weight, const void* values, const void* scales, const uint8_t* zeros, void* packed,
              int64_t threads);
void unpack_int(const LinearWeight& weight, const int64_t* ids, void* out, int64_t count, int64_t threads);
void linear_int(const LinearWeight& weight, const void* x, void* y, int64_t rows, int64_t threads);

}  // namespace ropeway

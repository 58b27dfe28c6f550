// What the plain and the integer product share: how y is cut into tiles, and who computes them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>

#include "linear.h"
#include "vec.h"

namespace ropeway {

constexpr int PANEL = 16;                   // columns of a panel of W
constexpr int64_t LINE = 4 * PANEL;         // bytes of a panel that are used together
constexpr int BAND = 128;                   // rows of x that use a panel while it is cached, before the next panel
constexpr int64_t AHEAD = 2048;             // bytes of W asked for before they are needed
constexpr int64_t WORTH_THREADS = 1 << 19;  // elements of W plus a share of the sums: some ten microseconds

// Panels of a packed weight: an even number, so that a tile can always take two.
inline int64_t panels_of(int64_t columns) { return (columns + 2 * PANEL - 1) / (2 * PANEL) * 2; }

// The heights that tiles come in: the usual one first, then others where they take all rows at once, or the rows are
// few. Few heights, since each is compiled. 32 registers, with AVX-512, hold 12 rows. 16 hold 6, but 4 are a little
// faster when there are more to come.
template <int... R>
using Heights = std::integer_sequence<int, R...>;
template <int W>
using HeightsFor = std::conditional_t<W == 16, Heights<12, 8, 4, 2, 1>, Heights<4, 6, 2, 1>>;

// Neighbouring panels of a tile: two of one vector each, or one of two unless a single row leaves registers for more.
constexpr int panels_in_tile(int lanes, int rows) { return lanes == PANEL || rows == 1 ? 2 : 1; }

// A tile's share of fetching the panels that come next, a bit with each line that it uses: so neither memory nor
// arithmetic waits for the other. `tile` is one of `tiles` on these panels.
struct Soon {
    const char* line;
    int64_t stride;

    Soon(const void* next, int64_t panels, int64_t panel_bytes, int64_t tile, int64_t tiles)
        : line(static_cast<const char*>(next) + panels * panel_bytes * tile / tiles), stride(LINE * panels / tiles) {}
    ROPEWAY_INLINE void fetch() {
        __builtin_prefetch(line, 0, 2);
        line += stride;
    }
};

// Call fn(first, i, tiles, height) for the tiles that cover `count` rows, of the height, a compile-time constant, that
// does so with the least work. Tiles may overlap: a row that is computed twice comes out the same.
template <int... R, class Fn>
ROPEWAY_INLINE void cover(int64_t count, Heights<R...>, Fn&& fn) {
    constexpr int64_t usual = std::get<0>(std::make_tuple(R...));
    int64_t best = 0, least = INT64_MAX;
    const auto consider = [&](int64_t height) {
        if (height > count || (height > usual && height != count)) return;
        const int64_t cost = (count + height - 1) / height * (height + 2);  // 2: what a tile costs beside its rows
        if (cost < least) best = height, least = cost;
    };
    (consider(R), ...);
    const auto with = [&](auto height) ROPEWAY_INLINE_LAMBDA {
        if (best != decltype(height)::value) return;
        const int64_t tiles = (count + best - 1) / best;
        for (int64_t i = 0; i < tiles; ++i) fn(tiles == 1 ? 0 : (count - best) * i / (tiles - 1), i, tiles, height);
    };
    (with(std::integral_constant<int, R>{}), ...);
}

// Call tile(first_row, panel, i, tiles, R), the i-th of so many on that panel, until all rows have met all panels, with
// R rows against panels_in_tile(W, R) panels. `depth` only says how much work that is.
template <int W, class Rows, class Tile>
void over_tiles(int64_t rows, int64_t columns, int64_t depth, int64_t threads, Rows heights, Tile&& tile) {
    const int64_t bands = (rows + BAND - 1) / BAND, items = panels_of(columns) / 2 * bands;
    const bool shared = threads > 1 && columns * depth * (rows + 4) > WORTH_THREADS;
    const int chunk = int(std::max<int64_t>(1, items / (threads * 8)));
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic, chunk) if (shared)
    for (int64_t item = 0; item < items; ++item) {
        const int64_t pair = item / bands * 2, band = item % bands;
        const int64_t begin = rows * band / bands, end = rows * (band + 1) / bands;
        for (int64_t half = 0; half < 2; ++half) {
            const auto one = [&](int64_t first, int64_t i, int64_t tiles, auto height) ROPEWAY_INLINE_LAMBDA {
                if (half == 1 && panels_in_tile(W, decltype(height)::value) == 2) return;
                tile(begin + first, pair + half, band * tiles + i, bands * tiles, height);
            };
            cover(end - begin, heights, one);
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

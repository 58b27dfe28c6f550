// What the plain and the integer product share: how y is cut into tiles, and who computes them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
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
constexpr int64_t AHEAD = 4096;             // bytes of a panel of W asked for before they are needed
constexpr int64_t WORTH_THREADS = 1 << 19;  // elements of W plus a share of the sums: some ten microseconds

// Panels of a packed weight: an even number, so that a tile can always take two.
inline int64_t panels_of(int64_t columns) { return (columns + 2 * PANEL - 1) / (2 * PANEL) * 2; }

// The heights that tiles come in: the usual one first, then others where they take all rows at once, or do less twice:
// 3 rows in two tiles of 2 would take longer than 4 rows in one. Few heights, since each is compiled. 32 registers,
// with AVX-512, hold 12 rows, and 16 hold 6; but 8 and 4 are faster when there are more to come. 8 lines of x are also
// what one set of the first-level cache holds, in which they all lie where their distance is a power of two.
template <int... R>
using Heights = std::integer_sequence<int, R...>;
template <int W>
using HeightsFor = std::conditional_t<W == 16, Heights<8, 12, 4, 3, 2, 1>, Heights<4, 6, 5, 3, 2, 1>>;

// Neighbouring panels of a tile: two of one vector each, or one of two unless few rows leave registers for more.
constexpr int panels_in_tile(int lanes, int rows) { return lanes == PANEL || rows <= 2 ? 2 : 1; }

// Where a tile takes W from: the panels from `panel` on. It is the i-th of `tiles` that do.
struct Place {
    int64_t panel, i, tiles;
};

// What a tile with few rows fetches ahead: its own P panels, then those of the next tile. Into the second level, which
// was faster than into the first by up to a third (one row of int4, Zen 4).
template <int P>
class Stream {
    const char* line_;
    const char* const end_;
    const int64_t panel_bytes_;

   public:
    Stream(const void* panel, int64_t panel_bytes, int64_t, const Place&)
        : line_(static_cast<const char*>(panel) + AHEAD),
          end_(static_cast<const char*>(panel) + panel_bytes),
          panel_bytes_(panel_bytes) {}
    // For `bytes` of each panel, a line at most.
    ROPEWAY_INLINE void fetch(int64_t bytes) {
        const char* const from = line_ < end_ ? line_ : line_ + (P - 1) * panel_bytes_;
        ROPEWAY_UNROLL for (int p = 0; p < P; ++p) __builtin_prefetch(from + p * panel_bytes_, 0, 2);
        line_ += bytes;
    }
};

// What a tile with many rows fetches ahead: its share of the next tile's panels, a bit with each line that it uses, so
// that neither memory nor arithmetic waits for the other.
template <int P>
class Share {
    const char* line_;
    const int64_t stride_;

   public:
    Share(const void* panel, int64_t panel_bytes, int64_t lines, const Place& place)
        : line_(static_cast<const char*>(panel) + P * panel_bytes + P * panel_bytes * place.i / place.tiles),
          stride_(P * panel_bytes / lines / place.tiles) {}
    ROPEWAY_INLINE void fetch(int64_t bytes) {
        if (bytes < LINE) return;
        __builtin_prefetch(line_, 0, 2);
        line_ += stride_;
    }
};

template <int R, int P>
using Ahead = std::conditional_t<R <= 2, Stream<P>, Share<P>>;

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

// Call fn(item) for all items, on `threads` threads. Each takes a share of what is left, so that they end together.
template <class Fn>
void in_parallel(int64_t items, int64_t threads, Fn&& fn) {
    std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    for (int64_t begin = taken.load(std::memory_order_relaxed); begin < items;) {
        const int64_t end = begin + std::max<int64_t>(1, (items - begin) / (2 * threads));
        if (!taken.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
        for (int64_t item = begin; item < end; ++item) fn(item);
        begin = taken.load(std::memory_order_relaxed);
    }
}

// Call tile(first_row, place, R) until all rows have met all panels, with R rows against panels_in_tile(W, R) panels.
// `depth` only says how much work that is.
template <int W, class Rows, class Tile>
void over_tiles(int64_t rows, int64_t columns, int64_t depth, int64_t threads, Rows heights, Tile&& tile) {
    const int64_t bands = (rows + BAND - 1) / BAND;
    const bool shared = columns * depth * (rows + 4) > WORTH_THREADS;
    in_parallel(panels_of(columns) / 2 * bands, shared ? threads : 1, [&](int64_t item) {
        const int64_t pair = item / bands * 2, band = item % bands;
        const int64_t begin = rows * band / bands, end = rows * (band + 1) / bands;
        for (int64_t half = 0; half < 2; ++half) {
            const auto one = [&](int64_t first, int64_t i, int64_t tiles, auto height) ROPEWAY_INLINE_LAMBDA {
                if (half == 1 && panels_in_tile(W, decltype(height)::value) == 2) return;
                tile(begin + first, Place{pair + half, band * tiles + i, bands * tiles}, height);
            };
            cover(end - begin, heights, one);
        }
    });
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

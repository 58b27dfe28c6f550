// What an attention step is asked to do, and how it is cut into pieces of work. See attention_kernel.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention_cache.h"

namespace ropeway {

constexpr int CHUNK = 128;       // positions of one softmax update
constexpr int SPLIT = 512;       // positions of one independent piece
constexpr int TILE = 96;         // queries of one work item
constexpr float FLOOR = -1e30f;  // below every score: a maximum that nothing has been compared with yet

// The kernel for each type of the cache, in files of their own: they compile side by side.
int attention_f32(const AttentionStep& step, const AttentionLayer& layer);
int attention_bf16(const AttentionStep& step, const AttentionLayer& layer);
int attention_int8(const AttentionStep& step, const AttentionLayer& layer);

// One piece of work: some queries of a row, for some neighbouring KV heads.
struct Item {
    int32_t row, kv_head, heads;  // heads [kv_head, kv_head + heads)
    int32_t first, count;         // queries [first, first + count) of the row's list, for each head
    int32_t piece;                // this piece only, or -1 for all of them in turn
    int32_t slot, pieces;         // where partial results go, and how many pieces the tile has
};

// Running softmax of a tile: maxima (in powers of two), sums, and weighted sums of V, in rows of a multiple of four
// vectors.
struct Softmax {
    float top[TILE + 8], total[TILE];
    alignas(64) float mixed[TILE * MAX_DIM];
};

struct Scratch {
    const Item* upcoming;  // probably this thread's next work item
    alignas(64) char query[TILE * MAX_DIM * 4];
    alignas(64) float scores[TILE * CHUNK];
    alignas(64) float panel[std::max(MAX_DIM, CHUNK) * 2 * ROPEWAY_LANES];
    alignas(64) char tail[4 * ROPEWAY_LANES * 4];
    float keep[TILE + 8];
    Softmax piece, whole;
};

template <class X>
class Buffer {
    std::unique_ptr<X[]> data_;
    size_t size_ = 0;

   public:
    X* at_least(size_t size) {
        if (size > size_) {
            data_.reset(new X[size]);  // not initialised
            size_ = size;
        }
        return data_.get();
    }
};

// Which positions a query sees, and the list of work items.
class Work {
   protected:
    const AttentionStep& step_;
    const AttentionLayer& layer_;
    const int64_t group_;  // query heads of a KV head

    Work(const AttentionStep& step, const AttentionLayer& layer)
        : step_(step), layer_(layer), group_(step.heads / step.kv_heads) {}

    // Cut the rows into work items. With enough of them an item takes several KV heads, whose K and V lie side by side
    // in each block: long reads are fast reads. With few, heads are divided first, then positions.
    std::vector<Item> plan(int threads, int& slots) const {
        const size_t enough = threads == 1 ? 1 : size_t(4 * threads);
        std::vector<Item> items;
        for (int64_t most = step_.kv_heads; most >= 1; most = most == 1 ? 0 : (most + 1) / 2) {
            items.clear();
            for (int64_t r = 0; r < step_.rows; ++r) add_tiles(r, most, items);
            if (items.size() >= enough) return items;
        }
        std::vector<Item> split;
        for (Item item : items) {
            item.pieces = int32_t(last_piece(item) - first_piece(item) + 1);
            for (int p = 0; p < item.pieces; ++p) {
                item.piece = item.pieces == 1 ? -1 : p;
                item.slot = item.pieces == 1 ? 0 : slots++;
                split.push_back(item);
            }
        }
        return split;
    }

    // The tiles of a row: neighbours read the same K and V, and those with the longest context come first.
    void add_tiles(int64_t row, int64_t most_heads, std::vector<Item>& items) const {
        const int64_t queries = (step_.cu_q[row + 1] - step_.cu_q[row]) * group_;
        const int64_t tiles = (queries + TILE - 1) / TILE;
        const int64_t heads = std::max<int64_t>(1, std::min(most_heads, tiles == 1 ? TILE / queries : 1));
        for (int64_t h = 0; h < step_.kv_heads; h += heads) {
            const int64_t n = std::min(heads, step_.kv_heads - h);
            for (int64_t t = tiles - 1; t >= 0; --t) {
                const int64_t first = queries * t / tiles, end = queries * (t + 1) / tiles;
                items.push_back({int32_t(row), int32_t(h), int32_t(n), int32_t(first), int32_t(end - first), -1, 0, 1});
            }
        }
    }

    int64_t position(const Item& item, int64_t query) const { return step_.starts[item.row] + query / group_; }

    int64_t first_seen(const Item& item, int64_t query) const {
        return layer_.window ? std::max<int64_t>(0, position(item, query) - layer_.window + 1) : 0;
    }

    int64_t first_piece(const Item& item) const { return first_seen(item, item.first) / SPLIT; }

    int64_t last_piece(const Item& item) const { return position(item, item.first + item.count - 1) / SPLIT; }
};

}  // namespace ropeway

// Paged attention: one kernel for decode and for chunked prefill, reading K and V where the cache holds them.
//
// The query heads of a KV head and the tokens of a row are one list of queries, cut into tiles: grouped-query attention
// needs no copy of K or V, and decode is a prefill of one token. Softmax is online (Milakov and Gimelshein 2018; Dao et
// al. 2022) over chunks of 128 positions, restarted every SPLIT positions; the pieces are then merged in order
// (flash-decoding). Whether pieces run on one thread or on several changes nothing in the arithmetic, and all cuts are
// at absolute positions, so that a query's result depends on its position and its sequence alone.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "attention_cache.h"
#include "attention_work.h"

namespace ropeway {

// Running softmax of a tile: maxima (in powers of two), sums, and weighted sums of V in rows of whole pairs of vectors.
struct Softmax {
    float top[TILE + 8], total[TILE];
    alignas(64) float mixed[TILE * MAX_DIM];
};

struct Scratch {
    const Item* upcoming;  // probably this thread's next work item
    alignas(64) char query[TILE * MAX_DIM * 4];
    alignas(64) float scores[TILE * CHUNK];
    alignas(64) float panel[std::max(MAX_DIM, CHUNK) * 2 * ROPEWAY_LANES];
    alignas(64) char tail[2 * ROPEWAY_LANES * 4];
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

template <class D>
class Attention : Work, Cache<D> {
    // `rows` queries: the list's from `query` on, the tile's from `first` on. Some of them see positions [from, to) of
    // the chunk; `from` is where a block begins.
    struct Panel {
        int query, first, rows;
        int64_t from, to;
    };

    // Positions [from, to) of the chunk from `base` on, in these blocks; those in `ahead` come next.
    struct Chunk {
        int64_t base, from, to;
        const typename D::T *blocks[CHUNK / 8], *ahead[CHUNK / 8];
        Panel panels[TILE];
        int count;
    };

    using T = typename D::T;
    using F = typename D::F;
    using P = typename D::Packed;
    static constexpr int64_t WORTH_THREADS = 1 << 18;  // multiply-adds: some ten microseconds
    static constexpr int W = D::LANES, STEP = D::STEP, WIDTH = 2 * W;
    using Cache<D>::dim_, Cache<D>::size_, Cache<D>::head_elements_, Cache<D>::SCALED;
    using Cache<D>::head_of, Cache<D>::scales, Cache<D>::write;

    const int64_t mixed_row_;
    const float log2_scale_;
    std::atomic<bool> damaged_{false};

   public:
    Attention(const AttentionStep& step, const AttentionLayer& layer)
        : Work(step, layer),
          Cache<D>(step, layer),
          mixed_row_((dim_ + WIDTH - 1) / WIDTH * WIDTH),
          log2_scale_(float(step.scale) * LOG2_E) {}

    int run() {
        const int threads = int(step_.threads);
        int slots = 0;
        const std::vector<Item> items = plan(threads, slots);
        // Kept from call to call: fresh pages cost more than a small step's arithmetic.
        static thread_local Buffer<Scratch> scratches;
        static thread_local Buffer<Softmax> partials;
        Scratch* const scratch = scratches.at_least(size_t(threads));
        Softmax* const partial = partials.at_least(size_t(slots));
        std::vector<std::atomic<int>> done(items.size());
        std::atomic<size_t> next{0};
        const bool alone = threads == 1 || items.size() == 1 || work() < WORTH_THREADS;
#pragma omp parallel num_threads(threads) if (!alone)
        {
            write_kv();
            Scratch& mine = scratch[omp_get_thread_num()];
            for (size_t i = next.fetch_add(1); i < items.size(); i = next.fetch_add(1)) {
                const Item& item = items[i];
                mine.upcoming = &items[std::min(next.load(std::memory_order_relaxed), items.size() - 1)];
                if (item.piece < 0) {
                    whole_tile(item, mine);
                } else {
                    one_piece(item, mine, partial[item.slot]);
                    std::atomic<int>& counter = done[i - size_t(item.piece)];
                    if (counter.fetch_add(1, std::memory_order_acq_rel) + 1 == item.pieces) {
                        merge_pieces(item, partial + (item.slot - item.piece));
                    }
                }
            }
        }
        return damaged_ ? 1 : 0;
    }

   private:
    // Multiply-adds of the step, roughly.
    int64_t work() const {
        int64_t pairs = 0;
        for (int64_t r = 0; r < step_.rows; ++r) {
            const int64_t count = step_.cu_q[r + 1] - step_.cu_q[r], length = step_.starts[r] + count;
            pairs += count * (layer_.window ? std::min(length, layer_.window) : length);
        }
        return pairs * step_.heads * dim_ * 2;
    }

    // ---- the cache

    const T* block(const Item& item, int64_t position) {
        int64_t id = step_.tables[item.row * step_.table_stride + position / size_];
        if (id < 0) {
            damaged_ = true;
            id = 0;
        }
        return head_of(id, item.kv_head);
    }

    void write_kv() {
        const int64_t heads = step_.kv_heads;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < step_.tokens * heads; ++i) {
            const int64_t t = i / heads, h = i % heads;
            const int64_t slot = step_.slots[t];
            if (slot < 0) {
                damaged_ = true;
                continue;
            }
            const int64_t k_at = t * layer_.k_stride + h * dim_, v_at = t * layer_.v_stride + h * dim_;
            write(step_.type, layer_.k, k_at, layer_.v, v_at, slot, h);
        }
    }

    // ---- a tile

    void whole_tile(const Item& item, Scratch& s) {
        read_query(item, s);
        const int64_t from = first_piece(item), to = last_piece(item);
        attend(item, from, s, s.whole);
        for (int64_t p = from + 1; p <= to; ++p) {
            attend(item, p, s, s.piece);
            merge(item, s.whole, s.piece);
        }
        write_out(item, s.whole);
    }

    void one_piece(const Item& item, Scratch& s, Softmax& partial) {
        read_query(item, s);
        attend(item, first_piece(item) + item.piece, s, partial);
    }

    void merge_pieces(const Item& item, Softmax* partial) {
        for (int p = 1; p < item.pieces; ++p) merge(item, partial[0], partial[p]);
        write_out(item, partial[0]);
    }

    // Row m of a tile is query m % count of head m / count. Its place in q, and in the result:
    int64_t token(const Item& item, int m) const {
        return step_.cu_q[item.row] + (item.first + m % item.count) / group_;
    }

    int64_t head(const Item& item, int m) const {
        return (item.kv_head + m / item.count) * group_ + (item.first + m % item.count) % group_;
    }

    void read_query(const Item& item, Scratch& s) {
        with_type(step_.type, [&](auto* type) {
            const auto* q = static_cast<decltype(type)>(const_cast<void*>(layer_.q));
            for (int m = 0; m < item.heads * item.count; ++m) {
                const auto* from = q + token(item, m) * layer_.q_stride + head(item, m) * dim_;
                char* to = s.query + m * dim_ * D::A_BYTES;
                for (int64_t d = 0; d < dim_; d += W) D::store_a(to, d, load<W>(from + d));
            }
            return 0;
        });
    }

    void write_out(const Item& item, const Softmax& x) {
        with_type(step_.type, [&](auto* type) {
            auto* out = static_cast<decltype(type)>(layer_.out);
            for (int m = 0; m < item.heads * item.count; ++m) {
                auto* to = out + (token(item, m) * step_.heads + head(item, m)) * dim_;
                const float* from = x.mixed + m * mixed_row_;
                const float inverse = 1.0f / x.total[m];
                for (int64_t d = 0; d < dim_; d += W) store<W>(to + d, load<W>(from + d) * inverse);
            }
            return 0;
        });
    }

    // Add a later piece. A piece in which a query sees nothing has total 0 and leaves the rest as it is, bit for bit.
    void merge(const Item& item, Softmax& into, const Softmax& from) {
        for (int m = 0; m < item.heads * item.count; ++m) {
            const float top = into.top[m] > from.top[m] ? into.top[m] : from.top[m];
            const F keep = exp2<W>(splat<W>(into.top[m] - top)), add = exp2<W>(splat<W>(from.top[m] - top));
            into.top[m] = top;
            into.total[m] = into.total[m] * keep[0] + from.total[m] * add[0];
            float* x = into.mixed + m * mixed_row_;
            const float* y = from.mixed + m * mixed_row_;
            for (int64_t d = 0; d < dim_; d += W) store<W>(x + d, load<W>(x + d) * keep + load<W>(y + d) * add);
        }
    }

    // The softmax of one piece of SPLIT positions, from scratch.
    void attend(const Item& item, int64_t piece, Scratch& s, Softmax& x) {
        const int rows = item.heads * item.count;
        std::fill_n(x.top, rows, FLOOR);
        std::fill_n(x.total, rows, 0.0f);
        std::fill_n(x.mixed, rows * mixed_row_, 0.0f);
        const int64_t low = first_seen(item, item.first), high = position(item, item.first + item.count - 1) + 1;
        const int64_t end = std::min(high, (piece + 1) * SPLIT);
        Chunk c;
        const T* following[CHUNK / 8];
        for (int64_t base = piece * SPLIT; base < end; base += CHUNK) {
            if (base + CHUNK <= low) continue;
            const int64_t first = std::max(low - base, int64_t(0)) / size_;
            c.base = base, c.from = first * size_, c.to = std::min(end - base, int64_t(CHUNK));
            for (int64_t b = first; b * size_ < c.to; ++b) c.blocks[b] = block(item, base + b * size_);
            look_ahead(item, base, *s.upcoming, following);
            for (int h = 0; h < item.heads; ++h) {
                for (int64_t b = first; b * size_ < c.to; ++b) {
                    c.ahead[b] = h + 1 < item.heads ? c.blocks[b] + head_elements_ : following[b];
                    if constexpr (SCALED) __builtin_prefetch(scales(c.ahead[b]));
                }
                chunk(item, h, c, s, x);
                for (int64_t b = first; b * size_ < c.to; ++b) c.blocks[b] += head_elements_;
            }
        }
    }

    // While a chunk is computed the processor is asked for what comes next, a line for a line read: score() asks for
    // the V that lies behind each K, and mix() for the K of `ahead`, in the order of addresses: the next head's, or,
    // from here, the tile's next chunk's or the next work item's. Left to the hardware alone, each block is a new page,
    // and decode waits for every one of them.
    void look_ahead(const Item& item, int64_t base, const Item& next, const T** following) {
        const bool more = base + CHUNK <= position(item, item.first + item.count - 1);
        const Item& from = more ? item : next;
        const int64_t low = first_seen(from, from.first), high = position(from, from.first + from.count - 1) + 1;
        const int64_t start = more ? base + CHUNK : (first_piece(from) + std::max(from.piece, 0)) * SPLIT;
        for (int64_t b = 0; b < CHUNK / size_; ++b) {
            const int64_t at = std::max(start + b * size_, low);
            following[b] = block(from, std::min(at, high - 1));
        }
    }

    // Head h of a tile against a chunk.
    void chunk(const Item& item, int h, Chunk& c, Scratch& s, Softmax& x) {
        const int most = item.count <= DIRECT_ROWS ? DIRECT_ROWS : P::MAX_ROWS;
        const int panels = (item.count + most - 1) / most;
        c.count = 0;
        for (int p = 0; p < panels; ++p) {
            const int begin = item.count * p / panels, rows = item.count * (p + 1) / panels - begin;
            const int query = item.first + begin;
            const int64_t from = std::max(c.from, (first_seen(item, query) - c.base) / size_ * size_);
            const int64_t to = std::min(c.to, position(item, query + rows - 1) + 1 - c.base);
            if (from < to) c.panels[c.count++] = Panel{query, h * item.count + begin, rows, from, to};
        }
        score(c, s, panels > 1 || item.count > DIRECT_ROWS);
        for (int p = 0; p < c.count; ++p) weigh(item, c, c.panels[p], s, x);
        mix(c, s, x, panels > 1 || item.count > DIRECT_ROWS);
    }

    // scores[m][t] = query m . key t, for whole pairs of vectors of positions.
    void score(const Chunk& c, Scratch& s, bool packed) {
        const int64_t row = dim_ * D::A_BYTES;
        for (int64_t t = c.from / WIDTH * WIDTH; t < c.to; t += WIDTH) {
            const Run<T> run = keys(c, t);
            const Operand<T> direct{&run, 1, size_ * STEP, size_ * STEP};
            if (packed) pack<D>(direct, panel(s));
            for (int p = 0; p < c.count; ++p) {
                const Panel& q = c.panels[p];
                if (t >= q.to || t + WIDTH <= q.from) continue;
                const char* a = s.query + q.first * row;
                float* to = s.scores + q.first * CHUNK + t;
                if (packed) {
                    packed_product(q.rows, a, row, s, 0, dim_, to, CHUNK, nullptr);
                } else {
                    with_constant<DIRECT_ROWS>(q.rows, [&](auto n) {
                        product<D, decltype(n)::value>(a, row, direct, to, CHUNK, nullptr);
                    });
                }
            }
        }
    }

    // mixed[m] = mixed[m] * keep[m] + sum over positions of weight * value.
    void mix(const Chunk& c, Scratch& s, Softmax& x, bool packed) {
        Run<T> runs[CHUNK / 8 + 1];
        for (int64_t d = 0; d < dim_; d += WIDTH) {
            const Operand<T> direct{runs, values(c, d, s, runs), dim_ * STEP, WIDTH * STEP};
            if (packed) pack<D>(direct, panel(s));
            for (int p = 0; p < c.count; ++p) {
                const Panel& q = c.panels[p];
                const char* a = reinterpret_cast<const char*>(s.scores + q.first * CHUNK) + q.from * D::A_BYTES;
                float* to = x.mixed + q.first * mixed_row_ + d;
                if (packed) {
                    packed_product(q.rows, a, CHUNK * 4, s, q.from - c.from, q.to - q.from, to, mixed_row_,
                                   s.keep + q.first);
                } else {
                    with_constant<DIRECT_ROWS>(q.rows, [&](auto n) {
                        product<D, decltype(n)::value>(a, CHUNK * 4, direct, to, mixed_row_, s.keep + q.first);
                    });
                }
            }
        }
    }

    static typename P::T* panel(Scratch& s) { return reinterpret_cast<typename P::T*>(s.panel); }

    // The product with `terms` of the packed panel from `first` on.
    static void packed_product(int rows, const char* a, int64_t a_row, Scratch& s, int64_t first, int64_t terms,
                               float* out, int64_t out_row, const float* keep) {
        const typename P::T* from = panel(s) + first * WIDTH;
        const Run<typename P::T> run{from, from + W * P::STEP, from, (terms + P::STEP - 1) / P::STEP};
        const Operand<typename P::T> b{&run, 1, WIDTH * P::STEP, 0};
        with_constant<P::MAX_ROWS>(rows, [&](auto n) {
            product<P, decltype(n)::value>(a, a_row, b, out, out_row, keep);
        });
    }

    // K of the two vectors of positions from t on. The second may have no block: its scores are never used then.
    Run<T> keys(const Chunk& c, int64_t t) const {
        const int64_t first = std::max(t, c.from), second = t + W < c.to ? std::max(t + W, c.from) : first;
        const T* from = c.blocks[first / size_] + first % size_ * STEP;
        return {from, c.blocks[second / size_] + second % size_ * STEP, from + dim_ * size_, dim_ / STEP};
    }

    // V of the chunk's positions, two vectors of head_dim from d on. The second may not exist: nobody reads what comes
    // of it. An odd end leaves half a pair that nobody has written. That may hold NaN, so it is cleared.
    int64_t values(const Chunk& c, int64_t d, Scratch& s, Run<T>* runs) const {
        const int64_t second = d + W < dim_ ? W * STEP : 0;
        int64_t count = 0;
        for (int64_t t = c.from; t < c.to; t += size_) {
            const T* from = c.blocks[t / size_] + dim_ * size_ + d * STEP;
            runs[count++] = {from, from + second, c.ahead[t / size_] + d * size_, std::min(size_, c.to - t) / STEP};
        }
        if (c.to % STEP) {
            const T* from = c.blocks[c.to / size_] + dim_ * size_ + (c.to % size_ / STEP * dim_ + d) * STEP;
            T* to = reinterpret_cast<T*>(s.tail);
            for (int e = 0; e < W; ++e) {
                for (int v = 0; v < 2; ++v) {
                    to[(v * W + e) * STEP] = from[v * second + e * STEP];
                    for (int i = 1; i < STEP; ++i) to[(v * W + e) * STEP + i] = T{};
                }
            }
            runs[count++] = {to, to + W * STEP, to, 1};
        }
        return count;
    }

    // The scales of a vector of positions from t on, of K (part 0) or V (part 1).
    ROPEWAY_INLINE F scale(const Chunk& c, int64_t t, int part) const {
        return load<W>(scales(c.blocks[t / size_]) + part * size_ + t % size_);
    }

    // Turn a panel's scores into weights 2^(score - top), in place, in the form of operand A; 0 for what is not seen.
    // keep[m] says by how much the sums so far must shrink.
    void weigh(const Item& item, const Chunk& c, Panel p, Scratch& s, Softmax& x) {
        using I = typename Lanes<W>::I;
        alignas(64) float now[8];
        const auto before = load<8>(x.top + p.first);
        store<8>(now, before);
        for (int m = 0; m < p.rows; ++m) {
            float* row = s.scores + (p.first + m) * CHUNK;
            const int last = int(position(item, p.query + m) - c.base);
            const int low = int(first_seen(item, p.query + m) - c.base);
            if (SCALED || last < (p.to + W - 1) / W * W - 1 || low > p.from) {
                I lane;
                for (int i = 0; i < W; ++i) lane[i] = i;
                for (int t = int(p.from); t < p.to; t += W) {
                    F y = load<W>(row + t);
                    if constexpr (SCALED) y *= scale(c, t, 0);
                    store<W>(row + t, ((lane + t <= last) & (lane + t >= low)) ? y : splat<W>(-INFINITY));
                }
            }
            F top = splat<W>(now[m]);
            for (int64_t t = p.from; t < p.to; t += W) {
                const F y = load<W>(row + t) * log2_scale_;
                top = top > y ? top : y;
            }
            now[m] = maximum<W>(top);
        }
        const auto keep = exp2<8>(before - load<8>(now));
        store<8>(s.keep + p.first, keep);
        for (int m = 0; m < p.rows; ++m) {
            float* row = s.scores + (p.first + m) * CHUNK;
            F total{};
            for (int64_t t = p.from; t < p.to; t += W) {
                const F y = exp2<W>(load<W>(row + t) * log2_scale_ - now[m]);
                total += y;
                if constexpr (SCALED) {
                    D::store_a(reinterpret_cast<char*>(row), t, y * scale(c, t, 1));
                } else {
                    D::store_a(reinterpret_cast<char*>(row), t, y);
                }
            }
            x.top[p.first + m] = now[m];
            x.total[p.first + m] = x.total[p.first + m] * keep[m] + sum<W>(total);
        }
    }
};

template <template <int> class Kv>
int attention(const AttentionStep& step, const AttentionLayer& layer) {
    if (ROPEWAY_LANES == 16 && step.head_dim % 16 == 0 && step.block_size % 16 == 0) {
        return Attention<Kv<ROPEWAY_LANES>>(step, layer).run();
    }
    return Attention<Kv<8>>(step, layer).run();
}

}  // namespace ropeway

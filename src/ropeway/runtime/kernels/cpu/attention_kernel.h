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
#include <vector>

#include "attention_cache.h"
#include "attention_work.h"

namespace ropeway {

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
          mixed_row_((dim_ + 4 * W - 1) / (4 * W) * 4 * W),
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
        const bool packed = item.count > WORTH_PACKING;
        const int most = packed ? P::MAX_ROWS : DIRECT_ROWS;
        const int panels = (item.count + most - 1) / most;
        c.count = 0;
        for (int p = 0; p < panels; ++p) {
            const int begin = item.count * p / panels, rows = item.count * (p + 1) / panels - begin;
            const int query = item.first + begin;
            int64_t from = c.from, to = c.to;
            if (packed) {
                from = std::max(from, (first_seen(item, query) - c.base) / size_ * size_);
                to = std::min(to, position(item, query + rows - 1) + 1 - c.base);
            }
            if (from < to) c.panels[c.count++] = Panel{query, h * item.count + begin, rows, from, to};
        }
        if (packed) {
            score_packed(c, s);
        } else {
            each_directly(c, [&](auto rows, const Panel& p) { score<decltype(rows)::value>(c, p, s); });
        }
        for (int p = 0; p < c.count; ++p) weigh(item, c, c.panels[p], s, x);
        if (packed) {
            mix_packed(c, s, x);
        } else {
            each_directly(c, [&](auto rows, const Panel& p) { mix<decltype(rows)::value>(c, p, s, x); });
        }
    }

    template <class Fn>
    static void each_directly(const Chunk& c, Fn fn) {
        for (int p = 0; p < c.count; ++p) {
            with_constant<DIRECT_ROWS>(c.panels[p].rows, [&](auto rows) { fn(rows, c.panels[p]); });
        }
    }

    // scores[m][t] = query m . key t, for R queries and whole groups of vectors of positions.
    template <int R>
    void score(const Chunk& c, const Panel& p, Scratch& s) {
        constexpr int N = direct_vectors(R);
        const int64_t row = dim_ * D::A_BYTES;
        for (int64_t t = p.from / (N * W) * (N * W); t < p.to; t += N * W) {
            const Run<T, N> run = keys<N>(c, t);
            product<D, R, N>(s.query + p.first * row, row, {&run, 1, size_ * STEP, size_ * STEP},
                             s.scores + p.first * CHUNK + t, CHUNK, nullptr);
        }
    }

    // mixed[m] = mixed[m] * keep[m] + sum over positions of weight * value, for R queries.
    template <int R>
    void mix(const Chunk& c, const Panel& p, Scratch& s, Softmax& x) {
        constexpr int N = direct_vectors(R);
        const char* a = weights(p, s);
        Run<T, N> runs[CHUNK / 8 + 1];
        for (int64_t d = 0; d < dim_; d += N * W) {
            product<D, R, N>(a, CHUNK * 4, {runs, values<N>(c, d, s, runs), dim_ * STEP, N * W * STEP},
                             x.mixed + p.first * mixed_row_ + d, mixed_row_, s.keep + p.first);
        }
    }

    void score_packed(const Chunk& c, Scratch& s) {
        const int64_t row = dim_ * D::A_BYTES;
        for (int64_t t = c.from / WIDTH * WIDTH; t < c.to; t += WIDTH) {
            const Run<T, 2> run = keys<2>(c, t);
            pack<D>({&run, 1, size_ * STEP, size_ * STEP}, panel(s));
            for (int i = 0; i < c.count; ++i) {
                const Panel& p = c.panels[i];
                if (t >= p.to || t + WIDTH <= p.from) continue;
                with_constant<P::MAX_ROWS>(p.rows, [&](auto n) {
                    packed_product<P, decltype(n)::value>(s.query + p.first * row, row, panel(s), dim_,
                                                          s.scores + p.first * CHUNK + t, CHUNK, nullptr);
                });
            }
        }
    }

    void mix_packed(const Chunk& c, Scratch& s, Softmax& x) {
        Run<T, 2> runs[CHUNK / 8 + 1];
        for (int64_t d = 0; d < dim_; d += WIDTH) {
            pack<D>({runs, values<2>(c, d, s, runs), dim_ * STEP, WIDTH * STEP}, panel(s));
            for (int i = 0; i < c.count; ++i) {
                const Panel& p = c.panels[i];
                with_constant<P::MAX_ROWS>(p.rows, [&](auto n) {
                    packed_product<P, decltype(n)::value>(weights(p, s), CHUNK * 4,
                                                          panel(s) + (p.from - c.from) * WIDTH, p.to - p.from,
                                                          x.mixed + p.first * mixed_row_ + d, mixed_row_,
                                                          s.keep + p.first);
                });
            }
        }
    }

    static typename P::T* panel(Scratch& s) { return reinterpret_cast<typename P::T*>(s.panel); }

    static const char* weights(const Panel& p, const Scratch& s) {
        return reinterpret_cast<const char*>(s.scores + p.first * CHUNK) + p.from * D::A_BYTES;
    }

    // K of N vectors of positions from t on. Where there are no more, some other: its scores are never used.
    template <int N>
    Run<T, N> keys(const Chunk& c, int64_t t) const {
        Run<T, N> run;
        for (int v = 0; v < N; ++v) {
            const int64_t wanted = std::max(t + v * W, c.from), at = wanted < c.to ? wanted : std::max(t, c.from);
            run.at[v] = c.blocks[at / size_] + at % size_ * STEP;
            run.fetch[v] = run.at[v] + dim_ * size_;
        }
        run.steps = dim_ / STEP;
        return run;
    }

    // V of the chunk's positions, N vectors of head_dim from d on. Where there are no more, some other: nobody reads
    // what comes of it. An odd end leaves half a pair that nobody has written. That may hold NaN, so it is cleared.
    template <int N>
    int64_t values(const Chunk& c, int64_t d, Scratch& s, Run<T, N>* runs) const {
        int64_t offset[N], count = 0;
        for (int v = 0; v < N; ++v) offset[v] = (d + v * W < dim_ ? d + v * W : d) * STEP;
        for (int64_t t = c.from; t < c.to; t += size_) {
            Run<T, N>& run = runs[count++];
            for (int v = 0; v < N; ++v) {
                run.at[v] = c.blocks[t / size_] + dim_ * size_ + offset[v];
                run.fetch[v] = c.ahead[t / size_] + d * size_ + v * W * STEP;
            }
            run.steps = std::min(size_, c.to - t) / STEP;
        }
        if (c.to % STEP) {
            const T* from = c.blocks[c.to / size_] + dim_ * size_ + c.to % size_ / STEP * dim_ * STEP;
            T* to = reinterpret_cast<T*>(s.tail);
            Run<T, N>& run = runs[count++];
            for (int v = 0; v < N; ++v, to += W * STEP) {
                for (int e = 0; e < W * STEP; ++e) to[e] = e % STEP ? T{} : from[offset[v] + e];
                run.at[v] = run.fetch[v] = to;
            }
            run.steps = 1;
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

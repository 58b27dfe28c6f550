// Paged attention: one kernel for decode and for chunked prefill, reading K and V where the cache holds them.
//
// A block of the cache holds, for each layer and KV head, K then V. K is transposed, [head_dim / STEP][block][STEP],
// and V is [block / STEP][head_dim][STEP]: both products then run over whole vectors and no sum crosses the lanes. STEP
// is 2 for bfloat16, so that a pair fits one lane of a dot-product instruction, and 1 for float32.
//
// The query heads of a KV head and the tokens of a row are one list of queries, cut into tiles: grouped-query attention
// needs no copy of K or V, and decode is a prefill of one token. Softmax is online (Milakov and Gimelshein 2018; Dao et
// al. 2022) over chunks of 64 positions, restarted every SPLIT positions; the pieces are then merged in order
// (flash-decoding). Whether pieces run on one thread or on several changes nothing in the arithmetic, and all cuts are
// at absolute positions, so that a query's result depends on its position and its sequence alone.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "attention_work.h"
#include "vec.h"

namespace ropeway {

// Running softmax of a tile: maxima (in powers of two), sums, and weighted sums of V.
struct Softmax {
    float top[TILE], total[TILE];
    alignas(64) float mixed[TILE * MAX_DIM];
};

struct Scratch {
    const Item* upcoming;  // probably this thread's next work item
    alignas(64) char query[TILE * MAX_DIM * 4];
    alignas(64) float scores[TILE * CHUNK];
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
class Attention : Work {
    // `rows` queries: the list's from `query` on, the tile's from `first` on. Some of them see positions [from, to) of
    // the chunk; `from` is where a block begins.
    struct Panel {
        int query, first, rows;
        int64_t from, to;
    };

    using T = typename D::T;
    using F = typename D::F;
    static constexpr int64_t WORTH_THREADS = 1 << 18;  // multiply-adds: some ten microseconds
    static constexpr int W = D::LANES, STEP = D::STEP, PER_LINE = 64 / (W * 4);  // vectors in a cache line

    const int64_t dim_, size_, head_elements_, block_elements_;
    T* const kv_;
    const float log2_scale_;
    std::atomic<bool> damaged_{false};

   public:
    Attention(const AttentionStep& step, const AttentionLayer& layer)
        : Work(step, layer),
          dim_(step.head_dim),
          size_(step.block_size),
          head_elements_(2 * step.head_dim * step.block_size),
          block_elements_(step.layers * step.kv_heads * head_elements_),
          kv_(static_cast<T*>(layer.kv) + layer.layer * step.kv_heads * head_elements_),
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
        return kv_ + id * block_elements_ + item.kv_head * head_elements_;
    }

    void write_kv() {
        const int64_t heads = step_.kv_heads;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < step_.tokens * heads; ++i) {
            const int64_t t = i / heads, h = i % heads;
            const int64_t slot = step_.slots[t], offset = slot % size_;
            if (slot < 0) {
                damaged_ = true;
                continue;
            }
            const T* k = static_cast<const T*>(layer_.k) + t * layer_.k_stride + h * dim_;
            const T* v = static_cast<const T*>(layer_.v) + t * layer_.v_stride + h * dim_;
            T* const to = kv_ + slot / size_ * block_elements_ + h * head_elements_;
            T* const to_k = to + offset * STEP;
            T* const to_v = to + dim_ * size_ + offset / STEP * dim_ * STEP + offset % STEP;
            for (int64_t d = 0; d < dim_; d += STEP) {
                for (int s = 0; s < STEP; ++s) to_k[d * size_ + s] = k[d + s];
            }
            for (int64_t d = 0; d < dim_; ++d) to_v[d * STEP] = v[d];
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
        for (int m = 0; m < item.heads * item.count; ++m) {
            const T* from = static_cast<const T*>(layer_.q) + token(item, m) * layer_.q_stride + head(item, m) * dim_;
            char* to = s.query + m * dim_ * D::A_BYTES;
            for (int64_t d = 0; d < dim_; d += W) D::store_a(to, d, load<W>(from + d));
        }
    }

    void write_out(const Item& item, const Softmax& x) {
        for (int m = 0; m < item.heads * item.count; ++m) {
            T* to = static_cast<T*>(layer_.out) + (token(item, m) * step_.heads + head(item, m)) * dim_;
            const float inverse = 1.0f / x.total[m];
            for (int64_t d = 0; d < dim_; d += W) store<W>(to + d, load<W>(x.mixed + m * dim_ + d) * inverse);
        }
    }

    // Add a later piece. A piece in which a query sees nothing has total 0 and leaves the rest as it is, bit for bit.
    __attribute__((noinline)) void merge(const Item& item, Softmax& into, const Softmax& from) {
        for (int m = 0; m < item.heads * item.count; ++m) {
            const float top = into.top[m] > from.top[m] ? into.top[m] : from.top[m];
            const float keep = power(into.top[m] - top), add = power(from.top[m] - top);
            into.top[m] = top;
            into.total[m] = into.total[m] * keep + from.total[m] * add;
            float* x = into.mixed + m * dim_;
            const float* y = from.mixed + m * dim_;
            for (int64_t d = 0; d < dim_; d += W) store<W>(x + d, load<W>(x + d) * keep + load<W>(y + d) * add);
        }
    }

    static float power(float x) { return x == 0.0f ? 1.0f : exp2<8>(splat<8>(x))[0]; }

    // The softmax of one piece of SPLIT positions, from scratch.
    void attend(const Item& item, int64_t piece, Scratch& s, Softmax& x) {
        const int rows = item.heads * item.count;
        std::fill_n(x.top, rows, FLOOR);
        std::fill_n(x.total, rows, 0.0f);
        std::fill_n(x.mixed, rows * dim_, 0.0f);
        const int64_t low = first_seen(item, item.first), high = position(item, item.first + item.count - 1) + 1;
        const int64_t end = std::min(high, (piece + 1) * SPLIT);
        const T *blocks[CHUNK / 8], *following[CHUNK / 8], *ahead[CHUNK / 8];
        for (int64_t base = piece * SPLIT; base < end; base += CHUNK) {
            if (base + CHUNK <= low) continue;
            const int64_t first = (std::max(low, base) - base) / size_, last = std::min(end, base + CHUNK);
            for (int64_t b = first; base + b * size_ < last; ++b) blocks[b] = block(item, base + b * size_);
            look_ahead(item, base, *s.upcoming, following);
            for (int h = 0; h < item.heads; ++h) {
                for (int64_t b = first; base + b * size_ < last; ++b) {
                    ahead[b] = h + 1 < item.heads ? blocks[b] + head_elements_ : following[b];
                }
                chunk(item, h, base, std::max(low, base), last, blocks, ahead, s, x);
                for (int64_t b = first; base + b * size_ < last; ++b) blocks[b] += head_elements_;
            }
        }
    }

    // While a chunk is computed the processor is asked for what comes next, a line for a line read: scores() asks for
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

    // Head h of a tile against positions [low, high) of the 64 from `base` on; no query of the tile sees the others.
    void chunk(const Item& item, int h, int64_t base, int64_t low, int64_t high, const T* const* blocks,
               const T* const* ahead, Scratch& s, Softmax& x) {
        const int panels = (item.count + D::MAX_ROWS - 1) / D::MAX_ROWS;
        float keep[TILE];
        const auto each_panel = [&](auto fn) ROPEWAY_INLINE_LAMBDA {
            for (int p = 0; p < panels; ++p) {
                const int begin = item.count * p / panels, rows = item.count * (p + 1) / panels - begin;
                const int query = item.first + begin;
                const int64_t from = std::max(low, first_seen(item, query)) - base;
                const int64_t to = std::min(high, position(item, query + rows - 1) + 1) - base;
                if (from < to) fn(Panel{query, h * item.count + begin, rows, from / size_ * size_, to});
            }
        };
        each_panel([&](Panel p) ROPEWAY_INLINE_LAMBDA {
            with_constant<D::MAX_ROWS>(p.rows, [&](auto n) ROPEWAY_INLINE_LAMBDA {
                scores<decltype(n)::value>(p, blocks, s);
            });
        });
        each_panel([&](Panel p) ROPEWAY_INLINE_LAMBDA {
            for (int m = 0; m < p.rows; ++m) keep[p.first + m] = weigh(item, p.query + m, p.first + m, base, p, s, x);
        });
        each_panel([&](Panel p) ROPEWAY_INLINE_LAMBDA {
            with_constant<D::MAX_ROWS>(p.rows, [&](auto n) ROPEWAY_INLINE_LAMBDA {
                mix<decltype(n)::value>(p, blocks, ahead, keep + p.first, s, x);
            });
        });
    }

    // scores[m][t] = query m . key t, for R queries and all vectors of positions in the chunk.
    template <int R>
    ROPEWAY_INLINE void scores(Panel p, const T* const* blocks, Scratch& s) {
        constexpr int N = vectors_for<D>(R);
        const int end = int((p.to + W - 1) / W);
        int j = int(p.from / W);
        for (; j + N <= end; j += N) scores_of<R, N>(p.first, blocks, j, s);
        for (; j < end; ++j) scores_of<R, 1>(p.first, blocks, j, s);
    }

    template <int R, int N>
    ROPEWAY_INLINE void scores_of(int m0, const T* const* blocks, int vector, Scratch& s) {
        const int64_t row_bytes = dim_ * D::A_BYTES, steps = dim_ / STEP, stride = size_ * STEP;
        const char* a = s.query + m0 * row_bytes;
        const int64_t to_value = dim_ * size_;
        const T* b[N];
        for (int v = 0; v < N; ++v) b[v] = blocks[(vector + v) * W / size_] + (vector + v) * W % size_ * STEP;
        F acc[R][N] = {};
        for (int64_t i = 0; i < steps; ++i) {
            typename D::B y[N];
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) y[v] = D::load_b(b[v] + i * stride);
            ROPEWAY_UNROLL for (int v = 0; v < N; v += PER_LINE) __builtin_prefetch(b[v] + i * stride + to_value);
            ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                const typename D::A q = D::load_a(a + m * row_bytes, i);
                ROPEWAY_UNROLL for (int v = 0; v < N; ++v) D::step(acc[m][v], y[v], q);
            }
        }
        ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
            float* to = s.scores + (m0 + m) * CHUNK + vector * W;
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) store<W>(to + v * W, acc[m][v]);
        }
    }

    // Turn a query's scores into weights 2^(score - top), in place and in the form of operand A; unseen positions get
    // 0. Returns by how much the sums so far must shrink.
    ROPEWAY_INLINE float weigh(const Item& item, int query, int m, int64_t base, Panel p, Scratch& s, Softmax& x) {
        using I = typename Lanes<W>::I;
        const int first = int(p.from / W), end = int((p.to + W - 1) / W);
        const int last = int(std::min<int64_t>(position(item, query) - base, CHUNK));
        const int low = int(std::max<int64_t>(first_seen(item, query) - base, 0));
        const bool masked = last < end * W - 1 || low > first * W;
        float* row = s.scores + m * CHUNK;
        I lane;
        for (int i = 0; i < W; ++i) lane[i] = i;
        F top = splat<W>(FLOOR);
        for (int j = first; j < end; ++j) {
            F y = load<W>(row + j * W) * log2_scale_;
            if (masked) y = ((lane + j * W <= last) & (lane + j * W >= low)) ? y : splat<W>(FLOOR);
            store<W>(row + j * W, y);
            top = top > y ? top : y;
        }
        const float before = x.top[m], highest = maximum<W>(top), now = before > highest ? before : highest;
        F total{};
        for (int j = first; j < end; ++j) {
            F y = exp2<W>(load<W>(row + j * W) - now);
            if (masked) y = ((lane + j * W <= last) & (lane + j * W >= low)) ? y : F{};
            D::store_a(reinterpret_cast<char*>(row), j * W, y);
            total += y;
        }
        const float keep = power(before - now);
        x.top[m] = now;
        x.total[m] = x.total[m] * keep + sum<W>(total);
        return keep;
    }

    // mixed[m] = mixed[m] * keep + sum over positions of weight * value, for R queries and all of head_dim.
    template <int R>
    ROPEWAY_INLINE void mix(Panel p, const T* const* blocks, const T* const* ahead, const float* keep, Scratch& s,
                            Softmax& x) {
        constexpr int N = vectors_for<D>(R);
        int64_t d = 0;
        for (; d + N * W <= dim_; d += N * W) mix_columns<R, N>(p, blocks, ahead, d, keep, s, x);
        for (; d < dim_; d += W) mix_columns<R, 1>(p, blocks, ahead, d, keep, s, x);
    }

    template <int R, int N>
    ROPEWAY_INLINE void mix_columns(Panel panel, const T* const* blocks, const T* const* ahead, int64_t d,
                                    const float* keep, Scratch& s, Softmax& x) {
        const int m0 = panel.first;
        const int64_t from = panel.from, to = panel.to;
        const char* a = reinterpret_cast<const char*>(s.scores + m0 * CHUNK);
        float* out = x.mixed + m0 * dim_ + d;
        F acc[R][N];
        ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) acc[m][v] = load<W>(out + m * dim_ + v * W) * keep[m];
        }
        const auto add = [&](const T* p, int64_t i, auto whole) ROPEWAY_INLINE_LAMBDA {
            typename D::B y[N];
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) {
                y[v] = D::load_b(p + v * W * STEP);
                if constexpr (!decltype(whole)::value) y[v] = D::first_term(y[v]);
            }
            ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                const typename D::A w = D::load_a(a + m * CHUNK * 4, i);
                ROPEWAY_UNROLL for (int v = 0; v < N; ++v) D::step(acc[m][v], y[v], w);
            }
        };
        for (int64_t start = from; start < to; start += size_) {
            const T* p = blocks[start / size_] + dim_ * size_ + d * STEP;
            const T* fetch = ahead[start / size_] + d * size_;
            const int64_t end = std::min(start + size_, to) / STEP;
            for (int64_t t = start / STEP; t < end; ++t, p += dim_ * STEP, fetch += N * W * STEP) {
                for (int v = 0; v < N; v += PER_LINE) __builtin_prefetch(fetch + v * W * STEP);
                add(p, t, std::true_type{});
            }
        }
        // An odd end leaves half a pair that nobody has written. It may hold NaN: it is cleared, not weighted with 0.
        if (to % STEP) {
            const T* const values = blocks[(to - 1) / size_] + dim_ * size_;
            add(values + (to % size_ / STEP * dim_ + d) * STEP, to / STEP, std::false_type{});
        }
        ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) store<W>(out + m * dim_ + v * W, acc[m][v]);
        }
    }
};

template <class T>
int attention(const AttentionStep& step, const AttentionLayer& layer) {
    if (ROPEWAY_LANES == 16 && step.head_dim % 16 == 0 && step.block_size % 16 == 0) {
        return Attention<typename DotOf<T, ROPEWAY_LANES>::type>(step, layer).run();
    }
    return Attention<typename DotOf<T, 8>::type>(step, layer).run();
}

}  // namespace ropeway

int ropeway_attention(const AttentionStep* step, const AttentionLayer* layer) {
    using namespace ropeway;
    if (step->head_dim > MAX_DIM || step->head_dim % 8 || step->block_size % 8 || CHUNK % step->block_size) return 2;
    try {
        return step->type == 0 ? attention<float>(*step, *layer) : attention<bf16>(*step, *layer);
    } catch (const std::bad_alloc&) {
        return 3;
    }
}

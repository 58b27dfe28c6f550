// Choose a token for each row of logits, and say how likely tokens are, without sorting the vocabulary.
//
// A row is read once for the maxima of its blocks, and where no top_k or min_p makes most weights needless, also for those,
// relative to a high logit that a sample finds. top_k and top_p are thresholds on the logit, found by selection (Floyd and
// Rivest 1975, here also by weight instead of count): a sample brackets the threshold, one pass sums what is above the
// bracket and copies what is inside, and so on with that. The draw is an inverse CDF in the order of ids.

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "sample_scan.h"
#include "sample_select.h"
#include "vec.h"

namespace {

constexpr int64_t ALL = std::numeric_limits<int64_t>::max();
constexpr float OUTREACH = 60.0f;  // powers of two by which a row's maximum may exceed it, so that sums stay finite
constexpr int64_t NOT_FINITE = -1, NOTHING_LEFT = -2;

}  // namespace

// What a row asks for; packed by runtime/sampler.py. A list is its address and its length.
struct SampleRow {
    double temperature;  // 0: the highest logit, the lowest id among equals
    double top_p, min_p;
    double repetition, presence, frequency;
    int64_t top_k;  // 0: no limit
    const int64_t* bias_ids;
    const float* bias;
    int64_t biases;
    const int64_t* banned;
    int64_t bans;
    const int64_t* seen;  // the different tokens of prompt and output
    int64_t seens;
    const int64_t* output;  // the different tokens of the output, and how often each occurs
    const int64_t* counts;
    int64_t outputs;
    const uint32_t* mask;  // token i may be chosen if bit i % 32 of word i / 32 is set; null: all may
};

namespace {

// A row, the maxima of its blocks, and which of its tokens may be drawn: those above `at`, and the first `ties` of those
// equal to it.
struct Row {
    const float* x;
    int64_t vocab;
    const float* maxima;
    float top;
    const float* weights = nullptr;  // of all logits, if they are written down
    float at = -INF;
    int64_t ties = ALL;

    int64_t blocks() const { return (vocab + BLOCK - 1) / BLOCK; }
    int64_t size(int64_t block) const { return std::min(BLOCK, vocab - block * BLOCK); }
};

// The first token of the highest logit.
int64_t argmax(const Row& row) {
    int64_t block = 0;
    while (row.maxima[block] != row.top) ++block;
    int64_t id = block * BLOCK;
    while (row.x[id] != row.top) ++id;
    return id;
}

// A thread's memory for one row: the sums and maxima of its blocks, its weights, and two pools for selections.
struct Scratch {
    double* upto;
    float *maxima, *weights;
    Stored::Pool pool, other;

    Scratch(float* start, int64_t vocab) {
        const int64_t blocks = (vocab + BLOCK - 1) / BLOCK, n = vocab + W;
        upto = reinterpret_cast<double*>(start);
        maxima = reinterpret_cast<float*>(upto + blocks);
        weights = maxima + blocks;
        pool = {weights + n, weights + 2 * n};
        other = {weights + 3 * n, weights + 4 * n};
    }
    static int64_t size(int64_t vocab) { return (3 * ((vocab + BLOCK - 1) / BLOCK) + 5 * (vocab + W) + 1) / 2 * 2; }
};

// `select` among values whose weights follow from them.
template <class Weight>
Cut select_by(const float* x, int64_t n, double share, const Weight& weight, const Scratch& room) {
    using Values = Computed<Weight>;
    return select(Values{x, weight}, n, share, typename Values::Pool{room.pool.x}, typename Values::Pool{room.other.x});
}

// Copy the row's logits from `lowest` upwards to `out`; returns their number.
int64_t gather(const Row& row, float lowest, float* out) {
    const Count count;
    int64_t n = 0;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (row.maxima[b] < lowest) continue;
        n += copy(Computed<Count>{row.x + b * BLOCK, count}, row.size(b), lowest, INF, {out + n});
    }
    return n;
}

void keep_top_k(Row& row, int64_t k, const Scratch& room) {
    float lowest = row.at;
    // Each of the k highest blocks has a token at least as high as the lowest of their maxima.
    if (k < row.blocks()) {
        const double share = (double(k) - 0.5) / double(row.blocks());
        lowest = std::max(lowest, select_by(row.maxima, row.blocks(), share, Count(), room).at);
    }
    const int64_t n = gather(row, lowest, room.other.x);
    row.at = lowest;
    if (n <= k) return;
    const Cut cut = select_by(room.other.x, n, (double(k) - 0.5) / double(n), Count(), room);
    row.at = cut.at;
    row.ties = int64_t(std::ceil(cut.missing));
}

// Where the weights of a row, from the highest logit downwards, reach `share` of them all. What lies below is many small
// weights, of which a sample of the blocks tells well how many: that brackets the threshold within `width` of the logit.
Cut nucleus(const Row& row, double share, double total, float width, const Scratch& room) {
    constexpr int64_t STRIDE = 16;
    const Stored all{row.x, row.weights};
    int64_t n = 0;
    double sampled = 0;
    for (int64_t b = 0; b < row.blocks(); b += STRIDE) {
        const int64_t first = b * BLOCK, size = row.size(b);
        std::copy_n(row.x + first, size, room.other.x + n);
        std::copy_n(row.weights + first, size, room.other.w + n);
        sampled += room.upto[b] - (b > 0 ? room.upto[b - 1] : 0);
        n += size;
    }
    const double below = (1 - share) * total * double(n) / double(row.vocab);
    if (row.blocks() > STRIDE && below < sampled) {
        const Stored sample{room.other.x, room.other.w};
        const float guess = select(sample, n, 1 - below / sampled, room.pool, room.other).at;
        const Parts parts = partition(all, row.vocab, guess - width, guess + width, room.pool);
        const double missing = share * (parts.above + parts.inside + parts.below) - parts.above;
        if (0 < missing && missing <= parts.inside) {
            return select(all.in(room.pool), parts.count, missing / parts.inside, room.other, room.pool);
        }
    }
    return select(all, row.vocab, share, room.pool, room.other);
}

void keep_top_p(Row& row, double p, const Mass& mass, const Scratch& room) {
    p *= 1 - 1e-6;  // rounding must not ask for a token more where equal ones make up p exactly
    Cut cut;
    if (row.weights) {
        cut = nucleus(row, p, room.upto[row.blocks() - 1], 0.15f * float(LOG2_E) / mass.scale, room);
    } else {
        float* const kept = room.other.x;
        int64_t n = gather(row, row.ties == ALL ? row.at : std::nextafter(row.at, INF), kept);
        if (row.ties != ALL) {
            std::fill_n(kept + n, row.ties, row.at);
            n += row.ties;
        }
        cut = select_by(kept, n, p, mass, room);
    }
    const double each = mass(splat<W>(cut.at))[0];
    const int64_t ties = std::max<int64_t>(1, int64_t(std::ceil(cut.missing / each)));
    row.ties = cut.at == row.at ? std::min(row.ties, ties) : ties;
    row.at = cut.at;
}

// The id after the last token that is drawn although it only equals row.at.
int64_t end_of_ties(const Row& row) {
    if (row.ties == ALL) return row.vocab;
    int64_t left = row.ties;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (row.maxima[b] < row.at) continue;
        for (int64_t i = b * BLOCK; i < b * BLOCK + row.size(b); ++i) {
            left -= row.x[i] == row.at;
            if (left == 0) return i + 1;
        }
    }
    return row.vocab;
}

// The row's threshold by id: `at` before `ties_end`, from there on the next float32 above it.
struct Bounds {
    float at, above;
    int64_t ties_end;
};

// Sum the weights of those of n values that are not below `lowest`; store each in `weights`, if given, or 0.
template <class Values>
float weigh(const Values& values, int64_t n, float lowest, float* weights) {
    F total{};
    for (int64_t i = 0; i < n; i += W) {
        const F y = load_upto(values.x + i, n - i);
        const F w = only(y >= lowest, values.from(i).weights(y, n - i));
        if (weights) store<W>(weights + i, w);
        total += w;
    }
    return sum<W>(total);
}

// The same of a block's tokens that may be drawn. `weights` has room for BLOCK + W.
template <class Values>
float weigh_block(const Values& values, int64_t n, int64_t equal, const Bounds& bounds, float* weights) {
    float total = equal > 0 ? weigh(values, equal, bounds.at, weights) : 0;
    if (equal < n) total += weigh(values.from(equal), n - equal, bounds.above, weights ? weights + equal : nullptr);
    return total;
}

float weigh_block(const Row& row, int64_t block, const Bounds& bounds, const Mass& mass, float* weights) {
    const int64_t first = block * BLOCK, n = row.size(block), equal = std::clamp<int64_t>(bounds.ties_end - first, 0, n);
    const float* x = row.x + first;
    if (row.weights) return weigh_block(Stored{x, row.weights + first}, n, equal, bounds, weights);
    return weigh_block(Computed<Mass>{x, mass}, n, equal, bounds, weights);
}

// Draw by the sums of the blocks up to each one's end, which are in `upto` already if all tokens may be drawn.
int64_t draw(const Row& row, const Mass& mass, double noise, double* upto, bool summed) {
    const Bounds bounds{row.at, std::nextafter(row.at, INF), end_of_ties(row)};
    const int64_t blocks = row.blocks();
    if (!summed) {
        double total = 0;
        for (int64_t b = 0; b < blocks; ++b) {
            if (row.maxima[b] >= row.at) total += double(weigh_block(row, b, bounds, mass, nullptr));
            upto[b] = total;
        }
    }
    const double total = upto[blocks - 1], target = noise * total;
    int64_t b = std::upper_bound(upto, upto + blocks, target) - upto;
    if (b == blocks) b = std::lower_bound(upto, upto + blocks, total) - upto;  // the last with any weight
    float weights[BLOCK + W];
    weigh_block(row, b, bounds, mass, weights);
    double sum = b > 0 ? upto[b - 1] : 0;
    int64_t last = 0;
    for (int64_t i = 0; i < row.size(b); ++i) {
        if (weights[i] == 0) continue;
        last = i;
        sum += double(weights[i]);
        if (sum > target) break;
    }
    return b * BLOCK + last;
}

// Change the logits as the row asks, in the order of its fields. Returns false if a logit that it replaces is NaN.
bool adjust(const SampleRow& wish, float* x) {
    for (int64_t i = 0; i < wish.biases; ++i) x[wish.bias_ids[i]] += wish.bias[i];
    bool sound = true;
    for (int64_t i = 0; i < wish.bans; ++i) {
        float& logit = x[wish.banned[i]];
        sound &= logit == logit;
        logit = -INF;
    }
    const float factor = float(wish.repetition), frequency = float(wish.frequency), presence = float(wish.presence);
    for (int64_t i = 0; i < wish.seens; ++i) {
        float& logit = x[wish.seen[i]];
        logit = logit > 0 ? logit / factor : logit * factor;
    }
    for (int64_t i = 0; i < wish.outputs; ++i) x[wish.output[i]] -= frequency * float(wish.counts[i]) + presence;
    return sound;
}

// Ban what the mask leaves out. Returns false if a logit is NaN.
bool keep_allowed(const uint32_t* mask, float* x, int64_t vocab) {
    I invalid{}, lane{};
    for (int i = 0; i < W; ++i) lane[i] = 1 << i;
    int64_t begin = 0;
    for (; begin + 32 <= vocab; begin += 32) {
        const uint32_t word = mask[begin / 32];
        for (int c = 0; c < 32; c += W) {
            const F y = load<W>(x + begin + c);
            invalid |= y != y;
            const I kept = ((I{} + int32_t(word >> c)) & lane) != 0;
            store<W>(x + begin + c, kept ? y : splat<W>(-INF));
        }
    }
    for (int64_t i = begin; i < vocab; ++i) {
        invalid[0] |= -(x[i] != x[i]);
        if (!(mask[i / 32] >> i % 32 & 1)) x[i] = -INF;
    }
    for (int i = 0; i < W; ++i) {
        if (invalid[i]) return false;
    }
    return true;
}

int64_t sample_row(float* x, int64_t vocab, const SampleRow& wish, double noise, float* start) {
    const Scratch room(start, vocab);
    Row row{x, vocab, room.maxima, 0};
    const bool adjusted = wish.biases || wish.bans || wish.seens || wish.outputs || wish.mask;
    const bool few = (0 < wish.top_k && wish.top_k < vocab) || wish.min_p > 0, nucleus = wish.top_p < 1;
    bool sound = adjust(wish, x);
    if (wish.mask) sound &= keep_allowed(wish.mask, x, vocab);
    const bool all = wish.temperature != 0 && !few;  // whether every weight is needed
    Mass mass(all ? high_one(x, vocab) : INF, wish.temperature);
    const auto weighed = [&] {
        if (nucleus) return scan(x, vocab, room.maxima, &row.top, Weigher<true>{mass, room.upto, room.weights});
        return scan(x, vocab, room.maxima, &row.top, Weigher<false>{mass, room.upto, nullptr});
    };
    bool done = std::isfinite(mass.top);
    sound &= done ? weighed() : scan(x, vocab, room.maxima, &row.top, Nothing());
    if (!sound || row.top == INF) return NOT_FINITE;
    if (row.top == -INF) return adjusted ? NOTHING_LEFT : NOT_FINITE;
    if (wish.temperature == 0) return argmax(row);
    if (!done || (row.top - mass.top) * mass.scale > OUTREACH) {
        mass = Mass(row.top, wish.temperature);
        if (all) weighed();
    }
    if (all && nucleus) row.weights = room.weights;
    if (wish.min_p > 0) row.at = float(double(row.top) + wish.temperature * std::log(wish.min_p));
    if (0 < wish.top_k && wish.top_k < vocab) keep_top_k(row, wish.top_k, room);
    if (nucleus) keep_top_p(row, wish.top_p, mass, room);
    return draw(row, mass, noise, room.upto, all && !nucleus);
}

// How many tokens come before `token` by their logits, the lower id first among equals; 1 for none.
int64_t rank_of(const Row& row, int64_t token) {
    const float own = row.x[token];
    int64_t rank = 1;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (row.maxima[b] < own) continue;
        const float* x = row.x + b * BLOCK;
        const int64_t n = row.size(b), before = std::clamp<int64_t>(token - b * BLOCK, 0, n);
        for (int64_t i = 0; i < before; ++i) rank += x[i] >= own;
        for (int64_t i = before; i < n; ++i) rank += x[i] > own;
    }
    return rank;
}

// The ids of the `count` highest logits, best first, and the logits. `kept` has room for `count`.
void likeliest(const Row& row, int64_t count, int64_t* ids, float* kept) {
    int64_t n = 0;
    for (int64_t b = 0; b < row.blocks() && count > 0; ++b) {
        if (n == count && row.maxima[b] <= kept[n - 1]) continue;
        for (int64_t i = b * BLOCK; i < b * BLOCK + row.size(b); ++i) {
            const float x = row.x[i];
            if (n == count && x <= kept[n - 1]) continue;
            int64_t at = n < count ? n++ : n - 1;
            for (; at > 0 && kept[at - 1] < x; --at) {
                kept[at] = kept[at - 1];
                ids[at] = ids[at - 1];
            }
            kept[at] = x;
            ids[at] = i;
        }
    }
}

void measure_row(const float* x, int64_t vocab, int64_t token, int64_t count, int64_t* ids, double* values,
                 float* scratch) {
    Row row{x, vocab, scratch, 0};
    std::fill_n(ids, 1 + count, 0);
    std::fill_n(values, 1 + count, 0.0);
    if (!scan(x, vocab, scratch, &row.top, Nothing()) || !std::isfinite(row.top)) return;
    const Mass mass(row.top, 1.0);
    double total = 0;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        total += double(weigh(Computed<Mass>{x + b * BLOCK, mass}, row.size(b), -INF, nullptr));
    }
    const double base = double(row.top) + std::log(total);
    float* const kept = scratch + row.blocks();
    likeliest(row, count, ids + 1, kept);
    ids[0] = rank_of(row, token);
    values[0] = double(x[token]) - base;
    for (int64_t i = 0; i < count; ++i) values[1 + i] = double(kept[i]) - base;
}

}  // namespace

// Floats that each thread needs as scratch for rows of this many logits.
ROPEWAY_EXPORT int64_t ropeway_sample_scratch(int64_t vocab) {
    return Scratch::size(vocab);
}

// Choose a token for each of `rows` rows of `logits` (rows, vocab), which may be changed. `noise` has a number in [0, 1)
// for each row. A token is -1 if a logit is NaN or infinite or none is finite, -2 if the row's own wishes leave none.
ROPEWAY_EXPORT int ropeway_sample(float* logits, int64_t rows, int64_t vocab, const SampleRow* wishes,
                                  const double* noise, int64_t* tokens, float* scratch, int64_t threads) {
    const int64_t each = ropeway_sample_scratch(vocab);
#pragma omp parallel for num_threads(int(std::min(threads, rows))) schedule(dynamic) if (rows > 1)
    for (int64_t r = 0; r < rows; ++r) {
        tokens[r] = sample_row(logits + r * vocab, vocab, wishes[r], noise[r], scratch + omp_get_thread_num() * each);
    }
    return 0;
}

// For each of `rows` rows of `logits` (rows, vocab) the rank of its token, then the ids of the `count` likeliest; and the
// natural logarithms of their probabilities. `ids` and `values` are (rows, 1 + count). Rank 0: a logit is NaN or infinite,
// or none is finite. `scratch` is as for ropeway_sample; `count` is at most `vocab`.
ROPEWAY_EXPORT int ropeway_logprobs(const float* logits, int64_t rows, int64_t vocab, const int64_t* tokens,
                                    int64_t count, int64_t* ids, double* values, float* scratch, int64_t threads) {
    const int64_t each = ropeway_sample_scratch(vocab);
#pragma omp parallel for num_threads(int(std::max<int64_t>(1, std::min(threads, rows)))) schedule(dynamic) if (rows > 1)
    for (int64_t r = 0; r < rows; ++r) {
        measure_row(logits + r * vocab, vocab, tokens[r], count, ids + r * (1 + count), values + r * (1 + count),
                    scratch + omp_get_thread_num() * each);
    }
    return 0;
}

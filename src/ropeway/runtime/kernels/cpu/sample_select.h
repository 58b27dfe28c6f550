// Selection without sorting: where the weights of values, from the highest downwards, reach a share of them all (Floyd and
// Rivest 1975, here also by weight instead of count). For sample.cpp alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using namespace ropeway;

constexpr int W = ROPEWAY_LANES;
using F = Lanes<W>::F;
using I = Lanes<W>::I;
constexpr int64_t SPAN = 512;  // values that are summed in float32 before the sum goes on in float64
constexpr int64_t FEW = 64;    // values among which every one is tried as the threshold
constexpr float INF = std::numeric_limits<float>::infinity();

// Vectors of x[0, n); the last is filled up with NaN, which no comparison lets pass.
ROPEWAY_INLINE F load_upto(const float* x, int64_t n) {
    if (n >= W) return load<W>(x);
    float padded[W];
    for (int i = 0; i < W; ++i) padded[i] = i < n ? x[i] : NAN;
    return load<W>(padded);
}

ROPEWAY_INLINE F only(I mask, F x) { return bits_as<F>(I(mask & bits_as<I>(x))); }

#if defined(__AVX2__)
// For each set of lanes, their numbers side by side.
struct CompressTable {
    alignas(64) uint8_t lane[256][8] = {};
    constexpr CompressTable() {
        for (int mask = 0; mask < 256; ++mask) {
            int n = 0;
            for (int i = 0; i < 8; ++i) {
                if (mask >> i & 1) lane[mask][n++] = uint8_t(i);
            }
        }
    }
};
constexpr CompressTable COMPRESS;
#endif

// Write the lanes of x that `keep` names to `out`, side by side, and return their number. May write W floats.
ROPEWAY_INLINE int compress(F x, I keep, float* out) {
#if defined(__AVX512F__) && ROPEWAY_LANES == 16
    const __mmask16 mask = _mm512_test_epi32_mask(bits_as<__m512i>(keep), bits_as<__m512i>(keep));
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, bits_as<__m512>(x)));
    return __builtin_popcount(mask);
#elif defined(__AVX2__) && ROPEWAY_LANES == 8
    const int mask = _mm256_movemask_ps(bits_as<__m256>(keep));
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(COMPRESS.lane[mask]));
    _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(bits_as<__m256>(x), _mm256_cvtepu8_epi32(bytes)));
    return __builtin_popcount(unsigned(mask));
#else
    int n = 0;
    for (int i = 0; i < W; ++i) {
        out[n] = x[i];
        n += keep[i] & 1;
    }
    return n;
#endif
}

ROPEWAY_INLINE F at_least(F x, float lowest) {
#if defined(__AVX512F__) && ROPEWAY_LANES == 16
    return bits_as<F>(_mm512_max_ps(bits_as<__m512>(x), _mm512_set1_ps(lowest)));
#elif defined(__AVX2__) && ROPEWAY_LANES == 8
    return bits_as<F>(_mm256_max_ps(bits_as<__m256>(x), _mm256_set1_ps(lowest)));
#else
    return x > lowest ? x : splat<W>(lowest);
#endif
}

// exp((x - top) / temperature) for x up to `top`, relative error 2e-7; 0 below 2^-126, and for NaN.
struct Mass {
    float top, scale;

    Mass(float t, double temperature) : top(t), scale(float(LOG2_E / temperature)) {}

    // 2^y as a polynomial of degree 5 on [-1/2, 1/2] times a power of two. The rounded number n is in the low bits of
    // `shifted` as n + 127, ready to be an exponent, where 0 stands for the number 0.
    ROPEWAY_INLINE F operator()(F x) const {
        constexpr float MAGIC = 12582912.0f + 127.0f;
        const F y = at_least((x - top) * scale, -127.0f);
        const F shifted = y + MAGIC, f = y - (shifted - MAGIC);
        F p = f * 1.33909e-3f + 9.67603e-3f;
        p = p * f + 5.550357e-2f;
        p = p * f + 2.4022107e-1f;
        p = p * f + 6.9314719e-1f;
        p = p * f + 1.00000008f;
        return p * bits_as<F>(bits_as<I>(shifted) << 23);
    }
};

struct Count {
    ROPEWAY_INLINE F operator()(F) const { return splat<W>(1.0f); }
};

// Values whose weights follow from them: `weight` says how.
template <class Weight>
struct Computed {
    const float* x;
    Weight weight;

    ROPEWAY_INLINE Computed from(int64_t i) const { return {x + i, weight}; }
    ROPEWAY_INLINE F weights(F y, int64_t) const { return weight(y); }
    ROPEWAY_INLINE float weight_of(float y, int64_t) const { return weight(splat<W>(y))[0]; }

    struct Pool {
        float* x;
        ROPEWAY_INLINE int put(F y, F, I keep, int64_t at) const { return compress(y, keep, x + at); }
    };
    Computed in(Pool pool) const { return {pool.x, weight}; }
};

// Values beside which their weights are written down.
struct Stored {
    const float *x, *w;

    ROPEWAY_INLINE Stored from(int64_t i) const { return {x + i, w + i}; }
    ROPEWAY_INLINE F weights(F, int64_t n) const { return load_upto(w, n); }
    ROPEWAY_INLINE float weight_of(float, int64_t i) const { return w[i]; }

    struct Pool {
        float *x, *w;
        ROPEWAY_INLINE int put(F y, F weight, I keep, int64_t at) const {
            compress(weight, keep, w + at);
            return compress(y, keep, x + at);
        }
    };
    Stored in(Pool pool) const { return {pool.x, pool.w}; }
};

struct Parts {
    double above = 0, inside = 0, below = 0;
    int64_t count = 0;
};

// Weigh the first n values above `high`, from `low` to `high`, and below. What is inside goes to `out`, which has room for
// n + W.
template <class Values>
Parts partition(const Values& values, int64_t n, float low, float high, const typename Values::Pool& out) {
    Parts parts;
    for (int64_t begin = 0; begin < n; begin += SPAN) {
        F above{}, inside{}, below{};
        const int64_t end = std::min(begin + SPAN, n);
        for (int64_t i = begin; i < end; i += W) {
            const F y = load_upto(values.x + i, end - i);
            const F w = values.from(i).weights(y, end - i);
            const I within = (y >= low) & (y <= high);
            above += only(y > high, w);
            below += only(y < low, w);
            inside += only(within, w);
            parts.count += out.put(y, w, within, parts.count);
        }
        parts.above += sum<W>(above);
        parts.inside += sum<W>(inside);
        parts.below += sum<W>(below);
    }
    return parts;
}

// Copy what is inside, and nothing else.
template <class Values>
int64_t copy(const Values& values, int64_t n, float low, float high, const typename Values::Pool& out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W) {
        const F y = load_upto(values.x + i, n - i);
        count += out.put(y, values.from(i).weights(y, n - i), (y >= low) & (y <= high), count);
    }
    return count;
}

// The threshold: values above `at` do not reach the wanted weight, and `missing` of it must come from those equal to it.
struct Cut {
    float at;
    double missing;
};

// Up to FEW values, each tried as the threshold.
class Few {
   public:
    template <class Values>
    Few(const Values& all, int64_t n, int64_t step) {
        float values[FEW], weights[FEW];
        for (int64_t i = 0; i < FEW; ++i) {
            values[i] = i < n ? all.x[i * step] : NAN;
            weights[i] = i < n ? all.weight_of(values[i], i * step) : 0;
        }
        F total{};
        for (int v = 0; v < VECTORS; ++v) {
            values_[v] = load<W>(values + v * W);
            total += load<W>(weights + v * W);
        }
        total_ = sum<W>(total);
        for (int64_t i = 0; i < n; ++i) {
            const F y = splat<W>(values[i]), w = splat<W>(weights[i]);
            for (int v = 0; v < VECTORS; ++v) {
                above_[v] += only(y > values_[v], w);
                upto_[v] += only(y >= values_[v], w);
            }
        }
    }

    // Where `share` of the weight is reached; the lowest value of all if rounding puts that beyond the total.
    Cut at(double share) const {
        const float target = float(share * total_);
        F best = splat<W>(-INF), lowest = splat<W>(INF);
        for (int v = 0; v < VECTORS; ++v) {
            best = ((upto_[v] >= target) & (values_[v] > best)) ? values_[v] : best;
            lowest = values_[v] < lowest ? values_[v] : lowest;
        }
        const float at = std::max(maximum<W>(best), -maximum<W>(-lowest));
        F above{};
        for (int v = 0; v < VECTORS; ++v) above = values_[v] == at ? above_[v] : above;
        return {at, double(target - maximum<W>(above))};
    }

   private:
    static constexpr int VECTORS = FEW / W;
    F values_[VECTORS], above_[VECTORS] = {}, upto_[VECTORS] = {};
    float total_;
};

// Where the weights of the first n `values`, from the highest downwards, reach `share` of them all. Two pools are filled in
// turn, each with room for n + W; `values` may lie in `other`.
template <class Values>
Cut select(Values values, int64_t n, double share, typename Values::Pool pool, typename Values::Pool other) {
    constexpr double MARGIN = 0.125;  // about two standard deviations of a sample's quantile
    bool narrow = false;
    while (n > FEW) {
        const Few sample(values, FEW, n / FEW);
        const float high = narrow ? sample.at(share).at : share > MARGIN ? sample.at(share - MARGIN).at : INF;
        const float low = narrow ? high : share + MARGIN < 1 ? sample.at(share + MARGIN).at : -INF;
        const Parts parts = partition(values, n, low, high, pool);
        const double upto = parts.above + parts.inside, all = upto + parts.below, target = std::min(share * all, all);
        int64_t count = parts.count;
        if (target <= parts.above) {
            share = target / parts.above;
            count = copy(values, n, std::nextafter(high, INF), INF, pool);
        } else if (target <= upto) {
            if (low == high) return {low, target - parts.above};
            share = (target - parts.above) / parts.inside;
        } else {
            share = (target - upto) / parts.below;
            count = copy(values, n, -INF, std::nextafter(low, -INF), pool);
        }
        narrow = count == n;  // a bracket of one value of the pool always makes it smaller
        values = values.in(pool);
        n = count;
        std::swap(pool, other);
    }
    return Few(values, n, 1).at(share);
}

}  // namespace

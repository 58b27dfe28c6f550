// One reading of a row of logits: the maxima of its blocks, and their weights where those are needed. For sample.cpp alone.
#pragma once

#include "sample_select.h"

namespace {

constexpr int64_t BLOCK = 128;  // logits that share a maximum
constexpr int64_t SAMPLE = 64;  // logits that are looked at for one that is high

// What else a scan does with each vector of logits, and at the end of each block.
struct Nothing {
    ROPEWAY_INLINE void take(int64_t, F) {}
    ROPEWAY_INLINE void end_block(int64_t) {}
};

// Sums weights up to the end of each block, and writes them down if `STORE`.
template <bool STORE>
struct Weigher {
    const Mass& mass;
    double* upto;
    float* weights;
    F part{};
    double total = 0;

    ROPEWAY_INLINE void take(int64_t i, F y) {
        const F w = mass(y);
        if (STORE) store<W>(weights + i, w);
        part += w;
    }
    ROPEWAY_INLINE void end_block(int64_t block) {
        total += double(sum<W>(part));
        upto[block] = total;
        part = F{};
    }
};

// Find the maxima of the blocks and of the row. Returns false if a logit is NaN.
template <class Also>
bool scan(const float* x, int64_t vocab, float* maxima, float* top, Also also) {
    I invalid{};
    F highest = splat<W>(-INF);
    for (int64_t begin = 0; begin < vocab; begin += BLOCK) {
        F best[2] = {splat<W>(-INF), splat<W>(-INF)};
        const int64_t end = std::min(begin + BLOCK, vocab);
        int64_t i = begin;
        for (; i + 2 * W <= end; i += 2 * W) {
            for (int c = 0; c < 2; ++c) {
                const F y = load<W>(x + i + c * W);
                invalid |= y != y;
                best[c] = y > best[c] ? y : best[c];
                also.take(i + c * W, y);
            }
        }
        float rest = -INF;
        for (int64_t r = i; r < end; r += W) also.take(r, load_upto(x + r, end - r));
        for (; i < end; ++i) {
            invalid[0] |= -(x[i] != x[i]);
            rest = x[i] > rest ? x[i] : rest;
        }
        const F both = best[0] > best[1] ? best[0] : best[1];
        maxima[begin / BLOCK] = std::max(rest, maximum<W>(both));
        highest = both > highest ? both : highest;
        highest[0] = std::max(highest[0], rest);
        also.end_block(begin / BLOCK);
    }
    *top = maximum<W>(highest);
    for (int i = 0; i < W; ++i) {
        if (invalid[i]) return false;
    }
    return true;
}

// The highest of a few logits.
float high_one(const float* x, int64_t vocab) {
    const int64_t step = std::max<int64_t>(1, vocab / SAMPLE);
    float high = x[0];
    for (int64_t i = step; i < vocab; i += step) high = x[i] > high ? x[i] : high;
    return high;
}

}  // namespace

// What the machine can do at most: arithmetic from registers alone, and reading. Benchmarks and `doctor` compare kernels
// with it.

#include <omp.h>

#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ropeway {

using F = Lanes<ROPEWAY_LANES>::F;

// SUMS are independent: enough to hide the latency of two steps a cycle, few enough to stay in registers.
// Each step needs the last one's sum as a factor, so that the compiler can compute nothing ahead of the loop.
struct MultiplyAdd {
    using V = F;
    static constexpr int OPS = 2 * ROPEWAY_LANES, SUMS = 12;
    static ROPEWAY_INLINE V start(int i) { return splat<ROPEWAY_LANES>(float(i)); }
    static ROPEWAY_INLINE void step(V& acc, V b) { acc = acc * b + b; }
};

struct PairDot {
    using V = F;
    static constexpr int OPS = 4 * ROPEWAY_LANES, SUMS = 12;
    static ROPEWAY_INLINE V start(int i) { return splat<ROPEWAY_LANES>(float(i)); }
    static ROPEWAY_INLINE void step(V& acc, V b) {
        using D = DotBf16Pair<ROPEWAY_LANES>;
        D::step(acc, bits_as<D::B>(b), 0x3f803f80u);
    }
};

#if defined(__AVX512VNNI__)
struct Int8Dot {
    using V = __m512i;
    static constexpr int OPS = 128, SUMS = 12;
    static ROPEWAY_INLINE V start(int i) { return _mm512_set1_epi8(char(i)); }
    static ROPEWAY_INLINE void step(V& acc, V b) { acc = _mm512_dpbusd_epi32(acc, b, b); }
};
#elif defined(__AVX2__)
// The products of widened values; adding them up runs beside it on other units.
struct Int8Dot {
    using V = __m256i;
    static constexpr int OPS = 32, SUMS = 12;
    static ROPEWAY_INLINE V start(int i) { return _mm256_set1_epi16(short(i)); }
    static ROPEWAY_INLINE void step(V& acc, V b) { acc = _mm256_madd_epi16(acc, b); }
};
#else
using Int8Dot = MultiplyAdd;
#endif

template <class K>
double run(int64_t rounds, int64_t threads) {
#pragma omp parallel num_threads(int(threads))
    {
        constexpr int SUMS = K::SUMS;
        typename K::V sums[SUMS], b = K::start(1);
        ROPEWAY_UNROLL for (int i = 0; i < SUMS; ++i) sums[i] = K::start(i);
        for (int64_t r = 0; r < rounds; ++r) {
            ROPEWAY_UNROLL for (int i = 0; i < SUMS; ++i) K::step(sums[i], b);
        }
        char results[SUMS][sizeof b];
        ROPEWAY_UNROLL for (int i = 0; i < SUMS; ++i) store_as(results[i], sums[i]);
        asm volatile("" : : "m"(results));
    }
    return double(rounds) * K::SUMS * K::OPS * double(threads);
}

}  // namespace ropeway

// Compute `rounds` rounds of float32 (0), bfloat16 (1) or int8 (2) multiply-adds on each of `threads` threads and
// return the number of operations, two for a multiply-add.
ROPEWAY_EXPORT double ropeway_peak(int64_t kind, int64_t rounds, int64_t threads) {
    if (kind == 0 || (kind == 1 && !ROPEWAY_PAIR_DOT)) return ropeway::run<ropeway::MultiplyAdd>(rounds, threads);
    return kind == 1 ? ropeway::run<ropeway::PairDot>(rounds, threads) : ropeway::run<ropeway::Int8Dot>(rounds, threads);
}

// Read `size` bytes and return their exclusive-or: the bandwidth that a kernel could reach.
ROPEWAY_EXPORT uint64_t ropeway_read(const char* data, int64_t size, int64_t threads) {
    uint64_t total = 0;
#pragma omp parallel num_threads(int(threads)) reduction(^ : total)
    {
        const int64_t pages = size / 4096, n = omp_get_num_threads(), t = omp_get_thread_num();
        ropeway::Lanes<ROPEWAY_LANES>::I sums[4] = {};
        for (int64_t i = pages * t / n * 4096; i < pages * (t + 1) / n * 4096; i += 4 * int64_t(sizeof sums[0])) {
            ROPEWAY_UNROLL for (int c = 0; c < 4; ++c) {
                sums[c] ^= ropeway::load_as<ropeway::Lanes<ROPEWAY_LANES>::I>(data + i + c * int64_t(sizeof sums[0]));
            }
        }
        const ropeway::Lanes<ROPEWAY_LANES>::I all = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
        for (int l = 0; l < ROPEWAY_LANES; ++l) total ^= uint64_t(uint32_t(all[l])) << (l % 2 * 32);
    }
    return total;
}

// Integer dot products of unsigned weights and signed activations, in the instructions that a processor has:
// VPDPBUSD (VNNI), VPMADDWD and VPMADDUBSW (AVX2, AVX-512BW), or the compiler's own vectors. All are exact.
#pragma once

#include "linear_tiles.h"
#include "vec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// 1: four-term dot products of bytes, by VPDPBUSD or its emulation.
#ifndef ROPEWAY_QUAD_DOT
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define ROPEWAY_QUAD_DOT 1
#else
#define ROPEWAY_QUAD_DOT 0
#endif
#endif

namespace ropeway {

template <int W>
struct Halves;  // the lanes of Lanes<W>, each as two int16
template <>
struct Halves<8> {
    typedef int16_t S __attribute__((vector_size(32)));
    typedef uint16_t U __attribute__((vector_size(32)));
    typedef int8_t B __attribute__((vector_size(8)));
    typedef uint8_t UB __attribute__((vector_size(8)));
    typedef int16_t N __attribute__((vector_size(16)));
    typedef int64_t Q __attribute__((vector_size(16)));
};
template <>
struct Halves<16> {
    typedef int16_t S __attribute__((vector_size(64)));
    typedef uint16_t U __attribute__((vector_size(64)));
    typedef int8_t B __attribute__((vector_size(16)));
    typedef uint8_t UB __attribute__((vector_size(16)));
    typedef int16_t N __attribute__((vector_size(32)));
    typedef int64_t Q __attribute__((vector_size(32)));
};

// W float16 at p as float32: shift into place and correct the exponent's bias, which is exact, subnormals included.
template <int W>
ROPEWAY_INLINE typename Lanes<W>::F half_to_float(const uint8_t* p) {
    using L = Lanes<W>;
#if defined(__AVX512F__)
    if constexpr (W == 16) return typename L::F(_mm512_cvtph_ps(load_as<__m256i>(p)));
#endif
#if defined(__F16C__)
    if constexpr (W == 8) return typename L::F(_mm256_cvtph_ps(load_as<__m128i>(p)));
#endif
    const auto wide = __builtin_convertvector(load_as<typename L::H>(p), typename L::U);
    const auto magnitude = bits_as<typename L::F>(typename L::U((wide & 0x7fffu) << 13)) * 0x1p112f;
    return bits_as<typename L::F>(typename L::U(bits_as<typename L::U>(magnitude) | (wide & 0x8000u) << 16));
}

// acc + x in 32 bits, and in 16. In place, which the compiler must be told: it reorders integer sums and copies them
// about, until the accumulators of a tile no longer fit the registers.
template <class I>
ROPEWAY_INLINE I plus32(I acc, I x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(I) == 64) {
        asm("vpaddd %1, %0, %0" : "+v"(acc) : "v"(x));
        return acc;
    }
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(I) == 32) {
        asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x));
        return acc;
    }
#endif
    return acc + x;
}

template <class S>
ROPEWAY_INLINE S plus16(S acc, S x) {
#if defined(__AVX512BW__)
    if constexpr (sizeof(S) == 64) {
        asm("vpaddw %1, %0, %0" : "+v"(acc) : "v"(x));
        return acc;
    }
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(S) == 32) {
        asm("vpaddw %1, %0, %0" : "+x"(acc) : "x"(x));
        return acc;
    }
#endif
    return acc + x;
}

template <int W>
ROPEWAY_INLINE typename Lanes<W>::I load_bytes(const uint8_t* p) {
    using I = typename Lanes<W>::I;
    // Compilers widen bytes one by one.
#if defined(__AVX512F__)
    if constexpr (W == 16) return I(_mm512_cvtepu8_epi32(load_as<__m128i>(p)));
#endif
#if defined(__AVX2__)
    if constexpr (W == 8) return I(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
    return __builtin_convertvector(load_as<typename Halves<W>::UB>(p), I);
}

// acc + the two products of int16 pairs in each lane.
template <int W>
ROPEWAY_INLINE typename Lanes<W>::I dot_pairs(typename Lanes<W>::I acc, typename Lanes<W>::I a,
                                              typename Lanes<W>::I b) {
    using I = typename Lanes<W>::I;
#if defined(__AVX512BW__)
    if constexpr (W == 16) return acc + I(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#endif
#if defined(__AVX2__)
    if constexpr (W == 8) return acc + I(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#endif
    return acc + (a >> 16) * (b >> 16) + I(a << 16 >> 16) * I(b << 16 >> 16);
}

// Pairs of unsigned bytes of `u` with signed bytes of `s`, each pair summed in 16 bits, which must hold it.
template <int W>
ROPEWAY_INLINE typename Halves<W>::S dot_bytes(typename Lanes<W>::I u, typename Lanes<W>::I s) {
    using S = typename Halves<W>::S;
    using U = typename Halves<W>::U;
#if defined(__AVX512BW__)
    if constexpr (W == 16) return S(_mm512_maddubs_epi16(__m512i(u), __m512i(s)));
#endif
#if defined(__AVX2__)
    if constexpr (W == 8) return S(_mm256_maddubs_epi16(__m256i(u), __m256i(s)));
#endif
    const U b = bits_as<U>(u);
    const S a = bits_as<S>(s), low = S(U(b & 0xffu)), high = S(U(b >> 8));
    return low * S(S(bits_as<U>(a) << 8) >> 8) + high * S(a >> 8);
}

// acc + the four products of unsigned bytes of `u` with signed bytes of `s` in each lane.
template <int W>
ROPEWAY_INLINE typename Lanes<W>::I dot_quads(typename Lanes<W>::I acc, typename Lanes<W>::I u,
                                              typename Lanes<W>::I s) {
    using I = typename Lanes<W>::I;
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    if constexpr (W == 16) return I(_mm512_dpbusd_epi32(__m512i(acc), __m512i(u), __m512i(s)));
    if constexpr (W == 8) return I(_mm256_dpbusd_epi32(__m256i(acc), __m256i(u), __m256i(s)));
#elif defined(__AVXVNNI__)
    if constexpr (W == 8) return I(_mm256_dpbusd_avx_epi32(__m256i(acc), __m256i(u), __m256i(s)));
#endif
    using U = typename Lanes<W>::U;
    using S = typename Halves<W>::S;
    using H = typename Halves<W>::U;
    const U bytes = bits_as<U>(u);
    const S even = S(bits_as<H>(s) << 8) >> 8, odd = bits_as<S>(s) >> 8;
    acc = dot_pairs<W>(acc, I(bytes & 0x00ff00ffu), bits_as<I>(even));
    return dot_pairs<W>(acc, I(bytes >> 8 & 0x00ff00ffu), bits_as<I>(odd));
}

// Activations as they are: one int8 per input feature.
struct ByteRows {
    static constexpr int A_BYTES = 1;
    template <int W>
    static ROPEWAY_INLINE void store_values(char* row, int64_t k, typename Lanes<W>::I q) {
        store_as(row + k, __builtin_convertvector(q, typename Halves<W>::B));
    }
    static ROPEWAY_INLINE void store_value(char* row, int64_t k, int32_t q) { row[k] = char(q); }
    static void clear(char* row, int64_t depth) { std::memset(row, 0, size_t(depth)); }
};

// One int16 per input feature, those of a line as 0, 2, 1, 3: its even bytes against the first pair, its odd ones
// against the second.
struct PairRows {
    static constexpr int A_BYTES = 2;
    template <int W>
    static ROPEWAY_INLINE void store_values(char* row, int64_t k, typename Lanes<W>::I q) {
        using Quads = typename Halves<W>::Q;
        const auto x = bits_as<Quads>(__builtin_convertvector(q, typename Halves<W>::N));
        const Quads outer = x & int64_t(0xffff00000000ffff);
        const Quads inner = (x >> 16 & int64_t(0xffff0000)) | (x & int64_t(0xffff0000)) << 16;
        store_as<Quads>(row + 2 * k, outer | inner);
    }
    static ROPEWAY_INLINE void store_value(char* row, int64_t k, int32_t q) {
        const int64_t place = k / 4 * 4 + (k % 4 == 1 ? 2 : k % 4 == 2 ? 1 : k % 4);
        store_as(row + 2 * place, int16_t(q));
    }
    static void clear(char* row, int64_t depth) { std::memset(row, 0, size_t(2 * depth)); }
};

// `dot`: acc[row][vector] += the products of `lines` lines of P panels, `stride` bytes apart, with R rows of x.

template <int W>
struct Int8Quads : ByteRows {
    using Form = ByteRows;
    static constexpr int LANES = W, VECTORS = 16 / W;
    using I = typename Lanes<W>::I;
    template <int R, int P, class Ahead>
    static ROPEWAY_INLINE void dot(I (&acc)[R][P * VECTORS], const uint8_t* b, int64_t stride, const char* a,
                                   int64_t a_stride, int64_t lines, Ahead& ahead) {
        constexpr int N = P * VECTORS;
        for (int64_t i = 0; i < lines; ++i, b += LINE, a += 4) {
            ahead.fetch(LINE);
            I w[N];
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) {
                const uint8_t* const from = b + v / VECTORS * stride + v % VECTORS * 4 * W;
                w[v] = load_as<I>(from);
            }
            ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                const I x = I{} + load_as<int32_t>(a + m * a_stride);
                ROPEWAY_UNROLL for (int v = 0; v < N; ++v) acc[m][v] = dot_quads<W>(acc[m][v], w[v], x);
            }
        }
    }
};

template <int W>
struct Int8Pairs : PairRows {
    using Form = PairRows;
    static constexpr int LANES = W, VECTORS = 16 / W;
    using I = typename Lanes<W>::I;
    using H = typename Halves<W>::U;
    template <int R, int P, class Ahead>
    static ROPEWAY_INLINE void dot(I (&acc)[R][P * VECTORS], const uint8_t* b, int64_t stride, const char* a,
                                   int64_t a_stride, int64_t lines, Ahead& ahead) {
        constexpr int N = P * VECTORS;
        for (int64_t i = 0; i < lines; ++i, b += LINE, a += 8) {
            ahead.fetch(LINE);
            H w[N];
            ROPEWAY_UNROLL for (int odd = 0; odd < 2; ++odd) {
                ROPEWAY_UNROLL for (int v = 0; v < N; ++v) {
                    const uint8_t* const from = b + v / VECTORS * stride + v % VECTORS * 4 * W;
                    w[v] = odd ? H(load_as<H>(from) >> 8) : H(load_as<H>(from) & 0xffu);
                }
                ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                    const I x = I{} + load_as<int32_t>(a + m * a_stride + 4 * odd);
                    ROPEWAY_UNROLL for (int v = 0; v < N; ++v) {
                        acc[m][v] = plus32(acc[m][v], dot_pairs<W>(I{}, bits_as<I>(w[v]), x));
                    }
                }
            }
        }
    }
};

template <int W>
struct Int4Quads : ByteRows {
    using Form = ByteRows;
    static constexpr int LANES = W, VECTORS = 16 / W;
    using I = typename Lanes<W>::I;
    using U = typename Lanes<W>::U;
    template <int R, int P, class Ahead>
    static ROPEWAY_INLINE void dot(I (&acc)[R][P * VECTORS], const uint8_t* b, int64_t stride, const char* a,
                                   int64_t a_stride, int64_t lines, Ahead& ahead) {
        constexpr int N = P * VECTORS;
        for (int64_t i = 0; i < lines; ++i, b += LINE, a += 8) {
            ahead.fetch(LINE);
            I w[2][N];
            ROPEWAY_UNROLL for (int v = 0; v < N; ++v) {
                const uint8_t* const from = b + v / VECTORS * stride + v % VECTORS * 4 * W;
                const U line = load_as<U>(from);
                w[0][v] = I(line & 0x0f0f0f0fu);
                w[1][v] = I(line >> 4 & 0x0f0f0f0fu);
            }
            ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                ROPEWAY_UNROLL for (int h = 0; h < 2; ++h) {
                    const I x = I{} + load_as<int32_t>(a + m * a_stride + 4 * h);
                    ROPEWAY_UNROLL for (int v = 0; v < N; ++v) acc[m][v] = dot_quads<W>(acc[m][v], w[h][v], x);
                }
            }
        }
    }
};

// Products of 32 input features add up in 16 bits: 8 times two of 15 * 127 are 30480.
template <int W>
struct Int4Bytes : ByteRows {
    using Form = ByteRows;
    static constexpr int LANES = W, VECTORS = 16 / W;
    using I = typename Lanes<W>::I;
    using U = typename Lanes<W>::U;
    using S = typename Halves<W>::S;
    template <int R, int P, class Ahead>
    static ROPEWAY_INLINE void dot(I (&acc)[R][P * VECTORS], const uint8_t* b, int64_t stride, const char* a,
                                   int64_t a_stride, int64_t lines, Ahead& ahead) {
        constexpr int N = P * VECTORS;
        for (int64_t block = 0; block < lines / 4; ++block) {
            S part[R][N] = {};
            for (int i = 0; i < 4; ++i, b += LINE, a += 8) {
                ahead.fetch(LINE);
                ROPEWAY_UNROLL for (int h = 0; h < 2; ++h) {
                    I w[N];
                    ROPEWAY_UNROLL for (int v = 0; v < N; ++v) {
                        const uint8_t* const from = b + v / VECTORS * stride + v % VECTORS * 4 * W;
                        w[v] = I(load_as<U>(from) >> 4 * h & 0x0f0f0f0fu);
                    }
                    ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                        const I x = I{} + load_as<int32_t>(a + m * a_stride + 4 * h);
                        ROPEWAY_UNROLL for (int v = 0; v < N; ++v) {
                            part[m][v] = plus16(part[m][v], dot_bytes<W>(w[v], x));
                        }
                    }
                }
            }
            const I ones = I{} + 0x00010001;
            ROPEWAY_UNROLL for (int m = 0; m < R; ++m) {
                ROPEWAY_UNROLL for (int v = 0; v < N; ++v) {
                    acc[m][v] = dot_pairs<W>(acc[m][v], bits_as<I>(part[m][v]), ones);
                }
            }
        }
    }
};

template <int W>
using Int8Dot = std::conditional_t<ROPEWAY_QUAD_DOT, Int8Quads<W>, Int8Pairs<W>>;
template <int W>
using Int4Dot = std::conditional_t<ROPEWAY_QUAD_DOT, Int4Quads<W>, Int4Bytes<W>>;

}  // namespace ropeway

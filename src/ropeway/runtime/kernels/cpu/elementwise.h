// The small operations between the matrix products, as Python and other kernels call them. See elementwise.cpp.
//
// `type` is the element type of everything behind a `void*`: see with_type() in vec.h. Each starts up to `threads`
// threads of its own where there is enough to do. All return 0.
#pragma once

#include <cstdint>

#include "vec.h"

// out = norm(x) for outer x inner rows of `dim` elements at the given strides; `out` is contiguous.
ROPEWAY_EXPORT int ropeway_rms_norm(int64_t type, const void* x, const void* weight, void* out, int64_t outer,
                                    int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t dim, double eps,
                                    int64_t threads);

// residual += x, then out = norm(residual). `x` may be null: nothing is added. `out` may be `x`.
ROPEWAY_EXPORT int ropeway_add_rms_norm(int64_t type, const void* x, void* residual, const void* weight, void* out,
                                        int64_t rows, int64_t dim, double eps, int64_t threads);

// Rotate the first 2 * half dimensions of each head of q and k, in place. Before, normalise the head with `q_norm` and
// `k_norm` unless they are null. `positions` pick rows of the tables `cosine` and `sine`, which are `half` wide.
ROPEWAY_EXPORT int ropeway_rotary(int64_t type, void* q, void* k, const void* q_norm, const void* k_norm, double eps,
                                  const float* cosine, const float* sine, const int64_t* positions, int64_t tokens,
                                  int64_t heads, int64_t kv_heads, int64_t dim, int64_t half, int64_t q_stride,
                                  int64_t k_stride, int64_t threads);

// out (rows, width) = silu(gate) * up, where gate_up (rows, 2 * width) holds gate, then up.
ROPEWAY_EXPORT int ropeway_silu_mul(int64_t type, const void* gate_up, void* out, int64_t rows, int64_t width,
                                    int64_t threads);

// out = x as float32.
ROPEWAY_EXPORT int ropeway_widen(int64_t type, const void* x, float* out, int64_t count, int64_t threads);

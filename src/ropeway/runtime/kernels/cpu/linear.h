// A packed weight, and y = x W^T + b with it. See linear.cpp.
#pragma once

#include <cstdint>

// Mirrored field by field in runtime/kernels/library.py.
struct LinearWeight {
    int64_t type;            // element type of x, y and bias: 0 float32, 1 bfloat16
    int64_t format;          // 0: plain, of `type`; 1: int8, a scale per column; 2: int4 in groups; 3: with zero points
    int64_t columns, depth;  // out_features, in_features
    int64_t group;           // input features that share a scale (formats 2 and 3), else 0
    const void* packed;      // layout is the kernel's affair; scales and zero points lie in the same buffer
    const void* bias;        // of `type`, or null
};

namespace ropeway {

// `x` (rows, depth) to `y` (rows, columns), both contiguous and of the weight's type. Returns 0, or 3 when memory ran
// out. A row's result does not depend on how many rows come with it, nor on `threads`.
int linear(const LinearWeight& weight, const void* x, void* y, int64_t rows, int64_t threads);

}  // namespace ropeway

// Paged attention, as Python and other kernels call it.
#pragma once

#include <cstdint>

// What all layers of a step share. Mirrored field by field in runtime/kernels/library.py.
struct AttentionStep {
    int64_t type;     // of q, k, v and out: see with_type() in vec.h
    int64_t kv_type;  // of the cache: the same, or 2 for int8
    int64_t rows, tokens, heads, kv_heads, head_dim, block_size, layers, table_stride, threads;
    const int32_t* cu_q;
    const int32_t* starts;
    const int32_t* tables;
    const int32_t* slots;
    double scale;
};

// One layer of one step. Strides are between tokens, in elements; `window` 0 means none.
struct AttentionLayer {
    const void* q;
    const void* k;
    const void* v;
    void* kv;
    void* out;
    int64_t q_stride, k_stride, v_stride, layer, window;
};

// Write K and V of the step's tokens into the cache `kv`, then attend. `out` is (tokens, heads * head_dim). Called from
// one thread; starts `step->threads` of its own. Returns 0; 1 for a negative block id or slot where a valid one was
// needed (results are then meaningless); 2 for a shape that is not supported; 3 when memory ran out.
extern "C" __attribute__((visibility("default"))) int ropeway_attention(const AttentionStep* step,
                                                                        const AttentionLayer* layer);

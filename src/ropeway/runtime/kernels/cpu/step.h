// A whole step of a decoder of the Llama family in one call. See step.cpp.
#pragma once

#include <cstdint>

#include "attention.h"
#include "linear.h"

// One decoder layer. Mirrored field by field in runtime/fused.py, as are the other structs here.
struct StepLayer {
    const void* input_norm;  // (hidden,)
    const void* post_norm;   // (hidden,)
    const void* q_norm;      // (head_dim,), or null
    const void* k_norm;      // (head_dim,), or null
    const LinearWeight* qkv;
    const LinearWeight* out;
    const LinearWeight* gate_up;
    const LinearWeight* down;
    int64_t window;  // of the attention in tokens, 0 for none
};

// What no step changes. The vectors of `norm` and of each layer are of the weights' type.
struct StepModel {
    int64_t type, layers, hidden, half;  // `half` is the width of the rotary tables
    double eps;
    const float* cosine;
    const float* sine;
    const StepLayer* layer;
    const void* norm;
    const LinearWeight* head;
};

struct StepCall {
    const int64_t* positions;  // (tokens,)
    const int64_t* wanted;     // (wanted_count,) tokens whose logits are wanted
    int64_t wanted_count;
    void* residual;  // (tokens, hidden): the tokens' embeddings; overwritten
    void* kv;        // the whole cache
    void* scratch;   // ropeway_step_scratch() bytes, aligned to 64
    float* logits;   // (wanted_count, vocabulary)
};

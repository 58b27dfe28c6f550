#include "attention.h"

#include <new>

#include "attention_work.h"

int ropeway_attention(const AttentionStep* step, const AttentionLayer* layer) {
    using namespace ropeway;
    if (step->head_dim > MAX_DIM || step->head_dim % 8 || step->block_size % 8 || CHUNK % step->block_size) return 2;
    if (step->kv_type != 2 && step->kv_type != step->type) return 2;
    try {
        switch (step->kv_type) {
            case 0: return attention_f32(*step, *layer);
            case 1: return attention_bf16(*step, *layer);
            case 2: return attention_int8(*step, *layer);
            default: return 2;
        }
    } catch (const std::bad_alloc&) {
        return 3;
    }
}

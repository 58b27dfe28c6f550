#include "attention_kernel.h"

int ropeway::attention_f32(const AttentionStep& step, const AttentionLayer& layer) {
    return attention<KvF32>(step, layer);
}

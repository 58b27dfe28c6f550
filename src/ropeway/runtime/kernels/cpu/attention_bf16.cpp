#include "attention_kernel.h"

int ropeway::attention_bf16(const AttentionStep& step, const AttentionLayer& layer) {
    return attention<KvBf16>(step, layer);
}

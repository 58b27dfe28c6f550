#include "attention_kernel.h"

int ropeway::attention_int8(const AttentionStep& step, const AttentionLayer& layer) {
    return attention<KvInt8>(step, layer);
}

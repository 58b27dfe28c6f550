// What the KV cache holds, and how a token gets there.
//
// A block of the cache holds, for each layer and KV head, K then V. K is transposed, [head_dim / STEP][block][STEP],
// and V is [block / STEP][head_dim][STEP]: both products then run over whole vectors and no sum crosses the lanes. STEP
// is 2 for bfloat16, so that a pair fits one lane of a dot-product instruction, and 1 otherwise. With int8 there follow
// the scales of the block's tokens, float32: first for K, then for V.
#pragma once

#include "attention.h"
#include "attention_product.h"

namespace ropeway {

constexpr int MAX_DIM = 256;  // largest head_dim

template <class D>
class Cache {
   protected:
    using T = typename D::T;
    static constexpr bool SCALED = std::is_same_v<T, int8_t>;

    const int64_t dim_, size_, head_elements_, block_elements_;
    T* const kv_;

    Cache(const AttentionStep& step, const AttentionLayer& layer)
        : dim_(step.head_dim),
          size_(step.block_size),
          head_elements_(2 * dim_ * size_ + (SCALED ? 2 * int64_t(sizeof(float)) * size_ : 0)),
          block_elements_(step.layers * step.kv_heads * head_elements_),
          kv_(static_cast<T*>(layer.kv) + layer.layer * step.kv_heads * head_elements_) {}

    // K of a KV head in a block; V follows.
    T* head_of(int64_t block, int64_t head) const { return kv_ + block * block_elements_ + head * head_elements_; }

    // The scales of K of such a head; those of V follow.
    const float* scales(const T* head) const { return reinterpret_cast<const float*>(head + 2 * dim_ * size_); }

    // Store a head of one token, which begins at k[k_at] and v[v_at].
    void write(int64_t type, const void* k, int64_t k_at, const void* v, int64_t v_at, int64_t slot, int64_t head) {
        T keys[MAX_DIM], values[MAX_DIM];
        const float k_scale = convert(type, k, k_at, keys), v_scale = convert(type, v, v_at, values);
        const int64_t offset = slot % size_;
        T* const to = head_of(slot / size_, head);
        T* const to_k = to + offset * STEP;
        T* const to_v = to + dim_ * size_ + offset / STEP * dim_ * STEP + offset % STEP;
        for (int64_t d = 0; d < dim_; d += STEP) {
            for (int s = 0; s < STEP; ++s) to_k[d * size_ + s] = keys[d + s];
        }
        for (int64_t d = 0; d < dim_; ++d) to_v[d * STEP] = values[d];
        if constexpr (SCALED) {
            float* const to_scale = const_cast<float*>(scales(to)) + offset;
            to_scale[0] = k_scale;
            to_scale[size_] = v_scale;
        }
    }

   private:
    using F = typename D::F;
    static constexpr int W = D::LANES, STEP = D::STEP;
    static constexpr float NEAREST = 12582912.0f;  // 1.5 * 2^23: adding and taking it off rounds to the nearest even

    // A head of one token of `x` as the cache holds it, and its scale. x / scale is rounded to nearest even. A value
    // that is not finite makes the scale NaN, and with it everything that reads this token.
    float convert(int64_t type, const void* x, int64_t at, T* to) const {
        alignas(64) float wide[MAX_DIM];
        with_type(type, [&](auto* element) {
            const auto* from = static_cast<decltype(element)>(const_cast<void*>(x)) + at;
            for (int64_t d = 0; d < dim_; d += W) store<W>(wide + d, load<W>(from + d));
            return 0;
        });
        if constexpr (SCALED) {
            F largest{}, poison{};
            for (int64_t d = 0; d < dim_; d += W) {
                const F y = load<W>(wide + d), size = y > -y ? y : -y;
                largest = largest > size ? largest : size;
                poison += y * 0.0f;
            }
            const float scale = maximum<W>(largest) / 127.0f + sum<W>(poison), divisor = scale > 0.0f ? scale : 1.0f;
            for (int64_t d = 0; d < dim_; d += W) {
                const F y = load<W>(wide + d) / divisor, bounded = y > 127.0f ? splat<W>(127.0f) : y;
                const F nearest = (bounded + NEAREST) - NEAREST;
                store_as(to + d, __builtin_convertvector(__builtin_convertvector(nearest, typename Lanes<W>::I),
                                                         typename D::V));
            }
            return scale;
        } else {
            for (int64_t d = 0; d < dim_; d += W) store<W>(to + d, load<W>(wide + d));
            return 1.0f;
        }
    }
};

}  // namespace ropeway

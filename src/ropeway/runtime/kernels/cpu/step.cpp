// A whole step of a decoder of the Llama family in one call: embeddings in, logits out. It is a sequence of the kernels
// that also serve alone, so it computes what they compute, bit for bit. What it saves is everything between them: the
// interpreter, fresh memory for each result, and the last layer's work for tokens whose logits nobody wants.

#include "step.h"

#include <algorithm>
#include <cstring>

#include "elementwise.h"

namespace ropeway {

constexpr int64_t BAND = 256;  // tokens that pass through the feed-forward part together: its results stay in the cache

class Step {
    const StepModel& model_;
    const AttentionStep& attention_;
    const StepCall& call_;
    const int64_t element_, q_, kv_;  // bytes of an element; elements of a token's queries, and of its keys
    int64_t rows_;                    // tokens being computed
    char* residual_;
    char *x_, *qkv_, *mixed_, *gate_up_, *gated_, *kept_residual_, *kept_mixed_, *logits_;

   public:
    Step(const StepModel& model, const AttentionStep& attention, const StepCall& call)
        : model_(model),
          attention_(attention),
          call_(call),
          element_(model.type == 0 ? 4 : 2),
          q_(attention.heads * attention.head_dim),
          kv_(attention.kv_heads * attention.head_dim),
          rows_(attention.tokens),
          residual_(static_cast<char*>(call.residual)) {}

    // Divide the scratch memory, and return how many bytes of it there must be.
    int64_t lay_out() {
        const int64_t band = std::min(rows_, BAND), width = model_.layer->down->depth;
        char* const begin = static_cast<char*>(call_.scratch);
        int64_t used = 0;
        const auto take = [&](int64_t elements) {
            const int64_t at = used;
            used += (elements * element_ + 63) / 64 * 64;
            return begin + at;
        };
        x_ = take(rows_ * model_.hidden);
        qkv_ = take(rows_ * (q_ + 2 * kv_));
        mixed_ = take(rows_ * q_);
        gate_up_ = take(band * 2 * width);
        gated_ = take(band * width);
        kept_residual_ = take(call_.wanted_count * model_.hidden);
        kept_mixed_ = take(call_.wanted_count * q_);
        logits_ = take(model_.type == 0 ? 0 : call_.wanted_count * model_.head->columns);
        return used;
    }

    int run() {
        lay_out();
        for (int64_t l = 0; l < model_.layers; ++l) {
            const StepLayer& layer = model_.layer[l];
            add_norm(l ? x_ : nullptr, layer.input_norm);
            if (const int status = attend(layer, l)) return status;
            if (l + 1 == model_.layers) keep_wanted();
            if (const int status = multiply(*layer.out, mixed_, x_, rows_)) return status;
            add_norm(x_, layer.post_norm);
            if (const int status = feed_forward(layer)) return status;
        }
        add_norm(x_, model_.norm);
        if (model_.type == 0) return multiply(*model_.head, x_, call_.logits, rows_);
        const int status = multiply(*model_.head, x_, logits_, rows_);
        ropeway_widen(model_.type, logits_, call_.logits, rows_ * model_.head->columns, attention_.threads);
        return status;
    }

   private:
    int multiply(const LinearWeight& weight, const void* x, void* y, int64_t rows) {
        return rows ? linear(weight, x, y, rows, attention_.threads) : 0;
    }

    void add_norm(const void* added, const void* weight) {
        ropeway_add_rms_norm(model_.type, added, residual_, weight, x_, rows_, model_.hidden, model_.eps,
                             attention_.threads);
    }

    // x_ to mixed_, and K and V of the tokens to the cache.
    int attend(const StepLayer& layer, int64_t number) {
        if (const int status = multiply(*layer.qkv, x_, qkv_, rows_)) return status;
        const int64_t stride = q_ + 2 * kv_;
        char* const k = qkv_ + q_ * element_;
        ropeway_rotary(model_.type, qkv_, k, layer.q_norm, layer.k_norm, model_.eps, model_.cosine, model_.sine,
                       call_.positions, rows_, attention_.heads, attention_.kv_heads, attention_.head_dim, model_.half,
                       stride, stride, attention_.threads);
        const AttentionLayer call{qkv_, k,      k + kv_ * element_, call_.kv, mixed_, stride, stride,
                                  stride, number, layer.window};
        return ropeway_attention(&attention_, &call);
    }

    // After the last attention nobody reads the other tokens.
    void keep_wanted() {
        for (int64_t i = 0; i < call_.wanted_count; ++i) {
            const int64_t t = call_.wanted[i], wide = model_.hidden * element_, q = q_ * element_;
            std::memcpy(kept_residual_ + i * wide, residual_ + t * wide, size_t(wide));
            std::memcpy(kept_mixed_ + i * q, mixed_ + t * q, size_t(q));
        }
        residual_ = kept_residual_;
        mixed_ = kept_mixed_;
        rows_ = call_.wanted_count;
    }

    // x_ to x_.
    int feed_forward(const StepLayer& layer) {
        const int64_t width = layer.down->depth;
        for (int64_t begin = 0; begin < rows_; begin += BAND) {
            const int64_t count = std::min(BAND, rows_ - begin);
            char* const x = x_ + begin * model_.hidden * element_;
            if (const int status = multiply(*layer.gate_up, x, gate_up_, count)) return status;
            ropeway_silu_mul(model_.type, gate_up_, gated_, count, width, attention_.threads);
            if (const int status = multiply(*layer.down, gated_, x, count)) return status;
        }
        return 0;
    }
};

}  // namespace ropeway

// Bytes of scratch memory that ropeway_step() will use for a call of these sizes. The addresses in them are not read.
ROPEWAY_EXPORT int64_t ropeway_step_scratch(const StepModel* model, const AttentionStep* attention,
                                            const StepCall* call) {
    return ropeway::Step(*model, *attention, *call).lay_out();
}

// Returns 0, or what ropeway_attention() or linear() returned.
ROPEWAY_EXPORT int ropeway_step(const StepModel* model, const AttentionStep* attention, const StepCall* call) {
    return ropeway::Step(*model, *attention, *call).run();
}

// What is made of the inputs once a call: fp32, or integers with a scale a token; and their sums over groups, by which
// zero points enter: Σ s·(c − z)·x = Σ s·(Σ c·x) − Σ (s·z)·(Σ x), sums inside brackets over a group.
#pragma once

#include "layout.h"

namespace {

inline void to_float(const Call& call, int64_t token, int64_t columns, float* out) {
    const int64_t at = token * columns;
    if (call.dtype == FP32) {
        std::memcpy(out, static_cast<const float*>(call.x) + at, columns * sizeof(float));
        return;
    }
    const uint16_t* x = static_cast<const uint16_t*>(call.x) + at;
    if (call.dtype == BF16) {
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) out[k] = from_bfloat(x[k]);
    } else {
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) out[k] = from_half(x[k]);
    }
}

// max|x| / largest, 1 where all are zero; NaN where x holds one, or an infinity: it may not vanish in integers.
inline float token_step(const float* x, int64_t columns, int largest) {
    float top = 0, poison = 0;
#pragma omp simd reduction(max : top) reduction(+ : poison)
    for (int64_t k = 0; k < columns; ++k) {
        const float magnitude = __builtin_fabsf(x[k]);
        top = magnitude > top ? magnitude : top;
        poison += x[k] * 0.0f;
    }
    const float step = top / static_cast<float>(largest);
    return (step == 0 ? 1.0f : step) + poison;
}

// Ties to even, as torch.round; beyond ±largest saturated. Divided, not multiplied by an inverse: that could move a tie.
inline void round_token(const float* x, int64_t columns, float step, int largest, int8_t* out) {
    const float limit = static_cast<float>(largest);
#pragma omp simd
    for (int64_t k = 0; k < columns; ++k) {
        float value = x[k] / step;
        value = value < limit ? value : limit;
        value = value > -limit ? value : -limit;
        constexpr float magic = 0x1.8p23f;  // a float this large has no fraction: adding it rounds
        out[k] = static_cast<int8_t>(static_cast<int32_t>(to_bits(value + magic) & 0xff));
    }
}

template <class T>
void sum_groups(const T* x, int64_t columns, int64_t group_size, float* out) {
    for (int64_t g = 0; g * group_size < columns; ++g) {
        const int64_t start = g * group_size, stop = start + group_size < columns ? start + group_size : columns;
        if constexpr (sizeof(T) == 1) {
            int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = start; k < stop; ++k) sum += x[k];
            out[g] = static_cast<float>(sum);
        } else {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = start; k < stop; ++k) sum += x[k];
            out[g] = sum;
        }
    }
}

// Rounded inputs of all tokens: integers [tokens, width] with zeros beyond the last column, step [tokens], and sums
// [tokens, stride] of the integers.
class Integers {
public:
    Integers(const Matrix& w, const Call& call, int64_t stride)
        : width(round_up(w.columns, BLOCK)), stride(stride), values(call.tokens * width), step(call.tokens),
          sums(call.tokens * stride) {
        share(call.tokens, 1, call.tokens > 8 ? call.threads : 1, [&](int64_t first, int64_t last) {
            Buffer<float> x(w.columns);
            for (int64_t t = first; t < last; ++t) {
                int8_t* q = values + t * width;
                to_float(call, t, w.columns, x);
                step[t] = call.step ? call.step[t] : token_step(x, w.columns, call.largest);
                round_token(x, w.columns, step[t], call.largest, q);
                std::memset(q + w.columns, 0, width - w.columns);
                std::memset(sums + t * stride, 0, stride * sizeof(float));
                sum_groups(q, w.columns, w.group_size, sums + t * stride);
            }
        });
    }

    const int64_t width, stride;
    Buffer<int8_t> values;
    Buffer<float> step, sums;
};

}  // namespace

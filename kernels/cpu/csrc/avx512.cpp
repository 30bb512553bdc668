// The product for AVX-512: strips of rows, shared out over threads; weights are read from memory once a call.
//
// Compiled once for each form of inputs, FORM, since compilers take seconds for one: avx512_FORM is the function then.
#include "avx512.h"

namespace {

// Floats of all tokens as bf16 terms, in the order of `FloatForm`, and their sums over groups.
template <int TERMS>
class Terms {
public:
    Terms(const Matrix& w, const Call& call, int64_t stride)
        : width(round_up(w.columns, BLOCK) * TERMS * 2), stride(stride), values(call.tokens * width),
          sums(call.tokens * stride) {
        share(call.tokens, 1, call.tokens > 8 ? call.threads : 1, [&](int64_t first, int64_t last) {
            const int64_t padded = round_up(w.columns, BLOCK);
            Buffer<float> x(padded);
            for (int64_t t = first; t < last; ++t) {
                to_float(call, t, w.columns, x);
                std::memset(x + w.columns, 0, (padded - w.columns) * sizeof(float));
                std::memset(sums + t * stride, 0, stride * sizeof(float));
                split(x, padded, values + t * width);
                sum_groups(x.get(), w.columns, w.group_size, sums + t * stride);
            }
        });
    }

    float finish(int64_t, float sum) const { return sum; }

    const int64_t width, stride;  // bytes of a token; sums of a token
    Buffer<uint8_t> values;
    Buffer<float> sums;

private:
    // Each term is what the ones before leave of x, to nearest.
    static void split(const float* x, int64_t padded, uint8_t* out) {
        const __m512i parity = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24,
                                                22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        for (int64_t k = 0; k < padded; k += BLOCK)
            for (int half = 0; half < 2; ++half) {
                __m512 rest[4];
                for (int i = 0; i < 4; ++i) rest[i] = _mm512_load_ps(x + k + 64 * half + 16 * i);
                for (int term = 0; term < TERMS; ++term) {
                    __m512i rounded[2];
                    for (int i = 0; i < 2; ++i) {
                        rounded[i] = (__m512i)_mm512_cvtne2ps_pbh(rest[2 * i + 1], rest[2 * i]);
                        for (int j = 0; j < 2; ++j) {
                            const __m256i part = j ? _mm512_extracti64x4_epi64(rounded[i], 1) : _mm512_castsi512_si256(rounded[i]);
                            const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16);
                            rest[2 * i + j] = _mm512_sub_ps(rest[2 * i + j], _mm512_castsi512_ps(wide));
                        }
                        rounded[i] = _mm512_permutexvar_epi16(parity, rounded[i]);  // 16 even places, then 16 odd ones
                    }
                    uint8_t* at = out + k * TERMS * 2 + 256 * term + 128 * half;
                    _mm512_store_si512(at, _mm512_shuffle_i64x2(rounded[0], rounded[1], 0x44));
                    _mm512_store_si512(at + 64, _mm512_shuffle_i64x2(rounded[0], rounded[1], 0xee));
                }
            }
    }
};

class Rounded : public Integers {
public:
    using Integers::Integers;
    float finish(int64_t t, float sum) const { return step.get()[t] * sum; }
};

// One strip of rows at a time with all tokens, four at once while there are four.
template <int BITS, class Form, int SPAN>
class Product {
    static constexpr int ROWS = Form::ROWS, UNITS = BLOCK / SPAN;

public:
    Product(const Matrix& w, const Call& call)
        : w_(w), call_(call), whole_(w.columns / BLOCK), blocks_(ceil_div(w.columns, BLOCK)),
          second_(plane_bytes(w.columns, planes(BITS).width[0])),
          grid_(w, ROWS, round_up(w.groups + UNITS, 16)), groups_(round_up(w.groups, 16)), scale_(ROWS * stride()),
          offset_(ROWS * groups_), bytes_(ROWS * blocks_ * BLOCK + 8), wide_(BITS != 8 && call.tokens > 8) {}

    template <class Inputs>
    void rows(const Inputs& x, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row += ROWS) {
            const int64_t start = row + ROWS <= w_.rows ? row : w_.rows - ROWS;  // the last strip overlaps
            grid_.load(start, ROWS);
            load_offset();
            Strip strip{w_.codes + start * w_.row_bytes, w_.row_bytes, second_, whole_, unit_scale(), stride(),
                        offset_, groups_, 0};
            if (start + 2 * ROWS <= w_.rows) strip.ahead = ROWS * w_.row_bytes;
            if (wide_) unpack_strip(strip);
            int64_t t = 0;
            for (; t + 4 <= call_.tokens; t += 4) tokens<4>(x, strip, start, row, t);
            for (; t < call_.tokens; ++t) tokens<1>(x, strip, start, row, t);
        }
    }

private:
    int64_t stride() const { return w_.group_size <= BLOCK ? grid_.stride : blocks_; }

    void load_offset() {
        for (int r = 0; r < ROWS; ++r)
#pragma omp simd
            for (int64_t g = 0; g < groups_; ++g)
                offset_[r * groups_ + g] = grid_.scale[r * grid_.stride + g] * grid_.zero[r * grid_.stride + g];
    }

    // Scales by unit: those by group, unless groups are wider than a block.
    const float* unit_scale() {
        if (w_.group_size <= BLOCK) return grid_.scale;
        for (int r = 0; r < ROWS; ++r)
            for (int64_t b = 0; b < blocks_; ++b)
                scale_[r * blocks_ + b] = grid_.scale[r * grid_.stride + b * BLOCK / w_.group_size];
        return scale_;
    }

    template <int TOKENS, class Inputs>
    void tokens(const Inputs& x, const Strip& strip, int64_t start, int64_t row, int64_t t) {
        float products[ROWS * TOKENS];
        const Tokens in{reinterpret_cast<const uint8_t*>(x.values.get()) + t * x.width, x.width,
                        x.sums.get() + t * groups_};
        if (wide_) {
            strip_product<8, Form, SPAN, ROWS, TOKENS>(as_bytes(strip, 0, blocks_, groups_), in, products);
        } else {
            strip_product<BITS, Form, SPAN, ROWS, TOKENS>(strip, in, products);
            if (whole_ < blocks_) add_tail<TOKENS>(strip, in, products);
        }
        for (int64_t r = row - start; r < ROWS; ++r)
            for (int j = 0; j < TOKENS; ++j)
                call_.y[(t + j) * w_.rows + start + r] = x.finish(t + j, products[r + j * ROWS]);
    }

    // What is left of a row after whole blocks, as bytes.
    template <int TOKENS>
    void add_tail(const Strip& strip, Tokens in, float* products) {
        unpack_rows(strip, whole_);
        in.x += whole_ * Form::BLOCK_BYTES;
        float tail[ROWS * TOKENS];
        strip_product<8, Form, SPAN, ROWS, TOKENS>(as_bytes(strip, whole_, 1, 0), in, tail);
        for (int i = 0; i < ROWS * TOKENS; ++i) products[i] += tail[i];
    }

    // Blocks of the strip that are unpacked, with zero points of so many groups.
    Strip as_bytes(const Strip& strip, int64_t first, int64_t count, int64_t groups) {
        return {bytes_ + first * BLOCK, blocks_ * BLOCK, 0,      count, strip.scale + first * UNITS, strip.stride,
                strip.offset,           groups,          0};
    }

    void unpack_rows(const Strip& strip, int64_t first) {
        alignas(64) uint8_t block[BLOCK + 8];
        for (int r = 0; r < ROWS; ++r)
            for (int64_t b = first; b < blocks_; ++b) {
                unpack(strip.codes + r * strip.row_bytes, BITS, w_.columns, b, b + 1, block);
                std::memcpy(bytes_ + (r * blocks_ + b) * BLOCK, block, BLOCK);
            }
    }

    void unpack_strip(const Strip& strip) {
        for (int r = 0; r < ROWS; ++r)
            for (int64_t b = 0; b < whole_; ++b) {
                const uint8_t* row = strip.codes + r * strip.row_bytes;
                if (strip.ahead) prefetch_block<BITS>(row + strip.ahead, strip.second, b);
                const Halves codes = load_block<BITS>(row, strip.second, b);
                uint8_t* out = bytes_ + (r * blocks_ + b) * BLOCK;
                _mm512_store_si512(out, codes.a);
                _mm512_store_si512(out + 64, codes.b);
            }
        if (whole_ < blocks_) unpack_rows(strip, whole_);
    }

    const Matrix& w_;
    const Call& call_;
    const int64_t whole_, blocks_, second_;
    Grid grid_;
    const int64_t groups_;
    Buffer<float> scale_, offset_;
    Buffer<uint8_t> bytes_;
    const bool wide_;
};

template <int BITS, class Form, int SPAN, class Inputs>
void product(const Matrix& w, const Call& call, const Inputs& x) {
    share(w.rows, Form::ROWS, call.threads, [&](int64_t first, int64_t last) {
        Product<BITS, Form, SPAN>(w, call).rows(x, first, last);
    });
}

template <int BITS, class Form, class Inputs>
void by_span(const Matrix& w, const Call& call) {
    const Inputs x(w, call, round_up(w.groups, 16));
    switch (w.group_size) {
        case 32: return product<BITS, Form, 32>(w, call, x);
        case 64: return product<BITS, Form, 64>(w, call, x);
        default: return product<BITS, Form, 128>(w, call, x);
    }
}

template <class Plain, class Nibbles, class Inputs>
void by_bits(const Matrix& w, const Call& call) {
    switch (w.bits) {
        case 2: return by_span<2, Plain, Inputs>(w, call);
        case 3: return by_span<3, Plain, Inputs>(w, call);
        case 4: return by_span<4, Plain, Inputs>(w, call);
        case 8: return by_span<8, Nibbles, Inputs>(w, call);
    }
}

[[maybe_unused]] void integers(const Matrix& w, const Call& call) { by_bits<IntegerForm, IntegerForm, Rounded>(w, call); }

[[maybe_unused]] void one_term(const Matrix& w, const Call& call) {
    by_bits<FloatForm<1, false>, FloatForm<1, true>, Terms<1>>(w, call);
}

[[maybe_unused]] void two_terms(const Matrix& w, const Call& call) {
    by_bits<FloatForm<2, false>, FloatForm<2, true>, Terms<2>>(w, call);
}

}  // namespace

#define NAME(form) JOINED(avx512_, form)
#define JOINED(a, b) a##b

extern "C" void NAME(FORM)(const Matrix* w, const Call* call) { FORM(*w, *call); }

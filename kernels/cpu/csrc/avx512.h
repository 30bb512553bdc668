// Tiles of the product for AVX-512 with VNNI and BF16.
//
// One row of one block of 128 codes is 16·bits bytes in place, and a field is one shift and one mask away, so the
// kernels read the stored matrix itself: nothing is repacked. Lane i of a vector of sums holds codes 4i … 4i + 3 (of
// either half of a block) for all widths and both forms of inputs, and is added up only when the row ends.
#pragma once

#include <immintrin.h>

#include "inputs.h"

namespace {

// Both halves of a block, a byte a code.
struct Halves {
    __m512i a, b;
};

// Byte-wise shifts of the fields of one plane to bit SHIFT, as rotations of 64-bit lanes; a mask drops the rest.
template <int WIDTH, int SHIFT, int HALF>
inline __m512i rotations() {
    alignas(64) int64_t by[8];
    for (int lane = 0; lane < 8; ++lane) by[lane] = (SHIFT - WIDTH * (lane / (2 * WIDTH) + HALF * 4 / WIDTH)) & 63;
    return _mm512_load_si512(by);
}

template <int WIDTH, int SHIFT>
inline Halves load_plane(const uint8_t* p) {
    if constexpr (WIDTH == 8) {
        return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)};
    } else {
        const __m512i mask = _mm512_set1_epi8(((1 << WIDTH) - 1) << SHIFT);
        __m512i v;
        if constexpr (WIDTH == 4) {
            v = _mm512_loadu_si512(p);
            return {_mm512_and_si512(v, mask), _mm512_and_si512(_mm512_srli_epi16(v, 4), mask)};
        } else if constexpr (WIDTH == 2) {
            v = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        } else {
            v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        }
        return {_mm512_and_si512(_mm512_rolv_epi64(v, rotations<WIDTH, SHIFT, 0>()), mask),
                _mm512_and_si512(_mm512_rolv_epi64(v, rotations<WIDTH, SHIFT, 1>()), mask)};
    }
}

// Block `b` of a row whose second plane starts `second` bytes after the first.
template <int BITS>
inline Halves load_block(const uint8_t* row, int64_t second, int64_t b) {
    constexpr Planes list = planes(BITS);
    constexpr int WIDTH = list.width[0];
    Halves codes = load_plane<WIDTH, 0>(row + b * 16 * WIDTH);
    if constexpr (list.count == 2) {
        constexpr int NEXT = list.width[1];
        const Halves high = load_plane<NEXT, WIDTH>(row + second + b * 16 * NEXT);
        codes = {_mm512_or_si512(codes.a, high.a), _mm512_or_si512(codes.b, high.b)};
    }
    return codes;
}

template <int BITS>
inline void prefetch_block(const uint8_t* row, int64_t second, int64_t b) {
    constexpr Planes list = planes(BITS);
    const char* p = reinterpret_cast<const char*>(row + b * 16 * list.width[0]);
    _mm_prefetch(p, _MM_HINT_T0);
    if constexpr (list.width[0] == 8) _mm_prefetch(p + 64, _MM_HINT_T0);
    if constexpr (list.count == 2)
        _mm_prefetch(reinterpret_cast<const char*>(row + second + b * 16 * list.width[1]), _MM_HINT_T0);
}

// Inputs in int8: products of bytes, summed exactly in int32.
struct IntegerForm {
    using Sums = __m512i;
    using Weights = Halves;
    static constexpr int64_t BLOCK_BYTES = BLOCK;
    static constexpr int ROWS = 4;

    template <int BITS>
    static Weights weights(Halves codes) { return codes; }
    static Sums none() { return _mm512_setzero_si512(); }
    template <int HALF>
    static Sums add(Sums sums, const Weights& w, const uint8_t* x) {
        return _mm512_dpbusd_epi32(sums, HALF ? w.b : w.a, _mm512_load_si512(x + 64 * HALF));
    }
    static __m512 real(Sums sums) { return _mm512_cvtepi32_ps(sums); }
};

// bf16 numbers of the codes at even and at odd places of 64: by a table, for codes below 32.
template <bool NIBBLES>
struct Pairs;

template <>
struct Pairs<false> {
    __m512i even, odd;
};

template <>
struct Pairs<true> {  // 8 bits are two nibbles: code = high + low, each of which has a table
    __m512i even, odd, even_high, odd_high;
};

// Entry i of a table: `step`·(i mod 16 if nibbles, else i), all of which are exact in bf16.
template <bool NIBBLES>
inline __m512i table(int step) {
    alignas(64) uint16_t entries[32];
    for (int i = 0; i < 32; ++i) entries[i] = to_bfloat(static_cast<float>(step * (NIBBLES ? i % 16 : i)));
    return _mm512_load_si512(entries);
}

template <bool NIBBLES>
inline Pairs<NIBBLES> look_up(__m512i codes) {
    const __m512i low = table<NIBBLES>(1);
    Pairs<NIBBLES> found;
    found.even = _mm512_permutexvar_epi16(codes, low);
    found.odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), low);
    if constexpr (NIBBLES) {
        const __m512i high = table<NIBBLES>(16);
        found.even_high = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), high);
        found.odd_high = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), high);
    }
    return found;
}

// Inputs as TERMS bf16 numbers each: codes are exact in bf16 and sums are fp32. One term is a bf16 input itself; of an
// fp32 input two keep 16 bits or more. A block of inputs is, for each term, four vectors: even and odd places, twice.
template <int TERMS, bool NIBBLES>
struct FloatForm {
    using Sums = __m512;
    struct Weights {
        Pairs<NIBBLES> half[2];
    };
    static constexpr int64_t BLOCK_BYTES = TERMS * 2 * BLOCK;
    static constexpr int ROWS = 2;

    template <int BITS>
    static Weights weights(Halves codes) { return {{look_up<NIBBLES>(codes.a), look_up<NIBBLES>(codes.b)}}; }
    static Sums none() { return _mm512_setzero_ps(); }
    template <int HALF>
    static Sums add(Sums sums, const Weights& w, const uint8_t* x) {
        const Pairs<NIBBLES>& pairs = w.half[HALF];
        for (int term = 0; term < TERMS; ++term) {
            const uint8_t* at = x + 256 * term + 128 * HALF;
            const __m512bh even = (__m512bh)_mm512_load_si512(at), odd = (__m512bh)_mm512_load_si512(at + 64);
            sums = _mm512_dpbf16_ps(sums, (__m512bh)pairs.even, even);
            sums = _mm512_dpbf16_ps(sums, (__m512bh)pairs.odd, odd);
            if constexpr (NIBBLES) {
                sums = _mm512_dpbf16_ps(sums, (__m512bh)pairs.even_high, even);
                sums = _mm512_dpbf16_ps(sums, (__m512bh)pairs.odd_high, odd);
            }
        }
        return sums;
    }
    static __m512 real(Sums sums) { return sums; }
};

// One block of one row with one token, times the scales of its SPAN-wide units.
template <class Form, int SPAN>
inline __m512 add_block(__m512 total, const typename Form::Weights& w, const uint8_t* x, const float* scale) {
    if constexpr (SPAN == 128) {
        const auto sums = Form::template add<1>(Form::template add<0>(Form::none(), w, x), w, x);
        return _mm512_fmadd_ps(Form::real(sums), _mm512_set1_ps(scale[0]), total);
    } else {
        auto unit = [&](int half) {
            const float* s = scale + half * 64 / SPAN;
            const __m512 first = _mm512_set1_ps(s[0]);
            return SPAN == 64 ? first : _mm512_mask_broadcastss_ps(first, 0xff00, _mm_load_ss(s + 1));
        };
        total = _mm512_fmadd_ps(Form::real(Form::template add<0>(Form::none(), w, x)), unit(0), total);
        return _mm512_fmadd_ps(Form::real(Form::template add<1>(Form::none(), w, x)), unit(1), total);
    }
}

// ROWS rows of codes, and what belongs to them.
struct Strip {
    const uint8_t* codes;
    int64_t row_bytes, second, blocks;
    const float* scale;  // [rows, stride], by unit of SPAN columns
    int64_t stride;
    const float* offset;  // [rows, groups], scale · zero by group
    int64_t groups;       // a multiple of 16, zeros beyond the last
    int64_t ahead;        // bytes to what is wanted next
};

// Inputs of some tokens, `pitch` bytes apart, and their sums [tokens, groups of the strip].
struct Tokens {
    const uint8_t* x;
    int64_t pitch;
    const float* sums;
};

// The products of ROWS rows with TOKENS tokens: y[row + token·ROWS]. Lanes start with what zero points take off.
// Not inlined: several callers share it, and it is most of what there is to compile.
template <int BITS, class Form, int SPAN, int ROWS, int TOKENS>
[[gnu::noinline]] void strip_product(const Strip& s, const Tokens& in, float* y) {
    __m512 total[ROWS][TOKENS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < s.groups; g += 16)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t)
                total[r][t] = _mm512_fnmadd_ps(_mm512_loadu_ps(s.offset + r * s.groups + g),
                                               _mm512_loadu_ps(in.sums + t * s.groups + g), total[r][t]);
    for (int64_t b = 0; b < s.blocks; ++b) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t* row = s.codes + r * s.row_bytes;
            if (s.ahead) prefetch_block<BITS>(row + s.ahead, s.second, b);
            const auto w = Form::template weights<BITS>(load_block<BITS>(row, s.second, b));
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t)
                total[r][t] = add_block<Form, SPAN>(total[r][t], w, in.x + t * in.pitch + b * Form::BLOCK_BYTES,
                                                    s.scale + r * s.stride + b * (BLOCK / SPAN));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) y[r + t * ROWS] = _mm512_reduce_add_ps(total[r][t]);
}

}  // namespace

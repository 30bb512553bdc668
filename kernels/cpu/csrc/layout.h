// The layout of kernels/packing.py, read without vector instructions of any particular machine.
//
// Everything here is in an unnamed namespace on purpose: the sources that include it are compiled for different
// machines, and a linker that merged their copies could leave one that this machine cannot run.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "abi.h"

namespace {

constexpr int64_t BLOCK = 128;

struct Planes {
    int width[3];
    int count;
};

constexpr Planes planes(int bits) {
    switch (bits) {
        case 3: return {{2, 1, 0}, 2};
        case 5: return {{4, 1, 0}, 2};
        case 6: return {{4, 2, 0}, 2};
        case 7: return {{4, 2, 1}, 3};
        default: return {{bits, 0, 0}, 1};
    }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Bytes of one plane of a row.
constexpr int64_t plane_bytes(int64_t codes, int width) {
    return codes / BLOCK * BLOCK * width / 8 + ceil_div(codes % BLOCK * width, 8);
}

// One block of one plane, of at most 128 codes, added at its place to codes[0 … 135].
inline void unpack_block(const uint8_t* bytes, int width, int shift, int64_t codes, uint8_t* out) {
    const int64_t field = ceil_div(codes * width, 8);
    const unsigned mask = (1u << width) - 1;
    for (int f = 0; f < 8 / width; ++f)
#pragma omp simd
        for (int64_t r = 0; r < field; ++r)
            out[f * field + r] |= static_cast<uint8_t>(((bytes[r] >> (f * width)) & mask) << shift);
}

// Codes [first block, last block) of a row of `total` codes. Room: 128 a block, and 8 more.
inline void unpack(const uint8_t* row, int bits, int64_t total, int64_t first, int64_t last, uint8_t* out) {
    std::memset(out, 0, (last - first) * BLOCK + 8);
    const Planes list = planes(bits);
    for (int p = 0, shift = 0; p < list.count; shift += list.width[p++]) {
        const int width = list.width[p];
        for (int64_t b = first; b < last; ++b) {
            const int64_t codes = total - b * BLOCK < BLOCK ? total - b * BLOCK : BLOCK;
            unpack_block(row + b * BLOCK * width / 8, width, shift, codes, out + (b - first) * BLOCK);
        }
        row += plane_bytes(total, width);
    }
}

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Exact, subnormal numbers included: the exponent is set right by a multiplication.
inline float from_half(uint16_t half) {
    const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return from_bits(to_bits(from_bits(magnitude) * 0x1p112f) | special | sign);
}

inline float from_bfloat(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even.
inline uint16_t to_bfloat(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// Memory of one call, aligned for vectors. A failed allocation ends the process, as it does in torch's allocator.
template <class T>
class Buffer {
public:
    explicit Buffer(int64_t count) : data_(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T) + 64, 64)))) {
        if (!data_) std::abort();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() { return data_; }
    T* get() const { return data_; }

private:
    T* data_;
};

// Scales and zeros of rows [first, first + count): fp32 [count, stride], 0 beyond the last group.
class Grid {
public:
    Grid(const Matrix& w, int64_t rows, int64_t stride)
        : scale(rows * stride), zero(rows * stride), stride(stride), w_(w), codes_(rows * w.groups + 2 * BLOCK + 8) {
        std::memset(scale, 0, rows * stride * sizeof(float));
        std::memset(zero, 0, rows * stride * sizeof(float));
    }

    void load(int64_t first, int64_t count) {
        const int64_t groups = w_.groups, start = first * groups, block = start / BLOCK;
        const uint16_t *scales = w_.scale + start, *zeros = static_cast<const uint16_t*>(w_.zero) + start;
        if (w_.zero_form == CODES) unpack_zeros(block, ceil_div(start + count * groups, BLOCK));
        const uint8_t* codes = codes_ + (start - block * BLOCK);
        const float middle = static_cast<float>(1 << (w_.bits - 1));
        for (int64_t r = 0; r < count; ++r, scales += groups, zeros += groups, codes += groups) {
            fill(scale + r * stride, [&](int64_t g) { return from_half(scales[g]); });
            switch (w_.zero_form) {
                case MIDDLE: fill(zero + r * stride, [&](int64_t) { return middle; }); break;
                case CODES: fill(zero + r * stride, [&](int64_t g) { return static_cast<float>(codes[g]); }); break;
                case HALVES: fill(zero + r * stride, [&](int64_t g) { return from_half(zeros[g]); }); break;
            }
        }
    }

    // Σ s·z·(Σ x): what zero points take off the product of row r, from the sums of inputs over groups.
    float offset(int64_t r, const float* sums) const {
        const float *s = scale.get() + r * stride, *z = zero.get() + r * stride;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t g = 0; g < w_.groups; ++g) total += s[g] * z[g] * sums[g];
        return total;
    }

    Buffer<float> scale, zero;
    const int64_t stride;

private:
    template <class F>
    void fill(float* out, F value) const {
#pragma omp simd
        for (int64_t g = 0; g < w_.groups; ++g) out[g] = value(g);
    }

    // Short rows have few groups, and many of them share a block: it stays until others are wanted.
    void unpack_zeros(int64_t first, int64_t last) {
        if (first == first_ && last == last_) return;
        unpack(static_cast<const uint8_t*>(w_.zero), w_.bits, w_.rows * w_.groups, first, last, codes_);
        first_ = first, last_ = last;
    }

    const Matrix& w_;
    Buffer<uint8_t> codes_;
    int64_t first_ = -1, last_ = -1;  // blocks of zeros in codes_
};

// Rows are shared out in tiles, one contiguous part a thread.
template <class F>
void share(int64_t rows, int64_t tile, int threads, F work) {
    const int64_t tiles = ceil_div(rows, tile);
    if (threads <= 1 || tiles == 1) return work(int64_t{0}, rows);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
        const int64_t first = tiles * t / threads * tile, last = tiles * (t + 1) / threads * tile;
        if (first < last) work(first, last < rows ? last : rows);
    }
}

}  // namespace

// The kernels in plain C++, for any machine and any group size; a compiler vectorizes the inner loops.
//
// Compiled several times, for machines of different age: ENTRY(name) is what the functions are called then.
#include "inputs.h"

namespace {

// Σ s·(Σ c·x) − Σ (s·z)·(Σ x) of one row, with x of type float, or int8_t and sums in integers.
template <class T, class Sum>
float row_product(const Matrix& w, const uint8_t* codes, const float* scale, const T* x) {
    float total = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t start = g * w.group_size;
        const int64_t stop = start + w.group_size < w.columns ? start + w.group_size : w.columns;
        Sum sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = start; k < stop; ++k) sum += static_cast<Sum>(codes[k]) * static_cast<Sum>(x[k]);
        total += scale[g] * static_cast<float>(sum);
    }
    return total;
}

template <class Product>
void rows_product(const Matrix& w, const Call& call, Product product) {
    share(w.rows, 1, call.threads, [&](int64_t first, int64_t last) {
        const int64_t blocks = ceil_div(w.columns, BLOCK);
        Buffer<uint8_t> codes(blocks * BLOCK + 8);
        Grid grid(w, 1, w.groups);
        for (int64_t row = first; row < last; ++row) {
            unpack(w.codes + row * w.row_bytes, w.bits, w.columns, 0, blocks, codes);
            grid.load(row, 1);
            for (int64_t t = 0; t < call.tokens; ++t) call.y[t * w.rows + row] = product(codes, grid, t);
        }
    });
}

void integer_product(const Matrix& w, const Call& call) {
    Integers x(w, call, w.groups);
    rows_product(w, call, [&](const uint8_t* codes, Grid& grid, int64_t t) {
        const float sum = row_product<int8_t, int32_t>(w, codes, grid.scale, x.values + t * x.width);
        return x.step[t] * (sum - grid.offset(0, x.sums + t * x.stride));
    });
}

void float_product(const Matrix& w, const Call& call) {
    Buffer<float> x(call.tokens * w.columns), sums(call.tokens * w.groups);
    for (int64_t t = 0; t < call.tokens; ++t) {
        to_float(call, t, w.columns, x + t * w.columns);
        sum_groups(x + t * w.columns, w.columns, w.group_size, sums + t * w.groups);
    }
    rows_product(w, call, [&](const uint8_t* codes, Grid& grid, int64_t t) {
        const float sum = row_product<float, float>(w, codes, grid.scale, x + t * w.columns);
        return sum - grid.offset(0, sums + t * w.groups);
    });
}

// (code − zero) · scale, the order of `PackedInteger.dequantize`, so that fp32 is equal bit for bit. `round` is a type
// of its own, not a pointer, so that it is inlined into the vectorized loop.
template <class Out, class Round>
void dequantize_rows(const Matrix& w, int64_t first, int64_t last, Out* out, int threads, Round round) {
    share(last - first, 1, threads, [&](int64_t begin, int64_t end) {
        const int64_t blocks = ceil_div(w.columns, BLOCK);
        Buffer<uint8_t> codes(blocks * BLOCK + 8);
        Grid grid(w, 1, w.groups);
        for (int64_t r = begin; r < end; ++r) {
            unpack(w.codes + (first + r) * w.row_bytes, w.bits, w.columns, 0, blocks, codes);
            grid.load(first + r, 1);
            Out* line = out + r * w.columns;
            for (int64_t g = 0; g < w.groups; ++g) {
                const int64_t start = g * w.group_size;
                const int64_t stop = start + w.group_size < w.columns ? start + w.group_size : w.columns;
                const float scale = grid.scale[g], zero = grid.zero[g];
#pragma omp simd
                for (int64_t k = start; k < stop; ++k) line[k] = round((static_cast<float>(codes[k]) - zero) * scale);
            }
        }
    });
}

// Some number that depends on every whole 2 KiB of the data, which are asked for one such piece ahead.
uint64_t read_words(const uint64_t* words, int64_t count, int threads) {
    uint64_t all = 0;
    share(count, 256, threads, [&](int64_t first, int64_t last) {
        uint64_t seen = 0;
        for (int64_t i = first; i + 256 <= last; i += 256) {
            for (int64_t line = 0; line < 256; line += 8) __builtin_prefetch(words + i + line + 256);
#pragma omp simd reduction(^ : seen)
            for (int64_t k = 0; k < 256; ++k) seen ^= words[i + k];
        }
        __atomic_fetch_xor(&all, seen, __ATOMIC_RELAXED);
    });
    return all;
}

}  // namespace

extern "C" {

uint64_t ENTRY(read_all)(const void* data, int64_t bytes, int32_t threads) {
    return read_words(static_cast<const uint64_t*>(data), bytes / 8, threads);
}

void ENTRY(multiply)(const Matrix* w, const Call* call) {
    call->largest ? integer_product(*w, *call) : float_product(*w, *call);
}

void ENTRY(dequantize)(const Matrix* w, int64_t first, int64_t last, void* out, int32_t dtype, int32_t threads) {
    if (dtype == BF16)
        dequantize_rows(*w, first, last, static_cast<uint16_t*>(out), threads, [](float v) { return to_bfloat(v); });
    else
        dequantize_rows(*w, first, last, static_cast<float*>(out), threads, [](float v) { return v; });
}
}

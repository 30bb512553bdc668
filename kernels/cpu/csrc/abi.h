// What crosses the boundary to Python: plain structures, mirrored field by field in kernels/cpu/library.py.
#pragma once

#include <cstdint>

enum ZeroForm : int32_t { MIDDLE = 0, CODES = 1, HALVES = 2 };
enum Float : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 };

// A weight matrix [rows, columns] as `kernels.packed.PackedInteger` stores it: scale · (code − zero).
struct Matrix {
    const uint8_t* codes;   // [rows, row_bytes], planar: see kernels/packing.py
    const uint16_t* scale;  // fp16 [rows, groups]
    const void* zero;       // nothing (zero = 2^(bits − 1)), codes of all zeros in one row, or fp16 [rows, groups]
    int64_t rows, columns, row_bytes, groups, group_size;
    int32_t bits;
    ZeroForm zero_form;
};

// The inputs [tokens, columns] of one call, and where its outputs go.
struct Call {
    const void* x;
    const float* step;  // [tokens], the scales that inputs are rounded with; null: max|x| of each token over `largest`
    float* y;           // [tokens, rows]
    int64_t tokens;
    Float dtype;        // of x
    int32_t largest;    // magnitude that an input is rounded to, at most 127; 0: inputs are not rounded
    int32_t threads;
};

// Which of the kernels this machine can run; compiled, like everything that runs before the choice, for any machine.
#include "abi.h"

#define PUBLIC __attribute__((visibility("default")))

extern "C" {

void plain_multiply(const Matrix*, const Call*);
uint64_t plain_read_all(const void* data, int64_t bytes, int32_t threads);
void plain_dequantize(const Matrix*, int64_t first, int64_t last, void* out, int32_t dtype, int32_t threads);

#if defined(__x86_64__)
void v3_multiply(const Matrix*, const Call*);
uint64_t v3_read_all(const void* data, int64_t bytes, int32_t threads);
void v3_dequantize(const Matrix*, int64_t first, int64_t last, void* out, int32_t dtype, int32_t threads);
void avx512_integers(const Matrix*, const Call*);
void avx512_one_term(const Matrix*, const Call*);
void avx512_two_terms(const Matrix*, const Call*);

// Whether AVX-512 kernels take the matrix: what they lack the others have.
static bool has_wide(const Matrix* w) {
    const bool bits = w->bits == 2 || w->bits == 3 || w->bits == 4 || w->bits == 8;
    const int64_t g = w->group_size;
    return bits && w->rows >= 4 && (g == 32 || g == 64 || g % 128 == 0 || g >= w->columns);
}

// 0: any machine; 1: x86-64-v3, with AVX2; 2: AVX-512 with VNNI and BF16.
PUBLIC int32_t level() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return 0;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    return wide ? 2 : 1;
}

PUBLIC void multiply(const Matrix* w, const Call* call, int32_t level) {
    if (level == 0) return plain_multiply(w, call);
    if (level == 1 || !has_wide(w)) return v3_multiply(w, call);
    if (call->largest) return avx512_integers(w, call);
    call->dtype == BF16 ? avx512_one_term(w, call) : avx512_two_terms(w, call);
}

PUBLIC void dequantize(const Matrix* w, int64_t first, int64_t last, void* out, int32_t dtype, int32_t threads, int32_t level) {
    (level ? v3_dequantize : plain_dequantize)(w, first, last, out, dtype, threads);
}

PUBLIC uint64_t read_all(const void* data, int64_t bytes, int32_t threads, int32_t level) {
    return (level ? v3_read_all : plain_read_all)(data, bytes, threads);
}
#else
PUBLIC int32_t level() { return 0; }

PUBLIC void multiply(const Matrix* w, const Call* call, int32_t) { plain_multiply(w, call); }

PUBLIC void dequantize(const Matrix* w, int64_t first, int64_t last, void* out, int32_t dtype, int32_t threads, int32_t) {
    plain_dequantize(w, first, last, out, dtype, threads);
}

PUBLIC uint64_t read_all(const void* data, int64_t bytes, int32_t threads, int32_t) {
    return plain_read_all(data, bytes, threads);
}
#endif
}

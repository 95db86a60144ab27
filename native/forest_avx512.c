/* The kernels with sixteen floats per vector. They run only if the CPU has AVX-512 F, BW, DQ and VL. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define ST_AVX2
#define ST_LANES 16
#define ST_NAME "avx512"
#include "forest_kernel.h"

const st_kernel *st_kernel_avx512(void) { return &kernel; }

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "forest.h"
const st_kernel *st_kernel_avx512(void) { return NULL; }
#endif

/* The kernels with eight floats per vector. They run only if the CPU has AVX2. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define ST_AVX2
#define ST_LANES 8
#define ST_NAME "avx2"
#include "forest_kernel.h"

const st_kernel *st_kernel_avx2(void) { return &kernel; }

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "forest.h"
const st_kernel *st_kernel_avx2(void) { return NULL; }
#endif

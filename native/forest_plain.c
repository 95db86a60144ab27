/* The kernels in plain C with four floats per vector, which the compiler turns into SSE2 or NEON. */
#define ST_LANES 4
#define ST_NAME "scalar"
#include "forest_kernel.h"

const st_kernel *st_kernel_plain(void) { return &kernel; }

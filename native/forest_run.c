/* Runs a forest over a batch: turns rows into columns, evaluates the trees, and turns sums into labels and scores. */
#include "forest.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Size of a tile: its columns and sums should stay in the L2 cache while all trees are evaluated. */
#ifndef TILE_BYTES
#define TILE_BYTES 32000
#endif
#define TILE_BLOCKS_MAX 16

static float logistic(float x) {
    const float v = 1 / (1 + expf(-fabsf(x)));
    return x < 0 ? 1 - v : v;
}

/* sqrt(2) times the inverse error function of 2p - 1, in Winitzki's approximation with a = 0.147, as in ONNX Runtime.
   */
static float probit(float p) {
    const float x = 2 * p - 1, log_term = logf((1 - x) * (1 + x));
    const float half = 2 / ((float)3.14159265358979323846 * 0.147f) + 0.5f * log_term;
    const float root = sqrtf(-half + sqrtf(half * half - 1 / 0.147f * log_term));
    return (float)1.41421356237309504880 * (x < 0 ? -root : root);
}

#define ST_SCORE float
#define ST_TYPED(name) name##_float
#include "forest_scores.h"
#undef ST_SCORE
#undef ST_TYPED
#define ST_SCORE double
#define ST_TYPED(name) name##_double
#include "forest_scores.h"

static float in_set(const st_forest *f, const st_column *column, double value) {
    if (isnan(value)) return column->nan_low ? 0 : 1;
    if (column->whole) value = trunc(value);
    const double *set = f->set_values + column->first;
    uint32_t low = 0, high = column->count;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (set[middle] < value) low = middle + 1;
        else high = middle;
    }
    return low < column->count && set[low] == value ? 0 : 1;
}

static float rank(const st_forest *f, const st_column *column, double value) {
    if (isnan(value)) return column->kind == ST_COLUMN_NAN_LOW ? -INFINITY : INFINITY;
    const double *ranks = f->ranks + f->rank_begin[column->feature];
    uint32_t n = f->rank_begin[column->feature + 1] - f->rank_begin[column->feature];
    const double *base = ranks;
    while (n > 1) { /* branch-free, because each comparison would be mispredicted half of the time */
        const uint32_t half = n / 2;
        base += base[half - 1] < value ? half : 0;
        n -= half;
    }
    return (float)(base - ranks + (n && *base < value));
}

static int32_t bit_number(const st_column *index, double value) {
    if (isnan(value)) return (int32_t)index->limit + 2;
    if (!(value > -1 && value < index->limit + 1.0)) return (int32_t)index->limit + 1;
    const int32_t number = (int32_t)value;
    return number == value || index->whole ? number : (int32_t)index->limit + 1;
}

static void bits_column(const st_forest *f, const st_column *column, const int32_t *number, size_t n, float *to) {
    const uint32_t *bits = f->set_bits + column->bits;
    for (size_t r = 0; r < n; r++) to[r] = (float)(int32_t)(~(bits[number[r] >> 5] >> (number[r] & 31)) & 1);
}

#define ST_ROW float
#define ST_COLUMN_OF float_column
#include "forest_column.h"
#undef ST_ROW
#undef ST_COLUMN_OF
#define ST_ROW double
#define ST_WIDE
#define ST_COLUMN_OF double_column
#include "forest_column.h"

static void columns_of(const st_forest *f, const void *rows, size_t first, size_t n, size_t width, float *to,
                       size_t stride) {
    /* Columns of bit numbers come last but are computed first, because ST_COLUMN_BITS columns read them. */
    for (uint32_t i = 0, c = f->first_index; i < f->n_columns; i++, c = c + 1 < f->n_columns ? c + 1 : 0) {
        if (c == f->n_columns) c = 0; /* there are no columns of bit numbers */
        if (f->wide) double_column(f, f->columns + c, (const double *)rows + first * width, n, width, to, c, stride);
        else float_column(f, f->columns + c, (const float *)rows + first * width, n, width, to, c, stride);
    }
}

/* Compute the leaves of one row in n consecutive trees, by descent as in forest_kernel.h, but with trees side by side.
   */
#define ALONE 8
static inline __attribute__((always_inline)) void leaves_alone(const st_forest *f, const st_forest_tree *tree,
                                                               const int n, const float *row, uint32_t *leaf) {
    const st_step *steps = f->steps;
    uint32_t at[ALONE];
    for (int t = 0; t < n; t++) at[t] = tree[t].root;
    for (uint32_t moved = 1; moved;) {
        for (int d = 0; d < 2; d++) {
            moved = 0;
            for (int t = 0; t < n; t++) {
                const st_step *step = steps + at[t];
                const uint32_t next = step->left + !(row[step->column] <= step->threshold);
                moved |= next ^ at[t];
                at[t] = next;
            }
        }
    }
    for (int t = 0; t < n; t++) leaf[t] = steps[at[t]].leaf;
}

static void run_alone(const st_forest *f, const void *rows, size_t first, size_t n, size_t width, float *row,
                      double *sums, uint8_t *has, int64_t *label, void *scores) {
    float *narrow = (float *)sums;
    for (size_t r = first; r < first + n; r++) {
        columns_of(f, rows, r, 1, width, row, 1);
        memset(sums, 0, f->n_targets * sizeof(double));
        memset(has, 0, f->n_targets);
        for (uint32_t t = 0; t < f->n_trees; t += ALONE) {
            uint32_t leaf[ALONE];
            const uint32_t count = f->n_trees - t < ALONE ? f->n_trees - t : ALONE;
            if (count == ALONE) leaves_alone(f, f->trees + t, ALONE, row, leaf);
            else for (uint32_t i = 0; i < count; i++) leaves_alone(f, f->trees + t + i, 1, row, leaf + i);
            if (f->leaf_value && f->aggregate <= ST_AVERAGE)
                for (uint32_t i = 0; i < count; i++) narrow[f->trees[t + i].target] += f->leaf_value[leaf[i]];
            else if (f->wide)
                for (uint32_t i = 0; i < count; i++) vote_double(f, leaf[i], sums, has);
            else
                for (uint32_t i = 0; i < count; i++) vote_float(f, leaf[i], narrow, has);
        }
        const uint8_t *voted = f->votes == ST_SOME_TARGETS ? has : f->voted;
        if (f->wide) finish_double(f, sums, voted, label, scores, r);
        else finish_float(f, narrow, voted, label, scores, r);
    }
}

/* Evaluate a tile whose sums the kernel computes. sums: [block][target][row]. */
static void run_sums(const st_forest *f, const st_kernel *kernel, const float *columns, size_t first, size_t n,
                     float *sums, float *row_sum, int64_t *label, void *scores) {
    const uint32_t n_blocks = (uint32_t)((n + ST_BLOCK - 1) / ST_BLOCK);
    memset(sums, 0, (size_t)n_blocks * f->n_targets * ST_BLOCK * sizeof(float));
    kernel->sums(f, columns, n_blocks, (uint32_t)(n - (size_t)(n_blocks - 1) * ST_BLOCK), sums);
    for (size_t r = 0; r < n; r++) {
        const float *sum = sums + r / ST_BLOCK * f->n_targets * ST_BLOCK + r % ST_BLOCK;
        for (uint32_t k = 0; k < f->n_targets; k++) row_sum[k] = sum[k * ST_BLOCK];
        finish_float(f, row_sum, f->voted, label, scores, first + r);
    }
}

/* Evaluate a tile through the leaves of each row. sums: [row][target]. */
static void run_votes(const st_forest *f, const st_kernel *kernel, const float *columns, size_t first, size_t n,
                      double *sums, uint8_t *has, int64_t *label, void *scores) {
    float *narrow = (float *)sums;
    uint32_t leaf[ST_BLOCK];
    memset(sums, 0, n * f->n_targets * sizeof(double));
    memset(has, 0, n * f->n_targets);
    for (uint32_t t = 0; t < f->n_trees; t++) {
        for (size_t r = 0; r < n; r += ST_BLOCK) {
            const uint32_t rows = n - r < ST_BLOCK ? (uint32_t)(n - r) : ST_BLOCK;
            kernel->leaves(f, f->trees + t, columns + r * f->n_columns, rows, leaf);
            for (uint32_t i = 0; i < rows; i++) {
                const size_t at = (r + i) * f->n_targets;
                if (f->wide) vote_double(f, leaf[i], sums + at, has + at);
                else vote_float(f, leaf[i], narrow + at, has + at);
            }
        }
    }
    for (size_t r = 0; r < n; r++) {
        const size_t at = r * f->n_targets;
        const uint8_t *voted = f->votes == ST_SOME_TARGETS ? has + at : f->voted;
        if (f->wide) finish_double(f, sums + at, voted, label, scores, first + r);
        else finish_float(f, narrow + at, voted, label, scores, first + r);
    }
}

static size_t tile_blocks(const st_forest *f, size_t n) {
    const size_t block_bytes = ((size_t)f->n_columns + 3 * f->n_targets) * ST_BLOCK * sizeof(float);
    size_t blocks = TILE_BYTES / block_bytes, needed = (n + ST_BLOCK - 1) / ST_BLOCK;
    if (blocks > TILE_BLOCKS_MAX) blocks = TILE_BLOCKS_MAX;
    if (blocks > needed) blocks = needed;
    return blocks ? blocks : 1;
}

int st_forest_run(const st_forest *f, const st_kernel *kernel, const void *rows, size_t n, size_t width,
                  int alone, int64_t *label, void *scores) {
    if (!n) return ST_OK;
    alone = alone || n <= f->alone_rows;
    const size_t blocks = alone ? 1 : tile_blocks(f, n), stride = alone ? 1 : ST_BLOCK;
    const size_t column_floats = blocks * f->n_columns * stride, sum_count = blocks * f->n_targets * stride;
    /* The memory holds columns, sums as floats or doubles, one row's sums, and which targets have votes. */
    const size_t bytes = column_floats * sizeof(float) + 8 + (sum_count + f->n_targets) * sizeof(double) + sum_count;
    double small[512];
    char *memory = bytes <= sizeof small ? (char *)small : malloc(bytes);
    if (!memory) return ST_NO_MEMORY;
    float *columns = (float *)memory;
    double *sums = (double *)(memory + (column_floats * sizeof(float) + 7) / 8 * 8);
    double *row_sum = sums + sum_count;
    uint8_t *has = (uint8_t *)(row_sum + f->n_targets);
    if (alone) {
        run_alone(f, rows, 0, n, width, columns, sums, has, label, scores);
    } else {
        const size_t tile = blocks * ST_BLOCK;
        for (size_t first = 0; first < n; first += tile) {
            const size_t count = n - first < tile ? n - first : tile;
            for (size_t r = 0; r < count; r += ST_BLOCK) {
                const size_t here = count - r < ST_BLOCK ? count - r : ST_BLOCK;
                float *block = columns + r * f->n_columns;
                if (here < ST_BLOCK) /* the kernels also read the unused rows of the last block */
                    memset(block, 0, (size_t)f->n_columns * ST_BLOCK * sizeof(float));
                columns_of(f, rows, first + r, here, width, block, ST_BLOCK);
            }
            if (f->leaf_value && f->aggregate <= ST_AVERAGE)
                run_sums(f, kernel, columns, first, count, (float *)sums, (float *)row_sum, label, scores);
            else
                run_votes(f, kernel, columns, first, count, sums, has, label, scores);
        }
    }
    if (memory != (char *)small) free(memory);
    return ST_OK;
}

int st_forest_reach(const st_forest *f, const st_kernel *kernel, const void *rows, size_t n, size_t width,
                    uint8_t *reached, const int64_t *wanted, uint8_t *met) {
    float *columns = malloc((size_t)f->n_columns * ST_BLOCK * sizeof(float));
    uint32_t leaf[ST_BLOCK];
    if (!columns) return ST_NO_MEMORY;
    memset(columns, 0, (size_t)f->n_columns * ST_BLOCK * sizeof(float));
    for (size_t first = 0; first < n; first += ST_BLOCK) {
        const uint32_t here = n - first < ST_BLOCK ? (uint32_t)(n - first) : ST_BLOCK;
        columns_of(f, rows, first, here, width, columns, ST_BLOCK);
        for (uint32_t t = 0; t < f->n_trees; t++) {
            kernel->leaves(f, f->trees + t, columns, here, leaf);
            for (uint32_t i = 0; i < here; i++) {
                const uint32_t node = f->leaf_node[leaf[i]];
                reached[node] = 1;
                met[first + i] |= node == wanted[first + i];
            }
        }
    }
    free(columns);
    return ST_OK;
}

const st_kernel *st_kernel_choose(const char *level) {
    int avx2 = 0, avx512 = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    avx2 = __builtin_cpu_supports("avx2") != 0;
    avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    if (avx512 && (!level || !strcmp(level, "avx512"))) return st_kernel_avx512();
    if (avx2 && (!level || !strcmp(level, "avx2"))) return st_kernel_avx2();
    return !level || !strcmp(level, "scalar") ? st_kernel_plain() : NULL;
}

/* Evaluates trees for a block of rows. forest_plain.c, forest_avx2.c and forest_avx512.c include this file once each
   and define ST_LANES (floats per vector) and ST_NAME.

   Small trees use QuickScorer (Lucchese et al., SIGIR 2015), vectorised over rows (SIGIR 2016). The leaves of a tree
   are numbered from left to right, one bit each. Every node is tested for every row, in any order and without branches.
   If the test says "right", the leaves of the left subtree are cleared. The lowest remaining bit is the row's leaf.
   Leaves 32 to 63 are in a second word with its own list of nodes, because most nodes change only one word.

   Large trees: several rows descend side by side, so that their loads overlap, and without branches to predict. */

#include <string.h>

#include "forest.h"

#if defined(__AVX2__) || defined(ST_AVX2)
#include <immintrin.h>
#endif

#define ST_INLINE static inline __attribute__((always_inline))
#define ST_SPREAD (ST_BLOCK / ST_LANES) /* vectors per block */
#define ST_DESCEND 8                    /* rows that descend together: as many as the registers allow */

typedef float floats __attribute__((vector_size(ST_LANES * 4)));
typedef int32_t ints __attribute__((vector_size(ST_LANES * 4)));

ST_INLINE floats load(const float *from) {
    floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

ST_INLINE void store(float *to, floats v) { memcpy(to, &v, sizeof v); }

ST_INLINE ints all(int32_t v) { return v - (ints){0}; }

/* In rows where x <= threshold is false (also for NaN), clear the leaves outside `keep`. */
ST_INLINE ints narrow(ints alive, floats x, float threshold, uint32_t keep) {
#if ST_LANES == 16
    __mmask16 right = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(threshold), _CMP_NLE_UQ);
    return (ints)_mm512_mask_and_epi32((__m512i)alive, right, (__m512i)alive, _mm512_set1_epi32((int)keep));
#elif ST_LANES == 8
    /* threshold >= x, so that x can be a memory operand; with x <= threshold the compiler adds a load */
    __m256 left = _mm256_cmp_ps(_mm256_set1_ps(threshold), (__m256)x, _CMP_GE_OQ);
    return alive & ((ints)left | all((int32_t)keep));
#else
    return alive & ((ints)(x <= threshold - (floats){0}) | all((int32_t)keep));
#endif
}

/* The number of the lowest set bit, or -127 if no bit is set: the exponent of that bit as a float. */
ST_INLINE ints lowest_bit(ints bits) {
    floats power = __builtin_convertvector(bits & -bits, floats);
    return (((ints)power >> 23) & 255) - 127;
}

ST_INLINE floats gather(const float *base, ints at) {
#if ST_LANES == 16
    return (floats)_mm512_i32gather_ps((__m512i)at, base, 4);
#elif ST_LANES == 8
    return (floats)_mm256_i32gather_ps(base, (__m256i)at, 4);
#else
    floats v;
    for (int i = 0; i < ST_LANES; i++) v[i] = base[at[i]];
    return v;
#endif
}

/* Compute the leaves of n_vectors * ST_LANES rows, as numbers within the tree. */
ST_INLINE void exits(const st_forest *forest, const st_forest_tree *tree, const float *block, const int n_vectors,
                     ints *exit) {
    const st_test *test = forest->tests + tree->first_test;
    for (uint32_t word = 0; word < tree->words; word++) {
        ints alive[ST_SPREAD];
        for (int v = 0; v < n_vectors; v++) alive[v] = all(-1);
        for (const st_test *end = test + tree->n_tests[word]; test != end; test++) {
            const float *x = block + test->column;
            for (int v = 0; v < n_vectors; v++)
                alive[v] = narrow(alive[v], load(x + v * ST_LANES), test->threshold, test->keep);
        }
        for (int v = 0; v < n_vectors; v++) {
            ints bit = lowest_bit(alive[v]);
            if (word == 0) {
                exit[v] = bit;
            } else {
                ints none_before = exit[v] < 0;
                exit[v] = (none_before & (bit + 32)) | (~none_before & exit[v]);
            }
        }
    }
}

/* Compute the leaves of ST_DESCEND rows, as numbers within the forest. */
ST_INLINE void descend(const st_step *steps, const st_forest_tree *tree, const float *block, uint32_t *leaf) {
    uint32_t at[ST_DESCEND];
    for (int r = 0; r < ST_DESCEND; r++) at[r] = tree->root;
    for (uint32_t depth = 0; depth < tree->depth; depth += 4) {
        uint32_t moved = 0;
        for (int d = 0; d < 4; d++) {
            moved = 0;
            for (int r = 0; r < ST_DESCEND; r++) {
                const st_step *step = steps + at[r];
                uint32_t next = step->left + !(block[step->column * ST_BLOCK + r] <= step->threshold);
                moved |= next ^ at[r];
                at[r] = next;
            }
        }
        if (!moved) break;
    }
    for (int r = 0; r < ST_DESCEND; r++) leaf[r] = steps[at[r]].leaf;
}

ST_INLINE void add_exits(const st_forest *forest, const st_forest_tree *tree, const float *block, const int n_vectors,
                         float *sums) {
    ints exit[ST_SPREAD];
    exits(forest, tree, block, n_vectors, exit);
    for (int v = 0; v < n_vectors; v++) {
        floats value = gather(forest->leaf_value + tree->first_leaf, exit[v]);
        store(sums + v * ST_LANES, load(sums + v * ST_LANES) + value);
    }
}

static void sums(const st_forest *forest, const float *blocks, uint32_t n_blocks, uint32_t last_rows, float *sums) {
    const size_t block_floats = (size_t)forest->n_columns * ST_BLOCK, sum_floats = (size_t)forest->n_targets * ST_BLOCK;
    for (const st_forest_tree *tree = forest->trees, *end = tree + forest->n_trees; tree != end; tree++) {
        for (uint32_t b = 0; b < n_blocks; b++) {
            const float *block = blocks + b * block_floats;
            float *sum = sums + b * sum_floats + (size_t)tree->target * ST_BLOCK;
            const uint32_t rows = b + 1 == n_blocks ? last_rows : ST_BLOCK;
            if (!tree->words) {
                for (uint32_t r = 0; r < rows; r += ST_DESCEND) {
                    uint32_t leaf[ST_DESCEND];
                    descend(forest->steps, tree, block + r, leaf);
                    for (int i = 0; i < ST_DESCEND; i++) sum[r + i] += forest->leaf_value[leaf[i]];
                }
            } else if (rows > ST_BLOCK / 2) {
                add_exits(forest, tree, block, ST_SPREAD, sum);
            } else if (ST_SPREAD > 2 && rows <= ST_BLOCK / 4) {
                add_exits(forest, tree, block, ST_SPREAD > 2 ? ST_SPREAD / 4 : 1, sum);
            } else {
                add_exits(forest, tree, block, ST_SPREAD > 1 ? ST_SPREAD / 2 : 1, sum);
            }
        }
    }
}

static void leaves(const st_forest *forest, const st_forest_tree *tree, const float *block, uint32_t rows,
                   uint32_t *leaf) {
    if (!tree->words) {
        for (uint32_t r = 0; r < rows; r += ST_DESCEND) descend(forest->steps, tree, block + r, leaf + r);
        return;
    }
    ints exit[ST_SPREAD];
    exits(forest, tree, block, ST_SPREAD, exit);
    for (int v = 0; v < ST_SPREAD; v++) {
        ints number = exit[v] + all((int32_t)tree->first_leaf);
        memcpy(leaf + v * ST_LANES, &number, sizeof number);
    }
}

static const st_kernel kernel = {ST_NAME, sums, leaves};

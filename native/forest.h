/* Compiled tree ensembles: the structs shared by the builder (forest_build.c, forest_pack.c), the kernels
   (forest_kernel.h, compiled once per instruction set) and the batch loop (forest_run.c).

   Every node, whatever its branch mode, becomes one test: "column <= threshold ? left : right". A column is a feature,
   or is computed from a feature before the trees are walked: the feature with NaN replaced by -infinity (if missing
   values go left), 0 or 1 for membership in a set, or the rank of a double among that feature's thresholds. So the
   kernels need only one comparison of floats, which is exact for models of doubles too. */
#ifndef SHORTTAIL_FOREST_H
#define SHORTTAIL_FOREST_H

#include <stddef.h>
#include <stdint.h>

#define ST_BLOCK 32        /* rows that are evaluated together; a column of a block is this many adjacent floats */
#define ST_WORDS 2         /* 32-bit words of leaf bits in bitvector evaluation: trees of up to 64 leaves */
/* Batches of up to this many rows are evaluated row by row, several trees at a time: a block would be slower. */
#define ST_ALONE_ROWS_BITS 2       /* if most trees are small enough for bitvectors */
#define ST_ALONE_ROWS_DESCENT 4    /* otherwise */

/* Branch modes of source nodes. The numbers are specific to this builder; ONNX has others. */
enum { ST_LEAF, ST_LEQ, ST_LT, ST_GTE, ST_GT, ST_EQ, ST_NEQ, ST_MEMBER, ST_MEMBER_WHOLE /* drops x's fraction */ };
enum { ST_SUM, ST_AVERAGE, ST_MIN, ST_MAX };
enum { ST_NONE, ST_LOGISTIC, ST_SOFTMAX, ST_SOFTMAX_ZERO, ST_PROBIT };
/* How leaves vote: all leaves of a tree for the same single target; every leaf for every target; anything else. */
enum { ST_ONE_TARGET, ST_ALL_TARGETS, ST_SOME_TARGETS };
enum { ST_COLUMN_ZERO, ST_COLUMN_FEATURE, ST_COLUMN_NAN_LOW, ST_COLUMN_SET, ST_COLUMN_BITS, ST_COLUMN_INDEX };

enum {
    ST_OK = 0,
    ST_NO_MEMORY = -1,
    ST_BAD_CHILD = -2,   /* a child does not exist */
    ST_SHARED = -3,      /* there is a cycle, or so many shared subtrees that copies of them would be too many */
    ST_NO_WEIGHT = -4,   /* a leaf has no weight */
    ST_BAD_TARGET = -5,
    ST_TOO_LARGE = -6
};

typedef struct {
    uint32_t kind, feature;
    /* ST_COLUMN_SET: whether NaN counts as a member; whether fractions are dropped; its values are set_values[first ..
       first + count - 1], ascending. */
    uint32_t nan_low, whole, first, count;
    /* ST_COLUMN_BITS, a set of small whole numbers: index is its column of bit numbers, bits its first word in
       set_bits. ST_COLUMN_INDEX, a column of bit numbers as int32: a value from 0 to limit is its own bit number; a
       value in no set has limit + 1, NaN has limit + 2. */
    uint32_t index, bits, limit;
} st_column;

/* A node for descent. A leaf is its own left child and tests column 0, which is always 0, so steps end there. */
typedef struct {
    float threshold;
    uint32_t column;
    uint32_t left;                     /* index of the left child in st_forest.steps; the right child is left + 1 */
    uint32_t leaf;                     /* for a leaf: its number in the forest */
} st_step;

/* A node for bitvector evaluation: if the test fails, only the leaves in `keep` remain possible. */
typedef struct {
    uint32_t column;                   /* column number times ST_BLOCK */
    float threshold;
    uint32_t keep;
} st_test;

typedef struct {
    uint32_t root, depth;              /* index of its first step; tests on its longest path */
    uint32_t first_leaf, n_leaves;
    uint32_t first_test, words;        /* words is 0 if the tree has more leaves than ST_WORDS words hold */
    uint32_t n_tests[ST_WORDS];
    uint32_t target;                   /* for ST_ONE_TARGET */
} st_forest_tree;

typedef struct {
    /* The ensemble as the ONNX graph describes it. The arrays are the caller's and are only read during the build. */
    size_t n_nodes, n_trees;
    const int32_t *feature, *yes, *no;
    const uint8_t *mode, *missing_yes;
    const double *threshold;
    const uint32_t *root;
    const uint32_t *weight_begin;      /* n_nodes + 1 offsets into weight_target and weight */
    const int32_t *weight_target;
    const double *weight;
    const uint32_t *set_begin;         /* n_nodes + 1 offsets into set_value, for ST_MEMBER and ST_MEMBER_WHOLE */
    const double *set_value;
} st_forest_graph;

typedef struct {
    uint32_t n_features;               /* number of the highest feature used, plus 1 */
    uint32_t alone_rows;               /* ST_ALONE_ROWS_BITS or ST_ALONE_ROWS_DESCENT */
    uint32_t n_targets, n_trees, n_steps, n_leaves, n_tests, n_columns;
    uint32_t first_index;              /* columns from here on are ST_COLUMN_INDEX, which ST_COLUMN_BITS columns read */
    int wide;                          /* rows, thresholds and sums are doubles */
    int wide_scores;                   /* scores are doubles too */
    int aggregate, post_transform, votes;
    int classifier, one_class_votes, all_positive;
    uint32_t n_base;
    double *base;
    st_column *columns;
    double *set_values;
    uint32_t *set_bits;
    double *ranks;                     /* wide: the distinct thresholds of each feature, ascending */
    uint32_t *rank_begin;              /* wide: n_features + 1 offsets into ranks */
    st_forest_tree *trees;
    st_step *steps;
    st_test *tests;
    float *leaf_value;                 /* ST_ONE_TARGET, not wide: [n_leaves] */
    double *leaf_value_wide;           /* ST_ONE_TARGET, wide */
    uint32_t *vote_begin;              /* otherwise: [n_leaves + 1] offsets into vote_target and vote */
    uint32_t *vote_target;
    double *vote;
    uint8_t *voted;                    /* [n_targets] whether any tree votes for the target */
    uint32_t *leaf_node;               /* [n_leaves] the node of st_forest_graph that each leaf is a copy of */
} st_forest;

/* Build a forest. Returns ST_OK or a code above. The caller calls st_forest_free in either case. */
int st_forest_build(st_forest *forest, const st_forest_graph *source);
void st_forest_free(st_forest *forest);

typedef struct {
    const char *name;
    /* Add the leaf values of all trees to sums, for ST_ONE_TARGET forests that sum floats. blocks:
       [n_blocks][n_columns][ST_BLOCK]; sums: [n_blocks][n_targets][ST_BLOCK]; last_rows: rows in the last block. */
    void (*sums)(const st_forest *forest, const float *blocks, uint32_t n_blocks, uint32_t last_rows, float *sums);
    /* Write the leaf number of each row of a block, in one tree. */
    void (*leaves)(const st_forest *forest, const st_forest_tree *tree, const float *block, uint32_t rows,
                   uint32_t *leaf);
} st_kernel;

const st_kernel *st_kernel_plain(void);
const st_kernel *st_kernel_avx2(void);     /* NULL if not compiled in; the caller checks the CPU first */
const st_kernel *st_kernel_avx512(void);   /* likewise */
/* Choose a kernel. level: "avx512", "avx2", "scalar", or NULL for the best one. NULL if this CPU or build lacks it. */
const st_kernel *st_kernel_choose(const char *level);

/* Run a forest over n rows. rows: [n, width] of float, or of double if forest->wide. alone: the rows are evaluated one
   by one, as in a batch of one row. label: [n] class numbers, written; NULL for a regressor, or to leave them out.
   scores: [n, n_targets] of float, or of double if wide_scores, written. Returns ST_OK or ST_NO_MEMORY. */
int st_forest_run(const st_forest *forest, const st_kernel *kernel, const void *rows, size_t n, size_t width,
                  int alone, int64_t *label, void *scores);

/* Set reached[node] to 1 for the leaf nodes of st_forest_graph that these rows reach, and met[row] to 1 for the rows that
   reach the node wanted[row], -1 for none. Returns as st_forest_run. */
int st_forest_reach(const st_forest *forest, const st_kernel *kernel, const void *rows, size_t n, size_t width,
                    uint8_t *reached, const int64_t *wanted, uint8_t *met);

#endif

/* Compiled tree ensembles: the shapes shared by the builder (forest_build.c), the kernels (forest_kernel.h, compiled
   once for each instruction set) and the batch loop (forest_run.c).

   Every node, whatever its branch mode, becomes one test: "column <= threshold? left : right". A column is a feature,
   or something computed from one before the trees are walked: with NaN made -infinity where missing values go left,
   0 or 1 for membership of a set, or the rank of a double among that feature's thresholds. So the kernels know one
   comparison of floats, and it is exact for double models too. */
#ifndef SHORTTAIL_FOREST_H
#define SHORTTAIL_FOREST_H

#include <stddef.h>
#include <stdint.h>

#define ST_BLOCK 32        /* rows that are walked together; a column of a block is this many adjacent floats */
#define ST_WORDS 2         /* 32-bit words of leaves that bitvector evaluation takes: trees of up to 64 leaves */
/* Up to this many rows are walked one by one, several trees at a time: where a block would not pay yet. */
#define ST_ALONE_ROWS_BITS 2       /* most trees are small enough for bitvectors */
#define ST_ALONE_ROWS_DESCENT 4

/* How a node of the source compares. The numbers are the builder's own. */
enum { ST_LEAF, ST_LEQ, ST_LT, ST_GTE, ST_GT, ST_EQ, ST_NEQ, ST_MEMBER, ST_MEMBER_WHOLE /* drops x's fraction */ };
enum { ST_SUM, ST_AVERAGE, ST_MIN, ST_MAX };
enum { ST_NONE, ST_LOGISTIC, ST_SOFTMAX, ST_SOFTMAX_ZERO, ST_PROBIT };
/* How leaves vote: each tree for one target of its own; every leaf for every target; anything else. */
enum { ST_ONE_TARGET, ST_ALL_TARGETS, ST_SOME_TARGETS };
enum { ST_COLUMN_ZERO, ST_COLUMN_FEATURE, ST_COLUMN_NAN_LOW, ST_COLUMN_SET, ST_COLUMN_BITS, ST_COLUMN_INDEX };

enum {
    ST_OK = 0,
    ST_NO_MEMORY = -1,
    ST_BAD_CHILD = -2,   /* a child that does not exist */
    ST_SHARED = -3,      /* a cycle, or subtrees shared so often that a tree of them would explode */
    ST_NO_WEIGHT = -4,   /* a leaf that votes for nothing */
    ST_BAD_TARGET = -5,
    ST_TOO_LARGE = -6
};

typedef struct {
    uint32_t kind, feature;
    /* ST_COLUMN_SET: NaN counts as a member; fractions are dropped; its values in set_values, ascending */
    uint32_t nan_low, whole, first, count;
    /* ST_COLUMN_BITS, a set of small whole numbers: the column of bit numbers, and its first word in set_bits.
       ST_COLUMN_INDEX, the bit numbers, as int32: of limit and less for themselves, limit + 1 for what is in no set,
       limit + 2 for NaN. */
    uint32_t index, bits, limit;
} st_column;

/* A node for descent. A leaf points at itself and tests column 0, which is always 0, so walking on stays there. */
typedef struct {
    float threshold;
    uint32_t column;
    uint32_t left;                     /* right is left + 1; counted from the first step of the forest */
    uint32_t leaf;                     /* leaves: number in the forest */
} st_step;

/* A node for bitvector evaluation: where the test fails, only the leaves in `keep` stay possible. */
typedef struct {
    uint32_t column;                   /* times ST_BLOCK */
    float threshold;
    uint32_t keep;
} st_test;

typedef struct {
    uint32_t root, depth;              /* first step; tests on the longest path */
    uint32_t first_leaf, n_leaves;
    uint32_t first_test, words;        /* words 0: more leaves than ST_WORDS hold */
    uint32_t n_tests[ST_WORDS];
    uint32_t target;                   /* ST_ONE_TARGET */
} st_forest_tree;

typedef struct {
    /* What the graph says. All arrays belong to the caller and are only read while building. */
    size_t n_nodes, n_trees;
    const int32_t *feature, *yes, *no;
    const uint8_t *mode, *missing_yes;
    const double *threshold;
    const uint32_t *root;
    const uint32_t *weight_begin;      /* n_nodes + 1 offsets into the two below */
    const int32_t *weight_target;
    const double *weight;
    const uint32_t *set_begin;         /* n_nodes + 1 offsets into set_value, for the two members */
    const double *set_value;
} st_forest_graph;

typedef struct {
    uint32_t n_features;               /* highest feature used + 1 */
    uint32_t alone_rows;
    uint32_t n_targets, n_trees, n_steps, n_leaves, n_tests, n_columns;
    uint32_t first_index;              /* columns from here on are ST_COLUMN_INDEX; sets read them */
    int wide;                          /* doubles in, double thresholds, sums in double */
    int wide_scores;                   /* ... and doubles out */
    int aggregate, post_transform, votes;
    int classifier, one_class_votes, all_positive;
    uint32_t n_base;
    double *base;
    st_column *columns;
    double *set_values;
    uint32_t *set_bits;
    double *ranks;                     /* wide: thresholds of all features, ascending within each */
    uint32_t *rank_begin;              /* wide: n_features + 1 offsets */
    st_forest_tree *trees;
    st_step *steps;
    st_test *tests;
    float *leaf_value;                 /* ST_ONE_TARGET, not wide: [n_leaves] */
    double *leaf_value_wide;           /* ST_ONE_TARGET, wide */
    uint32_t *vote_begin;              /* else: [n_leaves + 1] offsets */
    uint32_t *vote_target;
    double *vote;
    uint8_t *voted;                    /* [n_targets] some tree votes for it (ST_ONE_TARGET, ST_ALL_TARGETS) */
} st_forest;

/* 0 or one of the codes above. What was allocated is freed by st_forest_free in either case. */
int st_forest_build(st_forest *forest, const st_forest_graph *source);
void st_forest_free(st_forest *forest);

typedef struct {
    const char *name;
    /* blocks: n_blocks times n_columns times ST_BLOCK floats; sums: n_blocks times n_targets times ST_BLOCK, added to.
       For forests of ST_ONE_TARGET that sum floats. */
    void (*sums)(const st_forest *forest, const float *blocks, uint32_t n_blocks, uint32_t last_rows, float *sums);
    /* The leaf of each row of a block. */
    void (*leaves)(const st_forest *forest, const st_forest_tree *tree, const float *block, uint32_t rows,
                   uint32_t *leaf);
} st_kernel;

const st_kernel *st_kernel_plain(void);
const st_kernel *st_kernel_avx2(void);     /* NULL when not compiled in; the caller asks the CPU first */
const st_kernel *st_kernel_avx512(void);
/* level: "avx512", "avx2", "scalar", or NULL for the best. NULL when this CPU or build lacks it. */
const st_kernel *st_kernel_choose(const char *level);

/* rows: [n, width] of float, or of double when forest->wide. label: [n] class numbers, NULL for a regressor or when
   not wanted. scores: [n, n_targets] of float, or of double where wide_scores. Returns ST_OK or ST_NO_MEMORY. */
int st_forest_run(const st_forest *forest, const st_kernel *kernel, const void *rows, size_t n, size_t width,
                  int64_t *label, void *scores);

#endif

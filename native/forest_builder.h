/* Shared by forest_build.c, which turns nodes into steps, and forest_pack.c, which turns steps into the kernels' data.
   */
#ifndef SHORTTAIL_FOREST_BUILDER_H
#define SHORTTAIL_FOREST_BUILDER_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "forest.h"

/* One level of the depth-first walk over a tree. */
typedef struct {
    int32_t node;
    uint32_t step, depth, first_leaf;
    int32_t right;
    int stage; /* 0: not visited, 1: left subtree was pushed, 2: right subtree was pushed, or it is a leaf */
} frame;

typedef struct {
    st_forest *forest;
    const st_forest_graph *source;
    size_t step_room, leaf_room, vote_room, column_room, set_room, frame_room;
    size_t n_votes, n_set_values, steps_allowed;
    double *threshold;        /* [steps] thresholds, before ranks replace doubles */
    uint32_t *left_end;       /* [steps] except leaves: number after the last leaf of the left subtree */
    uint32_t *left_first;     /* [steps] except leaves: first leaf of the left subtree */
    uint32_t *plain, *low;    /* [features] column of the feature, and with NaN as -infinity; 0: not made yet */
    frame *frames;
} st_builder;

static inline int st_grow(void *array, size_t *room, size_t needed, size_t bytes) {
    if (needed <= *room) return ST_OK;
    size_t wanted = *room * 2 > needed ? *room * 2 : needed + 64;
    void *grown = realloc(*(void **)array, wanted * bytes);
    if (!grown) return ST_NO_MEMORY;
    *(void **)array = grown;
    *room = wanted;
    return ST_OK;
}

static inline int st_by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Add a column. Returns ST_OK, or ST_NO_MEMORY, which also stands for more columns than a test can number. */
int st_new_column(st_builder *b, st_column column, uint32_t *number);

/* Set float thresholds, columns of sets, tests, and votes of leaves (forest_pack.c). Returns a code of forest.h. */
int st_forest_pack(st_builder *b);

#endif

/* Turns steps into the data of the kernels: float thresholds, sets as bits, tests of small trees, votes of leaves. */
#include "forest_builder.h"

#define SET_BITS_MAX 4096 /* sets of whole numbers below this are kept as bits */

/* Fill ranks and rank_begin of a wide forest: each feature's distinct thresholds in ascending order. */
static int rank_thresholds(st_builder *b) {
    st_forest *f = b->forest;
    f->rank_begin = calloc((size_t)f->n_features + 2, sizeof(uint32_t));
    f->ranks = malloc((f->n_steps + 1u) * sizeof(double));
    if (!f->rank_begin || !f->ranks) return ST_NO_MEMORY;
    uint32_t *filled = f->rank_begin + 1; /* first the number of each feature's thresholds, then their end offsets */
    for (uint32_t i = 0; i < f->n_steps; i++) {
        const st_column *column = f->columns + f->steps[i].column;
        if (column->kind == ST_COLUMN_FEATURE || column->kind == ST_COLUMN_NAN_LOW) filled[column->feature]++;
    }
    uint32_t total = 0;
    uint32_t *next = malloc(((size_t)f->n_features + 1) * sizeof(uint32_t));
    if (!next) return ST_NO_MEMORY;
    for (uint32_t i = 0; i < f->n_features; i++) {
        next[i] = total;
        total += filled[i];
        filled[i] = total;
    }
    for (uint32_t i = 0; i < f->n_steps; i++) {
        const st_column *column = f->columns + f->steps[i].column;
        if (column->kind == ST_COLUMN_FEATURE || column->kind == ST_COLUMN_NAN_LOW)
            f->ranks[next[column->feature]++] = b->threshold[i];
    }
    free(next);
    uint32_t kept = 0; /* sort each feature's thresholds and drop duplicates */
    for (uint32_t feature = 0, begin = 0; feature < f->n_features; feature++) {
        const uint32_t end = f->rank_begin[feature + 1], first = kept;
        qsort(f->ranks + begin, end - begin, sizeof(double), st_by_value);
        for (uint32_t i = begin; i < end; i++)
            if (kept == first || f->ranks[kept - 1] != f->ranks[i]) f->ranks[kept++] = f->ranks[i];
        if (kept - first > 1u << 24) return ST_TOO_LARGE; /* a float must hold every rank exactly */
        begin = end;
        f->rank_begin[feature] = first;
    }
    f->rank_begin[f->n_features] = kept;
    return ST_OK;
}

static double rank_of(const st_forest *f, uint32_t feature, double value) {
    uint32_t low = f->rank_begin[feature], high = f->rank_begin[feature + 1];
    const uint32_t first = low;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (f->ranks[middle] < value) low = middle + 1;
        else high = middle;
    }
    return low - first;
}

static void set_thresholds(st_builder *b) {
    st_forest *f = b->forest;
    for (uint32_t i = 0; i < f->n_steps; i++) {
        const st_column *column = f->columns + f->steps[i].column;
        double threshold = b->threshold[i];
        if (f->wide && (column->kind == ST_COLUMN_FEATURE || column->kind == ST_COLUMN_NAN_LOW))
            threshold = rank_of(f, column->feature, threshold);
        f->steps[i].threshold = (float)threshold;
    }
}

/* Make the tests of a tree that has few enough leaves. A node is listed once per word in which it can clear a leaf. */
static int add_tests(st_builder *b, st_forest_tree *tree, uint32_t end_step, size_t *room) {
    st_forest *f = b->forest;
    tree->first_test = f->n_tests;
    if (tree->n_leaves > 32 * ST_WORDS) return ST_OK;
    tree->words = (tree->n_leaves + 31) / 32;
    for (uint32_t word = 0; word < tree->words; word++) {
        for (uint32_t i = tree->root; i < end_step; i++) {
            const st_step *step = f->steps + i;
            if (step->leaf != UINT32_MAX) continue;
            int64_t from = (int64_t)b->left_first[i] - tree->first_leaf - 32 * word;
            int64_t to = (int64_t)b->left_end[i] - tree->first_leaf - 32 * word;
            if (from < 0) from = 0;
            if (to > 32) to = 32;
            if (from >= to) continue;
            if (st_grow(&f->tests, room, f->n_tests + 1u, sizeof(st_test))) return ST_NO_MEMORY;
            const uint64_t cleared = (((uint64_t)1 << to) - 1) & ~(((uint64_t)1 << from) - 1);
            f->tests[f->n_tests++] = (st_test){step->column * ST_BLOCK, step->threshold, ~(uint32_t)cleared};
            tree->n_tests[word]++;
        }
    }
    return ST_OK;
}

static int has_bits(const st_forest *f, const st_column *column) {
    if (column->kind != ST_COLUMN_SET) return 0;
    for (uint32_t i = column->first; i < column->first + column->count; i++) {
        const double value = f->set_values[i];
        if (!(value >= 0 && value < SET_BITS_MAX && value == floor(value))) return 0;
    }
    return 1;
}

/* Find or make the column of bit numbers of a set's feature (with or without fractions), and raise its limit to the
   set's highest value. */
static int index_column(st_builder *b, const st_column *set, uint32_t *known, uint32_t *number) {
    st_forest *f = b->forest;
    const uint32_t highest = set->count ? (uint32_t)f->set_values[set->first + set->count - 1] : 0;
    st_column column = {.kind = ST_COLUMN_INDEX, .feature = set->feature, .whole = set->whole};
    uint32_t *slot = known + set->feature * 2 + set->whole;
    if (!*slot && st_new_column(b, column, slot)) return ST_NO_MEMORY;
    *number = *slot;
    if (f->columns[*number].limit < highest) f->columns[*number].limit = highest;
    return ST_OK;
}

/* Turn sets of small whole numbers, such as categories, into bits: membership then costs one load and a shift per row.
   */
static int index_sets(st_builder *b) {
    st_forest *f = b->forest;
    uint32_t *known = calloc((size_t)f->n_features * 2 + 2, sizeof(uint32_t));
    if (!known) return ST_NO_MEMORY;
    f->first_index = f->n_columns;
    size_t words = 0;
    for (uint32_t c = 0; c < f->first_index; c++) {
        if (!has_bits(f, f->columns + c)) continue;
        const st_column set = f->columns[c]; /* a copy, because index_column() may reallocate the columns */
        uint32_t number;
        if (index_column(b, &set, known, &number)) {
            free(known);
            return ST_NO_MEMORY;
        }
        f->columns[c].kind = ST_COLUMN_BITS;
        f->columns[c].index = number;
    }
    free(known);
    for (uint32_t c = 0; c < f->first_index; c++) {
        if (f->columns[c].kind != ST_COLUMN_BITS) continue;
        if (words > UINT32_MAX / 2) return ST_TOO_LARGE;
        f->columns[c].bits = (uint32_t)words;
        words += (f->columns[f->columns[c].index].limit + 2) / 32 + 1;
    }
    f->set_bits = calloc(words + 1, sizeof(uint32_t));
    if (!f->set_bits) return ST_NO_MEMORY;
    for (uint32_t c = 0; c < f->first_index; c++) {
        const st_column *set = f->columns + c;
        if (set->kind != ST_COLUMN_BITS) continue;
        uint32_t *bits = f->set_bits + set->bits;
        const uint32_t nan = f->columns[set->index].limit + 2;
        for (uint32_t i = set->first; i < set->first + set->count; i++) {
            const uint32_t member = (uint32_t)f->set_values[i];
            bits[member / 32] |= 1u << member % 32;
        }
        if (set->nan_low) bits[nan / 32] |= 1u << nan % 32;
    }
    return ST_OK;
}

static int votes_of(const st_forest *f) {
    int one = 1, every = 1;
    for (uint32_t t = 0; t < f->n_trees; t++) {
        const st_forest_tree *tree = f->trees + t;
        const uint32_t target = f->vote_target[f->vote_begin[tree->first_leaf]];
        for (uint32_t leaf = tree->first_leaf; leaf < tree->first_leaf + tree->n_leaves; leaf++) {
            const uint32_t begin = f->vote_begin[leaf], count = f->vote_begin[leaf + 1] - begin;
            if (count != 1 || f->vote_target[begin] != target) one = 0;
            if (count != f->n_targets) every = 0;
            for (uint32_t i = 0; every && i < count; i++)
                if (f->vote_target[begin + i] != i) every = 0;
        }
    }
    return one ? ST_ONE_TARGET : every ? ST_ALL_TARGETS : ST_SOME_TARGETS;
}

static int set_leaves(st_forest *f) {
    f->votes = votes_of(f);
    f->voted = calloc(f->n_targets, 1);
    if (!f->voted) return ST_NO_MEMORY;
    for (uint32_t i = 0; i < f->vote_begin[f->n_leaves]; i++) f->voted[f->vote_target[i]] = 1;
    if (f->votes != ST_ONE_TARGET) return ST_OK;
    for (uint32_t t = 0; t < f->n_trees; t++) f->trees[t].target = f->vote_target[f->trees[t].first_leaf];
    if (f->wide) {
        f->leaf_value_wide = f->vote; /* there is one vote per leaf, in order */
        f->vote = NULL;
        return ST_OK;
    }
    f->leaf_value = malloc(f->n_leaves * sizeof(float));
    if (!f->leaf_value) return ST_NO_MEMORY;
    for (uint32_t i = 0; i < f->n_leaves; i++) f->leaf_value[i] = (float)f->vote[i];
    return ST_OK;
}

int st_forest_pack(st_builder *b) {
    st_forest *f = b->forest;
    int code;
    if ((code = index_sets(b)) || (f->wide && (code = rank_thresholds(b)))) return code;
    set_thresholds(b);
    size_t room = 0;
    uint32_t small = 0;
    for (uint32_t t = 0; t < f->n_trees; t++) {
        uint32_t end = t + 1 < f->n_trees ? f->trees[t + 1].root : f->n_steps;
        if ((code = add_tests(b, f->trees + t, end, &room))) return code;
        small += f->trees[t].words > 0;
    }
    f->alone_rows = small * 2 >= f->n_trees ? ST_ALONE_ROWS_BITS : ST_ALONE_ROWS_DESCENT;
    return set_leaves(f);
}

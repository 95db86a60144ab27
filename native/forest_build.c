/* Turns the nodes of an ONNX graph into steps and columns, which forest.h describes. */
#include "forest_builder.h"

#define STEPS_MAX 0x3fffffffu
#define DEPTH_MAX 100000u
#define FEATURES_MAX 1000000
#define COLUMNS_MAX (1u << 26) /* this times ST_BLOCK must fit in st_test.column */

/* A test between its source node and its st_step: the threshold is still a double, the children are source nodes. */
typedef struct {
    uint32_t column;
    double threshold;
    int32_t left, right;
} branch;

int st_new_column(st_builder *b, st_column column, uint32_t *number) {
    st_forest *f = b->forest;
    if (f->n_columns >= COLUMNS_MAX) return ST_NO_MEMORY;
    if (st_grow(&f->columns, &b->column_room, f->n_columns + 1u, sizeof(st_column))) return ST_NO_MEMORY;
    f->columns[f->n_columns] = column;
    *number = f->n_columns++;
    return ST_OK;
}

/* Find or make the column of a feature, unchanged or with NaN replaced by -infinity. */
static int feature_column(st_builder *b, uint32_t feature, int nan_low, uint32_t *number) {
    uint32_t *known = nan_low ? b->low + feature : b->plain + feature;
    if (!*known) {
        st_column column = {.kind = nan_low ? ST_COLUMN_NAN_LOW : ST_COLUMN_FEATURE, .feature = feature};
        if (st_new_column(b, column, known)) return ST_NO_MEMORY;
    }
    *number = *known;
    return ST_OK;
}

static int add_member(st_builder *b, double value) {
    st_forest *f = b->forest;
    if (isnan(value)) return ST_OK; /* no value equals NaN */
    if (st_grow(&f->set_values, &b->set_room, b->n_set_values + 1, sizeof(double))) return ST_NO_MEMORY;
    f->set_values[b->n_set_values++] = value;
    return ST_OK;
}

static int finish_set(st_builder *b, uint32_t feature, int nan_low, int whole, size_t first, uint32_t *number) {
    size_t count = b->n_set_values - first;
    if (b->n_set_values > UINT32_MAX) return ST_TOO_LARGE;
    if (count) qsort(b->forest->set_values + first, count, sizeof(double), st_by_value);
    st_column column = {.kind = ST_COLUMN_SET, .feature = feature, .nan_low = (uint32_t)nan_low,
                        .whole = (uint32_t)whole, .first = (uint32_t)first, .count = (uint32_t)count};
    return st_new_column(b, column, number);
}

/* Whether ONNX Runtime can keep this value as one bit in a mask of the threshold's width. */
static int is_bit(const st_builder *b, double value) {
    return value >= 1 && value <= (b->forest->wide ? 64 : 32) && value == floor(value);
}

/* Read EQ, NEQ and MEMBER nodes: the row goes left if the set's column is 0. Converters write a categorical split as a
   chain of EQ nodes on one feature with the same child; such a chain becomes one set. ONNX Runtime joins neighbours in
   the chain to a bit mask, and for those it uses only the first node's rule for missing values. */
static int set_branch(st_builder *b, int32_t node, branch *out) {
    const st_forest_graph *s = b->source;
    const uint8_t mode = s->mode[node];
    const uint32_t feature = (uint32_t)s->feature[node];
    const size_t first = b->n_set_values;
    int nan_yes = s->missing_yes[node], code;
    double last = s->threshold[node];
    int32_t yes = s->yes[node], no = s->no[node];
    if (mode >= ST_MEMBER) {
        for (uint32_t i = s->set_begin[node]; i < s->set_begin[node + 1]; i++)
            if ((code = add_member(b, s->set_value[i]))) return code;
    } else if ((code = add_member(b, s->threshold[node]))) {
        return code;
    }
    for (size_t i = 0; mode == ST_EQ && i < s->n_nodes; i++) {
        if (no < 0 || (size_t)no >= s->n_nodes || s->mode[no] != ST_EQ || (uint32_t)s->feature[no] != feature ||
            s->yes[no] != yes)
            break;
        if (!is_bit(b, s->threshold[no]) || !is_bit(b, last)) nan_yes |= s->missing_yes[no];
        last = s->threshold[no];
        if ((code = add_member(b, s->threshold[no]))) return code;
        no = s->no[no];
    }
    /* x != t is true for NaN too, which is what "x is in the set" gives with the children swapped. */
    if (mode == ST_NEQ) nan_yes = 0;
    if ((code = finish_set(b, feature, nan_yes, mode == ST_MEMBER_WHOLE, first, &out->column))) return code;
    out->threshold = 0.5;
    out->left = mode == ST_NEQ ? no : yes;
    out->right = mode == ST_NEQ ? yes : no;
    return ST_OK;
}

/* Read a node whose threshold no number can meet: only NaN goes to `yes`, and only if missing values do. */
static int nan_branch(st_builder *b, int32_t node, branch *out) {
    const st_forest_graph *s = b->source;
    out->threshold = 0.5;
    out->left = s->yes[node];
    out->right = s->no[node];
    return finish_set(b, (uint32_t)s->feature[node], s->missing_yes[node], 0, b->n_set_values, &out->column);
}

static double below(const st_builder *b, double value) {
    return b->forest->wide ? nextafter(value, -INFINITY) : (double)nextafterf((float)value, -INFINITY);
}

static int read_branch(st_builder *b, int32_t node, branch *out) {
    const st_forest_graph *s = b->source;
    const uint8_t mode = s->mode[node];
    double threshold = s->threshold[node];
    if (mode >= ST_EQ) return set_branch(b, node, out);
    const int strict = mode == ST_LT || mode == ST_GTE; /* x < t is x <= the float below t */
    if (isnan(threshold) || (mode == ST_LT && threshold == -INFINITY)) return nan_branch(b, node, out);
    const int swapped = mode == ST_GT || mode == ST_GTE;
    out->left = swapped ? s->no[node] : s->yes[node];
    out->right = swapped ? s->yes[node] : s->no[node];
    const int nan_left = swapped ? !s->missing_yes[node] : s->missing_yes[node];
    if (mode == ST_GTE && threshold == -INFINITY) { /* every number goes to yes */
        out->threshold = 0.5;
        return finish_set(b, (uint32_t)s->feature[node], nan_left, 0, b->n_set_values, &out->column);
    }
    out->threshold = strict ? below(b, threshold) : threshold;
    return feature_column(b, (uint32_t)s->feature[node], nan_left, &out->column);
}

static int add_leaf(st_builder *b, int32_t node) {
    st_forest *f = b->forest;
    const st_forest_graph *s = b->source;
    const uint32_t begin = s->weight_begin[node], end = s->weight_begin[node + 1];
    if (begin == end) return ST_NO_WEIGHT;
    const size_t count = f->n_targets == 1 ? 1 : end - begin; /* with one target, only a leaf's first weight counts */
    size_t leaf_room = b->leaf_room;
    if (st_grow(&f->leaf_node, &leaf_room, f->n_leaves + 2u, sizeof(uint32_t)) ||
        st_grow(&f->vote_begin, &b->leaf_room, f->n_leaves + 2u, sizeof(uint32_t)))
        return ST_NO_MEMORY;
    if (b->n_votes + count > b->vote_room) {
        size_t room = b->vote_room;
        if (st_grow(&f->vote_target, &room, b->n_votes + count, sizeof(uint32_t))) return ST_NO_MEMORY;
        if (st_grow(&f->vote, &b->vote_room, b->n_votes + count, sizeof(double))) return ST_NO_MEMORY;
    }
    f->leaf_node[f->n_leaves] = (uint32_t)node;
    f->vote_begin[f->n_leaves++] = (uint32_t)b->n_votes;
    for (size_t i = 0; i < count; i++) {
        const int32_t target = f->n_targets == 1 ? 0 : s->weight_target[begin + i];
        if (target < 0 || (uint32_t)target >= f->n_targets) return ST_BAD_TARGET;
        f->vote_target[b->n_votes] = (uint32_t)target;
        f->vote[b->n_votes++] = s->weight[begin + i];
    }
    if (b->n_votes >= UINT32_MAX) return ST_TOO_LARGE;
    f->vote_begin[f->n_leaves] = (uint32_t)b->n_votes;
    return ST_OK;
}

static int new_steps(st_builder *b, uint32_t count, uint32_t *first) {
    st_forest *f = b->forest;
    size_t needed = (size_t)f->n_steps + count;
    if (needed > b->steps_allowed) return ST_SHARED;
    if (needed > b->step_room) {
        size_t room = b->step_room, again = room, third = room;
        if (st_grow(&b->threshold, &room, needed, sizeof(double)) ||
            st_grow(&b->left_end, &again, needed, sizeof(uint32_t)) ||
            st_grow(&b->left_first, &third, needed, sizeof(uint32_t)) ||
            st_grow(&f->steps, &b->step_room, needed, sizeof(st_step)))
            return ST_NO_MEMORY;
    }
    *first = f->n_steps;
    f->n_steps += count;
    return ST_OK;
}

static int visit(st_builder *b, frame *top, frame *child, int *descends, uint32_t *depth_max) {
    st_forest *f = b->forest;
    const st_forest_graph *s = b->source;
    st_step *step = f->steps + top->step;
    int code;
    if (top->stage == 0) {
        if (top->node < 0 || (size_t)top->node >= s->n_nodes) return ST_BAD_CHILD;
        if (top->depth > *depth_max) *depth_max = top->depth;
        if (s->mode[top->node] == ST_LEAF) {
            *step = (st_step){INFINITY, 0, top->step, f->n_leaves};
            b->threshold[top->step] = INFINITY;
            top->stage = 2;
            return add_leaf(b, top->node);
        }
        branch found;
        uint32_t pair;
        if (top->depth >= DEPTH_MAX) return ST_SHARED;
        if ((code = read_branch(b, top->node, &found)) || (code = new_steps(b, 2, &pair))) return code;
        f->steps[top->step] = (st_step){0, found.column, pair, UINT32_MAX};
        b->threshold[top->step] = found.threshold;
        b->left_first[top->step] = f->n_leaves;
        top->right = found.right;
        top->stage = 1;
        *child = (frame){found.left, pair, top->depth + 1, 0, 0, 0};
        *descends = 1;
        return ST_OK;
    }
    b->left_end[top->step] = f->n_leaves;
    top->stage = 2;
    *child = (frame){top->right, step->left + 1, top->depth + 1, 0, 0, 0};
    *descends = 1;
    return ST_OK;
}

static int add_tree(st_builder *b, uint32_t root) {
    st_forest *f = b->forest;
    st_forest_tree *tree = f->trees + f->n_trees;
    int code;
    memset(tree, 0, sizeof *tree);
    if ((code = new_steps(b, 1, &tree->root))) return code;
    tree->first_leaf = f->n_leaves;
    size_t n = 1;
    if (st_grow(&b->frames, &b->frame_room, 1, sizeof(frame))) return ST_NO_MEMORY;
    b->frames[0] = (frame){(int32_t)root, tree->root, 0, 0, 0, 0};
    while (n) {
        int descends = 0;
        frame child;
        if ((code = visit(b, b->frames + n - 1, &child, &descends, &tree->depth))) return code;
        if (b->frames[n - 1].stage == 2) n--; /* its last child replaces it on the stack */
        if (!descends) continue;
        if (st_grow(&b->frames, &b->frame_room, n + 1, sizeof(frame))) return ST_NO_MEMORY;
        b->frames[n++] = child;
    }
    tree->n_leaves = f->n_leaves - tree->first_leaf;
    f->n_trees++;
    return ST_OK;
}

static int build(st_builder *b) {
    st_forest *f = b->forest;
    const st_forest_graph *s = b->source;
    int code;
    uint32_t zero;
    for (size_t i = 0; i < s->n_nodes; i++) {
        if (s->mode[i] == ST_LEAF) continue;
        if (s->feature[i] < 0 || s->feature[i] >= FEATURES_MAX) return ST_TOO_LARGE;
        if ((uint32_t)s->feature[i] >= f->n_features) f->n_features = (uint32_t)s->feature[i] + 1;
    }
    b->plain = calloc((size_t)f->n_features + 1, sizeof(uint32_t));
    b->low = calloc((size_t)f->n_features + 1, sizeof(uint32_t));
    f->trees = calloc(s->n_trees + 1, sizeof(st_forest_tree));
    if (!b->plain || !b->low || !f->trees) return ST_NO_MEMORY;
    if (st_new_column(b, (st_column){.kind = ST_COLUMN_ZERO}, &zero)) return ST_NO_MEMORY;
    b->steps_allowed = s->n_nodes * 4 + 1024 < STEPS_MAX ? s->n_nodes * 4 + 1024 : STEPS_MAX;
    for (size_t t = 0; t < s->n_trees; t++)
        if ((code = add_tree(b, s->root[t]))) return code;
    return st_forest_pack(b);
}

int st_forest_build(st_forest *forest, const st_forest_graph *source) {
    st_builder b = {.forest = forest, .source = source};
    int code = build(&b);
    free(b.threshold);
    free(b.left_end);
    free(b.left_first);
    free(b.plain);
    free(b.low);
    free(b.frames);
    return code;
}

void st_forest_free(st_forest *f) {
    void *owned[] = {f->base,  f->columns, f->set_values, f->set_bits,        f->ranks,      f->rank_begin,  f->trees,
                     f->steps, f->tests,   f->leaf_value, f->leaf_value_wide, f->vote_begin, f->vote_target, f->vote,
                     f->voted, f->leaf_node};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    memset(f, 0, sizeof *f);
}

/* Turns leaves into scores, in the type in which ONNX Runtime sums. forest_run.c includes this file twice, with
   ST_SCORE float and double. Rounding and the special cases for two classes are exactly ONNX Runtime's. */

/* Add the votes of one leaf to a row's sums. */
static void ST_TYPED(vote)(const st_forest *f, uint32_t leaf, ST_SCORE *sum, uint8_t *has) {
    const uint32_t end = f->vote_begin[leaf + 1];
    for (uint32_t i = f->vote_begin[leaf]; i < end; i++) {
        const uint32_t target = f->vote_target[i];
        const ST_SCORE value = (ST_SCORE)(f->vote ? f->vote[i] : f->leaf_value_wide[i]);
        if (f->aggregate <= ST_AVERAGE) sum[target] += value;
        else if (!has[target] || (f->aggregate == ST_MIN ? value < sum[target] : value > sum[target]))
            sum[target] = value;
        has[target] = 1;
    }
}

static void ST_TYPED(softmax)(ST_SCORE *s, uint32_t n, int skip_zeros) {
    float highest = -FLT_MAX, total = 0;
    for (uint32_t i = 0; i < n; i++)
        if ((float)s[i] > highest) highest = (float)s[i];
    const float zero_scale = skip_zeros ? expf(-highest) : 0;
    for (uint32_t i = 0; i < n; i++) {
        if (skip_zeros && !(fabsf((float)s[i]) > 0.0000001f)) { /* also NaN, which then leaves the total alone */
            s[i] *= zero_scale;
        } else {
            s[i] = expf((float)s[i] - highest);
            total += (float)s[i];
        }
    }
    for (uint32_t i = 0; i < n; i++) s[i] = skip_zeros ? s[i] / total : (float)s[i] / total;
}

/* Apply the post-transform to two or more scores, in place. */
static void ST_TYPED(transform)(const st_forest *f, ST_SCORE *s, uint32_t n) {
    switch (f->post_transform) {
    case ST_LOGISTIC:
        for (uint32_t i = 0; i < n; i++) s[i] = logistic((float)s[i]);
        break;
    case ST_PROBIT:
        for (uint32_t i = 0; i < n; i++) s[i] = probit((float)s[i]);
        break;
    case ST_SOFTMAX:
    case ST_SOFTMAX_ZERO:
        ST_TYPED(softmax)(s, n, f->post_transform == ST_SOFTMAX_ZERO);
        break;
    default:
        break;
    }
}

/* Finish two classes of which only the first has votes: its sum is the score of the second class. The first class gets
   1 - sum if sums are probabilities, otherwise -sum. Returns the class. */
static int64_t ST_TYPED(finish_single)(const st_forest *f, ST_SCORE *s) {
    const ST_SCORE sum = s[0];
    const int positive = f->one_class_votes && f->all_positive ? sum > (ST_SCORE)0.5 : sum > 0;
    s[1] = sum;
    if (f->post_transform == ST_LOGISTIC) {
        s[1] = logistic((float)sum);
        s[0] = logistic((float)-sum);
    } else {
        s[0] = f->one_class_votes && f->all_positive ? 1 - sum : -sum;
    }
    return positive;
}

static int64_t ST_TYPED(finish_pair)(const st_forest *f, ST_SCORE *s, const uint8_t *voted) {
    int has0 = voted[0], has1 = voted[1];
    if (f->n_base == 2 && has1) {
        s[1] = (ST_SCORE)f->base[1] + s[0];
        s[0] = -s[1];
    } else if (f->n_base == 2) {
        s[1] += (ST_SCORE)f->base[1];
        s[0] += (ST_SCORE)f->base[0];
    } else if (f->n_base == 1) {
        s[0] += (ST_SCORE)f->base[0];
    }
    if (!has1 && f->n_base != 2) return ST_TYPED(finish_single)(f, s);
    const ST_SCORE deciding = has1 ? s[1] : has0 ? s[0] : 0;
    const int positive = deciding > (f->one_class_votes && f->all_positive ? (ST_SCORE)0.5 : 0);
    if (!has0) s[0] = 0; /* a class without votes counts as zero, whatever its base value */
    if (!has1) s[1] = 0;
    ST_TYPED(transform)(f, s, 2);
    return positive;
}

static int64_t ST_TYPED(finish_classes)(const st_forest *f, ST_SCORE *s, const uint8_t *has) {
    int64_t best = -1;
    if (f->n_targets == 2) return ST_TYPED(finish_pair)(f, s, has);
    for (uint32_t k = 0; k < f->n_targets; k++) {
        if (f->n_base) s[k] = has[k] ? s[k] + (ST_SCORE)f->base[k] : (ST_SCORE)f->base[k];
        if ((has[k] || f->n_base) && (best < 0 || s[k] > s[best])) best = k;
    }
    ST_TYPED(transform)(f, s, f->n_targets);
    return best < 0 ? 0 : best;
}

static void ST_TYPED(finish_targets)(const st_forest *f, ST_SCORE *s, const uint8_t *voted) {
    if (f->aggregate == ST_AVERAGE)
        for (uint32_t k = 0; k < f->n_targets; k++) s[k] /= (ST_SCORE)f->n_trees;
    if (f->n_base == f->n_targets)
        for (uint32_t k = 0; k < f->n_targets; k++) s[k] += (ST_SCORE)f->base[k];
    if (f->n_targets > 1) {
        for (uint32_t k = 0; k < f->n_targets; k++)
            if (!voted[k]) s[k] = 0; /* a target without votes counts as zero, whatever its base value */
        ST_TYPED(transform)(f, s, f->n_targets);
    } else if (f->post_transform == ST_PROBIT) {
        s[0] = probit((float)s[0]);
    }
}

/* Finish one row. sum: [n_targets], overwritten. label: the class numbers of all rows, or NULL. */
static void ST_TYPED(finish)(const st_forest *f, ST_SCORE *sum, const uint8_t *has, int64_t *label, void *scores,
                             size_t row) {
    if (f->classifier) {
        const int64_t best = ST_TYPED(finish_classes)(f, sum, has);
        if (label) label[row] = best;
    } else {
        ST_TYPED(finish_targets)(f, sum, has);
    }
    const size_t at = row * f->n_targets;
    if (f->wide_scores)
        for (uint32_t k = 0; k < f->n_targets; k++) ((double *)scores)[at + k] = sum[k];
    else
        for (uint32_t k = 0; k < f->n_targets; k++) ((float *)scores)[at + k] = (float)sum[k];
}

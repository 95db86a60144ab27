/* A log-linear histogram of nanoseconds, after Gil Tene's HdrHistogram: 128 buckets an octave, so a figure read from it
 * is off by less than 0.8 percent, in a fixed 41 KB whatever is recorded. */
#ifndef SHORTTAIL_BENCH_HISTOGRAM_H
#define SHORTTAIL_BENCH_HISTOGRAM_H

#include <stdint.h>

enum { HISTOGRAM_BITS = 7, HISTOGRAM_OCTAVES = 40, HISTOGRAM_BUCKETS = (HISTOGRAM_OCTAVES + 1) << HISTOGRAM_BITS };

struct histogram {
    uint64_t counts[HISTOGRAM_BUCKETS];
    uint64_t total, max;
};

static inline void histogram_record(struct histogram *h, uint64_t value)
{
    uint64_t limit = (1ull << (HISTOGRAM_BITS + HISTOGRAM_OCTAVES)) - 1; /* 39 hours */
    if (value > h->max)
        h->max = value;
    if (value > limit)
        value = limit;
    int shift = value >> HISTOGRAM_BITS ? 63 - __builtin_clzll(value) - HISTOGRAM_BITS : -1;
    uint64_t index =
        shift < 0 ? value : ((uint64_t)(shift + 1) << HISTOGRAM_BITS) + (value >> shift) - (1u << HISTOGRAM_BITS);
    h->counts[index]++;
    h->total++;
}

/* The value that `quantile` of what was recorded does not exceed, to a bucket's middle; 0 when nothing was. */
static inline double histogram_quantile(const struct histogram *h, double quantile)
{
    uint64_t rank = (uint64_t)(quantile * (double)h->total + 0.5), seen = 0;
    if (rank < 1)
        rank = 1;
    for (uint64_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
        seen += h->counts[i];
        if (seen < rank)
            continue;
        if (i < 1u << HISTOGRAM_BITS)
            return (double)i;
        int shift = (int)(i >> HISTOGRAM_BITS) - 1;
        uint64_t low = ((i & ((1u << HISTOGRAM_BITS) - 1)) + (1u << HISTOGRAM_BITS)) << shift;
        double middle = (double)low + (double)(1ull << shift) / 2;
        return middle < (double)h->max ? middle : (double)h->max;
    }
    return 0;
}

#endif

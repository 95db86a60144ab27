/* Random numbers, popularity of keys, arrival times and histograms of a load test. Makes no system calls. */
#ifndef SHORTTAIL_LOADTEST_STREAM_H
#define SHORTTAIL_LOADTEST_STREAM_H

#include <math.h>
#include <stdint.h>

/* -- random numbers ----------------------------------------------------------------------------------------- */

/* xoshiro256++ by Blackman and Vigna ("Scrambled Linear Pseudorandom Number Generators", 2021), seeded by splitmix64. */
struct lt_random { uint64_t s[4]; };

static inline uint64_t lt_rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

static inline uint64_t lt_next(struct lt_random *r)
{
    uint64_t *s = r->s, result = lt_rotate(s[0] + s[3], 23) + s[0], t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = lt_rotate(s[3], 45);
    return result;
}

static inline void lt_seed(struct lt_random *r, uint64_t seed)
{
    for (int i = 0; i < 4; i++) {
        uint64_t z = seed += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        r->s[i] = z ^ z >> 31;
    }
}

/* Uniform in [0, 1). */
static inline double lt_uniform(struct lt_random *r) { return (double)(lt_next(r) >> 11) * 0x1p-53; }

/* An integer in 0 ... n - 1. The bias of the multiplication is below n / 2^64. */
static inline uint64_t lt_below(struct lt_random *r, uint64_t n)
{
    return (uint64_t)((unsigned __int128)lt_next(r) * n >> 64);
}

/* Exponential with mean 1. */
static inline double lt_exponential(struct lt_random *r) { return -log1p(-lt_uniform(r)); }

/* -- drawing one of n rows ---------------------------------------------------------------------------------- */

enum lt_draw { LT_UNIFORM, LT_ZIPF, LT_IN_TURN };

/* Zipf by rejection-inversion (Hoermann and Derflinger, "Rejection-inversion to generate variates from monotone
 * discrete distributions", 1996): no table, so n may be a billion. Row 0 is the most popular. */
struct lt_rows {
    enum lt_draw draw;
    uint64_t n, next;
    double exponent, from, to, keep;
};

static inline double lt_zipf_integral(double s, double x)
{
    double log_x = log(x), t = (1 - s) * log_x;
    return fabs(t) > 1e-8 ? expm1(t) / (1 - s) : log_x * (1 + t / 2);
}

static inline double lt_zipf_inverse(double s, double area)
{
    double t = area * (1 - s);
    if (t < -1)
        t = -1; /* rounding may make t slightly smaller */
    return fabs(t) > 1e-8 ? exp(log1p(t) / (1 - s)) : exp(area * (1 - t / 2));
}

static inline void lt_rows_init(struct lt_rows *rows, enum lt_draw draw, uint64_t n, double exponent)
{
    *rows = (struct lt_rows){.draw = draw, .n = n, .exponent = exponent};
    rows->from = lt_zipf_integral(exponent, 1.5) - 1;
    rows->to = lt_zipf_integral(exponent, (double)n + 0.5);
    rows->keep = 2 - lt_zipf_inverse(exponent, lt_zipf_integral(exponent, 2.5) - pow(2, -exponent));
}

static inline uint64_t lt_draw_row(struct lt_rows *rows, struct lt_random *random)
{
    if (rows->draw == LT_UNIFORM)
        return lt_below(random, rows->n);
    if (rows->draw == LT_IN_TURN) {
        uint64_t row = rows->next;
        rows->next = row + 1 < rows->n ? row + 1 : 0;
        return row;
    }
    for (;;) {
        double area = rows->to + lt_uniform(random) * (rows->from - rows->to);
        double x = lt_zipf_inverse(rows->exponent, area), k = floor(x + 0.5);
        k = k < 1 ? 1 : k > (double)rows->n ? (double)rows->n : k;
        if (k - x <= rows->keep || area >= lt_zipf_integral(rows->exponent, k + 0.5) - pow(k, -rows->exponent))
            return (uint64_t)k - 1;
    }
}

/* -- arrival times ------------------------------------------------------------------------------------------ */

/* Arrivals at `rate_from` per second for `hold_s` seconds, then at a rate that changes linearly to `rate_to` over
 * `ramp_s` seconds. `expected` is the expected number of arrivals until now: it grows with each arrival by 1 (constant)
 * or by an exponential number with mean 1 (Poisson), and the time is computed from it. This is exact for a rate that
 * changes. */
struct lt_arrivals {
    int poisson;
    double rate_from, rate_to, hold_s, ramp_s, expected;
};

/* Returns seconds since the start; infinity if the rate falls to 0 before the next arrival. */
static inline double lt_next_arrival(struct lt_arrivals *a, struct lt_random *random)
{
    double held = a->rate_from * a->hold_s, expected = a->expected, bend, root;
    a->expected += a->poisson ? lt_exponential(random) : 1;
    if (a->poisson)
        expected = a->expected;
    if (expected <= held || a->rate_from == a->rate_to)
        return expected / a->rate_from;
    bend = (a->rate_to - a->rate_from) / (2 * a->ramp_s);
    root = a->rate_from * a->rate_from + 4 * bend * (expected - held);
    return root < 0 ? INFINITY : a->hold_s + 2 * (expected - held) / (a->rate_from + sqrt(root));
}

/* -- histograms --------------------------------------------------------------------------------------------- */

/* The buckets of HdrHistogram (Gil Tene) for values from 1 to 3.6e12 (an hour in nanoseconds) with three digits: 1024
 * buckets per octave. Any HdrHistogram library can read the counts unchanged. */
enum { LT_HALF_BITS = 10, LT_OCTAVES = 32, LT_COUNTS = (LT_OCTAVES + 1) << LT_HALF_BITS };
#define LT_HIGHEST 3600000000000u

struct lt_histogram {
    uint64_t *counts; /* LT_COUNTS */
    uint64_t total, max;
    double sum;
};

static inline uint32_t lt_bucket(uint64_t value)
{
    uint32_t octave = 64u - (uint32_t)__builtin_clzll(value | ((2u << LT_HALF_BITS) - 1)) - (LT_HALF_BITS + 1);
    return (octave << LT_HALF_BITS) + (uint32_t)(value >> octave);
}

static inline void lt_record(struct lt_histogram *h, uint64_t value)
{
    if (value > LT_HIGHEST)
        value = LT_HIGHEST;
    h->counts[lt_bucket(value)]++;
    h->total++;
    h->sum += (double)value;
    if (value > h->max)
        h->max = value;
}

#endif

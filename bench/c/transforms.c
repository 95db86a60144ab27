/* The five transforms of bench/micro/ondemand.py as a C programmer would write them: into columns of a row-major matrix. */
#include <math.h>
#include <stddef.h>

static void ratio(const double *a, const double *b, float *out, size_t stride, size_t n)
{
    for (size_t i = 0; i < n; i++) out[i * stride] = (float)(a[i] / (b[i] > 1.0 ? b[i] : 1.0));
}

static void balance(const double *a, const double *b, float *out, size_t stride, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double sum = a[i] + b[i];
        out[i * stride] = (float)(sum > 0 ? (a[i] - b[i]) / sum : 0.0);
    }
}

static void growth(const double *a, const double *b, float *out, size_t stride, size_t n)
{
    for (size_t i = 0; i < n; i++) out[i * stride] = (float)(log1p(a[i]) - log1p(b[i]));
}

static void length(const double *a, const double *b, float *out, size_t stride, size_t n)
{
    for (size_t i = 0; i < n; i++) out[i * stride] = (float)sqrt(a[i] * a[i] + b[i] * b[i]);
}

static void decay(const double *a, const double *b, float *out, size_t stride, size_t n)
{
    for (size_t i = 0; i < n; i++) out[i * stride] = (float)(exp(-0.1 * a[i]) * (b[i] > 1.0 ? 1.0 : b[i]));
}

void transforms(const double *a, const double *b, float *out, size_t n)
{
    ratio(a, b, out, 5, n);
    balance(a, b, out + 1, 5, n);
    growth(a, b, out + 2, 5, n);
    length(a, b, out + 3, 5, n);
    decay(a, b, out + 4, 5, n);
}

/* Antialiased resize of 8-bit pictures, bit for bit what Pillow 13 gives, several times as fast.
 *
 * Pillow's algorithm (src/libImaging/Resample.c): two passes, each a weighted sum of the source pixels under a filter
 * that is widened when the picture shrinks, weights as integers of 22 fractional bits, each pass rounded and clipped to
 * 8 bits. Pillow works pixel by pixel, as its builds must run on any x86-64; here 16 sums go at a time, by the
 * compiler's vector types. resample_kernel.h is compiled once for each instruction set; the best is taken at run time.
 *
 * Called by resample.py through ctypes: no Python here, so that no interpreter's ABI and no lock is involved.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BITS = 22, BILINEAR = 0, BICUBIC = 1, LANCZOS = 2 };

/* One axis: outputs first .. first + count of a resize of source[begin, end) of `have` pixels to `total`; mirrored, the
 * last of them is written first. */
typedef struct {
    int32_t have, total, first, count, is_mirrored;
    float begin, end; /* Pillow holds its box in 32-bit floats */
} axis_t;

typedef struct {
    int32_t size;    /* weights an output, at most */
    int32_t *bounds; /* first source pixel and number of weights, an output */
    int32_t *weights;
} taps_t;

static double bilinear(double x) {
    x = x < 0.0 ? -x : x;
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x) { /* Keys (1981), a = -0.5 */
    const double a = -0.5;
    x = x < 0.0 ? -x : x;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static double sinc(double x) {
    if (x == 0.0) return 1.0;
    x = x * M_PI;
    return sin(x) / x;
}

static double lanczos(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

static int make_taps(const axis_t *axis, int32_t filter, taps_t *taps) {
    static double (*const filters[])(double) = {bilinear, bicubic, lanczos};
    const double scale = (double)(axis->end - axis->begin) / axis->total;
    const double wide = scale < 1.0 ? 1.0 : scale, support = (filter + 1.0) * wide, narrow = 1.0 / wide;
    const int32_t size = (int32_t)ceil(support) * 2 + 1;
    double *real = malloc(size * sizeof *real);
    taps->size = size;
    taps->bounds = malloc((size_t)axis->count * 2 * sizeof *taps->bounds);
    taps->weights = malloc((size_t)axis->count * size * sizeof *taps->weights);
    if (real == NULL || taps->bounds == NULL || taps->weights == NULL) {
        free(real);
        return -1;
    }
    for (int32_t out = 0; out < axis->count; out++) {
        const int32_t place = axis->is_mirrored ? axis->count - 1 - out : out;
        const double center = axis->begin + (place + axis->first + 0.5) * scale;
        int32_t low = (int32_t)(center - support + 0.5), high = (int32_t)(center + support + 0.5);
        double sum = 0.0;
        low = low < 0 ? 0 : low;
        high = (high > axis->have ? axis->have : high) - low;
        for (int32_t at = 0; at < high; at++) {
            real[at] = filters[filter]((at + low - center + 0.5) * narrow);
            sum += real[at];
        }
        for (int32_t at = 0; at < high; at++) {
            const double weight = (sum != 0.0 ? real[at] / sum : real[at]) * (1 << BITS);
            taps->weights[(size_t)out * size + at] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        taps->bounds[2 * out] = low;
        taps->bounds[2 * out + 1] = high;
    }
    free(real);
    return 0;
}

static void free_taps(taps_t *taps) {
    free(taps->bounds);
    free(taps->weights);
}

/* The source pixels that an axis reads: [*low, *high). */
static void reach(const taps_t *taps, int32_t count, int32_t *low, int32_t *high) {
    const int32_t *first = taps->bounds, *last = taps->bounds + 2 * (count - 1);
    *low = first[0] < last[0] ? first[0] : last[0];
    *high = first[0] + first[1] > last[0] + last[1] ? first[0] + first[1] : last[0] + last[1];
}

static inline uint8_t clip(int32_t sum) {
    sum >>= BITS;
    return sum < 0 ? 0 : sum > 255 ? 255 : (uint8_t)sum;
}

typedef void across_t(const uint8_t *in, size_t in_stride, int channels, int32_t rows, const taps_t *taps,
                      int32_t count, uint8_t *strip, uint8_t *out, size_t out_stride);
typedef void down_t(const uint8_t *in, size_t in_stride, int32_t bytes, int32_t top, const taps_t *taps, int32_t count,
                    uint8_t *out, size_t out_stride);
typedef void planes_t(const uint8_t *in, int32_t pixels, const float *scale, const float *bias, float *out);

/* sum16: the weighted sum of 16 bytes of each of `taps` rows that lie `stride` apart, rounded and clipped. */
static inline void sum16_base(const uint8_t *in, size_t stride, const int32_t *weights, int32_t taps, uint8_t *out) {
    int32_t sums[16];
    for (int lane = 0; lane < 16; lane++) sums[lane] = 1 << (BITS - 1);
    for (int32_t tap = 0; tap < taps; tap++, in += stride) {
        for (int lane = 0; lane < 16; lane++) sums[lane] += in[lane] * weights[tap];
    }
    for (int lane = 0; lane < 16; lane++) out[lane] = clip(sums[lane]);
}

#define NAME(what) what##_base
#include "resample_kernel.h"
#undef NAME

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_COPIES 1
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2")
static inline void sum16_avx2(const uint8_t *in, size_t stride, const int32_t *weights, int32_t taps, uint8_t *out) {
    __m256i low = _mm256_set1_epi32(1 << (BITS - 1)), high = low;
    for (int32_t tap = 0; tap < taps; tap++, in += stride) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)in);
        const __m256i weight = _mm256_set1_epi32(weights[tap]);
        low = _mm256_add_epi32(low, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(bytes), weight));
        high = _mm256_add_epi32(high, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)), weight));
    }
    const __m256i words = _mm256_packus_epi32(_mm256_srai_epi32(low, BITS), _mm256_srai_epi32(high, BITS));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
    const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128((__m128i *)out, packed);
}

#define NAME(what) what##_avx2
#include "resample_kernel.h"
#undef NAME
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
static inline void sum16_avx512(const uint8_t *in, size_t stride, const int32_t *weights, int32_t taps, uint8_t *out) {
    __m512i sum = _mm512_set1_epi32(1 << (BITS - 1));
    for (int32_t tap = 0; tap < taps; tap++, in += stride) {
        const __m512i pixels = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)in));
        sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(pixels, _mm512_set1_epi32(weights[tap])));
    }
    sum = _mm512_max_epi32(_mm512_srai_epi32(sum, BITS), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)out, _mm512_cvtusepi32_epi8(sum));
}

#define NAME(what) what##_avx512
#include "resample_kernel.h"
#undef NAME
#pragma GCC pop_options
#endif

static across_t *across = across_base;
static down_t *down = down_base;
static planes_t *planes = planes_base;

/* Of what the functions below take: resample.py refuses a library of another, built before its source changed. */
int32_t eagleray_interface(void) { return 2; }

/* Picks the widest instruction set at or under `most` (0 = base, 1 = AVX2, 2 = AVX-512) that is here; says which. */
int32_t eagleray_choose(int32_t most) {
    across = across_base, down = down_base, planes = planes_base;
#ifdef HAS_COPIES
    __builtin_cpu_init();
    if (most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        across = across_avx512, down = down_avx512, planes = planes_avx512;
        return 2;
    }
    if (most >= 1 && __builtin_cpu_supports("avx2")) {
        across = across_avx2, down = down_avx2, planes = planes_avx2;
        return 1;
    }
#endif
    return 0;
}

/* Resizes uint8 (rows, columns, channels), channels 1, 3 or 4 (the fourth is not read), to uint8 (y.count, x.count, 3).
 * Returns 0, or -1 when there is no memory. */
int32_t eagleray_resize(const uint8_t *in, size_t in_stride, int32_t channels, const axis_t *x, const axis_t *y,
                        int32_t filter, int32_t is_down_first, uint8_t *out, size_t out_stride) {
    taps_t tx = {0}, ty = {0};
    uint8_t *middle = NULL, *strip = NULL;
    int32_t left, right, top, bottom, status = -1;
    if (make_taps(x, filter, &tx) != 0 || make_taps(y, filter, &ty) != 0) goto done;
    reach(&tx, x->count, &left, &right);
    reach(&ty, y->count, &top, &bottom);
    strip = malloc((size_t)(right - left) * 16);
    const size_t wide = is_down_first ? (size_t)(right - left) * channels : (size_t)x->count * 3;
    middle = malloc(wide * (is_down_first ? y->count : bottom - top) + 64);
    if (strip == NULL || middle == NULL) goto done;
    for (int32_t at = 0; at < x->count; at++) tx.bounds[2 * at] -= left;
    const uint8_t *from = in + (size_t)left * channels;
    if (is_down_first) {
        down(from, in_stride, (right - left) * channels, 0, &ty, y->count, middle, wide);
        across(middle, wide, channels, y->count, &tx, x->count, strip, out, out_stride);
    } else {
        across(from + top * in_stride, in_stride, channels, bottom - top, &tx, x->count, strip, middle, wide);
        down(middle, wide, x->count * 3, top, &ty, y->count, out, out_stride);
    }
    status = 0;
done:
    free(strip);
    free(middle);
    free_taps(&tx);
    free_taps(&ty);
    return status;
}

/* uint8 (pixels, 3) to three float planes: value * scale + bias, rounded after the product, as numpy does it. */
void eagleray_planes(const uint8_t *in, int32_t pixels, const float *scale, const float *bias, float *out) {
    planes(in, pixels, scale, bias, out);
}

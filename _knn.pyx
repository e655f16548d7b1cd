# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Exact neighbour counting on the CPU: blocked similarity rows in, hit counts out.

The caller multiplies a block of queries with all candidates in float32 (BLAS) and hands the rows over.
For each query the kernel

1. maps similarities to 16-bit keys, in an order-preserving way, and makes one histogram of them;
2. reads the bin of every needed rank R off the cumulative sum;
3. counts ``key > threshold and label == value`` in straight loops that vectorise, or walks the members of
   the query's class where that is shorter;
4. resolves what lies near the threshold exactly: by the float32 values as far as their error bound allows,
   then by float64 distances. No row is sorted, no list of R neighbours is kept.

Candidates at the same distance from the query are tied. Where the cut at R goes through a tied group, each of
it is retrieved with the probability (places left) / (number tied): the mean over all orders of the rows. Or,
as released, the smaller index goes first.

Float64 distances are NumPy's to the last bit (its pairwise summation is repeated here), so that the counts
equal this brute force, for every input:

    d = np.sqrt(((x[q] - x) ** 2).sum(1))       # x float64; the other distances are in distance64()
    d[q] = np.inf                               # the query is left out by its index
    nearest = np.argsort(d, kind="stable")[:R]  # smaller distance first, equal ones by smaller index
    cut = d[nearest[-1]]
    hits = (d < cut) @ same + (d == cut) @ same * (R - (d < cut).sum()) / (d == cut).sum()

Python validates and allocates (nrprec.py); everything here trusts its arguments.
"""
from cython.parallel cimport prange, threadid
from libc.math cimport sqrt
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memset

import os

import numpy as np

cdef extern from *:
    """
    #include <stdint.h>
    #include <stddef.h>
    #include <string.h>

    /* Plain loops are compiled for three levels of x86-64 where the compiler can do it (setup.py tries);
       `isa` chooses: 0 the plain loops, 1 AVX2, 2 AVX-512. Elsewhere there is one version, arm64's with NEON.
    */
    static int isa = 0, has_vbmi2 = 0;
    #ifdef __GNUC__
    #define LOOP static inline __attribute__((always_inline))
    #define PREFETCH(address) __builtin_prefetch(address)
    #else
    #include <intrin.h>        /* MSVC's: the plain loops alone */
    #define LOOP static __forceinline
    #define PREFETCH(address) ((void)(address))
    #define __builtin_popcountll(bits) ((int)__popcnt64(bits))
    #endif
    #ifdef KNN_X86
    #include <immintrin.h>
    static int has_vpopcnt = 0;
    #define AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
    #define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi,bmi2,popcnt")))
    #define EACH_ISA(type, name, parameters, arguments) \
        static type name##_plain parameters { return name##_loop arguments; } \
        AVX2 static type name##_avx2 parameters { return name##_loop arguments; } \
        AVX512 static type name##_avx512 parameters { return name##_loop arguments; } \
        static type name parameters \
        { \
            return isa == 2 ? name##_avx512 arguments \
                 : isa == 1 ? name##_avx2 arguments : name##_plain arguments; \
        }
    static int best_isa(void)
    {
        if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl")) return 2;
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
    }
    static void set_isa(int level)
    {
        isa = level;
        has_vbmi2 = level == 2 && __builtin_cpu_supports("avx512vbmi2");
        has_vpopcnt = level == 2 && __builtin_cpu_supports("avx512vpopcntdq");
    }
    #else
    #define EACH_ISA(type, name, parameters, arguments) \
        static type name parameters { return name##_loop arguments; }
    static int best_isa(void) { return 0; }
    static void set_isa(int level) { isa = level; }
    #endif

    #define BINS 16384         /* of the histogram: 64 KiB of counts; a row's bulk touches about half */
    #define BIN_SHIFT 2        /* 65,536 keys / BINS = 4 keys a bin */

    /* similarity = product + offset -> key in -32767 .. 32766; monotone, as every rounded step is.
       -32768 is left for the query itself, 32767 for items promoted above every threshold. */
    LOOP void to_keys_loop(const float *product, const float *offset, ptrdiff_t n, float low, float scale,
                           int16_t *key)
    {
        for (ptrdiff_t i = 0; i < n; i++) {
            float x = (product[i] + offset[i] - low) * scale;
            x = x < 1.0f ? 1.0f : x;
            x = x > 65534.0f ? 65534.0f : x;
            key[i] = (int16_t)((int32_t)x - 32768);
        }
    }
    EACH_ISA(void, to_keys, (const float *product, const float *offset, ptrdiff_t n, float low, float scale,
              int16_t *key),
             (product, offset, n, low, scale, key))

    static void add_histogram(const int16_t *key, ptrdiff_t n, uint32_t *histogram)
    {
        ptrdiff_t i = 0;
        for (; i + 4 <= n; i += 4) {                          /* four keys a load: 1.6 x one by one */
            uint64_t four;
            memcpy(&four, key + i, 8);
            four ^= 0x8000800080008000u;
            histogram[(four & 0xffff) >> BIN_SHIFT]++;
            histogram[(four >> 16 & 0xffff) >> BIN_SHIFT]++;
            histogram[(four >> 32 & 0xffff) >> BIN_SHIFT]++;
            histogram[(four >> 48) >> BIN_SHIFT]++;
        }
        for (; i < n; i++)
            histogram[(uint16_t)(key[i] ^ (int16_t)0x8000) >> BIN_SHIFT]++;
    }

    /* The same for keys >= least alone, which AVX-512's compression puts side by side first; chunks of up to
       CHUNK. */
    #define CHUNK 4096
    #ifdef KNN_X86
    __attribute__((target("avx512bw,avx512vl,avx512vbmi2,popcnt")))
    static void add_histogram_above(const int16_t *key, ptrdiff_t n, int16_t least, uint32_t *histogram)
    {
        int16_t kept[CHUNK + 32];
        ptrdiff_t count = 0;
        for (ptrdiff_t i = 0; i < n; i += 32) {
            const __mmask32 valid = n - i < 32 ? ((uint32_t)1 << (n - i)) - 1 : ~(uint32_t)0;
            const __m512i keys = _mm512_maskz_loadu_epi16(valid, key + i);
            const __mmask32 high = _mm512_mask_cmpge_epi16_mask(valid, keys, _mm512_set1_epi16(least));
            _mm512_storeu_si512(kept + count, _mm512_maskz_compress_epi16(high, keys));
            count += __builtin_popcount(high);
        }
        add_histogram(kept, count, histogram);
    }
    #else
    #define add_histogram_above(key, n, least, histogram) add_histogram(key, n, histogram)
    #endif

    /* Counts become numbers of items in higher bins, as far down as `deepest` items: the lowest such bin, −1
       where there are fewer. Lower ones are never read. */
    static ptrdiff_t sum_from_top(uint32_t *histogram, uint32_t deepest)
    {
        uint32_t total = 0;
        for (ptrdiff_t i = BINS - 8; i >= 0; i -= 8) {
            for (int j = 7; j >= 0; j--) {
                const uint32_t here = histogram[i + j];
                histogram[i + j] = total;
                total += here;
            }
            if (total >= deepest) {
                for (i += 7; histogram[i] < deepest && i % 8; i--);
                return histogram[i] < deepest ? i : i + 1;
            }
        }
        return -1;
    }

    LOOP int64_t count_above_loop(const int16_t *key, const uint8_t *code, ptrdiff_t n, int16_t threshold,
                                  uint8_t value)
    {
        int64_t total = 0;
        while (n > 0) {
            ptrdiff_t part = n < 32768 ? n : 32768;
            uint16_t hits = 0;                                /* 16-bit lanes like the keys; at most 32,768 */
            for (ptrdiff_t i = 0; i < part; i++)
                hits += (uint16_t)((key[i] > threshold) & (code[i] == value));
            total += hits;
            key += part; code += part; n -= part;
        }
        return total;
    }
    EACH_ISA(int64_t, count_above, (const int16_t *key, const uint8_t *code, ptrdiff_t n, int16_t threshold,
              uint8_t value),
             (key, code, n, threshold, value))

    /* Indices of low <= key <= high, in ascending order. Few items are: whole blocks are tested first. */
    LOOP ptrdiff_t collect_loop(const int16_t *key, ptrdiff_t n, int16_t low, int16_t high, int32_t *index)
    {
        const uint16_t width = (uint16_t)(high - low);
        ptrdiff_t found = 0, i = 0;
        for (; i + 512 <= n; i += 512) {
            uint16_t inside = 0;
            for (int j = 0; j < 512; j++)
                inside += (uint16_t)((uint16_t)(key[i + j] - low) <= width);
            if (!inside) continue;
            for (int k = 0; k < 512; k += 64) {
                uint16_t here = 0;
                for (int j = 0; j < 64; j++)
                    here |= (uint16_t)((uint16_t)(key[i + k + j] - low) <= width);
                if (!here) continue;
                for (int j = 0; j < 64; j++) {                /* branchless: always written, rarely kept */
                    index[found] = (int32_t)(i + k + j);
                    found += (uint16_t)(key[i + k + j] - low) <= width;
                }
            }
        }
        for (; i < n; i++)
            if ((uint16_t)(key[i] - low) <= width) index[found++] = (int32_t)i;
        return found;
    }
    EACH_ISA(ptrdiff_t, collect, (const int16_t *key, ptrdiff_t n, int16_t low, int16_t high, int32_t *index),
             (key, n, low, high, index))

    /* 64 keys > threshold as bits. A frequent value has its pictures as a bit plane too, an eighth of the
       bytes of the codes, so that a count is AND and popcount. Rows of keys are padded to a multiple of 64
       with keys that no threshold lets through. */
    #ifdef KNN_X86
    AVX2 static inline uint64_t above64_avx2(const int16_t *key, int16_t threshold)
    {
        const __m256i least = _mm256_set1_epi16(threshold);
        uint64_t bits = 0;
        for (int half = 0; half < 64; half += 32) {
            const __m256i a = _mm256_cmpgt_epi16(_mm256_loadu_si256((const void *)(key + half)), least);
            const __m256i b = _mm256_cmpgt_epi16(_mm256_loadu_si256((const void *)(key + half + 16)), least);
            const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
            bits |= (uint64_t)(uint32_t)_mm256_movemask_epi8(both) << half;
        }
        return bits;
    }
    AVX512 static inline uint64_t above64_avx512(const int16_t *key, int16_t threshold)
    {
        const __m512i least = _mm512_set1_epi16(threshold);
        const __mmask32 a = _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(key), least);
        const __mmask32 b = _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(key + 32), least);
        return _mm512_kunpackd(b, a);
    }
    #define VECTOR_LOOPS(TARGET, above64, scan_vector, above_vector) \
        TARGET static int64_t scan_vector(const int16_t *key, const uint64_t *plane, ptrdiff_t n, \
                                          int16_t low, int16_t high, int32_t *index, ptrdiff_t *found) \
        { \
            int64_t hits = 0; \
            ptrdiff_t kept = 0; \
            for (ptrdiff_t i = 0, word = 0; i < n; i += 64, word++) { \
                const uint64_t above = above64(key + i, high); \
                uint64_t near = above64(key + i, low - 1) & ~above; \
                hits += __builtin_popcountll(above & (plane ? plane[word] : 0)); \
                for (; near; near &= near - 1) index[kept++] = (int32_t)(i + __builtin_ctzll(near)); \
            } \
            *found = kept; \
            return hits; \
        } \
        TARGET static void above_vector(const int16_t *key, ptrdiff_t n, int16_t threshold, uint64_t *bits) \
        { \
            for (ptrdiff_t i = 0; i < n; i += 64) bits[i / 64] = above64(key + i, threshold); \
        }
    VECTOR_LOOPS(AVX2, above64_avx2, scan_avx2, above_avx2)
    VECTOR_LOOPS(AVX512, above64_avx512, scan_avx512, above_avx512)
    #else
    #define scan_avx2(key, plane, n, low, high, index, found) 0
    #define scan_avx512(key, plane, n, low, high, index, found) 0
    #define above_avx2(key, n, threshold, bits) ((void)0)
    #define above_avx512(key, n, threshold, bits) ((void)0)
    #endif

    /* Number of items with key > high and the given code (none counted without codes), and the indices of
       low <= key <= high in ascending order. */
    static int64_t scan(const int16_t *key, const uint8_t *code, const uint64_t *plane, ptrdiff_t n,
                        int16_t low, int16_t high, uint8_t value, int32_t *index, ptrdiff_t *found)
    {
        int64_t hits = 0;
        if (isa == 2) hits = scan_avx512(key, plane, n, low, high, index, found);
        else if (isa == 1) hits = scan_avx2(key, plane, n, low, high, index, found);
        else *found = collect(key, n, low, high, index);
        return code && !(isa && plane) ? count_above(key, code, n, high, value) : hits;
    }
    static void above_bits(const int16_t *key, ptrdiff_t n, int16_t threshold, uint64_t *bits)
    {
        if (isa == 2) above_avx512(key, n, threshold, bits);
        else above_avx2(key, n, threshold, bits);
    }
    LOOP int64_t common_bits_loop(const uint64_t *a, const uint64_t *b, ptrdiff_t words)
    {
        int64_t total = 0;
        for (ptrdiff_t i = 0; i < words; i++) total += __builtin_popcountll(a[i] & b[i]);
        return total;
    }
    /* What is next is fetched while this is counted: masks lie too far apart for the processor to guess. */
    typedef int64_t counted(const uint64_t *a, const uint64_t *b, ptrdiff_t words);
    LOOP void common_bits_each(const uint64_t *const *a, const uint64_t *const *b, int32_t *const *total,
                               ptrdiff_t number, ptrdiff_t words, counted *count)
    {
        for (ptrdiff_t i = 0; i < number; i++) {
            for (ptrdiff_t at = 0; at < words && i + 1 < number; at += 8) {
                PREFETCH(a[i + 1] + at);
                PREFETCH(b[i + 1] + at);
            }
            *total[i] += (int32_t)count(a[i], b[i], words);
        }
    }
    #ifdef KNN_X86
    AVX2 static int64_t common_bits_by_table(const uint64_t *a, const uint64_t *b, ptrdiff_t words)
    {
        const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
        const __m256i ones = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                              0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
        __m256i sum = zero;
        ptrdiff_t at = 0;
        while (at + 4 <= words) {           /* 16 times at most 8 fit a byte */
            const ptrdiff_t stop = at + 64 <= words ? at + 64 : words & ~(ptrdiff_t)3;
            __m256i bytes = zero;
            for (; at < stop; at += 4) {
                const __m256i both = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(a + at)),
                                                      _mm256_loadu_si256((const __m256i *)(b + at)));
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                bytes = _mm256_add_epi8(bytes, _mm256_shuffle_epi8(ones, _mm256_and_si256(both, low)));
                bytes = _mm256_add_epi8(bytes, _mm256_shuffle_epi8(ones, high));
            }
            sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, zero));
        }
        uint64_t four[4];
        _mm256_storeu_si256((__m256i *)four, sum);
        return four[0] + four[1] + four[2] + four[3] + common_bits_loop(a + at, b + at, words - at);
    }
    AVX2 static void common_bits_avx2(const uint64_t *const *a, const uint64_t *const *b,
                                      int32_t *const *total, ptrdiff_t number, ptrdiff_t words)
    {
        common_bits_each(a, b, total, number, words, common_bits_by_table);
    }
    __attribute__((target("avx512f,avx512vpopcntdq,prefer-vector-width=512")))
    static void common_bits_vpopcnt(const uint64_t *const *a, const uint64_t *const *b,
                                    int32_t *const *total, ptrdiff_t number, ptrdiff_t words)
    {
        common_bits_each(a, b, total, number, words, common_bits_loop);
    }
    static void common_bits(const uint64_t *const *a, const uint64_t *const *b, int32_t *const *total,
                            ptrdiff_t number, ptrdiff_t words)
    {
        (has_vpopcnt ? common_bits_vpopcnt : common_bits_avx2)(a, b, total, number, words);
    }
    #else
    static void common_bits(const uint64_t *const *a, const uint64_t *const *b, int32_t *const *total,
                            ptrdiff_t number, ptrdiff_t words)
    {
        common_bits_each(a, b, total, number, words, common_bits_loop);
    }
    #endif

    /* NumPy's order of summation along a contiguous axis: eight lanes in blocks of up to 128, then halves. */
    LOOP double pairwise_block_loop(const double *a, ptrdiff_t n)
    {
        if (n < 8) {
            double sum = 0.0;
            for (ptrdiff_t i = 0; i < n; i++) sum += a[i];
            return sum;
        }
        double r[8];
        ptrdiff_t i;
        for (int j = 0; j < 8; j++) r[j] = a[j];
        for (i = 8; i < n - (n % 8); i += 8)
            for (int j = 0; j < 8; j++) r[j] += a[i + j];
        double sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
        for (; i < n; i++) sum += a[i];
        return sum;
    }
    EACH_ISA(double, pairwise_block, (const double *a, ptrdiff_t n),
             (a, n))
    static double pairwise_sum(const double *a, ptrdiff_t n)
    {
        if (n <= 128) return pairwise_block(a, n);
        ptrdiff_t half = n / 2;
        half -= half % 8;
        return pairwise_sum(a, half) + pairwise_sum(a + half, n - half);
    }

    /* One row of the embeddings as they came (float16, float32 or float64: `size` bytes) as float32, divided
       by its length where that is not 0. */
    static const float *float_row(const void *x, int size, ptrdiff_t m, double length, float *buffer)
    {
        if (size == 4 && length == 0.0) return (const float *)x;
        for (ptrdiff_t j = 0; j < m; j++) {
            float value;
            if (size == 2) {                                  /* its exponent's bias is 15, float32's 127 */
                const uint16_t half = ((const uint16_t *)x)[j];
                const uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
                memcpy(&value, &bits, 4);
                value *= half & 0x8000 ? -0x1p112f : 0x1p112f;
            } else {
                value = size == 4 ? ((const float *)x)[j] : (float)((const double *)x)[j];
            }
            buffer[j] = length == 0.0 ? value : (float)((double)value / length);
        }
        return buffer;
    }

    /* The summands of a distance: plain loops again, so that they vectorise. */
    LOOP void squared_differences_loop(const float *a, const float *b, ptrdiff_t m, double *term)
    {
        for (ptrdiff_t j = 0; j < m; j++) {
            const double difference = (double)a[j] - (double)b[j];
            term[j] = difference * difference;
        }
    }
    EACH_ISA(void, squared_differences, (const float *a, const float *b, ptrdiff_t m, double *term),
             (a, b, m, term))

    /* Inner products in -1 .. 1 -> bins 0 .. bins - 1 of equal width, 1 in the last; `bins` itself where the
       rounding error (margin, in bins) leaves two of them open. half = bins / 2; beyond the outermost edges
       nothing is open. */
    LOOP void to_bins_loop(const float *product, ptrdiff_t n, float half, float margin, int16_t *key)
    {
        const float top = 2.0f * half - 0.5f, other = 1.0f - margin;
        const int32_t open = (int32_t)(2.0f * half);
        for (ptrdiff_t i = 0; i < n; i++) {
            float x = product[i] * half + half;
            x = x < 0.5f ? 0.5f : x;
            x = x > top ? top : x;
            const int32_t bin = (int32_t)x;
            const float part = x - (float)bin;
            key[i] = (int16_t)((part < margin) | (part > other) ? open : bin);
        }
    }
    EACH_ISA(void, to_bins, (const float *product, ptrdiff_t n, float half, float margin, int16_t *key),
             (product, n, half, margin, key))

    /* Few bins are hit again and again: eight histograms side by side, so that no store waits for another. */
    #define COPIES 8
    static void add_bins(const int16_t *key, ptrdiff_t n, uint32_t *histogram, ptrdiff_t stride)
    {
        uint32_t *h0 = histogram, *h1 = h0 + stride, *h2 = h1 + stride, *h3 = h2 + stride;
        uint32_t *h4 = h3 + stride, *h5 = h4 + stride, *h6 = h5 + stride, *h7 = h6 + stride;
        ptrdiff_t i = 0;
        for (; i + 8 <= n; i += 8) {
            uint64_t a, b;
            memcpy(&a, key + i, 8);
            memcpy(&b, key + i + 4, 8);
            h0[a & 0xffff]++;
            h1[a >> 16 & 0xffff]++;
            h2[a >> 32 & 0xffff]++;
            h3[a >> 48]++;
            h4[b & 0xffff]++;
            h5[b >> 16 & 0xffff]++;
            h6[b >> 32 & 0xffff]++;
            h7[b >> 48]++;
        }
        for (; i < n; i++) h0[key[i]]++;
    }

    /* The summands of an inner product of normalised rows; unit is the first row, normalised already. */
    LOOP void unit_products_loop(const double *unit, const float *b, double norm, ptrdiff_t m, double *term)
    {
        for (ptrdiff_t j = 0; j < m; j++) term[j] = unit[j] * ((double)b[j] / norm);
    }
    EACH_ISA(void, unit_products, (const double *unit, const float *b, double norm, ptrdiff_t m,
              double *term),
             (unit, b, norm, m, term))

    typedef struct { double distance; int64_t index; } item_t;

    static inline int item_less(item_t a, item_t b)
    {
        return a.distance < b.distance || (a.distance == b.distance && a.index < b.index);
    }

    static int compare_items(const void *a, const void *b)
    {
        const item_t x = *(const item_t *)a, y = *(const item_t *)b;
        return item_less(y, x) - item_less(x, y);
    }
    """
    ctypedef struct item_t:
        double distance
        int64_t index
    const int BINS
    const int BIN_SHIFT
    void PREFETCH(const void *address) noexcept nogil
    void to_keys(const float *product, const float *offset, ptrdiff_t n, float low, float scale,
                 int16_t *key) noexcept nogil
    void add_histogram(const int16_t *key, ptrdiff_t n, uint32_t *histogram) noexcept nogil
    void add_histogram_above(const int16_t *key, ptrdiff_t n, int16_t least,
                             uint32_t *histogram) noexcept nogil
    int has_vbmi2
    const int CHUNK
    ptrdiff_t sum_from_top(uint32_t *histogram, uint32_t deepest) noexcept nogil
    int64_t count_above(const int16_t *key, const uint8_t *code, ptrdiff_t n, int16_t threshold,
                        uint8_t value) noexcept nogil
    int64_t scan(const int16_t *key, const uint8_t *code, const uint64_t *plane, ptrdiff_t n, int16_t low,
                 int16_t high, uint8_t value, int32_t *index, ptrdiff_t *found) noexcept nogil
    void above_bits(const int16_t *key, ptrdiff_t n, int16_t threshold, uint64_t *bits) noexcept nogil
    void common_bits(const uint64_t **a, const uint64_t **b, int32_t **total, ptrdiff_t number,
                     ptrdiff_t words) noexcept nogil
    int isa
    int best_isa() noexcept nogil
    void set_isa(int level) noexcept nogil
    const float *float_row(const void *x, int size, ptrdiff_t m, double length, float *buffer) noexcept nogil
    void squared_differences(const float *a, const float *b, ptrdiff_t m, double *term) noexcept nogil
    double pairwise_sum(const double *a, ptrdiff_t n) noexcept nogil
    const int COPIES
    void to_bins(const float *product, ptrdiff_t n, float half, float margin, int16_t *key) noexcept nogil
    void add_bins(const int16_t *key, ptrdiff_t n, uint32_t *histogram, ptrdiff_t stride) noexcept nogil
    void unit_products(const double *unit, const float *b, double norm, ptrdiff_t m,
                       double *term) noexcept nogil
    bint item_less(item_t a, item_t b) noexcept nogil
    int compare_items(const void *a, const void *b) noexcept nogil

INTERFACE = 6                   # of the functions here: the scripts take no other
ISAS = ("scalar", "avx2", "avx512")[:best_isa() + 1]               # what this processor has
ISA = os.environ.get("KNN_ISA") or ISAS[best_isa()]


def use(name):
    """Take the loops of one instruction set of ISAS. ValueError where the processor lacks it."""
    global ISA
    if name not in ISAS:
        raise ValueError(f"KNN_ISA is {name!r}; expected one of {', '.join(ISAS)}, which this processor has")
    set_isa(ISAS.index(name))
    ISA = name


cdef enum:
    PIECE = 128                 # words of a mask, 8,192 candidates, that stay in the cache
    GROUP = 128                 # queries, at most, that share them

DISTANCES = ("euclidean", "squared_euclidean", "cosine", "dot_product", "snr")

cdef struct Space:              # what a distance needs, the same for every query
    const uint8_t *x            # (N, m) the embeddings as they came, maybe in a memory-mapped file,
    int size                    # numbers of so many bytes: float16, float32 or float64, taken as float32
    const int64_t *rows         # (n,) where in x the candidates stand
    const double *lengths       # (n,) by which they are divided, or NULL
    const double *aux           # (n,) cosine: norms, snr: variances, else unused
    const float *offset         # (n,) added to the products to make similarities
    ptrdiff_t n
    ptrdiff_t m
    int distance                # index into DISTANCES

cdef struct Row:                # one query at work: its thread's scratch and what is known so far
    const float *product        # (n,) float32 products with every candidate
    ptrdiff_t query
    double bound                # |computed − true similarity| is at most this
    float low                   # a similarity's key is (similarity − low) · scale
    float scale
    int16_t *key                # (n,), and behind them −32768 up to a multiple of 64
    uint32_t *above             # (BINS,) histogram, then the number of items in higher bins
    ptrdiff_t lowest            # bin from which on `above` is known
    int32_t *index              # (n,) items near a threshold; after resolve() the chosen ones, then the tied
    item_t *item                # (n,)
    double *term                # (2 · m,): summands, and behind them two rows as float32
    const float *own            # (m,) the query itself
    bint by_index               # ties go to the smaller index
    ptrdiff_t tied              # candidates tied at the threshold, 0 where it goes through no group
    ptrdiff_t places            # how many of them are retrieved


cdef const uint8_t *address(const Space *space, ptrdiff_t i) noexcept nogil:
    return space.x + space.rows[i] * space.m * space.size


cdef const float *numbers(const Space *space, ptrdiff_t i, float *buffer) noexcept nogil:
    """Candidate i as float32 numbers (m,), in the buffer where they have to be made."""
    cdef double length = space.lengths[i] if space.lengths else 0.0
    return float_row(address(space, i), space.size, space.m, length, buffer)


cdef double distance64(const Space *space, const Row *row, ptrdiff_t i) noexcept nogil:
    """The float64 distance of candidate i from the query, as nrprec.distances64()'s NumPy gives it."""
    cdef ptrdiff_t j, m = space.m, q = row.query
    cdef double *term = row.term
    cdef const float *a = row.own
    cdef const float *b = numbers(space, i, <float *>(term + m) + m)
    cdef double mean, norm_a, norm_b
    if space.distance <= 1:
        squared_differences(a, b, m, term)
        mean = pairwise_sum(term, m)
        return sqrt(mean) if space.distance == 0 else mean
    if space.distance == 2:
        norm_a, norm_b = space.aux[q], space.aux[i]
        for j in range(m):
            term[j] = (<double>a[j] / norm_a) * (<double>b[j] / norm_b)
        return 1.0 - pairwise_sum(term, m)
    if space.distance == 3:
        for j in range(m):
            term[j] = <double>a[j] * <double>b[j]
        return -pairwise_sum(term, m)
    for j in range(m):
        term[j] = <double>a[j] - <double>b[j]
    mean = pairwise_sum(term, m) / m
    for j in range(m):
        term[j] = (term[j] - mean) * (term[j] - mean)
    return pairwise_sum(term, m) / m / space.aux[q]


cdef void select(item_t *item, ptrdiff_t n, ptrdiff_t k) noexcept nogil:
    """Partition so that the k smallest items stand in front, the largest of them at k − 1 (quickselect)."""
    cdef ptrdiff_t left = 0, right = n - 1, i, j, rounds = 0
    cdef item_t pivot, swap
    k -= 1
    while left < right:
        rounds += 1
        if rounds > 64:                       # an unlucky run of pivots: sorting is never quadratic
            qsort(item + left, right - left + 1, sizeof(item_t), compare_items)
            return
        i = left + (right - left) // 2        # the median of three
        if item_less(item[i], item[left]):
            swap = item[i]; item[i] = item[left]; item[left] = swap
        if item_less(item[right], item[left]):
            swap = item[right]; item[right] = item[left]; item[left] = swap
        if item_less(item[right], item[i]):
            swap = item[right]; item[right] = item[i]; item[i] = swap
        pivot = item[i]
        i, j = left, right
        while i <= j:
            while item_less(item[i], pivot):
                i += 1
            while item_less(pivot, item[j]):
                j -= 1
            if i <= j:
                swap = item[i]; item[i] = item[j]; item[j] = swap
                i += 1
                j -= 1
        if k <= j:
            right = j
        elif k >= i:
            left = i
        else:
            return


cdef int16_t choose_keys(const Space *space, Row *row, uint32_t deepest) noexcept nogil:
    """The keys' range, from about 1,000 items; what lies beyond shares an edge bin (slower, not wrong).

    Returns a key that more than `deepest` items are very likely to reach, by the same sample.
    """
    cdef ptrdiff_t n = space.n, i, j, step = max(16, n // 64), count = 0     # runs of 16: a cache line each
    cdef float[1280] sample
    cdef uint16_t[256] coarse
    cdef float low, high, width
    cdef double share = <double>deepest / n, needed
    sample[0] = 0                             # n > 1: never alone
    for i in range((n + step - 1) // step):
        for j in range(i * step, min(i * step + 16, n)):
            if j != row.query:
                sample[count] = row.product[j] + space.offset[j]
                count += 1
    low = high = sample[0]
    for i in range(1, count):
        low, high = min(low, sample[i]), max(high, sample[i])
    width = max(high - low, <float>1e-30)
    row.low, row.scale = low - width * <float>0.03, <float>65534.0 / (width * <float>1.25)
    needed = count * share + 5.0 * sqrt(count * share * (1.0 - share)) + 2.0
    if not has_vbmi2 or needed > 0.7 * count:
        return -32768
    memset(coarse, 0, sizeof(coarse))
    for i in range(count):
        coarse[<ptrdiff_t>min((sample[i] - row.low) * row.scale, <float>65534.0) >> 8] += 1
    i = 256
    while i > 0 and needed > 0:
        i -= 1
        needed -= coarse[i]
    return <int16_t>((i << 8) - 32768)


cdef void start(const Space *space, Row *row, uint32_t deepest) noexcept nogil:
    """Keys and, down to the rank `deepest`, the number of items above each bin; the query itself is left out.
    """
    cdef ptrdiff_t n = space.n, i = 0, part
    cdef int16_t least = choose_keys(space, row, deepest)
    row.own = numbers(space, row.query, <float *>(row.term + space.m))
    memset(row.above, 0, BINS * sizeof(uint32_t))
    while i < n:                              # a chunk's keys are still in the first-level cache when counted
        part = min(CHUNK, n - i)
        to_keys(row.product + i, space.offset + i, part, row.low, row.scale, row.key + i)
        if least > -32768:
            add_histogram_above(row.key + i, part, least, row.above)
        else:
            add_histogram(row.key + i, part, row.above)
        i += part
    for i in range(n, padded(n)):
        row.key[i] = -32768
    if row.key[row.query] >= least:
        row.above[(row.key[row.query] + 32768) >> BIN_SHIFT] -= 1
    row.key[row.query] = -32768
    row.lowest = sum_from_top(row.above, deepest)
    if row.lowest < 0:                                            # an unlucky sample: again, with every key
        memset(row.above, 0, BINS * sizeof(uint32_t))
        add_histogram(row.key, n, row.above)
        row.above[0] -= 1                                         # the query
        row.lowest = sum_from_top(row.above, deepest)


cdef ptrdiff_t padded(ptrdiff_t n) noexcept nogil:
    return (n + 63) // 64 * 64


cdef ptrdiff_t resolve(const Space *space, Row *row, int64_t rank, const uint8_t *code,
                       const uint64_t *plane, uint8_t value, int16_t *threshold,
                       int64_t *hits) noexcept nogil:
    """The `rank` nearest candidates: those with key > threshold, row.index[:returned] and row.places of the
    row.tied ones that follow there, which by index are among those returned.

    In the same pass, `hits` becomes the number of the first that have the code (where codes are given).
    """
    cdef ptrdiff_t low = row.lowest, high = BINS - 1, middle, near, i, j, certain, unsure, need, nearer = 0
    cdef int32_t margin, key_low, key_high, top
    cdef double cut
    while low < high:                         # the rank-th's bin: the lowest with fewer than `rank` above it
        middle = (low + high) // 2
        if <int64_t>row.above[middle] < rank:
            high = middle
        else:
            low = middle + 1
    # Items whose similarity is within twice the bound of the rank-th can't be told apart in float32.
    margin = <int32_t>min(2.0 * row.bound * row.scale + 0.05, 65535.0) + 1
    top = (<int32_t>low << BIN_SHIFT) + (1 << BIN_SHIFT) - 1 - 32768
    key_low = max((<int32_t>low << BIN_SHIFT) - margin - 32768, -32767)
    key_high = min(top + margin, 32766)
    near = 0
    hits[0] = scan(row.key, code, plane, space.n, <int16_t>key_low, <int16_t>key_high, value, row.index,
                   &near)
    need = rank - row.above[low]
    for i in range(near):
        PREFETCH(row.product + row.index[i])
    for i in range(near):
        j = row.index[i]
        row.item[i].index = j
        row.item[i].distance = -<double>(row.product[j] + space.offset[j])
        need += row.key[j] > top
    threshold[0] = <int16_t>key_high
    row.tied = row.places = 0
    if need < near:
        select(row.item, near, need)
        cut = row.item[need - 1].distance
        certain = unsure = 0
        for i in range(near):                 # surely nearer stay in front, the unsure follow, the farther go
            if row.item[i].distance < cut - 2.0 * row.bound:
                row.index[certain] = <int32_t>row.item[i].index
                certain += 1
            elif row.item[i].distance <= cut + 2.0 * row.bound:
                row.item[unsure] = row.item[i]
                unsure += 1
        need -= certain
        if need < unsure:
            for i in range(unsure):
                for j in range(0, space.m * space.size, 64):
                    PREFETCH(address(space, row.item[i].index) + j)
            for i in range(unsure):
                row.item[i].distance = distance64(space, row, row.item[i].index)
            select(row.item, unsure, need)
            cut = row.item[need - 1].distance
            for i in range(unsure):
                nearer += row.item[i].distance < cut
                row.tied += row.item[i].distance == cut
            row.places = need - nearer
            if row.tied == row.places:
                row.tied = row.places = 0
            elif not row.by_index:
                j = certain
                for i in range(unsure):
                    if row.item[i].distance < cut:
                        row.index[j] = <int32_t>row.item[i].index
                        j += 1
                for i in range(unsure):
                    if row.item[i].distance == cut:
                        row.index[j] = <int32_t>row.item[i].index
                        j += 1
                return certain + nearer
        for i in range(need):
            row.index[certain + i] = <int32_t>row.item[i].index
        return certain + need
    return need


cdef int64_t hits_chosen(const Row *row, const uint8_t *code, const uint64_t *plane, uint8_t value,
                         ptrdiff_t first, ptrdiff_t last) noexcept nogil:
    cdef int64_t hits = 0
    cdef ptrdiff_t i
    for i in range(first, last):
        if plane:
            hits += plane[row.index[i] >> 6] >> (row.index[i] & 63) & 1
        else:
            hits += code[row.index[i]] == value
    return hits


cdef int64_t hits_walked(const Row *row, const int32_t *member, ptrdiff_t members, int16_t threshold,
                         ptrdiff_t chosen) noexcept nogil:
    """Walk the members of the query's class; the chosen items are promoted above the threshold meanwhile."""
    cdef int64_t hits = 0
    cdef ptrdiff_t i
    for i in range(chosen):
        row.item[i].index = row.key[row.index[i]]
    for i in range(chosen):
        row.key[row.index[i]] = 32767
    for i in range(members):
        hits += row.key[member[i]] > threshold
    for i in range(chosen):
        row.key[row.index[i]] = <int16_t>row.item[i].index
    return hits


cdef Space make_space(const uint8_t[:, ::1] x, int size, const int64_t[::1] rows, const double[::1] lengths,
                      const double[::1] aux, const float[::1] offset, int distance):
    cdef Space space
    use(ISA)
    space.x, space.size, space.rows, space.aux, space.offset = &x[0, 0], size, &rows[0], &aux[0], &offset[0]
    space.lengths = &lengths[0] if lengths.shape[0] else NULL
    space.n, space.m, space.distance = rows.shape[0], x.shape[1] // size, distance
    return space


def count_hits(const float[:, ::1] products, const int64_t[::1] queries, const double[::1] bounds,
               const uint8_t[:, ::1] x, int size, const int64_t[::1] rows, const double[::1] lengths,
               const double[::1] aux, const float[::1] offset, int distance, const uint8_t[:, ::1] codes,
               const uint64_t[:, :, ::1] planes, const int32_t[:, ::1] members, const int32_t[::1] member_row,
               const int32_t[:, ::1] entry, const uint8_t[::1] entry_code, const int32_t[::1] entry_rank,
               const int32_t[::1] entry_start, const int32_t[::1] entry_count, const int64_t[::1] ranks,
               int32_t[:, :, ::1] hits, uint64_t[::1] scratch, bint by_index=False, int threads=1,
               int period=0):
    """Among each query's R nearest candidates, how many carry its label: for every label column at once.

    products   (B, n) float32   working rows · working rows of the queries, any BLAS
    queries    (B,)   int64     the queries' own indices
    bounds     (B,)   float64   bound of |products + offset − true similarity|
    x          (N, m · size)    embeddings as they came, as bytes: numbers of size bytes (2, 4, 8)
    rows       (n,)   int64     where in x the candidates stand; lengths (n,) float64: they are divided by
                                these, or (0,); aux (n,) float64, offset (n,) float32: nrprec.prepare()
    codes      (k, n) uint8     labels of the columns' frequent values (1 … 255; 0: any other value); not read
                                of values that have planes
    planes     (p, k, ⌈n/64⌉) uint64  bit i of planes[c − 1, k]: codes[k, i] == c, for c <= p; p may be 0
    members    (w, n) int32     indices sorted by value; member_row (k,) int32 gives a column's row (−1: none)
    entry      (k, B) int32     the queries' values as rows of the table entry_*:
      entry_code  its code, 0: walk the members · entry_start, entry_count: where they stand
      entry_rank  which of `ranks` (int64, 1 … n − 1) is its R, −1: R = 0, no hits
    hits       (4, k, B) int32  the result, zeros before: hits retrieved for sure · tied at the cut ·
                                hits among these · how many of these are retrieved
    scratch    (s,) uint64      for masks, ⌈n/64⌉ words for each query and rank: of as many as it holds
    by_index                    the smaller indices of these: all hits are sure; ties are told all the same
    period                      the columns are permuted copies of the first so many; 0: they aren't
    """
    cdef Space space = make_space(x, size, rows, lengths, aux, offset, distance)
    cdef ptrdiff_t n = space.n, block = products.shape[0], columns = entry.shape[0], slots = ranks.shape[0]
    cdef ptrdiff_t words = padded(n) // 64, share, group = 1, g, t
    threads = max(1, min(threads, block))
    share = scratch.shape[0] // threads
    if period and planes.shape[0]:            # every thread has queries
        group = max(1, min(GROUP, share // max(1, slots * words), (block + threads - 1) // threads))
    cdef int16_t[:, ::1] key = np.empty((threads, padded(n)), np.int16)
    cdef uint64_t[:, ::1] mask = np.empty((threads, words), np.uint64)
    cdef uint8_t[:, ::1] masked = np.empty((threads, group * slots), np.uint8)
    cdef uint32_t[:, ::1] above = np.empty((threads, BINS), np.uint32)
    cdef int32_t[:, ::1] index = np.empty((threads, n + 64), np.int32)
    cdef double[:, ::1] item = np.empty((threads, 2 * n), np.float64)     # item_t is two words of eight bytes
    cdef double[:, ::1] term = np.empty((threads, 2 * space.m), np.float64)
    cdef int32_t[:, ::1] first = np.empty((threads, slots + 1), np.int32)
    cdef int32_t[:, ::1] order = np.empty((threads, columns), np.int32)
    for g in prange((block + group - 1) // group, nogil=True, num_threads=threads, schedule="dynamic"):
        t = threadid()
        count_queries(&space, &products[0, 0], &queries[0], &bounds[0], g * group,
                      min((g + 1) * group, block), period if group > 1 else 0, &key[t, 0], &above[t, 0],
                      &scratch[t * share] if group > 1 else &mask[t, 0], &masked[t, 0], &index[t, 0],
                      <item_t *>&item[t, 0], &term[t, 0], &first[t, 0], &order[t, 0], codes, planes, members,
                      member_row, entry, entry_code, entry_rank, entry_start, entry_count, ranks, hits,
                      by_index)


cdef void count_queries(const Space *space, const float *products, const int64_t *queries,
                        const double *bounds, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t period, int16_t *key,
                        uint32_t *above, uint64_t *masks, uint8_t *masked, int32_t *index, item_t *item,
                        double *term, int32_t *first, int32_t *order, const uint8_t[:, ::1] codes,
                        const uint64_t[:, :, ::1] planes, const int32_t[:, ::1] members,
                        const int32_t[::1] member_row, const int32_t[:, ::1] entry,
                        const uint8_t[::1] entry_code, const int32_t[::1] entry_rank,
                        const int32_t[::1] entry_start, const int32_t[::1] entry_count,
                        const int64_t[::1] ranks, int32_t[:, :, ::1] hits, bint by_index) noexcept nogil:
    """Queries begin … end. With a period what each threshold retrieves is a mask, which serves all columns.

    A piece of the masks and of a column's planes stays in the cache for the group's queries.
    """
    cdef ptrdiff_t slots = ranks.shape[0], words = padded(space.n) // 64, b, p, k, at, slot, piece, number
    cdef int32_t e
    cdef uint8_t value
    cdef const uint64_t *mask[GROUP]
    cdef const uint64_t *plane[GROUP]
    cdef int32_t *count[GROUP]
    memset(masked, 0, slots * (end - begin if period else 1))
    for b in range(begin, end):
        at = (b - begin) * slots if period else 0
        count_row(space, products + b * space.n, queries[b], bounds[b], key, above, masks + at * words,
                  masked + at if period else NULL, index, item, term, first, order, codes, planes, members,
                  member_row, entry, entry_code, entry_rank, entry_start, entry_count, ranks, hits,
                  by_index, b)
    if not period:
        return
    at = 0
    while at < words:
        piece = min(PIECE, words - at)
        for p in range(period):
            k = p
            while k < entry.shape[0]:
                number = 0
                for b in range(begin, end):
                    e = entry[k, b]
                    value = entry_code[e]
                    slot = (b - begin) * slots + entry_rank[e]
                    if 0 < value <= planes.shape[0] and entry_rank[e] >= 0 and masked[slot]:
                        mask[number], plane[number] = masks + slot * words + at, &planes[value - 1, k, at]
                        count[number] = &hits[0, k, b]
                        number += 1
                common_bits(mask, plane, count, number, piece)
                k += period
        at += piece


cdef void count_row(const Space *space, const float *product, ptrdiff_t query, double bound, int16_t *key,
                    uint32_t *above, uint64_t *masks, uint8_t *masked, int32_t *index, item_t *item,
                    double *term, int32_t *first, int32_t *order, const uint8_t[:, ::1] codes,
                    const uint64_t[:, :, ::1] planes,
                    const int32_t[:, ::1] members, const int32_t[::1] member_row,
                    const int32_t[:, ::1] entry, const uint8_t[::1] entry_code, const int32_t[::1] entry_rank,
                    const int32_t[::1] entry_start, const int32_t[::1] entry_count, const int64_t[::1] ranks,
                    int32_t[:, :, ::1] hits, bint by_index, ptrdiff_t b) noexcept nogil:
    cdef Row row
    cdef ptrdiff_t columns = entry.shape[0], slots = ranks.shape[0], words = padded(space.n) // 64
    cdef ptrdiff_t k, i, j, slot, chosen, last
    cdef uint64_t *bits
    cdef const uint64_t *plane
    cdef const uint64_t *mask
    cdef int64_t found = 0, tied
    cdef int32_t e, in_mask
    cdef int32_t *count = &in_mask
    cdef uint8_t value
    cdef int16_t threshold = 0
    cdef bint counted, ready
    row.product, row.query, row.bound, row.by_index = product, query, bound, by_index
    row.key, row.above, row.index, row.item, row.term = key, above, index, item, term
    # Columns in the order of their rank, so that each threshold is resolved once (counting sort).
    for slot in range(slots + 1):
        first[slot] = 0
    for k in range(columns):
        slot = entry_rank[entry[k, b]]
        if slot >= 0:
            first[slot + 1] += 1
    for slot in range(slots):
        first[slot + 1] += first[slot]
    for k in range(columns):
        slot = entry_rank[entry[k, b]]
        if slot >= 0:
            order[first[slot]] = <int32_t>k
            first[slot] += 1
    if first[slots] == 0:
        return
    slot = order[first[slots] - 1]
    start(space, &row, <uint32_t>ranks[entry_rank[entry[slot, b]]])
    i = 0
    for slot in range(slots):                 # first[slot] is now where the slot's columns end
        if i == first[slot]:
            continue
        k = order[i]
        value = 0 if masked else entry_code[entry[k, b]]
        counted, ready, bits = value > 0, False, masks + (slot * words if masked else 0)
        chosen = resolve(space, &row, ranks[slot], &codes[k, 0] if value else NULL,
                         &planes[value - 1, k, 0] if 0 < value <= planes.shape[0] else NULL, value,
                         &threshold, &found)
        last = chosen if by_index else chosen + row.tied
        if masked and not row.tied:           # all that is retrieved; count_queries() counts in it
            above_bits(key, space.n, threshold, bits)
            for j in range(chosen):
                bits[index[j] >> 6] |= <uint64_t>1 << (index[j] & 63)
            masked[slot] = True
        while i < first[slot]:                # the columns with this R
            k = order[i]
            i += 1
            value = entry_code[entry[k, b]]
            plane = &planes[value - 1, k, 0] if 0 < value <= planes.shape[0] else NULL
            if masked and masked[slot] and plane:
                continue
            if value:
                if plane and not counted:
                    if not ready:
                        above_bits(key, space.n, threshold, bits)
                        ready = True
                    mask, in_mask = bits, 0
                    common_bits(&mask, &plane, &count, 1, words)
                    found = in_mask
                elif not counted:
                    found = count_above(key, &codes[k, 0], space.n, threshold, value)
                counted = False               # scan() has counted the first column's
                found += hits_chosen(&row, &codes[k, 0], plane, value, 0, chosen)
                tied = hits_chosen(&row, &codes[k, 0], plane, value, chosen, last)
            else:
                e = entry[k, b]
                found = hits_walked(&row, &members[member_row[k], entry_start[e]], entry_count[e], threshold,
                                    chosen)
                tied = 0
                if last > chosen:
                    tied = hits_walked(&row, &members[member_row[k], entry_start[e]], entry_count[e],
                                       threshold, last) - found
            hits[0, k, b] = <int32_t>found
            if row.tied:
                hits[1, k, b], hits[2, k, b] = <int32_t>row.tied, <int32_t>tied
                hits[3, k, b] = <int32_t>row.places


# ---------------------------------------------------------------- pairs: histograms and rankings (pairs.py)

def pair_histogram(const float[:, ::1] products, ptrdiff_t first_row, ptrdiff_t first_column,
                   const int64_t[:, ::1] ranges, const int64_t[::1] groups, const int64_t[::1] order,
                   const uint8_t[:, ::1] x, int size, const int64_t[::1] rows, const double[::1] norms,
                   double bound, const int64_t[::1] bins, int64_t[:, :, ::1] counts):
    """Add one tile of pairs to histograms of their inner products, exactly.

    The bin of rows a and b is min(floor((s + 1) · (bins / 2)), bins − 1), at least 0, with s NumPy's float64
    ((a / ‖a‖) * (b / ‖b‖)).sum(): what float32 products leave open within their error bound is evaluated so.

    products   (B, T) float32   normalised rows at positions first_row … · those at first_column …
    ranges     (3, n) int64     of a position p: begin, split, end; columns begin <= q < split go to
                                counts[:, 0], split <= q < end to counts[:, 1]
    groups     (n,)   int64     ascending: position p counts in counts[groups[p] − groups[first_row]]
    order      (n,)   int64     position p holds candidate order[p]
    norms      (n,)   float64   of the candidates; x, size, rows: as count_hits() has them
    bound      |float32 product − s| is at most this
    bins       (k,)   int64     1 … 32,000 each; counts (groups of the tile, 2, sum of bins) int64, added to
    """
    cdef Space space = make_space(x, size, rows, norms[:0], norms, np.zeros(1, np.float32), 2)
    cdef ptrdiff_t columns = products.shape[1], m = space.m, kinds = bins.shape[0]
    cdef ptrdiff_t slots = 0, width = 0, r, p, k, i, j, low, high, split, found = 0
    cdef ptrdiff_t group = groups[first_row], at
    cdef bint ready
    cdef double s
    use(ISA)
    for k in range(kinds):
        slots += bins[k] + 1                  # the last slot of each: left open
        width += bins[k]
    cdef uint32_t[:, :, ::1] histogram = np.zeros((2, COPIES, slots), np.uint32)
    cdef int16_t[::1] key = np.empty(columns + 64, np.int16)
    cdef int32_t[::1] index = np.empty(columns + 64, np.int32)
    cdef double[::1] unit = np.empty(m), term = np.empty(m)
    cdef float[::1] buffer = np.empty(m, np.float32)
    cdef const float *own
    with nogil:
        for r in range(products.shape[0]):
            p = first_row + r
            if groups[p] != group:
                flush(histogram, bins, &counts[group - groups[first_row], 0, 0], width)
                group = groups[p]
            low = max(ranges[0, p] - first_column, 0)
            high = min(ranges[2, p] - first_column, columns)
            split = min(max(ranges[1, p] - first_column, low), high)
            if low >= high:
                continue
            ready, at = False, 0
            for k in range(kinds):
                to_bins(&products[r, low], high - low, <float>(0.5 * bins[k]), margin_of(bound, bins[k]),
                        &key[0])
                add_bins(&key[0], split - low, &histogram[0, 0, at], slots)
                add_bins(&key[split - low], high - split, &histogram[1, 0, at], slots)
                for i in range(high - low, padded(high - low)):
                    key[i] = -32768
                scan(&key[0], NULL, NULL, high - low, <int16_t>bins[k], <int16_t>bins[k], 0, &index[0],
                     &found)
                for i in range(found):
                    for j in range(0, m * size, 64):
                        PREFETCH(address(&space, order[first_column + low + index[i]]) + j)
                if found and not ready:
                    own = numbers(&space, order[p], &buffer[0])
                    for j in range(m):
                        unit[j] = <double>own[j] / norms[order[p]]
                    ready = True
                for i in range(found):
                    j = order[first_column + low + index[i]]
                    unit_products(&unit[0], numbers(&space, j, &buffer[0]), norms[j], m, &term[0])
                    s = (pairwise_sum(&term[0], m) + 1.0) * (0.5 * bins[k])
                    j = min(max(<ptrdiff_t>s, 0), bins[k] - 1)    # s > −1: truncation is floor after clipping
                    histogram[0 if index[i] < split - low else 1, 0, at + j] += 1
                at += bins[k] + 1
        flush(histogram, bins, &counts[group - groups[first_row], 0, 0], width)


cdef float margin_of(double bound, ptrdiff_t bins) noexcept nogil:
    """The error bound in bins, with to_bins()'s own two roundings. From half a bin on everything is open."""
    return <float>(0.5 * bins * (1.01 * bound + 4.0 * 2.0 ** -24) + 1e-6)


cdef void flush(uint32_t[:, :, ::1] histogram, const int64_t[::1] bins, int64_t *counts,
                ptrdiff_t width) noexcept nogil:
    """Add the copies to counts (2, width) and clear them; what was left open has been counted meanwhile."""
    cdef ptrdiff_t side, copy, k, b, at, to
    for side in range(2):
        for copy in range(COPIES):
            at = to = 0
            for k in range(bins.shape[0]):
                for b in range(bins[k]):
                    counts[side * width + to + b] += histogram[side, copy, at + b]
                at += bins[k] + 1
                to += bins[k]
    memset(&histogram[0, 0, 0], 0, 2 * COPIES * histogram.shape[2] * sizeof(uint32_t))


def rank_hits(const float[:, ::1] products, const int64_t[::1] queries, const double[::1] bounds,
              const uint8_t[:, ::1] x, int size, const int64_t[::1] rows, const double[::1] norms,
              const float[::1] offset, const int32_t[::1] values, const int64_t[::1] relevant,
              int64_t neighbours, int64_t[:, ::1] counts, double[::1] precision, bint by_index=False):
    """Each query's candidates in order of cosine distance: where those of its value stand.

    Candidates at the same distance form a group, or, by index, each a group of its own.
    values     (n,) int32     classes; relevant (B,) int64: R, the other rows of the query's class
    neighbours                look at max(R, neighbours) candidates at least
    counts     (B, 7) int64   of the first group of these with hits: where it begins, candidates, hits (1, 1
                              where all are hits; 0 without a hit) · hits among the R nearest for sure · of a
                              group of hits and others that the cut at R divides: candidates, hits, places
    precision  (B,) float64   Σ_{k=1..R} E[Precision@k · p(k)] over all orders of the groups, not divided by R
    Other arguments as count_hits(). No list is kept: memory does not grow with R.
    """
    cdef Space space = make_space(x, size, rows, norms[:0], norms, offset, 2)
    cdef ptrdiff_t n = space.n, m = space.m, b
    cdef int16_t[::1] key = np.empty(padded(n), np.int16)
    cdef uint32_t[::1] above = np.empty(BINS, np.uint32)
    cdef int32_t[::1] index = np.empty(n + 64, np.int32)
    cdef double[::1] item = np.empty(2 * n, np.float64), term = np.empty(2 * m), unit = np.empty(m)
    cdef Row row
    row.key, row.above, row.index = &key[0], &above[0], &index[0]
    row.item, row.term = <item_t *>&item[0], &term[0]
    row.by_index = by_index
    counts[:, :], precision[:] = 0, 0.0
    with nogil:
        for b in range(products.shape[0]):
            if relevant[b] == 0:
                continue
            row.product, row.query, row.bound = &products[b, 0], queries[b], bounds[b]
            rank_row(&space, &row, min(max(relevant[b], neighbours), n - 1), relevant[b], &values[0],
                     &unit[0], &counts[b, 0], &precision[b])


cdef void rank_row(const Space *space, Row *row, int64_t depth, int64_t relevant, const int32_t *values,
                   double *unit, int64_t *counts, double *precision) noexcept nogil:
    cdef ptrdiff_t certain, near, total, found = 0, i, j, begin, end, m = space.m
    cdef int64_t unused = 0, right, before = 0
    cdef int16_t threshold = 0
    cdef bint mixed, ready = False
    cdef int32_t value = values[row.query]
    start(space, row, <uint32_t>depth)
    near = resolve(space, row, depth, NULL, NULL, 0, &threshold, &unused)
    certain = depth - near
    if row.tied and not row.by_index:         # the whole group is looked at
        certain -= row.places
        near += row.tied
    total = certain + near
    for i in range(near):
        j = row.index[i]
        row.item[certain + i].index = j
        row.item[certain + i].distance = -<double>(row.product[j] + space.offset[j])
    if certain:                               # a counting sort: `above` says where a bin's items begin
        scan(row.key, NULL, NULL, space.n, <int16_t>(threshold + 1), 32766, 0, row.index, &found)
        for i in range(found):
            j = row.index[i]
            begin = row.above[(row.key[j] + 32768) >> BIN_SHIFT]
            row.above[(row.key[j] + 32768) >> BIN_SHIFT] += 1
            row.item[begin].index = j
            row.item[begin].distance = -<double>(row.product[j] + space.offset[j])
    order_items(row.item, total)
    begin = 0
    while begin < total:                      # runs that float32 can't tell apart: matters where they mix
        i = begin + 1
        mixed = False
        while i < total and row.item[i].distance - row.item[i - 1].distance <= 2.0 * row.bound:
            mixed |= (values[row.item[i].index] == value) != (values[row.item[begin].index] == value)
            i += 1
        if mixed:
            if not ready:
                for j in range(m):
                    unit[j] = <double>row.own[j] / space.aux[row.query]
                ready = True
            for j in range(begin, i):
                found = row.item[j].index
                unit_products(unit, numbers(space, found, <float *>(row.term + m) + m), space.aux[found], m,
                              row.term)
                row.item[j].distance = 1.0 - pairwise_sum(row.term, m)
            order_items(row.item + begin, i - begin)
        while begin < i:                      # a run of hits alone, or of none, is one group in any order
            end = begin + 1 if mixed else i
            while not row.by_index and end < i and row.item[end].distance == row.item[begin].distance:
                end += 1
            right = 0
            for j in range(begin, end):
                right += values[row.item[j].index] == value
            if right:
                count_group(begin, end - begin, right, before, relevant, counts, precision)
            before += right
            begin = end


cdef void count_group(int64_t begin, int64_t tied, int64_t right, int64_t before, int64_t relevant,
                      int64_t *counts, double *precision) noexcept nogil:
    """Candidates at places begin + 1 … begin + tied in any order, `right` of them hits, after `before` hits.

    E[Precision@k · p(k)] of McSherry and Najork (2008).
    """
    cdef int64_t places = min(tied, relevant - begin), j
    cdef double share = <double>right / tied, others = <double>(right - 1) / max(tied - 1, 1)
    if counts[2] == 0:
        counts[0], counts[1], counts[2] = begin, tied, right
        if right == tied:
            counts[1] = counts[2] = 1
    if places <= 0:
        return
    if right == tied or places == tied:
        counts[3] += min(right, places)
    else:
        counts[4], counts[5], counts[6] = tied, right, places
    for j in range(places):
        precision[0] += share * (before + 1 + j * others) / (begin + j + 1)


cdef void order_items(item_t *item, ptrdiff_t n) noexcept nogil:
    """Sort items that nearly are: by insertion, and by qsort where that moves too many."""
    cdef ptrdiff_t i, j, moves = 0
    cdef item_t one
    for i in range(1, n):
        one = item[i]
        j = i
        while j > 0 and item_less(one, item[j - 1]):
            item[j] = item[j - 1]
            j -= 1
        item[j] = one
        moves += i - j
        if moves > 16 * n:
            qsort(item, n, sizeof(item_t), compare_items)
            return

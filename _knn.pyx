# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Exact neighbour counting on the CPU: embeddings and label columns in, hit counts out.

A dozen queries at a time are multiplied with the candidates in float32. For each query the kernel

1. maps similarities, still in the first-level cache, to 16-bit keys, in an order-preserving way, and keeps
   those that a sample tells to be near enough (or all, where that was not enough);
2. makes one histogram of the keys and reads the bin of every needed rank R off the cumulative sum;
3. finds in one pass above how many of these thresholds each key lies: its level;
4. counts ``level >= that of R and label == value``, in bit planes or straight loops that vectorise, or walks
   the members of the query's class where that is shorter;
5. resolves what lies near a threshold exactly: by the keys as far as their error bound allows, then by
   float64 distances. No row is sorted, no list of R neighbours is kept.

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
from libc.math cimport fabs, rint, sqrt
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memcpy, memset

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
    static int isa = 0;
    #ifdef __GNUC__
    #define LOOP static inline __attribute__((always_inline))
    #define PREFETCH(address) __builtin_prefetch(address)
    #define PREFETCHW(address) __builtin_prefetch(address, 1)
    #define LOWEST_BIT(bits) __builtin_ctzll(bits)
    #else
    #include <intrin.h>        /* MSVC's: the plain loops alone */
    #define LOOP static __forceinline
    #define PREFETCH(address) ((void)(address))
    #define PREFETCHW(address) ((void)(address))
    #define __builtin_popcountll(bits) ((int)__popcnt64(bits))
    static __forceinline int LOWEST_BIT(uint64_t bits)
    {
        unsigned long at;
        _BitScanForward64(&at, bits);
        return (int)at;
    }
    #endif
    #if defined(__aarch64__) && defined(__GNUC__)
    #include <arm_neon.h>
    #endif
    #ifdef KNN_X86
    #include <immintrin.h>
    static int has_vbmi2 = 0, has_vpopcnt = 0;
    #define AVX2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
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
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
            && __builtin_cpu_supports("bmi2");
    }
    /* For _mm_shuffle_epi8, by the bits of a byte: `together` moves those of eight keys that have a bit to
       the front, `apart` moves as many levels from the front to the places with a bit. 128: a zero. */
    static uint8_t together[256][16], apart[256][8];
    static void set_isa(int level)
    {
        for (int bits = 0; bits < 256 && !together[255][15]; bits++) {
            int count = 0;
            memset(together[bits], 128, 16);
            memset(apart[bits], 128, 8);
            for (int i = 0; i < 8; i++)
                if (bits >> i & 1) {
                    together[bits][2 * count] = (uint8_t)(2 * i);
                    together[bits][2 * count + 1] = (uint8_t)(2 * i + 1);
                    apart[bits][i] = (uint8_t)count++;
                }
        }
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

    /* Inner products of ABREAST queries, (m, ABREAST), with a panel of candidates, (m, PANEL), in float32: as
       many sums at a time as there are registers. out: a row for each query, `stride` apart. */
    enum { PANEL = 32, ABREAST = 12 };
    #define PRODUCTS(name, vector, width, rows, zero, load, store, spread, add) \
        static void name(const float *queries, const float *panel, ptrdiff_t m, float *out, \
                         ptrdiff_t stride) \
        { \
            enum { COLUMNS = PANEL / width }; \
            for (int row = 0; row < ABREAST; row += rows) { \
                const float *a = queries + row, *b = panel; \
                vector sum[rows][COLUMNS]; \
                UNROLL for (int i = 0; i < rows; i++) \
                    UNROLL for (int j = 0; j < COLUMNS; j++) sum[i][j] = zero; \
                for (ptrdiff_t k = 0; k < m; k++, a += ABREAST, b += PANEL) { \
                    vector numbers[COLUMNS]; \
                    PREFETCH(b + 8 * PANEL); \
                    PREFETCH(b + 8 * PANEL + 16); \
                    UNROLL for (int j = 0; j < COLUMNS; j++) numbers[j] = load(b + j * width); \
                    UNROLL for (int i = 0; i < rows; i++) { \
                        const vector one = spread(a[i]); \
                        UNROLL for (int j = 0; j < COLUMNS; j++) \
                            sum[i][j] = add(one, numbers[j], sum[i][j]); \
                    } \
                } \
                UNROLL for (int i = 0; i < rows; i++) \
                    UNROLL for (int j = 0; j < COLUMNS; j++) \
                        store(out + (row + i) * stride + j * width, sum[i][j]); \
            } \
        }
    #define UNROLL _Pragma("GCC unroll 16")
    #if defined(__aarch64__) && defined(__GNUC__)
    #define ADD_NEON(a, b, sum) vfmaq_f32(sum, a, b)
    PRODUCTS(products_plain, float32x4_t, 4, 2, vdupq_n_f32(0.0f), vld1q_f32, vst1q_f32, vdupq_n_f32,
             ADD_NEON)
    #else
    static void products_plain(const float *queries, const float *panel, ptrdiff_t m, float *out,
                               ptrdiff_t stride)
    {
        for (int row = 0; row < ABREAST; row++) {
            float sum[PANEL] = {0};
            for (ptrdiff_t k = 0; k < m; k++)
                for (int j = 0; j < PANEL; j++) sum[j] += queries[k * ABREAST + row] * panel[k * PANEL + j];
            memcpy(out + row * stride, sum, sizeof(sum));
        }
    }
    #endif
    #ifdef KNN_X86
    AVX512 PRODUCTS(products_avx512, __m512, 16, 12, _mm512_setzero_ps(), _mm512_loadu_ps, _mm512_storeu_ps,
                    _mm512_set1_ps, _mm512_fmadd_ps)
    AVX2 PRODUCTS(products_avx2, __m256, 8, 3, _mm256_setzero_ps(), _mm256_loadu_ps, _mm256_storeu_ps,
                  _mm256_set1_ps, _mm256_fmadd_ps)
    #else
    #define products_avx512 products_plain
    #define products_avx2 products_plain
    #endif
    /* The same with `count` panels, (count, m, PANEL), whose products stand side by side. */
    static void products(const float *queries, const float *panels, ptrdiff_t count, ptrdiff_t m, float *out,
                         ptrdiff_t stride)
    {
        for (ptrdiff_t i = 0; i < count; i++, panels += m * PANEL, out += PANEL)
            (isa == 2 ? products_avx512 : isa == 1 ? products_avx2 : products_plain)(queries, panels, m, out,
                                                                                     stride);
    }

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
            if (i % 32 == 0) PREFETCH(key + i + 1024);
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

    /* Most candidates are farther than the deepest threshold: keys up to -32767 are left out. The others
       stand side by side, `kept` has a bit for each candidate. n is a multiple of 64; up to 64 keys are
       written, and levels read, beyond the last. */
    #define CHUNK 8192
    #define WORDS (CHUNK / 64)
    #ifdef KNN_X86
    AVX2 static inline __m256i numbers_avx2(const float *product, const float *offset, __m256 low,
                                            __m256 scale)
    {
        const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(product), _mm256_loadu_ps(offset));
        const __m256 x = _mm256_mul_ps(_mm256_sub_ps(sum, low), scale);
        return _mm256_cvttps_epi32(_mm256_min_ps(x, _mm256_set1_ps(65534.0f)));
    }
    AVX2 static ptrdiff_t keep_avx2(const float *product, const float *offset, ptrdiff_t n, float low,
                                    float scale, int16_t *key, uint64_t *kept)
    {
        const __m256 lows = _mm256_set1_ps(low), scales = _mm256_set1_ps(scale);
        const __m256i lowest = _mm256_set1_epi16(-32767), flip = _mm256_set1_epi16(-32768);
        ptrdiff_t count = 0;
        for (ptrdiff_t i = 0; i < n; i += 64) {
            uint64_t all = 0;
            for (ptrdiff_t j = i; j < i + 64; j += 16) {
                const __m256i a = numbers_avx2(product + j, offset + j, lows, scales);
                const __m256i b = numbers_avx2(product + j + 8, offset + j + 8, lows, scales);
                /* The packing interleaves the halves of 128 bits: they are put right. */
                const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
                const __m256i keys = _mm256_xor_si256(both, flip), high = _mm256_cmpgt_epi16(keys, lowest);
                const __m128i first = _mm256_castsi256_si128(keys);
                const __m128i second = _mm256_extracti128_si256(keys, 1);
                const int bits = _mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(high),
                                                                   _mm256_extracti128_si256(high, 1)));
                const __m128i *order = (const __m128i *)together[bits & 255];
                _mm_storeu_si128((void *)(key + count), _mm_shuffle_epi8(first, _mm_loadu_si128(order)));
                count += __builtin_popcount(bits & 255);
                order = (const __m128i *)together[bits >> 8];
                _mm_storeu_si128((void *)(key + count), _mm_shuffle_epi8(second, _mm_loadu_si128(order)));
                count += __builtin_popcount(bits >> 8);
                all |= (uint64_t)bits << (j - i);
            }
            kept[i / 64] = all;
        }
        return count;
    }
    AVX2 static void expand_avx2(const uint8_t *level, ptrdiff_t words, const uint64_t *kept, uint8_t *out)
    {
        for (ptrdiff_t word = 0; word < words; word++)
            for (int j = 0; j < 64; j += 8) {
                const int bits = kept[word] >> j & 255;
                const __m128i order = _mm_loadl_epi64((const void *)apart[bits]);
                const __m128i levels = _mm_loadl_epi64((const void *)level);
                _mm_storel_epi64((void *)(out + word * 64 + j), _mm_shuffle_epi8(levels, order));
                level += __builtin_popcount(bits);
            }
    }
    #define VBMI2 __attribute__((target("avx512bw,avx512vl,avx512vbmi2,popcnt")))
    VBMI2 static inline __m512i numbers_vbmi2(const float *product, const float *offset, __m512 low,
                                              __m512 scale)
    {
        const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(product), _mm512_loadu_ps(offset));
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(sum, low), scale);
        return _mm512_cvttps_epi32(_mm512_min_ps(x, _mm512_set1_ps(65534.0f)));
    }
    VBMI2 static ptrdiff_t keep_vbmi2(const float *product, const float *offset, ptrdiff_t n, float low,
                                      float scale, int16_t *key, uint64_t *kept)
    {
        const __m512 lows = _mm512_set1_ps(low), scales = _mm512_set1_ps(scale);
        const __m512i lowest = _mm512_set1_epi16(-32767), flip = _mm512_set1_epi16(-32768);
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        ptrdiff_t count = 0;
        for (ptrdiff_t i = 0; i < n; i += 64) {
            uint64_t all = 0;
            for (ptrdiff_t j = i; j < i + 64; j += 32) {
                const __m512i a = numbers_vbmi2(product + j, offset + j, lows, scales);
                const __m512i b = numbers_vbmi2(product + j + 16, offset + j + 16, lows, scales);
                const __m512i both = _mm512_permutexvar_epi64(order, _mm512_packus_epi32(a, b));
                const __m512i keys = _mm512_xor_si512(both, flip);
                const __mmask32 high = _mm512_cmpgt_epi16_mask(keys, lowest);
                _mm512_storeu_si512(key + count, _mm512_maskz_compress_epi16(high, keys));
                count += __builtin_popcount(high);
                all |= (uint64_t)high << (j - i);
            }
            kept[i / 64] = all;
        }
        return count;
    }
    VBMI2 static void expand_vbmi2(const uint8_t *level, ptrdiff_t words, const uint64_t *kept, uint8_t *out)
    {
        for (ptrdiff_t word = 0; word < words; word++) {
            const __m512i levels = _mm512_maskz_expand_epi8(kept[word], _mm512_loadu_si512(level));
            _mm512_storeu_si512(out + word * 64, levels);
            level += __builtin_popcountll(kept[word]);
        }
    }
    static ptrdiff_t keep(const float *product, const float *offset, ptrdiff_t n, float low, float scale,
                          int16_t *key, uint64_t *kept)
    {
        return (has_vbmi2 ? keep_vbmi2 : keep_avx2)(product, offset, n, low, scale, key, kept);
    }
    static void expand(const uint8_t *level, ptrdiff_t words, const uint64_t *kept, uint8_t *out)
    {
        (has_vbmi2 ? expand_vbmi2 : expand_avx2)(level, words, kept, out);
    }
    #else                                       /* nothing is left out */
    static ptrdiff_t keep(const float *product, const float *offset, ptrdiff_t n, float low, float scale,
                          int16_t *key, uint64_t *kept)
    {
        return 0;
    }
    #define expand(level, words, kept, out) ((void)0)
    #endif
    LOOP void sum_bits_loop(const uint64_t *bits, ptrdiff_t words, int32_t *before)
    {
        int32_t total = 0;
        for (ptrdiff_t i = 0; i < words; i++) {
            before[i] = total;
            total += __builtin_popcountll(bits[i]);
        }
        before[words] = total;
    }
    EACH_ISA(void, sum_bits, (const uint64_t *bits, ptrdiff_t words, int32_t *before),
             (bits, words, before))

    /* above[i]: how many items stand in higher bins than the i-th SPAN of them has, as far down as `deepest`
       items, or all where there are fewer; → the lowest such i. */
    #define SPAN 64
    LOOP ptrdiff_t sum_from_top_loop(const uint32_t *histogram, uint32_t deepest, uint32_t *above)
    {
        uint32_t total = 0;
        ptrdiff_t i = BINS / SPAN;
        while (i > 0 && total < deepest) {
            above[--i] = total;
            uint32_t here = 0;
            for (int j = 0; j < SPAN; j++) here += histogram[i * SPAN + j];
            total += here;
        }
        return i;
    }
    EACH_ISA(ptrdiff_t, sum_from_top, (const uint32_t *histogram, uint32_t deepest, uint32_t *above),
             (histogram, deepest, above))

    /* The level of a key: above how many of up to CUTS thresholds it lies, all found in one pass. below and
       high (CUTS + 1,) ascend; below[j] < key <= high[j] is near threshold j; behind the last: 32,767.
       near: 64 keys' bits a word. n is a multiple of 64: −32768, with which keys are padded, is neither. */
    #define CUTS 31
    LOOP void levels_loop(const int16_t *key, ptrdiff_t n, const int16_t *below, const int16_t *high,
                          int cuts, uint8_t *level, uint64_t *near)
    {
        for (ptrdiff_t i = 0; i < n; i += 64) {
            uint16_t at[64] = {0}, reached[64] = {0}, any = 0;
            uint64_t bits = 0;
            for (int j = 0; j < cuts; j++)
                for (int q = 0; q < 64; q++) {
                    at[q] += (uint16_t)(key[i + q] > high[j]);
                    reached[q] += (uint16_t)(key[i + q] > below[j]);
                }
            for (int q = 0; q < 64; q++) {
                level[i + q] = (uint8_t)at[q];
                any |= (uint16_t)(at[q] ^ reached[q]);
            }
            for (int q = 0; any && q < 64; q++) bits |= (uint64_t)(at[q] != reached[q]) << q;
            near[i / 64] = bits;
        }
    }
    /* Items of at least this level with the given code. At most CHUNK items: 16-bit sums. */
    LOOP int32_t count_codes_loop(const uint8_t *level, const uint8_t *code, ptrdiff_t n, uint8_t least,
                                  uint8_t value)
    {
        uint16_t hits = 0;
        for (ptrdiff_t i = 0; i < n; i++) hits += (uint16_t)((level[i] >= least) & (code[i] == value));
        return hits;
    }
    EACH_ISA(int32_t, count_codes, (const uint8_t *level, const uint8_t *code, ptrdiff_t n, uint8_t least,
              uint8_t value),
             (level, code, n, least, value))

    /* A frequent value has its pictures as a bit plane too, an eighth of the bytes of the codes: levels
       become bits, so that a count is AND and popcount. */
    #ifdef KNN_X86
    AVX2 static void levels_avx2(const int16_t *key, ptrdiff_t n, const int16_t *below, const int16_t *high,
                                 int cuts, uint8_t *level, uint64_t *near)
    {
        for (ptrdiff_t i = 0; i < n; i += 64) {
            uint64_t bits = 0;
            for (int half = 0; half < 64; half += 32) {
                const __m256i a = _mm256_loadu_si256((const void *)(key + i + half));
                const __m256i b = _mm256_loadu_si256((const void *)(key + i + half + 16));
                __m256i at_a = _mm256_setzero_si256(), at_b = at_a, reached_a = at_a, reached_b = at_a;
                for (int j = 0; j < cuts; j++) {
                    const __m256i least = _mm256_set1_epi16(below[j]), most = _mm256_set1_epi16(high[j]);
                    at_a = _mm256_sub_epi16(at_a, _mm256_cmpgt_epi16(a, most));
                    at_b = _mm256_sub_epi16(at_b, _mm256_cmpgt_epi16(b, most));
                    reached_a = _mm256_sub_epi16(reached_a, _mm256_cmpgt_epi16(a, least));
                    reached_b = _mm256_sub_epi16(reached_b, _mm256_cmpgt_epi16(b, least));
                }
                /* The packing interleaves the halves of 128 bits: they are put right. */
                const __m256i at = _mm256_permute4x64_epi64(_mm256_packs_epi16(at_a, at_b), 0xd8);
                const __m256i reached = _mm256_packs_epi16(reached_a, reached_b);
                const __m256i far = _mm256_cmpeq_epi8(at, _mm256_permute4x64_epi64(reached, 0xd8));
                _mm256_storeu_si256((void *)(level + i + half), at);
                bits |= (uint64_t)(uint32_t)~_mm256_movemask_epi8(far) << half;
            }
            near[i / 64] = bits;
        }
    }
    AVX512 static void levels_avx512(const int16_t *key, ptrdiff_t n, const int16_t *below,
                                     const int16_t *high, int cuts, uint8_t *level, uint64_t *near)
    {
        const __m512i belows = _mm512_loadu_si512(below), highs = _mm512_loadu_si512(high);
        const int first = 1 << (31 - __builtin_clz(cuts));
        for (ptrdiff_t i = 0; i < n; i += 64) {
            const __m512i a = _mm512_loadu_si512(key + i), b = _mm512_loadu_si512(key + i + 32);
            __m512i at_a = _mm512_setzero_si512(), at_b = at_a;
            for (int step = first; step; step >>= 1) {                     /* a binary search in registers */
                const __m512i by = _mm512_set1_epi16(step), last = _mm512_set1_epi16(step - 1);
                const __m512i of_a = _mm512_permutexvar_epi16(_mm512_add_epi16(at_a, last), highs);
                const __m512i of_b = _mm512_permutexvar_epi16(_mm512_add_epi16(at_b, last), highs);
                at_a = _mm512_mask_add_epi16(at_a, _mm512_cmpgt_epi16_mask(a, of_a), at_a, by);
                at_b = _mm512_mask_add_epi16(at_b, _mm512_cmpgt_epi16_mask(b, of_b), at_b, by);
            }
            const __mmask32 near_a = _mm512_cmpgt_epi16_mask(a, _mm512_permutexvar_epi16(at_a, belows));
            const __mmask32 near_b = _mm512_cmpgt_epi16_mask(b, _mm512_permutexvar_epi16(at_b, belows));
            _mm256_storeu_si256((void *)(level + i), _mm512_cvtepi16_epi8(at_a));
            _mm256_storeu_si256((void *)(level + i + 32), _mm512_cvtepi16_epi8(at_b));
            near[i / 64] = _mm512_kunpackd(near_b, near_a);
        }
    }
    AVX2 static int32_t level_bits_avx2(const uint8_t *level, ptrdiff_t n, uint8_t least,
                                        const uint64_t *plane, uint64_t *bits)
    {
        const __m256i from = _mm256_set1_epi8((char)least);        /* AVX2 compares bytes with signs alone */
        int32_t total = 0;
        for (ptrdiff_t i = 0; i < n; i += 64) {
            const __m256i a = _mm256_loadu_si256((const void *)(level + i));
            const __m256i b = _mm256_loadu_si256((const void *)(level + i + 32));
            const __m256i high_a = _mm256_cmpeq_epi8(_mm256_max_epu8(a, from), a);
            const __m256i high_b = _mm256_cmpeq_epi8(_mm256_max_epu8(b, from), b);
            bits[i / 64] = (uint64_t)(uint32_t)_mm256_movemask_epi8(high_b) << 32
                         | (uint32_t)_mm256_movemask_epi8(high_a);
            total += __builtin_popcountll(bits[i / 64] & plane[i / 64]);
        }
        return total;
    }
    AVX512 static int32_t level_bits_avx512(const uint8_t *level, ptrdiff_t n, uint8_t least,
                                            const uint64_t *plane, uint64_t *bits)
    {
        const __m512i from = _mm512_set1_epi8((char)least);
        int32_t total = 0;
        for (ptrdiff_t i = 0; i < n; i += 64) {
            bits[i / 64] = _mm512_cmpge_epu8_mask(_mm512_loadu_si512(level + i), from);
            total += __builtin_popcountll(bits[i / 64] & plane[i / 64]);
        }
        return total;
    }
    #endif
    static void levels(const int16_t *key, ptrdiff_t n, const int16_t *below, const int16_t *high, int cuts,
                       uint8_t *level, uint64_t *near)
    {
    #ifdef KNN_X86
        if (isa == 2) levels_avx512(key, n, below, high, cuts, level, near);
        else if (isa == 1) levels_avx2(key, n, below, high, cuts, level, near);
        else
    #endif
        levels_loop(key, n, below, high, cuts, level, near);
    }
    /* The bits of at least this level; how many of them a plane has. */
    static int32_t level_bits(const uint8_t *level, ptrdiff_t n, uint8_t least, const uint64_t *plane,
                              uint64_t *bits)
    {
    #ifdef KNN_X86
        return (isa == 2 ? level_bits_avx512 : level_bits_avx2)(level, n, least, plane, bits);
    #else
        return 0;
    #endif
    }
    /* Where low <= key <= high, in ascending order; keys are padded as levels() needs them. */
    static ptrdiff_t collect(const int16_t *key, ptrdiff_t n, int16_t low, int16_t high, int32_t *index)
    {
        int16_t below[CUTS + 1], highs[CUTS + 1];
        uint8_t level[CHUNK];
        uint64_t near[WORDS];
        ptrdiff_t found = 0;
        for (int j = 0; j <= CUTS; j++) {
            below[j] = j ? 32767 : (int16_t)(low - 1);
            highs[j] = j ? 32767 : high;
        }
        for (ptrdiff_t i = 0; i < n; i += CHUNK) {
            const ptrdiff_t words = ((n - i < CHUNK ? n - i : CHUNK) + 63) / 64;
            levels(key + i, words * 64, below, highs, 1, level, near);
            for (ptrdiff_t word = 0; word < words; word++)
                for (uint64_t bits = near[word]; bits; bits &= bits - 1)
                    index[found++] = (int32_t)(i + word * 64 + LOWEST_BIT(bits));
        }
        return found;
    }
    /* The candidate whose key stands at `place`; *word goes on from the last one's bit to this one's. */
    #ifdef KNN_X86
    AVX2 static int32_t kept_at(const uint64_t *kept, const int32_t *before, int32_t place, ptrdiff_t *word)
    {
        while (before[*word + 1] <= place) ++*word;
        const uint64_t bit = _pdep_u64((uint64_t)1 << (place - before[*word]), kept[*word]);
        return (int32_t)*word * 64 + LOWEST_BIT(bit);
    }
    #define candidate_at(kept, before, place, word) ((kept) ? kept_at(kept, before, place, word) : (place))
    #else
    #define candidate_at(kept, before, place, word) (place)
    #endif
    /* Key first + i goes to the list of each threshold j that it is near: number[j] of them, NEAR kept. */
    #define NEAR 128
    static void add_near(const int16_t *key, const uint64_t *near, ptrdiff_t words, const uint8_t *level,
                         const int16_t *below, const uint64_t *kept, const int32_t *before, int32_t first,
                         ptrdiff_t *at, int32_t *index, int16_t *value, int32_t *number)
    {
        for (ptrdiff_t word = 0; word < words; word++)
            for (uint64_t bits = near[word]; bits; bits &= bits - 1) {
                const int32_t i = (int32_t)word * 64 + LOWEST_BIT(bits);
                const int32_t candidate = candidate_at(kept, before, first + i, at);
                for (int j = level[i]; key[i] > below[j]; j++) {
                    if (number[j] < NEAR) {
                        index[j * NEAR + number[j]] = candidate;
                        value[j * NEAR + number[j]] = key[i];
                    }
                    number[j]++;
                }
            }
    }
    LOOP int64_t common_bits_loop(const uint64_t *a, const uint64_t *b, ptrdiff_t words)
    {
        int64_t total = 0;
        for (ptrdiff_t i = 0; i < words; i++) total += __builtin_popcountll(a[i] & b[i]);
        return total;
    }
    #ifdef KNN_X86
    AVX2 static int64_t common_bits_avx2(const uint64_t *a, const uint64_t *b, ptrdiff_t words)
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
    #ifdef __clang__
    __attribute__((target("avx512f,avx512vpopcntdq")))
    #else
    __attribute__((target("avx512f,avx512vpopcntdq,prefer-vector-width=512")))
    #endif
    static int64_t common_bits_vpopcnt(const uint64_t *a, const uint64_t *b, ptrdiff_t words)
    {
        return common_bits_loop(a, b, words);
    }
    #endif
    static int64_t common_bits(const uint64_t *a, const uint64_t *b, ptrdiff_t words)
    {
    #ifdef KNN_X86
        if (isa) return (has_vpopcnt ? common_bits_vpopcnt : common_bits_avx2)(a, b, words);
    #endif
        return common_bits_loop(a, b, words);
    }

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
            key[i] = (int16_t)(((part < margin) | (part > other)) ? open : bin);
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

    /* Their sum times norm, in the fastest order: off by less than (m + 8) · 2^-53 of the norm. */
    LOOP double nearly_loop(const double *unit, const float *b, ptrdiff_t m)
    {
        double sum[16] = {0}, total = 0.0;
        ptrdiff_t i = 0;
        for (; i + 16 <= m; i += 16)
            for (int j = 0; j < 16; j++) sum[j] += unit[i + j] * (double)b[i + j];
        for (; i < m; i++) total += unit[i] * (double)b[i];
        for (int j = 0; j < 16; j++) total += sum[j];
        return total;
    }
    EACH_ISA(double, nearly, (const double *unit, const float *b, ptrdiff_t m),
             (unit, b, m))

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
    enum:
        BINS
        BIN_SHIFT
        CHUNK
        SPAN
        WORDS
        CUTS
        NEAR
        PANEL
        ABREAST
    void PREFETCHW(const void *address) noexcept nogil
    int __builtin_popcountll(uint64_t bits) noexcept nogil
    void PREFETCH(const void *address) noexcept nogil
    void products(const float *queries, const float *panels, ptrdiff_t count, ptrdiff_t m, float *out,
                  ptrdiff_t stride) noexcept nogil
    void to_keys(const float *product, const float *offset, ptrdiff_t n, float low, float scale,
                 int16_t *key) noexcept nogil
    void add_histogram(const int16_t *key, ptrdiff_t n, uint32_t *histogram) noexcept nogil
    ptrdiff_t keep(const float *product, const float *offset, ptrdiff_t n, float low, float scale,
                   int16_t *key, uint64_t *kept) noexcept nogil
    void expand(const uint8_t *level, ptrdiff_t words, const uint64_t *kept, uint8_t *out) noexcept nogil
    void sum_bits(const uint64_t *bits, ptrdiff_t words, int32_t *before) noexcept nogil
    ptrdiff_t sum_from_top(const uint32_t *histogram, uint32_t deepest, uint32_t *above) noexcept nogil
    ptrdiff_t collect(const int16_t *key, ptrdiff_t n, int16_t low, int16_t high,
                      int32_t *index) noexcept nogil
    void levels(const int16_t *key, ptrdiff_t n, const int16_t *below, const int16_t *high, int cuts,
                uint8_t *level, uint64_t *near) noexcept nogil
    int32_t level_bits(const uint8_t *level, ptrdiff_t n, uint8_t least, const uint64_t *plane,
                       uint64_t *bits) noexcept nogil
    int32_t count_codes(const uint8_t *level, const uint8_t *code, ptrdiff_t n, uint8_t least,
                        uint8_t value) noexcept nogil
    void add_near(const int16_t *key, const uint64_t *near, ptrdiff_t words, const uint8_t *level,
                  const int16_t *below, const uint64_t *kept, const int32_t *before, int32_t first,
                  ptrdiff_t *at, int32_t *index, int16_t *value, int32_t *number) noexcept nogil
    int32_t candidate_at(const uint64_t *kept, const int32_t *before, int32_t place,
                         ptrdiff_t *word) noexcept nogil
    int64_t common_bits(const uint64_t *a, const uint64_t *b, ptrdiff_t words) noexcept nogil
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
    double nearly(const double *unit, const float *b, ptrdiff_t m) noexcept nogil
    bint item_less(item_t a, item_t b) noexcept nogil
    int compare_items(const void *a, const void *b) noexcept nogil

INTERFACE = 8                   # of the functions here: the scripts take no other
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
    STRIP = 128                 # products of each of ABREAST queries that become keys together
    TILE = 1 << 16              # numbers of candidates that stay in the cache for all queries

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
    const float *product        # (n,) float32 products with every candidate: for rank_row()
    ptrdiff_t query
    double bound                # |computed − true similarity| is at most this
    double scale                # of the keys
    int16_t *key                # (keys,), and behind them −32768 up to a multiple of 64
    ptrdiff_t keys              # n, or fewer where those of the farthest are left out
    const uint64_t *kept        # (⌈n/64⌉,) a bit for each candidate that has a key; NULL where all have
    int32_t *before             # (⌈n/64⌉ + 1,) how many bits there are before each word of kept
    uint32_t *histogram         # (BINS,) of the keys, and behind it
    uint32_t *above             # (BINS / SPAN,) how many keys are in higher bins than a span has
    ptrdiff_t lowest            # span from which on this is known
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


cdef void choose_keys(const float *sample, ptrdiff_t count, double share, double bound,
                      float *place) noexcept nogil:
    """The keys' range from about 1,000 similarities: one's key is (similarity − place[0]) · place[1] − 32768.

    place[2] is 1 where what is not among this share of the nearest is left out, 0 where all get keys.
    What lies beyond the range shares an edge's key (slower, not wrong).
    """
    cdef uint16_t[256] coarse
    cdef ptrdiff_t i = 256
    cdef float lowest = sample[0], highest = sample[0], width, low
    cdef double needed = count * share + 5.0 * sqrt(count * share * (1.0 - share)) + 2.0
    for i in range(1, count):
        lowest, highest = min(lowest, sample[i]), max(highest, sample[i])
    width = max(highest - lowest, <float>1e-30)
    place[0], place[1], place[2] = lowest - width * <float>0.03, <float>65534.0 / (width * <float>1.25), 0
    if isa == 0 or needed > 0.7 * count:
        return
    memset(coarse, 0, sizeof(coarse))
    for i in range(count):
        coarse[<ptrdiff_t>((sample[i] - lowest) * (<float>255.0 / width))] += 1
    i = 256
    while i > 0 and needed > 0:
        i -= 1
        needed -= coarse[i]
    low = lowest + i * (width / <float>255.0)
    low = low - <float>(4.0 * bound + 2e-4 * (highest - low))    # more than a bin and a margin below
    if low > lowest and low < highest:
        place[0], place[1], place[2] = low, <float>65534.0 / (<float>1.5 * (highest - low)), 1


cdef void count_keys(Row *row, uint32_t deepest) noexcept nogil:
    """The histogram, and its sums down to the rank `deepest`; the query itself is left out."""
    cdef ptrdiff_t own = place_of(row, row.query)
    memset(row.histogram, 0, BINS * sizeof(uint32_t))
    add_histogram(row.key, row.keys, row.histogram)
    if own >= 0:
        row.histogram[(row.key[own] + 32768) >> BIN_SHIFT] -= 1
        row.key[own] = -32768
    row.lowest = sum_from_top(row.histogram, deepest, row.above)


cdef ptrdiff_t place_of(const Row *row, ptrdiff_t i) noexcept nogil:
    """Where candidate i's key stands, −1: it has none."""
    cdef uint64_t bit = <uint64_t>1 << (i & 63)
    if not row.kept:
        return i
    if not row.kept[i >> 6] & bit:
        return -1
    return row.before[i >> 6] + __builtin_popcountll(row.kept[i >> 6] & (bit - 1))


cdef ptrdiff_t padded(ptrdiff_t n) noexcept nogil:
    return (n + 63) // 64 * 64


cdef ptrdiff_t find_bin(const Row *row, int64_t rank, int16_t *low, int16_t *high,
                        int64_t *above) noexcept nogil:
    """The bin of the rank-th: low <= key <= high may be among the `rank` nearest or not, by their keys.

    above: how many items are in higher bins. −1 where there are fewer items than `rank`.
    """
    cdef ptrdiff_t span = row.lowest, last = BINS // SPAN - 1, bin
    cdef int32_t margin = margin_of_keys(row), bottom
    while span < last:                        # the lowest with fewer than `rank` above it
        bin = (span + last) // 2
        if <int64_t>row.above[bin] < rank:
            last = bin
        else:
            span = bin + 1
    bin, above[0] = span * SPAN + SPAN - 1, row.above[span]
    while bin >= 0 and above[0] + row.histogram[bin] < rank:
        above[0] += row.histogram[bin]
        bin -= 1
    bottom = (<int32_t>bin << BIN_SHIFT) - 32768
    low[0] = <int16_t>max(bottom - margin, -32767)
    high[0] = <int16_t>min(top_key(bin) + margin, 32766)
    return bin


cdef int32_t top_key(ptrdiff_t bin) noexcept nogil:
    return (<int32_t>bin << BIN_SHIFT) + (1 << BIN_SHIFT) - 1 - 32768


cdef int32_t margin_of_keys(const Row *row) noexcept nogil:
    """Keys farther apart than this are of similarities more than twice the bound apart."""
    return <int32_t>min(2.0 * row.bound * row.scale + 0.05, 65535.0) + 1


cdef double nearest_keys(const item_t *item, ptrdiff_t n, ptrdiff_t k, int16_t low,
                         int16_t high) noexcept nogil:
    """The k-th smallest of distances that are minus keys of low < key <= high."""
    cdef ptrdiff_t i, count
    cdef int32_t first = -high, last = -low - 1, middle
    while first < last:
        middle = first + last >> 1
        count = 0
        for i in range(n):
            count += item[i].distance <= middle
        if count >= k:
            last = middle
        else:
            first = middle + 1
    return first


cdef ptrdiff_t resolve(const Space *space, Row *row, ptrdiff_t need, ptrdiff_t near, double cut,
                       double tolerance) noexcept nogil:
    """Which of the candidates between find_bin()'s keys are among the nearest, beside all above.

    Before: they are row.item[:near], with distances that are right to within half the tolerance; `need` of
    them are wanted, the last of these at the distance `cut`. After: row.index[:returned], and row.places of
    the row.tied ones that follow there; by index these are among those returned.
    """
    cdef ptrdiff_t i, j, certain = 0, unsure, nearer = 0
    row.tied = row.places = 0
    if need < near:
        unsure = 0
        for i in range(near):                 # surely nearer stay in front, the unsure follow, the farther go
            if row.item[i].distance < cut - tolerance:
                row.index[certain] = <int32_t>row.item[i].index
                certain += 1
            elif row.item[i].distance <= cut + tolerance:
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


cdef int32_t hits_chosen(const Row *row, const uint8_t[:, ::1] codes, const uint64_t[:, :, :, ::1] planes,
                         const int32_t[::1] start, int most, ptrdiff_t k, uint8_t value, ptrdiff_t first,
                         ptrdiff_t last) noexcept nogil:
    cdef int32_t hits = 0, candidate
    cdef ptrdiff_t i
    for i in range(first, last):
        candidate = row.index[i]
        if value <= most:
            hits += (plane_of(planes, start, candidate // CHUNK, k, value)[candidate % CHUNK // 64]
                     >> (candidate % 64) & 1)
        else:
            hits += codes[k, candidate] == value
    return hits


cdef int64_t hits_walked(const Row *row, const int32_t *member, ptrdiff_t members, int16_t threshold,
                         ptrdiff_t chosen) noexcept nogil:
    """Walk the members of the query's class; the chosen items are promoted above the threshold meanwhile."""
    cdef int64_t hits = 0
    cdef ptrdiff_t i, place
    for i in range(chosen):
        place = place_of(row, row.index[i])
        row.item[i].index, row.key[place] = row.key[place], 32767
    for i in range(members):
        place = place_of(row, member[i])
        hits += place >= 0 and row.key[place] > threshold
    for i in range(chosen):
        row.key[place_of(row, row.index[i])] = <int16_t>row.item[i].index
    return hits


cdef Space make_space(const uint8_t[:, ::1] x, int size, const int64_t[::1] rows, const double[::1] lengths,
                      const double[::1] aux, const float[::1] offset, int distance):
    cdef Space space
    use(ISA)
    space.x, space.size, space.rows, space.aux, space.offset = &x[0, 0], size, &rows[0], &aux[0], &offset[0]
    space.lengths = &lengths[0] if lengths.shape[0] else NULL
    space.n, space.m, space.distance = rows.shape[0], x.shape[1] // size, distance
    return space


def choose_ranges(const float[:, ::1] sample, const int64_t[::1] depth, const double[::1] bounds,
                  ptrdiff_t n, float[:, ::1] ranges):
    """ranges (B, 3) float32 for make_keys(), from similarities (B, c) of queries with some of n candidates.

    depth (B,) int64: so many nearest are needed; bounds (B,) float64: as count_hits() has them. Another
    sample changes no count.
    """
    cdef ptrdiff_t b
    use(ISA)
    with nogil:
        for b in range(sample.shape[0]):
            choose_keys(&sample[b, 0], sample.shape[1], <double>depth[b] / n, bounds[b], &ranges[b, 0])


def zeros(shape, dtype):
    """np.zeros() that begins a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + 64, np.uint8)
    return room[-room.ctypes.data % 64:][:size].view(dtype).reshape(shape)


def panels_of(rows):
    """Rows (n, m) float32 as make_keys() takes them: (P, m, 32), zeros behind the last."""
    n, m = rows.shape
    panels, whole = zeros((-(-n // 64) * 2, m, PANEL), np.float32), n // PANEL
    panels[:whole] = rows[:whole * PANEL].reshape(whole, PANEL, m).swapaxes(1, 2)
    if n % PANEL:
        panels[whole, :, :n % PANEL] = rows[whole * PANEL:].T
    return panels


def multiply(const float[:, ::1] vectors, const float[:, :, ::1] panels, float[:, ::1] out):
    """Float32 products of vectors (B, m) with the candidates of panels (P, m, 32) -> out (B, P · 32)."""
    cdef ptrdiff_t m = vectors.shape[1], b, i, p
    cdef float[:, :, ::1] queries = abreast(vectors)
    cdef float[ABREAST * PANEL] few
    use(ISA)
    with nogil:
        for b in range(queries.shape[0]):
            for p in range(panels.shape[0]):
                products(&queries[b, 0, 0], &panels[p, 0, 0], 1, m, few, PANEL)
                for i in range(min(ABREAST, vectors.shape[0] - b * ABREAST)):
                    memcpy(&out[b * ABREAST + i, p * PANEL], few + i * PANEL, PANEL * sizeof(float))


cdef abreast(const float[:, ::1] vectors):
    """Vectors (B, m) as products() takes them: (⌈B / 12⌉, m, 12); what lacks is the last one again."""
    cdef ptrdiff_t groups = (vectors.shape[0] + ABREAST - 1) // ABREAST, b, i, k
    cdef float[:, :, ::1] queries = np.empty((groups, vectors.shape[1], ABREAST), np.float32)
    with nogil:
        for b in range(groups):
            for k in range(vectors.shape[1]):
                for i in range(ABREAST):
                    queries[b, k, i] = vectors[min(b * ABREAST + i, vectors.shape[0] - 1), k]
    return queries


cdef float *aligned(float *room) noexcept nogil:
    """The first number that begins a cache line."""
    return <float *>((<size_t>room + 63) // 64 * 64)


def make_keys(const float[:, ::1] vectors, const float[:, :, ::1] panels, const float[::1] offset,
              const float[:, ::1] ranges, int16_t[:, ::1] keys, uint64_t[:, ::1] kept, int32_t[::1] number):
    """Keys of the candidates for queries vectors (B, m) float32.

    panels     (P, m, 32) float32: candidate i is [i // 32, :, i % 32]; P is even
    offset     (P · 32,) float32: similarity = product + offset; −3e38 behind the last candidate
    keys       (B, P · 32 + 64) int16, the result, of which number (B,) int32 are there; kept (B, P / 2)
                                uint64: their candidates' bits
    """
    cdef ptrdiff_t m = vectors.shape[1], count = panels.shape[0], g, b, i, p, at, some, width, tile, stop
    cdef ptrdiff_t step = max(1, TILE // m // STRIP) * (STRIP // PANEL)
    cdef float[:, :, ::1] queries = abreast(vectors)
    cdef float[ABREAST * STRIP + 16] room
    cdef float *strip = aligned(room)
    use(ISA)
    with nogil:
        for b in range(vectors.shape[0]):
            number[b] = 0
        for tile in range((count + step - 1) // step):
            stop = min((tile + 1) * step, count)
            for g in range(queries.shape[0]):
                b, p = g * ABREAST, tile * step
                some = min(ABREAST, vectors.shape[0] - b)
                for i in range(some):
                    prefetch_row(&keys[b + i, number[b + i]])
                while p < stop:
                    width, at = min(STRIP // PANEL, stop - p), p * PANEL
                    products(&queries[g, 0, 0], &panels[p, 0, 0], width, m, strip, STRIP)
                    for i in range(some):
                        number[b + i] += add_keys(strip + i * STRIP, &offset[at], width * PANEL,
                                                  &ranges[b + i, 0], &keys[b + i, number[b + i]],
                                                  &kept[b + i, at // 64])
                    p += width


cdef void prefetch_row(const int16_t *key) noexcept nogil:
    cdef ptrdiff_t i
    for i in range(0, 256, 32):
        PREFETCHW(key + i)


cdef int32_t add_keys(const float *product, const float *offset, ptrdiff_t n, const float *place,
                      int16_t *key, uint64_t *kept) noexcept nogil:
    """Keys of n candidates, a multiple of 64 -> how many."""
    if place[2]:
        return <int32_t>keep(product, offset, n, place[0], place[1], key, kept)
    to_keys(product, offset, n, place[0], place[1], key)
    return <int32_t>n


def count_hits(int16_t[:, ::1] keys, const uint64_t[:, ::1] kept, const int32_t[::1] number,
               const float[:, ::1] ranges, const int64_t[::1] queries, const double[::1] bounds,
               const uint8_t[:, ::1] x, int size, const int64_t[::1] rows, const double[::1] lengths,
               const double[::1] aux, const float[::1] offset, int distance,
               const uint64_t[:, :, :, ::1] planes, const int32_t[::1] start, int most,
               const int32_t[:, ::1] entry, const uint8_t[:, ::1] codes,
               const int32_t[:, ::1] members, const int32_t[::1] member_row, const uint8_t[::1] entry_code,
               const int32_t[::1] entry_rank, const int32_t[::1] entry_start, const int32_t[::1] entry_count,
               const int64_t[::1] ranks,
               int32_t[:, :, ::1] hits, uint8_t[::1] short, uint8_t[:, ::1] depths, bint by_index=False,
               int period=0):
    """Among each query's R nearest candidates, how many carry its label: for every label column at once.

    keys, kept, number, ranges  make_keys()'s; keys are changed
    queries    (B,)   int64     the queries' own indices
    bounds     (B,)   float64   bound of |products + offset − true similarity|
    x          (N, m · size)    embeddings as they came, as bytes: numbers of size bytes (2, 4, 8)
    rows       (n,)   int64     where in x the candidates stand; lengths (n,) float64: they are divided by
                                these, or (0,); aux (n,) float64, offset (n,) float32: nrprec.prepare()
    planes     (⌈n/8192⌉, s, copies, 128) uint64  for codes c <= most: bit i of […, start[j] + c − 1, copy], a
                                piece of 8,192 candidates each, is codes[k, i] == c for column k = j + copy ·
                                len(start); start (k / copies,) int32
    entry      (k, B) int32     the queries' values as rows of the table entry_*
    codes      (k, n) uint8     labels of the columns' frequent values (1 … 255; 0: any other value); not read
                                of values that have planes
    members    (w, n) int32     indices sorted by value; member_row (k,) int32 gives a column's row (−1: none)
      entry_code  its code, 0: walk the members · entry_start, entry_count: where they stand
      entry_rank  which of `ranks` (int64, 1 … n − 1) is its R, −1: R = 0, no hits
    hits       (4, k, B) int32  the result, zeros before: hits retrieved for sure · tied at the cut ·
                                hits among these · how many of these are retrieved
    short      (B,) uint8       1 for a query with too few keys, not counted: make all (ranges[:, 2] = 0)
    depths     (B, ⌈n/64⌉ · 64) uint8  to work in, where there is a period, else (0, 0)
    by_index                    the smaller indices of these: all hits are sure; ties are told all the same
    period                      the columns are permuted copies of the first so many; 0: they aren't
    """
    cdef Space space = make_space(x, size, rows, lengths, aux, offset, distance)
    cdef ptrdiff_t n = space.n, block = queries.shape[0], columns = entry.shape[0], slots = ranks.shape[0], b
    cdef bint shared = period and most and slots < 256
    cdef uint8_t[:, ::1] least = np.zeros((block, slots + 1), np.uint8)
    cdef uint32_t[::1] histogram = np.empty(BINS + BINS // SPAN, np.uint32)
    cdef int32_t[::1] before = np.empty(padded(n) // 64 + 1, np.int32), index = np.empty(n, np.int32)
    cdef uint8_t[::1] level = np.empty(padded(n) + 64, np.uint8)
    cdef double[::1] item = np.empty(2 * n), term = np.empty(2 * space.m)   # item_t: two words of eight bytes
    cdef int32_t[::1] first = np.empty(slots + 1, np.int32), order = np.empty(columns, np.int32)
    cdef int32_t[:, ::1] orders = np.empty((block, columns if shared else 0), np.int32)
    cdef int32_t[:, ::1] sums = np.zeros((block, columns if shared else 0), np.int32)
    cdef int32_t[:, ::1] ends = np.zeros((block, period * (most + 1)), np.int32)
    cdef Row row
    row.by_index, row.histogram, row.above = by_index, &histogram[0], &histogram[BINS]
    row.before = &before[0]
    row.index, row.item, row.term = &index[0], <item_t *>&item[0], &term[0]
    with nogil:
        for b in range(block):
            row.key, row.keys, row.scale = &keys[b, 0], min(number[b], n), ranges[b, 1]
            row.query, row.bound = queries[b], bounds[b]
            row.kept = &kept[b, 0] if row.keys < n else NULL
            short[b] = not count_row(&space, &row, &depths[b, 0] if shared else NULL, &least[b, 0], &level[0],
                                     &first[0], &order[0], codes, planes, start, most, members, member_row,
                                     entry, entry_code, entry_rank, entry_start, entry_count, ranks, hits, b)
        if shared:
            count_copies(period, depths, least, planes, start, most, entry, entry_code, entry_rank, orders,
                         ends, sums, hits)


cdef void count_copies(ptrdiff_t period, const uint8_t[:, ::1] depths, const uint8_t[:, ::1] least,
                       const uint64_t[:, :, :, ::1] planes, const int32_t[::1] start, int most,
                       const int32_t[:, ::1] entry, const uint8_t[::1] entry_code,
                       const int32_t[::1] entry_rank, int32_t[:, ::1] order, int32_t[:, ::1] end,
                       int32_t[:, ::1] sums, int32_t[:, :, ::1] hits) noexcept nogil:
    """A query retrieves with a rank the candidates of at least this depth: a mask that all copies share.

    Value by value, so that a piece of this value's planes in all copies stays in the cache for all queries.
    order (B, k): the columns of a property in which a query has a value side by side; they end at
    end (B, properties · (most + 1)), of which the first of a property are not counted here. sums (B, k):
    zeros.
    """
    cdef ptrdiff_t columns = entry.shape[0], piece, slot, b, k, i, words
    cdef int32_t e
    cdef uint8_t value
    cdef uint64_t[WORDS] mask
    cdef const uint64_t *plane
    cdef const uint64_t *following
    for b in range(entry.shape[1]):           # a counting sort
        for i in range(2):
            for k in range(columns):
                e = entry[k, b]
                value = entry_code[e] if entry_code[e] <= most and entry_rank[e] >= 0 else 0
                slot = k % period * (most + 1) + value
                if i:
                    order[b, end[b, slot]] = <int32_t>k
                    end[b, slot] += 1
                elif slot + 1 < end.shape[1]:
                    end[b, slot + 1] += 1
            for slot in range(1, end.shape[1] if i == 0 else 0):
                end[b, slot] += end[b, slot - 1]
    for piece in range(planes.shape[0]):
        words = min(WORDS, depths.shape[1] // 64 - piece * WORDS)
        for slot in range(end.shape[1]):
            value = slot % (most + 1)
            for b in range(entry.shape[1] if value else 0):
                if end[b, slot - 1] == end[b, slot]:
                    continue
                e = entry[order[b, end[b, slot - 1]], b]
                level_bits(&depths[b, piece * CHUNK], words * 64, least[b, entry_rank[e]], mask, mask)
                plane = plane_of(planes, start, piece, order[b, end[b, slot - 1]], value)
                for i in range(end[b, slot - 1], end[b, slot]):
                    following = plane_of(planes, start, piece, order[b, min(i + 1, end[b, slot] - 1)], value)
                    for k in range(0, words, 8):        # they lie too far apart for the processor to guess
                        PREFETCH(following + k)
                    sums[b, i] += <int32_t>common_bits(mask, plane, words)
                    plane = following
    for b in range(entry.shape[1]):
        for i in range(columns):
            hits[0, order[b, i], b] += sums[b, i]


cdef const uint64_t *plane_of(const uint64_t[:, :, :, ::1] planes, const int32_t[::1] start,
                              ptrdiff_t piece, ptrdiff_t k, uint8_t value) noexcept nogil:
    cdef uint32_t columns = <uint32_t>start.shape[0], column = <uint32_t>k % columns
    cdef uint32_t copy = <uint32_t>k // columns
    return &planes[piece, start[column] + value - 1, copy, 0]


cdef bint count_row(const Space *space, Row *row, uint8_t *depth, uint8_t *least, uint8_t *levels_of_keys,
                    int32_t *first, int32_t *order, const uint8_t[:, ::1] codes,
                    const uint64_t[:, :, :, ::1] planes, const int32_t[::1] start, int most,
                    const int32_t[:, ::1] members, const int32_t[::1] member_row,
                    const int32_t[:, ::1] entry, const uint8_t[::1] entry_code, const int32_t[::1] entry_rank,
                    const int32_t[::1] entry_start, const int32_t[::1] entry_count, const int64_t[::1] ranks,
                    int32_t[:, :, ::1] hits, ptrdiff_t b) noexcept nogil:
    """One query's hits; False: it has too few keys.

    Where there is a depth (n,), it becomes the number of ranks with which a candidate is retrieved, and
    least[slot] the depth from which on it is with that rank: count_copies() goes on from there.
    """
    cdef ptrdiff_t n = space.n, columns = entry.shape[0], slots = ranks.shape[0], words = padded(n) // 64
    cdef ptrdiff_t k, i, j, c, slot, part, found, need, chosen, last, word, cuts, earlier = 0, coded = 0
    cdef int16_t low = 0
    cdef int16_t[CUTS + 1] below, high        # for each threshold: keys between these are near it
    cdef int32_t[CUTS] at, begin              # where its rank stands in ranks, and its first column in order
    cdef ptrdiff_t[CUTS] bin                  # find_bin()'s
    cdef int64_t[CUTS] above
    cdef int32_t[CUTS] number                 # how many candidates are near
    cdef int32_t[CUTS * NEAR] near            # the first of them,
    cdef int16_t[CUTS * NEAR] near_key        # and their keys
    cdef uint8_t[CHUNK] expanded
    cdef uint8_t *level
    cdef uint64_t[WORDS] bits
    cdef const uint64_t *plane
    cdef const int32_t *member
    cdef int32_t *count
    cdef int32_t e, tied
    cdef uint8_t value
    if depth:
        memset(depth, 0, padded(n))
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
            coded += entry_code[entry[k, b]] > most
    if first[slots] == 0:
        return True
    row.own = numbers(space, row.query, <float *>(row.term + space.m))
    slot = entry_rank[entry[order[first[slots] - 1], b]]
    if row.kept:
        sum_bits(row.kept, words, row.before)
    count_keys(row, <uint32_t>ranks[slot])
    for i in range(row.keys, padded(row.keys)):
        row.key[i] = -32768
    slot = slots
    while slot > 0:                           # up to CUTS thresholds at a time, the deepest rank first
        cuts = 0
        while slot > 0 and cuts < CUTS:
            slot -= 1
            begin[cuts] = first[slot - 1] if slot else 0
            if first[slot] > begin[cuts]:
                at[cuts], number[cuts] = slot, 0
                bin[cuts] = find_bin(row, ranks[slot], &low, &high[cuts], &above[cuts])
                below[cuts] = low - 1
                cuts += 1
        if row.kept and not earlier and bin[0] << BIN_SHIFT <= margin_of_keys(row) + 1:
            return False                      # items without keys may be among the nearest
        for j in range(cuts, CUTS + 1):
            below[j] = high[j] = 32767
        i = word = 0
        while cuts and i < row.keys:
            part = padded(min(CHUNK, row.keys - i))
            levels(row.key + i, part, below, high, cuts, levels_of_keys + i, bits)
            add_near(row.key + i, bits, part // 64, levels_of_keys + i, below, row.kept, row.before, i, &word,
                     near, near_key, number)
            i += part
        i = 0
        while cuts and i < n:                 # a chunk's levels stay in the first-level cache for all columns
            part = padded(min(CHUNK, n - i))
            level = levels_of_keys + i
            if row.kept:
                expand(levels_of_keys + row.before[i // 64], part // 64, row.kept + i // 64, expanded)
                level = expanded
            if depth:
                for j in range(part):
                    depth[i + j] += level[j]
            for j in range(cuts if coded or not depth else 0):
                c, k = begin[j], order[begin[j]]
                value = entry_code[entry[k, b]]
                if not depth and 0 < value <= most:
                    plane = plane_of(planes, start, i // CHUNK, k, value)
                    hits[0, k, b] += level_bits(level, part, j + 1, plane, bits)
                    c += 1
                elif not depth and most:
                    level_bits(level, part, j + 1, bits, bits)
                for c in range(c, first[at[j]]):
                    k = order[c]
                    value = entry_code[entry[k, b]]
                    if value > most:
                        hits[0, k, b] += count_codes(level, &codes[k, i], min(part, n - i), j + 1, value)
                    elif value and not depth:
                        plane = plane_of(planes, start, i // CHUNK, k, value)
                        hits[0, k, b] += <int32_t>common_bits(bits, plane, part // 64)
            i += part
        for j in range(cuts):
            need = ranks[at[j]] - above[j]
            if number[j] > NEAR:              # these all together again
                found, word = collect(row.key, row.keys, below[j] + 1, high[j], row.index), 0
                for i in range(found):
                    row.item[i].distance = -<double>row.key[row.index[i]]
                    row.item[i].index = candidate_at(row.kept, row.before, row.index[i], &word)
            else:
                found = number[j]
                for i in range(found):
                    row.item[i].index = near[j * NEAR + i]
                    row.item[i].distance = -<double>near_key[j * NEAR + i]
            for i in range(found):
                need += row.item[i].distance < -top_key(bin[j])
            chosen = resolve(space, row, need, found, nearest_keys(row.item, found, need, below[j], high[j]),
                             margin_of_keys(row))
            last = chosen if row.by_index else chosen + row.tied
            if depth:
                least[at[j]] = <uint8_t>(earlier + j + 1)
                for i in range(chosen):       # the others that are retrieved have it from their levels
                    depth[row.index[i]] += 1
            for c in range(begin[j], first[at[j]]):
                k = order[c]
                e = entry[k, b]
                value, count = entry_code[e], &hits[0, k, b]
                if depth and 0 < value <= most and not row.tied:
                    continue
                if value:
                    if not depth or value > most:
                        count[0] += hits_chosen(row, codes, planes, start, most, k, value, 0, chosen)
                    tied = hits_chosen(row, codes, planes, start, most, k, value, chosen, last)
                else:
                    member = &members[member_row[k], entry_start[e]]
                    count[0] = hits_walked(row, member, entry_count[e], high[j], chosen)
                    tied = 0
                    if last > chosen:
                        tied = hits_walked(row, member, entry_count[e], high[j], last) - count[0]
                if row.tied:
                    hits[1, k, b], hits[2, k, b], hits[3, k, b] = row.tied, tied, row.places
        earlier += cuts
    return True


# ---------------------------------------------------------------- pairs: histograms and rankings (pairs.py)

def pair_histogram(const float[:, ::1] vectors, const float[:, :, ::1] panels, ptrdiff_t first_row,
                   ptrdiff_t first_column,
                   const int64_t[:, ::1] ranges, const int64_t[::1] groups, const int64_t[::1] order,
                   const uint8_t[:, ::1] x, int size, const int64_t[::1] rows, const double[::1] norms,
                   double bound, const int64_t[::1] bins, int64_t[:, :, ::1] counts):
    """Add one tile of pairs to histograms of their inner products, exactly.

    The bin of rows a and b is min(floor((s + 1) · (bins / 2)), bins − 1), at least 0, with s NumPy's float64
    ((a / ‖a‖) * (b / ‖b‖)).sum(): what float32 products leave open within their error bound is evaluated so.

    vectors    (B, m) float32   normalised rows at positions first_row …
    panels     (P, m, 32) float32  those at first_column …, as make_keys() has them
    ranges     (3, n) int64     of a position p: begin, split, end; columns begin <= q < split go to
                                counts[:, 0], split <= q < end to counts[:, 1]
    groups     (n,)   int64     ascending: position p counts in counts[groups[p] − groups[first_row]]
    order      (n,)   int64     position p holds candidate order[p]
    norms      (n,)   float64   of the candidates; x, size, rows: as count_hits() has them
    bound      |float32 product − s| is at most this
    bins       (k,)   int64     1 … 32,000 each; counts (groups of the tile, 2, sum of bins) int64, added to
    """
    cdef Space space = make_space(x, size, rows, norms[:0], norms, np.zeros(1, np.float32), 2)
    cdef ptrdiff_t columns = panels.shape[0] * PANEL, m = space.m, kinds = bins.shape[0]
    cdef ptrdiff_t slots = 0, width = 0, r, p, k, i, j, low, high, split, found = 0
    cdef float[:, :, ::1] queries = abreast(vectors)
    cdef float[::1] room = np.empty(ABREAST * columns + 16, np.float32)
    cdef float *product = aligned(&room[0])
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
        for r in range(vectors.shape[0]):
            p = first_row + r
            if r % ABREAST == 0:              # with what any of them needs
                low, high = columns, 0
                for i in range(p, min(p + ABREAST, first_row + vectors.shape[0])):
                    low = min(low, ranges[0, i] - first_column)
                    high = max(high, ranges[2, i] - first_column)
                i, j = max(low, 0) // PANEL, (min(high, columns) + PANEL - 1) // PANEL
                if i < j:
                    products(&queries[r // ABREAST, 0, 0], &panels[i, 0, 0], j - i, m, product + i * PANEL,
                             columns)
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
                to_bins(product + r % ABREAST * columns + low, high - low, <float>(0.5 * bins[k]),
                        margin_of(bound, bins[k]), &key[0])
                add_bins(&key[0], split - low, &histogram[0, 0, at], slots)
                add_bins(&key[split - low], high - split, &histogram[1, 0, at], slots)
                for i in range(high - low, padded(high - low)):
                    key[i] = -32768
                found = collect(&key[0], high - low, <int16_t>bins[k], <int16_t>bins[k], &index[0])
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
                    own = numbers(&space, j, &buffer[0])
                    s = (nearly(&unit[0], own, m) / norms[j] + 1.0) * (0.5 * bins[k])
                    if fabs(s - rint(s)) < bins[k] * (m + 8) * 2.0 ** -52:
                        unit_products(&unit[0], own, norms[j], m, &term[0])
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


def rank_hits(const float[:, ::1] vectors, const float[:, :, ::1] panels, const int64_t[::1] queries,
              const double[::1] bounds,
              const uint8_t[:, ::1] x, int size, const int64_t[::1] rows, const double[::1] norms,
              const float[::1] offset, const int32_t[::1] values, const int64_t[::1] relevant,
              int64_t neighbours, int64_t[:, ::1] counts, double[::1] precision, bint by_index=False):
    """Each query's candidates in order of cosine distance: where those of its value stand.

    Candidates at the same distance form a group, or, by index, each a group of its own.
    vectors    (B, m) float32   the queries; panels (P, m, 32): the candidates, as make_keys() has them
    values     (n,) int32     classes; relevant (B,) int64: R, the other rows of the query's class
    neighbours                look at max(R, neighbours) candidates at least
    counts     (B, 7) int64   of the first group of these with hits: where it begins, candidates, hits (1, 1
                              where all are hits; 0 without a hit) · hits among the R nearest for sure · of a
                              group of hits and others that the cut at R divides: candidates, hits, places
    precision  (B,) float64   Σ_{k=1..R} E[Precision@k · p(k)] over all orders of the groups, not divided by R
    Other arguments as count_hits(). No list is kept: memory does not grow with R.
    """
    cdef Space space = make_space(x, size, rows, norms[:0], norms, offset, 2)
    cdef ptrdiff_t n = space.n, m = space.m, columns = panels.shape[0] * PANEL, b
    cdef float[:, :, ::1] side_by_side = abreast(vectors)
    cdef float[::1] room = np.empty(ABREAST * columns + 16, np.float32)
    cdef float *product = aligned(&room[0])
    cdef int16_t[::1] key = np.empty(padded(n), np.int16)
    cdef uint32_t[::1] histogram = np.empty(BINS + BINS // SPAN, np.uint32)
    cdef int32_t[::1] index = np.empty(n + 64, np.int32)
    cdef double[::1] item = np.empty(2 * n, np.float64), term = np.empty(2 * m), unit = np.empty(m)
    cdef Row row
    row.key, row.histogram, row.above, row.index = &key[0], &histogram[0], &histogram[BINS], &index[0]
    row.item, row.term = <item_t *>&item[0], &term[0]
    row.by_index = by_index
    counts[:, :], precision[:] = 0, 0.0
    with nogil:
        for b in range(vectors.shape[0]):
            if b % ABREAST == 0:
                products(&side_by_side[b // ABREAST, 0, 0], &panels[0, 0, 0], panels.shape[0], m, product,
                         columns)
            if relevant[b] == 0:
                continue
            row.product, row.query, row.bound = product + b % ABREAST * columns, queries[b], bounds[b]
            rank_row(&space, &row, min(max(relevant[b], neighbours), n - 1), relevant[b], &values[0],
                     &unit[0], &counts[b, 0], &precision[b])


cdef void rank_row(const Space *space, Row *row, int64_t depth, int64_t relevant, const int32_t *values,
                   double *unit, int64_t *counts, double *precision) noexcept nogil:
    cdef ptrdiff_t certain, near, total, found = 0, i, j, begin, end, bin, need, n = space.n, m = space.m
    cdef ptrdiff_t step = max(16, n // 64), count = 0             # runs of 16: a cache line each
    cdef int64_t right, before = 0, above = 0
    cdef int16_t low = 0, high = 0
    cdef float[1280] sample
    cdef float[3] keyed
    cdef bint mixed, ready = False
    cdef float *other = <float *>(row.term + m) + m
    cdef int32_t value = values[row.query]
    for i in range((n + step - 1) // step):
        for j in range(i * step, min(i * step + 16, n)):
            if j != row.query:
                sample[count] = row.product[j] + space.offset[j]
                count += 1
    choose_keys(sample, count, 1.0, row.bound, keyed)
    to_keys(row.product, space.offset, n, keyed[0], keyed[1], row.key)
    for i in range(n, padded(n)):
        row.key[i] = -32768
    row.scale, row.keys, row.kept = keyed[1], n, NULL
    count_keys(row, <uint32_t>depth)
    row.own = numbers(space, row.query, <float *>(row.term + m))
    bin = find_bin(row, depth, &low, &high, &above)
    near, need = collect(row.key, n, low, high, row.index), depth - above
    for i in range(near):
        PREFETCH(row.product + row.index[i])
    for i in range(near):
        j = row.index[i]
        row.item[i].index = j
        row.item[i].distance = -<double>(row.product[j] + space.offset[j])
        need += row.key[j] > top_key(bin)
    if need < near:
        select(row.item, near, need)
    near = resolve(space, row, need, near, row.item[need - 1].distance, 2.0 * row.bound)
    certain = depth - near
    if row.tied and not row.by_index:         # the whole group is looked at
        certain -= row.places
        near += row.tied
    total = certain + near
    for i in range(near):
        j = row.index[i]
        row.item[certain + i].index = j
        row.item[certain + i].distance = -<double>(row.product[j] + space.offset[j])
    if certain:                               # a counting sort: where a bin's items begin
        j, end = BINS, 0
        while j > bin:
            j -= 1
            i, row.histogram[j] = row.histogram[j], end
            end += i
        found = collect(row.key, n, high + 1, 32766, row.index)
        for i in range(found):
            j = row.index[i]
            begin = row.histogram[(row.key[j] + 32768) >> BIN_SHIFT]
            row.histogram[(row.key[j] + 32768) >> BIN_SHIFT] += 1
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
                row.item[j].distance = 1.0 - nearly(unit, numbers(space, found, other), m) / space.aux[found]
            order_items(row.item + begin, i - begin)
            end = begin
            while end < i:                    # what this can't tell apart, either
                need, end = end, end + 1
                while end < i and row.item[end].distance - row.item[end - 1].distance < (m + 8) * 2.0 ** -51:
                    end += 1
                for j in range(need, end if end - need > 1 else need):
                    found = row.item[j].index
                    unit_products(unit, numbers(space, found, other), space.aux[found], m, row.term)
                    row.item[j].distance = 1.0 - pairwise_sum(row.term, m)
                order_items(row.item + need, end - need)
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

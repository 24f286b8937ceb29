// Every kernel, written once. Private to kernels_*.cpp, each of which defines HSR_TREE_LEVEL. All in an
// anonymous namespace and without any shared inline function, so that the linker cannot merge a function
// compiled for AVX-512 into baseline code.
#include "tree/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, false, inside avx512fintrin.h
#endif

namespace hsr::tree {
namespace {

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

inline f64x8 load8(const float* from) {
    f32x8 value;
    __builtin_memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, f64x8);
}

inline unsigned at_least(f64x8 x, double threshold) {
#if defined(__AVX512F__)
    return _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(threshold), _CMP_GE_OQ);
#elif defined(__AVX2__)
    __m256d half[2];
    __builtin_memcpy(half, &x, sizeof half);
    const __m256d limit = _mm256_set1_pd(threshold);
    return unsigned(_mm256_movemask_pd(_mm256_cmp_pd(half[0], limit, _CMP_GE_OQ))) |
           unsigned(_mm256_movemask_pd(_mm256_cmp_pd(half[1], limit, _CMP_GE_OQ))) << 4;
#else
    unsigned mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= unsigned(x[i] >= threshold) << i;
    return mask;
#endif
}

inline unsigned not_below(f32x8 x, float threshold) {  // NaN is not below
#if defined(__AVX512F__) && defined(__AVX512VL__)
    return _mm256_cmp_ps_mask((__m256)x, _mm256_set1_ps(threshold), _CMP_NLT_UQ);
#elif defined(__AVX2__)
    return unsigned(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(threshold), _CMP_NLT_UQ)));
#elif defined(__SSE2__)
    __m128 half[2];
    __builtin_memcpy(half, &x, sizeof half);
    const __m128 limit = _mm_set1_ps(threshold);
    return unsigned(_mm_movemask_ps(_mm_cmpnlt_ps(half[0], limit))) |
           unsigned(_mm_movemask_ps(_mm_cmpnlt_ps(half[1], limit))) << 4;
#else
    unsigned mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= unsigned(!(x[i] < threshold)) << i;
    return mask;
#endif
}

// Scores of one block; D = 0 takes the dimension at run time.
template <int D>
inline f64x8 score_block(const float* block, int dim, const double* query) {
    const int d = D ? D : dim;
    f64x8 sum = load8(block) * query[0];
    for (int j = 1; j < d; ++j) sum += load8(block + j * kLanes) * query[j];
    return sum;
}

template <int D>
inline f32x8 score_block32(const float* block, int dim, const float* query) {
    const int d = D ? D : dim;
    f32x8 row, sum;
    __builtin_memcpy(&row, block, sizeof row);
    sum = row * query[0];
    for (int j = 1; j < d; ++j) {
        __builtin_memcpy(&row, block + j * kLanes, sizeof row);
        sum += row * query[j];
    }
    return sum;
}

inline unsigned lanes_in_range(int64_t block, int64_t begin, int64_t end) {
    const int64_t first = block * kLanes;
    unsigned mask = 0xff;
    if (begin > first) mask &= 0xffu << (begin - first);
    if (end < first + kLanes) mask &= 0xffu >> (first + kLanes - end);
    return mask;
}

template <int D, class Emit>
inline void for_hits(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search, Emit emit) {
    const int64_t last = (end - 1) / kLanes;
    const Search wanted = search;
    for (int64_t block = begin / kLanes; block <= last; ++block) {
        const float* keys = blocks + block * kLanes * (D ? D : dim);
        if (wanted.query32 && !not_below(score_block32<D>(keys, dim, wanted.query32), wanted.screen)) continue;
        const f64x8 scores = score_block<D>(keys, dim, wanted.query);
        const unsigned mask = at_least(scores, wanted.threshold) & lanes_in_range(block, begin, end);
        if (mask) emit(block * kLanes, scores, mask);
    }
}

#if defined(__AVX512F__) && defined(__AVX512VL__)
// Writes 8 packed hits and returns how many of them count. No branch: where hits are dense, a branch on the mask
// is mispredicted every other block.
inline size_t pack_hits(int64_t first, const f64x8& scores, unsigned mask, const int32_t* ids, PackedHit* out) {
    const __m256i id = ids ? _mm256_maskz_loadu_epi32(__mmask8(mask), ids + first)
                           : _mm256_add_epi32(_mm256_set1_epi32(int(first)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i bits = _mm256_castps_si256(_mm512_cvtpd_ps((__m512d)scores));
    const __m512i packed =
        _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(id), 32), _mm512_cvtepu32_epi64(bits));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(__mmask8(mask), packed));
    return size_t(__builtin_popcount(mask));
}
#else
inline size_t pack_hits(int64_t first, const f64x8& scores, unsigned mask, const int32_t* ids, PackedHit* out) {
    size_t found = 0;
    for (; mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        const float score = float(scores[lane]);
        uint32_t bits;
        __builtin_memcpy(&bits, &score, 4);
        const int64_t position = first + lane;
        out[found++] = uint64_t(ids ? uint32_t(ids[position]) : uint32_t(position)) << 32 | bits;
    }
    return found;
}
#endif

template <int D>
size_t scan(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search, const int32_t* ids,
            PackedHit* hits) {
    PackedHit* out = hits;
    if (begin >= end) return 0;
    const Search wanted = search;
    const int64_t last = (end - 1) / kLanes;
    for (int64_t block = begin / kLanes; block <= last; ++block) {
        const float* keys = blocks + block * kLanes * (D ? D : dim);
        if (wanted.query32 && !not_below(score_block32<D>(keys, dim, wanted.query32), wanted.screen)) continue;
        const f64x8 scores = score_block<D>(keys, dim, wanted.query);
        const unsigned mask = at_least(scores, wanted.threshold) & lanes_in_range(block, begin, end);
        out += pack_hits(block * kLanes, scores, mask, ids, out);
    }
    return size_t(out - hits);
}

template <int D>
size_t scan_rows(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search, int64_t first_id,
                 int64_t* ids, float* scores_out) {
    size_t found = 0;
    if (begin >= end) return 0;
    for_hits<D>(blocks, dim, begin, end, search, [&](int64_t first, const f64x8& scores, unsigned mask) {
#if defined(__AVX512F__) && defined(__AVX512VL__)
        const __m512i id =
            _mm512_add_epi64(_mm512_set1_epi64(first_id + first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
        _mm512_mask_compressstoreu_epi64(ids + found, __mmask8(mask), id);
        _mm256_mask_compressstoreu_ps(scores_out + found, __mmask8(mask), _mm512_cvtpd_ps((__m512d)scores));
        found += size_t(__builtin_popcount(mask));
#else
        for (; mask; mask &= mask - 1, ++found) {
            const int lane = __builtin_ctz(mask);
            ids[found] = first_id + first + lane;
            scores_out[found] = float(scores[lane]);
        }
#endif
    });
    return found;
}

template <int D>
int64_t count(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search) {
    int64_t found = 0;
    if (begin >= end) return 0;
    for_hits<D>(blocks, dim, begin, end, search,
                [&](int64_t, const f64x8&, unsigned mask) { found += __builtin_popcount(mask); });
    return found;
}

template <int D>
void score(const float* blocks, int dim, int64_t begin, int64_t end, const double* query, double* scores) {
    for (int64_t first = begin; first < end; first += kLanes) {
        const f64x8 sum = score_block<D>(blocks + first * (D ? D : dim), dim, query);
        __builtin_memcpy(scores + (first - begin), &sum, sizeof sum);
    }
}

template <int D>
void bounds(const float* volumes, int dim, const double* query, const double* magnitude, double norm, double* middle,
            double* spread) {
    const int d = D ? D : dim;
    const float* half = volumes + d * kLanes;
    f64x8 centre = load8(volumes) * query[0], box = load8(half) * magnitude[0];
    for (int j = 1; j < d; ++j) {
        centre += load8(volumes + j * kLanes) * query[j];
        box += load8(half + j * kLanes) * magnitude[j];
    }
    const f64x8 ball = load8(half + d * kLanes) * norm;
    const f64x8 tighter = ball < box ? ball : box;
    __builtin_memcpy(middle, &centre, sizeof centre);
    __builtin_memcpy(spread, &tighter, sizeof tighter);
}

// One entry that picks the compiled dimension: an indirect jump a call, outside every loop.
#define HSR_BY_DIMENSION(call)                 \
    switch (dim) {                             \
        case 1: return call<1> HSR_ARGUMENTS;  \
        case 2: return call<2> HSR_ARGUMENTS;  \
        case 3: return call<3> HSR_ARGUMENTS;  \
        case 4: return call<4> HSR_ARGUMENTS;  \
        case 5: return call<5> HSR_ARGUMENTS;  \
        case 6: return call<6> HSR_ARGUMENTS;  \
        case 7: return call<7> HSR_ARGUMENTS;  \
        case 8: return call<8> HSR_ARGUMENTS;  \
        default: return call<0> HSR_ARGUMENTS; \
    }

size_t any_scan(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search, const int32_t* ids,
                PackedHit* hits){
#define HSR_ARGUMENTS (blocks, dim, begin, end, search, ids, hits)
    HSR_BY_DIMENSION(scan)
#undef HSR_ARGUMENTS
} size_t any_scan_rows(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search, int64_t first_id,
                       int64_t* ids, float* scores){
#define HSR_ARGUMENTS (blocks, dim, begin, end, search, first_id, ids, scores)
    HSR_BY_DIMENSION(scan_rows)
#undef HSR_ARGUMENTS
} int64_t any_count(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search) {
#define HSR_ARGUMENTS (blocks, dim, begin, end, search)
    HSR_BY_DIMENSION(count)
#undef HSR_ARGUMENTS
}
void any_score(const float* blocks, int dim, int64_t begin, int64_t end, const double* query, double* scores) {
#define HSR_ARGUMENTS (blocks, dim, begin, end, query, scores)
    HSR_BY_DIMENSION(score)
#undef HSR_ARGUMENTS
}
void any_bounds(const float* volumes, int dim, const double* query, const double* magnitude, double norm,
                double* middle, double* spread) {
#define HSR_ARGUMENTS (volumes, dim, query, magnitude, norm, middle, spread)
    HSR_BY_DIMENSION(bounds)
#undef HSR_ARGUMENTS
}
#undef HSR_BY_DIMENSION

}  // namespace

#define HSR_TREE_QUOTE(x) #x
#define HSR_TREE_NAME(x) HSR_TREE_QUOTE(x)
namespace HSR_TREE_LEVEL {
const Kernels& table() {
    static const Kernels kernels{
        HSR_TREE_NAME(HSR_TREE_LEVEL), any_scan, any_scan_rows, any_count, any_score, any_bounds};
    return kernels;
}
}  // namespace HSR_TREE_LEVEL

}  // namespace hsr::tree

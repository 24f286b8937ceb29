// Every kernel, written once. Private to kernels_*.cpp, each of which defines HSR_TREE_LEVEL. All in an
// anonymous namespace and without any shared inline function, so that the linker cannot merge a function
// compiled for AVX-512 into baseline code.
#include "tree/kernels.h"

#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace hsr::tree {
namespace {

#include "kernels/lanes.h"

// Left to GCC, a conversion to or from eight numbers of float64 is made of halves of registers, put together again.
inline f64x8 load8(const float* from) {
#if defined(HSR_AVX512)
    return (f64x8)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
    return {(f64x4)_mm256_cvtps_pd(_mm_loadu_ps(from)), (f64x4)_mm256_cvtps_pd(_mm_loadu_ps(from + 4))};
#else
    return convert<f64x8>(load<f32x8>(from));
#endif
}
inline i32x8 cut8(const f64x8& x) {  // towards zero
#if defined(HSR_AVX512)
    return (i32x8)_mm512_cvttpd_epi32((__m512d)x);
#elif defined(__AVX2__)
    return (i32x8)_mm256_set_m128i(_mm256_cvttpd_epi32((__m256d)x.high), _mm256_cvttpd_epi32((__m256d)x.low));
#else
    return convert<i32x8>(x);
#endif
}

#if defined(HSR_AVX512)
inline unsigned at_least(f64x8 x, double threshold) {
    return _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(threshold), _CMP_GE_OQ);
}
inline unsigned below(f64x8 x, double threshold) {
    return _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(threshold), _CMP_LT_OQ);
}
inline unsigned not_below(f32x8 x, float threshold) {  // NaN is not below
    return _mm256_cmp_ps_mask((__m256)x, _mm256_set1_ps(threshold), _CMP_NLT_UQ);
}
#else
inline unsigned at_least(f64x8 x, double threshold) { return bits_of(x >= threshold); }
inline unsigned below(f64x8 x, double threshold) { return bits_of(x < threshold); }
inline unsigned not_below(f32x8 x, float threshold) { return bits_of(~(x < threshold)); }  // NaN is not below
#endif

#if defined(__AVX2__)
// The numbers of the bits that are set, among four.
alignas(16) constexpr uint8_t kNumbers[16][4] = {
    {0, 0, 0, 0}, {0, 0, 0, 0}, {1, 0, 0, 0}, {0, 1, 0, 0}, {2, 0, 0, 0}, {0, 2, 0, 0}, {1, 2, 0, 0}, {0, 1, 2, 0},
    {3, 0, 0, 0}, {0, 3, 0, 0}, {1, 3, 0, 0}, {0, 1, 3, 0}, {2, 3, 0, 0}, {0, 2, 3, 0}, {1, 2, 3, 0}, {0, 1, 2, 3}};
inline size_t append_numbers(unsigned bits, uint8_t first, uint8_t* to) {
    uint32_t numbers;
    __builtin_memcpy(&numbers, kNumbers[bits], 4);
    numbers += first * 0x01010101u;
    __builtin_memcpy(to, &numbers, 4);
    return size_t(__builtin_popcount(bits));
}
#endif

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
    f32x8 sum = load<f32x8>(block) * query[0];
    for (int j = 1; j < d; ++j) sum += load<f32x8>(block + j * kLanes) * query[j];
    return sum;
}

inline unsigned lanes_in_range(int64_t block, int64_t begin, int64_t end) {
    const int64_t first = block * kLanes;
    unsigned mask = 0xff;
    if (begin > first) mask &= 0xffu << (begin - first);
    if (end < first + kLanes) mask &= 0xffu >> (first + kLanes - end);
    return mask;
}

// Which blocks have a key that the screen lets through.
template <int D>
struct Screen {
    const float* query;
    float limit;
    int dim;
#if defined(HSR_AVX512)
    __m512 rows[D / 2 + 1];  // query_2j in the lower eight lanes, query_2j+1 in the upper ones
#endif
    Screen(const Search& search, int dimension) : query(search.query32), limit(search.screen), dim(dimension) {
#if defined(HSR_AVX512)
        for (int j = 0; j < D / 2; ++j)
            rows[j] = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(query[2 * j]), _mm512_set1_ps(query[2 * j + 1]));
#endif
    }
    int stride() const { return kLanes * (D ? D : dim); }
    bool opens(const float* keys) const { return not_below(score_block32<D>(keys, dim, query), limit) != 0; }
    // A bit for each key of two neighbouring blocks.
    unsigned pair(const float* keys) const {
#if defined(HSR_AVX512)
        if constexpr (D > 0 && D % 2 == 0) {  // a register is two rows of a block
            __m512 first = _mm512_mul_ps(_mm512_loadu_ps(keys), rows[0]);
            __m512 second = _mm512_mul_ps(_mm512_loadu_ps(keys + stride()), rows[0]);
            for (int j = 1; j < D / 2; ++j) {
                first = _mm512_fmadd_ps(_mm512_loadu_ps(keys + 2 * j * kLanes), rows[j], first);
                second = _mm512_fmadd_ps(_mm512_loadu_ps(keys + stride() + 2 * j * kLanes), rows[j], second);
            }
            const __m512 sum =
                _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x44), _mm512_shuffle_f32x4(first, second, 0xee));
            return _mm512_cmp_ps_mask(sum, _mm512_set1_ps(limit), _CMP_NLT_UQ);
        }
#endif
        return not_below(score_block32<D>(keys, dim, query), limit) |
               not_below(score_block32<D>(keys + stride(), dim, query), limit) << kLanes;
    }
    // Appends those of four neighbouring blocks; writes four, says how many count.
    size_t append_open(const float* keys, uint8_t first, uint8_t* open) const {
#if defined(__AVX2__) && !defined(HSR_AVX512)
        __m256i through[4];
        for (int b = 0; b < 4; ++b)
            through[b] = _mm256_castps_si256(_mm256_cmp_ps((__m256)score_block32<D>(keys + b * stride(), dim, query),
                                                           _mm256_set1_ps(limit), _CMP_NLT_UQ));
        const __m256i bytes =
            _mm256_packs_epi16(_mm256_packs_epi32(through[0], through[1]), _mm256_packs_epi32(through[2], through[3]));
        // Four keys of each block in the lower half, four in the upper.
        const __m128i any = _mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        const __m128i none = _mm_cmpeq_epi32(any, _mm_setzero_si128());
        return append_numbers(unsigned(_mm_movemask_ps(_mm_castsi128_ps(none))) ^ 15, first, open);
#else
        size_t found = 0;
        for (int b = 0; b < 4; b += 2) {
            const unsigned bits = pair(keys + b * stride());
            open[found] = uint8_t(first + b);
            found += (bits & 0xff) != 0;
            open[found] = uint8_t(first + b + 1);
            found += bits >> kLanes != 0;
        }
        return found;
#endif
    }
};

template <int D>
inline unsigned without_excluded(const float* keys, int dim, const Search& search, unsigned mask) {
    for (int i = 0; i < search.exclusions; ++i)
        mask &= ~at_least(score_block<D>(keys, dim, search.excluded[i]), search.excluded_from[i]);
    return mask;
}

// emit(position of the first lane, scores, mask) for every block with a hit, and some without.
template <int D, class Emit>
inline void for_hits(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search, Emit emit) {
    const int64_t last = (end - 1) / kLanes;
    const int64_t stride = kLanes * (D ? D : dim);
    const double* const query = search.query;
    const double threshold = search.threshold;
    const bool exclusions = search.exclusions > 0;
    const auto decide = [&](int64_t block) {
        const float* keys = blocks + block * stride;
        const f64x8 scores = score_block<D>(keys, dim, query);
        unsigned mask = at_least(scores, threshold) & lanes_in_range(block, begin, end);
        if (exclusions && mask) mask = without_excluded<D>(keys, dim, search, mask);
        emit(block * kLanes, scores, mask);
    };
    int64_t block = begin / kLanes;
    if (!search.query32) {
        for (; block <= last; ++block) decide(block);
        return;
    }
    // First which blocks are open, then their scores: a branch on each mask would be mispredicted wherever hits are
    // neither rare nor dense.
    constexpr int64_t kChunk = 128;
    uint8_t open[kChunk + 4];
    const Screen<D> screen(search, dim);
    for (; block <= last; block += kChunk) {
        const int64_t count = last + 1 - block < kChunk ? last + 1 - block : kChunk;
        const float* keys = blocks + block * stride;
        size_t found = 0;
        int64_t b = 0;
        for (; b + 4 <= count; b += 4, keys += 4 * stride) found += screen.append_open(keys, uint8_t(b), open + found);
        for (; b < count; ++b, keys += stride) {
            open[found] = uint8_t(b);
            found += screen.opens(keys);
        }
        for (size_t i = 0; i < found; ++i) decide(block + open[i]);
    }
}

#if defined(HSR_AVX512)
// Writes 8 packed hits and returns how many of them count. No branch: where hits are dense, a branch on the mask
// is mispredicted every other block.
[[gnu::always_inline]] inline size_t pack_hits(int64_t first, const f64x8& scores, unsigned mask, const int32_t* ids,
                                               PackedHit* out) {
    const __m256i id = ids ? _mm256_maskz_loadu_epi32(__mmask8(mask), ids + first)
                           : _mm256_add_epi32(_mm256_set1_epi32(int(first)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i bits = _mm256_castps_si256(_mm512_cvtpd_ps((__m512d)scores));
    const __m512i packed =
        _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(id), 32), _mm512_cvtepu32_epi64(bits));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(__mmask8(mask), packed));
    return size_t(__builtin_popcount(mask));
}
#elif defined(__AVX2__)
// Lanes of four 64-bit numbers, as pairs of 32 bits, that bring those of a mask to the front.
alignas(32) constexpr int32_t kPacking[16][8] = {
    {0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}, {2, 3, 0, 1, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7},
    {4, 5, 0, 1, 2, 3, 6, 7}, {0, 1, 4, 5, 2, 3, 6, 7}, {2, 3, 4, 5, 0, 1, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7},
    {6, 7, 0, 1, 2, 3, 4, 5}, {0, 1, 6, 7, 2, 3, 4, 5}, {2, 3, 6, 7, 0, 1, 4, 5}, {0, 1, 2, 3, 6, 7, 4, 5},
    {4, 5, 6, 7, 0, 1, 2, 3}, {0, 1, 4, 5, 6, 7, 2, 3}, {2, 3, 4, 5, 6, 7, 0, 1}, {0, 1, 2, 3, 4, 5, 6, 7}};
[[gnu::always_inline]] inline size_t pack4(int64_t first, const f64x4& scores, unsigned mask, const int32_t* ids,
                                           PackedHit* out) {
    const __m128i id = ids ? _mm_loadu_si128((const __m128i*)(ids + first))
                           : _mm_add_epi32(_mm_set1_epi32(int(first)), _mm_setr_epi32(0, 1, 2, 3));
    const __m128i score = _mm_castps_si128(_mm256_cvtpd_ps((__m256d)scores));
    const __m256i packed = _mm256_set_m128i(_mm_unpackhi_epi32(score, id), _mm_unpacklo_epi32(score, id));
    const __m256i lanes = _mm256_load_si256((const __m256i*)kPacking[mask]);
    _mm256_storeu_si256((__m256i*)out, _mm256_permutevar8x32_epi32(packed, lanes));
    return size_t(__builtin_popcount(mask));
}
// Appends the ids and scores of a mask; writes four, says how many count.
[[gnu::always_inline]] inline size_t append_row4(int64_t first, const f64x4& scores, unsigned mask, int64_t* ids,
                                                 float* scores_out) {
    int32_t packed;
    __builtin_memcpy(&packed, kNumbers[mask], 4);
    const __m128i lanes = _mm_cvtsi32_si128(packed);
    _mm256_storeu_si256((__m256i*)ids, _mm256_add_epi64(_mm256_cvtepu8_epi64(lanes), _mm256_set1_epi64x(first)));
    _mm_storeu_ps(scores_out, _mm_permutevar_ps(_mm256_cvtpd_ps((__m256d)scores), _mm_cvtepu8_epi32(lanes)));
    return size_t(__builtin_popcount(mask));
}
[[gnu::always_inline]] inline size_t pack_hits(int64_t first, const f64x8& scores, unsigned mask, const int32_t* ids,
                                               PackedHit* out) {
    const size_t found = pack4(first, scores.low, mask & 15, ids, out);
    return found + pack4(first + 4, scores.high, mask >> 4, ids, out + found);
}
#else
[[gnu::always_inline]] inline size_t pack_hits(int64_t first, const f64x8& scores, unsigned mask, const int32_t* ids,
                                               PackedHit* out) {
    size_t found = 0;
    if (!mask) return 0;
    double lanes[kLanes];
    store(lanes, scores);
    for (; mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        const float score = float(lanes[lane]);
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
    for_hits<D>(blocks, dim, begin, end, search, [&](int64_t first, const f64x8& scores, unsigned mask) {
        out += pack_hits(first, scores, mask, ids, out);
    });
    return size_t(out - hits);
}

template <int D>
size_t scan_rows(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search, int64_t first_id,
                 int64_t* ids, float* scores_out) {
    size_t found = 0;
    if (begin >= end) return 0;
    for_hits<D>(blocks, dim, begin, end, search, [&](int64_t first, const f64x8& scores, unsigned mask) {
#if defined(HSR_AVX512)
        const __m512i id =
            _mm512_add_epi64(_mm512_set1_epi64(first_id + first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
        _mm512_mask_compressstoreu_epi64(ids + found, __mmask8(mask), id);
        _mm256_mask_compressstoreu_ps(scores_out + found, __mmask8(mask), _mm512_cvtpd_ps((__m512d)scores));
        found += size_t(__builtin_popcount(mask));
#elif defined(__AVX2__)
        found += append_row4(first_id + first, scores.low, mask & 15, ids + found, scores_out + found);
        found += append_row4(first_id + first + 4, scores.high, mask >> 4, ids + found, scores_out + found);
#else
        double lanes[kLanes];
        if (mask) store(lanes, scores);
        for (; mask; mask &= mask - 1, ++found) {
            const int lane = __builtin_ctz(mask);
            ids[found] = first_id + first + lane;
            scores_out[found] = float(lanes[lane]);
        }
#endif
    });
    return found;
}

// (a b) >> 16 of signed 16-bit lanes, rounded down.
template <class V>
inline V high_products(const V& a, const V& b) {
    if constexpr (Shape<V>::pair) {
        return {high_products(a.low, b.low), high_products(a.high, b.high)};
    } else {
#if defined(__AVX2__)
        return (V)_mm256_mulhi_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
        return (V)_mm_mulhi_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)  // the doubled product's high half, halved
        return (V)vshrq_n_s16(vqdmulhq_s16((int16x8_t)a, (int16x8_t)b), 1);
#else
        V product;
        for (int i = 0; i < Shape<V>::lanes; ++i) product[i] = int16_t(int32_t(a[i]) * b[i] >> 16);
        return product;
#endif
    }
}

// Appends those of the four blocks from `first` on with a sum above the limit, a lane a key. Without a branch: which
// stay open cannot be predicted. Writes four, says how many count.
inline size_t append_open(const i16x16& low, const i16x16& high, int16_t limit, int32_t first, int32_t* blocks) {
#if defined(__AVX2__)
    const __m256i most = _mm256_set1_epi16(limit);
    const __m256i above =
        _mm256_packs_epi16(_mm256_cmpgt_epi16((__m256i)low, most), _mm256_cmpgt_epi16((__m256i)high, most));
    const __m256i none = _mm256_cmpeq_epi64(_mm256_permute4x64_epi64(above, 0xd8), _mm256_setzero_si256());
    const unsigned open = unsigned(_mm256_movemask_pd(_mm256_castsi256_pd(none))) ^ 15;
    int32_t packed;
    __builtin_memcpy(&packed, kNumbers[open], 4);
    _mm_storeu_si128((__m128i*)blocks,
                     _mm_add_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(packed)), _mm_set1_epi32(first)));
    return size_t(__builtin_popcount(open));
#else
    size_t found = 0;
    for (int b = 0; b < 4; ++b) {
        const auto above = (b & 1 ? upper(b & 2 ? high : low) : lower(b & 2 ? high : low)) > limit;
        uint64_t lanes[2];
        __builtin_memcpy(lanes, &above, sizeof lanes);
        blocks[found] = first + b;
        found += (lanes[0] | lanes[1]) != 0;
    }
    return found;
#endif
}

// What codes must add up to for a key to stay. The score of a key of leaf c is at most shift + <q, m> +
// sum_j w_j (code_j + 0.5) + error S + slack, with w_j = q_j h_j / 127.5, S = sum_j |q_j| h_j and the leaf's box m +-
// h. The slack covers the rounding of these sums in float64: they have at most 6 d + 21 roundings of terms of its unit.
// So the code of a key in the half-space has sum_j w_j code_j >= least.
// Weights are integers W_j, g w_j with g = 127.5 kUnits / S cut to an integer, so that their sizes add up to at most
// kUnits, and a product is P_j = floor(code_j W_j / 256). So sum_j P_j fits 16 bits, and it is above sum_j g w_j code_j
// / 256 - 1.5 d: the floor loses less than 1, the cut of the weight less than 128 / 256. Two more units are more than
// float64 loses of numbers below 2^15 and the limit loses when it is cut. Where S is zero, or too small or large
// for g, the limit lets everything through.
template <int D>
size_t open_blocks(const int8_t* codes, const float* volumes, int dim, const HalfSpace& half, double error,
                   unsigned leaves, const int32_t* begin, const int32_t* end, int32_t* blocks) {
    constexpr double kUnits = 32760, kLowest = -32768, kHighest = 32767;
    const int d = D ? D : dim, pairs = (d + 1) / 2;
    f64x8 products[D ? D : kMostCoded];  // q_j h_j
    f64x8 middle = {}, width = {}, sum = {};
    for (int j = 0; j < d; ++j) {
        const f64x8 h = load8(volumes + (d + j) * kLanes);
        products[j] = h * half.query[j];
        middle += load8(volumes + j * kLanes) * half.query[j];
        width += h * half.magnitude[j];
        sum += products[j];
    }
    const auto decided = (width >= 1e-30) & (width < 1e30);
    const f64x8 none = {}, scale = select(decided, kUnits / width, none);
    int32_t weights[(D ? D + 1 : kMostCoded) * kLanes], limits[kLanes];  // a weight twice
    for (int j = 0; j < d; ++j) {
        const auto cut = as<u32x8>(cut8(products[j] * scale)) & 0xffffu;
        store(weights + j * kLanes, cut | cut << 16);
    }
    if (d & 1) store(weights + d * kLanes, i32x8{});
    const f64x8 least = half.threshold - half.shift - middle - sum * (0.5 / kCodeCentre) - error * width - half.slack;
    f64x8 limit = least * scale * (kCodeCentre / 256) - (1.5 * d + 2);
    const f64x8 lowest = none + kLowest, highest = none + kHighest;
    limit = select(decided & (limit >= kLowest), limit, lowest);
    store(limits, cut8(select(limit < kHighest, limit, highest)));
    size_t found = 0;
    for (; leaves; leaves &= leaves - 1) {
        const int c = __builtin_ctz(leaves);
        const int8_t* row = codes + int64_t(begin[c]) * 2 * pairs;
        const size_t before = found;
        for (int32_t first = begin[c]; first < end[c]; first += kCodeRun) {
            i16x16 low = {}, high = {};
            for (int j = 0; j < pairs; ++j, row += 2 * kCodeRun) {
                const i16x16 even = as<i16x16>(splat_to<i32x8>(weights[2 * j * kLanes + c]));
                const i16x16 odd = as<i16x16>(splat_to<i32x8>(weights[(2 * j + 1) * kLanes + c]));
                const u16x16 a = load<u16x16>(row), b = load<u16x16>(row + kCodeRun);
                low += high_products(as<i16x16>(a << uint16_t(8)), even) +
                       high_products(as<i16x16>(a & uint16_t(0xff00)), odd);
                high += high_products(as<i16x16>(b << uint16_t(8)), even) +
                        high_products(as<i16x16>(b & uint16_t(0xff00)), odd);
            }
            found += append_open(low, high, int16_t(limits[c]), first / kLanes, blocks + found);
        }
        // Behind the last key of a leaf there are others or none.
        while (found > before && blocks[found - 1] * kLanes >= end[c]) --found;
    }
    return found;
}

// The hits of single blocks.
template <int D>
size_t scan_blocks(const float* blocks, int dim, const int32_t* list, size_t count, const Search& search,
                   const int32_t* ids, PackedHit* hits) {
    PackedHit* out = hits;
    for (size_t i = 0; i < count; ++i) {
        const f64x8 scores = score_block<D>(blocks + int64_t(list[i]) * kLanes * (D ? D : dim), dim, search.query);
        out += pack_hits(int64_t(list[i]) * kLanes, scores, at_least(scores, search.threshold), ids, out);
    }
    return size_t(out - hits);
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
        store(scores + (first - begin), score_block<D>(blocks + first * (D ? D : dim), dim, query));
    }
}

inline f64x8 load8(const double* from) { return load<f64x8>(from); }

// A NaN, from an infinite radius times 0, stays one, and a cell with one is neither inside nor outside.
template <int D>
inline void limits(const float* volumes, int dim, const HalfSpace& half, const FrameCells* frame, f64x8& low,
                   f64x8& high) {
    const int d = D ? D : dim;
    const float* widths = volumes + d * kLanes;
    f64x8 centre = load8(volumes) * half.query[0], box = load8(widths) * half.magnitude[0];
    for (int j = 1; j < d; ++j) {
        centre += load8(volumes + j * kLanes) * half.query[j];
        box += load8(widths + j * kLanes) * half.magnitude[j];
    }
    const f64x8 ball = load8(widths + d * kLanes) * half.norm;
    const f64x8 spread = select(ball < box, ball, box);
    low = half.shift + centre - spread - half.slack;
    high = half.shift + centre + spread + half.slack;
    if (D > 3 || !frame) return;
    const double* boxes = frame->boxes;
    const f64x8 margin = load8(boxes + 2 * d * kLanes) * half.norm + half.slack;
    f64x8 least = frame->at_apex - margin, most = frame->at_apex + margin;
    for (int i = 0; i < d; ++i) {
        const f64x8 a = load8(boxes + i * kLanes) * frame->slope[i];
        const f64x8 b = load8(boxes + (d + i) * kLanes) * frame->slope[i];
        least += select(a < b, a, b);
        most += select(a < b, b, a);
    }
    low = select(least > low, least, low);
    high = select(most < high, most, high);
}

template <int D>
void bounds(const float* volumes, int dim, const HalfSpace& half, const FrameCells* frame, double* low, double* high) {
    f64x8 least, most;
    limits<D>(volumes, dim, half, frame, least, most);
    store(low, least);
    store(high, most);
}

template <int D>
unsigned classify(const float* volumes, int dim, const HalfSpace& half, const FrameCells* frame) {
    f64x8 low, high;
    limits<D>(volumes, dim, half, frame, low, high);
    const unsigned inside = at_least(low, half.threshold), outside = below(high, half.threshold);
    return inside | (~(inside | outside) & 0xff) << kLanes;
}

unsigned reached(const float* blocks, const double* query, double threshold) {
    unsigned found = 0;
    for (int set = 0; set < 2; ++set, blocks += 4 * kLanes) {
        const unsigned all = below(score_block<2>(blocks, 2, query), threshold) &
                             below(score_block<2>(blocks + 2 * kLanes, 2, query), threshold);
        found |= unsigned(all != 0xff) << set;
    }
    return found;
}

size_t sweep(const float* blocks, const uint64_t* lanes, Sweep& sweep, int64_t most, const Search& search,
             const int32_t* ids, PackedHit* hits) {
    constexpr uint64_t kBytes = 0x0101010101010101u;
    PackedHit* out = hits;
    uint64_t right = sweep.closed[0], left = sweep.closed[1], reported = sweep.reported;
    const auto visit = [&](int64_t block, unsigned on_right) {
        const f64x8 scores = score_block<2>(blocks + block * 2 * kLanes, 2, search.query);
        const unsigned found = at_least(scores, search.threshold), outside = below(scores, sweep.closing);
        const uint64_t layers = lanes[block];
        reported |= layers & found * kBytes;
        right |= layers & (outside & on_right) * kBytes;
        left |= layers & (outside & ~on_right) * kBytes;
        out += pack_hits(block * kLanes, scores, found, ids, out);
    };
    if (most > sweep.unseen) most = sweep.unseen;
    const int64_t allowed = most;
    int64_t block = sweep.next[0];
    for (; most && Sweep::some_byte_is_zero(right); --most) {
        visit(block, sweep.right);
        sweep.right = 0xff;
        if (++block == sweep.end) block = sweep.begin;
    }
    sweep.next[0] = block;
    block = sweep.next[1];
    for (; most && Sweep::some_byte_is_zero(left); --most) {
        visit(block, 0);
        if (block-- == sweep.begin) block = sweep.end - 1;
    }
    sweep.next[1] = block;
    sweep.unseen -= allowed - most;
    sweep.closed[0] = right;
    sweep.closed[1] = left;
    sweep.reported = reported;
    return size_t(out - hits);
}

size_t spread(PackedHit* hits, size_t n, int shift, size_t words, uint64_t* seen, uint32_t* before, int64_t first_id,
              int64_t* ids, float* scores, PackedHit* rest) {
    size_t placed = n, left = 0;
    for (size_t i = 0; i < placed; ++i) {
        const PackedHit hit = hits[i];
        const uint64_t bucket = hit >> 32 >> shift, bit = uint64_t(1) << (bucket & 63);
        const uint64_t old = seen[bucket >> 6];
        if (__builtin_expect((old & bit) != 0, 0)) {
            rest[left++] = hit;
            hits[i--] = hits[--placed];
            continue;
        }
        seen[bucket >> 6] = old | bit;
    }
    uint32_t total = 0;
    for (size_t w = 0; w < words; ++w) {
        before[w] = total;
        total += uint32_t(__builtin_popcountll(seen[w]));
    }
    for (size_t i = 0; i < placed; ++i) {
        const PackedHit hit = hits[i];
        const uint64_t bucket = hit >> 32 >> shift, lower = (uint64_t(1) << (bucket & 63)) - 1;
        const size_t rank = before[bucket >> 6] + size_t(__builtin_popcountll(seen[bucket >> 6] & lower));
        const uint32_t bits = uint32_t(hit);
        ids[rank] = first_id + int64_t(hit >> 32);
        __builtin_memcpy(scores + rank, &bits, 4);
    }
    __builtin_memset(seen, 0, words * sizeof *seen);
    return left;
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
} size_t any_open_blocks(const int8_t* codes, const float* volumes, int dim, const HalfSpace& half, double error,
                         unsigned leaves, const int32_t* begin, const int32_t* end, int32_t* blocks){
#define HSR_ARGUMENTS (codes, volumes, dim, half, error, leaves, begin, end, blocks)
    HSR_BY_DIMENSION(open_blocks)
#undef HSR_ARGUMENTS
} size_t any_scan_blocks(const float* blocks, int dim, const int32_t* list, size_t count, const Search& search,
                         const int32_t* ids, PackedHit* hits){
#define HSR_ARGUMENTS (blocks, dim, list, count, search, ids, hits)
    HSR_BY_DIMENSION(scan_blocks)
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
void any_bounds(const float* volumes, int dim, const HalfSpace& half, const FrameCells* frame, double* low,
                double* high) {
#define HSR_ARGUMENTS (volumes, dim, half, frame, low, high)
    HSR_BY_DIMENSION(bounds)
#undef HSR_ARGUMENTS
}
unsigned any_classify(const float* volumes, int dim, const HalfSpace& half, const FrameCells* frame) {
#define HSR_ARGUMENTS (volumes, dim, half, frame)
    HSR_BY_DIMENSION(classify)
#undef HSR_ARGUMENTS
}
#undef HSR_BY_DIMENSION

}  // namespace

#define HSR_TREE_QUOTE(x) #x
#define HSR_TREE_NAME(x) HSR_TREE_QUOTE(x)
namespace HSR_TREE_LEVEL {
const Kernels& table() {
    static const Kernels kernels{HSR_TREE_NAME(HSR_TREE_LEVEL),
                                 any_scan,
                                 any_scan_rows,
                                 any_open_blocks,
                                 any_scan_blocks,
                                 any_count,
                                 any_score,
                                 any_bounds,
                                 any_classify,
                                 reached,
                                 sweep,
                                 spread};
    return kernels;
}
}  // namespace HSR_TREE_LEVEL

}  // namespace hsr::tree

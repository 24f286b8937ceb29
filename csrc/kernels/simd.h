// The operations on lanes that differ by level, or that every kernel needs. Private to loops.h, in its anonymous
// namespace.

// a > b ? a : b, so b where one is NaN. The instructions by name: compilers make a comparison and a choice of it.
#if defined(HSR_AVX512)
inline f32x16 max_of(const f32x16& a, const f32x16& b) { return (f32x16)_mm512_max_ps((__m512)a, (__m512)b); }
inline f32x16 min_of(const f32x16& a, const f32x16& b) { return (f32x16)_mm512_min_ps((__m512)a, (__m512)b); }
inline i32x16 max_of(const i32x16& a, const i32x16& b) { return (i32x16)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline i32x16 min_of(const i32x16& a, const i32x16& b) { return (i32x16)_mm512_min_epi32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
inline f32x8 max_of(const f32x8& a, const f32x8& b) { return (f32x8)_mm256_max_ps((__m256)a, (__m256)b); }
inline f32x8 min_of(const f32x8& a, const f32x8& b) { return (f32x8)_mm256_min_ps((__m256)a, (__m256)b); }
inline i32x8 max_of(const i32x8& a, const i32x8& b) { return (i32x8)_mm256_max_epi32((__m256i)a, (__m256i)b); }
inline i32x8 min_of(const i32x8& a, const i32x8& b) { return (i32x8)_mm256_min_epi32((__m256i)a, (__m256i)b); }
#endif
template <class V>
inline V max_of(const V& a, const V& b) {
    if constexpr (Shape<V>::pair)
        return {max_of(a.low, b.low), max_of(a.high, b.high)};
    else
        return select(a > b, a, b);
}
template <class V>
inline V min_of(const V& a, const V& b) {
    if constexpr (Shape<V>::pair)
        return {min_of(a.low, b.low), min_of(a.high, b.high)};
    else
        return select(a < b, a, b);
}
inline f32x16 abs_of(f32x16 a) { return as<f32x16>(as<i32x16>(a) & 0x7fffffff); }

inline float sum_of(Vector<float, 4> x) { return (x[0] + x[1]) + (x[2] + x[3]); }
inline float max_of_lanes(Vector<float, 4> x) {
    const float even = x[0] > x[2] ? x[0] : x[2], odd = x[1] > x[3] ? x[1] : x[3];
    return even > odd ? even : odd;
}
inline float sum_of(f32x8 x) { return sum_of(lower(x) + upper(x)); }
inline float max_of_lanes(f32x8 x) { return max_of_lanes(max_of(lower(x), upper(x))); }
inline float sum_of(f32x16 x) { return sum_of(lower(x) + upper(x)); }
inline float max_of_lanes(f32x16 x) { return max_of_lanes(max_of(lower(x), upper(x))); }

template <class Bits>
inline auto from_bfloat16(const Bits& bits) {
    constexpr int lanes = Shape<Bits>::lanes;
    return as<Vector<float, lanes>>(convert<Vector<uint32_t, lanes>>(bits) << 16);
}
// Register by register from memory: widening half a register in place costs several shuffles.
template <class V>
inline V load_bfloat16(const void* from) {
    if constexpr (Shape<V>::pair) {
        using Half = typename Shape<V>::Half;
        return {load_bfloat16<Half>(from), load_bfloat16<Half>((const uint16_t*)from + Shape<Half>::lanes)};
    } else {
#if defined(__AVX2__) && !defined(HSR_AVX512)
        static_assert(Shape<V>::lanes == 8, "one register");
        return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
        return from_bfloat16(load<Vector<uint16_t, Shape<V>::lanes>>(from));
#endif
    }
}
// Smallest bfloat16 >= x, for x >= 0 (and +inf).
inline uint16_t bfloat16_up(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return uint16_t((bits + 0xffffu) >> 16);
}
inline float bfloat16_value(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float x;
    __builtin_memcpy(&x, &wide, 4);
    return x;
}

// ---- the operations that differ by level ----

#if defined(HSR_AVX512)

inline uint32_t mask_ge(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
inline uint32_t mask_not_less(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ); }
inline uint32_t mask_positive(i32x16 x) { return _mm512_cmpgt_epi32_mask((__m512i)x, _mm512_setzero_si512()); }
inline f32x16 keep_lanes(uint32_t mask, f32x16 x) { return (f32x16)_mm512_maskz_mov_ps((__mmask16)mask, (__m512)x); }
// What a comparison says of each lane. Zero elsewhere: `where` it holds, `except` where it holds.
using Truth = __mmask16;
inline Truth truth_ge(f32x16 a, f32x16 b) { return Truth(mask_ge(a, b)); }
inline Truth truth_less(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
inline uint32_t bits(Truth truth) { return truth; }
inline f32x16 where(Truth truth, f32x16 x) { return keep_lanes(truth, x); }
inline f32x16 except(Truth truth, f32x16 x) { return keep_lanes(Truth(~truth), x); }
inline Truth without(Truth a, Truth b) { return Truth(a & ~b); }
inline Truth both(Truth a, Truth b) { return Truth(a & b); }
inline Truth either(Truth a, Truth b) { return Truth(a | b); }
inline Truth truth_of(uint32_t mask) { return Truth(mask); }
// Lanes under the mask, moved together; writes 16 lanes (a full store is faster than a masked one).
inline void compress(uint32_t mask, i32x16 values, uint32_t* out) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32((__mmask16)mask, (__m512i)values));
}
inline f32x16 from_float16(u16x16 bits) { return (f32x16)_mm512_cvtph_ps((__m256i)bits); }
inline i32x16 widen_bytes(u8x16 bytes) { return (i32x16)_mm512_cvtepu8_epi32((__m128i)bytes); }
inline u8x16 unsigned_bytes(i32x16 x) { return convert<u8x16>(x); }
inline i8x16 signed_bytes(i32x16 x) { return convert<i8x16>(x); }
// The lanes of x added up until they fit one register.
using Folded = f32x16;
inline Folded folded(f32x16 x) { return x; }
// out[i] = the sum of the lanes of x[i]: each round halves the number of vectors.
inline void sums_of_4(const Folded* x, float* out) {
    __m512 pairs[2];
    for (int i = 0; i < 2; ++i) {  // within 128 bits: lanes of x[2i] and x[2i + 1] in turn
        const __m512 u = (__m512)x[2 * i], v = (__m512)x[2 * i + 1];
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(u, v), _mm512_unpackhi_ps(u, v));
    }
    const __m512d u = _mm512_castps_pd(pairs[0]), v = _mm512_castps_pd(pairs[1]);
    const __m512 all =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(u, v)), _mm512_castpd_ps(_mm512_unpackhi_pd(u, v)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#else

using Folded = f32x8;
inline Folded folded(f32x16 x) { return lower(x) + upper(x); }
#if defined(__AVX2__)
inline void sums_of_4(const Folded* x, float* out) {
    const __m256 sums =
        _mm256_hadd_ps(_mm256_hadd_ps((__m256)x[0], (__m256)x[1]), _mm256_hadd_ps((__m256)x[2], (__m256)x[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
#else
template <class V>
inline void sums_of_4(const V* x, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = sum_of(x[i]);
}
#endif
inline void sums_of_4(const f32x16* x, float* out) {
    const Folded halves[4] = {folded(x[0]), folded(x[1]), folded(x[2]), folded(x[3])};
    sums_of_4(halves, out);
}

template <class V>
inline uint32_t mask_ge(const V& a, const V& b) {
    return bits_of(a >= b);
}
inline uint32_t mask_not_less(f32x16 a, f32x16 b) { return bits_of(~(a < b)); }
inline uint32_t mask_positive(i32x16 x) { return bits_of(x > splat(0)); }
using Truth = i32x16;
inline Truth truth_of(uint32_t mask) {
    alignas(64) static const int32_t bit[16] = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                                1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    const i32x16 own = load<i32x16>(bit);
    return (splat(int32_t(mask)) & own) == own;
}
inline Truth truth_ge(f32x16 a, f32x16 b) { return a >= b; }
inline Truth truth_less(f32x16 a, f32x16 b) { return a < b; }
inline uint32_t bits(Truth truth) { return bits_of(truth); }
inline f32x16 where(Truth truth, f32x16 x) { return as<f32x16>(as<i32x16>(x) & truth); }
inline f32x16 except(Truth truth, f32x16 x) { return as<f32x16>(as<i32x16>(x) & ~truth); }
inline Truth without(Truth a, Truth b) { return a & ~b; }
inline Truth both(Truth a, Truth b) { return a & b; }
inline Truth either(Truth a, Truth b) { return a | b; }
inline f32x16 keep_lanes(uint32_t mask, f32x16 x) { return where(truth_of(mask), x); }
#if defined(__AVX2__)
// For each mask of eight lanes, the lanes under it, in order.
struct LaneLists {
    uint8_t list[256][8];
    constexpr LaneLists() : list() {
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, at = 0; lane < 8; ++lane)
                if (mask >> lane & 1) list[mask][at++] = uint8_t(lane);
    }
};
constexpr LaneLists kLaneLists;
inline void compress(uint32_t mask, i32x16 values, uint32_t* out) {
    for (int half = 0; half < 2; ++half, mask >>= 8) {
        const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kLaneLists.list[mask & 255]));
        _mm256_storeu_si256((__m256i*)out,
                            _mm256_permutevar8x32_epi32((__m256i)(half ? values.high : values.low), order));
        out += __builtin_popcount(mask & 255);
    }
}
inline i32x16 widen_bytes(u8x16 bytes) {
    return {(i32x8)_mm256_cvtepu8_epi32((__m128i)bytes),
            (i32x8)_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)bytes, 8))};
}
inline __m128i narrow(const i32x16& x, bool with_sign) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x.low, (__m256i)x.high), 0xd8);
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    return with_sign ? _mm_packs_epi16(low, high) : _mm_packus_epi16(low, high);
}
inline u8x16 unsigned_bytes(i32x16 x) { return (u8x16)narrow(x, false); }
inline i8x16 signed_bytes(i32x16 x) { return (i8x16)narrow(x, true); }
inline f32x16 from_float16(u16x16 bits) {
    return {(f32x8)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)bits)),
            (f32x8)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)bits, 1))};
}
#else
inline void compress(uint32_t mask, i32x16 values, uint32_t* out) {
    int32_t lanes[16];
    store(lanes, values);
    for (; mask; mask &= mask - 1) *out++ = uint32_t(lanes[__builtin_ctz(mask)]);
}
inline i32x16 widen_bytes(u8x16 bytes) { return convert<i32x16>(bytes); }
inline u8x16 unsigned_bytes(i32x16 x) { return convert<u8x16>(x); }
inline i8x16 signed_bytes(i32x16 x) { return convert<i8x16>(x); }
inline f32x16 from_float16(u16x16 bits) {
    uint16_t h[16];
    float f[16];
    store(h, bits);
    for (int i = 0; i < 16; ++i) {
        // Exponent and mantissa moved to float32 place, then times 2^112: exact for normal and
        // subnormal halves; infinity and NaN get the largest exponent back.
        uint32_t magnitude = uint32_t(h[i] & 0x7fffu) << 13, sign = uint32_t(h[i] & 0x8000u) << 16;
        float x;
        __builtin_memcpy(&x, &magnitude, 4);
        x *= 5.192296858534828e33f;
        uint32_t y;
        __builtin_memcpy(&y, &x, 4);
        if ((h[i] & 0x7c00u) == 0x7c00u) y |= 0x7f800000u;
        y |= sign;
        __builtin_memcpy(&f[i], &y, 4);
    }
    return load<f32x16>(f);
}
#endif
#endif

// ---- two vectors at once: what needs several instructions for one needs as many for both

#if defined(__AVX2__) && !defined(HSR_AVX512)
// 32 numbers as signed bytes, but in fours 0, 2, 4, 6, 1, 3, 5, 7.
inline __m256i packed_bytes(const i32x16& first, const i32x16& second) {
    const auto words = [](const i32x16& x) { return _mm256_packs_epi32((__m256i)x.low, (__m256i)x.high); };
    return _mm256_packs_epi16(words(first), words(second));
}
inline __m256i in_order(__m256i packed) {
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
// The bits of both, in an order of the level's own: those under kFirstOfTwo are of the first.
constexpr uint32_t kFirstOfTwo = 0x00ff00ff;
inline uint32_t bits_of_two(const Truth& first, const Truth& second) {
    return uint32_t(_mm256_movemask_epi8(packed_bytes(first, second)));
}
// Both as signed bytes, each to a place of its own.
inline void store_bytes_of_two(const i32x16& first, const i32x16& second, int8_t* to_first, int8_t* to_second) {
    const __m256i both = in_order(packed_bytes(first, second));
    _mm_storeu_si128((__m128i*)to_first, _mm256_castsi256_si128(both));
    _mm_storeu_si128((__m128i*)to_second, _mm256_extracti128_si256(both, 1));
}
// Of 32 numbers, a bit for each that is positive.
inline uint32_t positive_of_32(const void* from) {
    const auto positive = [&](int i) { return load<i32x16>((const int32_t*)from + i) > splat(0); };
    return uint32_t(_mm256_movemask_epi8(in_order(packed_bytes(positive(0), positive(16)))));
}
#else
constexpr uint32_t kFirstOfTwo = 0xffff;
inline uint32_t bits_of_two(const Truth& first, const Truth& second) { return bits(first) | bits(second) << 16; }
inline void store_bytes_of_two(const i32x16& first, const i32x16& second, int8_t* to_first, int8_t* to_second) {
    store(to_first, signed_bytes(first));
    store(to_second, signed_bytes(second));
}
inline uint32_t positive_of_32(const void* from) {
    return mask_positive(load<i32x16>(from)) | mask_positive(load<i32x16>((const int32_t*)from + 16)) << 16;
}
#endif

// exp(x) = 2^n 2^f with x log2(e) = n + f, |f| <= 1/2; relative error below 2e-7 (1 + |x|). Above 88 it
// saturates. Below -87 it is 0 or, on AVX-512, the subnormal number. 2^f: minimax polynomial of degree 5.
inline f32x16 exp2_fraction(f32x16 f) {
    f32x16 p = f * 1.32764702e-3f + 9.67554189e-3f;
    p = p * f + 5.55071346e-2f;
    p = p * f + 0.240221202f;
    p = p * f + 0.693146944f;
    return p * f + 1.00000012f;
}

#if defined(HSR_AVX512)
inline f32x16 exp_of(f32x16 x) {
    const f32x16 t = min_of(x, splat(88.0f)) * 1.44269504088896341f;
    const __m512 n = _mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (f32x16)_mm512_scalef_ps((__m512)exp2_fraction(t - (f32x16)n), n);  // of -inf, where t - n is none: 0
}
// exp(x - reference), from above by at most 0.4 %: 2^f on [0, 1) by a quadratic raised above it.
inline f32x16 exp_above(f32x16 x, float reference) {
    const f32x16 t = (x - reference) * 1.44269504f;
    const f32x16 f = (f32x16)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF);
    return (f32x16)_mm512_scalef_ps((__m512)((f * 0.337829f + 0.658884f) * f + 1.003626f), (__m512)t);
}
#else
inline f32x16 exp_of(f32x16 x) {
    const i32x16 small = x < splat(-87.0f);
    const f32x16 t = select(small, f32x16{}, min_of(x, splat(88.0f)) * 1.44269504088896341f);
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const f32x16 shifted = t + magic;
    const f32x16 p = exp2_fraction(t - (shifted - magic));
    return select(small, f32x16{}, as<f32x16>(as<i32x16>(p) + (as<i32x16>(shifted) << 23)));
}
inline f32x16 exp_above(f32x16 x, float reference) { return exp_of(x - reference) * 1.0001f; }
#endif

// exp(x - reference), or 2^(x - reference), from above by at most 6.2 %: 2^n (1 + f) in place of 2^(n + f), made from
// its bits in one multiply-add. Below -87 nats it is 0 or subnormal; x must be at most 80 nats above the reference.
template <class Unit>
struct LineAbove {
    static constexpr float kPerUnit = Unit::kPowers * 8388608.0f;
    float start;
    LineAbove() = default;
    // In units of the last place of the exponent's bits: 256 + 4 |reference| pay for the roundings of the constant, of
    // `start`, of the product (where it is rounded) and of the sum, each at most 64 + |reference|.
    static double start_at(double reference) {
        return 127.0 * 8388608.0 + 256.0 + 4.0 * __builtin_fabs(reference) - reference * double(kPerUnit);
    }
    explicit LineAbove(float reference) : start(float(start_at(double(reference)))) {}
    template <class V>
    V operator()(const V& x) const {
        return weight(x * kPerUnit + start);
    }
    template <class V>
    static V weight(const V& bits) {
        return as<V>(convert<Vector<int32_t, Shape<V>::lanes>>(max_of(bits, V{})));
    }
};
struct Nats {
    static constexpr float kPowers = 1.44269504f;
};
struct PowersOfTwo {
    static constexpr float kPowers = 1.0f;
};
using CoarseExp = LineAbove<Nats>;
using PowerAbove = LineAbove<PowersOfTwo>;

inline f32x16 load_row(Dtype dtype, const void* row, int at) {
    if (dtype == Dtype::float32) return load<f32x16>((const float*)row + at);
    if (dtype == Dtype::bfloat16) return load_bfloat16<f32x16>((const uint16_t*)row + at);
    return from_float16(load<u16x16>((const uint16_t*)row + at));
}
// The last, partial sixteen of a row; lanes past the end are zero.
inline f32x16 load_row_part(Dtype dtype, const void* row, int at, int lanes) {
    if (dtype == Dtype::float32) {
        f32x16 x = {};
        __builtin_memcpy(&x, (const float*)row + at, size_t(lanes) * 4);
        return x;
    }
    u16x16 bits = {};
    __builtin_memcpy(&bits, (const uint16_t*)row + at, size_t(lanes) * 2);
    return dtype == Dtype::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

// Two bfloat16 numbers stand in 32 bits: as float32, the lower one is a shift and the upper one a mask, half the work
// of widening them in order. So 32 coordinates are taken apart into the even and the odd ones, and put together again.
struct Halves {
    f32x16 even, odd;
};
inline Halves bfloat16_halves(const void* from) {
    const u32x16 both = load<u32x16>(from);
    return {as<f32x16>(both << 16), as<f32x16>(both & 0xffff0000u)};
}
inline Halves take_apart(const float* x) {
#if defined(HSR_AVX512)
    const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    const __m512i even = _mm512_slli_epi32((__m512i)lane_numbers(), 1);
    return {(f32x16)_mm512_permutex2var_ps(low, even, high),
            (f32x16)_mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high)};
#else
    float even[16], odd[16];
    for (int i = 0; i < 16; ++i) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
    return {load<f32x16>(even), load<f32x16>(odd)};
#endif
}
inline void put_together(const Halves& halves, float* x) {
#if defined(HSR_AVX512)
    const __m512i lane = (__m512i)lane_numbers();
    const __m512i half = _mm512_srli_epi32(lane, 1);  // 0 0 1 1 ..., from the odd ones in every other lane
    const __m512i from = _mm512_or_si512(half, _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(1)), 4));
    _mm512_storeu_ps(x, _mm512_permutex2var_ps((__m512)halves.even, from, (__m512)halves.odd));
    _mm512_storeu_ps(x + 16, _mm512_permutex2var_ps((__m512)halves.even, _mm512_add_epi32(from, _mm512_set1_epi32(8)),
                                                    (__m512)halves.odd));
#else
    float even[16], odd[16];
    store(even, halves.even);
    store(odd, halves.odd);
    for (int i = 0; i < 16; ++i) x[2 * i] = even[i], x[2 * i + 1] = odd[i];
#endif
}

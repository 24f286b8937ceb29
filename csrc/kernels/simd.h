// Sixteen lanes, written with the vector extensions of GCC and Clang: the compiler lowers them to whatever
// the level has. Only four operations differ by level: the 8-bit dot product, compress-store, float16, mask.
// No include guard games: this header is private to loops.h and lives in its anonymous namespace.

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int8_t i8x8 __attribute__((vector_size(8)));

template <class V>
inline V load(const void* from) {
    V value;
    __builtin_memcpy(&value, from, sizeof(V));
    return value;
}
template <class V>
inline void store(void* to, const V& value) {
    __builtin_memcpy(to, &value, sizeof(V));
}
inline f32x16 splat(float x) { return x - f32x16{}; }
inline i32x16 splat(int32_t x) { return x - i32x16{}; }

inline f32x16 max_of(f32x16 a, f32x16 b) { return a > b ? a : b; }
inline f32x16 min_of(f32x16 a, f32x16 b) { return a < b ? a : b; }
inline f32x16 abs_of(f32x16 a) { return (f32x16)((i32x16)a & 0x7fffffff); }
inline f32x16 to_float16lanes(i32x16 x) { return __builtin_convertvector(x, f32x16); }

#if defined(__AVX512F__)
inline float sum_of(f32x16 x) { return _mm512_reduce_add_ps((__m512)x); }
inline float max_of_lanes(f32x16 x) { return _mm512_reduce_max_ps((__m512)x); }
#else
inline float sum_of(f32x16 x) {
    float lanes[16];
    store(lanes, x);
    float s[4] = {0, 0, 0, 0};
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 4; ++j) s[j] += lanes[i + j];
    return (s[0] + s[1]) + (s[2] + s[3]);
}
inline float max_of_lanes(f32x16 x) {
    f32x8 eights[2];
    __builtin_memcpy(eights, &x, 64);
    const f32x8 eight = eights[0] > eights[1] ? eights[0] : eights[1];
    float lanes[8];
    store(lanes, eight);
    for (int half = 4; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}
#endif

inline f32x16 from_bfloat16(u16x16 bits) { return (f32x16)(__builtin_convertvector(bits, u32x16) << 16); }
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

#if defined(__AVX512VNNI__)

inline i32x16 dot4(i32x16 sum, u8x64 codes, int32_t digits) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(digits));
}
// As dot4, for codes of 8 bits.
inline i32x16 dot4_byte(i32x16 sum, u8x64 codes, int32_t digits) { return dot4(sum, codes, digits); }
inline uint32_t mask_ge(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
inline uint32_t mask_not_less(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ); }
inline f32x16 keep_lanes(uint32_t mask, f32x16 x) { return (f32x16)_mm512_maskz_mov_ps((__mmask16)mask, (__m512)x); }
// Lanes under the mask, moved together; writes 16 lanes (a full store is faster than a masked one).
inline void compress(uint32_t mask, i32x16 values, uint32_t* out) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32((__mmask16)mask, (__m512i)values));
}
inline f32x16 from_float16(u16x16 bits) { return (f32x16)_mm512_cvtph_ps((__m256i)bits); }
inline i32x16 widen_bytes(u8x16 bytes) { return (i32x16)_mm512_cvtepu8_epi32((__m128i)bytes); }
inline u8x64 low_nibbles(u8x64 x) { return x & (uint8_t)0x0f; }
// High nibbles in place, 16 times too large (kHighShift = 4): saves the shift in the scan.
constexpr int kHighShift = 4;
inline u8x64 high_nibbles_scaled(u8x64 x) { return x & (uint8_t)0xf0; }
inline u8x64 high_nibbles(u8x64 x) {
    return (u8x64)_mm512_and_si512(_mm512_srli_epi16((__m512i)x, 4), _mm512_set1_epi8(0x0f));
}
inline u8x64 join_low_nibbles(u8x64 high, u8x64 low) {
    const __m512i mask = _mm512_set1_epi8(0x0f);  // bits of `low` under the mask, of `high` << 4 elsewhere
    return (u8x64)_mm512_ternarylogic_epi32(mask, (__m512i)low, _mm512_slli_epi16((__m512i)high, 4), 0xca);
}
inline u8x64 join_high_nibbles(u8x64 high, u8x64 low) {
    const __m512i mask = _mm512_set1_epi8(0x0f);
    return (u8x64)_mm512_ternarylogic_epi32(mask, _mm512_srli_epi16((__m512i)low, 4), (__m512i)high, 0xca);
}
// out[i] = the sum of the lanes of x[i]: each round halves the number of vectors.
inline void sums_of_4(const f32x16* x, float* out) {
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

inline void sums_of_4(const f32x16* x, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = sum_of(x[i]);
}

inline uint32_t bits_of(i32x16 truth) {
#if defined(__AVX2__)
    __m256i halves[2];
    __builtin_memcpy(halves, &truth, 64);
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(halves[0]))) |
           uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(halves[1]))) << 8;
#else
    int32_t lanes[16];
    store(lanes, truth);
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= uint32_t(lanes[i] & 1) << i;
    return mask;
#endif
}
inline uint32_t mask_ge(f32x16 a, f32x16 b) { return bits_of(a >= b); }
inline uint32_t mask_not_less(f32x16 a, f32x16 b) { return bits_of(~(a < b)); }
inline f32x16 keep_lanes(uint32_t mask, f32x16 x) {
    const i32x16 bit = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                        1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    return ((splat(int32_t(mask)) & bit) != 0) ? x : f32x16{};
}
inline void compress(uint32_t mask, i32x16 values, uint32_t* out) {
    int32_t lanes[16];
    store(lanes, values);
    for (; mask; mask &= mask - 1) *out++ = uint32_t(lanes[__builtin_ctz(mask)]);
}
inline i32x16 widen_bytes(u8x16 bytes) { return __builtin_convertvector(bytes, i32x16); }
inline u8x64 low_nibbles(u8x64 x) { return x & (uint8_t)0x0f; }
inline u8x64 high_nibbles(u8x64 x) { return (u8x64)((u16x32)x >> 4) & (uint8_t)0x0f; }
constexpr int kHighShift = 0;  // dot4 takes codes up to 15 only
inline u8x64 high_nibbles_scaled(u8x64 x) { return high_nibbles(x); }

// Codes of 8 bits from their high and low nibbles, of the even and of the odd four dimensions.
inline u8x64 join_low_nibbles(u8x64 high, u8x64 low) {
    return (u8x64)(((u16x32)high << 4) & (uint16_t)0xf0f0) | low_nibbles(low);
}
inline u8x64 join_high_nibbles(u8x64 high, u8x64 low) { return (high & (uint8_t)0xf0) | high_nibbles(low); }

#if defined(__AVX2__)
// Products of a code <= 15 and a digit >= -127: a pair sums to at most 2 * 15 * 127 = 3810 < 32767,
// so the saturating 16-bit addition of maddubs never saturates.
inline i32x16 dot4(i32x16 sum, u8x64 codes, int32_t digits) {
    __m256i c[2], s[2];
    __builtin_memcpy(c, &codes, 64);
    __builtin_memcpy(s, &sum, 64);
    const __m256i q = _mm256_set1_epi32(digits), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; ++half)
        s[half] = _mm256_add_epi32(s[half], _mm256_madd_epi16(_mm256_maddubs_epi16(c[half], q), ones));
    __builtin_memcpy(&sum, s, 64);
    return sum;
}
inline i32x16 dot4_byte(i32x16 sum, u8x64 codes, int32_t digits) {
    return dot4(sum, low_nibbles(codes), digits) + (dot4(i32x16{}, high_nibbles(codes), digits) << 4);
}
inline f32x16 from_float16(u16x16 bits) {
    __m128i h[2];
    __builtin_memcpy(h, &bits, 32);
    __m256 f[2] = {_mm256_cvtph_ps(h[0]), _mm256_cvtph_ps(h[1])};
    f32x16 out;
    __builtin_memcpy(&out, f, 64);
    return out;
}
#else
inline i32x16 dot4(i32x16 sum, u8x64 codes, int32_t digits) {
    u8x64 c = codes;
    const u32x16 w = (u32x16)c;
    const i32x16 q0 = splat(int32_t(int8_t(digits))), q1 = splat(int32_t(int8_t(digits >> 8))),
                 q2 = splat(int32_t(int8_t(digits >> 16))), q3 = splat(int32_t(int8_t(digits >> 24)));
    return sum + (i32x16)(w & 0xff) * q0 + (i32x16)((w >> 8) & 0xff) * q1 + (i32x16)((w >> 16) & 0xff) * q2 +
           (i32x16)(w >> 24) * q3;
}
inline i32x16 dot4_byte(i32x16 sum, u8x64 codes, int32_t digits) { return dot4(sum, codes, digits); }
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

// exp(x) = 2^n 2^f with x log2(e) = n + f, |f| <= 1/2; relative error below 2e-7 (1 + |x|). Above 88 it
// saturates. Below -87 it is 0 or, on AVX-512, the subnormal number. 2^f: minimax polynomial of degree 5.
inline f32x16 exp2_fraction(f32x16 f) {
    f32x16 p = f * 1.32764702e-3f + 9.67554189e-3f;
    p = p * f + 5.55071346e-2f;
    p = p * f + 0.240221202f;
    p = p * f + 0.693146944f;
    return p * f + 1.00000012f;
}

#if defined(__AVX512VNNI__)
inline f32x16 exp_of(f32x16 x) {
    const f32x16 t = min_of(x, splat(88.0f)) * 1.44269504088896341f;
    const __m512 n = _mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (f32x16)_mm512_scalef_ps((__m512)exp2_fraction(t - (f32x16)n), n);
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
    f32x16 t = min_of(x, splat(88.0f)) * 1.44269504088896341f;
    t = small ? f32x16{} : t;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const f32x16 shifted = t + magic;
    const f32x16 p = exp2_fraction(t - (shifted - magic));
    return small ? f32x16{} : (f32x16)((i32x16)p + (((i32x16)shifted) << 23));
}
inline f32x16 exp_above(f32x16 x, float reference) { return exp_of(x - reference) * 1.0001f; }
#endif

// exp(x - reference), from above by at most 6.2 %: 2^n (1 + f) in place of 2^(n + f), made from its bits in one
// multiply-add. Below -87 it is 0 or subnormal; x must be <= reference + 80.
struct CoarseExp {
    float start;
    CoarseExp() = default;
    // In units of the last place of the exponent's bits: 256 + 4 |reference| pay for the roundings of the constant, of
    // `start`, of the product (where it is rounded) and of the sum, each at most 64 + |reference|.
    explicit CoarseExp(float reference)
        : start(float(127.0 * 8388608.0 + 256.0 + 4.0 * __builtin_fabs(double(reference)) -
                      double(reference) * double(kPerNat))) {}
    f32x16 operator()(f32x16 x) const {
        const f32x16 t = x * kPerNat + start;
        return (f32x16) __builtin_convertvector(max_of(t, splat(0.0f)), i32x16);
    }
    static constexpr float kPerNat = 1.44269504f * 8388608.0f;
};

inline f32x16 load_row(Dtype dtype, const void* row, int at) {
    if (dtype == Dtype::float32) return load<f32x16>((const float*)row + at);
    const u16x16 bits = load<u16x16>((const uint16_t*)row + at);
    return dtype == Dtype::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
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

// Products of codes and digits of 8 bits, four to a lane of 32 bits, a register at a time: what most of the time goes
// into, and where the levels differ most. Private to loops.h, in its anonymous namespace.

using Bytes = Vector<uint8_t, kRegisterBytes>;
using Ints = Vector<int32_t, kRegisterBytes / 4>;
using Floats = Vector<float, kRegisterBytes / 4>;
constexpr int kParts = 64 / kRegisterBytes;  // registers of a block of 16 keys
constexpr int kPartLanes = 16 / kParts;
// How many registers of a block share a load of digits in a scan: as many as leave their sums in registers.
#if defined(__AVX2__) && !defined(HSR_AVX512) && !defined(__AVXVNNI__)
constexpr int kPartsTogether = 2;
#else
constexpr int kPartsTogether = 1;
#endif
using Together = Vector<float, kPartLanes * kPartsTogether>;
template <class V>
inline Floats added_up(const V& together) {
    if constexpr (Shape<V>::pair)
        return together.low + together.high;
    else
        return together;
}
template <class V, class Part>
inline V of_parts(const Part& part) {
    if constexpr (Shape<V>::pair)
        return {part(0), part(1)};
    else
        return part(0);
}

// Bytes added up, a few to a lane; all lanes added up.
#if defined(__SSE2__)
using ByteSums = Vector<uint64_t, kRegisterBytes / 8>;
inline ByteSums sums_of_bytes(Bytes x) {
#if defined(HSR_AVX512)
    return (ByteSums)_mm512_sad_epu8((__m512i)x, _mm512_setzero_si512());
#elif defined(__AVX2__)
    return (ByteSums)_mm256_sad_epu8((__m256i)x, _mm256_setzero_si256());
#else
    return (ByteSums)_mm_sad_epu8((__m128i)x, _mm_setzero_si128());
#endif
}
#else
using ByteSums = Vector<uint16_t, kRegisterBytes / 2>;
inline ByteSums sums_of_bytes(Bytes x) {
    const ByteSums pairs = as<ByteSums>(x);
    return (pairs & uint16_t(0xff)) + (pairs >> 8);
}
#endif
template <class V>
inline uint32_t sum_of_sums(const V& x) {
    if constexpr (Shape<V>::lanes > 2)
        return sum_of_sums(lower(x) + upper(x));
    else
        return uint32_t(x[0]) + uint32_t(x[1]);
}

inline int32_t four_digits(const int8_t* digits) {
    int32_t word;
    __builtin_memcpy(&word, digits, 4);
    return word;
}
inline Bytes low_nibbles(Bytes x) { return x & (uint8_t)0x0f; }
// Shifts are those of 16 bits: there are none of bytes.
using Shifted = Vector<uint16_t, kRegisterBytes / 2>;
inline Bytes high_nibbles(Bytes x) { return low_nibbles(as<Bytes>(as<Shifted>(x) >> 4)); }
inline Bytes raised(Bytes nibbles) { return as<Bytes>(as<Shifted>(nibbles) << 4); }

// PlaneCodes: a register of one plane of the key codes, its low nibbles and its high ones, for PlaneSum. A sum takes
// the products of at most kTurnPairs pairs of four digits between `begin`, which is told where DigitStarts has it
// start, and `settle`.

#if defined(HSR_AVX512) || defined(__AVXVNNI__) || !defined(__AVX2__)

inline Ints dot4(Ints sum, Bytes codes, int32_t digits) {
#if defined(HSR_AVX512)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(digits));
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(digits));
#elif defined(__SSE2__)
    // As words: two keys a register, a key's sum in two parts.
    const __m128i zero = _mm_setzero_si128(), once = _mm_cvtsi32_si128(digits);
    const __m128i four = _mm_srai_epi16(_mm_unpacklo_epi8(once, once), 8), twice = _mm_unpacklo_epi64(four, four);
    const __m128 low = _mm_castsi128_ps(_mm_madd_epi16(_mm_unpacklo_epi8((__m128i)codes, zero), twice)),
                 high = _mm_castsi128_ps(_mm_madd_epi16(_mm_unpackhi_epi8((__m128i)codes, zero), twice));
    return sum + (Ints)_mm_shuffle_ps(low, high, 0x88) + (Ints)_mm_shuffle_ps(low, high, 0xdd);
#elif defined(__aarch64__)
    // A product fits 16 bits: 255 * 127 = 32,385.
    const int16x8_t twice = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(digits)));
    const auto products = [&](uint8x8_t two_keys) {
        return vpaddlq_s16(vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(two_keys)), twice));
    };
    const uint8x16_t all = (uint8x16_t)codes;
    return sum + (Ints)vpaddq_s32(products(vget_low_u8(all)), products(vget_high_u8(all)));
#else
    using Unsigned = Vector<uint32_t, kPartLanes>;
    const Unsigned bytes = as<Unsigned>(codes);
    for (int j = 0; j < 4; ++j) sum += as<Ints>((bytes >> (8 * j)) & 0xffu) * int32_t(int8_t(digits >> (8 * j)));
    return sum;
#endif
}

// Codes of 8 bits and digits of queries; digits of weights and codes of values.
constexpr bool kDigitPairs = false;
inline Ints add_scores(Ints sum, Bytes codes, int32_t digits) { return dot4(sum, codes, digits); }
constexpr int kValueShift = 0, kValueSigns = 0, kValueWide = 4;  // registers of sums at once
struct ValueSum {
    Ints first{}, second{};  // short chains: each waits for itself
    void add(Bytes codes, int32_t digits, Bytes more_codes, int32_t more) {
        first = dot4(first, codes, digits);
        second = dot4(second, more_codes, more);
    }
    Ints total() const { return first + second; }
};

struct PlaneCodes {
    Bytes first, second;
    PlaneCodes() = default;
    // High nibbles stay in place, 16 times too large: that saves a shift for each register.
    explicit PlaneCodes(Bytes x) : first(low_nibbles(x)), second(x & (uint8_t)0xf0) {}
};
constexpr int kTurnPairs = 1 << 30;
struct DigitStarts {  // from 0
    DigitStarts(const int8_t*, int) {}
    int32_t of_turn(int) const { return 0; }
    int32_t total() const { return 0; }
};
struct PlaneSum {
    Ints first{}, second{};
    void begin(int32_t) {}
    void add(const PlaneCodes& codes, int32_t digits, int32_t more) {
        first = dot4(first, codes.first, digits);
        second = dot4(second, codes.second, more);
    }
    void settle() {}
    Ints total() const { return first + (second >> 4); }
};

#else

// AVX2 alone has no instruction for four products of bytes that does not saturate: nibbles are summed in 16 bits.
struct PlaneCodes {
    Bytes first, second;
    PlaneCodes() = default;
    explicit PlaneCodes(Bytes x) : first(low_nibbles(x)), second(high_nibbles(x)) {}
};

// Sums in 16 bits may wrap on the way, as long as they end inside. A word meets two digits of each four: over a turn of
// 8 pairs of fours, 32 digits of at most 127. Started at -7.5 times their sum it is that of (nibble - 7.5) * digit, at
// most 32 * 7.5 * 127 = 30480.
constexpr int kTurnPairs = 8;
using Words = Vector<int16_t, 16>;
struct DigitStarts {
    // Of `pairs` pairs of fours; the list is padded with zeros to a multiple of 16 digits.
    // Not inlined: GCC 12 would take what a turn reads for uninitialised.
    [[gnu::noinline]] DigitStarts(const int8_t* digits, int pairs) {
        for (int turn = 0; turn * kTurnPairs < pairs; ++turn) {
            const int last = pairs < (turn + 1) * kTurnPairs ? pairs : (turn + 1) * kTurnPairs;
            __m128i sums = _mm_setzero_si128();
            for (int p = turn * kTurnPairs; p < last; p += 2)
                sums = _mm_add_epi16(
                    sums, _mm_maddubs_epi16(_mm_set1_epi8(1), _mm_loadu_si128((const __m128i*)(digits + 8 * p))));
            sums = _mm_add_epi16(sums, _mm_srli_si128(sums, 8));
            sums = _mm_add_epi16(sums, _mm_srli_si128(sums, 4));
            // -7.5 s, rounded up for an odd s
            const __m128i starts =
                _mm_sub_epi16(_mm_srai_epi16(_mm_add_epi16(sums, _mm_set1_epi16(1)), 1), _mm_slli_epi16(sums, 3));
            own[turn] = _mm_cvtsi128_si32(starts);
            sum += int16_t(own[turn]) + (own[turn] >> 16);
        }
    }
    int32_t of_turn(int turn) const { return own[turn]; }
    int32_t total() const { return sum; }  // what all sums of nibbles start at, together

private:
    int32_t own[kMaxHeadDim / (8 * kTurnPairs)];
    int32_t sum = 0;
};
inline Words started(int32_t start) { return (Words)_mm256_set1_epi32(start); }
inline Words dot2(Words sum, Bytes codes, Bytes digits) {
    return sum + (Words)_mm256_maddubs_epi16((__m256i)codes, (__m256i)digits);
}
inline Words dot2(Words sum, Bytes codes, int32_t digits) { return dot2(sum, codes, (Bytes)_mm256_set1_epi32(digits)); }
inline Ints widen(Words sums, int16_t factor = 1) {
    return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(factor));
}

struct PlaneSum {
    Words words{};
    Ints all{};
    void begin(int32_t start) { words = started(start); }
    void add(const PlaneCodes& codes, int32_t digits, int32_t more) {
        words = dot2(dot2(words, codes.first, digits), codes.second, more);
    }
    void settle() { all += widen(words); }
    Ints total() const { return all; }
};

// GCC would keep half of a loop's sums in memory, for want of one register: here it must have them in one each.
template <class V>
inline V in_register(V x) {
    asm("" : "+x"(x));
    return x;
}

// A code of 8 bits meets a digit, and two products must stay inside 16 bits. So the digits of a query get a step at
// which two of them that stand together sum to at most 128: 255 * 128 = 32640.
constexpr bool kDigitPairs = true;
// Against panels, the eight products that meet in a word (kernels.h) share a sum of 16 bits. It may wrap on the way: in
// the end, started at -127.5 times the digits, it is the sum of (code - 127.5) * digit, no more than kEightNorm times
// the norm of the eight's digits, which their step keeps below kDigitNorm: 210 * 156 = 32760.
#define HSR_SUMS_OF_EIGHTS
constexpr float kDigitNorm = 156.0f;
inline Ints add_scores(Ints sum, Bytes codes, int32_t digits) {
    return in_register(sum + widen((Words)_mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(digits))));
}
// Digits of weights are never negative, so that they can be the unsigned side: with codes less 128 four products sum to
// at most 4 * 128 * 63 = 32256, inside 16 bits.
constexpr int kValueShift = 128, kValueSigns = int(0x80808080u), kValueWide = 8;  // registers of sums at once
struct ValueSum {
    Ints all{};
    void add(Bytes codes, int32_t digits, Bytes more_codes, int32_t more) {
        const Words words = (Words)_mm256_maddubs_epi16(_mm256_set1_epi32(digits), (__m256i)codes) +
                            (Words)_mm256_maddubs_epi16(_mm256_set1_epi32(more), (__m256i)more_codes);
        all = in_register(all + widen(words));
    }
    Ints total() const { return all; }
};

#endif

// Second digits of a query are this many times finer than the first: rounding leaves at most half a first one, and two
// of those that stand together must not sum to more than 128 where first ones must not.
constexpr float kFiner = kDigitPairs ? 128.0f : 254.0f;

// Codes of 8 bits from the low (high) nibbles of both planes.
inline Bytes joined_low(Bytes high, Bytes low) {
#if defined(HSR_AVX512)
    const __m512i mask = _mm512_set1_epi8(0x0f);  // bits of `low` under the mask, of `high` << 4 elsewhere
    return (Bytes)_mm512_ternarylogic_epi32(mask, (__m512i)low, _mm512_slli_epi16((__m512i)high, 4), 0xca);
#else
    return raised(low_nibbles(high)) | low_nibbles(low);
#endif
}
inline Bytes joined_high(Bytes high, Bytes low) {
#if defined(HSR_AVX512)
    const __m512i mask = _mm512_set1_epi8(0x0f);
    return (Bytes)_mm512_ternarylogic_epi32(mask, _mm512_srli_epi16((__m512i)low, 4), (__m512i)high, 0xca);
#else
    return (high & (uint8_t)0xf0) | high_nibbles(low);
#endif
}

template <class Sum, int Rows, int Columns>
inline void settle_all(Sum (&sums)[Rows][Columns]) {
    for (auto& row : sums)
        for (Sum& sum : row) sum.settle();
}

// A number, or a name of an enumeration, that the compiler is to know.
template <auto N>
struct Number {
    static constexpr auto value = N;
};
// body(Number<n>()), for n from 1 to Most.
template <int Most, class Body>
inline void with_number(int n, const Body& body) {
    if constexpr (Most > 1)
        if (n < Most) return with_number<Most - 1>(n, body);
    body(Number<Most>());
}

// body(p) for p in [0, pairs), in turns of kTurnPairs, each between begin(turn) and settle().
template <class Begin, class Body, class Settle>
inline void in_turns(int pairs, const Begin& begin, const Body& body, const Settle& settle) {
    for (int p = 0, turn = 0; p < pairs; ++turn) {
        const int end = pairs - p > kTurnPairs ? p + kTurnPairs : pairs;
        begin(turn);
        for (; p < end; ++p) body(p);
        settle();
    }
}

template <class V>
inline V part_of_bfloat16(const uint8_t* from, int part) {
    return load_bfloat16<V>(from + 2 * kPartLanes * part);
}

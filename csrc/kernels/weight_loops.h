// Kernels of prompts: weights and values in 8 bits, multiplied as integers. Private to loops.h, in its anonymous
// namespace. Logits are in units of log 2.

// A range of values: v ~ low + step * code, code in 0..255.
void code_values(Dtype dtype, const void* rows, size_t stride, int dim, uint8_t* codes, float* range) {
    const uint8_t* from = (const uint8_t*)rows;
    const size_t wide = size_t((dim + 15) / 16 * 16);
    f32x16 widest = {};
    for (int at = 0; at < dim; at += 16) {
        const bool part = dim - at < 16;
        const auto value = [&](size_t key) {
            const uint8_t* row = from + key * stride;
            return part ? load_row_part(dtype, row, at, dim - at) : load_row(dtype, row, at);
        };
        f32x16 least = value(0), most = least, total = {};
        for (size_t first = 0; first < kRangeKeys; first += kSumPiece) {
            f32x16 sum = {};
            for (size_t key = first; key < first + kSumPiece; ++key) {
                const f32x16 v = value(key);
                least = min_of(least, v);
                most = max_of(most, v);
                sum += v;
            }
            total += sum;
        }
        f32x16 step = (most - least) * (1.0f / 255.0f);
        step = max_of(step, splat(1e-37f));
        const f32x16 inverse = 1.0f / step;
        const auto code = [&](size_t key) {
            return min_of(convert<i32x16>((value(key) - least) * inverse + 0.5f), splat(255));
        };
        for (size_t key = 0; key < kRangeKeys; key += 4)
            store(codes + (key / 4 * wide + size_t(at)) * 4,
                  (code(key) | code(key + 1) << 8 | code(key + 2) << 16 | code(key + 3) << 24) ^ kValueSigns);
        store(range + at, least);
        store(range + wide + at, step);
        store(range + 2 * wide + at, total * (1.0f / float(kRangeKeys)));
        widest = max_of(widest, step);
    }
    range[3 * wide] = max_of_lanes(widest);
}

// 2^t within 1.8e-3 of itself, for -126 <= t <= 0, and something for others: a minimax polynomial of degree 2 on
// [-1/2, 1/2].
inline f32x16 power_of_two(f32x16 t) {
#if defined(HSR_AVX512)
    const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const f32x16 shifted = t + magic, n = shifted - magic;
#endif
    const f32x16 f = t - n;
    const f32x16 p = (f * 0.23842897f + 0.70344802f) * f + 1.00044314f;
#if defined(HSR_AVX512)
    return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return as<f32x16>(as<i32x16>(p) + (as<i32x16>(shifted) << 23));
#endif
}

// (2 k + 1) / 128 for every k below 64, neighbours far apart.
struct Dither {
    alignas(64) float of[64];
    constexpr Dither() : of() {
        constexpr int group[4] = {0, 4, 2, 6};
        for (int k = 0; k < 64; ++k) {
            const int lane = k % 16, place = (lane & 1) * 8 + (lane & 2) * 2 + (lane & 4) / 2 + (lane & 8) / 8;
            of[k] = float(place * 8 + group[k / 16] + 1) / 128.0f;
        }
    }
};
constexpr Dither kDither;

constexpr size_t kPieceKeys = 16;  // one of 32 holds a kept key up to 1.7 times as often
constexpr size_t kPieces = kPanelKeys / kPieceKeys;
static_assert(kPieces <= 64, "a bit each");

// Digits of `pieces` of keys, for scores in [from, exact_from), and their mass. The digit is that of 2^(unit * score +
// start), `start` the centre less the cap. Returns the pieces in which some reach exact_from; AllBelow: none does.
template <bool AllBelow>
inline uint64_t digits_of_pieces(const float* scores, uint64_t pieces, const f32x16& from, const f32x16& exact_from,
                                 float unit, float start, int8_t* digits, float* total) {
    f32x16 mass = {};
    uint64_t with_large = 0;
    const auto digits_of = [&](size_t piece) {
        const size_t i = piece * kPieceKeys;
        const f32x16 x = load<f32x16>(scores + i);
        Truth coded = truth_ge(x, from);
        if constexpr (!AllBelow) {
            const Truth below = truth_less(x, exact_from);
            coded = both(coded, below);
            with_large |= uint64_t(bits(below) != 0xffff) << piece;
        }
        const f32x16 w = where(coded, power_of_two(x * unit + start));
        mass += w;
        return convert<i32x16>(w * kDigits + load<f32x16>(kDither.of + i % 64));
    };
    const auto next = [&] {
        const size_t piece = size_t(__builtin_ctzll(pieces));
        pieces &= pieces - 1;
        return piece;
    };
    while (pieces & (pieces - 1)) {
        const size_t one = next(), two = next();
        store_bytes_of_two(digits_of(one), digits_of(two), digits + one * kPieceKeys, digits + two * kPieceKeys);
    }
    if (pieces) {
        const size_t last = next();
        store(digits + last * kPieceKeys, signed_bytes(digits_of(last)));
    }
    *total = sum_of(mass);
    return with_large;
}

// The sum of a range's digits: at most 256 * 63.
inline uint32_t sum_of_digits(const int8_t* digits) {
    constexpr int kAtOnce = 4;  // digits are below 64: four of them fit a byte
    static_assert(kRangeKeys % (kAtOnce * kRegisterBytes) == 0, "in whole registers");
    ByteSums sums = {};
    for (size_t i = 0; i < kRangeKeys; i += kAtOnce * kRegisterBytes) {
        Bytes bytes = load<Bytes>(digits + i);
        for (int k = 1; k < kAtOnce; ++k) bytes += load<Bytes>(digits + i + size_t(k) * kRegisterBytes);
        sums += sums_of_bytes(bytes);
    }
    return sum_of_sums(sums);
}

// Of 64 bits a bit for each four: whether one of the four is set.
inline uint32_t fours_of(uint64_t x) {
    x |= x >> 1;
    x |= x >> 2;
    x &= 0x1111111111111111;
    x = (x | x >> 3) & 0x0303030303030303;
    x = (x | x >> 6) & 0x000f000f000f000f;
    x = (x | x >> 12) & 0x000000ff000000ff;
    return uint32_t(x | x >> 24) & 0xffff;
}

// Of scores[count], whole ranges of keys in the units of a query, those whose logit is in [from, exact_from) as digits
// of 2^(logit - cap) * kDigits, cap the largest of them or exact_from; each is off by less than one, up or down by its
// place, so that sums of many small weights are neither. Those from exact_from on are listed; the mass of the others is
// bounded as in select_row.
void weigh_panel(const float* scores, size_t count, const WeightLimits* limits, int8_t* digits, uint32_t* positions,
                 WeighedRow* out) {
    // A query of length 0 has no unit: all its logits are the centre, on either side of a threshold.
    const float unit = limits->unit, inverse = 1.0f / (unit > 1e-30f ? unit : 1e-30f);
    const auto score_at = [&](float logit) { return (logit - limits->centre) * inverse; };
    const float least = score_at(limits->from), large_from = score_at(limits->exact_from);
    const f32x16 from = splat(least), exact_from = splat(large_from);
    const float slope = unit * PowerAbove::kPerUnit;
    const float start = float(PowerAbove::start_at(double(limits->reference) - double(limits->centre)));
    // First what is left out, and which pieces hold a key that is kept: few, often.
    f32x16 omitted = {}, top = splat(-kInfinity);
    uint64_t pieces = 0;
    uint32_t kept = 0;
    for (size_t i = 0; i < count; i += 2 * kPieceKeys) {
        Truth reaches[2];
        for (int h = 0; h < 2; ++h) {
            const f32x16 x = load<f32x16>(scores + i + 16 * h);
            reaches[h] = truth_ge(x, from);
            omitted += except(reaches[h], PowerAbove::weight(x * slope + start));
            top = max_of(top, x);
        }
        const uint32_t mask = bits_of_two(reaches[0], reaches[1]);
        kept += uint32_t(__builtin_popcount(mask));
        pieces |= (uint64_t((mask & kFirstOfTwo) != 0) | uint64_t((mask & ~kFirstOfTwo) != 0) << 1) << (i / kPieceKeys);
        store(digits + i, Vector<int8_t, 2 * kPieceKeys>{});
    }
    const float largest = max_of_lanes(top);
    const bool all_below = largest < large_from;
    out->cap = all_below ? largest * unit + limits->centre : limits->exact_from;
    const float weightless = score_at(out->cap - 126.0f), to_cap = limits->centre - out->cap;
    const f32x16 coded_from = splat(least > weightless ? least : weightless);
    uint32_t found = 0;
    if (all_below) {
        digits_of_pieces<true>(scores, pieces, coded_from, exact_from, unit, to_cap, digits, &out->mass);
    } else {
        const i32x16 lane = lane_numbers();
        uint64_t left =
            digits_of_pieces<false>(scores, pieces, coded_from, exact_from, unit, to_cap, digits, &out->mass);
        for (; left; left &= left - 1) {
            const size_t i = size_t(__builtin_ctzll(left)) * kPieceKeys;
            const uint32_t large = mask_ge(load<f32x16>(scores + i), exact_from);
            compress(large, lane + int32_t(limits->first + i), positions + found);
            found += uint32_t(__builtin_popcount(large));
        }
    }
    for (size_t range = 0; range < kRanges; ++range)
        out->digit_sums[range] = range * kRangeKeys < count ? sum_of_digits(digits + range * kRangeKeys) : 0;
    out->omitted = sum_of(omitted);
    out->words = fours_of(pieces);
    out->coded = kept - found;
    out->exact = found;
}

// The fours of keys of a range that have a digit which is not zero: none is negative.
inline uint64_t fours_with_digits(const int8_t* digits) {
    static_assert(kRangeKeys / 4 == 64, "a bit each");
    return positive_of_32(digits) | uint64_t(positive_of_32(digits + 128)) << 32;
}

// Of one range, the values' coordinates from `at` on, Wide registers of them.
template <int Wide>
inline void multiply_strip(const uint8_t* codes, const float* range, size_t wide, int at, uint64_t fours,
                           const int8_t* digits, float unit, uint32_t digit_sum, float* accumulator) {
    ValueSum sum[Wide];
    codes += size_t(at) * 4;
    const auto next = [&] {
        const size_t four = size_t(__builtin_ctzll(fours));
        fours &= fours - 1;
        return four;
    };
    if (__builtin_popcountll(fours) % 2) {
        const size_t one = next();
        const int32_t digit = four_digits(digits + one * 4);
        for (int j = 0; j < Wide; ++j)
            sum[j].add(load<Bytes>(codes + one * wide * 4 + kRegisterBytes * j), digit, Bytes{}, 0);
    }
    while (fours) {
        const size_t one = next(), two = next();
        const int32_t digit = four_digits(digits + one * 4), more = four_digits(digits + two * 4);
        for (int j = 0; j < Wide; ++j)
            sum[j].add(load<Bytes>(codes + one * wide * 4 + kRegisterBytes * j), digit,
                       load<Bytes>(codes + two * wide * 4 + kRegisterBytes * j), more);
    }
    for (int j = 0; j < Wide; ++j) {
        const int place = at + kPartLanes * j;
        const Floats low = load<Floats>(range + place), step = load<Floats>(range + wide + place);
        const Floats dot = convert<Floats>(sum[j].total() + int32_t(kValueShift * digit_sum));
        float* to = accumulator + place;
        store(to, load<Floats>(to) + unit * (step * dot + low * float(digit_sum)));
    }
}

// accumulators[q] += units[q] * sum of digits[q][key] * value of key, over the words of 64 keys in words[q];
// digit_sums[q][range] are the sums of the digits. A range at a time, so that its codes stay in the first cache; of a
// range, a query reads the fours of keys that have a digit of its own.
void multiply_panel(const uint8_t* codes, const float* ranges, int dim, const uint32_t* words, const int8_t* digits,
                    const float* units, const uint32_t* digit_sums, int count, float* accumulators, size_t stride) {
    constexpr size_t kWords = kRangeKeys / 64;
    const size_t wide = size_t((dim + 15) / 16 * 16);
    for (size_t range = 0; range < kRanges; ++range) {
        for (size_t q = 0; q < size_t(count); ++q) {
            if (!(words[q] >> (range * kWords) & ((1u << kWords) - 1))) continue;
            const int8_t* own = digits + q * kPanelKeys + range * kRangeKeys;
            const uint64_t fours = fours_with_digits(own);
            const auto strip = [&](auto registers, int at) {
                multiply_strip<decltype(registers)::value>(
                    codes + range * kRangeKeys * wide, ranges + range * (3 * wide + 1), wide, at, fours, own, units[q],
                    digit_sums[q * kRanges + range], accumulators + q * stride);
            };
            int at = 0;
            for (; at + kPartLanes * kValueWide <= int(wide); at += kPartLanes * kValueWide)
                strip(Number<kValueWide>(), at);
            for (; at < int(wide); at += kPartLanes) strip(Number<1>(), at);
        }
    }
}

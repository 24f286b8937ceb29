// Kernels of prompts: many queries against a panel of keys. Private to loops.h, in its anonymous namespace.
// Logits are in units of log 2 here, so that exponentials are powers of two.

// Registers of a word of 64 keys (4 blocks) whose scores are kept for a few queries at once.
constexpr int kMicroQueries = 6;
#if defined(HSR_AVX512)
constexpr int kMicroRegisters = 4;
#elif defined(__AVX2__)
constexpr int kMicroRegisters = 2;
#else
constexpr int kMicroRegisters = 1;
#endif

// Both planes joined, [word of 4 blocks][4 dimensions][block][64 bytes], from block `first` of the panel on; a
// last word is filled with zeros.
void unpack_panel(const uint8_t* high, const uint8_t* low, int dim, size_t blocks, size_t first, CodedPanel* panel) {
    const int pairs = (dim + 7) / 8;
    const size_t bytes = size_t(pairs) * 64;
    const auto place = [&](size_t block) { return panel->codes + block / 4 * size_t(pairs) * 512 + block % 4 * 64; };
    f32x16 residual = splat(first ? panel->residual : 0.0f), largest = splat(first ? panel->step : 0.0f);
    blocks += first;
    for (size_t block = first; block < blocks; ++block, high += bytes + 64, low += bytes + 32) {
        uint8_t* to = place(block);
        for (int p = 0; p < pairs; ++p, to += 512) {
            for (int at = 0; at < 64; at += kRegisterBytes) {
                const Bytes h = load<Bytes>(high + p * 64 + at), l = load<Bytes>(low + p * 64 + at);
                store(to + at, joined_low(h, l));
                store(to + 256 + at, joined_high(h, l));
            }
        }
        const f32x16 step = load_bfloat16<f32x16>(high + bytes);
        store(panel->steps + block * 16, step);
        largest = max_of(largest, step);
        residual = max_of(residual, load_bfloat16<f32x16>(low + bytes));
    }
    for (size_t block = blocks; block % 4; ++block) {
        uint8_t* to = place(block);
        for (int p = 0; p < 2 * pairs; ++p, to += 256) store(to, u8x64{});
        store(panel->steps + block * 16, f32x16{});
    }
    panel->residual = max_of_lanes(residual);
    panel->step = max_of_lanes(largest);
}

// q ~ step * digits for one rotated query y; `rest` = |y - decoded|, from above.
void code_query(const float* y, int dim, PanelQuery* query) {
    const int wide = (dim + 15) / 16 * 16;
    float most = most_of(y, wide);
#if defined(HSR_SUMS_OF_EIGHTS)
    if (most > 0) {  // a digit is off by a half, an eight by sqrt(2)
        const float excess = norm_of_eights(y, wide, 127.0f / most) / (kDigitNorm - 1.5f);
        if (excess > 1) most *= excess * 1.00001f;
    }
#endif
    const float step = most > 0 ? most / 127.0f : 1.0f, inverse = 1.0f / step;
    f32x16 rest = {};
    int32_t twice = 0;  // the digits so far, times 255
    query->start = 0;
    for (int at = 0; at < wide; at += 16) {
        const f32x16 x = load<f32x16>(y + at) * inverse, half = select(x < f32x16{}, splat(-0.5f), splat(0.5f));
        // at most 127.5: truncated to 127
        const i32x16 digit = max_of(min_of(convert<i32x16>(x + half), splat(127)), splat(-127));
        const f32x16 rounded = convert<f32x16>(digit), left = x - rounded;
        rest += left * left;
        store(query->digits + at, signed_bytes(digit));
        float sums[2];
        sums_of_eights(rounded, sums);
        for (int j = 0; j < 2; ++j) {
            twice += 255 * int32_t(sums[j]);
            // All starts so far are half of -twice, rounded down: each is off by at most a half, and so are all.
            const int32_t start = (-twice >> 1) - query->start;
            query->starts[at / 8 + j] = int16_t(start);
            query->start += start;
        }
    }
    query->step = step;
    // sqrt of the float sum, raised by its rounding and by that of x (127 * 2^-23 a coordinate).
    query->rest =
        step * (float(__builtin_sqrt(double(sum_of(rest)))) * 1.00001f + 3e-5f * float(__builtin_sqrt(double(dim))));
}

// Digits of a few queries, ready to meet panels. `add_up`: the sums of digits * (code - 127.5) of some registers of
// keys, whose first four of dimensions stands at `from`.
#if defined(HSR_SUMS_OF_EIGHTS)
template <int Queries>
struct PanelDigits {
    struct Group {  // of four fours of dimensions: digits and the start of their sum, each in all lanes
        Bytes digits[4];
        Words start;
    };
    Group groups[kMaxHeadDim / 16][Queries];
    int count;

    PanelDigits(const PanelQuery* queries, int fours) : count((fours + 3) / 4) {
        for (int g = 0; g < count; ++g)
            for (int q = 0; q < Queries; ++q) {
                for (int p = 0; p < 4; ++p)
                    groups[g][q].digits[p] = as<Bytes>(splat_to<Ints>(four_digits(queries[q].digits + 16 * g + 4 * p)));
                int32_t start;
                __builtin_memcpy(&start, queries[q].starts + 2 * g, 4);
                groups[g][q].start = started(start);
            }
    }
    void add_up(const uint8_t* from, Ints (&sums)[kMicroRegisters][Queries]) const {
        const auto add = [&](auto begins, const Group* own) {
            Bytes codes[4][kMicroRegisters];
            for (int p = 0; p < 4; ++p)
                for (int r = 0; r < kMicroRegisters; ++r)
                    codes[p][r] = load<Bytes>(from + p * 256 + r * kRegisterBytes);
#pragma GCC unroll 1
            for (int q = 0; q < Queries; ++q) {
                Words sum[kMicroRegisters];
                for (Words& one : sum) one = own[q].start;
                for (int p = 0; p < 4; ++p) {
                    const Bytes digits = in_register(own[q].digits[p]);
                    for (int r = 0; r < kMicroRegisters; ++r) sum[r] = in_register(dot2(sum[r], codes[p][r], digits));
                }
                for (int r = 0; r < kMicroRegisters; ++r)
                    sums[r][q] = decltype(begins)::value ? widen(sum[r]) : sums[r][q] + widen(sum[r]);
            }
            from += 4 * 256;
            asm("" ::: "memory");  // one group after another: the codes of two do not fit the registers
        };
        add(Number<true>(), groups[0]);
        for (int g = 1; g < count; ++g) add(Number<false>(), groups[g]);
    }
};
#else
template <int Queries>
struct PanelDigits {
    const PanelQuery* queries;
    int fours;

    PanelDigits(const PanelQuery* ready, int count) : queries(ready), fours(count) {}
    void add_up(const uint8_t* from, Ints (&sums)[kMicroRegisters][Queries]) const {
        for (int q = 0; q < Queries; ++q)
            for (int r = 0; r < kMicroRegisters; ++r) sums[r][q] = splat_to<Ints>(queries[q].start);
        for (int p = 0; p < fours; ++p, from += 256) {
            Bytes codes[kMicroRegisters];
            for (int r = 0; r < kMicroRegisters; ++r) codes[r] = load<Bytes>(from + r * kRegisterBytes);
            for (int q = 0; q < Queries; ++q) {
                const int32_t digits = four_digits(queries[q].digits + 4 * p);
                for (int r = 0; r < kMicroRegisters; ++r) sums[r][q] = add_scores(sums[r][q], codes[r], digits);
            }
        }
    }
};
#endif

template <bool InUnits, int Queries>
inline void score_word(const uint8_t* codes, const float* steps, const PanelDigits<Queries>& digits,
                       const PanelQuery* queries, float* scores, size_t stride) {
    for (int first = 0; first < 4 * kParts; first += kMicroRegisters) {
        Ints sums[kMicroRegisters][Queries];
        digits.add_up(codes + first * kRegisterBytes, sums);
        for (int r = 0; r < kMicroRegisters; ++r) {
            const int at = (first + r) * kPartLanes;
            const Floats step = load<Floats>(steps + at);
            // What the starts were rounded by, half a unit at most, stands in the band (DESIGN.md, "Prompts").
            for (int q = 0; q < Queries; ++q) {
                const Floats score = convert<Floats>(sums[r][q]) * step;
                store(scores + q * stride + at, InUnits ? score : score * queries[q].unit + queries[q].centre);
            }
        }
    }
}

// scores[q][64 * word + i] for the words [begin, end) of the panel: logits or, in the units of each query,
// (logit - centre) / unit.
void score_panel(const CodedPanel* panel, int dim, size_t begin, size_t end, const PanelQuery* queries, int count,
                 bool in_units, float* scores, size_t stride) {
    const int fours = (dim + 7) / 8 * 2;
    for (int first = 0; first < count; first += kMicroQueries) {
        const int here = count - first < kMicroQueries ? count - first : kMicroQueries;
        const auto score = [&](auto number) {
            const PanelDigits<decltype(number)::value> digits(queries + first, fours);
            const auto score_words = [&](auto units) {
                for (size_t word = begin; word < end; ++word)
                    score_word<decltype(units)::value>(panel->codes + word * size_t(fours) * 256,
                                                       panel->steps + word * 64, digits, queries + first,
                                                       scores + size_t(first) * stride + word * 64, stride);
            };
            if (in_units)
                score_words(Number<true>());
            else
                score_words(Number<false>());
        };
        with_number<kMicroQueries>(here, score);
    }
}

// Of logits[count] (a multiple of 64 is read, -inf is nothing): those from the threshold on, in order, with their
// positions; the mass of the others relative to 2^reference, from above; and how many of them stand in words of 64
// without a kept one. kept and positions have room for count + 16.
size_t select_row(const float* logits, size_t count, float threshold, float reference, uint32_t first,
                  uint32_t* positions, float* kept, float* omitted, uint32_t* keys_skipped) {
    const i32x16 lane = lane_numbers();
    size_t found = 0;
    uint32_t skipped = 0;
    f32x16 sum[2] = {};
    const f32x16 from = splat(threshold > kLowest ? threshold : kLowest);  // hidden keys are never kept
    const PowerAbove power(reference);
    for (size_t i = 0; i < count; i += 64) {
        uint32_t mask[4];
        for (int b = 0; b < 4; ++b) {
            const f32x16 x = load<f32x16>(logits + i + 16 * b);
            const Truth reaches = truth_ge(x, from);
            mask[b] = bits(reaches);
            sum[b % 2] += except(reaches, power(x));
        }
        if (!(mask[0] | mask[1] | mask[2] | mask[3])) {
            skipped += uint32_t(count - i < 64 ? count - i : 64);
            continue;
        }
        for (int b = 0; b < 4; ++b) {
            compress(mask[b], lane + int32_t(first + i + 16 * b), positions + found);
            compress(mask[b], load<i32x16>(logits + i + 16 * b), (uint32_t*)(kept + found));
            found += size_t(__builtin_popcount(mask[b]));
        }
    }
    *omitted = sum_of(sum[0] + sum[1]);
    *keys_skipped = skipped;
    return found;
}

// weights = 2^(logits - reference), also past `count` up to a multiple of 16; their sum. Relative error below
// 3e-7 (1 + |logit - reference|).
double weigh(const float* logits, size_t count, float reference, float* weights) {
    f32x16 sum = {};
    for (size_t i = 0; i < count; i += 16) {
        f32x16 w = exp_of((load<f32x16>(logits + i) - reference) * 0.69314718f);
        if (count - i < 16) w = select(lanes_below(int(count - i)), w, f32x16{});
        store(weights + i, w);
        sum += w;
    }
    return sum_of(sum);
}

// curve[j] = mass of the logits below top - j relative to 2^top, where top is the largest, which is returned; curve[0]
// is all of it.
float mass_curve(const float* logits, size_t count, float* curve) {
    f32x16 most = splat(-kInfinity), sums[kCurve] = {};
    for (size_t i = 0; i < count; i += 16) most = max_of(most, load<f32x16>(logits + i));
    const float top = max_of_lanes(most);
    if (top == -kInfinity) return top;
    const PowerAbove power(top);
    for (size_t i = 0; i < count; i += 16) {
        const f32x16 x = load<f32x16>(logits + i), weight = power(x);
        sums[0] += weight;
        for (int j = 1; j < kCurve; ++j) sums[j] += select(x < splat(top - float(j)), weight, f32x16{});
    }
    for (int j = 0; j < kCurve; j += 4) sums_of_4(sums + j, curve + j);
    return top;
}

float largest_of(const float* x, size_t count) {
    f32x16 top = splat(-kInfinity);
    for (size_t i = 0; i < count; i += 16) {
        const f32x16 v = load<f32x16>(x + i);
        top = max_of(top, count - i < 16 ? select(lanes_below(int(count - i)), v, splat(-kInfinity)) : v);
    }
    return max_of_lanes(top);
}

// Where x reaches `from`: the places, and what stands there in `positions`. Both lists have room for count + 16.
size_t places_from(const float* x, size_t count, float from, const uint32_t* positions, uint32_t* places,
                   uint32_t* chosen) {
    const i32x16 lane = lane_numbers();
    size_t found = 0;
    for (size_t i = 0; i < count; i += 16) {
        uint32_t mask = mask_ge(load<f32x16>(x + i), splat(from));
        if (count - i < 16) mask &= (1u << (count - i)) - 1;
        compress(mask, lane + int32_t(i), places + found);
        compress(mask, load<i32x16>(positions + i), chosen + found);
        found += size_t(__builtin_popcount(mask));
    }
    return found;
}

// total[Wide] += sum of weights[i] * values(row keys[i])[Wide]. Several short chains are quicker than one, and they
// round less.
template <int Wide, class Values>
inline void add_rows(const uint8_t* rows, size_t stride, const uint32_t* keys, const float* weights, size_t count,
                     f32x16* total, const Values& values) {
    constexpr int kChains = kParts == 1 ? 4 : 1;  // as many as registers allow
    for (size_t first = 0; first < count; first += kSumPiece) {
        const size_t end = first + kSumPiece < count ? first + kSumPiece : count;
        f32x16 sum[kChains][Wide] = {};
        const auto add = [&](size_t i, f32x16* own) {
            f32x16 value[Wide];
            values(rows + keys[i] * stride, value);
            for (int j = 0; j < Wide; ++j) own[j] += weights[i] * value[j];
        };
        size_t i = first;
        for (; i + kChains <= end; i += kChains)
            for (int c = 0; c < kChains; ++c) add(i + size_t(c), sum[c]);
        for (; i < end; ++i) add(i, sum[0]);
        for (int j = 0; j < Wide; ++j) {
            if constexpr (kChains == 4)
                total[j] += (sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j]);
            else
                total[j] += sum[0][j];
        }
    }
}

// accumulator += sum of weights[i] * row keys[i], for 16 * Wide coordinates from `at` on.
template <Dtype Type, int Wide, bool Part>
inline void accumulate_strip(const uint8_t* rows, size_t stride, const uint32_t* keys, const float* weights,
                             size_t count, int at, int lanes, float* accumulator) {
    f32x16 total[Wide];
    for (int j = 0; j < Wide; ++j) total[j] = load<f32x16>(accumulator + at + 16 * j);
    add_rows<Wide>(rows, stride, keys, weights, count, total, [&](const uint8_t* row, f32x16* value) {
        for (int j = 0; j < Wide; ++j)
            value[j] = Part ? load_row_part(Type, row, at, lanes) : load_row(Type, row, at + 16 * j);
    });
    for (int j = 0; j < Wide; ++j) store(accumulator + at + 16 * j, total[j]);
}

// The same for 64 coordinates in bfloat16.
inline void accumulate_bfloat16(const uint8_t* rows, size_t stride, const uint32_t* keys, const float* weights,
                                size_t count, int at, float* accumulator) {
    f32x16 total[4];  // even ones, odd ones, of each 32
    const auto put = [](const Halves& from, int j, f32x16* to) {
        to[2 * j] = from.even;
        to[2 * j + 1] = from.odd;
    };
    for (int j = 0; j < 2; ++j) put(take_apart(accumulator + at + 32 * j), j, total);
    add_rows<4>(rows, stride, keys, weights, count, total, [&](const uint8_t* row, f32x16* value) {
        for (int j = 0; j < 2; ++j) put(bfloat16_halves(row + 2 * at + 64 * j), j, value);
    });
    for (int j = 0; j < 2; ++j) put_together({total[2 * j], total[2 * j + 1]}, accumulator + at + 32 * j);
}

template <Dtype Type>
inline void accumulate_typed(const uint8_t* rows, size_t stride, const uint32_t* keys, const float* weights,
                             size_t count, int dim, float* accumulator) {
    int at = 0;
    for (; at + 64 <= dim; at += 64) {
        if constexpr (Type == Dtype::bfloat16)
            accumulate_bfloat16(rows, stride, keys, weights, count, at, accumulator);
        else
            accumulate_strip<Type, 4, false>(rows, stride, keys, weights, count, at, 16, accumulator);
    }
    for (; at + 16 <= dim; at += 16)
        accumulate_strip<Type, 1, false>(rows, stride, keys, weights, count, at, 16, accumulator);
    if (at < dim)  // accumulators are padded to 16
        accumulate_strip<Type, 1, true>(rows, stride, keys, weights, count, at, dim - at, accumulator);
}

void accumulate_rows(Dtype dtype, const void* rows, size_t stride, const uint32_t* keys, const float* weights,
                     size_t count, int dim, float* accumulator) {
    const uint8_t* from = (const uint8_t*)rows;
    switch (dtype) {
        case Dtype::float32:
            return accumulate_typed<Dtype::float32>(from, stride, keys, weights, count, dim, accumulator);
        case Dtype::bfloat16:
            return accumulate_typed<Dtype::bfloat16>(from, stride, keys, weights, count, dim, accumulator);
        default: return accumulate_typed<Dtype::float16>(from, stride, keys, weights, count, dim, accumulator);
    }
}

constexpr int kDenseWide = kParts == 1 ? 4 : 1;

template <Dtype Type, int Wide, bool Part>
inline void accumulate_dense_strip(const uint8_t* rows, size_t stride, size_t count, const float* weights, int at,
                                   int lanes, float* accumulators, size_t accumulator_stride) {
    for (size_t first = 0; first < count; first += kSumPiece) {
        const size_t end = first + kSumPiece < count ? first + kSumPiece : count;
        f32x16 sum[kDenseRows][Wide] = {};
        for (size_t i = first; i < end; ++i, rows += stride, weights += kDenseStride) {
            f32x16 value[Wide];
            for (int j = 0; j < Wide; ++j)
                value[j] = Part ? load_row_part(Type, rows, at, lanes) : load_row(Type, rows, at + 16 * j);
            for (int q = 0; q < kDenseRows; ++q)
                for (int j = 0; j < Wide; ++j) sum[q][j] += weights[q] * value[j];
        }
        for (int q = 0; q < kDenseRows; ++q)
            for (int j = 0; j < Wide; ++j) {
                float* to = accumulators + q * accumulator_stride + at + 16 * j;
                store(to, load<f32x16>(to) + sum[q][j]);
            }
    }
}

template <Dtype Type>
inline void accumulate_dense_typed(const uint8_t* rows, size_t stride, size_t count, const float* weights, int dim,
                                   float* accumulators, size_t accumulator_stride) {
    int at = 0;
    for (; at + 16 * kDenseWide <= dim; at += 16 * kDenseWide)
        accumulate_dense_strip<Type, kDenseWide, false>(rows, stride, count, weights, at, 16, accumulators,
                                                        accumulator_stride);
    for (; at + 16 <= dim; at += 16)
        accumulate_dense_strip<Type, 1, false>(rows, stride, count, weights, at, 16, accumulators, accumulator_stride);
    if (at < dim)
        accumulate_dense_strip<Type, 1, true>(rows, stride, count, weights, at, dim - at, accumulators,
                                              accumulator_stride);
}

// accumulators[q] += sum of weights[i][q] * row i, for kDenseRows queries
void accumulate_dense(Dtype dtype, const void* rows, size_t stride, size_t count, const float* weights, int dim,
                      float* accumulators, size_t accumulator_stride) {
    const uint8_t* from = (const uint8_t*)rows;
    switch (dtype) {
        case Dtype::float32:
            return accumulate_dense_typed<Dtype::float32>(from, stride, count, weights, dim, accumulators,
                                                          accumulator_stride);
        case Dtype::bfloat16:
            return accumulate_dense_typed<Dtype::bfloat16>(from, stride, count, weights, dim, accumulators,
                                                           accumulator_stride);
        default:
            return accumulate_dense_typed<Dtype::float16>(from, stride, count, weights, dim, accumulators,
                                                          accumulator_stride);
    }
}

// out[i] = scale * <query, row keys[i]> in float32; query is padded with zeros to a multiple of 16. out has room for
// a multiple of 4. Dim: where it is not 0, the dimension, known to the compiler.
template <Dtype Type, int Dim>
inline void dot_typed(const uint8_t* rows, size_t stride, const uint32_t* keys, size_t count, const float* query,
                      int any_dim, float scale, float* out) {
    const int dim = Dim ? Dim : any_dim, whole = dim / 16 * 16;
    constexpr bool kApart = Type == Dtype::bfloat16 && Dim > 0;  // Dim is a multiple of 32 then
    Halves apart[kApart ? Dim / 32 : 1];
    if constexpr (kApart)
        for (int j = 0; j < Dim / 32; ++j) apart[j] = take_apart(query + 32 * j);
    const auto dot = [&](size_t key) {
        const uint8_t* row = rows + key * stride;
        f32x16 sum[2] = {};
        if constexpr (kApart) {
            for (int j = 0; j < Dim / 32; ++j) {
                const Halves x = bfloat16_halves(row + 64 * j);
                sum[0] += x.even * apart[j].even;
                sum[1] += x.odd * apart[j].odd;
            }
            return sum[0] + sum[1];
        }
        for (int at = 0; at < whole; at += 16) sum[at / 16 % 2] += load_row(Type, row, at) * load<f32x16>(query + at);
        if (whole < dim) sum[1] += load_row_part(Type, row, whole, dim - whole) * load<f32x16>(query + whole);
        return sum[0] + sum[1];
    };
    for (size_t i = 0; i < count; i += 4) {
        const size_t last = count - i < 4 ? count - 1 : i + 3;  // repeated where fewer than four are left
        f32x16 sums[4];
        for (size_t k = 0; k < 4; ++k) sums[k] = scale * dot(keys[i + k < last ? i + k : last]);
        sums_of_4(sums, out + i);
    }
}

template <Dtype Type>
inline void dot_dims(const uint8_t* rows, size_t stride, const uint32_t* keys, size_t count, const float* query,
                     int dim, float scale, float* out) {
    if (dim == 64) return dot_typed<Type, 64>(rows, stride, keys, count, query, dim, scale, out);
    if (dim == 128) return dot_typed<Type, 128>(rows, stride, keys, count, query, dim, scale, out);
    dot_typed<Type, 0>(rows, stride, keys, count, query, dim, scale, out);
}

void dot_rows(Dtype dtype, const void* rows, size_t stride, const uint32_t* keys, size_t count, const float* query,
              int dim, float scale, float* out) {
    const uint8_t* from = (const uint8_t*)rows;
    switch (dtype) {
        case Dtype::float32: return dot_dims<Dtype::float32>(from, stride, keys, count, query, dim, scale, out);
        case Dtype::bfloat16: return dot_dims<Dtype::bfloat16>(from, stride, keys, count, query, dim, scale, out);
        default: return dot_dims<Dtype::float16>(from, stride, keys, count, query, dim, scale, out);
    }
}

// As dot_rows, in float64, without a scale. Products of float32 numbers are exact there.
template <Dtype Type>
inline void dot64_typed(const uint8_t* rows, size_t stride, const uint32_t* keys, size_t count, const float* query,
                        int dim, double* out) {
    const int whole = dim / 16 * 16;
    f64x8 digits[kMaxHeadDim / 8];
    for (int at = 0; at < dim; at += 8) digits[at / 8] = convert<f64x8>(load<f32x8>(query + at));
    for (size_t i = 0; i < count; ++i) {
        const uint8_t* row = rows + keys[i] * stride;
        f64x8 sum[2] = {};
        for (int at = 0; at < dim; at += 16) {
            const f32x16 x = at < whole ? load_row(Type, row, at) : load_row_part(Type, row, at, dim - at);
            sum[0] += convert<f64x8>(lower(x)) * digits[at / 8];
            if (at + 8 < dim) sum[1] += convert<f64x8>(upper(x)) * digits[at / 8 + 1];
        }
        out[i] = sum_of(sum[0] + sum[1]);
    }
}

void dot_rows64(Dtype dtype, const void* rows, size_t stride, const uint32_t* keys, size_t count, const float* query,
                int dim, double* out) {
    const uint8_t* from = (const uint8_t*)rows;
    switch (dtype) {
        case Dtype::float32: return dot64_typed<Dtype::float32>(from, stride, keys, count, query, dim, out);
        case Dtype::bfloat16: return dot64_typed<Dtype::bfloat16>(from, stride, keys, count, query, dim, out);
        default: return dot64_typed<Dtype::float16>(from, stride, keys, count, query, dim, out);
    }
}

// Keys that a byte mask hides (zero) become -inf.
void hide_masked(const uint8_t* mask, size_t count, float* logits) {
    for (size_t i = 0; i < count; ++i) logits[i] = mask[i] ? logits[i] : -kInfinity;
}

// Every kernel, once. Included by one file per level with HSR_LEVEL set; see README.md.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/kernels.h"

namespace hsr {
namespace {

// in this order
#include "kernels/lanes.h"

#include "kernels/simd.h"

#include "kernels/dots.h"

constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.0e38f;  // estimates at or below are keys that may not be seen

// ------------------------------------------------------------------ conversion and rotation

void to_float(Dtype dtype, const void* source, float* target, size_t count) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16) store(target + i, load_row(dtype, source, int(i)));
    if (i < count) {
        const f32x16 last = load_row_part(dtype, source, int(i), int(count - i));
        __builtin_memcpy(target + i, &last, (count - i) * 4);
    }
}

bool all_within(Dtype dtype, const void* source, size_t count, float limit) {
    const f32x16 most = splat(limit);
    uint32_t within = 0xffffu;
    size_t i = 0;
    for (; i + 16 <= count; i += 16) within &= mask_ge(most, abs_of(load_row(dtype, source, int(i))));
    if (i < count) within &= mask_ge(most, abs_of(load_row_part(dtype, source, int(i), int(count - i))));
    return within == 0xffffu;
}

void rotate(const float* matrix, int dim, const float* x, size_t count, float* y) {
    const int wide = (dim + 15) / 16 * 16;
    for (size_t row = 0; row < count; ++row, x += dim, y += wide) {
        int at = 0;
        for (; at + 64 <= wide; at += 64) {
            f32x16 sum[4] = {};
            for (int i = 0; i < dim; ++i)
                for (int j = 0; j < 4; ++j) sum[j] += x[i] * load<f32x16>(matrix + size_t(i) * wide + at + 16 * j);
            for (int j = 0; j < 4; ++j) store(y + at + 16 * j, sum[j]);
        }
        for (; at < wide; at += 16) {
            f32x16 sum = {};
            for (int i = 0; i < dim; ++i) sum += x[i] * load<f32x16>(matrix + size_t(i) * wide + at);
            store(y + at, sum);
        }
    }
}

// ------------------------------------------------------------------ coding

inline double sum_of(f64x8 s) {
    double lanes[8];
    store(lanes, s);
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Sums over the two eights (kernels.h) of sixteen coordinates.
inline void sums_of_eights(f32x16 x, float sums[2]) {
    float fours[8];
    store(fours, lower(x) + upper(x));
    sums[0] = (fours[0] + fours[1]) + (fours[4] + fours[5]);
    sums[1] = (fours[2] + fours[3]) + (fours[6] + fours[7]);
}

// The largest norm of an eight of y * scale.
inline float norm_of_eights(const float* y, int wide, float scale) {
    float most = 0;
    for (int at = 0; at < wide; at += 16) {
        const f32x16 x = load<f32x16>(y + at) * scale;
        float squares[2];
        sums_of_eights(x * x, squares);
        for (float own : squares)
            if (own > most) most = own;
    }
    return float(__builtin_sqrt(double(most)));
}

// What becomes the digit 127.
inline float most_of(const float* y, int wide) {
    f32x16 top = {};
    for (int at = 0; at < wide; at += 16) top = max_of(top, abs_of(load<f32x16>(y + at)));
    float most = max_of_lanes(top);
    if constexpr (kDigitPairs)  // each of two is rounded by at most a half: 127 become 128
        for (int at = 0; at < wide; at += 2) {
            const float both = __builtin_fabsf(y[at] + y[at + 1]);
            if (both > most) most = both;
        }
    return most;
}

// The digits of one rotated query; both lists and y are padded with zeros to a multiple of 16.
void split_query(const float* y, int dim, int8_t* high, int8_t* low, QueryDigits* found) {
    const int wide = (dim + 15) / 16 * 16;
    const double most = most_of(y, wide), step = most > 0 ? most / 127.0 : 1.0, inverse = 1.0 / step;
    const auto nearest = [](f64x8 x) {  // |x| <= 127.5
        const f64x8 zero = {}, half = zero + 0.5;
        const i32x8 digit = convert<i32x8>(x + select(x < zero, -half, half));
        return max_of(min_of(digit, splat_to<i32x8>(127)), splat_to<i32x8>(-127));
    };
    f64x8 rest4 = {}, rest8 = {};
    i32x8 high_sum = {}, low_sum = {};
    for (int at = 0; at < wide; at += 8) {
        const f64x8 x = convert<f64x8>(load<f32x8>(y + at)) * inverse;
        const i32x8 first = nearest(x);
        const f64x8 after_high = x - convert<f64x8>(first);
        const i32x8 second = nearest(after_high * double(kFiner));
        const f64x8 after_low = after_high - convert<f64x8>(second) * (1.0 / double(kFiner));
        rest4 += after_high * after_high;
        rest8 += after_low * after_low;
        high_sum += first;
        low_sum += second;
        store(high + at, convert<i8x8>(first));
        store(low + at, convert<i8x8>(second));
    }
    found->step = step;
    found->rest4 = __builtin_sqrt(sum_of(rest4));
    found->rest8 = __builtin_sqrt(sum_of(rest8));
    found->high_sum = found->low_sum = 0;
    int32_t lanes[16];
    store(lanes, high_sum);
    store(lanes + 8, low_sum);
    for (int i = 0; i < 8; ++i) {
        found->high_sum += lanes[i];
        found->low_sum += lanes[8 + i];
    }
}

inline void add_squares(f64x8& sum, f32x16 r) {
    const f64x8 a = convert<f64x8>(lower(r)), b = convert<f64x8>(upper(r));
    sum += a * a + b * b;
}

inline i32x16 lanes_below(int count) { return lane_numbers() < splat(count); }

// Norms outside [1e-30, 1e30] are not coded: squares and reciprocals in float32 would leave its range.
// The residual alone then bounds the score: the norm itself, or infinity ("always verify").
void code_keys(int dim, const float* y, const double* norms, double relative_slack, uint8_t* high, uint8_t* low) {
    const int wide = (dim + 15) / 16 * 16, eight = (dim + 7) / 8 * 8;
    const size_t bytes = size_t(eight) / 8 * 64;
    __builtin_memset(high, 0, bytes + 64);
    __builtin_memset(low, 0, bytes + 32);
    for (int key = 0; key < kBlock; ++key, y += wide) {
        const double norm = norms[key];
        uint16_t step_bits = 0, residual4, residual8;
        if (!(norm >= 1e-30) || !(norm <= 1e30)) {
            const bool tiny = norm < 1e-30;
            // 1e-36 covers everything that float32 may have flushed to zero on the way here.
            residual4 = residual8 = bfloat16_up(tiny ? float(norm * 1.000001 + 1e-36) : kInfinity);
        } else {
            f32x16 top = {};
            for (int at = 0; at < wide; at += 16) top = max_of(top, abs_of(load<f32x16>(y + at)));
            const float fine = max_of_lanes(top) * (1.000001f / 127.5f);
            // A code is off by a half, an eight by sqrt(2).
            const float excess = norm_of_eights(y, wide, 1.0f / fine) / (kEightNorm - 1.5f);
            step_bits = bfloat16_up(excess > 1 ? fine * excess * 1.00001f : fine);
            const float step = bfloat16_value(step_bits), inverse = 1.0f / step;
            f64x8 sum4 = {}, sum8 = {};
            alignas(64) uint8_t codes[kMaxHeadDim];
            for (int at = 0; at < wide; at += 16) {
                const f32x16 v = load<f32x16>(y + at);
                const i32x16 code = max_of(min_of(convert<i32x16>(v * inverse + 128.0f), splat(255)), splat(0));
                const i32x16 h = code >> 4, inside = lanes_below(dim - at);
                const f32x16 r8 = v - step * (convert<f32x16>(code) - 127.5f);
                const f32x16 r4 = v - step * (16.0f * (convert<f32x16>(h) - 7.5f));
                add_squares(sum8, select(inside, r8, f32x16{}));
                add_squares(sum4, select(inside, r4, f32x16{}));
                store(codes + at, unsigned_bytes(code));
            }
            // Four dimensions at once: the low nibbles of a plane's word, then the high ones.
            for (int p = 0; p < eight / 8; ++p) {
                uint32_t first, second;
                __builtin_memcpy(&first, codes + 8 * p, 4);
                __builtin_memcpy(&second, codes + 8 * p + 4, 4);
                const uint32_t h = ((first >> 4) & 0x0f0f0f0fu) | (second & 0xf0f0f0f0u),
                               l = (first & 0x0f0f0f0fu) | ((second << 4) & 0xf0f0f0f0u);
                __builtin_memcpy(high + p * 64 + key * 4, &h, 4);
                __builtin_memcpy(low + p * 64 + key * 4, &l, 4);
            }
            // The slack covers the rounding of the rotation and of the residuals themselves.
            const double slack = relative_slack * norm + 1e-36;
            residual4 = bfloat16_up(float((__builtin_sqrt(sum_of(sum4)) + slack + kQueryShare * norm) * 1.000001));
            residual8 = bfloat16_up(float((__builtin_sqrt(sum_of(sum8)) + slack) * 1.000001));
        }
        __builtin_memcpy(high + bytes + 2 * key, &step_bits, 2);
        __builtin_memcpy(high + bytes + 32 + 2 * key, &residual4, 2);
        __builtin_memcpy(low + bytes + 2 * key, &residual8, 2);
    }
}

void code_value(int dim, const float* value, uint8_t* row, uint8_t* parameters) {
    for (int first = 0; first < dim; first += kValueGroup, row += 16, parameters += 64) {
        const int size = dim - first < kValueGroup ? dim - first : kValueGroup;
        f32x16 x[2];  // a group that is not full goes on with its first coordinate
        if (size == kValueGroup) {
            for (int h = 0; h < 2; ++h) x[h] = load<f32x16>(value + first + 16 * h);
        } else {
            float padded[kValueGroup];
            for (int i = 0; i < kValueGroup; ++i) padded[i] = value[first + (i < size ? i : 0)];
            for (int h = 0; h < 2; ++h) x[h] = load<f32x16>(padded + 16 * h);
        }
        const float least = -max_of_lanes(max_of(-x[0], -x[1])), most = max_of_lanes(max_of(x[0], x[1]));
        // Largest bfloat16 <= least: truncation moves towards zero, so negative values step once more.
        uint32_t bits;
        __builtin_memcpy(&bits, &least, 4);
        if ((bits >> 31) && (bits & 0xffffu)) bits += 0x10000u;
        const uint16_t offset_bits = uint16_t(bits >> 16);
        const float offset = bfloat16_value(offset_bits);
        const float span = most - offset;
        const bool tiny = span < 1e-34f;  // 1 / step would overflow: code 0, half a step covers it
        const uint16_t step_bits = bfloat16_up(span * (tiny ? 2.0f : 1.000001f / 15.0f));
        const float step = bfloat16_value(step_bits), inverse = tiny ? 0.0f : 1.0f / step;
        i32x16 code[2];
        for (int h = 0; h < 2; ++h) {
            code[h] = max_of(min_of(convert<i32x16>((x[h] - offset) * inverse + 0.5f), splat(15)), splat(0));
            if (size < kValueGroup) code[h] = select(lanes_below(size - 16 * h), code[h], i32x16{});
        }
        store(row, unsigned_bytes(code[0] | (code[1] << 4)));
        __builtin_memcpy(parameters, &step_bits, 2);
        __builtin_memcpy(parameters + 32, &offset_bits, 2);
    }
}

// ------------------------------------------------------------------ the scan of the first plane

// Measured at d = 64, one thread, codes in memory: 25 GB/s at 4.5 KiB, 28 at 9, 32 at 18, 35 from the second cache
// (AVX-512); 13.4 at 16 KiB, 13.9 at 32 (AVX2, Zen 3).
constexpr size_t kBytesAhead = 32768;

// Blocks scored together share each load of the queries' digits, which would else be what limits the loop.
constexpr int kScanBlocks = kParts == 1 ? 2 : 1;

// What a scan needs of a query, away from memory that might be what it writes to.
struct ScanQuery {
    const int8_t* digits;
    DigitStarts starts;
    float offset, factor, centre;
    ScanQuery(const CodedQuery& query, int dim)
        : digits(query.high),
          starts(digits, (dim + 7) / 8),
          offset(7.5f * query.high_sum + float(starts.total())),
          factor(16.0f * query.unit),
          centre(query.centre) {}
    Together estimate(const Together& step, const Together& dot) const {
        return step * (factor * (dot - offset)) + centre;
    }
};
template <int Count>
struct ScanQueries {
    ScanQuery own[Count];
    ScanQueries(const CodedQuery* queries, int dim)
        : ScanQueries(queries, dim, std::make_integer_sequence<int, Count>()) {}

private:
    template <int... I>
    ScanQueries(const CodedQuery* queries, int dim, std::integer_sequence<int, I...>)
        : own{ScanQuery(queries[I], dim)...} {}
};

// Estimates of `Blocks` neighbouring blocks of one tile, as many registers of keys as stand together at a time, `part`
// the first: take(block, part, query, step, residual, dot). `Pairs` of dimensions by fours, or 0: as many as `dim`
// says.
template <int Count, int Blocks, int Pairs, class Take>
inline void score_together(const uint8_t* high, int dim, size_t spacing, const ScanQuery* queries, const Take& take) {
    const int pairs = Pairs ? Pairs : (dim + 7) / 8;
    const size_t bytes = size_t(pairs) * 64, apart = spacing * (bytes + 64);
    for (int part = 0; part < kParts; part += kPartsTogether) {
        PlaneSum sum[Blocks * kPartsTogether][Count];
        in_turns(
            pairs,
            [&](int turn) {
                for (auto& of_queries : sum)
                    for (int q = 0; q < Count; ++q) of_queries[q].begin(queries[q].starts.of_turn(turn));
            },
            [&](int p) {
                for (int k = 0; k < Blocks; ++k) {
                    const uint8_t* line = high + k * apart + p * 64;
                    if (part == 0) __builtin_prefetch(line + kBytesAhead);
                    PlaneCodes codes[kPartsTogether];
                    for (int i = 0; i < kPartsTogether; ++i)
                        codes[i] = PlaneCodes(load<Bytes>(line + (part + i) * kRegisterBytes));
                    for (int q = 0; q < Count; ++q) {
                        const int32_t digits = four_digits(queries[q].digits + 8 * p),
                                      more = four_digits(queries[q].digits + 8 * p + 4);
                        for (int i = 0; i < kPartsTogether; ++i)
                            sum[k * kPartsTogether + i][q].add(codes[i], digits, more);
                    }
                }
            },
            [&] { settle_all(sum); });
        for (int k = 0; k < Blocks; ++k) {
            const uint8_t* steps = high + k * apart + bytes;
            if (part == 0) __builtin_prefetch(steps + kBytesAhead);
            const Together step = part_of_bfloat16<Together>(steps, part),
                           residual = part_of_bfloat16<Together>(steps + 32, part);
            for (int q = 0; q < Count; ++q) {
                const Together dot =
                    of_parts<Together>([&](int i) { return convert<Floats>(sum[k * kPartsTogether + i][q].total()); });
                take(k, part, q, step, residual, dot);
            }
        }
    }
}

// Of `blocks` blocks, every `spacing`-th.
template <int Count, int Pairs, class Take>
inline void score_blocks(const uint8_t* high, int dim, size_t blocks, size_t spacing, const ScanQuery* queries,
                         const Take& take) {
    const size_t bytes = spacing * (size_t(dim + 7) / 8 * 64 + 64);
    size_t block = 0;
    const auto shifted = [&](int k, auto... rest) { take(block + size_t(k), rest...); };
    for (; block + kScanBlocks <= blocks; block += kScanBlocks)
        score_together<Count, kScanBlocks, Pairs>(high + block * bytes, dim, spacing, queries, shifted);
    if (block < blocks) score_together<Count, 1, Pairs>(high + block * bytes, dim, spacing, queries, shifted);
}

// body(Number<pairs>()) for the two widths of most models, whose sums then stay in registers; Number<0>() for others.
template <class Body>
inline void with_pairs(int dim, const Body& body) {
    if (dim == 64) return body(Number<8>());
    if (dim == 128) return body(Number<16>());
    body(Number<0>());
}
// body(count, pairs). Functions of their own: taken together with those of other counts, GCC keeps sums in memory.
template <class Body>
inline void with_shape(int count, int dim, const Body& body) {
    with_number<kTile>(count, [&](auto number) { with_pairs(dim, [&](auto pairs) { body(number, pairs); }); });
}

template <int Count, int Pairs>
[[gnu::noinline]] void scan_tile(const uint8_t* high, int dim, size_t blocks, size_t spacing, const CodedQuery* queries,
                                 float* estimates, size_t stride, float* maxima) {
    const ScanQueries<Count> scanned(queries, dim);
    Together top[Count];
    for (int q = 0; q < Count; ++q) top[q] = splat_to<Together>(maxima[q]);
    score_blocks<Count, Pairs>(high, dim, blocks, spacing, scanned.own,
                               [&](size_t block, int part, int q, Together step, Together, Together dot) {
                                   const Together estimate = scanned.own[q].estimate(step, dot);
                                   top[q] = max_of(top[q], estimate);
                                   store(estimates + q * stride + block * 16 + part * kPartLanes, estimate);
                               });
    for (int q = 0; q < Count; ++q) maxima[q] = max_of_lanes(top[q]);
}

void scan(const uint8_t* high, int dim, size_t blocks, size_t spacing, const CodedQuery* queries, int count,
          float* estimates, size_t stride, float* maxima) {
    with_shape(count, dim, [&](auto number, auto pairs) {
        scan_tile<decltype(number)::value, decltype(pairs)::value>(high, dim, blocks, spacing, queries, estimates,
                                                                   stride, maxima);
    });
}

// What makes upper bounds of estimates, away from memory that might be what is written to.
struct ScanBand {
    float slope, slope_step, slack;
    Together operator()(const Together& step, const Together& residual) const {
        return slope * residual + slope_step * step + slack;
    }
};
template <int Count>
struct ScanBands {
    ScanBand own[Count];
    explicit ScanBands(const CodedQuery* queries) {
        for (int q = 0; q < Count; ++q) own[q] = {queries[q].slope4, queries[q].slope4_step, queries[q].slack};
    }
};

void scale(float* x, size_t count, float factor) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16) store(x + i, load<f32x16>(x + i) * factor);
    for (; i < count; ++i) x[i] *= factor;
}

inline float exp_of_one(float x) { return max_of_lanes(exp_of(splat(x))); }

// As flash attention keeps its running maximum: weights are relative to a logit that was seen. Another one takes its
// place, and what was added up is scaled, only when it leads by so much that a weight might not fit float32.
constexpr float kHeadroom = 40.0f;  // nats; CoarseExp bears 80

template <int Count, int Pairs>
[[gnu::noinline]] void scan_mass_tile(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries,
                                      float* uppers, size_t stride, float* maxima, double* masses) {
    const size_t bytes = size_t(dim + 7) / 8 * 64 + 64;
    const ScanQueries<Count> scanned(queries, dim);
    const ScanBands<Count> bands(queries);
    CoarseExp weight_of[Count];
    float reference[Count];
    Together top[Count], sum[Count];
    for (int q = 0; q < Count; ++q) top[q] = splat_to<Together>(-3.0e38f), sum[q] = Together{};
    score_blocks<Count, Pairs>(high, dim, 1, 1, scanned.own,
                               [&](size_t, int, int q, Together step, Together, Together dot) {
                                   top[q] = max_of(top[q], scanned.own[q].estimate(step, dot));
                               });
    for (int q = 0; q < Count; ++q) weight_of[q] = CoarseExp(reference[q] = max_of_lanes(top[q]));
    for (size_t first = 0; first < blocks; first += kMassBlocks) {
        const size_t count = blocks - first < kMassBlocks ? blocks - first : kMassBlocks;
        Together here[Count];
        for (bool again = true; again;) {
            for (Together& mass : here) mass = Together{};
            score_blocks<Count, Pairs>(
                high + first * bytes, dim, count, 1, scanned.own,
                [&](size_t block, int part, int q, Together step, Together residual, Together dot) {
                    const Together estimate = scanned.own[q].estimate(step, dot);
                    top[q] = max_of(top[q], estimate);
                    here[q] += weight_of[q](estimate);
                    store(uppers + q * stride + (first + block) * 16 + part * kPartLanes,
                          estimate + bands.own[q](step, residual));
                });
            again = false;
            for (int q = 0; q < Count; ++q) {
                const float highest = max_of_lanes(top[q]);
                if (!(highest > reference[q] + kHeadroom)) continue;
                sum[q] *= exp_of_one(reference[q] - highest);
                weight_of[q] = CoarseExp(reference[q] = highest);
                again = true;
            }
        }
        for (int q = 0; q < Count; ++q) sum[q] += here[q];
    }
    for (int q = 0; q < Count; ++q) {
        maxima[q] = max_of_lanes(top[q]);
        masses[q] = double(sum_of(sum[q])) * double(exp_of_one(reference[q] - maxima[q]));
    }
}

void scan_mass(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, int count, float* uppers,
               size_t stride, float* maxima, double* masses) {
    with_shape(count, dim, [&](auto number, auto pairs) {
        scan_mass_tile<decltype(number)::value, decltype(pairs)::value>(high, dim, blocks, queries, uppers, stride,
                                                                        maxima, masses);
    });
}

// exp(upper bound - reference) of a key, from its dot: the bits that CoarseExp makes, whose constants are taken into
// those of the estimate and of the band. What it adds for roundings and `slack` pay for the roundings here as well: of
// four numbers and three sums, no larger than those of estimates and of CoarseExp.
struct UpperWeight {
    static constexpr float kOne = 127.0f * 8388608.0f;  // of weight 1
    static constexpr float kMost = kOne + kHeadroom * CoarseExp::kPerUnit;
    float factor, offset, slope, start;
    UpperWeight() = default;
    UpperWeight(const CodedQuery& query, const ScanQuery& scanned, float reference) {
        const double per_nat = double(CoarseExp::kPerUnit), of_dot = per_nat * double(scanned.factor);
        factor = float(of_dot);
        offset = float(per_nat * double(query.slope4_step) - of_dot * double(scanned.offset));
        slope = float(per_nat * double(query.slope4));
        start = float(CoarseExp::start_at(double(reference)) + per_nat * (double(query.centre) + double(query.slack)));
    }
    Together bits(const Together& step, const Together& residual, const Together& dot) const {
        return step * (factor * dot + offset) + (slope * residual + start);
    }
    static float logit(float bits, float reference) { return reference + (bits - kOne) / CoarseExp::kPerUnit; }
};

template <int Count, int Pairs>
[[gnu::noinline]] void scan_blocks_tile(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries,
                                        float* references, float* block_masses, size_t mass_stride, float* sampled) {
    const size_t bytes = size_t(dim + 7) / 8 * 64 + 64;
    const ScanQueries<Count> scanned(queries, dim);
    UpperWeight weight_of[Count];
    ScanBand band_of[Count];  // in bits
    float reference[Count];
    Together top[Count];
    // What lies before block `before` becomes relative to the largest upper bound.
    const auto refer_to_top = [&](int q, size_t before) {
        const float to = UpperWeight::logit(max_of_lanes(top[q]), reference[q]);
        const float factor = exp_of_one(reference[q] - to);
        scale(block_masses + q * mass_stride, before, factor);
        for (size_t i = 0; i < before; i += kMassBlocks) sampled[i / kMassBlocks * kTile + q] *= factor;
        reference[q] = to;
        weight_of[q] = UpperWeight(queries[q], scanned.own[q], to);
        top[q] = splat_to<Together>(UpperWeight::kOne);
    };
    for (int q = 0; q < Count; ++q) {
        reference[q] = queries[q].centre;
        weight_of[q] = UpperWeight(queries[q], scanned.own[q], reference[q]);
        const float per_nat = CoarseExp::kPerUnit;
        band_of[q] = {per_nat * queries[q].slope4, per_nat * queries[q].slope4_step, per_nat * queries[q].slack};
        top[q] = splat_to<Together>(-3.0e38f);
    }
    score_blocks<Count, Pairs>(high, dim, 1, 1, scanned.own,
                               [&](size_t, int, int q, Together step, Together residual, Together dot) {
                                   top[q] = max_of(top[q], weight_of[q].bits(step, residual, dot));
                               });
    for (int q = 0; q < Count; ++q) refer_to_top(q, 0);
    for (size_t first = 0; first < blocks; first += kMassBlocks) {
        const size_t count = blocks - first < kMassBlocks ? blocks - first : kMassBlocks;
        Floats of_block[Count][kMassBlocks], of_sample[kTile];
        for (bool again = true; again;) {
            if (kPartsTogether < kParts || count < kMassBlocks)
                for (auto& of_query : of_block)
                    for (Floats& mass : of_query) mass = Floats{};
            for (Floats& mass : of_sample) mass = Floats{};
            score_blocks<Count, Pairs>(high + first * bytes, dim, count, 1, scanned.own,
                                       [&](size_t block, int, int q, Together step, Together residual, Together dot) {
                                           const Together bits = weight_of[q].bits(step, residual, dot);
                                           top[q] = max_of(top[q], bits);
                                           const Floats mass = added_up(CoarseExp::weight(bits));
                                           if constexpr (kPartsTogether < kParts)
                                               of_block[q][block] += mass;
                                           else
                                               of_block[q][block] = mass;
                                           if (block == kWeighedBlock)
                                               of_sample[q] +=
                                                   added_up(CoarseExp::weight(bits - band_of[q](step, residual)));
                                       });
            again = false;
            Together highest = top[0];
            for (int q = 1; q < Count; ++q) highest = max_of(highest, top[q]);
            if (!mask_ge(highest, splat_to<Together>(UpperWeight::kMost))) break;
            for (int q = 0; q < Count; ++q) {
                if (!(max_of_lanes(top[q]) >= UpperWeight::kMost)) continue;
                refer_to_top(q, first);
                again = true;
            }
        }
        for (int q = 0; q < Count; ++q)
            for (size_t block = 0; block < kMassBlocks; block += 4)
                sums_of_4(of_block[q] + block, block_masses + q * mass_stride + first + block);
        sums_of_4(of_sample, sampled + first / kMassBlocks * kTile);
    }
    for (int q = 0; q < Count; ++q) {
        refer_to_top(q, blocks);
        references[q] = reference[q];
    }
}

void scan_blocks(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, int count, float* references,
                 float* block_masses, size_t mass_stride, float* sampled) {
    with_shape(count, dim, [&](auto number, auto pairs) {
        scan_blocks_tile<decltype(number)::value, decltype(pairs)::value>(high, dim, blocks, queries, references,
                                                                          block_masses, mass_stride, sampled);
    });
}

// A bit for each key whose upper bound reaches the threshold; whether there is any.
template <int Count, int Pairs>
[[gnu::noinline]] bool scan_reach_tile(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries,
                                       const float* thresholds, uint16_t* masks) {
    const ScanQueries<Count> scanned(queries, dim);
    const ScanBands<Count> bands(queries);
    float threshold[Count];
    for (int q = 0; q < Count; ++q) threshold[q] = thresholds[q];
    for (size_t i = 0; i < blocks * kTile; ++i) masks[i] = 0;
    score_blocks<Count, Pairs>(high, dim, blocks, 1, scanned.own,
                               [&](size_t block, int part, int q, Together step, Together residual, Together dot) {
                                   const Together upper =
                                       scanned.own[q].estimate(step, dot) + bands.own[q](step, residual);
                                   masks[block * kTile + q] |= uint16_t(mask_ge(upper, splat_to<Together>(threshold[q]))
                                                                        << (part * kPartLanes));
                               });
    uint16_t any = 0;
    for (size_t i = 0; i < blocks * kTile; ++i) any |= masks[i];
    return any != 0;
}

bool scan_reach(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, int count,
                const float* thresholds, uint16_t* masks) {
    bool any = false;
    with_shape(count, dim, [&](auto number, auto pairs) {
        any = scan_reach_tile<decltype(number)::value, decltype(pairs)::value>(high, dim, blocks, queries, thresholds,
                                                                               masks);
    });
    return any;
}

double sum_exp(const float* x, size_t count, float reference) {
    double total = 0;
    f32x16 sum = {};
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        sum += exp_of(load<f32x16>(x + i) - reference);
        if ((i & 4095) == 4080) {
            total += sum_of(sum);
            sum = f32x16{};
        }
    }
    total += sum_of(sum);
    if (i < count) {
        f32x16 rest = splat(-kInfinity);
        __builtin_memcpy(&rest, x + i, (count - i) * 4);
        total += sum_of(exp_of(rest - reference));
    }
    return total;
}

void exp_into(const float* x, size_t count, float reference, float* out) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16) store(out + i, exp_of(load<f32x16>(x + i) - reference));
    if (i < count) {
        f32x16 rest = {};
        __builtin_memcpy(&rest, x + i, (count - i) * 4);
        rest = exp_of(rest - reference);
        __builtin_memcpy(out + i, &rest, (count - i) * 4);
    }
}

double sum_below(const float* x, size_t count, float limit) {
    f32x16 sum = {};
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const f32x16 here = load<f32x16>(x + i);
        sum += select(here < splat(limit), here, f32x16{});
    }
    double total = sum_of(sum);
    for (; i < count; ++i) total += x[i] < limit ? x[i] : 0.0f;
    return total;
}

double mass_left(const float* estimates, const float* weights, const float* block_masses, size_t blocks,
                 float mass_from, float threshold) {
    f32x16 sum = {};
    for (size_t i = 0; i < blocks; ++i) {
        if (block_masses[i] < mass_from) continue;
        sum += select(load<f32x16>(estimates + 16 * i) < splat(threshold), load<f32x16>(weights + 16 * i), f32x16{});
    }
    return sum_of(sum);
}

double mass_below(const float* estimates, const float* uppers, const float* weights, const float* upper_weights,
                  size_t count, float threshold) {
    f32x16 sum = {};
    const f32x16 limit = splat(threshold), zero = {};
    for (size_t i = 0; i + 16 <= count; i += 16) {
        const f32x16 inner = select(load<f32x16>(estimates + i) < limit, load<f32x16>(weights + i), zero);
        sum += select(load<f32x16>(uppers + i) < limit, load<f32x16>(upper_weights + i), inner);
    }
    return sum_of(sum);
}

void bounds(const uint8_t* high, const uint8_t* low, int dim, size_t blocks, const CodedQuery* query, bool refined,
            const float* estimates, float sign, float* out) {
    const size_t bytes = size_t(dim + 7) / 8 * 64;
    const float slope = refined ? query->slope8 : query->slope4,
                slope_step = refined ? query->slope8_step : query->slope4_step;
    for (size_t block = 0; block < blocks; ++block, high += bytes + 64, low += bytes + 32) {
        const f32x16 step = load_bfloat16<f32x16>(high + bytes),
                     residual = load_bfloat16<f32x16>(refined ? low + bytes : high + bytes + 32);
        const f32x16 band = slope * residual + slope_step * step + query->slack;
        // A key that is not coded (band infinite) may score anything, in either direction.
        const f32x16 from = load<f32x16>(estimates + block * 16);
        const f32x16 bound = select(band < splat(kInfinity), from + sign * band, splat(sign * kInfinity));
        store(out + block * 16, select(from > kLowest, bound, from));
    }
}

#include "kernels/select_loops.h"

// ------------------------------------------------------------------ values

constexpr size_t kRowsAhead = 16;  // KeptKeys has as many places to spare

template <int Count>
inline void accumulate_tile(const uint8_t* rows, int dim, const KeptKeys* kept, float* accumulators) {
    const int groups = (dim + kValueGroup - 1) / kValueGroup;
    const size_t row_bytes = size_t(groups) * 16, capacity = kept->capacity;
    for (size_t i = 0; i < kRowsAhead; ++i) kept->keys[kept->count + i] = kept->keys[kept->count - 1];
    for (int g = 0; g < groups; ++g, rows += 16) {
        const float* scaled = kept->scaled + size_t(g) * kTile * capacity;
        f32x16 sum[Count][2];
        for (int q = 0; q < Count; ++q)
            for (int h = 0; h < 2; ++h) sum[q][h] = load<f32x16>(accumulators + (size_t(q) * groups + g) * 32 + 16 * h);
        for (size_t i = 0; i < kept->count; ++i) {
            if (g == 0) __builtin_prefetch(rows + kept->keys[i + kRowsAhead] * row_bytes);
            const i32x16 bytes = widen_bytes(load<u8x16>(rows + kept->keys[i] * row_bytes));
            const f32x16 first = convert<f32x16>(bytes & 15), second = convert<f32x16>(bytes >> 4);
            for (int q = 0; q < Count; ++q) {
                sum[q][0] += scaled[size_t(q) * capacity + i] * first;
                sum[q][1] += scaled[size_t(q) * capacity + i] * second;
            }
        }
        for (int q = 0; q < Count; ++q)
            for (int h = 0; h < 2; ++h) store(accumulators + (size_t(q) * groups + g) * 32 + 16 * h, sum[q][h]);
    }
}

void accumulate_codes(const uint8_t* rows, int dim, const KeptKeys* kept, int count, float* accumulators) {
    with_number<kTile>(count,
                       [&](auto number) { accumulate_tile<decltype(number)::value>(rows, dim, kept, accumulators); });
}

// ------------------------------------------------------------------ full precision

float dot(Dtype dtype, const void* row, const float* query, int dim) {
    f32x16 sum[2] = {};
    int at = 0;
    for (; at + 32 <= dim; at += 32)
        for (int h = 0; h < 2; ++h) sum[h] += load_row(dtype, row, at + 16 * h) * load<f32x16>(query + at + 16 * h);
    for (; at + 16 <= dim; at += 16) sum[0] += load_row(dtype, row, at) * load<f32x16>(query + at);
    if (at < dim)
        sum[1] += load_row_part(dtype, row, at, dim - at) * load_row_part(Dtype::float32, query, at, dim - at);
    return sum_of(sum[0] + sum[1]);
}

inline void add_products64(f64x8& a, f64x8& b, f32x16 x, f32x16 y) {
    a += convert<f64x8>(lower(x)) * convert<f64x8>(lower(y));
    b += convert<f64x8>(upper(x)) * convert<f64x8>(upper(y));
}

double dot64(Dtype dtype, const void* row, const float* query, int dim) {
    f64x8 a = {}, b = {};
    int at = 0;
    for (; at + 16 <= dim; at += 16) add_products64(a, b, load_row(dtype, row, at), load<f32x16>(query + at));
    if (at < dim)
        add_products64(a, b, load_row_part(dtype, row, at, dim - at),
                       load_row_part(Dtype::float32, query, at, dim - at));
    return sum_of(a + b);
}

void axpy(Dtype dtype, const void* row, float weight, int dim, float* accumulator) {
    int at = 0;
    for (; at + 16 <= dim; at += 16)
        store(accumulator + at, load<f32x16>(accumulator + at) + weight * load_row(dtype, row, at));
    if (at < dim) {
        float part[16];
        store(part, load_row_part(dtype, row, at, dim - at));
        for (int i = at; i < dim; ++i) accumulator[i] += weight * part[i - at];
    }
}

// ------------------------------------------------------------------ the flat index

template <int Count>
inline void flat_tile(Dtype dtype, const void* blocks, int dim, size_t block_count, const float* queries,
                      const float* thresholds, uint16_t* masks, size_t stride) {
    const uint8_t* block = (const uint8_t*)blocks;
    const size_t bytes = size_t(dim) * 16 * (dtype == Dtype::float32 ? 4 : 2);
    for (size_t b = 0; b < block_count; ++b, block += bytes) {
        f32x16 even[Count] = {}, odd[Count] = {};
        int j = 0;
        for (; j + 2 <= dim; j += 2) {
            const f32x16 x = load_row(dtype, block, 16 * j), y = load_row(dtype, block, 16 * j + 16);
            for (int q = 0; q < Count; ++q) {
                even[q] += x * queries[q * dim + j];
                odd[q] += y * queries[q * dim + j + 1];
            }
        }
        if (j < dim)
            for (int q = 0; q < Count; ++q) even[q] += load_row(dtype, block, 16 * j) * queries[q * dim + j];
        for (int q = 0; q < Count; ++q)
            masks[q * stride + b] = uint16_t(mask_not_less(even[q] + odd[q], splat(thresholds[q])));
    }
}

void flat_masks(Dtype dtype, const void* blocks, int dim, size_t block_count, const float* queries, int count,
                const float* thresholds, uint16_t* masks, size_t stride) {
    with_number<kTile>(count, [&](auto number) {
        flat_tile<decltype(number)::value>(dtype, blocks, dim, block_count, queries, thresholds, masks, stride);
    });
}

void flat_block64(Dtype dtype, const void* block, int dim, const float* query, double* scores) {
    f64x8 a = {}, b = {};
    for (int j = 0; j < dim; ++j) add_products64(a, b, load_row(dtype, block, 16 * j), splat(query[j]));
    store(scores, a);
    store(scores + 8, b);
}

// ------------------------------------------------------------------ counting

size_t count_from(const float* x, size_t count, float threshold) {
    size_t found = 0, i = 0;
    for (; i + 16 <= count; i += 16)
        found += size_t(__builtin_popcount(mask_not_less(load<f32x16>(x + i), splat(threshold))));
    for (; i < count; ++i) found += !(x[i] < threshold);
    return found;
}

#include "kernels/panel_loops.h"
#include "kernels/weight_loops.h"

}  // namespace

namespace HSR_LEVEL {

#define HSR_TEXT_(x) #x
#define HSR_TEXT(x) HSR_TEXT_(x)

const Kernels& table();
const Kernels& table() {
    static const Kernels all = {HSR_TEXT(HSR_LEVEL),
                                to_float,
                                all_within,
                                rotate,
                                code_keys,
                                code_value,
                                split_query,
                                scan,
                                scan_mass,
                                scan_blocks,
                                scan_reach,
                                exp_into,
                                scale,
                                sum_below,
                                mass_left,
                                mass_below,
                                sum_exp,
                                refine,
                                refine_listed,
                                select,
                                accumulate_codes,
                                bounds,
                                dot,
                                dot64,
                                axpy,
                                flat_masks,
                                flat_block64,
                                count_from,
                                unpack_panel,
                                code_query,
                                score_panel,
                                select_row,
                                weigh,
                                largest_of,
                                mass_curve,
                                places_from,
                                accumulate_rows,
                                accumulate_dense,
                                dot_rows,
                                dot_rows64,
                                hide_masked,
                                code_values,
                                weigh_panel,
                                multiply_panel};
    return all;
}

}  // namespace HSR_LEVEL
}  // namespace hsr

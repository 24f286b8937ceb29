// Every kernel, once. Included by one file per level with HSR_LEVEL set; see README.md.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace hsr {
namespace {

#include "kernels/simd.h"

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

inline double sum_of(f64x8 s) { return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])); }

// The digits of one rotated query; both lists and y are padded with zeros to a multiple of 16.
void split_query(const float* y, int dim, int8_t* high, int8_t* low, QueryDigits* found) {
    const int wide = (dim + 15) / 16 * 16;
    f32x16 top = {};
    for (int at = 0; at < wide; at += 16) top = max_of(top, abs_of(load<f32x16>(y + at)));
    const double most = max_of_lanes(top), step = most > 0 ? most / 127.0 : 1.0, inverse = 1.0 / step;
    const auto nearest = [](f64x8 x) {  // |x| <= 127.5
        const f64x8 zero = {}, half = zero + 0.5;
        i32x8 digit = __builtin_convertvector(x + (x < zero ? -half : half), i32x8);
        digit = digit > 127 ? i32x8{} + 127 : digit;
        return digit < -127 ? i32x8{} - 127 : digit;
    };
    f64x8 rest4 = {}, rest8 = {};
    i32x8 high_sum = {}, low_sum = {};
    for (int at = 0; at < wide; at += 8) {
        const f64x8 x = __builtin_convertvector(load<f32x8>(y + at), f64x8) * inverse;
        const i32x8 first = nearest(x);
        const f64x8 after_high = x - __builtin_convertvector(first, f64x8);
        const i32x8 second = nearest(after_high * 254.0);
        const f64x8 after_low = after_high - __builtin_convertvector(second, f64x8) * (1.0 / 254.0);
        rest4 += after_high * after_high;
        rest8 += after_low * after_low;
        high_sum += first;
        low_sum += second;
        store(high + at, __builtin_convertvector(first, i8x8));
        store(low + at, __builtin_convertvector(second, i8x8));
    }
    found->step = step;
    found->rest4 = __builtin_sqrt(sum_of(rest4));
    found->rest8 = __builtin_sqrt(sum_of(rest8));
    found->high_sum = found->low_sum = 0;
    for (int i = 0; i < 8; ++i) {
        found->high_sum += high_sum[i];
        found->low_sum += low_sum[i];
    }
}

inline void add_squares(f64x8& sum, f32x16 r) {
    f32x8 halves[2];
    __builtin_memcpy(halves, &r, 64);
    const f64x8 a = __builtin_convertvector(halves[0], f64x8), b = __builtin_convertvector(halves[1], f64x8);
    sum += a * a + b * b;
}

inline i32x16 lanes_below(int count) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < splat(count);
}

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
            step_bits = bfloat16_up(max_of_lanes(top) * (1.000001f / 127.5f));
            const float step = bfloat16_value(step_bits), inverse = 1.0f / step;
            f64x8 sum4 = {}, sum8 = {};
            alignas(64) uint8_t codes[kMaxHeadDim];
            for (int at = 0; at < wide; at += 16) {
                const f32x16 v = load<f32x16>(y + at);
                i32x16 code = __builtin_convertvector(v * inverse + 128.0f, i32x16);
                code = code < 0 ? i32x16{} : code;
                code = code > 255 ? splat(255) : code;
                const i32x16 h = code >> 4, inside = lanes_below(dim - at);
                const f32x16 r8 = v - step * (to_float16lanes(code) - 127.5f);
                const f32x16 r4 = v - step * (16.0f * (to_float16lanes(h) - 7.5f));
                add_squares(sum8, inside ? r8 : f32x16{});
                add_squares(sum4, inside ? r4 : f32x16{});
                store(codes + at, __builtin_convertvector(code, u8x16));
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
            code[h] = __builtin_convertvector((x[h] - offset) * inverse + 0.5f, i32x16);
            code[h] = code[h] < 0 ? i32x16{} : code[h] > 15 ? splat(15) : code[h];
            if (size < kValueGroup) code[h] = lanes_below(size - 16 * h) ? code[h] : i32x16{};
        }
        store(row, __builtin_convertvector(code[0] | (code[1] << 4), u8x16));
        __builtin_memcpy(parameters, &step_bits, 2);
        __builtin_memcpy(parameters + 32, &offset_bits, 2);
    }
}

// ------------------------------------------------------------------ the scan of the first plane

inline int32_t four_digits(const int8_t* digits) {
    int32_t word;
    __builtin_memcpy(&word, digits, 4);
    return word;
}

// Measured at d = 64, one thread, codes in memory: 25 GB/s at 4.5 KiB, 28 at 9, 32 at 18, 35 from the second cache.
constexpr size_t kBytesAhead = 16384;

// Estimates of `Blocks` neighbouring blocks of one tile; raises top[q]. Two blocks share each load of the query's
// digits, which would else be what limits the loop.
template <int Count, int Blocks>
inline void score_together(const uint8_t* high, int dim, const CodedQuery* queries, float* estimates, size_t stride,
                           f32x16* top) {
    const int pairs = (dim + 7) / 8;
    const size_t bytes = size_t(pairs) * 64;
    i32x16 even[Blocks][Count] = {}, odd[Blocks][Count] = {};
    for (int p = 0; p < pairs; ++p) {
        u8x64 a[Blocks], b[Blocks];
        for (int k = 0; k < Blocks; ++k) {
            const uint8_t* line = high + k * (bytes + 64) + p * 64;
            __builtin_prefetch(line + kBytesAhead);
            const u8x64 codes = load<u8x64>(line);
            a[k] = low_nibbles(codes), b[k] = high_nibbles_scaled(codes);
        }
        for (int q = 0; q < Count; ++q) {
            const int32_t first = four_digits(queries[q].high + 8 * p),
                          second = four_digits(queries[q].high + 8 * p + 4);
            for (int k = 0; k < Blocks; ++k) {
                even[k][q] = dot4(even[k][q], a[k], first);
                odd[k][q] = dot4(odd[k][q], b[k], second);
            }
        }
    }
    for (int k = 0; k < Blocks; ++k) {
        __builtin_prefetch(high + k * (bytes + 64) + bytes + kBytesAhead);
        const f32x16 step = from_bfloat16(load<u16x16>(high + k * (bytes + 64) + bytes));
        for (int q = 0; q < Count; ++q) {
            const CodedQuery& query = queries[q];
            const f32x16 dot = to_float16lanes(even[k][q] + (odd[k][q] >> kHighShift)) - 7.5f * query.high_sum;
            const f32x16 estimate = step * (16.0f * query.unit * dot) + query.centre;
            top[q] = max_of(top[q], estimate);
            store(estimates + q * stride + k * 16, estimate);
        }
    }
}

template <int Count>
inline void score_blocks(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, float* estimates,
                         size_t stride, f32x16* top) {
    const size_t bytes = size_t(dim + 7) / 8 * 64 + 64;
    size_t block = 0;
    for (; block + 2 <= blocks; block += 2)
        score_together<Count, 2>(high + block * bytes, dim, queries, estimates + block * 16, stride, top);
    if (block < blocks)
        score_together<Count, 1>(high + block * bytes, dim, queries, estimates + block * 16, stride, top);
}

template <int Count>
inline void scan_tile(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, float* estimates,
                      size_t stride, float* maxima) {
    f32x16 top[Count];
    for (int q = 0; q < Count; ++q) top[q] = splat(maxima[q]);
    score_blocks<Count>(high, dim, blocks, queries, estimates, stride, top);
    for (int q = 0; q < Count; ++q) maxima[q] = max_of_lanes(top[q]);
}

void scan(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, int count, float* estimates,
          size_t stride, float* maxima) {
    switch (count) {
        case 1: return scan_tile<1>(high, dim, blocks, queries, estimates, stride, maxima);
        case 2: return scan_tile<2>(high, dim, blocks, queries, estimates, stride, maxima);
        case 3: return scan_tile<3>(high, dim, blocks, queries, estimates, stride, maxima);
        default: return scan_tile<4>(high, dim, blocks, queries, estimates, stride, maxima);
    }
}

// As flash attention keeps its running maximum: a few blocks are scored, then their masses added.
template <int Count>
inline void scan_mass_tile(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, float* uppers,
                           size_t uppers_stride, float* maxima, double* masses, float* block_masses,
                           size_t mass_stride) {
    constexpr size_t kGroup = 8;
    const size_t bytes = size_t(dim + 7) / 8 * 64;
    alignas(64) float scratch[Count * kGroup * 16];
    const size_t stride = uppers ? uppers_stride : kGroup * 16;
    float reference[Count];
    f32x16 sum[Count] = {};
    for (int q = 0; q < Count; ++q) reference[q] = -3.0e38f;
    for (size_t first = 0; first < blocks; first += kGroup) {
        const size_t count = blocks - first < kGroup ? blocks - first : kGroup;
        const uint8_t* codes = high + first * (bytes + 64);
        float* here = uppers ? uppers + first * 16 : scratch;
        f32x16 top[Count];
        for (int q = 0; q < Count; ++q) top[q] = splat(-kInfinity);
        score_blocks<Count>(codes, dim, count, queries, here, stride, top);
        for (int q = 0; q < Count; ++q) {
            const float highest = max_of_lanes(top[q]);
            if (highest > reference[q]) {
                const f32x16 factor = exp_of(splat(reference[q] - highest));
                sum[q] *= factor;
                float* earlier = block_masses + q * mass_stride;
                for (size_t i = 0; i < first; i += 16) store(earlier + i, load<f32x16>(earlier + i) * factor);
                reference[q] = highest;
            }
        }
        CoarseExp weight_of[Count];
        for (int q = 0; q < Count; ++q) weight_of[q] = CoarseExp(reference[q]);
        for (size_t block = 0; block < kGroup; block += 4) {  // what lies behind `blocks` weighs nothing
            f32x16 upper_mass[Count][4] = {};
            for (size_t b = 0; b < 4 && block + b < count; ++b, codes += bytes + 64) {
                const f32x16 step = from_bfloat16(load<u16x16>(codes + bytes)),
                             residual = from_bfloat16(load<u16x16>(codes + bytes + 32));
                for (int q = 0; q < Count; ++q) {
                    const CodedQuery& query = queries[q];
                    float* own = here + q * stride + (block + b) * 16;
                    const f32x16 estimate = load<f32x16>(own);
                    const f32x16 upper = estimate + (query.slope4 * residual + query.slope4_step * step + query.slack);
                    sum[q] += weight_of[q](estimate);
                    if (uppers) store(own, upper);
                    upper_mass[q][b] = weight_of[q](upper);
                }
            }
            for (int q = 0; q < Count; ++q) sums_of_4(upper_mass[q], block_masses + q * mass_stride + first + block);
        }
    }
    for (int q = 0; q < Count; ++q) {
        maxima[q] = reference[q];
        masses[q] = sum_of(sum[q]);
    }
}

void scan_mass(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, int count, float* uppers,
               size_t stride, float* maxima, double* masses, float* block_masses, size_t mass_stride) {
#define HSR_CASE(N) \
    case N:         \
        return scan_mass_tile<N>(high, dim, blocks, queries, uppers, stride, maxima, masses, block_masses, mass_stride);
    switch (count) { HSR_CASE(1) HSR_CASE(2) HSR_CASE(3) HSR_CASE(4) }
#undef HSR_CASE
}

template <int Count>
inline void scan_reach_tile(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries,
                            const float* thresholds, uint16_t* masks) {
    constexpr size_t kGroup = 8;
    const size_t bytes = size_t(dim + 7) / 8 * 64;
    alignas(64) float scratch[Count * kGroup * 16];
    f32x16 top[Count] = {};
    for (size_t first = 0; first < blocks; first += kGroup) {
        const size_t count = blocks - first < kGroup ? blocks - first : kGroup;
        const uint8_t* codes = high + first * (bytes + 64);
        score_blocks<Count>(codes, dim, count, queries, scratch, kGroup * 16, top);
        for (size_t b = 0; b < count; ++b, codes += bytes + 64) {
            const f32x16 step = from_bfloat16(load<u16x16>(codes + bytes)),
                         residual = from_bfloat16(load<u16x16>(codes + bytes + 32));
            for (int q = 0; q < Count; ++q) {
                const CodedQuery& query = queries[q];
                const f32x16 upper = load<f32x16>(scratch + (q * kGroup + b) * 16) +
                                     (query.slope4 * residual + query.slope4_step * step + query.slack);
                masks[(first + b) * kTile + q] = uint16_t(mask_ge(upper, splat(thresholds[q])));
            }
        }
    }
}

void scan_reach(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, int count,
                const float* thresholds, uint16_t* masks) {
    switch (count) {
        case 1: return scan_reach_tile<1>(high, dim, blocks, queries, thresholds, masks);
        case 2: return scan_reach_tile<2>(high, dim, blocks, queries, thresholds, masks);
        case 3: return scan_reach_tile<3>(high, dim, blocks, queries, thresholds, masks);
        default: return scan_reach_tile<4>(high, dim, blocks, queries, thresholds, masks);
    }
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

void scale(float* x, size_t count, float factor) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16) store(x + i, load<f32x16>(x + i) * factor);
    for (; i < count; ++i) x[i] *= factor;
}

double sum_below(const float* x, size_t count, float limit) {
    f32x16 sum = {};
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const f32x16 here = load<f32x16>(x + i);
        sum += here < splat(limit) ? here : f32x16{};
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
        sum += load<f32x16>(estimates + 16 * i) < splat(threshold) ? load<f32x16>(weights + 16 * i) : f32x16{};
    }
    return sum_of(sum);
}

double mass_below(const float* estimates, const float* uppers, const float* weights, const float* upper_weights,
                  size_t count, float threshold) {
    f32x16 sum = {};
    const f32x16 limit = splat(threshold), zero = {};
    for (size_t i = 0; i + 16 <= count; i += 16) {
        const f32x16 inner = load<f32x16>(estimates + i) < limit ? load<f32x16>(weights + i) : zero;
        sum += load<f32x16>(uppers + i) < limit ? load<f32x16>(upper_weights + i) : inner;
    }
    return sum_of(sum);
}

void bounds(const uint8_t* high, const uint8_t* low, int dim, size_t blocks, const CodedQuery* query, bool refined,
            const float* estimates, float sign, float* out) {
    const size_t bytes = size_t(dim + 7) / 8 * 64;
    const float slope = refined ? query->slope8 : query->slope4,
                slope_step = refined ? query->slope8_step : query->slope4_step;
    for (size_t block = 0; block < blocks; ++block, high += bytes + 64, low += bytes + 32) {
        const f32x16 step = from_bfloat16(load<u16x16>(high + bytes)),
                     residual = from_bfloat16(load<u16x16>(refined ? low + bytes : high + bytes + 32));
        const f32x16 band = slope * residual + slope_step * step + query->slack;
        // A key that is not coded (band infinite) may score anything, in either direction.
        const f32x16 from = load<f32x16>(estimates + block * 16);
        const f32x16 bound = band < splat(kInfinity) ? from + sign * band : splat(sign * kInfinity);
        store(out + block * 16, from > kLowest ? bound : from);
    }
}

// ------------------------------------------------------------------ both planes

template <int Count>
inline void refine_block(const uint8_t* high, const uint8_t* low, int dim, const CodedQuery* const* queries,
                         f32x16* refined) {
    const int pairs = (dim + 7) / 8;
    i32x16 first[Count] = {}, second[Count] = {};
    for (int p = 0; p < pairs; ++p) {
        const u8x64 h = load<u8x64>(high + p * 64), l = load<u8x64>(low + p * 64);
        const u8x64 even = join_low_nibbles(h, l), odd = join_high_nibbles(h, l);
        for (int q = 0; q < Count; ++q) {
            first[q] = dot4_byte(first[q], even, four_digits(queries[q]->high + 8 * p));
            second[q] = dot4_byte(second[q], even, four_digits(queries[q]->low + 8 * p));
            first[q] = dot4_byte(first[q], odd, four_digits(queries[q]->high + 8 * p + 4));
            second[q] = dot4_byte(second[q], odd, four_digits(queries[q]->low + 8 * p + 4));
        }
    }
    const f32x16 step = from_bfloat16(load<u16x16>(high + size_t(pairs) * 64));
    for (int q = 0; q < Count; ++q) {
        const CodedQuery& query = *queries[q];
        const f32x16 coarse = to_float16lanes(first[q]) - 127.5f * query.high_sum;
        const f32x16 fine = to_float16lanes(second[q]) - 127.5f * query.low_sum;
        refined[q] = step * (query.unit * (coarse + fine * (1.0f / 254.0f))) + query.centre;
    }
}

template <int Count>
inline void refine_tile(const uint8_t* high, const uint8_t* low, int dim, size_t blocks, const CodedQuery* queries,
                        float* estimates, size_t stride, float* maxima) {
    const size_t bytes = size_t(dim + 7) / 8 * 64;
    f32x16 top[Count], refined[Count];
    const CodedQuery* every[Count];
    for (int q = 0; q < Count; ++q) {
        top[q] = splat(maxima[q]);
        every[q] = queries + q;
    }
    for (size_t block = 0; block < blocks; ++block, high += bytes + 64, low += bytes + 32) {
        refine_block<Count>(high, low, dim, every, refined);
        for (int q = 0; q < Count; ++q) {
            top[q] = max_of(top[q], refined[q]);
            store(estimates + q * stride + block * 16, refined[q]);
        }
    }
    for (int q = 0; q < Count; ++q) maxima[q] = max_of_lanes(top[q]);
}

void refine(const uint8_t* high, const uint8_t* low, int dim, size_t blocks, const CodedQuery* queries, int count,
            float* estimates, size_t stride, float* maxima) {
    switch (count) {
        case 1: return refine_tile<1>(high, low, dim, blocks, queries, estimates, stride, maxima);
        case 2: return refine_tile<2>(high, low, dim, blocks, queries, estimates, stride, maxima);
        case 3: return refine_tile<3>(high, low, dim, blocks, queries, estimates, stride, maxima);
        default: return refine_tile<4>(high, low, dim, blocks, queries, estimates, stride, maxima);
    }
}

// ------------------------------------------------------------------ selection

template <int Count, Sums Wanted>
inline void select_tile(const uint8_t* high, const uint8_t* low, const uint8_t* value_parameters, int dim,
                        int value_dim, size_t blocks, uint32_t first_key, const CodedQuery* queries,
                        const Selection* selection, const float* uppers, size_t stride, const float* block_masses,
                        size_t mass_stride, const uint16_t* reaching, KeptKeys* kept, SelectionSums* sums) {
    constexpr int kMaxGroups = kMaxHeadDim / kValueGroup, kAhead = 5;
    const size_t bytes = size_t(dim + 7) / 8 * 64;
    const int groups = (value_dim + kValueGroup - 1) / kValueGroup;
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    size_t count = 0, exact_count[Count] = {};
    int64_t kept_total[Count] = {};
    f32x16 omitted[Count] = {}, left_out[Count] = {}, sketched[Count] = {}, weight_band[Count] = {},
           weight_var[Count] = {};
    f32x16 offsets[Count][kMaxGroups];
    for (int q = 0; q < Count; ++q)
        for (int g = 0; g < groups; ++g) offsets[q][g] = f32x16{};
    // First, without branches: which keys are in doubt, and the mass of the others.
    uint16_t doubts[kSelectBlocks][Count], flagged[kSelectBlocks + kAhead];
    size_t flagged_count = 0;
    if (block_masses) {
        uint64_t all = 0, heavy[Count] = {};
        for (int q = 0; q < Count; ++q) {
            for (size_t at = 0; at < blocks; at += 16) {
                const size_t left = blocks - at;
                const uint32_t valid = left < 16 ? (1u << left) - 1 : 0xffffu;
                const f32x16 mass = load<f32x16>(block_masses + q * mass_stride + at);
                const uint32_t reach = mask_not_less(mass, splat(selection[q].mass_from)) & valid;
                omitted[q] += keep_lanes(valid & ~reach, mass);
                heavy[q] |= uint64_t(reach) << at;
            }
            all |= heavy[q];
        }
        for (; all; all &= all - 1) {
            const int block = __builtin_ctzll(all);
            for (int q = 0; q < Count; ++q) {
                const bool reach = heavy[q] >> block & 1;
                doubts[block][q] = reach ? 0xffff : 0;
            }
            flagged[flagged_count++] = uint16_t(block);
        }
    } else if (reaching) {
        for (size_t block = 0; block < blocks; ++block, reaching += kTile) {
            uint32_t any = 0;
            for (int q = 0; q < Count; ++q) any |= doubts[block][q] = reaching[q];
            flagged[flagged_count] = uint16_t(block);
            flagged_count += any != 0;
        }
    } else {
        f32x16 threshold[Count];  // hidden keys lie below kLowest and are never in doubt
        for (int q = 0; q < Count; ++q) threshold[q] = max_of(splat(selection[q].threshold), splat(kLowest));
        for (size_t block = 0; block < blocks; ++block) {
            uint32_t any = 0;
            for (int q = 0; q < Count; ++q) {
                const f32x16 upper = load<f32x16>(uppers + q * stride + block * 16);
                const uint32_t doubt = mask_ge(upper, threshold[q]);
                doubts[block][q] = uint16_t(doubt);
                any |= doubt;
                if (Wanted != Sums::none)
                    omitted[q] += keep_lanes(~doubt & 0xffffu, exp_above(upper, selection[q].reference));
            }
            flagged[flagged_count] = uint16_t(block);
            flagged_count += any != 0;
        }
    }
    for (int i = 0; i < kAhead; ++i) flagged[flagged_count + i] = uint16_t(blocks - 1);
    for (size_t f = 0; f < flagged_count; ++f) {
        const size_t block = flagged[f];
        const uint8_t *h = high + block * (bytes + 64), *l = low + block * (bytes + 32);
        // The codes of flagged blocks lie scattered: ask for them in time.
        for (size_t line = 0; line < bytes + 64; line += 64) {
            __builtin_prefetch(high + flagged[f + kAhead] * (bytes + 64) + line);
            __builtin_prefetch(low + flagged[f + kAhead] * (bytes + 32) + line);
        }
        if (value_parameters)
            for (int g = 0; g < groups; ++g)
                __builtin_prefetch(value_parameters + (flagged[f + kAhead] * size_t(groups) + size_t(g)) * 64);
        const f32x16 step = from_bfloat16(load<u16x16>(h + bytes));
        // Only the queries that are in doubt here.
        int active[Count], active_count = 0;
        const CodedQuery* asking[Count];
        f32x16 refined[Count], weight[Count];
        for (int q = 0; q < Count; ++q) {
            weight[q] = f32x16{};
            active[active_count] = q;
            asking[active_count] = queries + q;
            active_count += doubts[block][q] != 0;
        }
        switch (active_count) {
            case 1: refine_block<1>(h, l, dim, asking, refined); break;
            case 2: refine_block<(Count < 2 ? Count : 2)>(h, l, dim, asking, refined); break;
            case 3: refine_block<(Count < 3 ? Count : 3)>(h, l, dim, asking, refined); break;
            default: refine_block<Count>(h, l, dim, asking, refined);
        }
        const f32x16 residual8 = from_bfloat16(load<u16x16>(l + bytes));
        const uint32_t uncoded = mask_ge(residual8, splat(kInfinity));
        const i32x16 key = lane + int32_t(first_key + block * 16);
        uint32_t coded_any = 0;
        for (int i = 0; i < active_count; ++i) {
            const int q = active[i];
            const CodedQuery& query = queries[q];
            const f32x16 estimate = refined[i];
            const uint32_t seen = doubts[block][q];
            const f32x16 band = query.slope8 * residual8 + query.slope8_step * step + query.slack;
            const f32x16 decisive = selection[q].keep_upper ? estimate + band : estimate;
            const uint32_t keep = seen & (mask_ge(decisive, splat(selection[q].threshold)) | uncoded);
            const uint32_t exact = keep & (mask_ge(decisive, splat(selection[q].exact_from)) | uncoded);
            const uint32_t left = seen & ~keep, coded = keep & ~exact;
            if (coded | (Wanted != Sums::none ? left : 0)) {
                const f32x16 every = exp_of(estimate - selection[q].reference);
                weight[q] = keep_lanes(coded, every);
                sketched[q] += weight[q];
                if (Wanted != Sums::none) {
                    // exp(band) - 1 <= growth * band, and a band is finite where a key is coded.
                    const f32x16 error = keep_lanes(coded | left, every * band);
                    left_out[q] += keep_lanes(left, every + selection[q].growth * error);
                    const f32x16 own = keep_lanes(coded, error);
                    weight_band[q] += own;
                    if (Wanted == Sums::all) weight_var[q] += own * own;
                }
                coded_any |= coded;
            }
            if (exact) {
                compress(exact, key, kept->exact[q] + exact_count[q]);
                exact_count[q] += size_t(__builtin_popcount(exact));
            }
            kept_total[q] += __builtin_popcount(keep);
        }
        if (!coded_any) continue;
        compress(coded_any, key, kept->keys + count);
        const uint8_t* parameters = value_parameters + block * size_t(groups) * 64;
        for (int g = 0; g < groups; ++g, parameters += 64) {
            const f32x16 value_step = from_bfloat16(load<u16x16>(parameters)),
                         value_offset = from_bfloat16(load<u16x16>(parameters + 32));
            for (int q = 0; q < Count; ++q) {
                const f32x16 scaled = weight[q] * value_step;
                offsets[q][g] += weight[q] * value_offset;
                compress(coded_any, (i32x16)scaled,
                         (uint32_t*)(kept->scaled + size_t(g * kTile + q) * kept->capacity + count));
            }
        }
        count += size_t(__builtin_popcount(coded_any));
    }
    kept->count = count;
    sums->refined += int64_t(flagged_count);
    for (int q = 0; q < Count; ++q) {
        kept->exact_count[q] = exact_count[q];
        kept->kept[q] = kept_total[q];
        sums->omitted[q] += sum_of(omitted[q]);
        sums->left[q] += sum_of(left_out[q]);
        sums->sketched[q] += sum_of(sketched[q]);
        sums->weight_band[q] += sum_of(weight_band[q]);
        sums->weight_var[q] += sum_of(weight_var[q]) / dim;
        for (int g = 0; g < groups; ++g) {
            sums->offsets[q * groups + g] += sum_of(offsets[q][g]);
            if (Wanted != Sums::all) continue;
            float* scaled = kept->scaled + size_t(g * kTile + q) * kept->capacity;
            store(scaled + count, f32x16{});  // there is room for 16 more
            f32x16 steps = {}, squares = {};
            for (size_t i = 0; i < count; i += 16) {
                const f32x16 here = load<f32x16>(scaled + i);
                steps += here;
                squares += here * here;
            }
            sums->steps[q * groups + g] += sum_of(steps);
            sums->squares[q * groups + g] += sum_of(squares);
        }
    }
}

void select(const uint8_t* high, const uint8_t* low, const uint8_t* value_parameters, int dim, int value_dim,
            size_t blocks, uint32_t first_key, const CodedQuery* queries, int count, const Selection* selection,
            Sums wanted, const float* uppers, size_t stride, const float* block_masses, size_t mass_stride,
            const uint16_t* reaching, KeptKeys* kept, SelectionSums* sums) {
#define HSR_SELECT(N, WANTED)                                                                                          \
    select_tile<N, WANTED>(high, low, value_parameters, dim, value_dim, blocks, first_key, queries, selection, uppers, \
                           stride, block_masses, mass_stride, reaching, kept, sums)
#define HSR_CASE(N)                                                   \
    case N:                                                           \
        return wanted == Sums::all      ? HSR_SELECT(N, Sums::all)    \
               : wanted == Sums::masses ? HSR_SELECT(N, Sums::masses) \
                                        : HSR_SELECT(N, Sums::none);
    switch (count) { HSR_CASE(1) HSR_CASE(2) HSR_CASE(3) HSR_CASE(4) }
#undef HSR_CASE
#undef HSR_SELECT
}

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
            const f32x16 first = to_float16lanes(bytes & 15), second = to_float16lanes(bytes >> 4);
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
    switch (count) {
        case 1: return accumulate_tile<1>(rows, dim, kept, accumulators);
        case 2: return accumulate_tile<2>(rows, dim, kept, accumulators);
        case 3: return accumulate_tile<3>(rows, dim, kept, accumulators);
        default: return accumulate_tile<4>(rows, dim, kept, accumulators);
    }
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
    f32x8 xs[2], ys[2];
    __builtin_memcpy(xs, &x, 64);
    __builtin_memcpy(ys, &y, 64);
    a += __builtin_convertvector(xs[0], f64x8) * __builtin_convertvector(ys[0], f64x8);
    b += __builtin_convertvector(xs[1], f64x8) * __builtin_convertvector(ys[1], f64x8);
}

double dot64(Dtype dtype, const void* row, const float* query, int dim) {
    f64x8 a = {}, b = {};
    int at = 0;
    for (; at + 16 <= dim; at += 16) add_products64(a, b, load_row(dtype, row, at), load<f32x16>(query + at));
    if (at < dim)
        add_products64(a, b, load_row_part(dtype, row, at, dim - at),
                       load_row_part(Dtype::float32, query, at, dim - at));
    a += b;
    return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
}

void axpy(Dtype dtype, const void* row, float weight, int dim, float* accumulator) {
    int at = 0;
    for (; at + 16 <= dim; at += 16)
        store(accumulator + at, load<f32x16>(accumulator + at) + weight * load_row(dtype, row, at));
    if (at < dim) {
        const f32x16 part = load_row_part(dtype, row, at, dim - at);
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
#define HSR_CASE(N) \
    case N: return flat_tile<N>(dtype, blocks, dim, block_count, queries, thresholds, masks, stride);
    switch (count) { HSR_CASE(1) HSR_CASE(2) HSR_CASE(3) HSR_CASE(4) }
#undef HSR_CASE
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
                                rotate,
                                code_keys,
                                code_value,
                                split_query,
                                scan,
                                scan_mass,
                                scan_reach,
                                exp_into,
                                scale,
                                sum_below,
                                mass_left,
                                mass_below,
                                sum_exp,
                                refine,
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

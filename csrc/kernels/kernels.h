// The seam between algorithms and instruction sets: plain structs and one table of functions.
// Everything behind the table is compiled once per level (see README.md in this folder).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace hsr {

constexpr int kBlock = 16;       // keys in a block of codes
constexpr int kTile = 4;         // most queries scored in one pass over the codes
constexpr int kValueGroup = 32;  // value coordinates that share an offset and a step
constexpr int kMaxHeadDim = 512;
constexpr size_t kSelectBlocks = 64;  // most blocks in one call of `select`
// A scan of block masses weighs the estimates of one block in eight; not the first, where texts like to begin.
constexpr size_t kMassBlocks = 8, kWeighedBlock = 3;

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };
inline size_t item_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Layout of key codes. A key k (centred and rotated) has the 8-bit code c in [0, 255] per dimension and
// a step s: k ~ s (c - 127.5), as small as every |c - 127.5| <= 127.5 and every eight's norm of them <= kEightNorm
// allow. An eight is what stands first (or last) in four fours of dimensions: of 16 i + {0, 1, 4, 5, 8, 9, 12, 13}, the
// others. The high 4 bits h of c are the first plane, the low 4 bits l the second; alone the first plane says k ~ 16 s
// (h - 7.5). A block holds 16 keys, dimension-major:
//   byte [p * 64 + key * 4 + j], low nibble: dimension 8 p + j, high nibble: dimension 8 p + 4 + j,
// so that a 64-byte load holds 4 dimensions of 16 keys twice, in the order of 8-bit dot products.
// Behind the codes of the first plane stand step[16] and residual4[16], behind the second residual8[16],
// all bfloat16 rounded up: residual8 >= |k - decoded k|_2, and residual4 >= |k - decoded k|_2 +
// kQueryShare |k|_2, which pays for that much relative error of the query's first digits.
constexpr double kQueryShare = 0.0065;
constexpr float kEightNorm = 210.0f;
inline int padded8(int dim) { return (dim + 7) / 8 * 8; }
inline int padded16(int dim) { return (dim + 15) / 16 * 16; }
inline size_t code_bytes(int dim) { return size_t(padded8(dim)) / 8 * 64; }
inline size_t high_stride(int dim) { return code_bytes(dim) + 64; }
inline size_t low_stride(int dim) { return code_bytes(dim) + 32; }

// Layout of value codes. Rows, one a key: for each group of 32 coordinates 16 bytes (low nibble: coordinate
// i of the group, high nibble: coordinate 16 + i). Parameters, one piece of 64 bytes for each block of 16 keys
// and group: step[16], then offset[16], bfloat16. v ~ offset + step * code, and |v - decoded v| <=
// step / 2 (1 + 2^-10).
inline int value_groups(int dim) { return (dim + kValueGroup - 1) / kValueGroup; }
inline size_t value_row_bytes(int dim) { return size_t(value_groups(dim)) * 16; }
inline size_t value_parameter_bytes(int dim) { return size_t(value_groups(dim)) * 64; }

// One query, rotated and quantised in two signed 8-bit digits: q ~ unit (high + low / 254), or
// 128 for 254: see dots.h.
struct CodedQuery {
    const int8_t* high;  // [padded8(dim)]
    const int8_t* low;   // [padded8(dim)]
    float unit;          // logit of (high = 1) x (decoded key = 1)
    float centre;        // logit of the centre of the keys
    float high_sum, low_sum;
    // |logit - estimate4| <= slope4 * residual4 + slope4_step * step + slack, and so on for 8 bits.
    float slope4, slope4_step, slope8, slope8_step, slack;
};

// What splitting a rotated query into digits gives: y ~ step (high + low / 254 or 128), sums of the digits, and the
// norms, in units of the step, of what one digit and what both leave.
struct QueryDigits {
    double step, rest4, rest8;
    int high_sum, low_sum;
};

// How a query selects keys from its estimates.
struct Selection {
    float threshold;   // keep when estimate8 (with `keep_upper`: its upper bound) >= threshold
    float exact_from;  // kept and estimate8 >= exact_from: read at full precision
    float reference;   // weights are exp(estimate - reference)
    float growth;      // exp(x) - 1 <= growth * x for every band x of both planes
    float mass_from;   // with block masses: refine a block whose upper mass is not below
    bool keep_upper;   // for selections that must be exact: keep whatever may reach the threshold
};

// What a selection keeps. `scaled[(group * kTile + q) * capacity + i]` is the weight that query q gives to
// key keys[i], times the step of the key's value codes in that group.
struct KeptKeys {
    size_t capacity;  // at least the keys looked at, and 16 more
    size_t count;
    uint32_t* keys;
    float* scaled;
    size_t exact_count[kTile];
    uint32_t* exact[kTile];  // keys to read at full precision
    int64_t kept[kTile];     // both kinds
};

// What a selection adds up besides the sketched masses and offsets: nothing; the masses that a bound of the
// omitted share needs (omitted, weight_band); or all that the certificate needs.
enum class Sums { none, masses, all };

// Sums of one selection; masses are relative to exp(reference).
struct SelectionSums {
    double omitted[kTile];      // upper bound of the mass of what was left out unrefined
    double left[kTile];         // and of what was left out after it was refined
    double sketched[kTile];     // sum of weights taken from codes
    double weight_band[kTile];  // sum of weight * band
    double weight_var[kTile];   // sum of (weight band)^2 / head_dim, for the estimate of the error
    int64_t refined;            // blocks whose second plane was read
    // [kTile][groups], added to: weight * offset, weight * step, (weight * step)^2
    float *offsets, *steps, *squares;
};

// A panel of keys for many queries: joined codes, their steps, and the largest residual8 and step among them.
constexpr size_t kPanelBlocks = 64, kPanelKeys = kPanelBlocks * kBlock;
constexpr int kDenseRows = 6, kDenseStride = 8;  // queries whose weights [key][kDenseStride] meet values as a matrix
constexpr size_t kSumPiece = 64;                 // float32 sums start afresh after so many keys: long chains round more
constexpr int kCurve = 16;                       // points of the curve of a sample's mass, a factor of two apart
// Whole fours of fours are read, also behind the last key.
inline size_t panel_bytes(int dim) { return kPanelKeys * size_t(padded8(dim)) + 512; }
struct CodedPanel {
    uint8_t* codes;  // [panel_bytes(dim)]
    float* steps;    // [kPanelBlocks * 16]
    float residual, step;
};

// A query of a prompt: rotated, at unit length, in one signed 8-bit digit a coordinate.
struct PanelQuery {
    int8_t digits[kMaxHeadDim];  // [padded16(dim)]
    float step, rest;            // q / |q| ~ step * digits, off by at most `rest`
    // What the sums of digits * code start from, of each eight and of all: -127.5 times the digits, in all off by no
    // more than 1/2.
    int16_t starts[kMaxHeadDim / 8];
    int32_t start;
    // Set by the caller: logit = unit * (key's step) * (start + dot) + centre, in units of log 2.
    float unit, centre;
};

// Values in 8 bits, a range of keys at a time: v ~ low + step * code, off by at most half a step. Codes stand as
// [4 keys][padded16(dim)][4]; what belongs to a range as low, step and mean [padded16(dim)] and the largest step.
constexpr size_t kRangeKeys = 256, kRanges = kPanelKeys / kRangeKeys;
inline size_t range_floats(int dim) { return size_t(3 * padded16(dim) + 1); }
// The largest weight in digits: with the dither, and 1.8e-3 of the exponential, still below 64.
constexpr float kDigits = 62.0f;
// Which keys of a panel a query keeps, in digits or exactly; masses are relative to 2^reference.
struct WeightLimits {
    float from, exact_from, reference;  // logits
    float unit, centre;                 // logit = unit * score + centre
    uint32_t first;                     // position of the panel's first key
};
struct WeighedRow {
    float cap;            // digits are relative to 2^cap
    float omitted, mass;  // from above, relative to 2^reference; of the keys in digits, relative to 2^cap
    uint32_t words;       // bit w: keys 64 w .. 64 w + 63 hold a kept one
    uint32_t coded, exact;
    uint32_t digit_sums[kRanges];
};

struct Kernels {
    const char* name;

    void (*to_float)(Dtype dtype, const void* source, float* target, size_t count);
    // whether |x| <= limit for all of them, which NaN is not
    bool (*all_within)(Dtype dtype, const void* source, size_t count, float limit);
    // y[count][padded16(dim)] = x[count][dim] times matrix[dim][padded16(dim)] (row-major)
    void (*rotate)(const float* matrix, int dim, const float* x, size_t count, float* y);
    // Code 16 rotated keys y[16][padded16(dim)]; norms2 are the squared norms before rotation.
    void (*code_keys)(int dim, const float* y, const double* norms, double relative_slack, uint8_t* high, uint8_t* low);
    // Codes one value; `parameters` is the key's place (2 * lane bytes) in its block's first piece.
    void (*code_value)(int dim, const float* value, uint8_t* row, uint8_t* parameters);
    // Digits of a rotated query y[padded16(dim)]; high and low have padded16(dim) places.
    void (*split_query)(const float* y, int dim, int8_t* high, int8_t* low, QueryDigits* found);

    // estimates[q][block * 16 + i] for `blocks` blocks, every `spacing`-th; maxima[q] is raised to the largest.
    void (*scan)(const uint8_t* high, int dim, size_t blocks, size_t spacing, const CodedQuery* queries, int count,
                 float* estimates, size_t estimate_stride, float* maxima);
    // The same blocks in one pass: upper bounds (estimate + band) instead of estimates, their largest estimate, and the
    // sum of exp(estimate - largest), at most 6.2 % too large.
    void (*scan_mass)(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, int count, float* uppers,
                      size_t stride, float* maxima, double* masses);
    // The same blocks, at most 128 and with finite bands: references[q] is their largest upper bound, and
    // block_masses[q * mass_stride + block] the sum of exp(upper - reference) over the keys of a block, from above by
    // at most 6.2 %; written up to a multiple of 8 blocks. sampled[i * kTile + q]: the sum of exp(estimate -
    // reference) over block i * kMassBlocks + kWeighedBlock.
    void (*scan_blocks)(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, int count,
                        float* references, float* block_masses, size_t mass_stride, float* sampled);
    // The same blocks for thresholds that are known: masks[block * kTile + q], lanes whose upper bound reaches
    // thresholds[q]. Nothing else is written. False: there are none.
    bool (*scan_reach)(const uint8_t* high, int dim, size_t blocks, const CodedQuery* queries, int count,
                       const float* thresholds, uint16_t* masks);
    // out = exp(x - reference)
    void (*exp_into)(const float* x, size_t count, float reference, float* out);
    // x *= factor
    void (*scale)(float* x, size_t count, float factor);
    // sum of the x[i] below the limit
    double (*sum_below)(const float* x, size_t count, float limit);
    // Sum, over the blocks of 16 with block_masses not below `mass_from`, of weights where estimate < threshold.
    double (*mass_left)(const float* estimates, const float* weights, const float* block_masses, size_t blocks,
                        float mass_from, float threshold);
    // Mass that a threshold b would omit in a sample: the sum of upper_weights where upper < b, and of
    // weights where estimate < b <= upper.
    double (*mass_below)(const float* estimates, const float* uppers, const float* weights, const float* upper_weights,
                         size_t count, float threshold);
    // sum of exp(x - reference)
    double (*sum_exp)(const float* x, size_t count, float reference);
    // Estimates of `blocks` blocks from both planes; maxima as in `scan`.
    void (*refine)(const uint8_t* high, const uint8_t* low, int dim, size_t blocks, const CodedQuery* queries,
                   int count, float* estimates, size_t estimate_stride, float* maxima);
    // Estimates [count][16] of the blocks of a list, from both planes.
    void (*refine_listed)(const uint8_t* high, const uint8_t* low, int dim, const uint32_t* blocks, size_t count,
                          const CodedQuery* query, float* estimates);
    // Two-stage selection over blocks. In doubt for a query are the keys whose upper bound reaches its threshold; or,
    // when block_masses are given, the blocks whose upper mass is not below `mass_from`; a block in doubt for one query
    // is refined for all. Reading the second plane of a block costs the same for one key as for all, so what counts is
    // what the block may weigh. `reaching` are the masks of `scan_reach`, if that was the scan. `value_parameters` is
    // null when everything kept is read at full precision. `later`: blocks behind these whose masses are known too, so
    // that the first of them in doubt can be asked for.
    void (*select)(const uint8_t* high, const uint8_t* low, const uint8_t* value_parameters, int dim, int value_dim,
                   size_t blocks, size_t later, uint32_t first_key, const CodedQuery* queries, int count,
                   const Selection* selection, Sums wanted, const float* uppers, size_t stride,
                   const float* block_masses, size_t mass_stride, const uint16_t* reaching, KeptKeys* kept,
                   SelectionSums* sums);
    // accumulators[q][groups * 32] += scaled * code over the kept keys
    void (*accumulate_codes)(const uint8_t* rows, int dim, const KeptKeys* kept, int count, float* accumulators);
    // out[i] = estimates[i] + sign * band, for the keys of `blocks` blocks; the band is that of 4 bits, or
    // with `refined` of 8. In place when out is estimates. -inf (a key that is hidden) stays.
    void (*bounds)(const uint8_t* high, const uint8_t* low, int dim, size_t blocks, const CodedQuery* query,
                   bool refined, const float* estimates, float sign, float* out);

    float (*dot)(Dtype dtype, const void* row, const float* query, int dim);
    double (*dot64)(Dtype dtype, const void* row, const float* query, int dim);
    void (*axpy)(Dtype dtype, const void* row, float weight, int dim, float* accumulator);
    // Blocks of keys [dim][16] in `dtype`. masks[q][block]: lanes whose float32 score is not below
    // thresholds[q] (NaN counts as not below).
    void (*flat_masks)(Dtype dtype, const void* blocks, int dim, size_t block_count, const float* queries, int count,
                       const float* thresholds, uint16_t* masks, size_t mask_stride);
    // The 16 scores of one block in float64; float32 products are exact there.
    void (*flat_block64)(Dtype dtype, const void* block, int dim, const float* query, double* scores);
    // how many x[i] are not below the threshold
    size_t (*count_from)(const float* x, size_t count, float threshold);

    // ---- prompts (panel_loops.h); logits in units of log 2
    void (*unpack_panel)(const uint8_t* high, const uint8_t* low, int dim, size_t blocks, size_t first,
                         CodedPanel* panel);
    void (*code_query)(const float* rotated, int dim, PanelQuery* query);
    void (*score_panel)(const CodedPanel* panel, int dim, size_t begin, size_t end, const PanelQuery* queries,
                        int count, bool in_units, float* scores, size_t stride);
    size_t (*select_row)(const float* logits, size_t count, float threshold, float reference, uint32_t first,
                         uint32_t* positions, float* kept, float* omitted, uint32_t* keys_skipped);
    double (*weigh)(const float* logits, size_t count, float reference, float* weights);
    float (*largest_of)(const float* x, size_t count);
    float (*mass_curve)(const float* logits, size_t count, float* curve);
    size_t (*places_from)(const float* x, size_t count, float from, const uint32_t* positions, uint32_t* places,
                          uint32_t* chosen);
    void (*accumulate_rows)(Dtype dtype, const void* rows, size_t stride, const uint32_t* keys, const float* weights,
                            size_t count, int dim, float* accumulator);
    void (*accumulate_dense)(Dtype dtype, const void* rows, size_t stride, size_t count, const float* weights, int dim,
                             float* accumulators, size_t accumulator_stride);
    void (*dot_rows)(Dtype dtype, const void* rows, size_t stride, const uint32_t* keys, size_t count,
                     const float* query, int dim, float scale, float* out);
    void (*dot_rows64)(Dtype dtype, const void* rows, size_t stride, const uint32_t* keys, size_t count,
                       const float* query, int dim, double* out);
    void (*hide_masked)(const uint8_t* mask, size_t count, float* logits);

    // ---- prompts: weights and values in 8 bits (weight_loops.h)
    void (*code_values)(Dtype dtype, const void* rows, size_t stride, int dim, uint8_t* codes, float* range);
    void (*weigh_panel)(const float* scores, size_t count, const WeightLimits* limits, int8_t* digits,
                        uint32_t* positions, WeighedRow* out);
    void (*multiply_panel)(const uint8_t* codes, const float* ranges, int dim, const uint32_t* words,
                           const int8_t* digits, const float* units, const uint32_t* digit_sums, int count,
                           float* accumulators, size_t stride);
};

// The level in use: the best the machine has, or what HSR_ISA or use_isa asked for.
const Kernels& kernels();
std::string isa_in_use();
std::vector<std::string> isa_available();
// Throws std::invalid_argument when the level is unknown or the machine lacks it.
void use_isa(const std::string& name);

}  // namespace hsr

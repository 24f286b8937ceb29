// One call of `prefill`, and what its parts share. Private to attention/: each prompt_*.cpp defines some of the members
// declared here. DESIGN.md ("Prompts") says how they follow one another.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "attention/call.h"
#include "attention/prefill.h"

namespace hsr::prompts {

constexpr double kLog2e = 1.4426950408889634;
constexpr size_t kRowsAtOnce = kDenseRows;  // their logits over a panel stay in the first cache
constexpr size_t kListRoom = kPanelKeys + 64;
// Rows of logits 4 KiB apart would share the same sets of the first cache.
constexpr size_t kLogitStride = kPanelKeys + 16;
// Where rows keep more than this share of a panel, their weights meet its values as a dense product.
constexpr double kDenseShare = 0.25;
constexpr size_t kTileRows = 192;
constexpr size_t kFewestRows = 24;  // below, the kernels of decoding do as well
// Band of an 8-bit logit, in nats, above which weights from codes would leave the range of float32.
constexpr double kSafeBand = 20.0;
// What the line 1 + f lies above 2^f on average: the integral of (1 + f) 2^-f over [0, 1].
constexpr double kLineMean = 1.0407;
// Float32 sums of masses, and the rounding of the line itself.
constexpr double kSumExcess = 1.0001;
// The part of epsilon that guessed thresholds aim at, and that they never exceed. Aims of 0.85, 0.92 and 0.96 measured
// 362, 345 and 350 ms a layer (8k, AVX2): lower ones keep more, higher ones select more panels twice.
constexpr double kAim = 0.92, kSpend = 0.99;
constexpr size_t kSampleBlocks = 16;
// Weights from here on, as a share of the mass, are never digits: a digit is then at most 2^-15 of the mass, and the
// dither of thousands of small weights stays below 0.4 % of the spread of the values.
constexpr double kLargestDigits = 1.0 / 512.0;
// Of weights in digits: what the exponential is off by, less than 1.8e-3, and the rounding of logits.
constexpr double kDigitExcess = 1.9e-3;

// log2 within 0.01, for guesses that a bound then checks.
inline double quick_log2(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    const double exponent = double(int64_t(bits >> 52) - 1023);
    bits = (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull;
    double m;
    std::memcpy(&m, &bits, 8);
    return exponent + (2.0 - m * (1.0 / 3.0)) * m - 5.0 / 3.0;
}

// exp(x) - 1 from above: exp(x) <= (2 + x) / (2 - x) for 0 <= x < 2.
inline double expm1_above(double x) { return x < 1 ? x / (1 - 0.5 * x) * (1 + 1e-12) : std::expm1(x) * (1 + 1e-12); }

// One query of one head on its way through the panels. Masses are relative to 2^reference.
struct Row {
    int head;
    int64_t query, visible, seen;
    size_t place;   // index into the results
    size_t blocks;  // coded blocks it sees, but for its own
    const uint8_t* mask;
    double norm, length;              // length: scale * |q|, in units of the logits
    double float_slack;               // of a logit from full-precision rows
    double threshold;                 // of the rule, in units of the logits
    double fixed_band;                // band from the rounding of the query
    double reference, mass, omitted;  // of the keys that are kept, and a bound of the others
    double sure;                      // a lower bound of the mass that is kept
    double stand_in;                  // likely mass of what was left out of panels whose mean value stands in for it
    double coded;                     // mass of keys kept from codes of values
    double doubtful, spread2;         // by how much weights from estimates may be off, and a sum for the estimate
    double blurred;                   // of values from codes: mass times half their widest step
    float curve[kCurve];              // mass of sampled keys below 2^(curve_top - j)
    float curve_top;                  // -inf: nothing is known, and everything is kept
    double top;                       // ReLU: the largest excess so far
    int64_t kept, exact, sketched, candidates;

    double surely() const { return sure * (1 - 1e-4); }  // less the rounding of weights and sums
};

// What a row would keep of a panel at some threshold.
struct Attempt {
    size_t listed;        // keys in the workspace, with their estimates
    const float* scores;  // or without: of the keys from `first` on, in units of the query
    size_t first;
    double omitted;  // mass of the others, from above but for the band of their estimates
    double digits;   // mass of what became digits, relative to 2^cap
    double cap;
};

struct Workspace {
    std::vector<uint8_t> codes;
    std::vector<float> steps, logits, vectors, accumulators, coded_sums, stand_ins, mean_value, kept, dots;
    std::vector<uint32_t> exact_positions, exact_places;
    std::vector<double> excesses;
    // What each of the rows at once keeps of a panel, for the sums over the values.
    std::vector<uint32_t> position_lists;
    std::vector<float> weight_lists, dense_weights;
    size_t counts[kRowsAtOnce];
    // Rows at once that see a whole panel of coded values: [row][key].
    std::vector<int8_t> digits;
    float units[kRowsAtOnce];
    uint32_t words[kRowsAtOnce];  // bit w: keys 64 w .. 64 w + 63 hold one in digits
    uint32_t digit_sums[kRowsAtOnce * kRanges];
    size_t mean_keys = 0;           // of the panel in hand, whose mean is in mean_value
    uint32_t* positions = nullptr;  // of the row in hand
    float* weights = nullptr;
    size_t* count = nullptr;
    std::vector<PanelQuery> queries;
    std::vector<Row> rows;
    CodedPanel panel{};

    void reserve(int dim, int value_dim) {
        codes.resize(panel_bytes(dim) + 64);
        // A load of 64 bytes should not straddle two lines of the cache.
        panel.codes = codes.data() + (64 - reinterpret_cast<uintptr_t>(codes.data()) % 64) % 64;
        steps.resize(kPanelKeys);
        panel.steps = steps.data();
        logits.resize(kRowsAtOnce * kLogitStride);
        vectors.resize(kTileRows * size_t(padded16(dim)));
        for (auto* sums : {&accumulators, &coded_sums, &stand_ins})
            sums->resize(kTileRows * size_t(padded16(value_dim)));
        mean_value.resize(size_t(padded16(value_dim)));
        for (auto* list : {&kept, &dots}) list->resize(kListRoom);
        for (auto* list : {&exact_positions, &exact_places}) list->resize(kListRoom);
        position_lists.resize(kRowsAtOnce * kListRoom);
        weight_lists.resize(kRowsAtOnce * kListRoom);
        dense_weights.resize(kPanelKeys * kDenseStride);
        digits.resize(kRowsAtOnce * kPanelKeys);
        excesses.resize(kListRoom);
        queries.resize(kTileRows);
        rows.resize(kTileRows);
    }
    void take(size_t slot) {
        positions = position_lists.data() + slot * kListRoom;
        weights = weight_lists.data() + slot * kListRoom;
        count = counts + slot;
        *count = 0;
    }
};

class Prefill : Call {
public:
    Prefill(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
            const AttendResult& result)
        : Call(cache, settings, queries, result),
          dim_(cache.key_dim()),
          value_dim_(cache.value_dim()),
          units_(settings.rule == Rule::relu ? 1.0 : kLog2e),
          budget_(settings.epsilon / (1.0 - settings.epsilon)) {}

    AttendWork run();

private:
    // Left out keys are not only bounded: something stands in for them (stand_in.h), where the row sees all of a
    // panel's coded ranges.
    bool stands_in() const { return settings_.sketch_tail && !relu(); }
    // Selection by full-precision logits against a given threshold.
    bool exact_rule() const { return relu() || (settings_.rule == Rule::threshold && !settings_.sketch_tail); }
    size_t range_bytes() const { return kRangeKeys * size_t(padded16(value_dim_)); }
    float* vector(Workspace& space, size_t i) const { return space.vectors.data() + i * size_t(padded16(dim_)); }
    float* accumulator(Workspace& space, size_t i) const {
        return space.accumulators.data() + i * size_t(padded16(value_dim_));
    }
    // Values from codes, and mean values in place of what was left out, are kept apart: finish_row mixes what stands in
    // from both, and the certificate asks how far that is from the answer.
    float* coded_sum(Workspace& space, size_t i) const {
        return space.coded_sums.data() + i * size_t(padded16(value_dim_));
    }
    float* stand_in(Workspace& space, size_t i) const {
        return space.stand_ins.data() + i * size_t(padded16(value_dim_));
    }
    // Blocks of a panel that a row sees.
    static size_t blocks_of(const Row& row, size_t first) {
        return row.blocks > first ? std::min(row.blocks - first, kPanelBlocks) : 0;
    }

    // ---- prefill.cpp
    void code_values(size_t heads);
    void run_tile(int head, size_t tile);
    void run_panel(Workspace& space, int head, size_t count, size_t panel, double remaining);
    int64_t run_ranges(Workspace& space, size_t at, size_t here, int head, size_t first, size_t ranges,
                       double remaining);
    void mean_of_ranges(Workspace& space, const float* own, size_t ranges);
    int64_t run_rest(Workspace& space, size_t at, size_t here, int head, size_t first, size_t begin, size_t end,
                     double remaining);
    void fetch_query(int head, size_t at) const;
    void fetch_rows(size_t first, size_t count, int head) const;

    // ---- prompt_query.cpp
    void start_row(Workspace& space, size_t i, int head, size_t at);
    void code(Workspace& space, size_t i, int head);
    double band(const Row& row, const PanelQuery& query, const CodedPanel& panel) const;
    void own_block(Workspace& space, size_t i, int head);
    void finish_row(Workspace& space, size_t i, int head);
    void certify(const Row& row, int head, double mass, const float* stands, const float* out);

    // ---- prompt_guess.cpp
    void sample(Workspace& space, int head, size_t count, size_t blocks);
    double likely_mass(const Row& row, double remaining) const;
    double guess(const Row& row, double remaining, double off) const;

    // ---- prompt_select.cpp
    template <class Try>
    Attempt within_budget(Workspace& space, size_t i, double threshold, double off, const Try& attempt);
    int64_t select(Workspace& space, size_t i, int head, size_t first, size_t count, const float* logits,
                   double remaining);
    double exact_from(const Row& row, double remaining) const;
    int64_t select_digits(Workspace& space, size_t i, int head, size_t first, size_t count, size_t slot,
                          double remaining, double widest_step);
    int64_t select_by_threshold(Workspace& space, size_t i, int head, size_t first, size_t count, const float* logits,
                                double wide);

    // ---- prompt_rows.cpp
    void raise_reference(Workspace& space, size_t i, double reference);
    void rescale(Workspace& space, size_t i, double factor);
    void exact_logits(Workspace& space, size_t i, int head, const uint32_t* keys, size_t count, float* out);
    void add_exact(Workspace& space, size_t i, int head, size_t count);
    void weigh_excesses(Workspace& space, size_t i, size_t count);
    size_t keep_exact(Workspace& space, size_t i, int head, size_t count);
    void lift_reference(Workspace& space, size_t i, size_t count);
    void accumulate(Workspace& space, size_t i, int head, size_t slot);
    void accumulate_dense(Workspace& space, size_t i, int head, size_t first, size_t count);
    void add(Workspace& space, size_t i, int head, size_t found, double off, double remaining);

    const int dim_, value_dim_;
    const double units_;   // logits are natural for ReLU, in units of log 2 for softmax
    const double budget_;  // omitted mass allowed for each unit of kept mass
    size_t tile_rows_ = kTileRows;
    size_t ranges_ = 0;  // of coded values, for each key head
    std::unique_ptr<uint8_t[]> value_codes_;
    std::unique_ptr<float[]> value_ranges_;
    std::atomic<int64_t> scored_{0}, full_{0}, sketched_{0}, skipped_{0}, panels_{0}, again_{0};
};

}  // namespace hsr::prompts

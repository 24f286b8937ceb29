#include "attention/prefill.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "attention/certificate.h"
#include "threads.h"

namespace hsr {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kUnit = 5.9604644775390625e-8;  // 2^-24, the rounding unit of float32
constexpr double kLog2e = 1.4426950408889634;
constexpr size_t kRowsAtOnce = kDenseRows;  // their logits over a panel stay in the first cache
constexpr size_t kListRoom = kPanelKeys + 64;
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
// The part of epsilon that guessed thresholds aim at, and that they never exceed.
constexpr double kAim = 0.85, kSpend = 0.99;
constexpr size_t kSampleBlocks = 16;
// Weights from here on, as a share of the mass, are never digits: a digit is then at most 2^-16 of the mass, and the
// dither of thousands of small weights stays below 0.4 % of the spread of the values.
constexpr double kLargestDigits = 1.0 / 512.0;
// Of weights in digits: what the exponential is off by, less than 1e-4, and the rounding of logits.
constexpr double kDigitExcess = 2e-4;

// log2 within 0.01, for guesses that a bound then checks.
double quick_log2(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    const double exponent = double(int64_t(bits >> 52) - 1023);
    bits = (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull;
    double m;
    std::memcpy(&m, &bits, 8);
    return exponent + (2.0 - m / 3.0) * m - 5.0 / 3.0;
}

// exp(x) - 1 from above: exp(x) <= (2 + x) / (2 - x) for 0 <= x < 2.
double expm1_above(double x) { return x < 1 ? x / (1 - 0.5 * x) * (1 + 1e-12) : std::expm1(x) * (1 + 1e-12); }

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
    double stand_in;                  // mass given to the mean values of panels in place of what was left out there
    double doubtful, spread2;         // by how much weights from estimates may be off, and a sum for the estimate
    double blurred;                   // of values from codes: mass times half their widest step
    float curve[kCurve];              // mass of sampled keys below 2^(curve_top - j)
    float curve_top;                  // -inf: nothing is known, and everything is kept
    double top;                       // ReLU: the largest excess so far
    int64_t kept, exact, sketched, candidates;

    double surely() const { return sure * (1 - 1e-4); }  // less the rounding of weights and sums
};

struct Workspace {
    std::vector<uint8_t> codes;
    std::vector<float> steps, logits, vectors, accumulators, stand_ins, mean_value, kept, dots;
    std::vector<uint32_t> exact_positions, exact_places;
    std::vector<double> excesses;
    // What each of the rows at once keeps of a panel, for the sums over the values.
    std::vector<uint32_t> position_lists;
    std::vector<float> weight_lists, dense_weights;
    size_t counts[kRowsAtOnce];
    // Rows at once that see a whole panel of coded values: [row][key].
    std::vector<int8_t> digits;
    float units[kRowsAtOnce];
    uint32_t digit_sums[kRowsAtOnce * kRanges];
    size_t mean_keys = 0;           // of the panel in hand, whose mean is in mean_value
    uint32_t words;                 // of 64 keys with a digit that is not zero
    uint32_t* positions = nullptr;  // of the row in hand
    float* weights = nullptr;
    size_t* count = nullptr;
    std::vector<PanelQuery> queries;
    std::vector<Row> rows;
    CodedPanel panel{};

    void reserve(int dim, int value_dim) {
        codes.resize(kPanelKeys * size_t(padded8(dim)) + 64);
        // A load of 64 bytes should not straddle two lines of the cache.
        panel.codes = codes.data() + (64 - reinterpret_cast<uintptr_t>(codes.data()) % 64) % 64;
        steps.resize(kPanelKeys);
        panel.steps = steps.data();
        logits.resize(kRowsAtOnce * kPanelKeys);
        vectors.resize(kTileRows * size_t(padded16(dim)));
        for (auto* sums : {&accumulators, &stand_ins}) sums->resize(kTileRows * size_t(padded16(value_dim)));
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

class Prefill {
public:
    Prefill(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
            const AttendResult& result)
        : cache_(cache),
          settings_(settings),
          queries_(queries),
          result_(result),
          m_(queries.queries.tokens),
          heads_(int(queries.queries.heads)),
          group_(heads_ / cache.kv_heads()),
          dim_(cache.key_dim()),
          value_dim_(cache.value_dim()),
          units_(settings.rule == Rule::relu ? 1.0 : kLog2e),
          budget_(settings.epsilon / (1.0 - settings.epsilon)) {}

    AttendWork run() {
        const size_t per_head = size_t(m_) * size_t(group_), heads = size_t(cache_.batch() * cache_.kv_heads());
        // Enough tiles for all threads, of at most kTileRows rows, whole positions if possible.
        const size_t wanted = std::max<size_t>(1, per_head * heads / size_t(num_threads()) / 4);
        tile_rows_ = std::clamp<size_t>(wanted, kFewestRows, kTileRows);
        if (tile_rows_ > size_t(group_)) tile_rows_ -= tile_rows_ % size_t(group_);
        const size_t tiles = (per_head + tile_rows_ - 1) / tile_rows_;
        if (stands_in()) code_values(heads);
        parallel_for(heads * tiles, [&](size_t task) { run_tile(int(task / tiles), task % tiles); });
        AttendWork work;
        work.sketch_scored = scored_;
        work.refined = scored_;
        work.full_scored = full_;
        work.sketched = sketched_;
        work.skipped = skipped_;
        work.panels = panels_;
        work.selected_again = again_;
        return work;
    }

private:
    // Left out keys are not only bounded: the mean value of their panel stands in for them, where the row sees all of
    // it.
    bool stands_in() const { return settings_.sketch_tail && !relu(); }
    bool relu() const { return settings_.rule == Rule::relu; }
    // Selection by full-precision logits against a given threshold.
    bool exact_rule() const { return relu() || (settings_.rule == Rule::threshold && !settings_.sketch_tail); }

    // The values of every whole range that a query may see, in 8 bits.
    void code_values(size_t heads) {
        const int64_t most = *std::max_element(queries_.visible, queries_.visible + m_);
        ranges_ = size_t(std::clamp<int64_t>(most, 0, int64_t(cache_.size()))) / kRangeKeys;
        value_codes_.reset(new uint8_t[heads * ranges_ * range_bytes()]);
        value_ranges_.reset(new float[heads * ranges_ * range_floats(value_dim_)]);
        parallel_for(heads * ranges_, [&](size_t at) {
            const int head = int(at / ranges_);
            const RowStore& rows = cache_.values();
            kernels().code_values(rows.dtype(), rows.row(at % ranges_ * kRangeKeys, head), rows.token_bytes(),
                                  value_dim_, value_codes_.get() + at * range_bytes(),
                                  value_ranges_.get() + at * range_floats(value_dim_));
        });
    }
    size_t range_bytes() const { return kRangeKeys * size_t(padded16(value_dim_)); }

    void run_tile(int head, size_t tile) {
        static thread_local Workspace space;
        space.reserve(dim_, value_dim_);
        const size_t per_head = size_t(m_) * size_t(group_), from = tile * tile_rows_;
        const size_t count = std::min(tile_rows_, per_head - from);
        size_t blocks = 0;
        for (size_t i = 0; i < count; ++i) {
            start_row(space, i, head, from + i);
            blocks = std::max(blocks, space.rows[i].blocks);
        }
        size_t fewest = blocks;
        for (size_t i = 0; i < count; ++i) fewest = std::min(fewest, space.rows[i].blocks);
        if (!exact_rule() && fewest >= kPanelBlocks) sample(space, head, count, fewest);
        const size_t panels = (blocks + kPanelBlocks - 1) / kPanelBlocks;
        // The newest keys and the first ones hold most of the mass: with them, the thresholds of the rest are known.
        for (size_t p = 0; p < panels; ++p) {
            const size_t panel = p == 0 ? panels - 1 : p == 1 ? 0 : panels - p;
            run_panel(space, head, count, panel, double(panels - p) / double(panels));
        }
        for (size_t i = 0; i < count; ++i) finish_row(space, i, head);
    }

    float* accumulator(Workspace& space, size_t i) const {
        return space.accumulators.data() + i * size_t(padded16(value_dim_));
    }
    // Mean values in place of what was left out, kept apart: the certificate asks how far they are from the answer.
    float* stand_in(Workspace& space, size_t i) const {
        return space.stand_ins.data() + i * size_t(padded16(value_dim_));
    }
    float* vector(Workspace& space, size_t i) const { return space.vectors.data() + i * size_t(padded16(dim_)); }

    // ---- a query made ready, and its own block at full precision

    void start_row(Workspace& space, size_t i, int head, size_t at) {
        Row& row = space.rows[i];
        row = Row();
        const int b = head / cache_.kv_heads();
        row.query = int64_t(at / size_t(group_));
        row.head = head % cache_.kv_heads() * group_ + int(at % size_t(group_));
        row.place = (size_t(b) * size_t(heads_) + size_t(row.head)) * size_t(m_) + size_t(row.query);
        row.visible = std::clamp<int64_t>(queries_.visible[row.query], 0, int64_t(cache_.size()));
        row.mask = queries_.mask
                       ? queries_.mask + b * queries_.mask_batch_stride + row.query * queries_.mask_query_stride
                       : nullptr;
        row.seen = row.visible;
        if (row.mask) row.seen -= std::count(row.mask, row.mask + row.visible, uint8_t(0));
        row.reference = -double(kInf);
        row.curve_top = -kInf;
        std::fill_n(accumulator(space, i), padded16(value_dim_), 0.0f);
        std::fill_n(stand_in(space, i), padded16(value_dim_), 0.0f);
        float* q = vector(space, i);
        std::fill_n(q, padded16(dim_), 0.0f);
        queries_.queries.read(b, row.head, row.query, q);
        row.norm = std::sqrt(kernels().dot64(Dtype::float32, q, q, dim_));
        row.length = settings_.scale * row.norm * units_;
        row.threshold = queries_.thresholds ? queries_.thresholds[row.place] * units_ : 0.0;
        // A float32 logit: dim / 32 + 8 roundings along its chain, of terms no larger than |q| |k|.
        row.float_slack = row.length * cache_.largest_key_norm(head) * kUnit * (dim_ / 32.0 + 9.0);
        if (row.seen == 0) return;
        code(space, i, head);
        row.blocks = size_t(row.visible - 1) / kBlock;
        own_block(space, i, head);
    }

    void code(Workspace& space, size_t i, int head) {
        Row& row = space.rows[i];
        PanelQuery& query = space.queries[i];
        const KeySketch& sketch = cache_.key_sketch(head);
        alignas(64) float unit[kMaxHeadDim], rotated[kMaxHeadDim];
        const float* q = vector(space, i);
        const float to_unit = row.norm > 0 ? float(1.0 / row.norm) : 0.0f;
        float centre[4] = {};
        for (int j = 0; j < dim_; ++j) unit[j] = q[j] * to_unit;
        int j = 0;
        for (; j + 4 <= dim_; j += 4)
            for (int k = 0; k < 4; ++k) centre[k] += unit[j + k] * sketch.centre()[size_t(j + k)];
        for (; j < dim_; ++j) centre[0] += unit[j] * sketch.centre()[size_t(j)];
        const Rotation& r = rotation(dim_);
        kernels().rotate(r.matrix.data(), dim_, unit, 1, rotated);
        kernels().code_query(rotated, dim_, &query);
        query.start = -int32_t((255 * int64_t(query.digit_sum)) >> 1);
        query.unit = float(row.length * query.step);
        query.centre = float(row.length * double((centre[0] + centre[1]) + (centre[2] + centre[3])));
        // <q,k> - <q~,k~> = <q~, k - k~> + <q - q~, k> with |q~| <= (1 + rho) |q|, |q - q~| <= rho |q|.
        const double root = std::sqrt(double(dim_)), rho = double(query.rest) + r.relative_slack + 3e-7;
        const double longest = sketch.largest_norm();
        row.fixed_band =
            row.length *
            ((rho * longest) +
             // float32 rounding: 32 terms no larger than the lengths of decoded query and key, or the centre's logit
             kUnit * (32.0 * root * longest + (8.0 + dim_) * sketch.centre_norm())) *
            (1 + 1e-6);
    }

    // Band of all estimates of a row in the panel, in the units of the logits.
    double band(const Row& row, const PanelQuery& query, const CodedPanel& panel) const {
        const double rho = double(query.rest) + 1e-5;
        // The start of the sum was rounded by at most half a unit.
        return row.length * (1 + rho) * double(panel.residual) * (1 + 1e-6) +
               0.5 * double(query.unit) * double(panel.step) * (1 + 1e-6) + row.fixed_band;
    }

    // The newest keys, and the uncoded ones: 1 to 16 of them.
    void own_block(Workspace& space, size_t i, int head) {
        Row& row = space.rows[i];
        space.take(0);
        size_t count = 0;
        for (size_t key = row.blocks * kBlock; key < size_t(row.visible); ++key)
            if (!row.mask || row.mask[key]) space.positions[count++] = uint32_t(key);
        if (!count) return;
        add_exact(space, i, head, count);
        accumulate(space, i, head, 0);
    }

    // Masses become relative to 2^reference.
    void raise_reference(Workspace& space, size_t i, double reference) {
        Row& row = space.rows[i];
        rescale(space, i, row.reference == -double(kInf) ? 0.0 : std::exp2(row.reference - reference));
        row.reference = reference;
    }
    void rescale(Workspace& space, size_t i, double factor) {
        Row& row = space.rows[i];
        for (double* sum : {&row.mass, &row.sure, &row.omitted, &row.stand_in, &row.doubtful, &row.blurred})
            *sum *= factor;
        row.spread2 *= factor * factor;
        for (float& mass : row.curve) mass *= float(factor);
        for (float* sum : {accumulator(space, i), stand_in(space, i)})
            for (int j = 0; j < padded16(value_dim_); ++j) sum[j] *= float(factor);
    }

    // out[k] = full-precision logit of keys[k]; `out` has room for a multiple of 4.
    void exact_logits(Workspace& space, size_t i, int head, const uint32_t* keys, size_t count, float* out) {
        const RowStore& rows = cache_.keys();
        kernels().dot_rows(rows.dtype(), rows.row(0, head), rows.token_bytes(), keys, count, vector(space, i), dim_,
                           float(settings_.scale * units_), out);
        space.rows[i].exact += int64_t(count);
    }

    // The keys in space.positions at full precision.
    void add_exact(Workspace& space, size_t i, int head, size_t count) {
        Row& row = space.rows[i];
        if (exact_rule()) {
            count = keep_exact(space, i, head, count);
        } else {
            exact_logits(space, i, head, space.positions, count, space.kept.data());
        }
        if (!count) return;
        if (relu()) {
            weigh_excesses(space, i, count);
        } else {
            lift_reference(space, i, count);
            const double mass = kernels().weigh(space.kept.data(), count, float(row.reference), space.weights);
            row.mass += mass;
            row.sure += mass;
        }
        row.kept += int64_t(count);
        *space.count = count;
    }

    // Weights are relative to the power of the largest excess so far, so that none leaves float32.
    void weigh_excesses(Workspace& space, size_t i, size_t count) {
        Row& row = space.rows[i];
        const double top =
            std::max(row.top, *std::max_element(space.excesses.begin(), space.excesses.begin() + int64_t(count)));
        if (top > row.top) {
            rescale(space, i, row.top > 0 ? power_of(row.top / top) : 0.0);
            row.top = top;
        }
        const double over = 1.0 / top;
        for (size_t k = 0; k < count; ++k) {
            const float weight = float(power_of(space.excesses[k] * over));
            space.weights[k] = weight;
            row.mass += double(weight);
        }
    }

    double power_of(double x) const {
        double product = x;
        for (int p = 1; p < settings_.power; ++p) product *= x;
        return product;
    }

    // Of the candidates in space.positions, those whose logit reaches the threshold in float64: their excesses, and for
    // softmax the logits. The mass of the others is omitted.
    size_t keep_exact(Workspace& space, size_t i, int head, size_t count) {
        Row& row = space.rows[i];
        const RowStore& rows = cache_.keys();
        kernels().dot_rows64(rows.dtype(), rows.row(0, head), rows.token_bytes(), space.positions, count,
                             vector(space, i), dim_, space.excesses.data());
        row.exact += int64_t(count);
        row.candidates += int64_t(count);
        size_t kept = 0;
        for (size_t k = 0; k < count; ++k) {
            const double logit = space.excesses[k] * settings_.scale * units_, excess = logit - row.threshold;
            const bool keep = relu() ? excess > 0 : excess >= 0;
            if (!keep && !relu()) {
                if (row.reference == -double(kInf)) row.reference = logit;
                row.omitted += std::exp2(logit - row.reference);
            }
            space.excesses[kept] = excess;
            space.kept[kept] = float(logit);
            space.positions[kept] = space.positions[k];
            kept += keep;
        }
        return kept;
    }

    // Weights stay below 2^24 times the reference.
    void lift_reference(Workspace& space, size_t i, size_t count) {
        const float top = kernels().largest_of(space.kept.data(), count);
        if (double(top) > space.rows[i].reference + 24.0) raise_reference(space, i, top);
    }

    void accumulate(Workspace& space, size_t i, int head, size_t slot) {
        const RowStore& rows = cache_.values();
        kernels().accumulate_rows(
            rows.dtype(), rows.row(0, head), rows.token_bytes(), space.position_lists.data() + slot * kListRoom,
            space.weight_lists.data() + slot * kListRoom, space.counts[slot], value_dim_, accumulator(space, i));
    }

    // The values of a panel's keys, for rows that keep much of it.
    void accumulate_dense(Workspace& space, size_t i, int head, size_t first, size_t count) {
        std::fill_n(space.dense_weights.data(), count * kDenseStride, 0.0f);
        for (size_t slot = 0; slot < kRowsAtOnce; ++slot) {
            const uint32_t* positions = space.position_lists.data() + slot * kListRoom;
            const float* weights = space.weight_lists.data() + slot * kListRoom;
            for (size_t k = 0; k < space.counts[slot]; ++k)
                space.dense_weights[(positions[k] - first) * kDenseStride + slot] = weights[k];
        }
        const RowStore& rows = cache_.values();
        kernels().accumulate_dense(rows.dtype(), rows.row(first, head), rows.token_bytes(), count,
                                   space.dense_weights.data(), value_dim_, accumulator(space, i),
                                   size_t(padded16(value_dim_)));
    }

    // ---- a panel of keys for all rows of a tile

    void run_panel(Workspace& space, int head, size_t count, size_t panel, double remaining) {
        const KeySketch& sketch = cache_.key_sketch(head);
        const size_t first = panel * kPanelBlocks;
        size_t blocks = 0;
        for (size_t i = 0; i < count; ++i) blocks = std::max(blocks, blocks_of(space.rows[i], first));
        kernels().unpack_panel(sketch.high(first), sketch.low(first), dim_, blocks, 0, &space.panel);
        fetch_rows(first * kBlock, blocks * kBlock, head);
        space.mean_keys = 0;
        int64_t scored = 0, skipped = 0;
        for (size_t at = 0; at < count; at += kRowsAtOnce) {
            const size_t here = std::min<size_t>(kRowsAtOnce, count - at);
            size_t most = 0, least = kPanelBlocks;
            bool masked = false;
            for (size_t i = at; i < at + here; ++i) {
                const size_t own = blocks_of(space.rows[i], first);
                most = std::max(most, own);
                least = std::min(least, own);
                masked |= space.rows[i].mask != nullptr;
                scored += int64_t(own * kBlock);
            }
            if (!most) continue;
            kernels().score_panel(&space.panel, dim_, (most + 3) / 4, &space.queries[at], int(here),
                                  space.logits.data(), kPanelKeys);
            // Ranges of coded values that all of these rows see; no code knows of a value that a row may not.
            const size_t ranges = masked ? 0 : least * kBlock / kRangeKeys;
            if (ranges_ && ranges) skipped += run_ranges(space, at, here, head, first * kBlock, ranges, remaining);
            const size_t begin = ranges_ ? ranges * kRangeKeys : 0;
            if (begin < most * kBlock)
                skipped += run_rest(space, at, here, head, first, begin, most * kBlock, remaining);
        }
        scored_ += scored;
        skipped_ += skipped;
        ++panels_;
    }

    // Blocks of a panel that a row sees.
    static size_t blocks_of(const Row& row, size_t first) {
        return row.blocks > first ? std::min(row.blocks - first, kPanelBlocks) : 0;
    }

    // Rows at once over the first ranges of a panel: values from codes, except for the keys that are read exactly.
    int64_t run_ranges(Workspace& space, size_t at, size_t here, int head, size_t first, size_t ranges,
                       double remaining) {
        const size_t begin = size_t(head) * ranges_ + first / kRangeKeys, floats = range_floats(value_dim_);
        const float* own = value_ranges_.get() + begin * floats;
        if (space.mean_keys != ranges * kRangeKeys) mean_of_ranges(space, own, ranges);
        float widest = 0;
        for (size_t range = 0; range < ranges; ++range) widest = std::max(widest, own[(range + 1) * floats - 1]);
        int64_t skipped = 0;
        space.words = 0;
        for (size_t slot = 0; slot < here; ++slot) {
            space.take(slot);
            space.units[slot] = 0.0f;
            skipped += select_digits(space, at + slot, head, first, ranges * kRangeKeys, slot, remaining, widest);
        }
        if (space.words)
            kernels().multiply_panel(value_codes_.get() + begin * range_bytes(), own, value_dim_, space.words,
                                     space.digits.data(), space.units, space.digit_sums, int(here),
                                     accumulator(space, at), size_t(padded16(value_dim_)));
        for (size_t slot = 0; slot < here; ++slot) accumulate(space, at + slot, head, slot);
        return skipped;
    }

    void mean_of_ranges(Workspace& space, const float* own, size_t ranges) {
        const size_t wide = size_t(padded16(value_dim_));
        std::fill(space.mean_value.begin(), space.mean_value.end(), 0.0f);
        for (size_t range = 0; range < ranges; ++range)
            kernels().axpy(Dtype::float32, own + range * range_floats(value_dim_) + 2 * wide, 1.0f / float(ranges),
                           value_dim_, space.mean_value.data());
        space.mean_keys = ranges * kRangeKeys;
    }

    // Rows at once over keys begin .. end of a panel, whose values are read in full.
    int64_t run_rest(Workspace& space, size_t at, size_t here, int head, size_t first, size_t begin, size_t end,
                     double remaining) {
        int64_t skipped = 0;
        size_t kept = 0;
        for (size_t slot = 0; slot < here; ++slot) {
            space.take(slot);
            const Row& row = space.rows[at + slot];
            const size_t own = blocks_of(row, first) * kBlock;
            if (own <= begin) continue;
            float* logits = space.logits.data() + slot * kPanelKeys;
            if (own % 64) std::fill(logits + own, logits + (own + 63) / 64 * 64, -kInf);
            if (row.mask) kernels().hide_masked(row.mask + first * kBlock, own, logits);
            skipped += select(space, at + slot, head, first * kBlock + begin, own - begin, logits + begin, remaining);
            kept += *space.count;
        }
        if (here == kRowsAtOnce && double(kept) > kDenseShare * double(here * (end - begin)))
            accumulate_dense(space, at, head, first * kBlock + begin, end - begin);
        else
            for (size_t slot = 0; slot < here; ++slot) accumulate(space, at + slot, head, slot);
        return skipped;
    }

    // How the mass of a row's keys is spread, from sixteen blocks all over those that the tile sees.
    void sample(Workspace& space, int head, size_t count, size_t blocks) {
        const KeySketch& sketch = cache_.key_sketch(head);
        // Never the first block: its keys are like no others.
        const auto place = [&](size_t at) { return (2 * at + 1) * blocks / (2 * kSampleBlocks); };
        for (size_t at = 0; at < kSampleBlocks; ++at)
            kernels().unpack_panel(sketch.high(place(at)), sketch.low(place(at)), dim_, 1, at, &space.panel);
        for (size_t first = 0; first < count; first += kRowsAtOnce) {
            const size_t here = std::min<size_t>(kRowsAtOnce, count - first);
            kernels().score_panel(&space.panel, dim_, kSampleBlocks / 4, &space.queries[first], int(here),
                                  space.logits.data(), kPanelKeys);
            for (size_t i = first; i < first + here; ++i) {
                Row& row = space.rows[i];
                float* logits = space.logits.data() + (i - first) * kPanelKeys;
                if (row.mask)
                    for (size_t at = 0; at < kSampleBlocks; ++at)
                        kernels().hide_masked(row.mask + place(at) * kBlock, kBlock, logits + at * kBlock);
                row.curve_top = kernels().mass_curve(logits, kSampleBlocks * kBlock, row.curve);
                if (row.curve_top == -kInf) continue;
                if (row.reference == -double(kInf)) raise_reference(space, i, row.curve_top);
                const double shift = row.curve_top - row.reference;  // masses count from the reference
                for (float& mass : row.curve) mass *= float(std::exp2(std::clamp(shift, -100.0, 100.0)));
            }
        }
    }

    // The mass of a row in the end: of what is to come, what no single key of the sample holds.
    double likely_mass(const Row& row, double remaining) const {
        const double sampled = row.curve_top == -kInf ? 0.0 : double(row.curve[1]);
        return std::max(row.mass + remaining * double(row.blocks) / double(kSampleBlocks) * sampled, 1e-300);
    }

    // A threshold that is likely to use up the allowed omitted mass evenly over the keys that remain.
    double guess(const Row& row, double remaining, double off) const {
        if (row.curve_top == -kInf) return -double(kInf);
        // A sampled key stands for this many of the remaining ones.
        const double each = remaining * double(row.blocks) / double(kSampleBlocks);
        // Mass that is only likely is counted while little has been seen.
        const double mass = remaining > 0.99 ? likely_mass(row, remaining) : row.mass;
        const double allowed = (kAim * budget_ * mass - row.omitted) / (each * (1 + off));
        if (!(allowed > 0)) return double(row.curve_top) - kCurve;
        int j = 0;
        while (j<kCurve&& double(row.curve[j])> allowed) ++j;
        if (j == 0) return double(row.curve_top);
        if (j == kCurve) return double(row.curve_top) - kCurve + 1;
        // Between two points the mass below a threshold falls like a power of two.
        const double above = row.curve[j - 1], below = std::max(double(row.curve[j]), above * 1e-3);
        const double part =
            std::clamp(quick_log2(allowed / below) / std::max(quick_log2(above / below), 0.01), 0.0, 1.0);
        return double(row.curve_top) - j + part;
    }

    // Rows of a panel will be read here and there: ask for all of them in order.
    void fetch_rows(size_t first, size_t count, int head) const {
        for (const RowStore* rows : {&cache_.keys(), &cache_.values()})
            for (size_t key = first; key < first + count; ++key) {
                const uint8_t* row = rows->row(key, head);
                for (size_t byte = 0; byte < rows->row_bytes(); byte += 64) __builtin_prefetch(row + byte, 0, 2);
            }
    }

    // Returns how many keys stand in words of 64 from which nothing was kept.
    int64_t select(Workspace& space, size_t i, int head, size_t first, size_t count, const float* logits,
                   double remaining) {
        Row& row = space.rows[i];
        const double wide = band(row, space.queries[i], space.panel);
        if (exact_rule()) return select_by_threshold(space, i, head, first, count, logits, wide);
        const double off = expm1_above(wide / kLog2e), factor = (1 + off) * kSumExcess;
        if (row.reference == -double(kInf)) {  // its own block is hidden
            const float top = kernels().largest_of(logits, count);
            if (top == -kInf) return int64_t(count);
            raise_reference(space, i, top);
        }
        double threshold = guess(row, remaining, off);
        // Masses relative to the reference must not overflow; far above it nothing is left out.
        threshold = std::min(threshold, row.reference + 60.0);
        size_t found;
        float omitted;
        uint32_t skipped;
        for (int tries = 0;; ++tries) {
            if (settings_.rule == Rule::threshold) threshold = std::min(threshold, row.threshold);
            found = kernels().select_row(logits, count, float(threshold), float(row.reference), uint32_t(first),
                                         space.positions, space.kept.data(), &omitted, &skipped);
            const double left = row.omitted + double(omitted) * factor;
            if (left <= budget_ * kSpend * row.surely()) break;
            // The keys kept here add to the mass that the omitted share is taken of.
            double mass = row.surely();
            if (found) {
                const float top = kernels().largest_of(space.kept.data(), found);
                if (double(top) > row.reference + 24.0) {  // masses no longer fit: count them from there
                    raise_reference(space, i, top);
                    --tries;
                    continue;
                }
                mass +=
                    kernels().weigh(space.kept.data(), found, float(row.reference), space.weights) / (1 + off) * 0.9999;
            }
            if (left <= budget_ * kSpend * mass || threshold == -double(kInf)) break;
            ++again_;
            const double room = budget_ * kSpend * mass - row.omitted;
            threshold =
                tries < 3 && room > 0 ? threshold - 1.0 - quick_log2(double(omitted) * factor / room) : -double(kInf);
        }
        row.omitted += double(omitted) * factor;
        if (found) add(space, i, head, found, off, remaining);
        return int64_t(skipped);
    }

    // Keys from here on are weighed from full-precision rows.
    double exact_from(const Row& row, double remaining) const {
        const double share = std::min(settings_.exact_share, kLargestDigits);
        const double large = row.reference + quick_log2(share * likely_mass(row, remaining));
        return settings_.rule == Rule::threshold ? std::min(row.threshold, large) : large;
    }

    // As `select`, for ranges of coded values: what is kept but not exactly becomes digits, for multiply_panel.
    int64_t select_digits(Workspace& space, size_t i, int head, size_t first, size_t count, size_t slot,
                          double remaining, double widest_step) {
        Row& row = space.rows[i];
        const float* logits = space.logits.data() + slot * kPanelKeys;
        const double wide = band(row, space.queries[i], space.panel);
        const double off = expm1_above(wide / kLog2e) * (1 + kDigitExcess) + kDigitExcess,
                     factor = (1 + off) * kSumExcess;
        const float top = kernels().largest_of(logits, count);
        if (row.reference == -double(kInf)) raise_reference(space, i, top);  // its own block is hidden
        double threshold = std::min(guess(row, remaining, off), row.reference + 60.0);
        const double exact = exact_from(row, remaining);
        WeighedRow found;
        WeightLimits limits;
        for (int tries = 0;; ++tries) {
            if (settings_.rule == Rule::threshold) threshold = std::min(threshold, row.threshold);
            limits.from = float(threshold);
            limits.exact_from = std::max(float(exact), limits.from);
            limits.cap = std::min(limits.exact_from, top);
            limits.reference = float(row.reference);
            limits.first = uint32_t(first);
            kernels().weigh_panel(logits, count, &limits, space.digits.data() + slot * kPanelKeys, space.positions,
                                  space.kept.data(), &found);
            const double left = row.omitted + double(found.omitted) * factor;
            if (left <= budget_ * kSpend * row.surely()) break;
            double mass = row.surely() + double(found.mass) * std::exp2(limits.cap - row.reference) / (1 + off) * 0.999;
            if (found.exact) {
                const float largest = kernels().largest_of(space.kept.data(), found.exact);
                if (double(largest) > row.reference + 24.0) {  // masses no longer fit: count them from there
                    raise_reference(space, i, largest);
                    --tries;
                    continue;
                }
                mass += kernels().weigh(space.kept.data(), found.exact, float(row.reference), space.weights) /
                        (1 + off) * 0.9999;
            }
            if (left <= budget_ * kSpend * mass || threshold == -double(kInf)) break;
            ++again_;
            const double room = budget_ * kSpend * mass - row.omitted;
            threshold = tries < 3 && room > 0 ? threshold - 1.0 - quick_log2(double(found.omitted) * factor / room)
                                              : -double(kInf);
        }
        row.omitted += double(found.omitted) * factor;
        const double mean_mass = double(found.omitted) / kLineMean;
        row.stand_in += mean_mass;
        kernels().axpy(Dtype::float32, space.mean_value.data(), float(mean_mass), value_dim_, stand_in(space, i));
        space.words |= found.words;
        if (found.exact) add_exact(space, i, head, found.exact);
        if (found.coded) {
            const double cap = std::exp2(limits.cap - row.reference), unit = cap / double(kDigits);
            uint32_t digit_sum = 0;
            for (uint32_t sum : found.digit_sums) digit_sum += sum;
            const double mass = unit * digit_sum, sure = double(found.mass) * cap;
            row.mass += mass;
            row.sure += sure / (1 + off) * (1 - kDigitExcess);
            row.doubtful += sure * off * (1 + 1e-6) + double(found.coded) * unit;
            row.spread2 += sure * off * sure * off / found.coded + double(found.coded) * unit * unit / 3 * dim_;
            row.blurred += mass * 0.5 * widest_step * (1 + 1e-6);
            row.kept += int64_t(found.coded);
            row.sketched += int64_t(found.coded);
            space.units[slot] = float(unit);
            std::copy_n(found.digit_sums, kRanges, space.digit_sums + slot * kRanges);
        }
        return int64_t(count) - 64 * int64_t(__builtin_popcount(found.words));
    }

    // The keys in space.positions, with estimates in space.kept: large shares of the mass get their weight from
    // full-precision rows, the others from the estimate, off by at most the share `off`. All values are read in full.
    void add(Workspace& space, size_t i, int head, size_t found, double off, double remaining) {
        if (!settings_.sketch_tail) return add_exact(space, i, head, found);
        Row& row = space.rows[i];
        const size_t exact =
            kernels().places_from(space.kept.data(), found, float(exact_from(row, remaining)), space.positions,
                                  space.exact_places.data(), space.exact_positions.data());
        if (exact) {
            exact_logits(space, i, head, space.exact_positions.data(), exact, space.dots.data());
            for (size_t k = 0; k < exact; ++k) space.kept[space.exact_places[k]] = space.dots[k];
        }
        lift_reference(space, i, found);
        const double all = kernels().weigh(space.kept.data(), found, float(row.reference), space.weights);
        double exact_mass = 0;
        for (size_t k = 0; k < exact; ++k) exact_mass += double(space.weights[space.exact_places[k]]);
        row.mass += all;
        row.sure += exact_mass + std::max(all - exact_mass, 0.0) / (1 + off);  // exp(-band) >= 1 / (1 + off)
        if (found > exact) {
            const double doubtful = (std::max(all - exact_mass, 0.0) + all * 1e-6) * off;
            row.doubtful += doubtful;
            row.spread2 += doubtful * doubtful / double(found - exact);
        }
        row.kept += int64_t(found);
        row.sketched += int64_t(found - exact);
        *space.count = found;
    }

    int64_t select_by_threshold(Workspace& space, size_t i, int head, size_t first, size_t count, const float* logits,
                                double wide) {
        Row& row = space.rows[i];
        const double from = row.threshold - (wide + row.float_slack) * (1 + 1e-6);
        const float threshold = std::nextafter(float(from), -kInf);
        if (!relu()) {  // what is omitted lies below the threshold: its mass must not overflow
            const float top = std::min(kernels().largest_of(logits, count), threshold);
            if (double(top) > row.reference + 24.0) raise_reference(space, i, top);
        }
        float omitted;
        uint32_t skipped;
        const size_t found =
            kernels().select_row(logits, count, threshold, relu() ? kInf : float(row.reference), uint32_t(first),
                                 space.positions, space.kept.data(), &omitted, &skipped);
        if (!relu()) row.omitted += double(omitted) * (1 + expm1_above(wide / kLog2e)) * kSumExcess;
        if (found) add_exact(space, i, head, found);
        return int64_t(skipped);
    }

    // ---- the answer of each query

    void finish_row(Workspace& space, size_t i, int head) {
        Row& row = space.rows[i];
        float* out = result_.out + row.place * size_t(value_dim_);
        const float* sum = accumulator(space, i);
        const double mass = row.mass;
        full_ += row.exact;
        sketched_ += row.sketched;
        result_.density[row.place] = row.seen ? float(double(row.kept) / double(row.seen)) : 0.0f;
        if (!(mass > 0)) {
            std::fill_n(out, value_dim_, 0.0f);
            result_.lse[row.place] = -kInf;
            // Nothing seen, or an empty ReLU row: zero by definition. A softmax row that kept nothing of what it
            // saw is as wrong as any answer can be.
            const bool defined = relu() || row.seen == 0;
            result_.error_bound[row.place] = result_.estimated_error[row.place] =
                defined ? 0.0f : range_distance(cache_.value_sketch(head), out);
            result_.omitted_mass[row.place] = defined ? 0.0f : 1.0f;
            return;
        }
        const double over = 1.0 / (mass + row.stand_in);
        const float* stands = stand_in(space, i);
        for (int j = 0; j < value_dim_; ++j) out[j] = float((double(sum[j]) + stands[j]) * over);
        result_.lse[row.place] = float(relu() ? std::log(mass) + settings_.power * std::log(row.top)
                                              : std::log(mass) + row.reference / kLog2e);
        if (!settings_.certify) {
            result_.error_bound[row.place] = result_.estimated_error[row.place] = result_.omitted_mass[row.place] =
                std::nanf("");
            return;
        }
        certify(row, head, mass, stands, out);
    }

    // DESIGN.md, "Prompts": with stand-ins c of mass C, Z' = mass + C,
    //   Z' (out - exact) = sum of (estimated - true weight) (v - exact) - sum over omitted of w (v - exact) + c - C
    //   exact + sum of weight (coded - true v),
    // and |v - exact| <= reach + |out - exact| in each coordinate.
    void certify(const Row& row, int head, double mass, const float* stands, const float* out) {
        // Keys whose weight underflowed (below 2^-126 of the reference) count that much each.
        const double omitted = relu() ? 0.0 : row.omitted * kSumExcess + double(row.seen) * 1.7e-38;
        // Of a weight taken from a full-precision logit: its float32 rounding. ReLU: of a float64 excess, and weights
        // themselves are rounded to float32.
        const double exact_error =
            relu() ? double(row.candidates) * relu_weight_error(row.length, cache_.largest_key_norm(head), dim_,
                                                                settings_.power, row.top) +
                         mass * 2 * kUnit
                   : mass * std::expm1(2 * row.float_slack / kLog2e + 2e-6);
        const double all = mass + row.stand_in;
        const AnswerBound found = bound_answer(
            cache_.value_sketch(head), out, {all, omitted + row.doubtful + exact_error, row.stand_in},
            [&](size_t) { return row.blurred; },
            [&](size_t j) { return std::fabs(stands[j] - row.stand_in * out[j]); });
        // Float32 sums, panel by panel: chains of at most a panel's keys and one term a panel.
        const double chain =
            double(std::min<int64_t>(row.kept, int64_t(kPanelKeys))) + 2 * double(row.blocks / kPanelBlocks) + 64.0;
        result_.error_bound[row.place] = rounded_up(found.bound + kUnit * chain * found.largest);
        result_.omitted_mass[row.place] =
            omitted > 0 ? std::min(1.0f, rounded_up(omitted / (row.surely() + omitted))) : 0.0f;
        result_.estimated_error[row.place] =
            float(std::sqrt(row.spread2 / dim_ * 2.0 * std::log(2.0 * value_dim_)) * found.spread / all +
                  omitted / all * found.spread + kUnit * 16 * found.largest);
    }

    const LayerCache& cache_;
    const AttendSettings& settings_;
    const AttendQueries& queries_;
    const AttendResult& result_;
    const int64_t m_;
    const int heads_, group_, dim_, value_dim_;
    const double units_;   // logits are natural for ReLU, in units of log 2 for softmax
    const double budget_;  // omitted mass allowed for each unit of kept mass
    size_t tile_rows_ = kTileRows;
    size_t ranges_ = 0;  // of coded values, for each key head
    std::unique_ptr<uint8_t[]> value_codes_;
    std::unique_ptr<float[]> value_ranges_;
    std::atomic<int64_t> scored_{0}, full_{0}, sketched_{0}, skipped_{0}, panels_{0}, again_{0};
};

}  // namespace

bool prefill_serves(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries) {
    if (settings.rule == Rule::top_r) return false;
    if (!(settings.scale > 1e-6 && settings.scale < 1e6)) return false;
    const TokenArray& q = queries.queries;
    if (size_t(q.tokens) * size_t(q.heads / cache.kv_heads()) < kFewestRows) return false;
    // The longest query of each key head against the widest codes of its keys.
    std::atomic<bool> safe{true};
    parallel_for(size_t(q.batch * q.heads), [&](size_t at) {
        const int64_t b = int64_t(at) / q.heads, h = int64_t(at) % q.heads;
        const int head = int(b) * cache.kv_heads() + int(h) / int(q.heads / cache.kv_heads());
        const KeySketch& sketch = cache.key_sketch(head);
        std::vector<float> row(static_cast<size_t>(q.dim));
        double longest = 0;
        for (int64_t t = 0; t < q.tokens; ++t) {
            q.read(b, h, t, row.data());
            longest = std::max(longest, kernels().dot64(Dtype::float32, row.data(), row.data(), int(q.dim)));
        }
        // 0.01: more than the rounding of a unit query to 8 bits, up to 512 coordinates
        const double band =
            settings.scale * std::sqrt(longest) * (sketch.extent().residual8 * 1.02 + 0.02 * sketch.largest_norm());
        const double logit =
            settings.scale * std::sqrt(longest) * (cache.largest_key_norm(head) + sketch.centre_norm());
        if (!(band < kSafeBand) || !(logit < 1e5)) safe = false;
    });
    return safe;
}

AttendWork prefill(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
                   const AttendResult& result) {
    return Prefill(cache, settings, queries, result).run();
}

}  // namespace hsr

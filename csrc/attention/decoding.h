// One call of `attend`, and what its stages share. Private to attention/: each stage is a file that defines some of
// the members declared here. DESIGN.md ("Decoding") says how they follow one another.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "attention/call.h"

namespace hsr::decoding {

constexpr size_t kChunkBlocks = 128;  // 2,048 keys: their estimates fit the first cache
constexpr size_t kChunkKeys = kChunkBlocks * kBlock;
constexpr size_t kFewChunks = 32;              // with fewer chunks than this, threads are kept busier by half chunks
constexpr size_t kWorkspaceFloats = 4u << 20;  // estimates alive at once: 16 MiB
// Of the blocks, every kSampleStep-th is read to guess where epsilon of the mass is reached; within these numbers.
constexpr size_t kSampleStep = 32, kFewestSampled = 64, kMostSampled = 128;

// A band of 4-bit estimates above this many nats decides little: scan both planes at once.
constexpr double kWideBand = 6.0;
// The same where the masses of blocks decide what is refined: of heads with d = 128 and bands of 6 to 9 nats such a
// scan takes 0.6 times as long.
constexpr double kWideBandOfBlocks = 12.0;
// A block is refined when its 16 keys together may weigh as much as this many keys at the threshold.
constexpr float kBlockWeight = 8.0f;
// A block that may hold the share 1 / kMostHeavy of all upper masses is refined before the thresholds are chosen.
constexpr size_t kMostHeavy = 128;
// Of a float32 weight exp(x), relative: 2e-7 (1 + |x|), and x lies between -87, below which it is 0, and the band.
constexpr double kFloatWeight = 2e-5;
// Weights are taken relative to the largest estimate; a true logit may exceed it by the band, and
// exp(band) times n must stay inside float32. Beyond, the next finer scan is used.
constexpr double kSafeBand = 30.0;

enum class Scan { four, eight, full };

// Sums of one (tile, chunk); all masses are relative to exp(reference).
struct Partial {
    double exact_mass[kTile], sketched[kTile], weight_band[kTile], weight_var[kTile];
    double omitted[kTile], left[kTile];
    double relu_top[kTile];  // ReLU: largest logit - threshold; weights are relative to its power
    int64_t kept[kTile], exact[kTile], refined;
    bool nothing;  // all of these are 0, and what belongs to them elsewhere is not written
};

struct Candidate {
    uint32_t key;
    double logit;
};

// Up to four queries of one batch row that share a key head, on their way through the stages.
struct Tile {
    int row, kv_head, count;
    int64_t query[kTile];  // position i in [0, m)
    int head[kTile];       // query head
    size_t place[kTile];   // index into the results
    int64_t visible[kTile], seen[kTile];
    double norm[kTile], float_slack[kTile], reference[kTile], mass[kTile];
    double likely[kTile];     // of an omitted key: likely weight / upper bound of its weight
    double lowering[kTile];   // by how much the threshold is lowered when too much was omitted
    double threshold[kTile];  // of the rule, in logits
    PreparedQuery prepared[kTile];
    CodedQuery coded[kTile];
    float vector[kTile][kMaxHeadDim];
    Scan scan;
    size_t blocks, chunks;  // coded blocks any of the queries may see
    // Upper bounds of the logits of coded keys, [count] rows of `stride`; with `by_block` only the estimates of every
    // `sample_step`-th block, side by side.
    float* uppers;
    size_t stride;
    float* block_masses;  // rule epsilon, four bits: upper masses of coded blocks, [count] rows of `mass_stride`
    size_t mass_stride;
    float* sampled_masses;  // of the estimates of every kMassBlocks-th block, [count of them][kTile]
    bool fused;             // the thresholds are known beforehand (ReLU): a chunk is scanned and selected at once
    bool by_block;          // block_masses are complete and decide which blocks are refined
    size_t sample_step;
    // The sample is every sample_step-th block; not from the first on, since texts like to begin at round numbers.
    size_t sampled_block(size_t i) const { return i * sample_step + sample_step / 2; }
    size_t sampled_below(size_t block) const { return (block + sample_step - 1 - sample_step / 2) / sample_step; }
    Selection selection[kTile];
    double tail_logit[kTile][kBlock];  // keys behind the coded blocks; -inf: not seen
    size_t partial_at;
    bool again;  // too much was omitted: select once more
};

struct KeptLists {
    static constexpr size_t capacity = kSelectBlocks * kBlock + 16;
    static constexpr size_t exact_capacity = kChunkKeys + 16;  // of a whole chunk
    KeptKeys kept{};
    std::vector<uint32_t> positions = std::vector<uint32_t>(capacity + kTile * exact_capacity);
    std::vector<float> scaled;
    size_t exact_count[kTile];

    void reserve(int groups) {
        if (scaled.size() < size_t(groups) * kTile * capacity) scaled.resize(size_t(groups) * kTile * capacity);
        kept.capacity = capacity;
        kept.keys = positions.data();
        kept.scaled = scaled.data();
        for (int q = 0; q < kTile; ++q) exact_count[q] = 0;
    }
    uint32_t* exact(int q) { return positions.data() + capacity + size_t(q) * exact_capacity; }
};

struct Workspace {
    std::vector<float> uppers, block_masses, sampled_masses, exact_sums, coded_sums, offsets, steps, squares;
    std::vector<Partial> partials;
    std::vector<double> chunk_mass, chunk_top;
    std::vector<std::vector<Candidate>> candidates;
};

// What `certificate` needs of an answer besides the sums of its chunks.
struct Answer {
    double mass, exact_mass, omitted, stood_in, relu_top;
    int64_t kept;
    double steps[kMaxHeadDim / kValueGroup], squares[kMaxHeadDim / kValueGroup];
    double stand_in[kMaxHeadDim];  // what stood in, times its mass
};

class Attend : Call {
public:
    Attend(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
           const AttendResult& result)
        : Call(cache, settings, queries, result), groups_(value_groups(cache.value_dim())) {}

    AttendWork run();

private:
    // Selection by full-precision logits: the result is exactly the paper's.
    bool exact_rule() const { return relu() || (!settings_.sketch_tail && settings_.rule != Rule::epsilon); }
    // Candidates of all chunks are needed before the r largest are known.
    bool collects() const { return settings_.rule == Rule::top_r && !settings_.sketch_tail; }
    bool reads_value_codes() const { return !relu() && settings_.sketch_tail; }
    // The omitted share has a bound to keep.
    bool bounds_mass() const { return settings_.rule == Rule::epsilon || reads_value_codes(); }
    // Something stands in for omitted keys (stand_in.h), except where the paper's algorithm is asked for.
    bool stands_in() const { return reads_value_codes(); }
    bool certify() const { return !relu() && (settings_.certify || bounds_mass()); }
    int store_head(const Tile& tile) const { return tile.row * cache_.kv_heads() + tile.kv_head; }
    // Far from scale 1, products of float32 could leave its range before the scale brings them back.
    bool in_float64() const { return exact_rule() || !(settings_.scale > 1e-6 && settings_.scale < 1e6); }
    static float below(double x) { return std::nextafter(float(x), -kInf); }
    const uint8_t* mask_row(const Tile& tile, int q) const {
        if (!queries_.mask) return nullptr;
        return queries_.mask + tile.row * queries_.mask_batch_stride + tile.query[q] * queries_.mask_query_stride;
    }
    // Rounding of a logit computed at full precision and held in float32.
    static float full_band(const Tile& tile, int q, float logit) {
        return logit == -kInf ? 0.0f : float(tile.float_slack[q] + std::fabs(double(logit)) * 1e-6);
    }

    // ---- preparation, and the stages on threads (attend.cpp)
    void place_wave(size_t first, size_t count, size_t tiles_per_head, size_t stride);
    void place_tile(Tile& tile, size_t index, size_t tiles_per_head) const;
    void prepare(Tile& tile) const;
    void prepare(Tile& tile, int q) const;
    Scan kind_of_scan(Tile& tile, bool by_block) const;
    void run_wave();

    // ---- scan: bounds of the logits of all keys (scan_stage.cpp)
    void scan_chunk(Tile& tile, size_t chunk);
    void score_sample(const Tile& tile, size_t first, size_t count) const;
    void scan_full(const Tile& tile, size_t first, size_t count, double* tops, double* masses) const;
    bool hides(const Tile& tile, size_t first, size_t count) const;
    void hide(const Tile& tile, int q, size_t first, size_t count, float* estimates) const;

    // ---- choose: thresholds of each query (choose_stage.cpp)
    struct Sample {  // some blocks of keys; uppers and their weights, or the upper masses of the blocks
        size_t blocks;
        float *estimates, *weights, *uppers, *upper_weights, *masses;
    };
    void choose(Tile& tile);
    void choose(Tile& tile, int q);
    Sample take_sample(const Tile& tile, int q) const;
    double likely_mass(const Tile& tile, int q) const;
    static float mass_from(const Tile& tile, int q, float threshold);
    float tail_threshold(const Tile& tile, int q) const;
    void away_from_upper(const Tile& tile, int q, size_t block, size_t count, float sign, const float* uppers,
                         float* out) const;
    float top_r_threshold(Tile& tile, int q);

    // ---- select: refine what may be kept, and its value codes (select_stage.cpp)
    void select_chunk(Tile& tile, size_t chunk);
    void fetch_rows(const Tile& tile, size_t key) const;
    void select_coded(const Tile& tile, size_t first, size_t count, const uint16_t* reaching, KeptKeys& kept,
                      SelectionSums& sums) const;
    void select_full(const Tile& tile, size_t first, size_t count, KeptKeys& kept, SelectionSums& sums) const;

    // ---- rows read at full precision (exact_rows.cpp)
    double logit(const Tile& tile, int q, size_t key) const;
    void read_logits(const Tile& tile, int q, const uint32_t* keys, size_t count, double* logits) const;
    bool weighs_in_float32(const Tile& tile) const;
    void rescale(Partial& part, int q, double factor, float* accumulator) const;
    void add_exact(const Tile& tile, int q, uint32_t* keys, size_t count, Partial& part, float* accumulator) const;
    void add_exact(const Tile& tile, int q, size_t key, double logit, Partial& part, float* accumulator) const;
    void raise_top(Partial& part, int q, double excess, float* accumulator) const;
    double weight_of(const Tile& tile, int q, double logit, Partial& part) const;
    void add_top_r(Tile& tile, int q, Partial& part, float* sum);

    // ---- finish: the answer and its certificate; false asks for another selection (finish_stage.cpp)
    bool finish(Tile& tile);
    bool finish(Tile& tile, int q);
    void certificate(const Tile& tile, int q, const Partial& total, const Answer& answer);

    const int groups_;
    size_t chunk_blocks_ = kChunkBlocks;
    Workspace* space_ = nullptr;
    std::vector<Tile> tiles_;
    std::vector<std::pair<size_t, size_t>> chunks_of_wave_;  // (tile, chunk)
    AttendWork work_;
};

}  // namespace hsr::decoding

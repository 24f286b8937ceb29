#include "attention/attend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "threads.h"

namespace hsr {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kUnit = 5.9604644775390625e-8;  // 2^-24, the rounding unit of float32
constexpr size_t kChunkBlocks = 128;             // 2,048 keys: their estimates fit the first cache
constexpr size_t kChunkKeys = kChunkBlocks * kBlock;
constexpr size_t kFewChunks = 32;              // with fewer chunks than this, threads are kept busier by half chunks
constexpr size_t kWorkspaceFloats = 4u << 20;  // estimates alive at once: 16 MiB
constexpr size_t kSampleBlocks = 64;           // read to guess where epsilon of the mass is reached

// A band of 4-bit estimates above this many nats decides little: scan both planes at once.
constexpr double kWideBand = 6.0;
// A block is refined when its 16 keys together may weigh as much as this many keys at the threshold.
constexpr float kBlockWeight = 8.0f;
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
    bool by_block;  // block_masses are complete and decide which blocks are refined
    size_t sample_step;
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
    std::vector<float> uppers, block_masses, accumulators, offsets, steps, squares;
    std::vector<Partial> partials;
    std::vector<double> chunk_mass, chunk_top;
    std::vector<std::vector<Candidate>> candidates;
};

class Attend {
public:
    Attend(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
           const AttendResult& result)
        : cache_(cache),
          settings_(settings),
          queries_(queries),
          result_(result),
          m_(queries.queries.tokens),
          heads_(int(queries.queries.heads)),
          group_(heads_ / cache.kv_heads()),
          groups_(value_groups(cache.value_dim())) {}

    AttendWork run() {
        const size_t per_head = size_t(m_) * size_t(group_);
        const size_t tiles_per_head = (per_head + kTile - 1) / kTile;
        const size_t all = size_t(cache_.batch() * cache_.kv_heads()) * tiles_per_head;
        const size_t stride = cache_.coded() + 64;
        chunk_blocks_ = all * cache_.coded() < kFewChunks * kChunkKeys ? kChunkBlocks / 2 : kChunkBlocks;
        const size_t wave = std::max<size_t>(size_t(num_threads()), kWorkspaceFloats / (kTile * stride));
        for (size_t first = 0; first < all; first += wave) {
            const size_t count = std::min(wave, all - first);
            prepare_wave(first, count, tiles_per_head, stride);
            run_wave();
        }
        return work_;
    }

private:
    bool relu() const { return settings_.rule == Rule::relu; }
    // Selection by full-precision logits: the result is exactly the paper's.
    bool exact_rule() const { return relu() || (!settings_.sketch_tail && settings_.rule != Rule::epsilon); }
    // Candidates of all chunks are needed before the r largest are known.
    bool collects() const { return settings_.rule == Rule::top_r && !settings_.sketch_tail; }
    bool reads_value_codes() const { return !relu() && settings_.sketch_tail; }
    // The omitted share has a bound to keep.
    bool bounds_mass() const { return settings_.rule == Rule::epsilon || reads_value_codes(); }
    // Omitted keys are stood in for by the mean value, except where the paper's algorithm is asked for.
    bool stands_in() const { return reads_value_codes(); }
    bool certify() const { return !relu() && (settings_.certify || bounds_mass()); }

    const uint8_t* mask_row(const Tile& tile, int q) const {
        if (!queries_.mask) return nullptr;
        return queries_.mask + tile.row * queries_.mask_batch_stride + tile.query[q] * queries_.mask_query_stride;
    }
    int store_head(const Tile& tile) const { return tile.row * cache_.kv_heads() + tile.kv_head; }
    // Far from scale 1, products of float32 could leave its range before the scale brings them back.
    bool in_float64() const { return exact_rule() || !(settings_.scale > 1e-6 && settings_.scale < 1e6); }
    double logit(const Tile& tile, int q, size_t key) const {
        const void* row = cache_.keys().row(key, store_head(tile));
        if (in_float64())
            return settings_.scale * kernels().dot64(cache_.dtype(), row, tile.vector[q], cache_.key_dim());
        return settings_.scale * double(kernels().dot(cache_.dtype(), row, tile.vector[q], cache_.key_dim()));
    }

    void read_logits(const Tile& tile, int q, const uint32_t* keys, size_t count, double* logits) const {
        if (!in_float64()) {
            for (size_t i = 0; i < count; ++i) logits[i] = logit(tile, q, keys[i]);
            return;
        }
        const RowStore& rows = cache_.keys();
        kernels().dot_rows64(rows.dtype(), rows.row(0, store_head(tile)), rows.token_bytes(), keys, count,
                             tile.vector[q], cache_.key_dim(), logits);
        for (size_t i = 0; i < count; ++i) logits[i] *= settings_.scale;
    }
    // Beside a sketched tail, float32 weights are precise enough (kFloatWeight pays for them in the certificate); not
    // for a full scan, whose logits may be so large that rounding them moves weights by many nats.
    bool weighs_in_float32(const Tile& tile) const {
        return reads_value_codes() && !in_float64() && tile.scan != Scan::full;
    }

    void prepare_wave(size_t first, size_t count, size_t tiles_per_head, size_t stride) {
        static thread_local Workspace workspace;
        space_ = &workspace;
        tiles_.resize(count);
        if (space_->uppers.size() < count * kTile * stride) space_->uppers.resize(count * kTile * stride);
        Workspace& space = *space_;
        const size_t mass_stride = (stride / kBlock + kChunkBlocks) / kChunkBlocks * kChunkBlocks;
        if (space.block_masses.size() < count * kTile * mass_stride)
            space.block_masses.resize(count * kTile * mass_stride);
        queries_of_wave_.clear();
        for (size_t t = 0; t < count; ++t) {
            place_tile(tiles_[t], first + t, tiles_per_head);
            tiles_[t].uppers = space.uppers.data() + t * kTile * stride;
            tiles_[t].stride = stride;
            tiles_[t].block_masses = space.block_masses.data() + t * kTile * mass_stride;
            tiles_[t].mass_stride = mass_stride;
            for (int q = 0; q < tiles_[t].count; ++q) queries_of_wave_.push_back({t, q});
        }
        // A dozen queries are prepared before a second thread would be awake.
        parallel_for(queries_of_wave_.size(), queries_of_wave_.size() < 16 ? 1 : num_threads(),
                     [&](size_t i) { prepare(tiles_[queries_of_wave_[i].first], queries_of_wave_[i].second); });
        for (Tile& tile : tiles_) {
            tile.scan = kind_of_scan(tile, cache_.key_sketch(store_head(tile)));
            tile.by_block =
                settings_.rule == Rule::epsilon && tile.scan == Scan::four && !hides(tile, 0, tile.blocks * kBlock);
            // With block masses only the keys left out after refinement are guessed from the sample.
            tile.sample_step = std::max<size_t>(1, tile.blocks / (tile.by_block ? kSampleBlocks : 4 * kSampleBlocks));
        }
        chunks_of_wave_.clear();
        for (size_t t = 0; t < count; ++t) {
            tiles_[t].partial_at = chunks_of_wave_.size();
            for (size_t c = 0; c < tiles_[t].chunks; ++c) chunks_of_wave_.push_back({t, c});
        }
        const size_t pieces = chunks_of_wave_.size();
        space.partials.resize(pieces);
        space.chunk_mass.resize(pieces * kTile);
        space.chunk_top.resize(pieces * kTile);
        space.accumulators.resize(pieces * kTile * size_t(groups_) * kValueGroup);
        for (auto* sums : {&space.offsets, &space.steps, &space.squares})
            sums->resize(pieces * kTile * size_t(groups_));
    }

    void place_tile(Tile& tile, size_t index, size_t tiles_per_head) const {
        const size_t head = index / tiles_per_head, from = index % tiles_per_head * kTile;
        tile.row = int(head) / cache_.kv_heads();
        tile.kv_head = int(head) % cache_.kv_heads();
        tile.count = int(std::min<size_t>(kTile, size_t(m_) * size_t(group_) - from));
        int64_t farthest = 0;
        for (int q = 0; q < tile.count; ++q) {
            tile.query[q] = int64_t((from + size_t(q)) / size_t(group_));
            tile.head[q] = tile.kv_head * group_ + int((from + size_t(q)) % size_t(group_));
            tile.place[q] =
                (size_t(tile.row) * size_t(heads_) + size_t(tile.head[q])) * size_t(m_) + size_t(tile.query[q]);
            tile.visible[q] = std::clamp<int64_t>(queries_.visible[tile.query[q]], 0, int64_t(cache_.size()));
            farthest = std::max(farthest, tile.visible[q]);
        }
        tile.blocks = std::min(cache_.key_sketch(store_head(tile)).blocks(), (size_t(farthest) + kBlock - 1) / kBlock);
        tile.chunks = (tile.blocks + chunk_blocks_ - 1) / chunk_blocks_;
    }

    void prepare(Tile& tile, int q) const {
        const KeySketch& sketch = cache_.key_sketch(store_head(tile));
        const double longest = cache_.largest_key_norm(store_head(tile));
        const uint8_t* mask = mask_row(tile, q);
        tile.seen[q] = tile.visible[q];
        if (mask) tile.seen[q] = tile.visible[q] - std::count(mask, mask + tile.visible[q], uint8_t(0));
        queries_.queries.read(tile.row, tile.head[q], tile.query[q], tile.vector[q]);
        tile.norm[q] = norm_of(tile.vector[q], cache_.key_dim());
        const double top_logit =
            settings_.scale * tile.norm[q] * (longest + sketch.largest_norm() + sketch.centre_norm());
        if (!(top_logit < 1e30))
            throw std::invalid_argument("scale * |q| * |k| must be below 1e30, got " + std::to_string(top_logit));
        tile.prepared[q].prepare(sketch, tile.vector[q], tile.norm[q], settings_.scale, true);
        tile.coded[q] = tile.prepared[q].coded;
        // A float32 logit: dim / 32 + 8 roundings along its chain, of terms no larger than |q| |k|.
        tile.float_slack[q] = settings_.scale * tile.norm[q] * longest * kUnit * (cache_.key_dim() / 32.0 + 8.0);
        tile.threshold[q] = queries_.thresholds ? queries_.thresholds[tile.place[q]] : 0.0;
        for (size_t i = 0; i < kBlock; ++i) {
            const size_t key = sketch.coded() + i;
            const bool seen = key < size_t(tile.visible[q]) && (!mask || mask[key]);
            tile.tail_logit[q][i] = seen ? logit(tile, q, key) : -double(kInf);
        }
    }

    Scan kind_of_scan(Tile& tile, const KeySketch& sketch) const {
        std::fill(tile.likely, tile.likely + kTile, 1.0);
        if (!tile.blocks) return Scan::four;
        const auto& extent = sketch.extent();
        Scan kind = Scan::four;
        for (int q = 0; q < tile.count; ++q) {
            const CodedQuery& c = tile.coded[q];
            const double worst4 = c.slope4 * extent.residual4 + c.slope4_step * extent.step + c.slack;
            const double worst8 = c.slope8 * extent.residual8 + c.slope8_step * extent.step + c.slack;
            const double mean4 = c.slope4 * extent.residual4_sum / double(sketch.coded());
            if (!(worst8 < kSafeBand)) {
                std::fill(tile.likely, tile.likely + kTile, 1.0);
                return Scan::full;
            }
            tile.likely[q] = std::exp(-mean4);
            if (!(worst4 < kSafeBand) || mean4 > kWideBand) kind = Scan::eight;
        }
        if (kind == Scan::eight)
            for (int q = 0; q < tile.count; ++q) {
                const CodedQuery& c = tile.coded[q];
                tile.likely[q] = std::exp(-double(c.slope8 * extent.residual8 + c.slope8_step * extent.step + c.slack));
            }
        return kind;
    }

    // Whoever ends the last chunk of a tile goes on with what needs all of them.
    void run_wave() {
        std::vector<std::atomic<size_t>> open(tiles_.size());
        const auto last_of = [&](size_t t) { return open[t].fetch_sub(1, std::memory_order_acq_rel) == 1; };
        const auto reopen = [&] {
            for (size_t t = 0; t < tiles_.size(); ++t) open[t] = tiles_[t].chunks;
        };
        reopen();
        parallel_for(chunks_of_wave_.size(), [&](size_t i) {
            const auto [t, c] = chunks_of_wave_[i];
            scan_chunk(tiles_[t], c);
            if (last_of(t)) choose(tiles_[t]);
        });
        for (Tile& tile : tiles_)
            if (tile.chunks == 0) choose(tile);
        space_->candidates.resize(collects() ? chunks_of_wave_.size() * kTile : 0);
        std::vector<char> pending(tiles_.size(), 1);
        while (std::count(pending.begin(), pending.end(), 1)) {
            reopen();
            parallel_for(chunks_of_wave_.size(), [&](size_t i) {
                const auto [t, c] = chunks_of_wave_[i];
                if (!pending[t]) return;
                select_chunk(tiles_[t], c);
                if (last_of(t)) tiles_[t].again = !finish(tiles_[t]);
            });
            for (size_t t = 0; t < tiles_.size(); ++t) {
                if (pending[t] && tiles_[t].chunks == 0) tiles_[t].again = !finish(tiles_[t]);
                pending[t] = tiles_[t].again;
                work_.selected_again += tiles_[t].again;
            }
        }
        for (const Tile& tile : tiles_) {
            const int64_t scored = int64_t(tile.blocks * kBlock) * tile.count;
            (tile.scan == Scan::full ? work_.full_scored : work_.sketch_scored) += scored;
            if (tile.scan == Scan::eight) work_.refined += scored;
            ++(tile.scan == Scan::four    ? work_.scanned_four
               : tile.scan == Scan::eight ? work_.scanned_eight
                                          : work_.scanned_full);
            for (size_t c = 0; c < tile.chunks; ++c) {
                const Partial& part = space_->partials[tile.partial_at + c];
                if (tile.scan == Scan::four) work_.refined += part.refined * kBlock * tile.count;
                for (int q = 0; q < tile.count; ++q) {
                    work_.full_scored += part.exact[q];
                    work_.sketched += part.kept[q] - part.exact[q];
                }
            }
        }
    }

    // ---- stage 1: estimates of all keys, their largest, the sum of their exponentials

    void scan_chunk(Tile& tile, size_t chunk) {
        const KeySketch& sketch = cache_.key_sketch(store_head(tile));
        const size_t first = chunk * chunk_blocks_, count = std::min(chunk_blocks_, tile.blocks - first);
        float* estimates = tile.uppers + first * kBlock;  // upper bounds at the end of this function
        double* tops = space_->chunk_top.data() + (tile.partial_at + chunk) * kTile;
        double* masses = space_->chunk_mass.data() + (tile.partial_at + chunk) * kTile;
        float maxima[kTile] = {-kInf, -kInf, -kInf, -kInf};
        if (tile.scan == Scan::full) {
            scan_full(tile, first * kBlock, count * kBlock, tops, masses);
            return;
        }
        if (tile.scan == Scan::four && !hides(tile, first * kBlock, count * kBlock)) {
            kernels().scan_mass(sketch.high(first), cache_.key_dim(), count, tile.coded, tile.count,
                                tile.by_block ? nullptr : estimates, tile.stride, maxima, masses,
                                tile.block_masses + first, tile.mass_stride);
            std::copy(maxima, maxima + tile.count, tops);
            if (tile.by_block) score_sample(tile, first, count);
            return;
        }
        // Maxima of these would count hidden keys: they are taken again below.
        if (tile.scan == Scan::eight)
            kernels().refine(sketch.high(first), sketch.low(first), cache_.key_dim(), count, tile.coded, tile.count,
                             estimates, tile.stride, maxima);
        else
            kernels().scan(sketch.high(first), cache_.key_dim(), count, tile.coded, tile.count, estimates, tile.stride,
                           maxima);
        for (int q = 0; q < tile.count; ++q) {
            float* own = estimates + size_t(q) * tile.stride;
            hide(tile, q, first * kBlock, count * kBlock, own);
            tops[q] = *std::max_element(own, own + count * kBlock);
            masses[q] = tops[q] == -double(kInf) ? 0.0 : kernels().sum_exp(own, count * kBlock, float(tops[q]));
            kernels().bounds(sketch.high(first), sketch.low(first), cache_.key_dim(), count, &tile.coded[q],
                             tile.scan == Scan::eight, own, 1.0f, own);
        }
    }

    void score_sample(const Tile& tile, size_t first, size_t count) const {
        const KeySketch& sketch = cache_.key_sketch(store_head(tile));
        float unused[kTile] = {};
        for (size_t i = (first + tile.sample_step - 1) / tile.sample_step; i * tile.sample_step < first + count; ++i)
            kernels().scan(sketch.high(i * tile.sample_step), cache_.key_dim(), 1, tile.coded, tile.count,
                           tile.uppers + i * kBlock, tile.stride, unused);
    }

    // Every logit at full precision; tops are the very numbers that `logit` gives again later.
    void scan_full(const Tile& tile, size_t first, size_t count, double* tops, double* masses) const {
        std::vector<double> logits(count);
        for (int q = 0; q < tile.count; ++q) {
            float* own = tile.uppers + size_t(q) * tile.stride + first;
            std::fill(own, own + count, 0.0f);
            hide(tile, q, first, count, own);
            tops[q] = -double(kInf);
            masses[q] = 0;
            for (size_t i = 0; i < count; ++i) {
                logits[i] = own[i] < 0 ? -double(kInf) : logit(tile, q, first + i);
                tops[q] = std::max(tops[q], logits[i]);
            }
            for (size_t i = 0; i < count; ++i) {
                own[i] = float(logits[i]) + full_band(tile, q, float(logits[i]));
                if (logits[i] > -double(kInf)) masses[q] += std::exp(logits[i] - tops[q]);
            }
        }
    }

    bool hides(const Tile& tile, size_t first, size_t count) const {
        for (int q = 0; q < tile.count; ++q) {
            if (size_t(tile.visible[q]) < first + count) return true;
            const uint8_t* mask = mask_row(tile, q);
            if (mask && std::memchr(mask + first, 0, count)) return true;
        }
        return false;
    }

    // Estimates of keys that query q may not see become -inf.
    void hide(const Tile& tile, int q, size_t first, size_t count, float* estimates) const {
        const size_t visible = size_t(tile.visible[q]);
        for (size_t i = visible > first ? visible - first : 0; i < count; ++i) estimates[i] = -kInf;
        if (const uint8_t* mask = mask_row(tile, q))
            for (size_t i = 0; i < count && first + i < visible; ++i)
                if (!mask[first + i]) estimates[i] = -kInf;
    }

    // ---- stage 2: thresholds of each query

    void choose(Tile& tile) {
        for (int q = 0; q < tile.count; ++q) choose(tile, q);
    }

    void choose(Tile& tile, int q) {
        double top = -double(kInf);
        for (size_t c = 0; c < tile.chunks; ++c)
            top = std::max(top, space_->chunk_top[(tile.partial_at + c) * kTile + size_t(q)]);
        for (double s : tile.tail_logit[q]) top = std::max(top, s);
        if (top == -double(kInf)) top = 0;
        double mass = 0;
        for (size_t c = 0; c < tile.chunks; ++c) {
            const size_t place = (tile.partial_at + c) * kTile + size_t(q);
            if (space_->chunk_mass[place] > 0)
                mass += space_->chunk_mass[place] * std::exp(space_->chunk_top[place] - top);
        }
        for (double s : tile.tail_logit[q]) mass += std::exp(s - top);
        // Kernels subtract the reference from float estimates, so it is a float there. A full scan keeps it exact:
        // its logits may be so large that rounding them moves weights by many nats.
        tile.reference[q] = tile.scan == Scan::full || tile.chunks == 0 ? top : double(float(top));
        tile.lowering[q] = std::max(1.0, std::fabs(top) * 1e-5);
        tile.mass[q] = mass;
        if (tile.by_block)
            for (size_t c = 0; c < tile.chunks; ++c) {
                const double chunk_top = space_->chunk_top[(tile.partial_at + c) * kTile + size_t(q)];
                kernels().scale(tile.block_masses + size_t(q) * tile.mass_stride + c * chunk_blocks_, chunk_blocks_,
                                float(std::exp(chunk_top - tile.reference[q])));
            }
        Selection& selection = tile.selection[q];
        selection.reference = float(tile.reference[q]);
        selection.keep_upper = exact_rule();
        const CodedQuery& c = tile.coded[q];
        const auto& extent = cache_.key_sketch(store_head(tile)).extent();
        const double widest = c.slope8 * extent.residual8 + c.slope8_step * extent.step + c.slack;
        selection.growth = widest > 1e-9 && widest < kSafeBand ? float(std::expm1(widest) / widest * (1 + 1e-6)) : 1.0f;
        const double log_mass = std::log(std::max(mass, 1e-300)) + top;
        switch (settings_.rule) {
            case Rule::relu: selection.exact_from = selection.threshold = below(tile.threshold[q]); break;
            case Rule::threshold:
                selection.exact_from = below(tile.threshold[q]);
                selection.threshold = settings_.sketch_tail ? std::min(selection.exact_from, tail_threshold(tile, q))
                                                            : selection.exact_from;
                break;
            case Rule::top_r:
                selection.exact_from = top_r_threshold(tile, q);
                selection.threshold = settings_.sketch_tail ? std::min(selection.exact_from, tail_threshold(tile, q))
                                                            : selection.exact_from;
                break;
            case Rule::epsilon:
                selection.threshold = tail_threshold(tile, q);
                selection.exact_from =
                    settings_.sketch_tail ? float(log_mass + std::log(settings_.exact_share)) : -kInf;
                break;
        }
        selection.mass_from = mass_from(tile, q, selection.threshold);
    }

    // Blocks whose keys together may weigh less than this are left out as a whole.
    static float mass_from(const Tile& tile, int q, float threshold) {
        return kBlockWeight * std::exp(threshold - float(tile.reference[q]));
    }

    static float below(double x) { return std::nextafter(float(x), -kInf); }

    // A threshold that is likely to omit a little less than epsilon of the mass: found by bisection on a
    // sample of the keys. `finish` measures what was omitted and asks again if it was too much.
    float tail_threshold(Tile& tile, int q) {
        if (tile.blocks == 0) return -kInf;
        const size_t step = tile.sample_step, blocks = (tile.blocks + step - 1) / step, count = blocks * kBlock;
        static thread_local std::vector<float> buffer;
        buffer.resize(4 * count + blocks);
        float *estimates = buffer.data(), *uppers = estimates + count, *weights = uppers + count,
              *upper_weights = weights + count, *sampled = upper_weights + count;
        const float reference = float(tile.reference[q]);
        const float* own = tile.uppers + size_t(q) * tile.stride;
        if (tile.by_block) {
            std::copy(own, own + count, estimates);
            for (size_t i = 0; i < blocks; ++i)
                sampled[i] = tile.block_masses[size_t(q) * tile.mass_stride + i * step];
        } else {
            for (size_t i = 0; i < blocks; ++i) {
                const float* from = own + i * step * kBlock;
                std::copy(from, from + kBlock, uppers + i * kBlock);
                away_from_upper(tile, q, i * step, 1, -1.0f, from, estimates + i * kBlock);
            }
            kernels().exp_into(uppers, count, reference, upper_weights);
        }
        kernels().exp_into(estimates, count, reference, weights);
        // 0.7: a margin for the sampling, so that a second selection is rare.
        const double allowed = 0.7 * settings_.epsilon * tile.mass[q] / double(step);
        // A key that alone holds more than epsilon of the mass cannot be left out.
        const auto omits_too_much = [&](float threshold) {
            if (tile.by_block) {
                const float from = mass_from(tile, q, threshold);
                const double light =
                    kernels().sum_below(tile.block_masses + size_t(q) * tile.mass_stride, tile.blocks, from);
                return light / double(step) +
                           kernels().mass_left(estimates, weights, sampled, blocks, from, threshold) >
                       allowed;
            }
            return kernels().mass_below(estimates, uppers, weights, upper_weights, count, threshold) > allowed;
        };
        // Nothing below 80 nats matters; at large logits, where floats stand further apart, go by relative steps.
        const float grain = std::fabs(reference) * 1e-5f;
        const float least = reference - 80.0f - grain;
        float high = reference + float(std::log(settings_.epsilon * std::max(tile.mass[q], 1e-300)));
        high = std::clamp(high, least, reference);
        float low = high - 8.0f - grain;
        while (low > least && omits_too_much(low)) {
            high = low;
            low -= 16.0f + grain;
        }
        if (low <= least) return -kInf;
        for (int i = 0; i < 12 && high - low > 0.02f; ++i) {
            const float middle = 0.5f * (low + high);
            (omits_too_much(middle) ? high : low) = middle;
        }
        return low;
    }

    // out = upper bound + sign * band: sign -1 gives the estimates, -2 the lower bounds.
    void away_from_upper(const Tile& tile, int q, size_t block, size_t count, float sign, const float* uppers,
                         float* out) const {
        if (tile.scan == Scan::full) {
            for (size_t i = 0; i < count * kBlock; ++i) out[i] = uppers[i] + sign * full_band(tile, q, uppers[i]);
            return;
        }
        const KeySketch& sketch = cache_.key_sketch(store_head(tile));
        kernels().bounds(sketch.high(block), sketch.low(block), cache_.key_dim(), count, &tile.coded[q],
                         tile.scan == Scan::eight, uppers, sign, out);
    }
    // Rounding of a logit computed at full precision and held in float32.
    static float full_band(const Tile& tile, int q, float logit) {
        return logit == -kInf ? 0.0f : float(tile.float_slack[q] + std::fabs(double(logit)) * 1e-6);
    }

    // The r-th largest estimate, or for an exact answer the r-th largest lower bound, of the visible keys.
    float top_r_threshold(Tile& tile, int q) {
        const size_t r = size_t(settings_.top_r), n = tile.blocks * kBlock;
        if (r >= size_t(tile.seen[q])) return -kInf;
        // Estimates are one band below the upper bounds, lower bounds two.
        static thread_local std::vector<float> values;
        values.resize(n);
        away_from_upper(tile, q, 0, tile.blocks, exact_rule() ? -2.0f : -1.0f, tile.uppers + size_t(q) * tile.stride,
                        values.data());
        const auto reached = [&](float t) {
            size_t count = n ? kernels().count_from(values.data(), n, t) : 0;
            for (double s : tile.tail_logit[q]) count += s >= t;
            return count;
        };
        // Bisection keeps: at least r values reach `low`.
        float low = float(tile.reference[q]) - 1.0f, high = float(tile.reference[q]) + 1.0f;
        for (float step = 2.0f; reached(low) < r; step *= 2.0f) {
            high = low;
            low -= step;
            if (!(low > -3e38f)) return -kInf;
        }
        for (int i = 0; i < 24 && reached(low) > r; ++i) {
            const float middle = 0.5f * (low + high);
            (reached(middle) >= r ? low : high) = middle;
        }
        return low;
    }

    // ---- stage 3: selection, and the sums over what was selected

    void select_chunk(Tile& tile, size_t chunk) {
        const size_t piece = tile.partial_at + chunk, width = size_t(groups_) * kValueGroup;
        const size_t sums_at = piece * kTile * size_t(groups_);
        Partial& part = space_->partials[piece];
        part = Partial();
        float* accumulators = space_->accumulators.data() + piece * kTile * width;
        SelectionSums sums{};
        sums.offsets = space_->offsets.data() + sums_at;
        sums.steps = space_->steps.data() + sums_at;
        sums.squares = space_->squares.data() + sums_at;
        std::fill(accumulators, accumulators + kTile * width, 0.0f);
        for (float* s : {sums.offsets, sums.steps, sums.squares}) std::fill(s, s + kTile * size_t(groups_), 0.0f);
        if (collects())
            for (int q = 0; q < tile.count; ++q) space_->candidates[piece * kTile + size_t(q)].clear();

        static thread_local KeptLists lists;
        lists.reserve(groups_);
        KeptKeys& kept = lists.kept;
        const size_t last = std::min((chunk + 1) * chunk_blocks_, tile.blocks);
        for (size_t first = chunk * chunk_blocks_; first < last; first += kSelectBlocks) {
            const size_t count = std::min(kSelectBlocks, last - first);
            for (int q = 0; q < tile.count; ++q) kept.exact[q] = lists.exact(q) + lists.exact_count[q];
            if (tile.scan == Scan::full)
                select_full(tile, first * kBlock, count * kBlock, kept, sums);
            else
                select_coded(tile, first, count, kept, sums);
            // Full-precision rows lie far apart: they are on their way while the value codes are read.
            for (int q = 0; q < tile.count; ++q) {
                for (size_t i = 0; i < kept.exact_count[q]; ++i) fetch_rows(tile, kept.exact[q][i]);
                lists.exact_count[q] += kept.exact_count[q];
                part.kept[q] += kept.kept[q];
            }
            if (kept.count)
                kernels().accumulate_codes(cache_.value_sketch(store_head(tile)).rows(), cache_.value_dim(), &kept,
                                           tile.count, accumulators);
        }
        for (int q = 0; q < tile.count; ++q) {
            const size_t count = lists.exact_count[q];
            part.exact[q] = int64_t(count);
            if (collects())
                for (size_t i = 0; i < count; ++i)
                    space_->candidates[piece * kTile + size_t(q)].push_back(
                        {lists.exact(q)[i], logit(tile, q, lists.exact(q)[i])});
            else
                add_exact(tile, q, lists.exact(q), count, part, accumulators + size_t(q) * width);
        }
        for (int q = 0; q < tile.count; ++q) {
            part.omitted[q] += sums.omitted[q];
            part.left[q] += sums.left[q];
            part.sketched[q] = sums.sketched[q];
            part.weight_band[q] = sums.weight_band[q];
            part.weight_var[q] = sums.weight_var[q];
            for (int g = 0; g < groups_; ++g)
                for (int i = 0; i < kValueGroup; ++i)
                    accumulators[size_t(q) * width + size_t(g * kValueGroup + i)] += sums.offsets[q * groups_ + g];
        }
        part.refined = sums.refined;
    }

    void fetch_rows(const Tile& tile, size_t key) const {
        for (const RowStore* rows : {&cache_.keys(), &cache_.values()}) {
            const uint8_t* row = rows->row(key, store_head(tile));
            for (size_t byte = 0; byte < rows->row_bytes(); byte += 64) __builtin_prefetch(row + byte);
        }
    }

    void select_coded(const Tile& tile, size_t first, size_t count, KeptKeys& kept, SelectionSums& sums) const {
        const KeySketch& keys = cache_.key_sketch(store_head(tile));
        const bool values = reads_value_codes();
        const Sums wanted = !certify() ? Sums::none : settings_.certify ? Sums::all : Sums::masses;
        kernels().select(keys.high(first), keys.low(first),
                         values ? cache_.value_sketch(store_head(tile)).parameters(first) : nullptr, cache_.key_dim(),
                         cache_.value_dim(), count, uint32_t(first * kBlock), tile.coded, tile.count, tile.selection,
                         wanted, tile.uppers + first * kBlock, tile.stride,
                         tile.by_block ? tile.block_masses + first : nullptr, tile.mass_stride, &kept, &sums);
    }

    // All estimates are full-precision logits: what reaches the threshold is exact, the rest is omitted.
    void select_full(const Tile& tile, size_t first, size_t count, KeptKeys& kept, SelectionSums& sums) const {
        kept.count = 0;
        for (int q = 0; q < tile.count; ++q) {
            kept.exact_count[q] = 0;
            for (size_t i = 0; i < count; ++i) {
                const float upper = tile.uppers[size_t(q) * tile.stride + first + i];
                if (upper == -kInf) continue;
                if (upper >= tile.selection[q].threshold)
                    kept.exact[q][kept.exact_count[q]++] = uint32_t(first + i);
                else if (certify())
                    sums.omitted[q] += std::exp(double(upper) - tile.reference[q]);
            }
            kept.kept[q] = int64_t(kept.exact_count[q]);
        }
    }

    double power_of(double x) const {
        double product = x;
        for (int i = 1; i < settings_.power; ++i) product *= x;
        return product;
    }

    void rescale(Partial& part, int q, double factor, float* accumulator) const {
        part.exact_mass[q] *= factor;
        for (int i = 0; i < groups_ * kValueGroup; ++i) accumulator[i] *= float(factor);
    }

    // Keys read at full precision: those of `keys` that the rule keeps, with their values.
    void add_exact(const Tile& tile, int q, uint32_t* keys, size_t count, Partial& part, float* accumulator) const {
        if (count == 0) return;
        static thread_local std::vector<float> weights;
        weights.resize(count + 3);  // the kernel writes four at a time
        size_t kept = 0;
        if (weighs_in_float32(tile)) {
            const RowStore& rows = cache_.keys();
            kernels().dot_rows(rows.dtype(), rows.row(0, store_head(tile)), rows.token_bytes(), keys, count,
                               tile.vector[q], cache_.key_dim(), float(settings_.scale), weights.data());
            kernels().exp_into(weights.data(), count, float(tile.reference[q]), weights.data());
            for (; kept < count; ++kept) part.exact_mass[q] += double(weights[kept]);
        } else {
            static thread_local std::vector<double> logits;
            logits.resize(count);
            read_logits(tile, q, keys, count, logits.data());
            if (relu()) raise_top(part, q, *std::max_element(logits.begin(), logits.end()) - tile.threshold[q],
                                  accumulator);
            for (size_t i = 0; i < count; ++i) {
                const double weight = weight_of(tile, q, logits[i], part);
                if (!(weight > 0)) continue;
                keys[kept] = keys[i];
                weights[kept] = float(weight);
                part.exact_mass[q] += double(weights[kept++]);
            }
            part.kept[q] -= int64_t(count - kept);
        }
        const RowStore& rows = cache_.values();
        kernels().accumulate_rows(rows.dtype(), rows.row(0, store_head(tile)), rows.token_bytes(), keys, weights.data(),
                                  kept, cache_.value_dim(), accumulator);
    }
    void add_exact(const Tile& tile, int q, size_t key, double logit, Partial& part, float* accumulator) const {
        if (relu()) raise_top(part, q, logit - tile.threshold[q], accumulator);
        const double weight = weight_of(tile, q, logit, part);
        if (!(weight > 0)) {
            --part.kept[q];
            return;
        }
        part.exact_mass[q] += weight;
        kernels().axpy(cache_.dtype(), cache_.values().row(key, store_head(tile)), float(weight), cache_.value_dim(),
                       accumulator);
    }

    // ReLU: weights are relative to the largest so far, so that no power of them leaves float32.
    void raise_top(Partial& part, int q, double excess, float* accumulator) const {
        if (!(excess > part.relu_top[q])) return;
        rescale(part, q, power_of(part.relu_top[q] / excess), accumulator);
        part.relu_top[q] = excess;
    }

    // 0: the rule does not keep the key; what softmax leaves out is counted as omitted.
    double weight_of(const Tile& tile, int q, double logit, Partial& part) const {
        if (relu()) return logit > tile.threshold[q] ? power_of((logit - tile.threshold[q]) / part.relu_top[q]) : 0.0;
        const double weight = std::exp(logit - tile.reference[q]);
        if (!exact_rule() || settings_.rule != Rule::threshold || logit >= tile.threshold[q]) return weight;
        part.omitted[q] += weight;
        return 0.0;
    }

    // ---- stage 4: the answer of each query; false asks for another selection

    bool finish(Tile& tile) {
        bool enough = true;
        for (int q = 0; q < tile.count; ++q) enough &= finish(tile, q);
        return enough;
    }

    bool finish(Tile& tile, int q) {
        const size_t width = size_t(groups_) * kValueGroup;
        const int dim = cache_.value_dim();
        alignas(64) float sum[kMaxHeadDim + kValueGroup];
        double steps[kMaxHeadDim / kValueGroup] = {}, squares[kMaxHeadDim / kValueGroup] = {};
        std::fill(sum, sum + width, 0.0f);
        Partial total{};
        for (size_t c = 0; c < tile.chunks; ++c)
            total.relu_top[0] = std::max(total.relu_top[0], space_->partials[tile.partial_at + c].relu_top[q]);
        for (size_t c = 0; c < tile.chunks; ++c) {
            const size_t piece = tile.partial_at + c;
            const Partial& part = space_->partials[piece];
            // Chunks of ReLU weights are relative to their own largest.
            const double factor =
                relu() && part.relu_top[q] < total.relu_top[0] ? power_of(part.relu_top[q] / total.relu_top[0]) : 1.0;
            total.exact_mass[0] += part.exact_mass[q] * factor;
            total.sketched[0] += part.sketched[q];
            total.weight_band[0] += part.weight_band[q];
            total.weight_var[0] += part.weight_var[q];
            total.omitted[0] += part.omitted[q];
            total.left[0] += part.left[q];
            total.kept[0] += part.kept[q];
            const float* from = space_->accumulators.data() + (piece * kTile + size_t(q)) * width;
            for (size_t i = 0; i < width; ++i) sum[i] += from[i] * float(factor);
            for (int g = 0; g < groups_; ++g) {
                steps[g] += space_->steps[(piece * kTile + size_t(q)) * size_t(groups_) + size_t(g)];
                squares[g] += space_->squares[(piece * kTile + size_t(q)) * size_t(groups_) + size_t(g)];
            }
        }
        Partial tail{};
        if (relu()) {  // go on from the sums of the chunks, which may have to be scaled again
            tail.relu_top[q] = total.relu_top[0];
            tail.exact_mass[q] = total.exact_mass[0];
            total.exact_mass[0] = 0;
        }
        if (collects()) {
            add_top_r(tile, q, tail, sum);
        } else {
            for (size_t i = 0; i < kBlock; ++i)
                if (tile.tail_logit[q][i] != -double(kInf)) {
                    ++tail.kept[q];
                    add_exact(tile, q, cache_.coded() + i, tile.tail_logit[q][i], tail, sum);
                }
        }
        const double exact_mass = total.exact_mass[0] + tail.exact_mass[q];
        const double mass = exact_mass + total.sketched[0];
        // Keys whose weight underflowed (below exp(-87) of the reference) count exp(-87) each.
        const double omitted = (total.omitted[0] + total.left[0] + tail.omitted[q]) * 1.0001 +
                               (certify() ? double(tile.seen[q]) * 1.7e-38 : 0.0);
        // exp(-band) >= 1 - band
        const double surely = exact_mass * std::max(0.0, 1 - tile.float_slack[q] - kFloatWeight) +
                              std::max(0.0, total.sketched[0] * 0.9999 - total.weight_band[0] * 1.0001);
        if (bounds_mass() && tile.selection[q].threshold > -kInf && omitted > settings_.epsilon * (surely + omitted)) {
            Selection& selection = tile.selection[q];
            const double next = selection.threshold - tile.lowering[q];
            tile.lowering[q] *= 2;
            selection.threshold =
                next < tile.reference[q] - 80.0 - 1e-5 * std::fabs(tile.reference[q]) ? -kInf : float(next);
            selection.mass_from = mass_from(tile, q, selection.threshold);
            return false;
        }
        const size_t place = tile.place[q];
        float* out = result_.out + place * size_t(dim);
        const int64_t kept = collects() ? tail.kept[q] : total.kept[0] + tail.kept[q];
        result_.density[place] = tile.seen[q] ? float(double(kept) / double(tile.seen[q])) : 0.0f;
        if (!(mass > 0)) {
            std::fill(out, out + dim, 0.0f);
            result_.lse[place] = -kInf;
            // Nothing seen, or an empty ReLU row: zero by definition. A softmax row that kept nothing of
            // what it saw is as wrong as any answer can be.
            const bool defined = relu() || tile.seen[q] == 0;
            result_.error_bound[place] = defined ? 0.0f : hull_distance(tile, out);
            result_.estimated_error[place] = result_.error_bound[place];
            result_.omitted_mass[place] = defined ? 0.0f : 1.0f;
            return true;
        }
        // What was left out is given its likely mass at the mean of the values seen: a guess that takes nothing from
        // the bound and halves the error.
        double mean[kMaxHeadDim], guess = 0;
        if (stands_in() && omitted > 0 &&
            cache_.value_sketch(store_head(tile)).mean(size_t(tile.visible[q]), mask_row(tile, q), mean))
            guess = std::min(total.omitted[0] * tile.likely[q] + total.left[0], omitted);
        for (int i = 0; i < dim; ++i)
            out[i] = float(guess > 0 ? (sum[i] + guess * mean[i]) / (mass + guess) : sum[i] / mass);
        result_.lse[place] =
            float(std::log(mass) + (relu() ? settings_.power * std::log(tail.relu_top[q]) : tile.reference[q]));
        if (!settings_.certify) {
            result_.error_bound[place] = result_.estimated_error[place] = result_.omitted_mass[place] = std::nanf("");
            return true;
        }
        result_.omitted_mass[place] = omitted > 0 ? std::min(1.0f, up(omitted / (surely + omitted))) : 0.0f;
        certificate(tile, q, place, mass + guess, exact_mass, omitted, guess, mean, tail.relu_top[q], total, kept,
                    steps, squares, out);
        return true;
    }

    static float up(double x) { return std::nextafter(float(x), kInf); }

    // Largest distance, over coordinates, from `out` to a point in the range of the values: the exact answer is
    // a convex combination of the values.
    float hull_distance(const Tile& tile, const float* out) const {
        const ValueSketch& values = cache_.value_sketch(store_head(tile));
        double worst = 0;
        for (int i = 0; i < cache_.value_dim(); ++i)
            worst = std::max(
                {worst, double(values.most()[size_t(i)]) - out[i], double(out[i]) - values.least()[size_t(i)]});
        return up(worst);
    }

    void certificate(const Tile& tile, int q, size_t place, double mass, double exact_mass, double omitted,
                     double guess, const double* mean, double relu_top, const Partial& total, int64_t kept,
                     const double* steps, const double* squares, const float* out) {
        const ValueSketch& values = cache_.value_sketch(store_head(tile));
        // Share of the mass that is misplaced: omitted, or given by a wrong weight. expm1 of the band of a
        // full-precision logit is its float32 rounding.
        // ReLU: a float64 logit is off by at most `slack`, and then a weight, relative to the power of the
        // largest excess, by (1 + slack / excess)^power - 1.
        const double slack = settings_.scale * tile.norm[q] * cache_.largest_key_norm(store_head(tile)) *
                             (cache_.key_dim() / 16.0 + 8.0) * 1.2e-16;
        const double exact_error =
            relu() ? double(tile.seen[q]) * std::expm1(settings_.power * std::log1p(slack / relu_top))
                   : exact_mass * std::expm1(2 * tile.float_slack[q] + (weighs_in_float32(tile) ? kFloatWeight : 1e-6));
        const double wrong = (omitted + total.weight_band[0] * tile.selection[q].growth * 1.0001 + exact_error) / mass;
        double bound = 0, variance = 0, spread = 0, largest = 0;
        for (int i = 0; i < cache_.value_dim(); ++i) {
            const int g = i / kValueGroup;
            const double most = values.most()[size_t(i)], least = values.least()[size_t(i)];
            const double reach = std::max(most - out[i], double(out[i]) - least);
            // |value - decoded| <= step / 2 (1 + 2^-10)
            const double coding = steps[g] * 0.5005 / mass;
            const double stood_in = guess > 0 ? guess * std::fabs(mean[i] - out[i]) : 0.0;
            const double own =
                wrong + guess / mass < 1
                    ? std::min((coding + wrong * reach + stood_in / mass) / (1 - wrong - guess / mass), reach)
                    : reach;
            bound = std::max(bound, own);
            variance = std::max(variance, squares[g] / 12.0);
            spread = std::max(spread, (most - least) / 8.0);
            largest = std::max({largest, std::fabs(most), std::fabs(least)});
        }
        // Float32 sums of `kept` terms, each no larger than its weight times the largest value: a chain has
        // at most as many additions as a chunk has keys, and one for each chunk.
        const double rounding =
            kUnit * (double(std::min<int64_t>(kept, int64_t(kChunkKeys))) + double(tile.chunks) + 32.0) * largest;
        result_.error_bound[place] = up(bound + rounding);
        result_.estimated_error[place] = float(
            std::sqrt((variance + total.weight_var[0] * spread * spread) * 2.0 * std::log(2.0 * cache_.value_dim())) /
                mass +
            omitted / mass * spread + kUnit * 16 * largest);
    }

    // Rule top_r without a tail: of the candidates and the uncoded keys, the r largest logits, exactly.
    void add_top_r(Tile& tile, int q, Partial& part, float* sum) {
        std::vector<Candidate> all;
        for (size_t c = 0; c < tile.chunks; ++c) {
            const auto& own = space_->candidates[(tile.partial_at + c) * kTile + size_t(q)];
            all.insert(all.end(), own.begin(), own.end());
        }
        for (size_t i = 0; i < kBlock; ++i)
            if (tile.tail_logit[q][i] != -double(kInf))
                all.push_back({uint32_t(cache_.coded() + i), tile.tail_logit[q][i]});
        const size_t r = std::min(size_t(settings_.top_r), all.size());
        std::nth_element(all.begin(), all.begin() + int64_t(r), all.end(), [](const Candidate& a, const Candidate& b) {
            return a.logit > b.logit || (a.logit == b.logit && a.key < b.key);
        });
        for (size_t i = 0; i < all.size(); ++i) {
            if (i < r) {
                ++part.kept[q];
                add_exact(tile, q, all[i].key, all[i].logit, part, sum);
            } else {
                part.omitted[q] += std::exp(all[i].logit - tile.reference[q]);
            }
        }
    }

    const LayerCache& cache_;
    const AttendSettings& settings_;
    const AttendQueries& queries_;
    const AttendResult& result_;
    const int64_t m_;
    const int heads_, group_, groups_;
    size_t chunk_blocks_ = kChunkBlocks;
    Workspace* space_ = nullptr;
    std::vector<Tile> tiles_;
    std::vector<std::pair<size_t, size_t>> chunks_of_wave_;  // (tile, chunk)
    std::vector<std::pair<size_t, int>> queries_of_wave_;    // (tile, query)
    AttendWork work_;
};

}  // namespace

AttendWork attend(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
                  const AttendResult& result) {
    return Attend(cache, settings, queries, result).run();
}

}  // namespace hsr

// A decoding call from outside: preparation of its queries, and the two passes over threads.
#include "attention/decoding.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "threads.h"

namespace hsr {
namespace decoding {

AttendWork Attend::run() {
    const size_t per_head = size_t(m_) * size_t(group_);
    const size_t tiles_per_head = (per_head + kTile - 1) / kTile;
    const size_t all = size_t(cache_.batch() * cache_.kv_heads()) * tiles_per_head;
    const size_t stride = cache_.coded() + 64;
    chunk_blocks_ = all * cache_.coded() < kFewChunks * kChunkKeys ? kChunkBlocks / 2 : kChunkBlocks;
    const size_t wave = std::max<size_t>(size_t(num_threads()), kWorkspaceFloats / (kTile * stride));
    for (size_t first = 0; first < all; first += wave) {
        const size_t count = std::min(wave, all - first);
        place_wave(first, count, tiles_per_head, stride);
        run_wave();
    }
    return work_;
}

void Attend::place_wave(size_t first, size_t count, size_t tiles_per_head, size_t stride) {
    static thread_local Workspace workspace;
    space_ = &workspace;
    tiles_.resize(count);
    if (space_->uppers.size() < count * kTile * stride) space_->uppers.resize(count * kTile * stride);
    Workspace& space = *space_;
    const size_t mass_stride = (stride / kBlock + kChunkBlocks) / kChunkBlocks * kChunkBlocks;
    if (space.block_masses.size() < count * kTile * mass_stride) space.block_masses.resize(count * kTile * mass_stride);
    const size_t samples = mass_stride / kMassBlocks * kTile;
    if (space.sampled_masses.size() < count * samples) space.sampled_masses.resize(count * samples);
    for (size_t t = 0; t < count; ++t) {
        place_tile(tiles_[t], first + t, tiles_per_head);
        tiles_[t].uppers = space.uppers.data() + t * kTile * stride;
        tiles_[t].stride = stride;
        tiles_[t].block_masses = space.block_masses.data() + t * kTile * mass_stride;
        tiles_[t].mass_stride = mass_stride;
        tiles_[t].sampled_masses = space.sampled_masses.data() + t * samples;
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
    for (auto* sums : {&space.exact_sums, &space.coded_sums})
        sums->resize(pieces * kTile * size_t(groups_) * kValueGroup);
    for (auto* sums : {&space.offsets, &space.steps, &space.squares}) sums->resize(pieces * kTile * size_t(groups_));
}

void Attend::prepare(Tile& tile) const {
    for (int q = 0; q < tile.count; ++q) prepare(tile, q);
    const bool all_seen = tile.blocks && !hides(tile, 0, tile.blocks * kBlock),
               by_block = all_seen && settings_.rule == Rule::epsilon;
    tile.scan = kind_of_scan(tile, by_block);
    tile.by_block = by_block && tile.scan == Scan::four;
    tile.fused = all_seen && relu() && tile.scan == Scan::four;
    // With block masses only the keys left out after refinement are guessed from the sample.
    const size_t sampled =
        tile.by_block ? std::clamp(tile.blocks / kSampleStep, kFewestSampled, kMostSampled) : 4 * kFewestSampled;
    tile.sample_step = std::max<size_t>(1, tile.blocks / sampled);
}

void Attend::place_tile(Tile& tile, size_t index, size_t tiles_per_head) const {
    const size_t head = index / tiles_per_head, from = index % tiles_per_head * kTile;
    tile.row = int(head) / cache_.kv_heads();
    tile.kv_head = int(head) % cache_.kv_heads();
    tile.count = int(std::min<size_t>(kTile, size_t(m_) * size_t(group_) - from));
    int64_t farthest = 0;
    for (int q = 0; q < tile.count; ++q) {
        tile.query[q] = int64_t((from + size_t(q)) / size_t(group_));
        tile.head[q] = tile.kv_head * group_ + int((from + size_t(q)) % size_t(group_));
        tile.place[q] = (size_t(tile.row) * size_t(heads_) + size_t(tile.head[q])) * size_t(m_) + size_t(tile.query[q]);
        tile.visible[q] = std::clamp<int64_t>(queries_.visible[tile.query[q]], 0, int64_t(cache_.size()));
        farthest = std::max(farthest, tile.visible[q]);
    }
    tile.again = false;
    tile.blocks = std::min(cache_.key_sketch(store_head(tile)).blocks(), (size_t(farthest) + kBlock - 1) / kBlock);
    tile.chunks = (tile.blocks + chunk_blocks_ - 1) / chunk_blocks_;
}

void Attend::prepare(Tile& tile, int q) const {
    const KeySketch& sketch = cache_.key_sketch(store_head(tile));
    const double longest = cache_.largest_key_norm(store_head(tile));
    const uint8_t* mask = mask_row(tile, q);
    tile.seen[q] = tile.visible[q];
    if (mask) tile.seen[q] = tile.visible[q] - std::count(mask, mask + tile.visible[q], uint8_t(0));
    queries_.queries.read(tile.row, tile.head[q], tile.query[q], tile.vector[q]);
    tile.norm[q] = norm_of(tile.vector[q], cache_.key_dim());
    const double top_logit = settings_.scale * tile.norm[q] * (longest + sketch.largest_norm() + sketch.centre_norm());
    if (!(top_logit < 1e30)) {
        char found[32];
        std::snprintf(found, sizeof found, "%.3g", top_logit);
        throw std::invalid_argument(std::string("scale * |q| * |k| must be below 1e30, got ") + found);
    }
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

Scan Attend::kind_of_scan(Tile& tile, bool by_block) const {
    const KeySketch& sketch = cache_.key_sketch(store_head(tile));
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
        if (!(worst4 < kSafeBand) || mean4 > (by_block ? kWideBandOfBlocks : kWideBand)) kind = Scan::eight;
    }
    if (kind == Scan::eight)
        for (int q = 0; q < tile.count; ++q) {
            const CodedQuery& c = tile.coded[q];
            tile.likely[q] = std::exp(-double(c.slope8 * extent.residual8 + c.slope8_step * extent.step + c.slack));
        }
    return kind;
}

// A tile is prepared, scanned, chosen for and selected from; whoever ends its last chunk goes on with what needs all of
// them, while the other threads are at other tiles.
void Attend::run_wave() {
    enum : size_t { preparing, scanning, selecting };
    enum : int { prepared = 1, chosen = 2 };
    const size_t tiles = tiles_.size(), chunks = chunks_of_wave_.size();
    std::vector<Progress> progress(tiles);
    std::vector<std::atomic<size_t>> to_scan(tiles), to_select(tiles);
    const auto reopen = [&](std::vector<std::atomic<size_t>>& open) {
        for (size_t t = 0; t < tiles; ++t) open[t] = tiles_[t].chunks;
    };
    const auto last_of = [](std::atomic<size_t>& open) { return open.fetch_sub(1, std::memory_order_acq_rel) == 1; };
    const auto prepare_tile = [&](size_t t) {
        Tile& tile = tiles_[t];
        prepare(tile);
        if (tile.fused || tile.chunks == 0) choose(tile);
        if (tile.chunks == 0) finish(tile);  // all keys are read in full: nothing to select again
        progress[t].reach(tile.fused ? chosen : prepared);
    };
    const auto select = [&](size_t t, size_t chunk) {
        select_chunk(tiles_[t], chunk);
        if (last_of(to_select[t])) tiles_[t].again = !finish(tiles_[t]);
    };
    const auto scan = [&](size_t t, size_t chunk) {
        if (tiles_[t].fused) return select(t, chunk);
        scan_chunk(tiles_[t], chunk);
        if (!last_of(to_scan[t])) return;
        choose(tiles_[t]);
        progress[t].reach(chosen);
    };
    reopen(to_scan);
    reopen(to_select);
    space_->candidates.resize(collects() ? chunks * kTile : 0);
    parallel_phases({tiles, chunks, chunks}, [&](size_t phase, size_t task, const std::atomic<bool>& failed) {
        if (phase == preparing) return prepare_tile(task);
        const auto [t, chunk] = chunks_of_wave_[task];
        if (phase == scanning && progress[t].wait_for(prepared, failed)) scan(t, chunk);
        if (phase == selecting && progress[t].wait_for(chosen, failed) && !tiles_[t].fused) select(t, chunk);
    });
    std::vector<size_t> again;  // tiles
    const auto list_again = [&] {
        again.clear();
        for (size_t t = 0; t < tiles; ++t)
            if (tiles_[t].again) again.push_back(t);
        work_.selected_again += int64_t(again.size());
    };
    for (list_again(); !again.empty(); list_again()) {
        reopen(to_select);
        parallel_for(chunks, [&](size_t i) {
            const auto [t, chunk] = chunks_of_wave_[i];
            if (std::binary_search(again.begin(), again.end(), t)) select(t, chunk);
        });
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
                if (reads_value_codes()) work_.sketched += part.kept[q] - part.exact[q];
            }
        }
    }
}

}  // namespace decoding

AttendWork attend(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
                  const AttendResult& result) {
    return decoding::Attend(cache, settings, queries, result).run();
}

}  // namespace hsr

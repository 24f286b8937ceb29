// Stage 3: what may be kept is refined from both planes of its codes, and what stays is added up.
#include "attention/decoding.h"

#include <algorithm>
#include <cmath>

namespace hsr::decoding {

void Attend::select_chunk(Tile& tile, size_t chunk) {
    const size_t piece = tile.partial_at + chunk, width = size_t(groups_) * kValueGroup;
    const size_t sums_at = piece * kTile * size_t(groups_);
    Partial& part = space_->partials[piece];
    part = Partial();
    const size_t last = std::min((chunk + 1) * chunk_blocks_, tile.blocks);
    uint16_t reaching[kChunkBlocks * kTile];
    if (tile.fused) {
        const size_t first = chunk * chunk_blocks_;
        float thresholds[kTile];
        for (int q = 0; q < tile.count; ++q) thresholds[q] = tile.selection[q].threshold;
        part.nothing = !kernels().scan_reach(cache_.key_sketch(store_head(tile)).high(first), cache_.key_dim(),
                                             last - first, tile.coded, tile.count, thresholds, reaching);
        if (part.nothing) return;
    }
    float* exact_sums = space_->exact_sums.data() + piece * kTile * width;
    float* coded_sums = space_->coded_sums.data() + piece * kTile * width;
    SelectionSums sums{};
    sums.offsets = space_->offsets.data() + sums_at;
    sums.steps = space_->steps.data() + sums_at;
    sums.squares = space_->squares.data() + sums_at;
    for (float* s : {exact_sums, coded_sums}) std::fill(s, s + kTile * width, 0.0f);
    for (float* s : {sums.offsets, sums.steps, sums.squares}) std::fill(s, s + kTile * size_t(groups_), 0.0f);
    if (collects())
        for (int q = 0; q < tile.count; ++q) space_->candidates[piece * kTile + size_t(q)].clear();

    static thread_local KeptLists lists;
    lists.reserve(groups_);
    KeptKeys& kept = lists.kept;
    for (size_t first = chunk * chunk_blocks_; first < last; first += kSelectBlocks) {
        const size_t count = std::min(kSelectBlocks, last - first);
        for (int q = 0; q < tile.count; ++q) kept.exact[q] = lists.exact(q) + lists.exact_count[q];
        if (tile.scan == Scan::full)
            select_full(tile, first * kBlock, count * kBlock, kept, sums);
        else
            select_coded(tile, first, count, tile.fused ? reaching + (first - chunk * chunk_blocks_) * kTile : nullptr,
                         kept, sums);
        // Full-precision rows lie far apart: they are on their way while the value codes are read.
        for (int q = 0; q < tile.count; ++q) {
            for (size_t i = 0; i < kept.exact_count[q]; ++i) fetch_rows(tile, kept.exact[q][i]);
            lists.exact_count[q] += kept.exact_count[q];
            part.kept[q] += kept.kept[q];
        }
        if (kept.count)
            kernels().accumulate_codes(cache_.value_sketch(store_head(tile)).rows(), cache_.value_dim(), &kept,
                                       tile.count, coded_sums);
    }
    for (int q = 0; q < tile.count; ++q) {
        const size_t count = lists.exact_count[q];
        part.exact[q] = int64_t(count);
        if (collects())
            for (size_t i = 0; i < count; ++i)
                space_->candidates[piece * kTile + size_t(q)].push_back(
                    {lists.exact(q)[i], logit(tile, q, lists.exact(q)[i])});
        else
            add_exact(tile, q, lists.exact(q), count, part, exact_sums + size_t(q) * width);
    }
    for (int q = 0; q < tile.count; ++q) {
        part.omitted[q] += sums.omitted[q];
        part.left[q] += sums.left[q];
        part.sketched[q] = sums.sketched[q];
        part.weight_band[q] = sums.weight_band[q];
        part.weight_var[q] = sums.weight_var[q];
        for (int g = 0; g < groups_; ++g)
            for (int i = 0; i < kValueGroup; ++i)
                coded_sums[size_t(q) * width + size_t(g * kValueGroup + i)] += sums.offsets[q * groups_ + g];
    }
    part.refined = sums.refined;
}

void Attend::fetch_rows(const Tile& tile, size_t key) const {
    for (const RowStore* rows : {&cache_.keys(), &cache_.values()}) {
        const uint8_t* row = rows->row(key, store_head(tile));
        for (size_t byte = 0; byte < rows->row_bytes(); byte += 64) __builtin_prefetch(row + byte);
    }
}

void Attend::select_coded(const Tile& tile, size_t first, size_t count, const uint16_t* reaching, KeptKeys& kept,
                          SelectionSums& sums) const {
    const KeySketch& keys = cache_.key_sketch(store_head(tile));
    const bool values = reads_value_codes();
    const Sums wanted = !certify() ? Sums::none : settings_.certify ? Sums::all : Sums::masses;
    const size_t later = std::min(4 * kSelectBlocks, tile.blocks - first - count);
    kernels().select(keys.high(first), keys.low(first),
                     values ? cache_.value_sketch(store_head(tile)).parameters(first) : nullptr, cache_.key_dim(),
                     cache_.value_dim(), count, later, uint32_t(first * kBlock), tile.coded, tile.count, tile.selection,
                     wanted, tile.uppers + first * kBlock, tile.stride,
                     tile.by_block ? tile.block_masses + first : nullptr, tile.mass_stride, reaching, &kept, &sums);
}

// All estimates are full-precision logits: what reaches the threshold is exact, the rest is omitted.
void Attend::select_full(const Tile& tile, size_t first, size_t count, KeptKeys& kept, SelectionSums& sums) const {
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

}  // namespace hsr::decoding

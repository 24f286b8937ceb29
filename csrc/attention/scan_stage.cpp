// Stage 1: upper bounds of the logits of all keys, their largest estimate, and the mass of the estimates.
#include "attention/decoding.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace hsr::decoding {

void Attend::scan_chunk(Tile& tile, size_t chunk) {
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
    if (tile.by_block) {
        kernels().scan_blocks(sketch.high(first), cache_.key_dim(), count, tile.coded, tile.count, maxima,
                              tile.block_masses + first, tile.mass_stride,
                              tile.sampled_masses + first / kMassBlocks * kTile);
        std::copy(maxima, maxima + tile.count, tops);
        score_sample(tile, first, count);
        return;
    }
    if (tile.scan == Scan::four && !hides(tile, first * kBlock, count * kBlock)) {
        kernels().scan_mass(sketch.high(first), cache_.key_dim(), count, tile.coded, tile.count, estimates, tile.stride,
                            maxima, masses);
        std::copy(maxima, maxima + tile.count, tops);
        return;
    }
    // Maxima of these would count hidden keys: they are taken again below.
    if (tile.scan == Scan::eight)
        kernels().refine(sketch.high(first), sketch.low(first), cache_.key_dim(), count, tile.coded, tile.count,
                         estimates, tile.stride, maxima);
    else
        kernels().scan(sketch.high(first), cache_.key_dim(), count, 1, tile.coded, tile.count, estimates, tile.stride,
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

void Attend::score_sample(const Tile& tile, size_t first, size_t count) const {
    const KeySketch& sketch = cache_.key_sketch(store_head(tile));
    const size_t from = tile.sampled_below(first), until = tile.sampled_below(first + count);
    float unused[kTile] = {};
    if (from < until)
        kernels().scan(sketch.high(tile.sampled_block(from)), cache_.key_dim(), until - from, tile.sample_step,
                       tile.coded, tile.count, tile.uppers + from * kBlock, tile.stride, unused);
}

// Every logit at full precision; tops are the very numbers that `logit` gives again later.
void Attend::scan_full(const Tile& tile, size_t first, size_t count, double* tops, double* masses) const {
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

bool Attend::hides(const Tile& tile, size_t first, size_t count) const {
    for (int q = 0; q < tile.count; ++q) {
        if (size_t(tile.visible[q]) < first + count) return true;
        const uint8_t* mask = mask_row(tile, q);
        if (mask && std::memchr(mask + first, 0, count)) return true;
    }
    return false;
}

// Estimates of keys that query q may not see become -inf.
void Attend::hide(const Tile& tile, int q, size_t first, size_t count, float* estimates) const {
    const size_t visible = size_t(tile.visible[q]);
    for (size_t i = visible > first ? visible - first : 0; i < count; ++i) estimates[i] = -kInf;
    if (const uint8_t* mask = mask_row(tile, q))
        for (size_t i = 0; i < count && first + i < visible; ++i)
            if (!mask[first + i]) estimates[i] = -kInf;
}

}  // namespace hsr::decoding

#include "index/flat_index.h"

#include <cmath>
#include <limits>

#include "sketch/key_sketch.h"

namespace hsr {

void FlatIndex::append_rows(const TokenArray& keys) {
    const size_t first = live_.positions(), n = size_t(keys.tokens), item = item_size(dtype_);
    const size_t old_blocks = blocks(), new_blocks = (first + n + kBlock - 1) / kBlock;
    blocks_.reserve(new_blocks * block_bytes());
    std::memset(blocks_.data() + old_blocks * block_bytes(), 0, (new_blocks - old_blocks) * block_bytes());
    float row[kMaxHeadDim];
    for (size_t t = 0; t < n; ++t) {
        const size_t position = first + t;
        uint8_t* column = blocks_.data() + position / kBlock * block_bytes() + position % kBlock * item;
        const auto* from = static_cast<const uint8_t*>(keys.data) + int64_t(t) * keys.token_stride * int64_t(item);
        for (int j = 0; j < dim_; ++j)
            std::memcpy(column + size_t(j) * kBlock * item, from + j * keys.dim_stride * int64_t(item), item);
        keys.read(0, 0, int64_t(t), row);
        largest_norm_ = std::max(largest_norm_, norm_of(row, dim_));
    }
}

void FlatIndex::keep_rows(const std::vector<size_t>& positions) {
    const size_t item = item_size(dtype_);
    Buffer kept;
    kept.reserve(blocks() * block_bytes());
    std::memset(kept.data(), 0, blocks() * block_bytes());
    for (size_t i = 0; i < positions.size(); ++i) {
        const uint8_t* from = blocks_.data() + positions[i] / kBlock * block_bytes() + positions[i] % kBlock * item;
        uint8_t* to = kept.data() + i / kBlock * block_bytes() + i % kBlock * item;
        for (int j = 0; j < dim_; ++j)
            std::memcpy(to + size_t(j) * kBlock * item, from + size_t(j) * kBlock * item, item);
    }
    blocks_ = std::move(kept);
}

void FlatIndex::scan_range(const float* queries, const double* norms, const double* thresholds, int tile, size_t first,
                           size_t last, std::vector<Hit>* hits, int64_t* counts, WorkCounters& work) const {
    // A float32 score is a sum of dim products in two chains: it is off by at most
    // (dim / 2 + 2) u |q| |k| <= dim u |q| max|k| + 2 u |q| max|k|, u = 2^-24; products below the smallest
    // normal number may vanish, which the absolute term covers. Overflow gives inf or NaN, which count as
    // "not below". What passes is scored again in float64, where products of float32 are exact.
    float lowered[kTile];
    for (int q = 0; q < tile; ++q) {
        const double slack = (dim_ + 2) * std::ldexp(1.0, -24) * norms[q] * largest_norm_ + dim_ * 1.5e-38;
        lowered[q] = std::nextafter(float(thresholds[q] - slack), -std::numeric_limits<float>::infinity());
        if (!std::isfinite(norms[q] * largest_norm_) || norms[q] * largest_norm_ > 1e38)
            lowered[q] = -std::numeric_limits<float>::infinity();  // float32 sums may overflow: verify all
    }
    constexpr size_t kStep = 256;
    uint16_t masks[kTile * kStep];
    for (size_t b = first; b < last; b += kStep) {
        const size_t count = std::min(kStep, last - b);
        kernels().flat_masks(dtype_, blocks_.data() + b * block_bytes(), dim_, count, queries, tile, lowered, masks,
                             kStep);
        for (int q = 0; q < tile; ++q)
            for (size_t i = 0; i < count; ++i) {
                uint32_t mask = masks[size_t(q) * kStep + i] & live_.mask(b + i);
                if (!mask) continue;
                double scores[kBlock];
                kernels().flat_block64(dtype_, blocks_.data() + (b + i) * block_bytes(), dim_,
                                       queries + size_t(q) * size_t(dim_), scores);
                for (; mask; mask &= mask - 1) {
                    const int lane = __builtin_ctz(mask);
                    if (!(scores[lane] >= thresholds[q])) continue;
                    if (hits)
                        hits[q].push_back({uint32_t((b + i) * kBlock + size_t(lane)), scores[lane]});
                    else
                        ++counts[q];
                }
            }
    }
    work.full_scored += int64_t(tile) * int64_t(std::min(last * kBlock, live_.positions()) -
                                                std::min(first * kBlock, live_.positions()));
}

double FlatIndex::threshold_for(const float* query, double, size_t r, WorkCounters& work) const {
    std::vector<double> scores;
    scores.reserve(live_.live());
    for (size_t b = 0; b < blocks(); ++b) {
        double block[kBlock];
        kernels().flat_block64(dtype_, blocks_.data() + b * block_bytes(), dim_, query, block);
        for (uint32_t mask = live_.mask(b); mask; mask &= mask - 1) scores.push_back(block[__builtin_ctz(mask)]);
    }
    work.full_scored += int64_t(live_.positions());
    std::nth_element(scores.begin(), scores.begin() + int64_t(r) - 1, scores.end(), std::greater<double>());
    return scores[r - 1];
}

}  // namespace hsr

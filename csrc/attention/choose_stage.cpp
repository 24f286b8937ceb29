// Stage 2: the two thresholds of each query, once all its keys were scanned.
#include "attention/decoding.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace hsr::decoding {

void Attend::choose(Tile& tile) {
    for (int q = 0; q < tile.count; ++q) choose(tile, q);
}

void Attend::choose(Tile& tile, int q) {
    double top = -double(kInf);
    const size_t scanned = tile.fused ? 0 : tile.chunks;
    for (size_t c = 0; c < scanned; ++c)
        top = std::max(top, space_->chunk_top[(tile.partial_at + c) * kTile + size_t(q)]);
    for (double s : tile.tail_logit[q]) top = std::max(top, s);
    if (top == -double(kInf)) top = 0;
    // Kernels subtract the reference from float estimates, so it is a float there. A full scan keeps it exact:
    // its logits may be so large that rounding them moves weights by many nats.
    tile.reference[q] = tile.scan == Scan::full || tile.chunks == 0 ? top : double(float(top));
    tile.lowering[q] = std::max(1.0, std::fabs(top) * 1e-5);
    double mass = 0;
    for (double s : tile.tail_logit[q]) mass += std::exp(s - top);
    for (size_t c = 0; c < scanned; ++c) {
        const size_t place = (tile.partial_at + c) * kTile + size_t(q);
        const double factor = std::exp(space_->chunk_top[place] - tile.reference[q]);
        if (tile.by_block) {
            kernels().scale(tile.block_masses + size_t(q) * tile.mass_stride + c * chunk_blocks_, chunk_blocks_,
                            float(factor));
            for (size_t i = 0; i < chunk_blocks_ / kMassBlocks; ++i)
                tile.sampled_masses[(c * chunk_blocks_ / kMassBlocks + i) * kTile + size_t(q)] *= float(factor);
        } else if (space_->chunk_mass[place] > 0)
            mass += space_->chunk_mass[place] * factor;
    }
    if (tile.by_block) mass += likely_mass(tile, q);
    tile.mass[q] = mass;
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
            selection.threshold =
                settings_.sketch_tail ? std::min(selection.exact_from, tail_threshold(tile, q)) : selection.exact_from;
            break;
        case Rule::top_r:
            selection.exact_from = top_r_threshold(tile, q);
            selection.threshold =
                settings_.sketch_tail ? std::min(selection.exact_from, tail_threshold(tile, q)) : selection.exact_from;
            break;
        case Rule::epsilon:
            selection.threshold = tail_threshold(tile, q);
            selection.exact_from = settings_.sketch_tail ? float(log_mass + std::log(settings_.exact_share)) : -kInf;
            break;
    }
    selection.mass_from = mass_from(tile, q, selection.threshold);
}

// Every `sample_step`-th block, side by side.
Attend::Sample Attend::take_sample(const Tile& tile, int q) const {
    const size_t blocks = tile.sampled_below(tile.blocks), count = blocks * kBlock;
    static thread_local std::vector<float> buffer;
    buffer.resize(4 * count + blocks);
    Sample sample{};
    sample.blocks = blocks;
    sample.estimates = buffer.data();
    sample.weights = sample.estimates + count;
    sample.uppers = sample.weights + count;
    sample.upper_weights = sample.uppers + count;
    sample.masses = sample.upper_weights + count;
    const float reference = float(tile.reference[q]);
    const float* own = tile.uppers + size_t(q) * tile.stride;
    if (tile.by_block) {
        std::copy(own, own + count, sample.estimates);
        for (size_t i = 0; i < blocks; ++i)
            sample.masses[i] = tile.block_masses[size_t(q) * tile.mass_stride + tile.sampled_block(i)];
    } else {
        for (size_t i = 0; i < blocks; ++i) {
            const size_t block = tile.sampled_block(i);
            const float* from = own + block * kBlock;
            std::copy(from, from + kBlock, sample.uppers + i * kBlock);
            away_from_upper(tile, q, block, 1, -1.0f, from, sample.estimates + i * kBlock);
        }
        kernels().exp_into(sample.uppers, count, reference, sample.upper_weights);
    }
    kernels().exp_into(sample.estimates, count, reference, sample.weights);
    return sample;
}

// The likely mass of all coded keys: of the heaviest blocks what both planes say, and of the others the share of their
// upper masses that estimates have. Few keys often hold most of the mass, and an estimate of 4 bits is off
// by half a nat: thresholds from it would leave out too much or too little.
double Attend::likely_mass(const Tile& tile, int q) const {
    const KeySketch& sketch = cache_.key_sketch(store_head(tile));
    const float* masses = tile.block_masses + size_t(q) * tile.mass_stride;
    double light = kernels().sum_below(masses, tile.blocks, kInf);
    const float heavy = float(light / double(kMostHeavy));
    uint32_t list[kMostHeavy];
    size_t count = 0;
    for (size_t first = 0; first < tile.blocks; first += kSelectBlocks) {
        const size_t last = std::min(first + kSelectBlocks, tile.blocks);
        if (!kernels().count_from(masses + first, last - first, heavy)) continue;
        for (size_t block = first; block < last && count < kMostHeavy; ++block)
            if (!(masses[block] < heavy)) {
                list[count++] = uint32_t(block);
                light -= double(masses[block]);
            }
    }
    float weights[kMostHeavy * kBlock];
    const size_t keys = count * kBlock;
    kernels().refine_listed(sketch.high(0), sketch.low(0), cache_.key_dim(), list, count, &tile.coded[q], weights);
    kernels().exp_into(weights, keys, float(tile.reference[q]), weights);
    // Of the light blocks whose estimates were weighed: sums of weights w and upper masses u, and of their products.
    double w = 0, u = 0, ww = 0, wu = 0, uu = 0;
    for (size_t block = kWeighedBlock; block < tile.blocks; block += kMassBlocks) {
        const double upper = double(masses[block]),
                     weight = double(tile.sampled_masses[block / kMassBlocks * kTile + size_t(q)]);
        if (!(masses[block] < heavy)) continue;
        w += weight, u += upper;
        ww += weight * weight, wu += weight * upper, uu += upper * upper;
    }
    const double refined = kernels().sum_below(weights, keys, kInf);
    if (!(u > 0)) return refined + std::max(light, 0.0) * tile.likely[q];
    // Less the standard error of the ratio: a mass guessed too large costs a second selection.
    const double share = w / u, error = std::sqrt(std::max(ww - 2 * share * wu + share * share * uu, 0.0)) / u;
    return refined + std::max(light, 0.0) * std::max(share - error, 0.0);
}

// Blocks whose keys together may weigh less than this are left out as a whole.
float Attend::mass_from(const Tile& tile, int q, float threshold) {
    return kBlockWeight * std::exp(threshold - float(tile.reference[q]));
}

// A threshold that is likely to omit a little less than epsilon of the mass: found by interpolation on a
// sample of the keys. `finish` measures what was omitted and asks again if it was too much.
float Attend::tail_threshold(const Tile& tile, int q) const {
    if (tile.blocks == 0) return -kInf;
    const Sample sample = take_sample(tile, q);
    const size_t step = tile.sample_step, blocks = sample.blocks, count = blocks * kBlock;
    const float reference = float(tile.reference[q]);
    // 0.7: a margin for the sampling, so that a second selection is rare.
    const double allowed = 0.7 * settings_.epsilon * tile.mass[q] / double(step);
    const auto omitted = [&](float threshold) {
        if (!tile.by_block)
            return kernels().mass_below(sample.estimates, sample.uppers, sample.weights, sample.upper_weights, count,
                                        threshold);
        const float from = mass_from(tile, q, threshold);
        const double light = kernels().sum_below(tile.block_masses + size_t(q) * tile.mass_stride, tile.blocks, from);
        return light / double(step) +
               kernels().mass_left(sample.estimates, sample.weights, sample.masses, blocks, from, threshold);
    };
    // Nothing below 80 nats matters; at large logits, where floats stand further apart, go by relative steps.
    const float grain = std::fabs(reference) * 1e-5f;
    const float least = reference - 80.0f - grain;
    // A key that alone holds more than epsilon of the mass cannot be left out.
    float high = reference + float(std::log(settings_.epsilon * std::max(tile.mass[q], 1e-300)));
    high = std::clamp(high, least, reference);
    double below_high = omitted(high);
    if (below_high <= allowed) return high;
    float low = high - 8.0f - grain;
    double below_low = omitted(low);
    while (low > least && below_low > allowed) {
        high = low, below_high = below_low;
        low -= 16.0f + grain;
        below_low = omitted(low);
    }
    if (low <= least) return -kInf;
    // Between two thresholds the mass below grows like an exponential: aim a little below what is allowed.
    for (int i = 0; i < 12 && high - low > 0.02f && !(below_low > 0.95 * allowed); ++i) {
        const double part =
            below_low > 0 ? std::log(0.98 * allowed / below_low) / std::log(below_high / below_low) : 0.5;
        const float between = low + float(std::clamp(part, 0.1, 0.9)) * (high - low);
        const double below = omitted(between);
        if (below > allowed)
            high = between, below_high = below;
        else
            low = between, below_low = below;
    }
    return low;
}

// out = upper bound + sign * band: sign -1 gives the estimates, -2 the lower bounds.
void Attend::away_from_upper(const Tile& tile, int q, size_t block, size_t count, float sign, const float* uppers,
                             float* out) const {
    if (tile.scan == Scan::full) {
        for (size_t i = 0; i < count * kBlock; ++i) out[i] = uppers[i] + sign * full_band(tile, q, uppers[i]);
        return;
    }
    const KeySketch& sketch = cache_.key_sketch(store_head(tile));
    kernels().bounds(sketch.high(block), sketch.low(block), cache_.key_dim(), count, &tile.coded[q],
                     tile.scan == Scan::eight, uppers, sign, out);
}

// The r-th largest estimate, or for an exact answer the r-th largest lower bound, of the visible keys.
float Attend::top_r_threshold(Tile& tile, int q) {
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

}  // namespace hsr::decoding

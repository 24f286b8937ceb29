// Which threshold will use up the omitted mass that is allowed: from a sample of the keys.
#include "attention/prompts.h"

#include <algorithm>
#include <cmath>

namespace hsr::prompts {

// How the mass of a row's keys is spread, from sixteen blocks all over those that the tile sees.
void Prefill::sample(Workspace& space, int head, size_t count, size_t blocks) {
    const KeySketch& sketch = cache_.key_sketch(head);
    // Never the first block: its keys are like no others.
    const auto place = [&](size_t at) { return (2 * at + 1) * blocks / (2 * kSampleBlocks); };
    for (size_t at = 0; at < kSampleBlocks; ++at)
        kernels().unpack_panel(sketch.high(place(at)), sketch.low(place(at)), dim_, 1, at, &space.panel);
    for (size_t first = 0; first < count; first += kRowsAtOnce) {
        const size_t here = std::min<size_t>(kRowsAtOnce, count - first);
        kernels().score_panel(&space.panel, dim_, 0, kSampleBlocks / 4, &space.queries[first], int(here), false,
                              space.logits.data(), kLogitStride);
        for (size_t i = first; i < first + here; ++i) {
            Row& row = space.rows[i];
            float* logits = space.logits.data() + (i - first) * kLogitStride;
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
double Prefill::likely_mass(const Row& row, double remaining) const {
    const double sampled = row.curve_top == -kInf ? 0.0 : double(row.curve[1]);
    return std::max(row.mass + remaining * double(row.blocks) / double(kSampleBlocks) * sampled, 1e-300);
}

// A threshold that is likely to use up the allowed omitted mass evenly over the keys that remain.
double Prefill::guess(const Row& row, double remaining, double off) const {
    if (row.curve_top == -kInf) return -double(kInf);
    // A sampled key stands for this many of the remaining ones.
    const double each = remaining * double(row.blocks) / double(kSampleBlocks);
    // Mass that is only likely is counted while little has been seen.
    const double mass = remaining > 0.99 ? likely_mass(row, remaining) : row.mass;
    const double allowed = (kAim * budget_ * mass - row.omitted) / (each * (1 + off));
    if (!(allowed > 0)) return double(row.curve_top) - kCurve;
    // The curve falls: its points above, counted without a branch that nothing predicts.
    const float limit = float(allowed);
    int j = 0;
    for (const float point : row.curve) j += point > limit;
    if (j == 0) return double(row.curve_top);
    if (j == kCurve) return double(row.curve_top) - kCurve + 1;
    // Between two points the mass below a threshold falls like a power of two.
    const double above = row.curve[j - 1], below = std::max(double(row.curve[j]), above * 1e-3);
    const double low = quick_log2(below), fall = std::max(quick_log2(above) - low, 0.01);
    const double part = std::clamp((quick_log2(allowed) - low) / fall, 0.0, 1.0);
    return double(row.curve_top) - j + part;
}

}  // namespace hsr::prompts

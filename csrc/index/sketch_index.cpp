#include "index/sketch_index.h"

#include <cmath>
#include <limits>

namespace hsr {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr size_t kStep = 64;  // blocks scanned between selections: estimates stay in the first cache

float below(double x) { return std::nextafter(float(x), -kInf); }
float above(double x) { return std::nextafter(float(x), kInf); }

}  // namespace

void SketchIndex::append_rows(const TokenArray& keys) {
    rows_.append(keys);
    sketch_.code(rows_, 0);
}

void SketchIndex::keep_rows(const std::vector<size_t>& positions) {
    rows_.keep(positions.data(), positions.size());
    sketch_ = KeySketch(dim_);
    sketch_.code(rows_, 0);
}

void SketchIndex::scan_range(const float* queries, const double* norms, const double* thresholds, int tile,
                             size_t first, size_t last, std::vector<Hit>* hits, int64_t* counts,
                             WorkCounters& work) const {
    const size_t coded_last = std::min(last, sketch_.blocks());
    const auto verify = [&](int q, size_t position) {
        ++work.full_scored;
        const double score = kernels().dot64(dtype_, rows_.row(position, 0), queries + size_t(q) * size_t(dim_), dim_);
        if (!(score >= thresholds[q])) return;
        if (hits)
            hits[q].push_back({uint32_t(position), score});
        else
            ++counts[q];
    };
    // Estimates and thresholds are those of the query at unit length, so that nothing overflows. For a zero
    // query every score is 0: the threshold becomes -inf or +inf, and verification decides.
    PreparedQuery prepared[kTile];
    CodedQuery coded[kTile];
    double units[kTile];
    for (int q = 0; q < tile; ++q) {
        prepared[q].prepare(sketch_, queries + size_t(q) * size_t(dim_), norms[q], 1.0, false);
        coded[q] = prepared[q].coded;
        units[q] = norms[q] > 0 ? thresholds[q] / norms[q]
                                : (thresholds[q] > 0 ? kInf : -std::numeric_limits<double>::infinity());
    }
    alignas(64) float estimates[kTile * kStep * kBlock], uppers[kStep * kBlock];
    for (size_t b = first; b < coded_last; b += kStep) {
        const size_t count = std::min(kStep, coded_last - b);
        float maxima[kTile] = {-kInf, -kInf, -kInf, -kInf};
        kernels().scan(sketch_.high(b), dim_, count, 1, coded, tile, estimates, kStep * kBlock, maxima);
        work.sketch_scored += int64_t(tile) * int64_t(count) * kBlock;
        for (int q = 0; q < tile; ++q) {
            const float* estimate = estimates + size_t(q) * kStep * kBlock;
            kernels().bounds(sketch_.high(b), sketch_.low(b), dim_, count, &coded[q], false, estimate, 1.0f, uppers);
            const float low = below(units[q]), high = above(units[q]);
            for (size_t i = 0; i < count; ++i) {
                uint32_t doubt = 0;
                for (int lane = 0; lane < kBlock; ++lane)
                    doubt |= uint32_t(!(uppers[i * kBlock + size_t(lane)] < low)) << lane;
                doubt &= live_.mask(b + i);
                if (!doubt) continue;
                alignas(64) float refined[kBlock];
                float unused = -kInf;
                kernels().refine(sketch_.high(b + i), sketch_.low(b + i), dim_, 1, &coded[q], 1, refined, 0, &unused);
                uint16_t steps[kBlock], residuals[kBlock];
                std::memcpy(steps, sketch_.high(b + i) + code_bytes(dim_), sizeof steps);
                std::memcpy(residuals, sketch_.low(b + i) + code_bytes(dim_), sizeof residuals);
                for (; doubt; doubt &= doubt - 1) {
                    const int lane = __builtin_ctz(doubt);
                    const float step = bfloat16_to_float(steps[lane]), residual = bfloat16_to_float(residuals[lane]);
                    const float band = coded[q].slope8 * residual + coded[q].slope8_step * step + coded[q].slack;
                    ++work.refined;
                    if (refined[lane] + band < low) continue;
                    if (!hits && refined[lane] - band > high) {
                        ++counts[q];  // certainly inside: a count needs no row
                        continue;
                    }
                    verify(q, (b + i) * kBlock + size_t(lane));
                }
            }
        }
    }
    for (size_t b = std::max(first, sketch_.blocks()); b < last; ++b)
        for (uint32_t mask = live_.mask(b); mask; mask &= mask - 1)
            for (int q = 0; q < tile; ++q) verify(q, b * kBlock + size_t(__builtin_ctz(mask)));
}

double SketchIndex::threshold_for(const float* query, double norm, size_t r, WorkCounters& work) const {
    if (norm == 0) return 0.0;
    std::vector<double> lower(live_.live());
    size_t n = 0;
    PreparedQuery prepared;
    prepared.prepare(sketch_, query, norm, 1.0, false);
    alignas(64) float estimates[kStep * kBlock], lowers[kStep * kBlock];
    for (size_t b = 0; b < sketch_.blocks(); b += kStep) {
        const size_t count = std::min(kStep, sketch_.blocks() - b);
        float maximum = -kInf;
        kernels().scan(sketch_.high(b), dim_, count, 1, &prepared.coded, 1, estimates, 0, &maximum);
        kernels().bounds(sketch_.high(b), sketch_.low(b), dim_, count, &prepared.coded, false, estimates, -1.0f,
                         lowers);
        for (size_t i = 0; i < count; ++i)
            for (uint32_t mask = live_.mask(b + i); mask; mask &= mask - 1) {
                const float bound = lowers[i * kBlock + size_t(__builtin_ctz(mask))];
                // NaN or -inf: a key that is not coded may score anything.
                lower[n++] = bound > -kInf ? double(below(bound)) * norm : -std::numeric_limits<double>::infinity();
            }
    }
    work.sketch_scored += int64_t(sketch_.coded());
    for (size_t b = sketch_.blocks(); b < blocks(); ++b)
        for (uint32_t mask = live_.mask(b); mask; mask &= mask - 1) {
            lower[n++] = kernels().dot64(dtype_, rows_.row(b * kBlock + size_t(__builtin_ctz(mask)), 0), query, dim_);
            ++work.full_scored;
        }
    std::nth_element(lower.begin(), lower.begin() + int64_t(r) - 1, lower.begin() + int64_t(n), std::greater<double>());
    // A relative hair lower: the bound was multiplied by the norm in floating point.
    const double bound = lower[r - 1];
    return bound - std::fabs(bound) * 1e-12;
}

}  // namespace hsr

// What an answer is off by at most, from how its weight was spent. Shared by decoding and prompts; derived in
// DESIGN.md, "The certificate".
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "sketch/value_sketch.h"

namespace hsr {

inline float rounded_up(double x) { return std::nextafter(float(x), std::numeric_limits<float>::infinity()); }

// Of an answer that divides by `mass`, stand-ins included.
struct SpentWeight {
    double mass;
    double wrong;     // weight that was left out, or given though it may not be right
    double stood_in;  // weight given to a likely value in place of what was left out
};

struct AnswerBound {
    double bound = 0;    // of |out - exact|, the largest over coordinates, roundings of float32 sums aside
    double largest = 0;  // of the values, in size
    double spread = 0;   // an eighth of the widest range of a coordinate, for estimates of the error
};

// For every coordinate j, with A = coding(j) / mass, B = wrong / mass, C = stood_in / mass and
// C |v - out|_j = apart(j) / mass,
//   |out - exact|_j <= (A_j + B D_j + C |v - out|_j) / (1 - B - C) if that divides by more than 0, and <= D_j always,
// where D_j = max(most_j - out_j, out_j - least_j): the exact answer is a convex combination of the values.
template <class Coding, class Apart>
AnswerBound bound_answer(const ValueSketch& values, const float* out, const SpentWeight& spent, const Coding& coding,
                         const Apart& apart) {
    AnswerBound found;
    const double rest = spent.mass - spent.wrong - spent.stood_in, share = rest > 0 ? 1 / rest : 0.0;
    for (size_t j = 0; j < values.most().size(); ++j) {
        const double most = values.most()[j], least = values.least()[j];
        const double reach = std::max(most - out[j], double(out[j]) - least);
        const double own =
            rest > 0 ? std::min((coding(j) + spent.wrong * reach + apart(j)) * share * (1 + 1e-12), reach) : reach;
        found.bound = std::max(found.bound, own);
        found.spread = std::max(found.spread, (most - least) / 8.0);
        found.largest = std::max({found.largest, std::fabs(most), std::fabs(least)});
    }
    return found;
}

// The largest D_j: what an answer that kept nothing is off by.
inline float range_distance(const ValueSketch& values, const float* out) {
    double worst = 0;
    for (size_t j = 0; j < values.most().size(); ++j)
        worst = std::max({worst, double(values.most()[j]) - out[j], double(out[j]) - values.least()[j]});
    return rounded_up(worst);
}

// ReLU: a float64 logit of a key of that length is off by at most `slack`, and then a weight, relative to the power of
// the largest excess over the threshold, by (1 + slack / excess)^power - 1.
inline double relu_weight_error(double scaled_query_norm, double largest_key_norm, int dim, int power,
                                double largest_excess) {
    const double slack = scaled_query_norm * largest_key_norm * (dim / 16.0 + 8.0) * 1.2e-16;
    return std::expm1(power * std::log1p(slack / largest_excess));
}

}  // namespace hsr

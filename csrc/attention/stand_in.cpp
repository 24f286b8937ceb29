#include "attention/stand_in.h"

#include <algorithm>
#include <cmath>

namespace hsr {
namespace {

// A few coded keys do not speak for many that were left out.
constexpr double kMostOfCoded = 0.5;
// Shares that a quantile is asked of are at least this far from 0 and 1.
constexpr double kLeast = 1e-6;

// The x below which a normally distributed number lies with probability p, within 3e-3: Abramowitz and Stegun, 26.2.22.
double normal_quantile(double p) {
    const double rare = std::min(p, 1 - p), t = std::sqrt(-2 * std::log(rare));
    const double x = t - (2.30753 + 0.27061 * t) / (1 + t * (0.99229 + 0.04481 * t));
    return p < 0.5 ? -x : x;
}

// Logits with standard deviation s: with weights exp(logit), the deviation z from their mean, in units of s, is
// N(s, 1) instead of N(0, 1). The threshold lies at `threshold` in N(s, 1) - s, so that the means of z are
// s - density / (share left out) and s + density / (share kept); values are taken for linear in z.
double likeness(double left_share, double kept) {
    const double threshold = normal_quantile(left_share), deviation = normal_quantile(1 - kept) - threshold;
    const double density = std::exp(-0.5 * threshold * threshold) * 0.3989422804;
    return (deviation - density / left_share) / std::max(deviation + density / (1 - left_share), 0.2);
}

}  // namespace

StandIn::StandIn(double left, double coded, double mass, double kept) {
    if (!(left > 0 && coded > 0)) return;
    const double left_share = std::clamp(left / (left + mass), kLeast, 0.5);
    const double like = std::clamp(likeness(left_share, std::clamp(kept, kLeast, 1 - kLeast)), -1.5, 0.6);
    of_coded = std::clamp(like * left / coded, -kMostOfCoded, kMostOfCoded);
    of_mean = 1 - of_coded * coded / left;
}

}  // namespace hsr

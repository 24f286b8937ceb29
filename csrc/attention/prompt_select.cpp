// What a row keeps of a panel, by the estimates of its logits.
#include "attention/prompts.h"

#include <algorithm>
#include <cmath>

namespace hsr::prompts {

// attempt(threshold) selects; at ever lower thresholds until what all panels so far omit is within its budget.
template <class Try>
Attempt Prefill::within_budget(Workspace& space, size_t i, double threshold, double off, const Try& attempt) {
    Row& row = space.rows[i];
    for (int tries = 0;; ++tries) {
        if (settings_.rule == Rule::threshold) threshold = std::min(threshold, row.threshold);
        const Attempt found = attempt(threshold);
        const double omitted = found.omitted * (1 + off) * kSumExcess, left = row.omitted + omitted;
        if (left <= budget_ * kSpend * row.surely()) return found;
        if (found.scores) {
            const PanelQuery& query = space.queries[i];
            for (size_t k = 0; k < found.listed; ++k)
                space.kept[k] = query.unit * found.scores[space.positions[k] - found.first] + query.centre;
        }
        // The keys kept here add to the mass that the omitted share is taken of.
        double mass = row.surely();
        if (found.digits > 0) mass += found.digits * std::exp2(found.cap - row.reference) / (1 + off) * 0.999;
        if (found.listed) {
            const float top = kernels().largest_of(space.kept.data(), found.listed);
            if (double(top) > row.reference + 24.0) {  // masses no longer fit: count them from there
                raise_reference(space, i, top);
                --tries;
                continue;
            }
            mass += kernels().weigh(space.kept.data(), found.listed, float(row.reference), space.weights) / (1 + off) *
                    0.9999;
        }
        if (left <= budget_ * kSpend * mass || threshold == -double(kInf)) return found;
        ++again_;
        const double room = budget_ * kSpend * mass - row.omitted;
        threshold = tries < 3 && room > 0 ? threshold - 1.0 - quick_log2(omitted / room) : -double(kInf);
    }
}

// Returns how many keys stand in words of 64 from which nothing was kept.
int64_t Prefill::select(Workspace& space, size_t i, int head, size_t first, size_t count, const float* logits,
                        double remaining) {
    Row& row = space.rows[i];
    const double wide = band(row, space.queries[i], space.panel);
    if (exact_rule()) return select_by_threshold(space, i, head, first, count, logits, wide);
    const double off = expm1_above(wide / kLog2e);
    if (row.reference == -double(kInf)) {  // its own block is hidden
        const float top = kernels().largest_of(logits, count);
        if (top == -kInf) return int64_t(count);
        raise_reference(space, i, top);
    }
    // Masses relative to the reference must not overflow; far above it nothing is left out.
    const double guessed = std::min(guess(row, remaining, off), row.reference + 60.0);
    uint32_t skipped;
    const Attempt found = within_budget(space, i, guessed, off, [&](double threshold) {
        float omitted;
        const size_t listed =
            kernels().select_row(logits, count, float(threshold), float(row.reference), uint32_t(first),
                                 space.positions, space.kept.data(), &omitted, &skipped);
        return Attempt{listed, nullptr, 0, double(omitted), 0.0, 0.0};
    });
    row.omitted += found.omitted * (1 + off) * kSumExcess;
    if (found.listed) add(space, i, head, found.listed, off, remaining);
    return int64_t(skipped);
}

// Keys from here on are weighed from full-precision rows.
double Prefill::exact_from(const Row& row, double remaining) const {
    const double share = std::min(settings_.exact_share, kLargestDigits);
    const double large = row.reference + quick_log2(share * likely_mass(row, remaining));
    return settings_.rule == Rule::threshold ? std::min(row.threshold, large) : large;
}

// As `select`, for ranges of coded values: what is kept but not exactly becomes digits, for multiply_panel. These rows
// have no mask, so that their own block has given them a reference.
int64_t Prefill::select_digits(Workspace& space, size_t i, int head, size_t first, size_t count, size_t slot,
                               double remaining, double widest_step) {
    Row& row = space.rows[i];
    const float* scores = space.logits.data() + slot * kLogitStride;
    const PanelQuery& query = space.queries[i];
    const double wide = band(row, query, space.panel);
    const double off = expm1_above(wide / kLog2e) * (1 + kDigitExcess) + kDigitExcess;
    const double guessed = std::min(guess(row, remaining, off), row.reference + 60.0);
    const double exact = exact_from(row, remaining);
    WeighedRow found;
    WeightLimits limits{0, 0, 0, query.unit, query.centre, uint32_t(first)};
    within_budget(space, i, guessed, off, [&](double threshold) {
        limits.from = float(threshold);
        limits.exact_from = std::max(float(exact), limits.from);
        limits.reference = float(row.reference);
        kernels().weigh_panel(scores, count, &limits, space.digits.data() + slot * kPanelKeys, space.positions, &found);
        return Attempt{found.exact, scores, first, double(found.omitted), double(found.mass), double(found.cap)};
    });
    row.omitted += double(found.omitted) * (1 + off) * kSumExcess;
    const double mean_mass = double(found.omitted) / kLineMean;
    row.stand_in += mean_mass;
    kernels().axpy(Dtype::float32, space.mean_value.data(), float(mean_mass), value_dim_, stand_in(space, i));
    space.words[slot] = found.coded ? found.words : 0;
    if (found.exact) add_exact(space, i, head, found.exact);
    if (found.coded) {
        const double cap = std::exp2(found.cap - row.reference), unit = cap / double(kDigits);
        uint32_t digit_sum = 0;
        for (uint32_t sum : found.digit_sums) digit_sum += sum;
        const double mass = unit * digit_sum, sure = double(found.mass) * cap;
        row.mass += mass;
        row.coded += mass;
        row.sure += sure / (1 + off) * (1 - kDigitExcess);
        row.doubtful += sure * off * (1 + 1e-6) + double(found.coded) * unit;
        row.spread2 += sure * off * sure * off / found.coded + double(found.coded) * unit * unit / 3 * dim_;
        row.blurred += mass * 0.5 * widest_step * (1 + 1e-6);
        row.kept += int64_t(found.coded);
        row.sketched += int64_t(found.coded);
        space.units[slot] = float(unit);
        std::copy_n(found.digit_sums, kRanges, space.digit_sums + slot * kRanges);
    }
    return int64_t(count) - 64 * int64_t(__builtin_popcount(found.words));
}

int64_t Prefill::select_by_threshold(Workspace& space, size_t i, int head, size_t first, size_t count,
                                     const float* logits, double wide) {
    Row& row = space.rows[i];
    const double from = row.threshold - (wide + row.float_slack) * (1 + 1e-6);
    const float threshold = std::nextafter(float(from), -kInf);
    if (!relu()) {  // what is omitted lies below the threshold: its mass must not overflow
        const float top = std::min(kernels().largest_of(logits, count), threshold);
        if (double(top) > row.reference + 24.0) raise_reference(space, i, top);
    }
    float omitted;
    uint32_t skipped;
    const size_t found = kernels().select_row(logits, count, threshold, relu() ? kInf : float(row.reference),
                                              uint32_t(first), space.positions, space.kept.data(), &omitted, &skipped);
    if (!relu()) row.omitted += double(omitted) * (1 + expm1_above(wide / kLog2e)) * kSumExcess;
    if (found) add_exact(space, i, head, found);
    return int64_t(skipped);
}

}  // namespace hsr::prompts

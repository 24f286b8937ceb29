// Stage 4: the sums of all chunks, normalised, and the certificate.
#include "attention/certificate.h"
#include "attention/decoding.h"
#include "attention/stand_in.h"

#include <algorithm>
#include <cmath>

namespace hsr::decoding {

bool Attend::finish(Tile& tile) {
    bool enough = true;
    for (int q = 0; q < tile.count; ++q) enough &= finish(tile, q);
    return enough;
}

bool Attend::finish(Tile& tile, int q) {
    const size_t width = size_t(groups_) * kValueGroup;
    const int dim = cache_.value_dim();
    alignas(64) float exact[kMaxHeadDim + kValueGroup], coded[kMaxHeadDim + kValueGroup];
    Answer answer{};
    for (float* sum : {exact, coded}) std::fill(sum, sum + width, 0.0f);
    Partial total{};
    for (size_t c = 0; c < tile.chunks; ++c)
        total.relu_top[0] = std::max(total.relu_top[0], space_->partials[tile.partial_at + c].relu_top[q]);
    for (size_t c = 0; c < tile.chunks; ++c) {
        const size_t piece = tile.partial_at + c;
        const Partial& part = space_->partials[piece];
        if (part.nothing) continue;
        // Chunks of ReLU weights are relative to their own largest.
        const double factor =
            relu() && part.relu_top[q] < total.relu_top[0] ? power_of(part.relu_top[q] / total.relu_top[0]) : 1.0;
        total.exact_mass[0] += part.exact_mass[q] * factor;
        total.sketched[0] += part.sketched[q];
        total.weight_band[0] += part.weight_band[q];
        total.weight_var[0] += part.weight_var[q];
        total.omitted[0] += part.omitted[q];
        total.left[0] += part.left[q];
        total.kept[0] += part.kept[q];
        const size_t at = (piece * kTile + size_t(q)) * width;
        for (size_t i = 0; i < width; ++i) {
            exact[i] += space_->exact_sums[at + i] * float(factor);
            coded[i] += space_->coded_sums[at + i];
        }
        for (int g = 0; g < groups_; ++g) {
            answer.steps[g] += space_->steps[(piece * kTile + size_t(q)) * size_t(groups_) + size_t(g)];
            answer.squares[g] += space_->squares[(piece * kTile + size_t(q)) * size_t(groups_) + size_t(g)];
        }
    }
    Partial tail{};
    if (relu()) {  // go on from the sums of the chunks, which may have to be scaled again
        tail.relu_top[q] = total.relu_top[0];
        tail.exact_mass[q] = total.exact_mass[0];
        total.exact_mass[0] = 0;
    }
    if (collects()) {
        add_top_r(tile, q, tail, exact);
    } else {
        for (size_t i = 0; i < kBlock; ++i)
            if (tile.tail_logit[q][i] != -double(kInf)) {
                ++tail.kept[q];
                add_exact(tile, q, cache_.coded() + i, tile.tail_logit[q][i], tail, exact);
            }
    }
    const double exact_mass = total.exact_mass[0] + tail.exact_mass[q];
    const double mass = exact_mass + total.sketched[0];
    // Keys whose weight underflowed (below exp(-87) of the reference) count exp(-87) each.
    const double omitted = (total.omitted[0] + total.left[0] + tail.omitted[q]) * 1.0001 +
                           (certify() ? double(tile.seen[q]) * 1.7e-38 : 0.0);
    // exp(-band) >= 1 - band
    const double surely = exact_mass * std::max(0.0, 1 - tile.float_slack[q] - kFloatWeight) +
                          std::max(0.0, total.sketched[0] * 0.9999 - total.weight_band[0] * 1.0001);
    if (bounds_mass() && tile.selection[q].threshold > -kInf && omitted > settings_.epsilon * (surely + omitted)) {
        Selection& selection = tile.selection[q];
        const double next = selection.threshold - tile.lowering[q];
        tile.lowering[q] *= 2;
        selection.threshold =
            next < tile.reference[q] - 80.0 - 1e-5 * std::fabs(tile.reference[q]) ? -kInf : float(next);
        selection.mass_from = mass_from(tile, q, selection.threshold);
        return false;
    }
    const size_t place = tile.place[q];
    float* out = result_.out + place * size_t(dim);
    const int64_t kept = collects() ? tail.kept[q] : total.kept[0] + tail.kept[q];
    result_.density[place] = tile.seen[q] ? float(double(kept) / double(tile.seen[q])) : 0.0f;
    if (!(mass > 0)) {
        std::fill(out, out + dim, 0.0f);
        result_.lse[place] = -kInf;
        // Nothing seen, or an empty ReLU row: zero by definition. A softmax row that kept nothing of
        // what it saw is as wrong as any answer can be.
        const bool defined = relu() || tile.seen[q] == 0;
        result_.error_bound[place] = defined ? 0.0f : range_distance(cache_.value_sketch(store_head(tile)), out);
        result_.estimated_error[place] = result_.error_bound[place];
        result_.omitted_mass[place] = defined ? 0.0f : 1.0f;
        return true;
    }
    // Something stands in for what was left out, with its likely mass: a guess that takes nothing from the bound and
    // more than halves the error.
    double guess = 0;
    if (stands_in() && omitted > 0 &&
        cache_.value_sketch(store_head(tile)).mean(size_t(tile.visible[q]), mask_row(tile, q), answer.stand_in)) {
        guess = std::min(total.omitted[0] * tile.likely[q] + total.left[0], omitted);
        const StandIn stand(guess, total.sketched[0], mass, double(kept) / double(tile.seen[q]));
        for (int i = 0; i < dim; ++i)
            answer.stand_in[i] = stand.of_mean * guess * answer.stand_in[i] + stand.of_coded * coded[i];
    }
    for (int i = 0; i < dim; ++i) out[i] = float((double(exact[i]) + coded[i] + answer.stand_in[i]) / (mass + guess));
    result_.lse[place] =
        float(std::log(mass) + (relu() ? settings_.power * std::log(tail.relu_top[q]) : tile.reference[q]));
    if (!settings_.certify) {
        result_.error_bound[place] = result_.estimated_error[place] = result_.omitted_mass[place] = std::nanf("");
        return true;
    }
    result_.omitted_mass[place] = omitted > 0 ? std::min(1.0f, rounded_up(omitted / (surely + omitted))) : 0.0f;
    answer.mass = mass + guess;
    answer.exact_mass = exact_mass;
    answer.omitted = omitted;
    answer.stood_in = guess;
    answer.relu_top = tail.relu_top[q];
    answer.kept = kept;
    certificate(tile, q, total, answer);
    return true;
}

void Attend::certificate(const Tile& tile, int q, const Partial& total, const Answer& answer) {
    const ValueSketch& values = cache_.value_sketch(store_head(tile));
    const float* out = result_.out + tile.place[q] * size_t(cache_.value_dim());
    // Of exact rows only the rounding of a logit and of its weight is in doubt.
    const double exact_error =
        relu()
            ? double(tile.seen[q]) * relu_weight_error(settings_.scale * tile.norm[q],
                                                       cache_.largest_key_norm(store_head(tile)), cache_.key_dim(),
                                                       settings_.power, answer.relu_top)
            : answer.exact_mass * std::expm1(2 * tile.float_slack[q] + (weighs_in_float32(tile) ? kFloatWeight : 1e-6));
    const SpentWeight spent{answer.mass,
                            answer.omitted + total.weight_band[0] * tile.selection[q].growth * 1.0001 + exact_error,
                            answer.stood_in};
    const AnswerBound found = bound_answer(
        values, out, spent,
        // |value - decoded| <= step / 2 (1 + 2^-10)
        [&](size_t i) { return answer.steps[i / kValueGroup] * 0.5005; },
        [&](size_t i) { return std::fabs(answer.stand_in[i] - answer.stood_in * out[i]); });
    // Float32 sums of `kept` terms, each no larger than its weight times the largest value: a chain has
    // at most as many additions as a chunk has keys, and one for each chunk.
    const double chain = double(std::min<int64_t>(answer.kept, int64_t(kChunkKeys))) + double(tile.chunks) + 32.0;
    const size_t place = tile.place[q];
    result_.error_bound[place] = rounded_up(found.bound + kUnit * chain * found.largest);
    const double variance = *std::max_element(answer.squares, answer.squares + groups_) / 12.0;
    result_.estimated_error[place] = float(std::sqrt((variance + total.weight_var[0] * found.spread * found.spread) *
                                                     2.0 * std::log(2.0 * cache_.value_dim())) /
                                               answer.mass +
                                           answer.omitted / answer.mass * found.spread + kUnit * 16 * found.largest);
}

}  // namespace hsr::decoding

// Sums of a row: keys read at full precision, weights, values, and what they are relative to.
#include "attention/prompts.h"

#include <algorithm>
#include <cmath>

namespace hsr::prompts {

// Masses become relative to 2^reference.
void Prefill::raise_reference(Workspace& space, size_t i, double reference) {
    Row& row = space.rows[i];
    rescale(space, i, row.reference == -double(kInf) ? 0.0 : std::exp2(row.reference - reference));
    row.reference = reference;
}

void Prefill::rescale(Workspace& space, size_t i, double factor) {
    Row& row = space.rows[i];
    for (double* sum : {&row.mass, &row.sure, &row.omitted, &row.stand_in, &row.coded, &row.doubtful, &row.blurred})
        *sum *= factor;
    row.spread2 *= factor * factor;
    for (float& mass : row.curve) mass *= float(factor);
    for (float* sum : {accumulator(space, i), coded_sum(space, i), stand_in(space, i)})
        for (int j = 0; j < padded16(value_dim_); ++j) sum[j] *= float(factor);
}

// out[k] = full-precision logit of keys[k]; `out` has room for a multiple of 4.
void Prefill::exact_logits(Workspace& space, size_t i, int head, const uint32_t* keys, size_t count, float* out) {
    const RowStore& rows = cache_.keys();
    kernels().dot_rows(rows.dtype(), rows.row(0, head), rows.token_bytes(), keys, count, vector(space, i), dim_,
                       float(settings_.scale * units_), out);
    space.rows[i].exact += int64_t(count);
}

// The keys in space.positions at full precision.
void Prefill::add_exact(Workspace& space, size_t i, int head, size_t count) {
    Row& row = space.rows[i];
    if (exact_rule()) {
        count = keep_exact(space, i, head, count);
    } else {
        exact_logits(space, i, head, space.positions, count, space.kept.data());
    }
    if (!count) return;
    if (relu()) {
        weigh_excesses(space, i, count);
    } else {
        lift_reference(space, i, count);
        const double mass = kernels().weigh(space.kept.data(), count, float(row.reference), space.weights);
        row.mass += mass;
        row.sure += mass;
    }
    row.kept += int64_t(count);
    *space.count = count;
}

// Weights are relative to the power of the largest excess so far, so that none leaves float32.
void Prefill::weigh_excesses(Workspace& space, size_t i, size_t count) {
    Row& row = space.rows[i];
    const double top =
        std::max(row.top, *std::max_element(space.excesses.begin(), space.excesses.begin() + int64_t(count)));
    if (top > row.top) {
        rescale(space, i, row.top > 0 ? power_of(row.top / top) : 0.0);
        row.top = top;
    }
    const double over = 1.0 / top;
    for (size_t k = 0; k < count; ++k) {
        const float weight = float(power_of(space.excesses[k] * over));
        space.weights[k] = weight;
        row.mass += double(weight);
    }
}

// Of the candidates in space.positions, those whose logit reaches the threshold in float64: their excesses, and for
// softmax the logits. The mass of the others is omitted.
size_t Prefill::keep_exact(Workspace& space, size_t i, int head, size_t count) {
    Row& row = space.rows[i];
    const RowStore& rows = cache_.keys();
    kernels().dot_rows64(rows.dtype(), rows.row(0, head), rows.token_bytes(), space.positions, count, vector(space, i),
                         dim_, space.excesses.data());
    row.exact += int64_t(count);
    row.candidates += int64_t(count);
    size_t kept = 0;
    for (size_t k = 0; k < count; ++k) {
        const double logit = space.excesses[k] * settings_.scale * units_, excess = logit - row.threshold;
        const bool keep = relu() ? excess > 0 : excess >= 0;
        if (!keep && !relu()) {
            if (row.reference == -double(kInf)) row.reference = logit;
            row.omitted += std::exp2(logit - row.reference);
        }
        space.excesses[kept] = excess;
        space.kept[kept] = float(logit);
        space.positions[kept] = space.positions[k];
        kept += keep;
    }
    return kept;
}

// Weights stay below 2^24 times the reference.
void Prefill::lift_reference(Workspace& space, size_t i, size_t count) {
    const float top = kernels().largest_of(space.kept.data(), count);
    if (double(top) > space.rows[i].reference + 24.0) raise_reference(space, i, top);
}

void Prefill::accumulate(Workspace& space, size_t i, int head, size_t slot) {
    const RowStore& rows = cache_.values();
    kernels().accumulate_rows(
        rows.dtype(), rows.row(0, head), rows.token_bytes(), space.position_lists.data() + slot * kListRoom,
        space.weight_lists.data() + slot * kListRoom, space.counts[slot], value_dim_, accumulator(space, i));
}

// The values of a panel's keys, for rows that keep much of it.
void Prefill::accumulate_dense(Workspace& space, size_t i, int head, size_t first, size_t count) {
    std::fill_n(space.dense_weights.data(), count * kDenseStride, 0.0f);
    for (size_t slot = 0; slot < kRowsAtOnce; ++slot) {
        const uint32_t* positions = space.position_lists.data() + slot * kListRoom;
        const float* weights = space.weight_lists.data() + slot * kListRoom;
        for (size_t k = 0; k < space.counts[slot]; ++k)
            space.dense_weights[(positions[k] - first) * kDenseStride + slot] = weights[k];
    }
    const RowStore& rows = cache_.values();
    kernels().accumulate_dense(rows.dtype(), rows.row(first, head), rows.token_bytes(), count,
                               space.dense_weights.data(), value_dim_, accumulator(space, i),
                               size_t(padded16(value_dim_)));
}

// The keys in space.positions, with estimates in space.kept: large shares of the mass get their weight from
// full-precision rows, the others from the estimate, off by at most the share `off`. All values are read in full.
void Prefill::add(Workspace& space, size_t i, int head, size_t found, double off, double remaining) {
    if (!settings_.sketch_tail) return add_exact(space, i, head, found);
    Row& row = space.rows[i];
    const size_t exact =
        kernels().places_from(space.kept.data(), found, float(exact_from(row, remaining)), space.positions,
                              space.exact_places.data(), space.exact_positions.data());
    if (exact) {
        exact_logits(space, i, head, space.exact_positions.data(), exact, space.dots.data());
        for (size_t k = 0; k < exact; ++k) space.kept[space.exact_places[k]] = space.dots[k];
    }
    lift_reference(space, i, found);
    const double all = kernels().weigh(space.kept.data(), found, float(row.reference), space.weights);
    double exact_mass = 0;
    for (size_t k = 0; k < exact; ++k) exact_mass += double(space.weights[space.exact_places[k]]);
    row.mass += all;
    row.sure += exact_mass + std::max(all - exact_mass, 0.0) / (1 + off);  // exp(-band) >= 1 / (1 + off)
    if (found > exact) {
        const double doubtful = (std::max(all - exact_mass, 0.0) + all * 1e-6) * off;
        row.doubtful += doubtful;
        row.spread2 += doubtful * doubtful / double(found - exact);
    }
    row.kept += int64_t(found);
    row.sketched += int64_t(found - exact);
    *space.count = found;
}

}  // namespace hsr::prompts

// Keys that are read at full precision: their logits, weights and values.
#include "attention/decoding.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace hsr::decoding {

double Attend::logit(const Tile& tile, int q, size_t key) const {
    const void* row = cache_.keys().row(key, store_head(tile));
    if (in_float64()) return settings_.scale * kernels().dot64(cache_.dtype(), row, tile.vector[q], cache_.key_dim());
    return settings_.scale * double(kernels().dot(cache_.dtype(), row, tile.vector[q], cache_.key_dim()));
}

void Attend::read_logits(const Tile& tile, int q, const uint32_t* keys, size_t count, double* logits) const {
    if (!in_float64()) {
        for (size_t i = 0; i < count; ++i) logits[i] = logit(tile, q, keys[i]);
        return;
    }
    const RowStore& rows = cache_.keys();
    kernels().dot_rows64(rows.dtype(), rows.row(0, store_head(tile)), rows.token_bytes(), keys, count, tile.vector[q],
                         cache_.key_dim(), logits);
    for (size_t i = 0; i < count; ++i) logits[i] *= settings_.scale;
}

// Beside a sketched tail, float32 weights are precise enough (kFloatWeight pays for them in the certificate); not
// for a full scan, whose logits may be so large that rounding them moves weights by many nats.
bool Attend::weighs_in_float32(const Tile& tile) const {
    return reads_value_codes() && !in_float64() && tile.scan != Scan::full;
}

void Attend::rescale(Partial& part, int q, double factor, float* accumulator) const {
    part.exact_mass[q] *= factor;
    for (int i = 0; i < groups_ * kValueGroup; ++i) accumulator[i] *= float(factor);
}

// Keys read at full precision: those of `keys` that the rule keeps, with their values.
void Attend::add_exact(const Tile& tile, int q, uint32_t* keys, size_t count, Partial& part, float* accumulator) const {
    if (count == 0) return;
    static thread_local std::vector<float> weights;
    weights.resize(count + 3);  // the kernel writes four at a time
    size_t kept = 0;
    if (weighs_in_float32(tile)) {
        const RowStore& rows = cache_.keys();
        kernels().dot_rows(rows.dtype(), rows.row(0, store_head(tile)), rows.token_bytes(), keys, count, tile.vector[q],
                           cache_.key_dim(), float(settings_.scale), weights.data());
        kernels().exp_into(weights.data(), count, float(tile.reference[q]), weights.data());
        for (; kept < count; ++kept) part.exact_mass[q] += double(weights[kept]);
    } else {
        static thread_local std::vector<double> logits;
        logits.resize(count);
        read_logits(tile, q, keys, count, logits.data());
        if (relu())
            raise_top(part, q, *std::max_element(logits.begin(), logits.end()) - tile.threshold[q], accumulator);
        for (size_t i = 0; i < count; ++i) {
            const double weight = weight_of(tile, q, logits[i], part);
            if (!(weight > 0)) continue;
            keys[kept] = keys[i];
            weights[kept] = float(weight);
            part.exact_mass[q] += double(weights[kept++]);
        }
        part.kept[q] -= int64_t(count - kept);
    }
    const RowStore& rows = cache_.values();
    kernels().accumulate_rows(rows.dtype(), rows.row(0, store_head(tile)), rows.token_bytes(), keys, weights.data(),
                              kept, cache_.value_dim(), accumulator);
}

void Attend::add_exact(const Tile& tile, int q, size_t key, double logit, Partial& part, float* accumulator) const {
    if (relu()) raise_top(part, q, logit - tile.threshold[q], accumulator);
    const double weight = weight_of(tile, q, logit, part);
    if (!(weight > 0)) {
        --part.kept[q];
        return;
    }
    part.exact_mass[q] += weight;
    kernels().axpy(cache_.dtype(), cache_.values().row(key, store_head(tile)), float(weight), cache_.value_dim(),
                   accumulator);
}

// ReLU: weights are relative to the largest so far, so that no power of them leaves float32.
void Attend::raise_top(Partial& part, int q, double excess, float* accumulator) const {
    if (!(excess > part.relu_top[q])) return;
    rescale(part, q, power_of(part.relu_top[q] / excess), accumulator);
    part.relu_top[q] = excess;
}

// 0: the rule does not keep the key; what softmax leaves out is counted as omitted.
double Attend::weight_of(const Tile& tile, int q, double logit, Partial& part) const {
    if (relu()) return logit > tile.threshold[q] ? power_of((logit - tile.threshold[q]) / part.relu_top[q]) : 0.0;
    const double weight = std::exp(logit - tile.reference[q]);
    if (!exact_rule() || settings_.rule != Rule::threshold || logit >= tile.threshold[q]) return weight;
    part.omitted[q] += weight;
    return 0.0;
}

// Rule top_r without a tail: of the candidates and the uncoded keys, the r largest logits, exactly.
void Attend::add_top_r(Tile& tile, int q, Partial& part, float* sum) {
    std::vector<Candidate> all;
    for (size_t c = 0; c < tile.chunks; ++c) {
        const auto& own = space_->candidates[(tile.partial_at + c) * kTile + size_t(q)];
        all.insert(all.end(), own.begin(), own.end());
    }
    for (size_t i = 0; i < kBlock; ++i)
        if (tile.tail_logit[q][i] != -double(kInf))
            all.push_back({uint32_t(cache_.coded() + i), tile.tail_logit[q][i]});
    const size_t r = std::min(size_t(settings_.top_r), all.size());
    std::nth_element(all.begin(), all.begin() + int64_t(r), all.end(), [](const Candidate& a, const Candidate& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.key < b.key);
    });
    for (size_t i = 0; i < all.size(); ++i) {
        if (i < r) {
            ++part.kept[q];
            add_exact(tile, q, all[i].key, all[i].logit, part, sum);
        } else {
            part.omitted[q] += std::exp(all[i].logit - tile.reference[q]);
        }
    }
}

}  // namespace hsr::decoding

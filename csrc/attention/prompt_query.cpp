// A query of a prompt: made ready and answered by the newest keys, and in the end divided and certified.
#include "attention/prompts.h"

#include <algorithm>
#include <cmath>

#include "attention/certificate.h"
#include "attention/stand_in.h"

namespace hsr::prompts {

void Prefill::start_row(Workspace& space, size_t i, int head, size_t at) {
    Row& row = space.rows[i];
    row = Row();
    const int b = head / cache_.kv_heads();
    row.query = int64_t(at / size_t(group_));
    row.head = head % cache_.kv_heads() * group_ + int(at % size_t(group_));
    row.place = (size_t(b) * size_t(heads_) + size_t(row.head)) * size_t(m_) + size_t(row.query);
    row.visible = std::clamp<int64_t>(queries_.visible[row.query], 0, int64_t(cache_.size()));
    row.mask = queries_.mask ? queries_.mask + b * queries_.mask_batch_stride + row.query * queries_.mask_query_stride
                             : nullptr;
    row.seen = row.visible;
    if (row.mask) row.seen -= std::count(row.mask, row.mask + row.visible, uint8_t(0));
    row.reference = -double(kInf);
    row.curve_top = -kInf;
    for (float* sum : {accumulator(space, i), coded_sum(space, i), stand_in(space, i)})
        std::fill_n(sum, padded16(value_dim_), 0.0f);
    float* q = vector(space, i);
    std::fill_n(q, padded16(dim_), 0.0f);
    queries_.queries.read(b, row.head, row.query, q);
    row.norm = std::sqrt(kernels().dot64(Dtype::float32, q, q, dim_));
    row.length = settings_.scale * row.norm * units_;
    row.threshold = queries_.thresholds ? queries_.thresholds[row.place] * units_ : 0.0;
    // A float32 logit: dim / 32 + 8 roundings along its chain, of terms no larger than |q| |k|.
    row.float_slack = row.length * cache_.largest_key_norm(head) * kUnit * (dim_ / 32.0 + 9.0);
    if (row.seen == 0) return;
    code(space, i, head);
    row.blocks = size_t(row.visible - 1) / kBlock;
    own_block(space, i, head);
}

void Prefill::code(Workspace& space, size_t i, int head) {
    Row& row = space.rows[i];
    PanelQuery& query = space.queries[i];
    const KeySketch& sketch = cache_.key_sketch(head);
    alignas(64) float unit[kMaxHeadDim], rotated[kMaxHeadDim];
    const float* q = vector(space, i);
    const float to_unit = row.norm > 0 ? float(1.0 / row.norm) : 0.0f;
    float centre[4] = {};
    for (int j = 0; j < dim_; ++j) unit[j] = q[j] * to_unit;
    int j = 0;
    for (; j + 4 <= dim_; j += 4)
        for (int k = 0; k < 4; ++k) centre[k] += unit[j + k] * sketch.centre()[size_t(j + k)];
    for (; j < dim_; ++j) centre[0] += unit[j] * sketch.centre()[size_t(j)];
    const Rotation& r = sketch.turned_by();
    kernels().rotate(r.matrix.data(), dim_, unit, 1, rotated);
    kernels().code_query(rotated, dim_, &query);
    query.unit = float(row.length * query.step);
    query.centre = float(row.length * double((centre[0] + centre[1]) + (centre[2] + centre[3])));
    // <q,k> - <q~,k~> = <q~, k - k~> + <q - q~, k> with |q~| <= (1 + rho) |q|, |q - q~| <= rho |q|.
    const double root = std::sqrt(double(dim_)), rho = double(query.rest) + r.relative_slack + 3e-7;
    const double longest = sketch.largest_norm();
    row.fixed_band =
        row.length *
        ((rho * longest) +
         // float32 rounding: 32 terms no larger than the lengths of decoded query and key, or the centre's logit
         kUnit * (32.0 * root * longest + (8.0 + dim_) * sketch.centre_norm())) *
        (1 + 1e-6);
}

// Band of all estimates of a row in the panel, in the units of the logits.
double Prefill::band(const Row& row, const PanelQuery& query, const CodedPanel& panel) const {
    const double rho = double(query.rest) + 1e-5;
    // The start of the sum was rounded by at most half a unit.
    return row.length * (1 + rho) * double(panel.residual) * (1 + 1e-6) +
           0.5 * double(query.unit) * double(panel.step) * (1 + 1e-6) + row.fixed_band;
}

// The newest keys, and the uncoded ones: 1 to 16 of them.
void Prefill::own_block(Workspace& space, size_t i, int head) {
    Row& row = space.rows[i];
    space.take(0);
    size_t count = 0;
    for (size_t key = row.blocks * kBlock; key < size_t(row.visible); ++key)
        if (!row.mask || row.mask[key]) space.positions[count++] = uint32_t(key);
    if (!count) return;
    add_exact(space, i, head, count);
    accumulate(space, i, head, 0);
}

void Prefill::finish_row(Workspace& space, size_t i, int head) {
    Row& row = space.rows[i];
    float* out = result_.out + row.place * size_t(value_dim_);
    const float *full = accumulator(space, i), *coded = coded_sum(space, i);
    const double mass = row.mass;
    full_ += row.exact;
    sketched_ += row.sketched;
    result_.density[row.place] = row.seen ? float(double(row.kept) / double(row.seen)) : 0.0f;
    if (!(mass > 0)) {
        std::fill_n(out, value_dim_, 0.0f);
        result_.lse[row.place] = -kInf;
        // Nothing seen, or an empty ReLU row: zero by definition. A softmax row that kept nothing of what it
        // saw is as wrong as any answer can be.
        const bool defined = relu() || row.seen == 0;
        result_.error_bound[row.place] = result_.estimated_error[row.place] =
            defined ? 0.0f : range_distance(cache_.value_sketch(head), out);
        result_.omitted_mass[row.place] = defined ? 0.0f : 1.0f;
        return;
    }
    const double over = 1.0 / (mass + row.stand_in);
    const StandIn stand(row.stand_in, row.coded, mass, double(row.kept) / double(row.seen));
    float* stands = stand_in(space, i);
    for (int j = 0; j < value_dim_; ++j) {
        stands[j] = float(stand.of_mean * stands[j] + stand.of_coded * coded[j]);
        out[j] = float((double(full[j]) + coded[j] + stands[j]) * over);
    }
    result_.lse[row.place] =
        float(relu() ? std::log(mass) + settings_.power * std::log(row.top) : std::log(mass) + row.reference / kLog2e);
    if (!settings_.certify) {
        result_.error_bound[row.place] = result_.estimated_error[row.place] = result_.omitted_mass[row.place] =
            std::nanf("");
        return;
    }
    certify(row, head, mass, stands, out);
}

// DESIGN.md, "Prompts": with stand-ins c of mass C, Z' = mass + C,
//   Z' (out - exact) = sum of (estimated - true weight) (v - exact) - sum over omitted of w (v - exact) + c - C
//   exact + sum of weight (coded - true v),
// and |v - exact| <= reach + |out - exact| in each coordinate.
void Prefill::certify(const Row& row, int head, double mass, const float* stands, const float* out) {
    // Keys whose weight underflowed (below 2^-126 of the reference) count that much each.
    const double omitted = relu() ? 0.0 : row.omitted * kSumExcess + double(row.seen) * 1.7e-38;
    // Of a weight taken from a full-precision logit: its float32 rounding. ReLU: of a float64 excess, and weights
    // themselves are rounded to float32.
    const double exact_error =
        relu() ? double(row.candidates) *
                         relu_weight_error(row.length, cache_.largest_key_norm(head), dim_, settings_.power, row.top) +
                     mass * 2 * kUnit
               : mass * std::expm1(2 * row.float_slack / kLog2e + 2e-6);
    const double all = mass + row.stand_in;
    const AnswerBound found = bound_answer(
        cache_.value_sketch(head), out, {all, omitted + row.doubtful + exact_error, row.stand_in},
        [&](size_t) { return row.blurred; }, [&](size_t j) { return std::fabs(stands[j] - row.stand_in * out[j]); });
    // Float32 sums: chains of at most kSumPiece terms, and of a panel one term for each such piece of its keys, for
    // each of its ranges, and for what stands in.
    const double pieces = double(kPanelKeys / kSumPiece + kRanges + 1) * (double(row.blocks / kPanelBlocks) + 2);
    const double chain = double(std::min<int64_t>(row.kept, int64_t(kSumPiece))) + pieces + 64.0;
    result_.error_bound[row.place] = rounded_up(found.bound + kUnit * chain * found.largest);
    result_.omitted_mass[row.place] =
        omitted > 0 ? std::min(1.0f, rounded_up(omitted / (row.surely() + omitted))) : 0.0f;
    result_.estimated_error[row.place] =
        float(std::sqrt(row.spread2 / dim_ * 2.0 * std::log(2.0 * value_dim_)) * found.spread / all +
              omitted / all * found.spread + kUnit * 16 * found.largest);
}

}  // namespace hsr::prompts

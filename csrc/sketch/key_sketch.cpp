#include "sketch/key_sketch.h"

#include <algorithm>
#include <cmath>

namespace hsr {

double norm_of(const float* x, int dim) { return std::sqrt(kernels().dot64(Dtype::float32, x, x, dim)); }

void KeySketch::set_centre(const RowStore& rows, int head) {
    std::vector<double> sum(size_t(dim_), 0.0);
    std::vector<float> row(static_cast<size_t>(dim_));
    for (size_t t = 0; t < rows.size(); ++t) {
        kernels().to_float(rows.dtype(), rows.row(t, head), row.data(), size_t(dim_));
        for (int i = 0; i < dim_; ++i) sum[size_t(i)] += row[size_t(i)];
    }
    for (int i = 0; i < dim_; ++i) centre_[size_t(i)] = float(sum[size_t(i)] / double(rows.size()));
    centre_norm_ = norm_of(centre_.data(), dim_);
    centred_at_ = rows.size();
    largest_norm_ = 0;
    extent_ = Extent();
    blocks_ = 0;
}

void KeySketch::code_block(const RowStore& rows, int head, size_t block, CodedRange& range) {
    float row[kMaxHeadDim];
    alignas(64) float rotated[kBlock * kMaxHeadDim];
    double norms[kBlock];
    const int wide = padded16(dim_);
    for (int key = 0; key < kBlock; ++key) {
        kernels().to_float(rows.dtype(), rows.row(block * kBlock + size_t(key), head), row, size_t(dim_));
        for (int i = 0; i < dim_; ++i) row[i] -= centre_[size_t(i)];
        norms[key] = norm_of(row, dim_);
        if (norms[key] <= 1e30) range.largest_norm = std::max(range.largest_norm, norms[key]);
        kernels().rotate(rotation_->matrix.data(), dim_, row, 1, rotated + key * wide);
    }
    kernels().code_keys(dim_, rotated, norms, rotation_->relative_slack, high_.data() + block * high_stride(dim_),
                        low_.data() + block * low_stride(dim_));
    uint16_t steps[kBlock], residuals4[kBlock], residuals8[kBlock];
    const uint8_t* parameters = high_.data() + block * high_stride(dim_) + code_bytes(dim_);
    std::memcpy(steps, parameters, sizeof steps);
    std::memcpy(residuals4, parameters + sizeof steps, sizeof residuals4);
    std::memcpy(residuals8, low_.data() + block * low_stride(dim_) + code_bytes(dim_), sizeof residuals8);
    for (int key = 0; key < kBlock; ++key) {
        Extent& extent = range.extent;
        extent.step = std::max(extent.step, bfloat16_to_float(steps[key]));
        extent.residual4 = std::max(extent.residual4, bfloat16_to_float(residuals4[key]));
        extent.residual8 = std::max(extent.residual8, bfloat16_to_float(residuals8[key]));
        extent.residual4_sum += bfloat16_to_float(residuals4[key]);
    }
}

void KeySketch::reserve(size_t keys) {
    high_.reserve(keys / kBlock * high_stride(dim_));
    low_.reserve(keys / kBlock * low_stride(dim_));
}

KeySketch::CodedRange KeySketch::code_blocks(const RowStore& rows, int head, size_t first, size_t last) {
    CodedRange range;
    for (size_t block = first; block < last; ++block) code_block(rows, head, block, range);
    return range;
}

void KeySketch::coded_until(size_t blocks, const CodedRange* ranges, size_t count) {
    blocks_ = blocks;
    for (size_t i = 0; i < count; ++i) {
        const Extent& extent = ranges[i].extent;
        extent_.step = std::max(extent_.step, extent.step);
        extent_.residual4 = std::max(extent_.residual4, extent.residual4);
        extent_.residual8 = std::max(extent_.residual8, extent.residual8);
        extent_.residual4_sum += extent.residual4_sum;
        largest_norm_ = std::max(largest_norm_, ranges[i].largest_norm);
    }
}

void KeySketch::code(const RowStore& rows, int head) {
    const size_t complete = rows.size() / kBlock;
    if (complete == 0) return;
    if (wants_centre(rows.size())) set_centre(rows, head);
    reserve(rows.size());
    const CodedRange range = code_blocks(rows, head, blocks_, complete);
    coded_until(complete, &range, 1);
}

void KeySketch::crop(size_t keys) { blocks_ = std::min(blocks_, keys / kBlock); }

void PreparedQuery::prepare(const KeySketch& sketch, const float* query, double norm, double scale,
                            bool scale_by_norm) {
    const int dim = sketch.dim();
    const double root = std::sqrt(double(dim));
    const double length = scale * (scale_by_norm ? norm : 1.0);
    float unit_query[kMaxHeadDim];
    alignas(64) float rotated[kMaxHeadDim];
    const double to_unit = norm > 0 ? 1.0 / norm : 0.0;
    for (int i = 0; i < dim; ++i) unit_query[i] = float(query[i] * to_unit);
    const double centre = to_unit * kernels().dot64(Dtype::float32, query, sketch.centre().data(), dim);
    const Rotation& r = sketch.turned_by();
    kernels().rotate(r.matrix.data(), dim, unit_query, 1, rotated);
    QueryDigits digits;
    kernels().split_query(rotated, dim, high, low, &digits);
    // rho bounds |q - decoded q| / |q|. Rounding q / |q| to float32 adds 2^-24, rotating it the slack.
    const double off = r.relative_slack + 1e-7;
    const double rho4 = digits.rest4 * digits.step + off, rho8 = digits.rest8 * digits.step + off;
    // <q,k> - <q~,k~> = <q~, k - k~> + <q - q~, k>, and |k| <= 127.5 step_k sqrt(d) by the choice of step_k
    // (or |k| <= residual for a key too small to code, hence 2 rho).
    const double up = length * (1 + 1e-6);
    coded.high = high;
    coded.low = low;
    coded.unit = float(length * digits.step);
    coded.centre = float(length * centre);
    coded.high_sum = float(digits.high_sum);
    coded.low_sum = float(digits.low_sum);
    coded.slope4 = float(up * (1 + 2 * rho4));
    // residual4 covers kQueryShare |q~| |k| already (|q~| >= (1 - rho) |q|); the rest is paid by the step.
    const double unpaid4 = std::max(0.0, rho4 - kQueryShare * (1 - rho4));
    coded.slope4_step = float(up * unpaid4 * 127.5 * root * 1.00001);
    coded.slope8 = float(up * (1 + 2 * rho8));
    coded.slope8_step = float(up * rho8 * 127.5 * root * 1.00001);
    // Rounding of an estimate in float32: under 32 roundings of terms no larger than the product of the
    // lengths of the decoded query and key (each at most sqrt(d) times its largest coordinate, which is at
    // most its length) or than the centre's logit.
    coded.slack = float(length * std::ldexp(1.0, -24) *
                        (32.0 * root * sketch.largest_norm() + 8.0 * sketch.centre_norm()) * (1 + 1e-6));
}

}  // namespace hsr

#include "sketch/value_sketch.h"

#include <algorithm>
#include <cstring>

namespace hsr {

void ValueSketch::code(const RowStore& values, int head, size_t until) {
    rows_.reserve(until * value_row_bytes(dim_));
    parameters_.reserve(until / kBlock * value_parameter_bytes(dim_));
    float row[kMaxHeadDim];
    // A crop drops the sums of the group it ends in: a difference would keep rounding of what is gone.
    for (size_t t = sums_.size() / size_t(dim_) * kMeanGroup; t < coded_; ++t) {
        kernels().to_float(values.dtype(), values.row(t, head), row, size_t(dim_));
        add_to_sums(row, t);
    }
    for (; coded_ < until; ++coded_) {
        kernels().to_float(values.dtype(), values.row(coded_, head), row, size_t(dim_));
        add_to_sums(row, coded_);
        kernels().code_value(dim_, row, rows_.data() + coded_ * value_row_bytes(dim_),
                             parameters_.data() + coded_ / kBlock * value_parameter_bytes(dim_) + coded_ % kBlock * 2);
    }
}

void ValueSketch::widen(const float* row) {
    for (int i = 0; i < dim_; ++i) {
        least_[size_t(i)] = std::min(least_[size_t(i)], row[i]);
        most_[size_t(i)] = std::max(most_[size_t(i)], row[i]);
    }
}

void ValueSketch::add_to_sums(const float* row, size_t token) {
    const size_t at = token / kMeanGroup * size_t(dim_);
    if (sums_.size() <= at) sums_.resize(at + size_t(dim_), 0.0);
    for (int i = 0; i < dim_; ++i) sums_[at + size_t(i)] += row[i];
}

void ValueSketch::crop(size_t keys) {
    if (keys >= coded_) return;
    coded_ = keys / kBlock * kBlock;
    sums_.resize(coded_ / kMeanGroup * size_t(dim_));
}

bool ValueSketch::mean(size_t visible, const uint8_t* mask, double* mean) const {
    size_t groups = 0;
    std::fill(mean, mean + dim_, 0.0);
    for (size_t g = 0; (g + 1) * kMeanGroup <= std::min(coded_, visible); ++g) {
        if (mask && std::memchr(mask + g * kMeanGroup, 0, kMeanGroup)) continue;
        for (int i = 0; i < dim_; ++i) mean[i] += sums_[g * size_t(dim_) + size_t(i)];
        ++groups;
    }
    for (int i = 0; i < dim_; ++i) mean[i] /= double(std::max<size_t>(groups, 1) * kMeanGroup);
    return groups > 0;
}

}  // namespace hsr

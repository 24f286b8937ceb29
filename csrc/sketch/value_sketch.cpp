#include "sketch/value_sketch.h"

#include <algorithm>
#include <cstring>

namespace hsr {

void ValueSketch::reserve(size_t keys) {
    rows_.reserve(keys * value_row_bytes(dim_));
    parameters_.reserve(keys / kBlock * value_parameter_bytes(dim_));
}

void ValueSketch::code_range(const RowStore& values, int head, size_t first, size_t last) {
    float row[kMaxHeadDim];
    for (size_t key = first; key < last; ++key) {
        kernels().to_float(values.dtype(), values.row(key, head), row, size_t(dim_));
        kernels().code_value(dim_, row, rows_.data() + key * value_row_bytes(dim_),
                             parameters_.data() + key / kBlock * value_parameter_bytes(dim_) + key % kBlock * 2);
    }
}

void ValueSketch::widen(const float* least, const float* most) {
    for (int i = 0; i < dim_; ++i) {
        least_[size_t(i)] = std::min(least_[size_t(i)], least[i]);
        most_[size_t(i)] = std::max(most_[size_t(i)], most[i]);
    }
}

void ValueSketch::sum_groups(const RowStore& values, int head) {
    float row[kMaxHeadDim];
    for (size_t g = group_sums_.size() / size_t(dim_); (g + 1) * kMeanGroup <= coded_; ++g) {
        group_sums_.resize((g + 1) * size_t(dim_), 0.0);
        double* sum = group_sums_.data() + g * size_t(dim_);
        for (size_t key = g * kMeanGroup; key < (g + 1) * kMeanGroup; ++key) {
            kernels().to_float(values.dtype(), values.row(key, head), row, size_t(dim_));
            for (int i = 0; i < dim_; ++i) sum[i] += row[i];
        }
        for (int i = 0; i < dim_; ++i)
            sums_until_.push_back(sum[i] + (g ? sums_until_[(g - 1) * size_t(dim_) + size_t(i)] : 0.0));
    }
}

void ValueSketch::crop(size_t keys) {
    if (keys >= coded_) return;
    coded_ = keys / kBlock * kBlock;
    for (auto* sums : {&group_sums_, &sums_until_})
        sums->resize(std::min(sums->size(), coded_ / kMeanGroup * size_t(dim_)));
}

bool ValueSketch::mean(size_t visible, const uint8_t* mask, double* mean) const {
    const size_t groups = std::min(visible / kMeanGroup, group_sums_.size() / size_t(dim_));
    std::fill(mean, mean + dim_, 0.0);
    size_t seen = groups;
    if (!mask) {
        if (groups) std::copy_n(sums_until_.data() + (groups - 1) * size_t(dim_), dim_, mean);
    } else {  // added up, not taken off: a difference would keep rounding of what is hidden
        for (size_t g = 0; g < groups; ++g) {
            if (std::memchr(mask + g * kMeanGroup, 0, kMeanGroup)) {
                --seen;
                continue;
            }
            for (int i = 0; i < dim_; ++i) mean[i] += group_sums_[g * size_t(dim_) + size_t(i)];
        }
    }
    for (int i = 0; i < dim_; ++i) mean[i] /= double(std::max<size_t>(seen, 1) * kMeanGroup);
    return seen > 0;
}

}  // namespace hsr

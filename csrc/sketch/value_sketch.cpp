#include "sketch/value_sketch.h"

#include <algorithm>

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

void ValueSketch::widen(const float* least, const float* most, const double* sums, size_t count) {
    appended_ += count;
    for (int i = 0; i < dim_; ++i) {
        least_[size_t(i)] = std::min(least_[size_t(i)], least[i]);
        most_[size_t(i)] = std::max(most_[size_t(i)], most[i]);
        sum_[size_t(i)] += sums[i];
    }
}

}  // namespace hsr

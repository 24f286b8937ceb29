#include "sketch/value_sketch.h"

#include <algorithm>

namespace hsr {

void ValueSketch::code(const RowStore& values, int head, size_t until) {
    rows_.reserve(until * value_row_bytes(dim_));
    parameters_.reserve(until / kBlock * value_parameter_bytes(dim_));
    float row[kMaxHeadDim];
    for (; coded_ < until; ++coded_) {
        kernels().to_float(values.dtype(), values.row(coded_, head), row, size_t(dim_));
        kernels().code_value(dim_, row, rows_.data() + coded_ * value_row_bytes(dim_),
                             parameters_.data() + coded_ / kBlock * value_parameter_bytes(dim_) + coded_ % kBlock * 2);
    }
}

void ValueSketch::widen(const float* row) {
    ++appended_;
    for (int i = 0; i < dim_; ++i) {
        least_[size_t(i)] = std::min(least_[size_t(i)], row[i]);
        most_[size_t(i)] = std::max(most_[size_t(i)], row[i]);
        sum_[size_t(i)] += row[i];
    }
}

}  // namespace hsr

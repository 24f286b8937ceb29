#include "sketch/value_sketch.h"

#include <algorithm>

namespace hsr {

void ValueSketch::code(const RowStore& values, int head, size_t until) {
    const size_t stride = value_stride(dim_);
    // accumulate_codes reads whole vectors: keep 64 bytes behind the last row.
    rows_.reserve(until * stride + 64);
    float row[kMaxHeadDim];
    for (; coded_ < until; ++coded_) {
        kernels().to_float(values.dtype(), values.row(coded_, head), row, size_t(dim_));
        kernels().code_value(dim_, row, rows_.data() + coded_ * stride);
    }
}

void ValueSketch::widen(const float* row) {
    for (int i = 0; i < dim_; ++i) {
        least_[size_t(i)] = std::min(least_[size_t(i)], row[i]);
        most_[size_t(i)] = std::max(most_[size_t(i)], row[i]);
    }
}

}  // namespace hsr

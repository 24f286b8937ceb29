// 4-bit codes of the values of one head, and the range of every coordinate.
#pragma once

#include <limits>
#include <vector>

#include "kernels/kernels.h"
#include "store/buffer.h"
#include "store/row_store.h"

namespace hsr {

class ValueSketch {
public:
    explicit ValueSketch(int dim)
        : least_(size_t(dim), std::numeric_limits<float>::infinity()),
          most_(size_t(dim), -std::numeric_limits<float>::infinity()),
          sum_(size_t(dim), 0.0),
          dim_(dim) {}

    size_t coded() const { return coded_; }
    size_t nbytes() const { return coded_ * value_row_bytes(dim_) + coded_ / kBlock * value_parameter_bytes(dim_); }
    const uint8_t* rows() const { return rows_.data(); }
    const uint8_t* parameters(size_t block) const { return parameters_.data() + block * value_parameter_bytes(dim_); }
    // Per coordinate, over every value ever appended (cropped ones too: still a bound).
    const std::vector<float>& least() const { return least_; }
    const std::vector<float>& most() const { return most_; }

    // Mean of every value ever appended, to stand for values that are left out.
    double mean(int i) const { return appended_ ? sum_[size_t(i)] / double(appended_) : 0.0; }

    // Make room for `keys` (a multiple of 16); code_range may then run for parts of them at once, and `coded_until`
    // ends it.
    void reserve(size_t keys);
    void code_range(const RowStore& values, int head, size_t first, size_t last);
    void coded_until(size_t keys) { coded_ = keys; }
    void widen(const float* least, const float* most, const double* sums, size_t count);
    void crop(size_t keys) { coded_ = keys < coded_ ? keys / kBlock * kBlock : coded_; }

private:
    std::vector<float> least_, most_;
    std::vector<double> sum_;
    int dim_;
    size_t appended_ = 0;
    size_t coded_ = 0;
    Buffer rows_, parameters_;
};

}  // namespace hsr

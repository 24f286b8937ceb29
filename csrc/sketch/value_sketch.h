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
          dim_(dim) {}

    size_t coded() const { return coded_; }
    size_t nbytes() const { return coded_ * value_row_bytes(dim_) + coded_ / kBlock * value_parameter_bytes(dim_); }
    const uint8_t* rows() const { return rows_.data(); }
    const uint8_t* parameters(size_t block) const { return parameters_.data() + block * value_parameter_bytes(dim_); }
    // Per coordinate, over every value ever appended (cropped ones too: still a bound).
    const std::vector<float>& least() const { return least_; }
    const std::vector<float>& most() const { return most_; }

    // Mean of the coded values a query may see (keys [0, visible), nonzero in `mask` if there is one), over groups of
    // kMeanGroup keys that it sees completely; false when there are none.
    static constexpr size_t kMeanGroup = 1024;
    bool mean(size_t visible, const uint8_t* mask, double* mean) const;

    void code(const RowStore& values, int head, size_t until);  // until: a multiple of 16
    void widen(const float* row);
    void crop(size_t keys);

private:
    void add_to_sums(const float* row, size_t token);

    std::vector<float> least_, most_;
    int dim_;
    std::vector<double> sums_;  // [groups of kMeanGroup begun][dim]
    size_t coded_ = 0;
    Buffer rows_, parameters_;
};

}  // namespace hsr

// Certified codes of the keys of one head, and queries made ready to be scored against them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "sketch/rotation.h"
#include "store/buffer.h"
#include "store/row_store.h"

namespace hsr {

class KeySketch {
public:
    explicit KeySketch(int dim) : dim_(dim), rotation_(&rotation(dim)), centre_(size_t(dim), 0.0f) {}

    int dim() const { return dim_; }
    const Rotation& turned_by() const { return *rotation_; }
    size_t blocks() const { return blocks_; }
    size_t coded() const { return blocks_ * kBlock; }
    size_t nbytes() const { return blocks_ * (high_stride(dim_) + low_stride(dim_)); }
    const uint8_t* high(size_t block) const { return high_.data() + block * high_stride(dim_); }
    const uint8_t* low(size_t block) const { return low_.data() + block * low_stride(dim_); }
    const std::vector<float>& centre() const { return centre_; }
    double centre_norm() const { return centre_norm_; }
    double largest_norm() const { return largest_norm_; }  // of centred, coded keys

    // Of the parameters of all coded keys: the largest, and for residual4 the sum.
    struct Extent {
        float residual4 = 0, residual8 = 0, step = 0;
        double residual4_sum = 0;
    };
    const Extent& extent() const { return extent_; }
    // What coding some blocks adds to that.
    struct CodedRange {
        Extent extent;
        double largest_norm = 0;
    };

    // The centre is the mean of the keys when coding starts, and is taken anew (everything coded again) when their
    // number has grown fourfold, up to 16,384: later means move little, and any centre is a right one.
    bool wants_centre(size_t keys) const {
        return keys >= kBlock && (centred_at_ == 0 || (keys >= 4 * centred_at_ && centred_at_ < 16384));
    }
    void set_centre(const RowStore& rows, int head);
    // Make room for the complete blocks among `keys` keys; code_blocks may then run for parts of them at once, and
    // `coded_until` ends it.
    void reserve(size_t keys);
    CodedRange code_blocks(const RowStore& rows, int head, size_t first, size_t last);
    void coded_until(size_t blocks, const CodedRange* ranges, size_t count);
    // Code every complete block of head `head` that is not coded yet.
    void code(const RowStore& rows, int head);
    void crop(size_t keys);

private:
    void code_block(const RowStore& rows, int head, size_t block, CodedRange& range);

    int dim_;
    const Rotation* rotation_;
    std::vector<float> centre_;
    double centre_norm_ = 0, largest_norm_ = 0;
    Extent extent_;
    size_t blocks_ = 0, centred_at_ = 0;
    Buffer high_, low_;
};

// One query against one sketch. `scale` turns scores into the unit of the estimates; with `scale_by_norm`
// false the query is used at unit length (estimates are then <q, k> scale / |q|).
struct PreparedQuery {
    alignas(64) int8_t high[kMaxHeadDim];
    alignas(64) int8_t low[kMaxHeadDim];
    CodedQuery coded;

    void prepare(const KeySketch& sketch, const float* query, double norm, double scale, bool scale_by_norm);
};

double norm_of(const float* x, int dim);

inline float bfloat16_to_float(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

}  // namespace hsr

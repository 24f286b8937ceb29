// Blocked scan of the full-precision keys: blocks of 16 keys, dimension-major, in the keys' own dtype.
#pragma once

#include "index/halfspace_index.h"
#include "store/buffer.h"

namespace hsr {

class FlatIndex : public HalfspaceIndex {
public:
    using HalfspaceIndex::HalfspaceIndex;
    size_t nbytes() const override { return blocks() * block_bytes(); }

protected:
    void scan_range(const float*, const double*, const double*, int, size_t, size_t, std::vector<Hit>*, int64_t*,
                    WorkCounters&) const override;
    double threshold_for(const float*, double, size_t, WorkCounters&) const override;
    void append_rows(const TokenArray&) override;
    void keep_rows(const std::vector<size_t>&) override;

private:
    size_t block_bytes() const { return size_t(dim_) * kBlock * item_size(dtype_); }
    Buffer blocks_;
    double largest_norm_ = 0;
};

}  // namespace hsr

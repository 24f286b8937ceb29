// Certified quantised scan: 4-bit codes of all keys, 8 bits where the first plane leaves a doubt, the
// full-precision row (in float64) for what is reported or still in doubt.
#pragma once

#include "index/halfspace_index.h"
#include "sketch/key_sketch.h"

namespace hsr {

class SketchIndex : public HalfspaceIndex {
public:
    SketchIndex(int dim, Dtype dtype) : HalfspaceIndex(dim, dtype), rows_(1, dim, dtype), sketch_(dim) {}
    size_t nbytes() const override { return rows_.nbytes() + sketch_.nbytes(); }

protected:
    void scan_range(const float*, const double*, const double*, int, size_t, size_t, std::vector<Hit>*, int64_t*,
                    WorkCounters&) const override;
    double threshold_for(const float*, double, size_t, WorkCounters&) const override;
    void append_rows(const TokenArray&) override;
    void keep_rows(const std::vector<size_t>&) override;

private:
    RowStore rows_;
    KeySketch sketch_;
};

}  // namespace hsr

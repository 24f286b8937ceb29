// The principal frame of a set of keys: y = axes (x - mean), an isometry. Boxes along the axes of the frame bound
// flat sets tightly whatever way they lie, where boxes along the coordinates would be as thick as wide.
#pragma once

#include <cstdint>
#include <vector>

namespace hsr::tree {

struct PrincipalFrame {
    int dim = 0;
    std::vector<double> mean;  // [dim]
    std::vector<double> axes;  // [dim][dim], rows are unit vectors
    double residual = 0;       // >= |x - mean - axes^T y| over all keys, y as stored in float32, rounding included
    double reach = 0;          // sums of |axes^T| |y| and |mean| are at most this in every coordinate

    explicit operator bool() const { return dim > 0; }
};

// The frame and, in `rotated`, y of every key [count][dim]. An empty frame where it would not help (no direction
// much thinner than another) or cannot be trusted (dim > 16, sizes near the ends of float32).
PrincipalFrame principal_frame(int dim, const float* keys, int64_t count, std::vector<float>& rotated);

}  // namespace hsr::tree

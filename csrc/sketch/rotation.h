// The fixed rotation applied to keys and queries before they are coded: random signs, then the orthonormal
// cosine transform. It exists for every dimension, spreads outlying coordinates over all codes, and needs
// no storage: the same dimension always gives the same matrix.
#pragma once

#include <vector>

namespace hsr {

struct Rotation {
    int dim;
    std::vector<float> matrix;  // [dim][padded16(dim)]: rotated = x times matrix

    // |computed rotation of x - exact rotation of x|_2 <= relative_slack |x|_2, for the float32 sum of
    // `rotate`: each coordinate is off by at most dim u sum_i |x_i R_ij| <= dim u |x|, all of them together
    // by sqrt(dim) dim u |x|, and rounding the matrix itself adds sqrt(dim) u |x| (u = 2^-24).
    double relative_slack;
};

const Rotation& rotation(int dim);

}  // namespace hsr

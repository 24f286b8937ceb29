// Signs of sums of products of float32 numbers, exact: the products are exact in float64; a sum is taken in
// float64 with an error bound first, and as an expansion (a sum of non-overlapping terms) where that fails.
#pragma once

#include <cmath>

namespace hsr::tree {

// Sign of the sum of `count` <= 8 float64 terms, exact barring overflow, which products of float32 cannot cause.
inline int sign_of_sum(const double* terms, int count) {
    double expansion[8];
    int length = 0;
    for (int t = 0; t < count; ++t) {
        double carry = terms[t];
        int kept = 0;
        for (int i = 0; i < length; ++i) {  // two-sum: carry + expansion[i] = sum + error, exactly
            const double a = carry, b = expansion[i], sum = a + b, virtual_b = sum - a;
            const double error = (a - (sum - virtual_b)) + (b - virtual_b);
            carry = sum;
            if (error != 0) expansion[kept++] = error;
        }
        if (carry != 0) expansion[kept++] = carry;
        length = kept;
    }
    // The largest term is last and outweighs the rest.
    return length == 0 ? 0 : (expansion[length - 1] > 0 ? 1 : -1);
}

inline int sign_of_sum_filtered(const double* terms, int count) {
    double sum = 0, magnitude = 0;
    for (int t = 0; t < count; ++t) sum += terms[t], magnitude += std::fabs(terms[t]);
    // 8 additions, each relative 2^-53 of a partial sum <= magnitude: the error is below 8 * 2^-53 magnitude
    // (and magnitude itself is low by as much, relatively): 2^-49 covers both.
    if (std::fabs(sum) > magnitude * 0x1p-49) return sum > 0 ? 1 : -1;
    return sign_of_sum(terms, count);
}

// > 0 if a, b, c turn left.
inline int orientation(float ax, float ay, float bx, float by, float cx, float cy) {
    const double terms[6] = {double(ax) * by,  -double(ay) * bx, double(bx) * cy,
                             -double(by) * cx, double(cx) * ay,  -double(cy) * ax};
    const double left = (double(bx) - ax) * (double(cy) - ay), right = (double(by) - ay) * (double(cx) - ax);
    // Each factor is relative 2^-53, each product 2^-53 more, the difference 2^-53: below 4 * 2^-53 of the sum.
    if (std::fabs(left - right) > (std::fabs(left) + std::fabs(right)) * 0x1p-50) return left > right ? 1 : -1;
    return sign_of_sum_filtered(terms, 6);
}

// Sign of <q, b> - <q, a>.
inline int compare_along(double qx, double qy, float ax, float ay, float bx, float by) {
    const double terms[4] = {qx * bx, qy * by, -qx * ax, -qy * ay};
    return sign_of_sum_filtered(terms, 4);
}

}  // namespace hsr::tree

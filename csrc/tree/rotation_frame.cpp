#include "tree/rotation_frame.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace hsr::tree {
namespace {

constexpr int kMaxDim = 16;
constexpr int64_t kSample = 2048;
constexpr double kThin = 0.5;  // a frame pays if the thinnest direction is thinner than this share of the widest

// Eigenvectors of a symmetric matrix a[d][d] by Jacobi rotations: rows of `vectors`; a becomes diagonal.
void diagonalise(int d, std::vector<double>& a, std::vector<double>& vectors) {
    vectors.assign(size_t(d * d), 0);
    for (int i = 0; i < d; ++i) vectors[size_t(i * d + i)] = 1;
    const auto at = [&](int i, int j) -> double& { return a[size_t(i * d + j)]; };
    for (int sweep = 0; sweep < 12; ++sweep)
        for (int p = 0; p < d; ++p)
            for (int q = p + 1; q < d; ++q) {
                if (std::fabs(at(p, q)) <= 1e-17 * (std::fabs(at(p, p)) + std::fabs(at(q, q)))) continue;
                const double theta = 0.5 * std::atan2(2 * at(p, q), at(q, q) - at(p, p));
                const double c = std::cos(theta), s = std::sin(theta);
                for (int k = 0; k < d; ++k) {
                    const double x = at(k, p), y = at(k, q);
                    at(k, p) = c * x - s * y;
                    at(k, q) = s * x + c * y;
                }
                for (int k = 0; k < d; ++k) {
                    const double x = at(p, k), y = at(q, k);
                    at(p, k) = c * x - s * y;
                    at(q, k) = s * x + c * y;
                }
                for (int k = 0; k < d; ++k) {
                    double &x = vectors[size_t(p * d + k)], &y = vectors[size_t(q * d + k)];
                    const double old = x;
                    x = c * old - s * y;
                    y = s * old + c * y;
                }
            }
}

}  // namespace

PrincipalFrame principal_frame(int dim, const float* keys, int64_t count, std::vector<float>& rotated) {
    PrincipalFrame frame;
    if (dim < 2 || dim > kMaxDim || count < 2) return {};
    const int64_t take = std::min(count, kSample);
    const size_t d = size_t(dim);
    std::vector<double> covariance(d * d, 0), centred(d);
    frame.mean.assign(d, 0);
    for (int64_t i = 0; i < take; ++i)
        for (size_t j = 0; j < d; ++j) frame.mean[j] += keys[i * count / take * dim + int64_t(j)] / double(take);
    for (int64_t i = 0; i < take; ++i) {
        for (size_t j = 0; j < d; ++j) centred[j] = keys[i * count / take * dim + int64_t(j)] - frame.mean[j];
        for (size_t j = 0; j < d; ++j)
            for (size_t k = 0; k < d; ++k) covariance[j * d + k] += centred[j] * centred[k];
    }
    diagonalise(dim, covariance, frame.axes);
    double thinnest = covariance[0], widest = covariance[0];
    for (size_t j = 1; j < d; ++j) {
        thinnest = std::min(thinnest, covariance[j * d + j]);
        widest = std::max(widest, covariance[j * d + j]);
    }
    if (!(widest > 1e-50 && widest < 1e50 && thinnest < kThin * kThin * widest)) return {};

    rotated.resize(size_t(count) * d);
    std::vector<double> largest(d, 0);  // |y_j|
    double square = 0, size = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float* x = keys + i * dim;
        float* y = rotated.data() + i * dim;
        for (size_t j = 0; j < d; ++j) {
            double sum = 0;
            for (size_t k = 0; k < d; ++k) sum += frame.axes[j * d + k] * (x[k] - frame.mean[k]);
            y[j] = float(sum);
            largest[j] = std::max(largest[j], std::fabs(double(y[j])));
        }
        double left = 0;
        for (size_t k = 0; k < d; ++k) {
            double rest = x[k] - frame.mean[k];
            for (size_t j = 0; j < d; ++j) rest -= frame.axes[j * d + k] * y[j];
            left += rest * rest;
            size = std::max(size, std::fabs(double(x[k])));
        }
        square = std::max(square, left);
    }
    if (!(square < 1e60)) return {};
    for (size_t k = 0; k < d; ++k) {
        double reach = std::fabs(frame.mean[k]) + size;
        for (size_t j = 0; j < d; ++j) reach += std::fabs(frame.axes[j * d + k]) * largest[j];
        frame.reach = std::max(frame.reach, reach);
    }
    // A residual is the norm of d sums of d + 2 terms that are at most `reach` together: (d + 4) units each.
    frame.residual = std::sqrt(square) * (1 + 1e-12) + 1.2e-16 * (dim + 4) * std::sqrt(double(dim)) * frame.reach;
    frame.dim = dim;
    return frame;
}

}  // namespace hsr::tree

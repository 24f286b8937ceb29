#include "tree/equipartition.h"

#include <algorithm>
#include <bitset>
#include <cmath>

namespace hsr::tree {
namespace {

constexpr int kSample = 256;
constexpr int kAngles = 24;       // planes tried for a cut into 8
constexpr int kSteps = 10;        // of bisection
constexpr double kBalance = 0.5;  // a cell holds its fair share up to so much more or less
constexpr double kPi = 3.14159265358979323846;

using Point = std::array<double, 3>;
struct Line {
    double x, y, offset;  // x u + y v = offset
};

double median(std::vector<double>& values) {
    const auto middle = values.begin() + std::ptrdiff_t(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

// `below` and `above` are separated by a line of constant v. Returns a line that halves both.
Line ham_sandwich(const std::vector<std::array<double, 2>>& below, const std::vector<std::array<double, 2>>& above) {
    std::vector<double> scratch;
    const auto halving = [&](double angle) {
        Line line{std::cos(angle), std::sin(angle), 0};
        scratch.clear();
        for (const auto& p : below) scratch.push_back(line.x * p[0] + line.y * p[1]);
        line.offset = median(scratch);
        return line;
    };
    // At angle -pi/2 the normal points down, so all of `above` is under the halving line of `below`; at pi/2 over it.
    double low = -kPi / 2, high = kPi / 2;
    Line line = halving(0);
    for (int step = 0; step < kSteps; ++step) {
        int64_t over = 0;
        for (const auto& p : above) over += line.x * p[0] + line.y * p[1] >= line.offset;
        const int64_t excess = 2 * over - int64_t(above.size());
        if (excess == 0) break;
        const double angle = std::atan2(line.y, line.x);
        (excess > 0 ? high : low) = angle;
        line = halving((low + high) / 2);
    }
    return line;
}

void cross(const double* a, const double* b, double* out) {
    out[0] = a[1] * b[2] - a[2] * b[1];
    out[1] = a[2] * b[0] - a[0] * b[2];
    out[2] = a[0] * b[1] - a[1] * b[0];
}
double dot3(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

// Apex and edges from the normals and offsets; false if the cuts are nearly parallel.
bool solve(int dim, Frame& frame) {
    auto& n = frame.normal;
    if (dim == 2) {
        const double det = n[0][0] * n[1][1] - n[0][1] * n[1][0];
        if (std::fabs(det) < 1e-6) return false;
        frame.edge[0][0] = n[1][1] / det, frame.edge[0][1] = -n[1][0] / det;
        frame.edge[1][0] = -n[0][1] / det, frame.edge[1][1] = n[0][0] / det;
    } else {
        for (int i = 0; i < 3; ++i) cross(n[(i + 1) % 3], n[(i + 2) % 3], frame.edge[i]);
        const double det = dot3(n[0], frame.edge[0]);
        if (std::fabs(det) < 1e-6) return false;
        for (auto& edge : frame.edge)
            for (double& x : edge) x /= det;
    }
    for (int j = 0; j < dim; ++j) {
        frame.apex[j] = 0;
        for (int i = 0; i < dim; ++i) frame.apex[j] += frame.edge[i][j] * frame.offset[i];
    }
    return true;
}

// The direction of largest variance of the sample, by power iteration.
Point principal(int dim, const std::vector<Point>& sample) {
    Point mean{}, axis{};
    for (const auto& p : sample)
        for (int j = 0; j < dim; ++j) mean[size_t(j)] += p[size_t(j)] / double(sample.size());
    double covariance[3][3] = {};
    for (const auto& p : sample)
        for (int i = 0; i < dim; ++i)
            for (int j = 0; j < dim; ++j)
                covariance[i][j] += (p[size_t(i)] - mean[size_t(i)]) * (p[size_t(j)] - mean[size_t(j)]);
    for (int j = 0; j < dim; ++j) axis[size_t(j)] = 1 + 0.1 * j;
    for (int step = 0; step < 16; ++step) {
        Point next{};
        for (int i = 0; i < dim; ++i)
            for (int j = 0; j < dim; ++j) next[size_t(i)] += covariance[i][j] * axis[size_t(j)];
        const double norm = std::sqrt(dot3(next.data(), next.data()));
        if (!(norm > 0) || !std::isfinite(norm)) break;
        for (int j = 0; j < dim; ++j) axis[size_t(j)] = next[size_t(j)] / norm;
    }
    const double norm = std::sqrt(dot3(axis.data(), axis.data()));
    for (double& x : axis) x /= norm;
    return axis;
}

void split_by(const std::vector<Point>& sample, const Point& normal, double offset, std::vector<Point>& below,
              std::vector<Point>& above) {
    for (const auto& p : sample) (dot3(p.data(), normal.data()) < offset ? below : above).push_back(p);
}

bool cuts_of_plane(const std::vector<Point>& sample, const Point& axis, double offset, Frame& frame) {
    std::vector<Point> below, above;
    split_by(sample, axis, offset, below, above);
    if (below.empty() || above.empty()) return false;
    const Point across{-axis[1], axis[0], 0};
    std::vector<std::array<double, 2>> flat[2];
    for (const auto& p : below) flat[0].push_back({dot3(p.data(), across.data()), dot3(p.data(), axis.data())});
    for (const auto& p : above) flat[1].push_back({dot3(p.data(), across.data()), dot3(p.data(), axis.data())});
    const Line line = ham_sandwich(flat[0], flat[1]);
    for (int j = 0; j < 2; ++j) {
        frame.normal[0][j] = axis[size_t(j)];
        frame.normal[1][j] = line.x * across[size_t(j)] + line.y * axis[size_t(j)];
    }
    frame.offset[0] = offset;
    frame.offset[1] = line.offset;
    return true;
}

// The first plane halves the points. For each azimuth one plane with a normal of that azimuth halves both
// halves; of these planes choose the pair that comes nearest to quartering both halves. A pair that does exists
// (Edelsbrunner 1986); the grid of azimuths finds it up to its spacing.
bool cuts_of_space(const std::vector<Point>& sample, const Point& axis, double offset, Frame& frame) {
    std::vector<Point> halves[2];
    split_by(sample, axis, offset, halves[0], halves[1]);
    if (halves[0].empty() || halves[1].empty()) return false;
    Point u{}, v{};
    const int least =
        int(std::min_element(axis.begin(), axis.end(), [](double a, double b) { return std::fabs(a) < std::fabs(b); }) -
            axis.begin());
    Point unit{};
    unit[size_t(least)] = 1;
    cross(axis.data(), unit.data(), u.data());
    const double norm = std::sqrt(dot3(u.data(), u.data()));
    for (double& x : u) x /= norm;
    cross(axis.data(), u.data(), v.data());

    struct Plane {
        Point normal;
        double offset;
        std::bitset<kSample> over[2];
    };
    std::vector<Plane> planes;
    std::vector<std::array<double, 2>> flat[2];
    for (int a = 0; a < kAngles; ++a) {
        const double angle = kPi * a / kAngles;
        Point across;
        for (size_t j = 0; j < 3; ++j) across[j] = std::cos(angle) * u[j] + std::sin(angle) * v[j];
        for (int h = 0; h < 2; ++h) {
            flat[h].clear();
            for (const auto& p : halves[h])
                flat[h].push_back({dot3(p.data(), across.data()), dot3(p.data(), axis.data())});
        }
        const Line line = ham_sandwich(flat[0], flat[1]);
        Plane plane;
        for (size_t j = 0; j < 3; ++j) plane.normal[j] = line.x * across[j] + line.y * axis[j];
        plane.offset = line.offset;
        for (int h = 0; h < 2; ++h)
            for (size_t i = 0; i < halves[h].size(); ++i)
                plane.over[h][i] = line.x * flat[h][i][0] + line.y * flat[h][i][1] >= line.offset;
        planes.push_back(plane);
    }
    double least_excess = 2;
    const Plane* best[2] = {nullptr, nullptr};
    for (size_t a = 0; a < planes.size(); ++a)
        for (size_t b = a + 1; b < planes.size(); ++b) {
            double excess = 0;
            for (int h = 0; h < 2; ++h) {
                const double differing = double((planes[a].over[h] ^ planes[b].over[h]).count());
                excess = std::max(excess, std::fabs(2 * differing / double(halves[h].size()) - 1));
            }
            if (excess < least_excess) least_excess = excess, best[0] = &planes[a], best[1] = &planes[b];
        }
    for (size_t j = 0; j < 3; ++j) {
        frame.normal[0][j] = axis[j];
        frame.normal[1][j] = best[0]->normal[j];
        frame.normal[2][j] = best[1]->normal[j];
    }
    frame.offset[0] = offset;
    frame.offset[1] = best[0]->offset;
    frame.offset[2] = best[1]->offset;
    return true;
}

template <int D>
void assign(const float* keys, const int32_t* items, int64_t count, const Frame& frame, uint8_t* cells,
            int64_t* sizes) {
    for (int64_t i = 0; i < count; ++i) {
        const float* key = keys + int64_t(items[i]) * D;
        int cell = 0;
        for (int c = 0; c < D; ++c) {
            double side = -frame.offset[c];
            for (int j = 0; j < D; ++j) side += frame.normal[c][j] * key[j];
            cell |= (side >= 0) << c;
        }
        cells[i] = uint8_t(cell);
        ++sizes[cell];
    }
}

template <int D>
void bound_cell(Frame& frame, int cell, const float* keys, int64_t count) {
    constexpr double kUnit = 1.1102230246251565e-16;
    double low[D], high[D], largest[D], square = 0, reach = 0;
    for (int i = 0; i < D; ++i) {
        low[i] = count ? HUGE_VAL : 0;
        high[i] = count ? -HUGE_VAL : 0;
        largest[i] = 0;
    }
    for (const float* key = keys; key < keys + count * D; key += D) {
        double lambda[D], left = 0;
        for (int i = 0; i < D; ++i) {
            lambda[i] = -frame.offset[i];
            for (int j = 0; j < D; ++j) lambda[i] += frame.normal[i][j] * key[j];
            low[i] = std::min(low[i], lambda[i]);
            high[i] = std::max(high[i], lambda[i]);
            largest[i] = std::max(largest[i], std::fabs(double(key[i])));
        }
        for (int j = 0; j < D; ++j) {
            double rest = key[j] - frame.apex[j];
            for (int i = 0; i < D; ++i) rest -= frame.edge[i][j] * lambda[i];
            left += rest * rest;
        }
        square = std::max(square, left);
    }
    // Rounding. Both the residual of a key and, later, the bound <q, p> + sum_i <q, e_i> lambda_i are sums of at
    // most 2 D + 2 <= 8 products of terms that are, summed, at most `reach` (times |q| for the bound), each
    // with at most 8 roundings; 32 units cover the two and the roundings of the norms.
    for (int j = 0; j < D; ++j) {
        reach += largest[j] + std::fabs(frame.apex[j]);
        for (int i = 0; i < D; ++i)
            reach += std::fabs(frame.edge[i][j]) * std::max(std::fabs(low[i]), std::fabs(high[i]));
        frame.boxes[j * 8 + cell] = low[j];
        frame.boxes[(D + j) * 8 + cell] = high[j];
    }
    frame.boxes[2 * D * 8 + cell] = std::sqrt(square) + 32 * kUnit * reach;
}

}  // namespace

bool equipartition(int dim, const float* keys, const int32_t* items, int64_t count, Frame& frame,
                   std::vector<uint8_t>& cells) {
    // Items at even steps are a sample good enough: sizes are checked below on all of them.
    std::vector<Point> sample;
    const int64_t take = std::min<int64_t>(count, kSample);
    for (int64_t i = 0; i < take; ++i) {
        const float* key = keys + int64_t(items[i * count / take]) * dim;
        sample.push_back({key[0], key[1], dim == 3 ? key[2] : 0.0});
    }
    const Point axis = principal(dim, sample);
    std::vector<double> heights;
    for (const auto& p : sample) heights.push_back(dot3(p.data(), axis.data()));
    const double offset = median(heights);
    if (!(dim == 2 ? cuts_of_plane(sample, axis, offset, frame) : cuts_of_space(sample, axis, offset, frame)))
        return false;
    if (!solve(dim, frame)) return false;

    int64_t sizes[8] = {};
    cells.resize(size_t(count));
    if (dim == 2)
        assign<2>(keys, items, count, frame, cells.data(), sizes);
    else
        assign<3>(keys, items, count, frame, cells.data(), sizes);
    const double share = double(count) / double(1 << dim);
    const auto [least, most] = std::minmax_element(sizes, sizes + (1 << dim));
    return double(*least) >= (1 - kBalance) * share && double(*most) <= (1 + kBalance) * share;
}

void bound_cell(Frame& frame, int dim, int cell, const float* keys, int64_t count) {
    dim == 2 ? bound_cell<2>(frame, cell, keys, count) : bound_cell<3>(frame, cell, keys, count);
}

}  // namespace hsr::tree

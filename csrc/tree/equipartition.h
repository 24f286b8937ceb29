// Cutting points of the plane into 4, or of space into 8, cells of nearly equal size by 2 lines or 3 planes
// through one point. A line misses at least one of the 4 cells, a plane at least one of the 8.
//
// The cuts are found on a sample (a ham-sandwich cut by bisection of the angle; for three planes a search over
// pairs of such cuts), so sizes are nearly equal, not equal; the crossing argument does not need more. It
// fails, and says so, when no balanced cut exists in the sample, as with many equal points.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace hsr::tree {

constexpr int64_t kFrameCell = 4096;

// The common point p of the d cuts and the matrix e with x = p + e lambda, lambda_i = <normal_i, x> - offset_i.
// A cell is a sign pattern of lambda; the box of the lambda of its keys bounds it, and is never looser than the
// cell itself: <q, x> = <q, p> + sum_i <q, e_i> lambda_i.
struct Frame {
    double normal[3][3], offset[3];
    double apex[3], edge[3][3];  // edge[i] = e_i
    // Of the keys of each cell: low[dim][8], then high[dim][8], of lambda; then residual[8] >= |x - p - e lambda|,
    // rounding included.
    double boxes[7 * 8];
};

// keys [n][dim], dim 2 or 3; `items` are rows of keys. On success sets the normals, offsets, apex and edges of
// `frame`, and the cell (0 .. 2^dim - 1) of each item.
bool equipartition(int dim, const float* keys, const int32_t* items, int64_t count, Frame& frame,
                   std::vector<uint8_t>& cells);

// Bounds a cell: the box of lambda over keys [count][dim] and the residual.
void bound_cell(Frame& frame, int dim, int cell, const float* keys, int64_t count);

}  // namespace hsr::tree

// The inner loops of the low-dimensional indexes, compiled once per instruction set, and their table.
//
// Layout of keys: blocks of 8, dimension-major: block b holds float[dim][8], position p is lane p % 8 of
// block p / 8; unused lanes of the last block are NaN and so fail every comparison.
//
// Precision: keys and queries are float32, so their products are exact in float64 and a score is their sum
// in the order of the dimensions, one rounding a term. It is the same number at every level, with or without
// fused multiply-add: reports do not depend on the machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace hsr::tree {

constexpr int kLanes = 8;

inline size_t block_count(int64_t positions) { return size_t(positions + kLanes - 1) / kLanes; }

// A reported key: position in the high half, bits of the float32 score in the low half. Sorting the
// packed integers sorts by position.
using PackedHit = uint64_t;

// What to look for. With query32, a float32 score below `screen` proves the key out, and only blocks with
// another one are scored in float64: that pays where hits are rare.
struct Search {
    const double* query;
    double threshold;
    const float* query32 = nullptr;
    float screen = 0;
};

struct Kernels {
    const char* name;

    // Appends the positions p in [begin, end) with <query, key p> >= threshold to `hits`, as
    // (ids ? ids[p] : p); returns how many. `hits` has room for end - begin + 8.
    size_t (*scan)(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search, const int32_t* ids,
                   PackedHit* hits);
    // The same with the position + first_id and the score in two arrays.
    size_t (*scan_rows)(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search,
                        int64_t first_id, int64_t* ids, float* scores);
    int64_t (*count)(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search);
    // scores[p - begin] for p in [begin, end), where begin is a multiple of 8; writes whole blocks.
    void (*score)(const float* blocks, int dim, int64_t begin, int64_t end, const double* query, double* scores);
    // Eight bounding volumes: float centre[dim][8], half_width[dim][8], radius[8]. Over volume c the score
    // lies in middle[c] +- spread[c], before rounding.
    void (*bounds)(const float* volumes, int dim, const double* query, const double* magnitude, double norm,
                   double* middle, double* spread);
};

// At the level that kernels/dispatch.cpp chose; follow_isa after it has chosen another.
const Kernels& kernels();
void follow_isa();

}  // namespace hsr::tree

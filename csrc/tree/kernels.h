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
constexpr int kCodeRun = 32;           // keys whose codes stand together
constexpr double kCodeCentre = 127.5;  // the code of a box's centre
constexpr int kMostCoded = 32;         // dimensions

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
    // Keys that other searches have found: those with <excluded[i], key> >= excluded_from[i] for an i.
    const double* excluded[3] = {};
    double excluded_from[3] = {};
    int exclusions = 0;
};

// A half-space as cells see it: score = shift + <query, y> +- slack, in [.., ..] of one of eight cells.
struct HalfSpace {
    const double* query;
    const double* magnitude;  // |query_j|
    double norm, shift, slack, threshold;
};

// Eight cells of an equipartition: their boxes low[dim][8], high[dim][8] in its coordinates, residual[8], and
// what the query makes of these: score = at_apex + sum_i slope[i] lambda_i +- (residual norm + slack).
struct FrameCells {
    const double* boxes;
    double at_apex, slope[3];
};

// Up to eight convex layers in the plane, merged in the order of their edges' normals, on a ring of blocks. They are
// swept from the query's angle outwards, until both sides have seen a vertex of each layer below `closing`.
struct Sweep {
    int64_t begin, end;  // the ring, in blocks
    int64_t next[2];     // right, left
    int64_t unseen;      // blocks of the ring
    unsigned right;      // lanes of next[0] that are right of the angle
    uint64_t closed[2];  // byte l is not 0: layer l is closed on that side, or there is no such layer
    uint64_t reported;   // byte l is not 0: a vertex of layer l is reported
    double closing;

    bool open(int side) const { return unseen && some_byte_is_zero(closed[side]); }
    // Inlined always: shared with files that are compiled for other instruction sets.
    [[gnu::always_inline]] static bool some_byte_is_zero(uint64_t x) {
        return ((x - 0x0101010101010101u) & ~x & 0x8080808080808080u) != 0;
    }
};

struct Kernels {
    const char* name;

    // Appends the positions p in [begin, end) with <query, key p> >= threshold to `hits`, as
    // (ids ? ids[p] : p); returns how many. `hits` has room for end - begin + 8, and `ids` is whole blocks long.
    size_t (*scan)(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search, const int32_t* ids,
                   PackedHit* hits);
    // The same with the position + first_id and the score in two arrays, each with room for end - begin + 8.
    size_t (*scan_rows)(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search,
                        int64_t first_id, int64_t* ids, float* scores);
    // Codes of 8 bits, code_j + 0.5 = 127.5 (y_j - centre_j) / half_width_j but for rounding, stand in runs of 32 keys,
    // two dimensions together: [(dim + 1) / 2][32][2]. Leaf c, one of the bits in `leaves`, is [begin[c], end[c]) and
    // volume c; `error` is the largest |y_j - decoded y_j| / half_width_j. Writes the blocks with a key that its code
    // does not prove out of the half-space; returns how many. `blocks` has room for four more than there are. dim <=
    // kMostCoded.
    size_t (*open_blocks)(const int8_t* codes, const float* volumes, int dim, const HalfSpace& half, double error,
                          unsigned leaves, const int32_t* begin, const int32_t* end, int32_t* blocks);
    // `scan` of the blocks in `list`, without a screen or exclusions. `hits` has room for 8 more than there may be.
    size_t (*scan_blocks)(const float* blocks, int dim, const int32_t* list, size_t count, const Search& search,
                          const int32_t* ids, PackedHit* hits);
    int64_t (*count)(const float* blocks, int dim, int64_t begin, int64_t end, const Search& search);
    // scores[p - begin] for p in [begin, end), where begin is a multiple of 8; writes whole blocks.
    void (*score)(const float* blocks, int dim, int64_t begin, int64_t end, const double* query, double* scores);
    // Eight bounding volumes: float centre[dim][8], half_width[dim][8], radius[8]; with `frame`, tightened by the
    // cells of an equipartition. Over volume c the score lies in [low[c], high[c]].
    void (*bounds)(const float* volumes, int dim, const HalfSpace& half, const FrameCells* frame, double* low,
                   double* high);
    // Bits of the volumes inside the half-space, and of those crossed by its boundary << 8.
    unsigned (*classify)(const float* volumes, int dim, const HalfSpace& half, const FrameCells* frame);
    // In the plane: which of two sets of 16 points has one with a score that is not below the threshold, as bits.
    unsigned (*reached)(const float* blocks, const double* query, double threshold);
    // Goes on with a sweep, over at most so many blocks, and appends what it reports as `scan` does, without a screen
    // or exclusions. `lanes` holds a byte a layer for each block: its lanes. `hits` has room for most + 1 blocks.
    size_t (*sweep)(const float* blocks, const uint64_t* lanes, Sweep& sweep, int64_t most, const Search& search,
                    const int32_t* ids, PackedHit* hits);
    // One counting pass. The hits that are the first in their bucket (position >> shift) go to their places in the
    // order, as position + first_id and score, and come first in `hits`; the others go to `rest`. `seen` has `words`
    // zeros, a bit a bucket, and is left zero; `before` as many. Returns the size of `rest`.
    size_t (*spread)(PackedHit* hits, size_t n, int shift, size_t words, uint64_t* seen, uint32_t* before,
                     int64_t first_id, int64_t* ids, float* scores, PackedHit* rest);
};

// At the level that kernels/dispatch.cpp chose; follow_isa after it has chosen another.
const Kernels& kernels();
void follow_isa();

}  // namespace hsr::tree

// A partition tree for half-space reporting in low dimensions.
//
// Nodes have up to eight children. A child is a run of positions in the tree's own order of the keys, bounded
// by a box and a ball around the same centre; the eight bounds are tested together. A child that lies fully
// inside the half-space is reported in bulk, one fully outside is dropped, a crossed one is opened.
//
// Cells. In the plane and in space, cells of more than kFrameCell keys are cut by a partition with a proved
// crossing bound (equipartition.h): any line misses one of 4 cells, any plane one of 8, so queries that
// report in bulk visit O(n^0.793) nodes for d = 2 and O(n^0.936) for d = 3 if the cells are equal (0.892 and 0.968
// if all are as unequal as is taken). Below, where there is no balanced cut, and for d > 3, cells are halved across
// their direction of largest variance, which has no such bound but adapts to the data and is what makes the exponents
// measured on usual data better than the proved ones.
//
// Cells are cut and bounded in the principal frame of the keys, so that flat sets have flat boxes.
//
// Leaves for d > 3 also stand as codes of 8 bits a coordinate, relative to their boxes: a crossed leaf is read as
// codes, a quarter of the bytes, and only blocks with a key that these do not prove out are read in full and decide.
//
// The shallow rule: a range that crosses too many cells is not shallow, so its output is large and a scan is no
// dearer. A sample tells a deep query at once; one that falls behind the pace of a scan scans the cells
// it has not seen. So a query costs little more than a scan, whatever the keys.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tree/equipartition.h"
#include "tree/rotation_frame.h"
#include "tree/static_index.h"

namespace hsr::tree {

class PartitionTree : public StaticIndex {
public:
    PartitionTree(int dim, int64_t size, const float* keys, const int64_t* ids, int leaf_size);

    void gather(const Tile& tile, Which which, Gathered* gathered, Counters& counters) const override;
    int64_t count(const Query& query, double threshold, Rows& rows) const override;
    void top(const Query& query, Best& best, Counters& counters) const override;
    void erase(int64_t position) override;
    int64_t nbytes() const override;

    int64_t node_count() const { return int64_t(nodes_.size()); }
    int64_t frame_count() const { return int64_t(frames_.size()); }

protected:
    // gather; with `always`, no query is left to a scan.
    void walk(const Tile& tile, Which which, Gathered* gathered, Counters& counters, bool always) const;

private:
    static constexpr int kFan = 8;
    struct Node {
        int32_t begin[kFan], end[kFan];  // positions in tree order
        int32_t child[kFan];             // node, or -1 for a leaf
        int32_t live[kFan];
        int32_t children = 0;
        int32_t frame = -1;
        uint16_t leaves = 0, present = 0;  // bits of children: those without a node; all, twice
    };
    struct Builder;
    struct Walk;

    // A query as the cells see it, in the principal frame; `half` points to the query or to `turned`.
    struct View {
        Query turned;
        HalfSpace half;
    };
    void look(const Query& query, double threshold, View& view) const;
    FrameCells frame_cells(const Frame& frame, const HalfSpace& half) const;
    unsigned classify(const Kernels& loops, size_t node, const HalfSpace& half) const;
    const float* volumes(size_t node) const { return volumes_.data() + node * size_t(2 * dim() + 1) * kFan; }

    void encode(const float* rows);
    size_t code_width() const { return size_t(dim() + 1) / 2 * 2; }  // bytes a key

    int leaf_size_;
    double slack_ = 0;  // rounding of bounds and scores, a unit of |q|_1
    PrincipalFrame axes_;
    std::vector<Node> nodes_;     // the root first
    Floats volumes_;              // a node's boxes and balls, see Kernels::bounds
    std::vector<Frame> frames_;   // of the nodes cut by an equipartition
    std::vector<int32_t> order_;  // position in the order of ids of each tree position, -1 behind the last
    Floats leaves_;               // the keys in tree order, in blocks
    Codes codes_;  // of the keys in tree order, see Kernels::open_blocks; empty if leaves do not start at runs
    double code_error_ = 0;       // largest |y_j - decoded| over the half-width of the leaf's box
    Floats sample_;               // some of the keys
    std::vector<int32_t> place_;  // inverse of order_, made by the first deletion
};

}  // namespace hsr::tree

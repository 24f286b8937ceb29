// Half-space reporting in the plane in O(log n + k): convex layers in a tree, with fractional cascading.
//
// A node takes the outermost convex layers of its points (at least one, and more while they are few), then
// halves the rest by x for its two children. A half-plane that misses the innermost layer of a node misses
// everything below it, so every node opened holds a reported point, except children of such nodes: at most 2k + 1 nodes
// are visited. Layers cost O(points) to find once the points are sorted by x, so a build is O(n log n).
//
// A layer of more than kScanned vertices is searched, not scanned: its extreme vertex in the direction of the
// query is found by the angle of the edges, and the reported vertices are a run around it. Up to eight such layers
// are one node, merged in the order of these angles, if every kGap positions in a row hold a vertex of each: then
// their runs lie together, and a sweep from the query's angle to both sides ends within kGap positions of the last
// reported vertex. The positions of an angle in a node and in its children are linked (fractional cascading), so the
// only binary search is at the root, in one of many parts of a turn.
//
// Half of these nodes would be children without a reported point. A polygon of 16 corners around each child, its
// fence, tells most of them without a look at the child: if all corners are outside so is the child.
//
// Everything is exact. Layers are built with an exact orientation test; a float64 score in the plane is the exact
// score rounded once, which is monotone, so scores rise and fall along a layer as the exact ones do and the
// largest score of a layer bounds what is inside it. Slack is needed only for fences, whose corners are rounded, and
// for angles.
#pragma once

#include <cstdint>
#include <vector>

#include "tree/static_index.h"

namespace hsr::tree {

class ConvexLayers : public StaticIndex {
public:
    ConvexLayers(int64_t size, const float* keys, const int64_t* ids);

    void gather(const Tile& tile, Which which, Gathered* gathered, Counters& counters) const override;
    int64_t count(const Query& query, double threshold, Rows& rows) const override;
    void top(const Query& query, Best& best, Counters& counters) const override;
    int64_t nbytes() const override;

    int64_t node_count() const { return int64_t(nodes_.size()); }

private:
    struct Point {
        float x, y;
        int32_t row;
    };
    struct Node {
        int64_t begin = 0, inner = 0, end = 0;  // positions: outer layers, then the innermost from `inner`
        int32_t child[2] = {-1, -1};
        int32_t searched = 0;  // layers that are found by angle; 0: all are scanned
        // Its catalogue: angles of its own edges and of every kSampled-th entry of its children's.
        int64_t catalogue = 0;
        int32_t entries = 0;
    };
    struct Entry {
        double angle;
        int32_t child[2];  // entries below this one in the children's catalogues
    };
    static constexpr int kCorners = 2 * kLanes;      // of a fence
    static constexpr size_t kFences = 4 * kCorners;  // floats of the fences of two children
    static constexpr double kAround = 6.2831853072;  // a little more than 2 pi
    struct Builder;
    struct Walk;

    void start(Walk& walk, const Query& query, double threshold, Growable<PackedHit>& hits) const;
    bool step(Walk& walk, Counters& counters) const;  // false: at its end
    void open_children(Walk& walk, const Node& node) const;
    bool scan_layers(Walk& walk, const Node& node) const;
    bool sweep_layers(Walk& walk, const Node& node, Counters& counters) const;
    Sweep sweep(const Node& node, int64_t position) const;
    double top_layers(const Node& node, int64_t position, const Query& query, Best& best, Counters& counters) const;
    size_t part(double angle) const { return size_t((angle + kAround / 2) * parts_); }
    int32_t locate(double angle) const;
    int32_t follow(const Node& child, int32_t entry, double angle) const;
    double score(int64_t position, const Query& query) const;
    const Entry* catalogue(const Node& node) const { return entries_.data() + node.catalogue; }
    int32_t own(const Node& node, int32_t entry) const;

    Lines<Node> nodes_;
    Floats blocks_;           // the points by node, in blocks of 8
    Lines<int32_t> order_;    // position in the order of ids of each of them, -1 for padding
    Floats fences_;           // corners of polygons around the children of each node, blocks of 8
    double fence_slack_ = 0;  // by which a polygon may fall short, in any direction of length 1
    Lines<uint64_t> lanes_;   // byte l of a block: its vertices of the l-th layer searched; empty if none is
    Lines<Entry> entries_;    // the catalogues, each with one more entry, above everything
    Lines<int32_t> guide_;    // entries of the root below each of the equal parts of a turn
    double parts_ = 0;        // of a radian
};

}  // namespace hsr::tree

#include "tree/convex_layers.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <queue>

#include "tree/exact_plane.h"

namespace hsr::tree {
namespace {

constexpr int32_t kLeaf = 128;     // points that are scanned without a layer
constexpr int32_t kScanned = 384;  // vertices of a layer that are scanned
constexpr int kLayers = 24;        // most layers in a node that is scanned
constexpr int32_t kMerged = 8;     // most layers in one that is searched: a byte each
constexpr int64_t kGap = 128;      // positions of these layers in a row, one of them at least of each layer
constexpr int32_t kSampled = 4;    // every kSampled-th entry of a child's catalogue is in its parent's
constexpr int32_t kPart = 4;       // entries in a part of a turn, if they were spread evenly
// A vertex that is below the threshold by this times |q| M is outside with all beyond it in its layer, seen from the
// query's angle, M the largest coordinate. An angle and the query's are each off by at most 2^-51 (an ulp of pi, for
// atan2) and 2^-54 (for differences), so edges between the vertex and the extreme one that rise away from the query
// have normals within 2^-49 of it. Together they rise by at most 2^-49 |q| times the diameter 2 sqrt(2) M; a score is
// rounded by 2^-53 sqrt(2) |q| M. Twice that.
constexpr double kAngleSlack = 0x1p-46;
constexpr double kScanShare = 0.15, kHitCost = 4.0, kNodeCost = 25.0, kKeyCost = 0.7;  // see partition_tree.cpp

}  // namespace

struct ConvexLayers::Builder {
    ConvexLayers& owner;
    std::vector<Point> points, vertices;
    std::vector<int32_t> lower, upper;
    std::vector<uint8_t> taken;

    Builder(ConvexLayers& layers, int64_t size, const float* keys) : owner(layers), points(size_t(size)) {
        for (int64_t i = 0; i < size; ++i) points[size_t(i)] = {keys[2 * i], keys[2 * i + 1], int32_t(i)};
        std::sort(points.begin(), points.end(),
                  [](const Point& a, const Point& b) { return a.x < b.x || (a.x == b.x && a.y < b.y); });
        taken.resize(points.size());
        if (size) build(0, size);
    }

    int32_t build(int64_t begin, int64_t end) {
        const int32_t index = int32_t(owner.nodes_.size());
        owner.nodes_.emplace_back();
        fences.emplace_back();
        Node node;
        node.begin = node.inner = int64_t(owner.order_.size());
        Fence fence;
        if (end - begin <= kLeaf) {
            peel(begin, end);
            std::fill(taken.begin() + begin, taken.begin() + end, uint8_t(0));
            fence = enclose();
            for (int64_t i = begin; i < end; ++i) place(points[size_t(i)]);
            end = begin;
        }
        std::vector<Vertex> ring;
        for (int layer = 0; begin < end && layer < (node.searched ? kMerged : kLayers); ++layer) {
            const int64_t held = int64_t(owner.order_.size()) - node.begin;
            if (held >= kScanned * 3 / 4) break;
            peel(begin, end);
            if (layer == 0) fence = enclose();
            const bool large = vertices.size() > size_t(kScanned);
            // A large layer has a node of its own, or with others like it.
            const bool searched = layer == 0 ? large : node.searched > 0;
            if (searched ? !merge(ring, vertices, layer) : large) {
                std::fill(taken.begin() + begin, taken.begin() + end, uint8_t(0));
                break;
            }
            if (searched) {
                ++node.searched;
            } else {
                node.inner = int64_t(owner.order_.size());
                for (const Point& vertex : vertices) place(vertex);
            }
            end = remove(begin, end);
        }
        std::vector<double> angles;
        angles.reserve(ring.size());
        for (const Vertex& vertex : ring) {
            const size_t block = owner.order_.size() / kLanes;
            owner.lanes_.resize(block + 1);
            owner.lanes_[block] |= uint64_t(1) << (kLanes * vertex.layer + int(owner.order_.size() % kLanes));
            place(vertex.point);
            angles.push_back(vertex.angle);
        }
        node.end = int64_t(owner.order_.size());
        while (owner.order_.size() % kLanes) owner.order_.push_back(-1);  // nodes start at a block
        if (begin < end) {
            const int64_t middle = begin + (end - begin + 1) / 2;
            node.child[0] = build(begin, middle);
            if (middle < end) node.child[1] = build(middle, end);
        }
        link(node, angles);
        owner.nodes_[size_t(index)] = node;
        fences[size_t(index)] = fence;
        return index;
    }

    std::vector<float> placed;  // x, y by position, for the angles
    void place(const Point& point) {
        const size_t at = owner.order_.size();
        owner.order_.push_back(point.row);
        placed.resize(2 * at + 2);
        placed[2 * at] = point.x;
        placed[2 * at + 1] = point.y;
    }

    // The convex hull of points[begin, end), strictly convex, counterclockwise, in `vertices`; marks `taken`.
    void peel(int64_t begin, int64_t end) {
        const auto chain = [&](std::vector<int32_t>& stack, int side) {
            stack.clear();
            for (int64_t i = begin; i < end; ++i) {
                const Point& p = points[size_t(i)];
                while (stack.size() >= 2) {
                    const Point &a = points[size_t(stack[stack.size() - 2])], &b = points[size_t(stack.back())];
                    if (side * orientation(a.x, a.y, b.x, b.y, p.x, p.y) > 0) break;
                    stack.pop_back();
                }
                if (stack.size() == 1 && points[size_t(stack[0])].x == p.x && points[size_t(stack[0])].y == p.y)
                    continue;  // a copy of the first point
                stack.push_back(int32_t(i));
            }
        };
        chain(lower, 1);
        chain(upper, -1);
        vertices.clear();
        for (int32_t i : lower) vertices.push_back(points[size_t(i)]), taken[size_t(i)] = 1;
        for (size_t i = upper.size(); i-- > 0;) {
            if (taken[size_t(upper[i])]) continue;
            const Point &p = points[size_t(upper[i])], &last = points[size_t(lower.back())];
            if (p.x == last.x && p.y == last.y) continue;  // another copy of the last point
            vertices.push_back(p);
            taken[size_t(upper[i])] = 1;
        }
    }

    // A polygon around the hull in `vertices`. Its sides touch the hull: the edges at the sharpest vertices, where
    // cells are cut off, so that these are corners of the polygon too; and in directions that are spread by the lengths
    // of edges as much as by the angles between them, so that neighbours differ by at most pi / 2. What the rounding of
    // a corner loses is measured.
    struct Fence {
        float corners[2 * kCorners];  // blocks of 8
        void set(int c, float x, float y) {
            corners[c / kLanes * 2 * kLanes + c % kLanes] = x;
            corners[c / kLanes * 2 * kLanes + kLanes + c % kLanes] = y;
        }
    };
    std::vector<Fence> fences;  // by node
    double lost = 0;            // of a support function, by rounding
    Fence enclose() {
        constexpr double kTurn = 6.283185307179586, kSame = 1e-6;
        constexpr int kSharp = 4, kSpread = kCorners - 2 * kSharp;
        const size_t n = vertices.size();
        Fence fence;
        for (int c = 0; c < kCorners; ++c) fence.set(c, vertices[0].x, vertices[0].y);
        // Edge i leaves vertex i: its length, the direction of its outward normal, ascending, and the turn to the next.
        std::vector<double> length(n), normal(n), turn(n);
        double perimeter = 0;
        for (size_t i = 0; i < n; ++i) {
            const Point &a = vertices[i], &b = vertices[i + 1 == n ? 0 : i + 1];
            perimeter += length[i] = std::hypot(double(b.x) - a.x, double(b.y) - a.y);
            normal[i] = std::atan2(double(a.x) - b.x, double(b.y) - a.y);
            if (i && normal[i] < normal[i - 1] - kSame) normal[i] += kTurn;
            if (i) normal[i] = std::max(normal[i], normal[i - 1]);
        }
        if (!(perimeter > 0)) return fence;
        for (size_t i = 0; i < n; ++i)
            turn[i] = std::max((i + 1 == n ? normal[0] + kTurn : normal[i + 1]) - normal[i], 0.0);
        const std::vector<double> turns = turn;
        std::vector<double> sides;
        sides.reserve(kCorners + 1);
        for (int sharp = 0; sharp < kSharp; ++sharp) {
            const size_t i = size_t(std::max_element(turn.begin(), turn.end()) - turn.begin());
            sides.push_back(normal[i]);
            sides.push_back(i + 1 == n ? normal[0] : normal[i + 1]);
            turn[i] = -1;
        }
        double passed = 0;
        int step = 0;
        for (size_t i = 0; i < n; ++i) {
            for (passed += length[i] / perimeter; step < kSpread && step * 2.0 / kSpread <= passed; ++step)
                sides.push_back(normal[i]);
            const double share = turns[i] / kTurn;
            for (; step < kSpread && step * 2.0 / kSpread <= passed + share; ++step)
                sides.push_back(normal[i] + (step * 2.0 / kSpread - passed) * kTurn);
            passed += share;
        }
        std::sort(sides.begin(), sides.end());
        sides.erase(std::unique(sides.begin(), sides.end(), [](double a, double b) { return b - a < kSame; }),
                    sides.end());
        if (sides.back() > sides[0] + kTurn - kSame) sides.pop_back();
        const int count = int(sides.size());
        sides.push_back(sides[0] + kTurn);
        const auto unknown = [&] {
            for (int c = 0; c < kCorners; ++c) fence.set(c, std::nanf(""), std::nanf(""));
            return fence;
        };
        const double reach = owner.largest();
        double x[kCorners + 1], y[kCorners + 1], support[kCorners + 1], here = 0;
        for (int c = 0; c < count; ++c) {
            if (sides[size_t(c) + 1] - sides[size_t(c)] > kTurn / 4 + 1e-3) return unknown();
            x[c] = std::cos(sides[size_t(c)]);
            y[c] = std::sin(sides[size_t(c)]);
            support[c] = -std::numeric_limits<double>::infinity();
            for (const Point& p : vertices) support[c] = std::max(support[c], x[c] * p.x + y[c] * p.y);
        }
        x[count] = x[0], y[count] = y[0], support[count] = support[0];
        for (int c = 0; c < kCorners; ++c) {
            const int i = std::min(c, count - 1);
            const double scale = 1 / (x[i] * y[i + 1] - x[i + 1] * y[i]);
            const float px = float((support[i] * y[i + 1] - support[i + 1] * y[i]) * scale);
            const float py = float((support[i + 1] * x[i] - support[i] * x[i + 1]) * scale);
            if (!(std::fabs(double(px)) <= 4 * reach && std::fabs(double(py)) <= 4 * reach)) return unknown();
            for (int side = i; side <= i + 1; ++side)
                here = std::max(here, support[side] - x[side] * px - y[side] * py);
            fence.set(c, px, py);
        }
        if (here > 0x1p-20 * reach) return unknown();
        lost = std::max(lost, here);
        return fence;
    }

    int64_t remove(int64_t begin, int64_t end) {
        int64_t kept = begin;
        for (int64_t i = begin; i < end; ++i) {
            if (taken[size_t(i)])
                taken[size_t(i)] = 0;
            else
                points[size_t(kept++)] = points[size_t(i)];
        }
        return kept;
    }

    // A vertex of a searched layer, with the angle of the outward normal of the edge that leaves it, as it is rounded:
    // ascending around the layer. A vertex is extreme between its predecessor's angle and its own.
    struct Vertex {
        double angle;
        Point point;
        int layer;
    };
    // Merges the layer in `vertices` into the others, or says that vertices of a layer would be too far apart.
    static bool merge(std::vector<Vertex>& ring, const std::vector<Point>& vertices, int layer) {
        const size_t n = vertices.size();
        if (layer > 0 && n * size_t(kGap) < ring.size() + n) return false;
        std::vector<Vertex> own(n), merged(ring.size() + n);
        for (size_t i = 0; i < n; ++i) {
            const Point &a = vertices[i], &b = vertices[i + 1 == n ? 0 : i + 1];
            own[i] = {std::atan2(double(a.x) - b.x, double(b.y) - a.y), a, layer};
        }
        const auto less = [](const Vertex& a, const Vertex& b) { return a.angle < b.angle; };
        std::rotate(own.begin(), std::min_element(own.begin(), own.end(), less), own.end());
        for (size_t i = 1; i < n; ++i) own[i].angle = std::max(own[i].angle, own[i - 1].angle);  // rounding of atan2
        std::merge(ring.begin(), ring.end(), own.begin(), own.end(), merged.begin(), less);
        int64_t last[kMerged], at = 0;
        std::fill_n(last, layer + 1, int64_t(merged.size()));
        for (int round = 0; round < 2; ++round)
            for (const Vertex& vertex : merged) {
                if (++at - last[vertex.layer] > kGap) return false;
                last[vertex.layer] = at;
            }
        ring.swap(merged);
        return true;
    }

    // The catalogue of a node whose children have theirs. `own` ascends.
    void link(Node& node, const std::vector<double>& own) {
        std::vector<double> merged = own;
        const Entry* entries[2] = {nullptr, nullptr};
        int32_t lengths[2] = {0, 0}, below[2] = {0, 0};
        for (int c = 0; c < 2; ++c) {
            if (node.child[c] < 0) continue;
            const Node& child = owner.nodes_[size_t(node.child[c])];
            entries[c] = owner.catalogue(child);
            lengths[c] = child.entries;
            const auto held = std::ptrdiff_t(merged.size());
            for (int32_t i = 0; i < child.entries; i += kSampled) merged.push_back(entries[c][i].angle);
            std::inplace_merge(merged.begin(), merged.begin() + held, merged.end());
        }
        if (merged.empty()) return;
        node.entries = int32_t(merged.size());
        merged.push_back(std::numeric_limits<double>::infinity());
        std::vector<Entry> catalogue;
        catalogue.reserve(merged.size());
        for (const double angle : merged) {
            for (int c = 0; c < 2; ++c)
                while (below[c] < lengths[c] && entries[c][below[c]].angle < angle) ++below[c];
            catalogue.push_back({angle, {below[0], below[1]}});
        }
        node.catalogue = int64_t(owner.entries_.size());
        owner.entries_.insert(owner.entries_.end(), catalogue.begin(), catalogue.end());
    }
};

ConvexLayers::ConvexLayers(int64_t size, const float* keys, const int64_t* ids) : StaticIndex(2, size, keys, ids) {
    Builder builder(*this, size, keys);
    const size_t positions = order_.size();
    blocks_.assign(2 * positions, std::numeric_limits<float>::quiet_NaN());
    for (size_t p = 0; p < positions; ++p) {
        if (order_[p] < 0) continue;
        for (size_t j = 0; j < 2; ++j)
            blocks_[p / kLanes * 2 * kLanes + j * kLanes + p % kLanes] = builder.placed[2 * p + j];
    }
    fences_.assign(nodes_.size() * kFences, 0);
    for (size_t i = 0; i < nodes_.size(); ++i)
        for (size_t c = 0; c < 2; ++c)
            if (nodes_[i].child[c] >= 0)
                std::copy_n(builder.fences[size_t(nodes_[i].child[c])].corners, 2 * kCorners,
                            fences_.data() + i * kFences + c * 2 * kCorners);
    if (!lanes_.empty()) lanes_.resize(positions / kLanes);
    if (!entries_.empty()) {
        const Node& root = nodes_[0];
        const int32_t parts = root.entries / kPart + 1;
        parts_ = parts / kAround;
        guide_.assign(size_t(parts) + 1, 0);
        for (int32_t i = 0; i < root.entries; ++i) ++guide_[part(catalogue(root)[i].angle) + 1];
        for (size_t p = 1; p < guide_.size(); ++p) guide_[p] += guide_[p - 1];
    }
    fence_slack_ = builder.lost + 64 * kUnit * largest();
}

double ConvexLayers::score(int64_t position, const Query& query) const {
    const float* at = blocks_.data() + position / kLanes * 2 * kLanes + position % kLanes;
    return query.q[0] * at[0] + query.q[1] * at[kLanes];
}

// Entries of the root below the angle: `part` is monotone, so entries of lower parts are below and none of higher ones.
int32_t ConvexLayers::locate(double angle) const {
    if (guide_.empty()) return 0;
    const Entry* first = catalogue(nodes_[0]);
    const int32_t* guide = guide_.data() + part(angle);
    const auto below = [](const Entry& entry, double angle) { return entry.angle < angle; };
    return int32_t(std::lower_bound(first + guide[0], first + guide[1], angle, below) - first);
}

// The same, from the entry of the parent: too far by fewer than kSampled.
int32_t ConvexLayers::follow(const Node& child, int32_t entry, double angle) const {
    const Entry* first = catalogue(child);
    while (entry > 0 && !(first[entry - 1].angle < angle)) --entry;
    return entry;
}

// How many of the entries below this one, the first that is not below an angle, are of the node's own edges: the
// others are one in kSampled of the children's.
int32_t ConvexLayers::own(const Node& node, int32_t entry) const {
    const Entry& at = catalogue(node)[entry];
    return entry - (at.child[0] + kSampled - 1) / kSampled - (at.child[1] + kSampled - 1) / kSampled;
}

// One query on its way down. A node is reached in stages, each of which asks for the memory of the next; several
// queries take turns, so that it has come by then.
struct ConvexLayers::Walk {
    enum Stage { kGuide, kRoot, kNode, kLinks, kVertices };
    struct Visit {
        int32_t node, entry;
    };
    const Query* query;
    double angle, budget;
    double outside;  // a child with all corners of its fence below this is
    double closing;  // a vertex below this is outside, and so are those beyond it in its layer
    Search wanted;
    Growable<PackedHit>* hits;
    int number;  // of the query in its tile
    bool scan;   // a scan is cheaper
    Stage stage;
    int top;
    Visit now;
    int64_t vertex;
    Visit stack[64];  // one a level and the levels halve
};

void ConvexLayers::start(Walk& walk, const Query& query, double threshold, Growable<PackedHit>& hits) const {
    hits.clear();
    walk.query = &query;
    // Between two sides of a fence a query is a sum of their directions with weights that are together at most 1.5 |q|.
    walk.outside = threshold - 1.5 * query.norm2 * fence_slack_;
    walk.closing = threshold - kAngleSlack * query.norm2 * largest();
    walk.budget = kScanShare * double(size()) * kKeyCost;
    walk.wanted = search(query, threshold);
    walk.hits = &hits;
    walk.scan = false;
    walk.stage = Walk::kNode;
    walk.top = 0;
    if (nodes_.empty()) return;
    walk.stack[walk.top++] = {0, 0};
    walk.angle = 0;
    if (guide_.empty()) return;
    walk.angle = std::atan2(query.q[1], query.q[0]);
    walk.stage = Walk::kGuide;
    __builtin_prefetch(guide_.data() + part(walk.angle));
}

bool ConvexLayers::step(Walk& walk, Counters& counters) const {
    constexpr int64_t kLine = 16;  // floats of a cache line
    constexpr int64_t kNear = 4;   // blocks on either side of the angle
    if (walk.stage == Walk::kGuide) {
        __builtin_prefetch(catalogue(nodes_[0]) + guide_[part(walk.angle)]);
        walk.stage = Walk::kRoot;
        return true;
    }
    if (walk.stage == Walk::kRoot) {
        walk.stack[0].entry = locate(walk.angle);
        walk.stage = Walk::kNode;
    }
    if (walk.stage == Walk::kNode) {
        if (!walk.top) return false;
        walk.now = walk.stack[--walk.top];
        const Node& node = nodes_[size_t(walk.now.node)];
        ++counters.nodes;
        const float* const fences = fences_.data() + size_t(walk.now.node) * kFences;
        for (size_t line = 0; line < kFences; line += kLine) __builtin_prefetch(fences + line);
        if (node.entries) __builtin_prefetch(catalogue(node) + walk.now.entry);
        if (!node.searched) {
            const float* const points = blocks_.data() + 2 * node.begin;
            for (int line = 0; line < 4; ++line) __builtin_prefetch(points + line * kLine);
            __builtin_prefetch(order_.data() + node.begin);
        }
        walk.stage = Walk::kLinks;
        return true;
    }
    const Node& node = nodes_[size_t(walk.now.node)];
    if (walk.stage == Walk::kLinks) {
        if (node.entries) walk.now.entry = follow(node, walk.now.entry, walk.angle);
        if (node.searched) {
            walk.vertex = own(node, walk.now.entry);
            const int64_t block = (node.begin + walk.vertex) / kLanes;
            for (int64_t near = block - kNear; near <= block + kNear; ++near)
                __builtin_prefetch(blocks_.data() + near * 2 * kLanes);
            for (int64_t near = block - kNear; near <= block + kNear; near += 2)
                __builtin_prefetch(order_.data() + near * kLanes);
            for (int64_t near = block - kNear; near <= block + kNear; near += kLanes)
                __builtin_prefetch(lanes_.data() + near);
            walk.stage = Walk::kVertices;
            return true;
        }
        if (scan_layers(walk, node)) open_children(walk, node);
        counters.scored += node.end - node.begin;
        walk.budget -= kNodeCost;
    } else {
        if (sweep_layers(walk, node, counters)) open_children(walk, node);
        walk.budget -= 2 * kNodeCost;
    }
    walk.stage = Walk::kNode;
    walk.scan = walk.budget < 0;
    return !walk.scan;
}

// Returns whether a point of the innermost layer is reported: then the last one found is.
bool ConvexLayers::scan_layers(Walk& walk, const Node& node) const {
    PackedHit* const hits = walk.hits->room(size_t(node.end - node.begin + kLanes));
    const size_t found = kernels().scan(blocks_.data(), 2, node.begin, node.end, walk.wanted, order_.data(), hits);
    if (!found) return false;
    walk.hits->added(found);
    walk.budget -= kHitCost * double(found);
    const int32_t last = int32_t(hits[found - 1] >> 32);
    int same = 0;
    for (int64_t p = node.inner; p < node.end; ++p) same |= order_[size_t(p)] == last;
    return same;
}

// From where the query's angle is among a node's own.
Sweep ConvexLayers::sweep(const Node& node, int64_t position) const {
    Sweep sweep;
    sweep.begin = node.begin / kLanes;
    sweep.end = (node.end + kLanes - 1) / kLanes;
    sweep.unseen = sweep.end - sweep.begin;
    if (position == node.end - node.begin) position = 0;
    sweep.next[0] = sweep.begin + position / kLanes;
    sweep.next[1] = (sweep.next[0] == sweep.begin ? sweep.end : sweep.next[0]) - 1;
    sweep.right = 0xffu << position % kLanes & 0xff;
    sweep.closed[0] = sweep.closed[1] = node.searched < kMerged ? ~uint64_t(0) << kLanes * node.searched : 0;
    sweep.reported = 0;
    return sweep;
}

// Returns whether a vertex of the innermost layer is reported.
bool ConvexLayers::sweep_layers(Walk& walk, const Node& node, Counters& counters) const {
    constexpr int64_t kMost = 32;  // blocks at once
    Sweep ring = sweep(node, walk.vertex);
    ring.closing = walk.closing;
    const int64_t blocks = ring.unseen;
    do {
        PackedHit* const hits = walk.hits->room(size_t((kMost + 1) * kLanes));
        const size_t found =
            kernels().sweep(blocks_.data(), lanes_.data(), ring, kMost, walk.wanted, order_.data(), hits);
        walk.hits->added(found);
        walk.budget -= kHitCost * double(found);
    } while ((ring.open(0) || ring.open(1)) && walk.budget >= 0);
    counters.scored += (blocks - ring.unseen) * kLanes;
    return ring.reported >> kLanes * (node.searched - 1) & 0xff;
}

// Offers vertices from the query's angle outwards, the better side first; returns the largest score on the innermost
// layer.
double ConvexLayers::top_layers(const Node& node, int64_t position, const Query& query, Best& best,
                                Counters& counters) const {
    constexpr double kLeast = -std::numeric_limits<double>::infinity();
    Sweep ring = sweep(node, position);
    const double slack = kAngleSlack * query.norm2 * largest();
    const int innermost = kLanes * (node.searched - 1);
    double high = kLeast, better[2] = {-kLeast, -kLeast};
    double scores[kLanes];
    while (ring.open(0) || ring.open(1)) {
        const int side = !ring.open(1) || (ring.open(0) && better[0] >= better[1]) ? 0 : 1;
        const int64_t block = ring.next[side];
        --ring.unseen;
        const unsigned on_right = side == 0 ? ring.right : 0;
        if (side == 0) {
            ring.next[0] = block + 1 == ring.end ? ring.begin : block + 1;
            ring.right = 0xff;
        } else {
            ring.next[1] = (block == ring.begin ? ring.end : block) - 1;
        }
        kernels().score(blocks_.data(), 2, block * kLanes, (block + 1) * kLanes, query.q.data(), scores);
        better[side] = kLeast;
        const uint64_t layers = lanes_[size_t(block)];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t p = block * kLanes + lane;
            if (p >= node.end) break;
            ++counters.scored;
            better[side] = std::max(better[side], scores[lane]);
            if (layers >> innermost >> lane & 1) high = std::max(high, scores[lane]);
            const int64_t position = order_[size_t(p)];
            if (scores[lane] >= best.threshold()) {
                if (!dead(position)) best.offer(scores[lane], id(position));
            } else if (scores[lane] < best.threshold() - slack) {
                ring.closed[on_right >> lane & 1 ? 0 : 1] |= layers & uint64_t(0x0101010101010101u) << lane;
            }
        }
    }
    return high;
}

void ConvexLayers::open_children(Walk& walk, const Node& node) const {
    const Entry at = node.entries ? catalogue(node)[walk.now.entry] : Entry{0, {0, 0}};
    const unsigned reached =
        kernels().reached(fences_.data() + size_t(walk.now.node) * kFences, walk.query->q.data(), walk.outside);
    for (int c = 0; c < 2; ++c) {
        if (node.child[c] < 0 || !(reached >> c & 1)) continue;
        __builtin_prefetch(nodes_.data() + node.child[c]);
        walk.stack[walk.top++] = {node.child[c], at.child[c]};
    }
}

void ConvexLayers::gather(const Tile& tile, Which which, Gathered* gathered, Counters& counters) const {
    constexpr int kTogether = 16;
    Walk walks[kTogether];
    int running = 0;
    while (which || running) {
        for (; which && running < kTogether; which &= which - 1) {
            Walk& walk = walks[running++];
            walk.number = __builtin_ctzll(which);
            start(walk, tile.queries[walk.number], tile.thresholds[walk.number], gathered[walk.number].hits);
        }
        for (int w = 0; w < running;) {
            if (step(walks[w], counters)) {
                ++w;
                continue;
            }
            gathered[walks[w].number].scan = walks[w].scan;
            if (w != --running) walks[w] = walks[running];
        }
    }
}

int64_t ConvexLayers::count(const Query& query, double threshold, Rows& rows) const {
    Walk walk;
    start(walk, query, threshold, rows.scratch);
    while (step(walk, rows.counters)) {}
    if (!walk.scan) return count_live(rows.scratch);
    return StaticIndex::count(query, threshold, rows);
}

void ConvexLayers::top(const Query& query, Best& best, Counters& counters) const {
    if (int64_t(best.missing()) >= size() / 8) return StaticIndex::top(query, best, counters);
    const double angle = std::atan2(query.q[1], query.q[0]);
    struct Visit {
        double high;  // the largest score on the innermost layer of the parent
        int32_t node, entry;
        bool operator<(const Visit& other) const { return high < other.high; }
    };
    std::priority_queue<Visit> visits;
    visits.push({std::numeric_limits<double>::infinity(), 0, locate(angle)});
    while (!visits.empty() && !(visits.top().high < best.threshold())) {
        const Visit visit = visits.top();
        visits.pop();
        const Node& node = nodes_[size_t(visit.node)];
        ++counters.nodes;
        double high = -std::numeric_limits<double>::infinity();
        if (!node.searched) {
            offer_range(blocks_.data(), order_.data(), node.begin, node.end, query, best, counters);
            for (int64_t p = node.inner; p < node.end; ++p) high = std::max(high, score(p, query));
        } else {
            high = top_layers(node, own(node, visit.entry), query, best, counters);
        }
        if (high < best.threshold()) continue;
        for (int c = 0; c < 2; ++c) {
            if (node.child[c] < 0) continue;
            const Node& child = nodes_[size_t(node.child[c])];
            const int32_t entry = child.entries ? follow(child, catalogue(node)[visit.entry].child[c], angle) : 0;
            visits.push({high, node.child[c], entry});
        }
    }
}

int64_t ConvexLayers::nbytes() const {
    return StaticIndex::nbytes() +
           int64_t(nodes_.size() * sizeof(Node) + blocks_.size() * sizeof(float) + order_.size() * sizeof(int32_t) +
                   fences_.size() * sizeof(float) + lanes_.size() * sizeof(uint64_t) + entries_.size() * sizeof(Entry) +
                   guide_.size() * sizeof(int32_t));
}

}  // namespace hsr::tree

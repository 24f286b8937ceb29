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
constexpr int kLayers = 24;        // most layers in a node
constexpr int32_t kSampled = 4;    // every kSampled-th entry of a child's catalogue is in its parent's
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
        for (int layer = 0; begin < end && layer < kLayers; ++layer) {
            const int64_t held = int64_t(owner.order_.size()) - node.begin;
            if (held >= kScanned * 3 / 4) break;
            peel(begin, end);
            if (layer == 0) fence = enclose();
            const bool large = vertices.size() > size_t(kScanned);
            if (large && layer > 0) {  // a large layer has a node of its own
                std::fill(taken.begin() + begin, taken.begin() + end, uint8_t(0));
                break;
            }
            node.searched = large;
            node.inner = int64_t(owner.order_.size());
            for (const Point& vertex : vertices) place(vertex);
            end = remove(begin, end);
            if (large) break;
        }
        node.end = int64_t(owner.order_.size());
        while (owner.order_.size() % kLanes) owner.order_.push_back(-1);  // nodes start at a block
        if (begin < end) {
            const int64_t middle = begin + (end - begin + 1) / 2;
            node.child[0] = build(begin, middle);
            if (middle < end) node.child[1] = build(middle, end);
        }
        owner.nodes_[size_t(index)] = node;
        fences[size_t(index)] = fence;
        link(owner.nodes_[size_t(index)]);
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

    // Entry i of a searched layer is the angle of the outward normal of the edge that leaves vertex i; vertices are
    // rotated so that the angles ascend. Vertex i is extreme between entry i - 1 and entry i.
    void own_angles(const Node& node, std::vector<double>& own) {
        const int64_t n = node.end - node.begin;
        own.resize(size_t(n));
        const auto fill = [&] {
            for (int64_t i = 0; i < n; ++i) {
                const float* a = &placed[size_t(2 * (node.begin + i))];
                const float* b = &placed[size_t(2 * (node.begin + (i + 1) % n))];
                own[size_t(i)] = std::atan2(double(a[0]) - b[0], double(b[1]) - a[1]);
            }
        };
        fill();
        const int64_t first = std::min_element(own.begin(), own.end()) - own.begin();
        std::rotate(owner.order_.begin() + node.begin, owner.order_.begin() + node.begin + first,
                    owner.order_.begin() + node.end);
        std::rotate(placed.begin() + 2 * node.begin, placed.begin() + 2 * (node.begin + first),
                    placed.begin() + 2 * node.end);
        fill();
        for (size_t i = 1; i < own.size(); ++i) own[i] = std::max(own[i], own[i - 1]);  // rounding of atan2
    }

    void link(Node& node) {
        std::vector<double> own, merged;
        if (node.searched) own_angles(node, own);
        const double* sources[3] = {own.data(), nullptr, nullptr};
        int32_t lengths[3] = {int32_t(own.size()), 0, 0};
        merged = own;
        for (int c = 0; c < 2; ++c) {
            if (node.child[c] < 0) continue;
            const Node& child = owner.nodes_[size_t(node.child[c])];
            sources[c + 1] = owner.angles_.data() + child.catalogue;
            lengths[c + 1] = child.entries;
            for (int32_t i = 0; i < child.entries; i += kSampled) merged.push_back(sources[c + 1][i]);
        }
        if (merged.empty()) return;
        std::sort(merged.begin(), merged.end());
        node.entries = int32_t(merged.size());
        std::vector<Link> links;
        int32_t below[3] = {};
        for (size_t i = 0; i <= merged.size(); ++i) {
            for (int s = 0; s < 3; ++s)
                while (below[s] < lengths[s] && (i == merged.size() || sources[s][below[s]] < merged[i])) ++below[s];
            links.push_back({below[0], {below[1], below[2]}});
        }
        node.catalogue = int64_t(owner.angles_.size());
        owner.angles_.insert(owner.angles_.end(), merged.begin(), merged.end());
        owner.angles_.push_back(std::numeric_limits<double>::infinity());  // keeps links and angles aligned
        owner.links_.insert(owner.links_.end(), links.begin(), links.end());
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
    fence_slack_ = builder.lost + 64 * kUnit * largest();
}

double ConvexLayers::score(int64_t position, const Query& query) const {
    const float* at = blocks_.data() + position / kLanes * 2 * kLanes + position % kLanes;
    return query.q[0] * at[0] + query.q[1] * at[kLanes];
}

ConvexLayers::Link ConvexLayers::link(const Node& node, int32_t entry) const {
    return links_[size_t(node.catalogue + entry)];
}

// Entries of the catalogue that are below the angle.
int32_t ConvexLayers::locate(const Node& node, double angle) const {
    const double* first = angles_.data() + node.catalogue;
    return int32_t(std::lower_bound(first, first + node.entries, angle) - first);
}

// The same, from the link of the parent: too far by fewer than kSampled entries.
int32_t ConvexLayers::follow(const Node& child, int32_t entry, double angle) const {
    const double* first = angles_.data() + child.catalogue;
    while (entry > 0 && !(first[entry - 1] < angle)) --entry;
    return entry;
}

// The vertex with the largest exact score, from the i-th, where the angle says, corrected by exact comparisons.
int64_t ConvexLayers::extreme(const Node& node, int64_t i, const Query& query) const {
    const int64_t n = node.end - node.begin;
    const auto at = [&](int64_t i) {
        const int64_t p = node.begin + i;
        return blocks_.data() + p / kLanes * 2 * kLanes + p % kLanes;
    };
    const auto rises = [&](int64_t from, int64_t to) {
        const float *a = at(from), *b = at(to);
        return compare_along(query.q[0], query.q[1], a[0], a[kLanes], b[0], b[kLanes]) > 0;
    };
    while (rises(i, (i + 1) % n)) i = (i + 1) % n;
    while (rises(i, (i + n - 1) % n)) i = (i + n - 1) % n;
    return node.begin + i;
}

// One query on its way down. A node is reached in stages, each of which asks for the memory of the next; several
// queries take turns, so that it has come by then.
struct ConvexLayers::Walk {
    enum Stage { kNode, kLinks, kVertices };
    struct Visit {
        int32_t node, entry;
    };
    const Query* query;
    double threshold, angle, budget;
    double outside;        // a child with all corners of its fence below this is
    Search wanted, plain;  // without a screen
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
    walk.threshold = threshold;
    // Between two sides of a fence a query is a sum of their directions with weights that are together at most 1.5 |q|.
    walk.outside = threshold - 1.5 * query.norm2 * fence_slack_;
    walk.budget = kScanShare * double(size()) * kKeyCost;
    walk.wanted = walk.plain = search(query, threshold);
    walk.plain.query32 = nullptr;
    walk.hits = &hits;
    walk.scan = false;
    walk.stage = Walk::kNode;
    walk.top = 0;
    if (nodes_.empty()) return;
    walk.angle = angles_.empty() ? 0 : std::atan2(query.q[1], query.q[0]);
    walk.stack[walk.top++] = {0, locate(nodes_[0], walk.angle)};
}

bool ConvexLayers::step(Walk& walk, Counters& counters) const {
    constexpr int64_t kLine = 16;  // floats of a cache line
    if (walk.stage == Walk::kNode) {
        if (!walk.top) return false;
        walk.now = walk.stack[--walk.top];
        const Node& node = nodes_[size_t(walk.now.node)];
        ++counters.nodes;
        const float* const fences = fences_.data() + size_t(walk.now.node) * kFences;
        for (size_t line = 0; line < kFences; line += kLine) __builtin_prefetch(fences + line);
        if (node.entries) {
            __builtin_prefetch(angles_.data() + node.catalogue + walk.now.entry);
            __builtin_prefetch(links_.data() + node.catalogue + walk.now.entry);
        }
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
            walk.vertex = link(node, walk.now.entry).own;
            if (walk.vertex == node.end - node.begin) walk.vertex = 0;
            const int64_t block = (node.begin + walk.vertex) / kLanes;
            for (int64_t near = block - 1; near <= block + 1; ++near)
                __builtin_prefetch(blocks_.data() + near * 2 * kLanes);
            __builtin_prefetch(order_.data() + (block - 1) * kLanes);
            __builtin_prefetch(order_.data() + (block + 1) * kLanes);
            walk.stage = Walk::kVertices;
            return true;
        }
        if (scan_layers(walk, node)) open_children(walk, node);
        counters.scored += node.end - node.begin;
        walk.budget -= kNodeCost;
    } else {
        if (report_layer(walk, node, counters)) open_children(walk, node);
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

// The reported vertices, a run around the extreme one; returns how many. Most runs lie within the blocks beside the
// vertex that the angle says.
int64_t ConvexLayers::report_layer(Walk& walk, const Node& node, Counters& counters) const {
    const int64_t n = node.end - node.begin, near = (node.begin + walk.vertex) / kLanes * kLanes;
    const int64_t begin = std::max(node.begin, near - kLanes), end = std::min(node.end, near + 2 * kLanes);
    PackedHit* const hits = walk.hits->room(size_t(end - begin + kLanes));
    const auto found = int64_t(kernels().scan(blocks_.data(), 2, begin, end, walk.plain, order_.data(), hits));
    counters.scored += end - begin;
    if (!found) {
        const int64_t top = extreme(node, walk.vertex, *walk.query);
        const int64_t right = walk_side(walk, node, top, 1, n, counters);
        return right ? right + walk_side(walk, node, before(node, top), -1, n - right, counters) : 0;
    }
    walk.hits->added(size_t(found));
    walk.budget -= kHitCost * double(found);
    const int64_t outside = n - (end - begin), left = walk_side(walk, node, before(node, begin), -1, outside, counters);
    return found + left + walk_side(walk, node, after(node, end - 1), 1, outside - left, counters);
}

// Reports vertices from `position` on to one side, at most so many, up to one outside.
int64_t ConvexLayers::walk_side(Walk& walk, const Node& node, int64_t position, int step, int64_t most,
                                Counters& counters) const {
    for (int64_t walked = 0; walked < most; ++walked) {
        const double found = score(position, *walk.query);
        ++counters.scored;
        if (!(found >= walk.threshold) || walk.budget < 0) return walked;
        const float rounded = float(found);
        uint32_t bits;
        __builtin_memcpy(&bits, &rounded, 4);
        walk.hits->push(uint64_t(uint32_t(order_[size_t(position)])) << 32 | bits);
        walk.budget -= kHitCost;
        position = step > 0 ? after(node, position) : before(node, position);
    }
    return most;
}

void ConvexLayers::open_children(Walk& walk, const Node& node) const {
    const Link below = node.entries ? link(node, walk.now.entry) : Link{0, {0, 0}};
    const unsigned reached =
        kernels().reached(fences_.data() + size_t(walk.now.node) * kFences, walk.query->q.data(), walk.outside);
    for (int c = 0; c < 2; ++c) {
        if (node.child[c] < 0 || !(reached >> c & 1)) continue;
        __builtin_prefetch(nodes_.data() + node.child[c]);
        walk.stack[walk.top++] = {node.child[c], below.child[c]};
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
    visits.push({std::numeric_limits<double>::infinity(), 0, locate(nodes_[0], angle)});
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
            // From the extreme vertex outwards on both sides, the better side first.
            const int64_t n = node.end - node.begin;
            int64_t left = extreme(node, link(node, visit.entry).own % n, query), right = left;
            high = score(left, query);
            const auto offer = [&](int64_t p) {
                const int64_t position = order_[size_t(p)];
                if (!dead(position)) best.offer(score(p, query), id(position));
            };
            offer(left);
            double on_left = score(before(node, left), query), on_right = score(after(node, right), query);
            for (int64_t walked = 1; walked < n; ++walked) {
                ++counters.scored;
                if (std::max(on_left, on_right) < best.threshold()) break;
                if (on_left > on_right) {
                    offer(left = before(node, left));
                    on_left = score(before(node, left), query);
                } else {
                    offer(right = after(node, right));
                    on_right = score(after(node, right), query);
                }
            }
        }
        if (high < best.threshold()) continue;
        for (int c = 0; c < 2; ++c) {
            if (node.child[c] < 0) continue;
            const Node& child = nodes_[size_t(node.child[c])];
            const int32_t entry = child.entries ? follow(child, link(node, visit.entry).child[c], angle) : 0;
            visits.push({high, node.child[c], entry});
        }
    }
}

int64_t ConvexLayers::nbytes() const {
    return StaticIndex::nbytes() +
           int64_t(nodes_.size() * sizeof(Node) + blocks_.size() * sizeof(float) + order_.size() * sizeof(int32_t) +
                   fences_.size() * sizeof(float) + angles_.size() * sizeof(double) + links_.size() * sizeof(Link));
}

}  // namespace hsr::tree

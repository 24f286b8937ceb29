#include "tree/partition_tree.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <queue>

namespace hsr::tree {
namespace {

// Costs in nanoseconds, measured on one core of a server CPU; only their ratios matter.
constexpr double kHitCost = 5.0;                       // to sort a key that a scan would have found in order
double visit_cost(int dim) { return 30 + 2.5 * dim; }  // of a node, or of a run of leaves
double key_cost(int dim) { return 0.1 + 0.12 * dim; }  // of a key in a leaf
double scan_cost(int dim, int64_t size) {              // of all keys, in order
    constexpr double kCached = 1.5e6;                  // bytes that stay in the second-level cache
    return double(size) * dim * (4.0 * double(size) * dim < kCached ? 0.06 : 0.14);
}
constexpr double kHeadStart = 0.25;  // of a scan, that a query may be behind the pace of one
constexpr int64_t kSample = 256;     // keys that tell a deep query
constexpr int64_t kDeep = 16;        // of them in the half-space: sorting the output costs more than a scan

float round_up(double x) {
    const float nearest = float(x);
    return double(nearest) >= x ? nearest : std::nextafter(nearest, std::numeric_limits<float>::infinity());
}

struct Item {
    float key;
    int32_t row;
};

// The direction of largest variance of a sample of rows [count][dim], by a few steps of power iteration.
void principal_direction(int dim, const float* rows, const Item* items, int64_t count, float* direction) {
    constexpr int64_t kRows = 128;
    const int64_t take = std::min(count, kRows);
    thread_local std::vector<double> centred, mean, covariance, next, axis;
    centred.resize(size_t(take * dim));
    mean.assign(size_t(dim), 0);
    covariance.assign(size_t(dim * dim), 0);
    next.resize(size_t(dim));
    for (int64_t i = 0; i < take; ++i) {
        const float* row = rows + int64_t(items[i * count / take].row) * dim;
        for (int j = 0; j < dim; ++j) mean[size_t(j)] += (centred[size_t(i * dim + j)] = row[j]);
    }
    for (double& m : mean) m /= double(take);
    for (int64_t i = 0; i < take; ++i) {
        double* row = centred.data() + i * dim;
        for (int j = 0; j < dim; ++j) row[j] -= mean[size_t(j)];
        for (int j = 0; j < dim; ++j)
            for (int k = 0; k <= j; ++k) covariance[size_t(j * dim + k)] += row[j] * row[k];
    }
    int widest = 0;
    for (int j = 0; j < dim; ++j) {
        for (int k = 0; k < j; ++k) covariance[size_t(k * dim + j)] = covariance[size_t(j * dim + k)];
        if (covariance[size_t(j * dim + j)] > covariance[size_t(widest * dim + widest)]) widest = j;
    }
    axis.assign(covariance.begin() + widest * dim, covariance.begin() + (widest + 1) * dim);
    for (int step = 0;; ++step) {
        double largest = 0;
        for (double x : axis) largest = std::max(largest, std::fabs(x));
        if (!(largest > 0)) {  // all equal: any direction
            axis.assign(size_t(dim), 0);
            axis[0] = largest = 1;
        }
        for (double& x : axis) x /= largest;
        if (step == 6) break;
        for (int j = 0; j < dim; ++j) {
            next[size_t(j)] = 0;
            for (int k = 0; k < dim; ++k) next[size_t(j)] += covariance[size_t(j * dim + k)] * axis[size_t(k)];
        }
        std::swap(axis, next);
    }
    for (int j = 0; j < dim; ++j) direction[j] = float(axis[size_t(j)]) / float(dim);
}

template <int D>
void project(int dim, const float* rows, const float* direction, Item* items, int64_t count) {
    const int d = D ? D : dim;
    for (int64_t i = 0; i < count; ++i) {
        const float* row = rows + int64_t(items[i].row) * d;
        float key = row[0] * direction[0];
        for (int j = 1; j < d; ++j) key += row[j] * direction[j];
        items[i].key = key;
    }
}

}  // namespace

// Cuts runs of keys into nodes. `rows` is a copy of the keys that follows the tree order node by node, so that
// small cells are contiguous when they are cut.
struct PartitionTree::Builder {
    PartitionTree& tree;
    int dim;
    std::vector<float> rows, spare;
    std::vector<int32_t> spare_order;
    std::vector<Item> items;

    Builder(PartitionTree& owner, const float* keys, int64_t size)
        : tree(owner), dim(owner.dim()), rows(keys, keys + size * owner.dim()), items(size_t(size)) {
        tree.order_.resize(size_t(size));
        for (int64_t i = 0; i < size; ++i) {
            tree.order_[size_t(i)] = int32_t(i);
            items[size_t(i)].row = int32_t(i);
        }
        if (size) build(0, int32_t(size));
    }

    int32_t build(int32_t begin, int32_t end) {
        const size_t index = tree.nodes_.size();
        tree.nodes_.emplace_back();
        Node node;
        if (!cut_by_frame(node, begin, end)) {
            int64_t child_size = tree.leaf_size_;
            while (child_size * kFan < end - begin) child_size *= kFan;
            halve(node, begin, end, int32_t(child_size));
        }
        settle(begin, end);
        for (int c = 0; c < node.children; ++c) {
            node.live[c] = node.end[c] - node.begin[c];
            node.child[c] = node.live[c] > tree.leaf_size_ ? build(node.begin[c], node.end[c]) : -1;
        }
        tree.nodes_[index] = node;
        return int32_t(index);
    }

    void add_child(Node& node, int32_t begin, int32_t end) {
        node.begin[node.children] = begin;
        node.end[node.children++] = end;
    }

    // All children but the last are full, so the bottom nodes are.
    void halve(Node& node, int32_t begin, int32_t end, int32_t child_size) {
        const int32_t children = (end - begin + child_size - 1) / child_size;
        if (children <= 1) return add_child(node, begin, end);
        const int32_t middle = begin + (children + 1) / 2 * child_size;
        thread_local std::vector<float> direction;
        direction.resize(size_t(dim));
        principal_direction(dim, rows.data(), items.data() + begin, end - begin, direction.data());
        Item* run = items.data() + begin;
        switch (dim) {
            case 2: project<2>(dim, rows.data(), direction.data(), run, end - begin); break;
            case 3: project<3>(dim, rows.data(), direction.data(), run, end - begin); break;
            case 4: project<4>(dim, rows.data(), direction.data(), run, end - begin); break;
            default: project<0>(dim, rows.data(), direction.data(), run, end - begin);
        }
        std::nth_element(items.begin() + begin, items.begin() + middle, items.begin() + end,
                         [](const Item& a, const Item& b) { return a.key < b.key; });
        halve(node, begin, middle, child_size);
        halve(node, middle, end, child_size);
    }

    bool cut_by_frame(Node& node, int32_t begin, int32_t end) {
        if (dim < 2 || dim > 3 || end - begin <= kFrameCell) return false;
        std::vector<int32_t> members;
        for (int32_t i = begin; i < end; ++i) members.push_back(items[size_t(i)].row);
        Frame frame;
        std::vector<uint8_t> cells;
        if (!equipartition(dim, rows.data(), members.data(), end - begin, frame, cells)) return false;
        int32_t starts[kFan + 1] = {};
        for (uint8_t cell : cells) ++starts[cell + 1];
        for (int c = 0; c < kFan; ++c) starts[c + 1] += starts[c];
        for (int c = 0; c < 1 << dim; ++c) add_child(node, begin + starts[c], begin + starts[c + 1]);
        for (size_t i = 0; i < members.size(); ++i) items[size_t(begin + starts[cells[i]]++)].row = members[i];
        node.frame = int32_t(tree.frames_.size());
        tree.frames_.push_back(frame);
        return true;
    }

    // Moves the rows of a node into the order its cuts gave.
    void settle(int32_t begin, int32_t end) {
        spare.resize(size_t(end - begin) * size_t(dim));
        spare_order.resize(size_t(end - begin));
        for (int32_t i = begin; i < end; ++i) {
            const int32_t row = items[size_t(i)].row;
            const float* from = rows.data() + int64_t(row) * dim;
            float* to = spare.data() + int64_t(i - begin) * dim;
            for (int j = 0; j < dim; ++j) to[j] = from[j];
            spare_order[size_t(i - begin)] = tree.order_[size_t(row)];
            items[size_t(i)].row = i;
        }
        std::copy(spare.begin(), spare.end(), rows.begin() + int64_t(begin) * dim);
        std::copy(spare_order.begin(), spare_order.end(), tree.order_.begin() + begin);
    }

    void bound(const Node& node, float* volumes) const {
        std::vector<double> low(size_t(dim), 0), high(size_t(dim), 0), centre(size_t(dim), 0);
        for (int c = 0; c < node.children; ++c) {
            const float* first = rows.data() + int64_t(node.begin[c]) * dim;
            const float* last = rows.data() + int64_t(node.end[c]) * dim;
            for (int j = 0; j < dim; ++j) low[size_t(j)] = high[size_t(j)] = first < last ? first[j] : 0;
            for (const float* row = first; row < last; row += dim)
                for (int j = 0; j < dim; ++j) {
                    low[size_t(j)] = std::min(low[size_t(j)], double(row[j]));
                    high[size_t(j)] = std::max(high[size_t(j)], double(row[j]));
                }
            for (int j = 0; j < dim; ++j) {
                const float middle = float((low[size_t(j)] + high[size_t(j)]) / 2);
                centre[size_t(j)] = middle;
                volumes[j * kFan + c] = middle;
                volumes[(dim + j) * kFan + c] = round_up(std::max(high[size_t(j)] - middle, middle - low[size_t(j)]));
            }
            double largest = 0;
            for (const float* row = first; row < last; row += dim) {
                double square = 0;
                for (int j = 0; j < dim; ++j) square += (row[j] - centre[size_t(j)]) * (row[j] - centre[size_t(j)]);
                largest = std::max(largest, square);
            }
            volumes[2 * dim * kFan + c] = round_up(std::sqrt(largest) * (1 + (dim + 4) * kUnit));
        }
        for (int c = node.children; c < kFan; ++c)
            for (int j = 0; j <= 2 * dim; ++j) volumes[j * kFan + c] = 0;
    }
};

PartitionTree::PartitionTree(int dim, int64_t size, const float* keys, const int64_t* ids, int leaf_size)
    : StaticIndex(dim, size, keys, ids), leaf_size_(leaf_size) {
    std::vector<float> rotated;
    axes_ = principal_frame(dim, keys, size, rotated);
    Builder builder(*this, axes_ ? rotated.data() : keys, size);
    volumes_.resize(nodes_.size() * size_t(2 * dim + 1) * kFan);
    for (size_t i = 0; i < nodes_.size(); ++i) {
        const Node& node = nodes_[i];
        builder.bound(node, volumes_.data() + i * size_t(2 * dim + 1) * kFan);
        if (node.frame < 0) continue;
        for (int c = 0; c < node.children; ++c)
            bound_cell(frames_[size_t(node.frame)], dim, c, builder.rows.data() + int64_t(node.begin[c]) * dim,
                       node.end[c] - node.begin[c]);
    }
    leaves_ = blocked(dim, keys, order_.data(), size);

    // Rounding of a bound and of a score. Let M be the largest coordinate, u the unit. Centres are at most M,
    // half-widths 2M, radii 2M sqrt(d). The terms of <q, c> +- sum |q_j| h_j sum to at most 3M |q|_1 and see at most
    // 2d + 3 roundings; |q| r is at most 2M sqrt(d) |q|_1 with d + 4; a score M |q|_1 with d. Together less than
    // u M |q|_1 16 sqrt(d) (d + 2).
    if (size >= 16 * kSample) {
        std::vector<int32_t> spread;
        for (int64_t i = 0; i < kSample; ++i) spread.push_back(int32_t(i * size / kSample));
        sample_ = blocked(dim, keys, spread.data(), kSample);
    }
    double reach = largest();
    for (float y : rotated) reach = std::max(reach, std::fabs(double(y)));
    slack_ = kUnit * reach * 16 * std::sqrt(double(dim)) * (dim + 2);
}

struct PartitionTree::Bounds {
    double low[kFan], high[kFan];
    // Written so that a NaN, from an infinite radius times 0, opens the cell.
    bool outside(int c, double threshold) const { return high[c] < threshold; }
    bool inside(int c, double threshold) const { return low[c] >= threshold; }
};

// With y the rotated key and r the residual, <q, x> = <q, mean> + <axes q, y> + <q, r>. Rounding: axes q, <q, mean> and
// their sum are sums of d terms that are at most |q|_1 reach together, with at most d + 2 roundings each.
PartitionTree::View PartitionTree::view(const Query& query) const {
    if (!axes_) return {query, 0.0, slack_ * query.norm1};
    const size_t d = size_t(dim());
    std::vector<double> turned(d, 0);
    double shift = 0;
    for (size_t j = 0; j < d; ++j) {
        shift += query.q[j] * axes_.mean[j];
        for (size_t k = 0; k < d; ++k) turned[j] += axes_.axes[j * d + k] * query.q[k];
    }
    View view{Query(std::move(turned)), shift, 0};
    view.slack = slack_ * std::max(view.query.norm1, query.norm1) + axes_.residual * query.norm2 * (1 + 1e-12) +
                 4 * kUnit * (dim() + 2) * query.norm1 * axes_.reach;
    return view;
}

void PartitionTree::bound(const Node& node, size_t index, const View& view, Bounds& result) const {
    const Query& query = view.query;
    double middle[kFan], spread[kFan];
    kernels().bounds(volumes(index), dim(), query.q.data(), query.magnitude.data(), query.norm2, middle, spread);
    const double slack = view.slack;
    for (int c = 0; c < kFan; ++c) {
        result.low[c] = view.shift + middle[c] - spread[c] - slack;
        result.high[c] = view.shift + middle[c] + spread[c] + slack;
    }
    if (node.frame < 0) return;
    const Frame& frame = frames_[size_t(node.frame)];
    double at_apex = view.shift, slope[3];
    for (int j = 0; j < dim(); ++j) at_apex += query.q[size_t(j)] * frame.apex[j];
    for (int i = 0; i < dim(); ++i) {
        slope[i] = 0;
        for (int j = 0; j < dim(); ++j) slope[i] += query.q[size_t(j)] * frame.edge[i][j];
    }
    for (int c = 0; c < node.children; ++c) {
        const double margin = frame.residual[c] * query.norm2 + slack;
        double low = at_apex - margin, high = at_apex + margin;
        for (int i = 0; i < dim(); ++i) {
            const double a = slope[i] * frame.low[c][i], b = slope[i] * frame.high[c][i];
            low += std::min(a, b);
            high += std::max(a, b);
        }
        if (low > result.low[c]) result.low[c] = low;
        if (high < result.high[c]) result.high[c] = high;
    }
}

// Children are opened in the order of their positions, so that everything before `begin` of the next node is
// settled. A query that is behind the pace of a scan by kHeadStart scans the rest: it costs at most so much more.
bool PartitionTree::collect(const Query& query, double threshold, Rows& rows, bool always) const {
    const Search wanted = search(query, threshold);
    const Search everything = search(query, -std::numeric_limits<double>::infinity());
    if (!always && size() >= 16 * kSample && kernels().count(sample_.data(), dim(), 0, kSample, wanted) >= kDeep)
        return false;
    const double each_key = key_cost(dim()), each_visit = visit_cost(dim());
    const double scan = scan_cost(dim(), size()), pace = scan / double(std::max<int64_t>(size(), 1));
    double spent = always ? -std::numeric_limits<double>::infinity() : -kHeadStart * scan;
    const View seen = view(query);
    int32_t stack[kFan * 12];  // 8^11 leaves are more than int32 positions
    int top = 0;
    rows.scratch.clear();
    const auto take = [&](int32_t begin, int32_t end, const Search& which) {
        PackedHit* room = rows.scratch.room(size_t(end - begin + kLanes));
        const size_t found = kernels().scan(leaves_.data(), dim(), begin, end, which, order_.data(), room);
        rows.scratch.added(found);
        rows.counters.scored += end - begin;
        spent += each_visit + each_key * double(end - begin) + kHitCost * double(found);
    };
    if (!nodes_.empty()) stack[top++] = 0;
    while (top) {
        const size_t index = size_t(stack[--top]);
        const Node& node = nodes_[index];
        if (spent > pace * node.begin[0]) {
            take(node.begin[0], int32_t(size()), wanted);
            break;
        }
        Bounds bounds{};
        bound(node, index, seen, bounds);
        ++rows.counters.nodes;
        spent += each_visit;
        const int first = top;
        for (int c = 0; c < node.children; ++c) {
            if (bounds.outside(c, threshold)) continue;
            const int32_t begin = node.begin[c];
            int32_t end = node.end[c];
            if (bounds.inside(c, threshold)) {
                take(begin, end, everything);
            } else if (node.child[c] < 0) {
                // Neighbouring crossed leaves are one run.
                for (; c + 1 < node.children && node.child[c + 1] < 0 && !bounds.outside(c + 1, threshold) &&
                       !bounds.inside(c + 1, threshold);
                     ++c)
                    end = node.end[c + 1];
                ++rows.counters.nodes;
                take(begin, end, wanted);
            } else {
                stack[top++] = node.child[c];
                __builtin_prefetch(&nodes_[size_t(node.child[c])]);
                __builtin_prefetch(volumes(size_t(node.child[c])));
            }
        }
        std::reverse(stack + first, stack + top);
    }
    return true;
}

void PartitionTree::report(const Query& query, double threshold, Rows& rows) const {
    if (collect(query, threshold, rows, false))
        append_sorted(rows);
    else
        StaticIndex::report(query, threshold, rows);
}

int64_t PartitionTree::count(const Query& query, double threshold, Rows& rows) const {
    const double each_key = key_cost(dim()), each_visit = visit_cost(dim());
    double budget = kHeadStart * scan_cost(dim(), size());
    int32_t stack[kFan * 12];
    int top = 0;
    int64_t total = 0;
    const View seen = view(query);
    const Search wanted = search(query, threshold);
    if (!nodes_.empty()) stack[top++] = 0;
    while (top) {
        const size_t index = size_t(stack[--top]);
        const Node& node = nodes_[index];
        Bounds bounds{};
        bound(node, index, seen, bounds);
        ++rows.counters.nodes;
        budget -= each_visit;
        for (int c = 0; c < node.children; ++c) {
            if (bounds.outside(c, threshold)) continue;
            const int32_t begin = node.begin[c], end = node.end[c];
            if (bounds.inside(c, threshold)) {
                total += node.live[c];
            } else if (node.child[c] >= 0) {
                stack[top++] = node.child[c];
            } else {
                ++rows.counters.nodes;
                rows.counters.scored += end - begin;
                budget -= each_visit + each_key * double(end - begin);
                if (node.live[c] == end - begin) {
                    total += kernels().count(leaves_.data(), dim(), begin, end, wanted);
                    continue;
                }
                rows.scratch.clear();
                PackedHit* room = rows.scratch.room(size_t(end - begin + kLanes));
                rows.scratch.added(kernels().scan(leaves_.data(), dim(), begin, end, wanted, order_.data(), room));
                total += count_live(rows);
            }
        }
        if (budget < 0) return StaticIndex::count(query, threshold, rows);
    }
    return total;
}

void PartitionTree::top(const Query& query, Best& best, Counters& counters) const {
    if (int64_t(best.missing()) >= size() / 8) return StaticIndex::top(query, best, counters);
    struct Cell {
        double high;
        int32_t node, begin, end;  // a node, or the leaf [begin, end)
        bool operator<(const Cell& other) const { return high < other.high; }
    };
    const View seen = view(query);
    std::priority_queue<Cell> cells;
    cells.push({std::numeric_limits<double>::infinity(), 0, 0, 0});
    while (!cells.empty()) {
        const Cell cell = cells.top();
        if (cell.high < best.threshold()) break;
        cells.pop();
        ++counters.nodes;
        if (cell.node < 0) {
            offer_range(leaves_.data(), order_.data(), cell.begin, cell.end, query, best, counters);
            continue;
        }
        const Node& node = nodes_[size_t(cell.node)];
        Bounds bounds{};
        bound(node, size_t(cell.node), seen, bounds);
        for (int c = 0; c < node.children; ++c) {
            const double high = bounds.high[c] == bounds.high[c] ? bounds.high[c] : cell.high;
            if (!(high < best.threshold())) cells.push({high, node.child[c], node.begin[c], node.end[c]});
        }
    }
}

void PartitionTree::erase(int64_t position) {
    StaticIndex::erase(position);
    if (place_.empty()) {
        place_.resize(order_.size());
        for (size_t p = 0; p < order_.size(); ++p) place_[size_t(order_[p])] = int32_t(p);
    }
    const int32_t place = place_[size_t(position)];
    for (int32_t index = 0; index >= 0;) {
        Node& node = nodes_[size_t(index)];
        int c = 0;
        while (place >= node.end[c] || place < node.begin[c]) ++c;
        --node.live[c];
        index = node.child[c];
    }
}

int64_t PartitionTree::nbytes() const {
    return StaticIndex::nbytes() + int64_t(nodes_.size() * sizeof(Node) + frames_.size() * sizeof(Frame) +
                                           (volumes_.size() + leaves_.size() + sample_.size()) * sizeof(float) +
                                           (order_.size() + place_.size()) * sizeof(int32_t));
}

}  // namespace hsr::tree

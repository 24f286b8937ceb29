#include "tree/partition_tree.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <queue>
#include <random>

#include "threads.h"

namespace hsr::tree {
namespace {

// Costs in nanoseconds, measured on one core of a server CPU; only their ratios matter.
constexpr double kHitCost = 5.0;                        // to sort a key that a scan would have found in order
double visit_cost(int dim) { return 30 + 2.5 * dim; }   // of a node, or of a run of leaves
double key_cost(int dim) { return 0.1 + 0.12 * dim; }   // of a key in a leaf
double code_cost(int dim) { return 0.1 + 0.05 * dim; }  // of a key in a leaf of codes
double scan_cost(int dim, int64_t size) {               // of all keys, in order
    constexpr double kCached = 1.5e6;                   // bytes that stay in the second-level cache
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
template <int D>
void principal_direction(int dim, const float* rows, const Item* items, int64_t count, float* direction) {
    constexpr int64_t kRows = 128;
    const int d = D ? D : dim;
    const int64_t take = std::min(count, kRows);
    thread_local std::vector<double> room;
    room.assign(size_t(d * (take + d + 3)), 0);
    double *const mean = room.data(), *const covariance = mean + d, *axis = covariance + d * d, *next = axis + d;
    double* const centred = next + d;  // [d][take]
    for (int64_t i = 0; i < take; ++i) {
        const float* row = rows + int64_t(items[i * count / take].row) * d;
        for (int j = 0; j < d; ++j) mean[j] += (centred[j * take + i] = row[j]);
    }
    for (int j = 0; j < d; ++j) {
        mean[j] /= double(take);
        for (int64_t i = 0; i < take; ++i) centred[j * take + i] -= mean[j];
    }
    int widest = 0;
    for (int j = 0; j < d; ++j) {
        for (int k = 0; k <= j; ++k) {
            constexpr int kSums = 4;  // independent, so that they run side by side
            double sums[kSums] = {};
            const double *x = centred + j * take, *y = centred + k * take;
            int64_t i = 0;
            for (; i + kSums <= take; i += kSums)
                for (int s = 0; s < kSums; ++s) sums[s] += x[i + s] * y[i + s];
            for (; i < take; ++i) sums[0] += x[i] * y[i];
            covariance[k * d + j] = covariance[j * d + k] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
        if (covariance[j * d + j] > covariance[widest * d + widest]) widest = j;
    }
    for (int j = 0; j < d; ++j) axis[j] = covariance[widest * d + j];
    for (int step = 0;; ++step) {
        double largest = 0;
        for (int j = 0; j < d; ++j) largest = std::max(largest, std::fabs(axis[j]));
        if (!(largest > 0)) {  // all equal: any direction
            for (int j = 0; j < d; ++j) axis[j] = j == 0;
            largest = 1;
        }
        for (int j = 0; j < d; ++j) axis[j] /= largest;
        if (step == 6) break;
        for (int j = 0; j < d; ++j) {
            next[j] = 0;
            for (int k = 0; k < d; ++k) next[j] += covariance[j * d + k] * axis[k];
        }
        std::swap(axis, next);
    }
    for (int j = 0; j < d; ++j) direction[j] = float(axis[j]) / float(d);
}

// Keys of a run along the direction of its largest variance.
template <int D>
void project(int dim, const float* rows, Item* items, int64_t count) {
    const int d = D ? D : dim;
    thread_local std::vector<float> direction;
    direction.resize(size_t(d));
    principal_direction<D>(dim, rows, items, count, direction.data());
    float axis[D ? D : 1];
    if (D) std::copy(direction.begin(), direction.end(), axis);
    const float* const along = D ? axis : direction.data();
    for (int64_t i = 0; i < count; ++i) {
        const float* row = rows + int64_t(items[i].row) * d;
        float key = row[0] * along[0];
        for (int j = 1; j < d; ++j) key += row[j] * along[j];
        items[i].key = key;
    }
}

}  // namespace

// Cuts runs of keys into nodes. `rows` is a copy of the keys that follows the tree order node by node, so that
// small cells are contiguous when they are cut. The subtrees of the root are built in parallel.
struct PartitionTree::Builder {
    struct Shared {
        std::vector<float> rows;
        std::vector<Item> items;
    };
    PartitionTree& tree;
    Shared& shared;
    const int dim = tree.dim();
    std::vector<Node> nodes;
    std::vector<Frame> frames;
    std::vector<float> spare;
    std::vector<int32_t> spare_order;

    Builder(PartitionTree& owner, Shared& keys) : tree(owner), shared(keys) {}

    Node cut(int32_t begin, int32_t end) {
        Node node;
        if (!cut_by_frame(node, begin, end)) {
            int64_t child_size = tree.leaf_size_;
            while (child_size * kFan < end - begin) child_size *= kFan;
            halve(node, begin, end, int32_t(child_size));
        }
        settle(begin, end);
        for (int c = 0; c < node.children; ++c) {
            node.live[c] = node.end[c] - node.begin[c];
            node.child[c] = -1;
            node.leaves |= uint16_t(uint16_t(node.live[c] <= tree.leaf_size_) << c);
            node.present |= uint16_t(0x101 << c);
        }
        return node;
    }

    int32_t build(int32_t begin, int32_t end) {
        const size_t index = nodes.size();
        nodes.emplace_back();
        Node node = cut(begin, end);
        for (int c = 0; c < node.children; ++c)
            if (!(node.leaves >> c & 1)) node.child[c] = build(node.begin[c], node.end[c]);
        nodes[index] = node;
        return int32_t(index);
    }

    static void build_all(PartitionTree& tree, Shared& shared, int32_t size) {
        if (!size) return;
        Builder top(tree, shared);
        Node root = top.cut(0, size);
        tree.frames_ = std::move(top.frames);
        tree.nodes_.push_back(root);
        std::vector<Builder> parts(size_t(root.children), Builder(tree, shared));
        parallel_for(parts.size(), [&](size_t c) {
            if (!(root.leaves >> c & 1)) parts[c].build(root.begin[c], root.end[c]);
        });
        for (int c = 0; c < root.children; ++c) {
            Builder& part = parts[size_t(c)];
            if (part.nodes.empty()) continue;
            const int32_t first = int32_t(tree.nodes_.size()), first_frame = int32_t(tree.frames_.size());
            tree.nodes_[0].child[c] = first;
            for (Node& node : part.nodes) {
                for (int i = 0; i < node.children; ++i)
                    if (node.child[i] >= 0) node.child[i] += first;
                if (node.frame >= 0) node.frame += first_frame;
                tree.nodes_.push_back(node);
            }
            tree.frames_.insert(tree.frames_.end(), part.frames.begin(), part.frames.end());
        }
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
        Item* run = shared.items.data() + begin;
        switch (dim) {
            case 2: project<2>(dim, shared.rows.data(), run, end - begin); break;
            case 3: project<3>(dim, shared.rows.data(), run, end - begin); break;
            case 4: project<4>(dim, shared.rows.data(), run, end - begin); break;
            case 5: project<5>(dim, shared.rows.data(), run, end - begin); break;
            case 6: project<6>(dim, shared.rows.data(), run, end - begin); break;
            case 7: project<7>(dim, shared.rows.data(), run, end - begin); break;
            case 8: project<8>(dim, shared.rows.data(), run, end - begin); break;
            default: project<0>(dim, shared.rows.data(), run, end - begin);
        }
        std::nth_element(shared.items.begin() + begin, shared.items.begin() + middle, shared.items.begin() + end,
                         [](const Item& a, const Item& b) { return a.key < b.key; });
        halve(node, begin, middle, child_size);
        halve(node, middle, end, child_size);
    }

    bool cut_by_frame(Node& node, int32_t begin, int32_t end) {
        if (dim < 2 || dim > 3 || end - begin <= kFrameCell) return false;
        std::vector<int32_t> members;
        for (int32_t i = begin; i < end; ++i) members.push_back(shared.items[size_t(i)].row);
        Frame frame{};
        std::vector<uint8_t> cells;
        if (!equipartition(dim, shared.rows.data(), members.data(), end - begin, frame, cells)) return false;
        int32_t starts[kFan + 1] = {};
        for (uint8_t cell : cells) ++starts[cell + 1];
        for (int c = 0; c < kFan; ++c) starts[c + 1] += starts[c];
        for (int c = 0; c < 1 << dim; ++c) add_child(node, begin + starts[c], begin + starts[c + 1]);
        for (size_t i = 0; i < members.size(); ++i) shared.items[size_t(begin + starts[cells[i]]++)].row = members[i];
        node.frame = int32_t(frames.size());
        frames.push_back(frame);
        return true;
    }

    // Moves the rows of a node into the order its cuts gave.
    void settle(int32_t begin, int32_t end) {
        spare.resize(size_t(end - begin) * size_t(dim));
        spare_order.resize(size_t(end - begin));
        for (int32_t i = begin; i < end; ++i) {
            const int32_t row = shared.items[size_t(i)].row;
            const float* from = shared.rows.data() + int64_t(row) * dim;
            float* to = spare.data() + int64_t(i - begin) * dim;
            for (int j = 0; j < dim; ++j) to[j] = from[j];
            spare_order[size_t(i - begin)] = tree.order_[size_t(row)];
            shared.items[size_t(i)].row = i;
        }
        std::copy(spare.begin(), spare.end(), shared.rows.begin() + int64_t(begin) * dim);
        std::copy(spare_order.begin(), spare_order.end(), tree.order_.begin() + begin);
    }

    static void bound(const Node& node, int dim, const float* rows, float* volumes) {
        std::vector<float> low(size_t(dim), 0), high(size_t(dim), 0), middle(size_t(dim), 0);
        for (int c = 0; c < node.children; ++c) {
            const float* first = rows + int64_t(node.begin[c]) * dim;
            const float* last = rows + int64_t(node.end[c]) * dim;
            for (int j = 0; j < dim; ++j) {
                float least = first < last ? first[j] : 0, most = least;
                for (const float* row = first; row < last; row += dim) {
                    least = std::min(least, row[j]);
                    most = std::max(most, row[j]);
                }
                middle[size_t(j)] = float((double(least) + most) / 2);
                low[size_t(j)] = least;
                high[size_t(j)] = most;
            }
            for (int j = 0; j < dim; ++j) {
                const double centre = middle[size_t(j)];
                volumes[j * kFan + c] = middle[size_t(j)];
                volumes[(dim + j) * kFan + c] = round_up(std::max(high[size_t(j)] - centre, centre - low[size_t(j)]));
            }
            double largest = 0;
            for (const float* row = first; row < last; row += dim) {
                double square = 0;
                for (int j = 0; j < dim; ++j)
                    square += (row[j] - double(middle[size_t(j)])) * (row[j] - double(middle[size_t(j)]));
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
    const float* source = axes_ ? rotated.data() : keys;
    Builder::Shared shared{std::vector<float>(source, source + size * dim), std::vector<Item>(size_t(size))};
    order_.resize(size_t(size));
    for (int64_t i = 0; i < size; ++i) {
        order_[size_t(i)] = int32_t(i);
        shared.items[size_t(i)].row = int32_t(i);
    }
    Builder::build_all(*this, shared, int32_t(size));
    volumes_.resize(nodes_.size() * size_t(2 * dim + 1) * kFan);
    constexpr size_t kRun = 64;  // nodes bounded as one task
    parallel_for((nodes_.size() + kRun - 1) / kRun, [&](size_t run) {
        for (size_t i = run * kRun; i < std::min(nodes_.size(), (run + 1) * kRun); ++i) {
            const Node& node = nodes_[i];
            Builder::bound(node, dim, shared.rows.data(), volumes_.data() + i * size_t(2 * dim + 1) * kFan);
            if (node.frame < 0) continue;
            for (int c = 0; c < node.children; ++c)
                bound_cell(frames_[size_t(node.frame)], dim, c, shared.rows.data() + int64_t(node.begin[c]) * dim,
                           node.end[c] - node.begin[c]);
        }
    });
    order_.resize(block_count(size) * kLanes, -1);
    // Without a frame the rows are the keys, in tree order.
    leaves_ = axes_ ? blocked(dim, keys, order_.data(), size) : blocked(dim, shared.rows.data(), nullptr, size);
    if (dim > 3 && dim <= kMostCoded && leaf_size % kCodeRun == 0) encode(shared.rows.data());

    // Rounding of a bound and of a score. Let M be the largest coordinate, u the unit. Centres are at most M,
    // half-widths 2M, radii 2M sqrt(d). The terms of <q, c> +- sum |q_j| h_j sum to at most 3M |q|_1 and see at most
    // 2d + 3 roundings; |q| r is at most 2M sqrt(d) |q|_1 with d + 4; a score M |q|_1 with d. Together less than
    // u M |q|_1 16 sqrt(d) (d + 2).
    if (size >= 16 * kSample) {
        std::vector<int32_t> spread;
        // One of each of kSample runs, not always the same of a run: keys may come in a period.
        std::minstd_rand draw(1);
        for (int64_t i = 0; i < kSample; ++i) {
            const int64_t first = i * size / kSample, last = (i + 1) * size / kSample;
            spread.push_back(int32_t(first + int64_t(draw()) % (last - first)));
        }
        sample_ = blocked(dim, keys, spread.data(), kSample);
    }
    double reach = largest();
    for (float y : rotated) reach = std::max(reach, std::fabs(double(y)));
    slack_ = kUnit * reach * 16 * std::sqrt(double(dim)) * (dim + 2);
}

// code_j = 127.5 (y_j - m_j) / h_j - 0.5, rounded, with m and h the centre and half-width of the leaf's box. What
// this loses is measured, not derived.
void PartitionTree::encode(const float* rows) {
    const size_t d = size_t(dim()), width = code_width();
    codes_.assign(size_t((size() + kCodeRun - 1) / kCodeRun) * kCodeRun * width, 0);
    constexpr size_t kNodes = 64;  // coded as one task
    std::vector<double> errors((nodes_.size() + kNodes - 1) / kNodes, 0.0);
    parallel_for(errors.size(), [&](size_t task) {
        for (size_t index = task * kNodes; index < std::min(nodes_.size(), (task + 1) * kNodes); ++index) {
            const Node& node = nodes_[index];
            for (unsigned leaves = node.leaves; leaves; leaves &= leaves - 1) {
                const int c = __builtin_ctz(leaves);
                for (size_t j = 0; j < d; ++j) {
                    const double centre = volumes(index)[j * kFan + size_t(c)];
                    const double half = volumes(index)[(d + j) * kFan + size_t(c)];
                    if (!(half > 0)) continue;  // weighs nothing
                    const double scale = kCodeCentre / half;
                    double error = 0;
                    for (int64_t p = node.begin[c]; p < node.end[c]; ++p) {
                        const double place = (rows[size_t(p) * d + j] - centre) * scale;
                        const int code = int(std::min(std::max(place + kCodeCentre + 0.5, 0.0), 255.0));
                        const size_t run = size_t(p / kCodeRun * kCodeRun), lane = size_t(p % kCodeRun);
                        codes_[run * width + j / 2 * 2 * kCodeRun + 2 * lane + j % 2] = int8_t(code - 128);
                        error = std::max(error, std::fabs(place - (code - kCodeCentre)));
                    }
                    errors[task] = std::max(errors[task], error);
                }
            }
        }
    });
    for (double error : errors) code_error_ = std::max(code_error_, error / kCodeCentre);
    code_error_ += 1e-6;  // of measuring
}

// With y the rotated key and r the residual, <q, x> = <q, mean> + <axes q, y> + <q, r>. Rounding: axes q, <q, mean> and
// their sum are sums of d terms that are at most |q|_1 reach together, with at most d + 2 roundings each.
void PartitionTree::look(const Query& query, double threshold, View& view) const {
    const Query* seen = &query;
    view.half.shift = 0;
    view.half.slack = slack_ * query.norm1;
    if (axes_) {
        const size_t d = size_t(dim());
        view.turned.q.assign(d, 0);
        for (size_t j = 0; j < d; ++j) {
            view.half.shift += query.q[j] * axes_.mean[j];
            for (size_t k = 0; k < d; ++k) view.turned.q[j] += axes_.axes[j * d + k] * query.q[k];
        }
        view.turned.measure();
        view.half.slack = slack_ * std::max(view.turned.norm1, query.norm1) +
                          axes_.residual * query.norm2 * (1 + 1e-12) +
                          4 * kUnit * (dim() + 2) * query.norm1 * axes_.reach;
        seen = &view.turned;
    }
    view.half.query = seen->q.data();
    view.half.magnitude = seen->magnitude.data();
    view.half.norm = seen->norm2;
    view.half.threshold = threshold;
}

FrameCells PartitionTree::frame_cells(const Frame& frame, const HalfSpace& half) const {
    FrameCells cells{frame.boxes, half.shift, {}};
    for (int j = 0; j < dim(); ++j) cells.at_apex += half.query[j] * frame.apex[j];
    for (int i = 0; i < dim(); ++i)
        for (int j = 0; j < dim(); ++j) cells.slope[i] += half.query[j] * frame.edge[i][j];
    return cells;
}

unsigned PartitionTree::classify(const Kernels& loops, size_t index, const HalfSpace& half) const {
    const Node& node = nodes_[index];
    if (node.frame < 0) return loops.classify(volumes(index), dim(), half, nullptr) & node.present;
    const FrameCells cells = frame_cells(frames_[size_t(node.frame)], half);
    return loops.classify(volumes(index), dim(), half, &cells) & node.present;
}

// The queries walk the tree together: a node is tested, and its leaves are read, for all queries that cross it.
// Children are opened in the order of their positions, so that everything before `begin` of the next node is settled. A
// query that is behind the pace of a scan by kHeadStart scans the rest: it costs at most so much more. Leaves are
// read a few steps after they were found, when their cache lines have come.
struct PartitionTree::Walk {
    struct Take {
        int32_t begin, end, query;
        bool inside;
        int32_t node;  // of the leaves in `leaves`, to be read as codes; -1 if the keys are read
        unsigned leaves;
    };
    struct Member {
        View view;
        Search wanted, everything;
        double spent;
        int32_t scanned_from;  // of a query that is behind: the keys it has not seen
    };
    // Blocks of keys on their way, that the codes left open for a query.
    struct Opened {
        int32_t query = 0;
        Growable<int32_t> blocks;
    };
    static constexpr int kWaiting = 16, kAhead = 4;

    Walk(const PartitionTree& walked, Member* first_member, Gathered* first_gathered, Counters& counted)
        : tree(walked), members(first_member), gathered(first_gathered), counters(counted) {}

    const PartitionTree& tree;
    const Kernels& loops = kernels();
    Member* const members;
    Gathered* const gathered;
    Counters& counters;
    const double each_key = key_cost(tree.dim()), each_code = code_cost(tree.dim()),
                 each_visit = visit_cost(tree.dim());
    Take waiting[kWaiting];
    unsigned first = 0, next = 0;
    Opened opened[kAhead];
    unsigned first_opened = 0, next_opened = 0;

    template <class T>
    static void fetch(const T* from, const T* to) {
        constexpr int64_t kLine = 64 / sizeof(T), kMost = 32;  // values a cache line; lines asked for
        if (to - from > kMost * kLine) to = from + kMost * kLine;
        for (; from < to; from += kLine) __builtin_prefetch(from);
    }
    void wait(const Take& take) {
        if (next - first == kWaiting) read();
        waiting[next++ % kWaiting] = take;
    }
    void take(int32_t query, int32_t begin, int32_t end, bool inside) {
        members[query].spent += each_visit + each_key * double(end - begin);
        counters.scored += end - begin;
        wait({begin, end, query, inside, -1, 0});
        const int64_t width = int64_t(kLanes) * tree.dim();
        fetch(tree.leaves_.data() + begin / kLanes * width, tree.leaves_.data() + (end + kLanes - 1) / kLanes * width);
    }
    // Leaves of a node, as bits.
    void take_codes(int32_t query, int32_t index, unsigned leaves) {
        const Node& node = tree.nodes_[size_t(index)];
        int64_t keys = 0;
        for (unsigned rest = leaves; rest; rest &= rest - 1) {
            const int c = __builtin_ctz(rest);
            ++counters.nodes;
            keys += node.end[c] - node.begin[c];
            fetch(tree.codes_.data() + size_t(node.begin[c]) * tree.code_width(),
                  tree.codes_.data() + size_t(node.end[c]) * tree.code_width());
        }
        members[query].spent += each_visit + each_code * double(keys);
        counters.scored += keys;
        wait({0, 0, query, false, index, leaves});
    }
    void read() {
        const Take& take = waiting[first++ % kWaiting];
        if (take.node >= 0)
            read_codes(take);
        else
            read_keys(take);
    }
    void read_keys(const Take& take) {
        constexpr int32_t kChunk = 4096;  // keys: room is made for hits as they come
        Member& member = members[take.query];
        Growable<PackedHit>& hits = gathered[take.query].hits;
        const size_t before = hits.size();
        for (int32_t begin = take.begin; begin < take.end;) {
            const int32_t end = std::min(take.end, (begin / kLanes * kLanes) + kChunk);
            hits.added(loops.scan(tree.leaves_.data(), tree.dim(), begin, end,
                                  take.inside ? member.everything : member.wanted, tree.order_.data(),
                                  hits.room(size_t(end - begin + kLanes))));
            begin = end;
        }
        member.spent += kHitCost * double(hits.size() - before);
    }
    void read_codes(const Take& take) {
        if (next_opened - first_opened == kAhead) read_opened();
        const Node& node = tree.nodes_[size_t(take.node)];
        Opened& list = opened[next_opened++ % kAhead];
        list.query = take.query;
        list.blocks.clear();
        list.blocks.added(loops.open_blocks(tree.codes_.data(), tree.volumes(size_t(take.node)), tree.dim(),
                                            members[take.query].view.half, tree.code_error_, take.leaves, node.begin,
                                            node.end, list.blocks.room(size_t(tree.leaf_size_ / kLanes * kFan) + 4)));
        const int64_t width = int64_t(kLanes) * tree.dim();
        for (size_t i = 0; i < list.blocks.size(); ++i) {
            const float* block = tree.leaves_.data() + list.blocks.data()[i] * width;
            fetch(block, block + width);
        }
    }
    void read_opened() {
        Opened& list = opened[first_opened++ % kAhead];
        const size_t blocks = list.blocks.size();
        if (!blocks) return;
        Member& member = members[list.query];
        Growable<PackedHit>& hits = gathered[list.query].hits;
        const size_t found = loops.scan_blocks(tree.leaves_.data(), tree.dim(), list.blocks.data(), blocks,
                                               member.wanted, tree.order_.data(), hits.room((blocks + 1) * kLanes));
        hits.added(found);
        member.spent += each_key * double(kLanes * blocks) + kHitCost * double(found);
    }
    void run(Which which, bool always) {
        struct Visit {
            int32_t node;
            Which which;
        };
        Visit stack[kFan * 12];  // 8^11 leaves are more than int32 positions
        const double scan = scan_cost(tree.dim(), tree.size()), pace = scan / double(std::max<int64_t>(tree.size(), 1));
        for (Which rest = which; rest; rest &= rest - 1)
            members[__builtin_ctzll(rest)].spent =
                always ? -std::numeric_limits<double>::infinity() : -kHeadStart * scan;
        const bool coded = !tree.codes_.empty();
        int top = 0;
        if (!tree.nodes_.empty()) stack[top++] = {0, which};
        Which scanning = 0;
        while (top) {
            const Visit visit = stack[--top];
            const size_t index = size_t(visit.node);
            const Node& node = tree.nodes_[index];
            Which crossing[kFan] = {};
            unsigned open = 0;
            for (Which rest = visit.which & ~scanning; rest; rest &= rest - 1) {
                const int query = __builtin_ctzll(rest);
                Member& member = members[query];
                if (member.spent > pace * node.begin[0]) {
                    scanning |= rest & -rest;
                    member.scanned_from = node.begin[0];
                    continue;
                }
                const unsigned found = tree.classify(loops, index, member.view.half);
                ++counters.nodes;
                member.spent += each_visit;
                for (unsigned inside = found & 0xff; inside; inside &= inside - 1) {
                    const int c = __builtin_ctz(inside);
                    take(query, node.begin[c], node.end[c], true);
                }
                const unsigned crossed = found >> kFan;
                if (coded && (crossed & node.leaves)) take_codes(query, visit.node, crossed & node.leaves);
                for (unsigned leaves = coded ? 0 : crossed & node.leaves; leaves;) {
                    // Neighbouring crossed leaves are one run.
                    const int c = __builtin_ctz(leaves), length = __builtin_ctz(~(leaves >> c));
                    leaves &= ~(((1u << length) - 1) << c);
                    ++counters.nodes;
                    take(query, node.begin[c], node.end[c + length - 1], false);
                }
                const unsigned nodes = crossed & ~unsigned(node.leaves);
                open |= nodes;
                for (unsigned bits = nodes; bits; bits &= bits - 1) crossing[__builtin_ctz(bits)] |= rest & -rest;
            }
            for (int c = kFan; c-- > 0;) {
                if (!(open >> c & 1)) continue;
                stack[top++] = {node.child[c], crossing[c]};
                const char* there = reinterpret_cast<const char*>(&tree.nodes_[size_t(node.child[c])]);
                for (size_t at = 0; at < sizeof(Node); at += 64) __builtin_prefetch(there + at);
                __builtin_prefetch(tree.volumes(size_t(node.child[c])));
                __builtin_prefetch(tree.volumes(size_t(node.child[c])) + 16);
            }
        }
        while (first != next) read();
        while (first_opened != next_opened) read_opened();
        if (scanning) scan_rest(scanning);
    }
    // Chunk by chunk, so that the queries share what is read.
    void scan_rest(Which which) {
        constexpr int32_t kChunk = 1024;
        const int32_t size = int32_t(tree.size());
        int32_t begin = size;
        for (Which rest = which; rest; rest &= rest - 1)
            begin = std::min(begin, members[__builtin_ctzll(rest)].scanned_from);
        for (; begin < size; begin = begin / kChunk * kChunk + kChunk) {
            const int32_t end = std::min(size, begin / kChunk * kChunk + kChunk);
            for (Which rest = which; rest; rest &= rest - 1) {
                const int query = __builtin_ctzll(rest);
                const int32_t from = std::max(begin, members[query].scanned_from);
                if (from < end) read_keys({from, end, query, false, -1, 0});
                counters.scored += std::max(0, end - from);
            }
        }
    }
};

void PartitionTree::walk(const Tile& tile, Which which, Gathered* gathered, Counters& counters, bool always) const {
    thread_local std::vector<Walk::Member> members(kTile);
    const Kernels& loops = kernels();
    for (Which rest = which; rest; rest &= rest - 1) {
        const int i = __builtin_ctzll(rest);
        const Query& query = tile.queries[i];
        Walk::Member& member = members[size_t(i)];
        member.wanted = search(query, tile.thresholds[i]);
        member.everything = search(query, -std::numeric_limits<double>::infinity());
        gathered[i].hits.clear();
        const bool sampled = !always && size() >= 16 * kSample;
        const int64_t found = sampled ? loops.count(sample_.data(), dim(), 0, kSample, member.wanted) : 0;
        gathered[i].scan = found >= kDeep;
        gathered[i].expected = found * size() / kSample;
        if (gathered[i].scan)
            which &= ~(rest & -rest);
        else
            look(query, tile.thresholds[i], member.view);
    }
    if (which) Walk(*this, members.data(), gathered, counters).run(which, always);
}

void PartitionTree::gather(const Tile& tile, Which which, Gathered* gathered, Counters& counters) const {
    walk(tile, which, gathered, counters, false);
}

int64_t PartitionTree::count(const Query& query, double threshold, Rows& rows) const {
    const double each_key = key_cost(dim()), each_visit = visit_cost(dim());
    double budget = kHeadStart * scan_cost(dim(), size());
    int32_t stack[kFan * 12];
    int top = 0;
    int64_t total = 0;
    View seen;
    look(query, threshold, seen);
    const Search wanted = search(query, threshold);
    const Kernels& loops = kernels();
    if (!nodes_.empty()) stack[top++] = 0;
    while (top) {
        const size_t index = size_t(stack[--top]);
        const Node& node = nodes_[index];
        const unsigned found = classify(loops, index, seen.half);
        ++rows.counters.nodes;
        budget -= each_visit;
        for (int c = 0; c < node.children; ++c) {
            const int32_t begin = node.begin[c], end = node.end[c];
            if (found >> c & 1) {
                total += node.live[c];
            } else if (!(found >> (kFan + c) & 1)) {
                continue;
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
                total += count_live(rows.scratch);
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
    View seen;
    look(query, 0, seen);
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
        double lows[kFan], highs[kFan];
        FrameCells frame;
        if (node.frame >= 0) frame = frame_cells(frames_[size_t(node.frame)], seen.half);
        kernels().bounds(volumes(size_t(cell.node)), dim(), seen.half, node.frame < 0 ? nullptr : &frame, lows, highs);
        for (int c = 0; c < node.children; ++c) {
            const double high = highs[c] == highs[c] ? highs[c] : cell.high;
            if (!(high < best.threshold())) cells.push({high, node.child[c], node.begin[c], node.end[c]});
        }
    }
}

void PartitionTree::erase(int64_t position) {
    StaticIndex::erase(position);
    if (place_.empty()) {
        place_.resize(size_t(size()));
        for (size_t p = 0; p < place_.size(); ++p) place_[size_t(order_[p])] = int32_t(p);
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
                                           codes_.size() + (order_.size() + place_.size()) * sizeof(int32_t));
}

}  // namespace hsr::tree

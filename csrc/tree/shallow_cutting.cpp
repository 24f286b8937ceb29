#include "tree/shallow_cutting.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hsr::tree {
namespace {

constexpr int kMaxLevels = 24;

// Solves sum_i lambda_i columns[i] = right by elimination with pivoting; false if nearly singular.
bool solve(int dim, double (*columns)[4], const double* right, double* lambda) {
    double a[4][5];
    for (int row = 0; row < dim; ++row) {
        for (int i = 0; i < dim; ++i) a[row][i] = columns[i][row];
        a[row][dim] = right[row];
    }
    for (int i = 0; i < dim; ++i) {
        int pivot = i;
        for (int row = i + 1; row < dim; ++row)
            if (std::fabs(a[row][i]) > std::fabs(a[pivot][i])) pivot = row;
        if (!(std::fabs(a[pivot][i]) > 1e-13)) return false;
        std::swap(a[i], a[pivot]);
        for (int row = 0; row < dim; ++row) {
            if (row == i) continue;
            const double factor = a[row][i] / a[i][i];
            for (int column = i; column <= dim; ++column) a[row][column] -= factor * a[i][column];
        }
    }
    for (int i = 0; i < dim; ++i) lambda[i] = a[i][dim] / a[i][i];
    return true;
}

}  // namespace

ShallowCutting::ShallowCutting(int dim, int64_t size, const float* keys, const int64_t* ids, int leaf_size,
                               const int32_t* random_order)
    : PartitionTree(dim, size, keys, ids, leaf_size),
      position_(random_order, random_order + size),
      rank_(size_t(size)) {
    for (int64_t r = 0; r < size; ++r) rank_[size_t(position_[size_t(r)])] = int32_t(r);
}

void ShallowCutting::add_level(int64_t sample, int64_t facets, const int32_t* simplices, const float* normals) {
    const size_t d = size_t(dim());
    Level level;
    level.sample = sample;
    level.simplices.assign(simplices, simplices + facets * dim());
    level.normals.assign(normals, normals + facets * dim());
    for (int64_t rank = int64_t(samples_.size()) / dim(); rank < sample; ++rank) {
        samples_.resize(size_t(rank + 1) * d);
        key(position_[size_t(rank)], samples_.data() + rank * dim());
    }
    if (levels_.empty()) coarsest_ = blocked(dim(), samples_.data(), nullptr, sample);
    level.first_facet.assign(size_t(sample) + 1, 0);
    for (int32_t rank : level.simplices) ++level.first_facet[size_t(rank) + 1];
    for (size_t v = 0; v < size_t(sample); ++v) level.first_facet[v + 1] += level.first_facet[v];
    level.around.resize(level.simplices.size());
    std::vector<int32_t> next(level.first_facet.begin(), level.first_facet.end() - 1);
    for (int64_t f = 0; f < facets; ++f)
        for (size_t i = 0; i < d; ++i)
            level.around[size_t(next[size_t(level.simplices[size_t(f) * d + i])]++)] = int32_t(f);

    Counters counters;
    Tile tile;
    Gathered gathered;
    tile.size = 1;
    std::vector<std::pair<double, int32_t>> list;  // minus the height, position
    std::vector<float> row_keys;
    level.list.push_back(0);
    for (int64_t f = 0; f < facets; ++f) {
        Query& normal = tile.queries[0];
        normal.set(normals + f * dim(), dim());
        double offset = -std::numeric_limits<double>::infinity();
        for (size_t i = 0; i < d; ++i) offset = std::max(offset, dot(normal, level.simplices[size_t(f) * d + i]));
        level.offsets.push_back(offset);
        tile.thresholds[0] = std::nextafter(offset, std::numeric_limits<double>::infinity());
        walk(tile, 1, &gathered, counters, true);
        list.clear();
        for (size_t i = 0; i < gathered.hits.size(); ++i) {
            const int32_t position = int32_t(gathered.hits.data()[i] >> 32);
            float row[kMaxDim];
            key(position, row);
            list.emplace_back(-dot(normal, row), position);
        }
        std::sort(list.begin(), list.end());
        row_keys.resize(list.size() * d);
        for (size_t i = 0; i < list.size(); ++i) {
            key(list[i].second, row_keys.data() + i * d);
            level.positions.push_back(list[i].second);
            if (i % kLanes == 0) level.heights.push_back(-list[i].first);
        }
        const Floats blocks = blocked(dim(), row_keys.data(), nullptr, int64_t(list.size()));
        level.keys.insert(level.keys.end(), blocks.begin(), blocks.end());
        while (level.positions.size() % kLanes) level.positions.push_back(-1);
        level.list_size.push_back(int32_t(list.size()));
        level.list.push_back(int64_t(level.positions.size()));
    }
    if (!levels_.empty()) link(levels_.back(), sample);
    level.keys.shrink_to_fit();
    level.positions.shrink_to_fit();
    levels_.push_back(std::move(level));
}

// For each list of a level, the keys in it that are in the next sample.
void ShallowCutting::link(Level& level, int64_t next_sample) const {
    const size_t d = size_t(dim());
    std::vector<float> row_keys;
    level.next_list.push_back(0);
    for (size_t f = 0; f < level.list_size.size(); ++f) {
        row_keys.clear();
        for (int32_t e = 0; e < level.list_size[f]; ++e) {
            const int32_t rank = rank_[size_t(level.positions[size_t(level.list[f] + e)])];
            if (rank >= next_sample) continue;
            level.next_ranks.push_back(rank);
            row_keys.resize(row_keys.size() + d);
            key(position_[size_t(rank)], row_keys.data() + row_keys.size() - d);
        }
        const Floats blocks = blocked(dim(), row_keys.data(), nullptr, int64_t(row_keys.size() / d));
        level.next_keys.insert(level.next_keys.end(), blocks.begin(), blocks.end());
        while (level.next_ranks.size() % kLanes) level.next_ranks.push_back(-1);
        level.next_list.push_back(int64_t(level.next_ranks.size()));
    }
    level.next_keys.shrink_to_fit();
    level.next_ranks.shrink_to_fit();
}

double ShallowCutting::dot(const Query& query, int32_t rank) const {
    return dot(query, samples_.data() + int64_t(rank) * dim());
}

double ShallowCutting::dot(const Query& query, const float* key) const {
    double sum = query.q[0] * key[0];
    for (int j = 1; j < dim(); ++j) sum += query.q[size_t(j)] * key[j];
    return sum;
}

// The facets are found by shooting a ray: the cone of directions for which a face of the hull is extreme is cut into
// simplicial cones that share the normal of the face's first facet m. Moving q away from that normal leaves
// the cone through the face with one vertex w more; repeat there, until a ridge with two facets is left.
ShallowCutting::Cone ShallowCutting::cone(const Level& level, int32_t vertex, const Query& query) const {
    const int d = dim();
    Cone result;
    thread_local std::vector<int32_t> facets, fewer;
    facets.assign(level.around.begin() + level.first_facet[size_t(vertex)],
                  level.around.begin() + level.first_facet[size_t(vertex) + 1]);
    double rest[kMaxDim];
    for (int j = 0; j < d; ++j) rest[j] = query.q[size_t(j)];
    const float* v = samples_.data() + int64_t(vertex) * d;
    int chosen = 0;
    while (chosen + 2 < d) {
        if (facets.size() < 2) return result;
        const int32_t m = facets[0];
        const float* normal = level.normals.data() + int64_t(m) * d;
        const int32_t* corners = level.simplices.data() + int64_t(m) * d;
        result.facet[chosen] = m;
        double nearest = std::numeric_limits<double>::infinity();
        int32_t exit = -1;
        for (int32_t f : facets)
            for (int i = 0; i < d; ++i) {
                const int32_t w = level.simplices[size_t(f) * size_t(d) + size_t(i)];
                if (std::find(corners, corners + d, w) != corners + d) continue;
                const float* to = samples_.data() + int64_t(w) * d;
                double along = 0, speed = 0;
                for (int j = 0; j < d; ++j) {
                    along += rest[j] * (double(v[j]) - to[j]);
                    speed += normal[j] * (double(v[j]) - to[j]);
                }
                if (speed > 0 && along < nearest * speed) nearest = along / speed, exit = w;
            }
        if (exit < 0) return result;
        for (int j = 0; j < d; ++j) rest[j] -= nearest * normal[j];
        ++chosen;
        fewer.clear();
        for (int32_t f : facets) {
            const int32_t* its = level.simplices.data() + int64_t(f) * d;
            if (std::find(its, its + d, exit) != its + d) fewer.push_back(f);
        }
        std::swap(facets, fewer);
    }
    if (facets.size() < 2) return result;
    result.facet[chosen] = facets[0];
    result.facet[chosen + 1] = facets[1];

    double columns[4][4], lambda[4];
    for (int i = 0; i < d; ++i)
        for (int j = 0; j < d; ++j) columns[i][j] = level.normals[size_t(result.facet[i]) * size_t(d) + size_t(j)];
    if (!solve(d, columns, query.q.data(), lambda)) return result;
    double bound = 0, weight = query.norm1, error = 0;
    for (int i = 0; i < d; ++i) {
        result.lambda[i] = lambda[i] = std::max(lambda[i], 0.0);
        bound += lambda[i] * level.offsets[size_t(result.facet[i])];
        for (int j = 0; j < d; ++j) weight += lambda[i] * std::fabs(columns[i][j]);
    }
    for (int j = 0; j < d; ++j) {
        double left = query.q[size_t(j)];
        for (int i = 0; i < d; ++i) left -= lambda[i] * columns[i][j];
        error += std::fabs(left);
    }
    // <q, x> = sum_i lambda_i <n_i, x> + <q - sum lambda_i n_i, x>; the last is at most error * M. Rounding: the scores
    // behind the lists, the offsets, `left` and `bound` are sums of at most 2 d + 2 terms that add up to at most
    // weight * M; 64 units are twice what four such sums can lose.
    result.bound = bound + (error + 64 * kUnit * weight) * largest();
    result.valid = std::isfinite(result.bound);
    return result;
}

int ShallowCutting::descend(const Query& query, double threshold, Cone* cones, Counters& counters) const {
    if (levels_.empty()) return 0;
    const Kernels& loops = kernels();
    int32_t vertex = 0;
    double best = -std::numeric_limits<double>::infinity();
    for (int32_t first = 0; first < levels_[0].sample; first += kLanes) {
        double scores[kLanes];  // NaN behind the last
        loops.score(coarsest_.data() + first * dim(), dim(), 0, kLanes, query.q.data(), scores);
        for (int lane = 0; lane < kLanes; ++lane)
            if (scores[lane] > best) best = scores[lane], vertex = first + lane;
    }
    int written = 0;
    for (const Level& level : levels_) {
        if (best >= threshold) break;
        ++counters.nodes;
        cones[written] = cone(level, vertex, query);
        if (!cones[written].valid || !(cones[written].bound < threshold)) break;
        const Cone& here = cones[written++];
        for (int i = 0; i < dim(); ++i) {
            const size_t f = size_t(here.facet[i]);
            if (level.next_list.empty()) break;
            for (int64_t e = level.next_list[f]; e < level.next_list[f + 1]; e += kLanes) {
                double scores[kLanes];  // NaN behind the last
                loops.score(level.next_keys.data() + e * dim(), dim(), 0, kLanes, query.q.data(), scores);
                for (int lane = 0; lane < kLanes; ++lane)
                    if (scores[lane] > best) best = scores[lane], vertex = level.next_ranks[size_t(e + lane)];
            }
        }
    }
    return written;
}

bool ShallowCutting::plan(const Query& query, double threshold, Plan& made, Counters& counters) const {
    Cone cones[kMaxLevels];
    const int depth = descend(query, threshold, cones, counters);
    if (!depth) return false;
    made.level = &levels_[size_t(depth - 1)];
    made.cone = cones[depth - 1];
    return true;
}

// Each list is read down to a height (shallow_cutting.h), in whole blocks. The gap b - bound is shared out among the
// lists: a key that is not read anywhere has lambda_i (<n_i, x> - o_i) below the share of each list, and the shares are
// the gap. A list that is lower than its share is not read and leaves the rest to the others, so the lowest come first.
//
// Rounding: `bound` covers that of the scores behind the heights (see cone). A share is made by at most 3 subtractions
// and two quotients, and what a list leaves by two more operations: 16 units of the gap, and 4 of what it takes, cover
// these. The quotient by lambda_i and the sum lose at most 4 units of their sizes.
void ShallowCutting::limit(double threshold, Plan& made) const {
    const Level& level = *made.level;
    const Cone& cone = made.cone;
    double rise[kMaxDim];  // of the highest key of a list, as a score
    int order[kMaxDim], lists = 0;
    for (int i = 0; i < dim(); ++i) {
        const size_t f = size_t(cone.facet[i]);
        made.read[i] = 0;
        if (!(cone.lambda[i] > 0) || !level.list_size[f]) continue;
        const double top = level.heights[size_t(level.list[f] / kLanes)] - level.offsets[f];
        rise[i] = std::max(0.0, cone.lambda[i] * top * (1 + 4 * kUnit));
        int at = lists++;
        for (; at && rise[order[at - 1]] > rise[i]; --at) order[at] = order[at - 1];
        order[at] = i;
    }
    double left = (threshold - cone.bound) * (1 - 16 * kUnit);
    for (int l = 0; l < lists; ++l) {
        const int i = order[l];
        const size_t f = size_t(cone.facet[i]);
        const double share = left / (lists - l), gap = share / cone.lambda[i], offset = level.offsets[f];
        const double least = offset + gap - 4 * kUnit * (std::fabs(offset) + gap) - 4 * kUnit * gap;
        const auto first = level.heights.begin() + level.list[f] / kLanes,
                   last = level.heights.begin() + level.list[f + 1] / kLanes;
        const auto unread = std::partition_point(first, last, [&](double height) { return !(height < least); });
        made.read[i] = std::min<int64_t>(level.list_size[f], kLanes * (unread - first));
        left -= made.read[i] ? share : std::min(share, rise[i]);
    }
}

// What an earlier list found is left out: the keys above the first one that was not read there, by the same arithmetic
// that made the lists.
void ShallowCutting::scan_lists(const Query& query, double threshold, const Plan& plan, Growable<PackedHit>& hits,
                                Counters& counters) const {
    const Level& level = *plan.level;
    Search wanted = search(query, threshold);
    double normals[kMaxDim][kMaxDim];
    hits.clear();
    counters.nodes += dim();
    for (int i = 0; i < dim(); ++i) {
        const int64_t read = plan.read[i];
        if (!read) continue;
        const size_t f = size_t(plan.cone.facet[i]);
        PackedHit* room = hits.room(size_t(read + kLanes));
        hits.added(kernels().scan(level.keys.data(), dim(), level.list[f], level.list[f] + read, wanted,
                                  level.positions.data(), room));
        counters.scored += read;
        if (wanted.exclusions == 3) continue;
        double* normal = normals[wanted.exclusions];
        for (int j = 0; j < dim(); ++j) normal[j] = level.normals[f * size_t(dim()) + size_t(j)];
        wanted.excluded[wanted.exclusions] = normal;
        const double unread =
            read < level.list_size[f] ? level.heights[size_t((level.list[f] + read) / kLanes)] : level.offsets[f];
        wanted.excluded_from[wanted.exclusions++] = std::nextafter(unread, std::numeric_limits<double>::infinity());
    }
}

// In stages over all queries, so that the memory one asks for comes while the others are at work.
void ShallowCutting::gather(const Tile& tile, Which which, Gathered* gathered, Counters& counters) const {
    constexpr int64_t kLine = 16, kMost = 64;  // floats of a cache line; lines asked for
    Plan plans[kTile];
    Which deep = 0, lists = 0;
    for (Which rest = which; rest; rest &= rest - 1) {
        const int i = __builtin_ctzll(rest);
        if (!plan(tile.queries[i], tile.thresholds[i], plans[i], counters)) {
            deep |= rest & -rest;
            continue;
        }
        lists |= rest & -rest;
        const Level& level = *plans[i].level;
        for (int j = 0; j < dim(); ++j) {
            const size_t f = size_t(plans[i].cone.facet[j]);
            __builtin_prefetch(level.list.data() + f);
            __builtin_prefetch(level.list_size.data() + f);
        }
    }
    for (Which rest = lists; rest; rest &= rest - 1) {
        const int i = __builtin_ctzll(rest);
        const Level& level = *plans[i].level;
        for (int j = 0; j < dim(); ++j) {
            const size_t f = size_t(plans[i].cone.facet[j]);
            const int64_t first = level.list[f] / kLanes, blocks = level.list[f + 1] / kLanes - first;
            __builtin_prefetch(&level.heights[size_t(first)]);
            for (int64_t step = blocks / 2; step > 3; step /= 2)
                __builtin_prefetch(&level.heights[size_t(first + step)]);
        }
    }
    for (Which rest = lists; rest; rest &= rest - 1) {
        const int i = __builtin_ctzll(rest);
        limit(tile.thresholds[i], plans[i]);
        const Level& level = *plans[i].level;
        for (int j = 0; j < dim(); ++j) {
            const float* from = level.keys.data() + level.list[size_t(plans[i].cone.facet[j])] * dim();
            const float* to = from + std::min(plans[i].read[j] * dim(), kMost * kLine);
            for (; from < to; from += kLine) __builtin_prefetch(from, 0, 2);  // to the second-level cache
        }
    }
    for (Which rest = lists; rest; rest &= rest - 1) {
        const int i = __builtin_ctzll(rest);
        scan_lists(tile.queries[i], tile.thresholds[i], plans[i], gathered[i].hits, counters);
    }
    if (deep) PartitionTree::gather(tile, deep, gathered, counters);
}

int64_t ShallowCutting::count(const Query& query, double threshold, Rows& rows) const {
    Plan made;
    if (!plan(query, threshold, made, rows.counters)) return PartitionTree::count(query, threshold, rows);
    limit(threshold, made);
    scan_lists(query, threshold, made, rows.scratch, rows.counters);
    // Keys of equal height may stand in two lists' parts that were read.
    sort_hits(rows.scratch, rows.sorted, size());
    PackedHit* const hits = rows.scratch.data();
    rows.scratch.resize(size_t(std::unique(hits, hits + rows.scratch.size()) - hits));
    return count_live(rows.scratch);
}

// From the finest sample up: the lists are complete above the cone's bound, so they decide as soon as there are
// enough keys above it.
void ShallowCutting::top(const Query& query, Best& best, Counters& counters) const {
    Cone cones[kMaxLevels];
    int depth = descend(query, std::numeric_limits<double>::infinity(), cones, counters);
    thread_local std::vector<std::pair<int32_t, double>> found;
    while (depth-- > 0) {
        const Level& level = levels_[size_t(depth)];
        const double bound = cones[depth].bound;
        found.clear();
        for (int i = 0; i < dim(); ++i) {
            const size_t f = size_t(cones[depth].facet[i]);
            counters.scored += level.list_size[f];
            ++counters.nodes;
            for (int32_t e = 0; e < level.list_size[f]; e += kLanes) {
                double scores[kLanes];
                kernels().score(level.keys.data() + (level.list[f] + e) * dim(), dim(), 0, kLanes, query.q.data(),
                                scores);
                for (int32_t lane = 0; lane < std::min(kLanes, level.list_size[f] - e); ++lane) {
                    const int32_t position = level.positions[size_t(level.list[f] + e + lane)];
                    if (scores[lane] > bound && !dead(position)) found.emplace_back(position, scores[lane]);
                }
            }
        }
        std::sort(found.begin(), found.end());
        found.erase(std::unique(found.begin(), found.end()), found.end());
        if (found.size() + best.above(bound) < best.wanted()) continue;
        for (const auto& [position, score] : found) best.offer(score, id(position));
        return;
    }
    PartitionTree::top(query, best, counters);
}

int64_t ShallowCutting::list_bytes() const {
    size_t bytes = 0;
    for (const Level& level : levels_)
        bytes += (level.keys.size() + level.normals.size()) * sizeof(float) +
                 (level.simplices.size() + level.first_facet.size() + level.around.size() + level.list_size.size() +
                  level.positions.size() + level.next_ranks.size()) *
                     sizeof(int32_t) +
                 level.next_keys.size() * sizeof(float) +
                 (level.offsets.size() + level.heights.size()) * sizeof(double) +
                 (level.list.size() + level.next_list.size()) * sizeof(int64_t);
    return int64_t(bytes);
}

int64_t ShallowCutting::nbytes() const {
    return PartitionTree::nbytes() + list_bytes() +
           int64_t((position_.size() + rank_.size()) * sizeof(int32_t) +
                   (samples_.size() + coarsest_.size()) * sizeof(float));
}

}  // namespace hsr::tree

#include "index/halfspace_index.h"

#include <limits>
#include <string>

#include "sketch/key_sketch.h"

namespace hsr {
namespace {

// Keys in one task: enough to amortise a query's preparation, few enough to share out.
constexpr size_t kRangeBlocks = 1024;

struct Split {
    size_t tiles, ranges;
    Split(size_t m, size_t blocks) : tiles((m + kTile - 1) / kTile) {
        const size_t wanted = tiles >= size_t(4 * num_threads()) ? 1 : (blocks + kRangeBlocks - 1) / kRangeBlocks;
        ranges = std::max<size_t>(wanted, 1);
    }
    size_t tasks() const { return tiles * ranges; }
};

}  // namespace

int64_t HalfspaceIndex::append(const TokenArray& keys) {
    if (live_.positions() + size_t(keys.tokens) > 0xfffffff0u)
        throw std::invalid_argument("an index holds at most 2^32 - 16 keys");
    const int64_t first = live_.next_id();
    append_rows(keys);
    live_.grow(size_t(keys.tokens));
    return first;
}

void HalfspaceIndex::remove(const int64_t* ids, size_t count) {
    std::vector<size_t> positions(count);
    for (size_t i = 0; i < count; ++i) {
        const int64_t position = live_.find(ids[i]);
        if (position < 0)
            throw std::out_of_range("ids must name live keys, got unknown or deleted id " + std::to_string(ids[i]));
        positions[i] = size_t(position);
    }
    for (size_t position : positions) live_.remove(position);
    if (live_.mostly_dead()) keep_rows(live_.compact());
}

ReportArrays HalfspaceIndex::report(const float* queries, const double* thresholds, size_t m) const {
    const Split split(m, blocks());
    std::vector<std::vector<Hit>> hits(split.ranges * split.tiles * kTile);
    std::vector<WorkCounters> work(split.tasks());
    std::vector<double> norms(m);
    for (size_t i = 0; i < m; ++i) norms[i] = norm_of(queries + i * size_t(dim_), dim_);
    parallel_for(split.tasks(), [&](size_t task) {
        const size_t tile = task / split.ranges, range = task % split.ranges;
        const size_t first_query = tile * kTile;
        const int count = int(std::min<size_t>(kTile, m - first_query));
        const size_t first = blocks() * range / split.ranges, last = blocks() * (range + 1) / split.ranges;
        scan_range(queries + first_query * size_t(dim_), norms.data() + first_query, thresholds + first_query, count,
                   first, last, &hits[task * kTile], nullptr, work[task]);
    });
    ReportArrays out;
    out.indptr.assign(m + 1, 0);
    size_t total = 0;
    for (const auto& part : hits) total += part.size();
    out.indices.reserve(total);
    out.scores.reserve(total);
    for (size_t i = 0; i < m; ++i) {
        for (size_t range = 0; range < split.ranges; ++range)
            for (const Hit& hit : hits[(i / kTile * split.ranges + range) * kTile + i % kTile]) {
                out.indices.push_back(live_.id(hit.position));
                out.scores.push_back(float(hit.score));
            }
        out.indptr[i + 1] = int64_t(out.indices.size());
    }
    for (const auto& part : work) out.work.add(part);
    out.work.reported = int64_t(total);
    return out;
}

std::vector<int64_t> HalfspaceIndex::count(const float* queries, const double* thresholds, size_t m,
                                           WorkCounters& total) const {
    const Split split(m, blocks());
    std::vector<int64_t> parts(split.ranges * split.tiles * kTile, 0), counts(m, 0);
    std::vector<WorkCounters> work(split.tasks());
    parallel_for(split.tasks(), [&](size_t task) {
        const size_t tile = task / split.ranges, range = task % split.ranges;
        const size_t first_query = tile * kTile;
        const int count = int(std::min<size_t>(kTile, m - first_query));
        double norms[kTile];
        for (int q = 0; q < count; ++q) norms[q] = norm_of(queries + (first_query + size_t(q)) * size_t(dim_), dim_);
        scan_range(queries + first_query * size_t(dim_), norms, thresholds + first_query, count,
                   blocks() * range / split.ranges, blocks() * (range + 1) / split.ranges, nullptr,
                   &parts[task * kTile], work[task]);
    });
    for (size_t i = 0; i < m; ++i)
        for (size_t range = 0; range < split.ranges; ++range)
            counts[i] += parts[(i / kTile * split.ranges + range) * kTile + i % kTile];
    for (const auto& part : work) total.add(part);
    return counts;
}

ReportArrays HalfspaceIndex::top_r(const float* queries, size_t m, size_t r) const {
    std::vector<std::vector<Hit>> rows(m);
    std::vector<WorkCounters> work(m);
    parallel_for(m, [&](size_t i) {
        const float* query = queries + i * size_t(dim_);
        const double norm = norm_of(query, dim_);
        WorkCounters& counters = work[i];
        const double threshold =
            r >= size() ? -std::numeric_limits<double>::infinity() : threshold_for(query, norm, r, counters);
        auto& hits = rows[i];
        scan_range(query, &norm, &threshold, 1, 0, blocks(), &hits, nullptr, counters);
        if (hits.size() > r) {
            std::nth_element(hits.begin(), hits.begin() + int64_t(r), hits.end(), [](const Hit& a, const Hit& b) {
                return a.score > b.score || (a.score == b.score && a.position < b.position);
            });
            hits.resize(r);
            std::sort(hits.begin(), hits.end(), [](const Hit& a, const Hit& b) { return a.position < b.position; });
        }
    });
    ReportArrays out;
    out.indptr.assign(1, 0);
    for (const auto& hits : rows) {
        for (const Hit& hit : hits) {
            out.indices.push_back(live_.id(hit.position));
            out.scores.push_back(float(hit.score));
        }
        out.indptr.push_back(int64_t(out.indices.size()));
    }
    for (const auto& part : work) out.work.add(part);
    out.work.reported = int64_t(out.indices.size());
    return out;
}

}  // namespace hsr

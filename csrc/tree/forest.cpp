#include "tree/forest.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "threads.h"

namespace hsr::tree {

int64_t Forest::live() const {
    int64_t total = 0;
    for_parts([&](const StaticIndex& part) { total += part.live(); });
    return total;
}

int64_t Forest::nbytes() const {
    int64_t total = 0;
    for_parts([&](const StaticIndex& part) { total += part.nbytes(); });
    return total;
}

void Forest::append(const float* keys, int64_t count) {
    for (int64_t i = 0; i < count; ++i) tail_->append(keys + i * dim_);
}

int64_t Forest::erase(const int64_t* ids, int64_t count) {
    const auto holder = [&](int64_t id) -> StaticIndex* {
        if (id >= tail_->first_id()) return tail_.get();
        const auto after = std::upper_bound(parts_.begin(), parts_.end(), id,
                                            [](int64_t x, const auto& part) { return x < part->first_id(); });
        return after == parts_.begin() ? nullptr : (after - 1)->get();
    };
    for (int64_t i = 0; i < count; ++i) {
        const StaticIndex* part = holder(ids[i]);
        if (!part || part->find(ids[i]) < 0) return i;
    }
    for (int64_t i = 0; i < count; ++i) {
        StaticIndex* part = holder(ids[i]);
        part->erase(part->find(ids[i]));
    }
    return -1;
}

void Forest::replace_from(size_t first, std::shared_ptr<StaticIndex> part, int64_t next_id) {
    tail_ = std::make_unique<StaticIndex>(dim_, next_id);
    parts_.resize(first);
    if (part) parts_.push_back(std::move(part));
}

void Forest::replace(size_t at, std::shared_ptr<StaticIndex> part) {
    if (part)
        parts_[at] = std::move(part);
    else
        parts_.erase(parts_.begin() + std::ptrdiff_t(at));
}

// Rows are made in runs, a run a task, and the runs joined. `make` makes the rows [begin, end) and calls `done` after
// each.
template <class Make>
Report Forest::rows(int64_t count, Make make) const {
    const int64_t runs = std::max<int64_t>(1, std::min<int64_t>(count, num_threads() == 1 ? 1 : 2 * num_threads()));
    std::vector<Rows> parts(static_cast<size_t>(runs));
    Report result;
    result.indptr.assign(size_t(count) + 1, 0);
    const auto work = [&](size_t run) {
        Rows& rows = parts[run];
        const int64_t begin = count * int64_t(run) / runs, end = count * int64_t(run + 1) / runs;
        // Inside the run; what was before is added below.
        make(begin, end, rows, [&](int64_t i) { result.indptr[size_t(i) + 1] = int64_t(rows.ids.size()); });
    };
    parts[0].alone = count == 1;
    if (runs == 1)
        work(0);
    else
        parallel_for(size_t(runs), work);
    int64_t before = 0;
    for (int64_t run = 0; run < runs; ++run) {
        Rows& rows = parts[size_t(run)];
        for (int64_t i = count * run / runs; i < count * (run + 1) / runs; ++i) result.indptr[size_t(i) + 1] += before;
        before += int64_t(rows.ids.size());
        result.counters.nodes += rows.counters.nodes;
        result.counters.scored += rows.counters.scored;
    }
    if (runs == 1) {
        result.ids = std::move(parts[0].ids);
        result.scores = std::move(parts[0].scores);
        return result;
    }
    result.ids.resize(size_t(before));
    result.scores.resize(size_t(before));
    size_t at = 0;
    for (Rows& rows : parts) {
        const size_t n = rows.ids.size();
        if (n) std::memcpy(result.ids.data() + at, rows.ids.data(), n * sizeof(int64_t));
        if (n) std::memcpy(result.scores.data() + at, rows.scores.data(), n * sizeof(float));
        at += n;
    }
    return result;
}

namespace {

constexpr size_t kKeptHits = 1 << 11;  // larger buffers are given back after use

// Memory that a thread uses again from call to call.
struct Bench {
    Tile tile;
    std::vector<Gathered> gathered;  // [part][kTile]

    void clear(size_t parts, int size) {
        if (gathered.size() < parts * kTile) gathered.resize(parts * kTile);
        for (size_t part = 0; part < parts; ++part)
            for (int i = 0; i < size; ++i) {
                Gathered& each = gathered[part * kTile + size_t(i)];
                each.scan = false;
                each.expected = 0;
                each.hits.clear();
            }
    }
};

}  // namespace

Report Forest::report(const float* queries, int64_t count, const double* thresholds) const {
    return rows(count, [&](int64_t begin, int64_t end, Rows& rows, auto done) {
        thread_local Bench bench;
        const size_t parts = parts_.size() + 1;
        for (int64_t first = begin; first < end; first += kTile) {
            Tile& tile = bench.tile;
            tile.size = int(std::min<int64_t>(kTile, end - first));
            for (int i = 0; i < tile.size; ++i) {
                tile.queries[i].set(queries + (first + i) * dim_, dim_);
                tile.thresholds[i] = thresholds[first + i];
            }
            bench.clear(parts, tile.size);
            const Which all = ~Which(0) >> (kTile - tile.size);
            size_t at = 0, expected = 0;
            for_parts([&](const StaticIndex& part) {
                Gathered* const gathered = bench.gathered.data() + kTile * at++;
                part.gather(tile, all, gathered, rows.counters);
                for (int i = 0; i < tile.size; ++i)
                    expected += gathered[i].scan ? size_t(gathered[i].expected) : gathered[i].hits.size();
            });
            rows.ids.room(expected + expected / 8);
            rows.scores.room(expected + expected / 8);
            for (int i = 0; i < tile.size; ++i) {
                at = 0;
                for_parts([&](const StaticIndex& part) {
                    Gathered& gathered = bench.gathered[kTile * at++ + size_t(i)];
                    part.report(tile.queries[i], tile.thresholds[i], gathered, rows);
                    gathered.hits.trim(kKeptHits);
                });
                done(first + i);
            }
        }
    });
}

std::vector<int64_t> Forest::count(const float* queries, int64_t count, const double* thresholds) const {
    std::vector<int64_t> totals(size_t(count), 0);
    rows(count, [&](int64_t begin, int64_t end, Rows& rows, auto) {
        for (int64_t i = begin; i < end; ++i) {
            const Query query(queries + i * dim_, dim_);
            for_parts([&](const StaticIndex& part) { totals[size_t(i)] += part.count(query, thresholds[i], rows); });
        }
    });
    return totals;
}

Report Forest::top(const float* queries, int64_t count, int64_t r) const {
    const size_t wanted = size_t(std::min(r, live()));
    return rows(count, [&](int64_t begin, int64_t end, Rows& rows, auto done) {
        for (int64_t i = begin; i < end; ++i, done(i - 1)) {
            if (!wanted) continue;
            const Query query(queries + i * dim_, dim_);
            Best best(wanted);
            for_parts([&](const StaticIndex& part) { part.top(query, best, rows.counters); });
            best.write(rows);
        }
    });
}

}  // namespace hsr::tree

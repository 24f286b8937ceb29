// What the two native indexes share: ids, deletions, the split of a call over threads, the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <shared_mutex>
#include <stdexcept>
#include <vector>

#include "kernels/kernels.h"
#include "store/row_store.h"
#include "threads.h"

namespace hsr {

struct Hit {
    uint32_t position;
    double score;
};

struct WorkCounters {
    int64_t sketch_scored = 0, refined = 0, full_scored = 0, reported = 0;
    void add(const WorkCounters& other) {
        sketch_scored += other.sketch_scored;
        refined += other.refined;
        full_scored += other.full_scored;
        reported += other.reported;
    }
};

struct ReportArrays {
    std::vector<int64_t> indptr, indices;
    std::vector<float> scores;
    WorkCounters work;
};

// Which positions are alive, and the id of each. Ids are positions until the first compaction.
class LiveSet {
public:
    void grow(size_t count) {
        const size_t first = positions_;
        positions_ += count;
        live_ += count;
        masks_.resize((positions_ + kBlock - 1) / kBlock, 0);
        for (size_t p = first; p < positions_; ++p) masks_[p / kBlock] |= uint16_t(1u << p % kBlock);
        if (!ids_.empty() || next_id_ != int64_t(first))
            for (size_t i = 0; i < count; ++i) ids_.push_back(next_id_ + int64_t(i));
        next_id_ += int64_t(count);
    }
    size_t positions() const { return positions_; }
    size_t live() const { return live_; }
    int64_t next_id() const { return next_id_; }
    uint16_t mask(size_t block) const { return masks_[block]; }
    int64_t id(size_t position) const { return ids_.empty() ? int64_t(position) : ids_[position]; }

    // Position of a live id, or -1.
    int64_t find(int64_t id) const {
        size_t position;
        if (ids_.empty()) {
            if (id < 0 || id >= int64_t(positions_)) return -1;
            position = size_t(id);
        } else {
            const auto at = std::lower_bound(ids_.begin(), ids_.end(), id);
            if (at == ids_.end() || *at != id) return -1;
            position = size_t(at - ids_.begin());
        }
        return (masks_[position / kBlock] >> position % kBlock) & 1 ? int64_t(position) : -1;
    }
    void remove(size_t position) {
        masks_[position / kBlock] &= uint16_t(~(1u << position % kBlock));
        --live_;
    }
    bool mostly_dead() const { return positions_ >= 64 && live_ * 2 < positions_; }
    // Forget the dead; returns the old positions of the living, ascending.
    std::vector<size_t> compact() {
        std::vector<size_t> living;
        std::vector<int64_t> ids;
        for (size_t p = 0; p < positions_; ++p)
            if ((masks_[p / kBlock] >> p % kBlock) & 1) {
                living.push_back(p);
                ids.push_back(id(p));
            }
        const int64_t next = next_id_;
        *this = LiveSet();
        positions_ = live_ = living.size();
        masks_.assign((positions_ + kBlock - 1) / kBlock, 0);
        for (size_t p = 0; p < positions_; ++p) masks_[p / kBlock] |= uint16_t(1u << p % kBlock);
        ids_ = std::move(ids);
        next_id_ = next;
        return living;
    }

private:
    size_t positions_ = 0, live_ = 0;
    int64_t next_id_ = 0;
    std::vector<uint16_t> masks_;
    std::vector<int64_t> ids_;
};

class HalfspaceIndex {
public:
    HalfspaceIndex(int dim, Dtype dtype) : dim_(dim), dtype_(dtype) {}
    virtual ~HalfspaceIndex() = default;

    // Held by callers from several threads: shared to read, alone to append or delete.
    std::shared_mutex& mutex() const { return mutex_; }

    int dim() const { return dim_; }
    Dtype dtype() const { return dtype_; }
    size_t size() const { return live_.live(); }
    virtual size_t nbytes() const = 0;

    int64_t append(const TokenArray& keys);  // id of the first new key
    void remove(const int64_t* ids, size_t count);

    // queries [m][dim] float32, thresholds [m]
    ReportArrays report(const float* queries, const double* thresholds, size_t m) const;
    std::vector<int64_t> count(const float* queries, const double* thresholds, size_t m, WorkCounters& work) const;
    ReportArrays top_r(const float* queries, size_t m, size_t r) const;

protected:
    // Queries of one tile against blocks [first, last): hits of each query, ascending. With `hits` null
    // only counts are made.
    virtual void scan_range(const float* queries, const double* norms, const double* thresholds, int tile, size_t first,
                            size_t last, std::vector<Hit>* hits, int64_t* counts, WorkCounters& work) const = 0;
    // A threshold that at least r live keys reach, for one query.
    virtual double threshold_for(const float* query, double norm, size_t r, WorkCounters& work) const = 0;
    virtual void append_rows(const TokenArray& keys) = 0;
    virtual void keep_rows(const std::vector<size_t>& positions) = 0;

    mutable std::shared_mutex mutex_;

    size_t blocks() const { return (live_.positions() + kBlock - 1) / kBlock; }

    int dim_;
    Dtype dtype_;
    LiveSet live_;
};

}  // namespace hsr

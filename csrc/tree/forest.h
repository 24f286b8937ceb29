// The logarithmic method (Bentley and Saxe 1980): a changing set of keys as a few static structures, each over
// an interval of ids, and a tail of the newest keys that is scanned. Half-space reporting is decomposable: a
// report is the parts' reports one after the other, and since the intervals ascend so do the ids.
// Which parts to merge, and into what structure, is decided by the caller.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tree/static_index.h"

namespace hsr::tree {

// A batch of rows in compressed sparse row form.
struct Report {
    std::vector<int64_t> indptr;
    Growable<int64_t> ids;
    Growable<float> scores;
    Counters counters;
};

class Forest {
public:
    explicit Forest(int dim) : dim_(dim), tail_(std::make_unique<StaticIndex>(dim, 0)) {}

    int dim() const { return dim_; }
    int64_t live() const;
    int64_t nbytes() const;
    int64_t next_id() const { return tail_->first_id() + tail_->size(); }
    const std::vector<std::shared_ptr<StaticIndex>>& parts() const { return parts_; }
    const StaticIndex& tail() const { return *tail_; }

    void append(const float* keys, int64_t count);  // to the tail
    // Which of the (distinct) ids is unknown or deleted, the first; -1, and all are deleted, if none is.
    int64_t erase(const int64_t* ids, int64_t count);
    // Parts from `first` on, and the tail, give way to `part` (which may be null); the next id is `next_id`.
    void replace_from(size_t first, std::shared_ptr<StaticIndex> part, int64_t next_id);
    // One part gives way to `part`; null removes it.
    void replace(size_t at, std::shared_ptr<StaticIndex> part);

    Report report(const float* queries, int64_t count, const double* thresholds) const;
    std::vector<int64_t> count(const float* queries, int64_t count, const double* thresholds) const;
    Report top(const float* queries, int64_t count, int64_t r) const;

private:
    template <class Make>
    Report rows(int64_t count, Make make) const;
    template <class Do>
    void for_parts(Do what) const {
        for (const auto& part : parts_) what(*part);
        if (tail_->size()) what(*tail_);
    }

    int dim_;
    std::vector<std::shared_ptr<StaticIndex>> parts_;  // ids ascend from part to part
    std::unique_ptr<StaticIndex> tail_;
};

}  // namespace hsr::tree

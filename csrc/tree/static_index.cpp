#include "tree/static_index.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "threads.h"

namespace hsr::tree {

Query::Query(std::vector<double> coordinates) : q(std::move(coordinates)), magnitude(q.size()) {
    for (size_t j = 0; j < q.size(); ++j) {
        magnitude[j] = std::fabs(q[j]);
        norm1 += magnitude[j];
        norm2 += q[j] * q[j];
    }
    norm2 = std::sqrt(norm2);
}

Query::Query(const float* coordinates, int dim) : Query(std::vector<double>(coordinates, coordinates + dim)) {
    q32 = coordinates;
}

size_t Best::above(double score) const {
    size_t count = 0;
    for (const Entry& entry : held_) count += entry.score > score;
    return count;
}

// Keeps the r best (of at least r) and takes the last of them as the threshold.
void Best::cut() {
    const auto last = held_.begin() + std::ptrdiff_t(r_ - 1);
    std::nth_element(held_.begin(), last, held_.end(), [](const Entry& a, const Entry& b) {
        return a.score > b.score || (a.score == b.score && a.id < b.id);
    });
    threshold_ = last->score;
    held_.resize(r_);
}

void Best::write(Rows& rows) {
    if (held_.size() > r_) cut();
    std::sort(held_.begin(), held_.end(), [](const Entry& a, const Entry& b) { return a.id < b.id; });
    for (const Entry& entry : held_) {
        rows.ids.push(entry.id);
        rows.scores.push(float(entry.score));
    }
}

Floats blocked(int dim, const float* keys, const int32_t* order, int64_t count) {
    Floats blocks(block_count(count) * size_t(dim) * kLanes, std::numeric_limits<float>::quiet_NaN());
    for (int64_t p = 0; p < count; ++p) {
        const float* key = keys + (order ? order[p] : p) * dim;
        float* lane = blocks.data() + p / kLanes * kLanes * dim + p % kLanes;
        for (int j = 0; j < dim; ++j) lane[j * kLanes] = key[j];
    }
    return blocks;
}

namespace {

// Few hits: one counting pass over as many buckets as hits puts ids that are spread evenly almost in order, and
// insertion ends it. Falls back to comparing when a bucket is full, so the order of ids cannot make it slow.
bool sort_few(PackedHit* hits, size_t n, PackedHit* spare) {
    constexpr size_t kBuckets = 256, kFull = 12;
    uint64_t low = hits[0], high = hits[0];
    for (size_t i = 1; i < n; ++i) {
        low = hits[i] < low ? hits[i] : low;
        high = hits[i] > high ? hits[i] : high;
    }
    low >>= 32;
    const uint64_t span = (high >> 32) - low;
    int shift = 32;
    while (span >> (shift - 32) >= kBuckets) ++shift;
    uint8_t starts[kBuckets + 1] = {};
    const uint64_t base = low << 32;
    for (size_t i = 0; i < n; ++i)
        if (++starts[((hits[i] - base) >> shift) + 1] > kFull) return false;
    const size_t buckets = size_t(span >> (shift - 32)) + 1;
    for (size_t v = 1; v < buckets; ++v) starts[v] = uint8_t(starts[v] + starts[v - 1]);
    for (size_t i = 0; i < n; ++i) spare[starts[(hits[i] - base) >> shift]++] = hits[i];
    for (size_t i = 0; i < n; ++i) {
        const PackedHit hit = spare[i];
        size_t at = i;
        for (; at && hits[at - 1] > hit; --at) hits[at] = hits[at - 1];
        hits[at] = hit;
    }
    return true;
}

}  // namespace

void sort_hits(Growable<PackedHit>& hits, Growable<PackedHit>& spare, int64_t positions) {
    const size_t n = hits.size();
    constexpr size_t kTiny = 16, kFew = 250;
    if (n <= kFew) {
        spare.clear();
        if (n <= kTiny || !sort_few(hits.data(), n, spare.room(n))) std::sort(hits.data(), hits.data() + n);
        return;
    }
    int bits = 1;
    while ((int64_t(1) << bits) < positions) ++bits;
    const int passes = (bits + 10) / 11, width = (bits + passes - 1) / passes;
    spare.resize(n);
    PackedHit *from = hits.data(), *to = spare.data();
    for (int pass = 0; pass < passes; ++pass) {
        const int shift = 32 + pass * width;
        const uint64_t mask = (uint64_t(1) << width) - 1;
        uint32_t starts[2049] = {};
        for (size_t i = 0; i < n; ++i) ++starts[(from[i] >> shift & mask) + 1];
        for (uint64_t v = 1; v <= mask; ++v) starts[v] += starts[v - 1];
        for (size_t i = 0; i < n; ++i) to[starts[from[i] >> shift & mask]++] = from[i];
        std::swap(from, to);
    }
    if (from != hits.data()) std::swap(hits, spare);
    hits.resize(n);
}

StaticIndex::StaticIndex(int dim, int64_t size, const float* keys, const int64_t* ids)
    : dim_(dim), size_(size), live_(size), blocks_(blocked(dim, keys, nullptr, size)) {
    for (int64_t i = 0; i < size * dim; ++i) largest_ = std::max(largest_, std::fabs(keys[i]));
    if (!size) return;
    first_id_ = ids[0];
    contiguous_ = ids[size - 1] - ids[0] == size - 1;
    if (!contiguous_) ids_.assign(ids, ids + size);
}

int64_t StaticIndex::find(int64_t id) const {
    int64_t position = id - first_id_;
    if (!contiguous_) {
        const auto at = std::lower_bound(ids_.begin(), ids_.end(), id);
        if (at == ids_.end() || *at != id) return -1;
        position = at - ids_.begin();
    }
    return position < 0 || position >= size_ || dead(position) ? -1 : position;
}

void StaticIndex::key(int64_t position, float* out) const {
    const float* lane = blocks_.data() + position / kLanes * kLanes * dim_ + position % kLanes;
    for (int j = 0; j < dim_; ++j) out[j] = lane[j * kLanes];
}

void StaticIndex::copy_live(float* keys, int64_t* ids) const {
    for (int64_t p = 0; p < size_; ++p) {
        if (dead(p)) continue;
        key(p, keys);
        keys += dim_;
        *ids++ = id(p);
    }
}

// A float32 score is a sum of d products with at most 2 d roundings, fused or not: it is off by at most
// 2 d 2^-24 |q|_1 M (1 + small), M the largest coordinate. Three more units cover the rounding of the limit and the
// higher orders. Outside the range neither overflow nor underflow is harmless, and float64 decides alone.
Search StaticIndex::search(const Query& query, double threshold) const {
    const double reach = query.norm1 * largest_;
    Search search{query.q.data(), threshold};
    if (!(reach > 0x1p-80 && reach < 0x1p100) || !std::isfinite(threshold)) return search;
    const double limit = threshold - (2 * dim_ + 3) * 0x1p-24 * reach;
    if (limit < -2 * reach) return search;  // nothing to screen out
    search.query32 = query.q32;
    search.screen = limit > 2 * reach ? float(2 * reach) : float(limit);
    return search;
}

void StaticIndex::append(const float* key) {
    if (size_ % kLanes == 0)
        blocks_.insert(blocks_.end(), size_t(dim_) * kLanes, std::numeric_limits<float>::quiet_NaN());
    float* lane = blocks_.data() + size_ / kLanes * kLanes * dim_ + size_ % kLanes;
    for (int j = 0; j < dim_; ++j) {
        lane[j * kLanes] = key[j];
        largest_ = std::max(largest_, std::fabs(key[j]));
    }
    if (!dead_.empty()) dead_.push_back(0);
    ++size_;
    ++live_;
}

void StaticIndex::erase(int64_t position) {
    if (dead_.empty()) dead_.resize(size_t(size_));
    dead_[size_t(position)] = 1;
    --live_;
}

int64_t StaticIndex::nbytes() const {
    return int64_t(ids_.size() * sizeof(int64_t) + blocks_.size() * sizeof(float) + dead_.size());
}

void StaticIndex::report(const Query& query, double threshold, Rows& rows) const {
    constexpr int64_t kPerThread = 1 << 16;  // keys: below, a second thread takes longer to start than it saves
    const int64_t tasks = rows.alone ? std::min<int64_t>(num_threads(), size_ / kPerThread) : 1;
    rows.counters.scored += size_;
    const Search wanted = search(query, threshold);
    if (tasks <= 1) return scan(wanted, 0, size_, rows);
    std::vector<Rows> pieces(static_cast<size_t>(tasks));
    const auto boundary = [&](int64_t task) { return task == tasks ? size_ : size_ * task / tasks / kLanes * kLanes; };
    parallel_for(pieces.size(), [&](size_t task) {
        scan(wanted, boundary(int64_t(task)), boundary(int64_t(task) + 1), pieces[task]);
    });
    for (Rows& piece : pieces) {
        const size_t n = piece.ids.size();
        if (!n) continue;
        std::memcpy(rows.ids.room(n), piece.ids.data(), n * sizeof(int64_t));
        std::memcpy(rows.scores.room(n), piece.scores.data(), n * sizeof(float));
        rows.ids.added(n);
        rows.scores.added(n);
    }
}

void StaticIndex::scan(const Search& search, int64_t from, int64_t to, Rows& rows) const {
    constexpr int64_t kChunk = 4096;
    for (int64_t begin = from; begin < to; begin += kChunk) {
        const int64_t end = std::min(to, begin + kChunk);
        int64_t* ids = rows.ids.room(kChunk);
        float* scores = rows.scores.room(kChunk);
        size_t found =
            kernels().scan_rows(blocks_.data(), dim_, begin, end, search, contiguous_ ? first_id_ : 0, ids, scores);
        if (!contiguous_ || any_dead()) {
            size_t kept = 0;
            for (size_t i = 0; i < found; ++i) {
                const int64_t position = contiguous_ ? ids[i] - first_id_ : ids[i];
                if (dead(position)) continue;
                ids[kept] = id(position);
                scores[kept++] = scores[i];
            }
            found = kept;
        }
        rows.ids.added(found);
        rows.scores.added(found);
    }
}

int64_t StaticIndex::count(const Query& query, double threshold, Rows& rows) const {
    rows.counters.scored += size_;
    if (!any_dead()) return kernels().count(blocks_.data(), dim_, 0, size_, search(query, threshold));
    rows.scratch.clear();
    PackedHit* hits = rows.scratch.room(size_t(size_ + kLanes));
    rows.scratch.added(kernels().scan(blocks_.data(), dim_, 0, size_, search(query, threshold), nullptr, hits));
    return count_live(rows);
}

void StaticIndex::top(const Query& query, Best& best, Counters& counters) const {
    offer_range(blocks_.data(), nullptr, 0, size_, query, best, counters);
}

void StaticIndex::append_sorted(Rows& rows) const {
    sort_hits(rows.scratch, rows.sorted, size_);
    const size_t n = rows.scratch.size();
    const PackedHit* hits = rows.scratch.data();
    int64_t* ids = rows.ids.room(n);
    float* scores = rows.scores.room(n);
    size_t kept = 0;
    int64_t previous = -1;
    for (size_t i = 0; i < n; ++i) {
        const int64_t position = int64_t(hits[i] >> 32);
        const uint32_t bits = uint32_t(hits[i]);
        ids[kept] = id(position);
        __builtin_memcpy(scores + kept, &bits, 4);
        kept += position != previous && !dead(position);
        previous = position;
    }
    rows.ids.added(kept);
    rows.scores.added(kept);
}

int64_t StaticIndex::count_live(const Rows& rows) const {
    if (!any_dead()) return int64_t(rows.scratch.size());
    int64_t live = 0;
    for (size_t i = 0; i < rows.scratch.size(); ++i) live += !dead(int64_t(rows.scratch.data()[i] >> 32));
    return live;
}

void StaticIndex::offer_range(const float* blocks, const int32_t* positions, int64_t begin, int64_t end,
                              const Query& query, Best& best, Counters& counters) const {
    constexpr int64_t kChunk = 256;
    double scores[kChunk];
    counters.scored += end - begin;
    for (int64_t first = begin / kLanes * kLanes; first < end; first += kChunk) {
        const int64_t last = std::min(end, first + kChunk);
        kernels().score(blocks, dim_, first, last, query.q.data(), scores);
        double threshold = best.threshold();
        for (int64_t p = std::max(first, begin); p < last; ++p) {
            if (!(scores[p - first] >= threshold)) continue;
            const int64_t position = positions ? positions[p] : p;
            if (dead(position)) continue;
            best.offer(scores[p - first], id(position));
            threshold = best.threshold();
        }
    }
}

}  // namespace hsr::tree

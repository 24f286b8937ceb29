#include "tree/static_index.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "threads.h"

namespace hsr::tree {

void Query::set(const float* coordinates, int dim) {
    q.assign(coordinates, coordinates + dim);
    q32 = coordinates;
    measure();
}

void Query::measure() {
    magnitude.resize(q.size());
    norm1 = norm2 = 0;
    for (size_t j = 0; j < q.size(); ++j) {
        magnitude[j] = std::fabs(q[j]);
        norm1 += magnitude[j];
        norm2 += q[j] * q[j];
    }
    norm2 = std::sqrt(norm2);
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
    constexpr int64_t kRun = 1 << 15;  // keys moved as one task
    const size_t width = size_t(dim) * kLanes;
    Floats blocks(block_count(count) * width);
    if (count % kLanes)
        std::fill(blocks.end() - std::ptrdiff_t(width), blocks.end(), std::numeric_limits<float>::quiet_NaN());
    parallel_for(size_t((count + kRun - 1) / kRun), [&](size_t run) {
        for (int64_t p = int64_t(run) * kRun; p < std::min(count, int64_t(run + 1) * kRun); ++p) {
            const float* key = keys + (order ? order[p] : p) * dim;
            float* lane = blocks.data() + p / kLanes * kLanes * dim + p % kLanes;
            for (int j = 0; j < dim; ++j) lane[j * kLanes] = key[j];
        }
    });
    return blocks;
}

void sort_hits(Growable<PackedHit>& hits, Growable<PackedHit>& spare, int64_t positions) {
    const size_t n = hits.size();
    constexpr size_t kFew = 250;
    if (n <= kFew) return std::sort(hits.data(), hits.data() + n);
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

void StaticIndex::gather(const Tile&, Which which, Gathered* gathered, Counters&) const {
    for (; which; which &= which - 1) gathered[__builtin_ctzll(which)].scan = true;
}

void StaticIndex::report(const Query& query, double threshold, Gathered& gathered, Rows& rows) const {
    if (gathered.scan)
        scan_all(search(query, threshold), rows);
    else
        append_sorted(gathered.hits, rows);
}

void StaticIndex::scan_all(const Search& wanted, Rows& rows) const {
    constexpr int64_t kPerThread = 1 << 16;  // keys: below, a second thread takes longer to start than it saves
    const int64_t tasks = rows.alone ? std::min<int64_t>(num_threads(), size_ / kPerThread) : 1;
    rows.counters.scored += size_;
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
    constexpr int64_t kDense = 8;  // keys a hit: with more hits a screen lets most blocks through
    Search bare = search;
    bare.query32 = nullptr;
    bool dense = false;
    for (int64_t begin = from; begin < to; begin += kChunk) {
        const int64_t end = std::min(to, begin + kChunk);
        int64_t* ids = rows.ids.room(kChunk + kLanes);
        float* scores = rows.scores.room(kChunk + kLanes);
        size_t found = kernels().scan_rows(blocks_.data(), dim_, begin, end, dense ? bare : search,
                                           contiguous_ ? first_id_ : 0, ids, scores);
        dense = int64_t(found) * kDense > end - begin;
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
    return count_live(rows.scratch);
}

void StaticIndex::top(const Query& query, Best& best, Counters& counters) const {
    offer_range(blocks_.data(), nullptr, 0, size_, query, best, counters);
}

// Sorts few hits, spread over the positions, in one counting pass; others by digits. Returns how many are written.
size_t StaticIndex::place_sorted(Growable<PackedHit>& hits, int64_t first_id, int64_t* ids, float* scores,
                                 Rows& rows) const {
    constexpr size_t kMaxWords = 1024;
    size_t n = hits.size(), words = 4;  // 16 to 32 buckets a hit: about one in 50 hits meets another
    int word_bits = 2, bits = 1;
    while (4 * words < n) words *= 2, ++word_bits;
    const auto write = [&](size_t at, PackedHit hit) {
        const uint32_t score = uint32_t(hit);
        ids[at] = first_id + int64_t(hit >> 32);
        __builtin_memcpy(scores + at, &score, 4);
    };
    if (words <= kMaxWords) {
        while ((int64_t(1) << bits) < size_) ++bits;
        if (rows.seen.size() < words) rows.seen.resize(words), rows.before.resize(words);
        rows.sorted.clear();
        PackedHit* rest = rows.sorted.room(n + 1);
        const size_t left = kernels().spread(hits.data(), n, std::max(0, bits - 6 - word_bits), words, rows.seen.data(),
                                             rows.before.data(), first_id, ids, scores, rest);
        if (!left) return n;
        size_t placed = n - left;
        if (left <= 8 + n / 8) {
            std::sort(rest, rest + left);
            size_t from = placed, to = n;
            bool repeated = false;
            for (size_t r = left; r-- > 0;) {
                const int64_t id = first_id + int64_t(rest[r] >> 32);
                for (; from && ids[from - 1] > id; --from) ids[--to] = ids[from - 1], scores[to] = scores[from - 1];
                repeated |= (from && ids[from - 1] == id) || (to < n && ids[to] == id);
                write(--to, rest[r]);
            }
            if (!repeated) return n;
            size_t kept = 0;
            for (size_t i = 0; i < n; ++i) {
                ids[kept] = ids[i];
                scores[kept] = scores[i];
                kept += i + 1 == n || ids[i] != ids[i + 1];
            }
            return kept;
        }
        std::memcpy(hits.data() + placed, rest, left * sizeof(PackedHit));
    }
    sort_hits(hits, rows.sorted, size_);
    size_t kept = 0;
    for (size_t i = 0; i < n; ++i) {
        write(kept, hits.data()[i]);
        kept += i + 1 == n || hits.data()[i] >> 32 != hits.data()[i + 1] >> 32;
    }
    return kept;
}

void StaticIndex::append_sorted(Growable<PackedHit>& hits, Rows& rows) const {
    const bool plain = contiguous_ && !any_dead();
    int64_t* ids = rows.ids.room(hits.size());
    float* scores = rows.scores.room(hits.size());
    size_t found = place_sorted(hits, plain ? first_id_ : 0, ids, scores, rows);
    if (!plain) {
        size_t kept = 0;
        for (size_t i = 0; i < found; ++i) {
            const int64_t position = ids[i];
            ids[kept] = id(position);
            scores[kept] = scores[i];
            kept += !dead(position);
        }
        found = kept;
    }
    rows.ids.added(found);
    rows.scores.added(found);
}

int64_t StaticIndex::count_live(const Growable<PackedHit>& hits) const {
    if (!any_dead()) return int64_t(hits.size());
    int64_t live = 0;
    for (size_t i = 0; i < hits.size(); ++i) live += !dead(int64_t(hits.data()[i] >> 32));
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

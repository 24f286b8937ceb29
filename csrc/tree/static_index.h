// What every static structure has: the keys in the order of their ids, their deletion marks, and the scan
// that answers when the structure would not pay. A structure adds its own report, count and top.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "tree/growable.h"
#include "tree/kernels.h"

namespace hsr::tree {

// 2^-53, the relative rounding error of float64.
constexpr double kUnit = 1.1102230246251565e-16;

// One query in float64, with what bounds need of it.
struct Query {
    Query() = default;
    Query(const float* coordinates, int dim) { set(coordinates, dim); }
    void set(const float* coordinates, int dim);  // memory is used again
    void measure();                               // magnitudes and norms, after a change of q
    std::vector<double> q, magnitude;             // [dim], and |q_j|
    const float* q32 = nullptr;
    double norm1 = 0, norm2 = 0;  // sums of |q_j|, and the Euclidean norm
};

struct Counters {
    int64_t nodes = 0;   // cells, layers or conflict lists touched
    int64_t scored = 0;  // keys whose score was computed
};

// Rows of a report under construction: ids ascend inside a row.
struct Rows {
    Growable<int64_t> ids;
    Growable<float> scores;
    Growable<PackedHit> scratch, sorted;  // hits before and after sorting
    std::vector<uint64_t> seen;           // zeros, see Kernels::spread
    std::vector<uint32_t> before;
    Counters counters;
    bool alone = false;  // the only query of a call: its scans may use all threads
};

// Queries that are answered together, so that what one has read is near for the next.
constexpr int kTile = 64;
using Which = uint64_t;  // a bit a query of a tile
struct Tile {
    int size = 0;
    Query queries[kTile];
    double thresholds[kTile];
};
// What a structure found for one query: the positions in the half-space in any order, deleted ones included, or
// that a scan is cheaper, and about how many keys it will report (0 if nobody knows).
struct Gathered {
    Growable<PackedHit> hits;
    bool scan = false;
    int64_t expected = 0;
};

// The r best keys so far: larger scores first, among equal scores lower ids. A quarter more than r are held
// before the worst are cut off, so an offer costs O(1) amortised.
class Best {
public:
    explicit Best(size_t r) : r_(r), room_(r + r / 4 + 16) {}
    size_t wanted() const { return r_; }
    bool full() const { return held_.size() >= r_; }
    size_t missing() const { return full() ? 0 : r_ - held_.size(); }
    size_t above(double score) const;  // how many held are larger
    // No score below this can be among the r best.
    double threshold() const { return threshold_; }
    void offer(double score, int64_t id) {
        held_.push_back({score, id});
        if (held_.size() == r_ || held_.size() == room_) cut();
    }
    void write(Rows& rows);  // appends one row, ids ascending

private:
    struct Entry {
        double score;
        int64_t id;
    };
    void cut();
    size_t r_, room_;
    double threshold_ = -std::numeric_limits<double>::infinity();
    std::vector<Entry> held_;
};

class StaticIndex {
public:
    // keys [size][dim], row-major; ids ascending.
    StaticIndex(int dim, int64_t size, const float* keys, const int64_t* ids);
    StaticIndex(int dim, int64_t first_id) : dim_(dim), size_(0), live_(0), first_id_(first_id) {}
    virtual ~StaticIndex() = default;

    int dim() const { return dim_; }
    int64_t size() const { return size_; }  // deleted ones included
    int64_t live() const { return live_; }
    int64_t id(int64_t position) const { return contiguous_ ? first_id_ + position : ids_[size_t(position)]; }
    int64_t first_id() const { return first_id_; }
    int64_t find(int64_t id) const;  // position, or -1 if unknown or deleted
    void copy_live(float* keys, int64_t* ids) const;
    // Adds a key with the next id. Only for an index without structure.
    void append(const float* key);

    // Fills `gathered` at each query of `which`; the others are left alone. Cleared before.
    virtual void gather(const Tile& tile, Which which, Gathered* gathered, Counters& counters) const;
    // Appends what was gathered to the row: the live keys with score >= threshold.
    void report(const Query& query, double threshold, Gathered& gathered, Rows& rows) const;
    virtual int64_t count(const Query& query, double threshold, Rows& rows) const;
    virtual void top(const Query& query, Best& best, Counters& counters) const;
    virtual void erase(int64_t position);
    virtual int64_t nbytes() const;

protected:
    bool dead(int64_t position) const { return !dead_.empty() && dead_[size_t(position)]; }
    bool any_dead() const { return live_ < size_; }
    void key(int64_t position, float* out) const;
    float largest() const { return largest_; }  // |coordinate|
    Search search(const Query& query, double threshold) const;
    const float* blocks() const { return blocks_.data(); }

    // How many of the hits (positions in this structure) are not deleted; repetitions are not looked for.
    int64_t count_live(const Growable<PackedHit>& hits) const;
    void offer_range(const float* blocks, const int32_t* positions, int64_t begin, int64_t end, const Query& query,
                     Best& best, Counters& counters) const;

private:
    void scan(const Search& search, int64_t begin, int64_t end, Rows& rows) const;
    void scan_all(const Search& search, Rows& rows) const;
    // Sorts the hits, drops deleted keys and repetitions, appends the rest.
    void append_sorted(Growable<PackedHit>& hits, Rows& rows) const;
    size_t place_sorted(Growable<PackedHit>& hits, int64_t first_id, int64_t* ids, float* scores, Rows& rows) const;

    int dim_;
    int64_t size_, live_, first_id_ = 0;
    float largest_ = 0;
    bool contiguous_ = true;
    std::vector<int64_t> ids_;   // empty when contiguous
    Floats blocks_;              // in the order of ids
    std::vector<uint8_t> dead_;  // empty until the first deletion
};

// Keys permuted into blocks of 8 (see kernels.h): position p holds keys[order[p]].
Floats blocked(int dim, const float* keys, const int32_t* order, int64_t count);

// Sorts by the position in the high half; `spare` is scratch. Radix sort, least significant digit first.
void sort_hits(Growable<PackedHit>& hits, Growable<PackedHit>& spare, int64_t positions);

}  // namespace hsr::tree

// Half-space reporting in O(log n + k) expected, d = 2, 3, 4, by random samples (Chan 2000, after Clarkson).
//
// The keys are put in random order; R_j, the first r_j of them, are nested samples. Of the convex hull of each
// sample every facet i keeps its normal n_i, its offset o_i and its conflict list: the keys with <n_i, x> > o_i,
// about d n / r_j of them.
//
// A query direction q is a combination sum_i lambda_i n_i, lambda >= 0, of the normals of d facets around the
// extreme vertex of the hull. A key in none of their d lists has <q, x> <= sum_i lambda_i o_i, the largest score in
// the sample. So if that is below the threshold, the d lists hold every key to report; if not, the sample
// meets the half-space, which then holds about n / r_j keys or more, and a coarser sample answers. When
// even the coarsest meets it, the query is not shallow and the partition tree answers.
//
// More: the lambda_i (<n_i, x> - o_i) of a key with <q, x> >= b add up to b - bound at least, so one of them is at
// least its share of that gap, whatever the shares, and a list that is sorted by <n_i, x> need only be read down to
// that height.
//
// The extreme vertex of R_{j+1} is that of R_j or in the d lists of R_j, so it is found on the way down with
// O(1) expected work a level. Nothing here trusts Qhull: a query is answered only from facets whose lambda
// certify it, with the rounding bounded; facets that are wrong only cost speed.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tree/partition_tree.h"

namespace hsr::tree {

class ShallowCutting : public PartitionTree {
public:
    ShallowCutting(int dim, int64_t size, const float* keys, const int64_t* ids, int leaf_size,
                   const int32_t* random_order);  // [size], positions in the order of ids

    // Samples must grow. simplices [facets][dim] are ranks below `sample`; normals [facets][dim] point outwards.
    void add_level(int64_t sample, int64_t facets, const int32_t* simplices, const float* normals);
    int64_t levels() const { return int64_t(levels_.size()); }
    int64_t list_bytes() const;

    void gather(const Tile& tile, Which which, Gathered* gathered, Counters& counters) const override;
    int64_t count(const Query& query, double threshold, Rows& rows) const override;
    void top(const Query& query, Best& best, Counters& counters) const override;
    int64_t nbytes() const override;

private:
    static constexpr int kMaxDim = 4;
    struct Level {
        int64_t sample;
        std::vector<int32_t> simplices;    // [facets][dim], ranks
        std::vector<float> normals;        // [facets][dim]
        std::vector<double> offsets;       // [facets]
        std::vector<int32_t> first_facet;  // [sample + 1] into `around`
        std::vector<int32_t> around;       // facets around each sample
        std::vector<int64_t> list;         // [facets + 1] into the lists, multiples of 8
        std::vector<int32_t> list_size;    // [facets]
        Floats keys;                       // the lists' keys in blocks, the highest above its facet first
        std::vector<int32_t> positions;    // and their positions
        std::vector<double> heights;       // <n_i, x> of the first key of each block
        // Those of the lists that are in the next sample, in the same form.
        std::vector<int64_t> next_list;
        Floats next_keys;
        std::vector<int32_t> next_ranks;
    };
    // d facets around the extreme vertex, and the bound of the score of any key in none of their lists.
    struct Cone {
        int32_t facet[kMaxDim];
        double lambda[kMaxDim];
        double bound;
        bool valid = false;
    };

    double dot(const Query& query, const float* key) const;
    double dot(const Query& query, int32_t rank) const;
    void link(Level& level, int64_t next_sample) const;
    Cone cone(const Level& level, int32_t vertex, const Query& query) const;
    // Walks down while the samples' extreme scores stay below the threshold; returns how many cones it wrote.
    int descend(const Query& query, double threshold, Cone* cones, Counters& counters) const;
    // The parts of the lists of one cone that hold every key to report; false if no sample lies below the half-space.
    struct Plan {
        const Level* level;
        Cone cone;
        int64_t read[kMaxDim];  // keys, from the highest down
    };
    bool plan(const Query& query, double threshold, Plan& made, Counters& counters) const;
    void limit(double threshold, Plan& made) const;
    void scan_lists(const Query& query, double threshold, const Plan& plan, Growable<PackedHit>& hits,
                    Counters& counters) const;

    std::vector<int32_t> position_;  // of each rank
    std::vector<int32_t> rank_;      // of each position
    std::vector<float> samples_;     // [rank][dim], of the finest sample
    Floats coarsest_;                // the first sample in blocks
    std::vector<Level> levels_;
};

}  // namespace hsr::tree

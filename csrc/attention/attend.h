// Attention of a few queries, or of a whole prompt, over a LayerCache: scan, choose thresholds, select,
// accumulate. The mathematics is in DESIGN.md ("Softmax in three tiers", "The certificate").
#pragma once

#include <cstdint>

#include "attention/layer_cache.h"

namespace hsr {

enum class Rule : int { epsilon = 0, threshold = 1, top_r = 2, relu = 3 };

struct AttendSettings {
    Rule rule = Rule::epsilon;
    bool sketch_tail = true;  // false: what is not reported is dropped, what is kept is exact
    double scale = 1.0;
    double epsilon = 0.01;      // bound of the omitted share of the mass (rule epsilon, and any sketched tail)
    double exact_share = 1e-3;  // rule epsilon: keys above this share of the mass are read exactly
    int64_t top_r = 0;
    int power = 1;        // ReLU^power
    bool certify = true;  // false: error_bound and omitted_mass are not computed (left NaN)
};

struct AttendQueries {
    TokenArray queries;        // [batch, query heads, m, key_dim]
    const int64_t* visible;    // [m]: query i sees keys [0, visible[i])
    const double* thresholds;  // [batch * query heads * m] in logit units, or null
    const uint8_t* mask;       // nonzero: may be seen; [batch][m][n] by strides, or null
    int64_t mask_batch_stride, mask_query_stride;
};

// Each [batch][query heads][m], `out` with value_dim behind.
struct AttendResult {
    float* out;
    float* error_bound;
    float* estimated_error;
    float* omitted_mass;
    float* density;
    float* lse;
};

struct AttendWork {
    int64_t sketch_scored = 0, refined = 0, full_scored = 0, sketched = 0;
    int64_t scanned_four = 0, scanned_eight = 0, scanned_full = 0;  // tiles of queries by kind of scan
    int64_t skipped = 0, panels = 0;  // prompts: pairs in words of 64 keys without a kept one; panels unpacked
    int64_t selected_again = 0;       // rule epsilon: repeated selections
};

AttendWork attend(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
                  const AttendResult& result);

}  // namespace hsr

// Attention of many queries over a LayerCache (paper, Algorithm 3): tiles of queries meet panels of codes in
// registers, thresholds follow the mass found so far. The mathematics is in DESIGN.md ("Prompts").
#pragma once

#include "attention/attend.h"

namespace hsr {

// Whether `prefill` answers this call: enough queries, a rule that needs no second look at all keys, and logits that
// the codes can bound. Otherwise `attend` does.
bool prefill_serves(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries);

AttendWork prefill(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
                   const AttendResult& result);

}  // namespace hsr

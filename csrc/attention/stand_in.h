// What stands in for the keys that were left out. Shared by decoding and prompts; derived in DESIGN.md, section 7.
#pragma once

namespace hsr {

// Keys of mass `coded` were kept from codes, `left` is the likely mass of those left out, `mass` that of all kept ones,
// and `kept` their share of the keys in number. What stands in for those left out is `of_mean` times `left` at the mean
// of all values, and `of_coded` (which may be negative) times the sum of the values kept from codes.
struct StandIn {
    double of_mean = 1, of_coded = 0;
    StandIn(double left, double coded, double mass, double kept);
};

}  // namespace hsr

// What stands in for the keys that were left out. Shared by decoding and prompts; derived in DESIGN.md, section 7.
#pragma once

namespace hsr {

// Keys of mass `coded` were kept from codes, `left` is the likely mass of those left out, `mass` that of all kept ones,
// and `kept` their share of the keys in number. What was left out is given its mass at the mean of all values, but for
// `of_coded` (which may be negative) at the mean of the values kept from codes.
struct StandIn {
    double of_all = 0, of_coded = 0;
    StandIn(double left, double coded, double mass, double kept);
};

}  // namespace hsr

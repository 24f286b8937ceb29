// A call of attention as decoding and prompts both see it. Private to attention/.
#pragma once

#include <cstdint>
#include <limits>

#include "attention/attend.h"

namespace hsr {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kUnit = 5.9604644775390625e-8;  // 2^-24, the rounding unit of float32

class Call {
protected:
    Call(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
         const AttendResult& result)
        : cache_(cache),
          settings_(settings),
          queries_(queries),
          result_(result),
          m_(queries.queries.tokens),
          heads_(int(queries.queries.heads)),
          group_(heads_ / cache.kv_heads()) {}

    bool relu() const { return settings_.rule == Rule::relu; }
    // ReLU^alpha of an excess.
    double power_of(double x) const {
        double product = x;
        for (int p = 1; p < settings_.power; ++p) product *= x;
        return product;
    }

    const LayerCache& cache_;
    const AttendSettings& settings_;
    const AttendQueries& queries_;
    const AttendResult& result_;
    const int64_t m_;  // positions
    const int heads_, group_;
};

}  // namespace hsr

#include "tree/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace hsr::tree {

namespace scalar { const Kernels& table(); }
#if defined(__x86_64__)
namespace avx2 { const Kernels& table(); }
namespace avx512 { const Kernels& table(); }
#endif

namespace {

struct Level {
    const char* name;
    const Kernels& (*table)();
    bool (*supported)();
};

// Best first.
const Level kLevels[] = {
#if defined(__x86_64__)
    {"avx512", avx512::table,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
     }},
    {"avx2", avx2::table, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"scalar", scalar::table, [] { return true; }},
};

const Kernels& choose() {
    const char* wanted = std::getenv("HSR_ISA");
    const bool any = !wanted || !*wanted;
    for (const Level& level : kLevels) {
        if (!any && std::string(wanted) != level.name) continue;
        if (level.supported()) return level.table();
        if (!any) throw std::invalid_argument("isa '" + std::string(wanted) + "' is not supported by this machine");
    }
    throw std::invalid_argument("unknown isa '" + std::string(wanted) + "'; expected one of scalar, avx2, avx512");
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace hsr::tree

#include "tree/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace hsr::tree {

namespace scalar {
const Kernels& table();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
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

const Kernels* find(const std::string& name) {
    for (const Level& level : kLevels) {
        if (name != level.name) continue;
        if (!level.supported()) throw std::invalid_argument("isa '" + name + "' is not supported by this machine");
        return &level.table();
    }
    throw std::invalid_argument("unknown isa '" + name + "'; expected one of scalar, avx2, avx512");
}

const Kernels*& current() {
    static const Kernels* chosen = [] {
        const char* wanted = std::getenv("HSR_ISA");
        if (wanted && *wanted) return find(wanted);
        for (const Level& level : kLevels)
            if (level.supported()) return &level.table();
        return find("scalar");
    }();
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *current(); }
void use_isa(const std::string& name) { current() = find(name); }

}  // namespace hsr::tree

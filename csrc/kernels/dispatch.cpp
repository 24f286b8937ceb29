#include <cstdlib>
#include <stdexcept>

#include "kernels/kernels.h"

namespace hsr {

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

// Best last.
const Level kLevels[] = {
    {"scalar", scalar::table, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", avx2::table,
     [] {
         return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"));
     }},
    {"avx512", avx512::table,
     [] {
         return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vnni"));
     }},
#endif
};

const Kernels* find(const std::string& name) {
    std::string known;
    for (const Level& level : kLevels) {
        if (name == level.name) {
            if (!level.supported()) throw std::invalid_argument("isa '" + name + "' is not supported by this machine");
            return &level.table();
        }
        known += (known.empty() ? "" : ", ") + std::string(level.name);
    }
    throw std::invalid_argument("unknown isa '" + name + "'; expected one of " + known);
}

const Kernels*& current() {
    static const Kernels* chosen = [] {
        if (const char* wanted = std::getenv("HSR_ISA"); wanted && *wanted) return find(wanted);
        return find(isa_available().back());
    }();
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *current(); }
std::string isa_in_use() { return current()->name; }
void use_isa(const std::string& name) { current() = find(name); }

std::vector<std::string> isa_available() {
    std::vector<std::string> names;
    for (const Level& level : kLevels)
        if (level.supported()) names.push_back(level.name);
    return names;
}

}  // namespace hsr

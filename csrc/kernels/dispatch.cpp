#if defined(__x86_64__)
#include <cpuid.h>
#endif

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
#if defined(HSR_AVXVNNI)
namespace avxvnni {
const Kernels& table();
}
#endif
namespace avx512 {
const Kernels& table();
}
#endif

namespace {

#if defined(__x86_64__)
#if defined(HSR_EMULATE)
constexpr bool kEmulated = true;  // by tests/native/emulated, on any machine with AVX2
#else
constexpr bool kEmulated = false;
#endif
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
    return kEmulated ? has_avx2()
                     : __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vnni");
}
#if defined(HSR_AVXVNNI)
// The vector neural network instructions in 256 bits: leaf 7, subleaf 1, EAX bit 4.
bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && (kEmulated || (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1)));
}
#endif
#endif

struct Level {
    const char* name;
    const Kernels& (*table)();
    bool (*supported)();
};

// Best last.
const Level kLevels[] = {
    {"scalar", scalar::table, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", avx2::table, has_avx2},
#if defined(HSR_AVXVNNI)
    {"avxvnni", avxvnni::table, has_avxvnni},
#endif
    {"avx512", avx512::table, has_avx512},
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

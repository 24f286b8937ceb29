#include "tree/kernels.h"

#include "kernels/kernels.h"

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

const Kernels* table_of([[maybe_unused]] const std::string& level) {
#if defined(__x86_64__)
    if (level == "avx512") return &avx512::table();
    if (level == "avx2" || level == "avxvnni") return &avx2::table();  // scores here are floats
#endif
    return &scalar::table();
}

const Kernels*& current() {
    static const Kernels* chosen = table_of(isa_in_use());
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *current(); }
void follow_isa() { current() = table_of(isa_in_use()); }

}  // namespace hsr::tree

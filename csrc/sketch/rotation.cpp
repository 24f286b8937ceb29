#include "sketch/rotation.h"

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "kernels/kernels.h"

namespace hsr {
namespace {

bool random_bit(uint64_t index) {  // splitmix64
    uint64_t z = (index + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (z ^ (z >> 31)) & 1;
}

}  // namespace

const Rotation& rotation(int dim) {
    static std::mutex mutex;
    static std::map<int, std::unique_ptr<Rotation>> made;
    std::lock_guard<std::mutex> lock(mutex);
    auto& slot = made[dim];
    if (!slot) {
        auto fresh = std::make_unique<Rotation>();
        const int wide = padded16(dim);
        const double pi = std::acos(-1.0);
        fresh->dim = dim;
        fresh->matrix.assign(size_t(dim) * wide, 0.0f);
        for (int i = 0; i < dim; ++i)
            for (int j = 0; j < dim; ++j) {
                const double size = std::sqrt((j == 0 ? 1.0 : 2.0) / dim);
                const double entry = size * std::cos(pi * (2 * i + 1) * j / (2.0 * dim));
                fresh->matrix[size_t(i) * wide + j] = float(random_bit(uint64_t(i)) ? entry : -entry);
            }
        fresh->relative_slack = std::sqrt(double(dim)) * (dim + 4) * std::ldexp(1.0, -24);
        slot = std::move(fresh);
    }
    return *slot;
}

}  // namespace hsr

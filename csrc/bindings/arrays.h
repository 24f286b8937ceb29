// Arrays in and out: numpy views (float32, or uint16 bits of a 16-bit float) become TokenArrays; vectors
// become numpy arrays that own them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "store/row_store.h"

namespace hsr {

namespace nb = nanobind;

using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;

// [batch, heads, tokens, dim], or [tokens, dim] as one batch row and head. Shapes were checked in Python.
inline TokenArray token_array(const AnyArray& array, int dtype) {
    const size_t item = item_size(Dtype(dtype));
    if (array.itemsize() != item) throw std::invalid_argument("array and dtype disagree in item size");
    TokenArray out{};
    out.dtype = Dtype(dtype);
    out.data = array.data();
    if (array.ndim() == 2) {
        out.batch = out.heads = 1;
        out.tokens = int64_t(array.shape(0));
        out.dim = int64_t(array.shape(1));
        out.token_stride = array.stride(0);
        out.dim_stride = array.stride(1);
    } else if (array.ndim() == 4) {
        out.batch = int64_t(array.shape(0));
        out.heads = int64_t(array.shape(1));
        out.tokens = int64_t(array.shape(2));
        out.dim = int64_t(array.shape(3));
        out.batch_stride = array.stride(0);
        out.head_stride = array.stride(1);
        out.token_stride = array.stride(2);
        out.dim_stride = array.stride(3);
    } else {
        throw std::invalid_argument("array must have 2 or 4 dimensions");
    }
    return out;
}

// The same of a numpy array, or of (address, shape, strides in elements) of four dimensions: a tensor's own, which cost
// torch less than a view in numpy.
inline TokenArray token_array(const nb::object& given, int dtype) {
    if (!nb::isinstance<nb::tuple>(given)) return token_array(nb::cast<AnyArray>(given), dtype);
    const auto place = nb::cast<nb::tuple>(given);
    const nb::object shape = place[1], strides = place[2];
    const auto at = [](const nb::object& numbers, size_t i) { return nb::cast<int64_t>(numbers[i]); };
    TokenArray out{};
    out.dtype = Dtype(dtype);
    out.data = reinterpret_cast<const void*>(nb::cast<uintptr_t>(place[0]));
    out.batch = at(shape, 0), out.heads = at(shape, 1), out.tokens = at(shape, 2), out.dim = at(shape, 3);
    out.batch_stride = at(strides, 0), out.head_stride = at(strides, 1);
    out.token_stride = at(strides, 2), out.dim_stride = at(strides, 3);
    return out;
}

inline void require_finite(const char* name, const TokenArray& array, float limit = 3.402823466e38f) {
    int64_t place[4];
    if (!array.find_bad(limit, place)) return;
    std::vector<float> row(static_cast<size_t>(array.dim));
    array.read(place[0], place[1], place[2], row.data());
    const float found = row[size_t(place[3])];
    char value[32];
    std::snprintf(value, sizeof value, "%g", std::isnan(found) ? std::fabs(found) : found);  // no "-nan"
    std::string where = std::to_string(place[2]) + ", " + std::to_string(place[3]) + ")";
    where = array.head_stride || array.batch_stride || array.batch > 1 || array.heads > 1
                ? "(" + std::to_string(place[0]) + ", " + std::to_string(place[1]) + ", " + where
                : "(" + where;
    const std::string rule = std::isfinite(found) ? " must be at most 1e18 in size, got " : " must be finite, got ";
    throw std::invalid_argument(name + rule + value + " at " + where);
}

template <class T>
nb::ndarray<nb::numpy, T> own(std::vector<T>&& values, std::initializer_list<size_t> shape) {
    auto* kept = new std::vector<T>(std::move(values));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    // An empty vector may have no data; numpy wants some address.
    static T nothing{};
    return nb::ndarray<nb::numpy, T>(kept->empty() ? &nothing : kept->data(), shape, owner);
}

}  // namespace hsr

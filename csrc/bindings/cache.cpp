#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "attention/attend.h"
#include "attention/prefill.h"
#include "bindings/arrays.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace hsr;

namespace {

// Weights may exceed 1 by exp(30) (a safe band), so sums of weight * value stay inside float32.
constexpr float kValueLimit = 1e18f;

using VectorIds = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Thresholds = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const uint8_t, nb::ndim<3>, nb::device::cpu>;

// What a certificate says: numbers [5][batch][heads][m], and what the call did. Most are never looked at, so they
// become Python's only when it asks.
struct Facts {
    std::vector<float> numbers;
    size_t batch, heads, tokens;
    AttendWork work;
};

nb::ndarray<nb::numpy, float> number_of(const nb::handle_t<Facts>& self, size_t which) {
    auto& facts = nb::cast<Facts&>(self);
    if (which >= 5) throw std::out_of_range("which must be below 5, got " + std::to_string(which));
    float* const from = facts.numbers.data() + which * facts.batch * facts.heads * facts.tokens;
    return nb::ndarray<nb::numpy, float>(from, {facts.batch, facts.heads, facts.tokens}, self);
}

nb::dict work_of(const Facts& facts) {
    const AttendWork& work = facts.work;
    nb::dict counters;
    counters["sketch_scored"] = work.sketch_scored;
    counters["refined"] = work.refined;
    counters["full_scored"] = work.full_scored;
    counters["sketched"] = work.sketched;
    counters["scanned_four"] = work.scanned_four;
    counters["scanned_eight"] = work.scanned_eight;
    counters["scanned_full"] = work.scanned_full;
    counters["skipped"] = work.skipped;
    counters["panels"] = work.panels;
    counters["selected_again"] = work.selected_again;
    return counters;
}

// The names are those the caller knows the arrays by, for messages.
void append(LayerCache& self, const nb::object& keys, const nb::object& values, const std::string& keys_name,
            const std::string& values_name) {
    const TokenArray k = token_array(keys, int(self.dtype())), v = token_array(values, int(self.dtype()));
    nb::gil_scoped_release release;
    require_finite(keys_name.c_str(), k);
    require_finite(values_name.c_str(), v, kValueLimit);
    const std::unique_lock lock(self.mutex());
    self.append(k, v);
}

uint16_t nearest_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
// What that rounds away at most, over a row: half a unit in the last place, or of the smallest number.
float bfloat16_rounding(const float* x, size_t count) {
    float largest = 0;
    for (size_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(x[i]));
    return std::max(largest * 0x1p-8f, 0x1p-133f);
}

// `visible` none: the queries are the newest positions, causal among themselves. `out_address` not 0: the answer is
// written there, contiguous, as float32 or with `out_bfloat16` rounded, which the bound then includes; else it is
// returned as a numpy array. With `facts` they are returned beside it.
nb::tuple attend_cache(const LayerCache& self, const nb::object& queries, int dtype, uintptr_t out_address,
                       bool out_bfloat16, std::optional<VectorIds> visible, const AttendSettings& rule, double scale,
                       bool certify, bool facts, std::optional<Thresholds> thresholds, std::optional<Mask> mask) {
    AttendQueries call{};
    call.queries = token_array(queries, dtype);
    call.thresholds = thresholds ? thresholds->data() : nullptr;
    if (mask) {
        if (mask->stride(2) != 1 && mask->shape(2) > 1)
            throw std::invalid_argument("mask must be contiguous over keys");
        call.mask = mask->data();
        call.mask_batch_stride = mask->shape(0) == 1 ? 0 : mask->stride(0);
        call.mask_query_stride = mask->shape(1) == 1 ? 0 : mask->stride(1);
    }
    AttendSettings settings = rule;
    settings.scale = scale;
    settings.certify = certify;
    const size_t batch = size_t(call.queries.batch), heads = size_t(call.queries.heads),
                 m = size_t(call.queries.tokens), rows = batch * heads * m, dim = size_t(self.value_dim());
    const bool in_place = out_address && !out_bfloat16;
    std::vector<float> own_out(in_place ? 0 : rows * dim);
    Facts found{std::vector<float>(5 * rows), batch, heads, m, {}};
    float* const out = in_place ? reinterpret_cast<float*>(out_address) : own_out.data();
    {
        nb::gil_scoped_release release;
        require_finite("q", call.queries);
        float* fact = found.numbers.data();
        const AttendResult result{out, fact, fact + rows, fact + 2 * rows, fact + 3 * rows, fact + 4 * rows};
        const std::shared_lock lock(self.mutex());
        // Other threads may have changed the cache since Python looked.
        if (mask && mask->shape(2) != self.size())
            throw std::invalid_argument("mask must have one column a cached token, got " +
                                        std::to_string(mask->shape(2)) + " for " + std::to_string(self.size()));
        std::vector<int64_t> newest;
        if (!visible)
            for (int64_t i = 0; i < call.queries.tokens; ++i)
                newest.push_back(int64_t(self.size()) - call.queries.tokens + i + 1);
        call.visible = visible ? visible->data() : newest.data();
        found.work = prefill_serves(self, settings, call) ? prefill(self, settings, call, result)
                                                          : attend(self, settings, call, result);
        self.drop_pages();
        if (out_address && out_bfloat16) {
            auto* rounded = reinterpret_cast<uint16_t*>(out_address);
            for (size_t i = 0; i < rows * dim; ++i) rounded[i] = nearest_bfloat16(out[i]);
            for (size_t row = 0; row < rows; ++row)
                fact[row] = std::nextafter(fact[row] + bfloat16_rounding(out + row * dim, dim),
                                           std::numeric_limits<float>::infinity());
        }
        for (size_t row = 0; row < rows; ++row) fact[rows + row] = std::min(fact[rows + row], fact[row]);
    }
    const nb::object answer = out_address ? nb::none() : nb::cast(own(std::move(own_out), {batch, heads, m, dim}));
    return nb::make_tuple(answer, facts ? nb::cast(std::move(found)) : nb::none());
}

// Keys or values as [batch, heads, n, dim], read-only, without a copy; later appends do not move it.
nb::object rows_view(const LayerCache& cache, bool keys) {
    std::shared_lock lock(cache.mutex(), std::defer_lock);
    {
        nb::gil_scoped_release release;  // a writer that holds the lock may wait for the GIL
        lock.lock();
    }
    const RowStore& store = keys ? cache.keys() : cache.values();
    store.read_in_order();
    const int batch = cache.batch();
    auto* held = new std::shared_ptr<const Buffer>(store.share());
    nb::capsule owner(held, [](void* p) noexcept { delete static_cast<std::shared_ptr<const Buffer>*>(p); });
    static float nothing = 0;
    const size_t heads = size_t(store.heads()) / size_t(batch), dim = size_t(store.dim());
    const size_t shape[4] = {size_t(batch), heads, store.size(), dim};
    const int64_t strides[4] = {int64_t(heads * dim), int64_t(dim), int64_t(size_t(store.heads()) * dim), 1};
    void* data = store.size() ? const_cast<uint8_t*>((*held)->data()) : reinterpret_cast<uint8_t*>(&nothing);
    if (store.dtype() == Dtype::float32) return nb::cast(nb::ndarray<nb::numpy, float>(data, 4, shape, owner, strides));
    return nb::cast(nb::ndarray<nb::numpy, uint16_t>(data, 4, shape, owner, strides));
}

}  // namespace

void init_cache(nb::module_& m) {
    nb::class_<Facts>(m, "Facts").def("number", &number_of, "which"_a).def("work", &work_of);
    nb::class_<AttendSettings>(m, "AttendSettings")
        .def(
            "__init__",
            [](AttendSettings* self, int rule, bool sketch_tail, double epsilon, double exact_share, int64_t top_r,
               int power) {
                new (self) AttendSettings();
                self->rule = Rule(rule);
                self->sketch_tail = sketch_tail;
                self->epsilon = epsilon;
                self->exact_share = exact_share;
                self->top_r = top_r;
                self->power = power;
            },
            nb::kw_only(), "rule"_a, "sketch_tail"_a, "epsilon"_a, "exact_share"_a, "top_r"_a, "power"_a);
    nb::class_<LayerCache>(m, "LayerCache")
        .def(
            "__init__",
            [](LayerCache* self, int batch, int kv_heads, int key_dim, int value_dim, int dtype, bool sketch_values,
               const std::string& directory) {
                new (self) LayerCache(batch, kv_heads, key_dim, value_dim, Dtype(dtype), sketch_values, directory);
            },
            "batch"_a, "kv_heads"_a, "key_dim"_a, "value_dim"_a, "dtype"_a, "sketch_values"_a, "directory"_a)
        .def_prop_ro("batch", &LayerCache::batch)
        .def_prop_ro("kv_heads", &LayerCache::kv_heads)
        .def_prop_ro("key_dim", &LayerCache::key_dim)
        .def_prop_ro("value_dim", &LayerCache::value_dim)
        .def_prop_ro("dtype", [](const LayerCache& self) { return int(self.dtype()); })
        .def_prop_ro("row_nbytes", &LayerCache::row_nbytes)
        .def_prop_ro("code_nbytes", &LayerCache::code_nbytes)
        .def("__len__", &LayerCache::size)
        .def("append", &append, "keys"_a, "values"_a, "keys_name"_a, "values_name"_a)
        .def(
            "crop",
            [](LayerCache& self, size_t size) {
                nb::gil_scoped_release release;
                const std::unique_lock lock(self.mutex());
                self.crop(std::min(size, self.size()));
            },
            "size"_a)
        .def(
            "reorder",
            [](LayerCache& self, const VectorIds& sources) {
                nb::gil_scoped_release release;
                const std::unique_lock lock(self.mutex());
                self.reorder(sources.data(), sources.shape(0));
            },
            "sources"_a)
        .def("key_rms",
             [](const LayerCache& self) {
                 std::vector<double> rms;
                 for (int head = 0; head < self.batch() * self.kv_heads(); ++head) rms.push_back(self.key_rms(head));
                 return own(std::move(rms), {size_t(self.batch()), size_t(self.kv_heads())});
             })
        .def("keys", [](const LayerCache& self) { return rows_view(self, true); })
        .def("values", [](const LayerCache& self) { return rows_view(self, false); })
        .def("attend", &attend_cache, "queries"_a, "dtype"_a, "out_address"_a, "out_bfloat16"_a, "visible"_a.none(),
             "settings"_a, "scale"_a, "certify"_a, "facts"_a, "thresholds"_a.none(), "mask"_a.none());
}

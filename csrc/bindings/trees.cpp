// The low-dimensional indexes: static structures and the forest that makes them dynamic.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "tree/convex_layers.h"
#include "tree/forest.h"
#include "tree/partition_tree.h"
#include "tree/shallow_cutting.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace hsr::tree;

template <class T, size_t Rank>
using Array = nb::ndarray<const T, nb::ndim<Rank>, nb::c_contig, nb::device::cpu>;
using Keys = Array<float, 2>;   // [n, dim]
using Ids = Array<int64_t, 1>;  // [n]
using Doubles = Array<double, 1>;

template <class T>
nb::object owned(T* data, size_t size) {
    nb::capsule owner(data, [](void* p) noexcept { std::free(p); });
    return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(data, {size}, owner));
}

nb::object owned(const std::vector<int64_t>& values) {
    Growable<int64_t> copy;
    copy.resize(values.size());
    std::copy(values.begin(), values.end(), copy.data());
    const size_t size = copy.size();
    return owned(copy.release(), size);
}

nb::tuple to_python(Report&& report) {
    const size_t n = report.ids.size();
    return nb::make_tuple(owned(report.indptr), owned(report.ids.release(), n), owned(report.scores.release(), n),
                          report.counters.nodes, report.counters.scored);
}

// Keys and queries are checked where they are read; the form of the message is that of `arguments.finite`.
void require_finite(const char* name, const Keys& rows) {
    const float* data = rows.data();
    const size_t size = rows.shape(0) * rows.shape(1);
    float sum = 0;
    for (size_t i = 0; i < size; ++i) sum += data[i] * 0.0f;  // NaN as soon as one is not finite
    if (sum == 0) return;
    for (size_t i = 0; i < size; ++i) {
        if (std::isfinite(data[i])) continue;
        const std::string found = std::isnan(data[i]) ? "nan" : data[i] > 0 ? "inf" : "-inf";
        throw nb::value_error((std::string(name) + " must be finite, got " + found + " at (" +
                               std::to_string(i / rows.shape(1)) + ", " + std::to_string(i % rows.shape(1)) + ")")
                                  .c_str());
    }
}

void require_numbers(const Doubles& thresholds) {
    const double* data = thresholds.data();
    for (size_t i = 0; i < thresholds.shape(0); ++i)
        if (std::isnan(data[i])) throw nb::value_error("thresholds must not be NaN");
}

nb::tuple live_of(int dim, const std::vector<const StaticIndex*>& parts) {
    size_t n = 0;
    for (const StaticIndex* part : parts) n += size_t(part->live());
    Growable<float> keys;
    Growable<int64_t> ids;
    keys.resize(n * size_t(dim));
    ids.resize(n);
    {
        nb::gil_scoped_release release;
        size_t at = 0;
        for (const StaticIndex* part : parts) {
            part->copy_live(keys.data() + at * size_t(dim), ids.data() + at);
            at += size_t(part->live());
        }
    }
    float* data = keys.release();
    nb::capsule owner(data, [](void* p) noexcept { std::free(p); });
    return nb::make_tuple(nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(data, {n, size_t(dim)}, owner)),
                          owned(ids.release(), n));
}

}  // namespace

void init_trees(nb::module_& m) {
    nb::class_<StaticIndex>(m, "StaticIndex")
        .def_prop_ro("size", &StaticIndex::size)
        .def_prop_ro("live", &StaticIndex::live)
        .def_prop_ro("nbytes", &StaticIndex::nbytes);

    nb::class_<ConvexLayers, StaticIndex>(m, "ConvexLayers")
        .def(
            "__init__",
            [](ConvexLayers* self, Keys keys, Ids ids) {
                nb::gil_scoped_release release;
                new (self) ConvexLayers(int64_t(keys.shape(0)), keys.data(), ids.data());
            },
            "keys"_a, "ids"_a)
        .def_prop_ro("node_count", &ConvexLayers::node_count);

    nb::class_<PartitionTree, StaticIndex>(m, "PartitionTree")
        .def(
            "__init__",
            [](PartitionTree* self, Keys keys, Ids ids, int leaf_size) {
                nb::gil_scoped_release release;
                new (self)
                    PartitionTree(int(keys.shape(1)), int64_t(keys.shape(0)), keys.data(), ids.data(), leaf_size);
            },
            "keys"_a, "ids"_a, "leaf_size"_a)
        .def_prop_ro("node_count", &PartitionTree::node_count)
        .def_prop_ro("frame_count", &PartitionTree::frame_count);

    nb::class_<ShallowCutting, PartitionTree>(m, "ShallowCutting")
        .def(
            "__init__",
            [](ShallowCutting* self, Keys keys, Ids ids, int leaf_size, Array<int32_t, 1> random_order) {
                nb::gil_scoped_release release;
                new (self) ShallowCutting(int(keys.shape(1)), int64_t(keys.shape(0)), keys.data(), ids.data(),
                                          leaf_size, random_order.data());
            },
            "keys"_a, "ids"_a, "leaf_size"_a, "random_order"_a)
        .def(
            "add_level",
            [](ShallowCutting& self, int64_t sample, Array<int32_t, 2> simplices, Keys normals) {
                nb::gil_scoped_release release;
                self.add_level(sample, int64_t(simplices.shape(0)), simplices.data(), normals.data());
            },
            "sample"_a, "simplices"_a, "normals"_a)
        .def_prop_ro("levels", &ShallowCutting::levels)
        .def_prop_ro("list_bytes", &ShallowCutting::list_bytes);

    nb::class_<Forest>(m, "Forest")
        .def(nb::init<int>(), "dim"_a)
        .def("__len__", &Forest::live)
        .def_prop_ro("nbytes", &Forest::nbytes)
        .def_prop_ro("next_id", &Forest::next_id)
        .def_prop_ro("tail_size", [](const Forest& self) { return self.tail().size(); })
        .def_prop_ro("parts",
                     [](const Forest& self) {
                         nb::list parts;
                         for (const auto& part : self.parts()) parts.append(nb::cast(part));
                         return parts;
                     })
        .def(
            "append",
            [](Forest& self, Keys keys) {
                require_finite("keys", keys);
                self.append(keys.data(), int64_t(keys.shape(0)));
            },
            "keys"_a)
        .def(
            "erase", [](Forest& self, Ids ids) { return self.erase(ids.data(), int64_t(ids.shape(0))); }, "ids"_a,
            "Delete all and return -1, or delete none and return the place of the first unknown id.")
        .def(
            "live_from",
            [](const Forest& self, size_t first) {
                std::vector<const StaticIndex*> parts;
                for (size_t i = first; i < self.parts().size(); ++i) parts.push_back(self.parts()[i].get());
                parts.push_back(&self.tail());
                return live_of(self.dim(), parts);
            },
            "first"_a, "Keys and ids of the live keys in parts[first:] and the tail.")
        .def(
            "live_of", [](const Forest& self, size_t at) { return live_of(self.dim(), {self.parts().at(at).get()}); },
            "at"_a)
        .def("replace_from", &Forest::replace_from, "first"_a, "part"_a.none(), "next_id"_a)
        .def("replace", &Forest::replace, "at"_a, "part"_a.none())
        .def(
            "report",
            [](const Forest& self, Keys queries, Doubles thresholds) {
                require_finite("queries", queries);
                require_numbers(thresholds);
                Report report;
                {
                    nb::gil_scoped_release release;
                    report = self.report(queries.data(), int64_t(queries.shape(0)), thresholds.data());
                }
                return to_python(std::move(report));
            },
            "queries"_a, "thresholds"_a)
        .def(
            "count",
            [](const Forest& self, Keys queries, Doubles thresholds) {
                require_finite("queries", queries);
                require_numbers(thresholds);
                std::vector<int64_t> counts;
                {
                    nb::gil_scoped_release release;
                    counts = self.count(queries.data(), int64_t(queries.shape(0)), thresholds.data());
                }
                return owned(counts);
            },
            "queries"_a, "thresholds"_a)
        .def(
            "top",
            [](const Forest& self, Keys queries, int64_t r) {
                require_finite("queries", queries);
                Report report;
                {
                    nb::gil_scoped_release release;
                    report = self.top(queries.data(), int64_t(queries.shape(0)), r);
                }
                return to_python(std::move(report));
            },
            "queries"_a, "r"_a);
}

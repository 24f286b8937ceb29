#include <mutex>

#include "bindings/arrays.h"
#include "index/flat_index.h"
#include "index/sketch_index.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace hsr;

namespace {

using Vector64 = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using VectorIds = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<float> floats(const AnyArray& array, int dtype, const char* name) {
    const TokenArray rows = token_array(array, dtype);
    require_finite(name, rows);
    std::vector<float> out(size_t(rows.tokens * rows.dim));
    for (int64_t t = 0; t < rows.tokens; ++t) rows.read(0, 0, t, out.data() + t * rows.dim);
    return out;
}

nb::tuple counters(const WorkCounters& work) {
    return nb::make_tuple(work.sketch_scored, work.refined, work.full_scored, work.reported);
}

nb::tuple arrays(ReportArrays&& report) {
    const size_t rows = report.indptr.size(), found = report.indices.size();
    const nb::tuple work = counters(report.work);
    return nb::make_tuple(own(std::move(report.indptr), {rows}), own(std::move(report.indices), {found}),
                          own(std::move(report.scores), {found}), work);
}

template <class Index>
void bind_index(nb::module_& m, const char* name) {
    nb::class_<Index>(m, name)
        .def(
            "__init__", [](Index* self, int dim, int dtype) { new (self) Index(dim, Dtype(dtype)); }, "dim"_a,
            "dtype"_a)
        .def_prop_ro("dim", [](const Index& self) { return self.dim(); })
        .def_prop_ro("dtype", [](const Index& self) { return int(self.dtype()); })
        .def_prop_ro("nbytes", [](const Index& self) { return self.nbytes(); })
        .def("__len__", [](const Index& self) { return self.size(); })
        .def(
            "append",
            [](Index& self, const AnyArray& keys) {
                const TokenArray rows = token_array(keys, int(self.dtype()));
                nb::gil_scoped_release release;
                require_finite("keys", rows);
                const std::unique_lock lock(self.mutex());
                return self.append(rows);
            },
            "keys"_a)
        .def(
            "delete",
            [](Index& self, const VectorIds& ids) {
                nb::gil_scoped_release release;
                const std::unique_lock lock(self.mutex());
                self.remove(ids.data(), ids.shape(0));
            },
            "ids"_a)
        .def(
            "report",
            [](const Index& self, const AnyArray& queries, int dtype, const Vector64& thresholds) {
                ReportArrays report;
                {
                    nb::gil_scoped_release release;
                    const auto rows = floats(queries, dtype, "queries");
                    const std::shared_lock lock(self.mutex());
                    report = self.report(rows.data(), thresholds.data(), thresholds.shape(0));
                }
                return arrays(std::move(report));
            },
            "queries"_a, "dtype"_a, "thresholds"_a)
        .def(
            "count",
            [](const Index& self, const AnyArray& queries, int dtype, const Vector64& thresholds) {
                std::vector<int64_t> counts;
                WorkCounters work;
                {
                    nb::gil_scoped_release release;
                    const auto rows = floats(queries, dtype, "queries");
                    const std::shared_lock lock(self.mutex());
                    counts = self.count(rows.data(), thresholds.data(), thresholds.shape(0), work);
                }
                const size_t m = counts.size();
                return nb::make_tuple(own(std::move(counts), {m}), counters(work));
            },
            "queries"_a, "dtype"_a, "thresholds"_a)
        .def(
            "top_r",
            [](const Index& self, const AnyArray& queries, int dtype, size_t r) {
                ReportArrays report;
                {
                    nb::gil_scoped_release release;
                    const auto rows = floats(queries, dtype, "queries");
                    const std::shared_lock lock(self.mutex());
                    report = self.top_r(rows.data(), queries.shape(0), r);
                }
                return arrays(std::move(report));
            },
            "queries"_a, "dtype"_a, "r"_a);
}

}  // namespace

void init_indexes(nb::module_& m) {
    bind_index<FlatIndex>(m, "FlatIndex");
    bind_index<SketchIndex>(m, "SketchIndex");
}

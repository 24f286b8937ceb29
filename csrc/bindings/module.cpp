// Table of contents of the extension; one file a topic.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <system_error>

#include "kernels/kernels.h"
#include "threads.h"
#include "tree/kernels.h"

namespace nb = nanobind;

void init_indexes(nb::module_& m);
void init_cache(nb::module_& m);
void init_trees(nb::module_& m);

namespace {

// A disk that is full, a directory that may not be written: OSError, with its errno.
void as_os_error(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
        nb::object made = nb::steal(PyObject_CallFunction(PyExc_OSError, "is", error.code().value(), error.what()));
        if (made.is_valid()) PyErr_SetObject((PyObject*)Py_TYPE(made.ptr()), made.ptr());
    }
}

}  // namespace

NB_MODULE(_native, m) {
    nb::register_exception_translator(as_os_error);
    m.doc() = "Native kernels, indexes and caches of hsr_attention.";
    m.def("isa_in_use", &hsr::isa_in_use);
    m.def("isa_available", &hsr::isa_available);
    m.def(
        "use_isa",
        [](const std::string& name) {
            hsr::use_isa(name);
            hsr::tree::follow_isa();
        },
        nb::arg("name"));
    m.def("num_threads", &hsr::num_threads);
    m.def("set_num_threads", &hsr::set_num_threads, nb::arg("count"));
    m.def("set_openmp", &hsr::set_openmp, nb::arg("gomp_parallel"));
    m.def("uses_openmp", &hsr::uses_openmp);
    init_indexes(m);
    init_cache(m);
    init_trees(m);
}

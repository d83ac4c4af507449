#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/register.h"
#include "bindings/torch_tensor.h"
#include "flash_mla/error.h"

namespace nb = nanobind;

namespace {

/// Translators are asked from the last one registered to the first, so a derived class comes after its base.
void register_exceptions(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const flash_mla::InvalidType& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const flash_mla::InvalidArgument& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
  nb::exception<flash_mla::Unsupported>(m, "Unsupported", PyExc_RuntimeError);
  nb::exception<flash_mla::CudaError>(m, "CudaError", PyExc_RuntimeError);
}

}  // namespace

NB_MODULE(_C, m) {
  register_exceptions(m);
  nb::class_<flash_mla::bindings::Bfloat16Bits>(m, "Bfloat16Bits",
                                                "A uint16 array whose values are the bits of bfloat16 numbers.")
      .def(
          "__init__",
          [](flash_mla::bindings::Bfloat16Bits* self, nb::object bits) {
            new (self) flash_mla::bindings::Bfloat16Bits{std::move(bits)};
          },
          nb::arg("bits"));
  nb::class_<flash_mla::bindings::ShapeDType>(
      m, "ShapeDType", "An array that isn't there yet, for checks of shapes and dtypes: row-major, on the CPU.")
      .def(nb::init<std::vector<std::int64_t>, const std::string&>(), nb::arg("shape"), nb::arg("dtype"));
  m.def("find_torch", flash_mla::bindings::torch::find, nb::arg("tensor_type"),
        "Takes the short way for tensors of PyTorch from now on, where this PyTorch has what it needs.");
  m.def("torch_can_read", flash_mla::bindings::torch::can_read, nb::arg("array").none(),
        "Whether the short way takes this array, on this thread, now.");
  flash_mla::bindings::register_build_info(m);
  flash_mla::bindings::register_plan(m);
  flash_mla::bindings::register_dense_decode(m);
  flash_mla::bindings::register_merge_states(m);
  flash_mla::bindings::register_ceilings(m);
  flash_mla::bindings::register_xla_ffi(m);
}

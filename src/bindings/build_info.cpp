#include "bindings/register.h"

// The macros are set for this file alone, by cmake/build_info.cmake.

namespace flash_mla::bindings {
namespace {

namespace nb = nanobind;

nb::dict build_info() {
  nb::dict info;
  info["version"] = FLASH_MLA_VERSION;
  info["commit"] = FLASH_MLA_COMMIT;
  info["cuda"] = FLASH_MLA_CUDA_VERSION;
  info["nvcc"] = FLASH_MLA_NVCC_VERSION;
  info["architectures"] = FLASH_MLA_ARCHITECTURES;
  info["compiler"] = FLASH_MLA_COMPILER;
  return info;
}

}  // namespace

void register_build_info(nb::module_& m) {
  m.def("build_info", build_info, "How this module was built: version, commit, CUDA, nvcc, architectures, compiler.");
}

}  // namespace flash_mla::bindings

#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::bindings {

// One for each operation; module.cpp calls them.
void register_build_info(nanobind::module_& m);
void register_plan(nanobind::module_& m);
void register_dense_decode(nanobind::module_& m);
void register_merge_states(nanobind::module_& m);
void register_ceilings(nanobind::module_& m);
void register_xla_ffi(nanobind::module_& m);

}  // namespace flash_mla::bindings

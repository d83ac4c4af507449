# The Python module _C, a cp310-abi3 extension of nanobind's split mode: libflash_mla.so lies beside it, in lib/.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(nanobind CONFIG REQUIRED)

nanobind_add_module(
  _C BACKEND_MODULE nanobind_backend NOMINSIZE NB_SUPPRESS_WARNINGS
  src/bindings/build_info.cpp src/bindings/ceilings.cpp src/bindings/dense_decode.cpp src/bindings/dlpack.cpp
  src/bindings/merge_states.cpp src/bindings/module.cpp src/bindings/plan.cpp src/bindings/torch_tensor.cpp
  src/bindings/xla_ffi.cpp)
include(cmake/build_info.cmake)
flash_mla_build_info(src/bindings/build_info.cpp)
target_include_directories(_C PRIVATE src)
# Without its NEEDED entries, auditwheel cannot tell which libc the module is for.
target_link_options(_C PRIVATE -Wl,--no-as-needed)
target_link_libraries(_C PRIVATE flash_mla::flash_mla ${CMAKE_DL_LIBS})
set_target_properties(_C PROPERTIES CXX_EXTENSIONS OFF INSTALL_RPATH "$ORIGIN/${CMAKE_INSTALL_LIBDIR}")
flash_mla_warnings(_C)
install(TARGETS _C LIBRARY DESTINATION .)

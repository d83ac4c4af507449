# Installs headers, libraries, the CMake package flash_mla, and flash_mla and flash_mla_static for pkg-config. All find
# the rest from where they lie, so that the tree can be moved. libcudart_static.a goes beside the static library, which
# needs it; users without a CUDA toolkit find it there.
include(CMakePackageConfigHelpers)

install(TARGETS flash_mla flash_mla_static EXPORT flash_mla_targets)
install(DIRECTORY include/flash_mla TYPE INCLUDE)
get_target_property(cudart_static CUDA::cudart_static IMPORTED_LOCATION)
install(FILES "${cudart_static}" DESTINATION ${CMAKE_INSTALL_LIBDIR})

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flash_mla)
install(EXPORT flash_mla_targets NAMESPACE flash_mla:: FILE flash_mlaTargets.cmake DESTINATION ${package_dir})
configure_package_config_file(cmake/flash_mlaConfig.cmake.in flash_mlaConfig.cmake INSTALL_DESTINATION ${package_dir}
                              PATH_VARS CMAKE_INSTALL_LIBDIR)
write_basic_package_version_file(flash_mlaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flash_mlaConfig.cmake ${PROJECT_BINARY_DIR}/flash_mlaConfigVersion.cmake
        DESTINATION ${package_dir})

set(pkgconfig_dir ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig)
cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX BASE_DIRECTORY ${pkgconfig_dir} OUTPUT_VARIABLE prefix_from_pc)
cmake_path(RELATIVE_PATH CMAKE_INSTALL_FULL_INCLUDEDIR BASE_DIRECTORY ${pkgconfig_dir}
           OUTPUT_VARIABLE includedir_from_pc)
foreach(package IN ITEMS flash_mla flash_mla_static)
  configure_file(cmake/${package}.pc.in ${package}.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/${package}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endforeach()

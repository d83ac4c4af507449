# Finds nvcc, enables the CUDA language and finds the toolkit that nvcc belongs to. In this order:
#   1. what the user names: CMAKE_CUDA_COMPILER, CUDACXX, CUDAToolkit_ROOT, CUDA_HOME or CUDA_PATH
#   2. nvcc on PATH or in /usr/local/cuda, if new enough
#   3. the PyPI package cuda-toolkit[nvcc,cccl], where the Python at hand finds its packages
set(FLASH_MLA_CUDA_MINIMUM 12.8)
option(FLASH_MLA_NVCC_FROM_WHEEL "Pass over toolkits that are installed, and take nvcc from the PyPI package" OFF)

function(flash_mla_nvcc_version nvcc result)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE output ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${output}")
  set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# The folders that Python imports from. pip lays build requirements in several, and not all are on CMAKE_PREFIX_PATH.
function(flash_mla_python_path result)
  if(DEFINED Python_EXECUTABLE)
    set(python "${Python_EXECUTABLE}")
  else()
    find_program(python python3 NO_CACHE)
  endif()
  execute_process(COMMAND "${python}" -c "import sys; print(*filter(None, sys.path), sep=';')"
                  OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(${result} "${folders}" PARENT_SCOPE)
endfunction()

function(flash_mla_find_nvcc result)
  if(NOT FLASH_MLA_NVCC_FROM_WHEEL)
    foreach(root IN ITEMS "${CUDAToolkit_ROOT}" "$ENV{CUDAToolkit_ROOT}" "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}")
      if(root)
        set(${result} "${root}/bin/nvcc" PARENT_SCOPE)
        return()
      endif()
    endforeach()
    find_program(installed_nvcc nvcc PATHS /usr/local/cuda/bin NO_CMAKE_PATH NO_CACHE)
    if(installed_nvcc)
      flash_mla_nvcc_version("${installed_nvcc}" version)
      if(version VERSION_GREATER_EQUAL FLASH_MLA_CUDA_MINIMUM)
        set(${result} "${installed_nvcc}" PARENT_SCOPE)
        return()
      endif()
      message(STATUS "Passing over ${installed_nvcc}: CUDA ${version} is older than ${FLASH_MLA_CUDA_MINIMUM}")
    endif()
  endif()
  flash_mla_python_path(folders)
  find_program(wheel_nvcc nvcc PATHS ${folders} PATH_SUFFIXES nvidia/cu13/bin NO_DEFAULT_PATH NO_CACHE)
  if(NOT wheel_nvcc)
    message(FATAL_ERROR "No nvcc of CUDA ${FLASH_MLA_CUDA_MINIMUM} or newer is on PATH or in /usr/local/cuda. Name a "
                        "toolkit (CUDA_HOME=/path/to/cuda), or install the one from PyPI: "
                        "pip install 'cuda-toolkit[nvcc,cccl]==13.0.*'")
  endif()
  set(${result} "${wheel_nvcc}" PARENT_SCOPE)
endfunction()

if(NOT CMAKE_CUDA_COMPILER AND ("$ENV{CUDACXX}" STREQUAL "" OR FLASH_MLA_NVCC_FROM_WHEEL))
  flash_mla_find_nvcc(CMAKE_CUDA_COMPILER)
endif()

# The PyPI package has lib where nvcc's profile says lib64, and its libcudart.so is there by its versioned name only.
cmake_path(GET CMAKE_CUDA_COMPILER PARENT_PATH flash_mla_nvcc_folder)
cmake_path(GET flash_mla_nvcc_folder PARENT_PATH flash_mla_cuda_root)
if(EXISTS "${flash_mla_cuda_root}/lib/libcudart.so.13" AND NOT EXISTS "${flash_mla_cuda_root}/lib64")
  string(APPEND CMAKE_CUDA_FLAGS " -L${flash_mla_cuda_root}/lib")
  set(CUDA_CUDART "${flash_mla_cuda_root}/lib/libcudart.so.13" CACHE FILEPATH "The CUDA runtime")
endif()

set(CMAKE_CUDA_ARCHITECTURES 90a-real) # Hopper's own instructions: no other GPU can run them
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS FLASH_MLA_CUDA_MINIMUM)
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}; "
                      "expected ${FLASH_MLA_CUDA_MINIMUM} or newer")
endif()
find_package(CUDAToolkit REQUIRED)

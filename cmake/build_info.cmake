# What `flash-mla info` says of a build. The commit is the one given, or HEAD of the git tree whose top this folder is,
# "-dirty" behind it where tracked files differ; "unknown" elsewhere, as in an sdist.
set(FLASH_MLA_COMMIT "" CACHE STRING "The commit that is built; by default git is asked")

function(flash_mla_commit result)
  set(${result} "unknown" PARENT_SCOPE)
  if(FLASH_MLA_COMMIT)
    set(${result} "${FLASH_MLA_COMMIT}" PARENT_SCOPE)
    return()
  endif()
  find_program(git git NO_CACHE)
  if(NOT git OR NOT EXISTS "${PROJECT_SOURCE_DIR}/.git") # a tree within somebody else's repository has no .git itself
    return()
  endif()
  execute_process(COMMAND "${git}" -C "${PROJECT_SOURCE_DIR}" describe --always --dirty --exclude=* --abbrev=12
                  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE status)
  if(status EQUAL 0)
    set(${result} "${commit}" PARENT_SCOPE)
  endif()
endfunction()

function(flash_mla_build_info source)
  flash_mla_commit(commit)
  string(REGEX REPLACE "^([0-9]+[a-z]?).*" "sm_\\1" architectures "${CMAKE_CUDA_ARCHITECTURES}")
  set_property(
    SOURCE ${source}
    APPEND
    PROPERTY COMPILE_DEFINITIONS
             FLASH_MLA_VERSION="${PROJECT_VERSION}"
             FLASH_MLA_COMMIT="${commit}"
             FLASH_MLA_CUDA_VERSION="${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}"
             FLASH_MLA_NVCC_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
             FLASH_MLA_ARCHITECTURES="${architectures}"
             FLASH_MLA_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
endfunction()

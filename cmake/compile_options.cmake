# How the library's sources are compiled: C++17, hidden symbols, warnings, and the gate on what ptxas reports.
function(flash_mla_compile_options target)
  target_compile_features(${target} PRIVATE cxx_std_17 cuda_std_17)
  set_target_properties(
    ${target}
    PROPERTIES POSITION_INDEPENDENT_CODE ON
               CXX_EXTENSIONS OFF
               CUDA_EXTENSIONS OFF
               CXX_VISIBILITY_PRESET hidden
               CUDA_VISIBILITY_PRESET hidden
               VISIBILITY_INLINES_HIDDEN ON)
  flash_mla_warnings(${target})
  if(FLASH_MLA_PTXAS_GATE)
    flash_mla_ptxas_gate(${target})
  endif()
endfunction()

function(flash_mla_warnings target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>
                                           $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
  if(FLASH_MLA_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>
                                             $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
endfunction()

# ptxas itself turns spills and local memory into errors. It reports serialised wgmma as information only, so a launcher
# reads its report, which stays beside the object file as NAME.o.ptxas.
function(flash_mla_ptxas_gate target)
  target_compile_options(
    ${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v,-warn-spills,-warn-lmem-usage,-Werror>)
  set(launcher sh ${PROJECT_SOURCE_DIR}/cmake/ptxas_gate.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})
  set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
endfunction()

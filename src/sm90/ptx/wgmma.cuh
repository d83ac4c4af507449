#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "sm90/ptx/shared.cuh"

// Warpgroup matrix multiply: PTX ISA, "Asynchronous warpgroup level matrix multiply-accumulate instructions". Operands
// in shared memory lie in the 128-byte swizzle: rows of 64 elements, 8 rows to an atom of 1024 bytes.

namespace flash_mla::ptx {

/// Before the first wgmma that touches registers which ordinary code has written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// Closes the group of the wgmmas issued so far.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until at most kPending groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Bytes of a swizzle atom: the step from 8 rows to the next 8.
constexpr std::uint32_t kAtomBytes = 1024;

/// A 128-byte swizzled operand in shared memory. kColumnStride: bytes from 64 columns to the next 64 of a transposed
/// operand; the others ignore it.
template <std::uint32_t kColumnStride>
class SwizzledOperand {
 public:
  /// At a shared-memory address. The compiler can't make descriptors ahead of this: it would hold dozens of
  /// loop-invariant ones in registers, and spill them.
  __device__ __forceinline__ explicit SwizzledOperand(std::uint32_t address)
      : low_((address >> 4) | ((kColumnStride >> 4) << 16)) {
    launder(low_);
  }
  /// Matrix descriptor (PTX ISA, "Matrix descriptor") of what lies `offset` bytes further, a multiple of 16.
  __device__ __forceinline__ std::uint64_t at(std::uint32_t offset) const {
    constexpr std::uint64_t kHigh = (kAtomBytes >> 4) | (1U << 30);  // stride offset; swizzle mode 128 bytes
    return kHigh << 32 | (low_ + (offset >> 4));
  }

 private:
  std::uint32_t low_;
};

// The macros' operands: the element's PTX name, A and B with their immediates, what the predicate is made of, inputs.
// clang-format off
#define FLASH_MLA_WGMMA_M64N64K16(type, operands, accumulates, ...)                                             \
  asm volatile(                                                                                                 \
      "{\n"                                                                                                     \
      ".reg .pred accumulate;\n"                                                                                \
      "setp.ne.b32 accumulate, " accumulates ", 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                                           \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                 \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                       \
      operands ";\n"                                                                                            \
      "}\n"                                                                                                     \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),         \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),   \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])  \
      : __VA_ARGS__);

#define FLASH_MLA_WGMMA_M64N128K16(type, operands, accumulates, ...)                                            \
  asm volatile(                                                                                                 \
      "{\n"                                                                                                     \
      ".reg .pred accumulate;\n"                                                                                \
      "setp.ne.b32 accumulate, " accumulates ", 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                                          \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                 \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                        \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                        \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                       \
      operands ";\n"                                                                                            \
      "}\n"                                                                                                     \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),         \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),   \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])  \
      : __VA_ARGS__);
// clang-format on

// One of them with its operands, for the function's Element.
#define FLASH_MLA_WGMMA_OF_ELEMENT(instruction, ...)      \
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) { \
    instruction("bf16", __VA_ARGS__)                      \
  } else {                                                \
    instruction("f16", __VA_ARGS__)                       \
  }

#define FLASH_MLA_WGMMA_INPUTS_A_SHARED "l"(a), "l"(b)
#define FLASH_MLA_WGMMA_INPUTS_A_REGISTERS "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3]), "l"(b)

/// D (64 x 64, float) = A (64 x 16) B (16 x 64) [+ D]; A and B from shared memory, both with k contiguous.
template <class Element>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], std::uint64_t a, std::uint64_t b, bool accumulate) {
  FLASH_MLA_WGMMA_OF_ELEMENT(FLASH_MLA_WGMMA_M64N64K16, "%32, %33, accumulate, 1, 1, 0, 0", "%34",
                             FLASH_MLA_WGMMA_INPUTS_A_SHARED, "r"(static_cast<int>(accumulate)))
}

/// The same, D += A B, with A from four registers a thread.
template <class Element>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], const std::uint32_t (&a)[4], std::uint64_t b) {
  FLASH_MLA_WGMMA_OF_ELEMENT(FLASH_MLA_WGMMA_M64N64K16, "{%32, %33, %34, %35}, %36, accumulate, 1, 1, 0", "1",
                             FLASH_MLA_WGMMA_INPUTS_A_REGISTERS)
}

/// D (64 x 128, float) += A (64 x 16) B (16 x 128); both from shared memory, A with k contiguous, B transposed: its 128
/// columns are contiguous, k is the row.
template <class Element>
__device__ __forceinline__ void wgmma_m64n128k16_tb(float (&d)[64], std::uint64_t a, std::uint64_t b) {
  FLASH_MLA_WGMMA_OF_ELEMENT(FLASH_MLA_WGMMA_M64N128K16, "%64, %65, accumulate, 1, 1, 0, 1", "1",
                             FLASH_MLA_WGMMA_INPUTS_A_SHARED)
}

/// The same with A from four registers a thread.
template <class Element>
__device__ __forceinline__ void wgmma_m64n128k16_ra_tb(float (&d)[64], const std::uint32_t* a, std::uint64_t b) {
  FLASH_MLA_WGMMA_OF_ELEMENT(FLASH_MLA_WGMMA_M64N128K16, "{%64, %65, %66, %67}, %68, accumulate, 1, 1, 1", "1",
                             FLASH_MLA_WGMMA_INPUTS_A_REGISTERS)
}

#undef FLASH_MLA_WGMMA_INPUTS_A_REGISTERS
#undef FLASH_MLA_WGMMA_INPUTS_A_SHARED
#undef FLASH_MLA_WGMMA_OF_ELEMENT
#undef FLASH_MLA_WGMMA_M64N128K16
#undef FLASH_MLA_WGMMA_M64N64K16

// clang-format off
#define FLASH_MLA_WGMMA_M64N16K16(type, transpose_a)                                                            \
  asm volatile(                                                                                                 \
      "{\n"                                                                                                     \
      ".reg .pred accumulate;\n"                                                                                \
      "setp.ne.b32 accumulate, %10, 0;\n"                                                                       \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type " "                                           \
      "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, accumulate, 1, 1, " transpose_a ", 0;\n"                       \
      "}\n"                                                                                                     \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])          \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));

#define FLASH_MLA_WGMMA_M64N32K16(type, transpose_a)                                                            \
  asm volatile(                                                                                                 \
      "{\n"                                                                                                     \
      ".reg .pred accumulate;\n"                                                                                \
      "setp.ne.b32 accumulate, %18, 0;\n"                                                                       \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " "                                           \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "                                \
      "%16, %17, accumulate, 1, 1, " transpose_a ", 0;\n"                                                       \
      "}\n"                                                                                                     \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),         \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])    \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
// clang-format on

/// D (64 x 16, float) = A (64 x 16) B (16 x 16) [+ D]; both from shared memory. B has k contiguous; A too, or, if
/// transposed, its rows.
template <class Element, bool kTransposeA>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[8], std::uint64_t a, std::uint64_t b, bool accumulate) {
  constexpr bool kIsBfloat16 = std::is_same_v<Element, __nv_bfloat16>;
  if constexpr (kIsBfloat16 && kTransposeA) {
    FLASH_MLA_WGMMA_M64N16K16("bf16", "1")
  } else if constexpr (kIsBfloat16) {
    FLASH_MLA_WGMMA_M64N16K16("bf16", "0")
  } else if constexpr (kTransposeA) {
    FLASH_MLA_WGMMA_M64N16K16("f16", "1")
  } else {
    FLASH_MLA_WGMMA_M64N16K16("f16", "0")
  }
}

/// The same for B of 16 x 32.
template <class Element, bool kTransposeA>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[16], std::uint64_t a, std::uint64_t b, bool accumulate) {
  constexpr bool kIsBfloat16 = std::is_same_v<Element, __nv_bfloat16>;
  if constexpr (kIsBfloat16 && kTransposeA) {
    FLASH_MLA_WGMMA_M64N32K16("bf16", "1")
  } else if constexpr (kIsBfloat16) {
    FLASH_MLA_WGMMA_M64N32K16("bf16", "0")
  } else if constexpr (kTransposeA) {
    FLASH_MLA_WGMMA_M64N32K16("f16", "1")
  } else {
    FLASH_MLA_WGMMA_M64N32K16("f16", "0")
  }
}

#undef FLASH_MLA_WGMMA_M64N16K16
#undef FLASH_MLA_WGMMA_M64N32K16

}  // namespace flash_mla::ptx

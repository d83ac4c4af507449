#pragma once

#include <cstdint>

// 8 x 8 matrices of 16-bit elements, spread over a warp: PTX ISA, "stmatrix", "movmatrix". A thread holds elements
// 2 * (lane % 4) and the next of row lane / 4.

namespace flash_mla::ptx {

/// Stores four matrices transposed. Lanes 8 i to 8 i + 7 give the addresses of the rows (16 bytes) that matrix i's
/// columns become.
__device__ __forceinline__ void store_matrix_x4_transposed(std::uint32_t address, std::uint32_t a, std::uint32_t b,
                                                           std::uint32_t c, std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ std::uint32_t transpose_matrix(std::uint32_t matrix) {
  std::uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
  return transposed;
}

}  // namespace flash_mla::ptx

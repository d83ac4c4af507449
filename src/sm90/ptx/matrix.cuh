#pragma once

#include <cstdint>

// 8 x 8 matrices of 16-bit elements, spread over a warp: PTX ISA, "ldmatrix", "stmatrix", "movmatrix". A thread holds
// elements 2 * (lane % 4) and the next of row lane / 4.

namespace flash_mla::ptx {

/// Loads four matrices. Lanes 8 i to 8 i + 7 give the addresses of matrix i's rows, 16 bytes each.
__device__ __forceinline__ void load_matrix_x4(std::uint32_t address, std::uint32_t (&matrices)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

/// Stores four matrices, to addresses given in the same way.
__device__ __forceinline__ void store_matrix_x4(std::uint32_t address, std::uint32_t a, std::uint32_t b,
                                                std::uint32_t c, std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

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

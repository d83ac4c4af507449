#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "sm90/ptx/shared.cuh"

// The accumulator of an m64 wgmma, as PTX lays it out ("Register fragments for wgmma.mma_async.m64nNk16"): a warp holds
// 16 rows; a thread holds rows lane / 4 and lane / 4 + 8 of them, and of each 8 columns two: 2 * (lane % 4) and the
// next. Register 4 * j + 2 * r + c is column 8 * j + 2 * (lane % 4) + c of its row r.

namespace flash_mla::sm90 {

/// Rows of the accumulator that a thread holds values of.
constexpr int kRowsPerThread = 2;

/// The first row of the tile that this thread holds; the other one is 8 further.
__device__ __forceinline__ int fragment_row(unsigned thread) { return thread % 128 / 32 * 16 + thread % 32 / 4; }
__device__ __forceinline__ int fragment_row() { return fragment_row(threadIdx.x); }

/// The same, made anew where it is used, with all that follows from it: where registers are too few to keep it.
__device__ __forceinline__ int fresh_fragment_row() {
  std::uint32_t thread = threadIdx.x;
  ptx::launder(thread);
  return fragment_row(thread);
}

/// Which of a thread's two rows register `i` belongs to.
__device__ __forceinline__ constexpr int row_of(int i) { return i / 2 % 2; }

/// The first column that thread number `thread` holds values of, and how far from it register `i` is.
__device__ __forceinline__ int first_column(int thread) { return thread % 4 * 2; }
__device__ __forceinline__ constexpr int column_from_first(int i) { return i / 4 * 8 + i % 2; }

/// Two values, rounded to nearest even.
template <class Element>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(packed);
  } else {
    const __half2 packed = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(packed);
  }
}

/// A value, rounded to nearest even.
template <class Element>
__device__ __forceinline__ Element convert(float value) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return __float2half_rn(value);
  }
}

/// Sum over the four threads that share a row.
__device__ __forceinline__ float row_reduce_sum(float value) {
  value += __shfl_xor_sync(~0U, value, 1);
  return value + __shfl_xor_sync(~0U, value, 2);
}

/// Maximum over the four threads that share a row.
__device__ __forceinline__ float row_reduce_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0U, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0U, value, 2));
}

/// Sum and maximum over the eight threads of a warp that share columns.
__device__ __forceinline__ float column_reduce_sum(float value) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(~0U, value, lanes);
  return value;
}
__device__ __forceinline__ float column_reduce_max(float value) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) value = fmaxf(value, __shfl_xor_sync(~0U, value, lanes));
  return value;
}

/// Transposes 4 x 4 registers over the four threads that share a row: thread q gives its columns of four groups of 8
/// columns, and gets all 8 columns of group q, in order.
__device__ __forceinline__ void transpose_quad(std::uint32_t (&v)[4]) {
  const bool odd = threadIdx.x % 2 != 0;
  const bool upper = threadIdx.x % 4 >= 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t got = __shfl_xor_sync(~0U, odd ? v[i] : v[i + 1], 1);
    (odd ? v[i] : v[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t got = __shfl_xor_sync(~0U, upper ? v[i] : v[i + 2], 2);
    (upper ? v[i] : v[i + 2]) = got;
  }
}

}  // namespace flash_mla::sm90

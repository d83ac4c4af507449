#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/fragment.cuh"

// What a piece of a split request leaves in the workspace, for a tile: sums that are not normalised.
//
//   octets  (consumer warps, octets of a thread, lanes), 16 bytes each: values of O, divided by the row's scale
//   rows    (consumer warps, 3, rows of a warp) floats: the maximum of a row's scores times softmax_scale_log2, the sum
//           of exp2(score - maximum), 0 where it saw no key, and the scale of the warp's values
//
// Scales are powers of 2 that bring the largest of a warp's values of a row close to the largest of float16. So a value
// is rounded to 11 bits, where the result will have 8 (bfloat16) or 11, whatever the size of V; bits are lost only of
// values below 2^-28 of that largest one. Rows lie in pairs, as octets have them.

namespace flash_mla::sm90 {

/// A tile's memory in a slot of the workspace.
template <class Traits>
struct SlotTile {
  static constexpr int kRows = rows_of_warp(Traits::kRows);
  static constexpr int kBytes = slot_bytes(Traits::kRows);
  static constexpr int kRowsBytes = kFloatsPerRow * kRows * sizeof(float);  // of a warp
  static_assert(Traits::kConsumerWarps == kWarpsOfPiece, "what slot_bytes() counts");
  static_assert(kRowsBytes % sizeof(uint4) == 0, "what bulk copies take");

  uint4* octets;
  unsigned char* rows;

  /// `tile` counts those of all KV heads.
  __device__ SlotTile(const DenseDecodeParams& params, int slot, int tile) {
    const std::int64_t idx = static_cast<std::int64_t>(slot) * params.num_heads_k * params.tiling.num_tiles + tile;
    unsigned char* const begin = params.slots + idx * kBytes;
    octets = reinterpret_cast<uint4*>(begin);
    rows = begin + Traits::kRows * kHeadDimV * sizeof(__half);
  }

  /// Writes an octet of this consumer thread, divided by its two rows' scales.
  __device__ __forceinline__ void write_octet(int octet, const float (&value)[8],
                                              const float (&inverse_scale)[2]) const {
    float scaled[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) scaled[i] = value[i] * inverse_scale[Traits::octet_row(i)];
    octets[(warp() * Traits::kOctetsPerThread + octet) * 32 + threadIdx.x % 32] =
        make_uint4(pack<__half>(scaled[0], scaled[1]), pack<__half>(scaled[2], scaled[3]),
                   pack<__half>(scaled[4], scaled[5]), pack<__half>(scaled[6], scaled[7]));
  }
  /// Writes what belongs to a pair of this warp's rows. `max` in base 2.
  __device__ __forceinline__ void write_rows(int pair, float2 max, float2 sum, float2 scale) const {
    auto* const to = reinterpret_cast<float2*>(rows + warp() * kRowsBytes) + pair;
    to[0] = max;
    to[kRows / 2] = sum;
    to[kRows] = scale;
  }

 private:
  __device__ static int warp() { return threadIdx.x / 32; }
};

/// A row's scale and its inverse.
struct RowScale {
  float scale;
  float inverse;

  /// `largest`: the largest magnitude of the row's values, NaN left out. Infinite only where a sum has overflowed, as
  /// an infinity in V is one in K, whose score is NaN or infinite; the scale is 1 then.
  __device__ __forceinline__ explicit RowScale(float largest) {
    constexpr int kBias = 127;
    constexpr int kTop = 14;        // scaled values are below 2^15
    constexpr int kMaxField = 250;  // so that both are normal numbers
    const int field = static_cast<int>(__float_as_uint(largest) >> 23);
    const int inverse_field = field == 255 ? kBias : min(kTop + 2 * kBias - field, kMaxField);
    inverse = __uint_as_float(inverse_field << 23);
    scale = __uint_as_float((2 * kBias - inverse_field) << 23);
  }
};

}  // namespace flash_mla::sm90

#pragma once

#include <cmath>

#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/math.cuh"

namespace flash_mla::sm90 {

/// Running maximum before any key. Finite, so that no difference of two maxima is NaN; any real score is above it.
constexpr float kNoMax = -1e30F;

/// The running maximum is kept, and O need not be rescaled, until a score exceeds it by this factor (log2). Exact all
/// the same: the final normalisation divides it out, and exp2 of it is far from overflow.
constexpr float kLazyRescaleLog2 = 8.0F;

/// Columns that each of a thread's rows may see, from the tile's first on.
struct VisibleColumns {
  int of_row[kRowsPerThread];
};

/// Scores of keys that a row must not see become -inf, NaN included.
__device__ __forceinline__ void apply_mask(float (&s)[32], const VisibleColumns& visible) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (column_of(i) >= visible.of_row[row_of(i)]) s[i] = -INFINITY;
  }
}

/// One step of the online softmax over a 64 x 64 tile of raw scores. Turns `s` into P = exp2(scale_log2 * (s - max)),
/// updates the row maxima and sums, and returns in `rescale` what earlier sums and outputs must be multiplied with
/// (the sums have been).
__device__ __forceinline__ void online_softmax(float (&s)[32], float (&row_max)[2], float (&row_sum)[2],
                                               float (&rescale)[2], float scale_log2) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    float partial[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      partial[j] = fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
      partial[j] = fmaxf(partial[j], fmaxf(s[4 * j + 16 + 2 * r], s[4 * j + 16 + 2 * r + 1]));
    }
    float max = fmaxf(fmaxf(partial[0], partial[1]), fmaxf(partial[2], partial[3]));
    max = row_reduce_max(max);
    const bool keep = (max - row_max[r]) * scale_log2 <= kLazyRescaleLog2;
    max = keep ? row_max[r] : max;
    rescale[r] = ptx::exp2_approx((row_max[r] - max) * scale_log2);
    row_max[r] = max;

    const float offset = max * scale_log2;
    float sum[2] = {0.0F, 0.0F};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& value = s[4 * j + 2 * r + c];
        value = ptx::exp2_approx(fmaf(value, scale_log2, -offset));
        sum[c] += value;
      }
    }
    row_sum[r] = row_sum[r] * rescale[r] + (sum[0] + sum[1]);
  }
}

}  // namespace flash_mla::sm90

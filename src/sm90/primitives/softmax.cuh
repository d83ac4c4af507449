#pragma once

#include <cmath>
#include "sm90/primitives/fragment.cuh"

namespace flash_mla::sm90 {

/// Running maximum before any key, of scores or of scores times softmax_scale_log2: the lowest finite number, so that
/// no difference of two maxima is NaN.
constexpr float kNoMax = -3.402823466e38F;

/// The running maximum is kept, and O need not be rescaled, while a thread's sum of a row's P in a tile stays below
/// this. Exact all the same: the final normalisation divides it out, and nothing is near overflow. The sums are needed
/// anyway, so the usual step looks for no maximum and shuffles nothing.
constexpr float kMaxLazySum = 256.0F;

/// Scores of keys that a row must not see become -inf, NaN included. `visible`: for each of a thread's rows, how many
/// of the columns from the thread's first one on the row may see.
__device__ __forceinline__ void apply_mask(float (&s)[32], const int (&visible)[kRowsPerThread]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (column_from_first(i) >= visible[row_of(i)]) s[i] = -INFINITY;
  }
}

}  // namespace flash_mla::sm90

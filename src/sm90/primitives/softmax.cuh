#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/math.cuh"

namespace flash_mla::sm90 {

/// Running maximum before any key. Finite, so that no difference of two maxima is NaN; any real score is above it.
constexpr float kNoMax = -1e30F;

/// The running maximum is kept, and O need not be rescaled, while a thread's sum of a row's P in a tile stays below
/// this. Exact all the same: the final normalisation divides it out, and nothing is near overflow. The sums are needed
/// anyway, so the usual step looks for no maximum and shuffles nothing.
constexpr float kMaxLazySum = 256.0F;

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

/// P = exp2(scale_log2 * (s - max)) of a 64 x 64 tile of raw scores, and the thread's sums of it.
template <class Element>
__device__ __forceinline__ void exponentiate(const float (&s)[32], const float (&row_max)[2], float scale_log2,
                                             std::uint32_t (&p)[16], float (&sum)[2]) {
  const float offset[2] = {row_max[0] * scale_log2, row_max[1] * scale_log2};
  float partial[2][2] = {};
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    const int r = row_of(i);
    const float low = ptx::exp2_approx(fmaf(s[i], scale_log2, -offset[r]));
    const float high = ptx::exp2_approx(fmaf(s[i + 1], scale_log2, -offset[r]));
    partial[r][0] += low;
    partial[r][1] += high;
    p[i / 2] = pack<Element>(low, high);
  }
  sum[0] = partial[0][0] + partial[0][1];
  sum[1] = partial[1][0] + partial[1][1];
}

/// One step of the online softmax: P of a tile of raw scores. Updates the row maxima and sums, and returns in `rescale`
/// what earlier sums and outputs must be multiplied with (the sums have been).
template <class Element>
__device__ __forceinline__ void online_softmax(const float (&s)[32], std::uint32_t (&p)[16], float (&row_max)[2],
                                               float (&row_sum)[2], float (&rescale)[2], float scale_log2) {
  float sum[2];
  rescale[0] = rescale[1] = 1.0F;
#pragma unroll 1
  for (bool is_lazy = true;; is_lazy = false) {
    exponentiate<Element>(s, row_max, scale_log2, p, sum);
    if (!is_lazy || !__any_sync(~0U, sum[0] > kMaxLazySum || sum[1] > kMaxLazySum)) break;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      float max = row_max[r];
#pragma unroll
      for (int i = 2 * r; i < 32; i += 4) max = fmaxf(max, fmaxf(s[i], s[i + 1]));
      max = row_reduce_max(max);
      rescale[r] = ptx::exp2_approx((row_max[r] - max) * scale_log2);
      row_max[r] = max;
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) row_sum[r] = row_sum[r] * rescale[r] + sum[r];
}

}  // namespace flash_mla::sm90

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/params.h"

namespace flash_mla::sm90 {

/// Launches one instantiation of a decode kernel.
///
/// CTAs that merge a split request wait for those that compute its pieces. Where all CTAs fit on the GPU at once, a
/// cooperative launch promises that they run at the same time, and each merges when it has computed. Otherwise as many
/// CTAs again come behind them and merge: a CTA then waits only for CTAs of lower index, which are running or done.
template <auto kKernel, class Traits, class Storage>
void launch_decode_kernel(const DenseDecodeParams& params, cudaStream_t stream) {
  static_assert(sizeof(Storage) <= 232448, "what a CTA may have on sm_90");
  static_assert(Storage::kMergeBytes >= Combine<Traits>::kMinSharedBytes, "what merging needs");
  static cuda::SharedMemoryLimit limit(reinterpret_cast<const void*>(kKernel), sizeof(Storage));
  limit.raise();
  dim3 grid(params.tiling.num_tiles, params.num_heads_k, params.num_parts);
  const dim3 block(Traits::kNumThreads);
  const std::int64_t num_ctas = static_cast<std::int64_t>(grid.x) * grid.y * grid.z;
  constexpr auto kOverlap = cuda::Overlap::kWithPrevious;
  if (num_ctas <= cuda::device_properties(cuda::current_device()).num_sms &&
      cuda::Launch("dense_decode", grid, block, sizeof(Storage), stream, kOverlap).all_resident(kKernel, params)) {
    return;
  }
  grid.z *= 2;
  cuda::Launch("dense_decode", grid, block, sizeof(Storage), stream, kOverlap)(kKernel, params);
}

}  // namespace flash_mla::sm90

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/entry.cuh"
#include "sm90/dense_decode/params.h"

namespace flash_mla::sm90 {

/// Launches a decode kernel.
///
/// CTAs that merge a split request wait for those that compute its pieces. Where all CTAs fit on the GPU at once, a
/// cooperative launch promises that they run at the same time, and each merges when it has computed. Otherwise as many
/// CTAs again come behind them and merge: a CTA then waits only for CTAs of lower index, which are running or done, as
/// GPUs start CTAs in the order of their index (which CUDA does not promise).
template <class Kernel>
void launch_decode_kernel(const DenseDecodeParams& params, cudaStream_t stream) {
  using Traits = typename Kernel::Traits;
  using Storage = typename Kernel::Storage;
  constexpr auto kKernel = decode_kernel<Kernel>;
  static_assert(sizeof(Storage) <= cuda::kMaxSharedBytes);
  static_assert(Storage::kMergeBytes >= Combine<Traits>::kMinSharedBytes, "what merging needs");
  static cuda::SharedMemoryLimit limit(reinterpret_cast<const void*>(kKernel), sizeof(Storage));
  limit.raise();
  const auto decode = [&](int num_parts) {
    const dim3 grid(params.tiling.num_tiles, params.num_heads_k, num_parts);
    return cuda::Launch("dense_decode", grid, dim3(Traits::kNumThreads), sizeof(Storage), stream,
                        cuda::Overlap::kWithPrevious);
  };
  if (params.num_parts == 1) {  // nothing is split
    decode(1)(kKernel, params);
    return;
  }
  const std::int64_t num_ctas =
      static_cast<std::int64_t>(params.tiling.num_tiles) * params.num_heads_k * params.num_parts;
  const bool may_fit = num_ctas <= cuda::device_properties(cuda::current_device()).num_sms;
  if (may_fit && decode(params.num_parts).all_resident(kKernel, params)) return;
  decode(2 * params.num_parts)(kKernel, params);
}

}  // namespace flash_mla::sm90

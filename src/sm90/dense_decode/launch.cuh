#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/params.h"

namespace flash_mla::sm90 {

/// Launches one instantiation of a decode kernel: CTAs for each tile, KV head and part, and as many again that merge.
template <auto kKernel, class Traits, class Storage>
void launch_decode_kernel(const DenseDecodeParams& params, cudaStream_t stream) {
  static_assert(sizeof(Storage) <= 232448, "what a CTA may have on sm_90");
  static_assert(sizeof(Storage) >= Combine<Traits>::kSharedBytes, "what the merging CTAs use");
  static cuda::SharedMemoryLimit limit(reinterpret_cast<const void*>(kKernel), sizeof(Storage));
  limit.raise();
  const dim3 grid(params.tiling.num_tiles, params.num_heads_k, 2 * params.num_parts);
  const cuda::Launch launch("dense_decode", grid, dim3(Traits::kNumThreads), sizeof(Storage), stream,
                            cuda::Overlap::kWithPrevious);
  launch(kKernel, params);
}

}  // namespace flash_mla::sm90

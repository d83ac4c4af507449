#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "sm90/dense_decode/kernel.cuh"
#include "sm90/dense_decode/launch.h"

namespace flash_mla::sm90 {

template <class Element>
void launch_dense_decode(const DenseDecodeParams& params, cudaStream_t stream) {
  using Traits = DenseDecodeTraits<Element>;
  constexpr std::size_t kSharedBytes = sizeof(SharedStorage<Traits>);
  static_assert(kSharedBytes <= 232448, "what a CTA may have on sm_90");
  static cuda::SharedMemoryLimit limit(reinterpret_cast<const void*>(dense_decode_kernel<Traits>), kSharedBytes);
  limit.raise();
  const dim3 grid(params.tiling.num_tiles, params.num_heads_k, 2 * params.num_parts);
  const cuda::Launch launch("dense_decode_kernel", grid, dim3(Traits::kNumThreads), kSharedBytes, stream,
                            cuda::Overlap::kWithPrevious);
  launch(dense_decode_kernel<Traits>, params);
}

}  // namespace flash_mla::sm90

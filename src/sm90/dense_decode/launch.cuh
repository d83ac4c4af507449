#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/launch.h"
#include "sm90/dense_decode/entry.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/plan_source.h"
#include "sm90/dense_decode/slice_memory.cuh"

namespace flash_mla::sm90 {

/// Launches an instantiation of a decode kernel. Its CTAs need not all run at the same time: see split_group.cuh.
template <class Kernel, PlanSource kPlanSource>
void launch_decode_kernel(const DenseDecodeParams& params, cudaStream_t stream) {
  using Traits = typename Kernel::Traits;
  using Storage = typename Kernel::Storage;
  constexpr auto kKernel = decode_kernel<Kernel, kPlanSource>;
  static_assert(sizeof(Storage) <= cuda::kMaxSharedBytes);
  static_assert(Storage::kMergeBytes >= SliceMemory<Traits>::kMinBytes, "what merging needs");
  static_assert(Storage::kMergeBytes <= offsetof(Storage, rows), "what merging reads");
  static cuda::SharedMemoryLimit limit(reinterpret_cast<const void*>(kKernel), sizeof(Storage));
  limit.raise();
  const dim3 grid(params.tiling.num_tiles, params.num_heads_k, params.num_parts);
  const cuda::Launch launch("dense_decode", grid, dim3(Traits::kNumThreads), sizeof(Storage), stream,
                            cuda::Overlap::kWithPrevious);
  launch(kKernel, params);
}

/// The same, of the one that the call needs.
template <class Kernel>
void launch_decode_kernel(const DenseDecodeParams& params, cudaStream_t stream) {
  if (params.batch_size == 1) {
    launch_decode_kernel<Kernel, PlanSource::kLoneRequest>(params, stream);
  } else if (params.parts != nullptr) {
    launch_decode_kernel<Kernel, PlanSource::kGiven>(params, stream);
  } else {
    launch_decode_kernel<Kernel, PlanSource::kBatch>(params, stream);
  }
}

}  // namespace flash_mla::sm90

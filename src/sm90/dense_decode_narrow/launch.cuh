#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "sm90/dense_decode/launch.cuh"
#include "sm90/dense_decode_narrow/cluster_kernel.cuh"
#include "sm90/dense_decode_narrow/kernel.cuh"

namespace flash_mla::sm90 {

/// The kernel for clusters, and how it is launched.
template <class Element>
struct ClusterLaunch {
  using Traits = NarrowTraits<Element, kMinTileRows>;
  using Storage = ClusterStorage<Traits>;
  static constexpr auto kKernel = cluster_decode_kernel<Traits>;
  static_assert(sizeof(Storage) <= 232448, "what a CTA may have on sm_90");

  static cuda::Launch make(dim3 grid, int cluster_size, cudaStream_t stream) {
    static cuda::SharedMemoryLimit limit(reinterpret_cast<const void*>(kKernel), sizeof(Storage));
    limit.raise();
    return {"dense_decode",          grid,   dim3(Traits::kNumThreads),
            sizeof(Storage),         stream, cuda::Overlap::kWithPrevious,
            dim3(1, 1, cluster_size)};
  }

  /// How many clusters of a size, a power of 2, run at once on the current device. Asked once.
  static int max_active(int cluster_size) {
    constexpr int kUnknown = 0;
    static std::array<std::array<std::atomic<int>, kMaxClusterSize + 1>, cuda::kMaxDevices> known{};  // plus 1
    std::atomic<int>& count = known[cuda::current_device()][cluster_size];
    int plus_one = count.load(std::memory_order_relaxed);
    if (plus_one == kUnknown) {
      plus_one = make(dim3(1, 1, cluster_size), cluster_size, nullptr)
                     .max_active_clusters(reinterpret_cast<const void*>(kKernel)) +
                 1;
      count.store(plus_one, std::memory_order_relaxed);
    }
    return plus_one - 1;
  }
};

/// Launches the instantiation for the tile's rows.
template <class Element>
void launch_narrow_kernel(const DenseDecodeParams& params, cudaStream_t stream) {
  if (params.cluster_size > 0) {
    using Clusters = ClusterLaunch<Element>;
    const dim3 grid(params.tiling.num_tiles, params.num_heads_k, params.batch_size * params.cluster_size);
    Clusters::make(grid, params.cluster_size, stream)(Clusters::kKernel, params);
  } else if (params.tiling.rows == kMinTileRows) {
    launch_decode_kernel<NarrowDecodeKernel<NarrowTraits<Element, kMinTileRows>>>(params, stream);
  } else {
    launch_decode_kernel<NarrowDecodeKernel<NarrowTraits<Element, kMaxNarrowRows>>>(params, stream);
  }
}

}  // namespace flash_mla::sm90

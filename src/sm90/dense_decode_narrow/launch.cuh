#pragma once

#include <cuda_runtime.h>

#include <array>
#include <mutex>

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
  static_assert(sizeof(Storage) <= cuda::kMaxSharedBytes);

  static cuda::Launch make(dim3 grid, int cluster_size, cudaStream_t stream) {
    static cuda::SharedMemoryLimit limit(reinterpret_cast<const void*>(kKernel), sizeof(Storage));
    limit.raise();
    return {"dense_decode",          grid,   dim3(Traits::kNumThreads),
            sizeof(Storage),         stream, cuda::Overlap::kWithPrevious,
            dim3(1, 1, cluster_size)};
  }

  /// How many clusters of 2, 4 or 8 CTAs run at once on the current device. Asked once.
  static int max_active(int cluster_size) {
    struct Known {
      std::once_flag once;
      int count[kMaxClusterSize + 1];
    };
    static std::array<Known, cuda::kMaxDevices> of_device;
    Known& known = of_device[cuda::current_device()];
    std::call_once(known.once, [&] {
      for (int size = kMinClusterSize; size <= kMaxClusterSize; size *= 2) {
        known.count[size] =
            make(dim3(1, 1, size), size, nullptr).max_active_clusters(reinterpret_cast<const void*>(kKernel));
      }
    });
    return known.count[cluster_size];
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

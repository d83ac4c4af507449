#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <mutex>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/error.h"

namespace flash_mla::cuda {

/// Whether a kernel may start while the one before it in the stream still runs (programmatic dependent launch). Such a
/// kernel writes no global memory before griddepcontrol.wait, and what it reads before that is a guess.
enum class Overlap : bool { kNone, kWithPrevious };

/// Shared memory that a CTA may have on sm_90.
constexpr std::size_t kMaxSharedBytes = 232448;

/// A checked kernel launch.
class Launch {
 public:
  /// `cluster`: extents of a cluster, in CTAs; of one CTA: none.
  Launch(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
         Overlap overlap = Overlap::kNone, dim3 cluster = dim3(1))
      : name_(name) {
    config_.gridDim = grid;
    config_.blockDim = block;
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed =
        overlap == Overlap::kWithPrevious ? 1 : 0;
    if (cluster.x * cluster.y * cluster.z > 1) {
      add(cudaLaunchAttributeClusterDimension).clusterDim = {cluster.x, cluster.y, cluster.z};
    }
    config_.attrs = attributes_;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  /// CUDA copies the arguments once, from where they are.
  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), const std::common_type_t<Parameters>&... arguments) const {
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    check(cudaLaunchKernelExC(&config_, reinterpret_cast<const void*>(kernel), addresses), name_);
  }

  /// How many of its clusters run at once on the current device. 0 where CUDA can't say.
  int max_active_clusters(const void* kernel) const {
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernel, &config_) == cudaSuccess) return count;
    (void)cudaGetLastError();
    return 0;
  }

 private:
  cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = id;
    return attribute.val;
  }

  const char* name_;
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2]{};
};

/// Lets a kernel have more dynamic shared memory than by default, on each device that it is launched on.
class SharedMemoryLimit {
 public:
  SharedMemoryLimit(const void* kernel, std::size_t bytes) : kernel_(kernel), bytes_(static_cast<int>(bytes)) {}

  /// On the current device, the first time that it is asked for there.
  void raise() {
    std::call_once(once_[current_device()], [this] {
      check(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes_), "cudaFuncSetAttribute");
    });
  }

 private:
  const void* kernel_;
  int bytes_;
  std::array<std::once_flag, kMaxDevices> once_;
};

}  // namespace flash_mla::cuda

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
/// kernel touches no global memory before griddepcontrol.wait.
enum class Overlap : bool { kNone, kWithPrevious };

/// A checked kernel launch.
class Launch {
 public:
  Launch(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
         Overlap overlap = Overlap::kNone)
      : name_(name) {
    config_.gridDim = grid;
    config_.blockDim = block;
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    attribute_.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute_.val.programmaticStreamSerializationAllowed = 1;
    config_.attrs = &attribute_;
    config_.numAttrs = overlap == Overlap::kWithPrevious ? 1 : 0;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  /// CUDA copies the arguments once, from where they are.
  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), const std::common_type_t<Parameters>&... arguments) const {
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    check(cudaLaunchKernelExC(&config_, reinterpret_cast<const void*>(kernel), addresses), name_);
  }

 private:
  const char* name_;
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
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

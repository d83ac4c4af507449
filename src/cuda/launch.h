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
    attributes_[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[0].val.programmaticStreamSerializationAllowed = overlap == Overlap::kWithPrevious ? 1 : 0;
    attributes_[1].id = cudaLaunchAttributeCooperative;
    attributes_[1].val.cooperative = 1;
    config_.attrs = attributes_;
    config_.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  /// CUDA copies the arguments once, from where they are.
  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), const std::common_type_t<Parameters>&... arguments) const {
    check(launch(kernel, arguments...), name_);
  }

  /// A cooperative launch: all CTAs are resident at the same time, so that they may wait for each other. False, and
  /// nothing launched, where the stream's SMs do not hold them.
  template <class... Parameters>
  bool all_resident(void (*kernel)(Parameters...), const std::common_type_t<Parameters>&... arguments) {
    config_.numAttrs = 2;
    const cudaError_t status = launch(kernel, arguments...);
    if (status == cudaErrorCooperativeLaunchTooLarge) {
      (void)cudaGetLastError();
      return false;
    }
    check(status, name_);
    return true;
  }

 private:
  template <class... Parameters>
  cudaError_t launch(void (*kernel)(Parameters...), const std::common_type_t<Parameters>&... arguments) const {
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    return cudaLaunchKernelExC(&config_, reinterpret_cast<const void*>(kernel), addresses);
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

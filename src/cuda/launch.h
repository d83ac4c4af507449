#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

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

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments&&... arguments) const {
    check(cudaLaunchKernelEx(&config_, kernel, std::forward<Arguments>(arguments)...), name_);
  }

 private:
  const char* name_;
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
};

}  // namespace flash_mla::cuda

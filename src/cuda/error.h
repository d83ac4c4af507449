#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "flash_mla/error.h"

namespace flash_mla::cuda {

/// Throws CudaError if a call of the runtime failed. `what` says which.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // a failed launch must not be reported again by somebody else's check
  throw CudaError(static_cast<int>(status),
                  std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

}  // namespace flash_mla::cuda

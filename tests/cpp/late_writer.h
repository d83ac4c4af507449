#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash_mla {

/// A copy within the GPU's memory; of nothing: none.
struct LateCopy {
  std::int32_t* to = nullptr;
  const std::int32_t* from = nullptr;
  int count = 0;
};

/// Makes copies at the end of a kernel that has let the next one of the stream begin long before.
void copy_late(const LateCopy (&copies)[3], cudaStream_t stream);

}  // namespace flash_mla

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash_mla {

/// Copies within the GPU's memory, at the end of a kernel that has let the next one of the stream begin before.
void copy_late(std::int32_t* to, const std::int32_t* from, int count, cudaStream_t stream);

}  // namespace flash_mla

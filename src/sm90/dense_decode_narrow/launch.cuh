#pragma once

#include "sm90/dense_decode/launch.cuh"
#include "sm90/dense_decode_narrow/kernel.cuh"

namespace flash_mla::sm90 {

/// Launches the instantiation for the tile's rows.
template <class Element>
void launch_narrow_kernel(const DenseDecodeParams& params, cudaStream_t stream) {
  if (params.tiling.rows == kMinTileRows) {
    launch_decode_kernel<NarrowDecodeKernel<NarrowTraits<Element, kMinTileRows>>>(params, stream);
  } else {
    launch_decode_kernel<NarrowDecodeKernel<NarrowTraits<Element, kMaxNarrowRows>>>(params, stream);
  }
}

}  // namespace flash_mla::sm90

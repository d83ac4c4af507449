#pragma once

#include "sm90/dense_decode/launch.cuh"
#include "sm90/dense_decode_narrow/kernel.cuh"

namespace flash_mla::sm90 {

/// Launches the instantiation for the tile's rows.
template <class Element>
void launch_narrow_kernel(const DenseDecodeParams& params, cudaStream_t stream) {
  constexpr int kFewRows = kMaxNarrowRows / 2;
  if (params.tiling.padded_rows() == kFewRows) {
    launch_decode_kernel<NarrowDecodeKernel<NarrowTraits<Element, kFewRows>>>(params, stream);
  } else {
    launch_decode_kernel<NarrowDecodeKernel<NarrowTraits<Element, kMaxNarrowRows>>>(params, stream);
  }
}

}  // namespace flash_mla::sm90

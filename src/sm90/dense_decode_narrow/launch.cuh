#pragma once

#include "sm90/dense_decode/launch.cuh"
#include "sm90/dense_decode_narrow/kernel.cuh"

namespace flash_mla::sm90 {

/// Launches the instantiation for the tile's rows.
template <class Element>
void launch_narrow_kernel(const DenseDecodeParams& params, cudaStream_t stream) {
  using Few = NarrowTraits<Element, 16>;
  using Many = NarrowTraits<Element, kMaxNarrowRows>;
  if (params.tiling.padded_rows() == Few::kRows) {
    launch_decode_kernel<dense_decode_narrow_kernel<Few>, Few, NarrowStorage<Few>>(params, stream);
  } else {
    launch_decode_kernel<dense_decode_narrow_kernel<Many>, Many, NarrowStorage<Many>>(params, stream);
  }
}

}  // namespace flash_mla::sm90

#pragma once

#include "sm90/dense_decode/kernel.cuh"
#include "sm90/dense_decode/launch.cuh"

namespace flash_mla::sm90 {

/// Launches the instantiation for the batch. Where tiles share KV, which then comes from L2, power is the limit, and
/// the plain order needs the fewest clocks; elsewhere waiting for memory is, and memory is free earlier where PV and QK
/// are interleaved.
template <class Element>
void launch_64_row_kernel(const DenseDecodeParams& params, cudaStream_t stream) {
  if (params.shares_kv) {
    launch_decode_kernel<DenseDecodeKernel<DenseDecodeTraits<Element, false>>>(params, stream);
  } else {
    launch_decode_kernel<DenseDecodeKernel<DenseDecodeTraits<Element, true>>>(params, stream);
  }
}

}  // namespace flash_mla::sm90

#include "sm90/dense_decode/kernel.cuh"
#include "sm90/dense_decode/launch.cuh"
#include "sm90/launch.h"

namespace flash_mla::sm90 {

void launch_dense_decode_fp16(const DenseDecodeParams& params, cudaStream_t stream) {
  launch_decode_kernel<DenseDecodeKernel<DenseDecodeTraits<__half>>>(params, stream);
}

}  // namespace flash_mla::sm90

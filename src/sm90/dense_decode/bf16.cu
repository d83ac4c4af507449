#include <cuda_bf16.h>

#include "sm90/dense_decode/kernel.cuh"
#include "sm90/dense_decode/launch.cuh"
#include "sm90/launch.h"

namespace flash_mla::sm90 {

void launch_dense_decode_bf16(const DenseDecodeParams& params, cudaStream_t stream) {
  launch_decode_kernel<DenseDecodeKernel<DenseDecodeTraits<__nv_bfloat16>>>(params, stream);
}

}  // namespace flash_mla::sm90

#include "sm90/dense_decode_narrow/launch.cuh"
#include "sm90/launch.h"

namespace flash_mla::sm90 {

void launch_dense_decode_narrow_fp16(const DenseDecodeParams& params, cudaStream_t stream) {
  launch_narrow_kernel<__half>(params, stream);
}

}  // namespace flash_mla::sm90

#include "sm90/dense_decode/launch.cuh"

namespace flash_mla::sm90 {

void launch_dense_decode_bf16(const DenseDecodeParams& params, cudaStream_t stream) {
  launch_dense_decode<__nv_bfloat16>(params, stream);
}

}  // namespace flash_mla::sm90

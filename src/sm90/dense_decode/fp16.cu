#include "sm90/dense_decode/launch.cuh"

namespace flash_mla::sm90 {

void launch_dense_decode_fp16(const DenseDecodeParams& params, cudaStream_t stream) {
  launch_dense_decode<__half>(params, stream);
}

}  // namespace flash_mla::sm90

#include "sm90/dense_decode/launch_64_rows.cuh"
#include "sm90/launch.h"

namespace flash_mla::sm90 {

void launch_dense_decode_bf16(const DenseDecodeParams& params, cudaStream_t stream) {
  launch_64_row_kernel<__nv_bfloat16>(params, stream);
}

}  // namespace flash_mla::sm90

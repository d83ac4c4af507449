#include "sm90/launch.h"

namespace flash_mla::sm90 {

void launch_dense_decode(const DenseDecodeParams& params, DType dtype, CUstream_st* stream) {
  const bool is_narrow = params.tiling.is_narrow();
  if (dtype == DType::kBFloat16) {
    (is_narrow ? launch_dense_decode_narrow_bf16 : launch_dense_decode_bf16)(params, stream);
  } else {
    (is_narrow ? launch_dense_decode_narrow_fp16 : launch_dense_decode_fp16)(params, stream);
  }
}

}  // namespace flash_mla::sm90

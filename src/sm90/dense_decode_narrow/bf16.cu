#include "sm90/dense_decode/launch.cuh"
#include "sm90/dense_decode_narrow/kernel.cuh"
#include "sm90/launch.h"

namespace flash_mla::sm90 {

void launch_dense_decode_narrow_bf16(const DenseDecodeParams& params, cudaStream_t stream) {
  using Few = NarrowTraits<__nv_bfloat16, 16>;
  using Many = NarrowTraits<__nv_bfloat16, kMaxNarrowRows>;
  if (params.tiling.rows_per_tile() <= Few::kRows) {
    launch_decode_kernel<dense_decode_narrow_kernel<Few>, Few, NarrowStorage<Few>>(params, stream);
  } else {
    launch_decode_kernel<dense_decode_narrow_kernel<Many>, Many, NarrowStorage<Many>>(params, stream);
  }
}

}  // namespace flash_mla::sm90

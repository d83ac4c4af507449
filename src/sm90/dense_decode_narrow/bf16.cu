#include "sm90/dense_decode_narrow/launch.cuh"
#include "sm90/launch.h"

namespace flash_mla::sm90 {

void launch_dense_decode_narrow_bf16(const DenseDecodeParams& params, cudaStream_t stream) {
  launch_narrow_kernel<__nv_bfloat16>(params, stream);
}

int max_active_clusters(int cluster_size) { return ClusterLaunch<__nv_bfloat16>::max_active(cluster_size); }

}  // namespace flash_mla::sm90

#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "sm90/ceilings/launch.h"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/bulk.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 32;
constexpr int kStages = 12;  // 192 KB under way on each SM

struct alignas(128) SharedStorage {
  unsigned char pieces[kStages][kHbmPieceBytes];
  std::uint64_t full[kStages];
};

/// Copies every piece of the buffer into shared memory once and does nothing with it. One thread of each CTA issues
/// the copies, `kStages` ahead; neighbouring CTAs read neighbouring pieces.
__global__ void __launch_bounds__(kThreads, 1) hbm_read_kernel(const unsigned char* buffer, std::int64_t num_pieces) {
  extern __shared__ unsigned char shared_bytes[];
  if (threadIdx.x != 0) return;
  auto& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
  for (auto& barrier : shared.full) ptx::mbarrier_init(ptx::shared_address(&barrier), 1);
  ptx::fence_mbarrier_init();

  const std::int64_t first = blockIdx.x;
  const int count = first < num_pieces ? static_cast<int>((num_pieces - first - 1) / gridDim.x + 1) : 0;
  for (int i = 0; i < count + kStages; ++i) {
    const int stage = i % kStages;
    const std::uint32_t full = ptx::shared_address(&shared.full[stage]);
    const bool was_issued = i >= kStages;
    if (was_issued) ptx::mbarrier_wait(full, (i / kStages - 1) & 1);
    if (i < count) {
      ptx::mbarrier_arrive_expect(full, kHbmPieceBytes);
      ptx::bulk_load(ptx::shared_address(shared.pieces[stage]),
                     buffer + (first + static_cast<std::int64_t>(i) * gridDim.x) * kHbmPieceBytes, kHbmPieceBytes,
                     full);
    }
  }
}

}  // namespace

void launch_hbm_read_kernel(const void* buffer, std::int64_t num_bytes, int num_sms, CUstream_st* stream) {
  static cuda::SharedMemoryLimit limit(reinterpret_cast<const void*>(hbm_read_kernel), sizeof(SharedStorage));
  limit.raise();
  const cuda::Launch launch("hbm_read_kernel", dim3(num_sms), dim3(kThreads), sizeof(SharedStorage), stream);
  launch(hbm_read_kernel, static_cast<const unsigned char*>(buffer), num_bytes / kHbmPieceBytes);
}

}  // namespace flash_mla::sm90

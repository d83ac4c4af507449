#include "late_writer.h"

namespace flash_mla {
namespace {

__global__ void copy_late_kernel(std::int32_t* to, const std::int32_t* from, int count) {
  constexpr std::uint64_t kDelay = 30000;  // ns: until the next kernel has begun, and waits
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  std::uint64_t begin = 0, now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - begin < kDelay);
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

}  // namespace

void copy_late(std::int32_t* to, const std::int32_t* from, int count, cudaStream_t stream) {
  copy_late_kernel<<<1, 128, 0, stream>>>(to, from, count);
}

}  // namespace flash_mla

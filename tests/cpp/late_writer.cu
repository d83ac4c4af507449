#include "late_writer.h"

namespace flash_mla {
namespace {

struct Copies {
  LateCopy copies[3];
};

__global__ void copy_late_kernel(Copies all) {
  constexpr std::uint64_t kDelay = 100000;  // ns: until the next kernel has begun, and waits
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  std::uint64_t begin = 0, now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - begin < kDelay);
  for (const LateCopy& copy : all.copies) {
    for (int i = threadIdx.x; i < copy.count; i += blockDim.x) copy.to[i] = copy.from[i];
  }
}

}  // namespace

void copy_late(const LateCopy (&copies)[3], cudaStream_t stream) {
  copy_late_kernel<<<1, 128, 0, stream>>>(Copies{{copies[0], copies[1], copies[2]}});
}

}  // namespace flash_mla

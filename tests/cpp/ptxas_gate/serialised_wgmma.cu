// A kernel that changes an accumulator of a wgmma before it has waited for it.

#include <cstdint>

__global__ void serialised_wgmma(float* out, std::uint64_t a, std::uint64_t b, int num_iterations) {
  float sum[4] = {0.0F, 0.0F, 0.0F, 0.0F};
  for (int i = 0; i < num_iterations; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "l"(a), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    sum[0] = sum[0] * sum[0] + 1.0F;
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = sum[i];
}

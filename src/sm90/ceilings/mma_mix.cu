#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "sm90/ceilings/launch.h"
#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kWarpgroupThreads = 128;
constexpr int kThreads = 2 * kWarpgroupThreads;
constexpr int kRowBytes = 64 * sizeof(__nv_bfloat16);
constexpr int kChunkBytes = 64 * kRowBytes;  // 64 rows and 64 columns in the 128-byte swizzle, as the decode kernel's
constexpr int kNumChunks = 9;
constexpr int kNumVChunks = 8;
constexpr int kTileBytes = kNumChunks * kChunkBytes;
constexpr int kStepBytes = 32;   // 16 columns: one wgmma's k
constexpr float kScale = 1e-3F;  // S is about 24 with normal operands; P small, so that O stays finite

static_assert(3 * kTileBytes == kMmaMixOperandBytes, "a query tile and two KV tiles");

struct alignas(1024) SharedStorage {
  unsigned char q[kTileBytes];
  unsigned char kv[2][kTileBytes];
};

/// S (64 x 64) = Q K^T over 576 columns, both from shared memory.
__device__ __forceinline__ void issue_qk(float (&s)[32], std::uint32_t q, std::uint32_t k) {
  const ptx::SwizzledOperand<16> a(q);
  const ptx::SwizzledOperand<16> b(k);
#pragma unroll
  for (int step = 0; step < kTileBytes / kChunkBytes * kRowBytes / kStepBytes; ++step) {
    constexpr int kStepsPerChunk = kRowBytes / kStepBytes;
    const std::uint32_t offset = step / kStepsPerChunk * kChunkBytes + step % kStepsPerChunk * kStepBytes;
    ptx::wgmma_m64n64k16<__nv_bfloat16>(s, a.at(offset), b.at(offset), step != 0);
  }
}

/// O (64 x 256) += P V over a tile's 64 tokens: P from registers, V's 256 columns from shared memory at `v`.
__device__ __forceinline__ void issue_pv(float (&o)[2][64], const std::uint32_t (&p)[16], std::uint32_t v) {
  const ptx::SwizzledOperand<kChunkBytes> b(v);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::wgmma_m64n128k16_ra_tb<__nv_bfloat16>(o[half], &p[4 * step],
                                                 b.at(half * 2 * kChunkBytes + step * 16 * kRowBytes));
    }
  }
}

/// The MMAs of decoding and nothing else: no loads, no softmax, no exchange. Each of two warpgroups multiplies Q
/// with its own tile, and its P with its half of V's columns of both tiles; while one converts S to P, the other's
/// MMAs run. Operands are random: on zeros the tensor cores draw less power, and the clock would be too high.
__global__ void __launch_bounds__(kThreads, 1) mma_mix_kernel(const uint4* operands, float* sink, int iterations) {
  extern __shared__ unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
  const std::uint32_t base = ptx::shared_address(shared.q);
  for (int i = threadIdx.x; i < kMmaMixOperandBytes / 16; i += kThreads) {
    const uint4 v = operands[i];
    ptx::store_shared_v4(base + i * 16, v.x, v.y, v.z, v.w);
  }
  ptx::fence_proxy_async();
  __syncthreads();

  const int warpgroup = __shfl_sync(~0U, threadIdx.x / kWarpgroupThreads, 0);
  const std::uint32_t kv = ptx::shared_address(shared.kv);
  const std::uint32_t own = kv + warpgroup * kTileBytes;
  const std::uint32_t columns = warpgroup * (kNumVChunks / 2) * kChunkBytes;
  float o[2][64] = {};
  float s[32] = {};
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
    ptx::wgmma_fence();
    issue_qk(s, base, own);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    std::uint32_t p[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) p[j] = pack<__nv_bfloat16>(s[2 * j] * kScale, s[2 * j + 1] * kScale);
    ptx::wgmma_fence();
    issue_pv(o, p, kv + columns);
    issue_pv(o, p, kv + kTileBytes + columns);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  float sum = 0.0F;
#pragma unroll
  for (int j = 0; j < 64; ++j) sum += o[0][j] + o[1][j];
  if (threadIdx.x == 0) sink[blockIdx.x] = sum;
}

}  // namespace

void launch_mma_mix_kernel(const void* operands, float* sink, int iterations, int num_sms, CUstream_st* stream) {
  static cuda::SharedMemoryLimit limit(reinterpret_cast<const void*>(mma_mix_kernel), sizeof(SharedStorage));
  limit.raise();
  const cuda::Launch launch("mma_mix_kernel", dim3(num_sms), dim3(kThreads), sizeof(SharedStorage), stream);
  launch(mma_mix_kernel, static_cast<const uint4*>(operands), sink, iterations);
}

}  // namespace flash_mla::sm90

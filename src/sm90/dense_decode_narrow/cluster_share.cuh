#pragma once

#include "scheduler/split_plan.h"
#include "sm90/dense_decode/params.h"
#include "sm90/ptx/grid.cuh"
#include "sm90/ptx/memory.cuh"

namespace flash_mla::sm90 {

/// The share of a request's blocks that a CTA of its cluster works, and the pages that they begin in.
struct ClusterShare {
  int seqlen_k;
  int begin_block;
  int end_block;
  int pages[kClusterBlocksPerCta];

  /// Asks for what a share rests on, as the length and the block table are now, though other grids may be writing them.
  /// By one warp, all of whose loads are on their way together: a lane looks up each of the blocks that the request may
  /// have, and one the length.
  __device__ __forceinline__ static int look(const DenseDecodeParams& params, int request) {
    static_assert(kMaxBlocks < 32);
    const int lane = threadIdx.x % 32;
    const int token = lane * scheduler::kBlockN;
    const int* from = params.cache_seqlens + request;
    if (lane < kMaxBlocks && token < params.max_seqlen_k) {
      from = params.block_table + request * params.stride_block_table + (token >> params.page_size_log2);
    }
    return ptx::load_relaxed(from);
  }

  ClusterShare() = default;
  /// Of what each lane has got by `look`.
  __device__ __forceinline__ ClusterShare(const DenseDecodeParams& params, int value) {
    seqlen_k = min(__shfl_sync(~0U, value, kMaxBlocks), params.max_seqlen_k);
    const auto blocks = static_cast<int>(scheduler::num_blocks(seqlen_k));
    const int rank = ptx::cta_z() % params.cluster_size;
    begin_block = blocks * rank / params.cluster_size;
    end_block = blocks * (rank + 1) / params.cluster_size;
#pragma unroll
    for (int i = 0; i < kClusterBlocksPerCta; ++i) {
      const int page = __shfl_sync(~0U, value, begin_block + i);
      pages[i] = begin_block + i < end_block ? page : 0;
    }
  }

  __device__ __forceinline__ bool operator==(const ClusterShare& other) const {
    bool is_same = seqlen_k == other.seqlen_k;
#pragma unroll
    for (int i = 0; i < kClusterBlocksPerCta; ++i) is_same &= pages[i] == other.pages[i];
    return is_same;
  }

 private:
  static constexpr int kMaxBlocks = kClusterBlocksPerCta * kMaxClusterSize;
};

}  // namespace flash_mla::sm90

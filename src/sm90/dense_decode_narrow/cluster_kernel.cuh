#pragma once

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode_narrow/cluster_combine.cuh"
#include "sm90/dense_decode_narrow/kernel.cuh"
#include "sm90/dense_decode_narrow/load.cuh"
#include "sm90/dense_decode_narrow/mainloop.cuh"
#include "sm90/dense_decode_narrow/scorer.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/grid.cuh"
#include "sm90/ptx/memory.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/ptx/warp.cuh"

namespace flash_mla::sm90 {

/// The share of a request's blocks that a CTA of its cluster works.
__device__ __forceinline__ scheduler::Part part_of_cluster(const DenseDecodeParams& params, int cta) {
  const int size = params.cluster_size;
  const int request = cta / size;
  const int rank = cta % size;
  const auto blocks = static_cast<int>(scheduler::num_blocks(min(params.cache_seqlens[request], params.max_seqlen_k)));
  return {request, blocks * rank / size, request, blocks * (rank + 1) / size, 1, 0, {}};
}

/// Asks for the request's pages meanwhile. By one warp.
__device__ __forceinline__ void prefetch_pages(const DenseDecodeParams& params, int request) {
  const int first_page = threadIdx.x % 32 * 32;  // of a line of the block table
  if (first_page < params.max_seqlen_k >> params.page_size_log2) {
    ptx::prefetch_l1(params.block_table + request * params.stride_block_table + first_page);
  }
}

/// Decodes short requests, the CTAs of each and of a tile a cluster: nothing is planned, and pieces are merged within
/// the cluster's shared memory. Grid: (tiles of query rows, KV heads, requests * params.cluster_size). Otherwise as
/// decode_kernel.
template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    cluster_decode_kernel(const __grid_constant__ DenseDecodeParams params) {
  using Kernel = NarrowDecodeKernel<Traits>;
  static_assert(Traits::kNumSlots == kClusterBlocksPerCta, "each block has a slot of its own");
  extern __shared__ unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<ClusterStorage<Traits>*>(shared_bytes);
  const int warpgroup = __shfl_sync(~0U, threadIdx.x / Traits::kWarpgroupThreads, 0);
  const int warp = threadIdx.x / 32;
  const int head_k = blockIdx.y;
  const QueryTile tile(params.tiling, blockIdx.x);

  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&params.q_map);
    ptx::prefetch_tensor_map(&params.k_cache_map);
    shared.init_cluster_barriers();
  }
  if (warpgroup < Traits::kNumConsumers) Kernel::init_but_kv_full(params, shared);
  // One thread loads this CTA's blocks, two at most, as soon as the part is known and before all threads meet; it has
  // initialised what its copies report to. Not where several tiles read the same KV: CTAs that ask for the same lines
  // at the same time get them later.
  const bool loads_at_once = params.box_tokens == Traits::kBlockN && gridDim.x == 1;
  const bool issues_kv = warp == Traits::kConsumerWarps && ptx::elect_one();
  if (issues_kv) {
    for (int slot = 0; slot < Traits::kNumSlots; ++slot) Kernel::init_kv_full(shared, slot);
  }
  const bool issues_query = warp == Traits::kQueryWarp && ptx::elect_one();
  if (issues_query) Kernel::init_query(shared);
  __syncwarp();
  ptx::cluster_arrive();  // barriers are initialised, and visible to the cluster by fence_mbarrier_init
  ptx::wait_for_previous_grids();
  ptx::launch_dependents();
  const int request = ptx::cta_z() / params.cluster_size;
  if (issues_query) Kernel::load_known_query(params, shared, tile, head_k, request);
  if (warpgroup == Traits::kNumConsumers + 1) init_rows<Traits>(params, shared.rows, tile, head_k);
  if (warp == Traits::kTablesWarp) prefetch_pages(params, request);
  if (issues_kv) {
    shared.plan.part = part_of_cluster(params, ptx::cta_z());
    Piece piece;
    PieceWalk(params, shared.plan.part, 0).next(piece);
    if (loads_at_once) NarrowProducer<Traits, true>(params, shared).load_into_fresh_slots(piece, head_k);
  }
  __syncwarp();
  __syncthreads();
  if (warpgroup == Traits::kNumConsumers) {
    if (!loads_at_once) Kernel::produce(params, shared, tile, head_k, ptx::cta_z(), warp - Traits::kConsumerWarps);
    __syncwarp();
    ptx::cluster_wait();
    ClusterCombine<Traits>(params, shared).give(warp - Traits::kConsumerWarps);
    return;
  }
  Piece piece;
  PieceWalk(params, shared.plan.part, 0).next(piece);
  const bool has_blocks = piece.begin_block < piece.end_block;
  const ClusterCombine<Traits> combine(params, shared);
  if (warpgroup < Traits::kNumConsumers) {
    NarrowConsumer<Traits> consumer(shared, warpgroup);
    consumer.reset();
    if (has_blocks) {
      consumer.run(piece);
      consumer.finish(true);
      // All warps are done with the first slot, over which O is laid: a warp's own wait is for its own wgmmas.
      ptx::mbarrier_wait(ptx::shared_address(&shared.kv_empty[0]), 0);
    } else {
      Kernel::drop_known_query(shared);
    }
    combine.run(consumer, warpgroup, piece.request);
  } else {
    NarrowScorer<Traits> scorer(params, shared);
    const float2 total = has_blocks ? scorer.run(piece) : scorer.no_keys();
    combine.weigh(total, piece.request);
  }
}

}  // namespace flash_mla::sm90

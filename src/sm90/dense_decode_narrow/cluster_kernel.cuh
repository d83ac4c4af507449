#pragma once

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode_narrow/cluster_combine.cuh"
#include "sm90/dense_decode_narrow/cluster_share.cuh"
#include "sm90/dense_decode_narrow/kernel.cuh"
#include "sm90/dense_decode_narrow/load.cuh"
#include "sm90/dense_decode_narrow/mainloop.cuh"
#include "sm90/dense_decode_narrow/scorer.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/grid.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/ptx/warp.cuh"

namespace flash_mla::sm90 {

/// After copies by a wrong guess: waits for them, tells the others, and makes the right ones. By one thread. A
/// function, so that this code is not in the way of what runs in every launch.
template <class Traits>
static __device__ __noinline__ void replace_share(const DenseDecodeParams& params, ClusterStorage<Traits>& shared,
                                                  int head_k) {
  NarrowProducer<Traits, true> producer(params, shared);
  producer.drop_share(shared.guess);
  ptx::mbarrier_arrive(ptx::shared_address(&shared.guess_gone));
  producer.load_share(shared.share, head_k);
}

/// Decodes short requests, the CTAs of each and of a tile a cluster: nothing is planned, and pieces are merged within
/// the cluster's shared memory. Grid: (tiles of query rows, KV heads, requests * params.cluster_size). Otherwise as
/// decode_kernel.
///
/// What is loaded first depends on a length and on pages, which the grid before may still write. So these are looked at
/// before that has ended, copies begin at once when it has, and meanwhile another warp looks again: if they have
/// changed, the others wait until these copies are over, and the right ones are made.
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
  const int request = ptx::cta_z() / params.cluster_size;
  const bool produces_kv = warp == Traits::kConsumerWarps;

  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&params.q_map);
    ptx::prefetch_tensor_map(&params.k_cache_map);
    shared.init_cluster_barriers();
  }
  if (warpgroup < Traits::kNumConsumers) Kernel::init_shared(params, shared);
  if (produces_kv) {
    const int looked = ClusterShare::look(params, request);
    if (ptx::elect_one()) Kernel::init_kv(shared);
    __syncwarp();
    const ClusterShare guess(params, looked);
    if (threadIdx.x % 32 == 0) shared.guess = guess;
  }
  if (threadIdx.x == 32 * Traits::kQueryWarp) Kernel::init_query(shared);
  if (warpgroup == Traits::kNumConsumers + 1) init_rows<Traits>(params, shared.rows, tile, head_k);
  __syncwarp();
  ptx::cluster_arrive();  // this thread's barriers are initialised, and visible to the cluster by fence_mbarrier_init
  ptx::wait_for_previous_grids();
  ptx::launch_dependents();
  const bool is_whole = params.box_tokens == Traits::kBlockN;
  if (produces_kv && is_whole && ptx::elect_one()) {
    NarrowProducer<Traits, true>(params, shared).load_share(shared.guess, head_k);
  }
  if (warp == Traits::kQueryWarp && ptx::elect_one()) {
    Kernel::load_first_query(params, shared, tile, head_k, request);
  }
  if (warp == Traits::kPlanWarp) {
    const ClusterShare share(params, ClusterShare::look(params, request));
    if (threadIdx.x % 32 == 0) shared.share = share;
  }
  __syncwarp();  // lanes that have parted do not meet the others of the CTA as one
  __syncthreads();
  const ClusterShare& share = shared.share;
  const bool is_stale = is_whole && !(share == shared.guess);
  const Piece piece{request, share.seqlen_k, share.begin_block, share.end_block, false, 0};
  if (warpgroup == Traits::kNumConsumers) {
    if (produces_kv && is_stale && ptx::elect_one()) replace_share(params, shared, head_k);
    if (produces_kv && !is_whole) NarrowProducer<Traits, false>(params, shared).load_piece(piece, head_k);
    __syncwarp();
    ptx::cluster_wait();
    ClusterCombine<Traits>(params, shared, piece).give(warp - Traits::kConsumerWarps);
    return;
  }
  if (is_stale) ptx::mbarrier_wait(ptx::shared_address(&shared.guess_gone), 0);
  const bool has_blocks = piece.begin_block < piece.end_block;
  const ClusterCombine<Traits> combine(params, shared, piece);
  if (warpgroup < Traits::kNumConsumers) {
    NarrowConsumer<Traits> consumer(shared, warpgroup);
    consumer.reset();
    if (has_blocks) {
      consumer.run(piece);
      // All warps are done with the first slot: a warp's own waits are for its own wgmmas.
      if (piece.begin_block + 1 < piece.end_block) ptx::mbarrier_wait(ptx::shared_address(&shared.kv_empty[0]), 0);
      combine.stage(consumer, warpgroup, 0);
      consumer.finish(true);
      combine.stage(consumer, warpgroup, 1);
    } else {
      Kernel::drop_known_query(shared);
      combine.stage(consumer, warpgroup, 0);
      combine.stage(consumer, warpgroup, 1);
    }
    combine.run();
  } else {
    NarrowScorer<Traits> scorer(params, shared);
    const float2 total = has_blocks ? scorer.run(piece) : scorer.no_keys();
    combine.weigh(total);
  }
}

}  // namespace flash_mla::sm90

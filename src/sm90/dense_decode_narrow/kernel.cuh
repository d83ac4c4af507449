#pragma once

#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode_narrow/epilogue.cuh"
#include "sm90/dense_decode_narrow/load.cuh"
#include "sm90/dense_decode_narrow/mainloop.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/grid.cuh"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/tma.cuh"

namespace flash_mla::sm90 {

template <class Traits>
__device__ void init_shared(const DenseDecodeParams& params, NarrowStorage<Traits>& shared) {
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&params.q_map);
    ptx::prefetch_tensor_map(&params.k_cache_map);
    ptx::mbarrier_init(ptx::shared_address(&shared.plan.splits_ready), 1);
    ptx::mbarrier_init(ptx::shared_address(&shared.merge_met), Traits::kConsumerThreads);
    ptx::mbarrier_init(ptx::shared_address(&shared.q_full), 1);
    ptx::mbarrier_init(ptx::shared_address(&shared.q_empty), Traits::kConsumerThreads);
    ptx::mbarrier_init(ptx::shared_address(&shared.consumers_met), Traits::kConsumerThreads);
    ptx::fence_mbarrier_init();
  }
  const int slot = static_cast<int>(threadIdx.x) - 32;
  if (slot >= 0 && slot < Traits::kNumSlots) {
    ptx::mbarrier_init(ptx::shared_address(&shared.kv_full[slot]), 1);
    ptx::mbarrier_init(ptx::shared_address(&shared.kv_empty[slot]), Traits::kWarpgroupWarps);
    ptx::fence_mbarrier_init();
  }
  clear_query_padding<Traits>(params, ptx::shared_address(shared.q), threadIdx.x, Traits::kNumThreads);
  ptx::fence_proxy_async();
}

/// A consumer's walk over the part's pieces.
template <class Traits>
__device__ __forceinline__ void consume(const DenseDecodeParams& params, NarrowStorage<Traits>& shared, int warpgroup,
                                        const QueryTile& tile, int head_k, int part_idx) {
  NarrowConsumer<Traits> consumer(params, shared, warpgroup);
  const RowCoordinate first_row(params, tile, head_k, 0);
  PieceWalk walk(params, shared.plan.part, part_idx);
  Piece piece;
  while (walk.next(piece)) {
    consumer.reset();
    if (piece.begin_block < piece.end_block) consumer.run(piece, tile, first_row.limit(params, piece.seqlen_k));
    NarrowEpilogue<Traits>(params, shared, piece, tile, head_k, warpgroup).write(consumer);
    if (!piece.is_whole) {
      consumer.meet_other();
      if (threadIdx.x == 0) TileFlags(params, tile.index(params.tiling, head_k)).publish(params, piece.slot);
    }
  }
}

/// The KV producer's walk over them.
template <class Traits>
__device__ __forceinline__ void produce_kv(const DenseDecodeParams& params, NarrowStorage<Traits>& shared, int head_k,
                                           int part_idx) {
  NarrowProducer<Traits> producer(params, shared);
  PieceWalk walk(params, shared.plan.part, part_idx);
  Piece piece;
  while (walk.next(piece)) producer.load_piece(piece, head_k);
}

/// Dense MLA decode where all query rows of a request that share a KV head fit into one tile of Traits::kRows. Grid and
/// roles are those of dense_decode_kernel, but for a second producer warp, which loads Q.
template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    dense_decode_narrow_kernel(const __grid_constant__ DenseDecodeParams params) {
  extern __shared__ unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<NarrowStorage<Traits>*>(shared_bytes);
  const int warpgroup = __shfl_sync(~0U, threadIdx.x / Traits::kWarpgroupThreads, 0);
  const int head_k = blockIdx.y;
  const QueryTile tile(params.tiling, blockIdx.x);

  init_shared(params, shared);
  ptx::wait_for_previous_grids();
  if (threadIdx.x / 32 == Traits::kPlanWarp) plan_part(params, CtaRole(params).part_idx, shared.plan);
  __syncthreads();

  if (warpgroup == Traits::kNumConsumers) {
    ptx::decrease_registers<Traits::kProducerRegisters>();
    const CtaRole role(params);
    const int warp = threadIdx.x / 32 - Traits::kConsumerWarps;
    if (warp == 0 && role.computes) produce_kv(params, shared, head_k, role.part_idx);
    if (warp == 1 && role.computes && threadIdx.x % 32 == 0) {
      produce_query<Traits>(params, shared, tile, head_k, role.part_idx);
    }
    if (threadIdx.x / 32 == Traits::kPlanWarp && role.merges) find_splits(params, role.part_idx, shared.plan);
  } else {
    ptx::increase_registers<Traits::kConsumerRegisters>();
    if (const CtaRole role(params); role.computes) consume(params, shared, warpgroup, tile, head_k, role.part_idx);
    if (const CtaRole role(params); role.merges) merge_splits<Traits>(params, shared, tile, head_k, role.part_idx);
  }
}

}  // namespace flash_mla::sm90

#pragma once

#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/first_block.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode/split_group.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/grid.cuh"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/ptx/warp.cuh"

namespace flash_mla::sm90 {

/// The entry of all decode kernels but that of clusters. Grid: (tiles of query rows, KV heads, parts); neighbours read
/// the same KV. Two consumer warpgroups, one of warps that load and plan, and one that scores.
///
/// Kernel has Traits, Storage and functions: init_shared, by consumer threads, thread 0 with a fence_mbarrier_init();
/// init_query and load_known_query, by a thread of the query warp, and drop_known_query; consume, by the consumer
/// warpgroups; produce, by the warps of the warpgroup behind them, numbered from its first one; score, by the
/// warpgroup behind that; load_first_block and drop_first, by a thread of the first of these.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::Traits::kNumThreads, 1)
    decode_kernel(const __grid_constant__ DenseDecodeParams params) {
  using Traits = typename Kernel::Traits;
  extern __shared__ unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Kernel::Storage*>(shared_bytes);
  const int warpgroup = __shfl_sync(~0U, threadIdx.x / Traits::kWarpgroupThreads, 0);
  const int head_k = blockIdx.y;
  const QueryTile tile(params.tiling, blockIdx.x);
  const TileFlags flags(params, tile.index(params.tiling, head_k));

  // A guess at what is loaded first, while the grids before still run. Behind them its copies begin, and it is looked
  // at again.
  const bool produces_kv = threadIdx.x / 32 == Traits::kConsumerWarps;
  FirstBlock first;
  if (produces_kv) {
    first = FirstBlock(params, ptx::cta_z());
    if (threadIdx.x % 32 == 0) shared.plan.first_request = first.exists ? first.request : -1;
  }
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&params.q_map);
    ptx::prefetch_tensor_map(&params.k_cache_map);
    init_plan(shared.plan, Traits::kConsumerThreads);
    shared.merge_barriers.init(Traits::kConsumerThreads);
  }
  if (warpgroup < Traits::kNumConsumers) Kernel::init_shared(params, shared);
  if (threadIdx.x == 32 * Traits::kQueryWarp) Kernel::init_query(shared);
  if (warpgroup == Traits::kNumConsumers + 1) init_rows<Traits>(params, shared.rows, tile, head_k);
  __syncwarp();  // lanes that have parted do not meet the others of the CTA as one
  __syncthreads();
  ptx::wait_for_previous_grids();
  if (!params.shares_kv) ptx::launch_dependents();
  const bool knows_query = has_known_query(params);
  const int request = knows_query ? 0 : shared.plan.first_request;
  if (threadIdx.x / 32 == Traits::kQueryWarp && request >= 0 && ptx::elect_one()) {
    Kernel::load_known_query(params, shared, tile, head_k, request);
  }
  bool has_first = false;
  if (produces_kv) {
    const int again = first.look_again();
    if (!Kernel::kLoadsQueryFirst && first.exists && ptx::elect_one()) {
      Kernel::load_first_block(params, shared, first, head_k);
    }
    has_first = first.rests_on(again);
    if (Kernel::kLoadsQueryFirst && has_first && first.exists && ptx::elect_one()) {
      Kernel::load_first_block(params, shared, first, head_k);
    }
    if (!has_first && first.exists && ptx::elect_one()) Kernel::drop_first(shared, !knows_query);
    has_first &= first.exists;
    if (threadIdx.x % 32 == 0) shared.plan.has_first = static_cast<int>(has_first);
  }
  if (threadIdx.x / 32 == Traits::kPlanWarp) plan_part(params, ptx::cta_z(), shared.plan);
  if (threadIdx.x / 32 == Traits::kSplitsWarp) {
    if (threadIdx.x % 32 == 0) flags.raise(flags.begun(ptx::cta_z()));
    prefetch_tables(params, ptx::cta_z());
  }
  __syncwarp();
  __syncthreads();
  if (warpgroup == Traits::kNumConsumers) {
    ptx::set_registers<Traits::kRegisters, Traits::kProducerRegisters>();
    const int part_idx = ptx::cta_z();
    const int warp = threadIdx.x / 32 - Traits::kConsumerWarps;
    Kernel::produce(params, shared, tile, head_k, part_idx, warp);
    if (threadIdx.x / 32 == Traits::kSplitsWarp) {
      if (has_known_query(params) && !has_blocks(params, shared.plan.part, part_idx)) Kernel::drop_known_query(shared);
      find_splits(params, part_idx, shared.plan);
      share_splits(params, flags, shared.plan, part_idx);
      clear_flags(flags, shared.plan, shared.merge_barriers, part_idx);
    }
  } else if (warpgroup < Traits::kNumConsumers) {
    ptx::set_registers<Traits::kRegisters, Traits::kConsumerRegisters>();
    Kernel::consume(params, shared, tile, head_k, ptx::cta_z(), warpgroup);
    merge_splits<Traits>(params, shared, tile, head_k);
  } else {
    ptx::set_registers<Traits::kRegisters, Traits::kScorerRegisters>();
    Kernel::score(params, shared, tile, head_k, ptx::cta_z());
  }
}

}  // namespace flash_mla::sm90

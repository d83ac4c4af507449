#pragma once

#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/first_block.cuh"
#include "sm90/dense_decode/next_grid.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/plan_source.h"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode/split_group.cuh"
#include "sm90/ptx/grid.cuh"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/ptx/warp.cuh"

namespace flash_mla::sm90 {

/// The entry of all decode kernels but that of clusters. Grid: (tiles of query rows, KV heads, parts); neighbours read
/// the same KV. Two consumer warpgroups, one of warps that load and plan, and one that scores.
///
/// Kernel has Traits, Storage and functions: init_shared, by consumer threads, thread 0 with a fence_mbarrier_init();
/// init_query, load_first_query and drop_query, by a thread of the query warp, and drop_known_query; consume, by the
/// consumer warpgroups; produce, by the warps of the warpgroup behind them but the last, numbered from its first one;
/// score, by the warpgroup behind that; init_kv, prefetch_first_blocks, load_first_block and, where Q is not loaded
/// first, drop_first_block, by a thread of the first of these.
template <class Kernel, PlanSource kPlanSource>
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
  // at again. Each warp that copies guesses for itself and initialises the barriers of its copies, and so waits for
  // nobody: most CTAs begin so late that each instruction of this way counts, so each has code of its own.
  const int warp = threadIdx.x / 32;
  if (warp == Traits::kConsumerWarps) {
    FirstBlock first;
    first.begin_to_look<kPlanSource>(params, ptx::cta_z());
    if (ptx::elect_one()) Kernel::init_kv(shared);
    __syncwarp();
    first.look<kPlanSource>(params, ptx::cta_z());
    if (first.exists && ptx::elect_one()) Kernel::prefetch_first_blocks(params, first, head_k);
    ptx::wait_for_previous_grids();
    const int again = first.look_again();
    if constexpr (!Kernel::kLoadsQueryFirst) {
      if (first.exists && ptx::elect_one()) Kernel::load_first_block(params, shared, first, head_k);
    }
    const bool is_right = first.rests_on(again);
    if constexpr (Kernel::kLoadsQueryFirst) {
      if (is_right && first.exists && ptx::elect_one()) Kernel::load_first_block(params, shared, first, head_k);
    } else {
      if (!is_right && first.exists && ptx::elect_one()) Kernel::drop_first_block(shared);
    }
    if (threadIdx.x % 32 == 0) {
      shared.plan.has_first = static_cast<int>(is_right && first.exists);
      shared.plan.first_seqlen_k = first.seqlen_k;
      shared.plan.next_page = first.next_page;
    }
  } else if (warp == Traits::kQueryWarp && !kHasKnownQuery<kPlanSource>) {
    FirstBlock first;
    first.begin_to_look<kPlanSource>(params, ptx::cta_z());
    if (ptx::elect_one()) Kernel::init_query(shared);
    __syncwarp();
    first.look<kPlanSource>(params, ptx::cta_z());
    ptx::wait_for_previous_grids();
    const int again = first.look_again();
    if (first.exists && ptx::elect_one()) Kernel::load_first_query(params, shared, tile, head_k, first.request);
    const bool is_right = first.rests_on(again);
    if (!is_right && first.exists && ptx::elect_one()) Kernel::drop_query(shared);
    if (threadIdx.x % 32 == 0) shared.plan.has_query = static_cast<int>(is_right && first.exists);
  } else {
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&params.q_map);
      ptx::prefetch_tensor_map(&params.k_cache_map);
      init_plan(shared.plan, Traits::kConsumerThreads);
      shared.merge_barriers.init(Traits::kConsumerThreads);
    }
    if (warpgroup < Traits::kNumConsumers) Kernel::init_shared(params, shared);
    if (warpgroup == Traits::kNumConsumers + 1) init_rows<Traits>(params, shared.rows, tile, head_k);
    if (warp == Traits::kQueryWarp && ptx::elect_one()) Kernel::init_query(shared);
    __syncwarp();
    ptx::wait_for_previous_grids();
    if (lets_next_begin_at_once<kPlanSource>(params)) ptx::launch_dependents();
    if (warp == Traits::kQueryWarp && ptx::elect_one()) {
      Kernel::load_first_query(params, shared, tile, head_k, /*request=*/0);
    }
    if (warp == Traits::kPlanWarp) plan_part<kPlanSource>(params, ptx::cta_z(), shared.plan);
    if (warp == Traits::kSplitsWarp) {
      if (threadIdx.x % 32 == 0) flags.raise(flags.begun(ptx::cta_z()));
      prefetch_tables(params, ptx::cta_z());
    }
  }
  __syncwarp();  // lanes that have parted do not meet the others of the CTA as one
  __syncthreads();
  if (warpgroup == Traits::kNumConsumers) {
    ptx::set_registers<Traits::kRegisters, Traits::kProducerRegisters>();
    const int part_idx = ptx::cta_z();
    if (warp != Traits::kSplitsWarp) {
      Kernel::template produce<kPlanSource>(params, shared, tile, head_k, part_idx, warp - Traits::kConsumerWarps);
    } else {
      if (kHasKnownQuery<kPlanSource> && !has_blocks(params, shared.plan, part_idx)) Kernel::drop_known_query(shared);
      find_splits<kPlanSource>(params, part_idx, shared.plan);
      share_splits<kPlanSource>(params, flags, shared.plan, part_idx);
      if constexpr (kMayKeepPiece<kPlanSource>)
        fetch_rest<Traits>(params, flags, shared, tile.index(params.tiling, head_k));
      clear_flags(flags, shared.plan, shared.merge_barriers, part_idx);
    }
  } else if (warpgroup < Traits::kNumConsumers) {
    ptx::set_registers<Traits::kRegisters, Traits::kConsumerRegisters>();
    Kernel::template consume<kPlanSource>(params, shared, tile, head_k, ptx::cta_z(), warpgroup);
    if (warp == 0 && lets_next_begin(params, shared.plan)) ptx::launch_dependents();
    merge_splits<Traits, kPlanSource>(params, shared, tile, head_k);
  } else {
    ptx::set_registers<Traits::kRegisters, Traits::kScorerRegisters>();
    Kernel::score(params, shared, tile, head_k, ptx::cta_z());
  }
}

}  // namespace flash_mla::sm90

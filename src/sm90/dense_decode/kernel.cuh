#pragma once

#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/load.cuh"
#include "sm90/dense_decode/mainloop.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/grid.cuh"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/tma.cuh"

namespace flash_mla::sm90 {

template <class Traits>
__device__ void init_shared(const DenseDecodeParams& params, SharedStorage<Traits>& shared) {
  if (threadIdx.x == 0) {
    constexpr int kWarps = Traits::kWarpgroupWarps;
    ptx::prefetch_tensor_map(&params.q_map);
    ptx::prefetch_tensor_map(&params.k_cache_map);
    ptx::mbarrier_init(ptx::shared_address(&shared.q_full), 1);
    ptx::mbarrier_init(ptx::shared_address(&shared.q_empty), Traits::kNumConsumers * kWarps);
    for (auto& barrier : shared.exchange_full) {
      ptx::mbarrier_init(ptx::shared_address(&barrier), Traits::kWarpgroupThreads);
    }
    for (int buffer = 0; buffer < Traits::kNumBuffers; ++buffer) {
      for (auto& barrier : shared.kv_full[buffer]) ptx::mbarrier_init(ptx::shared_address(&barrier), 1);
      for (auto& barrier : shared.kv_empty[buffer]) ptx::mbarrier_init(ptx::shared_address(&barrier), kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  clear_query_padding<Traits>(params, ptx::shared_address(shared.q), threadIdx.x, Traits::kNumThreads);
  ptx::fence_proxy_async();
}

/// A consumer's walk over the part's pieces.
template <class Traits>
__device__ __forceinline__ void consume(const DenseDecodeParams& params, SharedStorage<Traits>& shared, int warpgroup,
                                        const QueryTile& tile, int head_k, int part_idx) {
  Consumer<Traits> consumer(params, shared, warpgroup);
  const RowCoordinate rows[2] = {{params, tile, head_k, fragment_row()}, {params, tile, head_k, fragment_row() + 8}};
  const RowCoordinate first_row(params, tile, head_k, 0);
  PieceWalk walk(params, part_idx);
  Piece piece;
  while (walk.next(piece)) {
    consumer.reset();
    if (piece.begin_block < piece.end_block) {
      const int limits[2] = {rows[0].limit(params, piece.seqlen_k), rows[1].limit(params, piece.seqlen_k)};
      consumer.run(piece, limits, first_row.limit(params, piece.seqlen_k));
    }
    const Epilogue<Traits> epilogue(params, piece, warpgroup);
    epilogue.template write_row<0>(rows[0], consumer.o, consumer.row_max[0], consumer.row_sum[0]);
    epilogue.template write_row<1>(rows[1], consumer.o, consumer.row_max[1], consumer.row_sum[1]);
    if (!piece.is_whole) {
      ptx::named_barrier_sync(kConsumersReady, Traits::kConsumerThreads);
      if (threadIdx.x == 0) TileFlags(params, blockIdx.x, head_k).publish(params, piece.slot);
    }
  }
}

/// Dense MLA decode. Grid: (tiles of query rows, KV heads, 2 * parts); neighbours read the same KV. The first half of
/// the CTAs computes, one for each part: two consumer warpgroups and one that holds the producer warp. The second half
/// merges split requests.
template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    dense_decode_kernel(const __grid_constant__ DenseDecodeParams params) {
  extern __shared__ unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(shared_bytes);
  const int warpgroup = __shfl_sync(~0U, threadIdx.x / Traits::kWarpgroupThreads, 0);
  const int head_k = blockIdx.y;
  const int part_idx = blockIdx.z;
  const QueryTile tile(params.tiling, blockIdx.x);

  if (part_idx >= params.num_parts) {
    ptx::wait_for_previous_grids();
    Combine<Traits>(params, tile, blockIdx.x, head_k, shared_bytes).run(part_idx - params.num_parts);
    return;
  }
  init_shared(params, shared);
  __syncthreads();
  ptx::wait_for_previous_grids();
  // No launch_dependents: a grid that starts while this one ends is placed on SMs as they come free, which scatters the
  // CTAs that read the same KV. That cost 3 % at 128 heads.

  if (warpgroup == Traits::kNumConsumers) {
    ptx::decrease_registers<Traits::kProducerRegisters>();
    if (threadIdx.x / 32 != Traits::kConsumerThreads / 32) return;
    Producer<Traits> producer(params, shared);
    if (!producer.is_active()) return;
    PieceWalk walk(params, part_idx);
    Piece piece;
    while (walk.next(piece)) producer.load_piece(piece, tile, head_k);
  } else {
    ptx::increase_registers<Traits::kConsumerRegisters>();
    consume(params, shared, warpgroup, tile, head_k, part_idx);
  }
}

}  // namespace flash_mla::sm90

#pragma once

#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/load.cuh"
#include "sm90/dense_decode/mainloop.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// Dense MLA decode of tiles of 64 query rows: what is its own beside the common entry (entry.cuh).
template <class Traits_>
struct DenseDecodeKernel {
  using Traits = Traits_;
  using Storage = SharedStorage<Traits>;

  __device__ static void init_shared(const DenseDecodeParams& params, Storage& shared) {
    constexpr int kWarps = Traits::kWarpgroupWarps;
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(ptx::shared_address(&shared.q_empty), Traits::kNumConsumers * kWarps);
      for (auto& barrier : shared.exchange_full) {
        ptx::mbarrier_init(ptx::shared_address(&barrier), Traits::kWarpgroupThreads);
      }
      ptx::fence_mbarrier_init();
    }
    // Not by a lane for each: barriers are initialised one at a time all the same.
    if (threadIdx.x == 32) {
      for (auto& buffer : shared.kv_full) {
        for (auto& barrier : buffer) ptx::mbarrier_init(ptx::shared_address(&barrier), 1);
      }
      ptx::fence_mbarrier_init();
    }
    if (threadIdx.x == 64) {
      for (auto& buffer : shared.kv_empty) {
        for (auto& barrier : buffer) ptx::mbarrier_init(ptx::shared_address(&barrier), kWarps);
      }
      ptx::fence_mbarrier_init();
    }
    clear_query_padding<Traits>(params, ptx::shared_address(shared.q), threadIdx.x, Traits::kConsumerThreads);
  }

  /// A consumer's walk over the part's pieces.
  __device__ __forceinline__ static void consume(const DenseDecodeParams& params, Storage& shared,
                                                 const QueryTile& tile, int head_k, int part_idx, int warpgroup) {
    Consumer<Traits> consumer(params, shared, warpgroup);
    const RowCoordinate rows[2] = {{params, tile, head_k, fragment_row()}, {params, tile, head_k, fragment_row() + 8}};
    const RowCoordinate first_row(params, tile, head_k, 0);
    PieceWalk walk(params, shared.plan.part, part_idx);
    Piece piece;
    while (walk.next(piece)) {
      consumer.reset();
      if (piece.begin_block < piece.end_block) {
        const int limits[2] = {rows[0].limit(params, piece.seqlen_k), rows[1].limit(params, piece.seqlen_k)};
        consumer.run(piece, limits, first_row.limit(params, piece.seqlen_k));
      }
      const Epilogue<Traits> epilogue(params, piece, warpgroup);
      if (piece.is_whole) {
        epilogue.template write_final<0>(rows[0], consumer.o, consumer.row_max[0], consumer.row_sum[0]);
        epilogue.template write_final<1>(rows[1], consumer.o, consumer.row_max[1], consumer.row_sum[1]);
      } else {
        ptx::mbarrier_wait(ptx::shared_address(&shared.plan.splits_ready), 0);
        if (shared.plan.is_read(piece.slot)) {
          epilogue.write_partial(consumer.o, consumer.row_max, consumer.row_sum, tile.index(params.tiling, head_k));
        }
        ptx::mbarrier_arrive(ptx::shared_address(&shared.plan.piece_written[piece.slot % 2]));
      }
    }
  }

  /// The producers' walk over them: the first warp loads KV, a thread of the second one Q.
  __device__ __forceinline__ static void produce(const DenseDecodeParams& params, Storage& shared,
                                                 const QueryTile& tile, int head_k, const CtaRole& role, int warp) {
    if (!role.computes) return;
    if (warp == 0) {
      Producer<Traits> producer(params, shared);
      if (!producer.is_active()) return;
      PieceWalk walk(params, shared.plan.part, role.part_idx);
      Piece piece;
      while (walk.next(piece)) producer.load_piece(piece, head_k);
    }
    if (warp == 1 && threadIdx.x % 32 == 0) produce_query<Traits>(params, shared, tile, head_k, role.part_idx);
  }
};

}  // namespace flash_mla::sm90

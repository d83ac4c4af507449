#pragma once

#include "sm90/dense_decode/first_block.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/plan_source.h"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode_narrow/epilogue.cuh"
#include "sm90/dense_decode_narrow/load.cuh"
#include "sm90/dense_decode_narrow/mainloop.cuh"
#include "sm90/dense_decode_narrow/scorer.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/primitives/arrive.cuh"
#include "sm90/primitives/renew.cuh"
#include "sm90/primitives/ring.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/warp.cuh"

namespace flash_mla::sm90 {

/// Dense MLA decode of tiles of Traits::kRows query rows, 16 or 32: what is its own beside the common entry
/// (dense_decode/entry.cuh).
template <class Traits_>
struct NarrowDecodeKernel {
  using Traits = Traits_;
  using Storage = NarrowStorage<Traits>;

  __device__ static void init_shared(const DenseDecodeParams& params, Storage& shared) {
    if (threadIdx.x == 0) {
      for (auto& barrier : shared.q_empty) {
        ptx::mbarrier_init(ptx::shared_address(&barrier), Traits::kWarpgroupWarps * kArrivalsOfWarp);
      }
      ptx::mbarrier_init(ptx::shared_address(&shared.sums_full), Traits::kRows);
      ptx::mbarrier_init(ptx::shared_address(&shared.sums_empty), Traits::kConsumerWarps * kArrivalsOfWarp);
      for (auto& barrier : shared.kv_empty) {
        ptx::mbarrier_init(ptx::shared_address(&barrier), Traits::kConsumerWarps * kArrivalsOfWarp);
      }
      for (auto& barrier : shared.p_full) {
        ptx::mbarrier_init(ptx::shared_address(&barrier), Traits::kWarpgroupThreads);
      }
      ptx::fence_mbarrier_init();
    }
    for (auto& q : shared.q) {
      clear_query_padding<Traits>(params, ptx::shared_address(q), threadIdx.x, Traits::kConsumerThreads);
    }
  }

  /// The barriers of the copies of Q, and those of KV's, as far as they are needed before all threads have met. By a
  /// thread of the warp that asks for them, and not by a lane for each: barriers are initialised one at a time all the
  /// same.
  __device__ static void init_query(Storage& shared) {
    for (auto& barrier : shared.q_full) ptx::mbarrier_init(ptx::shared_address(&barrier), 1);
    ptx::fence_mbarrier_init();
  }
  __device__ static void init_kv(Storage& shared) {
    for (auto& slot : shared.kv_full) {
      for (auto& barrier : slot) ptx::mbarrier_init(ptx::shared_address(&barrier), 1);
    }
    ptx::fence_mbarrier_init();
  }
  /// Of the part's first request, before there is a plan. By a thread.
  __device__ static void load_first_query(const DenseDecodeParams& params, Storage& shared, const QueryTile& tile,
                                          int head_k, int request) {
    load_query<Traits>(params, ptx::shared_address(shared.q[0]), ptx::shared_address(&shared.q_full[0]), request, tile,
                       head_k);
  }
  /// Waits for these copies, where no block needs them: their memory gets another use.
  __device__ static void drop_known_query(Storage& shared) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.q_full[0]), 0);
  }

  /// Asks for the part's first block to come into L2, and the second of a long part: memory has time while the last
  /// CTAs of the grids before run.
  __device__ static void prefetch_first_blocks(const DenseDecodeParams& params, const FirstBlock& first, int head_k) {
    prefetch_block<Traits>(params, first.block, first.page, head_k);
    if (first.is_of_long_part()) prefetch_block_of_long_part<Traits>(params, first.block + 1, first.next_page, head_k);
  }
  /// Copies the part's first block, into the first slot, which nobody has used yet.
  __device__ static void load_first_block(const DenseDecodeParams& params, Storage& shared, const FirstBlock& first,
                                          int head_k) {
    NarrowProducer<Traits, true>(params, shared).load_first(first, head_k);
  }
  /// Q is small: it does not keep KV waiting, nor the other way round.
  static constexpr bool kLoadsQueryFirst = false;
  /// Waits for these copies, which are wrong, and makes the barriers new that they report to.
  static __device__ __noinline__ void drop_first_block(Storage& shared) {
    for (auto& barrier : shared.kv_full[0]) renew_mbarrier(ptx::shared_address(&barrier));
    ptx::fence_mbarrier_init();
  }
  /// The same for copies of Q that are of another request.
  static __device__ __noinline__ void drop_query(Storage& shared) {
    renew_mbarrier(ptx::shared_address(&shared.q_full[0]));
    ptx::fence_mbarrier_init();
  }

  /// The scorer's walk over the part's pieces.
  __device__ __forceinline__ static void score(const DenseDecodeParams& params, Storage& shared, const QueryTile& tile,
                                               int head_k, int part_idx) {
    NarrowScorer<Traits> scorer(params, shared);
    NarrowRowEpilogue<Traits> epilogue(params, shared, tile.index(params.tiling, head_k));
    PieceWalk walk(params, shared.plan, part_idx);
    Piece piece;
    while (walk.next(piece)) {
      float2 total = scorer.no_keys();
      if (piece.begin_block < piece.end_block) total = scorer.run(piece);
      const int row = threadIdx.x % Traits::kWarpgroupThreads;
      if (row < Traits::kRows) epilogue.write(piece, row, total);
      __syncwarp();
    }
  }

  /// A consumer's walk over them.
  template <PlanSource kPlanSource>
  __device__ __forceinline__ static void consume(const DenseDecodeParams& params, Storage& shared,
                                                 const QueryTile& tile, int head_k, int part_idx, int warpgroup) {
    NarrowConsumer<Traits> consumer(shared, warpgroup);
    NarrowEpilogue<Traits> epilogue(params, shared, warpgroup);
    PieceWalk walk(params, shared.plan, part_idx);
    Piece piece;
    while (walk.next(piece)) {
      const bool has_blocks = piece.begin_block < piece.end_block;
      consumer.reset();
      if (has_blocks) consumer.run(piece);
      if (piece.is_whole) {
        consumer.finish(has_blocks);
        epilogue.write_final(consumer, piece);
      } else {
        const int tile_idx = tile.index(params.tiling, head_k);
        ptx::mbarrier_wait(ptx::shared_address(&shared.plan.splits_ready), 0);
        const bool is_read = shared.plan.is_read(piece.slot);
        const bool is_kept = kMayKeepPiece<kPlanSource> && shared.plan.is_kept(piece.slot);
        if (is_read && !is_kept) epilogue.write_partial(consumer, piece, tile_idx, 0);
        consumer.finish(has_blocks);
        if (is_kept) {
          shared.plan.free_memory();
          epilogue.keep(reinterpret_cast<unsigned char*>(&shared));
          epilogue.write_partial(consumer, piece, tile_idx, 0);
        }
        if (is_read) epilogue.write_partial(consumer, piece, tile_idx, 1);
        ptx::mbarrier_arrive(ptx::shared_address(&shared.plan.piece_written[piece.slot % 2]));
      }
    }
  }

  /// The producers' walk over them: the first warp loads KV, a thread of the second one Q.
  template <PlanSource kPlanSource>
  __device__ __forceinline__ static void produce(const DenseDecodeParams& params, Storage& shared,
                                                 const QueryTile& tile, int head_k, int part_idx, int warp) {
    const bool is_whole = params.box_tokens == Traits::kBlockN;
    if (warp == 0 && is_whole && ptx::elect_one()) produce_kv<true>(params, shared, head_k, part_idx);
    if (warp == 0 && !is_whole) produce_kv<false>(params, shared, head_k, part_idx);
    if (warp == 1 && !kHasKnownQuery<kPlanSource> && ptx::elect_one()) {
      produce_queries(params, shared, tile, head_k, part_idx);
    }
  }

 private:
  template <bool kIsWhole>
  __device__ __forceinline__ static void produce_kv(const DenseDecodeParams& params, Storage& shared, int head_k,
                                                    int part_idx) {
    NarrowProducer<Traits, kIsWhole> producer(params, shared);
    PieceWalk walk(params, shared.plan, part_idx);
    Piece piece;
    for (bool has_first = shared.plan.has_first != 0; walk.next(piece); has_first = false)
      producer.load_piece(piece, head_k, has_first);
  }

  /// Loads Q of each piece that has blocks, if that is not on its way, as soon as there is memory: while the piece
  /// before is worked. By a thread of another warp than KV's, so that KV does not wait for that memory.
  __device__ __forceinline__ static void produce_queries(const DenseDecodeParams& params, Storage& shared,
                                                         const QueryTile& tile, int head_k, int part_idx) {
    RingPosition<Traits::kQuerySlots> at;
    PieceWalk walk(params, shared.plan, part_idx);
    Piece piece;
    for (bool has_query = shared.plan.has_query != 0; walk.next(piece); has_query = false) {
      if (piece.begin_block == piece.end_block) continue;
      // Who has not loaded must not wait for memory that nobody has used: that phase may be over, and the next one too.
      if (!has_query) {
        ptx::mbarrier_wait(ptx::shared_address(&shared.q_empty[at.slot]), at.phase ^ 1);
        load_query<Traits>(params, ptx::shared_address(shared.q[at.slot]), ptx::shared_address(&shared.q_full[at.slot]),
                           piece.request, tile, head_k);
      }
      at = at + 1;
    }
  }
};

}  // namespace flash_mla::sm90

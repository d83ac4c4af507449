#pragma once

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/first_block.cuh"
#include "sm90/dense_decode/load.cuh"
#include "sm90/dense_decode/mainloop.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/plan_source.h"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode/row_coordinate.cuh"
#include "sm90/dense_decode/scorer.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/arrive.cuh"
#include "sm90/primitives/fragment.cuh"
#include "sm90/primitives/renew.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/warp.cuh"

namespace flash_mla::sm90 {

/// Dense MLA decode of tiles of 64 query rows: what is its own beside the common entry (entry.cuh).
template <class Traits_>
struct DenseDecodeKernel {
  using Traits = Traits_;
  using Storage = SharedStorage<Traits>;

  __device__ static void init_shared(const DenseDecodeParams& params, Storage& shared) {
    constexpr int kWarps = Traits::kWarpgroupWarps * kArrivalsOfWarp;
    // Not by a lane for each: barriers are initialised one at a time all the same.
    if (threadIdx.x == 0) {
      init(shared.q_empty, kWarps);
      init(shared.qk_done, kWarps);
      init(shared.rows_taken, Traits::kConsumerWarps * kArrivalsOfWarp);
      for (auto& barrier : shared.p_full) init(barrier, Traits::kWarpgroupThreads);
      for (auto& barrier : shared.rescale_full) init(barrier, Traits::kWarpgroupThreads / 4);
      ptx::fence_mbarrier_init();
    }
    clear_query_padding<Traits>(params, ptx::shared_address(shared.q), threadIdx.x, Traits::kConsumerThreads);
  }

  /// Barriers of the copies of Q, and of those of KV, as far as they are needed before all threads have met. By a
  /// thread of the warp that asks for them.
  __device__ static void init_query(Storage& shared) {
    init(shared.q_full, 1);
    for (int i = 0; i < Traits::kNumRegisterPairs; ++i) init(shared.pair_full[i], 1);
    ptx::fence_mbarrier_init();
  }
  __device__ static void init_kv(Storage& shared) {
    for (int i = Traits::kNumRegisterPairs; i < Traits::kPairSlots; ++i) init(shared.pair_full[i], 1);
    for (auto& barrier : shared.rope_full) init(barrier, 1);
    for (auto& barrier : shared.pair_empty) init(barrier, Traits::kWarpgroupWarps * kArrivalsOfWarp);
    for (auto& barrier : shared.rope_empty) init(barrier, Traits::kConsumerWarps * kArrivalsOfWarp);
    ptx::fence_mbarrier_init();
  }
  /// Of the part's first request, before there is a plan. By a thread.
  __device__ static void load_first_query(const DenseDecodeParams& params, Storage& shared, const QueryTile& tile,
                                          int head_k, int request) {
    Producer<Traits, true>(params, shared).template load_query<false>(request, tile, head_k);
  }
  /// Waits for these copies, where no block needs them: their memory gets another use.
  __device__ static void drop_known_query(Storage& shared) {
    for (int i = 0; i < Traits::kNumRegisterPairs; ++i) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.pair_full[i]), 0);
    }
    ptx::mbarrier_wait(ptx::shared_address(&shared.q_full), 0);
  }

  /// Asks for the first two blocks of a long part to come into L2, unless tiles share KV: then calls in a row do not
  /// overlap where parts are long. In short parts this loses: Q is what is waited for first.
  __device__ static void prefetch_first_blocks(const DenseDecodeParams& params, const FirstBlock& first, int head_k) {
    if (params.shares_kv || !first.is_of_long_part()) return;
    prefetch_block_of_long_part<Traits>(params, first.block, first.page, head_k);
    prefetch_block_of_long_part<Traits>(params, first.block + 1, first.next_page, head_k);
  }
  /// Copies the part's first block, into slots that nobody has used yet.
  __device__ static void load_first_block(const DenseDecodeParams& params, Storage& shared, const FirstBlock& first,
                                          int head_k) {
    Producer<Traits, true>(params, shared).load_first(first, head_k);
  }
  /// The 72 KB of Q are needed first, and come late where KV is asked for at the same time. So KV is asked for when the
  /// guess has turned out right, and these copies need not be dropped.
  static constexpr bool kLoadsQueryFirst = true;
  /// Waits for copies of Q, which are of the wrong request, and makes the barriers new that they report to.
  static __device__ __noinline__ void drop_query(Storage& shared) {
    renew_mbarrier(ptx::shared_address(&shared.q_full));
    for (int i = 0; i < Traits::kNumRegisterPairs; ++i) {
      renew_mbarrier(ptx::shared_address(&shared.pair_full[i]));
    }
    ptx::fence_mbarrier_init();
  }

  /// The scorer's walk over the part's pieces.
  __device__ __forceinline__ static void score(const DenseDecodeParams& params, Storage& shared,
                                               const QueryTile& /*tile*/, int /*head_k*/, int part_idx) {
    Scorer<Traits> scorer(params, shared);
    PieceWalk walk(params, shared.plan, part_idx);
    Piece piece;
    while (walk.next(piece)) {
      if (piece.begin_block < piece.end_block) scorer.run(piece);
    }
  }

  /// A consumer's walk over them.
  template <PlanSource kPlanSource>
  __device__ __forceinline__ static void consume(const DenseDecodeParams& params, Storage& shared,
                                                 const QueryTile& tile, int head_k, int part_idx, int warpgroup) {
    Consumer<Traits> consumer(shared, warpgroup);
    PieceWalk walk(params, shared.plan, part_idx);
    Piece piece;
    while (walk.next(piece)) {
      consumer.reset();
      const bool has_blocks = piece.begin_block < piece.end_block;
      if (has_blocks) consumer.run(piece);
      if (piece.is_whole) {
        const Epilogue<Traits> epilogue(params, piece, warpgroup);
        const RowCoordinate* const rows = &shared.rows[fresh_fragment_row()];
        consumer.finish_first_half(has_blocks);
        epilogue.write(rows, 0, consumer.o[0], consumer.row_sum);
        consumer.finish(has_blocks);
        epilogue.write(rows, 1, consumer.o[1], consumer.row_sum);
        epilogue.write_lse(rows, consumer.row_max, consumer.row_sum);
      } else {
        PartialEpilogue<Traits> epilogue(params, piece, tile.index(params.tiling, head_k), warpgroup);
        ptx::mbarrier_wait(ptx::shared_address(&shared.plan.splits_ready), 0);
        const bool is_read = shared.plan.is_read(piece.slot);
        const bool is_kept = kMayKeepPiece<kPlanSource> && shared.plan.is_kept(piece.slot);
        consumer.finish_first_half(has_blocks);
        if (is_read && !is_kept) epilogue.write_first_half(consumer.o[0]);
        consumer.finish(has_blocks);
        if (is_kept) {
          shared.plan.free_memory();
          epilogue.keep(reinterpret_cast<unsigned char*>(&shared));
          epilogue.write_first_half(consumer.o[0]);
        }
        if (is_read) epilogue.write_rest(consumer.o, consumer.row_max, consumer.row_sum);
        ptx::mbarrier_arrive(ptx::shared_address(&shared.plan.piece_written[piece.slot % 2]));
      }
    }
  }

  /// The producers' walk over them, by the first warp. The second one loads what Q is needed first.
  template <PlanSource kPlanSource>
  __device__ __forceinline__ static void produce(const DenseDecodeParams& params, Storage& shared,
                                                 const QueryTile& tile, int head_k, int part_idx, int warp) {
    const bool is_whole = params.box_tokens == Traits::kBlockN;
    if (warp == 1) {
      if (!kHasKnownQuery<kPlanSource> && shared.plan.has_query == 0 && ptx::elect_one()) {
        load_late_query(params, shared, tile, head_k, part_idx);
      }
    } else if (warp == 0) {
      if (!is_whole) {
        produce_kv<false>(params, shared, head_k, part_idx);
      } else if (ptx::elect_one()) {
        produce_kv<true>(params, shared, head_k, part_idx);
      }
    }
  }

 private:
  /// Q of the part's first piece that has blocks, where it was not on its way before the plan was there.
  __device__ __forceinline__ static void load_late_query(const DenseDecodeParams& params, Storage& shared,
                                                         const QueryTile& tile, int head_k, int part_idx) {
    PieceWalk walk(params, shared.plan, part_idx);
    Piece piece;
    while (walk.next(piece)) {
      if (piece.begin_block == piece.end_block) continue;
      load_first_query(params, shared, tile, head_k, piece.request);
      break;
    }
  }

  template <bool kIsWhole>
  __device__ __forceinline__ static void produce_kv(const DenseDecodeParams& params, Storage& shared, int head_k,
                                                    int part_idx) {
    Producer<Traits, kIsWhole> producer(params, shared);
    if (!producer.is_active()) return;
    PieceWalk walk(params, shared.plan, part_idx);
    Piece piece;
    for (bool has_first = shared.plan.has_first != 0; walk.next(piece); has_first = false)
      producer.load_piece(piece, head_k, has_first);
  }

  __device__ static void init(std::uint64_t& barrier, int arrivals) {
    ptx::mbarrier_init(ptx::shared_address(&barrier), arrivals);
  }
};

}  // namespace flash_mla::sm90

#pragma once

#include <cstdint>

#include "sm90/dense_decode/first_block.cuh"
#include "sm90/dense_decode/kv_boxes.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode/query_tiling.h"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/primitives/ring.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// Fills the rings with KV, for all pieces of a part. By the active lanes of one warp.
template <class Traits, bool kIsWhole>
class Producer {
  using Boxes = KvBoxes<Traits, kIsWhole>;

 public:
  __device__ Producer(const DenseDecodeParams& params, SharedStorage<Traits>& shared)
      : shared_(shared), boxes_(params), is_first_(kIsWhole || threadIdx.x % 32 == 0) {}

  /// Whether this lane has boxes to load.
  __device__ bool is_active() const { return boxes_.is_active(); }

  /// A part's first block, before the plan is there.
  __device__ __forceinline__ void load_first(const FirstBlock& first, int head_k) {
    pair_ = pair_ + Traits::kNumRegisterPairs;
    load_block(first.block, {first.page, first.page}, head_k);
  }

  /// `has_first`: the first block is on its way, and the next one's page is known.
  __device__ void load_piece(const Piece& piece, int head_k, bool has_first) {
    if (piece.begin_block == piece.end_block) return;
    pair_ = pair_ + Traits::kNumRegisterPairs;  // those of Q: README.md says why they need not be waited for
    typename Boxes::Pages pages{shared_.plan.next_page, shared_.plan.next_page};
    if (has_first) {
      pair_ = pair_ + Traits::kPairsPerBlock;
      rope_ = rope_ + 1;
    } else {
      pages = boxes_.look_up(piece, piece.begin_block);
    }
    const int begin_block = piece.begin_block + static_cast<int>(has_first);
#pragma unroll 1
    for (int block = begin_block; block < piece.end_block; ++block) {
      const typename Boxes::Pages next_pages = boxes_.look_up(piece, block + 1);  // a block ahead, to hide its latency
      load_block(block, pages, head_k);
      pages = next_pages;
    }
  }

 private:
  /// In the order in which QK reads them.
  __device__ __forceinline__ void load_block(int block, const typename Boxes::Pages& pages, int head_k) {
    const std::uint32_t rope_full = acquire(shared_.rope_full, shared_.rope_empty, rope_, Traits::kTileBytes);
    boxes_.load_chunk(ptx::shared_address(shared_.ropes[rope_.slot]), rope_full, block, Traits::kRopeChunk, pages,
                      head_k);
    rope_ = rope_ + 1;
#pragma unroll(kIsWhole ? Traits::kPairsPerBlock : 1)
    for (int i = 0; i < Traits::kPairsPerBlock; ++i) {
      const std::uint32_t full = acquire(shared_.pair_full, shared_.pair_empty, pair_, Traits::kPairBytes);
      const std::uint32_t pair = ptx::shared_address(shared_.pairs[pair_.slot]);
      boxes_.load_chunk(pair, full, block, 2 * i, pages, head_k);
      boxes_.load_chunk(pair + Traits::kTileBytes, full, block, 2 * i + 1, pages, head_k);
      pair_ = pair_ + 1;
    }
  }

  /// Waits for a slot to be empty, and lets its `full` barrier, whose address it returns, wait for `bytes`.
  template <int kSlots>
  __device__ __forceinline__ std::uint32_t acquire(std::uint64_t (&full)[kSlots], std::uint64_t (&empty)[kSlots],
                                                   const RingPosition<kSlots>& at, int bytes) const {
    ptx::mbarrier_wait(ptx::shared_address(&empty[at.slot]), at.phase ^ 1);
    const std::uint32_t barrier = ptx::shared_address(&full[at.slot]);
    if (is_first_) ptx::mbarrier_arrive_expect(barrier, bytes);
    return barrier;
  }

  SharedStorage<Traits>& shared_;
  const Boxes boxes_;
  const bool is_first_;  // of the active lanes
  RingPosition<Traits::kPairSlots> pair_;
  RingPosition<Traits::kRopeSlots> rope_;
};

/// Loads Q: the pairs of chunks that go to registers, through the ring of pairs, and what stays in shared memory. By
/// one thread of another warp than KV's producer, whose slots these pairs come before.
template <class Traits>
class QueryProducer {
 public:
  __device__ QueryProducer(const DenseDecodeParams& params, SharedStorage<Traits>& shared, const QueryTile& tile,
                           int head_k)
      : params_(params), shared_(shared), tile_(tile), head_k_(head_k) {}

  /// Before the plan is there, where the request is known or guessed: into slots that nobody has used yet.
  __device__ __forceinline__ void load_first(int request) { load<false>(request); }

  /// For each piece, but not until the last QK of the one before is done: all slots before have been filled then, so
  /// that no phase of them is taken for another.
  __device__ __forceinline__ void load_all(int part_idx) {
    for_each_query(params_, shared_, part_idx, [&](const Piece& piece, bool has_query) {
      if (has_query) {
        pair_ = pair_ + Traits::kNumRegisterPairs;
      } else {
        load<true>(piece.request);
      }
      pair_ = pair_.far_on(Traits::kPairsPerBlock * (piece.end_block - piece.begin_block));
    });
  }

 private:
  template <bool kWaits>
  __device__ __forceinline__ void load(int request) {
    const int bytes = params_.tiling.rows_per_tile() * Traits::kRowBytes;
#pragma unroll 1
    for (int i = 0; i < Traits::kNumRegisterPairs; ++i) {
      const std::uint32_t full = ptx::shared_address(&shared_.pair_full[pair_.slot]);
      if (kWaits) ptx::mbarrier_wait(ptx::shared_address(&shared_.pair_empty[pair_.slot]), pair_.phase ^ 1);
      ptx::mbarrier_arrive_expect(full, 2 * bytes);
      const int chunk = 2 * (Traits::kFirstRegisterPair + i);
      const std::uint32_t pair = ptx::shared_address(shared_.pairs[pair_.slot]);
      load_query_chunk<Traits>(params_, pair, full, chunk, request, tile_, head_k_);
      load_query_chunk<Traits>(params_, pair + Traits::kTileBytes, full, chunk + 1, request, tile_, head_k_);
      pair_ = pair_ + 1;
    }
    load_query<Traits>(params_, ptx::shared_address(shared_.q), ptx::shared_address(&shared_.q_full), request, tile_,
                       head_k_);
  }

  const DenseDecodeParams& params_;
  SharedStorage<Traits>& shared_;
  const QueryTile& tile_;
  const int head_k_;
  RingPosition<Traits::kPairSlots> pair_;
};

}  // namespace flash_mla::sm90

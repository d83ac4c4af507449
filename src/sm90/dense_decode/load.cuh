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

/// Fills the rings for all pieces of a part: with KV, and with Q ahead of it. By the active lanes of one warp. But the
/// first Q comes from another warp, as nothing is there yet and both are waited for.
template <class Traits, bool kIsWhole>
class Producer {
  using Boxes = KvBoxes<Traits, kIsWhole>;

 public:
  __device__ Producer(const DenseDecodeParams& params, SharedStorage<Traits>& shared)
      : params_(params), shared_(shared), boxes_(params), is_first_(kIsWhole || threadIdx.x % 32 == 0) {}

  /// Whether this lane has boxes to load.
  __device__ bool is_active() const { return boxes_.is_active(); }

  /// Q: the pairs of chunks that go to registers, through the ring, and what stays in shared memory. By one thread.
  /// `kWaits`: each as soon as its memory is free; else nobody has used it yet.
  template <bool kWaits>
  __device__ __forceinline__ void load_query(int request, const QueryTile& tile, int head_k) {
    const int bytes = params_.tiling.rows_per_tile() * Traits::kRowBytes;
#pragma unroll 1
    for (int i = 0; i < Traits::kNumRegisterPairs; ++i) {
      const std::uint32_t full = ptx::shared_address(&shared_.pair_full[pair_.slot]);
      if (kWaits) ptx::mbarrier_wait(ptx::shared_address(&shared_.pair_empty[pair_.slot]), pair_.phase ^ 1);
      ptx::mbarrier_arrive_expect(full, 2 * bytes);
      const int chunk = 2 * (Traits::kFirstRegisterPair + i);
      const std::uint32_t pair = ptx::shared_address(shared_.pairs[pair_.slot]);
      load_query_chunk<Traits>(params_, pair, full, chunk, request, tile, head_k);
      load_query_chunk<Traits>(params_, pair + Traits::kTileBytes, full, chunk + 1, request, tile, head_k);
      pair_ = pair_ + 1;
    }
    if (kWaits) ptx::mbarrier_wait(ptx::shared_address(&shared_.q_empty), (num_queries_ & 1) ^ 1);
    sm90::load_query<Traits>(params_, ptx::shared_address(shared_.q), ptx::shared_address(&shared_.q_full), request,
                             tile, head_k);
  }

  /// A part's first block, before the plan is there.
  __device__ __forceinline__ void load_first(const FirstBlock& first, int head_k) {
    pair_ = pair_ + Traits::kNumRegisterPairs;
    load_block(first.block, {first.page, first.page}, head_k);
  }

  /// `has_first`: the first block is on its way, and the next one's page is known.
  __device__ void load_piece(const Piece& piece, int head_k, bool has_first) {
    if (piece.begin_block == piece.end_block) return;
    if (num_queries_ > 0 && is_first_) {
      int tile_idx = blockIdx.x;
      ptx::launder(tile_idx);  // registers are too few to keep what is computed from it
      load_query<true>(piece.request, QueryTile(params_.tiling, tile_idx), head_k);
    } else {
      pair_ = pair_ + Traits::kNumRegisterPairs;
    }
    ++num_queries_;
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

  const DenseDecodeParams& params_;
  SharedStorage<Traits>& shared_;
  const Boxes boxes_;
  const bool is_first_;  // of the active lanes
  RingPosition<Traits::kPairSlots> pair_;
  RingPosition<Traits::kRopeSlots> rope_;
  int num_queries_ = 0;  // so far
};

}  // namespace flash_mla::sm90

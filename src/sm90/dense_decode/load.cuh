#pragma once

#include <cstdint>

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

/// The producer: lanes of one warp that fill the rings, for all pieces of a part. A piece's first pairs are those of Q
/// that go to registers.
template <class Traits>
class Producer {
  using Boxes = KvBoxes<Traits>;

 public:
  __device__ Producer(const DenseDecodeParams& params, SharedStorage<Traits>& shared)
      : params_(params), shared_(shared), boxes_(params) {}

  /// Whether this lane has boxes to load.
  __device__ bool is_active() const { return boxes_.is_active(); }

  __device__ void load_piece(const Piece& piece, const QueryTile& tile, int head_k) {
    if (piece.begin_block == piece.end_block) return;
    typename Boxes::Pages pages = boxes_.look_up(piece, piece.begin_block);
    load_query_pairs(piece.request, tile, head_k);
    for (int block = piece.begin_block; block < piece.end_block; ++block) {
      const typename Boxes::Pages next_pages = boxes_.look_up(piece, block + 1);  // a block ahead, to hide its latency
      load_block(block, pages, head_k);
      pages = next_pages;
    }
  }

 private:
  __device__ void load_query_pairs(int request, const QueryTile& tile, int head_k) {
    const int bytes = params_.tiling.rows_per_tile() * Traits::kRowBytes;
#pragma unroll 1
    for (int i = 0; i < Traits::kNumRegisterPairs; ++i) {
      // All lanes wait: one that has not seen a phase of a barrier can't tell the next from the one before.
      const std::uint32_t full = acquire(shared_.pair_full, shared_.pair_empty, pair_, 2 * bytes);
      if (lane() == 0) {
        const int chunk = 2 * (Traits::kFirstRegisterPair + i);
        const std::uint32_t pair = ptx::shared_address(shared_.pairs[pair_.slot]);
        load_query_chunk<Traits>(params_, pair, full, chunk, request, tile, head_k);
        load_query_chunk<Traits>(params_, pair + Traits::kTileBytes, full, chunk + 1, request, tile, head_k);
      }
      pair_ = pair_ + 1;
    }
  }

  /// In the order in which QK reads them.
  __device__ void load_block(int block, const typename Boxes::Pages& pages, int head_k) {
    const std::uint32_t rope_full = acquire(shared_.rope_full, shared_.rope_empty, rope_, Traits::kTileBytes);
    boxes_.load_chunk(ptx::shared_address(shared_.ropes[rope_.slot]), rope_full, block, Traits::kRopeChunk, pages,
                      head_k);
    rope_ = rope_ + 1;
#pragma unroll 1
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
  __device__ std::uint32_t acquire(std::uint64_t (&full)[kSlots], std::uint64_t (&empty)[kSlots],
                                   const RingPosition<kSlots>& at, int bytes) const {
    ptx::mbarrier_wait(ptx::shared_address(&empty[at.slot]), at.phase ^ 1);
    const std::uint32_t barrier = ptx::shared_address(&full[at.slot]);
    if (lane() == 0) ptx::mbarrier_arrive_expect(barrier, bytes);
    return barrier;
  }

  __device__ static int lane() { return threadIdx.x % 32; }

  const DenseDecodeParams& params_;
  SharedStorage<Traits>& shared_;
  const Boxes boxes_;
  RingPosition<Traits::kPairSlots> pair_;
  RingPosition<Traits::kRopeSlots> rope_;
};

}  // namespace flash_mla::sm90

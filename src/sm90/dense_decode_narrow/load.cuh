#pragma once

#include <cstdint>

#include "sm90/dense_decode/kv_boxes.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/query_load.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// Fills the ring with the part's KV blocks, in order and across pieces. By the active lanes of one warp.
template <class Traits>
__device__ void produce_kv(const DenseDecodeParams& params, NarrowStorage<Traits>& shared, int head_k, int part_idx) {
  const KvBoxes<Traits> boxes(params);
  if (!boxes.is_active()) return;
  const std::uint32_t kv = ptx::shared_address(shared.kv);
  const std::uint32_t full = ptx::shared_address(shared.kv_full);
  const std::uint32_t empty = ptx::shared_address(shared.kv_empty);
  RingPosition<Traits> at;
  PieceWalk walk(params, part_idx);
  Piece piece;
  while (walk.next(piece)) {
    typename KvBoxes<Traits>::Pages pages = boxes.look_up(piece, piece.begin_block);
    for (int block = piece.begin_block; block < piece.end_block; ++block) {
      const typename KvBoxes<Traits>::Pages next_pages = boxes.look_up(piece, block + 1);
#pragma unroll 1
      for (int i = 0; i < Traits::kNumChunks; ++i, at = at + 1) {
        const int chunk = i == 0 ? Traits::kRopeChunk : i - 1;
        const std::uint32_t slot_full = full + at.slot * sizeof(std::uint64_t);
        ptx::mbarrier_wait(empty + at.slot * sizeof(std::uint64_t), at.phase ^ 1);
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_expect(slot_full, Traits::kChunkBytes);
        __syncwarp(__activemask());
        boxes.load_chunk(kv + at.slot * Traits::kChunkBytes, slot_full, block, chunk, pages, head_k);
      }
      pages = next_pages;
    }
  }
}

/// Loads Q of each piece. By one thread of another warp, so that the ring goes on filling while consumers end a piece.
template <class Traits>
__device__ void produce_query(const DenseDecodeParams& params, NarrowStorage<Traits>& shared, const QueryTile& tile,
                              int head_k, int part_idx) {
  std::uint32_t phase = 0;
  PieceWalk walk(params, part_idx);
  Piece piece;
  while (walk.next(piece)) {
    if (piece.begin_block == piece.end_block) continue;
    ptx::mbarrier_wait(ptx::shared_address(&shared.q_empty), phase ^ 1);
    phase ^= 1;
    load_query<Traits>(params, ptx::shared_address(shared.q), ptx::shared_address(&shared.q_full), piece.request, tile,
                       head_k);
  }
}

}  // namespace flash_mla::sm90

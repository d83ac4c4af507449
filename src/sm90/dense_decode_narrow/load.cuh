#pragma once

#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/tma.cuh"

namespace flash_mla::sm90 {

/// The pages of a block's boxes. Lane i of the producer warp looks up boxes i and i + 32.
struct BlockPages {
  int first;
  int second;

  /// The page of a box, for all lanes.
  __device__ int of_box(int box) const { return __shfl_sync(~0U, box < 32 ? first : second, box % 32); }
};

/// Fills the ring with the part's KV blocks, in order and across pieces. By one warp: a lane for each chunk. A block
/// comes as boxes of a few tokens and the 64 columns of a chunk, all columns of a token at about the same time, as
/// memory has them in a row.
template <class Traits>
class NarrowProducer {
 public:
  __device__ NarrowProducer(const DenseDecodeParams& params, NarrowStorage<Traits>& shared)
      : params_(params),
        lane_(threadIdx.x % 32),
        kv_(ptx::shared_address(shared.kv)),
        kv_full_(ptx::shared_address(shared.kv_full)),
        kv_empty_(ptx::shared_address(shared.kv_empty)) {}

  __device__ void load_piece(const Piece& piece, int head_k) {
    BlockPages pages = look_up(piece, piece.begin_block);
    for (int block = piece.begin_block; block < piece.end_block; ++block) {
      const BlockPages next_pages = look_up(piece, block + 1);  // a block ahead, to hide its latency
      load_block(block, pages, head_k);
      pages = next_pages;
    }
  }

 private:
  __device__ BlockPages look_up(const Piece& piece, int block) const {
    return {look_up(piece, block, lane_), look_up(piece, block, lane_ + 32)};
  }

  /// The page of a box. Entries of the block table past the request's end are not read.
  __device__ int look_up(const Piece& piece, int block, int box) const {
    const int token = block * Traits::kBlockN + box * params_.box_tokens;
    if (box * params_.box_tokens >= Traits::kBlockN || block >= piece.end_block || token >= piece.seqlen_k) {
      return kNoPage;
    }
    return __ldg(params_.block_table + piece.request * params_.stride_block_table + (token >> params_.page_size_log2));
  }

  __device__ void load_block(int block, const BlockPages& pages, int head_k) {
    const bool has_chunk = lane_ < Traits::kNumChunks;
    const int chunk = lane_ == 0 ? Traits::kRopeChunk : lane_ - 1;
    const ChunkRing<Traits> at = at_ + min(lane_, Traits::kNumChunks);
    const std::uint32_t full = kv_full_ + at.slot * sizeof(std::uint64_t);
    if (has_chunk) {
      ptx::mbarrier_wait(kv_empty_ + at.slot * sizeof(std::uint64_t), at.phase ^ 1);
      ptx::mbarrier_arrive_expect(full, Traits::kChunkBytes);
    }
    __syncwarp();
    const int page_mask = (1 << params_.page_size_log2) - 1;
#pragma unroll 1
    for (int row = 0; row < Traits::kBlockN; row += params_.box_tokens) {
      const int page = pages.of_box(row / params_.box_tokens);
      if (has_chunk) {
        ptx::tma_load_4d(kv_ + at.slot * Traits::kChunkBytes + row * Traits::kRowBytes, &params_.k_cache_map, full,
                         chunk * Traits::kChunkColumns, (block * Traits::kBlockN + row) & page_mask, head_k, page,
                         ptx::Keep::kNotForLong);
      }
    }
    at_ = at_ + Traits::kNumChunks;
  }

  /// A page that the tensor map does not have: its box arrives as zeros.
  static constexpr int kNoPage = -1;

  const DenseDecodeParams& params_;
  const int lane_;
  const std::uint32_t kv_, kv_full_, kv_empty_;
  ChunkRing<Traits> at_;
};

}  // namespace flash_mla::sm90

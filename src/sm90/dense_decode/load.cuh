#pragma once

#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/tma.cuh"

namespace flash_mla::sm90 {

/// The producer: lanes of one warp that fill shared memory. A KV block arrives as one box per chunk where pages have 64
/// tokens or more, and one lane does it all; smaller pages take a box each, and each lane looks up and issues its own.
template <class Traits>
class Producer {
 public:
  __device__ Producer(const DenseDecodeParams& params, SharedStorage<Traits>& shared)
      : params_(params),
        lane_(threadIdx.x % 32),
        rows_per_box_(min(1 << params.page_size_log2, Traits::kBlockN)),
        q_(ptx::shared_address(shared.q)),
        kv_(ptx::shared_address(shared.kv)),
        q_full_(ptx::shared_address(&shared.q_full)),
        q_empty_(ptx::shared_address(&shared.q_empty)),
        kv_full_(ptx::shared_address(shared.kv_full)),
        kv_empty_(ptx::shared_address(shared.kv_empty)) {}

  /// Whether this lane has boxes to load.
  __device__ bool is_active() const { return lane_ * rows_per_box_ < Traits::kBlockN; }

  __device__ void load_piece(const Piece& piece, const QueryTile& tile, int head_k) {
    if (piece.begin_block == piece.end_block) return;
    BoxPages pages = look_up(piece, piece.begin_block);
    load_query(piece.request, tile, head_k);
    for (int block = piece.begin_block; block < piece.end_block; ++block) {
      const BoxPages next_pages = look_up(piece, block + 1);  // a block ahead, to hide its latency
      load_block(block, (block - piece.begin_block) % Traits::kNumBuffers, pages, head_k);
      pages = next_pages;
    }
  }

 private:
  /// The page of this lane's box, and, with pages of one token, of its second box.
  struct BoxPages {
    int first;
    int second;
  };
  /// A page that the tensor map does not have: its box arrives as zeros.
  static constexpr int kNoPage = -1;

  __device__ void load_query(int request, const QueryTile& tile, int head_k) {
    ptx::mbarrier_wait(q_empty_, q_phase_ ^ 1);
    q_phase_ ^= 1;
    if (lane_ != 0) return;
    const int head = head_k * params_.tiling.group_size + tile.head;
    ptx::mbarrier_arrive_expect(q_full_, Traits::kNumChunks * params_.tiling.rows_per_tile() * Traits::kRowBytes);
    for (int chunk = 0; chunk < Traits::kNumChunks; ++chunk) {
      ptx::tma_load_4d(q_ + chunk * Traits::kChunkBytes, &params_.q_map, q_full_, chunk * Traits::kChunkColumns, head,
                       tile.query, request);
    }
  }

  __device__ BoxPages look_up(const Piece& piece, int block) const {
    return {look_up(piece, block, lane_), rows_per_box_ == 1 ? look_up(piece, block, lane_ + 32) : kNoPage};
  }

  /// The page of a box. Entries of the block table past the request's end are not read.
  __device__ int look_up(const Piece& piece, int block, int box) const {
    const int token = block * Traits::kBlockN + box * rows_per_box_;
    if (block >= piece.end_block || token >= piece.seqlen_k) return kNoPage;
    return __ldg(params_.block_table + piece.request * params_.stride_block_table + (token >> params_.page_size_log2));
  }

  __device__ void load_block(int block, int buffer, const BoxPages& pages, int head_k) {
    const std::uint32_t parity = (kv_phases_ >> buffer & 1) ^ 1;
    kv_phases_ ^= 1U << buffer;
    const std::uint32_t full = kv_full_ + buffer * Traits::kNumChunks * sizeof(std::uint64_t);
    const std::uint32_t empty = kv_empty_ + buffer * Traits::kNumPairs * sizeof(std::uint64_t);
#pragma unroll
    for (int step = 0; step < Traits::kNumPairs; ++step) {
      const int pair = pair_at(buffer, step);
      ptx::mbarrier_wait(empty + pair * sizeof(std::uint64_t), parity);
      // RoPE is freed when the QK on this buffer is done, so no copy into it is under way: all its barriers can be
      // armed, and after later releases nothing but the copy remains.
      if (step == 0) arm(full);
#pragma unroll
      for (int i = 0; i < (step == 0 ? 1 : 2); ++i) {
        load_chunk(block, buffer, 2 * pair + i, full, pages, head_k);
      }
    }
  }

  __device__ void arm(std::uint32_t full) const {
    if (lane_ == 0) {
#pragma unroll
      for (int chunk = 0; chunk < Traits::kNumChunks; ++chunk) {
        ptx::mbarrier_arrive_expect(full + chunk * sizeof(std::uint64_t), Traits::kChunkBytes);
      }
    }
    __syncwarp(__activemask());
  }

  /// The order in which a buffer's pairs come free, and in which QK reads them: RoPE, then the columns of the
  /// warpgroup that owns the buffer.
  __device__ static int pair_at(int buffer, int step) {
    return step == 0 ? Traits::kRopePair : (step - 1 + 2 * buffer) % (Traits::kNumPairs - 1);
  }

  __device__ void load_chunk(int block, int buffer, int chunk, std::uint32_t full, const BoxPages& pages,
                             int head_k) const {
    const std::uint32_t destination =
        kv_ + buffer * Traits::kTileBytes + chunk * Traits::kChunkBytes + lane_ * rows_per_box_ * Traits::kRowBytes;
    const std::uint32_t barrier = full + chunk * sizeof(std::uint64_t);
    const int column = chunk * Traits::kChunkColumns;
    const int page_offset = (block * Traits::kBlockN) & ((1 << params_.page_size_log2) - 1);
    ptx::tma_load_4d(destination, &params_.k_cache_map, barrier, column, page_offset, head_k, pages.first);
    if (rows_per_box_ == 1) {
      ptx::tma_load_4d(destination + 32 * Traits::kRowBytes, &params_.k_cache_map, barrier, column, page_offset, head_k,
                       pages.second);
    }
  }

  const DenseDecodeParams& params_;
  const int lane_;
  const int rows_per_box_;
  const std::uint32_t q_, kv_, q_full_, q_empty_, kv_full_, kv_empty_;
  std::uint32_t q_phase_ = 0;
  std::uint32_t kv_phases_ = 0;  // a bit for each buffer
};

}  // namespace flash_mla::sm90

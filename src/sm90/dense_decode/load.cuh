#pragma once

#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"
#include "sm90/ptx/tma.cuh"

namespace flash_mla::sm90 {

/// The producer: one warp that fills shared memory. A KV block arrives as one box per chunk where pages have 64 tokens
/// or more; smaller pages take a box each, and each lane looks up and issues its own.
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

  __device__ void load_piece(const Piece& piece, const QueryTile& tile, int head_k) {
    if (piece.begin_block == piece.end_block) return;
    int pages[kMaxBoxesPerLane];
    look_up(piece, piece.begin_block, pages);
    load_query(piece.request, tile, head_k);
    for (int block = piece.begin_block; block < piece.end_block; ++block) {
      int next_pages[kMaxBoxesPerLane];
      look_up(piece, block + 1, next_pages);  // a block ahead, to hide its latency
      load_block(block, (block - piece.begin_block) % Traits::kNumBuffers, pages, head_k);
      for (int i = 0; i < kMaxBoxesPerLane; ++i) pages[i] = next_pages[i];
    }
  }

 private:
  static constexpr int kMaxBoxesPerLane = Traits::kBlockN / 32;
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

  /// The pages of this lane's boxes of a block. Entries of the block table past the request's end are not read.
  __device__ void look_up(const Piece& piece, int block, int (&pages)[kMaxBoxesPerLane]) const {
    const int* row = params_.block_table + piece.request * params_.stride_block_table;
    for (int i = 0; i < kMaxBoxesPerLane; ++i) {
      const int box_row = (lane_ + 32 * i) * rows_per_box_;
      const int token = block * Traits::kBlockN + box_row;
      const bool live = box_row < Traits::kBlockN && block < piece.end_block && token < piece.seqlen_k;
      pages[i] = live ? __ldg(row + (token >> params_.page_size_log2)) : kNoPage;
    }
  }

  __device__ void load_block(int block, int buffer, const int (&pages)[kMaxBoxesPerLane], int head_k) {
    const std::uint32_t parity = (kv_phases_ >> buffer & 1) ^ 1;
    kv_phases_ ^= 1U << buffer;
    const std::uint32_t full = kv_full_ + buffer * Traits::kNumChunks * sizeof(std::uint64_t);
    const std::uint32_t empty = kv_empty_ + buffer * Traits::kNumPairs * sizeof(std::uint64_t);
    for (int step = 0; step < Traits::kNumPairs; ++step) {
      const int pair = pair_at(buffer, step);
      ptx::mbarrier_wait(empty + pair * sizeof(std::uint64_t), parity);
      const int end_chunk = min(2 * pair + 2, Traits::kNumChunks);
      for (int chunk = 2 * pair; chunk < end_chunk; ++chunk) {
        load_chunk(block, chunk, kv_ + buffer * Traits::kTileBytes + chunk * Traits::kChunkBytes,
                   full + chunk * sizeof(std::uint64_t), pages, head_k);
      }
    }
  }

  /// The order in which a buffer's pairs come free, and in which QK reads them: RoPE, then the columns of the
  /// warpgroup that owns the buffer.
  __device__ static int pair_at(int buffer, int step) {
    return step == 0 ? Traits::kRopePair : (step - 1 + 2 * buffer) % (Traits::kNumPairs - 1);
  }

  __device__ void load_chunk(int block, int chunk, std::uint32_t destination, std::uint32_t full,
                             const int (&pages)[kMaxBoxesPerLane], int head_k) const {
    if (lane_ == 0) ptx::mbarrier_arrive_expect(full, Traits::kChunkBytes);
    __syncwarp();
    const int page_offset = (block * Traits::kBlockN) & ((1 << params_.page_size_log2) - 1);
#pragma unroll
    for (int i = 0; i < kMaxBoxesPerLane; ++i) {
      const int box_row = (lane_ + 32 * i) * rows_per_box_;
      if (box_row < Traits::kBlockN) {
        ptx::tma_load_4d(destination + box_row * Traits::kRowBytes, &params_.k_cache_map, full,
                         chunk * Traits::kChunkColumns, page_offset, head_k, pages[i]);
      }
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

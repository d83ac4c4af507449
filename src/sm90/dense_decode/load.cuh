#pragma once

#include <cstdint>

#include "sm90/dense_decode/kv_boxes.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode/traits.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// The producer: lanes of one warp that fill shared memory.
template <class Traits>
class Producer {
  using Boxes = KvBoxes<Traits>;

 public:
  __device__ Producer(const DenseDecodeParams& params, SharedStorage<Traits>& shared)
      : params_(params),
        boxes_(params),
        lane_(threadIdx.x % 32),
        kv_(ptx::shared_address(shared.kv)),
        kv_full_(ptx::shared_address(shared.kv_full)),
        kv_empty_(ptx::shared_address(shared.kv_empty)) {}

  /// Whether this lane has boxes to load.
  __device__ bool is_active() const { return boxes_.is_active(); }

  __device__ void load_piece(const Piece& piece, int head_k) {
    typename Boxes::Pages pages = boxes_.look_up(piece, piece.begin_block);
    for (int block = piece.begin_block; block < piece.end_block; ++block) {
      const typename Boxes::Pages next_pages = boxes_.look_up(piece, block + 1);  // a block ahead, to hide its latency
      load_block(block, (block - piece.begin_block) % Traits::kNumBuffers, pages, head_k);
      pages = next_pages;
    }
  }

 private:
  __device__ void load_block(int block, int buffer, const typename Boxes::Pages& pages, int head_k) {
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
        const int chunk = 2 * pair + i;
        boxes_.load_chunk(kv_ + buffer * Traits::kTileBytes + chunk * Traits::kChunkBytes,
                          full + chunk * sizeof(std::uint64_t), block, chunk, pages, head_k);
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

  const DenseDecodeParams& params_;
  const Boxes boxes_;
  const int lane_;
  const std::uint32_t kv_, kv_full_, kv_empty_;
  std::uint32_t kv_phases_ = 0;  // a bit for each buffer
};

}  // namespace flash_mla::sm90

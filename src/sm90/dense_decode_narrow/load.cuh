#pragma once

#include <cstdint>

#include "sm90/dense_decode/first_block.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/dense_decode_narrow/cluster_share.cuh"
#include "sm90/dense_decode_narrow/traits.cuh"
#include "sm90/primitives/renew.cuh"
#include "sm90/primitives/ring.cuh"
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

/// Fills the ring with the part's KV blocks, in order and across pieces, each as soon as a slot is empty. Where pages
/// have 64 tokens or more, a chunk is one box (kIsWhole), and one thread does it all. Else by one warp, a lane for each
/// chunk: a block then comes as boxes of a few tokens and the 64 columns of a chunk, all columns of a token at about
/// the same time, as memory has them in a row.
template <class Traits, bool kIsWhole>
class NarrowProducer {
 public:
  __device__ NarrowProducer(const DenseDecodeParams& params, NarrowStorage<Traits>& shared)
      : params_(params),
        shared_(shared),
        lane_(kIsWhole ? 0 : threadIdx.x % 32),
        box_tokens_(kIsWhole ? Traits::kBlockN : params.box_tokens),
        kv_(ptx::shared_address(shared.kv)),
        kv_full_(ptx::shared_address(shared.kv_full)),
        kv_empty_(ptx::shared_address(shared.kv_empty)) {}

  /// A cluster's CTA's blocks, into slots that nobody has used yet. By one thread.
  __device__ __forceinline__ void load_share(const ClusterShare& share, int head_k) {
#pragma unroll 1
    for (int block = share.begin_block; block < share.end_block; ++block) {
      load_whole_block(block, share.pages[at_.slot], head_k);
      at_ = at_ + 1;
    }
  }
  /// Waits for the copies of a wrong guess, and makes the barriers new that they report to.
  __device__ __forceinline__ void drop_share(const ClusterShare& guess) {
    for (int slot = 0; slot < guess.end_block - guess.begin_block; ++slot) {
      for (int i = 0; i < Traits::kNumChunks; ++i) renew_mbarrier(full_of(slot, i));
    }
    ptx::fence_mbarrier_init();
  }

  /// A part's first block, before the plan is there. By one thread.
  __device__ __forceinline__ void load_first(const FirstBlock& first, int head_k) {
    load_whole_block(first.block, first.page, head_k);
  }

  /// `has_first`: the first block is on its way, and the next one's page is known.
  __device__ void load_piece(const Piece& piece, int head_k, bool has_first = false) {
    const int begin_block = piece.begin_block + static_cast<int>(has_first);
    at_ = at_ + static_cast<int>(has_first);
    BlockPages pages{shared_.plan.next_page, kNoPage};
    if (!has_first) pages = look_up(piece, begin_block);
#pragma unroll 1
    for (int block = begin_block; block < piece.end_block; ++block) {
      const BlockPages next_pages = look_up(piece, block + 1);  // a block ahead, to hide its latency
      ptx::mbarrier_wait(kv_empty_ + at_.slot * sizeof(std::uint64_t), at_.phase ^ 1);
      // All CTAs share memory, and those that are ahead would be done early: so the last block waits its turn.
      if (block > piece.begin_block && block == piece.end_block - 1) wait_for_block_before();
      if constexpr (kIsWhole) {
        load_whole_block(block, pages.first, head_k);
      } else {
        load_boxes(block, pages, head_k);
      }
      pages = next_pages;
      at_ = at_ + 1;
    }
  }

 private:
  /// Until the block that was asked for last has arrived.
  __device__ __forceinline__ void wait_for_block_before() const {
    static_assert(Traits::kNumSlots == 2);
    ptx::mbarrier_wait(full_of(at_.slot ^ 1, Traits::kNumChunks - 1),
                       at_.phase ^ static_cast<std::uint32_t>(at_.slot == 0));
  }

  __device__ __forceinline__ BlockPages look_up(const Piece& piece, int block) const {
    return {look_up(piece, block, lane_), kIsWhole ? kNoPage : look_up(piece, block, lane_ + 32)};
  }

  /// The page of a box. Entries of the block table past the request's end are not read.
  __device__ __forceinline__ int look_up(const Piece& piece, int block, int box) const {
    const int token = block * Traits::kBlockN + box * box_tokens_;
    if (box * box_tokens_ >= Traits::kBlockN || block >= piece.end_block || token >= piece.seqlen_k) return kNoPage;
    return params_.block_table[piece.request * params_.stride_block_table + (token >> params_.page_size_log2)];
  }

  __device__ __forceinline__ void load_whole_block(int block, int page, int head_k) {
#pragma unroll
    for (int i = 0; i < Traits::kNumChunks; ++i) {
      arm(i);
      load_box(i, 0, block, page, head_k);
    }
  }

  __device__ __forceinline__ void load_boxes(int block, const BlockPages& pages, int head_k) {
    const bool has_chunk = lane_ < Traits::kNumChunks;
    if (has_chunk) arm(lane_);
    __syncwarp();
#pragma unroll 1
    for (int row = 0; row < Traits::kBlockN; row += box_tokens_) {
      const int page = pages.of_box(row / box_tokens_);
      if (has_chunk) load_box(lane_, row, block, page, head_k);
    }
  }

  /// Lets the barrier of the slot's chunk number `i` wait for it.
  __device__ __forceinline__ void arm(int i) const { ptx::mbarrier_arrive_expect(full(i), Traits::kChunkBytes); }
  __device__ __forceinline__ void load_box(int i, int row, int block, int page, int head_k) const {
    const std::uint32_t to = kv_ + at_.slot * Traits::kBlockBytes + i * Traits::kChunkBytes + row * Traits::kRowBytes;
    ptx::tma_load_4d(to, &params_.k_cache_map, full(i), Traits::chunk_in_slot(i) * Traits::kChunkColumns,
                     params_.in_page(block * Traits::kBlockN + row), head_k, page, ptx::Keep::kNotForLong);
  }
  __device__ __forceinline__ std::uint32_t full(int i) const { return full_of(at_.slot, i); }
  __device__ __forceinline__ std::uint32_t full_of(int slot, int i) const {
    return kv_full_ + (slot * Traits::kNumChunks + i) * sizeof(std::uint64_t);
  }

  /// A page that the tensor map does not have: its box arrives as zeros.
  static constexpr int kNoPage = -1;

  const DenseDecodeParams& params_;
  const NarrowStorage<Traits>& shared_;
  const int lane_;
  const int box_tokens_;
  const std::uint32_t kv_, kv_full_, kv_empty_;
  RingPosition<Traits::kNumSlots> at_;
};

}  // namespace flash_mla::sm90

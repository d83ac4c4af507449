#pragma once

#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/piece.cuh"
#include "sm90/ptx/tma.cuh"

namespace flash_mla::sm90 {

/// How a KV block comes into shared memory, seen from a lane of the producer warp. A chunk is one box where pages have
/// 64 tokens or more (kIsWhole), and one lane does it all; smaller pages take a box each, and each lane looks up and
/// issues its own.
template <class Traits, bool kIsWhole>
class KvBoxes {
 public:
  /// The page of this lane's box, and, with pages of one token, of its second box.
  struct Pages {
    int first;
    int second;
  };

  __device__ explicit KvBoxes(const DenseDecodeParams& params)
      : params_(params), lane_(threadIdx.x % 32), rows_per_box_(kIsWhole ? Traits::kBlockN : params.box_tokens) {}

  /// Whether this lane has boxes to load.
  __device__ bool is_active() const { return kIsWhole || lane_ * rows_per_box_ < Traits::kBlockN; }

  __device__ __forceinline__ Pages look_up(const Piece& piece, int block) const {
    if constexpr (kIsWhole) return {look_up(piece, block, 0), kNoPage};
    return {look_up(piece, block, lane_), rows_per_box_ == 1 ? look_up(piece, block, lane_ + 32) : kNoPage};
  }

  /// Issues this lane's copies of a chunk of the block. Its 8 KB are reported to `barrier`.
  __device__ __forceinline__ void load_chunk(std::uint32_t chunk_address, std::uint32_t barrier, int block, int chunk,
                                             const Pages& pages, int head_k) const {
    const std::uint32_t destination = chunk_address + (kIsWhole ? 0 : lane_ * rows_per_box_ * Traits::kRowBytes);
    const int column = chunk * Traits::kChunkColumns;
    const int page_offset = params_.in_page(block * Traits::kBlockN);
    ptx::tma_load_4d(destination, &params_.k_cache_map, barrier, column, page_offset, head_k, pages.first,
                     ptx::Keep::kNotForLong);
    if (!kIsWhole && rows_per_box_ == 1) {
      ptx::tma_load_4d(destination + 32 * Traits::kRowBytes, &params_.k_cache_map, barrier, column, page_offset, head_k,
                       pages.second, ptx::Keep::kNotForLong);
    }
  }

 private:
  /// A page that the tensor map does not have: its box arrives as zeros.
  static constexpr int kNoPage = -1;

  /// The page of a box. Entries of the block table past the request's end are not read.
  __device__ __forceinline__ int look_up(const Piece& piece, int block, int box) const {
    const int token = block * Traits::kBlockN + box * rows_per_box_;
    if (block >= piece.end_block || token >= piece.seqlen_k) return kNoPage;
    return params_.block_table[piece.request * params_.stride_block_table + (token >> params_.page_size_log2)];
  }

  const DenseDecodeParams& params_;
  const int lane_;
  const int rows_per_box_;
};

}  // namespace flash_mla::sm90

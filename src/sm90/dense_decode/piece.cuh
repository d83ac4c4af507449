#pragma once

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"

namespace flash_mla::sm90 {

/// A contiguous range of one request's KV blocks, worked by one CTA.
struct Piece {
  int request;
  int seqlen_k;
  int begin_block;
  int end_block;  // excluded; begin_block where the piece has no tokens
  bool is_whole;  // the request's only piece: its result is final
  int slot;       // where the result goes otherwise
};

/// Walks the pieces of a part. Every role of the CTA walks them alike. The part's row, in shared memory, is read again
/// for each piece: consumers have no registers to keep it in.
class PieceWalk {
 public:
  __device__ PieceWalk(const DenseDecodeParams& params, const PartPlan& plan, int part_idx)
      : params_(params), plan_(plan), part_(plan.part), part_idx_(part_idx), request_(max(part_.begin_request, 0)) {}

  __device__ bool next(Piece& piece) {
    const int last = min(part_.end_request, params_.batch_size - 1);
    if (request_ > last) return false;
    const int begin = request_ == part_.begin_request ? max(part_.begin_block, 0) : 0;
    const int end = request_ == part_.end_request ? part_.end_block : scheduler::kToEnd;
    piece.request = request_;
    if (plan_.has_first != 0 && request_ == part_.begin_request) {
      piece.seqlen_k = plan_.first_seqlen_k;  // a load behind copies waits for them
    } else {
      piece.seqlen_k = min(params_.cache_seqlens[request_], params_.max_seqlen_k);
    }
    piece.end_block = min(end, static_cast<int>(scheduler::num_blocks(piece.seqlen_k)));
    piece.begin_block = min(begin, piece.end_block);
    piece.is_whole = begin == 0 && end == scheduler::kToEnd;
    piece.slot = 2 * part_idx_ + (begin == 0 ? 1 : 0);
    ++request_;
    return true;
  }

 private:
  const DenseDecodeParams& params_;
  const PartPlan& plan_;
  const scheduler::Part& part_;
  const int part_idx_;
  int request_;
};

/// Whether the part's first piece has blocks.
__device__ __forceinline__ bool has_blocks(const DenseDecodeParams& params, const PartPlan& plan, int part_idx) {
  Piece piece;
  return PieceWalk(params, plan, part_idx).next(piece) && piece.begin_block < piece.end_block;
}

}  // namespace flash_mla::sm90

#pragma once

#include "scheduler/small_plan.cuh"
#include "scheduler/split_plan.h"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/plan_source.h"
#include "sm90/ptx/memory.cuh"
#include "sm90/ptx/tma.cuh"

namespace flash_mla::sm90 {

/// The first KV block of a part, as the plan, the length and the block table look while the grids before still run, and
/// may be writing them: a guess, by which L2 is asked ahead, and copies begin as soon as these grids have ended. A load
/// behind copies waits for them, so the guess tells, too, what is needed next: the length, and the page of the block
/// after. By one warp; each lane keeps a word that the guess rests on.
///
/// None where pages have fewer than 64 tokens, and where the plan of several requests is made in the kernel.
class FirstBlock {
 public:
  /// Asks for what comes first: the part's row, or the length of the only request.
  template <PlanSource kPlanSource>
  __device__ __forceinline__ void begin_to_look(const DenseDecodeParams& params, int part_idx) {
    if (kPlanSource == PlanSource::kBatch || params.box_tokens < scheduler::kBlockN) return;
    const int lane = threadIdx.x % 32;
    if constexpr (kPlanSource == PlanSource::kGiven) {
      if (lane < kWordsOfPart) look_at(reinterpret_cast<const int*>(params.parts + part_idx) + lane);
    } else if (lane == kLaneOfLength) {
      look_at(params.cache_seqlens);
    }
  }
  /// Looks at the rest.
  template <PlanSource kPlanSource>
  __device__ __forceinline__ void look(const DenseDecodeParams& params, int part_idx) {
    if (kPlanSource == PlanSource::kBatch || !__any_sync(~0U, from_ != nullptr)) return;
    const int lane = threadIdx.x % 32;
    scheduler::Part part;
    if constexpr (kPlanSource == PlanSource::kGiven) {
      part.begin_request = __shfl_sync(~0U, value_, 0);
      part.begin_block = max(__shfl_sync(~0U, value_, 1), 0);
      part.end_request = min(__shfl_sync(~0U, value_, 2), params.batch_size - 1);
      part.end_block = __shfl_sync(~0U, value_, 3);
      if (part.begin_request < 0 || part.begin_request > part.end_request) return;
      if (lane == kLaneOfLength) look_at(params.cache_seqlens + part.begin_request);
    } else {
      const int length = min(__shfl_sync(~0U, value_, kLaneOfLength), params.max_seqlen_k);
      if (length > scheduler::SmallPlan::kMaxSeqlen) return;
      scheduler::SmallPlan::make_alone(length, params.num_parts, part_idx, part);
      if (part.begin_request > part.end_request) return;
    }
    request = part.begin_request;
    block = part.begin_block;
    const int last_of_table = last_block(params.max_seqlen_k);
    if (block > last_of_table) return;
    if (lane == kLaneOfPage || lane == kLaneOfNextPage) {
      const int its = min(block + lane - kLaneOfPage, last_of_table);
      look_at(params.block_table + part.begin_request * params.stride_block_table +
              (its * scheduler::kBlockN >> params.page_size_log2));
    }
    seqlen_k = min(__shfl_sync(~0U, value_, kLaneOfLength), params.max_seqlen_k);
    page = __shfl_sync(~0U, value_, kLaneOfPage);
    next_page = __shfl_sync(~0U, value_, kLaneOfNextPage);
    end_block_ = last_block(seqlen_k) + 1;
    if (part.begin_request == part.end_request) end_block_ = min(end_block_, part.end_block);
    exists = block < end_block_;
  }

  /// Of a block that exists: whether the part has so many of the request that CTAs end far apart. Those that begin
  /// early then have time to ask L2 for more.
  __device__ __forceinline__ bool is_of_long_part() const { return end_block_ - block >= kBlocksOfLongPart; }

  /// Looks at the lane's word again.
  __device__ __forceinline__ int look_again() const { return from_ != nullptr ? ptx::load_relaxed(from_) : value_; }
  /// Whether what look_again gives each lane is what the guess rests on.
  __device__ __forceinline__ bool rests_on(int value) const { return __all_sync(~0U, value == value_); }

  bool exists = false;
  int request = 0;
  int seqlen_k = 0;
  int block = 0;
  int page = 0;
  int next_page = 0;  // of the next block, if the request has one

 private:
  static constexpr int kBlockLog2 = 6;
  static_assert(scheduler::kBlockN == 1 << kBlockLog2);
  static constexpr int kBlocksOfLongPart = 32;
  static constexpr int kWordsOfPart = 4;
  static constexpr int kLaneOfLength = kWordsOfPart;
  static constexpr int kLaneOfPage = kLaneOfLength + 1;
  static constexpr int kLaneOfNextPage = kLaneOfPage + 1;

  /// -1 if there is none. (scheduler::num_blocks takes 64 bits, and so longer.)
  __device__ static int last_block(int seqlen_k) { return (max(seqlen_k, 0) - 1) >> kBlockLog2; }

  __device__ __forceinline__ void look_at(const int* from) {
    from_ = from;
    value_ = ptx::load_relaxed(from);
  }

  int end_block_ = 0;
  const int* from_ = nullptr;
  int value_ = 0;
};

/// Asks for a block, which lies in one page, to come into L2. By one thread.
template <class Traits>
__device__ __forceinline__ void prefetch_block(const DenseDecodeParams& params, int block, int page, int head_k) {
#pragma unroll
  for (int column = 0; column < kHeadDimQk; column += Traits::kChunkColumns) {
    ptx::tma_prefetch_4d(&params.k_cache_map, column, params.in_page(block * scheduler::kBlockN), head_k, page);
  }
}
/// A function, so that this code is not in the way of short parts.
template <class Traits>
static __device__ __noinline__ void prefetch_block_of_long_part(const DenseDecodeParams& params, int block, int page,
                                                                int head_k) {
  prefetch_block<Traits>(params, block, page, head_k);
}

}  // namespace flash_mla::sm90

#pragma once

#include <cstdint>

#include "scheduler/small_plan.cuh"
#include "scheduler/warp_plan.cuh"
#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/plan_source.h"
#include "sm90/primitives/arrive.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/memory.cuh"
#include "sm90/ptx/shared.cuh"

// What a CTA needs to know of the plan. Either the plan lies in global memory, or each CTA makes its own part of it.

namespace flash_mla::sm90 {

/// A request whose pieces lie in consecutive parts. Each of these parts merges a slice of it, and so do parts without
/// work behind them where the request is alone and slices would be large. But where the plan is given and there are two
/// pieces, of which the second is not the last of its part and so is there early, the first part merges all: its CTA
/// can keep its own piece.
struct SplitRequest {
  int request;
  int first_part;
  int num_pieces;  // 0: none
  int num_slices;

  __device__ bool has_piece(int part) const { return part - first_part < num_pieces; }
  __device__ bool first_merges_all() const { return num_slices < num_pieces; }
  /// Parts that have a piece, or a slice to merge.
  __device__ int num_members() const { return max(num_pieces, num_slices); }
  __device__ int slot(int piece) const { return 2 * (first_part + piece) + (piece == 0 ? 1 : 0); }
};

/// mbarriers for merging splits, in shared memory.
struct MergeBarriers {
  static constexpr int kNumShares = 8;

  std::uint64_t met;                       // for an arrival by each consumer thread
  std::uint64_t gathered;                  // for one by each of those that weigh
  std::uint64_t rows_known;                // for one by each consumer thread: weights, and where rows go
  std::uint64_t share_loaded[kNumShares];  // for one arrival, with the bytes of a share of the pieces, or in [0] of all
  std::uint64_t
      seen[2];  // of each split, for one by each consumer warp that loads: it has seen all flags that it needs

  /// Half of the consumers weigh, and half load.
  __device__ void init(int num_consumer_threads) {
    ptx::mbarrier_init(ptx::shared_address(&met), num_consumer_threads);
    ptx::mbarrier_init(ptx::shared_address(&gathered), num_consumer_threads / 2);
    const int num_loading_warps = num_consumer_threads / 2 / 32;
    for (auto& barrier : seen) ptx::mbarrier_init(ptx::shared_address(&barrier), num_loading_warps * kArrivalsOfWarp);
    ptx::mbarrier_init(ptx::shared_address(&rows_known), num_consumer_threads);
    for (auto& barrier : share_loaded) ptx::mbarrier_init(ptx::shared_address(&barrier), 1);
  }
};

/// Slices of a split request that a CTA merges.
struct SliceRange {
  int begin;
  int end;  // excluded
};

/// In shared memory.
struct PartPlan {
  scheduler::Part part;
  /// Whether Q of the part's first request was rightly guessed, and so is on its way. Of no meaning where the request
  /// is known.
  int has_query;
  /// Whether its first block was. If so, the request's length and the page of the block after are known, too.
  int has_first;
  int first_seqlen_k;
  int next_page;
  /// The request that the part continues, or helps to merge without a piece of it, and the one that it begins and does
  /// not end.
  SplitRequest splits[2];
  std::uint64_t splits_ready;  // an mbarrier for one arrival
  /// One for an arrival by each consumer thread: the piece of each split is in the workspace, if somebody reads it.
  std::uint64_t piece_written[2];
  SliceRange slices[2];
  std::uint64_t slices_known[2];  // for one arrival
  /// Whether the piece of the request that the part begins stays in shared memory, as this CTA merges all of it.
  int keeps_piece;
  std::uint64_t keeping_known;  // for one arrival
  std::uint64_t memory_free;    // for one by each consumer thread: the piece can go where Q and KV were

  /// Whether the piece that goes to a slot is read by somebody. Known once splits are ready. One that nobody reads must
  /// not be announced: what stays up would tell a replayed graph that the piece is there.
  __device__ bool is_read(int slot) const {
    const SplitRequest& split = splits[slot % 2];
    return split.num_pieces > 0 && split.has_piece(slot / 2);
  }
  /// Whether the piece of a slot is kept. Waits until that is known; once splits are ready.
  __device__ bool is_kept(int slot) {
    if (slot % 2 == 0 || !splits[1].first_merges_all()) return false;
    ptx::mbarrier_wait(ptx::shared_address(&keeping_known), 0);
    return keeps_piece != 0;
  }
  /// Waits until no consumer needs the memory of Q and KV any more, behind the part's last piece. By all of them.
  __device__ void free_memory() {
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(ptx::shared_address(&memory_free));
    ptx::mbarrier_wait(ptx::shared_address(&memory_free), 0);
    __syncwarp();
  }
};

/// By one thread, which calls fence_mbarrier_init() afterwards.
__device__ __forceinline__ void init_plan(PartPlan& plan, int num_consumer_threads) {
  ptx::mbarrier_init(ptx::shared_address(&plan.splits_ready), kArrivalsOfWarp);
  for (auto& barrier : plan.piece_written) ptx::mbarrier_init(ptx::shared_address(&barrier), num_consumer_threads);
  for (auto& barrier : plan.slices_known) ptx::mbarrier_init(ptx::shared_address(&barrier), 1);
  ptx::mbarrier_init(ptx::shared_address(&plan.keeping_known), 1);
  ptx::mbarrier_init(ptx::shared_address(&plan.memory_free), num_consumer_threads);
  plan.keeps_piece = 0;
}

__device__ __forceinline__ bool begins_a_split(const scheduler::Part& part) {
  return part.num_pieces > 1 && (part.end_request > part.begin_request || part.begin_block == 0);
}

/// Into how many slices a split request that is alone is merged. Smaller ones than this cost more than they save.
__device__ __forceinline__ int num_slices_of_lone(const DenseDecodeParams& params, int num_pieces) {
  return max(num_pieces, min(params.num_parts, params.tiling.rows));
}

/// Asks for lengths and pages, as far as a lane for each 128 bytes can, while the plan is on its way: whoever needs
/// them waits once for memory, and not three times in turn. Of a large batch, for the pages of the requests about where
/// the part's would be if all were equal. By a warp that has nothing else to do.
__device__ __forceinline__ void prefetch_tables(const DenseDecodeParams& params, int part_idx) {
  constexpr int kIntsPerLine = 128 / sizeof(int);
  constexpr int kLanes = 32;
  constexpr int kRequestsBefore = 2;
  const int lane = threadIdx.x % kLanes;
  if (lane * kIntsPerLine < params.batch_size) ptx::prefetch_l1(params.cache_seqlens + lane * kIntsPerLine);
  int request = lane;
  int line = 0;
  if (params.batch_size <= kLanes) {
    request = lane % params.batch_size;
    line = lane / params.batch_size;
  } else {
    const auto num_parts = static_cast<std::uint32_t>(params.num_parts);
    const std::uint32_t share = params.batch_size / num_parts;
    const std::uint32_t rest = params.batch_size % num_parts;
    request += static_cast<int>(share * part_idx + rest * part_idx / num_parts) - kRequestsBefore;
  }
  if (0 <= request && request < params.batch_size &&
      line * kIntsPerLine < params.max_seqlen_k >> params.page_size_log2) {
    ptx::prefetch_l1(params.block_table + request * params.stride_block_table + line * kIntsPerLine);
  }
}

/// `continued`: the request that the part continues. By one warp.
template <PlanSource kPlanSource>
__device__ __forceinline__ void write_plan(const DenseDecodeParams& params, int part_idx, const scheduler::Part& part,
                                           const SplitRequest& continued, PartPlan& plan) {
  if (threadIdx.x % 32 != 0) return;
  const int begun_pieces = begins_a_split(part) ? part.num_pieces : 0;
  plan.part = part;
  plan.splits[0] = continued;
  plan.splits[1] = {part.end_request, part_idx, begun_pieces,
                    kPlanSource == PlanSource::kLoneRequest ? num_slices_of_lone(params, begun_pieces) : begun_pieces};
}

__device__ __forceinline__ SplitRequest continued_split(const scheduler::Part& part, int num_pieces) {
  return {part.begin_request, part.first_part, num_pieces, num_pieces};
}

/// A function, so that this code, a third of the kernel's, is not in the way of what runs in every launch. By one warp.
static __device__ __noinline__ void plan_part_of_large_batch(const DenseDecodeParams& params, int part_idx,
                                                             PartPlan& plan) {
  std::int32_t pieces;
  const scheduler::WarpPlan batch(params.cache_seqlens, params.batch_size, params.num_parts, params.tiles);
  const scheduler::Part part = batch.row(part_idx, pieces);
  write_plan<PlanSource::kBatch>(params, part_idx, part, continued_split(part, pieces), plan);
}

/// The lone request, if the part continues it, or helps to merge it without a piece of it.
__device__ __forceinline__ SplitRequest lone_split(const DenseDecodeParams& params, int part_idx, int num_pieces) {
  const int num_slices = num_slices_of_lone(params, num_pieces);
  if (part_idx == 0 || part_idx >= num_slices || num_pieces == 1) return {};
  return {0, 0, num_pieces, num_slices};
}

/// For a request longer than SmallPlan takes. A function, too.
static __device__ __noinline__ void plan_part_of_long_request(const DenseDecodeParams& params, int part_idx,
                                                              PartPlan& plan) {
  scheduler::Part part;
  const std::int32_t seqlen = min(*params.cache_seqlens, params.max_seqlen_k);
  const std::int32_t pieces = scheduler::SplitPlan::write_alone(part, seqlen, part_idx, params.num_parts);
  write_plan<PlanSource::kLoneRequest>(params, part_idx, part, lone_split(params, part_idx, pieces), plan);
}

/// Writes the part, and where the plan is not given the splits too. By one warp.
template <PlanSource kPlanSource>
__device__ __forceinline__ void plan_part(const DenseDecodeParams& params, int part_idx, PartPlan& plan) {
  scheduler::Part part;
  if constexpr (kPlanSource == PlanSource::kGiven) {
    part = params.parts[part_idx];
    if (threadIdx.x % 32 == 0) plan.part = part;
  } else if constexpr (kPlanSource == PlanSource::kLoneRequest) {
    const std::int32_t seqlen = min(*params.cache_seqlens, params.max_seqlen_k);
    if (seqlen > scheduler::SmallPlan::kMaxSeqlen) {
      plan_part_of_long_request(params, part_idx, plan);
      return;
    }
    const std::int32_t pieces = scheduler::SmallPlan::make_alone(seqlen, params.num_parts, part_idx, part);
    write_plan<kPlanSource>(params, part_idx, part, lone_split(params, part_idx, pieces), plan);
  } else {
    std::int32_t pieces;
    if (!scheduler::SmallPlan::make(params.cache_seqlens, params.batch_size, params.num_parts, params.tiles, part_idx,
                                    part, pieces)) {
      plan_part_of_large_batch(params, part_idx, plan);
      return;
    }
    write_plan<kPlanSource>(params, part_idx, part, continued_split(part, pieces), plan);
  }
}

/// Split request number `i` of a part whose plan is given. By one warp. None, too, where the plan contradicts itself,
/// so that not all pieces would come; the parts of a request judge alike.
__device__ inline SplitRequest find_split(const DenseDecodeParams& params, const scheduler::Part& part, int part_idx,
                                          int i) {
  const int first_part = i == 0 ? part.first_part : part_idx;
  const bool continues = part.begin_block > 0 && first_part >= 0 && first_part < part_idx;
  if (part.begin_request > part.end_request || !(i == 0 ? continues : begins_a_split(part))) return {};
  const scheduler::Part first = params.parts[first_part];
  SplitRequest split{first.end_request, first_part, first.num_pieces, first.num_pieces};
  bool is_good =
      split.request >= 0 && split.request < params.batch_size && split.num_pieces > 1 &&
      part_idx - first_part < split.num_members() && split.num_pieces <= params.num_parts - first_part &&
      first.end_block != scheduler::kToEnd &&
      (first.begin_request < split.request || (first.begin_request == split.request && first.begin_block == 0));
  bool goes_on = false;
  for (int piece = 1 + threadIdx.x % 32; is_good && piece < split.num_pieces; piece += 32) {
    const scheduler::Part other = params.parts[first_part + piece];
    is_good = other.begin_request == split.request && other.end_request >= split.request && other.begin_block > 0 &&
              other.first_part == first_part;
    goes_on = other.end_request > split.request;
  }
  if (__any_sync(~0U, goes_on) && split.num_slices == 2) split.num_slices = 1;
  return __all_sync(~0U, is_good) ? split : SplitRequest{};
}

/// Finds the part's splits, while it is computed, and arrives at splits_ready. By one warp of every CTA.
template <PlanSource kPlanSource>
__device__ inline void find_splits(const DenseDecodeParams& params, int part_idx, PartPlan& plan) {
  if constexpr (kPlanSource == PlanSource::kGiven) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const SplitRequest split = find_split(params, plan.part, part_idx, i);
      if (threadIdx.x % 32 == 0) plan.splits[i] = split;
    }
  }
  arrive_of_warp(plan.splits_ready);
}

}  // namespace flash_mla::sm90

#pragma once

#include <cstdint>

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/plan_source.h"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/memory.cuh"
#include "sm90/ptx/shared.cuh"

// The CTAs that share a split request: they tell each other of their pieces, and agree on who merges.
//
// Together is fastest: each merges a slice of the tile, and waits for the pieces of all others. But it may wait only
// for CTAs that run, or have run, and nothing promises that all do: other kernels may have the SMs. So each CTA says
// that it has begun. Whoever first sees that all have decides for all that they merge together. A CTA that has written
// its piece and still misses somebody decides otherwise: then nobody waits, and the last to be done merges all slices.
// Either is decided once, by a compare-and-swap.

namespace flash_mla::sm90 {

/// Words in the workspace, of one tile of one KV head. What holds the launch's token is up. Tokens are unique among
/// launches, so that memory may hold anything before; but a replayed graph launches with the same one again, so the
/// last to look at a request's words clears them, and who has begun takes that back.
class TileFlags {
 public:
  __device__ TileFlags(const DenseDecodeParams& params, int tile)
      : params_(params), words_(params.flags + static_cast<std::int64_t>(tile) * kWordsPerPart * params.num_parts) {}

  /// One for each slot: up once its piece's values are in the workspace.
  __device__ std::uint64_t* written(int slot) const { return words_ + slot; }
  /// The part's CTA has begun, and not ended.
  __device__ std::uint64_t* begun(int part) const { return words_ + 2 * params_.num_parts + part; }
  /// CTAs that have seen all pieces of the request that the part begins.
  __device__ std::uint64_t* readers(int part) const { return words_ + 3 * params_.num_parts + part; }
  /// How that request is merged: 56 bits of the token, once it is decided, and kTogether, or how many CTAs are done.
  __device__ std::uint64_t* decision(int part) const { return words_ + 4 * params_.num_parts + part; }

  __device__ bool is_up(const std::uint64_t* word) const { return ptx::load_relaxed(word) == params_.token; }
  __device__ void raise(std::uint64_t* word) const { ptx::store_relaxed(word, params_.token); }

  static constexpr int kStateBits = 8;
  static constexpr std::uint64_t kStateMask = (1 << kStateBits) - 1;
  static constexpr std::uint64_t kTogether = kStateMask;
  static constexpr std::uint64_t kByTheLast = 0;
  static_assert(scheduler::kMaxParts < kTogether, "CTAs that share a request");

  __device__ std::uint64_t decide(std::uint64_t state) const { return params_.token << kStateBits | state; }
  __device__ bool is_decided(std::uint64_t word) const { return (word ^ params_.token << kStateBits) <= kStateMask; }

 private:
  const DenseDecodeParams& params_;
  std::uint64_t* const words_;
};

/// Whether all CTAs that share the part's split request number `i` merge it together. By one warp. Waits until one of
/// them has decided; none takes long over it once its piece is written.
template <PlanSource kPlanSource>
__device__ inline bool merge_together(const TileFlags& flags, PartPlan& plan, int part_idx, int i) {
  constexpr int kPatience = 16;  // looks, of 0.7 us
  const SplitRequest& split = plan.splits[i];
  const int lane = threadIdx.x % 32;
  std::uint64_t* const decision = flags.decision(split.first_part);
#pragma unroll 1
  for (int patience = kPatience;;) {
    std::uint64_t word = ptx::load_relaxed(decision);
    bool have_begun = true;
#pragma unroll 1
    for (int k = lane; k < split.num_members(); k += 32) {
      have_begun &= flags.is_up(flags.begun(split.first_part + k));
    }
    __syncwarp();
    have_begun = __all_sync(~0U, have_begun);
    word = __shfl_sync(~0U, word, 0);
    if (!flags.is_decided(word) && (have_begun || patience == 0)) {
      std::uint64_t before = 0;
      const std::uint64_t own = flags.decide(have_begun ? TileFlags::kTogether : TileFlags::kByTheLast);
      if (lane == 0) before = ptx::atomic_replace(decision, word, own);
      before = __shfl_sync(~0U, before, 0);
      word = before == word ? own : before;
    }
    if (flags.is_decided(word)) return (word & TileFlags::kStateMask) == TileFlags::kTogether;
    // Who may keep its piece waits for the decision before it writes it.
    const bool is_done = !split.has_piece(part_idx) ||
                         (kMayKeepPiece<kPlanSource> && i == 1 && split.first_merges_all()) ||
                         ptx::mbarrier_test(ptx::shared_address(&plan.piece_written[i]), 0);
    patience -= static_cast<int>(__any_sync(~0U, is_done));  // the same for all lanes
  }
}

/// Takes part in merging the part's split requests, which have been found: tells of its pieces when they are written,
/// and finds which slices it merges. By one warp, while the consumers go on.
template <PlanSource kPlanSource>
__device__ inline void share_splits(const DenseDecodeParams& params, const TileFlags& flags, PartPlan& plan,
                                    int part_idx) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // a lane has written splits
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const SplitRequest& split = plan.splits[i];
    if (split.num_pieces == 0) continue;
    const bool is_together = merge_together<kPlanSource>(flags, plan, part_idx, i);
    if (lane == 0) {
      const int own = part_idx - split.first_part;
      const bool keeps = kMayKeepPiece<kPlanSource> && is_together && i == 1 && split.first_merges_all();
      if (kMayKeepPiece<kPlanSource> && i == 1) {
        plan.keeps_piece = static_cast<int>(keeps);
        ptx::mbarrier_arrive(ptx::shared_address(&plan.keeping_known));
      }
      if (is_together) {
        plan.slices[i] = {own, min(own + 1, split.num_slices)};
        ptx::mbarrier_arrive(ptx::shared_address(&plan.slices_known[i]));
      }
      if (split.has_piece(part_idx) && !keeps) {
        std::uint64_t* const flag = flags.written(split.slot(own));  // found before the piece is written
        const std::uint64_t token = params.token;
        if (own == 0) *flags.readers(part_idx) = 0;
        ptx::mbarrier_wait(ptx::shared_address(&plan.piece_written[i]), 0);
        ptx::store_release(flag, token);
      }
      if (!is_together) {
        const std::uint64_t done = ptx::atomic_add(flags.decision(split.first_part), 1) & TileFlags::kStateMask;
        plan.slices[i] = {0, static_cast<int>(done) + 1 == split.num_members() ? split.num_slices : 0};
        ptx::mbarrier_arrive(ptx::shared_address(&plan.slices_known[i]));
      }
    }
    __syncwarp();
  }
}

/// Clears the words of the part's split requests, where this CTA is the last to look at them. By the same warp, beside
/// the consumers that merge.
__device__ inline void clear_flags(const TileFlags& flags, const PartPlan& plan, MergeBarriers& barriers,
                                   int part_idx) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) *flags.begun(part_idx) = 0;  // how its requests are merged has been decided
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const SplitRequest& split = plan.splits[i];
    if (split.num_pieces == 0 || plan.slices[i].begin == plan.slices[i].end) continue;
    ptx::mbarrier_wait(ptx::shared_address(&barriers.seen[i]), 0);
    if (plan.slices[i].end - plan.slices[i].begin < split.num_slices) {
      // The loads of the flags were acquires, so nothing need be released. One was of the first piece's, before which
      // the count was reset.
      std::uint64_t readers = 0;
      if (lane == 0) readers = ptx::atomic_add(flags.readers(split.first_part), 1);
      if (static_cast<int>(__shfl_sync(~0U, readers, 0)) + 1 < split.num_slices) continue;
    }
    if (lane == 0) *flags.decision(split.first_part) = 0;
#pragma unroll 1
    for (int k = lane; k < split.num_pieces; k += 32) *flags.written(split.slot(k)) = 0;
  }
}

}  // namespace flash_mla::sm90

#pragma once

#include "sm90/dense_decode/params.h"
#include "sm90/dense_decode/part_plan.cuh"
#include "sm90/dense_decode/plan_source.h"

// When the next grid may begin, on SMs that have nothing to do. There it looks what to load first, and asks L2 for it.
// It begins when all CTAs of this one have let it, or ended, and until all have ended it only guesses.
//
// Not before this grid has ended where several tiles read the same KV in long parts: on an idle GPU neighbours in a
// grid are neighbours, and their loads of the same lines become one; placed on SMs as a grid leaves them, the tiles of
// one KV are far from each other.

namespace flash_mla::sm90 {

/// Whether it may as soon as this grid has begun. Not for a lone request: its CTAs end together, and leave SMs idle,
/// and what has begun there is in their way.
template <PlanSource kPlanSource>
__device__ __forceinline__ bool lets_next_begin_at_once(const DenseDecodeParams& params) {
  return kPlanSource != PlanSource::kLoneRequest && !params.shares_kv;
}

/// Whether it may when the part's pieces are written, or about to be, and only merging is left: a hint, which orders
/// nothing. Where parts may be long, those of several requests count so, and those of which nothing was rightly
/// guessed.
__device__ __forceinline__ bool lets_next_begin(const DenseDecodeParams& params, const PartPlan& plan) {
  constexpr int kMaxShortPart = 8;  // blocks
  const scheduler::Part& part = plan.part;
  if (!params.shares_kv || part.begin_request > part.end_request) return true;
  if (part.begin_request < part.end_request || plan.has_first == 0) return false;
  const auto end_of_request = static_cast<int>(scheduler::num_blocks(plan.first_seqlen_k));
  return min(part.end_block, end_of_request) - max(part.begin_block, 0) <= kMaxShortPart;
}

}  // namespace flash_mla::sm90
